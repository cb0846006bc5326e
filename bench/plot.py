"""The report as one picture: time in units of a copy of the logits."""

from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from bench.cases import HEADLINE_VOCABULARY
from bench.implementations import COMPILED, EAGER, LEVEL_PREFIX, REFERENCE
from bench.machine import device_name

# Ours stand out, what they are compared with stays grey; also told apart in black and white.
COLOURS = {"ours": "#1f6fb4", "peer": "#d98b2b", "baseline": "#a9b1ba"}
LEGEND = {"ours": "cfpo-kernels", "peer": "other packages", "baseline": "plain PyTorch"}
INK, FAINT = "#22282e", "#6b747d"
MARKERS = "osD^vP"


def save(report: dict, path: Path) -> None:
    """Bars at the headline vocabulary; beside them lines over vocabularies, where there are any."""
    matplotlib.rcParams.update({"font.size": 10.5, "axes.spines.top": False})
    if report.get("kind") == "linear":
        save_linear(report, path)
        return
    headline = headline_case(report["cases"])
    others = [case for case in report["cases"] if is_comparable(case, headline)]
    others.sort(key=lambda case: case["vocabulary"])

    bars_shown = bars_of(headline)
    height = 2.3 + 0.42 * len(bars_shown)
    figure = Figure(figsize=(13.5 if len(others) > 1 else 8.5, height))
    above, below = 0.68 / height, 0.3 / height  # title and legend, footer
    figure.set_layout_engine("constrained", rect=(0, below, 1, 1 - above - below), wspace=0.06)
    if len(others) > 1:
        bar_axes, line_axes = figure.subplots(1, 2, width_ratios=(1.25, 1))
        draw_lines(line_axes, others)
    else:
        bar_axes = figure.subplots()
    draw_bars(bar_axes, headline, bars_shown)
    add_words(figure, report, headline)
    figure.savefig(path, dpi=150, facecolor="white")


def save_linear(report: dict, path: Path) -> None:
    """Time and memory of the loss from hidden states, a row of panels for each case."""
    cases = report["cases"]
    height = 1.2 + sum(1.1 + 0.36 * len(case["results"]) for case in cases)
    figure = Figure(figsize=(11.5, height))
    figure.set_layout_engine(
        "constrained", rect=(0, 0.3 / height, 1, 1 - 0.8 / height), wspace=0.05
    )
    panels = figure.subplots(len(cases), 2, squeeze=False)
    for (left, right), case in zip(panels, cases, strict=True):
        results = sorted(case["results"], key=lambda result: result["median_ms"])
        title = f"{case['rows']:,} tokens, head {case['hidden']} × {case['vocabulary']:,}"
        draw_plain_bars(
            left,
            results,
            [result["ratio_to_products"] for result in results],
            "time ÷ time of the three plain products",
            lambda ratio: f"{short(ratio)}×",
        )
        left.set_title(f"{title}, {case['dtype_name']}", loc="left", fontsize=10.5, color=FAINT)
        left.axvline(1, color=INK, linewidth=1.2, linestyle="--", zorder=3)
        memory = [(result["extra_bytes"] or 0) / 2**20 for result in results]
        draw_plain_bars(right, results, memory, "MiB beside the inputs, gradients included", short)
        right.set_yticks([])
    figure.suptitle(
        "PPO loss and gradients from hidden states",
        x=0.01,
        ha="left",
        fontsize=14,
        fontweight="bold",
        color=INK,
    )
    add_footer(figure, report, cases[0]["device"])
    figure.savefig(path, dpi=150, facecolor="white")


def draw_plain_bars(
    axes: Axes, results: list[dict], values: list[float], label: str, text: Callable[[float], str]
) -> None:
    axes.barh(range(len(results)), values, color=[COLOURS[r["kind"]] for r in results], height=0.72)
    for row, (result, value) in enumerate(zip(results, values, strict=True)):
        weight = "bold" if result["kind"] == "ours" else "normal"
        axes.text(value, row, f" {text(value)}", va="center", fontweight=weight, color=INK)
    axes.set_yticks(range(len(results)), [result["label"] for result in results])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.18 * max(*values, 1e-9))
    axes.set_xlabel(label)
    axes.grid(True, axis="x", color="#e3e6e9", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["right", "left"]].set_visible(False)


def headline_case(cases: list[dict]) -> dict:
    """The headline vocabulary in a 16-bit dtype, else the first case."""
    return min(
        cases, key=lambda case: (case["vocabulary"] != HEADLINE_VOCABULARY, case["dtype"] == "f32")
    )


def is_comparable(case: dict, headline: dict) -> bool:
    return case["device"] == headline["device"] and case["dtype"] == headline["dtype"]


def bars_of(case: dict) -> list[dict]:
    """The fastest first. Forward alone is not the same work, the reference backend is there to be
    read, not to be fast, and nobody chooses a lower instruction set: the table has them all.
    """
    shown = [
        result
        for result in case["results"]
        if result["backward"]
        and result["name"] != REFERENCE
        and not result["name"].startswith(LEVEL_PREFIX)
    ]
    return sorted(shown, key=lambda result: result["ratio_to_copy"])


def draw_bars(axes: Axes, case: dict, results: list[dict]) -> None:
    ratios = [result["ratio_to_copy"] for result in results]
    axes.barh(
        range(len(results)),
        ratios,
        left=0,
        color=[COLOURS[result["kind"]] for result in results],
        height=0.72,
    )
    for row, result in enumerate(results):
        ratio = result["ratio_to_copy"]
        axes.text(
            ratio * 1.05,
            row,
            f"{short(ratio)}×   {short(result['median_ms'])} ms",
            va="center",
            fontweight="bold" if result["kind"] == "ours" else "normal",
            color=INK,
        )
    axes.set_yticks(range(len(results)), [result["label"] for result in results])
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    scale_log(axes.xaxis, lambda: axes.set_xscale("log"))
    # Bars of a log scale have no natural start: they begin a little below the floor.
    axes.set_xlim(min(0.8, min(ratios) * 0.9), max(ratios) * 4.5)
    mark_copy(axes.axvline)
    axes.set_xlabel("time ÷ time of one copy of the logits (log scale, shorter is better)")
    axes.set_title(
        f"{case['rows']} × {case['vocabulary']:,} {case['dtype']}; "
        f"a copy takes {short(case['copy']['median_ms'])} ms",
        loc="left",
        fontsize=10.5,
        color=FAINT,
    )
    axes.spines[["right", "left"]].set_visible(False)


def draw_lines(axes: Axes, cases: list[dict]) -> None:
    """Ratio to the copy over vocabularies, for the best of ours and what it is held against."""
    positions = range(len(cases))
    for marker, name in zip(MARKERS, line_names(cases), strict=False):
        found = [ratio_of(case, name) for case in cases]
        known = [(x, y) for x, y in zip(positions, found, strict=True) if y is not None]
        label, kind = label_and_kind(cases, name)
        xs, ys = zip(*known, strict=True)
        axes.plot(xs, ys, marker=marker, color=COLOURS[kind], linewidth=2)
        axes.annotate(
            label,
            (xs[-1], ys[-1]),
            xytext=(9, 0),
            textcoords="offset points",
            va="center",
            color=INK,
        )
    scale_log(axes.yaxis, lambda: axes.set_yscale("log"))
    low, high = axes.get_ylim()
    axes.set_ylim(min(0.8, low), high)
    axes.set_xlim(-0.3, len(cases) - 0.95)
    mark_copy(axes.axhline)
    axes.set_xticks(positions, [f"{case['vocabulary']:,}" for case in cases], rotation=35)
    axes.set_xlabel("vocabulary")
    axes.set_title("the same over vocabularies", loc="left", fontsize=10.5, color=FAINT)
    axes.spines["right"].set_visible(False)


def line_names(cases: list[dict]) -> list[str]:
    """Our kernels in place, the peers and the two usual baselines."""
    results = {result["name"]: result for case in cases for result in case["results"]}
    return [
        name
        for name, result in results.items()
        if name.endswith("-inplace") or result["kind"] == "peer" or name in (EAGER, COMPILED)
    ]


def ratio_of(case: dict, name: str) -> float | None:
    ratios = (result["ratio_to_copy"] for result in case["results"] if result["name"] == name)
    return next(ratios, None)


def label_and_kind(cases: list[dict], name: str) -> tuple[str, str]:
    results = (result for case in cases for result in case["results"] if result["name"] == name)
    result = next(results)
    return result["label"], result["kind"]


def mark_copy(line) -> None:
    line(1, color=INK, linewidth=1.2, linestyle="--", zorder=3)


def scale_log(axis, make_log) -> None:
    make_log()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _position: f"{value:g}×"))
    axis.grid(True, which="major", color="#e3e6e9", linewidth=0.8)
    axis.axes.set_axisbelow(True)


def add_words(figure: Figure, report: dict, headline: dict) -> None:
    kinds = {result["kind"] for case in report["cases"] for result in case["results"]}
    handles: list[Artist] = [
        matplotlib.patches.Patch(color=colour, label=LEGEND[kind])
        for kind, colour in COLOURS.items()
        if kind in kinds
    ]
    handles.append(
        matplotlib.lines.Line2D([], [], color=INK, linestyle="--", label="copy: the floor")
    )
    figure.suptitle(
        "CFPO loss and gradient, beside a plain copy of the logits",
        x=0.01,
        ha="left",
        fontsize=14,
        fontweight="bold",
        color=INK,
    )
    figure.legend(
        handles=handles,
        loc="upper left",
        bbox_to_anchor=(0.002, 1 - 0.32 / figure.get_figheight()),
        ncols=len(handles),
        frameon=False,
        columnspacing=1.6,
    )
    add_footer(figure, report, headline["device"])


def add_footer(figure: Figure, report: dict, kind: str) -> None:
    versions = report["versions"]
    threads = report["settings"]["threads"]
    device = device_name(report["machine"], kind)
    where = device if kind == "cuda" else f"{device}, {threads} threads"
    commit = (versions["git_commit"] or "unknown")[:10]
    figure.text(
        0.01,
        0.012,
        f"{where}; torch {versions['torch']}; commit {commit}; {report['date'][:10]}; "
        "medians of interleaved runs",
        color=FAINT,
        fontsize=8.5,
    )


def short(value: float) -> str:
    """Two or three digits, never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
