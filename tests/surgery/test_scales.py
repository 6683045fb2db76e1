"""The scale of what activations are given, and the eps that is chosen by it."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import hf_gem
from hf_gem import convert, parse, revert
from hf_gem.fit import MATCH_C, match_eps
from hf_gem.surgery.kinds import activation_slots
from hf_gem.surgery.scales import input_scales
from tests.surgery.blocks import REACHED, Block, Everything, X, unchanged

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

# Values are rounded to bfloat16, by 2^-8 of themselves at most.
ROUNDED = {"rel": 2**-8}


def scales(model, *batches):
    return input_scales(model, {slot.path: slot for slot in activation_slots(model)}, batches)


def rms(*tensors):
    return torch.cat([tensor.flatten() for tensor in tensors]).square().mean().item() ** 0.5


def test_each_activation_and_all_of_them():
    one, two = nn.Linear(4, 8), nn.Linear(8, 2)
    model = nn.Sequential(one, nn.GELU(), two, hf_gem.EGEM(eps=0.1), nn.Dropout(0.9)).train()
    batches = [X, 3 * X]
    with unchanged(model):
        found = scales(model, *batches)
    with torch.no_grad():
        first = [one(x) for x in batches]
        second = [two(F.gelu(x)) for x in first]
    assert found.layers == {"1": pytest.approx(rms(*first), **ROUNDED), "3": pytest.approx(rms(*second), **ROUNDED)}
    assert found.rms == pytest.approx(rms(*first, *second), **ROUNDED)


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm1d(4), nn.SyncBatchNorm(4), nn.InstanceNorm1d(4, track_running_stats=True)], ids=type
)
def test_normalisation_takes_the_statistics_of_the_batch_and_keeps_its_own(norm):
    for training in (True, False):
        model = nn.Sequential(norm, nn.Dropout(0.5), nn.ReLU()).train(training)
        before = copy.deepcopy(model.state_dict())
        found = scales(model, 100 * torch.randn(64, 4, 16) + 30)
        assert found.rms == pytest.approx(1, **ROUNDED)
        after = model.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert [module.training for module in model] == [training] * 3


def test_synchronised_normalisation_waits_for_no_other_process():
    """A conversion may run in one of several processes only."""
    norm = nn.SyncBatchNorm(4)
    model = nn.Sequential(norm, nn.ReLU())
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        found = scales(model, 100 * torch.randn(64, 4, 16) + 30)
    finally:
        torch.distributed.destroy_process_group()
    assert found.rms == pytest.approx(1, **ROUNDED)
    assert type(norm) is nn.SyncBatchNorm


def test_functions_count_and_gates_do_not():
    assert scales(Everything(), X).layers.keys() == REACHED.keys()


def test_a_shared_module_counts_once():
    shared = nn.ReLU()
    model = nn.Sequential(Block(shared), Block(shared))
    found = scales(model, X)
    with torch.no_grad():
        inputs = [model[0].linear(X), model[1].linear(model[0](X))]
    assert found.layers == dict.fromkeys(("0.act", "1.act"), pytest.approx(rms(*inputs), **ROUNDED))
    assert found.rms == found.layers["0.act"]


def test_what_has_no_scale():
    assert scales(nn.Sequential(nn.ReLU()), torch.tensor([1.0, math.inf])).layers["0"] != pytest.approx(1)
    assert math.isnan(scales(nn.Sequential(nn.ReLU()), torch.tensor([1.0, math.inf])).rms)
    assert scales(nn.Sequential(nn.ReLU()), torch.zeros(3)).rms == 0
    nothing = scales(nn.Linear(4, 4), X)
    assert (math.isnan(nothing.rms), nothing.layers) == (True, {})


# ---- eps


@pytest.mark.parametrize("name", ["egem", "egem_n2_eps7", "segem_n3", "egem_n2_learnable", "dgem_n2"])
@pytest.mark.parametrize("c", [MATCH_C, 0.2, 6.0])
def test_the_gate_is_half_open_at_c_times_the_rms(name, c):
    net = nn.Sequential(Block(nn.ReLU()), Block(F.gelu), Block(nn.ReLU()))
    rms = scales(net, X, 2 * X).rms
    report = convert(net, name, eps="match", data=[X, 2 * X], c=c)
    (new,) = {r.new for r in report.replaced}
    spec, given = parse(new), parse(name)
    assert (spec.family, spec.n, spec.learnable) == (given.family, given.n, given.learnable)
    assert spec.eps ** (1 / (2 * spec.n)) == pytest.approx(c * rms, rel=0.05 / (2 * spec.n) + 1e-3)
    assert spec.eps == float(f"{spec.eps:.2g}")
    assert (report.rms, report.c) == (rms, c)
    assert f"with c = {c:g} and the rms of the inputs, {rms:.3g} over all" in str(report)
    for r in report.replaced:
        assert f"{r.path}: rms {r.rms:.3g} -> {new}" in str(report)
    assert report.to_dict()["replaced"][0]["rms"] == report.replaced[0].rms


def test_an_eps_for_each_activation():
    net = nn.Sequential(Block(nn.ReLU()), Block(nn.ReLU()), Block(nn.ReLU()))
    for block, scale in zip(net, (0.1, 1.0, 10.0), strict=True):
        block.linear.weight.data *= scale
    layers = scales(net, X).layers
    report = convert(net, "egem_n2", eps="match", data=[X], per_layer=True)
    assert {r.path: r.rms for r in report.replaced} == layers
    assert {r.path: r.new for r in report.replaced} == {
        path: hf_gem.GemSpec("egem", 2, match_eps(rms, 2)).name for path, rms in layers.items()
    }
    assert len({r.new for r in report.replaced}) == 3
    largest = max(report.replaced, key=lambda r: r.rms)
    assert str(report).index(largest.path + ": rms") < min(
        str(report).index(r.path + ": rms") for r in report.replaced if r is not largest
    )


def test_what_the_data_do_not_reach_gets_the_eps_of_all():
    net = nn.Sequential(Block(nn.ReLU()), nn.Identity())
    net[1].unused = Block(nn.ReLU())
    report = convert(net, "egem", eps="match", data=[X], per_layer=True)
    used, unused = report.replaced
    assert (used.new, unused.rms) == (unused.new, None)
    assert "not reached by data=, so they got the common eps: 1 at 1.unused.act" in str(report)
    with unchanged(net), pytest.raises(ValueError, match="none of the activations ran on data="):
        convert(net, "egem", eps="match", data=[X], skip="0")


def test_an_activation_that_is_given_zeros():
    net = nn.Sequential(Block(nn.ReLU()), Block(nn.ReLU()))
    for parameter in net[1].parameters():
        nn.init.zeros_(parameter)
    with (
        unchanged(net),
        pytest.raises(ValueError, match=r"an rms of 0 at 1\.act, and.*rms must be positive"),
    ):
        convert(net, "egem", eps="match", data=[X], per_layer=True)
    assert convert(net, "egem", eps="match", data=[X]).replaced[1].rms == 0


@pytest.mark.parametrize(("rms", "n", "c"), [(0.0, 1, 1.0), (math.nan, 1, 1.0), (math.inf, 1, 1.0), (1.0, 1, 0.0)])
def test_no_scale_has_no_eps(rms, n, c):
    with pytest.raises(ValueError, match="must be positive and finite"):
        match_eps(rms, n, c)


def test_an_eps_beyond_all():
    with pytest.raises(ValueError, match="eps must be between"):
        match_eps(1e-40, 1)
    with pytest.raises(ValueError, match="n must be an integer from 1 to 32"):
        match_eps(1.0, 0)
    with pytest.raises(ValueError, match=r"got eps=inf\. eps must be positive and finite"):
        match_eps(1e10, 32)
    with pytest.raises(ValueError, match=r"an rms of .* over all activations, and found no eps.*Pass other data"):
        convert(nn.Sequential(nn.ReLU()), "egem_n32", eps="match", data=[1e6 * X])
    assert match_eps(0.5, 2, 0.5) == 0.0039


def names(model):
    return {path: m.spec.name for path, m in model.named_modules() if isinstance(m, hf_gem.modules.GemActivation)}


@pytest.mark.parametrize("per_layer", [False, True])
def test_a_matched_model_saved_and_loaded_and_reverted(tmp_path, per_layer):
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 8, "vocab_size": 16, "bos_token_id": 0, "eos_token_id": 0}
    model, ids = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)), torch.arange(16)[None]
    state = copy.deepcopy(model.state_dict())
    model.transformer.h[1].mlp.c_fc.weight.data *= 10
    report = convert(model, "egem_n2", eps="match", data=[{"input_ids": ids}], per_layer=per_layer)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert names(loaded) == names(model) == {r.path: r.new for r in report.replaced}
    assert len(set(names(loaded).values())) == 1 + per_layer
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert revert(loaded) == ["transformer.h.0.mlp.act", "transformer.h.1.mlp.act"]
    assert names(loaded) == {}
    assert loaded.state_dict().keys() == state.keys()


def test_a_matched_model_of_timm_saved_and_loaded(tmp_path):
    from timm.models._hub import save_for_hf

    images = torch.randn(4, 3, 64, 64)
    model = timm.create_model("resnet10t", num_classes=3)
    report = convert(model, "segem", eps="match", data=[images], per_layer=True)
    firsts = [r.rms for r in report.replaced if r.path.endswith("act1")]
    assert firsts == pytest.approx([1] * len(firsts), **ROUNDED)  # behind batch normalisation
    save_for_hf(model, tmp_path, safe_serialization=True)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert names(loaded) == names(model)
    assert len(set(names(loaded).values())) > 1
    with torch.no_grad():
        assert torch.equal(loaded(images), model.eval()(images))
