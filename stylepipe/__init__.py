"""Train high-resolution GANs on many GPUs."""
