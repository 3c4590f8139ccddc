"""One loaded model at work: which passages are known, which must be encoded, and what they score."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from kalm_rag import forks
from kalm_rag.attention import PrefillUnsupportedError
from kalm_rag.cache import PassageCache
from kalm_rag.cache.frame import HEADER_BYTES
from kalm_rag.cache.keys import KeySpace
from kalm_rag.checkpoint import Checkpoint
from kalm_rag.errors import ForkError
from kalm_rag.identity import identify
from kalm_rag.loading import LoadedModel, load_model, resolve_device
from kalm_rag.lru import BudgetLRU
from kalm_rag.pooling import PassageStates
from kalm_rag.prefill import Beginning, Prefilled, PrefillScorer, WarmPair, find_beginning
from kalm_rag.progress import Progress
from kalm_rag.prompts import PassageTokens, Prompt, Prompts
from kalm_rag.results import EncodeReport, PrefillCounters, PrefillStats
from kalm_rag.scoring import Encoder, Pair, PlainScorer, check_finite, probability
from kalm_rag.settings import Settings
from kalm_rag.turns import Room, Turns, check_stopped

if TYPE_CHECKING:
    import torch


logger = logging.getLogger(__name__)

_MOST_INSTRUCTIONS = 256
_GROUP_BYTES = 1_000_000_000
_READ_AT_ONCE = 64
_TOKENISED_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class Score:
    """What one pair scored; see `RankedPassage` for the fields."""

    margin: float
    passage_truncated: bool
    query_truncated: bool

    @property
    def probability(self) -> float:
        """`P(yes)`."""
        return probability(self.margin)


@dataclass(slots=True)
class _Row:
    """One pair on its way to a score."""

    prompt: Prompt
    text: str
    margin: float = 0.0
    passage_truncated: bool = False


def _frame_of(passage: Prefilled, key: str, model: bytes, secret: bytes | None) -> bytes:
    return passage.frame(key, model, secret)


class Engine:
    """Everything that exists only while a model is loaded.

    Calls may come from any thread. They run side by side and give way to each other after every batch, in the order of
    asking; a cancelled one stops there. What a call computes does not depend on the others.

    - `_turns` guards the model and all that a forward pass uses. It is held for one batch and what makes its result
      known to other calls (memory of the cache, `_prefilled`), never while something waits for a store or tokenises.
    - `_room` bounds the prefilled passages that all calls hold together.
    - `_lock` guards `_counters`, `_beginnings`, `_warned_ratios` and `_prefill_works`, for moments.
    - The cache, `_prefilled` and the tokenizer have locks of their own.

    Args:
        loaded: the model.
        checkpoint: where it came from.
        settings: how passages and queries become scores.
        cache: what keeps encoded passages.
    """

    def __init__(self, loaded: LoadedModel, checkpoint: Checkpoint, settings: Settings, cache: PassageCache) -> None:
        self.loaded = loaded
        self._settings = settings
        self._cache = cache
        self._space = KeySpace(
            identify(checkpoint),
            max_length=settings.max_length,
            dtype=str(loaded.dtype).removeprefix("torch."),
            storage=cache.storage,
        )
        positions = loaded.model.config.decoder.max_position_embeddings
        self._prompts = Prompts(loaded.tokenizer, settings, positions)
        self._turns = Turns()
        self._encoder = Encoder(loaded, settings)
        self._plain = PlainScorer(loaded, settings, self._turns)
        self._warm = PrefillScorer(loaded, settings, self._turns, int8=settings.prefill_storage == "int8")
        self._prefilled: BudgetLRU[str, Prefilled] = BudgetLRU(
            settings.prefill_memory, lambda prefilled: prefilled.nbytes, "prefilled passages"
        )
        self._prefill_works = settings.prefill_memory > 0 or cache.keeps_prefilled
        self._room = Room(2 * _GROUP_BYTES)
        self._lock = forks.Lock()
        self._beginnings: dict[str, Beginning] = {}
        self._counters = PrefillCounters()
        self._warned_ratios: set[int] = set()
        self._forked = False
        self._check_lengths()
        forks.watch(self)

    @classmethod
    def load(
        cls,
        checkpoint: Checkpoint,
        *,
        settings: Settings,
        cache: PassageCache,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
    ) -> Engine:
        """Load a checkpoint onto a device."""
        forks.ready_to_compute()
        with forks.native():
            place = resolve_device(device)
            loaded = load_model(checkpoint, settings=settings, device=place, dtype=dtype)
            return cls(loaded, checkpoint, settings, cache)

    def after_fork_in_child(self) -> None:
        """The model is usable in the child on a CPU only."""
        self._forked = True

    def _check_process(self) -> None:
        forks.ready_to_compute()
        if self._forked and self.loaded.device.type != "cpu":
            msg = (
                f"this process was forked after the model was loaded on {self.loaded.device}, which a forked process "
                "cannot use: load the model after the fork, or start processes with the method 'spawn'"
            )
            raise ForkError(msg)

    def encode(self, texts: Sequence[str], progress: Progress | None = None) -> EncodeReport:
        """Encode the passages that the cache does not hold, and keep them batch by batch."""
        self._check_process()
        ratio = self._cache.base_ratio
        clean = [self.loaded.tokenizer.clean(text) for text in texts]
        unique = list(dict.fromkeys(clean))
        cut = {text: known.truncated for text, known in self._lookup(unique, ratio).items()}
        missing = [text for text in unique if text not in cut]
        if progress is not None:
            progress.advance(len(texts) - len(missing))
        new = 0
        for encoded, fresh in self._encode(missing, ratio):
            cut |= {text: states.truncated for text, states in encoded.items()}
            new += fresh
            if progress is not None:
                progress.advance(len(encoded))
        self._prefill_ahead(unique)
        return EncodeReport(new, len(texts) - new, sum(cut[text] for text in clean))

    def _prefill_ahead(self, texts: Sequence[str]) -> None:
        """Where the store keeps prefilled passages, prefill what it lacks, for the default instruction and ratio."""
        if not self._cache.keeps_prefilled:
            return
        ratio, beginning = self._settings.ratio, self._beginning(self._settings.instruction)
        for start in range(0, len(texts), _READ_AT_ONCE):
            part = texts[start : start + _READ_AT_ONCE]
            ready = self._find_prefilled(part, beginning, ratio)
            missing = [text for text in part if text not in ready]
            known = self._lookup(missing, ratio)
            states = known | self._encode_all([text for text in missing if text not in known], ratio)
            for group, size in self._groups(missing, {}, states, len(beginning.ids)):
                with self._room.of(size):
                    self._prefill(group, states, beginning, ratio)

    def unknown(self, texts: Sequence[str]) -> list[str]:
        """The passages that `encode` would encode."""
        unique = dict.fromkeys(self.loaded.tokenizer.clean(text) for text in texts)
        known = self._lookup(list(unique), self._cache.base_ratio)
        return [text for text in unique if text not in known]

    def clean(self, text: str) -> str:
        """A passage as it is encoded and kept."""
        return self.loaded.tokenizer.clean(text)

    def token_counts(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each passage that the encoder reads."""
        return [len(passage.ids) for passage in self._prompts.passages(texts)]

    def prefilled_bytes(self, tokens: int) -> int:
        """Bytes of one prefilled passage of so many tokens, for the default instruction and ratio."""
        positions = len(self._beginning(self._settings.instruction).ids) - (-tokens // self._settings.ratio)
        return HEADER_BYTES + self._warm.bytes_of(positions)

    def time_encoding(self, texts: Sequence[str]) -> float:
        """Seconds that encoding takes, after one passage to warm up. Nothing is kept."""
        self._check_process()
        warmup, passages = self._prompts.passages(texts[:1]), self._prompts.passages(texts)
        with self._turns:
            self._encoder.encode(warmup, self._cache.base_ratio)
            start = time.perf_counter()
            for batch in self._encoder.batches(passages):
                self._encoder.encode([passages[place] for place in batch], self._cache.base_ratio)
            return time.perf_counter() - start

    def score(
        self,
        pairs: Sequence[tuple[str, str]],
        instruction: str,
        ratio: int,
        progress: Progress | None = None,
    ) -> list[Score]:
        """Score `(query, passage)` pairs, in input order; each passage and each query is read once.

        Raises:
            ScoringError: a margin is not finite, as happens in float16.
        """
        self._check_process()
        rows = self._rows(pairs, instruction)
        for part in self._parts(rows):
            self._score_rows(part, instruction, ratio, progress)
        self._rescue(rows, instruction, ratio)
        self.loaded.files.check()
        check_finite([row.margin for row in rows], self.loaded.dtype)
        return [Score(row.margin, row.passage_truncated, row.prompt.truncated) for row in rows]

    def _parts(self, rows: list[_Row]) -> Iterator[list[_Row]]:
        """All rows at once, or, where prefilled passages are read from the store, as many as memory should hold."""
        if not self._cache.keeps_prefilled:
            yield rows
            return
        texts = list(dict.fromkeys(row.text for row in rows))
        for start in range(0, len(texts), _READ_AT_ONCE):
            chosen = set(texts[start : start + _READ_AT_ONCE])
            yield [row for row in rows if row.text in chosen]

    def _rows(self, pairs: Sequence[tuple[str, str]], instruction: str) -> list[_Row]:
        prompts: dict[str, Prompt] = {}
        for query, _ in pairs:
            if query not in prompts:
                prompts[query] = self._prompts.prompt(query, instruction)
        clean = self.loaded.tokenizer.clean
        return [_Row(prompts[query], clean(text)) for query, text in pairs]

    def _score_rows(self, rows: list[_Row], instruction: str, ratio: int, progress: Progress | None) -> None:
        """Fill in the margins."""
        warm: list[_Row] = []
        if self._prefill_works:
            beginning = self._beginning(instruction)
            warm = [row for row in rows if beginning.fits(row.prompt)]
            with self._lock:
                self._counters.full_prompts += len(rows) - len(warm)
        taken = set(map(id, warm))
        plain = [row for row in rows if id(row) not in taken]
        # Each row pays for what it lacks: first its prefilled passage is looked up, then states, then it is encoded.
        prefilled: dict[str, Prefilled] = {}
        if warm:
            texts = list(dict.fromkeys(row.text for row in warm))
            prefilled = self._find_prefilled(texts, beginning, ratio)
        needed = list(dict.fromkeys(row.text for row in [*plain, *warm] if row.text not in prefilled))
        known = self._lookup(needed, ratio)
        states = known | self._encode_all([text for text in needed if text not in known], ratio)
        if warm:
            try:
                self._score_warm(warm, beginning, ratio, prefilled, states, progress)
            except PrefillUnsupportedError as error:
                self._go_without_prefill(error)
                self._score_rows(rows, instruction, ratio, progress)
                return
        if plain:
            pairs = [Pair(row.prompt, states[row.text]) for row in plain]
            for row, pair, margin in zip(plain, pairs, self._plain.margins(pairs, progress), strict=True):
                row.margin, row.passage_truncated = margin, pair.passage.truncated

    def _go_without_prefill(self, error: PrefillUnsupportedError) -> None:
        with self._lock:
            first, self._prefill_works = self._prefill_works, False
        if first:
            logger.warning("%s: every query runs its full prompt", error)
        self._prefilled.clear()

    def _score_warm(
        self,
        rows: list[_Row],
        beginning: Beginning,
        ratio: int,
        prefilled: dict[str, Prefilled],
        states: dict[str, PassageStates],
        progress: Progress | None,
    ) -> None:
        """Prefill what is missing and score, a group of passages at a time: prefilled passages are large."""
        by_text: dict[str, list[_Row]] = {}
        for row in rows:
            by_text.setdefault(row.text, []).append(row)
        for group, size in self._groups(list(by_text), prefilled, states, len(beginning.ids)):
            members = [row for text in group for row in by_text[text]]
            with self._room.of(size):
                missing = [text for text in group if text not in prefilled]
                ready = {text: prefilled.pop(text) for text in group if text in prefilled}
                ready |= self._prefill(missing, states, beginning, ratio)
                margins = self._warm.margins(beginning, [WarmPair(row.prompt, ready[row.text]) for row in members])
                for row, margin in zip(members, margins, strict=True):
                    row.margin, row.passage_truncated = margin, ready[row.text].truncated
                del ready
            if progress is not None:
                progress.advance(len(members))

    def _groups(
        self, texts: list[str], prefilled: dict[str, Prefilled], states: dict[str, PassageStates], skip: int
    ) -> Iterator[tuple[list[str], int]]:
        """Passages in groups whose prefilled form takes at most `_GROUP_BYTES`, and those bytes; one passage may."""
        group: list[str] = []
        size = 0
        for text in texts:
            ready = prefilled.get(text)
            more = ready.nbytes if ready else self._warm.bytes_of(skip + len(states[text].states))
            if group and size + more > _GROUP_BYTES:
                yield group, size
                group, size = [], 0
            group.append(text)
            size += more
        yield group, size

    def _find_prefilled(self, texts: Sequence[str], beginning: Beginning, ratio: int) -> dict[str, Prefilled]:
        """What is prefilled in memory, or in the store if it keeps prefilled passages."""
        keys = dict(zip(self._prefilled_keys(texts, beginning, ratio), texts, strict=True))
        found = self._prefilled.get_many(keys)
        missing = [key for key in keys if key not in found]
        device, shape, skip = self.loaded.device, self._warm.shape, len(beginning.ids)
        stored = self._cache.lookup_prefilled(missing, lambda frame: Prefilled.from_frame(frame, shape, skip, device))
        for key, passage in stored.items():
            self._prefilled.put(key, passage)
        with self._lock:
            self._counters.hits += len(found)
            self._counters.stored += len(stored)
            self._counters.misses += len(missing) - len(stored)
        return {keys[key]: passage for key, passage in {**found, **stored}.items()}

    def _prefill(
        self, texts: Sequence[str], states: dict[str, PassageStates], beginning: Beginning, ratio: int
    ) -> dict[str, Prefilled]:
        """Prefill passages and keep them where they are kept."""
        keys = dict(zip(texts, self._prefilled_keys(texts, beginning, ratio), strict=True))
        made: dict[str, Prefilled] = {}
        for batch in self._warm.batches(beginning, [states[text] for text in texts]):
            part = [texts[place] for place in batch]
            with self._turns:
                # Another call may have made them while this one waited.
                known = self._prefilled.get_many([keys[text] for text in part])
                rest = [text for text in part if keys[text] not in known]
                new = self._warm.prefill(beginning, [states[text] for text in rest]) if rest else []
                self.loaded.files.check()
                for text, passage in zip(rest, new, strict=True):
                    self._prefilled.put(keys[text], passage)
            made |= dict(zip(rest, new, strict=True))
            made |= {text: known[keys[text]] for text in part if keys[text] in known}
            makers = {keys[text]: partial(_frame_of, made[text], keys[text], self._space.model) for text in rest}
            self._cache.keep_prefilled(makers)
        return made

    def _prefilled_keys(self, texts: Sequence[str], beginning: Beginning, ratio: int) -> list[str]:
        return self._space.prefilled_keys(texts, ratio=ratio, beginning=beginning.ids, kind=self._warm.name)

    def _beginning(self, instruction: str) -> Beginning:
        with self._lock:
            found = self._beginnings.get(instruction)
        if found is None:
            found = find_beginning(self._prompts, instruction)
            with self._lock:
                if len(self._beginnings) >= _MOST_INSTRUCTIONS:
                    self._beginnings.clear()
                self._beginnings[instruction] = found
        return found

    def _rescue(self, rows: list[_Row], instruction: str, ratio: int) -> None:
        """Compute anew, from the text, what gave no finite margin.

        A checksum holds for numbers that somebody wrote on purpose, NaN included: a cache must not make that an error.
        """
        bad = [row for row in rows if not math.isfinite(row.margin)]
        if not bad:
            return
        spoiled = list(dict.fromkeys(row.text for row in bad))
        beginning = self._beginning(instruction)
        prefilled = self._prefilled_keys(spoiled, beginning, ratio)
        self._prefilled.delete(prefilled)
        self._cache.forget([*map(self._space.key, spoiled), *prefilled])
        fresh = self._encode_all(spoiled, ratio)
        pairs = [Pair(row.prompt, fresh[row.text]) for row in bad]
        for row, pair, margin in zip(bad, pairs, self._plain.margins(pairs), strict=True):
            row.margin, row.passage_truncated = margin, pair.passage.truncated

    def _check_lengths(self) -> None:
        positions = self.loaded.model.config.encoder.text_config.max_position_embeddings
        if self._settings.max_length > positions:
            msg = f"max_length={self._settings.max_length} is more than the {positions} positions of this model"
            raise ValueError(msg)

    def prefill_stats(self) -> PrefillStats:
        """Counters and size of the prefilled level."""
        with self._lock:
            counters = replace(self._counters)
        return PrefillStats(counters, self._prefilled.stats())

    def _lookup(self, texts: Sequence[str], ratio: int) -> dict[str, PassageStates]:
        width = self.loaded.model.config.decoder.hidden_size
        return self._cache.lookup(self._space, texts, ratio, self.loaded.dtype, width)

    def _encode_all(self, texts: Sequence[str], ratio: int) -> dict[str, PassageStates]:
        found: dict[str, PassageStates] = {}
        for encoded, _ in self._encode(texts, ratio):
            found |= encoded
        return found

    def _encode(self, texts: Sequence[str], ratio: int) -> Iterator[tuple[dict[str, PassageStates], int]]:
        """Encode and keep passages, one batch at a time.

        Yields:
            The passages of a batch at `ratio`, and how many of them were encoded: what another call has encoded while
            this one waited for its turn is not encoded again.
        """
        if not texts:
            return
        base = self._cache.base_ratio
        keep = ratio % base == 0
        if not keep:
            self._warn_ratio(ratio)
        passages = self._tokenise(texts)
        for batch in self._encoder.batches(passages):
            with self._turns:
                known = self._recall([texts[place] for place in batch], base) if keep else {}
                rest = [place for place in batch if texts[place] not in known]
                new = self._encoder.encode([passages[place] for place in rest], base if keep else ratio) if rest else []
                encoded = dict(zip([texts[place] for place in rest], new, strict=True))
                self.loaded.files.check()
                if keep:
                    encoded, frames = self._cache.remember(self._space, encoded)
            if keep:
                self._cache.write(frames)
            yield {text: passage.at(ratio) for text, passage in {**known, **encoded}.items()}, len(encoded)

    def _tokenise(self, texts: Sequence[str]) -> list[PassageTokens]:
        """In parts, so that other calls' texts come in between."""
        found: list[PassageTokens] = []
        for start in range(0, len(texts), _TOKENISED_AT_ONCE):
            check_stopped()
            found += self._prompts.passages(texts[start : start + _TOKENISED_AT_ONCE])
        return found

    def _recall(self, texts: Sequence[str], ratio: int) -> dict[str, PassageStates]:
        width = self.loaded.model.config.decoder.hidden_size
        return self._cache.recall(self._space, texts, ratio, self.loaded.dtype, width)

    def _warn_ratio(self, ratio: int) -> None:
        with self._lock:
            if ratio in self._warned_ratios:
                return
            self._warned_ratios.add(ratio)
        logger.warning(
            "ratio %d is no multiple of the ratio %d at which the cache keeps passages: they are encoded again at "
            "every call; make the cache with base_ratio=%d to keep them",
            ratio,
            self._cache.base_ratio,
            ratio,
        )
