"""Short timings of each kernel, for comparing two states of the code on one machine.

Skipped in ordinary runs; `make bench-micro` runs them. Figures for publication come from
`python -m bench`, which sets them against a copy and against peers.
"""

import pytest
import torch

import cfpo_kernels

pytest.importorskip("pytest_benchmark")

# From a row that fits the L1 cache, where the cost of a call shows, to 2 MB of bf16 and beyond.
SHAPES = [(256, 1000), (64, 32000), (16, 50257), (16, 128256), (8, 262144)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUNDS, WARM_UP_ROUNDS = 20, 3

pytestmark = [
    pytest.mark.parametrize(("rows", "vocabulary"), SHAPES, ids=lambda size: str(size)),
    pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch.")),
]


@pytest.fixture
def inputs(rows, vocabulary, dtype):
    """logits (N, V), token_ids (N,), advantages (N,), old_logps (N,)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=generator).to(dtype)
    token_ids = torch.randint(vocabulary, (rows,), generator=generator)
    advantages = torch.randn(rows, generator=generator)
    old_logps = cfpo_kernels.token_logps(logits, token_ids) + 0.1
    return logits, token_ids, advantages, old_logps


def run(benchmark, group, call, setup):
    """Times `call(*arguments)`, with fresh arguments from `setup` before each round."""
    benchmark.group = group
    benchmark.pedantic(
        call,
        setup=lambda: (setup(), {}),
        rounds=ROUNDS,
        warmup_rounds=WARM_UP_ROUNDS,
    )


@pytest.mark.parametrize("inplace", [True, False], ids=["inplace", "outofplace"])
def test_fused(benchmark, inputs, inplace):
    logits, *others = inputs

    def setup():
        # Not a leaf, as a model's logits are not.
        leaf = logits.clone().requires_grad_()
        return (leaf * 1,)

    def call(fresh):
        cfpo_kernels.cfpo_loss(fresh, *others, inplace=inplace)

    run(benchmark, "fused loss and gradient", call, setup)


def test_forward_only(benchmark, inputs):
    logits, *others = inputs

    def call():
        with torch.no_grad():
            cfpo_kernels.cfpo_loss(logits, *others)

    run(benchmark, "loss only", call, tuple)


def test_token_logps(benchmark, inputs):
    logits, token_ids, *_ = inputs
    run(benchmark, "log-probs only", lambda: cfpo_kernels.token_logps(logits, token_ids), tuple)


def test_gradient_only(benchmark, inputs):
    logits, token_ids, *_ = inputs
    leaf = logits.clone().requires_grad_()

    def setup():
        return cfpo_kernels.token_logps(leaf, token_ids), torch.ones(len(token_ids))

    def call(logps, dlogps):
        torch.autograd.grad(logps, leaf, dlogps)

    run(benchmark, "gradient of the log-probs", call, setup)
