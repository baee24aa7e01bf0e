"""The command reencrypt: a new epoch, another cipher, and the files that are there already."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import click

from encfs_js import control, inspect, keyring, keystore, steps, world
from encfs_js import state as room
from encfs_js.backing import META, Backing
from encfs_js.cli_key import ORDER, Source, SuiteType, key_options
from encfs_js.cli_progress import display
from encfs_js.cli_text import plural, size
from encfs_js.errors import ConfigError, ReencryptError
from encfs_js.format import check_available
from encfs_js.reencrypt import Progress
from encfs_js.reencrypt import reencrypt as all_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.format import Suite
    from encfs_js.keyring import Keys

_PATIENCE: Final = 120.0  # seconds that the daemon may take to answer
_POLL: Final = 0.2
_AGAIN: Final = 20  # times that a daemon whose worker has just died is asked


@click.command(epilog=ORDER)
@click.argument("store", required=False)
@click.option("--new-epoch", is_flag=True, help="Make a new volume key first, for new files and for these.")
@click.option("--cipher", type=SuiteType(), metavar="CIPHER", help="Seal with chachapoly or aes from now on.")
@click.option(
    "--rate", type=click.FloatRange(min=0, min_open=True), metavar="MIB", help="At most so many MiB a second."
)
@click.option("--drop-epochs", is_flag=True, help="At the end take volume keys that no file needs out of the keyring.")
@click.option("--stop", is_flag=True, help="Stop the pass that the daemon of a mounted STORE is at.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@key_options
def reencrypt(
    *,
    source: Source,
    store: str | None,
    new_epoch: bool,
    cipher: Suite | None,
    rate: float | None,
    drop_epochs: bool,
    stop: bool,
    as_json: bool,
) -> None:
    """Seal every file of STORE anew that has not the epoch and cipher of new files.

    STORE may be mounted and in use: its daemon does it then, and goes on when this command is interrupted. What was done
    stays done; the command can be repeated at any time, also after a crash, and does the rest.
    """
    store = source.store(store)
    if stop:
        _ask(store, {"do": "stop"})
        return
    if cipher is not None:
        check_available(cipher)
    _, keys = source.unlock(store)
    check_available(cipher or keys.settings.cipher)
    mount = _mount_of(store)
    if mount is not None:
        _check_mount(mount, cipher)
    if new_epoch or (cipher is not None and cipher is not keys.settings.cipher):
        keys = _changed(store, keys, new_epoch=new_epoch, cipher=cipher)
    limit = None if rate is None else rate * (1 << 20)
    with display(as_json) as show:
        progress = _by_daemon(store, limit, show) if mount is not None else _alone(store, keys, limit, show)
    dropped: list[int] = []
    if progress["state"] == "done" and drop_epochs:
        dropped = _drop(store, keys)
        if dropped and mount is not None:
            _rekey(store)
    _report(store, progress, dropped, as_json=as_json)


# -- the keyring


def _changed(store: str, keys: Keys, *, new_epoch: bool, cipher: Suite | None) -> Keys:
    """Write what new files get into the keyring. Returns its keys."""

    def change(found: keyring.Keyring) -> bytes:
        current = keyring.renew(found, keys)
        if new_epoch:
            return keyring.add_epoch(found, current, cipher=cipher)
        return keyring.change_settings(found, current, cipher=cipher)

    return keyring.renew(keystore.update(store, change), keys)


def _drop(store: str, keys: Keys) -> list[int]:
    """Take out of the keyring what no file needs. Returns the epochs. Raises ReencryptError when that cannot be told."""
    io = Backing()
    fd = io.open(store, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        io.syncfs(fd)  # or a power cut could bring files of an old epoch back
    finally:
        io.close(fd)

    dropped: list[int] = []

    def change(found: keyring.Keyring) -> bytes | None:
        known = frozenset(e.epoch for e in found.epochs)
        survey = inspect.survey(io, store, known, plaintext=True)
        unfinished = [name for name in os.listdir(os.path.join(store, META)) if name.startswith("redo-")]
        if survey.unreadable or survey.foreign or unfinished:
            raise ReencryptError(
                f"{store}: which epochs are in use cannot be told, so none was dropped: there are files that cannot be read",
                hint=f"encfs-js inspect {store} names them. {META}/redo-* are files whose rewriting is not finished.",
            )
        dropped[:] = sorted(known - {epoch for _, epoch in survey.groups} - {found.settings.epoch})
        return keyring.drop_epochs(found, keyring.renew(found, keys), dropped) if dropped else None

    keystore.update(store, change)
    return dropped


# -- a mounted store


def _mount_of(store: str) -> dict[str, Any] | None:
    """Return what the daemon that has the store mounted says of itself; None when nobody has it."""
    holder = room.holder(store)
    if holder is None or not holder.get("mountpoint"):
        return None  # whoever else works on it is told apart when the lock is taken
    return _ask(store, {"do": "status"})


def _check_mount(mount: dict[str, Any], cipher: Suite | None) -> None:
    options = mount["options"]
    if options["read_only"]:
        raise ReencryptError(
            f"{options['store']} is mounted read-only",
            hint=f"encfs-js umount {options['mountpoint']}, and repeat the command.",
        )
    if cipher is not None and options["cipher"] not in {None, cipher.label}:
        raise ConfigError(
            f"{options['mountpoint']} is mounted with a cipher of its own, {options['cipher']}",
            hint=f"Change it in {options['config']}, then: encfs-js reload {options['mountpoint']}"
            if options["config"] and "cipher" not in options["given"]
            else "Mount it again without --cipher: the keyring then says which cipher new files get.",
        )


def _ask(store: str, message: dict[str, Any]) -> dict[str, Any]:
    try:
        answer = control.ask(store, message, _PATIENCE)
    except OSError as problem:
        raise ReencryptError(
            f"{store}: no daemon that has it mounted answers: {problem.strerror or problem}",
            hint="encfs-js status shows what is mounted. Run the command as root or as who mounted it.",
        ) from None
    return answer


def _rekey(store: str) -> None:
    """Have the daemon take the keyring as it is now."""
    for attempt in range(_AGAIN):
        answer = _ask(store, {"do": "rekey"})
        if answer["ok"]:
            return
        if "code" in answer or attempt == _AGAIN - 1:
            break
        time.sleep(_POLL)
    raise ReencryptError(
        f"{store}: the daemon did not take the new keys: {answer['how']}",
        hint="The keyring has them. Repeat the command without --new-epoch; the log of the mount says more.",
    )


def _by_daemon(store: str, rate: float | None, show: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Have the daemon do it, and watch."""
    _rekey(store)
    try:
        _ask(store, {"do": "reencrypt", "rate": rate})
        while True:
            time.sleep(_POLL)
            progress: dict[str, Any] | None = _ask(store, {"do": "status"})["reencrypt"]
            if progress is None:
                raise ReencryptError(
                    f"{store}: the daemon was started again meanwhile, and knows nothing of this",
                    hint="Repeat the command without --new-epoch: it does the rest.",
                )
            show(progress)
            if progress["state"] not in {"counting", "running"}:
                return progress
    except KeyboardInterrupt:
        print(f"encfs-js: the daemon goes on; to stop it: encfs-js reencrypt {store} --stop", file=sys.stderr)
        raise click.Abort from None


# -- one that is not mounted


def _alone(store: str, keys: Keys, rate: float | None, show: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Do it here. The store is locked meanwhile, and its state says that somebody is at work."""
    lock = room.lock(store, "", datetime.now(UTC).isoformat(timespec="seconds"))
    options = {"store": os.path.realpath(store), "read_only": False, "cipher": None, "writeback": False}
    progress = Progress()
    try:
        room.check_whole(store)
        # Before it was ours another may have made a new epoch, sealed all files anew, and dropped the one these keys know.
        found, _ = keystore.load(store)
        keys = keyring.renew(found, keys)
        opened = world.prepare(options, keys, Backing(), resumed=False)
        work = all_files(opened.files, progress)
        begun = shown = time.monotonic()
        interrupted: list[int] = []
        # Not in the middle of a copying, which would have to be finished when the store is opened again.
        before = signal.signal(signal.SIGINT, lambda number, _frame: interrupted.append(number))

        def look() -> None:
            nonlocal shown
            while opened.files.copying is None:
                if interrupted:
                    raise KeyboardInterrupt
                ahead = 0.0 if rate is None else begun + opened.files.moved / rate - time.monotonic()
                if ahead <= 0 or opened.files.frozen is not None:
                    break
                time.sleep(min(ahead, _POLL))
            if time.monotonic() - shown > _POLL:
                shown = time.monotonic()
                show(progress.as_json())

        try:
            steps.run(work, between=look)
        except KeyboardInterrupt:
            work.close()
            progress.state = "stopped"
        except OSError as problem:
            progress.state, progress.why = "failed", problem.strerror or str(problem)
        finally:
            signal.signal(signal.SIGINT, before)
        world.sync(opened)
        world.end_run(opened)
        opened.files.close_all()
    finally:
        os.close(lock)
    show(progress.as_json())
    return progress.as_json()


# -- for people and programs


def _report(store: str, progress: dict[str, Any], dropped: list[int], *, as_json: bool) -> None:
    state = progress["state"]
    if as_json:
        print(json.dumps({"store": store, "done": state == "done", **progress, "dropped_epochs": dropped}, indent=1))
    elif state == "done":
        count = f"{plural(progress['files'], 'file')}, {size(progress['bytes'])}" if progress["files"] else "nothing"
        print(f"{store}: sealed anew with {progress['cipher']}, epoch {progress['epoch']}: {count}")
        if dropped:
            print(f"Dropped from the keyring: {plural(len(dropped), 'epoch')} ({', '.join(map(str, dropped))})")
    if state == "done":
        return
    hint = f"Repeat the command: it does the rest. encfs-js inspect {store} shows what there is."
    if state == "stopped":
        raise ReencryptError(
            f"{store}: stopped, {progress['files_done']} of {progress['files']} files are done", hint=hint
        )
    if state == "failed":
        raise ReencryptError(f"{store}: sealing the files anew stopped: {progress['why']}", hint=f"Make room. {hint}")
    names = ", ".join(failed["file"] for failed in progress["failed"][:3])
    raise ReencryptError(
        f"{store}: {plural(progress['files_failed'], 'file')} could not be sealed anew: {names}",
        hint=f"encfs-js verify {store} says what is damaged. Restore it or give it up, and repeat the command.",
    )
