"""What `KaLMReranker` promises besides the scores themselves."""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from spies import passages_in

from kalm_rag import EncodeReport, KaLMReranker, PassageCache, RankedPassage


def test_ranking_is_sorted_and_carries_the_given_objects(reranker: KaLMReranker, passages: list[str]) -> None:
    given = [{"text": text, "meta": number} for number, text in enumerate(passages[:9])]
    before = [dict(document) for document in given]
    ranking = reranker.rank("How do I sort a list?", given)
    assert sorted(hit.index for hit in ranking) == list(range(9))
    assert [hit.margin for hit in ranking] == sorted((hit.margin for hit in ranking), reverse=True)
    assert all(hit.document is given[hit.index] for hit in ranking)
    assert given == before
    assert all(type(hit.score) is float and 0 <= hit.score <= 1 for hit in ranking)


def test_scores_are_the_sigmoid_of_margins_and_equal_predict(reranker: KaLMReranker, passages: list[str]) -> None:
    query = "How do I sort a list?"
    ranking = {hit.index: hit for hit in reranker.rank(query, passages[:6])}
    for index, score in enumerate(reranker.predict([(query, text) for text in passages[:6]])):
        assert ranking[index].score == pytest.approx(score, abs=1e-5)
        assert torch.sigmoid(torch.tensor(ranking[index].margin)).item() == pytest.approx(score, abs=1e-5)


def test_top_k_and_threshold(reranker: KaLMReranker, passages: list[str]) -> None:
    whole = reranker.rank("lists", passages[:8])
    assert reranker.rank("lists", passages[:8], top_k=3) == whole[:3]
    assert reranker.rank("lists", passages[:8], top_k=99) == whole
    cut = whole[3].score
    assert reranker.rank("lists", passages[:8], threshold=cut) == [hit for hit in whole if hit.score >= cut]
    assert reranker.rank("lists", passages[:8], threshold=1) == []


def test_equal_passages_keep_their_order_and_are_computed_once(
    reranker: KaLMReranker, passages: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = reranker.scorer
    counted: list[int] = []
    encode = engine.states.encoder.encode
    monkeypatch.setattr(
        engine.states.encoder, "encode", lambda rows, *rest: counted.append(len(rows)) or encode(rows, *rest)
    )
    ranking = reranker.rank("lists", [passages[0], passages[1], passages[0], passages[0]])
    places = [hit.index for hit in ranking if hit.document == passages[0]]
    assert places == [0, 2, 3]
    assert len({hit.score for hit in ranking}) == 2
    assert counted == [2]


def test_generators_and_mappings(reranker: KaLMReranker, passages: list[str]) -> None:
    expected = [hit.score for hit in reranker.rank("lists", passages[:5])]
    assert [hit.score for hit in reranker.rank("lists", (text for text in passages[:5]))] == expected
    assert reranker.predict(("lists", text) for text in passages[:2]) == reranker.predict(
        [["lists", {"text": text}] for text in passages[:2]]
    )


def test_encode_reports_new_known_and_truncated(checkpoint: Path, passages: list[str]) -> None:
    reranker = KaLMReranker(checkpoint, max_length=64)
    report = reranker.encode(iter(["short", "short", passages[0] * 3]))
    assert report == EncodeReport(new=2, known=1, truncated=1)
    assert report.total == 3


def test_empty_in_gives_empty_out_without_a_model(tmp_path: Path) -> None:
    reranker = KaLMReranker(tmp_path / "nothing")
    assert reranker.rank("query", []) == []
    assert reranker.predict([]) == []
    assert reranker.encode(iter([])) == EncodeReport(0, 0, 0)
    assert "not loaded" in repr(reranker)


def test_lazy_load_close_and_context_manager(checkpoint: Path) -> None:
    with KaLMReranker(checkpoint) as reranker:
        assert "not loaded" in repr(reranker)
        assert reranker.load() is reranker
        assert "not loaded" not in repr(reranker)
        model = weakref.ref(reranker.scorer.loaded.model)
        score = reranker.predict([("a", "b")])
    gc.collect()
    assert model() is None
    assert "not loaded" in repr(reranker)
    assert reranker.predict([("a", "b")]) == score
    reranker.close()
    reranker.close()


def test_eight_threads_give_the_scores_of_one(checkpoint: Path, passages: list[str], queries: list[str]) -> None:
    alone = KaLMReranker(checkpoint)
    expected = [alone.rank(query, passages[:6]) for query in queries[:8]]
    shared = KaLMReranker(checkpoint, score_memory=0)
    barrier = threading.Barrier(8)

    def work(number: int) -> list[list[RankedPassage]]:
        barrier.wait()
        return [shared.rank(query, passages[:6]) for query in queries[number:8] + queries[:number]]

    with ThreadPoolExecutor(8) as pool:
        for number, rankings in enumerate(pool.map(work, range(8))):
            assert rankings == expected[number:] + expected[:number]


def test_close_while_others_rank(checkpoint: Path, passages: list[str]) -> None:
    reranker = KaLMReranker(checkpoint, score_memory=0)
    expected = reranker.rank("lists", passages[:4])
    with ThreadPoolExecutor(4) as pool:
        results = [pool.submit(reranker.rank, "lists", passages[:4]) for _ in range(12)]
        for _ in range(6):
            reranker.close()
        assert all(result.result() == expected for result in results)


def test_out_of_memory_halves_the_batch(
    checkpoint: Path, passages: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    passages = [text[:80] for text in passages]
    expected = KaLMReranker(checkpoint, cache=None).rank("lists", passages[:9])
    reranker = KaLMReranker(checkpoint, cache=None)
    encoder = reranker.scorer.loaded.model.get_encoder()
    forward = encoder.forward
    sizes: list[int] = []

    def small_memory(**kwargs: torch.Tensor) -> object:
        sizes.append(passages_in(kwargs))
        if sizes[-1] > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(**kwargs)

    monkeypatch.setattr(encoder, "forward", small_memory)
    found = reranker.rank("lists", passages[:9])
    assert [hit.index for hit in found] == [hit.index for hit in expected]
    assert max(abs(a.score - b.score) for a, b in zip(found, expected, strict=True)) <= 1e-5
    assert sizes == [9, 4, 2, 2, 5, 2, 3]
    assert "continuing with 4" in caplog.text


def test_out_of_memory_on_one_row_is_raised(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reranker = KaLMReranker(checkpoint, cache=None)

    def no_memory(**_: torch.Tensor) -> object:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(reranker.scorer.loaded.model.get_encoder(), "forward", no_memory)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        reranker.rank("lists", ["a", "b"])


def test_progress_bars_are_for_terminals(reranker: KaLMReranker, capsys: pytest.CaptureFixture[str]) -> None:
    reranker.rank("lists", ["a", "b"])
    assert capsys.readouterr().err == ""


def test_unknown_and_estimate_tell_what_encoding_takes(checkpoint: Path, tmp_path: Path, passages: list[str]) -> None:
    some = passages[:5]
    with PassageCache(tmp_path / "passages", keep="prefilled") as cache:
        reranker = KaLMReranker(checkpoint, device="cpu", cache=cache)
        assert reranker.unknown([*some, some[0]]) == some
        reranker.encode(some[:2])
        assert reranker.unknown([{"text": text} for text in some]) == some[2:]
        estimate = reranker.estimate(some)
        assert len(estimate.tokens) == 5
        reranker.encode(some)
        cache.flush()
        assert reranker.unknown(some) == []
        stats = cache.stats()
        assert stats.store.counters.bytes_written == estimate.states_bytes
        assert stats.encoded == 5
        names = list(cache.store.keys())
        sizes = [len(data) for data in cache.store.get_many(names).values()]
        assert sum(sizes) == estimate.states_bytes + estimate.prefilled_bytes
    reranker.close()


def test_asynchronous_twins_take_the_same_arguments() -> None:
    for name in ("rank", "predict", "encode"):
        plain, twin = (inspect.signature(getattr(KaLMReranker, each)) for each in (name, f"a{name}"))
        assert plain == twin


class Row:
    """A document of somebody's own."""

    def __init__(self, body: object) -> None:
        self.body = body


def test_the_text_may_be_elsewhere(reranker: KaLMReranker, passages: list[str]) -> None:
    texts = passages[:4]
    wanted = [hit.margin for hit in reranker.rank("query", texts)]
    for documents, text in (
        ([{"body": text, "text": "another"} for text in texts], "body"),
        ([Row(text) for text in texts], "body"),
        ([("id", text) for text in texts], lambda row: row[1]),
        ([{"text": text} for text in texts], lambda row: row["text"]),
    ):
        found = reranker.rank("query", documents, text=text)
        assert [hit.margin for hit in found] == wanted
        assert all(hit.document is documents[hit.index] for hit in found)
        assert asyncio.run(reranker.arank("query", documents, text=text)) == found
        assert reranker.encode(documents, text=text).new == 0
        assert asyncio.run(reranker.aencode(documents, text=text)).known == 4
        assert reranker.unknown(documents, text=text) == []
        assert reranker.estimate(documents, text=text) == reranker.estimate(texts)


@pytest.mark.parametrize(
    ("documents", "text", "message"),
    [
        ([{"text": "x"}], "body", r"documents\[0\] is a mapping without the key 'body'; its keys are \['text'\]"),
        ([Row("x")], "text", r"documents\[0\] has no attribute 'text', it is of type Row"),
        ([Row(None)], "body", r"documents\[0\].body must be a string, got NoneType"),
        ([Row("x")], None, r"documents\[0\] must be a string, a mapping .* got Row: .*; for others give text="),
        ([Row], None, r"documents\[0\] must be a string, a mapping .* got type"),
        ([{"a": 1}], lambda row: row["a"], r"text\(documents\[0\]\) must be a string, got int: 1"),
        ([{"a": 1}], 7, "text must be a string, got int"),
        ({"body": "x"}, "body", "documents must be a list of passages, got one dict"),
    ],
)
def test_a_text_that_is_not_there(reranker: KaLMReranker, documents: Any, text: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        reranker.rank("query", documents, text=text)


def test_truncated_texts_are_counted_and_logged_once(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    reranker = KaLMReranker(checkpoint, cache=None, max_length=30, query_max_length=5)
    long, other = "a long passage " * 30, "another long passage " * 30
    reranker.predict([("q", "short")])
    assert reranker.truncations.count == 0
    reranker.predict([("q", long), ("a longer query", long), ("a longer query", other)])
    assert reranker.truncations.count == 3, "two passages and a query"
    reranker.encode([long, "short"])
    assert reranker.truncations.count == 4
    lines = [record for record in caplog.records if "longer than the reranker reads" in record.message]
    assert [record.levelname for record in lines if record.levelname != "DEBUG"] == ["WARNING"]
