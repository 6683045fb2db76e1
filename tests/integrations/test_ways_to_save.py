"""The ways to save and load that people use: the same function comes back, or something says that it does not."""

import copy
import json
import shutil
import warnings

import pytest
import torch
from torch import nn

import hf_gem

NAMES = ["gem_n2", "egem_learnable"]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.act(self.first(x)))


X = torch.linspace(-3, 3, 12).view(4, 3)


def converted(name, cls=Net):
    """A model with weights that no initialisation gives, eps included."""
    model = cls()
    hf_gem.convert(model, name, inputs=X)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def same(one, two, *inputs):
    for tensor in [*one.parameters(), *two.parameters()]:
        tensor.data = tensor.data.clone()  # a file is mapped as it lies, and unaligned weights round otherwise
    with torch.no_grad():
        a, b = (out if isinstance(out, torch.Tensor) else out[0] for out in (one(*inputs), two.eval()(*inputs)))
    return torch.equal(a, b)


@pytest.fixture(autouse=True)
def no_warnings():
    """Unless a test expects one: what comes back the same needs none."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


# ---- safetensors, and the mixin of the Hub, which saves by it


@pytest.mark.parametrize("name", NAMES)
def test_a_model_in_safetensors(name, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    model, file = converted(name), tmp_path / "model.safetensors"
    safetensors.save_model(model, file, metadata={"by": "me"})
    again = Net()
    safetensors.load_model(again, file)
    assert same(model, again, X)
    assert len(hf_gem.revert(again)) == 1
    by_code = Net()
    by_code.act = hf_gem.get_activation("gem_n3")
    with pytest.warns(UserWarning, match=f"Net keeps 'gem_n3' at 'act', where the file had '{name}'"):
        safetensors.load_model(by_code, file, strict=False)
    assert by_code.act.spec.name == "gem_n3"
    safetensors.save_model(Net(), file)  # of no interest
    safetensors.load_model(by_code, file, strict=False)


@pytest.mark.parametrize("written", ["no JSON", '{"version": 1}', "null"])
def test_a_file_with_something_else_under_our_key(written, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(Net().state_dict(), tmp_path / "a.safetensors", metadata={"hf_gem": written})
    with pytest.raises(ValueError, match="cannot read the conversion"):
        safetensors.load_model(Net(), tmp_path / "a.safetensors")


@pytest.mark.parametrize("name", NAMES)
def test_the_mixin_of_the_hub(name, tmp_path):
    pytest.importorskip("safetensors.torch")
    hub = pytest.importorskip("huggingface_hub")

    class Mixed(Net, hub.PyTorchModelHubMixin):
        def __init__(self, width: int = 8):
            super().__init__()

    model = converted(name, Mixed)
    for config in (None, {"width": 8}):
        model.save_pretrained(tmp_path, config=config)
        assert same(model, Mixed.from_pretrained(tmp_path), X)
    loaded = Mixed.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    assert same(model, Mixed.from_pretrained(tmp_path / "again"), X)


# ---- torch: a state dict holds no functions, whoever's they are


def test_a_whole_module(tmp_path):
    model = converted("egem_learnable")
    torch.save(model, tmp_path / "model.pt")
    assert same(model, torch.load(tmp_path / "model.pt", weights_only=False), X)
    assert same(model, copy.deepcopy(model), X)


def test_the_state_of_a_learnable_eps_does_not_go_into_another_function():
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: \"act\.log_ratio\""):
        Net().load_state_dict(converted("egem_learnable").state_dict())


# ---- PEFT

GPT2 = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 16, "vocab_size": 32}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0}
IDS = torch.arange(8)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a model that nobody has converted."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("base")
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2)).save_pretrained(folder)
    return folder


def to_adapt(base, name, how="convert"):
    """The model under an adapter: converted, built with the name, or as it is."""
    transformers = pytest.importorskip("transformers")
    asked = {"hidden_act": name} if how == "config" else {}
    model = transformers.GPT2LMHeadModel.from_pretrained(base, **asked)
    if how == "convert":
        hf_gem.convert(model, name, inputs=IDS)
    return model


def adapted(base, name, how="convert", **options):
    """A converted model with an adapter: the natural way to convert and fine-tune."""
    peft = pytest.importorskip("peft")
    model = to_adapt(base, name, how)
    layers = {"target_modules": ["c_attn", "c_fc"], "init_lora_weights": False, "fan_in_fan_out": True}
    return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **layers, **options)).eval()


@pytest.mark.parametrize("how", ["convert", "config"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters(name, how, base, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    # Version 5.24 wants one that is not out, where `PreTrainedModel` saves an adapter itself.
    monkeypatch.setattr("transformers.integrations.peft.check_peft_version", lambda **_: None)
    model = adapted(base, name, how, modules_to_save=["act"] if name.endswith("learnable") else None)
    model.save_pretrained(tmp_path / "adapter")
    loaded = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert same(model, loaded, IDS)
    stock = transformers.GPT2LMHeadModel.from_pretrained
    assert same(model, peft.PeftModel.from_pretrained(stock(base), tmp_path / "adapter"), IDS)
    mixed = peft.PeftMixedModel.from_pretrained(stock(base), tmp_path / "adapter")
    assert same(model, mixed, IDS)
    mixed.load_adapter(tmp_path / "adapter", "second")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert same(model, theirs, IDS)
    theirs.save_pretrained(tmp_path / "theirs")
    other = stock(base)
    other.load_adapter(tmp_path / "theirs")
    assert same(model, other, IDS)
    merged = loaded.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert same(merged, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), IDS)


@pytest.mark.parametrize("how", ["convert", "config", "stock"])
@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_that_learn_a_prompt(kind, how, base, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    config = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = peft.get_peft_model(to_adapt(base, "gem_n2", how), config).eval()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(transformers.GPT2LMHeadModel.from_pretrained(base), tmp_path)
    assert same(model, loaded, IDS)
    loaded.load_adapter(tmp_path, "second")
    loaded.set_adapter("second")
    assert same(model, loaded, IDS)


@pytest.mark.parametrize("how", ["convert", "config"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_adapters_of_experts(how, tmp_path):
    """PEFT wraps the module with the parameters, which also holds the activation, once for each parameter."""
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 2, "vocab_size": 32, "pad_token_id": None}
    cls, base, adapter = transformers.MixtralForCausalLM, tmp_path / "base", tmp_path / "adapter"
    cls(transformers.MixtralConfig(**sizes)).save_pretrained(base)
    model = cls.from_pretrained(base, **({"hidden_act": "gem_n2"} if how == "config" else {}))
    if how == "convert":
        hf_gem.convert(model, "gem_n2")
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = peft.LoraConfig(target_modules=["q_proj"], target_parameters=experts, init_lora_weights=False)
    model = peft.get_peft_model(model, config).eval()
    model.save_pretrained(adapter)
    loaded = peft.PeftModel.from_pretrained(cls.from_pretrained(base), adapter)
    assert same(model, loaded, IDS)
    file = adapter / "adapter_config.json"
    written = json.loads(file.read_text())
    assert written["hf_gem"]["activations"] == {"gem_n2": ["model.layers.0.mlp.experts.act_fn"]}
    # Older versions of hf_gem wrote the path through the wrappers.
    written["hf_gem"]["activations"] = {"gem_n2": ["model.layers.0.mlp.experts.base_layer.base_layer.act_fn"]}
    (tmp_path / "old").mkdir()
    (tmp_path / "old/adapter_config.json").write_text(json.dumps(written))
    shutil.copy(adapter / "adapter_model.safetensors", tmp_path / "old")
    assert same(model, peft.PeftModel.from_pretrained(cls.from_pretrained(base), tmp_path / "old"), IDS)
    bare = transformers.MixtralModel(transformers.MixtralConfig(**sizes))  # which only the activations fit
    with pytest.warns(UserWarning, match="missing adapter keys"):
        peft.PeftModel.from_pretrained(bare, tmp_path / "old")
    assert any(isinstance(module, hf_gem.GEM) for module in bare.modules())
    for folder in (adapter, tmp_path / "old"):  # where the model is wrapped already
        loaded.load_adapter(folder, folder.name)
        loaded.set_adapter(folder.name)
        assert same(model, loaded, IDS)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_adapter_after_the_only_one_was_deleted(base, tmp_path):
    model = adapted(base, "gem_n2")
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(IDS).logits
    model.delete_adapter("default")
    model.load_adapter(tmp_path, "default")
    model.set_adapter("default")  # PEFT leaves it inactive
    assert torch.equal(model(IDS).logits, expected)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_what_an_adapter_says_no_more_than(base, tmp_path):
    peft = pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    model = adapted(base, "gem_n2")
    model.save_pretrained(tmp_path)
    stock = transformers.GPT2LMHeadModel.from_pretrained
    # Its settings for a new adapter are nobody's conversion.
    fresh = peft.get_peft_model(stock(base), peft.PeftConfig.from_pretrained(tmp_path))
    assert not any(isinstance(module, hf_gem.GemActivation) for module in fresh.modules())
    # A base that is converted to something else stays, and says so.
    with pytest.warns(UserWarning, match=r"keeps 'gem_n3' at .*h\.0\.mlp\.act', where the adapter had 'gem_n2'"):
        peft.PeftModel.from_pretrained(stock(base, hidden_act="gem_n3"), tmp_path)
    # One without a conversion beside one with it: there is one base for both.
    fresh.save_pretrained(tmp_path / "stock")
    loaded = peft.PeftModel.from_pretrained(stock(base), tmp_path / "stock")
    loaded.load_adapter(tmp_path, "second")
    assert {m.spec.name for m in loaded.modules() if isinstance(m, hf_gem.GemActivation)} == {"gem_n2"}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_an_eps_that_is_trained_and_not_in_the_adapter(base, tmp_path):
    model = adapted(base, "egem_learnable")
    for parameter in (p for name, p in model.named_parameters() if name.endswith("log_ratio")):
        parameter.requires_grad_()
    with pytest.warns(
        UserWarning, match=r"eps at 'transformer\.h\.0\.mlp\.act' is not part of.*modules_to_save=\['act'\]"
    ):
        model.save_pretrained(tmp_path)


def test_peft_alone_says_that_it_does_not_know_the_key(base, tmp_path):
    peft = pytest.importorskip("peft")
    adapted(base, "gem_n2").save_pretrained(tmp_path)
    hf_gem.unregister()
    try:
        with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['hf_gem'\]"):
            peft.PeftConfig.from_pretrained(tmp_path)
    finally:
        hf_gem.register()


# ---- diffusers


def denoiser():
    diffusers = pytest.importorskip("diffusers", reason="its models are saved by its own means")
    sizes = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 8}
    return diffusers.UNet2DModel(
        **sizes, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")
    )


def autoencoder():
    diffusers = pytest.importorskip("diffusers", reason="its models are saved by its own means")
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=2)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [denoiser, autoencoder])
def test_diffusers(make, name, tmp_path):
    inputs = (torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8), *((1,) if make is denoiser else ()))
    model = make().eval()
    hf_gem.convert(model, name, inputs=inputs)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same(model, loaded, *inputs)
    loaded.save_pretrained(tmp_path / "again")
    assert same(model, type(model).from_pretrained(tmp_path / "again", low_cpu_mem_usage=False), *inputs)
    copied = type(model).from_config(model.config)  # as averages of weights are kept
    copied.load_state_dict(model.state_dict())
    assert same(model, copied, *inputs)
    hf_gem.revert(loaded)
    loaded.save_pretrained(tmp_path / "reverted")
    assert '"hf_gem"' not in (tmp_path / "reverted" / "config.json").read_text()


def test_averages_of_diffusers(tmp_path):
    model = denoiser().eval()
    training_utils = pytest.importorskip("diffusers.training_utils")
    hf_gem.convert(model, "gem_n2")
    average = training_utils.EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    average.save_pretrained(tmp_path)
    inputs = torch.linspace(-1, 1, 3 * 64).view(1, 3, 8, 8), 1
    assert same(model, type(model).from_pretrained(tmp_path), *inputs)


# ---- Lightning


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@pytest.mark.parametrize("name", NAMES)
def test_lightning(package, name, tmp_path):
    lightning = pytest.importorskip(package, reason="it writes checkpoints of its own")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch):
            return self.net(batch).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    def train(model, **options):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what a run of one step lacks
            run = lightning.Trainer(max_steps=1, accelerator="cpu", default_root_dir=tmp_path, **quiet)
            run.fit(model.train(), torch.utils.data.DataLoader(X, batch_size=2), **options)
        return run

    model = converted(name, Module)
    train(model).save_checkpoint(tmp_path / "last.ckpt")
    assert same(model.eval(), Module.load_from_checkpoint(tmp_path / "last.ckpt"), X)
    fresh = Module()
    train(fresh, ckpt_path=tmp_path / "last.ckpt")
    assert same(model, fresh, X)


# ---- sentence-transformers


@pytest.mark.parametrize("name", NAMES)
def test_sentence_transformers(name, tmp_path):
    library = pytest.importorskip("sentence_transformers", reason="its layers are saved by its own means")
    from sentence_transformers.base.modules import Dense

    layer = Dense(3, 2, activation_function=nn.ReLU())
    model = library.SentenceTransformer(modules=[layer], device="cpu")
    hf_gem.convert(model, name)
    model.save(str(tmp_path))
    again = library.SentenceTransformer(str(tmp_path), device="cpu")
    features = {"sentence_embedding": X}
    expected = model(dict(features))["sentence_embedding"]
    assert torch.equal(expected, again(dict(features))["sentence_embedding"])


# ---- the Trainer, with a model that is none of transformers


def test_the_trainer_with_a_plain_module(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    arguments = transformers.TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    transformers.Trainer(model=Net(), args=arguments).save_model()
    with pytest.warns(
        UserWarning, match=r"Trainer saves the weights of Net, but not its conversion.*'gem_n2' at 'act'"
    ):
        transformers.Trainer(model=converted("gem_n2"), args=arguments).save_model()
