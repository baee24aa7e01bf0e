"""What a program that used a plain file may expect of it after a power cut, and whether a content is that.

Pages are known by FORMAT.md's numbers only, and nothing is known of sealing.
"""

from __future__ import annotations

from collections import defaultdict


def start_of(page: int) -> int:
    return 4032 + (page - 1) * 4064 if page else 0


def page_at(offset: int) -> int:
    return 0 if offset < 4032 else 1 + (offset - 4032) // 4064


class Promise:
    """What a plain file may be after a power cut now, from what was done to it so far.

    A page of it (in the sense of FORMAT.md: what one page write carries) is as the last sync left it or as any operation
    since did; what was synced and not cut since is there; nothing is longer than it ever was since the sync.
    """

    def __init__(self) -> None:
        self.plain = bytearray()
        self._synced = b""
        self._since: list[tuple[int, bytes]] = []  # page, and what it held after an operation
        self._sizes: list[int] = []
        self._dropped = 0
        self._begun: dict[int, tuple[int, int, bytes]] = {}

    def starts_as(self, content: bytes) -> None:
        """The file lies on the disk like this."""
        self.plain[:] = self._synced = content

    def write(self, offset: int, data: bytes) -> None:
        if offset > len(self.plain):
            self.truncate(offset)
        self.plain[offset : offset + len(data)] = data
        self._changed(offset, offset + len(data))

    def truncate(self, size: int) -> None:
        old = len(self.plain)
        if size < old:
            del self.plain[size:]
            self._changed(max(size - 1, 0), size)
        else:
            self.plain += bytes(size - old)
            self._changed(old, size)

    def _changed(self, start: int, end: int) -> None:
        self._sizes.append(len(self.plain))
        if end > start:
            for page in range(page_at(start), page_at(end - 1) + 1):
                self._since.append((page, self._piece(self.plain, page)))

    def becomes(self, content: bytes) -> None:
        """After an operation that failed half way: this is what the file holds now."""
        self.plain[:] = content
        self._changed(0, len(content))

    def sync_begins(self, token: int) -> None:
        self._begun[token] = (len(self._since) + self._dropped, len(self._sizes), bytes(self.plain))

    def sync_ends(self, token: int) -> None:
        since, sizes, self._synced = self._begun.pop(token)
        del self._since[: since - self._dropped]
        self._dropped = since
        self._sizes = (
            [len(self._synced), *self._sizes[sizes:]] if not self._begun else [len(self._synced), *self._sizes]
        )

    @staticmethod
    def _piece(content: bytes | bytearray, page: int) -> bytes:
        return bytes(content[start_of(page) : start_of(page + 1)])

    @property
    def least(self) -> int:
        """How many bytes have to be there: those that were synced and not cut since."""
        return min([len(self._synced), *self._sizes])

    def wrong(self, content: bytes) -> str:
        """What is wrong with the content, or an empty string."""
        low, high = self.least, max([len(self._synced), *self._sizes])
        if len(content) < low:
            return f"{len(content)} bytes where {low} were synced and never cut"
        if len(content) > high:
            return f"{len(content)} bytes where there were never more than {high}"
        known: defaultdict[int, set[bytes]] = defaultdict(set)
        for page, piece in self._since:
            known[page].add(piece)
        for page in range(page_at(len(content) - 1) + 1 if content else 0):
            piece = self._piece(content, page)
            if piece != self._piece(self._synced, page) and piece not in known[page]:
                return f"page {page} ({len(piece)} plain bytes) is as it never was since the last sync"
        return ""


class World:
    """What the application may rely on, at one point of a recorded run."""

    def __init__(self, files: dict[int, bytes]) -> None:
        self.files: dict[int, Promise] = {}
        # path -> what was ever put there whole and synced before, and how many of the first are out of date
        self.puts: dict[bytes, list[bytes]] = {}
        self.settled: dict[bytes, int] = {}
        for number, content in files.items():
            self.of(number).starts_as(content)

    def of(self, number: int) -> Promise:
        return self.files.setdefault(number, Promise())

    def put(self, path: bytes, data: bytes, earlier: list[bytes]) -> None:
        """Under that name lies the old or the new content, whole. earlier: what lay there before the first `put`."""
        if path not in self.puts:
            self.puts[path] = list(earlier)
            if earlier:
                self.settled[path] = 0
        self.puts[path].append(data)

    def forget(self, path: bytes) -> None:
        """Something was put there that was not synced before: only the promises of the files themselves hold."""
        self.puts.pop(path, None)
        self.settled.pop(path, None)
