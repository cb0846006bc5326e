"""A transformers model trained from its hidden states: its logits never exist.

`model.model(...)` stops before the output layer. Of its hidden states those that predict a token of
a response are taken, packed to (N, H), and `linear_cfpo_loss` applies the output layer's weight to
some of them at a time, with `cu_seqlens` instead of a mask.

Where logits are wanted, a boolean `logits_to_keep` (transformers 5) makes the model compute those
of the same positions alone, packed to (N, V), which is how `cfpo_loss` takes them.

A small Llama with random weights is trained on a toy reward: even tokens are good. It first shows
that padded logits, packed logits and hidden states give the same loss.

    python examples/transformers_packed.py
    python examples/transformers_packed.py --model path/to/checkpoint
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
import transformers
from torch import Tensor

from cfpo_kernels import cfpo_loss, linear_cfpo_loss, linear_token_logps

STOP_EVERY = 16  # every 16th token of the vocabulary ends a response


@dataclass
class Batch:
    """B sequences of P prompt tokens and up to T sampled ones; N response tokens in all."""

    input_ids: Tensor  # (B, P + T)
    attention_mask: Tensor  # (B, P + T)
    keep: Tensor  # (B, P + T) bool, the positions that predict a response token
    token_ids: Tensor  # (N,), in the order in which `keep` packs
    advantages: Tensor  # (N,)
    cu_seqlens: Tensor  # (B + 1,), where each sequence begins and ends among the N
    old_logps: Tensor  # (N,)


def packed_hidden(model: transformers.PreTrainedModel, batch: Batch) -> Tensor:
    """(N, H), what the output layer is applied to."""
    output = model.model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False
    )
    return output.last_hidden_state[batch.keep]


def packed_logits(model: transformers.PreTrainedModel, batch: Batch) -> Tensor:
    """(N, V)."""
    return model(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        logits_to_keep=batch.keep,
        use_cache=False,
    ).logits


@torch.no_grad()
def rollout(
    model: transformers.PreTrainedModel, args: argparse.Namespace, stop: list[int]
) -> Batch:
    prompts = torch.randint(0, model.config.vocab_size, (args.batch, args.prompt))
    input_ids = model.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=True,
        top_k=0,
        max_new_tokens=args.length,
        eos_token_id=stop,
        pad_token_id=stop[0],
    )
    tokens = input_ids[:, args.prompt :]
    stopped = torch.isin(tokens, torch.tensor(stop)).int()
    response = stopped.cumsum(1) - stopped == 0  # (B, T): up to the first stop token, which counts
    keep = torch.zeros_like(input_ids, dtype=torch.bool)
    keep[:, args.prompt - 1 : -1] = response  # the logits at position i predict token i + 1
    attention_mask = torch.ones_like(input_ids)
    attention_mask[:, args.prompt :] = response
    token_ids = tokens[response]
    batch = Batch(
        input_ids,
        attention_mask,
        keep,
        token_ids,
        torch.where(token_ids % 2 == 0, 1.0, -1.0),
        torch.nn.functional.pad(response.sum(1).cumsum(0), (1, 0)),
        torch.empty(0),
    )
    # Scored by the same products as in training, so that r starts at exactly 1.
    hidden = packed_hidden(model, batch)
    batch.old_logps = linear_token_logps(hidden, model.lm_head.weight, token_ids)
    return batch


def hidden_loss(model: transformers.PreTrainedModel, batch: Batch) -> Tensor:
    return linear_cfpo_loss(
        packed_hidden(model, batch),
        model.lm_head.weight,
        batch.token_ids,
        batch.advantages,
        batch.old_logps,
        reduction="seq-mean-token-mean",
        cu_seqlens=batch.cu_seqlens,
    )


def packed_loss(model: transformers.PreTrainedModel, batch: Batch) -> Tensor:
    """The same from logits of the same positions, for comparison."""
    return cfpo_loss(
        packed_logits(model, batch),
        batch.token_ids,
        batch.advantages,
        batch.old_logps,
        reduction="seq-mean-token-mean",
        cu_seqlens=batch.cu_seqlens,
    )


def padded_loss(model: transformers.PreTrainedModel, batch: Batch) -> Tensor:
    """The same from logits of every position."""

    def unpacked(values: Tensor) -> Tensor:
        return torch.zeros(batch.keep.shape, dtype=values.dtype).masked_scatter(batch.keep, values)

    logits = model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).logits
    return cfpo_loss(
        logits,
        unpacked(batch.token_ids),
        unpacked(batch.advantages),
        unpacked(batch.old_logps),
        mask=batch.keep,
        reduction="seq-mean-token-mean",
    )


def load_model(args: argparse.Namespace) -> transformers.PreTrainedModel:
    if args.model:
        return transformers.AutoModelForCausalLM.from_pretrained(args.model)
    config = transformers.LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    return transformers.LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a checkpoint; by default random weights")
    parser.add_argument("--vocab", type=int, default=1024, help="of the random model")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--epochs", type=int, default=2, help="gradient steps on each rollout")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--prompt", type=int, default=16, help="tokens of a prompt")
    parser.add_argument("--length", type=int, default=20, help="tokens of the longest response")
    parser.add_argument("--lr", type=float, default=1e-2)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = load_model(args).eval()  # no dropout, so that r starts at exactly 1
    stop = list(range(0, model.config.vocab_size, STOP_EVERY))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)

    rewards = []
    for step in range(args.steps):
        batch = rollout(model, args, stop)
        if step == 0:
            with torch.no_grad():
                padded, packed = padded_loss(model, batch), packed_loss(model, batch)
                hidden = hidden_loss(model, batch)
            rows, all_rows = len(batch.token_ids), batch.keep.numel()
            print(f"loss {padded:.6f} from padded logits, {packed:.6f} from packed")
            print(f"loss {hidden:.6f} from hidden states")
            print(f"rows of logits {all_rows} padded, {rows} packed ({rows / all_rows:.0%})")
        for _ in range(args.epochs):
            hidden_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        rewards.append((batch.advantages > 0).float().mean().item())
        print(f"step {step:2d}  tokens {len(batch.token_ids):4d}  reward {rewards[-1]:.3f}")
    print(f"reward rose from {rewards[0]:.3f} to {rewards[-1]:.3f}")


if __name__ == "__main__":
    main()
