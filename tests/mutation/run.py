"""Makes small changes to files, one at a time, and runs the tests of each: python -m tests.mutation.run

Prints the changes that no test notices. All tests are collected once. Each change is tried in a fork of that process,
in which the function gets the changed code. The fork runs the tests that execute the changed line, the quickest first,
until one fails. mutmut does not work here: it wraps each function, but TorchScript and the printer of the kernels read
the formulas. cosmic-ray is too slow: it starts Python for each change, and torch takes seconds to start.
"""

import argparse
import contextlib
import functools
import importlib
import inspect
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from types import FunctionType

import coverage
import pytest

from tests.mutation.mutants import Mutant, code_of, mutants

# File -> arguments of pytest for its tests, without simulated studies and other tests that take seconds.
TESTS = {
    "hf_gem/family/names.py": [
        "tests/family/test_names.py",
        "tests/test_properties.py",
        "-k",
        "not element and not time",
    ],
    "hf_gem/family/arithmetic.py": [
        "tests/family/test_arithmetic.py",
        "tests/family/test_formulas.py",
        "-k",
        "not every and not torchscript",
    ],
    "hf_gem/compare/two_way.py": ["tests/compare/test_two_way.py", "-k", "not average"],
    "hf_gem/compare/stats.py": [
        "tests/compare/test_stats.py",
        "-k",
        "not positives and not plain and not edge and not cover",
    ],
}
ROOT = Path(__file__).resolve().parents[2]
LIMIT = 120  # seconds of CPU time, which stops endless loops


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=list(TESTS), help="files of TESTS to change; by default all")
    parser.add_argument("--only", default="", help="only change functions whose name contains this")
    args = parser.parse_args()
    survived = 0
    for file in args.files:
        run = _Run(file, args.only)
        code = pytest.main(["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "not slow", *TESTS[file]], [run])
        if code not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED) or not run.outcomes:
            sys.exit(f"{file}: the tests were not run, pytest ended with {code}")
        survived += run.outcomes["survived"]
    sys.exit(bool(survived))


class _Run:
    """A pytest plugin that tries all mutants of a file instead of running the tests once."""

    def __init__(self, file: str, only: str) -> None:
        self.file, self.only = file, only
        self.module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        self.outcomes: Counter[str] = Counter()

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        by_line, seconds = self._measure(session)
        items = {item.nodeid: item for item in session.items}
        source = (ROOT / self.file).read_text()
        for mutant in mutants(source):
            if self.only in mutant.function:
                names = sorted(by_line.get(mutant.line, ()), key=seconds.__getitem__)
                outcome = self._try(session, mutant, [items[name] for name in names]) if names else "survived"
                self.outcomes[outcome] += 1
                if outcome == "survived":
                    where = f"{self.file}:{mutant.line} {mutant.function}"
                    print(f"\n{where}, {len(names)} tests: {mutant.change}", flush=True)
        print(f"\n{self.file}: " + ", ".join(f"{count} {outcome}" for outcome, count in self.outcomes.items()))
        return True

    def _measure(self, session: pytest.Session) -> tuple[dict[int, list[str]], dict[str, float]]:
        """Runs all tests in a fork. Returns line -> the tests that execute it, and test -> seconds."""
        with tempfile.NamedTemporaryFile() as file:

            def measure() -> bool:
                measured = coverage.Coverage(data_file=None, config_file=False, include=[str(ROOT / self.file)])
                seconds = {}
                measured.start()
                for item in session.items:
                    measured.switch_context(item.nodeid)
                    began = time.process_time()
                    passed = _passes(session, [item])
                    seconds[item.nodeid] = time.process_time() - began
                    assert passed, item.nodeid
                measured.stop()
                lines = measured.get_data().contexts_by_lineno(str(ROOT / self.file))
                found = {line: [name for name in names if name] for line, names in lines.items()}
                Path(file.name).write_text(json.dumps([found, seconds]))
                return True

            if not _in_fork(measure):
                sys.exit(f"{self.file}: its tests fail without a change")
            by_line, seconds = json.loads(Path(file.name).read_text())
        return {int(line): names for line, names in by_line.items()}, seconds

    def _try(self, session: pytest.Session, mutant: Mutant, items: list[pytest.Item]) -> str:
        function = _function(self.module, mutant.function)
        code = code_of(mutant.source, function.__code__.co_filename, mutant.function)

        def passes() -> bool:
            resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT))
            function.__code__ = code
            return _passes(session, items)

        return "survived" if _in_fork(passes) else "killed"


def _passes(session: pytest.Session, items: list[pytest.Item]) -> bool:
    if session.config.pluginmanager.has_plugin("terminalreporter"):
        session.config.pluginmanager.unregister(name="terminalreporter")  # it would still write to the terminal
    for item, following in zip(items, [*items[1:], None], strict=True):
        session.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        if session.testsfailed:
            return False
    return True


def _in_fork(function: object) -> bool:
    """Returns whether a function returns True, in a fork without output."""
    if (process := os.fork()) == 0:
        passed = False
        with contextlib.suppress(BaseException):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            passed = function()
        os._exit(0 if passed else 1)
    return os.waitpid(process, 0)[1] == 0


def _function(module: object, name: str) -> FunctionType:
    found = module
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    found = found.fget if isinstance(found, property) else getattr(found, "__func__", found)
    return inspect.unwrap(found.func if isinstance(found, functools.cached_property) else found)


if __name__ == "__main__":
    main()
