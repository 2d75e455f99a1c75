"""What is left of the saving in deployed artefacts, how noisy they are, and how fast.

    python benchmarks/deployment.py [--quick] [--aoti] [--only NAME …]

Two models with trained weights, and four of true dimensions with random weights and few layers, in
float32 and float16, with open batch and length:

- ONNX: bytes of weights against the report's, noise ratio in ONNX Runtime (both models there,
  against float64), latency there of original over rewritten, at two sizes. Every site is rewritten,
  so that the figures are of the form and not of what the exporter would leave out.
- TensorRT-RTX: the engine's own weight memory, as its builder states it, against the report's.
- AOTInductor (``--aoti``, a minute for each): noise ratio and latency of the compiled packages.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from record import heading, markdown_table, provenance, write
from torch import Tensor, nn
from torch.export import Dim

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "examples"))

from models import minilm, rxnfp, sentences  # noqa: E402

import bda_fx  # noqa: E402
from bda_fx.exporters.rewrite_pair import rewrite_pair  # noqa: E402

DTYPES = {"float32": torch.float32, "float16": torch.float16}
PACKAGES = ("onnx", "onnxscript", "onnxruntime", "tensorrt-rtx-cu12-bindings", "transformers")
BATCH, LENGTH = Dim("batch", min=1, max=64), Dim("length", min=2, max=256)


@dataclass(frozen=True)
class Case:
    """A model, and inputs [2, 64] or so to plan for, to prove with and to time."""

    model: nn.Module
    kwargs: dict[str, Any]
    dynamic_shapes: dict[str, Any]


def tokens(model: nn.Module, ids: Tensor, *, mask: bool = True) -> Case:
    kwargs = {"input_ids": ids, **({"attention_mask": torch.ones_like(ids)} if mask else {})}
    return Case(model, kwargs, {name: {0: BATCH, 1: LENGTH} for name in kwargs})


def lively(model: nn.Module) -> nn.Module:
    """Random weights of the size of their fan-in, and no two biases alike: as initialised, softmax
    is flat, what attention adds to the noise does not show, and equal zeros are stored once."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def minilm_case() -> Case:
    model, tokenizer = minilm()
    batch = tokenizer(sentences(4), padding=True, truncation=True, max_length=64,
                      return_tensors="pt")  # fmt: skip
    return tokens(model, batch["input_ids"])


def rxnfp_case() -> Case:
    return tokens(rxnfp(), torch.randint(13, 400, (2, 64)))


def latent_case() -> Case:
    """DeepSeek-V2-Lite's attention: E = 512, 16 heads of 128, decoupled RoPE; V3's code for it."""
    from transformers import DeepseekV3Config, DeepseekV3Model

    config = DeepseekV3Config(
        hidden_size=512, num_hidden_layers=2, num_attention_heads=16, num_key_value_heads=16,
        intermediate_size=1024, vocab_size=1000, kv_lora_rank=512, q_lora_rank=None,
        qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=2,
        n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1,
        moe_intermediate_size=64, use_cache=False,
    )  # fmt: skip
    return tokens(lively(DeepseekV3Model(config)), torch.randint(0, 1000, (2, 64)), mask=False)


def vit_case() -> Case:
    """DeiT-Tiny's shape: 192 features, 3 heads of 64."""
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=192, num_hidden_layers=2, num_attention_heads=3,
                       intermediate_size=768)  # fmt: skip
    pixels = torch.randn(2, 3, 224, 224)
    return Case(lively(ViTModel(config)), {"pixel_values": pixels}, {"pixel_values": {0: BATCH}})


def t5_case() -> Case:
    """T5-small's encoder: 512 features, 8 heads of 64."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(d_model=512, d_kv=64, num_heads=8, d_ff=2048, num_layers=2, vocab_size=1000)
    return tokens(lively(T5EncoderModel(config)), torch.randint(2, 1000, (2, 64)))


def whisper_case() -> Case:
    """Whisper-tiny's encoder: 384 features, 6 heads of 64, 1500 positions; 300 of them here."""
    from transformers import WhisperConfig, WhisperModel

    config = WhisperConfig(d_model=384, encoder_layers=2, encoder_attention_heads=6,
                           encoder_ffn_dim=1536, decoder_layers=1, decoder_attention_heads=6,
                           vocab_size=1000, max_source_positions=300, pad_token_id=0,
                           bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)  # fmt: skip
    encoder = lively(WhisperModel(config)).encoder
    features = torch.randn(2, 80, 600)  # a batch of one would be fixed by the export
    return Case(encoder, {"input_features": features}, {"input_features": {0: BATCH}})


CASES: dict[str, Callable[[], Case]] = {
    "MiniLM-L6": minilm_case,
    "rxnfp": rxnfp_case,
    "MLA (V2-Lite's shape)": latent_case,
    "ViT (DeiT-Tiny's)": vit_case,
    "T5-small encoder": t5_case,
    "Whisper-tiny encoder": whisper_case,
}


def measure(
    case: Case, directory: Path, dtype: torch.dtype, *, aoti: bool, quick: bool
) -> dict[str, Any]:
    """Figures of one model in one dtype. A quick run plans nothing and times nothing."""
    model = case.model.to(dtype)
    kwargs = {
        key: value.to(dtype) if value.is_floating_point() else value
        for key, value in case.kwargs.items()
    }
    options = {"basis_size": 3 / 4} if quick else {}
    pair = rewrite_pair(model, (), kwargs, case.dynamic_shapes, options)
    common: dict[str, Any] = {"dynamic_shapes": case.dynamic_shapes}
    onnx = bda_fx.export_onnx(
        pair, directory / "model.onnx", threads=torch.get_num_threads(), keep_slower=True,
        measure=not quick, **common,
    )  # fmt: skip
    assert onnx.report.bytes_before is not None
    assert onnx.report.bytes_after is not None
    assert onnx.fidelity is not None
    record: dict[str, Any] = {
        "sites": len(onnx.report.rewritten),
        "report_saves": onnx.report.bytes_before - onnx.report.bytes_after,
        "onnx_saves": onnx.bytes_saved,
        "onnx_bytes": [onnx.bytes_before, onnx.bytes_after],
        "file_bytes": onnx.file_bytes,
        "predicted_noise": onnx.report.noise_ratio,
        "proof": onnx.details["proof"],
        "noise": [asdict(output) for output in onnx.fidelity.outputs],
        "noise_ratio": onnx.fidelity.noise_ratio,
        "latency": [asdict(timing) for timing in onnx.timings],
    }
    if find_spec("tensorrt_rtx_bindings") is not None:
        engine = bda_fx.export_tensorrt(pair, directory / "model.engine", check=False, **common)
        record["engine_weights"] = [engine.bytes_before, engine.bytes_after]
        record["engine_saves"] = engine.bytes_saved
        assert engine.report.bytes_before is not None
        assert engine.report.bytes_after is not None
        record["engine_report_saves"] = engine.report.bytes_before - engine.report.bytes_after
        record["engine"] = dict(engine.details)
    if aoti:
        package = bda_fx.export_aoti(pair, directory / "model.pt2", **common)
        assert package.fidelity is not None
        record["aoti_noise_ratio"] = package.fidelity.noise_ratio
        record["aoti_latency"] = [asdict(timing) for timing in package.timings]
    return record


def row(name: str, dtype: str, record: dict[str, Any]) -> list[str]:
    speed = " / ".join(
        f"{t['speedup']:.2f} ({t['interval'][0]:.2f} … {t['interval'][1]:.2f})"
        for t in record["latency"]
    )
    engine = ""
    if "engine_saves" in record:
        promised = record["engine_report_saves"]  # of the first plan, which may save more
        part = record["engine_saves"] / promised if promised else 1.0
        engine = f"{record['engine_saves']:,} ({100 * part:.1f} %)"
    predicted = record["predicted_noise"]
    return [
        name, dtype, str(record["sites"]), f"{record['report_saves']:,}",
        f"{record['onnx_saves']:,}", engine, f"{predicted:.2f}" if predicted else "",
        f"{record['noise_ratio']:.2f} of {record['proof']['limit']:g}",
        str(len(record["proof"]["planned_for"])), speed,
    ]  # fmt: skip


COLUMNS = ["model", "dtype", "sites", "report saves", "ONNX saves", "engine weights save",
           "predicted noise", "noise in ONNX Runtime", "plans",
           "speedup in ONNX Runtime"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one small case, nothing timed")
    parser.add_argument("--aoti", action="store_true", help="AOTInductor packages too")
    parser.add_argument("--only", nargs="*", default=list(CASES), choices=list(CASES))
    given = parser.parse_args()
    names = ["ViT (DeiT-Tiny's)"] if given.quick else given.only
    records: dict[str, Any] = {}
    rows = []
    for name in names:
        for dtype in ["float32"] if given.quick else DTYPES:
            torch.manual_seed(0)
            with tempfile.TemporaryDirectory() as place:
                record = measure(CASES[name](), Path(place), DTYPES[dtype],
                                 aoti=given.aoti, quick=given.quick)  # fmt: skip
            records[f"{name}, {dtype}"] = record
            rows.append(row(name, dtype, record))
            print(" | ".join(rows[-1]), flush=True)
    origin = provenance(seed=0, packages=PACKAGES)
    text = "\n".join([
        "# Deployed artefacts", "", heading("deployment.py", origin), "",
        "Bytes of weights. Noise: error of the rewritten model over the original's, both in ONNX",
        "Runtime, against float64. Speedup: median of the ratio of pairs with its 95 % interval,",
        "at the example's size and at one drawn from the open axes; every site is rewritten.", "",
        markdown_table(COLUMNS, rows), "",
    ])  # fmt: skip
    write("deployment", text, {**origin, "cases": records}, quick=given.quick)


if __name__ == "__main__":
    main()
