"""Checks every argument and brings it to the one form that the kernels take.

Shapes, dtypes, devices, strides and names are checked before anything is computed. Values that live
in tensors (token ids, temperatures, sequence bounds) are checked on the CPU; on a GPU that would
force a synchronisation, so only with CFPO_KERNELS_DEBUG=1.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .inputs import LossSettings, Region, TokenInputs
from .objectives import Objective
from .objectives.triton import TritonObjective
from .shapes import Shape
from .two_pass import Beyond, SequenceRatio, TokenTerms, TorchObjective
from .weights import REDUCTIONS, packed_sequence_index, padded_sequence_index, row_weights

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
RATIO_LEVELS = ("token", "sequence")
KL_ESTIMATORS = ("k1", "k2", "k3", "k1+", "k3+")
# A row with |logit| / T above 1.4e9 is NaN: from the lowest temperature on, logits up to 1400 are
# never that. The highest keeps 1 / T and logits / T well inside float32.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e30
TEMPERATURES = f"from {MIN_TEMPERATURE:g} to {MAX_TEMPERATURE:g}"
SMALLEST, LARGEST = torch.finfo(torch.float32).tiny, torch.finfo(torch.float32).max


@dataclass
class Tokens:
    """What the per-token arguments are held against, N = number of tokens."""

    name: str  # of `source`: "logits", (..., V), or "logps", (...)
    source: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.source.shape[:-1] if self.name == "logits" else self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of per-token numbers: float32, or float64 where the reference runs in it."""
        return torch.promote_types(self.source.dtype, torch.float32)


@dataclass
class Rows(Tokens):
    """The arguments that every entry point with logits has.

    ``logits`` stays as it came: (..., V), any leading strides. The rest is contiguous.
    """

    token_ids: Tensor  # (N,) int64
    temperature: Tensor  # (N,) or (1,)
    active: Tensor  # (N,) bool

    @property
    def logits(self) -> Tensor:
        return self.source


@dataclass
class Logps(Tokens):
    """The differentiable arguments where the log-probs exist already, (N,) in ``dtype``."""

    logps: Tensor
    entropy: Tensor | None
    active: Tensor  # (N,) bool


@dataclass
class LossTerms:
    """What the loss needs beside the rows; tensors are (N,), in ``Tokens.dtype``, and detached."""

    weights: Tensor
    inputs: TokenInputs
    settings: LossSettings
    region: Region | None  # bounds on log r, which statistics hold it against
    beyond: Beyond
    grad_scale: Tensor | None  # 0-d float32


def values_can_be_checked(tensor: Tensor) -> bool:
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("CFPO_KERNELS_DEBUG", "") not in ("", "0")


def _type_error(name: str, got: object, accepted: str) -> TypeError:
    described = f"a tensor of {got.dtype}" if isinstance(got, Tensor) else type(got).__name__
    return TypeError(f"{name} must be {accepted}, got {described}")


def _check_tensor(
    name: str, value: object, like: Tensor, accepted: str, like_name: str = "logits"
) -> Tensor:
    if not isinstance(value, Tensor):
        raise _type_error(name, value, accepted)
    if value.device != like.device:
        raise ValueError(
            f"{name} must be on the device of the {like_name}, {like.device}, got {value.device}"
        )
    return value


def _check_logits(logits: object, takes_float64: bool) -> Tensor:
    accepted = "a float32, bfloat16 or float16 tensor of shape (..., V)"
    if not isinstance(logits, Tensor):
        raise _type_error("logits", logits, accepted)
    if logits.dtype == torch.float64:
        if not takes_float64:
            raise TypeError(f"logits must be {accepted}; float64 needs backend='reference'")
    elif logits.dtype not in KERNEL_DTYPES:
        raise _type_error("logits", logits, accepted)
    if logits.layout != torch.strided:
        raise TypeError(f"logits must be {accepted}, got one of layout {logits.layout}")
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(
            f"logits must have shape (..., V) with V >= 1, got shape {tuple(logits.shape)}"
        )
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError(
            "logits must have stride 1 in the last dimension (leading ones are free), "
            f"got strides {logits.stride()}; call .contiguous() first"
        )
    return logits


def _check_token_ids(token_ids: object, logits: Tensor) -> Tensor:
    ids = _check_tensor("token_ids", token_ids, logits, "an int64 or int32 tensor")
    if ids.dtype not in (torch.int64, torch.int32):
        raise _type_error("token_ids", ids, "an int64 or int32 tensor")
    if ids.shape != logits.shape[:-1]:
        raise ValueError(
            f"token_ids must have the shape of the logits without V, {tuple(logits.shape[:-1])}, "
            f"got {tuple(ids.shape)}"
        )
    return ids.reshape(-1).to(torch.int64).contiguous()


def _shape_error(name: str, got: Tensor, tokens: Tokens, also: str = "") -> ValueError:
    like = "token_ids" if tokens.name == "logits" else tokens.name
    return ValueError(
        f"{name} must have the shape of {like}, {tuple(tokens.shape)}{also}, got {tuple(got.shape)}"
    )


def _per_token(name: str, value: object, tokens: Tokens) -> Tensor:
    accepted = "a floating-point tensor"
    tensor = _check_tensor(name, value, tokens.source, accepted, tokens.name)
    if not tensor.is_floating_point():
        raise _type_error(name, tensor, accepted)
    if tensor.shape != tokens.shape:
        raise _shape_error(name, tensor, tokens)
    return tensor.reshape(-1).to(tokens.dtype).contiguous()


def _constant(name: str, value: object | None, tokens: Tokens) -> Tensor | None:
    return None if value is None else _per_token(name, value, tokens).detach()


def _advantages(
    value: object, tokens: Tokens, sequence_index: Tensor | None = None, n_sequences: int = 0
) -> tuple[Tensor, bool]:
    """(N,), and whether they came by token."""
    accepted, shape = "a floating-point tensor", tokens.shape
    tensor = _check_tensor("advantages", value, tokens.source, accepted, tokens.name)
    packed = len(shape) == 1 and sequence_index is not None
    by_token = tensor.shape == shape
    if len(shape) == 2 and tensor.shape in (shape[:1], (shape[0], 1)):
        tensor = tensor.reshape(-1, 1).expand(shape)
        by_token = False
    elif packed and not by_token and tensor.shape == (n_sequences,):
        tensor = tensor[sequence_index]
    elif not by_token:
        also = f", or one a sequence, ({shape[0]},) or ({shape[0]}, 1)" if len(shape) == 2 else ""
        also = f", or one a sequence, ({n_sequences},)" if packed else also
        raise _shape_error("advantages", tensor, tokens, also)
    return _per_token("advantages", tensor, tokens).detach(), by_token


def _bound(name: str, value: object, tokens: Tokens) -> Tensor:
    if not isinstance(value, Tensor):
        accepted = "a number or a floating-point tensor"
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise _type_error(name, value, accepted)
        if math.isnan(value):
            raise ValueError(f"{name} must be {accepted}, got nan")
        device = tokens.source.device
        return torch.full((tokens.shape.numel(),), value, dtype=tokens.dtype, device=device)
    if value.dim() == 0 and len(tokens.shape) > 0:
        scalar = _scalar_tensor(name, value, tokens.source)
        return scalar.to(tokens.dtype).expand(tokens.shape.numel()).contiguous()
    return _per_token(name, value, tokens).detach()


Bounds = tuple[Tensor | None, Tensor | None]


def _bounds(
    value: object, objective: AnyObjective, advantages: Tensor, tokens: Tokens
) -> tuple[Region | None, Bounds]:
    """What statistics hold log r against, and `log_ratio_bounds` as numbers of the shape."""
    if not isinstance(objective, Objective):
        if value is not None:
            raise ValueError("log_ratio_bounds must be None for a callable, which has its own")
        return None, (None, None)
    name = type(objective).__name__
    if value is None:
        if objective.needs_bounds:
            raise ValueError(
                f"log_ratio_bounds must be given for {name}, which has none of its own; "
                "cfpo_kernels.bounds makes them from a divergence"
            )
        return objective.trust_region(), (None, None)
    if objective.bounded is None:
        raise ValueError(f"log_ratio_bounds must be None for {name}, which has no bounds")
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise _type_error("log_ratio_bounds", value, "a pair (low, high)")
    low = _bound("log_ratio_bounds[0]", value[0], tokens)
    high = _bound("log_ratio_bounds[1]", value[1], tokens)
    return (low, high), objective.bounds_of(low, high, advantages)


def _active(mask: object, tokens: Tokens) -> Tensor:
    if mask is None:
        return torch.ones(tokens.shape.numel(), dtype=torch.bool, device=tokens.source.device)
    accepted = "a bool, integer or float tensor"
    tensor = _check_tensor("mask", mask, tokens.source, accepted, tokens.name)
    if tensor.is_complex():
        raise _type_error("mask", tensor, accepted)
    if tensor.shape != tokens.shape:
        raise _shape_error("mask", tensor, tokens)
    return (tensor.detach() != 0).reshape(-1).contiguous()


def _finite_number(name: str, value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise _type_error(name, value, "a number")
    if not -math.inf < value < math.inf:  # math.isfinite would break torch.compile's graph
        raise ValueError(f"{name} must be finite, got {value}")
    return float(value)


def _positive_number(name: str, value: object) -> float:
    number = _finite_number(name, value)
    if not SMALLEST <= number <= LARGEST:
        raise ValueError(f"{name} must be a positive float32, got {number}")
    return number


def _scalar_tensor(name: str, value: Tensor, like: Tensor) -> Tensor:
    if value.dim() != 0:
        raise ValueError(f"{name} must be a number or a 0-d tensor, got shape {tuple(value.shape)}")
    if value.dtype == torch.bool or value.is_complex():
        raise _type_error(name, value, "a number or a real 0-d tensor")
    # A 0-d CPU tensor mixes with any device in torch, as a number does.
    return value.detach().to(like.device, non_blocking=True)


def _temperature(value: object, logits: Tensor, active: Tensor) -> Tensor:
    shape = logits.shape[:-1]
    dtype = torch.promote_types(logits.dtype, torch.float32)
    if not isinstance(value, Tensor):
        number = _positive_number("temperature", value)
        if not MIN_TEMPERATURE <= number <= MAX_TEMPERATURE:
            raise ValueError(f"temperature must be {TEMPERATURES}, got {number}")
        return torch.full((1,), number, dtype=dtype, device=logits.device)
    if not value.is_floating_point():
        raise _type_error("temperature", value, "a number or a floating-point tensor")
    if value.dim() == 0 and len(shape) > 0:
        value = _scalar_tensor("temperature", value, logits).reshape(1)
    elif value.shape != shape:
        raise ValueError(
            f"temperature must be a number or have the shape of token_ids, {tuple(shape)}, "
            f"got {tuple(value.shape)}"
        )
    else:
        _check_tensor("temperature", value, logits, "a floating-point tensor")
    temperature = value.detach().reshape(-1).to(dtype).contiguous()
    if values_can_be_checked(temperature):
        wrong = active & ~((temperature >= MIN_TEMPERATURE) & (temperature <= MAX_TEMPERATURE))
        if wrong.any():
            position, got = _first(wrong, temperature.expand(wrong.shape), shape)
            raise ValueError(f"temperature must be {TEMPERATURES}, got {got} at {position}")
    return temperature


def _first(wrong: Tensor, values: Tensor, shape: torch.Size) -> tuple[list[int], float]:
    index = int(wrong.nonzero()[0])
    position = [int(i) for i in torch.unravel_index(torch.tensor(index), shape)] if shape else []
    return position, values[index].item()


def check_token_range(token_ids: Tensor, active: Tensor, n_cols: int, shape: torch.Size) -> None:
    """An id outside [0, V) in a row that counts; masked rows may hold any, such as -100."""
    wrong = active & ((token_ids < 0) | (token_ids >= n_cols))
    if wrong.any():
        position, got = _first(wrong, token_ids, shape)
        raise IndexError(
            f"token_ids must be in [0, {n_cols}) where mask is not 0, got {got} at {position}"
        )


def _rows_overlap(x: Tensor) -> bool:
    reach = x.shape[-1]
    for stride, size in sorted(zip(x.stride()[:-1], x.shape[:-1], strict=True)):
        if size > 1:
            if stride < reach:
                return True
            reach += stride * (size - 1)
    return False


def check_rows(
    logits: object,
    token_ids: object,
    *,
    mask: object,
    temperature: object,
    inplace: bool,
    takes_float64: bool,
) -> Rows:
    """The checks that all entry points share."""
    checked = _check_logits(logits, takes_float64)
    ids = _check_token_ids(token_ids, checked)
    active = _active(mask, Tokens("logits", checked))
    rows = Rows("logits", checked, ids, _temperature(temperature, checked, active), active)
    if check_flag("inplace", inplace) and _rows_overlap(checked):
        raise ValueError(
            "inplace=True needs rows that do not overlap in memory, got logits of shape "
            f"{tuple(checked.shape)} with strides {checked.stride()}"
        )
    return rows


def check_logps(logps: object, *, entropy: object | None, mask: object) -> Logps:
    """The checks of the entry points that take log-probs."""
    accepted = "a floating-point tensor of shape (...)"
    if not isinstance(logps, Tensor) or not logps.is_floating_point():
        raise _type_error("logps", logps, accepted)
    if logps.layout != torch.strided:
        raise TypeError(f"logps must be {accepted}, got one of layout {logps.layout}")
    tokens = Tokens("logps", logps)
    return Logps(
        "logps",
        logps,
        _per_token("logps", logps, tokens),
        None if entropy is None else _per_token("entropy", entropy, tokens),
        _active(mask, tokens),
    )


def _sequence_index(
    tokens: Tokens, wanted: bool, needs: str, cu_seqlens: object | None
) -> tuple[Tensor | None, int]:
    source, shape, name = tokens.source, tokens.shape, tokens.name
    got = f"got {name} of shape {tuple(source.shape)}"
    padded, packed = ("(B, T, V)", "(N, V)") if name == "logits" else ("(B, T)", "(N,)")
    if cu_seqlens is not None:
        bounds = _check_tensor("cu_seqlens", cu_seqlens, source, "an integer tensor", name)
        if bounds.dtype not in (torch.int64, torch.int32):
            raise _type_error("cu_seqlens", bounds, "an int64 or int32 tensor")
        if bounds.dim() != 1 or bounds.shape[0] < 2:
            raise ValueError(f"cu_seqlens must have shape (B + 1,), got {tuple(bounds.shape)}")
        if len(shape) != 1:
            raise ValueError(f"cu_seqlens goes with packed {name} {packed}, {got}")
        n_tokens = shape[0]
        if values_can_be_checked(bounds):
            ends = (int(bounds[0]), int(bounds[-1]))
            if ends != (0, n_tokens) or bool((bounds[1:] < bounds[:-1]).any()):
                raise ValueError(
                    f"cu_seqlens must rise from 0 to the number of tokens, {n_tokens}, "
                    f"got {bounds.tolist() if bounds.numel() <= 8 else ends}"
                )
        return packed_sequence_index(bounds, n_tokens)
    if not wanted:
        return None, 0
    if len(shape) < 2:
        raise ValueError(
            f"{needs} needs sequences: {name} {padded}, or cu_seqlens for packed "
            f"{packed} {name}, {got}"
        )
    return padded_sequence_index(shape, source.device)


def _normalizer(value: object | None, logits: Tensor) -> float | Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        # 0 is the token count of a batch that is all masked.
        scalar = _scalar_tensor("normalizer", value, logits)
        if values_can_be_checked(value) and not 0 <= value.item() <= LARGEST:
            raise ValueError(f"normalizer must be finite and not negative, got {value.item()}")
        return scalar
    return _positive_number("normalizer", value)


def _grad_scale(value: object | None, logits: Tensor) -> Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        scale = _scalar_tensor("grad_scale", value, logits)
        if values_can_be_checked(value):
            _positive_number("grad_scale", value.item())
        return scale.to(torch.float32)
    number = _positive_number("grad_scale", value)
    return torch.full((), number, dtype=torch.float32, device=logits.device)


def check_flag(name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise _type_error(name, value, "True or False")
    return value


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str):
        raise _type_error(name, value, "one of " + ", ".join(map(repr, choices)))
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def check_formula(objective: object, runs_triton: bool) -> None:
    """Refuses an objective that has no formula where it is to run."""
    if isinstance(objective, TritonObjective) and not runs_triton:
        raise ValueError(
            f"objective {objective.name!r} is written in Triton: it needs backend='triton' and "
            "ratio_level='token'; a callable in torch runs everywhere"
        )


AnyObjective = Objective | Callable[[TokenTerms], Tensor]


def check_objective(objective: object) -> AnyObjective:
    if isinstance(objective, Objective):
        return objective
    accepted = "CFPO(...), PPOClip(...) or another objective, or a callable"
    if isinstance(objective, type) and issubclass(objective, Objective):
        raise TypeError(f"objective must be {accepted}, got the class {objective.__name__} itself")
    if not callable(objective):
        raise _type_error("objective", objective, accepted)
    return objective


def check_loss_terms(
    rows: Rows | Logps,
    objective: AnyObjective,
    *,
    advantages: object,
    old_logps: object | None,
    reduction: object,
    normalizer: object | None,
    cu_seqlens: object | None,
    token_weights: object | None,
    ref_logps: object | None,
    log_ratio_bounds: object | None,
    kl_coef: object,
    kl_estimator: object,
    kl_ratio_weighted: object,
    entropy_coef: object,
    ratio_level: object,
    sequence_group: object | None,
    grad_scale: object | None = None,
) -> LossTerms:
    """The checks of the policy losses; computes the weights of the rows."""
    chosen = check_choice("reduction", reduction, REDUCTIONS)
    settings = LossSettings(
        objective.shape() if isinstance(objective, Objective) else Shape("torch"),
        check_choice("kl_estimator", kl_estimator, KL_ESTIMATORS),
        check_flag("kl_ratio_weighted", kl_ratio_weighted),
        _finite_number("kl_coef", kl_coef),
        _finite_number("entropy_coef", entropy_coef),
    )
    if kl_coef != 0 and ref_logps is None:
        raise ValueError(f"ref_logps must be given where kl_coef is not 0, got kl_coef={kl_coef}")
    level = check_choice("ratio_level", ratio_level, RATIO_LEVELS)
    needs = "ratio_level='sequence'" if level == "sequence" else f"reduction {chosen!r}"
    wants_sequences = level == "sequence" or chosen.startswith("seq-")
    sequence_index, n_sequences = _sequence_index(rows, wants_sequences, needs, cu_seqlens)
    advantage_rows, by_token = _advantages(advantages, rows, sequence_index, n_sequences)
    region, merged = _bounds(log_ratio_bounds, objective, advantage_rows, rows)
    inputs = TokenInputs(
        advantage_rows,
        *(
            _constant(name, value, rows)
            for name, value in (
                ("old_logps", old_logps),
                ("token_weights", token_weights),
                ("ref_logps", ref_logps),
            )
        ),
        *merged,  # type: ignore[call-arg]
    )
    weights = row_weights(
        rows.active,
        chosen,
        group=sequence_group,
        sequence_index=sequence_index,
        n_sequences=n_sequences,
        normalizer=_normalizer(normalizer, rows.source),
        dtype=rows.dtype,
    )
    function = ratio = None
    if not isinstance(objective, Objective):
        function = TorchObjective(objective, rows.shape, cu_seqlens)  # type: ignore[arg-type]
    if level == "sequence":
        assert sequence_index is not None
        longest = rows.shape[-1]
        ratio = SequenceRatio(sequence_index, n_sequences, longest, by_token, sequence_group)
    return LossTerms(
        weights,
        inputs,
        settings,
        region,
        Beyond(function, ratio),
        _grad_scale(grad_scale, rows.source),
    )
