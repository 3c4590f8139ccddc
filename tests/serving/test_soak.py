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
_WARM_SHARE = 0.3
"""Share of the time after which memory is expected to have settled."""


def test_soak(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    minutes = float(request.config.getoption("--soak"))
    if not minutes:
        pytest.skip("runs under `make soak`, or with --soak MINUTES")
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import serve as bench

    texts = list(load_demo().passages.values())
    statuses: dict[int, int] = {}
    faults: list[str] = []
    sizes: list[tuple[float, int]] = []
    began = time.monotonic()
    end = began + 60 * minutes
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

    with bench.server("mini", str(tmp_path / "cache"), "--max-waiting", "4") as (port, process):
        url = f"http://127.0.0.1:{port}"
        threads = [threading.Thread(target=client, args=(number, url)) for number in range(6)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            sizes.append((time.monotonic() - began, bench.resident(process)))
            time.sleep(1.0)
        for thread in threads:
            thread.join()
        last = httpx.get(f"{url}/v1/stats", timeout=60).json()["queue"]
    settled = [size for when, size in sizes if when > 60 * minutes * _WARM_SHARE]
    print(
        f"\nsoak: {statuses} in {minutes} minutes; memory {sizes[0][1] / 1e6:.0f} MB at first, "
        f"{settled[0] / 1e6:.0f} MB settled, {max(settled) / 1e6:.0f} MB at most, {settled[-1] / 1e6:.0f} MB at last"
    )
    assert faults == []
    assert set(statuses) <= {200, 422, 429, 503}
    assert statuses[200] > 10
    assert last == {"running": 0, "waiting": 0}
    assert max(settled) < 1.25 * settled[0] + 50e6
