"""``torch.compile(model, backend="bda")``: rewrite each Dynamo graph for the inner compiler.

Weights enter a Dynamo graph as inputs and one compiled graph serves several modules, so the derived
weights are inputs of the inner graph too, looked up per call (``derived_weights``). The basis size
belongs to the graph; basis rows are inputs. Whatever goes wrong, the original graph is compiled.
"""

from __future__ import annotations

import functools
import importlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from bda_fx.cache_bases import agree, bases_of
from bda_fx.derived_weights import DerivedWeights, Snapshot
from bda_fx.kernels import basis_projection_cuda
from bda_fx.kernels.source_key import kernel_source_key
from bda_fx.options import OptionError, Options
from bda_fx.outcome import Outcome, StepError, step
from bda_fx.pause_collector import collector_paused
from bda_fx.prepare_inductor import inductor_prepared
from bda_fx.rewrite_cache import RewriteCache

log = logging.getLogger("bda_fx")
Compiled = Callable[..., Any]


@collector_paused()
def bda_backend(
    module: fx.GraphModule,
    example_inputs: list[Any],
    *,
    mode: str | None = None,
    options: Options | Mapping[str, Any] | None = None,
) -> Compiled:
    """The backend. ``options`` are :class:`bda_fx.Options` or a dict of them, ``mode`` Inductor's.

    Raises:
        OptionError: an unknown option or a bad value.
        CacheConflict: with an opaque cache, two graphs do not agree on what it holds.
        StepError: with ``strict=True``, when a step of the pipeline fails.
    """
    chosen = Options.of(options)
    on_cuda = chosen.inner == "inductor" and _on("cuda", example_inputs)
    if on_cuda:
        basis_projection_cuda.offer_to_inductor()
    inner = _inner_compiler(chosen, mode, with_kernels=on_cuda)
    trainable = [x for x in example_inputs if isinstance(x, nn.Parameter) and x.requires_grad]
    if torch.is_grad_enabled() and trainable:
        _warn_once(
            "bda_fx: grad mode is on and parameters require grad, so the original model is "
            "compiled. Call it under torch.no_grad() or torch.inference_mode() to use BD attention."
            + (" Do not hand its caches to calls that do." if chosen.kv_cache == "opaque" else "")
        )
        return inner(module, example_inputs)
    if uses_autocast(module, example_inputs):
        log.warning("bda_fx: autocast chooses dtypes op by op, so the original graph is compiled")
        return inner(module, example_inputs)
    before = Snapshot.of(example_inputs)
    try:
        with inductor_prepared(chosen.inner == "inductor" and _on("cpu", example_inputs)):
            outcome, inputs = _rewrite(module, example_inputs, chosen, mode)
        if log.isEnabledFor(logging.INFO):
            from bda_fx.report import report_of

            log.info("%s", report_of(outcome.plan))
        bases = bases_of(outcome.plan, outcome.roots)
        agree(bases, dict(zip(inputs, example_inputs, strict=True)))
        if not outcome.plan.sites:
            return inner(module, example_inputs)
        with step("compile"):
            return _compile(outcome, module, example_inputs, chosen, inner, bases, before)
    except StepError as error:
        if chosen.strict:
            raise
        if chosen.kv_cache == "opaque":  # whatever this graph caches is as the original has it
            parameters = {str(id(x)): x for x in example_inputs if isinstance(x, nn.Parameter)}
            agree(dict.fromkeys(parameters, ()), parameters)
        warnings.warn(f"{error}. The original graph is compiled instead.", stacklevel=2)
        return inner(module, example_inputs)


def _rewrite(
    module: fx.GraphModule, example_inputs: list[Any], options: Options, mode: str | None
) -> tuple[Outcome, list[str]]:
    """The rewritten graph and the names of the original's inputs, from the cache if it is there."""
    cache, patches = None, {}
    if options.inner == "inductor":  # others keep nothing either
        patches = _patches(options, mode)
        cache = RewriteCache.of(module, example_inputs, options, patches)
    known = None if cache is None else cache.restore()
    if known is not None:
        return known
    # Half a second of imports, which a process that finds everything in its caches does not need.
    from bda_fx.rewrite_dynamo import rewrite_dynamo

    outcome, inputs = rewrite_dynamo(module, example_inputs, options, patches)
    return outcome if cache is None else cache.store(outcome, inputs), inputs


def uses_autocast(module: fx.GraphModule, example_inputs: list[Any]) -> bool:
    """Whether autocast is on around the graph or inside of it.

    Autocast gives a linear another dtype than its inputs, but not the adds and gathers that a
    rewrite puts beside it, so the rewritten graph would have other dtypes than the original.
    """
    devices = {x.device.type for x in example_inputs if isinstance(x, Tensor)} - {"meta"}
    entered = torch.amp.autocast_mode._enter_autocast
    return any(torch.is_autocast_enabled(device) for device in devices) or any(
        node.target is entered for node in module.graph.nodes
    )


def _compile(
    outcome: Outcome,
    module: fx.GraphModule,
    example_inputs: list[Any],
    options: Options,
    inner: Callable[[fx.GraphModule, list[Any]], Compiled],
    bases: Mapping[str, Any],
    before: Snapshot,
) -> Compiled:
    """Compile the rewritten graph and wrap it with the look-up of its derived weights.

    Those of the example are there already, and kept unless a parameter changed since ``before``.
    """
    graph = outcome.program.graph
    originals = graph.find_nodes(op="placeholder")[len(outcome.inputs) :]
    live = [at for at, node in enumerate(originals) if node.users]
    names = {node.name: at for at, node in enumerate(originals)}
    for node in originals:
        if not node.users:
            graph.erase_node(node)
    outcome.program.module.recompile()
    derived_examples = [n.meta["val"] for n in graph.find_nodes(op="placeholder")][
        : len(outcome.inputs)
    ]
    compiled = inner(outcome.program.module, derived_examples + [example_inputs[i] for i in live])

    assert outcome.constants is not None
    weights = [names[root] for root in outcome.constants.roots]
    derived_weights = DerivedWeights(_derivation(outcome, bases))
    derived = tuple(outcome.tensors.values())
    if outcome.fit and not any(x.is_inference() or x.requires_grad for x in derived):
        derived_weights.keep([example_inputs[i] for i in weights], derived, before)
    original = _Original(module, options)

    def call(*args: Any) -> Any:
        parameters = [args[i] for i in weights]
        if any(p.is_inference() for p in parameters):
            return original("parameters made under inference_mode have no version counter", args)
        try:
            with step("transform weights"):
                derived = derived_weights.lookup(parameters)
        except StepError as error:
            if options.strict:
                raise
            warnings.warn(f"{error}. The original graph runs instead.", stacklevel=2)
            return original(str(error), args)
        if derived is None:
            return original(
                "these weights do not meet the noise budget or the range of their dtype", args
            )
        return compiled(*derived, *[args[i] for i in live])

    call.derived_weights = derived_weights  # type: ignore[attr-defined]
    return call


def _derivation(
    outcome: Outcome, bases: Mapping[str, Any]
) -> Callable[[Sequence[Tensor]], tuple[Tensor, ...] | None]:
    """From one module's parameters to the derived inputs, or None where they are unfit."""
    # Not the outcome as a whole, which holds the weights derived of the first parameters.
    plan, constants, computed = outcome.plan, outcome.constants, outcome.computed
    assert constants is not None
    fixed = {key: outcome.tensors[key] for key in outcome.fixed}
    order = tuple(outcome.inputs)

    def compute(parameters: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        from bda_fx.rewrite_dynamo import derive

        by_root = dict(zip(constants.roots, parameters, strict=True))
        derived = derive(plan, constants.evaluate(by_root), fixed, computed)
        agree(bases if derived is not None else dict.fromkeys(bases, ()), by_root)
        return None if derived is None else tuple(derived[key] for key in order)

    return compute


class _Original:
    """The original graph, compiled at first use: for modules that the new one cannot serve."""

    def __init__(self, module: fx.GraphModule, options: Options) -> None:
        self.module, self.options = module, options
        self.compiled: Compiled | None = None

    def __call__(self, why: str, args: tuple[Any, ...]) -> Any:
        if self.compiled is None:
            log.warning("bda_fx: %s; the original graph runs instead", why)
            self.compiled = torch.compile(
                self.module, backend=self.options.inner, **self.settings()
            )
        return self.compiled(*args)

    def settings(self) -> dict[str, Any]:
        takes_options = self.options.inner in ("inductor", "torch_tensorrt")
        return {"options": dict(self.options.inner_options)} if takes_options else {}


def _on(device: str, inputs: Sequence[Any]) -> bool:
    return any(isinstance(x, Tensor) and x.device.type == device for x in inputs)


def _inner_compiler(
    options: Options, mode: str | None, *, with_kernels: bool = False
) -> Callable[[fx.GraphModule, list[Any]], Compiled]:
    """The compiler for the rewritten (or the original) graph.

    ``with_kernels``: Inductor's code may hold kernels of ours, so its caches are keyed by them too.
    """
    if options.inner == "eager":
        return lambda module, _: module.forward
    if options.inner == "inductor":
        from torch._inductor.compile_fx import compile_fx

        patches = _patches(options, mode)
        if with_kernels:
            patches |= _keyed_by_kernels(patches)

        def inductor(module: fx.GraphModule, inputs: list[Any]) -> Any:
            return compile_fx(module, inputs, config_patches=patches or None)

        return inductor
    from torch._dynamo.backends.registry import lookup_backend

    if options.inner == "torch_tensorrt":
        try:
            importlib.import_module("torch_tensorrt")  # registers the backend of its name
        except ImportError as error:
            raise OptionError(
                f'inner="torch_tensorrt" needs that package ({error}): pip install torch-tensorrt'
            ) from error
        settings = {"options": dict(options.inner_options)}
        return functools.partial(lookup_backend(options.inner), **settings)
    return lookup_backend(options.inner)


def _patches(options: Options, mode: str | None) -> dict[str, Any]:
    """What is asked of Inductor beyond its configuration."""
    from torch._inductor import list_mode_options

    return {**(list_mode_options(mode) if mode else {}), **options.inner_options}


def _keyed_by_kernels(patches: Mapping[str, Any]) -> dict[str, Any]:
    """A pass beside the user's own that does nothing, but is part of the key of Inductor's caches:
    the code of a lowered operator changes with the kernels' sources, and nothing else says so."""
    from torch._inductor import config
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_custom_graph_passes

    class KernelSources(CustomGraphPass):
        def __call__(self, graph: fx.Graph) -> None:
            pass

        def uuid(self) -> str:
            return f"bda_fx kernels {kernel_source_key()}"

    name = "post_grad_custom_post_pass"
    given = get_custom_graph_passes(patches.get(name, getattr(config, name)))
    return {name: (*given, KernelSources())}


_warned: set[Any] = set()


def _warn_once(text: str) -> None:
    """Warn once for each compiled frame, however often it is recompiled."""
    compile_id = torch._guards.CompileContext.current_compile_id()
    key = (text, compile_id.frame_id if compile_id else None)
    if key not in _warned:
        _warned.add(key)
        warnings.warn(text, stacklevel=3)
