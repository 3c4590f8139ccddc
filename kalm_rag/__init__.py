"""KaLM-Reranker for RAG pipelines: passages are encoded once and reused by every later query.

```python
from kalm_rag import KaLMReranker

passages = ["The capital of China is Beijing.", "Gravity attracts bodies toward one another."]
reranker = KaLMReranker("nano")
for hit in reranker.rank("What is the capital of China?", passages, top_k=1):
    print(hit.score, hit.document)
```

Importing this package imports neither torch nor transformers: both load with the first model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kalm_rag._version import __version__

if TYPE_CHECKING:
    from kalm_rag.adapters import Options
    from kalm_rag.cache import PassageCache
    from kalm_rag.client import RerankerClient
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.reranker.rankings import Rankings
    from kalm_rag.results import EncodeReport, PartialRanking, RankedPassage, Ranking, UnscoredPassage
    from kalm_rag.thresholds import ThresholdProfile
    from kalm_rag.utils.fusion import FirstStage

__all__ = [
    "EncodeReport",
    "FirstStage",
    "KaLMReranker",
    "Options",
    "PartialRanking",
    "PassageCache",
    "RankedPassage",
    "Ranking",
    "Rankings",
    "RerankerClient",
    "ThresholdProfile",
    "UnscoredPassage",
    "__version__",
]

_HOMES = {
    "EncodeReport": "kalm_rag.results",
    "FirstStage": "kalm_rag.utils.fusion",
    "KaLMReranker": "kalm_rag.reranker",
    "Options": "kalm_rag.adapters",
    "PartialRanking": "kalm_rag.results",
    "PassageCache": "kalm_rag.cache",
    "RankedPassage": "kalm_rag.results",
    "Ranking": "kalm_rag.results",
    "Rankings": "kalm_rag.reranker.rankings",
    "RerankerClient": "kalm_rag.client",
    "ThresholdProfile": "kalm_rag.thresholds",
    "UnscoredPassage": "kalm_rag.results",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    msg = f"module 'kalm_rag' has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return __all__
