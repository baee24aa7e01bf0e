"""A key that only this machine's TPM gives out: sealed to one PCR and a password, kept in a file (tpmfile.py).

The words are nats-server's, and so is the template from which the storage root key (SRK) is made anew each time. A sealed key
opens with PolicyPCR and PolicyAuthValue. nats-server uses PolicyPassword, which has the same digest by design (TPM 2.0
Library, Part 3, "TPM2_PolicyPassword"): its files open in the same way, and the password does not cross the bus. Neither does
the secret: the sessions are salted with the SRK and encrypt what they carry.

tpm2-pytss is imported in functions only: it is an extra, and costs 18 MB.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import hmac
import logging
import os
import shlex
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from encfs_js import tpmfile
from encfs_js.backing import Backing
from encfs_js.errors import (
    CipherMissingError,
    EncfsError,
    TpmFileError,
    TpmLockedError,
    TpmMissingError,
    TpmOwnerError,
    TpmParentError,
    TpmPasswordError,
    TpmPcrError,
)
from encfs_js.format import REFUSED

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from encfs_js.config import Tpm
    from encfs_js.tpmfile import Sealed

log = logging.getLogger(__name__)

VARIABLE: Final = "TPM2TOOLS_TCTI"  # where tpm2-tools look for the TPM, too
DEVICE: Final = "device:/dev/tpmrm0"  # the kernel's resource manager
_PCRS: Final = range(17, 24)

# TPMT_PUBLIC of the SRK (Part 2, 12.2.4), up to its unique: RSA, nameAlg SHA256, fixedTPM|fixedParent|sensitiveDataOrigin|
# userWithAuth|noDA|restricted|decrypt, no policy, AES-128-CFB, scheme NULL, 2048 bits, exponent 0.
_SRK: Final = struct.pack(">HHIHHHHHHI", 0x0001, 0x000B, 0x00030472, 0, 0x0006, 128, 0x0043, 0x0010, 2048, 0)
_UNIQUE: Final = 256  # bytes
_SCRYPT: Final = {"n": 2**15, "r": 8, "p": 1}  # 32 MiB, 80 ms
# A TPM takes passwords as long as its longest digest, which need not be more than SHA-256.
_MAX_AUTH: Final = 32
_MAX_AUTH_NATS: Final = 64  # its files hold what the TPM at hand took

# TPM_RC (Part 2, 6.6), without the bits that say which handle, parameter or session.
_HIERARCHY: Final = 0x85
_AUTH_FAIL: Final = 0x8E
_POLICY_FAIL: Final = 0x9D
_BAD_AUTH: Final = 0xA2
_PCR_CHANGED: Final = 0x128
_LOCKOUT: Final = 0x921
# What Load says to a private area that is none, or none of this SRK's: VALUE, SIZE, INSUFFICIENT, INTEGRITY, BINDING.
_NO_OBJECT: Final = (0x84, 0x95, 0x9A, 0x9F, 0xA5)
_FORMAT_ONE: Final = 0x80
_LAYERS: Final = {0, 11}  # of a TSS2_RC: the TPM itself, also by way of a resource manager
_CC_POLICY_AUTH_VALUE: Final = 0x16B
_CC_POLICY_PCR: Final = 0x17F

_OTHERWISE: Final = "Or open the store with another of its keys, a recovery code, say."
_NEEDS: Final = "apt-get install libtss2-dev pkg-config build-essential python3-dev; pip install 'encfs-js[tpm]'"


def unseal(options: Tpm, *, backing: Backing | None = None) -> bytes:
    """Return the key text that keys_file holds. One try: a wrong password costs one of those that the TPM allows.

    Raises TpmFileError (missing, unreadable, damaged), TpmMissingError, TpmOwnerError, TpmParentError, TpmPcrError,
    TpmPasswordError, TpmLockedError.
    """
    content = tpmfile.read(options.keys_file, backing or Backing())
    if content is None:
        raise TpmFileError(
            f"{options.keys_file}: there is no sealed key: no such file",
            hint="Check keys_file, or put the file back from a backup: a new key would not open what it opened. "
            + _OTHERWISE,
        )
    return _unseal(tpmfile.parse(content, options.keys_file), options)


def make(options: Tpm, *, random: Callable[[int], bytes] = os.urandom, backing: Backing | None = None) -> bytes:
    """Return the key text that keys_file holds; where there is no such file, make a key, seal it and write the file.

    A new file is written after the TPM has given its key out again, and the key is returned when the file is on the disk.
    A file that is there and cannot be used is an error, and stays. Raises what `unseal` raises.
    """
    backing = backing or Backing()
    path = options.keys_file
    if (content := tpmfile.read(path, backing)) is None:
        with tpmfile.held(path, backing) as directory:
            if (content := tpmfile.read(path, backing)) is None:
                key = tpmfile.user_seed(random(32))
                salt = random(tpmfile.SALT) if options.srk_password else None
                content = tpmfile.encode(_seal(key, salt, options))
                if not hmac.compare_digest(_unseal(tpmfile.parse(content, path), options), key):
                    raise TpmMissingError(
                        "the TPM gave out another key than was sealed", hint="Do not rely on this TPM."
                    )
                tpmfile.publish(directory, path, content, backing)
                return key
    key = _unseal(tpmfile.parse(content, path), options)
    tpmfile.sync(path, backing)  # before a store relies on it
    return key


def _seal(key: bytes, salt: bytes | None, options: Tpm) -> Sealed:
    with _opened(options) as chip:
        lib = chip.lib
        # Nothing tells yet that this SRK is the TPM's, and not of somebody on the bus. The file names it from here on.
        srk, name = _storage_root(chip, options, salt)
        session = _session(chip, srk, lib.TPM2_SE.HMAC)
        policy = _policy(options.pcr, _read_pcrs(chip)[options.pcr])
        auth = _auth(options.encryption_password, _MAX_AUTH)
        secret = lib.TPM2B_SENSITIVE_CREATE(lib.TPMS_SENSITIVE_CREATE(userAuth=auth, data=key))
        private, public, *_ = chip.esys.create(srk, secret, _area(lib, tpmfile.template(policy)), session1=session)
        return tpmfile.Sealed(bytes(private), bytes(public.publicArea.marshal()), name, salt)


def _unseal(sealed: Sealed, options: Tpm) -> bytes:
    path, nats = options.keys_file, sealed.srk_name is None
    if nats and options.srk_password:
        log.warning("%s was made by nats-server: srk_password protects nothing there, and is not needed", path)
    elif not nats and bool(options.srk_password) != (sealed.srk_salt is not None):
        raise _wrong_parent(path, f"it was sealed with{'' if sealed.srk_salt else 'out'} an srk_password")
    with _opened(options) as chip:
        lib, esys = chip.lib, chip.esys
        srk, name = _storage_root(chip, options, sealed.srk_salt)
        if not nats and name != sealed.srk_name:
            wrong = (
                "another srk_password, or another TPM" if sealed.srk_salt else "another TPM, or it was cleared since"
            )
            raise _wrong_parent(path, wrong)
        session = _session(chip, srk, lib.TPM2_SE.HMAC)
        _check_policy(sealed.policy, _read_pcrs(chip), options)

        def no_object() -> EncfsError:
            if nats:
                return _wrong_parent(path, "another TPM, or the file is damaged")
            return tpmfile.damaged(path, "the TPM finds it changed")  # for the SRK is the right one

        with _refusals(lib, dict.fromkeys(_NO_OBJECT, no_object)):
            sealed_private = lib.TPM2B_PRIVATE(sealed.private)
            handle = esys.load(srk, sealed_private, _area(lib, sealed.public), session1=session)
        chip.opened.callback(_flush, chip, handle)
        auth = _auth(options.encryption_password, _MAX_AUTH_NATS if nats else _MAX_AUTH)
        esys.tr_set_auth(handle, lib.TPM2B_AUTH(auth))
        policy = _session(chip, srk, lib.TPM2_SE.POLICY)
        esys.policy_pcr(policy, lib.TPM2B_DIGEST(), lib.TPML_PCR_SELECTION.parse(f"sha256:{options.pcr}"))
        esys.policy_auth_value(policy)
        # The TPM counts wrong passwords, and locks after some (dictionary attack protection). Once the key was used, a loss of
        # power counts as one, too, unless the TPM was told before: the kernel does that when it shuts down. noDA in the
        # object would do away with both, and a password that a person can remember needs the first.
        known = dict.fromkeys((_AUTH_FAIL, _BAD_AUTH), lambda: _wrong_password(chip, path)) | {
            _LOCKOUT: lambda: _locked(chip, path),
            _POLICY_FAIL: lambda: _wrong_pcr(path, f"PCR {options.pcr} is not what it was"),
            _PCR_CHANGED: lambda: _wrong_pcr(path, f"PCR {options.pcr} has changed just now"),
        }
        with _refusals(lib, known):
            key = bytes(esys.unseal(handle, session1=policy))
    if not key or not key.isascii():
        raise tpmfile.damaged(path, "what was sealed is not the text of a key")
    return key


# -- talking to it


class _Chip(NamedTuple):
    """The library, an open TPM, and what is undone at the end, also after an error: nothing stays in the TPM."""

    lib: Any
    esys: Any
    opened: contextlib.ExitStack


@contextlib.contextmanager
def _opened(options: Tpm) -> Iterator[_Chip]:
    """Open the TPM for the block. Raises TpmMissingError, also for what the TPM refuses without a meaning of its own."""
    os.environ.setdefault("TSS2_LOG", "all+NONE")  # before the import, or the library writes to stderr by itself
    try:
        import tpm2_pytss as lib  # noqa: PLC0415
    except ImportError as problem:
        reason = " ".join(str(problem).split())
        raise TpmMissingError(f"the TPM cannot be used without tpm2-pytss: {reason}", hint=_NEEDS) from None
    tcti = options.tcti or os.environ.get(VARIABLE) or DEVICE
    try:
        esys = lib.ESAPI(tcti)
    except lib.TSS2_Exception as problem:
        raise _no_tpm(tcti, problem) from None
    with esys, _refusals(lib, {}), contextlib.ExitStack() as opened:
        yield _Chip(lib, esys, opened)


@contextlib.contextmanager
def _refusals(lib: Any, known: Mapping[int, Callable[[], EncfsError]]) -> Iterator[None]:
    """Raise the error that `known` has for the TPM's return code, TpmMissingError for any other."""
    try:
        yield
    except lib.TSS2_Exception as problem:
        rc = int(problem.rc)
        code = rc & 0xFFFF if rc >> 16 in _LAYERS else -1
        if code & _FORMAT_ONE:
            code &= 0xBF
        error = known[code]() if code in known else _unusable(problem, rc)
        raise error from None


def _flush(chip: _Chip, handle: Any) -> None:
    with contextlib.suppress(chip.lib.TSS2_Exception):  # the TPM is gone, and an error that says so is on its way
        chip.esys.flush_context(handle)


def _area(lib: Any, public: bytes) -> Any:
    return lib.TPM2B_PUBLIC(publicArea=lib.TPMT_PUBLIC.unmarshal(public)[0])


def _storage_root(chip: _Chip, options: Tpm, salt: bytes | None) -> tuple[Any, bytes]:
    """Make the storage root key; return its handle and its name. Raises TpmOwnerError.

    With a salt srk_password takes part in the derivation: another password, another key. nats-server makes it the key's
    authorization value, which crosses the bus and protects nothing: any password gives the same key. It stays empty here.
    """
    unique = bytes(_UNIQUE)
    if salt is not None:
        try:
            unique = Scrypt(salt=salt, length=_UNIQUE, **_SCRYPT).derive(_bytes(options.srk_password))
        except REFUSED:
            reason = "the OpenSSL of this host refuses scrypt (FIPS), which srk_password needs"
            raise CipherMissingError(reason, hint=f"Leave it out, for a new keys_file. {_OTHERWISE}") from None
    public = _area(chip.lib, _SRK + struct.pack(">H", _UNIQUE) + unique)
    known = dict.fromkeys((_AUTH_FAIL, _BAD_AUTH), lambda: _owned("has a password"))
    known[_HIERARCHY] = lambda: _owned("is turned off")
    with _refusals(chip.lib, known):
        handle, *_ = chip.esys.create_primary(chip.lib.TPM2B_SENSITIVE_CREATE(), public, chip.lib.ESYS_TR.OWNER)
    chip.opened.callback(_flush, chip, handle)
    return handle, bytes(chip.esys.tr_get_name(handle))  # which the library computes from the key


def _session(chip: _Chip, srk: Any, kind: Any) -> Any:
    """Begin a session that is salted with the SRK. It encrypts the first parameter; that of a policy only what comes back."""
    lib = chip.lib
    session = chip.esys.start_auth_session(
        tpm_key=srk,
        bind=lib.ESYS_TR.NONE,
        session_type=kind,
        symmetric=lib.TPMT_SYM_DEF.parse("aes128cfb"),
        auth_hash=lib.TPM2_ALG.SHA256,
    )
    chip.opened.callback(_flush, chip, session)
    attributes = lib.TPMA_SESSION.CONTINUESESSION | lib.TPMA_SESSION.ENCRYPT
    if kind == lib.TPM2_SE.HMAC:
        attributes |= lib.TPMA_SESSION.DECRYPT
    chip.esys.trsess_set_attributes(session, attributes)
    return session


# -- what a key is bound to


def _read_pcrs(chip: _Chip) -> dict[int, bytes]:
    """Return the PCRs that a key can be bound to, SHA-256 bank. Raises TpmMissingError when there is no such bank."""
    _, chosen, digests = chip.esys.pcr_read(f"sha256:{','.join(map(str, _PCRS))}")
    bits = int.from_bytes(bytes(chosen[0].pcrSelect), "little") if len(chosen) else 0
    found = dict(zip((n for n in _PCRS if bits >> n & 1), map(bytes, digests), strict=True))
    if len(found) != len(_PCRS):
        raise TpmMissingError(
            "the TPM keeps no SHA-256 values of its PCRs", hint="tpm2_pcrallocate sha256:all, and reboot."
        )
    return found


def _policy(pcr: int, value: bytes) -> bytes:
    """Return the digest of PolicyPCR for one PCR of the SHA-256 bank, then PolicyAuthValue (Part 3, of the two commands)."""
    selection = struct.pack(">IHB", 1, 0x000B, 3) + (1 << pcr).to_bytes(3, "little")
    digest = hashlib.sha256(
        bytes(32) + struct.pack(">I", _CC_POLICY_PCR) + selection + hashlib.sha256(value).digest()
    ).digest()
    return hashlib.sha256(digest + struct.pack(">I", _CC_POLICY_AUTH_VALUE)).digest()


def _check_policy(policy: bytes, pcrs: Mapping[int, bytes], options: Tpm) -> None:
    """Raise TpmPcrError for a key that would not open anyway, before a password is tried."""
    if policy == _policy(options.pcr, pcrs[options.pcr]):
        return
    for pcr in pcrs:
        if policy == _policy(pcr, pcrs[pcr]):
            raise TpmPcrError(
                f"{options.keys_file}: the key was sealed to PCR {pcr}, not to PCR {options.pcr}",
                hint=f"Set pcr: {pcr} in the configuration.",
            )
    raise _wrong_pcr(options.keys_file, f"PCR {options.pcr} is not what it was, or it was sealed to another one")


def _auth(password: str, longest: int) -> bytes:
    raw = _bytes(password)
    return raw if len(raw) <= longest else hashlib.sha256(raw).digest()


def _bytes(password: str) -> bytes:
    return password.encode("utf-8", "surrogateescape")


# -- what went wrong


def _no_tpm(tcti: str, problem: Exception) -> TpmMissingError:
    """Return the error for a TPM that cannot be opened."""
    reason, hint = f"{problem}", f"Is it running? tpm.tcti in the configuration names it, or {VARIABLE}."
    kind, _, place = tcti.partition(":")
    if kind == "device":
        hint = f"Only one program at a time can use it, unless it is {DEVICE}."
        try:
            os.close(os.open(place or "/dev/tpmrm0", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC))
        except OSError as why:
            reason = str(why.strerror)
            if why.errno in {errno.EACCES, errno.EPERM}:
                hint = "usermod -aG tss USER; in a unit: SupplementaryGroups=tss and DeviceAllow=/dev/tpmrm0 rw"
            elif why.errno in {errno.ENOENT, errno.ENXIO, errno.ENODEV}:
                hint = "Turn on the TPM in the machine's firmware, or give the virtual machine one. tpm.tcti names another."
    return TpmMissingError(f"no TPM at {tcti}: {reason}", hint=hint)


def _unusable(problem: Exception, rc: int) -> TpmMissingError:
    return TpmMissingError(
        f"the TPM does not do what it is asked: {problem} (0x{rc:x})",
        hint=f"tpm2_rc_decode 0x{rc:x} says more. Others may be using the TPM, too: {DEVICE} lets several do so.",
    )


def _owned(why: str) -> TpmOwnerError:
    return TpmOwnerError(
        f"the TPM's owner hierarchy {why}: no storage root key can be made",
        hint="With the owner's password: tpm2_changeauth -c owner -p PASSWORD takes it away; tpm2_hierarchycontrol turns "
        "the hierarchy on.",
    )


def _wrong_parent(path: str, why: str) -> TpmParentError:
    return TpmParentError(
        f"{path}: the key was sealed under another storage root key: {why}",
        hint=f"Check srk_password, and that this is the machine that sealed it. {_OTHERWISE}",
    )


def _wrong_pcr(path: str, why: str) -> TpmPcrError:
    return TpmPcrError(
        f"{path}: the TPM does not give out the key: {why}",
        hint=f"Check pcr, and boot what was booted when the key was sealed. {_OTHERWISE} To seal to the state of now: move "
        f"{shlex.quote(path)} away, and with such a key: encfs-js key add STORE --config FILE --new-tpm",
    )


def _wrong_password(chip: _Chip, path: str) -> TpmPasswordError:
    return TpmPasswordError(
        f"{path}: the TPM refuses the encryption password{_tries(chip)}",
        hint="Check encryption_password; the TPM locks after a few wrong ones.",
    )


def _locked(chip: _Chip, path: str) -> TpmLockedError:
    seconds = _properties(chip).get(int(chip.lib.TPM2_PT.LOCKOUT_INTERVAL))
    wait = f"Wait: every {seconds} seconds one more try is allowed." if seconds else "Wait."
    return TpmLockedError(
        f"{path}: the TPM is in lockout: too many wrong passwords, or losses of power; not even the right one is taken",
        hint=f"{wait} Or tpm2_dictionarylockout --clear-lockout, with --auth if lockout has a password. {_OTHERWISE}",
    )


def _tries(chip: _Chip) -> str:
    """Say how many wrong passwords the TPM will still take, if it tells."""
    found = _properties(chip)
    used, most = (found.get(int(p)) for p in (chip.lib.TPM2_PT.LOCKOUT_COUNTER, chip.lib.TPM2_PT.MAX_AUTH_FAIL))
    if used is None or most is None:
        return ""
    left = max(most - used, 0)
    return f"; tries left before it locks: {left}"


def _properties(chip: _Chip) -> dict[int, int]:
    """Return what the TPM says about its lockout; nothing if it does not."""
    with contextlib.suppress(chip.lib.TSS2_Exception):
        _, answer = chip.esys.get_capability(chip.lib.TPM2_CAP.TPM_PROPERTIES, chip.lib.TPM2_PT.LOCKOUT_COUNTER, 4)
        return {int(item.property): int(item.value) for item in answer.data.tpmProperties}
    return {}
