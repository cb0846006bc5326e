"""The training runs whose curves ``python -m bench.grpo_curves`` shows."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

EPSILON = 0.2
RUNS = {
    "trl": "TRL's GRPOTrainer",
    "ours": "CFPOTrainer, PPOClip",
    "nudged": "TRL's, from weights one rounding away",
}
CURVES = {"loss": "loss", "reward": "reward", "kl": "KL to the first weights"}
CLIPPED = "clip_ratio/region_mean"
PROGRESS_EVERY = 10


@dataclass(frozen=True)
class Setting:
    steps: int = 100
    vocabulary: int = 503
    hidden: int = 32
    batch: int = 64
    group: int = 8
    completion: int = 16
    iterations: int = 2
    beta: float = 0.04
    learning_rate: float = 3e-3
    # Adam divides by the gradient's size: with its usual 1e-8, gradients that are nothing but
    # rounding become whole steps, and any two runs part sooner.
    adam_epsilon: float = 1e-4
    warmup: int = 10
    seed: int = 0


def save_model(setting: Setting, folder: Path) -> None:
    """TRL loads the reference model by name; a folder is one."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(setting.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=setting.vocabulary,
            hidden_size=setting.hidden,
            intermediate_size=2 * setting.hidden,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    with torch.no_grad():
        # At the usual initialisation every p is 1/V: nothing would be seen of the softmax.
        model.lm_head.weight.mul_(10)
    model.save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, setting.vocabulary))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    ).save_pretrained(folder)


class LowTokens:
    """The share of a completion's tokens in the first quarter of the vocabulary."""

    __name__ = "low_tokens"

    def __init__(self, vocabulary: int) -> None:
        self.limit = vocabulary // 4
        self.sampled: list[list[list[int]]] = []

    def __call__(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        self.sampled.append([list(ids) for ids in completion_ids])
        return [sum(i < self.limit for i in ids) / max(len(ids), 1) for ids in completion_ids]


def trainer_class(name: str) -> type:
    from trl import GRPOTrainer

    from cfpo_kernels.integrations.trl import CFPOTrainer

    class Watched(CFPOTrainer if name == "ours" else GRPOTrainer):  # type: ignore[misc]
        """Says where it is, and computes TRL's loss beside ours."""

        def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
            step = self.state.global_step
            if step % PROGRESS_EVERY == 0:
                print(f"{RUNS[name]}: step {step + 1} of {self.args.max_steps}", flush=True)
            loss = super()._compute_loss(model, inputs)
            if name == "ours":
                self.same_weights.append(self.compute_trls(model, inputs))
            return loss

        def compute_trls(self, model: Any, inputs: dict[str, Any]) -> dict[str, float]:
            logged = self._metrics["train"]
            kept = {key: list(values) for key, values in logged.items()}
            with torch.no_grad():
                found = {"loss": GRPOTrainer._compute_loss(self, model, inputs).item()}
            found |= {"kl": logged["kl"][-1], "clip_ratio": logged[CLIPPED][-1]}
            logged.clear()
            logged.update(kept)
            return found

    return Watched


def make_trainer(setting: Setting, name: str, model: Path, objective: Any = None) -> Any:
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback
    from trl import GRPOConfig

    from cfpo_kernels import PPOClip

    options = {"objective": objective or PPOClip(EPSILON, EPSILON)} if name == "ours" else {}
    prompts = [f"w{i} w{i + 1} w{i + 2}" for i in range(3, 67)]
    trainer = trainer_class(name)(
        str(model),
        LowTokens(setting.vocabulary),
        args=GRPOConfig(
            output_dir=str(model.parent / name),
            epsilon=EPSILON,
            beta=setting.beta,
            num_iterations=setting.iterations,
            per_device_train_batch_size=setting.batch,
            num_generations=setting.group,
            max_completion_length=setting.completion,
            max_steps=setting.steps,
            learning_rate=setting.learning_rate,
            adam_epsilon=setting.adam_epsilon,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=setting.warmup,
            seed=setting.seed,
            logging_steps=1,
            model_init_kwargs={"dtype": "float32"},
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=AutoTokenizer.from_pretrained(model),
        **options,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.same_weights = []
    if name == "nudged":
        with torch.no_grad():
            trainer.model.lm_head.weight.mul_(1 + 2**-23)
    return trainer


def columns(entries: list[dict]) -> dict[str, list]:
    return {name: [entry[name] for entry in entries] for name in entries[0]}


def train(setting: Setting, objective: Any = None) -> dict[str, Any]:
    """Curves of the three runs; `objective` in place of PPOClip is the test's."""
    curves, same_weights, sampled = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_model(setting, model)
        for name in RUNS:
            trainer = make_trainer(setting, name, model, objective)
            trainer.train()
            logged = [entry for entry in trainer.state.log_history if "loss" in entry]
            curves[name] = {key: [entry.get(key) for entry in logged] for key in CURVES}
            if name == "ours":
                same_weights = columns(trainer.same_weights)
                curves[name]["clip_ratio"] = same_weights.pop("clip_ratio")
            else:
                curves[name]["clip_ratio"] = [entry[CLIPPED] for entry in logged]
            (reward,) = trainer.reward_funcs
            sampled[name] = reward.sampled
    identical = {
        name: [
            sum(x == y for x, y in zip(*batch, strict=True))
            for batch in zip(sampled[name], sampled["trl"], strict=True)
        ]
        for name in ("ours", "nudged")
    }
    return {"curves": curves, "same_weights": same_weights, "identical": identical}
