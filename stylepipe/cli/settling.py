"""The options that the preset, the device and the data decide."""

from __future__ import annotations

import os
from dataclasses import replace

import torch
from accelerate import Accelerator

from stylepipe.config import Config
from stylepipe.datasets.remote import is_remote
from stylepipe.datasets.streaming import is_stream
from stylepipe.errors import UserError
from stylepipe.kernels import native
from stylepipe.presets import resolve, with_precision

# Two images at a time at 1024 px: in float32 the presets' four take 16 GB, more than many a machine without a GPU has.
CPU_BATCH_PIXELS = 2048

DATA_WINDOW = 16  # shards: 4 GB as `prepare` makes them, thousands of images of 1024 px


def settle(config: Config, accelerator: Accelerator) -> Config:
    """Fill every option that the preset and the device decide.

    Raises:
        UserError: a precision or kernels that the device has not, an unknown choice of kernels, what `resolve` refuses.
    """
    on_cpu = accelerator.device.type == "cpu"
    if native.mode() == "cuda" and on_cpu:  # before anything is made
        raise UserError(
            f"{native.VARIABLE}=cuda: no GPU to train on, expected one; stylepipe doctor tells what is in the way, and "
            f"{native.VARIABLE}=auto trains on the CPU"
        )
    config = resolve(config, accelerator.num_processes, max(1, CPU_BATCH_PIXELS // config.res) if on_cpu else None)
    config = settle_data(config)
    if on_cpu:
        if config.precision == "fp16":
            raise UserError("--precision fp16: expected fp32, bf16 or auto on a CPU")
        return with_precision(config, "fp32" if config.precision == "auto" else config.precision)
    precision: str = config.precision
    if precision == "auto":
        best = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")  # the one thing that accelerate's setting does
        precision = asked if asked in ("bf16", "fp16") else best
    # Float32 means float32: only where half precision is accepted may its matrix products be rounded to TF32.
    rounding = "ieee" if precision == "fp32" else "tf32"
    torch.backends.cuda.matmul.fp32_precision = rounding
    torch.backends.cudnn.conv.fp32_precision = rounding  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = True
    return with_precision(config, precision)


def settle_data(config: Config) -> Config:
    """Fill how the data is shuffled; raise UserError for an option that nothing would come of."""
    if config.data is not None and is_stream(config.data):
        for option, value in (("--cond", config.cond), ("--data-window", config.data_window)):
            if value:
                raise UserError(f"{option}: {config.data} has no labels and no order that is known before; prepare it")
    remote = config.data is not None and is_remote(config.data)
    if config.data_window is None:
        config = replace(config, data_window=DATA_WINDOW if remote else 0)
    if config.data_cache_gb is not None and not (remote and config.data_window):
        reason = "--data-window 0 copies all of it" if remote else "--data is no location, so nothing is copied"
        raise UserError(f"--data-cache-gb {config.data_cache_gb:g}: {reason}; leave it out")
    return config
