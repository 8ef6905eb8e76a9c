"""Runs a command in a process forked from one that has imported TensorFlow, which saves seconds."""

import os
import runpy
import sys
import traceback


def run_and_exit(arguments):
    """Does the same as `python -m launch.COMMAND`, or `python SCRIPT.py`, and ends the process.

    Args:
      arguments: the command or the path of a script, and its arguments.
    """
    sys.argv = arguments
    status = 1
    try:
        if arguments[0].endswith(".py"):
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            runpy.run_module(f"launch.{arguments[0]}", run_name="__main__", alter_sys=True)
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
