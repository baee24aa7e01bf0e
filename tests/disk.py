"""What a disk may hold after the power was cut: a model of a disk below a journalling file system.

`Disk` is fed the operations of a recorded trace one by one and says, at any point between two of them, what states the
disk could be found in. The model is one of permissions, in the manner of ALICE (Pillai and others, "All File Systems Are
Not Created Equal", OSDI 2014: system calls become micro-operations, and a file system's persistence properties say which
subsets of them can be on the disk). Its rules, and why each is there:

 1. Nothing is on the disk because it was called; only fsync promises (fsync(2)). Therefore every state between "only
    what was synced" and "everything" is possible, at every point.
 2. A file's data reach the disk page by page: 4096 bytes at a multiple of 4096, each page whole, in any order, at any
    time after the write and again after each later write. A page is found as the last sync left it or as any write
    since left it. That is write-back from the page cache over a disk with 4096-byte sectors (ALICE: writes are split into
    blocks, blocks reorder). That a page is whole is the one thing that FORMAT.md section 2.2 asks of the disk.
 3. The changes of one inode (size, and with it which blocks belong to it, and ctime) reach the disk in their order, up to
    some point that is not before the last sync. The journal of ext4 and XFS keeps them in order, and so does the log
    of btrfs for one inode. A write of several pages grows the file page by page.
 4. Size and data are independent. A page inside the size whose data did not arrive reads as zeros (the block is new, and
    a file system does not show what another file left there); data beyond the size that is on the disk are invisible.
    ext4 with data=ordered often does better; POSIX, data=writeback and ALICE's findings do not promise it.
 5. A page that a truncation removed is gone for good: if the file grows again the page has another block, which begins
    as zeros. What is written to it then cannot show up in the old block while the truncation is not on the disk,
    because a file system does not give a block away before it has committed that it is free.
 6. fsync makes durable what was written to the file before it was called: data, size, ctime, and that the file has
    the name under which it was made, with the directories above (ext4, XFS and btrfs do that, man page or not). It
    promises no other name. fdatasync leaves out what reading the data does not need: a ctime alone, and the name.
 7. Operations on names are atomic (rename(2)), and two that touch the same directory, or the same file, keep their order:
    a directory does not go before what was in it, and nothing is moved into one that is not there. They are durable
    when the directory was synced, and not before. Operations on different directories may overtake each other (ALICE
    saw btrfs do it); a rename between two directories stands in the order of both.
 8. In half of the states the file system is one with a single journal instead (ext4, XFS): all changes of inodes and names
    lie in one order, of which a beginning is on the disk, and a sync that has any of them to bring there brings all
    before it. Rules 3 to 7 allow these states as well, but drawing every fate alone would rarely find them.

What is left out: a torn 4096-byte write and a disk that lies about its cache, because no format survives them without a
second copy of every page; bits that rot, which the format finds and test_format shows; and writes that reach a page while
the disk is reading it, which rule 2 excludes (a file system with stable pages, or a writer that waits).

Each page, file and directory takes its own fate from one random generator, so a state can be had again from its seed.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diskfile import ALL_BUT_ONE, ONE_ALONE, File
from recording import ROOT, Enter, Leave, Move, Resize, Sync, SyncBegin, Touch, Write

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path
    from random import Random

    from recording import Op, Trace

# How many pages of a state have seen the latest write; or all but one have, or one alone has.
LOTTERY = (0.0, 0.1, 0.5, 0.9, 1.0, ALL_BUT_ONE, ONE_ALONE)


@dataclass(slots=True)
class State:
    """What is found on the disk. names: directory -> name -> number; changed: number -> index in the trace of the last
    change of the inode that is on the disk (below the trace's base: none was).
    """

    names: dict[int, dict[bytes, int]]
    modes: dict[int, int]
    targets: dict[int, bytes]
    files: dict[int, bytes] = field(default_factory=dict)
    changed: dict[int, int] = field(default_factory=dict)
    story: list[str] = field(default_factory=list)

    def paths(self, directory: int = ROOT, path: bytes = b"") -> Iterator[tuple[bytes, int]]:
        """Every name that can be reached, directories before what they hold."""
        for name, number in sorted(self.names.get(directory, {}).items()):
            yield path + name, number
            if stat.S_ISDIR(self.modes[number]):
                yield from self.paths(number, path + name + b"/")

    def write_out(self, root: Path) -> dict[int, int]:
        """Make the state in an empty directory. Returns inode number -> number in the trace."""
        first: dict[int, bytes] = {}
        for name, number in self.paths():
            path, mode = os.path.join(os.fsencode(root), name), self.modes[number]
            if number in first:
                os.link(first[number], path)
            elif stat.S_ISDIR(mode):
                os.mkdir(path, 0o700)
            elif stat.S_ISLNK(mode):
                os.symlink(self.targets[number], path)
            elif stat.S_ISREG(mode):
                with open(path, "wb") as file:
                    file.write(self.files[number])
                first[number] = path
        return {os.stat(path).st_ino: number for number, path in first.items()}


class Disk:
    """The disk under one trace, after the operations that were fed to it."""

    def __init__(self, trace: Trace) -> None:
        self.at = 0
        self.files: dict[int, File] = {}
        self.modes: dict[int, int] = {ROOT: stat.S_IFDIR}
        self.targets: dict[int, bytes] = {}
        self.inodes: dict[int, int] = {}
        self._names: dict[int, dict[bytes, int]] = {ROOT: {}}  # as on the disk for certain
        self._pending: list[tuple[int, Enter | Leave | Move]] = []
        self._durable: set[int] = set()
        self._begun: dict[int, tuple[int, Any]] = {}
        self._committed = 0  # where a single journal ends at the earliest
        for op in trace.ops[: trace.base]:
            self.feed(op)
        self._durable.update(at for at, _ in self._pending)
        self._fold()
        for file in self.files.values():
            file.sync_ends(file.sync_begins(), data=False)
        self._committed = self.at

    def feed(self, op: Op) -> None:
        """One more operation has happened."""
        match op:
            case Write():
                self.files[op.file].write(op.offset, op.data, self.at)
            case Resize():
                self.files[op.file].resize(op.size, self.at)
            case Touch():
                if op.file in self.files:
                    self.files[op.file].touch(self.at)
            case SyncBegin():
                file = self.files.get(op.file)
                self._begun[self.at] = (len(self._pending), file.sync_begins() if file else None)
            case Sync():
                self._synced(op)
            case Enter() | Leave() | Move():
                if isinstance(op, Enter):
                    self.modes[op.file] = op.mode
                    self.inodes[op.file] = op.inode
                    self.targets[op.file] = op.target
                    if stat.S_ISDIR(op.mode):
                        self._names[op.file] = {}
                    elif stat.S_ISREG(op.mode) and op.file not in self.files:
                        self.files[op.file] = File(self.at)
                if op.file in self.files:
                    self.files[op.file].touch(self.at)
                self._pending.append((self.at, op))
        self.at += 1

    def _synced(self, op: Sync) -> None:
        waiting, covered = self._begun.pop(op.began)
        before = self._pending[:waiting]
        if covered is not None:
            file = self.files[op.file]
            floor = file.floor
            file.sync_ends(covered, data=op.data)
            commits = file.floor > floor
            if not op.data:
                self._made_durable(op.file, before)
        else:
            own = {at for at, other in before if op.file in touched(other)}
            commits = bool(own)
            self._durable |= own
            self._made_durable(op.file, before)
        if commits:
            self._committed = max(self._committed, op.began)
        self._fold()

    def _made_durable(self, number: int, before: list[tuple[int, Enter | Leave | Move]]) -> None:
        """The first name of a file, and of every directory above it."""
        for at, op in before:
            if isinstance(op, Enter) and op.file == number:
                self._durable.add(at)
                self._made_durable(op.directory, before)
                return

    def _fold(self) -> None:
        """Carry out what is durable, with everything before it in the same directories, and forget it."""
        held: set[int] = set()
        for at, op in reversed(self._pending):
            if at in self._durable or held & touched(op):
                self._durable.add(at)
                held |= touched(op)
        left = []
        for at, op in self._pending:
            if at in self._durable:
                _carry_out(self._names, op)
            else:
                left.append((at, op))
        self._pending = left
        self._durable.clear()

    def crash(self, rng: Random, only: Iterable[int] | None = None, *, single: bool | None = None) -> State:
        """Draw one state of the disk if the power is cut now.

        only: the files that matter (default: all with a name). single: whether there is a single journal (default: drawn).
        """
        lottery = rng.choice(LOTTERY)
        if single is None:
            single = rng.random() < 0.5
        journal = rng.randrange(self._committed, self.at + 1) if single else None
        names = {directory: dict(entries) for directory, entries in self._names.items()}
        state = State(names, self.modes, self.targets)
        self._draw_names(state, rng, journal)
        reachable = sorted({number for _, number in state.paths() if number in self.files}) if only is None else only
        for number in reachable:
            file = self.files[number]
            if journal is not None:
                event = file.last_before(journal)
            else:
                event = rng.choice((file.floor, file.now, rng.randint(file.floor, file.now)))
            state.files[number], story = file.crash(event, rng, lottery)
            state.changed[number] = file.event(event).at
            state.story.append(f"file {number}: {story}")
        return state

    def _draw_names(self, state: State, rng: Random, journal: int | None) -> None:
        ends: dict[int, int] = {}
        stopped: set[int] = set()
        for at, op in self._pending:
            places = touched(op)
            for place in places:
                if place not in ends:
                    ends[place] = rng.choice((0, self.at, rng.randint(0, self.at))) if journal is None else journal
            if stopped & places or any(at > ends[place] for place in places):
                stopped |= places
                state.story.append(f"not on the disk: {op}")
            else:
                _carry_out(state.names, op)


def touched(op: Enter | Leave | Move) -> set[int]:
    """What an operation changes, and so cannot overtake: the directories, and what gets or loses a name."""
    match op:
        case Move():
            return {op.directory, op.new_directory, op.file} | ({op.other} if op.other is not None else set())
        case _:
            return {op.directory, op.file}


def _carry_out(names: dict[int, dict[bytes, int]], op: Enter | Leave | Move) -> None:
    match op:
        case Enter():
            names[op.directory][op.name] = op.file
        case Leave():
            del names[op.directory][op.name]
        case Move():
            del names[op.directory][op.name]
            names[op.new_directory][op.new_name] = op.file
            if op.exchange:
                assert op.other is not None
                names[op.directory][op.name] = op.other
