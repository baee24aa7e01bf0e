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
    cli_status cli_systemd cli_servercheck cli_verify cli_reencrypt cli_alone cli_encrypt cli_convert cli_view
    cli_compare cli __main__
""".split()  # noqa: SIM905
# The same for `encfs_js.compare`, which measures and attacks the package from outside: through its command line.
COMPARE = """
    __init__ interrupt processes result sink client clocks server modes machine
    loads ceiling cluster figures
    reading judging victim telling forging observing leaks tampering mistakes killing attacks
    runs rounds
    wording summary drawing plots page markdown report
""".split()  # noqa: SIM905
# What it takes of the package: tables of mounts, forms of files that everybody may know, and no part that serves or has keys.
BELOW_COMPARE = {"__init__", "errors", "mounts", "natscodec", "jetstream", "serverstate", "backing", "format"}
FUSE = {"background", "fs", "gate", "pace", "reply", "session", "viewfs", "worker"}
ONLY = {
    "highwayhash": {"natscodec"},
    "pyfuse3": FUSE,
    "trio": FUSE,
    "click": {room for room in ROOMS if room.startswith("cli")},
    "tpm2_pytss": {"tpm"},
    "matplotlib": {"compare.drawing", "compare.plots"},
    "jinja2": {"compare.page"},
    "markupsafe": {"compare.page"},
}
PACKAGE = os.path.dirname(encfs_js.__file__)


def rooms_in(directory: str) -> list[str]:
    return sorted(name.removesuffix(".py") for name in os.listdir(directory) if name.endswith(".py"))


FOUND = rooms_in(PACKAGE)
FOUND_COMPARE = rooms_in(os.path.join(PACKAGE, "compare"))


def imports(room: str) -> set[str]:
    """Return what a room imports anywhere in it, also inside functions and for types only."""
    with open(os.path.join(PACKAGE, *room.split(".")) + ".py", encoding="utf-8") as file:
        tree = ast.parse(file.read())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where they lead"
            rooms_of_package = node.module in {"encfs_js", "encfs_js.compare"}
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if rooms_of_package else {str(node.module)}
    return found


@pytest.mark.parametrize("room", FOUND)
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    assert room in ROOMS, f"{room} has no place in ROOMS"
    for name in imports(room):
        first, _, rest = name.partition(".")
        if first == "encfs_js" and rest in FOUND:
            assert ROOMS.index(rest) < ROOMS.index(room), f"{room} imports {rest}, which is not below it"
        assert room in ONLY.get(first, {room}), f"{room} imports {first}"
        assert rest.partition(".")[0] != "compare" or room == "cli_compare", f"{room} imports {name}"


@pytest.mark.parametrize("room", FOUND_COMPARE)
def test_a_room_of_the_comparison_imports_only_rooms_below_it(room: str) -> None:
    assert room in COMPARE, f"compare.{room} has no place in COMPARE"
    for name in imports(f"compare.{room}"):
        first, _, rest = name.partition(".")
        if rest.startswith("compare."):
            below = rest.removeprefix("compare.")
            assert below in FOUND_COMPARE, f"compare.{room} imports {name}"
            assert COMPARE.index(below) < COMPARE.index(room), f"compare.{room} imports {below}, which is not below it"
        elif first == "encfs_js":
            assert rest in BELOW_COMPARE or rest not in FOUND, f"compare.{room} imports {rest}"
        assert f"compare.{room}" in ONLY.get(first, {f"compare.{room}"}), f"compare.{room} imports {first}"
