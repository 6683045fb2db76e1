"""Every card that is kept is what its record makes: no figure in it was typed."""

import json

import pytest

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
    values = recipe.card_values(recipe.Config(**record["config"]), record)
    write_card(record, recipe.TEMPLATE, tmp_path / "README.md", **values)
    assert (tmp_path / "README.md").read_text() == (card / "README.md").read_text()
    assert (card / "loss_curve.png").exists()
