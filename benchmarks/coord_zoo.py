"""The coordinate check's examination: twenty default checks of every bug and correct variant.

    python benchmarks/coord_zoo.py

Thresholds are `Thresholds()`, as committed. Every check has its own seeds: check n draws the
models and batches 3n, 3n + 1, 3n + 2. One line per finished check goes to `checks.jsonl`; start
again to go on. At the end, or with `--checks 0` of what there is so far, the two confusion
matrices are written: by slopes alone, and by slopes and symbols together.

Left in `benchmarks/results/coord_zoo/`: `checks.jsonl`, `measured.csv`, `both.csv`, `README.md`.
"""

from __future__ import annotations

import argparse
import csv
import importlib
import json
import multiprocessing
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")  # before torch, in every process

import torch
from machine import processor

from mutransfer.coord_check import Thresholds
from mutransfer.coord_text import culprits
from mutransfer.files import atomic_path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
zoo: Any = importlib.import_module("coord_zoo")

RESULTS = Path(__file__).parent / "results" / "coord_zoo"
VERDICTS = ("PASS", "WARN", "FAIL")
CORRECT = "correct: "


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checks", type=int, default=20, help="checks per bug and variant")
    parser.add_argument("--only", action="append", default=[], metavar="NAME",
                        help="a bug, or 'correct: <variant>'; may be repeated")  # fmt: skip
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if unknown := sorted(set(args.only) - set(_names())):
        parser.error(f"no such entry: {', '.join(unknown)}; there are: {'; '.join(_names())}")
    args.out.mkdir(parents=True, exist_ok=True)
    log = args.out / "checks.jsonl"
    done = {(record["name"], record["number"]) for record in _read(log)}
    jobs = [
        (name, number)
        for number in range(args.checks)
        for name in (args.only or _names())
        if (name, number) not in done
    ]
    context = multiprocessing.get_context("spawn")
    if jobs:
        with context.Pool(args.workers) as pool, log.open("a") as file:
            for count, record in enumerate(pool.imap_unordered(run, jobs), 1):
                file.write(json.dumps(record) + "\n")
                file.flush()
                print(f"{count}/{len(jobs)} {record['name']} #{record['number']}: measured "
                      f"{record['measured']}, both {record['both']}", flush=True)  # fmt: skip
    report(args.out, _read(log))


def _names() -> list[str]:
    return [bug.name for bug in zoo.ZOO] + [CORRECT + variant.name for variant in zoo.CORRECT]


def run(job: tuple[str, int]) -> dict[str, Any]:
    """One check, as the record that is kept of it."""
    name, number = job
    torch.set_num_threads(1)
    started = time.monotonic()
    if name.startswith(CORRECT):
        variant = next(v for v in zoo.CORRECT if CORRECT + v.name == name)
        result = zoo.check(variant, run=zoo.DEFAULT, number=number)
    else:
        bug = zoo.bug(name)
        result = zoo.check(bug.variant, bug.inject, run=zoo.DEFAULT, number=number)
    return {
        "name": name,
        "number": number,
        "measured": result.measured_verdict,
        "both": result.verdict,
        "first_measured": next(iter(culprits(result.quantities, ())), ""),
        "first": next(iter(result.culprits), ""),
        "off": [
            {"kind": q.kind, "name": q.name, "t": q.t, "slope": q.slope, "verdict": q.verdict}
            for q in result.quantities
            if q.verdict != "PASS"
        ],
        "symbolic": len(result.symbolic),
        "seconds": round(time.monotonic() - started, 1),
    }


def report(folder: Path, records: list[dict[str, Any]]) -> None:
    """Writes both matrices and the page that shows them."""
    tables = {key: matrix(records, key) for key in ("measured", "both")}
    for key, rows in tables.items():
        with atomic_path(folder / f"{key}.csv") as path, path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["name", "should", *VERDICTS, "right", "checks"])
            writer.writerows(rows)
    with atomic_path(folder / "README.md") as path:
        path.write_text("\n".join(_page(tables, records)) + "\n")


def matrix(records: Iterable[dict[str, Any]], key: str) -> list[tuple[Any, ...]]:
    """Rows (name, what it should be, counts per verdict, how many are right, how many there are).

    A bug should FAIL where this check is meant to see it. A correct variant must not, and a bug
    that this check cannot see (its reason is in the zoo) will not.
    """
    counts: dict[str, Counter[str]] = {}
    for record in records:
        counts.setdefault(record["name"], Counter())[record[key]] += 1
    rows = []
    for name in _names():
        if name not in counts:
            continue
        found, total = counts[name], counts[name].total()
        caught = "nothing" if name.startswith(CORRECT) else zoo.bug(name).caught
        must = caught == "measured" or (caught == "symbolic" and key == "both")
        right = found["FAIL"] if must else total - found["FAIL"]
        should = "FAIL" if must else "not FAIL" if caught == "nothing" else "cannot be seen here"
        rows.append((name, should, *(found[verdict] for verdict in VERDICTS), right, total))
    return rows


def _page(tables: dict[str, list[tuple[Any, ...]]], records: list[dict[str, Any]]) -> list[str]:
    size, seconds = zoo.DEFAULT, sum(record["seconds"] for record in records)
    lines = [
        "# Examination of the coordinate check",
        "",
        f"`python benchmarks/coord_zoo.py`: {len(records)} checks of {len(size.widths)} widths "
        f"({', '.join(map(str, size.widths))}; depths {', '.join(map(str, size.depths))}) x "
        f"{size.seeds} seeds x {size.steps} steps, no seed used twice for one entry, "
        f"{seconds / max(1, len(records)):.1f} s per check on one thread.",
        f"Python {platform.python_version()}, torch {torch.__version__}, {platform.machine()}, "
        f"{os.cpu_count()} cores, {processor()}.",
        "",
        f"Thresholds: `{Thresholds()}`",
    ]
    notes = RESULTS / "notes.md"
    lines += ["", notes.read_text().strip()] if notes.exists() else []
    titles = {"measured": "Measured only", "both": "Measured and symbolic"}
    for key, rows in tables.items():
        lines += ["", f"## {titles[key]}", "", "| | should | PASS | WARN | FAIL | right |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        for name, should, *counts, right, total in rows:
            cells = [name, should, *map(str, counts), f"{right}/{total}"]
            lines.append(f"| {' | '.join(cells)} |")
    blind = [bug for bug in zoo.ZOO if bug.caught != "measured"]
    lines += ["", "## What slopes cannot see", "", "| | caught by | because |", "|---|---|---|"]
    lines += [f"| {bug.name} | {bug.caught} | {bug.reason} |" for bug in blind]
    lines += ["", "## What is said first, and which quantities FAIL at which t (check 0)", ""]
    for record in sorted(records, key=lambda record: _names().index(record["name"])):
        if record["number"] == 0:
            told = record["first_measured"] or record["first"] or "nothing"
            failed = [q for q in record["off"] if q["verdict"] == "FAIL"]
            kinds = dict.fromkeys(f"{q['kind']} t={q['t']}" for q in failed)
            lines.append(
                f"- {record['name']}: {told}" + (f" ({', '.join(kinds)})" if kinds else "")
            )
    return lines


def _read(log: Path) -> list[dict[str, Any]]:
    """Finished checks; the last line may be cut off, and then does not count."""
    if not log.exists():
        return []
    text = log.read_text()
    whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    if sum(map(len, whole)) < len(text):
        with atomic_path(log) as path:
            path.write_text("".join(whole))
    return [json.loads(line) for line in whole]


if __name__ == "__main__":
    main()
