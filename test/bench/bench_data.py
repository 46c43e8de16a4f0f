"""Images per second of the data path on one core: from a JPEG file to the pixels of a crop.

Compares main.read_image, with the crops of training and of evaluation, with the classic pipeline of
Pillow and torchvision (RandomResizedCrop, flip, ToTensor, Normalize; Resize, CenterCrop, ToTensor,
Normalize), and both with decoding alone, by Pillow and by torchvision's decode_jpeg where it is
available. Everything runs in one thread, and the time is that thread's own: other load matters
little, and N cores give about N times as much. The files are in the page cache.

--loader measures main.py's loader instead, with 1, 2 and 4 worker processes: images per second that
arrive in the trainer, and the milliseconds that its own thread takes to receive and copy one. With
--against DIR beside that of another checkout. More workers than cores share them.

"ratio to classic" is what the data path gains, "ratio to decode" its fraction of the fastest
decoder, its upper bound.
"""

import functools
import io
import pathlib
import random
import statistics
import sys
import tempfile
import time

import numpy as np
import torch
from PIL import Image

import common
import main as trainer


def read_file(path):
    with open(path, "rb") as file:
        return file.read()


def decode_with_pillow(path):
    return Image.open(io.BytesIO(read_file(path))).convert("RGB")


def decode_with_torchvision(path):
    from torchvision.io import decode_jpeg

    return decode_jpeg(torch.from_numpy(np.frombuffer(bytearray(read_file(path)), np.uint8)))


def classic_pipeline(size, train):
    transforms = common.baseline_transforms(size, train)
    return lambda path: transforms(decode_with_pillow(path))


def main_pipeline(size, train):
    rng = random.Random(0)

    def get_crop(width, height):
        if train:
            return trainer.random_resized_crop(width, height, size, 0.08, rng)
        return trainer.resize_center_crop(width, height, size * 8 // 7, size)

    block = np.empty((size, size, 3), np.uint8)  # as of a loader

    def load(path):
        trainer.copy_image(trainer.read_image(path, get_crop, size), block)
        return block

    return load


def augmented_pipeline(size):
    """That of training, with TrivialAugment and RandomErasing as in the recipe strong."""
    load = main_pipeline(size, train=True)
    augment = trainer.build_augmentation(trainer.parse_args(
        ["data", "--auto-augment", "ta", "--random-erasing", "0.1"]))
    return lambda path: augment(load(path))


# Receives an epoch of batches and copies each into one block, as into pinned memory. Its arguments
# are a checkout and the flags of main.py.
RECEIVE = """
import sys, time
sys.path.insert(0, sys.argv[1])
import torch
import main
flags = main.parse_args(sys.argv[2:])
torch.set_num_threads(1)
runtime = main.open_device(flags, main.BACKENDS["cpu"])
images, _ = main.open_images(flags)
loader = main.make_loader(images, flags, runtime, flags.batch_size, flags.workers, seed=0)
block = torch.zeros(flags.batch_size, flags.train_crop_size, flags.train_crop_size, 3,
                    dtype=torch.uint8)
begin, cpu_begin = time.monotonic(), time.thread_time()
for batch in loader:
    pixels = batch[0]
    if not torch.is_tensor(pixels):  # a slot of the ring
        pixels = torch.from_numpy(loader.dataset.ring[pixels])
    block.copy_(pixels)
count = len(loader) * flags.batch_size
print("images/sec", count / (time.monotonic() - begin))
print("milliseconds", 1000 * (time.thread_time() - cpu_begin) / count)
"""


def receive(flags, folder, repository, workers, milliseconds):
    """Runs a loader in a process of its own; returns images per second, and appends the time of
    the trainer's thread to the list ``milliseconds``."""
    output = common.run_python([
        "-c", RECEIVE, repository, folder, "--device", "cpu", "--workers", workers,
        "-b", flags.batch_size, "--train-crop-size", flags.size])
    rate, thread = (float(line.split()[1]) for line in output.splitlines())
    milliseconds.append(thread)
    return rate


def compare_loaders(flags, folder):
    """Prints the table of --loader."""
    repositories = {"main.py": common.ROOT}
    if flags.against:
        repositories[flags.against] = pathlib.Path(flags.against).resolve()
    rows, milliseconds, references = {}, {}, {}
    for workers in (1, 2, 4):
        for name, repository in repositories.items():
            row = f"{name}, {workers} worker(s)"
            milliseconds[row] = []
            rows[row] = functools.partial(
                receive, flags, folder, repository, workers, milliseconds[row])
        if flags.against:
            references[f"main.py, {workers} worker(s)"] = row
    figures = common.interleave(rows, flags.rounds)
    common.print_table(figures, {flags.against: references} if flags.against else {})
    for name in figures:
        print(f"{name}: {statistics.median(milliseconds[name]):.3f} ms of the trainer's thread "
              "an image")


def measure(load, paths):
    """Images per second of this thread's time."""
    start = time.process_time()
    for path in paths:
        load(path)
    return len(paths) / (time.process_time() - start)


def decoders(path):
    """name -> function of a path; the fastest first. ``path`` is an image to try them on."""
    available = {}
    try:
        decode_with_torchvision(path)
        available["torchvision decode"] = decode_with_torchvision
    except (ImportError, AttributeError, RuntimeError) as error:
        print(f"torchvision's decode_jpeg is not available: {error}")
    available["Pillow decode"] = decode_with_pillow
    return available


def parse_args():
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--images", type=int, default=100, metavar="N", help="different images")
    add("--rounds", type=int, default=5, metavar="N", help="runs of each row of the table")
    add("--loader", action="store_true", help="measure the loader processes")
    add("--against", metavar="DIR", help="another checkout, for --loader")
    add("-b", "--batch-size", type=int, default=64, metavar="N", help="of --loader")
    add("--batches", type=int, default=30, metavar="N", help="of --loader")
    add("--size", type=int, default=224, metavar="PX",
        help="side of the crop; evaluation resizes to 8/7 of it first")
    return parser.parse_args()


def main():
    flags = parse_args()
    torch.set_num_threads(1)
    print(common.describe_machine())
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = pathlib.Path(scratch) / "images"
        count = flags.batches * flags.batch_size if flags.loader else flags.images
        common.make_images(folder, count, common.CLASSES, flags.images)
        if flags.loader:
            return compare_loaders(flags, folder)
        paths = sorted(str(path) for path in (folder / "train").rglob("*.jpg"))
        loads = decoders(paths[0])
        columns = {"classic": {}, "decode": {}}
        bound = next(iter(loads))
        for purpose in ("training", "evaluation"):
            train = purpose == "training"
            ours, classic = f"main.py, {purpose}", f"classic, {purpose}"
            loads[classic] = classic_pipeline(flags.size, train)
            loads[ours] = main_pipeline(flags.size, train)
            columns["classic"][ours] = classic
            columns["decode"].update({classic: bound, ours: bound})
        augmented = "main.py, TrivialAugment, RandomErasing"
        try:
            loads[augmented] = augmented_pipeline(flags.size)
            columns["main.py, training"] = {augmented: "main.py, training"}
        except trainer.UserError as error:
            print(error)
        for load in loads.values():
            load(paths[0])  # imports and first allocations are not measured
        rows = {name: functools.partial(measure, load, paths) for name, load in loads.items()}
        figures = common.interleave(rows, flags.rounds)
    common.print_table(figures, columns)


if __name__ == "__main__":
    sys.exit(main())
