"""What commands that several processes may run together begin and end with."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator

from stylepipe.training.allocator import keep_freed_memory
from stylepipe.training.distributed import leave, make_accelerator, use_all_cores
from stylepipe.training.launched import check_launch


@contextmanager
def joined() -> Iterator[Accelerator]:
    """Join the other processes for a block, take this one's device and cores, and have the main one speak.

    Raises:
        UserError: started in a way that makes each process work alone.
    """
    accelerator = make_accelerator()
    try:
        check_launch(accelerator.num_processes)
        if accelerator.is_main_process:
            logging.basicConfig(level=logging.WARNING, format="%(message)s")
            logging.getLogger("stylepipe").setLevel(logging.INFO)
        if accelerator.device.type == "cpu":
            keep_freed_memory()
            use_all_cores()
        yield accelerator
    except BaseException:
        leave(with_others=False)
        raise
    leave()
