"""`python -m benchmarks.loaders`: images per second of medfast's loaders beside open_clip's.

512-pixel JPEG files become 224-pixel training crops, normalised in fp32, with token ids; from files
and from shards, with the same number of threads or processes each. `--device cuda` adds nvJPEG.
`--soak N` reads N samples and fails if the memory grows.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import results
from benchmarks.conditions import conditions
from medfast.data import read_split
from medfast.data.loader import Batch, Loader
from medfast.data.pack import pack
from medfast.data.pipelines import DaliLoader, pick_loader
from medfast.data.records import Record
from medfast.data.tokens import Tokenizer
from medfast.models import PRESETS

NAME = "loaders"
PRESET = PRESETS["vit_b16_clip"]
SIDE, SIZE, BATCH_SIZE = 512, 224, 64
# Files that differ; a data set repeats them.
FILES = 256
CAPTION = "Axial computed tomography of the chest shows a small nodule in the left upper lobe."
# What medfast's crops keep at least, and open_clip's with its defaults.
CROP = 0.9
# open_clip's loader over its own, as asked, and the growth of memory over all samples in bytes.
WANTED = 1.25
MOST_GROWTH = 64 * 2**20
# Of a card's dense bf16 peak, what training of a ViT reaches.
UTILISATION = 0.4
PEAKS = {"A100": 312e12, "H200": 989e12}

# A variant makes an iterator over its batches of normalised images, one epoch long.
Variant = Callable[[], Iterator[Tensor]]


def write_images(folder: Path, count: int = FILES, side: int = SIDE) -> list[Path]:
    """Write photograph-like JPEG files, whose detail falls with its scale, and return them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    weight = np.maximum(frequency, 1 / side) ** -1.1
    paths = []
    for number in range(count):
        waves = np.fft.rfft2(rng.normal(size=(3, side, side))) * weight
        pixels = np.fft.irfft2(waves, s=(side, side))
        low, high = pixels.min(), pixels.max()
        levels = ((pixels - low) * (255 / (high - low))).astype(np.uint8)
        paths.append(folder / f"{number:04d}.jpg")
        Image.fromarray(levels.transpose(1, 2, 0)).save(paths[-1], quality=90)
    return paths


def sources(folder: Path, samples: int, shards: int = 8) -> dict[str, list[Record]]:
    """Write the images and return `samples` records of them, as files and as shards."""
    paths = write_images(folder / "images")
    files = [Record(f"{n:06d}", paths[n % len(paths)], f"{CAPTION} {n}") for n in range(samples)]
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(["filepath", "title"])
        writer.writerows([record.image, record.caption] for record in files)
    pack(
        {"train": {"csv": files}},
        folder / "shards",
        roots={"csv": folder},
        samples_per_shard=-(-samples // shards),
    )
    return {"files": files, "shards": read_split("shards", folder / "shards", "train").records}


def own(
    kind: str, records: Sequence[Record], tokenizer: Tokenizer, threads: int, device: torch.device
) -> Variant:
    """Return one of medfast's loaders as a variant."""
    arguments = (records, tokenizer, SIZE, BATCH_SIZE, CROP, 0, threads)
    loader = DaliLoader(*arguments, device=device) if kind == "dali" else Loader(*arguments)
    # By rows of pixels, whose three channels follow one another, and into memory that is kept.
    mean, std = (torch.tensor(x).repeat(SIZE).to(device) * 255 for x in (PRESET.mean, PRESET.std))
    room = torch.empty(BATCH_SIZE, SIZE, SIZE * 3, device=device)
    epochs = itertools.count()

    def batches() -> Iterator[Tensor]:
        for batch in loader.epoch(next(epochs)):
            rows = batch.to(device).images.permute(0, 2, 3, 1).flatten(2)
            torch.sub(rows, mean, out=room[: len(batch)]).div_(std)
            yield room[: len(batch)].unflatten(2, (SIZE, 3)).permute(0, 3, 1, 2)

    return batches


def open_clip(folder: Path, place: str, samples: int, threads: int) -> Variant:
    """Return open_clip's own training loader as a variant."""
    import open_clip as library
    from open_clip_train.data import get_csv_dataset, get_wds_dataset

    shards = sorted((folder / "shards" / "train").glob("*.tar"))
    arguments = argparse.Namespace(
        train_data=str(folder / "pairs.csv")
        if place == "files"
        else f"{shards[0].parent}/{{{shards[0].stem}..{shards[-1].stem}}}.tar",
        train_num_samples=samples,
        train_data_upsampling_factors=None,
        csv_img_key="filepath",
        csv_caption_key="title",
        csv_separator="\t",
        batch_size=BATCH_SIZE,
        workers=threads,
        world_size=1,
        distributed=False,
        seed=0,
    )
    transform = library.image_transform(SIZE, is_train=True)
    make = get_csv_dataset if place == "files" else get_wds_dataset
    tokenizer = library.get_tokenizer("ViT-B-16")
    data = make(arguments, transform, is_train=True, epoch=0, tokenizer=tokenizer)

    def batches() -> Iterator[Tensor]:
        with warnings.catch_warnings():
            # Of pinned memory, where there is no GPU.
            warnings.simplefilter("ignore")
            for images, _ in data.dataloader:
                yield images

    return batches


def rate(variant: Variant) -> float:
    """Return images per second of an epoch, from its first batch on: starting is not counted."""
    batches = variant()
    next(batches)
    begin, images = time.perf_counter(), 0
    for batch in batches:
        images += len(batch)
        if batch.is_cuda:
            torch.cuda.synchronize()
    return images / (time.perf_counter() - begin)


def check(records: Sequence[Record], tokenizer: Tokenizer, device: torch.device) -> float:
    """Return by how much the DALI loader's pixels differ from the plain one's, in levels of 255.

    Raises:
        AssertionError: other samples, DALI failed, or the mean difference is 0.5 or more.
    """
    arguments = (records[: 2 * BATCH_SIZE], tokenizer, SIZE, BATCH_SIZE, CROP, 0, 1)
    dali = DaliLoader(*arguments, device=device)
    worst = 0.0
    for a, b in zip(Loader(*arguments).epoch(0), dali.epoch(0), strict=True):
        assert torch.equal(a.index, b.index)
        assert torch.equal(a.ids, b.ids)
        difference = (a.images.int() - b.images.cpu().int()).abs().float().mean((1, 2, 3))
        worst = max(worst, difference.max().item())
    assert dali.failures == 0
    assert worst < 0.5, worst
    return worst


def compare(
    folder: Path, samples: int, threads: Sequence[int], rounds: int, device: torch.device
) -> list[dict[str, Any]]:
    """Return one row per place, number of threads and loader, measured in turn."""
    tokenizer = Tokenizer.train([CAPTION], 512, 77)
    cpu = torch.device("cpu")
    rows: list[dict[str, Any]] = []
    for place, records in sources(folder, samples).items():
        assert pick_loader("auto", records) == "dali"
        difference = check(records, tokenizer, device)
        for count in threads:
            variants = {
                "medfast dali": own("dali", records, tokenizer, count, cpu),
                "medfast torch": own("torch", records, tokenizer, count, cpu),
                "open_clip": open_clip(folder, place, samples, count),
            }
            if device.type == "cuda":
                variants["medfast dali, nvJPEG"] = own("dali", records, tokenizer, count, device)
            found: dict[str, list[float]] = {name: [] for name in variants}
            for _ in range(rounds):
                for name, variant in variants.items():
                    found[name].append(rate(variant))
            for name, rates in found.items():
                rows.append(
                    {
                        "place": place,
                        "threads": count,
                        "variant": name,
                        "images_per_s": median(rates),
                        "all": rates,
                        "difference": difference if name.startswith("medfast dali") else None,
                    }
                )
    return rows


def verdicts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the DALI loader over open_clip's, from each place at each number of threads."""
    rates = {(row["place"], row["threads"], row["variant"]): row["images_per_s"] for row in rows}
    return [
        {
            "place": place,
            "threads": threads,
            "wanted": WANTED,
            "measured": value / rates[place, threads, "open_clip"],
            "met": value >= WANTED * rates[place, threads, "open_clip"],
        }
        for (place, threads, variant), value in rates.items()
        if variant == "medfast dali"
    ]


def soak(folder: Path, samples: int, kind: str, threads: int) -> dict[str, Any]:
    """Read `samples` samples and return how the memory of this process and its children grew.

    Raises:
        AssertionError: from the first fifth on it grew by more than `MOST_GROWTH`.
    """
    paths = write_images(folder / f"soak {kind}")
    records = [Record(f"{n:06d}", paths[n % len(paths)], f"{CAPTION} {n}") for n in range(samples)]
    tokenizer = Tokenizer.train([CAPTION], 512, 77)
    arguments = (records, tokenizer, SIZE, BATCH_SIZE, CROP, 0, threads)
    cpu = torch.device("cpu")
    loader = DaliLoader(*arguments, device=cpu) if kind == "dali" else Loader(*arguments)
    sizes: list[int] = []
    batch: Batch
    for number, batch in enumerate(loader.epoch(0)):
        assert len(batch) == BATCH_SIZE
        if number % max(1, len(loader) // 20) == 0:
            sizes.append(resident())
    settled = max(sizes[2 : len(sizes) // 5 + 2])
    growth = max(sizes) - settled
    assert growth < MOST_GROWTH, sizes
    return {"loader": kind, "samples": samples, "settled_bytes": settled, "growth_bytes": growth}


def resident() -> int:
    """Return the resident memory of this process and its children in bytes, shared pages once."""
    total = 0
    for pid in [os.getpid(), *_children(os.getpid())]:
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += 1024 * int(text.partition("Pss:")[2].split()[0])
    return total


def _children(pid: int) -> list[int]:
    found = []
    for path in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += [int(child) for child in path.read_text().split()]
    return found


def needed() -> dict[str, float]:
    """Return the pairs per second at which a card trains ViT-B/16, at `UTILISATION` of its peak.

    A prediction from FLOPs, counted on one pair; three times the forward pass.
    """
    from torch.utils.flop_counter import FlopCounterMode

    from medfast.models.pair import ImageTextModel

    model = ImageTextModel(PRESET, PRESET.vocab_size, {})
    images = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    ids = torch.ones(1, PRESET.context_length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images, ids, ids.bool())
    flops = 3 * counter.get_total_flops()
    return {card: UTILISATION * peak / flops for card, peak in PEAKS.items()}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rates as a Markdown table, with open_clip's as the measure."""
    base = {
        (r["place"], r["threads"]): r["images_per_s"] for r in rows if r["variant"] == "open_clip"
    }
    lines = ["| from | threads | loader | images/s | times open_clip's |", "| --- " * 5 + "|"]
    for row in rows:
        value = row["images_per_s"]
        ratio = value / base[row["place"], row["threads"]]
        cells = [
            row["place"],
            str(row["threads"]),
            row["variant"],
            f"{value:,.0f}",
            f"{ratio:.2f}x",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> list[str]:
    """Return a result as paragraphs of Markdown."""
    missed = [one for one in result["targets"] if not one["met"]]
    places = ", ".join(f"{one['place']} with {one['threads']} threads" for one in missed)
    verdict = f"NOT MET from {places}" if missed else "met"
    cards = ", ".join(f"{rate:,.0f} on an {card}" for card, rate in result["needed"].items())
    return [
        f"{SIDE}-pixel JPEG files to {SIZE}-pixel training crops with token ids, {BATCH_SIZE} per "
        "batch, normalised in fp32; open_clip with its own data sets and transform:",
        table(result["rows"]),
        f"Wanted of DALI: {WANTED}x open_clip's, {verdict}. Predicted need of ViT-B/16 beside it, "
        f"pairs/s at {UTILISATION:.0%} of the card's bf16 peak: {cards}.",
    ]


def main() -> None:
    """Measure, print the table and write the JSON."""
    cores = len(os.sched_getaffinity(0))
    default = [n for n in (1, 2, 4, 8, 16, 32) if n <= cores]
    parser = argparse.ArgumentParser(prog="benchmarks.loaders", description=__doc__)
    parser.add_argument("--samples", type=int, default=1536, help="of an epoch (default: 1536)")
    parser.add_argument("--threads", type=int, nargs="+", default=default, metavar="N")
    parser.add_argument("--rounds", type=int, default=3, help="epochs of each (default: 3)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--soak", type=int, metavar="N", help="only this, over N samples")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if given.soak:
            threads = given.threads[-1]
            for kind in ("dali", "torch"):
                print(soak(Path(folder), given.soak, kind, threads))
            return
        device = torch.device(given.device)
        rows = compare(Path(folder), given.samples, given.threads, given.rounds, device)
    found = verdicts(rows)
    path = results.write(NAME, conditions(given.device), rows=rows, targets=found, needed=needed())
    print(table(rows))
    for one in found:
        verdict = "met" if one["met"] else "NOT MET"
        print(
            f"{one['place']}, {one['threads']} threads: wanted {one['wanted']}x, measured "
            f"{one['measured']:.2f}x: {verdict}",
            file=sys.stderr,
        )
    print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
