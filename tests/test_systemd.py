"""The units of systemd/ under the system's own systemd, with a real nats-server: order, failures, sandbox, shutdown.

One world is booted for most of the tests; each begins with both units stopped and the store as the last one left it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import threading
import time
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mounts
import nats_world
import pytest
import systemd_world

from encfs_js import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from systemd_world import World

UNITS = systemd_world.REPOSITORY / "systemd"
ENCFS = "encfs-js@orders.service"
NATS = "nats-server.service"
MOUNTPOINT = "/var/lib/nats/orders"
STORE = "/var/lib/encfs-js/orders"
KEY_FILE = "/etc/credstore/encfs-js.orders.key"
CONFIG = "/etc/encfs-js/orders.yaml"
WORK = "/srv/nats"
AS_NATS = ("setpriv", "--reuid=nats", "--regid=nats", "--clear-groups")
NATS_CONF = f"""
host: 127.0.0.1, port: -1, ports_file_dir: "{WORK}", server_name: world
jetstream {{ store_dir: "{MOUNTPOINT}", sync_interval: always, max_file: {nats_world.ROOM}, max_mem: 64MB }}
"""
why_not = systemd_world.needs_systemd() or mounts.needs_fuse() or nats_world.needs_server()
boots = [
    pytest.mark.root,
    pytest.mark.mount,
    pytest.mark.nats,
    pytest.mark.skipif(bool(why_not), reason=why_not or "-"),
]
analyzes = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing")


def marked(test: Callable[..., None]) -> Callable[..., None]:
    for mark in boots:
        test = mark(test)
    return test


@contextlib.contextmanager
def new_world(directory: Path) -> Iterator[World]:
    """A world in which everything of systemd/README.md was typed, and nothing is started."""
    work = directory / "nats"
    work.mkdir()
    work.chmod(0o777)
    (directory / "binary").touch()
    binds = {work: WORK, Path(nats_world.BINARY): "/opt/nats-server"}
    files = {"/etc/nats-server.conf": NATS_CONF, KEY_FILE: mounts.KEY + "\n"}
    with systemd_world.booted(directory, binds, files) as world:
        world.run("encfs-js", "systemd", "install", "orders")
        world.run("systemd-sysusers")
        world.run("systemctl", "daemon-reload")
        world.run("install", "-d", "-m", "555", MOUNTPOINT)
        world.run("chmod", "700", "/etc/credstore")
        world.run("encfs-js", "init", "--config", CONFIG, "--key-file", KEY_FILE)
        yield world


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    with new_world(tmp_path_factory.mktemp("systemd")) as world:
        yield world


@pytest.fixture
def world(booted: World) -> Iterator[World]:
    """The world with nothing started, and with what a test changes in it put back."""
    saved = {path: booted.path(path).read_text() for path in (KEY_FILE, CONFIG)}
    booted.run("journalctl", "--rotate", "--vacuum-time=1us")
    yield booted
    for path, text in saved.items():
        booted.write(path, text, 0o600 if path == KEY_FILE else 0o644)
    shutil.rmtree(booted.path(f"/run/systemd/system/{ENCFS}.d"), ignore_errors=True)
    booted.run("systemctl", "daemon-reload")
    booted.run("systemctl", "stop", NATS, ENCFS)
    booted.run("systemctl", "reset-failed")
    assert ours(booted) == []


# --- looking ----------------------------------------------------------------------------------------------------------


def ours(world: World) -> list[str]:
    """The mounts of encfs_js in the world, not touched."""
    lines = Path(f"/proc/{world.init}/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines if f" - {mounts.FSTYPE} " in line]


def status(world: World) -> dict[str, Any]:
    """What the supervisor answers."""
    code = (
        f"import json; from encfs_js import control; print(json.dumps(control.ask({STORE!r}, {{'do': 'status'}}, 30)))"
    )
    answer: dict[str, Any] = json.loads(world.run("/opt/encfs-js/bin/python", "-c", code).stdout)
    return answer


def pid_of(world: World, unit: str) -> int:
    return int(world.show(unit)["MainPID"])


def store(world: World) -> Path:
    return world.directory / "state" / "orders"


def is_clean(world: World) -> bool:
    return bool(json.loads((store(world) / ".encfs_js" / "state").read_text())["clean"])


class Nats:
    """The nats-server of the world, as nats_world talks to it."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.url = ""

    def start(self) -> None:
        self.world.run("systemctl", "start", NATS)
        self.await_port()

    def await_port(self) -> None:
        pid = pid_of(self.world, NATS)
        path = self.world.directory / "nats" / f"nats-server_{pid}.ports"

        def url() -> str:
            assert pid_of(self.world, NATS) == pid, self.world.log()
            with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
                return str(json.loads(path.read_text())["nats"][0])
            return ""

        self.url = mounts.until(url, "nats-server start")

    def log(self) -> str:
        return self.world.log()

    def read(self, stream: str) -> list[bytes]:
        return [message.payload for message in nats_world.read(self, stream)]  # type: ignore[arg-type]


def serving(world: World, stream: str = "", count: int = 50) -> tuple[Nats, list[bytes]]:
    """Start nats-server, and what it needs; with messages in a new stream."""
    nats = Nats(world)
    nats.start()
    payloads = []
    if stream:
        nats_world.add_stream(nats, stream, f"{stream}.>")  # type: ignore[arg-type]
        messages = nats_world.sample(stream, count)
        nats_world.publish(nats, messages)  # type: ignore[arg-type]
        payloads = [message.payload for message in messages]
    return nats, payloads


def priorities(world: World) -> dict[str, int]:
    """What encfs_js has said in the journal, with its priority."""
    entries = world.journal("-u", ENCFS, "_SYSTEMD_UNIT=" + ENCFS)
    return {entry["MESSAGE"]: int(entry["PRIORITY"]) for entry in entries}


def said(world: World, pattern: str) -> tuple[str, int]:
    """The one line in the journal that matches, and its priority."""
    found = [(text, number) for text, number in priorities(world).items() if re.search(pattern, text)]
    assert len(found) == 1, f"{pattern}: {found}\n{world.log()}"
    return found[0]


def drop_in(world: World, text: str) -> None:
    """Change the unit until the end of the test."""
    world.write(f"/run/systemd/system/{ENCFS}.d/test.conf", text)
    world.run("systemctl", "daemon-reload")


def restarted(world: World) -> None:
    """Wait until systemd has started the unit again by itself."""

    def done() -> bool:
        found = world.show(ENCFS)
        return (found["NRestarts"], found["ActiveState"]) == ("1", "active")

    mounts.until(done, "the restart of the unit")


def again(world: World, nats: Nats, before: int) -> None:
    """Wait until systemd has started nats-server again, and clients can connect."""
    mounts.until(lambda: pid_of(world, NATS) not in {0, before}, "the restart of nats-server")
    nats.await_port()


def check_order(world: World) -> None:
    """nats-server was started when the mount served, and not before."""
    encfs, nats = world.show(ENCFS), world.show(NATS)
    assert int(encfs["ActiveEnterTimestampMonotonic"]) <= int(nats["ExecMainStartTimestampMonotonic"])


def check_end(messages: list[str]) -> None:
    """nats-server was gone before the mount was touched, and nothing had to be forced."""
    wanted = (
        f"Stopped {NATS}",
        f"Stopping {ENCFS}",
        f"{ENCFS}: Deactivated successfully",
        f"Stopped {ENCFS}",
    )
    found = [next(x for x in wanted if text.startswith(x)) for text in messages if text.startswith(wanted)]
    assert found == list(wanted), messages


# --- without a world --------------------------------------------------------------------------------------------------


@analyzes
def test_exposure(tmp_path: Path) -> None:
    shutil.copy(UNITS / "encfs-js@.service", tmp_path / ENCFS)
    command = [
        "systemd-analyze",
        "security",
        "--offline=true",
        "--no-pager",
        "--threshold=10",
        tmp_path / ENCFS,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=mounts.PATIENCE)
    exposure = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert exposure, done.stderr
    print(exposure[0])
    assert float(exposure[1]) <= 1.0, done.stdout
    assert done.returncode == 0


@analyzes
def test_systemd_understands_every_line(tmp_path: Path) -> None:
    shutil.copy(UNITS / "encfs-js@.service", tmp_path)
    (tmp_path / "nats-server.service").write_text("[Service]\nExecStart=/bin/true\n")
    (tmp_path / "nats-server.service.d").mkdir()
    shutil.copy(UNITS / "nats-server.conf", tmp_path / "nats-server.service.d" / "encfs-js.conf")
    command = [
        "systemd-analyze",
        "verify",
        "--man=no",
        tmp_path / "nats-server.service",
        tmp_path / "encfs-js@.service",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=mounts.PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_exit_codes_that_prevent_a_restart_are_those_of_the_package() -> None:
    unit = (UNITS / "encfs-js@.service").read_text()
    listed = re.search(r"^RestartPreventExitStatus=(.*)$", unit, re.MULTILINE)
    assert listed
    mended = (  # by whoever is in the way, by time, or never by us
        errors.StoreBusyError, errors.MountFailedError, errors.StoreIoError, errors.WorkersFailedError,
        errors.TpmMissingError,
    )  # fmt: skip
    others = (  # of other commands than mount
        errors.StoreNotEmptyError, errors.StoreExistsError, errors.NotMountedError, errors.DamageFoundError,
        errors.MountBusyError, errors.GuardClosedError, errors.ReloadFailedError, errors.FormatError,
        errors.SlotError, errors.ReencryptError, errors.NatsServerError, errors.CompareError,
    )  # fmt: skip
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.EncfsError)]
    expected = {kind.exit_code for kind in kinds if kind not in {errors.EncfsError, *mended, *others}}
    assert {int(code) for code in listed[1].split()} == {2} | expected


def test_install_writes_what_is_not_there(tmp_path: Path) -> None:
    def install(*arguments: str) -> str:
        return mounts.run("systemd", "install", *arguments, "--root", tmp_path).stdout

    first = install("parts")
    assert first.count("written ") == 5
    assert "systemctl enable --now encfs-js@parts.service" in first
    unit = (tmp_path / "etc/systemd/system/encfs-js@.service").read_text()
    starts = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert len(starts) == 1
    assert starts[0].startswith("/")
    assert "/usr/bin/env" not in unit
    drop = (tmp_path / "etc/systemd/system/nats-server.service.d/encfs-js.conf").read_text()
    assert "Requires=encfs-js@parts.service\nAfter=encfs-js@parts.service\n" in drop
    assert "orders" not in drop
    config = tmp_path / "etc/encfs-js/parts.yaml"
    assert "store_dir: /var/lib/encfs-js/parts\n" in config.read_text()
    helper = tmp_path / "usr/sbin/mount.encfs_js"
    assert os.access(helper, os.X_OK)

    assert install("parts").count("unchanged ") == 5
    config.write_text("mine\n")
    helper.write_text("old\n")
    again = install("parts")
    assert f"kept      {config}\n" in again
    assert f"replaced  {helper}\n" in again
    assert config.read_text() == "mine\n"
    for name in ("../x", "a b", "", "%i"):
        assert "not a name" in mounts.run("systemd", "install", name, "--root", tmp_path, code=10).stderr


def test_the_readme_and_the_command_say_the_same(tmp_path: Path) -> None:
    text = (UNITS / "README.md").read_text()
    said = mounts.run("systemd", "install", "orders", "--root", tmp_path).stdout.partition("Next:\n")[2]
    commands = [line.partition("   #")[0].strip() for line in said.splitlines()]
    assert len(commands) == 8
    for command in commands:
        assert f"    {command}\n" in text, command
    for name in os.listdir(UNITS):
        assert name == "README.md" or f"| `{name}` |" in text, name


def test_a_wheel_has_the_units() -> None:
    project = tomllib.loads((systemd_world.REPOSITORY / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"] == {"systemd": "encfs_js/systemd"}


def test_a_step_says_what_it_needs(tmp_path: Path) -> None:
    config = tmp_path / "x.yaml"
    config.write_text(f"jetstream: {{store_dir: {tmp_path}/s}}\nmountpoint: {tmp_path}/m\n")
    assert "no service manager" in mounts.run("systemd", "step", "mount", config, code=20).stderr
    config.write_text("mountpoint: /mnt\n")
    assert "no store_dir" in mounts.run("systemd", "step", "unmount", config, code=10).stderr


@pytest.mark.parametrize(
    ("options", "arguments"),
    [
        ((), []),
        (("-o", "rw"), []),
        (("-o", "rw,nofail,x-systemd.device-timeout=9,_netdev,noauto,nosuid,nodev"), []),
        (("-n", "-s", "-v", "-t", "encfs_js", "-o", "ro"), ["--read-only"]),
        (("-o", "key_file=/a b*c,log_file=/l"), ["--key-file", "/a b*c", "--log-file", "/l"]),
        (("-o", "ro", "-o", "cipher=aes"), ["--read-only", "--cipher", "aes"]),
        (("-o", "config=/c,credential=n,owner=nats:nats"), ["--config", "/c", "--credential", "n", "--owner", "nats:nats"]),
        (("-o", "allow_other,writeback"), ["--allow-other", "--writeback"]),
        (("-o", "noallow_other,nowriteback"), ["--no-allow-other", "--no-writeback"]),
        (("-o", "key=secret"), None),
        (("-o", "exec"), None),
        (("-N", "/proc/1/ns/mnt"), None),
    ],
)  # fmt: skip
def test_mount_helper_translates_options(tmp_path: Path, options: tuple[str, ...], arguments: list[str] | None) -> None:
    command = tmp_path / "encfs-js"
    command.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    command.chmod(0o755)
    environ = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    helper = [UNITS / "mount.encfs_js", "/s t/store", "/m", *options]
    done = subprocess.run(helper, env=environ, capture_output=True, text=True, timeout=mounts.PATIENCE)
    if arguments is None:
        assert (done.returncode, done.stdout) == (1, "")
        assert "secret" not in done.stderr.replace("unknown option key=secret", "")
    else:
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines() == ["mount", "/s t/store", "/m", *arguments]


# --- the course of things ---------------------------------------------------------------------------------------------


@marked
def test_start_and_stop(world: World) -> None:
    """nats-server brings the mount with it, and the mount goes only after nats-server."""
    assert ours(world) == []
    nats, payloads = serving(world, "COURSE")
    check_order(world)
    found = world.show(ENCFS)
    assert (found["ActiveState"], found["NRestarts"]) == ("active", "0")
    assert re.fullmatch(rf"{MOUNTPOINT} is served by worker \d+, taken over 0 times", found["StatusText"])
    assert ours(world) == [MOUNTPOINT]
    assert found["NFileDescriptorStore"] == "0", "when the supervisor dies nobody else may hold the connection"
    assert not is_clean(world)

    world.run("systemctl", "stop", ENCFS)
    assert (world.show(ENCFS)["ActiveState"], world.show(NATS)["ActiveState"]) == ("inactive", "inactive")
    check_end([entry["MESSAGE"] for entry in world.journal("_PID=1")])
    assert ours(world) == []
    assert os.listdir(world.path(MOUNTPOINT)) == []
    assert is_clean(world)
    assert mounts.unsealed(store(world)) == []
    mounts.verify(store(world))

    nats.start()
    assert nats.read("COURSE") == payloads
    assert not [text for text in priorities(world) if "unclean" in text]


@marked
def test_restart_takes_nats_server_along(world: World) -> None:
    nats, payloads = serving(world, "RESTART")
    before = pid_of(world, NATS), pid_of(world, ENCFS)
    world.run("systemctl", "restart", ENCFS)
    again(world, nats, before[0])
    assert pid_of(world, ENCFS) not in {0, before[1]}
    check_order(world)
    assert nats.read("RESTART") == payloads


@marked
def test_reload_is_not_noticed(world: World) -> None:
    nats, payloads = serving(world, "RELOAD")
    before, server, daemon = status(world), pid_of(world, NATS), pid_of(world, ENCFS)
    with publishing(nats, "RELOAD", payloads):
        world.run("systemctl", "reload", ENCFS)
    after = status(world)
    assert after["worker"] not in {None, before["worker"]}
    assert (after["supervisor"], pid_of(world, NATS), pid_of(world, ENCFS)) == (daemon, server, daemon)
    assert nats.read("RELOAD") == payloads


def test_key_and_epoch_are_changed_by_root_and_the_daemon_goes_on(world: World) -> None:
    """The daemon is another user, in a sandbox: what root writes must be readable there, also after a restart."""
    nats, payloads = serving(world, "ROTATE")
    server, daemon = pid_of(world, NATS), pid_of(world, ENCFS)
    another = "/etc/credstore/encfs-js.orders.another"
    world.write(another, "another key\n", 0o600)
    with publishing(nats, "ROTATE", payloads):
        world.run("encfs-js", "key", "change", STORE, "--key-file", KEY_FILE, "--new-key-file", another)
        done = world.run(
            "encfs-js", "reencrypt", STORE, "--key-file", another, "--new-epoch", "--drop-epochs", "--json"
        )
        answer = json.loads(done.stdout)
        assert answer["done"]
        assert answer["dropped_epochs"] == [answer["epoch"] - 1]
    assert (pid_of(world, NATS), pid_of(world, ENCFS)) == (server, daemon)
    assert nats.read("ROTATE") == payloads
    owners = {name: os.stat(world.path(f"{STORE}/.encfs_js/{name}")).st_uid for name in ("keyring", "keyring.bak", "guard")
              if world.path(f"{STORE}/.encfs_js/{name}").exists()}  # fmt: skip
    assert set(owners.values()) == {os.stat(world.path(STORE)).st_uid}
    world.write(KEY_FILE, "another key\n", 0o600)
    world.run("systemctl", "restart", ENCFS)
    mounts.until(lambda: world.show(NATS)["ActiveState"] == "active", "nats-server after the restart")
    nats.await_port()
    assert nats.read("ROTATE") == payloads
    world.write(another, mounts.KEY + "\n", 0o600)
    world.run("encfs-js", "key", "change", STORE, "--key-file", KEY_FILE, "--new-key-file", another)


@contextlib.contextmanager
def publishing(nats: Nats, stream: str, payloads: list[bytes]) -> Iterator[None]:
    """Publish in the background while the block runs, and a little longer; every message has to be acked."""
    done = threading.Event()
    problem: list[BaseException] = []

    def publish() -> None:
        try:
            while not done.is_set():
                messages = nats_world.sample(stream, 40, tag=str(len(payloads)))
                nats_world.publish(nats, messages, window=8)  # type: ignore[arg-type]
                payloads.extend(message.payload for message in messages)
        except BaseException as exc:
            problem.append(exc)

    begun = len(payloads)
    thread = threading.Thread(target=publish)
    thread.start()
    try:
        mounts.until(lambda: len(payloads) > begun or problem, "the first messages")
        yield
        reached = len(payloads)
        mounts.until(lambda: len(payloads) > reached or problem, "messages after it")
    finally:
        done.set()
        thread.join()
    assert not problem, problem


# --- failures ---------------------------------------------------------------------------------------------------------


@marked
def test_worker_killed_under_load_is_not_noticed(world: World) -> None:
    nats, payloads = serving(world, "WORKER")
    server, daemon = pid_of(world, NATS), pid_of(world, ENCFS)
    with publishing(nats, "WORKER", payloads):
        for takeovers in range(1, 4):
            now = mounts.until(
                lambda: (s := status(world))["worker"] and s["standby"] and s, "a worker and its standby"
            )
            world.run("kill", "-KILL", str(now["worker"]))
            mounts.until(lambda n=takeovers: status(world)["takeovers"] == n, "the takeover")
    found = world.show(ENCFS)
    assert (found["ActiveState"], found["NRestarts"], found["MainPID"]) == ("active", "0", str(daemon))
    assert pid_of(world, NATS) == server
    assert found["StatusText"].endswith("taken over 3 times")
    assert nats.read("WORKER") == payloads
    lines = priorities(world)
    killed = {number for text, number in lines.items() if re.search(r"worker \d+ was killed by signal 9", text)}
    taken = {number for text, number in lines.items() if re.search(r"worker \d+ has taken over", text)}
    opened = {number for text, number in lines.items() if " opened, " in text}
    assert (killed, taken, opened) == ({3}, {4}, {6}), "priorities: error, warning, information"


@marked
def test_supervisor_killed(world: World) -> None:
    """systemd makes the mount anew, and starts nats-server anew when it serves."""
    nats, payloads = serving(world, "SUPERVISOR")
    before = pid_of(world, NATS)
    world.run("kill", "-KILL", str(pid_of(world, ENCFS)))
    restarted(world)
    again(world, nats, before)
    check_order(world)
    assert ours(world) == [MOUNTPOINT]
    assert nats.read("SUPERVISOR") == payloads
    assert said(world, "nobody served it any more")[1] == 4


@marked
def test_systemd_gives_up(world: World) -> None:
    """A daemon that dies again and again is not started for ever, and nats-server does not come back without it."""
    drop_in(world, "[Unit]\nStartLimitBurst=2\n")
    nats, _ = serving(world)
    before = pid_of(world, NATS)
    world.run("kill", "-KILL", str(pid_of(world, ENCFS)))
    restarted(world)
    again(world, nats, before)
    world.run("kill", "-KILL", str(pid_of(world, ENCFS)))
    mounts.until(lambda: world.show(ENCFS)["ActiveState"] == "failed", "the end of the attempts")
    mounts.until(lambda: world.show(NATS)["MainPID"] == "0", "the end of nats-server")
    assert not world.run("systemctl", "list-jobs", "--no-legend").stdout
    assert world.show(NATS)["ActiveState"] in {"inactive", "failed"}
    assert ours(world) == []
    assert os.listdir(world.path(MOUNTPOINT)) == []


@marked
def test_what_a_dead_daemon_left_is_taken_away_at_the_start(world: World) -> None:
    drop_in(world, "[Service]\nExecStopPost=\n")
    nats, payloads = serving(world, "LEFT")
    before = pid_of(world, NATS)
    world.run("kill", "-KILL", str(pid_of(world, ENCFS)))
    restarted(world)
    again(world, nats, before)
    assert ours(world) == [MOUNTPOINT]
    assert nats.read("LEFT") == payloads


@marked
def test_a_supervisor_that_is_told_to_end_loses_nothing(world: World) -> None:
    """A stop that comes while the unit reloads unmounts nothing: the daemon gets a SIGTERM, and cannot unmount either."""
    world.run("systemctl", "start", ENCFS)
    with staying(world):
        world.run("kill", "-TERM", str(pid_of(world, ENCFS)))
        restarted(world)
    check_what_stayed(world)
    assert said(world, "is still mounted, and cannot be unmounted from here")[1] == 4


@marked
def test_watchdog(world: World) -> None:
    drop_in(world, "[Service]\nWatchdogSec=1\n")
    nats, payloads = serving(world, "WATCHDOG")
    before = pid_of(world, NATS)
    time.sleep(1.5)
    assert world.show(ENCFS)["NRestarts"] == "0", "a daemon that lives feeds the watchdog"
    world.run("kill", "-STOP", str(pid_of(world, ENCFS)))
    assert nats.read("WATCHDOG") == payloads, "the worker serves all the same"
    restarted(world)
    again(world, nats, before)
    assert nats.read("WATCHDOG") == payloads
    assert [e for e in world.journal("-u", ENCFS, "_PID=1") if "Watchdog timeout" in e["MESSAGE"]]


def wrong_key(world: World) -> None:
    world.write(KEY_FILE, "another key\n", 0o600)


def empty_key(world: World) -> None:
    world.write(KEY_FILE, "", 0o600)


def no_key(world: World) -> None:
    world.path(KEY_FILE).unlink()


def no_config(world: World) -> None:
    world.path(CONFIG).unlink()


def broken_config(world: World) -> None:
    world.write(CONFIG, world.path(CONFIG).read_text() + "colour: green\n")


def no_owner(world: World) -> None:
    world.write(CONFIG, world.path(CONFIG).read_text().replace("owner: nats", "owner: stan"))


def no_store(world: World) -> None:
    world.write(CONFIG, world.path(CONFIG).read_text().replace(f"store_dir: {STORE}", "store_dir: /var/lib/encfs-js"))


def no_mountpoint(world: World) -> None:
    world.write(CONFIG, world.path(CONFIG).read_text().replace(MOUNTPOINT, f"{MOUNTPOINT}/none"))


@marked
@pytest.mark.parametrize(
    ("spoil", "kind", "text"),
    [
        (wrong_key, errors.WrongKeyError, "Error decrypting our keyring"),
        (empty_key, errors.KeyMissingError, "credential key is empty"),
        (no_key, errors.KeyMissingError, "credential key: No such file"),
        (no_config, errors.ConfigError, "orders.yaml: No such file"),
        (broken_config, errors.ConfigError, "colour: unknown"),
        (no_owner, errors.ConfigError, "owner stan: there is no such user"),
        (no_store, errors.NotAStoreError, "/var/lib/encfs-js"),
        (no_mountpoint, errors.MountpointError, "none: no such directory"),
    ],
)
def test_what_no_restart_mends_is_not_tried_again(
    world: World, spoil: Callable[[World], None], kind: type[errors.EncfsError], text: str
) -> None:
    """The unit fails with the error's own exit status, once, and nats-server does not start on the bare directory."""
    spoil(world)
    before = mounts.snapshot(store(world))
    assert "dependency" in world.run("systemctl", "start", NATS, code=1).stderr
    found, server = world.show(ENCFS), world.show(NATS)
    assert (found["ActiveState"], found["Result"]) == ("failed", "exit-code"), world.log()
    assert (found["ExecMainStatus"], found["NRestarts"]) == (str(kind.exit_code), "0"), world.log()
    assert server["ActiveState"] == "inactive"
    assert f"Starting {NATS}" not in world.log()
    assert ours(world) == []
    assert os.listdir(world.path(MOUNTPOINT)) == []
    assert said(world, f"encfs-js: error: .*{text}")[1] == 3
    assert mounts.snapshot(store(world)) == before


@marked
def test_read_only(world: World) -> None:
    before = mounts.snapshot(store(world))
    world.write(CONFIG, world.path(CONFIG).read_text() + "read_only: true\n")
    world.run("systemctl", "start", ENCFS)
    assert "Read-only file system" in world.run("mkdir", f"{MOUNTPOINT}/new", code=1).stderr
    assert re.search(rf" {MOUNTPOINT} ro,", Path(f"/proc/{world.init}/mountinfo").read_text())
    world.run("systemctl", "stop", ENCFS)
    after = mounts.snapshot(store(world))
    for name in (".encfs_js", ".encfs_js/lock"):
        before.pop(name), after.pop(name)
    assert after == before


@marked
def test_a_mount_that_somebody_else_made_is_left_alone(world: World) -> None:
    world.run("encfs-js", "mount", STORE, MOUNTPOINT, "--key-file", KEY_FILE)
    try:
        world.run("systemctl", "start", ENCFS, code=1)
        assert world.show(ENCFS)["ExecMainStatus"] == str(errors.MountpointError.exit_code)
        assert ours(world) == [MOUNTPOINT]
        assert '"serving": true' in world.run("encfs-js", "status", "--json", MOUNTPOINT).stdout
    finally:
        world.run("encfs-js", "umount", MOUNTPOINT)
        world.run("chown", "-R", "encfs-js:encfs-js", STORE)


@marked
def test_stop_of_a_busy_mount(world: World) -> None:
    """Somebody stays in the mount: what was written reaches the store, the stop does not wait, and the store is clean."""
    world.run("systemctl", "start", ENCFS)
    with staying(world) as inside:
        world.run("systemctl", "stop", ENCFS)
        assert world.show(ENCFS)["ActiveState"] == "inactive", world.log()
        assert inside.wait(mounts.PATIENCE) == 7, "what it does next fails"
    assert ours(world) == []
    assert is_clean(world)
    text, priority = said(world, "is in use by")
    assert priority == 4
    assert re.search(r"python \(pid \d+\)", text)
    mounts.verify(store(world))
    world.run("systemctl", "start", ENCFS)
    check_what_stayed(world)
    assert not [line for line, number in priorities(world).items() if number < 4]


STAYING = f"""
import os, time
os.chdir({MOUNTPOINT!r})
fd = os.open("unsynced", os.O_CREAT | os.O_WRONLY)
os.write(fd, b"x" * 9999)
try:
    while True:
        os.mkdir("there")
        time.sleep(0.05)
        os.rmdir("there")
except OSError:
    os._exit(7)
"""


@contextlib.contextmanager
def staying(world: World) -> Iterator[subprocess.Popen[bytes]]:
    """Somebody who has written a file in the mount, keeps it open, and goes on doing other things. 7 when they fail."""
    inside = subprocess.Popen(world.enter(*AS_NATS, f"{systemd_world.PREFIX}/bin/python", "-c", STAYING))
    try:
        mounts.until((store(world) / "there").exists, "somebody in the mount")
        assert (store(world) / "unsynced").stat().st_size == 0, "only the kernel has it"
        yield inside
    finally:
        inside.kill()
        inside.wait()


def check_what_stayed(world: World) -> None:
    assert world.run("cat", f"{MOUNTPOINT}/unsynced").stdout == "x" * 9999
    world.run("sh", "-c", f"cd {MOUNTPOINT} && rm unsynced && if [ -d there ]; then rmdir there; fi")


# --- the sandbox ------------------------------------------------------------------------------------------------------


@marked
def test_sandbox(world: World) -> None:
    """No capability, its own user, a mount namespace without /dev/fuse: of supervisor, worker, standby and advisor alike."""
    world.run("systemctl", "start", ENCFS)
    mounts.until(lambda: status(world)["standby"], "the standby")
    uid = world.run("id", "-u", "encfs-js").stdout.strip()
    mounts.until(lambda: len(world.processes(ENCFS)) == 4, "supervisor, worker, standby and advisor")
    processes = world.processes(ENCFS)
    for pid in processes:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        facts = {name: value.split() for name, _, value in (line.partition(":") for line in lines)}
        assert facts["Uid"] == [uid] * 4
        for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(facts[name][0], 16) == 0, f"{name}: {facts[name]}"
        assert facts["NoNewPrivs"] == ["1"]
        assert facts["Seccomp"] == ["2"]
        root = Path(f"/proc/{pid}/root")
        assert not (root / "dev/fuse").exists()
        assert not os.listdir(root / "root")
        for space in ("mnt", "net", "ipc", "user"):
            assert os.readlink(f"/proc/{pid}/ns/{space}") != os.readlink(f"/proc/{world.init}/ns/{space}"), space
        limits = Path(f"/proc/{pid}/limits").read_text()
        assert re.search(r"Max core file size +0 +0", limits)
        with pytest.raises(OSError, match="Read-only"):
            (root / "var/lib/nats" / "x").touch()
        assert mounts.KEY.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        assert mounts.KEY.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()


@marked
def test_nats_user_gets_the_mount_and_nothing_else(world: World) -> None:
    world.run("systemctl", "start", ENCFS)
    now = status(world)

    def nats(*command: str, code: int | None = 0) -> str:
        done = world.run(*AS_NATS, *command, code=code)
        return done.stdout + done.stderr

    nats(
        "sh",
        "-c",
        f"cd {MOUNTPOINT} && umask 027 && mkdir d && echo x >d/f && chown nats:nats d/f && mv d/f d/g && cat d/g",
    )
    assert world.run("stat", "-c", "%U:%G %a", f"{MOUNTPOINT}/d/g").stdout == "nats:nats 640\n"
    assert world.run("stat", "-c", "%U:%G %a", f"{STORE}/d/g").stdout == "encfs-js:encfs-js 640\n"
    assert world.run("stat", "-c", "%U:%G %a", MOUNTPOINT).stdout == "nats:nats 700\n"
    nats("rm", "-r", f"{MOUNTPOINT}/d")
    denied = "Permission denied|Operation not permitted"
    for command in (
        ("cat", f"/run/credentials/{ENCFS}/key"),
        ("ls", STORE),
        ("cat", KEY_FILE),
        ("kill", str(now["supervisor"])),
        ("kill", str(now["worker"])),
        ("ls", f"/proc/{now['worker']}/fd"),
        ("chown", "root", MOUNTPOINT),
    ):
        assert re.search(denied, nats(*command, code=None)), command
    stranger = world.run("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", "ls", MOUNTPOINT, code=2)
    assert re.search(denied, stranger.stderr)
    assert status(world)["worker"] == now["worker"]


@marked
def test_an_encrypted_credential(world: World) -> None:
    """As systemd/README.md has it: the key on the disk is sealed to the machine."""
    if world.run("systemd-creds", "--version", code=None).returncode:
        pytest.skip("systemd-creds is missing: install systemd")
    world.run("install", "-d", "-m", "700", "/etc/credstore.encrypted")
    sealed = KEY_FILE.replace("credstore", "credstore.encrypted")
    world.run("systemd-creds", "encrypt", "--with-key=host", "--name=key", KEY_FILE, sealed)
    world.path(KEY_FILE).unlink()
    drop_in(world, "[Service]\nLoadCredential=\nLoadCredentialEncrypted=key:encfs-js.%i.key\n")
    world.run("systemctl", "start", ENCFS)
    assert status(world)["ok"]
    world.path(sealed).unlink()


@marked
def test_an_installation_that_the_daemon_could_not_reach(world: World) -> None:
    world.run("cp", "-a", "/opt/encfs-js", "/root/own")
    unit = world.path("/etc/systemd/system/encfs-js@.service").read_text()
    world.path("/root").chmod(0o755)
    done = world.run("/root/own/bin/python", "-m", "encfs_js", "systemd", "install", code=errors.ConfigError.exit_code)
    assert "/root is hidden by the unit's sandbox" in done.stderr
    assert world.path("/etc/systemd/system/encfs-js@.service").read_text() == unit
    world.run("rm", "-r", "/root/own")


# --- without the unit -------------------------------------------------------------------------------------------------


@marked
def test_fstab(world: World) -> None:
    """mount(8) and systemd find mount.encfs_js, and a unit can require such a mount as any other."""
    where, unit = "/var/lib/nats/fstab", "var-lib-nats-fstab.mount"
    world.run("install", "-d", "-m", "555", where)
    world.run("encfs-js", "init", "/var/lib/encfs-js/fstab", "--key-file", KEY_FILE)
    world.write("/etc/fstab", f"/var/lib/encfs-js/fstab {where} encfs_js key_file={KEY_FILE},nofail,cipher=aes 0 0\n")
    try:
        user = f"[Unit]\nRequiresMountsFor={where}\n[Service]\nType=oneshot\nExecStart=/bin/sh -c 'echo hello >{where}/file'\n"
        world.write("/run/systemd/system/user.service", user)
        world.run("systemctl", "daemon-reload")
        world.run("systemctl", "start", "user.service")
        assert world.show(unit)["ActiveState"] == "active"
        world.run("systemctl", "stop", unit)
        assert ours(world) == []
        sealed = world.directory / "state" / "fstab"
        mounts.until(lambda: json.loads((sealed / ".encfs_js" / "state").read_text())["clean"], "the end of the daemon")
        assert mounts.suite_of(sealed / "file") == "aes"

        world.run("mount", where)
        assert world.run("cat", f"{where}/file").stdout == "hello\n"
        assert "/var/lib/encfs-js/fstab" in world.run("findmnt", "-n", "-t", mounts.FSTYPE, where).stdout
        world.run("umount", where)
        world.write("/etc/fstab", f"/var/lib/encfs-js/fstab {where} encfs_js key_file=/none,nofail 0 0\n")
        failed = world.run("mount", where, code=errors.KeyMissingError.exit_code)
        assert "key file /none: No such file" in failed.stderr
    finally:
        world.write("/etc/fstab", "")
        world.path("/run/systemd/system/user.service").unlink()
        world.run("umount", "-q", where, code=None)


# --- the end ----------------------------------------------------------------------------------------------------------


@marked
def test_shutdown(tmp_path: Path) -> None:
    """Everything running, and the machine is switched off: nats-server ends first, then the mount, and all is clean."""
    with new_world(tmp_path) as world:
        _, payloads = serving(world, "SHUTDOWN", 400)
        namespace = os.open(f"/proc/{world.init}/ns/mnt", os.O_RDONLY)
        world.run("systemctl", "--no-block", "exit", code=None)
        world.process.wait(mounts.PATIENCE)
        done = subprocess.run(
            ["nsenter", f"--mount=/proc/self/fd/{namespace}", "journalctl", "-D", "/run/log/journal", "-o", "json", "--all"],
            pass_fds=[namespace], capture_output=True, text=True, timeout=mounts.PATIENCE,
        )  # fmt: skip
        os.close(namespace)
        entries = [json.loads(line) for line in done.stdout.splitlines()]
        check_end([entry["MESSAGE"] for entry in entries if entry["_PID"] == "1"])
    assert is_clean(world)
    mounts.verify(store(world))
    mountpoint = tmp_path / "mnt"
    with (
        mounts.mounted(store(world), mountpoint),
        nats_world.serving(mountpoint, tmp_path / "work") as server,
    ):
        assert [message.payload for message in nats_world.read(server, "SHUTDOWN")] == payloads
