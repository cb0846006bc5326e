"""A training loop with tensor parallelism and no logits, here on two processes that share a CPU.

`parallelize_module` with ColwiseParallel splits the head over the vocabulary: each rank has some
rows of its weight, a DTensor. With hidden states that are a DTensor of the same mesh the loss needs
nothing else: a rank has a tile of its part of the logits, ranks exchange sums over their columns
and the logits of tokens, and gradients have the placements of what they belong to.

The example checks that loss and gradient are those of one process, and the loss equal in bits on
all ranks, then trains on a toy reward: even tokens are good.

    python examples/tensor_parallel.py
    python examples/tensor_parallel.py --ranks 4 --vocab 1003    # parts that differ
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.distributed as dist
from _responses import Batch, Model, difference, global_batch, on_all_ranks, parser, rollout
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from cfpo_kernels import linear_cfpo_loss, linear_token_logps


def parallelize(model: Model, mesh: DeviceMesh) -> None:
    plan = {"head": ColwiseParallel(output_layouts=Replicate())}  # of which sampling takes logits
    for i in range(len(model.blocks)):
        plan |= {f"blocks.{i}.mlp.0": ColwiseParallel(), f"blocks.{i}.mlp.2": RowwiseParallel()}
    parallelize_module(model, mesh, plan)


def hidden_of(model: Model, batch: Batch, mesh: DeviceMesh | None) -> Tensor:
    """Of the responses, (B, T, D); as whole on each rank as they were before."""
    hidden = model.of_responses(batch)
    return hidden if mesh is None else DTensor.from_local(hidden, mesh, [Replicate()])


def scored_rollout(model: Model, mesh: DeviceMesh | None, *parts: Tensor) -> Batch:
    batch = rollout(model, *parts)
    with torch.no_grad():  # by what the loss multiplies, so that r starts at exactly 1
        hidden = hidden_of(model, batch, mesh)
        batch.old_logps = linear_token_logps(
            hidden, model.head.weight, batch.responses, mask=batch.mask
        )
    return batch


def policy_loss(model: Model, mesh: DeviceMesh | None, batch: Batch) -> Tensor:
    return linear_cfpo_loss(
        hidden_of(model, batch, mesh),
        model.head.weight,
        batch.responses,
        batch.advantages,
        batch.old_logps,
        mask=batch.mask,
    )


def equal_on_all_ranks(x: Tensor) -> bool:
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x)
    return all(torch.equal(x, other) for other in found)


def run(rank: int, args: argparse.Namespace) -> None:
    torch.manual_seed(0)  # the same weights everywhere, before they are split
    model = Model(args.vocab)
    whole = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (args.ranks,))
    parallelize(model, mesh)
    # foreach takes no list of tensors of which some are DTensors.
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, foreach=False)

    for step in range(args.steps):
        parts = global_batch(step, args)
        batch = scored_rollout(model, mesh, *parts)
        for epoch in range(args.epochs):
            loss = policy_loss(model, mesh, batch)
            loss.backward()
            assert equal_on_all_ranks(loss.detach()), "the losses differ"
            if step == epoch == 0:
                want = policy_loss(whole, None, batch)
                want.backward()
                error, of_gradient = (loss - want).abs() / want.abs(), difference(model, whole)
                if rank == 0:
                    local = model.head.weight.to_local().shape[0]
                    print(f"{local} of {args.vocab} rows of the head on rank 0")
                    print(
                        f"against one process: loss off by {error.item():.1e}, gradient by "
                        f"{of_gradient:.1e} (relative)"
                    )
            optimizer.step()
            optimizer.zero_grad()
        reward = batch.n_even / batch.mask.sum()
        if rank == 0:
            print(f"step {step:2d}  reward {reward:.3f}", flush=True)


def main() -> None:
    on_all_ranks(run, parser(__doc__.splitlines()[0]).parse_args())


if __name__ == "__main__":
    main()
