"""The soak in short: tests/soak.sh runs the long one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mounts
import nats_world as world
import pytest
import soak
import takeover

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.mount,
    pytest.mark.nats,
    pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-"),
    pytest.mark.skipif(bool(takeover.needs_memlock()), reason=takeover.needs_memlock() or "-"),
    pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-"),
]


def test_servers_do_not_notice_that_workers_die(tmp_path: Path) -> None:
    print(soak.soak(tmp_path, kills=18, seed=20261124))
