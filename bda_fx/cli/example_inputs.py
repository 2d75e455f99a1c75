"""Example inputs: text through a model's own tokenizer, a file of tensors, or made from a config.

Which inputs a model takes is read off the signature of its ``forward``; each has one meaning in all
of transformers, and so one maker here. What has none must be given (``--inputs``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bda_fx.cli.errors import CliError, ExitCode, first_line

if TYPE_CHECKING:
    from bda_fx.cli.open_model import Opened, Settings
    from bda_fx.generate_inputs import Inputs

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Attention mixes the values of a sequence, weighted by how well its queries and keys match.",
    "Where is the nearest station?",
    "In 1905 a clerk in the patent office of Bern published four papers that changed physics.",
    "She closed the book, put it back on the shelf and went out into the rain without a coat.",
    "def mean(values): return sum(values) / len(values)",
    "Permission is granted to copy and distribute verbatim copies of this document.",
    "Rain fell on the harbour all night; by morning the boats were full, and nobody had slept, "
    "but the lamps along the pier still burned as they had the evening before.",
)
"""What is tokenized where no text is given: lengths differ, so that padding plays its part."""


def text_inputs(
    tokenizer: Any, names: Sequence[str], texts: Sequence[str], batch: int, limit: int
) -> list[Inputs]:
    """``texts`` in batches of ``batch``, each padded to its longest, cut to ``limit`` tokens.

    ``names`` are the inputs of the model that may be given.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    batches: list[Inputs] = []
    for at in range(0, len(texts) - len(texts) % batch or len(texts), batch):
        made = tokenizer(
            list(texts[at : at + batch]),
            padding=tokenizer.pad_token is not None,
            truncation=True,
            max_length=limit,
            return_tensors="pt",
        )
        wanted = ("input_ids", "attention_mask", "token_type_ids")
        batches.append(((), {k: made[k] for k in wanted if k in made and k in names}))
    return batches


def made_inputs(model: nn.Module, settings: Settings, seed: int = 0) -> dict[str, Tensor]:
    """Keyword inputs for a model of transformers, from its signature and its config.

    Raises:
        CliError: it needs an input that cannot be made.
    """
    random = torch.Generator().manual_seed(seed)
    parameters = inspect.signature(model.forward).parameters
    config: Any = model.config
    main = getattr(model, "main_input_name", "input_ids")
    names = [main]
    pair = hasattr(config, "text_config") and hasattr(config, "vision_config")
    names += ["pixel_values", "input_ids"] if pair else []
    names += ["decoder_input_ids"] if getattr(config, "is_encoder_decoder", False) else []
    names += ["attention_mask"] if "input_ids" in names else []
    inputs = {}
    for name, parameter in parameters.items():
        optional = parameter.default is not parameter.empty or parameter.kind in _CATCH_ALL
        if name not in names and optional:
            continue
        if name not in _MAKERS:
            raise CliError(
                f"no example can be made up for the input {name!r} of {type(model).__name__}",
                "pass one with --inputs FILE.safetensors, or a factory package.module:function "
                "that returns (model, args, kwargs)",
                ExitCode.CANNOT_CONVERT,
            )
        inputs[name] = _MAKERS[name](config, settings, random)
    for name, value in inputs.items():
        if value.is_floating_point():
            inputs[name] = value.to(dtype=next(model.parameters()).dtype)
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()}


def _tokens(config: Any, settings: Settings, random: torch.Generator) -> Tensor:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    length = settings.length
    if isinstance(most, int) and most > 0:  # -1 stands for any length
        length = min(length, most)
    shape = (settings.batch, length)
    return torch.randint(text.vocab_size, shape, generator=random)


def _mask(config: Any, settings: Settings, random: torch.Generator) -> Tensor:
    return torch.ones_like(_tokens(config, settings, random))


def _pixels(config: Any, settings: Settings, random: torch.Generator) -> Tensor:
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", 224)
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(vision, "num_channels", 3)
    frames = getattr(vision, "num_frames", None)  # of a film
    batch = (settings.batch,) if frames is None else (settings.batch, frames)
    return torch.randn(*batch, channels, height, width, generator=random)


def _frames(config: Any, settings: Settings, random: torch.Generator) -> Tensor:
    """Features of sound. Which axis holds time, and whether it may have any length, is told by what
    the config calls the others."""
    audio = getattr(config, "audio_config", config)
    bins = getattr(audio, "num_mel_bins", getattr(audio, "feature_size", 80))
    each = getattr(audio, "feature_projection_input_dim", None)
    each = getattr(audio, "input_feat_per_channel", each)
    if each is not None:  # [batch, time, features]
        shape: tuple[int, ...] = (settings.length, each * getattr(audio, "input_channels", 1))
    elif hasattr(audio, "spec_size"):  # as a picture: [batch, 1, time, mel], filled to a square
        shape = (1, audio.spec_size * (audio.spec_size // bins), bins)
    else:  # log-mel of a fixed time, two frames to a position: [batch, mel, time]
        shape = (bins, 2 * getattr(audio, "max_source_positions", 50))
    return torch.randn(settings.batch, *shape, generator=random)


def _samples(config: Any, settings: Settings, random: torch.Generator) -> Tensor:
    """A waveform of half a second at 16 kHz, or the spectrogram that AST calls by the same name."""
    if hasattr(config, "num_mel_bins") and hasattr(config, "max_length"):
        shape: tuple[int, ...] = (settings.batch, config.max_length, config.num_mel_bins)
    else:
        shape = (settings.batch, 8000)
    return torch.randn(shape, generator=random)


_CATCH_ALL = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

_MAKERS: Mapping[str, Callable[[Any, Any, torch.Generator], Tensor]] = {
    "input_ids": _tokens,
    "decoder_input_ids": _tokens,
    "attention_mask": _mask,
    "pixel_values": _pixels,
    "input_features": _frames,
    "input_values": _samples,
}

_AXES: Mapping[str, tuple[str, ...]] = {
    "pixel_values": ("batch",),
    "input_features": ("batch",),
    "input_values": ("batch", "samples"),
    "decoder_input_ids": ("batch", "decoder_length"),
}
"""Open axes of an input, by name; ("batch", "length") of all others. Pictures and spectrograms have
one size."""


def open_axes(kwargs: Mapping[str, Any], most_tokens: int | None = None) -> dict[str, Any]:
    """``dynamic_shapes`` for keyword inputs: every axis that a caller may choose is left open.

    Axes of one name have one size. A text may have up to ``most_tokens``.
    """
    dims = {
        "batch": torch.export.Dim("batch"),
        "samples": torch.export.Dim("samples"),
        "length": torch.export.Dim("length", max=most_tokens),
        "decoder_length": torch.export.Dim("decoder_length", max=most_tokens),
    }
    return {
        name: {
            axis: dims[dim]
            for axis, dim in enumerate(_AXES.get(name, ("batch", "length")))
            if axis < value.dim()
        }
        if isinstance(value, Tensor)
        else None
        for name, value in kwargs.items()
    }


def most_tokens(model: nn.Module) -> int | None:
    """How many tokens a model of transformers was made for; None where its config does not say."""
    config: Any = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 1 else None


def load_inputs(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, by name.

    Raises:
        CliError: the file is missing or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CliError(
            f"--inputs {path} cannot be read: {first_line(error)}",
            "write it with safetensors.torch.save_file({'input_ids': …}, path)",
            ExitCode.CANNOT_OPEN,
        ) from error


def read_inputs(opened: Opened, path: Path, *, dynamic: bool) -> None:
    """Put the tensors of a safetensors file in place of the example: its names are those of
    keyword inputs, or 0, 1, … for positional ones.

    Raises:
        CliError: the file is missing or damaged, or a name is no input of the model.
    """
    tensors = load_inputs(path)
    if isinstance(opened.model, nn.Module):
        known = inspect.signature(opened.model.forward).parameters
        catch_all = any(p.kind is p.VAR_KEYWORD for p in known.values())
        unknown = [n for n in tensors if not n.isdigit() and n not in known and not catch_all]
        if unknown:
            raise CliError(
                f"--inputs {path}: {', '.join(unknown)} is no input of the model",
                f"its inputs are {', '.join(known)}",
                ExitCode.USAGE,
            )
    places = sorted((n for n in tensors if n.isdigit()), key=int)
    opened.args = tuple(tensors[n] for n in places)
    opened.kwargs = {n: t for n, t in tensors.items() if not n.isdigit()}
    opened.more_inputs, opened.real = None, True
    if dynamic and not opened.args:
        opened.dynamic_shapes = open_axes(opened.kwargs)
    else:
        opened.dynamic_shapes = None
