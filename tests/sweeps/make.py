"""Runs the sweeps: python -m tests.sweeps.make [--only PATTERN ...] [--jobs N] [--limit SECONDS]"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import multiprocessing
import queue
import threading
from pathlib import Path
from typing import Any

from tests.helpers import ROOT


def work(module: str, connection: Any) -> None:
    """A worker: key in, row out, until it is killed."""
    import torch

    torch.set_num_threads(1)
    sweep = importlib.import_module(module).sweep
    while True:
        key = connection.recv()
        try:
            row = sweep(key)
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"}
        connection.send(row)


def run(module: str, keys: list[str], jobs: int, limit: float, done: Any) -> None:
    """Calls `done(key, row)` for every key; one that crashes its worker or takes too long gets a row that says so."""
    waiting: queue.Queue[str] = queue.Queue()
    for key in keys:
        waiting.put(key)
    context = multiprocessing.get_context("spawn")

    def drive() -> None:
        process: Any = None
        while True:
            try:
                key = waiting.get_nowait()
            except queue.Empty:
                break
            if process is None:
                ours, theirs = context.Pipe()
                process = context.Process(target=work, args=(module, theirs), daemon=True)
                process.start()
                theirs.close()
            ours.send(key)
            try:
                row = ours.recv() if ours.poll(limit) else {"error": f"took longer than {limit:g} s"}
            except EOFError:
                row = {"error": "the process died"}
            if "error" in row:
                process.kill()
                process = None
            done(key, row)
        if process is not None:
            process.kill()

    threads = [threading.Thread(target=drive) for _ in range(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", choices=("transformers", "timm"), required=True)
    parser.add_argument("--only", nargs="*", default=["*"])
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--limit", type=float, default=180)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    module = f"tests.sweeps.{args.library}_models"
    listed = importlib.import_module(module)
    keys = listed.model_types() if args.library == "transformers" else listed.modules()
    keys = [key for key in keys if any(fnmatch.fnmatch(key, pattern) for pattern in args.only)]
    with open(args.out or ROOT / f"{args.library}.jsonl", "w") as out:

        def done(key: str, row: dict[str, Any]) -> None:
            print(json.dumps({"key": key, **row}), file=out, flush=True)

        run(module, keys, args.jobs, args.limit, done)


if __name__ == "__main__":
    main()
