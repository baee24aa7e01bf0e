"""Keys sealed by a TPM, with a real one in software: what opens them, what does not, and what the bus shows.

Each test has a TPM of its own, which is new. "SECRET" is the encryption password.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
import json
import logging
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import swtpm

from encfs_js import config, errors, tpm, tpmfile
from encfs_js.backing import Backing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from swtpm import Swtpm

SECRET = "s3cret-4711-s3cret"
SRK_SECRET = "srk-s3cret-0815-srk"
NATS_KEY = b"SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"
why_not = swtpm.needs_swtpm()
with_tpm = pytest.mark.skipif(bool(why_not), reason=why_not or "-")


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[Swtpm]:
    """A TPM that is switched on, and has nothing left in it at the end."""
    with swtpm.running(tmp_path / "chip") as chip:
        yield chip
        assert chip.contents() == []


@pytest.fixture
def options(tmp_path: Path, chip: Swtpm) -> config.Tpm:
    return config.Tpm(keys_file=str(tmp_path / "key.tpm"), encryption_password=SECRET, tcti=chip.tcti)


def changed(options: config.Tpm, **changes: Any) -> config.Tpm:
    return msgspec.structs.replace(options, **changes)


def content_of(options: config.Tpm) -> bytes:
    with open(options.keys_file, "rb") as file:
        return file.read()


def put(options: config.Tpm, content: bytes) -> None:
    with open(options.keys_file, "wb") as file:
        file.write(content)


def everything_about(error: BaseException) -> str:
    """All that an error handler or a log could show of an error."""
    found, here = "", [error]
    while here:
        e = here.pop()
        found += "".join(traceback.format_exception(e)) + repr(e) + repr(e.args) + repr(vars(e))
        here += [c for c in (e.__context__, e.__cause__) if c is not None]
    return found


def refused(kind: type[errors.EncfsError], options: config.Tpm, says: str | None = None) -> errors.EncfsError:
    """Unsealing fails as it should, in one line with a hint, and shows no secret."""
    with pytest.raises(kind, match=says) as caught:
        tpm.unseal(options)
    assert type(caught.value) is kind
    assert caught.value.hint
    assert "\n" not in str(caught.value) + caught.value.hint
    for secret in (SECRET, SRK_SECRET, "SU"):
        assert secret not in everything_about(caught.value)
    return caught.value


# --- what opens -------------------------------------------------------------------------------------------------------


@with_tpm
@pytest.mark.parametrize("srk_password", ["", SRK_SECRET], ids=["without srk_password", "with srk_password"])
def test_a_key_is_made_once_and_opens_again(chip: Swtpm, options: config.Tpm, srk_password: str) -> None:
    options = changed(options, srk_password=srk_password)
    key = tpm.make(options, random=lambda count: bytes(range(count)))
    assert key == tpmfile.user_seed(bytes(range(32)))
    content = content_of(options)
    assert stat.S_IMODE(os.stat(options.keys_file).st_mode) == 0o600
    assert ("srk_salt" in json.loads(content)) == bool(srk_password)
    assert tpm.unseal(options) == key
    assert tpm.make(options) == key, "what is there is used"
    assert content_of(options) == content
    for turn_off in (chip.shut_down, chip.pull_the_plug):
        turn_off()
        chip.power_on()
        assert tpm.unseal(options) == key
    assert os.listdir(os.path.dirname(options.keys_file)).count("key.tpm") == 1


@with_tpm
def test_two_keys_are_not_the_same(options: config.Tpm) -> None:
    first = tpm.make(options)
    os.unlink(options.keys_file)
    assert tpm.make(options) != first


@with_tpm
@pytest.mark.parametrize(
    "password",
    ["", "x", "x" * 32, "x" * 33, "ü" * 32, "x" * 1000, "key\n", "\udce9t\udce9"],
    ids=["none", "1", "32", "33", "64", "1000", "newline", "bytes that are no text"],
)
def test_any_password_will_do(options: config.Tpm, password: str) -> None:
    options = changed(options, encryption_password=password)
    key = tpm.make(options)
    assert tpm.unseal(options) == key
    with pytest.raises(errors.TpmPasswordError):
        tpm.unseal(changed(options, encryption_password=password + "x"))


@with_tpm
def test_a_long_password_whose_digest_ends_in_zero(options: config.Tpm) -> None:
    """A TPM drops zeros at the end of a password."""
    words = (f"{number:040}" for number in itertools.count())
    password = next(word for word in words if hashlib.sha256(word.encode()).digest()[-1] == 0)
    options = changed(options, encryption_password=password)
    assert tpm.make(options) == tpm.unseal(options)


@with_tpm
@pytest.mark.parametrize("pcr", [17, 18, 19, 20, 21, 22, 23])
def test_every_pcr(options: config.Tpm, pcr: int) -> None:
    options = changed(options, pcr=pcr)
    assert tpm.make(options) == tpm.unseal(options)
    other = 22 if pcr != 22 else 21
    problem = refused(errors.TpmPcrError, changed(options, pcr=other), f"sealed to PCR {pcr}, not to PCR {other}")
    assert f"pcr: {pcr}" in problem.hint


@with_tpm
def test_the_tpm_is_where_the_environment_says(
    chip: Swtpm, options: config.Tpm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TPM2TOOLS_TCTI", chip.tcti)
    key = tpm.make(changed(options, tcti=None))
    monkeypatch.setenv("TPM2TOOLS_TCTI", "swtpm:host=127.0.0.1,port=1")
    assert tpm.unseal(options) == key, "the configuration comes first"
    refused(errors.TpmMissingError, changed(options, tcti=None), "no TPM at swtpm:host=127.0.0.1,port=1")
    monkeypatch.delenv("TPM2TOOLS_TCTI")
    if not os.path.exists("/dev/tpmrm0"):
        refused(errors.TpmMissingError, changed(options, tcti=None), "no TPM at device:/dev/tpmrm0: No such file")


# --- what nats-server made --------------------------------------------------------------------------------------------


def nats_file(chip: Swtpm, path: str, password: str, srk_password: str, pcr: int = 22) -> None:
    """Make a keys_file as nats-server does, from what is known of it: with PolicyPassword, and the SRK's own password."""
    with chip.talk() as (lib, esys):
        template = lib.TPMT_PUBLIC(
            type=lib.TPM2_ALG.RSA,
            nameAlg=lib.TPM2_ALG.SHA256,
            objectAttributes=lib.TPMA_OBJECT.FIXEDTPM
            | lib.TPMA_OBJECT.FIXEDPARENT
            | lib.TPMA_OBJECT.SENSITIVEDATAORIGIN
            | lib.TPMA_OBJECT.USERWITHAUTH
            | lib.TPMA_OBJECT.NODA
            | lib.TPMA_OBJECT.RESTRICTED
            | lib.TPMA_OBJECT.DECRYPT,
            unique=lib.TPMU_PUBLIC_ID(rsa=lib.TPM2B_PUBLIC_KEY_RSA(bytes(256))),
        )
        detail = template.parameters.rsaDetail
        detail.symmetric = lib.TPMT_SYM_DEF_OBJECT.parse("aes128cfb")
        detail.scheme.scheme = lib.TPM2_ALG.NULL
        detail.keyBits = 2048
        detail.exponent = 0
        auth = lib.TPM2B_SENSITIVE_CREATE(lib.TPMS_SENSITIVE_CREATE(userAuth=srk_password))
        srk, *_ = esys.create_primary(auth, lib.TPM2B_PUBLIC(publicArea=template), lib.ESYS_TR.OWNER)
        esys.tr_set_auth(srk, lib.TPM2B_AUTH(srk_password))
        trial = esys.start_auth_session(
            tpm_key=lib.ESYS_TR.NONE,
            bind=lib.ESYS_TR.NONE,
            session_type=lib.TPM2_SE.TRIAL,
            symmetric=lib.TPMT_SYM_DEF.parse("null"),
            auth_hash=lib.TPM2_ALG.SHA256,
        )
        esys.policy_pcr(trial, lib.TPM2B_DIGEST(), lib.TPML_PCR_SELECTION.parse(f"sha256:{pcr}"))
        esys.policy_password(trial)
        policy = bytes(esys.policy_get_digest(trial))
        esys.flush_context(trial)
        public = lib.TPMT_PUBLIC(
            type=lib.TPM2_ALG.KEYEDHASH,
            nameAlg=lib.TPM2_ALG.SHA256,
            objectAttributes=lib.TPMA_OBJECT.FIXEDTPM | lib.TPMA_OBJECT.FIXEDPARENT,
            authPolicy=policy,
        )
        public.parameters.keyedHashDetail.scheme.scheme = lib.TPM2_ALG.NULL
        secret = lib.TPM2B_SENSITIVE_CREATE(lib.TPMS_SENSITIVE_CREATE(userAuth=password, data=NATS_KEY))
        made, area, *_ = esys.create(srk, secret, lib.TPM2B_PUBLIC(publicArea=public))
        esys.flush_context(srk)

    def twice(data: bytes) -> str:
        return base64.b64encode(base64.b64encode(data)).decode()

    document = {"version": 1, "private_key": twice(bytes(made)), "public_key": twice(area.publicArea.marshal())}
    with open(path, "w", encoding="ascii") as file:
        json.dump(document, file, separators=(",", ":"))


@with_tpm
@pytest.mark.parametrize("password", ["pass", "", "x" * 40, "x" * 64], ids=["4", "none", "40", "64"])
@pytest.mark.parametrize("srk_password", ["", SRK_SECRET], ids=["without srk_password", "with srk_password"])
def test_a_file_that_nats_server_made(
    chip: Swtpm, options: config.Tpm, password: str, srk_password: str, caplog: pytest.LogCaptureFixture
) -> None:
    nats_file(chip, options.keys_file, password, srk_password)
    content = content_of(options)
    options = changed(options, encryption_password=password)
    assert tpm.unseal(options) == NATS_KEY
    assert caplog.records == []
    # As with nats-server, any srk_password will do; but it is said.
    assert tpm.unseal(changed(options, srk_password="whatever")) == NATS_KEY
    assert [r.levelno for r in caplog.records] == [logging.WARNING]
    assert tpm.make(options) == NATS_KEY
    assert content_of(options) == content
    refused(errors.TpmPasswordError, changed(options, encryption_password="wrong"))


@with_tpm
def test_a_file_that_nats_server_made_elsewhere(chip: Swtpm, options: config.Tpm, tmp_path: Path) -> None:
    with swtpm.running(tmp_path / "elsewhere") as other:
        nats_file(other, options.keys_file, SECRET, "")
    refused(errors.TpmParentError, options, "another TPM, or the file is damaged")
    assert chip.lockout()[0] == 0


@with_tpm
def test_our_file_is_one_for_nats_server(chip: Swtpm, options: config.Tpm) -> None:
    """Without srk_password it opens as nats-server opens its own: PolicyPCR and PolicyPassword below the same SRK."""
    key = tpm.make(options)
    document = json.loads(content_of(options))
    private, public = (base64.b64decode(base64.b64decode(document[n])) for n in ("private_key", "public_key"))
    assert document["version"] == 1
    assert nats_unseal(chip, private, public) == key


def nats_unseal(chip: Swtpm, private: bytes, public: bytes, tcti: str | None = None) -> bytes:
    """Unseal as nats-server does, password and secret in the clear."""
    with chip.talk(tcti=tcti) as (lib, esys):
        template = lib.TPMT_PUBLIC.unmarshal(tpm._SRK + b"\x01\x00" + bytes(256))[0]
        srk, *_ = esys.create_primary(
            lib.TPM2B_SENSITIVE_CREATE(), lib.TPM2B_PUBLIC(publicArea=template), lib.ESYS_TR.OWNER
        )
        area = lib.TPM2B_PUBLIC(publicArea=lib.TPMT_PUBLIC.unmarshal(public)[0])
        handle = esys.load(srk, lib.TPM2B_PRIVATE(private), area)
        esys.tr_set_auth(handle, lib.TPM2B_AUTH(SECRET))
        session = esys.start_auth_session(
            tpm_key=lib.ESYS_TR.NONE,
            bind=lib.ESYS_TR.NONE,
            session_type=lib.TPM2_SE.POLICY,
            symmetric=lib.TPMT_SYM_DEF.parse("null"),
            auth_hash=lib.TPM2_ALG.SHA256,
        )
        esys.policy_pcr(session, lib.TPM2B_DIGEST(), lib.TPML_PCR_SELECTION.parse("sha256:22"))
        esys.policy_password(session)
        esys.trsess_set_attributes(session, lib.TPMA_SESSION.CONTINUESESSION)
        found = bytes(esys.unseal(handle, session1=session))
        for each in (session, handle, srk):
            esys.flush_context(each)
        return found


# --- what does not open -----------------------------------------------------------------------------------------------


@with_tpm
def test_wrong_passwords_are_counted_and_lock(chip: Swtpm, options: config.Tpm) -> None:
    key = tpm.make(options)
    counter, most = chip.lockout()
    assert counter == 0
    wrong = changed(options, encryption_password="wrong")
    for count in range(1, most + 1):
        refused(errors.TpmPasswordError, wrong, f"tries left before it locks: {most - count}$")
        assert chip.lockout()[0] == count, "one call is one try"
        assert chip.contents() == []
    for each in (options, wrong):
        problem = refused(errors.TpmLockedError, each, "lockout")
        assert "every 1000 seconds" in problem.hint
        assert "tpm2_dictionarylockout --clear-lockout" in problem.hint
        assert chip.contents() == []
    with pytest.raises(errors.TpmLockedError):
        tpm.make(options)
    chip.unlock()
    assert tpm.unseal(options) == key


@with_tpm
def test_losses_of_power_lock_too_and_shutdowns_do_not(chip: Swtpm, options: config.Tpm) -> None:
    """What systemd/README.md says about it."""
    key = tpm.make(options)
    for _ in range(4):
        assert tpm.unseal(options) == key
        chip.shut_down()
        chip.power_on()
    assert chip.lockout()[0] == 0
    for _ in range(3):
        assert tpm.unseal(options) == key
        chip.pull_the_plug()
        chip.power_on()
    refused(errors.TpmLockedError, options, "or losses of power")
    chip.unlock()
    assert tpm.unseal(options) == key


@with_tpm
@pytest.mark.parametrize("made", ["", SRK_SECRET])
def test_another_srk_password(chip: Swtpm, options: config.Tpm, made: str) -> None:
    options = changed(options, srk_password=made)
    key = tpm.make(options)
    for wrong in {"", SRK_SECRET, SRK_SECRET + "x", "another"} - {made}:
        refused(errors.TpmParentError, changed(options, srk_password=wrong), "srk_password")
    assert chip.lockout()[0] == 0
    assert tpm.unseal(options) == key


@with_tpm
@pytest.mark.parametrize("srk_password", ["", SRK_SECRET])
def test_another_tpm(chip: Swtpm, options: config.Tpm, tmp_path: Path, srk_password: str) -> None:
    options = changed(options, srk_password=srk_password)
    key = tpm.make(options)
    with swtpm.running(tmp_path / "elsewhere") as other:
        refused(errors.TpmParentError, changed(options, tcti=other.tcti), "another TPM")
        assert (other.contents(), other.lockout()[0]) == ([], 0)
    assert tpm.unseal(options) == key
    with chip.talk() as (lib, esys):
        esys.clear(lib.ESYS_TR.LOCKOUT)
    refused(errors.TpmParentError, options, "another TPM")


@with_tpm
def test_a_pcr_that_has_changed(chip: Swtpm, options: config.Tpm) -> None:
    key = tpm.make(options)
    chip.extend(22)
    for password in (SECRET, "wrong"):
        refused(errors.TpmPcrError, changed(options, encryption_password=password), "PCR 22 is not what it was")
    assert chip.lockout()[0] == 0, "no password is tried in vain"
    chip.shut_down()
    chip.power_on()
    assert tpm.unseal(options) == key


@with_tpm
def test_sealed_to_the_state_of_now(chip: Swtpm, options: config.Tpm) -> None:
    chip.extend(22)
    key = tpm.make(options)
    assert tpm.unseal(options) == key
    chip.shut_down()
    chip.power_on()
    refused(errors.TpmPcrError, options)
    chip.extend(22)
    assert tpm.unseal(options) == key


@with_tpm
def test_the_tpm_itself_refuses_another_pcr(chip: Swtpm, options: config.Tpm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not only our look at the PCRs before."""
    tpm.make(options)
    chip.extend(22)
    monkeypatch.setattr(tpm, "_check_policy", lambda *_: None)
    refused(errors.TpmPcrError, options, "PCR 22 is not what it was")
    assert (chip.contents(), chip.lockout()[0]) == ([], 0)


@with_tpm
def test_a_pcr_that_changes_in_between(chip: Swtpm, options: config.Tpm, monkeypatch: pytest.MonkeyPatch) -> None:
    tpm.make(options)
    import tpm2_pytss  # noqa: PLC0415

    real = tpm2_pytss.ESAPI.policy_auth_value

    def meanwhile(esys: Any, session: Any) -> None:
        real(esys, session)
        digest = tpm2_pytss.TPMU_HA(sha256=b"\1" * 32)
        values = tpm2_pytss.TPML_DIGEST_VALUES([tpm2_pytss.TPMT_HA(hashAlg=tpm2_pytss.TPM2_ALG.SHA256, digest=digest)])
        esys.pcr_extend(tpm2_pytss.ESYS_TR(10), values)  # a change of 21 to 23 is not noticed as one

    monkeypatch.setattr(tpm2_pytss.ESAPI, "policy_auth_value", meanwhile)
    refused(errors.TpmPcrError, options, "has changed just now")
    assert chip.lockout()[0] == 0


@with_tpm
def test_an_owner_hierarchy_with_a_password(chip: Swtpm, options: config.Tpm) -> None:
    tpm.make(options)
    chip.set_owner_password("owner")
    problem = refused(errors.TpmOwnerError, options, "has a password")
    assert "tpm2_changeauth -c owner" in problem.hint
    with pytest.raises(errors.TpmOwnerError):
        tpm.make(changed(options, keys_file=options.keys_file + "2"))
    assert not os.path.exists(options.keys_file + "2")
    assert chip.lockout()[0] == 0


@with_tpm
def test_an_owner_hierarchy_that_is_turned_off(chip: Swtpm, options: config.Tpm) -> None:
    tpm.make(options)
    with chip.talk() as (lib, esys):
        esys.hierarchy_control(lib.ESYS_TR.OWNER, lib.ESYS_TR.OWNER, False)
    refused(errors.TpmOwnerError, options, "is turned off")


@with_tpm
def test_a_tpm_without_room(chip: Swtpm, options: config.Tpm) -> None:
    """What has no meaning of its own is a TPM that cannot be used, with the code and the library's words."""
    tpm.make(options)
    with chip.talk() as (_, esys):
        taken = [esys.create_primary(None, "ecc")[0] for _ in range(2)]
        refused(errors.TpmMissingError, options, r"out of memory for object contexts \(0x902\)$")
        for handle in taken:
            esys.flush_context(handle)
    tpm.unseal(options)


# --- the file ---------------------------------------------------------------------------------------------------------


def nowhere(path: Path) -> config.Tpm:
    """Options with no TPM behind them: an error about the file proves that none was asked."""
    return config.Tpm(keys_file=str(path), encryption_password=SECRET, tcti="swtpm:host=127.0.0.1,port=1")


def test_no_file(tmp_path: Path) -> None:
    refused(errors.TpmFileError, nowhere(tmp_path / "key.tpm"), "no such file")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("function", [tpm.unseal, tpm.make])
@pytest.mark.parametrize("content", [b"", b"no JSON", b'{"version":2}', b'{"version":1,"private_key":"'])
def test_a_file_that_is_damaged_is_never_replaced(
    tmp_path: Path, content: bytes, function: Callable[[config.Tpm], bytes]
) -> None:
    (tmp_path / "key.tpm").write_bytes(content)
    with pytest.raises(errors.TpmFileError):
        function(nowhere(tmp_path / "key.tpm"))
    assert (tmp_path / "key.tpm").read_bytes() == content
    assert os.listdir(tmp_path) == ["key.tpm"]


def test_no_file_of_another_kind_hangs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        for function in (tpm.unseal, tpm.make):
            with pytest.raises(errors.TpmFileError, match="no regular file"):
                function(nowhere(path))


@with_tpm
@pytest.mark.parametrize("by_nats", [False, True], ids=["ours", "of nats-server"])
def test_flipped_bits(chip: Swtpm, options: config.Tpm, by_nats: bool) -> None:
    """An error that says what is wrong, or the same key where the bit means nothing; and no password is tried in vain."""
    if by_nats:
        nats_file(chip, options.keys_file, SECRET, "")
        key = NATS_KEY
    else:
        key = tpm.make(options)
    content = content_of(options)
    beyond = []
    for bit in range(8 * len(content)):
        spoilt = bytearray(content)
        spoilt[bit // 8] ^= 1 << bit % 8
        with contextlib.suppress(errors.TpmFileError):
            if tpmfile.parse(bytes(spoilt), "f") != tpmfile.parse(content, "f"):
                beyond.append(bytes(spoilt))
    assert len(beyond) > 500, "most only the TPM can see"
    for spoilt in random.Random(4711).sample(beyond, 25):
        put(options, spoilt)
        with pytest.raises((errors.TpmFileError, errors.TpmParentError, errors.TpmPcrError)):
            tpm.unseal(options)
        with pytest.raises((errors.TpmFileError, errors.TpmParentError, errors.TpmPcrError)):
            tpm.make(options)
        assert content_of(options) == spoilt
    assert (chip.contents(), chip.lockout()[0]) == ([], 0)
    put(options, content)
    assert tpm.unseal(options) == key


@with_tpm
@pytest.mark.parametrize("size", [1, 2, 34, 50, 100, -2, -1])
def test_a_private_area_that_was_cut(chip: Swtpm, options: config.Tpm, size: int) -> None:
    tpm.make(options)
    sealed = tpmfile.parse(content_of(options), "f")
    for name in (sealed.srk_name, None):
        cut = tpmfile.Sealed(sealed.private[:size], sealed.public, name)
        put(options, tpmfile.encode(cut))
        refused(errors.TpmFileError if name else errors.TpmParentError, options)
    assert chip.lockout()[0] == 0


@with_tpm
def test_a_secret_that_is_no_text(options: config.Tpm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tpmfile, "user_seed", lambda _: b"\xff\xfe")
    with pytest.raises(errors.TpmFileError, match="not the text of a key"):
        tpm.make(options)
    assert not os.path.exists(options.keys_file)


@with_tpm
def test_a_tpm_that_gives_out_something_else(options: config.Tpm, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is not written before the key was seen again."""
    monkeypatch.setattr(tpm, "_unseal", lambda *_: b"another")
    with pytest.raises(errors.TpmMissingError, match="another key than was sealed"):
        tpm.make(options)
    assert not os.path.exists(options.keys_file)


@with_tpm
def test_killed_while_the_file_is_made(options: config.Tpm) -> None:
    """Between any two calls that touch the disk: no file or a whole one, and its key opens."""

    class Dying(Backing):
        calls = 0

        def __getattribute__(self, name: str) -> Any:
            found = object.__getattribute__(self, name)
            if callable(found) and not name.startswith("_"):
                Dying.calls += 1
                if Dying.calls == limit:
                    os.kill(os.getpid(), signal.SIGKILL)
            return found

    limit = -1
    tpm.make(options, backing=Dying())
    total = Dying.calls
    os.unlink(options.keys_file)
    there = []
    for step in range(1, total + 1):
        limit = step
        if not (child := os.fork()):
            Dying.calls = 0
            with contextlib.suppress(BaseException):
                tpm.make(options, backing=Dying())
            os._exit(1)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        there.append(os.path.exists(options.keys_file))
        if there[-1]:
            assert tpm.make(options) == tpm.unseal(options)
            os.unlink(options.keys_file)
        else:
            refused(errors.TpmFileError, options, "no such file")
    assert there == sorted(there), "not there before the rename, there after it"
    assert set(there) == {False, True}
    key = tpm.make(options)
    assert tpm.unseal(options) == key
    assert sorted(os.listdir(os.path.dirname(options.keys_file))) == ["chip", "key.tpm"]


@with_tpm
def test_two_that_make_it_at_the_same_time_get_the_same_key(options: config.Tpm) -> None:
    children = []
    reader, writer = os.pipe()
    for _ in range(2):  # swtpm talks to one at a time: the lock has to see to that
        if not (child := os.fork()):
            with contextlib.suppress(BaseException):
                os.write(writer, tpm.make(options) + b"\n")
                os._exit(0)
            os._exit(1)
        children.append(child)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        keys = file.read().split()
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
    assert keys == [tpm.unseal(options)] * 2


@with_tpm
def test_a_file_that_was_found_is_on_the_disk_before_a_store_relies_on_it(options: config.Tpm) -> None:
    """Who made it may have died between the rename and the last fsync."""

    class Counting(Backing):
        count = 0

        @staticmethod
        def fsync(fd: int) -> None:
            Counting.count += 1
            os.fsync(fd)

    class Failing(Backing):
        @staticmethod
        def fsync(_: int) -> None:
            raise OSError(5, os.strerror(5))

    key = tpm.make(options)
    assert tpm.make(options, backing=Counting()) == key
    assert Counting.count == 2, "the file and its directory"
    with pytest.raises(errors.TpmFileError, match="not safely on the disk"):
        tpm.make(options, backing=Failing())
    assert tpm.unseal(options, backing=Failing()) == key


# --- no TPM -----------------------------------------------------------------------------------------------------------


@with_tpm
def test_a_tpm_that_goes_away(chip: Swtpm, options: config.Tpm) -> None:
    key = tpm.make(options)
    chip.pull_the_plug()
    problem = refused(errors.TpmMissingError, options, f"no TPM at {chip.tcti}")
    assert "TPM2TOOLS_TCTI" in problem.hint
    chip.power_on()
    assert tpm.unseal(options) == key


@with_tpm
@pytest.mark.parametrize("call", ["load", "unseal", "start_auth_session", "pcr_read", "create_primary"])
def test_a_tpm_that_goes_away_in_the_middle(
    chip: Swtpm, options: config.Tpm, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    import tpm2_pytss  # noqa: PLC0415

    key = tpm.make(options)
    real = getattr(tpm2_pytss.ESAPI, call)

    def late(*arguments: Any, **named: Any) -> Any:
        chip.pull_the_plug()
        return real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(tpm2_pytss.ESAPI, call, late)
        refused(errors.TpmMissingError, options, r"\(0x[0-9a-f]+\)$")
    chip.power_on()
    assert tpm.unseal(options) == key


@with_tpm
@pytest.mark.parametrize(
    ("tcti", "says"),
    [
        ("device:/dev/none", "No such file"),
        ("device:/dev/null", "IO failure|tcti"),
        ("nonsense:x", "no TPM at nonsense:x"),
        ("swtpm:path=/none", "no TPM at swtpm"),
        (":", "no TPM at :"),
        ("device", "no TPM at device"),
    ],
)
def test_a_tcti_that_leads_nowhere(tmp_path: Path, tcti: str, says: str) -> None:
    public = tpmfile.template(bytes(32))[:-2] + b"\0\x20" + bytes(32)
    (tmp_path / "key.tpm").write_bytes(tpmfile.encode(tpmfile.Sealed(b"x" * 64, public)))
    if tcti == "device" and os.path.exists("/dev/tpmrm0"):
        pytest.skip("this machine has a TPM there")
    refused(errors.TpmMissingError, changed(nowhere(tmp_path / "key.tpm"), tcti=tcti), says)


def test_a_device_of_somebody_else(tmp_path: Path) -> None:
    device = tmp_path / "tpmrm0"
    device.touch(0)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        problem = tpm._no_tpm(f"device:{device}", ValueError("?"))
    finally:
        os.seteuid(before)
    assert "Permission denied" in str(problem)
    assert "tss" in problem.hint


def in_python(code: str, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environ},
    )


@with_tpm
def test_the_library_is_imported_by_who_needs_it() -> None:
    code = (
        "import sys, encfs_js.cli, encfs_js.cli_mount, encfs_js.cli_init, encfs_js.tpm, encfs_js.worker, "
        "encfs_js.supervisor; print([m for m in sys.modules if m.startswith('tpm2_pytss')])"
    )
    done = in_python(code)
    assert (done.stdout, done.stderr) == ("[]\n", "")


@pytest.mark.parametrize("kind", ["missing", "broken"])
def test_without_the_library(tmp_path: Path, kind: str) -> None:
    if kind == "broken":
        (tmp_path / "tpm2_pytss.py").write_text(
            "raise ImportError('libtss2-fapi.so.1: cannot open shared object file:\\nno such file')"
        )
    code = (
        "import sys; from encfs_js import tpm, config, errors; sys.path.insert(0, sys.argv[1])\n"
        "if sys.argv[2] == 'missing': sys.modules['tpm2_pytss'] = None\n"
        "try: tpm.make(config.Tpm(keys_file=sys.argv[1] + '/key.tpm', encryption_password='x'))\n"
        "except errors.TpmMissingError as e: print(e, e.hint, sep='\\n')"
    )
    done = in_python(code, str(tmp_path), kind)
    says, hint = done.stdout.splitlines()
    assert "without tpm2-pytss" in says
    assert ("libtss2-fapi.so.1: cannot open" in says) == (kind == "broken")
    assert "pip install 'encfs-js[tpm]'" in hint
    assert "libtss2-dev" in hint
    assert done.stderr == ""
    assert not (tmp_path / "key.tpm").exists()
    assert not (tmp_path / "key.tpm.tmp").exists()


@with_tpm
def test_the_library_says_nothing_by_itself(options: config.Tpm) -> None:
    """A wrong password and a TPM that is not there: nothing on stderr, unless the user wants it."""
    tpm.make(options)
    code = (
        "import sys; from encfs_js import tpm, config, errors\n"
        "for tcti in (sys.argv[2], 'swtpm:host=127.0.0.1,port=1'):\n"
        "    try: tpm.unseal(config.Tpm(keys_file=sys.argv[1], encryption_password='x', tcti=tcti))\n"
        "    except errors.EncfsError as e: print(type(e).__name__)"
    )
    quiet = {name: value for name, value in os.environ.items() if name != "TSS2_LOG"}
    done = subprocess.run(
        [sys.executable, "-c", code, options.keys_file, str(options.tcti)],
        capture_output=True,
        text=True,
        timeout=60,
        env=quiet,
    )
    assert (done.stdout, done.stderr) == ("TpmPasswordError\nTpmMissingError\n", "")
    done = in_python(code, options.keys_file, str(options.tcti), TSS2_LOG="all+ERROR")
    assert "ERROR" in done.stderr


# --- the bus ----------------------------------------------------------------------------------------------------------


@with_tpm
def test_neither_secret_nor_password_crosses_the_bus(
    chip: Swtpm, options: config.Tpm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is recorded between library and TPM; nats-server's own way shows that it would be seen."""
    record = tmp_path / "bus"
    monkeypatch.setenv("TCTI_PCAP_FILE", str(record))

    def recorded(act: Callable[[], bytes]) -> tuple[bytes, bytes]:
        record.unlink(missing_ok=True)
        return act(), record.read_bytes()

    overheard = changed(options, tcti=f"pcap:{options.tcti}", srk_password=SRK_SECRET)
    key, making = recorded(lambda: tpm.make(overheard))
    sealed = tpmfile.parse(content_of(options), "f")
    again, opening = recorded(lambda: tpm.unseal(overheard))
    assert again == key
    for bus in (making, opening):
        assert len(bus) > 2000
        assert sealed.public in bus, "the record is complete, and not compressed"
        for secret in (key, key[2:40], base64.b32decode(key + b"=" * 6)[2:34], SECRET.encode(), SRK_SECRET.encode()):
            assert secret not in bus

    os.unlink(options.keys_file)
    nats_file(chip, options.keys_file, SECRET, SRK_SECRET)
    sealed = tpmfile.parse(content_of(options), "f")
    found, bus = recorded(lambda: tpm.unseal(changed(overheard, srk_password="")))
    assert found == NATS_KEY
    assert sealed.public in bus
    assert NATS_KEY not in bus
    assert SECRET.encode() not in bus
    found, bus = recorded(lambda: nats_unseal(chip, sealed.private, sealed.public, overheard.tcti))
    assert found == NATS_KEY
    assert NATS_KEY in bus
    assert SECRET.encode() in bus


@with_tpm
def test_the_options_are_not_shown(options: config.Tpm) -> None:
    shown = repr(changed(options, srk_password=SRK_SECRET))
    assert SECRET not in shown
    assert SRK_SECRET not in shown
    assert options.keys_file in shown
    assert threading.active_count() == 1, "no thread is left that could hold one"
