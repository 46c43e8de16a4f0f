"""What gpu_report.py measures about speed: a function for each section, which prints its rows.

``flags`` are those of gpu_report.py; ``flags.scratch`` is a folder, with images for the last three.
"""

import csv
import dataclasses
import functools
import gc
import platform
import shutil
import statistics
import subprocess
import sys
import time
import traceback
from collections import namedtuple

import numpy as np
import torch

import bench_data
import common
import main as trainer
from common import milliseconds

# Batch sizes of the steps, of compared losses, of the loader and of whole runs; steps before those
# that are timed, and most of these; loader processes; files, and photographs among them; and by how
# much a loss may differ from that in fp32.
Sizes = namedtuple("Sizes", "arch crop batches compared loader whole warm_up steps workers train "
                            "val photographs tolerance")
CARD = Sizes("mnasnet1_0", 224, (32, 64, 128, 256, 512), 64, 128, 256, 10, 30, (12, 14, 16),
             20480, 5120, 50, 0.25)
CPU = Sizes("mnasnet0_5", 32, (4, 8, 16), 16, 8, 16, 2, 5, (1, 2), 160, 32, 10, 1.5)

O1 = ["--opt-level", "O1"]
COMPARABLE = ["--dropout", 0, "--loss-scale", 256]  # dropout and skipped steps would differ
COMPILED = [*O1, *COMPARABLE, "--compile"]  # the same twice: the second time it is in the cache


def measure(name, function, *arguments):
    """Prints a row: what a function returns, or the reason why it returns nothing."""
    try:
        result = function(*arguments)
    except trainer.UserError as error:
        result = f"not applicable: {error}"
    except Exception as error:
        traceback.print_exc()
        reason = trainer.first_line(error)
        no_memory = "out of memory" in reason
        result = f"skipped: {reason}" if no_memory else f"FAILED: {type(error).__name__}: {reason}"
    print(common.row(name, result), flush=True)


def main_options(flags, *more):
    """main.py's flags of the device and the network, and more."""
    crop = flags.sizes.crop
    words = ["--device", flags.device, "-a", flags.sizes.arch, "--train-crop-size", crop,
             "--val-crop-size", crop, "--val-resize-size", crop * 8 // 7, *more]
    return [str(word) for word in words]


def run_main(flags, *more):
    """What main.py prints; raises RunFailed where it fails."""
    return common.run_python([common.ROOT / "main.py", *main_options(flags, *more)])


class FixedBatch:
    """In place of a loader: one batch of noise, each image of another class."""

    def __init__(self, count, size):
        self.dataset, self.labels = self, np.arange(count)
        shape = (1, count, size, size, 3)
        self.ring = np.random.RandomState(0).randint(0, 256, shape, np.uint8)

    def __iter__(self):
        yield 0, self.labels, ()


def open_run(flags, batch, *more):
    """A run of main.py that is ready to train, with the same first weights every time; and a batch
    of images and targets on the device."""
    gc.collect()  # what earlier rows have used
    if trainer.TORCH >= (1, 8):
        torch.use_deterministic_algorithms(False)  # after a run with --seed
    if "--compile" in more and trainer.TORCH >= (2, 0):
        torch._dynamo.reset()  # else it compiles the second batch size for any size
    # Not apex, which changes torch for all runs of a process; older ones may have nothing else.
    amp = "native" if trainer.TORCH >= (1, 10) else "auto"
    options = ["--synthetic", batch, "-b", batch, "--workers", 0, "--lr", 0.02,
               "--amp-backend", amp]
    parsed = trainer.parse_args(main_options(flags, *options, *more))
    runtime = trainer.open_device(parsed, trainer.BACKENDS[flags.device])
    if runtime.module:
        runtime.module.empty_cache()
    group = trainer.ProcessGroup(parsed, runtime)
    # A checkpoint's seed fixes the first weights, as --seed does, and leaves fast kernels on.
    run = trainer.build_run(parsed, runtime, group, "", {"seed": 1}, None)
    trainer.prepare_training(run)
    run.model.train()
    batches = FixedBatch(batch, flags.sizes.crop)
    images, targets, _ = next(trainer.prefetch(batches, runtime, run.precision.input_dtype))
    return run, images, targets


# ------------------------------------------------------------------------------------------------
# machine
# ------------------------------------------------------------------------------------------------


def describe_card(flags):
    if flags.device == "cpu":
        raise trainer.UserError("no card")
    backend = trainer.BACKENDS[flags.device]
    count, _ = trainer.device_count(backend)
    module = getattr(torch, backend.type)
    memory = module.get_device_properties(0).total_memory / 2 ** 30
    libraries = f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    if flags.device == "npu":
        extension = sys.modules.get("torch_npu", torch)  # Ascend's torch 1.5 has it built in
        cann = getattr(getattr(module, "utils", None), "get_cann_version", lambda: "unknown")()
        libraries = f"torch_npu {extension.__version__}, CANN {cann}"
    return f"{count} x {module.get_device_name(0)}, {memory:.1f} GiB, {libraries}"


def query_nvidia_smi(names):
    if not shutil.which("nvidia-smi"):
        raise trainer.UserError("no nvidia-smi")
    command = ["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"]
    return subprocess.check_output(command, universal_newlines=True).splitlines()[0]


def describe_apex(flags):
    parsed = trainer.parse_args(["data", "--device", flags.device])
    apex, reason = trainer.find_apex(parsed, trainer.BACKENDS[flags.device])
    return "used" if apex else f"not used{reason and ': '}{reason}"


def report_machine(flags):
    measure("card", describe_card, flags)
    names = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.limit"
    measure(names.replace(",", ", "), query_nvidia_smi, names)
    measure("processor and packages", lambda: f"{common.describe_machine(flags.device)[9:]}, "
            f"Python {platform.python_version()}, numpy {np.__version__}")
    measure("apex", describe_apex, flags)


# ------------------------------------------------------------------------------------------------
# steps, compile
# ------------------------------------------------------------------------------------------------


def time_steps(flags, run, images, targets):
    """Medians: milliseconds of a step, images per second, and on a card the milliseconds until
    train_step, which does not wait for the card, returns."""
    step = functools.partial(trainer.train_step, run, images, targets)
    module, synchronize = run.runtime.module, run.runtime.synchronize
    for _ in range(flags.sizes.warm_up):
        estimate = milliseconds(lambda: (step(), synchronize()))
    count = max(5, min(flags.sizes.steps, int(2500 / estimate)))
    times = []
    for _ in range(count):
        times.append(milliseconds(step))
        synchronize()
    issued = f", issued in {statistics.median(times):.2f} ms" if module else ""
    if module:
        events = [module.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            step()
            event.record()
        synchronize()
        times = [begin.elapsed_time(end) for begin, end in zip(events, events[1:])]
    ms = statistics.median(times)
    return f"{ms:.2f} ms a step, {1000 * len(images) / ms:.0f} images/s{issued}"


def profile_step(flags):
    """One step: its kernels, and the operators that take most."""
    run, images, targets = open_run(flags, flags.sizes.batches[-1], *O1)
    device = run.runtime.backend.type
    # Its name in torch >= 2.4, before on an NPU, and on a GPU.
    costs = [f"self_{kind}_time_total" for kind in ("device", "privateuse1", "cuda")]
    if device == "cpu":
        costs = ["self_cpu_time_total"]
    step = functools.partial(trainer.train_step, run, images, targets)
    for _ in range(flags.sizes.warm_up):
        step()
    run.runtime.synchronize()
    with torch.autograd.profiler.profile(**trainer.profiler_options(device)) as profiler:
        ms = milliseconds(lambda: (step(), run.runtime.synchronize()))
    kernels = sum(len(event.kernels) for event in profiler.function_events)
    # The averages also hold the kernels themselves; torch 1.5 has no device_type.
    times = {event.key: max(getattr(event, cost, 0) for cost in costs) / 1000
             for event in profiler.key_averages()
             if "CPU" in str(getattr(event, "device_type", "CPU"))}
    most = sorted(times, key=times.get, reverse=True)[:3]
    return (f"{kernels} kernels, operators {sum(times.values()):.2f} ms, step {ms:.2f} ms; most in "
            f"{', '.join(f'{name} {times[name]:.2f} ms' for name in most)}")


def report_steps(flags):
    backend, batch = trainer.BACKENDS[flags.device], flags.sizes.batches[-1]
    layout = "channels_last" if backend.channels_last else "NCHW"

    def rate(size, *options):
        return time_steps(flags, *open_run(flags, size, *options))

    for size in flags.sizes.batches:
        measure(f"O1, {layout}, batch {size}", rate, size, *O1)
    for level in ("O0", "O2"):
        measure(f"{level}, {layout}, batch {batch}", rate, batch, "--opt-level", level)
    bfloat16 = [*O1, "--amp-dtype", "bfloat16"]
    measure(f"O1 in bfloat16, {layout}, batch {batch}", rate, batch, *bfloat16)
    measure(f"O1, {layout}, batch {batch}, one step profiled", profile_step, flags)
    if backend.channels_last:
        trainer.BACKENDS[flags.device] = dataclasses.replace(backend, channels_last=False)
        measure(f"O1, NCHW, batch {batch}", rate, batch, *O1)


def try_compiler(flags, function, *arguments):
    """Calls a function that compiles, which not every machine can."""
    try:
        result = function(*arguments)
        return f"{result}{'; by aot_eager' if flags.device == 'cpu' else ''}"
    except trainer.UserError:
        raise
    except Exception as error:
        traceback.print_exc()
        raise trainer.UserError(f"torch.compile fails: {trainer.first_line(error)}")


def report_compile(flags):
    def rate(size):
        run = open_run(flags, size, *COMPILED)
        first = milliseconds(lambda: trainer.train_step(*run)[0].item())
        return f"first step {first / 1000:.1f} s, then {time_steps(flags, *run)}"

    for size in sorted({flags.sizes.batches[-1], flags.sizes.compared}, reverse=True):
        measure(f"O1 --compile, batch {size}", try_compiler, flags, rate, size)


# ------------------------------------------------------------------------------------------------
# loader, decode, whole
# ------------------------------------------------------------------------------------------------


def loader_rate(flags, workers):
    parsed = trainer.parse_args(main_options(flags, "data"))
    runtime = trainer.open_device(parsed, trainer.BACKENDS[flags.device])
    images = trainer.ImageFolder(str(flags.scratch / "images" / "train"))
    loader = trainer.make_loader(images, parsed, runtime, flags.sizes.loader, workers, seed=1)

    def rate(batches):
        begin = time.perf_counter()
        count = sum(len(targets) for _, targets, _ in batches)
        runtime.synchronize()
        return count / (time.perf_counter() - begin)

    alone = rate(loader)
    copied = rate(trainer.prefetch(loader, runtime, torch.float32))
    return f"{alone:.0f} images/s, with prefetch to the device {copied:.0f}"


def report_loader(flags):
    for workers in sorted({min(number, common.usable_cores()) for number in flags.sizes.workers}):
        measure(f"{workers} workers, batch {flags.sizes.loader}", loader_rate, flags, workers)


def decode_on_card(flags, paths):
    if flags.device != "gpu":
        raise trainer.UserError("torchvision decodes on NVIDIA's cards alone")
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        encoded = [torch.from_numpy(np.fromfile(path, np.uint8)) for path in paths]
        decode = functools.partial(decode_jpeg, encoded, ImageReadMode.RGB, device="cuda")
        decode()
    except (ImportError, TypeError, RuntimeError) as error:
        raise trainer.UserError(f"torchvision can't: {trainer.first_line(error)}")
    torch.cuda.synchronize()
    ms = milliseconds(lambda: ([decode() for _ in range(10)], torch.cuda.synchronize()))
    return f"{10000 * len(paths) / ms:.0f} images/s"


def report_decode(flags):
    files = (flags.scratch / "images" / "val").rglob("*.jpg")
    paths = [str(path) for path in sorted(files, key=lambda path: path.name)[:64]]
    for name, decode in bench_data.decoders(paths[0]).items():
        rate = bench_data.measure(decode, paths * 5)
        print(common.row(f"one core, {name}", f"{rate:.0f} images/s"), flush=True)
    measure(f"card, torchvision decode, {len(paths)} at once", decode_on_card, flags, paths)


def report_whole(flags):
    batch, folder = flags.sizes.whole, flags.scratch
    level = trainer.BACKENDS[flags.device].opt_level
    options = [folder / "images", "-b", batch, "--output-dir", folder / "whole"]

    def train():
        output = run_main(flags, *options, "--epochs", 2, "--lr", 0.01)
        with (folder / "whole" / "metrics.csv").open() as file:
            waiting = [f"{100 * float(row['data_wait']):.1f} %" for row in csv.DictReader(file)]
        return (f"{common.images_per_second(output):.0f} images/s, waits for images in "
                f"{' and '.join(waiting)} of its epochs")

    def evaluate():
        output = run_main(flags, *options, "-e", "--resume", folder / "whole/checkpoint.pth.tar")
        return f"{common.images_per_second(output):.0f} images/s"

    measure(f"training, {level}, batch {batch}", train)
    measure(f"evaluation, {level}, batch {batch}", evaluate)
