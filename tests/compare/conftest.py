"""Studies with a recipe that takes no time."""

import pytest

from hf_gem.compare.plan import Plan
from hf_gem.compare.study import Study, freeze
from tests.compare.toy import PLAN, TOY


@pytest.fixture
def study(tmp_path):
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "toy.py").write_text(TOY)

    def make(folder="study", **changes):
        freeze(Plan(**{**PLAN, **changes}), tmp_path / folder)
        return Study(tmp_path / folder)

    return make
