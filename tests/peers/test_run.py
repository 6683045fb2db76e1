"""Tests the page that is made from the results of the suites. The suites themselves take long and need PyPI."""

from tests.peers import run

_SUITE = '<testsuites><testsuite name="{name}">{cases}</testsuite></testsuites>'


def write(folder, library, arm, states, name="pytest"):
    ends = {"passed": "", "skipped": "<skipped/>", "failed": '<failure message="AssertionError: a | b&#10;more"/>'}
    cases = "".join(f'<testcase classname="{c}" name="{t}">{ends[s]}</testcase>' for (c, t), s in states.items())
    run._path(library, arm, folder).write_text(_SUITE.format(name=name, cases=cases))


def test_what_differs_is_named(tmp_path):
    tests = [("tests.test_peers.BertModelTest", name) for name in ("test_a", "test_b", "test_c")]
    write(tmp_path, "transformers", "gelu", dict(zip(tests, ("passed", "failed", "skipped"), strict=True)))
    write(tmp_path, "transformers", "gem_n2", dict(zip(tests, ("failed", "failed", "skipped"), strict=True)))
    models = [("tests.test_models", f"test_model_forward[1-{name}]") for name in ("resnet18", "vit_tiny")]
    for arm in ("", "gem_n2"):
        write(tmp_path, "timm", arm, dict.fromkeys(models, "passed"), "forward")
    page = run.render({library: run.read(library, tmp_path) for library in run.ARMS})
    assert "of 1 types whose config names the activation: Bert." in page
    assert "| `gelu` | 1 | 1 | 1 |\n| `gem_n2` | 0 | 2 | 1 |" in page
    assert "| BertModelTest test_a | passed | failed | AssertionError: a \\| b |" in page
    assert "BertModelTest test_b" not in page
    assert 'We ran only the tests that `-k "forward"` selects.' in page
    assert "small models of 2 modules: resnet18, vit_tiny." in page
    assert "Every test has the same result with `gem_n2` as with its own." in page
