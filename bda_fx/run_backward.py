"""Run a program forward and backward, and add up what the rounding of its nodes does to an output.

See ``estimate_shares`` for the formula. Data movement does not round, a cast down does, and nodes
of a wider dtype do not count.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from bda_fx.evaluate_float64 import Wide
from bda_fx.passes import op_rules
from bda_fx.passes.canonicalize import Program, constant_nodes
from bda_fx.passes.choose_sizes import example_size
from bda_fx.passes.observe_noise import Observed, pick_tokens
from bda_fx.passes.predict_noise import keeps_sums_wide, partial_roundings
from bda_fx.passes.read_weights import FactorKey, all_finite, factor_key
from bda_fx.passes.sites import IN, OUT, Linear, Site
from bda_fx.sample_errors import Sample, sample_of

ROUNDING = 1 / 24
"""ε² of one rounding over the dtype's eps²: errors are even within half a unit in the last place,
and values between powers of two (1/12 of the unit², which is half of eps² in the mean)."""
TOKENS = 1024
"""Tokens of each factor, over all passes, that are kept to foretell noise by."""

Features = tuple[tuple[int, ...], ...]

_UNINITIALISED = {
    torch.ops.aten.empty.memory_format,
    torch.ops.aten.empty_like.default,
    torch.ops.aten.empty_strided.default,
    torch.ops.aten.empty_permuted.default,
    torch.ops.aten.new_empty.default,
    torch.ops.aten.new_empty_strided.default,
}
_MOVEMENT = op_rules.MOVES | op_rules.KEEPS | op_rules.SCATTERS | op_rules.WRITES | op_rules.STORES


def factors_of(site: Site) -> list[tuple[Linear, str, Features]]:
    """The linears of a site: (linear, axis, features of each head), the decomposed one first."""
    factors: list[tuple[Linear, str, Any]] = [(site.linear, site.axis, site.features)]
    return factors + [
        (factor.tensor, factor.axis, factor.features)
        for factor in site.partners
        if isinstance(factor.tensor, Linear)
    ]


def roundings(node: fx.Node) -> float:
    """ρ ε² of a node: the variance of its relative rounding error."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return 0.0
    if node.target in _MOVEMENT and not _casts_down(node, value):
        return 0.0
    return ROUNDING * torch.finfo(value.dtype).eps ** 2 * _rounded_values(node, value)


def _rounded_values(node: fx.Node, value: Tensor) -> float:
    terms = 0
    if not keeps_sums_wide(value.dtype):
        if node.target in op_rules.LINEAR | op_rules.MATMULS:
            terms = example_size(node.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]
        elif node.target in op_rules.ATTENTION:
            terms = example_size(value.shape[-1])
    return 1 + partial_roundings(terms)


def _casts_down(node: fx.Node, value: Tensor) -> bool:
    before = node.all_input_nodes[0].meta.get("val") if node.all_input_nodes else None
    return (
        isinstance(before, Tensor)
        and before.is_floating_point()
        and torch.finfo(value.dtype).eps > torch.finfo(before.dtype).eps
    )


def _by_feature(effect: Tensor) -> Tensor:
    """Squares of ``effect`` [*, F] added up for each feature, [F] in float64 on the CPU."""
    energy = effect.double().square_()
    return (energy.flatten(0, -2).sum(0) if energy.dim() > 1 else energy).cpu()


class Backward(Wide):
    """Runs a graph; a backward pass then adds up what the rounding of its nodes does.

    ``total``: Σ ρ ε² v² (Jᵀz)² over all nodes that depend on inputs. ``energies``: Σ v² (Jᵀz)² over
    all but the last axis, of the nodes in ``watched``, and the same of their noise. ``observed``:
    moments of the sites' factors.
    """

    def __init__(self, program: Program, sites: Sequence[Site], *, typical: bool) -> None:
        super().__init__(program.module, torch.float32)
        self.exact = Wide(program.module, torch.float64)
        self.constants = set(constant_nodes(program))
        self.watched: set[str] = set()
        self.total = 0.0
        self.energies: dict[str, tuple[Tensor, Tensor]] = {}
        factors = {
            factor_key(*factor): factor
            for site in sites
            for view in (site, site.other)
            if view is not None
            for factor in factors_of(view)
        }
        self.moments = {key: _FactorMoments(*factor, typical) for key, factor in factors.items()}
        self.hooks: list[Any] = []
        self.linears: dict[str, list[_FactorMoments]] = {}
        for key, (linear, _, _) in factors.items():
            for name in linear.nodes:
                self.linears.setdefault(name, []).append(self.moments[key])

    def start(self) -> None:
        """Before a backward pass."""
        self.total, self.energies = 0.0, {}

    def finish(self) -> None:
        """After it."""
        for moments in self.moments.values():
            moments.finish(self.total)

    def release(self) -> None:
        """Let the graph of a run go: it holds its hooks, and these hold this object, where no
        garbage collector sees it."""
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self.env.clear()

    def observed(self) -> dict[FactorKey, Observed]:
        found = {key: moments.observed() for key, moments in self.moments.items()}
        return {key: seen for key, seen in found.items() if seen is not None}

    def placeholder(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().placeholder(target, args, kwargs)
        return value.detach() if isinstance(value, Tensor) else value

    def widen(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_inference():
            value = value.clone()  # an inference tensor cannot be kept for a backward pass
        if isinstance(value, Tensor) and value.dtype in self.wider:
            return value.to(self.wider[value.dtype])
        return super().widen(value)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch.ops.aten.copy.default:  # has no derivative of its own
            return self.widen(args[1]).expand_as(args[0])
        if target is torch.ops.aten.view.default:  # another attention kernel, other strides (T5)
            target = torch.ops.aten.reshape.default
        value = super().call_function(target, args, kwargs)
        # What was in memory is overwritten, but until then it would count as values.
        return value.zero_() if target in _UNINITIALISED else value

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        floating = isinstance(value, Tensor) and value.is_floating_point()
        if n.op != "call_function" or n.name in self.constants or not floating:
            return value
        if not value.requires_grad:
            value = value.detach().requires_grad_()
        rate, watched = roundings(n), n.name in self.watched
        if rate or watched:
            seen = value.detach()
            errors, sample = self.errors(n, seen, watched) if rate else (None, None)
            if errors is None or watched:
                seen = seen.masked_fill(seen.isinf(), 0.0)  # as in masks: no rounding changes them

            def collect(gradient: Tensor) -> None:
                if errors is not None and not watched:  # most nodes of a float32 program
                    heard = gradient if sample is None else sample.of(gradient)
                    noise = torch.linalg.vector_norm(errors * heard, dtype=torch.float64)
                    self.total += float(noise) ** 2
                    return
                energy = _by_feature(seen * gradient)
                felt = rate * energy if errors is None else _by_feature(errors * gradient)
                self.total += float(felt.sum())
                if watched:
                    self.energies[n.name] = energy, felt

            self.hooks.append(value.register_hook(collect))
        if n.name in self.linears:
            self.watch_linear(n, value)
        return value

    def errors(
        self, n: fx.Node, value: Tensor, entirely: bool
    ) -> tuple[Tensor | None, Sample | None]:
        """How far float32 ``value`` is from what the node makes of its arguments in float64; None
        where there is no telling, or where the program is not of that dtype.

        Unless ``entirely``, it may be of a sample of features, weighted so that their squares stand
        for all.
        """
        if n.target is operator.getitem or not n.meta["val"].dtype == value.dtype == torch.float32:
            return None, None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        sample = None if entirely else sample_of(n, args, value)
        if sample is not None:
            args, value = sample.arguments(args), sample.of(value)
        try:
            with torch.no_grad():
                exact = self.exact.call_function(n.target, args, kwargs)
        except Exception:  # whatever an op raises that knows float32 alone
            return None, None
        if not isinstance(exact, Tensor) or exact.dtype != torch.float64:
            return None, None
        errors = (exact - value).nan_to_num_(0.0, 0.0, 0.0).float()
        return errors if sample is None else errors.mul_(sample.weights), sample

    def noise_of(self, name: str, features: Tensor, rate: float | None) -> Tensor:
        """Σ ρ ε² v² (Jᵀz)² of some features of a watched node, by ``rate`` if not the node's."""
        if name not in self.energies:
            return torch.zeros(())
        energy, noise = self.energies[name]
        return noise[features].sum() if rate is None else rate * energy[features].sum()

    def watch_linear(self, n: fx.Node, y: Tensor) -> None:
        """Watch a linear: y [*, F] and x [*, E], and the gradients of both."""
        (read, *_) = n.all_input_nodes
        x = self.env[read]
        inputs = x.detach().reshape(-1, x.shape[-1]).to(y.dtype)  # as the linear widens it
        outputs = y.detach().reshape(-1, y.shape[-1])

        def at_output(gradient: Tensor) -> None:
            gradient = gradient.detach().reshape(-1, y.shape[-1])
            for moments in self.linears[n.name]:
                moments.add_use(inputs, gradient)
                if moments.axis == OUT:
                    moments.add(outputs, gradient)

        def at_input(gradient: Tensor) -> None:
            for moments in self.linears[n.name]:
                if moments.axis == IN:
                    moments.add(inputs, gradient.detach().reshape(-1, x.shape[-1]))

        self.hooks.append(y.register_hook(at_output))
        if x.requires_grad and any(moments.axis == IN for moments in self.linears[n.name]):
            self.hooks.append(x.register_hook(at_input))


class _FactorMoments:
    """Adds up what backward passes show of one factor: heads of a linear's outputs or inputs."""

    def __init__(self, linear: Linear, axis: str, features: Features, typical: bool) -> None:
        self.axis, self.index, self.typical = axis, torch.tensor(features), typical
        self.often = len(linear.nodes) > 1
        self.uses: list[tuple[Tensor, Tensor]] = []  # of a weight that is used often
        self.passes = 0
        heads, dim = self.index.shape
        self.first = int(self.index[0, 0])
        in_order = torch.arange(self.first, self.first + self.index.numel())
        self.in_order = torch.equal(self.index.flatten(), in_order)
        self.values, self.effects = torch.empty(2, heads, 0, dim)
        self.weight_effects, self.weight_effect = torch.zeros(2, heads, dim, dim).double()
        self.seen: list[tuple[Tensor, Tensor]] = []  # in the pass under way, as is weight_effect

    def add(self, values: Tensor, gradients: Tensor) -> None:
        """Values and gradients of the linear's outputs or inputs, [tokens, features]."""
        self.seen.append((self._heads(values).float().cpu(), self._heads(gradients).float().cpu()))

    def _heads(self, rows: Tensor) -> Tensor:
        """The heads [n, tokens, D] in [tokens, features]: a view where their features follow each
        other."""
        rows = rows.detach()
        if self.in_order:
            part = rows.narrow(1, self.first, self.index.numel())
            return part.unflatten(1, self.index.shape).transpose(0, 1)
        return rows[:, self.index.to(rows.device)].transpose(0, 1)

    def add_use(self, inputs: Tensor, gradients: Tensor) -> None:
        """A use of the weight: the linear's ``inputs`` and ``gradients`` of its outputs, [tokens,
        features]. Weight gradients of several uses add up before they are squared."""
        own, other = (gradients, inputs) if self.axis == OUT else (inputs, gradients)
        if self.often:
            self.uses.append((own, other))
        else:
            self._see_weight_gradient(own, other)

    def _see_weight_gradient(self, own: Tensor, other: Tensor) -> None:
        """Γ = ownᵀ other, through the Gram matrix of whichever is smaller: tokens or features."""
        heads, width = self._heads(own).mT, other.shape[1]
        if len(other) < width:
            gram = heads @ (other @ other.T) @ heads.mT
        else:
            gradient = heads @ other
            gram = gradient @ gradient.mT
        self.weight_effect.add_(gram.cpu(), alpha=1 / width)

    def finish(self, total: float) -> None:
        """The pass is over; ``total`` is the noise of its output."""
        if self.uses:
            own, other = zip(*self.uses, strict=True)
            self._see_weight_gradient(torch.cat(own), torch.cat(other))
        if total > 0 and self.seen:
            before, seen = self.values.shape[1], [(self.values, self.effects), *self.seen]
            values, effects = (torch.cat(every, 1) for every in zip(*seen, strict=True))
            effects[:, before:] /= total**0.5
            picked = pick_tokens(values, effects, count=TOKENS, typical=self.typical)
            self.values, self.effects = picked
            self.weight_effects.add_(self.weight_effect, alpha=1 / total)
            self.passes += 1
        self.weight_effect.zero_()
        self.uses, self.seen = [], []

    def observed(self) -> Observed | None:
        """None where nothing was seen, or nothing that could be reckoned with."""
        if not self.passes:
            return None
        effects = self.effects / self.passes**0.5
        moments = self.weight_effects / self.passes
        found = Observed(self.values, effects, moments, self.typical)
        every = (found.values, found.effects, found.weight_effects)
        return found if all(map(all_finite, every)) else None
