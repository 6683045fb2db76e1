"""`patch_glu` and `unpatch_glu`: which modules are fused, that results stay, and that all of it can be undone."""

import copy
import dataclasses
import functools
import inspect
import io
import pickle
import types

import pytest
import torch
from torch import nn
from torch._dynamo.backends.debugging import aot_eager

import hf_gem
from hf_gem import GluPatch, convert, functional, patch_glu, revert, unpatch_glu
from hf_gem.modules import EGEM, GEM, SEGEM

transformers = pytest.importorskip("transformers")

TINY = {
    **{"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "pad_token_id": 0},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32},
}
SPARSE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
T5 = {
    "vocab_size": 32,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 2,
    "dropout_rate": 0.5,
    "decoder_start_token_id": 0,
}
X = torch.linspace(-3, 3, 32).reshape(8, 4)
IDS = torch.arange(1, 13).reshape(2, 6)
DENSE = ["model.layers.0.mlp", "model.layers.1.mlp"]
EXPERTS = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
# Class and fields of each family of models, and the modules in which it multiplies an activation.
MODELS = {
    "llama": ("LlamaForCausalLM", TINY, DENSE),
    "mistral": ("MistralForCausalLM", TINY, DENSE),
    "qwen2": ("Qwen2ForCausalLM", TINY, DENSE),
    "gemma": ("GemmaForCausalLM", TINY, DENSE),
    "phi3": ("Phi3ForCausalLM", TINY, DENSE),
    "glm": ("GlmForCausalLM", TINY, DENSE),
    "t5": (
        "T5ForConditionalGeneration",
        T5,
        [
            f"{stack}.block.{i}.layer.{k}.DenseReluDense"
            for stack, k in (("encoder", 1), ("decoder", 2))
            for i in (0, 1)
        ],
    ),
    "mixtral": ("MixtralForCausalLM", {**TINY, **SPARSE, "experts_implementation": "batched_mm"}, EXPERTS),
    "mixtral, in a loop": ("MixtralForCausalLM", {**TINY, **SPARSE, "experts_implementation": "eager"}, EXPERTS),
    # Its grouped products take no float64.
    "qwen3_moe": ("Qwen3MoeForCausalLM", {**TINY, **SPARSE, "dtype": torch.float32}, EXPERTS),
}


def build(family="llama", name="gem_n2", dtype=torch.float64, **fields):
    torch.manual_seed(0)
    cls, values, _ = MODELS[family]
    cls = getattr(transformers, cls)
    values = {**values, **fields}
    implementation, dtype = values.pop("experts_implementation", None), values.pop("dtype", dtype)
    key = "feed_forward_proj" if family == "t5" else "hidden_act"
    config = cls.config_class(**values, **{key: f"gated-{name}" if family == "t5" else name})
    if implementation:
        config._experts_implementation = implementation
    return cls(config).to(dtype).eval()


def run(model, ids=IDS, train=False):
    """The output, and the gradients of all parameters."""
    torch.manual_seed(0)  # of dropout
    model.train(train).zero_grad()
    output = model(input_ids=ids, labels=ids)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return output.logits.detach(), gradients


def assert_close(one, other):
    """Equal up to the rounding of products.

    Of the fused product and the other, and of their derivatives, one is within 3 half units of the other (see
    `test_rounding`). Models of two layers with weights of size 0.02 do not magnify that much: 1000 units.
    """
    (output, gradients), (expected, expected_gradients) = one, other
    bound = 1000 * torch.finfo(output.dtype).eps
    torch.testing.assert_close(output, expected, rtol=bound, atol=bound)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=bound, atol=bound)


def assert_identical(one, other):
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    assert all(torch.equal(gradient, other[1][name]) for name, gradient in one[1].items())


@pytest.fixture
def fused(monkeypatch):
    """Collects the keywords of each call of `gem_glu`."""
    calls = []
    gem_glu = functional.gem_glu

    @functools.wraps(gem_glu)
    def counting(*args, **kwargs):
        calls.append(kwargs)
        return gem_glu(*args, **kwargs)

    monkeypatch.setattr(functional, "gem_glu", counting)
    return calls


class Product(nn.Module):
    """The product alone."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, gate, up):
        return self.act(gate) * up


# ---- models: what is patched, what they compute, and back


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("train", [False, True])
def test_models(family, train, fused):
    model, paths = build(family), MODELS[family][2]
    before = run(model, train=train)
    keys, classes = list(model.state_dict()), [type(module) for module in model.modules()]
    names = repr(model)
    assert not fused
    report = patch_glu(model)
    assert report == GluPatch(tuple(paths), ())
    assert_close(run(model, train=train), before)
    assert len(fused) >= len(paths)
    assert {(call["family"], call["n"], call["eps"]) for call in fused} == {("gem", 2, 1.0)}
    assert list(model.state_dict()) == keys
    assert all(isinstance(module, cls) for module, cls in zip(model.modules(), classes, strict=True))
    assert [type(module).__qualname__ for module in model.modules()] == [cls.__qualname__ for cls in classes]
    assert repr(model) == names
    assert unpatch_glu(model) == paths
    assert [type(module) for module in model.modules()] == classes
    fused.clear()
    assert_identical(run(model, train=train), before)
    assert not fused


@pytest.mark.parametrize("name", ["gem", "egem_eps0.01", "segem_n2", "egem_learnable", "segem_n2_learnable"])
def test_each_function_and_its_eps(name, fused):
    model = build(name=name)
    for parameter in [p for n, p in model.named_parameters() if n.endswith("log_ratio")]:
        nn.init.constant_(parameter, 0.7)
    before = run(model)
    patch_glu(model)
    after = run(model)
    assert_close(after, before)
    assert len(fused) == 2
    learnable = [n for n in after[1] if n.endswith("log_ratio")]
    assert len(learnable) == (2 if name.endswith("learnable") else 0)
    assert all(after[1][n].abs() > 0 for n in learnable)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("make", [lambda: GEM(2), lambda: EGEM(eps=0.01), SEGEM, lambda: EGEM(learnable=True)])
def test_rounding(make, dtype, fused):
    """Result and gradients are within 3 half units of the unpatched ones.

    With u the unit roundoff and f the activation in float32: one of the two is fl(f up), the other fl(fl(f) up), so
    they are at most u and 2u + u^2 from f up. Gradients are such products with the slope, or with the incoming
    gradient, in place of f. f and the slope come from the same values in the same precision; 16 units of float32 leave
    room for another order of operations in it, and the smallest normal number for what underflows on the way.
    """
    size = torch.finfo(dtype)
    gate, up, grad = (torch.randn(3, 4096).to(dtype) * 2 for _ in range(3))
    results = []
    for patch in (False, True):
        module = Product(make())
        if patch:
            patch_glu(module)
        inputs = [gate.clone().requires_grad_(), up.clone().requires_grad_()]
        output = module(*inputs)
        output.backward(grad)
        results.append([output.detach(), *(x.grad for x in inputs)])
    assert len(fused) == 1
    bound = 3 * size.eps / 2 * 1.01 + 16 * torch.finfo(torch.float32).eps
    for other, new in zip(*results, strict=True):
        assert new.dtype == dtype
        distance = (new.double() - other.double()).abs()
        # `other` stands for the exact value, which is at most 1 + 2.1u times as large.
        scale = other.double().abs() * 1.01
        factors = 64  # what a value that has underflowed may be multiplied with afterwards
        assert (distance <= bound * scale + factors * size.tiny).all()


def test_half_precision_models(fused):
    model = build(dtype=torch.bfloat16)
    before, _ = run(model)
    patch_glu(model)
    after, _ = run(model)
    assert len(fused) == 2
    assert after.dtype == torch.bfloat16
    # A few products are rounded differently; a unit of bfloat16 is 2^-8 of the largest output.
    assert (after - before).abs().max() <= 4 * 2**-8 * before.abs().max()


# ---- the report, and what is left alone


def test_the_report():
    report = patch_glu(build())
    assert str(report) == "2 gated modules fused: model.layers.*.mlp"
    assert patch_glu(build("mixtral")).patched == tuple(EXPERTS)


def test_patching_twice(fused):
    model = build()
    before = run(model)
    report = patch_glu(model)
    classes = [type(module) for module in model.modules()]
    assert patch_glu(model) == report
    assert [type(module) for module in model.modules()] == classes
    assert type(build().model.layers[0].mlp) not in classes
    assert_close(run(model), before)
    assert len(fused) == 2
    assert unpatch_glu(model) == list(report.patched)
    assert unpatch_glu(model) == []
    assert_identical(run(model), before)


def test_stock_activations_are_named():
    model = build(name="silu")
    with pytest.raises(
        ValueError,
        match=r"(?s)nothing to patch in LlamaForCausalLM.*hidden_act='gem_n2'.*hf_gem\.convert.*\n"
        r"  left alone, its act_fn is silu: 2 at model\.layers\.\*\.mlp$",
    ):
        patch_glu(model)
    with pytest.raises(ValueError, match=r"nothing to patch in Linear\. It has no module"):
        patch_glu(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"(?s)nothing to patch in Sequential.*Sequential"):
        patch_glu(nn.Sequential(nn.Linear(2, 2), GEM()))


def test_what_is_no_model():
    with pytest.raises(TypeError, match=r"got str as model\. model must be a torch\.nn\.Module"):
        patch_glu("model")
    with pytest.raises(TypeError, match=r"got type as model\. .*Build it first"):
        unpatch_glu(nn.Linear)


class Mixed(nn.Module):
    """Products that can be fused, and others."""

    def __init__(self):
        super().__init__()
        self.inner = Product(EGEM())
        self.stock = Product(nn.SiLU())
        self.channels = Product(EGEM(learnable=True, num_parameters=4, channel_dim=-1))
        self.own = Product(type("Own", (EGEM,), {})())
        self.replaced = Product(EGEM())
        self.replaced.forward = types.MethodType(Product.forward, nn.Identity())
        self.plain = nn.Sequential(nn.Linear(4, 4), EGEM())


def test_what_is_left_alone():
    model = Mixed()
    report = patch_glu(model)
    assert report.patched == ("inner",)
    reasons = dict(report.left)
    assert set(reasons) == {"stock", "channels", "own", "replaced", "plain"}
    assert reasons["stock"] == "its act is silu"
    assert "egem_learnable, with an eps for each channel" in reasons["channels"]
    assert reasons["own"] == "its act is egem, Own"
    assert "forward" in reasons["replaced"]
    assert "Sequential" in reasons["plain"]
    text = str(report)
    assert text.startswith("1 gated module fused: inner\n  left alone, ")
    assert all(path in text for path in reasons)
    assert [type(getattr(model, path)) for path in reasons] == [Product] * 4 + [nn.Sequential]
    gate, up = torch.randn(2, 5, 4)
    for path in ("stock", "channels", "own"):
        part = getattr(model, path)
        assert torch.equal(part(gate, up), part.act(gate) * up)


class Forms(nn.Module):
    """Ways of writing a product, one a method."""

    FUSED = ("mirrored", "assigned", "inside", "chunks", "scaled_after", "changes_other", "listed", "doubled", "draws")
    KEPT = (
        *("scaled", "parameter", "summed", "two_uses", "in_place", "argument_too", "argument_before"),
        *("overwritten", "view_overwritten", "reshaped_overwritten", "without_gradient"),
        *("passed_through", "passed_through_at_once", "passed_by_a_method"),
    )

    def __init__(self, act):
        super().__init__()
        self.act = act
        self.gate, self.up = nn.Linear(4, 4), nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.drop = nn.Dropout(0.5).eval()  # returns its own input

    def mirrored(self, x):
        return self.up(x) * self.act(self.gate(x))

    def assigned(self, x):
        hidden = self.act(self.gate(x))
        up = self.up(x)
        return hidden * up

    def inside(self, x):
        gate = self.act(self.gate(x))
        return self.gate(gate * self.up(x)) + x

    def chunks(self, x):
        gate, up = torch.cat([x, x + 1], -1).chunk(2, dim=-1)
        return self.act(gate) * up

    def scaled_after(self, x):
        return 2 * (self.act(self.gate(x)) * self.up(x)) * self.scale

    def changes_other(self, x):
        hidden = self.act(self.gate(x))
        x.add_(1)
        return hidden * self.up(x)

    def listed(self, x):
        return torch.cat([self.act(self.gate(part)) * self.up(part) for part in (x, x + 1)])

    def doubled(self, x):
        return (self.act(self.gate(x)) * x) * self.act(self.up(x))

    def draws(self, x):
        return nn.functional.dropout(self.up(x), 0.5) * self.act(nn.functional.dropout(self.gate(x), 0.25))

    def scaled(self, x):
        return self.act(x) * 2

    def parameter(self, x):
        return self.act(x) * self.scale

    def summed(self, x):
        return self.act(self.gate(x)) + self.up(x)

    def two_uses(self, x):
        hidden = self.act(self.gate(x))
        return hidden * self.up(x) + hidden

    def overwritten(self, x):
        return self.act(x) * nn.functional.leaky_relu(x, 0.5, inplace=True)

    def view_overwritten(self, x):
        gate = self.act(x.view(-1, 4))
        x.add_(1)
        return gate * x

    def argument_too(self, x, gate=2.0):
        if x is None:
            gate = self.act(self.gate(x))
        return gate * self.up(x)

    def argument_before(self, x, gate=2.0):
        y = gate * self.up(x)
        gate = self.act(self.gate(x))
        return y

    def reshaped_overwritten(self, x):
        gate = self.act(torch.reshape(x, (-1, 4)))
        x.add_(1)
        return gate * x

    def passed_through(self, x):
        hidden = self.gate(x)
        gate = self.act(self.drop(hidden))
        hidden += x
        return gate * self.up(x)

    def passed_through_at_once(self, x):
        return self.act(self.drop(x)) * self.up(x.add_(1))

    def same(self, x):
        return x

    def passed_by_a_method(self, x):
        gate = self.act(self.same(x))
        x.add_(1)
        return gate * self.up(x)

    def without_gradient(self, x):
        with torch.no_grad():
            gate = self.act(self.gate(x))
        return gate * self.up(x)

    def in_place(self, x):
        x *= self.act(self.gate(x))
        return x


def written(form):
    others = dict.fromkeys((*Forms.FUSED, *Forms.KEPT))
    return type("Written", (Forms,), {**others, "forward": vars(Forms)[form]})(SEGEM(eps=1.0))


def outputs(module):
    """The output, and a draw that tells the random state afterwards."""
    torch.manual_seed(1)
    with torch.no_grad():
        return module(torch.randn(6, 4)), torch.rand(1)


@pytest.mark.parametrize("form", Forms.FUSED)
def test_forms_that_are_fused(form, fused):
    module = written(form)
    expected = outputs(module)
    assert patch_glu(module) == GluPatch(("",))
    torch.testing.assert_close(outputs(module), expected)
    assert len(fused) == (2 if form in ("listed", "doubled") else 1)


@pytest.mark.parametrize("form", Forms.KEPT)
def test_forms_that_are_not(form, fused):
    module = nn.ModuleList([written(form), Product(SEGEM())])
    expected = outputs(module[0])
    report = patch_glu(module)
    assert report.patched == ("1",)
    assert report.left == (("0", "the code of Written has no product self.act(gate) * up"),)
    assert all(map(torch.equal, outputs(module[0]), expected))
    assert not fused


def test_experts_without_a_gate(fused):
    """Experts of transformers have a method with a product, which only those with a gate call."""
    experts = build("mixtral").model.layers[0].mlp.experts
    experts.has_gate = False
    with pytest.raises(ValueError, match="MixtralExperts has no product"):
        patch_glu(experts)


def test_factors_that_do_not_match(fused):
    module = Product(EGEM())
    patch_glu(module)
    gate = torch.randn(3, 4)
    for up in (torch.randn(4), torch.randn(3, 4).double(), 2.0):
        assert torch.equal(module(gate, up), module.act(gate) * up)
    assert not fused
    module(gate, gate)
    assert len(fused) == 1


class Parent(nn.Module):
    def forward(self, x):
        return x + 1


def test_code_with_variables_around_it(fused):
    shift = 1.0

    class Child(Parent):
        def __init__(self):
            super().__init__()
            self.act = EGEM()

        def forward(self, x, *rest, scale=3.0, **options):
            return super().forward(self.act(x) * x) * scale + shift

    module = Child()
    before = module(X), module(X, 1, scale=5.0, other=2)
    patch_glu(module)
    assert all(map(torch.equal, (module(X), module(X, 1, scale=5.0, other=2)), before))
    shift = 2.0
    assert torch.equal(module(X), before[0] + 1)
    assert len(fused) == 3
    assert inspect.signature(module.forward) == inspect.signature(Child().forward)


def add_one(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs) + 1

    return wrapper


class Decorated(Product):
    @add_one
    def forward(self, gate, up):
        return self.act(gate) * up


def test_decorators(fused):
    module = Decorated(EGEM())
    before = module(X, X)
    patch_glu(module)
    assert torch.equal(module(X, X), before)
    assert len(fused) == 1


class Indirect:
    """A decorator that keeps what it wraps where its closure does not show it."""

    def __call__(self, function):
        self.function = function

        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            return self.function(*args, **kwargs)

        return wrapper


def test_code_that_cannot_be_read(tmp_path, fused):
    """Code without source, code whose source has changed since, and code that a decorator keeps."""
    source = "from torch import nn\nclass A(nn.Module):\n    def forward(self, x):\n        return self.act(x) * x\n"
    namespace = {"__name__": "made_up"}
    exec(source, namespace)
    no_source = namespace["A"]()
    file = tmp_path / "changed.py"
    file.write_text(source)
    exec(compile(source, str(file), "exec"), namespace)
    changed = namespace["A"]()
    file.write_text(source.replace("* x", "* -x"))
    hidden = type("Hidden", (Product,), {"forward": Indirect()(Product.forward)})(EGEM())
    no_source.act, changed.act = EGEM(), EGEM()
    report = patch_glu(nn.ModuleList([Product(EGEM()), no_source, changed, hidden]))
    assert report.patched == ("0",)
    assert dict(report.left) == {
        "1": "its forward has no source",
        "2": "its forward does not match its source",
        "3": "its forward is hidden by a decorator",
    }
    assert torch.equal(changed(X), changed.act(X) * X)
    assert not fused
    with pytest.raises(ValueError, match="its forward has no source"):
        patch_glu(no_source)


# ---- what is done to a model before and after


def through_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), through_a_file])
def test_copies_and_pickles(copied, fused):
    model = build()
    before = run(model)
    patch_glu(model)
    other = copied(model)
    assert [type(module) for module in other.modules()] == [type(module) for module in model.modules()]
    assert_close(run(other), before)
    assert len(fused) == 2
    assert unpatch_glu(other) == DENSE
    assert_identical(run(other), before)
    assert unpatch_glu(model) == DENSE


def test_checkpoints(tmp_path, fused):
    model = build(dtype=torch.float32)
    before, _ = run(model)
    patch_glu(model)
    model.save_pretrained(tmp_path)
    assert "glu" not in (tmp_path / "config.json").read_text()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(run(loaded)[0], before)
    assert not fused
    assert patch_glu(loaded).patched == tuple(DENSE)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, fused):
    model = build()
    before = run(model, train=True)
    patch_glu(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert_close(run(model, train=True), before)
    assert len(fused) == 4  # once more each in the backward pass


@pytest.mark.parametrize("name", ["egem", "segem_n2_learnable"])
def test_compiled(name):
    """A compiled module is traced again when it is patched, in one graph, and goes back to the old one afterwards."""
    model = build(name=name)
    mlp = model.model.layers[0].mlp
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    expected = mlp(x)
    graphs, ran = [], []

    def backend(graph, inputs):
        graphs.append(graph)
        compiled = aot_eager(graph, inputs)
        return lambda *args: (ran.append(graph), compiled(*args))[1]

    compiled = torch.compile(mlp, backend=backend, fullgraph=True)
    for change in (lambda _: None, patch_glu, unpatch_glu):
        change(model)
        torch.testing.assert_close(compiled(x), expected, rtol=1e-12, atol=1e-12)
    assert [graphs.index(graph) for graph in ran] == [0, 1, 0]


def test_compiled_with_an_eps_for_each_layer():
    mlp = build().model.layers[0].mlp
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    for eps in (0.01, 0.02, 0.3, 4.0, 1e-5):
        layer = copy.deepcopy(mlp)
        layer.act_fn = EGEM(eps=eps)
        patch_glu(layer)
        expected = layer(x)
        layer.compile(backend=backend, fullgraph=True)
        torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)
    assert len(graphs) <= 3


@pytest.mark.slow
def test_compiled_in_training(fused):
    model = build()
    before = run(model)
    patch_glu(model)
    model.compile(backend="aot_eager", fullgraph=True)
    assert_close(run(model), before)


class Scriptable(nn.Module):
    def __init__(self):
        super().__init__()
        self.act = EGEM()

    def forward(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.act(gate) * up


def test_exported():
    module = Scriptable()
    x, up = torch.randn(2, 3, 16), torch.randn(2, 3, 16)
    expected = module(x, up)
    patch_glu(module)
    for exported in (
        torch.export.export(module, (x, up)).module(),
        torch.export.export(module, (x, up), strict=True).module(),
        torch.jit.trace(module, (x, up)),
        torch.jit.script(module),
        torch.fx.symbolic_trace(module),
    ):
        torch.testing.assert_close(exported(x, up), expected)


def test_hooks_of_the_activation_run(fused):
    model = build()
    before = run(model)
    patch_glu(model)
    act = model.model.layers[0].mlp.act_fn
    seen = []
    handles = [
        act.register_forward_pre_hook(lambda *_: seen.append("before")),
        act.register_forward_hook(lambda *_: seen.append("after")),
        act.register_full_backward_hook(lambda *_: seen.append("backward")),
    ]
    assert_close(run(model), before)
    assert seen == ["before", "after", "backward"]
    assert len(fused) == 1
    for handle in handles:
        handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        run(model)
    finally:
        handle.remove()
    assert act in seen
    assert len(fused) == 1
    run(model)
    assert len(fused) == 3


def test_hooks_of_the_module_run():
    model = build()
    seen = []
    model.model.layers[0].mlp.register_forward_hook(lambda *_: seen.append(1))
    patch_glu(model)
    model.model.layers[1].mlp.register_forward_hook(lambda *_: seen.append(2))
    run(model)
    unpatch_glu(model)
    run(model)
    assert seen == [1, 2, 1, 2]


def test_hooks_of_accelerate(fused):
    """They keep the method of the module's class on the instance, from before the patch or from after it."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = build()
    before = run(model)
    first, second = (layer.mlp for layer in model.model.layers)
    hooks.add_hook_to_module(first, hooks.ModelHook())
    assert patch_glu(model).patched == tuple(DENSE)
    hooks.add_hook_to_module(second, hooks.ModelHook())
    assert_close(run(model), before)
    assert len(fused) == 2
    unpatch_glu(model)
    fused.clear()
    assert_identical(run(model), before)
    hooks.remove_hook_from_module(model, recurse=True)
    assert_identical(run(model), before)
    assert not fused
    assert patch_glu(model).patched == tuple(DENSE)
    run(model)
    assert len(fused) == 2


def test_the_audit_names_the_activations(fused):
    model = build("t5", name="egem_n2")
    before = hf_gem.audit(model)
    patch_glu(model)
    after = hf_gem.audit(model)
    assert [dataclasses.replace(call, location="") for call in after.calls] == [
        dataclasses.replace(call, location="") for call in before.calls
    ]
    assert all("modeling_t5.py" in call.location for call in after.calls)
    assert (after.num_gem, after.complete, after.not_run) == (4, True, ())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({}, "egem"),
        ({"family": "gem", "n": 2}, "gem_n2"),
        ({"family": "segem", "eps": 0.01}, "segem_eps0.01"),
        ({"eps": torch.tensor(0.1)}, "egem_learnable (eps is a tensor)"),
    ],
)
def test_the_audit_sees_the_function(arguments, name):
    class Direct(nn.Module):
        def forward(self, x):
            return functional.gem_glu(x, x + 1, **arguments)

    (call,) = hf_gem.audit(Direct(), torch.randn(3)).calls
    assert (call.function, call.kind, call.count) == (name, "gem", 1)


def test_conversions(fused):
    """Each call looks at the activation that is there."""
    model = build(name="silu")
    stock = run(model)
    convert(model, "egem")
    converted = run(model)
    patch_glu(model)
    assert_close(run(model), converted)
    assert [(call["family"], call["n"]) for call in fused] == [("egem", 1)] * 2
    fused.clear()
    convert(model, "segem_n2")
    assert not fused  # by the audit
    run(model)
    assert [(call["family"], call["n"]) for call in fused] == [("segem", 2)] * 2
    fused.clear()
    revert(model)
    assert_identical(run(model), stock)
    assert not fused
    assert unpatch_glu(model) == DENSE
    assert_identical(run(model), stock)


def test_a_fit_in_a_patched_model():
    model = build(name="silu", dtype=torch.float32)
    convert(model, "gem")
    patch_glu(model)
    report = convert(model, "egem_n2", eps="fit", data=[{"input_ids": IDS}])
    assert [r.fit is None for r in report.replaced] == [False, False]


def test_adapters(fused):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["gate_proj", "up_proj", "down_proj"], init_lora_weights=False)
    results = []
    for patch in (None, "before", "after"):
        model = build()
        if patch == "before":
            patch_glu(model)
        torch.manual_seed(1)
        model = peft.get_peft_model(model, config).double()
        if patch == "after":
            patch_glu(model)
        results.append(run(model))
    assert_close(results[1], results[0])
    assert_close(results[2], results[0])
    assert len(fused) == 4
    assert len(results[0][1]) == 12


def test_a_class_around_a_patched_one():
    model = build()
    report = patch_glu(model)
    mlp = model.model.layers[1].mlp
    inner = type(mlp)
    mlp.__class__ = type("FSDPLlamaMLP", (inner,), {})
    classes = [type(module) for module in model.modules()]
    assert patch_glu(model) == report
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp became a FSDPLlamaMLP"):
        unpatch_glu(model)
    assert [type(module) for module in model.modules()] == classes
    mlp.__class__ = inner
    assert unpatch_glu(model) == DENSE
