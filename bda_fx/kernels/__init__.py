"""Kernels for a decomposed projection: one operator, and what serves it on each device."""

from bda_fx.kernels import basis_projection_cuda as basis_projection_cuda  # registers itself
