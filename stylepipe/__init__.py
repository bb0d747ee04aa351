"""Train high-resolution GANs on many GPUs.

`stylepipe.load_network(path)` gives the generator of a network file; everything else is in the sub-packages and on the
command line (`stylepipe --help`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stylepipe.interop.network_file import load_network

    __version__: str

__all__ = ["__version__", "load_network"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that `import stylepipe` does not wait for torch (PEP 562)."""
    if name == "load_network":
        from stylepipe.interop.network_file import load_network

        return load_network
    if name == "__version__":
        from importlib.metadata import version

        return version("stylepipe")
    raise AttributeError(f"module 'stylepipe' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
