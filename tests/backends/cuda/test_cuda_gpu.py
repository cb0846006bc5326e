"""What only a GPU can show of the CUDA kernels: streams, graphs, devices, sizes beyond 32 bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from on_device import on_cuda
from oracle import check_gradient, make_case, oracle, with_everything

import cfpo_kernels
from cfpo_kernels.backends import cuda
from cfpo_kernels.verification import choice, records

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        torch.cuda.is_available() and bool(cuda.why_not(torch.device("cuda"))),
        reason="no CUDA kernels for this device in this build",
    ),
]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def loss_and_gradient(
    logits: torch.Tensor, arguments: dict[str, object], **how: object
) -> tuple[torch.Tensor, torch.Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    loss = cfpo_kernels.cfpo_loss(leaf, **arguments, backend="cuda", **how)
    loss.sum().backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("v", [1000, 8000, 50257, 128256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_rows(dtype: torch.dtype, v: int) -> None:
    """More rows than the device works on at once: each block takes several, one after another."""
    case = with_everything(make_case(600 if v < 100000 else 300, v, dtype, mask_every=5))
    arguments = on_cuda(case)
    for inplace in (False, True):
        _, dlogits = loss_and_gradient(case.logits.cuda(), arguments, inplace=inplace)
        check_gradient(dlogits.cpu(), oracle(case).dlogits, case)


def needs_clusters(kernel: str, row_bytes: int) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("clusters need compute capability 9.0")
    # Eight slices, of each of which three, or one, fit a block; 12 KiB are for what else is there.
    memory = torch.cuda.get_device_properties().shared_memory_per_block_optin - 12288
    segments = {"cluster": min(32, memory // 3 // 2048), "transient": (memory - 8192) // 2064}
    if row_bytes > 8 * segments[kernel] * 2048:
        pytest.skip("too long a row for clusters")


@pytest.mark.parametrize("kernel", ["cluster", "transient"])
@pytest.mark.parametrize("v", [1, 1000, 32000, 50257, 128256, 151936, 262144])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clusters_have_the_bits_of_the_row_kernel(
    dtype: torch.dtype, v: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_clusters(kernel, dtype.itemsize * v)
    case = with_everything(make_case(300, v, dtype, mask_every=5, reduction="none"))
    arguments = on_cuda(case)
    monkeypatch.setenv("CFPO_KERNELS_CUDA_KERNEL", "portable")
    want = loss_and_gradient(case.logits.cuda(), arguments)
    check_gradient(want[1].cpu(), oracle(case).dlogits, case)
    monkeypatch.setenv("CFPO_KERNELS_CUDA_KERNEL", kernel)
    for inplace in (False, True):
        for _ in range(20):
            got = loss_and_gradient(case.logits.cuda(), arguments, inplace=inplace)
            assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("kernel", ["cluster", "transient"])
@pytest.mark.parametrize("offset", [1, 3, 6])
def test_clusters_write_nothing_beside_their_rows(
    offset: int, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    v, n = 50257, 300
    needs_clusters(kernel, 2 * v)
    monkeypatch.setenv("CFPO_KERNELS_CUDA_KERNEL", kernel)
    case = make_case(n, v, torch.bfloat16)
    memory = torch.full((n, v + 7), 7.0, dtype=torch.bfloat16, device="cuda")
    logits = memory[:, offset : offset + v]
    logits.copy_(case.logits)
    arguments = on_cuda(case)
    leaf = logits.detach().requires_grad_()
    cfpo_kernels.cfpo_loss(leaf, **arguments, inplace=True, backend="cuda").backward()
    beside = torch.cat([memory[:, :offset], memory[:, offset + v :]], dim=1)
    assert (beside == 7.0).all()
    check_gradient(logits.cpu(), oracle(case).dlogits, case)


@pytest.mark.parametrize("n", [3, 300])
@pytest.mark.parametrize("v", [1000, 50257])
def test_a_hundred_repeats_are_bitwise_equal(n: int, v: int) -> None:
    case = with_everything(make_case(n, v, torch.bfloat16, mask_every=4, reduction="none"))
    logits, arguments = case.logits.cuda(), on_cuda(case)
    loss, dlogits = loss_and_gradient(logits, arguments)
    check_gradient(dlogits.cpu(), oracle(case).dlogits, case)
    for _ in range(100):
        again = loss_and_gradient(logits, arguments)
        assert torch.equal(again[0], loss) and torch.equal(again[1], dlogits)


def test_few_rows_have_the_bits_of_many() -> None:
    case = make_case(300, 50257, torch.bfloat16, reduction="none")
    logits, arguments = case.logits.cuda(), on_cuda(case)
    loss, dlogits = loss_and_gradient(logits, arguments)
    check_gradient(dlogits.cpu(), oracle(case).dlogits, case)
    few = {
        name: x[:2] if isinstance(x, torch.Tensor) and x.dim() else x
        for name, x in arguments.items()
    }
    few_loss, few_dlogits = loss_and_gradient(logits[:2], few)
    assert torch.equal(few_loss, loss[:2]) and torch.equal(few_dlogits, dlogits[:2])


@pytest.mark.parametrize("n", [3, 300])
def test_no_call_waits_for_the_device(n: int) -> None:
    case = with_everything(make_case(n, 40000, torch.bfloat16, mask_every=5))
    logits, arguments = case.logits.cuda(), on_cuda(case)
    loss_and_gradient(logits, arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, dlogits = loss_and_gradient(logits, arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    check_gradient(dlogits.cpu(), oracle(case).dlogits, case)


@pytest.mark.parametrize("n", [3, 300])
def test_a_second_stream(n: int) -> None:
    case = make_case(n, 50257, torch.bfloat16)
    logits, arguments = case.logits.cuda(), on_cuda(case)
    want = loss_and_gradient(logits, arguments)
    check_gradient(want[1].cpu(), oracle(case).dlogits, case)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        later = logits * 0
        torch.cuda._sleep(50_000_000)  # whoever does not wait for this stream reads zeros
        later += logits
        got = loss_and_gradient(later, arguments)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.parametrize("n", [3, 300])
def test_cuda_graphs(n: int) -> None:
    case = with_everything(make_case(n, 50257, torch.bfloat16))
    static, arguments = case.logits.cuda(), on_cuda(case)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        loss_and_gradient(static, arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, dlogits = loss_and_gradient(static, arguments)
    for seed in (1, 2):
        case.logits = make_case(n, 50257, torch.bfloat16, seed=seed).logits
        static.copy_(case.logits)
        want = loss_and_gradient(static, arguments)
        check_gradient(want[1].cpu(), oracle(case).dlogits, case)
        graph.replay()
        assert torch.equal(loss, want[0]) and torch.equal(dlogits, want[1])


FIRST_CALL = """
import torch
import cfpo_kernels

n, v = {n}, 50257
logits = torch.randn(n, v, device="cuda").bfloat16().requires_grad_()
ids = torch.arange(n, device="cuda")
ones = torch.ones(n, device="cuda")

def loss(backend="cuda"):
    return cfpo_kernels.cfpo_loss(
        logits, ids, ones, -11 * ones, reduction="none", backend=backend
    ).detach()

graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = loss()
graph.replay()
assert captured.unique().numel() > 1 and torch.equal(captured, loss())
torch.testing.assert_close(captured, loss("reference"), rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("n", [3, 300])
def test_a_first_call_may_be_captured(n: int) -> None:
    """When kernels are still to be loaded and devices to be asked."""
    command = [sys.executable, "-c", FIRST_CALL.format(n=n)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_torch_compile() -> None:
    case = make_case(40, 8000, torch.bfloat16)
    logits, arguments = case.logits.cuda(), on_cuda(case)
    want = loss_and_gradient(logits, arguments)
    check_gradient(want[1].cpu(), oracle(case).dlogits, case)
    compiled = torch.compile(loss_and_gradient, fullgraph=False)
    got = compiled(logits, arguments)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_another_device_is_used_and_left() -> None:
    case = make_case(3, 50257, torch.bfloat16)
    want = loss_and_gradient(case.logits.cuda(), on_cuda(case))
    check_gradient(want[1].cpu(), oracle(case).dlogits, case)
    with torch.cuda.device(1):
        arguments = on_cuda(case)
        logits = case.logits.cuda()
    assert torch.cuda.current_device() == 0
    got = loss_and_gradient(logits, arguments)
    assert torch.cuda.current_device() == 0 and got[1].device.index == 1
    assert torch.equal(got[1].cpu(), want[1].cpu())
    torch.ones(1, device="cuda").add_(1)  # the first device still works


def test_a_failed_launch_names_kernel_device_and_cause() -> None:
    logits = torch.randn(300, 1000, device="cuda")
    doubled = 2 * logits
    rows = (logits.data_ptr(), 0, 300, 1000, 300, 0, 1000)
    arguments = {"factors": torch.full((300,), 2.0, device="cuda").data_ptr(), "factor_stride": 1}
    here = {"device": torch.cuda.current_device(), "workspace": 0, "row_kernel": "auto"}
    capturing = torch.cuda.Stream()
    with pytest.raises(RuntimeError, match=r"multiply_kernel.* on device \d+ .*cudaError"):
        cuda.native.cuda.multiply_rows(
            rows=rows, **arguments, **(here | {"device": 4095}), stream=0
        )
    # The error is not left behind for someone else's check.
    torch.cuda.synchronize()
    cuda.native.cuda.multiply_rows(rows=rows, **arguments, **here, stream=capturing.cuda_stream)
    torch.cuda.synchronize()
    assert torch.equal(logits, doubled)


def test_a_token_that_does_not_exist_is_nan_and_harmless() -> None:
    for n, v in ((4, 10), (300, 1000), (4, 50257)):
        logits = torch.randn(n, v, device="cuda")
        ids = torch.zeros(n, dtype=torch.int64, device="cuda")
        ids[1], ids[2] = v, -(2**40)
        loss = cfpo_kernels.cfpo_loss(
            logits, ids, torch.ones(n, device="cuda"), reduction="none", backend="cuda"
        )
        assert loss.isnan().nonzero().flatten().tolist() == [1, 2]


def test_auto_takes_only_what_was_verified(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a record plain torch, to which inplace=True is a permission that it leaves alone."""
    monkeypatch.setenv("CFPO_KERNELS_VERIFY", "never")
    monkeypatch.setenv("CFPO_KERNELS_CACHE", str(tmp_path))
    monkeypatch.setattr(records, "SHIPPED", tmp_path)
    logits = torch.randn(2, 10, device="cuda", requires_grad=True)
    before = logits.detach().clone()
    ids = torch.zeros(2, dtype=torch.int64, device="cuda")
    choice.forget()
    try:
        with pytest.warns(Warning, match="plain torch computes the loss"):
            loss = cfpo_kernels.cfpo_loss(logits, ids, torch.ones(2, device="cuda"), inplace=True)
    finally:
        choice.forget()
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert torch.equal(logits.detach(), before)


@pytest.mark.parametrize("v", [1000, 128256])
def test_in_place_takes_no_memory(v: int) -> None:
    case = make_case(300, v, torch.bfloat16)
    arguments = on_cuda(case)
    logits = case.logits.cuda().requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = cfpo_kernels.cfpo_loss(logits, **arguments, inplace=True, backend="cuda")
    loss.backward()
    assert torch.cuda.max_memory_allocated() - before < 2**20
    assert logits.grad is not None
    check_gradient(logits.grad.cpu(), oracle(case).dlogits, case)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "v", "dtype"),
    [
        (1, 262144, torch.float32),
        (1_000_000, 1000, torch.bfloat16),
        (2**31 // 50257 + 3, 50257, torch.float16),  # rows beyond element 2^31
        (2**32 // 128256 + 3, 128256, torch.bfloat16),  # and beyond 2^32
    ],
)
def test_sizes(n: int, v: int, dtype: torch.dtype) -> None:
    needed = n * v * dtype.itemsize * 1.1
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of GPU memory")
    case = make_case(min(n, 40), v, dtype, reduction="none")
    rows = case.logits.shape[0]
    logits = torch.empty(n, v, dtype=dtype, device="cuda")
    weights = torch.zeros(n, dtype=torch.bool, device="cuda")
    picked = torch.linspace(0, n - 1, rows, dtype=torch.float64).long().cuda()
    weights[picked] = True
    logits[picked] = case.logits.cuda()

    def spread(x: torch.Tensor) -> torch.Tensor:
        return torch.zeros(n, dtype=x.dtype, device="cuda").index_copy(0, picked, x.cuda())

    leaf = logits.requires_grad_()
    loss = cfpo_kernels.cfpo_loss(
        leaf,
        spread(case.token_ids),
        spread(case.advantages),
        spread(case.old_logps),
        mask=weights,
        reduction="none",
        inplace=True,
        backend="cuda",
    )
    loss.sum().backward()
    check_gradient(leaf.grad[picked].cpu(), oracle(case).dlogits, case)
    assert not loss[~weights].any()
    for begin in range(0, n, 100_000):  # all other rows are exact zeros
        block = slice(begin, begin + 100_000)
        assert not leaf.grad[block][~weights[block]].any()
