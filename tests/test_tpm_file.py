"""The file with a key that a TPM has sealed: what is read, what is refused, and how a new one comes to be. No TPM needed."""

from __future__ import annotations

import base64
import binascii
import errno
import fcntl
import json
import os
import signal
import stat
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from encfs_js import tpmfile
from encfs_js.backing import Backing
from encfs_js.errors import TpmFileError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NOBODY = 65534
# A user seed that NATS's documentation shows.
SEED = b"SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"
PUBLIC = bytes.fromhex(
    "0008000b000000120020" + "11" * 32 + "00100020" + "22" * 32
)  # type, nameAlg, attributes, policy, scheme, unique
OURS = tpmfile.Sealed(b"private" * 20, PUBLIC, b"\0\x0b" + b"n" * 32, b"s" * 16)


def twice(data: bytes) -> str:
    return base64.b64encode(base64.b64encode(data)).decode()


def document(**changes: Any) -> bytes:
    """A file as nats-server writes it, with changes; None takes a name out."""
    fields: dict[str, Any] = {"version": 1, "private_key": twice(b"private"), "public_key": twice(PUBLIC)}
    return json.dumps({name: value for name, value in (fields | changes).items() if value is not None}).encode()


def test_a_user_seed_is_one_of_nats() -> None:
    raw = base64.b32decode(SEED + b"=" * 6)
    assert tpmfile.user_seed(raw[2:34]) == SEED
    made = tpmfile.user_seed(bytes(range(32)))
    assert (len(made), made[:2]) == (58, b"SU")
    raw = base64.b32decode(made + b"=" * 6)
    assert raw[2:34] == bytes(range(32))
    assert int.from_bytes(raw[34:], "little") == binascii.crc_hqx(raw[:34], 0)


def test_what_is_written_is_read() -> None:
    assert tpmfile.parse(tpmfile.encode(OURS), "f") == OURS
    plain = tpmfile.Sealed(b"private", PUBLIC)
    assert json.loads(tpmfile.encode(plain)) == json.loads(document())
    assert tpmfile.parse(document(), "f") == plain
    assert plain.policy == b"\x11" * 32


def test_the_template_is_the_public_area_without_what_the_tpm_makes() -> None:
    assert tpmfile.template(b"\x11" * 32) == PUBLIC[:-34] + b"\0\0"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "write it"),
        (b"\xff", "write it"),
        (b"null", "no JSON object"),
        (b"[" * 100_000, "write it"),
        (b'"text"', "no JSON object"),
        (document(version=None), "version 1"),
        (document(version=2), "version 1"),
        (document(version=True), "version 1"),
        (document(version="1"), "version 1"),
        (document(version=1.0), "version 1"),
        (document(private_key=None), "write it"),
        (document(public_key=None), "write it"),
        (document(private_key=5), "write it"),
        (document(private_key="ä"), "write it"),
        (document(private_key=base64.b64encode(b"private").decode()), "write it"),
        (document(private_key=twice(b"")), "wrong size"),
        (document(private_key=twice(b"x" * 1025)), "wrong size"),
        (document(public_key=twice(PUBLIC[:-1])), "wrong size"),
        (document(public_key=twice(PUBLIC + b"x")), "wrong size"),
        (document(srk_name=5), "write it"),
        (document(srk_name="0x"), "write it"),
        (document(srk_name="ab"), "wrong size"),
        (document(srk_name="ab" * 34, srk_salt="!"), "write it"),
        (document(srk_name="ab" * 34, srk_salt="AAAA"), "wrong size"),
        (document(srk_salt=base64.b64encode(b"s" * 16).decode()), "srk_name is missing"),
        (document(srk_nbme="ab" * 34), "not known"),
        (document(public_key=twice(b"\0\x01" + PUBLIC[2:])), "no key"),
        # userWithAuth, and noDA
        (document(public_key=twice(PUBLIC[:7] + b"\x52" + PUBLIC[8:])), "no key"),
        (document(public_key=twice(PUBLIC[:6] + b"\x04" + PUBLIC[7:])), "no key"),
        (document(public_key=twice(PUBLIC[:-34] + b"\0\x1f" + PUBLIC[-32:])), "no key"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_what_is_no_sealed_key_is_refused(content: bytes, says: str) -> None:
    with pytest.raises(TpmFileError, match=f"/a b/f: the sealed key cannot be used: .*{says}") as caught:
        tpmfile.parse(content, "/a b/f")
    assert "'/a b/f' back from a backup" in caught.value.hint


@settings(max_examples=300, deadline=None, database=None)
@given(
    st.binary(max_size=80)
    | st.dictionaries(
        st.sampled_from(["version", "private_key", "public_key", "srk_name", "srk_salt", "x"]),
        st.none() | st.just(1) | st.text(max_size=8) | st.just(twice(PUBLIC)) | st.just(twice(b"p")),
    ).map(lambda fields: json.dumps(fields).encode())
)
def test_anything_is_a_sealed_key_or_an_error_for_people(content: bytes) -> None:
    try:
        found = tpmfile.parse(content, "f")
    except TpmFileError:
        return
    assert tpmfile.parse(tpmfile.encode(found), "f") == found


def test_a_file_that_was_cut_anywhere_is_refused() -> None:
    content = tpmfile.encode(OURS)
    assert content.endswith(b"}\n")
    for size in range(len(content) - 1):
        with pytest.raises(TpmFileError):
            tpmfile.parse(content[:size], "f")
    assert tpmfile.parse(content[:-1], "f") == OURS


# --- reading ----------------------------------------------------------------------------------------------------------


def test_no_file_is_none(tmp_path: Path) -> None:
    assert tpmfile.read(str(tmp_path / "none"), Backing()) is None


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_directory(path: Path) -> None:
    path.mkdir()


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def too_much(path: Path) -> None:
    path.write_bytes(b" " * (tpmfile.MAX_FILE + 1))


def a_loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize(
    ("put", "says"),
    [
        (a_fifo, "it is no regular file"),
        (a_directory, "it is no regular file"),
        (a_device, "it is no regular file"),
        (too_much, "longer than 65536 bytes"),
        (a_loop, "symbolic links"),
    ],
)
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, put: Callable[[Path], None], says: str) -> None:
    put(tmp_path / "f")
    with pytest.raises(TpmFileError, match=says) as caught:
        tpmfile.read(str(tmp_path / "f"), Backing())
    assert str(tmp_path / "f") in str(caught.value)
    assert caught.value.hint


def test_a_file_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").touch()
    with pytest.raises(TpmFileError, match="Not a directory"):
        tpmfile.read(str(tmp_path / "f" / "g"), Backing())


def test_a_file_of_somebody_else(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(document())
    path.chmod(0)
    before = os.geteuid()
    if before == 0:  # root may read everything
        os.seteuid(NOBODY)
    try:
        with pytest.raises(TpmFileError, match="Permission denied") as caught:
            tpmfile.read(str(path), Backing())
    finally:
        os.seteuid(before)
    assert "No new key was made" in caught.value.hint


def test_an_error_of_the_disk(tmp_path: Path) -> None:
    class Failing(Backing):
        def preadv(self, *_: Any) -> int:  # type: ignore[override]
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    (tmp_path / "f").write_bytes(document())
    with pytest.raises(TpmFileError, match="Input/output error"):
        tpmfile.read(str(tmp_path / "f"), Failing())


# --- a new file -------------------------------------------------------------------------------------------------------


def put(path: str, content: bytes = b"content", backing: Backing | None = None) -> None:
    backing = backing or Backing()
    with tpmfile.held(path, backing) as directory:
        tpmfile.publish(directory, path, content, backing)


def test_a_new_file_is_for_its_owner_only(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        put(str(tmp_path / "f"))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "f").stat().st_mode) == 0o600
    assert (tmp_path / "f").read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["f"]


def test_a_path_without_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    put("f")
    assert os.listdir(tmp_path) == ["f"]


def test_what_is_there_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(TpmFileError, match="File exists"):
        put(str(tmp_path / "f"))
    assert (tmp_path / "f").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_file_system_that_cannot_rename_without_replacing(tmp_path: Path) -> None:
    class Old(Backing):
        @staticmethod
        def renameat2(*_: Any) -> None:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    put(str(tmp_path / "f"), backing=Old())
    assert (tmp_path / "f").read_bytes() == b"content"
    assert os.listdir(tmp_path) == ["f"]


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(TpmFileError, match="no sealed key can be made there: No such file") as caught:
        put(str(tmp_path / "no" / "f"))
    assert f"mkdir -p -m 700 {tmp_path}/no" in caught.value.hint


def test_two_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpmfile, "_LOCK_ATTEMPTS", 2)
    monkeypatch.setattr(tpmfile, "_LOCK_PAUSE", 0.01)
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with pytest.raises(TpmFileError, match="another process is making"):
            put(str(tmp_path / "f"))
    finally:
        os.close(fd)
    put(str(tmp_path / "f"))


class Counting(Backing):
    """Does something at the n-th call: instead of it, or after it."""

    def __init__(self, at: int, act: Callable[[], Any], *, after: bool = False) -> None:
        self.calls: list[str] = []
        for name in ("open", "pwrite", "fsync", "close", "renameat2", "unlink", "fstat", "preadv", "rename"):
            setattr(self, name, self._counted(name, getattr(Backing, name), at, act, after=after))

    def _counted(self, name: str, call: Callable[..., Any], at: int, act: Callable[[], Any], *, after: bool) -> Any:
        def counted(*arguments: Any, **named: Any) -> Any:
            self.calls.append(name)
            if len(self.calls) - 1 == at and not after:
                act()
            result = call(*arguments, **named)
            if len(self.calls) - 1 == at:
                act()
            return result

        return counted


def full() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def steps(path: Path) -> list[str]:
    """The calls of one `put`."""
    counting = Counting(-1, die)
    put(str(path), backing=counting)
    path.unlink()
    return counting.calls


def test_the_order_of_the_calls(tmp_path: Path) -> None:
    assert steps(tmp_path / "f") == ["open", "open", "pwrite", "fsync", "close", "renameat2", "fsync", "close"]


def test_a_disk_that_fails(tmp_path: Path) -> None:
    """Whatever fails: an error, no temporary, and no file that is not whole."""
    path = tmp_path / "f"
    for at, name in enumerate(steps(path)):
        failing = Counting(at, full)
        if name == "close":
            continue  # it frees the descriptor in any case, and a file was synced before
        with pytest.raises(TpmFileError, match="No space left"):
            put(str(path), backing=failing)
        left = os.listdir(tmp_path)
        assert left == (["f"] if at == 6 else []), name  # the directory was not synced: the file may be there
        if left:
            assert path.read_bytes() == b"content"
            path.unlink()


def test_killed_at_any_call(tmp_path: Path) -> None:
    """Before and after each call: the file is whole or not there, and the next attempt works."""
    path = tmp_path / "f"
    calls = steps(path)
    for at in range(len(calls)):
        for after in (False, True):
            if not (child := os.fork()):
                try:
                    put(str(path), backing=Counting(at, die, after=after))
                finally:
                    os._exit(1)
            _, status = os.waitpid(child, 0)
            assert os.WTERMSIG(status) == signal.SIGKILL
            if at < 5 or (at == 5 and not after):
                assert not path.exists()
                put(str(path), b"another")
                assert path.read_bytes() == b"another"
            else:
                assert path.read_bytes() == b"content"
            assert os.listdir(tmp_path) == ["f"]
            path.unlink()


def test_a_file_that_was_found_is_synced_before_it_is_relied_on(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(document())
    counting = Counting(-1, die)
    tpmfile.sync(str(path), counting)
    assert counting.calls == ["open", "fsync", "close"] * 2
    for at in (0, 1, 3, 4):
        with pytest.raises(TpmFileError, match="No space left"):
            tpmfile.sync(str(path), Counting(at, full))
