"""A build in a process of its own that says which step it is in, to be interrupted from outside.

Preloaded once by a fork server, so that an attempt costs no imports.
"""

import os
import signal
import sys
from multiprocessing.connection import Connection

import onnx_ir  # noqa: F401
import onnxruntime  # noqa: F401
import onnxscript  # noqa: F401
import torch
import transformers  # noqa: F401

import variator_export.cli.main as cli
from variator_export.building.steps import speed as measuring
from variator_export.bundle import publishing as store
from variator_export.cli.output import ConsoleProgress


def run(arguments: list[str], connection: Connection, slow_trace: bool) -> None:
    """Run the command line; announce each step before it starts.

    Args:
        arguments: What follows `variator-export`.
        connection: Receives the name of each step.
        slow_trace: Trace, whatever the store of traces has, so that there is time to interrupt it.
    """
    if slow_trace:
        sys.meta_path[:] = [finder for finder in sys.meta_path if type(finder).__module__ != "sitecustomize"]
    os.setpgrp()
    torch.set_num_threads(1)  # as in conftest.py: the last bits of the stored reference depend on it
    # A shell starts what it puts into the background with Ctrl-C ignored, and tests may run there.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stderr = sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    real_publish, real_measure = store.publish, measuring.store_report

    def announce(_: ConsoleProgress, name: str, why: str) -> None:
        del why
        connection.send(name)

    ConsoleProgress.started = announce  # type: ignore[method-assign]

    def announced_publish(*args: object) -> None:
        connection.send("publish")
        real_publish(*args)  # type: ignore[arg-type]

    def announced_measure(*args: object) -> None:
        connection.send("report speed")
        real_measure(*args)  # type: ignore[arg-type]

    import variator_export.building.staging as staged

    staged.publish = announced_publish  # type: ignore[assignment]
    measuring.store_report = announced_measure  # type: ignore[assignment]
    sys.argv[1:] = arguments
    cli.main()
