"""Heads as they are: bias, adapters, scales, caps, a sampler's support, precision, wrappers."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from heads import (
    HeadCase,
    check,
    is_noticed,
    linear,
    logits_of,
    make,
    planted,
    pretend_speed,
    relative,
    whole,
)
from torch import Tensor, nn

import cfpo_kernels
from cfpo_kernels import CFPO, LinearCFPOLoss
from cfpo_kernels.linear import batch as batch_module
from cfpo_kernels.linear import support as support_module

pytestmark = pytest.mark.usefixtures("small_slices", "one_thread")

WAYS: list[dict[str, Any]] = [{}, {"low_memory": True}, {"reduction": "none"}]
ways = pytest.mark.parametrize("how", WAYS, ids=str)


@ways
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"logit_scale": 0.4},
        {"softcap": 3.0},
        {"softcap": 3.0, "logit_scale": 1.7, "temperature": 0.8, "entropy_coef": 0.05},
    ],
    ids=str,
)
@pytest.mark.parametrize("parts", [{}, {"bias": True}, {"rank": 3}, {"bias": True, "rank": 3}])
def test_parts_of_a_head(
    parts: dict[str, Any], options: dict[str, Any], how: dict[str, Any]
) -> None:
    case = make(mask_every=6, chunk_tokens=16, **parts)
    case.options |= options
    upstream: Any = torch.linspace(-2, 1, 37) if "reduction" in how else 1.5
    got = linear(case, stats=True, upstream=upstream, **how)
    check(got, whole(case, upstream=upstream, **how), 5e-6)


def test_a_cap_without_its_slope_is_noticed() -> None:
    rows = batch_module.Batch.kernel_rows

    def uncapped(self: Any, *arguments: Any, **more: Any) -> Any:
        return rows(self, *arguments, **more)._replace(softcap=0.0)

    def capped() -> None:
        case = make(softcap=3.0, chunk_tokens=16)
        check(linear(case), replace(whole(case), stats=None))

    capped()
    with planted(batch_module.Batch, "kernel_rows", uncapped):
        is_noticed(capped)


def test_a_cap_is_in_float32() -> None:
    """In bfloat16 it would make ratios of 1.12 out of nothing."""
    case = make(dtype=torch.bfloat16, softcap=3.0, chunk_tokens=16)
    stats, want = linear(case, stats=True).stats, whole(case).stats
    assert stats is not None and want is not None
    assert (stats.logps - want.logps).abs().max() < 1e-5


def test_tied_embeddings() -> None:
    g = torch.Generator().manual_seed(0)
    embedding = nn.Embedding(203, 16)
    ids, targets = (torch.randint(0, 203, (4, 9), generator=g) for _ in range(2))
    advantages = torch.randn(4, 9, generator=g)
    found = []
    for whole_logits in (False, True):
        embedding.zero_grad()
        hidden = torch.tanh(embedding(ids))
        if whole_logits:
            loss = cfpo_kernels.cfpo_loss(hidden @ embedding.weight.T, targets, advantages)
        else:
            loss = cfpo_kernels.linear_cfpo_loss(
                hidden, embedding.weight, targets, advantages, chunk_tokens=16
            )
        assert isinstance(loss, Tensor)
        loss.backward()
        assert embedding.weight.grad is not None
        found.append(embedding.weight.grad.clone())
    assert relative(*found) < 3e-6


def test_an_adapter_from_outside() -> None:
    """u is what autograd made of the hidden states and A."""
    g = torch.Generator().manual_seed(0)
    case = make()
    a = torch.randn(3, 16, generator=g)
    b = torch.randn(203, 3, generator=g) * 0.3
    found = []
    for merged in (False, True):
        hidden, low, up = (x.clone().requires_grad_() for x in (case.hidden, a, b))
        weight = case.weight + 0.5 * up @ low if merged else case.weight
        loss = cfpo_kernels.linear_cfpo_loss(
            hidden,
            weight,
            case.token_ids,
            case.advantages,
            case.old_logps,
            lora=None if merged else (0.5 * hidden @ low.T, up),
            chunk_tokens=16,
        )
        assert isinstance(loss, Tensor)
        loss.backward()
        found.append([x.grad for x in (hidden, low, up)])
    for got, want in zip(*found, strict=True):
        assert got is not None and want is not None and relative(got, want) < 5e-6


# A sampler's support.


def with_support(case: HeadCase, k: int = 12, seed: int = 0) -> Tensor:
    """(N, k): the sampled token somewhere, others, and some padding."""
    g = torch.Generator().manual_seed(seed)
    n, v = case.token_ids.numel(), case.weight.shape[0]
    ids = torch.stack([torch.randperm(v, generator=g)[:k] for _ in range(n)])
    tokens = case.token_ids.reshape(-1).long()
    ids = torch.where(ids == tokens[:, None], (tokens[:, None] + 1) % v, ids)
    twice = torch.stack([torch.isin(torch.arange(v), row) for row in ids])
    place = torch.randint(0, k, (n,), generator=g)
    ids = torch.where((ids.sort(1).values.diff(dim=1) == 0).any(1)[:, None], -1, ids)
    ids[torch.rand(n, k, generator=g) < 0.2] = -1
    ids[torch.arange(n), place] = tokens
    assert twice.any()
    return ids.reshape(*case.token_ids.shape, k)


def on_support(case: HeadCase, support: Tensor, **extra: Any) -> Any:
    """Whole logits in float64, -inf elsewhere."""
    given = case.leaves(dtype=torch.float64)
    options = {"objective": CFPO()} | case.options | extra
    kept = torch.zeros(*case.token_ids.shape, case.weight.shape[0] + 1, dtype=torch.bool)
    kept.scatter_(-1, torch.where(support < 0, case.weight.shape[0], support), True)
    logits = logits_of(given, options).masked_fill(~kept[..., :-1], -torch.inf)
    loss, stats = cfpo_kernels.policy_loss(
        logits,
        case.token_ids,
        case.advantages,
        case.old_logps,
        backend="reference",
        return_stats=True,
        **{n: x for n, x in options.items() if n not in ("softcap", "logit_scale")},
    )
    loss.sum().backward()
    return loss.detach(), stats, {name: x.grad for name, x in given.items()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softcap": 3.0, "logit_scale": 0.7, "temperature": 0.8},
        {"entropy_coef": 0.1, "reduction": "none"},
    ],
    ids=str,
)
@pytest.mark.parametrize("pieces", [False, True])
def test_a_support(options: dict[str, Any], pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if pieces:
        monkeypatch.setattr(support_module, "GATHERED_BYTES", 5 * 12 * 16 * 4)
    case = make(mask_every=5, bias=True, rank=2)
    support = with_support(case)
    mask = case.options["mask"]
    case.hidden[~mask] = torch.nan
    got = linear(case, stats=True, support=support, **options)
    case.hidden[~mask] = 0.0
    loss, stats, gradients = on_support(case, support, **options)
    torch.testing.assert_close(got.loss, loss.float(), rtol=1e-5, atol=1e-6)
    assert got.stats is not None
    torch.testing.assert_close(got.stats.logps, stats.logps, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(got.stats.entropy, stats.entropy, rtol=1e-5, atol=2e-6)
    for name, exact in gradients.items():
        assert relative(got.gradients[name], exact) < 5e-6, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ratio_on_a_support_is_1(dtype: torch.dtype) -> None:
    case = make(60, dtype=dtype, idle_every=2)
    support = with_support(case)
    old = cfpo_kernels.linear_token_logps(
        case.hidden, case.weight, case.token_ids, support=support, temperature=0.7
    )
    assert isinstance(old, Tensor)
    stats = linear(replace(case, old_logps=old), stats=True, support=support, temperature=0.7).stats
    assert stats is not None and stats.ratio_max == 1 and stats.ratio_mean == 1
    assert (old > -6).any()  # few tokens: likely ones


@pytest.mark.parametrize("fast", [True, False])
def test_logits_of_a_support_in_float32(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_speed(monkeypatch, fast)
    case = make(dtype=torch.bfloat16)
    support = with_support(case)
    got = cfpo_kernels.linear_token_logps(
        case.hidden, case.weight, case.token_ids, support=support, logits_dtype=torch.float32
    )
    assert isinstance(got, Tensor)
    _, stats, _ = on_support(case, support)
    assert (got - stats.logps).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: torch.where(x == x[:, :1], 203, x), r"token ids in \[0, 203\), or -1"),
        (lambda x: torch.where(x == x[:, :1], -2, x), r"token ids in \[0, 203\), or -1"),
        (lambda x: torch.cat([x, x], 1), "hold each token id once where mask is not 0"),
        (lambda x: torch.full_like(x, -1), r"hold the sampled token.*not so at \[0\]"),
        (lambda x: x[:, :0], "support must have the shape of token_ids and one dimension more"),
    ],
)
def test_a_wrong_support(change: Any, said: str) -> None:
    case = make()
    with pytest.raises(ValueError, match=said):
        linear(case, support=change(with_support(case)))
    case.options["mask"] = torch.zeros(37)
    if "shape" not in said:
        linear(case, support=change(with_support(case)))


# Precision.


def head_case(dtype: torch.dtype = torch.float32, **more: Any) -> HeadCase:
    return make(40, bias=True, rank=2, dtype=dtype, chunk_tokens=16, **more)


@ways
def test_autocast_multiplies_what_it_would(how: dict[str, Any]) -> None:
    case = head_case()
    upstream: Any = torch.ones(40)
    with torch.autocast("cpu", torch.bfloat16):
        got = linear(case, upstream=upstream, stats=True, **how)
    lower = replace(case, **{name: x.detach().bfloat16() for name, x in case.leaves().items()})
    want = linear(lower, upstream=upstream, stats=True, **how)
    assert got.stats is not None and want.stats is not None
    assert torch.equal(got.stats.logps, want.stats.logps)
    for name, gradient in got.gradients.items():
        assert gradient.dtype == torch.float32
        assert relative(gradient, want.gradients[name]) < 5e-3


@ways
def test_autocast_leaves_a_float32_head_that_is_meant(how: dict[str, Any]) -> None:
    case = head_case()
    with torch.autocast("cpu", torch.bfloat16):
        got = linear(case, upstream=torch.ones(40), logits_dtype=torch.float32, **how)
    want = linear(case, upstream=torch.ones(40), **how)
    assert torch.equal(got.loss, want.loss)
    for name, gradient in got.gradients.items():
        assert torch.equal(gradient, want.gradients[name])


def test_a_float32_head_over_hidden_states_in_bfloat16() -> None:
    case = head_case()
    lower = replace(case, hidden=case.hidden.bfloat16())
    got = linear(lower, logits_dtype=torch.float32)
    want = linear(replace(case, hidden=lower.hidden.float()))
    assert torch.equal(got.loss, want.loss)
    assert got.gradients["hidden"].dtype == torch.bfloat16
    assert torch.equal(got.gradients["hidden"], want.gradients["hidden"].bfloat16())
    assert torch.equal(got.gradients["weight"], want.gradients["weight"])


def test_float16_with_a_scaler() -> None:
    """Gradients of 1e-9 are 0 in float16, unless their scale is in them from the start."""
    case = make(64, dtype=torch.float16, idle_every=0, chunk_tokens=16)
    case.advantages = case.advantages * 1e-6
    want = whole(case).gradients
    scale = 2.0**16
    for how in ({"grad_scale": torch.tensor(scale)}, {"low_memory": True}):
        got = linear(case, upstream=scale, **how).gradients
        for name, exact in want.items():
            assert relative(got[name], scale * exact) < 1e-2, (how, name)
    unscaled = linear(case, upstream=scale).gradients
    assert relative(unscaled["hidden"], scale * want["hidden"]) > 0.05
    # Divided out again of a loss that nobody scales.
    plain = linear(head_case()).gradients
    for name, gradient in linear(head_case(), grad_scale=4.0).gradients.items():
        assert torch.equal(gradient, plain[name])


def test_a_grad_scaler() -> None:
    """Steps are skipped where gradients overflow, and their scale is taken out again."""
    case = make(64, idle_every=0)
    head = nn.Linear(16, 203, bias=False)
    head.weight.data = case.weight.clone()
    optimizer = torch.optim.SGD(head.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=1000)
    steps = []
    for factor in (1.0, torch.inf, 1.0):
        optimizer.zero_grad()
        loss = cfpo_kernels.linear_cfpo_loss(
            case.hidden,
            head.weight,
            case.token_ids,
            case.advantages,
            case.old_logps,
            grad_scale=scaler.get_scale(),
        )
        assert isinstance(loss, Tensor)
        before = head.weight.detach().clone()
        scaler.scale(loss * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        steps.append(head.weight.detach() - before)
    assert relative(steps[0], -0.01 * linear(case).gradients["weight"]) < 1e-4
    assert not steps[1].any() and steps[2].any()
    assert scaler.get_scale() == 128.0


# Heads that have no weight to multiply by.


class Packed(Tensor):
    """As quantisers make them: a tensor that is not what it seems."""


class PackedParameter(nn.Parameter):
    """As bitsandbytes' Params4bit."""


def test_quantised_weights_are_refused_by_name() -> None:
    case = make()
    for weight, name in (
        (case.weight.as_subclass(Packed), "Packed of torch.float32"),
        (case.weight.to(torch.int8), "Tensor of torch.int8"),
        (case.weight.to(torch.uint8).as_subclass(Packed), "Packed of torch.uint8"),
        (torch.Tensor._make_subclass(PackedParameter, case.weight), "PackedParameter"),
    ):
        with pytest.raises(TypeError, match=f"got a {name}.*llm_int8_skip_modules.*dequantised"):
            cfpo_kernels.linear_token_logps(case.hidden, weight, case.token_ids)


def test_a_weight_that_zero_3_left_empty() -> None:
    case = make()
    for empty in (torch.empty(0), torch.empty(0, 16)):
        with pytest.raises(ValueError, match=r"no elements, as DeepSpeed's ZeRO-3.*head=lm_head"):
            cfpo_kernels.linear_token_logps(case.hidden, empty, case.token_ids)


@pytest.mark.parametrize("how", [{}, {"low_memory": True}], ids=str)
def test_a_weight_that_is_there_in_the_heads_forward_only(how: dict[str, Any]) -> None:
    """As under ZeRO-3: gathered before forward and before backward, gone after each."""
    case = make()
    head = nn.Linear(16, 203, bias=False)

    def gather(*_: Any) -> None:
        head.weight.data = case.weight.clone()

    def release(*_: Any) -> None:
        head.weight.data = torch.empty(0)

    head.register_forward_pre_hook(gather)
    head.register_forward_hook(release)
    head.register_full_backward_pre_hook(gather)
    release()
    hidden = case.hidden.clone().requires_grad_()
    criterion = LinearCFPOLoss(head=head, chunk_tokens=16, **how)
    loss = criterion(hidden, case.token_ids, case.advantages, case.old_logps)
    assert head.weight.numel() == 0
    loss.backward()
    want = linear(case, chunk_tokens=16, **how).gradients
    assert head.weight.grad is not None and torch.equal(head.weight.grad, want["weight"])
    assert torch.equal(hidden.grad, want["hidden"])


class Quantised(nn.Linear):
    """As bitsandbytes' Linear4bit: a linear layer with another forward."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Plain(nn.Linear):
    """As FSDP2 makes them."""


def test_modules_that_compute_something_else_are_refused() -> None:
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(16, 203))
    hooked = nn.Linear(16, 203)
    hooked.forward = lambda x: x  # type: ignore[method-assign]
    for head, said in (
        (parametrised, "without parametrizations, got ParametrizedLinear.*quantised"),
        (Quantised(16, 203), "nn.Linear's own forward, got Quantised with another"),
        (hooked, "nn.Linear's own forward, got Linear with another"),
        (nn.Sequential(nn.Linear(16, 203)), r"got Sequential.*Of an adapter \(LoRA\), call"),
        (torch.zeros(203, 16), "head must be an nn.Linear, got Tensor"),
    ):
        with pytest.raises(TypeError, match=said):
            LinearCFPOLoss(head=head)  # type: ignore[arg-type]
    LinearCFPOLoss(head=Plain(16, 203))


# The module.


@pytest.mark.parametrize("bias", [False, True])
def test_the_module_runs_in_the_heads_forward(bias: bool) -> None:
    case = make(bias=bias)
    head = nn.Linear(16, 203, bias=bias)
    head.weight.data = case.weight.clone()
    if case.bias is not None:
        head.bias.data = case.bias.clone()
    seen: list[str] = []
    head.register_forward_pre_hook(lambda *_: seen.append("before"))
    head.register_forward_hook(lambda *_: seen.append("after"))
    criterion = LinearCFPOLoss(0.1, head=head, chunk_tokens=16)
    assert list(criterion.parameters()) == [] and list(criterion.children()) == []
    hidden = case.hidden.clone().requires_grad_()
    loss, stats = criterion(
        hidden, case.token_ids, case.advantages, case.old_logps, return_stats=True, kl_coef=0.0
    )
    loss.backward()
    assert seen == ["before", "after"]
    want = linear(case, objective=CFPO(0.1), stats=True, chunk_tokens=16)
    assert torch.equal(loss.detach(), want.loss) and want.stats is not None
    assert torch.equal(stats.logps, want.stats.logps)
    assert torch.equal(hidden.grad, want.gradients["hidden"])
    assert torch.equal(head.weight.grad, want.gradients["weight"])
    # Afterwards it is a head as before, whatever happened.
    assert torch.equal(head(case.hidden), nn.functional.linear(case.hidden, head.weight, head.bias))
    with pytest.raises(IndexError):
        criterion(hidden, case.token_ids + 203, case.advantages)
    assert "forward" not in vars(head)
    assert head(case.hidden).shape == (37, 203)


def test_the_module_without_a_head() -> None:
    case = make()
    criterion = LinearCFPOLoss(0.3, reduction="sum", epsilon_high=0.5)
    arguments = (case.hidden, case.weight, case.token_ids, case.advantages, case.old_logps)
    want = linear(case, objective=CFPO(0.3, epsilon_high=0.5), reduction="sum").loss
    assert torch.equal(criterion(*arguments), want)
    assert criterion(*arguments, reduction="none").shape == (37,)
    assert repr(criterion) == "LinearCFPOLoss(epsilon=0.3, reduction='sum', epsilon_high=0.5)"


def test_settings_of_the_module() -> None:
    with pytest.raises(TypeError, match="LinearCFPOLoss got unknown arguments: eps, inplace"):
        LinearCFPOLoss(inplace=True, eps=0.1)
    with pytest.raises(ValueError, match="epsilon"):
        LinearCFPOLoss(-0.1)
    with pytest.raises(TypeError, match="missing"):
        LinearCFPOLoss(head=nn.Linear(16, 203))(torch.zeros(2, 16))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("name", ["hidden", "weight", "bias", "u", "lora", "hidden and weight"])
def test_float64_is_right_or_refused_by_name(name: str, low_memory: bool, backend: str) -> None:
    case = make(bias=True, rank=3, low_memory=low_memory, backend=backend, chunk_tokens=16)
    if name in ("hidden", "weight"):  # which of the two says what operands are
        case.options["logits_dtype"] = torch.float64
    for parameter in name.split(" and "):
        setattr(case, parameter, getattr(case, parameter).double())
    if backend == "reference" and name != "hidden":
        case.options.pop("backend")
        check(linear(case, backend=backend), whole(case))
        return
    said = "logits_dtype" if backend == "reference" else "float64 needs backend='reference'"
    shown = {"u": r"lora\[0\]", "lora": r"lora\[1\]"}.get(name, name.split()[0])
    with pytest.raises((TypeError, ValueError), match=said) as error:
        linear(case)
    assert backend == "reference" or error.match(f"^{shown} must be")


@pytest.mark.parametrize(
    ("temperature", "scale", "got"),
    [
        (1e30, 1e-9, r"1e\+30 / 1e-09 = 1e\+39"),
        (1e-6, 1e4, r"1e-06 / 10000 = 1e-10"),
        (torch.tensor(1e-6), 1e4, r"= 1e-10 at \[0\]"),
        (torch.tensor([1.0, 1e-6, 1e-6]), 1e4, r"= 1e-10 at \[1\]"),
    ],
    ids=str,
)
@pytest.mark.parametrize("support", [None, torch.tensor([[0, 1]] * 3)], ids=["all", "support"])
def test_temperature_and_scale_together(
    temperature: Any, scale: float, got: str, support: Tensor | None
) -> None:
    ids, mask = torch.tensor([0, 1, 0]), torch.tensor([1, 1, 0])
    how: dict[str, Any] = {"temperature": temperature, "logit_scale": scale, "support": support}
    said = f"temperature / logit_scale must be from 1e-06 to 1e\\+30, got .*{got}"
    with pytest.raises(ValueError, match=said):
        cfpo_kernels.linear_token_logps(torch.ones(3, 8), torch.ones(5, 8), ids, mask=mask, **how)
    # Where it is masked the temperature may be anything, and where it is 1 the scale does no harm.
    if isinstance(temperature, Tensor) and temperature.dim():
        mask[1] = 0
    else:
        how["temperature"] = 1.0
    found = cfpo_kernels.linear_token_logps(
        torch.ones(3, 8), torch.ones(5, 8), ids, mask=mask, **how
    )
    want = -torch.tensor(5.0 if support is None else 2.0).log() * mask
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize("support", [False, True])
@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize(("n_tokens", "rank"), [(0, 2), (3, 0), (0, 0)])
def test_no_tokens_and_adapters_of_rank_0(
    n_tokens: int, rank: int, low_memory: bool, support: bool
) -> None:
    shapes = ((n_tokens, 8), (5, 8), (n_tokens, rank), (5, rank))
    hidden, weight, u, b = (torch.randn(shape).requires_grad_() for shape in shapes)
    ids = torch.zeros(n_tokens, dtype=torch.int64)
    how = {"support": torch.tensor([0, 3]).expand(n_tokens, 2)} if support else {}
    adapted = cfpo_kernels.linear_token_logps(hidden, weight, ids, lora=(u, b), **how)
    plain = cfpo_kernels.linear_token_logps(hidden, weight, ids, **how)
    assert isinstance(adapted, Tensor) and isinstance(plain, Tensor)
    assert adapted.shape == (n_tokens,) and torch.equal(adapted, plain)
    if not support:
        how["low_memory"] = low_memory
    loss = cfpo_kernels.linear_cfpo_loss(
        hidden, weight, ids, torch.ones(n_tokens), lora=(u, b), **how
    )
    assert isinstance(loss, Tensor)
    loss.backward()
    for x in (hidden, weight, u, b):
        assert x.grad is not None and x.grad.shape == x.shape
    assert bool(weight.grad.any()) is bool(n_tokens)  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_double_backward_of_a_support_says_what_is_true(backend: str) -> None:
    """From hidden states no backend can; from whole logits one can."""
    hidden = torch.randn(2, 8, requires_grad=True)
    ids, support = torch.tensor([0, 1]), torch.tensor([[0, 1], [1, 2]])
    loss = cfpo_kernels.linear_cfpo_loss(
        hidden, torch.randn(5, 8), ids, torch.ones(2), support=support, backend=backend
    )
    with pytest.raises(RuntimeError, match="from whole logits, backend='reference'"):
        torch.autograd.grad(loss, hidden, create_graph=True)  # type: ignore[arg-type]


def test_sizes_of_tiles_beyond_memory() -> None:
    given = torch.ones(2, 8), torch.ones(5, 8), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="chunk_tokens must be at most 16777216, got 4611686"):
        cfpo_kernels.linear_token_logps(*given, chunk_tokens=2**62)
    # No more than there are tokens are ever picked.
    found = cfpo_kernels.linear_token_logps(*given, active_tokens=2**70)
    assert torch.equal(found, cfpo_kernels.linear_token_logps(*given))  # type: ignore[arg-type]


def test_the_module_takes_no_bias_beside_a_head() -> None:
    with pytest.raises(TypeError, match="bias must not be given beside head="):
        LinearCFPOLoss(head=nn.Linear(8, 5), bias=torch.zeros(5))
    criterion = LinearCFPOLoss(head=nn.Linear(8, 5))
    with pytest.raises(TypeError, match="bias must not be given beside head="):
        criterion(torch.ones(2, 8), torch.tensor([0, 1]), torch.ones(2), bias=torch.zeros(5))


def test_a_copy_of_the_model_has_a_loss_of_its_own_head() -> None:
    """And a copy of the loss alone has a head of its own, as its docstring says."""
    model = nn.Module()
    model.head = nn.Linear(8, 5)
    model.criterion = LinearCFPOLoss(head=model.head)
    copied = copy.deepcopy(model)
    assert copied.criterion._head[0] is copied.head is not model.head
    assert copy.deepcopy(model.criterion)._head[0] is not model.head
