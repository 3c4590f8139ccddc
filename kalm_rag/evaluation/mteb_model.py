"""A `KaLMReranker` as a model of the package `mteb`, so that its reranking tasks run with the cache."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalm_rag.errors import MissingExtraError
from kalm_rag.model.identity import identify
from kalm_rag.reranker import KaLMReranker

if TYPE_CHECKING:
    from mteb.models import ModelMeta
    from numpy.typing import NDArray


class MTEBReranker:
    """Implements mteb's `CrossEncoderProtocol` with a reranker that encodes each passage once.

    It reads what the reference wrapper in mteb reads: where a task has instructions, mteb's query text ends with the
    instruction, which also takes the place of the reranker's.

    A task asks for every (query, passage) pair; passages that several queries share, and passages that an earlier
    task or run encoded, come from the reranker's cache.

    Args:
        reranker: the reranker; its instruction is used where the task gives none.

    Raises:
        MissingExtraError: `mteb` is not installed.

    Example:
        >>> import mteb
        >>> model = MTEBReranker(KaLMReranker("nano"))  # doctest: +SKIP
        >>> mteb.evaluate(model, tasks=mteb.get_tasks(["SciDocsReranking"]))  # doctest: +SKIP
    """

    def __init__(self, reranker: KaLMReranker) -> None:
        try:
            import mteb  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("mteb", "mteb") from error
        self.reranker = reranker

    @cached_property
    def mteb_model_meta(self) -> ModelMeta:
        """Name and content digest of the model, under which mteb files the results."""
        from mteb.models import ModelMeta

        identity = identify(self.reranker.checkpoint())
        settings = self.reranker.settings
        name = str(self.reranker.model)
        return ModelMeta.create_empty(
            {
                "name": name if name.count("/") == 1 and not Path(name).exists() else f"kalm-rag/{Path(name).name}",
                "revision": identity.mark,
                "max_tokens": settings.max_length,
                "use_instructions": True,
                "model_type": ["cross-encoder"],
                "framework": ["PyTorch", "Transformers"],
                # mteb files results under these: whatever changes a score must be among them.
                "experiment_kwargs": {
                    "ratio": settings.ratio,
                    "dtype": str(self.reranker.scorer.loaded.dtype).removeprefix("torch."),
                    "settings": hashlib.sha256(
                        repr((settings, self.reranker.cache.storage, self.reranker.dtype)).encode()
                    ).hexdigest()[:12],
                },
            }
        )

    def predict(self, inputs1: Any, inputs2: Any, **options: Any) -> NDArray[Any]:
        """`P(yes)` of each pair.

        Args:
            inputs1: mteb's batches of queries; an `instruction` beside a query replaces the reranker's.
            inputs2: mteb's batches of passages, as many.
            options: what mteb says about the task, and `show_progress_bar`.

        Returns:
            Float64 of shape `(pairs,)`, in input order.

        Raises:
            ValueError: there are not as many queries as passages.
        """
        import numpy as np

        queries: list[str] = []
        instructions: list[str | None] = []
        for batch in inputs1:
            queries += batch["text"]
            instructions += batch.get("instruction") or [None] * len(batch["text"])
        passages = [text for batch in inputs2 for text in batch["text"]]
        if len(queries) != len(passages):
            msg = f"inputs1 and inputs2 must be as long as each other, got {len(queries)} and {len(passages)}"
            raise ValueError(msg)
        scores = np.zeros(len(queries))
        places: dict[str | None, list[int]] = {}
        for place, instruction in enumerate(instructions):
            places.setdefault(instruction or None, []).append(place)
        show = True if options.get("show_progress_bar") else None
        for instruction, own in places.items():
            pairs = [(queries[place], passages[place]) for place in own]
            scores[own] = self.reranker.predict(pairs, instruction=instruction, show_progress=show)
        return scores
