"""What newer releases of transformers may change: the stock model's scores come out of every path, without a warning.

`make test-newest` runs this on the newest releases, with warnings as errors; it needs nothing but the core's packages.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
import transformers

from kalm_rag import KaLMReranker

TEXTS = ["A list is sorted in place by its method sort.", "", "Dictionaries keep the order of insertion. " * 20]


def stock_scores(checkpoint: Path, query: str, reranker: KaLMReranker) -> list[float]:
    """By transformers' own model, as the model card does it: `P(yes)` of whole prompts, one passage at a time."""
    engine = reranker.scorer
    tokenizer = engine.loaded.tokenizer
    model = transformers.T5Gemma2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    prompt = torch.tensor([engine.prompts.prompt(query).ids])
    found = []
    for passage in engine.prompts.passages(TEXTS):
        states = model.get_encoder()(input_ids=torch.tensor([passage.ids])).last_hidden_state
        groups = [group.mean(dim=1) for group in states.split(4, dim=1)]
        hidden = model.get_decoder()(
            input_ids=prompt, encoder_hidden_states=torch.stack(groups, dim=1), use_cache=False
        ).last_hidden_state[:, -1]
        logits = model.get_output_embeddings()(hidden)[0, [tokenizer.yes_id, tokenizer.no_id]]
        cap = model.config.decoder.final_logit_softcapping
        logits = logits if cap is None else torch.tanh(logits / cap) * cap
        found.append(float(logits.softmax(-1)[0]))
    return found


@pytest.mark.parametrize("memory", [0, 10**9])
@torch.inference_mode()
def test_the_stock_model_s_scores_without_a_warning(
    checkpoint: Path, memory: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Full prompts and prefilled passages; a deprecated argument or a path that is given up would show."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        warnings.simplefilter("error", DeprecationWarning)
        reranker = KaLMReranker(checkpoint, device="cpu", cache=None, prefill_memory=memory).load()
        for query in ("how to sort", "another question that is longer"):
            ours = reranker.predict([(query, text) for text in TEXTS])
            expected = stock_scores(checkpoint, query, reranker)
            assert max(abs(a - b) for a, b in zip(ours, expected, strict=True)) < 1e-5
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    if memory:
        counters = reranker.prefill_stats().counters
        assert (counters.hits, counters.full_prompts) == (len(TEXTS), 0)
