"""The cases of the battery: what they are made of, and what is right for them.

The short battery covers every path of the kernels that the public functions can take, with at most
twelve variants of Triton's kernels for each dtype, since each of them takes seconds to compile. The
long one crosses options, objectives and layouts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .. import reference
from ..backends.base import KernelRows, KernelTerms
from ..formula import loss_of_logps
from ..inputs import LossSettings, TokenInputs
from ..objectives import CFPO, DPPO, SAPO, Objective, PPOClip
from .compare import Exact

# How the rows of one case differ from each other, by turns. The first five are what few rows have.
KINDS = ("inside", "outside", "masked", "confident", "banned", "no advantage", "offset", "wide")
# log r of a row; none of them on a boundary, where the last bit of log p would decide.
LOG_RATIOS = (0.05, -0.4, 0.0, 0.11, -0.05, 0.3, 0.0, -0.15, 0.6)
CONFIDENT = 0.99999
OFFSET = 500.0
SOFTCAP = 30.0  # Gemma 2's


@dataclass(frozen=True)
class Case:
    """One call or a few with the same inputs."""

    group: str
    n_cols: int
    many: bool = True  # rows for all of the device; else so few that they may be split
    layout: str = "whole"  # "sliced": x[:, :-1] of (2, T, V); "late": not where a vector begins
    inplace: bool = False
    # "train": loss and gradient; "loss": without a gradient; "score": log-probs; "on-policy": the
    # loss of what was just scored; "backward": the gradient of log-probs; "shards": the same from
    # two halves of the columns; "multiply".
    call: str = "train"
    entropy: bool = False
    everything: bool = False  # KL, entropy bonus, weights, a temperature a row, a gradient scale
    kl_estimator: str = "k3"
    kl_ratio_weighted: bool = False
    objective: Objective = field(default_factory=CFPO)
    softcap: float = 0.0

    def problem(self) -> Case:
        """What decides the numbers; the rest only says where they lie. The same for cases that can
        share inputs and exact results."""
        return replace(self, group="", layout="whole", inplace=False)

    def __str__(self) -> str:
        options = [self.layout] if self.layout != "whole" else []
        options += ["in place"] if self.inplace else []
        options += ["few rows"] if not self.many else []
        options += [type(self.objective).__name__] if self.call in ("train", "loss") else []
        options += ["KL, entropy, weights, temperatures"] if self.everything else []
        options += ["entropy"] if self.entropy else []
        options += ["softcap"] if self.softcap else []
        return f"{self.call}, V = {self.n_cols}" + "".join(f", {option}" for option in options)


def short() -> list[Case]:
    """The battery of a first use."""
    cases = [
        Case("long", v, layout=layout, inplace=inplace)
        for v in (128256, 100352, 131072, 151936)
        for layout in ("whole", "sliced")
        for inplace in (False, True)
    ]
    cases += [
        Case("few long rows", v, many=False, inplace=inplace)
        for v in (128256, 262144)
        for inplace in (False, True)
    ]
    for v in (32001, 50257, 50265):
        cases += [
            Case("odd", v),
            Case("odd", v, inplace=True),
            Case("odd", v, layout="sliced", inplace=True),
        ]
    clip = PPOClip(0.2, 0.28, dual_clip=3.0)
    cases += [
        Case("everything", v, layout=layout, inplace=inplace, everything=True, objective=clip)
        for v in (32000, 50280)
        for layout in ("whole", "sliced")
        for inplace in (False, True)
    ]
    cases += [
        Case("short", v, layout=layout, inplace=inplace)
        for v in (64, 1000, 2048)
        for layout in ("whole", "sliced")
        for inplace in (False, True)
    ]
    cases += [
        Case("tiny", v, inplace=inplace)
        for v in (1, 2, 3, 7, 33, 257, 999)
        for inplace in (False, True)
    ]
    # Each shape has cases, and none a variant of Triton's kernels that another could have had.
    cases += [Case("misaligned", v, layout="late", objective=SAPO()) for v in (8, 1000, 2040)]
    cases += [Case("score", v, call="score", entropy=True) for v in (32001, 50257, 50265)]
    cases += [Case("score", v, call="score") for v in (100352, 128256, 151936)]
    cases += [Case("on-policy", 50257, call="on-policy", entropy=True)]
    cases += [Case("on-policy", 100352, call="on-policy")]
    cases += [
        Case("backward", v, call="backward", inplace=inplace)
        for v in (100352, 128256, 151936)
        for inplace in (False, True)
    ]
    # Halves with vectors, tiles and thus Triton kernels of their own would be new ones.
    cases += [Case("shards", 151936, call="shards", inplace=inplace) for inplace in (False, True)]
    cases += [
        Case("softcap", 128256, softcap=SOFTCAP, inplace=True),
        Case("softcap", 128256, softcap=SOFTCAP, many=False),
        Case("softcap", 50257, softcap=SOFTCAP),
        Case("softcap", 32000, softcap=SOFTCAP, everything=True, objective=clip),
        Case("softcap", 64, softcap=SOFTCAP),
        Case("softcap", 128256, softcap=SOFTCAP, call="backward"),
    ]
    cases += [Case("multiply", v, call="multiply") for v in (100352, 128256)]
    return cases


def long() -> list[Case]:
    """Everything, for a release or a report."""
    cases = short()
    clip = PPOClip(0.2, 0.28, dual_clip=3.0)
    objectives: tuple[Objective, ...] = (CFPO(0.1), clip, SAPO(drift=0.1))
    for v in (7, 1000, 4099, 32000, 50257, 128256, 262144):
        for objective in objectives:
            for kl_estimator in ("k1", "k2", "k3", "k1+", "k3+"):
                options = {"objective": objective, "kl_estimator": kl_estimator}
                cases += [
                    Case("everything", v, everything=True, inplace=inplace, many=many, **options)  # type: ignore[arg-type]
                    for inplace in (False, True)
                    for many in (False, True)
                ]
            cases.append(Case("loss", v, call="loss", objective=objective))
            cases.append(Case("loss", v, call="loss", objective=objective, everything=True))
        for layout in ("whole", "sliced", "late"):
            for call in ("train", "backward", "shards", "score"):
                for many in (False, True):
                    case = Case("layouts", v, layout=layout, call=call, many=many)
                    cases += [case]
                    if call != "train":
                        cases += [replace(case, entropy=True)]
        for call in ("train", "backward", "shards"):
            for many in (False, True):
                case = Case("softcap", v, call=call, softcap=SOFTCAP, many=many)
                cases += [case, replace(case, inplace=True, entropy=call != "train")]
        bounds = Case("bounds", v, everything=True, objective=DPPO(1.3, drift=0.1))
        cases += [bounds, replace(bounds, kl_ratio_weighted=True)]
        cases += [Case("on-policy", v, call="on-policy", many=many) for many in (False, True)]
        cases.append(Case("multiply", v, call="multiply", layout="late"))
    return list(dict.fromkeys(cases))


@dataclass(frozen=True)
class Inputs:
    """What a case hands to the kernels, on the device, and the rows that it is judged by."""

    rows: KernelRows
    terms: KernelTerms
    kinds: Tensor  # (N,) int64, index in KINDS
    dlogps: Tensor  # (N,) float32: what arrives at the log-probs in "backward"
    dentropy: Tensor | None
    factors: Tensor  # (N,) float32 of "multiply"

    @property
    def active(self) -> Tensor:
        return self.rows.weights != 0

    def laid_out(self, layout: str) -> Inputs:
        """The same with logits of their own, in memory as the layout says."""
        return replace(self, rows=self.rows._replace(logits=_laid_out(self.rows.logits, layout)))


def _laid_out(values: Tensor, layout: str) -> Tensor:
    """A copy of values (N, V), N even if sliced; what lies between the rows is NaN."""
    n_rows, n_cols = values.shape
    if layout == "sliced":
        base = values.new_full((2, n_rows // 2 + 1, n_cols), torch.nan)
        view = base[:, :-1]
        view.copy_(values.view(2, -1, n_cols))
        return view
    if layout == "late":
        base = values.new_full((n_rows * n_cols + 8,), torch.nan)
        view = base[1 : 1 + n_rows * n_cols].view(n_rows, n_cols)
        view.copy_(values)
        return view
    return values.clone()


def make_inputs(case: Case, dtype: torch.dtype, device: torch.device, n_rows: int) -> Inputs:
    """Rows of every kind, contiguous; the same for the same problem on the same kind of device."""
    n_cols = case.n_cols
    generator = torch.Generator("cpu").manual_seed(n_cols)
    on_device = torch.Generator(device).manual_seed(n_cols)

    def uniform(low: float, high: float) -> Tensor:
        values = torch.rand(n_rows, generator=generator, dtype=torch.float32, device="cpu")
        return (low + (high - low) * values).to(device)

    kinds = _counted(n_rows, device) % len(KINDS)
    token_ids = torch.randint(
        n_cols, (n_rows,), generator=generator, dtype=torch.int64, device="cpu"
    ).to(device)
    temperature = uniform(0.7, 1.3) if case.everything else _numbers([1.0], device)

    x = torch.empty((n_rows, n_cols), dtype=torch.float32, device=device)
    x.normal_(generator=on_device)
    x *= 2.0 + 4.0 * (kinds == KINDS.index("wide")).float()[:, None]
    banned = kinds[:, None] == KINDS.index("banned")
    x.masked_fill_(banned & (_counted(n_cols, device) % 3 == 1), -math.inf)
    # Lifted, so that p of the token runs from 1 / V to nearly 1, as it does in training.
    others = x.scatter(1, token_ids[:, None], -math.inf).logsumexp(-1)
    lift = torch.where(
        kinds == KINDS.index("confident"),
        _numbers([math.log(CONFIDENT / (1 - CONFIDENT))], device),
        uniform(-3.0, 1.0),
    )
    target = torch.where(others == -math.inf, 0.0, others + lift)
    x.scatter_(1, token_ids[:, None], target[:, None])
    if not case.softcap:  # it would make all logits the same
        x += torch.where(kinds == KINDS.index("offset"), OFFSET, 0.0)[:, None]
    x[kinds == KINDS.index("masked")] = math.nan
    logits = x.to(dtype)

    active = kinds != KINDS.index("masked")
    weights = active.to(torch.float32)
    advantages = torch.where(
        kinds == KINDS.index("no advantage"), 0.0, uniform(0.5, 1.5) * _signs(n_rows, device)
    )
    logps, *_ = reference.token_logps(
        logits.double(),
        token_ids,
        active,
        temperature.double(),
        False,
        False,
        softcap=case.softcap,
    )
    log_ratios = _numbers(LOG_RATIOS, device)[_counted(n_rows, device) % len(LOG_RATIOS)]
    # Where the advantage is 0 nothing may come of it, whatever r is; unless something else has r.
    idle = 3.0 if case.kl_ratio_weighted or case.objective.shape().drift else 1e4
    log_ratios = torch.where(kinds == KINDS.index("no advantage"), idle, log_ratios)
    old_logps = (logps - log_ratios).float()
    inputs = TokenInputs(advantages, old_logps)
    settings = LossSettings(case.objective.shape(), case.kl_estimator)
    grad_scale = None
    if case.everything:
        bounds: tuple[Tensor | None, Tensor | None] = (None, None)
        if case.objective.bounded is not None:
            # Clear of every one of LOG_RATIOS.
            low, high = uniform(-0.22, -0.2), uniform(0.2, 0.22)
            bounds = case.objective.bounds_of(low, high, advantages)
        inputs = TokenInputs(
            advantages,
            old_logps,
            uniform(0.5, 1.5),
            (logps + uniform(-0.3, 0.3)).float(),
            *bounds,
        )
        settings = settings._replace(
            kl_ratio_weighted=case.kl_ratio_weighted, kl_coef=0.1, entropy_coef=0.05
        )
        grad_scale = torch.full((), 64.0, dtype=torch.float32, device=device)
    terms = KernelTerms(inputs, settings, grad_scale)
    rows = KernelRows(logits, token_ids, weights, temperature, softcap=case.softcap)
    dentropy = uniform(-0.5, 0.5) if case.entropy else None
    factors = torch.where(kinds % 2 == 0, 1.0, uniform(0.5, 2.0))
    return Inputs(rows, terms, kinds, uniform(-1.0, 1.0), dentropy, factors)


def _numbers(values: list[float] | tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def _signs(n: int, device: torch.device) -> Tensor:
    return 1.0 - 2.0 * (_counted(n, device) % 3 == 1).float()


def _counted(n: int, device: torch.device) -> Tensor:
    return torch.arange(n, dtype=torch.int64, device=device)


def exact_results(case: Case, inputs: Inputs, rows: Tensor) -> Exact:
    """By float64 autograd on the very same numbers, for the chosen rows (K,) that are active."""
    given, terms = inputs.rows, inputs.terms
    logits = given.logits[rows].double().requires_grad_()
    token_ids, weights = given.token_ids[rows], given.weights[rows].double()
    temperature = given.temperature.double()
    temperature = temperature[rows] if temperature.numel() > 1 else temperature.expand(rows.shape)

    chosen = terms.inputs.each(lambda x: x[rows].double())
    with torch.enable_grad():
        logps, entropy, _ = reference.token_logps(
            logits, token_ids, weights != 0, temperature, True, False, softcap=case.softcap
        )
        if case.call in ("backward", "shards"):
            arrived = inputs.dlogps[rows].double() * logps
            if inputs.dentropy is not None:
                arrived = arrived + inputs.dentropy[rows].double() * entropy
            loss, scale = arrived, 1.0
        else:
            loss = loss_of_logps(logps, entropy, weights, chosen, terms.settings)
            scale = 1.0 if terms.grad_scale is None else float(terms.grad_scale)
        (dlogits,) = torch.autograd.grad(loss.sum(), logits)
    capped = reference.capped(logits.detach(), case.softcap)
    log_p = torch.log_softmax(capped / temperature[:, None], -1)
    return Exact(
        rows,
        token_ids,
        loss.detach(),
        logps.detach(),
        entropy.detach(),
        dlogits * scale,
        scale * _floor(case, inputs, chosen.advantages, log_p, entropy.detach(), temperature),
    )


def _floor(
    case: Case,
    inputs: Inputs,
    advantages: Tensor,
    log_p: Tensor,
    entropy: Tensor,
    temperature: Tensor,
) -> Tensor:
    """See ``compare.Exact``. log p is known to 1e-6, and the slope of the objective's derivative is
    up to |A| over the width of its trust region; terms of the entropy cancel in themselves."""
    p = log_p.exp()
    if case.call in ("backward", "shards"):
        slope = torch.zeros_like(advantages)
        bonus = 0.0 if inputs.dentropy is None else 0.5
    else:
        low, high = case.objective.trust_region() or (-math.inf, math.inf)
        width = min(-math.expm1(low), math.expm1(high) if high < 1 else 1.0)
        settings = inputs.terms.settings
        slope = advantages.abs() / width + settings.kl_coef + settings.entropy_coef
        bonus = settings.entropy_coef
    surprise = torch.where(p > 0, log_p, 0.0).abs() + entropy[:, None]
    return p * (0.1 * slope[:, None] + bonus * surprise) / temperature[:, None]
