"""Who uses a store: nats-server with files open or none, mounts, anybody who stands in it."""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import mounts
import nats_world as world
import pytest

from encfs_js import inuse
from encfs_js.errors import StoreBusyError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

needs_server = pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-")
needs_fuse = pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-")


@contextlib.contextmanager
def running(*command: str | Path, cwd: Path | None = None, ready: bytes = b"") -> Iterator[subprocess.Popen[bytes]]:
    """A process for the block. ready: what it prints when it has come so far."""
    process = subprocess.Popen(
        [str(word) for word in command],
        cwd=cwd,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin
    assert process.stdout
    try:
        if ready:
            assert process.stdout.readline().strip() == ready
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def python(
    code: str, *arguments: str | Path, **options: object
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    code = f"import mmap, os, sys\n{code}\nprint('ready', flush=True)\nsys.stdin.read()"
    return running(sys.executable, "-c", code, *arguments, ready=b"ready", **options)  # type: ignore[arg-type]


def busy(directory: Path, pid: int, how: str) -> None:
    found = list(inuse.users(os.path.realpath(directory)))
    assert [user.pid for user in found] == [pid], found
    assert how in found[0].how
    with pytest.raises(StoreBusyError, match=rf"is in use by process {pid} \(.*\): .*") as caught:
        inuse.check_unused(str(directory))
    assert caught.value.hint


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "store/jetstream").mkdir(parents=True)
    (tmp_path / "store/jetstream/file").write_bytes(bytes(10_000))
    return tmp_path / "store"


def test_nobody(store: Path) -> None:
    inuse.check_unused(str(store))
    inuse.check_unused(str(store), {path.stat().st_ino for path in store.rglob("*")})


def test_open_files_directories_and_maps(store: Path) -> None:
    file = store / "jetstream/file"
    with python("f = open(sys.argv[1])", file) as child:
        busy(store, child.pid, "/jetstream/file open")
        inuse.check_unused(str(store.parent / "sto"))  # a name that only begins the same
    with python("d = os.open(sys.argv[1], os.O_RDONLY)", store) as child:
        busy(store, child.pid, "open")
    with python("os.chdir(sys.argv[1])", store / "jetstream") as child:
        busy(store, child.pid, "it stands in")
    code = "f = open(sys.argv[1], 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); f.close(); os.closerange(3, 100)"
    with python(code, file) as child:
        busy(store, child.pid, "mapped")
    with python("f = open(sys.argv[1]); os.unlink(sys.argv[1])", file) as child:
        busy(store, child.pid, "open")
    inuse.check_unused(str(store))


def test_the_shell_that_stands_there_is_no_user(store: Path) -> None:
    """`cd STORE; encfs-js convert . ../new` works; what the shell has started besides counts."""
    code = f"from encfs_js import inuse; inuse.check_unused({str(store)!r}); print('free')"
    done = subprocess.run(
        ["sh", "-c", f'{sys.executable} -c "$0"; true', code],
        cwd=store, env={**os.environ, "PYTHONPATH": mounts.ROOT}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.stdout == "free\n", done.stderr


@pytest.mark.root
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare")
def test_a_container_has_other_names_for_the_same_files(store: Path, tmp_path: Path) -> None:
    """The file is open under a name that does not lead to it from here: its inode number tells."""
    (tmp_path / "inside").mkdir()
    script = 'mount --bind "$1" "$2" && cd / && exec 9<"$2/jetstream/file" && echo ready && read _'
    with running("unshare", "-m", "--", "sh", "-c", script, "sh", store, tmp_path / "inside", ready=b"ready") as child:
        inodes = {path.stat().st_ino for path in store.rglob("*")}
        found = list(inuse.users(str(store), inodes))
        assert [user.pid for user in found] == [child.pid]
        assert "open" in found[0].how
        assert not list(inuse.users(str(tmp_path / "inside" / "no"), {1 << 40}))


@needs_server
@pytest.mark.nats
@pytest.mark.parametrize("inodes", [True, False])
def test_a_server_at_work(inodes: bool, tmp_path: Path) -> None:
    with world.serving(tmp_path / "store", tmp_path / "work") as server:
        world.add_stream(server, "ORDERS", "ORDERS.>")
        world.publish(server, world.sample("ORDERS", 3))
        assert server.process is not None
        busy(tmp_path / "store", server.process.pid, "open")
        known = {p.stat().st_ino for p in (tmp_path / "store").rglob("*")} if inodes else set()
        assert [user.pid for user in inuse.users(str(tmp_path / "store"), known)] == [server.process.pid]
    inuse.check_unused(str(tmp_path / "store"))


@needs_server
@pytest.mark.nats
@pytest.mark.parametrize("how", ["config", "include", "variable", "bare", "option", "equals", "relative", "symlink"])
def test_an_idle_server_has_nothing_open(how: str, store: Path, tmp_path: Path) -> None:
    """It is known by its command line and its configuration."""
    named = json.dumps(str(store))
    texts = {
        "config": f"jetstream {{ store_dir: {named} }}",
        "include": "include 'more.conf'",
        "variable": f"WHERE = {named}\njetstream: {{ store_dir = $WHERE }}",
        "bare": f"# store_dir: /elsewhere\njetstream {{\n  max_mem: 1MB, storedir {store}\n}}",
        "relative": 'jetstream { store_dir: "store" }',
        "symlink": f"jetstream {{ store_dir: {json.dumps(str(tmp_path / 'link'))} }}",
    }
    (tmp_path / "link").symlink_to(store)
    (tmp_path / "more.conf").write_text(f"jetstream {{ store_dir: {named} }}")
    (tmp_path / "nats.conf").write_text("host: 127.0.0.1\nport: -1\n" + texts.get(how, ""))
    options = {"option": ["-js", "-sd", str(store)], "equals": ["--jetstream", f"--store_dir={store}"]}
    work = tmp_path / "ports"
    work.mkdir()
    command = [world.BINARY, "-c", "nats.conf", "--ports_file_dir", str(work), *options.get(how, [])]
    with running(*command, cwd=tmp_path) as child:
        mounts.until(lambda: list(work.glob(f"*_{child.pid}.ports")), "nats-server start")
        busy(store, child.pid, "its store_dir is")
        busy(store / "jetstream", child.pid, "its store_dir is")
        busy(tmp_path, child.pid, "it stands in")
        inuse.check_unused(str(work))
        said = mounts.run("convert", store, tmp_path / "new", "--from", "plain", "--to", "plain", code=18).stderr
        assert f"process {child.pid} (nats-server)" in said
        assert "Stop nats-server" in said
        assert not (tmp_path / "new").exists()
    inuse.check_unused(str(store))


@needs_fuse
@pytest.mark.mount
def test_mounts(tmp_path: Path) -> None:
    store, mountpoint = tmp_path / "store", tmp_path / "in" / "mnt"
    mounts.init(store)
    with mounts.mounted(store, mountpoint):
        for place in (store, mountpoint, tmp_path / "in"):
            with pytest.raises(StoreBusyError, match="is in use") as caught:
                inuse.check_unused(str(place))
            assert f"encfs-js umount {mountpoint}" in caught.value.hint
        with pytest.raises(StoreBusyError, match="is mounted at"):
            inuse.check_unused(str(store), lock=False)
        said = mounts.run("convert", store, tmp_path / "new", "--from", "sealed", "--to", "plain", code=18).stderr
        assert "in use by process" in said
    inuse.check_unused(str(store))


def test_the_maps_of_this_process_do_not_count(store: Path) -> None:
    with open(store / "jetstream/file", "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
        inuse.check_unused(str(store))
