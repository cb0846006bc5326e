"""A task with a checkable answer: sort the digits of a short number."""

from __future__ import annotations

import random
from pathlib import Path

import mistral_common
import torch
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from torch import Tensor


def load_tokenizer() -> Tekkenizer:
    """Load Tekken (131,072 tokens), which ships inside the mistral-common wheel."""
    data = Path(mistral_common.__file__).parent / "data"
    return Tekkenizer.from_file(data / "tekken_240911.json")


class SortDigits:
    """Prompts such as ``sort 7391:``, whose one right answer is ``1379`` and end-of-sequence.

    Every prompt has the same number of tokens (Tekken splits numbers into digits), so prompts
    stack into a tensor without padding. Answers need not: a policy may stop early or ramble on.

    Args:
        tokenizer: the tokenizer; its vocabulary is the width of the model's output layer.
        n_digits: digits in a prompt; there are ``10 ** n_digits`` prompts.
        n_held_out: prompts that `sample` never draws, kept for evaluation.
    """

    def __init__(self, tokenizer: Tekkenizer, n_digits: int = 4, n_held_out: int = 256) -> None:
        self.tokenizer = tokenizer
        self.n_digits = n_digits
        numbers = [f"{i:0{n_digits}d}" for i in range(10**n_digits)]
        # A seed of its own: every run holds out the same prompts, whatever its own seed is.
        random.Random(0).shuffle(numbers)
        self.held_out, self._train = numbers[:n_held_out], numbers[n_held_out:]

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.tokenizer.n_words

    @property
    def eos_id(self) -> int:
        """The token that ends a response."""
        return self.tokenizer.eos_id

    @property
    def max_response(self) -> int:
        """T: the answer and its EOS. A longer response is cut off, and wrong."""
        return self.n_digits + 1

    def sample(self, n: int, rng: random.Random) -> list[str]:
        """Draw n training problems."""
        return rng.choices(self._train, k=n)

    def prompt_ids(self, numbers: list[str]) -> Tensor:
        """Tokenize the prompts. Returns (B, P) int64."""
        return torch.tensor(
            [self.tokenizer.encode(f"sort {n}:", bos=True, eos=False) for n in numbers]
        )

    def answer_ids(self, numbers: list[str]) -> Tensor:
        """Tokenize the right answers, for supervised training. Returns (B, n_digits + 1) int64."""
        return torch.tensor([self._answer(n) for n in numbers])

    def rewards(self, numbers: list[str], responses: Tensor, mask: Tensor) -> Tensor:
        """Score responses: 1 for exactly the right answer, else 0.

        Args:
            numbers: the B problems.
            responses: (B, T) int64, the sampled tokens.
            mask: (B, T) bool, False behind the end of a response.

        Returns:
            (B,) float32.
        """
        pairs = zip(numbers, responses, mask, strict=True)
        return torch.tensor([float(ids[m].tolist() == self._answer(n)) for n, ids, m in pairs])

    def _answer(self, number: str) -> list[int]:
        return self.tokenizer.encode("".join(sorted(number)), bos=False, eos=True)
