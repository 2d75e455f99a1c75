"""Real weights, real inputs: the rewritten model is about as accurate as the original itself.

The measure is the error of the last hidden state against a float64 run of the same (rounded)
weights, as a multiple of the original's own error in that dtype. Only real tokens count: what a
model computes at padding is read by nobody, is nearly the same at every such position, and its
noise moves the ratio by ± 0.3 from one batch to the next.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

import bda_fx
from bda_fx.evaluate_float64 import evaluate_float64
from bda_fx.fidelity import relative_error
from tests import models, tolerances

LICENSES = Path("/usr/share/common-licenses")

REACTIONS = (
    # Precursors and reagents >> product, as rxnfp's vocabulary has it: Fischer esterification,
    # amide coupling, Suzuki coupling, aspirin, paracetamol, Williamson ether synthesis,
    # Diels–Alder, hydrogenation of nitrobenzene.
    "CC(=O)O.OCC.OS(=O)(=O)O>>CC(=O)OCC",
    "OC(=O)c1ccccc1.NCc1ccccc1.CN(C)C=O.CCN(C(C)C)C(C)C>>O=C(NCc1ccccc1)c1ccccc1",
    "Brc1ccccc1.OB(O)c1ccc(C)cc1.O=C([O-])[O-].[K+].[K+].[Pd]>>Cc1ccc(-c2ccccc2)cc1",
    "O=C(O)c1ccccc1O.CC(=O)OC(C)=O>>CC(=O)Oc1ccccc1C(=O)O",
    "Nc1ccc(O)cc1.CC(=O)OC(C)=O.O>>CC(=O)Nc1ccc(O)cc1",
    "CCBr.Oc1ccccc1.[OH-].[Na+]>>CCOc1ccccc1",
    "C=CC=C.O=C1C=CC(=O)O1.c1ccccc1>>O=C1OC(=O)C2CC=CCC12",
    "O=[N+]([O-])c1ccccc1.[H][H].[Pd].CCO>>Nc1ccccc1",
)

SMILES_TOKEN = re.compile(
    r"(\%\([0-9]{3}\)|\[[^\]]+]|Br?|Cl?|N|O|S|P|F|I|b|c|n|o|s|p|\||\(|\)|\.|=|#|-|\+|\\|\/|:|~|@|\?"
    r"|>>?|\*|\$|\%[0-9]{2}|[0-9])"
)
"""How rxnfp splits a reaction SMILES into tokens (rxnfp.tokenization, which needs rdkit)."""


def sentences() -> list[str]:
    """Twenty-four English sentences: of a licence if the system has one, else of Python."""
    path = LICENSES / "GPL-3"
    text = path.read_text() if path.exists() else f"{re.__doc__} {Path.__doc__} {str.__doc__}"
    words = " ".join(text.split())
    found = [s for s in re.split(r"(?<=[.;]) ", words) if 60 < len(s) < 200]
    return found[:24]


def tokenised_reactions() -> dict[str, Tensor]:
    vocabulary = models.rxnfp_vocabulary()
    rows = []
    for reaction in REACTIONS:
        tokens = SMILES_TOKEN.findall(reaction)
        assert "".join(tokens) == reaction
        ids = [vocabulary.get(token, vocabulary["[UNK]"]) for token in tokens]
        assert vocabulary["[UNK]"] not in ids, reaction
        rows.append([vocabulary["[CLS]"], *ids, vocabulary["[SEP]"]])
    width = max(map(len, rows))
    padded = [row + [vocabulary["[PAD]"]] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}


Measured = tuple[ExportedProgram, dict[str, Any], Tensor, float]


@cache
def original(name: str, dtype: torch.dtype) -> Measured:
    """Program in ``dtype``, inputs, the float64 truth of its rounded weights, its own error."""
    if name == "minilm":
        model, kwargs = models.minilm(), models.minilm_inputs(sentences(), max_length=24)
    else:
        model, kwargs = models.rxnfp(), tokenised_reactions()
    program = models.exported(models.Example(model.to(dtype), kwargs))
    truth = evaluate_float64(program, (), kwargs)[0][kwargs["attention_mask"].bool()]
    return program, kwargs, truth, relative_error(last_hidden(program, kwargs), truth)


def last_hidden(program: ExportedProgram, kwargs: dict[str, Any]) -> Tensor:
    """The last hidden state at real tokens, [tokens, features]."""
    with torch.no_grad():
        return program.module()(**kwargs)[0][kwargs["attention_mask"].bool()]


def noise_ratio(name: str, dtype: torch.dtype, options: dict[str, Any]) -> float:
    program, kwargs, truth, own = original(name, dtype)
    rewrite = bda_fx.rewrite(program, options=options)
    assert len(rewrite.report.rewritten) == {"minilm": 12, "rxnfp": 24}[name]
    return relative_error(last_hidden(rewrite.program, kwargs), truth) / own


@pytest.mark.parametrize(
    ("name", "dtype", "size"),
    [
        ("minilm", torch.float32, "full"),
        ("minilm", torch.float32, 15 / 16),
        ("minilm", torch.float16, "full"),
        ("minilm", torch.float16, 15 / 16),
        ("minilm", torch.bfloat16, "full"),
        ("minilm", torch.bfloat16, 15 / 16),
        ("rxnfp", torch.float32, "full"),
        ("rxnfp", torch.float32, 15 / 16),
        ("rxnfp", torch.float16, "full"),
        ("rxnfp", torch.float16, 15 / 16),
        ("rxnfp", torch.bfloat16, "full"),
        ("rxnfp", torch.bfloat16, 15 / 16),
    ],
    ids=str,
)
def test_noise(name: str, dtype: torch.dtype, size: str | float) -> None:
    ratio = noise_ratio(name, dtype, {"basis": "pivot", "basis_size": size})
    print(f"{name} {dtype} {size}: noise ratio {ratio:.3f}")
    assert ratio <= tolerances.NOISE_RATIO[size][dtype]


@pytest.mark.parametrize("name", ["minilm", "rxnfp"])
def test_default_options_obey_the_budget(name: str) -> None:
    """By default no site is predicted above the budget, and the model as a whole is below it."""
    program, kwargs, truth, own = original(name, torch.float32)
    rewrite = bda_fx.rewrite(program)
    report = rewrite.report
    ratio = relative_error(last_hidden(rewrite.program, kwargs), truth) / own
    print(f"{name} by default: {report.summary()}; noise ratio {ratio:.3f}")
    assert report.noise_ratio is not None
    assert report.noise_ratio <= tolerances.DEFAULT_BUDGET
    assert {site.reason_code for site in report.skipped} <= {"TOO_NOISY"}
    assert len(report.rewritten) > len(report.skipped)
    assert ratio <= tolerances.DEFAULT_BUDGET


@pytest.mark.parametrize("product", ["qk", "vo"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_noise_is_foretold_for_the_noisiest_output(dtype: torch.dtype, product: str) -> None:
    """Without a budget every basis has D rows; the prediction is for these very inputs."""
    model = models.minilm().to(dtype)
    kwargs = models.minilm_inputs(sentences(), max_length=16)
    kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])  # all of it is an output
    program = models.exported(models.Example(model, kwargs))
    truth = evaluate_float64(program, (), kwargs)
    options = {"products": (product,), "noise_budget": 1e6}
    rewrite = bda_fx.rewrite(program, calibration=[((), kwargs)], options=options)
    with torch.no_grad():
        own, got = program.module()(**kwargs), rewrite.program.module()(**kwargs)
    noise = [
        relative_error(new, exact) / relative_error(old, exact)
        for new, old, exact in zip(got.values(), own.values(), truth, strict=True)
    ]
    predicted = rewrite.report.noise_ratio
    print(f"{product} {dtype}: {max(noise):.3f} measured, {predicted:.3f} predicted")
    assert max(noise) > 1.2  # there is something to foretell
    assert predicted == pytest.approx(max(noise), rel=tolerances.FORETOLD_NOISE)


def test_first_rows_are_noisy() -> None:
    """Negative control: the measure tells a bad basis from a good one."""
    ratio = noise_ratio("minilm", torch.float32, {"basis": "first", "basis_size": "full"})
    assert ratio > 2 * tolerances.NOISE_RATIO["full"][torch.float32]
