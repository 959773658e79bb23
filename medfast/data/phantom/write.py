"""Writing the phantom as files in the layout of a public data set, with a sidecar of the truth."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Generator
from concurrent.futures import ProcessPoolExecutor
from contextlib import closing
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from medfast.data.phantom.cases import Sample
from medfast.data.phantom.domains import DOMAINS, Domain
from medfast.data.phantom.layouts import LAYOUTS, Layout
from medfast.errors import UsageError, unknown_name

# Of the medical domain, as in the name of its folder in the cache.
GENERATOR_VERSION = DOMAINS["medical"].version
FEWEST_PAIRS = 30

_CHUNK = 32
_QUESTION_SPLITS = ("validation", "test")

Progress = Callable[[int, int], None]


def write_phantom(
    out: Path,
    *,
    layout: str = "roco",
    pairs: int = 6000,
    seed: int = 0,
    domain: str = "medical",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Write procedural images with captions into `out` and return it.

    They are medical-like, or in the domain "general" like photographs of everyday scenes.

    The default layout is ROCO's original one: `{train,validation,test}/radiology/captions.txt`,
    `dlinks.txt` and `images/PHANTOM_00001.jpg`. In every layout all lies in one folder, histology
    too. `phantom.json` at the root, written last, has, by the keys, splits and studies that the
    layout's reader gives, the labels and, for validation and test, pairs of a true caption and one
    with a single wrong detail. Left and right are the viewer's throughout. The files depend on
    `layout`, `pairs`, `seed` and `domain` alone, not on `workers`.

    Two layouts cannot hold all: in Quilt's the views of a study are single images, and 1 % of what
    is not test is for validation, as in Quilt-1M itself; in MIMIC-CXR's they share one caption.

    Args:
        out: The folder to fill; must be new or empty.
        layout: One of `LAYOUTS`.
        pairs: Number of images over all splits (80 % train, 10 % validation, 10 % test; whole
            studies), at least 30.
        seed: Any number that is not negative.
        domain: One of `DOMAINS`. MIMIC-CXR's layouts hold the medical one alone.
        workers: Processes that draw; None takes one per core.
        progress: Called with (images written, images in all) as the work goes on.

    Returns:
        `out`.

    Raises:
        UsageError: An argument is out of range, or `out` cannot be written or is not empty.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     root = write_phantom(Path(folder) / "phantom", pairs=30, workers=1)
        ...     print(len(list(root.glob("*/radiology/images/*.jpg"))))
        30
    """
    _check_arguments(layout, pairs, seed, domain, workers)
    out = Path(out)
    _make_folder(out)
    kind, place = DOMAINS[domain], LAYOUTS[layout]
    samples = kind.samples(pairs, seed)
    try:
        for name, text in place.texts(samples, kind.caption):
            path = out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise _unwritable(out, error) from error
    write = partial(_write_chunk, out, layout, domain)
    with closing(_write_images(write, samples, workers or os.cpu_count() or 1)) as counts:
        for done in accumulate(counts):
            if progress is not None:
                progress(done, pairs)
    sidecar = {
        "generator": f"medfast {kind.name}",
        "version": kind.version,
        "layout": layout,
        "pairs": pairs,
        "seed": seed,
        "label_sets": {
            label: {"classes": list(classes), "prompts": kind.prompts(label)}
            for label, classes in kind.classes.items()
        },
        "samples": {
            place.key(s): {
                "split": place.split(s),
                "study": place.study(s),
                "labels": kind.labels(s.case),
            }
            for s in samples
        },
        "questions": [question for s in samples for question in _questions(s, kind, place)],
    }
    text = json.dumps(sidecar, indent=1, sort_keys=True, ensure_ascii=False)
    (out / "phantom.json").write_text(text + "\n", encoding="utf-8")
    return out


def cached_phantom(
    cache_dir: Path,
    *,
    layout: str = "roco",
    pairs: int = 6000,
    seed: int = 0,
    domain: str = "medical",
    workers: int | None = None,
    progress: Progress | None = None,
) -> Path:
    """Return the folder of this phantom below `cache_dir`; writes it on first use.

    It is written beside and renamed, so an interrupted write never leaves a half folder under the
    name, and of two concurrent writers one wins. The arguments are those of `write_phantom`.

    Returns:
        `<cache_dir>/phantom-v<version>-<layout>-<pairs>-seed<seed>`, of the general domain
        `phantom-general-v<version>-…`.

    Raises:
        UsageError: As `write_phantom`.
    """
    _check_arguments(layout, pairs, seed, domain, workers)
    name, version = DOMAINS[domain].name, DOMAINS[domain].version
    folder = Path(cache_dir) / f"{name}-v{version}-{layout}-{pairs}-seed{seed}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise _unwritable(folder.parent, error) from error
    try:
        # A folder inside the temporary one: that has mode 0700, the cache should follow the umask.
        whole = write_phantom(
            beside / folder.name,
            layout=layout,
            pairs=pairs,
            seed=seed,
            domain=domain,
            workers=workers,
            progress=progress,
        )
        try:
            whole.rename(folder)
        except OSError:
            # Another process was first; its files are the same.
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def source(layout: str, out: Path) -> str:
    """Return the phantom in `out` as --train-data names it, such as "roco:/data/phantom"."""
    return f"{LAYOUTS[layout].source}:{Path(out) / LAYOUTS[layout].table}"


def _check_arguments(layout: str, pairs: int, seed: int, domain: str, workers: int | None) -> None:
    if layout not in LAYOUTS:
        raise UsageError(unknown_name("phantom: layout", layout, LAYOUTS))
    if domain not in DOMAINS:
        raise UsageError(unknown_name("phantom: domain", domain, DOMAINS))
    only = LAYOUTS[layout].domain
    if only not in ("", domain):
        raise UsageError(
            f"phantom: layout {layout} holds the {only} domain alone; got domain {domain}. "
            "Take another layout, such as roco."
        )
    package = LAYOUTS[layout].package
    if package and importlib.util.find_spec(package) is None:
        raise UsageError(f"phantom: layout {layout} needs {package}: pip install {package}.")
    if pairs < FEWEST_PAIRS:
        raise UsageError(
            f"phantom: pairs must be at least {FEWEST_PAIRS}, so that every split has some; "
            f"got {pairs}. Ask for more pairs."
        )
    if seed < 0:
        raise UsageError(f"phantom: seed must not be negative; got {seed}. Give 0 or more.")
    if workers is not None and workers < 1:
        raise UsageError(f"phantom: workers must be at least 1; got {workers}. Give 1 or more.")


def _make_folder(out: Path) -> None:
    try:
        if out.exists() and any(out.iterdir()):
            raise UsageError(
                f"phantom: out must be a new or empty folder; {out} has files in it. "
                "Name another folder, or empty this one."
            )
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(out, error) from error


def _unwritable(folder: Path, error: OSError) -> UsageError:
    return UsageError(
        f"phantom: out must be a folder that can be written; {folder}: {error.strerror}. "
        "Name another folder, or change its permissions."
    )


def _write_images(
    write: Callable[[list[Sample]], int], samples: list[Sample], workers: int
) -> Generator[int, None, None]:
    """Write every image and yield the number written, chunk by chunk."""
    chunks = [samples[start : start + _CHUNK] for start in range(0, len(samples), _CHUNK)]
    if workers == 1:
        yield from map(write, chunks)
        return
    # Ctrl-C reaches the whole process group: the parent answers it and stops the workers.
    pool = ProcessPoolExecutor(
        min(workers, len(chunks)),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),
    )
    try:
        yield from pool.map(write, chunks)
    finally:
        pool.shutdown(cancel_futures=True)


def _write_chunk(out: Path, layout: str, domain: str, samples: list[Sample]) -> int:
    # By their names, because their functions cannot be sent to a process.
    place, render = LAYOUTS[layout], DOMAINS[domain].render
    for sample in samples:
        path = out / place.image(sample)
        path.parent.mkdir(parents=True, exist_ok=True)
        place.save(render(sample), path, sample)
    return len(samples)


def _questions(sample: Sample, domain: Domain, place: Layout) -> list[dict[str, Any]]:
    split = place.split(sample)
    if split not in _QUESTION_SPLITS:
        return []
    worded = place.worded(sample)
    true = domain.caption(worded)
    return [
        {"id": place.key(sample), "split": split, "about": detail, "true": true, "false": false}
        for detail, false in domain.false_captions(worded).items()
    ]
