"""Predict how long the forms of one linear take, from a few rates of the device. Times no shape.

CPU: the faster of ATen's and oneDNN's linear, and the kernel without a basis, are timed once for
each dtype at some numbers of tokens, on one weight, with a small product for what a call costs and
a copy for the bandwidth:

    seconds(tokens, K, F) = call + (reference(tokens) - call) · K F / (K₀ F₀)
    gather, add, sum      = bytes read and written / bandwidth       (the kernel gathers x as well)

CUDA: the roofline of ``bda_fx.kernels.roofline``, and the same bytes over its bandwidth.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bda_fx.kernels import roofline
from bda_fx.kernels.packed_projection import pack, packed_projection, serves
from bda_fx.measure_projection import ORIGINAL, Candidate, Case, Timer, prepacked_linear, time_calls
from bda_fx.timing_cache import TimingCache

TOKENS = (1, 16, 128, 1024)
SIZE = 512
"""Inputs and outputs of the weight that is timed."""
SMALL = 32
"""Those of a product that is nothing but a call."""
COPY = 1 << 24
"""Bytes of the copy: more than an L2 cache holds."""


class Predict:
    """Seconds of every candidate and of the original, as the model has it."""

    how = "predicted"

    def __init__(self, device: torch.device, timer: Timer | None = None) -> None:
        self.device, self.timer = device, timer or time_calls
        self.cache = TimingCache(device) if device.type == "cpu" else None

    def known(self, case: Case, tokens: int) -> bool:
        return True

    def __call__(self, case: Case, tokens: int) -> dict[str, float]:
        """Seconds by the candidates' names, and ORIGINAL's."""
        if case.device.type == "cuda":
            return _on_cuda(case, tokens)
        rates = self.rates(case.dtype)
        linear = case.linear

        def product(kind: str, inner: int, outputs: int) -> float:
            call = rates[f"call {kind}"]
            share = inner * outputs / SIZE**2
            return call + max(_between(rates, kind, tokens) - call, 0.0) * share

        def moved(*widths: int) -> float:
            return sum(widths) * tokens * case.dtype.itemsize * rates["byte"]

        seconds = {ORIGINAL: product("linear", linear.in_features, linear.out_features)}
        for candidate in case.candidates:
            seconds[candidate.name] = _form(candidate, product, moved, rates["call linear"])
        return seconds

    def rates(self, dtype: torch.dtype) -> dict[str, float]:
        """Seconds of the reference calls and of a byte that is read or written."""
        assert self.cache is not None
        key = f"rates {dtype}"
        rates = self.cache.get(key)
        if rates is None:
            rates = _calibrate(dtype, self.timer)
            self.cache.put(key, rates)
        return rates


def _calibrate(dtype: torch.dtype, timer: Timer) -> dict[str, float]:
    device = torch.device("cpu")
    calls: dict[str, Callable[[], Tensor]] = {}
    prepacked: dict[str, dict[str, Callable[[], Tensor]]] = {}
    packs = serves(device, dtype)
    for tokens, size in [*((t, SIZE) for t in TOKENS), (1, SMALL)]:
        generator = torch.Generator().manual_seed(0)
        like: dict[str, Any] = {"generator": generator, "device": device, "dtype": torch.float32}
        x, weight = (torch.randn(n, size, **like).to(dtype) for n in (tokens, size))
        at = f"{tokens}" if size == SIZE else "call"
        calls[f"linear {at}"] = lambda x=x, w=weight: F.linear(x, w)  # type: ignore[misc]
        faster = prepacked_linear(x, weight, None)
        if faster is not None:
            prepacked[f"linear {at}"] = {f"{ORIGINAL}, prepacked": faster}
        if packs:
            panels = pack(weight)
            calls[f"packed {at}"] = lambda x=x, p=panels, n=size: packed_projection(  # type: ignore[misc]
                x, p, None, None, 0, 0, [-1], n
            )
    source = torch.zeros(COPY, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    calls["byte"] = lambda: target.copy_(source)
    seconds: dict[str, float] = {}
    with torch.no_grad():
        for name, call in calls.items():
            seconds[name] = min(timer({ORIGINAL: call, **prepacked.get(name, {})}, device).values())
    rates = {"byte": seconds.pop("byte") / (2 * COPY)}
    for name, value in seconds.items():
        kind, at = name.split()
        rates[f"call {kind}" if at == "call" else name] = value
    return rates


def _between(rates: dict[str, float], kind: str, tokens: int) -> float:
    """Seconds of the reference at a number of tokens: a line between those timed, and beyond."""
    right = min(max(bisect.bisect_left(TOKENS, tokens), 1), len(TOKENS) - 1)
    a, b = TOKENS[right - 1], TOKENS[right]
    low, high = rates[f"{kind} {a}"], rates[f"{kind} {b}"]
    if tokens > b:
        return high * tokens / b
    return low + (high - low) * (tokens - a) / (b - a)


def _form(
    candidate: Candidate,
    product: Callable[[str, int, int], float],
    moved: Callable[..., float],
    call: float,
) -> float:
    form = candidate.form
    inputs, outputs = form.linear.in_features, form.linear.out_features
    total = 0.0
    for piece in form.pieces:
        features, rest = len(piece.features), inputs - piece.size
        if form.heads:
            total += product("linear", inputs, outputs - piece.size) + 3 * call
            total += moved(inputs, piece.size, 3 * outputs)
        elif piece.basis is None or candidate.spelling == "dense":
            total += product("linear", inputs if piece.basis is None else rest, features)
        elif candidate.spelling == "aten":
            total += product("linear", rest, features) + 3 * call + moved(2 * inputs, 3 * features)
        else:
            total += product("packed", rest, features) + moved(inputs)
    if candidate.joined:
        total += call + moved(2 * outputs)
    return total


def _on_cuda(case: Case, tokens: int) -> dict[str, float]:
    device = roofline.cuda_device(case.device.index or 0)
    linear, itemsize = case.linear, case.dtype.itemsize
    tf32 = torch.backends.cuda.matmul.allow_tf32

    def seconds(inputs: int, outputs: int, size: int = 0, scattered: bool = False) -> float:
        if inputs <= size or outputs == 0:
            return roofline.LAUNCH_SECONDS
        projection = roofline.Projection(
            tokens, inputs, outputs, size, case.dtype, scattered=scattered, tf32=tf32
        )
        return roofline.predict(projection, device).seconds

    def moved(*widths: int) -> float:
        return sum(widths) * tokens * itemsize / device.bandwidth

    def product(kind: str, inner: int, outputs: int) -> float:
        return seconds(inner, outputs)

    result = {ORIGINAL: seconds(linear.in_features, linear.out_features)}
    for candidate in case.candidates:
        if candidate.spelling != "operator":
            call = roofline.LAUNCH_SECONDS
            result[candidate.name] = _form(candidate, product, moved, call)
            continue
        folded = {fold.basis for fold in candidate.plan.folds}
        result[candidate.name] = math.fsum(
            seconds(linear.in_features, len(piece.features), piece.size, piece.basis not in folded)
            for piece in candidate.form.pieces
        ) + (moved(2 * linear.out_features) if candidate.joined else 0.0)
    return result
