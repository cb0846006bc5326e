"""Bad input: an error that names the argument, before anything is written."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import cfpo_kernels
from cfpo_kernels import BackendUnavailableError

N, V = 6, 10


def arguments(**changes: Any) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    made = {
        "logits": torch.randn(N, V, generator=g),
        "token_ids": torch.arange(N),
        "advantages": torch.randn(N, generator=g),
        "old_logps": torch.full((N,), -2.0),
    }
    return made | changes


def floats(*shape: int) -> torch.Tensor:
    return torch.ones(shape)


CASES: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    # argument, what is given, error, what the message must contain
    ("logits", {"logits": [[1.0]]}, TypeError, "list"),
    ("logits", {"logits": torch.ones(N, V, dtype=torch.int64)}, TypeError, "torch.int64"),
    ("logits", {"logits": torch.ones(N, V, dtype=torch.float64)}, TypeError, "reference"),
    ("logits", {"logits": torch.tensor(1.0)}, ValueError, r"\(\)"),
    ("logits", {"logits": torch.ones(N, 0)}, ValueError, r"\(6, 0\)"),
    ("logits", {"logits": torch.ones(V, N).t()}, ValueError, "stride"),
    ("token_ids", {"token_ids": torch.zeros(N)}, TypeError, "float32"),
    ("token_ids", {"token_ids": None}, TypeError, "NoneType"),
    ("token_ids", {"token_ids": torch.zeros(N + 1, dtype=torch.int64)}, ValueError, r"\(7,\)"),
    ("token_ids", {"token_ids": torch.tensor([0, 1, 2, V, 4, 5])}, IndexError, r"10 at \[3\]"),
    ("token_ids", {"token_ids": torch.tensor([0, 1, -1, 3, 4, 5])}, IndexError, r"-1 at \[2\]"),
    (
        "token_ids",
        {"token_ids": torch.zeros(N, dtype=torch.int64, device="meta")},
        ValueError,
        "meta",
    ),
    ("advantages", {"advantages": floats(N - 1)}, ValueError, r"\(5,\)"),
    ("advantages", {"advantages": torch.ones(N, dtype=torch.int32)}, TypeError, "int32"),
    ("advantages", {"advantages": 1.0}, TypeError, "float"),
    ("old_logps", {"old_logps": floats(N, 1)}, ValueError, r"\(6, 1\)"),
    ("old_logps", {"old_logps": torch.ones(N, dtype=torch.bool)}, TypeError, "bool"),
    ("mask", {"mask": torch.ones(N + 1)}, ValueError, r"\(7,\)"),
    ("mask", {"mask": True}, TypeError, "bool"),
    ("epsilon", {"epsilon": 0.0}, ValueError, "0.0"),
    ("epsilon", {"epsilon": -0.2}, ValueError, "-0.2"),
    ("epsilon", {"epsilon": "big"}, TypeError, "str"),
    ("temperature", {"temperature": 0.0}, ValueError, "0.0"),
    ("temperature", {"temperature": math.nan}, ValueError, "nan"),
    ("temperature", {"temperature": "hot"}, TypeError, "str"),
    ("temperature", {"temperature": 1e39}, ValueError, "1e[+]39"),
    ("temperature", {"temperature": torch.tensor(1e-39)}, ValueError, "1e-06"),
    ("temperature", {"temperature": 1e-10}, ValueError, "1e-06 to 1e[+]30, got 1e-10"),
    ("temperature", {"temperature": floats(N + 1)}, ValueError, r"\(7,\)"),
    (
        "temperature",
        {"temperature": torch.tensor([1.0, 1, 1, 1, -0.5, 1])},
        ValueError,
        r"-0.5 at \[4\]",
    ),
    ("reduction", {"reduction": "mean"}, ValueError, "token-mean"),
    ("reduction", {"reduction": None}, TypeError, "NoneType"),
    ("reduction", {"reduction": "seq-mean-token-sum"}, ValueError, "cu_seqlens"),
    ("normalizer", {"normalizer": 0.0}, ValueError, "0.0"),
    ("normalizer", {"normalizer": floats(2)}, ValueError, r"\(2,\)"),
    ("normalizer", {"normalizer": "all"}, TypeError, "str"),
    ("normalizer", {"normalizer": torch.tensor(-1.0)}, ValueError, "-1.0"),
    ("normalizer", {"normalizer": 1e46}, ValueError, "1e[+]46"),
    ("grad_scale", {"grad_scale": torch.tensor(0.0)}, ValueError, "0.0"),
    ("grad_scale", {"grad_scale": 1e-46}, ValueError, "1e-46"),
    ("inplace", {"inplace": "no"}, TypeError, "str"),
    ("return_stats", {"return_stats": 1}, TypeError, "int"),
    ("logits", {"logits": torch.ones(N, V).to_sparse()}, TypeError, "sparse"),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 3])}, ValueError, "6"),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([1, 6])}, ValueError, r"\[1, 6\]"),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 4, 2, 6])}, ValueError, "rise"),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0.0, 6.0])}, TypeError, "float32"),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0])}, ValueError, r"\(1,\)"),
    ("token_weights", {"token_weights": floats(1)}, ValueError, r"\(1,\)"),
    ("ref_logps", {"kl_coef": 0.1}, ValueError, "kl_coef=0.1"),
    ("ref_logps", {"kl_coef": 0.1, "ref_logps": floats(2)}, ValueError, r"\(2,\)"),
    ("kl_coef", {"kl_coef": math.inf}, ValueError, "inf"),
    ("kl_coef", {"kl_coef": "x"}, TypeError, "str"),
    ("kl_estimator", {"kl_estimator": "k4"}, ValueError, "k4"),
    ("entropy_coef", {"entropy_coef": math.nan}, ValueError, "nan"),
    ("grad_scale", {"grad_scale": 0.0}, ValueError, "0.0"),
    ("grad_scale", {"grad_scale": floats(2)}, ValueError, r"\(2,\)"),
    ("backend", {"backend": "gpu"}, ValueError, "gpu"),
    ("inplace", {"inplace": True, "backend": "reference"}, ValueError, "reference"),
    ("inplace", {"inplace": True, "logits": torch.ones(1, V).expand(N, V)}, ValueError, "stride"),
    ("inplace", {"inplace": True, "logits": torch.ones(40).unfold(0, V, 6)}, ValueError, "overlap"),
]


@pytest.mark.parametrize(
    ("name", "changes", "error", "message"),
    CASES,
    ids=[f"{case[0]}-{i}" for i, case in enumerate(CASES)],
)
def test_refused(name: str, changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = arguments(**changes)
    logits = given["logits"]
    before = logits.to_dense().clone() if isinstance(logits, torch.Tensor) else None
    if isinstance(logits, torch.Tensor) and logits.is_floating_point():
        logits.requires_grad_()
    with pytest.raises(error, match=message) as caught:
        cfpo_kernels.cfpo_loss(**({"inplace": "backend" not in changes} | given))
    assert name in str(caught.value)
    if before is not None:
        assert torch.equal(logits.detach().to_dense(), before), (
            "something was written before the refusal"
        )


def test_advantages_of_a_batch_name_all_accepted_shapes() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(2,\) or \(2, 1\).*got \(3,\)"):
        cfpo_kernels.cfpo_loss(
            torch.randn(2, 3, V), torch.zeros(2, 3, dtype=torch.int64), torch.ones(3)
        )


def test_position_of_a_bad_token_in_a_batch() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    ids[1, 2] = 77
    with pytest.raises(IndexError, match=r"77 at \[1, 2\]"):
        cfpo_kernels.token_logps(torch.randn(2, 3, V), ids)


def test_operators_check_tokens_themselves() -> None:
    """Compiled code skips the checks of values; a wrong id must still not be read through."""
    torch._dynamo.reset()
    compiled = torch.compile(cfpo_kernels.token_logps, backend="eager", fullgraph=True)
    for wrong in (-100, V, 2_000_000_000):
        with pytest.raises(IndexError, match=r"at \[1\]"):
            compiled(torch.randn(2, V), torch.tensor([1, wrong]))


def test_forward_mode_is_refused() -> None:
    given = arguments()
    with torch.autograd.forward_ad.dual_level():
        given["logits"] = torch.autograd.forward_ad.make_dual(given["logits"], torch.ones(N, V))
        with pytest.raises(RuntimeError, match="forward-mode"):
            cfpo_kernels.cfpo_loss(**given)


def test_the_module_refuses_at_construction() -> None:
    for setting in ({"reduction": "bogus"}, {"backend": "gpu"}, {"kl_estimator": "k9"}):
        with pytest.raises(ValueError, match=next(iter(setting))):
            cfpo_kernels.CFPOLoss(**setting)


def test_objective_must_be_an_objective() -> None:
    with pytest.raises(TypeError, match=r"objective.*str"):
        cfpo_kernels.policy_loss(**arguments(), objective="cfpo")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_an_explicit_backend_never_falls_back(name: str) -> None:
    status = cfpo_kernels.available_backends()[name]
    assert status.detail
    if status:
        pytest.skip(f"{name} is available here")
    with pytest.raises(BackendUnavailableError, match=name) as caught:
        cfpo_kernels.cfpo_loss(**arguments(), backend=name)
    assert status.detail in str(caught.value)


def test_cpu_backend_refuses_other_devices() -> None:
    made = {name: x.to("meta") for name, x in arguments().items()}
    with pytest.raises(BackendUnavailableError, match="meta"):
        cfpo_kernels.cfpo_loss(**made, backend="cpu")


def test_unknown_level(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFPO_KERNELS_CPU_LEVEL", "mmx")
    with pytest.raises(ValueError, match=r"mmx.*baseline"):
        cfpo_kernels.cfpo_loss(**arguments())


def test_reference_gives_nan_for_an_unknown_token_where_it_may_not_look(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a GPU does, where ids cannot be checked without a synchronisation."""
    monkeypatch.setattr("cfpo_kernels.validation.values.can_be_checked", lambda tensor: False)
    given = arguments(token_ids=torch.tensor([0, 1, 2, V, -1, 5]))
    loss = cfpo_kernels.cfpo_loss(**given, backend="reference", reduction="none")
    assert loss.isnan().tolist() == [False, False, False, True, True, False]


def test_available_backends_tells_what_and_why() -> None:
    backends = cfpo_kernels.available_backends()
    assert set(backends) == {"cuda", "triton", "cpu", "reference"}
    assert backends["cpu"] and "baseline" in backends["cpu"].detail
    assert backends["reference"]
