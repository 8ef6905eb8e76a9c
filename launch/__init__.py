"""The commands of `bn-keras`: each reads its flags and calls one function of bn_keras.

Installed as bn_keras_launch. In a checkout, `python -m launch.train` runs the same code as
`bn-keras train`.
"""

import importlib.util
import sys

# Modules that the extra "train" installs.
TRAIN_MODULES = (
    "absl",
    "etils",
    "importlib_resources",
    "keras_cv",
    "markdown",
    "matplotlib",
    "ml_collections",
    "scipy",
    "sklearn",
    "tensorboard",
    "tensorflow_datasets",
    "tqdm",
)

# Checked here because the modules of the commands import these packages.
if _missing := [name for name in TRAIN_MODULES if importlib.util.find_spec(name) is None]:
    print(
        "error: bn-keras needs the extra 'train': install bn_keras[cpu,train] (or gpu or tpu"
        f" instead of cpu); missing modules: {', '.join(_missing)}",
        file=sys.stderr,
    )
    sys.exit(2)
