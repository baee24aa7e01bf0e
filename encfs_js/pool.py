"""Work spread over forked processes: what they need, keys too, they have from the fork, and none of it is sent.

Tasks and results are pickled and go through a socket pair for each process. Nothing outlives the `with` block.
"""

from __future__ import annotations

import contextlib
import os
import signal
import traceback
from collections import deque
from functools import partial
from multiprocessing.connection import Connection, Pipe, wait
from typing import TYPE_CHECKING, Any, Final, TypeVar

from encfs_js.errors import EncfsError, StoreIoError
from encfs_js.hygiene import die_with_parent

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

T = TypeVar("T")
R = TypeVar("R")

# What a process has besides the task that it is at. A socket must hold so many tasks, or both ends could wait to send.
_AHEAD: Final = 1
MAX_TASK: Final = 32 << 10  # bytes


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


@contextlib.contextmanager
def pool(
    work: Callable[[T], R], jobs: int, begin: Callable[[int], None] | None = None
) -> Iterator[Callable[[Iterable[T]], Iterator[R]]]:
    """Fork `jobs` processes; yield a function that has them work on tasks of at most MAX_TASK bytes, and gives the results.

    The results are in no order. begin: called in each process with its number from 0. With one job nothing is forked.
    What `work` raises is raised again here; a process that dies raises StoreIoError. What this process changes after the
    fork, the others do not see.
    """
    if jobs == 1:
        yield lambda tasks: map(work, tasks)
        return
    workers: dict[Connection, int] = {}
    try:
        for number in range(jobs):
            here, there = Pipe()
            with _without_interruption():
                parent, pid = os.getpid(), os.fork()
                if not pid:
                    _child(here, there, workers, parent, work, partial(begin, number) if begin else None)
                workers[here] = pid
            there.close()
        yield lambda tasks: _spread(workers, tasks)
    finally:
        for connection, pid in workers.items():
            connection.close()
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # it only reads, and who leaves early does not want to wait for it
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


@contextlib.contextmanager
def _without_interruption() -> Iterator[None]:
    """Have a Ctrl-C wait: in a fork it is lost in what Python calls after one, or leaves a process that nobody knows of.

    Blocking the signal would not do: where there is another thread, that one takes it.
    """
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came and callable(before):
        before(signal.SIGINT, None)


def _child(
    above: Connection,
    own: Connection,
    others: Iterable[Connection],
    parent: int,
    work: Callable[[T], R],
    begin: Callable[[], object] | None,
) -> None:
    """Work until nobody has a task any more. Never returns: nothing of the process that was copied must run in here."""
    code = 1
    try:
        die_with_parent(parent, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to all; who started this one ends it
        for connection in (above, *others):
            connection.close()  # or the end of a connection would not be noticed while this process lives
        if begin is not None:
            begin()
        while True:
            try:
                task = own.recv()
            except EOFError:
                break
            try:
                answer: tuple[bool, Any] = True, work(task)
            except Exception as problem:  # noqa: BLE001  it is raised again where somebody can be told
                if not isinstance(problem, EncfsError):
                    problem.add_note(traceback.format_exc())
                answer = False, problem
            own.send(answer)
        code = 0
    except BaseException:  # noqa: BLE001  see above
        traceback.print_exc()
    finally:
        os._exit(code)


def _spread(workers: dict[Connection, int], tasks: Iterable[Any]) -> Iterator[Any]:
    """Hand out tasks as the processes come to an end with theirs, and return what they found."""
    left = iter(tasks)
    busy = dict.fromkeys(workers, 0)
    idle = deque(connection for _ in range(1 + _AHEAD) for connection in workers)
    while True:
        while idle:
            connection = idle.popleft()
            try:
                task = next(left)
            except StopIteration:
                idle.clear()
                break
            try:
                connection.send(task)
            except (BrokenPipeError, ConnectionResetError):
                raise _died(workers, connection) from None
            busy[connection] += 1
        waiting = [connection for connection, count in busy.items() if count]
        if not waiting:
            return
        for ready in wait(waiting):
            assert isinstance(ready, Connection)
            try:
                fine, answer = ready.recv()
            except (EOFError, ConnectionResetError):
                raise _died(workers, ready) from None
            busy[ready] -= 1
            if not fine:
                raise answer
            idle.append(ready)
            yield answer


def _died(workers: dict[Connection, int], connection: Connection) -> StoreIoError:
    """Make the error for a process that is gone, having looked at how it went."""
    pid = workers.pop(connection)
    connection.close()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return StoreIoError(
        f"a worker process {how}: not everything was looked at",
        hint="Look for the reason in the system's log (out of memory?). With --jobs 1 there are no worker processes.",
    )
