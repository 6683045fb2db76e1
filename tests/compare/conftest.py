"""Studies with a recipe that takes no time."""

import pytest

from hf_gem.compare.plan import Plan
from hf_gem.compare.study import Study, freeze

# A recipe whose loss is lowest at a learning rate of 0.01, and lower with gem_n2; it counts how often it was started.
TOY = """
import json, math, random, sys
from pathlib import Path
from hf_gem.training.record import environment
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:])
folder = Path(flags["output_dir"]); folder.mkdir(parents=True, exist_ok=True)
with open(folder.parent.parent / "started.txt", "a") as file:
    file.write(folder.name + "\\n")
if flags.get("slow"):
    import time
    time.sleep(60 if not (folder.parent.parent / "fast").exists() else 0)
act, rate, seed = flags["hidden_act"], float(flags["learning_rate"]), int(flags["seed"])
if flags.get("breaks") == folder.name and not (folder / "broken").exists():
    (folder / "broken").touch()
    sys.exit("out of memory")
best = float(flags.get(f"best_for_{act}", flags.get("best", 0.01)))
loss = 3 + 0.1 * math.log(rate / best) ** 2 + random.Random(seed).gauss(0, 0.05)
loss += random.Random(seed * 7 + len(act)).gauss(0, 0.002) - 0.02 * (act == "gem_n2")
status = "diverged" if rate > float(flags.get(f"limit_for_{act}", flags.get("limit", 1))) else "finished"
session = {**environment(), "seconds": 3.0}
gain = act if flags.get("own_gain") else ""
record = {"status": status, "result": {"validation_loss": loss}, "sessions": [session],
          "data": {"hash": flags.get("data", "test")},
          "init_hash": f"w{seed}{gain}", "init_signs_hash": f"s{seed}",
          "order_hash": f"o{seed}", "samples_hash": f"x{seed}",
          "nonfinite": {"skipped_batches": 3 if flags.get("skips") == folder.name else 0},
          "recipe": "toy", "run_id": folder.name, "config": {**flags, "dataset": "toy"},
          "curves": {"validation_loss": [[0, 5.0], [10, loss]]}}
if flags.get("unpaired"):
    record[flags["unpaired"]] += act
(folder / "record.json").write_text(json.dumps(record))
(folder / "model.safetensors").write_text("weights")
"""
PLAN = {
    "name": "toy", "recipe": "toy", "preset": "demo", "baseline": "relu", "metric": "validation_loss",
    "arms": {"relu": ["relu"], "gem": ["gem", "gem_n2"], "silu": ["silu"]}, "smallest_effect": 0.005,
    "learning_rates": [0.005, 0.01, 0.02], "tuning_seeds": [100, 101], "final_seeds": list(range(8)),
}  # fmt: skip


@pytest.fixture
def study(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "toy.py").write_text(TOY)

    def make(folder="study", allow_mixed=False, **changes):
        freeze(Plan(**{**PLAN, **changes}), tmp_path / folder)
        return Study(tmp_path / folder, tmp_path / "recipes", allow_mixed)

    return make
