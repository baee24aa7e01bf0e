"""Profile the daemon of a sealed mount: cProfile for its Python functions, perf for C, kernel and interpreter.

cProfile sees the main thread of the worker, and makes it slower: read shares in it, not seconds.
perf follows threads and children and costs little. Figures of a profiled run are not comparable with others.
"""

import os
import pstats
import shutil
import signal
import subprocess
from contextlib import contextmanager

from .meter import RunError, family

KINDS = ("cprofile", "perf")


class Profiler:
    """Writes one profile per mount into `directory`, as LABEL-N.cprofile or LABEL-N.perf."""

    def __init__(self, kind, directory, label):
        if kind == "perf" and not shutil.which("perf"):
            raise RunError("perf is not installed (apt-get install linux-perf)")
        self.kind, self.directory, self.label = kind, directory, label.replace(":", "-")
        self.paths = []

    def command(self, command):
        """Return the command that runs `command`, `python -m encfs_js ...`, so that it can be profiled."""
        path = os.path.join(self.directory, f"{self.label}-{len(self.paths) + 1}.{self.kind}")
        self.paths.append(path)
        if self.kind == "perf":
            return command
        os.environ["BENCH_PROFILE"] = os.path.abspath(path)
        return (command[0], os.path.join(os.path.dirname(__file__), "profiled.py"), *command[3:])

    @contextmanager
    def watching(self, pid):
        """Record a daemon as long as the block runs; perf ends by itself when the daemon has ended."""
        if self.kind != "perf":
            yield
            return
        pids = ",".join(map(str, family(pid)))
        recorder = subprocess.Popen(
            ["perf", "record", "-q", "-g", "-F", "499", "-o", self.paths[-1], "-p", pids],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            yield
        finally:
            try:
                recorder.wait(2)
            except subprocess.TimeoutExpired:
                recorder.send_signal(signal.SIGINT)
                recorder.wait(60)

    def summarise(self):
        """Write a text file beside each profile and return their paths."""
        for path in self.paths:
            with open(path + ".txt", "w") as file:
                if self.kind == "perf":
                    command = ["perf", "report", "--stdio", "--no-children", "-g", "none", "-i", path]
                    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
                elif os.path.exists(path):
                    pstats.Stats(path, stream=file).sort_stats("tottime").print_stats(40)
        return [path + ".txt" for path in self.paths]
