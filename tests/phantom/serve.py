"""The process behind `Phantom`: imports modules once, and runs each function in a fork of itself.

    python -m phantom.serve MODULE …

Each line of the input is a job as JSON: "function", "arguments" and "output", the file of the record or the traceback.
The answer is a line with the "status" of the fork, 0 if all went well.
"""

import faulthandler
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def main() -> None:
    """Serve until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what functions print is no answer
    for module in sys.argv[1:]:
        importlib.import_module(module)
    for line in sys.stdin:
        job = json.loads(line)
        if (child := os.fork()) == 0:
            os._exit(_run(job))
        _, status = os.waitpid(child, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), file=answers)
    os._exit(0)  # taking libraries apart would take seconds


def _run(job: dict[str, Any]) -> int:
    output = Path(job["output"])
    faulthandler.enable(output.open("w"))
    module, _, name = job["function"].partition(":")
    try:
        record = getattr(importlib.import_module(module), name)(**job["arguments"])
        output.write_text(record.to_json())
    except BaseException:
        output.write_text(traceback.format_exc())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    main()
