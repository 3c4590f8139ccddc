"""Whether a folder may be a cache: whose it is, of which format, on which file system, with what in its database."""

from __future__ import annotations

import json
import os
import sqlite3
import tempfile
from pathlib import Path

from kalm_rag.cache.keys import FORMAT
from kalm_rag.cache.store import StoreError

MANIFEST = "kalm-rag-cache.json"
"""The file that marks a folder as ours; without it, a folder with a database is somebody else's and is left alone."""

_NETWORK = {"9p", "afs", "ceph", "cifs", "fuse.glusterfs", "fuse.sshfs", "gpfs", "lustre", "nfs", "nfs4", "smb3"}


def write_manifest(folder: Path) -> None:
    """Mark a folder as ours."""
    handle, name = tempfile.mkstemp(dir=folder, prefix=".manifest-")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump({"what": "encoded passages of kalm-rag", "format": FORMAT}, file)
    os.chmod(name, 0o644)  # the folder's mode decides who may read; mkstemp's would keep out whom the user lets in
    os.replace(name, folder / MANIFEST)


def read_manifest(folder: Path) -> None:
    """Refuse a folder that is not ours, or that a newer version wrote."""
    try:
        content = json.loads((folder / MANIFEST).read_text("utf-8"))
        version = content["format"]
    except FileNotFoundError:
        msg = (
            f"the folder {folder} holds a database but no {MANIFEST}: it belongs to another program and is left alone; "
            "give the cache a folder of its own"
        )
        raise StoreError(msg) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        msg = f"cannot read {folder / MANIFEST} ({error!r}); restore it, or remove the folder to begin anew"
        raise StoreError(msg) from error
    if version != FORMAT:
        msg = (
            f"the cache in {folder} has format {version!r}; this version of kalm-rag uses {FORMAT}: use another folder"
        )
        raise StoreError(msg)


_TRIGGERS = {"Settings_count_insert", "Settings_count_delete", "Settings_size_insert", "Settings_size_update"} | {
    "Settings_size_delete"
}


def inspect_database(connection: sqlite3.Connection) -> None:
    """Refuse a database that would make diskcache do more than keep rows.

    diskcache turns settings that it does not know into attributes and SQL; views and triggers run what they say.
    """
    from diskcache.core import DEFAULT_SETTINGS, METADATA

    known = {**DEFAULT_SETTINGS, **METADATA}
    try:
        rows = connection.execute("SELECT key, value FROM Settings").fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            return  # another process is just making it
        raise
    for key, value in rows:
        if key not in known or type(value) is not type(known[key]):
            msg = f"the cache's database has the setting {key!r:.60} = {value!r:.60}, which is not ours"
            raise StoreError(msg)
    for kind, name, sql in connection.execute("SELECT type, name, sql FROM sqlite_master").fetchall():
        ours = kind in {"table", "index"} or (kind == "trigger" and name in _TRIGGERS and "SELECT" not in sql.upper())
        if not ours:
            msg = f"the cache's database has the {kind} {name!r:.60}, which is not ours"
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
