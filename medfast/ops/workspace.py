"""How much memory a chunked implementation may use for what it recomputes."""

from __future__ import annotations

import math
import os

_VARIABLE = "MEDFAST_WORKSPACE_MB"
_DEFAULT_MB = "256"


def workspace_bytes() -> int:
    """Return the limit, in bytes, on the tiles that one call keeps at a time.

    It is read from the environment variable `MEDFAST_WORKSPACE_MB` (default 256; fractions are
    allowed). Results do not depend on it beyond rounding, speed hardly does.

    Raises:
        ValueError: The variable is not a positive number.
    """
    text = os.environ.get(_VARIABLE, _DEFAULT_MB)
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = math.nan
    if not 0 < megabytes < math.inf:
        raise ValueError(
            f"{_VARIABLE} must be a positive number of MiB; got {text!r}. "
            f"Unset it for the default of {_DEFAULT_MB}."
        )
    return int(megabytes * 2**20)
