"""format.py and keyring.py against the decoder that was written from FORMAT.md alone."""

from __future__ import annotations

import json
import os
import re

import decoder
import make_vectors
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sealed_files import EDGES, PAGE, SUITES, VOLUME_KEYS, Randomness, examples, file_keys, seal, text, unseal

import encfs_js
from encfs_js import keyring
from encfs_js.errors import EncfsError, KeyringDamagedError, VersionError, WrongKeyError
from encfs_js.format import (
    MAX_PAGES,
    MAX_PLAIN,
    DamagedPageError,
    FileCipher,
    Header,
    PageBuffer,
    Suite,
    capacity,
    file_key,
    page_length,
    page_of,
    pages_for,
    plain_size,
    plain_start,
)

SIZES = st.one_of(st.integers(0, MAX_PLAIN), st.integers(0, 20000), st.sampled_from(EDGES))
HEADERS = st.builds(Header, st.sampled_from(SUITES), st.integers(1, 2**32 - 1), st.binary(min_size=16, max_size=16))
PAGES = st.one_of(st.integers(0, 3), st.integers(0, MAX_PAGES - 1))
RNG = Randomness()


# --- sizes ----------------------------------------------------------------------------------------------------------


def worked_counts() -> list[tuple[int, int, int, list[int]]]:
    """Read the table of FORMAT.md: plain size, pages, sealed size, lengths."""
    with open(os.path.join(os.path.dirname(encfs_js.__file__), "FORMAT.md"), encoding="utf-8") as file:
        rows = re.findall(r"^\| (\d+) \| (\d+) \| (\d+) \|(.*)\|$", file.read(), re.MULTILINE)
    found = []
    for size, pages, sealed, lengths in rows:
        parts = [part.strip().partition(" x ") for part in lengths.split(",") if part.strip()]
        flat = [int(value or count) for count, _, value in parts for _ in range(int(count) if value else 1)]
        found.append((int(size), int(pages), int(sealed), flat))
    return found


def test_the_table_was_found() -> None:
    assert len(worked_counts()) == 8


@pytest.mark.parametrize(("size", "pages", "sealed_size", "lengths"), worked_counts())
@pytest.mark.parametrize("suite", SUITES)
def test_worked_counts(suite: Suite, size: int, pages: int, sealed_size: int, lengths: list[int]) -> None:
    assert pages_for(size) == pages == len(lengths)
    assert plain_size(pages, lengths[-1] if lengths else 0) == size
    plain = text(size)
    sealed = seal(plain, file_keys(suite))
    assert len(sealed) == sealed_size
    assert [page_length(sealed[at * PAGE :][:PAGE], at) for at in range(pages)] == lengths
    assert decoder.plain_size(sealed) == size
    assert decoder.read(sealed, VOLUME_KEYS) == plain == unseal(sealed, file_keys())


@given(SIZES)
@examples(300)
def test_sizes_agree_with_the_text(size: int) -> None:
    pages = pages_for(size)
    # The text: every page but the last is full, and the last page of a non-empty file is never full.
    before = 0 if pages <= 1 else 4032 + (pages - 2) * 4064
    last = size - before
    assert (pages == 0) == (size == 0)
    assert pages == 0 or 0 <= last < capacity(pages - 1)
    assert plain_size(pages, last) == size
    assert pages == 0 or plain_start(pages - 1) == before
    assert capacity(0) == 4032
    assert capacity(pages or 1) == 4064


@given(SIZES)
@examples(300)
def test_places_agree_with_the_text(offset: int) -> None:
    expected = (0, offset) if offset < 4032 else (1 + (offset - 4032) // 4064, (offset - 4032) % 4064)
    assert page_of(offset) == expected
    assert plain_start(expected[0]) + expected[1] == offset


def test_the_largest_file_has_the_most_pages_that_one_id_may_seal() -> None:
    assert pages_for(MAX_PLAIN) == MAX_PAGES == 2**31
    assert pages_for(MAX_PLAIN + 1) == MAX_PAGES + 1


# --- headers and keys -----------------------------------------------------------------------------------------------


@given(HEADERS)
@examples(100)
def test_headers_are_those_of_the_text(header: Header) -> None:
    packed = header.pack()
    assert packed == b"ENCFSJS1" + bytes([header.suite, 0, 0, 0]) + header.epoch.to_bytes(4, "little") + header.file_id
    assert Header.parse(packed) == header == Header.parse(packed + bytes(PAGE))
    info = b"encfs_js file key v1" + bytes([header.suite])
    assert file_key(VOLUME_KEYS[1], header) == decoder.hkdf(VOLUME_KEYS[1], info, salt=header.file_id)


@given(HEADERS, st.integers(0, 127))
@examples(300)
def test_no_other_header_parses(header: Header, bit: int) -> None:
    packed = bytearray(header.pack())
    packed[bit // 8] ^= 1 << bit % 8
    try:
        parsed = Header.parse(bytes(packed))
    except ValueError:
        return
    assert bit // 8 in {8, 12, 13, 14, 15}  # another suite or epoch: the pages will not authenticate under it
    assert parsed.pack() == packed


@given(st.binary(max_size=31))
@examples(50)
def test_a_short_header_does_not_parse(raw: bytes) -> None:
    with pytest.raises(ValueError, match="header"):
        Header.parse(raw)
    with pytest.raises(ValueError, match="header"):
        Header.parse(Header(Suite.AES, 1, bytes(16)).pack()[: len(raw)])


def test_epochs_count_from_1() -> None:
    with pytest.raises(ValueError, match="header"):
        Header.parse(Header(Suite.AES, 0, bytes(16)).pack())


def test_suites_have_the_names_that_nats_uses() -> None:
    assert [(suite.value, suite.label) for suite in Suite] == [(1, "chachapoly"), (2, "aes")]
    for name in ("chacha", "ChaChaPoly", "CHACHA"):
        assert Suite.from_name(name) is Suite.CHACHAPOLY
    assert Suite.from_name("AES") is Suite.AES
    for name in ("", "aes256", "chachapoly ", "none"):
        with pytest.raises(ValueError, match="cipher"):
            Suite.from_name(name)


# --- pages ----------------------------------------------------------------------------------------------------------


@given(st.data(), HEADERS, PAGES)
@examples(100)
def test_a_page_opens_at_its_index_only(data: st.DataObject, header: Header, page: int) -> None:
    cipher = FileCipher(VOLUME_KEYS[1], header)
    length = data.draw(st.integers(0, capacity(page)) | st.sampled_from([0, 1, capacity(page) - 1, capacity(page)]))
    other = data.draw(st.integers(1, MAX_PAGES).filter(lambda index: index != page))
    plain = text(length)
    sealed = cipher.seal(page, plain, RNG(12))
    assert cipher.authentic(sealed, page) == length == page_length(sealed, page)
    assert (cipher.authentic(sealed, other) is None) or not page
    assert FileCipher(VOLUME_KEYS[2], header).authentic(sealed, page) is None
    # The decoder takes whole files: page 0 lends it the header, where this is not page 0 itself.
    volume_keys = {header.epoch: VOLUME_KEYS[1]}
    if page < 4:
        file = (cipher.seal(0, b"", RNG(12)) + bytes(page * PAGE))[: page * PAGE] + sealed
        assert decoder.authenticate(file, page, volume_keys) == plain


@given(st.sampled_from(SUITES), st.integers(1, 40), st.integers(0, 30), st.data())
@examples(80)
def test_a_run_is_sealed_as_its_pages_are(suite: Suite, count: int, first: int, data: st.DataObject) -> None:
    """Whatever was in the buffer before: it is used for every file of a store, for damaged ones too."""
    cipher = FileCipher(VOLUME_KEYS[1], Header(suite, 1, bytes(16)))
    last_length = data.draw(st.integers(0, capacity(first + count - 1)))
    plains = [text(capacity(page), page) for page in range(first, first + count - 1)]
    last = text(last_length)
    buffer = PageBuffer(count + 1)
    buffer.sealed[:] = b"\xff" * len(buffer.sealed)
    padded = last.ljust(capacity(first + count - 1), b"\0")
    nonces = Randomness(count)(12 * count)
    cipher.seal_run(buffer, first, [*plains, padded], last_length, nonces)
    sealed = bytes(buffer.sealed[: count * PAGE])
    for i, plain in enumerate([*plains, last]):
        page = first + i
        skip = 0 if page else 32
        raw = sealed[i * PAGE : (i + 1) * PAGE]
        assert raw == cipher.seal(page, plain, raw[skip : skip + 12]), f"page {page}"
    assert bytes(buffer.sealed[count * PAGE :]) == b"\xff" * PAGE
    assert cipher.open_run(buffer, first, count, first + count - 1 + (last_length == len(padded))) == last_length
    opened = bytes(buffer.plain)[32 if first == 0 else 0 :]
    assert opened.startswith(b"".join(plains) + last)


@given(st.integers(1, 40), st.integers(0, 1), st.data())
@examples(80)
def test_every_random_byte_goes_into_one_nonce(count: int, first: int, data: st.DataObject) -> None:
    """So the nonces of a run are as independent as the bytes of the random generator."""
    cipher = FileCipher(VOLUME_KEYS[1], Header(Suite.AES, 1, bytes(16)))
    plains = [bytes(capacity(page)) for page in range(first, first + count)]

    def nonces_from(drawn: bytes) -> list[bytes]:
        buffer = PageBuffer(count)
        cipher.seal_run(buffer, first, plains, 0, drawn)
        starts = [i * PAGE + (0 if first + i else 32) for i in range(count)]
        return [bytes(buffer.sealed[at : at + 12]) for at in starts]

    drawn = bytes(12 * count)
    changed = data.draw(st.integers(0, 12 * count - 1))
    other = drawn[:changed] + b"\1" + drawn[changed + 1 :]
    differ = [a != b for a, b in zip(nonces_from(drawn), nonces_from(other), strict=True)]
    assert sum(differ) == 1


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_a_run_refuses_the_page_that_does_not_fit(suite: Suite, count: int) -> None:
    cipher = FileCipher(VOLUME_KEYS[1], Header(suite, 1, bytes(16)))
    plains = [text(capacity(page)) for page in range(count)]
    buffer = PageBuffer(count)

    def open_with(last_length: int, last_page: int, spoil: int | None = None) -> int:
        cipher.seal_run(buffer, 0, plains, last_length, RNG(12 * count))
        if spoil is not None:
            buffer.sealed[spoil] ^= 1
        return cipher.open_run(buffer, 0, count, last_page)

    full = capacity(count - 1)
    assert open_with(full - 1, count - 1) == full - 1
    assert open_with(full, count) == full
    with pytest.raises(DamagedPageError):
        open_with(full, count - 1)  # no end mark
    with pytest.raises(DamagedPageError) as caught:
        open_with(full - 1, count)  # short and not the last
    assert caught.value.page == count - 1
    for page in range(count):
        for at in (0, 13, 15, 44, 45, 46, 47, 48, 2000, 4095):
            with pytest.raises(DamagedPageError) as caught:
                open_with(5, count - 1, page * PAGE + at)
            assert caught.value.page == page


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize(
    ("page", "wrong"),
    [
        (0, {"zero": 1}),
        (0, {"length": 4033}),
        (0, {"length": 65535}),
        (1, {"zero": 1}),
        (1, {"length": 4065}),
    ],
)
def test_an_authentic_page_that_breaks_the_format_is_refused(suite: Suite, page: int, wrong: dict[str, int]) -> None:
    """Whether it is looked at alone or opened in a run: the holder of the key may be a bad writer."""
    header = Header(suite, 1, make_vectors.ID)
    cipher = FileCipher(make_vectors.VOLUME_KEYS[1], header)
    buffer = PageBuffer(1)
    for plain, last_page in ((text(100), page), (text(100), page + 1), (text(capacity(page)), page + 1)):
        good = make_vectors.seal(header.pack(), page, plain)
        assert cipher.authentic(good, page) == len(plain)
        bad = make_vectors.seal(header.pack(), page, plain, **wrong)
        assert cipher.authentic(bad, page) is None
        buffer.sealed[:] = bad
        with pytest.raises(DamagedPageError):
            cipher.open_run(buffer, page, 1, last_page)


@given(
    st.binary(max_size=20000) | st.sampled_from(EDGES).map(text),
    st.sampled_from(SUITES),
    st.sampled_from([1, 2]),
)
@examples(150)
def test_open_after_seal_is_the_plain_text(plain: bytes, suite: Suite, epoch: int) -> None:
    sealed = seal(plain, file_keys(suite, epoch))
    assert len(sealed) == pages_for(len(plain)) * PAGE
    assert decoder.read(sealed, VOLUME_KEYS) == plain
    assert unseal(sealed, file_keys()) == plain
    if plain:
        assert (sealed[8], sealed[12]) == (suite, epoch)
        assert len(plain) < 16 or plain[:16] not in sealed


# --- the keyring ----------------------------------------------------------------------------------------------------

CHEAP = keyring.Kdf(iterations=1, lanes=1, memory_kib=8)


def make_keyring(key: bytes, seed: int = 0, suite: Suite = Suite.AES, label: str = "") -> bytes:
    return keyring.create(key, cipher=suite, plaintext="refuse", label=label, random=Randomness(seed), kdf=CHEAP)


@given(
    st.text(min_size=1, max_size=40),
    st.text(st.characters(categories=["L", "N", "S"]), max_size=20),
    st.data(),
)
@examples(40)
def test_the_decoder_opens_a_keyring(key: str, label: str, data: st.DataObject) -> None:
    try:
        secret = key.encode()
    except UnicodeEncodeError:
        return
    suite = data.draw(st.sampled_from(SUITES))
    document = make_keyring(secret, data.draw(st.integers(0, 99)), suite, label)
    keys = keyring.unlock(keyring.parse(document), secret)
    unlocked = decoder.unlock(document, secret)
    assert unlocked.store_id == keys.store_id
    assert unlocked.settings == {"cipher": suite.label, "plaintext": "refuse", "epoch": 1}
    assert unlocked.volume_keys == {1: keys.volume_key(1)}
    assert keys.derive(b"encfs_js state mac v1") == decoder.hkdf(unlocked.keyring_key, b"encfs_js state mac v1")
    with pytest.raises(decoder.WrongKey):
        decoder.unlock(document, secret + b"\n")


def outcome_of_package(document: bytes, key: bytes) -> str:
    try:
        keyring.unlock(keyring.parse(document), key)
    except EncfsError as error:
        return {WrongKeyError: "wrong key", KeyringDamagedError: "damaged", VersionError: "version"}[type(error)]
    return "open"


def outcome_of_decoder(document: bytes, key: bytes) -> str:
    try:
        decoder.unlock(document, key)
    except decoder.WrongKey:
        return "wrong key"
    except decoder.KeyringDamage:
        return "damaged"
    except decoder.Version:
        return "version"
    return "open"


def test_the_standard_cost_of_a_slot_is_that_of_the_text() -> None:
    document = keyring.create(b"key", cipher=Suite.CHACHAPOLY, plaintext="read")
    slot = json.loads(document)["slots"][0]
    assert {name: slot["kdf"][name] for name in ("name", "iterations", "lanes", "memory_kib")} == {
        "name": "argon2id",
        "iterations": 3,
        "lanes": 4,
        "memory_kib": 65536,
    }
    assert outcome_of_decoder(document, b"key") == outcome_of_package(document, b"key") == "open"


def test_a_later_version_is_refused_by_name() -> None:
    document = json.loads(make_keyring(b"key"))
    document["version"] = 2
    later = json.dumps(document).encode()
    assert outcome_of_package(later, b"key") == outcome_of_decoder(later, b"key") == "version"


@given(st.data())
@examples(150)
def test_a_changed_byte_of_a_keyring_is_found_by_both(data: st.DataObject) -> None:
    document = bytearray(make_keyring(b"key"))
    at = data.draw(st.integers(0, len(document) - 1))
    document[at] = data.draw(st.integers(0, 255))
    by_package, by_decoder = (f(bytes(document), b"key") for f in (outcome_of_package, outcome_of_decoder))
    same = json.loads(make_keyring(b"key")) == loaded(bytes(document))
    assert by_decoder == ("open" if same else by_decoder)
    assert "wrong key" not in {by_package, by_decoder}
    assert by_package == by_decoder or "version" in {by_package, by_decoder}
    assert by_package != "open" or same


def loaded(document: bytes) -> object:
    try:
        return json.loads(document)
    except ValueError:
        return None


@given(st.data())
@examples(60)
def test_a_keyring_that_was_changed_with_a_new_checksum_is_found_by_both(data: st.DataObject) -> None:
    """The checksum is no secret: what an attacker changes must fail at check, wrapping or mac."""
    document = json.loads(make_keyring(b"key"))
    other = json.loads(make_keyring(b"key", seed=1, suite=Suite.CHACHAPOLY, label="other"))
    name = data.draw(st.sampled_from(["store_id", "settings", "epochs", "slots", "mac"]))
    if name in {"epochs", "slots"} and data.draw(st.booleans()):
        inner = data.draw(st.sampled_from(sorted(set(document[name][0]) - {"epoch", "id", "kind"})))
        document[name][0][inner] = other[name][0][inner]
    else:
        document[name] = other[name]
    del document["checksum"]
    document["checksum"] = decoder.hashlib.sha256(decoder.canonical(document)).hexdigest()
    changed = json.dumps(document).encode()
    if document == json.loads(make_keyring(b"key")):
        return
    by_package, by_decoder = outcome_of_package(changed, b"key"), outcome_of_decoder(changed, b"key")
    assert by_package == by_decoder
    assert by_package in {"damaged", "wrong key"}
