"""What a method asks of a pair, and what a view of an image is: its crop and its looks."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Box = tuple[float, float, float, float]

# The extra views, as SimCLR's but for the hue, which grey images do not have, and with crops that
# keep enough of the image to have something in common.
SMALLEST_CROP = 0.3
JITTER = 0.4
GREY_SHARE = 0.2
BLUR_SHARE = 0.5
BLUR_SIGMA = (0.1, 2.0)
# Weights of red, green and blue in grey (ITU-R BT.601).
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Extra:
    """What a method asks of every pair beyond its main view and its caption.

    Attributes:
        images: Number of augmented views of the image.
        flip: These may be flipped: not where they meet captions, which tell left from right.
        texts: Number of views of the caption, with words dropped or swapped.
        masked: The caption with tokens masked, for a masked language model.
    """

    images: int = 0
    flip: bool = True
    texts: int = 0
    masked: bool = False


NO_EXTRA = Extra()


@dataclass(frozen=True)
class Looks:
    """How an extra view differs from its crop.

    Attributes:
        flip: Left and right are swapped.
        brightness: Factor of all values.
        contrast: Factor of the distance to the image's mean grey.
        saturation: Factor of the distance to each pixel's grey; 0 is grey.
        sigma: Of a Gaussian blur, in pixels of the view; 0 is none.
    """

    flip: bool
    brightness: float
    contrast: float
    saturation: float
    sigma: float


def centre_box(width: int, height: int) -> Box:
    """Return the largest square in the middle as (left, top, right, bottom) in pixels."""
    side = min(width, height)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(width: int, height: int, smallest: float, rng: random.Random) -> Box:
    """Return a random crop that keeps at least `smallest` of the image's area.

    It is nearly square, or as near as its share of a long image lets it be.
    """
    share = rng.uniform(smallest, 1) * width * height
    ratio = rng.uniform(0.9, 1.1)
    # What one side has no room for, the other takes.
    side_w = max(min((share * ratio) ** 0.5, width), share / height)
    side_h = max(min((share / ratio) ** 0.5, height), share / width)
    left, top = rng.uniform(0, width - side_w), rng.uniform(0, height - side_h)
    return left, top, left + side_w, top + side_h


@dataclass(frozen=True)
class SquareCrop:
    """Random squares of one size: what resizing the short side and then cutting gives.

    Attributes:
        share: Side of the square, as a share of the image's short side.
    """

    share: float

    def box(self, width: int, height: int, rng: random.Random) -> Box:
        """Return one of an image of this size."""
        side = self.share * min(width, height)
        left, top = rng.uniform(0, width - side), rng.uniform(0, height - side)
        return left, top, left + side, top + side


def random_looks(rng: random.Random, flip: bool) -> Looks:
    """Return the looks of an extra view; without `flip` they are the same, but never flipped."""
    flipped = rng.random() < 0.5 and flip
    brightness, contrast, saturation = (rng.uniform(1 - JITTER, 1 + JITTER) for _ in range(3))
    grey, blurred = rng.random() < GREY_SHARE, rng.random() < BLUR_SHARE
    sigma = rng.uniform(*BLUR_SIGMA)
    saturation, sigma = 0.0 if grey else saturation, sigma if blurred else 0.0
    return Looks(flipped, brightness, contrast, saturation, sigma)


def apply_looks(images: Tensor, looks: Sequence[Looks]) -> Tensor:
    """Return the views of cropped images: flipped, jittered, blurred, in that order.

    Args:
        images: uint8 [B, 3, H, W], on any device.
        looks: Of each image.

    Returns:
        uint8 [B, 3, H, W], channels last.
    """

    def column(name: str) -> Tensor:
        values = [float(getattr(look, name)) for look in looks]
        return torch.tensor(values, device=images.device).view(-1, 1, 1, 1)

    x = images.float()
    x = torch.where(column("flip") > 0, x.flip(-1), x)
    x = (x * column("brightness")).clamp_(0, 255)
    luma = torch.tensor(_LUMA, device=x.device).view(1, 3, 1, 1)
    mean = (x * luma).sum(1, keepdim=True).mean((2, 3), keepdim=True)
    x = torch.lerp(mean, x, column("contrast")).clamp_(0, 255)
    x = torch.lerp((x * luma).sum(1, keepdim=True), x, column("saturation")).clamp_(0, 255)
    x = _blur(x, [look.sigma for look in looks])
    return x.round_().to(torch.uint8).contiguous(memory_format=torch.channels_last)


def _blur(x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Blur each image with a Gaussian of its own width; edges are mirrored."""
    # The same for every batch, so that an image's view does not depend on its neighbours.
    radius = min(math.ceil(2 * BLUR_SIGMA[1]), x.shape[-1] - 1, x.shape[-2] - 1)
    if radius < 1 or not any(sigmas):
        return x
    offsets = torch.arange(-radius, radius + 1, device=x.device, dtype=x.dtype)
    # A width near 0 gives a kernel of one 1, which changes nothing.
    width = torch.tensor(sigmas, device=x.device, dtype=x.dtype).clamp_(min=1e-3).unsqueeze(1)
    kernel = torch.softmax(-(offsets**2) / (2 * width**2), 1).repeat_interleave(3, 0)
    b, c, h, w = x.shape
    rows = x.reshape(1, b * c, h, w)
    rows = F.conv2d(
        F.pad(rows, (radius, radius, 0, 0), "reflect"), kernel[:, None, None, :], groups=b * c
    )
    rows = F.conv2d(
        F.pad(rows, (0, 0, radius, radius), "reflect"), kernel[:, None, :, None], groups=b * c
    )
    return rows.view(b, c, h, w)
