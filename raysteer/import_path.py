"""Import paths in recipes: ``module:name``, how a user's own reward, objective or family is named."""

from importlib import import_module
from typing import Any

from raysteer.errors import ConfigError


def load_object(import_path: str, key: str) -> Any:
    """The object at ``module:name``.

    Raises:
        ConfigError: naming ``key``, when there is no such module or name.
    """
    module, _, name = import_path.partition(":")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(error.name + ".")):
            remedy = f"there is no module {module!r} on the import path (PYTHONPATH=. adds the working directory)"
            raise ConfigError(key, import_path, remedy) from error
        raise  # the module exists and misses a dependency of its own: its message is the better one
    except AttributeError as error:
        raise ConfigError(key, import_path, f"module {module!r} has no {name!r}") from error


def is_import_path(text: str) -> bool:
    """Whether a text has the form ``module:name``."""
    return text.count(":") == 1 and all(text.partition(":"))
