"""Our loss inside TRL's trainer against TRL's own code: loss, every gradient, what is logged."""

from __future__ import annotations

import inspect
import math
import textwrap
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("trl", reason="the TRL integration needs the trl extra")

import trl_setup
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer import grpo_trainer
from trl.trainer.utils import add_fused_lm_head

from cfpo_kernels import PPOClip
from cfpo_kernels.integrations import _trl_forward
from cfpo_kernels.integrations.trl import compute_cfpo_loss

NORMALISATIONS = ("dapo", "grpo", "bnpo", "dr_grpo")
OWN_OBJECTIVES = ("luspo", "cispo", "sapo", "vespo")
LOSS_TYPES = (*NORMALISATIONS, *OWN_OBJECTIVES)
CLIPPED = "per_token_loss = -torch.min(per_token_loss1, per_token_loss2)"
# CFPO as its paper has it, in the variables of TRL's code.
PENALISED = (
    "per_token_loss = -(coef_1 * advantages"
    " - advantages.abs() / (2 * self.epsilon_low) * (coef_1 - 1) ** 2)"
)
COMPARED_METRICS = {"kl", "entropy", "policy_loss", "entropy_coef", "aux_loss"}
ADAPTIVE_STATE = ("entropy_coef", "_last_world_entropy", "_entropy_window_stats")

LossFunction = Callable[[Any, Any, dict[str, Tensor]], Tensor]


def trl_loss(*replacements: tuple[str, str]) -> LossFunction:
    """TRL's ``_compute_loss`` with some of its text replaced."""
    source = textwrap.dedent(inspect.getsource(GRPOTrainer._compute_loss))
    for old, new in replacements:
        assert source.count(old) == 1, f"TRL's code has changed: {old!r}"
        source = source.replace(old, new)
    namespace = dict(vars(grpo_trainer))
    exec(compile(source, "grpo_trainer._compute_loss", "exec"), namespace)
    return namespace["_compute_loss"]


TRL_CLIPPED = trl_loss()
TRL_CFPO = trl_loss((CLIPPED, PENALISED))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["llama", "moe", "softcap"])
def any_trainer(request: pytest.FixtureRequest, tmp_path_factory: Any) -> Iterator[Any]:
    yield from _trainer(tmp_path_factory, request.param)


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: Any) -> Iterator[Any]:
    yield from _trainer(tmp_path_factory, "llama")


def _trainer(tmp_path_factory: Any, kind: str) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp(kind)
    trainer = trl_setup.make_trainer(folder, kind, temperature=0.8, epsilon=0.25)
    trainer.model.train()
    # As in the middle of an accumulation window, of a generation batch of another size.
    trainer.current_gradient_accumulation_steps = 3
    trainer.args.steps_per_generation = 2
    yield trainer


def configure(monkeypatch: pytest.MonkeyPatch, trainer: Any, **settings: Any) -> None:
    """Sets what GRPOTrainer's constructor would have taken from a config."""
    if "entropy_coef" in settings or "use_adaptive_entropy" in settings:
        settings["_entropy_bonus_enabled"] = True
    for name, value in settings.items():
        if hasattr(trainer.args, name):
            monkeypatch.setattr(trainer.args, name, value)
        if hasattr(trainer, name):
            monkeypatch.setattr(trainer, name, value)
        assert hasattr(trainer, name) or hasattr(trainer.args, name), name


def outcome(loss_of: LossFunction, trainer: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    before = {name: getattr(trainer, name) for name in ADAPTIVE_STATE}
    mode = "train" if trainer.model.training else "eval"
    trainer._metrics[mode].clear()
    trainer.model.zero_grad()
    loss = loss_of(trainer, trainer.model, inputs)
    gradients = {}
    if loss.requires_grad:
        loss.backward()
        gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    state = {name: getattr(trainer, name) for name in ADAPTIVE_STATE}
    for name, value in before.items():
        setattr(trainer, name, value)
    metrics = dict(trainer._metrics[mode])
    return {"loss": loss.detach(), "gradients": gradients, "metrics": metrics, "state": state}


def check_same(got: dict[str, Any], want: dict[str, Any], relative: float = 1e-5) -> None:
    loss, expected = got["loss"].item(), want["loss"].item()
    assert abs(loss - expected) <= relative * max(abs(expected), 0.1), (loss, expected)
    assert got["gradients"].keys() == want["gradients"].keys()
    for name, gradient in want["gradients"].items():
        error = (got["gradients"][name] - gradient).norm() / gradient.norm()
        assert error <= relative, f"gradient of {name}: relative error {error:.2g}"
    compared = COMPARED_METRICS & want["metrics"].keys()
    assert compared == COMPARED_METRICS & got["metrics"].keys()
    for name in compared:
        assert got["metrics"][name] == pytest.approx(want["metrics"][name], rel=relative), name
    for name, value in want["state"].items():
        got_value = got["state"][name]
        assert got_value is value or got_value == pytest.approx(value, rel=relative), name


def check_parity(
    trainer: Any, inputs: dict[str, Tensor], logits_tokens: int | None, relative: float = 1e-5
) -> None:
    """PPOClip against TRL's loss, CFPO against TRL's loss with the formula in place of the clip; or
    TRL's own objective, where the loss_type stands for one."""
    epsilon, delta = trainer.args.epsilon, trainer.args.delta
    pairs: list[tuple[Any, LossFunction]] = [(None, TRL_CLIPPED)]
    if trainer.args.loss_type in NORMALISATIONS:
        pairs = [(PPOClip(epsilon, epsilon, dual_clip=delta), TRL_CLIPPED)]
        if delta is None:
            pairs.append((None, TRL_CFPO))
    for objective, reference in pairs:

        def ours(*arguments: Any, objective: Any = objective) -> Tensor:
            return compute_cfpo_loss(*arguments, objective, logits_tokens=logits_tokens)

        want = outcome(reference, trainer, inputs)
        assert not trainer.model.training or len(want["gradients"]) > 15
        with pytest.MonkeyPatch.context() as patch:
            other = "policy_loss" if logits_tokens else "linear_policy_loss"
            patch.delattr(_trl_forward, other)  # that it is not what was called
            check_same(outcome(ours, trainer, inputs), want, relative)


# Chunks of four tokens end inside sequences.
chunks = pytest.mark.parametrize("logits_tokens", [None, 4], ids=["whole", "chunks"])


@chunks
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_normalisations_of_every_model(
    any_trainer: Any,
    loss_type: str,
    beta: float,
    logits_tokens: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configure(monkeypatch, any_trainer, loss_type=loss_type, beta=beta)
    check_parity(any_trainer, trl_setup.make_inputs(any_trainer), logits_tokens)


@chunks
@pytest.mark.parametrize("loss_type", ("grpo", "vespo"))
@pytest.mark.parametrize("kind", ["scale", "divisor"])
def test_models_that_scale_their_logits(
    tmp_path_factory: Any,
    kind: str,
    loss_type: str,
    logits_tokens: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (trainer,) = _trainer(tmp_path_factory, kind)
    configure(monkeypatch, trainer, loss_type=loss_type, beta=0.3)
    check_parity(trainer, trl_setup.make_inputs(trainer), logits_tokens)


@chunks
@pytest.mark.parametrize("plain_kl", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_ratios_of_sequences(
    trainer: Any,
    loss_type: str,
    beta: float,
    plain_kl: bool,
    logits_tokens: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configure(
        monkeypatch,
        trainer,
        loss_type=loss_type,
        beta=beta,
        importance_sampling_level="sequence",
        use_bias_correction_kl=not plain_kl,
    )
    check_parity(trainer, trl_setup.make_inputs(trainer, tools=True), logits_tokens)


def test_sequences_that_are_split_are_refused(
    trainer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = SimpleNamespace(cp_size=2)
    inputs = trl_setup.make_inputs(trainer)
    monkeypatch.setattr(trainer.accelerator.state, "parallelism_config", split, raising=False)
    assert trainer.accelerator.parallelism_config is split
    compute_cfpo_loss(trainer, trainer.model, inputs)
    configure(monkeypatch, trainer, importance_sampling_level="sequence")
    with pytest.raises(ValueError, match="set importance_sampling_level='token'"):
        compute_cfpo_loss(trainer, trainer.model, inputs)


@chunks
@pytest.mark.parametrize("name", ["rollout", "quantile", "bonus", "epsilon_high", "delta"])
@pytest.mark.parametrize("loss_type", OWN_OBJECTIVES)
def test_settings_of_own_objectives(
    trainer: Any,
    loss_type: str,
    name: str,
    logits_tokens: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings: dict[str, Any] = {
        "rollout": {"use_vllm": True, "beta": 0.3},
        "quantile": {"top_entropy_quantile": 0.5, "beta": 0.3, "entropy_coef": 0.1},
        "bonus": {"entropy_coef": 0.1},
        "epsilon_high": {"epsilon_high": 1.2},
        "delta": {"delta": 1.5},
    }[name]
    configure(monkeypatch, trainer, loss_type=loss_type, **settings)
    inputs = trl_setup.make_inputs(trainer, **({"rollout": "token"} if name == "rollout" else {}))
    if name == "delta" and loss_type != "luspo":
        with pytest.raises(ValueError, match="leave delta unset"):
            check_parity(trainer, inputs, logits_tokens)
    else:
        check_parity(trainer, inputs, logits_tokens)


SETTINGS: dict[str, dict[str, Any]] = {
    "plain KL": {"beta": 0.3, "use_bias_correction_kl": False},
    "bonus": {"entropy_coef": 0.1},
    "bonus and KL": {"entropy_coef": 0.1, "beta": 0.3},
    "bonus and plain KL": {"entropy_coef": 0.1, "beta": 0.3, "use_bias_correction_kl": False},
    "adaptive bonus": {"use_adaptive_entropy": True, "entropy_target": 9.0, "entropy_coef": 0.1},
    "adaptive bonus, gated": {
        "use_adaptive_entropy": True,
        "entropy_target": 0.1,
        "_last_world_entropy": 3.0,
        "_entropy_window_stats": torch.tensor([30.0, 10.0]),
        "entropy_coef": 0.1,
    },
    "entropy quantile": {"top_entropy_quantile": 0.5},
    "entropy quantile, bonus and KL": {
        "top_entropy_quantile": 0.5,
        "entropy_coef": 0.1,
        "beta": 0.3,
    },
    "off-policy mask": {"off_policy_mask_threshold": 0.1},
    "dual clip": {"delta": 1.4},
    "one accumulation step": {"current_gradient_accumulation_steps": 1},
}


@chunks
@pytest.mark.parametrize("loss_type", ("dapo", "grpo", "bnpo"))
@pytest.mark.parametrize("name", SETTINGS)
def test_settings(
    trainer: Any,
    name: str,
    loss_type: str,
    logits_tokens: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configure(monkeypatch, trainer, loss_type=loss_type, **SETTINGS[name])
    inputs = trl_setup.make_inputs(trainer, tools=True)
    check_parity(trainer, inputs, logits_tokens)


BATCHES: dict[str, dict[str, Any]] = {
    "on-policy": {"stale": False},
    "tool mask": {"tools": True},
    "advantages a token": {"advantages_per_token": True},
    "a sequence without tokens": {"empty_sequence": True},
    "token rollout correction": {"rollout": "token"},
    "sequence rollout correction": {"rollout": "sequence"},
}


@chunks
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("loss_type", ("dapo", "grpo", "bnpo"))
@pytest.mark.parametrize("name", BATCHES)
def test_batches(
    trainer: Any,
    name: str,
    loss_type: str,
    beta: float,
    logits_tokens: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rollout = "rollout" in BATCHES[name]
    configure(monkeypatch, trainer, loss_type=loss_type, beta=beta, use_vllm=rollout)
    check_parity(trainer, trl_setup.make_inputs(trainer, **BATCHES[name]), logits_tokens)


@chunks
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_evaluation(
    trainer: Any, loss_type: str, logits_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, trainer, loss_type=loss_type, beta=0.3, entropy_coef=0.1)
    inputs = trl_setup.make_inputs(trainer)
    trainer.model.eval()
    try:
        with torch.no_grad():
            check_parity(trainer, inputs, logits_tokens)
    finally:
        trainer.model.train()


@chunks
def test_a_model_without_logits_to_keep(
    trainer: Any, logits_tokens: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = trainer.model.forward

    def forward(input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return original(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    inputs = trl_setup.make_inputs(trainer, tools=True)
    want = outcome(TRL_CFPO, trainer, inputs)
    monkeypatch.setattr(trainer.model, "forward", forward)
    ours = partial(compute_cfpo_loss, logits_tokens=logits_tokens)
    check_same(outcome(ours, trainer, inputs), want)


@chunks
def test_images(trainer: Any, logits_tokens: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "model", trl_setup.make_model_of_images())
    add_fused_lm_head(trainer.model, trainer.temperature, outputs=("log_probs", "entropy"))
    inputs = trl_setup.make_inputs(trainer)
    inputs["prompt_ids"][0, :4] = trl_setup.IMAGE_TOKEN
    inputs["pixel_values"] = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs["num_images"] = [1, 0, 0, 0]
    check_parity(trainer, inputs, logits_tokens)
    monkeypatch.setattr(_trl_forward, "MODEL_INPUTS", ())
    with pytest.raises(AssertionError):
        check_parity(trainer, inputs, logits_tokens)


@chunks
def test_nan_in_a_token_is_no_error(trainer: Any, logits_tokens: int | None) -> None:
    inputs = trl_setup.make_inputs(trainer)
    inputs["old_per_token_logps"][0, 0] = math.nan
    ours = partial(compute_cfpo_loss, logits_tokens=logits_tokens)
    assert outcome(ours, trainer, inputs)["loss"].isnan()


@chunks
def test_a_batch_without_tokens(trainer: Any, logits_tokens: int | None) -> None:
    inputs = trl_setup.make_inputs(trainer)
    inputs["tool_mask"] = torch.zeros_like(inputs["completion_mask"])
    got = outcome(partial(compute_cfpo_loss, logits_tokens=logits_tokens), trainer, inputs)
    assert got["loss"] == 0
    assert len(got["gradients"]) == len(list(trainer.model.parameters()))
    assert not any(gradient.any() for gradient in got["gradients"].values())
    assert got["metrics"]["entropy"] == [0.0] and math.isnan(got["metrics"]["ratio/max"][0])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("self.max_completion_length)", "(self.max_completion_length + 1))"),
        ("(coef_1 - 1) ** 2", "(coef_1 - 1) ** 2 * 1.001"),
        ("completion_mask * inputs", "completion_mask + 0 * inputs"),
        ("per_token_kl * coef_1", "per_token_kl * coef_1.detach()"),
    ],
)
def test_the_comparison_notices_a_wrong_formula(
    trainer: Any, old: str, new: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(monkeypatch, trainer, loss_type="dr_grpo", beta=0.3)
    inputs = trl_setup.make_inputs(trainer, tools=True)
    want = outcome(TRL_CFPO, trainer, inputs)
    wrong = outcome(trl_loss((CLIPPED, PENALISED), (old, new)), trainer, inputs)
    with pytest.raises(AssertionError):
        check_same(wrong, want)


@chunks
def test_logged_ratios(trainer: Any, logits_tokens: int | None) -> None:
    inputs = trl_setup.make_inputs(trainer, tools=True)
    mask = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
    ratio = (trl_setup.score(trainer, inputs) - inputs["old_per_token_logps"]).exp()[mask]
    got = outcome(partial(compute_cfpo_loss, logits_tokens=logits_tokens), trainer, inputs)[
        "metrics"
    ]
    assert got["ratio/mean"] == pytest.approx([ratio.mean().item()], rel=1e-5)
    assert got["ratio/max"] == pytest.approx([ratio.max().item()], rel=1e-5)
    outside = ((ratio - 1).abs() > trainer.args.epsilon).float().mean().item()
    assert 0 < outside < 1
    assert got["ratio/outside_epsilon"] == pytest.approx([outside], rel=1e-5)
    assert not any(name.startswith("clip_ratio") for name in got)
