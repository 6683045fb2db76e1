"""A checkpoint is complete or absent, and says so."""

import json
import resource
import shutil
import signal

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_gem.training import checkpoint
from hf_gem.training.checkpoint import CheckpointStore
from hf_gem.training.errors import CheckpointError

IDENTITY = {"steps": 10, "hidden_act": "gem", "data_hash": "abc"}


class Setup:
    """A small model whose weights say which step they belong to."""

    def __init__(self, folder, identity=IDENTITY, keep=2):
        self.accelerator = Accelerator(cpu=True)
        self.model = nn.Linear(64, 64)
        optimizer = torch.optim.AdamW(self.model.parameters())
        self.model, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.store = CheckpointStore(folder, keep, identity)

    def save(self, step):
        self.model.weight.data.fill_(step)
        self.model(torch.ones(1, 64)).sum().backward()
        return self.store.save(self.accelerator, step, {"saved": step})

    def restore(self, resume="auto"):
        step, state = self.store.restore(self.accelerator, resume)
        assert state == ({"saved": step} if step else None)
        return step


def test_the_newest_is_restored_and_old_ones_are_deleted(tmp_path):
    setup = Setup(tmp_path / "c")
    for step in (2, 4, 100):
        setup.save(step)
    assert [p.name for p in setup.store.complete()] == ["step_00000100", "step_00000004"]
    assert not list(tmp_path.glob("c/.*"))
    other = Setup(tmp_path / "c")
    assert other.restore() == 100
    assert (other.model.weight == 100).all()


def test_nothing_to_restore_is_step_zero(tmp_path):
    assert Setup(tmp_path / "c").restore() == 0
    assert Setup(tmp_path / "c").restore("never") == 0


@pytest.mark.parametrize("how", ["unmarked", "half-written mark", "left beside its place"])
def test_what_a_kill_leaves_behind_is_not_a_checkpoint(tmp_path, how):
    setup = Setup(tmp_path / "c")
    setup.save(2)
    newest = setup.save(4)
    if how == "unmarked":
        (newest / "COMPLETE").unlink()
    elif how == "half-written mark":
        (newest / "COMPLETE").rename(newest / ".COMPLETE")
    else:
        newest.rename(newest.with_name(f".{newest.name}.partial"))
    assert setup.restore() == 2
    assert setup.save(4).exists()  # and does not stand in the way of the next one
    assert setup.restore() == 4


def damage(path, how):
    model = path / "model.safetensors"
    content = bytearray(model.read_bytes())
    if how == "truncated":
        model.write_bytes(content[:-10])
    elif how == "flipped":
        content[-1] ^= 1
        model.write_bytes(content)
    else:
        model.unlink()


@pytest.mark.parametrize(("how", "words"), [("truncated", "bytes"), ("flipped", "SHA-256"), ("missing", "is missing")])
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, how, words):
    setup = Setup(tmp_path / "c")
    setup.save(2)
    damage(setup.save(4), how)
    with pytest.warns(UserWarning, match=rf"step_00000004.*model\.safetensors.*{words}"):
        assert setup.restore() == 2
    assert (setup.model.weight == 2).all()
    setup.save(3)  # older than the damaged one, which must not count as newer when old ones are deleted
    assert [p.name for p in setup.store.complete()] == ["step_00000003", "step_00000002"]


def test_all_damaged_is_an_error_and_not_a_new_start(tmp_path):
    setup = Setup(tmp_path / "c")
    damage(setup.save(2), "truncated")
    with pytest.warns(UserWarning, match="passing over"), pytest.raises(CheckpointError, match="every checkpoint"):
        setup.restore()


def test_one_can_be_named(tmp_path):
    setup = Setup(tmp_path / "c")
    older = setup.save(2)
    setup.save(4)
    assert setup.restore(str(older)) == 2
    setup.save(3)
    assert [p.name for p in setup.store.complete()] == ["step_00000003", "step_00000002"]
    assert (
        tmp_path / "c" / "set_aside_step_00000004" / "COMPLETE"
    ).exists()  # what lay ahead is out of the way, not lost
    with pytest.raises(CheckpointError, match=r"nowhere.*cannot be continued"):
        setup.restore(str(tmp_path / "nowhere"))


def test_another_run_is_not_continued(tmp_path):
    Setup(tmp_path / "c").save(2)
    other = Setup(tmp_path / "c", {**IDENTITY, "hidden_act": "gelu"})
    with pytest.raises(CheckpointError, match=r"hidden_act: 'gem' in .*, 'gelu' in .*--output_dir"):
        other.restore()
    with pytest.raises(CheckpointError, match="--resume is never"):
        Setup(tmp_path / "c").restore("never")


def test_a_full_disk_is_an_error_and_leaves_the_last_one_good(tmp_path):
    setup = Setup(tmp_path / "c")
    setup.save(2)
    # A file-size limit makes the kernel refuse the write in the middle, as a full disk does.
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step 4 cannot be written.*GB free.*step_00000002 is complete"):
            setup.save(4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.glob("c/.*"))
    assert setup.restore() == 2


def test_leftovers_are_swept_away(tmp_path):
    setup = Setup(tmp_path / "c")
    for name in (".step_00000001.partial", "step_00000001"):
        (tmp_path / "c" / name).mkdir(parents=True)
        (tmp_path / "c" / name / "model.safetensors").touch()
    setup.save(2)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step_00000002"]


def test_everything_is_flushed_before_it_is_marked_complete(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(checkpoint, "flush", lambda path: events.append(path.name))
    write = checkpoint.write_atomically
    monkeypatch.setattr(checkpoint, "write_atomically", lambda path, text: events.append("mark") or write(path, text))
    path = Setup(tmp_path / "c").save(2)
    assert set(events[: events.index("mark")]) == {p.name for p in path.iterdir()} - {"COMPLETE"}


def test_the_manifest_lists_every_file(tmp_path):
    path = Setup(tmp_path / "c").save(2)
    manifest = json.loads((path / "COMPLETE").read_text())
    assert manifest.keys() == {p.name for p in path.iterdir()} - {"COMPLETE"}
    assert {"model.safetensors", "optimizer.bin", "state.json"} <= manifest.keys()
    shutil.copytree(path, tmp_path / "copy")  # a checkpoint can be moved
    assert Setup(tmp_path / "c").restore(str(tmp_path / "copy")) == 2
