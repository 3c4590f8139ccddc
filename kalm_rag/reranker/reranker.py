"""The public scorer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from kalm_rag.cache import ForgetReport, PassageCache, Store
from kalm_rag.documents import TextOf, iter_documents, iter_pairs, iter_queries, repair_text
from kalm_rag.latency.records import BackgroundStats, RerankerStats
from kalm_rag.reranker.ordering import ordered
from kalm_rag.reranker.ranking import RankingModel
from kalm_rag.reranker.rankings import Rankings
from kalm_rag.results import D, EncodeReport, Estimate, PrefillStats, Ranking, ranked_passage
from kalm_rag.settings import (
    AT_ONCE,
    DEFAULT_INSTRUCTION,
    DEFAULT_MAX_WINDOWS,
    DEFAULT_PREFILL_MEMORY,
    DEFAULT_SCORE_MEMORY,
    DEFAULT_SYSTEM_PROMPT,
    ControlTokens,
    LongPassages,
    PrefillMemory,
    PrefillStorage,
    Settings,
)
from kalm_rag.thresholds import ThresholdLike, read_limit
from kalm_rag.utils import forks
from kalm_rag.utils.checks import check_positive, check_string
from kalm_rag.utils.paths import DEFAULT, user_path
from kalm_rag.utils.progress import Progress
from kalm_rag.utils.recording import recording

if TYPE_CHECKING:
    import torch

    from kalm_rag.cache.scores import ScoreStats


class KaLMReranker(RankingModel):
    """Scores passages against queries with a KaLM-Reranker-V1 checkpoint (arXiv 2606.22807).

    Nothing is loaded until the first call that needs the model, or `load()`. One instance may be used from any
    number of threads, whose calls take turns batch by batch. It may be a context manager; `close()` frees its memory.

    In a forked process a model on a CPU works, with one thread; start processes with the method `spawn` to use more. A
    copy or a pickle is made of the arguments, `token` included, and loads its own model; a `PassageCache` or a store
    is shared by copies in one process.

    Args:
        model: `nano`, `small` or `large` (the R2 releases), `mini` (a demonstration checkpoint inside this package, for
            trying things offline), a local folder, or a hub id.
        revision: branch, tag or commit on the hub.
        lora: folder of an adapter that `kalm-rag tune` trained on this model. It changes the decoder only: encoded
            passages in caches stay valid.
        device: `cpu`, `cuda`, `cuda:1`, `mps`, ... Default: CUDA if there is one, else the CPU.
        dtype: `float32`, `bfloat16`, `float16`, or on an x86 CPU with VNNI instructions `int8` (the decoder's large
            matrices in 8 bits, the encoder in float32) or `int8-all` (the encoder's matrices as well); with these two
            scores change a little. Default: bfloat16 on CUDA, float32 elsewhere.
        max_length: tokens of a passage that are read, its prefix included. Longer passages are truncated, and
            the result says so.
        query_max_length: tokens of a query that are read.
        ratio: encoder states averaged into one (MEP compression): 1 keeps all, 4 is the model cards' default, the
            models are trained for 1, 2, 4, 8, 16 and 32. A ratio of more tokens than a passage has pools it to one
            state. None is 1.
        instruction: what "relevant" means, in a sentence. Default: the model cards'.
        system_prompt: the sentence before it. Default: the model cards'.
        batch_size: rows per forward pass at most.
        batch_tokens: tokens per forward pass at most, padding included.
        control_tokens: what happens to control tokens such as `<end_of_turn>` in passages and queries. `escape`
            breaks them with a space, so that no text can forge the end of the prompt; `allow` lets them through
            as the reference implementation does. Text without control tokens scores the same under both.
        cache: where encoded passages are kept: a folder, a `PassageCache`, a store, or None to keep them in this
            process only. Default: the folder that `KALM_RAG_CACHE` names, else the user's, shared by all processes.
        prefill_memory: bytes of prefilled passages kept in memory, on the model's device: what makes a query on known
            passages fast. 0 keeps none; `auto` is a quarter of what is free when the model is loaded, at most 4 GB, or
            16 GB of a CUDA device.
        prefill_storage: `native`; or, where scores may change a little, `int8` for about half (of bfloat16) or a
            quarter (of float32) of the bytes, or `compact` for about a seventh or a tenth.
        score_memory: bytes of remembered scores: a pair of query and passage that this instance scored before, under
            the same instruction and ratio, gets that score without the model. 0 remembers none, for measurements.
        refine: rank passages that are not prefilled in two passes: an approximate one over all, and the exact one over
            those that can be among the `top_k` or lie near the `threshold`. See `rank` for which scores are exact.
        long_passages: `truncate`; or `windows`, which splits a passage that is longer than a window at the end of a
            paragraph, a sentence or a word. Each window is encoded and cached as a passage of its own, and the passage
            gets the score of its best one.
        window_tokens: tokens of a window at most, the prefix of a passage included. Default: `max_length`.
        window_overlap: tokens that a window repeats of the one before, at most. Default: an eighth of `window_tokens`.
        max_windows: windows of a passage that are read, from its beginning. Of a longer one the rest is not read, and
            the result says so.
        encode_in_background: encode passages that a call with `budget_ms` or `on_unknown="skip"` left out, while nobody
            waits for the model, so that the next query finds them.
        show_progress: True, False, or None for bars on long work when standard error is a terminal.
        token: hub token, if the model needs one.
        local_files_only: never ask the hub, use what was downloaded.

    Attributes:
        model: as given.
        dtype: as given.
        settings: how passages and queries become scores.
        cache: the `PassageCache` in use.
        owns_cache: whether `close` closes the cache: True for one that was made here.
        repairs: its `count` is how many texts held half a surrogate pair, as broken extraction leaves it. It is
            read as U+FFFD instead of failing the call, and the result says so.
        truncations: its `count` is how many passages and queries were longer than `max_length` (or `max_windows`
            windows) and `query_max_length`. The first logs a warning, and the result says so.

    Raises:
        ValueError, TypeError: a setting is wrong; the message names it, its value and the rule.
    """

    def __init__(
        self,
        model: str | Path = "nano",
        *,
        revision: str | None = None,
        lora: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        max_length: int = 1024,
        query_max_length: int = 512,
        ratio: int | None = 4,
        instruction: str = DEFAULT_INSTRUCTION,
        system_prompt: str = DEFAULT_SYSTEM_PROMPT,
        batch_size: int = 32,
        batch_tokens: int = 16384,
        control_tokens: ControlTokens = "escape",
        cache: str | Path | Store | PassageCache | None = DEFAULT,
        prefill_memory: PrefillMemory = DEFAULT_PREFILL_MEMORY,
        prefill_storage: PrefillStorage = "native",
        score_memory: int = DEFAULT_SCORE_MEMORY,
        refine: bool = False,
        long_passages: LongPassages = "truncate",
        window_tokens: int | None = None,
        window_overlap: int | None = None,
        max_windows: int = DEFAULT_MAX_WINDOWS,
        encode_in_background: bool = True,
        show_progress: bool | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> None:
        settings = Settings(
            max_length=max_length,
            query_max_length=query_max_length,
            ratio=1 if ratio is None else ratio,
            instruction=instruction,
            system_prompt=system_prompt,
            batch_size=batch_size,
            batch_tokens=batch_tokens,
            control_tokens=control_tokens,
            prefill_memory=prefill_memory,
            prefill_storage=prefill_storage,
            score_memory=score_memory,
            refine=refine,
            long_passages=long_passages,
            window_tokens=window_tokens,
            window_overlap=window_overlap,
            max_windows=max_windows,
            encode_in_background=encode_in_background,
        )
        arguments = {
            **asdict(settings),
            "model": model,
            "revision": revision,
            "lora": None if lora is None else user_path(lora, "lora"),
            "device": device,
            "dtype": dtype,
            "cache": cache,
            "show_progress": show_progress,
            "token": token,
            "local_files_only": local_files_only,
        }
        super().__init__(settings, arguments)

    def __repr__(self) -> str:
        state = "not loaded" if self._scorer is None else "loaded"
        lora = "" if self._arguments["lora"] is None else f"lora={str(self._arguments['lora'])!r}, "
        return f"KaLMReranker({str(self.model)!r}, {lora}ratio={self.settings.ratio}, {state})"

    def reading(self, long_passages: LongPassages) -> KaLMReranker:
        """Return an instance that reads long passages in another way, with this one's model and cache; loads the model.

        It takes no memory of its own, and is not to be closed. Settings of windows that do not apply to it are left
        out.

        Args:
            long_passages: as in the arguments of the class.

        Raises:
            CheckpointError: the model cannot be found or used.
            ValueError: there is no such way.
        """
        with forks.native():
            from kalm_rag.scorer import reading

        changed: dict[str, Any] = {"long_passages": long_passages, "cache": self.cache}
        if long_passages == "truncate":
            changed |= {"window_tokens": None, "window_overlap": None, "max_windows": DEFAULT_MAX_WINDOWS}
        made = KaLMReranker(**{**self._arguments, **changed})
        made._scorer = reading(self.scorer, made.settings)
        return made

    def predict(
        self,
        pairs: Iterable[Sequence[Any]],
        instruction: str | None = None,
        ratio: int | None = None,
        show_progress: bool | None = None,
    ) -> list[float]:
        """Score `(query, passage)` pairs.

        Args:
            pairs: two-element sequences of a query and a passage, in any order; equal pairs are computed once.
            instruction: for this call, instead of the instance's.
            ratio: for this call, instead of the instance's.
            show_progress: for this call, instead of the instance's.

        Returns:
            `P(yes)` of each pair, in input order.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it and its value.
            CheckpointError: the model cannot be found or used.
            ScoringError: the model gave non-finite numbers.
        """
        with recording() as recorded:
            repaired = [(repair_text(query), repair_text(passage)) for query, passage in iter_pairs(pairs)]
            self.repairs.add(sum(changed for pair in repaired for _, changed in pair))
            checked = [(query, passage) for (query, _), (passage, _) in repaired]
            scored = self._score(checked, instruction, ratio, show_progress)
        self._tell(recorded, scored, len(scored))
        return [score.probability for score in scored]

    def rank_many(
        self,
        queries: Iterable[str],
        documents: Iterable[D],
        top_k: int | None = None,
        instruction: str | None = None,
        ratio: int | None = None,
        threshold: ThresholdLike | None = None,
        show_progress: bool | None = None,
        *,
        text: TextOf[D] | None = None,
        calibrated: bool = False,
    ) -> Rankings[D]:
        """Order the same passages for each of several queries, such as reformulations of one question.

        The scores are those of a call of `rank` per query. Each passage is looked up, encoded and prefilled once for
        all queries (with `prefill_memory=0` every pair runs its full prompt, as in `rank`), and pairs of all queries
        share forward passes. Equal queries are computed once. Every pair gets its exact score, so that `refine` saves
        nothing.

        Args:
            queries: the queries, in any iterable with an order.
            documents: as in `rank`; the passages of all queries.
            top_k: how many to return for each query, default all.
            instruction: for this call, instead of the instance's.
            ratio: for this call, instead of the instance's.
            threshold: as in `rank`, for each query.
            show_progress: for this call, instead of the instance's.
            text: as in `rank`.
            calibrated: as in `rank`.

        Returns:
            A list of one `Ranking` per query, in the order given; its `fused` makes one ranking of them. No queries, or
            no passages, need no model.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it and its value.
            CheckpointError: the model cannot be found or used.
            ScoringError: the model gave non-finite numbers.
        """
        with recording() as recorded:
            asked = [repair_text(query) for query in iter_queries(queries)]
            limit = read_limit(threshold, calibrated)
            wanted = limit.wanted(None if top_k is None else check_positive("top_k", top_k))
            given = list(iter_documents(documents, text))
            self.repairs.add(sum(changed for _, changed in asked) + sum(passage.repaired for passage in given))
            pairs = [(query, passage.text) for query, _ in asked for passage in given]
            scored = self._score(pairs, instruction, ratio, show_progress, profile=limit.profile)
            left = iter(scored)
            hits = [
                [
                    ranked_passage(index, limit.shown(score.margin), score, passage, query_repaired)
                    for index, (passage, score) in enumerate(zip(given, islice(left, len(given)), strict=True))
                ]
                for _, query_repaired in asked
            ]
            rankings = Rankings(hits, wanted)
        rankings.counts, rankings.timings = self._tell(recorded, scored, sum(map(len, rankings)))
        return rankings

    def rank_each(
        self,
        requests: Iterable[tuple[str, Iterable[D]]],
        instruction: str | None = None,
        ratio: int | None = None,
        *,
        text: TextOf[D] | None = None,
    ) -> list[Ranking[D]]:
        """Order passages for each of several queries, each with passages of its own, in one call.

        The scores are those of a call of `rank` per query, but pairs of all queries share forward passes, which is
        faster where the lists are short. Every pair gets its exact score, so that `refine` saves nothing.

        Args:
            requests: queries, each with its passages as in `rank`.
            instruction: for this call, instead of the instance's.
            ratio: for this call, instead of the instance's.
            text: as in `rank`.

        Returns:
            One ranking per query, in the order given. The counts and timings of each are those of the whole call.

        Raises:
            TypeError, ValueError: an argument is wrong; the message names it and its value.
            CheckpointError: the model cannot be found or used.
            ScoringError: the model gave non-finite numbers.
        """
        with recording() as recorded:
            asked = [
                (repair_text(check_string("query", query)), list(iter_documents(own, text))) for query, own in requests
            ]
            self.repairs.add(sum(changed + sum(passage.repaired for passage in given) for (_, changed), given in asked))
            pairs = [(query, passage.text) for (query, _), given in asked for passage in given]
            scored = self._score(pairs, instruction, ratio, show_progress=False)
            left, limit = iter(scored), read_limit(None, calibrated=False)
            rankings = [
                ordered(
                    given,
                    list(islice(left, len(given))),
                    limit.wanted(None),
                    limit,
                    None,
                    query_repaired=changed,
                    partial=False,
                )
                for (_, changed), given in asked
            ]
        counts, timings = self._tell(recorded, scored, len(scored))
        for ranking in rankings:
            ranking.counts, ranking.timings = counts, timings
        return cast("list[Ranking[D]]", rankings)

    def encode(
        self, documents: Iterable[D], show_progress: bool | None = None, *, text: TextOf[D] | None = None
    ) -> EncodeReport:
        """Encode passages ahead of the queries that will need them.

        Args:
            documents: as in `rank`; a generator is consumed in parts, so a corpus need not fit into memory.
            show_progress: for this call, instead of the instance's.
            text: as in `rank`.

        Returns:
            How many passages were new, known already, and truncated. What is reported as new has been handed to the
            store: `cache.stats()` tells whether the store failed to keep it.

        Raises:
            TypeError, ValueError: a passage is wrong; the message names its position.
            CheckpointError: the model cannot be found or used.
        """
        # Nobody knows how many windows there will be.
        total = len(documents) if isinstance(documents, Sequence) and not self.settings.splits else None
        given = iter_documents(documents, text)
        new = known = truncated = repaired = 0
        show = self._show_progress if show_progress is None else show_progress
        with Progress(total, "encoding", show=show) as progress:
            while some := list(islice(given, AT_ONCE)):
                changed = sum(passage.repaired for passage in some)
                self.repairs.add(changed)
                report = self.scorer.encode([passage.text for passage in some], progress)
                self.cache.flush()
                new, known, truncated = new + report.new, known + report.known, truncated + report.truncated
                repaired += changed
                self.truncations.add(report.truncated)
        return EncodeReport(new, known, truncated, repaired)

    def forget(self, documents: Iterable[D], *, text: TextOf[D] | None = None) -> ForgetReport:
        """Delete what the cache keeps of passages, so that nothing of them is left in it, nor in this instance.

        The model is not loaded for it. See `PassageCache.forget` for what is searched, and what cannot be reached. The
        windows of long passages are forgotten too, under these settings and those that the cache has recorded; only for
        that the tokenizer is loaded.

        Args:
            documents: as in `rank`. Any iterable.
            text: as in `rank`.

        Raises:
            TypeError: a passage is wrong; the message names its position. The passages before it may be forgotten.
            StoreError: the cache's store is read-only, failed, or does not delete.
            CheckpointError: the tokenizer is needed to find windows, and is not here.
        """
        with forks.native():
            from kalm_rag.forget import forget_texts

        texts = (passage.text for passage in iter_documents(documents, text))
        named = {name: self._arguments[name] for name in ("revision", "lora")}
        return forget_texts(self.cache, texts, self._scorer, self.settings, self.model, **named)

    def unknown(self, documents: Iterable[D], *, text: TextOf[D] | None = None) -> list[str]:
        """Return the distinct texts among these passages that the cache does not hold.

        Raises:
            TypeError, ValueError: a passage is wrong; the message names its position.
            CheckpointError: the model cannot be found or used.
        """
        with forks.native():
            from kalm_rag.windows.passages import unknown_passages

        return unknown_passages(self.scorer, [passage.text for passage in iter_documents(documents, text)])

    def estimate(self, documents: Iterable[D], *, text: TextOf[D] | None = None) -> Estimate:
        """Return how many tokens and bytes these passages take, without encoding them.

        Raises:
            TypeError, ValueError: a passage is wrong; the message names its position.
            CheckpointError: the model cannot be found or used.
        """
        with forks.native():
            from kalm_rag.windows.passages import estimate_passages

        return estimate_passages(self.scorer, [passage.text for passage in iter_documents(documents, text)])

    async def arank_many(
        self,
        queries: Iterable[str],
        documents: Iterable[D],
        top_k: int | None = None,
        instruction: str | None = None,
        ratio: int | None = None,
        threshold: ThresholdLike | None = None,
        show_progress: bool | None = None,
        *,
        text: TextOf[D] | None = None,
        calibrated: bool = False,
    ) -> Rankings[D]:
        """`rank_many` for asynchronous programs; see `arank`."""
        rank_many = partial(self.rank_many, text=text, calibrated=calibrated)
        return await self._calls.run(
            "rank", rank_many, queries, documents, top_k, instruction, ratio, threshold, show_progress
        )

    async def apredict(
        self,
        pairs: Iterable[Sequence[Any]],
        instruction: str | None = None,
        ratio: int | None = None,
        show_progress: bool | None = None,
    ) -> list[float]:
        """`predict` for asynchronous programs; see `arank`."""
        return await self._calls.run("rank", self.predict, pairs, instruction, ratio, show_progress)

    async def aencode(
        self, documents: Iterable[D], show_progress: bool | None = None, *, text: TextOf[D] | None = None
    ) -> EncodeReport:
        """`encode` for asynchronous programs; see `arank`."""
        return await self._calls.run("encode", partial(self.encode, text=text), documents, show_progress)

    async def aforget(self, documents: Iterable[D], *, text: TextOf[D] | None = None) -> ForgetReport:
        """`forget` for asynchronous programs; see `arank`."""
        return await self._calls.run("encode", partial(self.forget, text=text), documents)

    def stats(self) -> RerankerStats:
        """Return what the calls of `rank` and `predict` took so far, and what waits in the background."""
        scorer = self._scorer
        return self._totals.stats(BackgroundStats() if scorer is None else scorer.background.stats())

    def flush(self, timeout: float | None = None) -> int:
        """Wait until passages that calls left out are encoded, and the cache is written out.

        Args:
            timeout: seconds at most; None waits for all.

        Returns:
            How many passages are left; they stay in the queue.
        """
        left = 0 if (scorer := self._scorer) is None else scorer.background.finish(timeout)
        self.cache.flush()
        return left

    @property
    def unknown_texts(self) -> int:
        """How many queries scored and passages encoded were mostly unknown tokens, since the model was loaded."""
        return 0 if (scorer := self._scorer) is None else scorer.prompts.unknown.count

    def prefill_stats(self) -> PrefillStats | None:
        """Hits, misses and size of the prefilled passages in memory; None while the model is not loaded."""
        return None if (scorer := self._scorer) is None else scorer.passage_kv.cached.stats()

    def score_stats(self) -> ScoreStats | None:
        """Hits, misses and size of the remembered scores; None while the model is not loaded."""
        return None if (scorer := self._scorer) is None else scorer.score_cache.stats()
