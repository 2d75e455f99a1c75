"""Kernels for a decomposed projection: one operator, and what serves it on each device."""
