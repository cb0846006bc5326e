"""Trainers are optional: nothing imports one unasked, and the package works without any."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from limits import HANGS_AFTER
from repository import ROOT

TRAINERS = ("trl", "transformers", "verl", "openrlhf", "ray", "deepspeed")
INTEGRATIONS = {
    "trl": "trl",
    "verl": "verl",
    "verl_logprobs": "verl",
    "openrlhf": "openrlhf",
}


def run(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=HANGS_AFTER
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_package_imports_no_trainer() -> None:
    said = run(
        "import sys, cfpo_kernels, cfpo_kernels.integrations\n"
        "from cfpo_kernels.integrations import openrlhf_ray\n"
        f"print([name for name in {TRAINERS} if name in sys.modules])"
    )
    assert said.strip() == "[]"


def test_without_trainers_the_package_works_and_integrations_say_what_to_install() -> None:
    said = run(
        f"""
import importlib, sys
for name in {TRAINERS}:
    sys.modules[name] = None  # as if not installed
import torch, cfpo_kernels
logps = torch.tensor([-1.0, -2.0], requires_grad=True)
cfpo_kernels.cfpo_loss_from_logps(logps, torch.ones(2)).backward()
logits = torch.randn(2, 9, requires_grad=True)
cfpo_kernels.cfpo_loss(logits, torch.tensor([1, 2]), torch.ones(2)).backward()
assert logps.grad.all() and logits.grad.all()
for name in {tuple(INTEGRATIONS)}:
    try:
        importlib.import_module("cfpo_kernels.integrations." + name)
    except ImportError as error:
        print(name, "::", error)
"""
    )
    messages = dict(line.split(" :: ", 1) for line in said.splitlines())
    assert set(messages) == set(INTEGRATIONS)
    for name, trainer in INTEGRATIONS.items():
        assert re.search(f"needs .*pip install '{trainer}>=", messages[name], re.DOTALL)


EXAMPLES = ROOT / "examples"


def run_example(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        # The models are too small for more threads, which would only wait for each other.
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rewards(said: str) -> list[float]:
    return [float(x) for x in re.findall(r"^step .*reward ([\d.]+)$", said, re.MULTILINE)]


def errors(said: str) -> list[float]:
    found = re.search(r"loss off by (\S+), gradient by (\S+) ", said)
    assert found
    return [float(x) for x in found.groups()]


@pytest.mark.slow
def test_the_fsdp2_example_is_one_process_split_in_two() -> None:
    said = run_example("fsdp2.py", "--steps", "8", "--vocab", "256", "--batch", "32")
    assert max(errors(said)) < 1e-5
    assert "largest ratio of the first step: 1.0\n" in said
    found = rewards(said)
    assert len(found) == 8 and found[-1] > found[0] + 0.2
    # Each rank's own mean is not the mean over all tokens, and the example's check sees it.
    local = run_example("fsdp2.py", "--steps", "1", "--vocab", "256", "--normalizer", "local")
    assert min(errors(local)) > 1e-2


@pytest.mark.slow
def test_the_tensor_parallel_example_is_one_process_split_in_two() -> None:
    said = run_example("tensor_parallel.py", "--steps", "2", "--vocab", "257", "--batch", "32")
    assert "129 of 257 rows of the head on rank 0" in said
    assert max(errors(said)) < 1e-5
    assert len(rewards(said)) == 2


@pytest.mark.slow
def test_the_transformers_example_learns_from_hidden_states() -> None:
    pytest.importorskip("transformers", reason="requirements/trainers.txt")
    said = run_example("transformers_packed.py", "--steps", "8", "--vocab", "256")
    losses = re.search(r"loss (\S+) from padded logits, (\S+) from packed", said)
    assert losses and float(losses[1]) == pytest.approx(float(losses[2]), abs=2e-6)
    without_logits = re.search(r"loss (\S+) from hidden states", said)
    assert without_logits and float(without_logits[1]) == pytest.approx(float(losses[1]), abs=2e-6)
    assert float(losses[1]) != 0
    found = rewards(said)
    assert len(found) == 8 and found[-1] > found[0] + 0.2
