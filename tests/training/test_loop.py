"""The loop: pure-function batches, exact normalisation, whole evaluation, resuming, stopping."""

import copy
import json
import math
import os
import signal
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from filelock import FileLock
from torch import nn

from hf_gem.training import record as record_module
from hf_gem.training.config import TrainConfig
from hf_gem.training.data.order import SampleOrder
from hf_gem.training.errors import CheckpointError, ConfigError, DataError, Interrupted, TrainingError
from hf_gem.training.launch import make_accelerator
from hf_gem.training.loop import train
from hf_gem.training.loss import IGNORE, Output
from hf_gem.training.optim import learning_rate
from tests.helpers import losses
from tests.training.toys import CLASSES, WIDTH, Objective, Sequences, make_task

# float32 sums of up to 48 targets in another order, each term rounded once, over six steps whose updates AdamW scales
REORDERED = 6 * 48 * torch.finfo(torch.float32).eps


def config(folder, **fields):
    defaults = {"steps": 6, "global_batch_size": 8, "micro_batch_size": 8, "warmup_steps": 2, "learning_rate": 0.05}
    every = {"log_every": 1, "eval_every": 3, "save_every": 2, "report_to": "none"}
    return TrainConfig(output_dir=str(folder), **{**defaults, **every, **fields})


def run(folder, task=None, **fields):
    task = task or make_task()
    settings = config(folder, **fields)
    return train(task, settings, make_accelerator(settings)), task


def test_the_same_run_twice_is_bit_identical(tmp_path):
    one, _ = run(tmp_path / "a")
    two, _ = run(tmp_path / "b")
    assert one["curves"] == two["curves"]
    assert one["init_hash"] == two["init_hash"]
    other, _ = run(tmp_path / "c", seed=1)  # the seed of dropout; the weights are the task's
    assert other["curves"] != one["curves"]
    assert run(tmp_path / "d", data_seed=1)[0]["curves"] != one["curves"]


def test_micro_batches_do_not_change_the_normalisation(tmp_path):
    task_of = lambda: make_task(type("NoDropout", (Objective,), {"forward": _without_dropout}))  # noqa: E731
    whole, _ = run(tmp_path / "a", task_of())
    parts, _ = run(tmp_path / "b", task_of(), micro_batch_size=2)
    assert parts["sessions"][0]["micro_batch_size"] == 2
    for (_, a), (_, b) in zip(whole["curves"]["loss"], parts["curves"]["loss"], strict=True):
        assert a == pytest.approx(b, rel=REORDERED)


def _without_dropout(self, x, labels):
    return Output(nn.functional.cross_entropy(self.model(x).mT, labels, ignore_index=IGNORE, reduction="sum"))


@pytest.fixture
def seen(monkeypatch):
    """What the optimizer finds at each of its steps: gradients and learning rates."""
    steps = []
    step = torch.optim.AdamW.step

    def spy(self, *args, **kwargs):
        groups = self.param_groups
        steps.append(([p.grad.clone() for g in groups for p in g["params"]], [g["lr"] for g in groups]))
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    return steps


@pytest.mark.parametrize("micro_batch_size", [8, 2])
@pytest.mark.parametrize("clip", [0.0, 0.1])
def test_the_optimizer_gets_the_gradient_of_the_mean_over_targets(tmp_path, seen, micro_batch_size, clip):
    task = make_task(type("NoDropout", (Objective,), {"forward": _without_dropout}))
    plain = copy.deepcopy(task.model)
    run(tmp_path, task, steps=1, warmup_steps=1, micro_batch_size=micro_batch_size, grad_clip=clip)
    batch = Sequences(20).batch(SampleOrder(20, 0).batch(0, 8))
    nn.functional.cross_entropy(plain(batch["x"]).mT, batch["labels"], ignore_index=IGNORE).backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), clip or math.inf)
    assert norm > 0.1  # or clipping would show nothing
    (gradients, _), *_ = seen
    for got, expected in zip(gradients, (plain.weight.grad, plain.bias.grad), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=REORDERED * expected.abs().max().item())


def test_every_step_takes_its_own_batch_and_learning_rate(tmp_path, seen):
    record, task = run(tmp_path)
    assert sorted(task.train.asked[:40]) == sorted([*range(20), *range(20)])  # two passes in five steps of 8
    rates = [learning_rate(step, config(tmp_path)) for step in range(6)]
    assert [used for _, used in seen] == [[rate, rate] for rate in rates]
    assert list(losses(tmp_path, "learning_rate").values()) == rates
    assert record["status"] == "finished"


@pytest.mark.parametrize("variable", ["ACCELERATE_GRADIENT_ACCUMULATION_STEPS"])
def test_what_a_launcher_says_of_accumulation_does_not_scale_gradients(tmp_path, seen, monkeypatch, variable):
    run(tmp_path / "a", steps=1, warmup_steps=1)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv(variable, "4")
    run(tmp_path / "b", steps=1, warmup_steps=1)
    for one, two in zip(seen[0][0], seen[1][0], strict=True):
        assert torch.equal(one, two)


class Killed(BaseException):
    """Stands for a kill: nothing after it runs."""


@pytest.mark.parametrize("at", [1, 3, 4, 5])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, at):
    whole, reference = run(tmp_path / "a")

    class Dying(Sequences):
        def batch(self, indices, draws=None):
            if len(self.asked) == at * 8:
                raise Killed
            return super().batch(indices, draws)

    task = make_task()
    task.train = Dying(20)
    with pytest.raises(Killed):
        run(tmp_path / "b", task)
    record, resumed = run(tmp_path / "b")
    assert record["curves"] == whole["curves"]
    assert len(resumed.train.asked) == (6 - at // 2 * 2) * 8  # from the newest checkpoint, not from the start
    for a, b in zip(reference.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_waiting_for_data_is_on_record(tmp_path):
    record, _ = run(tmp_path)
    waits = list(losses(tmp_path, "data_wait").values())
    assert record["result"]["data_wait"] == pytest.approx(np.median(waits))
    assert all(0 <= wait <= 1 for wait in waits)


def test_every_draw_has_its_number(tmp_path):
    _, task = run(tmp_path, micro_batch_size=2)
    assert task.train.draws == list(range(6 * 8))
    assert task.validation.draws == []


def test_data_that_cannot_be_read_stop_the_run_where_they_are_needed(tmp_path):
    class Broken(Sequences):
        def batch(self, indices, draws=None):
            if 4 * 8 in draws:
                raise OSError("the disk is gone")
            return super().batch(indices, draws)

    task = make_task()
    task.train = Broken(20)
    with pytest.raises(DataError, match=r"cannot read the samples of step 5: OSError: the disk is gone.*same command"):
        run(tmp_path, task)
    record, _ = run(tmp_path)  # and the checkpoint of step 4 is there
    assert [s["first_step"] for s in record["sessions"]] == [1, 5]


def test_the_samples_of_a_run_are_told_by_a_hash(tmp_path):
    record, _ = run(tmp_path / "a")
    task = make_task()
    task.train = Sequences(20, seed=1)
    other, _ = run(tmp_path / "b", task)
    assert record["samples_hash"] != other["samples_hash"]
    again, _ = run(tmp_path / "a")  # from its checkpoint
    assert again["samples_hash"] == record["samples_hash"]


def test_a_finished_run_started_again_only_reports(tmp_path, monkeypatch):
    first, _ = run(tmp_path)
    monkeypatch.setattr(record_module, "environment", lambda: {"commit": "another"})
    second, task = run(tmp_path, micro_batch_size=2)
    assert task.train.asked == []
    assert second["result"] == first["result"]
    assert second["sessions"] == first["sessions"]  # the other commit did nothing, and nothing is said of it
    assert second["run_id"] == first["run_id"]


def test_every_session_that_took_steps_is_on_record(tmp_path):
    class Dying(Sequences):
        def batch(self, indices, draws=None):
            if len(self.asked) == 5 * 8:
                raise Killed
            return super().batch(indices, draws)

    task = make_task()
    task.train = Dying(20)
    with pytest.raises(Killed):
        run(tmp_path, task)
    record, _ = run(tmp_path, micro_batch_size=4)
    spans = [(s["first_step"], s["last_step"], s["micro_batch_size"]) for s in record["sessions"]]
    assert spans == [(1, 4, 8), (5, 6, 4)]


def test_a_run_can_go_on_in_another_folder(tmp_path):
    whole, _ = run(tmp_path / "a", keep_checkpoints=9)
    step = tmp_path / "a" / "checkpoints" / "step_00000004"
    record, _ = run(tmp_path / "b", resume=str(step))
    assert record["curves"] == whole["curves"]
    assert record["result"]["initial_validation_loss"] == whole["result"]["initial_validation_loss"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_stops(tmp_path, number):
    whole, _ = run(tmp_path / "a")

    class Interrupting(Objective):
        def forward(self, x, labels):
            if self.training and self.steps == 2:
                os.kill(os.getpid(), number)
            return super().forward(x, labels)

    task = make_task(Interrupting)
    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="step 3 of 6") as stopped:
        run(tmp_path / "b", task)
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    assert json.loads((tmp_path / "b" / "record.json").read_text())["status"] == "interrupted"
    assert run(tmp_path / "b")[0]["curves"] == whole["curves"]


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_what_is_not_finite_is_never_saved(tmp_path, kind):
    class Breaking(Objective):
        def forward(self, x, labels):
            loss = super().forward(x, labels).loss
            if self.training and self.steps > 2:
                # a NaN loss, or a finite one whose gradient is NaN
                loss = (
                    loss * math.nan if kind == "loss" else loss + 0 * self.model.weight.sum().abs().sub(1e38).pow(0.5)
                )
            return Output(loss)

    task = make_task(Breaking)
    with pytest.raises(TrainingError, match=r"stopped being finite at or before step 3.*--learning_rate"):
        run(tmp_path, task, save_every=1, log_every=5)
    record, _ = run(tmp_path, save_every=1, log_every=5)  # fixed, the same command continues
    assert record["status"] == "finished"


def breaking(*steps, kind="gradient"):
    """An objective whose loss or gradient is NaN the first time that it comes to some steps of training."""
    left = set(steps)

    class Breaking(Objective):
        def forward(self, x, labels):
            loss = super().forward(x, labels).loss
            if self.training and self.steps in left:
                left.remove(self.steps)
                loss = loss * math.nan if kind == "loss" else loss + self.model.weight.sum().sub(1e9).pow(0.5) * 0
            return Output(loss)

    return Breaking


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_step_that_is_not_finite_can_be_skipped(tmp_path, capsys, kind):
    task = make_task(breaking(3, kind=kind))
    before = {}

    class Watching(type(task.objective)):
        def forward(self, x, labels):
            if self.training:
                before[self.steps + 1] = self.model.weight.detach().clone()
            return super().forward(x, labels)

    task.objective.__class__ = Watching
    record, _ = run(tmp_path, task, on_nonfinite="skip")
    assert (record["status"], record["nonfinite"]["skipped_steps"]) == ("finished", 1)
    assert torch.equal(before[4], before[3])  # step 3 moved nothing
    assert not torch.equal(before[5], before[4])
    assert "step 3: loss or gradient is not finite, step skipped" in capsys.readouterr().out
    assert all(p.isfinite().all() for p in task.model.parameters())


def test_skipping_everything_is_an_error(tmp_path):
    with pytest.raises(TrainingError, match="in 10 skipped steps in a row"):
        run(tmp_path, make_task(breaking(*range(3, 20))), on_nonfinite="skip", steps=30)


def test_rolling_back_passes_over_the_batches_that_led_there(tmp_path, capsys):
    task = make_task(breaking(4))
    record, _ = run(tmp_path, task, on_nonfinite="rollback", save_every=1)
    assert record["status"] == "finished"
    assert record["nonfinite"] == {"skipped_steps": 0, "rollbacks": 1, "skipped_batches": 1}
    assert "going back to step 3 and skipping 1 batches" in capsys.readouterr().out
    # Batch 3 led there and batch 4 was made meanwhile; step 4 then takes batch 4, and everything is one batch later.
    assert task.train.draws == [*range(5 * 8), *range(4 * 8, 7 * 8)]
    assert [step for step, _ in record["curves"]["loss"]] == [1, 2, 3, 4, 5, 6]
    assert [s["first_step"] for s in record["sessions"]] == [1]


def test_rolling_back_needs_no_batch_that_was_made_meanwhile(tmp_path):
    """The batch of step 5 cannot be read, once, while step 4 computes and fails."""
    task = make_task(breaking(4))
    read, errors = task.train.batch, [OSError("the disk is gone")]

    def batch(indices, draws=None):
        if errors and draws[0] == 4 * 8:
            raise errors.pop()
        return read(indices, draws)

    task.train.batch = batch
    record, _ = run(tmp_path, task, on_nonfinite="rollback", save_every=1)
    assert (record["status"], errors) == ("finished", [])


def test_a_rolled_back_run_resumes_bit_for_bit(tmp_path):
    whole, reference = run(tmp_path / "a", make_task(breaking(4)), on_nonfinite="rollback", keep_checkpoints=9)
    step = tmp_path / "a" / "checkpoints" / "step_00000004"
    record, task = run(tmp_path / "b", on_nonfinite="rollback", resume=str(step))
    assert record["nonfinite"] == whole["nonfinite"]
    assert record["curves"] == whole["curves"]
    assert torch.equal(task.model.weight, reference.model.weight)


@pytest.mark.parametrize(("steps", "message"), [((1,), "after 0 rollbacks"), ((3, 5, 7, 9, 11), "after 3 rollbacks")])
def test_rolling_back_has_an_end(tmp_path, steps, message):
    with pytest.raises(TrainingError, match=message):
        run(tmp_path, make_task(breaking(*steps)), on_nonfinite="rollback", save_every=1)


def test_a_run_that_was_brought_here_goes_on_here(tmp_path):
    """The same command with --resume PATH, twice: the second time there is something newer here."""
    whole, _ = run(tmp_path / "a", keep_checkpoints=9)
    brought = tmp_path / "last-checkpoint"
    (tmp_path / "a" / "checkpoints" / "step_00000002").rename(brought)

    class Dying(Sequences):
        def batch(self, indices, draws=None):
            if draws is not None and 5 * 8 in draws:
                raise Killed
            return super().batch(indices, draws)

    task = make_task()
    task.train = Dying(20)
    with pytest.raises(Killed):
        run(tmp_path / "b", task, resume=str(brought))
    record, task = run(tmp_path / "b", resume=str(brought))
    assert [s["first_step"] for s in record["sessions"]] == [1, 3, 5]
    assert record["curves"] == whole["curves"]
    assert run(tmp_path / "c", steps=4)[0]["status"] == "finished"
    with pytest.raises(CheckpointError, match="holds a different run than"):
        run(tmp_path / "c", resume=str(brought))


def breaking_evaluation(*steps):
    """An objective that evaluates to NaN the first time that it has trained some numbers of steps."""
    left = set(steps)

    class Breaking(Objective):
        def forward(self, x, labels):
            loss = super().forward(x, labels).loss
            if not self.training and self.steps in left:
                left.remove(self.steps)
                loss = loss * math.nan
            return Output(loss)

    return Breaking


@pytest.mark.parametrize("step", [3, 6])
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_validation_loss_that_is_not_finite_ends_a_run(tmp_path, step, on_nonfinite):
    with pytest.raises(TrainingError, match="stopped being finite at or before step"):
        run(tmp_path, make_task(breaking_evaluation(step)), save_every=3, on_nonfinite=on_nonfinite)
    record = json.loads((tmp_path / "record.json").read_text(), parse_constant=pytest.fail)
    assert (record["status"], record["step"], record["result"]["validation_loss"]) == ("diverged", step, None)
    saved = [path.name for path in (tmp_path / "checkpoints").glob("step_*")]
    assert saved == (["step_00000003"] if step == 6 else [])
    assert run(tmp_path, save_every=3)[0]["status"] == "finished"  # fixed, the same command continues


def test_a_validation_loss_that_is_not_finite_can_be_rolled_back(tmp_path, capsys):
    task = make_task(breaking_evaluation(6))
    record, _ = run(tmp_path, task, on_nonfinite="rollback")
    assert (record["status"], record["nonfinite"]["rollbacks"]) == ("finished", 1)
    assert "going back to step 4 and skipping 2 batches" in capsys.readouterr().out
    assert [step for step, _ in record["curves"]["validation_loss"]] == [0, 3, 6]
    assert math.isfinite(record["result"]["validation_loss"])


def test_a_stop_file_saves_and_stops(tmp_path, monkeypatch):
    file = tmp_path / "stop"
    monkeypatch.setenv("HF_GEM_STOP_FILE", str(file))

    class Telling(Objective):
        def forward(self, x, labels):
            if self.training and self.steps == 2:
                file.touch()
            return super().forward(x, labels)

    with pytest.raises(Interrupted, match="step 3 of 6") as stopped:
        run(tmp_path / "run", make_task(Telling))
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    file.unlink()
    assert run(tmp_path / "run")[0]["status"] == "finished"


def test_a_second_sigterm_does_not_kill_what_is_being_saved(tmp_path):
    class Interrupting(Objective):
        def forward(self, x, labels):
            if self.training and self.steps == 2:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)
            return super().forward(x, labels)

    with pytest.raises(Interrupted, match="saved"):
        run(tmp_path, make_task(Interrupting))


def test_what_the_data_raise_is_not_taken_for_a_full_disk(tmp_path):
    class Broken(Sequences):
        def batch(self, indices, draws=None):
            raise OSError("cannot identify image file")

    task = make_task()
    task.validation = Broken(7)
    with pytest.raises(DataError, match="cannot read the evaluation samples: OSError: cannot identify"):
        run(tmp_path, task)


def test_tied_weights_are_not_averaged(tmp_path):
    task = make_task()
    task.model.other = nn.Linear(WIDTH, CLASSES)
    task.model.other.weight = task.model.weight
    with pytest.raises(ConfigError, match="--ema_decay would average them twice"):
        run(tmp_path, task, ema_decay=0.9)


def test_a_batch_that_does_not_divide_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(Accelerator, "num_processes", 3)
    with pytest.raises(ConfigError, match=r"got --global_batch_size 8 on 3 processes\. It must be a multiple of 3"):
        run(tmp_path)


def test_two_runs_do_not_write_to_one_folder(tmp_path):
    tmp_path.mkdir(exist_ok=True)
    with FileLock(tmp_path / ".lock"), pytest.raises(ConfigError, match="another process is training"):
        run(tmp_path)


def test_a_folder_with_a_readme_of_its_own_is_refused(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match="was not written by a run"):
        run(tmp_path)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(TrainingError, match=r"cannot write to .*another --output_dir"):
            run(folder)


def test_the_record_says_what_ran(tmp_path):
    record, task = run(tmp_path, report_to="tensorboard")
    on_disk = json.loads((tmp_path / "record.json").read_text())
    assert on_disk == json.loads(json.dumps({"schema": 1, **record}))
    assert on_disk["config"]["steps"] == 6
    assert (on_disk["data"], on_disk["mixed_precision"]) == ({"hash": "d"}, "no")
    (session,) = on_disk["sessions"]
    assert (session["num_processes"], session["first_step"], session["last_step"]) == (1, 1, 6)
    assert session["versions"]["torch"] == torch.__version__
    assert on_disk["num_parameters"] == sum(p.numel() for p in task.model.parameters())
    assert len(on_disk["curves"]["loss"]) == 6
    assert losses(tmp_path) == dict(on_disk["curves"]["loss"])
    assert list(tmp_path.rglob("events.out.tfevents*"))


@pytest.mark.parametrize(
    "fields", [{"compile": True}, {"mixed_precision": "bf16"}, {"compile": True, "mixed_precision": "bf16"}], ids=str
)
def test_compiled_and_mixed_precision_runs_follow_the_plain_one(tmp_path, fields):
    plain, _ = run(tmp_path / "a", make_task(type("NoDropout", (Objective,), {"forward": _without_dropout})))
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.utils.counters.clear()
    other, _ = run(tmp_path / "b", make_task(type("NoDropout", (Objective,), {"forward": _without_dropout})), **fields)
    assert bool(torch._dynamo.utils.counters["frames"]["ok"]) == bool(fields.get("compile"))
    # One rounding of inputs, weights and logits to the working precision; the losses here are of order one.
    bound = 4 * torch.finfo(torch.bfloat16).eps if "mixed_precision" in fields else REORDERED
    for (_, a), (_, b) in zip(plain["curves"]["loss"], other["curves"]["loss"], strict=True):
        assert a == pytest.approx(b, rel=bound)
    assert other["mixed_precision"] == fields.get("mixed_precision", "no")


def test_precision_is_part_of_what_a_run_is(tmp_path, monkeypatch):
    task = make_task()
    monkeypatch.setattr(task.train, "batch", MagicMock(side_effect=[task.train.batch(np.arange(8))] * 3 + [Killed]))
    with pytest.raises(Killed):
        run(tmp_path, task)
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(CheckpointError, match=r"mixed_precision is 'no' in .* and 'bf16' in"):
        run(tmp_path)


def test_a_run_with_evaluations_compiles_one_graph(tmp_path, monkeypatch):
    """Neither the modes of evaluation nor the odd size of its last batch is compiled."""
    compile_with = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_with(module, backend="aot_eager"))
    AcceleratorState._reset_state(reset_partial_state=True)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    task = make_task(type("NoDropout", (Objective,), {"forward": _without_dropout}))
    record, _ = run(tmp_path, task, compile=True, micro_batch_size=4)
    assert len(record["curves"]["validation_loss"]) == 3  # of 7 samples, 4 at a time
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
