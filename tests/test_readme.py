"""What the README says is what the program does: exit codes, commands, options, JSON fields, rooms."""

from __future__ import annotations

import inspect
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import click
import mounts
import pytest
from test_cli import all_commands

from encfs_js import errors

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PROJECT = ROOT / "pyproject.toml"
SECTIONS = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL))


def test_exit_codes_are_those_of_the_package() -> None:
    listed = dict(re.findall(r"^\| (\d+) \| (.+) \|$", SECTIONS["Exit codes"], re.MULTILINE))
    known = {"0", "1", "2", "130"}
    assert known <= set(listed)
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.EncfsError) and kind is not errors.EncfsError:
            code = str(kind.exit_code)
            assert code in listed, f"{name} ({code}) is not in the table"
            if kind is not errors.FormatError:  # the same to an operator as DamageFoundError
                assert listed[code] == (kind.__doc__ or "").splitlines()[0], name
            known.add(code)
    assert set(listed) == known


@pytest.mark.parametrize(("name", "command"), all_commands())
def test_every_command_and_option_is_mentioned(name: str, command: click.Command) -> None:
    if name.count(" ") and not isinstance(command, click.Group):
        assert re.search(rf"^    {re.escape(name.removeprefix('encfs-js '))}\b", SECTIONS["Commands"], re.MULTILINE)
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            for option in (*parameter.opts, *parameter.secondary_opts):
                assert re.search(rf"(?<![\w-]){option}(?![\w-])", README), f"{name} {option} is not in the README"
        elif isinstance(parameter, click.Argument):
            assert str(parameter.human_readable_name) in SECTIONS["Commands"]


def fields(text: str) -> set[str]:
    return set(re.findall(r"^ *\{?\"(\w+)\":", text, re.MULTILINE))


def test_every_json_field_is_described() -> None:
    """The fields that the transcripts show, without those that are names of things: suites, epochs, kinds of files."""
    described = set(re.findall(r"`(\w+)`", SECTIONS["JSON"]))
    shown: set[str] = set()
    for transcript in (ROOT / "tests" / "cli").glob("*.txt"):
        text = transcript.read_text(encoding="utf-8")
        for output in re.findall(
            r"^\$ (?:JS_KEY=\S+ )?encfs-js [^\n|]*--json\n(.*?)(?=^\$ |\Z)", text, re.MULTILINE | re.DOTALL
        ):
            shown |= fields(output)
    assert {"sound", "slots", "closed", "mounts", "cleared"} <= shown, "the transcripts show all five"
    assert shown - described <= {"iterations", "lanes", "memory_kib", "chachapoly", "aes", "1", "symlink"}


def test_every_room_has_its_place_in_the_table() -> None:
    rooms = {name.removesuffix(".py") for name in os.listdir(ROOT / "encfs_js") if name.endswith(".py")}
    listed = set(
        re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.+?) \|", SECTIONS["Where things are"], re.MULTILINE)))
    )
    expected = {"cli" if room.startswith("cli") else room for room in rooms if not room.startswith("__")}
    assert listed - {"cli_"} == expected


def test_every_path_of_the_repository_exists() -> None:
    names = re.findall(r"(?<![\w/.])(?:examples|tests|systemd|encfs_js)/[\w./@-]*", README)
    assert names
    for name in names:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("name", ["quickstart.sh", "setup.sh", "cluster/run.sh", "../tests/run.sh", "../tests/soak.sh"])
def test_scripts_are_scripts(name: str) -> None:
    assert subprocess.run(["bash", "-n", ROOT / "examples" / name], timeout=60).returncode == 0


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is missing: install systemd")
def test_the_unit_is_one_that_systemd_understands() -> None:
    unit = ROOT / "systemd" / "encfs-js@.service"
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def why_no_quickstart() -> str:
    """Why quickstart.sh would change something here, or cannot run; or an empty string."""
    stamp = ROOT / ".venv" / ".set-up"
    if not stamp.exists() or stamp.read_text().strip() != str(ROOT) or stamp.stat().st_mtime < PROJECT.stat().st_mtime:
        return "it would set up .venv first: run the tests with tests/run.sh, which has done so"
    return mounts.needs_fuse()


sets_nothing_up = pytest.mark.skipif(bool(why_no_quickstart()), reason=why_no_quickstart() or "-")


def start_quickstart(scratch: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        # What is run in the background has SIGINT ignored, and no shell below it could trap it.
        ["env", "--default-signal=INT", "bash", ROOT / "examples" / "quickstart.sh"],
        env={**mounts.environment(None), "TMPDIR": str(scratch)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def nothing_left(scratch: Path) -> None:
    assert os.listdir(scratch) == []
    assert not [entry for entry in mounts.mount_entries() if entry.mountpoint.startswith(str(scratch))]
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            command = Path("/proc", pid, "cmdline").read_bytes()
        except OSError:
            continue
        assert os.fsencode(scratch) not in command, command


@pytest.mark.mount
@pytest.mark.nats
@sets_nothing_up
def test_quickstart(tmp_path: Path) -> None:
    process = start_quickstart(tmp_path)
    try:
        out, _ = process.communicate(timeout=3 * mounts.PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, out
    assert "and 0 times in the files of the store" in out
    nothing_left(tmp_path)


@pytest.mark.mount
@pytest.mark.nats
@sets_nothing_up
@pytest.mark.parametrize("sign", ["$ encfs-js init", "$ encfs-js mount", "Published", "Replayed"])
def test_quickstart_cleans_up_after_ctrl_c(tmp_path: Path, sign: str) -> None:
    process = start_quickstart(tmp_path)
    try:
        assert process.stdout is not None
        seen = ""
        for line in process.stdout:
            seen += line
            if line.startswith(sign):
                os.killpg(process.pid, signal.SIGINT)
                break
        seen += process.stdout.read()
        assert process.wait(mounts.PATIENCE) == 130, seen
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
    nothing_left(tmp_path)
