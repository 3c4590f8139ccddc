"""The contract that every store keeps, as tests to inherit."""

from __future__ import annotations

import threading

import pytest
from cachekit import key_of, value_of

from kalm_rag.cache import Store

KEYS = [key_of(number) for number in range(12)]


class StoreContract:
    """Subclass it with a fixture `store`, an open and empty store."""

    torn = False
    """Whether a value may be read while it is written: the cache verifies every value, so that is a miss."""

    turns = 20
    """Of each of the threads that use it at once."""

    @pytest.mark.parametrize("size", [0, 1, 1000, 40_000, 300_000])
    def test_what_is_put_is_got(self, store: Store, size: int) -> None:
        items = {key: value_of(key, size) for key in KEYS}
        assert store.put_many(items) == len(items)
        found = store.get_many([*KEYS, key_of(99)])
        assert found == items
        assert all(type(value) is bytes for value in found.values())

    def test_nothing_in_nothing_out(self, store: Store) -> None:
        assert store.get_many([]) == {}
        assert store.get_many(KEYS) == {}
        assert store.put_many({}) == 0
        assert list(store.keys()) == []
        assert store.delete([]) == 0

    def test_the_last_put_wins(self, store: Store) -> None:
        store.put_many({KEYS[0]: b"old" * 100_000})
        store.put_many({KEYS[0]: b"new"})
        assert store.get_many(KEYS) == {KEYS[0]: b"new"}
        assert store.stats().entries in (1, None)
        assert list(store.keys()) == [KEYS[0]]

    def test_delete(self, store: Store) -> None:
        store.put_many(dict.fromkeys(KEYS, b"value"))
        assert store.delete([KEYS[0], KEYS[1], key_of(99)]) == 2
        assert sorted(store.keys()) == sorted(KEYS[2:])
        assert store.delete([KEYS[0]]) == 0

    def test_keys_while_writing(self, store: Store) -> None:
        store.put_many(dict.fromkeys(KEYS, b"value"))
        seen = []
        for key in store.keys():  # noqa: SIM118
            seen.append(key)
            store.put_many({key_of(1000 + len(seen)): b"more"})
            store.delete([key])
            if len(seen) > 100:
                break
        assert set(KEYS) <= set(seen)

    def test_stats(self, store: Store) -> None:
        store.put_many({key: value_of(key, 1000) for key in KEYS})
        stats = store.stats()
        assert stats.entries in (len(KEYS), None)
        assert stats.bytes is None or 12_000 <= stats.bytes <= 200_000

    def test_threads(self, store: Store) -> None:
        errors: list[BaseException] = []

        def work(number: int) -> None:
            try:
                for turn in range(self.turns):
                    key = key_of((number + turn) % 8)
                    store.put_many({key: value_of(key, 5000)})
                    for found, value in store.get_many([key_of(other) for other in range(8)]).items():
                        expected = value_of(found, 5000)
                        assert value == (expected[: len(value)] if self.torn else expected)
            except BaseException as error:  # noqa: BLE001
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []

    def test_use_after_close(self, store: Store) -> None:
        store.put_many({KEYS[0]: b"value"})
        store.close()
        assert store.get_many([KEYS[0]]) in ({}, {KEYS[0]: b"value"})
        assert store.put_many({KEYS[1]: b"value"}) == 1
