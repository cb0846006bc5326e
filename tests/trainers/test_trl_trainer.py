"""CFPOTrainer as a user meets it: training, logs, refusals, memory, other model set-ups."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import Any

import pytest
import torch
from limits import HANGS_AFTER
from repository import SUPPORT

pytest.importorskip("trl", reason="the TRL integration needs the trl extra")

import trl_setup
from torch.utils._python_dispatch import TorchDispatchMode
from trl import GRPOTrainer

from bench.memory import can_measure_cpu, cpu_extra_bytes
from cfpo_kernels import CFPO, DPPO, SAPO, PPOClip, policy_loss
from cfpo_kernels.integrations import _head, _trl_forward
from cfpo_kernels.integrations._trl_batch import align
from cfpo_kernels.integrations._trl_loss import TokenLoss
from cfpo_kernels.integrations.trl import CFPOTrainer, compute_cfpo_loss

pytestmark = pytest.mark.usefixtures("one_thread")


def make_cfpo_trainer(folder: Path, kind: str = "llama", **settings: Any) -> Any:
    return trl_setup.make_trainer(folder, kind, CFPOTrainer, **settings)


def steps(trainer: Any) -> list[dict[str, float]]:
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def test_it_trains_off_policy_with_everything_on(tmp_path: Path) -> None:
    trainer = make_cfpo_trainer(
        tmp_path,
        "moe",
        num_iterations=2,
        gradient_accumulation_steps=2,
        beta=0.05,
        entropy_coef=0.01,
        temperature=0.9,
        max_steps=4,
        learning_rate=3e-3,
        gradient_checkpointing=True,
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    entries = steps(trainer)
    assert len(entries) == 4
    logged = {"ratio/mean", "ratio/max", "ratio/outside_epsilon", "kl", "entropy"}
    logged |= {"aux_loss", "policy_loss", "entropy_coef"}
    for entry in entries:
        assert logged <= entry.keys()
        assert not any(name.startswith("clip_ratio") for name in entry)
    # Steps 1 and 3 are on-policy; between them and 2 and 4 the policy has moved.
    on_policy = [entries[i]["ratio/max"] for i in (0, 2)]
    assert on_policy == pytest.approx([1, 1], abs=1e-5)
    assert entries[1]["ratio/max"] > 1.01 and entries[3]["ratio/max"] > 1.01
    assert entries[0]["kl"] == pytest.approx(0, abs=1e-6) and entries[3]["kl"] > 1e-4
    assert all((p != before[name]).any() for name, p in trainer.model.named_parameters())
    evaluated = trainer.evaluate()
    assert {"eval_loss", "eval_kl", "eval_entropy", "eval_ratio/mean"} <= evaluated.keys()


def test_a_subclass_of_ones_own(tmp_path: Path) -> None:
    class Mine(GRPOTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> torch.Tensor:
            return compute_cfpo_loss(self, model, inputs, CFPO(0.1))

    trainer = trl_setup.make_trainer(tmp_path, cls=Mine)
    trainer.train()
    assert "ratio/mean" in steps(trainer)[0]


@contextmanager
def only_from(logits_tokens: int | None) -> Iterator[None]:
    """The loss comes from hidden states, or with None from logits, or not at all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(_trl_forward, "policy_loss" if logits_tokens else "linear_policy_loss")
        yield


def losses_and_gradients(trainer: Any, **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.model.train()
    trainer.model.zero_grad()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trl_setup.make_inputs(trainer)
    with trainer.compute_loss_context_manager():
        if options.pop("trl", False):
            loss = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
        else:
            with only_from(options.get("logits_tokens", 1024)):
                loss = compute_cfpo_loss(trainer, trainer.model, inputs, PPOClip(), **options)
    loss.backward()
    named = trainer.model.named_parameters()
    return loss.item(), {name: p.grad.clone() for name, p in named if p.grad is not None}


@pytest.mark.parametrize("logits_tokens", [None, 4])
def test_adapters(tmp_path: Path, logits_tokens: int | None) -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    trainer = make_cfpo_trainer(
        tmp_path, peft_config=config, beta=0.1, logits_tokens=logits_tokens, max_steps=1
    )
    want, expected = losses_and_gradients(trainer, trl=True)
    got, gradients = losses_and_gradients(trainer, logits_tokens=logits_tokens)
    assert got == pytest.approx(want, rel=1e-5)
    assert gradients.keys() == expected.keys() and all("lora" in name for name in gradients)
    for name, gradient in expected.items():
        assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
    trainer.train()
    assert steps(trainer)[0]["kl"] > 0  # the adapter is not zero, and off in the reference


@pytest.mark.parametrize("logits_tokens", [None, 4])
def test_bfloat16_autocast_is_as_exact_as_trl(tmp_path: Path, logits_tokens: int | None) -> None:
    exact_trainer = trl_setup.make_trainer(tmp_path / "exact")
    _, exact = losses_and_gradients(exact_trainer, trl=True)
    trainer = trl_setup.make_trainer(tmp_path / "bf16", bf16=True)
    _, theirs = losses_and_gradients(trainer, trl=True)
    _, ours = losses_and_gradients(trainer, logits_tokens=logits_tokens)

    def error(gradients: dict[str, torch.Tensor]) -> float:
        return max(((gradients[name] - g).norm() / g.norm()).item() for name, g in exact.items())

    assert 1e-4 < error(theirs) < 0.1, "autocast is on"
    assert error(ours) <= 1.3 * error(theirs)


def test_two_processes_agree_with_trl(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(SUPPORT / "trl_two_processes.py"), str(tmp_path)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=HANGS_AFTER)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "two processes agree" in done.stdout


@pytest.mark.parametrize(
    ("settings", "options", "says"),
    [
        ({"loss_type": "cispo"}, {"objective": CFPO()}, "set loss_type to one of 'dapo', 'grpo'"),
        ({"loss_type": "sapo"}, {"objective": CFPO()}, "has an objective of its own"),
        ({"loss_type": "vespo"}, {"objective": PPOClip()}, "loss_type='vespo'"),
        ({"loss_type": "luspo"}, {"objective": PPOClip()}, "leave objective unset"),
        ({"loss_type": "sapo", "delta": 2.0}, {}, "has no meaning for loss_type='sapo'"),
        ({"loss_type": "nope"}, {}, "is unknown"),
        ({"epsilon_high": 0.28}, {"objective": CFPO(0.1)}, "leave epsilon_high unset"),
        ({"epsilon_high": 0.28}, {"objective": SAPO()}, "has no meaning for SAPO"),
        ({}, {"objective": DPPO()}, "needs log_ratio_bounds"),
        ({"epsilon_high": 0.28}, {"objective": PPOClip()}, "contradicts objective=PPOClip"),
        ({"delta": 1.5}, {}, "leave delta unset"),
        ({"delta": 1.5}, {"objective": PPOClip()}, "set both to the same number"),
        ({"delta": 1.1}, {"objective": PPOClip(dual_clip=1.1)}, "raise delta"),
        ({"epsilon": -0.1}, {}, "epsilon must be a positive"),
        ({}, {"objective": "cfpo"}, "objective must be CFPO"),
        ({}, {"logits_tokens": 0}, "logits_tokens must be at least 1"),
        ({}, {"logits_tokens": 2.0}, "logits_tokens must be an int"),
        ({}, {"backend": "nope"}, "backend must be one of"),
        ({}, {"backend": "reference", "inplace": True}, "inplace=True needs a backend"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(
    tmp_path: Path, settings: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    config = trl_setup.make_config(tmp_path, **settings)
    with pytest.raises((ValueError, TypeError), match=says):
        CFPOTrainer("no such model", trl_setup.low_token_reward, config, **options)


def test_kl_without_reference_logps_is_refused(tmp_path: Path) -> None:
    trainer = make_cfpo_trainer(tmp_path, beta=0.1)
    inputs = trl_setup.make_inputs(trainer)
    del inputs["ref_per_token_logps"]
    trainer.current_gradient_accumulation_steps = 1
    with pytest.raises(ValueError, match=r"set beta=0\.0 in the GRPOConfig"):
        trainer._compute_loss(trainer.model, inputs)


def test_the_reference_backend(tmp_path: Path) -> None:
    trainer = trl_setup.make_trainer(tmp_path)
    want, expected = losses_and_gradients(trainer)
    for logits_tokens in (None, 4):
        got, gradients = losses_and_gradients(
            trainer, backend="reference", logits_tokens=logits_tokens
        )
        assert got == pytest.approx(want, rel=1e-5)
        for name, gradient in expected.items():
            assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("cap", [None, 4.9, 1000.0])
def test_a_head_whose_output_is_changed_is_noticed(
    tmp_path: Path, cap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a cap of 5, or of 1000, where the config says another."""
    trainer = trl_setup.make_trainer(tmp_path, "softcap")
    config = trainer.model.config
    monkeypatch.setattr(config, "final_logit_softcapping", 1000.0 if cap == 1000.0 else 5.0)
    said = _head.AfterHead(softcap=None if cap == 1000.0 else cap)
    monkeypatch.setattr(_trl_forward, "after_head", lambda model: said)
    with pytest.raises(RuntimeError, match="set logits_tokens=None"):
        losses_and_gradients(trainer)
    assert "forward" not in vars(trainer.model.lm_head), "the head has its own forward again"


@pytest.mark.parametrize("change", ["dropped", "set"])
def test_changed_columns_of_the_head_are_noticed(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trl_setup.make_trainer(tmp_path)
    original = trainer.model.forward

    @wraps(original)
    def forward(*arguments: Any, **named: Any) -> Any:
        outputs = original(*arguments, **named)
        if "logits" not in outputs:  # what TRL scores with
            pass
        elif change == "dropped":  # padding of the vocabulary
            outputs.logits = outputs.logits[..., : trl_setup.VOCABULARY - 3]
        else:  # tokens that cannot be generated
            outputs.logits[..., [5, 7]] = -1e9
        return outputs

    monkeypatch.setattr(trainer.model, "forward", forward)
    with pytest.raises(RuntimeError, match="set logits_tokens=None"):
        losses_and_gradients(trainer)


def test_the_gradient_of_float16_logits_does_not_underflow(tmp_path: Path) -> None:
    """As with DeepSpeed, whose loss scale comes after our forward and whose weights are float16."""
    trainer = trl_setup.make_trainer(tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    inputs = trl_setup.make_inputs(trainer)
    inputs["num_items_in_batch"] = torch.tensor(100_000)

    def gradients(loss_of: Any, scale: float, **options: Any) -> list[torch.Tensor]:
        trainer.model.zero_grad()
        (loss_of(trainer, trainer.model, inputs, **options) * scale).backward()
        return [p.grad.double() / scale for p in trainer.model.parameters()]

    def error(got: list[torch.Tensor]) -> float:
        pairs = zip(got, exact, strict=True)
        return max(((x - want).norm() / want.norm()).item() for x, want in pairs)

    theirs, ours = GRPOTrainer._compute_loss, partial(compute_cfpo_loss, objective=PPOClip())
    exact = gradients(theirs, 1.0)
    trainer.model.half()
    limit = 1.3 * error(gradients(theirs, 2.0**16))
    assert limit < 0.05 < error(gradients(theirs, 1.0)), "the scale is needed, and enough"
    for logits_tokens in (None, 4):
        with only_from(logits_tokens):
            got = gradients(ours, 2.0**16, logits_tokens=logits_tokens)
        assert error(got) <= limit

    # accelerate's way: weights in float32, float16 by autocast, and a scale that it knows.
    trainer.model.float()
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    trainer.accelerator.autocast = partial(torch.autocast, "cpu", torch.float16)
    limit = 1.3 * error(gradients(theirs, 2.0**16))
    with only_from(4):
        assert error(gradients(ours, 2.0**16, logits_tokens=4)) <= limit < 0.05
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    assert error(gradients(ours, 2.0**16, logits_tokens=4)) > 0.05, "the scale is used"


@pytest.mark.parametrize("logits_tokens", [None, 4])
@pytest.mark.parametrize("autocast", [False, True])
def test_trls_float32_head(tmp_path: Path, autocast: bool, logits_tokens: int | None) -> None:
    trainer = trl_setup.make_trainer(tmp_path, cast_lm_head_to_fp32=True, bf16=autocast)
    forward = trainer.model.lm_head.forward
    want, _ = losses_and_gradients(trainer, trl=True)
    got, _ = losses_and_gradients(trainer, logits_tokens=logits_tokens)
    assert got == pytest.approx(want, rel=1e-5)
    assert trainer.model.lm_head.forward is forward, "TRL's own is in place again"


@pytest.mark.parametrize("logits_tokens", [None, 4])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_bfloat16_model_caps_its_logits_as_precisely_as_trl(
    tmp_path: Path, autocast: bool, logits_tokens: int | None
) -> None:
    """TRL's scoring caps in float32: with the same weights every ratio has to be 1."""
    trainer = trl_setup.make_trainer(tmp_path, "softcap", bf16=autocast)
    if not autocast:
        trainer.model.bfloat16()
    forward = trainer.model.lm_head.forward
    inputs = trl_setup.make_inputs(trainer)
    trainer.current_gradient_accumulation_steps = 1
    inputs["old_per_token_logps"] = trl_setup.score(trainer, inputs)
    trainer.model.train()
    with only_from(logits_tokens):
        compute_cfpo_loss(trainer, trainer.model, inputs, logits_tokens=logits_tokens).backward()
    (largest,) = trainer._metrics["train"]["ratio/max"]
    assert largest == pytest.approx(1, abs=1e-4)
    assert trainer.model.lm_head.forward == forward


def shapes_of_logits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Grows with each call of the loss of logits."""
    shapes = []

    def spy(logits: torch.Tensor, **how: Any) -> Any:
        shapes.append(tuple(logits.shape))
        return policy_loss(logits, **how)

    monkeypatch.setattr(_trl_forward, "policy_loss", spy)
    return shapes


class Products(TorchDispatchMode):
    """The products by the head's weight or by the gradient of its logits: rows and kind of each."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):  # type: ignore[no-untyped-def]
        names = ("mm", "addmm_", "addmm", "bmm", "baddbmm")
        if function.overloadpacket.__name__ in names:
            m, k, n = (*args[-2].shape, args[-1].shape[-1])[-3:]
            if trl_setup.VOCABULARY in (m, k, n):
                self.rows.append(math.prod((m, k, n)) // trl_setup.VOCABULARY // 32)
        return function(*args, **(kwargs or {}))


# Of the 19 tokens of make_inputs, 16 at a time are two products of 16 rows, and all one of 32.
# 19 rows in two chunks of 16; the gradient of the head sums over those that there are.
PRODUCTS: dict[str, tuple[dict[str, Any], int]] = {
    "one pass": ({}, 2 * 32 + 19),
    "means of sequences, KL": ({"loss_type": "grpo", "beta": 0.3}, 2 * 32 + 19),
    "sequence ratios": ({"importance_sampling_level": "sequence"}, 3 * 32 - 16 + 19),
    "vespo": ({"loss_type": "vespo"}, 3 * 32 - 16 + 19),
    "entropy quantile": ({"top_entropy_quantile": 0.5}, 3 * 32 - 16 + 19),
    "off-policy mask": ({"off_policy_mask_threshold": 0.1}, 3 * 32 - 16 + 19),
}


@pytest.mark.parametrize("kind", ["llama", "softcap"])
@pytest.mark.parametrize("name", PRODUCTS)
def test_rows_that_are_multiplied(tmp_path: Path, name: str, kind: str) -> None:
    """Three products a token, of which none has more than asked for; four, but three of the last
    chunk, where a token's loss depends on others."""
    settings, of_chunks = PRODUCTS[name]
    trainer = trl_setup.make_trainer(tmp_path, kind, **settings)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trl_setup.make_inputs(trainer)
    inputs["advantages"][:] = torch.tensor([1.0, -1.0, 2.0, -2.0])  # no row is without a gradient
    assert inputs["completion_mask"].sum() == 19
    for logits_tokens, wanted in ((16, of_chunks), (1024, 2 * 32 + 19)):
        with Products() as products:
            loss = compute_cfpo_loss(trainer, trainer.model, inputs, logits_tokens=logits_tokens)
            loss.backward()
        assert max(products.rows) == min(logits_tokens, 32) and sum(products.rows) == wanted


def test_tokens_without_an_advantage_are_scored_and_no_more(tmp_path: Path) -> None:
    """9 of 19: one product for their entropies, three for the others."""
    trainer = trl_setup.make_trainer(tmp_path)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    inputs = trl_setup.make_inputs(trainer)
    inputs["advantages"][:] = torch.tensor([1.0, 0.0, 0.0, -2.0])
    with Products() as products:
        compute_cfpo_loss(trainer, trainer.model, inputs, logits_tokens=16).backward()
    assert sorted(products.rows) == [10, 16, 16, 16]


def test_a_compiled_model_gives_the_logits_of_completions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trl_setup.make_trainer(tmp_path)
    shapes = shapes_of_logits(monkeypatch)
    inputs = trl_setup.make_inputs(trainer)
    trainer.current_gradient_accumulation_steps = 1
    want = compute_cfpo_loss(trainer, trainer.model, inputs, logits_tokens=None)
    compiled = torch.compile(trainer.model, backend="eager")
    got = compute_cfpo_loss(trainer, compiled, inputs, logits_tokens=5)
    assert got.item() == pytest.approx(want.item(), rel=1e-5)
    assert shapes == [(4, inputs["completion_ids"].shape[1] + 1, trl_setup.VOCABULARY)] * 2


MIB = 2**20
V = 151936


@pytest.mark.skipif(not can_measure_cpu(), reason="needs /proc/self/clear_refs")
@pytest.mark.parametrize("beta", [0.0, 0.1], ids=["one pass", "two passes"])
@pytest.mark.parametrize("inplace", [True, False])
def test_memory_beyond_the_logits(tmp_path: Path, beta: float, inplace: bool) -> None:
    trainer = trl_setup.make_trainer(tmp_path, beta=beta)
    trainer.current_gradient_accumulation_steps = 1
    inputs = trl_setup.make_inputs(trainer)
    b, k = inputs["completion_ids"].shape
    # A model's logits are no leaf.
    logits = torch.randn(b, k + 1, V).requires_grad_()
    size = logits.numel() * logits.element_size()
    gradient: list[torch.Tensor] = []

    def step() -> None:
        rows = logits.view(b, k + 1, V)
        rows.register_hook(gradient.append)
        tokens = align(trainer, inputs, k + 1)
        loss_of = TokenLoss(trainer, inputs, tokens, CFPO())
        scored = loss_of(partial(policy_loss, rows, inplace=inplace, backend="cpu"))
        torch.autograd.grad(scored.loss, logits)

    extra = cpu_extra_bytes(step)
    assert (gradient[0].data_ptr() == logits.data_ptr()) is inplace
    wanted = 0 if inplace else size
    assert wanted - MIB < extra < wanted + 2 * MIB
