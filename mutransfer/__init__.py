"""Tune a language model while it is small, train it when it is large.

The names below are the Python API. They are imported on first use, so that `import mutransfer`
costs nothing and the command line starts at once.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mutransfer.apply import parametrize
    from mutransfer.bundle import Bundle
    from mutransfer.coord_check import coord_check
    from mutransfer.errors import UserError
    from mutransfer.groups import param_groups
    from mutransfer.transfer import transfer_check

    __version__: str

_HOME = {
    "Bundle": "mutransfer.bundle",
    "UserError": "mutransfer.errors",
    "coord_check": "mutransfer.coord_check",
    "param_groups": "mutransfer.groups",
    "parametrize": "mutransfer.apply",
    "transfer_check": "mutransfer.transfer",
}

__all__ = [
    "Bundle",
    "UserError",
    "__version__",
    "coord_check",
    "param_groups",
    "parametrize",
    "transfer_check",
]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib import metadata

        return metadata.version("mutransfer")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(_HOME[name])
    # `coord_check` is the name of a module too: importing it has put that there, and it is callable
    return globals().setdefault(name, getattr(module, name))


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
