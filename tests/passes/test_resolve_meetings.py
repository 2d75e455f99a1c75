"""Meetings by hand: which features must change basis together, in which order, or cannot."""

from __future__ import annotations

import pytest

from bda_fx.passes.labels import Cause, Meets
from bda_fx.passes.resolve_meetings import Block, Component, resolve
from bda_fx.passes.sites import BOTH, QK, VO, Reason

LOST = Cause(Reason.RETURNED, "output")


def qk(*pairs: tuple[tuple[int, ...], tuple[int, ...]]) -> Meets:
    """(key, query) pairs that meet in products of queries and keys."""
    return {pair: {QK} for pair in pairs}


def sides(component: Component) -> tuple[set[tuple[int, ...]], set[tuple[int, ...]]]:
    near = {b.features for b in component.blocks if b.near}
    return near, {b.features for b in component.blocks if not b.near}


def ordered(component: Component) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Blocks of each side, numbered so that the first near block is in ascending order."""
    first = min(b.features for b in component.blocks if b.near)
    sort = sorted(range(len(first)), key=first.__getitem__)
    near, far = sides(component)
    return tuple(sorted(tuple(b[i] for i in sort) for b in side) for side in (near, far))  # type: ignore[return-value]


def test_one_key_and_one_query() -> None:
    touched: dict[int, Cause] = {}
    found = resolve(qk(((0, 1, 2), (10, 11, 12))), touched)
    assert found == [Component(QK, (Block((0, 1, 2), True), Block((10, 11, 12), False)))]
    assert found[0].width == 3
    assert touched == {}


def test_heads_are_components_of_their_own() -> None:
    found = resolve(qk(((0, 1), (10, 11)), ((2, 3), (12, 13))), {})
    assert [sides(c) for c in found] == [({(0, 1)}, {(10, 11)}), ({(2, 3)}, {(12, 13)})]


def test_grouped_queries_share_one_change_of_basis() -> None:
    (found,) = resolve(qk(((0, 1), (10, 11)), ((0, 1), (12, 13)), ((0, 1), (14, 15))), {})
    assert sides(found) == ({(0, 1)}, {(10, 11), (12, 13), (14, 15)})


def test_several_keys_for_each_query() -> None:
    """Content and position, all pairs but one: what is tied through others is tied."""
    meets = qk(((0, 1), (10, 11)), ((2, 3), (10, 11)), ((0, 1), (12, 13)))
    (found,) = resolve(meets, {})
    assert sides(found) == ({(0, 1), (2, 3)}, {(10, 11), (12, 13)})


def test_orders_follow_the_meetings() -> None:
    """Key 0 1 2 meets one query reversed and another rolled."""
    meets = qk(((0, 1, 2), (12, 11, 10)), ((1, 2, 0), (20, 21, 22)))
    (found,) = resolve(meets, {})
    assert ordered(found) == ([(0, 1, 2)], [(12, 11, 10), (22, 20, 21)])


def test_the_same_meeting_in_two_products_is_one_component_of_both() -> None:
    meets: Meets = {((0, 1), (10, 11)): {QK}, ((0, 1), (20, 21)): {VO}}
    (found,) = resolve(meets, {})
    assert found.product == BOTH
    assert sides(found) == ({(0, 1)}, {(10, 11), (20, 21)})


def test_a_block_that_is_seen_in_part_is_refined() -> None:
    """One query meets features 0 … 3 of the key, another the first two of them alone."""
    found = resolve(qk(((0, 1, 2, 3), (10, 11, 12, 13)), ((0, 1), (20, 21))), {})
    assert sorted(map(ordered, found)) == [
        ([(0, 1)], [(10, 11), (20, 21)]),
        ([(2, 3)], [(12, 13)]),
    ]


def test_refinement_goes_on_to_the_end_of_the_chain() -> None:
    """The cut of one block cuts all that it is tied to, however far."""
    meets = qk(
        ((0, 1, 2), (10, 11, 12)),
        ((3, 4, 5), (10, 11, 12)),
        ((3, 4, 5), (13, 14, 15)),
        ((6,), (13,)),
    )
    found = resolve(meets, {})
    assert sorted(map(ordered, found)) == [
        ([(0,), (3,), (6,)], [(10,), (13,)]),
        ([(1, 2), (4, 5)], [(11, 12), (14, 15)]),
    ]


def test_overlapping_blocks_are_refined_to_what_they_have_in_common() -> None:
    found = resolve(qk(((0, 1, 2), (10, 11, 12)), ((1, 2, 3), (20, 21, 22))), {})
    assert sorted(map(ordered, found)) == [
        ([(0,)], [(10,)]),
        ([(1, 2)], [(11, 12), (20, 21)]),
        ([(3,)], [(22,)]),
    ]


def test_a_lost_feature_takes_what_it_meets_and_leaves_the_rest() -> None:
    touched = {1: LOST}
    (found,) = resolve(qk(((0, 1, 2), (10, 11, 12))), touched)
    assert sides(found) == ({(0, 2)}, {(10, 12)})
    assert touched == {1: LOST, 11: LOST}


def test_loss_spreads_to_the_end_of_the_chain() -> None:
    touched = {13: LOST}
    meets = qk(((0, 1), (10, 11)), ((2, 3), (10, 11)), ((2, 3), (12, 13)), ((4, 5), (14, 15)))
    found = resolve(meets, touched)
    assert sorted(map(ordered, found)) == [
        ([(0,), (2,)], [(10,), (12,)]),
        ([(4, 5)], [(14, 15)]),
    ]
    assert touched == dict.fromkeys((13, 3, 11, 1), LOST)


def test_a_meeting_of_lost_features_alone_is_no_component() -> None:
    touched = {0: LOST, 11: LOST}
    assert resolve(qk(((0, 1), (10, 11))), touched) == []
    assert set(touched) == {0, 1, 10, 11}


def test_a_block_cannot_meet_itself() -> None:
    touched: dict[int, Cause] = {}
    assert resolve(qk(((0, 1), (0, 1)), ((2, 3), (12, 13))), touched) == resolve(
        qk(((2, 3), (12, 13))), {}
    )
    assert {f: c.reason for f, c in touched.items()} == dict.fromkeys((0, 1), Reason.SHARED_WEIGHT)


def test_a_block_that_meets_a_part_of_itself_takes_its_partners_along() -> None:
    touched: dict[int, Cause] = {}
    assert resolve(qk(((0, 1), (1, 2)), ((2, 0), (10, 11))), touched) == []
    assert {c.reason for c in touched.values()} == {Reason.SHARED_WEIGHT}
    assert set(touched) == {0, 1, 2, 10, 11}


@pytest.mark.parametrize(
    "pair", [((0, 0), (10, 11)), ((0, 1), (10, 10))], ids=["key feature", "query feature"]
)
def test_a_feature_meets_one_feature_in_a_product(
    pair: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    touched: dict[int, Cause] = {}
    assert resolve(qk(pair), touched) == []
    assert {f: c.reason for f, c in touched.items()} == dict.fromkeys(
        {*pair[0], *pair[1]}, Reason.MISMATCHED
    )


def test_two_orders_of_one_pair_are_lost() -> None:
    touched: dict[int, Cause] = {}
    meets = qk(((0, 1), (10, 11)), ((0, 1), (11, 10)), ((2, 3), (12, 13)))
    (found,) = resolve(meets, touched)
    assert sides(found) == ({(2, 3)}, {(12, 13)})
    assert {f: c.reason for f, c in touched.items()} == dict.fromkeys(
        (0, 1, 10, 11), Reason.MISMATCHED
    )


def test_orders_that_disagree_round_a_cycle_are_lost() -> None:
    """Each pair alone is sound; around k₁ q₁ k₂ q₂ the order comes back turned."""
    ring = [((0, 1), (10, 11)), ((2, 3), (10, 11)), ((2, 3), (12, 13))]
    assert len(resolve(qk(*ring, ((0, 1), (12, 13))), {})) == 1
    touched: dict[int, Cause] = {}
    assert resolve(qk(*ring, ((0, 1), (13, 12))), touched) == []
    assert set(touched) == {0, 1, 2, 3, 10, 11, 12, 13}


def test_a_cycle_of_odd_length_has_no_two_sides() -> None:
    """Three blocks that all meet: each would have to turn by S⁻¹ and by Sᵀ."""
    touched: dict[int, Cause] = {}
    meets = qk(((0, 1), (10, 11)), ((10, 11), (20, 21)), ((20, 21), (0, 1)))
    assert resolve(meets, touched) == []
    assert {c.reason for c in touched.values()} == {Reason.MISMATCHED}


def test_the_side_of_most_keys_is_near() -> None:
    """One block is a key in two products and a query in one."""
    meets = qk(((0, 1), (10, 11)), ((0, 1), (12, 13)), ((14, 15), (0, 1)))
    (found,) = resolve(meets, {})
    assert sides(found) == ({(0, 1)}, {(10, 11), (12, 13), (14, 15)})


def test_the_near_side_does_not_depend_on_the_order_of_meetings() -> None:
    pairs = [((14, 15), (0, 1)), ((0, 1), (10, 11)), ((0, 1), (12, 13))]
    for turned in (pairs, pairs[::-1], pairs[1:] + pairs[:1]):
        (found,) = resolve(qk(*turned), {})
        assert sides(found)[0] == {(0, 1)}


def test_meetings_given_are_left_as_they_are() -> None:
    meets = qk(((0, 1, 2), (10, 11, 12)), ((0, 1), (20, 21)))
    before = {pair: set(kinds) for pair, kinds in meets.items()}
    resolve(meets, {0: LOST})
    assert meets == before
