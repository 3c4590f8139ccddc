"""Training of all decoder weights instead of an adapter, for `benchmarks/tuning.py`: same loop, same lists."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path

import torch

from kalm_rag.cache import PassageCache
from kalm_rag.evaluation import Candidates, Experiment, Metrics, System, bm25_candidates
from kalm_rag.model.checkpoint import Checkpoint, find_checkpoint
from kalm_rag.model.identity import identify
from kalm_rag.model.loading import LoadedModel, load_model, resolve_device, weight_name
from kalm_rag.model.prompts import Prompts
from kalm_rag.retrieval.corpus import Corpus
from kalm_rag.settings import Settings
from kalm_rag.states import StatesSource, key_space
from kalm_rag.tuning import Recipe
from kalm_rag.tuning.judgements import make_examples, split_queries
from kalm_rag.tuning.report import METRIC, Tuned, compare
from kalm_rag.tuning.task import DecoderTask
from kalm_rag.tuning.trainer import Trainer
from kalm_rag.utils.turns import Turns


def tune_fully(
    corpus: Corpus, out: Path, *, model: str, cache: str, recipe: Recipe, by_passages: bool, held_out: Collection[str]
) -> Tuned:
    """As `kalm_rag.tuning.tune`, but all weights of the decoder's layers are trained, and `out` receives a checkpoint.

    The embeddings, and with them the answer rows of the output matrix, stay as they are.
    """
    candidates = bm25_candidates(corpus, recipe.depth)
    usable = [query for query in held_out if query in candidates.qrels]
    parts = split_queries(candidates.qrels, recipe, by_passages=by_passages, held_out=usable)
    examples, _ = make_examples(corpus, candidates, parts.train, recipe)
    validation, _ = make_examples(corpus, candidates, parts.validation, recipe)
    checkpoint, settings = find_checkpoint(model), Settings(prefill_memory=0)
    loaded = load_model(checkpoint, settings=settings, device=resolve_device(None), dtype="float32", fast=False)
    weights = decoder_weights(loaded)
    out.mkdir(parents=True)
    with PassageCache(cache) as passages:
        identity, dtype = identify(checkpoint), loaded.encoder_precision
        keys = key_space(identity, max_length=settings.max_length, dtype=dtype, storage=passages.storage)
        prompts = Prompts(loaded.tokenizer, settings, loaded.model.config.decoder.max_position_embeddings)
        states = StatesSource(loaded, settings, passages, keys, prompts, Turns())
        state = out / "state"
        state.mkdir()
        trainer = Trainer(DecoderTask(loaded, states, prompts, examples, validation, recipe, weights, "full"), state)
        trainer.run()
        encoded = passages.stats().encoded
    shutil.rmtree(state)
    save(checkpoint, trainer.best, out)
    measured = Candidates(
        candidates.name,
        {query: candidates.rankings[query] for query in parts.test},
        {query: candidates.qrels[query] for query in parts.test},
        (),
    )
    systems = [System(model, ratio) for ratio in dict.fromkeys((recipe.ratios[0], max(recipe.ratios)))]
    experiment = Experiment(corpus, measured, systems, Metrics([METRIC]), cache=cache, lengths=0)
    done = trainer.progressed
    return Tuned(
        out,
        compare(experiment, [System(str(out), one.ratio) for one in systems]),
        done.step,
        done.best_step,
        done.losses,
        done.validation,
        done.ended,
        (len(parts.train), len(parts.validation), len(parts.test)),
        encoded,
        0.0,
        done.seconds,
    )


def decoder_weights(loaded: LoadedModel) -> dict[str, torch.nn.Parameter]:
    """Return all weights of the decoder's layers and of its last norm, ready for training, by name."""
    decoder = loaded.model.get_decoder()
    own = {id(weight) for part in (decoder.layers, decoder.norm) for weight in part.parameters()}
    found = {name: weight for name, weight in loaded.model.named_parameters() if id(weight) in own}
    for weight in found.values():
        weight.requires_grad_(True)
    return found


def save(checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor], out: Path) -> None:
    """Write a checkpoint with some weights replaced, in float32."""
    import safetensors.torch

    for path in checkpoint.folder.iterdir():
        if path.is_file() and path not in checkpoint.shards:
            shutil.copyfile(path, out / path.name)
    left = set(weights)
    for shard in checkpoint.shards:
        tensors = safetensors.torch.load_file(shard)
        for key in tensors:
            name = weight_name(key, weights)
            if name is not None:
                tensors[key] = weights[name].contiguous()
                left.discard(name)
        safetensors.torch.save_file(tensors, out / shard.name, metadata={"format": "pt"})
    if left:
        raise RuntimeError(f"the checkpoint has no {sorted(left)[:3]}")
