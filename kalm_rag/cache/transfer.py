"""Exports and imports verified encodings as safetensors shards."""

from __future__ import annotations

import base64
import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kalm_rag.cache.frame import Frame, FrameError
from kalm_rag.cache.keys import FORMAT, KEY_PATTERN
from kalm_rag.cache.records import MOST_RECORDS
from kalm_rag.cache.spaces import Space, record, recorded_spaces
from kalm_rag.cache.store import Store, StoreError
from kalm_rag.utils.display import Shown

logger = logging.getLogger(__name__)

_BATCH = 64
_SPACE = "key-space-"
_SPACE_BYTES = 32_000_000
"""Bytes of the records in a shard: the head of a safetensors file must stay below 100 MB."""

SHARD_BYTES = 1 << 30
"""A new shard begins when this is reached."""


@dataclass(frozen=True, slots=True, repr=False)
class TransferReport(Shown):
    """What an export or an import did.

    Attributes:
        passages: entries that were moved.
        bytes: what they take.
        corrupt: entries that did not verify, or are no frames at all, and were left out.
        other_models: entries of other models that were left out (export).
        bad_shards: files that could not be read and were skipped (import).
        shards: files that were written or read.
        known: entries that the store already had and that verify; they were left unchanged (import).
        lost: entries that verified and that the store did not keep (import).
        held: entries of the shards that the store holds at the end, without those evicted meanwhile (import).
        spaces: key spaces whose records were moved, so that `PassageCache.forget` searches them there too.
    """

    passages: int
    bytes: int
    corrupt: int
    other_models: int
    bad_shards: tuple[str, ...]
    shards: tuple[str, ...]
    known: int = 0
    lost: int = 0
    held: int = 0
    spaces: int = 0

    @property
    def verified(self) -> int:
        """Entries of the shards that verified, and so should be held (import)."""
        return self.passages + self.known + self.lost


class WrongModelError(ValueError):
    """Shards hold encodings of another model than the one they are imported for."""


def verified_frames(store: Store, secret: bytes | None = None) -> Iterator[tuple[Frame | None, bytes]]:
    """Yield every entry of a store with its frame, None if it does not verify."""

    def batches() -> Iterator[list[str]]:
        batch: list[str] = []
        for key in store.keys():  # noqa: SIM118 - a store is not a mapping
            batch.append(key)
            if len(batch) == _BATCH:
                yield batch
                batch = []
        yield batch

    for batch in batches():
        for key, data in store.get_many(batch).items():
            try:
                yield Frame.from_bytes(data, key, secret), data
            except FrameError:
                yield None, data


def export_shards(
    store: Store, folder: str | Path, *, model: bytes | None = None, shard_bytes: int = SHARD_BYTES
) -> TransferReport:
    """Write the entries of a store to `passages-NNNNN.safetensors`.

    Args:
        store: where they are.
        folder: where the shards go; it must be empty, or not exist.
        model: only entries of the model with this digest.
        shard_bytes: a shard ends when it reaches this.

    Raises:
        FileExistsError: the folder holds something, or is a file.
    """
    folder = Path(folder)
    if folder.is_file():
        msg = f"{folder} is a file; export into an empty folder"
        raise FileExistsError(msg)
    folder.mkdir(parents=True, exist_ok=True)
    present = sorted(path.name for path in folder.iterdir())
    if present:
        msg = f"{folder} is not empty (it has {present[:5]}); export into an empty folder"
        raise FileExistsError(msg)
    metadata, spaces = _described(store, model)
    written: list[str] = []
    shard: dict[str, bytes] = {}
    moved = size = corrupt = others = shard_size = 0
    for frame, data in verified_frames(store):
        if frame is None:
            corrupt += 1
        elif model is not None and frame.model != model:
            others += 1
        else:
            shard[frame.key] = data
            moved, size, shard_size = moved + 1, size + len(data), shard_size + len(data)
            if shard_size >= shard_bytes:
                written.append(_write_shard(folder, len(written) + 1, shard, metadata))
                shard, shard_size = {}, 0
    if shard:
        written.append(_write_shard(folder, len(written) + 1, shard, metadata))
    return TransferReport(moved, size, corrupt, others, (), tuple(written), spaces=spaces if written else 0)


def _described(store: Store, model: bytes | None) -> tuple[dict[str, str], int]:
    """Return what every shard says of itself, and how many key spaces that includes."""
    recorded, unreadable = recorded_spaces(store)
    metadata = {"what": "encoded passages of kalm-rag", "format": str(FORMAT)}
    size = left_out = 0
    for name, space in recorded.items():
        if model is not None and space.keys.model != model:
            continue
        text = base64.b64encode(space.to_bytes()).decode("ascii")
        if size + len(text) > _SPACE_BYTES:
            left_out += 1
        else:
            metadata[_SPACE + name] = text
            size += len(text)
    if left_out or unreadable:
        logger.warning(
            "%d records of key spaces are too many for a shard and %d cannot be read: where the shards are imported, "
            "texts cannot be found in those key spaces to forget them",
            left_out,
            unreadable,
        )
    return metadata, len(metadata) - 2


def _write_shard(folder: Path, number: int, frames: dict[str, bytes], metadata: dict[str, str]) -> str:
    import numpy as np
    from safetensors.numpy import save_file

    name = f"passages-{number:05}.safetensors"
    partial = folder / f".{name}.partial"
    try:
        save_file(
            {key: np.frombuffer(frames[key], dtype=np.uint8) for key in sorted(frames)},
            partial,
            metadata=metadata,
        )
        os.replace(partial, folder / name)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    return name


def import_shards(
    store: Store, sources: Iterable[str | Path], *, model: bytes | None = None, secret: bytes | None = None
) -> TransferReport:
    """Read shards into a store; every entry is verified before it is kept.

    Entries of the store that verify are not replaced, so tagged entries keep their tags.

    Args:
        store: where they go.
        sources: shards, or folders of shards.
        model: refuse shards that hold entries of another model than the one with this digest.
        secret: the secret of the cache: entries get its tag, and only entries with its tag count as known.

    Raises:
        WrongModelError: a shard holds entries of another model; nothing of that shard is kept.
        FileNotFoundError: a source does not exist or holds no shards.
        StoreError: the store cannot be written to, or reached its limit and evicted entries of this import; the import
            stops there.
    """
    from safetensors import SafetensorError, safe_open

    counts = _Counts(store.stats().evicted)
    bad: list[str] = []
    read: list[str] = []
    for shard in shards_of(sources):
        try:
            if not shard.is_file():
                msg = "it is not a regular file"
                raise OSError(msg)
            with safe_open(shard, framework="numpy") as file:
                spaces = [space for space in _spaces_of(file.metadata()) if model is None or space.keys.model == model]
                tensors = list(file.keys())
                named = [key for key in tensors if KEY_PATTERN.fullmatch(key)]
                counts.corrupt += len(tensors) - len(named)
                names = [key for key in named if bytes.fromhex(key) not in counts.seen]
                if model is not None:
                    frames = ((key, data) for key in names if (data := _bytes_of(file, key)) is not None)
                    _check_model(shard, frames, model)
                counts.record(store, spaces)
                for start in range(0, len(names), _BATCH):
                    batch = {}
                    for key in names[start : start + _BATCH]:
                        data = _sealed(_bytes_of(file, key), key, secret)
                        if data is None:
                            counts.corrupt += 1
                        else:
                            batch[key] = data
                    counts.keep(store, batch, secret)
        except WrongModelError:
            raise
        except (SafetensorError, OSError, ValueError) as error:
            logger.warning("cannot read the shard %s (%s); it is skipped", shard, error)
            bad.append(str(shard))
        else:
            read.append(str(shard))
    held = counts.moved + counts.known
    if store.stats().evicted > counts.evicted:
        held = len(set().union(*(_held(store, shard, secret) for shard in (*read, *bad))))
    return TransferReport(
        counts.moved,
        counts.size,
        counts.corrupt,
        0,
        tuple(bad),
        tuple(read),
        counts.known,
        counts.lost,
        held,
        len(counts.spaces),
    )


def _held(store: Store, shard: str, secret: bytes | None) -> set[str]:
    """Return the entries of a shard that a store holds."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(shard, framework="numpy") as file:
            names = [key for key in file.keys() if KEY_PATTERN.fullmatch(key)]  # noqa: SIM118
    except (SafetensorError, OSError, ValueError):
        return set()
    batches = (names[start : start + _BATCH] for start in range(0, len(names), _BATCH))
    return set().union(*(_verified(store, batch, secret) for batch in batches))


@dataclass(slots=True)
class _Counts:
    """What an import did so far, how many entries the store had given up before it, and the keys it has dealt with.

    An entry that is in two shards counts once.
    """

    evicted: int
    moved: int = 0
    size: int = 0
    corrupt: int = 0
    known: int = 0
    lost: int = 0
    first: list[str] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)
    spaces: set[str] = field(default_factory=set)

    def record(self, store: Store, spaces: list[Space]) -> None:
        """Keep the records of a shard; a store that fails to do so still gets the entries."""
        for space in spaces:
            if space.id in self.spaces:
                continue
            try:
                if record(store, [space]):
                    self.spaces.add(space.id)
            except (OSError, ValueError, StoreError) as error:
                logger.warning("cannot record a key space, so its entries cannot be found by text: %s", error)

    def keep(self, store: Store, batch: dict[str, bytes], secret: bytes | None) -> None:
        """Store what is missing, and check what the store holds then."""
        known = _verified(store, list(batch), secret)
        new = {key: data for key, data in batch.items() if key not in known}
        if new:
            try:
                store.put_many(new)
            except (OSError, ValueError) as error:  # not to be taken for an error of the shard
                msg = f"the store cannot be written to ({error}); the import stops here"
                raise StoreError(msg) from error
        kept = _verified(store, list(new), secret)
        self.seen.update(map(bytes.fromhex, batch))
        self.known += len(known)
        self.moved += len(kept)
        self.size += sum(len(new[key]) for key in kept)
        self.lost += len(new) - len(kept)
        if new and not kept:
            held = self.known + self.moved
            msg = f"the store kept none of {len(new)} entries; it holds {held}, and the import stops here"
            raise StoreError(msg)
        self.first = self.first or sorted(kept)
        size = store.stats()
        # The oldest entries leave first: if the first of this import are gone, the rest will follow them.
        if size.evicted > self.evicted and len(_verified(store, self.first, secret)) < len(self.first):
            msg = (
                f"the store reached its limit of {size.limit or 0:,} bytes and gave up entries of this import, which "
                "stops here; raise the limit (--limit-gb), or import fewer shards"
            )
            raise StoreError(msg)


def _verified(store: Store, keys: list[str], secret: bytes | None) -> set[str]:
    found = set()
    for key, data in store.get_many(keys).items():
        with contextlib.suppress(FrameError):
            Frame.from_bytes(data, key, secret)
            found.add(key)
    return found


def _spaces_of(metadata: dict[str, str] | None) -> list[Space]:
    """Return the key spaces that a shard names."""
    found = []
    for name, text in (metadata or {}).items():
        if name.startswith(_SPACE):
            try:
                found.append(Space.from_bytes(base64.b64decode(text, validate=True)))
            except ValueError as error:
                logger.warning("a shard has a record of a key space that cannot be read, and is not kept: %s", error)
    return found[:MOST_RECORDS]


def _bytes_of(file: Any, key: str) -> bytes | None:
    """Return the bytes of a tensor; None if it is not a row of bytes."""
    part = file.get_slice(key)
    if part.get_dtype() != "U8" or len(part.get_shape()) != 1:
        return None
    return bytes(file.get_tensor(key).tobytes())


def _sealed(data: bytes | None, key: str, secret: bytes | None) -> bytes | None:
    """Return a verified frame as the store should keep it; None if it does not verify."""
    if data is None:
        return None
    try:
        frame = Frame.from_bytes(data, key)
    except FrameError:
        return None
    return data if secret is None else frame.to_bytes(secret)


def _check_model(shard: Path, frames: Iterable[tuple[str, bytes]], model: bytes) -> None:
    for key, data in frames:
        with contextlib.suppress(FrameError):
            frame = Frame.from_bytes(data, key)
            if frame.model != model:
                msg = (
                    f"{shard} holds passages of the model {frame.model.hex()[:12]}, not of {model.hex()[:12]}: "
                    "they would never be found. Export from a cache of the same model, or pass --any-model"
                )
                raise WrongModelError(msg)


def shards_of(sources: Iterable[str | Path]) -> list[Path]:
    """List the shards of files and folders, all of which must exist.

    Raises:
        FileNotFoundError: a source does not exist or holds no shards.
    """
    shards: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            found = sorted(source.glob("passages-*.safetensors"))
            if not found:
                msg = f"the folder {source} holds no passages-*.safetensors"
                raise FileNotFoundError(msg)
            shards += found
        elif source.is_file():
            shards.append(source)
        else:
            msg = f"no shard or folder {source}"
            raise FileNotFoundError(msg)
    return shards
