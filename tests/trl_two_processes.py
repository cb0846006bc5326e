"""Run by torchrun: the loss and its gradients in two processes, TRL's and ours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import trl_setup
from trl import GRPOTrainer

from cfpo_kernels import PPOClip
from cfpo_kernels.integrations.trl import compute_cfpo_loss


def gradients(trainer: Any, model: Any, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    trainer = trl_setup.make_trainer(folder, num_generations=8)
    rank, n_ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
    assert n_ranks == 2
    inputs = trl_setup.make_inputs(trainer, seed=rank)
    tokens = trainer.accelerator.gather(inputs["completion_mask"].sum())
    inputs["num_items_in_batch"] = tokens.sum()
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.accelerator.prepare_model(trainer.model)  # DistributedDataParallel
    assert model is not trainer.model
    model.train()
    metrics = trainer._metrics["train"]

    want = gradients(trainer, model, GRPOTrainer._compute_loss(trainer, model, inputs))
    expected = {name: metrics[name] for name in ("entropy",)}
    for logits_tokens in (None, 4):
        metrics.clear()
        loss = compute_cfpo_loss(trainer, model, inputs, PPOClip(), logits_tokens=logits_tokens)
        got = gradients(trainer, model, loss)
        for name, gradient in want.items():
            assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
        for name, values in expected.items():
            assert abs(metrics[name][0] - values[0]) <= 1e-5 * values[0], name
        largest = trainer.accelerator.gather(torch.tensor(metrics["ratio/max"]))
        assert largest[0] == largest[1], "each process logs the maximum of all"
    if rank == 0:
        print("two processes agree")


if __name__ == "__main__":
    main(Path(sys.argv[1]) / sys.argv[2] if len(sys.argv) > 2 else Path(sys.argv[1]))
