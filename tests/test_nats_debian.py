"""Debian's nats-server (2.9 in bookworm) keeps its older store format on the mount as well."""

from __future__ import annotations

import os
import subprocess
from typing import TYPE_CHECKING

import mounts
import nats_world as world
import pytest

if TYPE_CHECKING:
    from pathlib import Path

BINARY = next((path for path in ("/usr/sbin/nats-server", "/usr/bin/nats-server") if os.access(path, os.X_OK)), "")
MARKER = b"a payload that an older server keeps"


@pytest.mark.mount
@pytest.mark.nats
@pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-")
@pytest.mark.skipif(not BINARY, reason="the distribution's nats-server is not installed")
def test_distribution_server(tmp_path: Path) -> None:
    version = subprocess.run([BINARY, "--version"], capture_output=True, text=True, timeout=mounts.PATIENCE).stdout
    print(version)
    store, mountpoint, work = tmp_path / "store", tmp_path / "mnt", tmp_path / "work"
    store.mkdir()
    mounts.init(store)
    messages = world.sample("orders", 2000, marker=MARKER)
    stored = [world.Stored(seq, *message) for seq, message in enumerate(messages, 1)]
    with mounts.mounted(store, mountpoint), world.serving(mountpoint, work, binary=BINARY) as server:
        world.add_stream(server, "ORDERS", "orders.>")
        world.publish(server, messages)
        world.add_durable(server, "ORDERS", "worker")
        assert world.consume(server, "ORDERS", "worker", 500) == stored[:500]
        server.restart()
        assert world.read(server, "ORDERS") == stored
        server.restart(kill=True)
        assert world.read(server, "ORDERS") == stored
        assert world.consumer_state(server, "ORDERS", "worker") == (500, 0, 1500)
    assert mounts.unsealed(store) == []
    assert mounts.holding(store, MARKER) == []
    mounts.verify(store)

    # Its successor takes the store over, on the same mount.
    if not world.needs_server():
        with mounts.mounted(store, mountpoint), world.serving(mountpoint, work) as server:
            assert world.read(server, "ORDERS") == stored
        mounts.verify(store)
