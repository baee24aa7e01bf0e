"""A worker: the process that serves the requests of a mount, for as long as it lives.

It is started by the supervisor, loads everything, and waits. Told to prepare, it opens the store; told to serve, it gets
/dev/fuse. The first worker of a mount begins a run of the store (state.py) and the last one ends it; those between go on
where a dead one has stopped.
"""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import mmap
import os
import resource
import socket
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import pyfuse3
import trio

from encfs_js import hygiene, journal, keymemory, logs, resend, revive, session, state, sweep, wire
from encfs_js.background import Background
from encfs_js.backing import Backing
from encfs_js.errors import EncfsError, MountFailedError, StoreIoError
from encfs_js.fs import Operations
from encfs_js.mounts import tune
from encfs_js.world import World, end_run, prepare, rekeyed, sync, use

if TYPE_CHECKING:
    from encfs_js.reserve import Reserve

log: Final = logging.getLogger("encfs_js")
_BEAT: Final = 0.5
_HOUSEKEEPING: Final = 5.0
# Each may wait for a disk (a sync, a cold read) while the others go on; each has a buffer of 1 MiB.
_TASKS: Final = 24


# -- serving


def serve(world: World, sock: socket.socket, memory: mmap.mmap, fuse: int, init: bytes, *, resumed: bool) -> None:
    """Serve the mount until it is unmounted.

    libfuse wants FUSE_INIT first, which the kernel sends once per mount: it gets a copy through a socket, and /dev/fuse in the
    place of that socket before it answers. The answer to a copy has a number that the kernel does not know, and is dropped.
    """
    notes = journal.Journal(memory)
    unheard: list[journal.Entry] = []
    if resumed:
        requests, forgotten = resend.unanswered(fuse)
        revive.mend(world.files, notes.changing())
        unheard = [noted for noted in notes.noted() if not any(noted.same_request(one) for one in requests)]
        notes.go_on(lambda noted: noted not in unheard and revive.done(world.tree, noted))
        for ino in forgotten:
            world.files.forget(ino)
    operations = Operations(
        world.tree, world.files, notes,
        writeback=world.options["writeback"], read_only=world.options["read_only"], owner=world.options.get("owner"),
    )  # fmt: skip
    kernel, libfuse = wire.pair()
    kernel.send(resend.copy_of_init(init) if resumed else init)
    place = libfuse.detach()

    def answering() -> None:
        os.dup2(fuse, place, inheritable=False)
        if resumed:
            resend.resend(place)
        wire.send(sock, {"is": "serving"})

    operations.answering = answering
    pyfuse3.init(operations, f"/dev/fd/{place}", set())
    if not session.answer_promptly(place, notes.strike):
        raise MountFailedError("this version of pyfuse3 is not known", hint="pip install 'pyfuse3>=3.5,<3.6'")
    try:
        trio.run(_main, world, sock, operations, unheard)
    except BaseException:
        log.critical("%s: the worker has failed", world.options["mountpoint"], exc_info=True)
        raise
    pyfuse3.close(unmount=False)
    operations.advice.end()
    wire.send(sock, {"is": "unmounted"})
    world.files.close_all()


async def _main(world: World, sock: socket.socket, operations: Operations, unheard: list[journal.Entry]) -> None:
    background = Background(world.files, operations.gate, lambda said: wire.send(sock, {"is": "progress", **said}))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_beat, sock)
        nursery.start_soon(_take_errands, world, sock, background, nursery)
        nursery.start_soon(_when_answered, operations, world.options["mountpoint"], unheard)
        if world.reserve is not None:
            nursery.start_soon(_keep_house, world, world.reserve)
        await pyfuse3.main(max_tasks=_TASKS)
        await background.end()
        nursery.cancel_scope.cancel()


async def _take_errands(world: World, sock: socket.socket, background: Background, nursery: trio.Nursery) -> None:
    """Do what commands ask the supervisor for, and the supervisor us."""
    while True:
        await trio.lowlevel.wait_readable(sock)
        packet = wire.receive(sock)
        if packet is None:
            return
        order, _ = packet
        if order["do"] == "rekey":
            _rekey(world, sock)
        elif order["do"] == "reencrypt":
            nursery.start_soon(background.run, order["rate"])
        elif order["do"] == "stop":
            background.stop()


def _rekey(world: World, sock: socket.socket) -> None:
    """Take the keys of the keyring as it is now: the supervisor first, so that the next worker has what this one uses."""
    try:
        keys = rekeyed(world)
        memory = keymemory.keep(keys)
    except EncfsError as exc:
        wire.send(sock, {"is": "rekeyed", "ok": False, "how": str(exc), **exc.as_json()})
        return
    except OSError as exc:
        wire.send(sock, {"is": "rekeyed", "ok": False, "how": f"the keyring cannot be read: {exc.strerror}"})
        return
    try:
        wire.send(sock, {"is": "rekeyed", "ok": True}, [memory])
    finally:
        os.close(memory)
    use(world, keys)


async def _beat(sock: socket.socket) -> None:
    """Tell the supervisor that the loop turns."""
    while True:
        with contextlib.suppress(BlockingIOError):  # it has not read the last ones yet
            sock.send(wire.BEAT, socket.MSG_DONTWAIT)
        await trio.sleep(_BEAT)


async def _when_answered(operations: Operations, mountpoint: str, unheard: list[journal.Entry]) -> None:
    """Do what the kernel understands once FUSE_INIT is answered: tune the mount, advise on it, and forget names.

    unheard: changes of names that were made, and that nobody waits for any more. The kernel may still believe what was before.
    """
    await operations.answered.wait()
    if (device := tune(mountpoint)) is not None:
        operations.advice.begin(mountpoint, device)
    for entry in unheard:
        for parent, name in ((entry.parent, entry.name), (entry.new_parent, entry.new_name)):
            if name:
                # In a thread: it waits for requests that are under way in that directory. What the kernel does not know it
                # need not forget.
                with contextlib.suppress(OSError):
                    await trio.to_thread.run_sync(pyfuse3.invalidate_entry, parent, name, abandon_on_cancel=True)


async def _keep_house(world: World, reserve: Reserve) -> None:
    """After an unclean stop look at every file it may have touched; then see to the reserve from time to time.

    What a disk refuses here is no reason to stop serving: it is said, and tried again.
    """
    files, run = world.files, world.run
    if run.windows:
        try:
            for _ in sweep.sweep(world.tree, files):
                await trio.lowlevel.checkpoint()
            if not files.not_swept:
                swept = replace(run, windows=())
                reserve.make_room_for(lambda: state.save(world.options["store"], world.keys, swept))
                files.swept = swept
                log.info("after the unclean stop: every file was looked at, %d were cut", files.trimmed)
        except OSError as exc:
            log.warning("the look at the files after the unclean stop is not finished: %s", exc.strerror)
    while True:
        await trio.sleep(_HOUSEKEEPING)
        try:
            files.refill()
        except OSError as exc:
            log.warning("the reserve: %s", exc.strerror)


# -- the process


def _obey(sock: socket.socket, fds: dict[str, int], options: dict[str, Any], io: Backing) -> None:
    """Do what the supervisor says, until the mount is gone."""
    memory = mmap.mmap(fds["journal"], journal.SIZE)
    gc.freeze()  # what was imported stays: the collector need not look at it time and again (4 % of a publish, by perf)
    wire.send(sock, {"is": "loaded"})
    world, resumed = None, False
    held: dict[int, int] = {}
    while (packet := wire.receive(sock)) is not None:
        order, passed = packet
        if order["do"] == "prepare":
            resumed = order["resumed"]
            problem = hygiene.lock_memory()
            keys = passed[0] if passed else fds["keys"]  # a supervisor from before reencrypt passes them at the start
            world = prepare(options, keymemory.take(keys), io, resumed=resumed)
            os.close(keys)
            if problem:
                hygiene.lock_buffer(world.file_keys.buffer.sealed)
                (log.debug if resumed else log.warning)("keys may reach the swap: memory cannot be locked: %s", problem)
            wire.send(sock, {"is": "prepared"})
        elif order["do"] == "hold":
            held |= zip(order["inos"], passed, strict=True)
        elif order["do"] == "abandon":
            assert world is not None
            end_run(world)
            return
        elif order["do"] == "serve":
            assert world is not None
            options["writeback"] = order["writeback"]
            world.files.writeback = order["writeback"]
            world.tree.hand_over = lambda ino, fd: wire.send(sock, {"is": "held", "ino": ino}, [fd])
            world.tree.let_go = lambda ino: wire.send(sock, {"is": "forgotten", "ino": ino})
            for ino, fd in held.items():
                world.files.inherit(ino, fd)
            serve(world, sock, memory, passed[0], bytes.fromhex(order["init"]), resumed=resumed)
            try:
                sync(world)
                end_run(world)
            except OSError as exc:
                raise StoreIoError(
                    f"{options['store']}: unmounted, but what was written last may not be on the disk: {exc.strerror}",
                    hint="look at the disk, then: encfs-js verify",
                ) from exc
            return


def main(io: Backing | None = None) -> None:
    """Run a worker. Last argument: the descriptors by name as JSON. io: the system calls, for tests."""
    hygiene.no_dumps()
    fds: dict[str, int] = json.loads(sys.argv[-1])
    for fd in fds.values():
        os.set_inheritable(fd, False)
    options = json.loads(os.pread(fds["options"], 1 << 20, 0))
    logs.configure(options["log_file"], foreground=options["foreground"])
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # one an open file
    threading.stack_size(1 << 19)  # all of it is locked in memory
    os.umask(0)  # modes are as callers give them
    sock = socket.socket(fileno=fds["socket"])
    try:
        _obey(sock, fds, options, io or Backing())
    except EncfsError as exc:
        wire.send(sock, {"is": "failed", **exc.as_json()})
        sys.exit(exc.exit_code)
    except OSError as exc:
        problem = MountFailedError(f"{options['store']}: {exc.strerror or exc}", hint="look at the log of the mount")
        wire.send(sock, {"is": "failed", **problem.as_json()})
        raise


if __name__ == "__main__":
    main()
