from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medfast.data.phantom import classification
from medfast.data.phantom.cases import Sample

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a set of tiny pictures, of which those with an equal `same(sample)` are equal."""

    def run(key: str, *, same: Callable[[Sample], object] | None = None, **options) -> Path:
        def render(sample: Sample) -> Image.Image:
            seed = sample.key
            if same is not None and (name := same(sample)) is not None:
                seed = tuple(str(name).encode())
            pixels = np.random.default_rng(seed).integers(0, 256, (16, 20, 3), np.uint8)
            return Image.fromarray(pixels)

        medical = replace(classification.DOMAINS["medical"], render=render)
        monkeypatch.setattr(classification, "DOMAINS", {"medical": medical})
        return classification.write_classification(tmp_path / key, key, **options)

    return run
