"""Runs launch.tpu for test_tpu_jobs once for each line it reads, without importing TensorFlow anew.

A line is JSON: {"arguments": [...], "environment": {...}}; so is the answer: {"returncode": ...,
"stdout": ..., "stderr": ...}. Each command has a process of its own, forked off this one.
"""

import json
import os
import runpy
import sys
import tempfile
import traceback

import bn_keras  # noqa: F401


def run(arguments, environment):
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        child = os.fork()
        if not child:
            os.environ.update(environment)
            with open(os.devnull) as nothing:
                for number, file in enumerate((nothing, stdout, stderr)):
                    os.dup2(file.fileno(), number)
            sys.argv = ["launch.tpu", *arguments]
            try:
                runpy.run_module("launch.tpu", run_name="__main__", alter_sys=True)
            except SystemExit as end:
                sys.stdout.flush()
                # At once: to take TensorFlow down in order takes a second.
                os._exit(end.code or 0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read())
    return {"returncode": os.waitstatus_to_exitcode(status), "stdout": texts[0], "stderr": texts[1]}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)
    os._exit(0)
