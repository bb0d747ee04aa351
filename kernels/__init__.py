"""Custom ops of GAN training, registered with torch.library under the namespace `stylepipe`.

Every registered op has one interface whatever runs underneath: a PyTorch implementation for all devices, which a
device's own kernel may override under the same name, a fake implementation for shape propagation and torch.compile,
and a gradient that is itself made of differentiable ops, so that R1 and path length regularization work.
"""

from stylepipe.kernels.bias_act import activation_gain, bias_act
from stylepipe.kernels.conv2d import conv2d
from stylepipe.kernels.filters import downsample2d, filter2d, setup_filter, upsample2d
from stylepipe.kernels.upfirdn2d import upfirdn2d

__all__ = [
    "activation_gain",
    "bias_act",
    "conv2d",
    "downsample2d",
    "filter2d",
    "setup_filter",
    "upfirdn2d",
    "upsample2d",
]
