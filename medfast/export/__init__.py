"""A run as a folder that open_clip, transformers and the Hugging Face hub take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Request:
    """What to export, and where to.

    Attributes:
        run: A run folder, or one of its checkpoints.
        folder: The folder to write, which is new or empty.
        hub_name: Where it is to lie on the hub, as "org/name"; its files then name this where one
            library must be told where another one's files are. None names the folder itself.
    """

    run: Path
    folder: Path
    hub_name: str | None = None

    @property
    def place(self) -> str:
        """Where the files are, as timm and open_clip name a place."""
        return f"hf-hub:{self.hub_name}" if self.hub_name else f"local-dir:{self.folder}"
