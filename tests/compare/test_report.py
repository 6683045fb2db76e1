"""What a report says of a study."""

import json
import sys

import pytest

from hf_gem import cli
from hf_gem.compare.plan import Run
from hf_gem.compare.report import write_report
from hf_gem.compare.sample import tuning_components
from hf_gem.compare.study import StudyError
from hf_gem.training.errors import ConfigError
from tests.compare.toy import TWO_ARMS, run

for package in ("scipy", "matplotlib", "markdown_it"):
    pytest.importorskip(package, reason="reports need it")

from hf_gem.compare.figures import _dose_of, dose  # noqa: E402


def test_a_report_without_scipy_says_where_the_runs_are(study, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    toy = study(**TWO_ARMS)
    with pytest.raises(
        ConfigError, match=r"the runs are saved in .*, but their report needs .* scipy is not installed"
    ):
        write_report(toy)


def test_runs_that_the_tuning_does_not_choose_are_told(study):
    toy = study(**TWO_ARMS, final_seeds=[0, 1])
    run(toy)
    for seed, loss in ((0, 3.5), (1, 3.7)):
        record = json.loads((toy.folder / "records" / f"gem-lr0.01-seed{seed}.json").read_text())
        record["result"]["validation_loss"], record["config"]["learning_rate"] = loss, 0.02
        (toy.folder / "records" / f"gem-lr0.02-seed{seed}.json").write_text(json.dumps(record))
    assert toy.set_aside() == {("gem", 0.02): [3.5, 3.7]}
    write_report(toy)
    assert (
        "**Set aside:** 2 runs of `gem` at 0.02 on the final seeds, with a mean of 3.6000."
        in (toy.folder / "report.md").read_text()
    )


def test_a_choice_of_chance_is_called_one(study):
    few = {"arms": {"relu": ["relu"], "gem": ["gem"]}, "final_seeds": [0, 1]}
    toy = study(learning_rates=[0.0099, 0.01], **few)
    run(toy)
    write_report(toy)
    report = (toy.folder / "report.md").read_text()
    assert "the second best trial of `relu`, `gem` was smaller than the spread" in report
    assert "These choices may be due to chance." in report
    toy = study("clear", learning_rates=[0.0001, 0.01, 1], **few)
    run(toy)
    write_report(toy)
    assert "These choices may be due to chance" not in (toy.folder / "report.md").read_text()


def test_an_arm_that_always_diverges_has_had_its_chance(study):
    toy = study(flags={"limit_for_silu": 1e-9})
    run(toy)
    assert toy.choices()["silu"] == ("silu", 0.000625)  # the lowest, after three extensions
    write_report(toy)
    report = (toy.folder / "report.md").read_text()
    assert "8 runs of `silu` and 0 of `relu` diverged. Both finished on 0 seeds (p = 0.016 after Holm)." in report
    assert "(p = 0.016 after Holm). `silu` is **worse**." in report
    assert "| silu | `silu` | 0.000625 (the edge of the grid) |" in report

    def refuse(constant):
        raise AssertionError(constant)

    json.loads((toy.folder / "results.json").read_text(), parse_constant=refuse)  # NaN is not JSON


def test_a_study_under_way(study):
    toy = study(learning_rates=[0.01])
    with pytest.raises(StudyError, match=r"lacks 8 tuning runs, such as relu-lr0.01-seed100\. Run the command"):
        write_report(toy)
    run(toy)
    for seed in (5, 6):
        (toy.folder / "records" / f"relu-lr0.01-seed{seed}.json").unlink()
    write_report(toy)
    report = (toy.folder / "report.md").read_text()
    assert "**Not finished:** 2 runs are missing, such as relu-lr0.01-seed5." in report
    assert "On 6 seeds" in report
    assert "**pending**" in report  # also of what is plainly settled: gem_n2 is better
    assert "the verdict is given when they are done" in report


def test_a_run_that_skipped_batches_is_told_in_the_report(study):
    toy = study(flags={"skips": "silu-lr0.01-seed1"}, final_seeds=[0, 1])
    run(toy)
    write_report(toy)
    assert "**Not paired:** seed 1: an arm skipped batches" in (toy.folder / "report.md").read_text()


def test_pairing_is_claimed_by_the_hashes_that_there_are(study):
    toy = study(final_seeds=[0, 1])
    run(toy)
    for path in (toy.folder / "records").glob("*"):
        record = json.loads(path.read_text())
        del record["samples_hash"]  # as older records
        if path.stem == "silu-lr0.01-seed1":
            record["sessions"][0]["hardware"] = {**record["sessions"][0]["hardware"], "gpus": ["another"]}
        path.write_text(json.dumps(record))
    write_report(study(final_seeds=[0, 1]))
    report = (toy.folder / "report.md").read_text()
    assert "are equal for initial weights and the order of samples. On 1 seed, the arms ran" in report


@pytest.mark.parametrize(
    ("changes", "scaled"),
    [
        ({"flags": {"own_gain": True}}, "each scaled for its activation"),
        ({"arms": {"relu": ["relu"], "gem": ["gem_n2 own_gain=yes"]}}, "some scaled for their activation"),
    ],
)
def test_arms_with_gains_of_their_own_are_paired_by_the_signs_of_their_weights(study, changes, scaled):
    toy = study(**changes, final_seeds=[0, 1])
    run(toy)
    write_report(toy)
    assert f"the same initial weights, {scaled}, and saw" in (toy.folder / "report.md").read_text()


def test_arms_that_differ_in_n_or_eps_have_a_picture_of_it(study):
    arms = {act: [act] for act in ("relu", "gem", "gem_n2", "egem", "egem_eps0.01", "egem_n2")}
    toy = study(arms=arms, learning_rates=[0.01], tuning_seeds=[], final_seeds=[0, 1])
    run(toy)
    write_report(toy)
    report = (toy.folder / "report.md").read_text()
    assert {path.name for path in toy.folder.glob("*.png")} == {"forest.png", "curves.png", "n.png", "eps.png"}
    assert "Outcome by n" in report
    assert "Outcome by eps" in report


def test_another_baseline_has_a_report_of_its_own(study, capsys):
    toy = study()
    run(toy)
    write_report(toy)
    first = (toy.folder / "report.md").read_text()
    cli.main(["report", str(toy.folder), "--baseline", "gem"])
    report = (toy.folder / "against-gem" / "report.md").read_text()
    assert "of `relu` was 0.0" in report
    assert "above that of `gem`" in report
    assert "| arm | verdict | difference |" in report  # what is asked first
    assert "The baseline of the plan is `relu`." in report
    assert (toy.folder / "report.md").read_text() == first
    with pytest.raises(SystemExit):
        cli.main(["report", str(toy.folder), "--baseline", "gelu"])
    assert "toy has no arm 'gelu'. Its arms are relu, gem, silu." in capsys.readouterr().err


def test_a_report_says_what_intervals_count(study):
    old = study("old")
    run(old)
    write_report(old)
    report = (old.folder / "report.md").read_text()
    assert (
        "The intervals of this study only count seeds. They do not account for the choice of evaluation samples."
        in report
    )
    assert "p two-way" not in report
    assert "limited by" not in report

    new = study("new", flags={"documents": 30, "spread": 0.02})
    run(new)
    write_report(new)
    report = (new.folder / "report.md").read_text()
    assert "The validation data have 3,030 tokens in 30 documents. Intervals count documents as well as seeds" in report
    assert (
        "p is the larger p of two tests: the sign-flip test over seeds, and the two-way test over seeds and documents"
        in report
    )
    found = {c.arm: c for c in new.comparisons()}
    parts = found["gem"].components
    shares = " | ".join(f"{100 * part / parts.variance:.0f} %" for part in (parts.seeds, parts.groups, parts.both))
    assert f"| gem | {parts.estimate.error:.2g} | {shares} | documents |" in report
    assert f"{found['gem'].p:.2g} over seeds, {found['gem'].p_two_way:.2g} over seeds and documents, " in report
    saved = json.loads((new.folder / "results.json").read_text())["comparisons"][0]["components"]
    assert saved["groups"] == parts.groups


@pytest.mark.parametrize("size", [12, 13])
def test_a_mixture_of_data_has_a_report_that_does_not_count_samples(study, size):
    """Also one of data of equal size, whose counts by document are the same."""
    toy = study(final_seeds=[0, 1], flags={"documents": 12})
    run(toy)
    for name in ("gem_n2-lr0.01-seed1", "gem_n2-lr0.01-seed100"):
        path = toy.folder / "records" / f"{name}.json"
        record = json.loads(path.read_text())
        record["data"]["hash"] = "other"
        parts, loss = record["evaluation"]["validation"], record["result"]["validation_loss"]
        parts |= {"num_units": size, "counts": [100] * size, "losses": [100 * loss] * size}
        if size == 12:
            before = json.loads((path.parent / "gem_n2-lr0.01-seed0.json").read_text())["evaluation"]["validation"]
            parts |= {"counts": before["counts"], "losses": [count * loss for count in before["counts"]]}
        path.write_text(json.dumps(record))
    toy = study(final_seeds=[0, 1], flags={"documents": 12})
    run(toy, allow_mixed=True)
    write_report(toy)
    report = (toy.folder / "report.md").read_text()
    assert "**Mixed:** tuning data: test in" in report
    assert "The intervals of this study only count seeds." in report
    assert "The validation data have" not in report
    assert tuning_components(toy) == {}


def test_the_number_of_validation_tokens_of_older_records(study):
    toy = study(**TWO_ARMS, final_seeds=[0, 1])
    run(toy)
    for path in (toy.folder / "records").glob("*"):
        record = json.loads(path.read_text())
        record["data"]["num_tokens"], record["result"]["unit"] = {"train": 10**6, "validation": 6665}, "tokens"
        path.write_text(json.dumps(record))
    write_report(study(**TWO_ARMS, final_seeds=[0, 1]))
    assert (
        "The validation data have 6,665 tokens. The intervals of this study" in (toy.folder / "report.md").read_text()
    )


def test_each_further_baseline_is_a_family(study):
    toy = study(further_baselines=["gem"])
    run(toy)
    write_report(toy)
    report = (toy.folder / "report.md").read_text()
    assert report.count("### Against `relu`") == report.count("### Against `gem`") == 1
    assert "the 2 arms that are compared with it form a family of hypotheses; this report has 2 families" in report
    assert "Verdicts against the plan's further baselines are below: `gem`." in report
    assert (toy.folder / "forest-against-gem.png").exists()
    assert "](forest-against-gem.png)" in report
    saved = json.loads((toy.folder / "results.json").read_text())
    assert [c["arm"] for c in saved["comparisons"]] == ["gem", "silu"]
    assert [c["arm"] for c in saved["further"]["gem"]] == ["relu", "silu"]
    assert [c["p_holm"] for c in saved["further"]["gem"]] == [c.p_holm for c in toy.comparisons("gem")]
    cli.main(["report", str(toy.folder), "--baseline", "relu"])  # the plan's own
    assert (toy.folder / "report.md").read_text() == report
    assert json.loads((toy.folder / "results.json").read_text()) == saved


def test_two_rates_on_the_final_seeds_are_both_told(study):
    toy = study(metric="test_loss", flags={"test": 1}, final_rates=2, final_seeds=[0, 1, 2])
    run(toy)
    write_report(toy)
    report = (toy.folder / "report.md").read_text()
    assert "Validation over all seeds decided between the two." in report
    for arm, trials in toy.finalists().items():
        for act, rate in trials:
            values = [toy.value(Run(act, rate, seed), "validation_loss") for seed in (100, 101, 0, 1, 2)]
            means = (sum(values[:2]) / 2, sum(values[2:]) / 3, sum(values) / 5)
            chosen = "yes" if (act, rate) == toy.choices()[arm] else ""
            cells = [arm, f"`{act}`", f"{rate:g}", *(f"{mean:.4f}" for mean in means), "0", chosen]
            assert f"| {' | '.join(cells)} |" in report
    assert report.count("| yes |") == 3
    assert "These choices may be due to chance" not in report


def test_the_dose_is_drawn_where_records_have_the_scale(study):
    arms = {act: [act] for act in ("relu", "gem_n2", "egem_n2", "egem_n2_eps0.01")}
    toy = study(arms=arms, learning_rates=[0.01], tuning_seeds=[], final_seeds=[0, 1])
    run(toy)
    assert dose(toy) is None
    for path in (toy.folder / "records").glob("*"):
        record = json.loads(path.read_text())
        record["activation_inputs"] = {"rms": 0.5, "layers": {}}
        path.write_text(json.dumps(record))
    toy = study(arms=arms, learning_rates=[0.01], tuning_seeds=[], final_seeds=[0, 1])
    assert _dose_of(toy, "gem_n2") == ("E-GEM, n = 2", pytest.approx(2))
    assert _dose_of(toy, "egem_n2") == ("E-GEM, n = 2", pytest.approx(0.2))
    assert _dose_of(toy, "relu") is None
    write_report(toy)
    assert (toy.folder / "dose.png").read_bytes().startswith(b"\x89PNG")
    assert "](dose.png)" in (toy.folder / "report.md").read_text()
