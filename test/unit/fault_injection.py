#!/usr/bin/env python3
"""Kills training runs at random moments and compares the end with that of an undisturbed run.

For every number of processes and precision there is one undisturbed run, and one that is stopped
--kills times (the command, with --rank one of its processes, or with --script the launch script)
and resumed with --resume auto. Printed are how often it was stopped and resumed, the longest time
from a signal to the end of all processes, what was left running, and whether weights, optimizer,
scaler and metrics.csv are equal to the last bit. The exit status is 1 if anything differs.

    python test/unit/fault_injection.py --kills 20 --signal KILL
    python test/unit/fault_injection.py --kills 10 --signal TERM --script

With --fault something else happens to --kills new runs. They have to leave no process, nothing in
/dev/shm and nothing in the temporary directory, and to print no traceback.

start   a random one of the signals that main.py handles comes at a random moment from the start of
        the run to its second epoch: the run ends with the status of that signal
rank    a random one of the ranks, which meet over tcp, stops (SIGSTOP) at a random moment: each of
        the others names it and ends within 20 s after --dist-timeout, which is 5 s
loader  a loader process stops: the run ends with one line within 20 s after --dist-timeout

    python test/unit/fault_injection.py --fault start --kills 100
    python test/unit/fault_injection.py --fault rank --kills 20 --processes 2 4
    python test/unit/fault_injection.py --fault loader --kills 20 --processes 1
"""

import argparse
import contextlib
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

from helpers import (ROOT, SMALL, TINY, command_line, folders_differ, free_port, main as trainer,
                     main_command, make_images, parent, processes_of, receive_signals, several)


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
                                stdin=subprocess.DEVNULL, start_new_session=True,
                                preexec_fn=receive_signals)


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


def left_in_shared_memory(before):
    """How many blocks that nobody owns /dev/shm has, apart from the names it had ``before``."""
    return len([name for name in set(os.listdir("/dev/shm")) - before if not has_owner(name)])


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
    outcome.left_in_shared_memory = left_in_shared_memory(shared_memory)
    return outcome


def signal_start(line, folder, rng, length):
    """Signals a new run at a random moment of its start: seconds until its end, and problems."""
    run = start_logged(line, folder)
    wait_until_python_has_started(run)
    time.sleep(rng.uniform(0, length))
    signum = rng.choice(trainer.SIGNALS)
    seconds = stop(run, folder, signum, rng, at_a_rank=False)
    ended = run.returncode in (-signum, 128 + signum) and "error:" not in read_log(folder)
    return seconds, [] if ended else [f"{signum.name}: status {run.returncode}"]


def wait_until_python_has_started(run):
    """Waits until main.py imports numpy: before its first line Ctrl-C is Python's own traceback."""
    while run.poll() is None and "numpy" not in pathlib.Path(f"/proc/{run.pid}/maps").read_text():
        time.sleep(0.001)


def stop_rank(line, folder, rng, length, processes):
    """Stops one of several ranks: seconds until the end of the others, and problems."""
    url = ["--dist-url", f"tcp://127.0.0.1:{free_port()}", "--dist-timeout", "5"]
    runs = [start_logged(line + url + ["--local_rank", str(rank)], folder)
            for rank in range(processes)]
    wait_until_training(runs[0], folder)
    time.sleep(rng.uniform(0, length))
    stopped = rng.randrange(processes)
    runs[stopped].send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    codes = [run.wait() for run in runs[:stopped] + runs[stopped + 1:]]
    seconds = time.monotonic() - begin
    runs[stopped].kill()
    runs[stopped].wait()
    problems = [] if codes == [1] * (processes - 1) else [f"status {codes}"]
    if f"rank {stopped} does not respond" not in read_log(folder):
        problems.append(f"rank {stopped} was not named")
    return seconds, problems + ([f"{seconds:.0f} s"] if seconds > 5 + 20 else [])


def stop_loader(line, folder, rng, length):
    """Stops a loader process: seconds until the end of the run, and problems."""
    run = start_logged(line + ["--dist-timeout", "5"], folder)
    wait_until_training(run, folder)
    time.sleep(rng.uniform(0, length))
    if trainer.TORCH < (1, 7):  # starts loaders for each epoch: later this one would not be missed
        wait_until_training(run, folder, epoch=read_log(folder).count("=> epoch") + 1)
    if run.poll() is not None:
        return 0, [f"ended by itself with status {run.returncode}"]
    loaders = [pid for pid in processes_of(folder) if parent(pid) == run.pid]
    os.kill(rng.choice(loaders), signal.SIGSTOP)
    begin, status = time.monotonic(), None
    with contextlib.suppress(subprocess.TimeoutExpired):
        status = run.wait(timeout=60)
    seconds = time.monotonic() - begin
    run.kill()  # one that goes on would hold the folder of the next
    run.wait()
    problems = [] if status == 1 and read_log(folder).count("error:") == 1 else [f"status {status}"]
    return seconds, problems + ([f"{seconds:.0f} s"] if seconds > 5 + 20 else [])


def wait_until_training(run, folder, epoch=1):
    """Waits for the first step of an epoch of a run."""
    while f"Epoch: [{epoch}][" not in read_log(folder) and run.poll() is None:
        time.sleep(0.05)


def inject(flags, folder, processes):
    """Lets what --fault names happen to --kills new runs: the Outcome."""
    runs, temporary, rng = folder / "runs", folder / "tmp", random.Random(flags.seed)
    runs.mkdir()
    temporary.mkdir()
    make_images(folder / "data")
    ranks = several(processes) if processes > 1 else []
    # At rate 0, so that so few images can't diverge.
    line = main_command(folder / "data", "--epochs", 10000, "--workers", 2, "--lr", 0, *ranks)
    outcome, shared_memory, begin = Outcome(), set(os.listdir("/dev/shm")), time.monotonic()
    os.environ["TMPDIR"] = str(temporary)  # of the runs alone
    first = start_logged(line, runs)  # shows how long a start takes
    wait_until_training(first, runs)
    length = 1.2 * (time.monotonic() - begin)
    stop(first, runs, signal.SIGTERM, rng, at_a_rank=False)
    try:
        while outcome.stopped < flags.kills:
            (runs / "log.txt").write_text("")
            if flags.fault == "start":
                seconds, problems = signal_start(line, runs, rng, length)
            elif flags.fault == "rank":
                seconds, problems = stop_rank(line, runs, rng, 3, processes)
            else:
                seconds, problems = stop_loader(line, runs, rng, 3)
            outcome.stopped += 1
            outcome.longest_exit = max(outcome.longest_exit, seconds or 0)
            limit = time.monotonic() + 5
            while processes_of(runs) and time.monotonic() < limit:
                time.sleep(0.1)
            outcome.left_running += len(processes_of(runs))
            log = read_log(runs)
            if problems or "Traceback" in log:
                outcome.problems.append(f"{', '.join(problems)}: {log[-300:]}")
    finally:
        for pid in processes_of(runs):  # they are endless
            os.kill(pid, signal.SIGKILL)
        del os.environ["TMPDIR"]
    outcome.left_in_shared_memory = left_in_shared_memory(shared_memory)
    # torch.distributed makes its compiler's cache there, for all runs.
    left = [name for name in os.listdir(str(temporary)) if not name.startswith("torchinductor_")]
    outcome.left_in_temporary = len(left)
    outcome.problems += [f"in the temporary folder: {', '.join(left)}"] if left else []
    return outcome


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--kills", type=int, default=20, help="stops for each case")
    add("--signal", choices=["KILL", "TERM", "USR1", "INT"], default="KILL")
    add("--fault", choices=["start", "rank", "loader"], help="instead of kills and resumes")
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
        print(f"torch {torch.__version__}, {flags.fault or f'SIG{flags.signal}'}")
        print("processes  level  stopped  resumed  longest exit s  left running, in /dev/shm, in "
              "the temporary folder  result", flush=True)
        for processes in flags.processes:
            for level in ["O0"] if flags.fault else flags.levels:
                runs = folder / f"{processes} {level}"
                runs.mkdir()
                if flags.fault:
                    case = inject(flags, runs, processes)
                else:
                    case = compare_runs(flags, folder / "data", runs, processes, level, rng)
                result = "; ".join(case.problems[:5]) or ("as said" if flags.fault else "equal")
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
