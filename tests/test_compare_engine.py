"""The engine of `encfs-js compare`: its arithmetic, its cluster, the load generator's ceiling, and what can go wrong."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mounts
import msgspec
import pytest
from compare_sample import full

from encfs_js import cli, cli_compare
from encfs_js.compare import (
    attacks,
    ceiling,
    client,
    cluster,
    figures,
    interrupt,
    loads,
    machine,
    modes,
    processes,
    report,
    result,
    rounds,
    runs,
    server,
)
from encfs_js.compare.modes import MODES, PLAIN, Mode
from encfs_js.compare.processes import RunError
from encfs_js.compare.result import Failure, Result
from encfs_js.errors import CompareError, NatsServerError, StoreIoError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from encfs_js.compare.loads import Run

BY_NAME = {mode.name: mode for mode in MODES}
MOUNT = BY_NAME["mount aes"]
on_a_mount = [
    pytest.mark.mount,
    pytest.mark.nats,
    pytest.mark.skipif(bool(modes.missing(MOUNT)), reason=modes.missing(MOUNT) or "-"),
]
TINY = loads.Size(
    small=2_000, usual=2_000, page=300, large=30, one=30, always=30, puts=150, gets=30, purged=40_000, replicated=600
)  # fmt: skip


# --- arithmetic -------------------------------------------------------------------------------------------------------


def test_each_round_begins_with_another_mode() -> None:
    first = [runs.rotated(MODES, number)[0] for number in range(1, len(MODES) + 1)]
    assert first == list(MODES)
    assert runs.rotated(MODES, len(MODES) + 1) == list(MODES)
    for number in range(1, 10):
        order = runs.rotated(MODES, number)
        assert sorted(mode.name for mode in order) == sorted(BY_NAME)
        neighbours = {(a.name, b.name) for a, b in itertools.pairwise(order)}
        all_round = {(a.name, b.name) for a, b in zip(MODES, [*MODES[1:], MODES[0]], strict=True)}
        assert neighbours < all_round, "the order itself stays"
    assert runs.rotated([], 3) == []


def test_modes_take_turns_within_a_scenario_and_plain_runs_in_every_round() -> None:
    planned = list(runs.order(MODES, 5))
    at = [(number, scenario) for number, scenario, _ in planned]
    assert at == sorted(at, key=lambda each: (each[0], list(runs.SCENARIOS).index(each[1])))
    for scenario in runs.SCENARIOS:
        count = runs.FEWER if scenario == "cluster" else 5
        assert [n for n, s, mode in planned if s == scenario and mode is PLAIN] == list(range(1, count + 1))
        references = [n for n, s, mode in planned if s == scenario and mode.name == "securefs"]
        assert references == list(range(1, runs.FEWER + 1))
    assert len(set(planned)) == len(planned)
    assert len(list(runs.order(MODES, 1))) == len(runs.SCENARIOS) * len(MODES)


def test_every_work_has_its_place() -> None:
    listed = figures.works(loads.QUICK, cold=True, ceilings={})
    names = [work.name for work in listed]
    assert names == [work for works in figures.SCENARIOS.values() for work in works]
    assert list(figures.SCENARIOS) == list(runs.SCENARIOS)
    known = {measure.name for measure in figures.MEASURES}
    for work in listed:
        wanted = figures.expected(work.name, daemon=True, disk=True)
        assert figures.lead(work.name) in wanted <= known
        assert work.cold is (True if work.name in figures.COLD else None)
        assert work.title
        assert any(character.isdigit() for character in work.what) or work.name == "restart-kill"
    assert {rule.measure for rule in figures.RULES} <= known
    assert {name for rule in figures.RULES for name in rule.works} == set(names)
    assert set(ceiling.WORKS) <= set(names)


def made_up() -> figures.Values:
    """Rates and times of a machine whose speed changes from round to round, and of a run that failed in round 2."""
    speed = {1: 100.0, 2: 50.0, 3: 200.0}
    values: figures.Values = {}
    for mode, part in (("plain", 1.0), ("server aes", 0.5), ("mount aes", 0.8), ("gocryptfs", 0.9)):
        values["publish-512", "rate", mode] = {n: speed[n] * part for n in speed}
        values["restart", "time", mode] = {n: part / speed[n] for n in speed}
    del values["publish-512", "rate", "server aes"][2]
    values["publish-512", "cpu.daemon", "mount aes"] = {1: 2.0, 2: 3.0, 3: 1.0}
    return values


def figure_of(found: Sequence[result.Figure], work: str, measure: str, mode: str) -> result.Figure:
    return next(each for each in found if (each.work, each.measure, each.mode) == (work, measure, mode))


def test_a_ratio_is_to_plain_in_the_same_round() -> None:
    found = figures.figures(made_up(), MODES)
    ours = figure_of(found, "publish-512", "rate", "mount aes")
    assert ours.value.values == [80.0, 40.0, 160.0]
    assert (ours.value.median, ours.value.min, ours.value.max) == (80.0, 40.0, 160.0)
    assert ours.ratio is not None
    assert ours.ratio.values == pytest.approx([0.8, 0.8, 0.8]), "of medians it would depend on the machine's speed"
    theirs = figure_of(found, "publish-512", "rate", "server aes")
    assert theirs.value.values == [50.0, 100.0]
    assert theirs.ratio is not None
    assert theirs.ratio.values == pytest.approx([0.5, 0.5]), "round 2 has none, and round 3 is compared with round 3"
    assert figure_of(found, "publish-512", "rate", "plain").ratio is None
    assert figure_of(found, "publish-512", "cpu.daemon", "mount aes").ratio is None, "plain has no daemon"


def test_without_plain_there_is_no_ratio() -> None:
    values = made_up()
    del values["publish-512", "rate", "plain"]
    ours = figure_of(figures.figures(values, MODES), "publish-512", "rate", "mount aes")
    assert ours.ratio is None
    assert [target.of for target in ours.targets] == ["server aes", "gocryptfs"]
    assert figures.ratio({1: 5.0}, {2: 5.0}) is None
    assert figures.ratio({1: 5.0}, {1: 0.0}) is None
    assert figures.ratio({1: 5.0}, None) is None


def test_targets_say_what_is_compared_with_what() -> None:
    found = figures.figures(made_up(), MODES)
    ours = figure_of(found, "publish-512", "rate", "mount aes").targets
    assert [(target.of, target.limit, target.met) for target in ours] == [
        ("plain", 0.90, False),
        ("server aes", 1.1, True),
        ("gocryptfs", 1.0, False),
    ]
    assert [target.reached for target in ours] == pytest.approx([0.8, 1.6, 0.8 / 0.9])
    times = figure_of(found, "restart", "time", "mount aes").targets
    assert [(target.of, target.limit, target.met) for target in times] == [
        ("plain", 1.2, True),  # less is better
        ("gocryptfs", 1.0, True),
    ]
    assert all(not figure.targets for figure in found if not figure.mode.startswith("mount"))


def test_the_ceiling_is_set_against_the_fastest_mode() -> None:
    works = figures.works(TINY, cold=False, ceilings={"publish-512": result.spread([120.0, 200.0, 100.0])})
    found = figures.figures(made_up(), MODES)
    shared = {work.name: work for work in figures.with_shares(works, found)}
    assert shared["publish-512"].ceiling_share == pytest.approx(100 / 120)
    assert shared["publish-64"].ceiling_share is None
    course = runs.Course("nats-server", "/nowhere", quick=False, show=print)
    quiet = rounds.notes(course, 0.1, list(shared.values()), cold=True, counted=True)
    assert len(quiet) == 1
    assert "3 of 5 rounds" in quiet[0]
    course.crowded["kv"] = 2
    course.given_up.append("securefs (publish)")
    near = [
        *figures.with_shares(
            works, [*found, result.Figure("publish-512", "rate", "x", result.spread([119.0]), None, [])]
        )
    ]
    told = "\n".join(rounds.notes(course, 1.5, near, cold=False, counted=False))
    for words in ("load average was 1.5", "drop the page cache", "written to the disk is missing", "limit of: publish, 512",
                  "kv (2 runs)", "securefs (publish)"):  # fmt: skip
        assert words in told


# --- what ends a comparison as a whole ------------------------------------------------------------------------------------


def judged(modes_: Sequence[result.Mode], failures: Sequence[Failure]) -> int:
    sample = full()
    fields = {name: getattr(sample, name) for name in sample.__struct_fields__}
    try:
        cli_compare.judge(Result(**fields | {"modes": list(modes_), "failures": list(failures)}))
    except CompareError as problem:
        return problem.exit_code
    return 0


def test_what_makes_a_comparison_incomplete() -> None:
    def shown(mode: Mode, *, ran: bool) -> result.Mode:
        return result.Mode(mode.name, mode.title, mode.kind, mode.cipher, ran, "" if ran else "it is not here")

    everything = [shown(mode, ran=True) for mode in MODES]
    assert judged(everything, []) == 0
    assert judged([shown(mode, ran=mode.kind != "reference") for mode in MODES], []) == 0
    assert judged([shown(mode, ran=mode is not MOUNT) for mode in MODES], []) == 41
    assert judged(everything, [Failure("gocryptfs", "publish-64", 2, "it ended")]) == 41


def script(path: Path, lines: str) -> Path:
    path.write_text(f"#!/bin/sh\n{lines}\n")
    path.chmod(0o755)
    return path


def test_a_nats_server_that_cannot_be_compared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    old = script(tmp_path / "old", "echo 'nats-server: v2.9.10'")
    other = script(tmp_path / "other", "echo 'nginx version 1.22'")
    for program, words in (
        ("/nonexistent", "/nonexistent: no such program"),
        (str(tmp_path), "no such program"),
        (str(old), "is too old: nats-server: v2.9.10, and 2.10 is the oldest"),
        (str(other), "is no nats-server"),
    ):
        store = tmp_path / "stores"
        store.mkdir(exist_ok=True)
        assert cli.run(["compare", "--quick", "--store-dir", str(store), "--nats-server", program]) == 40
        out, err = capfd.readouterr()
        assert out == ""
        assert words in err
        assert "encfs-js: hint: Install nats-server 2.10 or later" in err
        assert os.listdir(store) == []
    with pytest.raises(NatsServerError):
        server.find("/nonexistent")


def test_debians_nats_server_is_too_old(tmp_path: Path) -> None:
    from test_nats_debian import BINARY, NEEDS_OLD  # noqa: PLC0415  it looks for the program when it is imported

    if NEEDS_OLD:
        pytest.skip(NEEDS_OLD)
    assert cli.run(["compare", "--quick", "--store-dir", str(tmp_path), "--nats-server", BINARY]) == 40


@pytest.mark.nats
def test_a_directory_that_cannot_be_used(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for name in ("missing", "file"):
        assert cli.run(["compare", "--quick", "--store-dir", str(tmp_path / name)]) == 25
        assert "no such directory" in capfd.readouterr().err
    assert cli.run(["compare", "--quick", "--report", str(tmp_path / "file" / "report")]) == 25
    assert f"{tmp_path}/file: not a directory" in capfd.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["file"]


@pytest.mark.nats
@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert cli.run(["compare", "--quick", "--store-dir", str(tmp_path)]) == 25
    assert cli.run(["compare", "--quick", "--report", str(tmp_path / "report")]) == 25


@pytest.mark.nats
@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
def test_a_disk_without_room(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", disk], check=True)
    try:
        assert cli.run(["compare", "--quick", "--store-dir", str(disk)]) == 25
        assert os.listdir(disk) == []
        assert machine.file_system(str(disk / "below")) == "tmpfs on tmpfs"
    finally:
        subprocess.run(["umount", disk], check=True)
    err = capfd.readouterr().err
    assert f"MiB there, and {64} MiB are free" in err
    assert "--store-dir DIR" in err
    assert rounds.room(loads.Size()) > rounds.room(loads.QUICK) > 64 << 20
    with pytest.raises(StoreIoError):
        rounds.suitable(str(tmp_path), loads.Size(large=1 << 40))


def test_a_report_needs_its_libraries_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli_compare, "_FOR_REPORTS", ("jinja2", "no_such_library"))
    monkeypatch.setattr(rounds, "compare", lambda *_: pytest.fail("it ran"))
    assert cli.run(["compare", "--report", str(tmp_path / "report")]) == 41
    assert "pip install 'encfs-js[compare]'" in capfd.readouterr().err
    assert os.listdir(tmp_path) == []


# --- the report on the disk ---------------------------------------------------------------------------------------------


def test_a_report_replaces_its_own_files_only(tmp_path: Path) -> None:
    pytest.importorskip("jinja2", reason="pip install 'encfs-js[compare]'")
    pytest.importorskip("matplotlib", reason="pip install 'encfs-js[compare]'")
    directory = tmp_path / "a" / "report"
    report.write(full(), str(directory))
    assert sorted(os.listdir(directory)) == sorted((*report.NAMES, report.FIGURE))
    (directory / "notes.txt").write_text("mine")
    old = (directory / "index.html").read_bytes()
    report.write(full(rounds=2), str(directory))
    assert sorted(os.listdir(directory)) == sorted((*report.NAMES, report.FIGURE, "notes.txt"))
    assert (directory / "index.html").read_bytes() != old
    assert result.decode((directory / "compare.json").read_bytes()) == full(rounds=2)
    assert stat.S_IMODE((directory / "index.html").stat().st_mode) & 0o400
    report.write(msgspec.structs.replace(full(), figures=[]), str(directory))
    assert not (directory / report.FIGURE).exists(), "there is no figure now, and the old one is of another comparison"
    assert (directory / "notes.txt").read_text() == "mine"


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jinja2", reason="pip install 'encfs-js[compare]'")
    pytest.importorskip("matplotlib", reason="pip install 'encfs-js[compare]'")
    report.write(full(), str(tmp_path))
    old = {name: (tmp_path / name).read_bytes() for name in (*report.NAMES, report.FIGURE)}
    calls: list[int] = []

    def refused(_: int) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "fsync", refused)
    with pytest.raises(OSError, match="No space left"):
        report.write(full(rounds=2), str(tmp_path))
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == old


# --- the load generator ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("work", ceiling.WORKS)
def test_the_ceiling_of_each_work(work: str) -> None:
    before = processes.family(os.getpid())
    assert ceiling.rate(work, TINY) > 0
    assert processes.family(os.getpid()) == before, "the sink has ended"


def test_a_sink_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    before = processes.family(os.getpid())
    lengths = list(loads.singles(TINY.one))
    # The sink expects more bytes than come: it never answers, and the load generator notices.
    monkeypatch.setattr(loads, "singles", lambda _: lengths)
    connected = client.connected
    monkeypatch.setattr(client, "connected", lambda port: connected(port, 1.0))
    short = ceiling.Job
    monkeypatch.setattr(
        ceiling, "Job", lambda stream, sizes, numbers, **rest: short(stream, [9999] * len(sizes), numbers, **rest)
    )
    with pytest.raises((RunError, OSError)):
        ceiling.rate("publish-one", TINY)
    assert processes.family(os.getpid()) == before


@pytest.mark.nats
def test_a_lost_message_fails_the_run(tmp_path: Path) -> None:
    """An ack that is behind what was published means loss, and a comparison of lost messages is none."""
    store = modes.create(PLAIN, str(tmp_path / "run"))
    payloads = client.bodies(64)
    prepared = client.chunks([b"some"], 700, payloads)
    assert [end for _, end in prepared] == [256, 512, 700]
    prepared[1] = (prepared[1][0].replace(client.encode(b"some", payloads[7]), b"", 1), prepared[1][1])
    with server.serving(store.server(server.find(None))) as nats:
        client.create_stream(nats.port, "S", ["some"])
        with client.connected(nats.port) as connection:
            connection.subscribe(client.ACKS, 1)
            with pytest.raises(RunError, match="sequence 511 instead of 512"):
                client.publish(connection, prepared, window=2)


# --- a cluster --------------------------------------------------------------------------------------------------------


def made(tmp_path: Path, mode: Mode) -> Run:
    return loads.Run(modes.create(mode, str(tmp_path / "run")), server.find(None), TINY, lambda: None)


@pytest.mark.parametrize("mode", [pytest.param(PLAIN, marks=pytest.mark.nats), pytest.param(MOUNT, marks=on_a_mount)])
def test_a_cluster_replicates_to_three(tmp_path: Path, mode: Mode) -> None:
    run = made(tmp_path, mode)
    counted = processes.family(os.getpid())
    cluster.cluster(run)
    disk = "written" in run.figures["cluster"]
    assert set(run.figures["cluster"]) == figures.expected("cluster", daemon=mode is MOUNT, disk=disk)
    assert run.figures["cluster"]["rate"] > 0
    stores = [tmp_path / "run/store", tmp_path / "run/n2/store", tmp_path / "run/n3/store"]
    for store in stores:
        blocks = list(store.rglob(f"jetstream/$G/streams/{cluster.STREAM}/msgs/*.blk"))
        assert sum(block.stat().st_size for block in blocks) > TINY.replicated * 512
    assert processes.family(os.getpid()) == counted
    assert not [entry for entry in mounts.mount_entries() if entry.mountpoint.startswith(str(tmp_path))]


@pytest.mark.nats
def test_a_cluster_whose_port_is_taken_takes_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path, PLAIN)
    asked: list[list[int]] = []
    real = cluster.free_ports
    with socket.create_server(("127.0.0.1", 0)) as taken:

        def ports(count: int) -> list[int]:
            asked.append([*real(count - 1), taken.getsockname()[1]] if len(asked) < wrong else real(count))
            return asked[-1]

        monkeypatch.setattr(cluster, "free_ports", ports)
        wrong = 1
        cluster.cluster(run)
        assert run.figures["cluster"]["rate"] > 0
        assert len(asked) == 2
        asked.clear()
        wrong = 9
        (tmp_path / "again").mkdir()
        with pytest.raises(RunError, match="no free ports for a cluster, 3 times: n3: address already in use"):
            cluster.cluster(made(tmp_path / "again", PLAIN))
        assert len(asked) == 3
    assert "nats-server" not in [Path(f"/proc/{pid}/comm").read_text().strip() for pid in processes.family(os.getpid())]


# --- modes that fail ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison of one scenario, without attacks."""
    monkeypatch.setattr(runs, "SCENARIOS", {"always": loads.always})
    monkeypatch.setattr(loads, "QUICK", TINY)
    monkeypatch.setattr(attacks, "run", lambda *_, **__: ([], []))


def compared(capfd: pytest.CaptureFixture[str], store_dir: Path) -> tuple[int, Result, str]:
    """`encfs-js compare --quick --json`: exit code, result, stderr; nothing may be left."""
    before = processes.family(os.getpid())
    handlers = [signal.getsignal(number) for number in interrupt.SIGNALS]
    code = cli.run(["compare", "--quick", "--json", "--store-dir", str(store_dir)])
    out, err = capfd.readouterr()
    assert os.listdir(store_dir) == []
    assert processes.family(os.getpid()) == before
    assert [signal.getsignal(number) for number in interrupt.SIGNALS] == handlers
    assert not [entry for entry in mounts.mount_entries() if entry.mountpoint.startswith(f"{store_dir}/")]
    return code, result.decode(out.encode()), err


def complete(found: Result) -> set[str]:
    return {figure.mode for figure in found.figures if (figure.work, figure.measure) == ("publish-always", "rate")}


@pytest.mark.nats
@pytest.mark.usefixtures("small")
def test_without_fusermount3_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    nowhere = tmp_path / "path"
    stores = tmp_path / "stores"
    nowhere.mkdir()
    stores.mkdir()
    monkeypatch.setenv("PATH", str(nowhere))
    code, found, err = compared(capfd, stores)
    assert code == 41
    assert complete(found) == {"plain", "server chachapoly", "server aes"}
    why = {mode.name: mode.why for mode in found.modes if not mode.ran}
    assert set(why) == set(BY_NAME) - complete(found)
    assert "/dev/fuse" in why["mount aes"] or "fusermount3 is missing" in why["mount aes"]
    assert "is not installed" in why["gocryptfs"]
    assert "2 modes did not run; mount chachapoly: no mounts here" in err
    assert found.failures == []


def pretending(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, lines: str) -> Path:
    """Put a program of this name before the real one; return a directory for the stores."""
    for each in ("path", "stores"):
        (tmp_path / each).mkdir()
    script(tmp_path / "path" / name, lines)
    monkeypatch.setenv("PATH", f"{tmp_path / 'path'}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "stores"


@pytest.mark.mount
@pytest.mark.nats
@pytest.mark.skipif(bool(modes.missing(MOUNT)), reason=modes.missing(MOUNT) or "-")
@pytest.mark.usefixtures("small")
def test_a_mode_that_cannot_be_mounted_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    chosen = (PLAIN, MOUNT, BY_NAME["gocryptfs"])
    monkeypatch.setattr(rounds, "MODES", chosen)
    lines = 'case "$*" in *-init*) exit 0;; *-fg*) echo "no luck today" >&2; exit 1;; esac'
    stores = pretending(tmp_path, monkeypatch, "gocryptfs", lines)
    code, found, err = compared(capfd, stores)
    assert code == 41
    assert complete(found) == {"plain", "mount aes"}
    assert [(f.mode, f.work, f.round) for f in found.failures] == [("gocryptfs", "mount", 0)]
    assert "gocryptfs ended with 1: no luck today" in found.failures[0].error
    assert {mode.name: mode.ran for mode in found.modes} == {"plain": True, "mount aes": True, "gocryptfs": False}
    assert "no luck today" in next(mode.why for mode in found.modes if mode.name == "gocryptfs")
    assert "1 run failed; gocryptfs, mount: gocryptfs ended with 1" in err
    ours = figure_of(found.figures, "publish-always", "rate", "mount aes")
    plain = figure_of(found.figures, "publish-always", "rate", "plain")
    assert ours.ratio is not None
    assert ours.ratio.values == [ours.value.values[0] / plain.value.values[0]]


GOCRYPTFS = BY_NAME["gocryptfs"]


@pytest.mark.mount
@pytest.mark.skipif(bool(modes.missing(GOCRYPTFS)), reason=modes.missing(GOCRYPTFS) or "-")
def test_a_mount_that_is_busy_for_a_moment_is_unmounted_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = modes.create(GOCRYPTFS, str(tmp_path / "run"))
    busy: list[str] = []
    call = processes.call

    def watched(command: Sequence[str], *rest: Any, **more: Any) -> str:
        try:
            return call(command, *rest, **more)
        except processes.RefusedError as problem:
            busy.append(problem.said)
            held.close()
            raise

    with modes.mounted(store):
        held = Path(store.directory, "file").open("w")  # noqa: SIM115  closed by `watched`
        monkeypatch.setattr(processes, "call", watched)
    assert len(busy) == 1
    assert "busy" in busy[0]
    assert not [entry for entry in mounts.mount_entries() if entry.mountpoint.startswith(str(tmp_path))]


WAITS = """
import os, sys
directory = os.open(sys.argv[1], os.O_RDONLY)
print("ready", flush=True)
sys.stdin.readline()
try:
    os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=directory)
except OSError:
    sys.exit(7)
"""


@pytest.mark.root
@pytest.mark.mount
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can free others, where fusectl is not mounted")
@pytest.mark.skipif(bool(modes.missing(GOCRYPTFS)), reason=modes.missing(GOCRYPTFS) or "-")
@pytest.mark.parametrize("detached", [False, True])
def test_who_waits_for_a_daemon_that_hangs_is_freed(tmp_path: Path, detached: bool) -> None:
    store = modes.create(GOCRYPTFS, str(tmp_path / "run"))
    daemon = modes.Daemon(store)
    daemon.mount()
    child = subprocess.Popen(
        [sys.executable, "-c", WAITS, store.directory], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        device = next(e.minor for e in mounts.mount_entries() if e.mountpoint == store.directory)
        os.kill(daemon.pids[0], signal.SIGSTOP)
        if detached:
            processes.take_away(store.directory)
        with pytest.raises(subprocess.TimeoutExpired):
            child.communicate("go\n", timeout=0.5)
        processes.abort(f"0:{device}")
        assert child.wait(mounts.PATIENCE) == 7
    finally:
        daemon.kill()
        child.kill()
        child.communicate()
    assert mounts.entry_at(Path(store.directory)) is None


def kill_the_server(store: str) -> None:
    """Kill the nats-server that this process has started, as soon as it has a message in the store."""
    block = Path(store, "jetstream/$G/streams/ONE/msgs/1.blk")
    mounts.until(lambda: block.exists() and block.stat().st_size, "a message in the store")
    for pid in processes.family(os.getpid())[1:]:
        if Path(f"/proc/{pid}/comm").read_text().strip() == "nats-server":
            os.kill(pid, signal.SIGKILL)


@pytest.mark.nats
@pytest.mark.usefixtures("small")
def test_a_mode_that_fails_in_the_middle_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def always(run: Run) -> None:
        if run.store.mode.name != "server aes":
            loads.always(run)
            return
        killer = threading.Thread(target=kill_the_server, args=(run.store.directory,))
        killer.start()
        try:
            run.size = loads.Size(always=1_000_000)  # it would take minutes
            loads.always(run)
        finally:
            killer.join()

    monkeypatch.setattr(runs, "SCENARIOS", {"always": always})
    monkeypatch.setattr(rounds, "MODES", (PLAIN, BY_NAME["server aes"], BY_NAME["server chachapoly"]))
    code, found, _ = compared(capfd, tmp_path)
    assert code == 41
    assert complete(found) == {"plain", "server chachapoly"}
    assert [(f.mode, f.work, f.round) for f in found.failures] == [("server aes", "publish-always", 1)]
    assert "nats.1.log:\n" in found.failures[0].error, "the server's last words"
    assert [(mode.name, mode.ran) for mode in found.modes if not mode.ran] == [("server aes", False)]


@pytest.mark.nats
def test_what_was_complete_before_a_failure_counts(tmp_path: Path) -> None:
    course = runs.Course(server.find(None), str(tmp_path), quick=False, show=lambda _: None, chosen=[PLAIN, MODES[1]])
    tried: list[tuple[str, int]] = []

    def some(run: Run) -> None:
        tried.append((run.store.mode.name, len(tried)))
        run.add("publish-512", rate=5.0, p50=1.0)
        if run.store.mode is not PLAIN:
            run.add("restart", time=1.0)
            run.add("replay", cpu_server=1.0)
            raise RunError("the replay has message 7 where 6 should be")
        for work in ("restart", "restart-kill"):
            run.add(work, time=2.0)
        for work in ("replay", "get"):
            run.add(work, rate=3.0)
        run.bounds["get"] = "others"

    before = dict(runs.SCENARIOS)
    try:
        runs.SCENARIOS.clear()
        runs.SCENARIOS["stream"] = some
        runs.measure(course)
    finally:
        runs.SCENARIOS.clear()
        runs.SCENARIOS.update(before)
    assert course.values["publish-512", "rate", "server chachapoly"] == {1: 5.0, 2: 5.0}
    assert course.values["restart", "time", "server chachapoly"] == {1: 1.0, 2: 1.0}
    assert ("replay", "cpu.server", "server chachapoly") not in course.values
    assert course.values["get", "rate", "plain"] == dict.fromkeys(range(1, 6), 3.0)
    assert [(f.mode, f.work, f.round) for f in course.failures] == [("server chachapoly", "replay", n) for n in (1, 2)]
    assert course.failures[0].error == "the replay has message 7 where 6 should be"
    assert course.given_up == ["server chachapoly (stream)"]
    assert [name for name, _ in tried].count("server chachapoly") == runs.GIVEN_UP
    assert course.crowded == {"get": 5}
    assert os.listdir(tmp_path) == []


@pytest.mark.root
@pytest.mark.mount
@pytest.mark.nats
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount an overlay")
@pytest.mark.skipif(bool(modes.missing(MOUNT)), reason=modes.missing(MOUNT) or "-")
@pytest.mark.usefixtures("small")
def test_an_overlay_carries_no_mount_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rounds, "MODES", (PLAIN, MOUNT))
    for name in ("lower", "upper", "work", "top"):
        (tmp_path / name).mkdir()
    options = ",".join(f"{name}dir={tmp_path / name}" for name in ("lower", "upper", "work"))
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, tmp_path / "top"], check=True)
    try:
        code, found, _ = compared(capfd, tmp_path / "top")
    finally:
        subprocess.run(["umount", tmp_path / "top"], check=True)
    assert code == 41
    assert complete(found) == {"plain"}
    assert "overlayfs" in next(mode.why for mode in found.modes if mode.name == "mount aes")
    assert found.machine.file_system.startswith("overlay")
    assert any("written to the disk is missing" in note for note in found.notes)


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def handlers() -> Iterator[None]:
    """The handlers of before: a process that was interrupted keeps those of the comparison to its end."""
    before = {number: signal.getsignal(number) for number in interrupt.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def signalled(before: bool, within: bool, cleaning: bool, after: bool) -> list[str]:
    """What is done of a block when signals come at these moments."""
    done: list[str] = []

    def press(whether: bool) -> None:
        for number in interrupt.SIGNALS if whether else ():
            os.kill(os.getpid(), number)

    try:
        with interrupt.taken() as signals:
            press(before)
            done.append("before")
            try:
                with signals.raising():
                    done.append("begun")
                    press(within)
                    done.append("finished")
            finally:
                press(cleaning)
                done.append("cleaned up")
            press(after)
        done.append("over")
    except KeyboardInterrupt:
        press(True)
        done.append("interrupted")
    return done


@pytest.mark.usefixtures("handlers")
def test_one_signal_interrupts_and_none_disturbs_the_cleaning_up() -> None:
    assert signalled(False, False, False, False) == ["before", "begun", "finished", "cleaned up", "over"]
    assert signalled(True, False, False, False) == ["before", "cleaned up", "interrupted"]
    assert signalled(True, True, True, True) == ["before", "cleaned up", "interrupted"]
    assert signalled(False, True, False, False) == ["before", "begun", "cleaned up", "interrupted"]
    assert signalled(False, True, True, False) == ["before", "begun", "cleaned up", "interrupted"]
    assert signalled(False, False, True, False) == ["before", "begun", "finished", "cleaned up", "interrupted"]
    assert signalled(False, False, False, True) == ["before", "begun", "finished", "cleaned up", "interrupted"]


DRIVER = """
import sys
from encfs_js import cli
from encfs_js.compare import loads, rounds, runs
chosen, scenario = sys.argv[1].split(","), sys.argv[2]
rounds.MODES = [mode for mode in rounds.MODES if mode.name in chosen]
runs.SCENARIOS = {name: work for name, work in runs.SCENARIOS.items() if name == scenario}
cli.main(["compare", "--quick", "--store-dir", sys.argv[3], "--report", sys.argv[4]])
"""
MARK = "ENCFS_JS_TEST_COMPARE"


def started_by(mark: str, directory: Path) -> list[str]:
    """Every process that is or was part of a comparison: by its environment, or by a path in its command line."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) != os.getpid():
            for what, sign in (("environ", f"{MARK}={mark}"), ("cmdline", str(directory))):
                with contextlib.suppress(OSError):
                    if sign.encode() in Path(f"/proc/{name}/{what}").read_bytes():
                        found.append(Path(f"/proc/{name}/cmdline").read_text().replace("\0", " "))
    return found


@contextlib.contextmanager
def driven(tmp_path: Path, chosen: str, scenario: str) -> Iterator[tuple[subprocess.Popen[str], Callable[[], None]]]:
    """A comparison in a process of its own; the function asserts that nothing is left of it."""
    mark, stores, written = os.urandom(8).hex(), tmp_path / "stores", tmp_path / "report"
    stores.mkdir()
    child = subprocess.Popen(
        [sys.executable, "-c", DRIVER, chosen, scenario, str(stores), str(written)],
        env=mounts.environment(None) | {MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def nothing_left() -> None:
        assert started_by(mark, stores) == []
        assert not [entry for entry in mounts.mount_entries() if entry.mountpoint.startswith(str(tmp_path))]
        assert os.listdir(stores) == []
        assert not written.exists(), "an interrupted run writes no report"

    try:
        yield child, nothing_left
    finally:
        # Only where the test failed: what is still there goes away with its parent's cleaning up, or by force.
        if child.poll() is None:
            child.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.communicate(timeout=mounts.PATIENCE)
        child.kill()
        child.communicate()


@pytest.mark.mount
@pytest.mark.nats
@pytest.mark.skipif(bool(modes.missing(MOUNT)), reason=modes.missing(MOUNT) or "-")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("step", "scenario", "longest"),
    [
        ("trying mount aes", "always", 0.8),
        ("the load generator alone", "always", 0.2),
        ("publish, mount aes", "publish", 1.0),
        ("stream, mount aes", "stream", 1.5),
        ("cluster, mount aes", "cluster", 2.5),
        ("attacks", "always", 4.0),
    ],
)
def test_nothing_outlives_ctrl_c(
    tmp_path: Path, number: signal.Signals, step: str, scenario: str, longest: float
) -> None:
    pytest.importorskip("jinja2", reason="pip install 'encfs-js[compare]'")
    pytest.importorskip("matplotlib", reason="pip install 'encfs-js[compare]'")
    with driven(tmp_path, "plain,mount aes", scenario) as (child, nothing_left):
        assert child.stderr is not None
        said = ""
        while step not in said:
            line = child.stderr.readline()
            assert line, f"it ended: {said}"
            said += line
        time.sleep(random.uniform(0, longest))
        child.send_signal(number)
        time.sleep(random.uniform(0, 0.1))
        child.send_signal(number)  # whoever presses Ctrl-C twice must not stop the cleaning up
        out, err = child.communicate(timeout=mounts.PATIENCE)
        assert child.returncode == 130, said + err
        assert out == ""
        assert "encfs-js: interrupted; nothing was written, nothing is left" in err
        assert "Traceback" not in err
        nothing_left()


# --- a terminal ---------------------------------------------------------------------------------------------------------


@pytest.mark.nats
@pytest.mark.usefixtures("small")
def test_without_a_terminal_there_is_a_line_for_each_step_and_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(rounds, "MODES", (PLAIN, BY_NAME["server aes"]))
    assert cli.run(["compare", "--quick", "--store-dir", str(tmp_path)]) == 0
    out, err = capfd.readouterr()
    lines = err.splitlines()
    assert "encfs-js: round 1 of 1: always, plain" in lines
    assert "encfs-js: round 1 of 1: always, server aes" in lines
    assert all(line.startswith("encfs-js: ") for line in lines)
    assert "This was a quick run: the figures mean little." in out
    row = next(line for line in out.splitlines() if "publish, each synced (rate)" in line)
    assert "/s" in row


def test_titles_fit_beside_each_other() -> None:
    """The figure of the README has five of them in a row."""
    works = figures.works(loads.Size(), cold=True, ceilings={})
    assert max(len(work.title) for work in works) <= 26
