"""Which basis the caches of a model are in: every graph that shares them must use the same one.

With ``kv_cache="opaque"`` a prefill graph fills a cache that a decode graph reads. Both see the
same weights, so both come to the same change of basis, unless one of them could not be rewritten
where the other was. Then the cache would mean two things: that is an error, and never a fall-back.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bda_fx.passes.sites import Plan


class CacheConflict(RuntimeError):
    """Two graphs of one model would put different things into its cache."""


_known: dict[int, tuple[Any, Any]] = {}
_lock = threading.Lock()


def _forget(key: int, _: Any) -> None:
    _known.pop(key, None)


def forget_bases() -> None:
    """As if no graph had been compiled yet."""
    with _lock:
        _known.clear()


def bases_of(plan: Plan, roots: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """What a graph makes of the parameters behind its linears, by placeholder.

    The basis in which it caches what they make, or () where they are used as they are. Parameters
    that are rewritten but not cached are free to differ. ``roots``: the placeholders of a weight.
    """
    forms: dict[str, list[Any]] = {}
    for weight, names in roots.items():
        done = [
            (item.site.product, item.site.features, item.size, item.strategy)
            for item in plan.sites
            if item.site.linear.weight == weight
        ]
        for root in names:
            if not done or weight in plan.cached:
                forms.setdefault(root, []).extend(done)
    return {root: tuple(sorted(found)) for root, found in forms.items()}


def agree(bases: Mapping[str, Any], parameters: Mapping[str, Tensor]) -> None:
    """Note what a graph caches for these ``parameters``, both by placeholder.

    Raises:
        CacheConflict: another graph caches something else for one of them.
    """
    with _lock:
        for root, basis in bases.items():
            parameter = parameters.get(root)
            if parameter is None:
                continue
            key = id(parameter)
            ref, known = _known.get(key, (None, None))
            if ref is None or ref() is not parameter:
                _known[key] = (weakref.ref(parameter, functools.partial(_forget, key)), basis)
            elif known != basis:
                raise CacheConflict(
                    f"bda_fx: a parameter of shape {tuple(parameter.shape)} makes keys or values "
                    "for a cache, and two graphs of this model would put them there in different "
                    "bases: one of the graphs could not be rewritten as the other was. Compile "
                    'without kv_cache="opaque" (bda_fx.analyze of both shows what differs), or '
                    "call bda_fx.invalidate() first if they never share a cache."
                )
