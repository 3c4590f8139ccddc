"""The page at `/` in a real Chromium: what it shows, of whom it asks, and that it can be used in every way."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import uvicorn
from starlette.testclient import TestClient

from kalm_rag import KaLMReranker
from kalm_rag.serving.app import create_app
from kalm_rag.serving.keys import Keys
from kalm_rag.serving.limits import Limits
from kalm_rag.serving.page import ASSETS

CHROMIUM = shutil.which("chromium")
KEY = "k" * 32
QUERY = "What is the capital of China?"
DOCUMENTS = ["Gravity attracts bodies toward one another.", "The capital of China is Beijing."]
HOSTILE = (
    "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> "
    "'it' \"is\" \\ $HOME `id` <b>bold</b>"
)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None or importlib.util.find_spec("playwright") is None,
    reason="needs Debian's chromium and the package playwright",
)


@contextlib.contextmanager
def listening(mini: KaLMReranker, **arguments: Any) -> Iterator[str]:
    """Serve on a free port; the address."""
    server = uvicorn.Server(uvicorn.Config(create_app(mini, **arguments), port=0, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def address(mini: KaLMReranker) -> Iterator[str]:
    with listening(mini) as found:
        yield found


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        with contextlib.closing(browser):
            yield browser


@dataclass
class Seen:
    """What a page did: addresses that it asked for, and complaints of the browser."""

    asked: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


@contextlib.contextmanager
def opened(chromium: Any, address: str, refusals: int = 0, **context: Any) -> Iterator[Any]:
    """A page whose requests stay with its server and which has nothing to complain of, save refusals that are meant."""
    seen = Seen()
    tab = chromium.new_context(**context)
    tab.set_default_timeout(20_000)
    try:
        page = tab.new_page()
        page.on("request", lambda request: seen.asked.append(request.url))
        page.on(
            "console", lambda told: seen.complaints.append(told.text) if told.type in ("error", "warning") else None
        )
        page.on("pageerror", lambda error: seen.complaints.append(str(error)))
        page.goto(address)
        yield page
    finally:
        tab.close()
    assert {re.match(r"https?://[^/]*", url)[0] for url in seen.asked} == {address}
    assert len(seen.complaints) == refusals, seen.complaints


def rank(page: Any, query: str = QUERY, documents: list[str] = DOCUMENTS) -> list[str]:
    """Rank, and return the texts in the order shown."""
    page.get_by_label("Query").fill(query)
    page.get_by_label("Passages", exact=True).fill("\n\n".join(documents))
    page.get_by_role("button", name="Rank", exact=True).click()
    wait_for_status(page, "Ranked")
    return [text.strip() for text in page.locator("#ranking .text").all_text_contents()]


def wait_for_status(page: Any, word: str) -> None:
    page.wait_for_function("word => document.getElementById('status').textContent.startsWith(word)", arg=word)


class TestWithoutBrowser:
    def test_nothing_of_it_is_from_elsewhere_or_inline(self, server: TestClient) -> None:
        response = server.get("/")
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        named = re.findall(r'(?:href|src)="([^"]+)"', response.text)
        assert not [name for name in named if ":" in name or name.startswith("/")]
        assert not re.search(r"<style|<script>|\bstyle=|\bon\w+=", response.text)
        for name in ASSETS:
            asset = server.get(f"/assets/{name}")
            assert asset.status_code == 200
            assert asset.headers["content-type"].startswith(("text/css", "text/javascript", "image/svg+xml"))
            assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b", asset.text)

    @pytest.mark.parametrize("path", ["/assets/", "/assets/index.py", "/assets/../app.py", "/assets/%2e%2e/app.py"])
    def test_no_other_file(self, path: str, server: TestClient) -> None:
        assert server.get(path).status_code == 404

    def test_the_page_needs_no_key(self, mini: KaLMReranker) -> None:
        with TestClient(create_app(mini, keys=Keys([KEY]))) as client:
            for path in ("/", "/assets/demo.json", *(f"/assets/{name}" for name in ASSETS)):
                assert client.get(path).status_code == 200
            assert client.get("/info").status_code == 401

    def test_a_demo_query_has_its_answer_among_as_many_passages(self, server: TestClient) -> None:
        from kalm_rag.demo_data import load_demo

        corpus, demo = load_demo(), server.get("/assets/demo.json").json()
        assert sorted(demo["passages"]) == sorted(corpus.passages.values())
        names = {text: name for name, text in corpus.queries.items()}
        for query, passage in zip(demo["queries"], demo["passages"], strict=False):
            [relevant] = corpus.qrels[names[query]]
            assert corpus.passages[relevant] == passage
        assert not [text for text in demo["passages"] if re.search(r"\n\s*\n", text)]  # it would become two


@needs_chromium
class TestPage:
    def test_the_ranking_is_that_of_the_library(self, chromium: Any, address: str, mini: KaLMReranker) -> None:
        documents = [*DOCUMENTS, "Bread is baked from flour. " * 400]
        with opened(chromium, address) as page:
            assert rank(page, documents=documents)[0] == DOCUMENTS[1]
            boxes = page.locator("#ranking .box").all_text_contents()
            expected = mini.rank(QUERY, [text.strip() for text in documents])
            assert len(boxes) == len(expected) == 3
            for box, hit in zip(boxes, expected, strict=True):
                [score] = re.findall(r"P\(yes\)(-?\d+\.\d{4})", box)
                [margin] = re.findall(r"Margin(-?\d+\.\d\d)", box)
                assert float(score) == pytest.approx(hit.score, abs=1e-4)
                assert float(margin) == pytest.approx(hit.margin, abs=1e-2)
                assert ("truncated" in box) == hit.passage_truncated
            assert any(hit.passage_truncated for hit in expected)
            assert re.search(r"On the server\d+(\.\d)? ms", page.locator("#summary").text_content())
            assert "passage 2 is best" in page.get_by_role("status").first.text_content()
            # A long passage is short at first, and shown whole on demand.
            page.get_by_role("button", name="Show all of passage 3").click()
            assert page.get_by_role("button", name="Show less of passage 3").get_attribute("aria-expanded") == "true"

    def test_the_level_of_each_passage(self, chromium: Any, address: str) -> None:
        known, new = "A passage of the page that is known.", f"A new passage of the page, {time.monotonic()}."
        with opened(chromium, address) as page:
            rank(page, "first", [known])
            rank(page, f"second {time.monotonic()}", [known, new])
            items = page.locator("#ranking > li").all_text_contents()
            sources = {known in item: re.search(r"From(\w+)", item)[1] for item in items}
            assert sources == {True: "memory", False: "encoded"}
            rank(page, page.get_by_label("Query").input_value(), [known, new])
            assert page.locator("#ranking .box").filter(has_text="score known").count() == 2

    def test_ratios_side_by_side(self, chromium: Any, address: str, mini: KaLMReranker) -> None:
        with opened(chromium, address) as page:
            for ratio in ("1", "32"):
                page.get_by_label(ratio, exact=True).check()
            page.get_by_label("4", exact=True).uncheck()
            rank(page)
            for ratio, box in zip((1, 32), page.locator("#ranking > li").first.locator(".box").all(), strict=True):
                hits = {hit.index: hit for hit in mini.rank(QUERY, DOCUMENTS, ratio=ratio)}
                assert f"Ratio {ratio}: place" in box.text_content()
                assert f"Margin{hits[1].margin:.2f}" in box.text_content()
            assert page.locator("#summary h3").all_text_contents() == ["Ratio 1", "Ratio 32"]
            assert "At ratio 1" in page.locator("#code-note").text_content()
            assert wrapped(page) == []

    def test_hostile_text_is_text(self, chromium: Any, address: str) -> None:
        with opened(chromium, address) as page:
            shown = rank(page, HOSTILE, [HOSTILE, "</textarea></pre>" + HOSTILE])
            assert HOSTILE in shown
            assert "</textarea></pre>" + HOSTILE in shown
            assert page.title() != "owned"
            assert page.locator("main img, main b, #ranking script, #code *").count() == 0

    def test_the_code_does_the_same(self, chromium: Any, address: str) -> None:
        with opened(chromium, address) as page:
            best = rank(page, "What is 'it'?\t“é𝄞”", [*DOCUMENTS, HOSTILE + "\nnext line é𝄞 \u2028"])
            order = [
                int(re.search(r"passage (\d+)", text)[1]) - 1 for text in page.locator(".place").all_text_contents()
            ]
            assert len(best) == 3
            codes = {}
            for language in ("curl", "Python", "JavaScript"):
                page.get_by_label(language).check()
                codes[language] = page.locator("#code").text_content()
            told: list[str] = []
            page.on("console", lambda message: told.append(message.text))
            page.evaluate(f"async () => {{ {codes['JavaScript']} }}")
        assert [int(line.split()[0]) for line in told] == order
        run = {"capture_output": True, "check": True, "timeout": 60}
        lines = subprocess.run([sys.executable, "-c", codes["Python"]], **run).stdout.decode().splitlines()
        assert [int(line.split()[0]) for line in lines] == order
        if shutil.which("curl"):
            answer = json.loads(subprocess.run(["sh", "-c", codes["curl"]], **run).stdout)
            assert [result["index"] for result in answer["results"]] == order

    def test_copying(self, chromium: Any, address: str) -> None:
        with opened(chromium, address, permissions=["clipboard-read", "clipboard-write"]) as page:
            page.get_by_role("button", name="Copy").click()
            page.get_by_text("Copied.").wait_for()
            copied = page.evaluate("navigator.clipboard.readText()")
            assert copied == page.locator("#code").text_content()
            # Where the browser gives no clipboard, the code is selected.
            page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
            page.get_by_role("button", name="Copy").click()
            page.get_by_text("press Ctrl+C").wait_for()
            assert page.evaluate("getSelection().toString()").strip() == copied.strip()

    def test_with_the_keyboard_alone(self, chromium: Any, address: str) -> None:
        with opened(chromium, address) as page:
            names, outlines = [], []
            for _ in range(60):
                page.keyboard.press("Tab")
                name, outline = page.evaluate(
                    "() => { const own = document.activeElement; "
                    "return [own.id || own.value || own.textContent, getComputedStyle(own).outlineStyle]; }"
                )
                if name in names or own_body(page):
                    break
                names.append(name)
                outlines.append(outline)
                if name == "query":
                    page.keyboard.type(QUERY)
                if name == "passages":
                    page.keyboard.type(DOCUMENTS[0])
                    page.keyboard.press("Enter")
                    page.keyboard.press("Enter")
                    page.keyboard.type(DOCUMENTS[1])
                if name == "ratio-1":
                    page.keyboard.press("Space")
                if name == "rank":
                    page.keyboard.press("Enter")
                    wait_for_status(page, "Ranked")
            expected = ["query", "passages", "demo-some", "demo-all", "ratio-1", "ratio-32", "rank", "copy", "code"]
            assert [name for name in names if name in expected] == expected
            assert "none" not in outlines  # the focus is seen
            assert page.locator("#ranking > li").first.locator(".box").count() == 2
            assert DOCUMENTS[1] in page.locator("#ranking > li").first.text_content()

    def test_every_control_has_a_name(self, chromium: Any, address: str) -> None:
        with opened(chromium, address) as page:
            page.get_by_text("More options").click()
            rank(page)
            unnamed = page.evaluate(
                "() => [...document.querySelectorAll('input, textarea, select')]"
                ".filter((own) => own.labels.length === 0).map((own) => own.id)"
            )
            assert unnamed == []
            assert page.locator("html[lang=en]").count() == page.get_by_role("main").count() == 1
            assert [page.locator(f"#{name}").get_attribute("role") for name in ("status", "error")] == [
                "status",
                "alert",
            ]
            levels = page.evaluate("() => [...document.querySelectorAll('h1, h2, h3')].map((own) => +own.tagName[1])")
            assert all(after <= before + 1 for before, after in zip([0, *levels], levels, strict=False))

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_narrow_and_in_contrast(self, scheme: str, chromium: Any, address: str) -> None:
        context = {"viewport": {"width": 390, "height": 800}, "color_scheme": scheme}
        with opened(chromium, address, **context) as page:
            page.get_by_text("More options").click()
            for ratio in ("1", "32"):
                page.get_by_label(ratio, exact=True).check()
            rank(page, "x" * 300, ["y" * 500, HOSTILE, "Bread is baked from flour. " * 400])
            page.evaluate("() => { for (const own of document.querySelectorAll('[hidden]')) own.hidden = false; }")
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= 390
            assert wrapped(page) == []
            worst = page.evaluate(CONTRAST)
            assert len(worst) > 30
            assert min(ratio for ratio, _ in worst) >= 4.5, sorted(worst)[:3]
            paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (sum(map(int, re.findall(r"\d+", paper))) < 200) == (scheme == "dark")

    def test_a_key(self, chromium: Any, mini: KaLMReranker) -> None:
        with listening(mini, keys=Keys([KEY])) as address, opened(chromium, address, refusals=2) as page:
            page.get_by_label("API key").wait_for()
            assert page.evaluate("document.activeElement.id") == "key"
            page.keyboard.type("wrong" * 8)
            page.keyboard.press("Enter")
            page.get_by_text("The server does not know this key").wait_for()
            page.keyboard.type(KEY)
            page.keyboard.press("Enter")
            page.get_by_text("Model: mini").wait_for()
            assert page.get_by_label("API key").is_hidden()
            assert rank(page)[0] == DOCUMENTS[1]
            for language in ("curl", "Python", "JavaScript"):
                page.get_by_label(language).check()
                code = page.locator("#code").text_content()
                assert "KALM_RAG_API_KEY" in code
                assert KEY not in code
            stored = page.evaluate("() => [Object.values(sessionStorage), localStorage.length, document.cookie]")
            assert stored == [[KEY], 0, ""]
            page.reload()
            page.get_by_text("Model: mini").wait_for()

    def test_faults_are_told(self, chromium: Any, mini: KaLMReranker) -> None:
        limits = Limits(characters=100)
        with listening(mini, limits=limits) as address, opened(chromium, address, refusals=1) as page:
            page.get_by_label("Query").fill(QUERY)
            page.get_by_label("Passages", exact=True).fill(" ")
            page.get_by_role("button", name="Rank", exact=True).click()
            assert "There is no passage" in page.get_by_role("alert").text_content()
            page.get_by_text("More options").click()
            page.get_by_label("Instruction").fill("x" * 101)
            page.get_by_label("Passages", exact=True).fill(DOCUMENTS[0])
            page.get_by_role("button", name="Rank", exact=True).click()
            page.get_by_text("413").wait_for()
            assert "instruction" in page.get_by_role("alert").text_content()
            page.get_by_label("Instruction").fill("")
            assert rank(page)[0] == DOCUMENTS[1]
            assert page.get_by_role("alert").count() == 0

    def test_the_demo(self, chromium: Any, address: str) -> None:
        with opened(chromium, address) as page:
            page.get_by_role("button", name="Load 20 demo passages").click()
            wait_for_status(page, "Loaded 20 passages")
            page.get_by_role("button", name="Rank", exact=True).click()
            wait_for_status(page, "Ranked 20 passages")
            assert page.locator("#ranking > li").count() == 20
            assert page.locator("#demo-queries option").count() == 20

    def test_what_a_budget_leaves_out(self, chromium: Any, address: str) -> None:
        with opened(chromium, address) as page:
            page.get_by_text("More options").click()
            page.get_by_label("Budget in milliseconds").fill("1")
            rank(
                page, documents=[f"Passage {number} that nobody has read, {time.monotonic()}." for number in range(40)]
            )
            assert page.locator("#ranking > li").count() == 40
            assert page.locator("#ranking .box").filter(has_text="Not scored: the budget ended.").count() > 0


def own_body(page: Any) -> bool:
    """Whether the focus has left the page."""
    return bool(page.evaluate("document.activeElement === document.body"))


def wrapped(page: Any) -> list[str]:
    """Facts whose value does not fit on a line."""
    return page.evaluate(
        "() => [...document.querySelectorAll('dd')].filter((own) => own.scrollWidth > own.clientWidth || "
        "own.parentElement.scrollWidth > own.parentElement.clientWidth).map((own) => own.textContent)"
    )


# The contrast of each text with what is behind it, as WCAG 2 defines it.
CONTRAST = """() => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (text) => {
    const [red, green, blue] = numbers(text).map((part) => {
      const share = part / 255;
      return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue;
  };
  const behind = (own) => {
    for (let part = own; part; part = part.parentElement) {
      const color = getComputedStyle(part).backgroundColor;
      if (numbers(color)[3] !== 0) return color;
    }
    throw new Error("nothing is behind it");
  };
  return [...document.querySelectorAll("body *")]
    .filter((own) => [...own.childNodes].some((part) => part.nodeType === 3 && part.data.trim() !== ""))
    .filter((own) => !["SCRIPT", "OPTION", "NOSCRIPT"].includes(own.tagName))
    .map((own) => {
      const both = [light(getComputedStyle(own).color), light(behind(own))];
      return [(Math.max(...both) + 0.05) / (Math.min(...both) + 0.05), own.outerHTML.slice(0, 80)];
    });
}"""
