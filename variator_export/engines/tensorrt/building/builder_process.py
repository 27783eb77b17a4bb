"""Builder process: builds one engine in a process of its own.

A crash of the builder does not end the build, and Ctrl-C ends the builder at once. Two builds of one request
may differ in a few bytes: builders promise none, and some order their output by memory addresses.

`python -m variator_export.engines.tensorrt.building.builder_process` reads the request as JSON from standard
input, and writes a line of facts as JSON and then the engine to standard output. Progress goes to the file
descriptor VARIATOR_EXPORT_PROGRESS. The process writes only the timing cache to disk, so a builder whose
parent was killed leaves nothing behind.
"""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from variator_export.core.errors import UserError
from variator_export.engines.request import BuiltEngine, EngineRequest
from variator_export.engines.target import OnProgress
from variator_export.engines.tensorrt.building.builder import build_engine_here

_REFUSED = 1
_PROGRESS = "VARIATOR_EXPORT_PROGRESS"
# Variables of the caller's environment that a builder may need.
_ENVIRONMENT = (
    "PYTHONPATH",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "HOME",
    "TMPDIR",
)


def build_engine(request: EngineRequest, folder: Path, on_progress: OnProgress | None = None) -> BuiltEngine:
    """Build an engine. No GPU is needed for TensorRT for RTX.

    Args:
        request: The engine to build.
        folder: The folder with the graph and its external data.
        on_progress: Called with the phase, the completed steps and the total steps.

    Returns:
        The engine.

    Raises:
        UserError: The parser or the builder refuses or crashes. The message quotes them.
    """
    reader, writer = os.pipe()
    process = subprocess.Popen(
        _command(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=(writer,),
        cwd=folder,  # the graph's name is relative to it
        env=_environment(writer),
    )
    os.close(writer)
    listener = threading.Thread(target=_listen, args=(reader, on_progress), daemon=True)
    listener.start()
    try:
        output, errors = process.communicate(request.model_dump_json().encode())
    except BaseException:  # including Ctrl-C
        process.kill()
        process.wait()
        raise
    listener.join()
    if process.returncode == 0:
        facts, _, content = output.partition(b"\n")
        return BuiltEngine(content, **json.loads(facts))
    words = errors.decode(errors="replace").strip()
    if process.returncode == _REFUSED and words:
        try:
            refused = json.loads(words.splitlines()[-1])
            raise UserError(refused["message"], refused["hint"])
        except (ValueError, KeyError, TypeError):
            pass  # not a refusal written by this package: show it unchanged
    ending = (
        f"was ended by {signal.Signals(-process.returncode).name}"
        if process.returncode < 0
        else f"ended with code {process.returncode}"
    )
    raise UserError(
        f"The {request.target} builder {ending} while it built {request.what}. Its last words:\n"
        f"  {words[-2000:] or 'none'}",
        "Check free memory. Other targets and engines are not affected.",
    )


def _listen(reader: int, on_progress: OnProgress | None) -> None:
    with os.fdopen(reader) as lines:
        for line in lines:
            if on_progress is not None:
                phase, step, steps = json.loads(line)
                on_progress(phase, step, steps)


def _environment(progress: int) -> dict[str, str]:
    """The environment of the builder."""
    chosen = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    return {**chosen, _PROGRESS: str(progress)}


def _command() -> list[str]:
    return [sys.executable, "-P", "-m", "variator_export.engines.tensorrt.building.builder_process"]


def main() -> None:
    """Build the engine requested on standard input."""
    # Output of native code goes to stderr; stdout is reserved for the engine.
    engine_out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    request = EngineRequest.model_validate_json(sys.stdin.buffer.read())
    with os.fdopen(int(os.environ[_PROGRESS]), "w", buffering=1) as progress:

        def tell(*done: object) -> None:
            print(json.dumps(done), file=progress)

        try:
            engine = build_engine_here(request, tell)
        except UserError as error:
            print(json.dumps({"message": error.message, "hint": error.hint}), file=sys.stderr)
            sys.exit(_REFUSED)
    with engine_out:
        engine_out.write(json.dumps({"attention": engine.attention}).encode() + b"\n" + engine.content)


if __name__ == "__main__":
    main()
