"""The console script `bn-keras COMMAND`."""

import importlib
import importlib.metadata
import sys

from . import cli
from .command_error import CommandError, did_you_mean
from .help import HELP_FLAGS, format_commands

# In the order of use.
COMMANDS = {
    "train": "train a network, or resume its run",
    "evaluate": "evaluate runs and exported networks, alone and as an ensemble",
    "predict": "classify images",
    "export": "write a trained network as .keras, SavedModel, TFLite or ONNX",
    "check": "check the BN layers of a trained network",
    "crops": "draw the crops that an image is evaluated on",
    "preview": "draw the augmented input of a config",
    "convert": "convert other projects' weights of BN-Inception",
    "prepare": "prepare ImageNet from its official archives",
    "reproduce": "run the paper's experiments and write their report",
    "search": "search initializers and learning rates",
    "slurm": "train with Slurm",
    "tpu": "train on a Cloud TPU",
    "info": "print versions, devices and config, for an issue",
}


def main() -> None:
    """Runs `bn-keras COMMAND ...`; without a command, fails and lists the commands."""
    with cli.exiting_on_error():
        if len(sys.argv) < 2:
            print(format_commands(COMMANDS), file=sys.stderr)
            raise CommandError("COMMAND is missing: see above")
        name, *arguments = sys.argv[1:]
        if name == "help" and arguments:
            name, arguments = arguments[0], ["--help"]
        if name in ("help", *HELP_FLAGS):
            print(format_commands(COMMANDS), flush=True)
        elif name == "--version":
            print(f"bn_keras {importlib.metadata.version('bn_keras')}", flush=True)
        elif name in COMMANDS:
            sys.argv = [f"bn-keras {name}", *arguments]
            importlib.import_module(f".{name}", __package__).COMMAND.run()
        else:
            guess = did_you_mean(name, COMMANDS)
            raise CommandError(f"unknown command {name!r}{guess}: see bn-keras --help")


if __name__ == "__main__":
    main()
