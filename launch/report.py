"""Show how a run fares: `python launch/report.py RUN`. The same code as `stylepipe report`."""

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
    sys.exit(run("report", sys.argv[1:]))
