"""A checkpoint is complete or absent, and says so."""

import contextlib
import copy
import hashlib
import json
import pickle
import resource
import shutil
import signal
import warnings

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from hf_gem.training import checkpoint
from hf_gem.training.checkpoint import CheckpointStore
from hf_gem.training.errors import CheckpointError
from tests.helpers import TouchesWhenUnpickled

IDENTITY = {"steps": 10, "hidden_act": "gem", "data_hash": "abc"}


def saved(step):
    counts = {"skipped_steps": 0, "rollbacks": 0, "skipped_batches": 0}
    return {"log": [{"step": step, "loss": 0.5}], "nonfinite": counts}


class Setup:
    """A small model whose weights say which step they belong to."""

    def __init__(self, folder, identity=IDENTITY, keep=2, average=False):
        self.accelerator = Accelerator(cpu=True)
        self.model = nn.Linear(64, 64)
        optimizer = torch.optim.AdamW(self.model.parameters())
        self.model, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.averaged = copy.deepcopy(self.model) if average else None
        self.store = CheckpointStore(folder, keep, identity, self.averaged)

    def folder_of(self, step):
        return self.store.folder / f"step_{step:08d}"

    def save(self, step):
        self.model.weight.data.fill_(step)
        self.model(torch.ones(1, 64)).sum().backward()
        return self.store.save(self.accelerator, step, saved(step))

    def restore(self, resume="auto"):
        step, state = self.store.restore(self.accelerator, resume)
        assert state == (saved(step) if step else None)
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
    with (
        pytest.warns(UserWarning, match="skipping the damaged"),
        pytest.raises(CheckpointError, match="every checkpoint"),
    ):
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
    with pytest.raises(CheckpointError, match=r"cannot resume from .*nowhere"):
        setup.restore(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("spelling", ["link/step_00000002", "c/../c/step_00000002", "c/step_00000002/../step_00000002"])
def test_a_path_inside_the_folder_goes_back_however_it_is_spelled(tmp_path, spelling):
    setup = Setup(tmp_path / "c")
    setup.save(2)
    setup.save(4)
    (tmp_path / "link").symlink_to(tmp_path / "c")
    assert setup.restore(str(tmp_path / spelling)) == 2
    assert [p.name for p in setup.store.complete()] == ["step_00000002"]


def test_the_same_command_goes_back_once_and_then_continues(tmp_path, capsys):
    setup = Setup(tmp_path / "c")
    named = str(setup.save(2))
    setup.save(4)
    first = Setup(tmp_path / "c")
    assert first.restore(named) == 2
    assert first.restore() == 2  # as after a loss that is not finite
    first.save(3)
    assert capsys.readouterr().out == ""
    second = Setup(tmp_path / "c")
    assert second.restore(named) == 3
    assert "has continued from" in capsys.readouterr().out
    for step in (5, 6):
        second.save(step)
    assert not (tmp_path / "c" / "step_00000002").exists()  # newer ones have taken its place
    assert Setup(tmp_path / "c").restore(named) == 6
    assert [p.name for p in tmp_path.glob("c/set_aside_*")] == ["set_aside_step_00000004"]
    assert Setup(tmp_path / "c").restore(str(setup.folder_of(5))) == 5  # another path goes back again


def test_another_run_is_not_continued(tmp_path):
    Setup(tmp_path / "c").save(2)
    other = Setup(tmp_path / "c", {**IDENTITY, "hidden_act": "gelu"})
    with pytest.raises(CheckpointError, match=r"hidden_act is 'gem' in .* and 'gelu' in .*--output_dir"):
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
        with pytest.raises(CheckpointError, match=r"cannot write .* step 4 .*GB free.*step_00000002 is complete"):
            setup.save(4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.glob("c/.*"))
    assert setup.restore() == 2


def test_leftovers_are_swept_away(tmp_path):
    setup = Setup(tmp_path / "c")
    for name in (".step_00000001.partial", "step_00000001"):  # a kill in the middle of a save
        (tmp_path / "c" / name).mkdir(parents=True)
        (tmp_path / "c" / name / "PARTIAL").touch()
        (tmp_path / "c" / name / "model.safetensors").touch()
    half_deleted = setup.save(2)
    (half_deleted / "COMPLETE").rename(half_deleted / "PARTIAL")
    setup.save(3)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["step_00000003"]


def test_nothing_is_deleted_that_no_run_has_written(tmp_path):
    """Folders and files of others, whatever they are called, and whatever lists of files say."""
    setup = Setup(tmp_path / "c", keep=1)
    mine = [
        "step_notes/a",
        "step_best/COMPLETE",
        "step_00000001/thesis.tex",
        ".step_00000003.partial/a",
        "step_x",
        "d/e",
    ]
    for name in mine:
        (tmp_path / "c" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "c" / name).write_text(name)
    old = setup.save(2)
    (old / "mine").write_text("mine")
    (old / "folder").mkdir()
    (old / "folder" / "mine").write_text("mine")
    setup.save(3)  # where something lies in its place
    lying = setup.save(4)
    for name in ("../../d/e", str(tmp_path / "c" / "d" / "e")):
        manifest = json.loads((lying / "COMPLETE").read_text())
        (lying / "COMPLETE").write_text(json.dumps({**manifest, name: {"bytes": 0, "sha256": ""}}))
        with pytest.warns(UserWarning, match="keeping .*, because its list of files cannot be read"):
            setup.save(5)
        (lying / "PARTIAL").unlink()
        shutil.move(setup.folder_of(5), tmp_path / "away")
        shutil.rmtree(tmp_path / "away")
        lying = setup.save(4)
    checkpoint.remove_all(tmp_path / "c")
    aside = {".step_00000003.partial/a": "set_aside_.step_00000003.partial/a"}
    assert all((tmp_path / "c" / aside.get(name, name)).read_text() == name for name in mine)
    assert sorted(p.relative_to(old).as_posix() for p in old.rglob("*")) == ["folder", "folder/mine", "mine"]
    assert not (tmp_path / "c" / "step_00000003").exists()


def test_a_folder_with_links_is_left_as_it_is(tmp_path):
    """Through neither a linked checkpoint nor a linked folder inside of one anything is deleted elsewhere."""
    elsewhere = Setup(tmp_path / "elsewhere").save(2)
    setup = Setup(tmp_path / "c", keep=1)
    inside = setup.save(2)
    (inside / "sub").symlink_to(elsewhere)
    manifest = json.loads((inside / "COMPLETE").read_text())
    entry = manifest["state.json"]
    (inside / "COMPLETE").write_text(json.dumps({**manifest, "sub/state.json": entry}))
    (tmp_path / "c" / "step_00000001").symlink_to(elsewhere)
    before = sorted(p.name for p in elsewhere.iterdir())
    setup.save(3)
    assert sorted(p.name for p in elsewhere.iterdir()) == before
    assert not (inside / "state.json").exists()


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


def plant(path, change):
    """Changes a checkpoint as somebody would who wants it to be loaded: the list of files agrees with it."""
    change(path)
    manifest = {}
    for file in sorted(p for p in path.rglob("*") if p.is_file() and p.name != "COMPLETE"):
        entry = {"bytes": file.stat().st_size, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
        manifest[file.relative_to(path).as_posix()] = entry
    (path / "COMPLETE").write_text(json.dumps(manifest))
    return path


@pytest.mark.parametrize("form", ["pickle", "torch.save"])
@pytest.mark.parametrize(
    "name",
    [
        *(
            "optimizer.bin",
            "random_states_0.pkl",
            "scaler.pt",
            "scheduler.bin",
            "sampler.bin",
            "custom_checkpoint_0.pkl",
        ),
        *("pytorch_model.bin", "averaged.safetensors", "model.safetensors", "state.json", "COMPLETE"),
    ],
)
def test_nothing_in_a_checkpoint_is_run(tmp_path, name, form):
    touched = tmp_path / "touched"
    evil = TouchesWhenUnpickled(touched)

    def change(path):
        if name == "pytorch_model.bin":
            (path / "model.safetensors").unlink()
        (path / name).write_bytes(pickle.dumps(evil)) if form == "pickle" else torch.save({"state": evil}, path / name)

    path = plant(Setup(tmp_path / "c", average=True).save(2), change)
    with contextlib.suppress(CheckpointError), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        Setup(tmp_path / "d", average=True).restore(str(path))
        Setup(tmp_path / "c", average=True).restore()
    assert not touched.exists()


def test_what_is_planted_would_run(tmp_path):
    """What shows that the tests above can fail."""
    pickle.loads(pickle.dumps(TouchesWhenUnpickled(tmp_path / "touched")))
    assert (tmp_path / "touched").exists()


def test_averaged_weights_are_restored(tmp_path):
    setup = Setup(tmp_path / "c", average=True)
    with torch.no_grad():
        setup.averaged.weight.fill_(0.5)
    path = setup.save(2)
    assert not list(path.glob("custom*"))
    other = Setup(tmp_path / "c", average=True)
    assert other.restore() == 2
    assert (other.averaged.weight == 0.5).all()
    old = plant(path, lambda path: (path / "averaged.safetensors").rename(path / "custom_checkpoint_0.pkl"))
    with pytest.raises(CheckpointError, match=r"has no averaged\.safetensors \(older versions"):
        other.restore(str(old))


STATE = {"step": 2, "identity": IDENTITY, "state": saved(2)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({**STATE, "step": -5}, "step must be at least 1, got -5"),
        ({**STATE, "step": 3}, "step must be that of step_00000002, got 3"),
        ({**STATE, "step": "2"}, "step must be a whole number, got '2'"),
        ({**STATE, "step": True}, "step must be a whole number, got True"),
        ({**STATE, "identity": [1]}, r"identity must be a mapping, got \[1\]"),
        ({**STATE, "state": {**saved(2), "nonfinite": [[]]}}, r"state\.nonfinite must be a mapping, got \[\[\]\]"),
        ({**STATE, "state": 4}, "state must be a mapping, got 4"),
        ({"step": 2, "identity": {}}, "state is missing"),
        ({}, "identity is missing|step is missing"),
        ([], "must be a mapping"),
        ("[" * 50_000, "nested too deeply"),
        ("", "cannot be read"),
    ],
)
def test_a_state_that_no_run_saves_is_named_with_its_field(tmp_path, state, message):
    text = state if isinstance(state, str) else json.dumps(state)
    path = plant(Setup(tmp_path / "c").save(2), lambda path: (path / "state.json").write_text(text))
    with pytest.raises(CheckpointError, match=rf"state\.json.*(?:{message})"):
        Setup(tmp_path / "c").restore(str(path))


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ("", "COMPLETE cannot be read"),
        ("[]", r"COMPLETE: must be a mapping, got \[\]"),
        ("{}", r"list of files lacks state\.json"),
        ('{"state.json": 3}', r"COMPLETE: \['state.json'\] must be a mapping, got 3"),
        ('{"state.json": {"bytes": "3", "sha256": ""}}', r"\['state.json'\].bytes must be a whole number, got '3'"),
        ('{"state.json": {}}', r"\['state.json'\].(?:bytes|sha256) is missing"),
        ('{"state.json": {"bytes": 1, "sha256": ""}, "../x": {"bytes": 1, "sha256": ""}}', r"lists '\.\./x'"),
        ('{"state.json": {"bytes": 1, "sha256": ""}, "/etc/x": {"bytes": 1, "sha256": ""}}', r"lists '/etc/x'"),
        ("[" * 50_000, "nested too deeply"),
    ],
)
def test_a_list_of_files_that_is_none(tmp_path, manifest, message):
    path = Setup(tmp_path / "c").save(2)
    (path / "COMPLETE").write_text(manifest)
    with pytest.raises(CheckpointError, match=message):
        Setup(tmp_path / "c").restore(str(path))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "random_states_7.pkl", "optimizer_0/.metadata"])
def test_what_is_not_listed_is_not_loaded(tmp_path, name):
    path = Setup(tmp_path / "c").save(2)
    manifest = json.loads((path / "COMPLETE").read_text())
    (path / "COMPLETE").write_text(json.dumps({key: entry for key, entry in manifest.items() if key != name}))
    (path / name).parent.mkdir(exist_ok=True)
    (path / name).touch()
    with pytest.raises(CheckpointError, match=f"{name} is not in its list of files"):
        Setup(tmp_path / "c").restore(str(path))


def test_files_that_nothing_loads_do_no_harm(tmp_path):
    path = Setup(tmp_path / "c").save(2)
    for name in (".DS_Store", "._model.safetensors", "notes.txt"):
        (path / name).touch()
    assert Setup(tmp_path / "c").restore() == 2
