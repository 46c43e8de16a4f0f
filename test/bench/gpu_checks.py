"""What gpu_report.py checks: whether the trainer computes rightly on the card."""

import dataclasses
import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
import torch.distributed as dist

import common
import main as trainer
from gpu_speed import COMPARABLE, COMPILED, main_options, measure, open_run, run_main, try_compiler


def take_steps(run, images, targets, count):
    """The losses [count], on the host."""
    losses = []
    for _ in range(count):
        trainer.seed_step(run)
        losses.append(trainer.train_step(run, images, targets)[0].double())
        run.images += len(images)
    return torch.stack(losses).cpu()


def compare(tensors, others, tolerance=0.0):
    """Says whether two lists of tensors agree."""
    pairs = list(zip(tensors, others))
    if all(torch.equal(*pair) for pair in pairs):
        return "agrees, equal bit for bit"
    difference = max(float((one.double() - other.double()).abs().max()) for one, other in pairs)
    word = "agrees" if difference <= tolerance else "DIFFERS"  # where it is NaN, too
    return f"{word}, largest difference {difference:.3g}, tolerance {tolerance:g}"


def compare_losses(flags, reference, *options):
    """20 losses beside the first ones, which fill the list ``reference``."""
    losses = take_steps(*open_run(flags, flags.sizes.compared, *options), 20)
    shown = ", ".join(f"{losses[number]:.4f}" for number in (0, 9, 19))
    if not reference:
        reference.append(losses)
        return shown
    return f"{shown}; {compare(reference, [losses], flags.sizes.tolerance)}"


def train_twice(flags):
    """The weights after 5 steps of two runs with the same --seed."""
    weights = []
    for _ in range(2):
        run, images, targets = open_run(flags, flags.sizes.compared, "--seed", 1)
        take_steps(run, images, targets, 5)
        weights.append([tensor.cpu() for tensor in run.model.state_dict().values()])
    return compare(*weights)


def train_distributed(flags):
    """The losses of 3 steps without and with DistributedDataParallel, of one process."""
    alone = take_steps(*open_run(flags, flags.sizes.compared, "--seed", 1), 3)
    run, images, targets = open_run(flags, flags.sizes.compared, "--seed", 1)
    dist.init_process_group(run.runtime.backend.collective, rank=0, world_size=1,
                            init_method=f"file://{flags.scratch}/rendezvous")
    several = dataclasses.replace(run.runtime, world_size=2)  # it does not wrap for one process
    run.train_model = trainer.wrap_for_training(run.model, run.flags, several, run.precision)
    run.model.train()
    losses = take_steps(run, images, targets, 3)
    dist.destroy_process_group()
    return compare([alone], [losses], 1e-3)


def stop(arguments):
    """Starts main.py, and sends it SIGTERM after its first step; raises RunFailed where it does not
    end with the status of that."""
    process = subprocess.Popen(
        [sys.executable, str(common.ROOT / "main.py"), *arguments], stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, universal_newlines=True)
    output = ""
    for line in process.stdout:
        output += line
        if line.startswith("Epoch: [0]"):
            break
    process.send_signal(signal.SIGTERM)
    output += process.communicate()[0]
    if process.returncode != 128 + signal.SIGTERM:
        reason = common.find_reason(output, process.returncode)
        raise common.RunFailed(f"status {process.returncode} after SIGTERM: {reason}")


def stop_and_resume(flags):
    """The weights of a run of main.py, and of one that SIGTERM stopped and --resume continued."""
    batch = flags.sizes.compared
    options = ["--synthetic", 10 * batch, "-b", batch, "--epochs", 3, "--seed", 1, "--lr", 0.01,
               "--workers", 2, "--print-freq", 1, "--output-dir"]
    folders = [flags.scratch / "uninterrupted", flags.scratch / "stopped"]
    run_main(flags, *options, folders[0])
    stop(main_options(flags, *options, folders[1]))
    run_main(flags, *options, folders[1], "--resume", "auto")
    paths = [str(folder / "checkpoint.pth.tar") for folder in folders]
    return compare(*(trainer.read_checkpoint(path)["state_dict"].values() for path in paths))


def profile(flags):
    batch, folder = flags.sizes.compared, flags.scratch / "profiled"
    run_main(flags, "--synthetic", 8 * batch, "-b", batch, "--workers", 2, "--run-prof",
             "--output-dir", folder)
    trace = (folder / "trace.json").read_text()
    json.loads(trace)
    return f"ends with status 0, trace.json of {len(trace) / 1e6:.1f} MB"


def report_correct(flags):
    reference, names = [], "1st, 10th, 20th loss"
    collective = trainer.BACKENDS[flags.device].collective
    with ThreadPoolExecutor() as pool:  # two runs of main.py at a time beside this process
        resumed, profiled = pool.submit(stop_and_resume, flags), pool.submit(profile, flags)
        measure("weights of --seed, twice", train_twice, flags)
        measure(f"losses of one process over {collective}", train_distributed, flags)
        for level in ("O0", "O1", "O2"):
            measure(f"{names}, {level}", compare_losses, flags, reference, *COMPARABLE,
                    "--opt-level", level)
        measure("weights after SIGTERM and --resume auto", resumed.result)
        measure("--run-prof", profiled.result)
        measure(f"{names}, O1 --compile", try_compiler, flags, compare_losses, flags, reference,
                *COMPILED)
