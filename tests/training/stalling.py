"""Started by test_watchdog.py as several gloo processes, of which one does what the test asks for."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

from stylepipe.errors import ProcessLostError, UserError
from stylepipe.training import activity
from stylepipe.training.distributed import any_process, leave, make_accelerator, on_main_process, together
from stylepipe.training.watchdog import Watchdog

LIMIT_S = 4.0


def main(fault: str) -> None:
    accelerator = make_accelerator()
    rank = accelerator.process_index
    with Watchdog(LIMIT_S):
        any_process(False)
        if fault == "unwritable":
            try:
                on_main_process(accelerator, Path("/proc/none").write_text, "")
            except UserError as error:
                print(f"told: {error}", flush=True)
                sys.exit(2)
        if rank == 1:
            activity.note("G/main after 0.5 kimg")
            if fault == "stalled":
                time.sleep(60)
            elif fault == "halted":
                time.sleep(LIMIT_S / 4)  # until it has been heard
                os.kill(os.getpid(), signal.SIGSTOP)
            elif fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault == "long":
                with activity.during("preparing the data", "unlimited"):
                    time.sleep(2 * LIMIT_S)
            elif fault == "slow":
                for _ in range(10):
                    time.sleep(LIMIT_S / 5)
                    activity.get_on()
        try:
            if fault == "entangled" and rank == 1:  # both wait, for different things
                with together("something else"):
                    dist.barrier(dist.new_group(ranks=[0, 1]))
            any_process(False)
        except ProcessLostError as error:
            print(f"lost: {error}", flush=True)
            sys.exit(1)
    print("went on", flush=True)
    leave()


if __name__ == "__main__":
    main(sys.argv[1])
