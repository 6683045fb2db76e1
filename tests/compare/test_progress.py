"""What a terminal or a log shows of a study."""

import json
import re

import pytest

from hf_gem.compare import progress
from hf_gem.compare.plan import Run
from hf_gem.compare.progress import StudyProgress
from tests.compare.toy import TWO_ARMS, run
from tests.terminal import terminal
from tests.training.test_report import RECORD

TIME = r"\d\d:\d\d:\d\d"
FIRST, SECOND = (Run(act, 0.01, 0) for act in ("relu", "gem"))


def test_a_log_has_a_line_for_every_run(study, capsys):
    toy = study(**TWO_ARMS, final_seeds=[0, 1])
    with terminal(0):  # as inside `script`
        run(toy)
    lines = [re.sub(rf"^{TIME} toy: ", "", line) for line in capsys.readouterr().out.splitlines()]
    assert [re.sub(r"\d\d:\d\d", "*", line) for line in lines] == [
        "relu-lr0.01-seed0 begins", "1 of 4 runs done, * left",
        "gem-lr0.01-seed0 begins", "2 of 4 runs done, * left",
        "relu-lr0.01-seed1 begins", "3 of 4 runs done, * left",
        "gem-lr0.01-seed1 begins", "4 of 4 runs done, * left",
    ]  # fmt: skip


def test_a_bar_names_the_runs_and_leaves_out_what_was_there(study, capsys):
    toy = study(**TWO_ARMS)
    run(toy)
    (toy.folder / "records" / "gem-lr0.01-seed7.json").unlink()
    capsys.readouterr()
    with terminal(120) as read:
        run(toy)
        first, *_, last = filter(None, re.split(r"[\r\n]+", read()))
    assert re.search(r"toy 94%\|.*\| 15\.0 of 16 runs", first)
    assert re.search(r"toy 100%\|.*\| 16\.0 of 16 runs, 00:00 left", last)
    assert capsys.readouterr().out == ""


def test_a_bar_moves_within_a_run(study, monkeypatch):
    monkeypatch.setattr(progress, "_EVERY", -1.0)
    toy = study(**TWO_ARMS, final_seeds=[0, 1])
    folders = [toy.folder / "runs" / each.name for each in (FIRST, SECOND)]

    with terminal(120) as read, (shown := StudyProgress(toy)).bar:

        def last():
            shown.look()
            return read().split("\r")[-1]

        shown.start(FIRST)
        assert "0.0 of 4 runs" in last()
        assert "? left, relu-lr0.01-seed0" in last()
        for folder, step in zip(folders, (100, 50), strict=True):
            folder.mkdir(parents=True)
            session = {**RECORD["sessions"][0], "hardware": {"cpu": "", "gpus": [], "torch_threads": 1}}
            record = {**RECORD, "status": "running", "sessions": [session], "config": {"steps": 200}}
            (folder / "record.json").write_text(json.dumps(record))
            entries = [{"step": number, "loss": 1 / number} for number in range(1, step + 1)]
            (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"st')
        assert "0.5 of 4 runs" in last()
        shown.start(SECOND)
        assert re.search(r"0\.8 of 4 runs, \d\d:\d\d left, relu-lr0\.01-seed0 and 1 more$", last())
        shown.leave(FIRST)
        assert "0.2 of 4 runs" in last()
        (folders[1] / "log.jsonl").write_text('{"step":400}\n')
        assert "1.0 of 4 runs" in last()


@pytest.mark.parametrize("content", [None, "", "not JSON", "{}"])
def test_a_run_that_has_said_nothing_yet_counts_nothing(study, content):
    toy = study(**TWO_ARMS, final_seeds=[0, 1])
    folder = toy.folder / "runs" / FIRST.name
    if content is not None:
        folder.mkdir(parents=True)
        for name in ("record.json", "log.jsonl"):
            (folder / name).write_text(content)
    with terminal(120) as read, (shown := StudyProgress(toy)).bar:
        shown.start(FIRST)
        assert "0.0 of 4 runs" in read()
