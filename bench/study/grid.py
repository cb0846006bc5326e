"""Which runs the study makes: written before any of them was, and not changed by what came out.

The questions are those of the abstract of CFPO (arXiv 2601.22801): does it match clipping, does it
extend the stable regime, does it keep a policy from exploiting length?

- reuse (A): 32 rollouts of 64 responses, each used for mu updates.
- stale (B): 256 updates, each on 64 fresh responses that are up to mu - 1 updates old: a rollout of
  64 mu responses is cut into mu minibatches. Responses and updates are constant, their age varies.
- length (C): up to 6 tokens may follow an answer, each paid 0.02; 48 rollouts used mu times.
- long: reuse at one learning rate and mu, five times as long.

At mu = 1 the ratio is 1 and every objective has one gradient, so those runs are made once for all.

Outcomes. First: the share of right answers after training. A run *broke* if its parameters are not
finite, it ends with fewer right answers than it began with, or with less than half of its best
moving mean (over an eighth of its rollouts). For length: extra tokens when the moving mean of right
answers first reaches 0.45, and at the end. Methods are compared in every cell, at each method's
best learning rate, and at equal KL.

Controls, without which a comparison at equal epsilon says little: clips of 0.05 and 0.1 (is a
tighter region all that CFPO is?), CFPO at 0.4 and 1.0 (does a wider one catch up?), and CFPO whose
penalty is bounded by ``log_ratio_clip`` (is it the penalty of ratios far from 1 that hurts where
samples are stale?).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from cfpo_kernels import CFPO, PowerIS, PPOClip
from cfpo_kernels.objectives import Objective

METHODS: dict[str, Objective] = {
    "cfpo-0.2": CFPO(0.2),
    "ppo-0.2": PPOClip(0.2, 0.2),
    "clip-higher": PPOClip(0.2, 0.28),
    "none": PowerIS(1.0, 1.0),
}
CONTROLS: dict[str, Objective] = {
    "ppo-0.05": PPOClip(0.05, 0.05),
    "ppo-0.1": PPOClip(0.1, 0.1),
    "cfpo-0.4": CFPO(0.4),
    "cfpo-1.0": CFPO(1.0),
    "cfpo-0.2-bounded": CFPO(0.2, log_ratio_clip=1.0),
}
OBJECTIVES = METHODS | CONTROLS
LABELS = {
    "cfpo-0.2": "CFPO 0.2",
    "ppo-0.2": "PPO 0.2",
    "clip-higher": "clip-higher 0.2, 0.28",
    "none": "no clipping",
    "ppo-0.05": "PPO 0.05",
    "ppo-0.1": "PPO 0.1",
    "cfpo-0.4": "CFPO 0.4",
    "cfpo-1.0": "CFPO 1.0",
    "cfpo-0.2-bounded": "CFPO 0.2, bounded",
}
RATES = (1e-4, 3e-4, 1e-3)
SEEDS = range(5)
ONCE = "any"  # the method of runs at mu = 1


@dataclass(frozen=True)
class Run:
    """One training run."""

    part: str  # "reuse", "stale", "length" or "long"
    method: str
    rate: float
    mu: int
    seed: int

    @property
    def key(self) -> str:
        return f"{self.part} {self.method} {self.rate:g} {self.mu} {self.seed}"

    @property
    def n_rollouts(self) -> int:
        if self.part == "stale":
            return 256 // self.mu
        return {"reuse": 32, "length": 48, "long": 160}[self.part]

    @property
    def n_minibatches(self) -> int:
        """Parts that a rollout is cut into; each has 8 prompts of 8 responses."""
        return self.mu if self.part == "stale" else 1


def _cross(part: str, methods: object, rates: tuple[float, ...], mus: tuple[int, ...]) -> list[Run]:
    assert isinstance(methods, (dict, tuple))
    return [Run(part, m, rate, mu, 0) for mu in mus for rate in rates for m in methods]


def full() -> list[Run]:
    """Every run, a seed after the other, so that a study that was stopped is balanced."""
    cells = [
        *_cross("reuse", (ONCE,), RATES, (1,)),
        *_cross("stale", (ONCE,), RATES, (1,)),
        *_cross("reuse", METHODS, RATES, (4, 16, 64)),
        *_cross("stale", METHODS, RATES, (16, 64)),
        *_cross("length", METHODS, (3e-4,), (4, 16)),
        *_cross("long", METHODS, (1e-3,), (4,)),
        *_cross("reuse", CONTROLS, (3e-4, 1e-3), (16,)),
        *_cross("stale", CONTROLS, (3e-4, 1e-3), (64,)),
        *_cross("length", CONTROLS, (3e-4,), (16,)),
    ]
    return [replace(cell, seed=seed) for seed, cell in itertools.product(SEEDS, cells)]


def quick() -> list[Run]:
    """Six runs: the exploit of length, with the control that a comparison of it needs."""
    cells = _cross("length", ("cfpo-0.2", "ppo-0.2", "ppo-0.05"), (3e-4,), (16,))
    return [replace(cell, seed=seed) for seed, cell in itertools.product(range(2), cells)]
