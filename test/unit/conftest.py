"""A small folder of real images, and main.py run on it as a user would."""

import importlib.util
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parents[2]
UNIT = ROOT / "test" / "unit"
sys.path[:0] = [str(ROOT), str(ROOT / "test" / "bench")]

import chaos
import main

SMALL = ["--device", "cpu", "-a", "mnasnet0_5", "-b", "8", "--train-crop-size", "32", "--val-resize-size", "32",
         "--val-crop-size", "32", "--lr", "0.01", "--workers", "1", "--print-freq", "1"]


def run_main(*arguments, cwd, small=True, after=(), timeout=300, **environment):
    """main.py in a process of its own: a CompletedProcess with text. ``after`` wins over what makes the run small."""
    command = [sys.executable, str(ROOT / "main.py")] + [str(a) for a in arguments] + (SMALL if small else [])
    command += [str(a) for a in after]
    return subprocess.run(command, cwd=str(cwd), stdout=subprocess.PIPE, stderr=subprocess.PIPE, timeout=timeout,
                          universal_newlines=True, env=dict(os.environ, **environment))


def torchrun(processes, restarts=0):
    """The start of a command line under torch's own launcher; before torch 1.9 it had another name, and no restarts."""
    new = importlib.util.find_spec("torch.distributed.run") is not None
    command = [sys.executable, "-m", "torch.distributed." + ("run" if new else "launch"), "--nproc_per_node",
               str(processes), "--master_port", str(free_port())]
    return command + (["--max-restarts", str(restarts)] if new else []) + [str(ROOT / "main.py")]


def checkpoint(folder, name="checkpoint.pth.tar"):
    return main.read_checkpoint(str(folder / name))


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


def refused(npu, cwd):
    """Whether there is no npu, not even the stand-in, which needs torch 2.14: then a run has to be refused in one line."""
    if npu is None:
        error = the_error(run_main("--synthetic", 16, cwd=cwd, after=["--device", "npu"]))
        assert "--device npu is not there" in error
    return npu is None


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """train/ with 4 classes of 8 images, val/ with 31 images: no batch size but 1 and 31 divides it."""
    folder = tmp_path_factory.mktemp("some images")
    chaos.make_images(folder, train=8, val=8)
    max((folder / "val" / "class 3").iterdir(), key=lambda path: int(path.stem)).unlink()
    return folder


@pytest.fixture(scope="session")
def npu(tmp_path_factory):
    """The environment's variables under which npu is there (npu_double), or None: it needs torch 2.14, and a compiler.

    Every process adds a line to the file that KERNELS_LOG names, if any: how many operators it ran on cards.
    """
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])  # pip's ninja is beside python
    if not torch.__version__.startswith("2.14.") or not all(shutil.which(name, path=path) for name in ("c++", "ninja")):
        return None
    cache = os.environ.get("TORCH_EXTENSIONS_DIR") or tmp_path_factory.mktemp("extensions")
    probe = tmp_path_factory.mktemp("probe")
    (probe / "sitecustomize.py").write_text(KERNELS_PROBE)
    variables = {"PATH": path, "TORCH_EXTENSIONS_DIR": str(cache), "OMP_NUM_THREADS": "1",
                 "PYTHONPATH": os.pathsep.join([str(UNIT / "npu_double"), str(probe)])}
    subprocess.run([sys.executable, "-c", "import torch_npu"], check=True, timeout=300,
                   env=dict(os.environ, **variables))
    return variables


KERNELS_PROBE = """
import atexit, os, sys

def tell():
    if "torch_npu" in sys.modules and "KERNELS_LOG" in os.environ:
        with open(os.environ["KERNELS_LOG"], "a") as file:
            file.write("{}\\n".format(sys.modules["torch_npu"].npu.kernels_run()))

atexit.register(tell)
"""
