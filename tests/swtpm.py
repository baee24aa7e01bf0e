"""A TPM 2.0 in software (swtpm) on loopback ports of its own, and a hand on its power button."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING, Any

import mounts

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BINARY = shutil.which("swtpm") or ""
os.environ.setdefault("TSS2_LOG", "all+NONE")


def needs_swtpm() -> str:
    """Why there can be no TPM here, or an empty string."""
    if not BINARY:
        return "swtpm is missing: apt-get install swtpm"
    if importlib.util.find_spec("tpm2_pytss") is None:
        return "tpm2-pytss is missing: apt-get install libtss2-dev; pip install tpm2-pytss"
    return ""


class Swtpm:
    """A TPM with its state in a directory."""

    def __init__(self, state: Path) -> None:
        state.mkdir(exist_ok=True)
        self.state = state
        self.process: subprocess.Popen[bytes] | None = None
        if not any(self._start(two_ports()) for _ in range(20)):
            raise AssertionError(f"swtpm does not start: {self.log()}")

    def _start(self, port: int) -> bool:
        """Start swtpm; False when somebody else has taken its ports meanwhile."""
        self.port = port
        self.tcti = f"swtpm:host=127.0.0.1,port={port}"
        self.process = subprocess.Popen(
            [
                BINARY, "socket", "--tpm2", "--tpmstate", f"dir={self.state}",
                "--server", f"type=tcp,port={port},bindaddr=127.0.0.1",
                "--ctrl", f"type=tcp,port={port + 1},bindaddr=127.0.0.1",
                "--flags", "not-need-init,startup-clear", "--log", f"file={self.state}/log",
            ],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + mounts.PATIENCE
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                return False
            with contextlib.suppress(ConnectionRefusedError):
                for number in (port, port + 1):
                    socket.create_connection(("127.0.0.1", number)).close()
                return True
            time.sleep(0.005)
        raise AssertionError(f"swtpm does not listen: {self.log()}")

    def log(self) -> str:
        path = self.state / "log"
        return path.read_text() if path.exists() else "no log"

    def power_on(self) -> None:
        """Start it again, where its users look for it."""
        mounts.until(lambda: self._start(self.port), "swtpm starts again")

    def pull_the_plug(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(mounts.PATIENCE)

    def shut_down(self) -> None:
        """Tell the TPM that the power goes, as a kernel does, and then take it away."""
        with self.talk() as (lib, esys):
            esys.shutdown(lib.TPM2_SU.CLEAR)
        self.pull_the_plug()

    @contextlib.contextmanager
    def talk(self, locality: int = 0, *, tcti: str | None = None) -> Iterator[tuple[Any, Any]]:
        """Give the library and a connection of the test's own."""
        import tpm2_pytss as lib  # noqa: PLC0415

        name, _, where = (tcti or self.tcti).partition(":")
        with lib.TCTILdr(name, where) as bus:
            if locality:
                bus.set_locality(locality)
            with lib.ESAPI(bus) as esys:
                yield lib, esys

    def extend(self, pcr: int) -> None:
        """Change a PCR, as only a measured launch may: from locality 2."""
        with self.talk(2) as (lib, esys):
            digest = lib.TPMU_HA(sha256=b"\1" * 32)
            values = lib.TPML_DIGEST_VALUES([lib.TPMT_HA(hashAlg=lib.TPM2_ALG.SHA256, digest=digest)])
            esys.pcr_extend(lib.ESYS_TR(pcr), values)

    def lockout(self) -> tuple[int, int]:
        """Return how many wrong passwords the TPM has counted, and with how many it locks."""
        with self.talk() as (lib, esys):
            _, answer = esys.get_capability(lib.TPM2_CAP.TPM_PROPERTIES, lib.TPM2_PT.LOCKOUT_COUNTER, 2)
            counter, most = (int(item.value) for item in answer.data.tpmProperties)
            return counter, most

    def unlock(self) -> None:
        with self.talk() as (lib, esys):
            esys.dictionary_attack_lock_reset(lib.ESYS_TR.LOCKOUT)

    def set_owner_password(self, password: str) -> None:
        with self.talk() as (lib, esys):
            esys.hierarchy_change_auth(lib.ESYS_TR.OWNER, lib.TPM2B_AUTH(password))

    def contents(self) -> list[int]:
        """Return the handles of what is in the TPM and does not belong there for good: objects and sessions."""
        found = []
        with self.talk() as (lib, esys):
            for first in (0x02000000, 0x03000000, 0x80000000):
                _, answer = esys.get_capability(lib.TPM2_CAP.HANDLES, first, 99)
                found += [int(handle) for handle in answer.data.handles]
        return found


def two_ports() -> int:
    """Return the first of two free ports in a row: the library looks for the second behind the first."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port


@contextlib.contextmanager
def running(state: Path) -> Iterator[Swtpm]:
    """A TPM that is switched on for the block."""
    chip = Swtpm(state)
    try:
        yield chip
    finally:
        chip.pull_the_plug()
