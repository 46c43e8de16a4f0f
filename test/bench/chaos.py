#!/usr/bin/env python3
"""Kills training runs at random moments, goes on with --resume auto, and compares the end with a run never stopped.

For every number of processes and precision: one run without a break, and one that is killed --kills times (SIGKILL:
the command; SIGTERM: the command, a rank, or the launch script). It prints how often it was stopped and went on, the
longest time to the exit, what was left running, and whether weights, optimiser, scaler and metrics.csv are equal to
the last bit. The exit status is 1 if anything differs.

    python test/bench/chaos.py --kills 20 --signal KILL
    python test/bench/chaos.py --kills 10 --signal TERM --script
"""

import argparse
import csv
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from PIL import Image

import main

CLOCKS = ("fps", "seconds", "data_wait")  # what differs between two runs that are the same
SMALL = ["-a", "mnasnet0_5", "--train-crop-size", "32", "--val-resize-size", "32", "--val-crop-size", "32",
         "--workers", "1", "--print-freq", "1"]


def make_images(folder, train=20, val=4, classes=4):
    """A small image folder: ``train`` and ``val`` images a class."""
    data = np.load(str(ROOT / "test" / "data" / "fashion_mnist_2500.npz"))
    for split, each in (("train", train), ("val", val)):
        for label in range(classes):
            place = folder / split / "class {}".format(label)
            place.mkdir(parents=True)
            for i in np.flatnonzero(data[split + "_labels"] == label)[:each]:
                Image.fromarray(data[split + "_images"][i]).save(str(place / "{}.jpg".format(i)), quality=95)


def differences(one, other, name="checkpoint"):
    """The names of what differs between two checkpoints, but for what a clock measured."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = [] if one.keys() == other.keys() else ["{}: other keys".format(name)]
        return found + [text for key in one if key not in CLOCKS and key in other
                        for text in differences(one[key], other[key], "{}.{}".format(name, key))]
    if isinstance(one, (list, tuple)):
        found = [] if len(one) == len(other) else ["{}: other length".format(name)]
        return found + [text for i, pair in enumerate(zip(one, other))
                        for text in differences(*pair, name="{}[{}]".format(name, i))]
    equal = torch.equal(one, other) if torch.is_tensor(one) else one == other or (one != one and other != other)
    return [] if equal else [name]


def folders_differ(one, other):
    """What differs between the results of two runs."""
    found = []
    for name in ("checkpoint.pth.tar", "model_best.pth.tar"):
        found += differences(*(main.read_checkpoint(str(f / name)) for f in (one, other)), name=name)
    rows = []
    for folder in (one, other):
        with (folder / "metrics.csv").open() as file:
            rows.append([{k: v for k, v in row.items() if k not in CLOCKS} for row in csv.DictReader(file)])
    return found + ([] if rows[0] == rows[1] else ["metrics.csv"])


def processes_of(folder):
    """Process ids of all that run in a folder; threads and zombies left out."""
    found = []
    for entry in pathlib.Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.readlink(str(entry / "cwd")) == str(folder):
                found.append(int(entry.name))
        except OSError:
            pass
    return found


def alive(name):
    """Whether the process that a block of torch's shared memory is named after still runs."""
    owner = re.match(r"torch_(\d+)_", name)
    return owner is None or os.path.exists("/proc/" + owner.group(1))


def command(arguments, data, output, processes, level):
    """The command line of one run."""
    several = ["--multiprocessing-distributed"] if processes > 1 else []
    cards = ",".join(map(str, range(processes)))
    common = ["--epochs", str(arguments.epochs), "--seed", "1", "--opt-level", level, "--save-freq", "3", "--keep", "2"]
    if not arguments.script:
        return [sys.executable, str(ROOT / "main.py"), str(data), "--device", "cpu", "-b", "8", "--lr", "0.01",
                "--resume", "auto", "--device-list", cards] + several + common + SMALL
    script = "train_full_8p.sh" if processes > 1 else "train_full_1p.sh"
    return ["bash", str(ROOT / "test" / script), "--python=" + sys.executable, "--data_path={}".format(data),
            "--device=cpu", "--batch_size=8", "--lr=0.01", "--epochs={}".format(arguments.epochs), "--resume=auto",
            "--device_list=" + cards, "--device_id=9", "--"] + common[2:] + SMALL


def start(line, folder):
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(line, cwd=str(folder), stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def log_of(folder):
    return (folder / "log.txt").read_text(errors="replace")


def stop(run, folder, signum, rng, at_a_rank):
    """Signals a run or one of its ranks; the seconds until everything of it was gone, or None where it had ended."""
    begin = time.time()
    ranks = [pid for pid in processes_of(folder) if "--local_rank" in command_line(pid) and parent(pid) == run.pid]
    try:
        os.kill(rng.choice(ranks) if at_a_rank and ranks else run.pid, signum)
    except ProcessLookupError:
        return None
    run.wait()
    while processes_of(folder) and time.time() < begin + 60:
        time.sleep(0.02)
    return time.time() - begin


def command_line(pid):
    try:
        return pathlib.Path("/proc/{}/cmdline".format(pid)).read_bytes().decode(errors="replace")
    except OSError:
        return ""


def parent(pid):
    try:
        return int(pathlib.Path("/proc/{}/stat".format(pid)).read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


def torment(arguments, data, folder, processes, level, rng):
    """One run killed again and again, against one left alone; the figures of the table's row."""
    whole, broken = folder / "whole", folder / "broken"
    for place in (whole, broken):
        place.mkdir(parents=True)
    begin = time.time()
    if start(command(arguments, data, whole, processes, level), whole).wait():
        raise SystemExit("the run without a break failed:\n" + log_of(whole)[-2000:])
    length, signum = time.time() - begin, getattr(signal, "SIG" + arguments.signal)
    stops, longest, left, problems = 0, 0.0, 0, []
    line = command(arguments, data, broken, processes, level)
    shared = set(os.listdir("/dev/shm"))
    while stops < arguments.kills:
        began = len(log_of(broken)) if (broken / "log.txt").exists() else 0
        run = start(line, broken)
        try:
            status = run.wait(timeout=rng.uniform(0.1, 0.9 * length))
        except subprocess.TimeoutExpired:
            training = "Epoch:" in log_of(broken)[began:]
            took = stop(run, broken, signum, rng, arguments.rank)
            if took is None:
                continue
            stops, longest, left = stops + 1, max(longest, took), left + len(processes_of(broken))
            ended = run.returncode == 0 and "Result:" in log_of(broken)[began:]  # the signal came too late for it
            if run.returncode not in (-signum, 128 + signum) and not ended and training:
                problems.append("status {}".format(run.returncode))
        else:
            if status:
                problems.append("status {} by itself".format(status))
                break
            # It came to its end before all kills: the same run again, from the start.
            problems += folders_differ(whole, broken)
            for name in os.listdir(str(broken)):
                if name != "log.txt":
                    (broken / name).unlink()
    if start(line, broken).wait():
        problems.append("could not go on: " + log_of(broken)[-300:])
    else:
        problems += folders_differ(whole, broken)
    leaked = [name for name in set(os.listdir("/dev/shm")) - shared if not alive(name)]
    resumed = log_of(broken).count("resumed from")
    return stops, resumed, longest, left, len(leaked), problems


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="stops for each case")
    parser.add_argument("--signal", choices=["KILL", "TERM", "USR1", "INT"], default="KILL")
    parser.add_argument("--script", action="store_true", help="run, and signal, the launch script instead of main.py")
    parser.add_argument("--rank", action="store_true", help="signal one of several ranks instead of the command")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--levels", nargs="+", default=["O0", "O1"])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    return parser.parse_args(argv)


def run_all(argv=None):
    arguments = parse_args(argv)
    rng, failed = random.Random(arguments.seed), False
    folder = pathlib.Path(tempfile.mkdtemp(prefix="chaos "))
    try:
        make_images(folder / "data")
        print("torch {}, SIG{}".format(torch.__version__, arguments.signal))
        print("processes  level  stopped  resumed  longest exit s  left running  left in /dev/shm  result", flush=True)
        for processes in arguments.processes:
            for level in arguments.levels:
                figures = torment(arguments, folder / "data", folder / "{} {}".format(processes, level), processes,
                                  level, rng)
                failed |= bool(figures[5] or figures[3] or figures[4])
                print("{:>9}  {:>5}  {:>7}  {:>7}  {:>14.1f}  {:>12}  {:>16}  {}".format(
                    processes, level, *figures[:5], "; ".join(map(str, figures[5][:5])) or "equal"), flush=True)
    finally:
        shutil.rmtree(str(folder), ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(run_all())
