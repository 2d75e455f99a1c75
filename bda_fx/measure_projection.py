"""Time the forms of one linear in turns, on its real shapes, spelled as a graph would hold them.

Random values: what a product costs does not depend on them. The original is the faster of ATen's
linear and oneDNN's on a prepacked weight, which is what Inductor makes of it with freezing. Calls
run from generated Python, so short ones pay the same overhead and differ less than when compiled.
On CUDA, Inductor's own benchmarker times them (not tried: there was no GPU).
"""

from __future__ import annotations

import hashlib
import operator
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from bda_fx.circumstances import has_amx
from bda_fx.passes.emit_node import emit
from bda_fx.passes.emit_projection import Spelling
from bda_fx.passes.forms import Arrangement, Form, arrangement_of, basis_key, bias_key, weight_key
from bda_fx.passes.rewrite_graph import rewrite_linear
from bda_fx.passes.sites import Linear, Plan
from bda_fx.timing_cache import TimingCache

SECONDS = 0.15
"""What the rounds of one shape may take, once each call has run three times."""
ROUNDS = 5, 101
"""Least and most rounds."""
SHORTEST = 1e-4
"""Seconds that are timed at once: shorter calls are repeated."""
HOPELESS = 1.3
"""How much slower than the original a form may be to be timed more than once."""
MOST_WORK = 8e8
"""Multiplications of a call, for each thread. More tokens than make so many, and than 192, which is
a block of the kernel, are not timed: the ratio of two products of many tokens does not depend on
their number, once their results are larger than caches."""
UNIT_IS_FASTER = 8
"""How much more a CPU's unit for matrices multiplies in the same time."""
ORIGINAL = "original"
aten = torch.ops.aten


@dataclass(frozen=True)
class Candidate:
    """One way to compute a linear: its form and spelling. ``plan`` has the linear's sites alone.

    ``joined``: its pieces have to be put together, as some reader needs them all.
    """

    name: str
    spelling: Spelling
    form: Form
    plan: Plan
    joined: bool = False

    def layout(self, fixed_rows: bool) -> str:
        """A hash of all of the form that its time may depend on, whatever its names are."""
        folded = {fold.basis for fold in self.plan.folds}
        rows = {item.basis: item.rows for item in self.plan.sites} if fixed_rows else {}
        parts = [
            (
                piece.features,
                piece.size,
                piece.slots,
                piece.basis in folded,
                _window(rows.get(piece.basis or "", ())),
            )
            for piece in self.form.pieces
        ]
        described = (parts, self.form.heads, self.joined)
        return hashlib.sha256(repr(described).encode()).hexdigest()[:16]


def _window(rows: Sequence[int]) -> int | None:
    """The first of contiguous rows."""
    return rows[0] if rows and rows[-1] - rows[0] == len(rows) - 1 else None


@dataclass(frozen=True)
class Case:
    """A linear with its candidates. ``fixed_rows``: whether rows will be part of the graph."""

    linear: Linear
    dtype: torch.dtype
    device: torch.device
    bias: bool
    fixed_rows: bool
    candidates: tuple[Candidate, ...]

    def timed_tokens(self, tokens: int) -> int:
        """The number of tokens that stands for ``tokens``."""
        work = self.linear.in_features * self.linear.out_features
        at_once = torch.get_num_threads() * (UNIT_IS_FASTER if self._has_unit() else 1)
        return min(tokens, max(192, int(MOST_WORK * at_once / work)))

    def _has_unit(self) -> bool:
        """Whether the CPU has a unit for matrices of this dtype."""
        return self.device.type == "cpu" and self.dtype is torch.bfloat16 and has_amx()

    def key(self, tokens: int) -> str:
        """What the times of this case are kept under."""
        forms = [f"{c.spelling}:{c.layout(self.fixed_rows)}" for c in self.candidates]
        dtype = str(self.dtype).removeprefix("torch.")
        sizes = f"{tokens}x{self.linear.in_features}x{self.linear.out_features}"
        how = f"bias={self.bias} fixed={self.fixed_rows}"
        return f"{self.device.type} {dtype} {sizes} {how} {' '.join(forms)}"


Timer = Callable[[Mapping[str, Callable[[], Tensor]], torch.device], dict[str, float]]
"""Seconds of each call, by name."""


class Measure:
    """Seconds of every candidate and of the original, measured once for each shape."""

    how = "measured"

    def __init__(self, device: torch.device, timer: Timer | None = None) -> None:
        self.cache, self.timer = TimingCache(device), timer or time_calls

    def known(self, case: Case, tokens: int) -> bool:
        """Whether the answer is there already."""
        return self.cache.get(case.key(case.timed_tokens(tokens))) is not None

    def __call__(self, case: Case, tokens: int) -> dict[str, float]:
        """Seconds by the candidates' names, and ORIGINAL's."""
        count = case.timed_tokens(tokens)
        names = [f"{at}" for at in range(len(case.candidates))]
        key = case.key(count)
        seconds = self.cache.get(key)
        if seconds is None or not {ORIGINAL, *names} <= set(seconds):
            with torch.no_grad():
                seconds = self.timer(calls_of(case, count), case.device)
            originals = [s for name, s in seconds.items() if name.startswith(ORIGINAL)]
            seconds = {ORIGINAL: min(originals), **{name: seconds[name] for name in names}}
            self.cache.put(key, seconds)
            seconds = self.cache.known[key]
        by_name = {c.name: seconds[n] for c, n in zip(case.candidates, names, strict=True)}
        return {ORIGINAL: seconds[ORIGINAL], **by_name}


def time_calls(calls: Mapping[str, Callable[[], Tensor]], device: torch.device) -> dict[str, float]:
    """Medians of calls that take turns; what is hopeless after three runs is left at that."""
    if device.type == "cuda":
        from torch._inductor.runtime.benchmarking import benchmarker

        return {name: 1e-3 * benchmarker.benchmark_gpu(call) for name, call in calls.items()}
    repeats, first = {}, {}
    for name, call in calls.items():
        call()
        once = min(_timed(call, 1), _timed(call, 1))
        repeats[name], first[name] = max(1, min(100, int(SHORTEST / once))), once
    best = min(s for name, s in first.items() if name.startswith(ORIGINAL))
    times: dict[str, list[float]] = {
        name: [] for name, s in first.items() if s <= HOPELESS * max(best, 2e-5)
    }
    low, high = ROUNDS
    end, names = time.perf_counter() + SECONDS, list(times)
    for rounds in range(high):
        if rounds >= low and time.perf_counter() > end:
            break
        for name in names[rounds % len(names) :] + names[: rounds % len(names)]:
            times[name].append(_timed(calls[name], repeats[name]))
    return {name: statistics.median(times.get(name, [s])) for name, s in first.items()}


def _timed(call: Callable[[], Tensor], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def calls_of(case: Case, tokens: int) -> dict[str, Callable[[], Tensor]]:
    """Every candidate by its number, and the original in one or two ways, ready to be called."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
        return values.to(case.device, case.dtype)

    linear = case.linear
    x = random(tokens, linear.in_features)
    weight = random(linear.out_features, linear.in_features) / linear.in_features**0.5
    bias = random(linear.out_features) if case.bias else None
    calls: dict[str, Callable[[], Tensor]] = {
        ORIGINAL: _call(*_linear(case, x, weight, bias)),
    }
    prepacked = prepacked_linear(x, weight, bias)
    if prepacked is not None:
        calls[f"{ORIGINAL}, prepacked"] = prepacked
    for at, candidate in enumerate(case.candidates):
        calls[f"{at}"] = _call(*_rewritten(case, candidate, x, weight, bias, random))
    return calls


def _call(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[[], Tensor]:
    forward = module.forward
    return lambda: forward(*inputs)


def _linear(
    case: Case, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[fx.GraphModule, list[Tensor]]:
    """A graph with the original linear alone, under the name that it has in the program."""
    graph = fx.Graph()
    inputs = [x, weight] if bias is None else [x, weight, bias]
    names = ["x", "weight", next((b for b in case.linear.biases if b is not None), "bias")]
    mode = FakeTensorMode()
    nodes = []
    for name, value in zip(names, inputs, strict=False):
        nodes.append(graph.placeholder(name))
        nodes[-1].name = name
        nodes[-1].meta["val"] = mode.from_tensor(value)
    node = graph.call_function(aten.linear.default, tuple(nodes))
    with mode:
        node.meta["val"] = aten.linear.default(*[n.meta["val"] for n in nodes])
    graph.output(node)
    return fx.GraphModule({}, graph), inputs


def _rewritten(
    case: Case,
    candidate: Candidate,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    random: Callable[..., Tensor],
) -> tuple[fx.GraphModule, list[Tensor]]:
    """The same graph with the linear in a candidate's form, and random derived tensors."""
    module, inputs = _linear(case, x, weight, bias)
    (node,) = module.graph.find_nodes(op="call_function", target=aten.linear.default)
    arrangement = arrangement_of(candidate.form)
    if arrangement is not None and len(arrangement.order) > 1 and not candidate.joined:
        _take_apart(module.graph, node, arrangement)
    derived = _derived(case, candidate.form, bias is not None, random)
    rewritten = rewrite_linear(
        module.graph,
        node,
        candidate.form,
        candidate.plan,
        derived,
        fixed_rows=case.fixed_rows,
        spelling=lambda x, form, piece: candidate.spelling,
    )
    tensors = {**derived, **rewritten.constants}
    tensors.update({key: make(tensors) for key, make in rewritten.computed.items()})
    module.graph.eliminate_dead_code()
    module.recompile()
    return module, [*(tensors[key] for key in rewritten.inputs), *inputs]


def _take_apart(graph: fx.Graph, node: fx.Node, arrangement: Arrangement) -> None:
    """Let the graph give the pieces of its linear instead of all of it."""
    output = graph.output_node()
    with graph.inserting_before(output):
        sizes = [-1, arrangement.groups, sum(arrangement.widths)]
        grouped = emit(graph, aten.view.default, node, sizes, like=node)
        widths = list(arrangement.widths)
        parts = emit(graph, aten.split_with_sizes.default, grouped, widths, -1, like=node)
        found = [emit(graph, operator.getitem, parts, at, like=node) for at in range(len(widths))]
    output.args = (tuple(found),)


def _derived(
    case: Case, form: Form, bias: bool, random: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """Tensors like those that ``transform_weights`` makes for a form."""
    linear, tensors = form.linear, {}
    named = next((b for b in linear.biases if b is not None), None) if bias else None
    for at, piece in enumerate(form.pieces):
        outputs, inner = len(piece.features), linear.in_features - piece.size
        if form.heads:
            outputs, inner = linear.out_features - piece.size, linear.in_features
        tensors[weight_key(form, at)] = random(outputs, inner) / linear.in_features**0.5
        if named is not None and form.heads:
            tensors[f"{bias_key(form, at, named)}_basis"] = random(piece.size)
            tensors[f"{bias_key(form, at, named)}_rest"] = random(outputs)
        elif named is not None:
            tensors[bias_key(form, at, named)] = random(outputs)
        if piece.basis is None:
            continue
        total = linear.out_features if form.heads else linear.in_features
        generator = torch.Generator().manual_seed(at)
        permutation = torch.randperm(total, generator=generator, device="cpu")
        rows, rest = (p.sort().values for p in permutation.split([piece.size, total - piece.size]))
        if form.heads:
            order = torch.cat([rows, rest]).argsort()
            tensors[basis_key(piece.basis, "order")] = order.to(case.device)
        else:
            tensors[basis_key(piece.basis, "rows")] = rows.to(case.device)
            tensors[basis_key(piece.basis, "rest")] = rest.to(case.device)
    return tensors


def prepacked_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Callable[[], Tensor] | None:
    """oneDNN's linear on a weight packed for these tokens, where this CPU has it."""
    if x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return None
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, x.shape[0])
        project = torch.ops.mkldnn._linear_pointwise
        project(x, packed, bias, "none", [], "")
    except RuntimeError:  # a dtype that oneDNN has no kernel for
        return None
    return lambda: project(x, packed, bias, "none", [], "")
