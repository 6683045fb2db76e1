"""Runs the sweeps and writes docs/supported_models.md: python -m tests.sweeps.make --jobs 2

Every model type and module is a row of JSON. They are made in processes that are killed when one takes too long; what
crashes gets a row that says so. All of them take about a quarter of an hour on two cores.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
from pathlib import Path
from typing import Any

from tests.helpers import ROOT
from tests.sweeps.pool import run
from tests.sweeps.table import TABLE, render


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", default=["timm", "transformers"], metavar="timm|transformers")
    parser.add_argument("--only", nargs="+", help="patterns of model types or modules; the other rows stay as they are")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=300, help="seconds for one of them")
    parser.add_argument("--rows", type=Path, default=ROOT / "build" / "sweeps", help="folder of the JSON lines")
    parser.add_argument("--table", action="store_true", help="only write the table from the rows there are")
    args = parser.parse_args()
    args.rows.mkdir(parents=True, exist_ok=True)
    for library in () if args.table else args.libraries:
        make_rows(library, args.rows / f"{library}.jsonl", args.only, args.jobs, args.limit)
    TABLE.write_text(render(*(read_rows(args.rows / f"{library}.jsonl") for library in ("transformers", "timm"))))


def make_rows(library: str, path: Path, only: list[str] | None, jobs: int, limit: float) -> None:
    module = f"tests.sweeps.{library}_models"
    keys = importlib.import_module(module).names()
    rows = read_rows(path) if only else {}
    chosen = [key for key in keys if not only or any(fnmatch.fnmatch(key, pattern) for pattern in only)]

    def done(key: str, row: dict[str, Any]) -> None:
        rows[key] = row
        print(f"{len(rows)}/{len(keys)} {key}: {row.get('outcome') or row['error']}", flush=True)
        path.write_text("".join(json.dumps({"key": key, **rows[key]}) + "\n" for key in sorted(rows)))

    run(module, chosen, jobs, limit, done)


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {row.pop("key"): row for row in map(json.loads, lines)}


if __name__ == "__main__":
    main()
