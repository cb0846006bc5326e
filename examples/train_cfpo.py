"""Reinforcement learning with the CFPO loss, start to end, on a CPU.

A small transformer with a vocabulary of 131,072 tokens learns to sort digits. It is first trained
on right answers for a few dozen steps, until it gets some of them right, and then only on
rewards: sample a group of responses to each prompt, score them, compare each with its group, and
take several gradient steps on them with `cfpo_kernels.cfpo_loss`.

    python examples/train_cfpo.py                    # a few minutes on two cores
    python examples/train_cfpo.py --objective ppo    # the same with PPO clipping, to compare

Shapes in the comments: B responses, P prompt tokens, T response tokens, V vocabulary.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from _model import TinyLM
from _plot import plot_runs
from _task import SortDigits, load_tokenizer
from _timing import LossTime, measure_losses, naive_loss
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import cfpo_kernels

console = Console(highlight=False)


@dataclass(frozen=True)
class Config:
    """What a run is made of; the command line sets the first block."""

    objective: str = "cfpo"
    seeds: int = 3
    steps: int = 30
    backend: str = "auto"

    epsilon: float = 0.2
    d_model: int = 64
    n_layers: int = 2
    n_heads: int = 4

    warm_steps: int = 46
    warm_batch: int = 32
    warm_lr: float = 5e-3

    n_prompts: int = 16  # prompts a rollout
    group_size: int = 8  # responses a prompt
    n_minibatches: int = 4  # gradient steps a rollout
    lr: float = 5e-4
    max_grad_norm: float = 1.0

    n_eval: int = 256
    timing_repeats: int = 9

    @property
    def inplace(self) -> bool:
        """Let the gradient overwrite the logits, wherever kernels run: plain torch cannot."""
        has_kernels = cfpo_kernels.available_backends()["cpu"].available
        return has_kernels and self.backend != "reference"


SMOKE = Config(
    seeds=1,
    steps=2,
    d_model=32,
    n_layers=1,
    warm_steps=3,
    warm_batch=8,
    n_prompts=2,
    group_size=4,
    n_minibatches=2,
    n_eval=16,
    timing_repeats=2,
)


@dataclass
class Batch:
    """Responses and what the loss wants to know about them."""

    prompts: Tensor  # (B, P) int64
    responses: Tensor  # (B, T) int64
    mask: Tensor  # (B, T) bool, False behind the end of a response
    advantages: Tensor  # (B,) float32, one a response
    old_logps: Tensor  # (B, T) float32, log-probabilities under the policy that sampled them

    def split(self, n: int) -> Iterator[Batch]:
        """Cut into n minibatches."""
        parts = (x.chunk(n) for x in vars(self).values())
        return (Batch(*x) for x in zip(*parts, strict=True))


@dataclass
class StepLog:
    """One reinforcement learning step."""

    reward: float  # mean over the step's rollout
    ratio_mean: float  # mean |r - 1| over the step's tokens
    ratio_max: float  # largest |r - 1|
    outside: float  # share of tokens with |r - 1| > epsilon


@dataclass
class Score:
    """Mean reward on the held-out prompts."""

    sampled: float  # at temperature 1, as in training
    greedy: float


@dataclass
class Run:
    """One seed, start to end."""

    seed: int
    before: Score
    after: Score
    steps: list[StepLog]


# --- Reinforcement learning ----------------------------------------------------------------------


def policy_loss(logits: Tensor, batch: Batch, cfg: Config) -> tuple[Tensor, cfpo_kernels.CFPOStats]:
    """The loss of a minibatch, and its statistics. logits: (B, T, V), overwritten."""
    args = (logits, batch.responses, batch.advantages, batch.old_logps)
    settings = {
        "mask": batch.mask,
        "reduction": "token-mean",
        "inplace": cfg.inplace,
        "backend": cfg.backend,
        "return_stats": True,
    }
    if cfg.objective == "cfpo":
        return cfpo_kernels.cfpo_loss(*args, epsilon=cfg.epsilon, **settings)
    return cfpo_kernels.policy_loss(*args, objective=objective_of(cfg), **settings)


def objective_of(cfg: Config) -> cfpo_kernels.CFPO | cfpo_kernels.PPOClip:
    """The policy objective, as `policy_loss` takes it."""
    if cfg.objective == "cfpo":
        return cfpo_kernels.CFPO(cfg.epsilon)
    return cfpo_kernels.PPOClip(cfg.epsilon, cfg.epsilon)


def group_advantages(rewards: Tensor, group_size: int) -> Tensor:
    """How much better than its group each response did, in standard deviations. (B,) -> (B,)."""
    groups = rewards.view(-1, group_size)
    centred = groups - groups.mean(1, keepdim=True)
    # A group that is all right or all wrong has nothing to teach: its advantages are 0.
    return (centred / (groups.std(1, keepdim=True) + 1e-4)).flatten()


@torch.no_grad()
def collect_rollout(
    model: TinyLM, task: SortDigits, rng: random.Random, cfg: Config
) -> tuple[Batch, float]:
    """Sample a group of responses to each of a few prompts; return them with their mean reward."""
    problems = [p for p in task.sample(cfg.n_prompts, rng) for _ in range(cfg.group_size)]
    prompts = task.prompt_ids(problems)
    # The sampler's own log-probabilities are the old ones: its logits are those of training, but
    # for a rare last bit where a product of another shape is summed in another order.
    responses, mask, old_logps = model.generate(prompts, task.max_response, task.eos_id)
    rewards = task.rewards(problems, responses, mask)
    advantages = group_advantages(rewards, cfg.group_size)
    batch = Batch(prompts, responses, mask, advantages, old_logps)
    return batch, rewards.mean().item()


def optimizer_step(
    model: TinyLM, optimizer: torch.optim.Optimizer, loss: Tensor, cfg: Config
) -> None:
    """Backward and one update of the weights."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()


def train_on_rollout(
    model: TinyLM, optimizer: torch.optim.Optimizer, rollout: Batch, cfg: Config
) -> Tensor:
    """Several updates on one rollout. Returns |r - 1| of its tokens.

    The first minibatch is on-policy. By the last, the weights have moved away from those that
    sampled the responses, r has left 1, and the objective has to hold it near.
    """
    distances = []
    for batch in rollout.split(cfg.n_minibatches):
        logits = model.response_logits(batch.prompts, batch.responses)
        loss, stats = policy_loss(logits, batch, cfg)
        optimizer_step(model, optimizer, loss, cfg)
        distances.append(torch.expm1(stats.logps - batch.old_logps)[batch.mask].abs())
    return torch.cat(distances)


def reinforce(
    model: TinyLM,
    optimizer: torch.optim.Optimizer,
    task: SortDigits,
    rng: random.Random,
    cfg: Config,
    seed: int,
) -> list[StepLog]:
    """The reinforcement learning loop."""
    logs: list[StepLog] = []
    for step in track(cfg.steps, f"seed {seed}: {cfg.objective.upper()}", logs):
        # Smaller steps towards the end average out the noise of the last rollouts.
        set_lr(optimizer, cfg.lr * (1 - 0.9 * step / cfg.steps))
        rollout, reward = collect_rollout(model, task, rng, cfg)
        distance = train_on_rollout(model, optimizer, rollout, cfg)
        outside = (distance > cfg.epsilon).float().mean()
        logs.append(StepLog(reward, distance.mean().item(), distance.max().item(), outside.item()))
    return logs


# --- Before and after ----------------------------------------------------------------------------


def warm_start(
    model: TinyLM,
    optimizer: torch.optim.Optimizer,
    task: SortDigits,
    rng: random.Random,
    cfg: Config,
    seed: int,
) -> None:
    """Learn from right answers, until some samples are right: no reward, no gradient."""
    for step in track(cfg.warm_steps, f"seed {seed}: warm start"):
        set_lr(optimizer, cfg.warm_lr * min(1, (step + 1) / 10))
        problems = task.sample(cfg.warm_batch, rng)
        answers = task.answer_ids(problems)
        logits = model.response_logits(task.prompt_ids(problems), answers)
        logps = cfpo_kernels.token_logps(logits, answers, inplace=cfg.inplace, backend=cfg.backend)
        optimizer_step(model, optimizer, -logps.mean(), cfg)


def evaluate(model: TinyLM, task: SortDigits, cfg: Config) -> Score:
    """Mean reward on prompts that training never sees."""
    problems = task.held_out[: cfg.n_eval]
    prompts = task.prompt_ids(problems)

    def mean_reward(greedy: bool) -> float:
        responses, mask, _ = model.generate(prompts, task.max_response, task.eos_id, greedy)
        return task.rewards(problems, responses, mask).mean().item()

    with torch.random.fork_rng():
        torch.manual_seed(0)  # the same dice before and after
        return Score(mean_reward(greedy=False), mean_reward(greedy=True))


def time_losses(
    model: TinyLM, optimizer: torch.optim.Optimizer, batch: Batch, cfg: Config
) -> dict[str, LossTime]:
    """Time updates on one real minibatch, with the fused loss and with plain torch."""
    set_lr(optimizer, 0.0)  # the same work, but the weights stay
    args = (batch.responses, batch.advantages, batch.old_logps, batch.mask)
    return measure_losses(
        forward=lambda: model.response_logits(batch.prompts, batch.responses),
        losses={
            "fused": lambda logits: policy_loss(logits, batch, cfg)[0],
            "naive": lambda logits: naive_loss(logits, *args, objective_of(cfg)),
        },
        finish=lambda loss: optimizer_step(model, optimizer, loss, cfg),
        repeats=cfg.timing_repeats,
    )


def run_seed(seed: int, task: SortDigits, cfg: Config, last: bool) -> tuple[Run, dict]:
    """Train one model. The last seed's, once trained, also serves to time the loss."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = TinyLM(task.vocab_size, cfg.d_model, cfg.n_layers, cfg.n_heads, max_len=32)
    optimizer = torch.optim.AdamW(
        model.parameters(), betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    warm_start(model, optimizer, task, rng, cfg, seed)
    before = evaluate(model, task, cfg)
    steps = reinforce(model, optimizer, task, rng, cfg, seed)
    run = Run(seed, before, evaluate(model, task, cfg), steps)
    if not last:
        return run, {}
    rollout, _ = collect_rollout(model, task, rng, cfg)
    return run, time_losses(model, optimizer, next(rollout.split(cfg.n_minibatches)), cfg)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter."""
    for group in optimizer.param_groups:
        group["lr"] = lr


# --- Reporting -----------------------------------------------------------------------------------


def track(n_steps: int, title: str, logs: list[StepLog] | None = None) -> Iterator[int]:
    """Count to n_steps with a progress bar or, where no terminal is, a line now and then."""
    bar = Progress(
        TextColumn("{task.description:20}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[status]}"),
        console=console,
        disable=not console.is_terminal,
    )
    with bar:
        row = bar.add_task(title, total=n_steps, status="")
        for step in range(n_steps):
            yield step
            status = describe(logs[-5:]) if logs else ""
            bar.update(row, advance=1, status=status)
            if not console.is_terminal and ((step + 1) % 10 == 0 or step + 1 == n_steps):
                console.print(f"{title:20} {step + 1:3}/{n_steps}  {status}".rstrip())


def describe(logs: list[StepLog]) -> str:
    """A line on the last few steps."""
    n = len(logs)
    reward = sum(x.reward for x in logs) / n
    outside = sum(x.outside for x in logs) / n
    return f"reward {reward:.2f}, {outside:5.1%} of tokens outside epsilon"


def report(runs: list[Run], times: dict[str, LossTime], cfg: Config) -> None:
    """Print the rewards before and after, and what the loss costs."""
    table = Table(title=f"Mean reward on {cfg.n_eval} held-out prompts")
    for column in ("seed", "sampled: before", "after", "greedy: before", "after"):
        table.add_column(column, justify="right")
    for run in runs:
        values = (run.before.sampled, run.after.sampled, run.before.greedy, run.after.greedy)
        table.add_row(str(run.seed), *(f"{v:.3f}" for v in values))
    console.print(table)

    before = sum(r.before.sampled for r in runs) / len(runs)
    after = sum(r.after.sampled for r in runs) / len(runs)
    n_rose = sum(r.after.sampled > r.before.sampled for r in runs)
    console.print(
        f"{cfg.objective.upper()}: sampled reward rose on {n_rose} of {len(runs)} seeds, "
        f"mean {before:.3f} -> {after:.3f}."
    )
    console.print(
        "Loss + gradient within an update (forward, loss, backward, optimizer)\n"
        f"of one minibatch, medians of {cfg.timing_repeats} interleaved repetitions:"
    )
    # Without kernels the package computes the loss in plain torch, which is not fused.
    fused = "fused kernel" if cfg.inplace else "cfpo_kernels in plain torch"
    for name, label in (("fused", fused), ("naive", "naive, plain torch in float32")):
        t = times[name]
        console.print(
            f"  {label:30}{t.loss_ms:7.1f} ms, {t.share:4.0%} of the update's {t.update_ms:.0f} ms"
        )


def parse_args() -> tuple[Config, argparse.Namespace]:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small policy with a 131,072-token vocabulary by reinforcement "
        "learning with the CFPO loss, on a CPU.",
    )
    default = Config()
    parser.add_argument(
        "--objective",
        choices=("cfpo", "ppo"),
        default="cfpo",
        help="CFPO (default), or PPO clipping",
    )
    parser.add_argument(
        "--seeds",
        type=positive,
        metavar="N",
        help=f"train seeds 0 to N - 1; default {default.seeds}",
    )
    parser.add_argument(
        "--steps", type=positive, metavar="N", help=f"rollouts a seed; default {default.steps}"
    )
    parser.add_argument(
        "--backend",
        choices=("auto", "cpu", "reference"),
        default="auto",
        help="what computes the loss: cpu kernels, or plain torch; auto (default) picks",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        default=Path("demo.png"),
        metavar="PNG",
        help="where the plot goes; default demo.png",
    )
    parser.add_argument(
        "--threads", type=positive, metavar="N", help="CPU threads; default: as torch does"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="only show that it runs: tiny, learns nothing"
    )
    args = parser.parse_args()
    given = {k: getattr(args, k) for k in ("objective", "seeds", "steps", "backend")}
    given = {k: v for k, v in given.items() if v is not None}
    return replace(SMOKE if args.smoke else default, **given), args


def positive(text: str) -> int:
    """An argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def main() -> None:
    """Train every seed, report, plot."""
    cfg, args = parse_args()
    # Logits and gradients are tens of megabytes each, and new at every step: in huge pages the
    # kernel of the operating system spends far less time on handing them out.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if args.threads:
        torch.set_num_threads(args.threads)
    start = time.perf_counter()
    task = SortDigits(load_tokenizer())
    console.print(
        f'Task: "sort 7391:" -> "1379". {task.vocab_size:,} tokens, {torch.get_num_threads()} '
        f"threads, backend {cfg.backend}."
    )
    runs: list[Run] = []
    times: dict[str, LossTime] = {}
    for seed in range(cfg.seeds):
        run, times = run_seed(seed, task, cfg, last=seed == cfg.seeds - 1)
        runs.append(run)
    report(runs, times, cfg)
    plot_runs(runs, cfg.objective, cfg.epsilon, args.plot)
    console.print(f"Plot: {args.plot}. Total: {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
