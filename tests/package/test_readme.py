"""The README's snippets in Python run as they stand there, each with what SETUPS gives its heading.

TRL's are run by test_trl_example.py.
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from repository import ROOT

import cfpo_kernels

README = ROOT / "README.md"


def snippets() -> list[tuple[str, str, str]]:
    """(heading, language, text) of each fenced snippet that names its language."""
    found = []
    for part in re.split(r"\n##+ ", README.read_text())[1:]:
        heading = part.splitlines()[0]
        fences = re.findall(r"^```(\w+)\n(.*?)^```$", part, re.DOTALL | re.MULTILINE)
        found += [(heading, language, text) for language, text in fences]
    return found


def tokens(b: int = 3, t: int = 5, v: int = 30) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(b, t, v, generator=g, requires_grad=True)
    token_ids = torch.randint(0, v, (b, t), generator=g)
    logps = torch.log_softmax(logits.detach(), -1).gather(-1, token_ids[..., None])[..., 0]
    return {
        "logits": logits,
        "token_ids": token_ids,
        "old_logps": logps - 0.1 * torch.randn(b, t, generator=g),
        "advantages": torch.randn(b, t, generator=g),
        "mask": torch.arange(t) < torch.tensor([5, 2, 4])[:, None],
    }


def openrlhf() -> dict[str, Any]:
    pytest.importorskip("openrlhf_import").import_openrlhf()
    made = tokens()
    return {
        "log_probs": made["old_logps"].clone().requires_grad_(),
        "old_log_probs": made["old_logps"],
        "advantages": made["advantages"],
        "action_mask": made["mask"].float(),
    }


def packed_model() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=30, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    made = tokens()
    mask = made["mask"]
    keep = torch.zeros(3, 6, dtype=torch.bool)
    keep[:, :-1] = mask
    return {
        "model": transformers.LlamaForCausalLM(config),
        "input_ids": torch.cat([torch.ones(3, 1, dtype=torch.int64), made["token_ids"]], 1),
        "attention_mask": torch.ones(3, 6),
        "keep": keep,
        "cu_seqlens": torch.nn.functional.pad(mask.sum(1).cumsum(0), (1, 0)),
        **{name: made[name][mask] for name in ("token_ids", "advantages", "old_logps")},
    }


def logits_and_hidden() -> dict[str, Any]:
    """For both snippets under the heading: of one batch, which the first one's logits are of."""
    made = tokens()
    head = torch.nn.Linear(8, 30, bias=False)
    hidden = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)

    def model(input_ids: None) -> Any:
        return SimpleNamespace(logits=head(hidden.detach()))

    given = {"cfpo_kernels": cfpo_kernels, "model": model, "lm_head": head, "hidden": hidden}
    return made | given | {"input_ids": None, "advantages": made["advantages"][:, 0]}


SETUPS: dict[str, Callable[[], dict[str, Any]]] = {
    "Use": logits_and_hidden,
    "OpenRLHF": openrlhf,
    "transformers": packed_model,
    "Your own loop": tokens,
}


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meeting-point", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("heading", "text"),
    [(h, text) for h, language, text in snippets() if language == "python" and h != "TRL"],
)
def test_python_snippets(heading: str, text: str, one_process: None) -> None:
    assert heading in SETUPS, f"tell SETUPS what the snippet under {heading!r} needs"
    namespace = SETUPS[heading]()
    exec(compile(text, str(README), "exec"), namespace)
    assert namespace["loss"].isfinite() and namespace["loss"] != 0
    if ".backward()" not in text:
        namespace["loss"].backward()


def shell_words(heading: str) -> list[str]:
    (text,) = (text for h, language, text in snippets() if (h, language) == (heading, "sh"))
    return shlex.split(text.replace("\\\n", " "))


def test_the_configuration_of_verl() -> None:
    pytest.importorskip("verl")
    import verl.trainer.config
    from omegaconf import OmegaConf
    from verl.trainer.ppo.core_algos import get_policy_loss_fn

    words = shell_words("verl")
    assert words[:3] == ["python3", "-m", "verl.trainer.main_ppo"] and len(words) == 6
    folder = Path(verl.trainer.config.__file__).parent
    config = OmegaConf.load(folder / "_generated_ppo_trainer.yaml")
    OmegaConf.set_struct(config, True)  # as hydra does: a key that verl has not is refused
    with pytest.raises(Exception, match="clip_range"):
        OmegaConf.update(config, "actor_rollout_ref.actor.clip_range", 0.2)
    for word in words[3:]:
        OmegaConf.update(config, *word.split("=", 1))
    actor = config.actor_rollout_ref.actor
    loss = get_policy_loss_fn(actor.policy_loss.loss_mode)
    assert loss.__module__ == "cfpo_kernels.integrations.verl"
    assert importlib.util.find_spec(config.actor_rollout_ref.model.external_lib) is not None


def test_the_configuration_of_openrlhf() -> None:
    words = shell_words("OpenRLHF")
    hook = json.loads(words[words.index("--runtime-env-json") + 1])["worker_process_setup_hook"]
    module, function = hook.rsplit(".", 1)
    assert callable(getattr(importlib.import_module(module), function))


def test_every_snippet_is_run() -> None:
    found = [(heading, language) for heading, language, _ in snippets()]
    assert found.count(("verl", "sh")) == found.count(("OpenRLHF", "sh")) == 1
    assert {language for _, language in found} == {"python", "sh"}
    assert set(SETUPS) | {"TRL"} == {heading for heading, language in found if language == "python"}
