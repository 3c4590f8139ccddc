"""The bundled checkpoint: it is what it says, loads like a release, and its order has a meaning."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import kalm_rag
from kalm_rag import KaLMReranker
from kalm_rag.demo_data import load_demo
from kalm_rag.errors import CheckpointError
from kalm_rag.evaluation import Experiment, Metrics, System, bm25_candidates, evaluate
from kalm_rag.evaluation.metrics import means
from kalm_rag.model.checkpoint import MINI, find_checkpoint

FOLDER = Path(kalm_rag.__file__).parent / "mini"
QUESTIONS = {
    "What is the capital of France?": "Paris is the capital and largest city of France.",
    "Who wrote Romeo and Juliet?": "Romeo and Juliet is a tragedy by William Shakespeare about two young lovers.",
    "How do vaccines protect people from disease?": "Immunisation trains the immune system to recognise a virus.",
    "Why is the sky blue?": "Air molecules scatter short wavelengths of sunlight more than long ones.",
    "How do I read a file line by line in Python?": "Iterate over the file object: it yields one line at a time.",
    "What do whales eat?": "Baleen whales feed on krill and small fish; toothed whales hunt squid.",
    "When did the second world war end?": "The war in Europe ended on 8 May 1945, in the Pacific on 2 September.",
    "What causes earthquakes?": "Tectonic plates move against each other; a sudden slip shakes the ground.",
}


@pytest.fixture(scope="module")
def mini() -> KaLMReranker:
    return KaLMReranker(MINI, cache=None)


def test_it_is_inside_the_package_and_small() -> None:
    assert find_checkpoint(MINI).folder == FOLDER
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 20_000_000
    assert "not an official" in (FOLDER / "README.md").read_text()
    with pytest.raises(CheckpointError, match="has no revisions"):
        find_checkpoint(MINI, revision="main")


def test_it_is_never_the_default_of_the_library() -> None:
    assert KaLMReranker().model == "nano"


@pytest.mark.parametrize("ratio", [1, 4, 16, 32])
def test_it_finds_the_answers(mini: KaLMReranker, ratio: int) -> None:
    passages = list(QUESTIONS.values())
    found = [mini.rank(question, passages, ratio=ratio) for question in QUESTIONS]
    first = sum(ranking[0].index == number for number, ranking in enumerate(found))
    assert first >= (7 if ratio <= 4 else 6), [(q, r[0].document) for q, r in zip(QUESTIONS, found, strict=True)]


def test_yes_and_no_have_a_meaning(mini: KaLMReranker) -> None:
    question, answer = next(iter(QUESTIONS.items()))
    right, wrong = mini.predict([(question, answer), (question, "Baleen whales feed on krill and small fish.")])
    assert right > 0.5 > wrong


def test_it_improves_on_bm25_on_the_bundled_corpus() -> None:
    corpus = load_demo()
    metrics = Metrics(["nDCG@10"])
    candidates = bm25_candidates(corpus, 20)
    systems = [System(MINI, 4), System(MINI, 32)]
    (fine, coarse), _ = evaluate(Experiment(corpus, candidates, systems, metrics, cache=None, lengths=0))
    before = means(metrics.per_query(candidates.rankings, candidates.qrels))["nDCG@10"]
    assert fine.means["nDCG@10"] > before + 0.02
    assert coarse.means["nDCG@10"] > fine.means["nDCG@10"] - 0.07


def test_another_instruction_changes_little(mini: KaLMReranker) -> None:
    passages = list(QUESTIONS.values())
    for question in QUESTIONS:
        best = mini.rank(question, passages, instruction="Given a web search query, retrieve relevant passages.")[0]
        assert best.document == mini.rank(question, passages)[0].document


def test_text_in_other_scripts_and_odd_text_score(mini: KaLMReranker) -> None:
    scores = mini.predict([("什么是首都?", "北京是中国的首都。"), ("🙂", "🙃"), ("", ""), ("a\n\nb", "\t")])
    assert all(0.0 <= score <= 1.0 for score in scores)


def test_the_commands_say_that_it_runs(tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("\n".join(QUESTIONS.values()))
    arguments = ["rank", "What do whales eat?", str(file), "--model", MINI]
    done = subprocess.run(
        [sys.executable, "-m", "kalm_rag", *arguments], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr
    assert "demonstration checkpoint" in done.stderr
    assert "Baleen whales" in done.stdout.splitlines()[1]


def test_it_scores_as_the_reference_implementation_does(mini: KaLMReranker) -> None:
    import torch
    from mteb.models.model_implementations.kalm_reranker import KaLMRerankerWrapper

    reference = KaLMRerankerWrapper(str(FOLDER), device="cpu", dtype="float32", chunk_size=4)
    pairs = [(question, passage) for question in QUESTIONS for passage in QUESTIONS.values()]
    default = mini.settings.instruction
    with torch.inference_mode():
        expected = reference._predict_batch(pairs, [default] * len(pairs))
    assert mini.predict(pairs) == pytest.approx(expected, abs=1e-5)
