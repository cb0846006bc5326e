"""TRL's GRPO loop with the fused CFPO loss, on the CPU: a random model learns to write vowels.

    python examples/trl_cfpo.py
    python examples/trl_cfpo.py --updates 24 --vocabulary 2048

The model is a Qwen3 with random weights, the tokenizer Mistral's Tekken from mistral-common, cut to
its 8,192 most frequent tokens: with all 131,072 a random model hardly ever samples a token twice.
Every generation batch is used for two updates, so the second is off-policy: there CFPO's penalty
acts on ratios that are not 1.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import mistral_common
import torch
from datasets import Dataset
from transformers import (
    MistralCommonBackend,
    PrinterCallback,
    Qwen3Config,
    Qwen3ForCausalLM,
    TrainerCallback,
)
from transformers.utils import logging
from trl import GRPOConfig

from cfpo_kernels.integrations.trl import CFPOTrainer

TEKKEN = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
SUBJECTS = [
    "an owl",
    "a fox",
    "two cats",
    "a horse",
    "some bees",
    "the crow",
    "a whale",
    "ten ants",
]


def vowels(completions: list[str], **_: object) -> list[float]:
    """The share of a completion's characters that are lower-case vowels."""
    return [sum(text.count(v) for v in "aeiou") / max(len(text), 1) for text in completions]


class Progress(TrainerCallback):
    """One line for each batch of completions, after its second update."""

    reward = 0.0

    def on_log(self, args: object, state: object, control: object, logs: dict, **_: object) -> None:
        if "reward" in logs:
            self.reward = logs["reward"]
        elif "ratio/max" in logs:
            print(
                f"update {state.global_step:3d}  reward {self.reward:.3f}  "
                f"entropy {logs['entropy']:.2f}  largest ratio {logs['ratio/max']:.2f}",
                flush=True,
            )


def make_tokenizer(folder: Path, vocabulary: int) -> MistralCommonBackend:
    tekken = json.loads(TEKKEN.read_text())
    tekken["config"]["default_vocab_size"] = vocabulary
    path = folder / "tekken.json"
    path.write_text(json.dumps(tekken))
    tokenizer = MistralCommonBackend(tokenizer_path=str(path))
    tokenizer.padding_side = "left"
    return tokenizer


def save_model(folder: Path, tokenizer: MistralCommonBackend) -> None:
    """TRL loads its models by name; a folder is one."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)


def train(folder: Path, updates: int, vocabulary: int) -> list[dict[str, float]]:
    tokenizer = make_tokenizer(folder, vocabulary)
    save_model(folder, tokenizer)
    trainer = CFPOTrainer(
        str(folder),
        vowels,
        args=GRPOConfig(
            output_dir=str(folder),
            epsilon=0.2,
            num_iterations=2,
            per_device_train_batch_size=48,
            num_generations=8,
            max_completion_length=8,
            max_steps=updates,
            learning_rate=5e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": [f"Write about {s}:" for s in SUBJECTS * 64]}),
        processing_class=tokenizer,
        callbacks=[Progress()],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=100, help="two for each generation batch")
    parser.add_argument("--vocabulary", type=int, default=8192, help="how much of Tekken's")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        entries = train(Path(folder), args.updates, args.vocabulary)
    rewards = [entry["reward"] for entry in entries if "reward" in entry]
    quarter = max(len(rewards) // 4, 1)
    first, last = (sum(part) / quarter for part in (rewards[:quarter], rewards[-quarter:]))
    print(f"mean reward: {first:.3f} in the first quarter of the batches, {last:.3f} in the last")
    outside = [entry["ratio/outside_epsilon"] for entry in entries if "reward" not in entry]
    share = sum(outside) / max(len(outside), 1)
    print(f"off-policy updates: {share:.1%} of the tokens had a ratio outside 1 +- epsilon")


if __name__ == "__main__":
    main()
