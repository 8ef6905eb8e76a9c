"""Prints the versions, the devices and the config of this installation, to paste into an issue.

Examples:
  bn-keras info
  bn-keras info --config=bn_x5 --config.train.steps=1000
"""

import importlib.metadata
import json
import os

from absl import flags

from . import TRAIN_MODULES, cli

_CONFIG = cli.define_config(required=False)
_JSON = flags.DEFINE_boolean("json", False, "Print JSON.")

# Variables that change how TensorFlow and Keras compute.
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "KERAS_HOME",
    "TF_ENABLE_ONEDNN_OPTS",
    "TF_FORCE_GPU_ALLOW_GROWTH",
    "TF_NUM_INTRAOP_THREADS",
    "TF_NUM_INTEROP_THREADS",
    "TF_XLA_FLAGS",
    "XLA_FLAGS",
)


def main() -> None:
    """Prints a line for each fact, or JSON."""
    facts = _describe_software() | _describe_machine() | _describe_config()
    if _JSON.value:
        print(json.dumps(facts, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name:{width}}  {value}")


def _describe_software() -> dict[str, str]:
    """Returns the version of each package, and the variables that affect TensorFlow."""
    from bn_keras.runs import environment

    found = environment.describe()
    facts = dict(found["versions"])
    if found["commit"]:
        facts["bn_keras"] += f", commit {found['commit'][:10]}"
        facts["bn_keras"] += ", modified" if found["modified"] else ""
    distributions = importlib.metadata.packages_distributions()
    # More than one overwrite each other.
    wheels = sorted(set(distributions.get("tensorflow", ())))
    if wheels:  # TensorFlow built from source may have none.
        facts["tensorflow"] += f", from {' and '.join(wheels)}"
    for module in TRAIN_MODULES:
        for name in distributions.get(module, ())[:1]:
            facts[name] = importlib.metadata.version(name)
    return facts | {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def _describe_machine() -> dict[str, str]:
    from bn_keras.distribute import describe_devices
    from bn_keras.runs import environment

    machine = environment.describe()["machine"]
    return {
        "platform": machine["platform"],
        "processor": machine["processor"],
        "devices": describe_devices("mirrored", 0),
    }


def _describe_config() -> dict[str, str]:
    """Returns the config's name and the settings that differ from the schema's defaults."""
    if _CONFIG.config is None:
        return {}
    from bn_keras.runs.settings import flatten
    from bn_keras.training.config import default_config

    defaults = flatten(default_config())
    settings = flatten(_CONFIG.config)
    differing = {k: repr(v) for k, v in settings.items() if k not in defaults or v != defaults[k]}
    return {"config": str(_CONFIG)} | differing


COMMAND = cli.Command(__name__, main)

if __name__ == "__main__":
    COMMAND.run()
