"""Finding and reading the files of a source: local ones first, else a snapshot of the hub."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medfast.errors import UsageError

# Weights of a folder, the first that is there. open_clip's stand first: beside them timm keeps the
# image tower alone. Of each kind the safe format stands first.
_WEIGHTS = (
    "open_clip_model.safetensors",
    "model.safetensors",
    "model.safetensors.index.json",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What is asked of the hub, one after the other, until there are weights.
_DOWNLOADS = (
    "open_clip_model.safetensors",
    "model*.safetensors",
    "open_clip_pytorch_model.bin",
    "pytorch_model*.bin",
)
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
# Any one of these is a tokenizer.
_TOKENIZERS = (("tokenizer.json",), ("vocab.json", "merges.txt"), ("vocab.txt",))
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CHECKPOINT = re.compile(r"epoch_(\d+)(?:_step_(\d+))?\.pt")


@dataclass(frozen=True)
class Weights:
    """What the files of a source hold.

    Attributes:
        source: The flag and its value, to begin a message with.
        tensors: All tensors by their names in the source.
        config: config.json of transformers or timm; None without one.
        open_clip: `model_cfg` of open_clip_config.json; None without one.
        run: The settings of a medfast run; empty for anything else.
        normalisation: Mean and standard deviation of the pixels, in units of [0, 1], if given.
    """

    source: str
    tensors: dict[str, Tensor]
    config: dict[str, Any] | None = None
    open_clip: dict[str, Any] | None = None
    run: dict[str, Any] = field(default_factory=dict)
    normalisation: tuple[list[float], list[float]] | None = None


def read(source: str, flag: str = "--pretrained") -> Weights:
    """Return what a source holds.

    Raises:
        UsageError: it cannot be found or read, or holds no weights.
    """
    name = f"{flag} {source}"
    path = _locate(source, name)
    file = _weights_file(path, name) if path.is_dir() else path
    tensors, run = _read_shards(file, name) if file.suffix == ".json" else _read_file(file, name)
    # The configuration of a file that somebody put into a folder of his own is another's.
    known = path.is_dir() or file.name in _WEIGHTS
    config, open_clip, pixels = (
        _read_json(file.parent / beside, name) if known else None
        for beside in ("config.json", "open_clip_config.json", "preprocessor_config.json")
    )
    return Weights(
        name,
        _clean(tensors),
        config,
        (open_clip or {}).get("model_cfg"),
        run,
        _normalisation(config or {}, open_clip or {}, pixels or {}),
    )


def pretrained_tokenizer(source: str) -> Path | None:
    """Return the folder with the tokenizer that belongs to text weights, None without one.

    Args:
        source: As for `load_pretrained`.

    Raises:
        UsageError: there is no such source.
    """
    path = _locate(source, f"--pretrained {source}")
    folder = path if path.is_dir() else path.parent
    # A run folder, its folder of checkpoints, or a published folder.
    for place in (folder / "tokenizer", folder.parent / "tokenizer", folder):
        within = place == folder or _checkpoints(folder)
        if within and any(all((place / n).is_file() for n in names) for names in _TOKENIZERS):
            return place
    return None


def _locate(source: str, name: str) -> Path:
    path = Path(source).expanduser()
    if path.exists():
        return path
    if not _HUB_NAME.fullmatch(source) or source.endswith(_SUFFIXES):
        raise UsageError(
            f"{name}: there is no such file or folder; name one that is there, or a model on the "
            "Hugging Face hub as org/name."
        )
    import huggingface_hub

    for pattern in _DOWNLOADS:
        try:
            folder = huggingface_hub.snapshot_download(
                source, allow_patterns=[pattern, "*.json", "*.txt"]
            )
        except Exception as error:  # the client has its own for each way to fail
            reason = str(error).strip().partition("\n")[0]
            raise UsageError(
                f"{name} is no local path, and the Hugging Face hub did not give it "
                f"({type(error).__name__}: {reason}); download it where there is a connection and "
                "name its folder here."
            ) from None
        if _published(Path(folder)):
            return Path(folder)
    raise UsageError(
        f"{name} on the Hugging Face hub holds no weights under a usual name "
        f"({', '.join(_WEIGHTS)}); download the file and name it here."
    )


def _published(folder: Path) -> Path | None:
    """Return the weights of a published model's folder."""
    return next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)


def _checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, from its folder or that of its checkpoints; newest last."""
    for place in (folder / "checkpoints", folder):
        found = {path: _CHECKPOINT.fullmatch(path.name) for path in place.glob("epoch_*.pt")}
        numbers = {path: (int(m[1]), int(m[2] or 0)) for path, m in found.items() if m}
        if numbers:
            return sorted(numbers, key=numbers.__getitem__)
    return []


def _weights_file(folder: Path, name: str) -> Path:
    usual = _published(folder) or next(iter(_checkpoints(folder)[-1:]), None)
    if usual is not None:
        return usual
    others = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    if len(others) == 1:
        return others[0]
    if others:
        raise UsageError(
            f"{name} holds several files of weights; name one of them: "
            f"{', '.join(path.name for path in others)}."
        )
    contents = "is an empty folder"
    if any(folder.iterdir()):
        tokenizer = any(all((folder / n).is_file() for n in names) for names in _TOKENIZERS)
        contents = f"holds {'a tokenizer but ' if tokenizer else ''}no weights"
    raise UsageError(
        f"{name} {contents}; it must be a run folder or hold one of {', '.join(_WEIGHTS)}."
    )


def _read_shards(index: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    shards = (_read_json(index, name) or {}).get("weight_map", {})
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(shards.values())):
        path = index.parent / shard
        if Path(shard).name != shard or not path.is_file():
            raise UsageError(f"{name}: {index.name} names {shard}, which is not in its folder.")
        tensors |= _read_file(path, name)[0]
    missing = sorted(shards.keys() - tensors.keys())
    if missing:
        raise UsageError(f"{name}: {index.name} names {missing[0]}, which its files do not hold.")
    return tensors, {}


def _read_file(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of one file, and the settings if it is of a medfast run.

    Nothing is unpickled but what torch allows with weights_only.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return load_file(path), {}
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # safetensors, zipfile, pickle and torch each have their own
        with path.open("rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
        remedy = (
            "it is a pointer of Git LFS, fetch the file itself with `git lfs pull`"
            if pointer
            else "it is damaged or not a file of weights alone, give one of "
            f"{', '.join(_SUFFIXES)} that safetensors or torch.load(weights_only=True) reads"
        )
        raise UsageError(
            f"{name}: {path.name} cannot be read ({type(error).__name__}); {remedy}."
        ) from None
    inner = content
    for key in ("state_dict", "model"):
        if isinstance(inner, dict) and isinstance(inner.get(key), dict):
            inner = inner[key]
            break
    if not isinstance(inner, dict) or not any(isinstance(x, Tensor) for x in inner.values()):
        raise UsageError(f"{name}: {path.name} holds no weights, which are tensors by name.")
    run = content.get("config") if inner is not content else None
    return {str(n): x for n, x in inner.items() if isinstance(x, Tensor)}, (
        run if isinstance(run, dict) else {}
    )


def _clean(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors without what DistributedDataParallel and torch.compile put before names."""
    from timm.models import clean_state_dict

    return clean_state_dict(tensors)


def _read_json(path: Path, name: str) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UsageError(f"{name}: {path.name} is damaged: it is not JSON.") from None
    if not isinstance(content, dict):
        raise UsageError(f"{name}: {path.name} is damaged: it holds no settings by name.")
    return content


def _normalisation(
    config: dict[str, Any], open_clip: dict[str, Any], pixels: dict[str, Any]
) -> tuple[list[float], list[float]] | None:
    """Return mean and standard deviation from where timm, open_clip and transformers have them."""
    places = (
        (open_clip.get("preprocess_cfg", {}), "mean", "std"),
        (config.get("pretrained_cfg", {}), "mean", "std"),
        (pixels, "image_mean", "image_std"),
    )
    for place, mean, std in places:
        if len(place.get(mean) or ()) == len(place.get(std) or ()) == 3:
            return place[mean], place[std]
    return None
