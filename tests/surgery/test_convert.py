"""`convert` and `revert`: what is reached, reported and restored, in plain models and those of two libraries."""

import contextlib
import copy
import json
import math
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_gem
from hf_gem import convert, revert
from hf_gem.surgery.kinds import stock_slots
from tests.surgery.blocks import REACHED, Block, Everything, X, replaced, same, snapshot, unchanged

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


class GatedGELU(nn.Module):
    def forward(self, x):
        up, gate = x.chunk(2, -1)
        return up * F.gelu(gate)


class NormGELU(nn.Module):
    def forward(self, x):
        return F.gelu(F.layer_norm(x, x.shape[-1:]))


class MyGELU(nn.Module):
    def forward(self, x):
        return F.gelu(x)


def test_what_does_more_than_its_name_says_is_left_alone():
    layers = [nn.Linear(4, 8), GatedGELU(), nn.Linear(4, 4), NormGELU(), nn.Linear(4, 4), MyGELU()]
    model = nn.Sequential(*layers)
    x = torch.randn(2, 4)
    report = convert(model, "gem", inputs=(x,))
    assert [r.path for r in report.replaced] == ["5"]
    assert [(path, reason) for path, _, reason in report.left] == [
        (path, "not elementwise, so only replaced if it is in replace=") for path in ("1", "3")
    ]
    assert model(x).shape == (2, 4)
    assert [r.path for r in convert(model, "gem", replace=NormGELU, inputs=(x,)).replaced] == ["3"]


class CountingGELU(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return F.gelu(x + torch.rand(()) * self.training + torch.zeros(6))


def test_finding_out_what_an_activation_does_leaves_it_alone():
    act, ran = CountingGELU(), []
    act.register_forward_hook(lambda *_: ran.append(1))
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(4, 6), act)
        report = convert(model, "gem")
    assert [r.path for r in report.replaced] == ["1"]
    assert (act.calls, ran, act.training) == (0, [], True)


class Calls(nn.Module):
    def __init__(self):
        super().__init__()
        self.tanh, self.many, self.own, self.plain = F.gelu, F.elu, MyGELU(), F.relu

    @torch.no_grad()
    def forward(self, x):
        x = self.many(self.tanh(x, approximate="tanh"), 0.5, False)
        return self.own(self.plain(x, inplace=True), **{})


def test_what_is_called_with_other_arguments_is_left_alone():
    model = Calls()
    report = convert(model, "gem", inputs=X)
    assert replaced(report) == {"plain": "relu", "own": "mygelu"}
    assert {path: reason for path, _, reason in report.left} == {
        "tanh": "called as self.tanh(x, approximate='tanh'), which the family does not take",
        "many": "called as self.many(self.tanh(x, approximate='tanh'), 0.5, False), which the family does not take",
    }
    assert (report.audit.num_gem, report.audit.num_other) == (2, 2)
    with pytest.raises(ValueError, match=r"nothing to replace in Calls\. .*which the family does not take"):
        convert(model, "gem", replace="elu", inputs=X)


def fused(x, activation):
    """Stands for a kernel that computes a few functions and selects them by name."""
    return {"silu": F.silu}[activation](x)


class Mixer(nn.Module):
    """As in Mamba: the module is there, but the layer calls a kernel by name."""

    def __init__(self):
        super().__init__()
        self.activation, self.act, self.after = "silu", nn.SiLU(), Block(nn.ReLU())

    def forward(self, x):
        return self.after(fused(x, activation=self.activation))


def test_what_a_layer_selects_by_name_is_left_alone():
    model = Mixer()
    report = convert(model, "gem", inputs=X)
    assert replaced(report) == {"after.act": "relu"}
    assert report.left == (
        ("act", "silu", "its layer passes the name on instead, to fused(activation=self.activation)"),
    )
    assert (report.audit.num_gem, report.audit.num_other) == (1, 1)


def test_mamba_is_not_converted_where_it_would_run_silu_all_the_same():
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 8, "state_size": 2}
    model = transformers.MambaModel(transformers.MambaConfig(**sizes))
    with pytest.raises(ValueError, match=r"nothing to replace in MambaModel\. .*passes the name on instead, to causal"):
        convert(model, "gem")
    assert not hasattr(model.config, "hf_gem")


# ---- what is replaced, and what the report says


@pytest.mark.parametrize("name", ["gem_n2", "egem_eps0.01", "segem_learnable"])
def test_everything(name):
    model = Everything()
    x = X.clone()
    before, state, stock = snapshot(model), copy.deepcopy(model.state_dict()), model.eval()(x)
    model.train()
    report = convert(model, name, inputs=x)
    assert replaced(report) == REACHED
    assert {r.new for r in report.replaced} == {name}
    assert report.left == (("gate", "sigmoid", "a gate"),)
    assert {call.function for call in report.audit.others} == {"relu", "gelu", "elu"}
    assert (report.audit.num_gem, report.audit.num_other, report.audit.complete) == (5, 5, False)
    assert "5 of 10 activation calls are GEM" in str(report)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["left"] == [["gate", "sigmoid", "a gate"]]
    assert model.training
    assert model.norm.num_batches_tracked == 0
    assert not torch.allclose(model.eval()(x), stock)
    assert sorted(revert(model)) == sorted(REACHED)
    assert torch.equal(model(x), stock)
    assert same(model.train(), before, state)


def test_what_is_chosen():
    def paths(**choice):
        return set(replaced(convert(Everything(), "gem", inputs=X, **choice)))

    assert paths(replace="ReLU") == paths(replace=nn.ReLU) == {"stem.1", "blocks.0.act"}
    assert paths(replace=["leaky_relu", nn.GELU]) == {"blocks.1.act", "partial"}
    assert paths(replace=("sigmoid",)) == {"gate"}
    assert paths(skip="blocks") == {"stem.1", "partial"}
    assert paths(skip=["*.act", "part*"]) == {"stem.1"}
    assert paths(skip=nn.ReLU) == REACHED.keys() - {"stem.1", "blocks.0.act"}
    assert paths(replace=nn.ReLU, skip="stem") == {"blocks.0.act"}


def test_a_part_of_what_shares_a_module():
    model = Everything()
    report = convert(model, "gem", skip="stem", inputs=X)
    assert ("stem.1", "relu", "excluded by skip=") in report.left
    assert type(model.stem[1]) is nn.ReLU
    assert convert(model, "gem", replace="relu", inputs=X).audit.num_gem == 5
    revert(model)
    assert model.stem[1] is model.blocks[0].act


def test_a_second_conversion():
    model = Everything()
    before = snapshot(model)
    convert(model, "gem", inputs=X)
    again = convert(model, "gem", inputs=X)
    assert (again.replaced, {reason for *_, reason in again.left}) == ((), {"already converted", "a gate"})
    third = convert(model, "egem", eps=0.5, replace="gem", skip="partial", inputs=X)
    assert {(r.old, r.new) for r in third.replaced} == {("gem", "egem_eps0.5")}
    revert(model)
    assert snapshot(model) == before


@pytest.mark.parametrize("cls", [hf_gem.GEM, hf_gem.EGEM, hf_gem.SEGEM])
def test_a_class_of_ours_means_one_family(cls):
    def replaced_indices(**only):
        acts = (make(2) for make in (hf_gem.GEM, hf_gem.EGEM, hf_gem.SEGEM))
        return {int(r.path) for r in convert(nn.Sequential(*acts), "gem_n3", inputs=X, **only).replaced}

    index = [hf_gem.GEM, hf_gem.EGEM, hf_gem.SEGEM].index(cls)
    assert replaced_indices(replace=cls) == {index}
    assert replaced_indices(replace=hf_gem.GemActivation, skip=cls) == {0, 1, 2} - {index}


def test_eps_given_as_a_number():
    assert convert(Everything(), "egem_n2_eps0.1", eps=1e-6, inputs=X).replaced[0].new == "egem_n2_eps1em6"


def test_without_a_forward_pass():
    for inputs, reason in ((None, "no inputs can be made up"), (torch.zeros(3, 5), "RuntimeError: mat1 and mat2")):
        model = Everything()
        report = convert(model, "gem", inputs=inputs)
        assert replaced(report) == REACHED
        assert reason in report.not_audited
        assert report.audit is None
        assert f"because no forward pass was possible: {report.not_audited}" in str(report)
        json.dumps(report.to_dict(), allow_nan=False)


@pytest.mark.parametrize(
    "wrap", [tuple, list, lambda x: {"x": x[0]}, lambda x: transformers.BatchEncoding({"x": x[0]})]
)
def test_kinds_of_batches(wrap):
    batch = wrap([X])
    assert convert(Everything(), "gem", inputs=batch).audit.num_gem == 5
    for data in ([batch], iter([batch, batch]), (batch for _ in range(3)), {0: batch}.values()):
        report = convert(Everything(), "egem", eps="fit", data=data)
        assert report.audit.num_gem == 5
        assert report.output_change > 0


def test_data_without_fitting_is_read_up_to_the_first_batch():
    def endless():
        while True:
            yield X

    assert convert(Everything(), "gem", data=endless()).audit.num_gem == 5


class Parallel(nn.ModuleList):
    def forward(self, x):
        return sum(block(x * 1.05**i) for i, block in enumerate(self))


def test_a_report_on_many_layers_is_short():
    model = Parallel(Block(nn.GELU()) for _ in range(100))
    data = [torch.randn(16, 4)]
    whole = str(convert(model, "gem", data=data))
    assert "100 activations replaced\n  gelu -> gem: 100 at *.act\n" in whole
    assert len(whole.splitlines()) == 3
    revert(model)
    report = convert(model, "segem_n1", eps="fit", data=data, per_layer=True, fit_to="activations")
    assert len({r.new for r in report.replaced}) > 20
    lines = str(report).splitlines()
    assert len(lines) < 12
    assert lines[1] == "  gelu -> segem_*: 100 at *.act"
    assert "95 more" in str(report)
    assert max(map(len, lines)) < 150
    assert str(convert(model, "gem")).splitlines()[1] == "  segem_* -> gem: 100 at *.act"
    assert len(json.dumps(report.to_dict(), allow_nan=False)) > 5000


# ---- wrong use: errors, and nothing changed


def quantised(fuse):
    from torch.ao import quantization

    layers = [quantization.QuantStub(), nn.Conv2d(3, 4, 1), nn.ReLU(), quantization.DeQuantStub()]
    model = nn.Sequential(*layers).eval()
    if fuse:
        quantization.fuse_modules(model, [["1", "2"]], inplace=True)
    model.qconfig = quantization.get_default_qconfig("onednn")
    quantization.prepare(model, inplace=True)(torch.randn(1, 3, 2, 2))
    return quantization.convert(model)


def fused_only():
    return nn.Sequential(torch.ao.nn.intrinsic.ConvReLU2d(nn.Conv2d(3, 4, 1), nn.ReLU()), nn.ReLU())


def scripted():
    return nn.Sequential(nn.ReLU(), torch.jit.script(nn.Linear(4, 4)))


ERRORS = {
    "class of a model": (lambda: Everything, ["gem"], {}, TypeError, r"got type as model\. .* Build it first"),
    "config": (
        transformers.GPT2Config,
        ["gem"],
        {},
        TypeError,
        "got GPT2Config as model.*set_activation for a config",
    ),
    "class as name": (Everything, [nn.ReLU], {}, TypeError, "It must be a string.*'gem_n2'"),
    "typo": (Everything, ["gem-n2"], {}, ValueError, "got activation name 'gem-n2'.*Did you mean 'gem_n2'"),
    "stock name": (Everything, ["gelu"], {}, ValueError, "got activation name 'gelu'"),
    "fit_to": (
        Everything,
        ["egem"],
        {"eps": "fit", "data": [X], "fit_to": "x"},
        ValueError,
        "got fit_to='x'.*'output'",
    ),
    "eps": (Everything, ["egem"], {"eps": "auto"}, ValueError, "got eps='auto'.*a number, 'fit' or 'match'"),
    "negative eps": (Everything, ["egem"], {"eps": -1}, ValueError, "eps must be positive"),
    "eps of gem": (Everything, ["gem"], {"eps": 0.1}, ValueError, "gem has a fixed eps of 1"),
    "no data": (Everything, ["egem"], {"eps": "fit"}, ValueError, "got eps='fit' without data.*Pass data="),
    "no data to match": (Everything, ["egem"], {"eps": "match"}, ValueError, "got eps='match' without data"),
    "match of gem": (
        Everything,
        ["gem_n2"],
        {"eps": "match", "data": [X]},
        ValueError,
        "got eps='match' for gem, which has a fixed eps of 1.*Use 'egem'",
    ),
    "c": (Everything, ["egem"], {"eps": "match", "data": [X], "c": -1.0}, ValueError, "c must be positive and finite"),
    "c alone": (Everything, ["egem"], {"c": 0.3}, ValueError, "got c=0.3 with eps=None.*Leave out c"),
    "no scale": (
        Everything,
        ["egem"],
        {"eps": "match", "data": [X * math.nan]},
        ValueError,
        "measured an rms of nan over all",
    ),
    "empty data": (Everything, ["egem"], {"eps": "fit", "data": iter([])}, ValueError, "data= contains no batches"),
    "tensor": (Everything, ["egem"], {"eps": "fit", "data": X}, TypeError, r"of type Tensor.*write data=\[batch\]"),
    "dict": (Everything, ["egem"], {"eps": "fit", "data": {"x": X}}, TypeError, r"of type dict.*write data=\[batch\]"),
    "number": (Everything, ["egem"], {"eps": "fit", "data": 5}, TypeError, "got data of type int"),
    "batches": (Everything, ["egem"], {"eps": "fit", "data": ["text"]}, TypeError, "got a batch of type str"),
    "labels": (
        Everything,
        ["egem"],
        {"eps": "fit", "data": [(X, X)]},
        ValueError,
        "does not run on a batch .*TypeError",
    ),
    "inputs": (Everything, ["gem"], {"inputs": "text"}, TypeError, "got a batch of type str.*must be a tensor"),
    "per_layer": (
        Everything,
        ["gem"],
        {"per_layer": True},
        ValueError,
        "got per_layer=True with eps=None.*Set eps='fit'",
    ),
    "function": (Everything, ["gem"], {"replace": F.relu}, TypeError, "got <function relu.*take strings and classes"),
    "instance": (Everything, ["gem"], {"skip": [nn.ReLU()]}, TypeError, r"got ReLU\(\).*take strings and classes"),
    "unknown": (
        Everything,
        ["gem"],
        {"replace": "mish"},
        ValueError,
        "got 'mish', which matches no activation in Everything.*gelu",
    ),
    "unmatched": (Everything, ["gem"], {"skip": ["stem", "head*"]}, ValueError, r"got 'head\*', which matches no act"),
    "absent class": (Everything, ["gem"], {"replace": nn.ELU}, ValueError, "ELU'>, which matches no activation"),
    "nothing left": (Everything, ["gem"], {"skip": "*"}, ValueError, "nothing to replace.*excluded by skip="),
    "gates": (lambda: nn.Sequential(nn.Tanh()), ["gem"], {}, ValueError, r"nothing to replace.*tanh \(a gate\)"),
    "no activation": (lambda: nn.Linear(2, 2), ["gem"], {}, ValueError, "Linear has no activation modules"),
    "activation itself": (nn.ReLU, ["gem"], {}, ValueError, "ReLU is itself an activation"),
    "script": (scripted, ["gem"], {}, ValueError, "1 is a torch.jit._script.*before you script"),
    "fused": (fused_only, ["gem"], {}, ValueError, r"ConvReLU2d\. Its ReLU is fused with a layer"),
    "quantised": (lambda: quantised(False), ["gem"], {}, ValueError, "produces quantised tensors"),
    "quantised, fused": (lambda: quantised(True), ["gem"], {}, ValueError, "Convert the model before you quantise"),
}


@pytest.mark.parametrize("case", list(ERRORS))
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_wrong_use(case):
    build, args, kwargs, expected, message = ERRORS[case]
    model = build()
    checked = unchanged(model) if isinstance(model, nn.Module) else contextlib.nullcontext()
    with checked, pytest.raises(expected, match=message):
        convert(model, *args, **kwargs)


def test_what_a_model_without_slots_runs():
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=8, bos_token_id=0, eos_token_id=0)
    model = transformers.GPT2Model(config)
    model.h[0].mlp.act = None
    model.h[0].mlp.forward = lambda x: F.relu(x)  # noqa: PLW0108  # its code is in this file
    with pytest.raises(ValueError, match=r"Its own code calls relu at .*test_convert\.py:\d+"):
        convert(model, "gem")


# ---- models that are wrapped, compiled, quantised, on several devices


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamically_quantised():
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), {nn.Linear})
    stock = model(X)
    assert convert(model, "egem_eps1em12", inputs=X).audit.complete
    torch.testing.assert_close(model(X), stock, rtol=0, atol=0.5e-6)  # sqrt(eps) / 2
    revert(model)
    assert torch.equal(model(X), stock)


@pytest.mark.parametrize("how", ["torch.compile", "Module.compile"])
def test_compiled(how):
    model = nn.Sequential(Block(nn.ReLU()), Block(F.gelu)).eval()
    compiled = torch.compile(model, backend="eager") if how == "torch.compile" else model
    if how == "Module.compile":
        model.compile(backend="eager")
    with torch.no_grad():
        stock = compiled(X)
        report = convert(compiled, "segem_eps1", eps="fit", data=[X])
        assert report.audit.complete
        for name in (None, "egem_eps0.5", "egem_eps0.25"):
            if name:
                assert convert(compiled, name, inputs=X).audit.complete
            torch.testing.assert_close(compiled(X), copy.deepcopy(model).forward(X))
            assert not torch.allclose(compiled(X), stock, rtol=1e-3)
        revert(compiled)
        assert torch.equal(compiled(X), stock)


@pytest.fixture
def process_group():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_ddp():
    model = nn.parallel.DistributedDataParallel(nn.Sequential(Block(nn.ReLU()), Block(nn.PReLU())))
    with (
        unchanged(model),
        pytest.raises(ValueError, match=r"the model is a .*DistributedDataParallel.* the new parameters"),
    ):
        convert(model, "egem_learnable", inputs=X)
    with unchanged(model), pytest.raises(ValueError, match=r"needs the parameters of module\.1\.act\. Convert"):
        convert(model, "egem", inputs=X)
    report = convert(model, "segem_eps1", eps="fit", data=[X], replace=nn.ReLU)
    assert report.audit.num_gem == 1
    model(X).sum().backward()
    revert(model)
    assert type(model.module[0].act) is nn.ReLU


def test_half_of_the_model_elsewhere():
    model = nn.Sequential(Block(nn.ReLU()), Block(nn.ReLU()).to("meta"))
    report = convert(model, "egem_learnable")
    assert len(report.replaced) == 2
    assert [block.act.log_ratio.device.type for block in model] == ["cpu", "meta"]
    assert "no inputs can be made up" in report.not_audited


def test_bfloat16():
    model = nn.Sequential(Block(nn.GELU()), Block(F.relu)).bfloat16()
    x = X.bfloat16()
    report = convert(model, "egem_learnable", eps="fit", data=[x])
    assert report.audit.complete
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(x).dtype == torch.bfloat16


def test_fx():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block(nn.ReLU())

        def forward(self, x):
            return F.relu(self.block(x) - 1)

    graph = torch.fx.symbolic_trace(Mixed())
    report = convert(graph, "gem", inputs=X)
    assert replaced(report) == {"block.act": "relu"}
    assert [(call.function, call.count) for call in report.audit.others] == [("relu", 1)]
    assert torch.equal(graph(X), F.relu(hf_gem.gem(graph.block.linear(X)) - 1))
    exported = torch.export.export(graph, (X,)).module()
    with pytest.raises(ValueError, match=r"GraphModule has no activation modules.*Its own code calls .*relu at"):
        convert(exported, "gem", inputs=X)


def test_layers_that_are_not_there_yet():
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU())
    assert len(convert(model, "egem_learnable").replaced) == 1
    assert model(X).shape == X.shape


def test_in_inference_mode():
    model = Block(nn.ReLU())
    with torch.inference_mode():
        convert(model, "egem_learnable", eps="fit", data=[X])
    model(X).sum().backward()
    assert model.act.log_ratio.grad.any()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("eps", [1.0, "fit"])
def test_encoders_of_torch(eps):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, activation="gelu")
    model = nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(2, 5, 8)
    batch = {"src": x, "src_key_padding_mask": torch.tensor([[False] * 3 + [True] * 2, [False] * 5])}
    with torch.no_grad():
        stock = model(**batch)
        report = convert(model, "segem", eps=eps, data=[batch])
        assert report.audit.complete
        converted = model(**batch)
    torch.testing.assert_close(converted, model(**batch))  # with gradients, so not fused
    revert(model)
    with torch.no_grad():
        assert torch.equal(model(**batch), stock)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: torch.load(save(m), weights_only=False)], ids=["copy", "save"]
)
def test_copies(copied):
    model = nn.Sequential(Block(nn.ReLU()), Block(F.gelu))
    stock = model(X)
    convert(model, "egem_learnable", inputs=X)
    twin = copied(model)
    assert torch.equal(twin(X), model(X))
    assert not torch.equal(twin(X), stock)
    assert revert(twin) == ["0.act", "1.act"]
    assert torch.equal(twin(X), stock)
    assert isinstance(model[0].act, hf_gem.EGEM)


def save(model):
    import io

    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return file


# ---- models with ReLU keep what they compute


def test_the_distance_of_outputs_is_bounded():
    """With |egem - relu| <= sqrt(eps) / 2 and ReLU's slope at most 1, an error e of an input becomes at most
    e + sqrt(eps) / 2 past an activation, and |W| e past a linear layer: a pass through absolute weights bounds it."""
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten()]
    model = nn.Sequential(*layers, nn.Linear(4 * 16, 3)).double()
    x = (
        torch.randn(16, 2, 8, 8, dtype=torch.float64)
        * torch.logspace(-6, 0, 16, dtype=torch.float64)[:, None, None, None]
    )
    model.train()(x)
    model.eval()
    stock = model(x)
    for eps in (1e-2, 1e-6, 1e-10):
        absolute = copy.deepcopy(model)
        for module in absolute:
            for name, value in [*module.named_parameters(), *module.named_buffers()]:
                value.data = torch.zeros_like(value) if name in ("bias", "running_mean") else value.abs()
        absolute[2] = absolute[4] = Add(math.sqrt(eps) / 2)
        bound = absolute(torch.zeros(1, 2, 8, 8, dtype=torch.float64))
        convert(model, "egem", eps=eps, inputs=x)
        distance = (model(x) - stock).abs()
        assert (distance <= bound * (1 + 1e-9)).all()
        assert distance.any()
        revert(model)


class Add(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return x + self.value


@pytest.mark.parametrize("zero_init_last", [True, False])
def test_resnet18_keeps_its_logits(zero_init_last):
    """On standard normal inputs, E(egem - relu)^2 = eps^1.5 / sqrt(2 pi) * pi / 4 + O(eps^2), and E relu^2 = 1 / 2: the
    output of one activation changes by 0.79 eps^(3/4) of its size. Normalisation makes inputs standard; the changes of
    17 activations, passed on by layers that on average keep relative ones, add up to at most 17 times as much."""
    model = timm.create_model("resnet18", zero_init_last=zero_init_last)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # statistics of these images
    x = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        model.train()(x)
        stock = model.eval()(x)
        for eps in (1e-4, 1e-6, 1e-8):
            assert len(convert(model, "egem", eps=eps).replaced) == 17
            logits = model(x)
            assert (logits - stock).norm() <= 17 * 0.79 * eps**0.75 * stock.norm()
            assert torch.equal(logits.argmax(1), stock.argmax(1))
            revert(model)
        assert torch.equal(model(x), stock)


# ---- models of transformers and timm, as their audits see them

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
IMAGES = {**SIZES, "image_size": 32, "patch_size": 8}
TRANSFORMERS = {
    "GPT2LMHeadModel": (
        {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 32, "bos_token_id": 0, "eos_token_id": 0},
        2,
    ),
    "BertModel": ({**SIZES, "vocab_size": 32}, 2),
    "AlbertModel": ({**SIZES, "vocab_size": 32, "embedding_size": 8}, 1),
    "BloomForCausalLM": ({"n_layer": 2, "hidden_size": 16, "n_head": 2, "vocab_size": 32}, 2),
    "ResNetForImageClassification": ({"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "image_size": 64}, 49),
    "SwinModel": ({"image_size": 32, "window_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}, 2),
    "BeitModel": (IMAGES, 2),
    "ViTModel": (IMAGES, 2),
    "MobileNetV2Model": ({"image_size": 32, "depth_multiplier": 0.25}, 35),
    "Wav2Vec2Model": (
        {**SIZES, "conv_dim": (8,) * 7, "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2},
        10,
    ),
    "T5ForConditionalGeneration": (
        {
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 32,
            "num_layers": 2,
            "num_heads": 2,
            "vocab_size": 32,
            "decoder_start_token_id": 0,
        },
        4,
    ),
}
GATES = {"BertModel": "pooler.activation", "ViTModel": "pooler.activation", "AlbertModel": "pooler_activation"}


@pytest.mark.parametrize("name", list(TRANSFORMERS))
def test_models_of_transformers(name):
    fields, number = TRANSFORMERS[name]
    cls = getattr(transformers, name)
    with torch.device("meta"):
        model = cls(cls.config_class(**fields))
    keys = list(model.state_dict())
    config = model.config.to_dict()
    report = convert(model, "gem_n2")
    assert len(report.replaced) == number
    assert report.audit.complete
    assert report.audit.num_gem == (2 if name == "AlbertModel" else number)  # whose layers are one
    assert report.left == (((GATES[name], "tanh", "a gate"),) if name in GATES else ())
    assert list(model.state_dict()) == keys
    assert model.config.hf_gem["activations"] == {"gem_n2": [r.path for r in report.replaced]}
    revert(model)
    assert model.config.to_dict() == config


TIMM = {
    "resnet18": 17,
    "seresnet50": 65,
    "vit_tiny_patch16_224": 12,
    "swin_tiny_patch4_window7_224": 12,
    "beit_base_patch16_224": 12,
    "eva02_tiny_patch14_224": 12,
    "hiera_tiny_224": 12,
    "mixnet_s": 46,
    "mobilenetv3_small_050": 33,
    "efficientnet_b0": 49,
    "dm_nfnet_f0": 64,
    "nf_resnet26": 25,
    "caformer_s18": 25,
    "res2net50_26w_4s": 17,
}
SHARED = {"res2net50_26w_4s": 81}  # calls, where a module is called several times


@pytest.mark.parametrize("name", list(TIMM))
def test_models_of_timm(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    keys = list(model.state_dict())
    before = [(slot.path, slot.occupant) for slot in stock_slots(model)]
    report = convert(model, "egem_learnable" if name == "mobilenetv3_small_050" else "egem")
    assert len(report.replaced) == TIMM[name]
    assert (report.audit.num_gem, report.audit.num_other) == (SHARED.get(name, TIMM[name]), 0)
    assert {reason for *_, reason in report.left} <= {"a gate"}
    added = set(model.state_dict()) - set(keys)
    assert added == ({f"{r.path}.log_ratio" for r in report.replaced} if name == "mobilenetv3_small_050" else set())
    assert {p.device.type for p in model.parameters()} == {"meta"}
    revert(model)
    assert [(slot.path, slot.occupant) for slot in stock_slots(model)] == before
    assert list(model.state_dict()) == keys


class Squareplus(nn.Module):
    def forward(self, x):
        return (x + (x * x + 4).sqrt()) / 2


def test_a_class_of_the_users_own():
    model = nn.Sequential(nn.Linear(4, 4), Squareplus(), nn.ReLU())
    assert [r.old for r in convert(model, "egem", inputs=X).replaced] == ["relu"]
    revert(model)
    report = convert(model, "egem", replace=Squareplus, inputs=X)
    assert [(r.path, r.old) for r in report.replaced] == [("1", "Squareplus")]
    assert isinstance(model[2], nn.ReLU)
    revert(model)
    assert isinstance(model[1], Squareplus)


@pytest.mark.parametrize("wrong", [None, transformers.BertConfig(), nn.ReLU])
def test_reverting_what_is_no_model(wrong):
    with pytest.raises(TypeError, match=r"as model\. model must be a torch\.nn\.Module\."):
        revert(wrong)


class HalfGELU(nn.Module):
    """Cannot be copied, and halves the channels."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()

    def forward(self, x):
        return F.gelu(x[..., ::2])


def test_an_activation_that_cannot_be_copied_is_tried_itself():
    net = nn.Sequential(nn.Linear(4, 4), HalfGELU())
    with pytest.raises(ValueError, match="not elementwise"):
        hf_gem.convert(net, "gem")


def test_a_call_in_a_method_that_is_overridden_does_not_count():
    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.act = nn.Linear(4, 4), nn.GELU()

        def forward(this, x):  # noqa: N805
            return this.act(this.linear(x), approximate="tanh")

    class Child(Parent):
        def forward(self, x):
            return self.act(self.linear(x))

    class Calls(Parent):
        def forward(self, x):
            return super().forward(self.act(x))

    assert len(hf_gem.convert(Child(), "gem").replaced) == 1
    for build in (Parent, Calls):
        with pytest.raises(ValueError, match=r"called as this\.act"):
            hf_gem.convert(build(), "gem")
