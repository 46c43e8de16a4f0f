"""What the benchmarks share: photograph-like images, runs of main.py, rounds, tables."""

import argparse
import contextlib
import functools
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import threading
import time

import numpy as np
import PIL
import torch
import torchvision
from PIL import Image, ImageDraw

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # for mnasnet and main

MEAN = (0.485, 0.456, 0.406)  # of ImageNet's pixels
STD = (0.229, 0.224, 0.225)
PHOTOGRAPH_SIZE = (500, 375)  # ImageNet's most frequent one
LARGE_SIZE = (2000, 1500)  # as of a camera: files that main.py decodes at a reduced size
CLASSES = 10
BASELINE = "baseline"  # the name of the baseline loop in the tables
TIMM_NAMES = {"mnasnet0_5": "mnasnet_050", "mnasnet0_75": "mnasnet_075",
              "mnasnet1_0": "mnasnet_100"}


class RunFailed(Exception):
    """A run that ended with an error; the text is the line that says why."""


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def make_parser(doc):
    """An argument parser that shows a script's whole docstring and the defaults."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    return argparse.ArgumentParser(description=doc, formatter_class=Help)


def default_device():
    return "gpu" if torch.cuda.is_available() else "cpu"


def add_model_flags(parser, batch_help, size_help):
    """The flags of every benchmark that runs the network."""
    add = parser.add_argument
    add("--rounds", type=int, default=3, metavar="N", help="runs of each row of the table")
    add("-b", "--batch-size", type=int, default=64, metavar="N", help=batch_help)
    add("--size", type=int, default=224, metavar="PX", help=size_help)
    add("-a", "--arch", default="mnasnet1_0", help="network")
    add("--device", choices=["cpu", "gpu"], default=default_device())


def add_comparison_flags(parser, size_help):
    """The flags of a benchmark that compares main.py with something else."""
    add_model_flags(parser, "images a step", size_help)
    add = parser.add_argument
    add("--levels", default="O0,O1", help="--opt-level of main.py, one or more")
    add("--workers", type=int, metavar="N", help="--workers of main.py (default: its own)")
    add("--against", metavar="DIR", help="compare with main.py of another checkout of this "
        "repository, not with the baseline loop")
    add("--baseline-workers", type=int, default=4, metavar="N",
        help="loader processes of the baseline loop")
    add("--baseline-loop", metavar="DIR",
        help="only run the baseline loop, once, in this process, on the images in DIR")


# ------------------------------------------------------------------------------------------------
# Images
# ------------------------------------------------------------------------------------------------


def draw_shapes(image, base, rng):
    """Draws ellipses and rectangles of colours around ``base``."""
    width, height = image.size
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(8, 20)):
        left, top = rng.randint(-60, width), rng.randint(-60, height)
        corners = [left, top, left + rng.randint(20, 200), top + rng.randint(20, 200)]
        shape = draw.ellipse if rng.rand() < 0.6 else draw.rectangle
        colour = (base + rng.uniform(-90, 90, 3)).clip(0, 255)
        shape(corners, fill=tuple(int(channel) for channel in colour))


def noise(width, height, rng):
    """Noise [height, width, 3] whose amplitude falls with the frequency, as in photographs; most
    of it in the brightness."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    amplitude = 1 / np.maximum(frequency, 1 / 256)
    fields = [
        np.fft.irfft2(np.fft.rfft2(rng.randn(height, width)) * amplitude, (height, width))
        for _ in range(2)
    ]
    brightness, colour = (field[..., None] / field.std() for field in fields)
    strength = rng.uniform(15, 38)
    grain = 5 * rng.randn(height, width)[..., None]
    return strength * (brightness + np.array([0.3, -0.1, -0.3]) * colour) + grain


def photograph(number, label, size=PHOTOGRAPH_SIZE):
    """An image with what makes photographs costly to decode: shaded areas, edges, texture at every
    scale. The same one for the same number; its label gives it a tint that can be learned."""
    rng = np.random.RandomState([20260, number])
    width, height = size if rng.rand() < 0.75 else size[::-1]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    shade = rng.uniform(-50, 50, 3) * (x / width)[..., None]
    shade = shade + rng.uniform(-50, 50, 3) * (y / height)[..., None]
    angle = 2 * np.pi * label / CLASSES
    base = 120 + 40 * np.cos(angle + np.array([0, 2.1, 4.2])) + rng.uniform(-8, 8, 3)
    image = Image.fromarray((base + shade).clip(0, 255).astype(np.uint8))
    draw_shapes(image, base, rng)
    pixels = np.asarray(image) + noise(width, height, rng)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_split(folder, files, different, large=0, first=0):
    """Writes JPEG files into class folders 0 to 9; the first ``different`` are photographs, and of
    these the first ``large`` large; the others are hard links to them. Returns the sum of the file
    sizes, links included."""
    originals = []
    size = 0
    for label in range(CLASSES):
        (folder / str(label)).mkdir(parents=True)
    for number in range(files):
        label = number % CLASSES
        path = folder / str(label) / f"{number:06d}.jpg"
        if number < different:
            image_size = LARGE_SIZE if number < large else PHOTOGRAPH_SIZE
            photograph(first + number, label, image_size).save(str(path), quality=90)
            originals.append(path)
        else:  # of the same label, since ``different`` is a multiple of CLASSES
            os.link(str(originals[number % different]), str(path))
        size += path.stat().st_size
    return size


def make_images(folder, train, val, different, large=0):
    """Writes train/ and val/ with so many files each, of at most ``different`` photographs; in val/
    the first ``large`` of these are large."""
    different = max(CLASSES, different // CLASSES * CLASSES)
    train, val = max(train, CLASSES), max(val, CLASSES)
    size = make_split(folder / "train", train, different)
    size += make_split(folder / "val", val, different, large, first=10 ** 6)
    width, height = PHOTOGRAPH_SIZE
    print(f"images: {train} for training, {val} for evaluation, at most {different} different in "
          f"each; {width}x{height} JPEG, {size / (train + val) / 1000:.0f} KB on average")
    if large:
        width, height = LARGE_SIZE
        print(f"images: {large} of the different ones for evaluation are {width}x{height}")
    sys.stdout.flush()


# ------------------------------------------------------------------------------------------------
# The baseline loop
# ------------------------------------------------------------------------------------------------


def torch_device(flags):
    return torch.device("cuda" if flags.device == "gpu" else "cpu")


def build_network(arch):
    """The network of torchvision, without what main.py does to it."""
    import mnasnet

    return getattr(mnasnet, arch)(num_classes=CLASSES)


def baseline_transforms(size, train):
    """The transforms of most ImageNet trainers; evaluation resizes to 8/7 of the crop first."""
    from torchvision import transforms

    if train:
        crop = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    else:
        crop = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size)]
    return transforms.Compose(crop + [transforms.ToTensor(), transforms.Normalize(MEAN, STD)])


def baseline_loader(flags, train):
    """The DataLoader of most ImageNet trainers, over the images of --baseline-loop."""
    from torchvision import datasets

    folder = os.path.join(flags.baseline_loop, "train" if train else "val")
    images = datasets.ImageFolder(folder, baseline_transforms(flags.size, train))
    return torch.utils.data.DataLoader(
        images, batch_size=flags.batch_size, shuffle=train, drop_last=train,
        num_workers=flags.baseline_workers, pin_memory=flags.device == "gpu")


# ------------------------------------------------------------------------------------------------
# Runs
# ------------------------------------------------------------------------------------------------


def run_python(arguments, cores=None, timeout=1800):
    """Runs a Python program in a process of its own and returns what it printed.

    Args:
        arguments: of the interpreter, a script's path first.
        cores: a set of core numbers that the process is confined to.
        timeout: seconds until it is killed.

    Raises:
        RunFailed: it ended with an error or was killed.
    """
    command = [sys.executable] + [str(argument) for argument in arguments]
    confine = functools.partial(os.sched_setaffinity, 0, cores) if cores else None
    try:
        result = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
            timeout=timeout, preexec_fn=confine)
    except subprocess.TimeoutExpired:
        raise RunFailed(f"did not end within {timeout} s")
    if result.returncode:
        raise RunFailed(find_reason(result.stderr, result.returncode))
    return result.stdout


def find_reason(text, status):
    """The line of what a program printed that says why it ended with this status."""
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [f"status {status}, no message"])[-1]


def kill_group(process):
    """Ends a process that leads a group, and all others of the group."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def read_rows(arguments, limit, log):
    """Runs a Python program in a group of processes of its own, and yields each row of a Markdown
    table that it prints; then one more where it failed, or was killed after ``limit`` seconds.

    Args:
        arguments: of the interpreter, a script's path first.
        log: a text file, open to append and read, for all else that the program prints: what it
            prints on stderr at once, the rest when it has ended, lest one cuts into the other.
    """
    begin, start = time.monotonic(), log.seek(0, os.SEEK_END)
    text = []
    command = [sys.executable] + [str(argument) for argument in arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=log, universal_newlines=True,
        start_new_session=True)
    timer = threading.Timer(limit, kill_group, [process])
    timer.start()
    try:
        for line in process.stdout:
            if line.startswith("| "):
                yield line.rstrip()
            else:
                text.append(line)
        status = process.wait()
    finally:
        timer.cancel()
        kill_group(process)
        log.seek(start)
        errors = log.read()
        log.writelines(text)
        log.flush()
    if status and time.monotonic() - begin >= limit:
        yield row("the rest", f"CUT after {limit:g} s")
    elif status:
        yield row("the rest", f"FAILED: {find_reason(errors, status)}")


def row(*cells):
    """A row of a Markdown table."""
    return f"| {' | '.join(' '.join(str(cell).split()).replace('|', '/') for cell in cells)} |"


def milliseconds(function):
    """How long a function without arguments takes."""
    begin = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - begin)


def shared_options(flags):
    """The options that main.py and the baseline loops have in common."""
    return ["--device", flags.device, "-a", flags.arch, "-b", flags.batch_size]


def run_baseline(script, flags, folder, *more):
    """Runs the baseline loop of a benchmark in a process of its own; returns what it printed."""
    return run_python([
        script, "--baseline-loop", folder, "--baseline-workers", flags.baseline_workers,
        "--size", flags.size, *shared_options(flags), *more])


def images_per_second(output):
    """From the line 'Result: ... images/sec X ...' of main.py and of the baseline loops."""
    return float(re.findall(r"^Result:.* images/sec ([0-9.]+)", output, re.M)[-1])


def topk_counts(output):
    """(correct in the top 1, in the top 5, images) from the line ' * Acc@1 ...' of main.py."""
    pattern = r"^ \* Acc@1 .*\((\d+) and (\d+) of (\d+) images\)"
    return tuple(int(count) for count in re.findall(pattern, output, re.M)[-1])


def comparison(flags, baseline, run_main):
    """The rows of a comparison and what each is compared with.

    Args:
        baseline: a function that runs the baseline loop and returns images per second.
        run_main: the same for main.py, called with its repository and the --opt-level.

    Returns:
        two dictionaries: row -> a function without arguments that returns images per second; row
        -> the row that it is divided by.
    """
    rows, references = {}, {}
    if not flags.against:
        rows[BASELINE] = baseline
    for level in flags.levels.split(","):
        ours, reference = f"main.py {level}", BASELINE
        if flags.against:
            reference = f"{flags.against} {level}"
            other = pathlib.Path(flags.against).resolve()
            rows[reference] = functools.partial(run_main, other, level)
        rows[ours] = functools.partial(run_main, ROOT, level)
        references[ours] = reference
    return rows, references


def interleave(rows, rounds):
    """Measures every row once a round: each row meets the same other load of the machine. Every
    second round goes backwards, so that a steady drift favours none.

    Args:
        rows: name -> a function without arguments that returns a figure or raises RunFailed.

    Returns:
        name -> its figures, one a round; without the rows that failed.
    """
    figures = {name: [] for name in rows}
    for number in range(rounds):
        order = list(rows)[::-1] if number % 2 else list(rows)
        for name in order:
            if name not in figures:
                continue
            try:
                figures[name].append(rows[name]())
            except RunFailed as error:
                print(f"{name} FAILED: {error}", flush=True)
                del figures[name]
                continue
            print(f"round {number + 1} of {rounds}: {name:36} {figures[name][-1]:9.1f}", flush=True)
    return figures


def train_by_seed(rows, rounds):
    """Trains every row with each of the seeds 1 to ``rounds``; prints the accuracies and means.

    Args:
        rows: name -> a function of the seed that returns an accuracy in percent.
    """
    figures = {name: [] for name in rows}
    for seed in range(1, rounds + 1):
        for name, train in rows.items():
            figures[name].append(train(seed))
            print(f"seed {seed}: {name}: {figures[name][-1]:.1f}", flush=True)
    print_table(figures, {}, unit="Acc@1")
    for name, values in figures.items():
        print(f"{name}: mean {statistics.mean(values):.1f}")


# ------------------------------------------------------------------------------------------------
# Tables
# ------------------------------------------------------------------------------------------------


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_name():
    """The processor's model name; 'unknown' where the system does not tell."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.lower().startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return "unknown"


def describe_machine(device="cpu"):
    """One line: processor, versions, and whether the machine is busy with something else."""
    parts = []
    if device == "gpu":
        parts.append(f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}")
    parts.append(f"{cpu_name()}, {usable_cores()} cores")
    parts.append(f"torch {torch.__version__}, torchvision {torchvision.__version__}")
    parts.append(f"Pillow {PIL.__version__}")
    load = os.getloadavg()[0]
    busy = " BEFORE THE START: the machine is busy, the figures are too low" if load > 0.5 else ""
    parts.append(f"load {load:.1f}{busy}")
    return f"machine: {', '.join(parts)}"


def describe_ratio(values, references):
    """'2.08 (2.01 to 2.11; 2.07)': of the ratios of each round the median, the lowest and the
    highest, then the ratio of the medians."""
    ratios = [value / reference for value, reference in zip(values, references)]
    of_medians = statistics.median(values) / statistics.median(references)
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    return f"{statistics.median(ratios):.3f} ({spread}; {of_medians:.3f})"


def print_table(figures, columns, unit="images/s"):
    """Prints a line a row: median, lowest and highest figure, and its ratios to other rows.

    Args:
        figures: name -> figures in ``unit``, one a round.
        columns: heading -> {row: the row that it is divided by}; cells without both stay empty.
    """
    width = max(map(len, figures), default=0)
    headings = "".join(f"   {'ratio to ' + heading:32}" for heading in columns)
    print(f"\n{'':{width}}  {unit:>10} {'lowest to highest':>19}{headings}".rstrip())
    for name, values in figures.items():
        cells = []
        for references in columns.values():
            reference = figures.get(references.get(name))
            cells.append(f"   {describe_ratio(values, reference) if reference else '':32}")
        spread = f"{min(values):.1f} to {max(values):.1f}"
        print(f"{name:{width}}  {statistics.median(values):10.1f} {spread:>19}{''.join(cells)}"
              .rstrip())
    if any(columns.values()):
        print("Ratios: median over the rounds (smallest to largest; ratio of the medians).")
    sys.stdout.flush()
