"""Which tile and how many programs a launch gets: a table, no autotuning.

A tile decides the last bits of a row, so it depends on V and the dtype alone; the number of
programs may depend on anything. docs/triton.md has the expectations behind the numbers:
bytes in flight, registers, occupancy. None has been measured on a GPU yet.
"""

from __future__ import annotations

from dataclasses import dataclass

VECTOR_BYTES = 16  # the widest access of a thread
LARGEST_V = 2**31 - 2**17  # columns are int32, and loops look a segment ahead


@dataclass(frozen=True)
class Tile:
    """How a program walks over a row.

    Attributes:
        block: columns at a time; 16 or 32 bytes a thread.
        segment: columns that are summed before the lanes are added up; at least two blocks.
        threads: of a program.
        registers: most of a thread, where the compiler can be told. More programs at once have more
            loads in flight; fewer registers than these would spill.
    """

    block: int
    segment: int
    threads: int
    registers: int


# (largest V, tile), by the size of an element in bytes.
TABLE: dict[int, tuple[tuple[int, Tile], ...]] = {
    2: (
        (2048, Tile(block=1024, segment=8192, threads=128, registers=72)),
        (65536, Tile(block=4096, segment=32768, threads=512, registers=64)),
        (LARGEST_V, Tile(block=8192, segment=32768, threads=512, registers=128)),
    ),
    4: (
        (16384, Tile(block=512, segment=4096, threads=128, registers=88)),
        (LARGEST_V, Tile(block=4096, segment=32768, threads=512, registers=128)),
    ),
}


@dataclass(frozen=True)
class Device:
    """What of a GPU matters to a launch. The defaults are NVIDIA's from sm_80 on."""

    multiprocessors: int
    l2_bytes: int
    warp_size: int = 32
    registers: int = 65536  # of a multiprocessor
    limits_registers: bool = True  # the compiler takes a limit

    def programs(self, tile: Tile, register_limit: int) -> int:
        """How many the registers of all multiprocessors hold at once."""
        return self.multiprocessors * (self.registers // (tile.threads * register_limit))


# What of the L2 cache the rows between stage 1 and stage 3 may fill: what they write passes
# through it as well.
L2_SHARE = 0.6


def tile(n_cols: int, itemsize: int) -> Tile:
    """The tile for rows of n_cols elements.

    Raises:
        ValueError: more than LARGEST_V.
    """
    if n_cols > LARGEST_V:
        raise ValueError(f"backend='triton' takes at most {LARGEST_V} columns, got {n_cols}")
    return next(tile for largest, tile in TABLE[itemsize] if n_cols <= largest)


def register_limit(tile: Tile, with_entropy: bool, shifted: bool, narrow: bool) -> int:
    """Registers of a thread.

    Narrow accesses need more, as do sums for the entropy on rows whose ends are narrow. (Narrow
    blocks of 32 bytes a thread still spill a little.)
    """
    return 128 if narrow or (with_entropy and shifted) else tile.registers


def row_programs(
    device: Device, tile: Tile, register_limit: int, n_cols: int, itemsize: int
) -> int:
    """Programs that work on whole rows at once, so that their rows fit the L2 cache.

    At least one a multiprocessor, also where those rows do not fit: idle ones would cost more.
    """
    fit = int(L2_SHARE * device.l2_bytes) // (n_cols * itemsize)
    whole = fit // device.multiprocessors * device.multiprocessors
    return min(max(whole, device.multiprocessors), device.programs(tile, register_limit))


def split_rows(device: Device, tile: Tile, n_rows: int, n_cols: int) -> bool:
    """Whether rows are so few that several programs should share each."""
    return n_cols > tile.segment and 2 * n_rows <= device.multiprocessors
