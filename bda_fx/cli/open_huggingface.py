"""Open a Hugging Face directory: local files, safetensors, no code but that of transformers."""

from __future__ import annotations

import inspect
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bda_fx.cli.errors import CliError, ExitCode, first_line
from bda_fx.cli.example_inputs import (
    TEXTS,
    made_inputs,
    most_tokens,
    open_axes,
    text_inputs,
)
from bda_fx.cli.open_model import Opened, Settings
from bda_fx.cli.plain_caches import return_plain_caches

# Tasks as the hub names them, and the class of transformers that loads a model for one.
TASKS = {
    "audio-classification": "AutoModelForAudioClassification",
    "automatic-speech-recognition": "AutoModelForSpeechSeq2Seq",
    "ctc": "AutoModelForCTC",
    "depth-estimation": "AutoModelForDepthEstimation",
    "feature-extraction": "AutoModel",
    "fill-mask": "AutoModelForMaskedLM",
    "image-classification": "AutoModelForImageClassification",
    "image-segmentation": "AutoModelForImageSegmentation",
    "image-text-to-text": "AutoModelForImageTextToText",
    "mask-generation": "AutoModelForMaskGeneration",
    "multiple-choice": "AutoModelForMultipleChoice",
    "object-detection": "AutoModelForObjectDetection",
    "question-answering": "AutoModelForQuestionAnswering",
    "semantic-segmentation": "AutoModelForSemanticSegmentation",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
    "text2text-generation": "AutoModelForSeq2SeqLM",
    "token-classification": "AutoModelForTokenClassification",
    "zero-shot-image-classification": "AutoModelForZeroShotImageClassification",
    "zero-shot-object-detection": "AutoModelForZeroShotObjectDetection",
}

_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}
LONGEST = 512
"""Tokens that example texts are cut to."""
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2}


def open_huggingface(path: Path, settings: Settings) -> Opened:
    """The model of a directory, or of a ``config.json`` without weights (on the meta device).

    Raises:
        CliError: a damaged or missing file, an architecture or a task that transformers does not
            know, a model that asks for code of its own, weights that are pickled objects.
    """
    if settings.task is not None and settings.task not in TASKS:
        raise CliError(
            f"unknown task {settings.task!r}", f"the tasks are {', '.join(TASKS)}", ExitCode.USAGE
        )
    directory = path.parent if path.is_file() else path
    _read_config(directory / "config.json")
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: nothing is fetched
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    config = _load_config(transformers, directory)
    if settings.kv_cache == "none":
        for part in (config, config.get_text_config()):
            part.use_cache = False
    loader = _loader(transformers, config, settings.task, directory)
    meta = settings.config_only or path.is_file()
    opened = Opened(str(path), "huggingface", nn.Module())
    if meta:
        opened.model = _on_meta(loader, config, settings)
    else:
        opened.model = _load(loader, config, directory, settings, opened)
    opened.model.eval()
    if settings.kv_cache != "none":
        return_plain_caches(opened.model)
    _give_inputs(transformers, opened, directory, settings, meta)
    return opened


def _read_config(path: Path) -> None:
    """Look into a config before transformers does: is it one, and can it do without own code?"""
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CliError(
            f"{path} cannot be read: {first_line(error)}",
            "it is a JSON file that save_pretrained writes",
            ExitCode.CANNOT_OPEN,
        ) from error
    if not isinstance(config, dict):
        raise CliError(
            f"{path} is no config: it is not a JSON object",
            "it is a JSON file that save_pretrained writes",
            ExitCode.CANNOT_OPEN,
        )
    if not config.get("auto_map"):
        return
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if config.get("model_type") not in CONFIG_MAPPING_NAMES:
        raise CliError(
            f"{path.parent} asks for code of its own (auto_map in config.json), which is not run",
            "read that code, import it in a module of yours, and pass package.module:factory",
            ExitCode.CANNOT_OPEN,
        )


def _load_config(transformers: Any, directory: Path) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except (ValueError, KeyError, OSError) as error:
        raise CliError(
            f"transformers {transformers.__version__} does not know this architecture: "
            f"{first_line(error)}",
            "update transformers, or pass package.module:factory",
            ExitCode.CANNOT_CONVERT,
        ) from error


def _loader(transformers: Any, config: Any, task: str | None, directory: Path) -> Any:
    """The class that loads the model: that of the task, else the one that saved it."""
    if task is None:
        for name in config.architectures or ():
            found = getattr(transformers, name, None)
            if found is not None:
                return found
        auto = transformers.AutoModel
    else:
        auto = getattr(transformers, TASKS[task])
    if type(config) not in auto._model_mapping:
        known = "" if task is None else f" for the task {task}"
        raise CliError(
            f"{directory}: transformers has no model of type {config.model_type}{known}",
            "choose another --task, or pass package.module:factory",
            ExitCode.CANNOT_CONVERT,
        )
    return auto._model_mapping[type(config)]


def _on_meta(loader: Any, config: Any, settings: Settings) -> nn.Module:
    dtype = config.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    with torch.device("meta"):
        model: nn.Module = loader._from_config(config, dtype=dtype or torch.float32)
    return model


# -- weights ----------------------------------------------------------------------------------


def _load(
    loader: Any, config: Any, directory: Path, settings: Settings, opened: Opened
) -> nn.Module:
    files = sorted(directory.glob("*.safetensors"))
    pickles = sorted(directory.glob("pytorch_model*.bin"))
    if files:
        opened.weight_bytes = sum(_tensor_bytes(file, settings.dtype) for file in files)
    elif pickles:
        opened.weight_bytes = sum(file.stat().st_size for file in pickles)
        opened.notes.append(
            f"{directory} has no safetensors: its .bin files are read with weights_only=True"
        )
    else:
        raise CliError(
            f"{directory} has no weights (*.safetensors)",
            "inspect works on its config.json alone; else download the weights too",
            ExitCode.CANNOT_OPEN,
        )
    settings.check_memory(opened.weight_bytes)
    logging.getLogger("transformers").setLevel(logging.CRITICAL)
    try:
        model, info = loader.from_pretrained(
            str(directory),
            config=config,
            local_files_only=True,
            use_safetensors=bool(files),
            weights_only=not settings.unsafe,
            dtype="auto" if settings.dtype == "auto" else getattr(torch, settings.dtype),
            output_loading_info=True,
        )
    except Exception as error:
        raise _cannot_load(error, directory, bool(files)) from error
    missing = sorted(info["missing_keys"])
    if missing:
        opened.notes.append(
            f"the checkpoint has no weights for {', '.join(missing[:3])}"
            f"{' …' if len(missing) > 3 else ''}: they are random. Is --task right?"
        )
    assert isinstance(model, nn.Module)
    return model


def _tensor_bytes(file: Path, dtype: str) -> int:
    """Bytes of the tensors of a file, as ``dtype``; also checks its header against its size."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as tensors:
            return sum(_stored(tensors.get_slice(key), dtype) for key in tensors.keys())  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CliError(
            f"{file} is damaged: {first_line(error)}",
            "download or save it once more",
            ExitCode.CANNOT_OPEN,
        ) from error


def _stored(part: Any, dtype: str) -> int:
    kind = part.get_dtype()
    floating = kind in ("F64", "F32", "F16", "BF16")
    item = _ITEM_BYTES.get(_DTYPES.get(dtype, kind) if floating else kind, 1)
    return int(torch.Size(part.get_shape()).numel()) * item


def _cannot_load(error: Exception, directory: Path, safe: bool) -> Exception:
    """What to say of a model that does not load; the error itself where it says it best."""
    if isinstance(error, MemoryError | ImportError):
        return error
    chain = [str(e) for e in _chain(error)]
    if not safe and any("weights_only" in text or "Unsupported" in text for text in chain):
        return CliError(
            f"{directory} holds pickled objects beside its weights, which may run code",
            "convert them to safetensors, or pass --unsafe if you trust whoever made them",
            ExitCode.CANNOT_OPEN,
        )
    return CliError(
        f"{directory} does not load: {first_line(error)}",
        "check that config.json belongs to these weights (bda-fx --traceback shows more)",
        ExitCode.CANNOT_OPEN,
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


# -- inputs -----------------------------------------------------------------------------------


def _give_inputs(
    transformers: Any, opened: Opened, directory: Path, settings: Settings, meta: bool
) -> None:
    model = opened.model
    assert isinstance(model, nn.Module)
    encodes = getattr(model, "main_input_name", "input_ids") == "input_ids"
    single = not (
        getattr(model.config, "is_encoder_decoder", False)
        or (hasattr(model.config, "text_config") and hasattr(model.config, "vision_config"))
    )
    tokenizer = None
    if settings.inputs is None and encodes and single and not meta:
        tokenizer = _tokenizer(transformers, directory)
    if settings.texts is not None and tokenizer is None:
        raise CliError(
            f"--calibration needs a tokenizer of text, which {directory} does not have",
            "add its tokenizer files to the directory, or pass tensors with --inputs",
            ExitCode.USAGE,
        )
    if tokenizer is not None:
        names = list(inspect.signature(model.forward).parameters)
        most = most_tokens(model) or LONGEST

        def more(count: int) -> list[Any]:
            texts = (settings.texts or TEXTS)[: count * settings.batch]
            return text_inputs(tokenizer, names, texts, settings.batch, min(most, LONGEST))

        opened.more_inputs, opened.real = more, True
        opened.kwargs = more(1)[0][1]
    elif settings.inputs is None:
        opened.kwargs = dict(made_inputs(model, settings))
        opened.more_inputs = lambda count: [
            ((), dict(made_inputs(model, settings, seed))) for seed in range(count)
        ]
    if settings.dynamic:
        opened.dynamic_shapes = open_axes(opened.kwargs, most_tokens(model))


def _tokenizer(transformers: Any, directory: Path) -> Any | None:
    """The directory's tokenizer; None where it has none, or one that needs code of its own."""
    if not any(directory.glob("*token*")) and not any(directory.glob("vocab.*")):
        return None
    try:
        return transformers.AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception:  # a tokenizer is a convenience: inputs are made up without
        return None
