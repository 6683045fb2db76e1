"""Solves differential equations with networks with any activation: accelerate launch recipes/pinn.py --preset demo"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers.activations import ACT2FN

from hf_gem.init import gain
from hf_gem.training.config import TrainConfig, at_least, option, parse_config, require
from hf_gem.training.coordinate_models import CoordinateMLPConfig, CoordinateMLPModel
from hf_gem.training.data.collocation import prepare_points
from hf_gem.training.initial import new_task
from hf_gem.training.launch import make_accelerator
from hf_gem.training.loop import train
from hf_gem.training.loss import ResidualLoss
from hf_gem.training.pde import PROBLEMS
from hf_gem.training.report import import_of, print_summary, save_results
from hf_gem.training.signals import run_recipe
from hf_gem.training.task import Task

# The usual choice here: Adam in float32, without weight decay and clipping, with a rate that decays to a hundredth.
_ADAM: dict[str, Any] = {
    "adam_beta2": 0.999, "weight_decay": 0, "grad_clip": 0, "min_lr_ratio": 0.01, "warmup_steps": 100,
    "global_batch_size": 128, "micro_batch_size": 512, "mixed_precision": "no",
    "eval_every": 500, "save_every": 500, "log_every": 100,
}  # fmt: skip
# Each takes seconds on one CPU thread.
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        **_ADAM, "problem": "poisson", "steps": 800, "learning_rate": 0.02,
        "eval_every": 200, "save_every": 200, "log_every": 40,
    },
    "poisson": {**_ADAM, "problem": "poisson", "steps": 1500, "learning_rate": 0.02},
    "helmholtz": {
        **_ADAM, "problem": "helmholtz", "steps": 2000, "learning_rate": 0.015, "boundary_weight": 300,
    },
    "burgers": {
        **_ADAM, "problem": "burgers", "steps": 2000, "learning_rate": 0.02, "boundary_weight": 30,
        "global_batch_size": 512,
    },
}  # fmt: skip


@dataclass
class Config(TrainConfig):
    """The config of this recipe."""

    problem: Literal["poisson", "helmholtz", "burgers"] = option("poisson", "The equation; each has a preset.")
    width: int = option(32, "Width of hidden layers.")
    depth: int = option(3, "Number of hidden layers.")
    boundary_weight: float = option(
        100.0, "Weight of squared errors on the boundary, relative to squared residuals of the equation."
    )
    own_gain: bool = option(
        False, "Draw the weights after each activation with its own gain; otherwise the gain is 1, as for Glorot's."
    )

    def validate(self) -> None:
        """Raises ValueError, naming the field, if a value makes no sense."""
        super().validate()
        at_least(self, 1, "width", "depth")
        at_least(self, 0, "boundary_weight")
        require(not self.compile, "compile", True, "false, because torch.compile cannot differentiate a backward pass")


def build_model(config: Config) -> CoordinateMLPModel:
    """Builds a network for the box of the problem, with new weights."""
    problem = PROBLEMS[config.problem]
    own: Any = {"initializer_gain": gain(ACT2FN[config.hidden_act])} if config.own_gain else {}
    return CoordinateMLPModel(
        CoordinateMLPConfig(
            lower=problem.lower,
            upper=problem.upper,
            hidden_size=config.width,
            num_hidden_layers=config.depth,
            hidden_act=config.hidden_act,
            **own,
        )
    )


def card_values(config: Config, record: dict[str, Any]) -> dict[str, Any]:
    """Returns the values of the model card that are not in the record."""
    return {
        "title": f"{config.problem}, {config.hidden_act}",
        "architecture": f"A network of {config.depth} hidden layers of width {config.width}",
        "problem": f"The output approximates the solution of {PROBLEMS[config.problem].statement}. The network was "
        "trained to satisfy the equation and the conditions at new random points in each step. It saw no other values "
        "of the solution.",
        "pipeline_tag": "other",
        "auto_class": "AutoModel",
        "processor_class": None,
        "loss_unit": "training: residual and boundary; validation: squared error",
        "imported": record["imported"],
        "on_hub": False,
        "limits": "The network solves one equation with one set of conditions, and only on its domain.",
    }


def main(argv: list[str] | None = None) -> None:
    config, preset = parse_config(Config, PRESETS, "demo", argv)
    config.output_dir = config.output_dir or f"runs/pinn-{preset}-{config.act_label}-seed{config.seed}"
    accelerator = make_accelerator(config)
    torch.set_float32_matmul_precision("highest")  # TF32 would limit solutions to three digits
    problem = PROBLEMS[config.problem]
    data = prepare_points(problem, config.data_seed)

    def make() -> Task:
        model = build_model(config)
        return Task(
            name="pinn",
            preset=preset,
            model=model,
            objective=ResidualLoss(model, problem, config.boundary_weight),
            train=data.train,
            validation=data.validation,
            data=data.facts,
            units_per_sample=1,
            unit="points",
            metrics=("relative_l2", "log10_relative_l2"),
            facts={"imported": import_of(model), "float32_matmul": torch.get_float32_matmul_precision()},
        )

    task = new_task(make, config)
    record = train(task, config, accelerator)
    if accelerator.is_main_process:
        save_results(task.model, None, record, **card_values(config, record))
        print_summary(record)


if __name__ == "__main__":
    run_recipe(main)
