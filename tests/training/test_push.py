"""Runs reach the Hub through the real client, and stay whole where they do not."""

import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_gem.training import push
from hf_gem.training.errors import Interrupted
from hf_gem.training.signals import catch_signals
from tests.helpers import ROOT, VISION, finish, run_python, start
from tests.hub_server import serve

PUSHING = ROOT / "tests" / "pushing.py"
TOKEN = "hf_" + "x" * 34
FLAGS = ("--steps=4", "--warmup_steps=1", "--eval_every=2", "--save_every=2", "--log_every=1", "--report_to=none")
LOAD = """
import hf_gem.training.image_models
from huggingface_hub import HfApi
from transformers import AutoImageProcessor, AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained("me/digits")
AutoImageProcessor.from_pretrained("me/digits")
print(sum(type(m).__name__ == "EGEM" for m in model.modules()), sorted(HfApi().list_repo_files("me/digits")))
"""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serve() as (address, hub):
        monkeypatch.setenv("HF_ENDPOINT", address)
        monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        yield hub


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return f"--cache_dir={tmp_path_factory.mktemp('cache')}"


def train(folder, cache, *flags):
    command = (VISION, cache, *FLAGS, f"--output_dir={folder}", "--push_to_hub=me/digits", *flags)
    return finish(start(*command, recipe=PUSHING))


MINE = ("credentials.json", "other.safetensors", "notes.txt", "gem_mine.py", "chat.jinja", "mine/model.safetensors")


def test_create_push_list_load_and_push_again(hub, tmp_path, cache):
    for name in MINE:  # of the user, in the folder of the run
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_text("mine")
    code, output = train(tmp_path / "run", cache, "--hub_strategy=checkpoint")
    assert code == 0, output
    assert f"pushed: {os.environ['HF_ENDPOINT']}/me/digits/commit/" in output
    assert hub.private == {"me/digits": True}
    files = hub.repos["me/digits"]
    assert {"config.json", "model.safetensors", "README.md", "record.json", "last-checkpoint/COMPLETE"} <= set(files)
    assert not any(name.startswith(("checkpoints/", ".")) for name in files)
    assert not any(content == b"mine" for content in files.values())
    assert all((tmp_path / "run" / name).read_text() == "mine" for name in MINE)
    assert files["model.safetensors"] == (tmp_path / "run" / "model.safetensors").read_bytes()
    assert hub.tokens == {f"Bearer {TOKEN}"}
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)
    assert TOKEN not in output
    card = ModelCard(files["README.md"].decode())
    assert 'from_pretrained("me/digits")' in card.content
    assert card.data.license == "apache-2.0"
    assert card.data.eval_results[0].metric_type == "accuracy"
    assert card.data.model_name == "digits"

    loaded = run_python("-c", LOAD)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.startswith("4 ['README.md'")

    commits = len(hub.commits)
    code, output = train(tmp_path / "run", cache)  # it has finished, and is pushed once more
    assert code == 0, output
    assert hub.commits[commits:] in ([], [("me/digits", "run, finished")])


def test_a_push_that_fails_keeps_everything_and_names_the_command(hub, tmp_path, cache):
    hub.failing = 1
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "credentials.json").write_text("mine")
    code, output = train(tmp_path / "run", cache)
    assert code == 1
    assert "Traceback" not in output
    assert "error: cannot push to 'me/digits': " in output
    assert (tmp_path / "run" / "model.safetensors").exists()
    assert not hub.repos["me/digits"]
    command = shlex.split(re.search(r"To finish the push, run: (.*)", output)[1])
    command[0] = str(Path(sys.executable).parent / command[0])
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    assert {"config.json", "model.safetensors", "README.md"} <= set(hub.repos["me/digits"])
    assert not any(name.startswith(("checkpoints", "credentials")) for name in hub.repos["me/digits"])


def test_a_checkpoint_that_cannot_be_pushed_does_not_stop_training(hub, tmp_path, cache):
    hub.failing = 1
    code, output = train(tmp_path / "run", cache, "--hub_strategy=checkpoint")
    assert code == 0, output
    assert "cannot push step_00000002 to 'me/digits': " in output
    assert "Training continues" in output
    assert "model.safetensors" in hub.repos["me/digits"]


def test_a_signal_ends_the_wait_for_a_push(tmp_path, monkeypatch):
    checkpoint, pushed = tmp_path / "step_00000002", threading.Event()
    checkpoint.mkdir()
    (checkpoint / "state.json").write_text("{}")
    (checkpoint / "COMPLETE").write_text('{"state.json": {"bytes": 2, "sha256": ""}}')
    monkeypatch.setattr(push, "_upload", lambda *_: pushed.wait())
    pusher = push.CheckpointPusher("me/digits", tmp_path, private=True)
    pusher.push(checkpoint)
    with catch_signals():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted, match=r"last checkpoint, which is saved; run the same command"):
            pusher.wait()
        pushed.set()
        pusher._thread.join()
        pusher.wait()  # nothing is left to wait for, so the run counts as finished


def test_a_name_without_a_user(tmp_path, cache):
    code, output = finish(start(cache, *FLAGS, "--push_to_hub=digits", recipe=VISION))
    assert code == 2
    assert "--push_to_hub must be USER/NAME, as on the Hub, got 'digits'" in output
