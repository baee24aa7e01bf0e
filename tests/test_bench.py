"""The benchmark works: a tiny run gives every figure, and a profile. What the figures are is no matter for a test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import mounts
import pytest
from bench import loads

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.nats,
    pytest.mark.mount,
    pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-"),
]
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def test_a_quick_run_has_every_figure(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    options = ["--quick", "--mode", "plain", "--mode", "mount aes", "--directory", str(tmp_path)]
    chosen = [option for load in ("always", "file", "small") for option in ("--load", load)]
    profile = ["--profile", "cprofile", "--profile-directory", str(tmp_path / "profiles")]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", *options, *chosen, *profile, "--json", str(result)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(result.read_text())
    assert measured["failures"] == []
    assert [(run["load"], run["mode"]) for run in measured["runs"]] == [
        (load, mode) for load in ("always", "file", "small") for mode in ("plain", "mount aes")
    ]
    for run in measured["runs"]:
        figures = run["figures"]
        assert (
            set(figures)
            == {
                "always": {"publish-always"},
                "file": {"file.write", "file.read"},
                "small": {f"small.{name}" for name in ("create", "stat_cached", "rename", "unlink", "stat")},
            }[run["load"]]
        )
        assert all(value > 0 for work in figures.values() for name, value in work.items() if "cpu" not in name)
    ratios = [
        row["ratios"] for row in measured["rows"] if row["mode"] == "mount aes" and row["measure"] in ("rate", "time")
    ]
    assert all(len(found) == 1 for found in ratios)
    assert len(ratios) == 8
    assert "function calls" in next((tmp_path / "profiles").glob("small-*.txt")).read_text()
    assert sorted(os.listdir(tmp_path)) == ["profiles", "result.json"], "the stores were removed"
    with open("/proc/self/mountinfo") as file:
        assert str(tmp_path) not in file.read(), "the mounts were removed"


def test_every_load_is_known_by_its_name() -> None:
    assert list(loads.LOADS) == ["publish", "stream", "single", "always", "file", "small"]
    assert not loads.applies("file", "server")
    assert loads.applies("stream", "server")
