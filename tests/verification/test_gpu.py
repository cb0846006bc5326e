"""The road of a GPU's first use, on a real one: verified, recorded, taken by "auto"; and what any
backend has to keep there."""

from __future__ import annotations

import pytest
import torch
from on_device import on_cuda
from oracle import check_gradient, make_case, oracle, with_everything

import cfpo_kernels
from cfpo_kernels.backends import cpu
from cfpo_kernels.verification import records, report
from cfpo_kernels.verification.records import VerifyRecord

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", autouse=True)
def record() -> VerifyRecord:
    found = cfpo_kernels.verify(device="cuda", timeout=300)
    report.print_record(found)
    return found


def test_all_kernels_are_right_and_timed(record: VerifyRecord) -> None:
    assert record.exit_status() == 0, record.verdicts
    assert {v.kernels for v in record.verdicts} >= {"triton"} and record.timings
    assert records.load(record.identity) == record.kept()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_auto_takes_what_was_verified(
    dtype: torch.dtype, inplace: bool, record: VerifyRecord
) -> None:
    case = with_everything(make_case(13, 50257, dtype, mask_every=5))
    logits = case.logits.cuda().requires_grad_()
    name = cfpo_kernels.backends.resolve("auto", logits.device, dtype, 50257)
    assert record.verdict(name, str(dtype).removeprefix("torch.")) == "right"
    leaf = logits.detach().clone().requires_grad_()
    cfpo_kernels.cfpo_loss(leaf * 1.0, **on_cuda(case), inplace=inplace).backward()
    check_gradient(leaf.grad.cpu(), oracle(case).dlogits, case)


def test_no_call_waits_for_the_device() -> None:
    case = with_everything(make_case(13, 1000, torch.bfloat16, mask_every=5))
    logits, arguments = case.logits.cuda().requires_grad_(), on_cuda(case)
    cfpo_kernels.cfpo_loss(logits, **arguments, return_stats=True)[0].backward()  # warm up
    torch.cuda.set_sync_debug_mode("error")
    try:
        cfpo_kernels.cfpo_loss(logits, **arguments, return_stats=True)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_gradient(logits.grad.cpu() / 2, oracle(case).dlogits, case, relative=3e-4)


def test_an_unknown_token_gives_nan_not_an_assert() -> None:
    logits = torch.randn(4, 10, device="cuda")
    ids = torch.tensor([1, 10, -3, 2], device="cuda")
    loss = cfpo_kernels.cfpo_loss(logits, ids, torch.ones(4, device="cuda"), reduction="none")
    assert loss.isnan().tolist() == [False, True, True, False]


def test_debug_mode_names_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFPO_KERNELS_DEBUG", "1")
    ids = torch.tensor([1, 10], device="cuda")
    with pytest.raises(IndexError, match=r"10 at \[1\]"):
        cfpo_kernels.token_logps(torch.randn(2, 10, device="cuda"), ids)


def test_the_native_module_sees_the_device() -> None:
    if not cpu.native.cuda_built:
        pytest.skip(f"built without CUDA: {cpu.native.cuda_reason}")
    query = cpu.native.cuda_query()
    assert query["status"] == 0, query
    seen = {(d["capability_major"], d["capability_minor"]) for d in query["devices"]}
    assert torch.cuda.get_device_capability() in seen
