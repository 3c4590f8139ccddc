"""Calls with and without budgets, bulk encoding and the background on one model; forks, and the end of a process."""

from __future__ import annotations

import multiprocessing
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kalm_rag import KaLMReranker

SECONDS = 120


def test_scores_do_not_depend_on_what_runs_beside(checkpoint: Path, passages: list[str], queries: list[str]) -> None:
    asked = queries[:6]
    plain = KaLMReranker(checkpoint, device="cpu", cache=None)
    expected = {query: {hit.index: hit.margin for hit in plain.rank(query, passages[:40])} for query in asked}
    reranker = KaLMReranker(checkpoint, device="cpu", cache=None, score_memory=0, prefill_memory=2_000_000).load()
    scored = 0

    def work(number: int) -> int:
        draw = random.Random(number)
        count = 0
        for query in draw.sample(asked, 4):
            budget = draw.choice([None, 1.0, 20.0, 200.0, 1e9])
            found = reranker.rank(query, passages[:40], budget_ms=budget)
            for hit in found:
                if hit.scored:
                    assert hit.margin == pytest.approx(expected[query][hit.index], abs=1e-5)
                    count += 1
            margins = [hit.margin for hit in found if hit.scored]
            assert margins == sorted(margins, reverse=True)
            assert sorted(hit.index for hit in found) == list(range(40))
            if number % 3 == 0:
                reranker.encode(passages[40:60])
        return count

    with ThreadPoolExecutor(6) as pool:
        scored = sum(pool.map(work, range(6)))
    assert scored > 0
    assert reranker.flush(SECONDS) == 0


def _rank_in_child(reranker: KaLMReranker, texts: list[str], pipe: multiprocessing.connection.Connection) -> None:  # type: ignore[name-defined]
    waiting = reranker.stats().background.pending
    hits = reranker.rank("query", texts, budget_ms=60_000)
    left = reranker.rank("query", ["one more passage"], on_unknown="skip")
    pipe.send((waiting, [hit.margin for hit in hits], left[0].scored, reranker.flush(SECONDS)))


@pytest.mark.skipif(not hasattr(multiprocessing, "get_context") or sys.platform == "win32", reason="no fork")
def test_a_forked_process_has_a_queue_of_its_own(checkpoint: Path, passages: list[str]) -> None:
    reranker = KaLMReranker(checkpoint, device="cpu", cache=None, score_memory=0)
    expected = [hit.margin for hit in reranker.load().rank("query", passages[:4])]
    reranker.rank("query", passages[10:40], on_unknown="skip")
    here, there = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=_rank_in_child, args=(reranker, passages[:4], there))
    child.start()
    assert here.poll(SECONDS)
    waiting, margins, scored, left = here.recv()
    child.join(SECONDS)
    assert (waiting, scored, left, child.exitcode) == (0, False, 0, 0)
    assert margins == pytest.approx(expected, abs=1e-5)
    assert reranker.flush(SECONDS) == 0
    assert reranker.stats().background.encoded == 30


def test_a_process_that_ends_does_not_wait_for_the_background(checkpoint: Path) -> None:
    code = f"""
from kalm_rag import KaLMReranker
reranker = KaLMReranker({str(checkpoint)!r}, device="cpu", cache=None)
hits = reranker.rank("query", [f"passage {{number}} " * 200 for number in range(2000)], on_unknown="skip")
print(len(hits), reranker.stats().background.pending > 1000)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=SECONDS)
    assert (done.returncode, done.stdout.strip(), done.stderr.strip()) == (0, "2000 True", "")
