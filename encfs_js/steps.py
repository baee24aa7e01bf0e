"""Work on files in steps, so that it can be done in a thread's pauses or at one go, by the same code.

Such work is a generator. It yields None where others may be let in, and a call where the disk has to be waited for: the call
touches nothing but a descriptor, so a thread may make it. What the call raises is raised where it was yielded.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

T = TypeVar("T")
Step = Callable[[], object] | None
Steps = Generator[Step, None, T]


def run(steps: Steps[T], between: Callable[[], object] = lambda: None) -> T:
    """Do all of it now. Returns what the generator returns. between: is called after every step."""
    problem: OSError | None = None
    while True:
        try:
            step = next(steps) if problem is None else steps.throw(problem)
        except StopIteration as end:
            result: T = end.value
            return result
        problem = None
        if step is not None:
            try:
                step()
            except OSError as exc:
                problem = exc
        between()
