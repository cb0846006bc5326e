"""One of each named objective, and settings that reach every branch of their formulas."""

from __future__ import annotations

from cfpo_kernels.objectives import OBJECTIVES, Objective

CHOSEN: list[Objective] = [
    OBJECTIVES[name](**arguments)
    for name, arguments in (
        ("aspo", {}),
        ("cfpo", {"epsilon": 0.2, "epsilon_high": 0.3}),
        ("cfpo", {"log_ratio_clip": 0.4}),
        ("cispo", {}),
        ("cispo", {"low": 0.8, "high": 1.28}),
        ("dppo", {"cap": 1.3}),
        ("dro", {"beta": 0.05}),
        ("gppo", {}),
        ("gppo", {"beta_low": 0.25, "beta_high": 0.5, "dual_clip": None}),
        ("gppo", {"beta_low": 0.0, "beta_high": 0.0}),
        ("ice_pop", {"low": 0.7, "high": 1.4}),
        ("power_is", {"power_positive": 0.5, "power_negative": 1.5}),
        ("ppo_clip", {"epsilon_low": 0.2, "epsilon_high": 0.28, "dual_clip": 3.0}),
        ("reinforce", {}),
        ("sapo", {}),
        ("topr", {}),
    )
]
# What was added later has its defaults.
CHOSEN += [OBJECTIVES[name]() for name in OBJECTIVES.keys() - {o.name for o in CHOSEN}]
with_drift = [type(o)(**(vars(o) | {"drift": 0.1})) for o in CHOSEN]


def name_of(objective: Objective) -> str:
    return repr(objective)[:40]
