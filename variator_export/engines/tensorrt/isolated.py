"""Building an engine in a process of its own.

A builder that crashes does not take the build with it; Ctrl-C ends it at once; and equal inputs give equal
bytes. TensorRT for RTX orders some of what it writes by memory addresses: the second engine of a process
differs from the first of another, and two processes differ unless their address space is not randomised.
Where the system forbids that (some containers), engines are as good, but their bytes may differ.

`python -m variator_export.engines.tensorrt.isolated` takes the request as JSON on standard input and gives
the engine on standard output. It writes nothing to disk: a builder whose parent was killed leaves nothing.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from variator_export.core.errors import UserError
from variator_export.engines.tensorrt.build import Shape, build_engine_here

_REFUSED = 1
_QUERY, _ADDR_NO_RANDOMIZE = 0xFFFFFFFF, 0x0040000
_FIXED = "VARIATOR_EXPORT_FIXED_ADDRESSES"
# What a builder may need of the caller's environment.
_ENVIRONMENT = ("PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "HOME")


def build_engine(target: str, graph: Path, profile: Mapping[str, tuple[Shape, Shape, Shape]]) -> bytes:
    """Build an engine. No GPU is needed for TensorRT for RTX.

    Args:
        target: `tensorrt-rtx` or `tensorrt`.
        graph: The ONNX file; external data is read from its folder.
        profile: (min, opt, max) shapes (batch_size, sequence_length) of every input.

    Returns:
        The serialized engine.

    Raises:
        UserError: The parser or the builder refuses, or crashes; the message has their own words.
    """
    request = json.dumps({"target": target, "graph": graph.name, "profile": profile})
    result = subprocess.run(
        _command(),
        input=request.encode(),
        capture_output=True,
        check=False,
        # The lengths of names and of the environment would shift memory too.
        cwd=graph.parent,
        env={name: os.environ[name] for name in _ENVIRONMENT if name in os.environ} | {"PYTHONHASHSEED": "0"},
    )
    if result.returncode == 0:
        return result.stdout
    words = result.stderr.decode(errors="replace").strip()
    if result.returncode == _REFUSED and words:
        try:
            refused = json.loads(words.splitlines()[-1])
            raise UserError(refused["message"], refused["hint"])
        except (ValueError, KeyError, TypeError):
            pass  # not a refusal of ours: show it as it is
    ending = (
        f"was ended by {signal.Signals(-result.returncode).name}"
        if result.returncode < 0
        else f"ended with code {result.returncode}"
    )
    raise UserError(
        f"The {target} builder {ending} while it built {graph.name}. Its last words:\n"
        f"  {words[-2000:] or 'none'}",
        "Check free memory; other targets are not affected: leave this one out with --target onnxruntime.",
    )


def _command() -> list[str]:
    return [sys.executable, "-P", "-m", "variator_export.engines.tensorrt.isolated"]


def _fix_addresses() -> None:
    """Start this process again with the same memory addresses in every run (Linux personality(2))."""
    if _FIXED in os.environ or not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(None)
    current = libc.personality(_QUERY)
    if current != -1 and libc.personality(current | _ADDR_NO_RANDOMIZE) != -1:
        os.execve(sys.executable, _command(), {**os.environ, _FIXED: "1"})


def main() -> None:
    """Build what is asked for on standard input."""
    _fix_addresses()
    # Whatever native code prints goes to stderr; stdout is for the engine.
    engine_out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    request = json.load(sys.stdin)
    profile: dict[str, Any] = {
        name: tuple(tuple(shape) for shape in shapes) for name, shapes in request["profile"].items()
    }
    try:
        engine = build_engine_here(request["target"], Path(request["graph"]), profile)
    except UserError as error:
        print(json.dumps({"message": error.message, "hint": error.hint}), file=sys.stderr)
        sys.exit(_REFUSED)
    with engine_out:
        engine_out.write(engine)


if __name__ == "__main__":
    main()
