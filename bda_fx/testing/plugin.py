"""The pytest plugin: the fixture ``bda_equivalence``, once for each dtype and each way.

    def test_my_model(bda_equivalence):
        bda_equivalence(MyModel().eval(), (torch.randn(2, 7, 64),))

    [tool.pytest.ini_options]
    bda_fx_dtypes = ["float32", "float16"]        # default: float32, bfloat16
    bda_fx_ways = ["eager", "program", "onnx"]    # default: all of bda_fx.testing.WAYS

A way that needs what is not installed is skipped, and the skip says what to install. Nothing heavy
is imported before a test asks for the fixture: pytest starts as fast as without the plugin.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from bda_fx.testing import WAYS

if TYPE_CHECKING:
    from bda_fx.testing.equivalence import Equivalence

DTYPES = ("float32", "bfloat16")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini(
        "bda_fx_dtypes",
        "dtypes that the fixture bda_equivalence runs models in",
        type="args",
        default=list(DTYPES),
    )
    parser.addini(
        "bda_fx_ways",
        f"ways that the fixture bda_equivalence runs models in, of {', '.join(WAYS)}",
        type="args",
        default=list(WAYS),
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "bda_equivalence" not in metafunc.fixturenames:
        return
    config = metafunc.config
    dtypes, ways = config.getini("bda_fx_dtypes"), config.getini("bda_fx_ways")
    unknown = [way for way in ways if way not in WAYS]
    if unknown:
        raise pytest.UsageError(
            f"bda_fx_ways: there is no {', '.join(unknown)}; the ways are {', '.join(WAYS)}"
        )
    metafunc.parametrize(
        "bda_equivalence",
        [pytest.param((dtype, way), id=f"{dtype}-{way}") for dtype in dtypes for way in ways],
        indirect=True,
    )


class Check:
    """What the fixture gives: call it as :func:`bda_fx.testing.assert_equivalent`.

    ``dtype`` (a name) and ``way`` are those of the test.
    """

    def __init__(self, dtype: str, way: str) -> None:
        self.dtype, self.way = dtype, way

    def __call__(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Equivalence:
        __tracebackhide__ = True
        import torch

        from bda_fx.testing.equivalence import NotEquivalent, assert_equivalent

        dtype = getattr(torch, self.dtype)
        failure: NotEquivalent | None = None
        try:
            return assert_equivalent(model, inputs, *args, dtype=dtype, ways=(self.way,), **kwargs)
        except NotEquivalent as error:
            failure = error
        pytest.fail(str(failure), pytrace=False)  # outside, so that it is shown once


@pytest.fixture
def bda_equivalence(request: pytest.FixtureRequest) -> Check:
    """Assert that a model and its rewrite are the same, in the dtype and the way of this test."""
    dtype, way = request.param
    from bda_fx.testing.run_ways import unavailable

    reason = unavailable(way)
    if reason is not None:
        pytest.skip(f"{way}: {reason}")
    return Check(dtype, way)
