"""Every kind of ONNX op that ``import_onnx`` knows, against ONNX Runtime.

A program is traced once and compared at two sizes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

onnx = pytest.importorskip("onnx", reason="ONNX is not installed: pip install 'bda-fx[onnx]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'bda-fx[onnx]'")

from bda_fx.importers.import_onnx import import_onnx  # noqa: E402
from bda_fx.importers.op_table import OPS, OnnxImportError  # noqa: E402
from bda_fx.importers.run_graph import CONTROL  # noqa: E402
from tests.importers.onnx_cases import CASES, REFUSED, Case  # noqa: E402
from tests.tolerances import FLOAT32_MODEL  # noqa: E402

SIZES = ({"a": 2, "b": 3, "c": 5}, {"a": 4, "b": 6, "c": 7})


def feeds(model: onnx.ModelProto, sizes: dict[str, int], seed: int) -> dict[str, np.ndarray]:
    """Normal numbers; whole ones from -2 to 1, which are indices of two elements at least."""
    random = np.random.default_rng(seed)
    made = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        shape = [sizes[d.dim_param] if d.dim_param else d.dim_value for d in tensor.shape.dim]
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        if dtype == np.bool_:
            made[value.name] = random.integers(0, 2, shape).astype(bool)
        elif np.issubdtype(dtype, np.integer):
            made[value.name] = random.integers(-2, 2, shape).astype(dtype)
        else:
            made[value.name] = random.standard_normal(shape).astype(dtype)
    return made


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    if not np.issubdtype(got.dtype, np.floating):
        assert np.array_equal(got, expected)
        return
    assert np.array_equal(np.isfinite(got), np.isfinite(expected))
    assert np.array_equal(got[~np.isfinite(got)], expected[~np.isfinite(got)], equal_nan=True)
    got, expected = got[np.isfinite(got)].astype(float), expected[np.isfinite(got)].astype(float)
    assert np.linalg.norm(got - expected) <= FLOAT32_MODEL * np.linalg.norm(expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_in_onnx_runtime(case: Case, tmp_path: Path) -> None:
    path = case.save(tmp_path)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    module = import_onnx(path).module()
    for seed, sizes in enumerate(SIZES):
        given = feeds(case.model(), sizes, seed)
        expected = session.run(None, given)
        with torch.no_grad():
            got = module(**{name: torch.from_numpy(value) for name, value in given.items()})
        assert list(got) == [value.name for value in session.get_outputs()]
        for mine, true in zip(got.values(), expected, strict=True):
            assert_same(mine.numpy(), true)


def test_every_op_has_a_case() -> None:
    """An op that is entered in the table is tried."""
    tried = {(node.domain, node.op_type) for case in CASES for node in case.model().graph.node}
    assert set(OPS) | {("", op) for op in CONTROL} <= tried


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_refused(case: Case, tmp_path: Path) -> None:
    """What is not known is refused by name, with the node and what to do."""
    with pytest.raises(OnnxImportError) as caught:
        import_onnx(case.save(tmp_path))
    text = str(caught.value)
    assert case.says in text
    assert "start from the PyTorch model" in text
    assert len(text.splitlines()) == 1
