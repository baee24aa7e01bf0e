"""Another cipher for new files: one stream whose blocks are sealed with two reads through."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mounts
import nats_world as world
import pytest

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.mount,
    pytest.mark.nats,
    pytest.mark.skipif(bool(mounts.needs_fuse()), reason=mounts.needs_fuse() or "-"),
    pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-"),
]

BLOCKS = "jetstream/$G/streams/SMALL/msgs"


def blocks(store: Path) -> dict[int, str | None]:
    """Block number to the cipher that seals it."""
    paths = (store / BLOCKS).glob("*.blk")
    return {int(path.stem): mounts.suite_of(path) for path in sorted(paths, key=lambda path: int(path.stem))}


@pytest.mark.parametrize("how", ["option", "config"])
@pytest.mark.parametrize(("first", "second"), [("chachapoly", "aes"), ("aes", "chachapoly")])
def test_one_stream_with_blocks_of_both(tmp_path: Path, how: str, first: str, second: str) -> None:
    store, mountpoint, work = tmp_path / "store", tmp_path / "mnt", tmp_path / "work"
    store.mkdir()
    mounts.init(store, cipher=first)
    options = ["--cipher", second]
    if how == "config":
        config = tmp_path / "encfs-js.yaml"
        config.write_text(f"jetstream:\n  cipher: {second}\n")
        options = ["--config", str(config)]
    messages = world.sample("small", 240, size=500)
    stored = [world.Stored(seq, *message) for seq, message in enumerate(messages, 1)]

    # With max_bytes below 128,000 the server makes blocks of 32,000 bytes: each half fills one and a bit.
    with mounts.mounted(store, mountpoint), world.serving(mountpoint, work) as server:
        world.add_stream(server, "SMALL", "small.>", max_bytes=120_000)
        world.publish(server, messages[:120])
    old = blocks(store)
    assert len(old) >= 2
    assert set(old.values()) == {first}

    with mounts.mounted(store, mountpoint, *options), world.serving(mountpoint, work) as server:
        assert world.read(server, "SMALL") == stored[:120]
        world.publish(server, messages[120:])
        assert world.read(server, "SMALL") == stored
        server.restart(kill=True)
        assert world.read(server, "SMALL") == stored
    both = blocks(store)
    assert {number: both[number] for number in old} == old, "a file keeps its cipher"
    assert {suite for number, suite in both.items() if number not in old} == {second}
    assert mounts.unsealed(store) == []

    with mounts.mounted(store, mountpoint), world.serving(mountpoint, work) as server:
        assert world.read(server, "SMALL") == stored
    mounts.verify(store)
