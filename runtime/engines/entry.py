"""What an engine calls at its start: entry points `vllm.general_plugins` and `sglang.srt.plugins`.

Without SEMMOE_PLAN and SEMMOE_RECORD nothing more is imported, and nothing is done but to wait for
`--load-format semmoe`, which may name its plan itself.
"""

import os
import sys
from collections.abc import Callable
from typing import Any

from semmoe.runtime.engines.variables import LOAD_FORMAT, PLAN, RECORD

LOADERS = "vllm.model_executor.model_loader"


def vllm() -> None:
    """In every process of vLLM. Raises only with SEMMOE_STRICT=1."""
    _when_imported(LOADERS, _add_loader)
    if os.environ.get(PLAN) or os.environ.get(RECORD):
        from semmoe.runtime.engines.vllm_hooks import install

        install(os.environ)


def sglang() -> None:
    """In every process of SGLang. Raises only with SEMMOE_STRICT=1."""
    if os.environ.get(PLAN):
        from semmoe.runtime.engines.sglang_hooks import install

        install(os.environ)


def _add_loader(module: Any) -> None:
    """Make `--load-format semmoe` known. Not by vLLM's own function: it writes a line to the log,
    and most servers never ask for the format."""
    module._LOAD_FORMAT_TO_MODEL_LOADER.setdefault(LOAD_FORMAT, _load_with_a_plan)


def _load_with_a_plan(load_config: Any) -> Any:
    """The loader, as vLLM calls a class."""
    from semmoe.runtime.engines.vllm_loader import PlacedModelLoader

    return PlacedModelLoader(load_config)


class _Waiting:
    """A finder of modules that finds none: it runs `then` when `name` has been imported."""

    def __init__(self, name: str, then: Callable[[Any], None]) -> None:
        self.name, self.then = name, then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != self.name:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)  # pyright: ignore
        spec = find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def run(module: Any) -> None:
            execute(module)
            self.then(module)

        spec.loader.exec_module = run  # pyright: ignore
        return spec


def _when_imported(name: str, then: Callable[[Any], None]) -> None:
    """Run `then` on a module now, or when somebody imports it."""
    if name in sys.modules:
        then(sys.modules[name])
    elif not any(isinstance(finder, _Waiting) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting(name, then))  # pyright: ignore
