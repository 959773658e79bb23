"""`medfast export`: a run to a folder that open_clip and transformers load."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medfast import cli
from medfast.errors import UsageError
from medfast.export import Request

if TYPE_CHECKING:
    from torch import Tensor

    from medfast.data.tokens import Tokenizer

# By name: run as a command, this module is called __main__.
log = logging.getLogger("medfast.export")


def main(argv: Sequence[str] | None = None) -> None:
    """Run `medfast export ...`."""

    def command() -> None:
        request = cli.parse_export(argv)
        cli.log_to_console()
        export(request)

    cli.run(command, "medfast.export")


def export(request: Request) -> None:
    """Write the folder, as a whole or not at all.

    Raises:
        UsageError: the run cannot be read or expressed, or the folder not written.
    """
    from medfast.export import card, to_open_clip, to_transformers
    from medfast.export.trained import read_run

    _check_free(request.folder)
    trained = read_run(request.run)
    length = trained.tokenizer.context_length
    clip = to_transformers.settings(trained)
    towers = clip or to_open_clip.tower_config(trained)
    texts = {to_open_clip.CONFIG: to_open_clip.settings(trained, request.place)}
    weights = {to_open_clip.WEIGHTS: to_open_clip.tensors(trained.model, length)}
    if towers:
        texts[to_transformers.CONFIG] = towers
    if clip is not None:
        texts[to_transformers.PIXELS] = to_transformers.pixels(trained)
        weights[to_transformers.WEIGHTS] = to_transformers.tensors(trained.model, length)
    words = card.text(trained, request.hub_name)
    with _as_a_whole(request.folder) as folder:
        for name, tensors in weights.items():
            _save(tensors, folder / name)
        for name, content in texts.items():
            _write(folder / name, _as_json(content))
        _save_tokenizer(trained.tokenizer, folder)
        _write(folder / card.NAME, words)
    log.info("%s: %s, epoch %d", trained.name, trained.config.method, trained.epoch)
    if trained.left_out:
        log.info("left out, as others have no place for it: %s", ", ".join(trained.left_out))
    libraries = "open_clip" if clip is None else "open_clip and transformers"
    log.info("wrote %s for %s, with its model card %s", request.folder, libraries, card.NAME)
    if clip is None and towers:
        log.info(
            "open_clip looks for %s at %s: after a move, write the new place into %s",
            *(to_transformers.CONFIG, request.place.partition(":")[2], to_open_clip.CONFIG),
        )


def _check_free(folder: Path) -> None:
    """Refuse a folder that holds something or cannot be made.

    Raises:
        UsageError: it does, or it cannot.
    """
    above = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not above.is_dir():
        raise _unwritable(folder, f"{above} is no folder")
    if not os.access(above, os.R_OK | os.W_OK | os.X_OK):
        raise _unwritable(folder, f"there is no permission to write in {above}")
    if above == folder and any(folder.iterdir()):
        raise UsageError(
            f"--hf-folder {folder} must be a new or empty folder, and it holds files; name "
            "another, or empty this one."
        )


def _unwritable(folder: Path, reason: object) -> UsageError:
    return UsageError(
        f"--hf-folder {folder} must be a folder that can be written ({reason}); name another, or "
        "make room for it."
    )


@contextmanager
def _as_a_whole(folder: Path) -> Iterator[Path]:
    """Give a folder beside another, which becomes that one if all goes well.

    Raises:
        UsageError: it cannot be written.
    """
    from safetensors import SafetensorError

    beside: Path | None = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        # Within the temporary one, which only its owner may read: this one follows the umask.
        whole = beside / folder.name
        whole.mkdir()
        yield whole
        whole.replace(folder)
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, getattr(error, "strerror", None) or error) from None
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    # Turned, cut and joint weights become plain ones of their own.
    plain = torch.contiguous_format
    own = {name: tensor.clone(memory_format=plain) for name, tensor in tensors.items()}
    # The mark is what transformers asks for.
    save_file(own, path, {"format": "pt"})
    # It has let the owner alone read the file; the folder follows the umask.
    path.chmod(path.parent.stat().st_mode & 0o666)


def _save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write the tokenizer's files, by which a text has no more tokens than the model takes."""
    tokenizer.save(folder)
    path, whole = folder / "tokenizer_config.json", folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["model_max_length"] = tokenizer.context_length
    # transformers before version 5 knows this class by its older name, and would have no blank
    # before a text unless told; later versions take both.
    if content["tokenizer_class"] == "TokenizersBackend":
        content["tokenizer_class"] = "PreTrainedTokenizerFast"
    splits = json.loads(whole.read_text(encoding="utf-8"))["pre_tokenizer"] or {}
    if "add_prefix_space" in splits:
        content["add_prefix_space"] = splits["add_prefix_space"]
    # How the run's own files were found is nothing to whoever loads these.
    for name in ("is_local", "local_files_only"):
        content.pop(name, None)
    _write(path, _as_json(content))


def _as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


def _write(path: Path, words: str) -> None:
    # Names need not be UTF-8.
    path.write_text(words, encoding="utf-8", errors="backslashreplace", newline="")


if __name__ == "__main__":
    main()
