"""One regular file on the disk that tests/disk.py models: rules 2 to 6 there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from random import Random

PAGE = 4096
ZEROS = bytes(PAGE)
ALL_BUT_ONE = 2.0
ONE_ALONE = -1.0


class Life:
    """One page of a file from the moment the file has it until a truncation takes it away."""

    __slots__ = ("born", "died", "dropped", "versions")

    def __init__(self, born: int) -> None:
        self.born = born
        self.died: int | None = None
        self.versions = [ZEROS]  # what the disk may hold; the first is what the last sync left
        self.dropped = 0

    def exists(self, event: int) -> bool:
        return self.born <= event and (self.died is None or event < self.died)

    def settle(self, count: int) -> None:
        """The version that was the `count`-th ever is on the disk now, and nothing older."""
        gone = count - 1 - self.dropped
        if gone > 0:
            del self.versions[:gone]
            self.dropped += gone


@dataclass(frozen=True, slots=True)
class Event:
    """A change of the inode. size: from then on; at: index in the trace; grave: readers of the data need to know it."""

    size: int
    at: int
    grave: bool


class File:
    """A regular file: what the page cache holds and what the disk may hold.

    Events are counted from 0, the empty file; those before `floor` can no longer be what the disk shows.
    """

    def __init__(self, at: int) -> None:
        self.events = [Event(0, at, grave=True)]
        self.floor = 0
        self._first = 0  # the number of events[0]
        self.pages: dict[int, list[Life]] = {}
        self._dirty: set[int] = set()

    @property
    def now(self) -> int:
        return self._first + len(self.events) - 1

    @property
    def size(self) -> int:
        return self.events[-1].size

    def event(self, number: int) -> Event:
        return self.events[number - self._first]

    def touch(self, at: int) -> None:
        self.events.append(Event(self.size, at, grave=False))

    def write(self, offset: int, data: bytes, at: int) -> None:
        start, end = offset, offset + len(data)
        while offset < end:
            page, skip = divmod(offset, PAGE)
            part = data[offset - start : offset - start + PAGE - skip]
            if offset + len(part) > self.size:
                self._grow(offset + len(part), at)
            else:
                self.touch(at)
            life = self.pages[page][-1]
            old = life.versions[-1]
            life.versions.append(old[:skip] + part + old[skip + len(part) :])
            self._dirty.add(page)
            offset += len(part)

    def _grow(self, size: int, at: int) -> None:
        self.events.append(Event(size, at, grave=True))
        for page in range(-(-self.events[-2].size // PAGE), -(-size // PAGE)):
            self.pages.setdefault(page, []).append(Life(self.now))

    def resize(self, size: int, at: int) -> None:
        if size >= self.size:
            if size > self.size:
                self._grow(size, at)
            else:
                self.touch(at)
            return
        old, whole = self.size, -(-size // PAGE)
        self.events.append(Event(size, at, grave=True))
        for page in range(whole, -(-old // PAGE)):
            self.pages[page][-1].died = self.now
        if size % PAGE:
            life = self.pages[whole - 1][-1]
            life.versions.append(life.versions[-1][: size % PAGE].ljust(PAGE, b"\0"))
            self._dirty.add(whole - 1)

    def content(self) -> bytes:
        """What the page cache holds: what a reader sees while the power is on."""
        pages = (self.pages[page][-1].versions[-1] for page in range(-(-self.size // PAGE)))
        return b"".join(pages)[: self.size]

    def sync_begins(self) -> tuple[int, dict[int, tuple[Life, int]]]:
        live = {page: self.pages[page][-1] for page in self._dirty if page in self.pages}
        return self.now, {page: (life, life.dropped + len(life.versions)) for page, life in live.items()}

    def sync_ends(self, covered: tuple[int, dict[int, tuple[Life, int]]], *, data: bool) -> None:
        now, pages = covered
        if data:
            while now > self.floor and not self.event(now).grave:
                now -= 1
        self.settle(now)
        for page, (life, count) in pages.items():
            life.settle(count)
            if len(life.versions) == 1:
                self._dirty.discard(page)

    def settle(self, event: int) -> None:
        """The changes of the inode up to that event are on the disk."""
        if event <= self.floor:
            return
        self.floor = event
        del self.events[: event - self._first]
        self._first = event
        for page in list(self.pages):
            lives = [life for life in self.pages[page] if life.died is None or life.died > event]
            if lives:
                self.pages[page] = lives
            else:
                del self.pages[page]
                self._dirty.discard(page)

    def last_before(self, at: int) -> int:
        """The last event that the journal holds if it ends at index `at` of the trace."""
        number = self.now
        while number > self.floor and self.event(number).at > at:
            number -= 1
        return number

    def crash(self, event: int, rng: Random, lottery: float) -> tuple[bytes, str]:
        """Draw what is found in a file whose inode is as after `event`; and in words, which version each page has.

        lottery: the share of pages that have seen their latest write, the others being drawn; ALL_BUT_ONE or ONE_ALONE.
        """
        size = self.event(event).size
        lives = [
            next(life for life in self.pages[page] if life.exists(event)).versions for page in range(-(-size // PAGE))
        ]
        several = [page for page, versions in enumerate(lives) if len(versions) > 1]
        odd = rng.choice(several) if several else None
        pages, words = [], []
        for page, versions in enumerate(lives):
            which = last = len(versions) - 1
            if last:
                if lottery == ALL_BUT_ONE:
                    which = rng.randrange(last) if page == odd else last
                elif lottery == ONE_ALONE:
                    which = rng.randint(1, last) if page == odd else 0
                elif rng.random() >= lottery:
                    which = rng.randint(0, last)
                words.append(f"page {page}: {which} of 0..{last}")
            pages.append(versions[which])
        story = f"inode {event} of {self.floor}..{self.now}, {size} bytes" + "".join(f", {word}" for word in words)
        return b"".join(pages)[:size], story
