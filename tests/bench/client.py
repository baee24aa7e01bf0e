"""Just enough of the NATS protocol to load a server from one thread without becoming the bottleneck.

The bytes to publish are made before the clock starts, and a replay is received into one buffer that is checked after
the clock has stopped: within the measured time Python only makes system calls and searches memory.
"""

import json
import os
import socket
import time
from contextlib import contextmanager

from .meter import RunError

SUBJECT = b"bench.load"
STREAM = "BENCH"
ACKS = b"_INBOX.bench.acks"
REPLAY = b"_INBOX.bench.replay"
HEADER = b"NATS/1.0\r\nBench: load\r\n\r\n"
CHUNK = 1024
TIMEOUT = 60.0  # without a word from the server
FLOW_CONTROL = b"NATS/1.0 100 FlowControl"


class Connection:
    """A socket to a server on 127.0.0.1, after the CONNECT handshake."""

    def __init__(self, port):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 << 20)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self.reader = self.socket.makefile("rb")
        self.info = json.loads(self.reader.readline().removeprefix(b"INFO "))
        hello = {"verbose": False, "pedantic": False, "headers": True, "no_responders": True, "protocol": 1}
        self.socket.sendall(b"CONNECT %s\r\nPING\r\n" % json.dumps(hello | {"name": "bench"}).encode())
        self.pong()

    def close(self):
        self.reader.close()
        self.socket.close()

    def subscribe(self, subject, sid):
        """Subscribe; when this returns, the server knows the subscription."""
        self.socket.sendall(b"SUB %s %d\r\nPING\r\n" % (subject, sid))
        self.pong()

    def pong(self):
        """Wait for the answer to our PING: everything sent before it has been understood."""
        while (line := self.reader.readline()) != b"PONG\r\n":
            if line == b"PING\r\n":
                self.socket.sendall(b"PONG\r\n")
            elif not line.startswith(b"INFO "):  # the server sends its INFO again after CONNECT
                raise RunError(f"the server answered {line!r} to PING")

    def next(self):
        """Return the payload of the next message; answer the server's PINGs."""
        while True:
            line = self.reader.readline()
            words = line.split()
            if not words:
                raise RunError("the server closed the connection")
            if words[0] in (b"MSG", b"HMSG"):
                payload = self.reader.read(int(words[-1]) + 2)[:-2]
                return payload[int(words[-2]) :] if words[0] == b"HMSG" else payload
            if words[0] == b"PING":
                self.socket.sendall(b"PONG\r\n")
            elif words[0] == b"-ERR":
                raise RunError(f"the server says {line!r}")

    def acked(self):
        """Return the sequence number of the next PUBACK."""
        answer = json.loads(self.next() or b'{"error": "nobody listens on the subject"}')
        if "error" in answer:
            raise RunError(f"a publish was refused: {answer['error']}")
        return answer["seq"]


@contextmanager
def connected(port):
    """Yield a connection and close it."""
    connection = Connection(port)
    try:
        yield connection
    finally:
        connection.close()


def request(port, api, body):
    """Ask the JetStream API (`STREAM.INFO.X`) on a connection of its own and return the answer."""
    with connected(port) as connection:
        connection.subscribe(b"_INBOX.bench.api", 1)
        payload = json.dumps(body).encode()
        connection.socket.sendall(
            b"PUB $JS.API.%s _INBOX.bench.api %d\r\n%s\r\n" % (api.encode(), len(payload), payload)
        )
        answer = json.loads(connection.next() or b'{"error": "JetStream is not enabled"}')
    if "error" in answer:
        raise RunError(f"{api}: {answer['error']}")
    return answer


def stream(port, verb, **config):
    """Create or update (`verb`) the stream that all loads use."""
    config = {"name": STREAM, "subjects": ["bench.>"], "retention": "limits", "num_replicas": 1} | config
    request(port, f"STREAM.{verb}.{STREAM}", config)


def stored(port):
    """Return how many messages the stream holds."""
    return request(port, f"STREAM.INFO.{STREAM}", {})["state"]["messages"]


def payloads(size):
    """Make the CHUNK different payloads that every chunk repeats.

    They are hexadecimal digits: random, but never what a search for protocol words finds.
    """
    return [os.urandom(size).hex()[:size].encode() for _ in range(CHUNK)]


def encode(payload, *, headers, reply=b""):
    """Return the protocol bytes that publish one message."""
    words = SUBJECT + b" " + reply + b" " if reply else SUBJECT + b" "
    if headers:
        return b"HPUB %s%d %d\r\n%s%s\r\n" % (words, len(HEADER), len(HEADER) + len(payload), HEADER, payload)
    return b"PUB %s%d\r\n%s\r\n" % (words, len(payload), payload)


def chunks(messages, bodies, *, headers):
    """Return (protocol bytes, sequence number of its last message) per chunk; only that message asks for an ack."""
    prepared = {}
    for count in {min(CHUNK, messages), messages % CHUNK or CHUNK}:
        silent = [encode(body, headers=headers) for body in bodies[: count - 1]]
        prepared[count] = b"".join([*silent, encode(bodies[count - 1], headers=headers, reply=ACKS)])
    ends = [*range(CHUNK, messages, CHUNK), messages]
    return [(prepared[end - start], end) for start, end in zip([0, *ends], ends, strict=False)]


def publish(connection, prepared, window):
    """Publish the chunks with at most `window` of them unacknowledged, and check every ack.

    Without a window the server's intake queue overflows and it drops messages that did not ask for an ack.
    """
    acked = 0
    for sent, (data, _) in enumerate(prepared, 1):
        connection.socket.sendall(data)
        while sent - acked >= window or (sent == len(prepared) and acked < sent):
            sequence, expected = connection.acked(), prepared[acked][1]
            if sequence != expected:
                raise RunError(f"an ack says sequence {sequence} instead of {expected}: messages were lost")
            acked += 1


def publish_one_by_one(connection, messages, bodies, *, headers):
    """Publish each message when the one before is acknowledged; return the latencies in seconds."""
    prepared = [encode(body, headers=headers, reply=ACKS) for body in bodies]
    latencies, expected = [], None
    for index in range(messages):
        data = prepared[index % CHUNK]
        began = time.perf_counter()
        connection.socket.sendall(data)
        sequence = connection.acked()
        latencies.append(time.perf_counter() - began)
        if sequence != (expected or sequence):
            raise RunError(f"an ack says sequence {sequence} instead of {expected}")
        expected = sequence + 1
    return latencies


class Replay:
    """An ordered push consumer (acks none, flow control, heartbeats) that receives a whole stream into one buffer."""

    def __init__(self, connection, messages, size):
        self.connection = connection
        self.messages = messages
        self.buffer = bytearray(messages * (size + 256) + (4 << 20))
        # A first write to every page here, so that page faults do not count as the server's time.
        self.buffer[::4096] = bytes(len(self.buffer[::4096]))
        self.filled = 0
        connection.subscribe(REPLAY, 1)

    def start(self, port):
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
        request(port, f"CONSUMER.CREATE.{STREAM}", {"stream_name": STREAM, "config": config})

    def receive(self):
        """Receive until the last message is here, answering flow control; return the number of bytes."""
        mark, view = b" $JS.ACK.", memoryview(self.buffer)
        seen = counted = controlled = 0
        while seen < self.messages or not self.complete():
            count = self.connection.socket.recv_into(view[self.filled :], 1 << 20)
            if not count:
                raise RunError(f"the server closed the connection after {seen} of {self.messages} messages")
            self.filled += count
            # Each search starts so that it meets a word once, even one that came in two parts.
            seen += self.buffer.count(mark, counted, self.filled)
            counted = max(self.filled - len(mark) + 1, 0)
            while (found := self.buffer.find(FLOW_CONTROL, controlled, self.filled)) >= 0:
                line = self.buffer[self.buffer.rfind(b"HMSG ", 0, found) : found].split()
                self.connection.socket.sendall(b"PUB %s 0\r\n\r\n" % line[3])
                controlled = found + len(FLOW_CONTROL)
            controlled = max(controlled, self.filled - len(FLOW_CONTROL) + 1)
        view.release()
        return self.filled

    def complete(self):
        """Whether the last message is here to its last byte."""
        found = self.buffer.rfind(b" $JS.ACK.", 0, self.filled)
        end = self.buffer.find(b"\r\n", found, self.filled)
        return found >= 0 and end >= 0 and end + int(self.buffer[found:end].split()[-1]) + 4 <= self.filled

    def check(self, bodies):
        """Compare every message with what was published."""
        at = sequence = 0
        while sequence < self.messages:
            end = self.buffer.index(b"\r\n", at)
            words = self.buffer[at:end].split()
            if words == [b"PING"]:
                at = end + 2
                continue
            at = end + int(words[-1]) + 4
            if not words[3].startswith(b"$JS.ACK."):  # a heartbeat or flow control
                continue
            start = end + 2 + (int(words[-2]) if words[0] == b"HMSG" else 0)
            if int(words[3].split(b".")[5]) != sequence + 1:
                raise RunError(f"the replay has message {words[3].decode()} where {sequence + 1} should be")
            if self.buffer[start : at - 2] != bodies[sequence % CHUNK]:
                raise RunError(f"message {sequence + 1} is not what was published")
            sequence += 1
