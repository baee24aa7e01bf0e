"""Damaged files against every reader: bits, cuts, spans that are moved or repeated, numbers at their extremes.

Each ends with what the reader says it raises, whose message names the file and, where it is about bytes, the place; in a time and
with a memory that follow from the size of the input. ENCFS_JS_EXAMPLES=20000 for a long run. (test_jetstream does the
same to the plain files of newer servers, test_natscodec to S2 streams, test_keyring* to keyrings that nobody signed.)
"""

from __future__ import annotations

import base64
import copy
import hashlib
import itertools
import json
import os
import re
import time
import tracemalloc
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import server_stores as stores
from hypothesis import assume, example, given
from hypothesis import strategies as st
from sealed_files import EDGES, PAGE, SUITES, examples, file_keys, memory_file, seal, text
from test_jetstream import vector_of, with_hash
from test_natscodec import put_uvarint
from test_tpm_file import PUBLIC, twice

from encfs_js import (
    config,
    guard,
    jetstream,
    keydocument,
    keyring,
    natscodec,
    recovery,
    serverkeys,
    servernotes,
    serverold,
    serverstate,
    state,
    tpmfile,
)
from encfs_js.backing import META, Backing
from encfs_js.errors import (
    ConfigError,
    EncfsError,
    FormatError,
    KeyMissingError,
    KeyringDamagedError,
    StoreIoError,
    TpmFileError,
    VersionError,
    WrongKeyError,
)
from encfs_js.format import DamagedPageError, Suite, capacity, plain_start
from encfs_js.sealed import SealedFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.filterwarnings("ignore:Generating overly large repr")
PATH = "some/file"
PLACED = re.compile(r"^some/file: byte (\d+): .+$", re.DOTALL)
KEYS = [stores.KEY.encode()]
SECONDS = 5  # of the processor, for files of some kilobytes
MIB = 1 << 20


# --- damage -----------------------------------------------------------------------------------------------------------

NUMBERS = [
    b"\xff" * 10,
    b"\xff" * 9 + b"\x01",  # the largest varint
    b"\x80" * 9 + b"\x01",
    *(value.to_bytes(size, "little") for size in (2, 4, 8) for value in (0, 1 << 8 * size - 1, (1 << 8 * size) - 1)),
    (0x7FFFFFFF).to_bytes(4, "little"),
    (1 << 25).to_bytes(4, "little"),
    put_uvarint(1 << 20),
    put_uvarint(1 << 26),
    put_uvarint(1 << 40),
]


@st.composite
def damage(draw: st.DrawFn, raw: bytes, most: int = 3) -> bytes:
    """`raw`, changed up to `most` times."""
    found = bytearray(raw)
    for _ in range(draw(st.integers(1, most))):
        size = len(found)
        at = draw(st.integers(0, max(0, size - 1)))
        length = min(draw(st.sampled_from([1, 2, 3, 4, 8, 16, 30, 64, 500, 4096])), size - at)
        match draw(
            st.sampled_from(["bit", "byte", "cut", "head", "insert", "repeat", "move", "remove", "number", "zero"])
        ):
            case "bit" if size:
                found[at] ^= 1 << draw(st.integers(0, 7))
            case "byte" if size:
                found[at] = draw(st.integers(0, 255))
            case "cut":
                del found[at:]
            case "head":
                del found[: at + 1]
            case "insert":
                found[at:at] = draw(st.binary(min_size=1, max_size=12))
            case "repeat":
                found[at:at] = bytes(found[at : at + length]) * draw(st.sampled_from([1, 2, 100]))
            case "move":
                span = bytes(found[at : at + length])
                del found[at : at + length]
                to = draw(st.integers(0, len(found)))
                found[to:to] = span
            case "remove":
                del found[at : at + length]
            case "number":
                number = draw(st.sampled_from(NUMBERS))
                found[at : at + len(number)] = number
            case "zero":
                found[at : at + length] = bytes(length)
    return bytes(found)


def bounded(read: Callable[[bytes], object], raw: bytes, times: int, plus: int = MIB) -> None:
    """Read, and see that it took no more memory than `times` the input and `plus`, nor too long. Raises what the reader does."""
    tracemalloc.start()
    start = time.process_time()
    try:
        read(raw)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak <= times * len(raw) + plus, f"{peak} bytes of memory for {len(raw)}"
        assert time.process_time() - start < SECONDS


def ends_well(read: Callable[[bytes], object], raw: bytes, times: int, plus: int = MIB) -> bool:
    """Read within bounds; tell whether it went. What is wrong has to be said as it should be."""
    try:
        bounded(read, raw, times, plus)
    except WrongKeyError as problem:
        assert str(problem) == f"{PATH}: the key does not open it"
        assert problem.hint
        return False
    except FormatError as problem:
        said = str(problem)
        assert problem.hint
        assert (
            PLACED.match(said)
            or said == f"{PATH}: does not authenticate"
            or re.match(r"^some/file: not a key file of nats-server \(\d+ bytes\)$", said)
        ), said
        return False
    return True


# --- what nats-server writes ------------------------------------------------------------------------------------------


class Kept(NamedTuple):
    """A kept file and how it is read. sealed: nothing that was changed may be read at all. name: which file of which store."""

    name: str
    raw: bytes
    read: Callable[[bytes], object]
    times: int
    plus: int = MIB
    sealed: bool = False


def seed_of(files: dict[str, bytes], path: str, asset: serverkeys.Asset) -> serverkeys.Seed | None:
    return serverkeys.open_key_file(files[path], asset, KEYS, PATH) if path in files else None


def opened(raw: bytes, seed: serverkeys.Seed | None) -> bytes:
    return serverkeys.open_file(raw, seed, PATH) if seed else raw


def block_reader(seed: serverkeys.Seed | None, label: str) -> Callable[[bytes], object]:
    def read(raw: bytes) -> object:
        plain, _ = jetstream.plain_block(raw, serverkeys.Keystream(seed) if seed else None, label, PATH)
        jetstream.Finder(plain, label).find(1)
        return list(jetstream.messages(jetstream.records(plain, label, PATH)))

    return read


def index_reader(seed: serverkeys.Seed | None, name: str) -> Callable[[bytes], object]:
    def read(raw: bytes) -> object:
        index = serverstate.parse_index(serverstate.open_index(raw, seed, name, PATH)[0], PATH)
        return [sum(1 for _ in serverstate.deleted_sequences(block)) for block in index.blocks]

    return read


def kept_file(store: str, files: dict[str, bytes], path: str) -> Kept | None:
    """How a file of a kept store is read, None for one that is not worth it."""
    parts = path.split("/")
    group = parts[2] == "_js_"
    name, leaf = parts[3], parts[-1]
    asset = serverkeys.raft_group(name) if group else serverkeys.stream(parts[1], name)
    top, raw = "/".join(parts[:4]), files[path]
    if parts[4] == "obs":
        asset, top, name = asset.consumer(parts[5]), "/".join(parts[:6]), f"{name}/{parts[5]}"
    kept = f"{store} {path}"
    if leaf.endswith(".key"):
        mine = asset if leaf == "meta.key" else asset.block(int(leaf[:-4]))
        return Kept(kept, raw, lambda raw: serverkeys.open_key_file(raw, mine, KEYS, PATH), 8, sealed=True)
    if leaf.endswith((".blk", ".idx", ".fss")) and leaf[:-4].isdigit():
        number = int(leaf[:-4])
        label, own = jetstream.block_name(name, number), seed_of(files, f"{path[:-4]}.key", asset.block(number))
        if leaf.endswith(".blk"):
            # A compressed block may claim to hold MAX_BLOCK, and has to hold it.
            return Kept(kept, raw, block_reader(own, label), 60, 3 * jetstream.MAX_BLOCK)
        if leaf.endswith(".fss"):
            return Kept(kept, raw, lambda raw: serverold.parse_old_subjects(raw, label, PATH), 80)
        if own is None:
            return Kept(kept, raw, lambda raw: serverold.parse_old_index(raw, PATH), 150)
        return Kept(
            kept,
            raw,
            lambda raw: serverold.parse_old_index(serverold.open_old_index(raw, own, PATH), PATH),
            150,
            sealed=True,
        )
    seed = seed_of(files, f"{top}/meta.key", asset)
    if leaf == "meta.inf":
        return Kept(kept, raw, lambda raw: jetstream.parse_meta(opened(raw, seed), PATH), 80, sealed=seed is not None)
    if leaf == "o.dat":
        return Kept(
            kept, raw, lambda raw: serverstate.parse_consumer(opened(raw, seed), PATH), 150, sealed=seed is not None
        )
    if leaf == "index.db":
        return Kept(kept, raw, index_reader(seed, name), 150, sealed=True)
    if leaf == "meta.sum":
        meta = files[f"{top}/meta.inf"]
        return Kept(kept, raw, lambda raw: jetstream.check_meta(meta, raw, name, PATH), 8, sealed=True)
    notes: dict[str, Callable[[bytes, str], object]] = {
        "thw.db": servernotes.parse_ttls,
        "sched.db": servernotes.parse_schedules,
        "sources.db": servernotes.parse_sources,
        "peers.idx": serverstate.parse_peers,
        "tav.idx": serverstate.parse_vote,
    }
    if leaf in notes:
        return Kept(kept, raw, lambda raw: notes[leaf](raw, PATH), 150)
    if leaf == "commit.idx":
        return Kept(kept, raw, lambda raw: serverstate.parse_commit(raw, name, PATH), 8, sealed=True)
    if leaf.startswith("snap."):
        return Kept(kept, raw, lambda raw: serverstate.parse_snapshot(raw, name, PATH), 80, sealed=True)
    return None


@cache
def kept_files() -> list[Kept]:
    found = []
    for store in (
        "2.10.25-aes",
        "2.15.1-chachapoly",
        "2.15.1-plain",
        "2.15.1-cluster-aes",
        "old/2.9.10-plain",
        "old/2.9.10-chachapoly",
        "old/2.9.10-aes",
        "notes/2.15.1-plain",
    ):
        vector = vector_of(store)
        files = {path: base64.b64decode(content) for path, content in vector["files"].items()}
        found += [each for path in sorted(files) if (each := kept_file(store, files, path))]
    return found


ENDINGS = ("blk", "db", "idx", "fss", "inf", "sum", "key", "dat", "snap")


def ending_of(name: str) -> str:
    leaf = name.rsplit("/", 1)[1]
    return "snap" if leaf.startswith("snap.") else leaf.rsplit(".", 1)[1]


def test_every_kept_file_is_read_within_bounds() -> None:
    for each in kept_files():
        assert ends_well(each.read, each.raw, each.times, each.plus), each.name
    assert {ending_of(each.name) for each in kept_files()} == set(ENDINGS)


@pytest.mark.parametrize("ending", ENDINGS)
@given(st.data())
@examples(150)
def test_changed_files_of_nats_server(ending: str, data: st.DataObject) -> None:
    each = data.draw(st.sampled_from([each for each in kept_files() if ending_of(each.name) == ending]))
    changed = data.draw(damage(each.raw))
    went = ends_well(each.read, changed, each.times, each.plus)
    assert not (went and each.sealed) or changed == each.raw, f"{each.name}: a change went unnoticed"


@given(st.data())
@examples(300)
def test_changed_index_db_with_a_good_hash(data: st.DataObject) -> None:
    """The hash keeps accidents out; this is what an attacker can have read."""
    each = data.draw(st.sampled_from([e for e in kept_files() if e.name.endswith("index.db") and "plain" in e.name]))
    name = each.name.split("/")[-3]
    ends_well(each.read, with_hash(data.draw(damage(each.raw[:-8])), name), each.times)


@given(st.data())
@examples(200)
def test_changed_fss_with_a_good_hash(data: st.DataObject) -> None:
    each = data.draw(st.sampled_from([e for e in kept_files() if e.name.endswith(".fss")]))
    parts = each.name.split("/")
    label = jetstream.block_name(parts[-3], int(parts[-1][:-4]))
    ends_well(each.read, with_hash(data.draw(damage(each.raw[:-16])), label) + bytes(8), each.times)


@given(st.lists(st.tuples(st.integers(0, 2**64), st.integers(0, 2**64), st.binary(max_size=3)), max_size=5))
@examples(100)
def test_notes_that_claim_too_much(notes: list[tuple[int, int, bytes]]) -> None:
    body = b"".join(put_uvarint(min(a, 2**64 - 1)) + c + put_uvarint(min(b, 2**64 - 1)) for a, b, c in notes)
    for count in (0, 1, len(notes), 1 << 32, 2**64 - 1):
        raw = b"\1" + count.to_bytes(8, "little") + bytes(8) + body
        for read in (servernotes.parse_ttls, servernotes.parse_schedules, servernotes.parse_sources):
            ends_well(lambda raw, read=read: read(raw, PATH), raw, 150)  # type: ignore[misc]


@pytest.mark.parametrize("suite", Suite)
@given(st.data())
@examples(60)
def test_changed_plain_text_below_a_seal(suite: Suite, data: st.DataObject) -> None:
    """A store whose key the attacker has, or a server with a bug: what authenticates is no better than the rest."""
    seed = serverkeys.Seed(suite, bytes(serverkeys.NONCES[suite]), bytes(32))
    each = data.draw(st.sampled_from([e for e in kept_files() if e.name.endswith(".blk") and "plain" in e.name]))
    parts = each.name.split("/")
    label = jetstream.block_name(parts[-3], int(parts[-1][:-4]))
    changed = serverkeys.Keystream(seed).xor(data.draw(damage(each.raw)))
    ends_well(block_reader(seed, label), changed, 60, 3 * jetstream.MAX_BLOCK)


# --- S2 ---------------------------------------------------------------------------------------------------------------


@st.composite
def elements(draw: st.DrawFn) -> bytes:
    """Elements of an S2 block, most of them good, some of which copy far more than they take."""
    out = bytearray(b"\x0cabcd")
    for _ in range(draw(st.integers(0, 12))):
        match draw(st.sampled_from(["literal", "near", "far", "farther", "repeat", "long repeat", "any"])):
            case "literal":
                body = draw(st.binary(min_size=1, max_size=60))
                out += bytes([len(body) - 1 << 2]) + body
            case "near":
                out += bytes([draw(st.integers(0, 63)) << 2 & 0xFC | 1, draw(st.integers(0, 8))])
            case "far":
                out += bytes([draw(st.integers(0, 63)) << 2 | 2]) + draw(st.integers(0, 70)).to_bytes(2, "little")
            case "farther":
                out += bytes([draw(st.integers(0, 63)) << 2 | 3]) + draw(st.integers(0, 70)).to_bytes(4, "little")
            case "repeat":
                out += bytes([draw(st.integers(0, 4)) << 2 | 1, 0])
            case "long repeat":
                extra = draw(st.integers(1, 3))
                length = draw(st.integers(0, (1 << 8 * extra) - 1))
                out += bytes([(4 + extra) << 2 | 1, 0]) + length.to_bytes(extra, "little")
            case "any":
                out += draw(st.binary(max_size=5))
    return bytes(out)


@given(elements(), st.sampled_from([100, 5000, 1 << 20]), st.data())
@examples(300)
def test_s2_elements_take_what_they_make(body: bytes, limit: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(0, 200) | st.sampled_from([limit - 1, limit, limit + 1, 1 << 32]))
    raw = put_uvarint(size) + body
    try:
        bounded(lambda raw: natscodec.s2_block(raw, limit), raw, 10, 3 * limit + MIB // 4)
    except natscodec.MalformedError as problem:
        assert 0 <= problem.offset <= len(raw)


# --- our own ----------------------------------------------------------------------------------------------------------

DEEP = ["[" * depth + "]" * depth for depth in (5, 200, 480, 900, 960, 985, 995, 1500, 50_000)]
DEEP += ['{"a":' * depth + "1" + "}" * depth for depth in (300, 490, 900, 990, 20_000)]
TEXTS = [
    '"\\ud800"',
    '"\\udfff\\ud800"',
    '"\\u0000"',
    '"\\u001b[2J"',
    '""',
    '"' + "a" * 4000 + '"',
    '"\u00e9"',
    '"AAAA"',
]
ODDS = ["null", "true", "-1", "0", "1", "4294967296", "18446744073709551616", "-9223372036854775809", "9" * 5000]
ODDS += ["1e400", "-1e400", "NaN", "Infinity", "1.5", "[]", "{}", '{"\\ud800":1}', "[[]]", '[{"a":[]}]']
ODDS += [*TEXTS, *DEEP]
MARK = "replace-me"


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where in a JSON tree something stands, the tree itself included."""
    below = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return [path] + [each for name, inner in below for each in places(inner, (*path, name))]


def changed_json(draw: st.DrawFn, tree: Any) -> tuple[Any, str]:
    """A copy of the tree with one or two changes, in which MARK stands for the text that is returned with it."""
    odd = draw(st.sampled_from(ODDS))
    found = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        path = draw(st.sampled_from(places(found)))
        if not path:
            continue
        place = found
        for name in path[:-1]:
            place = place[name]
        match draw(st.sampled_from(["odd", "odd", "odd", "remove", "twice", "rename"])):
            case "odd":
                place[path[-1]] = MARK
            case "remove":
                del place[path[-1]]
            case "twice" if isinstance(place, list):
                place.append(copy.deepcopy(place[path[-1]]))
            case "rename" if isinstance(place, dict):
                place[draw(st.sampled_from(["x", "\ud800", "", "kind", "version"]))] = place.pop(path[-1])
    return found, odd


@st.composite
def json_of(draw: st.DrawFn, tree: Any) -> bytes:
    found, odd = changed_json(draw, tree)
    return json.dumps(found).replace(f'"{MARK}"', odd).encode()


KDF = keydocument.Kdf(1, 1, 8)
DOCUMENT = keyring.create(b"a key", cipher=Suite.AES, plaintext="refuse", kdf=KDF)


@st.composite
def keyrings(draw: st.DrawFn) -> bytes:
    """A keyring with changes, and a checksum that is right for them: it is not secret how it is made."""
    tree = json.loads(DOCUMENT)
    del tree["checksum"]
    found, odd = changed_json(draw, tree)
    summed = keydocument.canonical(found).decode().replace(f'"{MARK}"', odd)
    checksum = hashlib.sha256(summed.encode()).hexdigest()
    return f'{summed[:-1]},"checksum":"{checksum}"}}'.encode()


@given(keyrings() | damage(DOCUMENT))
@examples(500)
def test_changed_keyrings(raw: bytes) -> None:
    try:
        bounded(keydocument.parse, raw, 60)
        keyring.unlock(keydocument.parse(raw), b"a key")
    except (KeyringDamagedError, VersionError) as problem:
        assert "keyring" in str(problem)
        assert str(problem).isprintable()
        assert problem.hint
    except WrongKeyError:
        pass  # its salt, its nonce or its name was changed


@given(st.data())
@examples(200)
def test_changed_recovery_codes(data: st.DataObject) -> None:
    secret = data.draw(st.binary(min_size=20, max_size=20))
    code = recovery.encode(secret).encode()
    changed = data.draw(damage(code))
    found = recovery.decode(changed)
    assert found is None or (len(found) == recovery.SIZE and recovery.decode(recovery.encode(found).encode()) == found)
    assert recovery.is_mistyped(changed) in {True, False}
    # One character in ten thousand pairs of them gets past the checksum; none does that leaves the code as it was.
    if recovery.is_mistyped(changed):
        assert found is None


@given(st.data())
@examples(250)
def test_changed_sealed_files(data: st.DataObject) -> None:
    """Whatever was done to a file, each of its pages is as it was or is refused."""
    keys = file_keys(data.draw(st.sampled_from(SUITES)))
    size = data.draw(st.sampled_from([*EDGES[1:], 20000]))
    plain = text(size)
    raw = seal(plain, keys)
    changed = data.draw(damage(raw) | pages_moved(raw))
    assume(changed != raw)
    with memory_file(changed) as fd:
        try:
            file = SealedFile(Backing(), fd, keys)
        except DamagedPageError as problem:
            assert 0 <= problem.page <= len(changed) // PAGE
            return
        assert 0 <= file.size <= len(changed) + PAGE  # what it claims, where its last page is damaged
        for page in range(-(-len(changed) // PAGE)):
            try:
                found = bytes(file.read(plain_start(page), capacity(page)))
            except DamagedPageError as problem:  # of the whole file where its header or its end is damaged
                assert 0 <= problem.page <= -(-len(changed) // PAGE)
            else:
                assert found == plain[plain_start(page) : plain_start(page) + capacity(page)][: len(found)]


@st.composite
def pages_moved(draw: st.DrawFn, raw: bytes) -> bytes:
    """Whole pages in another order, left out, repeated, or of zeros."""
    pages = [raw[at : at + PAGE] for at in range(0, len(raw), PAGE)] + [bytes(PAGE)]
    return b"".join(pages[i] for i in draw(st.lists(st.integers(0, len(pages) - 1), max_size=7)))


@cache
def example_text() -> bytes:
    with open(os.path.join(os.path.dirname(__file__), "../examples/encfs-js.yaml"), "rb") as file:
        return file.read()


YAMLS = [
    b'jetstream: {key: "\\uD800"}',
    b'jetstream: {cipher: "\\uD800"}',
    b'jetstream: {store_dir: "\\uD800"}',
    b'"\\uD800": 1',
    b"jetstream: {tpm: {pcr: 99999999999999999999}}",
    b"jetstream: {cipher: aes, key: !!binary aGk=}",
    b"a: &a [x]\nb: " + b"[*a,*a]" * 50,
    b"jetstream: {" + b"tpm: {" * 30 + b"}" * 31,
    b"jetstream: {key: ${A}, prev_key: $B, store_dir: [1]}",
    b"? [a, b]\n: c",
    b"- " * 3000,
    b"{" * 3000,
    b"a: " + b"[" * 30_000,
    b"jetstream: {pcr: 0x" + b"f" * 4000 + b"}",
    b"jetstream: {pcr: " + b"9" * 6000 + b"}",
    b"jetstream: {pcr: 1:" + b"59:" * 2000 + b"1}",
    b"jetstream: {key: 2001-02-30}",
    b"x: !!python/object/apply:os.system [true]",
    b"x: !!timestamp 9999-99-99",
    b"<<: [1]",
    b"<<: {jetstream: {}}",
    b"--- a\n--- b",
    b"x: *none",
]


@given(st.sampled_from(YAMLS) | st.sampled_from(YAMLS).flatmap(damage) | st.deferred(lambda: damage(example_text())))
@examples(300)
def test_changed_configurations(raw: bytes) -> None:
    """Every alias of YAML is one object, so a bomb of them stays small until somebody walks it. Nobody may."""
    try:
        bounded(lambda raw: config._parse(raw, {}), raw, 800, 4 * MIB)
    except (ConfigError, KeyMissingError) as problem:
        assert str(problem)
        assert problem.hint


def bomb() -> bytes:
    names = [b"a%d" % i for i in range(40)]
    lines = [b"%s: &%s [%s]" % (name, name, b"*%s,*%s" % (old, old)) for old, name in itertools.pairwise(names)]
    return b"\n".join([b"a0: &a0 [x]", *lines]) + b"\n"


@pytest.mark.parametrize("where", [b"", b"jetstream: *a39\n", b"store_dir: *a39\n", b"*a39 : 1\n", b"<<: *a39\n"])
def test_a_configuration_that_is_a_bomb(where: bytes) -> None:
    with pytest.raises((ConfigError, KeyMissingError)):
        bounded(lambda raw: config._parse(raw, {}), bomb() + where, 800, 4 * MIB)


GUARD = {
    "format": "encfs_js guard",
    "version": 1,
    "closed": [{"directory": "a/b", "file": "a/b/c", "page": 3, "since": "x"}],
}
STATE = {"format": "encfs_js state", "version": 1, "clean": True, "began": 5, "windows": [[1, 2]], "mac": "AAAA"}
LOCK = {"pid": 5, "host": "h", "mountpoint": "/mnt", "since": "x"}
SEALED_KEY = {
    "version": 1,
    "private_key": twice(b"p"),
    "public_key": twice(PUBLIC),
    "srk_name": "00",
    "srk_salt": "AA==",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store")
    (path / META).mkdir()
    return path


def content_of(tree: Any) -> st.SearchStrategy[bytes]:
    return (
        json_of(tree)
        | damage(json.dumps(tree).encode())
        | st.sampled_from(ODDS).map(str.encode)
        | st.binary(max_size=40)
    )


@given(raw=content_of(GUARD))
@example(raw=json.dumps(GUARD).replace("3", "1e400").encode())
@examples(300)
def test_changed_guards(store: Path, raw: bytes) -> None:
    (store / META / "guard").write_bytes(raw)
    try:
        bounded(lambda _: guard.read(str(store)), raw, 60)
    except StoreIoError as problem:
        assert str(problem) == f"{store}: .encfs_js/guard is damaged"


@given(raw=content_of(STATE))
@examples(300)
def test_changed_states(store: Path, raw: bytes) -> None:
    keys = keyring.unlock(keydocument.parse(DOCUMENT), b"a key")
    (store / META / "state").write_bytes(raw)
    found: list[state.State] = []
    bounded(lambda _: found.append(state.load(str(store), keys)), raw, 60)
    assert found == [state.State(clean=True, began=0, windows=())]


@given(raw=content_of(LOCK))
@examples(150)
def test_changed_locks(store: Path, raw: bytes) -> None:
    """Who holds the lock writes it; what stands there is only ever shown."""
    path = store / META / "lock"
    path.write_bytes(raw)
    fd = os.open(path, os.O_RDONLY)
    try:
        assert isinstance(state._entry(fd), dict)
    finally:
        os.close(fd)


@given(content_of(SEALED_KEY))
@examples(200)
def test_changed_sealed_keys(raw: bytes) -> None:
    try:
        bounded(lambda raw: tpmfile.parse(raw, PATH), raw, 60)
    except TpmFileError as problem:
        assert PATH in str(problem)
        assert problem.hint


def test_errors_are_ours() -> None:
    """What this file takes for an answer is what the command line prints and not a traceback."""
    ours = (ConfigError, FormatError, KeyMissingError, KeyringDamagedError, StoreIoError, TpmFileError, WrongKeyError)
    assert all(issubclass(each, EncfsError) for each in ours)
