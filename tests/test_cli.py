"""What people type and what they get: transcripts in tests/cli, run again and compared word for word.

A transcript is a shell session in an empty directory: `$ ` begins a command, which must work or say why not; what follows
is its stdout, its stderr with `! ` before each line, and `= N` when its exit code is not 0. Paths, times, process numbers and
store ids are replaced by names. ENCFS_JS_UPDATE=1 writes the transcripts anew; read the difference before you commit it.

Of every encfs-js command that stands alone and fails, the whole directory must be untouched afterwards: contents, modes
and times.
"""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import click
import mounts
import pytest

from encfs_js import cli, cli_guard, config, hygiene

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

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
    text = re.sub(r"(\bpid |\bprocess |\bworker |\"pid\": |\"worker\": )\d+", r"\1PID", text)
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
            # The reserve's content means nothing, and there is too much of it to be read after every command.
            read = entry.is_file(follow_symlinks=False) and entry.name != "reserve"
            content = Path(entry.path).read_bytes() if read else b""
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


# --- what a transcript cannot show --------------------------------------------------------------------------------


def encfs_js(*arguments: str | Path, key: str | None = mounts.KEY) -> subprocess.CompletedProcess[str]:
    return mounts.run(*arguments, key=key, code=None)


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount an overlay")
def test_a_store_on_overlayfs_is_refused(tmp_path: Path) -> None:
    for name in ("lower", "upper", "work", "top", "mnt"):
        (tmp_path / name).mkdir()
    mounts.init(tmp_path / "lower" / "store")
    options = ",".join(f"{name}dir={tmp_path / name}" for name in ("lower", "upper", "work"))
    with cleared(tmp_path):
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, tmp_path / "top"], check=True)
        try:
            before = untouched(tmp_path)
            for arguments in (("init", "top/new"), ("mount", "top/store", "mnt")):
                done = encfs_js(arguments[0], *(tmp_path / name for name in arguments[1:]))
                assert done.returncode == 17
                assert "overlayfs" in done.stderr
                assert "encfs-js: hint: " in done.stderr
                assert untouched(tmp_path) == before
                assert os.listdir(tmp_path / "upper") == []
        finally:
            subprocess.run(["umount", tmp_path / "top"], check=True)


def test_of_many_inits_at_once_one_wins(tmp_path: Path) -> None:
    store = tmp_path / "store"
    keys = [f"key {i}" for i in range(6)]
    with ThreadPoolExecutor(len(keys)) as pool:
        codes = [done.returncode for done in pool.map(lambda key: encfs_js("init", store, key=key), keys)]
    assert sorted(set(codes)) in ([0, 16], [0, 18], [0, 16, 18])
    assert codes.count(0) == 1
    opened = [encfs_js("verify", store, key=key).returncode for key in keys]
    assert opened == [0 if code == 0 else 12 for code in codes]


def test_a_bug_is_one_line_and_shows_no_values(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(_: str) -> list[object]:
        raise RuntimeError("a key, perhaps")

    monkeypatch.setattr(cli_guard.room, "read", broken)
    monkeypatch.delenv("ENCFS_JS_DEBUG", raising=False)
    assert cli.run(["guard", "status", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert re.fullmatch(r"encfs-js: error: unexpected RuntimeError at test_cli\.py:\d+", lines[0])
    assert lines[1].startswith("encfs-js: hint: This is a bug")
    assert len(lines) == 2
    assert "a key, perhaps" not in err
    monkeypatch.setenv("ENCFS_JS_DEBUG", "1")
    assert cli.run(["guard", "status", str(tmp_path)]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_what_the_operating_system_refuses_is_said_with_its_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refused(store: str) -> list[object]:
        raise PermissionError(13, "Permission denied", f"{store}/.encfs_js/guard")

    monkeypatch.setattr(cli_guard.room, "read", refused)
    assert cli.run(["guard", "status", str(tmp_path)]) == 25
    assert f"encfs-js: error: {tmp_path}/.encfs_js/guard: Permission denied\n" in capsys.readouterr().err


def test_an_error_stays_on_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.run(["guard", "status", f"{tmp_path}/a\nb\x1b[31m\udcff"]) == 14
    error, hint = capsys.readouterr().err.splitlines()
    assert error == rf"encfs-js: error: {tmp_path}/a\nb\x1b[31m\udcff: no encfs_js store"
    assert hint.startswith("encfs-js: hint: ")


def test_nobody_reads_the_output_to_its_end(tmp_path: Path) -> None:
    mounts.init(tmp_path / "store")
    reader, writer = os.pipe()
    os.close(reader)
    command = [*mounts.COMMAND, "inspect", str(tmp_path / "store"), "--json"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=mounts.PATIENCE)
    os.close(writer)
    assert "Traceback" not in done.stderr
    assert "bug" not in done.stderr


def all_commands() -> list[tuple[str, click.Command]]:
    """Every command with its name as one types it."""
    found: list[tuple[str, click.Command]] = []

    def collect(name: str, command: click.Command) -> None:
        found.append((name, command))
        if isinstance(command, click.Group):
            with click.Context(command) as context:
                for inner in command.list_commands(context):
                    subcommand = command.get_command(context, inner)
                    assert subcommand is not None
                    collect(f"{name} {inner}", subcommand)

    collect("encfs-js", cli.commands)
    return found


@pytest.mark.parametrize(("name", "command"), all_commands())
def test_everything_has_help(name: str, command: click.Command) -> None:
    assert command.help, f"{name} has no help"
    assert not command.get_short_help_str(80).endswith("..."), f"the first sentence of {name}'s help is too long"
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts[0]} has no help"
        else:
            assert str(parameter.human_readable_name) in command.help, f"{name} does not say what its argument is"


@pytest.mark.parametrize(
    ("name", "command"),
    [(n, c) for n, c in all_commands() if any("--key-file" in parameter.opts for parameter in c.params)],
)
def test_no_core_dump_can_hold_a_key(name: str, command: click.Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command forbids dumps before it looks for a key anywhere."""
    called: list[str] = []
    monkeypatch.setattr(hygiene, "no_dumps", lambda: called.append("dumps"))
    monkeypatch.setattr(config, "load", lambda _: called.append("configuration") or sys.exit(99))
    required = [p for p in command.params if p.required]
    given = [word for p in required for word in ([p.opts[0], "plain"] if isinstance(p, click.Option) else ["1"])]
    with pytest.raises(SystemExit, match="99"):
        cli.run([*name.split()[1:], *given, "--config", "some"])
    assert called == ["dumps", "configuration"]


@pytest.mark.parametrize("command", ["encrypt", "verify", "convert", "decrypt"])
def test_a_terminal_sees_how_far_it_is(command: str, tmp_path: Path) -> None:
    store = tmp_path / "store"
    (store / "jetstream/A/streams/S/msgs").mkdir(parents=True)
    (store / "jetstream/A/streams/S/msgs/thw.db").write_bytes(b"")
    for i in range(300):
        (store / f"jetstream/A/streams/S/file{i}").write_bytes(bytes(30_000))
    if command in {"verify", "decrypt"}:
        mounts.run("encrypt", store)
    options = [tmp_path / "target", "--from", "plain", "--to", "sealed"] if command == "convert" else []
    ours, theirs = pty.openpty()
    environ = mounts.environment(mounts.KEY) | {"TERM": "xterm", "COLUMNS": "120"}
    child = subprocess.Popen(
        [*mounts.COMMAND, command, str(store), *map(str, options)],
        env=environ, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    seen = bytearray()
    with contextlib.suppress(OSError):  # EIO: nobody has the terminal any more
        while part := os.read(ours, 65536):
            seen += part
    os.close(ours)
    out, _ = child.communicate(timeout=mounts.PATIENCE)
    assert child.returncode == 0, seen.decode()
    shown = seen.decode()
    state = {"verify": "verifying", "convert": "(copying|comparing|records|done)"}.get(command, "(running|done)")
    assert re.search(rf"{state}.*MiB.*of 30[01] files", shown), shown
    assert b"\x1b" not in out


def imported_by(*arguments: str) -> set[str]:
    code = (
        "import sys; from encfs_js import cli; "
        f"cli.run({list(arguments)!r}); print('IMPORTED', *sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=mounts.PATIENCE)
    return set(done.stderr.partition("IMPORTED ")[2].split())


def test_a_command_loads_what_it_needs() -> None:
    """Start-up time counts where a script asks for the status once a second; a clock would make a poor test of it."""
    heavy = {"pyfuse3", "trio", "cryptography", "yaml", "msgspec"}
    assert "encfs_js.cli" in imported_by("--version")
    assert not heavy & imported_by("--version")
    assert not {"pyfuse3", "trio", "yaml"} & imported_by("status", "/nowhere")
    assert not {"pyfuse3", "trio"} & imported_by("verify", "/nowhere")


def at_a_terminal(command: Sequence[str | Path], answers: list[str]) -> tuple[int, str]:
    """Run a command at a terminal of its own, type an answer at every prompt; its exit code and what the screen shows."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.pop("JS_KEY", None)
        os.execv(sys.executable, [sys.executable, *map(str, command)])
    screen, asked = "", 0
    try:
        while True:
            ready, _, _ = select.select([terminal], [], [], mounts.PATIENCE)
            assert ready, f"no answer: {screen}"
            try:
                screen += os.read(terminal, 4096).decode()
            except OSError:  # the terminal's other end is closed
                break
            if len(re.findall(r"(?:Key|again): ", screen)) > asked:
                os.write(terminal, answers[asked].encode() + b"\n")
                asked += 1
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL if not ready else 0)
        _, status = os.waitpid(child, 0)
        os.close(terminal)
    return os.waitstatus_to_exitcode(status), screen


def test_a_key_is_asked_for_at_a_terminal(tmp_path: Path) -> None:
    store = tmp_path / "store"
    code, screen = at_a_terminal(["-m", "encfs_js", "init", store], ["open sesame", "open sesam"])
    assert code == 11
    assert "not the same" in screen
    assert not store.exists()
    code, screen = at_a_terminal(["-m", "encfs_js", "init", store], ["open sesame", "open sesame"])
    assert code == 0
    code, screen = at_a_terminal(["-m", "encfs_js", "verify", store], ["open sesame"])
    assert code == 0
    assert "sesame" not in screen
    assert encfs_js("verify", store, key="open sesame").returncode == 0


@pytest.mark.mount
@pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-")
def test_status_never_waits_for_a_mount_that_hangs(tmp_path: Path) -> None:
    store, mountpoint = tmp_path / "store", tmp_path / "mnt"
    mounts.init(store)
    with mounts.mounted(store, mountpoint) as mount:
        mount.process.send_signal(signal.SIGSTOP)
        try:
            done = encfs_js("status", mountpoint)
        finally:
            mount.process.send_signal(signal.SIGCONT)
        assert done.returncode == 0
        assert f"process {mount.process.pid} " in done.stdout


AS_NOBODY = """
set -e
mknod -m 666 fuse c 10 229
mount --bind fuse /dev/fuse
exec "$@"
"""
SESSION = """
export JS_KEY=key
set -ex
encfs-js init store
mkdir mnt
encfs-js mount store mnt
echo hello > mnt/file
encfs-js status mnt
sleep 60 < mnt/file &
if encfs-js umount mnt; then exit 1; fi
kill $!
wait $! || true
encfs-js umount mnt
if encfs-js status mnt; then exit 1; fi
encfs-js verify store
encfs-js mount store mnt --no-writeback --log-file log
[ "$(cat mnt/file)" = hello ]
encfs-js umount mnt
"""


@pytest.mark.root
@pytest.mark.mount
@pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-")
@pytest.mark.skipif(
    os.geteuid() != 0, reason="only root can become another user; as a user every test here is this one"
)
def test_a_user_mounts_and_unmounts() -> None:
    """Without privileges, through fusermount3, in a mount namespace with a /dev/fuse that users may open, as udev makes it."""
    with tempfile.TemporaryDirectory(prefix="encfs_js-nobody-") as home:
        os.chown(home, mounts.NOBODY, mounts.NOBODY)
        prefix = mounts.command_as_user(mounts.NOBODY)
        done = subprocess.run(
            ["unshare", "--mount", "bash", "-c", AS_NOBODY, "-", *prefix, "bash", "-c", SESSION],
            cwd=home,
            env={**environment(), "HOME": home},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=mounts.PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        assert "is in use by sleep (pid " in done.stderr
        assert "/mnt unmounted" in (Path(home) / "log").read_text()
