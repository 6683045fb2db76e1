"""Runs a recipe with FSDP2 over gloo: `accelerate launch ... tests/fsdp_on_cpu.py RECIPE [flags]`.

accelerate shards on accelerators alone; here a CPU passes for one when it asks what there is.
"""

import os
import runpy
import sys

import torch
from accelerate.state import DistributedType, PartialState

assert os.environ["ACCELERATE_USE_FSDP"] == "true"


def set_device(self):
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU
    self.device = torch.device("cpu")


PartialState.set_device = set_device
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
