"""Language models with gated feed-forwards: training, generation, loading, adapters, and several processes."""

import contextlib
import copy
import itertools
import os

import pytest
import torch

from hf_gem._torch import reset_compiler
from hf_gem.modules import GemActivation
from tests.helpers import fails_with, is_version, needs_compiler, save_bytes_tokenizer

pytest.importorskip("transformers")

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "error:::hf_gem")

TINY = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 8}
TINY |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
TINY |= {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
EXPERTS = {"num_experts_per_tok": 1, "moe_intermediate_size": 32}
# Model type -> the field of its activation, and what makes it tiny besides TINY.
MODELS = {
    "llama": ("hidden_act", {}),
    "mistral": ("hidden_act", {}),
    "qwen2": ("hidden_act", {}),
    "qwen3": ("hidden_act", {}),
    "gemma": ("hidden_act", {}),
    "gemma2": ("hidden_act", {}),  # passed on to hidden_activation
    "gemma3_text": ("hidden_activation", {}),
    "phi3": ("hidden_act", {}),
    "glm": ("hidden_act", {}),
    "mixtral": ("hidden_act", {"num_local_experts": 2, **EXPERTS}),
    "qwen3_moe": ("hidden_act", {"num_experts": 2, **EXPERTS}),
    "t5": ("feed_forward_proj", {"d_kv": 8, "d_ff": 32, "num_decoder_layers": 2, "decoder_start_token_id": 0}),
}
LEARNABLE = "segem_eps0.5_learnable"
IDS = torch.arange(1, 65).view(4, 16)

# How far two forwards may be apart that sum in another order: each has some 400 roundings between a token and a logit
# (two layers with sums over 16 and 32 terms, and a head) of half an eps of the largest value.
FORWARD = 400 * torch.finfo(torch.float32).eps
TRAINED = 2 * 3 * FORWARD  # two steps, each a forward and a backward twice as long

models = pytest.mark.parametrize("model_type", list(MODELS))
causal_models = pytest.mark.parametrize("model_type", [name for name in MODELS if name != "t5"])
acts = pytest.mark.parametrize("act", ["egem_n2_eps0.01", LEARNABLE])


def build(act, model_type="llama", **more):
    field, extra = MODELS[model_type]
    torch.manual_seed(0)
    name = f"gated-{act}" if model_type == "t5" else act
    config = AutoConfig.for_model(model_type, **{**TINY, **extra, field: name, **more})
    return (AutoModelForSeq2SeqLM if model_type == "t5" else AutoModelForCausalLM).from_config(config).eval()


def activations(model):
    return [module for module in model.modules() if isinstance(module, GemActivation)]


def train(model, ids=IDS, steps=2, lr=0.5):
    """SGD, since Adam divides by gradients that may themselves be rounding. Returns the losses."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


def assert_close(got, expected, relative, where="logits"):
    """Each entry to within `relative` of the largest."""
    atol = relative * expected.abs().max().item()
    torch.testing.assert_close(got, expected, rtol=0, atol=atol, msg=lambda text: f"{where}: {text}")


# ---- every architecture


@acts
@models
def test_training(model_type, act):
    model = build(act, model_type)
    layers = activations(model)
    assert [layer.spec.name for layer in layers] == [act] * (4 if model_type == "t5" else 2)
    losses = train(model, steps=4)
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert all(p.item() != 0 for layer in layers for p in layer.parameters())


@acts
@models
def test_generation_does_not_depend_on_the_cache(model_type, act):
    model = build(act, model_type)
    with_cache, without = (
        model.generate(IDS[:, :5], max_new_tokens=8, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert torch.equal(with_cache, without)


@torch.no_grad()
@acts
@causal_models
def test_decoding_token_by_token(model_type, act):
    model = build(act, model_type)
    out = model(input_ids=IDS[:, :5], use_cache=True)
    parts = [out.logits]
    for i in range(5, IDS.shape[1]):
        out = model(input_ids=IDS[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        parts.append(out.logits)
    assert_close(torch.cat(parts, 1), logits(model), FORWARD)


@acts
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing(act, use_reentrant):
    plain, saving = build(act).train(), build(act).train()
    saving.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    train(plain, steps=1)
    train(saving, steps=1)
    for one, two in zip(plain.parameters(), saving.parameters(), strict=True):
        assert torch.equal(one.grad, two.grad)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow])])
def test_compile(backend):
    model = build(LEARNABLE, num_hidden_layers=1)
    reset_compiler()
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=backend)(input_ids=IDS, use_cache=False).logits
    assert_close(compiled, logits(model), FORWARD)


# ---- checkpoints


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model with an eps of its own in each layer, and the folder in which it is saved with a tokenizer."""
    folder = tmp_path_factory.mktemp("checkpoint")
    model = build(LEARNABLE)
    with torch.no_grad():
        for value, layer in zip((1.0, -2.0), activations(model), strict=True):
            layer.log_ratio.fill_(value)
    model.save_pretrained(folder)
    save_bytes_tokenizer(folder)
    return model, folder


def test_pipeline(trained):
    from transformers import AutoTokenizer, pipeline

    model, folder = trained
    generator = pipeline("text-generation", model=str(folder))
    (answer,) = generator("the gate", max_new_tokens=8, do_sample=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = model.generate(**tokenizer("the gate", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert answer["generated_text"] == tokenizer.decode(ids[0], skip_special_tokens=True)


PARTS = ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head")
HALF_ON_DISK = {part: "disk" if part in ("model.layers.1", "model.norm") else "cpu" for part in PARTS}


@pytest.mark.parametrize(
    "how",
    [
        *({"device_map": "auto"}, {"device_map": "cpu"}, {"low_cpu_mem_usage": True}, {"device_map": HALF_ON_DISK}),
        pytest.param(
            {"device_map": "auto", "max_memory": {"cpu": "20KB"}},  # nothing fits
            marks=fails_with("accelerate", "1.13", "does not put everything on disk"),
        ),
    ],
    ids=["auto", "cpu", "low_cpu_mem_usage", "half on disk", "all on disk"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ways_of_loading(trained, how, dtype, tmp_path):
    pytest.importorskip("accelerate")
    model, folder = trained
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, offload_folder=tmp_path, **how).eval()
    expected = copy.deepcopy(model)
    for p in expected.parameters():  # not the buffers, which transformers keeps in float32
        p.data = p.data.to(dtype)
    assert torch.equal(logits(loaded), logits(expected))


@pytest.mark.parametrize("where", ["cpu_offload", "disk_offload"])
def test_offloading_a_model(trained, where, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, folder = trained
    loaded = AutoModelForCausalLM.from_pretrained(folder).eval()
    folder_of_weights = () if where == "cpu_offload" else (tmp_path,)
    getattr(accelerate, where)(loaded, *folder_of_weights, execution_device=torch.device("cpu"))
    assert all(layer.log_ratio.is_meta for layer in activations(loaded))
    assert torch.equal(logits(loaded), logits(model))


@pytest.fixture
def _uninitialized_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # which fills it
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_uninitialized_memory_is_nan")
def test_an_eps_that_is_neither_in_the_checkpoint_nor_in_memory(trained, tmp_path):
    pytest.importorskip("accelerate")
    model, _ = trained
    state = {name: value for name, value in model.state_dict().items() if "log_ratio" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    fresh = copy.deepcopy(model)
    for layer in activations(fresh):
        layer.reset_parameters()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto")), logits(fresh))
    # transformers cannot put on disk what it initialises, whatever the module: it says the name, or does better one day
    with contextlib.suppress(KeyError):
        loaded = AutoModelForCausalLM.from_pretrained(
            tmp_path, device_map=HALF_ON_DISK, offload_folder=tmp_path / "offload"
        )
        assert torch.equal(logits(loaded), logits(fresh))


# ---- adapters


@pytest.fixture
def base(act, tmp_path):
    """The folder of a model to put an adapter on."""
    build(act).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@acts
@pytest.mark.parametrize("target_modules", [None, "all-linear"])
def test_lora(act, base, target_modules, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", target_modules=target_modules)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    losses = train(model, steps=3)
    assert losses[-1] < losses[0]
    for layer in activations(model):
        assert layer.spec.name == act
        assert all(p.grad is None and not p.requires_grad and p.item() == 0 for p in layer.parameters())
    expected = logits(model.eval())
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), expected)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()), expected)
    merged = loaded.merge_and_unload()
    assert [layer.spec.name for layer in activations(merged)] == [act] * 2
    assert_close(logits(merged), expected, FORWARD)


@pytest.mark.parametrize("act", [LEARNABLE])
def test_an_adapter_with_its_own_eps(act, base, tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", modules_to_save=["act_fn"])
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    train(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter").eval()
    assert torch.equal(logits(loaded), logits(model.eval()))
    merged = activations(loaded.merge_and_unload())
    assert len(merged) == 2
    assert all(layer.log_ratio.item() != 0 for layer in merged)


def test_an_activation_is_no_target_of_lora():
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match=r"SEGEM\(n=1, eps=0.5, learnable=True\) is not supported"):
        peft.get_peft_model(build(LEARNABLE), peft.LoraConfig(target_modules=["act_fn"]))


# ---- two processes


DISTRIBUTED_ACTS = ["egem_n2_eps0.01", LEARNABLE]
# Every process has some of the channels that share an eps, and so a part of its gradient: docs/learnable.md.
EPS_IN_PLAN = {"model.layers.*.mlp.act_fn": "replicated_with_grad_allreduce"}


def parameters_and_gradients(model):
    def full(tensor):
        return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()

    return {name: (full(p), full(p.grad)) for name, p in model.named_parameters()}


def _ddp(act, folder, ids):
    model = torch.nn.parallel.DistributedDataParallel(build(act).train())
    train(model, ids)
    return model.module


def _fsdp2(act, folder, ids):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, mesh = build(act).train(), init_device_mesh("cpu", (2,))
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh)
    train(model, ids)
    return model


def _tensor_parallel(act, folder, ids):
    from transformers.distributed import DistributedConfig

    plan = DistributedConfig(tp_size=2, tp_plan=EPS_IN_PLAN if act == LEARNABLE else "auto")
    model = AutoModelForCausalLM.from_pretrained(folder / act, distributed_config=plan).train()
    train(model)
    return model


STRATEGIES = {"ddp": _ddp, "fsdp2": _fsdp2, "tensor_parallel": _tensor_parallel}
# transformers 5.17 adds up the parts of a gradient before the last of them is there.
BROKEN = [("tensor_parallel", LEARNABLE)] if is_version("transformers", "5.17") else []
RUNS = [run for run in itertools.product(STRATEGIES, DISTRIBUTED_ACTS) if run not in BROKEN]


def _process(rank, folder):
    """One of two processes on half of the batch each: what every strategy has after two steps goes into `folder`."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for strategy, act in RUNS:
        model = STRATEGIES[strategy](act, folder, IDS[2 * rank : 2 * rank + 2])
        torch.save(parameters_and_gradients(model), folder / f"{strategy}-{act}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_two_processes_equal_one(tmp_path):
    for act in DISTRIBUTED_ACTS:
        build(act).save_pretrained(tmp_path / act)
    torch.multiprocessing.spawn(_process, (tmp_path,), nprocs=2)
    for act in DISTRIBUTED_ACTS:
        model = build(act).train()
        train(model)
        expected = parameters_and_gradients(model)
        for strategy, rank in itertools.product([strategy for strategy, of in RUNS if of == act], range(2)):
            got = torch.load(tmp_path / f"{strategy}-{act}-{rank}.pt")
            assert got.keys() == expected.keys()
            for name, tensors in expected.items():
                for tensor, other in zip(tensors, got[name], strict=True):
                    assert_close(other, tensor, TRAINED, f"{strategy}, {act}, process {rank}, {name}")
