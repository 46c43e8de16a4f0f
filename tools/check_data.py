"""Reads every image of a data folder once and lists those that can't be read.

    python tools/check_data.py DIR [-j N]

It prints ``bad: PATH<tab>REASON`` for each on stdout, also for each class folder that only one of
train/ and val/ has, and the progress on stderr. It ends with status 0; with 1 if it found something
or the folder is incomplete, with 2 for an invalid command line.
"""

import argparse
import os
import signal
import sys
import time

for signum in (signal.SIGINT, signal.SIGPIPE):  # Ctrl-C, and | head: no traceback
    signal.signal(signum, signal.SIG_DFL)
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import torch

import main as trainer


def check_classes(train, val):
    """Names the class folders that only one split has, and returns how many there are."""
    for images, other in ((train, val), (val, train)):
        for name in sorted(set(images.classes) - set(other.classes)):
            path = os.path.join(images.root, name)
            print(f"bad: {repr(path)[1:-1]}\tclass folder missing in {other.root}")
    return len(set(train.classes) ^ set(val.classes))


def check(name, loader):
    """Reads all images of a split, names the bad ones, and returns how many there are."""
    images = loader.dataset.images
    done = bad = 0
    begin = time.monotonic()
    for batch, (_, labels, unreadable) in enumerate(loader):
        done += len(labels)
        bad += len(unreadable)
        for index, reason in unreadable:
            print(f"bad: {repr(images.path(index))[1:-1]}\t{reason}")
        if batch % 100 == 0 or done == len(images):
            rate = done / (time.monotonic() - begin)
            print(f"{name}: {done} of {len(images)} images, {rate:.0f} per second",
                  file=sys.stderr, flush=True)
    return bad


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder with train/ and val/, each with one folder per class")
    parser.add_argument("-j", "--workers", type=trainer.number(int, 0),
                        default=min(trainer.MAX_LOADERS, trainer.cores_per_process()),
                        help="loader processes (default: one per core, up to 32)")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that its encoding lacks
    flags = trainer.parse_args([arguments.data])
    runtime = trainer.Runtime(trainer.BACKENDS["cpu"], torch.device("cpu"))
    try:
        train, val = [trainer.ImageFolder(os.path.join(arguments.data, split))
                      for split in ("train", "val")]
        different = check_classes(train, val)
        # Both are kept: the processes of a later one would complain when an earlier one is deleted.
        loaders = [trainer.make_loader(images, flags, runtime, 64, arguments.workers)
                   for images in (train, val)]
        bad = check("train", loaders[0]) + check("val", loaders[1])
    except (trainer.UserError, RuntimeError) as error:  # torch's is of a loader that hangs
        trainer.print_error(error, program="check_data.py")
        return 1
    print(f"{bad} bad image(s)")
    return 1 if bad or different else 0


if __name__ == "__main__":
    sys.exit(main())
