"""What a run of the suite is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Plan:
    """What to evaluate on what, and how.

    Attributes:
        suite: Its name, of `medfast.evals.suite.SUITES`.
        flag: What the model is given by, "--checkpoint" or "--model".
        source: The model: a run folder, a checkpoint, a folder of another library's model or the
            name of one on a hub.
        roots: Folder of each data set to evaluate, in the suite's order; it need not be there.
        out: Where results go.
        cache: Where the features of images are kept.
        skip_existing: Keep results that are there.
        prompts: Of zero-shot classification, of `medfast.evals.prompts.CHOICES`.
        vqa_finetune: Train the towers for VQA too.
        batch_size: Images that the towers take at once.
        workers: Processes that decode.
        device: As of `medfast train`.
        precision: As of `medfast train`.
        seed: Of intervals, of the draws of labels and of the VQA head.
    """

    suite: str
    flag: str
    source: str
    roots: dict[str, Path]
    out: Path
    cache: Path
    skip_existing: bool = False
    prompts: str = "default"
    vqa_finetune: bool = False
    batch_size: int = 128
    workers: int = 0
    device: str = "auto"
    precision: str = "auto"
    seed: int = 0
