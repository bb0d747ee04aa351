"""What to train: modules, phases, samples."""
