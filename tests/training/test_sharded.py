"""Sharded checkpoints are read, and what is planted in them does not run."""

import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict

from hf_gem.training.sharded import _load, load_sharded
from tests.helpers import TouchesWhenUnpickled

# no process group, which torch says of each call here
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|not available|unavailable)")


def state(seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        "optimizer": {
            "state": {"w": {"step": torch.tensor(float(seed)), "exp_avg": torch.randn(4, 3, generator=draw)}},
            "param_groups": {"w": {"lr": 0.1 * seed, "betas": (0.9, 0.95), "foreach": None, "fused": True}},
            "half": torch.randn(5, generator=draw).bfloat16(),
        }
    }


@pytest.fixture
def folder(tmp_path):
    checkpoint.save(state(1), storage_writer=checkpoint.FileSystemWriter(tmp_path / "c"))
    return tmp_path / "c"


def test_everything_is_read(folder):
    found, expected = _load(state(2), folder)["optimizer"], state(1)["optimizer"]
    assert found["param_groups"] == expected["param_groups"]
    assert found["state"]["w"]["step"] == 1
    assert torch.equal(found["state"]["w"]["exp_avg"], expected["state"]["w"]["exp_avg"])
    assert torch.equal(found["half"], expected["half"])


def test_a_list_of_tensors_that_runs_something(folder, tmp_path):
    for evil in (TouchesWhenUnpickled(tmp_path / "touched"), torch.distributed.checkpoint.FileSystemReader, print, 3):
        (folder / ".metadata").write_bytes(pickle.dumps(evil))
        with pytest.raises(ValueError, match=r"does not belong in one|instead of a list of tensors"):
            _load(state(2), folder)
    assert not (tmp_path / "touched").exists()


def test_a_name_with_dots_finds_nothing(folder):
    """With protocol 4 a name may lead from an allowed class to anything."""
    name = b"Metadata.__init__.__globals__"
    module = b"torch.distributed.checkpoint.metadata"
    short = b"".join(b"\x8c" + bytes([len(text)]) + text for text in (module, name))
    (folder / ".metadata").write_bytes(b"\x80\x04" + short + b"\x93.")
    with pytest.raises(ValueError, match="does not belong in one"):
        _load(state(2), folder)


@pytest.mark.parametrize("name", ["optimizer.param_groups.w.lr", "optimizer.half"])
def test_a_number_that_runs_something(folder, tmp_path, name):
    """A value beside the tensors, and a tensor that the list says is such a value."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    torch.save(TouchesWhenUnpickled(tmp_path / "touched"), folder / "evil.distcp")
    for index, info in list(metadata.storage_data.items()):
        if index.fqn == name:
            info.relative_path, info.offset = "evil.distcp", 0
            info.length = (folder / "evil.distcp").stat().st_size
            metadata.state_dict_metadata[name] = BytesStorageMetadata()
            metadata.storage_data[MetadataIndex(name)] = info
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=r"weights_only|Weights only"):
        _load(state(2), folder)
    assert not (tmp_path / "touched").exists()


def test_a_file_elsewhere_is_not_read(folder):
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = str(Path("..") / folder.name / info.relative_path)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match="which is outside its folder"):
        _load(state(2), folder)


def trained(seed):
    """What accelerate holds of a run in half precision, after two steps."""
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
    for _ in range(2):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**seed)
    scaler.scale(torch.zeros(()))
    plugin = SimpleNamespace(state_dict_config=SimpleNamespace(offload_to_cpu=False))
    return SimpleNamespace(
        _models=[model], _optimizers=[optimizer], scaler=scaler, device=torch.device("cpu"),
        state=SimpleNamespace(fsdp_plugin=plugin), wait_for_everyone=lambda: None,
    )  # fmt: skip


def save(accelerator, folder):
    """As accelerate does."""
    (model,), (optimizer,) = accelerator._models, accelerator._optimizers
    for name, content in (
        ("pytorch_model_fsdp_0", {"model": get_model_state_dict(model)}),
        ("optimizer_0", {"optimizer": get_optimizer_state_dict(model, optimizer)}),
    ):
        checkpoint.save(content, storage_writer=checkpoint.FileSystemWriter(folder / name))
    torch.save(accelerator.scaler.state_dict(), folder / "scaler.pt")


def test_model_optimizer_and_scaler_are_restored(tmp_path):
    saved, other = trained(1), trained(2)
    save(saved, tmp_path)
    load_sharded(other, tmp_path)
    assert torch.equal(other._models[0].weight, saved._models[0].weight)
    ours, theirs = other._optimizers[0].state_dict(), saved._optimizers[0].state_dict()
    assert ours["param_groups"][0]["lr"] == theirs["param_groups"][0]["lr"]
    for number, state in theirs["state"].items():
        assert all(torch.equal(ours["state"][number][name], value) for name, value in state.items())
    assert other.scaler.state_dict() == saved.scaler.state_dict()


def test_a_scaler_that_runs_something(tmp_path):
    save(trained(1), tmp_path)
    torch.save(TouchesWhenUnpickled(tmp_path / "touched"), tmp_path / "scaler.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_sharded(trained(2), tmp_path)
    assert not (tmp_path / "touched").exists()
