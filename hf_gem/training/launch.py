"""Makes the accelerator of a run, and checks that launcher and machine support what the config asks for."""

from __future__ import annotations

import importlib.util
import logging
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs, GradientAccumulationPlugin
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from ..files import redacted
from .config import TrainConfig
from .device import keep_freed_memory
from .errors import ConfigError
from .signals import check

# Environment variables that select kernels with different rounding.
_VARIABLES = ("HF_GEM_KERNELS", "HF_GEM_SAVE", "NVIDIA_TF32_OVERRIDE", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
PRECISIONS = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Makes the accelerator of a run, with precision, trackers and determinism as configured.

    Raises:
        ConfigError: The machine, or the way the script was launched, does not support the config.
        Interrupted: A signal arrived.
    """
    torch.set_float32_matmul_precision("high")  # TF32 where available; no effect on a CPU
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires this
        torch.use_deterministic_algorithms(True)
    # On every save it warns that tied weights are stored once, which is intended.
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)
    if config.report_to == "auto":
        config.report_to = "trackio" if importlib.util.find_spec("trackio") else "none"
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),  # otherwise each of several processes would believe it is alone
        mixed_precision=config.mixed_precision,
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=config.output_dir,
        # The loop accumulates gradients itself; a launcher's setting would scale them a second time.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            DistributedDataParallelKwargs(
                gradient_as_bucket_view=True,
                comm_hook=DDPCommunicationHookType(config.compress_gradients or "no"),
            )
        ],
    )
    check("stopped before training; run the same command again to start it")
    _check_distribution(accelerator, config)
    _check_precision(accelerator)
    if config.report_to != "none" and not accelerator.log_with:
        raise ConfigError(
            f"--report_to {config.report_to} needs the package {config.report_to}, which is not installed. Run pip "
            f"install {config.report_to}, or use --report_to none."
        )
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    threads, cores = torch.get_num_threads(), (os.cpu_count() or 1) // accelerator.num_processes
    if accelerator.device.type == "cpu" and threads < cores:
        accelerator.print(f"training with {threads} of {cores} CPU threads; set OMP_NUM_THREADS={cores} to use all")
    return accelerator


def launched(accelerator: Accelerator) -> dict[str, str]:
    """Returns the settings outside the config that change numbers: the launcher's and environment variables.

    The record stores the launcher's precision and number of processes separately. Its other settings are refused.
    """
    state = accelerator.state
    dynamo = state.dynamo_plugin
    chosen = {"distributed": accelerator.distributed_type.value, "compiled by": "none"}
    if dynamo.backend.value != "NO" and not dynamo.disable:
        chosen["compiled by"] = _named({**asdict(dynamo), "backend": dynamo.backend.value})
    plugin = getattr(state, "fsdp_plugin", None)
    if plugin is not None:
        kept = ("cpu_offload", "activation_checkpointing", "reshard_after_forward", "mixed_precision_policy")
        chosen["fsdp"] = _named({name: getattr(plugin, name, None) for name in kept})
    parallelism = getattr(accelerator, "parallelism_config", None)
    if parallelism is not None:
        chosen["parallelism"] = str(parallelism)
    chosen["float32 products"] = torch.get_float32_matmul_precision()
    chosen["variables"] = _named({name: os.environ.get(name) for name in _VARIABLES}) or "none"
    return chosen


def _named(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items() if value is not None and value is not False)


def start_tracker(accelerator: Accelerator, config: TrainConfig, name: str) -> None:
    """Starts or resumes the run of this name in the experiment tracker, if there is one."""
    if config.report_to == "none":
        return
    accelerator.init_trackers(
        config.project,
        config=redacted({k: v for k, v in asdict(config).items() if v is not None}),
        init_kwargs={
            "trackio": {"name": name, "group": config.act_label, "resume": "allow"},
            "wandb": {"name": name, "id": name, "group": config.act_label, "resume": "allow"},
        },
    )


def layers_to_shard(model: nn.Module) -> list[str]:
    """Returns the classes whose instances FSDP shards as one unit: those that transformers does not split.

    A class with a single instance is left out, since embeddings may share weights with the head.
    """
    counts = Counter(type(module).__name__ for module in model.modules())
    return [name for name in getattr(model, "_no_split_modules", None) or [] if counts[name] > 1]


def _check_distribution(accelerator: Accelerator, config: TrainConfig) -> None:
    kind = accelerator.distributed_type
    if kind != DistributedType.NO and not kind.value.startswith("MULTI_") and not accelerator.is_fsdp2:
        raise ConfigError(
            f"the launcher chose {kind.value}. The recipes run on one process, with DDP, or with FSDP2. "
            + ("Set fsdp_version: 2." if kind == DistributedType.FSDP else "Change the config of accelerate.")
        )
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and not accelerator.is_fsdp2 and accelerator.num_processes > 1:
        raise ConfigError(
            "the launcher chose FSDP on a CPU. accelerate shards only on GPUs. Use cpu.yaml; `hf-gem recipes` says "
            "where it is."
        )
    if accelerator.is_fsdp2 and config.ema_decay:
        raise ConfigError(
            f"got --ema_decay {config.ema_decay} with FSDP2. The average needs a whole copy of the weights, but FSDP2 "
            "shards them. Set --ema_decay 0, or use DDP."
        )
    if config.compress_gradients and not kind.value.startswith("MULTI_"):
        # FSDP2 could reduce in bfloat16, but would also sum micro-batches in bfloat16.
        ours = "FSDP2" if accelerator.is_fsdp2 else "one process"
        raise ConfigError(
            f"got --compress_gradients {config.compress_gradients}, but this run uses {ours}. It only works with DDP "
            "on several processes. Leave it out."
        )


def _check_precision(accelerator: Accelerator) -> None:
    """Checks the precision, and makes FSDP2 reduce gradients and keep losses in float32."""
    precision = accelerator.mixed_precision
    if precision not in PRECISIONS:
        raise ConfigError(
            f"the launcher chose the precision {precision}. It can be no, bf16 or fp16. Use --mixed_precision bf16."
        )
    if precision == "fp16" and accelerator.device.type != "cuda":
        raise ConfigError(
            f"fp16 was chosen on the device {accelerator.device}. It needs a CUDA device. Use --mixed_precision bf16 "
            "or no."
        )
    if accelerator.is_fsdp2 and precision != "no":
        # accelerate would reduce gradients and round the summed loss in the lower precision.
        policy = MixedPrecisionPolicy(param_dtype=PRECISIONS[precision], reduce_dtype=torch.float32)
        accelerator.state.fsdp_plugin.mixed_precision_policy = policy
