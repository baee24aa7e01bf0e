"""The rooms of the package import only downwards, and foreign libraries stay where they belong."""

from __future__ import annotations

import ast
import os

import pytest

import encfs_js

# From the bottom up. A new room must be given its place here.
ROOMS = """
    __init__ errors logs mounts presence hygiene wire notify control fusemount journal resend spawn errands succession supervisor
    format natscodec serverkeys jetstream serverstate servernotes serverold backing serverstore
    steps keydocument recovery slots keyring keystore keysource config tpmfile tpm keymemory sealed crash redo
    state inuse guard tree viewtree reserve times opening files rewrite reencrypt sweep revive world
    gate pace advisor advice reply fs viewfs background session worker mount premount
    meter pool inspect view unsealing census holdings recordcheck serverwrite sides staging survey carry equal convert
    encrypt decrypt near impact loss filecheck verify metacheck servercheck
    cli_text cli_table cli_census cli_progress cli_key cli_serverkey cli_keys cli_guard cli_init cli_inspect cli_mount
    cli_status cli_systemd cli_servercheck cli_verify cli_reencrypt cli_alone cli_encrypt cli_convert cli_view cli __main__
""".split()  # noqa: SIM905
FUSE = {"background", "fs", "gate", "pace", "reply", "session", "viewfs", "worker"}
ONLY = {
    "highwayhash": {"natscodec"},
    "pyfuse3": FUSE,
    "trio": FUSE,
    "click": {room for room in ROOMS if room.startswith("cli")},
    "tpm2_pytss": {"tpm"},
}
PACKAGE = os.path.dirname(encfs_js.__file__)
FOUND = sorted(name.removesuffix(".py") for name in os.listdir(PACKAGE) if name.endswith(".py"))


def imports(room: str) -> set[str]:
    """Return what a room imports anywhere in it, also inside functions and for types only."""
    with open(os.path.join(PACKAGE, f"{room}.py"), encoding="utf-8") as file:
        tree = ast.parse(file.read())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where they lead"
            rooms_of_package = node.module == "encfs_js"
            found |= {f"encfs_js.{alias.name}" for alias in node.names} if rooms_of_package else {str(node.module)}
    return found


@pytest.mark.parametrize("room", FOUND)
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    assert room in ROOMS, f"{room} has no place in ROOMS"
    for name in imports(room):
        first, _, rest = name.partition(".")
        if first == "encfs_js" and rest in FOUND:
            assert ROOMS.index(rest) < ROOMS.index(room), f"{room} imports {rest}, which is not below it"
        assert room in ONLY.get(first, {room}), f"{room} imports {first}"
