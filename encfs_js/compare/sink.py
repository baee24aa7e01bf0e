"""A process that a load generator takes for a nats-server, and that does next to nothing: `python -m encfs_js.compare.sink`.

It is told what is going to come (`Job`, as JSON on stdin), prints its port, and serves one connection to its end. What it
receives it counts and throws away; it looks at bytes only for the handshake and for API requests. So what a load comes to here is
what the load generator and the loopback can do at most.

What it costs itself: a recv of up to 1 MiB and a comparison for each answer. Beside a load generator that has several messages in
flight it has a core of its own where there are two, as a server would; on one core the ceiling that it shows is too low by what
it takes. To one that waits for each answer it is on the same core (see `ceiling`). A replay it sends from ready-made bytes.
"""

from __future__ import annotations

import os
import socket
import sys
from itertools import accumulate
from typing import Final

import msgspec

_BUFFER: Final = 1 << 20  # bytes
_SPINS: Final = 2000 if len(os.sched_getaffinity(0)) > 1 else 1  # about 1 ms
_AT_ONCE: Final = 256  # messages that a replay sends with one call
_INFO: Final = b'INFO {"server_name":"sink","version":"0.0.0","proto":1,"headers":true,"max_payload":8388608}\r\n'


class Job(msgspec.Struct, frozen=True):
    """What will come. lengths: after so many more bytes each an answer is due, an ack of `sequences`, or else a message.

    together: so many answers are sent at once, as a busy server does, and it spares the load generator calls;
    replay: so many messages are sent when a consumer is created; size: bytes of a message's payload.
    """

    stream: str
    lengths: list[int] = []
    sequences: list[int] = []
    together: int = 1
    replay: int = 0
    size: int = 0


def ack(stream: str, sequence: int) -> bytes:
    """Return the protocol bytes of a PUBACK."""
    body = b'{"stream":"%s","seq":%d}' % (stream.encode(), sequence)
    return b"MSG _INBOX.compare.acks 1 %d\r\n%s\r\n" % (len(body), body)


def _got(stream: str, size: int) -> bytes:
    """Return the protocol bytes of the answer to a direct get."""
    headers = (
        b"NATS/1.0\r\nNats-Stream: %s\r\nNats-Subject: bench.load\r\nNats-Sequence: 123456\r\n"
        b"Nats-Time-Stamp: 2026-01-01T00:00:00.123456789Z\r\n\r\n" % stream.encode()
    )
    return b"HMSG _INBOX.compare.get 3 %d %d\r\n%s%s\r\n" % (len(headers), len(headers) + size, headers, b"x" * size)


def _delivered(stream: str, sequence: int, size: int) -> bytes:
    """Return the protocol bytes of a message that a push consumer sends."""
    reply = b"$JS.ACK.%s.consumer.1.%d.%d.1767225600123456789.0" % (stream.encode(), sequence, sequence)
    return b"MSG bench.load 1 %s %d\r\n%s\r\n" % (reply, size, b"x" * size)


def _greet(listener: socket.socket) -> socket.socket:
    """Take a connection through its handshake and its first subscription."""
    connection = listener.accept()[0]
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.sendall(_INFO)
    for _ in ("CONNECT", "SUB"):
        _until(connection, b"PING\r\n")
        connection.sendall(b"PONG\r\n")
    return connection


def _until(connection: socket.socket, end: bytes) -> bytes:
    """Receive until what came ends so."""
    said = b""
    while not said.endswith(end):
        part = connection.recv(_BUFFER)
        if not part:
            raise ConnectionError("the load generator went away")
        said += part
    return said


def _answer_all(connection: socket.socket, job: Job) -> None:
    """Count what comes, and answer whenever a length is complete."""
    ends = list(accumulate(job.lengths))
    answers = [ack(job.stream, sequence) for sequence in job.sequences] or [_got(job.stream, job.size)] * len(ends)
    buffer = bytearray(_BUFFER)
    received = due = answered = 0
    while answered < len(ends):
        received += _receive(connection, buffer)
        while due < len(ends) and ends[due] <= received:
            due += 1
        if due - answered >= job.together or due == len(ends):
            connection.sendall(b"".join(answers[answered:due]))
            answered = due


def _receive(connection: socket.socket, buffer: bytearray) -> int:
    """Receive something and return how many bytes it was.

    It asks again and again for a while before it sleeps, as a server of Go's does: a core that went idle takes longer to wake
    up than all of the rest takes, and a sink that sleeps between two messages is slower than a server that stores them.
    """
    for _ in range(_SPINS):
        try:
            count = connection.recv_into(buffer, 0, socket.MSG_DONTWAIT)
        except BlockingIOError:
            continue
        break
    else:
        count = connection.recv_into(buffer)
    if not count:
        raise ConnectionError("the load generator went away")
    return count


def _replay(connection: socket.socket, listener: socket.socket, job: Job) -> None:
    """Wait for the request that creates the consumer, answer it, and send all messages."""
    # The numbers of the messages repeat: who only looks for the end does not notice, and to make millions would take memory.
    part = [_delivered(job.stream, sequence, job.size) for sequence in range(1, _AT_ONCE + 1)]
    data, last = b"".join(part), b"".join(part[: job.replay % _AT_ONCE])
    with _greet(listener) as asked:
        inbox = _until(asked, b"}\r\n").partition(b"PUB ")[2].split()[1]
        asked.sendall(b"MSG %s 1001 2\r\n{}\r\n" % inbox)
        for _ in range(job.replay // _AT_ONCE):
            connection.sendall(data)
        connection.sendall(last)


def main() -> None:
    """Read the job from stdin, print the port, serve."""
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(listener.getsockname()[1], flush=True)
        with _greet(listener) as connection:
            if job.replay:
                _replay(connection, listener, job)
            else:
                _answer_all(connection, job)
            while connection.recv(_BUFFER):  # until it is closed: an early end would reset what is still on its way
                pass


if __name__ == "__main__":
    main()
