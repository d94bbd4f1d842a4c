"""Guards the names `proxies`, `sweeps` and `full_scale`, which other distributions use too.

The packages of this project are siblings in one folder. Two of their names are also taken on
PyPI, so before the command line imports one it makes sure that the name leads to ours.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from mutransfer.errors import UserError

DISTRIBUTION = "mutransfer"
_CURE = "Remove the other one (pip uninstall), or run mutransfer in an environment of its own."


def check_siblings(names: Iterable[str]) -> None:
    """Checks that each top-level package in `names` is this project's own; imports none.

    Raises:
        UserError: The package is missing, lies elsewhere than beside `mutransfer`, or another
            installed distribution owns a top-level package of the same name.
    """
    installed = metadata.packages_distributions()
    for name in names:
        owners = sorted({owner for owner in installed.get(name, []) if owner != DISTRIBUTION})
        found, ours = _folder(name), Path(__file__).resolve().parents[1] / name
        if found is None:
            raise UserError(f"package {name!r} is missing", where="installation", expected=ours,
                            cure="Install mutransfer again.")  # fmt: skip
        if owners or found != ours:
            whose = f" (distribution {', '.join(owners)})" if owners else ""
            raise UserError(f"another package is called {name!r} too{whose}", where="installation",
                            got=found, expected=f"only {ours}", cure=_CURE)  # fmt: skip


def _folder(name: str) -> Path | None:
    """The folder (or the single file) that `import name` would use, or `None`."""
    spec = find_spec(name)
    if spec is None:
        return None
    if spec.origin is not None and Path(spec.origin).name != "__init__.py":
        return Path(spec.origin).resolve()
    places = list(spec.submodule_search_locations or [])
    return Path(places[0]).resolve() if places else None
