"""Packages whose public names are imported when they are first asked for (PEP 562).

`import offline_kd` and `offline-kd --help` must not wait for torch and zarr, and still every package can say what it
offers. A package writes its names three times, each for another reader: imported under `TYPE_CHECKING` for type
checkers and editors, in `__all__` for `import *`, and here by module for the interpreter.
"""

import sys
from collections.abc import Callable, Mapping
from importlib import import_module


def lazy(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], object], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.
        names: the modules that define its public names, by name; a module that is itself public is its own value:
            `{"open_store": "offline_kd.api", "objectives": "offline_kd.objectives"}`.

    What was looked up once is an ordinary attribute from then on.
    """

    def __getattr__(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        module = import_module(names[name])
        value = module if names[name] == f"{package}.{name}" else getattr(module, name)
        setattr(sys.modules[package], name, value)
        return value

    def __dir__() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return __getattr__, __dir__


def load_class(package: str, where: str) -> type:
    """The class `Name` of the module `file` of a package, written `file.Name`, as tables of extensions name theirs."""
    file, name = where.split(".")
    found = getattr(import_module(f"{package}.{file}"), name)
    assert isinstance(found, type)
    return found
