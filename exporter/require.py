"""Optional packages: imported where they are needed, asked for by name where they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

from export_vq.errors import UserError


def require(name: str, *, extra: str | None = None) -> ModuleType:
    """Import a module that the tool can be installed without.

    Args:
        name: the module's import name.
        extra: the extra of this package that brings it; None where it is a plain dependency.

    Raises:
        UserError: the module is not installed; the sentence says what to install.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        mend = (
            f"pip install -c constraints.txt 'export-vq[{extra}]'"
            if extra
            else "pip install -c constraints.txt export-vq"
        )
        raise UserError(f"{name} cannot be imported ({error}); install it with: {mend}") from error
