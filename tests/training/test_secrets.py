"""Passwords and tokens that somebody types into flags are in nothing that a run writes or says."""

import sys
from types import SimpleNamespace

import pytest

from hf_gem.training.config import TrainConfig, parse_config
from hf_gem.training.environment import command
from hf_gem.training.errors import DataError, TrainingError
from hf_gem.training.launch import make_accelerator, start_tracker
from hf_gem.training.loop import train
from hf_gem.training.push import PushError, push_run
from hf_gem.training.report import write_card
from hf_gem.training.signals import run_recipe
from tests.training.test_report import MORE
from tests.training.toys import make_task

URL = "https://me:pass-word@host/x?token=to-ken"
SECRETS = ("pass-word", "to-ken", "hf_" + "s" * 34)


def is_clean(text):
    return not any(secret in text for secret in SECRETS)


def test_what_a_run_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", f"--dataset={URL}", f"--project={SECRETS[2]}", f"--license={URL}"])
    settings = TrainConfig(
        output_dir=str(tmp_path / "run"), license=URL, project=SECRETS[2], report_to="none",
        steps=2, warmup_steps=0, global_batch_size=4, micro_batch_size=4, save_every=1,
    )  # fmt: skip
    task = make_task()
    task.identity["tokenizer"] = URL  # a field that decides the result
    record = train(task, settings, make_accelerator(settings))
    record["data"] |= {"num_tokens": {"train": 1, "validation": 1}}
    record["config"] |= {"dataset": "d", "validation_fraction": 0.1, "block_size": 1}
    record["result"] |= {"validation_perplexity": 1.0, "unit": "tokens"}
    write_card(record, tmp_path / "run" / "README.md", **MORE, on_hub=False)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"record.json", "README.md", "state.json"} <= {path.name for path in written}
    assert all(is_clean(path.read_bytes().decode(errors="replace")) for path in written)
    assert "https://***@host/x?token=***" in (tmp_path / "run" / "README.md").read_text()
    captured = capsys.readouterr()
    assert is_clean(captured.out + captured.err)
    again = train(make_task_of(URL), settings, make_accelerator(settings))  # and the run is still the same one
    assert again["run_id"] == record["run_id"]


def make_task_of(tokenizer):
    task = make_task()
    task.identity["tokenizer"] = tokenizer
    return task


def test_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", f"--dataset={URL}", "--x", SECRETS[2]])
    assert command().startswith("python train.py ")
    assert is_clean(command())


@pytest.mark.parametrize("kind", [TrainingError, DataError])
def test_errors_quote_no_secrets(kind):
    assert is_clean(str(kind(f"{URL!r} cannot be read: {SECRETS[2]}")))


def test_errors_of_the_command_line_quote_no_secrets(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(f"steps: {URL}\n")
    for argv in ([f"--steps={URL}"], [f"--config={tmp_path / 'c.yaml'}"], [f"--{URL}"], [f"--resume={URL}"]):
        with pytest.raises(SystemExit):
            parse_config(TrainConfig, {"demo": {}}, "demo", argv)
        error = capsys.readouterr().err
        assert "***" in error
        assert is_clean(error)


def test_an_error_of_a_library_shows_no_secrets(capsys):
    def main():
        try:
            raise OSError(URL)
        except OSError as error:
            raise RuntimeError(f"HTTP 403 for {URL}") from error

    with pytest.raises(SystemExit) as stop:
        run_recipe(main)
    assert stop.value.code == 1
    error = capsys.readouterr().err
    assert "RuntimeError: HTTP 403 for https://***@host" in error
    assert is_clean(error)
    with pytest.raises(RuntimeError, match="another"):  # without one it is as it was
        run_recipe(lambda: (_ for _ in ()).throw(RuntimeError("another")))


def test_a_tracker_gets_no_secrets(tmp_path):
    seen = []
    accelerator = SimpleNamespace(init_trackers=lambda *args, **kwargs: seen.append((args, kwargs)))
    start_tracker(accelerator, TrainConfig(report_to="tensorboard", license=URL), "name")
    assert seen
    assert is_clean(str(seen))


def test_a_push_that_fails_says_no_secrets(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(f"403 for {URL} with {SECRETS[2]}")

    monkeypatch.setattr("hf_gem.training.push.HfApi.create_repo", fail)
    with pytest.raises(PushError) as error:
        push_run("me/x", tmp_path, ["README.md"], private=True)
    assert is_clean(str(error.value))
    assert "--include README.md" in str(error.value)
