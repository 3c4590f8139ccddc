"""What a check found, in sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "note"]
"""`error`: something does not work. `warning`: it works, slower or with less than it could. `note`: good to know."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong or good to know, and the way out.

    Attributes:
        level: how bad it is.
        area: what it is about: `cache`, `packages`, `machine`, `hub` or `model`.
        text: what is wrong, the values, and what to do.
    """

    level: Level
    area: str
    text: str
