"""One training run: from data to a checkpoint."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from kalm_rag.model.cpu_kernels import has_fast_bfloat16
from kalm_rag.tuning.trainer import Task, Trainer
from kalm_rag.utils.digests import tagged_digest
from training import start
from training.average import copy_into
from training.batches import Batches, digest_of
from training.data import SOURCES, Texts, read_source, tokenise
from training.development import Development
from training.recipe import Recipe
from training.stages import EncoderStage, RankingStage
from training.student import Student
from training.teacher import Teacher

log = logging.getLogger("training")

STATE = "state"
"""Folder in `out` of what an interrupted run resumes from."""


class Training:
    """One training run. If it is interrupted, the same run with the same `out` resumes.

    Args:
        data: folder of the sets in BEIR layout.
        out: where the checkpoint goes, and until the end the state to resume from.
        recipe: sizes, steps and weights of the losses.
        start_from: a checkpoint folder whose weights to start from.
        compiled: whether layers go through `torch.compile`: 1.4 times as fast on a CPU, needs a C++ compiler.

    Raises:
        ValueError: the checkpoint to start from does not fit the recipe.
    """

    def __init__(
        self, data: Path, out: Path, recipe: Recipe, start_from: Path | None = None, compiled: bool = False
    ) -> None:
        import transformers

        self._recipe, self._out = recipe, out
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # A CPU without the instructions is up to 200 times slower in bfloat16.
        dtype = torch.bfloat16 if device.type == "cuda" or has_fast_bfloat16() else torch.float32
        teacher = Teacher(device, dtype)
        began = time.monotonic()
        texts = {s.name: read_source(data, s, recipe.queries_per_source, recipe.seed) for s in SOURCES}
        counts = start.count_tokens(teacher.tokenizer, _count_over(texts))
        kept = start.build_tokenizer(out, teacher.tokenizer, counts, recipe.pieces)
        fast = transformers.AutoTokenizer.from_pretrained(out)
        tokens = {name: tokenise(text, fast, recipe.longest) for name, text in texts.items()}
        sizes = ", ".join(f"{n} {len(t.train)} queries/{len(t.passages)} passages" for n, t in tokens.items())
        log.info("data ready after %.0f s: %s", time.monotonic() - began, sizes)
        teacher_id = torch.zeros(len(fast), dtype=torch.long)
        teacher_id[len(start.SPECIAL) : len(start.SPECIAL) + len(kept)] = torch.tensor(kept)
        torch.manual_seed(recipe.seed)
        model = transformers.T5Gemma2ForConditionalGeneration(
            start.config(len(fast), recipe.encoder_layers, recipe.decoder_layers)
        )
        model.set_attn_implementation("eager")
        generator = torch.Generator().manual_seed(recipe.seed)
        start.start_weights(model, teacher.words(kept), start.rarity_of(kept, counts), generator)
        self._student = Student(model, fast, recipe, out, device, dtype)
        origin = ""
        if start_from is not None:
            self._student.load(start_from)
            origin = hashlib.sha256((start_from / "model.safetensors").read_bytes()).hexdigest()
        if compiled:
            self._student.compile()
        self._batches = Batches(self._student, teacher, teacher_id, tokens)
        self._development = Development(
            tokens, self._student.prompts, self._student.prefix, recipe.measured_ratios, recipe.longest
        )
        self._owner = tagged_digest(json.dumps(asdict(recipe)), digest_of(tokens), origin, str(dtype)).hexdigest()

    def run(self, first_round: int = 0, show_progress: bool | None = None) -> None:
        """Train the encoder, then the whole model, each round from the best weights of the one before.

        Args:
            first_round: the round of ranking to start with, counted from 1; 0 starts with the encoder.
            show_progress: True to draw a bar, False not to, None to draw when standard error is a terminal.
        """
        state = self._out / STATE
        for number in range(first_round, len(self._recipe.rounds) + 1):
            task = self._stage(number, first_round)
            folder = state / task.name.replace(" ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            trainer = Trainer(task, folder)
            trainer.run(show_progress)
            copy_into(task.parameters, trainer.best)
            log.info("%s: %s; the best step is %d", task.name, trainer.progressed.ended, trainer.progressed.best_step)
        shutil.rmtree(state, ignore_errors=True)

    def _stage(self, number: int, first_round: int) -> Task:
        owner = tagged_digest(self._owner, str(first_round), str(number)).hexdigest()
        if number == 0:
            return EncoderStage(self._student, self._batches, owner)
        return RankingStage(self._student, self._batches, self._development, number, owner)


def _count_over(texts: dict[str, Texts]) -> Iterator[list[str]]:
    for text in texts.values():
        for start_at in range(0, len(text.passages), 2_000):
            yield [passage[:1_500] for passage in text.passages[start_at : start_at + 2_000]]
        # Queries are short; their words matter as much.
        yield [query for query in text.queries for _ in range(3)]
