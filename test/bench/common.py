"""What the benchmarks share: images like ImageNet's, main.py run as a user would, the machine in words, a table."""

import argparse
import os
import pathlib
import re
import statistics
import subprocess
import sys

import numpy as np
import PIL
import torch
from PIL import Image, ImageDraw

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, as the usual loops have them
USUAL_WORKERS = 4  # -j of the usual trainers
PHOTO_SIZE = (500, 375)  # ImageNet's most frequent one
CLASSES = 10


class Failed(Exception):
    """A run that did not end well: the line that says why."""


def parser_of(doc):
    """An argument parser that shows a script's whole docstring and the defaults."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    return argparse.ArgumentParser(description=doc, formatter_class=Help)


def add_comparison(parser, size):
    """The flags of a benchmark that compares main.py with a usual loop; ``size`` says what --size is the side of."""
    add = parser.add_argument
    add("--rounds", type=int, default=3, metavar="N", help="runs of each way")
    add("-b", "--batch-size", type=int, default=64, metavar="N", help="images a step")
    add("--size", type=int, default=224, metavar="PX", help=size)
    add("-a", "--arch", default="mnasnet1_0", help="network")
    add("--device", choices=["cpu", "gpu"], default=best_device())
    add("--levels", default="O0,O1", help="--opt-level of main.py, one or more")
    add("--workers", type=int, metavar="N", help="main.py's --workers (default: its own)")
    add("--usual-workers", type=int, default=USUAL_WORKERS, metavar="N", help="the usual loop's loaders")
    add("--usual-loop", metavar="DIR", help="run only the usual loop, once, in this process, on the images there")


def cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_name():
    """The processor's model name; 'unknown' where the system does not tell."""
    try:
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":", 1)[1].strip() for line in lines if line.lower().startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else "unknown"


def machine(device="cpu"):
    """One line: what the figures were measured on, and whether it had other work to do."""
    import torchvision

    told = ["{}, {} cores".format(cpu_name(), cores()), "torch {}".format(torch.__version__),
            "torchvision {}".format(torchvision.__version__), "Pillow {}".format(PIL.__version__)]
    if device == "gpu":
        told.insert(0, "{} x {}".format(torch.cuda.device_count(), torch.cuda.get_device_name(0)))
    busy = os.getloadavg()[0]
    told.append("load {:.1f}{}".format(busy, " BEFORE THE START: the machine is busy, and the figures are too low"
                                       if busy > 0.5 else ""))
    return "machine: " + ", ".join(told)


def best_device():
    return "gpu" if torch.cuda.is_available() else "cpu"


def photo(number, label):
    """An image with what makes photographs costly to decode: shaded areas, edges, texture at every scale. The same one
    every time. Its label gives it a tint, so that a classifier has something to learn."""
    rng = np.random.RandomState([20260, number])
    width, height = PHOTO_SIZE if rng.rand() < 0.75 else PHOTO_SIZE[::-1]
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    shade = rng.uniform(-50, 50, 3) * (x / width)[..., None] + rng.uniform(-50, 50, 3) * (y / height)[..., None]
    angle = 2 * np.pi * label / CLASSES
    base = 120 + 40 * np.cos(angle + np.array([0, 2.1, 4.2])) + rng.uniform(-8, 8, 3)
    canvas = Image.fromarray((base + shade).clip(0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(canvas)
    for _ in range(rng.randint(8, 20)):
        left, top = rng.randint(-60, width), rng.randint(-60, height)
        corners = [left, top, left + rng.randint(20, 200), top + rng.randint(20, 200)]
        shape = draw.ellipse if rng.rand() < 0.6 else draw.rectangle
        shape(corners, fill=tuple(int(c) for c in (base + rng.uniform(-90, 90, 3)).clip(0, 255)))
    # Noise whose amplitude falls with the frequency, as in photographs; most of it in the brightness.
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    falling = 1 / np.maximum(frequency, 1 / 256)
    texture = np.stack([np.fft.irfft2(np.fft.rfft2(rng.randn(height, width)) * falling, (height, width))
                        for _ in range(2)])
    texture /= texture.std(axis=(1, 2), keepdims=True)
    strength = rng.uniform(15, 38)
    colour = np.array([0.3, -0.1, -0.3]) * texture[1][..., None]
    grain = 5 * rng.randn(height, width)
    pixels = np.asarray(canvas) + strength * (texture[0][..., None] + colour) + grain[..., None]
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def make_split(folder, files, photos, first=0):
    """``files`` JPEGs in folders 0 to 9, of which ``photos`` differ and the others are links; the bytes they stand for."""
    made, size = [], 0
    for label in range(CLASSES):
        (folder / str(label)).mkdir(parents=True)
    for number in range(files):
        label = number % CLASSES
        path = folder / str(label) / "{:06d}.jpg".format(number)
        if number < photos:
            photo(first + number, label).save(str(path), quality=90)
            made.append(path)
        else:  # it has the same label: photos is a multiple of CLASSES
            os.link(str(made[number % photos]), str(path))
        size += path.stat().st_size
    return size


def make_images(folder, train, val, photos):
    """train/ and val/ with that many files, of at most ``photos`` different images each. Says what it made."""
    folder = pathlib.Path(str(folder))
    photos = max(CLASSES, photos // CLASSES * CLASSES)
    train, val = max(train, CLASSES), max(val, CLASSES)
    size = make_split(folder / "train", train, photos) + make_split(folder / "val", val, photos, first=10 ** 6)
    print("images: {} for training and {} for evaluation, at most {} different each; {}x{} JPEG, {:.0f} KB on "
          "average".format(train, val, photos, PHOTO_SIZE[0], PHOTO_SIZE[1], size / (train + val) / 1000), flush=True)


def run_main(*arguments, **options):
    """main.py in a process of its own, what it printed; on ``cores``, a set of core numbers, where given.

    Raises:
        Failed: it ended with an error.
    """
    return run([ROOT / "main.py"] + list(arguments), **options)


def run(arguments, cores=None, timeout=1800):
    """A Python script in a process of its own; see ``run_main``."""
    limit = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    result = subprocess.run([sys.executable] + [str(a) for a in arguments], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, universal_newlines=True, timeout=timeout, preexec_fn=limit)
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        raise Failed(([line for line in lines if "error" in line.lower()] or lines or ["no message"])[-1])
    return result.stdout


def images_per_second(output):
    """From the line 'Result: ... images/sec X ...' of main.py and of the usual loops here."""
    return float(re.findall(r"^Result:.* images/sec ([0-9.]+)", output, re.M)[-1])


def counts(output):
    """(right at the first guess, within five, of how many) from main.py's line after an evaluation."""
    return tuple(int(n) for n in re.findall(r"^ \* Acc@1 .*\((\d+) and (\d+) of (\d+) images\)", output, re.M)[-1])


def interleave(ways, rounds):
    """Runs each of ``ways`` (a dictionary, name -> function that gives a figure) once a round, in turn, so that what
    else the machine does hits all alike. A way that fails is named and left out.

    Returns a dictionary, name -> its figures.
    """
    figures = {name: [] for name in ways}
    for turn in range(rounds):
        for name, measure in ways.items():
            if figures[name] is None:
                continue
            try:
                figures[name].append(measure())
                print("round {} of {}: {:32} {:9.1f}".format(turn + 1, rounds, name, figures[name][-1]), flush=True)
            except Failed as failed:
                print("{} FAILED: {}".format(name, failed), flush=True)
                figures[name] = None
    return {name: values for name, values in figures.items() if values}


def print_table(figures, against, unit="images/s"):
    """A line a way: median, lowest and highest, and the ratio of its median to each of ``against``."""
    against = [name for name in against if name in figures]
    medians = {name: statistics.median(values) for name, values in figures.items()}
    width = max(map(len, figures), default=0)
    print("\n{:{}}  {:>10} {:>19}{}".format("", width, unit, "lowest to highest", "".join(
        "   x " + name for name in against)))
    for name, values in figures.items():
        ratios = "".join("   {:>{}.2f}".format(medians[name] / medians[other], len(other) + 2) for other in against)
        print("{:{}}  {:10.1f} {:>19}{}".format(
            name, width, medians[name], "{:.1f} to {:.1f}".format(min(values), max(values)), ratios))
    sys.stdout.flush()
