"""A recipe that takes no time, a plan for it, and its studies, run in this process or in processes of their own."""

import functools
import threading
import time
from unittest import mock

from hf_gem.compare.driver import Driver
from hf_gem.compare.executors import InProcess
from hf_gem.training import record

# Its loss is lowest at a learning rate of 0.01, and lower with gem_n2; it counts how often it was started.
TOY = """
import json, math, os, random, sys
from pathlib import Path
from hf_gem.training.environment import environment
flags = dict(a[2:].split("=", 1) for a in sys.argv[1:])
folder = Path(flags["output_dir"]); folder.mkdir(parents=True, exist_ok=True)
with open(folder.parent.parent / "started.txt", "a") as file:
    file.write(folder.name + "\\n")
(folder / "pid").write_text(str(os.getpid()))
if flags.get("slow"):
    import time
    time.sleep(600 if not (folder.parent.parent / "fast").exists() else 0)
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
result = {"validation_loss": loss}
if "test" in flags:  # where the two rates that are best by validation are others
    result["test_loss"] = 2 + abs(math.log(rate / best))
record = {"status": status, "result": result, "sessions": [session],
          "data": {"hash": flags.get("data", "test")},
          "init_hash": f"w{seed}{gain}", "init_signs_hash": f"s{seed}",
          "order_hash": f"o{seed}", "samples_hash": f"x{seed}",
          "nonfinite": {"skipped_batches": 3 if flags.get("skips") == folder.name else 0},
          "recipe": "toy", "run_id": folder.name,
          "config": {**flags, "dataset": "toy", "learning_rate": rate, "seed": seed},
          "curves": {"validation_loss": [[0, 5.0], [10, loss]]}}
if flags.get("documents"):
    counts, spread = [100 + document % 3 for document in range(int(flags["documents"]))], float(flags.get("spread", 0))
    losses = []
    for document, count in enumerate(counts):
        own = random.Random(f"{act} {document}").gauss(0, spread)
        losses.append(count * (loss + own + random.Random(f"{act} {seed} {document}").gauss(0, 0.01)))
    record["result"] |= {"validation_loss": sum(losses) / sum(counts), "unit": "tokens"}
    parts = {"num_units": len(counts), "counts": counts, "losses": losses}
    record["evaluation"] = {"unit": "documents", "validation": parts}
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
TWO_ARMS = {"learning_rates": [0.01], "arms": {"relu": ["relu"], "gem": ["gem"]}, "tuning_seeds": []}  # nothing to tune


environment = functools.cache(record.environment)  # which takes longer than all else that the toy does


class InThisProcess(InProcess):
    """As `--jobs 0` has it, with git asked once for all runs."""

    one_at_a_time = threading.Lock()  # the streams and the arguments are those of the process

    def start(self, command, log, env):
        with self.one_at_a_time, mock.patch.object(record, "environment", environment):
            return super().start(command, log, env)


def run(study, jobs=1, **more):
    """Runs what a study of the fixture lacks, here."""
    Driver(study, recipes_of(study), jobs, executor=InThisProcess(), **more).run()


def recipes_of(study):
    return study.folder.parent / "recipes"


def started(study):
    """The runs that were started, in order."""
    path = study.folder / "started.txt"
    return path.read_text().split() if path.exists() else []


def until(condition, seconds=180):
    """Returns when a condition holds, which may take long on a busy machine."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
