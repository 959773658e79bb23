"""The DALI loader: the plain loader's twin, for which DALI decodes, on a GPU if there is one.

Both give the same samples in the same order with the same crops. DALI decodes what is certain to be
a whole, plain JPEG file; everything else, and a batch that DALI fails on, is decoded as the plain
loader does it, sample by sample.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from medfast.data.decode import plain_jpeg
from medfast.data.loader import Batch, Crops, Loader, Sample, assemble
from medfast.data.order import Draw
from medfast.data.records import Record
from medfast.data.skipped import Skipped
from medfast.data.views import Box, Looks
from medfast.errors import UsageError

T = TypeVar("T")

log = logging.getLogger(__name__)

# Batches that are decoded ahead of the one in use, and files that are looked at to choose a loader.
AHEAD = 2
PROBES = 16


def pick_loader(
    asked: Literal["auto", "dali", "torch"], records: Sequence[Record]
) -> Literal["dali", "torch"]:
    """Return the loader to use: DALI's where it is installed and most images are plain JPEG files.

    Raises:
        UsageError: DALI is asked for and not installed.
    """
    installed = importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali")
    if asked == "dali" and not installed:
        raise UsageError(
            "--loader dali needs NVIDIA DALI, which is not installed: pip install "
            "nvidia-dali-cuda130 (or -cuda120 for older drivers), or use --loader torch."
        )
    if asked != "auto":
        return asked
    if not installed:
        return "torch"
    probed = records[:: max(1, len(records) // PROBES)][:PROBES]
    fit = sum(_is_plain_jpeg(record) for record in probed)
    return "dali" if 2 * fit >= len(probed) else "torch"


def make_loader(kind: str, device: torch.device, *arguments: Any, **keywords: Any) -> Loader:
    """Return a loader, "dali" or "torch", for a model on `device`; the rest is for `Loader`."""
    if kind == "dali":
        return DaliLoader(*arguments, device=device, **keywords)
    return Loader(*arguments, **keywords)


def _is_plain_jpeg(record: Record) -> bool:
    try:
        return plain_jpeg(record.read()) is not None
    except OSError:
        return False


@dataclass(frozen=True)
class _Encoded:
    """A JPEG file for DALI, and what to cut from it."""

    draw: Draw
    data: bytes
    width: int
    height: int
    crops: Crops


class DaliLoader(Loader):
    """A `Loader` whose images DALI decodes and resizes, in threads of this process.

    Args:
        arguments: Those of `Loader`; `workers` are DALI's threads and those that read, at least 1.
        device: Where the images shall be: a GPU decodes them with nvJPEG.
        keywords: As `arguments`.
    """

    def __init__(self, *arguments: Any, device: torch.device, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self.device = device
        self.threads = max(1, self.workers)
        # Batches that DALI failed on.
        self.failures = 0
        self._pipeline: Any = None

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yield the batches of one epoch, from batch `start` on."""
        for batch in _ahead(self._produce(epoch, start), AHEAD):
            for images in (batch.images, *batch.views):
                if images.is_cuda:
                    # Another thread's stream wrote them.
                    images.record_stream(torch.cuda.current_stream(images.device))
            yield batch

    def _produce(self, epoch: int, start: int) -> Iterator[Batch]:
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        with ThreadPoolExecutor(self.threads) as readers:
            # While DALI decodes one batch the files of the next are read.
            reading = (
                [readers.submit(self._fetch, draw) for draw in draws]
                for draws in self.order.batches(epoch, start)
            )
            for futures in _one_ahead(reading):
                items = [future.result() for future in futures]
                with torch.cuda.stream(stream):
                    batch = self._batch(items)
                if stream is not None:
                    stream.synchronize()
                yield batch

    def _fetch(self, draw: Draw) -> _Encoded | Sample | Skipped:
        """Read a file; decode it here unless it is one for DALI."""
        data = self.dataset.read(draw)
        if isinstance(data, Skipped):
            return data
        plain = plain_jpeg(data)
        if plain is None:
            return self.dataset.decode(draw, data)
        crops = self.dataset.crops(draw, plain.width, plain.height)
        return _Encoded(draw, data, plain.width, plain.height, crops)

    def _batch(self, items: Sequence[_Encoded | Sample | Skipped]) -> Batch:
        encoded = [item for item in items if isinstance(item, _Encoded)]
        decoded: list[Tensor] = []
        if encoded:
            try:
                decoded = self._run(encoded)
            except RuntimeError as error:
                # It cannot be used after an error.
                self._pipeline = None
                self.failures += 1
                log.warning("DALI failed on a batch, decoding it one by one: %s", _reason(error))
                items = [
                    self.dataset.decode(item.draw, item.data)
                    if isinstance(item, _Encoded)
                    else item
                    for item in items
                ]
        good = [item for item in items if not isinstance(item, Skipped)]
        draws = [item.draw for item in good]
        looks: list[tuple[Looks, ...]] = [
            item.looks if isinstance(item, Sample) else item.crops.looks for item in good
        ]
        stacks = [self._stack(good, decoded, view) for view in range(1 + self.dataset.extra.images)]
        skipped = [item for item in items if isinstance(item, Skipped)]
        return assemble(draws, stacks, looks, skipped, self.dataset, self.tokenizer)

    def _stack(
        self, good: Sequence[_Encoded | Sample], decoded: Sequence[Tensor], view: int
    ) -> Tensor:
        """Return one view of B pairs, DALI's and others in their order, uint8 [B, 3, H, W]."""
        if decoded and len(decoded[view]) == len(good):
            return decoded[view].permute(0, 3, 1, 2)
        size = self.dataset.size
        images = torch.empty(len(good), size, size, 3, dtype=torch.uint8, device=self.device)
        others = [row for row, item in enumerate(good) if isinstance(item, Sample)]
        if others:
            pixels = [item.pixels[view] for item in good if isinstance(item, Sample)]
            images[others] = torch.from_numpy(np.stack(pixels)).to(self.device)
        if decoded:
            images[[row for row in range(len(good)) if row not in set(others)]] = decoded[view]
        return images.permute(0, 3, 1, 2)

    def _run(self, encoded: Sequence[_Encoded]) -> list[Tensor]:
        """Return the crops of N JPEG files, uint8 [N, H, W, 3] for each view.

        Raises:
            RuntimeError: DALI cannot decode one of them.
        """
        size, views = self.dataset.size, 1 + self.dataset.extra.images
        if self._pipeline is None:
            self._pipeline = _pipeline(
                self.order.batch_size, self.threads, self.device, size, views
            )
        regions = np.array([_region(item, size) for item in encoded])
        corners = regions[:, :2]
        self._pipeline.feed_input("data", [np.frombuffer(item.data, np.uint8) for item in encoded])
        self._feed_points("anchor", corners, np.int32)
        self._feed_points("shape", regions[:, 2:] - corners, np.int32)
        for view in range(views):
            boxes = np.array([item.crops.boxes[view] for item in encoded])
            self._feed_points(f"start_{view}", boxes[:, :2] - corners, np.float32)
            self._feed_points(f"end_{view}", boxes[:, 2:] - corners, np.float32)
        return [self._copy(output) for output in self._pipeline.run()]

    def _feed_points(self, name: str, points: np.ndarray, dtype: type) -> None:
        """Give DALI one point (x, y) per sample; it wants y before x."""
        self._pipeline.feed_input(name, np.ascontiguousarray(points[:, ::-1], dtype))

    def _copy(self, output: Any) -> Tensor:
        """Return DALI's output [N, H, W, 3] as a tensor of its own."""
        if self.device.type != "cuda":
            return torch.from_numpy(np.array(output.as_array()))
        from nvidia.dali.plugin.pytorch import feed_ndarray

        dense = output.as_tensor()
        images = torch.empty(dense.shape(), dtype=torch.uint8, device=self.device)
        feed_ndarray(dense, images, cuda_stream=torch.cuda.current_stream(self.device))
        return images


def _reason(error: RuntimeError) -> str:
    """Return the line of DALI's message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if not line.startswith("Error in")), "no reason given")


def _region(item: _Encoded, size: int) -> tuple[int, int, int, int]:
    """Return the part of an image to decode, in whole pixels: all that its crops depend on."""
    if len(item.crops.boxes) > 1:
        return 0, 0, item.width, item.height
    left, top, right, bottom = box = item.crops.boxes[0]
    margin = _margin(box, size)
    return (
        max(0, math.floor(left) - margin),
        max(0, math.floor(top) - margin),
        min(item.width, math.ceil(right) + margin),
        min(item.height, math.ceil(bottom) + margin),
    )


def _margin(box: Box, size: int) -> int:
    """Return how far beyond a crop its reduction to `size` pixels looks, in pixels of the image."""
    return 1 + math.ceil(max(1.0, box[2] - box[0], box[3] - box[1]) / size)


def _pipeline(batch_size: int, threads: int, device: torch.device, size: int, views: int) -> Any:
    """Return the DALI pipeline: decode a region of each file, then cut and resize every view."""
    from nvidia.dali import Pipeline, fn, types

    gpu = device.type == "cuda"
    # One batch at a time: `_ahead` keeps several in flight, and a failed one can be told.
    pipeline = Pipeline(
        batch_size,
        threads,
        torch.cuda.current_device() if gpu and device.index is None else device.index,
        exec_async=False,
        exec_pipelined=False,
        prefetch_queue_depth=1,
    )
    with pipeline:
        images = fn.decoders.image_slice(
            fn.external_source(name="data", dtype=types.UINT8, ndim=1),
            fn.external_source(name="anchor", dtype=types.INT32, ndim=1),
            fn.external_source(name="shape", dtype=types.INT32, ndim=1),
            axis_names="HW",
            normalized_anchor=False,
            normalized_shape=False,
            device="mixed" if gpu else "cpu",
            output_type=types.RGB,
        )
        outputs = [
            fn.resize(
                images,
                size=(size, size),
                roi_start=fn.external_source(name=f"start_{view}", dtype=types.FLOAT, ndim=1),
                roi_end=fn.external_source(name=f"end_{view}", dtype=types.FLOAT, ndim=1),
                interp_type=types.INTERP_LINEAR,
                antialias=True,
            )
            for view in range(views)
        ]
        pipeline.set_outputs(*outputs)
    pipeline.build()
    return pipeline


def _ahead(items: Iterator[T], depth: int) -> Iterator[T]:
    """Yield `items`, of which a thread makes up to `depth` ahead."""
    end = object()
    pool = ThreadPoolExecutor(1)
    try:
        waiting = deque(pool.submit(next, items, end) for _ in range(depth))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, items, end))
            yield item  # type: ignore[misc]  # not `end`
    finally:
        pool.shutdown(cancel_futures=True)


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """Yield `items`, each after the next one was made."""
    before: list[T] = []
    for item in items:
        before.append(item)
        if len(before) == 2:
            yield before.pop(0)
    yield from before
