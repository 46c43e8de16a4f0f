"""A small folder of real images, and main.py run on it as a user would."""

import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

SMALL = ["--device", "cpu", "-a", "mnasnet0_5", "-b", "8", "--train-crop-size", "32", "--val-resize-size", "32",
         "--val-crop-size", "32", "--lr", "0.01", "--workers", "1", "--print-freq", "1"]


def run_main(*arguments, cwd, small=True, after=(), timeout=300, **environment):
    """main.py in a process of its own: a CompletedProcess with text. ``after`` wins over what makes the run small."""
    command = [sys.executable, str(ROOT / "main.py")] + [str(a) for a in arguments] + (SMALL if small else [])
    command += [str(a) for a in after]
    return subprocess.run(command, cwd=str(cwd), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=timeout,
                          universal_newlines=True, env=dict(os.environ, **environment))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def the_error(result, status=1):
    """The one line on stderr of a run that had to fail."""
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert result.returncode == status, result.stderr + result.stdout
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """train/ with 4 classes of 8 images, val/ with 31 images: no batch size but 1 and 31 divides it."""
    folder = tmp_path_factory.mktemp("some images")
    data = np.load(str(ROOT / "test" / "data" / "fashion_mnist_2500.npz"))
    for split, each in (("train", 8), ("val", 8)):
        for label in range(4):
            place = folder / split / "class {}".format(label)
            place.mkdir(parents=True)
            for i in np.flatnonzero(data[split + "_labels"] == label)[:each]:
                if (split, label, len(list(place.iterdir()))) != ("val", 3, 7):
                    Image.fromarray(data[split + "_images"][i]).save(str(place / "{}.jpg".format(i)), quality=95)
    return folder
