"""Identifies a model by a digest of its content, never of names, paths or dates."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kalm_rag.errors import CheckpointError
from kalm_rag.model.checkpoint import TOKENIZER_FILES, UNUSED, Checkpoint, check_tensor
from kalm_rag.model.prompts import PASSAGE_PREFIX
from kalm_rag.utils.digests import tagged_digest
from kalm_rag.utils.paths import digests_file

logger = logging.getLogger(__name__)

_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache"}
_MEMO_LIMIT = 64
_SETTLED_NS = 2_000_000_000
"""A file that changed less than this ago may change again without a new time: clocks of file systems are coarse."""


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Digests (SHA-256, hexadecimal) of all that shapes encoder states besides text, `max_length` and dtype.

    Attributes:
        encoder: weights of the encoder and its configuration.
        tokenizer: the tokenizer's files.
        template: the text around a passage.
        decoder: weights of the decoder, its adapter included, and its configuration; they shape prefilled passages, not
            states.
    """

    encoder: str
    tokenizer: str
    template: str
    decoder: str = ""

    @property
    def short(self) -> str:
        """The first twelve digits of `digest`, for people."""
        return self.digest.hex()[:12]

    @property
    def mark(self) -> str:
        """24 digits that stand for the whole model, decoder and adapter included, in reports and profiles."""
        return self.short + self.decoder[:12]

    @property
    def digest(self) -> bytes:
        """32 bytes that every cache entry of this model carries."""
        return tagged_digest(self.encoder, self.tokenizer, self.template).digest()


def identify(checkpoint: Checkpoint, memo: Path | None = None) -> ModelIdentity:
    """The identity of a checkpoint.

    Hashing the weights takes about a second per gigabyte, so the result is remembered by size, inode and times of
    change. The names of the hub's blobs are not used: a blob can be overwritten.

    Args:
        checkpoint: where the files are.
        memo: the file that remembers, default `digests.json` in the cache folder; without a home folder, none.

    Raises:
        CheckpointError: a file cannot be read, or changed since the checkpoint was found; or the checkpoint's adapter
            was trained on another model.
    """
    from safetensors import SafetensorError

    memo = memo or digests_file()
    known = {} if memo is None else _read_memo(memo)
    marks = checkpoint.marks[-len(checkpoint.shards) :]
    key = tagged_digest(_config_digest(checkpoint.config), *marks).hexdigest()
    settled = _settled(checkpoint.shards)  # before they are read: what changes after this gets a new time
    try:
        found = known.get(key) or _weight_digests(checkpoint)
        tokenizer = _tokenizer_digest(checkpoint.folder)
    except (SafetensorError, OSError) as error:
        msg = f"cannot read the files of {checkpoint.name!r} ({error}); download the checkpoint again"
        raise CheckpointError(msg) from error
    checkpoint.check_unchanged()  # so what was hashed is what the marks stand for
    if memo is not None and settled and key not in known:
        _write_memo(memo, {**known, key: found})
    encoder, decoder = found
    if checkpoint.lora is not None:
        checkpoint.lora.check_base(encoder, decoder, checkpoint.name)
        decoder = tagged_digest(decoder, checkpoint.lora.digest).hexdigest()
    return ModelIdentity(
        encoder=encoder,
        tokenizer=tokenizer,
        template=tagged_digest(PASSAGE_PREFIX).hexdigest(),
        decoder=decoder,
    )


def _settled(shards: Sequence[Path]) -> bool:
    """Whether the files are old enough for any later change to have another time."""
    stats = [shard.stat() for shard in shards]
    newest = max(max(stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats)
    return newest + _SETTLED_NS <= time.time_ns()


def _tokenizer_digest(folder: Path) -> str:
    files = [folder / name for name in TOKENIZER_FILES]
    parts = [part for file in files if file.is_file() for part in (file.name, file.read_bytes())]
    return tagged_digest(*parts).hexdigest()


def _config_digest(config: dict[str, Any]) -> str:
    return tagged_digest(_part_config(config, "encoder"), _part_config(config, "decoder")).hexdigest()


def _part_config(config: dict[str, Any], part: str) -> str:
    """What shapes the numbers of the encoder or the decoder besides weights, as canonical JSON."""
    whole = config.get(part) or {}
    text = (whole.get("text_config") if part == "encoder" else whole) or {}
    kept = {name: value for name, value in text.items() if name not in _VOLATILE}
    eoi = (config.get("encoder") or {}).get("eoi_token_index")
    return json.dumps([kept, config.get("dropout_rate"), eoi], sort_keys=True)


def _weight_digests(checkpoint: Checkpoint) -> tuple[str, str]:
    """Of encoder and decoder: names, dtypes, shapes and bytes of their tensors, however they are split into files."""
    from safetensors import safe_open

    homes: dict[str, tuple[Path, str]] = {}
    for shard in checkpoint.shards:
        with safe_open(shard, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - a safetensors file is not a mapping
                if not any(part in key for part in UNUSED):
                    # transformers writes `encoder.layers` and calls it `encoder.text_model.layers` in memory.
                    homes[key.removeprefix("model.").replace("encoder.text_model.", "encoder.")] = (shard, key)
    encoder = sorted(name for name in homes if name.startswith("encoder."))
    if "encoder.embed_tokens.weight" not in encoder:
        encoder = sorted(homes)  # the tied embedding is stored under another name: take everything
    decoder = sorted(name for name in homes if not name.startswith("encoder."))
    digests = []
    for part, names in (("encoder", encoder), ("decoder", decoder)):
        digest = tagged_digest(part, _part_config(checkpoint.config, part))
        _add_tensors(digest, names, homes)
        digests.append(digest.hexdigest())
    # The decoder reads the embeddings that are stored with the encoder.
    return digests[0], tagged_digest(*digests).hexdigest()


def _add_tensors(digest: hashlib._Hash, names: list[str], homes: dict[str, tuple[Path, str]]) -> None:
    import torch
    from safetensors import safe_open

    for name in names:
        shard, key = homes[name]
        with safe_open(shard, framework="pt") as file:
            check_tensor(shard, key, file.get_slice(key).get_dtype())
            tensor = file.get_tensor(key)
        head = json.dumps([name, str(tensor.dtype), list(tensor.shape)])
        digest.update(len(head).to_bytes(8, "little") + head.encode())
        digest.update(memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy()))


def _read_memo(memo: Path) -> dict[str, tuple[str, str]]:
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        known = json.loads(memo.read_text("utf-8"))
        return {str(key): (str(encoder), str(decoder)) for key, (encoder, decoder) in known.items()}
    return {}


def _write_memo(memo: Path, known: dict[str, tuple[str, str]]) -> None:
    newest = dict(list(known.items())[-_MEMO_LIMIT:])
    partial = memo.with_name(f".{memo.name}-{os.getpid()}-{threading.get_ident()}")
    try:
        memo.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial.write_text(json.dumps(newest), "utf-8")
        os.replace(partial, memo)
    except OSError as error:
        logger.info("cannot remember the model's digest in %s (%s); it is computed again next time", memo, error)
        with contextlib.suppress(OSError):
            partial.unlink()
