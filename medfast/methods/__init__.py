"""The contrastive methods: model outputs in, named losses out. One file per method."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from medfast.methods.base import Method

# Key on the command line -> class in the module of the same name. Names only, so that the command
# line can list the methods without importing torch.
METHODS = {
    "clip": "Clip",
    "lit": "Lit",
    "slip": "Slip",
    "declip": "Declip",
    "cyclip": "Cyclip",
    "local": "Local",
    "filip": "Filip",
    "sparc": "Sparc",
}


def method_class(key: str) -> type[Method]:
    """Return the class of the method `key` of `METHODS`."""
    return getattr(importlib.import_module(f"medfast.methods.{key}"), METHODS[key])
