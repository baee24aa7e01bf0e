"""Who has to wait while a file is sealed anew (rewrite.py): the one place where requests wait for each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from encfs_js.files import Files
    from encfs_js.tree import Node


class Gate:
    """The gate before the contents of one mount. It is nearly always open, and then nothing here waits."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._waiting = trio.lowlevel.ParkingLot()

    async def to_read(self, node: Node) -> None:
        """Wait while the file's new form is copied over the old one."""
        while self._files.copying is node:
            await self._waiting.park()

    async def to_change(self, node: Node) -> None:
        """Wait while the content of the file must not change."""
        while self._files.frozen is node:
            await self._waiting.park()

    async def to_remove(self, *entries: tuple[int, bytes]) -> None:
        """Wait while one of these names, (node id of the directory, name), is that of a file that must not go away."""
        while (frozen := self._files.frozen) is not None:
            if not any((parent.ino, name) in entries for parent, name in frozen.names):
                return
            await self._waiting.park()

    def look(self) -> None:
        """Let those go on who need not wait any more. To be called after every step of who seals anew."""
        if self._waiting and self._files.copying is None:
            self._waiting.unpark_all()
