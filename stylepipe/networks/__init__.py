"""Network definitions, one file per paper."""
