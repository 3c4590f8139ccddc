"""Decides whether a folder may be a cache: its owner, its format and its file system."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path

from kalm_rag.cache.database import refuse_special
from kalm_rag.cache.keys import FORMAT
from kalm_rag.cache.store import StoreError
from kalm_rag.utils.paths import MANIFEST

MANIFEST_PART = ".manifest-"
"""How the name of a manifest begins that is still being written."""

_NETWORK = {"9p", "afs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "gpfs", "lustre", "nfs", "nfs4", "smb3"}


def write_manifest(folder: Path) -> None:
    """Mark a folder as ours."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=MANIFEST_PART)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"what": "encoded passages of kalm-rag", "format": FORMAT}, file)
            file.flush()
            os.fsync(file.fileno())  # else a loss of power may keep the name and lose the content
        os.chmod(name, 0o644)  # the folder's mode decides who may read; mkstemp's would keep out whom the user lets in
        os.replace(name, folder / MANIFEST)
    except BaseException:
        os.unlink(name)
        raise


def is_cut_off(folder: Path) -> bool:
    """Whether the manifest exists without content, as a power loss may leave it."""
    path = folder / MANIFEST
    refuse_special(path)
    try:
        with path.open("rb") as file:
            return not file.read(65_536).strip(b"\0")
    except FileNotFoundError:
        return False


def read_manifest(folder: Path) -> None:
    """Refuse a folder that is not ours, or that a newer version wrote.

    Raises:
        StoreError: the message says what stands there.
    """
    path = folder / MANIFEST
    refuse_special(path)
    try:
        with path.open("rb") as file:
            content = json.loads(file.read(65_536))
        version = content["format"]
    except FileNotFoundError:
        msg = (
            f"the folder {folder} holds a database but no {MANIFEST}: it belongs to another program and is left alone; "
            "give the cache a folder of its own"
        )
        raise StoreError(msg) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        msg = f"cannot read {path} ({error!r}); restore it, or remove the folder to start with an empty cache"
        raise StoreError(msg) from error
    if version != FORMAT:
        msg = (
            f"the cache in {folder} has format {version!r}; this version of kalm-rag uses {FORMAT}: use another folder"
        )
        raise StoreError(msg)


def refuse_network(folder: Path) -> None:
    """Refuse a folder on a network file system."""
    kind = filesystem_of(folder)
    if kind in _NETWORK:
        msg = (
            f"the cache folder {folder} is on a network file system ({kind}), where SQLite's locks do not work; "
            "use a local folder, and `kalm-rag cache export` and `import` to share"
        )
        raise StoreError(msg)


def who_else_may_write(folder: Path) -> str | None:
    """Who besides this user and the administrator can change a folder, or None if nobody can."""
    if os.name != "posix":
        return None
    status = os.stat(folder)
    if status.st_uid not in (os.geteuid(), 0):
        return f"user {status.st_uid}, who owns it"
    return "every user of this machine" if status.st_mode & stat.S_IWOTH else None


def filesystem_of(folder: Path) -> str | None:
    """The type of the file system that holds a folder, where /proc tells it."""
    try:
        lines = Path("/proc/self/mounts").read_text("utf-8").splitlines()
    except OSError:
        return None
    best, kind = "", None
    target = os.path.realpath(folder)
    for line in lines:
        fields = line.split(" ")
        mount = fields[1].replace("\\040", " ")
        if len(mount) >= len(best) and (target == mount or target.startswith(mount.rstrip("/") + "/")):
            best, kind = mount, fields[2]
    return kind
