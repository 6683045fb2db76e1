"""Measures the speed of a device and checks its results: python -m benchmarks.device

Measures the clocks under load, the bandwidth of a copy and the speed of a matrix product, for comparison with all other
figures. Then runs the tests that need a GPU, those of the kernels and those that count values on a device.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import Goal, make_parser, pick_device, time_together, write
from benchmarks.processes import run_for
from hf_gem.training.throughput import peak_flops

SUITES: dict[str, tuple[str, ...]] = {
    "tests that need a GPU": ("-m", "gpu", "tests"),
    "kernels": ("-m", "not gpu and not slow", "tests/kernels/test_gpu.py", "tests/test_fit.py"),
}
QUICK_SUITES: dict[str, tuple[str, ...]] = {"kernels": ("-k", "autograd or auto_keeps", "tests/kernels/test_gpu.py")}
_CLOCKS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit", "temperature.gpu")
_MOST_PROCESSES = 8  # each has its own context on the device


def clocks() -> dict[str, str]:
    """Returns what nvidia-smi reports about the first GPU, by field; empty without nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_CLOCKS)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(_CLOCKS, map(str.strip, done.stdout.split(",")), strict=False))


def speeds(device: torch.device, quick: bool) -> dict[str, Any]:
    """Measures a copy in bytes per second, read and written, and a bf16 matrix product in FLOP/s, with the clocks."""
    on_gpu = device.type == "cuda" and not quick
    source = torch.randn(2**29 if on_gpu else 2**16, device=device).bfloat16()
    target = torch.empty_like(source)
    side = 8192 if on_gpu else 64
    matrix = torch.randn(side, side, device=device).bfloat16()
    calls = {"copy": lambda: target.copy_(source), "matmul": lambda: matrix @ matrix}
    seconds = time_together(calls, device, rounds=15 if on_gpu else 3).medians()
    if on_gpu:
        for _ in range(1000):  # a second of queued work, which runs while the clocks are read
            calls["matmul"]()
    return {
        "copy_bytes_per_second": 2 * source.nbytes / seconds["copy"],
        "matmul_flops_per_second": 2 * side**3 / seconds["matmul"],
        "peak_flops_per_second": peak_flops(device),
        "clocks": clocks() if device.type == "cuda" else {},
    }


def run_suite(arguments: tuple[str, ...], device: torch.device, seconds: float) -> dict[str, Any]:
    """Runs pytest in separate processes, and returns its counts and what failed or was skipped.

    Args:
        arguments: Arguments of pytest.
        device: The device of the tests. For a CPU, GPUs are hidden.
        seconds: Time limit.
    """
    here = {"CUDA_VISIBLE_DEVICES": ""} if device.type == "cpu" else {}
    processes = min(_MOST_PROCESSES, (os.cpu_count() or 1) // 2)
    # Without the options of pyproject.toml, which require plugins that may not be installed.
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", *arguments]
    if processes > 1 and importlib.util.find_spec("xdist"):
        command += ["-n", str(processes)]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        command += ["--continue-on-collection-errors", f"--junitxml={report}"]
        ended = run_for(seconds, command, here)  # in the process group of the stage, so that both stop together
        found = outcomes(report) if report.exists() else {"tests": 0, "failures": {}, "skipped": {}, "seconds": seconds}
    return {"status": 124 if ended.stopped else ended.status, **found}


def outcomes(report: Path) -> dict[str, Any]:
    """Reads a JUnit file: counts, failures with the message of each test, and the number of skipped tests by reason."""
    failures: dict[str, str] = {}
    skipped: dict[str, int] = {}
    cases = list(ET.parse(report).getroot().iter("testcase"))
    for case in cases:
        name = f"{case.get('classname')}.{case.get('name')}".removeprefix(".")
        for child in case:
            message = child.get("message") or ""
            if child.tag in ("failure", "error"):
                failures[name] = " ".join(message.split())[:400]
            elif child.tag == "skipped":
                skipped[message] = skipped.get(message, 0) + 1
    seconds = sum(float(suite.get("time", 0)) for suite in ET.parse(report).getroot().iter("testsuite"))
    return {"tests": len(cases), "failures": failures, "skipped": skipped, "seconds": seconds}


def run(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[Goal], list[str]]:
    device = pick_device(arguments.device)
    results = speeds(device, arguments.quick)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # for the tests
    chosen = QUICK_SUITES if arguments.quick else SUITES
    each = 60 * arguments.minutes / len(chosen)
    suites = {name: run_suite(command, device, each) for name, command in chosen.items()}
    # Status 5 means that no test was found, which is a failure here too.
    goals = [Goal(f"{name}: failed", len(s["failures"]) or int(s["status"] != 0), 0) for name, s in suites.items()]
    return {**results, "suites": suites}, goals, []


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__, rounds=1)
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all tests (default: 8)")
    arguments = parser.parse_args(argv)
    write("device", arguments, argv, *run(arguments))


if __name__ == "__main__":
    main()
