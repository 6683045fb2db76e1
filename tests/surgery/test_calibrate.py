"""n and eps that are fitted: to what the activations receive, and to the output of the model."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_gem
from hf_gem import convert, revert
from hf_gem.fit import Histogram, error, fit_together
from hf_gem.surgery.kinds import kind, stock_slots
from tests.surgery.blocks import Block, Everything, X, replaced, unchanged

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


class Recorded(nn.Module):
    """Keeps what enters an activation."""

    def __init__(self, act):
        super().__init__()
        self.seen = []
        self.wrapped = (act,)

    def forward(self, x):
        self.seen.append(x.clone())
        return self.wrapped[0](x)


def histograms(model, data):
    """Path -> histogram of what enters that activation, and the activation."""
    twin = copy.deepcopy(model).eval()
    recorders = {slot.path: (slot, Recorded(slot.occupant)) for slot in stock_slots(twin)}
    for slot, recorder in recorders.values():
        slot.put(recorder)
    found = {}
    with torch.no_grad():
        for x in data:
            twin(x)
    for path, (_, recorder) in recorders.items():
        histogram = Histogram()
        histogram.update(torch.cat(recorder.seen))
        found[path] = histogram, recorder.wrapped[0]
    return found


def fittable():
    return nn.Sequential(Block(nn.GELU()), Block(F.gelu), Block(F.gelu), Block(nn.SiLU()), Block(nn.GELU("tanh")))


DATA = [torch.randn(64, 4, generator=torch.Generator().manual_seed(i)) * 2 for i in range(3)]


@pytest.mark.parametrize(("name", "n"), [("segem", None), ("egem_n2", 2), ("segem_n1_learnable", 1)])
def test_one_fit_for_the_whole_model(name, n):
    model = fittable()
    expected = histograms(model, DATA)
    best = fit_together(expected.values(), hf_gem.parse(name).family, n=n)
    report = convert(model, name, eps="fit", data=iter(DATA), fit_to="activations")
    wanted = dataclasses.replace(best.spec, learnable=name.endswith("learnable"))
    assert {r.new for r in report.replaced} == {wanted.name} == {block.act.spec.name for block in model}
    for r in report.replaced:
        assert r.fit.spec == best.spec
        assert r.fit.error == pytest.approx(error(best.spec, *expected[r.path]), rel=1e-12)
        assert r.unfitted_error == pytest.approx(error(name, *expected[r.path]), rel=1e-12)
    assert sum(r.fit.error for r in report.replaced) <= sum(r.unfitted_error for r in report.replaced)


def test_a_fit_for_each_layer():
    model = fittable()
    expected = histograms(model, DATA)
    report = convert(model, "egem", eps="fit", data=DATA, per_layer=True, fit_to="activations")
    assert len({r.new for r in report.replaced}) > 1
    for r in report.replaced:
        assert r.fit == fit_together([expected[r.path]], "egem")
        assert r.fit.error <= r.unfitted_error
    together = convert(fittable_like(model), "egem", eps="fit", data=DATA, fit_to="activations")
    ours, theirs = (sum(r.fit.error for r in each.replaced) for each in (report, together))
    assert ours <= theirs * (1 + 1e-2)  # eps is rounded to three digits


def fittable_like(converted):
    twin = copy.deepcopy(converted)
    revert(twin)
    return twin


def test_layers_that_share_a_module_are_fitted_as_one():
    act = nn.GELU()
    model = nn.Sequential(Block(act), Block(act), Block(nn.GELU()))
    report = convert(model, "egem", eps="fit", data=DATA, per_layer=True)
    assert report.replaced[0].new == report.replaced[1].new
    assert model[0].act is model[1].act is not model[2].act


def test_equal_names_do_not_make_equal_functions():
    class Scaled(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.scale = scale

        def forward(self, x):
            return self.scale * F.gelu(x)

    scaled_gelu = type("ScaledGELU", (Scaled,), {})
    model = nn.Sequential(Block(scaled_gelu(1.0)), Block(scaled_gelu(3.0)))
    expected = histograms(model, DATA)
    report = convert(model, "egem", eps="fit", data=DATA, fit_to="activations")
    assert report.replaced[0].fit.spec == fit_together(expected.values(), "egem").spec


def test_the_change_of_the_output():
    model = fittable().eval()
    stock = model(DATA[0])
    report = convert(model, "segem", eps="fit", data=DATA)
    change = (model(DATA[0]) - stock).norm() / stock.norm()
    assert report.output_change == pytest.approx(change.item(), rel=1e-5)
    plain = convert(fittable_like(model), "segem", data=DATA)
    assert plain.output_change is None


def change_by_hand(model, members):
    """The relative change of the output when the activations of the blocks are replaced."""
    twin = copy.deepcopy(model).eval()
    with torch.no_grad():
        stock = twin(DATA[0])
        for block, member in zip(twin, members, strict=True):
            block.act = hf_gem.get_activation(member)
        return ((twin(DATA[0]) - stock).norm() / stock.norm()).item()


@pytest.mark.parametrize(("name", "ns"), [("egem", (1, 2, 3)), ("segem_n2", (2,)), ("gem", (1, 2, 3))])
def test_a_fit_to_the_output_changes_it_least(name, ns):
    model = fittable()
    stock = copy.deepcopy(model)
    family = hf_gem.parse(name).family
    report = convert(model, name, eps="fit", data=DATA)
    (chosen,) = {r.new for r in report.replaced}
    found = change_by_hand(stock, [chosen] * 5)
    assert report.output_change == pytest.approx(found, rel=1e-4)
    assert report.unfitted_output_change == pytest.approx(change_by_hand(stock, [name] * 5), rel=1e-4)
    assert report.output_change <= report.unfitted_output_change
    scales = [None] if family == "gem" else [10.0**k for k in range(-6, 2)]
    rivals = [hf_gem.GemSpec(family, n, eps).name for n in ns for eps in scales]
    assert found <= min(change_by_hand(stock, [rival] * 5) for rival in rivals) * (1 + 1e-4)
    for r in report.replaced:
        assert r.fit.error == pytest.approx(error(chosen, *histograms(stock, DATA)[r.path]), rel=1e-12)


def test_layers_of_their_own_change_the_output_less():
    model = fittable()
    stock = copy.deepcopy(model)
    whole = convert(model, "egem", eps="fit", data=DATA)
    revert(model)
    own = convert(model, "egem", eps="fit", data=DATA, per_layer=True)
    assert own.output_change < whole.output_change
    assert own.output_change == pytest.approx(change_by_hand(stock, [r.new for r in own.replaced]), rel=1e-4)
    assert len({r.new for r in own.replaced}) > 1
    text = f"for the given name -> fitted: {own.unfitted_output_change:.3g} -> {own.output_change:.3g}"
    assert text in str(own)


def test_outputs_that_cannot_be_compared():
    class Selecting(Block):
        def forward(self, x):
            y = super().forward(x)
            return y[y > 0.1]

    model = Selecting(nn.GELU())
    expected = histograms(model, DATA)
    report = convert(model, "segem", eps="fit", data=DATA)
    assert report.output_change is None
    assert report.replaced[0].fit.spec == fit_together(expected.values(), "segem").spec


def test_the_output_of_a_model_that_draws_and_masks():
    class Noisy(Block):
        def forward(self, x):
            y = super().forward(x) + torch.randn_like(x)
            return y.masked_fill(torch.eye(*x.shape, dtype=torch.bool), -math.inf)

    model = Noisy(nn.ReLU())
    state = torch.get_rng_state()
    report = convert(model, "egem", eps="fit", data=[X])
    assert torch.equal(torch.get_rng_state(), state)
    # The smallest eps tried is 1e-6, and nothing but the activation differs: by sqrt(eps) / 2, on outputs around 1.
    assert 0 < report.output_change < math.sqrt(1e-6)


def test_what_the_data_does_not_reach():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = Block(nn.GELU()), Block(nn.GELU())

        def forward(self, x):
            return self.used(x)

    for per_layer in (False, True):
        model = Unused()
        report = convert(model, "segem", eps="fit", data=DATA, per_layer=per_layer)
        used, unused = report.replaced
        assert used.new == unused.new == model.unused.act.spec.name
        assert (unused.fit, unused.unfitted_error) == (None, None)
        assert "not reached by data=, so they got the common eps: 1 at unused.act" in str(report)
        assert report.audit.not_run == ("unused.act",)
    with pytest.raises(ValueError, match="none of the activations ran"):
        convert(Unused(), "segem", eps="fit", data=DATA, skip="used")


@pytest.mark.parametrize(
    "act", [nn.PReLU(), nn.RReLU(), timm.models.metaformer.StarReLU(), hf_gem.SEGEM(eps=0.1)], ids=repr
)
def test_activations_with_parameters_and_modes(act):
    model = nn.Sequential(Block(act)).train()
    before = copy.deepcopy(act.state_dict())
    report = convert(model, "segem", eps="fit", data=DATA)
    assert report.replaced[0].fit.error <= report.replaced[0].unfitted_error
    if kind(act) == "segem":
        assert (report.replaced[0].new, report.output_change) == ("segem_eps0.1", 0)
    assert revert(model) == ["0.act"]
    assert model[0].act is act
    assert act.training
    assert act.state_dict() == before


def test_xielu():
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.LlamaConfig(**small, vocab_size=32, hidden_act="xielu")
    model = transformers.LlamaForCausalLM(config)
    report = convert(model, "segem", eps="fit", data=[{"input_ids": torch.arange(8)[None]}])
    assert replaced(report) == {f"model.layers.{i}.mlp.act_fn": "xielu" for i in range(2)}
    assert report.audit.complete


def test_one_that_differs_by_channel():
    model = nn.Sequential(Block(nn.GELU()), Block(nn.PReLU(4)))
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"cannot fit an activation to the prelu at 1\.act .*skip='1\.act'"),
    ):
        convert(model, "egem", eps="fit", data=DATA)
    assert len(convert(model, "egem", eps="fit", data=DATA, skip="1.act").replaced) == 1
    assert convert(model, "egem", inputs=X).audit.complete
    assert "1.act.weight" not in model.state_dict()
    revert(model)
    assert "1.act.weight" in model.state_dict()


def failing(case):
    """Data that breaks off in the middle."""
    yield X
    if case == "data":
        raise OSError("the disk is gone")
    yield torch.zeros(2, 5)


@pytest.mark.parametrize("case", ["data", "model"])
@pytest.mark.parametrize("training", [True, False])
def test_an_exception_in_the_middle_of_fitting(case, training):
    model = Everything().train(training)
    model.blocks[1].train(not training)
    model.stem[1].register_forward_hook(lambda *args: None)
    expected = (OSError, "the disk is gone") if case == "data" else (ValueError, r"does not run on .*RuntimeError")
    with unchanged(model), pytest.raises(expected[0], match=expected[1]):
        convert(model, "egem", eps="fit", data=failing(case))


def test_a_model_that_runs_only_as_it_was():
    class Asks(Block):
        def forward(self, x):
            return super().forward(x) * self.act.inplace

    model = nn.Sequential(Asks(nn.ReLU()))
    with unchanged(model), pytest.raises(ValueError, match=r"does not run on a batch.*no attribute 'inplace'"):
        convert(model, "egem", eps="fit", data=DATA)
    assert "no attribute 'inplace'" in convert(model, "egem", inputs=X).not_audited


def test_fitting_leaves_no_statistics():
    class Counts(Block):
        def __init__(self, act):
            super().__init__(act)
            self.register_buffer("calls", torch.zeros(()))
            self.norm = nn.BatchNorm1d(4)
            self.merged = False

        def train(self, mode=True):
            self.merged = not mode  # as adapters do
            return super().train(mode)

        def forward(self, x):
            self.calls += 1
            return self.norm(super().forward(x))

    model = Counts(nn.GELU())
    norm, state = model.norm, copy.deepcopy(model.state_dict())
    convert(model, "egem", eps="fit", data=DATA)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())
    assert (model.merged, model.training, norm.training, model.norm) == (False, True, True, norm)
