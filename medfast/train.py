"""`python -m medfast.train`: data, model and method to a trained, evaluated run folder."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import time
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from medfast import __version__, cli, parts
from medfast.config import TrainConfig, for_processes, pairs_of_step, resumed
from medfast.data import SPLITS
from medfast.errors import SharedError, UsageError

if TYPE_CHECKING:
    import torch

    from medfast.data.loader import Loader
    from medfast.data.records import Record
    from medfast.distributed.processes import Processes
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
CREDENTIALED_SHOWN_NOTE = (
    "The data are given to single persons under an agreement, and their images were asked for: "
    "keep this file where the data may be kept."
)

CHANGED_WORLD = (
    "%d processes go on in place of %d, with %d pairs in %d batches each: the pairs of a step stay "
    "the same. Not bitwise as before: the order of sums, random numbers of dropout, and batch norm "
    "in towers where a batch is cut in other parts."
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
    """Train, evaluate and report one run; under torchrun, with the other processes.

    Args:
        config: The settings.
        given: Names of the settings that were asked for; on --resume they must agree with the
            run's own, and all others are taken from it.

    Returns:
        The run folder; None for a dry run, and where another process evaluates.

    Raises:
        UsageError: something that the user can mend.
        StoppedError: the run was asked to stop.
    """
    from medfast.distributed import processes

    if processes.can_restart() and config.name is None:
        raise SharedError(
            "torchrun --max-restarts needs a --name, by which a restarted run finds itself again."
        )
    together = processes.join(config.timeout, config.comm)
    with together.naming_the_lost():
        # Nodes count restarts of their own.
        is_restarted = any(count for (count,) in together.numbers(processes.restarts()))
        if is_restarted and config.resume is None:
            config = dataclasses.replace(config, resume="auto")
        return _train(config, given, together)


def _train(config: TrainConfig, given: Collection[str], processes: Processes) -> Path | None:
    from medfast.device import pick_device
    from medfast.dry_run import describe
    from medfast.run_folder import RunFolder

    logs = Path(config.logs).expanduser()
    versions = {name: version(name) for name in ("medfast", "torch")}
    processes.require_equal("settings", {**dataclasses.asdict(config), **versions})
    begun = processes.by_first(lambda: _found(config))
    path, state = begun or (None, None)
    again = config.resume == "auto"
    with processes.together():
        if state is not None:
            config = resumed(config, given, state["config"])
        elif again:
            config = dataclasses.replace(config, resume=None)
        # As the run was begun; it may go on with more processes, or fewer.
        origin = config
        world = processes.world if state is None else state["world"]
        config = for_processes(config, world, processes.world)
        number = None if processes.ring is None else processes.local_rank
        device = pick_device(config.device, number)
        method = parts.new_method(config, device)
    processes.require_equal("device", {"device": device.type})
    if state is None:
        # The time is not the same everywhere.
        name = processes.by_first(
            lambda: config.name or time.strftime(f"{config.method}-{config.model}-%Y%m%d-%H%M%S")
        )
        config, origin = (dataclasses.replace(own, name=name) for own in (config, origin))
    if config.dry_run:
        if state is None and not again:
            processes.by_first(lambda: RunFolder.check_free(logs / name))
        if processes.is_first:
            print(describe(config, method, processes.world))
        return None
    if path is None:
        run = RunFolder(
            processes.by_first(lambda: RunFolder.create(origin, again).path), processes.rank
        )
    else:
        run = RunFolder(path.parent.parent, processes.rank)
    try:
        with run.logged(), processes.naming_the_lost():
            log.info("medfast %s on %s, run folder %s", __version__, device, run.path)
            if processes.world > 1:
                log.info("%d processes train together", processes.world)
            if world != processes.world:
                shares = (config.batch_size * config.accum_freq, config.accum_freq)
                log.warning(CHANGED_WORLD, processes.world, world, *shares)
            kept = {"config": dataclasses.asdict(origin), "world": world}
            evaluates = fit_and_evaluate(config, run, method, device, state, processes, kept)
    except UsageError:
        if processes.is_first and state is None and run.is_untouched:
            run.remove()  # the name stays free for the next try
        raise
    return run.path if evaluates else None


def _found(config: TrainConfig) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint to go on from, if it is asked for and there is one."""
    from medfast import checkpoint

    if config.resume is None:
        return None
    return checkpoint.find(config.resume, Path(config.logs).expanduser(), config.name)


def fit_and_evaluate(
    config: TrainConfig,
    run: RunFolder,
    method: Method,
    device: torch.device,
    state: Mapping[str, Any] | None,
    processes: Processes,
    origin: Mapping[str, Any],
) -> bool:
    """Fill the run folder: checkpoints and metrics, then results and the report.

    Args:
        config: The settings.
        run: The run folder.
        method: What turns features into losses.
        device: Where to compute.
        state: The checkpoint to go on from.
        processes: Those that train together.
        origin: What checkpoints keep of how the run was begun, beside its data.

    Returns:
        Whether this process was the one that evaluated.
    """
    from medfast.data.pipelines import make_loader, pick_loader
    from medfast.data.shards import is_credentialed
    from medfast.data.skipped import SkippedSamples
    from medfast.evals.encode import Encoder
    from medfast.evals.retrieval import retrieval
    from medfast.trainer import Trainer

    # Whoever comes first to a machine writes the phantom there.
    sources = processes.by_first(lambda: parts.data_sources(config))
    with processes.together():
        if processes.local_rank == 0 and not processes.is_first:
            parts.data_sources(config)
    with processes.together():
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
                f"--resume: the run was begun with {state['data']['pairs']} training pairs and "
                f"finds {data['pairs']} in {places} now, not the same ones. Give back the tables, "
                "files and exclusion lists that it had, or start a new run."
            )
        if len(records) < 2:
            raise UsageError(f"{places} holds a single training pair; contrast needs at least 2.")
        # A run that goes on later must decode with the same library.
        config = dataclasses.replace(config, loader=pick_loader(config.loader, records))
    processes.require_equal("training pairs", {**data, "loader": config.loader})
    # One makes it, and the others find it made.
    processes.by_first(lambda: parts.load_tokenizer(config, method, records, run) and None)
    with processes.together():
        tokenizer = parts.load_tokenizer(config, method, records, run)
    total = sum(len(found.records) + len(found.skipped) for found in splits.values())
    skipped = SkippedSamples(run.skipped, total, config.max_bad_samples, processes.is_first)
    with processes.together():
        for found in splits.values():
            skipped.add(found.skipped)
    log.info("the %s loader decodes the images", config.loader)

    with processes.together():
        model = parts.new_model(config, method, tokenizer, device, load_weights=state is None)
        parts.spread(config, method, model, processes)
        loader = parts.training_loader(
            config, splits["train"], tokenizer, method, device, processes
        )
    encoder = Encoder(model, tokenizer, device, config.precision, method.late_interaction)

    def held_out(records: Sequence[Record]) -> Loader:
        size, seed, workers = config.preset.image_size, config.seed, config.workers
        arguments = (records, tokenizer, size, EVAL_BATCH_SIZE, None, seed, workers)
        return make_loader(config.loader, device, *arguments)

    validation = held_out(some(splits["validation"].records, VALIDATION_PAIRS, config.seed))

    def validate() -> dict[str, Any]:
        found = encoder.pairs(validation, skipped)
        return {**retrieval(found), "loss": found.loss(model.logit_scale.exp().item())}

    with processes.together():
        trainer = Trainer(
            config=config,
            model=model,
            method=method,
            loader=loader,
            run=run,
            skipped=skipped,
            device=device,
            validate=validate,
            origin={
                **origin,
                "config": {**origin["config"], "loader": config.loader},
                "data": data,
            },
            processes=processes,
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
        *(config.epochs, trainer.steps_per_epoch),
        math.prod(pairs_of_step(config, len(records), processes.world)),
    )
    trainer.fit()
    # The others have nothing to add, unless they hold parts of the weights.
    if config.sharding == "none":
        processes.part()
        if not processes.is_first:
            return False

    log.info("evaluating the held-out split")
    embeddings = encoder.pairs(held_out(test), skipped)
    results = evaluate(config, encoder, embeddings, test, sources)
    log.info("%s", cli.results_table(results))
    if len(skipped):
        log.info("%d samples could not be used; they are in %s", len(skipped), run.skipped)
    private = any(is_credentialed(source, root) for source, root in sources)
    write_run_report(config, run, method, encoder, test, embeddings, results, private=private)
    log.info("wrote %s", run.report)
    # Last, because a run that has its results counts as done, its report included.
    run.write_results(results)
    return processes.is_first


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
    *,
    private: bool,
) -> None:
    """Write the run's report.html from its metrics and results.

    It shows a few of `records`, the held-out pairs; if they are `private`, of a credentialed set
    whose images must not be passed on, only where the settings ask for it.
    """
    from medfast.data.decode import decode
    from medfast.evals.attention import attention_examples
    from medfast.report import ContactExample, write_report

    found = embeddings.ranks[0].tolist()
    hidden = private and not config.show_credentialed_images
    shown = [] if hidden else some(range(len(found)), CONTACT_EXAMPLES, config.seed)
    pairs = [(records[int(embeddings.index[row])], found[row]) for row in shown]
    attended = [record for record, _ in pairs[:ATTENTION_EXAMPLES]]
    size = config.preset.image_size
    attention = attention_examples(encoder, attended, size, method.word_maps)
    if run.rank:
        return
    notes = [PHANTOM_NOTE] if "phantom" in config.train_data else []
    if private:
        notes.append(CREDENTIALED_NOTE if hidden else CREDENTIALED_SHOWN_NOTE)
    write_report(
        run.report,
        name=run.path.name,
        params=dataclasses.asdict(config),
        history=run.read_metrics(),
        results=results,
        contact=[ContactExample(decode(r.read()), r.caption, rank) for r, rank in pairs],
        attention=attention,
        attention_title=method.maps_title,
        attention_note=method.maps_note,
        note=" ".join(notes),
    )


if __name__ == "__main__":
    main()
