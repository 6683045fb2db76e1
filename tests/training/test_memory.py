"""What `auto` stands for in sizes: the most that fits, found in few tries, and the same again."""

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_gem.training.config import TrainConfig
from hf_gem.training.errors import ConfigError
from hf_gem.training.launch import make_accelerator
from hf_gem.training.loop import train
from hf_gem.training.loss import CHUNK_SIZE, CausalLMLoss
from hf_gem.training.memory import auto_chunk_size, fit_to_memory, largest_micro_batch
from tests.training.toys import make_task

GB = 2**30
GPT2 = {"batch": 16, "length": 1024, "vocabulary": 50304}


@pytest.mark.parametrize(
    ("available", "sizes", "dtype", "expected"),
    [
        (78 * GB, GPT2, torch.bfloat16, 0),  # 8.2 GB of logits
        (22 * GB, GPT2, torch.bfloat16, CHUNK_SIZE),
        (78 * GB, {**GPT2, "batch": 64}, torch.bfloat16, CHUNK_SIZE),
        (3 * 7 * 10 * 5 * 3, {"batch": 7, "length": 5, "vocabulary": 3}, torch.bfloat16, 0),  # at the limit
        (3 * 7 * 10 * 5 * 3 - 1, {"batch": 7, "length": 5, "vocabulary": 3}, torch.bfloat16, CHUNK_SIZE),
        (3 * 7 * 10 * 5 * 3, {"batch": 7, "length": 5, "vocabulary": 3}, torch.float32, CHUNK_SIZE),
        (-GB, GPT2, torch.bfloat16, CHUNK_SIZE),  # the weights alone do not fit
    ],
)
def test_logits_are_chunked_where_they_would_take_too_much(available, sizes, dtype, expected):
    assert auto_chunk_size(available, **sizes, dtype=dtype) == expected


def device(memory, base=100, sample=10, spike=0):
    """A device with some memory, and the sizes that were tried on it."""
    tried = []

    def peak(size):
        tried.append(size)
        used = base + sample * size
        if used + (spike if size > 4 else 0) > memory:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return used

    return peak, tried


@pytest.mark.parametrize(
    ("share", "memory", "spike", "expected", "tries"),
    [
        (512, 1000, 0, 64, [2, 4, 64]),  # 90 would fit, which is no divisor
        (512, 740, 0, 64, [2, 4, 64]),
        (512, 739, 0, 32, [2, 4, 32]),
        (512, 1000, 400, 32, [2, 4, 64, 32]),  # a sample takes more than few told
        (90, 1000, 0, 90, [2, 4, 90]),
        (96, 1000, 0, 48, [2, 4, 48]),
        (8, 10**6, 0, 8, [2, 4, 8]),
        (1, 1000, 0, 1, [2, 4, 1]),
        (512, 110, 0, 1, [2, 2, 1]),
        (512, 50, 0, 0, [2, 2, 1]),
    ],
)
def test_the_largest_divisor_that_fits_is_found_in_few_tries(share, memory, spike, expected, tries):
    peak, tried = device(memory, spike=spike)
    sizes = [n for n in range(share, 0, -1) if share % n == 0]
    assert largest_micro_batch(sizes, peak, memory) == expected
    assert tried == tries


def test_mixing_gets_pairs(tmp_path):
    task, sizes = make_task(), {}
    for multiple, name in ((1, "all"), (2, "even")):
        task.objective.multiple_of = multiple
        config = settings(tmp_path, micro_batch_size=5, global_batch_size=30)
        sizes[name] = fit_to_memory(task, config, make_accelerator(config))["micro_batch_size"]
    assert sizes == {"all": 5, "even": 2}
    config = settings(tmp_path, micro_batch_size=5, global_batch_size=15)
    with pytest.raises(
        ConfigError, match=r"divide 15 and be a multiple of 2, as .* CutMix need pairs\)\. Change --global_batch_size"
    ):
        fit_to_memory(task, config, make_accelerator(config))


def settings(folder, **fields):
    sizes = {"global_batch_size": 24, "steps": 2, "warmup_steps": 1, "micro_batch_size": "auto"}
    return TrainConfig(output_dir=str(folder), report_to="none", **{**sizes, **fields})


def test_a_cpu_tries_nothing(tmp_path):
    config = settings(tmp_path)
    record = train(make_task(), config, make_accelerator(config))
    assert record["sessions"][0]["micro_batch_size"] == 12  # a divisor of 24, and at most 16
    assert "loss_chunk_size" not in record["sessions"][0]  # this objective has no such


@pytest.mark.parametrize(("given", "expected"), [("auto", CHUNK_SIZE), (7, 7), (0, 0)])
def test_the_chunk_size_is_settled_and_on_record(tmp_path, given, expected):
    task = make_task()
    task.objective = CausalLMLoss(task.model, given)
    config = settings(tmp_path, micro_batch_size=8)
    found = fit_to_memory(task, config, make_accelerator(config))
    assert found == {"micro_batch_size": 8, "loss_chunk_size": expected}
    assert task.objective.chunk_size == expected


def test_sharded_models_are_not_tried(tmp_path):
    accelerator = SimpleNamespace(num_processes=2, is_fsdp2=True, device=torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"--micro_batch_size auto with FSDP2.*Give a number"):
        fit_to_memory(make_task(), settings(tmp_path), accelerator)


class Blocks:
    def __len__(self):
        return 5

    def batch(self, indices, draws=None):
        ids = torch.arange(17).repeat(len(indices), 1)
        return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def memory_of_tensors():
    """The allocated bytes, without the workspaces of cuBLAS: tens of megabytes for each thread that used it."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


@pytest.mark.gpu
def test_tries_leave_no_trace_and_fill_the_memory_of_a_gpu(tmp_path):
    config = settings(tmp_path, global_batch_size=2**20, mixed_precision="bf16")
    accelerator = make_accelerator(config)
    sizes = {"vocab_size": 50304, "n_positions": 16, "n_embd": 64, "n_layer": 1, "n_head": 1}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    task = make_task()
    task.model, task.train, task.units_per_sample = model, Blocks(), 16
    task.objective = CausalLMLoss(model, "auto").to(accelerator.device)
    before = copy.deepcopy(model.state_dict()), torch.cuda.get_rng_state(), memory_of_tensors()
    found = fit_to_memory(task, config, accelerator)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[0][name])
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.cuda.get_rng_state(), before[1])
    assert memory_of_tensors() <= before[2]
    assert found["loss_chunk_size"] == 0
    logits = found["micro_batch_size"] * 16 * 50304 * 10
    total = torch.cuda.get_device_properties(accelerator.device).total_memory
    assert total / 4 < logits < total
