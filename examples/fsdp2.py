"""A bare training loop with FSDP2 and no logits, here on two processes that share a CPU (gloo).

FSDP has a weight whole inside its module's forward only. `LinearCFPOLoss(head=lm_head)` computes
the loss there, from hidden states, a tile of logits at a time.

The loss is a mean over the tokens of all ranks, which hold different numbers of them. FSDP averages
gradients over the ranks, so each rank divides the sum over its tokens by n_tokens / n_ranks::

    loss = loss_of(hidden, ..., normalizer=n_tokens / n_ranks)

where n_tokens is summed over the ranks. The example first checks that this gives the loss and the
gradient of one process with the whole batch, then trains on a toy reward: even tokens are good.

    python examples/fsdp2.py
    python examples/fsdp2.py --normalizer local    # each rank its own mean: what goes wrong
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.distributed as dist
from _responses import Batch, Model, difference, global_batch, on_all_ranks, parser, rollout
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from cfpo_kernels import CFPOStats, LinearCFPOLoss


class ModelWithLoss(Model):
    """Its forward gives the loss too: FSDP's hooks know of calls of modules, not of methods."""

    def __init__(self, vocab: int) -> None:
        super().__init__(vocab)
        self.loss_of = LinearCFPOLoss(epsilon=0.2, head=self.head, return_stats=True)

    def forward(
        self,
        ids: Tensor | None = None,
        batch: Batch | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, CFPOStats]:
        """Logits of `ids`, or the loss of `batch` and its statistics."""
        if batch is None:
            return super().forward(ids)
        return self.loss_of(
            self.of_responses(batch),
            batch.responses,
            batch.advantages,
            batch.old_logps,
            mask=batch.mask,
            normalizer=normalizer,
        )


def scored_rollout(model: ModelWithLoss, *parts: Tensor) -> Batch:
    batch = rollout(model, *parts)
    with torch.no_grad():  # scored as in training, so that r starts at exactly 1
        _, stats = model(batch=batch)
    batch.old_logps = stats.logps
    return batch


def sum_over_ranks(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def compare_with_one_process(
    model: ModelWithLoss,
    whole: ModelWithLoss,
    loss: Tensor,
    batch: Batch,
    mine: slice,
    parts: tuple,
) -> tuple[float, float]:
    """Relative differences of loss and gradient from those of `whole` on the batch of all ranks."""
    everything = scored_rollout(whole, *parts)
    assert torch.equal(everything.ids[mine], batch.ids), "the ranks sampled something else"
    want, _ = whole(batch=everything)
    want.backward()
    got = sum_over_ranks(loss.detach()) / dist.get_world_size()
    return ((got - want).abs() / want.abs()).item(), difference(model, whole)


def run(rank: int, args: argparse.Namespace) -> None:
    torch.manual_seed(0)  # the same weights everywhere, before they are sharded
    model = ModelWithLoss(args.vocab)
    whole = copy.deepcopy(model)
    for part in (*model.blocks, model.head):
        fully_shard(part)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    per_rank = args.batch // args.ranks
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    for step in range(args.steps):
        parts = global_batch(step, args)
        batch = scored_rollout(model, *(x[mine] for x in parts))
        n_tokens = sum_over_ranks(batch.mask.sum())
        for epoch in range(args.epochs):
            # None: the mean over this rank's own tokens.
            normalizer = n_tokens / args.ranks if args.normalizer == "global" else None
            loss, stats = model(batch=batch, normalizer=normalizer)
            loss.backward()
            if step == epoch == 0:
                errors = compare_with_one_process(model, whole, loss, batch, mine, parts)
                if rank == 0:
                    print(f"largest ratio of the first step: {stats.ratio_max.item()}")
                    print(
                        f"against one process: loss off by {errors[0]:.1e}, gradient by "
                        f"{errors[1]:.1e} (relative)"
                    )
            optimizer.step()
            optimizer.zero_grad()
        reward = sum_over_ranks(batch.n_even) / n_tokens
        if rank == 0:
            print(f"step {step:2d}  tokens {int(n_tokens):5d}  reward {reward:.3f}", flush=True)


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--normalizer", choices=["global", "local"], default="global")
    args = arguments.parse_args()
    if args.batch % (2 * args.ranks):
        arguments.error("--batch must be divisible by twice the number of ranks")
    on_all_ranks(run, args)


if __name__ == "__main__":
    main()
