"""Every implementation must be right before it is timed.

The exact answer is float64 autograd on the very same (rounded) logits: the loss over all rows, and
dlogits on a few of them. The target's column and the others are judged apart, since p is about 1e-5
off target: an absolute tolerance would pass a kernel that writes zeros there.
"""

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from bench import naive
from bench.harness import Implementation
from bench.problem import Problem, selected_logps

CHECKED_ROWS = 8
# Room for float32 arithmetic to land on the other side of a rounding boundary.
ROUNDING_SLACK = 1.1
# Where the exact gradient is zero (a clipped row), anything else is infinitely wrong; zero is not.
TINY = 1e-300


class WrongResult(Exception):
    """An implementation's loss or dlogits differ from the exact ones by more than it may."""


@dataclass(frozen=True)
class Exact:
    """What is right for one objective."""

    loss: float
    loss_scale: float  # mean |per-token loss|: the loss itself may cancel to 0
    rows: Tensor  # (K,) rows at which dlogits are known
    targets: Tensor  # (K, 1)
    dlogits: Tensor  # (K, V) float64
    advantage_scale: Tensor  # (K, 1) |advantage| / N, times the loss scale


@dataclass(frozen=True)
class Errors:
    """Measured errors and the limits they were held to; None where there is no gradient."""

    loss: float
    loss_limit: float
    target: float | None = None
    target_limit: float | None = None
    off_target: float | None = None
    off_target_limit: float | None = None

    def exceeded(self) -> list[str]:
        return [
            f"{part} error {error:.3g}, allowed {limit:.3g}"
            for part, error, limit in (
                ("loss", self.loss, self.loss_limit),
                ("target column", self.target, self.target_limit),
                ("off-target columns", self.off_target, self.off_target_limit),
            )
            # Not `error > limit`: a NaN must not pass.
            if error is not None and limit is not None and not error <= limit
        ]


def exact_results(problem: Problem, objective: str) -> Exact:
    """The exact loss and gradient for "cfpo", or for "ppo-clip" in the form Liger computes it."""
    assert problem.logps is not None, "make_problem(exact=False) cannot be checked"
    n = problem.case.rows
    logps = problem.logps.detach().requires_grad_()
    advantages = problem.advantages.double()
    old_logps = problem.old_logps.double()
    if objective == "cfpo":
        terms = naive.objective_term(logps, old_logps, advantages)
        advantage_scale = advantages.abs() / n
    else:  # one sequence: one advantage, and the last row is not part of the loss
        n -= 1
        terms = naive.objective_term(logps[:-1], old_logps[:-1], advantages[:1], objective)
        advantage_scale = advantages[:1].abs().expand_as(advantages) / n
    loss = terms.sum() / n
    (dlogps,) = torch.autograd.grad(loss, logps)

    rows = torch.linspace(0, n - 1, min(CHECKED_ROWS, n), device=logps.device).long().unique()
    picked = problem.logits[rows].double().requires_grad_()
    targets = problem.token_ids[rows]
    scaled = dlogps[rows] * problem.case.loss_scale
    (dlogits,) = torch.autograd.grad(selected_logps(picked, targets), picked, scaled)
    return Exact(
        loss=loss.item(),
        loss_scale=terms.detach().abs().mean().item(),
        rows=rows,
        targets=targets[:, None],
        dlogits=dlogits,
        advantage_scale=advantage_scale[rows, None] * problem.case.loss_scale,
    )


def check(
    implementation: Implementation, loss: Tensor, dlogits: Tensor | None, exact: Exact
) -> Errors:
    """Errors of one result. Raises WrongResult, which names what is wrong and by how much."""
    errors = measure_errors(implementation, loss, dlogits, exact)
    if exceeded := errors.exceeded():
        raise WrongResult(f"{implementation.name} is wrong: {'; '.join(exceeded)}")
    return errors


def measure_errors(
    implementation: Implementation, loss: Tensor, dlogits: Tensor | None, exact: Exact
) -> Errors:
    tolerance = implementation.tolerance
    loss_error = abs(loss.item() - exact.loss) / exact.loss_scale
    if dlogits is None:
        return Errors(loss_error, tolerance.loss)

    rounded = exact.dlogits.to(dlogits.dtype).double()  # the best that dtype can hold
    got = dlogits[exact.rows].double()
    off_target, off_target_rounding = (off_target_error(values, exact) for values in (got, rounded))
    size = exact.dlogits.gather(1, exact.targets).abs()
    finfo = torch.finfo(dlogits.dtype)
    # Half a unit in the last place, where `size` may be subnormal (fp16).
    rounding = (size * finfo.eps / 2).clamp(min=finfo.smallest_normal * finfo.eps / 2)
    scale = (exact.advantage_scale if tolerance.target_of_advantage else size).clamp(min=TINY)
    difference = (got - exact.dlogits).gather(1, exact.targets).abs()
    # In units of `scale`, the row that comes closest to its limit or exceeds it most.
    target, target_limit = difference / scale, ROUNDING_SLACK * rounding / scale + tolerance.target
    worst = worst_row(target / target_limit)
    off_target_limit = ROUNDING_SLACK * off_target_rounding + tolerance.off_target
    worst_off = worst_row(off_target / off_target_limit.clamp(max=torch.finfo(torch.float64).max))
    return Errors(
        loss=loss_error,
        loss_limit=tolerance.loss,
        target=target[worst].item(),
        target_limit=target_limit[worst].item(),
        off_target=off_target[worst_off].item(),
        off_target_limit=off_target_limit[worst_off].item(),
    )


def off_target_error(dlogits: Tensor, exact: Exact) -> Tensor:
    """||dlogits - exact|| / ||exact|| per row (K,), without the target's column."""
    difference = (dlogits - exact.dlogits).scatter(1, exact.targets, 0)
    size = exact.dlogits.scatter(1, exact.targets, 0).norm(dim=1)
    return difference.norm(dim=1) / size.clamp(min=TINY)


def worst_row(errors: Tensor) -> int:
    # NaN counts as the worst.
    return int(errors.nan_to_num(nan=float("inf")).argmax())


def as_json(errors: Errors) -> dict[str, float | None]:
    """Without infinities, which JSON does not know: a limit of None is no limit."""
    return {key: None if value == float("inf") else value for key, value in asdict(errors).items()}
