"""Unpacks a data set from an .npz file into the folders that main.py reads.

    python unpack_data.py fashion_mnist_2500.npz FOLDER

The file holds train_images, train_labels, val_images, val_labels and classes; FOLDER gets one JPEG
file an image under train/CLASS/ and val/CLASS/. A FOLDER that was made from the same file is left
alone. It appears in one step, by renaming: a process that sees it sees all of its images.
"""

import hashlib
import os
import shutil
import sys
import tempfile

import numpy
from PIL import Image

CHECKSUM_FILE = "made_from.txt"  # in FOLDER: the SHA-256 of the .npz file


def read_checksum(folder):
    """The checksum of the file that ``folder`` was made from, or None."""
    try:
        with open(os.path.join(folder, CHECKSUM_FILE)) as file:
            return file.read().strip()
    except OSError:
        return None


def write_images(arrays, checksum, folder):
    """Writes all images of ``arrays`` into a new ``folder``."""
    classes = [str(name) for name in arrays["classes"]]
    for split in ("train", "val"):
        for name in classes:
            os.makedirs(os.path.join(folder, split, name))
        pairs = zip(arrays[f"{split}_images"], arrays[f"{split}_labels"])
        for number, (pixels, label) in enumerate(pairs):
            path = os.path.join(folder, split, classes[label], f"{number:05d}.jpg")
            Image.fromarray(pixels).save(path, quality=95)
    with open(os.path.join(folder, CHECKSUM_FILE), "w") as file:
        file.write(f"{checksum}\n")


def replace_folder(folder, new, old, checksum):
    """Renames ``new`` to ``folder``; a ``folder`` from an earlier data file moves to ``old``."""
    if os.path.exists(folder):
        os.rename(folder, old)
    try:
        os.rename(new, folder)
    except OSError:
        if read_checksum(folder) != checksum:  # else another process was faster, with the same file
            raise


def unpack(source, folder):
    with open(source, "rb") as file:
        checksum = hashlib.sha256(file.read()).hexdigest()
    found = read_checksum(folder)
    if found == checksum:
        return
    if os.path.exists(folder) and found is None:
        sys.exit(f"unpack_data.py: error: {folder!r} exists and was not made by this script: "
                 "move it away")
    with numpy.load(source, allow_pickle=False) as file:
        arrays = dict(file)
    parent, name = os.path.split(folder)
    temporary = tempfile.mkdtemp(prefix=f"{name}.", dir=parent)
    try:
        new = os.path.join(temporary, "new")
        write_images(arrays, checksum, new)
        replace_folder(folder, new, os.path.join(temporary, "old"), checksum)
    finally:
        shutil.rmtree(temporary)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("unpack_data.py: error: expected the .npz file and the folder to make")
    unpack(sys.argv[1], os.path.abspath(sys.argv[2]))
