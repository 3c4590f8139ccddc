"""Predictions of `kalm-rag size` against measurements: bytes of a folder and of Redis, and reading candidates.

Folders of 1,000, 10,000 and 100,000 synthetic entries are filled; bytes are predicted by `kalm_rag.sizing`, the time to
read a query's candidates by what it takes in the smallest folder. Then small entries show that a look-up takes the same
time in a folder of 1,000 and of 1,000,000. Redis is measured if `redis-server` is installed.

    python benchmarks/sizing.py [--bytes 38600] [--candidates 50] [--most 1000000] [--small] [--output FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from report import environment, print_table

from kalm_rag.cache import DiskStore, PassageCache
from kalm_rag.cache.frame import Frame
from kalm_rag.sizing import folder_bytes, redis_bytes

_AT_ONCE = 500
_ROUNDS = 41


def key_of(number: int) -> str:
    """The key of an entry."""
    return hashlib.sha256(f"entry {number}".encode()).hexdigest()


def entry(number: int, size: int) -> bytes:
    """A frame of about so many bytes that verifies."""
    key = key_of(number)
    width = max(1, (size - 132) // 4)
    payload = (bytes.fromhex(key) * (width // 8 + 1))[: 4 * width]
    return Frame(key, bytes(32), "float32", 1, 1, 1, width, False, False, memoryview(payload)).to_bytes()


def on_disk(folder: Path) -> int:
    """Bytes of all blocks below a folder, the write-ahead log apart."""
    files = [Path(place) / name for place, _, names in os.walk(folder) for name in names]
    return sum(file.stat().st_blocks * 512 for file in files if not file.name.endswith(("-wal", "-shm")))


def fill(folder: Path, first: int, count: int, size: int) -> None:
    """Add entries to a folder."""
    store = DiskStore(folder, limit=10**13)
    for start in range(first, count, _AT_ONCE):
        store.put_many({key_of(number): entry(number, size) for number in range(start, min(count, start + _AT_ONCE))})
    store.close()


def look_up(folder: Path, count: int, candidates: int) -> float:
    """Milliseconds to read and verify random candidates, median."""
    chooser = random.Random(0)
    cache = PassageCache(folder, memory=0, read_only=True)
    taken = []
    for _ in range(_ROUNDS):
        keys = [key_of(number) for number in chooser.sample(range(count), candidates)]
        start = time.perf_counter()
        found = cache.get_many("states", keys, lambda frame: frame)
        taken.append(1000 * (time.perf_counter() - start))
        assert len(found) == candidates
    cache.close()
    return median(taken[1:])


@contextlib.contextmanager
def redis_server() -> Iterator[str | None]:
    """A server of its own on a free port, or None where it is not installed."""
    if shutil.which("redis-server") is None:
        yield None
        return
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    command = ["redis-server", "--port", str(port), "--save", "", "--appendonly", "no", "--loglevel", "warning"]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 10
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 0.2):
                break
            time.sleep(0.05)
        yield f"redis://127.0.0.1:{port}/0"
    finally:
        server.terminate()
        server.wait()


def in_redis(url: str, count: int, size: int) -> tuple[int, int]:
    """Bytes that entries take in a server's memory: predicted, and measured."""
    import redis

    from kalm_rag.cache.remote.redis_store import RedisStore

    client = redis.Redis.from_url(url)
    client.flushall()
    empty = int(client.info("memory")["used_memory"])
    store = RedisStore(url, "kalm-rag:default:0123456789abcdef:")
    for start in range(0, count, _AT_ONCE):
        store.put_many({key_of(number): entry(number, size) for number in range(start, min(count, start + _AT_ONCE))})
    used = int(client.info("memory")["used_memory"]) - empty
    store.close()
    return redis_bytes((len(entry(0, size)),), count), used


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=38_600, help="of an entry, such as states of 300 tokens of mini")
    parser.add_argument("--candidates", type=int, default=50)
    parser.add_argument("--most", type=int, default=1_000_000, help="small entries")
    parser.add_argument("--small", action="store_true", help="few entries: checks the script")
    parser.add_argument("--output", type=Path, help="write JSON here too")
    options = parser.parse_args()
    counts, sizes = [1_000, 10_000, 100_000], {1_000: options.bytes, 10_000: options.bytes, 100_000: 2_000}
    growth = [number for number in (1_000, 10_000, 100_000, 1_000_000) if number <= options.most]
    if options.small:
        counts, sizes, growth = [200, 400], {200: 2_000, 400: 2_000}, [200, 400]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        for size in dict.fromkeys(sizes.values()):
            predicted_ms: float | None = None
            folder, held = Path(place) / str(size), 0
            # The smallest folder tells what a look-up takes, and the formula says that it stays the same.
            for count in sorted({counts[0], *(number for number in counts if sizes[number] == size)}):
                fill(folder, held, count, size)
                held = count
                measured_ms = look_up(folder, count, options.candidates)
                predicted_ms = measured_ms if predicted_ms is None else predicted_ms
                measured, predicted = on_disk(folder), folder_bytes((len(entry(0, size)),), count)
                rows.append(
                    {
                        "entries": count,
                        "entry_bytes": size,
                        "bytes": measured,
                        "predicted_bytes": predicted,
                        "bytes_ratio": predicted / measured,
                        "look_up_ms": measured_ms,
                        "predicted_ms": predicted_ms,
                        "time_ratio": predicted_ms / measured_ms,
                    }
                )
            shutil.rmtree(folder)
        flat: list[dict[str, Any]] = []
        folder, held = Path(place) / "growth", 0
        for count in growth:
            fill(folder, held, count, 300)
            held = count
            flat.append({"entries": count, "look_up_ms": look_up(folder, count, options.candidates)})
    redis_rows: list[dict[str, Any]] = []
    with redis_server() as url:
        if url is not None:
            for size, count in ((300, counts[0]), (options.bytes, counts[0]), (2_000, counts[-1] // 10)):
                predicted, used = in_redis(url, count, size)
                row = {"entries": count, "entry_bytes": size, "bytes": used, "predicted_bytes": predicted}
                redis_rows.append({**row, "ratio": predicted / used})
    print("A folder")
    print_table(
        ["entries", "bytes each", "predicted MB", "measured MB", "ratio", "predicted ms", "measured ms", "ratio"],
        [
            [
                f"{row['entries']:,}", f"{row['entry_bytes']:,}", f"{row['predicted_bytes'] / 1e6:.2f}",
                f"{row['bytes'] / 1e6:.2f}", f"{row['bytes_ratio']:.3f}", f"{row['predicted_ms']:.2f}",
                f"{row['look_up_ms']:.2f}", f"{row['time_ratio']:.2f}",
            ]
            for row in rows
        ],
    )  # fmt: skip
    print(f"\nReading {options.candidates} small entries from a folder that grows")
    print_table(["entries", "ms"], [[f"{row['entries']:,}", f"{row['look_up_ms']:.2f}"] for row in flat])
    if redis_rows:
        print("\nRedis")
        print_table(
            ["entries", "bytes each", "predicted MB", "measured MB", "ratio"],
            [
                [
                    f"{row['entries']:,}", f"{row['entry_bytes']:,}", f"{row['predicted_bytes'] / 1e6:.2f}",
                    f"{row['bytes'] / 1e6:.2f}", f"{row['ratio']:.3f}",
                ]
                for row in redis_rows
            ],
        )  # fmt: skip
    found = {"environment": environment(), "folder": rows, "growth": flat, "redis": redis_rows}
    text = json.dumps(found)
    if options.output is not None:
        options.output.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
