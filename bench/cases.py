"""What is measured: a named case is a device, a vocabulary, a number of rows and a dtype."""

import re
from dataclasses import dataclass

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "f32": torch.float32}

# Llama 2, GPT-2, GPT-2 padded, cl100k, Llama 3, Qwen 2.5, Gemma. 50257 is odd: no aligned rows.
VOCABULARIES = (32000, 50257, 50304, 100352, 128256, 151936, 262144)
HEADLINE_VOCABULARY = 128256

# About 65M logits (131 MB in bf16): several times the last-level cache, so that a second sweep over
# the whole tensor has to read main memory again.
CPU_LOGITS = 512 * HEADLINE_VOCABULARY


@dataclass(frozen=True)
class Case:
    """One workload: logits of shape (rows, vocabulary)."""

    device: str  # "cpu" | "cuda"
    rows: int
    vocabulary: int
    dtype_name: str
    prefix: str  # first part of the name: "cpu" | "gpu" | "quick"

    @property
    def name(self) -> str:
        return f"{self.prefix}-{self.vocabulary}-{self.dtype_name}"

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def logits_bytes(self) -> int:
        return self.rows * self.vocabulary * self.dtype.itemsize

    @property
    def loss_scale(self) -> float:
        """What the loss is multiplied by before backward, as mixed-precision training does.

        Without it p / N is below what fp16 can hold, and no check of dlogits means anything.
        """
        return 4096.0 if self.dtype == torch.float16 else 1.0

    def __str__(self) -> str:
        return f"{self.name} ({self.rows} x {self.vocabulary})"


def cpu_case(vocabulary: int, dtype_name: str = "bf16") -> Case:
    rows = max(1, round(CPU_LOGITS / vocabulary))
    return Case("cpu", rows, vocabulary, dtype_name, "cpu")


def gpu_case(vocabulary: int, dtype_name: str = "bf16") -> Case:
    rows = 8192 if vocabulary < 262144 else 4096
    return Case("cuda", rows, vocabulary, dtype_name, "gpu")


def quick_case(vocabulary: int, dtype_name: str = "bf16") -> Case:
    return Case("cpu", 64, vocabulary, dtype_name, "quick")


_MAKERS = {"cpu": cpu_case, "gpu": gpu_case, "quick": quick_case}

CASE_SETS: dict[str, tuple[Case, ...]] = {
    "cpu": (*(cpu_case(v) for v in VOCABULARIES), cpu_case(HEADLINE_VOCABULARY, "f32")),
    "gpu": tuple(gpu_case(v) for v in VOCABULARIES),
    "quick": (quick_case(32000), quick_case(1003, "f32")),
}


def find_cases(names: str) -> list[Case]:
    """Cases for a comma-separated list of set names and single names such as `cpu-128256-bf16`.

    Any vocabulary may be named, not only the listed ones. Raises ValueError for an unknown name.
    """
    cases: list[Case] = []
    for name in (part.strip() for part in names.split(",")):
        cases.extend(CASE_SETS[name] if name in CASE_SETS else [parse_case(name)])
    return list(dict.fromkeys(cases))


def parse_case(name: str) -> Case:
    match = re.fullmatch(rf"({'|'.join(_MAKERS)})-(\d+)-({'|'.join(DTYPES)})", name)
    if match is None or int(match[2]) < 2:
        raise ValueError(
            f"unknown case {name!r}: expected one of {', '.join(CASE_SETS)}, "
            f"or <cpu|gpu|quick>-<vocabulary>-<{'|'.join(DTYPES)}>, such as cpu-128256-bf16"
        )
    return _MAKERS[match[1]](int(match[2]), match[3])
