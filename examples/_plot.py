"""One picture of a training: the reward, and how far the policy strayed on its way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")  # writes files, needs no display

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import PercentFormatter

if TYPE_CHECKING:
    from train_cfpo import Run, StepLog

BLUE, ORANGE, GREY = "#1f5fa8", "#d9660d", "#666666"
RATIO_FLOOR = 1e-3  # where the axis of |r - 1| starts


def smooth(y: np.ndarray, width: int = 5) -> np.ndarray:
    """Centred moving average that narrows at the ends. (steps,) -> (steps,)."""
    half = width // 2
    return np.array([y[max(0, i - half) : i + half + 1].mean() for i in range(len(y))])


def draw(ax: Axes, curves: np.ndarray, color: str, label: str) -> np.ndarray:
    """Draw each seed as a thin line and their smoothed mean as a thick one. curves: (seeds, steps).

    Returns the mean, (steps,).
    """
    x = np.arange(1, curves.shape[1] + 1)
    for curve in curves:
        ax.plot(x, curve, color=color, alpha=0.25, linewidth=0.9)
    mean = smooth(curves.mean(0))
    ax.plot(x, mean, color=color, linewidth=2.5, label=label)
    return mean


def plot_runs(runs: Sequence[Run], objective: str, epsilon: float, path: Path) -> None:
    """Draw reward, ratio spread and share outside epsilon over the steps, and save a PNG.

    Args:
        runs: one a seed, all with the same number of steps.
        objective: its name, for the title.
        epsilon: the trust region, drawn as a line.
        path: the file to write.
    """

    def curves(value: Callable[[StepLog], float]) -> np.ndarray:
        return np.array([[value(s) for s in run.steps] for run in runs])

    reward = curves(lambda s: s.reward)
    # On a logarithmic axis, where 0 has no place.
    ratio_mean = np.maximum(curves(lambda s: s.ratio_mean), RATIO_FLOOR)
    ratio_max = np.maximum(curves(lambda s: s.ratio_max), RATIO_FLOOR)
    outside = curves(lambda s: s.outside)
    seeds = f"mean of {len(runs)} seeds" if len(runs) > 1 else "1 seed"
    before = np.mean([r.before.sampled for r in runs])
    after = np.mean([r.after.sampled for r in runs])
    verb = "rises" if after > before else "does not rise"

    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4.4), layout="constrained")
    fig.suptitle(
        f"{objective.upper()}: reward on held-out prompts {verb}, {before:.2f} → {after:.2f} "
        f"({seeds})",
        fontsize=15,
        fontweight="bold",
    )

    mean = draw(left, reward, BLUE, f"{seeds}, 5-step average")
    left.set_title(f"Reward while training: {mean[0]:.2f} → {mean[-1]:.2f}")
    left.set(ylabel="mean reward (share of right answers)", ylim=(0, 1))

    draw(middle, ratio_max, ORANGE, "largest of a step")
    draw(middle, ratio_mean, BLUE, "mean of a step")
    middle.axhline(epsilon, color=GREY, linestyle="--", linewidth=1.2, label=f"ε = {epsilon:g}")
    middle.set_title(f"Ratios are {ratio_mean.mean():.3f} from 1 on average")
    middle.set(ylabel="|r − 1|", yscale="log", ylim=(RATIO_FLOOR, None))

    draw(right, outside, BLUE, f"{seeds}, 5-step average")
    right.set_title(f"{outside.mean():.1%} of tokens leave the trust region")
    right.set(ylabel=f"share with |r − 1| > {epsilon:g}", ylim=(0, max(0.01, 1.1 * outside.max())))
    right.yaxis.set_major_formatter(
        PercentFormatter(1.0, decimals=0 if outside.max() > 0.02 else 1)
    )

    for ax in (left, middle, right):
        ax.set_xlabel("step")
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(frameon=False, fontsize=9)
    fig.supxlabel(
        "A step is one rollout and several updates. The learning rate falls to a tenth over the "
        "run, which draws the ratios towards 1.",
        fontsize=9,
        color=GREY,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    fig.savefig(path, dpi=130)
    plt.close(fig)
