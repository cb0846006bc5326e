"""A small model and batches of its responses, for the examples that run on several processes."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _model import Block
from torch import Tensor, nn

PROMPT = 4


@dataclass
class Batch:
    """Responses: B sequences of PROMPT given tokens and T sampled ones."""

    ids: Tensor  # (B, PROMPT + T)
    mask: Tensor  # (B, T) bool, False behind the end of a response
    advantages: Tensor  # (B, T), 1 or -1
    n_even: Tensor  # 0-d
    old_logps: Tensor | None = None  # (B, T)

    @property
    def responses(self) -> Tensor:
        return self.ids[:, PROMPT:]


class Model(nn.Module):
    """A small causal transformer; (B, L) token ids to (B, L, V) float32 logits."""

    def __init__(self, vocab: int, d_model: int = 64, n_layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, d_model)
        self.blocks = nn.ModuleList(Block(d_model, 4) for _ in range(n_layers))
        self.head = nn.Linear(d_model, vocab, bias=False)
        nn.init.normal_(self.head.weight, std=0.02)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return x

    def of_responses(self, batch: Batch) -> Tensor:
        """The hidden states (B, T, D) whose logits predict the response."""
        return self.hidden(batch.ids[:, :-1])[:, PROMPT - 1 :]

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.hidden(ids))


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
    return Batch(ids, mask, 2 * rewards - 1, rewards[mask].sum())


def global_batch(step: int, args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts, Gumbel noise and response lengths of all ranks: the same numbers on each."""
    g = torch.Generator().manual_seed(step)
    prompts = torch.randint(0, args.vocab, (args.batch, PROMPT), generator=g)
    noise = -(-torch.rand(args.batch, args.length, args.vocab, generator=g).log()).log()
    # Short in the first half of the batch, long in the second: the ranks' token counts differ.
    lengths = torch.randint(1, args.length // 2, (args.batch,), generator=g)
    lengths[args.batch // 2 :] += args.length // 2
    return prompts, noise, lengths


def difference(model: nn.Module, whole: nn.Module) -> float:
    """The relative difference of the gradients of a sharded model and of one in one process."""
    squares = torch.zeros(2)
    for ours, theirs in zip(model.parameters(), whole.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        full = ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad
        squares += torch.stack([(full - theirs.grad).square().sum(), theirs.grad.square().sum()])
    return (squares[0] / squares[1]).sqrt().item()


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--ranks", type=int, default=2)
    made.add_argument("--steps", type=int, default=12)
    made.add_argument("--epochs", type=int, default=2, help="gradient steps on each rollout")
    made.add_argument("--batch", type=int, default=64, help="responses of all ranks")
    made.add_argument("--length", type=int, default=16, help="tokens of the longest response")
    made.add_argument("--vocab", type=int, default=1024)
    made.add_argument("--lr", type=float, default=1e-2)
    return made


def on_all_ranks(run: Callable[[int, argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Calls run(rank, args) in processes that share a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _on_rank,
            args=(run, args, f"{folder}/meeting-point"),
            nprocs=args.ranks,
            # Its processes end without taking Python down, where a thread of gloo's that holds the
            # last tensor still would abort; destroy_process_group does not end that thread.
            start_method="forkserver",
        )


def _on_rank(
    rank: int,
    run: Callable[[int, argparse.Namespace], None],
    args: argparse.Namespace,
    meeting_point: str,
) -> None:
    torch.set_num_threads(max(1, torch.get_num_threads() // args.ranks))
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting_point}", rank=rank, world_size=args.ranks
    )
    run(rank, args)
    dist.barrier()  # nobody leaves whom another still waits for
    dist.destroy_process_group()
