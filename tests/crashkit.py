"""Records what a process writes to a folder, and rebuilds the folder as a loss of power would have left it.

`strace` records the system calls of an unchanged process. A folder is rebuilt from the first N of them under one of
several assumptions about what the disk kept of that which no fsync had asked it to keep.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

CALLS = (
    "openat,write,pwrite64,lseek,ftruncate,rename,renameat,renameat2,unlink,unlinkat,mkdir,rmdir,fsync,fdatasync,close"
)

KEPT = "kept"
"""Everything written is there, as after a kill."""
DATA_LOST = "data lost"
"""Names are there; a file has the content of its last fsync, and none without."""
ZEROS = "zeros"
"""Names and sizes are there; what no fsync asked for is zeros."""
ALL_LOST = "all lost"
"""Names are those of the last fsync of their folder, content that of the last fsync of the file."""
MODES = (KEPT, DATA_LOST, ZEROS, ALL_LOST)

_LINE = re.compile(r"(?P<pid>\d+) +(?P<call>\w+)\((?P<arguments>.*)\) += (?P<result>-?\d+)")
_STRING = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


@dataclass(frozen=True)
class Call:
    """A system call on a file of the folder, paths relative to it; `data` is also the new name of a rename."""

    name: str
    path: str
    data: bytes = b""
    offset: int = 0


class File:
    """What a file holds, and what it held when it was synced last."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.synced: bytes | None = None

    def write(self, data: bytes, offset: int) -> None:
        self.truncate(max(len(self.content), offset))
        self.content[offset : offset + len(data)] = data

    def truncate(self, size: int) -> None:
        del self.content[size:]
        self.content.extend(bytes(size - len(self.content)))


def strace() -> str:
    """Why calls cannot be recorded here, or an empty text."""
    if sys.platform != "linux" or shutil.which("strace") is None:
        return "needs strace"
    done = subprocess.run(["strace", "-f", "-e", "trace=close", "true"], capture_output=True, text=True, timeout=60)
    return "" if done.returncode == 0 else f"strace does not work here: {done.stderr.strip()[-200:]}"


def record(command: list[str], folder: Path, trace: Path) -> list[Call]:
    """Run a command and return its calls on files below a folder, in order."""
    options = ["-f", "-qq", "-xx", "-s", "10000000", "-e", f"trace={CALLS}", "-e", "signal=none", "-o", str(trace)]
    done = subprocess.run(["strace", *options, *command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return list(_calls(_lines(trace), str(folder)))


def _lines(trace: Path) -> Iterator[str]:
    """Lines, those of calls that a thread interrupted put together, and placed where they ended."""
    begun: dict[str, str] = {}
    with trace.open(encoding="ascii") as file:
        for line in file:
            pid = line.split(" ", 1)[0]
            if line.endswith("<unfinished ...>\n"):
                begun[pid] = line.removesuffix("<unfinished ...>\n")
            elif " resumed>" in line[:60]:
                yield begun.pop(pid) + line.split(" resumed>", 1)[1]
            else:
                yield line


def _calls(lines: Iterator[str], folder: str) -> Iterator[Call]:
    handles: dict[int, tuple[str, int]] = {}  # path below the folder, and position
    for line in lines:
        found = _LINE.match(line)
        if found is None or int(found["result"]) < 0:
            continue
        name, text, result = found["call"], found["arguments"], int(found["result"])
        strings = [bytes.fromhex(string.replace("\\x", "")) for string in _STRING.findall(text)]
        rest = [part.strip() for part in _STRING.sub("", text).split(",")]
        if name in {"openat", "rename", "renameat", "renameat2", "unlink", "unlinkat", "mkdir", "rmdir"}:
            paths = [os.path.relpath(os.fsdecode(string), folder) for string in strings]
            if paths[0].startswith(".."):
                handles.pop(result, None)
            elif name == "openat":
                handles[result] = (paths[0], 0)
                if "O_DIRECTORY" not in text:
                    yield Call("create", paths[0]) if "O_CREAT" in text else Call("open", paths[0])
                if "O_TRUNC" in text:
                    yield Call("truncate", paths[0])
                assert "O_APPEND" not in text
            elif name.startswith("rename"):
                yield Call("rename", paths[0], os.fsencode(paths[1]))
            elif name == "unlinkat" and "AT_REMOVEDIR" in text:
                yield Call("rmdir", paths[0])
            else:
                yield Call("unlink" if name == "unlinkat" else name, paths[0])
            continue
        handle = int(rest[0])
        if handle not in handles:
            continue
        path, position = handles[handle]
        if name == "close":
            del handles[handle]
        elif name == "lseek":
            handles[handle] = (path, result)
        elif name == "write":
            yield Call("write", path, strings[0][:result], position)
            handles[handle] = (path, position + result)
        elif name == "pwrite64":
            yield Call("write", path, strings[0][:result], int(rest[-1]))
        elif name == "ftruncate":
            yield Call("truncate", path, b"", int(rest[-1]))
        else:
            yield Call("sync", path)


@dataclass
class Disk:
    """Files by name, as a running program sees them and as the disk is bound to keep them."""

    names: dict[str, File] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    synced_names: dict[str, File] = field(default_factory=dict)
    synced_folders: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, folder: Path) -> Disk:
        """A folder that has been on the disk for long."""
        disk = cls()
        for path in sorted(folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            if path.is_dir():
                disk.folders.add(name)
            else:
                file = disk.names[name] = File()
                file.write(path.read_bytes(), 0)
                file.synced = bytes(file.content)
        disk.synced_names, disk.synced_folders = dict(disk.names), set(disk.folders)
        return disk

    def apply(self, call: Call) -> None:
        path = call.path
        file = self.names.get(path, File())  # one that is open and has no name any more is lost in any case
        if call.name == "create":
            self.names[path] = file
        elif call.name == "write":
            file.write(call.data, call.offset)
        elif call.name == "truncate":
            file.truncate(call.offset)
        elif call.name == "sync":
            self._sync(path)
        elif call.name == "rename":
            self.names[os.fsdecode(call.data)] = self.names.pop(path)
        elif call.name == "unlink":
            self.names.pop(path, None)
        elif call.name == "mkdir":
            self.folders.add(path)
        elif call.name == "rmdir":
            self.folders.discard(path)

    def _sync(self, path: str) -> None:
        if path in self.names:
            self.names[path].synced = bytes(self.names[path].content)
            return
        here = "" if path == "." else path

        def inside(name: str) -> bool:
            return os.path.dirname(name) == here

        self.synced_names = {name: file for name, file in self.synced_names.items() if not inside(name)}
        self.synced_names |= {name: file for name, file in self.names.items() if inside(name)}
        self.synced_folders = {name for name in self.synced_folders if not inside(name)}
        self.synced_folders |= {name for name in self.folders if inside(name)}

    def write_to(self, target: Path, mode: str) -> None:
        """Make the folder as the power loss leaves it. What is shared memory only is never there."""
        names = self.synced_names if mode == ALL_LOST else self.names
        folders = self.synced_folders if mode == ALL_LOST else self.folders
        target.mkdir()
        for folder in sorted(folders):
            if folder != ".":
                (target / folder).mkdir(parents=True, exist_ok=True)
        for name, file in names.items():
            if name.endswith("-shm") or not (target / name).parent.is_dir():
                continue
            content = bytes(file.content) if mode == KEPT else file.synced or b""
            if mode == ZEROS:
                content = content[: len(file.content)].ljust(len(file.content), b"\0")
            (target / name).write_bytes(content)
