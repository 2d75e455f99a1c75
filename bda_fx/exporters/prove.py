"""Prove an artefact: both models in one runtime, against the original in float64.

What counts is what the deployed model does, so the original's own error is that which it has in
the same runtime, with its kernels and fusions:

    noise ratio = ‖rewritten in the runtime − truth‖ / ‖original in the runtime − truth‖
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor
from torch.export import ExportedProgram

from bda_fx.choose_truth import Truth, choose_truth
from bda_fx.compare_outputs import OutputTally
from bda_fx.exporters.exported import ExportError
from bda_fx.fidelity_report import Fidelity
from bda_fx.generate_inputs import Inputs

Run = Callable[[Inputs], list[Tensor]]
"""Tensor outputs of a model in a runtime, in the program's order."""


def prove(
    program: ExportedProgram,
    original: Run,
    rewritten: Run,
    inputs: Sequence[Inputs],
    *,
    made: bool,
    budget: float,
) -> Fidelity:
    """Run both on ``inputs`` and compare them with ``program`` run in float64 (or float32, for half
    precision that does not fit).

    Raises:
        ExportError: the noise is over ``budget``, or the outputs do not correspond.
    """
    truth: Truth | None = None
    tallies: dict[int, OutputTally] = {}
    for args, kwargs in inputs:
        if truth is None:
            truth, exact, shaken = choose_truth("auto", program, args, kwargs)
        else:
            exact, shaken = truth.outputs(program, args, kwargs)
        ours, theirs = original((args, kwargs)), rewritten((args, kwargs))
        if [t.shape for t in ours] != [t.shape for t in theirs] or len(ours) != len(exact):
            raise ExportError(
                f"the runtime gives outputs {_shapes(theirs)} of the rewritten model and "
                f"{_shapes(ours)} of the original, the program {_shapes(exact)}: please report this"
            )
        for at, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            if mine.is_floating_point():
                tally = tallies.setdefault(at, OutputTally(f"output {at}"))
                tally.add(mine, other, exact[at], None if shaken is None else shaken[at])
    assert truth is not None
    fidelity = Fidelity(
        tuple(tally.result(budget) for tally in tallies.values()),
        budget,
        inputs="generated" if made else "given",
        num_inputs=len(inputs),
        truth=str(truth.dtype).removeprefix("torch."),
        truth_reason=truth.reason,
        layers_reason="outputs of a runtime alone are compared",
    )
    if not fidelity.passed:
        raise ExportError(
            f"the proof failed: the rewritten model's error is {fidelity.noise_ratio:.3g} times "
            f"the original's own, the budget {budget:g}; pass options with a smaller noise_budget, "
            "or a larger budget",
            fidelity,
        )
    return fidelity


def _shapes(tensors: Sequence[Tensor]) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors) or "none"
