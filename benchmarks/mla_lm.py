"""Train a small language model with multi-head latent attention, or load it from the cache.

    python benchmarks/mla_lm.py [--quick]

No public MLA checkpoint installs without a hub, and random weights tell nothing of how trained
ones are conditioned. So this trains a DeepSeek-V2 in small: K and V of all heads from a latent of
E = kv_lora_rank = 4 D features as in DeepSeek-V2-Lite, decoupled RoPE, dense MLPs. Its text is what
every system has: Python's standard library and the common licences. Whole packages are held out,
so that no sibling of a held-out file is trained on.

Training runs on one thread, and from one seed, so the weights are the same at each run on a machine
(another processor or version of torch sums in another order). They are not committed: they lie in
the user's cache directory under a hash of all that made them. Some five minutes; ``--quick``, a
model that shows that it runs, some seconds.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import math
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.likelihood import blocks_of, log_likelihoods, perplexity  # noqa: E402

LICENSES = Path("/usr/share/common-licenses")
NOT_TEXT = {"site-packages", "test", "tests", "idle_test", "encodings", "__pycache__"}
"""Directories of the standard library that are not its own, test data or tables."""
HELD_OUT_SHARE = 12
"""One package of that many is held out."""
END = "<|endoftext|>"


@dataclass(frozen=True)
class Recipe:
    """All that is chosen about the model and its training; D = head_dim, E = 4 D."""

    hidden_size: int = 192
    layers: int = 4
    heads: int = 6
    head_dim: int = 32
    rope_dim: int = 16
    intermediate_size: int = 384
    initializer_range: float = 0.04
    vocabulary: int = 1024
    context: int = 256
    batch_size: int = 8
    steps: int = 750
    warmup: int = 50
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    gradient_norm: float = 1.0
    seed: int = 0
    every: int = 1
    """One file of that many is taken, to train on and to measure on."""
    measured_blocks: int = 128
    """Held-out blocks of one context whose perplexity is recorded."""


FULL = Recipe()
QUICK = Recipe(
    hidden_size=64, layers=2, heads=2, head_dim=16, rope_dim=8, intermediate_size=128,
    vocabulary=384, context=64, steps=150, warmup=10, learning_rate=1e-2,
    every=20, measured_blocks=32,
)  # fmt: skip


@dataclass(frozen=True)
class Corpus:
    """Documents to train on and documents to measure on."""

    train: tuple[str, ...]
    held_out: tuple[str, ...]


@dataclass(frozen=True)
class Trained:
    """A model in eval mode, its tokenizer, and what came of the training."""

    model: nn.Module
    tokenizer: Any
    record: dict[str, Any]


def load_or_train(quick: bool = False) -> tuple[nn.Module, Any, Tensor]:
    """The model (float32, eval), its tokenizer, and the token ids of the held-out text [N]."""
    trained = cached(QUICK if quick else FULL)
    ids = encode(trained.tokenizer, corpus_of(QUICK if quick else FULL).held_out)
    return trained.model, trained.tokenizer, ids


def training_record(quick: bool = False) -> dict[str, Any]:
    """Recipe, losses, held-out perplexity and that of unigrams, and the time it took."""
    return cached(QUICK if quick else FULL).record


def cached(recipe: Recipe) -> Trained:
    """What ``recipe`` trains, from the cache directory if it is there, else trained and kept."""
    from transformers import DeepseekV2ForCausalLM, PreTrainedTokenizerFast

    corpus = corpus_of(recipe)
    directory = cache_directory() / f"mla-lm-{key(recipe, corpus)}"
    if not directory.exists():
        trained = train(recipe, corpus)
        directory.parent.mkdir(parents=True, exist_ok=True)
        # Whole or not at all: what is under the final name is complete, whoever else trains too.
        with tempfile.TemporaryDirectory(dir=directory.parent) as unfinished:
            place = Path(unfinished) / "model"
            trained.model.save_pretrained(place)  # type: ignore[operator]
            trained.tokenizer.save_pretrained(place)
            (place / "training.json").write_text(json.dumps(trained.record, indent=1) + "\n")
            if not directory.exists():
                place.rename(directory)
    model = DeepseekV2ForCausalLM.from_pretrained(
        directory, local_files_only=True, dtype=torch.float32
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    record = json.loads((directory / "training.json").read_text())
    return Trained(model.eval(), tokenizer, record)


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/bda_fx, by default ~/.cache/bda_fx."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bda_fx"


def key(recipe: Recipe, corpus: Corpus) -> str:
    """Hash of the recipe, this script (but its comments and layout), its packages and the text."""
    made_of = [
        repr(recipe),
        ast.dump(ast.parse(Path(__file__).read_text())),
        *(f"{package} {version(package)}" for package in ("torch", "transformers", "tokenizers")),
        *corpus.train,
        *corpus.held_out,
    ]
    digests = b"".join(hashlib.sha256(part.encode()).digest() for part in made_of)
    return hashlib.sha256(digests).hexdigest()[:16]


@cache
def corpus_of(recipe: Recipe) -> Corpus:
    """The standard library's sources and the licences, as much of them as the recipe takes."""
    library = Path(sysconfig.get_path("stdlib"))
    split: dict[bool, list[str]] = {True: [], False: []}
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        # _sysconfigdata holds the settings of one build.
        if NOT_TEXT.isdisjoint(inside.parts) and not inside.name.startswith("_sysconfigdata"):
            text = path.read_text(encoding="utf-8", errors="replace")
            split[is_held_out(inside.parts[0].removesuffix(".py"))].append(text)
    # Licences quote one another at length, so they are all on one side.
    licenses = [p for p in sorted(LICENSES.glob("*")) if p.is_file() and not p.is_symlink()]
    train = [path.read_text(encoding="utf-8", errors="replace") for path in licenses] + split[False]
    return Corpus(tuple(train[:: recipe.every]), tuple(split[True][:: recipe.every]))


def is_held_out(package: str) -> bool:
    """A choice that depends on the name of a package alone."""
    return int(hashlib.sha256(package.encode()).hexdigest(), 16) % HELD_OUT_SHARE == 0


def train(recipe: Recipe, corpus: Corpus) -> Trained:
    """Tokenizer and model from nothing; the same recipe, text and machine give the same bits."""
    started = time.process_time()
    tokenizer = train_tokenizer(recipe, corpus)
    ids = encode(tokenizer, corpus.train)
    with one_thread(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = build(recipe, tokenizer)
        losses = fit(model, recipe, ids)
        model.eval()
        held_out = encode(tokenizer, corpus.held_out)
        blocks = blocks_of(held_out, recipe.measured_blocks, recipe.context)
        measured = log_likelihoods(lambda b: model(input_ids=b).logits, blocks, recipe.batch_size)
    record = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": len(ids),
        "tokens_seen": recipe.steps * recipe.batch_size * recipe.context,
        "held_out_tokens": len(held_out),
        "loss_first": losses[0],
        "loss_last": sum(losses[-20:]) / len(losses[-20:]),
        "held_out_perplexity": perplexity(measured),
        "unigram_perplexity": unigram_perplexity(ids, blocks[:, 1:], len(tokenizer)),
        "cpu_s": time.process_time() - started,
    }
    return Trained(model, tokenizer, record)


def train_tokenizer(recipe: Recipe, corpus: Corpus) -> Any:
    """Byte-level BPE: no text is out of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=recipe.vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus.train, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END)


def encode(tokenizer: Any, texts: tuple[str, ...]) -> Tensor:
    """All of ``texts`` as one row of ids, each with the end token after it."""
    rows = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return torch.tensor([i for row in rows for i in (*row, tokenizer.eos_token_id)])


def build(recipe: Recipe, tokenizer: Any) -> nn.Module:
    """The model, its weights drawn from the global generator."""
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    config = DeepseekV2Config(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        first_k_dense_replace=recipe.layers,  # no experts
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        q_lora_rank=None,
        kv_lora_rank=4 * recipe.head_dim,
        qk_nope_head_dim=recipe.head_dim,
        qk_rope_head_dim=recipe.rope_dim,
        v_head_dim=recipe.head_dim,
        intermediate_size=recipe.intermediate_size,
        initializer_range=recipe.initializer_range,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    return DeepseekV2ForCausalLM(config)


def fit(model: nn.Module, recipe: Recipe, ids: Tensor) -> list[float]:
    """AdamW with warm-up and a cosine to zero, over windows of the text, none of them twice.

    Returns the loss of each step.

    Raises:
        ValueError: the text is too short for that.
    """
    windows = ids[: len(ids) // recipe.context * recipe.context].view(-1, recipe.context)
    wanted = recipe.steps * recipe.batch_size
    if len(windows) < wanted:
        raise ValueError(
            f"{recipe.steps} steps of {recipe.batch_size} windows take {wanted}, "
            f"the text has {len(windows)}: take fewer steps or more text"
        )
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        weight_decay=recipe.weight_decay,
        fused=True,
    )

    def rate(step: int) -> float:
        warm = (step + 1) / recipe.warmup
        return min(warm, 0.5 + 0.5 * math.cos(math.pi * step / recipe.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    losses = []
    for batch in windows[torch.randperm(len(windows))[:wanted]].split(recipe.batch_size):
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_norm)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums are split among threads, so that their rounding depends on how many there are."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def unigram_perplexity(train: Tensor, held_out: Tensor, vocabulary: int) -> float:
    """Perplexity of ``held_out`` by the frequencies of ``train`` (add one): what order is worth."""
    counts = train.bincount(minlength=vocabulary).double() + 1
    return perplexity((counts / counts.sum()).log()[held_out])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a tiny model in seconds")
    record = training_record(parser.parse_args().quick)
    print(
        f"{record['parameters']:,} parameters, {record['tokens_seen']:,} tokens seen of "
        f"{record['train_tokens']:,}, {record['cpu_s']:.0f} s of CPU; "
        f"loss {record['loss_first']:.3f} → {record['loss_last']:.3f}; held-out perplexity "
        f"{record['held_out_perplexity']:.2f} (unigram {record['unigram_perplexity']:.2f})"
    )


if __name__ == "__main__":
    main()
