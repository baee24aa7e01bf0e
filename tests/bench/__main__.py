"""The command line of the benchmark: options, the order of the runs, the table and the JSON file."""

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections import deque
from contextlib import suppress

from . import backends, loads, meter, report, server
from .meter import CORES, RunError
from .profiler import KINDS, Profiler

QUICK = loads.Size(messages=5_000, sync_messages=50, file_mib=8, files=100)


def arguments():
    """Parse the command line."""
    sizes = loads.Size()
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--backend", action="append", choices=backends.NAMES, metavar="NAME", help=", ".join(backends.NAMES)
    )
    parser.add_argument("--load", action="append", choices=loads.LOADS, metavar="NAME", help=", ".join(loads.LOADS))
    parser.add_argument("--pairs", type=int, help="pairs of runs per load and backend (5)")
    parser.add_argument(
        "--directory",
        default=tempfile.gettempdir(),
        help="where the stores are made, on the file system to measure (the temporary directory)",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured there")
    parser.add_argument("--quick", action="store_true", help="tiny loads and one pair: shows that everything works")
    parser.add_argument("--messages", type=int, help=f"messages of the jetstream load ({sizes.messages})")
    parser.add_argument("--payload", type=int, help=f"bytes of a message ({sizes.payload})")
    parser.add_argument("--window", type=int, help=f"chunks of 1,024 messages in flight ({sizes.window})")
    parser.add_argument("--headers", action="store_true", default=None, help="publish with a header (HPUB)")
    parser.add_argument("--sync-messages", type=int, help=f"messages of the sync load ({sizes.sync_messages})")
    parser.add_argument("--file-mib", type=int, help=f"size of the large file ({sizes.file_mib})")
    parser.add_argument("--files", type=int, help=f"number of small files ({sizes.files})")
    parser.add_argument(
        "--mount-option",
        action="append",
        default=[],
        metavar="OPTION",
        help="for encfs-js mount: --mount-option=--no-writeback",
    )
    parser.add_argument("--profile", choices=KINDS, help="profile the daemon of sealed mounts")
    parser.add_argument("--profile-directory", default="bench-profiles", help="where the profiles go (bench-profiles)")
    return parser.parse_args()


def order(chosen, pairs, wanted):
    """Yield (load, pair, backend, partner) in the order of the runs.

    Every other backend's run comes right after a plain run of its own, so that both meet the same machine.
    """
    others = [backend for backend in chosen if backend != "plain"]
    for load in wanted:
        for pair in range(1, pairs + 1):
            for other in [other for other in others if loads.applies(load, other)] or ["plain"]:
                if loads.applies(load, "plain"):
                    yield load, pair, "plain", other
                if other != "plain":
                    yield load, pair, other, "plain"


def filesystem(path):
    """Return the type of the file system that holds a directory."""
    best, kind = "", "unknown"
    with open("/proc/self/mountinfo") as file:
        for line in file:
            mountpoint, after = line.split()[4], line.partition(" - ")[2].split()
            inside = os.path.realpath(path).startswith(mountpoint.rstrip("/") + "/")
            if inside and len(mountpoint) >= len(best):
                best, kind = mountpoint, after[0]
    return kind


def once(options, size, load, pair, name):
    """Make a run in a directory of its own and remove it."""
    root = tempfile.mkdtemp(prefix="encfs-js-bench-", dir=options.directory)
    profiler = None
    if options.profile and name in backends.SEALED:
        os.makedirs(options.profile_directory, exist_ok=True)
        profiler = Profiler(options.profile, options.profile_directory, f"{load}-{name}-{pair}")
    try:
        store = backends.create(name, root, mount_options=options.mount_option, profiler=profiler)
        figures, costs = loads.LOADS[load](store, size)
    except (RunError, OSError) as error:
        raise RunError(f"{type(error).__name__}: {error}\n{complaints(root)}") from error
    finally:
        # A mount that could not be taken away must not be emptied through its mountpoint.
        if not os.path.ismount(os.path.join(root, "data")):
            shutil.rmtree(root, ignore_errors=True)
    for path in profiler.summarise() if profiler else ():
        print(f"      profile: {path}", flush=True)
    return figures, costs


def complaints(root):
    """Return the last lines that the server and the daemon logged above the level INFO."""
    lines = []
    for name in ("nats.log", "daemon.log"):
        with suppress(OSError), open(os.path.join(root, name), errors="replace") as file:
            lines += [f"  {name}: {line.rstrip()}" for line in deque(file, 20) if "[INF]" not in line]
    return "\n".join(lines)


def progress(figures):
    """Return a run's figures as one line."""
    known = ((report.FIGURES[name], name, value) for name, value in figures.items())
    return "  ".join(f"{name}={value * kind.scale:,.{kind.digits}f}" for kind, name, value in known)


def main():
    """Run everything; return the exit code."""
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    if options.quick:
        meter.KEPT = meter.mmap.PAGESIZE  # figures that mean nothing need no memory at hand
    base = QUICK if options.quick else loads.Size()
    given = {name: getattr(options, name) for name in vars(base) if getattr(options, name) is not None}
    size = loads.Size(**vars(base) | given)
    pairs = options.pairs or (1 if options.quick else 5)
    chosen = []
    for name in options.backend or backends.DEFAULT:
        if reason := backends.missing(name):
            print(f"skipped {name}: {reason}")
        else:
            chosen.append(name)
    machine = {
        "cores": CORES,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "server": server.version(),
        "filesystem": filesystem(options.directory),
        "load_before": round(os.getloadavg()[0], 2),
        "cold": os.access("/proc/sys/vm/drop_caches", os.W_OK),
    }
    print("  ".join(f"{name}: {value}" for name, value in machine.items()))
    if machine["load_before"] > 0.5:
        print("something else runs here (load_before): do not trust the figures")
    if not machine["cold"]:
        print("not root: the page cache cannot be dropped, figures called cold are warm")
    runs, failures, began = [], [], time.monotonic()
    for load, pair, name, partner in order(chosen, pairs, options.load or loads.LOADS):
        label = {"load": load, "pair": pair, "backend": name, "partner": partner}
        try:
            figures, costs = once(options, size, load, pair, name)
        except RunError as error:
            failures.append(label | {"error": str(error)})
            print(f"[{load} {pair}] {name}: FAILED: {error}", flush=True)
            continue
        runs.append(label | {"figures": figures, "costs": costs})
        print(f"[{load} {pair}] {name}: {progress(figures)}", flush=True)
    rows = report.summarise(runs)
    print("\n".join(report.table(rows)))
    print(f"\n{len(runs)} runs in {time.monotonic() - began:.0f} s, {len(failures)} failed")
    if options.json:
        result = {
            "machine": machine,
            "size": vars(size),
            "pairs": pairs,
            "figures": rows,
            "runs": runs,
            "failures": failures,
        }
        with open(options.json, "w") as file:
            json.dump(result, file, indent=1)
            file.write("\n")
    return 1 if failures else 0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
