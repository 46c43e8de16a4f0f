"""Unpacks a data set from an .npz file into the folders that main.py reads.

    python unpack_data.py fashion_mnist_2500.npz FOLDER

The file holds train_images, train_labels, val_images, val_labels and classes; FOLDER gets one JPEG file an image
under train/CLASS/ and val/CLASS/. A FOLDER that was made from the same file is left as it is. It appears in one
step: whoever finds it finds all of it.
"""

import hashlib
import os
import shutil
import sys
import tempfile

import numpy
from PIL import Image

STAMP = "made_from.txt"  # holds the checksum of the .npz file


def stamp_of(folder):
    """The checksum that ``folder`` was made from, or None."""
    try:
        with open(os.path.join(folder, STAMP)) as file:
            return file.read().strip()
    except OSError:
        return None


def write(arrays, checksum, folder):
    """Writes all images of ``arrays`` below ``folder``."""
    for split in "train", "val":
        for name in arrays["classes"]:
            os.makedirs(os.path.join(folder, split, str(name)))
        pairs = zip(arrays[split + "_images"], arrays[split + "_labels"])
        for number, (pixels, label) in enumerate(pairs):
            path = os.path.join(folder, split, str(arrays["classes"][label]), "{:05d}.jpg".format(number))
            Image.fromarray(pixels).save(path, quality=95)
    with open(os.path.join(folder, STAMP), "w") as file:
        file.write(checksum + "\n")


def unpack(source, folder):
    with open(source, "rb") as file:
        checksum = hashlib.sha256(file.read()).hexdigest()
    if stamp_of(folder) == checksum:
        return
    if os.path.exists(folder) and stamp_of(folder) is None:
        sys.exit("unpack_data.py: error: {!r} is there and was not made by this script; move it away".format(folder))
    with numpy.load(source, allow_pickle=False) as file:
        arrays = dict(file)
    temporary = tempfile.mkdtemp(prefix=os.path.basename(folder) + ".", dir=os.path.dirname(folder) or ".")
    try:
        new = os.path.join(temporary, "new")
        write(arrays, checksum, new)
        if os.path.exists(folder):  # from an earlier data file
            os.rename(folder, os.path.join(temporary, "old"))
        try:
            os.rename(new, folder)
        except OSError:
            if stamp_of(folder) != checksum:  # else: another process was faster, with the same
                raise
    finally:
        shutil.rmtree(temporary)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("unpack_data.py: error: expected two arguments, the .npz file and the folder to make")
    unpack(sys.argv[1], os.path.abspath(sys.argv[2]))
