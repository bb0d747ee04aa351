"""The report of runs: one page of images over time, curves, metrics and settings, to read and to pass on."""
