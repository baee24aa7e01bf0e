"""Long random work on files of the mount gives back what was put in: see fsx.py."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
from typing import TYPE_CHECKING

import fsx
import mounts
import pytest
from fsx import Exerciser, MismatchError, Options, page_edges

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

fuse = pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-")


# --- the exerciser itself -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
def test_a_plain_file_passes(seed: int, tmp_path: Path) -> None:
    exerciser = Exerciser(str(tmp_path / "f"), seed, Options(size=70_000, edges=page_edges(70_000)))
    exerciser.open(new=True)
    with contextlib.closing(exerciser):
        exerciser.run(1500)
        exerciser.check()


@pytest.mark.parametrize("fault", ["byte", "cut", "longer"])
def test_a_fault_is_found(fault: str, tmp_path: Path) -> None:
    """One byte that changes, or a size, is found within a read of everything, and told with what touched it."""
    path = tmp_path / "f"
    exerciser = Exerciser(str(path), 3, Options(size=70_000))
    exerciser.open(new=True)
    with contextlib.closing(exerciser):
        exerciser.run(300)
        exerciser.put("write", 1000, 2000)
        with open(path, "r+b") as file:
            match fault:
                case "byte":
                    file.seek(1234)
                    byte = file.read(1)[0]
                    file.seek(1234)
                    file.write(bytes([byte ^ 1]))
                case "cut":
                    file.truncate(len(exerciser.model) - 1)
                case "longer":
                    file.truncate(len(exerciser.model) + 1)
        with pytest.raises(MismatchError) as told:
            exerciser.check()
        if fault == "byte":
            assert "from 1234 to 1234" in str(told.value)
            assert "write 1000 2000" in str(told.value).split("the last operations")[0]


def test_the_same_seed_makes_the_same_operations(tmp_path: Path) -> None:
    stories = []
    for name in ("one", "two"):
        exerciser = Exerciser(str(tmp_path / name), 7)
        exerciser.open(new=True)
        with contextlib.closing(exerciser):
            exerciser.run(200)
        stories.append((list(exerciser.last), bytes(exerciser.model)))
    assert stories[0] == stories[1]


# --- the mount ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mount(tmp_path_factory: pytest.TempPathFactory) -> Iterator[mounts.Mount]:
    base = tmp_path_factory.mktemp("fsx")
    mounts.init(base / "store")
    with mounts.mounted(base / "store", base / "mount") as mount:
        yield mount
    assert mounts.verify(base / "store")


@pytest.mark.parametrize(
    ("size", "length", "edges"),
    [
        (4100, 300, True),  # one page and the end mark
        (8200, 8200, True),
        (40_000, 20_000, True),
        (300_000, 70_000, False),
        (3_000_000, 300_000, False),
    ],
)
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.mount
@fuse
def test_one_file(size: int, length: int, edges: bool, seed: int, mount: mounts.Mount) -> None:
    options = Options(size=size, length=length, edges=page_edges(size) if edges else ())
    exerciser = Exerciser(str(mount.path / f"f-{size}-{seed}"), seed * 1000 + size, options)
    exerciser.open(new=True)
    with contextlib.closing(exerciser):
        exerciser.run(1200 if size < 1_000_000 else 200)
        exerciser.check()


@pytest.mark.parametrize("options", ["-R", "-W", "-RW"])
@pytest.mark.mount
@fuse
def test_without_mappings(options: str, mount: mounts.Mount) -> None:
    command = [
        sys.executable,
        fsx.__file__,
        str(mount.path / f"f{options}"),
        "-N",
        "1500",
        "-S",
        "5",
        "-l",
        "50000",
    ]
    done = subprocess.run([*command, "-x", options], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.mount
@fuse
def test_several_processes_on_several_files(mount: mounts.Mount) -> None:
    """At once, as the kernel then has requests of several files under way."""
    children = [
        subprocess.Popen(
            [
                sys.executable,
                fsx.__file__,
                str(mount.path / f"p{seed}"),
                "-N",
                "1500",
                "-S",
                str(seed),
                "-l",
                "120000",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for seed in range(4)
    ]
    told = [child.communicate(timeout=250)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0, 0, 0], "\n".join(told)


@pytest.mark.parametrize(
    ("cipher", "option"),
    [("chachapoly", "--writeback"), ("aes", "--no-writeback")],
    ids=["chachapoly", "aes"],
)
@pytest.mark.mount
@fuse
def test_several_files_and_remounts(cipher: str, option: str, tmp_path: Path) -> None:
    """Files of several sizes in turns; now and then the store is unmounted cleanly, verified, mounted again, read."""
    store, path = tmp_path / "store", tmp_path / "mount"
    mounts.init(store, cipher=cipher)
    dice = random.Random(11)
    exercisers = [
        Exerciser(str(path / f"f{n}"), n, Options(size=size, length=size // 2, edges=page_edges(size)))
        for n, size in enumerate((4100, 8200, 20_000, 100_000, 500_000))
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mounts.mounted(store, path, option))

        def remount() -> None:
            stack.pop_all().close()
            assert mounts.verify(store)
            assert mounts.unsealed(store) == []
            stack.enter_context(mounts.mounted(store, path, option))

        for exerciser in exercisers:
            exerciser.open(new=True)
        try:
            fsx.run_together(exercisers, 900, dice=dice, remount=remount, every=300)
        finally:
            for exerciser in exercisers:
                exerciser.close()
