"""The verl integration against verl's own code, of which one line is replaced by the formula."""

from __future__ import annotations

import inspect
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from limits import HANGS_AFTER

pytest.importorskip("verl", reason="verl is not installed: requirements/trainers-no-deps.txt")

import verl.utils.torch_functional as verl_functional
from tensordict import NonTensorData, TensorDict
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig
from verl.workers.config.actor import PolicyLossConfig
from verl.workers.engine.fsdp import transformer_impl
from verl.workers.utils.losses import ppo_loss

from cfpo_kernels import CISPO, DPPO, SAPO, PPOClip, bounds, policy_loss_from_logps
from cfpo_kernels.integrations import verl as ours

CLIPPED_LINE = "pg_losses = torch.where(advantages < 0, clip_pg_losses2, clip_pg_losses1)"
FORMULA = "pg_losses = -(ratio * advantages - advantages.abs() / (2 * clip_ratio) * (ratio-1)**2)"
MODES = (
    "token-mean",
    "token-sum",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
    "seq-mean-token-mean",
)
GLOBAL = {"dp_size": 2, "batch_num_tokens": 37, "global_batch_size": 9, "loss_scale_factor": 11}


def verl_loss_with_the_formula(formula: str = FORMULA) -> Callable[..., Any]:
    """verl's "vanilla" loss with its clipped line replaced."""
    source = inspect.getsource(core_algos.compute_policy_loss_vanilla)
    source = source.replace('@register_policy_loss("vanilla")', "")
    assert source.count(CLIPPED_LINE) == 1
    namespace = dict(vars(core_algos))
    exec(source.replace(CLIPPED_LINE, formula), namespace)
    return namespace["compute_policy_loss_vanilla"]


def actor_config(**changes: Any) -> ActorConfig:
    given = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 2}
    given["policy_loss"] = PolicyLossConfig(loss_mode="cfpo")
    return ActorConfig(**(given | changes))


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    """Log-ratios on both sides of every boundary; the third sequence has no tokens."""
    g = torch.Generator().manual_seed(seed)
    log_prob = -8 * torch.rand(4, 7, generator=g)
    edges = torch.tensor([0.0, math.log(0.8), math.log(1.2), 0.05, -0.15, 0.4, -1.5, 25.0])
    old = log_prob - edges[torch.arange(28) % 8].reshape(4, 7)
    mask = torch.rand(4, 7, generator=g) < 0.7
    mask[2] = False
    advantages = torch.randn(4, 7, generator=g)
    advantages[0, 3] = 0.0
    return {
        "old_log_prob": old,
        "log_prob": log_prob,
        "advantages": advantages,
        "response_mask": mask,
    }


def run(loss_function: Callable[..., Any], given: dict[str, Any], wide: bool) -> Any:
    given = dict(given)
    for name, x in given.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point() and wide:
            given[name] = x.double()
    given["log_prob"] = given["log_prob"].clone().requires_grad_()
    loss, metrics = loss_function(**given)
    loss.backward()
    return loss.detach(), given["log_prob"].grad, metrics


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """To what float32 log-probs allow: r is known to 1e-6, and r - 1 is divided by epsilon."""
    scale = want.abs().max()
    assert scale > 0 and (got.double() - want).abs().max() <= 2e-5 * scale


@pytest.mark.parametrize("weights", [False, True], ids=["", "rollout weights"])
@pytest.mark.parametrize("info", [{}, GLOBAL], ids=["local", "global"])
@pytest.mark.parametrize("mode", MODES)
def test_is_verls_loss_with_the_formula(mode: str, info: dict[str, int], weights: bool) -> None:
    given: dict[str, Any] = batch()
    # A log-ratio of 25 is clamped to 20 by verl: r^2 / epsilon is 1e18 there, so on its own below.
    given["response_mask"] &= given["log_prob"] - given["old_log_prob"] < 20
    if weights:
        given["rollout_is_weights"] = 2 * torch.rand(4, 7, generator=torch.Generator())
    given |= {"loss_agg_mode": mode, "config": actor_config(loss_agg_mode=mode)}
    given["config"].global_batch_info.update(info)
    loss, grad, metrics = run(core_algos.get_policy_loss_fn("cfpo"), given, wide=False)
    want, want_grad, want_metrics = run(verl_loss_with_the_formula(), given, wide=True)
    close(loss, want)
    close(grad, want_grad)
    assert metrics["actor/ppo_kl"] == pytest.approx(want_metrics["actor/ppo_kl"], abs=1e-6)
    ratio = (given["log_prob"] - given["old_log_prob"])[given["response_mask"]].double().exp()
    assert metrics["actor/ratio_mean"] == pytest.approx(ratio.mean().item(), rel=1e-5)
    assert metrics["actor/ratio_max"] == pytest.approx(ratio.max().item(), rel=1e-5)


def test_clamps_the_log_ratio_where_verl_does() -> None:
    given: dict[str, Any] = batch() | {"config": actor_config()}
    given["response_mask"] = given["log_prob"] - given["old_log_prob"] > 20
    given["advantages"] = torch.ones(4, 7)
    assert given["response_mask"].any()
    loss, grad, _ = run(ours.compute_policy_loss_cfpo, given, wide=False)
    want, want_grad, _ = run(verl_loss_with_the_formula(), given, wide=True)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=0)
    assert not grad.any() and not want_grad.any()


@pytest.mark.parametrize(
    "formula",
    [CLIPPED_LINE, FORMULA.replace("2 * clip_ratio", "clip_ratio"), FORMULA.replace("-(", "+(")],
    ids=["clipped", "twice the penalty", "sign"],
)
def test_the_comparison_sees_another_formula(formula: str) -> None:
    given: dict[str, Any] = batch() | {"config": actor_config()}
    given["response_mask"] &= given["log_prob"] - given["old_log_prob"] < 20
    _, grad, _ = run(ours.compute_policy_loss_cfpo, given, wide=False)
    _, other, _ = run(verl_loss_with_the_formula(formula), given, wide=True)
    with pytest.raises(AssertionError):
        close(grad, other)


def test_masked_tokens_reach_nothing() -> None:
    given: dict[str, Any] = batch() | {"config": actor_config()}
    given["response_mask"] &= given["log_prob"] - given["old_log_prob"] < 20
    want = run(ours.compute_policy_loss_cfpo, given, wide=False)
    for name in ("old_log_prob", "log_prob", "advantages"):
        given[name] = torch.where(given["response_mask"], given[name], torch.nan)
    got = run(ours.compute_policy_loss_cfpo, given, wide=False)
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and got[2] == want[2]


def test_a_batch_without_tokens_logs_zeros() -> None:
    given: dict[str, Any] = batch() | {"config": actor_config()}
    given["response_mask"] = torch.zeros(4, 7, dtype=torch.bool)
    given["config"].global_batch_info["batch_num_tokens"] = 5
    loss, grad, metrics = run(ours.compute_policy_loss_cfpo, given, wide=False)
    assert loss == 0 and not grad.any() and set(metrics.values()) == {0.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_ratio": 0.0, "clip_ratio_low": 0.0, "clip_ratio_high": 0.0}, "epsilon"),
    ],
)
def test_refuses_what_cfpo_has_not(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.compute_policy_loss_cfpo(**batch(), config=actor_config(**changes))


def test_refuses_other_mistakes() -> None:
    with pytest.raises(ValueError, match=r"config.*actor.clip_ratio"):
        ours.compute_policy_loss_cfpo(**batch())
    with pytest.raises(ValueError, match=r"'tokens'.*set actor.loss_agg_mode.*'token-mean'"):
        ours.compute_policy_loss_cfpo(**batch(), config=actor_config(), loss_agg_mode="tokens")
    config = actor_config()
    config.global_batch_info["dp_size"] = 2
    with pytest.raises(ValueError, match="batch_num_tokens"):  # verl's own
        ours.compute_policy_loss_cfpo(**batch(), config=config)


def test_takes_two_epsilons() -> None:
    given: dict[str, Any] = batch()
    given["response_mask"] &= given["log_prob"] - given["old_log_prob"] < 20
    given["config"] = actor_config(clip_ratio_low=0.15, clip_ratio_high=0.28)
    formula = FORMULA.replace(
        "clip_ratio)", "torch.where(advantages > 0, clip_ratio_high, clip_ratio_low))"
    )
    _, grad, _ = run(ours.compute_policy_loss_cfpo, given, wide=False)
    _, want, _ = run(verl_loss_with_the_formula(formula), given, wide=True)
    close(grad, want)


def test_takes_epsilon_from_clip_ratio_alone() -> None:
    given = batch()
    for config in (
        actor_config(clip_ratio=0.3),
        actor_config(clip_ratio=0.3, clip_ratio_low=None, clip_ratio_high=None),
        actor_config(clip_ratio=0.3, clip_ratio_low=0.3, clip_ratio_high=0.3),
    ):
        metrics = ours.compute_policy_loss_cfpo(**given, config=config)[1]
        log_ratio = (given["log_prob"] - given["old_log_prob"])[given["response_mask"]]
        outside = ((log_ratio.exp() - 1).abs() > 0.3).double().mean().item()
        assert metrics["actor/ratio_outside_fraction"] == pytest.approx(outside)


@pytest.fixture
def fused_logprobs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """use_fused_logprobs, undone afterwards."""
    for module in (*ours.REPLACEMENTS, transformer_impl):
        for replacements in ours.REPLACEMENTS.values():
            for name in replacements.keys() & vars(module).keys():
                monkeypatch.setattr(module, name, getattr(module, name))
    ours.use_fused_logprobs()
    yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logprobs_and_entropy_are_verls(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(2, 5, 300, generator=g)).to(dtype)
    labels = torch.randint(0, 300, (2, 5), generator=g)
    leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    values = (
        ours.logprobs_from_logits(leaf, labels, inplace_backward=False),
        ours.entropy_from_logits(leaf, chunk_size=2),
    )
    want = (
        verl_functional.logprobs_from_logits(wide, labels),
        verl_functional.entropy_from_logits(wide),
    )
    for x, y in zip(values, want, strict=True):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x.double(), y, rtol=3e-6, atol=3e-6)
    (values[0].sum() + values[1].sum()).backward()
    (want[0].sum() + want[1].sum()).backward()
    error = (leaf.grad.double() - wide.grad).norm(dim=-1) / wide.grad.norm(dim=-1)
    # bfloat16: two gradients, each rounded, are added and rounded.
    assert error.max() <= (1e-5 if dtype == torch.float32 else 8e-3)

    leaf = logits.clone().requires_grad_()
    ours.logprobs_from_logits(leaf * 1, labels).sum().backward()
    wide.grad = None
    verl_functional.logprobs_from_logits(wide, labels).sum().backward()
    error = (leaf.grad.double() - wide.grad).norm(dim=-1) / wide.grad.norm(dim=-1)
    assert error.max() <= (1e-5 if dtype == torch.float32 else 4e-3)


def test_entropy_compiles_as_verl_compiles_it() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(ours.entropy_from_logits, dynamic=True, backend="eager")
    for rows in (3, 5):
        logits = torch.randn(rows, 50)
        assert torch.equal(compiled(logits), ours.entropy_from_logits(logits))


def padded_batch(dtype: torch.dtype) -> tuple[TensorDict, torch.Tensor, torch.Tensor]:
    """Three sequences as verl's engine packs them, and the logits of a model."""
    g = torch.Generator().manual_seed(0)
    prompts, responses = [2, 3, 1], [3, 1, 4]
    total = sum(prompts) + sum(responses)
    logits = (2 * torch.randn(1, total, 40, generator=g)).to(dtype)
    ids = torch.randint(0, 40, (total,), generator=g)

    def nested(lengths: list[int]) -> torch.Tensor:
        return torch.nested.nested_tensor([torch.ones(n) for n in lengths], layout=torch.jagged)

    offsets = nested([p + r for p, r in zip(prompts, responses, strict=True)]).offsets()
    advantages = torch.randn(3, 4, generator=g)
    mask = torch.arange(4) < torch.tensor(responses)[:, None]
    settings = {
        "use_remove_padding": True,
        "calculate_entropy": True,
        "dp_size": 1,
        "batch_num_tokens": 8,
        "global_batch_size": 3,
    }
    data = TensorDict(
        {
            "input_ids": torch.nested.nested_tensor_from_jagged(ids, offsets),
            "prompts": nested(prompts),
            "responses": nested(responses),
            "response_mask": mask,
            "advantages": advantages,
            "old_log_probs": torch.zeros(3, 4),
            **{name: NonTensorData(value) for name, value in settings.items()},
        },
        batch_size=[3],
    )
    return data, logits, torch.roll(ids, -1)


def engine_step(
    data: TensorDict, logits: torch.Tensor, labels: torch.Tensor, config: ActorConfig
) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """verl's FSDP engine from the model's output on, then verl's ppo_loss and its backward."""
    leaf = logits.clone().requires_grad_()
    engine = SimpleNamespace(
        engine_config=SimpleNamespace(
            entropy_checkpointing=False, entropy_from_logits_with_chunking=False
        ),
        compute_entropy_from_logits=verl_functional.entropy_from_logits,
        _gather_and_unpad_packed=lambda x, pad_size: x,
    )
    arguments = {
        "input_ids_rmpad_rolled": labels,
        "temperature_rmpad": torch.full(labels.shape, 0.7),
        "pad_size": 0,
    }
    output = transformer_impl.FSDPEngineWithLMHead.prepare_model_outputs(
        engine, SimpleNamespace(logits=leaf * 1), arguments, data, None
    )
    loss, metrics = ppo_loss(config, output, data)
    loss.backward()
    return loss.detach(), leaf.grad, metrics


def test_a_step_of_verls_engine(fused_logprobs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    data, logits, labels = padded_batch(torch.float32)
    config = actor_config(entropy_coeff=0.01, loss_agg_mode="seq-mean-token-mean")
    assert transformer_impl.logprobs_from_logits is ours.logprobs_from_logits

    # Old log-probs around the current ones, as verl computes them in float64 without the patch.
    wide = verl_functional.F.log_softmax(logits[0].double() / 0.7, -1)
    current = wide.gather(-1, labels[:, None])[:, 0]
    shift = torch.tensor([0.0, 0.1, -0.3, 0.5]).repeat(3, 1)
    response = torch.tensor([[1, 2, 3, 0], [7, 0, 0, 0], [9, 10, 11, 12]])
    data["old_log_probs"] = (current[response] - shift).float()
    loss, grad, metrics = engine_step(data, logits, labels, config)

    monkeypatch.undo()
    assert transformer_impl.logprobs_from_logits is not ours.logprobs_from_logits
    registry = core_algos.POLICY_LOSS_REGISTRY
    monkeypatch.setitem(registry, "cfpo", verl_loss_with_the_formula())
    data["advantages"] = data["advantages"].double()
    want, want_grad, want_metrics = engine_step(data, logits.double(), labels, config)
    torch.testing.assert_close(loss.double(), want, rtol=1e-5, atol=1e-6)
    error = (grad.double() - want_grad).norm(dim=-1)
    assert (error <= 2e-5 * want_grad.norm(dim=-1).max()).all()
    for name in ("actor/pg_loss", "actor/entropy_loss", "actor/ppo_kl"):
        assert metrics[name].aggregate() == pytest.approx(want_metrics[name].aggregate(), abs=1e-5)


def test_verl_finds_the_plugin_and_the_patch_by_itself() -> None:
    """By the entry point, and by what verl does with actor_rollout_ref.model.external_lib."""
    program = """
import verl
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.import_utils import import_external_libs
import verl.workers.engine.fsdp.transformer_impl as engine
print(get_policy_loss_fn("cfpo").__module__, engine.logprobs_from_logits.__module__)
import_external_libs("cfpo_kernels.integrations.verl_logprobs")
import verl.workers.rollout.naive.naive_rollout as later
import verl.utils.torch_functional as functional
from cfpo_kernels import CISPO, DPPO, SAPO, PPOClip, bounds, policy_loss_from_logps
from cfpo_kernels.integrations import verl as ours
ours.use_fused_logprobs()
assert engine.logprobs_from_logits is later.logprobs_from_logits is ours.logprobs_from_logits
assert functional.entropy_from_logits_with_chunking is ours.entropy_from_logits
from verl.utils.experimental.torch_functional import FusedLinearForPPO
from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy
assert FusedLinearForPPO is ours.FusedLinearForPPO
assert linear_cross_entropy is ours.linear_cross_entropy
print("patched")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=HANGS_AFTER
    )
    said = done.stdout.split()[-3:]
    ours, theirs = "cfpo_kernels.integrations.verl", "verl.utils.torch_functional"
    assert said == [ours, theirs, "patched"], done.stderr


# Named objectives against verl's own losses, by its names; its conventions are in docs/trainers.md.
TV, KL = 0.15, 0.05
CONVENTIONS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "vanilla": lambda given: {"objective": PPOClip(0.2, 0.28, dual_clip=3.0)},
    "cispo": lambda given: {"objective": CISPO(1 - 0.2, 1 + 0.28)},
    "sapo": lambda given: {"objective": SAPO(1.0, 1.05), "reduction": "seq-mean-token-mean"},
    "gspo": lambda given: {"objective": PPOClip(0.2, 0.28), "ratio_level": "sequence"},
    "dppo_tv": lambda given: {
        "objective": DPPO(cap=3.0),
        "log_ratio_bounds": bounds.total_variation(given["old_log_prob"], TV),
    },
    "dppo_kl": lambda given: {
        "objective": DPPO(cap=3.0),
        "log_ratio_bounds": bounds.kl(given["old_log_prob"], KL),
    },
}


@pytest.mark.parametrize("weights", [False, True], ids=["", "rollout weights"])
@pytest.mark.parametrize("name", CONVENTIONS)
def test_named_objectives_are_verls(name: str, weights: bool) -> None:
    given: dict[str, Any] = batch()
    # Off every boundary, and no ratio that verl clamps.
    shift = torch.linspace(-0.9, 1.1, 28).reshape(4, 7)
    given["old_log_prob"] = torch.minimum(given["log_prob"] - shift, torch.tensor(-0.01))
    if weights:
        given["rollout_is_weights"] = 2 * torch.rand(4, 7, generator=torch.Generator())
    delta = {"dppo_tv": TV, "dppo_kl": KL}.get(name)
    config = actor_config(
        clip_ratio=0.2,
        clip_ratio_low=delta or 0.2,
        clip_ratio_high=delta or 0.28,
        tau_pos=1.0,
        tau_neg=1.05,
    )
    theirs = core_algos.get_policy_loss_fn(name)
    want, want_grad, _ = run(theirs, given | {"config": config}, wide=True)
    leaf = given["log_prob"].double().requires_grad_()
    options = {"reduction": "token-mean"} | CONVENTIONS[name](given)
    if name == "sapo" or theirs.__defaults__[0] == "seq-mean-token-mean":
        options["reduction"] = "seq-mean-token-mean"
    loss = policy_loss_from_logps(
        leaf,
        given["advantages"].double(),
        given["old_log_prob"].double(),
        mask=given["response_mask"],
        token_weights=given.get("rollout_is_weights"),
        **options,
    )
    loss.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-6)
    torch.testing.assert_close(leaf.grad, want_grad, rtol=1e-6, atol=1e-9)
    assert want_grad.abs().sum() > 0
