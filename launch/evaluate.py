"""Measure networks: `accelerate launch launch/evaluate.py NETWORK --data DIR`; the code of `stylepipe evaluate`."""

import sys

try:
    from stylepipe.cli.main import run
except ModuleNotFoundError as error:
    if error.name != "stylepipe":
        raise
    print(
        f"error: {sys.executable} has no stylepipe; run `make setup` (then .venv/bin/python) or `pip install -e .`",
        file=sys.stderr,
    )
    sys.exit(2)

if __name__ == "__main__":
    sys.exit(run("evaluate", sys.argv[1:]))
