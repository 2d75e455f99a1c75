"""``verify``: how equal the outputs of two models are, measured against float64.

The error of a model is its relative RMS distance to a float64 run of the reference,

    error(y) = ‖y − y*‖ / ‖y*‖,

and what matters is the ratio of the candidate's error to the reference's own error in the same
dtype: a ratio of 1 is as good as the original, whatever the dtype. No absolute tolerance is used
but for unit roundoff: below it no result in that dtype can be told from a right one.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from bda_fx.choose_truth import Truth, TruthName, choose_truth
from bda_fx.compare_outputs import OutputTally
from bda_fx.compare_outputs import relative_error as relative_error
from bda_fx.fidelity_report import Fidelity as Fidelity
from bda_fx.fidelity_report import LayerFidelity
from bda_fx.fidelity_report import OutputFidelity as OutputFidelity
from bda_fx.generate_inputs import Inputs, generate_inputs
from bda_fx.locate_noise import CannotLocate, locate_noise
from bda_fx.passes.canonicalize import composite_attention

Task = Literal["logits", "embedding"]
Mask = Tensor | str | Callable[[Tensor], Tensor | None]


def verify(
    reference: nn.Module | ExportedProgram,
    candidate: Callable[..., Any] | ExportedProgram,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    inputs: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]] | None = None,
    mask: Mask | None = None,
    task: Task | None = None,
    truth: TruthName = "auto",
    localize: bool | None = None,
    budget: float = 4.0,
) -> Fidelity:
    """Run ``reference`` and ``candidate`` on the same inputs and compare both with float64.

    Args:
        reference: the original, a module or an exported program. A module is exported once for
            each shape of its inputs, to be run in float64; nothing of it is changed.
        candidate: what should equal it: a module, a compiled module, an exported program.
        args, kwargs: inputs for both. Without any, where one of the two is an exported program,
            inputs are made from its signature, which is weaker evidence than real ones.
        inputs: several inputs instead, each (args, kwargs). Errors are pooled over them, and the
            noise ratio gets a 95 % confidence interval; with one input it is over the rows of the
            batch (the outputs' first dimension), if there are several.
        mask: which positions count, where others are padding: the name of a keyword input
            ("attention_mask"), a tensor, or a function from an output to a tensor or None. It
            applies to the outputs whose shape begins with the mask's.
        task: "logits" adds top-1 agreement and KL divergence of the last dimension for every
            output of two and more dimensions, "embedding" cosines. None adds cosines, and the
            former where there are 256 features or more.
        truth: "float64"; "float32", which comes with its estimated error, for models in float16 or
            bfloat16 only; "auto" takes float64 if it runs and fits in memory, else float32.
        localize: compare the tensors between modules too (on the input with the largest ratio), so
            that the report names the first one beyond the budget. None does so for what fails.
            Both must be exported programs, or modules that export.
        budget: largest ratio of the candidate's error to the reference's own error that passes.

    Cost: with float64, one run of the reference in float64 and of each model as it is; with
    float32, two runs in float32 instead; localising takes an export, the search for sites and three
    runs more.

    Raises:
        TypeError: ``reference``, ``inputs`` or ``mask`` is of the wrong kind.
        ValueError: the outputs differ in number, shape or dtype, or there is no floating output;
            the reference is nan; no inputs are given and none can be made; a float32 truth for a
            model in float32.
    """
    if not isinstance(reference, nn.Module | ExportedProgram):
        raise TypeError(
            f"reference is an nn.Module or an ExportedProgram, got {type(reference).__name__}"
        )
    if task not in (None, "logits", "embedding"):
        raise ValueError(f"task is 'logits', 'embedding' or None, got {task!r}")
    batches, made = _inputs(reference, candidate, args, kwargs, inputs)
    _check_mask(mask, batches)
    exports = _Exports(reference)
    run_reference, run_candidate = _runner(reference), _runner(candidate)
    chosen: Truth | None = None
    tallies: dict[int, OutputTally] = {}
    ratios = []
    for batch in batches:
        ours, theirs = _run(run_reference, batch, made), _run(run_candidate, batch, made)
        _check_alike(ours, theirs)
        program = exports.of(batch)
        if chosen is None:
            chosen, exact, shaken = choose_truth(truth, program, *_copied(batch))
        else:
            exact, shaken = chosen.outputs(program, *_copied(batch))
        _check_used(_mask_tensor(mask, batch), ours)
        worst = 0.0
        for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            if mine.is_floating_point():
                tally = tallies.setdefault(index, OutputTally(f"output {index}", task))
                second = None if shaken is None else shaken[index]
                valid = _mask_of(mask, batch, mine)
                worst = max(worst, tally.add(mine, other, exact[index], second, valid))
        ratios.append(worst)
    if not tallies:
        raise ValueError("no output is a floating-point tensor: there is nothing to compare")
    assert chosen is not None
    results = tuple(tally.result(budget) for tally in tallies.values())
    layers: tuple[LayerFidelity, ...] | None = None
    reason: str | None = "localize=False"
    if localize or (localize is None and not all(o.passed for o in results)):
        hardest = batches[max(range(len(batches)), key=ratios.__getitem__)]
        layers, reason = _locate(
            exports.of(hardest),
            candidate,
            hardest,
            budget,
            chosen.dtype,
            _mask_tensor(mask, hardest),
        )
    elif localize is None:
        reason = "it passed: localize=True looks into it all the same"
    return Fidelity(
        results,
        budget,
        inputs="generated" if made else "given",
        num_inputs=len(batches),
        truth=str(chosen.dtype).removeprefix("torch."),
        truth_reason=chosen.reason,
        layers=layers,
        layers_reason=reason if layers is None else None,
    )


# -- inputs -----------------------------------------------------------------------------------


def _inputs(
    reference: nn.Module | ExportedProgram,
    candidate: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None,
    inputs: Iterable[tuple[tuple[Any, ...], Mapping[str, Any]]] | None,
) -> tuple[list[Inputs], bool]:
    """All inputs, and whether they had to be made."""
    given = not isinstance(args, tuple | list) or bool(args) or bool(kwargs)
    if inputs is not None:
        if given:
            raise ValueError("pass either args and kwargs, or inputs=, not both")
        batches = [_one_input(at, value) for at, value in enumerate(inputs)]
        if not batches:
            raise ValueError("inputs= is empty: there is nothing to run")
        return batches, False
    if given:
        return [_one_input(0, (args, kwargs or {}))], False
    for model in (reference, candidate):
        if isinstance(model, ExportedProgram):
            return generate_inputs(model), bool(model.graph_signature.user_inputs)
    assert isinstance(reference, nn.Module)
    needed = [
        name
        for name, parameter in inspect.signature(reference.forward).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    if needed:
        raise ValueError(
            f"{type(reference).__name__} takes {', '.join(needed)}: pass args and kwargs, or "
            "several of them as inputs=[(args, kwargs), …]. Inputs can be made up for an "
            "ExportedProgram alone, whose signature tells their shapes"
        )
    return [((), {})], False


def _one_input(at: int, value: Any) -> Inputs:
    pair = tuple(value) if isinstance(value, tuple | list) else (value,)
    if len(pair) == 2 and isinstance(pair[0], tuple | list) and isinstance(pair[1], Mapping):
        return tuple(pair[0]), dict(pair[1])
    kinds = ", ".join(type(part).__name__ for part in pair)
    raise TypeError(
        f"input {at} is a pair of a tuple args and a mapping kwargs, got {kinds}: "
        "write ((x,), {}) for one tensor"
    )


def _copied(batch: Inputs) -> Inputs:
    """A copy for one run: models may write into their inputs, caches above all."""
    return pytree.tree_map(
        lambda v: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v), batch
    )


# -- runs -------------------------------------------------------------------------------------


class _Exports:
    """Programs of the reference, one for each kind of input."""

    def __init__(self, reference: nn.Module | ExportedProgram) -> None:
        self.reference = reference
        self.programs: dict[str, ExportedProgram] = {}

    def of(self, batch: Inputs) -> ExportedProgram:
        if isinstance(self.reference, ExportedProgram):
            return self.reference
        leaves, spec = pytree.tree_flatten(batch)
        key = f"{[_kind(v) if isinstance(v, Tensor) else v for v in leaves]} {spec}"
        if key not in self.programs:
            self.programs[key] = _export(self.reference, batch)
        return self.programs[key]


def _export(model: nn.Module, batch: Inputs) -> ExportedProgram:
    args, kwargs = _copied(batch)
    with composite_attention(), torch.no_grad():
        return torch.export.export(model, args, kwargs, strict=False)


def _runner(model: Any) -> Callable[..., Any]:
    return model.module() if isinstance(model, ExportedProgram) else model


def _run(model: Callable[..., Any], batch: Inputs, made: bool) -> list[Tensor]:
    args, kwargs = _copied(batch)
    try:
        with torch.no_grad():
            results = model(*args, **kwargs)
    except Exception as error:
        if not made:
            raise
        raise ValueError(
            f"the inputs made from the program's signature do not run ({error}): "
            "pass args and kwargs, or inputs="
        ) from error
    return [t for t in pytree.tree_leaves(results) if isinstance(t, Tensor)]


def _check_alike(ours: list[Tensor], theirs: list[Tensor]) -> None:
    if len(ours) != len(theirs):
        raise ValueError(
            f"the reference has {len(ours)} tensor outputs, the candidate {len(theirs)}"
        )
    for index, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine.shape != other.shape or mine.dtype != other.dtype:
            raise ValueError(
                f"output {index}: the reference gives {_kind(mine)}, the candidate {_kind(other)}"
            )


def _kind(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


# -- masks ------------------------------------------------------------------------------------


def _check_mask(mask: Any, batches: list[Inputs]) -> None:
    if isinstance(mask, Tensor) and len(batches) > 1:
        raise ValueError(
            f"one mask for {len(batches)} inputs: pass the name of the keyword input that holds "
            'it, mask="attention_mask" for one, or a function of the output'
        )
    if isinstance(mask, str):
        for _, kwargs in batches:
            if not isinstance(kwargs.get(mask), Tensor):
                raise ValueError(
                    f"mask={mask!r} is not the name of a keyword input that is a tensor; those "
                    f"are {', '.join(k for k, v in kwargs.items() if isinstance(v, Tensor))}"
                )
    elif mask is not None and not isinstance(mask, Tensor) and not callable(mask):
        raise TypeError(
            "mask is a tensor, the name of a keyword input or a function of an output, got "
            f"{type(mask).__name__}"
        )


def _mask_tensor(mask: Mask | None, batch: Inputs) -> Tensor | None:
    """The mask where it does not depend on an output."""
    if isinstance(mask, str):
        return batch[1][mask]
    return mask if isinstance(mask, Tensor) else None


def _check_used(mask: Tensor | None, outputs: list[Tensor]) -> None:
    if mask is not None and not any(mask.shape == t.shape[: mask.dim()] for t in outputs):
        shapes = ", ".join(_kind(t) for t in outputs)
        raise ValueError(
            f"mask= is {_kind(mask)}, and no output has a shape that begins so: {shapes}"
        )


def _mask_of(mask: Mask | None, batch: Inputs, output: Tensor) -> Tensor | None:
    """The mask of one output, where it has one."""
    if callable(mask) and not isinstance(mask, Tensor):
        found = mask(output)
        if found is not None and found.shape != output.shape[: found.dim()]:
            raise ValueError(
                f"mask= gives {_kind(found)} for an output {_kind(output)}; "
                "its shape is the output's, or the front of it"
            )
        return found
    found = _mask_tensor(mask, batch)
    return found if found is not None and found.shape == output.shape[: found.dim()] else None


# -- localising -------------------------------------------------------------------------------


def _locate(
    reference: ExportedProgram,
    candidate: Any,
    batch: Inputs,
    budget: float,
    truth: torch.dtype,
    mask: Tensor | None,
) -> tuple[tuple[LayerFidelity, ...] | None, str | None]:
    """Layers, or why there are none."""
    if isinstance(candidate, nn.Module) and not hasattr(candidate, "_orig_mod"):
        try:
            candidate = _export(candidate, batch)
        except Exception as error:  # tracing a stranger's model fails in any way
            return None, f"the candidate does not export: {error}"
    if not isinstance(candidate, ExportedProgram):
        kind = "is compiled" if isinstance(candidate, nn.Module) else "is a function"
        return None, f"the candidate {kind}: only exported programs show their modules"
    args, kwargs = _copied(batch)
    try:
        return locate_noise(
            reference, candidate, args, kwargs, budget=budget, truth=truth, mask=mask
        ), None  # fmt: skip
    except CannotLocate as reason:
        return None, str(reason)
