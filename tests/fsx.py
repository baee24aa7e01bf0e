"""A file exerciser: random reads, writes, truncations and mappings of one file, held against a model in memory.

`python fsx.py PATH -N operations -S seed -l largest size` runs until the count is reached or a byte differs; then it
tells the operations that last touched that byte, and the last ones of all. The same seed makes the same operations.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import mmap
import os
import random
import sys
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

KERNEL_PAGE = mmap.PAGESIZE
LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.mmap.restype = ctypes.c_void_p
LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t] + [ctypes.c_int] * 3 + [ctypes.c_long]
LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
LIBC.msync.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
MS_SYNC = 4
SHOWN = 60  # operations that a mismatch tells

# How often each is done. A mapping is kept open over other operations in "hold".
WEIGHTS = {
    "read": 20,
    "write": 25,
    "append": 4,
    "truncate": 12,
    "map_read": 14,
    "map_write": 14,
    "hold": 3,
    "copy": 4,
    "fsync": 2,
    "reopen": 3,
    "check": 1,
}


class MismatchError(AssertionError):
    """The file does not hold what was put into it."""


@dataclasses.dataclass(frozen=True)
class Options:
    """size: the largest the file becomes; length: the longest operation; edges: offsets that are preferred."""

    size: int = 256 * 1024
    length: int = 64 * 1024
    edges: tuple[int, ...] = ()
    mapped_reads: bool = True
    mapped_writes: bool = True
    pollute: bool = False  # leave rubbish behind the end in a mapped page; it must not come back as data


class Exerciser:
    """One file, its model, and what was done to it."""

    def __init__(self, path: str, seed: int, options: Options = Options()) -> None:
        self.path, self.options = path, options
        self.dice = random.Random(seed)
        self.model = bytearray()
        self.last: deque[tuple[int, str, int, int]] = deque(maxlen=4000)  # count, what, from, to
        self.count = 0
        self.view: Mapping | None = None
        self.fd = -1
        self.kinds = [kind for kind in WEIGHTS if self._wanted(kind)]
        self.weights = [WEIGHTS[kind] for kind in self.kinds]

    def _wanted(self, kind: str) -> bool:
        return not (
            (kind == "map_read" and not self.options.mapped_reads)
            or (kind in ("map_write", "hold") and not self.options.mapped_writes)
        )

    # running

    def open(self, *, new: bool = False) -> None:
        self.fd = os.open(self.path, os.O_RDWR | (os.O_CREAT | os.O_TRUNC if new else 0), 0o644)
        if new:
            self.model.clear()

    def close(self) -> None:
        if self.view is not None:
            self.view.close()
            self.view = None
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def step(self) -> None:
        """One operation, and a look at the size."""
        self.count += 1
        getattr(self, self.dice.choices(self.kinds, self.weights)[0])()
        found = os.fstat(self.fd).st_size
        if found != len(self.model):
            raise MismatchError(f"the size is {found}, not {len(self.model)}\n{self.story(None)}")

    def run(self, count: int) -> None:
        for _ in range(count):
            self.step()

    # operations

    def read(self) -> None:
        start, stop = self.span(len(self.model))
        self.note("read", start, stop)
        self.same(os.pread(self.fd, stop - start, start), start, stop)

    def write(self) -> None:
        start, stop = self.span(self.options.size)
        if stop > start:  # writing nothing does not make a file longer
            self.put("write", start, stop)

    def append(self) -> None:
        start = len(self.model)
        stop = min(start + self.dice.randrange(1, 1 + min(self.options.length, 6000)), self.options.size)
        if stop > start:
            self.put("append", start, stop)

    def put(self, what: str, start: int, stop: int) -> None:
        self.note(what, start, stop)
        data = self.dice.randbytes(stop - start)
        at = 0
        while at < len(data):
            at += os.pwrite(self.fd, data[at:], start + at)
        self.keep(data, start)

    def truncate(self) -> None:
        size = self.place(self.options.size + 1)
        self.note("truncate from", len(self.model), size)
        if self.dice.random() < 0.5:
            os.ftruncate(self.fd, size)
        else:
            os.truncate(self.path, size)
        del self.model[size:]
        self.model.extend(bytes(size - len(self.model)))

    def map_read(self) -> None:
        start, stop = self.span(len(self.model))
        self.note("mapped read", start, stop)
        if stop > start:
            with contextlib.closing(Mapping(self.fd, len(self.model))) as view:
                self.same(view.get(start, stop), start, stop)
                if not self.options.pollute and any(view.get(len(self.model), view.size)):
                    raise MismatchError(f"there is data behind the end in the last page\n{self.story(None)}")

    def map_write(self) -> None:
        start, stop = self.span(self.options.size)
        if stop == start:
            return
        self.note("mapped write", start, stop)
        if stop > len(self.model):
            os.ftruncate(self.fd, stop)
            self.model.extend(bytes(stop - len(self.model)))
        with contextlib.closing(Mapping(self.fd, len(self.model))) as view:
            self.poke(view, start, stop)

    def hold(self) -> None:
        """Write through a mapping that stays while the file changes by other ways; then renew it."""
        if self.view is not None:
            stop = min(self.view.size, len(self.model))  # behind the end there is only SIGBUS
            start, stop = self.span(stop)
            self.note("held mapped write", start, stop)
            self.same(self.view.get(start, stop), start, stop)
            if stop > start:
                self.poke(self.view, start, stop)
            if self.dice.random() < 0.5:
                self.view.close()
                self.view = None
        elif self.model:
            self.view = Mapping(self.fd, len(self.model))

    def poke(self, view: Mapping, start: int, stop: int) -> None:
        data = self.dice.randbytes(stop - start)
        view.put(start, data)
        self.keep(data, start)
        if self.options.pollute:
            tail = min(-len(self.model) % KERNEL_PAGE, view.size - len(self.model))  # what follows is SIGBUS
            view.put(len(self.model), self.dice.randbytes(max(tail, 0)))
        if self.dice.random() < 0.3:
            view.sync()

    def copy(self) -> None:
        """copy_file_range inside the file, the two ranges apart."""
        start, stop = self.span(len(self.model))
        size = min(stop - start, self.options.length)
        to = self.place(self.options.size)
        to = max(to, stop)
        size = min(size, self.options.size - to)
        if size <= 0:
            return
        self.note(f"copy from {start} to", to, to + size)
        data = bytes(self.model[start : start + size])
        done = 0
        while done < size:
            moved = os.copy_file_range(self.fd, self.fd, size - done, start + done, to + done)
            if moved == 0:
                raise MismatchError(f"copy_file_range ended after {done} of {size} bytes\n{self.story(None)}")
            done += moved
        self.keep(data, to)

    def fsync(self) -> None:
        self.note("fsync", 0, 0)
        if self.dice.random() < 0.5:
            os.fsync(self.fd)
        else:
            os.fdatasync(self.fd)

    def reopen(self) -> None:
        self.note("close and open", 0, 0)
        self.close()
        self.open()

    def check(self) -> None:
        """Read everything."""
        self.note("read everything", 0, len(self.model))
        at = 0
        while at < len(self.model):
            data = os.pread(self.fd, 1 << 20, at)
            if not data:
                break
            self.same(data, at, at + len(data))
            at += len(data)
        if at != len(self.model) or os.pread(self.fd, 1, at):
            raise MismatchError(f"reading ends at {at}, not {len(self.model)}\n{self.story(None)}")

    # the model and the dice

    def place(self, limit: int) -> int:
        """An offset below limit, often at an edge that is preferred."""
        if limit <= 1:
            return 0
        if self.options.edges and self.dice.random() < 0.5:
            return min(max(self.dice.choice(self.options.edges) + self.dice.randrange(-2, 3), 0), limit - 1)
        return self.dice.randrange(limit)

    def span(self, limit: int) -> tuple[int, int]:
        start = self.place(limit)
        if self.options.edges and self.dice.random() < 0.4:
            stop = self.place(limit + 1)
        else:
            stop = start + self.dice.randrange(1, 1 + self.options.length)
        start, stop = sorted((start, min(stop, limit)))
        return start, min(stop, start + self.options.length)

    def keep(self, data: bytes, start: int) -> None:
        if start > len(self.model):
            self.model.extend(bytes(start - len(self.model)))
        self.model[start : start + len(data)] = data

    def note(self, what: str, start: int, stop: int) -> None:
        self.last.append((self.count, what, start, stop))

    def same(self, data: bytes, start: int, stop: int) -> None:
        wanted = self.model[start:stop]
        if data == wanted:
            return
        if len(data) != len(wanted):
            raise MismatchError(f"{len(data)} bytes from {start}, not {len(wanted)}\n{self.story(start)}")
        bad = [at for at in range(len(data)) if data[at] != wanted[at]]
        raise MismatchError(
            f"{len(bad)} bytes differ in {start}..{stop}, from {start + bad[0]} to {start + bad[-1]}: "
            f"{data[bad[0] : bad[0] + 8].hex()} in place of {bytes(wanted[bad[0] : bad[0] + 8]).hex()}\n"
            f"{self.story(start + bad[0])}"
        )

    def story(self, at: int | None) -> str:
        """The last operations that touched an offset, then the last ones of all."""

        def line(entry: tuple[int, str, int, int]) -> str:
            count, what, start, stop = entry
            return f"  {count:7d} {what} {start} {stop}" + (f" ({stop - start} bytes)" if stop > start else "")

        def touched(entry: tuple[int, str, int, int]) -> bool:
            _, what, _, stop = entry
            return "write" in what or "append" in what or "copy" in what or ("truncate" in what and stop <= (at or 0))

        lines = [f"{self.path} at operation {self.count}"]
        if at is not None:
            lines += [f"what touched offset {at}:"]
            found = [e for e in self.last if touched(e) and ("truncate" in e[1] or e[2] <= at < e[3])]
            lines += [line(entry) for entry in found[-5:]]
        return "\n".join([*lines, "the last operations:", *(line(e) for e in list(self.last)[-SHOWN:])])


class Mapping:
    """A shared mapping of a file up to the end of its last page (mmap.mmap stops at the end of the file)."""

    def __init__(self, fd: int, size: int) -> None:
        self.size = -(-size // KERNEL_PAGE) * KERNEL_PAGE
        self.address = LIBC.mmap(None, self.size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)
        if self.address in (None, ctypes.c_void_p(-1).value):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def get(self, start: int, stop: int) -> bytes:
        return ctypes.string_at(self.address + start, stop - start)

    def put(self, start: int, data: bytes) -> None:
        ctypes.memmove(self.address + start, data, len(data))

    def sync(self) -> None:
        if LIBC.msync(self.address, self.size, MS_SYNC):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def close(self) -> None:
        LIBC.munmap(self.address, self.size)


def page_edges(size: int) -> tuple[int, ...]:
    """Where pages of a sealed file and of the kernel begin, up to `size` (few of them far from the start)."""
    sealed = [4032 + 4064 * n for n in range(size // 4064 + 1)]
    kernel = [4096 * n for n in range(size // 4096 + 1)]
    return tuple(sorted({*sealed[:6], *sealed[-3:], *kernel[:5], *kernel[-3:], 0, size}))


def run_together(
    exercisers: list[Exerciser], count: int, *, dice: random.Random, remount: Callable[[], None], every: int
) -> None:
    """Operations on several files in turns; `remount` is called after `every` of them, with all files closed."""
    for number in range(1, count + 1):
        dice.choice(exercisers).step()
        if number % every == 0:
            for exerciser in exercisers:
                exerciser.close()
            remount()
            for exerciser in exercisers:
                exerciser.open()
                exerciser.check()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="fsx.py", description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("path")
    parser.add_argument("-N", type=int, default=10_000, metavar="OPERATIONS")
    parser.add_argument("-S", type=int, default=1, metavar="SEED")
    parser.add_argument("-l", type=int, default=256 * 1024, metavar="LARGEST", help="largest size of the file")
    parser.add_argument("-o", type=int, default=64 * 1024, metavar="LENGTH", help="longest operation")
    parser.add_argument("-x", action="store_true", help="prefer the edges of pages")
    parser.add_argument("-R", action="store_true", help="no mapped reads")
    parser.add_argument("-W", action="store_true", help="no mapped writes")
    parser.add_argument("-e", action="store_true", help="leave rubbish behind the end in mapped pages")
    given = parser.parse_args(argv)
    options = Options(
        size=given.l,
        length=given.o,
        edges=page_edges(given.l) if given.x else (),
        mapped_reads=not given.R,
        mapped_writes=not given.W,
        pollute=given.e,
    )
    exerciser = Exerciser(given.path, given.S, options)
    exerciser.open(new=True)
    try:
        exerciser.run(given.N)
        exerciser.check()
    except (MismatchError, OSError) as exc:
        print(f"{exc}\n{exerciser.story(None) if isinstance(exc, OSError) else ''}", file=sys.stderr)
        return 1
    finally:
        exerciser.close()
    print(f"{given.path}: {given.N} operations, seed {given.S}: as it should be")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
