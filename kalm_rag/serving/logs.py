"""One JSON object a line for each request: lengths and counts, never texts, headers or unknown paths."""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any

logger = logging.getLogger("kalm_rag.serving")


class JsonFormatter(logging.Formatter):
    """Writes a record, and what was given as `extra={"kalm": {...}}`, as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line; ASCII only, so that no terminal reads control characters in it."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{stamp}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "kalm", {}),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = record.exc_info[0].__name__  # the message of an exception may hold text
        return json.dumps(line)


def json_handler() -> logging.Handler:
    """Return a handler that writes such lines to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    return handler


def log_request(
    request_id: str, endpoint: str, path: str | None, method: str, status: int, seconds: float, facts: dict[str, int]
) -> None:
    """Log a request that ended.

    Args:
        request_id: of the request.
        endpoint: the dialect or the endpoint's name.
        path: of an endpoint; None for any other, which is not logged as it came.
        method: of HTTP.
        status: of the response; 499 if the client went away.
        seconds: that it took.
        facts: counts and lengths.
    """
    own: dict[str, Any] = {"request_id": request_id, "endpoint": endpoint, "method": method, "status": status}
    if path is not None:
        own["path"] = path
    level = logging.WARNING if status >= 500 else logging.INFO
    logger.log(level, "request", extra={"kalm": {**own, "ms": round(1000 * seconds, 1), **facts}})


def log_failure(request_id: str, error: BaseException) -> None:
    """Log an unexpected exception by its type and where it was raised; its message may hold text."""
    places = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_tb(error.__traceback__)[-5:]]
    extra = {"kalm": {"request_id": request_id, "exception": type(error).__name__, "at": places}}
    logger.error("a request failed", extra=extra)
