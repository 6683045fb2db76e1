"""The chunked loss is the whole loss, without its memory."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from hf_gem.training.loss import IGNORE, CausalLMLoss, MaskedLMLoss, chunked_cross_entropy

TOKENS, WIDTH, VOCAB = 50, 8, 37


def setup():
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB, bias=False)
    hidden = torch.randn(TOKENS, WIDTH, requires_grad=True)
    labels = torch.randint(VOCAB, (TOKENS,))
    labels[::7] = IGNORE
    return head, hidden, labels


@pytest.mark.parametrize("chunk_size", [0, 1, 16, 50, 64])
def test_value_and_gradients_do_not_depend_on_the_chunk(chunk_size):
    head, hidden, labels = setup()
    chunked_cross_entropy(hidden, head, labels, chunk_size).backward()
    got = hidden.grad.clone(), head.weight.grad.clone()
    hidden.grad = head.weight.grad = None
    loss = F.cross_entropy(head(hidden), labels, ignore_index=IGNORE, reduction="sum")
    loss.backward()
    # a sum of TOKENS terms in another order: at most TOKENS roundings of its largest partial sum
    bound = TOKENS * torch.finfo(torch.float32).eps
    torch.testing.assert_close(chunked_cross_entropy(hidden, head, labels, chunk_size), loss, rtol=bound, atol=0)
    torch.testing.assert_close(got[0], hidden.grad, rtol=0, atol=bound * hidden.grad.abs().max().item())
    torch.testing.assert_close(got[1], head.weight.grad, rtol=0, atol=bound * head.weight.grad.abs().max().item())


def test_no_tensor_as_large_as_the_logits_is_kept():
    head, hidden, labels = setup()
    sizes: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        chunked_cross_entropy(hidden, head, labels, 10)
    assert max(sizes) <= max(10 * VOCAB, TOKENS * WIDTH)
    sizes.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        chunked_cross_entropy(hidden, head, labels, 0)
    assert max(sizes) == TOKENS * VOCAB  # the measure sees what it should


def test_it_is_the_loss_that_transformers_computes():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=VOCAB, n_positions=12)).eval()
    ids = torch.randint(VOCAB, (3, 13))
    total = CausalLMLoss(model, chunk_size=5)(ids[:, :-1], ids[:, 1:]).loss
    theirs = model(ids[:, :12], labels=ids[:, :12]).loss  # shifts by itself, so it leaves the last target out
    ours = CausalLMLoss(model)(ids[:, :11], ids[:, 1:12]).loss / (3 * 11)
    torch.testing.assert_close(ours, theirs, rtol=64 * torch.finfo(torch.float32).eps, atol=0)
    assert total > 0


def test_masked_loss_is_that_of_transformers():
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertForMaskedLM(BertConfig(vocab_size=VOCAB, max_position_embeddings=16, **sizes)).eval()
    ids = torch.randint(VOCAB, (3, 10))
    positions = torch.tensor([[1, 4], [2, 3], [7, 9]])
    labels = torch.tensor([[5, 6], [7, IGNORE], [IGNORE, IGNORE]])
    whole = torch.full_like(ids, IGNORE).scatter(1, positions, labels)
    expected = model(input_ids=ids, labels=whole).loss * 3
    got = MaskedLMLoss(model, head="cls")(ids, positions, labels).loss
    torch.testing.assert_close(got, expected)
