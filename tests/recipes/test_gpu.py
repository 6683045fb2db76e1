"""Training on a GPU, as its kernels and half types have it."""

import math

import pytest
import torch
from safetensors.torch import load_file

from hf_gem.training.config import parse_config
from hf_gem.training.data import text
from recipes import gpt2_pretrain, vision_train
from tests.helpers import TINY, finish, losses, run_here, start

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Trains on a part of the standard library that is prepared once, and so without the package datasets."""
    cache = tmp_path_factory.mktemp("cache")
    flags = (*TINY, "--vocab_size=300", "--dataset=stdlib", f"--cache_dir={cache}")
    with pytest.MonkeyPatch.context() as patch:
        files = text.stdlib_files()[::40]
        patch.setattr(text, "stdlib_files", lambda: files)
        text.prepare_text(parse_config(gpt2_pretrain.Config, gpt2_pretrain.PRESETS, "demo", flags)[0])
    (prepared,) = (path.parent for path in cache.rglob("train.bin"))
    return (*TINY, f"--dataset={prepared}")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_types_train_with_the_kernels(flags, tmp_path, monkeypatch, precision):
    gpu = pytest.importorskip("hf_gem._kernels.gpu", reason="needs Triton")
    launched, launch = set(), gpu.launch

    def counted(operation, family, n, eps, outputs, inputs):
        launched.add((operation, str(inputs[-1].dtype)))
        launch(operation, family, n, eps, outputs, inputs)

    monkeypatch.setattr(gpu, "launch", counted)
    steps = ("--steps=20", "--eval_every=20", "--save_every=20", f"--mixed_precision={precision}")
    run_here(gpt2_pretrain, tmp_path, *flags, *steps)
    found = losses(tmp_path)
    assert len(found) == 20
    assert all(map(math.isfinite, found.values()))
    assert sum(found[step] for step in range(16, 21)) < sum(found[step] for step in range(1, 6)) - 0.5
    dtype = {"bf16": "torch.bfloat16", "fp16": "torch.float16"}[precision]
    assert ("forward", dtype) in launched  # and in float32 for the sample of text
    assert {what for what in launched if what[0] != "forward"} == {("backward_at", dtype)}


def test_resuming_goes_on_bit_for_bit(flags, tmp_path):
    more = ("--deterministic=yes", "--mixed_precision=bf16", "--keep_checkpoints=9")
    code, output = finish(start(*flags, *more, f"--output_dir={tmp_path / 'whole'}"))
    assert code == 0, output
    checkpoint = tmp_path / "whole" / "checkpoints" / "step_00000002"
    code, output = finish(start(*flags, *more, f"--output_dir={tmp_path / 'rest'}", f"--resume={checkpoint}"))
    assert code == 0, output
    for key in ("loss", "validation_loss"):
        assert losses(tmp_path / "rest", key) == losses(tmp_path / "whole", key)


def test_filters_of_half_precision_are_channels_last_and_are_saved_as_usual(tmp_path, monkeypatch):
    tasks, train = [], vision_train.train
    monkeypatch.setattr(vision_train, "train", lambda task, *rest: tasks.append(task) or train(task, *rest))
    steps = ("--steps=20", "--eval_every=20", "--save_every=10", "--log_every=1", "--report_to=none")
    run_here(vision_train, tmp_path, "--mixed_precision=bf16", "--model=resnet8-cifar", *steps)
    found = losses(tmp_path)
    assert sum(found[step] for step in range(16, 21)) < sum(found[step] for step in range(1, 6))
    (task,), saved = tasks, load_file(tmp_path / "model.safetensors")
    filters = {name: tensor for name, tensor in task.model.state_dict().items() if tensor.dim() == 4}
    assert len(filters) == 7
    for name, tensor in filters.items():
        assert tensor.is_contiguous(memory_format=torch.channels_last), name
        assert torch.equal(tensor.cpu(), saved[name]), name
