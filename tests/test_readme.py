"""Every command in the README and in docs/recipes.md runs."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed.elastic.utils.distributed import get_free_port

from recipes import vision_train
from recipes.gpt2_pretrain import PRESETS, Config, parse_config
from tests.helpers import ON_CPU, ROOT, TINY, run_here, save_bytes_tokenizer, write_corpus

README, RECIPES = ((ROOT / path).read_text() for path in ("README.md", "docs/recipes.md"))
COMMANDS = [
    line
    for page in (README, RECIPES)
    for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]
# Of a preset for GPUs, what a CPU can do; every size is made small below.
CPU_FLAGS = ("--mixed_precision=no", "--compile=false", "--dataset_config=")


def run(arguments, **env):
    done = subprocess.run(
        arguments,
        cwd=ROOT,
        env={**os.environ, **ON_CPU, **env},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def tiny_flags(tmp_path):
    corpus = write_corpus(tmp_path / "corpus.txt")
    return [*TINY, f"--dataset={corpus}", f"--cache_dir={tmp_path / 'cache'}", f"--output_dir={tmp_path / 'run'}"]


def on_two_processes(command, tmp_path):
    """A launch command for many GPUs, with two processes on this CPU in place of them."""
    arguments = shlex.split(command)[2:]
    arguments[arguments.index("--num_processes") + 1] = "2"
    if "--main_process_ip" in arguments:
        arguments[arguments.index("--main_process_ip") + 1] = "127.0.0.1"
    script = next(i for i, a in enumerate(arguments) if a.endswith(".py"))
    if "--main_process_port" in arguments:
        arguments[arguments.index("--main_process_port") + 1] = str(get_free_port())
    else:
        arguments.insert(script, f"--main_process_port={get_free_port()}")
    # a tokenizer of its own would need the network
    tiny = [*tiny_flags(tmp_path), *CPU_FLAGS, "--micro_batch_size=2", f"--tokenizer={tmp_path / 'tokenizer'}"]
    return [sys.executable, "-m", "accelerate.commands.launch", *arguments, *tiny]


def test_the_pages_have_the_commands_tested_here():
    kinds = [command.split()[0] for command in COMMANDS]
    assert kinds == ["pip", "make", "accelerate", "make", "make", *["accelerate"] * 8, "python"]


def test_the_readme_is_short():
    assert len(README.split()) <= 900


def test_links_between_pages():
    """To files that are there, and to headings that they have."""
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", path.read_text()):
            page = (path.parent / target).resolve() if target else path
            assert page.exists(), f"{path.name}: {target}"
            titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE) if page.suffix == ".md" else []
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert not heading or heading in anchors, f"{path.name}: {target}#{heading}"


def test_pip_install():
    (command,) = (c for c in COMMANDS if c.startswith("pip"))
    arguments = shlex.split(command)[1:]
    out = run([sys.executable, "-m", "pip", *arguments, "--dry-run", "--no-deps", "--no-build-isolation"])
    assert "Would install hf-gem" in out or "hf_gem" in out


@pytest.mark.slow
def test_make_demo(tmp_path):
    corpus = tiny_flags(tmp_path)
    out = run(["make", "demo", "READY=", f"RUN={Path(sys.executable).parent}", f"DEMO_ARGS={shlex.join(corpus)}"])
    assert f"Checkpoint: {tmp_path / 'run'}" in out


@pytest.mark.slow
def test_make_test_and_ci():
    assert "make test" in (ROOT / ".ci" / "run").read_text()
    tests = "TEST_ARGS=tests/training/data/test_order.py"
    out = run(["make", "test", "READY=", f"RUN={Path(sys.executable).parent}", "JOBS=0", tests])
    assert "All checks passed" in out
    assert re.search(r"\d+ passed", out)


def test_make_bench():
    """It starts benchmarks that exist; what they do is in test_benchmarks.py."""
    out = run(["make", "--dry-run", "bench", "READY="])
    names = re.findall(r"-m benchmarks\.(\w+)", out)
    assert {"activation", "memory", "sweep", "train_step", "report"} == set(names)
    assert all((ROOT / "benchmarks" / f"{name}.py").exists() for name in names)


def test_make_gpu_does_without_an_environment_of_its_own():
    for folder, python in (("nowhere", "python3"), (str(Path(sys.executable).parent), "python")):
        flags = ("--dry-run", "--no-print-directory")  # which make prints where it was started by another
        out = run(["make", *flags, "gpu", f"RUN={folder}", "ARGS=memory --quick", "READY=nowhere"])
        assert out.strip().endswith(f"{python} -m benchmarks.gpu memory --quick")


@pytest.mark.slow
def test_make_study(tmp_path):
    """What it runs is in tests/compare; here, that it starts, and what it says."""
    out = run(["make", "study", "READY=", f"RUN={Path(sys.executable).parent}", "STUDY_ARGS=--dry_run"])
    assert "smoke: 3 arms" in out
    (command,) = (c for c in COMMANDS if c.startswith("python"))
    assert "final seeds" in run([sys.executable, *shlex.split(command)[1:], "--dry_run"])


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("accelerate") and "accelerate/" not in c])
def test_launch_commands(command, tmp_path):
    arguments = [sys.executable, "-m", "accelerate.commands.launch", *shlex.split(command)[2:]]
    if "vision" in command:
        flags = [f"--cache_dir={tmp_path / 'cache'}", "--steps=4", "--warmup_steps=1", "--report_to=none"]
        if "finetune" in command:
            run_here(vision_train, tmp_path / "trained", *flags, "--hidden_act=gelu")
            flags.append(f"--model={tmp_path / 'trained'}")
        flags.append(f"--output_dir={tmp_path / 'run'}")
    elif "pinn" in command:
        flags = ["--steps=4", "--warmup_steps=1", "--report_to=none", f"--output_dir={tmp_path / 'run'}"]
    else:
        flags = tiny_flags(tmp_path)
    if "gpt2-124m" in command:
        save_bytes_tokenizer(tmp_path / "tokenizer")
        flags += [*CPU_FLAGS, f"--tokenizer={tmp_path / 'tokenizer'}"]
    out = run([*arguments, *flags])
    assert "Validation loss" in out


@pytest.mark.slow
def test_multi_gpu_command(tmp_path):
    save_bytes_tokenizer(tmp_path / "tokenizer")
    (command,) = (c for c in COMMANDS if "multi_gpu.yaml" in c)
    assert "Validation loss" in run(on_two_processes(command, tmp_path))


@pytest.mark.slow
def test_multi_node_command(tmp_path):
    save_bytes_tokenizer(tmp_path / "tokenizer")
    (command,) = (c for c in COMMANDS if "multi_node.yaml" in c)
    first = on_two_processes(command, tmp_path)
    second = list(first)
    second[second.index("--machine_rank") + 1] = "1"
    other = subprocess.Popen(
        second, cwd=ROOT, env={**os.environ, **ON_CPU}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        assert "Validation loss" in run(first)
        assert "Validation loss" not in other.communicate(timeout=60)[0]  # only one of them reports
    finally:
        other.kill()
    assert other.returncode == 0


def test_flags_and_example():
    config, _ = parse_config(Config, PRESETS, "demo", ["--config", str(ROOT / "recipes" / "example.yaml")])
    assert config.n_embd == 64
    for flag in re.findall(r"`--(\w+)`", RECIPES.split("| flag |")[1].split("\n\n")[0]):
        assert hasattr(config, flag), flag
    assert (ROOT / "docs" / "family.png").exists()
