"""The configuration file: YAML with NATS's own words in a `jetstream` block, and our own beside it.

Every name is documented in examples/encfs-js.yaml. Names are case-insensitive, as in a NATS configuration. No error
repeats a value: a key that slipped into the wrong line must not end up in a log.
"""

from __future__ import annotations

import difflib
import grp
import logging
import os
import pwd
import re
import shlex
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import msgspec
import yaml

from encfs_js.errors import ConfigError, KeyMissingError
from encfs_js.format import Suite

if TYPE_CHECKING:
    from collections.abc import Iterable, MutableMapping

log = logging.getLogger(__name__)

MAX_CONFIG: Final = 1 << 20  # bytes
_MAX_NESTING: Final = 1000  # brackets: YAML takes a time that grows with the square of their number

_Path = Annotated[str, msgspec.Meta(pattern=r"\A[^\0]+\Z")]
_VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)\Z")


class Tpm(msgspec.Struct, frozen=True, kw_only=True):
    """NATS's `tpm` block: the key is sealed to the machine's TPM. Variables that the passwords named have been replaced.

    pcr: of those that firmware leaves alone, 17 to 23. nats-server takes 0 for 22; here it is refused.
    tcti: how to reach the TPM, as tpm2-tools write it; not a word of NATS's. None: see tpm.py.
    """

    keys_file: _Path
    encryption_password: str
    srk_password: str = ""
    pcr: Annotated[int, msgspec.Meta(ge=17, le=23)] = 22
    cipher: Suite | None = None
    tcti: _Path | None = None

    def __repr__(self) -> str:
        """Show no password."""
        return f"Tpm(keys_file={self.keys_file!r}, pcr={self.pcr}, cipher={self.cipher!r}, tcti={self.tcti!r})"


class JetStream(msgspec.Struct, frozen=True, kw_only=True):
    """The `jetstream` block. `key` is the key itself, a variable that it named has been replaced; None: not given.

    prev_key: the key before, of a store that nats-server has encrypted itself; likewise. cipher: also what the `tpm` block says.
    """

    store_dir: _Path | None = None
    cipher: Suite | None = None
    key: str | None = None
    prev_key: str | None = None
    tpm: Tpm | None = None

    def __repr__(self) -> str:
        """Show no key."""
        key, prev_key = (None if secret is None else "..." for secret in (self.key, self.prev_key))
        return (
            f"JetStream(store_dir={self.store_dir!r}, cipher={self.cipher!r}, key={key}, prev_key={prev_key}, "
            f"tpm={self.tpm!r})"
        )


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """What the configuration file says. None stands for what it does not say."""

    jetstream: JetStream = JetStream()
    mountpoint: _Path | None = None
    writeback: bool | Literal["auto"] = "auto"
    allow_other: bool | None = None
    owner: Annotated[str, msgspec.Meta(pattern=r"\A[^:\0]+(:[^:\0]+)?\Z")] | None = None
    read_only: bool = False
    log_file: _Path | None = None
    plaintext: Literal["refuse", "read"] | None = None


_TPM_NAMES = {name: name for name in Tpm.__struct_fields__}
_JETSTREAM_NAMES = {name: name for name in JetStream.__struct_fields__} | {
    "store": "store_dir",
    "storedir": "store_dir",
    "ek": "key",
    "encryption_key": "key",
    "prev_ek": "prev_key",
    "prev_encryption_key": "prev_key",
}
_TOP_NAMES = {name: name for name in Config.__struct_fields__}

_CIPHERS = "chacha, chachapoly or aes"
_EXPECTED = {
    "$.jetstream.store_dir": "a path",
    "$.jetstream.key": "text",
    "$.jetstream.prev_key": "text",
    "$.jetstream.tpm.keys_file": "a path",
    "$.jetstream.tpm.encryption_password": "text",
    "$.jetstream.tpm.srk_password": "text",
    "$.jetstream.tpm.pcr": "a number from 17 to 23",
    "$.jetstream.tpm.tcti": "text, such as device:/dev/tpmrm0",
    "$.mountpoint": "a path",
    "$.writeback": "true, false or auto",
    "$.allow_other": "true or false",
    "$.owner": "a user, or user:group",
    "$.read_only": "true or false",
    "$.log_file": "a path",
    "$.plaintext": "refuse or read",
}
_HINT = "examples/encfs-js.yaml describes every name and its values."


def load(path: str, *, environ: MutableMapping[str, str] = os.environ, with_key: bool = True) -> Config:
    """Read and check a configuration file; warn when others can read a key or a password that stands in it.

    environ: where `key: $VAR` looks, and a password. The variable is removed from it, so that no child process gets it.
    with_key: False leaves the key out, unread, and the passwords empty. Raises ConfigError, and KeyMissingError for a key
    that is given and empty.
    """
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read(MAX_CONFIG + 1)
    except (OSError, ValueError) as problem:  # ValueError: a NUL in the path
        reason = problem.strerror if isinstance(problem, OSError) else "not a path"
        raise ConfigError(f"{path}: {reason}", hint="Check the path that --config names.") from None
    try:
        config, secret = _parse(text, environ, with_key=with_key)
    except (ConfigError, KeyMissingError) as problem:
        raise type(problem)(f"{path}: {problem}", hint=problem.hint) from None
    if secret and mode & 0o044:
        log.warning("%s has a secret in it and can be read by other users: chmod 600 %s", path, shlex.quote(path))
    return config


def find_owner(owner: str) -> tuple[int, int]:
    """Return the numbers of `user` (with its own group) or `user:group`, each a name or a number. Raises ConfigError."""
    user, _, group = owner.partition(":")
    try:
        if group:
            uid = int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid
            return uid, int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid
        known = pwd.getpwuid(int(user)) if user.isdecimal() else pwd.getpwnam(user)
    except (KeyError, OverflowError):
        raise ConfigError(
            f"owner {owner}: there is no such user or group", hint="USER or USER:GROUP, each a name or a number."
        ) from None
    return known.pw_uid, known.pw_gid


def _parse(text: bytes, environ: MutableMapping[str, str], *, with_key: bool = True) -> tuple[Config, bool]:
    """Return the configuration, and whether a secret stands in the text itself."""
    raw = _names(_read_yaml(text), "$", _TOP_NAMES)
    secret = False
    if "jetstream" in raw:
        block = raw["jetstream"] = _names(raw["jetstream"], "$.jetstream", _JETSTREAM_NAMES)
        _convert_cipher(block, "$.jetstream")
        if "tpm" in block:
            secret = _convert_tpm(block, environ, with_key=with_key)
        for name in ("key", "prev_key"):
            if not with_key:
                block.pop(name, None)
            elif name in block:
                block[name], literal = _key(block[name], f"$.jetstream.{name}", environ)
                secret = secret or literal
    try:
        return msgspec.convert(raw, Config), secret
    except msgspec.ValidationError as problem:
        message = str(problem)
    # Of msgspec's message only the place is used, because it can repeat the value.
    missing = re.match(r"Object missing required field `(\w+)`", message)
    place = re.search(r" - at `([^`]+)`\Z", message)
    path = place[1] if place else "$"
    if missing:
        raise ConfigError(f"{path}.{missing[1]}: is missing", hint=_HINT)
    raise ConfigError(f"{path}: must be {_EXPECTED[path]}", hint=_HINT)


class _Loader(yaml.SafeLoader):
    """yaml.SafeLoader that takes no name twice: it would keep the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for name, _ in node.value:
            if isinstance(name, yaml.ScalarNode) and name.value in seen:
                raise yaml.constructor.ConstructorError(None, None, "the same name twice in a block", name.start_mark)
            seen.add(name.value if isinstance(name, yaml.ScalarNode) else None)
        return super().construct_mapping(node, deep)


def _read_yaml(text: bytes) -> Any:
    """Read the one YAML document; an empty one is an empty mapping. Raises ConfigError, which quotes no text."""
    if len(text) > MAX_CONFIG:
        raise ConfigError(f"longer than {MAX_CONFIG} bytes", hint="This looks like another file.")
    if text.count(b"[") + text.count(b"{") > _MAX_NESTING:
        raise ConfigError(f"more than {_MAX_NESTING} brackets", hint="This looks like another file.")
    at = ""
    try:
        value = _Loader(text.decode("utf-8-sig")).get_single_data()
    except yaml.MarkedYAMLError as problem:
        mark = problem.problem_mark or problem.context_mark
        at = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        # A message without quotes is a fixed text; the others contain characters of the file.
        fixed = problem.problem and not re.search("['\"]", problem.problem)
        reason = f"not valid YAML: {problem.problem}" if fixed else "not valid YAML"
    except UnicodeDecodeError:
        reason = "not UTF-8 text"
    except (yaml.YAMLError, ValueError, RecursionError, AttributeError, TypeError):
        # A ValueError is a date or a number that YAML knows by its form and that does not exist; the others are bugs of PyYAML's
        # (`!!timestamp x`).
        reason = "not valid YAML"
    else:
        return {} if value is None else value
    raise ConfigError(at + reason, hint="A value with one of # : { } [ ] , & * ! | > ' \" % @ ` in it needs quotes.")


def _names(block: Any, path: str, known: dict[str, str]) -> dict[str, Any]:
    """Return the block under the canonical names. Raises ConfigError for an unknown name or one given twice."""
    if not isinstance(block, dict):
        raise ConfigError(f"{path}: must be a block of `name: value` lines", hint=_HINT)
    given: dict[str, str] = {}
    result: dict[str, Any] = {}
    for name, value in block.items():
        if not isinstance(name, str):
            raise ConfigError(f"{path}: a name that is no text", hint=_HINT)
        canonical = known.get(name.lower())
        if canonical is None:
            raise ConfigError(f"{path}.{name}: unknown", hint=_meant(name.lower(), path, known))
        if canonical in given:
            raise ConfigError(f"{path}.{name}: is given already, as {given[canonical]}", hint="Keep one of the two.")
        if value is None and canonical not in {"key", "prev_key"}:
            raise ConfigError(f"{path}.{name}: has no value", hint=f"Give it one or remove the line. {_HINT}")
        given[canonical] = name
        result[canonical] = value
    return result


def _meant(name: str, path: str, known: Iterable[str]) -> str:
    """Say what an unknown name may have been meant to be."""
    homes = {"$": _TOP_NAMES, "$.jetstream": _JETSTREAM_NAMES, "$.jetstream.tpm": _TPM_NAMES}
    for home, names in homes.items():
        if home != path and name in names:
            return f"This name stands in another block: {home}.{name}. {_HINT}"
    close = difflib.get_close_matches(name, known, 1)
    return f"Did you mean {close[0]}? {_HINT}" if close else f"Known here: {', '.join(sorted(known))}. {_HINT}"


def _convert_cipher(block: dict[str, Any], path: str) -> None:
    if "cipher" in block:
        try:
            block["cipher"] = Suite.from_name(block["cipher"])
        except (ValueError, AttributeError):
            known = False
        else:
            known = True
        if not known:
            raise ConfigError(f"{path}.cipher: must be {_CIPHERS}", hint=_HINT)


def _convert_tpm(block: dict[str, Any], environ: MutableMapping[str, str], *, with_key: bool) -> bool:
    """Convert the `tpm` block in the `jetstream` block; return whether a password stands in the text itself."""
    tpm = block["tpm"] = _names(block["tpm"], "$.jetstream.tpm", _TPM_NAMES)
    if "key" in block:
        raise ConfigError(
            "$.jetstream: key and tpm exclude each other", hint="Keep one of the two, as nats-server demands, too."
        )
    _convert_cipher(tpm, "$.jetstream.tpm")
    if "cipher" in tpm and block.setdefault("cipher", tpm["cipher"]) != tpm["cipher"]:
        raise ConfigError(
            "$.jetstream.cipher and $.jetstream.tpm.cipher are not the same",
            hint="Keep one of the two. nats-server would take either.",
        )
    secret = False
    for name in ("encryption_password", "srk_password"):
        # A password that stands there and is empty is meant so: the TPM then looks at nothing but the PCR.
        if not with_key and name in tpm:
            tpm[name] = ""
        elif tpm.get(name, "") != "":
            tpm[name], literal = _key(tpm[name], f"$.jetstream.tpm.{name}", environ)
            secret = secret or literal
    return secret


def _key(value: Any, path: str, environ: MutableMapping[str, str]) -> tuple[str, bool]:
    """Return a key or password, and whether it stands in the file itself; `$VAR` is taken out of the environment."""
    empty = "nats-server silently turns encryption off when its key is set but empty; encfs-js refuses."
    if value is None or value == "":
        raise KeyMissingError(f"{path}: is empty", hint=f"{empty} Give a key or remove the line.")
    if not isinstance(value, str):
        raise ConfigError(
            f"{path}: YAML reads it as something else than text",
            hint=f'Put it in quotes, even if it is a number, a date, true or no: {path.rpartition(".")[2]}: "..."',
        )
    variable = _VARIABLE.match(value)
    if variable is None:
        return value, True
    found = environ.pop(variable[1], None)
    if found is None:
        raise ConfigError(
            f"{path}: the environment variable {variable[1]} is not set",
            hint="Set and export it. A key that has this form itself goes into a file: --key-file FILE."
            if path in {"$.jetstream.key", "$.jetstream.prev_key"}
            else "Set and export it. A password cannot have this form itself.",
        )
    if not found:
        raise KeyMissingError(f"{path}: the environment variable {variable[1]} is empty", hint=empty)
    return found, False
