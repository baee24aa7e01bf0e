"""Profile a run: cProfile for the Python functions of a mount's worker, perf for everything on the machine.

cProfile sees the main thread of the worker, and makes it slower: read shares in it, not seconds. perf costs little. Figures of
a profiled run are not comparable with others.
"""

from __future__ import annotations

import os
import pstats
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from encfs_js.compare import processes

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = ("cprofile", "perf")
PROFILED = (sys.executable, os.path.join(os.path.dirname(os.path.abspath(__file__)), "profiled.py"))


def check(kind: str) -> None:
    if kind == "perf" and not shutil.which("perf"):
        raise processes.RunError("perf is not installed (apt-get install linux-perf)")


@contextmanager
def recording(path: str) -> Iterator[None]:
    """Have perf record the whole machine as long as the block runs."""
    command = ["perf", "record", "-q", "-a", "-g", "-F", "499", "-o", path]
    recorder = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        yield
    finally:
        recorder.send_signal(signal.SIGINT)
        recorder.wait(60)


def summarise(kind: str, path: str) -> str:
    """Write a text file beside a profile, and return its path."""
    with open(path + ".txt", "w") as file:
        if kind == "perf":
            command = [
                "perf",
                "report",
                "--stdio",
                "--no-children",
                "-g",
                "none",
                "--sort",
                "comm,dso,symbol",
                "-i",
                path,
            ]
            subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
        elif os.path.exists(path):
            pstats.Stats(path, stream=file).sort_stats("tottime").print_stats(40)
    return path + ".txt"
