"""The C++ kernels under AddressSanitizer with UndefinedBehaviorSanitizer, and under ThreadSanitizer."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.utils.cpp_extension import include_paths

from hf_gem._kernels.printer import cpp_source
from hf_gem.family.egem import EGEM
from hf_gem.family.segem import SEGEM
from tests.family.dgem import DGEM

GXX = shutil.which("g++")
SETARCH = shutil.which("setarch")  # ThreadSanitizer needs memory where it expects it
pytestmark = [pytest.mark.slow, pytest.mark.skipif(GXX is None, reason="needs g++ and its sanitizers")]

VECTORS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-DCPU_CAPABILITY_AVX512"],
    "AVX2": ["-mavx2", "-mfma", "-mf16c", "-DCPU_CAPABILITY_AVX2"],
}
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
LIBRARIES = Path(torch.__file__).parent / "lib"


def compile_and_run(folder, family, n, sanitizer, *flags):
    """Builds the driver with a sanitizer, and returns what running it says.

    Masked loads and stores of vector instructions are not seen by AddressSanitizer: it gets the arrays that stand for
    registers where there are none.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    vectors = [] if sanitizer == "address" else VECTORS.get(capability, [])
    (folder / "kernels.inc").write_text(cpp_source(family, n))
    program = folder / "sanitized"
    command = [
        *(GXX, "-std=c++20", "-O1", "-g1", "-fopenmp", "-ffp-contract=off", "-DC10_USING_CUSTOM_GENERATED_MACROS"),
        *(f"-fsanitize={SANITIZERS[sanitizer]}", "-fno-sanitize-recover=all", "-Wno-psabi", *vectors, *flags),
        *(f"-I{path}" for path in (folder, *include_paths())),
        *("-c", str(Path(__file__).with_name("sanitized.cpp")), "-o", f"{program}.o"),
    ]
    subprocess.run(command, check=True, timeout=280)
    link = [GXX, f"-fsanitize={SANITIZERS[sanitizer]}", f"{program}.o", "-o", str(program), "-pthread"]  # no libgomp
    link += [f"-L{LIBRARIES}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{LIBRARIES}"]
    linked = subprocess.run(link, capture_output=True, text=True, check=False)
    if linked.returncode != 0 and f"lib{sanitizer[0]}san" in linked.stderr:
        pytest.skip(f"g++ has no {sanitizer} sanitizer here")
    assert linked.returncode == 0, linked.stderr
    start = [SETARCH, platform.machine(), "-R"] if SETARCH else []
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [*start, str(program)], capture_output=True, text=True, check=False, env=environment, timeout=280
    )


@pytest.mark.parametrize("sanitizer", SANITIZERS)
@pytest.mark.parametrize(("family", "n"), [(EGEM, 1), (EGEM, 3), (SEGEM, 2), (DGEM, 2)])
def test_nothing_is_found(tmp_path, sanitizer, family, n):
    """Lengths of all kinds, memory that is not aligned, several threads, several callers."""
    done = compile_and_run(tmp_path, family, n, sanitizer)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "nothing found\n"


@pytest.mark.parametrize(("sanitizer", "found"), [("address", "heap-buffer-overflow"), ("thread", "data race")])
def test_what_is_wrong_is_found(tmp_path, sanitizer, found):
    done = compile_and_run(tmp_path, EGEM, 1, sanitizer, "-DBREAK_IT")
    assert done.returncode != 0
    assert found in done.stderr
