"""Reads sharded checkpoints of FSDP2 without running code from them.

The list of tensors in such a checkpoint is a pickle, and so are all values other than tensors. `Accelerator.load_state`
calls `torch.distributed`, which unpickles both without restriction.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import SCALER_NAME
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import StateDictType

from ..files import is_inside, shown

_METADATA = ".metadata"
_MODULE = "torch.distributed.checkpoint"
# The classes in a list of tensors. They only hold data; none of them does anything.
_ALLOWED = {
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    f"{_MODULE}.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "BytesStorageMetadata"),
        *("TensorProperties", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    f"{_MODULE}.filesystem": {"_StorageInfo"},
}
_PATHS = {"PosixPath", "WindowsPath"}  # the folder it was written to, which nothing needs


def is_sharded(accelerator: Accelerator) -> bool:
    """Returns whether the checkpoints of a run are sharded."""
    sharded = StateDictType.SHARDED_STATE_DICT
    return bool(accelerator.is_fsdp2 and accelerator.state.fsdp_plugin.state_dict_type == sharded)


def load_sharded(accelerator: Accelerator, folder: Path) -> None:
    """Loads model, optimizer and scaler, as `Accelerator.load_state` does. All processes must call it.

    Random states are not restored, because a run seeds everything it draws.

    Args:
        accelerator: The accelerator with the prepared model and optimizer.
        folder: The checkpoint.

    Raises:
        ValueError: A file is damaged, lies elsewhere, or names something that does not belong in a checkpoint. No code
            from it has run.
    """
    (model,), (optimizer,) = accelerator._models, accelerator._optimizers
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(torch.load(folder / SCALER_NAME, weights_only=True))
        accelerator.scaler.scale(torch.zeros((), device=accelerator.device))  # initialises it for the optimizer
    options = StateDictOptions(cpu_offload=accelerator.state.fsdp_plugin.state_dict_config.offload_to_cpu)
    state = _load({"model": get_model_state_dict(model, options=options)}, folder / "pytorch_model_fsdp_0")
    set_model_state_dict(model, state["model"], options=options)
    state = _load({"optimizer": get_optimizer_state_dict(model, optimizer, options=options)}, folder / "optimizer_0")
    set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    accelerator.wait_for_everyone()


def _load(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    reader = _Reader(folder)
    try:
        checkpoint.load(state, storage_reader=reader, planner=_Planner())
    except CheckpointException as error:  # not a subclass of Exception
        reasons = "; ".join(dict.fromkeys(str(reason) for reason, _ in error.failures.values()))
        raise ValueError(f"cannot read {folder}: {reader.error or reasons}") from error
    return state


class _Reader(checkpoint.FileSystemReader):
    error: Exception | None = None  # of read_metadata; torch 2.11 drops it

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        try:
            metadata = _read_list(Path(self.path, _METADATA))
        except Exception as error:
            self.error = error
            raise
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def _read_list(path: Path) -> Metadata:
    """Reads the list of tensors of a sharded checkpoint."""
    with path.open("rb") as file:
        metadata = _Unpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"{path} holds a {type(metadata).__name__} instead of a list of tensors")
    for info in metadata.storage_data.values():
        if not is_inside(info.relative_path):
            raise ValueError(f"{path} names {shown(info.relative_path)}, which is outside its folder")
    return metadata


class _Planner(checkpoint.DefaultLoadPlanner):
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        checked = io.BytesIO()
        torch.save(torch.load(value, weights_only=True), checked)
        checked.seek(0)
        super().load_bytes(read_item, checked)


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module.split(".", maxsplit=1)[0] == "pathlib" and name in _PATHS:
            return _no_path
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return getattr(torch, name)
        if name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(
                f"the list of tensors names {shown(f'{module}.{name}')}, which does not belong in one"
            )
        found: Callable[..., Any] = super().find_class(module, name)
        return found


def _no_path(*parts: object) -> None:
    """Takes the place of a path."""
