"""What a threshold is chosen for."""

from __future__ import annotations

from typing import NamedTuple


class Aim(NamedTuple):
    """What a threshold is chosen for.

    Attributes:
        measure: `recall` or `precision`, which must reach `value`; or `f1`, which is made as large as it gets.
        value: the share to reach, above 0 and at most 1; None for `f1`.
    """

    measure: str
    value: float | None = None

    @classmethod
    def parse(cls, text: object) -> Aim:
        """Read an aim: `recall=0.95`, `precision=0.8` or `f1`.

        Raises:
            ValueError, TypeError: it is none of these.
        """
        if isinstance(text, Aim):
            text = str(text)
        rule = "aim must be recall=SHARE, precision=SHARE or f1, for example recall=0.95"
        if not isinstance(text, str):
            msg = f"{rule}; got {text!r:.80}"
            raise TypeError(msg)
        measure, equals, share = text.strip().lower().partition("=")
        if measure == "f1" and not equals:
            return cls("f1")
        try:
            value = float(share)
        except ValueError:
            value = 0.0
        if measure not in ("recall", "precision") or not 0 < value <= 1:
            msg = f"{rule}, with a share above 0 and at most 1; got {text!r:.80}"
            raise ValueError(msg)
        return cls(measure, value)

    def __str__(self) -> str:
        return self.measure if self.value is None else f"{self.measure}={self.value:g}"
