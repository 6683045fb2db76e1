"""`hf-gem env` and `hf-gem bench`."""

import json
import sys
from pathlib import Path

import torch

import hf_gem as package
from tests.helpers import run_python

TOKEN = "hf_" + "s" * 34


def test_env_has_what_a_bug_report_needs_and_no_secrets(hf_gem, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_GEM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_GEM_STOP_FILE", f"https://me:pass-word@host/{TOKEN}")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "cpu-egem-n1-0.so").touch()
    code, out, _ = hf_gem("env")
    assert code == 0
    for secret in (TOKEN, "pass-word", str(tmp_path)):
        assert secret not in out
    found = json.loads(hf_gem("env", "--json")[1])
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["hf-gem"] == package.__version__
    assert found["hardware"].keys() >= {"cpu", "gpus", "driver", "platform"}
    assert found["kernels"]["cache"] == "~/cache"
    assert found["kernels"]["built"] == ["cpu-egem-n1-0.so"]
    assert "C++" in found["compiler"]
    assert found["variables"]["HF_GEM_CACHE"] == "~/cache"
    assert not list(Path().glob("cache"))


def test_env_goes_on_without_compiler_and_driver(hf_gem, monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    found = json.loads(hf_gem("env", "--json")[1])
    assert found["compiler"]["C++"] is None
    assert found["hardware"]["driver"] is None
    assert found["kernels"]["on the CPU"] == "plain formulas"


def test_bench_compares_with_torch(hf_gem, monkeypatch):
    monkeypatch.setattr("hf_gem.cli.timing._KERNELS", "eager")  # nothing is compiled for a test
    monkeypatch.setattr("hf_gem.cli.timing._SECONDS", 1e-4)
    flags = ("--shape", "8x16", "--rounds", "3", "--device", "cpu")
    code, out, _ = hf_gem("bench", "gem_n2", *flags, "--json")
    assert code == 0
    rows = {row["name"]: row for row in json.loads(out)["rows"]}
    assert list(rows) == ["gem_n2", "gelu", "relu", "silu"]
    assert rows["gelu"]["to_gelu"] == [1, 1, 1]
    for row in rows.values():
        middle, low, high = row["to_relu"]
        assert 0 < low <= middle <= high
        assert row["microseconds"] > 0
    assert "/ relu" in hf_gem("bench", "gem_n2", *flags)[1]


def test_bench_says_what_it_takes(hf_gem):
    assert "--device must be a device that computes" in hf_gem("bench", "--device", "meta")[2]
    assert "--dtype must be one of" in hf_gem("bench", "--device", "cpu", "--dtype", "int8")[2]
    for shape in ("axb", "0", "8x0", "-8", "8x", "", "٣"):
        assert "--shape must be sizes above 0 with x" in hf_gem("bench", "--device", "cpu", "--shape", shape)[2]
    for flags in (("--shape", "8xmany"), ("--shape", "9" * 30), ("--device", "nowhere"), ("gem_n0",)):
        code, out, err = hf_gem("bench", "--device", "cpu", *flags)
        assert (code, out, err.count("\n")) == (1, "", 1)


def test_bench_prints_no_warning_of_torch():
    """torch.utils.cpp_extension, which its timer imports, warns where there is a CUDA toolkit and no GPU."""
    code = """
from hf_gem.cli import main, timing
timing._KERNELS, timing._SECONDS = "eager", 1e-4
main(["bench", "gem", "--shape", "8x16", "--rounds", "3", "--device", "cpu"])
"""
    done = run_python("-c", code, CUDA_HOME=sys.prefix, CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stderr) == (0, "")
