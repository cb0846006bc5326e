"""A small causal transformer with a large vocabulary, and sampling from it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual connection."""

    def __init__(self, d_model: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.attn_norm = nn.RMSNorm(d_model)
        self.qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.proj = nn.Linear(d_model, d_model, bias=False)
        self.mlp_norm = nn.RMSNorm(d_model)
        self.mlp = nn.Sequential(
            nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, L, D) to (B, L, D)."""
        n_batch, length, d_model = x.shape
        qkv = self.qkv(self.attn_norm(x)).view(n_batch, length, 3, self.n_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, L, D / heads)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(n_batch, length, d_model))
        return x + self.mlp(self.mlp_norm(x))


class Head(torch.autograd.Function):
    """``hidden @ weight.T`` in float32, rounded to bfloat16. (N, D) and (V, D) -> (N, V).

    A product of bfloat16 matrices would be the same but for the last bit, and takes minutes on a
    CPU without instructions for it. The vocabulary goes in blocks, so that the float32 logits stay
    in cache.
    """

    BLOCK = 8192

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        logits = hidden.new_empty(len(hidden), len(weight), dtype=torch.bfloat16)
        for part, w in zip(logits.split(Head.BLOCK, 1), weight.split(Head.BLOCK), strict=True):
            part.copy_(hidden @ w.T)
        return logits

    @staticmethod
    def backward(ctx: Any, dlogits: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight = ctx.saved_tensors
        dhidden, dweight = torch.zeros_like(hidden), torch.empty_like(weight)
        blocks = (dlogits.split(Head.BLOCK, 1), weight.split(Head.BLOCK), dweight.split(Head.BLOCK))
        for part, w, dw in zip(*blocks, strict=True):
            d = part.float()
            dhidden.addmm_(d, w)
            torch.mm(d.T, hidden, out=dw)
        return dhidden, dweight


class TinyLM(nn.Module):
    """A transformer that runs in float32 and gives bfloat16 logits.

    With a vocabulary this large nearly all of the work is in the output layer and behind it, so
    that is where the low precision pays. Input and output embeddings are one matrix.
    """

    def __init__(self, vocab_size: int, d_model: int, n_layers: int, n_heads: int, max_len: int):
        super().__init__()
        self.embed = nn.Embedding(vocab_size, d_model)
        self.pos = nn.Parameter(torch.randn(max_len, d_model) * 0.02)
        self.blocks = nn.ModuleList(Block(d_model, n_heads) for _ in range(n_layers))
        self.norm = nn.RMSNorm(d_model)
        nn.init.normal_(self.embed.weight, std=0.02)
        # So that few steps push down the logits of all the tokens that are never right.
        nn.init.constant_(self.norm.weight, 3.0)

    def hidden(self, ids: Tensor) -> Tensor:
        """Map token ids (B, L) to final hidden states (B, L, D)."""
        x = self.embed(ids) + self.pos[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def head(self, hidden: Tensor) -> Tensor:
        """Map hidden states (..., D) to bfloat16 logits (..., V)."""
        logits = Head.apply(hidden.flatten(0, -2), self.embed.weight)
        return logits.view(*hidden.shape[:-1], -1)

    def response_logits(self, prompts: Tensor, responses: Tensor) -> Tensor:
        """Logits of the response positions only: (B, P) and (B, T) token ids -> (B, T, V).

        Slicing the hidden states, not the logits, spares the prompt's share of the output layer
        and leaves logits that are contiguous and nobody else's, ready to be overwritten.
        """
        ids = torch.cat([prompts, responses[:, :-1]], dim=1)
        return self.head(self.hidden(ids)[:, prompts.shape[1] - 1 :])

    @torch.no_grad()
    def generate(
        self, prompts: Tensor, max_new: int, eos_id: int, greedy: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Continue prompts (B, P) by sampling at temperature 1, or greedily.

        Returns:
            responses: (B, max_new) int64.
            mask: (B, max_new) bool, True up to and including the first EOS.
            logps: (B, max_new) float32, of the responses' tokens; zeros if greedy.
        """
        ids, logps = prompts, []
        for _ in range(max_new):
            # No key-value cache: at a dozen positions the body is cheap beside the output layer.
            logits = self.head(self.hidden(ids)[:, -1])
            # max, because argmax of bfloat16 takes four times as long on a CPU.
            values, token = logits.max(-1) if greedy else sample(logits)
            logps.append(torch.zeros_like(values) if greedy else values)
            ids = torch.cat([ids, token[:, None]], dim=1)
        responses = ids[:, prompts.shape[1] :]
        ended = (responses == eos_id).cumsum(1)
        mask = ended - (responses == eos_id).long() == 0
        return responses, mask, torch.stack(logps, dim=1)


def sample(logits: Tensor, chunk: int = 4) -> tuple[Tensor, Tensor]:
    """Draw one token a row from softmax(logits). (B, V) -> log-probability (B,), token (B,).

    By inverting the cumulative distribution: on a CPU ten times as fast as torch.multinomial at
    this width. In chunks, so that the float32 copies stay in cache.
    """
    logps, tokens = [], []
    for rows in logits.split(chunk):
        p = rows.float().softmax(-1)
        cdf = p.cumsum(-1)
        # Scaled by the last entry, since rounding leaves the sum a little off 1.
        u = torch.rand(len(rows), 1) * cdf[:, -1:]
        token = torch.searchsorted(cdf, u, right=True).clamp_(max=logits.shape[-1] - 1)
        logps.append(p.gather(1, token).log())
        tokens.append(token)
    return torch.cat(logps).squeeze(1), torch.cat(tokens).squeeze(1)
