"""What a light installation leaves out, asked for by name."""

import importlib
from typing import Any


def need(extra: str, *modules: str) -> Any:
    """The first of the modules, once all of them can be imported.

    Raises:
        ImportError: if one cannot, with the extra of this package that installs it.
    """
    try:
        first, *_ = [importlib.import_module(module) for module in modules]
        return first
    except ImportError as error:
        raise ImportError(
            f"{error.name or modules[0]} is missing or broken ({error}); install it with "
            f"`pip install 'eigendecomp[{extra}]'`, or from a clone `pip install '.[{extra}]'`",
            name=error.name,
        ) from error
