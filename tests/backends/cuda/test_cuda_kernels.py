"""The CUDA kernels against float64: on the CPU, as source and as PTX, and on a GPU if there is one.

The source is built by g++: the code is the GPU's, down to the primitives; what runs it is not. Of
PTX, which an interpreter runs, that goes for the primitives too. Both find mistakes of arithmetic,
addressing and synchronisation, and say nothing about speed or the memory model: they make no kernel
count as verified on a GPU. docs/design.md, "What shows what", has it in a table.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import test_edges as edges
import test_loss
import test_token_logps
import torch
from emulation import A100, CXX, H100, ONE_SM, RTX4090, EmulatedBackend
from hypothesis import HealthCheck, given, settings
from on_device import OnDevice
from oracle import Case, Outcome, check, make_case, run, with_everything

import cfpo_kernels
from cfpo_kernels import CFPO, PPOClip, backends

pytestmark = pytest.mark.skipif(shutil.which(CXX) is None, reason="needs a C++ compiler")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LEVEL = ""  # of the CPU kernels, which do not run here
ON_GPU_TOO = True


class Target:
    """What runs the kernels: an emulated device of any size, or this machine's GPU."""

    def __init__(self, backend: Any, module: Any = None) -> None:
        self.backend, self.module = backend, module

    def set_device(self, sm_count: int, shared_per_block: int, shared_per_sm: int) -> None:
        if self.module is not None:
            self.module.set_device(sm_count, shared_per_block, shared_per_sm)

    def set_order(self, name: str) -> None:
        if self.module is not None:
            self.module.set_order(name)


@pytest.fixture(autouse=True)
def target(emulated_cuda: Any, monkeypatch: pytest.MonkeyPatch) -> Target:
    """Every call of backend="cpu" goes to the CUDA kernels."""
    if emulated_cuda is None:
        chosen = Target(OnDevice())
    else:
        chosen = Target(EmulatedBackend(emulated_cuda), emulated_cuda)
    chosen.set_device(*ONE_SM)
    chosen.set_order("forward")
    monkeypatch.setattr(backends, "kernels", lambda _: chosen.backend)
    return chosen


def assert_same(got: Outcome, want: Outcome) -> None:
    for name in ("loss", "dlogits", "logps", "entropy"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name


@pytest.mark.parametrize("device", [ONE_SM, H100], ids=["rows", "split"])
@pytest.mark.parametrize("v", [1, 2, 7, 1000, 4096, 32000, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_vocabulary(dtype: torch.dtype, v: int, device: Any, target: Target) -> None:
    target.set_device(*device)
    check(make_case(26 if v <= 4096 else 4, v, dtype, seed=v, mask_every=5))


@pytest.mark.parametrize("device", [ONE_SM, A100, RTX4090, H100], ids=["1", "80", "89", "90"])
@pytest.mark.parametrize("v", [128256, 151936, 262144])
def test_large_vocabularies(v: int, device: Any, target: Target) -> None:
    target.set_device(*device)
    check(make_case(2, v, torch.bfloat16, seed=v), inplace=True)


def test_a_row_that_no_shared_memory_holds(target: Target) -> None:
    target.set_device(1, *RTX4090[1:])
    check(with_everything(make_case(3, 262144)), inplace=True)


@pytest.mark.parametrize("device", [ONE_SM, H100], ids=["rows", "split"])
@pytest.mark.parametrize("v", [1, 7, 1000, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_term_at_once(dtype: torch.dtype, v: int, device: Any, target: Target) -> None:
    target.set_device(*device)
    check(with_everything(make_case(7, v, dtype, seed=v, mask_every=4)))
    check(with_everything(make_case(7, v, dtype, seed=v, mask_every=4)), inplace=True)


@pytest.mark.parametrize("objective", [CFPO(0.05), PPOClip(0.1, 0.3), PPOClip(dual_clip=3.0)])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_objectives(objective: CFPO | PPOClip, estimator: str) -> None:
    case = with_everything(make_case(39, 257, objective=objective))
    check(Case(**(vars(case) | {"options": case.options | {"kl_estimator": estimator}})))


@pytest.mark.parametrize("v", [1000, 8000, 33000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_but_the_row_decides(dtype: torch.dtype, v: int, target: Target) -> None:
    """The same bits from every kernel, grid, number of rows, and order of the threads."""
    case = with_everything(make_case(5, v, dtype, mask_every=4, reduction="sum"))
    want = check(case)
    for device in (H100, A100, RTX4090, (1, *RTX4090[1:]), (2, 56 * 1024, 64 * 1024)):
        target.set_device(*device)
        for order in ("backward", "shuffled"):
            target.set_order(order)
            assert_same(run(case), want)
    rows = slice(2, 3)
    options = {
        name: x[rows] if isinstance(x, torch.Tensor) else x for name, x in case.options.items()
    }
    one = Case(
        case.logits[rows],
        case.token_ids[rows],
        case.advantages[rows],
        case.old_logps[rows],
        options,
    )
    assert torch.equal(run(one).dlogits, want.dlogits[rows])


@pytest.mark.parametrize("v", [1000, 33000])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scoring_gives_the_bits_of_training(dtype: torch.dtype, v: int, target: Target) -> None:
    case = make_case(5, v, dtype)
    want = run(case)
    for device in (ONE_SM, H100):
        target.set_device(*device)
        for entropy in (False, True):
            scored = cfpo_kernels.token_logps(case.logits, case.token_ids, return_entropy=entropy)
            assert torch.equal(scored[0] if entropy else scored, want.logps)
        arguments = (case.logits, case.token_ids, case.advantages, case.old_logps)
        assert torch.equal(cfpo_kernels.cfpo_loss(*arguments), want.loss)
    test_loss.test_on_policy()


@pytest.mark.parametrize("device", [ONE_SM, H100], ids=["rows", "split"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("v", [1, 7, 1000, 50257])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_probabilities(
    dtype: torch.dtype, v: int, inplace: bool, device: Any, target: Target
) -> None:
    target.set_device(*device)
    test_token_logps.test_values_and_gradients(dtype, v, inplace)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("v", [1, 65, 1000, 33411])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", [ONE_SM, H100], ids=["rows", "split"])
def test_strides_and_alignments(
    dtype: torch.dtype, v: int, inplace: bool, device: Any, target: Target
) -> None:
    target.set_device(*device)
    edges.test_strides(dtype, v, inplace, LEVEL)


def every_dtype(test: Callable[..., None], **arguments: Any) -> list[Any]:
    return [(test, arguments | {"dtype": dtype}) for dtype in DTYPES]


EDGES: list[tuple[Callable[..., None], dict[str, Any]]] = [
    *[t for peak in (0.5, 0.99, 0.9999) for t in every_dtype(edges.test_likely_tokens, peak=peak)],
    *[(edges.test_common_offset, {"offset": offset}) for offset in (1e4, -1e4, 123456.0)],
    (edges.test_offset_changes_nothing_beyond_the_rounding_of_the_inputs, {}),
    *every_dtype(edges.test_banned_tokens),
    (edges.test_an_outlier_far_from_the_first_columns, {}),
    *[
        (edges.test_a_bad_row_touches_no_other, {"poison": poison, "v": v})
        for poison in (torch.nan, torch.inf, "all -inf")
        for v in (7, 1000, 20001)
    ],
    (edges.test_nan_with_a_payload_stays_nan, {}),
    *[(edges.test_huge_logits, {"height": height}) for height in (1e6, 1e8, 1.4e9)],
    *[(edges.test_bans_that_fill_whole_segments, {"fill": fill}) for fill in (-1e8, -1e10, -1e30)],
    (edges.test_entropy_of_a_peak_far_above_the_guess, {"gap": 11.0}),
    (edges.test_logits_beyond_the_limit_give_nan, {}),
    *[
        t
        for temperature in (0.5, 8.0, 1e30)
        for t in every_dtype(edges.test_temperatures, temperature=temperature)
    ],
    (edges.test_a_very_low_temperature, {}),
    (edges.test_nan_from_outside_stays_nan, {}),
    (edges.test_a_bad_row_is_nan_on_policy_too, {"backend": "cpu"}),
    *[(edges.test_masked_rows_may_hold_anything, {"backend": "cpu", "v": v}) for v in (7, 20001)],
    *[(edges.test_all_masked, {"backend": "cpu", "reduction": r}) for r in ("sum", "none")],
    (edges.test_an_incoming_nan_does_not_reach_masked_rows, {"backend": "cpu"}),
    (edges.test_zero_advantage_beats_an_overflowing_ratio, {}),
    (edges.test_n_is_zero, {}),
    (edges.test_one_row_without_leading_dimensions, {}),
    (edges.test_inplace_writes_nothing_beside_its_rows, {}),
    (edges.test_four_dimensions_with_strides_that_do_not_merge, {}),
    (test_loss.test_grad_scale_keeps_small_float16_gradients, {}),
    (test_loss.test_incoming_gradient, {}),
    (test_token_logps.test_likely_tokens_keep_their_relative_accuracy, {}),
    (test_token_logps.test_mask_and_zero_gradients, {}),
]


@pytest.mark.parametrize(("test", "arguments"), EDGES, ids=lambda x: getattr(x, "__name__", ""))
def test_the_edges_of_the_cpu_suite(test: Callable[..., None], arguments: dict[str, Any]) -> None:
    if "level" in test.__annotations__:
        arguments = arguments | {"level": LEVEL}
    test(**arguments)


def test_any_shape_stride_and_mask() -> None:
    @settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(**edges.ANY_SHAPE)
    def holds(**arguments: Any) -> None:
        edges.test_any_shape_stride_and_mask.hypothesis.inner_test(**arguments)

    holds()


@pytest.mark.slow
def test_offsets_beyond_32_bits() -> None:
    edges.test_offsets_beyond_32_bits()


@pytest.mark.parametrize("device", [ONE_SM, H100], ids=["rows", "split"])
def test_an_unknown_token_makes_its_row_nan(
    device: Any, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a GPU nobody looks at the ids beforehand.
    monkeypatch.setattr(EmulatedBackend, "check_tokens", staticmethod(lambda rows: None))
    target.set_device(*device)
    for v in (7, 40000):
        case = make_case(6, v, reduction="none")
        case.advantages.fill_(1.0)  # where it is 0, so is the loss
        clean = run(case)
        case.token_ids[1:5] = torch.tensor([v, -1, -(2**40), 2**32 + 3])
        got = run(case)
        assert got.loss.isnan().tolist() == [False, True, True, True, True, False]
        assert got.dlogits[1:5].isnan().all()
        assert torch.equal(got.dlogits[[0, 5]], clean.dlogits[[0, 5]])


def test_factors_of_one_touch_nothing(target: Target) -> None:
    for dtype in DTYPES:
        for v in (1, 7, 1000, 5001):
            memory = torch.randn(70, v + 3).to(dtype)
            x, factors = memory[:, 1 : v + 1], torch.ones(70)
            factors[[3, 40, 69]] = torch.tensor([0.5, -3.0, torch.nan])
            want = memory.clone()
            changed = (want[[3, 40, 69], 1 : v + 1].float() * factors[[3, 40, 69], None]).to(dtype)
            want[[3, 40, 69], 1 : v + 1] = changed
            target.backend.multiply_rows(x, factors)
            assert torch.equal(memory.nan_to_num(77.0), want.nan_to_num(77.0))
            target.backend.multiply_rows(x, torch.tensor(2.0).expand(70))
            assert torch.equal(x[0].float(), want[0, 1 : v + 1].float() * 2)


def test_too_large_a_row_is_refused(target: Target) -> None:
    if target.module is None:
        pytest.skip("no GPU is that small")
    target.set_device(1, 16 * 1024, 32 * 1024)
    with pytest.raises(ValueError, match="too long for this device"):
        run(make_case(3, 40000))


@pytest.mark.parametrize("both_sweeps", [False, True])
@pytest.mark.parametrize("device", [A100, RTX4090, H100], ids=["80", "89", "90"])
def test_plans_fit_the_device(device: Any, both_sweeps: bool, target: Target) -> None:
    if target.module is None:
        pytest.skip("plans are the same everywhere")
    _, shared_per_block, shared_per_sm = device
    target.set_device(*device)
    for n_segments in [*range(1, 300), 512, 1024]:
        plan = target.module.plan_rows(n_segments, both_sweeps)
        blocks, slots, warps = plan["blocks_per_sm"], plan["slots"], plan["warps_per_row"]
        rows = plan["threads"] // 32 // warps
        assert plan["shared_bytes"] <= shared_per_block
        assert blocks * (plan["shared_bytes"] + 1024) <= shared_per_sm
        assert blocks * plan["threads"] <= 640
        whole = slots * warps >= n_segments
        assert whole or slots > 2, "no window to keep a segment in beside the ring"
        in_flight = blocks * plan["threads"] // 32 * (slots if whole else 2) * 2048
        assert in_flight >= 32 * 1024, "too few bytes under way"
        if both_sweeps:
            nearly_whole = 10 * plan["windows"] >= 9 * rows * n_segments
            if rows * n_segments * 2064 <= shared_per_block // 3:
                assert nearly_whole and blocks >= 2, "what fits twice should be there twice"
            unused = shared_per_sm // blocks - 1024 - plan["shared_bytes"]
            assert nearly_whole or unused < 2064, "memory left unused"
