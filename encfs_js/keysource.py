"""Where the key string comes from: the first source that was given counts, and one that is empty is an error.

nats-server turns its encryption off without a word when its key is set but empty. Here nothing is ever written or
opened with an empty key. Nothing of a key is logged or put into an exception.
"""

from __future__ import annotations

import getpass
import logging
import os
import shlex
import stat
import sys
import warnings
from typing import TYPE_CHECKING, Final

from encfs_js.errors import KeyMissingError

if TYPE_CHECKING:
    from collections.abc import Callable, MutableMapping

log = logging.getLogger(__name__)

VARIABLE: Final = "JS_KEY"
MAX_KEY: Final = 1 << 20  # bytes
SHORT_KEY: Final = 8  # bytes

_EMPTY_HINT = (
    "nats-server silently turns encryption off when its key is set but empty; encfs-js refuses. "
    "Put the key there, or leave this source out."
)
_ENCODING_HINT = "A key is text. For random bytes take their text form, for example: openssl rand -base64 32"


def find_key(
    *,
    key_file: str | None = None,
    credential: str | None = None,
    tpm: Callable[[], bytes] | None = None,
    config_key: str | None = None,
    environ: MutableMapping[str, str] = os.environ,
    prompt: Callable[[], str] | None = None,
) -> bytes:
    """Return the key string's UTF-8 bytes from the first source that was given, in the order of the arguments.

    key_file: a path; the key is the content less one newline at its end. credential: a name in $CREDENTIALS_DIRECTORY
    (systemd), read likewise. tpm: asks the TPM, which keeps what it pleases. config_key: what the configuration file says.
    environ: the variable JS_KEY; it is removed from the mapping in any case, so that no child process gets it
    (/proc/PID/environ keeps what the process was started with). prompt: asks a person, see `terminal`.

    Raises KeyMissingError when there is no source, or the first one is empty, unreadable or not text; and what `tpm` raises.
    """
    variable = environ.pop(VARIABLE, None)
    if key_file is not None:
        return _read(key_file, f"key file {key_file}", private=True)
    if credential is not None:
        return _read(_credential_path(credential, environ), f"credential {credential}", private=False)
    if tpm is not None:
        if kept := tpm():
            return kept
        raise KeyMissingError("the key that the TPM keeps is empty", hint=_EMPTY_HINT)
    if config_key is not None:
        return _encoded(config_key, "the key in the configuration file")
    if variable is not None:
        return _encoded(variable, f"the environment variable {VARIABLE}", sys.getfilesystemencoding())
    if prompt is not None:
        return _encoded(prompt(), "the key that was typed")
    raise KeyMissingError(
        "no key: none was given, and there is no terminal to ask on",
        hint="Give one of: --key-file FILE, --credential NAME, --config FILE with a key or tpm block in it, the "
        f"environment variable {VARIABLE}.",
    )


def terminal(*, confirm: bool = False, what: str = "Key") -> Callable[[], str] | None:
    """Return a prompt for `find_key` that asks for `what` without echo, twice with `confirm`; None without a terminal.

    The prompt raises KeyMissingError when the input ends, the two answers differ or the echo cannot be turned off.
    """
    if sys.stdin is None or not sys.stdin.isatty():
        return None

    def ask() -> str:
        with warnings.catch_warnings():
            # getpass would go on with a visible key and say so in a warning.
            warnings.simplefilter("error", getpass.GetPassWarning)
            try:
                key = getpass.getpass(f"{what}: ")
                same = not confirm or getpass.getpass("The same key again: ") == key
            except EOFError:
                problem = "no key: the input ended"
            except getpass.GetPassWarning:
                problem = "no key: this terminal cannot hide what is typed"
            else:
                if same:
                    return key
                problem = "the two keys are not the same"
        raise KeyMissingError(
            problem, hint="Nothing was written. Repeat the command, or give the key with --key-file FILE."
        )

    return ask


def warn_of_weak(key: bytes) -> None:
    """Warn of a key that a slot is made with, and that is short enough to be guessed in spite of Argon2id."""
    if len(key) < SHORT_KEY:
        log.warning("a key of fewer than %d bytes can be guessed; a good one: openssl rand -base64 32", SHORT_KEY)


def _credential_path(name: str, environ: MutableMapping[str, str]) -> str:
    if "/" in name or name in {"", ".", ".."}:
        raise KeyMissingError(
            f"{name!r} is not the name of a credential",
            hint="--credential takes the NAME of the unit's LoadCredential=NAME:FILE; a path goes with --key-file.",
        )
    directory = environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise KeyMissingError(
            f"credential {name}: $CREDENTIALS_DIRECTORY is not set",
            hint=f"systemd sets it for a unit with LoadCredential={name}:FILE; outside of a unit use --key-file FILE.",
        )
    return os.path.join(directory, name)


def _read(path: str, what: str, *, private: bool) -> bytes:
    """Read a key from a file, a pipe too. `private`: warn when others may read it."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            raw = file.read(MAX_KEY + 1)
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        reason = problem.strerror if isinstance(problem, OSError) else "not a path"
        raise KeyMissingError(
            f"{what}: {reason}", hint="Check the path, and that the user of this command may read the file."
        ) from None
    if len(raw) > MAX_KEY:
        raise KeyMissingError(
            f"{what}: longer than {MAX_KEY} bytes", hint="This looks like another file. A key is one line of text."
        )
    # systemd shows an access list's mask as group permissions, and owns the modes of its credentials anyway.
    if private and stat.S_ISREG(status.st_mode) and status.st_mode & (stat.S_IRGRP | stat.S_IROTH):
        log.warning("%s can be read by other users: chmod 600 %s", what, shlex.quote(path))
    return _checked(raw.removesuffix(b"\n"), what)


def _encoded(text: str, what: str, encoding: str = "utf-8") -> bytes:
    try:
        # Bytes that Python could not decode come back as they were, and `_checked` judges them.
        raw = text.encode(encoding, "surrogateescape")
    except UnicodeEncodeError:
        raw = b"\xff"
    return _checked(raw, what)


def _checked(raw: bytes, what: str) -> bytes:
    """Return `raw` if it is a key: not empty, and UTF-8.

    Raises outside of the handler: the UnicodeDecodeError holds the key, and would stay in sight as the error's context.
    """
    if not raw:
        raise KeyMissingError(f"{what} is empty", hint=_EMPTY_HINT)
    try:
        raw.decode()
    except UnicodeDecodeError:
        pass
    else:
        return raw
    raise KeyMissingError(f"{what} is not UTF-8 text", hint=_ENCODING_HINT)
