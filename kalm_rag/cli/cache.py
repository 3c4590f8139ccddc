"""`kalm-rag cache`: maintain the encoded passages."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kalm_rag.cli.options import (
    CacheOption,
    JsonOption,
    LimitOption,
    RevisionOption,
    check_revision,
    choices,
    limit_bytes,
)
from kalm_rag.cli.output import print_json, show
from kalm_rag.cli.remote import SecretFileOption, read_secret
from kalm_rag.utils.display import size_text

if TYPE_CHECKING:
    from kalm_rag.cache import DiskStore

app = typer.Typer(
    name="cache", help="Maintain the cache of encoded passages.", no_args_is_help=True, rich_markup_mode=None
)

ModelFilter = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="Take only passages of this model.",
        metavar="MODEL",
        show_default="all",
        autocompletion=choices("nano", "small", "large", "mini"),
    ),
]


def open_folder(cache: str) -> DiskStore:
    """Return the cache that `--cache` names.

    Raises:
        FileNotFoundError: there is none.
    """
    from kalm_rag.cache import DiskStore, PassageCache
    from kalm_rag.utils.paths import MANIFEST

    store = PassageCache(cache).store
    if store is None:
        msg = "this user has no home folder, so there is no default cache; name a folder with --cache"
        raise FileNotFoundError(msg)
    if not isinstance(store, DiskStore) or not (store.folder / MANIFEST).is_file():
        msg = f"no cache exists in {store.folder if isinstance(store, DiskStore) else cache}"
        raise FileNotFoundError(msg)
    return store


def digest_of(model: str | None, revision: str | None) -> bytes | None:
    """Return the digest that every entry of a model carries."""
    if model is None:
        check_revision(revision)
        return None
    from kalm_rag.model.checkpoint import find_checkpoint
    from kalm_rag.model.identity import identify

    return identify(find_checkpoint(model, revision=revision)).digest


@app.command("info")
def info(
    cache: CacheOption = "default",
    models: Annotated[bool, typer.Option("--models", help="Also read every passage and count them by model.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show where the cache is and how large it is."""
    from kalm_rag.cache.transfer import verified_frames

    store = open_folder(cache)
    size = store.stats()
    facts: dict[str, object] = {
        "folder": str(store.folder),
        "entries": size.entries,
        "bytes": size.bytes,
        "limit": size.limit,
        "read_only": store.read_only,
    }
    counted: dict[str, list[int]] = {}
    if models:
        for frame, data in verified_frames(store):
            row = counted.setdefault("damaged" if frame is None else frame.model.hex()[:12], [0, 0])
            row[0], row[1] = row[0] + 1, row[1] + len(data)
        facts["models"] = {name: {"entries": row[0], "bytes": row[1]} for name, row in counted.items()}
    if as_json:
        print_json(facts)
        return
    show(f"{store.folder}{' (read-only)' if store.read_only else ''}", wrap=False)
    show(f"{size.entries} passages, {size_text(size.bytes or 0)} of {size_text(size.limit or 0)}")
    for name, row in counted.items():
        show(f"  model {name}: {row[0]} passages, {size_text(row[1])}")


@app.command("check")
def check(
    cache: CacheOption = "default",
    fix: Annotated[bool, typer.Option("--fix", help="Remove what is wrong, and rebuild a damaged database.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Verify every entry of the cache.

    This also finds files that a crash left behind. The exit status is 1 if anything is wrong.
    """
    report = open_folder(cache).check(fix=fix)
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        show(f"{report.entries} entries read: {report.corrupt} damaged, {report.missing} without their file")
        show(f"{report.orphans} orphan files ({size_text(report.orphan_bytes)})")
        if report.database:
            show(f"the database is damaged: {report.database}", wrap=False)
        if report.quarantine:
            show(
                f"moved the damaged database to {report.quarantine}, which you may delete; "
                f"{report.salvaged} passages were saved from it",
                wrap=False,
            )
        if not report.clean:
            show("mended; what is missing is encoded again when needed" if fix else "mend this with --fix")
    if not report.clean and not fix:
        sys.exit(1)


@app.command("adopt")
def adopt(
    secret_file: SecretFileOption = None,
    cache: CacheOption = "default",
    as_json: JsonOption = False,
) -> None:
    """Authenticate what was kept without a secret.

    Once a cache has a secret, passages that were kept before are misses. This gives them the secret's tag; do it only
    if nobody else could write to the folder until now.
    """
    from kalm_rag.cache.adopting import adopt as adopt_entries
    from kalm_rag.cache.remote.opening import SECRET, secret_or_environment
    from kalm_rag.utils.checks import check_secret

    secret = check_secret("the secret", secret_or_environment(read_secret(secret_file)))
    if secret is None:
        msg = f"adopt needs a secret: name its file with --secret-file, or set {SECRET} in the environment"
        raise ValueError(msg)
    report = adopt_entries(open_folder(cache), secret)
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    show(f"{report.adopted} entries adopted, {report.known} had this secret already")
    if report.other:
        show(f"{report.other} entries have the tag of another secret and stay misses")
    if report.damaged:
        show(f"{report.damaged} entries are damaged: `kalm-rag cache check --fix` removes them")


@app.command("export")
def export(
    folder: Annotated[str, typer.Argument(help="Write the shards to this folder, which must be empty.")],
    cache: CacheOption = "default",
    model: ModelFilter = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write passages to files for another cache.

    Each passage is verified. The files are safetensors shards, which `kalm-rag cache import` reads.
    """
    from kalm_rag.cache.transfer import export_shards
    from kalm_rag.utils.paths import user_path

    report = export_shards(open_folder(cache), user_path(folder, "the folder"), model=digest_of(model, revision))
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    show(f"{report.passages} passages, {size_text(report.bytes)}, in {len(report.shards)} shards")
    if report.corrupt or report.other_models:
        show(f"left out: {report.corrupt} damaged, {report.other_models} of other models")


@app.command("import")
def import_(
    sources: Annotated[list[str], typer.Argument(help="Read these shards, or the shards in these folders.")],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            help="Refuse shards that belong to another model than this.",
            metavar="MODEL",
            autocompletion=choices("nano", "small", "large", "mini"),
        ),
    ] = None,
    any_model: Annotated[bool, typer.Option("--any-model", help="Read shards of any model.")] = False,
    cache: CacheOption = "default",
    limit_gb: LimitOption = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read exported files into the cache.

    Each entry is verified; shards of another model are refused. The exit status is 0 only if the cache holds every
    entry of the shards.
    """
    from kalm_rag.cache import DiskStore, PassageCache
    from kalm_rag.cache.preflight import check_room, check_writable
    from kalm_rag.cache.transfer import import_shards, shards_of

    if (model is None) != any_model:
        msg = "give --model MODEL to check that the shards belong to it, or --any-model to take them unchecked"
        raise ValueError(msg)
    store = PassageCache(cache, limit=limit_bytes(limit_gb)).store
    if not isinstance(store, DiskStore):
        msg = "no folder to import into; name one with --cache"
        raise ValueError(msg)
    needed = sum(shard.stat().st_size for shard in shards_of(sources))
    check_writable(store)
    new = max(0, needed - (store.stats().bytes or 0))  # at least: what the cache holds may be part of the shards
    check_room(store, needed, new, "import fewer shards, or export those of one --model")
    report = import_shards(store, sources, model=digest_of(model, revision))
    store.close()
    if as_json:
        print_json(dataclasses.asdict(report))
    else:
        shards = f"from {len(report.shards)} shards"
        show(f"{report.passages} new passages, {size_text(report.bytes)}, {report.known} known already, {shards}")
        if report.corrupt:
            show(f"left out: {report.corrupt} that are damaged or not encoded passages")
        for name in report.bad_shards:
            show(f"skipped, cannot be read: {name}", wrap=False)
        show(f"{report.held} of {report.verified} passages held")
    if report.bad_shards or report.corrupt or report.held < report.verified:
        sys.exit(1)
