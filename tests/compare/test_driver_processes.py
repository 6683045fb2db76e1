"""A driver whose runs are processes of their own, which signals and kills hit at any moment."""

import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hf_gem.compare.report import write_report
from tests.compare.toy import TWO_ARMS, run, started, until

# Runs a study as recipes/compare.py does.
DRIVER = """
import sys
from pathlib import Path
from hf_gem.compare import driver, executors
from hf_gem.compare.study import Study
from hf_gem.training.errors import Interrupted
executors.IMPORTED = ("hf_gem.compare.driver",)  # all that the toy needs
folder = Path(sys.argv[1])
try:
    driver.Driver(Study(folder), folder.parent / "recipes", 2).run()
except Interrupted as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""
# Runs studies whose folders it is told, each again and again until it is done, and says what it is at.
INTERRUPTED = """
import signal, sys
from pathlib import Path
from hf_gem.compare import driver, executors
from hf_gem.compare.study import Study
from hf_gem.training.errors import Interrupted
executors.IMPORTED = ("hf_gem.compare.driver",)  # all that the toy needs
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda *_: None)  # one that comes between two attempts
for line in sys.stdin:
    folder = Path(line.strip())
    while True:
        print("start", flush=True)
        try:
            driver.Driver(Study(folder), folder.parent / "recipes", 2).run()
        except Interrupted as error:
            print("stopped", error.exit_code, flush=True)
        else:
            print("done", flush=True)
            break
"""


@pytest.mark.slow  # in the normal suite, the test of interrupts at any moment sends both
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_study_and_it_goes_on(study, number):
    toy = study(flags={"slow": 1}, **TWO_ARMS)
    command = [sys.executable, "-c", DRIVER, str(toy.folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    until(lambda: process.poll() is not None or len(pids(toy)) == 2)
    os.killpg(process.pid, number)  # as a terminal does
    _, output = process.communicate(timeout=180)
    assert process.returncode == 128 + number, output
    assert "stopped; run the same command again to continue" in output
    assert len(started(toy)) == 2
    assert not any(map(is_running, pids(toy)))
    (toy.folder / "fast").touch()
    run(toy)
    assert len(toy.outcomes()["gem"]) == 8


def test_an_interrupt_during_the_imports_takes_one_line(study, tmp_path):
    toy = study(flags={"slow": 1}, **TWO_ARMS)
    (tmp_path / "dawdle.py").write_text(
        f"import pathlib, time\npathlib.Path({str(tmp_path / 'begun')!r}).touch()\ntime.sleep(3)\n"
    )
    code = DRIVER.replace('("hf_gem.compare.driver",)', '("dawdle",)')
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-c", code, str(toy.folder)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True, env=env)
    until(lambda: process.poll() is not None or (tmp_path / "begun").exists())
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, output = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGINT, output
    assert "stopped; run the same command again to continue" in output
    assert "Traceback" not in output


@pytest.mark.slow
def test_runs_stop_when_their_study_is_killed(study):
    toy = study(flags={"slow": 1}, **TWO_ARMS)
    process = subprocess.Popen([sys.executable, "-c", DRIVER, str(toy.folder)])
    until(lambda: process.poll() is not None or len(pids(toy)) == 2)
    process.kill()
    process.wait()
    until(lambda: not any(map(is_running, pids(toy))))
    (toy.folder / "fast").touch()
    run(toy)  # with nobody left in the folders
    assert len(toy.outcomes()["gem"]) == 8


def pids(study):
    """Of the runs that have begun."""
    return [int(text) for path in study.folder.glob("runs/*/pid") if (text := path.read_text())]


def is_running(pid):
    """Whether there is such a process that has not ended."""
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


@pytest.fixture
def busy_core():
    """A process that does nothing, and does it all the time."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("interrupts", "seed"), [(3, 0), pytest.param(20, 1, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_a_study_that_is_interrupted_at_any_moment_stops_and_goes_on_to_the_same_report(
    study, busy_core, interrupts, seed
):
    draw = random.Random(seed)
    small = {"learning_rates": [0.01, 0.02], "tuning_seeds": [100], "final_seeds": [0, 1]}
    whole = study("whole", **small)
    run(whole)
    write_report(whole)
    command = [sys.executable, "-c", INTERRUPTED]
    streams = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, **streams, text=True, bufsize=1, start_new_session=True)
    lines = queue.Queue()
    events = {"start", "stopped", "done"}  # the other lines are the log of the study
    reader = threading.Thread(
        target=lambda: [lines.put(words) for line in process.stdout if (words := line.split() or [""])[0] in events],
        daemon=True,
    )
    reader.start()
    studies, sent, stopped, number = [], 0, 0, 0

    def next_study():
        studies.append(study(f"study{len(studies)}", **small))
        process.stdin.write(f"{studies[-1].folder}\n")

    try:
        next_study()
        while True:
            event, *status = lines.get(timeout=180)  # or it hangs
            stopped += event == "stopped"
            assert not status or int(status[0]) == 128 + number
            if event == "done":
                if sent == interrupts:
                    break
                next_study()
            elif event == "start" and sent < interrupts:
                enough = min(studies[-1].num_records() + draw.randrange(4), whole.num_records() - 1)
                until(lambda enough=enough: studies[-1].num_records() >= enough)
                time.sleep(draw.uniform(0, 0.2))
                number = draw.choice([signal.SIGINT, signal.SIGTERM])
                # As a terminal does, and `timeout`; or to this process alone.
                send = os.killpg if number == signal.SIGINT or draw.random() < 0.5 else os.kill
                send(process.pid, number)
                sent += 1
        process.stdin.close()
        assert process.wait(timeout=180) == 0
    finally:
        process.kill()
        process.wait()
    assert stopped  # others may have come when all was done
    for each in studies:
        assert {path.stem for path in each.folder.glob("runs/*.txt")} == set(started(each))  # a log for each
        assert process.pid not in pids(each)
        write_report(each)
        assert (each.folder / "report.md").read_bytes() == (whole.folder / "report.md").read_bytes()
