"""What `hf_gem.audit` reports, and that it leaves no trace on the model."""

import collections
import importlib
import json
import operator
import re
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import hf_gem
from hf_gem import audit
from tests.surgery.test_tracer import counts

TOKENS = {"input_ids": torch.ones(1, 4, dtype=torch.long)}
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}


def gpt2(**fields):
    ends = {"eos_token_id": 1, "bos_token_id": 1}
    config = transformers.GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=50, **ends, **fields)
    return transformers.GPT2LMHeadModel(config)


def llama(**fields):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL, num_key_value_heads=2, **fields))


def bert(**fields):
    return transformers.BertModel(transformers.BertConfig(**SMALL, **fields))


def resnet(**fields):
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 2], image_size=32, **fields)
    return transformers.ResNetForImageClassification(config)


def swin(**fields):
    """Takes its activation from the config in its blocks, and has ReLU in its position biases."""
    small = {"embed_dim": 8, "depths": [1, 2], "num_heads": [1, 2], "image_size": 32, "window_size": 4}
    return transformers.Swinv2Model(transformers.Swinv2Config(**small, **fields))


@pytest.mark.parametrize(
    ("build", "fields", "name", "calls"),
    [
        (gpt2, {"hidden_act": "gem_n2"}, "gem_n2", 3),
        (gpt2, {"hidden_act": "egem_n2_eps0.01_learnable"}, "egem_n2_eps0.01_learnable", 3),
        (bert, {"hidden_act": "segem_eps1em6"}, "segem_eps1em6", 2),
        (llama, {"hidden_act": "egem"}, "egem", 2),
    ],
)
def test_a_model_of_transformers_with_gem(build, fields, name, calls):
    report = audit(build(**fields))
    assert counts(report, "gem") == {name: calls}
    assert (report.num_gem, report.num_other, report.complete) == (calls, 0, True)


@pytest.mark.parametrize(
    ("build", "fields", "name", "calls"),
    [
        (gpt2, {}, "gelu_new", 3),
        (gpt2, {"activation_function": "relu2"}, "relu2", 3),
        (gpt2, {"activation_function": "quick_gelu"}, "quick_gelu", 3),
        (gpt2, {"activation_function": "gelu_pytorch_tanh"}, "gelu_tanh", 3),
        (bert, {}, "gelu", 2),
        (llama, {}, "silu", 2),
        (llama, {"hidden_act": "xielu"}, "xielu", 2),
        (resnet, {}, "relu", 10),
    ],
)
def test_a_stock_model_of_transformers(build, fields, name, calls):
    report = audit(build(**fields))
    assert counts(report, "activation") == {name: calls}
    assert (report.num_gem, report.num_other, report.complete) == (0, calls, False)


@pytest.mark.filterwarnings("ignore:.* did not pick up")
def test_activations_that_a_model_hard_codes_are_located():
    report = audit(swin(hidden_act="gem_n2"))
    assert report.num_gem == 3
    assert {call.function for call in report.others} == {"relu"}
    assert sum(call.count for call in report.others) == 3
    (location,) = {call.location for call in report.others}
    file, line = location.split(":")
    assert file == "transformers/models/swinv2/modeling_swinv2.py"
    source = importlib.import_module("transformers.models.swinv2.modeling_swinv2").__file__
    assert "self.continuous_position_bias_mlp(" in Path(source).read_text().splitlines()[int(line) - 1]
    path = "encoder.layers.0.blocks.0.attention.self.continuous_position_bias_mlp.1"
    assert report.others[0].module == path


@pytest.mark.parametrize(
    ("name", "options", "gem", "others", "gates"),
    [
        ("resnet18", {"act_layer": "egem"}, {"egem": 17}, {}, {}),
        ("swin_tiny_patch4_window7_224", {}, {}, {"gelu": 12}, {}),
        ("vit_tiny_patch16_224", {"img_size": 64, "in_chans": 1, "depth": 2}, {}, {"gelu": 2}, {}),
        ("mobilenetv3_small_100", {"act_layer": "gem"}, {"gem": 33}, {}, {"hardsigmoid": 9}),
        ("mobilenetv3_small_100", {}, {}, {"hardswish": 19, "relu": 14}, {"hardsigmoid": 9}),
        ("dm_nfnet_f0", {}, {}, {"gelu": 52, "relu": 12}, {"sigmoid": 12}),
    ],
)
def test_a_model_of_timm(name, options, gem, others, gates):
    report = audit(timm.create_model(name, **options))
    assert [counts(report, kind) for kind in ("gem", "activation", "gate")] == [gem, others, gates]


def test_a_shared_module_counts_each_time_under_its_first_path():
    act = hf_gem.GEM()
    (call,) = audit(nn.Sequential(act, nn.Linear(8, 8), act, act), torch.randn(2, 8)).calls
    assert (call.function, call.kind, call.module, call.count) == ("gem", "gem", "0", 3)


def test_modules_that_did_not_run_are_listed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.norm = nn.ReLU(), nn.ModuleList([hf_gem.EGEM(), nn.GELU()]), nn.Softmax()

        def forward(self, x):
            return self.used(x)

    report = audit(Model(), torch.randn(2))
    assert report.not_run == ("unused.0", "unused.1")
    assert report.stock_not_run == ("unused.1",)
    assert "2 activation modules did not run, 1 of them not GEM: unused.*" in str(report)
    model = Model()
    model.used = hf_gem.EGEM()
    assert not audit(model, torch.randn(2)).complete
    model.unused[1] = nn.Sigmoid()
    assert audit(model, torch.randn(2)).complete


@pytest.mark.parametrize("build", [gpt2, llama, bert, resnet])
def test_made_up_inputs_on_the_meta_device_find_what_real_ones_do(build):
    model = build()
    inputs = TOKENS if build is not resnet else {"pixel_values": torch.randn(1, 3, 32, 32)}
    assert audit(model) == audit(model, **inputs)
    with torch.device("meta"):
        assert audit(build()) == audit(model)


class Stateful(nn.Module):
    """Everything a forward pass may leave behind, and an exception when it is asked for."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout, self.act = nn.BatchNorm1d(8), nn.Dropout(), nn.ReLU().eval()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("cache", None)

    def forward(self, x, fail=False):
        self.calls += 1
        self.cache, self.seen = x, x
        self.register_buffer("late", x)
        x = self.act(self.norm(x)) + torch.rand(())
        if fail:
            raise KeyError("asked for")
        return x


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_it_was(fail):
    model = Stateful()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    if fail:
        with pytest.raises(KeyError, match="asked for"):
            audit(model, torch.randn(4, 8, generator=torch.Generator()), fail=True)
    else:
        assert counts(audit(model, torch.randn(4, 8, generator=torch.Generator()))) == {"relu": 1}
    assert torch.equal(torch.get_rng_state(), random)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == [True, True, True, False]
    assert model.cache is None
    assert not hasattr(model, "seen")
    assert not hasattr(model, "late")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


class Caching(nn.Module):
    """Keeps tensors in containers, one inside another, as a model that builds its masks once for each length."""

    main_input_name = "input_ids"
    config = transformers.GPT2Config()

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(60_000, 4)
        self.masks, self.by_layer, self.seen, self.recent = {}, [{}, {}], {0}, collections.deque([0], maxlen=1)
        self.shared = self.masks

    def forward(self, input_ids):
        x = self.table(input_ids)
        length = input_ids.shape[1]
        if length not in self.masks:
            self.masks[length] = torch.ones(length, 1, device=x.device)
        one = self.by_layer[1].setdefault(length, torch.ones(1, device=x.device))
        self.seen.add(length)
        self.recent.append(length)
        return torch.relu(x * self.masks[length] * one)


def test_what_a_model_caches_in_containers_is_left_as_it_was():
    model = Caching()
    real = torch.ones(4, 1)
    model.masks[4] = real
    containers = (model.masks, model.by_layer, *model.by_layer, model.seen, model.recent)
    assert audit(model).num_other == 1
    assert model.masks is model.shared
    assert list(model.masks.items()) == [(4, real)]
    assert (model.by_layer, model.seen, model.recent) == ([{}, {}], {0}, collections.deque([0], maxlen=1))
    assert all(map(operator.is_, (model.masks, model.by_layer, *model.by_layer, model.seen, model.recent), containers))
    assert model(torch.ones(1, 16, dtype=torch.long)).shape == (1, 16, 4)


def test_a_caught_exception_does_not_confuse_the_paths():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.act = Stateful(), nn.ReLU()

        def forward(self, x):
            with pytest.raises(KeyError):
                self.inner(x, fail=True)
            return F.gelu(x) + self.act(x)

    calls = audit(Model(), torch.randn(4, 8)).calls
    assert [(call.function, call.module) for call in calls] == [("relu", "inner.act"), ("gelu", ""), ("relu", "act")]


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel])
def test_wrapped_models_are_looked_into(wrap):
    model = llama()
    assert audit(wrap(model)) == audit(model)


def test_a_model_that_compiles_itself_runs_uncompiled():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    expected = audit(model, torch.randn(2, 8))
    model.compile()
    assert audit(model, torch.randn(2, 8)) == expected


def test_values_that_only_a_real_forward_has():
    class Values(nn.Module):
        main_input_name = "input_ids"
        config = transformers.GPT2Config()

        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(60_000, 4)

        def forward(self, input_ids):
            return torch.relu(self.table(input_ids[:, : torch.tensor([3.0]).numpy()[0].astype(int)]).cpu().numpy() * 0)

    class Model(Values):
        def forward(self, input_ids):
            return torch.relu(torch.from_numpy(self.table(input_ids).numpy()))

    assert audit(Model()).num_other == 1
    with pytest.raises(
        RuntimeError, match=r"Model does not run on made-up inputs input_ids \(1, 16\) on the meta device"
    ):
        audit(Model().to("meta"))
    with pytest.raises(RuntimeError, match=r"Values does not run .*Pass them: audit\(model, \.\.\.\)"):
        audit(Values())


def test_wrong_models():
    with pytest.raises(TypeError, match=r"got str\. audit takes a torch\.nn\.Module\. Pass the model itself"):
        audit("gpt2")
    with pytest.raises(TypeError, match=r"the model is scripted\..*Audit the model before you script it"):
        audit(torch.jit.script(hf_gem.GEM()), torch.randn(2))
    with pytest.raises(TypeError, match="the submodule '1' is scripted"):
        audit(nn.Sequential(nn.ReLU(), torch.jit.script(nn.ReLU())), torch.randn(2))
    with torch.device("meta"):
        vision = transformers.Qwen2VLForConditionalGeneration(transformers.Qwen2VLConfig()).model.visual
    with pytest.raises(ValueError, match=r"needs .*grid_thw, which cannot be made up\..*Pass all inputs"):
        audit(vision)
    with pytest.raises(ValueError, match=r"no inputs can be made up for Linear.*audit\(model, x\)"):
        audit(nn.Linear(2, 2))


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_model_with_an_adapter(task):
    """Without a task, its own forward does not say what it takes."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], task_type=task)
    model = peft.get_peft_model(llama(hidden_act="gem_n2"), config)
    assert audit(model).num_gem == 2


def test_a_forward_that_does_not_say_what_it_takes():
    class Wrapper(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config, self.main_input_name = model, model.config, model.main_input_name

        def forward(self, *args, **kwargs):
            return self.model(*args, **kwargs)

    with pytest.raises(ValueError, match=r"forward of Wrapper does not name its inputs, so none can be made up\. Pass"):
        audit(Wrapper(llama()))


@pytest.mark.parametrize("inputs", [5, "gem_n2", {"input_ids": [1]}])
def test_inputs_that_are_none(inputs):
    kind = type(inputs).__name__
    with pytest.raises(TypeError, match=rf"got {kind} as the inputs of GPT2LMHeadModel\. They must be .* or pass none"):
        audit(gpt2(), inputs)


@pytest.mark.filterwarnings("ignore:.* did not pick up")
def test_the_table():
    report = audit(swin(hidden_act="gem_n2"))
    assert re.sub(r":\d+ +", ":LINE ", re.sub(r"where +", "where ", str(report))) == (
        "3 of 6 activation calls are GEM: 3 x gem_n2\n"
        "  calls  other  where modules\n"
        "      3  relu   transformers/models/swinv2/modeling_swinv2.py:LINE "
        "encoder.layers.*.blocks.*.attention.self.continuous_position_bias_mlp.*\n"
        "Gates, not counted: 3 x sigmoid"
    )
    assert str(audit(bert(hidden_act="egem"))) == (
        "2 of 2 activation calls are GEM: 2 x egem\nGates, not counted: 1 x tanh"
    )
    assert str(audit(nn.Linear(2, 2), torch.randn(2))) == "No activation ran"


def test_the_data_go_to_json():
    data = audit(bert(hidden_act="egem")).to_dict()
    assert (data["num_gem"], data["num_other"], data["complete"]) == (2, 0, True)
    assert data["calls"][0]["module"] == "encoder.layer.0.intermediate.intermediate_act_fn"
    assert json.loads(json.dumps(data))["calls"][-1]["function"] == "tanh"


class Overwriting(nn.Module):
    """Some layers with operations in place behind them."""

    def __init__(self, overwrite, act=None):
        super().__init__()
        self.linear, self.act, self.drop = nn.Linear(8, 8), act or hf_gem.GEM(2), nn.Dropout(0.1, inplace=True)
        self.overwrite = overwrite

    def forward(self, x):
        return self.overwrite(self, self.act(self.linear(x)))


@pytest.mark.parametrize(
    ("overwrite", "operation", "module"),
    [
        (lambda model, y: model.drop(y), "dropout_", "drop"),
        (lambda _, y: F.dropout(y, 0.1, False, True), "dropout_", ""),
        (lambda _, y: y.add_(1), "add_", ""),
        (lambda _, y: operator.iadd(y, y.detach()), "add_", ""),
        (lambda _, y: y.view(-1).mul_(2), "mul_", ""),
        (lambda _, y: F.relu(y, inplace=True), "relu_", ""),
    ],
)
@pytest.mark.parametrize(("act", "name"), [(hf_gem.GEM(2), "gem_n2"), (nn.GELU(), "gelu")])
def test_what_overwrites_an_output_is_named(overwrite, operation, module, act, name):
    report = audit(Overwriting(overwrite, act), torch.ones(2, 8))
    (call,) = report.overwritten
    assert (call.function, call.module, call.count) == (f"{operation} behind {name}", module, 1)
    assert Path(__file__).name in call.location
    assert call not in report.calls
    assert report.to_dict()["overwritten"][0]["function"] == call.function
    assert re.search(rf"overwritten in place.*\n.*\n +1  {operation} behind {name} ", str(report))


@pytest.mark.parametrize(
    "overwrite",
    [
        lambda _, y: y + 1,
        lambda _, y: (y + 1).add_(1),
        lambda _, y: y.clone().view(-1).mul_(2),
        lambda _, y: F.dropout(y, 0.0, False, True),
        lambda model, y: model.linear(y).add_(y),
        lambda _, y: torch.sigmoid(y).mul_(2),
    ],
)
def test_what_leaves_outputs_alone_is_not(overwrite):
    report = audit(Overwriting(overwrite), torch.ones(2, 8))
    assert report.overwritten == ()
    assert "overwritten" not in str(report)


@pytest.mark.parametrize("change", [audit, lambda model: hf_gem.convert(model, "gem_n2")])
def test_a_module_in_several_places_keeps_its_values(change):
    # As the position encodings of CoaT: torch.func.functional_call leaves what stood in for them in their place.
    model = timm.create_model("coat_lite_tiny")
    before = dict(model.named_parameters())
    change(model)
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    assert all(after[name] is before[name] for name in before)
