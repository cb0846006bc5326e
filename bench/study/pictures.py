"""The study's pictures: right answers over learning rate and mu, and against length."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

from bench.study.findings import WINDOW, Found, cell, found, moving
from bench.study.grid import LABELS, METHODS, RATES

COLOURS = {
    "cfpo": "#d9660d",
    "ppo": "#1f5fa8",
    "clip": "#4fa3d9",
    "none": "#777777",
}
STYLES = {"0.2": "-", "0.4": "--", "0.1": "--", "1.0": ":", "0.05": ":", "higher": "-", "none": "-"}
MUS = {"reuse": (1, 4, 16, 64), "stale": (1, 16, 64)}
DESIGNS = {
    "reuse": "each rollout used for $\\mu$ updates",
    "stale": "each rollout cut into $\\mu$ minibatches",
}


def heat_map(report: dict[str, Any], path: Path) -> None:
    """A panel a method and design; in each cell the mean of seeds, and how many broke."""
    import matplotlib.pyplot as plt
    import numpy as np

    runs = found(report)
    figure, axes = plt.subplots(2, len(METHODS), figsize=(8.6, 6), layout="constrained")
    image = None
    for row, (part, title) in zip(axes, DESIGNS.items(), strict=True):
        mus = MUS[part]
        for axis, method in zip(row, METHODS, strict=True):
            shown = np.full((len(RATES), len(mus)), np.nan)
            own = []
            for i, rate in enumerate(RATES):
                for j, mu in enumerate(mus):
                    seeds = cell(runs, part, method, rate, mu)
                    if not seeds:
                        continue
                    own += seeds if mu > 1 else []
                    shown[i, j] = value = mean(r.right for r in seeds)
                    broke = sum(r.broke for r in seeds)
                    colour = "white" if value < 0.45 else "black"
                    text = f"{value:.2f}".lstrip("0")
                    text += f"\n{broke}/{len(seeds)}\nbroke" if broke else ""
                    axis.text(j, i, text, ha="center", va="center", fontsize=8, color=colour)
            image = axis.imshow(
                shown, origin="lower", cmap="viridis", vmin=0, vmax=0.8, aspect="auto"
            )
            axis.set_xticks(range(len(mus)), mus)
            axis.set_yticks(range(len(RATES)), [f"{r:g}" for r in RATES] if axis is row[0] else [])
            broke = sum(r.broke for r in own)
            axis.set_title(f"{LABELS[method]}\n{broke} of {len(own)} broke", fontsize=9)
            axis.tick_params(length=0)
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(f"{title}\nlearning rate")
    for axis in axes[-1]:
        axis.set_xlabel("$\\mu$")
    assert image is not None
    figure.colorbar(image, ax=axes, label="share of right answers after training", shrink=0.8)
    figure.suptitle(
        f"Sorting digits: {len(runs)} runs, {len({r.seed for r in runs})} seeds. Mean "
        "of seeds; mu = 1 is the same for all methods.",
        fontsize=10,
        color="#666666",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def length(report: dict[str, Any], path: Path) -> None:
    """Right answers against extra tokens along the training."""
    import matplotlib.pyplot as plt

    runs = found(report)
    named = [r for r in runs if r.part == "length"]
    controls = [m for m in LABELS if m.startswith(("cfpo-", "ppo-")) and "bounded" not in m]
    panels = [
        ("$\\mu$ = 4", 4, list(METHODS)),
        ("$\\mu$ = 16", 16, list(METHODS)),
        ("$\\mu$ = 16, other widths", 16, controls),
    ]
    panels = [p for p in panels if any(r.mu == p[1] and r.method in p[2] for r in named)]
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(3.1 * len(panels), 4.4),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axis, (title, mu, methods) in zip(axes[0], panels, strict=True):
        for method in methods:
            seeds = cell(runs, "length", method, 3e-4, mu)
            if seeds:
                _path(axis, method, seeds)
        axis.set_title(f"{title}\nlearning rate 0.0003", fontsize=9)
        axis.set_xlabel("share of right answers")
        axis.grid(alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
        below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.16), "ncols": 2}
        axis.legend(frameon=False, fontsize=8, columnspacing=1, handlelength=1.6, **below)
    axes[0][0].set_ylabel("extra tokens an answer (6 at most)")
    count = len({r.seed for r in named})
    figure.supxlabel(
        f"Lines: mean of {count} seeds along the training; dots: each seed at the end.",
        fontsize=9,
        color="#666666",
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _path(axis: Any, method: str, seeds: list[Found]) -> None:
    family, _, width = method.partition("-")
    colour = COLOURS[family]
    style = STYLES.get(width or method, "-")

    def curve(name: str) -> list[float]:
        columns = zip(*(r.result["curves"][name] for r in seeds), strict=False)
        return moving([mean(column) for column in columns], WINDOW)

    axis.plot(curve("right"), curve("extra"), style, color=colour, label=LABELS[method])
    for r in seeds:
        filled = colour if style == "-" else "none"
        axis.plot(r.right, r.extra, "o", color=colour, markersize=5, alpha=0.6, mfc=filled)


def save(report: dict[str, Any], path: Path) -> list[Path]:
    """Writes NAME-heat-map.png and NAME-length.png, as far as there are runs for them."""
    import matplotlib

    matplotlib.use("Agg")
    parts = {key.split()[0] for key in report["runs"]}
    written = []
    for part, draw in (("reuse", heat_map), ("length", length)):
        if part in parts:
            target = path.with_name(f"{path.stem}-{draw.__name__.replace('_', '-')}.png")
            draw(report, target)
            written.append(target)
    return written
