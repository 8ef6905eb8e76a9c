"""The commands: each reads its flags and calls one function of bn_keras.

Installed as bn_keras_launch, with the console script `bn-keras`. In a checkout,
`python -m launch.train` is `bn-keras train`.
"""

import importlib.util
import sys

# Packages of the extra "train" that a command imports first; one of them missing means that the
# extra is.
_TRAIN = ("absl", "ml_collections", "etils", "tensorflow_datasets", "keras_cv", "tqdm")

_missing = [name for name in _TRAIN if importlib.util.find_spec(name) is None]
if _missing:
    print(
        f"error: the commands need the extra 'train', without which {', '.join(_missing)} are"
        " missing: pip install 'bn_keras[cpu,train]' (or gpu, tpu)",
        file=sys.stderr,
    )
    sys.exit(2)
