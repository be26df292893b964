"""Rendezvous hashing: a stable order, an even spread, and little change when a node comes or goes."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from proxy.upstream.fleet.rendezvous import ranked

NAMES = st.lists(st.text("abcdefgh:/.0123456789", min_size=1, max_size=12), min_size=1, max_size=8, unique=True)


def order(key: bytes, names: list[str]) -> list[str]:
    return ranked(key, names, str)


@given(key=st.binary(max_size=100), names=NAMES, seed=st.randoms(use_true_random=False))
def test_the_order_depends_on_the_key_and_the_names_only(key: bytes, names: list[str], seed: object) -> None:
    shuffled = list(names)
    seed.shuffle(shuffled)  # type: ignore[attr-defined]
    assert order(key, names) == order(key, shuffled)
    assert sorted(order(key, names)) == sorted(names)


@given(key=st.binary(max_size=100), names=NAMES, data=st.data())
def test_a_node_that_leaves_takes_its_own_place_only(key: bytes, names: list[str], data: st.DataObject) -> None:
    left = data.draw(st.sampled_from(names))
    before, after = order(key, names), order(key, [name for name in names if name != left])
    assert after == [name for name in before if name != left]


def test_only_the_keys_of_a_node_that_leaves_move_and_they_spread_over_all_others() -> None:
    names = [f"http://10.0.0.{number}:8000" for number in range(5)]
    keys = [str(number).encode() for number in range(2000)]
    before = {key: order(key, names)[0] for key in keys}
    after = {key: order(key, names[1:])[0] for key in keys}
    assert {key for key in keys if before[key] != after[key]} == {key for key in keys if before[key] == names[0]}
    shares = Counter(before.values())
    assert set(shares) == set(names)
    assert all(320 <= share <= 480 for share in shares.values())  # 400 expected, with a deviation of 18
    moved = Counter(after[key] for key in keys if before[key] == names[0])
    assert set(moved) == set(names[1:])
