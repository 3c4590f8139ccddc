"""What a system of an evaluation is, and what tables and files call it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from kalm_rag.cache.passage_cache import Storage
from kalm_rag.settings import LongPassages, PrefillStorage
from kalm_rag.utils.checks import check_choice, check_positive


@dataclass(frozen=True, slots=True)
class System:
    """One way to rerank.

    Attributes:
        model: as in `KaLMReranker`.
        dtype: as in `KaLMReranker`; None is its default.
        instruction: what "relevant" means; None is the default.
        ratio: encoder states averaged into one.
        lora: as in `KaLMReranker`.
        storage: how encoded passages are kept, as in `PassageCache`.
        prefill_storage: as in `KaLMReranker`.
        window_tokens: read long passages in windows of at most this many tokens; None truncates them.
        depth: rerank the first so many candidates of a query and leave the others below them; None reranks all.
    """

    model: str
    ratio: int = 4
    dtype: str | None = None
    instruction: str | None = None
    lora: str | None = None
    storage: Storage = "native"
    prefill_storage: PrefillStorage = "native"
    window_tokens: int | None = None
    depth: int | None = None

    def check(self) -> None:
        """Check the settings that no other call checks before work begins.

        Raises:
            ValueError, TypeError: one is wrong; the message names it, its value and the rule.
        """
        check_choice("storage", self.storage, get_args(Storage))
        check_choice("prefill_storage", self.prefill_storage, get_args(PrefillStorage))
        for name in ("window_tokens", "depth"):
            if (value := getattr(self, name)) is not None:
                check_positive(name, value)

    def changed(self) -> dict[str, str | int]:
        """Return form, windows and depth where they are not the default."""
        found = {"storage": self.storage, "prefill_storage": self.prefill_storage}
        forms: dict[str, str | int] = {name: value for name, value in found.items() if value != "native"}
        numbers = {"window_tokens": self.window_tokens, "depth": self.depth}
        return forms | {name: value for name, value in numbers.items() if value is not None}

    @property
    def long_passages(self) -> LongPassages:
        """As in `KaLMReranker`."""
        return "truncate" if self.window_tokens is None else "windows"

    @property
    def name(self) -> str:
        """The model's short name: an alias, or the last part of a path or hub id; and that of the adapter's folder."""
        parts = [self.model] if self.lora is None else [self.model, self.lora]
        return " + ".join(Path(part).name or part for part in parts)

    @property
    def slug(self) -> str:
        """A file name that tells systems of one experiment apart."""
        readable = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in self.name)[:40]
        parts = [self.model, self.instruction] + ([] if self.lora is None else [self.lora])
        rest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:8]
        changed = "".join(f"-{name}-{value}" for name, value in self.changed().items())
        return f"{readable}-{self.dtype or 'default'}-r{self.ratio}{changed}-{rest}"


def labels(systems: Iterable[System]) -> dict[tuple[str | None, ...], str]:
    """Return a short distinct name for each set of settings other than the ratio, by `label_key`."""
    systems = list(systems)
    dtypes = {system.dtype for system in systems}
    instructions = {system.instruction for system in systems}
    found = {}
    for system in systems:
        parts = [system.name]
        if len(dtypes) > 1:
            parts.append(system.dtype or "default")
        if len(instructions) > 1:
            parts.append("default instruction" if system.instruction is None else repr(system.instruction[:40]))
        parts += [_WORDS[name].format(value) for name, value in system.changed().items()]
        found[label_key(system)] = " / ".join(parts)
    several = Counter(found.values())
    # Two folders of one name, or two long instructions: both are named in full.
    return {
        key: label if several[label] == 1 else " / ".join(part for part in key if part is not None)
        for key, label in found.items()
    }


def label_key(system: System) -> tuple[str | None, ...]:
    """Return everything that tells systems apart, the ratio aside."""
    forms = [_WORDS[name].format(value) for name, value in system.changed().items()]
    return system.model, system.lora, system.dtype, system.instruction, *forms


_WORDS = {
    "storage": "stored {}",
    "prefill_storage": "prefilled {}",
    "window_tokens": "windows of {}",
    "depth": "first {}",
}
"""How a label says what is not the default."""
