"""The errors of this package. Wrong arguments are plain `ValueError` and `TypeError`."""

from __future__ import annotations


class KaLMError(Exception):
    """Base of every error that is specific to kalm-rag."""


class CheckpointError(KaLMError, ValueError):
    """A checkpoint cannot be found, read or used; the message names the way out."""


class ScoringError(KaLMError, RuntimeError):
    """The model ran but gave no usable score, for example NaN logits in float16."""


class MissingExtraError(KaLMError, ImportError):
    """An optional dependency is not installed; the message carries the pip command.

    Args:
        module: the module that could not be imported.
        extra: the extra of `kalm-rag` that installs it.
    """

    def __init__(self, module: str, extra: str) -> None:
        super().__init__(
            f"this feature needs the package {module!r}, which is not installed. "
            f"Install it with: pip install 'kalm-rag[{extra}]'"
        )
        self.module = module
        self.extra = extra


class ForkError(KaLMError, RuntimeError):
    """A forked process cannot use the model that its parent loaded; the message names the way out."""


class ServerError(KaLMError, RuntimeError):
    """A server refused a request, or has another model; the message names the way out.

    Args:
        message: for people.
        status: of the response; None if there is none.

    Attributes:
        status: as given.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class ServerUnavailableError(ServerError):
    """A server is away, too slow or busy, or its answer cannot be read: the same request may succeed later.

    Args:
        message: for people.
        status: as in `ServerError`.
        retry_after: seconds after which the server wants to be asked again; None if it did not say.

    Attributes:
        retry_after: as given.
    """

    def __init__(self, message: str, status: int | None = None, retry_after: float | None = None) -> None:
        super().__init__(message, status)
        self.retry_after = retry_after
