"""Plans, records and folders of studies that somebody else has made, or that are damaged."""

import json
import re
import shutil

import pytest

from hf_gem import cli
from hf_gem.compare.card import add_comparison
from hf_gem.compare.driver import Driver
from hf_gem.compare.plan import Plan, PlanError, Run, load_plan, parse_flags
from hf_gem.compare.report import write_report
from hf_gem.compare.study import Study, StudyError
from recipes import compare as compare_recipe
from tests.compare.toy import PLAN, TWO_ARMS, recipes_of, run, started

for package in ("scipy", "matplotlib", "markdown_it"):
    pytest.importorskip(package, reason="reports need it")

from markdown_it import MarkdownIt  # noqa: E402

from hf_gem.compare.summary import write_summary  # noqa: E402

DEEP = "[" * 50_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *(({"name": name}, "name of a plan must be made of") for name in ("../x", ".", "..", "a/b", "", "a b", "x\n")),
        *(({"recipe": name}, "recipe of a plan must be made of") for name in ("../../x", "/tmp/x", "a\\b", "a\0")),
        ({"preset": "-x --y"}, "preset of a plan must be made of"),
        *(
            ({"arms": {"relu": ["relu"], arm: ["gem"]}}, "arms of a plan")
            for arm in ("<b>", "../x", "a|b", "`", "[x](y)")
        ),
        ({"arms": [["relu"]]}, r"arms must be a mapping, got \[\['relu'\]\]"),
        ({"arms": {"relu": ["relu"], "gem": "gem"}}, r"arms\['gem'\] must be a list, got 'gem'"),
        ({"arms": {"relu": ["relu"], "gem": [3]}}, r"arms\['gem'\]\[0\] must be text, got 3"),
        ({"arms": {"relu": ["relu"], "gem": ["gem x=\x1b[2J"]}}, "acts must be printable"),
        *(({"arms": {"relu": ["relu"], "x": [f"gem x={mark}"]}}, "acts must not contain") for mark in "`|<>[]$\\"),
        ({"learning_rates": "0.1"}, "learning_rates must be a list, got '0.1'"),
        ({"learning_rates": [True]}, r"learning_rates\[0\] must be a number, got True"),
        ({"learning_rates": [0.1, float("inf")]}, "positive, finite and ascending"),
        ({"learning_rates": [0.1, 10**400]}, r"learning_rates\[1\] must be a number, got 1000"),
        ({"final_seeds": [0, 1.5]}, r"final_seeds\[1\] must be a whole number, got 1.5"),
        ({"final_seeds": [0, -1]}, "seeds must be 0 to"),
        ({"smallest_effect": float("nan")}, "smallest_effect must be above 0"),
        ({"smallest_effect": float("inf")}, "smallest_effect must be above 0 and finite"),
        ({"notes": None}, "notes must be text, got None"),
        ({"flags": {"steps": [1]}}, r"flags\['steps'\] must be"),
        ({"flags": {3: 4}}, "flags must be text as a key"),
        ({"flags": {"x": "\x1b[2J"}}, "flags must be printable"),
        ({"flags": {"output-dir": "/tmp/x"}}, "flags must be named as in --help"),
        ({"flags": {"a b": 1}}, "flags must be named as in --help"),
        *(
            ({"flags": {flag: "x"}}, f"flags must not include {flag}; to use")
            for flag in ("push_to_hub", "hub_public", "config")
        ),
        ({"tuning_flags": {"push_to_hub": "a/b"}}, "flags must not include push_to_hub; to use"),
        ({"arms": {"relu": ["relu"], "x": ["gem push_to_hub=a/b"]}}, "flags must not include push_to_hub; to use"),
        ({"arms": {"relu": ["relu"], "x": ["gem x={}"]}}, "flag x must be text, a number"),
        ({"flags": {"dataset": "https://me:secret@host/x"}}, "contains a password or token"),
        ({"notes": "with hf_" + "a" * 34}, "contains a password or token"),
        ({"notes": "\ud800"}, "half a character"),
        ({"learning_rates": [1.0 / n for n in range(1, 999)]}, "positive, finite and ascending"),
        ({"arms": {"x": ["y" * 9999], "relu": ["relu"]}}, "unknown activation 'yyy"),
        ({"baseline": "no", "arms": {f"arm{n}": ["relu"] for n in range(999)}}, "got 'no'"),
    ],
)
def test_plans_that_are_refused(changes, message):
    with pytest.raises(PlanError, match=message) as error:
        Plan(**{**PLAN, **changes})
    assert "secret" not in str(error.value)
    assert "hf_a" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "3", "null", "{", "name: [", "!!python/object/apply:os.system [x]", "a: !!python/name:os.system"),
        *(DEEP, "{a: " * 3000, "1: 2\na: 3", "? [1]\n: 2", "arms: [[1]]", "arms: {a: b, 1: c}", "arms: 3"),
        *("learning_rates: [[]]", "learning_rates: [x]", "learning_rates: 3", "final_seeds: {a: 1}", "flags: [1]"),
        "\n".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]" if n else "a1: &a1 [x]" for n in range(9)),
        "flags: {x: &a [*a]}",
        *(f"notes: !!{kind} '{text}'" for kind in ("int", "float", "bool", "timestamp") for text in ("", "x")),
        *("notes: 2001-99-99", "notes: !!binary é", "? !!set x\n: 1", f"!{'x' * 5000} y", f"{'x' * 5000}: 1"),
        f"learning_rates: [{'x' * 5000}]",
        "\n".join(f"field{n}: 1" for n in range(999)),
    ],
)
def test_plans_that_are_none(tmp_path, text):
    path = tmp_path / "hostile.yaml"
    path.write_text(text)
    with pytest.raises(PlanError, match=r"hostile\.yaml") as error:
        load_plan(path)
    assert len(str(error.value)) < 600 + len(str(tmp_path))
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match=r"cannot read the plan .*hostile\.yaml: "):
        load_plan(path)


def test_a_plan_runs_and_writes_nothing_elsewhere(tmp_path, monkeypatch, capsys):
    """recipe: ../../x ran that file, and name: ../x wrote outside."""
    monkeypatch.chdir(tmp_path)
    evil = tmp_path / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\n")
    fields = {**PLAN, "final_seeds": [0, 1]}
    for field, value in (("recipe", str(evil.with_suffix(""))), ("name", "../written")):
        (tmp_path / "plan.yaml").write_text(json.dumps({**fields, field: value}))
        with pytest.raises(PlanError, match=f"{field} of a plan must be made of"):
            compare_recipe.main([f"--plan={tmp_path / 'plan.yaml'}", "--jobs=0"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.py", "plan.yaml"]


def test_the_driver_is_no_recipe(study):
    toy = study(recipe="compare")
    (recipes_of(toy) / "compare.py").write_text("")
    with pytest.raises(PlanError, match=r"no recipe 'compare'\. It has toy\."):
        Driver(toy, recipes_of(toy))


def test_flags_that_are_no_yaml():
    for word in ("x=[", "x=!!python/name:os.system", f"x={DEEP}", f"x=0x{'f' * 5000}"):
        with pytest.raises(PlanError, match="cannot read the value of 'x="):
            parse_flags([word])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *(("", "cannot be read"), ("[]", "must be a mapping"), (DEEP, "nested too deeply"), ("{}", "is missing")),
        ('{"hash": 3, "plan": {}}', "hash must be text, got 3"),
        ('{"hash": "", "plan": []}', r"plan must be a mapping, got \[\]"),
        ('{"hash": "", "plan": {}}', "lacks the fields name, recipe"),
        ('{"hash": "", "plan": {"x": 1}}', "has the unknown fields x"),
        (json.dumps({"hash": "", "plan": {**PLAN, "arms": 3}}), "arms must be a mapping, got 3"),
        (json.dumps({"hash": "", "plan": {**PLAN, "recipe": "../x"}}), "recipe of a plan must be made of"),
        (json.dumps({"hash": "", "plan": PLAN}), "was changed after it was frozen"),
    ],
)
def test_a_frozen_plan_that_is_none(study, content, message, capsys):
    folder = study().folder
    (folder / "plan.json").write_text(content)
    with pytest.raises(PlanError, match=rf"plan\.json.*{message}"):
        Study(folder)
    with pytest.raises(SystemExit):
        cli.main(["report", str(folder)])
    assert "error: " in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study, to be damaged in a copy."""
    from hf_gem.compare.study import freeze
    from tests.compare.toy import TOY

    root = tmp_path_factory.mktemp("finished")
    (root / "recipes").mkdir()
    (root / "recipes" / "toy.py").write_text(TOY)
    freeze(Plan(**{**PLAN, **TWO_ARMS, "flags": {"documents": 4}, "final_seeds": [0, 1]}), root / "study")
    run(Study(root / "study"))
    return root


def damaged(finished, tmp_path, change):
    """A copy of a study, one of whose records is another."""
    shutil.copytree(finished, tmp_path / "copy")
    path = tmp_path / "copy" / "study" / "records" / f"{Run('gem', 0.01, 1).name}.json"
    record = json.loads(path.read_text())
    changed = change(record)
    path.write_text(changed if isinstance(changed, str) else json.dumps(record if changed is None else changed))
    return Study(tmp_path / "copy" / "study")


def put(*keys, to):
    """Sets, or removes, what stands in a record under some keys."""

    def change(record):
        *path, last = keys
        for key in path:
            record = record[key]
        if to is put:
            del record[last]
        else:
            record[last] = to

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *((lambda record, text=text: text, words) for text, words in (
            ("", "cannot be read"), ("{", "cannot be read"), ("[]", "must be a mapping"), ("{}", "is missing"),
            (DEEP, "nested too deeply"), ('"x"', "must be a mapping"), ("3", "must be a mapping"),
            ('"\\ud800"', "cannot be read"),
        )),
        (put("status", to="running"), "status must be finished or diverged, got .running"),
        (put("status", to="won"), "status must be one of running"),
        (put("status", to=put), "status is missing"),
        (put("sessions", to=[]), "sessions must have at least one entry"),
        (put("sessions", to={}), "sessions must be a list"),
        (put("sessions", 0, "seconds", to="3"), r"sessions\[0\].seconds must be a number, got '3'"),
        (put("sessions", 0, "versions", to=[]), r"sessions\[0\].versions must be a mapping"),
        (put("sessions", 0, "hardware", "gpus", to=3), r"sessions\[0\].hardware.gpus must be a list"),
        (put("data", to="x"), "data must be a mapping"),
        (put("data", "hash", to=put), "data.hash is missing"),
        (put("result", to=[1]), "result must be a mapping"),
        (put("result", "validation_loss", to="0"), "result.validation_loss must be a number or null, got '0'"),
        (put("result", "validation_loss", to=put), "result.validation_loss must be a number or null, got 'nothing'"),
        (put("result", "validation_loss", to={}), r"result\['validation_loss'\] must be"),
        (put("result", "unit", to="<b>"), "result.unit must be a word"),
        (put("curves", "validation_loss", to=[[1]]), "must hold pairs"),
        (put("curves", "validation_loss", to=[[1, "x"]]), r"must be a number or null, got 'x'"),
        (put("curves", "validation_loss", to=3), "must be a list"),
        (put("evaluation", "unit", to="<b>"), "evaluation.unit must be a word"),
        (put("evaluation", "validation", "counts", to=[1]), "must have lists of equal length"),
        (put("evaluation", "validation", to=4), "evaluation.validation must be a mapping"),
        (put("config", to=[]), "config must be a mapping"),
        (put("config", "dataset", to=["x"]), r"config\['dataset'\] must be"),
        (put("nonfinite", to=3), "nonfinite must be a mapping"),
        (put("init_hash", to=None), "init_hash must be text"),
        (put("activation_inputs", to={"rms": "x"}), "activation_inputs.rms must be a number"),
        (put("match", to={"hidden_act": 3}), "match.hidden_act must be text, got 3"),
        # One of another run, under this one's name.
        (put("config", "hidden_act", to="relu"), "its hidden_act is 'relu', but a record of this name has 'gem'"),
        (put("match", to={"hidden_act": "egem"}), "its hidden_act is 'egem', but a record of this name has 'gem'"),
        (put("config", "learning_rate", to=0.02), "its learning_rate is 0.02, but a record of this name has 0.01"),
        (put("config", "seed", to=0), "its seed is 0, but a record of this name has 1"),
    ],
)  # fmt: skip
def test_a_record_that_is_none_is_named_with_its_field(finished, tmp_path, change, message, capsys):
    study = damaged(finished, tmp_path, change)
    with pytest.raises(StudyError, match=rf"gem-lr0\.01-seed1\.json.*{message}"):
        write_report(study)
    with pytest.raises(SystemExit):
        cli.main(["report", str(study.folder)])
    error = capsys.readouterr().err
    assert "gem-lr0.01-seed1.json" in error
    assert len(error) < 1000


def test_an_empty_record_is_no_finished_run(finished, tmp_path):
    """`{}` counted as one."""
    study = damaged(finished, tmp_path, lambda record: {})
    with pytest.raises(StudyError, match="is missing"):
        study.missing()


def test_hidden_files_are_no_records(finished, tmp_path):
    study = damaged(finished, tmp_path, lambda record: None)
    (study.folder / "records" / "._gem-lr0.01-seed1.json").write_bytes(b"\0\5\x16\7")  # of macOS
    (study.folder / "records" / ".hidden.json").write_text("{}")
    assert study.num_records() == 4
    write_report(study)


@pytest.mark.parametrize("name", ["notes.json", "gem-lrx-seed1.json", "gem-lr1..2-seed1.json", "gem-lr1-seed.json"])
def test_a_file_that_is_no_record_is_named(finished, tmp_path, name):
    study = damaged(finished, tmp_path, lambda record: None)
    (study.folder / "records" / name).write_text("{}")
    with pytest.raises(StudyError, match=f"{name} is not named like a record of a run"):
        write_report(study)


def test_a_run_that_leaves_a_broken_record(study):
    toy = study(**TWO_ARMS)
    recipe = recipes_of(toy) / "toy.py"
    recipe.write_text(recipe.read_text().replace("json.dumps(record)", "'{}'"))
    with pytest.raises(
        StudyError, match=r"exited with status 0, and its record is invalid: .*record\.json: \w+ is missing"
    ):
        run(toy)
    assert len(started(toy)) == 1
    assert not toy.num_records()


def test_what_others_have_put_beside_a_run_stays(study):
    toy = study(**TWO_ARMS)
    folder = toy.folder / "runs" / Run("gem", 0.01, 1).name
    (folder / "checkpoints" / "step_mine").mkdir(parents=True)
    mine = [folder / "mine.safetensors", folder / "checkpoints" / "step_mine" / "COMPLETE"]
    for path in mine:
        path.write_text("mine")
    run(toy)
    assert [path.read_text() for path in mine] == ["mine", "mine"]
    assert not (folder / "model.safetensors").exists()


PAYLOAD = "`|x|` <script>alert(1)</script> <!-- [a](http://evil) ![b](http://evil) *x* & $x$ \n\n# h\n\n- x\n---\n"


def test_nothing_in_a_study_brings_markdown_or_html_into_its_pages(study, tmp_path):
    """Notes, datasets, flags, and all texts of the records."""

    def made(name, text):
        flat = " ".join(text.split())
        toy = study(name, **TWO_ARMS, notes=text, flags={"steps": 10, "dataset": flat}, final_seeds=[0, 1], name=name)
        run(toy)
        for path in (toy.folder / "records").iterdir():
            record = json.loads(path.read_text())
            record["config"] |= {"dataset": text, "other": text}
            record["data"]["hash"] = record["init_hash"] = record["order_hash"] = text
            record["mixed_precision"] = f"{text} {path.stem}"
            for session in record["sessions"]:
                session |= {"commit": text, "versions": {text: f"{text} {path.stem}"}}
                session["hardware"] |= {"cpu": text, "gpus": [text]}
            path.write_text(json.dumps(record))
        toy = Study(toy.folder)
        write_report(toy)
        write_summary([toy], "relu", toy.folder)
        (tmp_path / "README.md").write_text("---\nx: y\n---\n# A\n\n## Use\n")
        here = {"hidden_act": "gem", "other": "here"}
        add_comparison(tmp_path / "README.md", {"recipe": "toy", "run_id": "x", "config": here}, toy)
        pages = [toy.folder / "report.md", toy.folder / "summary.md", tmp_path / "README.md"]
        return toy.folder, [page.read_text().replace(name, "name") for page in pages]

    folder, texts = made("hostile", PAYLOAD)
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    for text, expected in zip(texts, made("harmless", "x")[1], strict=True):
        assert "alert" in text
        found, good = ([part for token in parser.parse(page) for part in (token, *(token.children or ()))]
                       for page in (text, expected))  # fmt: skip
        assert not {part.type for part in found} & {"html_block", "html_inline", "link_open"}
        for kind in ("heading_open", "table_open", "tr_open", "td_open", "image", "hr", "list_item_open", "em_open"):
            assert [p.type for p in found].count(kind) == [p.type for p in good].count(kind), kind
    for page in ("report.html", "summary.html"):
        html = (folder / page).read_text()
        assert "<script" not in html
        assert "http://evil" not in re.findall(r"(?:href|src)=\"([^\"]*)\"", html)
