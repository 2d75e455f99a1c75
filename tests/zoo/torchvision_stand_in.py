"""Lets ``import timm`` work without torchvision, of which its models need next to nothing.

PyTorch's CPU wheels and PyPI's torchvision do not import beside each other. timm names transforms
and data sets of torchvision when it is imported; none is used here.
"""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec
from typing import Any

from torch import nn


class _Anything(type):
    """A class whose attributes are classes like it: enough for names read at import time."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class _Module(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name, (), {})


class FrozenBatchNorm2d(nn.Module):
    """Asked for in ``isinstance`` alone."""


NAMES = ("", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets")


def install() -> None:
    """Put the stand-in where ``import torchvision`` finds it, unless it has been imported."""
    if "torchvision" in sys.modules:
        return
    for name in NAMES:
        module = _Module(f"torchvision{name}")
        module.__spec__ = ModuleSpec(module.__name__, None, is_package=True)
        module.__path__ = []
        sys.modules[module.__name__] = module
        parent, _, child = module.__name__.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    sys.modules["torchvision.ops.misc"].FrozenBatchNorm2d = FrozenBatchNorm2d  # type: ignore[attr-defined]


def remove() -> None:
    """Take it away again: others ask whether torchvision is there to decide what they import."""
    for name in NAMES:
        if isinstance(sys.modules.get(f"torchvision{name}"), _Module):
            del sys.modules[f"torchvision{name}"]
