"""Python imports this at the start of every process that a test starts (conftest.py puts it on PYTHONPATH).

Tracing then looks into the store of traces, as it does in the tests' own process.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

_TRACE = "variator_export.graph.trace"


class _WithStore(importlib.abc.MetaPathFinder):
    """Finds the module that traces and wraps its function once the module is loaded."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        del path, target
        if name != _TRACE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def load_and_wrap(module: ModuleType) -> None:
            load(module)
            sys.path.append(str(Path(__file__).parent.parent))
            from stored_traces import stored

            module.trace = stored(module.trace)  # type: ignore[attr-defined]

        spec.loader.exec_module = load_and_wrap  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, _WithStore())
