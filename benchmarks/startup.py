"""Start-up costs, each in a fresh process: `import kalm_rag`, `kalm-rag --help`, and loading.

Caveats first: times are of a warm file cache and vary with the machine's load; compare them within one run.
Loading uses random weights in the geometry of KaLM-Reranker-V1-Nano with a vision tower of the released size (about
417M parameters), stored in bfloat16 as the released files are. "stock" is transformers' own loading of the same file.
"replica" is kalm-rag in a process whose passages are encoded already: it loads the decoder alone.

    python benchmarks/startup.py [--repeats 5] [--small]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from report import environment, print_table

_LOAD = """
import json, sys, time, torch, transformers
from kalm_rag import KaLMReranker
def status(name):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
kind, folder, dtype, cache = sys.argv[1:]
before, own, start = status("VmRSS"), status("RssAnon"), time.perf_counter()
if kind == "stock":
    model = transformers.T5Gemma2ForConditionalGeneration.from_pretrained(folder, dtype=getattr(torch, dtype))
    seconds = time.perf_counter() - start
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        model(input_ids=ids, decoder_input_ids=ids)
else:
    kept = cache if kind == "replica" else None
    reranker = KaLMReranker(folder, device="cpu", dtype=dtype, cache=kept, score_memory=0)
    reranker.load(encoder=kind != "replica")
    seconds = time.perf_counter() - start
    reranker.rank("first query", ["a passage"])
    assert reranker.scorer.states.encoder.is_ready == (kind != "replica")
first = time.perf_counter() - start
peak, held = status("VmHWM") - before, status("RssAnon") - own
print(json.dumps({"seconds": seconds, "first": first, "peak": peak, "held": held}))
"""


def wall(command: list[str], repeats: int) -> list[float]:
    """Seconds of a whole process, `repeats` times."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True)
        times.append(time.perf_counter() - start)
    return times


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--small", action="store_true", help="small checkpoint: checks the script in seconds")
    options = parser.parse_args()
    import torch

    from kalm_rag import KaLMReranker
    from kalm_rag.testing import NANO, TINY, Vision, build_checkpoint

    vision = None if options.small else Vision(1152, 4304, 27, 16, 896, 14)
    raw: dict[str, object] = {}
    rows = []
    commands = {
        "python -c pass": [sys.executable, "-c", "pass"],
        "import kalm_rag": [sys.executable, "-c", "import kalm_rag"],
        "kalm-rag --help": [sys.executable, "-m", "kalm_rag", "--help"],
        "import torch, transformers": [sys.executable, "-c", "import torch, transformers"],
    }
    for name, command in commands.items():
        times = raw[name] = wall(command, options.repeats)
        rows.append([name, f"{statistics.median(times):.3f}", f"{max(times):.3f}", "", "", ""])
    with tempfile.TemporaryDirectory() as folder:
        geometry = TINY if options.small else NANO
        build_checkpoint(folder, geometry=geometry, vision=vision, vocabulary=1024, dtype=torch.bfloat16)
        size = (Path(folder) / "model.safetensors").stat().st_size
        for dtype in ("float32",) if options.small else ("float32", "bfloat16"):
            cache = str(Path(folder) / f"cache-{dtype}")
            with KaLMReranker(folder, device="cpu", dtype=dtype, cache=cache) as reranker:
                reranker.encode(["a passage"])
            for kind in ("kalm-rag", "replica", "stock"):
                runs = []
                for _ in range(min(options.repeats, 3)):
                    command = [sys.executable, "-c", _LOAD, kind, folder, dtype, cache]
                    runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
                raw[f"load {dtype} {kind}"] = runs
                seconds = [run["seconds"] for run in runs]
                first = statistics.median(run["first"] for run in runs)
                peak, held = (statistics.median(run[name] for run in runs) for name in ("peak", "held"))
                rows.append(
                    [
                        f"load {dtype}, {kind}",
                        f"{statistics.median(seconds):.3f}",
                        f"{max(seconds):.3f}",
                        f"{first:.3f}",
                        f"{peak / 1e6:.0f}",
                        f"{held / 1e6:.0f}",
                    ]
                )
    print(f"checkpoint file: {size / 1e6:.0f} MB in bfloat16, vision tower included")
    print_table(["what", "median s", "max s", "to first score s", "peak MB", "held MB"], rows)
    print(json.dumps({"environment": environment(), "file_bytes": size, "samples": raw}))


if __name__ == "__main__":
    main()
