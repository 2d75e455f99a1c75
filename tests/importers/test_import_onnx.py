"""``import_onnx`` on whole models: as exporters and optimisers leave them, and rewritten again."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx", reason="ONNX is not installed: pip install 'bda-fx[onnx]'")
pytest.importorskip("onnxscript", reason="pip install 'bda-fx[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'bda-fx[onnx]'")

import bda_fx  # noqa: E402
from bda_fx.exporters import source_onnx  # noqa: E402
from bda_fx.exporters.exported import ExportError  # noqa: E402
from bda_fx.exporters.measure_onnx import weight_bytes  # noqa: E402
from bda_fx.importers import arithmetic_ops  # noqa: E402
from bda_fx.importers.import_onnx import import_onnx  # noqa: E402
from bda_fx.importers.op_table import OPS, OnnxFileError, OnnxImportError  # noqa: E402
from tests import models  # noqa: E402
from tests.exporters.deployed import BATCH, LENGTH, MODELS, Deployed  # noqa: E402
from tests.programs import Attention, example, seeded  # noqa: E402
from tests.tolerances import FLOAT32_MODEL  # noqa: E402

FULL = {"basis_size": "full"}


class Flat(nn.Module):
    """Positional inputs and one output, as TorchScript's exporter takes a model."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: Tensor) -> Tensor:
        result: Tensor = self.model(**dict(zip(self.names, inputs, strict=True)))[0]
        return result


@dataclass(frozen=True)
class Way:
    """How a model became a file: the exporter, its operator set, and who optimised it after."""

    dynamo: bool
    opset: int
    optimised: str | None = None

    def __str__(self) -> str:
        return f"{'dynamo' if self.dynamo else 'torchscript'}-{self.opset}-{self.optimised}"

    def write(self, model: Deployed, path: Path) -> None:
        kwargs = {k: v for k, v in model.kwargs.items() if isinstance(v, Tensor)}
        axes = {name: dict(model.dynamic_shapes[name]) for name in kwargs}
        module = model.model.eval()
        if self.dynamo:
            torch.onnx.export(
                module, (), str(path), kwargs=kwargs, dynamo=True, verbose=False,
                dynamic_shapes=axes, external_data=False, opset_version=self.opset,
            )  # fmt: skip
        else:
            torch.onnx.export(
                Flat(module, list(kwargs)).eval(), tuple(kwargs.values()), str(path), dynamo=False,
                opset_version=self.opset, input_names=list(kwargs),
                output_names=["last_hidden_state"],
                dynamic_axes={k: {a: d.__name__ for a, d in v.items()} for k, v in axes.items()},
            )  # fmt: skip
        if self.optimised is not None:
            optimise(path, self.optimised)


def optimise(path: Path, by: str) -> None:
    """Optimise a file in place, by onnxscript or at a level of ONNX Runtime."""
    if by == "onnxscript":
        import onnxscript.optimizer

        onnx.save(onnxscript.optimizer.optimize(onnx.load(path)), path)
        return
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(
        onnxruntime.GraphOptimizationLevel, f"ORT_ENABLE_{by.upper()}"
    )
    options.optimized_model_filepath = str(path)
    options.log_severity_level = 4
    onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])


def fuse(path: Path, heads: int, features: int) -> None:
    """What ONNX Runtime's optimiser of transformers, which optimum calls too, makes of a BERT."""
    from onnxruntime.transformers import optimizer

    model = optimizer.optimize_model(
        str(path), model_type="bert", num_heads=heads, hidden_size=features, opt_level=0
    )
    assert model.get_fused_operator_statistics()["Attention"] > 0
    model.save_model_to_file(str(path))


def minilm(layers: int) -> Deployed:
    model = models.minilm()
    model.encoder.layer = model.encoder.layer[:layers]  # type: ignore[union-attr, index]
    return text(model)


def rxnfp(layers: int) -> Deployed:
    model = models.rxnfp()
    model.encoder.layer = model.encoder.layer[:layers]  # type: ignore[union-attr, index]
    return text(model)


def text(model: nn.Module) -> Deployed:
    ids = torch.randint(13, 400, (2, 12))
    kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return Deployed(model, kwargs, {name: {0: BATCH, 1: LENGTH} for name in kwargs})


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feeds(path: Path, batch: int, length: int) -> dict[str, np.ndarray]:
    """Inputs of a size: padded text, or noise."""
    random = np.random.default_rng(batch)
    made = {}
    for value in session(path).get_inputs():
        shape = [{"batch": batch, "length": length}.get(size, size) for size in value.shape]
        if "float" in value.type:
            made[value.name] = random.standard_normal(shape).astype(np.float32)
        elif value.name == "attention_mask":
            made[value.name] = np.tril(np.ones(shape, np.int64), length // 2)
        else:
            made[value.name] = random.integers(3, 30, shape)
    return made


def difference(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a.astype(float) - b) / np.linalg.norm(b.astype(float)))


def assert_same_model(path: Path, program: torch.export.ExportedProgram) -> None:
    """As the file in ONNX Runtime, at two sizes that are not those of the trace."""
    module, run = program.module(), session(path)
    for batch, length in ((3, 7), (5, 15)):
        given = feeds(path, batch, length)
        with torch.no_grad():
            got = module(**{name: torch.from_numpy(value) for name, value in given.items()})
        assert list(got) == [value.name for value in run.get_outputs()]
        for mine, true in zip(got.values(), run.run(None, given), strict=True):
            assert mine.numpy().dtype == true.dtype
            assert mine.shape == true.shape
            assert difference(mine.numpy(), true) <= FLOAT32_MODEL


def sites_of(model: Deployed) -> int:
    report = bda_fx.analyze(
        model.model, (), model.kwargs, dynamic_shapes=model.dynamic_shapes, options=FULL
    )
    assert len(report.rewritten) == len(report.sites)
    return len(report.sites)


WAYS = [
    Way(dynamo=True, opset=18),
    Way(dynamo=True, opset=23, optimised="onnxscript"),
    Way(dynamo=False, opset=14),
    Way(dynamo=False, opset=14, optimised="basic"),
    Way(dynamo=False, opset=17, optimised="extended"),
]


@pytest.mark.parametrize(
    ("name", "way"),
    [
        *(("bert", way) for way in WAYS),
        ("vit", WAYS[0]),
        ("vit", WAYS[4]),
        ("t5_encoder", WAYS[2]),  # torch.onnx (2.13) does not translate T5 with open axes
        ("t5_encoder", WAYS[4]),
        ("whisper_encoder", WAYS[1]),
        ("whisper_encoder", WAYS[3]),
    ],
    ids=str,
)
def test_every_site_is_found(name: str, way: Way, tmp_path: Path) -> None:
    """As many as in the PyTorch model; and the program is the file."""
    model, path = MODELS[name](), tmp_path / "model.onnx"
    way.write(model, path)
    program = import_onnx(path)
    assert_same_model(path, program)
    report = bda_fx.analyze(program, options=FULL)
    assert len(report.rewritten) == len(report.sites) == 4
    # Names of weights that the exporter kept, or that a bias tells.
    assert all("." in site.name and "onnx" not in site.name for site in report.sites)


def test_fused_attention(tmp_path: Path) -> None:
    """``com.microsoft.Attention``, with its projections in one weight, rewritten like any other."""
    model, path = rxnfp(1), tmp_path / "fused.onnx"
    model.model.config._attn_implementation = "eager"  # type: ignore[union-attr]
    Way(dynamo=False, opset=14).write(model, path)
    fuse(path, heads=4, features=256)
    assert_same_model(path, import_onnx(path))
    result = bda_fx.export_onnx(path, tmp_path / "out.onnx", measure=False)
    assert len(result.report.rewritten) == len(result.report.sites) == 2
    assert result.bytes_saved is not None
    assert result.bytes_saved > 0


# -- rewritten again ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "way"),
    [
        (minilm, Way(dynamo=True, opset=18, optimised="basic")),
        (minilm, Way(dynamo=False, opset=14)),
        (rxnfp, Way(dynamo=True, opset=18)),
        (rxnfp, Way(dynamo=False, opset=14, optimised="extended")),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_onnx_in_and_out(make: Any, way: Way, tmp_path: Path) -> None:
    """Real weights: within the budget of the file that was given, smaller by what the report says,
    and open at the same axes."""
    model, path, out = make(1), tmp_path / "given.onnx", tmp_path / "smaller.onnx"
    way.write(model, path)
    before = path.read_bytes()
    result = bda_fx.export_onnx(path, out, measure=False)
    report = result.report
    assert len(report.rewritten) == len(report.sites) == sites_of(model)
    assert result.fidelity is not None
    assert result.fidelity.passed
    print(f"{make.__name__} {way}: {result.fidelity.noise_ratio:.3f}, {result.bytes_saved} bytes")

    # Shapes of a few whole numbers are all that the file may have more or less.
    saved = sum(4 * (s.params_before - s.params_after) for s in report.rewritten)
    assert result.bytes_before == weight_bytes(path)
    assert abs(result.bytes_saved - saved) <= 0.01 * saved
    assert out.stat().st_size < path.stat().st_size - 0.9 * saved
    assert path.read_bytes() == before

    given, written = onnx.load(path).graph, onnx.load(out).graph
    assert [shape(v) for v in written.input] == [shape(v) for v in given.input]
    assert [v.name for v in written.output] == [v.name for v in given.output]
    mine, theirs = session(out), session(path)
    for batch, length in ((1, 5), (4, 13)):
        values = feeds(path, batch, length)
        for a, b in zip(mine.run(None, values), theirs.run(None, values), strict=True):
            assert difference(a, b) <= FLOAT32_MODEL
    evidence = json.loads((tmp_path / "smaller.onnx.bda.json").read_text())
    assert evidence["details"]["source"]["name"] == "given.onnx"
    assert evidence["details"]["opset"] == 18


def shape(value: Any) -> tuple[str, list[str | int]]:
    axes = value.type.tensor_type.shape.dim
    return value.name, [axis.dim_param or axis.dim_value for axis in axes]


def attention(folder: Path, **names: Any) -> Path:
    """A small attention as a file."""
    path = folder / "given.onnx"
    model = Attention()
    seeded(model)
    arguments: dict[str, Any] = {
        "input_names": ["x"], "output_names": ["y"], "dynamic_axes": {"x": {0: "b", 1: "n"}},
    } | names  # fmt: skip
    torch.onnx.export(model.eval(), (example(),), str(path), dynamo=False, **arguments)
    return path


def test_a_wrong_reading_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof is against the file: an op that the table gets wrong shows, whatever its program
    says of itself."""
    path, out = attention(tmp_path), tmp_path / "out" / "smaller.onnx"
    out.parent.mkdir()

    def wrong(node: Any, x: Any, y: Any) -> Any:
        made = arithmetic_ops.add(node, x, y)
        return made * 1.001 if isinstance(made, Tensor) and made.is_floating_point() else made

    monkeypatch.setitem(OPS, ("", "Add"), wrong)
    with pytest.raises(
        ExportError, match=r"the program read from it|does not equal that of the program"
    ):
        bda_fx.export_onnx(path, out, options=FULL, measure=False)
    assert list(out.parent.iterdir()) == []


def test_a_program_of_another_file_is_refused(tmp_path: Path) -> None:
    program = import_onnx(attention(tmp_path))
    (tmp_path / "other").mkdir()
    other = attention(tmp_path / "other")
    model = onnx.load(other)
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = onnx.numpy_helper.to_array(weight) * 1.01
    weight.CopyFrom(onnx.numpy_helper.from_array(values.astype(np.float32), weight.name))
    onnx.save(model, other)
    out = tmp_path / "out" / "smaller.onnx"
    out.parent.mkdir()
    with pytest.raises(ExportError, match=r"does not compute what|does not equal"):
        bda_fx.export_onnx(program, out, options=FULL, measure=False, source=other)
    assert list(out.parent.iterdir()) == []


def test_names_that_python_does_not_have(tmp_path: Path) -> None:
    """They are changed in the program, and as they were in the file that is written."""
    path = attention(
        tmp_path, input_names=["x:0/in"], output_names=["out/y:0"],
        dynamic_axes={"x:0/in": {0: "my batch", 1: "unk__1"}},
    )  # fmt: skip
    program = import_onnx(path)
    assert program.graph_signature.user_inputs == ("x_0_in",)
    result = bda_fx.export_onnx(path, tmp_path / "out.onnx", options=FULL, measure=False)
    assert len(result.report.rewritten) == 2
    graph = onnx.load(result.path).graph
    assert [shape(value) for value in graph.input] == [
        ("x:0/in", ["my batch", "unk__1", *example().shape[2:]])
    ]
    assert graph.output[0].name == "out/y:0"


def test_external_data(tmp_path: Path) -> None:
    path = attention(tmp_path)
    onnx.save(
        onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    assert len(bda_fx.analyze(import_onnx(path), options=FULL).rewritten) == 2
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(OnnxFileError, match=r"weights in weights\.bin, which is not there"):
        import_onnx(path)


def test_a_small_epsilon_is_kept(tmp_path: Path) -> None:
    """The translator's optimiser takes 1e-12 for nothing, and rows of zeros for 0 / 0."""
    text = """<ir_version: 8, opset_import: ["" : 14]>
        g (float[n,4] x) => (float[n,4] y) {
        two = Constant<value_float=2.0>() s = Pow(x, two) v = ReduceMean<axes=[-1]>(s)
        e = Constant<value_float=1e-12>() t = Add(v, e) r = Sqrt(t) y = Div(x, r) }"""
    path = tmp_path / "given.onnx"
    onnx.save(onnx.parser.parse_model(text), path)
    result = bda_fx.export_onnx(path, tmp_path / "out.onnx", measure=False)
    zeros = {"x": np.zeros((2, 4), np.float32)}
    assert np.array_equal(session(result.path).run(None, zeros)[0], zeros["x"])


# -- how it is read -------------------------------------------------------------------------------


def parsed(folder: Path, text: str) -> Path:
    path = folder / "model.onnx"
    onnx.save(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 18]> {text}'), path)
    return path


def test_sizes_that_must_be_equal_under_different_names(tmp_path: Path) -> None:
    path = parsed(tmp_path, "g (float[n,4] x, float[m,4] z) => (float y) { y = Add(x, z) }")
    program = import_onnx(path)
    first, second = (
        node.meta["val"].shape[0] for node in program.graph.find_nodes(op="placeholder")
    )
    assert str(first) == str(second)
    assert not isinstance(first, int)


def test_a_sum_of_names(tmp_path: Path) -> None:
    """How exporters name the length of a cache and what comes to it."""
    path = parsed(
        tmp_path,
        """g (float[b,past,4] p, float[b,new,4] x, float[b,"past + new"] m) => (float y) {
        a = Concat<axis=1>(p, x) k = Constant<value_ints=[-1]>() u = Unsqueeze(m, k)
        y = Mul(a, u) }""".replace('"past + new"', "total"),
    )
    model = onnx.load(path)
    model.graph.input[2].type.tensor_type.shape.dim[1].dim_param = "past + new"
    onnx.save(model, path)
    module = import_onnx(path).module()
    made = module(p=torch.ones(3, 5, 4), x=torch.ones(3, 2, 4), m=torch.ones(3, 7))
    assert made["y"].shape == (3, 7, 4)


def test_fixed_sizes(tmp_path: Path) -> None:
    program = import_onnx(attention(tmp_path), dynamic=False, sizes={"b": 3, "n": 6})
    (node,) = (n for n in program.graph.find_nodes(op="placeholder") if n.name == "x")
    assert tuple(node.meta["val"].shape)[:2] == (3, 6)


def test_the_example_is_no_zeros(tmp_path: Path) -> None:
    """It is what is shown, timed and proved first; a mask of zeros hides everything."""
    program = import_onnx(attention(tmp_path))
    assert program.example_inputs is not None
    assert float(program.example_inputs[1]["x"].std()) > 0.5


def test_what_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    with pytest.raises(OnnxFileError, match="is no ONNX model, or damaged"):
        import_onnx(path)
    whole = attention(tmp_path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(OnnxFileError, match="is no ONNX model, or damaged"):
        import_onnx(path)


def test_an_operator_set_that_is_too_old(tmp_path: Path) -> None:
    path = parsed(tmp_path, "g (float[n,4] x) => (float[n,4] y) { y = Relu(x) }")
    model = onnx.load(path)
    model.opset_import[0].version = 6
    onnx.save(model, path)
    with pytest.raises(OnnxImportError, match="operator set 6, and 7 is the oldest"):
        import_onnx(path)


def test_source_is_told_in_the_evidence(tmp_path: Path) -> None:
    path = attention(tmp_path)
    source = source_onnx.read_source(path, import_onnx(path))
    assert source.names == {"x": "x"}
    assert source.axes == {"x": {0: "b", 1: "n"}}
    assert source.opset == onnx.load(path).opset_import[0].version >= source_onnx.OLDEST_WRITTEN
    assert len(source.to_dict()["sha256"]) == 64
