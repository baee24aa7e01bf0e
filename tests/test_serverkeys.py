"""What nats-server has encrypted itself is read as what it was; a wrong key and a changed file are told."""

from __future__ import annotations

import re
import shutil
import struct
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import fips_host
import make_server_vectors as maker
import mounts
import nats_world as world
import pytest
import server_stores as stores
from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from hypothesis import given
from hypothesis import strategies as st
from sealed_files import examples

from encfs_js import jetstream, serverkeys, serverstate
from encfs_js.errors import CipherMissingError, EncfsError, FormatError, WrongKeyError
from encfs_js.format import Suite
from encfs_js.natscodec import hash_key, highwayhash64

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

needs_server = pytest.mark.skipif(bool(world.needs_server()), reason=world.needs_server() or "-")
KEYS = [stores.KEY.encode()]
STREAMS = "jetstream/$G/streams"
ENCRYPTED = ["chachapoly", "aes"]


@dataclass
class Made:
    """A store that was filled, and what the server said of it just before it was stopped."""

    path: Path
    live: dict[str, stores.Live] = field(default_factory=dict)

    def stream(self, name: str) -> Path:
        return self.path / STREAMS / name


@pytest.fixture(scope="module", params=stores.MODES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Made]:
    return request.param, make(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module", params=ENCRYPTED)
def sealed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Made]:
    return request.param, make(tmp_path_factory.mktemp(request.param), request.param)


_made: dict[str, Made] = {}


def make(place: Path, mode: str) -> Made:
    if mode not in _made:
        store = place / "store"
        with world.serving(store, place / "work", **stores.MODES[mode]) as server:
            stores.fill(server)
            _made[mode] = Made(store, stores.ask(server))
    return _made[mode]


# --- real stores ------------------------------------------------------------------------------------------------------


@pytest.mark.nats
@needs_server
def test_everything_is_read_as_it_was(made: tuple[str, Made]) -> None:
    mode, store = made
    assert set(store.live) == {"ORDERS", "LOG", "MANY", "PURGED", "EMPTIED", "KV_settings"}
    for name, live in store.live.items():
        found = stores.read(store.stream(name), [b"another one", *KEYS])
        assert found.messages == live.messages, name
        assert found.meta["name"] == name
        assert found.index.version == 4
        assert found.index.messages == live.state["messages"]
        assert found.index.size == live.state["bytes"]
        assert (found.index.first_seq, found.index.last_seq) == (live.state["first_seq"], live.state["last_seq"])
        assert len(found.index.subjects) == live.state.get("num_subjects", 0)
        assert sum(subject.total for subject in found.index.subjects) == len(live.messages)
        assert {s.name.decode() for s in found.index.subjects} == {message.subject for message in live.messages}
        seconds = [record.time // 10**9 for record in found.records]
        assert seconds == sorted(seconds) or any(record.tombstone for record in found.records)
        assert set(found.encrypted.values()) == {mode != "plain"}
        assert set(found.keys.values()) == (set() if mode == "plain" else {1})
        assert set(found.consumers) == set(live.consumers)
    assert bool(mounts.holding(store.path, stores.MARKER)) == (mode == "plain")


@pytest.mark.nats
@needs_server
def test_the_consumer_is_read_as_it_was(made: tuple[str, Made]) -> None:
    _, store = made
    config, state = stores.read(store.stream("ORDERS"), KEYS).consumers["worker"]
    live = store.live["ORDERS"].consumers["worker"]
    assert config["durable_name"] == config["Name"] == "worker"
    assert state.version == 2
    assert state.ack_floor == (live["ack_floor"]["consumer_seq"], live["ack_floor"]["stream_seq"])
    assert state.delivered == (live["delivered"]["consumer_seq"], live["delivered"]["stream_seq"])
    assert state.delivered > (30, 32), "two of the first messages are deleted"
    assert len(state.pending) == live["num_ack_pending"] > 10
    assert all(state.ack_floor.stream < seq <= state.delivered.stream for seq in state.pending)
    assert len({pending.seq for pending in state.pending.values()}) == len(state.pending)
    assert len({pending.time for pending in state.pending.values()}) < 30
    assert len(state.redelivered) == live["num_redelivered"] == 1
    assert set(state.redelivered) < set(state.pending)


@pytest.mark.nats
@needs_server
def test_what_the_stores_hold_is_what_the_tests_are_about(made: tuple[str, Made]) -> None:
    """Compressed blocks, tombstones, deleted sequences in the index, gaps: without them the tests above prove little."""
    mode, store = made
    log = store.stream("LOG")
    assert len(stores.blocks(log)) >= 3
    found = stores.read(log, KEYS)
    on_disk = sum((log / f"msgs/{number}.blk").stat().st_size for number in stores.blocks(log))
    assert on_disk < sum(record.length for record in found.records) / 2
    assert store.live["LOG"].state["first_seq"] > 1
    purged = stores.read(store.stream("PURGED"), KEYS)
    assert any(record.tombstone for record in purged.records)
    deleted = {seq for block in purged.index.blocks for seq in serverstate.deleted_sequences(block)}
    assert deleted
    assert deleted <= set(store.live["PURGED"].state["deleted"])
    assert stores.read(store.stream("EMPTIED"), KEYS).messages == []
    orders = stores.read(store.stream("ORDERS"), KEYS)
    erased = any(record.erased for record in orders.records)
    assert erased == (mode == "plain"), "with encryption nats-server does not erase"


@pytest.mark.nats
@needs_server
@pytest.mark.parametrize("name", ["meta.key", "msgs/1.key", "obs/worker/meta.key"])
def test_a_wrong_key_is_told(sealed: tuple[str, Made], name: str) -> None:
    _, store = sealed
    directory = store.stream("ORDERS")
    asset = assets("ORDERS")[name]
    raw = (directory / name).read_bytes()
    assert serverkeys.open_key_file(raw, asset, KEYS, name).key == 0
    for keys in ([b"wrong"], [b"wrong", b"wrong, too"], []):
        with pytest.raises(WrongKeyError) as told:
            serverkeys.open_key_file(raw, asset, keys, name)
        assert str(told.value).startswith(f"{name}: ")
        assert "wrong" not in str(told.value) + told.value.hint
    other = assets("LOG")[name]
    with pytest.raises(WrongKeyError):
        serverkeys.open_key_file(raw, other, KEYS, name)
    for size in (0, 20, len(raw) - 1, len(raw) + 1):
        with pytest.raises(FormatError, match=rf"^{name}: not a key file of nats-server \({size} bytes\)$"):
            serverkeys.open_key_file((raw * 2)[:size], asset, KEYS, name)


def assets(stream: str) -> dict[str, serverkeys.Asset]:
    own = serverkeys.stream("$G", stream)
    return {"meta.key": own, "msgs/1.key": own.block(1), "obs/worker/meta.key": own.consumer("worker")}


@pytest.mark.nats
@needs_server
@pytest.mark.parametrize(
    "name",
    [
        *("meta.key", "meta.inf", "meta.sum", "msgs/index.db", "msgs/1.key", "msgs/1.blk"),
        *("obs/worker/meta.key", "obs/worker/meta.inf", "obs/worker/meta.sum", "obs/worker/o.dat"),
    ],
)
def test_a_flipped_bit_is_told(sealed: tuple[str, Made], tmp_path: Path, name: str) -> None:
    """Any bit of any byte: of every byte of the small files, of every 97th of the large ones."""
    _, store = sealed
    directory = tmp_path / "ORDERS"
    shutil.copytree(store.stream("ORDERS"), directory)
    stores.read(directory, KEYS)
    raw = (directory / name).read_bytes()
    for at in range(0, len(raw), max(1, len(raw) // 40)):
        (directory / name).write_bytes(flipped(raw, at, at % 8))
        with pytest.raises((FormatError, WrongKeyError)) as told:
            stores.read(directory, KEYS)
        culprit = name.replace("meta.sum", "meta.inf")
        assert str(told.value).startswith(f"{directory / culprit}: "), told.value
        assert told.value.hint
    (directory / name).write_bytes(raw)
    stores.read(directory, KEYS)


def flipped(raw: bytes, at: int, bit: int) -> bytes:
    changed = bytearray(raw)
    changed[at] ^= 1 << bit
    return bytes(changed)


@pytest.mark.nats
@needs_server
def test_a_flipped_bit_in_a_block_is_placed(sealed: tuple[str, Made]) -> None:
    """The record hash finds it, and the records before it are read."""
    _, store = sealed
    raw = (store.stream("ORDERS") / "msgs/1.blk").read_bytes()
    seed = serverkeys.open_key_file(
        (store.stream("ORDERS") / "msgs/1.key").read_bytes(), assets("ORDERS")["msgs/1.key"], KEYS, "1.key"
    )
    keystream = serverkeys.Keystream(seed)
    plain = jetstream.plain_block(raw, keystream, "ORDERS-1", "1.blk")[0]
    good = list(jetstream.records(plain, "ORDERS-1", "1.blk"))
    for record in (good[1], good[50], good[-1]):
        damaged = flipped(raw, record.offset + record.length - 12, 3)
        block, encrypted = jetstream.plain_block(damaged, keystream, "ORDERS-1", "1.blk")
        assert encrypted
        found: list[jetstream.Record] = []
        with pytest.raises(
            FormatError, match=rf"^1\.blk: byte {record.offset}: a record that does not match its hash$"
        ):
            found.extend(jetstream.records(block, "ORDERS-1", "1.blk"))
        found = []
        reading: Iterator[jetstream.Record] = jetstream.records(block, "ORDERS-1", "1.blk")
        while len(found) < good.index(record):
            found.append(next(reading))
        assert found == good[: good.index(record)]


# --- mixed stores -----------------------------------------------------------------------------------------------------


@dataclass
class Rekeyed(world.Server):
    """A server that is told the key of before."""

    prev_key: str = ""

    def configuration(self) -> str:
        return super().configuration().replace("jetstream { ", f'jetstream {{ prev_key: "{self.prev_key}", ')


@pytest.mark.nats
@needs_server
def test_a_store_that_is_half_encrypted(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> None:
    """A plain store after its first run with a key."""
    store = make(tmp_path_factory.mktemp("plain"), "plain")
    shutil.copytree(store.path, tmp_path / "store")
    with world.serving(tmp_path / "store", tmp_path / "work", **stores.MODES["chachapoly"]) as server:
        world.publish(server, world.sample("ORDERS", 10, tag="late"))
    for name in ("MANY", "LOG"):
        found = stores.read(tmp_path / "store" / STREAMS / name, KEYS)
        assert found.messages == store.live[name].messages
        assert found.encrypted["meta.inf"]
        assert not found.encrypted["index.db"], "the server writes it in the clear once more"
        assert found.encrypted[f"{stores.blocks(store.stream(name))[-1]}.blk"]
    orders = stores.read(tmp_path / "store" / STREAMS / "ORDERS", KEYS)
    assert len(orders.messages) == len(store.live["ORDERS"].messages) + 10
    assert orders.messages[:-10] == store.live["ORDERS"].messages
    assert orders.consumers["worker"][0]["durable_name"] == "worker"


@pytest.mark.nats
@needs_server
@pytest.mark.parametrize("cipher", ENCRYPTED)
def test_a_store_whose_key_and_cipher_were_changed(sealed: tuple[str, Made], tmp_path: Path, cipher: str) -> None:
    """With prev_key nats-server converts streams and blocks, and leaves consumers under the key of before."""
    _, store = sealed
    shutil.copytree(store.path, tmp_path / "store")
    server = Rekeyed(tmp_path / "store", tmp_path / "work", key="a new key", cipher=cipher, prev_key=stores.KEY)
    try:
        server.start()
        live = stores.ask(server)
        server.stop()
    finally:
        server.kill()
    found = stores.read(tmp_path / "store" / STREAMS / "ORDERS", [b"a new key", *KEYS])
    assert found.messages == store.live["ORDERS"].messages == live["ORDERS"].messages
    assert found.keys == {"meta.key": 0, "1.key": 0, "worker/meta.key": 1}
    assert set(found.encrypted.values()) == {True}
    assert found.consumers == stores.read(store.stream("ORDERS"), KEYS).consumers
    with pytest.raises(WrongKeyError, match=r"obs/worker/meta\.key: the key does not open it"):
        stores.read(tmp_path / "store" / STREAMS / "ORDERS", [b"a new key"])


@pytest.mark.nats
@needs_server
def test_plain_blocks_among_encrypted_ones(sealed: tuple[str, Made], tmp_path: Path) -> None:
    """One without a key file, one whose key file is there already, and a plain index.db; then no meta.key at all."""
    _, store = sealed
    directory = tmp_path / "MANY"
    shutil.copytree(store.stream("MANY"), directory)
    asset = serverkeys.stream("$G", "MANY")
    first, second, *_ = stores.blocks(directory)
    for number in (first, second):
        block, key = directory / f"msgs/{number}.blk", directory / f"msgs/{number}.key"
        seed = stores.key_file(key, asset.block(number), KEYS)
        assert seed is not None
        block.write_bytes(serverkeys.Keystream(seed).xor(block.read_bytes()))
        if number == first:
            key.unlink()
    seed = stores.key_file(directory / "meta.key", asset, KEYS)
    index = directory / "msgs/index.db"
    body, _ = serverstate.open_index(index.read_bytes(), seed, "MANY", "index.db")
    index.write_bytes(body + highwayhash64(hash_key("MANY"), body))
    found = stores.read(directory, KEYS)
    assert found.messages == store.live["MANY"].messages
    assert [name for name, encrypted in found.encrypted.items() if not encrypted] == [
        *("index.db", f"{first}.blk", f"{second}.blk")
    ]
    assert seed is not None
    plain = serverkeys.open_file((directory / "meta.inf").read_bytes(), seed, "meta.inf")
    (directory / "meta.inf").write_bytes(plain)
    (directory / "meta.sum").write_text(highwayhash64(hash_key("MANY"), plain).hex())
    (directory / "meta.key").unlink()
    assert stores.read(directory, KEYS).messages == store.live["MANY"].messages


@pytest.mark.nats
@needs_server
def test_a_key_file_beside_a_plain_block(sealed: tuple[str, Made]) -> None:
    """What a crash leaves between the two: the block is taken as it is."""
    _, store = sealed
    for name in ("ORDERS", "LOG"):
        directory = store.stream(name)
        number = stores.blocks(directory)[0]
        seed = stores.key_file(directory / f"msgs/{number}.key", serverkeys.stream("$G", name).block(number), KEYS)
        assert seed is not None
        keystream, label = serverkeys.Keystream(seed), jetstream.block_name(name, number)
        raw = (directory / f"msgs/{number}.blk").read_bytes()
        plain, encrypted = jetstream.plain_block(raw, keystream, label, "x")
        assert encrypted
        assert jetstream.plain_block(keystream.xor(raw), keystream, label, "x") == (plain, False)
        assert jetstream.plain_block(plain, keystream, label, "x") == (plain, False)
        assert jetstream.plain_block(plain, None, label, "x") == (plain, False)
    assert jetstream.plain_block(b"", keystream, label, "x") == (b"", True)


# --- ciphers ----------------------------------------------------------------------------------------------------------


def test_hchacha20_published() -> None:
    """draft-irtf-cfrg-xchacha-03, section 2.2.1."""
    key = bytes(range(32))
    nonce = bytes.fromhex("000000090000004a0000000031415927")
    published = "82413b4227b27bfed30e42508a877d73a0f9e4d58a74a853c12ec41326d3ecdc"
    assert serverkeys._hchacha20(key, nonce).hex() == published


def test_xchacha20_poly1305_published() -> None:
    """The same draft, appendix A.3.1: its cipher text, whose tag is about additional data that nats-server never has."""
    key = bytes(range(0x80, 0xA0))
    nonce = bytes(range(0x40, 0x58))
    text = b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the future, sunscreen would be it."
    sealed = bytes.fromhex(
        "bd6d179d3e83d43b9576579493c0e939572a1700252bfaccbed2902c21396cbb731c7f1b0b4aa6440bf3a82f4eda7e39ae64c6708c54c216"
        "cb96b72e1213b4522f8c9ba40db5d945b11b69b982c1bb9e3f3fac2bc369488f76b2383565d3fff921f9664c97637da9768812f615c68b13b52e"
    )
    keystream = serverkeys.Keystream(serverkeys.Seed(Suite.CHACHAPOLY, nonce, key))
    assert keystream.xor(sealed, 64) == text, "an AEAD's keystream begins with block 1"


@given(
    st.sampled_from(list(Suite)),
    st.binary(min_size=32, max_size=32),
    st.sampled_from([bytes(24), b"\xff" * 24, bytes(range(24))]),
    st.integers(0, 500),
    st.integers(0, 500),
)
@examples(150)
def test_any_part_of_a_block(suite: Suite, key: bytes, nonce: bytes, start: int, size: int) -> None:
    keystream = serverkeys.Keystream(serverkeys.Seed(suite, nonce[: serverkeys.NONCES[suite]], key))
    whole = keystream.xor(bytes(1000))
    assert keystream.xor(bytes(size), start) == whole[start : start + size]
    assert keystream.xor(whole) == bytes(1000)
    with pytest.raises(ValueError, match="a block of"):
        keystream.xor(b"x", serverkeys.MAX_STREAM)


def test_names_go_into_the_key_without_a_separator() -> None:
    """As nats-server has it: two assets may share a key. What is read must not depend on which one it was."""
    mine, other = serverkeys.stream("A", "BC"), serverkeys.stream("AB", "C")
    assert serverkeys.wrapping_key(b"k", mine) == serverkeys.wrapping_key(b"k", other)
    assert serverkeys.wrapping_key(b"k", serverkeys.raft_group("S")) == serverkeys.wrapping_key(
        b"k", serverkeys.stream("S", "S")
    )
    assert serverkeys.stream("A", "S").block(7).context == "S:7"
    assert serverkeys.stream("A", "S").consumer("c").context == "S.c"


def test_nothing_shows_a_key() -> None:
    seed = serverkeys.Seed(Suite.AES, bytes(16), b"secret seed")
    assert "secret" not in repr(seed) + str(seed)
    keystream = serverkeys.Keystream(serverkeys.Seed(Suite.AES, bytes(16), b"secret" + bytes(26)))
    assert "secret" not in repr(keystream)


@pytest.mark.parametrize("problem", [InternalError("no", []), UnsupportedAlgorithm("no")])
def test_a_cipher_that_openssl_refuses_is_told(monkeypatch: pytest.MonkeyPatch, problem: Exception) -> None:
    def refuse(*_: object) -> None:
        raise problem

    for name in ("ChaCha20Poly1305", "AESGCM"):
        monkeypatch.setattr(serverkeys, name, refuse)
    for size, suite in serverkeys.KEY_FILES.items():
        with pytest.raises(CipherMissingError, match=suite.label) as told:
            serverkeys.open_key_file(bytes(size), serverkeys.stream("A", "S"), [b"k"], "x")
        assert told.value.hint
    monkeypatch.setattr(serverkeys.algorithms, "ChaCha20", refuse)
    with pytest.raises(CipherMissingError):
        serverkeys.Keystream(serverkeys.Seed(Suite.CHACHAPOLY, bytes(24), bytes(32)))


@given(st.binary(max_size=150), st.sampled_from(list(Suite)), st.sampled_from([0, 64, 72]))
@examples(200)
def test_anything_as_a_key_file_or_metafile(raw: bytes, suite: Suite, size: int) -> None:
    seed = serverkeys.Seed(suite, bytes(serverkeys.NONCES[suite]), bytes(32))
    with pytest.raises(EncfsError, match=r"^some/file: "):
        serverkeys.open_key_file((raw + bytes(size))[: size or None], serverkeys.stream("A", "S"), KEYS, "some/file")
    with pytest.raises(EncfsError, match=r"^some/file: does not authenticate$"):
        serverkeys.open_file(raw, seed, "some/file")
    plain = struct.pack("<3I", 30, 0, 0) + raw
    try:
        block, _ = jetstream.plain_block(plain, serverkeys.Keystream(seed), "S-1", "some/file")
        told = "".join(str(record) for record in jetstream.records(block, "S-1", "some/file"))
    except FormatError as problem:
        told = str(problem)
    assert re.match(r"some/file: byte \d+: ", told)


# --- FIPS -------------------------------------------------------------------------------------------------------------

READS = """
import base64, json, sys
from encfs_js import serverkeys
from encfs_js.errors import EncfsError
for path in {paths}:
    vector = json.load(open(path))
    raw = base64.b64decode(vector["files"]["jetstream/$G/streams/SMALL/meta.key"])
    meta = base64.b64decode(vector["files"]["jetstream/$G/streams/SMALL/meta.inf"])
    try:
        seed = serverkeys.open_key_file(raw, serverkeys.stream("$G", "SMALL"), [vector["key"].encode()], "meta.key")
        print(seed.suite.label, json.loads(serverkeys.open_file(meta, seed, "meta.inf"))["name"])
    except EncfsError as problem:
        print(problem, problem.exit_code)
"""


@pytest.mark.skipif(bool(fips_host.needs_provider()), reason=fips_host.needs_provider() or "-")
def test_under_fips_aes_is_read_and_chachapoly_refused(tmp_path: Path) -> None:
    """AES-GCM with a nonce of 16 bytes, too. Which is what nats-server itself cannot do in its strictest FIPS mode."""
    paths = [str(next(maker.DIRECTORY.glob(f"*-{name}.json"))) for name in ("cluster-aes", "chachapoly")]
    program = READS.format(paths=paths)
    assert fips_host.says({}, program) == "aes SMALL\nchachapoly SMALL\n"
    found = fips_host.says(fips_host.build(tmp_path / "host"), program).splitlines()
    assert found[0] == "aes SMALL"
    assert re.fullmatch(r"the OpenSSL of this host refuses chachapoly \(FIPS\): .+ 37", found[1])
