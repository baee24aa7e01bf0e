"""The command line of the benchmark: options, the order of the runs, the table and the JSON file."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from contextlib import nullcontext, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from encfs_js.compare import clocks, modes, processes, server
from encfs_js.compare import loads as served
from encfs_js.compare.result import spread

from . import __doc__ as told
from . import loads, profiler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MODES = {mode.name: mode for mode in modes.MODES}
DEFAULT = ("plain", "mount chachapoly", "mount aes")
MEMORY = 2 << 30  # bytes at hand for each measurement, see clocks.hold


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=told.splitlines()[0])
    parser.add_argument("--mode", action="append", choices=MODES, metavar="NAME", help=", ".join(MODES))
    parser.add_argument("--load", action="append", choices=loads.LOADS, metavar="NAME", help=", ".join(loads.LOADS))
    parser.add_argument("--pairs", type=int, help="pairs of runs per load and mode (5)")
    parser.add_argument("--directory", default=tempfile.gettempdir(), help="where the stores are made")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured there")
    parser.add_argument("--quick", action="store_true", help="tiny loads and one pair: shows that everything works")
    parser.add_argument("--size", action="append", default=[], metavar="NAME=COUNT", help=", ".join(vars(loads.Size())))
    parser.add_argument("--mount-option", action="append", default=[], metavar="OPTION", help="for encfs-js mount")
    parser.add_argument("--profile", choices=profiler.KINDS, help="profile the daemon of mounts")
    parser.add_argument("--profile-directory", default="bench-profiles", help="where the profiles go (bench-profiles)")
    return parser.parse_args()


def order(chosen: Sequence[str], pairs: int, wanted: Sequence[str]) -> Iterator[tuple[str, int, str, str]]:
    """Yield (load, pair, mode, partner) in the order of the runs.

    Every other mode's run comes right after a plain run of its own, so that both meet the same machine.
    """
    for load in wanted:
        for pair in range(1, pairs + 1):
            others = [name for name in chosen if name != "plain" and loads.applies(load, MODES[name].kind)]
            for other in others or ["plain"]:
                yield load, pair, "plain", other
                if other != "plain":
                    yield load, pair, other, "plain"


def once(options: argparse.Namespace, program: str, size: loads.Size, root: str, label: str, name: str) -> served.Run:
    """Make a run in a directory of its own."""
    load = label.partition("-")[0]
    store = modes.create(MODES[name], os.path.join(root, label), options=tuple(options.mount_option))
    run = served.Run(store, program, size, lambda: None)
    profile = os.path.abspath(os.path.join(options.profile_directory, f"{label}.{options.profile}"))
    wanted = options.profile if MODES[name].kind == "mount" else ""
    try:
        if wanted == "cprofile":
            os.environ["BENCH_PROFILE"] = profile
            store.ours = profiler.PROFILED
        with profiler.recording(profile) if wanted == "perf" else nullcontext():
            loads.LOADS[load](run)
    except (processes.RunError, OSError) as error:
        said = processes.tail(store.log)
        raise processes.RunError(f"{type(error).__name__}: {error}\n{said}") from error
    if wanted:
        print(f"      profile: {profiler.summarise(wanted, profile)}", flush=True)
    return run


def summarise(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row per figure and mode; a ratio is taken within a pair only, with the plain run that came just before."""
    plain = {(run["load"], run["pair"], run["partner"]): run["figures"] for run in runs if run["mode"] == "plain"}
    rows: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for run in runs:
        before = plain.get((run["load"], run["pair"], run["mode"]), {})
        for work, measures in run["figures"].items():
            for measure, value in measures.items():
                row = rows.setdefault((work, measure, run["mode"]), {"values": [], "ratios": []})
                row["values"].append(value)
                if base := before.get(work, {}).get(measure):
                    row["ratios"].append(value / base)
    return [
        {"work": work, "measure": measure, "mode": mode, **{name: values for name, values in row.items() if values}}
        for (work, measure, mode), row in sorted(rows.items())
    ]


def table(rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table."""
    for row in rows:
        value = spread(row["values"])
        text = f"{row['work']:<16} {row['measure']:<14} {row['mode']:<18} {value.median:>14,.6g}"
        if row.get("ratios"):
            ratio = spread(row["ratios"])
            text += f"   of plain {ratio.median:.3f} [{ratio.min:.3f} .. {ratio.max:.3f}]"
        yield text


def main() -> int:
    """Run everything; return the exit code."""
    options = arguments()
    size = replace(
        loads.QUICK if options.quick else loads.Size(),
        **{name: int(count) for name, _, count in (given.partition("=") for given in options.size)},
    )
    if options.profile:
        profiler.check(options.profile)
        os.makedirs(options.profile_directory, exist_ok=True)
    program = server.find(None)
    chosen = []
    for name in options.mode or DEFAULT:
        if reason := modes.missing(MODES[name]):
            print(f"skipped {name}: {reason}")
        else:
            chosen.append(name)
    clocks.hold(0 if options.quick else MEMORY)
    runs, failures, began = [], [], time.monotonic()
    with processes.scratch(options.directory) as root:
        for load, pair, name, partner in order(
            chosen, options.pairs or (1 if options.quick else 5), options.load or list(loads.LOADS)
        ):
            label = f"{load}-{name}-{partner}-{pair}".replace(" ", "_")
            known = {"load": load, "pair": pair, "mode": name, "partner": partner}
            try:
                run = once(options, program, size, root, label, name)
            except processes.RunError as error:
                failures.append(known | {"error": str(error)})
                print(f"[{load} {pair}] {name}: FAILED: {error}", flush=True)
                continue
            runs.append(known | {"figures": run.figures, "bounds": run.bounds})
            print(f"[{load} {pair}] {name}", flush=True)
            shutil.rmtree(os.path.join(root, label))
    rows = summarise(runs)
    print("\n".join(table(rows)))
    print(f"\n{len(runs)} runs in {time.monotonic() - began:.0f} s, {len(failures)} failed")
    if options.json:
        found = {"size": vars(size), "rows": rows, "runs": runs, "failures": failures}
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)
    return 1 if failures else 0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
    sys.exit(130)
