"""Custom ops of GAN training, registered with torch.library under the namespace `stylepipe`.

Every op has one interface whatever runs underneath: compiled kernels where they can be had, else PyTorch's operations;
a fake implementation for shape propagation and torch.compile; and a gradient that is itself made of differentiable ops,
so that R1 and path length regularization work.

The modules, in the order to read them:
    ops: filters, bias_act (and _activations), upfirdn2d, styled_act (and _styled_composed), act_fir, conv2d;
        _library is their namespace
    running kernels: _operands (the structs of the source), _epilogue, _fir; the source is in cuda/ and cpu/
    compiling and loading kernels: native (which to use), build and cache, nvrtc, nvcc, gxx, driver, host
"""

from stylepipe.kernels._activations import activation_gain
from stylepipe.kernels._styled_composed import per_pixel_dot
from stylepipe.kernels.act_fir import act_fir
from stylepipe.kernels.bias_act import bias_act
from stylepipe.kernels.conv2d import conv2d
from stylepipe.kernels.filters import downsample2d, filter2d, setup_filter, upsample2d
from stylepipe.kernels.styled_act import styled_act, styled_act_rgb
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
