"""More than 2^31 and 2^32 elements through the kernels in a few megabytes, which most of the addresses share."""

import ctypes
import mmap
import os

import pytest
import torch

from hf_gem._kernels import cpu, plain
from hf_gem.family.arithmetic import scale
from hf_gem.family.egem import EGEM
from tests.helpers import needs_compiler

pytestmark = [
    pytest.mark.slow,
    needs_compiler,
    pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs memfd_create, of Linux"),
]

DTYPE = torch.bfloat16
CHUNK = 2**20  # bytes
PER_CHUNK = CHUNK // DTYPE.itemsize
REST = 37
MAP_FIXED, MAP_NORESERVE, PROT_NONE = 0x10, 0x4000, 0


class Repeated:
    """An address range of `numel` elements in which each chunk is the same memory, but those from `own` on.

    Around it is nothing, so that a wrong offset is a crash.
    """

    def __init__(self, numel, own):
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.libc.mmap.restype = ctypes.c_void_p
        self.libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        self.libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        count = numel // PER_CHUNK + 1
        self.file = os.memfd_create("chunks")
        os.ftruncate(self.file, CHUNK * (1 + len(own)))
        self.size = (count + 2) * CHUNK
        self.start = self._map(None, self.size, PROT_NONE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        self.data = self.start + CHUNK
        place = {index // PER_CHUNK: k + 1 for k, index in enumerate(own)}
        for k in range(count):
            flags = mmap.MAP_SHARED | MAP_FIXED
            offset = CHUNK * place.get(k, 0)
            self._map(self.data + k * CHUNK, CHUNK, mmap.PROT_READ | mmap.PROT_WRITE, flags, self.file, offset)
        self.memory = mmap.mmap(self.file, CHUNK * (1 + len(own)))
        self.chunks = torch.frombuffer(self.memory, dtype=DTYPE).view(1 + len(own), PER_CHUNK)

    def _map(self, *arguments):
        address = self.libc.mmap(*arguments)
        if address == ctypes.c_void_p(-1).value:
            pytest.skip(f"cannot map so much: {os.strerror(ctypes.get_errno())}")
        return address

    def close(self):
        self.libc.munmap(self.start, self.size)
        os.close(self.file)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("edge", [2**31, 2**32])
def test_elements_past_what_32_bits_count(edge, threads):
    library = cpu.library("egem", 1)
    assert library.ready(0, wait=True)
    own = [edge // 2, edge - 1, edge]
    x, y = Repeated(edge + REST, own), Repeated(edge + REST, own)
    try:
        x.chunks.copy_(torch.randn(x.chunks.shape))
        y.chunks.fill_(-1.0)  # which no E-GEM is
        expected = plain.run("forward", EGEM, 1, 0.1, x.chunks)
        numbers = (ctypes.c_double * 2)(*scale(0.1, 1))
        library.function("forward", DTYPE)(edge + REST, threads, numbers, y.data, x.data)
        assert torch.equal(y.chunks[:3], expected[:3])
        assert torch.equal(y.chunks[3, :REST], expected[3, :REST])
        assert (y.chunks[3, REST:] == -1.0).all()
    finally:
        x.close()
        y.close()
