"""What a user may ask for: one frozen dataclass, the same names as the backend's options dict."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

BASES = ("auto", "pivot", "window", "slices", "residual-min", "first")
PRODUCTS = ("qk", "vo")
SIDES = ("auto", "kv", "qo")
CACHES = ("skip", "opaque")
GRIDS = (None, "int8", "fp8")
PROFITABILITIES = ("always", "measure", "model")
INNERS = ("inductor", "aot_eager", "eager", "torch_tensorrt")


class OptionError(ValueError):
    """An option that does not exist or a value it cannot take; the text names the remedy."""


@dataclass(frozen=True)
class Options:
    """Options of ``rewrite``, ``analyze`` and ``torch.compile(model, backend="bda", options=…)``.

    Attributes:
        basis: how basis rows are chosen. "auto" is "pivot"; "first" and "residual-min" are the
            paper's and are far noisier; "window" takes the best contiguous rows (no gather);
            "slices" is "pivot" where the gather is free (MLA), "window" elsewhere. Exporters take
            "slices" for "auto".
        basis_size: "auto" chooses for each site one of D, 15/16, 7/8, 3/4, 5/8, 1/2 D, so that as
            much as possible is saved within ``noise_budget``; "full" is D; a number in (0, 1] is
            that fraction of D. With an explicit size the budget is not enforced.
        noise_budget: how noisy the rewritten model may be: the error of its outputs against
            float64, over the original's own error in the same dtype (1.0 = as good). "auto" is
            1.25 in float16 and bfloat16, 1.4 in wider dtypes.
        products: which products to rewrite, of "qk" and "vo".
        side: which side of a product is decomposed: "kv" the projections of keys and values, "qo"
            those of queries and outputs; "auto" the one that saves more at the example's token
            counts, and "kv" where both save the same.
        keep: names of weights, or shell patterns of them, whose sites keep their original form.
        kv_cache: "skip" leaves keys and values that go into a cache as they are. "opaque" is your
            word that nobody but the model's own attention reads the cache: then it holds them in
            the new basis, which is the same in every graph of the model. Every call that shares a
            cache must then go through bda_fx.
        optimize_for: "int8" or "fp8" if the rewritten weights will be quantised to that, with one
            scale per output channel: sizes and sides are then chosen so that each site's
            quantisation error stays within ``noise_budget`` of the original's, quantised alike
            ("auto" is 1.25). None plans for the dtype of the weights as they are.
        profitability: "always" rewrites what is legal and quiet, whatever it does to the speed.
            "measure" times each distinct projection on this machine, at the example's number of
            tokens or (where that is dynamic) at a few, and takes the fastest of original and
            decomposed forms; timings are kept in a file. "model" predicts the same from a few rates
            of the device. Both speak of the device and the threads of the process that compiles:
            ``rewrite`` and the exporters, whose programs run elsewhere, weigh plain ATen ops here.
        inner: the compiler that the backend hands the rewritten graph to. "torch_tensorrt" needs
            that package.
        inner_options: its options; for "inductor" a config patch, for "torch_tensorrt" what
            ``torch.compile(backend="torch_tensorrt", options=…)`` takes.
        strict: raise where the backend would fall back to the original graph with a warning.
    """

    basis: str = "auto"
    basis_size: str | float = "auto"
    noise_budget: str | float = "auto"
    products: tuple[str, ...] = PRODUCTS
    side: str = "auto"
    keep: tuple[str, ...] = ()
    kv_cache: str = "skip"
    optimize_for: str | None = None
    profitability: str = "always"
    inner: str = "inductor"
    inner_options: Mapping[str, Any] = field(default_factory=dict)
    strict: bool = False

    def __post_init__(self) -> None:
        _choice("basis", self.basis, BASES)
        _choice("side", self.side, SIDES)
        _choice("kv_cache", self.kv_cache, CACHES)
        _choice("optimize_for", self.optimize_for, GRIDS)
        _choice("profitability", self.profitability, PROFITABILITIES)
        _choice("inner", self.inner, INNERS)
        if isinstance(self.products, str):
            raise OptionError(
                f'products is a sequence, got the string {self.products!r}: write ("qk",)'
            )
        if not isinstance(self.products, Iterable):
            raise OptionError(f"products is a sequence, got {self.products!r}")
        object.__setattr__(self, "products", tuple(self.products))
        if isinstance(self.keep, str) or not isinstance(self.keep, Iterable):
            raise OptionError(f"keep is a sequence of names, got {self.keep!r}: write (name,)")
        object.__setattr__(self, "keep", tuple(self.keep))
        for product in self.products:
            _choice("products", product, PRODUCTS)
        size = self.basis_size
        fraction = isinstance(size, int | float) and not isinstance(size, bool) and 0 < size <= 1
        if not fraction and size not in ("auto", "full"):
            raise OptionError(
                f'basis_size is "auto", "full" or a fraction of the head size in (0, 1], '
                f"got {size!r}"
            )
        budget = self.noise_budget
        number = isinstance(budget, int | float) and not isinstance(budget, bool)
        if budget != "auto" and not (number and float(budget) >= 1):
            raise OptionError(f'noise_budget is "auto" or a number from 1.0 on, got {budget!r}')
        if not isinstance(self.strict, bool):
            raise OptionError(f"strict is True or False, got {self.strict!r}")
        if not isinstance(self.inner_options, Mapping):
            raise OptionError(
                f"inner_options is a mapping, got {type(self.inner_options).__name__}"
            )

    @classmethod
    def of(cls, given: Options | Mapping[str, Any] | None) -> Options:
        """Options from an instance, a dict, or nothing.

        Raises:
            OptionError: a name that is no option (the text lists the known ones) or a bad value.
        """
        if given is None:
            return cls()
        if isinstance(given, Options):
            return given
        if not isinstance(given, Mapping):
            raise OptionError(f"options are bda_fx.Options or a dict of them, got {given!r}")
        known = [f.name for f in dataclasses.fields(cls)]
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise OptionError(
                f"unknown option {', '.join(map(repr, unknown))}; "
                f"the options are {', '.join(known)}"
            )
        return cls(**given)


def _choice(name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise OptionError(f"{name} is one of {', '.join(map(repr, allowed))}, got {value!r}")
