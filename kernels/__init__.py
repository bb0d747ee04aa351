"""Custom ops: upfirdn2d and bias_act."""
