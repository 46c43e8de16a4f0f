#!/usr/bin/env python3
"""Kills training runs at random moments and compares the end with that of an undisturbed run.

For every number of processes and precision there is one undisturbed run, and one that is stopped
--kills times (the command, with --rank one of its processes, or with --script the launch script)
and resumed with --resume auto. Printed are how often it was stopped and resumed, the longest time
from a signal to the end of all processes, what was left running, and whether weights, optimizer,
scaler and metrics.csv are equal to the last bit. The exit status is 1 if anything differs.

    python test/unit/fault_injection.py --kills 20 --signal KILL
    python test/unit/fault_injection.py --kills 10 --signal TERM --script

With --moments start a new run receives a random one of the signals that main.py handles, at a
random moment from its start to its second epoch, --kills times. Every run has to end with the
status of its signal, without a traceback, and to leave no process, nothing in /dev/shm and nothing
in the temporary directory.

    python test/unit/fault_injection.py --moments start --kills 100
"""

import argparse
import math
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
from dataclasses import dataclass, field

import torch

import main as trainer
from helpers import (ROOT, SMALL, TINY, command_line, folders_differ, main_command, make_images,
                     parent, processes_of, several)


@dataclass
class Outcome:
    """What one case showed, as a row of the table."""

    stopped: int = 0
    resumed: int = 0
    longest_exit: float = 0.0  # seconds
    left_running: int = 0
    left_in_shared_memory: int = 0
    left_in_temporary: int = 0
    problems: list = field(default_factory=list)


def command(flags, data, processes, level):
    """The command line of one run."""
    common = ["--seed", "1", "--opt-level", level, "--save-freq", "3", "--keep", "2"]
    if not flags.script:
        ranks = several(processes) if processes > 1 else []
        return main_command(data, "--epochs", flags.epochs, "--resume", "auto", *ranks, *common)
    name = "train_full_8p.sh" if processes > 1 else "train_full_1p.sh"
    values = dict(zip(SMALL[::2], SMALL[1::2]))
    return ["bash", str(ROOT / "test" / name), f"--python={sys.executable}", f"--data_path={data}",
            f"--device={values['--device']}", f"--batch_size={values['-b']}",
            f"--lr={values['--lr']}", f"--workers={values['--workers']}",
            f"--epochs={flags.epochs}", "--resume=auto", "--device_id=9",
            f"--device_list={','.join(map(str, range(processes)))}", "--"] + common + TINY


def start_logged(line, folder):
    """Starts a command whose output is appended to log.txt in its folder."""
    with (folder / "log.txt").open("a") as log:
        return subprocess.Popen(line, cwd=str(folder), stdout=log, stderr=subprocess.STDOUT,
                                stdin=subprocess.DEVNULL, start_new_session=True)


def read_log(folder):
    path = folder / "log.txt"
    return path.read_text(errors="replace") if path.exists() else ""


def ranks_of(run, folder):
    """The process ids of the ranks that a command has started, by rank."""
    found = {}
    for pid in processes_of(folder):
        words = command_line(pid).split("\0")
        if "--local_rank" in words and parent(pid) == run.pid:
            found[int(words[words.index("--local_rank") + 1])] = pid
    return found


def stop(run, folder, signum, rng, at_a_rank):
    """Signals a run or one of its ranks, and waits up to a minute until all its processes ended.

    Returns the seconds that took, or None where the run had ended before.
    """
    begin = time.monotonic()
    ranks = list(ranks_of(run, folder).values()) if at_a_rank else []
    try:
        os.kill(rng.choice(ranks) if ranks else run.pid, signum)
    except ProcessLookupError:
        return None
    run.wait()
    while processes_of(folder) and time.monotonic() < begin + 60:
        time.sleep(0.02)
    return time.monotonic() - begin


def has_owner(name):
    """Whether the process that a block of torch's shared memory is named after still runs."""
    owner = re.match(r"torch_(\d+)_", name)
    return owner is None or os.path.exists(f"/proc/{owner.group(1)}")


def disturb(flags, line, whole, broken, length, rng):
    """Stops a run until it was stopped --kills times, starting it again each time: an Outcome.

    A run that ends before it is stopped often enough is compared with the undisturbed one, and
    then started from scratch.
    """
    outcome, signum = Outcome(), getattr(signal, f"SIG{flags.signal}")
    while outcome.stopped < flags.kills:
        log_start = len(read_log(broken))
        run = start_logged(line, broken)
        try:
            run.wait(timeout=rng.uniform(0.1, 0.9 * length))
        except subprocess.TimeoutExpired:
            trained_before = "Epoch:" in read_log(broken)[log_start:]
            seconds = stop(run, broken, signum, rng, flags.rank)
            if seconds is None:
                run.wait()
                continue
            outcome.stopped += 1
            outcome.longest_exit = max(outcome.longest_exit, seconds)
            outcome.left_running += len(processes_of(broken))
            # The signal may have come too late for the run to notice.
            ended = run.returncode == 0 and "Result:" in read_log(broken)[log_start:]
            if trained_before and not ended and run.returncode not in (-signum, 128 + signum):
                outcome.problems.append(f"status {run.returncode}")
        else:
            if run.returncode:
                outcome.problems.append(f"status {run.returncode} without a signal")
                break
            outcome.problems += folders_differ(whole, broken)
            for path in broken.iterdir():
                if path.name != "log.txt":
                    path.unlink()
    return outcome


def compare_runs(flags, data, folder, processes, level, rng):
    """An undisturbed run and one that is stopped again and again: the Outcome of the latter."""
    whole, broken = folder / "whole", folder / "broken"
    for path in (whole, broken):
        path.mkdir(parents=True)
    line, begin = command(flags, data, processes, level), time.monotonic()
    if start_logged(line, whole).wait():
        raise SystemExit(f"the undisturbed run failed:\n{read_log(whole)[-2000:]}")
    length = time.monotonic() - begin
    shared_memory = set(os.listdir("/dev/shm"))
    outcome = disturb(flags, line, whole, broken, length, rng)
    if start_logged(line, broken).wait():
        outcome.problems.append(f"could not resume: {read_log(broken)[-300:]}")
    else:
        outcome.problems += folders_differ(whole, broken)
    outcome.resumed = read_log(broken).count("resumed from")
    left = set(os.listdir("/dev/shm")) - shared_memory
    outcome.left_in_shared_memory = len([name for name in left if not has_owner(name)])
    return outcome


def left_behind():
    """The blocks of shared memory that nobody owns, and what runs put into the temporary folder."""
    blocks = {name for name in os.listdir("/dev/shm") if not has_owner(name)}
    names = {name for name in os.listdir(tempfile.gettempdir())
             if re.match("mnasnet-|pymp-", name)}
    return blocks, names


def signal_starts(flags, folder, processes):
    """Signals new runs at random moments of their start: the Outcome."""
    data, runs, rng = folder / "data", folder / "runs", random.Random(flags.seed)
    make_images(data)
    runs.mkdir()
    ranks = several(processes) if processes > 1 else []
    line = main_command(data, "--epochs", 10000, "--workers", 2, *ranks)
    outcome, length, before = Outcome(), math.inf, left_behind()
    while outcome.stopped < flags.kills:
        (runs / "log.txt").write_text("")
        run = start_logged(line, runs)
        begin = time.monotonic()
        if outcome.stopped == 0:  # the first run shows how long a start takes
            while "Epoch: [1][" not in read_log(runs) and run.poll() is None:
                time.sleep(0.1)
            length = time.monotonic() - begin
        else:  # Python itself needs the first tenth of a second
            time.sleep(rng.uniform(0.1, 1.2 * length))
        signum = rng.choice(trainer.SIGNALS)
        seconds = stop(run, runs, signum, rng, at_a_rank=False)
        outcome.stopped += 1
        outcome.longest_exit = max(outcome.longest_exit, seconds or 0)
        outcome.left_running += len(processes_of(runs))
        log = read_log(runs)
        if run.returncode not in (-signum, 128 + signum) or "Traceback" in log or "error:" in log:
            outcome.problems.append(f"{signum.name}: status {run.returncode}, {log[-200:]}")
    after = left_behind()
    outcome.left_in_shared_memory = len(after[0] - before[0])
    outcome.left_in_temporary = len(after[1] - before[1])
    return outcome


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--kills", type=int, default=20, help="stops for each case")
    add("--signal", choices=["KILL", "TERM", "USR1", "INT"], default="KILL")
    add("--moments", choices=["run", "start"], default="run", help="when to stop the runs")
    add("--script", action="store_true", help="run, and signal, the launch script, not main.py")
    add("--rank", action="store_true", help="signal one of several ranks, not the command")
    add("--processes", type=int, nargs="+", default=[1, 2])
    add("--levels", nargs="+", default=["O0", "O1"])
    add("--epochs", type=int, default=4)
    add("--seed", type=int, default=0, help="of the random moments")
    return parser.parse_args(argv)


def main(argv=None):
    flags = parse_args(argv)
    rng, failed = random.Random(flags.seed), False
    folder = pathlib.Path(tempfile.mkdtemp(prefix="fault injection "))
    try:
        make_images(folder / "data")
        at_start = flags.moments == "start"
        print(f"torch {torch.__version__}, {'signals' if at_start else f'SIG{flags.signal}'}")
        print("processes  level  stopped  resumed  longest exit s  left running, in /dev/shm, in "
              "the temporary folder  result", flush=True)
        for processes in flags.processes:
            for level in ["O0"] if at_start else flags.levels:
                runs = folder / f"{processes} {level}"
                if at_start:
                    runs.mkdir()
                    case = signal_starts(flags, runs, processes)
                else:
                    case = compare_runs(flags, folder / "data", runs, processes, level, rng)
                result = "; ".join(case.problems[:5]) or ("as expected" if at_start else "equal")
                left = (case.left_running, case.left_in_shared_memory, case.left_in_temporary)
                failed |= bool(case.problems or any(left))
                print(f"{processes:9}  {level:>5}  {case.stopped:7}  {case.resumed:7}  "
                      f"{case.longest_exit:14.1f}  {left[0]}, {left[1]}, {left[2]}  {result}",
                      flush=True)
    finally:
        shutil.rmtree(str(folder), ignore_errors=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
