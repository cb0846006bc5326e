"""CFPO in every worker of OpenRLHF, by one line of configuration: a setup hook of Ray.

::

    ray job submit --runtime-env-json \\
      '{"worker_process_setup_hook": "cfpo_kernels.integrations.openrlhf_ray.setup"}' \\
      -- python3 -m openrlhf.cli.train_ppo_ray ...
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

PATCHED = "openrlhf.models"


def setup() -> None:
    """Calls :func:`.openrlhf.use_cfpo` once this process has imported ``openrlhf.models``.

    Not before: OpenRLHF keeps its models, and with them deepspeed, out of vLLM's workers.
    """
    if PATCHED in sys.modules:
        _patch()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _patch() -> None:
    from .openrlhf import use_cfpo

    use_cfpo()


class _AfterImport(MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != PATCHED:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenPatch(spec.loader)
        return spec


class _ThenPatch(Loader):
    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _patch()
