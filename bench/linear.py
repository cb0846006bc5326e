"""The loss from hidden states, beside plain PyTorch and other packages' fused heads.

One PPO step of a linear head: loss, gradient of the hidden states and of the weight. Time is held
against the three plain products that any of them has to make; memory, the number of products and
the error of the weight's gradient stand beside it.
"""

import re
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from importlib import import_module
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cfpo_kernels
from bench.cases import DTYPES
from bench.machine import describe_machine, describe_versions, device_name
from bench.memory import can_measure_cpu, cpu_extra_bytes, cuda_extra_bytes
from bench.problem import selected_logps
from bench.timing import interleaved_samples
from cfpo_kernels import PPOClip

PRODUCTS = "products"
EPSILON = 0.2
SEQUENCE = 64  # tokens; some peers take whole sequences
# Peers' gradients are rounded along the way; what is not a gradient at all differs by more.
LARGEST_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class LinearCase:
    """Hidden states (rows, hidden) and a head (vocabulary, hidden)."""

    device: str
    rows: int
    hidden: int
    vocabulary: int
    dtype_name: str
    chunk: int

    @property
    def name(self) -> str:
        return f"linear-{self.vocabulary}-{self.dtype_name}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]


def cases_of(names: str) -> list[LinearCase]:
    """Of "linear", both dtypes, or of names such as "linear-151936-bf16". ValueError for others."""
    on_gpu = torch.cuda.is_available()
    found = []
    for name in (part.strip() for part in names.split(",")):
        if name == "linear":
            found += cases_of("linear-65536-f32,linear-65536-bf16")
            continue
        match = re.fullmatch(rf"linear-(\d+)-({'|'.join(DTYPES)})", name)
        if match is None:
            raise ValueError(
                f"unknown case {name!r}: expected linear, or "
                f"linear-<vocabulary>-<{'|'.join(DTYPES)}>, not mixed with others"
            )
        size = (8192, 4096) if on_gpu else (512, 512)
        device, chunk = ("cuda", 1024) if on_gpu else ("cpu", 128)
        found.append(LinearCase(device, *size, int(match[1]), match[2], chunk))
    return found


@dataclass
class LinearProblem:
    """Inputs of every implementation; hidden and weight are leaves."""

    case: LinearCase
    hidden: Tensor  # (N, H)
    weight: Tensor  # (V, H)
    token_ids: Tensor  # (N,)
    advantages: Tensor  # (N,), one a sequence
    old_logps: Tensor  # (N,)

    def clear(self) -> None:
        self.hidden.grad = self.weight.grad = None


def make_problem(case: LinearCase, seed: int = 0) -> LinearProblem:
    g = torch.Generator(case.device).manual_seed(seed)
    like: dict[str, Any] = {"device": case.device, "generator": g}
    hidden = torch.randn(case.rows, case.hidden, **like)
    weight = torch.randn(case.vocabulary, case.hidden, **like) / case.hidden**0.5
    hidden, weight = hidden.to(case.dtype), weight.to(case.dtype)
    token_ids = torch.randint(case.vocabulary, (case.rows,), **like)
    logps = torch.cat(
        [
            selected_logps((x.float() @ weight.float().t()), ids)
            for x, ids in zip(hidden.split(64), token_ids.split(64), strict=True)
        ]
    )
    old_logps = logps + torch.empty_like(logps).uniform_(-0.4, 0.4, generator=g)
    advantages = torch.randn(case.rows // SEQUENCE, **like).repeat_interleave(SEQUENCE)
    return LinearProblem(
        case, hidden.requires_grad_(), weight.requires_grad_(), token_ids, advantages, old_logps
    )


def objective(logps: Tensor, p: LinearProblem) -> Tensor:
    """The mean of PPO's clipped objective, negated."""
    ratio = torch.exp(logps.float() - p.old_logps)
    clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON)
    return -torch.minimum(ratio * p.advantages, clipped * p.advantages).mean()


Loss = Callable[[LinearProblem], Tensor]


@dataclass(frozen=True)
class LinearImplementation:
    name: str
    label: str
    kind: str  # "ours" | "baseline" | "peer"
    build: Callable[[], Loss]
    counted: bool = True  # its products can be seen one by one


def implementations() -> list[LinearImplementation]:
    found = [
        LinearImplementation("ours", "linear_policy_loss", "ours", lambda: ours()),
        LinearImplementation(
            "ours-low-memory",
            "linear_policy_loss, low_memory",
            "ours",
            lambda: ours(low_memory=True),
        ),
        LinearImplementation("eager", "eager PyTorch, float32 loss", "baseline", lambda: naive),
        LinearImplementation(
            "compiled", "torch.compile", "baseline", lambda: torch.compile(naive, dynamic=False)
        ),
    ]
    if hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions"):
        label = "F.linear_cross_entropy + torch loss"
        found.append(LinearImplementation("torch-lce", label, "baseline", torch_lce, counted=False))
    # One that is not installed fails to build, and the report says so.
    for name, label, build in (
        ("liger", "Liger chunked GRPO", liger),
        ("trl", "TRL chunked log-probs + torch loss", trl),
        ("verl", "verl FusedLinearForPPO + torch loss", verl),
        ("rl-kernel", "RL-Kernel linear log-probs + torch loss", rl_kernel),
    ):
        found.append(LinearImplementation(name, label, "peer", build))
    return found


def ours(*, low_memory: bool = False) -> Loss:
    def loss(p: LinearProblem) -> Tensor:
        found = cfpo_kernels.linear_policy_loss(
            p.hidden,
            p.weight,
            p.token_ids,
            p.advantages,
            p.old_logps,
            objective=PPOClip(EPSILON, EPSILON),
            chunk_tokens=p.case.chunk,
            low_memory=low_memory,
        )
        return cast(Tensor, found)  # a pair only with return_stats=True

    return loss


def naive(p: LinearProblem) -> Tensor:
    return objective(selected_logps((p.hidden @ p.weight.t()).float(), p.token_ids), p)


def torch_lce() -> Loss:
    def loss(p: LinearProblem) -> Tensor:
        options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=p.case.chunk)
        nll = F.linear_cross_entropy(
            p.hidden, p.weight, p.token_ids, reduction="none", options=options
        )
        return objective(-nll, p)

    return loss


def liger() -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    module = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, epsilon_low=EPSILON, epsilon_high=EPSILON
    )

    def loss(p: LinearProblem) -> Tensor:
        shape = (-1, SEQUENCE)
        found = module(
            p.hidden.reshape(*shape, p.case.hidden),
            p.weight,
            p.token_ids.reshape(shape),
            torch.ones_like(p.token_ids).reshape(shape),
            p.advantages.reshape(shape)[:, 0],
            old_per_token_logps=p.old_logps.reshape(shape),
        )
        return cast(Tensor, found[0])

    return loss


def trl() -> Loss:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def loss(p: LinearProblem) -> Tensor:
        logps, *_ = ChunkedLogProbFunction.apply(
            p.hidden, p.weight, None, p.token_ids, 1.0, 8192, None, 1.0, ()
        )
        return objective(logps, p)

    return loss


def verl() -> Loss:
    from verl.utils.experimental.torch_functional import FusedLinearForPPO

    module = FusedLinearForPPO(chunk_size=256)

    def loss(p: LinearProblem) -> Tensor:
        logps, _entropy = module(p.hidden[None], p.weight, p.token_ids[None])
        return objective(logps[0], p)

    return loss


def rl_kernel() -> Loss:
    module = import_module("rl_engine.kernels.ops.pytorch.loss.linear_logp")
    linear_logp = module.NativeLinearLogpOp()  # its portable path
    return lambda p: objective(linear_logp(p.hidden, p.weight, p.token_ids), p)


class ProductCount(TorchDispatchMode):
    """Multiplications in matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.count += a.shape[0] * a.shape[1] * b.shape[1]
        return func(*args, **(kwargs or {}))


def step(p: LinearProblem, loss: Loss) -> Tensor:
    p.clear()
    found = loss(p)
    found.backward()
    return found.detach()


def exact(p: LinearProblem, rows: int = 64) -> tuple[float, Tensor, Tensor]:
    """The loss, dhidden and dweight in float64, a few rows at a time."""
    weight = p.weight.detach().double()
    dweight, dhidden, total = torch.zeros_like(weight), [], 0.0
    for start in range(0, p.case.rows, rows):
        part = slice(start, start + rows)
        x = p.hidden.detach()[part].double()
        log_p = torch.log_softmax(x @ weight.t(), -1)
        ids = p.token_ids[part, None]
        ratio = torch.exp(log_p.gather(1, ids)[:, 0] - p.old_logps[part].double())
        a = p.advantages[part].double()
        clipped = ratio.clamp(1 - EPSILON, 1 + EPSILON) * a < ratio * a
        total -= torch.minimum(ratio * a, ratio.clamp(1 - EPSILON, 1 + EPSILON) * a).sum().item()
        slope = torch.where(clipped, 0.0, -ratio * a) / p.case.rows
        dz = -slope[:, None] * log_p.exp()
        dz.scatter_add_(1, ids, slope[:, None])
        dhidden.append(dz @ weight)
        dweight += dz.t() @ x
    return total / p.case.rows, torch.cat(dhidden), dweight


def relative(found: Tensor | None, want: Tensor) -> float:
    assert found is not None
    return ((found.double() - want).norm() / want.norm()).item()


def run_case(
    case: LinearCase,
    rounds: int,
    threads: int,
    memory: bool,
    tell: Callable[[str], None] = lambda text: None,
) -> dict:
    """Everything about one case, ready for JSON; an implementation that fails is left out."""
    tell(f"{case.name}: inputs")
    p = make_problem(case)
    want = exact(p)
    built: dict[str, Loss] = {}
    results: dict[str, dict] = {}
    skipped: dict[str, str] = {}
    for entry in implementations():
        tell(f"{case.name}: check {entry.name}")
        try:
            loss = entry.build()
            with ProductCount() as products:
                value = step(p, loss)
            errors = {
                "loss": abs(value.item() - want[0]) / abs(want[0]),
                "hidden": relative(p.hidden.grad, want[1]),
                "weight": relative(p.weight.grad, want[2]),
            }
            if not max(errors.values()) <= LARGEST_ERROR[case.dtype]:
                raise ArithmeticError(f"wrong: {errors}")
        except Exception as error:
            if entry.kind == "ours":
                raise
            skipped[entry.name] = f"{type(error).__name__}: {str(error).strip()[:120]}"
            continue
        built[entry.name] = loss
        each = case.rows * case.hidden * case.vocabulary
        results[entry.name] = {
            "name": entry.name,
            "label": entry.label,
            "kind": entry.kind,
            "errors": errors,
            "products": products.count / each if entry.counted else None,
        }
    calls: dict[str, Callable[[], object]] = {PRODUCTS: plain_products(p)}
    calls |= {name: partial(step, p, loss) for name, loss in built.items()}
    samples = interleaved_samples(
        calls, lambda: None, rounds, case.device, lambda: tell(f"{case.name}: timing")
    )
    floor = statistics.median(samples[PRODUCTS])
    for name, result in results.items():
        median = statistics.median(samples[name])
        tell(f"{case.name}: memory {name}")
        result |= {
            "median_ms": median,
            "samples_ms": [round(x, 3) for x in samples[name]],
            "ratio_to_products": median / floor,
            "extra_bytes": extra_bytes(p, name, built[name], threads) if memory else None,
        }
    return {
        **asdict(case),
        "name": case.name,
        "products_ms": floor,
        "samples_ms": [round(x, 3) for x in samples[PRODUCTS]],
        "results": list(results.values()),
        "skipped": skipped,
    }


def plain_products(p: LinearProblem) -> Callable[[], object]:
    """The three products of a step in the logits' dtype, a chunk at a time, into given memory."""
    case = p.case
    tile = torch.empty(case.chunk, case.vocabulary, dtype=case.dtype, device=case.device)
    x, weight = p.hidden.detach(), p.weight.detach()
    dx, dweight = torch.empty_like(x), torch.zeros_like(weight)

    def run() -> None:
        for start in range(0, case.rows, case.chunk):
            rows = slice(start, start + case.chunk)
            z = tile[: x[rows].shape[0]]
            torch.mm(x[rows], weight.t(), out=z)
            torch.mm(z, weight, out=dx[rows])
            dweight.addmm_(z.t(), x[rows])

    return run


def extra_bytes(p: LinearProblem, name: str, loss: Loss, threads: int) -> int | None:
    """Peak extra bytes of a step, both gradients included."""
    if p.case.device == "cuda":
        p.clear()
        return cuda_extra_bytes(lambda: step(p, loss))
    if not can_measure_cpu():
        return None
    import multiprocessing

    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(measure_extra_bytes, p.case, name, threads).result()


def measure_extra_bytes(case: LinearCase, name: str, threads: int) -> int:
    """Runs in a fresh process."""
    torch.set_num_threads(threads)
    (entry,) = (entry for entry in implementations() if entry.name == name)
    loss = entry.build()
    small = LinearCase(case.device, SEQUENCE, 32, 512, case.dtype_name, case.chunk)
    step(make_problem(case if name == "compiled" else small), loss)
    p = make_problem(case)
    return cpu_extra_bytes(lambda: step(p, loss))


def make_report(cases: list[dict], rounds: int, threads: int) -> dict:
    return {
        "schema": 1,
        "kind": "linear",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "settings": {"rounds": rounds, "threads": threads},
        "cases": cases,
        "notes": [
            "One step: loss and the gradients of hidden states and weight. Medians of interleaved "
            "samples.",
            "x products: beside the three plain products of a step, in chunks, in the same rounds "
            "and in the logits' dtype. products: how many are made, in units of N V H.",
            "Extra memory is the peak beyond the inputs, with both gradients; on a CPU the "
            "resident set of a fresh process. Errors are relative, against float64.",
        ],
    }


HEADER = ("implementation", "ms", "x products", "products", "extra", "dW error", "dx error")


def table_rows(case: dict) -> list[tuple[str, ...]]:
    from bench.report import human_bytes

    rows: list[tuple[str, ...]] = [
        ("three plain products", f"{case['products_ms']:.0f}", "1.00", "3.00", "", "", "")
    ]
    for r in case["results"]:
        rows.append(
            (
                r["label"],
                f"{r['median_ms']:.0f}",
                f"{r['ratio_to_products']:.2f}",
                "?" if r["products"] is None else f"{r['products']:.2f}",
                "" if r["extra_bytes"] is None else human_bytes(r["extra_bytes"]),
                f"{r['errors']['weight']:.2e}",
                f"{r['errors']['hidden']:.2e}",
            )
        )
    return rows


def print_report(report: dict) -> None:
    from bench.report import print_table

    versions = report["versions"]
    device = report["cases"][0]["device"]
    print(
        f"{device_name(report['machine'], device)}; {report['settings']['threads']} CPU threads; "
        f"torch {versions['torch']}, cfpo-kernels {versions['cfpo-kernels']}"
    )
    for case in report["cases"]:
        title = (
            f"{case['name']}: {case['rows']} tokens, hidden {case['hidden']}, chunks of "
            f"{case['chunk']}"
        )
        print_table(title, [HEADER, *table_rows(case)])
        for name, reason in case["skipped"].items():
            print(f"  left out: {name}: {reason}")
    print()
    for note in report["notes"]:
        print(f"- {note}")
