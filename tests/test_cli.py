"""What people type and what they get: transcripts in tests/cli, run again and compared word for word.

A transcript is a shell session in an empty directory: `$ ` begins a command, which must work or say why not; what follows
is its stdout, its stderr with `! ` before each line, and `= N` when its exit code is not 0. Paths, times, process numbers and
store ids are replaced by names. ENCFS_JS_UPDATE=1 writes the transcripts anew; read the difference before you commit it.

Of every encfs-js command that stands alone and fails, the whole directory must be untouched afterwards: contents, modes
and times.
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import mounts
import pytest

from encfs_js import cli

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent / "cli"
NAMES = sorted(path.stem for path in HERE.glob("*.txt"))
ALONE = re.compile(r"(\w+=\S* )*encfs-js [^;&|]*")
UPDATE = os.environ.get("ENCFS_JS_UPDATE") == "1"
on_a_mount = [
    pytest.mark.mount,
    pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-"),
]


def environment() -> dict[str, str]:
    env = mounts.environment(None)
    env["PATH"] = os.path.dirname(sys.executable) + os.pathsep + env["PATH"]
    env["COLUMNS"] = "100"
    env["LC_ALL"] = "C.UTF-8"
    return env


def normal(text: str, top: Path) -> str:
    """Replace what differs from run to run by names."""
    text = text.replace(str(top), "/DIR")
    text = re.sub(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)", "TIME", text)
    text = re.sub(r"\b[0-9a-f]{32}\b", "STORE-ID", text)
    text = re.sub(r"(\bpid |\bprocess |\"pid\": )\d+", r"\1PID", text)
    return re.sub(r"\"host\": \"[^\"]*\"", '"host": "HOST"', text)


def untouched(top: Path) -> dict[str, object]:
    """Everything below `top` that is not in a mount: what it is, what is in it, when it was changed."""
    mounted = {entry.mountpoint for entry in mounts.mount_entries()}
    found: dict[str, object] = {}

    def look(directory: str) -> None:
        for entry in os.scandir(directory):
            if entry.path in mounted:
                continue
            info = entry.stat(follow_symlinks=False)
            content = Path(entry.path).read_bytes() if entry.is_file(follow_symlinks=False) else b""
            found[entry.path] = (info.st_mode, info.st_size, info.st_mtime_ns, info.st_ctime_ns, content)
            if entry.is_dir(follow_symlinks=False):
                look(entry.path)

    look(str(top))
    return found


@contextlib.contextmanager
def cleared(top: Path) -> Iterator[None]:
    """Whatever happens in the block: nothing below `top` is mounted or served afterwards."""
    try:
        yield
    finally:
        for entry in mounts.mount_entries():
            if entry.mountpoint.startswith(f"{top}/"):
                mounts.abort(entry)
                mounts.detach(Path(entry.mountpoint))


def run(command: str, top: Path) -> list[str]:
    """Run one command of a transcript; return its lines."""
    before = untouched(top)
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=top,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=mounts.PATIENCE,
    )
    lines = [f"$ {command}"]
    lines += normal(done.stdout, top).splitlines()
    lines += [f"! {line}" for line in normal(done.stderr, top).splitlines()]
    if done.returncode:
        lines.append(f"= {done.returncode}")
        if ALONE.fullmatch(command):
            assert untouched(top) == before, f"{command}: failed, and left something changed"
    return lines


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name.startswith("init") else on_a_mount) for name in NAMES]
)
def test_transcript(name: str, tmp_path: Path) -> None:
    path = HERE / f"{name}.txt"
    wanted = path.read_text(encoding="utf-8").splitlines()
    found: list[str] = []
    with cleared(tmp_path):
        for line in wanted:
            if line.startswith("$ "):
                found += run(line.removeprefix("$ "), tmp_path)
            elif not line or line.startswith("# "):
                found.append(line)
    if UPDATE:
        path.write_text("\n".join(found) + "\n", encoding="utf-8")
    assert found == wanted
