"""The training engine: it runs phases and knows no network by name."""
