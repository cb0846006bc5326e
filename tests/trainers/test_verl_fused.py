"""verl's use_fused_kernels over linear_token_logps: its models, its engine, and a sharded head."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import found_by_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("verl", reason="verl is not installed: requirements/trainers-no-deps.txt")
pytest.importorskip("transformers", reason="requirements/trainers.txt")

import verl.utils.experimental.torch_functional as verl_fused
from tensordict import NonTensorData, TensorDict
from transformers import Qwen2Config, Qwen2ForCausalLM
from verl.models.transformers.monkey_patch import patch_forward_with_backends
from verl.workers.engine.fsdp import transformer_impl

from cfpo_kernels.integrations import verl as ours

V, H, T = 401, 24, 0.7
LENGTHS = (6, 3, 8)
# Two chunks of 128 rows, so that one is multiplied again in backward.
LONG = (100, 60, 40)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def in_place(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """use_fused_logprobs, undone afterwards; and the forward of the models' class."""
    for module in (*ours.REPLACEMENTS, transformer_impl):
        for replacements in ours.REPLACEMENTS.values():
            for name in replacements.keys() & vars(module).keys():
                monkeypatch.setattr(module, name, getattr(module, name))
    monkeypatch.setattr(Qwen2ForCausalLM, "forward", Qwen2ForCausalLM.forward)
    ours.use_fused_logprobs()
    yield


def make_model(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        attn_implementation="eager",
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # otherwise every p is 1/V
    return model.to(dtype)


def packed(lengths: tuple[int, ...]) -> dict[str, Tensor]:
    """Token ids as verl packs them, (1, N), and the labels that its engine rolls."""
    g = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (1, sum(lengths)), generator=g)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    return {"input_ids": ids, "position_ids": positions, "shift_labels": ids.roll(-1, 1)}


def in_float64(model: Any, given: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """log-probs and entropies of the model's own logits, (N,)."""
    inputs = {name: given[name] for name in ("input_ids", "position_ids")}
    logits = model(**inputs, use_cache=False).logits[0]
    log_p = torch.log_softmax(logits.double() / T, -1)
    chosen = log_p.gather(-1, given["shift_labels"][0][:, None])[:, 0]
    return chosen, -(log_p.exp() * log_p).sum(-1)


def weighted(log_probs: Tensor, entropy: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(2)
    of_logps, of_entropy = torch.randn(2, log_probs.numel(), generator=g).double()
    return (log_probs.flatten() * of_logps).sum() + 0.1 * (entropy.flatten() * of_entropy).sum()


def relative(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.parametrize("backend", ["torch", "triton", "liger"])
@pytest.mark.parametrize("lengths", [LENGTHS, LONG], ids=["one chunk", "two chunks"])
def test_a_model_with_fused_kernels(
    in_place: None, lengths: tuple[int, ...], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given, exact = packed(lengths), make_model(torch.float64)
    want = in_float64(exact, given)
    weighted(*want).backward()

    model = make_model()
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
    output = model(**given, temperature=T, return_dict=True, use_cache=False)
    n = sum(lengths)
    # As verl's: flat from the Triton kernels, of the tokens' shape from torch.
    shape = (n,) if backend == "triton" else (1, n)
    assert output.log_probs.shape == output.entropy.shape == shape
    for got, expected in zip((output.log_probs, output.entropy), want, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.flatten().double(), expected, rtol=1e-5, atol=1e-5)
    weighted(output.log_probs, output.entropy).backward()
    for (name, p), q in zip(model.named_parameters(), exact.parameters(), strict=True):
        if not name.endswith("k_proj.bias"):  # softmax does not see it: its gradient is rounding
            assert relative(p.grad, q.grad) < 2e-5, name


def test_bfloat16_models_get_float32_log_probs_as_exact_as_verls(in_place: None) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(n, 16, generator=g).bfloat16() for n in (512, V))
    ids = torch.randint(0, V, (512,), generator=g)
    given = {"input_ids": ids, "temperature": 2.0}
    wide = [x.double().requires_grad_() for x in (hidden, weight)]
    log_p = torch.log_softmax(wide[0] @ wide[1].T / 2.0, -1)
    want = log_p.gather(-1, ids[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    weighted(*want).backward()

    def errors(module: Any) -> list[float]:
        leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
        got = module.forward(leaves[0], leaves[1], **given)
        assert got[0].dtype == torch.float32
        weighted(*got).backward()
        found = [*got, *(leaf.grad for leaf in leaves)]
        exact = [*want, *(x.grad for x in wide)]
        return [relative(x.detach(), y.detach()) for x, y in zip(found, exact, strict=True)]

    theirs = errors(verl_fused.FusedLinearForPPO.__bases__[0](chunk_size=16))
    of_ours = errors(verl_fused.FusedLinearForPPO(chunk_size=16))
    assert verl_fused.FusedLinearForPPO is ours.FusedLinearForPPO
    # verl sums the weight's gradient in bfloat16.
    assert of_ours[3] < 0.8 * theirs[3] and of_ours[2] < 1.1 * theirs[2]


class Products(TorchDispatchMode):
    """Counts products of which one side is the vocabulary, in rows of 128."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, ...]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.overloadpacket.__name__ in ("mm", "addmm", "addmm_"):
            sizes = (*args[-2].shape, args[-1].shape[-1])
            if V in sizes:
                self.found.append(tuple(sorted(sizes)))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("frozen", [False, True])
def test_a_frozen_head_has_no_gradient(in_place: None, frozen: bool) -> None:
    """Of 256 rows: forward twice 128, backward the first 128 again, then one or two gradients."""
    model = make_model()
    model.lm_head.weight.requires_grad_(not frozen)
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    with Products() as products:
        output = model(**packed(LONG), temperature=T, return_dict=True, use_cache=False)
        output.log_probs.sum().backward()
    # The gradient of the head sums over the rows that there are: 72 of the second chunk.
    head = [] if frozen else [(H, 128, V), (H, 72, V)]
    assert sorted(products.found) == sorted([(H, 128, V)] * 5 + head)
    assert (model.lm_head.weight.grad is None) is frozen


def test_entropies_for_the_log(in_place: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a frozen head two products, as without entropies; a loss of them is refused."""
    monkeypatch.setattr(ours, "_entropy_grad", True)  # and back afterwards
    ours.use_fused_logprobs(entropy_grad=False)
    model = make_model()
    model.lm_head.weight.requires_grad_(False)
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend="torch")
    for coefficient in (None, 0.0, 0.1):  # verl's loss has no entropies, or these times that
        with Products() as products:
            output = model(**packed(LONG), temperature=T, return_dict=True, use_cache=False)
            loss = output.log_probs.sum()
            if coefficient is not None:
                loss = loss - coefficient * output.entropy.mean()
            if coefficient:
                with pytest.raises(RuntimeError, match=r"actor\.entropy_coeff to 0"):
                    loss.backward()
            else:
                loss.backward()
        assert output.entropy.gt(0).any() and products.found == [(H, 128, V)] * 4


class NoLooking(TorchDispatchMode):
    """Refuses what would wait for a device."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), kw: Any = None):
        assert "_local_scalar_dense" not in str(function) and "is_nonzero" not in str(function)
        return function(*arguments, **(kw or {}))


@pytest.mark.parametrize("coefficient", [0.0, 0.1])
def test_entropies_for_the_log_wait_for_no_device(
    coefficient: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the numbers may not be looked at, NaN says what the error would."""
    monkeypatch.setattr(ours, "_entropy_grad", False)
    hidden = torch.randn(3, H, requires_grad=True)
    logps, entropy = ours._fused(hidden, torch.randn(V, H), torch.tensor([1, 2, 3]))
    loss = logps.sum() - coefficient * entropy.mean()
    monkeypatch.setattr(ours.values, "can_be_checked", lambda _: False)
    with NoLooking():
        loss.backward()
    assert hidden.grad is not None
    assert hidden.grad.isnan().all() if coefficient else hidden.grad.isfinite().all()


def test_an_unknown_reduction_is_refused() -> None:
    with pytest.raises(ValueError, match="reduction must be 'none', got 'mean'"):
        ours.linear_cross_entropy(
            torch.randn(2, H), torch.randn(V, H), torch.tensor([1, 2]), 1.0, "mean"
        )


def batch_of_the_engine(lengths: tuple[int, ...], ids: Tensor) -> TensorDict:
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    nested = torch.nested.nested_tensor_from_jagged(ids, offsets)
    positions = torch.cat([torch.arange(n) for n in lengths])
    settings = {"use_remove_padding": True, "use_fused_kernels": True, "calculate_entropy": True}
    return TensorDict(
        {
            "input_ids": nested,
            "position_ids": torch.nested.nested_tensor_from_jagged(positions, offsets),
            "temperature": NonTensorData(T),
            **{name: NonTensorData(value) for name, value in settings.items()},
        },
        batch_size=[len(lengths)],
    )


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_verls_engine_takes_what_the_model_returns(in_place: None, backend: str) -> None:
    """From its inputs, whose labels it rolls, to log-probs of each sequence."""
    engine_class = transformer_impl.FSDPEngineWithLMHead
    given, model = packed(LENGTHS), make_model()
    wanted = in_float64(make_model(torch.float64), given)
    patch_forward_with_backends(model, use_fused_kernels=True, fused_kernels_backend=backend)
    engine = SimpleNamespace(
        use_ulysses_sp=False,
        pass_packed_cu_seqlens=False,
        pad_to_length=None,
        _get_packed_pad_size=lambda n: 0,
        _gather_and_unpad_packed=lambda x, pad_size: x,
    )
    data = batch_of_the_engine(LENGTHS, given["input_ids"][0])
    inputs, arguments = engine_class.prepare_model_inputs(engine, data)
    assert torch.equal(inputs["shift_labels"], given["shift_labels"])
    inputs.pop("attention_mask", None)
    output = model(**inputs, use_cache=False)
    found = engine_class.prepare_model_outputs(engine, output, arguments, data, None)
    for name, want in zip(("log_probs", "entropy"), wanted, strict=True):
        assert found[name].offsets().tolist() == [0, 6, 9, 17]
        torch.testing.assert_close(found[name].values().double(), want, rtol=1e-5, atol=1e-5)


def sharded_case() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    return {
        "hidden": torch.randn(10, 1, H, generator=g),  # Megatron's (S, B, H)
        "weight": torch.randn(2 * V, H, generator=g),
        "labels": torch.randint(0, 2 * V, (1, 10), generator=g),
    }


def part_of_a_head(rank: int) -> list[Tensor]:
    case, gathers = sharded_case(), []
    hidden = case["hidden"].requires_grad_()
    weight = case["weight"][rank * V : (rank + 1) * V].clone().requires_grad_()
    found = ours.linear_cross_entropy(hidden, weight, case["labels"], T, "none", dist.group.WORLD)
    weighted(*found).backward()
    original = dist.all_gather
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_gather", lambda *a, **k: gathers.append(a) or original(*a, **k))
        ours.linear_cross_entropy(hidden, weight, case["labels"], T, "none", dist.group.WORLD)
    assert len(gathers) == 1, "the tile's alone: which part each process has is known"
    return [*(x.detach() for x in found), hidden.grad, weight.grad]


def test_megatrons_parts_of_a_head() -> None:
    """The parts of hidden's gradient are summed by Megatron, as after verl's kernels."""
    first, second = found_by_ranks(part_of_a_head, n=2)
    case = sharded_case()
    hidden, weight = (case[name].double().requires_grad_() for name in ("hidden", "weight"))
    log_p = torch.log_softmax(hidden[:, 0] @ weight.T / T, -1)
    want = log_p.gather(-1, case["labels"][0][:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)
    weighted(*want).backward()
    for i in range(2):
        assert torch.equal(first[i], second[i])
        torch.testing.assert_close(first[i].double(), want[i].detach(), rtol=1e-5, atol=1e-5)
    assert relative(first[2] + second[2], hidden.grad) < 1e-5
    assert relative(torch.cat([first[3], second[3]]), weight.grad) < 1e-5
