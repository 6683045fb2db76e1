"""A signal at any moment of a recipe stops it in code of its own, and the same command goes on."""

import json
import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import Accelerator
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

from hf_gem.training import evaluate as evaluation
from hf_gem.training import launch
from hf_gem.training.checkpoint import CheckpointStore
from hf_gem.training.data import source
from hf_gem.training.data import text as data_text
from hf_gem.training.data.images import Rows
from hf_gem.training.signals import run_recipe
from recipes import gpt2_pretrain, vision_train
from tests.helpers import TINY, losses, run_here, write_corpus

SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])


@pytest.fixture(autouse=True)
def _own_handlers():
    """Those of a Python in a terminal: in the background of a shell SIGINT is ignored."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus") / "corpus.txt")


@pytest.fixture(scope="module")
def flags(corpus):
    return (*TINY, f"--dataset={corpus}", f"--cache_dir={corpus.parent / 'cache'}")


@pytest.fixture(scope="module")
def reference(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    run_here(gpt2_pretrain, folder, *flags)
    return folder


def take_and_release(lock):
    lock.acquire()
    lock.release()


@pytest.fixture
def interrupted(capfd):
    """Runs a recipe as a script that gets a signal, and returns the one line that it prints."""

    def run(recipe, number, *argv):
        with pytest.raises(SystemExit) as stopped:
            run_recipe(lambda: recipe.main(list(argv)))
        assert stopped.value.code == 128 + number
        assert signal.getsignal(number) is (signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        with ThreadPoolExecutor(1) as pool:  # not by this thread, which may take a lock twice
            pool.submit(take_and_release, tqdm.get_lock()).result(120)
        return capfd.readouterr().err.strip().splitlines()[-1]

    return run


def send_at(monkeypatch, owner, name, number, count=1):
    """Sends a signal at the beginning of a call."""
    plain, calls = getattr(owner, name), []

    def patched(*args, **kwargs):
        calls.append(1)
        if len(calls) == count:
            os.kill(os.getpid(), number)
        return plain(*args, **kwargs)

    monkeypatch.setattr(owner, name, patched)
    return calls


@SIGNALS
@pytest.mark.parametrize("where", ["tokenizer", "tokens", "download", "lock"])
def test_text_that_is_being_prepared(corpus, tmp_path, monkeypatch, interrupted, number, where):
    flags = (*TINY, f"--dataset={corpus}", f"--cache_dir={tmp_path / 'cache'}")
    over = threading.Event()

    def blocking(*_, **__):
        os.kill(os.getpid(), number)
        over.wait()

    class Held(FileLock):
        def acquire(self, timeout=None):
            os.kill(os.getpid(), number)
            raise Timeout("held")

    with monkeypatch.context() as context:
        context.setattr(data_text, "_batches", lambda texts, characters: ([text] for text in texts))
        if where == "download":
            context.setattr("datasets.load_dataset", blocking)
        elif where == "lock":
            context.setattr(source, "FileLock", Held)
        else:
            context.setattr(data_text._Corpus, "_named", lambda self, split: iter([("a", "b c\n" * 200)] * 40))
            owner, name = (data_text._Corpus, "_part") if where == "tokenizer" else (data_text, "_pieces")
            calls = send_at(context, owner, name, number)
        line = interrupted(gpt2_pretrain, number, *flags, f"--output_dir={tmp_path / 'run'}")
    over.set()
    assert "stopped while preparing the data; run the same command again" in line
    assert where in ("download", "lock") or len(calls) == 1
    assert not [path for path in (tmp_path / "cache" / "text").iterdir() if path.is_dir()]
    run_here(gpt2_pretrain, tmp_path / "run", *flags)


@SIGNALS
def test_images_that_are_being_decoded(tmp_path, monkeypatch, interrupted, number):
    flags = ("--steps=1", "--warmup_steps=0", "--report_to=none", f"--cache_dir={tmp_path / 'cache'}")
    with monkeypatch.context() as context:
        calls = send_at(context, Rows, "image", number, count=100)
        line = interrupted(vision_train, number, *flags, f"--output_dir={tmp_path / 'run'}")
    assert "stopped while preparing the data" in line
    assert len(calls) < 1700  # of 1797
    run_here(vision_train, tmp_path / "run", *flags)


@SIGNALS
def test_the_accelerator(flags, tmp_path, monkeypatch, interrupted, number):
    monkeypatch.setattr(launch, "Accelerator", lambda **how: os.kill(os.getpid(), number) or Accelerator(**how))
    assert "stopped before training" in interrupted(gpt2_pretrain, number, *flags, f"--output_dir={tmp_path}")


@pytest.mark.parametrize("save_every", [2, 3])
@pytest.mark.parametrize(("evaluations", "step"), [(0, 0), (1, 3), (2, 6)])
def test_an_evaluation(reference, flags, tmp_path, monkeypatch, interrupted, evaluations, step, save_every):
    """At each of the three of a run; one that was broken off is made up for when the same command goes on."""
    config, _ = gpt2_pretrain.parse_config(gpt2_pretrain.Config, {"": {}}, "", flags)
    rounds = -(-len(gpt2_pretrain.prepare_text(config).validation) // config.micro_batch_size)
    argv = (*flags, f"--save_every={save_every}", f"--output_dir={tmp_path / 'run'}")
    number = signal.SIGINT if save_every == 2 else signal.SIGTERM
    with monkeypatch.context() as context:
        send_at(context, evaluation, "_read", number, count=evaluations * rounds + 1)
        line = interrupted(gpt2_pretrain, number, *argv)
    if step == 0:
        assert "stopped before the first step; run the same command again" in line
    else:
        assert f"stopped and saved at step {step} of 6; run the same command again to continue" in line
        assert json.loads((tmp_path / "run" / "record.json").read_text())["status"] == "interrupted"
    run_here(gpt2_pretrain, tmp_path / "run", *argv[:-1])
    for key in ("loss", "validation_loss"):
        assert losses(tmp_path / "run", key) == losses(reference, key)
    assert json.loads((tmp_path / "run" / "record.json").read_text())["status"] == "finished"
    # It is there after one more start too: the last checkpoint has it.
    run_here(gpt2_pretrain, tmp_path / "run", *argv[:-1])
    assert losses(tmp_path / "run", "validation_loss") == losses(reference, "validation_loss")


@SIGNALS
@pytest.mark.parametrize("at", ["step", "save"])
def test_training(reference, flags, tmp_path, monkeypatch, interrupted, number, at):
    owner, name = (torch.optim.AdamW, "step") if at == "step" else (CheckpointStore, "save")
    argv = (*flags, f"--output_dir={tmp_path / 'run'}")
    with monkeypatch.context() as context:
        send_at(context, owner, name, number, count=2)
        line = interrupted(gpt2_pretrain, number, *argv)
    assert f"stopped and saved at step {2 if at == 'step' else 4} of 6; run the same command again to continue" in line
    run_here(gpt2_pretrain, tmp_path / "run", *flags)
    assert losses(tmp_path / "run") == losses(reference)


def test_a_second_interrupt_acts_at_once(flags, tmp_path, monkeypatch):
    def twice(**how):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("it went on")

    monkeypatch.setattr(launch, "Accelerator", twice)
    with pytest.raises(KeyboardInterrupt):
        run_recipe(lambda: gpt2_pretrain.main([*flags, f"--output_dir={tmp_path}"]))
