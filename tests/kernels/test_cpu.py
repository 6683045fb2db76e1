"""The C++ kernels: the bits of the formulas, and all that can happen on the way to a library."""

import _ctypes
import os
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hf_gem
from hf_gem import egem
from hf_gem._kernels import build, cpu, plain, run
from hf_gem._kernels.printer import cpp_source
from hf_gem._kernels.trust import is_intact, seal, seal_of
from hf_gem.family.egem import EGEM
from hf_gem.family.segem import SEGEM
from hf_gem.family.table import FAMILIES as TABLE
from tests.family.dgem import DGEM
from tests.family.spelled import SPELLED
from tests.helpers import needs_compiler

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FAMILIES = [EGEM, SEGEM, DGEM]  # the last one is not ours
OPERATIONS = [(op, family) for op in ("forward", "backward", "glu", "glu_backward") for family in FAMILIES]
OPERATIONS.append(("backward_at", EGEM))
NUM_INPUTS = {"forward": 1, "backward": 2, "backward_at": 2, "glu": 2, "glu_backward": 3}

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def numbers(dtype, count=2**16):
    """Any bit patterns; of a half type, in their random order, all of them."""
    if dtype == torch.float32:
        near = torch.randn(count) * torch.exp2(torch.randint(-20, 5, (count,)).float())
        return torch.cat([torch.randint(-(2**31), 2**31, (count,)).to(torch.int32).view(dtype), near])
    return torch.randperm(2**16).to(torch.int16).view(dtype)


def same_bits(a, b):
    integer = torch.int32 if a.dtype == torch.float32 else torch.int16
    return ((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all()


def assert_same(operation, family, n, eps, *inputs, backend="compiled", device="cpu"):
    """The kernels of a backend on a device, against the formulas on a CPU."""
    with hf_gem.kernels(backend):
        got = run(operation, family, n, eps, *(x.to(device) for x in inputs))
    expected = plain.run(operation, family, n, eps, *inputs)
    for a, b in zip(*((y,) if isinstance(y, torch.Tensor) else y for y in (got, expected)), strict=True):
        assert a.dtype == b.dtype
        assert a.stride() == b.stride()
        assert same_bits(a.cpu(), b)


# ---- what they compute; test_formulas says how right the formulas are


# Every family and n takes a build of some ten seconds.
QUICK = [(EGEM, 1), (EGEM, 2), (SEGEM, 1), (SEGEM, 2), (DGEM, 2)]


@needs_compiler
@pytest.mark.parametrize(
    ("operation", "family", "n"),
    [
        pytest.param(
            op, family, n, marks=[] if (family, n) in QUICK else pytest.mark.slow, id=f"{op}-{family.name}-{n}"
        )
        for op, family in OPERATIONS
        for n in (1, 2, 3, 4, 7)
        if n <= 4 or op != "backward_at"
    ],
)
@dtypes
def test_every_bit_is_that_of_the_formulas(operation, family, n, dtype):
    x = numbers(dtype)
    others = [numbers(dtype) for _ in range(NUM_INPUTS[operation] - 1)]
    inputs = [*others, x] if operation.startswith("backward") else [x, *others]
    for eps in (1e-4, 1.0, 10.0):
        assert_same(operation, family, n, eps, *inputs)


@needs_compiler
@dtypes
def test_every_length(dtype):
    # Registers, rests of them, and shares of threads.
    for count in (*range(1, 70), cpu._PARALLEL - 1, cpu._PARALLEL, 3 * cpu._PARALLEL + 5):
        assert_same("forward", EGEM, 1, 0.1, torch.randn(count).to(dtype))
        assert_same("glu_backward", SEGEM, 1, 0.1, *torch.randn(3, count).to(dtype))


@pytest.mark.slow
@needs_compiler
def test_every_operation(monkeypatch):
    monkeypatch.setitem(TABLE, "spelled", SPELLED)
    x, grad = numbers(torch.float32), torch.randn(2**17)
    assert_same("forward", SPELLED, 1, 0.3, x)
    assert_same("backward", SPELLED, 1, 0.3, grad, x)


@needs_compiler
def test_several_threads():
    x, grad = torch.randn(2, 5 * cpu._PARALLEL + 3)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            assert_same("backward", EGEM, 1, 0.1, grad, x)
    finally:
        torch.set_num_threads(before)


# ---- how they come to be


@needs_compiler
def test_built_in_the_background_once_it_pays(fresh, monkeypatch):
    monkeypatch.setattr(cpu, "WORTH_BUILDING", 60)
    x = torch.randn(400)
    expected = plain.run("forward", EGEM, 2, 0.1, x)
    with warnings.catch_warnings(), hf_gem.kernels("auto"):
        warnings.simplefilter("error")
        for _ in range(2):
            assert torch.equal(egem(x, 2, 0.1), expected)
        assert not fresh.exists()
        deadline = time.monotonic() + 240
        while cpu.library("egem", 2)._functions is None:
            assert time.monotonic() < deadline
            assert torch.equal(egem(x, 2, 0.1), expected)
            time.sleep(0.1)
        assert torch.equal(egem(x, 2, 0.1), expected)
    assert {path.suffix for path in fresh.iterdir() if path.name != "inductor"} <= {".so", ".sha256", ".lock"}
    # The next process finds them.
    cpu.library.cache_clear()
    with hf_gem.kernels("auto"):
        egem(x, 2, 0.1)
    assert cpu.library("egem", 2)._functions is not None
    assert cpu.library("egem", 2)._process is None


def test_what_counts_towards_a_build(fresh, monkeypatch):
    monkeypatch.setattr(cpu, "WORTH_BUILDING", 1000)
    started = []
    monkeypatch.setattr(cpu.Library, "_start", lambda library: started.append(library.n))
    x = torch.randn(800, requires_grad=True)
    with hf_gem.kernels("auto"):
        for _ in range(19):
            egem(x, 2)
        assert not started
        egem(x, 2)
        assert started == [2]
        egem(x, 3).sum().backward()
        assert started == [2]
        egem(x, 3).sum().backward()
        assert started == [2, 3]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_fork_while_its_parent_builds(fresh, monkeypatch, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(cpu, "build", SimpleNamespace(__file__=str(script)))
    monkeypatch.setenv("CXX", sys.executable)  # anything that is there
    library = cpu.library("egem", 1)
    assert not library.ready(cpu.WORTH_BUILDING, wait=False)
    parents = library._process
    child = os.fork()
    if child == 0:
        try:
            library._start = lambda: None  # type: ignore[method-assign]
            right = not library.ready(1, wait=False) and not library._failed and library._process is None
            os._exit(0 if right else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert not library.ready(1, wait=False)
    assert library._process is parents
    parents.kill()
    parents.wait()


@needs_compiler
def test_processes_that_start_at_once(fresh):
    target = fresh / "cpu.so"
    command = [sys.executable, build.__file__, str(target), "240"]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        process.stdin.write(cpp_source(EGEM, 1))
        process.stdin.close()
    assert [process.wait(timeout=240) for process in processes] == [0, 0, 0]
    assert {path.name for path in fresh.iterdir()} <= {"cpu.so", "cpu.so.sha256", "cpu.so.lock", "inductor"}
    assert is_intact(target)


def fails(match):
    """A call that cannot have kernels computes the same, and says so once."""
    x = torch.randn(50)
    with hf_gem.kernels("compiled"):
        with pytest.warns(UserWarning, match=match) as caught:
            first = egem(x, 3, 0.1)
        assert len(caught) == 1
        assert "HF_GEM_KERNELS=eager" in str(caught[0].message)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            second = egem(x, 3, 0.1)
    assert torch.equal(first, plain.run("forward", EGEM, 3, 0.1, x))
    assert torch.equal(second, first)


def test_no_compiler(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    monkeypatch.delenv("CXX", raising=False)
    fails("no C\\+\\+ compiler")


@pytest.mark.skipif(os.name == "nt", reason="needs a shell script for a compiler")
def test_a_compiler_that_fails(fresh, monkeypatch, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\necho no licence today >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    fails("building the kernels failed")


def test_a_cache_that_cannot_be_written(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HF_GEM_CACHE", str(tmp_path / "file" / "folder"))
    monkeypatch.setenv("CXX", sys.executable)  # anything that is there
    fails("Set HF_GEM_CACHE")


def test_a_cache_that_cannot_be_looked_at(fresh, monkeypatch):
    exists = Path.exists

    def forbidden(path, **options):
        if path.suffix == ".so":
            raise PermissionError(13, "Permission denied", str(path))
        return exists(path, **options)

    monkeypatch.setattr(Path, "exists", forbidden)
    fails("Permission denied.*Set HF_GEM_CACHE")


def test_a_user_without_a_home(fresh, monkeypatch):
    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.delenv("HF_GEM_CACHE")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pytest.importorskip("pwd"), "getpwuid", unknown)
    fails("home directory.*Set HF_GEM_CACHE")


@needs_compiler
def test_a_cache_that_can_only_be_read(monkeypatch):
    assert cpu.Library(EGEM, 1).ready(0, wait=True)

    def read_only(path, **options):
        raise OSError(30, "Read-only file system", str(path))

    monkeypatch.setattr(Path, "unlink", read_only)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cpu.Library(EGEM, 1).ready(0, wait=False)


def test_a_build_whose_exit_status_is_lost(fresh, monkeypatch, tmp_path):
    # Python then takes it for 0.
    script = tmp_path / "fails.py"
    script.write_text("print('no licence today')")
    monkeypatch.setattr(cpu, "build", SimpleNamespace(__file__=str(script)))
    monkeypatch.setenv("CXX", sys.executable)  # anything that is there
    fails("building the kernels failed: no licence today")
    script.write_text("print('a.cpp:3:1: error: no such type\\n    3 | x\\n      | ^')")
    cpu.library.cache_clear()
    fails("building the kernels failed: a.cpp:3:1: error: no such type ")


def test_a_cache_folder_that_the_command_of_the_compiler_cannot_have(fresh, monkeypatch):
    monkeypatch.setenv("HF_GEM_CACHE", f"{fresh} of Jane's")
    monkeypatch.setenv("CXX", sys.executable)
    fails("cuts the compiler's command at spaces and quotes, and the cache folder is .* Set HF_GEM_CACHE")


def test_a_program_that_contains_python(fresh, monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)
    monkeypatch.setattr(cpu.sys, "executable", None)
    fails("sys.executable, the Python that would build them, is not set")


def test_a_library_that_cannot_be_loaded(fresh):
    path = cpu.library("egem", 3).path
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not a library")
    seal_of(path).write_text(seal(path))
    fails("cannot be loaded")


def test_a_library_that_lacks_a_kernel(fresh):
    path = cpu.library("egem", 3).path
    path.parent.mkdir(parents=True)
    shutil.copyfile(_ctypes.__file__, path)  # a library that can be loaded, whatever it is for
    seal_of(path).write_text(seal(path))
    fails("cannot be loaded.*forward_float32")


def test_another_compiler_or_torch_gets_another_library(fresh, monkeypatch):
    first = cpu.library("egem", 1).path
    cpu._fingerprint.cache_clear()
    monkeypatch.setattr(torch, "__version__", "0.0")
    second = cpu.library("egem", 1).path
    cpu._fingerprint.cache_clear()
    assert first != second
    assert first != cpu.library("egem", 2).path
