"""Network files, and other projects' checkpoints."""
