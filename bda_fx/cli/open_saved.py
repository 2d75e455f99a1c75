"""Open what is not a Hugging Face directory: programs, factories, timm models, trusted pickles."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from bda_fx.cli.errors import CliError, ExitCode, first_line
from bda_fx.cli.open_model import Opened, Settings
from bda_fx.cli.scan_archive import scan_archive


def open_program(name: str, settings: Settings) -> Opened:
    """An ``ExportedProgram`` that ``torch.export.save`` wrote.

    Raises:
        CliError: it is damaged, of another kind, or would run code when loaded.
    """
    path = Path(name)
    only_modules("--dtype", settings.dtype != "auto", name)
    only_modules("--task", settings.task is not None, name)
    scanned = scan_archive(path, unsafe=settings.unsafe)
    settings.check_memory(scanned.weight_bytes)
    for module in scanned.modules:
        importlib.import_module(module)
    try:
        program = torch.export.load(path)
    except (MemoryError, OSError):
        raise
    except Exception as error:
        raise CliError(
            f"{path} cannot be loaded by PyTorch {torch.__version__}: {first_line(error)}",
            "export and save it with this version of PyTorch",
            ExitCode.CANNOT_OPEN,
        ) from error
    return Opened(name, "program", program, weight_bytes=scanned.weight_bytes)


def open_factory(name: str, settings: Settings) -> Opened:
    """What ``package.module:function`` returns: a module, a program, or (model, args[, kwargs]).

    The module is imported as Python would from the current directory.
    """
    module_name, _, function_name = name.partition(":")
    only_modules("--task", settings.task is not None, name)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, what it imports is not
        raise CliError(
            f"there is no module {module_name}",
            "run bda-fx where Python finds it: in its directory, or with PYTHONPATH set",
            ExitCode.CANNOT_OPEN,
        ) from error
    except AttributeError as error:
        raise CliError(
            f"{module_name} has no {function_name!r}",
            f"name a function that returns the model: {module_name}:function",
            ExitCode.CANNOT_OPEN,
        ) from error
    try:
        made = function() if callable(function) else function
    except Exception as error:
        raise CliError(
            f"{name} raised {type(error).__name__}: {first_line(error)}",
            "bda-fx --traceback COMMAND … shows where",
            ExitCode.CANNOT_OPEN,
        ) from error
    return _checked(name, "factory", made, settings)


def open_pickle(name: str, settings: Settings) -> Opened:
    """A pickled module (``torch.save(model)``), which may run any code: only if ``unsafe``."""
    if not settings.unsafe:
        raise CliError(
            f"{name} is a pickle checkpoint, which can run any code when it is loaded",
            "save the model as safetensors (save_pretrained) or with torch.export.save; "
            "--unsafe loads it all the same, if you trust whoever made it",
            ExitCode.CANNOT_OPEN,
        )
    settings.check_memory(Path(name).stat().st_size)
    try:
        made = torch.load(name, map_location="cpu", weights_only=False)
    except Exception as error:
        raise CliError(
            f"{name} cannot be unpickled: {first_line(error)}",
            "it must be loaded where the classes that it holds can be imported",
            ExitCode.CANNOT_OPEN,
        ) from error
    return _checked(name, "pickle", made, settings)


def open_timm(name: str, settings: Settings) -> Opened:
    """A model that timm knows by name, with weights from a local file."""
    import timm

    architecture = name.removeprefix("timm:")
    if not timm.is_model(architecture):
        near = ", ".join(timm.list_models(f"*{architecture.split('_')[0]}*")[:5])
        raise CliError(
            f"timm {timm.__version__} has no model {architecture!r}",
            f"some that it has: {near or 'see timm.list_models()'}",
            ExitCode.CANNOT_OPEN,
        )
    only_modules("--task", settings.task is not None, name)
    if settings.weights is None and not settings.config_only:
        raise CliError(
            f"{name} without weights is a random model",
            "pass them with --weights FILE.safetensors (inspect --config-only does without)",
            ExitCode.USAGE,
        )
    with torch.device("meta" if settings.config_only else "cpu"):
        model = timm.create_model(architecture, pretrained=False)
    if settings.weights is not None and not settings.config_only:
        settings.check_memory(settings.weights.stat().st_size if settings.weights.exists() else 0)
        _load_weights(model, settings.weights)
    size = model.default_cfg.get("input_size", (3, 224, 224))
    device = next(model.parameters()).device
    return _checked(
        name, "timm", (model, (torch.randn(settings.batch, *size, device=device),)), settings
    )


def _load_weights(model: nn.Module, path: Path) -> None:
    """Weights from a safetensors file, or from a checkpoint of nothing but tensors."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state.get("state_dict", state))
    except Exception as error:
        raise CliError(
            f"--weights {path} does not load: {first_line(error)}",
            "pass a .safetensors file of this very architecture",
            ExitCode.CANNOT_OPEN,
        ) from error


def _checked(name: str, kind: str, made: Any, settings: Settings) -> Opened:
    """An :class:`Opened` of what a factory or a file gave."""
    parts = made if isinstance(made, tuple) else (made,)
    model, args, kwargs = (*parts, (), {})[:3] if len(parts) == 1 else (*parts, {})[:3]
    if isinstance(args, Tensor):
        args = (args,)
    right = isinstance(model, nn.Module | ExportedProgram) and isinstance(args, tuple | list)
    if not right or not isinstance(kwargs, dict):
        what = ", ".join(type(part).__name__ for part in parts)
        raise CliError(
            f"{name} holds {what}, which is no model",
            "it must be an nn.Module, an ExportedProgram, (model, args) or (model, args, kwargs)",
            ExitCode.CANNOT_OPEN,
        )
    if isinstance(model, nn.Module):
        model = model.eval()
        if settings.dtype != "auto":
            dtype = getattr(torch, settings.dtype)
            model = model.to(dtype)
            args = tuple(_cast(value, dtype) for value in args)
            kwargs = {key: _cast(value, dtype) for key, value in kwargs.items()}
        state = (*model.parameters(), *model.buffers())
    else:
        only_modules("--dtype", settings.dtype != "auto", name)
        state = tuple(v for v in model.state_dict.values() if isinstance(v, Tensor))
    opened = Opened(name, kind, model, tuple(args), dict(kwargs))
    opened.weight_bytes = sum(t.numel() * t.element_size() for t in state)
    opened.real = bool(args or kwargs) and kind == "factory"
    if settings.dynamic and isinstance(model, nn.Module) and (args or kwargs):
        opened.dynamic_shapes = _batch_open(model, tuple(args), dict(kwargs))
    if isinstance(model, nn.Module) and not (args or kwargs) and settings.inputs is None:
        _make_inputs(opened, model, settings)
    return opened


def _batch_open(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The first axis of each input is left open, and the second where it holds whole numbers
    (tokens); what the model fixes stays fixed."""

    def axes(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        count = 1 if value.is_floating_point() else 2
        return dict.fromkeys(range(min(count, value.dim())), torch.export.Dim.AUTO)

    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    if any(not isinstance(value, Tensor) for value in bound.arguments.values()):
        return None  # structures: their axes are for a factory's own program to open
    return {name: axes(value) for name, value in bound.arguments.items()}


def _make_inputs(opened: Opened, model: nn.Module, settings: Settings) -> None:
    """Inputs for a model of transformers; others must bring theirs."""
    from bda_fx.cli.example_inputs import made_inputs, open_axes

    if hasattr(model, "config") and hasattr(model, "main_input_name"):
        opened.kwargs = dict(made_inputs(model, settings))
        opened.dynamic_shapes = open_axes(opened.kwargs) if settings.dynamic else None
        return
    raise CliError(
        f"{opened.name} comes without inputs",
        "let the factory return (model, args) or (model, args, kwargs), or pass "
        "--inputs FILE.safetensors",
        ExitCode.USAGE,
    )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(dtype) if floating else value


def only_modules(option: str, given: bool, name: str) -> None:
    if given:
        raise CliError(
            f"{option} does not apply to {name}",
            f"leave it out; {option} is for models that are loaded from weights",
            ExitCode.USAGE,
        )
