"""A bare training loop with FSDP2, here on two processes that share a CPU (gloo).

The loss is a mean over the tokens of all ranks, which hold different numbers of them. FSDP averages
gradients over the ranks, so each rank divides the sum over its tokens by n_tokens / n_ranks::

    loss = cfpo_loss(logits, ..., normalizer=n_tokens / n_ranks)

where n_tokens is summed over the ranks. The example first checks that this gives the loss and the
gradient of one process with the whole batch, then trains on a toy reward: even tokens are good.

    python examples/fsdp2.py
    python examples/fsdp2.py --normalizer local    # each rank its own mean: what goes wrong
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _model import Block
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from cfpo_kernels import available_backends, cfpo_loss, token_logps

PROMPT = 4


class Model(nn.Module):
    """A small causal transformer; (B, L) token ids to (B, L, V) float32 logits."""

    def __init__(self, vocab: int, d_model: int = 64, n_layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, d_model)
        self.blocks = nn.ModuleList(Block(d_model, 4) for _ in range(n_layers))
        self.head = nn.Linear(d_model, vocab, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@dataclass
class Batch:
    """Responses of one rank: B sequences of PROMPT given tokens and T sampled ones."""

    ids: Tensor  # (B, PROMPT + T)
    mask: Tensor  # (B, T) bool, False behind the end of a response
    advantages: Tensor  # (B, T), 1 or -1
    old_logps: Tensor  # (B, T)
    n_even: Tensor  # 0-d


def response_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits (B, T, V) that predict the response."""
    return model(ids[:, :-1])[:, PROMPT - 1 :]


@torch.no_grad()
def rollout(model: nn.Module, prompts: Tensor, noise: Tensor, lengths: Tensor) -> Batch:
    """Samples responses (argmax of logits + Gumbel noise) and rewards even tokens."""
    ids = prompts
    for t in range(noise.shape[1]):
        logits = model(ids)[:, -1]
        ids = torch.cat([ids, (logits + noise[:, t]).argmax(-1, keepdim=True)], dim=1)
    tokens = ids[:, PROMPT:]
    mask = torch.arange(tokens.shape[1]) < lengths[:, None]
    rewards = (tokens % 2 == 0).float()
    # Scored as in training, so that r starts at exactly 1.
    old_logps = token_logps(response_logits(model, ids), tokens, mask=mask)
    return Batch(ids, mask, 2 * rewards - 1, old_logps, rewards[mask].sum())


def policy_loss(model: nn.Module, batch: Batch, normalizer: float | Tensor | None) -> Tensor:
    logits = response_logits(model, batch.ids)
    return cfpo_loss(
        logits,
        batch.ids[:, PROMPT:],
        batch.advantages,
        batch.old_logps,
        mask=batch.mask,
        normalizer=normalizer,
        inplace=bool(available_backends()["cpu"]),
    )


def sum_over_ranks(x: Tensor) -> Tensor:
    x = x.clone()
    dist.all_reduce(x)
    return x


def global_batch(step: int, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts, Gumbel noise and response lengths of all ranks: the same numbers on each."""
    g = torch.Generator().manual_seed(step)
    prompts = torch.randint(0, args.vocab, (args.batch, PROMPT), generator=g)
    noise = -(-torch.rand(args.batch, args.length, args.vocab, generator=g).log()).log()
    # Short in the first half of the batch, long in the second: the ranks' token counts differ.
    lengths = torch.randint(1, args.length // 2, (args.batch,), generator=g)
    lengths[args.batch // 2 :] += args.length // 2
    return prompts, noise, lengths


def compare_with_one_process(
    model: nn.Module, whole: nn.Module, loss: Tensor, batch: Batch, mine: slice, parts: tuple
) -> tuple[float, float]:
    """Relative differences of loss and gradient from those of `whole` on the batch of all ranks."""
    everything = rollout(whole, *parts)
    assert torch.equal(everything.ids[mine], batch.ids), "the ranks sampled something else"
    want = policy_loss(whole, everything, None)
    want.backward()
    got = sum_over_ranks(loss.detach()) / dist.get_world_size()
    loss_error = (got - want).abs() / want.abs()
    squares = torch.zeros(2)
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert isinstance(ours.grad, DTensor) and theirs.grad is not None
        full = ours.grad.full_tensor()
        squares += torch.stack([(full - theirs.grad).square().sum(), theirs.grad.square().sum()])
    return loss_error.item(), (squares[0] / squares[1]).sqrt().item()


def run(rank: int, args: argparse.Namespace, meeting_point: str) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // args.ranks))
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=args.ranks
    )
    torch.manual_seed(0)  # the same weights everywhere, before they are sharded
    model = Model(args.vocab)
    whole = copy.deepcopy(model)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    per_rank = args.batch // args.ranks
    mine = slice(rank * per_rank, (rank + 1) * per_rank)
    for step in range(args.steps):
        parts = global_batch(step, args)
        batch = rollout(model, *(x[mine] for x in parts))
        n_tokens = sum_over_ranks(batch.mask.sum())
        for epoch in range(args.epochs):
            # None: the mean over this rank's own tokens.
            normalizer = n_tokens / args.ranks if args.normalizer == "global" else None
            loss = policy_loss(model, batch, normalizer)
            loss.backward()
            if step == epoch == 0:
                errors = compare_with_one_process(model, whole, loss, batch, mine, parts)
                if rank == 0:
                    print(
                        f"against one process: loss off by {errors[0]:.1e}, gradient by "
                        f"{errors[1]:.1e} (relative)"
                    )
            optimizer.step()
            optimizer.zero_grad()
        reward = sum_over_ranks(batch.n_even) / n_tokens
        if rank == 0:
            print(f"step {step:2d}  tokens {int(n_tokens):5d}  reward {reward:.3f}", flush=True)
    # Without it gloo's thread may hold the last tensor still when the interpreter ends, and abort.
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=2, help="gradient steps on each rollout")
    parser.add_argument("--batch", type=int, default=64, help="responses of all ranks")
    parser.add_argument("--length", type=int, default=16, help="tokens of the longest response")
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--normalizer", choices=["global", "local"], default="global")
    args = parser.parse_args()
    if args.batch % (2 * args.ranks):
        parser.error("--batch must be divisible by twice the number of ranks")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(run, args=(args, f"{folder}/meeting-point"), nprocs=args.ranks)


if __name__ == "__main__":
    main()
