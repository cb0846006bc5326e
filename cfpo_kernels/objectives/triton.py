from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ..shapes import Shape
from .base import BOTH, Objective, require_number

# What a function is called with beside its parameters, and how many of those there are room for.
TOKEN = ("logp", "log_ratio", "advantage", "low", "high")
MOST_PARAMETERS = 8
_FIRST = Shape._fields.index("below_positive")

_functions: dict[str, Any] = {}


@dataclass(frozen=True)
class TritonObjective(Objective):
    """What :func:`register_triton_objective` returns; runs on backend="triton" only."""

    name: str  # type: ignore[misc]  # of each, not of the class
    parameters: tuple[float, ...] = field(default=())

    bounded = BOTH

    def shape(self) -> Shape:
        names = Shape._fields[_FIRST : _FIRST + len(self.parameters)]
        own = dict(zip(names, self.parameters, strict=True))
        return Shape(self.name, drift=self.drift)._replace(**own)  # type: ignore[arg-type]


def register_triton_objective(
    name: str, fn: Any, parameters: tuple[float, ...] = (), *, drift: float = 0.0
) -> TritonObjective:
    """A scalar objective written in Triton, for the fused kernels: one read, one write.

    Args:
        name: of the function; one name stands for one function.
        fn: a ``@triton.jit`` function of (logp, log_ratio, advantage, low, high, p0 ... p7), all
            float32 scalars, that returns a token's loss and what stands for its derivative by logp.
            low and high are its bounds from ``log_ratio_bounds``, or -inf and inf. What it says of
            a token without an advantage is not used.
        parameters: up to 8 numbers, for p0 and on; the rest of p0 ... p7 are unspecified.
        drift: see :class:`Objective`.

    Returns:
        What ``objective=`` of :func:`policy_loss` takes, with backend="triton". Other backends
        refuse it: for them write the loss in torch, as a callable.

    Raises:
        TypeError, ValueError: the name stands for another function, fn is none, or takes other
            arguments, or there are too many parameters.

    Memory: none but the function's; it is compiled when a loss first uses it.

    Example:
        >>> import triton
        >>> @triton.jit
        ... def tilted(logp, log_ratio, advantage, low, high, p0, p1, p2, p3, p4, p5, p6, p7):
        ...     return -advantage * (p0 * log_ratio), -advantage * p0
        >>> register_triton_objective("tilted", tilted, (0.5,))
        TritonObjective(drift=0.0, name='tilted', parameters=(0.5,))
    """
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name must be an identifier, got {name!r}")
    arguments = getattr(fn, "arg_names", None)
    if arguments is None:
        raise TypeError(f"fn must be a @triton.jit function, got {type(fn).__name__}")
    if len(arguments) != len(TOKEN) + MOST_PARAMETERS:
        raise ValueError(
            f"fn must take {', '.join(TOKEN)}, p0 ... p{MOST_PARAMETERS - 1}, got "
            f"{', '.join(arguments)}"
        )
    if name in BUILT_IN or _functions.get(name, fn) is not fn:
        raise ValueError(f"name {name!r} stands for another function already")
    if len(parameters) > MOST_PARAMETERS:
        raise ValueError(f"parameters must be {MOST_PARAMETERS} at most, got {len(parameters)}")
    for i, number in enumerate(parameters):
        require_number(f"parameters[{i}]", number)
    found = TritonObjective(name, tuple(map(float, parameters)), drift=drift)
    _functions[name] = fn
    return found


# Kinds of Shape that are no registered function.
BUILT_IN = ("window", "quadratic", "sigmoid", "torch")


def function_of(kind: str) -> Any:
    """The registered function of a shape that the kernels do not have."""
    return _functions[kind]
