"""What a fork must not break: models, caches and writes that are under way when a process forks.

What forks runs in a process of its own with a time limit, so that a hang is a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from kalm_rag import KaLMReranker
from kalm_rag.model.encoder import Encoder
from kalm_rag.utils import forks

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")

PREAMBLE = """
import logging, os, sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(2)
from kalm_rag import KaLMReranker, PassageCache
from kalm_rag.utils import forks
from kalm_rag.cache import MemoryStore
model, folder = sys.argv[1:]
passages = [f"passage {number} " + "about lists and how to sort them " * (number % 7 + 1) for number in range(24)]

def in_child(action):
    \"\"\"Run something in a forked child, which must end within a minute, and return whether it held.\"\"\"
    child = os.fork()
    if child == 0:
        try:
            held = bool(action())
        except BaseException:
            import traceback
            traceback.print_exc()
            held = False
        sys.stderr.flush()
        os._exit(0 if held else 1)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.01)
    os.kill(child, 9)
    os.waitpid(child, 0)
    print("the child hangs", file=sys.stderr)
    return False

def near(left, right):
    return max(abs(a - b) for a, b in zip(left, right, strict=True)) < 1e-5
"""


def run(code: str, checkpoint: Path, folder: Path) -> str:
    """Run a program after the preamble; returns what it wrote to standard error."""
    command = [sys.executable, "-c", PREAMBLE + code, str(checkpoint), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_a_child_ranks_with_the_model_of_its_parent(checkpoint: Path, tmp_path: Path) -> None:
    """The parent's threads have worked: without care the child waits for them forever."""
    log = run(
        """
logging.basicConfig()
reranker = KaLMReranker(model, device="cpu", cache=folder, prefill_memory=0, score_memory=0)
pairs = [("how to sort", text) for text in passages]
expected = reranker.predict(pairs)
torch.mm(torch.ones(600, 600), torch.ones(600, 600))
def child():
    right = near(reranker.predict(pairs), expected)
    # And what it has not seen, so that the encoder runs and the store is read and written.
    other = reranker.rank("how to sort", ["new " + text for text in passages])
    reranker.cache.flush()
    entries = reranker.cache.stats().store.size.entries
    return right and len(other) == 24 and torch.get_num_threads() == 1 and entries == 48
assert in_child(child)
assert in_child(lambda: in_child(child) and child())
assert torch.get_num_threads() == 2
assert near(reranker.predict(pairs), expected)
""",
        checkpoint,
        tmp_path,
    )
    assert log.count("computes with one thread instead of 2; start processes with the method 'spawn'") == 3


def test_a_child_loads_a_model_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    run(
        """
reranker = KaLMReranker(model, device="cpu", cache=folder)
torch.mm(torch.ones(600, 600), torch.ones(600, 600))
assert in_child(lambda: len(reranker.rank("how to sort", passages)) == 24)
assert len(reranker.rank("how to sort", passages)) == 24
""",
        checkpoint,
        tmp_path,
    )


def test_a_fork_amid_writes_loses_and_hangs_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """Forks at every write, from the writing thread's own signal, while more writes wait."""
    run(
        """
inside, go = threading.Event(), threading.Event()
class Slow(MemoryStore):
    lock = threading.Lock()  # as SQLite has them: nobody releases it in the child
    def put_many(self, items):
        with self.lock:
            inside.set()
            go.wait(0.05)
            return super().put_many(items)
    def get_many(self, keys):
        with self.lock:
            return super().get_many(keys)
reranker = KaLMReranker(model, device="cpu", cache=PassageCache(Slow(10**9), memory=0, keep="prefilled"), batch_size=2)
reranker.load()
held = []
for number in range(6):
    inside.clear()
    reranker.rank("how to sort", [f"{number} {text}" for text in passages[:6]])
    inside.wait(30)
    texts = [f"{number} {text}" for text in passages[:3]]
    held.append(in_child(lambda: len(reranker.rank("another", texts)) == 3))
go.set()
assert held == [True] * 6, held
reranker.cache.flush()
assert reranker.cache.stats().store.size.entries == 72, reranker.cache.stats()
""",
        checkpoint,
        tmp_path,
    )


def test_children_of_a_parent_that_writes_to_disk_read_and_write_the_same_folder(
    checkpoint: Path, tmp_path: Path
) -> None:
    run(
        """
reranker = KaLMReranker(model, device="cpu", cache=PassageCache(folder, memory=0, keep="prefilled"), batch_size=2)
reranker.load()
held = []
for number in range(8):
    texts = [f"{number} {text}" for text in passages[:6]]
    reranker.rank("how to sort", texts)
    def child():
        found = len(reranker.rank("another", texts + [f"child {number}"])) == 7
        reranker.cache.close()
        return found
    held.append(in_child(child))
assert held == [True] * 8, held
reranker.cache.flush()
stats = reranker.cache.stats().store
assert (stats.size.entries, stats.counters.corrupt, stats.counters.write_failed) == (8 * 14, 0, 0), stats
""",
        checkpoint,
        tmp_path,
    )


def test_a_fork_waits_for_the_batches_and_locks_of_other_threads(checkpoint: Path, tmp_path: Path) -> None:
    run(
        """
reranker = KaLMReranker(model, device="cpu", cache=PassageCache(folder, memory=10**6), batch_size=2)
reranker.load()
stop, failed = threading.Event(), []
def work(number):
    turn = 0
    while not stop.is_set():
        turn += 1
        try:
            reranker.rank(f"query {number}", [f"{number} {turn} {text}" for text in passages[:4]])
            reranker.cache.stats()
            reranker.prefill_stats()
        except Exception as error:
            failed.append(error)
threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
for thread in threads:
    thread.start()
def child():
    reranker.cache.stats()
    return len(reranker.rank("in the child", passages[:4])) == 4
held = [in_child(child) for _ in range(10)]
stop.set()
for thread in threads:
    thread.join(60)
assert held == [True] * 10, held
assert not failed, failed
""",
        checkpoint,
        tmp_path,
    )


@pytest.mark.parametrize("module", ["kalm_rag.scorer", "kalm_rag.windows.passages"])
def test_a_fork_waits_for_imports_of_other_threads(module: str, checkpoint: Path, tmp_path: Path) -> None:
    """The lock of a module that is being imported would stay held in the child."""
    run(
        f"""
reranker = KaLMReranker(model, device="cpu", cache=None)
inside = threading.Event()
class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            inside.set()
            time.sleep(1)
sys.meta_path.insert(0, Slow())
thread = threading.Thread(target=reranker.rank, args=("a query", passages[:2]))
thread.start()
assert inside.wait(60)
assert in_child(lambda: len(reranker.rank("in the child", passages[:4])) == 4)
thread.join(60)
""",
        checkpoint,
        tmp_path,
    )


def test_a_fork_that_cannot_wait_gives_a_child_that_says_so(checkpoint: Path, tmp_path: Path) -> None:
    """Not a hang: a batch, or a write, that does not end while a fork can wait."""
    log = run(
        """
logging.basicConfig()
forks._WAIT_SECONDS = 0.05
reranker = KaLMReranker(model, device="cpu", cache=PassageCache(folder))
reranker.load()
inside, go = threading.Event(), threading.Event()
def stuck():
    with reranker.scorer.turns:
        inside.set()
        go.wait(60)
thread = threading.Thread(target=stuck)
thread.start()
inside.wait()
def child():
    try:
        reranker.rank("in the child", passages[:4])
    except forks.ForkError as error:
        return "another thread was computing" in str(error) and "spawn" in str(error) and reranker.cache.store is None
assert in_child(child)
go.set()
thread.join()
assert len(reranker.rank("in the parent", passages[:4])) == 4
assert in_child(lambda: len(reranker.rank("in the next child", passages[:4])) == 4)
""",
        checkpoint,
        tmp_path,
    )
    assert "the child continues without it" in log
    assert "fork between calls" in log


def test_another_device_than_the_cpu_is_refused_in_a_child(checkpoint: Path, tmp_path: Path) -> None:
    run(
        """
reranker = KaLMReranker(model, device="cpu", cache=None)
engine = reranker.scorer
object.__setattr__(engine.loaded, "device", torch.device("cuda"))
def child():
    try:
        reranker.rank("query", passages[:2])
    except forks.ForkError as error:
        return "after the model was loaded on cuda" in str(error)
assert in_child(child)
""",
        checkpoint,
        tmp_path,
    )


def test_asynchronous_calls_and_shared_rerankers_work_in_a_child(checkpoint: Path, tmp_path: Path) -> None:
    run(
        """
import asyncio
from kalm_rag.adapters import shared
reranker = shared.shared_reranker(model, device="cpu", cache=folder, score_memory=0)
assert len(asyncio.run(reranker.arank("query", passages[:2]))) == 2
def child():
    same = shared.shared_reranker(model, device="cpu", cache=folder, score_memory=0)
    return same is reranker and len(asyncio.run(same.arank("query", passages[:2]))) == 2
shared._lock.acquire()  # as if another thread had been inside
held = in_child(child)
shared._lock.release()
assert held
""",
        checkpoint,
        tmp_path,
    )


def test_what_is_entered_twice_is_left_twice() -> None:
    """A batch looks into the cache, which is inside on its own account; the fork still waits for the batch."""
    me = threading.get_ident()
    with forks.native():
        with forks.native():
            pass
        assert me in forks._forks.inside
    assert me not in forks._forks.inside


def test_a_thread_that_is_inside_does_not_wait_for_the_fork_that_waits_for_it() -> None:
    state = forks._Forks()
    state.enter()
    state.closed_by = -1
    state.enter()
    assert state.inside == {threading.get_ident(): 2}


def test_every_batch_of_the_encoder_keeps_a_fork_waiting(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[bool] = []
    encode = Encoder.encode

    def spy(encoder: Encoder, *arguments: Any) -> Any:
        inside.append(threading.get_ident() in forks._forks.inside)
        return encode(encoder, *arguments)

    monkeypatch.setattr(Encoder, "encode", spy)
    for cache in (None, tmp_path):
        KaLMReranker(checkpoint, device="cpu", cache=cache).rank("q", [f"passage {number}" for number in range(5)])
    assert inside
    assert all(inside)
    assert threading.get_ident() not in forks._forks.inside


def test_each_thread_of_a_child_computes_alone(checkpoint: Path, tmp_path: Path) -> None:
    """The first call comes from another thread than the one that forked, which has the parent's number of threads."""
    log = run(
        """
logging.basicConfig()
reranker = KaLMReranker(model, device="cpu", cache=None)
reranker.rank("how to sort", passages)
torch.mm(torch.ones(600, 600), torch.ones(600, 600))
def child():
    other = threading.Thread(target=reranker.rank, args=("how to sort", passages[:3]))
    other.start()
    other.join()
    hits = reranker.rank("how to sort", [f"new {text}" for text in passages])
    return len(hits) == len(passages) and torch.get_num_threads() == 1
assert in_child(child)
""",
        checkpoint,
        tmp_path,
    )
    assert log.count("computes with one thread instead of 2") == 1
