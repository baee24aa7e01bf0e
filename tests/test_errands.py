"""What commands ask of the worker that serves: who is told what, whoever ends meanwhile."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest

from encfs_js import wire
from encfs_js.errands import Errands


@pytest.fixture
def pair():
    ours, theirs = wire.pair()
    ours.setblocking(False)
    theirs.setblocking(False)
    yield SimpleNamespace(worker=SimpleNamespace(sock=ours), heard=lambda: heard(theirs))
    ours.close()
    theirs.close()


def heard(sock) -> list[dict]:
    """What a worker was told."""
    found = []
    while True:
        try:
            packet = wire.receive(sock)
        except BlockingIOError:
            return found
        assert packet is not None
        found.append(packet[0])


def errands() -> Errands:
    return Errands(os.memfd_create("keys"))


def test_without_a_worker_nobody_can_take_keys() -> None:
    answers: list[dict] = []
    errands().rekey(answers.append)
    assert answers == [{"ok": False, "how": "no worker serves at this moment"}]


def test_who_waits_is_told_when_the_worker_ends(pair) -> None:
    there, answers = errands(), []
    there.on_serving(pair.worker)
    there.rekey(answers.append)
    assert pair.heard() == [{"do": "rekey"}]
    there.on_end(SimpleNamespace())
    assert answers == [], "another worker's end does not matter"
    there.on_end(pair.worker)
    assert [answer["ok"] for answer in answers] == [False]


def test_new_keys_take_the_place_of_the_old_and_each_who_waits_is_told(pair) -> None:
    there, answers = errands(), []
    old, new = there.keys, os.memfd_create("keys")
    os.write(new, b"new")
    there.on_serving(pair.worker)
    there.rekey(answers.append)
    there.rekey(answers.append)
    there.on_rekeyed({"is": "rekeyed", "ok": True}, [new])
    assert there.keys == new
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(old)
    assert [answer["ok"] for answer in answers] == [True]
    there.on_rekeyed({"is": "rekeyed", "ok": False, "how": "x"}, [])
    assert there.keys == new
    assert [answer["ok"] for answer in answers] == [True, False]
    os.close(new)


def test_a_pass_is_asked_of_every_worker_until_it_is_over(pair) -> None:
    there = errands()
    there.reencrypt(4096.0)
    assert there.progress == {"state": "counting"}
    for _ in range(2):
        there.on_serving(pair.worker)
        assert pair.heard() == [{"do": "reencrypt", "rate": 4096.0}]
        there.on_progress({"is": "progress", "state": "running", "files_done": 3})
        there.on_end(pair.worker)
    there.on_serving(pair.worker)
    pair.heard()
    there.on_progress({"is": "progress", "state": "done", "files_done": 9})
    assert there.progress == {"state": "done", "files_done": 9}
    there.on_serving(pair.worker)
    assert pair.heard() == []


def test_a_pass_that_was_stopped_is_not_begun_again(pair) -> None:
    there = errands()
    there.stop()
    there.on_serving(pair.worker)
    there.reencrypt(None)
    there.stop()
    there.on_serving(pair.worker)
    assert pair.heard() == [{"do": "reencrypt", "rate": None}, {"do": "stop"}]
