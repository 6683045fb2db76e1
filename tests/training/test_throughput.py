"""FLOPs and peaks."""

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from hf_gem.training.throughput import decoder_flops_per_token, peak_flops


def test_flops_of_gpt2_small():
    with torch.device("meta"):
        model = GPT2LMHeadModel(GPT2Config(vocab_size=50304))
    matrices = 12 * (4 + 8) * 768**2 + 50304 * 768
    vectors = 12 * (9 + 4) * 768 + 2 * 768  # biases and norms
    expected = 6 * (matrices + vectors) + 12 * 12 * 768 * 1024
    assert decoder_flops_per_token(model, 1024) == expected


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA H100 NVL", None),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("a GPU of the future", None),
    ],
)
def test_peaks_go_by_device_name(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == peak


def test_a_cpu_has_no_known_peak():
    assert peak_flops(torch.device("cpu")) is None
