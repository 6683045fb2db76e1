"""Names of the family in vLLM: on a stand-in for the two modules that are hooked, and on vLLM where it is installed."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hf_gem
from hf_gem.integrations.vllm import INSTALLERS

ACTIVATIONS = "vllm.model_executor.layers.activation"


class LazyDict(dict):  # type: ignore[type-arg]
    """As in vLLM: a mapping of factories that builds an entry when it is asked for."""

    def __getitem__(self, key: str) -> nn.Module:
        return super().__getitem__(key)()


@pytest.fixture
def vllm(monkeypatch):
    """The module of activations, with names of the family, and `serve(config)` to say what vLLM is building."""
    module = ModuleType(ACTIVATIONS)
    module._ACTIVATION_REGISTRY = LazyDict(relu=nn.ReLU)
    current = SimpleNamespace(model_config=None)
    config = ModuleType("vllm.config")
    config.get_current_vllm_config_or_none = lambda: current
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    install, uninstall = INSTALLERS[ACTIVATIONS]
    install(module)

    def serve(hf_config):
        current.model_config = SimpleNamespace(hf_config=hf_config)

    yield SimpleNamespace(table=module._ACTIVATION_REGISTRY, serve=serve, module=module)
    uninstall(module)
    assert "gem_n2" not in module._ACTIVATION_REGISTRY
    assert "relu" in module._ACTIVATION_REGISTRY


def test_every_name_is_found_and_builds_its_own_module(vllm):
    assert "gem_n2" in vllm.table
    assert vllm.table["gem_n2"].spec == hf_gem.parse("gem_n2")
    assert vllm.table["gem_n2"] is not vllm.table["gem_n2"]  # a learnable eps is not shared between layers


def test_the_rest_is_as_it_was(vllm):
    assert isinstance(vllm.table["relu"], nn.ReLU)
    assert "swish" not in vllm.table
    with pytest.raises(KeyError, match="swish"):
        vllm.table["swish"]


def test_a_malformed_name_says_the_nearest(vllm):
    with pytest.raises(ValueError, match="Did you mean 'gem_n2'"):
        vllm.table["gem_n2x"]


def test_installing_twice_changes_nothing(vllm):
    kind = type(vllm.table)
    INSTALLERS[ACTIVATIONS][0](vllm.module)
    assert type(vllm.table) is kind


def test_a_config_with_a_name_is_served_and_a_converted_one_is_refused(vllm, tmp_path):
    config = GPT2Config(vocab_size=8, n_positions=8, n_embd=8, n_layer=2, n_head=2, activation_function="gem_n2")
    vllm.serve(config)
    assert vllm.table["gem_n2"].spec == hf_gem.parse("gem_n2")
    model = GPT2LMHeadModel(config)
    hf_gem.convert(model, "segem", skip="transformer.h.0.mlp.act")
    model.save_pretrained(tmp_path)
    vllm.serve(GPT2Config.from_pretrained(tmp_path))
    with pytest.raises(ValueError, match="--model-impl transformers"):
        vllm.table["segem"]


def test_vllm_finds_the_entry_point():
    points = importlib.metadata.entry_points(group="vllm.general_plugins")
    assert [point.load() for point in points if point.name == "hf_gem"] == [hf_gem.register]


def small(name: str) -> nn.Module:
    """Models whose heads are 64 wide: vLLM's attention on a CPU takes no smaller ones."""
    torch.manual_seed(0)
    tokens = {"vocab_size": 64, "bos_token_id": 0, "eos_token_id": 0, "initializer_range": 0.3}
    if name == "gpt2":
        gpt2 = GPT2Config(n_positions=64, n_embd=128, n_layer=2, n_head=2, activation_function="gem_n2", **tokens)
        return GPT2LMHeadModel(gpt2)
    widths = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "max_position_embeddings": 64}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**widths, **heads, **tokens))
    hf_gem.convert(model, "gem_n2", skip="model.layers.1.mlp.act_fn")
    return model


SERVE = """
import sys

from vllm import LLM, SamplingParams

if __name__ == "__main__":
    llm = LLM(sys.argv[1], model_impl=sys.argv[2], skip_tokenizer_init=True, dtype="float32", max_model_len=64,
              max_num_seqs=2, enforce_eager=True, distributed_executor_backend="uni")
    asked = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    print("tokens", *llm.generate([{"prompt_token_ids": [1, 5, 9, 20, 33]}], asked)[0].outputs[0].token_ids)
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(("name", "implementation"), [("gpt2", "auto"), ("llama", "transformers")])
def test_vllm_generates_what_transformers_does(tmp_path, name, implementation):
    model = small(name).eval()
    model.save_pretrained(tmp_path / "model")
    prompt = torch.tensor([[1, 5, 9, 20, 33]])
    expected = model.generate(prompt, max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)[0, 5:]
    (tmp_path / "serve.py").write_text(SERVE)
    command = [sys.executable, str(tmp_path / "serve.py"), str(tmp_path / "model"), implementation]
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(command, env=os.environ | own, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert f"tokens {' '.join(map(str, expected.tolist()))}" in done.stdout
