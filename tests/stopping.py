"""stopping.py SIGNAL STEP RANK RECIPE [flags]: a recipe that sends itself a signal when a checkpoint is complete."""

import os
import runpy
import sys

from hf_gem.training.checkpoint import CheckpointStore

number, step, rank = map(int, sys.argv[1:4])
save = CheckpointStore.save


def save_and_stop(self, accelerator, saved, *more):
    path = save(self, accelerator, saved, *more)
    if saved == step and accelerator.process_index == rank:
        os.kill(os.getpid(), number)
    return path


CheckpointStore.save = save_and_stop
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
