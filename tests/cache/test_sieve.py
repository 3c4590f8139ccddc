"""Values in memory under a budget: the limit, what is spared, and that a scan leaves what is used."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from kalm_rag.cache.sieve import BudgetSieve


class Model:
    """SIEVE as its paper draws it: one list from oldest to newest, and a hand that walks along it."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.items: list[list[Any]] = []
        """Key, value and whether it was used."""
        self.hand = 0
        self.evicted = self.refused = 0

    def get(self, key: int) -> bytes | None:
        for item in self.items:
            if item[0] == key:
                item[2] = True
                return bytes(item[1])
        return None

    def remove(self, place: int) -> None:
        del self.items[place]
        self.hand -= place < self.hand

    def delete(self, key: int) -> bool:
        places = [place for place, item in enumerate(self.items) if item[0] == key]
        for place in places:
            self.remove(place)
        return bool(places)

    def put(self, key: int, value: bytes) -> bool:
        self.delete(key)
        if len(value) > self.limit:
            self.refused += 1
            return False
        while sum(len(item[1]) for item in self.items) + len(value) > self.limit:
            if self.hand == len(self.items):
                self.hand = 0
            item = self.items[self.hand]
            if item[2]:
                item[2] = False
                self.hand += 1
            else:
                self.remove(self.hand)
                self.evicted += 1
        self.items.append([key, value, False])
        return True


keys = st.integers(0, 12)
steps = st.one_of(
    st.tuples(st.just("get"), st.lists(keys, max_size=5)),
    st.tuples(st.just("put"), keys, st.integers(0, 45)),
    st.tuples(st.just("delete"), st.lists(keys, max_size=3)),
    st.tuples(st.just("clear")),
)


@settings(max_examples=200, deadline=None)
@given(limit=st.integers(0, 100), script=st.lists(steps, max_size=60))
def test_it_keeps_what_sieve_keeps_within_the_limit(limit: int, script: list[Any]) -> None:
    kept: BudgetSieve[int, bytes] = BudgetSieve(limit, len, "test")
    model = Model(limit)
    for number, (what, *arguments) in enumerate(script):
        if what == "get":
            expected = {key: found for key in arguments[0] if (found := model.get(key)) is not None}
            assert kept.get_many(arguments[0]) == expected
        elif what == "put":
            value = bytes([number]) * arguments[1]
            assert kept.put(arguments[0], value) == model.put(arguments[0], value)
        elif what == "delete":
            assert kept.delete(arguments[0]) == sum(model.delete(key) for key in arguments[0])
        else:
            kept.clear()
            model.items, model.hand = [], 0
        assert kept.keys() == [item[0] for item in model.items]
        assert kept.values() == [item[1] for item in model.items]
        stats = kept.stats()
        assert stats.bytes == sum(map(len, kept.values()))
        assert stats.bytes <= limit
        assert (stats.entries, stats.evicted, stats.refused) == (len(model.items), model.evicted, model.refused)


def test_a_scan_of_ten_times_the_budget_leaves_what_is_used_again() -> None:
    kept: BudgetSieve[int, bytes] = BudgetSieve(100_000, len, "test")
    hot = range(80)
    for _ in range(2):
        found = kept.get_many(hot)
        for key in set(hot) - found.keys():
            kept.put(key, bytes(1000))
    for key in range(1000, 2000):
        assert not kept.get_many([key])
        kept.put(key, bytes(1000))
    assert len(kept.get_many(hot)) == len(hot)
    assert kept.stats().evicted == 980


def test_a_scan_among_traffic_leaves_most_of_what_is_used_again() -> None:
    """Sizes differ tenfold, and more is asked for than fits."""
    chance = random.Random(0)
    sizes = [chance.choice((300, 1000, 3000)) for _ in range(3000)]
    limit = 100_000
    kept: BudgetSieve[int, int] = BudgetSieve(limit, sizes.__getitem__, "test")

    def ask(keys: list[int]) -> int:
        found = kept.get_many(keys)
        for key in keys:
            if key not in found:
                kept.put(key, key)
        return len(found)

    def traffic() -> int:
        return sum(ask(chance.choices(range(200), [1 / (rank + 1) for rank in range(200)], k=8)) for _ in range(200))

    traffic()
    before = traffic()
    scanned = [key for key in range(1000, 3000) if sum(sizes[1000:key]) < 10 * limit]
    for key in scanned:
        ask([key])
    kept_hot = [key for key in range(30) if key in kept.keys()]  # noqa: SIM118 - not a mapping
    assert len(kept_hot) >= 25
    assert traffic() > 0.9 * before


def test_a_hot_set_gives_way_to_another_one() -> None:
    kept: BudgetSieve[int, bytes] = BudgetSieve(10, len, "test")
    for start in (0, 100):
        for _ in range(3):
            for key in range(start, start + 10):
                if not kept.get_many([key]):
                    kept.put(key, b"x")
    assert set(kept.keys()) == set(range(100, 110))


def test_values_are_freed_at_once() -> None:
    class Value:
        pass

    kept: BudgetSieve[int, Value] = BudgetSieve(3, lambda _: 1, "test")
    watched = []
    gc.disable()
    try:
        for key in range(10):
            value = Value()
            watched.append(weakref.ref(value))
            kept.put(key, value)
            del value
            kept.get_many([key - 1])
        assert sum(ref() is not None for ref in watched) == 3
        kept.clear()
        assert not any(ref() for ref in watched)
    finally:
        gc.enable()


def test_threads_keep_the_limit_and_the_count() -> None:
    kept: BudgetSieve[int, bytes] = BudgetSieve(5_000, len, "test")
    wrong = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(2_000):
            key = chance.randrange(60)
            for found, value in kept.get_many([key, key + 1]).items():
                if value != bytes([found]) * len(value):
                    wrong.append(found)
            kept.put(key, bytes([key]) * chance.randrange(1, 400))
            if not chance.randrange(20):
                kept.delete([chance.randrange(60)])
            if (kept.stats().bytes or 0) > 5_000:
                wrong.append(-1)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert kept.stats().bytes == sum(map(len, kept.values()))
