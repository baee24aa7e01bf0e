"""The crash rule (FORMAT.md section 2.2): find what a power cut left at the end of a sealed file, and trim it.

Only for files that were written in a run that ended uncleanly: anywhere else the same findings are integrity errors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from encfs_js.format import MAGIC, NONCE, PAGE, ZERO_PAGE, FileCipher, capacity, page_length, plain_size

if TYPE_CHECKING:
    from encfs_js.backing import Backing
    from encfs_js.sealed import FileKeys

_RUN = 256


def pages_to_keep(io: Backing, fd: int, cipher: FileCipher | None, whole: int, rest: int) -> int:
    """Return how many leading pages a crash left sound, of `whole` pages and `rest` bytes behind them."""
    run = memoryview(bytearray(_RUN * PAGE))
    start = 0
    while start < whole:
        count = min(io.preadv(fd, [run], start * PAGE) // PAGE, whole - start)
        if not count:
            break
        for i in range(count):
            page = start + i
            raw = run[i * PAGE : (i + 1) * PAGE]
            length = page_length(raw, page)
            if length == 0 and raw == ZERO_PAGE:
                return page
            is_last = page == whole - 1 and not rest
            if length < capacity(page) and not is_last and cipher and cipher.authentic(raw, page) is not None:
                return page + 1
        start += count
    return whole


def trim(io: Backing, fd: int, keys: FileKeys, *, plaintext: bool = False) -> tuple[int, int] | None:
    """Trim an open file to its longest good prefix and sync it. Returns plain sizes (before, after); None if sound.

    A file that is not ours is left alone: it begins with neither the magic nor zeros, or, where the store may hold
    plaintext, not with the whole magic.

    Crash points: after the cut the last page is full, after a part of the end mark it is cut, and where the end mark
    reached the disk and the cut did not, it is short and not the last: all are trimmed to the same length again.
    """
    whole, rest = divmod(io.fstat(fd).st_size, PAGE)
    start = _page(io, fd, 0)
    ours = start[: len(MAGIC)] == (MAGIC if plaintext else MAGIC[: len(start)])
    if not start or not (ours or (not plaintext and not start.strip(b"\0"))):
        return None
    cipher = keys.of(start)
    keep = pages_to_keep(io, fd, cipher, whole, rest)
    length, mark = 0, b""
    if keep:
        last = _page(io, fd, keep - 1)
        length = page_length(last, keep - 1)
        if length == capacity(keep - 1) and cipher and cipher.authentic(last, keep - 1) is not None:
            mark = cipher.seal(keep, b"", keys.random(NONCE))
    if keep == whole and not rest and not mark:
        return None
    io.ftruncate(fd, keep * PAGE)
    done = 0
    while done < len(mark):
        done += io.pwrite(fd, mark[done:], keep * PAGE + done)
    io.fsync(fd)
    before = plain_size(whole, length if keep == whole else capacity(whole - 1)) + rest
    return before, plain_size(keep, length)


def end(io: Backing, fd: int, keys: FileKeys, *, plaintext: bool = False) -> None:
    """Give a file its end mark back when a process died in a write or a cut of it (FORMAT.md section 2.2, at its end).

    It takes nothing away but a part of a page, and nothing from a file that is not ours. What else a power cut may leave, the
    end of a process cannot.
    """
    whole, rest = divmod(io.fstat(fd).st_size, PAGE)
    start = _page(io, fd, 0)
    if start[: len(MAGIC)] != (MAGIC if plaintext else MAGIC[: len(start)]):
        return
    if rest:
        io.ftruncate(fd, whole * PAGE)
    if not whole:
        return
    last = _page(io, fd, whole - 1)
    if page_length(last, whole - 1) != capacity(whole - 1):
        return
    cipher = keys.of(start)
    if cipher and cipher.authentic(last, whole - 1) is not None:
        mark, done = cipher.seal(whole, b"", keys.random(NONCE)), 0
        while done < len(mark):
            done += io.pwrite(fd, mark[done:], whole * PAGE + done)


def _page(io: Backing, fd: int, page: int) -> bytes:
    raw = bytearray(PAGE)
    return bytes(raw[: io.preadv(fd, [raw], page * PAGE)])
