"""Everything that a server gives back of its streams, whatever state they are in: each message, or what was said instead."""

from __future__ import annotations

import calendar
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from encfs_js.compare.client import ApiError, Connection
from encfs_js.compare.processes import RunError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PATIENCE: Final = 3.0  # seconds for one answer
_SILENT: Final = 2  # questions without an answer after which a stream is not asked any more
BEHIND: Final = 3  # sequences behind the last that are asked for, too: what was planted may be there
MISSING: Final = "404"
NO_ANSWER: Final = "no answer"

Answer = (
    tuple[bytes, bytes] | str
)  # headers, with subject, sequence and time among them, and payload; or what was said instead


class Reading(NamedTuple):
    """What was answered. messages: by stream and sequence; consumers: acked, delivered, not delivered, by stream and name."""

    messages: dict[str, dict[int, Answer]]
    consumers: dict[tuple[str, str], tuple[int, int, int] | str]


def read(connection: Connection, wanted: Mapping[str, int], check: Callable[[], None]) -> Reading:
    """Ask for every message of streams, up to a sequence (and BEHIND more), and for all consumers there.

    No error of the server ends it: it is among the answers. Raises what `check` raises.
    """
    port = connection.socket.getpeername()[1]
    return Reading(
        {stream: _messages(port, stream, last + BEHIND, check) for stream, last in wanted.items()},
        {found: state for stream in wanted for found, state in _consumers(port, stream, check).items()},
    )


def _messages(port: int, stream: str, last: int, check: Callable[[], None]) -> dict[int, Answer]:
    found: dict[int, Answer] = {}
    connection, silent = _connect(port), 0
    try:
        for sequence in range(1, last + 1):
            check()
            if silent == _SILENT:
                found[sequence] = NO_ANSWER
                continue
            try:
                found[sequence] = _get(connection, stream, sequence)
            except (OSError, RunError):  # a late answer must not be taken for that of the next question
                found[sequence], silent = NO_ANSWER, silent + 1
                connection.close()
                connection = _connect(port)
    finally:
        connection.close()
    return found


def _connect(port: int) -> Connection:
    connection = Connection(port)
    connection.socket.settimeout(PATIENCE)
    return connection


def _get(connection: Connection, stream: str, sequence: int) -> Answer:
    headers, payload = connection.request(f"$JS.API.DIRECT.GET.{stream}", b'{"seq":%d}' % sequence)
    status = headers.partition(b"\r\n")[0].decode(errors="replace").removeprefix("NATS/1.0").strip()
    if b"\r\nNats-Subject: " in headers and not status:
        return headers, payload
    return MISSING if status.startswith("404") else status or "an answer without a subject"


def _consumers(port: int, stream: str, check: Callable[[], None]) -> dict[tuple[str, str], tuple[int, int, int] | str]:
    check()
    connection = _connect(port)
    try:
        names = connection.api(f"CONSUMER.NAMES.{stream}").get("consumers") or []
        return {(stream, name): _state(connection, stream, name) for name in names}
    except ApiError as error:
        return {(stream, "*"): str(error)}
    except (OSError, RunError):
        return {(stream, "*"): NO_ANSWER}
    finally:
        connection.close()


def _state(connection: Connection, stream: str, name: str) -> tuple[int, int, int]:
    said = connection.api(f"CONSUMER.INFO.{stream}.{name}")
    return said["ack_floor"]["stream_seq"], said["delivered"]["stream_seq"], said["num_pending"]


def time_of(answer: Answer) -> int:
    """Return when a message was stored, in ns since 1970. Raises RunError for what is no message."""
    if isinstance(answer, str):
        raise RunError(f"no message: {answer}")
    said = answer[0].partition(b"\r\nNats-Time-Stamp: ")[2].partition(b"\r\n")[0].decode()
    seconds, _, fraction = said.removesuffix("Z").partition(".")
    whole = calendar.timegm(time.strptime(seconds, "%Y-%m-%dT%H:%M:%S"))
    return whole * 1_000_000_000 + int(fraction.ljust(9, "0") or "0")
