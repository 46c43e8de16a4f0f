"""Images per second of training by one process on N cores, and by N processes with a core each.

The images are generated, so that the figures are those of the computation and of what the processes
exchange. On the CPU the total batch size is the same for all, and every run may use N cores and no
others; a ratio of 1.00 says that splitting costs nothing. On GPUs the batch size is that of one
card, the runs are those of 1, 2, 4 and 8 cards, and N cards would at best give a ratio of N.
"""

import functools
import os
import pathlib
import sys
import tempfile

import torch

import common


def train(flags, output, processes, cores):
    """Images per second of main.py with so many processes, confined to ``cores`` if not None."""
    batch_size = flags.batch_size * (processes if flags.device == "gpu" else 1)
    options = ["--opt-level", flags.opt_level] if flags.opt_level else []
    if processes > 1:
        devices = ",".join(map(str, range(processes)))
        options += ["--multiprocessing-distributed", "--device-list", devices]
    return common.images_per_second(common.run_python([
        common.ROOT / "main.py", "--synthetic", flags.steps * batch_size,
        "--device", flags.device, "-a", flags.arch, "-b", batch_size, *options, "--epochs", 1,
        "--lr", 0, "--train-crop-size", flags.size, "--val-crop-size", flags.size,
        "--val-resize-size", flags.size, "--workers", flags.workers, "--output-dir", output],
        cores=cores))


def rows_of_cards(flags, output, counts):
    """The rows of 1, 2, 4, ... cards, and the row that each is divided by."""
    rows = {f"{n} card(s)": functools.partial(train, flags, output, n, None) for n in [1] + counts}
    return rows, dict.fromkeys(list(rows)[1:], "1 card(s)")


def rows_of_cores(flags, output, counts):
    """The pairs of rows of 2, 4, ... cores, and the row that each is divided by."""
    rows, references = {}, {}
    for n in counts:
        cores = set(sorted(os.sched_getaffinity(0))[:n])
        one, several = f"1 process, {n} cores", f"{n} processes, 1 core each"
        rows[one] = functools.partial(train, flags, output, 1, cores)
        rows[several] = functools.partial(train, flags, output, n, cores)
        references[several] = one
    return rows, references


def parse_args():
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=15, metavar="N", help="steps of each run")
    common.add_model_flags(
        parser, "images a step: in total on the cpu, of a card on gpu", "side of an image")
    add("--opt-level", choices=["O0", "O1", "O2"], help="of main.py (default: its own)")
    add("--workers", type=int, default=1, metavar="N", help="loader processes of each process")
    return parser.parse_args()


def main():
    flags = parse_args()
    print(common.describe_machine(flags.device))
    on_gpu = flags.device == "gpu"
    available = torch.cuda.device_count() if on_gpu else common.usable_cores()
    counts = [n for n in (2, 4, 8) if n <= available]
    if not counts:
        print(f"nothing to compare: {available} {'card' if on_gpu else 'core'}(s)")
        return 1
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        make_rows = rows_of_cards if on_gpu else rows_of_cores
        rows, references = make_rows(flags, pathlib.Path(scratch), counts)
        figures = common.interleave(rows, flags.rounds)
    common.print_table(figures, {"one process": references})
    return 0 if len(figures) == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
