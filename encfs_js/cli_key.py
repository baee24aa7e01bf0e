"""What the commands share that need a key: the options that name its source, and the way to an open keyring."""

from __future__ import annotations

import functools
import logging
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import click

from encfs_js import config as configuration
from encfs_js import keyring, keysource
from encfs_js.format import Suite

if TYPE_CHECKING:
    from collections.abc import Callable

F = TypeVar("F", bound="Callable[..., object]")

ORDER = (
    "The key comes from the first of: --key-file, --credential, the key in the file of --config, the environment "
    "variable JS_KEY, a prompt on the terminal. One that is given and empty is an error."
)


@dataclass(frozen=True, slots=True)
class Source:
    """Where the key comes from, and the configuration file's other words."""

    key_file: str | None
    credential: str | None
    config: configuration.Config
    config_file: str | None = None

    def store(self, given: str | None) -> str:
        """Return the store: the argument of the command, else what the configuration says. Raises a usage error."""
        store = given or self.config.jetstream.store_dir
        if store is None:
            raise click.UsageError("Missing argument 'STORE'.", click.get_current_context())
        return store

    def key(self, *, confirm: bool = False) -> bytes:
        """Return the key string; `confirm`: a person has to type it twice. Raises KeyMissingError."""
        return keysource.find_key(
            key_file=self.key_file,
            credential=self.credential,
            config_key=self.config.jetstream.key,
            prompt=keysource.terminal(confirm=confirm),
        )

    def unlock(self, store: str) -> tuple[keyring.Keyring, keyring.Keys]:
        """Open the store's keyring; a warning about it goes to stderr. Raises what keyring.unlock_store does."""
        keyring.load(store)  # nobody should be asked for the key of what is no store
        opened, keys, warning = keyring.unlock_store(store, self.key())
        if warning:
            print(f"encfs-js: warning: {warning}", file=sys.stderr)
        return opened, keys


def key_options(command: F) -> F:
    """Give a command the key options, which it gets as one argument `source`."""

    @functools.wraps(command)
    def wrapped(*, key_file: str | None, credential: str | None, config: str | None, **rest: object) -> object:
        # What the rooms below log (a key file that others can read, say) is for the person at the terminal.
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("encfs-js: warning: %(message)s"))
        logging.getLogger("encfs_js").handlers[:] = [handler]
        loaded = configuration.Config() if config is None else configuration.load(config)
        return command(source=Source(key_file, credential, loaded, config), **rest)

    for name, metavar, text in (
        ("--config", "FILE", "Take settings and the key from this file (YAML, NATS's own words)."),
        ("--credential", "NAME", "Read the key from this systemd credential ($CREDENTIALS_DIRECTORY/NAME)."),
        ("--key-file", "FILE", "Read the key from this file (one newline at its end does not count)."),
    ):
        wrapped = click.option(name, metavar=metavar, help=text)(wrapped)
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
