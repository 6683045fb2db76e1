"""What a run tries before it trains."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_gem.training.config import TrainConfig
from hf_gem.training.loss import Output
from hf_gem.training.trial import freeze_unused
from tests.training.toys import WIDTH, Objective, make_task


class Unused(Objective):
    """It has statistics, which move in training, and parameters that its loss uses never, or in one mode only."""

    def __init__(self, model):
        super().__init__(model)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.token, self.late, self.early = (nn.Parameter(torch.zeros(())) for _ in range(3))

    def forward(self, x, labels):
        x = x + (self.early if self.training else self.late)
        return Output(super().forward(self.norm(x.mT).mT, labels).loss)


@pytest.mark.parametrize(("num_processes", "is_fsdp2"), [(2, False), (2, True), (1, False)])
def test_what_the_loss_does_not_use_is_frozen_under_ddp(num_processes, is_fsdp2, capsys):
    task = make_task(Unused)
    before = {name: tensor.clone() for name, tensor in task.objective.state_dict().items()}
    random = torch.get_rng_state()
    accelerator = SimpleNamespace(
        num_processes=num_processes,
        is_fsdp2=is_fsdp2,
        is_main_process=True,
        device=torch.device("cpu"),
        autocast=Accelerator(cpu=True).autocast,
    )
    freeze_unused(task, TrainConfig(), accelerator, 4)
    ddp = num_processes > 1 and not is_fsdp2
    assert [name for name, p in task.objective.named_parameters() if not p.requires_grad] == ["token"] * ddp
    assert ("does not use token. Not trained" in capsys.readouterr().out) == ddp
    assert len(task.train.asked) == 4 * ddp
    assert all(p.grad is None for p in task.objective.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in task.objective.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
