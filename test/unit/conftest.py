"""The fixtures that several files of tests share."""

import os
import shutil
import signal
import subprocess
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # more only get in each other's way on small images
pytest.register_assert_rewrite("helpers")

from helpers import ROOT, SMALL, STEADY, TORCH, UNIT, losses, main, make_images, run_main


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """train/ with 4 classes of 8 images, val/ with 31: only batches of 1 and 31 divide them."""
    folder = tmp_path_factory.mktemp("some images")
    make_images(folder, train=8, val=8)
    max((folder / "val" / "class 3").iterdir(), key=lambda path: int(path.stem)).unlink()
    return folder


@pytest.fixture(scope="session")
def trained(images, tmp_path_factory):
    """(folder, result) of a run of two epochs of four steps, to be read only.

    checkpoint-1.pth.tar is that between the last step and the last evaluation.
    """
    folder = tmp_path_factory.mktemp("trained")
    result = run_main(images, "--epochs", 2, "--seed", 1, "--save-freq", 2, *STEADY, cwd=folder)
    assert len(losses(result)) == 8
    return folder, result


@pytest.fixture
def run_here(capsys, monkeypatch, tmp_path):
    """A function like ``run_main`` that runs main() in this process, which takes less time."""
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGCHLD)
    handlers = {signum: signal.getsignal(signum) for signum in signals}
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        words = SMALL + ["--workers", "0"] + [str(word) for word in arguments]
        try:
            status = main.main(words)
        finally:
            for signum, handler in handlers.items():
                signal.signal(signum, handler)
        said = capsys.readouterr()
        return subprocess.CompletedProcess(words, status, said.out, said.err)

    return run


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """The repository, without its tests, in a folder with a space in its name."""
    folder = tmp_path_factory.mktemp("a clone") / "of it"
    leave_out = shutil.ignore_patterns("unit", "bench", "data", "output", "__pycache__", ".*")
    for name in ("test", "tools"):
        shutil.copytree(str(ROOT / name), str(folder / name), ignore=leave_out)
    for name in ("main.py", "mnasnet.py"):
        shutil.copy(str(ROOT / name), str(folder))
    return folder


KERNELS_PROBE = """
import atexit, os, sys

def report():
    if "torch_npu" in sys.modules and "KERNELS_LOG" in os.environ:
        with open(os.environ["KERNELS_LOG"], "a") as file:
            file.write(f"{sys.modules['torch_npu'].npu.kernels_run()}\\n")

atexit.register(report)
"""


@pytest.fixture(scope="session")
def npu(tmp_path_factory):
    """The environment variables under which the stand-in for torch_npu is found (npu_double).

    Every process adds a line to the file that KERNELS_LOG names, if any: how many operators it ran
    on the stand-in. Skips where it can't be built; fails there with REQUIRE_NPU_DOUBLE=1.
    """
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])  # pip's ninja
    missing = [tool for tool in ("c++", "ninja") if not shutil.which(tool, path=path)]
    if TORCH != (2, 14):
        missing.append(f"torch 2.14 (this is {TORCH[0]}.{TORCH[1]})")
    if missing:
        give_up = pytest.fail if os.environ.get("REQUIRE_NPU_DOUBLE") == "1" else pytest.skip
        give_up(f"the stand-in for torch_npu needs {', '.join(missing)}")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the first builds it, the others wait
        shared = shared.parent
    cache = os.environ.get("TORCH_EXTENSIONS_DIR") or shared / "extensions"
    probe = tmp_path_factory.mktemp("probe")
    (probe / "sitecustomize.py").write_text(KERNELS_PROBE)
    variables = {"PATH": path, "TORCH_EXTENSIONS_DIR": str(cache), "OMP_NUM_THREADS": "1",
                 "PYTHONPATH": os.pathsep.join([str(UNIT / "npu_double"), str(probe)])}
    subprocess.run([sys.executable, "-c", "import torch_npu"], check=True, timeout=600,
                   env=dict(os.environ, **variables))
    return variables
