"""Presets, files and the command line; every wrong value is named."""

import dataclasses
import math
from typing import Literal, Optional

import pytest
import yaml

from hf_gem.fit import MATCH_C
from hf_gem.training.config import TrainConfig, option, parse_config, trajectory
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


@dataclasses.dataclass
class Kinds(TrainConfig):
    """A field of each type."""

    whole: int = option(1, "A whole number.")
    number: float = option(0.5, "A number.")
    text: str = option("a", "Text.")
    flag: bool = option(False, "A flag.")
    choice: Literal["no", "yes", "1"] = option("1", "A choice.")
    maybe_whole: int | None = option(None, "A whole number or nothing.")
    maybe_number: Optional[float] = option(None, "A number or nothing.")  # noqa: UP045  # the older spelling
    maybe_text: str | None = option(None, "Text or nothing.")
    auto: int | Literal["auto"] = option("auto", "A whole number or auto.")
    maybe_flag: bool | None = option(None, "A flag or nothing.")
    maybe_choice: Literal["no", "bf16"] | None = option(None, "A choice or nothing.")


CONVERTED = [
    *(("whole", "70", 70), ("whole", "'70'", 70), ("whole", "-3", -3), ("maybe_whole", "4", 4)),
    *(("number", "1", 1.0), ("number", "1e-3", 1e-3), ("number", "1.5e-3", 1.5e-3), ("number", "'2'", 2.0)),
    *(("number", ".inf", math.inf), ("maybe_number", "3", 3.0), ("number", "inf", math.inf)),
    *(("text", "hello", "hello"), ("text", "16", "16"), ("text", "0.3", "0.3"), ("text", "no", "no")),
    *(("text", "yes", "yes"), ("text", "2024-01-31", "2024-01-31"), ("maybe_text", "fit", "fit")),
    *(
        ("flag", "yes", True),
        ("flag", "true", True),
        ("flag", "off", False),
        ("flag", "1", True),
        ("flag", "'f'", False),
    ),
    *(("maybe_flag", "no", False), ("maybe_flag", "on", True), ("maybe_flag", "'Yes'", True)),
    *(("choice", "no", "no"), ("choice", "yes", "yes"), ("choice", "1", "1"), ("maybe_choice", "no", "no")),
    *((name, "null", None) for name in ("maybe_whole", "maybe_number", "maybe_text", "maybe_flag", "maybe_choice")),
    *(("auto", "4", 4), ("auto", "'4'", 4), ("auto", "auto", "auto"), ("auto", "null", "auto")),
    *(("whole", "null", 1), ("text", "~", "a"), ("choice", "null", "1")),
]


@pytest.mark.parametrize(("name", "text", "value"), CONVERTED)
def test_a_value_in_a_file_has_the_type_of_its_field(tmp_path, name, text, value):
    file = tmp_path / "run.yaml"
    file.write_text(f"{name}: {text}\n")
    config, _ = parse_config(Kinds, {"demo": {}}, "demo", ["--config", str(file)])
    got = getattr(config, name)
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("whole", "1.5", "--whole must be a whole number, got 1.5"),
        ("whole", "1e3", "--whole must be a whole number, got '1e3'"),
        ("whole", "yes", "--whole must be a whole number, got True"),
        ("maybe_whole", "[1]", "--maybe_whole must be a whole number, got [1]"),
        ("auto", "many", "--auto must be a whole number or auto, got 'many'"),
        ("auto", "1.5", "--auto must be a whole number or auto, got 1.5"),
        ("number", "fast", "--number must be a number, got 'fast'"),
        ("number", "no", "--number must be a number, got False"),
        ("text", "[a, b]", "--text must be text, got ['a', 'b']"),
        ("maybe_text", "{a: b}", "--maybe_text must be text, got {'a': 'b'}"),
        ("flag", "2", "--flag must be true or false, got 2"),
        ("maybe_flag", "maybe", "--maybe_flag must be true or false, got 'maybe'"),
        ("choice", "other", "--choice must be one of no, yes, 1, got 'other'"),
        ("maybe_choice", "yes", "--maybe_choice must be one of no, bf16, got True"),
    ],
)
def test_a_value_that_does_not_fit_is_named_with_its_source(tmp_path, capsys, name, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(f"{name}: {text}\n")
    for argv, presets, source in (
        (["--config", str(file)], {"demo": {}}, str(file)),
        ([], {"demo": {name: yaml.safe_load(text)}}, "preset demo"),
    ):
        with pytest.raises(SystemExit) as exit:
            parse_config(Kinds, presets, "demo", argv)
        assert exit.value.code == 2
        got = capsys.readouterr().err
        assert f"error: {source}: {message}" in got


def test_a_flag_wins_even_with_the_value_of_the_default(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("whole: 5\nflag: yes\nmaybe_text: x\n")
    config, _ = parse_config(Kinds, {"demo": {}}, "demo", ["--config", str(file), "--whole", "1", "--flag", "no"])
    assert (config.whole, config.flag, config.maybe_text) == (1, False, "x")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--momentum=0.9"], "--momentum must be left out with --optimizer adamw, got 0.9"),
        (["--optimizer=sgd", "--adam_eps=1e-6"], "--adam_eps must be left out with --optimizer sgd"),
        (["--lr_schedule=step", "--min_lr_ratio=0.2"], "--min_lr_ratio must be left out with --lr_schedule step"),
        (["--hub_public"], "--hub_public must be left out without --push_to_hub"),
    ],
)
def test_a_flag_without_effect_is_refused(flags, words, capsys):
    with pytest.raises(SystemExit):
        parse(*flags)
    assert words in capsys.readouterr().err


def test_a_preset_or_file_may_have_what_another_flag_overrules(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("optimizer: sgd\nmomentum: 0.8\n")
    assert parse("--config", file, "--optimizer", "adamw").momentum == 0.8


def test_paths_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    """A shell leaves the ~ of --output_dir=~/runs as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("cache_dir: ~/cache\ndataset: ~/corpus.txt\n")
    config = parse("--config=~/run.yaml", "--output_dir=~/runs/~/a")
    got = config.cache_dir, config.dataset, config.output_dir
    assert got == (f"{tmp_path}/cache", f"{tmp_path}/corpus.txt", f"{tmp_path}/runs/~/a")


def test_a_checkpoint_to_resume_may_have_been_deleted_by_its_run(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    path = str(tmp_path / "checkpoints" / "step_00000002")
    assert parse("--resume", path).resume == path
    with pytest.raises(SystemExit):
        parse("--resume", tmp_path / "step_00000002")
    assert "--resume must be auto, never, or the folder of a checkpoint" in capsys.readouterr().err


def test_sizes_can_be_left_to_the_machine():
    config = parse("--micro_batch_size", "auto", "--loss-chunk-size", "8")
    assert (config.micro_batch_size, config.loss_chunk_size) == ("auto", 8)
    assert parse("--micro_batch_size", "4").micro_batch_size == 4
    assert parse().loss_chunk_size == "auto"


def test_null_takes_a_preset_back_to_the_default(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("whole: null\n")
    config, _ = parse_config(Kinds, {"demo": {"whole": 9}}, "demo", ["--config", str(file)])
    assert config.whole == 1


def test_a_preset_with_an_unknown_field_is_named(capsys):
    with pytest.raises(SystemExit):
        parse_config(Kinds, {"demo": {"hole": 9}}, "demo", [])
    assert "preset demo: unknown field 'hole'. Did you mean 'whole'?" in capsys.readouterr().err


def test_names_of_the_family_are_made_canonical():
    assert parse("--hidden_act", "EGEM_n2_eps1e-06").hidden_act == "egem_n2_eps1em6"


def test_a_number_replaces_the_eps_of_the_name(tmp_path):
    flags = ("--hidden_act", "segem_n2_eps0.5_learnable")
    assert parse(*flags, "--eps", "1e-6").hidden_act == "segem_n2_eps1em6_learnable"
    assert parse("--hidden_act", "egem_eps3", "--eps", "1e-4").hidden_act == "egem"
    (tmp_path / "run.yaml").write_text("eps: 0.25\n")
    config = parse(*flags, "--config", tmp_path / "run.yaml")
    assert (config.eps, config.hidden_act) == ("0.25", "segem_n2_eps0.25_learnable")
    config.validate()
    assert config.hidden_act == "segem_n2_eps0.25_learnable"
    assert trajectory(config) == trajectory(parse("--hidden_act", "segem_n2_eps0.25_learnable"))


def test_an_eps_that_matches_waits_for_the_model():
    config = parse("--hidden_act", "egem_n2_eps3", "--eps", "match", "--match_c", "0.2")
    assert (config.hidden_act, config.eps, config.match_c) == ("egem_n2_eps3", "match", 0.2)
    assert parse().match_c == MATCH_C


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
        (["--steps", "9" * 5000], ["--steps", f"'{'9' * 75}...'"]),
        (["--hidden_act", "9" * 5000], ["unknown --hidden_act '9999", "9...9"]),
        (["--steps", "0"], ["--steps", "at least 1", "got 0"]),
        (["--warmup_steps", "900"], ["--warmup_steps", "400", "got 900"]),
        (["--preset", "gpt3"], ["--preset", "gpt3", "gpt2-124m"]),
        (["--n_head", "3"], ["--n_embd", "multiple", "3"]),
        (["--adam_beta2", "1"], ["--adam_beta2", "[0, 1)"]),
        (["--seed", "-1"], ["--seed", "from 0 to 2**63 - 1", "got -1"]),
        (["--data_seed", str(2**63)], ["--data_seed", "from 0 to 2**63 - 1", f"got {2**63}"]),
        (["--learning_rate", "inf"], ["--learning_rate", "finite", "got inf"]),
        (["--n_head", "0"], ["--n_head", "at least 1"]),
        (["--micro_batch_size", "0"], ["--micro_batch_size", "at least 1", "got 0"]),
        (["--micro_batch_size", "most"], ["--micro_batch_size", "a whole number or auto", "'most'"]),
        (["--loss_chunk_size", "-1"], ["--loss_chunk_size", "at least 0"]),
        (["--max_train_tokens", "-5"], ["--max_train_tokens", "got -5"]),
        (["--resume", "Auto"], ["--resume", "auto, never", "Auto"]),
        (["--streaming", "true"], ["--max_train_tokens", "--streaming"]),
        (["--hidden_act", "gelo"], ["gelo", "gem_n2", "gelu", "HF_GEM_FAMILIES"]),
        (["--hidden_act", "egem-n2"], ["egem-n2", "egem_n2"]),
        (["--hidden_act", "egem", "--eps", "fit"], ["--eps must be a finite number above 0, or match, got 'fit'"]),
        (["--hidden_act", "egem", "--eps", "0"], ["--eps must be a finite number above 0, or match, got '0'"]),
        (["--hidden_act", "gelu", "--eps", "match"], ["--eps must be left out: --hidden_act gelu has none"]),
        (["--hidden_act", "gem_n2", "--eps", "match"], ["gem, which has a fixed eps of 1", "Use 'egem'"]),
        (["--hidden_act", "gem_n2", "--eps", "0.1"], ["got eps=0.1", "gem has a fixed eps of 1"]),
        (["--hidden_act", "egem", "--match_c", "2"], ["--match_c must be left out without --eps match, got 2.0"]),
        (["--hidden_act", "egem", "--eps", "match", "--match_c", "0"], ["got c=0.0", "c must be positive and finite"]),
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
        ("steps: {\n", ["cannot read --config"]),
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
            "auto",
            "--loss_chunk_size",
            64,
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
