"""A training in all its parts, on made-up data and for one step."""

import time
from collections.abc import Iterator

from ml_collections import ConfigDict

from bn_keras.cost import count
from bn_keras.data import pipeline, sources
from bn_keras.distribute.strategy import make_strategy
from bn_keras.training.build import build_schedule, build_trainer
from bn_keras.training.config import check_config


def dry_run(config: ConfigDict) -> Iterator[str]:
    """Builds what a config describes and takes one step; writes nothing and downloads nothing.

    The step is on made-up images of the size, the number and the classes of the data set, which
    need not be there.

    Args:
      config: as bn_keras/training/config.py.

    Yields:
      Paragraphs for people: the network by its modules, the schedule, the step.

    Raises:
      UsageError: a value in the config that can't be meant, as far as that shows without the data.
    """
    check_config(config)
    strategy = make_strategy(**config.distribution)
    names = ("name", "data_dir", "train_split", "validation_split", "image_size")
    description = sources.describe(*(config.data[name] for name in names))
    source = sources.stand_in(description, config.data.image_size)
    data = pipeline.open_data(config.data, config.seed, source)
    pipeline.check_divides(strategy, config.evaluation.global_batch_size)
    trainer = build_trainer(
        config, strategy, data.input_shape, data.num_classes, data.num_train_examples
    )
    cost = count(trainer.model)
    yield str(cost)

    num_examples = description.num_train_examples
    if num_examples:
        yield build_schedule(config, num_examples).describe(config.train.steps, num_examples)
    else:
        yield (
            f"the schedule goes by epochs: how many steps they are shows when {config.data.name} is"
            " prepared"
        )

    batches = trainer.open_batches(data, 0)
    began = time.perf_counter()
    trainer.trace(batches)
    traced = time.perf_counter()
    loss, _, finite_steps = trainer.train(batches, 1)
    ended = time.perf_counter()
    replicas = strategy.num_replicas_in_sync
    part = trainer.global_micro_batch_size // replicas
    yield (
        f"one step of {config.train.global_batch_size} made-up images on {replicas} replica(s):"
        f" loss {loss:.4f}{'' if finite_steps else ', which is not finite'}\n"
        f"building the graph took {traced - began:.1f} s, and this first step"
        f" {ended - traced:.1f} s\n"
        f"for the way back, a replica keeps about {part * cost.activation_bytes / 2**20:,.0f} MiB"
        f" of its {part} images"
    )
