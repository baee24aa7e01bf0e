"""Where a comparison runs: what the machine is, what is installed on it, and the file system below a directory."""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING

import cryptography
from cryptography.hazmat.backends.openssl.backend import backend

from encfs_js import mounts
from encfs_js.compare import modes, server
from encfs_js.compare.result import Machine

if TYPE_CHECKING:
    from collections.abc import Sequence

    from encfs_js.compare.modes import Mode


def look(directory: str, program: str, chosen: Sequence[Mode]) -> Machine:
    """Return what the report says of the machine. directory: for the stores; program: nats-server; chosen: the modes that run."""
    return Machine(
        cores=os.cpu_count() or 1,
        processor=_processor(),
        memory=memory(),
        kernel=platform.release(),
        file_system=file_system(directory),
        python=platform.python_version(),
        cryptography=cryptography.__version__,
        openssl=backend.openssl_version_text(),
        nats_server=server.version(program).rpartition("v")[2],
        references=[modes.version(mode) or mode.name for mode in chosen if mode.kind == "reference"],
        load_before=round(os.getloadavg()[0], 2),
    )


def memory() -> int:
    """Return the machine's memory in bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def file_system(directory: str) -> str:
    """Return type and source of the file system that holds a directory: "ext4 on /dev/vda"."""
    path = os.path.realpath(directory)
    holding = [e for e in mounts.mounts() if e.mountpoint == path or path.startswith(e.mountpoint.rstrip("/") + "/")]
    # Of several at one mountpoint the last one is in sight.
    found = max(enumerate(holding), key=lambda each: (len(each[1].mountpoint), each[0]), default=None)
    return f"{found[1].fs_type} on {found[1].source}" if found else "unknown"


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        named = [line.partition(":")[2].strip() for line in file if line.startswith(("model name", "Model"))]
    return named[0] if named else platform.machine()
