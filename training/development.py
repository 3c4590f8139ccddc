"""The development split: held-out queries of the training sets, each reranking what BM25 found for it."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from kalm_rag.model.prompts import Prompts
from training.data import Tokens
from training.student import Student

DEPTH = 10


class Development:
    """Scores a model that is being trained.

    Args:
        tokens: the training sets.
        prompts: builds the prompts.
        prefix: token ids before every passage.
        ratios: compression ratios to measure.
        longest: tokens of a passage that are read, the prefix included.
    """

    def __init__(
        self, tokens: dict[str, Tokens], prompts: Prompts, prefix: list[int], ratios: tuple[int, ...], longest: int
    ) -> None:
        self._tokens = {name: own for name, own in tokens.items() if own.held_out}
        front = prompts.tokenizer.encode([prompts.prefix()])[0]
        back = prompts.tokenizer.encode([prompts.suffix()])[0]
        self._prefix, self._front, self._back, self._ratios = prefix, front, back, ratios
        self._longest = longest

    def scores(self, student: Student) -> dict[str, float]:
        """nDCG@10 per set and ratio, over the candidates of BM25 with the relevant passages among them."""
        found = {name: self._set(student, own) for name, own in self._tokens.items()}
        return {f"{name} r {ratio}": value for name, values in found.items() for ratio, value in values.items()}

    @torch.no_grad()
    def _set(self, student: Student, own: Tokens) -> dict[int, float]:
        found: dict[int, list[float]] = {ratio: [] for ratio in self._ratios}
        for query in own.held_out:
            candidates = own.neighbours[query].tolist()
            relevant = [float(number in own.positives[query]) for number in candidates]
            if not any(relevant):
                continue
            rows = [[*self._prefix, *own.passages[number][: self._longest - 1].tolist()] for number in candidates]
            ids, mask = student.padded(rows)
            states = student.read(ids, mask)
            prompts, prompts_mask = student.padded(
                [[*self._front, *own.queries[query].tolist(), *self._back]] * len(candidates)
            )
            everyone = torch.arange(len(candidates), device=student.device)
            for ratio, values in found.items():
                margins, _, _ = student.decode(states, mask, prompts, prompts_mask, everyone, ratio)
                values.append(ndcg(margins.float().cpu().numpy(), np.array(relevant)))
        return {ratio: float(np.mean(values)) for ratio, values in found.items()}


def ndcg(scores: Any, relevant: Any) -> float:
    """nDCG@10 over the candidates themselves: what no order of them could reach is not counted."""
    discounts = 1.0 / np.log2(np.arange(2, DEPTH + 2))
    order = np.argsort(-scores, kind="stable")[:DEPTH]
    gained = (relevant[order] * discounts[: len(order)]).sum()
    ideal = np.sort(relevant)[::-1][:DEPTH]
    return float(gained / (ideal * discounts[: len(ideal)]).sum())
