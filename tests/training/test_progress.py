"""What a terminal or a log shows of a run."""

import io
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from hf_gem.training import progress
from hf_gem.training.progress import Progress, bar_width, headline, time_left
from tests.terminal import terminal
from tests.training.test_loop import run

MAIN, OTHER = SimpleNamespace(is_main_process=True), SimpleNamespace(is_main_process=False)
TIME = r"\d\d:\d\d:\d\d"


def test_a_bar_needs_a_terminal_that_has_columns(monkeypatch):
    for columns, width in ((0, 0), (80, 80), (500, 120)):
        with terminal(columns):
            assert bar_width() == width
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert bar_width() == 0
    monkeypatch.setattr(sys, "stderr", None)
    assert bar_width() == 0


def take_steps(accelerator, steps=(1, 2, 3)):
    with (shown := Progress(accelerator, 0, 10)).bar:
        for step in steps:
            shown.show(step, {"loss": f"{step}.5"})
            shown.advance()
            shown.bar.refresh()


def test_a_terminal_has_a_bar(capsys):
    with terminal(100) as read:
        take_steps(MAIN)
        shown = read()
        assert re.search(r"Training: +30%\|.*\| 3/10 \[.*loss=3\.5\]", shown)
        take_steps(OTHER)
        assert read() == shown
    assert capsys.readouterr().out == ""


def test_a_log_has_lines_with_the_remaining_time(capsys, monkeypatch):
    now = iter([100.0, 110.0, 130.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with terminal(0) as read:  # as inside `script`
        take_steps(MAIN)
        take_steps(OTHER)
        assert read() == ""
    first, second, third = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"{TIME} step 1 of 10: loss 1\.5", first)  # a step that may have compiled tells nothing
    assert re.fullmatch(rf"{TIME} step 2 of 10: loss 2\.5, 01:20 left", second)
    assert re.fullmatch(rf"{TIME} step 3 of 10: loss 3\.5, 01:45 left", third)


def test_the_remaining_time_is_measured_anew_after_going_back(capsys, monkeypatch):
    now = iter([0.0, 10.0, 500.0, 520.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    with terminal(0), (shown := Progress(MAIN, 0, 10)).bar:
        for step in (1, 5):
            shown.show(step, {})
        shown.go_back(2)
        for step in (3, 5):
            shown.show(step, {})
    lines = capsys.readouterr().out.splitlines()
    assert "left" not in lines[2]
    assert lines[3].endswith(": 00:50 left")
    assert time_left(10.0, 0, 5) == "unknown time left"


RECORD = {
    "recipe": "gpt2_pretrain",
    "preset": "demo",
    "mixed_precision": "no",
    "num_parameters": 1334016,
    "config": {"hidden_act": "gem_n2", "steps": 400},
}
SESSION = {
    "num_processes": 1,
    "versions": {"python": "3.12.3", "torch": "2.11.0", "transformers": "5.17.0"},
    "hardware": {"cpu": "AMD EPYC", "torch_threads": 2, "gpus": [], "cuda": None},
}


@pytest.mark.parametrize(
    ("cuda", "device"),
    [(None, "2 CPU threads of AMD EPYC"),
     ("12.8", "2 CPU threads of AMD EPYC, no GPU found by a torch that is built for CUDA")],
)  # fmt: skip
def test_one_line_says_what_a_run_is(monkeypatch, cuda, device):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    line = headline(RECORD, SESSION, torch.device("cpu"), 200)
    assert re.fullmatch(
        rf"\d{{4}}-\d\d-\d\d {TIME} \S* gpt2_pretrain demo: gem_n2, 1,334,016 parameters, float32, steps 201 to 400; "
        rf"{device}; torch 2\.11\.0, transformers 5\.17\.0",
        line,
    )


def test_one_line_says_on_which_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    session = {**SESSION, "num_processes": 8, "hardware": {**SESSION["hardware"], "cuda": "12.8"}}
    line = headline({**RECORD, "mixed_precision": "bf16"}, session, torch.device("cuda", 0), 0)
    assert ", bf16, steps 1 to 400; 8 processes, each on NVIDIA H100 with CUDA 12.8; torch" in line


def test_the_log_of_a_run_begins_with_that_line(tmp_path, capsys):
    run(tmp_path, steps=4, save_every=2)
    first, *others = capsys.readouterr().out.splitlines()[-8:]
    assert "test tiny: gem_n2, 25 parameters, float32, steps 1 to 4; " in first
    assert [re.sub(rf"^{TIME} ", "", line).partition(":")[0] for line in others] == [
        "step 0", "step 1 of 4", "step 2 of 4", "step 3 of 4", "step 3", "step 4 of 4", "step 4"
    ]  # fmt: skip
