"""The elements of a tensor as bytes, to hash them."""

from __future__ import annotations

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Elements in the order of their indices, however they are strided. Copies only what is on
    another device or not contiguous."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    data: memoryview = plain.reshape(-1).view(torch.uint8).numpy().data
    return data
