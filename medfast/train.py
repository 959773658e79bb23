"""`python -m medfast.train`: data, model and method to a trained, evaluated run folder."""

from __future__ import annotations

import dataclasses
import logging
import random
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from medfast import __version__, cli, parts
from medfast.config import TrainConfig, resumed
from medfast.data import SPLITS
from medfast.errors import UsageError

if TYPE_CHECKING:
    import torch

    from medfast.data.loader import Loader
    from medfast.data.records import Record
    from medfast.evals.encode import Embeddings, Encoder
    from medfast.methods.base import Method
    from medfast.run_folder import RunFolder

T = TypeVar("T")

# By name: run as a command, this module is called __main__.
log = logging.getLogger("medfast.train")

EVAL_BATCH_SIZE = 128
# Pairs that are scored after every epoch for the run's curves.
VALIDATION_PAIRS = 512
# Held-out pairs that the report shows, and how many of them with attention maps.
CONTACT_EXAMPLES = 24
ATTENTION_EXAMPLES = 8
PHANTOM_NOTE = (
    "The phantom is generated: a stand-in that shows whether training works, not a medical result."
)
CREDENTIALED_NOTE = (
    "The data are given to single persons under an agreement: their images are left out here."
)


def main(argv: Sequence[str] | None = None) -> None:
    """Run `python -m medfast.train ...`."""

    def command() -> None:
        config, given = cli.parse_train(argv)
        cli.log_to_console()
        started = time.perf_counter()
        path = train(config, given)
        if path is not None:
            log.info(
                "finished in %.0f s; the run folder is %s", time.perf_counter() - started, path
            )

    cli.run(command, "medfast.train")


def train(config: TrainConfig, given: Collection[str] = ()) -> Path | None:
    """Train, evaluate and report one run.

    Args:
        config: The settings.
        given: Names of the settings that were asked for; on --resume they must agree with the
            run's own, and all others are taken from it.

    Returns:
        The run folder; None for a dry run.

    Raises:
        UsageError: something that the user can mend.
    """
    from medfast import checkpoint
    from medfast.device import pick_device
    from medfast.dry_run import describe
    from medfast.run_folder import RunFolder

    state = None
    if config.resume is not None:
        path = checkpoint.find(config.resume, Path(config.logs).expanduser(), config.name)
        state = checkpoint.load(path)
        config = resumed(config, given, state["config"])
        run = RunFolder(path.parent.parent)
    device = pick_device(config.device)
    method = parts.new_method(config, device)
    if state is None:
        name = config.name or time.strftime(f"{config.method}-{config.model}-%Y%m%d-%H%M%S")
        config = dataclasses.replace(config, name=name)
    if config.dry_run:
        if state is None:
            RunFolder.check_free(Path(config.logs).expanduser() / name)
        print(describe(config, method))
        return None
    if state is None:
        run = RunFolder.create(config)
    try:
        with run.logged():
            log.info("medfast %s on %s, run folder %s", __version__, device, run.path)
            fit_and_evaluate(config, run, method, device, state)
    except UsageError:
        if state is None and run.is_untouched:
            run.remove()  # the name stays free for the next try
        raise
    return run.path


def fit_and_evaluate(
    config: TrainConfig,
    run: RunFolder,
    method: Method,
    device: torch.device,
    state: Mapping[str, Any] | None,
) -> None:
    """Fill the run folder: checkpoints and metrics, then results and the report.

    Args:
        config: The settings.
        run: The run folder.
        method: What turns features into losses.
        device: Where to compute.
        state: The checkpoint to go on from.
    """
    from medfast.data.pipelines import make_loader, pick_loader
    from medfast.data.shards import is_credentialed
    from medfast.data.skipped import SkippedSamples
    from medfast.evals.encode import Encoder
    from medfast.evals.retrieval import retrieval
    from medfast.trainer import Trainer

    sources = parts.data_sources(config)
    splits = {split: parts.read_pairs(config, sources, split) for split in SPLITS}
    sizes = ", ".join(f"{len(found.records)} {split}" for split, found in splits.items())
    places = ", ".join(str(root) for _, root in sources)
    log.info("%s: %s pairs in %s", config.dataset, sizes, places)
    records, test = splits["train"].records, splits["test"].records
    if excluded := sum(splits["train"].excluded):
        log.info("%d training pairs are on exclusion lists and left out", excluded)
    data = splits["train"].fingerprint()
    if state is not None and state["data"] != data:
        raise UsageError(
            f"--resume: the run was begun with {state['data']['pairs']} training pairs and finds "
            f"{data['pairs']} in {places} now, not the same ones. Give back the tables, files and "
            "exclusion lists that it had, or start a new run."
        )
    if len(records) < 2:
        raise UsageError(f"{places} holds a single training pair; contrast needs at least 2.")
    tokenizer = parts.load_tokenizer(config, method, records, run)
    total = sum(len(found.records) + len(found.skipped) for found in splits.values())
    skipped = SkippedSamples(run.skipped, total, config.max_bad_samples)
    for found in splits.values():
        skipped.add(found.skipped)
    # A run that goes on later must decode with the same library.
    config = dataclasses.replace(config, loader=pick_loader(config.loader, records))
    log.info("the %s loader decodes the images", config.loader)

    model = parts.new_model(config, method, tokenizer, device, load_weights=state is None)
    encoder = Encoder(model, tokenizer, device, config.precision, method.late_interaction)

    def held_out(records: Sequence[Record]) -> Loader:
        size, seed, workers = config.preset.image_size, config.seed, config.workers
        arguments = (records, tokenizer, size, EVAL_BATCH_SIZE, None, seed, workers)
        return make_loader(config.loader, device, *arguments)

    validation = held_out(some(splits["validation"].records, VALIDATION_PAIRS, config.seed))

    def validate() -> dict[str, Any]:
        found = encoder.pairs(validation, skipped)
        return {**retrieval(found), "loss": found.loss(model.logit_scale.exp().item())}

    trainer = Trainer(
        config=config,
        model=model,
        method=method,
        loader=parts.training_loader(config, splits["train"], tokenizer, method, device),
        run=run,
        skipped=skipped,
        device=device,
        validate=validate,
        data=data,
    )
    if state is not None:
        trainer.restore(state)
        run.forget_metrics_after(trainer.step)
        log.info("resumed after epoch %d, step %d", trainer.epoch, trainer.step)
        if trainer.epoch == config.epochs:
            log.info("all epochs were trained before: only evaluating again")
    log.info(
        "%s on %s: %.1f M parameters, %d epochs of %d steps of %d pairs",
        *(config.method, config.model, sum(p.numel() for p in model.parameters()) / 1e6),
        *(config.epochs, trainer.steps_per_epoch, config.batch_size * config.accum_freq),
    )
    trainer.fit()

    log.info("evaluating the held-out split")
    embeddings = encoder.pairs(held_out(test), skipped)
    results = evaluate(config, encoder, embeddings, test, sources)
    run.write_results(results)
    log.info("%s", cli.results_table(results))
    if len(skipped):
        log.info("%d samples could not be used; they are in %s", len(skipped), run.skipped)
    private = any(is_credentialed(source, root) for source, root in sources)
    write_run_report(config, run, method, encoder, [] if private else test, embeddings, results)
    log.info("wrote %s", run.report)


def evaluate(
    config: TrainConfig,
    encoder: Encoder,
    embeddings: Embeddings,
    records: Sequence[Record],
    sources: Sequence[tuple[str, Path]],
) -> list[dict[str, Any]]:
    """Return the result rows of the held-out split, each with where it comes from."""
    from medfast.data.records import read_sidecar
    from medfast.evals.held_out import evaluate_held_out
    from medfast.evals.provenance import provenance

    origin = {"dataset": config.dataset, "seed": config.seed, **provenance()}
    # Its keys are those of one source alone.
    sidecar = read_sidecar(sources[0][1]) if len(sources) == 1 else None
    rows = []
    asked = time.perf_counter()
    for found in evaluate_held_out(encoder, embeddings, records, sidecar, "test"):
        rows.append({**found, **origin, "seconds": time.perf_counter() - asked})
        asked = time.perf_counter()
    return rows


def some(items: Sequence[T], count: int, seed: int) -> list[T]:
    """Return at most `count` of `items`, drawn by `seed`."""
    return random.Random(seed).sample(items, min(count, len(items)))


def write_run_report(
    config: TrainConfig,
    run: RunFolder,
    method: Method,
    encoder: Encoder,
    records: Sequence[Record],
    embeddings: Embeddings,
    results: Sequence[Mapping[str, Any]],
) -> None:
    """Write the run's report.html from its metrics and results.

    It shows a few of `records`, the held-out pairs; of credentialed sets, whose images must not be
    passed on, there are none.
    """
    from medfast.data.decode import decode
    from medfast.evals.attention import attention_examples
    from medfast.report import ContactExample, write_report

    found = embeddings.ranks[0].tolist()
    shown = some(range(len(found)), CONTACT_EXAMPLES, config.seed) if records else []
    pairs = [(records[int(embeddings.index[row])], found[row]) for row in shown]
    attended = [record for record, _ in pairs[:ATTENTION_EXAMPLES]]
    size = config.preset.image_size
    notes = [PHANTOM_NOTE] if "phantom" in config.train_data else []
    notes += [] if records else [CREDENTIALED_NOTE]
    write_report(
        run.report,
        name=run.path.name,
        params=dataclasses.asdict(config),
        history=run.read_metrics(),
        results=results,
        contact=[ContactExample(decode(r.read()), r.caption, rank) for r, rank in pairs],
        attention=attention_examples(encoder, attended, size, method.word_maps),
        attention_title=method.maps_title,
        attention_note=method.maps_note,
        note=" ".join(notes),
    )


if __name__ == "__main__":
    main()
