"""The trained MLA language model: the same bits at each training, kept in a cache, real sites."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bda_fx
from benchmarks import mla_lm, perplexity
from benchmarks.likelihood import blocks_of
from benchmarks.mla_lm import QUICK, Recipe, Trained, corpus_of, encode, key, train

pytest.importorskip("transformers")
pytest.importorskip("tokenizers")


@pytest.fixture(scope="module")
def trained() -> Trained:
    return train(QUICK, corpus_of(QUICK))


def same_weights(mine: torch.nn.Module, other: torch.nn.Module) -> bool:
    state, theirs = mine.state_dict(), other.state_dict()
    return state.keys() == theirs.keys() and all(torch.equal(state[k], theirs[k]) for k in state)


def test_training_is_deterministic(trained: Trained) -> None:
    """Whatever the threads and the global generator are at."""
    torch.manual_seed(1234)
    threads = torch.get_num_threads()
    torch.set_num_threads(3 - min(threads, 2))
    try:
        drawn = torch.get_rng_state()
        again = train(QUICK, corpus_of(QUICK))
        assert torch.equal(torch.get_rng_state(), drawn)
    finally:
        torch.set_num_threads(threads)
    assert again.tokenizer.get_vocab() == trained.tokenizer.get_vocab()
    assert same_weights(again.model, trained.model)


def test_training_learns(trained: Trained) -> None:
    """Better on text that it has not seen than word frequencies, by more than chance could be."""
    record = trained.record
    assert record["held_out_perplexity"] < 0.7 * record["unigram_perplexity"]
    assert record["unigram_perplexity"] < QUICK.vocabulary


def test_text_is_held_out_by_package() -> None:
    corpus = corpus_of(Recipe())
    shared = {text for text in corpus.train if text} & {text for text in corpus.held_out if text}
    assert not shared
    sizes = [sum(map(len, texts)) for texts in (corpus.train, corpus.held_out)]
    assert 0.02 < sizes[1] / sum(sizes) < 0.2


def test_tokenizer_loses_nothing(trained: Trained) -> None:
    text = "class λ:\n\t'''Naïve  — 数'''  \r\n"
    (*ids, end) = encode(trained.tokenizer, (text,)).tolist()
    assert trained.tokenizer.decode(ids) == text
    assert end == trained.tokenizer.eos_token_id


def test_cache(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained once, loaded after that: the same model, tokenizer, text and record."""
    trainings = []

    def once(recipe: Recipe, corpus: mla_lm.Corpus) -> Trained:
        trainings.append(recipe)
        return trained

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(mla_lm, "train", once)
    for _ in range(2):
        model, tokenizer, held_out = mla_lm.load_or_train(quick=True)
        assert trainings == [QUICK]
        assert not model.training
        assert same_weights(model, trained.model)
        assert torch.equal(held_out, encode(trained.tokenizer, corpus_of(QUICK).held_out))
        assert tokenizer.get_vocab() == trained.tokenizer.get_vocab()
    assert mla_lm.training_record(quick=True) == trained.record
    (directory,) = (tmp_path / "bda_fx").iterdir()
    assert directory.name == f"mla-lm-{key(QUICK, corpus_of(QUICK))}"


def test_failed_training_leaves_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Trained:
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(mla_lm, "train", fails)
    with pytest.raises(KeyboardInterrupt):
        mla_lm.load_or_train(quick=True)
    assert not list(tmp_path.rglob("mla-lm-*"))


def test_key_covers_recipe_and_text() -> None:
    corpus = mla_lm.Corpus(("ab", "c"), ("d",))
    keys = {
        key(QUICK, corpus),
        key(Recipe(), corpus),
        key(QUICK, mla_lm.Corpus(("a", "bc"), ("d",))),
        key(QUICK, mla_lm.Corpus(("ab", "c"), ("e",))),
    }
    assert len(keys) == 4
    assert key(QUICK, corpus) in keys


def test_short_text_is_refused(trained: Trained) -> None:
    with pytest.raises(ValueError, match="150 steps of 8 windows take 1200, the text has 3"):
        mla_lm.fit(trained.model, QUICK, torch.zeros(200, dtype=torch.long))


def test_perplexity_of_rewrites(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    """All K and V are rewritten; a pivoted basis keeps the perplexity where first rows do not."""
    monkeypatch.setattr(perplexity, "DTYPES", (torch.float32,))
    held_out = encode(trained.tokenizer, corpus_of(QUICK).held_out)
    subject = perplexity.Subject("quick", trained.model, blocks_of(held_out, 8, 32), 4)
    rows = {row.rewrite: row for row in perplexity.measure(subject)}
    assert list(rows) == ["original", "in float64", *perplexity.REWRITES]
    assert rows["original"].change == perplexity.Change(0.0, 0.0, 0.0)
    assert (rows["original"].noise, rows["in float64"].noise) == (1.0, 0.0)
    full = [row for name, row in rows.items() if name.endswith(", D")]
    assert all(row.sites == row.products == 2 * QUICK.layers for row in full)
    assert all(row.saved == pytest.approx(0.25, abs=0.01) for row in full)
    assert rows["pivot, D"].within_limit
    assert rows["pivot, D"].noise < rows["first, D"].noise
    assert rows["default"].within_limit


def test_sites_have_the_shape_of_v2_lite(trained: Trained) -> None:
    """K without its rotated features and V, each of D features from a latent of 4 D."""
    ids = torch.zeros(1, 8, dtype=torch.long)
    report = bda_fx.analyze(trained.model, (), {"input_ids": ids}, options={"basis_size": "full"})
    found = sorted((s.product, s.kv_heads, s.decomposed, s.in_features) for s in report.rewritten)
    heads, d = QUICK.heads, QUICK.head_dim
    assert found == sorted(
        QUICK.layers * [("qk", heads, d, 4 * d), ("vo", heads, d, 4 * d)],
    )
