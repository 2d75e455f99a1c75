"""What can be done at a site, or at sites that share a basis: steps to choose between.

A step is a basis size seen from one side; its noise is estimated when it is asked for, and its rows
are found once it is chosen. Used by ``plan_sites``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bda_fx.passes.fit_basis import MAX_RESIDUAL, BasisFits
from bda_fx.passes.observe_noise import Observed
from bda_fx.passes.read_weights import FactorKey, read_site
from bda_fx.passes.sites import REMEDIES, Alternative, Reason, Site, SitePlan, Skip

MIN_SIDE_GAIN = 4 / 3
"""How much more the other side must save where as many tokens pass through both: a decomposed
output projection also adds up heads and sorts outputs, and a second search costs as much as the
first."""


ESTIMATE_ERRS = 1.1
"""An estimate that is scaled to the fit of a smaller size may be too high by as much."""


@dataclass(frozen=True)
class Step:
    """A basis of ``size``, seen from side number ``view``; ``worth`` is what it saves."""

    view: int
    size: int
    worth: float


def steps_of(views: Sequence[Sequence[Site]], sizes: Callable[[Site], list[int]]) -> list[Step]:
    """Every size from every side, from what is worth most to what is worth least.

    Worth is in multiplications at the example's sizes: what a side saves is a matter of the tokens
    that pass through its linear. Where both are equal it is the side of keys and values.
    """
    tokens = views[0][0].linear.tokens
    steps: list[Step] = []
    for view, sites in enumerate(views):
        for size in sizes(sites[0]):
            worth = sum(s.linear.tokens * len(s.features) * s.decomposed * size for s in sites)
            equal = view > 0 and sites[0].linear.tokens == tokens
            steps.append(Step(view, size, worth / MIN_SIDE_GAIN if equal else worth))
    return sorted(steps, key=lambda step: -step.worth)


def worthwhile(steps: Sequence[Step]) -> list[Step]:
    """The steps of the side whose best is worth most, and of any other that fewer tokens pass.

    A second side costs a second search. Where it is worth no more at its best, it is left for sites
    that cannot be decomposed from the first.
    """
    best = steps[0]
    return [step for step in steps if step.view <= best.view]


@dataclass(eq=False)
class Choice:
    """Sites that are decided together: one, or those of a linear that share a basis.

    ``views`` are the sites from one side and from the other, ``shares`` their shares of the
    noise of each output, ``steps`` what there is to choose from, ``chosen`` the number of one;
    ``len(steps)`` is to leave the sites as they are.
    """

    views: Sequence[Sequence[Site]]
    shares: Sequence[Sequence[float]]
    steps: Sequence[Step]
    values: Mapping[str, Tensor]
    strategy: str
    balanced: bool
    shared: bool = False
    alike: bool = False
    """Whether each site is held to the budget by itself."""
    optimize_for: str | None = None
    observed: Mapping[FactorKey, Observed] = field(default_factory=dict)
    chosen: int = 0
    frugal: bool = False
    """Whether nothing is kept between searches that the next can compute once more."""
    _fits: dict[int, BasisFits] = field(default_factory=dict)

    @property
    def worth(self) -> list[float]:
        return [step.worth for step in self.steps]

    @property
    def step(self) -> Step | None:
        return self.steps[self.chosen] if self.chosen < len(self.steps) else None

    @property
    def sites(self) -> Sequence[Site]:
        """The sites as the chosen step sees them."""
        return self.views[self.step.view if self.step else 0]

    @property
    def search_bytes(self) -> int:
        """What searches keep unless they are ``frugal``: the heads in float64 and in float32."""
        heads = (len(site.features) * site.decomposed for site in self.views[0])
        return 12 * self.views[0][0].basis_features * sum(heads)

    @property
    def dtype(self) -> torch.dtype:
        return self.values[self.sites[0].linear.weight].dtype

    def fits(self, view: int) -> BasisFits:
        if view not in self._fits:
            read = [read_site(site, self.values, self.observed) for site in self.views[view]]
            self._fits[view] = BasisFits(
                read,
                self.strategy,
                self.dtype,
                balanced=self.balanced,
                optimize_for=self.optimize_for,
            )
        return self._fits[view]

    def noise(self, step: int) -> list[float]:
        """Noise of each site, an estimate before ``settle``."""
        return self.fits(self.steps[step].view).noise(self.steps[step].size)

    def costs(self, step: int) -> list[float]:
        """Σ share (noise² - 1) over the sites, for each output: 0 where they are left as they are,
        inf where the step cannot be taken, whatever the shares."""
        if step == len(self.steps):
            return [0.0 for _ in self.shares[0]]
        return self._costs_of(self.noise(step))

    def _costs_of(self, noises: Sequence[float]) -> list[float]:
        outputs = zip(*self.shares, strict=True)
        added = [noise**2 - 1 for noise in noises]
        if not all(map(math.isfinite, added)):
            return [math.inf for _ in outputs]
        total = max if self.alike else sum
        return [total(s * a for s, a in zip(shares, added, strict=True)) for shares in outputs]

    @property
    def settled(self) -> bool:
        """Whether the noise of the chosen step is known, and that of the last one before the sites
        are left as they are: estimates are scaled to what was fitted, and far from it they err."""
        step = self.step or self.steps[-1]
        return step.size in self.fits(step.view).known

    def settle(self) -> None:
        """Find the rows of the chosen step, or of the last one."""
        self.find(min(self.chosen, len(self.steps) - 1))

    def find(self, step: int) -> None:
        """Find the rows of a step."""
        self.fits(self.steps[step].view).fits(self.steps[step].size)
        self._release()

    def estimate_first(self) -> None:
        """Estimate the noise of the step that is worth most."""
        self.noise(0)
        self._release()

    def estimate(self) -> None:
        """Estimate the noise of all steps of the side that is worth most."""
        for number, step in enumerate(self.steps):
            if step.view == self.steps[0].view:
                self.noise(number)
        self._release()

    def _release(self) -> None:
        if self.frugal:
            for fits in self._fits.values():
                fits.search.release()

    def costs_hoped_for(self, step: int) -> list[float] | None:
        """Costs of a step if its noise is below the estimate by as much as that may err; None where
        it is known."""
        if self.steps[step].size in self.fits(self.steps[step].view).known:
            return None
        return self._costs_of([noise / ESTIMATE_ERRS for noise in self.noise(step)])

    def plans(self) -> list[SitePlan]:
        if self.step is None:
            return []
        fits = self.fits(self.step.view).fits(self.step.size)
        return [
            SitePlan(
                site=site,
                basis=self._basis_name(site),
                strategy=self.strategy,
                size=len(fit.rows),
                rows=tuple(fit.rows.tolist()),
                noise=fit.noise,
                worst_head_noise=fit.worst,
                condition=fit.condition,
                shares=tuple(self.shares[at]),
                balanced=self.balanced,
                optimize_for=self.optimize_for,
                correction=fit.correction,
                alternatives=self._alternatives(at),
            )
            for at, (site, fit) in enumerate(zip(self.sites, fits, strict=True))
        ]

    def _basis_name(self, site: Site) -> str:
        """Unique in the program: a linear may have several bases, and several that are shared."""
        first = self.sites[0] if self.shared else site
        kind = "kv" if self.shared else site.product.replace("+", "")
        return f"{site.linear.name}_{kind}{first.features[0][0]}"

    def _alternatives(self, at: int) -> tuple[Alternative, ...]:
        """The other steps as site ``at`` sees them, as far as they were looked at."""
        return tuple(
            Alternative(
                self.views[step.view][at].side,
                step.size,
                self.noise(number)[at],
                step.size not in self._fits[step.view].known,
            )
            for number, step in enumerate(self.steps)
            if number != self.chosen
            and step.view in self._fits
            and self._fits[step.view].weighed(step.size)
        )

    def skips(self, budget: str | float) -> list[Skip]:
        if self.step is not None:
            return []
        least = min(max(self.noise(step)) for step in range(len(self.steps)))
        if math.isfinite(least):
            reason, detail = Reason.TOO_NOISY, f"{least:.2f} at best, budget {budget}"
        else:
            every = [f for step in self.steps for f in self.fits(step.view).fits(step.size)]
            residual = min(fit.residual for fit in every)
            if residual <= MAX_RESIDUAL:
                reason, detail = Reason.OUT_OF_RANGE, f"predicted for {self.dtype}"
            else:
                reason = Reason.RANK_DEFICIENT
                detail = f"residual {residual:.1e} at best, limit {MAX_RESIDUAL:.0e}"
        return [skip for site in self.views[0] for skip in skips_of(site, reason, detail)]


def skips_of(site: Site, reason: Reason, detail: str = "") -> list[Skip]:
    return [
        Skip(
            product,
            contraction,
            reason,
            site.linear.weight,
            site.linear.name,
            detail,
            remedy=REMEDIES.get(reason, ""),
            site=site,
        )
        for contraction in site.contractions
        for product in site.product.split("+")
    ]
