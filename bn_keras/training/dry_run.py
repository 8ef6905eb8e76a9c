"""A trial of a config: its network, its schedule, and one training step on synthetic data."""

import time
from collections.abc import Iterator

from ml_collections import ConfigDict

from bn_keras.cost import count_cost
from bn_keras.data import pipeline, sources
from bn_keras.distribute import make_strategy
from bn_keras.text import counted
from bn_keras.training.build import build_data, build_schedule, build_trainer_for
from bn_keras.training.config import check_config
from bn_keras.training.length import with_steps
from bn_keras.training.pitfalls import find_pitfalls
from bn_keras.training.recorder import open_recorder
from bn_keras.training.restoring import initialize_trainer


def dry_run(config: ConfigDict) -> Iterator[str]:
    """Builds what a config describes and trains one step; writes and downloads nothing.

    The step uses synthetic images with the size and number of classes of the data set, which does
    not have to be prepared.

    Args:
      config: see `default_config`.

    Yields:
      Paragraphs of text: the network by its modules, the data and the schedule, settings that are
      unlikely to be intended, the step.

    Raises:
      UsageError: an invalid value in the config that can be detected without the data.
    """
    check_config(config)
    strategy = make_strategy(**config.distribution)
    settings = config.data
    description = sources.describe(
        settings.name,
        settings.data_dir,
        train_split=settings.train_split,
        validation_split=settings.validation_split,
        image_size=settings.image_size,
    )
    data = build_data(config, sources.synthesize(description, settings.image_size))
    pipeline.check_divides(strategy, config.evaluation.global_batch_size)
    trainer = build_trainer_for(config, strategy, data)
    cost = count_cost(trainer.model)
    yield str(cost)
    if initialization := initialize_trainer(config, trainer, data.class_names):
        # The synthetic classes have no names: the other lines could be wrong about the head.
        yield initialization.describe()[0]

    if recorder := open_recorder(trainer, data, config.record, num_examples=1):
        recorder()

    num_examples, replicas = description.num_train_examples, strategy.num_replicas_in_sync
    if num_examples:
        config = with_steps(config, num_examples)
        schedule = build_schedule(config, num_examples)
        yield f"{description}\n{schedule.describe(config.train.steps, num_examples)}"
        yield from find_pitfalls(config, schedule, trainer.inference_model, replicas)
    else:
        yield f"{description}\nthe steps per epoch are known once {config.data.name} is prepared"

    batches = trainer.open_batches(data, 0)
    began = time.perf_counter()
    trainer.trace(batches)
    traced = time.perf_counter()
    loss, _, finite_steps = trainer.train(batches, 1)
    ended = time.perf_counter()
    per_replica_batch_size = trainer.global_micro_batch_size // replicas
    mebibytes = per_replica_batch_size * cost.activation_bytes / 2**20
    note = "" if finite_steps else ", which is not finite"
    yield (
        f"one step with {config.train.global_batch_size} synthetic images on"
        f" {counted(replicas, 'replica')}: loss {loss:.4f}{note}\n"
        f"building the graph took {traced - began:.1f} s, this first step {ended - traced:.1f} s\n"
        f"activations saved for the backward pass: about {mebibytes:,.0f} MiB for a replica's"
        f" {per_replica_batch_size} images"
    )
