"""A grammar of attention modules: what may vary, as plain data, and how hypothesis draws it.

Nothing here knows what is legal; about half of the choices make some product illegal, or a part of
it. Sizes are small and seldom equal by accident.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from hypothesis import strategies as st

SPELLINGS = ("linear", "matmul", "einsum", "addmm", "conv", "left", "heads")
KEY_CHANGES = (
    "none", "scale", "scale_heads", "scale_tokens", "scale_features", "scale_halves", "relu",
    "roll_tokens", "add_shifted", "add_constant", "add_linear", "add_input", "zero_feature",
    "round_trip", "in_place", "norm", "mask_tokens", "mask_expanded", "mask_features",
    "mask_in_place", "choose_shifted", "fill_ones", "zero_token", "zero_part", "lerp_shifted",
    "lerp_features", "running_sum", "running_features", "centre", "centre_features", "pool",
    "half_mean", "half_negated", "half_difference",
)  # fmt: skip
CHOICES: dict[str, tuple[Any, ...]] = {
    "heads": (2, 3, 4),
    "groups": (1, 2, 0),  # 0: as many as heads
    "head_dim": (3, 4, 6),
    "width": (8, 11, 14),
    "layers": (1, 1, 1, 2),
    "fused": ("no", "no", "chunk", "interleaved", "kv"),
    "spell_q": SPELLINGS,
    "spell_k": SPELLINGS,
    "spell_v": SPELLINGS,
    "spell_o": SPELLINGS,
    "bias": ("none", "fused", "separate"),
    "low_rank": (False, False, False, True),
    "layout": ("transpose", "permute", "movedim", "flat", "stack"),
    "repeat": ("interleave", "expand", "repeat", "gqa"),
    "rotary": ("none", "none", "none", "half", "pairs", "first", "last"),
    "change_q": KEY_CHANGES,
    "change_k": KEY_CHANGES,
    "change_v": KEY_CHANGES,
    "permuted": ("none", "none", "q", "k", "both", "heads"),
    "scores": ("sdpa", "sdpa", "matmul", "bmm", "baddbmm", "einsum", "linear"),
    "weights": ("softmax", "sigmoid", "softcap", "talking", "alibi", "mask"),
    "change_out": (
        "none", "none", "gate_heads", "gate_features", "gelu", "flip", "swap_heads", "mask_tokens",
        "mask_features", "running_sum", "centre", "half_mean",
    ),
    "outputs": ("one", "one", "two", "half_heads", "half_features"),
    "extra": ("none", "none", "none", "k", "v", "out", "weights", "v_sum", "residual"),
    "shared": ("no", "no", "no", "kq", "kv", "other"),
    "second_query": (False, False, False, True),
    "cross": (False, False, True),
    "cached": (False, False, False, False, True),
}  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """One module of the grammar; the meaning of each name is in ``render``."""

    heads: int = 2
    groups: int = 0
    head_dim: int = 4
    width: int = 11
    layers: int = 1
    fused: str = "no"
    spell_q: str = "linear"
    spell_k: str = "linear"
    spell_v: str = "linear"
    spell_o: str = "linear"
    bias: str = "none"
    low_rank: bool = False
    layout: str = "transpose"
    repeat: str = "interleave"
    rotary: str = "none"
    change_q: str = "none"
    change_k: str = "none"
    change_v: str = "none"
    permuted: str = "none"
    scores: str = "sdpa"
    weights: str = "softmax"
    change_out: str = "none"
    outputs: str = "one"
    extra: str = "none"
    shared: str = "no"
    second_query: bool = False
    cross: bool = False
    cached: bool = False

    @property
    def kv_heads(self) -> int:
        """Key and value heads: a divisor of the query heads."""
        return self.groups if self.groups and self.heads % self.groups == 0 else self.heads

    @property
    def unusual(self) -> dict[str, Any]:
        """What differs from the plainest module."""
        plain = asdict(Spec())
        return {name: v for name, v in asdict(self).items() if v != plain[name]}

    def sensible(self) -> Spec:
        """The nearest spec whose choices go together."""
        values = asdict(self)
        if self.cross or self.shared in ("kq", "kv"):
            values["fused"] = "kv" if self.cross and self.fused != "no" else "no"
        if self.shared in ("kq", "kv"):
            values["groups"] = 0
            values["fused"] = "no"
            values["low_rank"] = values["low_rank"] and self.shared != "kq"
            values["cross"] = self.cross and self.shared != "kq"
        if values["fused"] != "no":
            values["low_rank"] = False
        if values["layers"] > 1:
            values.update(cross=False, cached=False)
        if values["scores"] in ("sdpa", "linear"):
            values["weights"] = "softmax"
            if values["extra"] == "weights":
                values["extra"] = "none"
        if values["scores"] == "linear":
            values["second_query"] = False
        if values["second_query"] and values["scores"] == "sdpa":
            values["scores"] = "matmul"
        if values["repeat"] == "gqa" and values["scores"] != "sdpa":
            values["repeat"] = "interleave"
        return Spec(**values)


def specs() -> st.SearchStrategy[Spec]:
    """Specs in which 50 to 90 % of the choices are the plain ones.

    A module in which everything is unusual is hardly ever legal, and says little.
    """
    plain = asdict(Spec())

    def spec(unusual: int) -> st.SearchStrategy[Spec]:
        def choose(name: str) -> st.SearchStrategy[Any]:
            some = st.sampled_from(CHOICES[name])
            if name in ("heads", "groups", "head_dim", "width", "layout"):
                return some
            always = st.just(plain[name])
            return st.integers(0, 99).flatmap(lambda n: some if n >= 100 - unusual else always)

        drawn = {f.name: choose(f.name) for f in fields(Spec)}
        return st.builds(Spec, **drawn).map(Spec.sensible)

    return st.sampled_from((10, 25, 50)).flatmap(spec)
