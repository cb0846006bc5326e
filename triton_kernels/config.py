"""Which tile and how many programs a launch gets: a table, no autotuning.

A tile decides the last bits of a row, so it depends on V and the dtype alone; threads, registers
and the number of programs may depend on anything. docs/triton.md has what they were measured at.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

VECTOR_BYTES = 16  # the widest access of a thread
LARGEST_V = 2**31 - 2**17  # columns are int32, and loops look a segment ahead
LARGEST_PIECES = 2**30  # of all rows: int32, and loops look as many ahead as there are programs


@dataclass(frozen=True)
class Tile:
    """How a program walks over a row.

    Attributes:
        block: columns at a time; 16 or 32 bytes a thread.
        segment: columns that are summed before the lanes are added up; at least two blocks.
        threads: of a program.
        registers: most of a thread, where the compiler can be told. More programs at once have more
            loads in flight; fewer registers than these would spill.
        more_registers: likewise with an entropy, or where accesses are narrow.
    """

    block: int
    segment: int
    threads: int
    registers: int
    more_registers: int


# (largest V, tile), by the size of an element in bytes.
TABLE: dict[int, tuple[tuple[int, Tile], ...]] = {
    2: (
        (2048, Tile(1024, 8192, threads=64, registers=96, more_registers=168)),
        (LARGEST_V, Tile(2048, 16384, threads=256, registers=64, more_registers=128)),
    ),
    4: (
        (2048, Tile(512, 4096, threads=64, registers=96, more_registers=128)),
        (LARGEST_V, Tile(2048, 16384, threads=256, registers=80, more_registers=128)),
    ),
}


@dataclass(frozen=True)
class Device:
    """What of a GPU matters to a launch. The defaults are NVIDIA's from sm_80 on."""

    multiprocessors: int
    warp_size: int = 32
    registers: int = 65536  # of a multiprocessor
    limits_registers: bool = True  # the compiler takes a limit

    def programs(self, tile: Tile, register_limit: int) -> int:
        """How many the registers of all multiprocessors hold at once.

        Also where their rows do not fit the L2 cache together: fewer were slower in proportion.
        """
        return self.multiprocessors * (self.registers // (tile.threads * register_limit))


def tile(n_cols: int, itemsize: int) -> Tile:
    """The tile for rows of n_cols elements.

    Raises:
        ValueError: more than LARGEST_V.
    """
    if n_cols > LARGEST_V:
        raise ValueError(f"backend='triton' takes at most {LARGEST_V} columns, got {n_cols}")
    return next(tile for largest, tile in TABLE[itemsize] if n_cols <= largest)


def check_rows(n_rows: int, pieces: int) -> None:
    """Raises ValueError: more pieces of rows than can be counted."""
    if n_rows * pieces > LARGEST_PIECES:
        raise ValueError(
            f"backend='triton' takes at most {LARGEST_PIECES // pieces} rows as long as these, "
            f"got {n_rows}"
        )


def narrow(tile: Tile) -> Tile:
    """The same for accesses of one element: more threads with fewer columns each, since a thread
    keeps the place of each where they are no neighbours."""
    return replace(tile, threads=2 * tile.threads)


def register_limit(tile: Tile, with_entropy: bool, narrow: bool) -> int:
    """Registers of a thread."""
    return tile.more_registers if with_entropy or narrow else tile.registers


def split_rows(device: Device, tile: Tile, n_rows: int, n_cols: int) -> bool:
    """Whether rows are so few that several programs should share each."""
    return n_cols > tile.segment and 2 * n_rows <= device.multiprocessors
