"""For your own tests: is my model still the same model when bda_fx has rewritten it?

    from bda_fx.testing import assert_equivalent

    def test_my_model():
        assert_equivalent(MyModel().eval(), (torch.randn(2, 7, 64),))

runs the rewritten model in every way that is installed (``WAYS``), measures each against float64,
and fails with a table. With pytest the fixture ``bda_equivalence`` does the same for one dtype and
one way in each test (:mod:`bda_fx.testing.plugin`). Importing this package does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

_HOME = {
    "assert_equivalent": "equivalence",
    "Equivalence": "equivalence",
    "NotEquivalent": "equivalence",
    "unavailable": "run_ways",
}

WAYS = ("eager", "compiled", "program", "onnx", "aoti")
"""How a rewritten model is run: through ``torch.compile(backend="bda")`` without and with Inductor,
as an ``ExportedProgram`` that was saved and loaded, in ONNX Runtime, as an AOTInductor package."""

__all__ = ["WAYS", *sorted(_HOME)]

if TYPE_CHECKING:
    from bda_fx.testing.equivalence import Equivalence as Equivalence
    from bda_fx.testing.equivalence import NotEquivalent as NotEquivalent
    from bda_fx.testing.equivalence import assert_equivalent as assert_equivalent
    from bda_fx.testing.run_ways import unavailable as unavailable


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
