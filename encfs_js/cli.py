"""The command line: what people type, and what they are told when it does not work.

Every command is a function in one of the `cli_` rooms, imported when it is asked for. This room prints errors and turns
them into exit codes; nobody else does.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import TYPE_CHECKING, Final, NoReturn

import click

from encfs_js import __version__, logs
from encfs_js.errors import EncfsError, StoreIoError

if TYPE_CHECKING:
    from collections.abc import Sequence

_BUG: Final = 1
_USAGE: Final = 2
_INTERRUPTED: Final = 130  # as a shell says it: 128 + SIGINT

_ROOMS: Final = {
    "init": "cli_init",
    "mount": "cli_mount",
    "reload": "cli_mount",
    "umount": "cli_status",
    "status": "cli_status",
    "verify": "cli_verify",
    "inspect": "cli_inspect",
    "key": "cli_keys",
    "reencrypt": "cli_reencrypt",
    "encrypt": "cli_encrypt",
    "decrypt": "cli_encrypt",
    "convert": "cli_convert",
    "view": "cli_view",
    "compare": "cli_compare",
    "guard": "cli_guard",
    "systemd": "cli_systemd",
}


class _Commands(click.Group):
    """The commands, in the order in which one meets them."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        return list(_ROOMS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        if cmd_name not in _ROOMS:
            return None
        command: click.Command = getattr(importlib.import_module(f"encfs_js.{_ROOMS[cmd_name]}"), cmd_name)
        return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="encfs-js", message="%(prog)s %(version)s")
def commands() -> None:
    """Keep a NATS JetStream store encrypted at rest under an unmodified nats-server."""


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run one command and end the process with its exit code (errors.py lists them)."""
    _take_standard_descriptors()
    sys.exit(run(arguments))


def _take_standard_descriptors() -> None:
    """Put /dev/null where the caller closed stdin, stdout or stderr.

    A file of the store that got one of their numbers would get what a library prints.
    """
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115  for the life of the process


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command, print what went wrong, and return the exit code."""
    try:
        code = commands.main(arguments, prog_name="encfs-js", standalone_mode=False)
        sys.stdout.flush()
    except EncfsError as problem:
        return _fail(str(problem), problem.hint, problem.exit_code)
    except click.exceptions.NoArgsIsHelpError as problem:
        problem.show()
        return _USAGE
    except click.UsageError as problem:
        path = problem.ctx.command_path if problem.ctx else "encfs-js"
        return _fail(problem.format_message(), f"{path} --help", _USAGE)
    except click.Abort:
        return _INTERRUPTED
    except OSError as problem:
        _trace()
        what = os.fsdecode(problem.filename) if problem.filename is not None else "the operating system"
        return _fail(
            f"{what}: {problem.strerror}",
            "Run the command as the user that owns the store; see whether the disk is full or failing.",
            StoreIoError.exit_code,
        )
    except Exception as problem:  # noqa: BLE001
        # Neither the message nor the traceback: both could hold a key.
        _trace()
        return _fail(
            f"unexpected {type(problem).__name__}{_place(problem)}",
            "This is a bug, please report it. ENCFS_JS_DEBUG=1 in the environment shows the traceback; look it through "
            "for secrets before you pass it on.",
            _BUG,
        )
    return code if isinstance(code, int) else 0


def _place(problem: Exception) -> str:
    at = problem.__traceback__
    while at and at.tb_next:
        at = at.tb_next
    return f" at {os.path.basename(at.tb_frame.f_code.co_filename)}:{at.tb_lineno}" if at else ""


def _trace() -> None:
    if os.environ.get("ENCFS_JS_DEBUG") == "1":
        traceback.print_exc()


def _fail(message: str, hint: str, code: int) -> int:
    logs.print_error(one_line(message), one_line(hint))
    return code


def one_line(text: str) -> str:
    """Return the text with everything escaped that a terminal would not show as one line."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
