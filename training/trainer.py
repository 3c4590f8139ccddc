"""One training run."""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kalm_rag.model.cpu_kernels import has_fast_bfloat16
from kalm_rag.model.pooling import mean_groups
from kalm_rag.model.prompts import PASSAGE_PREFIX, Prompts
from kalm_rag.model.tokenization import Tokenizer
from kalm_rag.settings import Settings
from training import start
from training.data import SOURCES, Group, Texts, draw_group, read_source, tokenise
from training.development import Development
from training.objective import (
    SATURATION,
    Heads,
    Targets,
    answer_loss,
    dense_losses,
    ranking_loss,
    soft_targets,
    states_loss,
)
from training.recipe import COARSE, FINE, INSTRUCTIONS, Recipe, Round
from training.teacher import Teacher

log = logging.getLogger("training")


@dataclass(slots=True)
class Rows:
    """One decoder batch: prompts, the passage each is scored against, and what should come out."""

    prompts: Tensor
    prompts_mask: Tensor
    passage: Tensor
    where: Tensor
    present: Tensor
    targets: Targets


class Trainer:
    """One training run.

    Args:
        data: folder of the sets in BEIR layout.
        out: where the checkpoint goes.
        recipe: sizes, steps and weights of the losses.
        resume: a checkpoint folder whose weights to start from.
        compiled: whether layers go through `torch.compile`: 1.4 times as fast on a CPU, needs a C++ compiler.
    """

    # The vision tower is never used; the output matrix and the decoder's embeddings are the encoder's embeddings.
    NOT_STORED = ("vision_tower", "multi_modal", "lm_head", "decoder.embed_tokens.weight")

    def __init__(
        self, data: Path, out: Path, recipe: Recipe, resume: Path | None = None, compiled: bool = False
    ) -> None:
        import transformers

        self.recipe, self.out = recipe, out
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # A CPU without the instructions is up to 200 times slower in bfloat16.
        self.dtype = torch.bfloat16 if self.device.type == "cuda" or has_fast_bfloat16() else torch.float32
        torch.manual_seed(recipe.seed)
        self.random = random.Random(recipe.seed)
        self.teacher = Teacher(self.device, self.dtype)
        began = time.monotonic()
        texts = {s.name: read_source(data, s, recipe.queries_per_source, recipe.seed) for s in SOURCES}
        counts = start.count_tokens(self.teacher.tokenizer, _count_over(texts))
        kept = start.build_tokenizer(out, self.teacher.tokenizer, counts, recipe.pieces)
        fast = transformers.AutoTokenizer.from_pretrained(out)
        self.tokens = {name: tokenise(text, fast, recipe.longest) for name, text in texts.items()}
        self.tokenizer = Tokenizer(fast)
        self.prompts = Prompts(self.tokenizer, Settings(), start.POSITIONS)
        log.info("data ready after %.0f s: %s", time.monotonic() - began, self._sizes())
        self.teacher_id = torch.zeros(len(fast), dtype=torch.long)
        self.teacher_id[len(start.SPECIAL) : len(start.SPECIAL) + len(kept)] = torch.tensor(kept)
        self.idf = self._inverse_document_frequency(len(fast))
        torch.manual_seed(recipe.seed)
        self.model = transformers.T5Gemma2ForConditionalGeneration(
            start.config(len(fast), recipe.encoder_layers, recipe.decoder_layers)
        )
        self.model.set_attn_implementation("eager")
        generator = torch.Generator().manual_seed(recipe.seed)
        start.start_weights(self.model, self.teacher.words(kept), start.rarity_of(kept, counts), generator)
        if resume is not None:
            self._resume(resume)
        self.model.to(self.device)
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # one code object serves every layer
            # Two lengths that happen to be equal need not stay so.
            torch.fx.experimental._config.use_duck_shape = False
            for layer in [*self.model.get_encoder().text_model.layers, *self.model.get_decoder().layers]:
                layer.compile(dynamic=True)
        self.heads = Heads().to(self.device)
        self.vectors: dict[tuple[str, int], Tensor] = {}
        self.query_vectors: dict[tuple[str, int], Tensor] = {}
        self.prefix = self.tokenizer.encode([PASSAGE_PREFIX])[0]
        self.best = -1.0
        self.development = Development(self.tokens, self.prompts, self.prefix)

    def _sizes(self) -> str:
        return ", ".join(f"{n} {len(t.train)} queries/{len(t.passages)} passages" for n, t in self.tokens.items())

    def _resume(self, folder: Path) -> None:
        import safetensors.torch

        state = safetensors.torch.load_file(folder / "model.safetensors")
        missing, unexpected = self.model.load_state_dict(state, strict=False)
        wrong = [name for name in missing if not any(part in name for part in self.NOT_STORED)]
        if wrong or unexpected:
            msg = f"{folder} does not fit the recipe: missing {wrong[:3]}, unexpected {list(unexpected)[:3]}"
            raise ValueError(msg)

    def _inverse_document_frequency(self, size: int) -> Tensor:
        frequency, documents = np.zeros(size), 0
        for tokens in self.tokens.values():
            for row in tokens.passages:
                frequency[np.unique(row)] += 1
                documents += 1
        return torch.tensor(np.log(1 + (documents - frequency + 0.5) / (frequency + 0.5)), dtype=torch.float32)

    def run(self, first_round: int = 0) -> None:
        """Train the encoder, then the whole model; write the checkpoint with the best development score.

        Args:
            first_round: the round of ranking to start with, counted from 1; 0 starts with the encoder.
        """
        if first_round == 0:
            self._encoder_stage()
        for number, plan in enumerate(self.recipe.rounds, start=1):
            if number < first_round:
                continue
            log.info("round %d of %d", number, len(self.recipe.rounds))
            self._ranking_round(plan)

    # --- the encoder reads as the teacher does ---

    def _encoder_stage(self) -> None:
        recipe = self.recipe
        parameters = [p for p in self.model.get_encoder().parameters() if p.requires_grad]
        optimiser = torch.optim.AdamW([*parameters, *self.heads.states.parameters()], betas=(0.9, 0.98))
        names = [source.name for source in SOURCES]
        weights = [len(self.tokens[name].passages) ** 0.7 for name in names]
        shown, began = 0.0, time.monotonic()
        for step in range(recipe.encoder_steps):
            _set_rate(optimiser, step, recipe.encoder_steps, recipe.encoder_rate)
            longest = self.random.choice(recipe.lengths[:-1])
            chosen = self.random.choices(names, weights, k=recipe.batch_tokens // longest)
            keys = [(name, self.random.randrange(len(self.tokens[name].passages))) for name in chosen]
            ids, mask = self._passages(keys, longest)
            inner, inner_mask = ids[:, len(self.prefix) :], mask[:, len(self.prefix) :]
            taught = self._teach(keys, inner, inner_mask)
            with self.autocast():
                states = self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
                read = self.heads.states(states[:, len(self.prefix) :])
            loss = states_loss(read.float(), taught[:, 1:-1], inner_mask)
            self._step(optimiser, loss, parameters)
            shown += loss.item()
            if step % 100 == 99:
                log.info("encoder %5d  loss %.4f  %.0f s", step + 1, shown / 100, time.monotonic() - began)
                shown = 0.0

    def _teach(self, keys: list[tuple[str, int]], ids: Tensor, mask: Tensor) -> Tensor:
        states = self.teacher.states(self.teacher_id.to(self.device)[ids], mask)
        for key, vector in zip(keys, self.teacher.sentence(states, mask), strict=True):
            self.vectors.setdefault(key, vector.half())
        return states

    # --- the whole model ranks ---

    def _ranking_round(self, plan: Round) -> None:
        table = self.model.get_input_embeddings().weight
        matrices = [p for name, p in self.model.named_parameters() if "vision" not in name and p is not table]
        parameters = [table, *matrices]
        optimiser = torch.optim.AdamW(
            [
                {"params": [*matrices, *self.heads.parameters()], "share": 1.0},
                {"params": [table], "share": plan.embeddings},
            ],
            betas=(0.9, 0.98),
            weight_decay=0.01,
        )
        began = time.monotonic()
        shown: Counter[str] = Counter()
        for step in range(plan.steps):
            _set_rate(optimiser, step, plan.steps, plan.rate)
            losses = self._ranking_losses(plan, step / plan.steps)
            self._step(optimiser, losses["loss"], parameters)
            shown.update({name: value.item() for name, value in losses.items()})
            if step % 50 == 49:
                line = "  ".join(f"{name} {value / 50:.4f}" for name, value in shown.items())
                log.info("ranking %5d  %s  %.0f s", step + 1, line, time.monotonic() - began)
                shown.clear()
            if step % 500 == 499 or step == plan.steps - 1:
                self._keep_if_best(step + 1)

    def _keep_if_best(self, step: int) -> None:
        scores = self.development.scores(self)
        mean = sum(scores.values()) / len(scores)
        log.info("development %5d  nDCG@10 %.4f  %s", step, mean, {name: round(v, 3) for name, v in scores.items()})
        if mean > self.best:
            self.best = mean
            self.save(scores)

    def _draw(self, plan: Round, longest: int) -> list[Group]:
        groups = max(1, self.recipe.batch_tokens // longest // plan.passages_per_group)
        names = self.random.choices([s.name for s in SOURCES], [s.weight for s in SOURCES], k=groups)
        return [
            draw_group(name, self.tokens[name], self.random, plan.passages_per_group, plan.queries_per_group)
            for name in names
        ]

    def _ranking_losses(self, plan: Round, progress: float) -> dict[str, Tensor]:
        longest = self.random.choice(self.recipe.lengths)
        groups = self._draw(plan, longest)
        keys = [(group.source, number) for group in groups for number in group.passages]
        ids, mask = self._passages(keys, longest)
        self._know_passages(keys, ids, mask)
        rows = self._rows(groups, ids, mask)
        with self.autocast():
            states = self.model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        total: dict[str, Tensor] = {}
        dense = plan.dense[0] + (plan.dense[1] - plan.dense[0]) * min(1.0, progress * 2)
        wanted = soft_targets(rows.targets, self.recipe.soft)
        for ratio in (self.random.choice(FINE), self.random.choice(COARSE)):
            margins, before, last = self.decode(states, mask, rows.prompts, rows.prompts_mask, rows.passage, ratio)
            parts = {
                "rank": ranking_loss(margins, wanted, rows.targets.lists),
                "answer": answer_loss(margins, rows.targets.labels),
                "dense": dense_losses(self.heads, before, last, rows.where, rows.present, rows.targets),
            }
            loss = parts["rank"] + self.recipe.answer * parts["answer"] + dense * parts["dense"]
            for name, value in {**parts, "loss": loss}.items():
                total[name] = total.get(name, torch.zeros((), device=self.device)) + value
        return total

    def decode(
        self, states: Tensor, mask: Tensor, prompts: Tensor, prompts_mask: Tensor, passage: Tensor, ratio: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Margins, states before the last layer, and final states at the last position, all float32."""
        pooled = mean_groups(states, mask.float(), ratio)
        lengths = -(-mask.sum(1) // ratio)
        pooled_mask = (torch.arange(pooled.shape[1], device=self.device) < lengths[:, None]).long()
        with self.autocast():
            made = self.model.get_decoder()(
                input_ids=prompts,
                attention_mask=prompts_mask,
                encoder_hidden_states=pooled[passage],
                encoder_attention_mask=pooled_mask[passage],
                use_cache=False,
                output_hidden_states=True,
            )
        rows = torch.arange(len(prompts), device=self.device)
        last = made.last_hidden_state[rows, prompts_mask.sum(1) - 1].float()
        table = self.model.get_output_embeddings().weight
        direction = table[self.tokenizer.yes_id] - table[self.tokenizer.no_id]
        return last @ direction.float(), made.hidden_states[-2].float(), last

    def _passages(self, keys: list[tuple[str, int]], longest: int) -> tuple[Tensor, Tensor]:
        rows = [[*self.prefix, *self.tokens[name].passages[number][: longest - 1].tolist()] for name, number in keys]
        return self.padded(rows, longest)

    def padded(self, rows: list[list[int]], width: int | None = None) -> tuple[Tensor, Tensor]:
        """Token ids and mask of shape `(rows, width)` on the device, by default the next multiple of 16 tokens.

        Few different shapes matter: the CPU library prepares its kernels once per shape.
        """
        lengths = torch.tensor([len(row) for row in rows])
        ids = torch.zeros(len(rows), width or -(-int(lengths.max()) // 16) * 16, dtype=torch.long)
        for number, row in enumerate(rows):
            ids[number, : len(row)] = torch.tensor(row)
        mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        return ids.to(self.device), mask.to(self.device)

    def _know_passages(self, keys: list[tuple[str, int]], ids: Tensor, mask: Tensor) -> None:
        unknown = [number for number, key in enumerate(keys) if key not in self.vectors]
        if unknown:
            inner = slice(len(self.prefix), None)
            self._teach([keys[number] for number in unknown], ids[unknown, inner], mask[unknown, inner])

    def _know_queries(self, keys: list[tuple[str, int]]) -> None:
        unknown = [key for key in dict.fromkeys(keys) if key not in self.query_vectors]
        if unknown:
            ids, mask = self.padded([self.tokens[name].queries[number].tolist() for name, number in unknown])
            states = self.teacher.states(self.teacher_id.to(self.device)[ids], mask)
            for key, vector in zip(unknown, self.teacher.sentence(states, mask), strict=True):
                self.query_vectors[key] = vector.half()

    def _rows(self, groups: list[Group], ids: Tensor, mask: Tensor) -> Rows:
        instruction = None if self.random.random() < 0.8 else self.random.choice(INSTRUCTIONS)
        front = self.tokenizer.encode([self.prompts.prefix(instruction)])[0]
        back = self.tokenizer.encode([self.prompts.suffix()])[0]
        asked = [(group.source, number) for group in groups for number in group.queries]
        self._know_queries(asked)
        prompts: list[list[int]] = []
        lists: list[list[int]] = []
        passage, labels, query_of = [], [], []
        query_rows = [self.tokens[name].queries[number].tolist() for name, number in asked]
        base, question = 0, 0
        for group in groups:
            for labelled in group.labels:
                lists.append(list(range(len(prompts), len(prompts) + len(group.passages))))
                for offset, label in enumerate(labelled):
                    prompts.append([*front, *query_rows[question], *back])
                    passage.append(base + offset)
                    labels.append(float(label))
                    query_of.append(question)
                question += 1
            base += len(group.passages)
        widest = max(map(len, lists))
        queries, present = self.padded(query_rows)
        of, at = torch.tensor(query_of, device=self.device), torch.tensor(passage, device=self.device)
        queries, present = queries[of], present[of].float()
        inner = ids[at] * mask[at]
        counted = (queries[:, :, None] == inner[:, None, :]).sum(-1).float()
        terms = counted / (counted + SATURATION) * present
        weight = self.idf.to(self.device)[queries] * present
        keys = [(group.source, number) for group in groups for number in group.passages]
        query_vector = torch.stack([self.query_vectors[key] for key in asked])[of].float()
        passage_vector = torch.stack([self.vectors[key] for key in keys])[at].float()
        prompt_ids, prompt_mask = self.padded(prompts)
        where = (len(front) + torch.arange(queries.shape[1], device=self.device)).expand_as(queries)
        return Rows(
            prompt_ids,
            prompt_mask,
            at,
            where.clamp(max=prompt_ids.shape[1] - 1),
            present,
            Targets(
                torch.tensor(labels, device=self.device),
                terms,
                (terms * weight).sum(1) / weight.sum(1).clamp(min=1e-6),
                (query_vector * passage_vector).sum(1),
                query_vector,
                passage_vector,
                torch.tensor([row + [-1] * (widest - len(row)) for row in lists], device=self.device),
            ),
        )

    def autocast(self) -> torch.autocast:
        """Products in bfloat16 where the machine is fast at it."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    @staticmethod
    def _step(optimiser: torch.optim.Optimizer, loss: Tensor, parameters: list[Tensor]) -> None:
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()

    def save(self, scores: dict[str, float]) -> None:
        """Write the weights in bfloat16, without the vision tower, and what they were trained with."""
        import safetensors.torch

        state = {
            name: tensor.detach().to("cpu", torch.bfloat16).contiguous()
            for name, tensor in self.model.state_dict().items()
            if not any(part in name for part in self.NOT_STORED)
        }
        safetensors.torch.save_file(state, self.out / "model.safetensors", metadata={"format": "pt"})
        self.model.config.save_pretrained(self.out)
        report = {"development": scores, "recipe": asdict(self.recipe)}
        (self.out / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _count_over(texts: dict[str, Texts]) -> Iterator[list[str]]:
    for text in texts.values():
        for start_at in range(0, len(text.passages), 2_000):
            yield [passage[:1_500] for passage in text.passages[start_at : start_at + 2_000]]
        # Queries are short; their words matter as much.
        yield [query for query in text.queries for _ in range(3)]


def _set_rate(optimiser: torch.optim.Optimizer, step: int, steps: int, rate: float) -> None:
    warm = min(1.0, (step + 1) / 100)
    scale = warm * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * step / steps)))
    for group in optimiser.param_groups:
        group["lr"] = rate * scale * group.get("share", 1.0)
