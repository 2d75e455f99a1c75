"""Components by hand: which linear is decomposed, what turns along, and what makes no site."""

from __future__ import annotations

from bda_fx.passes.build_sites import build_sites
from bda_fx.passes.labels import Cause, Product
from bda_fx.passes.resolve_meetings import Block, Component
from bda_fx.passes.sites import (
    BOTH,
    ELEMENT,
    IN,
    KV,
    OUT,
    QK,
    QO,
    VO,
    Constant,
    Linear,
    Reason,
    Site,
)
from bda_fx.passes.track_features import Ports

E = 7


def linear(name: str, features: int, columns: int = E, tokens: int = 5) -> Linear:
    return Linear(f"{name}.weight", f"p_{name}", (name,), (None,), columns, features, tokens)


class Numbers:
    """Feature numbers of tensors, and sites of components made of them."""

    def __init__(self, *linears: Linear) -> None:
        self.ports = Ports({tensor.weight: tensor for tensor in linears})
        self.touched: dict[int, Cause] = {}

    def out(self, name: str, *features: int) -> tuple[int, ...]:
        first = self.ports.of(f"p_{name}", OUT).first
        return tuple(first + f for f in features)

    def columns(self, name: str, *columns: int) -> tuple[int, ...]:
        first = self.ports.of(f"p_{name}", IN).first
        return tuple(first + c for c in columns)

    def constant(self, name: str, numel: int, *elements: int) -> tuple[int, ...]:
        port = self.ports.constant(Constant(name, f"c_{name}", (), "add", numel))
        return tuple(port.first + e for e in elements)

    def sites(self, *components: Component, products: tuple[Product, ...] = ()) -> list[Site]:
        return build_sites(components, self.touched, self.ports, products)

    def reasons(self) -> set[Reason]:
        return {cause.reason for cause in self.touched.values()}


def component(
    near: list[tuple[int, ...]], far: list[tuple[int, ...]], product: str = QK
) -> Component:
    blocks = [Block(features, True) for features in near]
    return Component(product, (*blocks, *(Block(features, False) for features in far)))


def heads_of_keys_and_queries(n: Numbers) -> list[Component]:
    """Two heads of three features, the key's in a turned order."""
    return [
        component([n.out("k", 2, 1, 0)], [n.out("q", 0, 1, 2)]),
        component([n.out("k", 3, 4, 5)], [n.out("q", 3, 4, 5)]),
    ]


def test_components_of_one_kind_are_the_heads_of_one_site() -> None:
    n = Numbers(linear("k", 6), linear("q", 6))
    (site,) = n.sites(*heads_of_keys_and_queries(n))
    assert (site.product, site.side, site.axis) == (QK, KV, OUT)
    assert site.linear.name == "k.weight"
    assert site.features == ((0, 1, 2), (3, 4, 5))
    (partner,) = site.partners
    assert (partner.linear.name, partner.axis, partner.against) == ("q.weight", OUT, True)
    assert partner.features == ((2, 1, 0), (3, 4, 5))
    assert partner.groups == (0, 1)
    assert not n.touched


def test_the_same_product_seen_from_the_other_side() -> None:
    n = Numbers(linear("k", 6), linear("q", 6))
    (site,) = n.sites(*heads_of_keys_and_queries(n))
    other = site.other
    assert other is not None
    assert (other.side, other.linear.name, other.other) == (QO, "q.weight", None)
    assert other.features == ((0, 1, 2), (3, 4, 5))
    (partner,) = other.partners
    assert (partner.linear.name, partner.features) == ("k.weight", ((2, 1, 0), (3, 4, 5)))
    assert (other.num_kv_heads, other.num_heads) == (site.num_kv_heads, site.num_heads) == (2, 2)


def test_grouped_queries_cannot_be_decomposed_themselves() -> None:
    """The query linear has two blocks in each component, but one identity is all there is."""
    n = Numbers(linear("k", 4), linear("q", 8))
    (site,) = n.sites(
        component([n.out("k", 0, 1)], [n.out("q", 0, 1), n.out("q", 2, 3)]),
        component([n.out("k", 2, 3)], [n.out("q", 4, 5), n.out("q", 6, 7)]),
    )
    assert (site.linear.name, site.other) == ("k.weight", None)
    assert site.partners[0].groups == (0, 0, 1, 1)
    assert (site.num_kv_heads, site.num_heads) == (2, 4)


def test_no_linear_has_exactly_one_block_in_each_component() -> None:
    n = Numbers(linear("k", 4), linear("q", 4))
    pairs = [n.out("k", 0, 1), n.out("k", 2, 3)], [n.out("q", 0, 1), n.out("q", 2, 3)]
    assert n.sites(component(*pairs)) == []
    assert n.reasons() == {Reason.MISMATCHED}
    assert set(n.touched) == {f for side in pairs for block in side for f in block}


def test_a_linear_that_misses_a_component_makes_another_kind() -> None:
    """Heads that meet different tensors are sites of their own."""
    n = Numbers(linear("k", 4), linear("q", 2), linear("q2", 2))
    sites = n.sites(
        component([n.out("k", 0, 1)], [n.out("q", 0, 1)]),
        component([n.out("k", 2, 3)], [n.out("q2", 0, 1)]),
    )
    assert [(s.features, s.partners[0].linear.name) for s in sites] == [
        (((0, 1),), "q.weight"),
        (((2, 3),), "q2.weight"),
    ]


def test_heads_of_other_widths_are_sites_of_their_own() -> None:
    n = Numbers(linear("k", 5), linear("q", 5))
    sites = n.sites(
        component([n.out("k", 0, 1)], [n.out("q", 0, 1)]),
        component([n.out("k", 2, 3, 4)], [n.out("q", 2, 3, 4)]),
    )
    assert [s.decomposed for s in sites] == [2, 3]


def test_heads_are_in_the_order_of_the_decomposed_linear_on_either_side() -> None:
    n = Numbers(linear("k", 4), linear("q", 4))
    (site,) = n.sites(
        component([n.out("k", 2, 3)], [n.out("q", 0, 1)]),
        component([n.out("k", 0, 1)], [n.out("q", 2, 3)]),
    )
    assert site.features == ((0, 1), (2, 3))
    assert site.partners[0].features == ((2, 3), (0, 1))
    assert site.other is not None
    assert site.other.features == ((0, 1), (2, 3))
    assert site.other.partners[0].features == ((2, 3), (0, 1))


def test_a_head_of_one_feature_saves_nothing() -> None:
    n = Numbers(linear("k", 1), linear("q", 1))
    assert n.sites(component([n.out("k", 0)], [n.out("q", 0)])) == []
    assert n.reasons() == {Reason.NOTHING_SAVED}
    assert set(n.touched) == {*n.out("k", 0), *n.out("q", 0)}


def test_constants_turn_along_but_are_not_decomposed() -> None:
    n = Numbers(linear("k", 2), linear("q", 2))
    bias, prefix = n.constant("bias", 2, 0, 1), n.constant("prefix", 4, 2, 3)
    (site,) = n.sites(component([n.out("k", 0, 1), prefix], [n.out("q", 0, 1), bias]))
    assert site.linear.name == "k.weight"
    turns = {(p.tensor.name, p.axis): (p.features, p.against) for p in site.partners}
    assert turns == {
        ("prefix", ELEMENT): (((2, 3),), False),
        ("q.weight", OUT): (((0, 1),), True),
        ("bias", ELEMENT): (((0, 1),), True),
    }
    assert [c.name for c in site.constants] == ["prefix", "bias"]


def test_a_side_without_a_linear_leaves_the_other() -> None:
    """Learned keys: the queries that meet them can be decomposed."""
    n = Numbers(linear("q", 2))
    keys = n.constant("keys", 2, 0, 1)
    (site,) = n.sites(component([keys], [n.out("q", 0, 1)]))
    assert (site.side, site.linear.name, site.other) == (QO, "q.weight", None)


def test_no_linear_at_all_makes_no_site() -> None:
    n = Numbers()
    a, b = n.constant("a", 2, 0, 1), n.constant("b", 2, 0, 1)
    assert n.sites(component([a], [b])) == []
    assert n.reasons() == {Reason.MISMATCHED}


def test_the_linear_that_saves_most_is_decomposed() -> None:
    """Of two keys that meet one query, the one through which more tokens pass."""
    n = Numbers(linear("k", 2, tokens=3), linear("p", 2, tokens=9), linear("q", 2))
    (site,) = n.sites(component([n.out("k", 0, 1), n.out("p", 0, 1)], [n.out("q", 0, 1)]))
    assert site.linear.name == "p.weight"
    assert {(p.linear.name, p.against) for p in site.partners} == {
        ("k.weight", False),
        ("q.weight", True),
    }
    assert {t.name for t in site.linears} == {"k.weight", "p.weight", "q.weight"}


def values_and_outputs(n: Numbers, heads: int, width: int = 2) -> list[Component]:
    return [
        component(
            [n.out("v", *range(h * width, (h + 1) * width))],
            [n.columns("o", *range(h * width, (h + 1) * width))],
            VO,
        )
        for h in range(heads)
    ]


def test_an_output_projection_is_decomposed_by_its_columns() -> None:
    n = Numbers(linear("v", 4), linear("o", 6, columns=4))
    (site,) = n.sites(*values_and_outputs(n, 2))
    other = site.other
    assert other is not None
    assert (site.axis, site.basis_features) == (OUT, E)
    assert (other.side, other.axis, other.basis_features) == (QO, IN, 6)
    assert other.features == ((0, 1), (2, 3))


def test_an_output_projection_is_decomposed_as_a_whole_or_not() -> None:
    n = Numbers(linear("v", 4), linear("o", 6, columns=5))
    (site,) = n.sites(*values_and_outputs(n, 2))
    assert site.other is None


def test_contractions_are_those_whose_features_take_part() -> None:
    n = Numbers(linear("k", 4), linear("q", 4))
    products = (
        Product("mine", QK, frozenset(n.out("k", 0, 1)), 0),
        Product("other kind", VO, frozenset(n.out("k", 0, 1)), 0),
        Product("other features", QK, frozenset(n.out("k", 2, 3)), 0),
        Product("around", QK, frozenset(n.out("k", 3) + n.out("q", 3)), 0),
        Product("mine too", QK, frozenset(n.out("k", 1, 2)), 0),
    )
    (site,) = n.sites(component([n.out("k", 0, 1)], [n.out("q", 0, 1)]), products=products)
    assert site.contractions == ("mine", "mine too")
    assert site.other is not None
    assert site.other.contractions == site.contractions


def test_a_projection_that_is_key_and_value_covers_both_products() -> None:
    n = Numbers(linear("k", 2), linear("q", 2), linear("o", 3, columns=2))
    products = (
        Product("scores", QK, frozenset(n.out("k", 0, 1)), 0),
        Product("mix", VO, frozenset(n.out("k", 0, 1)), 0),
    )
    (site,) = n.sites(
        component([n.out("k", 0, 1)], [n.out("q", 0, 1), n.columns("o", 0, 1)], BOTH),
        products=products,
    )
    assert (site.product, site.contractions) == (BOTH, ("mix", "scores"))


def test_a_chain_of_sites_keeps_the_first() -> None:
    """The output linear of one attention is the value linear of the next."""
    n = Numbers(linear("v", 2), linear("between", 2, columns=2), linear("o", 6, columns=2))
    first = component([n.out("v", 0, 1)], [n.columns("between", 0, 1)], VO)
    second = component([n.out("between", 0, 1)], [n.columns("o", 0, 1)], VO)
    for order in ((first, second), (second, first)):
        n.touched.clear()
        (site,) = n.sites(*order)
        assert site.linear.name == "v.weight"
        assert n.touched == dict.fromkeys(n.out("between", 0, 1), Cause(Reason.CHAINED, "between"))
