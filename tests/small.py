"""A config whose run takes a second, for tests of everything around the training."""

from configs import mnist_bn


def small_mlp(**overrides):
    """Returns the config of a short training of the section 4.1 network on digits."""
    config = mnist_bn.get_config().copy_and_resolve_references()
    config.data.name = "digits"
    config.data.validation_split = "validation"
    config.train.steps = 60
    config.train.steps_per_loop = 10
    config.evaluation.every_steps = 20
    config.evaluation.global_batch_size = 100
    config.evaluation.per_class = False
    config.checkpoint.every_steps = 25
    config.batch_norm.momentum = 0.9
    config.schedule.base_rate = 0.5
    config.record.layer = ""
    config.update_from_flattened_dict(overrides)
    return config
