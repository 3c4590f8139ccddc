"""What the README and the documentation show runs as printed, page by page; nothing is defined outside of the page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pagekit
import pytest

from kalm_rag.model.checkpoint import ALIASES

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "docs/**/*.md", "integrations/*/README.md", "kalm_rag/mini/README.md")
    for path in ROOT.glob(pattern)
)
SHOWN = {"text", "diff", "json", "yaml"}
"""Languages of what a page shows and nobody runs: output, a change to the reader's own file."""

# Why a block may be skipped, and on which pages how many are. A new skip mark is a decision: it is entered here.
INSTALLS, DOWNLOADS = "installs packages", "downloads from the hub"
LONG, WEIGHTS = "takes half a minute", "needs the released weights"
ENGINE = "starts an engine"  # the programs in examples/ run it
OTHERS = "needs the run of another reranker"
SERVER = "needs a server"
SKIPPED = {
    "README.md": {INSTALLS: 2},
    "docs/frameworks/haystack.md": {INSTALLS: 1},
    "docs/frameworks/index.md": {SERVER: 1},
    "docs/frameworks/langchain.md": {INSTALLS: 1},
    "docs/frameworks/llama-index.md": {INSTALLS: 1},
    "docs/how-to/compare.md": {INSTALLS: 1},
    "docs/how-to/distributed.md": {INSTALLS: 1, ENGINE: 3},
    "docs/how-to/doctor.md": {LONG: 1, WEIGHTS: 1},
    "docs/how-to/evaluate.md": {INSTALLS: 2, DOWNLOADS: 1, LONG: 1, OTHERS: 1},
    "docs/how-to/offline.md": {DOWNLOADS: 1},
    "docs/how-to/serve.md": {INSTALLS: 2, ENGINE: 1, SERVER: 1},
    "docs/how-to/thresholds.md": {INSTALLS: 1},
    "docs/how-to/shared-tier.md": {INSTALLS: 1},
    "docs/how-to/tune.md": {INSTALLS: 1},
    "docs/index.md": {INSTALLS: 5},
    "integrations/haystack/README.md": {INSTALLS: 1},
    "integrations/langchain/README.md": {INSTALLS: 1},
    "integrations/llama-index/README.md": {INSTALLS: 1},
}


def test_every_fence_names_a_language_that_is_run_or_shown() -> None:
    """Else a block would be left out by a slip, such as a fence without a language."""
    wrong = [
        f"{page}:{block.line}: {block.language!r}"
        for page in PAGES
        for block in pagekit.blocks(ROOT / page)
        if block.language not in {*pagekit.RUN, *SHOWN}
    ]
    assert not wrong, f"fences name one of {sorted({*pagekit.RUN, *SHOWN})}"


def test_skipped_blocks_are_those_on_the_list() -> None:
    found = {
        page: dict(reasons)
        for page in PAGES
        if (reasons := Counter(block.skipped for block in pagekit.blocks(ROOT / page) if block.skipped is not None))
    }
    assert found == SKIPPED


def test_only_blocks_that_would_run_are_skipped() -> None:
    for page in PAGES:
        for block in pagekit.blocks(ROOT / page):
            assert block.skipped is None or block.language in pagekit.RUN, f"{page}:{block.line}"


@pytest.fixture(scope="module")
def hub(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache in which every alias is a small random checkpoint, in the layout that `huggingface_hub` writes."""
    home = tmp_path_factory.mktemp("hub")
    for repo in ALIASES.values():
        folder = home / "hub" / f"models--{repo.replace('/', '--')}"
        shutil.copytree(checkpoint, folder / "snapshots" / ("0" * 40))
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)
    return home


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, hub: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Future[subprocess.CompletedProcess[str]]]:
    """The selected pages, each in a process and a folder of its own, two at a time."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        # A page shows no use that a release of a framework deprecates.
        "PYTHONWARNINGS": "error::DeprecationWarning:__main__,error::FutureWarning:__main__",
        "HF_HOME": str(hub),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }

    def run(page: str, place: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(Path(pagekit.__file__)), str(ROOT / page)]
        own = {**environment, "KALM_RAG_CACHE": str(place / "cache")}
        return subprocess.run(
            command, cwd=place / "reader", env=own, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    pool = ThreadPoolExecutor(2)
    started = {}
    for item in request.session.items:
        page = getattr(item, "callspec", None) and item.callspec.params.get("page")
        if page in PAGES:
            place = tmp_path_factory.mktemp("page")
            (place / "reader").mkdir()
            started[page] = pool.submit(run, page, place)
    return started


@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(block.skipped is None for block in pagekit.blocks(ROOT / page))]
)
def test_page_runs(page: str, runs: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    done = runs[page].result()
    assert done.returncode == 0, done.stdout[-4000:]
    expected = sum(block.language in pagekit.RUN and not block.skipped for block in pagekit.blocks(ROOT / page))
    assert re.findall(r"^(\d+) blocks ran$", done.stdout, re.MULTILINE) == [str(expected)]
