"""`encfs-js compare --quick` as one types it, once: what comes out is whole. The figures are no matter here.

With one mode of each kind, for the time it takes; test_compare_attacks.py has all of them under every attack.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import subprocess
import threading
from typing import TYPE_CHECKING, NamedTuple

import mounts
import pytest

from encfs_js.compare import attacks, ceiling, figures, modes, result
from encfs_js.compare.modes import MODES

if TYPE_CHECKING:
    from pathlib import Path

    from encfs_js.compare.result import Result

pytest.importorskip("jinja2", reason="pip install 'encfs-js[compare]'")
pytest.importorskip("matplotlib", reason="pip install 'encfs-js[compare]'")
NEEDS = modes.missing(next(mode for mode in MODES if mode.kind == "mount"))
pytestmark = [
    pytest.mark.mount,
    pytest.mark.nats,
    pytest.mark.skipif(bool(NEEDS), reason=NEEDS or "-"),
    pytest.mark.timeout(900),  # the fixture is a whole comparison
]
ASKED = ("server aes", "mount aes", "gocryptfs")
CHOSEN = [mode for mode in MODES if mode.name in ("plain", *ASKED)]
HERE = [mode for mode in CHOSEN if not modes.missing(mode)]
# CPU is counted in ticks, so that of so little work may be none; bytes written are those of the whole disk.
MAY_BE_ZERO = {"cpu.server", "cpu.daemon", "written"}


class Whole(NamedTuple):
    """A run: exit code, stdout, what a terminal showed of stderr, the directory of the stores, the one of the report."""

    code: int
    out: str
    screen: str
    stores: Path
    report: Path

    @property
    def found(self) -> Result:
        return result.decode(self.out.encode())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    top = tmp_path_factory.mktemp("compare")
    (top / "stores").mkdir()
    ours, theirs = pty.openpty()
    command = [*mounts.COMMAND, "compare", "--quick", "--json", "--store-dir", str(top / "stores")]
    child = subprocess.Popen(
        [*command, "--report", str(top / "report"), *(word for name in ASKED for word in ("--mode", name))],
        env=mounts.environment(None) | {"TERM": "xterm", "COLUMNS": "160"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=theirs,
        text=True,
    )
    os.close(theirs)
    seen = bytearray()

    def look() -> None:
        with contextlib.suppress(OSError):  # EIO: nobody has the terminal any more
            while part := os.read(ours, 65536):
                seen.extend(part)

    looking = threading.Thread(target=look)
    looking.start()
    try:
        out, _ = child.communicate(timeout=800)
    finally:
        child.terminate()  # it cleans up, if it still runs
        child.wait(mounts.PATIENCE)
        looking.join(mounts.PATIENCE)
        os.close(ours)
    return Whole(child.returncode, out, seen.decode(), top / "stores", top / "report")


def test_everything_ran(whole: Whole) -> None:
    assert whole.out, whole.screen[-3000:]
    found = whole.found
    assert found.failures == []
    assert whole.code == 0, whole.screen[-3000:]
    assert [mode.name for mode in found.modes if mode.ran] == [mode.name for mode in HERE]
    assert [mode.name for mode in found.modes] == [mode.name for mode in CHOSEN]
    assert all(bool(mode.why) != mode.ran for mode in found.modes)
    assert (found.format, found.quick, found.rounds, found.interrupted) == (result.FORMAT, True, 1, False)


def test_every_mode_has_every_figure_of_every_work(whole: Whole) -> None:
    found = whole.found
    disk = not any("written to the disk is missing" in note for note in found.notes)
    for mode in HERE:
        daemon = mode.kind in {"mount", "reference"}
        for work in found.works:
            have = {each.measure: each for each in found.figures if (each.work, each.mode) == (work.name, mode.name)}
            assert set(have) == figures.expected(work.name, daemon=daemon, disk=disk), (work.name, mode.name)
            for name, figure in have.items():
                assert len(figure.value.values) == 1
                assert figure.value.median > 0 or name in MAY_BE_ZERO, (work.name, mode.name, name)
            if "p50" in have:
                assert have["p50"].value.median <= have["p99"].value.median <= have["max"].value.median
            if "synced" in have:
                assert have["synced"].value.median <= have["rate"].value.median
    cold = {work.name for work in found.works if work.cold is not None}
    assert cold == figures.COLD


def test_ratios_and_targets_are_those_of_the_values(whole: Whole) -> None:
    found = whole.found
    values = {(each.work, each.measure, each.mode): each.value.values[0] for each in found.figures}
    for each in found.figures:
        plain = values.get((each.work, each.measure, "plain"))
        if each.mode == "plain" or not plain:
            assert each.ratio is None
            continue
        assert each.ratio is not None
        assert each.ratio.values == [each.value.values[0] / plain]
        for target in each.targets:
            assert target.reached == each.value.values[0] / values[each.work, each.measure, target.of]
    targeted = {(each.mode, target.of) for each in found.figures for target in each.targets}
    assert targeted >= {("mount aes", of) for of in ("plain", "server aes")}


def test_the_store_is_larger_than_its_messages_and_a_mount_takes_little_more(whole: Whole) -> None:
    """Sizes do not depend on the machine."""
    values = {(each.work, each.measure, each.mode): each.value.median for each in whole.found.figures}
    plain = values["publish-512", "blocks", "plain"]
    assert plain < values["publish-512", "blocks", "mount aes"] <= 1.01 * plain
    for mode in HERE:
        assert 1.0 < values["publish-512", "disk.payload", mode.name] < 1.5


def test_the_load_generators_ceiling_is_shown(whole: Whole) -> None:
    works = {work.name: work for work in whole.found.works}
    for name, work in works.items():
        assert (work.ceiling is not None) == (name in ceiling.WORKS)
        if work.ceiling is not None:
            best = max(e.value.median for e in whole.found.figures if (e.work, e.measure) == (name, "rate"))
            assert work.ceiling_share == best / work.ceiling.median


def test_every_attack_has_an_outcome_in_every_mode(whole: Whole) -> None:
    rows = attacks.rows(quick=True)
    assert [attack.name for attack in whole.found.attacks] == [row.name for row in rows]
    for attack in whole.found.attacks:
        assert [outcome.mode for outcome in attack.outcomes] == [mode.name for mode in HERE]
        assert all(outcome.saw for outcome in attack.outcomes)


def test_the_machine_is_described(whole: Whole) -> None:
    machine = whole.found.machine
    assert machine.cores == os.cpu_count()
    assert machine.memory > 1 << 28
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", machine.nats_server)
    assert re.match(r"\w[\w.]* on \S+", machine.file_system)
    assert machine.openssl.startswith("OpenSSL ")
    assert len(machine.references) == sum(mode.kind == "reference" for mode in HERE)
    for text in (machine.processor, machine.kernel, machine.python, machine.cryptography, *machine.references):
        assert text


def test_the_report_is_there(whole: Whole) -> None:
    assert sorted(os.listdir(whole.report)) == ["compare.json", "compare.md", "compare.svg", "index.html"]
    assert (whole.report / "compare.json").read_text() == whole.out
    for name in ("index.html", "compare.md"):
        text = (whole.report / name).read_text()
        assert all(mode.name in text for mode in HERE)
        assert all(attack.title in text for attack in whole.found.attacks)


def test_a_terminal_sees_how_far_it_is(whole: Whole) -> None:
    assert re.search(r"\d+%.*left:.*round 1 of 1: publish, plain", whole.screen)
    assert re.search(r"left:.*attacks: ", whole.screen)
    assert "\x1b" not in whole.out


def test_nothing_is_left(whole: Whole) -> None:
    assert os.listdir(whole.stores) == []
    assert not [entry for entry in mounts.mount_entries() if entry.mountpoint.startswith(str(whole.stores))]
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{name}/cmdline", "rb") as file:
                assert str(whole.stores).encode() not in file.read()
