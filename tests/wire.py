"""Runs a recipe and counts what each process sends: `accelerate launch ... tests/wire.py FOLDER RECIPE [flags]`.

It counts at the third step, since DDP arranges its buckets anew at the second. FOLDER/<rank>.json has name, type and
number of elements of each collective, as torch hands it to the backend, and whole where processes hold pieces; and the
bytes on the wire, as the kernel counts them for the sockets of the process.
"""

import json
import os
import runpy
import socket
import struct
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_gem._torch import TorchDispatchMode, tree_leaves

_BYTES_SENT = 200  # where tcp_info has them, in Linux


class Collectives(TorchDispatchMode):
    """Keeps what goes to torch.distributed, from Python and C++ alike."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # it comes again, as what happens to the pieces
        name = operation.overloadpacket.__name__.replace("_", "").removesuffix("base")
        if operation.namespace in ("c10d", "_c10d_functional") and not name.startswith(("wait", "wrap", "barrier")):
            tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
            whole = max(tensors, key=torch.Tensor.numel)
            self.seen.append((name, str(whole.dtype).removeprefix("torch."), whole.numel()))
        return operation(*args, **(kwargs or {}))


def bytes_sent():
    """What this process has sent over TCP; 0 where only Linux could tell."""
    total = 0
    for path in Path("/proc/self/fd").glob("*"):
        try:
            connection = socket.socket(fileno=int(path.name))
        except OSError:  # no socket
            continue
        if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_SENT + 8)
            total += struct.unpack_from("Q", info, _BYTES_SENT)[0]
        connection.detach()  # it belongs to others
    return total


def count(folder):
    """Watches the third step, from the end of the second optimizer step to that of the third."""
    collectives, steps, before = Collectives(), 0, 0

    def after_step(*_):
        nonlocal steps, before
        steps += 1
        if steps == 2:
            before = bytes_sent()
            collectives.__enter__()
        if steps == 3:
            collectives.__exit__(None, None, None)
            sent = {"collectives": collectives.seen, "bytes": bytes_sent() - before}
            (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(sent))

    register_optimizer_step_post_hook(after_step)


count(Path(sys.argv[1]))
sys.argv = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
