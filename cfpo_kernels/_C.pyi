from types import ModuleType
from typing import TypedDict

from torch import Tensor

Address = int | Tensor | None
Rows = tuple[int | Tensor | None, int, int, int, int, int, int]

class CudaDevice(TypedDict):
    name: str
    capability_major: int
    capability_minor: int
    total_memory: int
    sm_count: int

class CudaQuery(TypedDict):
    status: int
    status_name: str
    status_text: str
    runtime_version: int
    driver_version: int
    devices: list[CudaDevice]

# tests/package/test_native_stub.py compares this file with the module.

# Only where cuda_built: the four kernels below, with `device`, `stream`, `workspace` and
# `row_kernel` in place of `threads`, and workspace_bytes(logits, device).
cuda: ModuleType
build_id: str
cuda_built: bool
cuda_archs: str
cuda_reason: str

def cuda_query() -> CudaQuery: ...
def cpu_levels() -> list[str]: ...
def token_columns() -> list[str]: ...
def policy_numbers() -> list[str]: ...
def policy_term(
    *,
    shape: str,
    numbers: list[float],
    logp: float,
    log_ratio: float,
    advantage: float,
    low: float | None,
    high: float | None,
    token_weight: float,
) -> tuple[float, float]: ...
def kl_term(
    *, estimator: str, distance: float, log_ratio: float, ratio_weighted: bool
) -> tuple[float, float]: ...
def first_bad_token(token_ids: Address, weights: Address, n_rows: int, n_cols: int) -> int: ...
def token_losses(
    n_tokens: int,
    logps: Address,
    entropy: Address,
    weights: Address,
    log_ratios: Address,
    columns: list[Address],
    shape: str,
    numbers: list[float],
    kl_estimator: str,
    kl_ratio_weighted: bool,
    kl_coef: float,
    entropy_coef: float,
    loss: Address,
    dlogps: Address,
    dlog_ratios: Address,
    threads: int,
) -> None: ...
def policy_loss(
    logits: Rows,
    token_ids: Address,
    temperature: Address,
    temperature_stride: int,
    weights: Address,
    sharded: bool,
    softcap: float,
    dlogits: Rows | None,
    columns: list[Address],
    shape: str,
    numbers: list[float],
    kl_estimator: str,
    kl_ratio_weighted: bool,
    kl_coef: float,
    entropy_coef: float,
    grad_scale: Address,
    loss: Address,
    logps: Address,
    entropy: Address,
    threads: int,
) -> None: ...
def token_logps(
    logits: Rows,
    token_ids: Address,
    temperature: Address,
    temperature_stride: int,
    weights: Address,
    sharded: bool,
    softcap: float,
    logps: Address,
    lse: Address,
    entropy: Address,
    threads: int,
) -> None: ...
def token_logps_backward(
    logits: Rows,
    token_ids: Address,
    temperature: Address,
    temperature_stride: int,
    weights: Address,
    sharded: bool,
    softcap: float,
    dlogits: Rows,
    lse: Address,
    entropy: Address,
    dlogps: Address,
    dentropy: Address,
    threads: int,
) -> None: ...
def multiply_rows(rows: Rows, factors: Address, factor_stride: int, threads: int) -> None: ...
