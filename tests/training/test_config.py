"""Presets, files and the command line; every wrong value is named."""

import dataclasses

import pytest

from hf_gem.training.config import parse_config, trajectory
from recipes.gpt2_pretrain import PRESETS, Config


def parse(*argv: object) -> Config:
    return parse_config(Config, PRESETS, "demo", [str(a) for a in argv])[0]


def test_later_sources_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("steps: 70\nlearning_rate: 1e-3\nhidden_act: egem\n")
    assert parse().steps == PRESETS["demo"]["steps"]
    assert parse("--config", file).steps == 70
    config = parse("--config", file, "--steps", 80)
    assert (config.steps, config.learning_rate, config.hidden_act) == (80, 1e-3, "egem")
    assert config.n_embd == PRESETS["demo"]["n_embd"]
    assert config.weight_decay == 0.1


def test_a_file_can_name_the_preset_and_the_command_line_overrules_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: gpt2-124m\ncompile: false\n")
    config, preset = parse_config(Config, PRESETS, "demo", ["--config", str(file)])
    assert (preset, config.n_embd, config.compile) == ("gpt2-124m", 768, False)
    assert parse_config(Config, PRESETS, "demo", ["--config", str(file), "--preset", "demo"])[1] == "demo"


def test_yaml_means_what_it_says(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: gpt2-124m\nmixed_precision: no\ndataset_config: null\ncompile: off\nsteps: 20000\n")
    config = parse("--config", file)
    assert (config.mixed_precision, config.dataset_config, config.compile) == ("no", None, False)
    file.write_text("preset: null\nsteps: 70\n")
    assert parse("--config", file).n_embd == PRESETS["demo"]["n_embd"]


def test_names_of_the_family_are_made_canonical():
    assert parse("--hidden_act", "EGEM_n2_eps1e-06").hidden_act == "egem_n2_eps1em6"


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_valid(preset):
    config = parse("--preset", preset)
    assert config.global_batch_size % config.micro_batch_size == 0
    known = {field.name for field in dataclasses.fields(Config)}
    assert PRESETS[preset].keys() <= known


def test_the_124m_preset_is_gpt2_small():
    config = parse("--preset", "gpt2-124m")
    assert (config.n_layer, config.n_embd, config.n_head, config.block_size, config.dropout) == (12, 768, 12, 1024, 0)
    assert config.global_batch_size * config.block_size == 524288
    assert (config.adam_beta1, config.adam_beta2, config.weight_decay, config.grad_clip) == (0.9, 0.95, 0.1, 1.0)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--hiden_act", "egem"], ["--hiden_act", "--hidden_act"]),
        (["--learning_rat=1"], ["--learning_rat", "--learning_rate"]),
        (["--steps", "many"], ["--steps", "many"]),
        (["--steps", "0"], ["--steps", "at least 1", "got 0"]),
        (["--warmup_steps", "900"], ["--warmup_steps", "400", "got 900"]),
        (["--preset", "gpt3"], ["--preset", "gpt3", "gpt2-124m"]),
        (["--n_head", "3"], ["--n_embd", "multiple", "3"]),
        (["--adam_beta2", "1"], ["--adam_beta2", "[0, 1)"]),
        (["--seed", "-1"], ["--seed", "at least 0", "got -1"]),
        (["--learning_rate", "inf"], ["--learning_rate", "finite", "got inf"]),
        (["--n_head", "0"], ["--n_head", "at least 1"]),
        (["--loss_chunk_size", "-1"], ["--loss_chunk_size", "at least 0"]),
        (["--max_train_tokens", "-5"], ["--max_train_tokens", "got -5"]),
        (["--resume", "Auto"], ["--resume", "auto, never", "Auto"]),
        (["--streaming", "true"], ["--max_train_tokens", "--streaming"]),
        (["--hidden_act", "gelo"], ["gelo", "gem_n2", "gelu"]),
        (["--hidden_act", "egem-n2"], ["egem-n2", "egem_n2"]),
        (["--config", "missing.yaml"], ["missing.yaml"]),
    ],
)
def test_a_wrong_argument_is_named_with_what_is_allowed(argv, words, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(*argv)
    assert exit.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("step: 3\n", ["'step'", "'steps'"]),
        ("steps: [1, 2]\n", ["--steps"]),
        ("- steps\n", ["list"]),
        ("steps: {\n", ["cannot be read"]),
        ("preset: dmeo\n", ["dmeo", "demo"]),
    ],
)
def test_a_wrong_file_is_named_with_what_is_allowed(tmp_path, text, words, capsys):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit):
        parse("--config", file)
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


def test_help_lists_fields_and_presets(capsys):
    with pytest.raises(SystemExit) as exit:
        parse("--help")
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("--hidden_act", "gpt2-124m", "--resume"))


def test_only_what_changes_results_belongs_to_the_trajectory():
    assert trajectory(parse()) == trajectory(
        parse(
            "--log_every",
            3,
            "--cache_dir",
            "x",
            "--dataset",
            "x",
            "--micro_batch_size",
            8,
            "--output_dir",
            "y",
            "--report_to",
            "none",
        )
    )
    for argv in (
        ["--hidden_act", "gelu"],
        ["--seed", 1],
        ["--steps", 401],
        ["--block_size", 64],
        ["--compile", "true"],
    ):
        assert trajectory(parse()) != trajectory(parse(*argv))
