"""The fuzz targets: readers of names, plans and records, with seed inputs.

A target takes any bytes. Either a readable ValueError refuses them, or they are read, written and read again with the
same result. Everything else is a bug.
"""

import copy
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from torch import nn

import hf_gem
from hf_gem import parse
from hf_gem.compare.plan import Plan, PlanError, load_plan
from hf_gem.family.names import is_claimed, is_name
from hf_gem.files import read_json
from hf_gem.surgery.convert import convert
from hf_gem.surgery.plans import apply_plan, plan_of
from hf_gem.training.record import read_record, write_record
from tests.fuzz.run import ROOT

LONGEST = 600  # maximum number of characters in a message
_FOLDER = tempfile.TemporaryDirectory()


def _refused(error: ValueError) -> None:
    assert 20 < len(str(error)) < LONGEST, (len(str(error)), error)


def _file(data: bytes, name: str) -> Path:
    path = Path(_FOLDER.name, name)
    path.write_bytes(data)
    return path


def name(data: bytes) -> None:
    """Checks that a string gives an error, or a spec whose name gives the same spec."""
    text = data.decode("utf-8", "surrogateescape")
    try:
        spec = parse(text)
    except ValueError as error:
        assert not is_name(text)
        _refused(error)
        return
    assert is_name(text)
    assert is_claimed(text)
    assert parse(spec.name) == spec


def study_plan(data: bytes) -> None:
    """Checks that a study plan in YAML is the same after a round trip through JSON, as in a frozen plan."""
    try:
        plan = load_plan(_file(data, "plan.yaml"))
    except PlanError as error:
        _refused(error)
        return
    frozen = json.dumps(asdict(plan)).encode()
    assert Plan(**read_json(_file(frozen, "plan.json"), dict)) == plan
    assert list(plan.tuning_runs()) == list(plan.tuning_runs())


def _model() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.GELU(), nn.ReLU()))


_STOCK = _model()


def conversion(data: bytes) -> None:
    """Checks that a conversion plan only changes activations and the model then has this plan, or nothing changes."""
    model = copy.deepcopy(_STOCK)
    try:
        plan = json.loads(data)
    except (ValueError, RecursionError):
        return
    try:
        missing = apply_plan(plan, model, hf_gem.get_activation)
    except ValueError as error:
        _refused(error)
        assert str(model) == str(_STOCK)
        return
    made = plan_of(model) or {"activations": {}}
    assert not missing
    assert type(model[0]) is nn.Linear
    if plan["model"] == type(model).__name__:  # a plan of another class skips what this one lacks
        asked, done = ({path for paths in of["activations"].values() for path in paths} for of in (plan, made))
        assert done == asked


def record(data: bytes) -> None:
    """Checks that a record is the same after it is written and read again."""
    try:
        found = read_record(_file(data, "record.json"))
    except ValueError as error:
        _refused(error)
        return
    written = Path(_FOLDER.name, "written.json")
    write_record(written, found)
    assert read_record(written).keys() >= found.keys()


def _conversions() -> list[bytes]:
    model = _model()
    convert(model, "segem_n2_eps0.01")
    return [json.dumps(plan_of(model)).encode()]


def _files(folder: str, pattern: str, most: int) -> list[bytes]:
    return [path.read_bytes() for path in sorted((ROOT / folder).glob(pattern)) if path.stat().st_size < most]


_NAMES = b"gem_n2 egem egem_n2_eps1em6 segem_eps0.01_learnable EGEM-N2 gem2 e_gem_eps1e-400".split()
# Target -> seed inputs.
TARGETS: dict[Callable[[bytes], None], Callable[[], list[bytes]]] = {
    name: lambda: _NAMES,
    study_plan: lambda: _files("recipes/plans", "*.yaml", 5_000),
    conversion: _conversions,
    record: lambda: _files("results", "**/records/*.json", 20_000)[:20],
}
# Words that random bytes hardly ever contain.
WORDS = {
    name: ["gem", "egem", "segem", "_n", "_eps", "em", "_learnable"],
    study_plan: [
        *("!!int", "!!float", "!!timestamp", "!!binary", "!!bool", "!!set", "!!python/name:", "&a", "*a", "<<: "),
        *("0x", "2001-01-01", ".inf", ".nan", "1e400", "\\ud800", "arms:", "flags:", "final_seeds:", "tuning_seeds:"),
    ],
    conversion: ["gem_n2", "activations", "fields", "parts", "version", "2.0", "NaN", "1e999", "null"],
    record: ["evaluation", "sessions", "curves", "result", "validation", "NaN", "-1e999", "null", "\\ud800"],
}
