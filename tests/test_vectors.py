"""Golden vectors: the package and the decoder that was written from FORMAT.md alone both give the declared outcome."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import zlib

import decoder
import make_vectors
import pytest
from sealed_files import PAGE, memory_file, raw_of, read_all, refused_pages

from encfs_js import crash
from encfs_js.backing import Backing
from encfs_js.format import DamagedPageError, FileCipher, Header, Suite
from encfs_js.sealed import FileKeys, SealedFile

NAMES = sorted(name.removesuffix(".json") for name in os.listdir(make_vectors.DIRECTORY))


class Vector:
    def __init__(self, name: str) -> None:
        with open(os.path.join(make_vectors.DIRECTORY, f"{name}.json"), encoding="ascii") as file:
            self.found = json.load(file)
        self.sealed = zlib.decompress(base64.b64decode(self.found["file"], validate=True))
        self.volume_keys = {int(epoch): bytes.fromhex(key) for epoch, key in self.found["volume_keys"].items()}

    def file_keys(self) -> FileKeys:
        return FileKeys(self.volume_keys.__getitem__, Suite.AES, 1)


def first_refused(sealed: bytes, keys: FileKeys) -> int | None:
    refused = refused_pages(sealed, keys)
    return refused[min(refused)] if refused else None


def first_damage(sealed: bytes, volume_keys: dict[int, bytes]) -> int | None:
    damaged = decoder.damaged_pages(sealed, volume_keys)
    return damaged[0] if damaged else None


@pytest.mark.parametrize("name", NAMES)
def test_the_package_gives_the_declared_outcome(name: str) -> None:
    vector = Vector(name)
    found, keys = vector.found, vector.file_keys()
    assert first_refused(vector.sealed, keys) == found.get("page")
    with memory_file(vector.sealed) as fd:
        if not found["clean"]:
            trimmed = crash.trim(Backing(), fd, keys)
            assert (trimmed is not None) == (found["expect"] == "trimmed")
            if trimmed:
                assert trimmed[1] == found["plain_size"] <= trimmed[0]
                assert len(raw_of(fd)) == found["sealed_after"]
            else:
                assert raw_of(fd) == vector.sealed
        file = SealedFile(Backing(), fd, keys)
        if found.get("plain_sha256"):
            assert file.damage is None
            assert file.size == found["plain_size"]
            assert hashlib.sha256(read_all(file)).hexdigest() == found["plain_sha256"]
        else:
            with pytest.raises(DamagedPageError):
                read_all(file)


@pytest.mark.parametrize("name", NAMES)
def test_the_decoder_gives_the_declared_outcome(name: str) -> None:
    vector = Vector(name)
    found, sealed, keys = vector.found, vector.sealed, vector.volume_keys
    assert first_damage(sealed, keys) == found.get("page")
    if not found["clean"]:
        rule = decoder.crash_rule(sealed, keys)
        assert (rule is not None) == (found["expect"] == "trimmed")
        if rule:
            assert len(sealed) == found["sealed_before"]
            assert rule.sealed_size == found["sealed_after"]
            # The package's own end mark is what a decoder of a trimmed file reads.
            with memory_file(sealed) as fd:
                crash.trim(Backing(), fd, vector.file_keys())
                sealed = raw_of(fd)
            assert decoder.plain_size(sealed) == found["plain_size"]
    if found.get("plain_sha256"):
        plain = decoder.read(sealed, keys)
        assert len(plain) == found["plain_size"] == decoder.plain_size(sealed)
        assert hashlib.sha256(plain).hexdigest() == found["plain_sha256"]
    else:
        with pytest.raises(decoder.Damage):
            decoder.read(sealed, keys)


def test_the_vectors_are_those_that_their_maker_makes() -> None:
    made = {vector.name: vector.document() for vector in make_vectors.vectors()}
    kept = {name: Vector(name).found for name in NAMES}
    # Another zlib may compress otherwise: what counts is what is in it.
    for document in (*made.values(), *kept.values()):
        document["file"] = zlib.decompress(base64.b64decode(document["file"]))
    assert made == kept


def test_more_vectors_refuse_than_accept() -> None:
    outcomes = [Vector(name).found["expect"] for name in NAMES]
    assert set(outcomes) == {"success", "integrity", "trimmed"}
    assert outcomes.count("integrity") > outcomes.count("success") > 20
    assert outcomes.count("trimmed") > 30


@pytest.mark.parametrize("suite", Suite)
@pytest.mark.parametrize("size", [1, 4031, 4032, 4033, 8095, 8096])
def test_the_package_seals_the_good_vectors_byte_for_byte(suite: Suite, size: int) -> None:
    vector = Vector(f"{suite.label}-{size}")
    cipher = FileCipher(vector.volume_keys[1], Header(suite, 1, make_vectors.ID))
    plains = make_vectors.split(make_vectors.text(size))
    sealed = [cipher.seal(page, plain, make_vectors.nonce(cipher.packed, page, 0)) for page, plain in enumerate(plains)]
    assert b"".join(sealed) == vector.sealed
    assert len(vector.sealed) == len(plains) * PAGE
