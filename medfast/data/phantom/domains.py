"""The domains of the phantom: what their pictures show, in words and in pixels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Generic

from PIL import Image

from medfast.data.phantom import general, medical
from medfast.data.phantom.cases import DETAILS, WRONG, C, Family, Sample, sample_all


@dataclass(frozen=True)
class Domain(Generic[C]):
    """Cases, their captions and their images.

    Attributes:
        name: What the folder of the cache and the sidecar are called.
        version: Raised whenever the same arguments give other files, so that old caches are left
            behind.
        classes: The names of the classes of every label set.
        family: Draws cases.
        caption: Words one.
        prompts: The zero-shot prompts of a label set: several phrases per class.
        render: Draws one.
        salt: Begins every key, so that domains share no draws.
        offset: Added to the numbers of samples and studies, so that domains share no names.
    """

    name: str
    version: int
    classes: dict[str, tuple[str, ...]]
    family: Family[C]
    caption: Callable[[Sample[C]], str]
    prompts: Callable[[str], list[list[str]]]
    render: Callable[[Sample[C]], Image.Image]
    salt: tuple[int, ...] = ()
    offset: int = 0

    def samples(self, pairs: int, seed: int) -> list[Sample[C]]:
        """Return the samples of every split in the order of their ids."""
        return sample_all(pairs, seed, self.family, self.salt, self.offset)

    def labels(self, case: C) -> dict[str, int | None]:
        """Return the class index under every label set, None where it does not apply."""
        names = case.names()
        return {
            label: classes.index(names[label]) if label in names else None
            for label, classes in self.classes.items()
        }

    def false_captions(self, sample: Sample[C]) -> dict[str, str]:
        """Return, by side, size and count, the caption with that detail alone made wrong.

        Details that the caption does not tell are left out.
        """
        finding = sample.case.finding
        if finding is None:
            return {}
        true, rng = self.caption(sample), sample.rng(WRONG)
        altered = {detail: finding.altered(detail, rng) for detail in DETAILS}
        captions = {
            detail: self.caption(replace(sample, case=replace(sample.case, finding=other)))
            for detail, other in altered.items()
        }
        return {detail: false for detail, false in captions.items() if false != true}


DOMAINS: dict[str, Domain[Any]] = {
    "medical": Domain(
        "phantom",
        version=1,
        classes=medical.CLASSES,
        family=medical.family,
        caption=medical.caption,
        prompts=medical.prompts,
        render=medical.render,
    ),
    "general": Domain(
        "phantom-general",
        version=1,
        classes=general.CLASSES,
        family=general.family,
        caption=general.caption,
        prompts=general.prompts,
        render=general.render,
        salt=(1,),
        offset=1_000_000,
    ),
}
