"""Every card that is kept is what its record makes: no figure in it was typed."""

import json
import re
from dataclasses import fields

import pytest

from hf_gem.compare.card import add_comparison
from hf_gem.compare.study import Study
from hf_gem.training.report import write_card
from recipes import bert_pretrain, gpt2_pretrain, vision_train
from tests.helpers import ROOT

RECIPES = {"bert_pretrain": bert_pretrain, "gpt2_pretrain": gpt2_pretrain, "vision_train": vision_train}
CARDS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/README.md"))


def test_there_are_cards():
    assert CARDS


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.name)
def test_a_card_is_made_from_its_record(card, tmp_path):
    (path,) = (ROOT / "results").glob(f"{card.name}-seed*.json")
    record = json.loads(path.read_text())
    assert record["status"] == "finished"
    assert not any(session["dirty"] for session in record["sessions"])
    recipe = RECIPES[record["recipe"]]
    known = {field.name for field in fields(recipe.Config)}  # a record may have had others
    config = recipe.Config(**{name: value for name, value in record["config"].items() if name in known})
    values = recipe.card_values(config, record)
    write_card(record, tmp_path / "README.md", **values)
    kept = (card / "README.md").read_text()
    if study := re.search(r"From the study (\S+) ", kept):
        add_comparison(tmp_path / "README.md", record, Study(ROOT / "results" / study[1]))
    assert (tmp_path / "README.md").read_text() == kept
    assert (card / "loss_curve.png").exists()
