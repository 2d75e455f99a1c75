"""Original and rewritten program of a model, as exporters need them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from bda_fx.api import Calibration, export_module, rewrite
from bda_fx.exporters.exported import ExportError
from bda_fx.generate_inputs import Inputs, generate_inputs
from bda_fx.options import Options
from bda_fx.passes.plan_sites import Planning
from bda_fx.report import Report


@dataclass(frozen=True)
class Pair:
    """Two programs with the same signature. ``example`` are the inputs of the export, if known."""

    original: ExportedProgram
    rewritten: ExportedProgram
    report: Report
    options: Options
    example: Inputs | None

    def without(self, weights: Sequence[str], calibration: Calibration | None) -> Pair:
        """The pair with the original form of the sites of these weights."""
        options = replace(self.options, keep=(*self.options.keep, *weights))
        return _rewrite(self.original, options, self.example, calibration)

    def replanned(self, noise_budget: float, calibration: Calibration | None) -> Pair:
        """The pair as planned for another budget."""
        options = replace(self.options, noise_budget=noise_budget)
        return _rewrite(self.original, options, self.example, calibration)

    @property
    def noise_budget(self) -> float:
        """That of the options, with "auto" resolved by the dtypes of the weights."""
        planning = Planning(
            noise_budget=self.options.noise_budget, optimize_for=self.options.optimize_for
        )
        held = {k: v for k, v in self.original.state_dict.items() if isinstance(v, Tensor)}
        weights = [held[site.name] for site in self.report.sites if site.name in held]
        return planning.budget([weight.dtype for weight in weights or held.values()])

    def inputs(self, given: Sequence[Inputs] | None) -> tuple[list[Inputs], bool]:
        """Inputs to run both on, and whether some were made up.

        What the caller gives; else the example, and others with every open size drawn anew.
        """
        if given is not None:
            return [(tuple(args), dict(kwargs)) for args, kwargs in given], False
        known = [self.example] if self.example is not None else []
        try:
            return [*known, *generate_inputs(self.original)], True
        except ValueError:
            if known:
                return known, False
            raise


def rewrite_pair(
    model: nn.Module | ExportedProgram | Pair,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    options: Options | Mapping[str, Any] | None = None,
    calibration: Calibration | None = None,
) -> Pair:
    """Export ``model`` unless it is a program, and rewrite it.

    A pair stays as it is: every exporter takes one, so that a model that is exported to several
    targets is planned once.

    A basis that the caller leaves open is "slices": runtimes read slices of x for nothing or nearly
    so, and gather along the last axis element by element.
    """
    if isinstance(model, Pair):
        return model
    chosen = Options.of(options)
    if chosen.basis == "auto":
        chosen = replace(chosen, basis="slices")
    if isinstance(model, ExportedProgram):
        original = model
    else:
        original = export_module(model, args, kwargs, dynamic_shapes)
    example = (tuple(args), dict(kwargs or {})) if args or kwargs else original.example_inputs
    return _rewrite(original, chosen, example, calibration)


def _rewrite(
    original: ExportedProgram,
    options: Options,
    example: Inputs | None,
    calibration: Calibration | None,
) -> Pair:
    done = rewrite(original, options=options, calibration=calibration)
    return Pair(original, done.program, done.report, options, example)


def require(module: str, packages: str, what: str) -> Any:
    """Import a package that an exporter needs.

    Raises:
        ExportError: it is not installed; the text says how to install it.
    """
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise ExportError(f"{what} needs {module} ({error}): pip install {packages}") from error
