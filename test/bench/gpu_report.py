"""A table that says how fast the trainer is on a machine's card, and whether it computes rightly.

    python test/bench/gpu_report.py                  an NVIDIA GPU, in under 8 minutes
    python test/bench/gpu_report.py --device npu     an Ascend NPU
    python test/bench/gpu_report.py --device cpu     tries the program, with a small network

machine  card, driver, processor, packages
steps    train_step on images that are on the device, by precision, batch size and memory layout,
         with torch's own mixed precision
loader   the loader processes alone, from JPEG files, and with the copy to the device
compile  --compile: the first step, and those after it
decode   torchvision's JPEG decoder on one core and on the card
whole    main.py as a user runs it, from files: training and evaluation
correct  losses by precision, --seed, --resume, one process over nccl, --run-prof

Each row is printed and added to --output at once. Each section runs in a process of its own, which
is killed at its time limit; what it prints besides goes to a file named as --output, with ".log"
after it. Rows say "not applicable", or "skipped" for lack of memory, with the reason. The status is
1 where one says FAILED, CUT or DIFFERS; the other sections run all the same. No network is needed.
"""

import argparse
import functools
import os
import pathlib
import signal
import sys
import tempfile
import time

import torch

import common
import gpu_checks
import gpu_speed
import main as trainer

# name -> (what prints its rows, time limit in seconds)
SECTIONS = {
    "machine": (gpu_speed.report_machine, 20),
    "steps": (gpu_speed.report_steps, 100),
    "loader": (gpu_speed.report_loader, 60),
    "compile": (gpu_speed.report_compile, 110),
    "decode": (gpu_speed.report_decode, 20),
    "whole": (gpu_speed.report_whole, 60),
    "correct": (gpu_checks.report_correct, 70),
}
FROM_FILES = {"loader", "decode", "whole"}


def section_names(text):
    """An argparse type: 'steps,correct' as a list."""
    names = text.split(",")
    if not set(names) <= set(SECTIONS):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected some of {','.join(SECTIONS)}")
    return names


def parse_args(argv):
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--device", choices=["npu", "gpu", "cpu"], default="gpu", help="what to measure")
    add("--output", default="gpu_report.md", metavar="FILE", help="file to add the table to")
    add("--sections", type=section_names, default=",".join(SECTIONS), metavar="NAMES",
        help="what to measure of it")
    add("--limit", type=float, default=1, metavar="FACTOR", help="multiplies the time limits")
    add("--section", help=argparse.SUPPRESS)  # of a process that measures: its section
    add("--scratch", type=pathlib.Path, help=argparse.SUPPRESS)  # and a folder for its files
    flags = parser.parse_args(argv)
    flags.sizes = gpu_speed.CPU if flags.device == "cpu" else gpu_speed.CARD
    return flags


def measure_section(flags):
    """Prints the rows of one section."""
    if flags.device == "cpu" and hasattr(torch, "compile"):  # its kernels take minutes to compile
        torch.compile = functools.partial(torch.compile, backend="aot_eager")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(flags.scratch / "inductor")  # empty at the start
    report, _ = SECTIONS[flags.section]
    report(flags)


def write_table(flags, scratch, table, log):
    """Measures the sections in turn; returns whether every row is as it should be."""
    seconds, good = {}, True

    def write(line):
        print(line, flush=True)
        print(line, file=table, flush=True)

    print(file=table)  # a blank line, before which an earlier table may end
    write(common.row("section", "measurement", "result"))
    write("|---|---|---|")
    for name in flags.sections:
        begin = time.monotonic()
        limit = flags.limit * SECTIONS[name][1]
        arguments = [__file__, "--section", name, "--scratch", scratch, "--device", flags.device]
        for line in common.read_rows(arguments, limit, log):
            write(f"| {name} {line}")
            good = good and not any(word in line for word in ("FAILED", "CUT after", "DIFFERS"))
        seconds[name] = time.monotonic() - begin
    parts = ", ".join(f"{name} {value:.0f}" for name, value in seconds.items())
    write(common.row("all", "seconds", f"{sum(seconds.values()):.0f}: {parts}"))
    return good


def main(argv=None):
    flags = parse_args(argv)
    if flags.section:
        return measure_section(flags)
    if flags.device == "cpu":  # up to three of its processes compute at a time
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        trainer.select_backend(flags)
        with open(flags.output, "a") as table, open(
                f"{flags.output}.log", "a+", errors="replace") as log:
            with tempfile.TemporaryDirectory(prefix="bench-") as folder:
                scratch = pathlib.Path(folder)
                if FROM_FILES.intersection(flags.sections):
                    sizes = flags.sizes
                    common.make_images(
                        scratch / "images", sizes.train, sizes.val, sizes.photographs)
                return 0 if write_table(flags, scratch, table, log) else 1
    except (trainer.UserError, OSError) as error:
        print(f"gpu_report.py: error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    for signum in (signal.SIGINT, signal.SIGTERM):  # also ends the section's processes
        signal.signal(signum, lambda signum, frame: sys.exit(128 + signum))
    sys.exit(main())
