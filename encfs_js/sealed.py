"""One sealed file as a plain one: read, write, truncate, sync, by the rules of FORMAT.md sections 2 and 2.1.

Synchronous, single-threaded and free of FUSE: what happens in one call is atomic for everybody else. Reading and writing
share one page buffer per store, so what `read` returns is valid until the next call on any file of that store.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

from encfs_js.errors import CipherMissingError
from encfs_js.format import (
    HEADER,
    MAX_PLAIN,
    NONCE,
    PAGE,
    ROW,
    DamagedPageError,
    FileCipher,
    Header,
    PageBuffer,
    Suite,
    capacity,
    page_length,
    page_of,
    pages_for,
    plain_start,
    refused_suite,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.backing import Backing

# 1 MiB of plain bytes, the most that FUSE hands over at once, touches 260 pages, and one more is the end mark.
RUN_PAGES: Final = 261
RUN_BYTES: Final = 1 << 20
ONE_PAGE_SEALS: Final = 1 << 20
REWRITE_SEALS: Final = 1 << 28


class FileKeys:
    """Makes the ciphers of sealed files: of existing ones by their header, of new ones with a fresh file id.

    volume_key: epoch -> 32 bytes, KeyError when the keyring lacks it. suite, epoch: what new files take.
    random: n -> n random bytes.
    """

    def __init__(
        self,
        volume_key: Callable[[int], bytes],
        suite: Suite,
        epoch: int,
        random: Callable[[int], bytes] = os.urandom,
    ) -> None:
        self._volume_key = volume_key
        self.suite = suite
        self.epoch = epoch
        self.random = random
        self.buffer = PageBuffer(RUN_PAGES)

    def renew(self, volume_key: Callable[[int], bytes], suite: Suite, epoch: int) -> None:
        """Take other keys, which must have those of all files there are; new files take `suite` and `epoch` from now on."""
        self._volume_key, self.suite, self.epoch = volume_key, suite, epoch

    def fresh(self) -> FileCipher:
        """Return the cipher of a new file id."""
        return FileCipher(self._volume_key(self.epoch), Header(self.suite, self.epoch, self.random(16)))

    def of(self, raw: bytes) -> FileCipher | None:
        """Return the cipher of the file that begins with `raw`; None: no header of ours, an unknown epoch, a refused suite."""
        try:
            header = Header.parse(raw)
            return FileCipher(self._volume_key(header.epoch), header)
        except (ValueError, KeyError, CipherMissingError):
            return None


class SealedFile:
    """An open sealed file. `fd` stays the caller's; it must be open for reading, and for writing if the file is to change.

    size: plain bytes. damage: None, or the index of the page that is reported when the end of the file is touched; then
    `size` is what the file claims, so that nobody takes it for shorter than it was. refused: the suite, if the OpenSSL of this
    host refuses it; then page 0 counts as damaged.
    Methods raise DamagedPageError where a page does not authenticate, and OSError from the backing file.
    """

    __slots__ = ("_cipher", "_fresh_id", "_io", "_keys", "_seals", "damage", "fd", "pages", "refused", "size")

    def __init__(self, io: Backing, fd: int, keys: FileKeys) -> None:
        self._io = io
        self._keys = keys
        self.fd = fd
        self._fresh_id = False
        self._seals = 0
        self.load()

    def load(self) -> None:
        """Take header, page count and size from the backing file."""
        whole, rest = divmod(self._io.fstat(self.fd).st_size, PAGE)
        self.pages = whole + (rest > 0)
        self.damage: int | None = None
        self._cipher: FileCipher | None = None
        self.refused: Suite | None = None
        self.size = 0
        if not self.pages:
            return
        page = self.pages - 1
        raw = self._page(page)
        head = raw if page == 0 else self._page(0, HEADER)
        self._cipher = self._keys.of(head)
        self.refused = refused_suite(head) if self._cipher is None else None
        length = self._cipher.authentic(raw, page) if self._cipher and not rest else None
        if length is None:
            # The field may lie, but never so that reading up to the size would miss the damaged page.
            claimed = page_length(raw, page) if len(raw) >= HEADER + PAGE // 2 else 0
            length = claimed if 0 < claimed < capacity(page) else capacity(page) - 1
            self.damage = page
            if self._cipher is None or self._cipher.authentic(self._page(0), 0) is None:
                self.damage = 0  # the header, most likely: it is part of what every page authenticates
        elif length == capacity(page):
            self.damage = self.pages
        self.size = plain_start(page) + length

    def _page(self, page: int, size: int = PAGE) -> bytes:
        view = self._keys.buffer.sealed[:size]
        return bytes(view[: self._io.preadv(self.fd, [view], page * PAGE)])

    @property
    def suite(self) -> Suite | None:
        """The file's suite, None while it is empty or its header is damaged."""
        return self._cipher.header.suite if self._cipher else None

    @property
    def is_stale(self) -> bool:
        """Whether the file has another suite or epoch than new files get, or one that is refused; an empty one has none."""
        header = self._cipher.header if self._cipher else None
        if header is None:
            return self.refused is not None
        return (header.suite, header.epoch) != (self._keys.suite, self._keys.epoch)

    @property
    def wants_new_id(self) -> bool:
        """Whether this file id has sealed as many pages as one may (FORMAT.md section 2.1)."""
        return self._seals >= REWRITE_SEALS

    # -- reading

    def read(self, offset: int, size: int, flags: int = 0) -> memoryview:
        """Return up to `size` plain bytes (at most 1 MiB) from `offset`; fewer only at the end of the file.

        flags: for preadv2; with os.RWF_NOWAIT, BlockingIOError says that the pages are not in memory.
        The view is valid until the next call on any file of the store.
        """
        end = min(offset + size, self.size)
        if offset >= end:
            return self._keys.buffer.plain[:0]
        first, last = (offset + HEADER) // ROW, (end - 1 + HEADER) // ROW
        if self.damage is not None and (self._cipher is None or last >= self.pages - 1):
            raise DamagedPageError(self.damage)
        assert self._cipher is not None
        buffer, count = self._keys.buffer, last - first + 1
        want = count * PAGE
        got = self._io.preadv(self.fd, [buffer.sealed[:want]], first * PAGE, flags)
        if got != want:
            if flags:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            raise DamagedPageError(first + got // PAGE)
        length = self._cipher.open_run(buffer, first, count, self.pages - 1)
        if last == self.pages - 1 and length != self.size - plain_start(last):
            raise DamagedPageError(last)  # an older copy of this page was put back
        at = offset + HEADER - first * ROW
        return buffer.plain[at : at + end - offset]

    # -- writing

    def write(self, offset: int, data: bytes | memoryview) -> int:
        """Write `data` at `offset`; a gap behind the end is filled with sealed zeros. Returns how many bytes were taken.

        Fewer than len(data) only after an error that struck when some were written, ENOSPC for instance; the file is
        sound then.
        """
        if not data:
            return 0
        self.grow(offset)
        view, done = memoryview(data), 0
        while done < len(view):
            part = view[done : done + RUN_BYTES]
            try:
                taken = self._write_run(offset + done, part)
            except OSError:
                if not done:
                    raise
                break
            done += taken
            if taken < len(part):
                break
        return done

    def grow(self, size: int, most: int | None = None) -> bool:
        """Fill with sealed zeros up to `size`, at most `most` bytes in this call. Returns whether `size` is reached.

        Raises OSError EFBIG beyond 2^31 pages, and ENOSPC before anything is written when the disk cannot hold it.
        """
        if size <= self.size:
            return True
        if size > MAX_PLAIN:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        if size - self.size > RUN_BYTES:
            disk = self._io.statvfs(self.fd)
            if (pages_for(size) - self.pages) * PAGE > disk.f_bfree * disk.f_frsize:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        until = size if most is None else min(size, self.size + most)
        while self.size < until:
            gap = min(until - self.size, RUN_BYTES)
            if self._write_run(self.size, memoryview(_ZEROS)[:gap]) < gap:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.size >= size

    def _write_run(self, offset: int, data: memoryview) -> int:
        """Write up to 1 MiB at or before the end of the file."""
        if self.damage is not None:
            raise DamagedPageError(self.damage)
        end = offset + len(data)
        size = max(self.size, end)
        pages = pages_for(size)
        first, at = page_of(offset)
        last = pages - 1 if end == size else page_of(end - 1)[0]
        plains: list[memoryview | bytes] = []
        start = -at
        for page in range(first, last + 1):
            room = ROW if page else ROW - HEADER
            if start >= 0 and start + room <= len(data):
                plains.append(data[start : start + room])
            else:
                plains.append(self._merged(page, room, start, data))
            start += room
        before = self._cipher, self._fresh_id, self._seals
        self._seal(first, plains, size - plain_start(last) if last == pages - 1 else capacity(last))
        done, error = self._put(first, len(plains))
        if error is not None:
            done = self._whole_pages(first, done)
        if done == len(plains) * PAGE:
            self.pages, self.size = pages, size
            return len(data)
        assert error is not None
        if not done:
            self._cipher, self._fresh_id, self._seals = before
            raise error
        taken = self._end_after(first, plains[: done // PAGE], end) - offset
        if taken <= 0:
            raise error
        return taken

    def _merged(self, page: int, room: int, start: int, data: memoryview) -> bytes:
        """Return the page's whole plain text: what it holds now, with `data` laid over it.

        start: where the page begins, counted in `data`; negative when it begins before.
        """
        plain = bytearray(room)
        begin = plain_start(page)
        if page < self.pages and (start < 0 or len(data) - start < self.size - begin):
            old = self.read(begin, room)
            plain[: len(old)] = old
        part = data[max(start, 0) : start + room]
        at = max(-start, 0)
        plain[at : at + len(part)] = part
        return bytes(plain)

    def _seal(self, first: int, plains: list[memoryview | bytes], last_length: int) -> None:
        count = len(plains)
        if self.pages <= 1 and (not self._fresh_id or self._seals + count > ONE_PAGE_SEALS):
            assert first == 0
            self._cipher, self._fresh_id, self._seals = self._keys.fresh(), True, 0
        assert self._cipher is not None
        self._cipher.seal_run(self._keys.buffer, first, plains, last_length, self._keys.random(NONCE * count))
        self._seals += count

    def _put(self, first: int, count: int) -> tuple[int, OSError | None]:
        """Write the sealed run. Returns bytes written, and the error if that is not all of it."""
        view, at, done = self._keys.buffer.sealed[: count * PAGE], first * PAGE, 0
        if first < self.pages:
            self._io.settle(self.fd, at, min(count, self.pages - first) * PAGE)
        try:
            while done < len(view):
                done += self._io.pwrite(self.fd, view[done:], at + done)
        except OSError as error:
            return done, error
        return done, None

    def _whole_pages(self, first: int, done: int) -> int:
        """After a write that failed: leave whole pages only. Returns how many bytes of the run stand."""
        whole, torn = divmod(done, PAGE)
        if not torn:
            return done
        if first + whole >= self.pages:
            try:
                self._io.ftruncate(self.fd, (first + whole) * PAGE)
            except OSError:
                self.load()
                raise
            return whole * PAGE
        # An existing page is half old, half new: it has its blocks, so the rest of it must go through.
        self._finish(self._keys.buffer.sealed[done : (whole + 1) * PAGE], first * PAGE + done)
        return (whole + 1) * PAGE

    def _finish(self, view: memoryview, at: int) -> None:
        """Write pages that have their blocks. Once more after an error, because half of it is worth nothing."""
        for attempt in (1, 2):
            try:
                while view:
                    done = self._io.pwrite(self.fd, view, at)
                    view, at = view[done:], at + done
                return
            except OSError:
                if attempt == 2:
                    self.load()
                    raise

    def _end_after(self, first: int, plains: list[memoryview | bytes], end: int) -> int:
        """Make the file sound when only the pages `plains` of a run were written. Returns how far the data stand now.

        If the last of them is the file's last page now, it is full: it is written again one byte shorter, in the block
        that it has.
        """
        tail = first + len(plains) - 1
        if tail < self.pages - 1:
            return min(end, plain_start(tail + 1))
        short = capacity(tail) - 1
        self.pages, self.size = tail + 1, plain_start(tail) + short
        self._seal(tail, [bytes(plains[-1][:short]) + b"\0"], short)
        self._finish(self._keys.buffer.sealed[:PAGE], tail * PAGE)
        if tail == 0:
            # As in truncate: page 0 has been full under this id, and the next write may take a new one.
            self._io.fdatasync(self.fd)
        return min(end, self.size)

    # -- truncating and syncing

    def truncate(self, size: int) -> None:
        """Cut to `size`, or grow to it. Shrinking never passes through a state with less data than both ends.

        A file with a damaged page can be cut before it. Raises DamagedPageError, and OSError as `grow` does.
        """
        if size > self.size:
            self.grow(size)
            return
        if size == self.size:
            if self.damage is not None:
                raise DamagedPageError(self.damage)
            self._io.ftruncate(self.fd, self.pages * PAGE)  # changes nothing but the times, as on a plain file
            return
        pages = pages_for(size)
        if not pages:
            self._io.ftruncate(self.fd, 0)
            self._fresh_id, self._seals = False, 0
            self.pages, self.size, self.damage, self._cipher, self.refused = 0, 0, None, None, None
            return
        if self.damage == 0:
            raise DamagedPageError(0)
        last = pages - 1
        keep = size - plain_start(last)
        plain = bytes(self.read(plain_start(last), keep))
        if pages < self.pages:
            self._io.ftruncate(self.fd, pages * PAGE)
        self._seal(last, [plain + bytes(capacity(last) - keep)], keep)
        self._io.settle(self.fd, last * PAGE, PAGE)
        self._finish(self._keys.buffer.sealed[:PAGE], last * PAGE)
        if pages == 1 < self.pages:
            # The next write may take a new id. Were the cut lost in a power cut, the old pages behind would not fit it.
            self._io.fdatasync(self.fd)
        self.pages, self.size, self.damage = pages, size, None

    def renew(self) -> None:
        """Seal a file of one page anew, under a fresh id: one write, so a crash leaves the old page or the new one.

        Raises DamagedPageError and OSError.
        """
        assert self.pages == 1
        plain = bytes(self.read(0, self.size))
        self._fresh_id = False
        self._seal(0, [plain + bytes(capacity(0) - self.size)], self.size)
        self._io.settle(self.fd, 0, PAGE)
        self._finish(self._keys.buffer.sealed[:PAGE], 0)

    def sync(self, datasync: bool) -> None:
        """Bring to the disk what was written before the call; with `datasync` without times and modes."""
        (self._io.fdatasync if datasync else self._io.fsync)(self.fd)


_ZEROS: Final = bytes(RUN_BYTES)
