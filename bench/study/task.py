"""Sorting four digits: the task, a transformer of 28,000 parameters, its supervised start.

Shapes: B responses, P prompt tokens, T response tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cfpo_kernels import token_logps

N_DIGITS = 4
VOCABULARY = 64
EOS, SEPARATOR, FILLER = 10, 11, 12  # 0 to 9 are digits; those from FILLER on mean nothing
WIDTH, LAYERS, HEADS = 32, 2, 2
WARM_TARGET = 0.25  # the supervised start ends at this share of right samples
N_EVALUATED = 1024


@dataclass(frozen=True)
class Task:
    """What is rewarded: the sorted digits and EOS; with a bonus, also tokens after them.

    Args:
        max_extra: tokens that may stand between the answer and its EOS.
        length_bonus: the reward of each of those, whatever it is: an exploit.
    """

    max_extra: int = 0
    length_bonus: float = 0.0

    @property
    def max_response(self) -> int:
        return N_DIGITS + self.max_extra + 1

    def extra_tokens(self, mask: Tensor) -> Tensor:
        """Tokens beyond the answer and its EOS. (B, T) -> (B,)."""
        return (mask.sum(1) - N_DIGITS - 1).clamp(min=0).float()

    def score(self, numbers: Tensor, responses: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each response is right, and its reward; both (B,)."""
        answers = numbers.sort(1).values
        right = (responses[:, :N_DIGITS] == answers).all(1) & mask[:, :N_DIGITS].all(1)
        if not self.max_extra:
            right &= responses[:, N_DIGITS] == EOS
        return right.float(), right.float() + self.length_bonus * self.extra_tokens(mask)


def draw_numbers(n: int, rng: torch.Generator) -> Tensor:
    return torch.randint(0, 10, (n, N_DIGITS), generator=rng)


def prompts_of(numbers: Tensor) -> Tensor:
    """Digits (B, 4) -> prompt ids (B, 5)."""
    return F.pad(numbers, (0, 1), value=SEPARATOR)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        return x + self.down(F.relu(self.up(self.mlp_norm(x))))


class Policy(nn.Module):
    def __init__(self, max_response: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(N_DIGITS + 1 + max_response, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, first: int) -> Tensor:
        """Logits at the positions from `first` on. (B, L) -> (B, L - first, V)."""
        x = self.blocks(self.embed(ids) + self.position[: ids.shape[1]])
        return self.head(self.norm(x[:, first:]))

    def response_logits(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """(B, P), (B, T) -> (B, T, V)."""
        return self(torch.cat([prompts, responses[:, :-1]], 1), prompts.shape[1] - 1)

    @torch.no_grad()
    def generate(self, prompts: Tensor, length: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Samples at temperature 1: tokens (B, T), and a mask that is True up to and with EOS."""
        ids = prompts
        for _ in range(length):
            p = self(ids, ids.shape[1] - 1)[:, 0].softmax(-1)
            ids = torch.cat([ids, torch.multinomial(p, 1, generator=rng)], 1)
        responses = ids[:, prompts.shape[1] :]
        ends = responses == EOS
        return responses, ends.cumsum(1) - ends.long() == 0


@torch.no_grad()
def evaluate(policy: Policy, task: Task) -> dict[str, float]:
    """Samples for the same prompts with the same dice, every time."""
    rng = torch.Generator().manual_seed(10**6)
    numbers = draw_numbers(N_EVALUATED, rng)
    responses, mask = policy.generate(prompts_of(numbers), task.max_response, rng)
    right, _ = task.score(numbers, responses, mask)
    return {"right": right.mean().item(), "extra": task.extra_tokens(mask).mean().item()}


def warm_start(seed: int, max_extra: int) -> tuple[Policy, dict[str, float]]:
    """A policy that gives some right answers, and its score: all methods start from the same."""
    task = Task(max_extra)
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    policy = Policy(task.max_response)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-3, fused=True)
    for step in itertools.count(1):
        numbers = draw_numbers(128, rng)
        answers, mask = _answers(numbers, task, rng)
        logits = policy.response_logits(prompts_of(numbers), answers)
        logps = token_logps(logits, answers, mask=mask)
        assert isinstance(logps, Tensor)
        (-logps.sum() / mask.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 and (found := evaluate(policy, task))["right"] >= WARM_TARGET:
            return policy, found
    raise AssertionError


def _answers(numbers: Tensor, task: Task, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Right answers; where there is room, a quarter of them ramble on by 1 to 3 tokens."""
    n, length = len(numbers), task.max_response
    answers = torch.full((n, length), EOS)
    answers[:, :N_DIGITS] = numbers.sort(1).values
    extra = torch.zeros(n, dtype=torch.int64)
    if task.max_extra:
        rambles = torch.rand(n, generator=rng) < 0.25
        extra = torch.where(rambles, torch.randint(1, 4, (n,), generator=rng), 0)
        filler = torch.randint(FILLER, VOCABULARY, answers.shape, generator=rng)
        place = torch.arange(length) - N_DIGITS
        answers = torch.where((place >= 0) & (place < extra[:, None]), filler, answers)
    return answers, torch.arange(length) < (N_DIGITS + 1 + extra)[:, None]
