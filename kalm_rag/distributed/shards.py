"""A part of a corpus that one of several machines encodes."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kalm_rag.utils.digests import tagged_digest


@dataclass(frozen=True, slots=True)
class Shard:
    """The passages of one of `count` machines that share a corpus, chosen by their content.

    The same text is in the same shard on every machine, in any order of the corpus and for any model, so that no two
    machines encode it. Shards have about the same number of passages.

    Args:
        number: which shard, from 1.
        count: how many there are.

    Raises:
        ValueError: there is no such shard.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            msg = f"shard must be k/n with k from 1 to n, such as 3/16, got {self.number}/{self.count}"
            raise ValueError(msg)

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read a shard that is written as `3/16`.

        Raises:
            ValueError: it is not written so, or there is no such shard.
        """
        found = re.fullmatch(r"\s*(\d{1,9})\s*/\s*(\d{1,9})\s*", text, re.ASCII)
        if found is None:
            msg = f"shard must be k/n with k from 1 to n, such as 3/16, got {text!r:.80}"
            raise ValueError(msg)
        return cls(int(found[1]), int(found[2]))

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def holds(self, text: str) -> bool:
        """Whether a text, which went through `repair_text`, is in this shard."""
        digest = tagged_digest("kalm-rag shard", text).digest()
        return int.from_bytes(digest[:8], "little") % self.count == self.number - 1
