"""The OpenRLHF integration against OpenRLHF's own code, of which one line is replaced.

flash-attn and deepspeed, which OpenRLHF imports, are not to be had without a GPU, so
openrlhf_import.py puts stubs in their place. The actor runs without packing, which is flash-attn's.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from limits import HANGS_AFTER
from openrlhf_import import import_openrlhf
from repository import SUPPORT

if importlib.util.find_spec("openrlhf") is None:
    pytest.skip("openrlhf is not installed", allow_module_level=True)

openrlhf_models = import_openrlhf()
openrlhf_actor, openrlhf_loss = openrlhf_models.actor, openrlhf_models.loss
ours = importlib.import_module("cfpo_kernels.integrations.openrlhf")

THEIRS = openrlhf_loss.PolicyLoss
CLIPPED_LINE = "loss = -torch.min(surr1, surr2)"
FORMULA = (
    "eps = self.clip_eps_low; "
    "loss = -(ratio * advantages - advantages.abs() / (2 * eps) * (ratio - 1) ** 2)"
)
GLOBAL = {"dp_size": 2, "batch_num_tokens": 37.0, "global_batch_size": 9.0}
CORRECTIONS: dict[str, dict[str, Any]] = {
    "off": {},
    "token mask": {"is_correction_level": "token", "is_correction_threshold": (0.8, 1.2)},
    "token clip": {
        "is_correction_level": "token",
        "is_correction_mode": "clip",
        "is_correction_threshold": (0.8, 1.2),
    },
    "sequence mask": {"is_correction_level": "seq", "is_correction_threshold": (0.95, 1.05)},
    "sequence kl": {
        "is_correction_level": "seq",
        "is_correction_gating": "binary_kl",
        "is_correction_threshold": (0.0, 0.002),
    },
}


def their_loss_with_the_formula(formula: str = FORMULA) -> type:
    """OpenRLHF's PolicyLoss with its clipped line replaced."""
    source = inspect.getsource(THEIRS)
    assert source.count(CLIPPED_LINE) == 1
    namespace = dict(vars(openrlhf_loss))
    exec(source.replace(CLIPPED_LINE, formula), namespace)
    return namespace["PolicyLoss"]


def batch() -> dict[str, torch.Tensor]:
    """Log-ratios on both sides of every boundary; the third sequence has no tokens."""
    g = torch.Generator().manual_seed(0)
    log_probs = -8 * torch.rand(4, 7, generator=g)
    edges = torch.tensor([0.0, math.log(0.8), math.log(1.2), 0.05, -0.15, 0.4, -1.5])
    old = log_probs - edges[torch.arange(28) % 7].reshape(4, 7)
    mask = (torch.rand(4, 7, generator=g) < 0.7).float()
    mask[2] = 0
    advantages = torch.randn(4, 7, generator=g)
    advantages[0, 3] = 0.0
    rollout = old + 0.15 * torch.randn(4, 7, generator=g)
    return {
        "log_probs": log_probs,
        "old_log_probs": old,
        "advantages": advantages,
        "action_mask": mask,
        "rollout_log_probs": rollout,
    }


def run(loss_function: Callable[..., Any], given: dict[str, Any], wide: bool) -> Any:
    given = {
        name: x.double() if wide and isinstance(x, torch.Tensor) else x for name, x in given.items()
    }
    given["log_probs"] = given["log_probs"].clone().requires_grad_()
    loss, *metrics = loss_function(**given)
    loss.backward()
    return loss.detach(), given["log_probs"].grad, metrics


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """To what float32 log-probs allow: r is known to 1e-6, and r - 1 is divided by epsilon."""
    scale = want.abs().max()
    assert scale > 0 and (got.double() - want).abs().max() <= 2e-5 * scale


@pytest.mark.parametrize("correction", CORRECTIONS)
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("token_level", [True, False], ids=["token", "sequence"])
def test_is_their_loss_with_the_formula(
    token_level: bool, info: dict[str, Any], correction: str
) -> None:
    settings = {"token_level_loss": token_level, **CORRECTIONS[correction]}
    given: dict[str, Any] = batch() | info
    loss, grad, (outside, *metrics) = run(ours.PolicyLoss(**settings), given, wide=False)
    want, want_grad, (_, *want_metrics) = run(
        their_loss_with_the_formula()(**settings), given, wide=True
    )
    close(loss, want)
    close(grad, want_grad)
    for got_metric, want_metric in zip(metrics, want_metrics, strict=True):
        assert got_metric is want_metric or got_metric.item() == pytest.approx(want_metric.item())
    if correction != "off":
        assert 0 < metrics[-1] < 1  # the case has something to filter
        off = run(ours.PolicyLoss(token_level_loss=token_level), given, wide=False)
        assert (off[1] - grad).abs().max() > 0.05 * grad.abs().max()
    distance = (given["log_probs"] - given["old_log_probs"]).exp().sub(1).abs()
    beyond = [(distance[given["action_mask"] != 0] > 0.2 + e).float().mean() for e in (1e-4, -1e-4)]
    assert beyond[0] <= outside <= beyond[1] < 1  # some lie on the boundary


TWO_EPSILONS = FORMULA.replace("eps = self.clip_eps_low", "r = ratio").replace(
    "2 * eps", "2 * torch.where(advantages > 0, self.clip_eps_high, self.clip_eps_low)"
)


@pytest.mark.parametrize("correction", ["off", "token mask", "sequence kl"])
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("kind", ["ppo", "gspo"])
def test_ratios_of_sequences_and_two_epsilons(
    kind: str, info: dict[str, Any], correction: str
) -> None:
    """Advantages differ within a sequence: every token moves all of its sequence's."""
    settings = {"clip_eps_low": 0.15, "clip_eps_high": 0.28, "policy_loss_type": kind}
    settings |= CORRECTIONS[correction]
    given: dict[str, Any] = batch() | info
    loss, grad, (outside, *_) = run(ours.PolicyLoss(**settings), given, wide=False)
    theirs = their_loss_with_the_formula(TWO_EPSILONS)(**settings)
    want, want_grad, _ = run(theirs, given, wide=True)
    close(loss, want)
    close(grad, want_grad)
    assert 0 < outside <= 1


@pytest.mark.parametrize(
    "formula",
    [CLIPPED_LINE, FORMULA.replace("2 * eps", "eps"), FORMULA.replace("-(", "+(")],
    ids=["clipped", "twice the penalty", "sign"],
)
def test_the_comparison_sees_another_formula(formula: str) -> None:
    _, grad, _ = run(ours.PolicyLoss(), batch(), wide=False)
    _, other, _ = run(their_loss_with_the_formula(formula)(), batch(), wide=True)
    with pytest.raises(AssertionError):
        close(grad, other)


def test_masked_tokens_reach_nothing() -> None:
    loss = ours.PolicyLoss(**CORRECTIONS["token mask"])
    given = batch()
    want = run(loss, given, wide=False)
    spoiled = {
        name: x if name == "action_mask" else torch.where(given["action_mask"] != 0, x, torch.nan)
        for name, x in given.items()
    }
    got = run(loss, spoiled, wide=False)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and got[2] == want[2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dual_clip": 3.0}, r"dual_clip=3.0.*leave --actor.dual_clip unset"),
        ({"policy_loss_type": "dpo"}, r"dpo.*set --actor.policy_loss_type"),
        ({"is_correction_level": "word"}, "is_correction_level"),  # OpenRLHF's own
        ({"clip_eps_low": 0.0, "clip_eps_high": 0.0}, "epsilon"),
    ],
)
def test_refuses_what_cfpo_has_not(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.PolicyLoss(**settings)


def test_refuses_a_correction_without_rollout_log_probs() -> None:
    given = batch() | {"rollout_log_probs": None}
    with pytest.raises(ValueError, match=r"rollout_log_probs.*set --algo.advantage.is_correction"):
        ours.PolicyLoss(is_correction_level="token")(**given)


def test_log_probs_are_theirs_without_a_float32_copy() -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 300, generator=g).bfloat16()
    labels = torch.randint(0, 300, (2, 5), generator=g)
    got = ours.log_probs_from_logits(logits, labels, temperature=0.7)
    want = openrlhf_actor.log_probs_from_logits(logits.double() / 0.7, labels)
    assert got.dtype == torch.float32 and logits.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=3e-6)


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """use_cfpo, undone afterwards."""
    for module in (openrlhf_loss, openrlhf_models):
        monkeypatch.setattr(module, "PolicyLoss", THEIRS)
    for name in ("compute_entropy", "log_probs_from_logits"):
        monkeypatch.setattr(openrlhf_actor, name, getattr(openrlhf_actor, name))
    monkeypatch.setattr(openrlhf_actor.Actor, "forward", openrlhf_actor.Actor.forward)
    ours.use_cfpo()
    ours.use_cfpo()
    yield


class Model(torch.nn.Module):
    """Logits that depend on the token, as a Hugging Face model returns them."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.table = torch.nn.Parameter((2 * torch.randn(50, 50, generator=g)).to(dtype))
        self.given: torch.Tensor | None = None

    def forward(self, sequences: torch.Tensor, **_: Any) -> dict[str, Any]:
        self.given = self.table[sequences]
        return {"logits": self.given, "aux_loss": 0.25}


class Output(dict):  # type: ignore[type-arg]
    """Attributes and items, as transformers' ModelOutput has them."""

    __getattr__ = dict.__getitem__


def actor(dtype: torch.dtype) -> Any:
    model = Model(dtype)
    model.register_forward_hook(lambda module, arguments, output: Output(output))
    made = openrlhf_actor.Actor(model, temperature=0.7)
    made.packing_samples = False  # what the constructor sets for a model that it loads itself
    return made


SEQUENCES = torch.randint(0, 50, (3, 8), generator=torch.Generator().manual_seed(1))


def actor_step(made: Any, **how: Any) -> tuple[torch.Tensor, Any]:
    mask = torch.ones(3, 5)
    mask[1, 3:] = 0
    return made(SEQUENCES, mask, torch.ones_like(SEQUENCES), return_output=True, **how)


@pytest.mark.parametrize("return_entropy", [False, True], ids=["", "entropy"])
def test_the_actor_keeps_the_models_dtype(in_place: None, return_entropy: bool) -> None:
    weights = torch.randn(3, 5, generator=torch.Generator().manual_seed(2))

    def step(made: Any) -> list[torch.Tensor]:
        log_probs, output = actor_step(made, return_entropy=return_entropy)
        loss = (log_probs * weights).sum()
        if return_entropy:
            loss = loss + output.entropy.sum()
        found = [log_probs.detach(), output.entropy.detach()] if return_entropy else [log_probs]
        assert output["logits"] is made.model.given and output["aux_loss"] == 0.25
        assert isinstance(made.model, Model) and "model" not in vars(made)
        loss.backward()
        return [*found, made.model.table.grad]

    made = actor(torch.bfloat16)
    got = step(made)
    assert got[0].dtype == torch.float32

    # The same in float64: OpenRLHF's forward with its cast to float32 left out.
    reference = actor(torch.float64)
    reference.model.table.data = made.model.table.data.double()
    logits = reference.model.table[SEQUENCES] / 0.7
    log_p = torch.log_softmax(logits, -1)
    log_probs = log_p[:, :-1].gather(-1, SEQUENCES[:, 1:, None])[..., 0][:, -5:]
    mask = torch.ones(3, 5)
    mask[1, 3:] = 0
    entropy = -(log_p.exp() * log_p).sum(-1)[:, :-1]
    (log_probs * mask * weights).sum().add(entropy.sum() if return_entropy else 0).backward()
    torch.testing.assert_close(got[0].double(), log_probs * mask, rtol=3e-6, atol=3e-6)
    if return_entropy:
        torch.testing.assert_close(got[1].double(), entropy, rtol=3e-6, atol=3e-6)
    want = reference.model.table.grad
    assert (got[-1].double() - want).norm() <= 1e-2 * want.norm()  # sums in bfloat16


def test_the_actor_in_float32_is_theirs(request: pytest.FixtureRequest) -> None:
    want, _ = actor_step(actor(torch.float32))
    request.getfixturevalue("in_place")
    got, _ = actor_step(actor(torch.float32))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert (got[0] < -0.5).all() and openrlhf_actor.Actor.forward is ours._actor_forward


def test_the_actor_still_returns_logits_where_they_are_wanted(in_place: None) -> None:
    output = actor(torch.bfloat16)(
        SEQUENCES, attention_mask=torch.ones_like(SEQUENCES), return_output=True
    )
    assert output["logits"].dtype == torch.float32


def test_use_cfpo_reaches_every_importer(in_place: None) -> None:
    assert openrlhf_models.PolicyLoss is openrlhf_loss.PolicyLoss is ours.PolicyLoss
    assert isinstance(openrlhf_models.PolicyLoss(), THEIRS)


def test_the_hook_of_ray_waits_for_openrlhf() -> None:
    program = """
import sys
from cfpo_kernels.integrations import openrlhf_ray
openrlhf_ray.setup(); openrlhf_ray.setup()
assert sum(type(f).__module__ == openrlhf_ray.__name__ for f in sys.meta_path) == 1
assert not [name for name in sys.modules if name.split(".")[0] in ("openrlhf", "deepspeed")]
from openrlhf_import import import_openrlhf
models = import_openrlhf()
print(models.PolicyLoss.__module__, models.Actor.forward.__module__)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=SUPPORT,
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == ours.__name__
