"""What the objectives of the recipes ask of a device, read from their graphs and operations on any machine."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor.decomposition import select_decomp_table
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)

from hf_gem._torch import TorchDispatchMode, explain, waits_for_device
from hf_gem.training.image_models import CifarResNetConfig, CifarResNetForImageClassification
from hf_gem.training.loss import CausalLMLoss, ClassificationLoss, MaskedLMLoss
from hf_gem.training.memory import checkpoint_gradients
from recipes import bert_pretrain, gpt2_pretrain, vision_train
from tests.helpers import run_here, write_corpus

VOCAB, LENGTH, BATCH, LAYERS = 80, 16, 4, 3
FAMILY = ("gem", "egem", "segem", "egem_learnable", "segem_n2_learnable")


def gpt2(activation="gem_n2"):
    sizes = {"vocab_size": VOCAB, "n_positions": LENGTH, "n_embd": 16, "n_layer": LAYERS, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, activation_function=activation, bos_token_id=0, eos_token_id=0))
    ids = torch.randint(VOCAB, (BATCH, LENGTH + 1))
    return CausalLMLoss(model, chunk_size=LENGTH), {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def checkpointed_gpt2():
    objective, batch = gpt2()
    checkpoint_gradients(objective.model)
    return objective, batch


SIZES = {
    **{"hidden_size": 16, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "intermediate_size": 32},
    "hidden_act": "gem_n2",
}


def bert():
    model = BertForMaskedLM(BertConfig(vocab_size=VOCAB, pad_token_id=0, **SIZES))
    ids = torch.randint(VOCAB, (BATCH, LENGTH))
    positions = torch.randint(LENGTH, (BATCH, 3))
    return MaskedLMLoss(model, head="cls"), {"input_ids": ids, "positions": positions, "labels": ids[:, :3]}


def vit():
    model = ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, num_labels=10, **SIZES))
    return ClassificationLoss(model), images()


def resnet():
    return ClassificationLoss(CifarResNetForImageClassification(CifarResNetConfig(depth=8, num_labels=10))), images()


def images():
    return {"pixel_values": torch.randn(BATCH, 3, 16, 16), "labels": torch.randint(10, (BATCH,))}


OBJECTIVES = [gpt2, checkpointed_gpt2, bert, vit, resnet]
every_objective = pytest.mark.parametrize("make", OBJECTIVES, ids=lambda make: make.__name__)


def calls(graphs, function):
    """The calls of a function in some graphs and in the graphs inside of these, those of checkpointed layers."""
    inside = [part for graph in graphs for part in graph.modules() if isinstance(part, torch.fx.GraphModule)]
    return [node for graph in inside for node in graph.graph.nodes if node.target is function]


@every_objective
def test_attention_gets_no_mask_and_everything_is_one_graph(make):
    objective, batch = make()
    explained = explain(objective.train(), **batch)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0)
    attention = calls(explained.graphs, F.scaled_dot_product_attention)
    assert len(attention) == (0 if make is resnet else LAYERS)
    for call in attention:
        assert call.kwargs["attn_mask"] is None
        assert call.kwargs["is_causal"] == (make in (gpt2, checkpointed_gpt2))


def test_the_graph_of_a_masked_model_shows_its_mask():
    """So that the test above sees what it should."""
    objective, batch = gpt2()
    explained = explain(objective.model.transformer, batch["input_ids"], use_cache=False)
    attention = calls(explained.graphs, F.scaled_dot_product_attention)
    assert [call.kwargs["is_causal"] for call in attention] == [False] * LAYERS


class _Waits(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if waits_for_device(operation):
            self.found.append(str(operation))
        return operation(*args, **(kwargs or {}))


@every_objective
def test_nothing_in_a_step_waits_for_the_device(make):
    objective, batch = make()
    with _Waits() as waits:
        objective.train()(**batch).loss.backward()
    assert waits.found == []
    with _Waits() as waits:
        nn.Linear(2, 2)(torch.zeros(1, 2)).sum().item()
        torch.zeros(2)[torch.ones(2, dtype=torch.bool)]
    assert len(waits.found) == 2  # the measure sees what it should


@pytest.mark.gpu
@every_objective
def test_nothing_in_a_step_waits_for_a_gpu(make):
    objective, batch = make()
    objective.train().cuda()
    batch = {name: tensor.cuda() for name, tensor in batch.items()}
    objective(**batch).loss.backward()  # kernels are loaded
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        objective(**batch).loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def test_whole_sequences_change_no_loss_and_leave_the_model_to_see_padding():
    objective, batch = gpt2()
    model = objective.eval().model
    logits = model(batch["input_ids"]).logits
    expected = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), reduction="sum")
    bound = BATCH * LENGTH * torch.finfo(torch.float32).eps  # sums of as many terms, in another order
    torch.testing.assert_close(objective(**batch).loss, expected, rtol=bound, atol=0)
    assert model.config._attn_implementation == "sdpa"
    mask = torch.ones_like(batch["input_ids"])
    mask[:, :3] = 0
    assert not torch.equal(model(batch["input_ids"], attention_mask=mask).logits[:, -1], logits[:, -1])


@pytest.mark.parametrize("chosen", ["eager", "sdpa"])
def test_other_attention_keeps_its_masks(chosen):
    objective, batch = gpt2()
    objective.eval().model.set_attn_implementation("sdpa")
    expected = objective(**batch).loss
    objective.model.set_attn_implementation(chosen)
    bound = BATCH * LENGTH * torch.finfo(torch.float32).eps
    torch.testing.assert_close(objective(**batch).loss, expected, rtol=bound, atol=0)
    assert objective.model.config._attn_implementation == chosen


def held_by_the_compiler(objective, batch):
    """The loss in bf16 autocast, and what Inductor would keep for its backward pass."""
    held = []

    def forward(graph, _):
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        held.extend(node.meta["val"] for node in output.args[0] if isinstance(node, torch.fx.Node))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(  # as Inductor does it, without its kernels
        fw_compiler=forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch._dynamo.reset()
    with torch.autocast("cpu", torch.bfloat16):
        loss = torch.compile(objective.train(), backend=backend)(**batch).loss
    loss.backward()
    return loss, held


def held_tensors(activation):
    objective, batch = gpt2(activation)
    objective.chunk_size = 0
    loss, held = held_by_the_compiler(objective, batch)
    assert loss.dtype == torch.float32
    # Beside tensors there are sizes, and a learnable eps, a number for each layer.
    return [tensor for tensor in held if isinstance(tensor, torch.Tensor) and tensor.numel() > LAYERS]


def num_bytes(tensors):
    return sum(tensor.nbytes for tensor in tensors)


def test_what_a_compiled_step_holds():
    """In bf16 autocast: logits, and of an activation what is held of gelu, without a float32 copy of either."""
    held = held_tensors("gem_n2")
    logits = [tensor for tensor in held if tensor.numel() == BATCH * LENGTH * VOCAB]
    assert [tensor.dtype for tensor in logits] == [torch.bfloat16]
    assert num_bytes(held) == num_bytes(held_tensors("gelu_pytorch_tanh"))


@pytest.mark.slow
def test_all_compiled_activations_hold_what_gelu_holds():
    expected = num_bytes(held_tensors("gelu_pytorch_tanh"))
    assert {name: num_bytes(held_tensors(name)) for name in FAMILY} == dict.fromkeys(FAMILY, expected)


SMALL = (
    *(
        "--validation_fraction=0.2",
        "--steps=6",
        "--global_batch_size=8",
        "--micro_batch_size=4",
        "--warmup_steps=2",
    ),
    *("--log_every=1", "--eval_every=3", "--save_every=0", "--report_to=none", "--compile=true"),
)
TEXT = (
    "--min_validation_tokens=0",
    f"--n_layer={LAYERS}",
    "--n_embd=16",
    "--n_head=2",
    "--block_size=16",
    "--vocab_size=300",
)


@pytest.mark.parametrize("recipe", [gpt2_pretrain, bert_pretrain, vision_train], ids=lambda recipe: recipe.__name__)
def test_a_compiled_run_of_a_recipe_is_one_graph_without_masks(recipe, tmp_path, monkeypatch):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compile_with = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_with(module, backend=backend))
    torch._dynamo.reset()
    flags = SMALL
    if recipe is not vision_train:
        flags += (*TEXT, f"--dataset={write_corpus(tmp_path / 'corpus.txt')}", f"--cache_dir={tmp_path / 'cache'}")
    run_here(recipe, tmp_path / "run", *flags)
    assert len(graphs) == 1
    attention = calls(graphs, F.scaled_dot_product_attention)
    assert len(attention) == (0 if recipe is vision_train else LAYERS)
    for call in attention:
        assert (call.kwargs["attn_mask"], call.kwargs["is_causal"]) == (None, recipe is gpt2_pretrain)
