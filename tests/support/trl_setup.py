"""A GRPOTrainer around a tiny random model, and micro-batches as TRL prepares them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
)
from trl import GRPOConfig, GRPOTrainer

VOCABULARY = 1003
IMAGE_TOKEN = 2  # in no prompt otherwise
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "moe": Qwen3MoeConfig(
        **SMALL,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.1,
    ),
    # tanh of the logits after the head, and a tied embedding
    "softcap": Gemma2Config(**SMALL, query_pre_attn_scalar=8, final_logit_softcapping=5.0),
    "scale": CohereConfig(**SMALL, logit_scale=0.3),
    "divisor": GraniteConfig(**SMALL, logits_scaling=3.0),
}


def make_model(folder: Path, kind: str = "llama") -> Any:
    """Saved and loaded again: TRL makes its reference model from the name of the folder."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind], attn_implementation="eager")
    with torch.no_grad():
        # At the usual initialisation every p is 1/V, and a wrong softmax would go unseen.
        model.get_output_embeddings().weight.mul_(10 if kind == "softcap" else 20)
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def make_model_of_images() -> Any:
    """An image of 8 x 8 pixels is four of the prompt's tokens."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=8,
        patch_size=4,
        projection_dim=16,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=CONFIGS["llama"],
        image_token_index=IMAGE_TOKEN,
        image_seq_length=4,
        vision_feature_layer=-1,
        attn_implementation="eager",
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    for name, parameter in model.named_parameters():
        if name.endswith("k_proj.bias"):  # softmax does not see it: its gradient is rounding
            parameter.requires_grad_(False)
    return model.train()


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(3, VOCABULARY))]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )


def make_config(folder: Path, **settings: Any) -> GRPOConfig:
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "num_generations": 4,
        "max_completion_length": 8,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }
    return GRPOConfig(**defaults | settings)


def low_token_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
    return [sum(i < VOCABULARY // 2 for i in ids) / max(len(ids), 1) for ids in completion_ids]


def make_prompts() -> Dataset:
    return Dataset.from_dict({"prompt": [f"w{i} w{i + 1} w{i + 2}" for i in range(3, 40)]})


def make_trainer(
    folder: Path, kind: str = "llama", cls: type = GRPOTrainer, **settings: Any
) -> GRPOTrainer:
    of_trainer = ("peft_config", "objective", "logits_tokens", "inplace", "backend")
    own = {name: settings.pop(name) for name in of_trainer if name in settings}
    prompts = make_prompts()
    return cls(
        make_model(folder / "model", kind),
        low_token_reward,
        args=make_config(folder / "output", **settings),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(2)),
        processing_class=make_tokenizer(),
        **own,
    )


def make_inputs(
    trainer: Any,
    *,
    stale: bool = True,
    tools: bool = False,
    advantages_per_token: bool = False,
    rollout: str | None = None,
    empty_sequence: bool = False,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Prompts padded left, completions right; old log-probs on both sides of every boundary."""
    g = torch.Generator().manual_seed(seed)
    b, p, k = 4, 5, 9
    prompt_ids = torch.randint(3, VOCABULARY, (b, p), generator=g)
    prompt_mask = (torch.arange(p) >= torch.tensor([0, 2, 1, 3])[:, None]).long()
    lengths = torch.tensor([9, 6, 3, 0 if empty_sequence else 1])
    completion_mask = (torch.arange(k) < lengths[:, None]).long()
    completion_ids = torch.randint(3, VOCABULARY, (b, k), generator=g)
    inputs = {
        "prompt_ids": prompt_ids * prompt_mask,
        "prompt_mask": prompt_mask,
        "completion_ids": completion_ids * completion_mask,
        "completion_mask": completion_mask,
    }
    mask = completion_mask
    if tools:
        inputs["tool_mask"] = (torch.rand(b, k, generator=g) > 0.3).long()
        mask = mask * inputs["tool_mask"]
    # Of the generation batch, so more than this micro-batch has.
    inputs["num_items_in_batch"] = mask.sum() * 2 + 5
    shape = (b, k) if advantages_per_token else (b,)
    inputs["advantages"] = torch.randn(shape, generator=g)
    inputs["advantages"].view(-1)[2] = 0.0

    current = score(trainer, inputs)
    inputs["ref_per_token_logps"] = current + 0.3 * torch.randn(b, k, generator=g)
    deltas = torch.tensor([0.0, 0.05, -0.05, -0.15, 0.1, 0.3, -0.4, 1.0, -1.5, math.log(1.3)])
    picked = deltas[torch.randint(len(deltas), (b, k), generator=g)]
    old = current - picked
    if stale:
        inputs["old_per_token_logps"] = old
    sampling = old + 0.1 * torch.randn(b, k, generator=g)
    inputs["sampling_per_token_logps"] = sampling
    if rollout is not None:
        ratio = (old - sampling).exp().clamp(max=1.05)
        inputs["importance_sampling_ratio"] = ratio if rollout == "token" else ratio[:, :1].clone()
    return inputs


def score(trainer: Any, inputs: dict[str, Tensor]) -> Tensor:
    """TRL's own log-probs of the completions, (B, K)."""
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            inputs["completion_ids"].shape[1],
        )
    return logps
