"""Encodes passages, and finds out of each what became of it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from kalm_rag.cache.store import StoreError
from kalm_rag.errors import CheckpointError, ForkError
from kalm_rag.utils import forks
from kalm_rag.utils.display import size_text

if TYPE_CHECKING:
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.scorer import Scorer

logger = logging.getLogger(__name__)

Status = Literal["encoded", "known", "not kept", "failed"]
"""What became of a passage; `PassageEncoder` says what each means."""

_NOT_THE_TEXT = (CheckpointError, ForkError, StoreError)
"""Errors that another passage would meet too."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one passage.

    Attributes:
        status: what happened.
        keys: the cache's keys of its encoder states: one, or one for each window.
        truncated: its tail was not read.
        message: what went wrong or was changed; empty if nothing.
    """

    status: Status
    keys: tuple[str, ...] = ()
    truncated: bool = False
    message: str = ""

    def again(self) -> Outcome:
        """Return what became of a later row with the same text."""
        return replace(self, status="known") if self.status == "encoded" else self


class Encoding:
    """Encodes passages in this process and sees to it that the store keeps them.

    Safe from any thread: one batch at a time.

    Args:
        reranker: holds the model. Its cache has no level in memory, so that what it finds is what the store holds.
    """

    def __init__(self, reranker: KaLMReranker) -> None:
        self.reranker = reranker
        self._cache = reranker.cache
        self._first: list[str] = []  # what was encoded first here, and so is evicted first
        self._evicted: int | None = None
        self.after_fork_in_child()
        forks.watch(self)

    def after_fork_in_child(self) -> None:
        """Make a new lock: another thread may have held the old one."""
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str]) -> list[Outcome]:
        """Encode distinct texts that went through `repair_text`, and return what became of each.

        A text that the model cannot encode does not keep others from being encoded.

        Raises:
            CheckpointError: the model cannot be found or used.
            StoreError: the store reached its limit and gave up passages that were encoded here.
            Exception: the model encodes none of several texts, so that they are not at fault.
        """
        scorer = self.reranker.scorer
        with self._lock:
            try:
                return self._together(scorer, texts)
            except _NOT_THE_TEXT:
                raise
            except Exception as error:  # noqa: BLE001 - whatever it is, it must not cost the other texts
                logger.warning("%d passages cannot be encoded together (%s); each is tried alone", len(texts), error)
                return self._each_alone(scorer, texts, error)

    def close(self) -> None:
        """Free the model, and close the cache."""
        self.reranker.close()
        self._cache.close()

    def _together(self, scorer: Scorer, texts: Sequence[str]) -> list[Outcome]:
        windows, ratio = scorer.windows.split(texts), self._cache.base_ratio
        parts = {text: scorer.clean(windows[text].texts) for text in texts}
        distinct = list(dict.fromkeys(part for own in parts.values() for part in own))
        stats = self._cache.stats()
        if self._evicted is None:
            self._evicted = stats.store.size.evicted
        cut = {part: states.truncated for part, states in scorer.states.find(distinct, ratio).items()}
        new = [part for part in distinct if part not in cut]
        for _ in range(2):  # the second time because a lock or a full disk may be temporary
            lacking = [part for part in distinct if part not in cut]
            todo = [text for text in texts if not set(parts[text]).isdisjoint(lacking)]
            if todo or self._cache.keeps_prefilled:
                scorer.encode(texts if self._cache.keeps_prefilled else todo)
                self._cache.flush()
                cut |= {part: states.truncated for part, states in scorer.states.find(lacking, ratio).items()}
            if cut.keys() >= set(distinct):
                break
        lost = self._not_kept(scorer, texts, stats.prefilled.write_failed)
        self._check_evicted(scorer, [part for part in new if part in cut])
        found = []
        for text in texts:
            own = set(parts[text])
            outcome = Outcome(
                "known" if own.isdisjoint(new) else "encoded",
                tuple(scorer.states.keys(parts[text], ratio)),
                not windows[text].complete or any(cut.get(part, False) for part in own),
            )
            if not own <= cut.keys():
                outcome = replace(outcome, status="not kept", message="the cache did not keep it; the log says why")
            elif lost:
                outcome = replace(outcome, status="not kept", message=lost)
            found.append(outcome)
        return found

    def _not_kept(self, scorer: Scorer, texts: Sequence[str], before: int) -> str:
        """Say what of a batch is not where it belongs, although the store has its states; empty if nothing.

        Args:
            scorer: of the model.
            texts: the batch.
            before: prefilled passages that were not kept before it.
        """
        failed = self._cache.stats().prefilled.write_failed - before
        if failed:
            return f"the cache did not keep {failed} prefilled passages of its batch; the log says why"
        try:
            unshared = scorer.share(texts)
        except StoreError as error:
            return f"the shared tier does not keep its batch: {error}"
        return f"the shared tier does not hold {unshared} passages of its batch; the log says why" if unshared else ""

    def _each_alone(self, scorer: Scorer, texts: Sequence[str], first: Exception) -> list[Outcome]:
        found = []
        for text in texts:
            try:
                found += self._together(scorer, [text])
            except _NOT_THE_TEXT:
                raise
            except Exception as error:  # noqa: BLE001 - as above
                found.append(Outcome("failed", message=f"the model cannot encode it: {error}"))
        if len(texts) > 1 and all(outcome.status == "failed" for outcome in found):
            raise first
        return found

    def _check_evicted(self, scorer: Scorer, new: list[str]) -> None:
        """Stop where a full cache gave up what was encoded here: each further passage would cost another one."""
        self._first = self._first or new
        size = self._cache.stats().store.size
        if size.evicted == self._evicted or not scorer.states.unknown(self._first):
            return
        msg = (
            f"the cache reached its limit of {size_text(size.limit or 0)} and gave up passages that this job encoded: "
            "give it a larger limit and run the job again, which encodes only what is missing"
        )
        raise StoreError(msg)
