"""Profile the daemon of a sealed mount: cProfile for its Python functions, perf for C, kernel and interpreter.

cProfile sees the main thread of the process that it starts, and makes it slower: read shares in it, not seconds.
perf follows threads and children and costs little. Figures of a profiled run are not comparable with others.
"""

import os
import pstats
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager

from .meter import RunError

KINDS = ("cprofile", "perf")


class Profiler:
    """Writes one profile per mount into `directory`, as LABEL-N.prof or LABEL-N.perf."""

    def __init__(self, kind, directory, label):
        if kind == "perf" and not shutil.which("perf"):
            raise RunError("perf is not installed (apt-get install linux-perf)")
        self.kind, self.directory, self.label = kind, directory, label.replace(":", "-")
        self.count = 0

    def command(self, command):
        """Return the command that runs `command`, a Python interpreter with `-m`, under the profiler."""
        self.count += 1
        self.path = os.path.join(
            self.directory, f"{self.label}-{self.count}.{'perf' if self.kind == 'perf' else 'prof'}"
        )
        if self.kind == "perf":
            return command
        return (command[0], "-m", "cProfile", "-o", self.path, *command[1:])

    @contextmanager
    def watching(self, pid):
        """Record as long as the block runs, then write a readable summary beside the profile."""
        if self.kind == "perf":
            recorder = subprocess.Popen(
                ["perf", "record", "-q", "-g", "-F", "499", "-o", self.path, "-p", str(pid)],
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
            try:
                yield
            finally:
                # perf ends by itself when the daemon has ended.
                if recorder.poll() is None:
                    time.sleep(0.2)
                    recorder.send_signal(signal.SIGINT)
                recorder.wait(60)
        else:
            yield

    def summarise(self):
        """Write TEXT files beside the profiles and return their paths."""
        written = []
        for name in sorted(os.listdir(self.directory)):
            path = os.path.join(self.directory, name)
            if not name.startswith(self.label) or name.endswith(".txt"):
                continue
            with open(path + ".txt", "w") as file:
                if self.kind == "perf":
                    command = ["perf", "report", "--stdio", "--no-children", "-g", "none", "-i", path]
                    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file)
                else:
                    pstats.Stats(path, stream=file).sort_stats("tottime").print_stats(40)
            written.append(path + ".txt")
        return written
