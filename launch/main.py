"""The console script `bn-keras`: one command, with a sub-command for each thing to do."""

import difflib
import importlib
import sys
from collections.abc import Sequence

from . import cli
from .help import format_commands

# In the order in which a user needs them.
COMMANDS = {
    "train": "train a network, or resume its run",
    "evaluate": "evaluate runs and exported networks, alone and as an ensemble",
    "predict": "classify images",
    "export": "write a trained network as .keras, SavedModel or TFLite",
    "check": "check the BN layers of a trained network",
    "crops": "draw the crops that an image is evaluated by",
    "preview": "draw the augmented input of a config",
    "convert": "convert other projects' weights of BN-Inception",
    "prepare": "prepare ImageNet from its official archives",
    "reproduce": "run the paper's experiments and write their report",
    "search": "search initialization and learning rate",
    "tpu": "train on a Cloud TPU",
}
_HELP = ("--help", "-help", "-h", "-?", "help")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs `bn-keras COMMAND ...`; without a command, lists the commands.

    Args:
      argv: command and flags; None reads those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in _HELP:
        print(format_commands(COMMANDS))
        return
    name, *rest = arguments
    if name == "--version":
        from importlib.metadata import version

        print(f"bn_keras {version('bn_keras')}")
        return
    if name not in COMMANDS:
        nearest = difflib.get_close_matches(name, COMMANDS, n=1)
        guess = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        cli.fail(f"unknown command {name!r}{guess}: see bn-keras --help", 2)
    sys.argv = [f"bn-keras {name}", *rest]
    importlib.import_module(f".{name}", __package__).COMMAND.run()


if __name__ == "__main__":
    main()
