"""The Triton kernels compiled as a launch would compile them, without a GPU: registers, spills,
widths of accesses, and how often they are compiled.

Interpreting and compiling exclude each other in a process; see test_triton_interpreted.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import SUPPORT
from triton_tools.offline import Launch, fake, offline, warp_size

import cfpo_kernels.backends.triton as backend
from cfpo_kernels import CFPO, PPOClip
from cfpo_kernels.backends.base import KernelRows, KernelTerms
from cfpo_kernels.inputs import LossSettings, TokenInputs
from cfpo_kernels.triton_kernels import config, kernels
from cfpo_kernels.verification import battery, calls, cases, timing

ARCHS = (
    *("sm_80", "sm_90", "sm_100", "gfx942"),
    *(
        pytest.param(arch, marks=pytest.mark.nightly)
        for arch in ("sm_86", "sm_89", "sm_120", "gfx90a", "gfx950", "gfx1100")
    ),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Bytes of a thread's local memory, in which numbers wait that a row needs between its loops; with
# any Triton from 3.6 to 3.9.
STACK = {"sm_80": 32, "sm_90": 0, "sm_100": 8}
OBJECTIVES = {"cfpo": CFPO(), "ppo_clip": PPOClip(0.2, 0.28, 3.0)}

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") != "0", reason="TRITON_INTERPRET is set"
)


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Meta tensors stand for those of a GPU of that architecture."""

    def pretend(arch: str) -> None:
        amd = arch.startswith("gfx")
        device = config.Device(
            multiprocessors=304 if amd else 132,
            warp_size=warp_size(arch),
            limits_registers=not amd,
        )
        monkeypatch.setattr(backend, "_device", lambda _: device)
        monkeypatch.setattr(backend, "_on", lambda _: contextlib.nullcontext())

    yield pretend


def per_row(n: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return fake((n,), dtype)


def rows(logits: torch.Tensor, temperatures: int = 1) -> KernelRows:
    n = logits.shape[:-1].numel()
    return KernelRows(logits, per_row(n, torch.int64), per_row(n), per_row(temperatures))


def launch_policy(
    logits: torch.Tensor,
    objective: str = "cfpo",
    everything: bool = False,
    dlogits: torch.Tensor | None = None,
    gradient: bool = True,
) -> None:
    n = logits.shape[:-1].numel()
    given = per_row(n) if everything else None
    terms = KernelTerms(
        TokenInputs(per_row(n), per_row(n), given, given, given, given),
        LossSettings(
            OBJECTIVES[objective].shape(),
            kl_coef=0.1 if everything else 0.0,
            kl_ratio_weighted=everything,
            entropy_coef=0.01 if everything else 0.0,
        ),
        fake((), torch.float32) if everything else None,
    )
    backend.TRITON.policy_loss(
        rows(logits, n if everything else 1),
        terms,
        loss=per_row(n),
        logps=per_row(n),
        entropy=given,
        dlogits=(logits if dlogits is None else dlogits) if gradient else None,
    )


def launch_logps(logits: torch.Tensor, entropy: bool) -> None:
    n = logits.shape[:-1].numel()
    given = per_row(n) if entropy else None
    lse = fake((n, 2), torch.float64)
    backend.TRITON.token_logps(
        rows(logits), logps=per_row(n, torch.float64), lse=lse, entropy=given
    )
    backend.TRITON.token_logps_backward(
        rows(logits), lse=lse, entropy=given, dlogps=per_row(n), dentropy=given, dlogits=logits
    )


def hot(launch: Launch, kind: str) -> list[int]:
    """Bytes of the accesses that move the rows: on NVIDIA those with an eviction hint."""
    accesses = launch.streaming(kind)
    if launch.arch.startswith("sm_"):
        hint = (".EL", ".EF")
        accesses = [access for access in accesses if any(h in access.text for h in hint)]
    return [access.bytes for access in accesses]


def check_code(launches: Sequence[Launch], itemsize: int, v: int) -> None:
    """No spills, the registers of the table, 128-bit accesses where the rows stream by."""
    assert launches
    tile = config.tile(v, itemsize)
    for launch in launches:
        nvidia = launch.arch.startswith("sm_")
        # Otherwise one thread could overwrite in place what another has not read yet.
        assert "convert_layout" not in launch.asm["ttgir"], launch.summary()
        # AMD parks scalar registers in vector registers: no memory, so no harm.
        assert launch.code.stack == 0 and (launch.spills == 0 or not nvidia), launch.summary()
        assert launch.shared <= 1024, launch.summary()
        if nvidia:
            weighted = launch.arguments.get("WITH_ENTROPY") or (
                launch.arguments.get("dentropy_ptr") is not None
            )
            limit = config.register_limit(tile, weighted, narrow=False)
            assert launch.registers <= limit, launch.summary()
        # The ends of a row are narrow where its address is odd; what lies between is not. AMD's
        # assembly does not tell the two apart.
        if nvidia or v * itemsize % 16 == 0:
            kinds = ["load"]
            if launch.arguments.get("dlogits_ptr") is not None:
                kinds.append("store")
            for kind in kinds:
                assert hot(launch, kind) and set(hot(launch, kind)) == {16}, launch.summary()


@pytest.mark.parametrize("v", [128256, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arch", ARCHS)
def test_fused_kernel(arch: str, dtype: torch.dtype, v: int, on: Callable[[str], None]) -> None:
    on(arch)
    with offline(arch) as launches:
        launch_policy(fake((8192, v), dtype), "cfpo")
        launch_policy(fake((8192, v), dtype), "ppo_clip", everything=True)
    check_code(launches, dtype.itemsize, v)


@pytest.mark.parametrize(
    "dtype, v",
    [
        *((torch.bfloat16, v) for v in (1000, 50257)),
        (torch.float16, 128256),
        (torch.float32, 50257),
    ],
    ids=str,
)
def test_turing(dtype: torch.dtype, v: int, on: Callable[[str], None]) -> None:
    """sm_75 has no bfloat16: integer instructions convert it, and all arithmetic is float32."""
    on("sm_75")
    with offline("sm_75") as launches:
        launch_policy(fake((8192, v), dtype), "ppo_clip", everything=True)
        launch_logps(fake((8192, v), dtype), entropy=False)
    check_code(launches, dtype.itemsize, v)
    for launch in launches:
        assert ".target sm_75" in launch.asm["ptx"] and "bf16" not in launch.asm["ptx"]


@pytest.mark.parametrize("v", [1000, 1001, 16000, 16001, 128256])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_every_kernel_and_tile(dtype: torch.dtype, v: int, on: Callable[[str], None]) -> None:
    on("sm_90")
    with offline("sm_90") as launches:
        logits = fake((8192, v), dtype)
        launch_policy(logits, "cfpo", everything=True)
        launch_policy(logits, gradient=False)
        launch_logps(logits, entropy=True)
        launch_policy(fake((16, v), dtype), everything=True)  # few rows: two kernels if long
    check_code(launches, dtype.itemsize, v)


@pytest.mark.parametrize(
    "defect, match",
    [({"maxnreg": 32}, "spills"), ({"UNIT": 1, "COLUMN_UNIT": 1}, "load")],
    ids=["spills", "narrow"],
)
def test_the_check_can_fail(
    defect: dict[str, int], match: str, on: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    on("sm_90")
    constants = backend._Launch.constants
    monkeypatch.setattr(backend._Launch, "constants", lambda self: constants(self) | defect)
    with offline("sm_90") as launches:
        launch_policy(fake((8192, 128256), torch.bfloat16))
    with pytest.raises(AssertionError):
        check_code(launches, 2, 128256)
    (launch,) = launches
    if match == "spills":
        assert launch.spills and launch.code.spill_depth > 1  # in the loops over columns
    else:
        assert set(hot(launch, "load")) != {16}


@pytest.mark.parametrize(
    "arch", ["sm_90", *(pytest.param(x, marks=pytest.mark.nightly) for x in ("sm_80", "sm_100"))]
)
def test_unrolled(arch: str, on: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Several steps at a time; what spills of long rows spills outside of the loops over them."""
    on(arch)
    with offline(arch) as launches:
        for dtype in (torch.bfloat16, torch.float32):
            for v in (50257, 128256):
                for unroll in (1, 2):
                    monkeypatch.setattr(backend.TRITON, "unroll", unroll)
                    launch_policy(fake((8192, v), dtype))
    for plain, unrolled in zip(launches[::2], launches[1::2], strict=True):
        assert unrolled.code.stack <= 32 and unrolled.code.spill_depth <= 1, unrolled.summary()
        for kind in ("load", "store"):
            assert set(hot(unrolled, kind)) == {16}, unrolled.summary()
            assert len(hot(unrolled, kind)) > len(hot(plain, kind)), unrolled.summary()


def test_rows_that_start_differently(on: Callable[[str], None]) -> None:
    """Of logits and gradient: narrow accesses, more threads, but no spills."""
    on("sm_90")
    with offline("sm_90") as launches:
        v = 50257
        sliced = fake((16, 512, v), torch.bfloat16, strides=(513 * v, v, 1))
        launch_policy(sliced, dlogits=fake((16, 512, v), torch.bfloat16))
        for everything in (False, True):
            launch_policy(
                fake((8192, 1001), torch.bfloat16),
                dlogits=fake((8192, 1001), torch.bfloat16, offset=3),
                everything=everything,
            )
    for launch in launches:
        assert launch.spills == 0 and launch.registers <= 168, launch.summary()
        assert set(hot(launch, "store")) == {2}
    assert [launch.num_warps for launch in launches] == [16, 4, 4]


def test_vocabularies_of_whole_vectors_share_their_kernels(on: Callable[[str], None]) -> None:
    """Nothing is compiled again for another N, T, V of the same kind, or other strides."""
    on("sm_90")
    with offline("sm_90") as launches:
        for shape in (
            (8192, 128256),
            (8191, 151936),
            (1000, 128264),
            (3, 500, 128008),
            (133, 1, 70000),
        ):
            launch_policy(fake(shape, torch.bfloat16))
            launch_logps(fake(shape, torch.bfloat16), entropy=False)
        step = 128256 + 8
        launch_policy(fake((4, 512, 128256), torch.bfloat16, strides=(513 * step, step, 1)))
    for kernel in (
        kernels.policy_loss_kernel,
        kernels.token_logps_kernel,
        kernels.token_logps_backward_kernel,
    ):
        assert launches.specialisations(kernel) == 1, kernel

    with offline("sm_90") as launches:
        for n, v in ((8192, 128257), (77, 128259), (500, 70001)):
            launch_policy(fake((n, v), torch.bfloat16))
        launch_policy(fake((500, 70001), torch.bfloat16, offset=3))  # from an odd address
    assert launches.specialisations(kernels.policy_loss_kernel) == 1

    with offline("sm_90") as launches:
        for n in (1, 2, 16, 33, 60):
            launch_policy(fake((n, 262144), torch.bfloat16))
    assert launches.specialisations(kernels.policy_loss_kernel) == 1
    assert launches.specialisations(kernels.sum_segments_kernel) == 1


def test_few_rows_fill_the_processors(on: Callable[[str], None]) -> None:
    on("sm_90")
    with offline("sm_90") as launches:
        launch_policy(fake((16, 262144), torch.bfloat16))
        launch_policy(fake((8192, 128256), torch.bfloat16))
        launch_policy(fake((8192, 32000), torch.bfloat16))
        launch_policy(fake((1000000, 1000), torch.bfloat16))
    split, gradient, long, medium, short = launches
    assert split.name == "sum_segments_kernel" and split.grid[0] == 256 == gradient.grid[0]
    # As many as the registers hold.
    assert [launch.grid[0] for launch in (long, medium, short)] == [4 * 132, 4 * 132, 10 * 132]


def test_table() -> None:
    """At most six tiles, each of them consistent."""
    tiles = [tile for of_size in config.TABLE.values() for _, tile in of_size]
    assert len(tiles) <= 6
    for itemsize, of_size in config.TABLE.items():
        assert [largest for largest, _ in of_size] == sorted(largest for largest, _ in of_size)
        for _, tile in of_size:
            assert tile.block * itemsize % (tile.threads * config.VECTOR_BYTES) == 0
            assert tile.segment % tile.block == 0 and tile.segment >= 2 * tile.block
            assert tile.block <= 2**13 and tile.segment <= 2**15  # softmax._FIXED
            assert tile.registers <= tile.more_registers <= 255
            assert tile.threads * tile.more_registers <= 65536


def test_more_rows_than_can_be_counted_are_refused() -> None:
    most = config.LARGEST_PIECES // 8
    config.check_rows(most, 8)
    with pytest.raises(ValueError, match=rf"at most {most} rows as long as these, got {most + 1}"):
        config.check_rows(most + 1, 8)


@pytest.mark.nightly
@pytest.mark.parametrize("version", ["3.6.0", "3.8.0", "3.9.0"])
def test_other_tritons(version: str, tmp_path: Path) -> None:
    """Each in a process of its own: nothing spills in a loop, and on sm_90 nothing at all."""
    target = tmp_path / "triton"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    if subprocess.run([*install, f"triton=={version}"], capture_output=True).returncode:
        pytest.skip(f"triton {version} cannot be installed here")
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (target, SUPPORT, here)))}
    environment.pop("TRITON_INTERPRET", None)
    for arch, stack in STACK.items():
        command = [sys.executable, "-m", "triton_tools.offline", arch]
        command.append("test_triton_compiled:sample")
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=here)
        assert done.returncode == 0, done.stderr[-3000:]
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert {launch["triton"] for launch in found} == {version}
        assert {x["kernel"] for x in found} >= {"policy_loss_kernel", "token_logps_kernel"}
        for launch in found:
            assert launch["stack"] <= stack, launch
            assert launch["spill_depth"] <= 1, launch  # in the loop over rows
            assert stack or not launch["spills"], launch


def sample() -> None:
    """What test_other_tritons compiles."""
    device: Any = config.Device(132)
    backend._device = lambda _: device
    backend._on = lambda _: contextlib.nullcontext()
    for v in (1000, 50257, 128256):
        for dtype in (torch.bfloat16, torch.float32):
            launch_policy(fake((8192, v), dtype))
            launch_policy(fake((8192, v), dtype), everything=True)
            launch_logps(fake((8192, v), dtype), entropy=False)


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(d, marks=pytest.mark.nightly) for d in DTYPES[::2])],
    ids=str,
)
def test_a_first_use_compiles_twenty_variants_at_most(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes seconds of the time that a user waits. Eight are those of softcaps."""
    device = config.Device(multiprocessors=132)
    monkeypatch.setattr(backend, "_device", lambda _: device)
    cpu = torch.device("cpu")
    target = battery.Target("triton", backend.TRITON, cpu, 132)
    with offline("sm_90") as launches:
        problem = None
        for case in cases.short():
            if problem != case.problem():
                problem = case.problem()
                inputs = cases.make_inputs(problem, dtype, cpu, target.rows_of(case, dtype))
            calls.call(backend.TRITON, case, inputs.laid_out(case.layout))
        for n_cols in timing.SIZES:
            case = cases.Case("timing", n_cols, inplace=True)
            inputs = cases.make_inputs(case, dtype, cpu, 70)
            calls.call(backend.TRITON, case, inputs)
        for check in battery._PROPERTIES.values():
            with contextlib.suppress(IndexError):  # nothing was computed
                list(check(target, dtype))
    variants = {(launch.name, id(launch.kernel)) for launch in launches}
    assert len(variants) <= 20, sorted(name for name, _ in variants)
    assert {name for name, _ in variants} == {
        "policy_loss_kernel", "sum_segments_kernel", "token_logps_kernel",
        "token_logps_backward_kernel", "multiply_rows_kernel",
    }  # fmt: skip
