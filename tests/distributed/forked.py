"""A script on several processes of this machine: ``forked.py NUM SCRIPT WORDS...``, with the variables that torchrun sets.

One process imports what they all need, which takes longer than what most tests then do, and is forked. As with torchrun, one process
that fails ends all; its exit code is 1 then. Tests of how users start processes use torchrun and Accelerate themselves.
"""

from __future__ import annotations

import os
import random
import runpy
import signal
import socket
import sys
import traceback


def main() -> int:
    num, script, words = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    import datasets  # noqa: F401
    import numpy as np
    import torch
    import toys  # noqa: F401
    import transformers

    import gap_hf

    _ = (transformers.Trainer, gap_hf.GaPTrainer)  # both are imported when they are first asked for
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(num):
        if child := os.fork():
            children.append(child)
            continue
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(num), "LOCAL_WORLD_SIZE": str(num)}
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        sys.argv[:] = [script, *words]
        code = 0
        for generator in (random, np.random, torch):  # as different as in processes of their own
            generator.seed()
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = 0 if end.code in (None, 0) else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    failed = False
    while children:
        child, status = os.wait()
        children.remove(child)
        if status and not failed:
            failed = True
            for other in children:  # they wait for the one that is gone
                os.kill(other, signal.SIGKILL)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
