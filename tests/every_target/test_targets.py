"""A target that runs other kernels than its own would pass everything."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from targets import Target

import cfpo_kernels
from cfpo_kernels import reference


def test_calls_go_there(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    reached: list[Any] = []
    inputs = torch.randn(3, 10), torch.tensor([1, 2, 3])
    if target.name == "reference":
        scored = reference.token_logps
        monkeypatch.setattr(
            reference, "token_logps", lambda *a, **k: (reached.append(None), scored(*a, **k))[1]
        )
    else:
        cls = type(target.backend)
        scores = cls.token_logps
        monkeypatch.setattr(
            cls, "token_logps", lambda x, *a, **k: (reached.append(x), scores(x, *a, **k))[1]
        )
    for backend in ("auto", "cpu"):
        cfpo_kernels.token_logps(*inputs, backend=backend)
    assert reached == [target.backend] * 2


@pytest.mark.only_on("cpu-*", reason="the others have no levels")
def test_the_level(target: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = torch.randn(3, 10), torch.tensor([1, 2, 3])
    assert f"cpu-{os.environ['CFPO_KERNELS_CPU_LEVEL']}" == target.name
    cfpo_kernels.token_logps(*inputs)
    monkeypatch.setenv("CFPO_KERNELS_CPU_LEVEL", "another")  # which the kernels do look at
    with pytest.raises(ValueError, match="another"):
        cfpo_kernels.token_logps(*inputs)


@pytest.mark.only_on("cuda-ptx*", "triton-ptx*", reason="the others run no PTX")
def test_ptx_runs(target: Target) -> None:
    cfpo_kernels.token_logps(torch.randn(3, 10).bfloat16(), torch.tensor([1, 2, 3]))
    assert target.runner.launches if target.runner else target.module.code == "ptx"
