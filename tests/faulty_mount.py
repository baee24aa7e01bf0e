"""encfs-js whose workers do what a plan tells them: die, hang or fail at a certain call, and nowhere else.

The plan is the file that FAULT_PLAN names, a JSON list of steps. A worker that comes to where the first step is due takes it
out of the plan, so that the next worker goes on with the next step; tests write and read the plan while the mount stands.
A step:

    call   a method of Backing; "change", any of them that a request asks for and that changes something; "strike", where the
           journal's record is about to be struck out because its request was answered; "load", before a worker has said
           that it is loaded; "save", where the state of the store is about to be written
    name   what the last part of the path has to be, as far as it matters
    skip   how many such calls pass before
    bytes  so many bytes of a write are made first, then what the step says
    after  whether the call is made first
    do     "kill", "abort", "exit" or "stop" this process; "fail" with `errno`; "wait" while PLAN.gate exists, having made
           PLAN.here; "doze" for a moment, as a slow disk does; "pass"
    stay   whether the step stays in the plan

FAULT_NO_RESEND=1 hides from the supervisor that the kernel can send requests again.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from encfs_js import journal, resend, state, worker
from encfs_js.backing import Backing

if TYPE_CHECKING:
    from collections.abc import Callable

PLAN = os.environ.get("FAULT_PLAN", "")
CHANGES = {"unlink", "rmdir", "rename", "renameat2", "link", "symlink", "mkdir", "mknod", "chown", "chmod", "ftruncate",
           "pwrite"}  # fmt: skip
CALLS = [name for name in vars(Backing) if not name.startswith("_")]


def write_plan(path: str, steps: list[dict[str, Any]]) -> None:
    """Replace a plan, at once and whole; no steps: no plan."""
    if not steps:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        return
    with open(path + ".tmp", "w", encoding="utf-8") as file:
        json.dump(steps, file)
    os.rename(path + ".tmp", path)


def read_plan(path: str) -> list[dict[str, Any]]:
    """The steps that are still to come."""
    try:
        with open(path, encoding="utf-8") as file:
            steps: list[dict[str, Any]] = json.load(file)
    except FileNotFoundError:
        return []
    return steps


def due(call: str, name: str, *, changes: bool = False) -> dict[str, Any] | None:
    """The step that is due at this call, taken out of the plan; None when there is none."""
    steps = read_plan(PLAN)
    if not steps or steps[0]["call"] not in ({call, "change"} if changes else {call}):
        return None
    if steps[0].get("name") not in {None, name}:
        return None
    step = steps[0]
    if step.get("skip"):
        step["skip"] -= 1
        write_plan(PLAN, steps)
        return None
    if not step.get("stay"):
        write_plan(PLAN, steps[1:])
    return step


def carry_out(step: dict[str, Any]) -> None:
    what = step["do"]
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif what == "abort":
        os.abort()
    elif what == "exit":
        os._exit(1)
    elif what == "fail":
        raise OSError(step["errno"], os.strerror(step["errno"]))
    elif what == "wait":
        with open(PLAN + ".here", "w", encoding="utf-8"):
            pass
        while os.path.exists(PLAN + ".gate"):
            time.sleep(0.005)
    elif what == "doze":
        time.sleep(0.1)
    else:
        assert what == "pass", step


def name_of(subject: object) -> str:
    """The last part of the path that a call is about, given as a path or as an open descriptor."""
    if isinstance(subject, int):
        try:
            subject = os.readlink(f"/proc/self/fd/{subject}")
        except OSError:
            return ""
    return os.path.basename(os.fsdecode(subject)).removesuffix(" (deleted)")


def faulty(call: str, real: Callable[..., Any]) -> Callable[..., Any]:
    def do(*args: Any, **kwargs: Any) -> Any:
        subject = args[1] if call in {"symlink", "renameat2"} else args[0]
        changes = call in CHANGES or (call == "open" and args[1] & os.O_CREAT)
        step = due(call, name_of(subject), changes=changes) if os.path.exists(PLAN) else None
        if step is None:
            return real(*args, **kwargs)
        if size := step.get("bytes"):
            fd, data, offset = args
            assert size < len(data)
            real(fd, data[:size], offset)
        elif step.get("after"):
            try:
                return real(*args, **kwargs)
            finally:
                carry_out(step)
        carry_out(step)
        return real(*args, **kwargs)

    return do


class Faulty(Backing):
    """The system calls, each of which looks at the plan first."""


for method in CALLS:
    setattr(Faulty, method, staticmethod(faulty(method, getattr(Backing, method))))


def serve() -> None:
    if step := due("load", ""):
        carry_out(step)
    journal.Journal.strike = meeting("strike", journal.Journal.strike)  # type: ignore[method-assign]
    state.save = meeting("save", state.save)
    worker.main(Faulty())


def meeting(call: str, real: Callable[..., Any]) -> Callable[..., Any]:
    """A function of the package that looks at the plan first."""

    def do(*args: Any) -> Any:
        if os.path.exists(PLAN) and (step := due(call, "")):
            carry_out(step)
        return real(*args)

    return do


def main() -> None:
    me = os.path.abspath(__file__)
    if sys.argv[1] == "--worker":
        serve()
        return
    from encfs_js import cli, mount, supervisor  # noqa: PLC0415  a worker has no use for them, and starts sooner

    if sys.argv[1] == "--supervisor":
        resend.HAS_RESEND = 0  # type: ignore[misc]
        supervisor.main()
        return
    mount.mount.__kwdefaults__["worker"] = (sys.executable, me, "--worker")
    if os.environ.get("FAULT_NO_RESEND"):
        become = os.execve

        def execve(path: str, command: list[str], environ: dict[str, str]) -> None:
            assert command[:3] == [sys.executable, "-m", "encfs_js.supervisor"]
            become(path, [sys.executable, me, "--supervisor", *command[3:]], environ)

        os.execve = execve  # type: ignore[assignment]
    cli.main()


if __name__ == "__main__":
    main()
