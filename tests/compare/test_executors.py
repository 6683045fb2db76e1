"""A run in this process is that of a process of its own, and leaves this one as it was."""

import importlib.util
import json
import logging
import os
import random
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState

from hf_gem.compare.driver import Driver
from hf_gem.compare.executors import IMPORTED, InProcess
from hf_gem.compare.plan import Plan
from hf_gem.compare.study import Study, freeze
from hf_gem.training.checkpoint import CheckpointStore
from hf_gem.training.errors import Interrupted
from recipes import compare as compare_recipe
from tests.helpers import GPT2, ROOT, TINY, VISION, finish, losses, start, write_corpus

matplotlib = pytest.importorskip("matplotlib", reason="its backend is one of the things set back")

DIGITS = ("--steps=4", "--eval_every=2", "--save_every=2", "--warmup_steps=2", "--log_every=1", "--report_to=none")


def test_what_processes_import_beforehand_is_there():
    """It is only faster so: a name that is wrong would not be noticed."""
    assert [name for name in IMPORTED if importlib.util.find_spec(name) is None] == []


@pytest.fixture
def here(tmp_path):
    """Runs the text of a script in this process; returns its status and what it printed."""

    def run(script, **env):
        (tmp_path / "script.py").write_text(script)
        ended = InProcess().start([str(tmp_path / "script.py"), "--flag=1"], tmp_path / "log.txt", env)
        return ended.exitcode, (tmp_path / "log.txt").read_text()

    return run


@pytest.mark.parametrize(
    ("end", "status", "printed"),
    [
        ("", 0, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit(143)", 143, ""),
        ("sys.exit('out of memory')", 1, "out of memory"),
        ("1 / 0", 1, "ZeroDivisionError"),
    ],
)
def test_the_end_of_a_script_is_its_status(here, end, status, printed):
    code, output = here(f"import sys; print(sys.argv[1:], __name__)\n{end}")
    assert code == status
    assert output.startswith("['--flag=1'] __main__\n")
    assert printed in output


def test_an_interrupt_that_nobody_caught_is_not_swallowed(here):
    with pytest.raises(KeyboardInterrupt):
        here("raise KeyboardInterrupt")


def test_all_that_is_written_goes_to_the_log(here, capfd):
    logger = logging.getLogger("of_a_recipe")
    script = """
import logging, os, subprocess, sys
logging.getLogger("of_a_recipe").addHandler(logging.StreamHandler())
for number, text in enumerate(["one", "two"], 1):
    os.write(number, text.encode())
subprocess.run(["echo", "three"])
print("four", file=sys.stderr)
logging.getLogger("of_a_recipe").error("five")
print(os.environ["COLOUR"], end="")
"""
    print("before", end="")
    assert here(script, COLOUR="six") == (0, "onetwothree\nfour\nfive\nsix")
    print("after", end="")
    logger.error("later")  # to the stream of its handler, which is still open
    logger.handlers.clear()
    assert capfd.readouterr() == ("beforeafter", "later\n")


def test_what_a_script_changes_is_set_back(here, monkeypatch):
    script = """
import logging, os, random, sys
import matplotlib, numpy as np, torch
from accelerate import Accelerator
Accelerator(cpu=True, mixed_precision="bf16")
sys.argv, sys.path[:] = ["another"], []
os.environ["ADDED"] = "1"
os.environ["CHANGED"] = "2"
del os.environ["REMOVED"]
os.chdir("/")
torch.set_default_dtype(torch.float64)
torch.use_deterministic_algorithms(True)
torch.set_float32_matmul_precision("medium")
torch.set_num_threads(3)
torch.manual_seed(7), random.seed(7), np.random.seed(7)
logging.getLogger("accelerate.utils.other").setLevel(logging.CRITICAL)
matplotlib.use("svg")
"""
    monkeypatch.setenv("CHANGED", "1")
    monkeypatch.setenv("REMOVED", "1")
    monkeypatch.delenv("ADDED", raising=False)

    def state():
        return (
            *(list(sys.argv), list(sys.path), dict(os.environ), Path.cwd(), matplotlib.get_backend()),
            *(torch.get_default_dtype(), torch.get_num_threads(), torch.get_float32_matmul_precision()),
            *(torch.are_deterministic_algorithms_enabled(), logging.getLogger("accelerate.utils.other").level),
            *(torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())),
            *(dict(AcceleratorState._shared_state), sys.stdout, sys.modules["__main__"]),
        )

    before = state()
    assert here(script) == (0, "")
    assert state() == before


def test_the_compiler_does_not_give_up_after_some_runs(here):
    """It compiles one function, such as the forward of a class, eight times in a process, and then leaves it."""
    script = """
import os
import torch
graphs = []
def backend(graph, inputs):
    graphs.append(graph)
    return graph.forward
model = torch.nn.Linear(2, int(os.environ["WIDTH"]))
torch.compile(model, backend=backend)(torch.ones(2))
print(len(graphs))
"""
    assert [here(script, WIDTH=str(width)) for width in range(1, 11)] == [(0, "1\n")] * 10


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    corpus = write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")
    return f"--dataset={corpus}", f"--cache_dir={corpus.parent}"


def outcome(folder):
    """All that a run leaves but what differs from one to the next: names, dates, times."""
    record = json.loads((folder / "record.json").read_text())
    (session,) = record.pop("sessions")
    for key in ("run_id", "config"):
        del record[key]
    for key in ("units_per_second", "data_wait"):
        del record["result"][key]
    kept = {key: session[key] for key in ("commit", "versions", "hardware", "first_step", "last_step")}
    weights = (folder / "model.safetensors").read_bytes()
    return record, kept, weights, losses(folder), losses(folder, "validation_loss")


def test_a_run_here_is_bit_for_bit_that_of_a_process_of_its_own(text, tmp_path):
    cache = f"--cache_dir={tmp_path}"
    gpt2 = [GPT2, *TINY, *text, "--dropout=0.1", "--hidden_act=gem_n2"]
    commands = {
        "gpt2": gpt2,
        "vision": [VISION, *DIGITS, cache, "--hidden_act=egem"],
        "deterministic": [VISION, *DIGITS, cache, "--model=resnet8-cifar", "--deterministic=yes"],
        "again": gpt2,
    }
    executor = InProcess()
    for name, command in commands.items():
        arguments = [*map(str, command), f"--output_dir={tmp_path / name}"]
        assert executor.start(arguments, tmp_path / f"{name}.txt", {}).exitcode == 0, name
    assert outcome(tmp_path / "gpt2") == outcome(tmp_path / "again")
    del commands["again"]
    for name, (recipe, *flags) in commands.items():
        code, output = finish(start(*flags, f"--output_dir={tmp_path / 'own' / name}", recipe=recipe))
        assert code == 0, output
        assert outcome(tmp_path / name) == outcome(tmp_path / "own" / name), name


@pytest.fixture(scope="module")
def plan(text):
    flags = dict(flag[2:].split("=") for flag in (*TINY, *text) if not flag.startswith("--learning_rate"))
    return Plan(
        **{"name": "tiny", "recipe": "gpt2_pretrain", "preset": "demo", "flags": flags},
        **{"arms": {"relu": ["relu"], "gem_n2": ["gem_n2"]}, "baseline": "relu", "metric": "validation_loss"},
        **{"smallest_effect": 0.005, "learning_rates": [0.01], "tuning_seeds": [], "final_seeds": [0, 1]},
    )


@pytest.fixture(scope="module")
def whole(plan, tmp_path_factory):
    """A study that ran here, by its command."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "plan.py").write_text(f"from hf_gem.compare.plan import Plan\nplan = Plan(**{plan.__dict__})\n")
    compare_recipe.main([f"--plan={folder / 'plan.py'}", f"--study={folder / 'study'}", "--jobs=0"])
    return Study(folder / "study")


def test_a_study_runs_here_from_plan_to_report(whole):
    assert len(whole.outcomes()["gem_n2"]) == 2
    assert len(list((whole.folder / "runs").glob("*.txt"))) == 4
    assert (whole.folder / "report.html").exists()


def test_a_signal_stops_a_run_here_when_it_has_saved_and_it_goes_on(plan, whole, tmp_path, monkeypatch, capfd):
    save, sent = CheckpointStore.save, []

    def save_and_stop(self, accelerator, step, *more):
        path = save(self, accelerator, step, *more)
        if step == 4 and "gem_n2" in str(path) and not sent:
            sent.append(path)
            signal.raise_signal(signal.SIGINT)
        return path

    monkeypatch.setattr(CheckpointStore, "save", save_and_stop)
    handler = signal.getsignal(signal.SIGINT)
    freeze(plan, tmp_path)
    study = Study(tmp_path)
    with pytest.raises(Interrupted) as error:
        Driver(study, ROOT / "recipes", jobs=0).run()
    assert error.value.exit_code == 128 + signal.SIGINT
    assert "press Ctrl-C again" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is handler
    assert study.num_records() == 1
    log = (tmp_path / "runs" / "gem_n2-lr0.01-seed0.txt").read_text()
    assert "stopped and saved at step 4 of 6; run the same command again to continue" in log
    Driver(study, ROOT / "recipes", jobs=0).run()
    assert study.outcomes() == whole.outcomes()


def test_fewer_jobs_than_none_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        compare_recipe.main([f"--plan={tmp_path / 'plan.py'}", "--jobs=-1"])
    assert "--jobs must be at least 0, got -1" in capsys.readouterr().err
