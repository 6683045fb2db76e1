"""Runs of the recipes small enough for a test: a corpus written on the spot, a model of a few thousand weights."""

import contextlib
import io
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from accelerate.state import AcceleratorState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.elastic.utils.distributed import get_free_port
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
GPT2 = ROOT / "recipes" / "gpt2_pretrain.py"
BERT = ROOT / "recipes" / "bert_pretrain.py"
VISION = ROOT / "recipes" / "vision_train.py"
TINY = (
    *("--n_layer=2", "--n_embd=16", "--n_head=2", "--block_size=16", "--vocab_size=300", "--validation_fraction=0.2"),
    *("--steps=6", "--global_batch_size=4", "--micro_batch_size=4", "--warmup_steps=2", "--learning_rate=0.01"),
    *("--log_every=1", "--eval_every=3", "--save_every=2", "--report_to=none"),
)

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))),
    reason="needs a C++ compiler, and finds neither $CXX nor g++ nor clang++",
)


def write_corpus(path: Path, lines: int = 300) -> Path:
    """A text of made-up sentences, always the same."""
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


def finish(process: subprocess.Popen, timeout: float = 240) -> tuple[int, str]:
    """Exit status and output of a process, once it has ended."""
    output, _ = process.communicate(timeout=timeout)
    return process.returncode, output


def start(*arguments: object, recipe: Path = GPT2, launcher: tuple[str, ...] = (), **env: str) -> subprocess.Popen:
    """Starts a recipe in a process of its own, with some more environment variables."""
    return subprocess.Popen(
        [sys.executable, *launcher, str(recipe), *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, **env},
    )


ON_CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}  # `--multi_gpu` then starts gloo processes


def launch(num_processes: int) -> tuple[str, ...]:
    """The arguments of Python that are `accelerate launch` for several processes on one machine."""
    module = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines=1", "--mixed_precision=no")
    return (
        *module,
        "--dynamo_backend=no",
        f"--num_processes={num_processes}",
        f"--main_process_port={get_free_port()}",
    )
