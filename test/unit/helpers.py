"""What several tests use: runs of main.py, small image folders, comparisons of checkpoints."""

import atexit
import csv
import multiprocessing
import os
import pathlib
import re
import runpy
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

UNIT = pathlib.Path(__file__).resolve().parent
ROOT = UNIT.parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import main
from main import TORCH

# main.py's flags that make a run small; what a test adds comes after them and wins.
TINY = ["-a", "mnasnet0_5", "--train-crop-size", "32", "--val-resize-size", "32",
        "--val-crop-size", "32", "--print-freq", "1"]
SMALL = ["--device", "cpu", "-b", "8", "--lr", "0.01", "--workers", "1"] + TINY
# Keeps the losses of a network that has seen few and small images finite.
STEADY = ["--lr", "0.001", "--bn-momentum", "0.9"]
ENDLESS = ["--epochs", 10000]  # so that the run can't end before a test disturbs it
CLOCKS = ("fps", "seconds", "data_wait")  # what differs between two runs that are otherwise equal

needs_bf16 = pytest.mark.skipif(
    TORCH < (1, 10), reason="O1 and O2 on the CPU need torch.autocast, which came with torch 1.10")


def own_files():
    """The repository's Python and shell files, and its documents."""
    patterns = ("*.py", "*.sh", "*.md", "LICENSE", ".ci/run", "tools/*.py", "test/*.*",
                "test/bench/*.*", "test/unit/**/*.py")
    return sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.is_file()})


def several(processes):
    """The flags of a run with so many processes on this machine."""
    return ["--multiprocessing-distributed", "--device-list", ",".join(map(str, range(processes)))]


def parse(*arguments):
    """The flags of a command line that is small and has a data folder, which need not exist."""
    return main.parse_args(SMALL + ["somewhere"] + [str(word) for word in arguments])


def cpu_runtime(rank=0, world_size=1):
    cpu = torch.device("cpu")
    return main.Runtime(main.BACKENDS["cpu"], cpu, rank=rank, world_size=world_size)


def main_command(*arguments, small=True, python=sys.executable):
    """main.py's command line; with ``small`` the arguments follow SMALL."""
    words = (SMALL if small else []) + list(arguments)
    return [str(python), str(ROOT / "main.py")] + [str(word) for word in words]


# Its processes find imported what main.py imports, which is most of the time of a small run.
FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(["main", "torchvision.io", "torch._dynamo"])


def become_program(words, cwd, environment, output):
    """Makes this process of FORK_SERVER one that runs ``words``, a program and its arguments.

    There, as in Python 3.14, a process starts others by a fork server where it does not say how.
    """
    for descriptor, path in enumerate(output, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = words
    sys.path.insert(0, os.path.dirname(words[0]))
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        if ended.code:  # without one, Python 3.7's Process would end with status 1
            raise
    finally:
        atexit._run_exitfuncs()


def fork_program(words, cwd, timeout):
    """``run_program`` by FORK_SERVER."""
    with tempfile.TemporaryDirectory() as folder:
        output = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        process = FORK_SERVER.Process(
            target=become_program, args=(words, cwd, dict(os.environ), output))
        process.start()
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(words, timeout)
        said = [pathlib.Path(path).read_text(encoding="utf-8") for path in output]
    return subprocess.CompletedProcess(words, process.exitcode, *said)


def run_program(program, *arguments, cwd=ROOT, timeout=300, **environment):
    """Runs a Python program of the repository: a CompletedProcess with stdout and stderr as text.

    FORK_SERVER starts it, unless it asks for an environment or more threads, which imports read.
    """
    words = [str(ROOT / program)] + [str(word) for word in arguments]
    if not environment and os.environ.get("OMP_NUM_THREADS") == "1":
        return fork_program(words, str(cwd), timeout)
    return subprocess.run(
        [sys.executable] + words, cwd=str(cwd), env=dict(os.environ, **environment),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=timeout)


def run_main(*arguments, cwd, small=True, **environment):
    """``run_program`` of main.py; with ``small`` the arguments follow SMALL."""
    return run_program("main.py", *(SMALL if small else []), *arguments, cwd=cwd, **environment)


def receive_signals():
    """In a new process: undoes what nohup, or the background of a shell, has done to the tests."""
    for signum in (signal.SIGHUP, signal.SIGINT):
        signal.signal(signum, signal.SIG_DFL)


def start(command, cwd, **environment):
    """A command in the background: a Popen with stdout and stderr together as text."""
    return subprocess.Popen(
        command, cwd=str(cwd), env=dict(os.environ, **environment), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True,
        preexec_fn=receive_signals)


def start_main(*arguments, cwd, small=True, python=sys.executable, **environment):
    """main.py in the background (see ``start``)."""
    return start(main_command(*arguments, small=small, python=python), cwd, **environment)


# Image files of class 3 hang, as on a network disk that is gone, once there is a file named hang.
HANGS = """
import os, sys, time, main
read_image = main.read_image

def hang(path, *rest):
    if "class 3" in path and os.path.exists("hang"):
        time.sleep(3600)
    return read_image(path, *rest)

main.read_image = hang
sys.exit(main.main())
"""


def start_hanging(*arguments, cwd):
    """main.py in the background (see ``start``), with loaders that hang when a test says so."""
    command = main_command(*arguments)
    return start([command[0], "-c", HANGS] + command[2:], cwd, PYTHONPATH=str(ROOT))


def finish(processes, timeout=300):
    """Waits for processes of ``start``, which must all end with status 0; their outputs."""
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), outputs
    return outputs


def read_until(process, pattern):
    """The lines of a process of ``start`` up to the first that matches."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return lines
    raise AssertionError(f"no line matched {pattern!r}:\n{''.join(lines)}")


def torchrun(processes, restarts=0):
    """The start of a command line under torch's own launcher, up to and including main.py."""
    has_run = TORCH >= (1, 9)  # before, there was only torch.distributed.launch, without restarts
    command = [sys.executable, "-m", f"torch.distributed.{'run' if has_run else 'launch'}",
               "--nproc_per_node", str(processes), "--master_port", str(free_port())]
    if has_run:
        command += ["--max_restarts", str(restarts)]
    return command + [str(ROOT / "main.py")]


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def the_error(result, status=1):
    """The one line on stderr of a run that had to fail."""
    lines = [line for line in result.stderr.splitlines() if "error:" in line]
    assert result.returncode == status, result.stderr + result.stdout
    assert len(lines) == 1 and "Traceback" not in result.stderr, result.stderr
    return lines[0]


def losses(result):
    """The loss of each logged step of a run that had to succeed."""
    assert result.returncode == 0, result.stdout + result.stderr
    return [float(loss) for loss in re.findall(r"^Epoch:.*?Loss +(\S+)", result.stdout, re.M)]


def final_loss(result):
    """The last loss, of an evaluation its own, of a run that had to succeed."""
    assert result.returncode == 0, result.stdout + result.stderr
    return float(re.search(r"^Result: .* loss (\S+)$", result.stdout, re.M).group(1))


def counts(result):
    """(correct at the first guess, within five, images) of the last evaluation, as text."""
    assert result.returncode == 0, result.stdout + result.stderr
    return re.findall(r"\* Acc@1 .*\((\d+) and (\d+) of (\d+) images\)", result.stdout)[-1]


def read_checkpoint(folder, name="checkpoint.pth.tar"):
    return main.read_checkpoint(str(folder / name))


def make_images(folder, train=20, val=4, classes=4):
    """A small image folder: ``train`` and ``val`` images a class."""
    data = np.load(str(ROOT / "test" / "data" / "fashion_mnist_2500.npz"))
    for split, count in (("train", train), ("val", val)):
        images, labels = data[f"{split}_images"], data[f"{split}_labels"]
        for label in range(classes):
            class_folder = folder / split / f"class {label}"
            class_folder.mkdir(parents=True)
            for index in np.flatnonzero(labels == label)[:count]:
                Image.fromarray(images[index]).save(str(class_folder / f"{index}.jpg"), quality=95)


def claim_size(jpeg, width, height):
    """A JPEG file whose header claims another size than its data has."""
    start = jpeg.index(b"\xff\xc0") + 5  # after marker, length and precision
    return jpeg[:start] + struct.pack(">HH", height, width) + jpeg[start + 4:]


def differences(one, other, name="checkpoint"):
    """The names of what differs between two checkpoints, but for what a clock measured."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = [] if one.keys() == other.keys() else [f"{name}: other keys"]
        return found + [text for key in one if key not in CLOCKS and key in other
                        for text in differences(one[key], other[key], f"{name}.{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        found = [] if len(one) == len(other) else [f"{name}: other length"]
        return found + [text for index, pair in enumerate(zip(one, other))
                        for text in differences(*pair, name=f"{name}[{index}]")]
    if torch.is_tensor(one) and torch.is_tensor(other):
        return [] if torch.equal(one, other) else [name]
    both_nan = one != one and other != other
    return [] if one == other or both_nan else [name]


def folders_differ(one, other):
    """What differs between the results of two runs."""
    found = []
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        found += differences(read_checkpoint(one, name), read_checkpoint(other, name), name)
    return found + differences(read_metrics(one), read_metrics(other), "metrics.csv")


def read_metrics(folder):
    """The rows of metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return [dict(row) for row in csv.DictReader(file)]


def processes_of(folder):
    """The ids of the processes that run in a folder; threads and zombies left out."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(str(entry / "cwd")) == str(folder):
                found.append(int(entry.name))
        except OSError:
            pass
    return found


def command_line(pid):
    """The words of a process's command line, each with a NUL after it; '' once it has ended."""
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def parent(pid):
    """The id of a process's parent; 0 once it has ended."""
    try:
        return int(pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def cpu_time(pid):
    """The clock ticks that a process has computed for."""
    fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return int(fields[11]) + int(fields[12])


def wait_until_it_waits(process):
    """Waits until a process has computed nothing for two seconds."""
    before = None
    while before != cpu_time(process.pid):
        before = cpu_time(process.pid)
        time.sleep(2)


def wait_for(get, seconds=60):
    """The first true value of ``get()``, which may take so long on a busy machine."""
    limit = time.monotonic() + seconds
    value = get()
    while not value and time.monotonic() < limit:
        time.sleep(0.1)
        value = get()
    return value
