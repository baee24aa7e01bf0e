"""Just enough of the NATS protocol to load a server from one thread without becoming the limit.

The bytes to publish are made before the clock starts, and a replay is received into one buffer that is checked after
the clock has stopped: within the measured time Python only makes system calls and searches memory.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from encfs_js.compare.processes import RunError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ACKS: Final = b"_INBOX.compare.acks"
REPLAY: Final = b"_INBOX.compare.replay"
_GETS: Final = b"_INBOX.compare.get"
CHUNK: Final = 256  # messages at most; only the last of a chunk asks for an ack
_CHUNK_BYTES: Final = 256 << 10
_TIMEOUT: Final = 60.0  # seconds without a word from the server
_FLOW_CONTROL: Final = b"NATS/1.0 100 FlowControl"


class ApiError(RunError):
    """An error that the JetStream API answered. code: NATS's own (`err_code`), or the status where it gave none."""

    def __init__(self, api: str, error: dict[str, Any]) -> None:
        self.code = int(error.get("err_code") or error.get("code") or 0)
        super().__init__(f"{api}: {error.get('description', 'no answer')} ({self.code})")


class Connection:
    """A socket to a server on 127.0.0.1, after the CONNECT handshake."""

    def __init__(self, port: int, timeout: float | None = None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=timeout or _TIMEOUT)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self._reader = self.socket.makefile("rb")
        self._requests = 0
        self.info = json.loads(self._reader.readline().removeprefix(b"INFO "))
        hello = {"verbose": False, "pedantic": False, "headers": True, "no_responders": True, "protocol": 1}
        self.socket.sendall(b"CONNECT %s\r\nPING\r\n" % json.dumps(hello | {"name": "compare"}).encode())
        self._pong()

    def close(self) -> None:
        """Close it."""
        self._reader.close()
        self.socket.close()

    def subscribe(self, subject: bytes, sid: int) -> None:
        """Subscribe; when this returns, the server knows the subscription."""
        self.socket.sendall(b"SUB %s %d\r\nPING\r\n" % (subject, sid))
        self._pong()

    def flush(self) -> None:
        """Wait until the server has read all that was sent before."""
        self.socket.sendall(b"PING\r\n")
        self._pong()

    def _pong(self) -> None:
        while (line := self._reader.readline()) != b"PONG\r\n":
            if line == b"PING\r\n":
                self.socket.sendall(b"PONG\r\n")
            elif not line.startswith(b"INFO "):  # the server sends its INFO again after CONNECT
                raise RunError(f"the server answered {line!r} to PING")

    def next(self) -> tuple[bytes, bytes]:
        """Return headers and payload of the next message; answer the server's PINGs. Raises RunError, OSError."""
        while True:
            line = self._reader.readline()
            words = line.split()
            if not words:
                raise RunError("the server closed the connection")
            if words[0] in (b"MSG", b"HMSG"):
                body = self._reader.read(int(words[-1]) + 2)[:-2]
                at = int(words[-2]) if words[0] == b"HMSG" else 0
                return body[:at], body[at:]
            if words[0] == b"PING":
                self.socket.sendall(b"PONG\r\n")
            elif words[0] == b"-ERR":
                raise RunError(f"the server says {line!r}")

    def acked(self) -> int:
        """Return the sequence number of the next PUBACK. Raises ApiError when the publish was refused."""
        headers, payload = self.next()
        answer = _answer("publish", headers, payload)
        return int(answer["seq"])

    def request(self, subject: str, body: bytes = b"") -> tuple[bytes, bytes]:
        """Ask, and return headers and payload of the answer."""
        self._requests += 1
        inbox = b"_INBOX.compare.request.%d.%d" % (id(self), self._requests)
        self.subscribe(inbox, 1000 + self._requests)
        self.socket.sendall(b"PUB %s %s %d\r\n%s\r\n" % (subject.encode(), inbox, len(body), body))
        answer = self.next()
        self.socket.sendall(b"UNSUB %d\r\n" % (1000 + self._requests))
        return answer

    def api(self, what: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Ask the JetStream API, `STREAM.INFO.X`, and return the answer. Raises ApiError for an error."""
        headers, payload = self.request(f"$JS.API.{what}", json.dumps(body).encode() if body else b"")
        return _answer(what, headers, payload)


def _answer(what: str, headers: bytes, payload: bytes) -> dict[str, Any]:
    if headers.startswith(b"NATS/1.0 503"):
        raise ApiError(what, {"code": 503, "description": "nobody listens: JetStream is off, or has no such stream"})
    found: dict[str, Any] = json.loads(payload)
    if "error" in found:
        raise ApiError(what, found["error"])
    return found


@contextmanager
def connected(port: int, timeout: float | None = None) -> Iterator[Connection]:
    """Yield a connection and close it. timeout: seconds without a word from the server, after which TimeoutError is raised."""
    connection = Connection(port, timeout)
    try:
        yield connection
    finally:
        connection.close()


def request(port: int, what: str, body: dict[str, Any] | None = None, timeout: float | None = None) -> dict[str, Any]:
    """Ask the JetStream API on a connection of its own. Raises ApiError, and TimeoutError when there is no answer."""
    with connected(port, timeout) as connection:
        return connection.api(what, body)


def create_stream(port: int, name: str, subjects: Sequence[str], timeout: float | None = None, **config: Any) -> None:
    """Create a stream. Raises ApiError, and TimeoutError when there is no answer."""
    body = {"name": name, "subjects": list(subjects), "num_replicas": 1} | config
    request(port, f"STREAM.CREATE.{name}", body, timeout)


def state(port: int, name: str) -> dict[str, Any]:
    """Return what the server says of a stream: `messages`, `bytes`, `first_seq`, `last_seq` ... Raises ApiError."""
    found: dict[str, Any] = request(port, f"STREAM.INFO.{name}")["state"]
    return found


def stored(port: int, name: str) -> int:
    """Return how many messages a stream holds. Raises ApiError."""
    return int(state(port, name)["messages"])


class Message(NamedTuple):
    """One message of a stream, as a direct get returns it."""

    subject: str
    payload: bytes


def get(connection: Connection, stream: str, sequence: int) -> Message | None:
    """Return a message of a stream that allows direct gets; None where the server says that there is none."""
    headers, payload = connection.request(f"$JS.API.DIRECT.GET.{stream}", b'{"seq":%d}' % sequence)
    if headers.startswith(b"NATS/1.0 404"):
        return None
    if headers.startswith(b"NATS/1.0 503") or b"\r\nNats-Subject: " not in headers:
        raise RunError(f"{stream} {sequence}: the server answered {headers[:80]!r}")
    subject = headers.partition(b"\r\nNats-Subject: ")[2].partition(b"\r\n")[0]
    return Message(subject.decode(), payload)


def direct_get(stream: str, sequence: int) -> bytes:
    """Return the protocol bytes that ask for a message of a stream, as `get_each` does."""
    body = b'{"seq":%d}' % sequence
    return b"PUB $JS.API.DIRECT.GET.%s %s %d\r\n%s\r\n" % (stream.encode(), _GETS, len(body), body)


def get_each(connection: Connection, stream: str, sequences: Sequence[int]) -> tuple[list[float], list[bytes]]:
    """Get messages one after the other; return the seconds that each took, and their payloads. Raises RunError for none."""
    connection.subscribe(_GETS, 3)
    latencies, found = [], []
    for sequence in sequences:
        data = direct_get(stream, sequence)
        began = time.perf_counter()
        connection.socket.sendall(data)
        headers, payload = connection.next()
        latencies.append(time.perf_counter() - began)
        if b"\r\nNats-Subject: " not in headers:
            raise RunError(f"{stream} {sequence}: the server answered {headers[:80]!r}")
        found.append(payload)
    return latencies, found


def bodies(size: int) -> list[bytes]:
    """Make the different payloads that every chunk repeats, `size` bytes each: CHUNK of them, or fewer large ones.

    They are hexadecimal digits: random, but never what a search for protocol words finds.
    """
    return [os.urandom(size).hex()[:size].encode() for _ in range(max(4, min(CHUNK, _CHUNK_BYTES // size)))]


def encode(subject: bytes, payload: bytes, reply: bytes = b"") -> bytes:
    """Return the protocol bytes that publish one message."""
    return b"PUB %s %s%d\r\n%s\r\n" % (subject, reply + b" " if reply else b"", len(payload), payload)


def chunks(subjects: Sequence[bytes], messages: int, payloads: Sequence[bytes]) -> list[tuple[bytes, int]]:
    """Return (protocol bytes, number of its last message) for each chunk of as many messages as there are payloads.

    The subjects take turns; there must be as many as divide that number, so that all whole chunks are the same bytes.
    """
    size = len(payloads)
    prepared: dict[int, bytes] = {}
    for count in {min(size, messages), messages % size or size}:
        parts = [
            encode(subjects[i % len(subjects)], payloads[i], ACKS if i == count - 1 else b"") for i in range(count)
        ]
        prepared[count] = b"".join(parts)
    ends = [*range(size, messages, size), messages]
    return [(prepared[end - begin], end) for begin, end in zip([0, *ends], ends, strict=False)]


def publish(
    connection: Connection, prepared: Sequence[tuple[bytes, int]], window: int, *, last: int = 0
) -> list[float]:
    """Publish the chunks with at most `window` of them unacknowledged; return the seconds until each was acknowledged.

    last: the stream's last sequence number before. Without a window the server's intake queue overflows and it drops messages
    that did not ask for an ack. Raises RunError when a message was lost.
    """
    acked = 0
    sent_at: list[float] = []
    latencies: list[float] = []
    for sent, (data, _) in enumerate(prepared, 1):
        sent_at.append(time.perf_counter())
        connection.socket.sendall(data)
        while sent - acked >= window or (sent == len(prepared) and acked < sent):
            sequence, expected = connection.acked(), prepared[acked][1] + last
            latencies.append(time.perf_counter() - sent_at[acked])
            if sequence != expected:
                raise RunError(f"an ack says sequence {sequence} instead of {expected}: messages were lost")
            acked += 1
    return latencies


def publish_each(connection: Connection, messages: Sequence[bytes], window: int = 1) -> list[float]:
    """Publish messages (as `encode` makes them, with ACKS) that each ask for an ack, at most `window` of them unanswered.

    Returns the seconds from each one's sending to its ack. Raises RunError when one was lost.
    """
    latencies: list[float] = []
    sent_at: list[float] = []
    first = None
    for data in messages:
        sent_at.append(time.perf_counter())
        connection.socket.sendall(data)
        while len(sent_at) - len(latencies) >= window or (
            len(sent_at) == len(messages) and len(latencies) < len(sent_at)
        ):
            sequence = connection.acked()
            latencies.append(time.perf_counter() - sent_at[len(latencies)])
            first = sequence if first is None else first
            if sequence != first + len(latencies) - 1:
                raise RunError(f"an ack says sequence {sequence} instead of {first + len(latencies) - 1}")
    return latencies


class Replay:
    """An ordered push consumer (acks none, flow control, heartbeats) that receives a whole stream into one buffer."""

    def __init__(self, connection: Connection, messages: int, size: int) -> None:
        self._connection = connection
        self._messages = messages
        self._buffer = bytearray(messages * (size + 256) + (4 << 20))
        # A first write to every page here, so that page faults do not count as the server's time.
        self._buffer[::4096] = bytes(len(self._buffer[::4096]))
        self._filled = 0
        connection.subscribe(REPLAY, 1)

    def begin(self, port: int, stream: str) -> None:
        """Create the consumer: the server starts to send at once."""
        config = {
            "deliver_subject": REPLAY.decode(),
            "deliver_policy": "all",
            "ack_policy": "none",
            "max_deliver": 1,
            "flow_control": True,
            "idle_heartbeat": 5_000_000_000,
            "mem_storage": True,
            "num_replicas": 1,
        }
        request(port, f"CONSUMER.CREATE.{stream}", {"stream_name": stream, "config": config})

    def receive(self) -> int:
        """Receive until the last message is here, answering flow control; return the number of bytes."""
        mark, view = b" $JS.ACK.", memoryview(self._buffer)
        seen = counted = controlled = 0
        while seen < self._messages or not self._complete():
            count = self._connection.socket.recv_into(view[self._filled :], 1 << 20)
            if not count:
                raise RunError(f"the server closed the connection after {seen} of {self._messages} messages")
            self._filled += count
            # Each search starts so that it meets a word once, even one that came in two parts.
            seen += self._buffer.count(mark, counted, self._filled)
            counted = max(self._filled - len(mark) + 1, 0)
            while (found := self._buffer.find(_FLOW_CONTROL, controlled, self._filled)) >= 0:
                line = self._buffer[self._buffer.rfind(b"HMSG ", 0, found) : found].split()
                self._connection.socket.sendall(b"PUB %s 0\r\n\r\n" % line[3])
                controlled = found + len(_FLOW_CONTROL)
            controlled = max(controlled, self._filled - len(_FLOW_CONTROL) + 1)
        view.release()
        return self._filled

    def _complete(self) -> bool:
        """Whether the last message is here to its last byte."""
        found = self._buffer.rfind(b" $JS.ACK.", 0, self._filled)
        end = self._buffer.find(b"\r\n", found, self._filled)
        return found >= 0 and end >= 0 and end + int(self._buffer[found:end].split()[-1]) + 4 <= self._filled

    def check(self, payloads: Sequence[bytes]) -> None:
        """Compare every message with what was published. Raises RunError."""
        at = sequence = 0
        while sequence < self._messages:
            end = self._buffer.index(b"\r\n", at)
            words = self._buffer[at:end].split()
            if words == [b"PING"]:
                at = end + 2
                continue
            at = end + int(words[-1]) + 4
            if not words[3].startswith(b"$JS.ACK."):  # a heartbeat or flow control
                continue
            begin = end + 2 + (int(words[-2]) if words[0] == b"HMSG" else 0)
            if int(words[3].split(b".")[5]) != sequence + 1:
                raise RunError(f"the replay has message {words[3].decode()} where {sequence + 1} should be")
            if self._buffer[begin : at - 2] != payloads[sequence % len(payloads)]:
                raise RunError(f"message {sequence + 1} is not what was published")
            sequence += 1
