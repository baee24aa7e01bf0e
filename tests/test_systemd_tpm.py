"""The unit with the drop-in for a key in the TPM, under the system's own systemd: what opens, and what is tried only once.

The TPM is one in software on the host. What is typed is what `encfs-js systemd install --tpm` prints.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

import mounts
import nats_world
import pytest
import swtpm
import systemd_world
from test_systemd import (
    CONFIG,
    ENCFS,
    MOUNTPOINT,
    NATS,
    NATS_CONF,
    STORE,
    UNITS,
    WORK,
    analyzes,
    boots,
    drop_in,
    ours,
    pid_of,
    said,
    serving,
    status,
    store,
)

from encfs_js import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from swtpm import Swtpm
    from systemd_world import World

PASSWORDS = "/etc/encfs-js/orders.env"
KEYS_FILE = "/var/lib/encfs-js/orders.tpm"
DROP_IN = f"/etc/systemd/system/{ENCFS}.d/10-tpm.conf"
# The TPM of these tests is behind a loopback port, not a device.
REACH = "[Service]\nPrivateNetwork=no\nRestrictAddressFamilies=AF_INET\nIPAddressAllow=localhost\n"
why_not = swtpm.needs_swtpm()


def marked(test: Callable[..., None]) -> Callable[..., None]:
    for mark in (*boots, pytest.mark.skipif(bool(why_not), reason=why_not or "-")):
        test = mark(test)
    return test


@pytest.fixture(scope="module")
def chip(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swtpm]:
    with swtpm.running(tmp_path_factory.mktemp("chip") / "state") as chip:
        yield chip


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory, chip: Swtpm) -> Iterator[World]:
    """A world in which everything was typed that `install --tpm` says, but for the two last lines, which start it."""
    directory = tmp_path_factory.mktemp("systemd")
    work = directory / "nats"
    work.mkdir()
    work.chmod(0o777)
    binds = {work: WORK, Path(nats_world.BINARY): "/opt/nats-server"}
    with systemd_world.booted(directory, binds, {"/etc/nats-server.conf": NATS_CONF}) as world:
        said = world.run("encfs-js", "systemd", "install", "orders", "--tpm").stdout
        text = world.path(CONFIG).read_text()
        keys_file = f"    keys_file: {KEYS_FILE}\n"
        assert keys_file in text
        world.write(CONFIG, text.replace(keys_file, f"{keys_file}    tcti: {chip.tcti}\n"))
        *typed, enable, restart = [line.strip() for line in said.partition("Next:\n")[2].splitlines()]
        assert (enable.split()[1], restart.split()[1]) == ("enable", "restart")
        for line in typed:
            world.run("sh", "-e", "-c", line)
        yield world


@pytest.fixture
def world(booted: World, chip: Swtpm) -> Iterator[World]:
    """The world with nothing started, and with what a test changes in it put back."""
    saved = {path: booted.path(path).read_text() for path in (CONFIG, PASSWORDS)}
    booted.run("journalctl", "--rotate", "--vacuum-time=1us")
    booted.write(f"/run/systemd/system/{ENCFS}.d/reach.conf", REACH)
    booted.run("systemctl", "daemon-reload")
    chip.unlock()
    yield booted
    for path, text in saved.items():
        booted.write(path, text, 0o600 if path == PASSWORDS else 0o644)
    shutil.rmtree(booted.path(f"/run/systemd/system/{ENCFS}.d"), ignore_errors=True)
    booted.run("systemctl", "daemon-reload")
    booted.run("systemctl", "stop", NATS, ENCFS)
    booted.run("systemctl", "reset-failed")
    assert ours(booted) == []


# --- without a world --------------------------------------------------------------------------------------------------


def test_install_puts_the_drop_in_where_it_belongs(tmp_path: Path) -> None:
    def install(*arguments: str, code: int = 0) -> str:
        done = mounts.run("systemd", "install", *arguments, "--root", tmp_path, code=code)
        return done.stdout + done.stderr

    first = install("parts", "--tpm")
    assert first.count("written ") == 6
    drop = (tmp_path / "etc/systemd/system/encfs-js@parts.service.d/10-tpm.conf").read_text()
    assert "orders" not in drop
    starts = re.findall(r"^ExecStart=(.*)$", drop, re.MULTILINE)
    assert starts[0] == ""
    assert re.fullmatch(r"/\S+ mount --foreground --config /etc/encfs-js/%i\.yaml --tpm", starts[1])
    config = (tmp_path / "etc/encfs-js/parts.yaml").read_text()
    assert "\n  tpm:\n    keys_file: /var/lib/encfs-js/parts.tpm\n    encryption_password: $TPM_PASSWORD\n" in config
    assert "orders" not in first + config
    assert install("parts", "--tpm").count("unchanged ") == 6
    assert "  # tpm:\n" in install_config(tmp_path / "other")
    assert "--tpm needs the NAME" in install("--tpm", code=2)


def install_config(root: Path) -> str:
    """The configuration without --tpm."""
    mounts.run("systemd", "install", "parts", "--root", root)
    assert not (root / "etc/systemd/system/encfs-js@parts.service.d").exists()
    return (root / "etc/encfs-js/parts.yaml").read_text()


def test_the_readme_and_the_command_say_the_same(tmp_path: Path) -> None:
    text = (UNITS / "README.md").read_text()
    said = mounts.run("systemd", "install", "orders", "--tpm", "--root", tmp_path).stdout.partition("Next:\n")[2]
    commands = [line.partition("   #")[0].strip() for line in said.splitlines()]
    assert len(commands) == 9
    for command in commands:
        assert f"    {command}\n" in text, command


@analyzes
def test_systemd_understands_every_line(tmp_path: Path) -> None:
    shutil.copy(UNITS / "encfs-js@.service", tmp_path / ENCFS)
    (tmp_path / f"{ENCFS}.d").mkdir()
    shutil.copy(UNITS / "tpm.conf", tmp_path / f"{ENCFS}.d")
    command = ["systemd-analyze", "verify", "--man=no", tmp_path / ENCFS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=mounts.PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- with the TPM -----------------------------------------------------------------------------------------------------


@marked
def test_the_tpm_opens_the_store(world: World, chip: Swtpm) -> None:
    """nats-server works on it, the password is nowhere to be seen, and nothing of the sandbox was lost."""
    nats, payloads = serving(world, "TPM")
    assert world.show(ENCFS)["ExecMainStatus"] == "0"
    assert nats.read("TPM") == payloads
    assert mounts.unsealed(store(world)) == []
    slots = json.loads(world.run("encfs-js", "key", "list", "--json", STORE).stdout)["slots"]
    assert [slot["kind"] for slot in slots] == ["tpm", "recovery"]
    assert stat.S_IMODE(world.path(KEYS_FILE).stat().st_mode) == 0o600
    assert world.run("stat", "-c", "%U", KEYS_FILE).stdout == "encfs-js\n"

    mounts.until(lambda: status(world)["standby"], "the standby")
    secret = world.path(PASSWORDS).read_text().strip().partition("=")[2].encode()
    assert len(secret) > 40
    uid = world.run("id", "-u", "encfs-js").stdout.strip()
    mounts.until(lambda: len(world.processes(ENCFS)) == 4, "supervisor, worker, standby and advisor")
    for pid in world.processes(ENCFS):
        environ = Path(f"/proc/{pid}/environ").read_bytes()
        assert b"STATE_DIRECTORY=" in environ or not environ  # the advisor gets none
        assert secret not in environ
        assert b"TPM_PASSWORD" not in environ
        assert secret not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert b"tss2" not in Path(f"/proc/{pid}/maps").read_bytes(), "the library has gone with who asked the TPM"
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        facts = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        assert facts["Uid"] == [uid] * 4
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(facts[name][0], 16) == 0, f"{name}: {facts[name]}"
    assert secret.decode() not in world.log()
    assert (chip.contents(), chip.lockout()[0]) == ([], 0)

    before = status(world)["worker"]
    world.run("systemctl", "reload", ENCFS)
    assert status(world)["worker"] != before
    assert nats.read("TPM") == payloads
    world.run("systemctl", "stop", ENCFS)
    world.run("systemctl", "start", NATS)
    nats.await_port()
    assert nats.read("TPM") == payloads


def wrong_password(world: World) -> None:
    world.write(PASSWORDS, "TPM_PASSWORD=wrong\n", 0o600)


def no_password(world: World) -> None:
    world.path(PASSWORDS).unlink()


def another_pcr(world: World) -> None:
    world.write(CONFIG, world.path(CONFIG).read_text().replace("  tpm:\n", "  tpm:\n    pcr: 23\n"))


def a_srk_password(world: World) -> None:
    world.write(CONFIG, world.path(CONFIG).read_text().replace("  tpm:\n", "  tpm:\n    srk_password: x\n"))


def no_keys_file(world: World) -> None:
    world.write(CONFIG, world.path(CONFIG).read_text().replace("orders.tpm", "none.tpm"))


def a_keys_file_of_root(world: World) -> None:
    """The line with chown was forgotten."""
    world.run("cp", KEYS_FILE, "/var/lib/encfs-js/copy.tpm")
    world.write(CONFIG, world.path(CONFIG).read_text().replace("orders.tpm", "copy.tpm"))


@marked
@pytest.mark.parametrize(
    ("spoil", "kind", "text", "tries"),
    [
        (wrong_password, errors.TpmPasswordError, "the TPM refuses the encryption password", 1),
        (no_password, errors.ConfigError, "the environment variable TPM_PASSWORD is not set", 0),
        (another_pcr, errors.TpmPcrError, "sealed to PCR 22, not to PCR 23", 0),
        (a_srk_password, errors.TpmParentError, "it was sealed without an srk_password", 0),
        (no_keys_file, errors.TpmFileError, "none.tpm: there is no sealed key", 0),
        (a_keys_file_of_root, errors.TpmFileError, "copy.tpm: the sealed key cannot be read: Permission denied", 0),
    ],
)
def test_what_no_restart_mends_is_tried_once(
    world: World, chip: Swtpm, spoil: Callable[[World], None], kind: type[errors.EncfsError], text: str, tries: int
) -> None:
    spoil(world)
    before = mounts.snapshot(store(world))
    assert "dependency" in world.run("systemctl", "start", NATS, code=1).stderr
    found = world.show(ENCFS)
    assert (found["ActiveState"], found["Result"]) == ("failed", "exit-code"), world.log()
    assert (found["ExecMainStatus"], found["NRestarts"]) == (str(kind.exit_code), "0"), world.log()
    assert world.show(NATS)["ActiveState"] == "inactive"
    assert said(world, f"encfs-js: error: .*{text}")[1] == 3
    assert chip.lockout()[0] == tries
    assert chip.contents() == []
    assert ours(world) == []
    assert mounts.snapshot(store(world)) == before


@marked
def test_a_lockout_is_not_tried_again(world: World, chip: Swtpm) -> None:
    good = world.path(PASSWORDS).read_text()
    wrong_password(world)
    for _ in range(chip.lockout()[1]):
        world.run("systemctl", "start", ENCFS, code=1)
        world.run("systemctl", "reset-failed", ENCFS)
    world.write(PASSWORDS, good, 0o600)
    world.run("systemctl", "start", ENCFS, code=1)
    found = world.show(ENCFS)
    assert (found["ExecMainStatus"], found["NRestarts"]) == (str(errors.TpmLockedError.exit_code), "0"), world.log()
    chip.unlock()
    world.run("systemctl", "start", ENCFS)
    assert status(world)["ok"]


@marked
def test_a_tpm_that_answers_late(world: World, chip: Swtpm) -> None:
    """No TPM is no wrong password: the unit is started again, a few times."""
    chip.shut_down()
    try:
        world.run("systemctl", "start", "--no-block", ENCFS)
        mounts.until(lambda: world.show(ENCFS)["NRestarts"] != "0", "a restart of the unit")
    finally:
        chip.power_on()
    mounts.until(lambda: world.show(ENCFS)["ActiveState"] == "active", "the TPM's answer")
    assert ours(world) == [MOUNTPOINT]
    assert "no TPM at swtpm" in world.log()
    assert chip.lockout()[0] == 0


@marked
def test_a_tpm_that_never_answers(world: World, chip: Swtpm) -> None:
    chip.shut_down()
    try:
        world.run("systemctl", "start", "--no-block", ENCFS)
        mounts.until(lambda: world.show(ENCFS)["ActiveState"] == "failed", "the end of the restarts")
    finally:
        chip.power_on()
    found = world.show(ENCFS)
    assert found["ExecMainStatus"] == str(errors.TpmMissingError.exit_code)
    assert int(found["NRestarts"]) <= 5
    assert ours(world) == []


# --- the device -------------------------------------------------------------------------------------------------------


@marked
@pytest.mark.parametrize("case", ["no device", "as tpm.conf has it", "without the group", "without the cgroup's leave"])
def test_the_daemon_may_open_the_device_and_needs_what_the_drop_in_gives(world: World, case: str) -> None:
    """There is no driver for TPMs here: /dev/tpmrm0 is another node of /dev/null, which can be opened and never answers."""
    text = world.path(CONFIG).read_text()
    world.write(CONFIG, re.sub(r"    tcti: .*\n", "", text))
    device = "/dev/tpmrm0"
    if world.path(device).exists():
        pytest.skip("this machine has a TPM, which this test leaves alone")
    drop = world.path(DROP_IN).read_text()
    try:
        if case != "no device":
            made = world.run("mknod", "-m", "660", device, "c", "1", "3", code=None)
            if made.returncode:
                pytest.skip(f"no node can be made here: {made.stderr.strip()}")
            world.run("chgrp", "tss", device)
        if case == "without the group":
            world.write(DROP_IN, drop.replace("SupplementaryGroups=tss\n", ""))
        if case == "without the cgroup's leave":
            # Another node than one of those that DevicePolicy=closed always leaves open.
            world.path(device).unlink()
            world.run("mknod", "-m", "660", device, "c", "10", "224")
            world.run("chgrp", "tss", device)
            world.write(DROP_IN, drop.replace("DeviceAllow=/dev/tpmrm0 rw\n", ""))
        drop_in(world, "[Service]\nRestart=no\n")
        world.run("systemctl", "start", ENCFS, code=1)
        assert world.show(ENCFS)["ExecMainStatus"] == str(errors.TpmMissingError.exit_code), world.log()
        line = said(world, f"encfs-js: error: no TPM at device:{device}|the TPM does not do")[0]
    finally:
        world.write(DROP_IN, drop)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(world.path(device))
    wanted = {
        "no device": "No such file or directory$",
        "as tpm.conf has it": "tcti:|IO failure",
        "without the group": "Permission denied$",
        "without the cgroup's leave": "Operation not permitted$",
    }
    assert re.search(wanted[case], line), line


@marked
def test_a_recovery_code_opens_what_the_tpm_does_not(world: World, chip: Swtpm) -> None:
    """Another mainboard: the code from when the store was made mounts it."""
    code = world.run("sh", "-e", "-c", f"set -a; . {PASSWORDS}; encfs-js key add --config {CONFIG} --recovery").stdout
    found = re.search(r"\b(?:[0-9A-Z]{4,8}-){3,}[0-9A-Z]+\b", code)
    assert found, code
    wrong_password(world)
    world.write("/etc/credstore/encfs-js.orders.key", found[0] + "\n", 0o600)
    drop_in(
        world,
        "[Service]\nLoadCredential=key:encfs-js.%i.key\nExecStart=\n"
        "ExecStart=/usr/bin/env encfs-js mount --foreground --config /etc/encfs-js/%i.yaml --credential key\n",
    )
    world.run("systemctl", "start", ENCFS)
    assert status(world)["ok"]
    assert pid_of(world, ENCFS)
    assert chip.lockout()[0] == 0
