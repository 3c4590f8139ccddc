"""Mixed load for minutes: no request fails, and memory stays bounded. `make soak` runs it for 30 minutes."""

from __future__ import annotations

import json
import random
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from kalm_rag.demo_data import load_demo

ROOT = Path(__file__).parents[2]


def test_soak(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    minutes = float(request.config.getoption("--soak"))
    if not minutes:
        pytest.skip("runs under `make soak`, or with --soak MINUTES")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import serve as bench

    texts = list(load_demo().passages.values())
    statuses: dict[int, int] = {}
    faults: list[str] = []
    sizes: list[int] = []
    end = time.monotonic() + 60 * minutes
    lock = threading.Lock()

    def client(number: int, url: str) -> None:
        draw = random.Random(number)
        with httpx.Client(timeout=120) as http:
            while time.monotonic() < end:
                documents = draw.sample(texts, draw.choice([1, 3, 10, 30]))
                query = f"question {draw.random()} of {number}"
                kind = draw.randrange(8)
                try:
                    if kind == 0:  # leaves before the answer
                        documents = [f"{text} {draw.random()}" for text in documents]
                        http.post(f"{url}/v2/rerank", json={"query": query, "documents": documents}, timeout=0.05)
                        continue
                    if kind == 1:
                        response = http.post(
                            f"{url}/v1/encode", json={"documents": [f"{documents[0]} {draw.random()}"]}
                        )
                    elif kind == 2:
                        response = http.post(f"{url}/rerank", content=json.dumps({"query": query, "texts": 5}))
                    elif kind == 3:
                        response = http.post(f"{url}/v1/forget", json={"documents": documents[:1]})
                    elif kind == 4:
                        body = {"query": query, "documents": documents, "budget_ms": 50, "ratio": draw.choice([4, 8])}
                        response = http.post(f"{url}/rerank", json=body)
                    else:
                        response = http.post(f"{url}/v2/rerank", json={"query": query, "documents": documents})
                    with lock:
                        statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
                except httpx.TimeoutException:
                    pass
                except httpx.HTTPError as error:
                    faults.append(repr(error))

    with bench.server("mini", str(tmp_path / "cache"), "--max-waiting", "4", "--prefill-memory", "100MB") as (
        port,
        process,
    ):
        url = f"http://127.0.0.1:{port}"
        threads = [threading.Thread(target=client, args=(number, url)) for number in range(6)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            sizes.append(bench.resident(process))
            time.sleep(1.0)
        for thread in threads:
            thread.join()
        stats = httpx.get(f"{url}/v1/stats", timeout=60).json()
    sizes_of_caches = (stats["cache"]["memory"]["size"], stats["prefilled"]["size"], stats["scores"]["size"])
    allowed = sum(size["limit"] for size in sizes_of_caches)
    first, most, end_size = sizes[0], max(sizes), sizes[-1]
    megabytes = [f"{size / 1e6:.0f}" for size in (first, most, end_size, allowed)]
    print(
        f"\nsoak: {statuses} in {minutes} minutes; memory in MB: {megabytes[0]} at first, {megabytes[1]} at most, "
        f"{megabytes[2]} at last, of which caches may take {megabytes[3]}"
    )
    assert faults == []
    assert set(statuses) <= {200, 422, 429, 503}
    assert statuses[200] > 10
    assert stats["queue"] == {"running": 0, "waiting": 0}
    # Half as much again for what the allocator keeps, and room for 16 requests that run.
    assert most < first + 1.5 * allowed + 200e6
