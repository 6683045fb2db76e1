"""What a study found, in the card of a run."""

import json

import pytest

from hf_gem import cli
from tests.compare.toy import run as run_study

SESSION = {
    **{"commit": None, "dirty": None, "versions": {}, "seconds": 1},
    "hardware": {"cpu": "", "gpus": [], "torch_threads": 1},
}
RECORD = {
    **{"status": "finished", "recipe": "toy", "data": {"hash": ""}, "result": {}, "curves": {}, "init_hash": ""},
    "sessions": [SESSION],
}
FEW = {"learning_rates": [0.01], "tuning_seeds": [], "final_seeds": [0, 1, 2]}
# With eps=match, a recipe puts the name that it found into the config, and the one that was asked for next to it.
MATCHED = {"config": {"hidden_act": "egem_n2_eps0.09", "eps": "match"}, "match": {"hidden_act": "egem_n2"}}
CARD = "---\ntags: [a]\n---\n\n# A model\n\n## Result\n\nGood.\n\n## Use\n\nLike this.\n"


@pytest.fixture
def toy(study):
    made = study(learning_rates=[0.01], tuning_seeds=[100], flags={"steps": 10})
    run_study(made)
    return made


@pytest.fixture
def run(tmp_path):
    """The folder of a run, and what to ask for."""

    def make(**config):
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        (folder / "README.md").write_text(CARD)
        values = {"hidden_act": "gem_n2", "steps": "10", "learning_rate": 0.01, "dataset": "toy", "seed": 5, **config}
        (folder / "record.json").write_text(json.dumps({**RECORD, "run_id": "another", "config": values}))
        return folder

    return make


def card(folder, study, *more):
    cli.main(["card", str(folder), str(study.folder), *more])
    return (folder / "README.md").read_text()


def test_a_card_says_what_a_study_found(toy, run):
    folder = run(steps="20")
    text = card(folder, toy)
    assert text.startswith(CARD[: CARD.index("## Use")])
    assert text.endswith(CARD[CARD.index("## Use") :])
    assert "This checkpoint is not one of these runs, which used steps 10 (here 20)." in text
    assert "| gem | `gem_n2` | 0.01 | 8 |" in text
    assert "| better |" in text
    assert "below that of `relu`" in text
    assert "`silu` was" not in text  # of others, the table alone speaks
    assert card(folder, toy) == text  # twice is once


def test_a_run_of_the_study(toy, run):
    folder = run()
    record = json.loads((folder / "record.json").read_text()) | {"run_id": "gem_n2-lr0.01-seed3"}
    (folder / "other.json").write_text(json.dumps(record))
    assert "This checkpoint is one of these runs." in card(folder, toy, f"--record={folder / 'other.json'}")


@pytest.mark.parametrize(
    ("arm", "values"),
    [
        ("matched", {"run_id": "egem_n2-eps-match-lr0.01-seed0"}),
        ("plain", {"run_id": "egem_n2-lr0.01-seed0"}),
        ("matched", MATCHED),
        ("plain", {"config": {"hidden_act": "egem_n2", "eps": None}}),
        ("fixed", {"config": {"hidden_act": "egem_n2_eps0.5", "eps": "0.5"}}),
    ],
)
def test_arms_with_flags_of_their_own(study, run, arm, values):
    acts = {"plain": "egem_n2", "matched": "egem_n2 eps=match", "fixed": "egem_n2_eps0.5", "relu": "relu"}
    toy = study(arms={arm: [act] for arm, act in acts.items()}, flags={"steps": 10}, **FEW)
    run_study(toy)
    folder = run()
    _change(folder, **values)
    text = card(folder, toy)
    assert [other for other in acts if f"of `{other}` was" in text] == [arm]
    assert f"is {'one' if 'run_id' in values else 'not one'} of these runs." in text


@pytest.mark.parametrize(
    ("act", "values", "got"),
    [
        ("egem_n2 eps=match", {"config": {"hidden_act": "egem_n2"}}, "egem_n2"),
        ("egem_n2", MATCHED, "egem_n2 eps=match"),
        ("egem_n2 eps=match match_c=2", MATCHED, "egem_n2 eps=match"),
        ("gelu dropout=0.1", {"config": {"hidden_act": "gelu", "dropout": 0.3}}, "gelu dropout=0.3"),
    ],
)
def test_an_arm_with_other_flags_is_not_meant(study, run, act, values, got, capsys):
    toy = study(arms={"relu": ["relu"], "arm": [act]}, **FEW)
    run_study(toy)
    folder = run()
    _change(folder, **values)
    with pytest.raises(SystemExit):
        card(folder, toy)
    assert f"did not compare '{got}'. It compared relu, {act}." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / "record.json").unlink(), "record.json; name that of the run with --record"),
        (lambda folder: (folder / "README.md").unlink(), "README.md is not the card of a run: it has no section `Use`"),
        (lambda folder: _change(folder, recipe="gpt"), "the run is one of the recipe 'gpt', but toy is a study of toy"),
        (
            lambda folder: _change(folder, config={"hidden_act": "mish"}),
            "did not compare 'mish'. It compared relu",
        ),
    ],
)
def test_what_does_not_fit(toy, run, spoil, message, capsys):
    folder = run()
    spoil(folder)
    with pytest.raises(SystemExit):
        card(folder, toy)
    assert message in capsys.readouterr().err


def _change(folder, **values):
    path = folder / "record.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
