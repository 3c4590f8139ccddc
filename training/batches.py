"""Batches: passages and prompts as token ids, and what the teacher and BM25 say of them."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from training.data import SOURCES, Group, Tokens, draw_group
from training.objective import SATURATION, Targets
from training.recipe import INSTRUCTIONS, Round
from training.student import Student
from training.teacher import Teacher


@dataclass(slots=True)
class Rows:
    """One decoder batch: prompts, the passage each is scored against, and what should come out."""

    prompts: Tensor
    prompts_mask: Tensor
    passage: Tensor
    where: Tensor
    present: Tensor
    targets: Targets


class Batches:
    """Draws batches; what it draws depends on the generator it is given only.

    Args:
        student: its tokenizer and its device.
        teacher: reads the same texts.
        teacher_id: the teacher's id of each of the student's, shape `(pieces,)`.
        tokens: the training sets.
    """

    def __init__(self, student: Student, teacher: Teacher, teacher_id: Tensor, tokens: dict[str, Tokens]) -> None:
        self._student, self._teacher, self._tokens = student, teacher, tokens
        self._recipe = student.recipe
        self._teacher_id = teacher_id.to(student.device)
        self._idf = _inverse_document_frequency(tokens, len(teacher_id)).to(student.device)
        # By set, passage and tokens read: a vector must not depend on how much of the passage an earlier batch read.
        self._vectors: dict[tuple[str, int, int], Tensor] = {}
        self._query_vectors: dict[tuple[str, int], Tensor] = {}

    def passages(self, generator: random.Random) -> tuple[list[tuple[str, int]], Tensor, Tensor]:
        """Draw passages of all sets: their keys, their token ids and mask."""
        names = [source.name for source in SOURCES]
        weights = [len(self._tokens[name].passages) ** 0.7 for name in names]
        longest = generator.choice(self._recipe.lengths)
        chosen = generator.choices(names, weights, k=self._recipe.batch_tokens // longest)
        keys = [(name, generator.randrange(len(self._tokens[name].passages))) for name in chosen]
        return keys, *self._padded_passages(keys, longest)

    def groups(self, plan: Round, generator: random.Random) -> tuple[Tensor, Tensor, Rows]:
        """Draw groups of passages and queries: token ids and mask of the passages, and the rows of all pairs."""
        longest = generator.choice(plan.lengths)
        groups = self._draw(plan, longest, generator)
        keys = [(group.source, number) for group in groups for number in group.passages]
        ids, mask = self._padded_passages(keys, longest)
        self._know_passages(keys, ids, mask)
        return ids, mask, self._rows(groups, ids, mask, generator)

    def teach(self, keys: list[tuple[str, int]], ids: Tensor, mask: Tensor) -> Tensor:
        """Return the teacher's token states of passages, given without the prefix; their vectors are kept."""
        states = self._teacher.states(self._teacher_id[ids], mask)
        for key, vector in zip(_with_lengths(keys, mask), self._teacher.sentence(states, mask), strict=True):
            self._vectors.setdefault(key, vector.half())
        return states

    def _draw(self, plan: Round, longest: int, generator: random.Random) -> list[Group]:
        groups = max(1, self._recipe.batch_tokens // longest // plan.passages_per_group)
        names = generator.choices([s.name for s in SOURCES], [s.weight for s in SOURCES], k=groups)
        return [
            draw_group(name, self._tokens[name], generator, plan.passages_per_group, plan.queries_per_group)
            for name in names
        ]

    def _padded_passages(self, keys: list[tuple[str, int]], longest: int) -> tuple[Tensor, Tensor]:
        rows = [
            [*self._student.prefix, *self._tokens[name].passages[number][: longest - 1].tolist()]
            for name, number in keys
        ]
        return self._student.padded(rows, longest)

    def _know_passages(self, keys: list[tuple[str, int]], ids: Tensor, mask: Tensor) -> None:
        inner = slice(len(self._student.prefix), None)
        known = [key in self._vectors for key in _with_lengths(keys, mask[:, inner])]
        unknown = [number for number, is_known in enumerate(known) if not is_known]
        if unknown:
            self.teach([keys[number] for number in unknown], ids[unknown, inner], mask[unknown, inner])

    def _know_queries(self, keys: list[tuple[str, int]]) -> None:
        unknown = [key for key in dict.fromkeys(keys) if key not in self._query_vectors]
        if unknown:
            ids, mask = self._student.padded([self._tokens[name].queries[number].tolist() for name, number in unknown])
            states = self._teacher.states(self._teacher_id[ids], mask)
            for key, vector in zip(unknown, self._teacher.sentence(states, mask), strict=True):
                self._query_vectors[key] = vector.half()

    def _rows(self, groups: list[Group], ids: Tensor, mask: Tensor, generator: random.Random) -> Rows:
        instruction = None if generator.random() < 0.8 else generator.choice(INSTRUCTIONS)
        front = self._student.tokenizer.encode([self._student.prompts.prefix(instruction)])[0]
        back = self._student.tokenizer.encode([self._student.prompts.suffix()])[0]
        asked = [(group.source, number) for group in groups for number in group.queries]
        self._know_queries(asked)
        prompts: list[list[int]] = []
        lists: list[list[int]] = []
        passage, labels, query_of = [], [], []
        query_rows = [self._tokens[name].queries[number].tolist() for name, number in asked]
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
        queries, present = self._student.padded(query_rows)
        of, at = torch.tensor(query_of, device=self._student.device), torch.tensor(passage, device=self._student.device)
        queries, present = queries[of], present[of].float()
        inner = ids[at] * mask[at]
        counted = (queries[:, :, None] == inner[:, None, :]).sum(-1).float()
        terms = counted / (counted + SATURATION) * present
        weight = self._idf[queries] * present
        keys = [(group.source, number) for group in groups for number in group.passages]
        query_vector = torch.stack([self._query_vectors[key] for key in asked])[of].float()
        read = _with_lengths(keys, mask[:, len(self._student.prefix) :])
        passage_vector = torch.stack([self._vectors[key] for key in read])[at].float()
        prompt_ids, prompt_mask = self._student.padded(prompts)
        where = (len(front) + torch.arange(queries.shape[1], device=self._student.device)).expand_as(queries)
        return Rows(
            prompt_ids,
            prompt_mask,
            at,
            where.clamp(max=prompt_ids.shape[1] - 1),
            present,
            Targets(
                torch.tensor(labels, device=self._student.device),
                terms,
                (terms * weight).sum(1) / weight.sum(1).clamp(min=1e-6),
                (query_vector * passage_vector).sum(1),
                query_vector,
                passage_vector,
                torch.tensor([row + [-1] * (widest - len(row)) for row in lists], device=self._student.device),
            ),
        )


def _with_lengths(keys: list[tuple[str, int]], mask: Tensor) -> list[tuple[str, int, int]]:
    return [(*key, int(length)) for key, length in zip(keys, mask.sum(1).tolist(), strict=True)]


def digest_of(tokens: dict[str, Tokens]) -> str:
    """Return a digest of the training sets."""
    digest = hashlib.sha256()
    for name, own in tokens.items():
        digest.update(repr((name, own.positives, own.held_out)).encode())
        for rows in (own.passages, own.queries):
            digest.update(np.array([len(row) for row in rows]).tobytes())
            digest.update(np.concatenate(rows).tobytes())
        digest.update(own.neighbours.tobytes())
    return digest.hexdigest()


def _inverse_document_frequency(tokens: dict[str, Tokens], size: int) -> Tensor:
    frequency, documents = np.zeros(size), 0
    for own in tokens.values():
        for row in own.passages:
            frequency[np.unique(row)] += 1
            documents += 1
    return torch.tensor(np.log(1 + (documents - frequency + 0.5) / (frequency + 0.5)), dtype=torch.float32)
