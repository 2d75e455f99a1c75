"""``rewrite``: what is saved to a file, how it loads elsewhere, and what bad input is told."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import bda_fx
from tests import models, tolerances
from tests.models import Case, Example

FULL = {"basis": "pivot", "basis_size": "full"}


def saved(program: ExportedProgram, path: Path) -> Path:
    torch.export.save(program, path)
    return path


def run(program: ExportedProgram, kwargs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return program.module()(**kwargs)[0]


def weight_bytes(path: Path) -> dict[str, int]:
    """Bytes of each weight and constant in a ``.pt2`` file, by its name in the program."""
    sizes = {}
    with zipfile.ZipFile(path) as archive:
        entries = {info.filename: info for info in archive.infolist()}
        for name in entries:
            if not name.endswith("_config.json") or "/data/" not in name:
                continue
            folder = name.rsplit("/", 1)[0]
            for target, described in json.loads(archive.read(name))["config"].items():
                record = entries[f"{folder}/{described['path_name']}"]
                assert record.compress_type == zipfile.ZIP_STORED
                sizes[target] = record.file_size
    return sizes


LOADER = """
import sys
sys.modules["bda_fx"] = None  # importing it raises
import torch
program = torch.export.load(sys.argv[1])
inputs = torch.load(sys.argv[2])
with torch.no_grad():
    torch.save(program.module()(**inputs)[0], sys.argv[3])
assert not any(name.startswith("bda_fx.") for name in sys.modules)
"""


def test_loads_where_bda_fx_is_not_installed(tmp_path: Path) -> None:
    example = models.make(Case("bert", "sdpa"))
    # A tuple comes out: transformers' output classes would have to be imported to load it.
    example.kwargs["return_dict"] = False
    program = bda_fx.rewrite(example.model, (), example.kwargs, options=FULL).program
    path = saved(program, tmp_path / "rewritten.pt2")
    torch.save(example.kwargs, tmp_path / "inputs.pt")
    files = [path, tmp_path / "inputs.pt", tmp_path / "output.pt"]
    (tmp_path / "load.py").write_text(LOADER)
    command = [sys.executable, "load.py", *map(str, files)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    output = torch.load(tmp_path / "output.pt")
    assert torch.equal(output, run(program, example.kwargs))


@pytest.fixture(scope="module")
def rxnfp() -> ExportedProgram:
    kwargs = {"input_ids": torch.randint(13, 400, (models.B, models.S))}
    return models.exported(Example(models.rxnfp(), kwargs))


@pytest.mark.parametrize("basis", ["window", "pivot"])
def test_rxnfp_saves_a_quarter_of_k_and_v(
    rxnfp: ExportedProgram, basis: str, tmp_path: Path
) -> None:
    """D / E = 64 / 256. A window needs no index; a scattered basis has E int64 indices a site."""
    rewrite = bda_fx.rewrite(rxnfp, options={"basis": basis, "basis_size": "full"})
    assert len(rewrite.report.rewritten) == 24
    old_file, new_file = (
        saved(rxnfp, tmp_path / "old.pt2"),
        saved(rewrite.program, tmp_path / "new"),
    )
    old, new = weight_bytes(old_file), weight_bytes(new_file)
    names = [site.name for site in rewrite.report.rewritten]
    before = sum(old[name] for name in names)
    coefficients = sum(size for name, size in new.items() if name.endswith("_coefficients"))
    index = sum(size for name, size in new.items() if name.endswith(("_rows", "_rest")))
    saving = 1 - coefficients / before
    print(
        f"rxnfp {basis}: K and V {-100 * saving:.3f} %, index tensors {100 * index / before:.3f} %"
    )
    assert not set(names) & set(new)
    assert saving == pytest.approx(0.25, abs=0.001)
    assert index == (0 if basis == "window" else 24 * 256 * 8)
    # The report tells the truth about the file.
    assert sum(old.values()) == rewrite.report.bytes_before
    assert sum(new.values()) == rewrite.report.bytes_after
    shrunk = old_file.stat().st_size - new_file.stat().st_size
    promised = rewrite.report.bytes_before - rewrite.report.bytes_after
    grown = container_bytes(new_file)[0] - container_bytes(old_file)[0]
    print(f"rxnfp {basis}: file −{shrunk:,}, report −{promised:,}, graph as text {grown:+,} bytes")
    headers = max(container_bytes(old_file)[1], container_bytes(new_file)[1])
    assert abs(shrunk - (promised - grown)) <= headers


def container_bytes(path: Path) -> tuple[int, int]:
    """Bytes of the records that are no weight (the graph as text), and at most of zip headers."""
    with zipfile.ZipFile(path) as archive:
        infos = archive.infolist()
    text = sum(info.compress_size for info in infos) - sum(weight_bytes(path).values())
    return text, tolerances.ZIP_END + sum(tolerances.zip_record(len(i.filename)) for i in infos)


def dynamic_encoder() -> tuple[ExportedProgram, bda_fx.Rewrite]:
    model = models.make(Case("encoder", "sdpa")).model
    x = torch.randn(3, 5, 32)
    shapes = {"x": {0: Dim("batch", max=64), 1: Dim("tokens", max=512)}}
    original = torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False)
    return original, bda_fx.rewrite(model, (x,), dynamic_shapes=shapes, options=FULL)


def test_dynamic_batch_and_sequence_stay_dynamic() -> None:
    original, rewrite = dynamic_encoder()
    assert len(rewrite.report.rewritten) == 4
    assert str(rewrite.program.range_constraints) == str(original.range_constraints)
    module, reference = rewrite.program.module(), original.module()
    for batch, tokens in ((1, 1), (2, 9), (7, 3), (1, 64)):
        x = torch.randn(batch, tokens, 32, generator=torch.Generator().manual_seed(batch))
        with torch.no_grad():
            ours, theirs = module(x), reference(x)
        assert ours.shape == theirs.shape
        error = float((ours - theirs).norm() / theirs.norm())
        assert error <= tolerances.FLOAT32_MODEL


def test_dynamic_program_saves_and_loads(tmp_path: Path) -> None:
    _, rewrite = dynamic_encoder()
    loaded = torch.export.load(saved(rewrite.program, tmp_path / "dynamic.pt2"))
    x = torch.randn(4, 11, 32)
    with torch.no_grad():
        assert torch.equal(loaded.module()(x), rewrite.program.module()(x))


def test_dynamic_masked_transformer() -> None:
    example = models.make(Case("bert", "sdpa"))
    free = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
    shapes = {"input_ids": free, "attention_mask": free}
    rewrite = bda_fx.rewrite(example.model, (), example.kwargs, dynamic_shapes=shapes, options=FULL)
    assert len(rewrite.report.rewritten) == 4
    longer = {name: value.repeat(2, 3) for name, value in example.kwargs.items()}
    with torch.no_grad():
        theirs = example.model(**longer)[0]
    error = float((run(rewrite.program, longer) - theirs).norm() / theirs.norm())
    assert error <= tolerances.FLOAT32_MODEL


def test_the_original_is_left_alone() -> None:
    example = models.make(Case("bert", "sdpa"))
    before = {k: v.clone() for k, v in example.model.state_dict().items()}
    program = models.exported(example)
    code, names = program.graph_module.code, list(program.state_dict)
    bda_fx.rewrite(program, options=FULL)
    assert (program.graph_module.code, list(program.state_dict)) == (code, names)
    assert all(torch.equal(v, before[k]) for k, v in example.model.state_dict().items())


def test_rewriting_twice_is_legal() -> None:
    """What was rewritten is an ordinary program: it may be rewritten again, or not, and runs."""
    example = models.make(Case("bert", "sdpa"))
    once = bda_fx.rewrite(example.model, (), example.kwargs, options=FULL).program
    twice = bda_fx.rewrite(once, options=FULL).program
    truth = run(once, example.kwargs)
    error = float((run(twice, example.kwargs) - truth).norm() / truth.norm())
    assert error <= tolerances.FLOAT32_MODEL


class Perceptron(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


def test_no_attention_is_an_empty_report_and_the_original() -> None:
    program = torch.export.export(Perceptron(), (torch.randn(3, 6),), strict=False)
    rewrite = bda_fx.rewrite(program)
    assert rewrite.program is program
    assert rewrite.report.sites == ()
    assert "No attention product found" in str(rewrite.report)
    assert rewrite.report.bytes_before == rewrite.report.bytes_after == (6 * 4 + 4) * 4


class Plain(nn.Module):
    """Self-attention on weights of any dtype, kept as buffers or parameters."""

    def __init__(self, weight: Callable[[int], Tensor]) -> None:
        super().__init__()
        for seed, name in enumerate("qkvo"):
            self.register_buffer(name, weight(seed))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = ((x @ w).unflatten(-1, (4, 6)).transpose(1, 2) for w in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2)
        scores = scores.real if scores.is_complex() else scores
        mixed = scores.float().softmax(-1).to(v.dtype) @ v
        return mixed.transpose(1, 2).flatten(-2) @ self.o


def draw(seed: int) -> Tensor:
    return torch.randn(24, 24, generator=torch.Generator().manual_seed(seed)) / 24**0.5


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int64], ids=str)
def test_weights_that_are_not_real_are_skipped(dtype: torch.dtype) -> None:
    model = Plain(lambda seed: (4 * draw(seed)).to(dtype))
    x = torch.arange(2 * 5 * 24).reshape(2, 5, 24).remainder(3).to(dtype)
    rewrite = bda_fx.rewrite(model, (x,))
    assert not rewrite.report.rewritten
    assert {s.product for s in rewrite.report.skipped} <= {"qk", "vo"}
    assert torch.equal(rewrite.program.module()(x), model(x))


def test_the_same_module_with_real_weights_is_rewritten() -> None:
    report = bda_fx.analyze(Plain(draw), (torch.randn(2, 5, 24),), options=FULL)
    assert {s.product for s in report.rewritten} == {"qk", "vo"}


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weights_that_are_not_finite_are_skipped(value: float) -> None:
    model = Plain(draw)
    model.k[0, 0] = value
    report = bda_fx.rewrite(model, (torch.randn(2, 5, 24),), options=FULL).report
    assert [(s.product, s.reason_code) for s in report.skipped] == [("qk", "NOT_FINITE")]


@pytest.mark.parametrize("call", [bda_fx.rewrite, bda_fx.analyze])
class TestBadInput:
    def test_unknown_option(self, call: Callable[..., Any]) -> None:
        with pytest.raises(bda_fx.OptionError, match=r"unknown option 'size'; .* basis_size"):
            call(Perceptron(), (torch.randn(3, 6),), options={"size": 1})

    def test_impossible_basis_size(self, call: Callable[..., Any]) -> None:
        with pytest.raises(bda_fx.OptionError, match=r"in \(0, 1\], got 1.5"):
            call(Perceptron(), (torch.randn(3, 6),), options={"basis_size": 1.5})

    def test_args_that_do_not_fit(self, call: Callable[..., Any]) -> None:
        wanted = (
            r"Perceptron cannot be exported with the inputs given \(float32\[3, 7\]\): .+\. "
            r"Check that the model runs on them"
        )
        with pytest.raises(ValueError, match=wanted):
            call(Perceptron(), (torch.randn(3, 7),))

    def test_no_args(self, call: Callable[..., Any]) -> None:
        with pytest.raises(ValueError, match=r"inputs given \(none\)"):
            call(Perceptron())

    def test_kwargs_that_do_not_fit(self, call: Callable[..., Any]) -> None:
        with pytest.raises(ValueError, match=r"inputs given \(y=float32\[3, 6\]\)"):
            call(Perceptron(), (), {"y": torch.randn(3, 6)})

    def test_not_a_module(self, call: Callable[..., Any]) -> None:
        wanted = r"nn.Module or an ExportedProgram, got function; wrap a function in a module"
        with pytest.raises(TypeError, match=wanted):
            call(lambda x: x, (torch.randn(3, 6),))

    def test_tensor_instead_of_a_tuple(self, call: Callable[..., Any]) -> None:
        with pytest.raises(TypeError, match=r"got Tensor: write \(x,\) for one input"):
            call(Perceptron(), torch.randn(3, 6))

    def test_kwargs_is_no_mapping(self, call: Callable[..., Any]) -> None:
        with pytest.raises(TypeError, match=r"^kwargs is a mapping of example inputs, got Tensor"):
            call(Perceptron(), (), torch.randn(3, 6))
