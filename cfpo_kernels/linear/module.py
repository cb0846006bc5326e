"""The loss from hidden states as a module, and inside a head's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..objectives import CFPO
from ..stats import CFPOStats
from .api import linear_cfpo_loss
from .arguments import QUANTISED


class LinearCFPOLoss(nn.Module):
    """:func:`linear_cfpo_loss` as a module: settings at construction, tensors at the call.

    Args:
        epsilon: see :func:`cfpo_loss`.
        head: an ``nn.Linear``, such as a model's ``lm_head``. The loss is then computed inside its
            forward, where wrappers that shard or offload weights (FSDP2, ZeRO-3) have it whole.
            It does not become a submodule. ``copy.deepcopy`` of this module alone copies the head
            too, which the copy then trains: copy the model that both are parts of, or make another
            one.
        **settings: any keyword argument of :func:`linear_cfpo_loss`; a call may override them. With
            a head no bias, which is the head's own.

    A call takes ``(hidden, weight, token_ids, advantages, old_logps)``, or with a head
    ``(hidden, token_ids, advantages, old_logps)``, and returns what :func:`linear_cfpo_loss` does.

    Raises:
        TypeError: an unknown setting, a head that is no plain linear layer, or a bias beside one.

    Example:
        >>> lm_head = torch.nn.Linear(16, 1000, bias=False)
        >>> loss_of = cfpo_kernels.LinearCFPOLoss(epsilon=0.2, head=lm_head)
        >>> hidden = torch.randn(2, 5, 16, requires_grad=True)
        >>> loss_of(hidden, torch.randint(0, 1000, (2, 5)), torch.tensor([1.0, -1.0])).backward()
    """

    def __init__(
        self, epsilon: float = 0.2, *, head: nn.Linear | None = None, **settings: Any
    ) -> None:
        super().__init__()
        # Refused now, not at a step.
        CFPO(epsilon=epsilon, epsilon_high=settings.get("epsilon_high"))
        unknown = settings.keys() - _KEYWORDS
        if unknown:
            raise TypeError(f"LinearCFPOLoss got unknown arguments: {', '.join(sorted(unknown))}")
        if head is not None:
            check_head(head)
            _refuse_bias(settings)
        # In a tuple, so that its parameters are not this module's too.
        self._head = (head,)
        self.settings = {"epsilon": epsilon, **settings}

    def forward(
        self, hidden: Tensor, *arguments: Tensor | None, **overrides: Any
    ) -> Tensor | tuple[Tensor, CFPOStats]:
        settings = self.settings | overrides
        head = self._head[0]
        if head is None:
            return _loss(hidden, *arguments, **settings)

        _refuse_bias(overrides)

        def loss(given: Tensor) -> Any:
            return _loss(given, head.weight, *arguments, bias=head.bias, **settings)

        with forward_of(head, loss):
            found: Tensor | tuple[Tensor, CFPOStats] = head(hidden)
        return found

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


def _refuse_bias(settings: dict[str, Any]) -> None:
    if "bias" in settings:
        raise TypeError("bias must not be given beside head=, whose own bias is used")


def check_head(head: object) -> None:
    """A plain ``nn.Linear``: what it returns is ``hidden @ weight.T + bias``."""
    if not isinstance(head, nn.Module):
        raise TypeError(f"head must be an nn.Linear, got {type(head).__name__}")
    if parametrize.is_parametrized(head) or not isinstance(head, nn.Linear):
        raise TypeError(
            f"head must be an nn.Linear without parametrizations, got {type(head).__name__}: "
            f"{QUANTISED}. Of an adapter (LoRA), call linear_cfpo_loss with lora=(u, B)"
        )
    if type(head).forward is not nn.Linear.forward or "forward" in vars(head):
        raise TypeError(
            f"head must have nn.Linear's own forward, got {type(head).__name__} with another: "
            "call linear_cfpo_loss with the weight that it multiplies by"
        )


@contextmanager
def forward_of(module: nn.Module, function: Callable[[Tensor], Any]) -> Iterator[None]:
    """Calls of the module run this function, inside of the hooks that its wrappers have set."""
    own = vars(module).get("forward")
    module.forward = function
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


# A call's positional arguments are the function's to check.
_loss: Callable[..., Any] = linear_cfpo_loss
_KEYWORDS = frozenset(linear_cfpo_loss.__kwdefaults__ or ())
