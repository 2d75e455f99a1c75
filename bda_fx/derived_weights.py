"""Derived weights of compiled graphs: computed from parameters, found per call, never stale.

One compiled graph serves many modules, so the derived weights cannot be constants of it. They are
looked up at each call by the parameters that they come from, and recomputed when these change:

* another Parameter object: its identity is the key;
* an in-place change, an optimizer step, ``load_state_dict``: the version counter moved;
* ``p.data = t``: identity and version stay, but the storage is another one;
* ``p.data += d`` (what LoRA merges do): nothing that PyTorch keeps moves. For CPU parameters a few
  elements of each are compared at every call, which catches any change that is not confined to
  others; for other devices, and to be certain, call :func:`invalidate` after such a write.

Entries hold parameters weakly and vanish with them.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from bda_fx.cache_bases import forget_bases

PROBES = 8
"""Elements of each CPU parameter that are compared at every call."""
_epoch = 0


def invalidate() -> None:
    """Forget all derived weights; they are recomputed at the next call of each compiled model.

    Forgets too in which basis opaque caches are: caches that were filled before must not be used
    after. Needed after a write that PyTorch does not record (``p.data.mul_(2)``, a write through
    NumPy or a kernel of one's own). Cheap; safe from any thread.
    """
    global _epoch
    _epoch += 1
    forget_bases()


@dataclass
class _Entry:
    epoch: int
    parameters: tuple[Any, ...]
    state: list[tuple[int, int, int]]
    storages: list[StorageWeakRef]
    """Weak, but keep the address of a freed storage from being taken by another one."""
    probes: list[tuple[list[Tensor], Tensor]]
    derived: Any


@dataclass(frozen=True)
class Snapshot:
    """What PyTorch keeps of changes to tensors, as it was at one time, by their identity."""

    epoch: int
    states: dict[int, tuple[int, int, int]]

    @classmethod
    def of(cls, tensors: Sequence[Any]) -> Snapshot:
        """Of those of ``tensors`` that have a version and a storage of their own."""
        known = [t for t in tensors if type(t) in (Tensor, Parameter) and not t.is_inference()]
        states = zip(map(id, known), _state(known), strict=True)
        return cls(_epoch, dict(states))

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether all ``tensors`` were seen and are as they were."""
        if self.epoch != _epoch or any(id(t) not in self.states for t in tensors):
            return False
        return [self.states[id(t)] for t in tensors] == _state(tensors)


class DerivedWeights:
    """Derived tensors of one compiled graph, by the parameters they are computed from."""

    def __init__(self, compute: Callable[[Sequence[Tensor]], Any]) -> None:
        self.compute = compute
        self.entries: dict[tuple[int, ...], _Entry] = {}
        self.lock = threading.RLock()

    def lookup(self, parameters: Sequence[Tensor]) -> Any:
        """What ``compute(parameters)`` gives, computed anew only when a parameter changed."""
        key = tuple(map(id, parameters))
        entry = self.entries.get(key)
        if entry is not None and self.fresh(entry, parameters):
            return entry.derived
        with self.lock:
            entry = self.entries.get(key)
            if entry is None or not self.fresh(entry, parameters):
                entry = self.entries[key] = self.make(key, parameters)
            return entry.derived

    @staticmethod
    def fresh(entry: _Entry, parameters: Sequence[Tensor]) -> bool:
        if entry.epoch != _epoch or _state(parameters) != entry.state:
            return False
        if any(ref() is not p for ref, p in zip(entry.parameters, parameters, strict=True)):
            return False
        return all(torch.equal(torch.cat(views), seen) for views, seen in entry.probes)

    def make(self, key: tuple[int, ...], parameters: Sequence[Tensor]) -> _Entry:
        # State first: a change that races with the computation is then seen at the next call.
        entry = self._entry(key, parameters)
        with torch.inference_mode(False), torch.no_grad():
            entry.derived = self.compute(parameters)
        return entry

    def keep(self, parameters: Sequence[Tensor], derived: Any, since: Snapshot) -> None:
        """Keep what was already computed of ``parameters``, unless one changed ``since``."""
        if not since.holds(parameters):
            return
        key = tuple(map(id, parameters))
        entry = self._entry(key, parameters)
        entry.derived = derived
        if since.holds(parameters):  # once more: what changes from now on is seen by the entry
            self.entries[key] = entry

    def _entry(self, key: tuple[int, ...], parameters: Sequence[Tensor]) -> _Entry:
        """An entry for the parameters as they are now, without derived tensors."""
        entries = weakref.ref(self)

        def drop(_: Any) -> None:
            owner = entries()
            if owner is not None:
                owner.entries.pop(key, None)

        with torch.inference_mode(False), torch.no_grad():
            return _Entry(
                _epoch,
                tuple(weakref.ref(p, drop) for p in parameters),
                _state(parameters),
                [StorageWeakRef(p.untyped_storage()) for p in parameters],
                _probes(parameters),
                None,
            )

    @property
    def nbytes(self) -> int:
        """Bytes held in derived tensors."""
        total = 0
        for entry in list(self.entries.values()):
            for value in entry.derived or ():
                total += value.numel() * value.element_size()
        return total


def _state(parameters: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    return [(p._version, p.data_ptr(), p.untyped_storage()._cdata) for p in parameters]


def _probes(parameters: Sequence[Tensor]) -> list[tuple[list[Tensor], Tensor]]:
    """Views of a few elements spread over each CPU parameter, by dtype, and their values now."""
    views: dict[torch.dtype, list[Tensor]] = {}
    for p in parameters:
        dense = p.layout is torch.strided and p.is_contiguous()
        if p.device.type == "cpu" and dense and p.numel() > 0:
            # An odd step walks through the columns instead of down one of them.
            step = max(1, (p.numel() - 1) // PROBES) | 1
            count = min(PROBES, (p.numel() - 1) // step + 1)
            view = p.detach().as_strided((count,), (step,), p.storage_offset())
            views.setdefault(p.dtype, []).append(view)
    return [(v, torch.cat(v)) for v in views.values()]
