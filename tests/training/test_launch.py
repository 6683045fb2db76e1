"""What the launcher, this machine and the config cannot do together is refused."""

import importlib.util
from unittest.mock import MagicMock

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState

from hf_gem.training.config import TrainConfig
from hf_gem.training.errors import ConfigError
from hf_gem.training.launch import launched, make_accelerator, start_tracker


def make(folder, **fields):
    return make_accelerator(TrainConfig(output_dir=str(folder), **{"report_to": "none", **fields}))


def test_a_tracker_that_is_not_installed_is_an_error(tmp_path):
    if importlib.util.find_spec("wandb"):
        pytest.skip("wandb is installed")
    with (
        pytest.warns(UserWarning, match="no supported trackers"),
        pytest.raises(ConfigError, match="--report_to wandb needs the package wandb"),
    ):
        make(tmp_path, report_to="wandb")


def test_fp16_without_a_gpu_is_refused_wherever_it_comes_from(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("fp16 is allowed where there is a CUDA device")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises((ConfigError, ValueError), match="fp16"):
        make(tmp_path)


def test_a_precision_of_the_launcher_that_is_none_of_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "mixed_precision", "fp8")
    with pytest.raises(ConfigError, match=r"the launcher chose the precision fp8\. It can be no, bf16 or fp16"):
        make(tmp_path)


def test_a_way_to_distribute_that_is_none_of_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.DEEPSPEED)
    with pytest.raises(ConfigError, match=r"the launcher chose DEEPSPEED. The recipes run on one process, "):
        make(tmp_path)


def test_compression_where_nothing_is_reduced_by_ddp_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="this run uses one process"):
        make(tmp_path, compress_gradients="bf16")
    monkeypatch.setattr(Accelerator, "distributed_type", DistributedType.FSDP)
    monkeypatch.setattr(Accelerator, "is_fsdp2", True)
    with pytest.raises(ConfigError, match="got --compress_gradients bf16, but this run uses FSDP2"):
        make(tmp_path, compress_gradients="bf16")


def test_auto_is_resolved_for_the_record(tmp_path):
    config = TrainConfig(output_dir=str(tmp_path), report_to="auto")
    make_accelerator(config)
    assert config.report_to in ("trackio", "none")


@pytest.mark.parametrize("tracker", ["trackio", "wandb"])
def test_a_tracker_groups_runs_by_activation(tmp_path, tracker):
    accelerator = MagicMock()
    config = TrainConfig(
        output_dir=str(tmp_path), report_to=tracker, project="study", hidden_act="egem_n2", eps="match"
    )
    start_tracker(accelerator, config, "run-0123")
    ((project,), more) = accelerator.init_trackers.call_args
    assert project == "study"
    chosen = more["init_kwargs"][tracker]
    assert (chosen["name"], chosen["group"], chosen["resume"]) == ("run-0123", "egem_n2-match", "allow")
    assert more["config"]["hidden_act"] == "egem_n2"


def test_what_the_launcher_chose_is_read_back(tmp_path, monkeypatch):
    """`accelerate launch --dynamo_backend inductor --dynamo_use_dynamic` compiles, whatever `--compile` says."""

    def found(**environment):
        AcceleratorState._reset_state(reset_partial_state=True)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        chosen = launched(make(tmp_path))
        AcceleratorState._reset_state(reset_partial_state=True)
        return chosen

    plain = found()
    assert plain["distributed"] == "NO"
    assert plain["compiled by"] == "none"
    assert plain["float32 products"] == "high"
    compiled = found(ACCELERATE_DYNAMO_BACKEND="INDUCTOR", ACCELERATE_DYNAMO_MODE="max-autotune")
    assert compiled["compiled by"].startswith("backend=INDUCTOR, mode=max-autotune")
    assert {**compiled, "compiled by": "none"} == plain
    assert (
        found(HF_GEM_SAVE="output", NVIDIA_TF32_OVERRIDE="0")["variables"]
        == "HF_GEM_SAVE=output, NVIDIA_TF32_OVERRIDE=0"
    )
