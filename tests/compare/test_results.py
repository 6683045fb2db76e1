"""The studies that are kept say what their records say."""

import json
import shutil

import pytest

from hf_gem.compare.report import write_report
from hf_gem.compare.run import Study
from tests.helpers import ROOT

STUDIES = sorted(path.parent for path in (ROOT / "results").glob("*/plan.json"))


@pytest.mark.parametrize("folder", STUDIES, ids=lambda path: path.name)
def test_a_report_is_made_from_its_records(folder, tmp_path):
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    kept = json.loads((folder / "results.json").read_text())
    study = Study(copy)
    assert kept["plan_hash"] == study.plan.hash
    assert not study.check_pairing()
    assert not any(json.loads(p.read_text())["sessions"][-1]["dirty"] for p in (folder / "records").glob("*.json"))
    write_report(study)
    made = json.loads((copy / "results.json").read_text())
    assert made["choices"] == kept["choices"]
    for ours, theirs in zip(made["comparisons"], kept["comparisons"], strict=True):
        assert ours["verdict"] == theirs["verdict"]
        assert ours["difference"] == pytest.approx(theirs["difference"])
        assert ours["p_holm"] == pytest.approx(theirs["p_holm"])
        assert ours["interval"] == pytest.approx(theirs["interval"], rel=0.05)  # other versions draw other resamples
        assert f"**{theirs['verdict']}**" in (folder / "report.md").read_text()


def test_every_study_is_in_the_table():
    table = (ROOT / "results" / "README.md").read_text()
    assert [folder.name for folder in STUDIES if f"({folder.name}/report.md)" not in table] == []
