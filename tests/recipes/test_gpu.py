"""Training on a GPU, as its kernels and half types have it."""

import math

import pytest

from hf_gem.training.config import parse_config
from hf_gem.training.data import text
from recipes import gpt2_pretrain
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
