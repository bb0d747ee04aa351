"""Published settings, one file each."""
