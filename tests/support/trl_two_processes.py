"""Run by torchrun: the loss and its gradients in two processes, TRL's and ours."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
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
    trainer.current_gradient_accumulation_steps, trainer.args.steps_per_generation = 2, 4
    model = trainer.accelerator.prepare_model(trainer.model)  # DistributedDataParallel
    assert model is not trainer.model
    model.train()
    trainer.beta, trainer.entropy_coef, trainer._entropy_bonus_enabled = 0.3, 0.1, True
    metrics = trainer._metrics["train"]

    for loss_type in ("dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo"):
        own = loss_type in ("luspo", "cispo")
        trainer.args.loss_type = trainer.loss_type = loss_type
        metrics.clear()
        want = gradients(trainer, model, GRPOTrainer._compute_loss(trainer, model, inputs))
        expected = {name: metrics[name] for name in ("entropy", "kl", "policy_loss")}
        for logits_tokens in (None, 4):
            metrics.clear()
            objective = None if own else PPOClip()
            loss = compute_cfpo_loss(trainer, model, inputs, objective, logits_tokens=logits_tokens)
            got = gradients(trainer, model, loss)
            for name, gradient in want.items():
                assert (got[name] - gradient).norm() <= 1e-5 * gradient.norm(), (loss_type, name)
            for name, (value,) in expected.items():
                error = abs(metrics[name][0] - value)
                assert error <= 1e-5 * max(abs(value), 0.1), (loss_type, name)
            largest = trainer.accelerator.gather(torch.tensor(metrics["ratio/max"]))
            assert largest[0] == largest[1], "each process logs the maximum of all"
    if rank == 0:
        print("two processes agree", flush=True)
    dist.barrier()
    # No destructors: gloo's thread may hold a last tensor still, for whose release it needs the
    # interpreter. It aborts where that has ended, and DDP's reducer waits for it for ever.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]) / sys.argv[2] if len(sys.argv) > 2 else Path(sys.argv[1]))
