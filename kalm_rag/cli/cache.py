"""`kalm-rag cache`: maintain the encoded passages."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kalm_rag.cli.options import (
    CacheOption,
    FormatOption,
    IdFieldOption,
    JsonOption,
    LimitOption,
    RevisionOption,
    TextFieldOption,
    limit_bytes,
    print_json,
    show,
)
from kalm_rag.utils.display import size_text, visible_line

if TYPE_CHECKING:
    from kalm_rag.cache import DiskStore, ForgetReport
    from kalm_rag.cache.spaces import Space

app = typer.Typer(
    name="cache", help="Maintain the cache of encoded passages.", no_args_is_help=True, rich_markup_mode=None
)

ModelFilter = Annotated[
    str | None, typer.Option("--model", "-m", help="Only passages of this model.", metavar="MODEL", show_default=False)
]


def _disk(cache: str) -> DiskStore:
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


def _digest(model: str | None, revision: str | None) -> bytes | None:
    """Return the digest that every entry of a model carries."""
    if model is None:
        return None
    from kalm_rag.model.checkpoint import find_checkpoint
    from kalm_rag.model.identity import identify

    return identify(find_checkpoint(model, revision=revision)).digest


@app.command("info")
def info(
    cache: CacheOption = "default",
    models: Annotated[bool, typer.Option("--models", help="Also read everything and count by model.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show where the cache is and how large it is."""
    from kalm_rag.cache.transfer import verified_frames

    store = _disk(cache)
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
    fix: Annotated[bool, typer.Option("--fix", help="Remove what is wrong.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Read and verify every entry, and find files that a crash left behind. Exit code 1 if anything is wrong."""
    report = _disk(cache).check(fix=fix)
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


@app.command("clear")
def clear(
    cache: CacheOption = "default",
    model: ModelFilter = None,
    revision: RevisionOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
) -> None:
    """Delete encoded passages: all of them, or those of one model."""
    from kalm_rag.cache.forgetting import check_can_delete, delete_from
    from kalm_rag.cache.heads import keys_of_models

    store = _disk(cache)
    check_can_delete(store)
    digest = _digest(model, revision)
    doomed = list(store.keys()) if digest is None else keys_of_models(store, [digest]).get(digest, [])
    if doomed and not yes:
        typer.confirm(f"Delete {len(doomed)} passages in {visible_line(str(store.folder))}?", abort=True)
    show(f"{delete_from(store, doomed)} passages deleted")


@app.command("prune")
def prune(
    keep_models: Annotated[
        list[str],
        typer.Option("--keep-model", help="A model whose passages stay. The option may be repeated.", metavar="MODEL"),
    ],
    cache: CacheOption = "default",
    revision: RevisionOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted, and delete nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete the encoded passages of all models except those named, as replaced models leave them."""
    from kalm_rag.cache.forgetting import check_can_delete, delete_from
    from kalm_rag.cache.heads import keys_of_models

    store = _disk(cache)
    if not dry_run:
        check_can_delete(store)
    _check_one(keep_models, revision)
    kept = {digest for model in keep_models if (digest := _digest(model, revision)) is not None}
    found = keys_of_models(store, kept, others=True)
    counts = _by_model({model: len(keys) for model, keys in found.items()})
    doomed = [key for keys in found.values() for key in keys]
    if doomed and not yes and not dry_run:
        typer.echo("\n".join(f"  model {name}: {count} passages" for name, count in counts.items()), err=True)
        where = visible_line(str(store.folder))
        typer.confirm(f"Delete {len(doomed)} passages of other models in {where}?", abort=True, err=True)
    deleted = 0 if dry_run else delete_from(store, doomed)
    if as_json:
        print_json({"folder": str(store.folder), "found": counts, "deleted": deleted, "dry_run": dry_run})
        return
    for name, count in counts.items():
        show(f"  model {name}: {count} passages")
    show(f"{len(doomed)} passages would be deleted" if dry_run else f"{deleted} passages deleted")


@app.command("forget")
def forget(
    texts: Annotated[
        str, typer.Argument(help="The passages to forget: a file, a folder, a BEIR folder, or - for standard input.")
    ],
    cache: CacheOption = "default",
    models: Annotated[
        list[str] | None,
        typer.Option(
            "--model",
            "-m",
            help="Also search what older versions kept for this model. The option may be repeated.",
            metavar="MODEL",
            show_default=False,
        ),
    ] = None,
    revision: RevisionOption = None,
    max_lengths: Annotated[
        list[int] | None,
        typer.Option(
            "--max-length",
            help="With --model: another max_length that passages were read with. The option may be repeated.",
            show_default=False,
        ),
    ] = None,
    file_format: FormatOption = "auto",
    text_field: TextFieldOption = None,
    id_field: IdFieldOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete everything that the cache keeps of given texts, under every model and setting, without loading a model.

    The exit status is 0 only if every entry of the cache could be searched.
    """
    from kalm_rag.cache import PassageCache
    from kalm_rag.cache.forgetting import check_can_delete
    from kalm_rag.cache.heads import unsearchable
    from kalm_rag.cache.spaces import recorded_spaces
    from kalm_rag.retrieval.corpus import read_passages

    store = _disk(cache)
    check_can_delete(store)
    recorded = list(recorded_spaces(store)[0].values())
    named = _spaces_of_models(models or [], revision, recorded, max_lengths or [])
    if texts != "-":  # nothing is deleted if the file cannot be read to its end
        for _ in read_passages(texts, file_format, text_field, id_field):
            pass
    given = (record.text for record in read_passages(texts, file_format, text_field, id_field))
    report = PassageCache(store, memory=0).forget(given, named)
    hidden = _by_model(unsearchable(store, [*recorded, *named]))
    store.close()
    if as_json:
        print_json({"folder": str(store.folder), **dataclasses.asdict(report), "unsearchable": hidden})
    else:
        _show_forgotten(report, hidden)
    if hidden or report.unreadable:
        sys.exit(1)


def _show_forgotten(report: ForgetReport, hidden: dict[str, int]) -> None:
    searched = f"{report.spaces} key spaces searched"
    if report.total:
        went = report.store
        show(
            f"{report.texts} texts read, {report.total} entries deleted: {went.states} of encoder states, "
            f"{went.prefilled} of prefilled passages ({searched})"
        )
    else:
        show(f"{report.texts} texts read, nothing is kept of them ({searched})")
    if report.unreadable:
        show(
            f"{report.unreadable} records of key spaces cannot be read, and their entries were not searched: name the "
            "models in use with --model"
        )
    if hidden:
        show(
            f"{sum(hidden.values())} entries are in key spaces that are not recorded, so they cannot be searched by "
            "text: name their model with --model, or delete them with `kalm-rag cache clear --model`"
        )
    for name, count in hidden.items():
        show(f"  model {name}: {count} entries")


def _spaces_of_models(
    models: list[str], revision: str | None, recorded: list[Space], max_lengths: list[int]
) -> list[Space]:
    """Return the key spaces of models, for the `max_length` and the ratios that are named or recorded too."""
    if not models:
        if max_lengths:
            msg = "--max-length goes with --model: recorded key spaces have a max_length of their own; leave it out"
            raise ValueError(msg)
        return []
    from kalm_rag.forget import RATIOS, spaces_of
    from kalm_rag.model.checkpoint import find_checkpoint
    from kalm_rag.utils.checks import check_positive

    _check_one(models, revision)
    lengths = [check_positive("max_length", length) for length in max_lengths]
    lengths += [int(space.keys.fields["max_length"]) for space in recorded]
    ratios = dict.fromkeys((*RATIOS, *(space.behind.ratio for space in recorded if space.behind is not None)))
    checkpoints = [find_checkpoint(model, revision=revision) for model in models]
    return [space for one in checkpoints for space in spaces_of(one, max_lengths=lengths, ratios=list(ratios))]


def _check_one(models: list[str], revision: str | None) -> None:
    if revision is not None and len(models) != 1:
        msg = f"--revision goes with exactly one model, got {len(models)}; run the command once for each"
        raise ValueError(msg)


def _by_model(counts: dict[bytes, int]) -> dict[str, int]:
    """Name models as `cache info --models` does."""
    return {model.hex()[:12]: count for model, count in sorted(counts.items())}


@app.command("export")
def export(
    folder: Annotated[str, typer.Argument(help="An empty folder for the shards.")],
    cache: CacheOption = "default",
    model: ModelFilter = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write verified passages to safetensors shards for import elsewhere."""
    from kalm_rag.cache.transfer import export_shards
    from kalm_rag.utils.paths import user_path

    report = export_shards(_disk(cache), user_path(folder, "the folder"), model=_digest(model, revision))
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    show(f"{report.passages} passages, {size_text(report.bytes)}, in {len(report.shards)} shards")
    if report.corrupt or report.other_models:
        show(f"left out: {report.corrupt} damaged, {report.other_models} of other models")


@app.command("import")
def import_(
    sources: Annotated[list[str], typer.Argument(help="Shards, or folders of shards.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="The model they must belong to.", metavar="MODEL")
    ] = None,
    any_model: Annotated[bool, typer.Option("--any-model", help="Take passages of any model.")] = False,
    cache: CacheOption = "default",
    limit_gb: LimitOption = None,
    revision: RevisionOption = None,
    as_json: JsonOption = False,
) -> None:
    """Read shards into the cache. Each entry is verified; shards of another model are refused.

    The exit status is 0 only if the cache holds every entry of the shards.
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
    report = import_shards(store, sources, model=_digest(model, revision))
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
