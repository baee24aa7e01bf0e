"""What the commands share that read what nats-server has encrypted itself: its key, and the one before."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import click

from encfs_js import keysource

if TYPE_CHECKING:
    from collections.abc import Callable

    from encfs_js.cli_key import Source

F = TypeVar("F", bound="Callable[..., object]")


def prev_key_option(command: F) -> F:
    """Give a command the option --prev-key-file, which it gets as `prev_key_file`."""
    return click.option(
        "--prev-key-file",
        metavar="FILE",
        help="Read the key that nats-server had before (its `prev_key`) from this file; some files may still need it.",
    )(command)


def server_keys(source: Source, prev_key_file: str | None, key: bytes | None = None) -> list[bytes]:
    """Return the keys of a store that nats-server has encrypted: its key, and the previous one if there is one.

    key: None to have it from the source. Raises KeyMissingError.
    """
    keys = [source.key() if key is None else key]
    if prev_key_file is not None or source.config.jetstream.prev_key is not None:
        keys.append(keysource.find_key(key_file=prev_key_file, config_key=source.config.jetstream.prev_key, environ={}))
    return keys
