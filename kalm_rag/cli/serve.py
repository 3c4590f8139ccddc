"""`kalm-rag serve`."""

from __future__ import annotations

import logging
import signal
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer

from kalm_rag.cli.options import (
    CacheOption,
    DeviceOption,
    DtypeOption,
    InstructionOption,
    LongPassagesOption,
    LoraOption,
    MaxLengthOption,
    MaxWindowsOption,
    ModelOption,
    RatioOption,
    RevisionOption,
    WindowOverlapOption,
    WindowTokensOption,
    read_bytes,
    whole_number,
)
from kalm_rag.cli.output import note_mini
from kalm_rag.cli.remote import (
    NamespaceOption,
    RemoteModeOption,
    RemoteOption,
    RemoteTimeoutOption,
    SecretFileOption,
    UnauthenticatedOption,
    shared_tier,
)

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def _memory(text: str | int) -> int | str:
    return "auto" if text == "auto" else read_bytes(text)


def serve(
    model: ModelOption = "nano",
    host: Annotated[
        str, typer.Option("--host", help="Listen on this address; 0.0.0.0 is every one.", metavar="ADDRESS")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", help="Listen on this port.", metavar="PORT", parser=whole_number)
    ] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-key-file",
            help="Ask clients for one of the keys in this file, one a line, and for those in KALM_RAG_API_KEY. A "
            "changed file is read again.",
            metavar="FILE",
            show_default="none",
        ),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            help="Let pages of this origin call the server from a browser; may be given several times.",
            metavar="ORIGIN",
            show_default="none",
        ),
    ] = None,
    strict_model: Annotated[
        bool, typer.Option("--strict-model", help="Refuse requests that name another model.")
    ] = False,
    threshold: Annotated[
        str | None,
        typer.Option(
            "--threshold",
            help="Leave out passages whose score is lower than this number between 0 and 1, or than the threshold in "
            "this profile, unless a request says otherwise.",
            metavar="SCORE|FILE",
        ),
    ] = None,
    instruction: InstructionOption = None,
    ratio: RatioOption = 4,
    max_length: MaxLengthOption = 1024,
    long_passages: LongPassagesOption = "truncate",
    window_tokens: WindowTokensOption = None,
    window_overlap: WindowOverlapOption = None,
    max_windows: MaxWindowsOption = 64,
    max_body: Annotated[
        int,
        typer.Option(
            "--max-body",
            help="Accept requests of this many bytes at most, such as 16MB.",
            metavar="BYTES",
            parser=read_bytes,
        ),
    ] = 16_000_000,
    max_documents: Annotated[
        int,
        typer.Option(
            "--max-documents", help="Accept this many passages in a request.", metavar="N", parser=whole_number
        ),
    ] = 2000,
    max_characters: Annotated[
        int,
        typer.Option(
            "--max-characters",
            help="Accept this many characters in a query or a passage.",
            metavar="N",
            parser=whole_number,
        ),
    ] = 1_000_000,
    max_running: Annotated[
        int,
        typer.Option(
            "--max-running",
            help="Work on this many requests side by side, 16 at most.",
            metavar="N",
            parser=whole_number,
        ),
    ] = 16,
    max_waiting: Annotated[
        int,
        typer.Option(
            "--max-waiting",
            help="Let this many requests wait; further ones are told to come back.",
            metavar="N",
            parser=whole_number,
        ),
    ] = 64,
    drain: Annotated[
        int,
        typer.Option(
            "--drain",
            help="Give running requests this many seconds when the server is told to stop.",
            metavar="SECONDS",
            parser=whole_number,
        ),
    ] = 30,
    prefill_memory: Annotated[
        Any,
        typer.Option(
            "--prefill-memory",
            help="Keep prefilled passages of this many bytes in memory, such as 2GB, or auto for a quarter of what is "
            "free when the model is loaded.",
            metavar="BYTES",
            parser=_memory,
        ),
    ] = "auto",
    cache: CacheOption = "default",
    remote: RemoteOption = None,
    remote_mode: RemoteModeOption = "read-write",
    namespace: NamespaceOption = "default",
    secret_file: SecretFileOption = None,
    unauthenticated: UnauthenticatedOption = False,
    remote_timeout_ms: RemoteTimeoutOption = None,
    revision: RevisionOption = None,
    lora: LoraOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Serve the model to clients of rerankers.

    It speaks the dialects of Cohere, Jina, Text Embeddings Inference, vLLM, Infinity and NVIDIA, and keeps encoded
    passages. GET /docs lists the endpoints.
    """
    try:
        import uvicorn

        from kalm_rag.serving.app import create_app
        from kalm_rag.serving.headers import bounding_headers
    except ModuleNotFoundError as error:
        from kalm_rag.errors import MissingExtraError

        raise MissingExtraError(error.name or "fastapi", "serve") from error
    from kalm_rag.serving.memory import keep_little

    keep_little()
    from kalm_rag.cache import PassageCache
    from kalm_rag.reranker import KaLMReranker
    from kalm_rag.serving.keys import Keys
    from kalm_rag.serving.limits import Limits
    from kalm_rag.settings import DEFAULT_INSTRUCTION, base_ratio

    if not 0 <= port <= 65535:
        msg = f"--port must be between 0 and 65535, got {port}"
        raise ValueError(msg)
    keys = Keys.from_environment(api_key_file)
    limits = Limits(
        body_bytes=max_body,
        documents=max_documents,
        characters=max_characters,
        running=max_running,
        waiting=max_waiting,
        drain_seconds=drain,
    )
    note_mini(model)
    if host not in _LOOPBACK and not keys.required:
        typer.echo(f"note: anyone who reaches {host} can use this server: set KALM_RAG_API_KEY", err=True)
    tier = shared_tier(remote, remote_mode, namespace, secret_file, unauthenticated, remote_timeout_ms)
    with (
        PassageCache(cache, base_ratio=base_ratio(ratio), **tier) as kept,
        KaLMReranker(
            model,
            revision=revision,
            lora=lora,
            device=device,
            dtype=dtype,
            max_length=max_length,
            ratio=ratio,
            instruction=DEFAULT_INSTRUCTION if instruction is None else instruction,
            cache=kept,
            long_passages=cast("Any", long_passages),
            window_tokens=window_tokens,
            window_overlap=window_overlap,
            max_windows=max_windows,
            prefill_memory=prefill_memory,
            show_progress=False,
        ) as reranker,
    ):
        app = create_app(
            reranker,
            limits=limits,
            keys=keys,
            threshold=_number_or_file(threshold),
            strict_model=strict_model,
            cors_origins=cors_origin or (),
        )
        reranker.load()  # an error of the model is told before the port is taken
        _log_as_json()
        # uvicorn raises the signal that ended it once more when it is done; then the cache must be closed still.
        signal.signal(signal.SIGTERM, _end)
        uvicorn.run(
            app,
            host=host,
            port=port,
            http=bounding_headers(limits),
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=limits.drain_seconds,
        )


def _end(*_: object) -> NoReturn:
    raise SystemExit(0)


def _number_or_file(given: str | None) -> Any:
    from kalm_rag.thresholds.limit import check_threshold

    if given is None:
        return None
    try:
        return check_threshold("threshold", float(given))
    except ValueError:
        return check_threshold("threshold", given)


def _log_as_json() -> None:
    from kalm_rag.serving.logs import json_handler

    logging.getLogger().handlers[:] = [json_handler()]
    for name in ("kalm_rag", "uvicorn"):
        logging.getLogger(name).setLevel(logging.INFO)
