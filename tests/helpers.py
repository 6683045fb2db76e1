"""Runs of the recipes small enough for a test: a corpus written on the spot, a model of a few thousand weights."""

import contextlib
import functools
import io
import json
import multiprocessing
import os
import random
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from unittest import mock

import pytest
import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.state import AcceleratorState
from accelerate.utils.launch import prepare_multi_gpu_env
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.elastic.utils.distributed import get_free_port
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
GPT2 = ROOT / "recipes" / "gpt2_pretrain.py"
BERT = ROOT / "recipes" / "bert_pretrain.py"
VISION = ROOT / "recipes" / "vision_train.py"
STOPPING = ROOT / "tests" / "stopping.py"
TINY = (
    *("--n_layer=2", "--n_embd=16", "--n_head=2", "--block_size=16", "--vocab_size=300", "--validation_fraction=0.2"),
    "--min_validation_tokens=0",
    *("--steps=6", "--global_batch_size=4", "--micro_batch_size=4", "--warmup_steps=2", "--learning_rate=0.01"),
    *("--log_every=1", "--eval_every=3", "--save_every=2", "--report_to=none"),
)

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))),
    reason="needs a C++ compiler, and finds neither $CXX nor g++ nor clang++",
)


def is_version(package: str, version: str) -> bool:
    """Whether a package has a version such as 5.17, or one with further numbers behind it."""
    return f"{metadata.version(package)}.".startswith(f"{version}.")


def fails_with(package: str, version: str, reason: str) -> pytest.MarkDecorator:
    """Skips a test with one of the oldest supported versions, such as 5.17, whose fault is not ours."""
    return pytest.mark.skipif(is_version(package, version), reason=f"{package} {version} {reason}")


def write_corpus(path: Path, lines: int = 300) -> Path:
    """A text of made-up sentences, always the same."""
    pytest.importorskip("datasets", reason="files of text are read by it")
    draw = random.Random(0)
    words = "the gate of a smooth unit opens slowly then stays open while its output grows with the input"
    path.write_text("".join(" ".join(draw.choices(words.split(), k=12)) + ".\n" for _ in range(lines)))
    return path


def save_bytes_tokenizer(folder: Path) -> str:
    """One token a byte and an end of text: ids can be read off the text. Returns the folder."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({c: i for i, c in enumerate(["<|endoftext|>", *alphabet])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>").save_pretrained(folder)
    return str(folder)


class TouchesWhenUnpickled:
    """What somebody plants where pickles are read.

    Args:
        path: The file that unpickling makes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Path]]:
        return Path.touch, (self.path,)


def losses(folder: Path, key: str = "loss") -> dict[int, float]:
    """Step -> value of one metric in the log of a run."""
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return {entry["step"]: entry[key] for entry in entries if key in entry}


def run_here(recipe: ModuleType, folder: Path, *flags: str) -> str:
    """Runs a recipe in this process and returns what it printed."""
    AcceleratorState._reset_state(reset_partial_state=True)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        recipe.main([*flags, f"--output_dir={folder}"])
    return printed.getvalue()


@functools.cache
def _outputs() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory()


class Child:
    """A recipe in a process of its own that has imported everything already, which takes longer than a small run.

    Args:
        arguments: Of the recipe.
        recipe: Its file.
        env: More environment variables.
    """

    def __init__(self, arguments: Sequence[object], recipe: Path, env: Mapping[str, str]) -> None:
        _, name = tempfile.mkstemp(suffix=".txt", dir=_outputs().name)
        self.output = Path(name)
        command = [str(recipe), *map(str, arguments)]
        self.process = _PROCESSES.Process(target=_run_script, args=(command, name, {**os.environ, **env}), daemon=True)
        self.process.start()

    def is_alive(self) -> bool:
        return self.process.is_alive()

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)


def _run_script(command: list[str], output: str, env: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(env)
    with Path(output).open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    if threads := env.get("OMP_NUM_THREADS"):
        torch.set_num_threads(int(threads))  # torch was imported before
    os.chdir(ROOT)
    sys.argv = command
    sys.path.insert(0, str(Path(command[0]).parent))
    runpy.run_path(command[0], run_name="__main__")


_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(
    [*(f"recipes.{path.stem}" for path in (ROOT / "recipes").glob("*.py")), "tests.helpers", "matplotlib.pyplot"]
)


def start(*arguments: object, recipe: Path = GPT2, **env: str) -> Child:
    """Starts a recipe as a script, with some more environment variables."""
    return Child(arguments, recipe, env)


def finish(child: Child, timeout: float = 240) -> tuple[int, str]:
    """Exit status of a child, and what it printed, once it has ended."""
    child.process.join(timeout)
    assert not child.is_alive(), child.output.read_text()
    return child.process.exitcode, child.output.read_text()


def wait_until(condition: Callable[[], bool], child: Child, timeout: float = 240) -> None:
    """Returns when a condition holds, which a child brings about."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert child.is_alive(), child.output.read_text()
        assert time.monotonic() < deadline, child.output.read_text()
        time.sleep(0.002)


ON_CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # `--multi_gpu` then starts gloo processes
_LAUNCH = ("--multi_gpu", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no")


def launch(
    num_processes: int,
    *arguments: object,
    recipe: Path = GPT2,
    config: str | None = None,
    env: Mapping[str, str] = ON_CPU,
) -> tuple[int, str]:
    """Runs a recipe in several processes, as `accelerate launch` does, and returns the highest status and all output.

    Args:
        num_processes: How many.
        arguments: Of the recipe.
        recipe: Its file.
        config: A file in recipes/accelerate.
        env: More environment variables.
    """
    flags = _LAUNCH if config is None else (f"--config_file={ROOT / 'recipes' / 'accelerate' / config}",)
    with mock.patch.dict(os.environ, env):
        parsed = launch_command_parser().parse_args([*flags, f"--num_processes={num_processes}", str(recipe)])
        theirs = prepare_multi_gpu_env(_validate_launch_command(parsed)[0])
    world = {"WORLD_SIZE": str(num_processes), "LOCAL_WORLD_SIZE": str(num_processes), "MASTER_ADDR": "127.0.0.1"}
    world["MASTER_PORT"] = str(get_free_port())
    ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_processes)]
    children = [Child(arguments, recipe, {**theirs, **env, **world, **rank}) for rank in ranks]
    ended = [finish(child) for child in children]
    return max(abs(code) for code, _ in ended), "".join(output for _, output in ended)


def stopping(number: int, step: int, recipe: Path = GPT2, rank: int = 0) -> tuple[object, ...]:
    """Arguments of STOPPING: the recipe, which sends itself a signal when the checkpoint of a step is complete."""
    return int(number), step, rank, recipe


def run_python(*arguments: object, timeout: float = 240, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a fresh process, in the root of the repository."""
    command, everything = [sys.executable, *map(str, arguments)], {**os.environ, **env}
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=everything, timeout=timeout
    )
