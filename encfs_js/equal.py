"""Compare two stores in the clear, each read through its own form: names, kinds, modes, targets of symlinks, and bytes."""

from __future__ import annotations

import contextlib
import os
import stat
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from encfs_js.sides import Side, UnreadableError, open_reader
from encfs_js.staging import remove
from encfs_js.survey import DIRECTORY, is_own

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from encfs_js.backing import Backing

_RUN: Final = 1 << 20


@dataclass(slots=True)
class Comparison:
    """What is compared. skipped: paths that DST is not to have. tally: gets (files, plain bytes) that were compared.

    repair: what is not equal is removed from DST, so that it is written again.
    """

    io: Backing
    source: Side
    target: Side
    skipped: Collection[bytes]
    tally: Callable[[int, int], None]
    repair: bool


def compare(comparison: Comparison, source: str, target: int) -> list[tuple[bytes, str]]:
    """Compare the store `source` with an open directory. Returns (path, why) of what is not equal. Raises OSError."""
    top = comparison.io.open(source, DIRECTORY & ~os.O_NOFOLLOW)
    unequal: list[tuple[bytes, str]] = []
    try:
        _directories(comparison, top, target, b"", unequal)
    finally:
        comparison.io.close(top)
    return unequal


def _names(comparison: Comparison, side: Side, directory: int, prefix: bytes) -> set[bytes]:
    return {
        name
        for name in comparison.io.listdir(directory)
        if not is_own(prefix, name) and prefix + name not in comparison.skipped and side.shows(prefix + name)
    }


def _directories(
    comparison: Comparison, source: int, target: int, prefix: bytes, unequal: list[tuple[bytes, str]]
) -> None:
    io = comparison.io
    ours = _names(comparison, comparison.target, target, prefix)
    theirs = _names(comparison, comparison.source, source, prefix)
    for name in sorted(ours | theirs):
        path = prefix + name
        if name not in theirs:
            why = "only the target has it"
        elif name not in ours:
            why = "the target has it not"
        else:
            why = _entries(comparison, source, target, name, path, unequal)
        if why:
            unequal.append((path, why))
            if comparison.repair:
                with contextlib.suppress(FileNotFoundError):
                    remove(io, target, name)


def _entries(
    comparison: Comparison, source: int, target: int, name: bytes, path: bytes, unequal: list[tuple[bytes, str]]
) -> str:
    """Compare one entry. Returns what is not equal; of what is in a directory `unequal` gets that."""
    io = comparison.io
    here, there = (io.stat(name, dir_fd=fd, follow_symlinks=False) for fd in (source, target))
    if here.st_mode != there.st_mode:
        return "of another kind or mode"
    if stat.S_ISDIR(here.st_mode):
        theirs = io.open(name, DIRECTORY, dir_fd=source)
        try:
            ours = io.open(name, DIRECTORY, dir_fd=target)
            try:
                _directories(comparison, theirs, ours, path + b"/", unequal)
            finally:
                io.close(ours)
        finally:
            io.close(theirs)
        return ""
    if stat.S_ISLNK(here.st_mode):
        same = io.readlink(name, dir_fd=source) == io.readlink(name, dir_fd=target)
        return "" if same else "a symlink to something else"
    return _files(comparison, source, target, name, path)


def _files(comparison: Comparison, source: int, target: int, name: bytes, path: bytes) -> str:
    io = comparison.io
    try:
        theirs = open_reader(io, comparison.source, source, name, path)
    except UnreadableError as problem:
        return f"the source cannot be read: {problem}"
    try:
        drop_cache(io, target, name)
        ours = open_reader(io, comparison.target, target, name, path)
        try:
            if theirs.size != ours.size:
                return f"{ours.size} bytes instead of {theirs.size}"
            for at in range(0, theirs.size, _RUN):
                if theirs.read(at, _RUN) != ours.read(at, _RUN):
                    return f"other bytes between {at} and {at + _RUN}"
                comparison.tally(0, min(_RUN, theirs.size - at))
        finally:
            ours.close()
    except UnreadableError as problem:
        return str(problem)
    finally:
        theirs.close()
    comparison.tally(1, 0)
    return ""


def drop_cache(io: Backing, directory: int, name: bytes) -> None:
    """Have the next reading of a file come from the disk; what was not written back yet stays."""
    fd = io.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    try:
        io.fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        io.close(fd)
