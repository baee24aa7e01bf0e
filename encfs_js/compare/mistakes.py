"""What operators do: a wrong key, and a mount that is not there."""

from __future__ import annotations

import os
import secrets
import shutil
from typing import TYPE_CHECKING, Final

from encfs_js.compare import modes, observing, telling, victim
from encfs_js.compare.client import connected
from encfs_js.compare.judging import Seen, compare, count, judge
from encfs_js.compare.processes import RefusedError
from encfs_js.compare.reading import read
from encfs_js.compare.tampering import ALL

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.compare.result import Word
    from encfs_js.compare.victim import Victim

NO_KEY: Final = "There is no key."
_ASTRAY: Final = b"stored in the clear while nothing was mounted"


def wrong_key(of: Victim, name: str, check: Callable[[], None]) -> tuple[Word, str]:
    """Use the store with a wrong key, as an application does that creates its streams; then with the right one."""
    if of.mode.kind == "plain":
        return "not run", NO_KEY
    with of.copied("late", name) as store:
        before, after = observing.digest(store.backing), []

        def right_key() -> None:
            after.append(observing.digest(store.backing))
            if store.mode.kind == "reference":
                modes.write_password(store, store.key)

        seen = observing.observe(of, store, right_key, ALL, check, key=secrets.token_hex(16))
        changed = "not a byte of the store was changed" if after == [before] else "the store was written to"
        return judge(seen), telling.sentence([telling.tell(seen), changed])


def not_mounted(of: Victim, name: str, check: Callable[[], None]) -> tuple[Word, str]:
    """Start nats-server on the bare mountpoint: applications create their streams there, and publish. Then mount."""
    if of.mode.kind not in ("mount", "reference"):
        return "not run", "There is no mount."
    with of.copied("late", name) as store:
        server = victim.server_of(store, of.program)
        try:
            server.start()
            with connected(server.port) as connection:
                refused = victim.create_streams(connection)
                reading = read(connection, of.wanted, check)
                where = victim.subject(victim.STREAM, 1).encode()
                connection.request(where.decode(), _ASTRAY)
            server.stop()
        finally:
            server.kill()
        run = observing.Run("", reading, [*server.complaints(), *refused])
        clear = any(_ASTRAY in data for _, data in observing.contents(store.directory))
        daemon, then = modes.Daemon(store), "the next mount hides it without a word"
        try:
            daemon.mount()
            daemon.unmount()
        except RefusedError as refusal:
            then = f'the next mount says "{telling.short(observing.reason(refusal.said, store))}"'
        finally:
            daemon.kill()
        for path in os.listdir(store.directory):
            shutil.rmtree(os.path.join(store.directory, path))
        again = observing.use(store, of, check)
        still = again.refused or count(compare(again.reading, of.late))
        now = compare(reading, of.late)
        seen = Seen(
            altered=now.altered,
            missing=now.missing,
            unanswered=now.unanswered,
            consumers=now.consumers,
            said=tuple(observing.said_of(run, of.noise)),
            back=not still,
            still=still,
        )
        first = "empty streams were served, and what was published" if seen.hurt else "what was published"
        where_to = "was stored in the clear" if clear else "was not stored in the clear"
        return judge(seen), telling.sentence([f"{first} {where_to}", then, telling.inner(telling.tell(seen))])
