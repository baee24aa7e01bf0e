"""What the commands share that need a key, or a new one: the options that name its source, and the way to an open keyring."""

from __future__ import annotations

import functools
import logging
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import click

from encfs_js import config as configuration
from encfs_js import hygiene, keyring, keysource, keystore, recovery
from encfs_js.errors import ConfigError, KeyMissingError
from encfs_js.format import Suite

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., object]")

ORDER = (
    "The key comes from the first of: --key-file, --credential, --tpm, the file of --config (a key, or a tpm block), the "
    "environment variable JS_KEY, a prompt on the terminal. One that is given and empty is an error."
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the key comes from, and the configuration file's other words. tpm: --tpm was given."""

    key_file: str | None
    credential: str | None
    tpm: bool
    config: configuration.Config
    config_file: str | None = None

    def store(self, given: str | None) -> str:
        """Return the store: the argument of the command, else what the configuration says. Raises a usage error."""
        store = given or self.config.jetstream.store_dir
        if store is None:
            raise click.UsageError("Missing argument 'STORE'.", click.get_current_context())
        return store

    def key(self, *, without_tpm: bool = False) -> bytes:
        """Return the key. without_tpm: the configuration's tpm block is for another key. Raises EncfsError."""
        return keysource.find_key(
            key_file=self.key_file,
            credential=self.credential,
            tpm=None if without_tpm or self.config.jetstream.tpm is None else self._unseal,
            config_key=self.config.jetstream.key,
            prompt=keysource.terminal(),
        )

    def first_key(self) -> tuple[str, bytes]:
        """Return the kind of slot and the secret for a new store: a person types the key twice, the TPM makes one."""
        block = self.config.jetstream.tpm is not None
        key = keysource.find_key(
            key_file=self.key_file,
            credential=self.credential,
            tpm=self.made_by_tpm if block else None,
            config_key=self.config.jetstream.key,
            prompt=keysource.terminal(confirm=True),
        )
        if block and self.key_file is None and self.credential is None:
            return "tpm", key
        keysource.warn_of_weak(key)
        return "key", key

    def made_by_tpm(self) -> bytes:
        """Return the secret of the configuration's keys_file, which is made when it does not exist. Raises EncfsError."""
        from encfs_js import tpm  # noqa: PLC0415  most do without

        assert self.config.jetstream.tpm is not None
        return tpm.make(self.config.jetstream.tpm)

    def _unseal(self) -> bytes:
        from encfs_js import tpm  # noqa: PLC0415  most do without

        assert self.config.jetstream.tpm is not None
        return tpm.unseal(self.config.jetstream.tpm)

    def unlock(self, store: str) -> tuple[keyring.Keyring, keyring.Keys]:
        """Open the store's keyring; a warning about it goes to stderr. Raises what keystore.unlock_store does."""
        keystore.load(store)  # nobody should be asked for the key of what is no store
        return unlock(store, self.key())


def unlock(store: str, key: bytes) -> tuple[keyring.Keyring, keyring.Keys]:
    """Open a store's keyring; a warning about it goes to stderr. Raises what keystore.unlock_store does."""
    opened, keys, warning = keystore.unlock_store(store, key)
    if warning:
        print(f"encfs-js: warning: {warning}", file=sys.stderr)
    return opened, keys


def _no_block(option: str) -> ConfigError:
    return ConfigError(
        f"{option}: there is no jetstream.tpm block that says where the key is",
        hint="Name the file that has it: --config FILE. examples/encfs-js.yaml describes the block.",
    )


def key_options(command: F) -> F:
    """Give a command the key options, which it gets as one argument `source`."""

    @functools.wraps(command)
    def wrapped(
        *, key_file: str | None, credential: str | None, tpm: bool, config: str | None, **rest: object
    ) -> object:
        hygiene.no_dumps()  # the environment, too, is only root's to read from here on
        # What the rooms below log (a key file that others can read, say) is for the person at the terminal.
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("encfs-js: warning: %(message)s"))
        logging.getLogger("encfs_js").handlers[:] = [handler]
        loaded = configuration.Config() if config is None else configuration.load(config)
        if tpm and loaded.jetstream.tpm is None:
            raise _no_block("--tpm")
        return command(source=Source(key_file, credential, tpm, loaded, config), **rest)

    wrapped = click.option("--tpm", is_flag=True, help="Have the TPM give the key, as the tpm block of --config says.")(
        wrapped
    )
    for name, metavar, text in (
        ("--config", "FILE", "Take settings and the key from this file (YAML, NATS's own words)."),
        ("--credential", "NAME", "Read the key from this systemd credential ($CREDENTIALS_DIRECTORY/NAME)."),
        ("--key-file", "FILE", "Read the key from this file (one newline at its end does not count)."),
    ):
        wrapped = click.option(name, metavar=metavar, help=text)(wrapped)
    return wrapped  # type: ignore[return-value]


@dataclass(frozen=True, slots=True)
class New:
    """Where the secret of a slot comes from that is made; a person types it when nothing is given."""

    key_file: str | None
    credential: str | None
    tpm: bool
    recovery: bool

    def secret(self, source: Source) -> tuple[str, bytes]:
        """Return the kind of slot and its secret. Raises EncfsError."""
        if self.recovery:
            return "recovery", recovery.encode(os.urandom(recovery.SIZE)).encode()
        if self.tpm:
            return "tpm", source.made_by_tpm()
        prompt = keysource.terminal(confirm=True, what="New key")
        if self.key_file is None and self.credential is None and prompt is None:
            raise KeyMissingError(
                "no new key: none was given, and there is no terminal to ask on",
                hint="Give one of: --new-key-file FILE, --new-credential NAME, --new-tpm, --recovery.",
            )
        directory = os.environ.get("CREDENTIALS_DIRECTORY", "")
        key = keysource.find_key(
            key_file=self.key_file,
            credential=self.credential,
            environ={"CREDENTIALS_DIRECTORY": directory},
            prompt=prompt,
        )
        keysource.warn_of_weak(key)
        return "key", key


def new_options(command: F) -> F:
    """Give a command the options that name a new secret, which it gets as one argument `new`."""

    @functools.wraps(command)
    def wrapped(
        *, new_key_file: str | None, new_credential: str | None, new_tpm: bool, recovery: bool, source: Source, **rest: object
    ) -> object:  # fmt: skip
        if [new_key_file is None, new_credential is None, not new_tpm, not recovery].count(False) > 1:
            raise click.UsageError("Only one of --new-key-file, --new-credential, --new-tpm, --recovery can be given.")
        if new_tpm and source.tpm:
            raise click.UsageError("--tpm and --new-tpm: the tpm block is for one key, the present one or the new one.")
        if new_tpm and source.config.jetstream.tpm is None:
            raise _no_block("--new-tpm")
        new = New(new_key_file, new_credential, new_tpm, recovery)
        return command(source=source, new=new, **rest)

    for name, metavar, text in (
        ("--recovery", None, "Make a recovery code, which is printed once: 160 random bits to keep on paper."),
        ("--new-tpm", None, "Have the TPM keep a new key, as the tpm block of --config says."),
        ("--new-credential", "NAME", "Read the new key from this systemd credential."),
        ("--new-key-file", "FILE", "Read the new key from this file."),
    ):
        wrapped = click.option(name, metavar=metavar, is_flag=metavar is None, help=text)(wrapped)
    return wrapped  # type: ignore[return-value]


class SuiteType(click.ParamType[Suite]):
    """A cipher by one of the names that NATS has for it."""

    name = "cipher"

    def convert(self, value: str | Suite, param: click.Parameter | None, ctx: click.Context | None) -> Suite:
        """Return the suite. Fails as a usage error."""
        if isinstance(value, Suite):
            return value
        try:
            return Suite.from_name(value)
        except ValueError as problem:
            self.fail(f"{problem}; known are chachapoly and aes", param, ctx)
