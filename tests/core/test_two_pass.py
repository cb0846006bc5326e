"""Sequence-level ratios and objectives written in torch: against float64, padded and packed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from golden_shapes import SHAPES
from naive_objectives import naive_policy
from oracle import logps64
from torch import Tensor

import cfpo_kernels
from cfpo_kernels import CISPO, TokenTerms, sequences
from cfpo_kernels.objectives import OBJECTIVES, Objective

B, T, V = 4, 6, 60
LENGTHS = torch.tensor([6, 3, 1, 5])
MASK = torch.arange(T) < LENGTHS[:, None]
CU_SEQLENS = torch.tensor([0, 6, 9, 10, 15])
BACKENDS = ("cpu", "reference")


class Batch:
    """A padded batch of odd lengths and, by `packed`, the same tokens without padding."""

    def __init__(self, seed: int = 0, spread: float = 0.15) -> None:
        g = torch.Generator().manual_seed(seed)
        self.logits = torch.randn(B, T, V, generator=g)
        self.ids = torch.randint(0, V, (B, T), generator=g)
        self.old = (
            logps64(self.logits, self.ids) - spread * torch.randn(B, T, generator=g)
        ).float()
        self.ref = (self.old + 0.1 * torch.randn(B, T, generator=g)).float()
        self.weights = 0.5 + torch.rand(B, T, generator=g)
        self.by_sequence = torch.tensor([1.0, -1.5, 0.7, -0.4])
        self.by_token = torch.randn(B, T, generator=g)

    def run(
        self, *, packed: bool = False, by_token: bool = False, backend: str = "cpu", **options: Any
    ) -> tuple[Tensor, Tensor]:
        """The loss and the gradient (B, T, V), whatever the layout."""

        def layout(x: Tensor) -> Tensor:
            return x[MASK] if packed else x

        leaf = layout(self.logits).clone().requires_grad_()
        advantages = layout(self.by_token) if by_token else self.by_sequence
        given = {
            name: layout(x) if isinstance(x, Tensor) and x.shape == (B, T) else x
            for name, x in options.items()
        }
        given |= {"cu_seqlens": CU_SEQLENS} if packed else {"mask": MASK}
        if backend == "from_logps":
            logps = cfpo_kernels.token_logps(leaf, layout(self.ids), mask=given.get("mask"))
            loss = cfpo_kernels.policy_loss_from_logps(logps, advantages, layout(self.old), **given)
        else:
            loss = cfpo_kernels.policy_loss(
                leaf, layout(self.ids), advantages, layout(self.old), backend=backend, **given
            )
        loss.sum().backward()
        assert leaf.grad is not None
        if not packed:
            return loss.detach(), leaf.grad
        gradient = torch.zeros(B, T, V)
        gradient[MASK] = leaf.grad
        return loss.detach(), gradient


def naive(
    batch: Batch, objective: Objective, *, by_token: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """GSPO, or GSPO-token, as the paper writes it, with loops and in float64; token-mean."""
    leaf = batch.logits.double().requires_grad_()
    logps = logps64(leaf, batch.ids)
    advantages = batch.by_token if by_token else batch.by_sequence[:, None].expand(B, T)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(B):
        n = int(LENGTHS[i])
        log_ratio = logps[i, :n] - batch.old[i, :n]
        s = log_ratio.mean().expand(n)
        own = log_ratio.mean().detach() + log_ratio - log_ratio.detach()
        bounds = options.get("log_ratio_bounds")
        if bounds is not None:
            low, high = (torch.as_tensor(bound, dtype=torch.float64) for bound in bounds)
            bounds = low.expand(n), high.expand(n)
        a = advantages[i, :n].double()
        loss = naive_policy(objective, logps[i, :n], own if by_token else s, a, bounds)
        loss = loss * options.get("token_weights", torch.ones(B, T))[i, :n]
        if "kl_coef" in options:
            d = batch.ref[i, :n] - logps[i, :n]
            kl = d.exp() - d - 1
            kl = kl * own.exp() if options.get("kl_ratio_weighted") else kl
            loss = loss + options["kl_coef"] * kl
        total = total + loss.sum()
    total = total / LENGTHS.sum()
    total.backward()
    assert leaf.grad is not None
    return total.detach(), leaf.grad


def assert_near(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> None:
    assert got[0].item() == pytest.approx(want[0].item(), rel=1e-5, abs=1e-6)
    error = (got[1].double() - want[1]).norm(dim=-1)
    # The least that a row is measured against: a token's mean gradient.
    floor = 0.1 * want[1].norm() / math.sqrt(B * T)
    assert (error <= 2e-5 * want[1].norm(dim=-1) + 2e-5 * floor).all()


NAMED = [
    OBJECTIVES[name](**arguments)
    for name, arguments in (
        ("ppo_clip", {"epsilon_low": 0.05, "epsilon_high": 0.04}),
        ("cfpo", {}),
        ("cispo", {"low": 0.95, "high": 1.02}),
        ("sapo", {}),
        ("gppo", {"epsilon_low": 0.05, "epsilon_high": 0.05}),
        ("reinforce", {"drift": 0.2}),
    )
]


@pytest.mark.parametrize("objective", NAMED, ids=lambda o: o.name)
@pytest.mark.parametrize("by_token", [False, True], ids=["gspo", "gspo_token"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("backend", [*BACKENDS, "from_logps"])
def test_sequence_ratios(objective: Objective, by_token: bool, packed: bool, backend: str) -> None:
    batch = Batch()
    options = {"ratio_level": "sequence", "objective": objective}
    got = batch.run(packed=packed, by_token=by_token, backend=backend, **options)
    assert_near(got, naive(batch, objective, by_token=by_token))
    token = batch.run(packed=packed, by_token=by_token, backend=backend, objective=objective)
    if objective.name != "reinforce" or objective.drift:
        assert not torch.allclose(got[1], token[1], rtol=1e-3)  # the level matters


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("by_token", [False, True])
def test_sequence_ratios_with_everything(by_token: bool, weighted: bool) -> None:
    """The KL term brings a token's gradient to no other, whatever weighs it."""
    batch = Batch()
    objective = OBJECTIVES["ppo_clip"]()
    options = {
        "token_weights": batch.weights,
        "kl_coef": 0.5,
        "kl_ratio_weighted": weighted,
        "log_ratio_bounds": (-0.03, 0.02),
    }
    got = batch.run(
        by_token=by_token,
        objective=objective,
        ratio_level="sequence",
        ref_logps=batch.ref,
        **options,
    )
    assert_near(got, naive(batch, objective, by_token=by_token, **options))


def test_in_place_and_padded_or_packed_are_bitwise_the_same() -> None:
    batch = Batch()
    options = {"objective": NAMED[0], "ratio_level": "sequence", "reduction": "sum"}
    padded, packed = batch.run(**options), batch.run(packed=True, **options)
    assert torch.equal(padded[1], packed[1])
    assert torch.equal(padded[1], batch.run(inplace=True, **options)[1])
    batch.logits[0, 0] = torch.nan  # of one sequence
    assert torch.equal(batch.run(**options)[1][1:], padded[1][1:])


def one_sided(terms: TokenTerms) -> Tensor:
    """GMPO, arXiv 2507.20673, with clips of 0.1 in log r."""
    sign = terms.advantages.sign()
    x = sign * torch.minimum(sign * terms.log_ratio, (sign * terms.log_ratio).clamp(-0.1, 0.1))
    mean = sequences.sequence_mean(x, terms.mask)[:, None]
    return -mean.exp() * terms.advantages


def vespo(terms: TokenTerms) -> Tensor:
    """TRL's, with its defaults 2, 3, 3, 2."""
    up = terms.advantages >= 0
    k, rate = torch.where(up, 2.0, 3.0), torch.where(up, 3.0, 2.0)
    x = sequences.sequence_sum(terms.log_ratio.detach(), terms.mask)[:, None]
    phi = (rate + k * x - rate * x.exp()).exp()
    return -phi * terms.advantages * terms.logps


def minpro(terms: TokenTerms) -> Tensor:
    """arXiv 2601.22718: r_t times the least ratio before it."""
    x = terms.log_ratio.detach()
    least = sequences.prefix_min(x, terms.mask, exclusive=True, empty=0.0)
    weight = (x + least).exp().clamp(1 - 0.2, 1 + 0.28)
    return -weight * terms.advantages * terms.logps


WRITTEN: dict[str, Any] = {
    "gspo": ("ratio_level", "seq-mean-token-mean"),
    "luspo": ("ratio_level", "seq-mean-token-sum"),
    "gmpo": (one_sided, "seq-mean-token-mean"),
    "vespo": (vespo, "token-mean"),
    "minpro": (minpro, "token-mean"),
}


@pytest.mark.parametrize("row", SHAPES["sequence"], ids=lambda row: str(row["objective"]))
def test_golden_sequences(row: dict) -> None:
    objective, reduction = WRITTEN[row["objective"]]
    options: dict[str, Any] = {"objective": objective, "reduction": reduction}
    if objective == "ratio_level":
        parameters = row["parameters"] or {"epsilon_low": 3e-4, "epsilon_high": 4e-4}
        options["objective"] = OBJECTIVES["ppo_clip"](**parameters)
        options["ratio_level"] = "sequence"
    logps = torch.tensor(row["logps"], dtype=torch.float64, requires_grad=True)
    advantages = torch.tensor(row["advantages"], dtype=torch.float64)
    old = torch.tensor(row["old_logps"], dtype=torch.float64)
    mask = torch.tensor(row["mask"])
    loss = cfpo_kernels.policy_loss_from_logps(logps, advantages, old, mask=mask, **options)
    assert isinstance(loss, Tensor)
    loss.backward()
    assert loss.item() == pytest.approx(row["loss"], rel=1e-12)
    torch.testing.assert_close(logps.grad, torch.tensor(row["dlogps"], dtype=torch.float64))


# Objectives of a user's own


def ppo(terms: TokenTerms) -> Tensor:
    r = terms.log_ratio.exp()
    return -torch.minimum(r * terms.advantages, r.clamp(0.8, 1.2) * terms.advantages)


def gmpo(terms: TokenTerms) -> Tensor:
    """The geometric mean of one-sidedly clipped ratios, arXiv 2507.20673; by sequence."""
    sign = terms.advantages.sign()
    x = sign * torch.minimum(sign * terms.log_ratio, (sign * terms.log_ratio).clamp(-0.4, 0.4))
    mean = (x * terms.mask).sum(-1, keepdim=True) / terms.mask.sum(-1, keepdim=True)
    return -mean.exp() * terms.advantages


def cautious(terms: TokenTerms) -> Tensor:
    assert terms.entropy is not None
    return -terms.log_ratio.exp() * terms.advantages * (1 - 0.1 * terms.entropy)


cautious.needs_entropy = True  # type: ignore[attr-defined]


def naive_callable(batch: Batch, function: Any, weights: Tensor | None = None) -> Any:
    leaf = batch.logits.double().requires_grad_()
    rows = torch.where(MASK[..., None], leaf, 0.0)
    log_p = torch.log_softmax(rows, -1)
    logps = torch.where(MASK, log_p.gather(-1, batch.ids[..., None]).squeeze(-1), 0.0)
    old = torch.where(MASK, batch.old.double(), 0.0)
    entropy = torch.where(MASK, -(log_p.exp() * log_p).sum(-1), 0.0)
    a = batch.by_sequence[:, None].expand(B, T).double()
    terms = TokenTerms(logps, old, logps - old, a, entropy, None, None, MASK, None)
    loss = function(terms) * (1 if weights is None else weights)
    total = torch.where(MASK, loss, 0.0).sum() / MASK.sum()
    total.backward()
    return total.detach(), leaf.grad


@pytest.mark.parametrize("function", [ppo, gmpo, cautious], ids=lambda f: f.__name__)
@pytest.mark.parametrize("backend", [*BACKENDS, "inplace"])
def test_callables_against_float64(function: Any, backend: str) -> None:
    batch = Batch()
    how = {"inplace": True} if backend == "inplace" else {"backend": backend}
    assert_near(batch.run(objective=function, **how), naive_callable(batch, function))
    got = batch.run(objective=function, token_weights=batch.weights, **how)
    assert_near(got, naive_callable(batch, function, batch.weights))


def test_a_callable_is_the_named_objective_that_it_writes() -> None:
    batch = Batch(spread=0.3)
    named = batch.run(objective=OBJECTIVES["ppo_clip"]())
    for backend in (*BACKENDS, "from_logps"):
        got = batch.run(objective=ppo, backend=backend)
        torch.testing.assert_close(got[1], named[1], rtol=1e-4, atol=1e-8)
    everything = {"kl_coef": 0.1, "ref_logps": batch.ref, "entropy_coef": 0.05}
    named = batch.run(objective=OBJECTIVES["ppo_clip"](), **everything)
    got = batch.run(objective=ppo, **everything)
    torch.testing.assert_close(got[1], named[1], rtol=1e-4, atol=1e-8)


def test_what_a_callable_is_given() -> None:
    batch, seen = Batch(), []

    def look(terms: TokenTerms) -> Tensor:
        seen.append(terms)
        return terms.logps * 0

    batch.logits[~MASK] = torch.nan
    batch.old[~MASK] = torch.inf
    batch.run(objective=look, token_weights=batch.weights)
    (terms,) = seen
    for name, x in terms._asdict().items():
        if name in ("entropy", "ref_logps", "cu_seqlens"):
            assert x is None
        else:
            assert x.shape == (B, T) and x.isfinite().all(), name
            assert x.requires_grad == (name in ("logps", "log_ratio")), name
            assert not x[~MASK].any(), name
    batch.run(objective=look, ratio_level="sequence", packed=True)
    terms = seen[-1]
    assert terms.logps.shape == (15,) and terms.cu_seqlens is CU_SEQLENS
    assert (terms.log_ratio[:6] - terms.log_ratio[0]).abs().max() == 0


def test_a_weight_of_zero_silences_a_callable() -> None:
    batch = Batch()
    batch.old[0, 0] = -400.0  # r overflows
    weights = torch.ones(B, T)
    weights[0, 0] = 0.0

    def clamped(terms: TokenTerms) -> Tensor:
        return -terms.log_ratio.clamp(max=500).exp() * terms.advantages

    loss, _ = batch.run(objective=clamped, token_weights=weights)
    assert loss.isfinite()


REFUSED = {
    "shape": (lambda t: t.logps.sum(), ValueError, r"loss a token, of shape \(4, 6\), got \(\)"),
    "type": (lambda t: 1.0, TypeError, "must return a floating-point tensor, got float"),
    "dtype": (lambda t: t.mask, TypeError, "got a tensor of torch.bool"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_results(name: str) -> None:
    function, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        Batch().run(objective=function)


def test_a_gradient_that_would_be_lost_is_refused() -> None:
    learned = torch.ones(3, 1, requires_grad=True)

    def with_parameter(terms: TokenTerms) -> Tensor:
        return terms.logps * learned.sum()

    with pytest.raises(ValueError, match=r"with_parameter depends on a tensor of shape \(3, 1\)"):
        Batch().run(objective=with_parameter)


def test_refusals_name_the_way_out() -> None:
    v = torch.zeros(3)
    with pytest.raises(TypeError, match=r"the class CISPO itself: write CISPO\(\)$"):
        cfpo_kernels.policy_loss_from_logps(v, v, objective=CISPO)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"write PowerIS\(\.\.\.\)$"):
        cfpo_kernels.policy_loss_from_logps(v, v, objective=cfpo_kernels.PowerIS)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="log_ratio_bounds must be None for a callable"):
        cfpo_kernels.policy_loss_from_logps(v, v, objective=ppo, log_ratio_bounds=(-1, 1))
    with pytest.raises(ValueError, match="ratio_level='sequence' needs sequences"):
        cfpo_kernels.cfpo_loss_from_logps(v, v, ratio_level="sequence")
    with pytest.raises(ValueError, match="ratio_level must be one of 'token', 'sequence'"):
        cfpo_kernels.cfpo_loss_from_logps(v, v, ratio_level="batch")
    with pytest.raises(ValueError, match=r"or one a sequence, \(2,\)"):
        bounds = torch.tensor([0, 1, 3])
        cfpo_kernels.cfpo_loss_from_logps(v, torch.zeros(4), cu_seqlens=bounds)


def test_statistics_of_sequences() -> None:
    batch = Batch()
    options = {"objective": NAMED[0], "ratio_level": "sequence", "mask": MASK}
    _, stats = cfpo_kernels.policy_loss(
        batch.logits, batch.ids, batch.by_sequence, batch.old, return_stats=True, **options
    )
    x = torch.where(MASK, logps64(batch.logits, batch.ids) - batch.old, 0.0)
    mean = x.sum(-1) / LENGTHS
    s = mean.exp()[:, None].expand(B, T)[MASK]
    a = batch.by_sequence[:, None].expand(B, T)[MASK]
    outside = (s < 0.95) | (s > 1.04)
    dropped = ((s < 0.95) & (a < 0)) | ((s > 1.04) & (a > 0))
    assert outside.any() and dropped.any()
    assert stats.ratio_mean.item() == pytest.approx(s.mean().item(), rel=1e-5)
    assert stats.outside_fraction.item() == pytest.approx(outside.double().mean().item())
    assert stats.dropped_fraction.item() == pytest.approx(dropped.double().mean().item())
    _, stats = cfpo_kernels.policy_loss(
        batch.logits, batch.ids, batch.by_sequence, objective=ppo, mask=MASK, return_stats=True
    )
    assert stats.dropped_fraction.isnan() and stats.outside_fraction.isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_sum_exp(backend: str) -> None:
    batch = Batch()
    temperature = 0.5 + torch.rand(B, T)
    leaf = batch.logits.clone().requires_grad_()
    how = {"mask": MASK, "temperature": temperature, "backend": backend}
    logps, entropy, lse = cfpo_kernels.token_logps(
        leaf, batch.ids, return_entropy=True, return_lse=True, **how
    )
    want = torch.logsumexp(batch.logits.double() / temperature[..., None], -1)
    torch.testing.assert_close(lse[MASK].double(), want[MASK], rtol=2e-7, atol=2e-7)
    assert not lse[~MASK].any() and not lse.requires_grad and lse.dtype == torch.float32
    assert entropy.requires_grad and logps.requires_grad
    pair = cfpo_kernels.token_logps(batch.logits, batch.ids, return_lse=True, **how)
    assert len(pair) == 2 and torch.equal(pair[1], lse)


def test_compiles() -> None:
    batch = Batch()
    for options in ({"objective": gmpo}, {"objective": NAMED[0], "ratio_level": "sequence"}):
        torch._dynamo.reset()

        def loss(leaf: Tensor, options: Any = options) -> Any:
            return cfpo_kernels.policy_loss(
                leaf, batch.ids, batch.by_sequence, batch.old, mask=MASK, **options
            )

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        leaves = [batch.logits.clone().requires_grad_() for _ in range(2)]
        compiled(leaves[0]).backward()
        loss(leaves[1]).backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
