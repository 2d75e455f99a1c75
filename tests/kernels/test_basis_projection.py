"""The operator: its contract for every form, in float64 against the formula written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from bda_fx.kernels.basis_projection import DECOMPOSITIONS, basis_projection, project_in_aten
from tests.kernels.forms import FORMS, Form, by_definition, head
from tests.tolerances import FLOAT64_IDENTITY

forms = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
SCATTERED = next(form for form in FORMS if form.name == "scattered")


def assert_same(got: Tensor, expected: Tensor) -> None:
    assert got.shape == expected.shape
    assert float((got - expected).norm()) <= FLOAT64_IDENTITY * max(1.0, float(expected.norm()))


@forms
def test_decomposition_is_the_formula(form: Form) -> None:
    arguments = form.arguments()
    assert_same(project_in_aten(*arguments), by_definition(*arguments))
    assert_same(basis_projection(*arguments), by_definition(*arguments))


@pytest.mark.parametrize("form", FORMS[:-10], ids=lambda form: form.name)
def test_opcheck(form: Form) -> None:
    arguments = form.arguments()
    for at in (0, 1, 3):
        if arguments[at] is not None:
            arguments[at].requires_grad_()
    torch.library.opcheck(basis_projection.default, tuple(arguments))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.mT.contiguous().mT,
        lambda x: torch.stack([x, x], -1)[..., 0],
        lambda x: x.flip(0).flip(0)[::1],
        lambda x: x[:1].expand_as(x),
    ],
    ids=["transposed", "strided", "flipped", "expanded"],
)
def test_opcheck_strides(view: object) -> None:
    x, *others = SCATTERED.arguments()
    strided = view(x)  # type: ignore[operator]
    assert_same(basis_projection(strided, *others), by_definition(strided, *others))
    torch.library.opcheck(basis_projection.default, (strided, *others))


@forms
def test_gradients(form: Form) -> None:
    x, coefficients, order, bias, *rest = form.arguments()

    def project(x: Tensor, coefficients: Tensor, bias: Tensor | None) -> Tensor:
        return basis_projection(x, coefficients, order, bias, *rest)

    inputs = [t if t is None else t.requires_grad_() for t in (x, coefficients, bias)]
    torch.autograd.gradcheck(project, inputs)


def test_symbolic_sizes_stay_symbolic() -> None:
    _, *others = SCATTERED.arguments()

    def project(x: Tensor) -> Tensor:
        return basis_projection(x, *others)

    compiled = torch.compile(project, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (2, 7, 31):
        x = torch.randn(3, tokens, 24, dtype=torch.float64)
        assert_same(compiled(x), by_definition(x, *others))


@forms
def test_decomposes_to_aten(form: Form) -> None:
    x, coefficients, order, bias, *rest = form.arguments()

    def project(x: Tensor, coefficients: Tensor) -> Tensor:
        return basis_projection(x, coefficients, order, bias, *rest)

    graph = make_fx(project, decomposition_table=DECOMPOSITIONS)(x, coefficients)
    called = {n.target.namespace for n in graph.graph.nodes if n.op == "call_function"}
    assert called <= {"aten"}
    assert_same(graph(x, coefficients), by_definition(x, coefficients, order, bias, *rest))


BAD = {
    "columns": ({"coefficients": torch.zeros(24, 15)}, "expected 16"),
    "window": ({"start": 17}, "not within the 24 features"),
    "order": ({"order": torch.arange(24, dtype=torch.int32)}, "the basis features, then"),
    "bias": ({"bias": torch.zeros(23)}, r"expected torch.float32 \[24\]"),
    "slot": ({"slots": [0, 8]}, "from -1 to 7"),
    "width": ({"slots": [0] * 7}, "divide the 24 output features"),
    "type": ({"coefficients": torch.zeros(24, 16).double()}, "expected x's torch.float32"),
    "matrix": ({"coefficients": torch.zeros(24)}, r"expected \[\*, E\] and \[F, E - size\]"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_errors(change: dict[str, object], message: str) -> None:
    arguments = {
        "x": torch.zeros(5, 24),
        "coefficients": torch.zeros(24, 16),
        "order": None,
        "bias": None,
        "start": 0,
        "size": 8,
        "slots": head(8, 8),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        basis_projection(**arguments)
