"""Images per second of main.py beside the trainers that people use: PyTorch's ImageNet example and
timm's train.py, each from its own repository, run as their users run them.

--example is the folder imagenet of pytorch/examples, --timm a checkout of pytorch-image-models (its
package has to be installed); rows without their folder are left out. Each trains mnasnet1_0 for one
epoch on the same JPEG files and evaluates it, and logs every step. The moments at which these lines
appear are what is measured: training from the fifth step to the last, evaluation from the last
training step to its own last, with all that a trainer does before it.
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

STEP = re.compile(r"(Epoch: \[0\]\[|Train: 0 \[)")
TEST = re.compile(r"Test: +\[")


def stamp_lines(command, cwd):
    """Runs a trainer; returns the moments, in seconds, of its lines on training and on evaluation.

    Raises:
        RunFailed: it ended with an error.
    """
    steps, tests, lines = [], [], []
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], cwd=str(cwd), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, universal_newlines=True,
        env=dict(os.environ, PYTHONUNBUFFERED="1"))
    for line in process.stdout:
        lines.append(line)
        if STEP.match(line):
            steps.append(time.monotonic())
        elif TEST.match(line):
            tests.append(time.monotonic())
    if process.wait() or len(steps) < 6 or not tests:
        raise common.RunFailed(f"status {process.returncode}: {' '.join(lines[-1:]).strip()}")
    return steps, tests


def measure(flags, command):
    """Returns images per second in training and in evaluation."""
    with tempfile.TemporaryDirectory(prefix="bench-") as output:
        steps, tests = stamp_lines(command, output)
    training = flags.batch_size * (len(steps) - 5) / (steps[-1] - steps[4])
    return training, flags.val_images / (tests[-1] - steps[-1])


def our_command(flags, data, level):
    return [common.ROOT / "main.py", data, *common.shared_options(flags), "--opt-level", level,
            "--epochs", 1, "-p", 1, "--lr", 0, "--train-crop-size", flags.size,
            "--val-crop-size", flags.size, "--val-resize-size", flags.size * 8 // 7]


def example_command(flags, data):
    return [pathlib.Path(flags.example).resolve() / "main.py", data, "-a", flags.arch,
            "-b", flags.batch_size, "-j", 4, "--epochs", 1, "-p", 1, "--lr", 0]


def timm_command(flags, data, *options):
    return [pathlib.Path(flags.timm).resolve() / "train.py", "--data-dir", data,
            "--device", "cuda" if flags.device == "gpu" else "cpu", "--num-classes", common.CLASSES,
            "--model", common.TIMM_NAMES[flags.arch], "-b", flags.batch_size, "--epochs", 1,
            "--lr", 1e-9, "--log-interval", 1, "--output", ".",
            "--input-size", 3, flags.size, flags.size, *options]


def make_rows(flags, data):
    """Returns name -> the command of a trainer."""
    rows = {}
    if flags.example:
        rows["PyTorch's example"] = example_command(flags, data)
    if flags.timm:
        best = ["--channels-last", "--amp", "--amp-dtype", "bfloat16"]
        rows["timm, defaults"] = timm_command(flags, data)
        rows["timm, channels_last and bfloat16"] = timm_command(flags, data, *best)
    for level in flags.levels.split(","):
        rows[f"main.py {level}"] = our_command(flags, data, level)
        if flags.compile:
            rows[f"main.py {level} --compile"] = our_command(flags, data, level) + ["--compile"]
    return rows


def parse_args():
    parser = common.make_parser(__doc__)
    common.add_model_flags(parser, "images a step", "side of a crop; the example's is 224")
    add = parser.add_argument
    add("--steps", type=int, default=15, metavar="N", help="training steps of each run")
    add("--val-images", type=int, default=640, metavar="N", help="images of the evaluation")
    add("--levels", default="O0,O1", help="--opt-level of main.py, one or more")
    add("--compile", action="store_true", help="measure main.py with --compile, too")
    add("--example", metavar="DIR", help="folder imagenet of pytorch/examples")
    add("--timm", metavar="DIR", help="checkout of pytorch-image-models")
    return parser.parse_args()


def main():
    flags = parse_args()
    print(common.describe_machine(flags.device))
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        data = pathlib.Path(scratch) / "images"
        common.make_images(data, flags.steps * flags.batch_size, flags.val_images, 200)
        evaluation = {}

        def run(name, command):
            training, images_per_second = measure(flags, command)
            evaluation.setdefault(name, []).append(images_per_second)
            return training

        commands = make_rows(flags, data)
        rows = {name: functools.partial(run, name, command) for name, command in commands.items()}
        training = common.interleave(rows, flags.rounds)
    ours = [name for name in rows if name.startswith("main.py")]
    columns = {name: dict.fromkeys(ours, name) for name in rows if name not in ours}
    for title, figures in (("training", training), ("evaluation in a training run", evaluation)):
        print(f"\n{title}")
        common.print_table({name: figures[name] for name in training}, columns)
    return 0 if len(training) == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
