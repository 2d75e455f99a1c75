"""``spell_sums``: the rules fire where they hold, nowhere else, and change no value."""

from __future__ import annotations

import numpy as np
import pytest

onnx = pytest.importorskip("onnx", reason="ONNX is not installed: pip install 'bda-fx[onnx]'")
ir = pytest.importorskip("onnx_ir", reason="ONNX is not installed: pip install 'bda-fx[onnx]'")
ort = pytest.importorskip("onnxruntime", reason="pip install 'bda-fx[onnx]'")

from bda_fx.exporters.spell_sums import basis_sums, spell_sums  # noqa: E402

HEAD = '<ir_version: 10, opset_import: ["" : 20]> sums (float[b, s, 12] y, float[b, s, 4] x) => '
GROUPED = """
    three_four = Constant<value_ints = [0, 0, 3, 4]>()
    two = Constant<value_ints = [2]>()
    y_groups = Reshape(y, three_four)
    spread = Unsqueeze(x, two)
    total = Add(y_groups, spread)
"""
FLAT = (
    HEAD
    + "(float[b, s, 12] z) {"
    + GROUPED
    + """
    flat = Constant<value_ints = [0, 0, 12]>() z = Reshape(total, flat) }"""
)
OPEN = HEAD + "(float[b, s, 3, 4] z) {" + GROUPED + "z = Identity(total) }"
SHARED = (
    HEAD
    + "(float[b, s, 12] z, float[b, s, 1, 4] w) {"
    + GROUPED
    + """
    flat = Constant<value_ints = [0, 0, 12]>() z = Reshape(total, flat) w = Identity(spread) }"""
)
# Every token gets the same twelve features: no sum over groups.
OTHER = """<ir_version: 10, opset_import: ["" : 20]>
    sums (float[2, 3, 12] y, float[12] x) => (float[2, 3, 12] z) {
        shape = Constant<value_ints = [2, 3, 12]>()
        zero = Constant<value_ints = [0]>()
        y_groups = Reshape(y, shape)
        spread = Unsqueeze(x, zero)
        z = Add(y_groups, spread) }"""


def parsed(text: str) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), data_prop=True)


def run(model: onnx.ModelProto) -> list[np.ndarray]:
    random = np.random.default_rng(0)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {
        value.name: random.standard_normal(
            [size if isinstance(size, int) else 2 + at for at, size in enumerate(value.shape)]
        ).astype(np.float32)
        for value in session.get_inputs()
    }
    return list(session.run(None, feeds))


def kinds(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node if node.op_type != "Constant"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (FLAT, ["Concat", "Add"]),
        (OPEN, ["Concat", "Add", "Reshape", "Identity"]),
        (SHARED, ["Unsqueeze", "Concat", "Add", "Identity"]),
    ],
)
def test_sums_become_flat(text: str, expected: list[str]) -> None:
    before = parsed(text)
    after = ir.to_proto(spell_sums(ir.from_proto(before)))
    onnx.checker.check_model(after, full_check=True)
    assert sorted(kinds(after)) == sorted(expected)
    for a, b in zip(run(before), run(after), strict=True):
        assert np.array_equal(a, b)  # one addition for each element, as before


def test_another_broadcast_is_left_alone() -> None:
    before = parsed(OTHER)
    after = ir.to_proto(spell_sums(ir.from_proto(before)))
    assert kinds(after) == kinds(before)


def test_sums_are_named() -> None:
    model = parsed(FLAT)
    for node in model.graph.node:
        node.name = f"node_{node.output[0]}"
    assert basis_sums(ir.from_proto(model)) == ["node_total"]
    assert basis_sums(spell_sums(ir.from_proto(model))) == []
    assert basis_sums(ir.from_proto(parsed(OTHER))) == []
