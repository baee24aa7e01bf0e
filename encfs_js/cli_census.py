"""What `inspect` says of accounts, streams, consumers and raft groups: as JSON, and the same for people."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from encfs_js import holdings
from encfs_js.census import Mode, total
from encfs_js.cli_table import show
from encfs_js.cli_text import plural, shown, size

if TYPE_CHECKING:
    from collections.abc import Sequence

    from encfs_js.census import Account, Census, Owner, Tallies
    from encfs_js.holdings import Consumer, Holding, Reader, State

_KEYS: Final = ("key", "prev_key")
_CONFIG: Final = (
    "description", "subjects", "retention", "storage", "num_replicas", "compression", "discard", "max_msgs", "max_bytes",
    "max_age", "max_msg_size", "max_msgs_per_subject", "max_consumers", "mirror", "sources", "sealed",
)  # fmt: skip
_CONSUMER: Final = (
    "durable_name", "ack_policy", "ack_wait", "deliver_policy", "deliver_subject", "filter_subject", "filter_subjects",
    "max_deliver", "max_ack_pending", "num_replicas",
)  # fmt: skip
_LIMITS: Final = ("max_msgs", "max_bytes", "max_age", "max_msg_size", "max_msgs_per_subject", "max_consumers")


# --- as JSON ----------------------------------------------------------------------------------------------------------


def tell(census: Census, reader: Reader) -> dict[str, Any]:
    """Read what the owners hold, one after the other, and return it for JSON."""
    accounts = [_account(account, reader) for _, account in sorted(census.accounts.items())]
    groups = [
        _group(account, owner, reader)
        for _, account in sorted(census.accounts.items())
        for _, owner in sorted(account.groups.items())
    ]
    streams = [stream for account in accounts for stream in account["streams"]]
    states = [stream["state"] for stream in streams]
    known = None not in states
    return {
        "modes": modes(census.tallies),
        "totals": {
            "accounts": len(accounts),
            "streams": len(streams),
            "consumers": sum(len(stream["consumers"]) for stream in streams),
            "blocks": sum(stream["blocks"] for stream in streams),
            "messages": sum(state["messages"] for state in states) if known else None,
            "bytes": sum(state["bytes"] for state in states) if known else None,
            "raft_groups": len(groups),
            **_sizes(census.tallies),
        },
        "key_files": census.key_files,
        "opened_by": _opened_by(census.opened),
        "key_needed": reader.sealed,
        "accounts": accounts,
        "raft_groups": groups,
    }


def modes(tallies: Tallies) -> list[dict[str, Any]]:
    """Return what there is of each mode, cipher and epoch. encryptable: files that nats-server would encrypt with a key."""
    return [
        {
            "mode": nature.mode.value,
            "cipher": nature.cipher or None,
            "epoch": nature.epoch or None,
            "files": tally.files,
            "disk_bytes": tally.disk,
            "plain_bytes": tally.plain,
            "encryptable": tally.main,
        }
        for nature, tally in sorted(tallies.items(), key=lambda each: (each[0].mode.value, *each[0][1:]))
    ]


def _sizes(tallies: Tallies) -> dict[str, int]:
    found = total(tallies)
    return {"files": found.files, "disk_bytes": found.disk, "plain_bytes": found.plain}


def _opened_by(opened: dict[int, int]) -> dict[str, int]:
    return {name: opened.get(i, 0) for i, name in enumerate(_KEYS)}


def _account(account: Account, reader: Reader) -> dict[str, Any]:
    return {
        "name": account.name,
        "streams": [_stream(owner, reader) for _, owner in sorted(account.streams.items())],
        "deleting": [_files(owner) for _, owner in sorted(account.deleting.items())],
        "restoring": [_files(owner) for _, owner in sorted(account.restoring.items())],
    }


def _files(owner: Owner) -> dict[str, Any]:
    """Return what can be told without a key."""
    main = {nature.mode for nature, tally in owner.tallies.items() if tally.main} - {Mode.EMPTY}
    return {
        "name": owner.name,
        "path": os.fsdecode(owner.path),
        "mode": "mixed" if len(main) > 1 else main.pop().value if main else None,
        "modes": modes(owner.tallies),
        **_sizes(owner.tallies),
        "blocks": owner.blocks,
        "leftovers": owner.leftovers,
        "key_files": owner.key_files,
        "opened_by": _opened_by(owner.opened),
    }


def _stream(owner: Owner, reader: Reader) -> dict[str, Any]:
    found = holdings.look(reader, owner)
    return {
        **_files(owner),
        **_held(found),
        "config": _picked(found.config, _CONFIG),
        "consumers": [_consumer(consumer) for consumer in found.consumers],
        "batches": [_batch(batch, reader) for _, batch in sorted(owner.batches.items())],
    }


def _held(found: Holding) -> dict[str, Any]:
    return {
        "created": (found.config or {}).get("created"),
        "compressed_blocks": found.compressed,
        "state": None if found.state is None else _state(found.state),
        "key_needed": found.sealed,
    }


def _batch(owner: Owner, reader: Reader) -> dict[str, Any]:
    return {**_files(owner), **_held(holdings.look(reader, owner))}


def _state(state: State) -> dict[str, Any]:
    return {
        "counted_from": state.source,
        "messages": state.messages,
        "bytes": state.size,
        "first_seq": state.first_seq,
        "first_time": _stamp(state.first_time),
        "last_seq": state.last_seq,
        "last_time": _stamp(state.last_time),
        "deleted": state.deleted,
        "subjects": state.subjects,
    }


def _stamp(time: int) -> str | None:
    """Return a time as NATS writes it, with nanoseconds; None for none, or one that no calendar has."""
    if not time:
        return None
    seconds, rest = divmod(time, 10**9)
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{rest:09d}Z"
    except (ValueError, OverflowError, OSError):
        return None


def _picked(config: dict[str, Any] | None, names: Sequence[str]) -> dict[str, Any] | None:
    return None if config is None else {name: config[name] for name in names if name in config}


def _consumer(consumer: Consumer) -> dict[str, Any]:
    state = consumer.state
    return {
        "name": consumer.name,
        "config": _picked(consumer.config, _CONSUMER),
        "created": (consumer.config or {}).get("created"),
        "state": None
        if state is None
        else {
            "ack_floor": {"consumer_seq": state.ack_floor.consumer, "stream_seq": state.ack_floor.stream},
            "delivered": {"consumer_seq": state.delivered.consumer, "stream_seq": state.delivered.stream},
            "pending": state.pending,
            "redelivered": state.redelivered,
        },
    }


def _group(account: Account, owner: Owner, reader: Reader) -> dict[str, Any]:
    found, raft = holdings.look(reader, owner), holdings.look_at_group(reader, owner)
    return {
        "account": account.name,
        "kind": {"_meta_": "meta", "S-": "stream", "C-": "consumer"}.get(
            owner.name if owner.name == "_meta_" else owner.name[:2]
        ),
        **_files(owner),
        **_held(found),
        "term": raft.term,
        "voted": raft.voted,
        "cluster_size": raft.cluster_size,
        "peers": raft.peers,
        "committed": raft.committed,
        "snapshots": raft.snapshots,
        "snapshot": None
        if raft.snapshot is None
        else dict(zip(("term", "index", "cluster_size"), raft.snapshot, strict=True)),
    }


# --- for people -------------------------------------------------------------------------------------------------------


def print_modes(found: Sequence[dict[str, Any]]) -> None:
    """Print a line for each mode, cipher and epoch of files with content."""
    for each in found:
        if each["mode"] != "empty":
            print(
                f"  {_mode(each)}: {plural(each['files'], 'file')}, {size(each['disk_bytes'])}, "
                f"{size(each['plain_bytes'])} of it plain text"
            )


def print_told(told: dict[str, Any]) -> None:
    """Print what `tell` returns, but for the modes."""
    if told["key_files"]:
        opened = told["opened_by"]
        by = f", of which the key opens {opened['key']}" if any(opened.values()) else ""
        before = f" and the one before {opened['prev_key']}" if opened["prev_key"] else ""
        print(f"  nats-server's own key files: {told['key_files']}{by}{before}")
    for account in told["accounts"]:
        _print_account(account)
    if told["raft_groups"]:
        _print_groups(told["raft_groups"])
    if told["key_needed"]:
        print()
        print(
            "With the key there is more to see: messages, sequences, subjects, configuration and consumers. "
            "Give it with --key-file, --credential, --tpm or --config, or as JS_KEY."
        )


def _mode(each: dict[str, Any]) -> str:
    epoch = f"epoch {each['epoch']}" if each["epoch"] else ""
    return " ".join(filter(None, (each["mode"], each["cipher"], epoch)))


def _modes(owner: dict[str, Any]) -> str:
    return " + ".join(_mode(each) for each in owner["modes"] if each["encryptable"] and each["mode"] != "empty") or "-"


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):
        return " ".join(map(_cell, value)) or "-"
    return shown(str(value))


def _print_account(account: dict[str, Any]) -> None:
    streams = account["streams"]
    if not (streams or account["deleting"] or account["restoring"]):
        return
    print()
    print(f"account {shown(account['name'])}: {plural(len(streams), 'stream')}")
    if streams:
        _print_files("STREAM", streams)
    _print_states("STREAM", "MESSAGES", streams)
    _print_configs(streams)
    _print_consumers(streams)
    for stream in streams:
        for batch in stream["batches"]:
            state = batch["state"]
            held = "" if state is None else f", {plural(state['messages'], 'message')}"
            print(
                f"  staged batch {shown(batch['name'])} of stream {shown(stream['name'])}: "
                f"{plural(batch['blocks'], 'block')}, {size(batch['disk_bytes'])}{held}"
            )
        if stream["leftovers"]:
            print(f"  stream {shown(stream['name'])}: {plural(stream['leftovers'], 'staged file')} left over")
    for name, what in (("deleting", "being deleted"), ("restoring", "being restored")):
        for owner in account[name]:
            print(
                f"  {what}: {shown(owner['name'])}: {plural(owner['files'], 'file')}, {size(owner['disk_bytes'])}, "
                f"{_modes(owner)}"
            )


def _print_files(title: str, owners: list[dict[str, Any]]) -> None:
    show(
        (title, "MODE", "FILES", "BLOCKS", "COMPRESSED", "ON DISK", "PLAIN"),
        [
            (
                shown(owner["name"]), _modes(owner), str(owner["files"]), str(owner["blocks"]),
                _cell(owner["compressed_blocks"]), size(owner["disk_bytes"]), size(owner["plain_bytes"]),
            )
            for owner in owners
        ],
        right={"FILES", "BLOCKS", "COMPRESSED", "ON DISK", "PLAIN"},
    )  # fmt: skip


def _print_states(title: str, what: str, owners: list[dict[str, Any]]) -> None:
    with_state = [owner for owner in owners if owner["state"] is not None]
    if not with_state:
        return
    numbers = [what, "BYTES", "FIRST", "LAST", "DELETED", "SUBJECTS"]
    print()
    show(
        (title, *numbers, "LAST TIME", "COUNTED FROM"),
        [
            (
                shown(owner["name"]), str(s["messages"]), size(s["bytes"]), str(s["first_seq"]), str(s["last_seq"]),
                str(s["deleted"]), _cell(s["subjects"]), _time(s["last_time"]), s["counted_from"],
            )
            for owner in with_state
            for s in (owner["state"],)
        ],
        right=numbers,
    )  # fmt: skip


def _time(stamp: str | None) -> str:
    return "-" if stamp is None else f"{stamp[:19]}Z"


def _limits(config: dict[str, Any]) -> str:
    found = []
    for name in _LIMITS:
        value = config.get(name)
        if isinstance(value, int) and value > 0:
            said = f"{value / 10**9:g}s" if name == "max_age" else size(value) if name in _LIMITS[1:4] else str(value)
            found.append(f"{name}={said.replace(' ', '')}")
    return " ".join(found) or "-"


def _print_configs(streams: list[dict[str, Any]]) -> None:
    with_config = [stream for stream in streams if stream["config"] is not None]
    if not with_config:
        return
    print()
    show(
        ("STREAM", "SUBJECTS", "RETENTION", "STORAGE", "REPLICAS", "COMPRESSION", "LIMITS"),
        [
            (
                shown(stream["name"]),
                *(_cell(c.get(n)) for n in ("subjects", "retention", "storage", "num_replicas", "compression")),
                _limits(c),
            )
            for stream in with_config
            for c in (stream["config"],)
        ],
        right={"REPLICAS"},
    )


def _print_consumers(streams: list[dict[str, Any]]) -> None:
    rows = []
    for stream in streams:
        for consumer in stream["consumers"]:
            config, s = consumer["config"] or {}, consumer["state"]
            numbers = (None,) * 4
            if s is not None:
                numbers = (s["delivered"]["stream_seq"], s["ack_floor"]["stream_seq"], s["pending"], s["redelivered"])
            cells = (config.get("durable_name"), config.get("ack_policy"), *numbers)
            rows.append((shown(stream["name"]), shown(consumer["name"]), *map(_cell, cells)))
    if rows:
        numbers_head = ("DELIVERED", "ACK FLOOR", "PENDING", "REDELIVERED")
        print()
        show(("STREAM", "CONSUMER", "DURABLE", "ACK", *numbers_head), rows, right=numbers_head)


def _print_groups(groups: list[dict[str, Any]]) -> None:
    print()
    print(plural(len(groups), "raft group"))
    _print_files("GROUP", groups)
    _print_states("GROUP", "ENTRIES", groups)
    rows = []
    for group in groups:
        snapshot = group["snapshot"]
        at = "-" if snapshot is None else f"term {snapshot['term']}, index {snapshot['index']}"
        cells = (group["kind"], group["cluster_size"], group["peers"], group["term"], group["committed"])
        rows.append((shown(group["name"]), *map(_cell, cells), _cell(group["snapshots"]), at))
    print()
    show(
        ("GROUP", "KIND", "CLUSTER", "PEERS", "TERM", "COMMITTED", "SNAPSHOTS", "NEWEST"),
        rows,
        right={"CLUSTER", "PEERS", "TERM", "COMMITTED", "SNAPSHOTS"},
    )
