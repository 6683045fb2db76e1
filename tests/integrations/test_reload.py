"""hf_gem reloaded, taken back and imported anew while models live."""

from tests.helpers import run_python

SCRIPT = """
import importlib, sys, torch, transformers, hf_gem
from transformers import GPT2Config, GPT2LMHeadModel

sizes = dict(n_layer=1, n_embd=8, n_head=2, vocab_size=20, n_positions=8, bos_token_id=0, eos_token_id=0)
ids = torch.arange(5)[None]
folder = sys.argv[1]

def logits(model):
    return model.eval()(ids).logits

model = GPT2LMHeadModel(GPT2Config(**sizes, hidden_act="gem_n2"))
expected = logits(model)
model.save_pretrained(folder)

def comes_back():
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(GPT2LMHeadModel.from_pretrained(folder)), expected)

importlib.reload(hf_gem)
comes_back()

hf_gem.unregister()
assert torch.equal(logits(model), expected)  # it lives on
try:
    GPT2LMHeadModel.from_pretrained(folder)
    raise AssertionError("loaded what nobody knows")
except KeyError:
    pass
hf_gem.register()
comes_back()

for name in [name for name in sys.modules if name.partition(".")[0] == "hf_gem"]:
    del sys.modules[name]
import hf_gem as again
assert type(model.transformer.h[0].mlp.act) is not again.GEM
comes_back()
assert type(GPT2LMHeadModel(model.config).transformer.h[0].mlp.act) is again.GEM
converted = GPT2LMHeadModel(GPT2Config(**sizes))
again.convert(converted, "segem")
converted.save_pretrained(folder)
assert torch.equal(logits(GPT2LMHeadModel.from_pretrained(folder)), logits(converted))
"""


def test_models_live_through_it(tmp_path):
    done = run_python("-W", "error:::hf_gem", "-c", SCRIPT, tmp_path / "model")
    assert done.returncode == 0, done.stderr
