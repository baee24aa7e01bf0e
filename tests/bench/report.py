"""Medians, ratios to the plain directory of the same pair, the targets, and the table."""

import statistics
from dataclasses import dataclass

from .meter import CORES


@dataclass(frozen=True)
class Figure:
    """How a figure is shown and compared. `scale` turns the measured value into `unit`."""

    title: str
    unit: str
    scale: float
    digits: int
    cost: str  # the part of the run whose cost belongs to it


FIGURES = {
    "ceiling.rate": Figure("publish into memory: what server and client can do", "msg/s", 1, 0, "ceiling"),
    "publish.rate": Figure("publish, server saturated", "msg/s", 1, 0, "publish"),
    "publish.synced_rate": Figure("the same until all is on the disk", "msg/s", 1, 0, "publish"),
    "replay.rate": Figure("cold ordered replay", "msg/s", 1, 0, "replay"),
    "replay.bytes": Figure("the same in bytes received", "MB/s", 1e-6, 0, "replay"),
    "restart.warm": Figure("server restart, warm, reads all blocks", "ms", 1e3, 1, "restart.warm"),
    "restart.cold": Figure("server restart, cold, reads all blocks", "ms", 1e3, 1, "restart.cold"),
    "restart.settled": Figure(
        "server restart, cold, all older than the duplicate window", "ms", 1e3, 1, "restart.settled"
    ),
    "sync.p50": Figure("publish with sync_interval always, p50", "us", 1e6, 0, "sync"),
    "sync.p99": Figure("publish with sync_interval always, p99", "us", 1e6, 0, "sync"),
    "file.write": Figure("sequential write and fsync", "MB/s", 1e-6, 0, "file.write"),
    "file.write_cpu": Figure("sequential write, daemon's CPU per GiB", "s", 1, 2, "file.write"),
    "file.read": Figure("cold sequential read", "MB/s", 1e-6, 0, "file.read"),
    "file.read_cpu": Figure("cold sequential read, daemon's CPU per GiB", "s", 1, 2, "file.read"),
    "small.create": Figure("create, write 300 bytes, close", "us", 1e6, 1, "small.create"),
    "small.rename": Figure("rename", "us", 1e6, 1, "small.rename"),
    "small.unlink": Figure("unlink", "us", 1e6, 1, "small.unlink"),
    "small.stat": Figure("stat, names and inodes dropped", "us", 1e6, 1, "small.stat"),
    "small.stat_cached": Figure("stat, cached by the kernel", "us", 1e6, 1, "small.stat_cached"),
}

# (figure, backend): (what is compared, at least or at most, the bound in the figure's unit).
TARGETS = {
    ("publish.rate", "plain"): ("value", ">=", 200_000),
    ("publish.rate", "sealed:aes"): ("ratio", ">=", 0.78),
    ("publish.rate", "sealed:chachapoly"): ("ratio", ">=", 0.72),
    ("file.write_cpu", "sealed:aes"): ("value", "<=", 1.8),
    ("file.read_cpu", "sealed:aes"): ("value", "<=", 1.1),
}
for _backend in ("sealed:aes", "sealed:chachapoly"):
    TARGETS |= {
        ("replay.rate", _backend): ("ratio", ">=", 0.85),
        ("restart.cold", _backend): ("ratio", "<=", 1.5),
        ("restart.warm", _backend): ("ratio", "<=", 1.5),
        ("restart.settled", _backend): ("ratio", "<=", 1.5),
        ("sync.p50", _backend): ("ratio", "<=", 1.6),
        ("small.create", _backend): ("value", "<=", 300),
        ("small.rename", _backend): ("value", "<=", 120),
        ("small.unlink", _backend): ("value", "<=", 100),
    }


def spread(values, digits):
    """Return the values with their median and range."""
    places = digits or None  # round(x, None) is an integer
    values = [round(value, places) for value in values]
    return {
        "values": values,
        "median": round(statistics.median(values), places),
        "min": min(values),
        "max": max(values),
    }


def summarise(runs):
    """Turn runs (dicts of pair, backend, partner, figures, costs) into one row per figure and backend.

    A ratio is taken within a pair only: a run of another backend with the plain run that came just before it.
    """
    rows = []
    plain = {(run["load"], run["pair"], run["partner"]): run for run in runs if run["backend"] == "plain"}
    for name, figure in FIGURES.items():
        for backend in dict.fromkeys(run["backend"] for run in runs):
            own = [run for run in runs if run["backend"] == backend and name in run["figures"]]
            if not own:
                continue
            ratios = [
                run["figures"][name] / before["figures"][name]
                for run in own
                if backend != "plain"
                and (before := plain.get((run["load"], run["pair"], backend))) is not None
                and name in before["figures"]
            ]
            row = {"figure": name, "title": figure.title, "unit": figure.unit, "backend": backend}
            row["value"] = spread([run["figures"][name] * figure.scale for run in own], figure.digits)
            row["ratio"] = spread(ratios, 3) if ratios else None
            row["cost"] = {
                part: round(statistics.median(run["costs"][figure.cost][part] for run in own), 3)
                for part in own[0]["costs"][figure.cost]
                if part != "bound"
            }
            row["bound"] = statistics.mode(run["costs"][figure.cost].get("bound", "") for run in own)
            rows.append(row | judged(row))
    return rows


def judged(row):
    """Return the target of a row and whether its median met it."""
    what, sense, limit = TARGETS.get((row["figure"], row["backend"]), ("", "", None))
    if limit is None or row[what] is None:
        return {"target": None, "met": None, "missed_by": None}
    median = row[what]["median"]
    met = median >= limit if sense == ">=" else median <= limit
    missed = None if met else round(abs(median - limit) / limit, 3)
    return {"target": {"of": what, "sense": sense, "limit": limit}, "met": met, "missed_by": missed}


def shown(value):
    """Return a spread as text."""
    return f"{value['median']:>10,} [{value['min']:,} .. {value['max']:,}]"


def table(rows):
    """Return the lines of the table."""
    lines, part = [], ""
    for name, figure in FIGURES.items():
        mine = [row for row in rows if row["figure"] == name]
        if not mine:
            continue
        lines += ["", f"{figure.title}  ({name}, {figure.unit})"]
        for row in mine:
            ratio = f"of plain{shown(row['ratio'])}" if row["ratio"] else ""
            text = f"  {row['backend']:<18} {shown(row['value']):<42} {ratio:<42} {verdict(row)}"
            lines.append(text.rstrip())
            if part != figure.cost:
                lines.append(f"  {'':<18} {costs(row)}")
        part = figure.cost
    return lines


def verdict(row):
    """Return the target and what became of it."""
    if row["target"] is None:
        return ""
    of = " of plain" if row["target"]["of"] == "ratio" else f" {row['unit']}"
    text = f"target {row['target']['sense']} {row['target']['limit']:,}{of}: "
    return text + ("met" if row["met"] else f"MISSED by {row['missed_by']:.1%}")


def costs(row):
    """Return the CPU seconds behind a figure."""
    cost = row["cost"]
    parts = [f"{part} {cost[part]:.2f} s" for part in ("server", "daemon", "client", "others") if cost.get(part)]
    text = f"cpu: {', '.join(parts) or 'none'} in {cost['wall']:.2f} s"
    if "idle" in cost:
        spare = cost["idle"] + cost["waiting"]
        text += f", machine idle {spare / max(cost['wall'] * CORES, 1e-6):.0%}"
    return text + (f"; bound by {row['bound']}" if row["bound"] else "")
