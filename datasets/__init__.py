"""Shard format, order, readers, preparation, drawn faces."""
