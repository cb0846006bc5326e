"""One run: rollouts, updates by the package's loss, what is measured on the way."""

from __future__ import annotations

import functools
import math
import time
from typing import Any

import torch
from torch import Tensor

from bench.study.grid import OBJECTIVES, ONCE, Run
from bench.study.task import Policy, Task, draw_numbers, evaluate, prompts_of, warm_start
from cfpo_kernels import CFPO, policy_loss

N_PROMPTS, GROUP = 8, 8  # of a minibatch
MAX_GRAD_NORM = 1.0
BETAS = (0.9, 0.95)  # Adam's; constant learning rate, no KL term, the mean over tokens
LOOKS = 8  # times in a rollout that tokens are looked at, its last update included


@functools.lru_cache(maxsize=4)
def _start(seed: int, max_extra: int) -> tuple[dict[str, Tensor], dict[str, float]]:
    policy, found = warm_start(seed, max_extra)
    return {name: x.clone() for name, x in policy.state_dict().items()}, found


def group_advantages(rewards: Tensor) -> Tensor:
    """(reward - mean) / standard deviation of each group of responses; (B,) -> (B,)."""
    groups = rewards.view(-1, GROUP)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()


def train(run: Run) -> dict[str, Any]:
    """The run's scores before and after, and its curves, a number a rollout."""
    torch.set_num_threads(1)
    task = Task(6, 0.02) if run.part == "length" else Task()
    state, before = _start(run.seed, task.max_extra)
    started = time.process_time()
    policy = Policy(task.max_response)
    policy.load_state_dict(state)
    optimizer = torch.optim.Adam(policy.parameters(), lr=run.rate, betas=BETAS, fused=True)
    prompt_rng = torch.Generator().manual_seed(1000 + run.seed)  # the same prompts for all methods
    rng = torch.Generator().manual_seed(2000 + run.seed)
    objective = CFPO() if run.method == ONCE else OBJECTIVES[run.method]  # r = 1: all are one

    names = ("right", "extra", "kl", "outside", "dropped", "ratio_max", "grad_norm", "entropy")
    curves: dict[str, list[float]] = {name: [] for name in names}
    finite = True
    for _ in range(run.n_rollouts):
        n = N_PROMPTS * run.n_minibatches
        numbers = draw_numbers(n, prompt_rng).repeat_interleave(GROUP, 0)
        prompts = prompts_of(numbers)
        responses, mask = policy.generate(prompts, task.max_response, rng)
        right, rewards = task.score(numbers, responses, mask)
        advantages = group_advantages(rewards)
        with torch.no_grad():
            old = policy.response_logits(prompts, responses).log_softmax(-1)
        old_logps = old.gather(-1, responses[..., None])[..., 0]
        looks: dict[str, list[float]] = {name: [] for name in names[3:7]}
        for update in range(run.mu):
            begin = N_PROMPTS * GROUP * (update % run.n_minibatches)
            part = slice(begin, begin + N_PROMPTS * GROUP)
            loss, stats = policy_loss(
                policy.response_logits(prompts[part], responses[part]),
                responses[part],
                advantages[part],
                old_logps[part],
                objective=objective,
                mask=mask[part],
                return_stats=True,
            )
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            if (run.mu - 1 - update) % max(1, run.mu // LOOKS) == 0:
                log_ratio = torch.where(mask[part], stats.logps - old_logps[part], 0.0)
                far = (log_ratio.exp() - 1).abs() > 0.2
                looks["outside"].append((far.sum() / mask[part].sum()).item())
                looks["dropped"].append(stats.dropped_fraction.item())
                looks["ratio_max"].append(stats.ratio_max.item())
                looks["grad_norm"].append(norm.item())
        with torch.no_grad():
            new = policy.response_logits(prompts, responses).log_softmax(-1)
        kl = (old.exp() * (old - new)).sum(-1)[mask].mean().item()
        curves["kl"].append(kl)
        curves["entropy"].append(-(old.exp() * old).sum(-1)[mask].mean().item())
        curves["right"].append(right.mean().item())
        curves["extra"].append(task.extra_tokens(mask).mean().item())
        for name, values in looks.items():
            # All advantages of a rollout may be 0, and then no token could have been dropped.
            known = [value for value in values if not math.isnan(value)]
            whole = max(known, default=0.0) if name == "ratio_max" else sum(known)
            curves[name].append(whole if name == "ratio_max" else whole / max(1, len(known)))
        finite = all(bool(torch.isfinite(x).all()) for x in policy.parameters())
        if not finite:
            break
    return {
        "before": before,
        "after": evaluate(policy, task) if finite else {"right": 0.0, "extra": 0.0},
        "finite": finite,
        "cpu_seconds": round(time.process_time() - started, 2),
        "curves": {name: [_short(x) for x in values] for name, values in curves.items()},
    }


def _short(x: float) -> float:
    """Four digits, and no NaN or infinity, which are not JSON."""
    return float(f"{x:.4g}") if math.isfinite(x) else 1e9
