"""The chips that kernels are compiled for: Triton's names for them, and what the compiler does not check."""

import re
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class MatrixInstruction:
    """A matrix instruction, and the fewest rows that a `tl.dot` must have for it."""

    name: str
    min_rows: int = 1


@dataclass(frozen=True)
class Chip:
    """A compilation target."""

    name: str
    """as people write it, such as sm_90."""
    backend: str
    architecture: int | str
    warp_size: int
    """as `triton.backends.compiler.GPUTarget` takes them."""
    shared_bytes: int
    """shared memory that one program can have."""
    matrix_instructions: tuple[MatrixInstruction, ...]
    """those for operands of `MULTIPLIED`, from the one for most rows to the one for any."""
    tile_copy: str = ""
    """the instruction that copies a tile as a descriptor says; empty if it has none, and descriptors become pointers."""

    def matrix_instruction(self, rows: int) -> str:
        """The name of the instruction that a `tl.dot` of such operands with so many rows should become."""
        return next(known.name for known in self.matrix_instructions if rows >= known.min_rows)


# wgmma multiplies 64 rows per warp group and tcgen05.mma 64 or 128; smaller dots rightly become mma.sync.
_MMA_SYNC = MatrixInstruction("mma.sync")
_TMA = "cp.async.bulk.tensor"

# Shared memory per block: CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability"
# (less the 1 KiB that the system keeps); gfx942: AMD CDNA 3 ISA guide, 64 KiB of LDS.
MULTIPLIED = ("f16", "bf16", "f8E4M3FN")  # what matrix units multiply, by the names of TTIR
CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("sm_80", "cuda", 80, 32, 166912, (_MMA_SYNC,)),
        Chip("sm_90", "cuda", 90, 32, 232448, (MatrixInstruction("wgmma.mma_async", 64), _MMA_SYNC), _TMA),
        Chip("sm_100", "cuda", 100, 32, 232448, (MatrixInstruction("tcgen05.mma", 64), _MMA_SYNC), _TMA),
        Chip("gfx942", "hip", "gfx942", 64, 65536, (MatrixInstruction("v_mfma"),)),
    )
}


class Dot(NamedTuple):
    """The left operand of a `tl.dot`."""

    rows: int
    dtype: str


_DOT = re.compile(r"tt\.dot .*: tensor<(?:\d+x)?(\d+)x\d+x(\w+)> \* tensor<")


def dots(ttir: str) -> list[Dot]:
    """The dots in a kernel's TTIR, the text of Triton's representation before layouts are chosen."""
    return [Dot(int(rows), dtype) for rows, dtype in _DOT.findall(ttir)]
