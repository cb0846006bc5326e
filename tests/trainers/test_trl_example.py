"""The example learns, the benchmark runs, and the README's snippets for TRL do as they say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from limits import HANGS_AFTER
from repository import ROOT

pytest.importorskip("trl", reason="the TRL integration needs the trl extra")

import trl_setup
from trl import GRPOTrainer


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=HANGS_AFTER
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "found in sys.modules" not in done.stderr  # a module run by -m and imported too
    return done.stdout


@pytest.mark.nightly
def test_the_reward_of_the_example_rises() -> None:
    said = run("examples/trl_cfpo.py", "--updates", "30", "--vocabulary", "1500")
    found = re.search(r"mean reward: ([\d.]+) in the first .*, ([\d.]+) in the last", said)
    assert found, said
    first, last = map(float, found.groups())
    assert last > first + 0.05
    assert "off-policy updates: 0.0%" not in said


@pytest.mark.nightly
@pytest.mark.slow
def test_the_benchmark_checks_measures_and_draws(tmp_path: Path) -> None:
    # float32, because CPUs without products of bfloat16 take minutes for them.
    small = "--layers 1 --vocabulary 5000 --batch 2 --completion 16 --rounds 1 --dtype float32"
    saved, picture = tmp_path / "out.json", tmp_path / "out.png"
    shown = run("-m", "bench.trainer", *small.split(), "--json", str(saved), "--plot", str(picture))
    report = json.loads(saved.read_text())
    assert [entry["tokens"] for entry in report["memory"]] == [32]
    assert {len(taken) for taken in report["samples_ms"].values()} == {1}
    assert all(errors["gradient"] < 1e-4 for errors in report["errors"].values())
    assert picture.read_bytes().startswith(b"\x89PNG")
    again = run("-m", "bench.trainer", "--from-json", str(saved))
    assert "CFPOTrainer" in again and again in shown


def snippets() -> list[str]:
    text = (ROOT / "README.md").read_text()
    section = text.split("\n### TRL\n")[1].split("\n### ")[0]
    return re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)


def test_the_snippets_of_the_readme(tmp_path: Path) -> None:
    whole, subclass = snippets()
    folder = tmp_path / "model"
    trl_setup.make_model(folder)
    trl_setup.make_tokenizer().save_pretrained(folder)
    namespace = {
        "model": str(folder),
        "reward": trl_setup.low_token_reward,
        "config": trl_setup.make_config(tmp_path, num_iterations=2),
        "dataset": trl_setup.make_prompts(),
    }
    exec(compile(whole, "README.md", "exec"), namespace)
    logged = [entry for entry in namespace["trainer"].state.log_history if "loss" in entry]
    assert len(logged) == 2 and "ratio/outside_epsilon" in logged[1]

    exec(compile(subclass, "README.md", "exec"), namespace)
    assert issubclass(namespace["MyTrainer"], GRPOTrainer)
    trainer = trl_setup.make_trainer(tmp_path, cls=namespace["MyTrainer"], max_steps=1)
    trainer.train()
    assert "ratio/mean" in trainer.state.log_history[0]
