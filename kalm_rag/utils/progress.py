"""Progress bars for long work on a terminal."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm.auto import tqdm


class Progress:
    """A bar over `total` items, drawn after a short delay so that quick work stays silent.

    Args:
        total: how many items there are, None if nobody knows.
        label: what is being done.
        unit: what is counted.
        show: True to draw, False not to, None to draw when standard error is a terminal.
    """

    def __init__(self, total: int | None, label: str, *, unit: str = "passage", show: bool | None = None) -> None:
        # A bar takes locks of the whole process even when it draws nothing.
        self._bar = None
        if show or (show is None and sys.stderr is not None and sys.stderr.isatty()):
            self._bar = tqdm(total=total, desc=label, unit=f" {unit}s", delay=1.0, dynamic_ncols=True, leave=False)

    def advance(self, count: int) -> None:
        """Count `count` more items."""
        if self._bar is not None:
            self._bar.update(count)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()
