"""Positive controls: kernels broken on purpose must fail the checks that the suite is made of."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import Case, check, make_case, with_everything

from cfpo_kernels import PPOClip, backends
from cfpo_kernels.backends.base import KernelRows, KernelTerms
from cfpo_kernels.backends.cpu import CPU


class Broken:
    """The CPU kernels with a defect: `before` changes what they are told, `after` their output."""

    def __init__(
        self,
        before: Callable[[KernelRows, KernelTerms], tuple[KernelRows, KernelTerms]] | None = None,
        after: Callable[[KernelRows, torch.Tensor], None] | None = None,
    ) -> None:
        self.before, self.after = before, after
        self.multiply_rows = CPU.multiply_rows

    def policy_loss(self, rows: KernelRows, terms: KernelTerms, **outputs: Any) -> None:
        if self.before is not None:
            rows, terms = self.before(rows, terms)
        CPU.policy_loss(rows, terms, **outputs)
        if self.after is not None:
            self.after(rows, outputs["dlogits"])


def zeros_off_target(rows: KernelRows, dlogits: torch.Tensor) -> None:
    ids = rows.token_ids[:, None]
    target = dlogits.gather(1, ids)
    dlogits.zero_().scatter_(1, ids, target)


def zeros(rows: KernelRows, dlogits: torch.Tensor) -> None:
    dlogits.zero_()


def dropped_tail(rows: KernelRows, dlogits: torch.Tensor) -> None:
    v = dlogits.shape[1]
    dlogits[:, v - v % 64 :] = 0


def dropped_last_columns(rows: KernelRows, dlogits: torch.Tensor) -> None:
    dlogits[:, -3:] = 0


def stored_p_minus_one(rows: KernelRows, dlogits: torch.Tensor) -> None:
    """The target from a p that was rounded to the storage type before 1 was subtracted."""
    ids = rows.token_ids[:, None]
    p = torch.softmax(rows.logits.double(), -1).gather(1, ids)
    exact = dlogits.gather(1, ids).double()
    rounded = 1 - p.to(dlogits.dtype).double()
    dlogits.scatter_(1, ids, (exact / (1 - p) * rounded).to(dlogits.dtype))


def one_percent_off(rows: KernelRows, dlogits: torch.Tensor) -> None:
    dlogits.mul_(1.01)


def ignored_mask(rows: KernelRows, terms: KernelTerms) -> tuple[KernelRows, KernelTerms]:
    return rows._replace(weights=torch.full_like(rows.weights, rows.weights.max().item())), terms


def changed(terms: KernelTerms, **settings: Any) -> KernelTerms:
    return terms._replace(settings=terms.settings._replace(**settings))


def reshaped(terms: KernelTerms, **numbers: float) -> KernelTerms:
    return changed(terms, shape=terms.settings.shape._replace(**numbers))


def entropy_sign(rows: KernelRows, terms: KernelTerms) -> tuple[KernelRows, KernelTerms]:
    return rows, changed(terms, entropy_coef=-terms.settings.entropy_coef)


def dropped_kl(rows: KernelRows, terms: KernelTerms) -> tuple[KernelRows, KernelTerms]:
    return rows, changed(terms, kl_coef=0.0)


def ignored_temperature(rows: KernelRows, terms: KernelTerms) -> tuple[KernelRows, KernelTerms]:
    return rows._replace(temperature=torch.ones_like(rows.temperature)), terms


def wrong_clip_edge(rows: KernelRows, terms: KernelTerms) -> tuple[KernelRows, KernelTerms]:
    """Clips at 1 + epsilon_low where it should at 1 + epsilon_high."""
    low = -math.expm1(terms.settings.shape.low_negative)
    return rows, reshaped(terms, high_positive=math.log1p(low))


def wrong_epsilon(rows: KernelRows, terms: KernelTerms) -> tuple[KernelRows, KernelTerms]:
    shape = terms.settings.shape
    return rows, reshaped(
        terms,
        high_positive=shape.high_positive * 1.001,
        high_negative=shape.high_negative * 1.001,
    )


def shifted_targets(rows: KernelRows, terms: KernelTerms) -> tuple[KernelRows, KernelTerms]:
    return rows._replace(token_ids=(rows.token_ids + 1) % rows.logits.shape[-1]), terms


def plain(dtype: torch.dtype = torch.float32) -> Case:
    return make_case(13, 50257, dtype, mask_every=5)


CONTROLS: dict[str, tuple[Broken, Callable[[], Case]]] = {
    "zeros": (Broken(after=zeros), plain),
    "zeros off target": (Broken(after=zeros_off_target), plain),
    "zeros off target, bf16": (Broken(after=zeros_off_target), lambda: plain(torch.bfloat16)),
    "dropped tail": (Broken(after=dropped_tail), plain),
    "dropped tail, fp16": (Broken(after=dropped_tail), lambda: plain(torch.float16)),
    "dropped last columns, bf16": (
        Broken(after=dropped_last_columns),
        lambda: make_case(5, 128256, torch.bfloat16),
    ),
    "rounded p": (
        Broken(after=stored_p_minus_one),
        lambda: make_case(13, 4096, torch.bfloat16, peak=0.99),
    ),
    "one percent": (Broken(after=one_percent_off), plain),
    "one percent, bf16": (Broken(after=one_percent_off), lambda: plain(torch.bfloat16)),
    "ignored mask": (Broken(ignored_mask), plain),
    "entropy sign": (Broken(entropy_sign), lambda: with_everything(plain())),
    "dropped kl": (Broken(dropped_kl), lambda: with_everything(plain())),
    "ignored temperature": (Broken(ignored_temperature), lambda: with_everything(plain())),
    "wrong clip edge": (
        Broken(wrong_clip_edge),
        lambda: make_case(13, 1000, objective=PPOClip(0.2, 0.35)),
    ),
    "wrong epsilon": (Broken(wrong_epsilon), plain),
    "shifted targets": (Broken(shifted_targets), plain),
}


@pytest.mark.parametrize("name", CONTROLS)
def test_the_suite_sees(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken, case = CONTROLS[name]
    check(case())  # the intact kernels pass this very case
    monkeypatch.setattr(backends, "kernels", lambda _: broken)
    with pytest.raises(AssertionError):
        check(case())
