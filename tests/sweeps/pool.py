"""Calls a function of a module for many keys, each in a process that can be killed."""

from __future__ import annotations

import importlib
import multiprocessing
import queue
import threading
from collections.abc import Callable
from typing import Any


def work(module: str, connection: Any) -> None:
    """A worker: says that it is ready; then key in, row out, until it is killed."""
    sweep = importlib.import_module(module).sweep
    connection.send(None)
    while True:
        key = connection.recv()
        try:
            row = sweep(key)
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"}
        connection.send(row)


def run(module: str, keys: list[str], jobs: int, limit: float, done: Callable[[str, dict[str, Any]], Any]) -> None:
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
                ours.recv()
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
