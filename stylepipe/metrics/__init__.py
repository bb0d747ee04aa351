"""Numbers that images are judged by."""
