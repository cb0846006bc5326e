"""Tables of a study's runs, in Markdown. No number here is fixed: all come from the runs."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from statistics import mean, median
from typing import Any, NamedTuple

from bench.study.grid import CONTROLS, LABELS, METHODS, ONCE, RATES

REACHED = 0.45  # a moving mean of right answers
WINDOW = 6  # rollouts of that moving mean


class Found(NamedTuple):
    """What the tables need of a run."""

    part: str
    method: str
    rate: float
    mu: int
    seed: int
    start: float  # shares of right answers
    right: float
    broke: bool
    kl: float  # a rollout, in nats a token
    extra: float  # tokens, at the end
    extra_at: float  # tokens when REACHED; NaN: never
    result: dict[str, Any]


def moving(values: list[float], width: int) -> list[float]:
    width = min(width, len(values))
    return [mean(values[i : i + width]) for i in range(len(values) - width + 1)]


def found(report: dict[str, Any]) -> list[Found]:
    return [_found(key, result) for key, result in report["runs"].items()]


def _found(key: str, result: dict[str, Any]) -> Found:
    part, method, rate, mu, seed = key.split()
    curves = result["curves"]
    right = curves["right"]
    start, end = result["before"]["right"], result["after"]["right"]
    best = max([start, *moving(right, max(1, len(right) // 8))])
    pairs = zip(moving(right, WINDOW), moving(curves["extra"], WINDOW), strict=True)
    return Found(
        part, method, float(rate), int(mu), int(seed), start, end,
        broke=not result["finite"] or end < start or end < best / 2,
        kl=mean(curves["kl"]),
        extra=result["after"]["extra"],
        extra_at=next((extra for share, extra in pairs if share >= REACHED), math.nan),
        result=result,
    )  # fmt: skip


def cell(runs: Iterable[Found], part: str, method: str, rate: float, mu: int) -> list[Found]:
    """The seeds of one cell; at mu = 1 those of the runs that stand for all methods."""
    wanted = ONCE if mu == 1 else method
    return [
        r for r in runs if (r.part, r.method, r.rate, r.mu) == (part, wanted, rate, mu)
    ]  # fmt: skip


def _mean(runs: list[Found], value: Callable[[Found], float]) -> float:
    known = [x for x in map(value, runs) if not math.isnan(x)]
    return mean(known) if known else math.nan


def best_rate(runs: list[Found], part: str, method: str, mu: int) -> tuple[float, list[Found]]:
    cells = {rate: cell(runs, part, method, rate, mu) for rate in RATES}
    known = {rate: seeds for rate, seeds in cells.items() if seeds}
    if not known:
        return math.nan, []
    rate = max(known, key=lambda rate: _mean(known[rate], lambda r: r.right))
    return rate, known[rate]


def interval(differences: list[float], draws: int = 4000) -> tuple[float, float]:
    """Bootstrap, 95%."""
    rng = random.Random(0)
    n = len(differences)
    means = sorted(mean(rng.choices(differences, k=n)) for _ in range(draws))
    return means[int(0.025 * draws)], means[int(0.975 * draws)]


def share(x: float) -> str:
    return "" if math.isnan(x) else f"{x:.2f}".lstrip("0") or "0"


def _table(heading: list[str], rows: list[list[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def at_best_rates(runs: list[Found]) -> str:
    """Right answers after training, each method at its best learning rate; broken runs of all."""
    columns = [("reuse", 4), ("reuse", 16), ("reuse", 64), ("stale", 16), ("stale", 64)]
    rows = []
    for method in METHODS:
        cells = []
        for part, mu in columns:
            rate, seeds = best_rate(runs, part, method, mu)
            cells.append(f"{share(_mean(seeds, lambda r: r.right))} ({rate:g})" if seeds else "")
        for part in ("reuse", "stale"):
            own = [r for r in runs if r.part == part and r.method == method and r.rate in RATES]
            own = [r for r in own if r.mu in (4, 16, 64)]
            cells.append(f"{sum(r.broke for r in own)} of {len(own)}")
        rows.append([LABELS[method], *cells])
    heading = ["", *(f"{part}, mu {mu}" for part, mu in columns), "broke, reuse", "broke, stale"]
    return _table(heading, rows)


def differences(runs: list[Found]) -> str:
    """CFPO 0.2 minus each other method, paired by seed, each at its best learning rate."""
    rows = []
    for part, mu in (("reuse", 4), ("reuse", 16), ("reuse", 64), ("stale", 16), ("stale", 64)):
        _, ours = best_rate(runs, part, "cfpo-0.2", mu)
        cells = []
        for method in [m for m in METHODS if m != "cfpo-0.2"]:
            theirs = {r.seed: r.right for r in best_rate(runs, part, method, mu)[1]}
            gaps = [r.right - theirs[r.seed] for r in ours if r.seed in theirs]
            if len(gaps) < 2:
                cells.append("")
                continue
            low, high = interval(gaps)
            cells.append(f"{mean(gaps):+.3f} [{low:+.3f}, {high:+.3f}]")
        rows.append([f"{part}, mu {mu}", *cells])
    return _table(["CFPO 0.2 minus", *(LABELS[m] for m in METHODS if m != "cfpo-0.2")], rows)


def widths(runs: list[Found]) -> str:
    """How far each objective moves, and what comes of it: the table to choose an epsilon from."""
    places = [("reuse", 3e-4, 16), ("reuse", 1e-3, 16), ("stale", 3e-4, 64), ("stale", 1e-3, 64)]
    rows = []
    for method in METHODS | CONTROLS:
        cells = []
        for part, rate, mu in places:
            seeds = cell(runs, part, method, rate, mu)
            broke = sum(r.broke for r in seeds)
            text = f"{_mean(seeds, lambda r: r.kl):.4f}, {share(_mean(seeds, lambda r: r.right))}"
            cells.append(
                (text + (f", {broke}/{len(seeds)} broke" if broke else "")) if seeds else ""
            )
        rows.append([LABELS[method], *cells])
    heading = [f"{part}, mu {mu}, {rate:g}" for part, rate, mu in places]
    return _table(["KL a rollout, right answers", *heading], rows)


def nearest_in_kl(runs: list[Found]) -> str:
    """For each CFPO the clip that moves as far, by the logarithm of KL, and both right answers."""
    clips = ("ppo-0.05", "ppo-0.1", "ppo-0.2", "clip-higher")
    rows = []
    for part, rate, mu in (("reuse", 3e-4, 16), ("stale", 3e-4, 64)):
        by_clip = {m: cell(runs, part, m, rate, mu) for m in clips}
        by_clip = {m: seeds for m, seeds in by_clip.items() if seeds}
        for method in ("cfpo-0.2", "cfpo-0.4", "cfpo-1.0"):
            ours = cell(runs, part, method, rate, mu)
            if not ours or not by_clip:
                continue
            kl = _mean(ours, lambda r: r.kl)

            def distance(m: str, kl: float = kl, by_clip: dict = by_clip) -> float:
                return abs(math.log(_mean(by_clip[m], lambda r: r.kl) / kl))

            near = min(by_clip, key=distance)
            theirs = by_clip[near]
            rows.append(
                [
                    f"{part}, mu {mu}, {rate:g}",
                    f"{LABELS[method]}: {kl:.4f}",
                    f"{LABELS[near]}: {_mean(theirs, lambda r: r.kl):.4f}",
                    share(_mean(ours, lambda r: r.right)),
                    share(_mean(theirs, lambda r: r.right)),
                ]
            )
    return _table(["", "CFPO: KL", "nearest clip: KL", "right, CFPO", "right, clip"], rows)


def mechanics(runs: list[Found]) -> str:
    """What happens to tokens, over the cells of mu 16 and 64 at 1e-4 and 3e-4."""
    rows = []
    for part in ("reuse", "stale"):
        for method in METHODS:
            own = [r for r in runs if r.part == part and r.method == method]
            own = [r for r in own if r.mu in (16, 64) and r.rate < 1e-3]
            if not own:
                continue

            def of(name: str, own: list[Found] = own) -> float:
                return mean(mean(r.result["curves"][name]) for r in own)

            largest = median(max(r.result["curves"]["ratio_max"]) for r in own)
            rows.append(
                [
                    f"{part}: {LABELS[method]}",
                    f"{_mean(own, lambda r: r.kl):.4f}",
                    f"{of('outside'):.1%}",
                    f"{of('dropped'):.1%}",
                    f"{largest:.1f}",
                    f"{of('grad_norm'):.2f}",
                    f"{mean(r.result['curves']['entropy'][-1] for r in own):.2f}",
                ]
            )
    heading = ["", "KL", "r outside 0.8 to 1.2", "no gradient", "largest r", "gradient norm"]
    return _table([*heading, "entropy at the end"], rows)


def lengths(runs: list[Found]) -> str:
    """The exploit: extra tokens when REACHED right answers, and at the end."""
    rows = []
    for mu in (4, 16):
        for method in METHODS | CONTROLS:
            seeds = cell(runs, "length", method, 3e-4, mu)
            if not seeds:
                continue
            reached = [r for r in seeds if not math.isnan(r.extra_at)]
            at = f"{mean(r.extra_at for r in reached):.1f}" if reached else "never"
            if 0 < len(reached) < len(seeds):
                at += f" ({len(reached)} of {len(seeds)})"
            rows.append(
                [
                    f"mu {mu}: {LABELS[method]}",
                    f"{_mean(seeds, lambda r: r.kl):.4f}",
                    share(_mean(seeds, lambda r: r.right)),
                    at,
                    f"{_mean(seeds, lambda r: r.extra):.1f}",
                    ", ".join(f"{r.extra:.1f}" for r in sorted(seeds, key=lambda r: r.seed)),
                ]
            )
    heading = ["", "KL", "right", f"extra at {REACHED}", "extra at the end", "of each seed"]
    return _table(heading, rows)


def long_runs(runs: list[Found]) -> str:
    """Five times as long, lr 1e-3, mu 4: the end, the best on the way, what broke."""
    rows = []
    for method in METHODS:
        seeds = cell(runs, "long", method, 1e-3, 4)
        if not seeds:
            continue
        best = [max(moving(r.result["curves"]["right"], 20)) for r in seeds]
        ends = ", ".join(share(r.right) for r in sorted(seeds, key=lambda r: r.seed))
        broke = f"{sum(r.broke for r in seeds)} of {len(seeds)}"
        rows.append(
            [LABELS[method], share(mean(best)), share(_mean(seeds, lambda r: r.right)), ends]
        )
        rows[-1].append(broke)
    return _table(["", "best on the way", "at the end", "of each seed", "broke"], rows)


SECTIONS: dict[str, Callable[[list[Found]], str]] = {
    "best-rates": at_best_rates,
    "differences": differences,
    "widths": widths,
    "equal-kl": nearest_in_kl,
    "mechanics": mechanics,
    "lengths": lengths,
    "long": long_runs,
}


def markdown(report: dict[str, Any]) -> dict[str, str]:
    runs = found(report)
    return {name: section(runs) for name, section in SECTIONS.items()}
