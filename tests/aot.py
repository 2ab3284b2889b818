"""Ahead-of-time compilation for accelerators that are not there.

Runs a program in a process of its own (a compiler's failure can end Python, and the target is chosen before JAX is
imported) and returns the last line of its output as JSON.
"""

import json
import os
import pathlib
import subprocess
import sys

TPU = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def compile_in_a_process(program: str, *arguments: str, environment: dict[str, str], timeout: float = 900):
    """What `program` (Python source) prints last, parsed; its stderr is shown when it fails."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | environment,
        cwd=pathlib.Path(__file__).resolve().parent.parent,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])
