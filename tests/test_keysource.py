"""Where the key comes from: the order, what is refused, and that nothing of a key is shown or passed on."""

from __future__ import annotations

import logging
import os
import pty
import select
import subprocess
import sys
import traceback
from typing import TYPE_CHECKING

import pytest

from encfs_js import keysource
from encfs_js.errors import KeyMissingError

if TYPE_CHECKING:
    from pathlib import Path

NOBODY = 65534
SECRET = "s3cret-4711"


def key_file(directory: Path, content: bytes, mode: int = 0o600) -> str:
    path = directory / "key"
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


def everything_about(error: BaseException) -> str:
    """All that an error handler, a log or a debugger without frames could show of an error."""
    found, here = "", [error]
    while here:
        e = here.pop()
        found += "".join(traceback.format_exception(e)) + repr(e) + repr(e.args) + repr(vars(e))
        here += [c for c in (e.__context__, e.__cause__) if c is not None]
    return found


def test_the_first_source_counts(tmp_path):
    (tmp_path / "mine").write_bytes(b"from the credential\n")
    path = key_file(tmp_path, b"from the file\n")
    sources = {
        "key_file": (path, b"from the file"),
        "credential": ("mine", b"from the credential"),
        "tpm": (lambda: b"from the TPM", b"from the TPM"),
        "config_key": ("from the config", b"from the config"),
        "environ": ("from the environment", b"from the environment"),
        "prompt": (lambda: "from a person", b"from a person"),
    }
    while sources:
        given = {name: value for name, (value, _) in sources.items()}
        environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
        if "environ" in given:
            environ["JS_KEY"] = given.pop("environ")
        wanted = next(iter(sources.values()))[1]
        assert keysource.find_key(**given, environ=environ) == wanted
        assert environ == {"CREDENTIALS_DIRECTORY": str(tmp_path)}
        del sources[next(iter(sources))]
    with pytest.raises(KeyMissingError) as caught:
        keysource.find_key(environ={})
    for word in ("--key-file", "--credential", "--config", "JS_KEY"):
        assert word in caught.value.hint


def never() -> str:
    raise AssertionError("asked although a source was given")


@pytest.mark.parametrize(
    "source", ["key_file", "key_file_newline", "credential", "tpm", "config_key", "environ", "prompt"]
)
def test_set_but_empty_is_an_error_and_no_later_source_is_tried(tmp_path, source):
    (tmp_path / "empty").write_bytes(b"")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path), "JS_KEY": SECRET}
    given: dict = {"prompt": never}
    match source:
        case "key_file":
            given["key_file"] = key_file(tmp_path, b"")
        case "key_file_newline":
            given["key_file"] = key_file(tmp_path, b"\n")
        case "credential":
            given["credential"] = "empty"
        case "tpm":
            given["tpm"] = bytes
        case "config_key":
            given["config_key"] = ""
        case "environ":
            environ["JS_KEY"] = ""
        case "prompt":
            del environ["JS_KEY"]
            given["prompt"] = str
    with pytest.raises(KeyMissingError, match="empty") as caught:
        keysource.find_key(**given, environ=environ)
    assert "nats-server silently turns encryption off" in caught.value.hint
    assert "JS_KEY" not in environ


@pytest.mark.parametrize(
    ("content", "key"),
    [
        (b"key", b"key"),
        (b"key\n", b"key"),
        (b"key\n\n", b"key\n"),
        (b"two\nlines\n", b"two\nlines"),
        (b"key\r\n", b"key\r"),
        (b" key ", b" key "),
        ("schlüssel\n".encode(), "schlüssel".encode()),
        (b"x" * keysource.MAX_KEY, b"x" * keysource.MAX_KEY),
    ],
    ids=lambda value: repr(value[:12]),
)
def test_one_newline_at_the_end_of_a_key_file_is_no_part_of_the_key(tmp_path, content, key):
    assert keysource.find_key(key_file=key_file(tmp_path, content), environ={}) == key


def test_a_key_file_may_be_a_pipe():
    read, write = os.pipe()
    try:
        os.write(write, b"through a pipe\n")
        os.close(write)
        assert keysource.find_key(key_file=f"/dev/fd/{read}", environ={}) == b"through a pipe"
    finally:
        os.close(read)


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("missing", "No such file"),
        (".", "directory"),
        ("a\0b", "not a path"),
        ("/dev/zero", "longer than 1048576 bytes"),
        ("/dev/null", "empty"),
        ("text/below", "Not a directory"),
    ],
)
def test_a_key_file_that_cannot_be_read_is_named(tmp_path, path, says):
    (tmp_path / "text").write_bytes(b"x")
    with pytest.raises(KeyMissingError, match=says) as caught:
        keysource.find_key(key_file=os.path.join(tmp_path, path), environ={"JS_KEY": SECRET})
    assert path in str(caught.value)
    assert caught.value.hint


def test_a_key_file_of_somebody_else_is_named(tmp_path):
    path = key_file(tmp_path, b"key", 0)
    before = os.geteuid()
    if before == 0:  # root may read everything
        os.seteuid(NOBODY)
    try:
        with pytest.raises(KeyMissingError, match="Permission denied"):
            keysource.find_key(key_file=path, environ={})
    finally:
        os.seteuid(before)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700, 0o640, 0o604, 0o444, 0o620])
def test_a_key_file_that_others_can_read_is_warned_of(tmp_path, caplog, mode):
    path = key_file(tmp_path, SECRET.encode(), mode)
    assert keysource.find_key(key_file=path, environ={}) == SECRET.encode()
    if mode & 0o044:
        [record] = caplog.records
        assert record.levelno == logging.WARNING
        assert f"chmod 600 {path}" in record.getMessage()
    else:
        assert not caplog.records
    assert SECRET not in caplog.text


def test_the_mode_of_a_credential_is_the_business_of_systemd(tmp_path, caplog):
    (tmp_path / "js").write_bytes(b"key")
    (tmp_path / "js").chmod(0o440)
    assert keysource.find_key(credential="js", environ={"CREDENTIALS_DIRECTORY": str(tmp_path)}) == b"key"
    assert not caplog.records


@pytest.mark.parametrize("name", ["", ".", "..", "/etc/passwd", "a/b", "../key"])
def test_a_credential_is_a_name_and_no_path(tmp_path, name):
    key_file(tmp_path, b"key")
    with pytest.raises(KeyMissingError, match="not the name of a credential") as caught:
        keysource.find_key(credential=name, environ={"CREDENTIALS_DIRECTORY": str(tmp_path / "sub")})
    assert "LoadCredential" in caught.value.hint


@pytest.mark.parametrize("environ", [{}, {"CREDENTIALS_DIRECTORY": ""}])
def test_a_credential_outside_of_a_unit(environ):
    with pytest.raises(KeyMissingError, match="CREDENTIALS_DIRECTORY is not set") as caught:
        keysource.find_key(credential="js", environ=environ)
    assert "LoadCredential=js:FILE" in caught.value.hint


def test_a_credential_that_is_not_there(tmp_path):
    with pytest.raises(KeyMissingError, match="credential js: No such file"):
        keysource.find_key(credential="js", environ={"CREDENTIALS_DIRECTORY": str(tmp_path)})


def test_what_is_no_text_is_refused_without_showing_it(tmp_path):
    raw = SECRET.encode() + b"\xff"
    broken = raw.decode("utf-8", "surrogateescape")
    lone = SECRET + "\ud800"
    (tmp_path / "js").write_bytes(raw)
    for given, variable in [
        ({"key_file": key_file(tmp_path, raw)}, None),
        ({"credential": "js"}, None),
        ({"config_key": lone}, None),
        ({"prompt": lambda: broken}, None),
        ({"prompt": lambda: lone}, None),
        ({}, broken),
        ({}, lone),
    ]:
        environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)} | ({} if variable is None else {"JS_KEY": variable})
        with pytest.raises(KeyMissingError, match="not UTF-8") as caught:
            keysource.find_key(**given, environ=environ)
        assert SECRET not in everything_about(caught.value)
        assert "JS_KEY" not in environ


def test_what_a_tpm_keeps_need_not_be_text():
    assert keysource.find_key(tpm=lambda: b"\xff\n", environ={}) == b"\xff\n"


@pytest.mark.parametrize("key", [b"1234567", b"12345678", "ключ".encode()])
def test_a_key_that_can_be_guessed_is_warned_of(caplog, key):
    keysource.warn_of_weak(key)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * (len(key) < 8)
    assert key.decode() not in caplog.text


def test_no_child_process_gets_the_key(tmp_path):
    script = f"""
import subprocess, sys
from encfs_js import keysource
before = subprocess.run(["env"], capture_output=True, text=True).stdout
key = keysource.find_key(key_file=sys.argv[1] if len(sys.argv) > 1 else None)
after = subprocess.run(["env"], capture_output=True, text=True).stdout
print(key == b"{SECRET}", "JS_KEY={SECRET}" in before, "{SECRET}" in after)
"""
    path = key_file(tmp_path, SECRET.encode())
    for arguments in ([], [path]):
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(
            command, env=os.environ | {"JS_KEY": SECRET}, capture_output=True, text=True, cwd=tmp_path
        )
        assert (done.stdout, done.stderr) == ("True True False\n", "")


# --- a terminal -----------------------------------------------------------------------------------------------------

ASK = """
import fcntl, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from encfs_js import keysource
from encfs_js.errors import KeyMissingError
prompt = keysource.terminal(confirm=sys.argv[1] == "twice")
try:
    key = keysource.find_key(environ={}, prompt=prompt)
    print("length", len(key))
except KeyMissingError as error:
    print("refused:", error)
"""


def conversation(how: str, *answers: bytes) -> str:
    """What a person sees who is asked on a terminal of their own and answers."""
    master, slave = pty.openpty()
    try:
        command = [sys.executable, "-c", ASK, how]
        with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True) as child:
            os.close(slave)
            try:
                shown = b""
                for answer in answers:
                    asked = shown.count(b": ") + 1
                    while shown.count(b": ") < asked:
                        shown += read_some(master)
                    os.write(master, answer)
                while more := read_some(master):
                    shown += more
                assert child.wait(60) == 0
            finally:
                child.kill()
    finally:
        os.close(master)
    return shown.decode()


def read_some(master: int) -> bytes:
    """Read what there is; nothing at the end. A terminal whose other side is closed gives EIO."""
    assert select.select([master], [], [], 60)[0], "nothing on the terminal for a minute"
    try:
        return os.read(master, 4096)
    except OSError:
        return b""


@pytest.mark.parametrize(
    ("how", "answers", "result"),
    [
        ("once", [SECRET], f"length {len(SECRET)}"),
        ("twice", [SECRET, SECRET], f"length {len(SECRET)}"),
        ("twice", [SECRET, SECRET + "x"], "refused: the two keys are not the same"),
        ("once", [""], "refused: the key that was typed is empty"),
        ("once", [None], "refused: no key: the input ended"),
        ("once", ["schlüssel"], "length 10"),
    ],
)
def test_a_key_typed_on_a_terminal_is_not_shown(how, answers, result):
    shown = conversation(how, *(b"\x04" if answer is None else f"{answer}\n".encode() for answer in answers))
    assert result in shown
    assert "s3cret" not in shown
    assert "schl" not in shown


def test_without_a_terminal_nobody_is_asked(tmp_path):
    script = "from encfs_js import keysource; print(keysource.terminal(), keysource.terminal(confirm=True))"
    command = [sys.executable, "-c", script]
    for text in (None, "key\n"):
        how = {"stdin": subprocess.DEVNULL} if text is None else {"input": text}
        done = subprocess.run(command, **how, capture_output=True, text=True, cwd=tmp_path)
        assert (done.stdout, done.stderr) == ("None None\n", "")
    closed = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *command], capture_output=True, text=True, cwd=tmp_path)
    assert (closed.stdout, closed.stderr) == ("None None\n", "")
