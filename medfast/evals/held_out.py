"""The evaluation that ends a training run: everything the held-out split can answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from medfast.data.records import Record
from medfast.evals.encode import Embeddings, Encoder
from medfast.evals.retrieval import retrieval
from medfast.evals.two_choice import two_choice
from medfast.evals.zero_shot import zero_shot

# Asked zero-shot. The phantom's other label sets only make sense together with a finding: the
# two-choice questions ask for them.
LABEL_SETS = ("modality", "finding")


def evaluate_held_out(
    encoder: Encoder,
    embeddings: Embeddings,
    records: Sequence[Record],
    sidecar: dict[str, Any] | None,
    split: str,
) -> Iterator[dict[str, Any]]:
    """Yield one result per task, as soon as it is there.

    Args:
        encoder: The trained model.
        embeddings: Features of the split's readable pairs.
        records: The split's pairs.
        sidecar: Labels and questions of the data set; without it, only retrieval is asked.
        split: Name of the split.
    """
    yield {"task": "retrieval", "name": "", "split": split, **retrieval(embeddings)}
    if sidecar is None:
        return
    keys = [records[i].key for i in embeddings.index.tolist()]
    groups = embeddings.group.tolist()
    for name in LABEL_SETS:
        classes = sidecar["label_sets"][name]
        labels = [sidecar["samples"][key]["labels"][name] for key in keys]
        found = zero_shot(encoder, embeddings.image, labels, groups, classes["prompts"])
        yield {"task": "zero_shot", "name": name, "split": split, **found}
    row_of = {key: row for row, key in enumerate(keys)}
    questions = [q for q in sidecar["questions"] if q["split"] == split and q["id"] in row_of]
    kinds = sorted({q["about"] for q in questions})
    for name in [*kinds, "all"]:
        asked = [q for q in questions if name in (q["about"], "all")]
        rows = [row_of[q["id"]] for q in asked]
        found = two_choice(
            encoder,
            embeddings.image[rows],
            [groups[row] for row in rows],
            [q["true"] for q in asked],
            [q["false"] for q in asked],
        )
        yield {"task": "two_choice", "name": name, "split": split, **found}
