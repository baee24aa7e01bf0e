"""The benchmark works: a tiny run gives every figure. What the figures are is no matter for a test."""

import json
import os
import subprocess
import sys

import pytest
from bench import backends, client, loads, meter, report, server

pytestmark = pytest.mark.nats

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def expected(backend):
    if backend == "plain":
        return {name for name in report.FIGURES if not name.endswith("_cpu")}
    return {name for name in report.FIGURES if name != "ceiling.rate"}


@pytest.mark.mount
@pytest.mark.skipif(backends.missing("sealed:aes") != "", reason=backends.missing("sealed:aes"))
def test_a_quick_run_has_every_figure(tmp_path):
    result = tmp_path / "result.json"
    options = ["--quick", "--backend", "plain", "--backend", "sealed:aes", "--directory", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "tests.bench", *options, "--json", str(result)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    measured = json.loads(result.read_text())
    assert measured["failures"] == []
    assert {run["load"] for run in measured["runs"]} == set(loads.LOADS)
    for backend in ("plain", "sealed:aes"):
        rows = {row["figure"]: row for row in measured["figures"] if row["backend"] == backend}
        assert set(rows) == expected(backend)
        for name, row in rows.items():
            # The daemon's CPU seconds for so little work may be less than the clock's tick.
            assert row["value"]["median"] > 0 or name.endswith("_cpu")
            assert row["value"]["min"] <= row["value"]["median"] <= row["value"]["max"]
            assert (row["target"] is None) == ((name, backend) not in report.TARGETS)
            if backend == "sealed:aes" and not name.endswith("_cpu"):
                assert len(row["ratio"]["values"]) == 1
    assert os.listdir(tmp_path) == ["result.json"], "the stores were removed"
    with open("/proc/self/mountinfo") as file:
        assert str(tmp_path) not in file.read(), "the mounts were removed"


def test_a_lost_message_fails_the_run(tmp_path):
    """An ack that is behind what was published means loss, and a benchmark of lost messages is none."""
    store = backends.create("plain", str(tmp_path))
    bodies = client.payloads(64)
    prepared = client.chunks(3_000, bodies, headers=True)
    assert [end for _, end in prepared] == [1024, 2048, 3000]
    prepared[1] = (prepared[1][0].replace(client.encode(bodies[7], headers=True), b"", 1), prepared[1][1])
    with server.running(store) as nats:
        client.stream(nats.port, "CREATE", storage="file")
        with client.connected(nats.port) as connection:
            connection.subscribe(client.ACKS, 1)
            with pytest.raises(meter.RunError, match="sequence 2047 instead of 2048"):
                client.publish(connection, prepared, window=2)
