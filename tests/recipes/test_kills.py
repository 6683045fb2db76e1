"""Nothing is lost, whenever a run is killed."""

import math
import multiprocessing
import random
import time

import pytest

from recipes import gpt2_pretrain
from tests.helpers import losses, write_corpus

KILLS = 50
FLAGS = (
    *(
        "--n_layer=1",
        "--n_embd=16",
        "--n_head=2",
        "--block_size=16",
        "--vocab_size=300",
        "--validation_fraction=0.1",
        "--min_validation_tokens=0",
    ),
    *("--steps=600", "--global_batch_size=2", "--micro_batch_size=2", "--warmup_steps=2", "--learning_rate=0.01"),
    *("--log_every=1", "--eval_every=200", "--save_every=1", "--report_to=none", "--dropout=0.1"),
)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_fifty_kills_change_nothing(tmp_path):
    """Kill -9 at fifty random moments, of which with a checkpoint at every step many fall into saving one."""
    # Processes that have imported everything already, so that most of a short life is spent in training.
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["recipes.gpt2_pretrain"])
    flags = [*FLAGS, f"--dataset={write_corpus(tmp_path / 'corpus.txt', 60)}", f"--cache_dir={tmp_path / 'cache'}"]

    def start(folder):
        process = processes.Process(target=gpt2_pretrain.main, args=([*flags, f"--output_dir={folder}"],))
        process.start()
        return process

    reference = start(tmp_path / "whole")
    reference.join()
    assert reference.exitcode == 0

    folder = tmp_path / "killed"
    checkpoints = folder / "checkpoints"
    draw = random.Random(0)

    def newest():
        return max((int(path.parent.name.split("_")[1]) for path in checkpoints.glob("step_*/COMPLETE")), default=0)

    kept, partial = [0], 0
    for kill in range(KILLS):
        process = start(folder)
        # Half of them live until a checkpoint or more is new, and another one is being saved. The others last a while,
        # wherever that leads, but not to more than two of them: a fast machine must not get to the end.
        born, life = time.monotonic(), math.inf if kill % 2 else draw.uniform(0, 1)
        target = kept[-1] + draw.randint(1, 2)
        while process.is_alive() and newest() < target and time.monotonic() < born + life:
            time.sleep(0.002)
        if kill % 2:  # in the middle of saving the next one, however slow the machine is
            while process.is_alive() and not list(checkpoints.glob(".step_*")):
                time.sleep(0.0005)
        else:
            time.sleep(draw.uniform(0, 0.02))
        assert process.is_alive(), "it ended by itself before it could be killed; give it more steps"
        process.kill()
        process.join()
        partial += bool(list(checkpoints.glob(".step_*")))
        kept.append(newest())
        assert kept[-1] >= kept[-2], "a checkpoint that was complete is gone"
    assert partial > 0, "no kill fell into the saving of a checkpoint"
    assert KILLS / 2 <= kept[-1] < 600
    last = start(folder)
    last.join()
    assert last.exitcode == 0
    for name in ("loss", "validation_loss"):
        assert losses(folder, name) == losses(tmp_path / "whole", name)
    for file in ("model.safetensors", "config.json"):
        assert (folder / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
