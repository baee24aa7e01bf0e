"""The plain content of single files of stores that nats-server has encrypted: any part, whatever state the store is in."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import server_stores as stores
from test_jetstream import VECTORS, unpack

from encfs_js import serverstore
from encfs_js.backing import Backing
from encfs_js.errors import FormatError, WrongKeyError
from encfs_js.format import Suite
from encfs_js.inspect import walk
from encfs_js.natscodec import hash_key, highwayhash64
from encfs_js.serverstore import Kind

if TYPE_CHECKING:
    from pathlib import Path

    from encfs_js.serverstore import Content

KEYS = [stores.KEY.encode()]
STREAM = "jetstream/$G/streams/SMALL"


def opened(store: Path, path: str, keys: list[bytes] = KEYS) -> Content:
    directory = os.open(os.path.dirname(store / path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        return serverstore.open_content(
            Backing(), directory, os.fsencode(os.path.basename(path)), os.fsencode(path), keys
        )
    finally:
        os.close(directory)


def content(store: Path, path: str, keys: list[bytes] = KEYS) -> bytes:
    found = opened(store, path, keys)
    try:
        whole = bytes(found.read(0, found.size))
        assert len(whole) == found.size
        assert b"".join(bytes(found.read(at, 77)) for at in range(0, found.size + 77, 77)) == whole
        assert bytes(found.read(found.size, 1)) == b""
    finally:
        found.close()
    return whole


def export(store: Path, target: Path, keys: list[bytes] = KEYS) -> dict[str, Suite | None]:
    """Write everything that a plain store would have. Returns what each file was encrypted with."""
    found: dict[str, Suite | None] = {}

    def failed(path: bytes, problem: OSError) -> None:
        raise AssertionError(path) from problem

    for entry in walk(Backing(), str(store), failed):
        path = os.fsdecode(entry.path)
        if os.path.isdir(store / path):
            (target / path).mkdir(parents=True, exist_ok=True)
        elif serverstore.place_of(entry.path).kind is not Kind.KEY:
            (target / path).write_bytes(content(store, path, keys))
            now = opened(store, path, keys)
            found[path] = now.suite
            now.close()
    return found


@pytest.mark.parametrize(
    ("path", "kind", "info", "context", "key", "label"),
    [
        ("jetstream/$G/streams/S/meta.inf", Kind.META, "$G", "S", "meta.key", "S"),
        ("jetstream/$G/streams/S/meta.inf.tmp", Kind.META, "$G", "S", "meta.key", "S"),
        ("$G/streams/S/meta.sum", Kind.SUM, "$G", "S", "meta.key", "S"),
        ("jetstream/$G/streams/.S/msgs/7.blk", Kind.BLOCK, "$G", "S:7", "7.key", "S-7"),
        ("jetstream/$G/streams/S/__msgs__/7.blk.tmp", Kind.BLOCK, "$G", "S:7", "7.key", "S-7"),
        ("jetstream/$G/streams/S/__new_msgs__/7.new", Kind.BLOCK, "$G", "S:7", "7.key", "S-7"),
        ("jetstream/$G/streams/S/msgs/index.db", Kind.INDEX, "$G", "S", "../meta.key", "S"),
        ("jetstream/$G/streams/S/msgs/7.idx", Kind.OLD_INDEX, "$G", "S:7", "7.key", "S-7"),
        ("jetstream/A/streams/S/obs/C/o.dat", Kind.CONSUMER, "A", "S.C", "meta.key", "S/C"),
        ("jetstream/A/streams/S/obs/C/meta.inf", Kind.META, "A", "S.C", "meta.key", "S/C"),
        ("jetstream/A/streams/S/batches/h/meta.inf", Kind.META, "A", "h", "meta.key", "h"),
        ("jetstream/A/streams/S/batches/h/msgs/1.blk", Kind.BLOCK, "A", "h:1", "1.key", "h-1"),
        ("jetstream/$SYS/_js_/R/msgs/1.blk", Kind.BLOCK, "R", "R:1", "1.key", "R-1"),
        ("jetstream/$SYS/_js_/R/obs/C/o.dat", Kind.CONSUMER, "R", "R.C", "meta.key", "R/C"),
    ],
)  # fmt: skip
def test_places(path: str, kind: Kind, info: str, context: str, key: str, label: str) -> None:
    place = serverstore.place_of(path.encode())
    assert place.asset is not None
    assert (place.kind, place.asset.info, place.asset.context, place.key.decode(), place.label) == (
        kind, info, context, key, label
    )  # fmt: skip
    assert place.staged == path.endswith((".tmp", ".new"))


@pytest.mark.parametrize(
    "path",
    [
        "meta.inf",
        "jetstream/$G/meta.inf",
        "jetstream/$G/__snapshots__/snap-x/meta.inf",
        "jetstream/$G/streams/S/msgs/thw.db",
        "jetstream/$G/streams/S/msgs/7.fss",
        "jetstream/$G/streams/S/msgs/x.blk",
        "jetstream/$G/streams/S/obs/C/D/meta.inf",
        "jetstream/$G/streams/S/meta.inf/meta.inf",
        "jetstream/$SYS/_js_/R/peers.idx",
        "jetstream/$SYS/_js_/R/snapshots/snap.1.2",
    ],
)
def test_what_nats_server_never_encrypts(path: str) -> None:
    assert serverstore.place_of(path.encode()) == (Kind.OTHER, None, b"", "", False, 0)


@pytest.mark.parametrize(
    "path", ["S/meta.key", "S/meta.key.tmp", "S/msgs/3.key", "S/msgs/3.key.tmp", "S/obs/C/meta.key"]
)
def test_key_files(path: str) -> None:
    assert serverstore.place_of(f"jetstream/$G/streams/{path}".encode()).kind is Kind.KEY


@pytest.mark.parametrize("name", VECTORS)
def test_a_kept_store_is_the_same_in_the_clear(name: str, tmp_path: Path) -> None:
    vector = unpack(name, tmp_path / "store")
    keys = [vector["key"].encode()]
    was = stores.read(tmp_path / "store" / STREAM, keys)
    suites = export(tmp_path / "store", tmp_path / "plain", keys)
    now = stores.read(tmp_path / "plain" / STREAM, [])
    assert now[:5] == was[:5]
    assert not any(now.encrypted.values())
    assert sum(was.encrypted.values()) <= sum(suite is not None for suite in suites.values())


def meta_of(place: Path) -> bytes:
    return (place / STREAM / "meta.inf").read_bytes()


def test_states_between(tmp_path: Path) -> None:
    """What is in the clear although its key file is there already, and the other way round."""
    vector = unpack("2.15.1-chachapoly", tmp_path / "store")
    unpack("2.15.1-plain", tmp_path / "plain")
    keys = [b"not this one", vector["key"].encode()]
    store = tmp_path / "store"
    blocks = sorted(path.name for path in (store / STREAM / "msgs").glob("*.blk"))
    plain = {name: content(store, f"{STREAM}/{name}", keys) for name in ("meta.inf", "meta.sum", "msgs/index.db")}
    plain |= {f"msgs/{name}": content(store, f"{STREAM}/msgs/{name}", keys) for name in blocks}
    found = opened(store, f"{STREAM}/msgs/{blocks[0]}", keys)
    assert (found.suite, found.key) == (Suite.CHACHAPOLY, 1)
    found.close()
    # The key files are written, and nothing is encrypted yet.
    for name, data in plain.items():
        (store / STREAM / name).write_bytes(data)
    assert {name: content(store, f"{STREAM}/{name}", keys) for name in plain} == plain
    # A block whose key file was not written to its end, in the clear: nothing is lost.
    for name in blocks:
        (store / STREAM / "msgs" / name).with_suffix(".key").write_bytes(b"")
    assert {name: content(store, f"{STREAM}/{name}", keys) for name in plain} == plain


@pytest.mark.parametrize("damage", ["missing", "cut", "foreign"])
def test_a_block_without_its_key_is_refused(damage: str, tmp_path: Path) -> None:
    unpack("2.15.1-chachapoly", tmp_path)
    block = min((tmp_path / STREAM / "msgs").glob("*.blk"))
    key = block.with_suffix(".key")
    if damage == "missing":
        key.unlink()
    elif damage == "cut":
        key.write_bytes(key.read_bytes()[:50])
    else:
        key.write_bytes((tmp_path / STREAM / "meta.key").read_bytes())
    path = f"{STREAM}/msgs/{block.name}"
    with pytest.raises((FormatError, WrongKeyError), match=r"\.key"):
        content(tmp_path, path)
    assert serverstore.size_of(
        Backing(), os.open(block.parent, os.O_RDONLY), block.name.encode(), path.encode(), KEYS
    ) == (block.stat().st_size)


def test_a_wrong_key(tmp_path: Path) -> None:
    unpack("2.15.1-chachapoly", tmp_path)
    for name in ("meta.inf", "msgs/index.db", "msgs/1.blk"):
        with pytest.raises(WrongKeyError, match=r"the key does not open it"):
            content(tmp_path, f"{STREAM}/{name}", [b"another"])
    raw = (tmp_path / STREAM / "meta.sum").read_bytes()
    assert content(tmp_path, f"{STREAM}/meta.sum", [b"another"]) == raw


@pytest.mark.parametrize("name", ["meta.inf", "msgs/index.db", "msgs/1.blk"])
def test_changed_bytes_are_not_given_out(name: str, tmp_path: Path) -> None:
    unpack("2.15.1-chachapoly", tmp_path)
    file = tmp_path / STREAM / name
    raw = bytearray(file.read_bytes())
    for at in range(0, len(raw), 7):
        raw[at] ^= 1
    file.write_bytes(raw)
    with pytest.raises(FormatError, match=name.rpartition("/")[2].replace(".", r"\.")):
        content(tmp_path, f"{STREAM}/{name}")
    if name == "meta.inf":  # and its checksum is not made to fit
        assert content(tmp_path, f"{STREAM}/meta.sum") == (tmp_path / STREAM / "meta.sum").read_bytes()


def test_a_block_with_a_damaged_first_record_is_still_read(tmp_path: Path) -> None:
    unpack("2.15.1-chachapoly", tmp_path)
    file = tmp_path / STREAM / "msgs/1.blk"
    good = content(tmp_path, f"{STREAM}/msgs/1.blk")
    for at in (0, 1, 5, 23):  # its length, its sequence, its subject
        raw = bytearray(file.read_bytes())
        raw[at] ^= 0x40
        file.write_bytes(raw)
        now = content(tmp_path, f"{STREAM}/msgs/1.blk")
        assert [i for i, (a, b) in enumerate(zip(now, good, strict=True)) if a != b] == [at]
        raw[at] ^= 0x40
        file.write_bytes(raw)


def test_symlinks_are_not_followed(tmp_path: Path) -> None:
    unpack("2.15.1-chachapoly", tmp_path / "store")
    stream = tmp_path / "store" / STREAM
    (tmp_path / "outside").write_bytes(b"not of the store")
    (stream / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(OSError, match="symbolic"):
        content(tmp_path / "store", f"{STREAM}/link")
    (tmp_path / "key").write_bytes((stream / "meta.key").read_bytes())
    (stream / "meta.key").unlink()
    (stream / "meta.key").symlink_to(tmp_path / "key")
    with pytest.raises(OSError, match="symbolic"):
        content(tmp_path / "store", f"{STREAM}/meta.inf")
    os.mkfifo(stream / "pipe")
    with pytest.raises(OSError, match="symbolic"):
        content(tmp_path / "store", f"{STREAM}/pipe")


def test_the_hash_of_index_db_is_of_the_plain_one(tmp_path: Path) -> None:
    unpack("2.15.1-chachapoly", tmp_path)
    plain = content(tmp_path, f"{STREAM}/msgs/index.db")
    assert plain[-8:] == highwayhash64(hash_key("SMALL"), plain[:-8])
    assert plain[0] == 11
