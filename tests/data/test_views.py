import dataclasses
import random

import numpy as np
import pytest
import torch

from medfast.data.views import (
    Looks,
    SquareCrop,
    apply_looks,
    centre_box,
    random_box,
    random_looks,
)

PLAIN = Looks(False, 1.0, 1.0, 1.0, 0.0)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    shape = (3, 12, 10, 3)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)


def _looks(**changes):
    return Looks(**{**PLAIN.__dict__, **changes})


@pytest.mark.parametrize(("width", "height"), [(1, 1), (40, 60), (600, 20), (513, 512)])
def test_boxes_lie_in_the_image(width, height):
    rng = random.Random(0)
    for box in [centre_box(width, height)] + [
        random_box(width, height, 0.3, rng) for _ in range(99)
    ]:
        left, top, right, bottom = box
        assert 0 <= left < right <= width + 1e-9
        assert 0 <= top < bottom <= height + 1e-9


def test_a_square_image_keeps_the_share_asked_for():
    rng = random.Random(1)
    for _ in range(200):
        left, top, right, bottom = random_box(100, 100, 0.8, rng)
        assert (right - left) * (bottom - top) > 0.75 * 100 * 100


@pytest.mark.parametrize(("width", "height"), [(100, 100), (512, 384), (600, 20), (20, 600)])
def test_a_crop_of_any_image_keeps_the_share_asked_for(width, height):
    rng = random.Random(1)
    for _ in range(200):
        left, top, right, bottom = random_box(width, height, 0.8, rng)
        assert (right - left) * (bottom - top) > 0.8 * width * height - 1e-6


def test_a_crop_that_fits_is_nearly_square():
    rng = random.Random(1)
    for _ in range(200):
        left, top, right, bottom = random_box(400, 300, 0.3, rng)
        if bottom - top < 300:
            assert 0.9 - 1e-9 < (right - left) / (bottom - top) < 1.1 + 1e-9


def test_plain_looks_change_nothing(images):
    assert torch.equal(apply_looks(images, [PLAIN] * 3), images)


def test_a_flip_swaps_left_and_right_of_its_image_alone(images):
    found = apply_looks(images, [PLAIN, _looks(flip=True), PLAIN])
    assert torch.equal(found[1], images[1].flip(-1))
    assert torch.equal(found[0], images[0])


def test_looks_follow_their_formulas(images):
    x = images[0].numpy().astype(np.float64)
    luma = np.array([0.299, 0.587, 0.114]).reshape(3, 1, 1)
    bright = np.clip(x * 1.3, 0, 255)
    mean = (bright * luma).sum(0).mean()
    contrast = np.clip(mean + 0.7 * (bright - mean), 0, 255)
    grey = (contrast * luma).sum(0)
    expected = np.clip(grey + 1.2 * (contrast - grey), 0, 255)
    look = _looks(brightness=1.3, contrast=0.7, saturation=1.2)
    found = apply_looks(images[:1], [look])[0].numpy()
    assert np.abs(found - expected).max() <= 0.51


def test_no_saturation_is_grey(images):
    found = apply_looks(images, [_looks(saturation=0.0)] * 3)
    assert torch.equal(found[:, 0], found[:, 1])
    assert torch.equal(found[:, 0], found[:, 2])


def test_a_blur_is_a_gaussian_of_each_images_own_width():
    point = torch.zeros(2, 3, 31, 31, dtype=torch.uint8)
    point[:, :, 15, 15] = 255
    narrow, wide = apply_looks(point, [_looks(sigma=0.6), _looks(sigma=1.5)]).float()
    for found, sigma in ((narrow, 0.6), (wide, 1.5)):
        offsets = np.arange(-4, 5)
        kernel = np.exp(-(offsets**2) / (2 * sigma**2))
        kernel /= kernel.sum()
        expected = 255 * np.outer(kernel, kernel)
        assert np.abs(found[0, 11:20, 11:20].numpy() - expected).max() <= 0.51


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiny_images_can_be_blurred(size):
    images = torch.full((1, 3, size, size), 100, dtype=torch.uint8)
    assert torch.equal(apply_looks(images, [_looks(sigma=2.0)]), images)


def test_looks_do_not_depend_on_their_neighbours(images):
    looks = [random_looks(random.Random(i), True) for i in range(3)]
    together = apply_looks(images, looks)
    for i in range(3):
        alone = apply_looks(images[i : i + 1], looks[i : i + 1])[0]
        assert (together[i].int() - alone.int()).abs().max() <= 1


def test_without_flips_all_other_looks_stay():
    free, kept = (
        [random_looks(random.Random(i), flip) for i in range(64)] for flip in (True, False)
    )
    assert 16 < sum(look.flip for look in free) < 48
    assert kept == [dataclasses.replace(look, flip=False) for look in free]


def test_views_are_channels_last(images):
    found = apply_looks(images, [random_looks(random.Random(i), True) for i in range(3)])
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert found.dtype == torch.uint8


def test_square_crops_have_one_size_and_lie_anywhere_in_the_image():
    rng = random.Random(0)
    boxes = [SquareCrop(224 / 512).box(1024, 512, rng) for _ in range(400)]
    for left, top, right, bottom in boxes:
        assert right - left == pytest.approx(224)
        assert bottom - top == pytest.approx(224)
        assert left >= 0
        assert top >= 0
        assert right <= 1024
        assert bottom <= 512
    lefts, tops = [box[0] for box in boxes], [box[1] for box in boxes]
    assert min(lefts) < 40
    assert max(lefts) > 760
    assert min(tops) < 15
    assert max(tops) > 273
