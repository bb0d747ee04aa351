"""Custom ops of GAN training, registered with torch.library under the namespace `stylepipe`.

Every registered op has one interface whatever runs underneath: a PyTorch implementation for all devices, which a
device's own kernel may override under the same name, a fake implementation for shape propagation and torch.compile,
and a gradient that is itself made of differentiable ops, so that R1 and path length regularization work.
"""

from stylepipe.kernels.act_fir import act_fir
from stylepipe.kernels.bias_act import activation_gain, bias_act
from stylepipe.kernels.conv2d import conv2d
from stylepipe.kernels.filters import downsample2d, filter2d, setup_filter, upsample2d
from stylepipe.kernels.styled_act import per_pixel_dot, styled_act, styled_act_rgb
from stylepipe.kernels.upfirdn2d import upfirdn2d

__all__ = [
    "act_fir",
    "activation_gain",
    "bias_act",
    "conv2d",
    "downsample2d",
    "filter2d",
    "per_pixel_dot",
    "setup_filter",
    "styled_act",
    "styled_act_rgb",
    "upfirdn2d",
    "upsample2d",
]
