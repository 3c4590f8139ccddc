"""Which thread computes on a CPU."""

from __future__ import annotations

import contextvars
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest
import torch

from kalm_rag.utils import computing
from kalm_rag.utils.computing import apart, compute

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch has two threads here, whatever the machine has."""
    monkeypatch.setattr(computing, "_LEAST_THREADS", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def test_the_main_thread_computes_by_itself() -> None:
    assert compute(threading.current_thread) is threading.main_thread()


def test_one_thread_computes_for_all_others() -> None:
    with ThreadPoolExecutor(4) as threads:
        callers = threading.Barrier(4)

        def call(_: int) -> tuple[threading.Thread, threading.Thread]:
            callers.wait(10)
            return threading.current_thread(), compute(threading.current_thread)

        found = list(threads.map(call, range(4)))
    own, computed = {a for a, _ in found}, {b for _, b in found}
    assert len(own) == 4
    assert len(computed) == 1
    assert not own & computed


def test_a_call_inside_of_another_one_stays_where_it_is() -> None:
    with ThreadPoolExecutor(1) as threads:
        outer, inner = threads.submit(
            compute, lambda: (threading.current_thread(), compute(threading.current_thread))
        ).result(10)
    assert outer is inner


def test_an_accelerator_is_used_from_the_callers_thread() -> None:
    with ThreadPoolExecutor(1) as threads:
        own = threads.submit(threading.current_thread).result(10)
        assert threads.submit(compute, threading.current_thread, torch.device("cuda")).result(10) is own
        assert threads.submit(apart, threading.current_thread, torch.device("cuda")).result(10) is own


def test_nothing_is_gained_with_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(compute, threading.current_thread).result(10) is threads.submit(
            threading.current_thread
        ).result(10)


@pytest.mark.parametrize("where", ["compute", "apart"])
def test_context_and_exceptions_are_those_of_the_caller(where: str) -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)

    def run(action: object) -> object:
        return compute(action) if where == "compute" else apart(action, CPU)  # type: ignore[arg-type]

    def fail() -> None:
        msg = f"{variable.get()}"
        raise LookupError(msg)

    def call() -> None:
        variable.set(7)
        assert run(variable.get) == 7
        with pytest.raises(LookupError, match="7"):
            run(fail)
        assert run(lambda: 1) == 1  # it goes on after a failure

    with ThreadPoolExecutor(1) as threads:
        threads.submit(call).result(10)


def test_a_thread_of_its_own_ends_with_the_call() -> None:
    thread = apart(threading.current_thread, CPU)
    assert thread is not threading.main_thread()
    assert not thread.is_alive()


def test_the_common_thread_ends_when_it_is_idle_and_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(computing, "_IDLE_SECONDS", 0.05)
    monkeypatch.setattr(computing, "_common", computing._Common())
    with ThreadPoolExecutor(1) as threads:
        first = threads.submit(compute, threading.current_thread).result(10)
        first.join(10)
        assert not first.is_alive()
        assert threads.submit(compute, threading.current_thread).result(10) is not first


def test_without_room_for_a_thread_the_caller_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(self: threading.Thread) -> None:
        msg = "can't start new thread"
        raise RuntimeError(msg)

    monkeypatch.setattr(computing, "_common", computing._Common())
    with ThreadPoolExecutor(1) as threads:
        own = threads.submit(threading.current_thread).result(10)
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_room)
            assert threads.submit(compute, threading.current_thread).result(10) is own
            assert threads.submit(apart, threading.current_thread, CPU).result(10) is own
        assert threads.submit(compute, threading.current_thread).result(10) is not own


def test_what_was_given_up_before_it_began_is_not_computed() -> None:
    """As after an interrupt: the wait of `run` ends early."""
    began, go, ran = threading.Event(), threading.Event(), []

    def first() -> None:
        began.set()
        go.wait(10)

    with ThreadPoolExecutor(2) as threads:
        running = threads.submit(compute, first)
        assert began.wait(10)
        future: Future[None] = Future()
        with computing._common._changed:
            computing._common._waiting.append((future, lambda: ran.append(1)))
        future.cancel()
        last = threads.submit(compute, lambda: ran.append(2))
        go.set()
        running.result(10)
        last.result(10)
    assert ran == [2]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the threads of the system in /proc")
def test_threads_that_call_have_no_workers() -> None:
    """Workers of a second thread would make all wait; only those of the common one are there."""
    code = """
        import os, tempfile, threading
        import torch
        torch.set_num_threads(2)
        from kalm_rag import KaLMReranker, PassageCache

        tasks = lambda: set(os.listdir("/proc/self/task"))
        found, go = [], threading.Event()

        def texts_of(name):
            return [f"{name} {number} tells how cats sleep. " * 40 for number in range(6)]

        def call(folder, name, queries, ratio):
            with PassageCache(folder, storage="int8", keep="prefilled") as cache:
                with KaLMReranker("mini", device="cpu", cache=cache, ratio=ratio) as reranker:
                    for query in queries:
                        reranker.rank(query, texts_of(name))
                    cache.flush()
            found.append(None)
            go.wait(60)  # its workers would live as long as it does

        def run(*arguments):
            thread = threading.Thread(target=call, args=arguments)
            before, count = tasks(), len(found)
            thread.start()
            while len(found) == count and thread.is_alive():
                thread.join(0.05)
            assert len(found) == count + 1, "the call failed"
            names = {str(one.native_id): one.name for one in threading.enumerate()}
            return [names.get(one, "worker") for one in tasks() - before]

        with tempfile.TemporaryDirectory() as folder:
            first = run(folder, "passage", ["a query", "another"], 4)
            later = [
                run(folder, "passage", ["a third"], 4),
                run(folder, "passage", ["a fourth"], 16),
                run(folder, "chunk", ["a fifth"], 4),
            ]
        print("kalm-rag-compute" in first, [names.count("worker") for names in later])
        go.set()
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.stdout.strip() == "True [0, 0, 0]", ran.stdout + ran.stderr
