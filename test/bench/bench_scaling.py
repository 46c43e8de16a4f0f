"""Images per second of training by one process on N cores, and by N processes with a core each.

The images are synthetic, so that the figures are those of the computing and of what the processes exchange. On the
CPU the total batch is the same for all, and every run may use N cores and no others. On GPUs the batch is that of one
card, and the runs are those of 1, 2, 4 and 8 cards.

How to read it: on the CPU the last column of each pair is N processes over one process, on the same N cores; 1.00 says
that splitting costs nothing. On GPUs it is the ratio to one card; N cards would at best give N.
"""

import os
import pathlib
import sys
import tempfile

import torch

import common


def train(flags, output, processes, cores):
    """Images per second of main.py with so many processes."""
    batch = flags.batch_size * (processes if flags.device == "gpu" else 1)
    more = []
    if processes > 1:
        more = ["--multiprocessing-distributed", "--device-list", ",".join(map(str, range(processes)))]
    if flags.opt_level:
        more += ["--opt-level", flags.opt_level]
    return common.images_per_second(common.run_main(
        "--synthetic", flags.steps * batch, "--device", flags.device, "-a", flags.arch, "-b", batch, "--epochs", 1,
        "--lr", 0.01, "--train-crop-size", flags.size, "--val-crop-size", flags.size, "--val-resize-size", flags.size,
        "--workers", flags.workers, "--output-dir", output, *more, cores=cores))


def main():
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("--steps", type=int, default=15, metavar="N", help="steps of each run")
    add("--rounds", type=int, default=3, metavar="N", help="runs of each way")
    add("-b", "--batch-size", type=int, default=64, metavar="N", help="images a step: all (cpu), a card (gpu)")
    add("--size", type=int, default=224, metavar="PX", help="side of an image")
    add("-a", "--arch", default="mnasnet1_0", help="network")
    add("--device", choices=["cpu", "gpu"], default=common.best_device())
    add("--opt-level", choices=["O0", "O1", "O2"], help="main.py's --opt-level (default: its own)")
    add("--workers", type=int, default=1, metavar="N", help="loaders a process")
    flags = parser.parse_args()
    print(common.machine(flags.device))
    most = torch.cuda.device_count() if flags.device == "gpu" else common.cores()
    counts = [n for n in (2, 4, 8) if n <= most]
    if not counts:
        print("nothing to compare: {} core(s) or card(s)".format(most))
        return 1
    whole = 0
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        output = pathlib.Path(place)
        if flags.device == "gpu":
            ways = {"{} card(s)".format(n): (lambda n=n: train(flags, output, n, None)) for n in [1] + counts}
            figures = common.interleave(ways, flags.rounds)
            common.print_table(figures, ["1 card(s)"])
            return 0 if len(figures) == len(ways) else 1
        for n in counts:
            cores, one = set(sorted(os.sched_getaffinity(0))[:n]), "1 process, {} cores".format(n)
            figures = common.interleave({
                one: lambda: train(flags, output, 1, cores),
                "{} processes, 1 core each".format(n): lambda: train(flags, output, n, cores)}, flags.rounds)
            common.print_table(figures, [one])
            whole += len(figures) == 2
    return 0 if whole == len(counts) else 1


if __name__ == "__main__":
    sys.exit(main())
