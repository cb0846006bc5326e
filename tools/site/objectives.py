"""The named objectives, drawn by the package itself: a token's loss and gradient against its ratio.

``python tools/site/objectives.py FOLDER`` writes the pictures there.
"""

from __future__ import annotations

import inspect
import io
import re
import sys
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

import cfpo_kernels
from cfpo_kernels.objectives import OBJECTIVES

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "cfpo-kernels"  # the same file from the same numbers
import matplotlib.pyplot as plt  # noqa: E402

# Colours that are read on white and on black.
GAIN, LOSS, INK = "#2f9e6e", "#d9603b", "#888888"
RATIOS = torch.linspace(0.02, 2.5, 400)
# What has no defaults to draw.
PARAMETERS: dict[str, dict[str, float]] = {
    "dro": {"beta": 0.5},
    "power_is": {"power_positive": 0.5, "power_negative": 1.5},
}
BOUNDS = (-0.5, 0.5)
# The two that most readers come for, then by name.
ORDER = ("cfpo", "ppo_clip", *sorted(OBJECTIVES.keys() - {"cfpo", "ppo_clip"}))


def curves(name: str, advantage: float) -> tuple[Tensor, Tensor]:
    """Loss, and what it pushes log p by (its negative derivative), at each of RATIOS."""
    objective = OBJECTIVES[name](**PARAMETERS.get(name, {}))
    logps = (RATIOS.log() - 3.0).requires_grad_()
    losses = cfpo_kernels.policy_loss_from_logps(
        logps,
        torch.full_like(RATIOS, advantage),
        torch.full_like(RATIOS, -3.0),
        objective=objective,
        reduction="none",
        log_ratio_bounds=BOUNDS if objective.needs_bounds else None,
    )
    (slope,) = torch.autograd.grad(losses.sum(), logps)
    return losses.detach(), -slope


def picture(name: str) -> str:
    """An SVG: on the left the loss, on the right the push on log p."""
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 2.5), layout="constrained")
    titles = ("loss of a token", "push on log p  (- d loss / d log p)")
    for which, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        shown = []
        for advantage, colour in ((1.0, GAIN), (-1.0, LOSS)):
            values = curves(name, advantage)[which].numpy()
            shown.append(values)
            axis.plot(RATIOS.numpy(), values, color=colour, label=f"A = {advantage:+.0f}")
        low = max(min(values.min() for values in shown), -4.0)
        high = min(max(values.max() for values in shown), 4.0)
        room = 0.08 * (high - low)
        axis.set(xlim=(0, 2.5), ylim=(low - room, high + room))
        axis.set_title(title, fontsize=9, color=INK)
        axis.set_xlabel("r", fontsize=9, color=INK)
        axis.axvline(1.0, color=INK, linewidth=0.6, linestyle=":")
        axis.axhline(0.0, color=INK, linewidth=0.6)
        axis.tick_params(colors=INK, labelsize=8)
        for spine in axis.spines.values():
            spine.set_visible(False)
    axes[0].legend(frameon=False, fontsize=8, labelcolor=INK)
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    return text.getvalue()


def pictures() -> dict[str, str]:
    return {name: picture(name) for name in ORDER}


def _section(name: str) -> str:
    """Its sentence, formula, parameters' defaults and source, from the class."""
    objective = OBJECTIVES[name]
    text = inspect.getdoc(objective) or ""
    first = text.split("\n\n")[0].replace("``", "`").replace("\n", " ")
    source = re.search(r"^Source: (.*?)(?=\n\n|\Z)", text, re.DOTALL | re.MULTILINE)
    assert source is not None, f"{name} names no source"
    link = re.sub(
        r"arXiv (\d{4}\.\d{5})",
        r"[arXiv \1](https://arxiv.org/abs/\1)",
        " ".join(source[1].split()),
    )
    told = [f"{key} = {value}" for key, value in PARAMETERS.get(name, {}).items()]
    told += [f"bounds of {BOUNDS[0]} and {BOUNDS[1]} on log r"] if objective.needs_bounds else []
    drawn = f" Drawn with {', '.join(told)}." if told else ""
    label = f"{objective.__name__}: loss and gradient against the ratio"
    return (
        f"## {objective.__name__}\n\n{first}\n\n"
        f"![{label}](objectives/{name}.svg){{ loading=lazy }}\n\n"
        f"`{_call(objective)}`: [parameters](api/objectives.md#cfpo_kernels."
        f"{objective.__name__}).{drawn} Source: {link}\n"
    )


def _call(objective: type) -> str:
    parameters = [
        each.replace(annotation=inspect.Parameter.empty)
        for each in inspect.signature(objective).parameters.values()
    ]
    return f"{objective.__name__}{inspect.Signature(parameters)}"


def sections() -> str:
    return "\n".join(_section(name) for name in ORDER)


if __name__ == "__main__":
    for name, text in pictures().items():
        (Path(sys.argv[1]) / f"{name}.svg").write_text(text)
