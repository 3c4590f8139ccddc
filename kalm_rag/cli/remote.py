"""Options of the commands that use a shared tier, and what they mean to a `PassageCache`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from kalm_rag.cli.options import choices, number

REMOTE = "KALM_RAG_REMOTE"
"""Environment variable with the URL of the shared tier, where the option is left out: it may hold a password."""

RemoteOption = Annotated[
    str | None,
    typer.Option(
        "--remote",
        help="Share passages through this redis://, rediss://, s3://, gs://, az:// or file:// URL. Default: what "
        f"{REMOTE} holds.",
        metavar="URL",
        show_default=False,
    ),
]
RemoteModeOption = Annotated[
    str,
    typer.Option(
        "--remote-mode",
        help="With --remote: read-write, or read to write nothing to it.",
        metavar="MODE",
        autocompletion=choices("read-write", "read"),
    ),
]
RemoteTimeoutOption = Annotated[
    float | None,
    typer.Option(
        "--remote-timeout-ms",
        help="With --remote: wait so long for all its answers to a query.",
        metavar="MS",
        show_default="what they are worth",
        parser=number,
    ),
]
NamespaceOption = Annotated[
    str,
    typer.Option("--namespace", help="With --remote: use only what was shared under this name.", metavar="NAME"),
]
SecretFileOption = Annotated[
    Path | None,
    typer.Option(
        "--secret-file",
        help="Authenticate passages with the secret in this file. Default: what KALM_RAG_CACHE_SECRET holds.",
        metavar="FILE",
        show_default=False,
    ),
]
UnauthenticatedOption = Annotated[
    bool,
    typer.Option(
        "--unauthenticated", help="With --remote: share without a secret. Whoever can write there can change scores."
    ),
]


def read_secret(file: Path | None) -> bytes | None:
    """Return the secret that a file holds, without the line break at its end; None without a file.

    Raises:
        ValueError: the file is empty.
        OSError: it cannot be read.
    """
    if file is None:
        return None
    secret = file.read_bytes().rstrip(b"\r\n")
    if not secret:
        msg = f"the file of a secret must hold it, got an empty file {file}; make one with secrets.token_hex(32)"
        raise ValueError(msg)
    return secret


def shared_tier(
    remote: str | None,
    remote_mode: str,
    namespace: str,
    secret_file: Path | None,
    unauthenticated: bool,
    remote_timeout_ms: float | None = None,
) -> dict[str, Any]:
    """Return the arguments of `PassageCache` that the options of these names ask for."""
    return {
        "remote": os.environ.get(REMOTE) or None if remote is None else remote,
        "remote_mode": remote_mode,
        "remote_timeout_ms": remote_timeout_ms,
        "namespace": namespace,
        "secret": read_secret(secret_file),
        "unauthenticated": unauthenticated,
    }
