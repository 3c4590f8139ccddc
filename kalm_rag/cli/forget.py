"""`kalm-rag cache clear`, `prune` and `forget`: delete from the cache."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from kalm_rag.cli.cache import ModelFilter, digest_of, open_folder
from kalm_rag.cli.encode import check_shared
from kalm_rag.cli.options import (
    CacheOption,
    FormatOption,
    IdFieldOption,
    JsonOption,
    RevisionOption,
    TextFieldOption,
    check_revision,
    choices,
)
from kalm_rag.cli.output import print_json, show
from kalm_rag.cli.remote import (
    NamespaceOption,
    RemoteOption,
    SecretFileOption,
    UnauthenticatedOption,
    shared_tier,
)
from kalm_rag.utils.display import visible_line

if TYPE_CHECKING:
    from kalm_rag.cache import ForgetReport
    from kalm_rag.cache.spaces import Space
    from kalm_rag.forget import WindowFinder


def clear(
    cache: CacheOption = "default",
    model: ModelFilter = None,
    revision: RevisionOption = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
) -> None:
    """Delete all passages, or those of one model."""
    from kalm_rag.cache.forgetting import check_can_delete, delete_from
    from kalm_rag.cache.heads import keys_of_models

    store = open_folder(cache)
    check_can_delete(store)
    digest = digest_of(model, revision)
    doomed = list(store.keys()) if digest is None else keys_of_models(store, [digest]).get(digest, [])
    if doomed and not yes:
        typer.confirm(f"Delete {len(doomed)} passages in {visible_line(str(store.folder))}?", abort=True)
    deleted = delete_from(store, doomed)
    store.records.clear(digest)
    show(f"{deleted} passages deleted")


def prune(
    keep_models: Annotated[
        list[str],
        typer.Option(
            "--keep-model",
            help="A model whose passages stay. The option may be repeated.",
            metavar="MODEL",
            autocompletion=choices("nano", "small", "large", "mini"),
        ),
    ],
    cache: CacheOption = "default",
    revision: RevisionOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted, and delete nothing.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Delete without asking.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete the passages of all other models.

    Use it after a model was replaced: what was encoded with the old one is never found again.
    """
    from kalm_rag.cache.forgetting import check_can_delete, delete_from
    from kalm_rag.cache.heads import keys_of_models

    store = open_folder(cache)
    if not dry_run:
        check_can_delete(store)
    _check_one(keep_models, revision)
    kept = {digest for model in keep_models if (digest := digest_of(model, revision)) is not None}
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
            autocompletion=choices("nano", "small", "large", "mini"),
        ),
    ] = None,
    revision: RevisionOption = None,
    max_lengths: Annotated[
        list[int] | None,
        typer.Option(
            "--max-length",
            help="With --model: another max_length that passages were read with. The option may be repeated.",
            metavar="TOKENS",
            show_default=False,
        ),
    ] = None,
    remote: RemoteOption = None,
    namespace: NamespaceOption = "default",
    secret_file: SecretFileOption = None,
    unauthenticated: UnauthenticatedOption = False,
    file_format: FormatOption = "auto",
    text_field: TextFieldOption = None,
    id_field: IdFieldOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete what the cache keeps of given texts.

    They are searched under every model and setting that the cache has recorded, without loading a model. The exit
    status is 1 if entries are left that these may not cover.
    """
    from kalm_rag.cache import PassageCache
    from kalm_rag.cache.forgetting import check_can_delete
    from kalm_rag.cache.heads import unsearchable
    from kalm_rag.cache.spaces import recorded_spaces
    from kalm_rag.forget import forget_with_windows
    from kalm_rag.retrieval.corpus import read_passages

    store = open_folder(cache)
    check_can_delete(store)
    tier = shared_tier(remote, "read-write", namespace, secret_file, unauthenticated)
    passages = PassageCache(store, memory=0, **tier)
    check_shared(passages)
    recorded = list(recorded_spaces(store)[0].values())
    named, windows = _spaces_of_models(models or [], revision, recorded, max_lengths or [])
    if texts != "-":  # nothing is deleted if the file cannot be read to its end
        for _ in read_passages(texts, file_format, text_field, id_field):
            pass
    given = (record.text for record in read_passages(texts, file_format, text_field, id_field))
    report = forget_with_windows(passages, given, named, windows)
    hidden = _by_model(unsearchable(store, [*recorded, *named]))
    store.close()
    if as_json:
        facts = dataclasses.asdict(report)
        for level in ("memory", "store", "remote"):
            del facts[level]["scores"]  # those of other processes are out of reach, and this one has none
        print_json({"folder": str(store.folder), **facts, "unsearchable": hidden})
    else:
        _show_forgotten(report, hidden)
    if hidden or report.unreadable or report.older or report.windowed:
        sys.exit(1)


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"


def _show_forgotten(report: ForgetReport, hidden: dict[str, int]) -> None:
    went = report.store
    deleted = f"{_count(went.total, 'entry', 'entries')} deleted ({went.states} states, {went.prefilled} prefilled)"
    show(
        f"{_count(report.texts, 'text')} read, {deleted if went.total else 'nothing is kept of them'}, "
        f"{_count(report.spaces, 'key space')} searched"
    )
    if report.remote.total:
        show(
            f"{_count(report.remote.total, 'entry', 'entries')} deleted in the shared tier. Other machines keep what "
            "is on their disks: run this command there too"
        )
    if report.unreadable:
        show(
            f"{report.unreadable} records of key spaces cannot be read, and their entries were not searched: name the "
            "models in use with --model"
        )
    if report.windowed:
        show(
            f"Windows of long passages are kept too, in {_count(report.windowed, 'way')} to split them, and were not "
            "searched: to find them, name the model with --model"
        )
    if hidden:
        show(
            f"{sum(hidden.values())} entries are in key spaces that are not recorded, so they cannot be searched by "
            "text: name their model with --model, or delete them with `kalm-rag cache clear --model`"
        )
    elif report.older:
        show(
            f"{_count(report.older, 'entry', 'entries')} left that are older than the cache's records, so they can be "
            "searched by text only under recorded settings and, with --model, a model's default ones: to be sure, "
            "delete them with `kalm-rag cache clear --model`"
        )
    for name, count in hidden.items():
        show(f"  model {name}: {count} entries")


def _spaces_of_models(
    models: list[str], revision: str | None, recorded: list[Space], max_lengths: list[int]
) -> tuple[list[Space], list[WindowFinder]]:
    """Return the key spaces of models, for the `max_length` and the ratios that are named or recorded too.

    Of each model whose windows are recorded, also what finds these.
    """
    if not models:
        check_revision(revision)
        if max_lengths:
            msg = "--max-length goes with --model: recorded key spaces have a max_length of their own; leave it out"
            raise ValueError(msg)
        return [], []
    from kalm_rag.forget import RATIOS, WindowFinder, spaces_of, split_alike
    from kalm_rag.model.checkpoint import find_checkpoint
    from kalm_rag.settings import Settings
    from kalm_rag.utils.checks import check_positive

    _check_one(models, revision)
    lengths = [check_positive("max_length", length) for length in max_lengths]
    lengths += [int(space.keys.fields["max_length"]) for space in recorded]
    ratios = dict.fromkeys((*RATIOS, *(space.behind.ratio for space in recorded if space.behind is not None)))
    checkpoints = [find_checkpoint(model, revision=revision) for model in models]
    named: list[Space] = []
    windows: list[WindowFinder] = []
    for checkpoint in checkpoints:
        spaces = spaces_of(checkpoint, max_lengths=lengths, ratios=list(ratios))
        named += spaces
        if split := split_alike(recorded, spaces):
            windows.append(WindowFinder(checkpoint, Settings(), split))
    return named, windows


def _check_one(models: list[str], revision: str | None) -> None:
    if revision is not None and len(models) != 1:
        msg = f"--revision goes with exactly one model, got {len(models)}; run the command once for each"
        raise ValueError(msg)


def _by_model(counts: dict[bytes, int]) -> dict[str, int]:
    """Name models as `cache info --models` does."""
    return {model.hex()[:12]: count for model, count in sorted(counts.items())}
