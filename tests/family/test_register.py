"""What every family gets, ours and one that is not (`dgem.py`): by the same tests."""

import copy
import dataclasses
import importlib
import math
import os
import pickle
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import timm
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

import hf_gem
from hf_gem import functional
from hf_gem.compare.plan import load_plan
from hf_gem.family import formulas
from hf_gem.family.arithmetic import power
from hf_gem.family.check import check, exact_slope
from hf_gem.family.table import FAMILIES, Family
from hf_gem.fit import Histogram, fit
from hf_gem.integrations.families import register_shipped
from hf_gem.modules import GemActivation
from recipes import gpt2_pretrain
from tests import oracle
from tests.family import dgem
from tests.family.dgem import DGEM
from tests.helpers import ROOT, run_here, write_corpus
from tests.helpers import TINY as TINY_RUN

families = pytest.mark.parametrize("family", list(FAMILIES.values()), ids=lambda family: family.name)
SMALL = {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 64, "n_positions": 16}
TINY = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def eps_of(family: Family, eps: float = 0.3) -> float:
    return eps if family.fixed_eps is None else family.fixed_eps


def member(family: Family, n: int = 2, learnable: bool = False) -> hf_gem.GemSpec:
    return hf_gem.GemSpec(family.name, n, eps_of(family, 0.25), learnable and family.fixed_eps is None)


def test_the_families():
    assert list(FAMILIES) == ["gem", "egem", "segem", "dgem"]
    assert hf_gem.register_family(DGEM) is DGEM  # once more


# ---- numbers


@families
@pytest.mark.parametrize("default_device", ["cpu", "meta"])
def test_it_agrees_with_itself(family, default_device):
    with torch.device(default_device):
        check(family)


@families
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_slope_against_fractions(family, n, dtype):
    x = torch.cat([torch.randn(200), torch.randn(50) * 1e3, torch.randn(50) * 1e-3]).to(dtype)
    for eps in {eps_of(family, eps) for eps in (1e-4, 0.3, 10.0)}:
        value = formulas.forward(family, n, eps, x).tolist()
        slope = formulas.slope(family, n, eps, x).tolist()
        # Counted in test_formulas: at most 4n + 7 roundings in a value; 6n + 9 in a slope, whose factor 1 - 2n s may
        # vanish, so that they count on the scale of 1 + 2n.
        unit = oracle.unit_roundoff(dtype)
        for point, got, got_slope in zip(map(Fraction, x.tolist()), value, slope, strict=True):
            exact = float(family.exact(point, n, Fraction(eps)))
            assert abs(got - exact) <= (4 * n + 8) * unit * abs(exact) + oracle.min_normal(dtype)
            exact = float(exact_slope(family, point, n, Fraction(eps)))
            assert abs(got_slope - exact) <= (8 * n + 10) * unit * max(abs(exact), 1 + 2 * n)


@families
@pytest.mark.parametrize("n", [1, 2])
def test_derivatives(family, n):
    x = torch.randn(12, dtype=torch.float64)
    x = (x + 0.05 * x.sign()).requires_grad_()
    (slope,) = torch.autograd.grad(family.value(x, n, 1.0, eps_of(family)).sum(), x)
    torch.testing.assert_close(formulas.slope(family, n, eps_of(family), x.detach()), slope)

    def function(v):
        return functional.activation(v, family.name, n, eps_of(family))

    assert torch.autograd.gradcheck(function, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, x)
    if family.fixed_eps is None:
        eps = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda v, e: functional.activation(v, family.name, n, e), (x, eps))
        assert torch.autograd.gradgradcheck(lambda v, e: functional.activation(v, family.name, n, e), (x, eps))


# ---- names and modules


@families
@pytest.mark.parametrize("learnable", [False, True])
def test_names_and_modules(family, learnable):
    spec = member(family, learnable=learnable)
    assert hf_gem.parse(spec.name) == hf_gem.parse(spec.name.upper()) == spec
    module = hf_gem.get_activation(spec.name)
    assert module.spec == spec
    x = torch.randn(4, 6)
    expected = formulas.forward(family, 2, spec.eps, x)
    assert torch.equal(module(x), expected)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), expected)
        assert other.spec == spec
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)


@families
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_scripting(family):
    module = hf_gem.get_activation(member(family).name)
    x = torch.randn(30)
    assert torch.equal(torch.jit.script(nn.Sequential(module))(x), module(x))


@families
def test_what_else_takes_a_family(family):
    gate, up = torch.randn(2, 50, dtype=torch.float64)
    eps = eps_of(family)
    expected = formulas.forward(family, 1, eps, gate) * up
    torch.testing.assert_close(functional.gem_glu(gate, up, family.name, 1, eps), expected)
    assert hf_gem.gain(member(family).name) > 1
    counts = Histogram()
    counts.update(torch.randn(500))
    found = fit(counts, hf_gem.get_activation(member(family).name), family.name, n=2)
    assert found.relative_error < 1e-6


# ---- models


def logits(model):
    torch.manual_seed(0)
    with torch.no_grad():
        return model.eval()(torch.arange(8)[None]).logits


@families
def test_transformers(family, tmp_path):
    name = member(family).name
    for config, cls in (
        (GPT2Config(**SMALL, hidden_act=name), GPT2LMHeadModel),
        (BertConfig(**TINY, hidden_act=name), BertForMaskedLM),
    ):
        model = cls(config)
        found = hf_gem.audit(model)
        assert {call.function for call in found.calls if call.kind == "gem"} == {name}
        model.save_pretrained(tmp_path / cls.__name__)
        again = cls.from_pretrained(tmp_path / cls.__name__)
        assert torch.equal(logits(again), logits(model))


@families
def test_conversion(family, tmp_path):
    model = GPT2LMHeadModel(GPT2Config(**SMALL))
    before = logits(model)
    report = hf_gem.convert(model, member(family).name)
    assert {entry.new for entry in report.replaced} == {member(family).name}
    converted = logits(model)
    assert not torch.equal(converted, before)
    model.save_pretrained(tmp_path / "model")
    assert torch.equal(logits(GPT2LMHeadModel.from_pretrained(tmp_path / "model")), converted)
    hf_gem.revert(model)
    assert torch.equal(logits(model), before)


@families
def test_timm(family, tmp_path):
    name = member(family).name
    model = timm.create_model("test_resnet", act_layer=name)
    modules = [module for module in model.modules() if isinstance(module, GemActivation)]
    assert {module.spec.name for module in modules} == {name}
    timm.models.save_for_hf(model, tmp_path / "model")
    again = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(again.eval()(x), model.eval()(x))


def test_recipes_and_plans(tmp_path):
    """Any family trains by name; its checkpoint and its card come out like ours."""
    data = [f"--dataset={write_corpus(tmp_path / 'corpus.txt')}", f"--cache_dir={tmp_path / 'cache'}"]
    out = run_here(gpt2_pretrain, tmp_path / "run", *TINY_RUN, *data, "--hidden_act=dgem_n2")
    assert "Validation loss" in out
    assert "`dgem_n2`" in (tmp_path / "run" / "README.md").read_text()
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "run")
    assert hf_gem.audit(model).complete
    plan = load_plan(ROOT / "recipes" / "plans" / "smoke.yaml")
    assert dataclasses.replace(plan, arms={**plan.arms, "dgem": ["dgem", "dgem_n2"]}).acts[-1] == "dgem_n2"


# ---- what is refused


def changed(**changes):
    return dataclasses.replace(DGEM, **{"name": "xgem", "title": "X-GEM", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"slope": lambda z, n, r, e: DGEM.slope(z, n, r, e) * 1.001},
            r"slope of family 'xgem' is .* at x = .*must equal the derivative of exact, which is",
        ),
        (
            {"value": lambda z, n, r, e: DGEM.value(z, n, r, e) + 1e-6},
            r"value of family 'xgem' is .* at x = .*must equal exact, which is",
        ),
        (
            {"eps_slope": lambda z, n, r, e: DGEM.value(z, n, r, e) - z},
            r"eps_slope of family 'xgem' is .* must equal the derivative of exact with respect to log\(eps\)",
        ),
        (
            {"value": lambda z, n, r, e: z * (power(z * r, 2 * n) / (power(z * r, 2 * n) + e))},
            r"value of family 'xgem' is nan at x = .* in float32\. It must equal exact, which is -1\.26",
        ),
        (
            {"slope": lambda z, n, r, e: DGEM.slope(z, n, r, e) + 0.0 * z},
            "slope of family 'xgem' is nan at x = -inf, .* in float32. It must be a number or infinity.",
        ),
        ({"value": lambda z, n, r, e: DGEM.value(z, n, r, e).sum()}, "It must be elementwise"),
        (
            {"value": lambda z, n, r, e: DGEM.value(z, n, r, e) * (1.5 if isinstance(e, torch.Tensor) else 1)},
            r"value of family 'xgem' is .* n = 1, eps = 1 as a tensor in float64\. It must equal exact, which is",
        ),
        (
            {"slope": lambda z, n, r, e: DGEM.slope(z, n, r, e) * (1.5 if isinstance(e, torch.Tensor) else 1)},
            r"slope of family 'xgem' is .* as a tensor in float64\. It must equal the derivative of exact, which is",
        ),
        (
            {"value": lambda z, n, r, e: DGEM.value(z, n, r, e.detach() if isinstance(e, torch.Tensor) else e)},
            r"the derivative with respect to log\(eps\) of value of family 'xgem' is 0 at .* must equal the deriv",
        ),
        ({"slope_at": lambda y, n, r, e, d: y, "inverse": lambda y, n, r, e: y}, "slope_at of family 'xgem' is"),
        ({"slope_at": lambda y, n, r, e, d: y}, "got slope_at without inverse"),
        (
            {"name": "dgem", "title": "D-GEM", "formula": "another"},
            "taken by the family 'x t / .*, or restart the program",
        ),
        ({"name": "relu", "title": "ReLU"}, r"taken by torch\.nn\.functional\.relu"),
        ({"name": "X2"}, "got the family name 'X2'.*lower-case letters"),
        ({"title": "other"}, "The title must equal the name"),
    ],
)
def test_a_family_that_contradicts_itself(changes, message):
    with pytest.raises(ValueError, match=message):
        hf_gem.register_family(changed(**changes))
    assert "xgem" not in FAMILIES


def test_copies_of_a_family():
    family = changed()  # which is not registered
    assert copy.copy(family) is copy.deepcopy(family) is family


def test_what_is_no_family():
    with pytest.raises(TypeError, match=r"got 5 of type int\. register_family takes a hf_gem\.Family\."):
        hf_gem.register_family(5)


def test_what_kernels_do_not_have():
    def value(z, n, r, e):
        return DGEM.value(z, n, r, e) + 0.0 * torch.sin(z.clamp(-1.0, 1.0))

    with pytest.raises(TypeError, match=r"uses the operation 'sin'.* A formula can use .* torch\.where"):
        hf_gem.register_family(changed(value=value))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            lambda z, n, r, e: DGEM.value(z, n, r, e) * (z * z >= 0.0),
            r"the result of a comparison.* condition of torch\.where",
        ),
        (lambda z, n, r, e: DGEM.value(z, n, r, e) * (z * z) ** 0, r"uses the operation '\*\*'"),
        (
            lambda z, n, r, e: torch.where((z > 0.0) | (z < 0.0), DGEM.value(z, n, r, e), z),
            r"uses the operation '\|'",
        ),
        (
            lambda z, n, r, e: torch.where(z == 7.0, math.nan, DGEM.value(z, n, r, e)),
            "the number nan, which kernels do",
        ),
        (
            lambda z, n, r, e: DGEM.value(z, n, r, e) * (1.0 if e > 0.0 else -1.0),
            "applies '>' to numbers made of r and e. Kernels can combine such numbers with",
        ),
    ],
)
def test_formulas_that_kernels_would_compute_otherwise(value, message):
    with pytest.raises(TypeError, match=message):
        hf_gem.register_family(changed(value=value))


def test_a_fixed_member_of_a_family_that_is_not_registered(monkeypatch):
    fixed = changed().fixed(0.5, "ygem", "Y-GEM", "x")
    with pytest.raises(ValueError, match=r"'ygem', which uses the kernels of 'xgem'.*register_family for it first"):
        hf_gem.register_family(fixed)
    assert "ygem" not in FAMILIES

    monkeypatch.setitem(FAMILIES, "xgem", changed(slope=lambda z, n, r, e: DGEM.slope(z, n, r, e) * 1.0))
    with pytest.raises(ValueError, match="A family of that name with the same formulas must be registered"):
        hf_gem.register_family(fixed)


def test_a_name_that_another_library_has(monkeypatch):
    from transformers.activations import ACT2FN

    monkeypatch.setitem(ACT2FN, "xgem", nn.ReLU)
    with pytest.raises(ValueError, match=r"ACT2FN\['xgem'\] is already"):
        hf_gem.register_family(changed())
    assert "xgem" not in FAMILIES


# ---- where nobody has registered it


def load_elsewhere(folder, *lines):
    """Loads a checkpoint in a process that has not registered D-GEM, after some lines of code; returns its logits."""
    script = f"""
import sys, torch
{"; ".join(lines)}
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
torch.save(model.eval()(torch.arange(8)[None]).logits.detach(), {str(folder / "logits")!r})
if sys.modules["hf_gem"]:
    sys.modules["hf_gem"].save_for_hub(model, {str(folder / "again")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "logits")


NOT_INSTALLED = 'sys.modules["hf_gem"] = None'


@pytest.mark.parametrize(
    ("converted", "lines"),
    [
        (False, [NOT_INSTALLED]),
        (True, ["import hf_gem"]),
        pytest.param(True, [NOT_INSTALLED], marks=pytest.mark.slow),
        pytest.param(True, [], marks=pytest.mark.slow),
        pytest.param(False, [], marks=pytest.mark.slow),
    ],
)
def test_a_checkpoint_takes_its_family_along(tmp_path, converted, lines):
    model = GPT2LMHeadModel(GPT2Config(**SMALL, **({} if converted else {"hidden_act": "dgem_n2"})))
    if converted:
        hf_gem.convert(model, "dgem_n2")
    hf_gem.save_for_hub(model, tmp_path)
    torch.testing.assert_close(load_elsewhere(tmp_path, *lines), logits(model))
    if lines != [NOT_INSTALLED]:  # what was loaded is saved again, with the same code
        for file in tmp_path.glob("*gem*.py"):
            assert (tmp_path / "again" / file.name).read_text() == file.read_text()


@pytest.mark.parametrize("lines", [["import hf_gem"], [NOT_INSTALLED]])
def test_a_family_that_takes_its_formulas_from_ours(tmp_path, monkeypatch, lines):
    (tmp_path / "fixed_family.py").write_text(
        "from hf_gem import register_family\nfrom hf_gem.family.egem import EGEM\n\n"
        'FIXED = register_family(EGEM.fixed(0.1, "fixedgem", "Fixed-GEM", "E-GEM with eps = 0.1"))\n'
    )
    (tmp_path / "importer.py").write_text("from fixed_family import FIXED\n")
    monkeypatch.syspath_prepend(tmp_path)
    importer = importlib.import_module("importer")  # comes first in sys.modules
    try:
        model = GPT2LMHeadModel(GPT2Config(**SMALL, hidden_act="fixedgem_n2"))
        hf_gem.save_for_hub(model, tmp_path / "saved")
        torch.testing.assert_close(load_elsewhere(tmp_path / "saved", *lines), logits(model))
    finally:
        del FAMILIES[importer.FIXED.name], sys.modules["importer"], sys.modules["fixed_family"]


def test_a_registered_family_of_the_same_name_stays():
    shipped = dataclasses.replace(DGEM)
    register_shipped(shipped)
    with pytest.warns(
        UserWarning, match="saved with the family 'another', and runs with the registered family 'x t / "
    ):
        register_shipped(dataclasses.replace(DGEM, formula="another"))
    assert FAMILIES["dgem"] is DGEM


def test_a_shipped_family_has_its_own_kernels_where_theirs_are_missing():
    register_shipped(changed().fixed(0.5, "ygem", "Y-GEM", "x"))
    assert FAMILIES.pop("ygem").kernels == "ygem"


def test_a_family_named_by_the_environment(tmp_path):
    (tmp_path / "mine.py").write_text(
        Path(dgem.__file__).read_text() + "\nimport hf_gem\n\nhf_gem.register_family(DGEM)\n"
    )
    (tmp_path / "other").mkdir()
    for namesake in ("other/mine.py", "other/random.py"):
        shutil.copyfile(tmp_path / "mine.py", tmp_path / namesake)
    code = "import random, hf_gem; print(hf_gem.get_activation('dgem_n3'))"
    for value, expected in (
        ("mine.py", "GemActivation(dgem, n=3"),
        (f"mine.py{os.pathsep}other/../mine.py", "GemActivation(dgem, n=3"),
        (f"mine.py{os.pathsep}other/mine.py", "(ImportError: the name mine belongs to the module /"),
        ("other/random.py", "(ImportError: the name random belongs to the module /"),
        ("none.py", "ImportError: HF_GEM_FAMILIES"),
    ):
        env = {**os.environ, "HF_GEM_FAMILIES": value}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path, env=env
        )
        assert expected in done.stdout + done.stderr
