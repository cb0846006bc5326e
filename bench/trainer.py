"""A GRPO step in TRL's trainer: its own loss and ours, on the same model and batch.

    python -m bench.trainer --json out.json --plot out.png
    python -m bench.trainer --device cuda --completion 1024 --batch 8
    python -m bench.trainer --from-json out.json --plot out.png

A step is ``_compute_loss`` and ``backward``: no generation and no optimizer. TRL projects the
hidden states in tiles, and once more in backward; ours computes the gradient with the loss.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.machine import describe_machine, describe_versions
from bench.memory import can_measure_cpu, cpu_extra_bytes, cuda_extra_bytes
from bench.timing import cpu_seconds, cuda_seconds

LABELS = {
    "trl": "TRL 1.16",
    "chunks": "CFPOTrainer",
    "whole": "CFPOTrainer, logits_tokens=None",
}
NOTES = [
    "A step is _compute_loss and backward() of one micro-batch, without generation and optimizer; "
    "gradient checkpointing is on, as in TRL's default. Times are medians of interleaved samples.",
    "The model is shaped as Qwen2.5-0.5B, with random weights and the given number of layers.",
    "Memory is the peak of one step beyond weights and batch, the parameters' gradients included. "
    "CPU: resident set in a fresh process; GPU: the caching allocator.",
    "On a CPU TRL's head runs in plain torch and also scores the prompt; on a GPU it has a Triton "
    "kernel and does not. Ratios measured on one say nothing about the other.",
    "Before anything was timed, PPOClip gave TRL's loss and gradients.",
]


@dataclass(frozen=True)
class Shape:
    device: str = "cpu"
    dtype: str = "auto"
    layers: int = 24
    vocabulary: int = 151936
    batch: int = 4
    prompt: int = 16
    completion: int = 256

    @property
    def tokens(self) -> int:
        return self.batch * self.completion


def resolve_dtype(shape: Shape) -> Shape:
    """`auto` is bfloat16, but float32 on a CPU without instructions for products of bfloat16.

    torch takes up to 40 times as long for them there, forward and backward, which would hide
    everything else.
    """
    if shape.dtype != "auto":
        return shape
    slow = shape.device == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return replace(shape, dtype="float32" if slow else "bfloat16")


def make_trainer(shape: Shape, folder: str) -> Any:
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=shape.vocabulary,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=shape.layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
    )
    model = Qwen2ForCausalLM(config).to(shape.device, getattr(torch, shape.dtype))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    words = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "word": 2}, unk_token="word"))
    arguments = GRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=shape.batch,
        num_generations=shape.batch,
        max_completion_length=shape.completion,
        report_to="none",
        use_cpu=shape.device == "cpu",
        bf16=False,
    )
    trainer = GRPOTrainer(
        model,
        lambda completions, **_: [0.0] * len(completions),
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": ["word"]}),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="</s>"
        ),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return trainer


def make_inputs(shape: Shape, trainer: Any) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    prompt = torch.randint(3, shape.vocabulary, (shape.batch, shape.prompt), generator=g)
    completion = torch.randint(3, shape.vocabulary, (shape.batch, shape.completion), generator=g)
    inputs = {
        "prompt_ids": prompt,
        "prompt_mask": torch.ones_like(prompt),
        "completion_ids": completion,
        "completion_mask": torch.ones_like(completion),
        "advantages": torch.randn(shape.batch, generator=g),
        "num_items_in_batch": torch.tensor(shape.tokens),
    }
    # The ratio changes no cost: near the uniform distribution of random weights, with some noise.
    uniform = -torch.log(torch.tensor(float(shape.vocabulary)))
    noise = 0.1 * torch.randn(completion.shape, generator=g)
    inputs["old_per_token_logps"] = uniform + noise
    return {name: x.to(shape.device) for name, x in inputs.items()}


def implementations(trainer: Any, objective: Any) -> dict[str, Callable[[Any], torch.Tensor]]:
    from trl import GRPOTrainer

    from cfpo_kernels.integrations.trl import compute_cfpo_loss

    model = trainer.model
    return {
        "trl": lambda inputs: GRPOTrainer._compute_loss(trainer, model, inputs),
        "chunks": lambda inputs: compute_cfpo_loss(trainer, model, inputs, objective),
        "whole": lambda inputs: compute_cfpo_loss(
            trainer, model, inputs, objective, logits_tokens=None
        ),
    }


def step(trainer: Any, loss_of: Callable[[Any], torch.Tensor], inputs: Any) -> float:
    trainer.model.zero_grad(set_to_none=True)
    loss = loss_of(inputs)
    loss.backward()
    return loss.item()


def check(trainer: Any, inputs: Any, dtype: str) -> dict[str, dict[str, float]]:
    """Errors of PPOClip against TRL; raises where they are more than rounding."""
    from cfpo_kernels import PPOClip

    calls = implementations(trainer, PPOClip())
    expected = step(trainer, calls["trl"], inputs)
    named = list(trainer.model.named_parameters())
    gradients = {name: p.grad.clone() for name, p in named}
    limit = 1e-4 if dtype == "float32" else 5e-2
    errors = {}
    for name in ("chunks", "whole"):
        loss = step(trainer, calls[name], inputs)
        worst = max(
            float((p.grad - gradients[n]).float().norm() / gradients[n].float().norm())
            for n, p in named
        )
        errors[name] = {"loss": abs(loss - expected), "gradient": worst}
        if not (worst <= limit and abs(loss - expected) <= limit * abs(expected)):
            raise RuntimeError(f"{name} differs from TRL by {errors[name]}")
    return errors


def measure_times(shape: Shape, rounds: int) -> dict[str, Any]:
    """Samples in ms, after the check."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(shape, folder)
        inputs = make_inputs(shape, trainer)
        errors = check(trainer, inputs, shape.dtype)
        calls = implementations(trainer, None)
        stopwatch = cuda_seconds if shape.device == "cuda" else cpu_seconds
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for i in range(rounds):
            print(f"round {i + 1} of {rounds}", flush=True)
            for name, loss_of in calls.items():
                samples[name].append(1e3 * stopwatch(partial(step, trainer, loss_of, inputs)))
    return {"errors": errors, "samples_ms": samples}


def measure_memory(shape: Shape, name: str, threads: int) -> int:
    """Peak extra bytes of one step; runs in a fresh process."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(shape, folder)
        loss_of = implementations(trainer, None)[name]
        step(trainer, loss_of, make_inputs(replace(shape, batch=1, completion=8), trainer))
        trainer.model.zero_grad(set_to_none=True)
        inputs = make_inputs(shape, trainer)
        extra = cuda_extra_bytes if shape.device == "cuda" else cpu_extra_bytes
        return extra(lambda: step(trainer, loss_of, inputs))


def measure_memories(shape: Shape, lengths: list[int]) -> list[dict[str, int]]:
    if shape.device == "cpu" and not can_measure_cpu():
        return []
    # Children of a process that has imported what takes long and computed nothing. Not this module:
    # run by -m it is __main__, which each child imports again by its name.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.memory", "trl.trainer.grpo_trainer", "datasets"])
    found = []
    for completion in lengths:
        sized = replace(shape, completion=completion)
        entry = {"tokens": sized.tokens}
        for name in LABELS:
            with ProcessPoolExecutor(1, mp_context=context) as process:
                threads = torch.get_num_threads()
                entry[name] = process.submit(measure_memory, sized, name, threads).result()
        found.append(entry)
        print(entry, flush=True)
    return found


def table(report: dict) -> str:
    """Markdown, as in the README."""
    samples, shape = report["samples_ms"], Shape(**report["shape"])
    medians = {name: statistics.median(taken) for name, taken in samples.items()}
    memory: dict = next((m for m in report["memory"] if m["tokens"] == shape.tokens), {})
    lines = ["| | step | TRL / this | peak memory |", "|---|---|---|---|"]
    for name, label in LABELS.items():
        extra = f"{memory[name] / 2**20:,.0f} MiB" if name in memory else ""
        ratio = medians["trl"] / medians[name]
        lines.append(f"| {label} | {medians[name] / 1e3:.1f} s | {ratio:.2f} | {extra} |")
    return "\n".join(lines)


def draw(report: dict, path: Path) -> None:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"font.size": 10.5, "axes.spines.top": False})
    colours = {"trl": "#a9b1ba", "chunks": "#1f6fb4", "whole": "#7fb2dd"}
    shape, samples = Shape(**report["shape"]), report["samples_ms"]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    bars, lines = figure.subplots(1, 2, width_ratios=(1.2, 1))
    medians = [statistics.median(samples[name]) / 1e3 for name in LABELS]
    bars.barh(range(len(LABELS)), medians, color=[colours[name] for name in LABELS], height=0.6)
    for row, (name, seconds) in enumerate(zip(LABELS, medians, strict=True)):
        fastest, slowest = (f(samples[name]) / 1e3 for f in (min, max))
        bars.plot([fastest, slowest], [row, row], color="#22282e", lw=1.2)
        note = f"{seconds:.1f} s   {medians[0] / seconds:.2f}×"
        bars.text(slowest + 0.02 * max(medians), row, note, va="center")
    bars.set_yticks(range(len(LABELS)), LABELS.values())
    bars.invert_yaxis()
    bars.tick_params(axis="y", length=0)
    bars.spines["right"].set_visible(False)
    bars.set_xlim(0, 1.35 * max(max(taken) for taken in samples.values()) / 1e3)
    bars.set_xlabel("seconds a step (median, with the range)")
    bars.set_title(
        f"{shape.batch} x {shape.completion} completion tokens", loc="left", fontsize=10.5
    )
    for name, label in LABELS.items():
        tokens = [entry["tokens"] for entry in report["memory"]]
        extra = [entry[name] / 2**30 for entry in report["memory"]]
        lines.plot(tokens, extra, marker="o", color=colours[name], label=label)
    lines.set_xlabel("completion tokens")
    lines.set_ylabel("GiB beyond weights and batch")
    lines.set_title("peak memory of a step", loc="left", fontsize=10.5)
    lines.set_ylim(0)
    lines.spines["right"].set_visible(False)
    lines.legend(frameon=False, fontsize=9)
    figure.suptitle(
        f"GRPO step of a Qwen2.5-0.5B shape, {shape.layers} layers, V = {shape.vocabulary:,}, "
        f"{shape.dtype}, on {report['device_name']}",
        x=0.01,
        ha="left",
        fontweight="bold",
        fontsize=11,
    )
    figure.savefig(path, dpi=150, facecolor="white")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.trainer", description=__doc__)
    for name, default in asdict(Shape()).items():
        parser.add_argument(f"--{name}", type=type(default), default=default)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=min(2, torch.get_num_threads()))
    parser.add_argument("--lengths", type=int, nargs="*", default=[], help="more for the memory")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--from-json", type=Path, help="show a saved report again")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    if options.from_json:
        report = json.loads(options.from_json.read_text())
    else:
        torch.set_num_threads(options.threads)
        shape = resolve_dtype(Shape(**{name: getattr(options, name) for name in asdict(Shape())}))
        memory = measure_memories(shape, sorted({shape.completion, *options.lengths}))
        machine = describe_machine()
        report = {
            "schema": 1,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": machine,
            "device_name": (machine["gpu"] or {}).get("name")
            if shape.device == "cuda"
            else f"{machine['cpu']['model']}, {options.threads} threads",
            "versions": describe_versions(),
            "shape": asdict(shape),
            "memory": memory,
            **measure_times(shape, options.rounds),
            "notes": NOTES,
        }
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(report))
    if options.plot:
        draw(report, options.plot)


if __name__ == "__main__":
    main()
