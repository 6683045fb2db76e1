"""Counts the instructions of the Triton kernels, without a GPU: python -m benchmarks.instructions

Triton compiles for any card on any machine. Counts the instructions per element of a program with a full block. They
limit the share of a copy's speed that a kernel can reach: the time to read and write its tensors as fast as a copy
does, divided by the time to issue its instructions if that is longer.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "0"  # before the kernels are imported

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from hf_gem._kernels import gpu
from hf_gem._kernels.cpu import NUM_TENSORS
from hf_gem.family.table import family_named
from hf_gem.files import markdown_table, replace_between, write_atomically

TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)}
TARGETS.update({arch: GPUTarget("hip", arch, 64) for arch in ("gfx90a", "gfx942")})
DTYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
README = Path(__file__).with_name("README.md")


@dataclass(frozen=True)
class Card:
    """A GPU, with the numbers that its vendor publishes.

    Attributes:
        target: Its compilation target, a key of TARGETS.
        lanes: Number of units times float32 lanes per unit: thread instructions that can start in one clock cycle.
        clock: Boost clock in GHz.
        copy: TB/s that a copy reads and writes, 90 % of the peak.
    """

    target: str
    lanes: int
    clock: float
    copy: float

    def share(self, instructions: float, num_bytes: int) -> float:
        """Computes the share of a copy's speed that a kernel reaches, from its instructions and bytes per element."""
        return min(1.0, num_bytes / (self.copy * 1e12) / (instructions / (self.lanes * self.clock * 1e9)))


CARDS = {
    "A100": Card("sm_80", 108 * 64, 1.41, 0.9 * 2.04),
    "H100": Card("sm_90", 132 * 128, 1.83, 0.9 * 3.35),
    "B200": Card("sm_100", 148 * 128, 1.85, 0.9 * 8.0),
    "MI300X": Card("gfx942", 304 * 64, 2.1, 0.9 * 5.3),
}


@dataclass(frozen=True)
class Compiled:
    """The machine code of one kernel.

    Attributes:
        target: Name of the target in TARGETS.
        operation: Operation of `hf_gem._kernels.run`.
        family: Name of the family.
        n: The paper's N.
        dtype: Dtype of the tensors.
        instructions: Instructions per element, in a full block. Those that follow the branch of a division that is
            rounded correctly are not counted, so float32 has more.
        wide: Number of loads and stores of 16 bytes there.
        narrow: Number of other loads and stores of global memory there.
        registers: Registers per thread; vector registers on AMD.
        spilled: Bytes (on AMD, registers) that were spilled to memory because there are too few registers.
    """

    target: str
    operation: str
    family: str
    n: int
    dtype: str
    instructions: float
    wide: int
    narrow: int
    registers: int
    spilled: int


def compiled(target: str, operation: str, family: str, n: int, dtype: str) -> Compiled:
    """Compiles one kernel and reads the machine code."""
    of = getattr(torch, dtype)
    exact, constants = gpu.is_exact(operation, of), gpu.constants(operation, of)
    kernel = gpu.kernels(family, n, exact)[operation]
    types = {"numel": "i64", **dict.fromkeys(constants, "constexpr")}
    names = kernel.arg_names
    source = ASTSource(
        kernel,
        {name: DTYPES[dtype] if name.endswith("_ptr") else types.get(name, "fp32") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(i,): [["tt.divisibility", gpu.ALIGNMENT]] for i, name in enumerate(names) if name.endswith("_ptr")},
    )
    made = triton.compile(source, target=TARGETS[target], options=gpu.options(exact))
    read = _nvidia if TARGETS[target].backend == "cuda" else _amd
    blocks, wide, registers, spilled = read(made.asm)
    # The first block checks whether there is work for all lanes. That work uses wide loads and stores.
    path = [*blocks[0], *(line for block in blocks[1:] if any(wide in line for line in block) for line in block)]
    threads = gpu.NUM_WARPS * TARGETS[target].warp_size
    memory = [line for line in path if re.search(r"\b(LDG|STG|(global|buffer)_(load|store))", line)]
    num_wide = sum(wide in line for line in memory)
    instructions = len(path) * threads / constants["BLOCK"]
    return Compiled(
        *(target, operation, family, n, dtype),
        *(round(instructions, 1), num_wide, len(memory) - num_wide, registers, spilled),
    )


def _nvidia(asm: Any) -> tuple[list[list[str]], str, int, int]:
    """Returns blocks of instructions, the mark of a wide one, the number of registers, and what was spilled."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        code, usage = (
            subprocess.run([tools / tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flag in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    lines = [line for line in code.splitlines() if re.match(r"\s+/\*[0-9a-f]+\*/\s|\.L", line) and " NOP" not in line]
    registers, stack, local = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK", "LOCAL"))
    return _blocks(lines, r"\b(EXIT|BRA)\b|^\.L"), ".128", registers, stack + local


def _amd(asm: Any) -> tuple[list[list[str]], str, int, int]:
    code, _, data = asm["amdgcn"].partition("s_endpgm\n.Lfunc_end")[0], None, asm["amdgcn"]
    lines = [line for line in code.splitlines() if re.match(r"\t[sv]_|\tglobal_|\tbuffer_|\.LBB", line)]
    registers, *spilled = (
        int(re.findall(rf"\.{name}:\s+(\d+)", data)[-1])
        for name in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    )
    return _blocks(lines, r"s_c?branch|s_endpgm|^\.LBB"), "dwordx4", registers, sum(spilled)


def _blocks(lines: Sequence[str], end: str) -> list[list[str]]:
    blocks: list[list[str]] = [[]]
    for line in lines:
        blocks[-1].append(line)
        if re.search(end, line):
            blocks.append([])
    return [[line for line in block if not line.startswith(".")] for block in blocks if block]


def all_kernels(targets: Sequence[str], dtypes: Sequence[str], orders: Sequence[int]) -> Iterator[Compiled]:
    for target in targets:
        for family in ("egem", "segem"):
            for operation in NUM_TENSORS:
                if operation == "backward_at" and family_named(family).slope_at is None:
                    continue
                for n in orders:
                    for dtype in dtypes:
                        yield compiled(target, operation, family, n, dtype)


def table(found: Sequence[Compiled]) -> str:
    """Makes a table of the instructions of each kernel in bfloat16, and of the share of a copy's speed it can reach."""
    rows = []
    for kernel in found:
        if kernel.target == "sm_90" and kernel.dtype == "bfloat16":
            same = {k.target: k for k in found if (k.operation, k.family, k.n, k.dtype) == _key(kernel)}
            num_bytes = 2 * NUM_TENSORS[kernel.operation]
            rows.append(
                [f"{kernel.family}, n = {kernel.n}", kernel.operation]
                + [f"{same[target].instructions:.1f}" for target in ("sm_80", "sm_90", "sm_100", "gfx942")]
                + [f"{card.share(same[card.target].instructions, num_bytes):.0%}" for card in CARDS.values()]
            )
    return markdown_table(["", "operation", "sm_80", "sm_90", "sm_100", "gfx942", *CARDS], rows)


def _key(kernel: Compiled) -> tuple[str, str, int, str]:
    return kernel.operation, kernel.family, kernel.n, kernel.dtype


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="by default all")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES), help="by default all")
    parser.add_argument("--n", nargs="+", type=int, default=[1, 2, 3], help="by default 1 2 3")
    parser.add_argument("--json", action="store_true", help="print all results as JSON, and write no table")
    arguments = parser.parse_args(argv)
    found = list(all_kernels(arguments.targets, arguments.dtypes, arguments.n))
    if arguments.json:
        json.dump([asdict(kernel) for kernel in found], sys.stdout)
        return
    content = f"\n{table(found)}\n\nTriton {triton.__version__}.\n"
    text = README.read_text(encoding="utf-8")
    write_atomically(README, replace_between(text, "<!-- instructions -->\n", "<!-- end of instructions -->", content))
    print(content)


if __name__ == "__main__":
    main()
