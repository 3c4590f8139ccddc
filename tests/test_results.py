"""What the public calls return, and how it looks in a terminal and in a notebook."""

from __future__ import annotations

import copy
import html.parser
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError

import pytest

from kalm_rag.cache import CheckReport, MemoryStore, PassageCache, StoreStats
from kalm_rag.cache.stats import CacheStats, LevelCounters, LevelStats
from kalm_rag.cache.transfer import TransferReport
from kalm_rag.evaluation.entries import Entry
from kalm_rag.evaluation.experiment import SystemResult
from kalm_rag.evaluation.summary import Summary
from kalm_rag.evaluation.systems import System
from kalm_rag.results import EncodeReport, Estimate, PrefillCounters, PrefillStats, RankedPassage, Ranking
from kalm_rag.retrieval.corpus import Corpus
from kalm_rag.utils.display import Shown, short_repr, size_text
from kalm_rag.utils.machine import this_machine

HOSTILE = "<script>alert(1)</script> & \"'\x1b[2J\u202eabc \ud800 $x$"
SIZE = StoreStats(3, 1_234_567, 10_000_000_000)
RECORDS = [
    RankedPassage(1, 0.5, 0.0, "text"),
    EncodeReport(3, 2, 1),
    Estimate((10, 20, 30), 1_000_000, 25_000_000),
    PrefillStats(PrefillCounters(hits=7), SIZE),
    SIZE,
    LevelStats(LevelCounters(hits=4, bytes_read=5000), SIZE),
    CacheStats(LevelStats(LevelCounters(4), SIZE), LevelStats(LevelCounters(), SIZE), LevelCounters(), 9),
    CheckReport(5, 0, 0, 2, 2048),
    TransferReport(5, 4096, 0, 0, (), tuple(f"passages-{number}.safetensors" for number in range(100))),
]


def hit(index: int = 0, margin: float = 1.0, document: object = "text") -> RankedPassage[object]:
    return RankedPassage(index, 0.75, margin, document)


class Page(html.parser.HTMLParser):
    """The tags of a page, and its text cell by cell."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


class TestRanking:
    def test_it_is_the_list_of_its_passages(self) -> None:
        hits = [hit(number) for number in range(3)]
        ranking = Ranking(hits)
        assert ranking == hits
        assert isinstance(ranking, list)
        assert ranking[1] is hits[1]
        assert ranking[-1] is hits[2]
        assert [found.index for found in ranking] == [0, 1, 2]

    def test_a_slice_is_a_ranking(self) -> None:
        ranking = Ranking(hit(number) for number in range(3))
        assert type(ranking[:2]) is Ranking
        assert ranking[:2] == [hit(0), hit(1)]
        assert ranking[::-1] == [hit(2), hit(1), hit(0)]

    @pytest.mark.parametrize("again", [copy.copy, copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
    def test_copies_and_pickles_are_rankings(self, again: object) -> None:
        ranking = Ranking([hit(0), hit(1, document={"text": "b", "id": 7})])
        assert type(again(ranking)) is Ranking
        assert again(ranking) == ranking

    def test_its_repr_is_a_table_of_80_columns(self) -> None:
        ranking = Ranking([RankedPassage(12, 0.99421, 5.1349, "word " * 100), RankedPassage(3, 6.9e-7, -14.19, "b")])
        lines = repr(ranking).splitlines()
        assert lines == [
            "Ranking of 2 passages:",
            "rank   score  margin  index  document",
            "   1  0.9942    5.13     12  'word word word word word word word word word wor…'",
            "   2  0.0000  -14.19      3  'b'",
        ]
        assert max(map(len, lines)) == 80

    def test_a_long_one_says_how_many_it_does_not_show(self) -> None:
        ranking = Ranking(hit(number) for number in range(1000))
        assert len(repr(ranking).splitlines()) == 13
        assert repr(ranking).endswith("… and 990 more")
        assert Page(ranking._repr_html_()).rows[-1] == ["…", "and 980 more"]
        assert repr(Ranking()) == "Ranking of 0 passages"
        assert repr(Ranking([hit()])).startswith("Ranking of 1 passage:")

    def test_a_notebook_shows_a_row_a_passage_and_the_flags_that_are_set(self) -> None:
        ranking = Ranking([RankedPassage(1, 0.9, 2.2, {"text": "a\n b", "id": 1}, True), hit(0, 1.0, "c")])
        assert Page(ranking._repr_html_()).rows == [
            ["rank", "document", "score", "margin", "index", "passage truncated"],
            ["1", "a b", "0.9000", "2.20", "1", "yes"],
            ["2", "c", "0.7500", "1.00", "0", ""],
        ]


class TestRankedPassage:
    def test_its_repr_cuts_the_text_and_the_passage_keeps_it(self) -> None:
        passage = RankedPassage(7, 0.123456, -1.98765, "word " * 1000, passage_truncated=True)
        shown = repr(passage)
        assert shown == (
            f"RankedPassage(index=7, score=0.1235, margin=-1.988, document='{('word ' * 12)[:59]}…', "
            "passage_truncated=True)"
        )
        assert passage.document == "word " * 1000

    def test_a_flag_that_is_not_set_is_left_out(self) -> None:
        assert repr(hit(1)) == "RankedPassage(index=1, score=0.75, margin=1, document='text')"

    def test_a_mapping_shows_its_text(self) -> None:
        shown = repr(hit(document={"text": "t" * 1000, "source": "s" * 1000}))
        assert "document={'text': 'ttt" in shown
        assert shown.endswith("…', … 1 more})")
        assert len(shown) < 140

    def test_an_object_whose_own_repr_fails_is_shown_by_its_type(self) -> None:
        class Broken:
            def __repr__(self) -> str:
                raise RuntimeError

        assert repr(hit(document=Broken())).endswith("document=<Broken>)")
        assert "<Broken>" in repr(Ranking([hit(document=Broken())]))
        assert "&lt;Broken&gt;" in Ranking([hit(document=Broken())])._repr_html_()

    def test_it_is_frozen_and_generic(self) -> None:
        """Naming the type of the documents changes nothing at run time."""
        passage = RankedPassage[str](0, 0.75, 1.0, "text")
        assert passage == hit()
        assert hash(passage) == hash(hit())
        with pytest.raises(FrozenInstanceError):
            passage.score = 1.0  # type: ignore[misc]
        assert Ranking[str]([passage]) == [passage]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
class TestEveryRecord:
    def test_shows_itself_in_a_few_short_lines(self, record: Shown) -> None:
        assert repr(record).startswith(f"{type(record).__name__}(")
        assert len(repr(record).splitlines()) <= 4
        assert max(map(len, repr(record).splitlines())) <= 160

    def test_is_a_table_with_a_heading_in_a_notebook(self, record: Shown) -> None:
        page = Page(record._repr_html_())
        assert page.tags[:2] == ["table", "caption"]
        assert page.tags.count("thead") == 1
        assert "th" in page.tags
        assert len({len(row) for row in page.rows}) == 1

    def test_has_no_colours_of_its_own(self, record: Shown) -> None:
        """A table is read in a light and in a dark notebook."""
        assert {value for name, value in Page(record._repr_html_()).attributes if name == "style"} <= {
            "text-align: left",
            "text-align: right",
        }


def test_bytes_are_readable_and_zeros_are_left_out_of_a_line_but_not_of_a_table() -> None:
    assert repr(SIZE) == "StoreStats(entries=3, bytes=1.2 MB, limit=10.0 GB)"
    assert repr(LevelStats(LevelCounters(hits=4, bytes_read=5000), SIZE)) == (
        "LevelStats(hits=4, bytes_read=5.0 KB, entries=3, bytes=1.2 MB, limit=10.0 GB)"
    )
    assert repr(EncodeReport(3, 2, 1)) == "EncodeReport(new=3, known=2, truncated=1)"
    assert repr(EncodeReport(3, 2, 1, 4)) == "EncodeReport(new=3, known=2, truncated=1, repaired=4)"
    assert ["evicted", "0"] in Page(SIZE._repr_html_()).rows
    assert [size_text(number) for number in (999, 1000, 1.5e12)] == ["999 B", "1.0 KB", "1.5 TB"]


def test_an_estimate_counts_its_passages_and_tokens() -> None:
    assert repr(Estimate((10,) * 5000, 1_000_000, 25_000_000)) == (
        "Estimate(passages=5000, tokens=50000, states_bytes=1.0 MB, prefilled_bytes=25.0 MB)"
    )


def test_the_statistics_of_a_cache_have_a_line_a_level() -> None:
    cache = PassageCache(MemoryStore(1_000_000), memory=2_000_000)
    assert repr(cache.stats()).splitlines() == [
        "CacheStats(encoded=0,",
        "  memory: entries=0, bytes=0 B, limit=2.0 MB,",
        "  store: entries=0, bytes=0 B, limit=1.0 MB,",
        "  prefilled: nothing yet)",
    ]
    assert "  store: nothing yet," in repr(PassageCache(None).stats()).splitlines()
    page = Page(cache.stats()._repr_html_())
    assert page.rows[0] == ["", "memory", "store", "prefilled"]
    assert ["limit", "2.0 MB", "1.0 MB", ""] in page.rows


@pytest.mark.parametrize("document", [HOSTILE, {"text": HOSTILE}, {HOSTILE: HOSTILE}, (HOSTILE,)], ids=type)
def test_hostile_text_is_only_text(document: object) -> None:
    shown = (repr(hit(document=document)), repr(Ranking([hit(document=document)])))
    pages = (hit(document=document)._repr_html_(), Ranking([hit(document=document)])._repr_html_())
    for text in (*shown, *pages):
        text.encode("utf-8")
        assert not set(text) & set("\x1b\u202e")
    for page in map(Page, pages):
        assert "script" not in page.tags
        assert "script" in "".join(map("".join, page.rows))
        # Otherwise a notebook typesets what stands between two dollar signs.
        assert ("class", "tex2jax_ignore mathjax_ignore") in page.attributes


def test_hostile_names_are_only_text_in_reports() -> None:
    report = TransferReport(0, 0, 0, 0, (HOSTILE,), ())
    assert "script" not in Page(report._repr_html_()).tags
    assert "\x1b" not in repr(report) + report._repr_html_()


def test_collections_show_their_first_item_and_how_many_there_are() -> None:
    corpus = Corpus({f"p{number}": "word " * 50 for number in range(999)}, {"q": "text"}, {"q": {"p1": 1, "p2": 1}})
    assert repr(corpus) == (
        f"Corpus(passages={{'p0': '{('word ' * 8)[:39]}…', … 998 more}}, queries={{'q': 'text'}}, "
        "qrels={'q': {'p1': 1, … 1 more}})"
    )
    assert [short_repr(value) for value in ((), (1,), [], {}, [0.123456, 2.0], {None: 1})] == [
        "()",
        "(1,)",
        "[]",
        "{}",
        "[0.1235, … 1 more]",
        "{None: 1}",
    ]


def test_a_summary_of_an_evaluation_shows_its_table() -> None:
    result = SystemResult(System("<b>"), {}, {}, {"MAP": 0.75}, 0.04, [3.0], 0, 0, 4096.0)
    ends = {"MAP": (0.7, 0.8)}
    mean = {"MAP": 0.75}
    entry = Entry("system", "<b>", 4, "b", {}, {}, mean, ends, 0.25, (0.2, 0.3), 0.04, 0.08, 3.0, None, 4096.0)
    facts = ({}, "2026-01-01T00:00:00Z", this_machine(), {})
    summary = Summary(
        ["MAP"], "BM25", {"MAP": 0.5}, {"MAP": 1.0}, {}, [result], [], (), {"q": []}, {}, {}, {}, *facts, [entry]
    )
    assert repr(summary) == "Summary(queries=1, systems=1, MAP: BM25 0.5000, best 0.7500)"
    page = Page(summary._repr_html_())
    assert page.rows[0] == ["system", "ratio", "MAP", "KB", "ms"]
    assert page.rows[2] == ["<b>", "4", "0.7500", "4.1", "3"]
    assert summary.differences()[1] == [
        ["<b>", "4", "0.700 to 0.800", "+0.2500", "+0.200 to +0.300", "0.040", "0.080"],
    ]
    assert "b" not in page.tags


@pytest.mark.parametrize("text", ["\x00" * 10_000, "\U000e0001" * 10_000, "'\"" * 10_000])
def test_a_text_whose_characters_are_written_out_stays_short(text: str) -> None:
    assert len(short_repr(text)) == 62


def test_the_results_need_no_typing_extensions() -> None:
    """Only a type checker reads it, and brings it along."""
    code = "import sys; sys.modules['typing_extensions'] = None; import kalm_rag.results"
    subprocess.run([sys.executable, "-c", code], check=True)


class Chunk:
    """Like a document of LangChain."""

    page_content = "The text <b>that</b> matters."

    def __repr__(self) -> str:
        return "Chunk(id='2b2e551f-0000-0000-0000-000000000000')"


def test_documents_of_a_framework_show_their_text() -> None:
    ranking = Ranking([RankedPassage(0, 0.5, 0.0, Chunk())])
    assert "The text <b>that</b> matters." in repr(ranking)
    assert ["1", "The text <b>that</b> matters.", "0.5000", "0.00", "0"] in Page(ranking._repr_html_()).rows
