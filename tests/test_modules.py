"""The modules: construction, what they print, a learnable eps, and every way a module is copied, cast and saved."""

import copy
import io
import math
import pickle
import warnings
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import nn

from hf_gem import EGEM, GEM, SEGEM, GemActivation, egem, gem, get_activation, parse, segem
from hf_gem.family.table import FAMILIES, add
from hf_gem.functional import activation
from hf_gem.integrations.fallback import Activation
from tests import oracle

LEARNABLE = {"egem": EGEM, "segem": SEGEM}
NAMES = ["gem", "gem_n3", "egem", "egem_n2_eps0.1", "segem_eps0.5", "egem_learnable", "segem_n2_eps0.3_learnable"]

names = pytest.mark.parametrize("name", NAMES)
learnable_families = pytest.mark.parametrize("family", list(LEARNABLE))


@pytest.mark.parametrize(
    ("module", "function"),
    [
        (GEM(), gem),
        (GEM(n=2, inplace=True), lambda x: gem(x, 2)),
        (EGEM(), egem),
        (EGEM(3, 0.1, inplace=True), lambda x: egem(x, 3, 0.1)),
        (SEGEM(2), lambda x: segem(x, 2)),
        (SEGEM(1, 2.0, inplace=True), lambda x: segem(x, 1, 2.0)),
        (EGEM(2, 0.25, learnable=True), lambda x: egem(x, 2, 0.25)),
        (SEGEM(2, 0.25, learnable=True), lambda x: segem(x, 2, 0.25)),
    ],
    ids=lambda value: repr(value) if isinstance(value, torch.nn.Module) else "function",
)
def test_a_module_is_its_function(module, function):
    x = torch.randn(4, 3)
    before = x.clone()
    assert torch.equal(module(x), function(x))
    assert torch.equal(x, before)


@pytest.mark.parametrize(
    ("module", "text"),
    [
        (GEM(), "GEM(n=1)"),
        (GEM(2), "GEM(n=2)"),
        (EGEM(), "EGEM(n=1, eps=0.0001)"),
        (SEGEM(3, 1e-6), "SEGEM(n=3, eps=1e-06)"),
        (EGEM(learnable=True), "EGEM(n=1, eps=0.0001, learnable=True)"),
        (
            SEGEM(2, 0.5, learnable=True, num_parameters=8, channel_dim=-1),
            "SEGEM(n=2, eps=0.5, learnable=True, num_parameters=8, channel_dim=-1)",
        ),
    ],
)
def test_repr(module, text):
    assert repr(module) == text


@names
def test_modules_by_name(name):
    module = get_activation(name)
    spec = parse(name)
    assert type(module).__name__.lower() == spec.family
    assert module.spec == spec
    assert module.n == spec.n
    assert torch.as_tensor(module.eps).item() == pytest.approx(spec.eps, rel=2**-24)
    assert len(list(module.parameters())) == spec.learnable
    assert get_activation(name.upper()).spec == spec
    assert get_activation(name) is not module


def test_a_malformed_name():
    with pytest.raises(ValueError, match="Did you mean 'gem_n2'"):
        get_activation("gem-n2")


@learnable_families
def test_num_parameters(family):
    cls = LEARNABLE[family]
    with pytest.raises(ValueError, match=r"got num_parameters=3 with learnable=False\..*Set learnable=True"):
        cls(num_parameters=3)
    for num_parameters in (0, -1):
        with pytest.raises(ValueError, match=rf"got num_parameters={num_parameters}\."):
            cls(learnable=True, num_parameters=num_parameters)
    with pytest.raises(ValueError, match=r"got an input of shape \(2, 4, 5\), which has 4 channels in dimension 1\."):
        cls(learnable=True, num_parameters=3)(torch.ones(2, 4, 5))


@pytest.mark.parametrize(("arguments", "error"), [({"n": 0}, ValueError), ({"n": 1.5}, TypeError)])
@pytest.mark.parametrize("cls", [GEM, EGEM, SEGEM])
def test_bad_n(cls, arguments, error):
    with pytest.raises(error, match="n must be an integer"):
        cls(**arguments)


# ---- a learnable eps


def exact_log_gradient(family, x, n, eps):
    """Sum over x of d f / d log eps, which is eps d f / d eps, with the sum of the sizes of its terms."""
    slope = oracle.egem_eps_slope if family == "egem" else oracle.segem_eps_slope
    terms = [Fraction(eps) * slope(Fraction(v), n, Fraction(eps)) for v in x.flatten().tolist()]
    return sum(terms), sum(abs(term) for term in terms)


@learnable_families
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("eps", [1e-4, 0.25, 3.0])
def test_gradient_of_eps(family, n, eps):
    module = LEARNABLE[family](n, eps, learnable=True)
    x = torch.randn(50) * eps ** (1 / (2 * n))
    module(x).sum().backward()
    exact, size = exact_log_gradient(family, x, n, module.eps.item())
    # 4n + 9 roundings a term (test_reference), 49 in the sum, 2 for the chain from log_ratio to eps and exp.
    assert abs(Fraction(module.log_ratio.grad.item()) - exact) <= (4 * n + 60) * size / 2**24


@learnable_families
@pytest.mark.parametrize(("shape", "channel_dim"), [((5, 3, 2, 2), 1), ((5, 7, 3), -1), ((5, 3), 1), ((3, 6), 0)])
def test_one_eps_per_channel(family, shape, channel_dim):
    module = LEARNABLE[family](2, 0.5, learnable=True, num_parameters=3, channel_dim=channel_dim)
    with torch.no_grad():
        module.log_ratio.copy_(torch.tensor([-2.0, 0.0, 1.5]))
    x = torch.randn(shape)
    y = module(x)
    y.sum().backward()
    for i, eps in enumerate(module.eps.tolist()):
        channel = x.select(channel_dim, i)
        expected = {"egem": egem, "segem": segem}[family](channel, 2, torch.tensor(eps))
        assert torch.equal(y.select(channel_dim, i), expected)
        exact, size = exact_log_gradient(family, channel, 2, eps)
        assert abs(Fraction(module.log_ratio.grad[i].item()) - exact) <= (17 + channel.numel() + 2) * size / 2**24


@learnable_families
def test_eps_stays_positive(family):
    module = LEARNABLE[family](1, 1e-4, learnable=True)
    optimizer = torch.optim.SGD(module.parameters(), lr=20.0)
    x = torch.randn(64)
    for target in (x.relu(), torch.zeros(64)):
        for _ in range(20):
            optimizer.zero_grad()
            (module(x) - target).square().sum().backward()
            optimizer.step()
            assert module.log_ratio.isfinite().all()
            assert module.eps > 0
            assert module(x).isfinite().all()


@learnable_families
@pytest.mark.parametrize("eps", [1e-37, 1e-4, 1.0, 1e37])
def test_an_eps_that_runs_away_saturates(family, eps):
    module = LEARNABLE[family](2, eps, learnable=True)
    x = torch.linspace(-3, 3, 100)
    for log_ratio in (-1e4, -200.0, -90.0, 90.0, 200.0, 1e4):
        with torch.no_grad():
            module.log_ratio.fill_(log_ratio)
        assert 0.9e-37 < module.eps.item() < 1.1e37
        (closed,) = torch.autograd.grad(module(x).sum(), module.log_ratio)
        formula = torch.func.grad(lambda p: torch.func.functional_call(module, {"log_ratio": p}, x).sum())
        assert closed.item() == formula(module.log_ratio.detach()).item() == 0
        assert module(x).isfinite().all()


@pytest.mark.parametrize("name", ["egem_n2_eps0.3_learnable", "segem_learnable"])
def test_the_module_of_a_checkpoint_without_the_package_has_the_same_eps(name):
    module, alone = get_activation(name), Activation(name)
    x = torch.linspace(-3, 3, 100)
    for log_ratio in (-1e4, -90.0, -2.0, 0.0, 0.7, 90.0, 1e4):
        for twin in (module, alone):
            nn.init.constant_(twin.log_ratio, log_ratio)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            assert torch.equal(alone.to(dtype)(x.to(dtype)), module.to(dtype)(x.to(dtype)))


def test_a_tensor_eps_saturates():
    x = torch.tensor([0.02], dtype=torch.float64)
    eps = torch.tensor(1e-60, dtype=torch.float64, requires_grad=True)
    y = egem(x, 2, eps)
    assert y.item() == egem(x, 2, 1e-37).item()
    assert torch.autograd.grad(y.sum(), eps)[0].item() == 0


def test_eps_is_learned():
    x = torch.randn(256)
    target = egem(x, 1, 0.5)
    module = EGEM(1, 0.01, learnable=True)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
    for _ in range(200):
        optimizer.zero_grad()
        (module(x) - target).square().mean().backward()
        optimizer.step()
    assert module.eps.item() == pytest.approx(0.5, rel=0.01)


@learnable_families
def test_the_first_eps_survives_a_cast(family):
    module = LEARNABLE[family](1, 0.3, learnable=True)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        cast = copy.deepcopy(module).to(dtype)
        assert cast.log_ratio.dtype == dtype
        assert cast.eps.item() == torch.tensor(0.3, dtype=cast.eps.dtype).item()
        assert cast.eps.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert cast(torch.ones(3, dtype=dtype)).dtype == dtype


@learnable_families
def test_reset_and_meta_device(family):
    with torch.device("meta"):
        module = LEARNABLE[family](2, 0.3, learnable=True, num_parameters=4)
    assert module.log_ratio.is_meta
    module.to_empty(device="cpu")
    with torch.no_grad():
        module.log_ratio.fill_(7.0)
    module.reset_parameters()
    assert torch.equal(module.eps, torch.full((4,), 0.3))


def test_a_fixed_eps_needs_no_memory():
    with torch.device("meta"):
        module = nn.Sequential(EGEM(2, 0.3), GEM(2)).to(torch.bfloat16)
    assert not module.state_dict()
    x = torch.randn(5)
    assert torch.equal(module.to_empty(device="cpu")(x), gem(egem(x, 2, 0.3), 2))


@learnable_families
@pytest.mark.parametrize("num_parameters", [1, 4])
def test_state_dict(family, num_parameters):
    def build():
        return LEARNABLE[family](2, 0.3, learnable=True, num_parameters=num_parameters)

    module = build()
    assert module.log_ratio.shape == (num_parameters,)
    with torch.no_grad():
        module.log_ratio.normal_()
    stored = io.BytesIO()
    torch.save(module.state_dict(), stored)
    stored.seek(0)
    other = build()
    other.load_state_dict(torch.load(stored))
    x = torch.randn(3, 4)
    assert torch.equal(other(x), module(x))


@names
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies(name, duplicate):
    module = get_activation(name)
    twin = duplicate(module)
    x = torch.randn(10)
    assert torch.equal(twin(x), module(x))
    assert twin.spec == module.spec
    assert repr(twin) == repr(module)
    assert not {id(p) for p in twin.parameters()} & {id(p) for p in module.parameters()}


@pytest.fixture
def local_family(monkeypatch):
    """A user's family whose formula is a lambda."""
    monkeypatch.setattr("hf_gem.family.table.FAMILIES", FAMILIES.copy())
    value = lambda z, n, r, e: 2 * FAMILIES["egem"].value(z, n, r, e)  # noqa: E731
    return add(replace(FAMILIES["egem"], name="zgem", title="Z-GEM", value=value, slope_at=None, inverse=None))


@pytest.mark.parametrize("learnable", [False, True])
def test_saving_a_module_of_a_local_family(local_family, learnable):
    module = nn.Sequential(GemActivation(local_family.name, 2, 0.1, learnable))
    x = torch.randn(10)
    stored = io.BytesIO()
    torch.save(module, stored)
    for weights_only in (False, True):
        stored.seek(0)
        with torch.serialization.safe_globals([nn.Sequential, GemActivation]):
            loaded = torch.load(stored, weights_only=weights_only)
        for twin in (loaded, copy.copy(module), copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert torch.equal(twin(x), module(x))


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    "module",
    [*map(get_activation, NAMES), EGEM(2, 0.1, True, 3), SEGEM(2, 0.1, True, 3, channel_dim=-1)],
    ids=repr,
)
def test_scripting(module):
    scripted = torch.jit.script(module)
    stored = io.BytesIO()
    torch.jit.save(scripted, stored)
    stored.seek(0)
    loaded = torch.jit.load(stored)
    x = torch.randn(3, 3)
    for _ in range(3):  # the profiling executor optimises after the first calls
        assert torch.equal(loaded(x), module(x))


def test_each_module_owns_its_parameter():
    model = nn.Sequential(*(get_activation("egem_learnable") for _ in range(3)))
    assert sum(p.numel() for p in model.parameters()) == 3
    assert [name for name, _ in model.named_parameters()] == ["0.log_ratio", "1.log_ratio", "2.log_ratio"]


@learnable_families
def test_compile_of_a_learnable_module(family):
    module = LEARNABLE[family](2, 0.3, learnable=True, num_parameters=3)
    x = torch.randn(5, 3)
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")(x)
    (got,) = torch.autograd.grad(compiled.sum(), module.log_ratio)
    (expected,) = torch.autograd.grad(module(x).sum(), module.log_ratio)
    # 2n (12n + 11) + 2n + 3 roundings of terms no larger than the value, for autograd of the formula (test_reference).
    torch.testing.assert_close(compiled, module(x), rtol=15 * 2**-24, atol=0)
    torch.testing.assert_close(got, expected, rtol=0, atol=5 * 147 * 2**-24 * math.sqrt(0.3))


class Block(nn.Module):
    def __init__(self, act):
        super().__init__()
        self.linear, self.act = nn.Linear(8, 8), act

    def forward(self, x):
        return x + self.act(self.linear(x))


def run_blocks(activations):
    """How many graphs a compiler makes of blocks, compiled one by one; and the greatest deviation of the gradient."""
    torch._dynamo.reset()
    graphs = []
    aot = torch._dynamo.lookup_backend("aot_eager")
    blocks = nn.Sequential(*map(Block, activations))
    plain = copy.deepcopy(blocks)

    def backend(graph, inputs):
        graphs.append(graph)
        return aot(graph, inputs)

    for block in blocks:
        block.compile(backend=backend, fullgraph=True)
    x = torch.randn(5, 8, requires_grad=True)
    grads = [torch.autograd.grad(model(x).sum(), x)[0] for model in (blocks, plain)]
    return len(graphs), (grads[0] - grads[1]).abs().max() / grads[1].abs().max()


@pytest.mark.parametrize(
    "make",
    [
        lambda eps: EGEM(1, eps),
        lambda eps: SEGEM(2, eps),
        lambda eps: EGEM(1, eps, learnable=True),
        lambda eps: SEGEM(1, eps, learnable=True, num_parameters=8, channel_dim=-1),
    ],
    ids=["egem", "segem_n2", "learnable", "one a channel"],
)
def test_compiling_layers_with_an_eps_of_their_own(make):
    """`convert(..., per_layer=True)` makes such layers. The compiler stops at 8 graphs."""
    values = (0.01, 0.02, 0.3, 4.0, 0.001, 0.5, 1.0, 2e-4, 7.0, 1e-6)
    count, deviation = run_blocks([make(eps) for eps in values])
    assert count <= 3
    # Each layer has a slope within some ten roundings, and a product of 8 terms.
    assert deviation < len(values) * 40 * 2**-24


CHANGES = [
    ("egem_eps0.01", [{}, {"init_eps": 0.5}, {"n": 1}, {"n": 2, "init_eps": 1e-6}, {"family": "segem"}]),
    ("segem_n2_eps3", [{}, {"init_eps": 1}, {"family": "gem"}, {"family": "egem"}, {"init_eps": 2.0}]),
    ("gem_n3", [{}, {"n": 1}, {"family": "segem"}, {"init_eps": 0.1}]),
]


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(("name", "steps"), CHANGES)
def test_every_way_to_run_follows_what_is_changed(name, steps):
    module = get_activation(name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(100)
    torch._dynamo.reset()
    for changes in steps:
        for key, value in changes.items():
            setattr(module, key, value)
        expected = activation(x, module.family, module.n, module.init_eps)
        for run in (module, compiled, torch.jit.script(module), copy.deepcopy(module)):
            assert torch.equal(run(x), expected)


@pytest.mark.parametrize(
    ("name", "attribute", "value"),
    [
        ("egem", "n", 40),
        ("egem", "n", 1.5),
        ("egem", "init_eps", -1.0),
        ("egem", "init_eps", math.nan),
        ("egem_n2_eps1e-100", "n", 1),
        ("egem_learnable", "init_eps", 1e40),
        ("egem_eps0.1", "family", "gem"),
        ("segem", "family", "relu"),
        ("gem", "init_eps", 0.1),
        ("gem", "save", "outptu"),
    ],
)
def test_a_bad_value_leaves_the_module_as_it_was(name, attribute, value):
    module = get_activation(name)
    before = vars(module).copy()
    with pytest.raises((ValueError, TypeError), match=r"^got "):
        setattr(module, attribute, value)
    assert vars(module) == before


def test_repr_says_which_family_a_module_has_become():
    module = EGEM(eps=0.1)
    module.family = "segem"
    assert repr(module) == "EGEM(segem, n=1, eps=0.1)"


@learnable_families
def test_a_learnable_eps_is_exact_in_float64(family):
    module = LEARNABLE[family](2, 0.3, learnable=True).double()
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    # the two split eps alike, and differ in how they multiply it back
    torch.testing.assert_close(
        module(x), LEARNABLE[family](2, 0.3)(x), rtol=20 * torch.finfo(torch.float64).eps, atol=0
    )
    log_ratio = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    call = lambda p: torch.func.functional_call(module, {"log_ratio": p}, (x,))  # noqa: E731
    assert torch.autograd.gradcheck(call, (log_ratio,))


@pytest.mark.parametrize("eps", [1e-50, 1e40])
def test_a_learnable_eps_starts_where_float32_can_follow(eps):
    EGEM(2, eps)
    with pytest.raises(ValueError, match="between 1e-37 and 1e37"):
        EGEM(2, eps, learnable=True)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"num_parameters": "8", "learnable": True}, TypeError),
        ({"num_parameters": 2.0, "learnable": True}, TypeError),
        ({"num_parameters": True, "learnable": True}, TypeError),
        ({"channel_dim": 1.5, "learnable": True}, TypeError),
        ({"learnable": "no"}, TypeError),
    ],
)
def test_arguments_of_the_wrong_type(arguments, error):
    with pytest.raises(error, match="must be"):
        EGEM(**arguments)


def test_an_input_without_the_channel_dimension():
    module = EGEM(learnable=True, num_parameters=3, channel_dim=5)
    with pytest.raises(IndexError, match="Dimension out of range"):
        module(torch.ones(2, 3))


@pytest.mark.parametrize("channel_dim", [1, -1])
def test_per_channel_modules_trace_script_and_keep_the_memory_format(channel_dim):
    module = SEGEM(learnable=True, num_parameters=4, channel_dim=channel_dim)
    x = torch.randn(2, 4, 5, 4).to(memory_format=torch.channels_last)
    expected = module(x)
    assert expected.stride() == x.stride()
    assert torch.equal(torch.fx.symbolic_trace(module)(x), expected)
    assert torch.equal(torch.jit.script(module)(x), expected)


def test_tracing_a_learnable_module_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        torch.jit.trace(EGEM(learnable=True), torch.ones(3))


@pytest.mark.parametrize("cls", [GEM, EGEM, SEGEM])
def test_save(cls):
    assert cls().save == "auto"
    assert "save" not in repr(cls())
    assert "save='input'" in repr(cls(save="input"))
    with pytest.raises(ValueError, match=r"got save='x'\. save must be 'auto', 'input' or 'output'"):
        cls(save="x")


@pytest.mark.parametrize("module", [GEM(2), EGEM(2), EGEM(2, learnable=True)], ids=repr)
def test_save_may_change(module):
    x = torch.randn(30, requires_grad=True)
    grads = []
    for save in ("input", "output"):
        module.save = save
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, saved=saved: saved.append(t.data_ptr()) or t, lambda t: t
        ):
            y = module(x)
        assert ((y if save == "output" else x).data_ptr()) in saved
        grads.append(torch.autograd.grad(y.sum(), x)[0])
    torch.testing.assert_close(*grads)


@learnable_families
def test_copies_of_a_compiled_module_run_with_their_own_parameters(family):
    module, x = LEARNABLE[family](1, 1.0, learnable=True), torch.linspace(-2, 2, 5)
    module.compile(backend="eager")
    before = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            twin.log_ratio.fill_(5.0)
        assert torch.equal(twin(x), twin.forward(x))
    assert torch.equal(module(x), before)
