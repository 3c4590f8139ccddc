"""The encoder that engines run, in plain Python: what it says of each row is what the cache holds."""

from __future__ import annotations

import copy
import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kalm_rag import KaLMReranker, PassageCache, cli
from kalm_rag.cache import MemoryStore, StoreError
from kalm_rag.distributed import PassageEncoder, Shard
from kalm_rag.model.encoder import Encoder
from kalm_rag.scorer import Scorer

SECRET = "a secret of thirty-two bytes....."


@pytest.fixture
def encoder(checkpoint: Path, tmp_path: Path) -> PassageEncoder:
    return PassageEncoder(checkpoint, cache=tmp_path / "cache", device="cpu")


def batch(texts: Sequence[Any]) -> dict[str, list[Any]]:
    return {"id": [f"p{number}" for number in range(len(texts))], "text": list(texts)}


class PartialStore(MemoryStore):
    """Keeps nothing for whose key `refuses` is true."""

    def __init__(self, refuses: str = "") -> None:
        super().__init__(1 << 30)
        self.refuses = refuses

    def put_many(self, items: Mapping[str, bytes]) -> int:
        if not self.refuses:
            msg = "the disk is full"
            raise OSError(msg)
        return super().put_many({key: data for key, data in items.items() if key[0] not in self.refuses})


class TestResults:
    def test_a_reranker_finds_what_was_encoded_under_the_keys(
        self, encoder: PassageEncoder, checkpoint: Path, tmp_path: Path, passages: list[str], queries: list[str]
    ) -> None:
        given = batch(passages[:24])
        found = encoder(given)
        assert found.keys() == {"id", "keys", "status", "truncated", "message"}
        assert found["id"] == given["id"]
        assert found["status"] == ["encoded"] * 24
        cache = PassageCache(tmp_path / "cache")
        assert cache.store is not None
        assert sorted(cache.store.keys()) == sorted(key for [key] in found["keys"])
        ranked = KaLMReranker(checkpoint, cache=cache, device="cpu").rank(queries[0], passages[:24])
        assert cache.stats().encoded == 0
        plain = KaLMReranker(checkpoint, cache=None, device="cpu").rank(queries[0], passages[:24])
        assert {hit.index: hit.margin for hit in ranked} == pytest.approx(
            {hit.index: hit.margin for hit in plain}, abs=1e-5
        )

    def test_each_passage_is_encoded_once(
        self, encoder: PassageEncoder, passages: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run: list[int] = []
        plain = Encoder.encode
        monkeypatch.setattr(
            Encoder, "encode", lambda self, rows, ratio: run.append(len(rows)) or plain(self, rows, ratio)
        )
        first, second = passages[:6], passages[4:10]
        assert encoder(batch([*first, first[0]]))["status"] == ["encoded"] * 6 + ["known"]
        assert encoder(batch(second))["status"] == ["known"] * 2 + ["encoded"] * 4
        assert encoder(batch(first + second))["status"] == ["known"] * 12
        assert sum(run) == 10

    def test_a_poison_row_is_named_and_costs_no_other(self, encoder: PassageEncoder) -> None:
        class Broken:
            def __repr__(self) -> str:
                raise RuntimeError

        poison = [None, float("nan"), b"bytes", 7, ["list"], Broken(), np.float64("nan")]
        given = batch(["first", *poison, "last", ""])
        before = copy.copy(given["text"])
        found = encoder(given)
        assert found["status"] == ["encoded", *["failed"] * len(poison), "encoded", "encoded"]
        assert [name for name, status in zip(found["id"], found["status"], strict=True) if status == "failed"] == [
            f"p{number}" for number in range(1, 8)
        ]
        assert found["message"][1] == "text must be a string, got NoneType: None"
        assert found["message"][3] == "text must be a string, got bytes: b'bytes'"
        assert [keys == [] for keys in found["keys"]] == [status == "failed" for status in found["status"]]
        assert all(one is other for one, other in zip(given["text"], before, strict=True))

    def test_only_poison_needs_no_model(self, encoder: PassageEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Scorer, "load", lambda *_, **__: pytest.fail("the model was loaded"))
        assert encoder(batch([None]))["status"] == ["failed"]
        assert encoder(batch([])) == {"id": [], "keys": [], "status": [], "truncated": [], "message": []}

    def test_columns_of_every_library(self, checkpoint: Path, tmp_path: Path) -> None:
        pandas, pyarrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
        texts: list[Any] = ["one", None, "two"]
        encoder = PassageEncoder(checkpoint, cache=tmp_path, device="cpu", id_column="key", text_column="body")
        expected = encoder({"key": [1, 2, 3], "body": texts})
        expected["status"] = ["known", "failed", "known"]
        columns = {"key": np.arange(1, 4), "body": np.array(texts, dtype=object), "more": [0, 0, 0]}
        for given in (
            columns,
            pyarrow.table({"key": [1, 2, 3], "body": texts}),
            {"key": pyarrow.array([1, 2, 3]), "body": pyarrow.chunked_array([["one", None], ["two"]])},
            pandas.DataFrame({"key": [1, 2, 3], "body": pandas.Series(texts, dtype=object)}),
            {"key": pandas.Series([1, 2, 3]), "body": (text for text in texts)},
        ):
            assert encoder(given) | {"message": None} == expected | {"message": None}
        strings = pandas.DataFrame({"key": [1, 2, 3], "body": pandas.Series(texts, dtype="string")})
        assert encoder(strings)["status"] == expected["status"]
        assert encoder({"key": [1], "body": np.array(["one"])})["status"] == ["known"]
        frames = list(encoder.map_in_pandas(iter([strings, strings])))
        assert [list(frame["status"]) for frame in frames] == [expected["status"]] * 2
        assert frames[0].columns.tolist() == ["key", "keys", "status", "truncated", "message"]
        assert encoder.spark_schema("long").startswith("`key` long, keys array<string>, ")

    def test_what_is_not_read_is_told(self, checkpoint: Path, tmp_path: Path) -> None:
        long = "word " * 100
        encoder = PassageEncoder(checkpoint, cache=tmp_path, device="cpu", max_length=32)
        for status in ("encoded", "known"):
            found = encoder(batch([long, "short", "half \ud83d pair"]))
            assert found["status"] == [status] * 3
            assert found["truncated"] == [True, False, False]
            assert found["message"] == ["", "", "half a surrogate pair was read as U+FFFD"]

    def test_windows_have_a_key_each(self, checkpoint: Path, tmp_path: Path) -> None:
        options: dict[str, Any] = {"long_passages": "windows", "window_tokens": 32, "max_windows": 3, "device": "cpu"}
        encoder = PassageEncoder(checkpoint, cache=tmp_path, **options)
        texts = ["short", " ".join(f"word{number}" for number in range(200))]
        found = encoder(batch(texts))
        assert [len(keys) > 1 for keys in found["keys"]] == [False, True]
        assert found["truncated"] == [False, True]
        with KaLMReranker(checkpoint, cache=tmp_path, **options) as reranker:
            assert reranker.unknown(texts) == []

    def test_prefilled_passages_are_kept_too(self, checkpoint: Path, tmp_path: Path, passages: list[str]) -> None:
        arguments: dict[str, Any] = {"where": tmp_path, "keep": "prefilled"}
        found = PassageEncoder(checkpoint, cache=arguments, device="cpu")(batch(passages[:4]))
        assert found["status"] == ["encoded"] * 4
        with KaLMReranker(checkpoint, cache=PassageCache(**arguments), device="cpu") as reranker:
            reranker.rank("a query", passages[:4])
            stats = reranker.prefill_stats()
            assert stats is not None
            assert stats.counters.stored == 4


class TestFaults:
    def test_what_the_store_does_not_keep_is_told(self, checkpoint: Path, passages: list[str]) -> None:
        encoder = PassageEncoder(checkpoint, cache=PassageCache(PartialStore()), device="cpu")
        found = encoder(batch([*passages[:3], None, passages[0]]))
        assert found["status"] == ["not kept"] * 3 + ["failed", "not kept"]
        assert "did not keep it" in found["message"][0]

    def test_each_row_has_its_own_status(self, checkpoint: Path, passages: list[str]) -> None:
        refused = "01234567"
        encoder = PassageEncoder(checkpoint, cache={"where": PartialStore(refused)}, device="cpu")
        found = encoder(batch(passages[:20]))
        assert set(found["status"]) == {"encoded", "not kept"}
        for [key], status in zip(found["keys"], found["status"], strict=True):
            assert status == ("not kept" if key[0] in refused else "encoded")

    def test_a_store_that_is_full_for_a_moment_is_asked_again(self, checkpoint: Path) -> None:
        class Busy(MemoryStore):
            fails = 1

            def put_many(self, items: Mapping[str, bytes]) -> int:
                self.fails -= 1
                return 0 if self.fails >= 0 else super().put_many(items)

        encoder = PassageEncoder(checkpoint, cache={"where": Busy(1 << 30)}, device="cpu")
        assert encoder(batch(["a passage"]))["status"] == ["encoded"]

    def test_a_full_cache_that_gives_up_what_was_encoded_stops_the_job(
        self, checkpoint: Path, tmp_path: Path, passages: list[str]
    ) -> None:
        encoder = PassageEncoder(checkpoint, cache={"where": tmp_path, "limit": 60_000}, device="cpu")
        parts = (passages[start : start + 10] for start in range(0, 120, 10))
        with pytest.raises(StoreError, match=r"reached its limit of 60\.0 KB and gave up .* give it a larger limit"):
            list(map(encoder, map(batch, parts)))

    def test_a_text_that_the_model_cannot_encode_is_named(
        self, encoder: PassageEncoder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        plain = Encoder.encode

        def encode(self: Encoder, rows: Sequence[Any], ratio: int) -> Any:
            if any(len(row.ids) > 40 for row in rows):
                msg = "out of memory"
                raise RuntimeError(msg)
            return plain(self, rows, ratio)

        monkeypatch.setattr(Encoder, "encode", encode)
        found = encoder(batch(["short", "long " * 60, "other", None]))
        assert found["status"] == ["encoded", "failed", "encoded", "failed"]
        assert found["message"][1] == "the model cannot encode it: out of memory"
        assert encoder(batch(["long " * 60]))["status"] == ["failed"]
        with pytest.raises(RuntimeError, match="out of memory"):  # the model is at fault, not one text
            encoder(batch(["long " * 60, "longer " * 60]))

    def test_a_killed_process_loses_at_most_its_batch(self, checkpoint: Path, tmp_path: Path) -> None:
        code = f"""
from kalm_rag.distributed import PassageEncoder
encoder = PassageEncoder({str(checkpoint)!r}, cache={str(tmp_path / "cache")!r}, device="cpu")
for start in range(0, 400, 4):
    encoder({{"id": list(range(start, start + 4)), "text": [f"passage {{n}}" for n in range(start, start + 4)]}})
    print(start + 4, flush=True)
"""
        told = 0
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            while told < 20:
                told = int(process.stdout.readline())
            process.send_signal(signal.SIGKILL)
            told = max([told, *(int(line) for line in process.stdout.read().split())])
        assert process.returncode == -signal.SIGKILL
        assert 20 <= told < 400
        encoder = PassageEncoder(checkpoint, cache=tmp_path / "cache", device="cpu")
        again = encoder(batch([f"passage {number}" for number in range(told + 8)]))
        assert again["status"][:told] == ["known"] * told
        assert again["status"][told + 4 :] == ["encoded"] * 4


class TestSharedTier:
    """Workers with a folder each, or without one, and a tier that all of them reach."""

    def test_a_passage_is_encoded_once_in_all(self, checkpoint: Path, tmp_path: Path, passages: list[str]) -> None:
        tier = MemoryStore(1 << 30)
        caches = [
            {"where": where, "remote": tier, "secret": SECRET} for where in (tmp_path / "a", tmp_path / "b", None)
        ]
        first, second, third = (PassageEncoder(checkpoint, cache=cache, device="cpu") for cache in caches)
        assert first(batch(passages[:8]))["status"] == ["encoded"] * 8
        assert second(batch(passages[:12]))["status"] == ["known"] * 8 + ["encoded"] * 4
        assert third(batch(passages[:16]))["status"] == ["known"] * 12 + ["encoded"] * 4
        assert len(KaLMReranker(checkpoint, cache=PassageCache(**caches[0]), device="cpu").unknown(passages[:20])) == 4
        assert first.folder is None, "it is not the folder of one machine that holds everything"

    def test_what_only_the_folder_keeps_is_told(self, checkpoint: Path, tmp_path: Path, passages: list[str]) -> None:
        cache = {"where": tmp_path, "remote": PartialStore(), "unauthenticated": True}
        found = PassageEncoder(checkpoint, cache=cache, device="cpu")(batch(passages[:3]))
        assert found["status"] == ["not kept"] * 3
        assert found["message"][0].startswith("the shared tier does not ")

    def test_workers_have_the_secret_of_the_environment_of_the_driver(
        self, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KALM_RAG_CACHE_SECRET", SECRET)
        encoder = PassageEncoder(checkpoint, cache={"where": tmp_path}, device="cpu")
        data = pickle.dumps(encoder)
        monkeypatch.delenv("KALM_RAG_CACHE_SECRET")
        assert pickle.loads(data)(batch(["a passage"]))["status"] == ["encoded"]
        monkeypatch.setenv("KALM_RAG_CACHE_SECRET", SECRET)
        assert KaLMReranker(checkpoint, cache=tmp_path, device="cpu").unknown(["a passage"]) == []


class TestArguments:
    def test_a_pickle_opens_the_same_folder_and_hides_credentials(
        self, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path)
        encoder = PassageEncoder(
            os.path.relpath(checkpoint), cache={"where": "here", "secret": SECRET}, device="cpu", token="hf_token"
        )
        data = pickle.dumps(encoder)
        monkeypatch.chdir(tmp_path / "elsewhere")
        copied = pickle.loads(data)
        for shown in (repr(copied), str(copied), f"{copied.__call__}"):
            assert SECRET not in shown
            assert "hf_token" not in shown
        assert copied(batch(["a passage"]))["status"] == ["encoded"]
        assert encoder(batch(["a passage"]))["status"] == ["known"]
        assert copied.folder == tmp_path / "here"
        other = PassageEncoder(checkpoint, cache={"where": tmp_path / "here", "secret": SECRET[::-1]}, device="cpu")
        assert other(batch(["a passage"]))["status"] == ["encoded"], "workers do not authenticate what they write"

    def test_copies_share_one_model(
        self, encoder: PassageEncoder, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loads = []
        plain = Scorer.load.__func__  # type: ignore[attr-defined]
        monkeypatch.setattr(
            Scorer, "load", classmethod(lambda kind, *given, **named: loads.append(1) or plain(kind, *given, **named))
        )
        for _ in range(3):
            pickle.loads(pickle.dumps(encoder))(batch(["a passage"]))
        assert len(loads) == 1
        PassageEncoder(checkpoint, cache=tmp_path / "other", device="cpu")(batch(["a passage"]))
        assert len(loads) == 2
        encoder.close()
        assert encoder(batch(["a passage"]))["status"] == ["known"]

    def test_the_default_folder_is_that_of_the_driver(
        self, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("KALM_RAG_CACHE", str(tmp_path / "named"))
        data = pickle.dumps(PassageEncoder(checkpoint))
        monkeypatch.delenv("KALM_RAG_CACHE")
        assert pickle.loads(data).folder == tmp_path / "named"

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (
                {"cache": None},
                "cache must be a folder, a mapping of arguments of PassageCache or a PassageCache, got None",
            ),
            ({"cache": {"where": None}}, "cache must keep what workers encode, got where=None"),
            ({"cache": {"wher": "x"}}, "unexpected keyword argument 'wher'"),
            ({"cache": {"secret": "short"}}, "secret must have at least 16 bytes, got 5"),
            ({"dtyp": "float32"}, "unexpected keyword argument 'dtyp'"),
            ({"max_length": 0}, "max_length must be at least 1, got 0"),
            ({"ratio": "four"}, "ratio must be"),
            ({"id_column": "keys"}, "id_column must differ from text_column and from keys, status, truncated, message"),
            ({"id_column": "text"}, "id_column must differ"),
            ({"text_column": 3}, "text_column must be a string, got int: 3"),
        ],
    )
    def test_a_wrong_argument_shows_at_once(self, given: dict[str, Any], message: str) -> None:
        with pytest.raises((TypeError, ValueError)) as error:
            PassageEncoder("mini", **given)
        assert message in str(error.value)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"id": [1], "body": ["x"]}, "the batch has no column 'text'; its columns are ['body', 'id']"),
            ({"id": [1, 2], "text": ["x"]}, "one length, got id: 2, text: 1"),
            ({"id": [1], "text": "x"}, "column 'text' must be a list, an array or a series, got str: 'x'"),
            ([1, 2], "a batch must hold columns by name, such as {'id': [...], 'text': [...]}, got list"),
        ],
    )
    def test_a_wrong_batch(self, encoder: PassageEncoder, given: Any, message: str) -> None:
        with pytest.raises((TypeError, ValueError)) as error:
            encoder(given)
        assert message in str(error.value)

    def test_a_missing_model_is_no_poison_row(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="/no/such/model"):
            PassageEncoder("/no/such/model", cache=tmp_path)(batch(["one", "two"]))


class TestShards:
    def test_shards_divide_any_corpus_the_same_way(self) -> None:
        texts = [f"passage {number}" for number in range(2000)]
        shards = [Shard(number, 5) for number in range(1, 6)]
        for text in texts:
            assert sum(shard.holds(text) for shard in shards) == 1
        sizes = [sum(map(shard.holds, texts)) for shard in shards]
        assert all(300 < size < 500 for size in sizes), sizes
        assert all(map(Shard(1, 1).holds, texts))

    def test_they_are_the_same_in_every_release(self) -> None:
        """Machines of one job may run different releases."""
        held = [number for number in range(12) if Shard.parse(" 3 / 4 ").holds(f"passage {number}")]
        assert held == [7, 8]

    @pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "1/0", "-1/4", "1/2/3", "a/b", "1.5/4"])
    def test_what_is_no_shard(self, text: str) -> None:
        with pytest.raises(ValueError, match="shard must be k/n with k from 1 to n, such as 3/16, got "):
            Shard.parse(text)


def test_the_command_encodes_a_shard(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [f"passage {number}" for number in range(30)]

    def encode(order: list[str], *given: str) -> str:
        (tmp_path / "corpus.txt").write_text("\n".join(order))
        paths = [str(tmp_path / "corpus.txt"), "--model", str(checkpoint), "--cache", str(tmp_path / "cache")]
        monkeypatch.setattr(sys, "argv", ["kalm-rag", "encode", *paths, *given])
        with pytest.raises(SystemExit) as done:
            cli.main()
        assert done.value.code == 0
        return capsys.readouterr().out

    size = sum(map(Shard(1, 2).holds, texts))
    assert encode(texts, "--shard", "1/2").splitlines()[-1] == f"{size} of {size} passages of shard 1/2 held"
    again = json.loads(encode(texts[::-1], "--shard", "1/2", "--json"))
    assert {name: again[name] for name in ("new", "known", "passages", "shard")} == {
        "new": 0,
        "known": size,
        "passages": size,
        "shard": "1/2",
    }
    assert json.loads(encode(texts, "--shard", "2/2", "--json"))["new"] == 30 - size
    assert json.loads(encode(texts, "--json"))["known"] == 30
    empty = next(number for number in range(1, 1000) if not any(map(Shard(number, 999).holds, texts)))
    assert encode(texts, "--shard", f"{empty}/999").splitlines()[-1] == f"0 of 0 passages of shard {empty}/999 held"
