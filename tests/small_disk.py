"""A real small or read-only file system, in a mount namespace of its own; needs no root where user
namespaces are allowed."""

import subprocess
import sys
from pathlib import Path

import pytest


def run_on_small_disk(script: str, mount: Path, *, size: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in which `$DISK` is an empty file system of this size.

    `python` in it is this Python.
    """
    mount.mkdir(parents=True, exist_ok=True)
    prologue = f"mount -t tmpfs -o size={size} none '{mount}' && export DISK='{mount}' && "
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", prologue + script]
    probe = subprocess.run([*command[:4], "-c", prologue + "true"], capture_output=True, text=True)
    if probe.returncode != 0:
        pytest.skip(f"needs root or user namespaces to mount a small file system: {probe.stderr}")
    folder = str(Path(sys.executable).parent)
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        env={"PATH": f"{folder}:/usr/sbin:/usr/bin:/sbin:/bin", "CI": "true"},
    )
