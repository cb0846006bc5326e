"""A GRPO run of a tiny model, by TRL's trainer and by CFPOTrainer(objective=PPOClip()): the curves.

    python -m bench.grpo_curves --json out.json --plot out.png
    python -m bench.grpo_curves --from-json out.json --plot out.png

The runs start from the same random weights, seed and settings, and each samples with its own
weights. One token sampled differently is enough to part them, and rounding decides when. So there
are two controls: TRL's loss at every step of CFPOTrainer's run, on the same weights and tokens, and
a second run of TRL's trainer from weights that differ by one rounding.
"""

import argparse
import json
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench.grpo_run import CURVES, RUNS, Setting, train
from bench.machine import describe_machine, describe_versions

NOTES = [
    "curves: what the trainers log. Rewards are logged at the first step on a generation batch, "
    "null at the others.",
    "same_weights: TRL's code at each step of CFPOTrainer's run, on its weights and tokens; also "
    "where the clip ratio of that run comes from, since CFPOTrainer logs another share.",
    "identical: how many completions of a generation batch are the same as in TRL's run.",
    "nudged: TRL's trainer, the head's weights multiplied by 1 + 2^-23.",
]


def parted_at(report: dict, name: str) -> int | None:
    """The first step, counted from 1, whose tokens are not all those of TRL's run."""
    setting = Setting(**report["setting"])
    for i, count in enumerate(report["identical"][name]):
        if count < setting.batch:
            return i * setting.iterations + 1
    return None


def differences(report: dict, name: str, key: str) -> list[tuple[int, float]]:
    """(step, distance to TRL) where the curve has a value; `same`: on the same weights."""
    runs = report["curves"]
    same = name == "same"
    other, trl = runs["ours" if same else name], report["same_weights"] if same else runs["trl"]
    pairs = zip(other[key], trl[key], strict=True)
    return [(i + 1, abs(x - y)) for i, (x, y) in enumerate(pairs) if x is not None]


def table(report: dict) -> str:
    """Markdown: the largest distances to TRL's run."""
    shown = [*CURVES, "clip_ratio"]
    lines = [f"| | steps | {' | '.join(shown)} |", "|---|---|" + "---|" * len(shown)]
    n_steps = report["setting"]["steps"]

    def add(label: str, name: str, first: int, last: int, keys: list[str]) -> None:
        cells = []
        for key in shown:
            found = differences(report, name, key) if key in keys else []
            inside = [d for step, d in found if first <= step <= last]
            cells.append(f"{max(inside):.1e}" if inside else "")
        lines.append(f"| {label} | {first} to {last} | {' | '.join(cells)} |")

    add("CFPOTrainer, TRL's loss on the same weights", "same", 1, n_steps, ["loss", "kl"])
    for name in ("ours", "nudged"):
        parted = parted_at(report, name) or n_steps + 1
        add(f"{RUNS[name]}, same texts", name, 1, parted - 1, shown)
        if parted <= n_steps:
            add(f"{RUNS[name]}, other texts", name, parted, n_steps, shown)
    return "\n".join(lines)


def draw(report: dict, path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"font.size": 10.5, "axes.spines.top": False})
    floor = 1e-10
    figure = Figure(figsize=(13.5, 6.6), layout="constrained")
    axes = figure.subplots(2, len(CURVES), sharex=True)
    for (above, below), (key, label) in zip(axes.T, CURVES.items(), strict=True):
        for name, style in (
            ("trl", {"color": "#d98b2b", "lw": 5, "alpha": 0.45}),
            ("ours", {"color": "#1f6fb4", "lw": 1.3}),
        ):
            curve = enumerate(report["curves"][name][key], 1)
            points = [(step, value) for step, value in curve if value is not None]
            above.plot(*zip(*points, strict=True), label=RUNS[name], **style)
        above.set_title(label, loc="left", fontsize=10.5)
        for name, colour, words in (
            ("nudged", "#a9b1ba", RUNS["nudged"]),
            ("ours", "#1f6fb4", RUNS["ours"]),
            ("same", "#22282e", "TRL's code on CFPOTrainer's weights"),
        ):
            if name == "same" and key not in report["same_weights"]:
                continue
            steps, found = zip(*differences(report, name, key), strict=True)
            below.plot(steps, [max(d, floor) for d in found], color=colour, lw=1.2, label=words)
        below.set_yscale("log")
        below.set_ylim(floor / 2, 10)
        below.set_xlabel("step")
        for name, colour in (("ours", "#1f6fb4"), ("nudged", "#a9b1ba")):
            parted = parted_at(report, name)
            if parted:
                below.axvline(parted, color=colour, ls=":", lw=1.2)
        for one in (above, below):
            one.spines["right"].set_visible(False)
            one.grid(True, color="#e3e6e9", linewidth=0.8)
            one.set_axisbelow(True)
    axes[0, 0].legend(frameon=False, fontsize=9)
    axes[1, 0].legend(frameon=False, fontsize=9, loc="upper left")
    axes[1, 0].set_ylabel("distance to TRL's (0 at 1e-10)")
    axes[1, 1].set_title("dotted: the first text that differs", loc="left", fontsize=9)
    setting = Setting(**report["setting"])
    figure.suptitle(
        f"GRPO, {setting.steps} steps, V = {setting.vocabulary}, float32, "
        f"{setting.iterations} steps a batch, beta = {setting.beta}, on {report['device_name']}",
        x=0.01,
        ha="left",
        fontweight="bold",
        fontsize=11,
    )
    figure.savefig(path, dpi=110, facecolor="white")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.grpo_curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for name, default in asdict(Setting()).items():
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, type=type(default), default=default)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--from-json", type=Path, help="show a saved report again")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.from_json:
        report = json.loads(options.from_json.read_text())
    else:
        torch.set_num_threads(options.threads)
        setting = Setting(**{name: getattr(options, name) for name in asdict(Setting())})
        machine = describe_machine()
        threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
        report = {
            "schema": 1,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine,
            "device_name": f"{machine['cpu']['model']}, {threads}",
            "versions": describe_versions(),
            "setting": asdict(setting),
            **train(setting),
            "notes": NOTES,
        }
        if options.json:
            options.json.write_text(json.dumps(report) + "\n")
    print(table(report))
    if options.plot:
        draw(report, options.plot)


if __name__ == "__main__":
    main()
