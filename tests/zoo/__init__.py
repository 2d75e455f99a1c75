"""The zoo: tiny random models of every architecture whose attention the compiler should resolve.

Each entry states its expected sites as data, written from the architecture's mathematics: D
features of E inputs for each product, and why a product is left out. Sizes differ from each other
(batch 3, 7 tokens, 5 decoder tokens, width 32 or 64) so that no dimension is taken for another.
"""

from __future__ import annotations

from tests.zoo import audio, diffusers_models, latent, text, timm_models, torch_modules, vision
from tests.zoo.entry import Case, Entry, Example, Expected
from tests.zoo.entry import make as make_entry

ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for module in (text, latent, vision, audio, torch_modules, timm_models, diffusers_models)
    for entry in module.ENTRIES
}

CASES: tuple[Case, ...] = tuple(
    Case(entry.name, attention) for entry in ENTRIES.values() for attention in entry.attentions
)
"""Every architecture in every way to spell its attention that it has."""


def make(case: Case) -> Example:
    """The tiny model of ``case``; the same weights and inputs at every call."""
    return make_entry(ENTRIES[case.architecture], case.attention)


def expected(case: Case) -> Expected:
    return ENTRIES[case.architecture].expected
