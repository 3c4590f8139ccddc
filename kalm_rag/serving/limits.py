"""What the server accepts, and the errors that say so."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from kalm_rag.utils.checks import check_positive


class ServingError(Exception):
    """A request that gets no ranking.

    Args:
        status: of the response.
        message: says the rule, what was given and the way out. It goes to the client, never into a log.
        retry_after: seconds after which the client may try again.
    """

    def __init__(self, status: int, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = None if retry_after is None else max(1, math.ceil(retry_after))


class BusyError(ServingError):
    """The queue is full. The status is the dialect's: 429 or 503.

    The message ends with the seconds after which to try again: most clients show it, and none shows the header.
    """

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(503, message, retry_after)
        self.message += f": try again in {self.retry_after} s"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one server accepts.

    Attributes:
        body_bytes: of one request.
        documents: passages of one request, and pairs of `/score`.
        characters: of one query, passage or instruction.
        running: requests that are worked on side by side; they take turns batch by batch. 16 at most.
        waiting: requests that wait for one of these places. Further ones are refused.
        held_bytes: of all bodies that are being read, wait or are worked on.
        header_bytes: of the headers of one request.
        header_seconds: that a client may take to send them.
        body_seconds: that a client may take to send a body.
        send_seconds: that a client may take to accept a part of a response.
        drain_seconds: that running requests get when the server is told to stop.

    Raises:
        TypeError, ValueError: one is not a whole number above 0.
    """

    body_bytes: int = 16_000_000
    documents: int = 2_000
    characters: int = 1_000_000
    running: int = 16
    waiting: int = 64
    held_bytes: int = 256_000_000
    header_bytes: int = 65_536
    header_seconds: int = 10
    body_seconds: int = 30
    send_seconds: int = 30
    drain_seconds: int = 30

    def __post_init__(self) -> None:
        for part in fields(self):
            check_positive(part.name, getattr(self, part.name))
        if self.running > 16:
            msg = f"running must be at most 16, got {self.running}: more calls do not run side by side"
            raise ValueError(msg)

    def check_documents(self, count: int) -> None:
        """Refuse more passages than one request may have.

        Raises:
            ServingError: there are more.
        """
        if count > self.documents:
            msg = f"documents must be at most {self.documents} in one request, got {count}: send several requests"
            raise ServingError(413, msg)

    def check_text(self, name: str, text: str) -> None:
        """Refuse a text that is longer than one may be.

        Raises:
            ServingError: it is longer.
        """
        if len(text) > self.characters:
            msg = f"{name} must have at most {self.characters} characters, got {len(text)}: shorten or split it"
            raise ServingError(413, msg)
