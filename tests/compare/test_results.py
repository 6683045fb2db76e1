"""The studies that are kept say what their records say."""

import json
import re
import shutil

import numpy as np
import pytest

from hf_gem.compare.report import write_report
from hf_gem.compare.study import Study
from tests.helpers import ROOT

for package in ("scipy", "matplotlib", "markdown_it"):
    pytest.importorskip(package, reason="reports need it")

STUDIES = sorted(path.parent for path in (ROOT / "results").glob("*/plan.json"))
# With any break of a line as a space, so that a figure is found across one.
TEXT, CHOOSING = (" ".join((ROOT / path).read_text().split()) for path in ("results/README.md", "docs/choosing.md"))
FIGURE = r"([+-][\d.]+)(?: points of accuracy| points)? \(([+-][\d.]+) to ([+-][\d.]+)"
QUOTED = sorted({*re.findall(FIGURE, TEXT), *re.findall(FIGURE, CHOOSING)})


# Hashes of `git diff HEAD` for a tree that lacks nothing but the folder results/ -> its commit.
WITHOUT_RESULTS = {
    "9eb89a2df6f34337e5fffd043542dbb2d41a6731a3fc96aa4333cd9a11308b6f": "e0b18ac9c134785470bfd0ffab2ab04a7d9d07ba"
}


def _marked(folder):
    """Marks a large study as slow: its report takes up to half a minute."""
    large = len(list((folder / "records").iterdir())) > 300
    return pytest.param(folder, marks=[pytest.mark.slow] * large, id=folder.name)


@pytest.mark.parametrize("folder", [_marked(folder) for folder in STUDIES])
def test_a_report_is_made_from_its_records(folder, tmp_path):
    copy = tmp_path / folder.name
    shutil.copytree(folder, copy)
    kept = json.loads((folder / "results.json").read_text())
    study = Study(copy)
    assert kept["plan_hash"] == study.plan.hash
    assert not study.check_pairing()
    for record in (folder / "records").glob("*.json"):
        session = json.loads(record.read_text())["sessions"][-1]
        assert not session["dirty"] or WITHOUT_RESULTS[session["diff_hash"]] == session["commit"]
    write_report(study)
    made = json.loads((copy / "results.json").read_text())
    assert made["choices"] == kept["choices"]
    # Figures that are made anew each time are drawn from, and may differ in their last digits; words may not.
    numbers = re.compile(r"[-+]?\d[\d.,e+-]*")
    texts = [numbers.sub("#", (path / "report.md").read_text()) for path in (copy, folder)]
    assert texts[0] == texts[1]
    for ours, theirs in zip(made["comparisons"], kept["comparisons"], strict=True):
        assert ours["verdict"] == theirs["verdict"]
        assert ours["difference"] == pytest.approx(theirs["difference"])
        assert ours["p_holm"] == pytest.approx(theirs["p_holm"])
        assert ours["interval"] == pytest.approx(theirs["interval"], rel=0.05)  # other versions draw other resamples


def _rounding(figure):
    """Returns how far a figure in a text may be from the number that was rounded to it."""
    return 0.5001 * 10.0 ** -len(figure.partition(".")[2])


@pytest.fixture(scope="module")
def differences():
    """Differences of two arms of a study, with their intervals; those of accuracies in points.

    A baseline is left out if none of its differences is quoted: all intervals take minutes.
    """
    means, tolerances = np.array([(float(mean), _rounding(mean)) for mean, *_ in QUOTED]).T
    found = []
    for study in map(Study, STUDIES):
        points = 100 if study.plan.metric.endswith("accuracy") else 1
        outcomes = study.outcomes()
        values = {arm: np.array([outcomes[arm].get(s, np.nan) for s in study.plan.final_seeds]) for arm in outcomes}
        for baseline, level in values.items():
            gaps = [points * np.nanmean(value - level) for arm, value in values.items() if arm != baseline]
            if any(not np.isfinite(gap) or np.any(np.abs(means - gap) <= tolerances) for gap in gaps):
                found += [np.multiply(points, (c.difference, *c.interval)) for c in study.comparisons(baseline)]
    return found


@pytest.mark.parametrize("quoted", QUOTED, ids="-".join)
def test_a_difference_in_the_text_is_one_of_a_study(quoted, differences):
    rounding = _rounding(quoted[0])
    tolerance = [rounding, 2 * rounding, 2 * rounding]  # other versions draw other resamples for intervals
    assert any(np.all(np.abs(found - np.array(quoted, float)) <= tolerance) for found in differences)


def test_every_study_is_in_the_table():
    assert [folder.name for folder in STUDIES if f"({folder.name}/report.md)" not in TEXT] == []
    assert QUOTED
