"""Milliseconds from the start of main.py to its first line and to the line of its first step.

It trains on generated images with its defaults. "import torch" is what no program with torch can do
without. With --against DIR, main.py of another checkout is measured beside it.
"""

import functools
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

import common

MILESTONES = {"first line": ".", "first step": "^Epoch:"}


def milliseconds_until(pattern, command):
    """Starts a Python program, ends it once it has printed a line that matches ``pattern``."""
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable] + [str(argument) for argument in command], stdout=subprocess.PIPE,
        universal_newlines=True, env=dict(os.environ, PYTHONUNBUFFERED="1"))
    with process:
        for line in process.stdout:
            if re.search(pattern, line):
                elapsed = 1000 * (time.monotonic() - start)
                process.kill()
                return elapsed
    raise common.RunFailed("ended before; see its message above")


def parse_args():
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--rounds", type=int, default=5, metavar="N", help="runs of each row of the table")
    add("-b", "--batch-size", type=int, default=64, metavar="N", help="images a step")
    add("-a", "--arch", default="mnasnet1_0", help="network")
    add("--device", choices=["cpu", "gpu"], default=common.default_device())
    add("--against", metavar="DIR", help="another checkout of this repository")
    return parser.parse_args()


def main():
    flags = parse_args()
    print(common.describe_machine(flags.device))
    versions = {"main.py": common.ROOT}
    if flags.against:
        versions[flags.against] = pathlib.Path(flags.against).resolve()
    rows = {"import torch": functools.partial(
        milliseconds_until, ".", ["-c", "import torch; print(torch.__version__)"])}
    references = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        for milestone, pattern in MILESTONES.items():
            for name, repository in versions.items():
                command = [
                    repository / "main.py", "--synthetic", 8 * flags.batch_size, "--epochs", 1,
                    *common.shared_options(flags), "--output-dir", scratch]
                rows[f"{name}, {milestone}"] = functools.partial(
                    milliseconds_until, pattern, command)
            if flags.against:
                references[f"main.py, {milestone}"] = f"{flags.against}, {milestone}"
        figures = common.interleave(rows, flags.rounds)
    columns = {flags.against: references} if flags.against else {}
    common.print_table(figures, columns, unit="ms")
    return 0 if len(figures) == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
