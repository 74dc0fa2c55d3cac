"""A disk that can be cut off: records what a job writes, and gives every state a crash may leave.

What a process that was killed leaves is all that it wrote. What a power cut leaves is everything
that was flushed, and of the writes since then any choice, each perhaps in part; names change in
order, but perhaps later than they were asked to.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

PAGE = 512
"""Bytes that reach a disk together."""


@dataclass
class File:
    """A file as it is on the disk, and what is not there yet."""

    content: bytearray = field(default_factory=bytearray)
    pending: list = field(default_factory=list)


class Disk:
    """The files of one folder while a job writes them.

    Call `states(rng)` behind the job: it yields folders' contents, by name.
    """

    def __init__(self, folder, monkeypatch):
        self.folder, self.events = Path(folder), []
        self.seen = {}
        for path in self.folder.iterdir():
            self.events.append(("create", self.inode(path), path.name))
            self.observe(path)
            self.events.append(("sync", self.inode(path)))
        self.events.append(("names",))
        self.begin = len(self.events)
        self.patch(monkeypatch)

    # --- recording ---

    def inode(self, path):
        return os.stat(path).st_ino

    def path_of(self, descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        return path if path.parent == self.folder else None

    def observe(self, path):
        """Take notice of what someone else wrote, such as the HDF5 library, page by page."""
        if not path.exists():
            return
        inode, now = self.inode(path), path.read_bytes()
        before = self.seen.get(inode)
        if before is None:
            self.events.append(("create", inode, path.name))
            before = b""
        if len(now) != len(before):
            self.events.append(("size", inode, len(now)))
            before = before[: len(now)].ljust(len(now), b"\0")
        for at in range(0, len(now), PAGE):
            if now[at : at + PAGE] != before[at : at + PAGE]:
                self.events.append(("write", inode, at, now[at : at + PAGE]))
        self.seen[inode] = now

    def patch(self, monkeypatch):
        real = {name: getattr(os, name) for name in ("pwrite", "fsync", "ftruncate", "replace")}
        unlink = Path.unlink

        def pwrite(descriptor, data, offset):
            path = self.path_of(descriptor)
            if path is None:
                return real["pwrite"](descriptor, data, offset)
            self.observe(path)
            inode, data = self.inode(path), bytes(data)
            self.events.append(("write", inode, offset, data))
            written = real["pwrite"](descriptor, data, offset)
            self.seen[inode] = path.read_bytes()
            return written

        def ftruncate(descriptor, size):
            path = self.path_of(descriptor)
            self.observe(path)
            real["ftruncate"](descriptor, size)
            self.observe(path)

        def fsync(descriptor):
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            if path == self.folder:
                self.events.append(("names",))
            elif path.parent == self.folder:
                self.observe(path)
                self.events.append(("sync", self.inode(path)))
            real["fsync"](descriptor)

        def replace(old, new):
            self.observe(Path(old))
            self.events.append(("rename", Path(old).name, Path(new).name))
            real["replace"](old, new)

        def remove(path, missing_ok=False):
            if path.parent == self.folder:
                self.observe(path)
                self.events.append(("unlink", path.name))
            unlink(path, missing_ok=missing_ok)

        for name, function in (
            ("pwrite", pwrite),
            ("ftruncate", ftruncate),
            ("fsync", fsync),
            ("replace", replace),
        ):
            monkeypatch.setattr(os, name, function)
        monkeypatch.setattr(Path, "unlink", remove)

    # --- replaying ---

    def states(self, rng, choices=4):
        """Yield (number of events, what befell, contents by name) for every cut."""
        for cut in range(self.begin, len(self.events) + 1):
            files, durable, names = self.replay(cut)
            yield cut, "killed", self.with_all(files, durable, names)
            yield cut, "nothing more", self.with_chosen(files, durable, lambda count: [], rng, 0)
            for number in range(choices):
                late = int(rng.integers(0, len(names) + 1))
                contents = self.with_chosen(
                    files, [*durable, *names[:late]], lambda n: rng.random(n) < 0.5, rng, 0.3
                )
                yield cut, f"choice {number}", contents

    def replay(self, cut):
        files, durable, names = {}, [], []
        for event in self.events[:cut]:
            kind = event[0]
            if kind in ("write", "size"):
                files[event[1]].pending.append(event)
            elif kind == "create":
                files[event[1]] = File()
                names.append(event)
            elif kind == "sync":
                file = files[event[1]]
                for pending in file.pending:
                    self.apply(file.content, pending)
                file.pending = []
                made = [n for n in names if n[0] == "create" and n[1] == event[1]]
                durable += made  # a flushed file has its first name
                names = [n for n in names if n not in made]
            elif kind == "names":
                durable, names = [*durable, *names], []
            else:
                names.append(event)
        return files, durable, names

    @staticmethod
    def apply(content, event, part=None):
        if event[0] == "size":
            size = event[2]
            del content[size:]
            content.extend(bytes(size - len(content)))
            return
        _, _, at, data = event
        data = data if part is None else data[:part]
        content.extend(bytes(max(0, at + len(data) - len(content))))
        content[at : at + len(data)] = data

    def with_all(self, files, durable, names):
        contents = {}
        for inode, file in files.items():
            contents[inode] = bytearray(file.content)
            for event in file.pending:
                self.apply(contents[inode], event)
        return self.named(contents, [*durable, *names])

    def with_chosen(self, files, names, choose, rng, torn):
        contents = {}
        for inode, file in files.items():
            contents[inode] = bytearray(file.content)
            for event, chosen in zip(file.pending, choose(len(file.pending)), strict=False):
                if chosen:
                    part = None
                    if event[0] == "write" and rng.random() < torn:
                        part = int(rng.integers(0, len(event[3]) + 1))
                    self.apply(contents[inode], event, part)
        return self.named(contents, names)

    @staticmethod
    def named(contents, events):
        folder = {}
        for event in events:
            if event[0] == "create":
                folder[event[2]] = event[1]
            elif event[0] == "rename":
                if event[1] in folder:
                    folder[event[2]] = folder.pop(event[1])
            else:
                folder.pop(event[1], None)
        return {name: bytes(contents[inode]) for name, inode in folder.items()}


def numbers(seed, shape, dtype=np.float32):
    """Numbers that tell one run from another."""
    return np.random.default_rng(seed).integers(1, 1 << 20, shape).astype(dtype)
