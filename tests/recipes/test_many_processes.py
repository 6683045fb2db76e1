"""The launcher configs in recipes/accelerate, and FSDP2 over gloo; DDP is in the test of each recipe."""

import json
import os
import re
import subprocess

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from safetensors.torch import load_file
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from hf_gem.training.launch import layers_to_shard
from recipes import bert_pretrain, gpt2_pretrain
from tests.helpers import BERT, GPT2, ROOT, TINY, launch, losses, run_here, write_corpus

CONFIGS = sorted((ROOT / "recipes" / "accelerate").glob("*.yaml"))
# Rounding of float32 sums taken in another order, carried through six steps of a model this small.
REORDERED = 2000 * torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    corpus = write_corpus(folder / "corpus.txt")
    return (*TINY, f"--dataset={corpus}", f"--cache_dir={folder / 'cache'}", "--keep_checkpoints=9")


@pytest.fixture(scope="module")
def reference(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "run"
    run_here(gpt2_pretrain, folder, *flags)
    return folder


def sharded(num_processes, recipe, *flags):
    """FSDP2 over gloo, by tests/fsdp_on_cpu.py."""
    wrapper = ROOT / "tests" / "fsdp_on_cpu.py"
    code, output = launch(num_processes, recipe, *flags, recipe=wrapper, config="fsdp2.yaml")
    assert code == 0, output


def test_sharded_runs_are_the_same_and_go_on_with_other_numbers_of_processes(flags, reference, tmp_path):
    sharded(2, GPT2, *flags, f"--output_dir={tmp_path / 'two'}")
    for name in ("loss", "validation_loss"):
        assert losses(tmp_path / "two", name) == pytest.approx(losses(reference, name), rel=REORDERED)
    checkpoint = tmp_path / "two" / "checkpoints" / "step_00000004"
    assert len(list(checkpoint.rglob("*.distcp"))) == 4  # model and optimizer, two pieces each
    whole, ours = (load_file(folder / "model.safetensors") for folder in (reference, tmp_path / "two"))
    assert whole.keys() == ours.keys()
    for name in whole:
        torch.testing.assert_close(ours[name], whole[name], rtol=0, atol=1e-4)  # a hundredth of the learning rate

    sharded(4, GPT2, *flags, "--micro_batch_size=1", f"--output_dir={tmp_path / 'four'}", f"--resume={checkpoint}")
    assert losses(tmp_path / "four") == pytest.approx(losses(reference), rel=REORDERED)
    sessions = json.loads((tmp_path / "four" / "record.json").read_text())["sessions"]
    assert [(s["num_processes"], s["first_step"]) for s in sessions] == [(2, 1), (4, 5)]


def test_sharded_runs_in_half_precision_keep_the_loss_whole(flags, reference, tmp_path):
    sharded(2, GPT2, *flags, "--mixed_precision=bf16", "--steps=2", f"--output_dir={tmp_path}")
    ours = losses(tmp_path)
    # One rounding of weights and activations to bfloat16; the losses here are of order five.
    assert ours == pytest.approx({k: v for k, v in losses(reference).items() if k <= 2}, rel=2**-8)
    assert any(float(torch.tensor(v).bfloat16()) != v for v in ours.values())
    assert len(list(tmp_path.rglob("*.distcp"))) == 4


def test_tied_weights_are_sharded_once(flags, tmp_path):
    flags = (*flags, "--n_inner=32", "--steps=2")
    sharded(2, BERT, *flags, f"--output_dir={tmp_path / 'two'}")
    run_here(bert_pretrain, tmp_path / "one", *flags)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=REORDERED)


def test_what_is_sharded_as_one_are_thelayers_to_shard():
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8}
    assert layers_to_shard(GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=2, n_head=2))) == ["GPT2Block"]
    bert = BertForMaskedLM(BertConfig(num_hidden_layers=2, num_attention_heads=2, **sizes))
    assert layers_to_shard(bert) == ["BertLayer"]


def test_fsdp_where_there_is_nothing_to_shard_on_is_refused(flags, tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator to shard on")
    environment = {"OMP_NUM_THREADS": "1"}  # without what ON_CPU says
    code, output = launch(2, *flags, f"--output_dir={tmp_path}", config="fsdp2.yaml", env=environment)
    assert code == 1
    assert "error: the launcher chose FSDP, and accelerate shards on GPUs alone" in output


def test_processes_on_a_cpu(flags, reference, tmp_path):
    code, output = launch(2, *flags, f"--output_dir={tmp_path}", config="cpu.yaml")
    assert code == 0, output
    assert losses(tmp_path) == pytest.approx(losses(reference), rel=REORDERED)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_accelerate_reads_the_config(path):
    config = load_config_from_file(str(path))
    assert config.mixed_precision == "no"  # or it would decide for presets that leave it open
    assert config.num_processes % config.num_machines == 0
    assert (config.fsdp_config or {}).get("fsdp_version", 2) == 2


def test_the_job_script_starts_each_machine_and_asks_to_be_started_again(tmp_path):
    """Under stand-ins for srun, scontrol and accelerate: what each task would run."""
    script = ROOT / "recipes" / "accelerate" / "slurm.sh"
    (tmp_path / "srun").write_text('#!/bin/sh\nfor SLURM_PROCID in 0 1; do export SLURM_PROCID; "$@"; done\n')
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho first second\n")
    (tmp_path / "accelerate").write_text('#!/bin/sh\necho "$@"\n')
    for name in ("srun", "scontrol", "accelerate"):
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "x",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": "7",
    }
    command = ["bash", str(script), "recipes/gpt2_pretrain.py", "--preset", "gpt2-124m"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env={**env, "GPUS": "8"}, timeout=60)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.strip().splitlines()
    assert [re.search(r"--machine_rank (\d)", line)[1] for line in lines] == ["0", "1"]
    for line in lines:
        assert "--num_machines 2 --num_processes 16" in line
        assert "--main_process_ip first" in line
        assert line.endswith("recipes/gpt2_pretrain.py --preset gpt2-124m")
    text = script.read_text()
    assert "#SBATCH --requeue" in text
    assert "#SBATCH --signal=" in text


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [gpt2_pretrain, bert_pretrain], ids=lambda recipe: recipe.__name__)
def test_the_start_of_the_demo_on_one_and_two_processes(recipe, tmp_path_factory, tmp_path):
    """The presets that people try first, on the real text of the standard library."""
    cache = tmp_path_factory.getbasetemp() / "stdlib"
    flags = ("--preset=demo", f"--cache_dir={cache}", "--steps=12", "--warmup_steps=4", "--eval_every=0")
    flags = (
        *flags,
        "--save_every=0",
        "--log_every=1",
        "--global_batch_size=16",
        "--micro_batch_size=8",
        "--report_to=none",
    )
    run_here(recipe, tmp_path / "one", *flags)
    path = ROOT / "recipes" / f"{recipe.__name__.partition('.')[2]}.py"
    code, output = launch(2, *flags, f"--output_dir={tmp_path / 'two'}", recipe=path, config="cpu.yaml")
    assert code == 0, output
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert one == pytest.approx(two, rel=REORDERED)
    assert one[12] < one[1] - 0.5
