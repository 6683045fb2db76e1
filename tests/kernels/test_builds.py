"""Builds that are attacked, damaged, slow or hindered: the formulas go on, and a warning says why."""

import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hf_gem
from hf_gem import egem
from hf_gem._kernels import build, cpu, plain
from hf_gem._kernels.printer import cpp_source
from hf_gem._kernels.trust import is_intact, seal_of
from hf_gem.family.egem import EGEM
from tests.helpers import needs_compiler, run_python

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes, modes and signals of POSIX")

X = torch.linspace(-3, 3, 77)
RIGHT = plain.run("forward", EGEM, 1, 0.1, X)


def call(backend="compiled"):
    """A call whose result is right, whatever computes it."""
    with hf_gem.kernels(backend):
        assert torch.equal(egem(X, 1, 0.1), RIGHT)


def call_quietly(backend="compiled"):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(backend)


def loaded():
    return cpu.library("egem", 1)._functions is not None


def scripted(monkeypatch, folder, text):
    """Replaces the build by a script."""
    script = folder / "script.py"
    script.write_text(text)
    monkeypatch.setattr(cpu, "build", SimpleNamespace(__file__=str(script)))


def compiler(folder, text):
    """A shell script in place of a compiler."""
    path = folder / "g++"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def run_build(target, seconds, **env):
    """Runs the real build in a process of its own."""
    return subprocess.run(
        [sys.executable, build.__file__, str(target), str(seconds)],
        input=cpp_source(EGEM, 1),
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **env},
        timeout=240,
    )


# ---- others on the same machine


@needs_compiler
def test_nothing_is_loaded_from_a_folder_that_others_can_write_to(quick_build, monkeypatch):
    call_quietly()
    assert loaded()
    cpu.library("egem", 1).path.parent.chmod(0o777)
    cpu.library.cache_clear()
    monkeypatch.setattr(cpu.ctypes, "CDLL", None)
    with pytest.warns(UserWarning, match=r"others can write to .*mode 0777.* Set HF_GEM_CACHE to a folder that"):
        call()
    call_quietly()
    assert not loaded()


def test_nothing_is_built_in_a_folder_that_others_can_write_to(fresh):
    fresh.mkdir()
    fresh.chmod(0o777)
    with pytest.warns(UserWarning, match="others can write to"):
        call()
    assert list(fresh.iterdir()) == []


def test_the_log_follows_no_link(fresh, monkeypatch, tmp_path):
    victim = tmp_path / "thesis.txt"
    victim.write_text("three years of work")
    scripted(monkeypatch, tmp_path, "print('no licence today')")
    fresh.mkdir(mode=0o700)
    cpu.library("egem", 1).path.with_suffix(".log").symlink_to(victim)
    with pytest.warns(UserWarning, match="folder cannot be used"):
        call()
    assert victim.read_text() == "three years of work"


@needs_compiler
def test_all_files_of_a_build_are_in_its_folder(tmp_path):
    """Inductor's own folder has a name that others can guess and take, and it loads what it finds there.

    What a killed build has left does no harm, nor do flags for Inductor, here one that no compiler knows.
    """
    (tmp_path / "tmp").mkdir()
    elsewhere = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TMPDIR": str(tmp_path / "tmp")}
    elsewhere["TORCHINDUCTOR_CPP_ENABLE_FLOATING_POINT_CONTRACT_FLAG"] = "nonsense"
    target = tmp_path / "cache" / "kernels.so"
    work, probes = target.with_suffix(".build"), target.parent / "inductor" / "ab"
    for folder in (target.parent, work, probes.parent, probes):
        folder.mkdir(mode=0o700)
    half = (work / "half.so", probes / "half.so", target)  # the second would say that vector instructions do not work
    for file in half:
        file.write_bytes(b"\x7fELF")
    done = run_build(target, 240, **elsewhere)
    assert done.returncode == 0, done.stdout + done.stderr
    assert is_intact(target)
    assert not any(file.exists() for file in half[:2])
    assert not (tmp_path / "inductor").exists()
    assert list((tmp_path / "tmp").iterdir()) == []
    assert {path.name for path in target.parent.iterdir()} == {
        *("kernels.so", "kernels.so.sha256", "kernels.so.lock", "inductor")
    }
    for path in target.parent.rglob("*"):
        assert path.stat().st_mode & 0o022 == 0, path
    assert (target.parent.stat().st_mode & 0o777) == 0o700


def test_a_build_refuses_a_folder_that_others_can_write_to(tmp_path):
    tmp_path.chmod(0o777)
    done = run_build(tmp_path / "kernels.so", 240)
    assert done.returncode == 1
    assert "others can write to" in done.stderr
    assert list(tmp_path.iterdir()) == []


@needs_compiler
def test_a_relative_folder_of_a_program_that_changes_its_own(quick_build, fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_GEM_CACHE", os.path.relpath(fresh))
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "one")
    assert not cpu.library("egem", 1).ready(cpu.WORTH_BUILDING, wait=False)  # starts a build
    monkeypatch.chdir(tmp_path / "two")
    call_quietly()
    assert loaded()
    assert {path.parent for path in tmp_path.rglob("*.so")} == {fresh}
    assert len(quick_build.read_text().splitlines()) == 1


# ---- damage


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "empty", "no checksum", "writable"])
def test_a_damaged_library_is_built_again(quick_build, damage):
    """A truncated one would end the process with SIGBUS."""
    path = cpu.library("egem", 1).path
    call_quietly()
    whole = path.read_bytes()
    path.unlink()  # it is loaded: what others see may change, what is mapped may not
    path.write_bytes({"truncated": whole[: len(whole) // 2], "empty": b""}.get(damage, whole))
    path.chmod(0o777 if damage == "writable" else 0o700)
    if damage == "no checksum":
        seal_of(path).unlink()
    cpu.library.cache_clear()
    call_quietly()
    assert loaded()
    assert path.read_bytes() == whole
    assert is_intact(path)
    assert len(quick_build.read_text().splitlines()) == 2


@needs_compiler
@pytest.mark.slow
def test_a_full_disk(fresh):
    """Files end where the disk does."""
    script = """
import resource, sys, warnings
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
import torch, hf_gem
x = torch.linspace(-3, 3, 77)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    with hf_gem.kernels("compiled"):
        y = hf_gem.egem(x, 1, 0.1)
assert torch.equal(y, hf_gem._kernels.plain.run("forward", hf_gem.family.egem.EGEM, 1, 0.1, x))
print(*(str(w.message) for w in caught if "hf_gem" in str(w.message)), sep="\\n")
"""
    done = run_python("-c", script, HF_GEM_CACHE=str(fresh))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("building the kernels failed") == 1
    assert {path.suffix for path in fresh.iterdir() if path.name != "inductor"} == {".lock", ".log"}
    call_quietly()  # once there is room again
    assert loaded()


# ---- time


def test_a_build_that_takes_long(fresh, monkeypatch, tmp_path):
    scripted(monkeypatch, tmp_path, "import time; time.sleep(600)")
    monkeypatch.setattr(cpu, "PATIENCE", 0.2)
    with pytest.warns(UserWarning, match=r"still being built after 0\.2 seconds"):
        call()
    monkeypatch.setattr(cpu, "PATIENCE", 600.0)
    call_quietly()  # without waiting again
    process = cpu.library("egem", 1)._process
    assert process.poll() is None
    process.kill()
    process.wait()
    with pytest.warns(UserWarning, match="building the kernels failed: exit status -9"):
        call()
    call_quietly()


@needs_compiler
def test_a_build_that_ends_after_all(quick_build, monkeypatch):
    script = Path(cpu.build.__file__)
    gate = script.with_name("gate")
    script.write_text(
        f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.01)\n{script.read_text()}"
    )
    monkeypatch.setattr(cpu, "PATIENCE", 0.2)
    with pytest.warns(UserWarning, match="still being built"):
        call()
    gate.touch()
    cpu.library("egem", 1)._process.wait(timeout=240)
    call_quietly()
    assert loaded()


def test_a_build_ends_itself(tmp_path):
    """Whatever it hangs in: here in the import of torch, which takes more than a hundredth of a second."""
    done = run_build(tmp_path / "kernels.so", 0.01)
    assert done.returncode == -signal.SIGKILL
    assert "the compiler had not finished after 0.01 seconds" in done.stdout or "still holds" in done.stdout
    assert not (tmp_path / "kernels.so").exists()


def test_a_lock_that_is_held_elsewhere(tmp_path):
    filelock = pytest.importorskip("filelock")
    tmp_path.chmod(0o700)
    with filelock.FileLock(tmp_path / "kernels.so.lock"):
        done = run_build(tmp_path / "kernels.so", 1)
    assert done.returncode == -signal.SIGKILL
    assert f"after 1 seconds another process still holds {tmp_path / 'kernels.so.lock'}" in done.stdout


def test_a_build_takes_its_compiler_with_it(tmp_path):
    pid = tmp_path / "pid"
    cxx = compiler(tmp_path, f"echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 600")
    script = f"""
import os, runpy, subprocess, time
os.setsid()
subprocess.Popen([{cxx!r}])
while not os.path.exists({str(pid)!r}):
    time.sleep(0.01)
runpy.run_path({build.__file__!r})["_give_up"]("too long")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == "too long\n"
    deadline = time.monotonic() + 60
    while is_running(int(pid.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


# ---- signals, threads, forks


def test_an_interrupt_while_a_build_is_awaited(fresh, monkeypatch, tmp_path):
    scripted(monkeypatch, tmp_path, "import time; time.sleep(600)")
    timer = threading.Timer(0.5, os.kill, [os.getpid(), signal.SIGINT])
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # not what another test may have left
    try:
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            call()
    finally:
        timer.join()
        signal.signal(signal.SIGINT, before)
    assert cpu._lock.acquire(blocking=False)
    cpu._lock.release()
    process = cpu.library("egem", 1)._process
    assert process.poll() is None  # Ctrl-C is meant for the program
    call_quietly("auto")
    process.kill()
    with pytest.warns(UserWarning, match="building the kernels failed: exit status -9"):
        call()


@needs_compiler
@pytest.mark.parametrize("backend", ["compiled", "auto"])
def test_threads_that_call_while_kernels_are_built(quick_build, monkeypatch, backend):
    monkeypatch.setattr(cpu, "WORTH_BUILDING", 1000)
    start, errors = threading.Barrier(8), []

    def work():
        try:
            start.wait()
            while not loaded():
                assert torch.equal(egem(X, 1, 0.1), RIGHT)
            assert torch.equal(egem(X, 1, 0.1), RIGHT)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(8)]
    with warnings.catch_warnings(), hf_gem.kernels(backend):
        warnings.simplefilter("error")
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=240)
    assert errors == []
    assert not any(thread.is_alive() for thread in threads)
    assert len(quick_build.read_text().splitlines()) == 1


@needs_compiler
def test_a_fork_while_another_thread_looks(quick_build):
    """The thread that held the lock is not there in the child."""
    with cpu._lock:
        child = os.fork()
        if child == 0:
            try:
                signal.alarm(120)
                call()
                os._exit(0 if loaded() else 1)
            finally:
                os._exit(2)
    assert os.waitpid(child, 0)[1] == 0


class _Activated(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        x = torch.arange(40.0) - index
        return egem(x, 1, 0.1), torch.tensor(loaded()), torch.tensor(os.getpid())


@needs_compiler
@pytest.mark.parametrize("before", [False, True], ids=["workers build", "workers inherit"])
def test_workers_of_a_data_loader(quick_build, before):
    """Forked from a process that has the kernels, or that has none yet."""
    if before:
        call_quietly()
    with hf_gem.kernels("compiled"):
        loader = torch.utils.data.DataLoader(_Activated(), num_workers=2, multiprocessing_context="fork", timeout=240)
        for index, (y, has, pid) in enumerate(loader):
            x = torch.arange(40.0) - index
            assert torch.equal(y[0], plain.run("forward", EGEM, 1, 0.1, x))
            assert has.item()
            assert pid.item() != os.getpid()
    assert loaded() == before
    assert len(quick_build.read_text().splitlines()) in ((1,) if before else (1, 2))


@needs_compiler
@pytest.mark.slow
def test_processes_with_an_empty_cache(fresh):
    script = """
import torch, hf_gem
x = torch.linspace(-3, 3, 77)
with hf_gem.kernels("compiled"):
    y = hf_gem.egem(x, 1, 0.1)
assert hf_gem._kernels.cpu.library("egem", 1)._functions is not None
assert torch.equal(y, hf_gem._kernels.plain.run("forward", hf_gem.family.egem.EGEM, 1, 0.1, x))
"""
    environment = {**os.environ, "HF_GEM_CACHE": str(fresh)}
    command = [sys.executable, "-W", "error::UserWarning", "-c", script]
    processes = [subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) for _ in range(4)]
    for process in processes:
        _, errors = process.communicate(timeout=280)
        assert process.returncode == 0, errors
    assert len(list(fresh.glob("*.so"))) == 1


# ---- many calls


def resident():
    """Bytes of memory that this process holds."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(
    "backend", [pytest.param("eager", marks=pytest.mark.slow), pytest.param("compiled", marks=needs_compiler)]
)
def test_calls_of_every_shape(backend, monkeypatch):
    """100,000 calls with changing shapes and eps: memory stays flat, and nothing is built for a shape or an eps."""
    started = []
    start = cpu.Library._start
    monkeypatch.setattr(cpu.Library, "_start", lambda library: (started.append(library.n), start(library)))
    buffer = torch.randn(4096)

    def calls(numbers):
        for i in numbers:
            x = buffer[i % 64 : i % 64 + 1 + i % 257].view(-1, 1 if i % 2 else 1 + i % 257)
            egem(x, 1, 1e-4 + i * 1e-7)

    with hf_gem.kernels(backend):
        calls(range(20_000))
        before = resident()
        calls(range(20_000, 100_000))
        grown = resident() - before
    assert grown < 8 * 2**20  # a kilobyte for each call would be 80 MB
    assert started in ([], [1])
