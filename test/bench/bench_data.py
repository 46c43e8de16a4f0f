"""Images per second of the data path, per core: from a JPEG file to the pixels of a crop, without the network.

It compares main.read_image, with the plans of training and of evaluation, with the classic pipeline of Pillow and
torchvision (RandomResizedCrop, flip, ToTensor, Normalize; Resize, CenterCrop, ToTensor, Normalize), and both with
decoding alone, by Pillow and by torchvision's decode_jpeg where it has that. Everything runs in one thread, and the
time is that thread's own: what else the machine does matters little, and a machine of N cores gives about N times as
much. The files are in the page cache.

How to read it: "x classic" is what the data path gains, "x decode" its share of the fastest decoder, its bound.
"""

import io
import pathlib
import random
import sys
import tempfile
import time

import numpy as np
import torch
from PIL import Image

import common
import main as trainer


def read(path):
    with open(path, "rb") as file:
        return file.read()


def decode_with_pillow(path):
    return Image.open(io.BytesIO(read(path))).convert("RGB")


def decode_with_torchvision(path):
    from torchvision.io import decode_jpeg

    return decode_jpeg(torch.from_numpy(np.frombuffer(bytearray(read(path)), np.uint8)))


def classic(train, flags):
    from torchvision import transforms

    shape = ([transforms.RandomResizedCrop(flags.size), transforms.RandomHorizontalFlip()] if train else
             [transforms.Resize(flags.size * 8 // 7), transforms.CenterCrop(flags.size)])
    pipeline = transforms.Compose(shape + [transforms.ToTensor(), transforms.Normalize(common.MEAN, common.STD)])
    return lambda path: pipeline(decode_with_pillow(path))


def ours(train, flags):
    rng = random.Random(0)

    def load(path):
        plan = trainer.train_plan(flags.size, 0.08, rng) if train else trainer.val_plan(flags.size * 8 // 7, flags.size)
        return trainer.read_image(path, plan, flags.size)

    return load


def rate(load, paths):
    """Images per second of this thread's time."""
    begin = time.process_time()
    for path in paths:
        load(path)
    return len(paths) / (time.process_time() - begin)


def main():
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("--images", type=int, default=100, metavar="N", help="different images")
    add("--rounds", type=int, default=5, metavar="N", help="runs of each way")
    add("--size", type=int, default=224, metavar="PX", help="side of the crop; evaluation resizes to 8/7 of it first")
    flags = parser.parse_args()
    torch.set_num_threads(1)
    print(common.machine())
    loads = {"Pillow decode": decode_with_pillow, "classic, training": classic(True, flags),
             "main.py, training": ours(True, flags), "classic, evaluation": classic(False, flags),
             "main.py, evaluation": ours(False, flags)}
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        common.make_images(pathlib.Path(place) / "images", flags.images, common.CLASSES, flags.images)
        paths = sorted(str(path) for path in (pathlib.Path(place) / "images" / "train").rglob("*.jpg"))
        try:
            decode_with_torchvision(paths[0])
            loads = dict({"torchvision decode": decode_with_torchvision}, **loads)
        except (ImportError, AttributeError, RuntimeError) as error:
            print("torchvision decode: not here ({})".format(trainer.first_line(error)))
        for load in loads.values():
            load(paths[0])
        figures = common.interleave({name: (lambda load=load: rate(load, paths)) for name, load in loads.items()},
                                    flags.rounds)
    bound = next(iter(loads))
    for what in ("training", "evaluation"):
        shown = {name: values for name, values in figures.items() if "decode" in name or what in name}
        common.print_table(shown, ["classic, " + what, bound])


if __name__ == "__main__":
    sys.exit(main())
