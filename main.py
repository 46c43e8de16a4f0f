"""Trains MnasNet on ImageNet, or on any folder of images, on Ascend NPUs, NVIDIA GPUs or the CPU.

1 device    python main.py /data/imagenet --device npu|gpu|cpu [--recipe strong]
all cards   python main.py /data/imagenet --multiprocessing-distributed [--device-list 0,1,2,3]
one of them the same with --local_rank 3
2 nodes     the same on each, with --world-size 2 --rank 0 (or 1) --dist-url tcp://node0:29500
torchrun    torchrun --nproc_per_node 8 main.py /data/imagenet
evaluate    python main.py /data/imagenet -e --resume model_best.pth.tar
benchmark   python main.py --synthetic 5120 --epochs 1 -b 512

A run leaves checkpoint.pth.tar, model_best.pth.tar and metrics.csv in --output-dir. It ends with
status 0; with 1 after an error, 2 for an invalid command line, and 143, 129, 138 or 130 when
SIGTERM, SIGHUP, SIGUSR1 or Ctrl-C stopped it. ``--resume auto`` continues from its last checkpoint.

Sections; each uses only those above it. To see how training works, start at 8.
1. Imports and errors          2. Recipes and flags     3. Devices and processes
4. Data                        5. Mixed precision       6. Model, EMA, optimizer, schedule, loss
7. Checkpoints and logging     8. Training              9. Entry
"""

# --- 1. Imports and errors ------------------------------------------------------------------------

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports is no traceback
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # blocked by launch until here

import argparse
import atexit
import contextlib
import copy
import ctypes
import datetime
import fcntl
import functools
import importlib
import inspect
import io
import json
import math
import mmap
import multiprocessing.queues
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import warnings
import zipfile
import zlib
from collections import namedtuple
from dataclasses import dataclass, field

# torch >= 2.5 would import torch_npu, which fails where CANN is missing; device_count imports it.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
# An idle OpenMP thread spins only briefly, then leaves its core to loaders and other programs.
if "OMP_WAIT_POLICY" not in os.environ:  # GOMP_SPINCOUNT would override it
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.distributed.rendezvous import rendezvous

import mnasnet

TORCH = mnasnet.TORCH
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)

class UserError(Exception):
    """A mistake that the user can fix: one line says what was found, expected and to be done."""

class Stopped(BaseException):  # no Exception, which decoders catch
    """Raised where a signal ends the run; ``args[0]`` is its number."""

def print_error(error, rank=None, program="main.py"):
    """Prints an error in one line, without the traceback that torch adds to that of a loader."""
    message = str(error).rsplit("UserError: ", 1)[-1].strip().replace("\n", " ")
    origin = "" if rank is None else f"rank {rank}: "
    print(f"{program}: error: {origin}{message}", file=sys.stderr, flush=True)

def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]

def machine_error(error):
    """Returns one line about an error of files, memory, processes or batch size, else ''."""
    text = str(error).strip() or type(error).__name__
    if "more than 1 value per channel" in text:  # of BatchNorm
        return f"{first_line(error)}: raise --batch-size or --train-crop-size"
    if text.startswith("DataLoader") or isinstance(error, EOFError):
        return f"{first_line(error)}: a loader was killed, a file hangs, or no memory is left"
    exhausted = re.search("[Oo]ut of memory|allocate memory|[Oo]pen files|new thread", text)
    if exhausted or isinstance(error, (OSError, MemoryError)):
        last = text.splitlines()[-1 if "Traceback" in text else 0]  # a loader's comes first
        return f"{last}: free memory or disk, raise a ulimit, or lower --workers or --batch-size"
    return ""

def install_handler(handler):
    """Makes ``handler(signum, frame)`` handle SIGNALS, except those that are ignored (nohup)."""
    for signum in SIGNALS:
        if signal.getsignal(signum) != signal.SIG_IGN:
            signal.signal(signum, handler)


# --- 2. Recipes and flags -------------------------------------------------------------------------

# What --recipe sets; flags on the command line win. README.md names their sources and results.
RECIPES = {
    "modelzoo": dict(epochs=300, lr=1.4, warmup=5, wd=1e-5),
    "rmsprop": dict(
        opt="rmsprop", epochs=350, lr=0.016, lr_base_size=256, warmup=5, lr_warmup_decay=0,
        schedule="exponential", wd=1e-5, norm_weight_decay=0, bias_weight_decay=0, dropout=0.2,
        label_smoothing=0.1, bn_momentum=0.01, bn_eps=1e-3, ema=0.9999),
    # ema: torchvision's adjustment of --model-ema-decay 0.99998, 1 - 0.00002 * 1024 * 32 / 600.
    "strong": dict(
        epochs=600, lr=0.5, lr_base_size=1024, warmup=5, lr_warmup_decay=0.01, wd=2e-5,
        norm_weight_decay=0, label_smoothing=0.1, auto_augment="ta", random_erasing=0.1, mixup=0.2,
        cutmix=1.0, ema=0.9989, ema_steps=32, train_crop_size=176, val_resize_size=232,
        val_crop_size=224),
    "small": dict(epochs=20, lr=0.03, batch_size=32, warmup=1, dropout=0, train_crop_scale=0.85),
}

class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, except those that the help text names itself."""

    def _get_help_string(self, action):
        named = "(default" in action.help or action.default is False or action.default in (None, "")
        return action.help if named else super()._get_help_string(action)

class ArgumentParser(argparse.ArgumentParser):
    """Reports an invalid command line in one line, with status 2; flags are not abbreviated."""

    def error(self, message):
        self.exit(2, f"{self.prog}: error: {message} (--help lists every flag)\n")

    def _get_option_tuples(self, option_string):  # Python 3.7's allow_abbrev=False breaks -b64
        return [] if option_string.startswith("--") else super()._get_option_tuples(option_string)

def number(kind, low, high=sys.float_info.max, word=None):
    """Returns an argparse type: an int or float from ``low`` to ``high``, or a word."""

    def convert(text):
        value = text if text == word else kind(text)
        if value != word and not low <= value <= high:
            limit = f"to {high}" if high < sys.float_info.max else "or more"
            raise argparse.ArgumentTypeError(f"found {text}, expected {low} {limit}")
        return value

    convert.__name__ = "whole number" if kind is int else "number"  # for argparse's message
    return convert

def card_list(text):
    """An argparse type: '0,1,3' as a list of different card numbers."""
    names = text.split(",") if text else []
    if not all(name.strip().isdigit() for name in names) or len(set(map(int, names))) < len(names):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected different numbers like 0,1,2,3")
    return [int(name) for name in names]

def parse_args(argv=None):
    """Returns the flags; ends the program with status 2 and one line where one is invalid."""
    count, real = functools.partial(number, int), functools.partial(number, float)
    fraction, tiny = number(float, 0, 1), 1e-9
    parser = ArgumentParser("main.py", description="Trains MnasNet.", formatter_class=HelpFormatter)

    add = parser.add_argument_group("data").add_argument
    add("data", nargs="?", help="folder with train/ and val/, each with one folder per class")
    add("--recipe", choices=sorted(RECIPES), help="set of defaults for the flags below")
    add("--synthetic", type=count(1), help="train and evaluate on this many generated images")
    add("-j", "--workers", type=count(0), help="loaders per process (default: its cores, up to 32)")
    add("--train-crop-size", type=count(32), default=224, help="side of a training crop, pixels")
    add("--train-crop-scale", type=real(tiny, 1), default=0.08, help="least area of it, a fraction")
    add("--val-crop-size", type=count(32), default=224, help="side of the center crop, pixels")
    add("--val-resize-size", type=count(32), default=256, help="shorter side before center crop")
    add("--auto-augment", choices=["ra", "ta"], help="RandAugment, or TrivialAugmentWide")
    add("--color-jitter", type=real(0), default=0.0, help="strength of ColorJitter, without hue")
    add("--random-erasing", type=fraction, default=0.0, help="probability of RandomErasing")
    add("--mixup", type=real(0), default=0.0, help="alpha of MixUp")
    add("--cutmix", type=real(0), default=0.0, help="alpha of CutMix; with --mixup, one at random")
    add("--max-bad", type=count(0), help="unreadable images accepted (default: 0.1%%, at least 10)")

    add = parser.add_argument_group("model").add_argument
    add("-a", "--arch", choices=mnasnet.ARCHITECTURES, default="mnasnet1_0", help="network")
    add("--bn-momentum", type=real(tiny, 1), default=0.1, help="momentum of BatchNorm")
    add("--bn-eps", type=real(tiny), default=1e-5, help="epsilon of BatchNorm")
    add("--dropout", type=fraction, default=0.2, help="dropout before the classifier")
    add("--freeze", choices=["none", "features", "bn"], default="none",
        help="train the classifier alone, or keep BatchNorm's running statistics unchanged")
    add("--pretrained", action="store_true", help="start from torchvision's published weights")
    add("--weights", help="with --pretrained: file of weights, instead of the published ones")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=count(1), default=90, help="length of the schedule")
    add("--start-epoch", type=count(0), default=0, help="first epoch, for a manual restart")
    add("-b", "--batch-size", type=count(1), default=256, help="total batch size of this node")
    add("--accumulate", type=count(1), default=1, help="parts that a batch is computed in")
    add("--opt", choices=["sgd", "rmsprop"], default="sgd", help="Nesterov SGD, TensorFlow RMSProp")
    add("--lr", "--learning-rate", type=real(0), default=0.1, help="peak learning rate")
    add("--lr-base-size", type=count(1), help="total batch size that --lr is for (default: any)")
    add("--warmup", type=count(0), default=0, help="epochs of linear warm-up")
    add("--lr-warmup-decay", type=fraction, default=0.1, help="first rate / peak rate")
    add("--schedule", choices=["cosine", "exponential"], default="cosine", help="decay of --lr")
    add("--decay-epochs", type=real(tiny), default=2.4, help="epochs per step of exponential decay")
    add("--decay-rate", type=fraction, default=0.97, help="factor of a step of exponential decay")
    add("--momentum", type=fraction, default=0.9, help="momentum of --opt")
    add("--wd", "--weight-decay", type=real(0), default=1e-4, help="weight decay")
    add("--norm-weight-decay", type=real(0), help="--wd of BatchNorm (default: --wd)")
    add("--bias-weight-decay", type=real(0), help="--wd of biases (default: that of their layer)")
    add("--clip-grad", type=real(tiny), help="largest norm of the gradient")
    add("--ema", type=fraction, help="decay of an exponential moving average of the weights")
    add("--ema-steps", type=count(1), default=1, help="steps between updates of the average")
    add("--label-smoothing", "--ls", type=fraction, default=0.1, help="label smoothing")
    add("--seed", type=count(0, 2 ** 31), help="makes the run deterministic (default: a new one)")

    add = parser.add_argument_group("precision").add_argument
    add("--opt-level", choices=["O0", "O1", "O2"],
        help="fp32, autocast, or fp32 master weights (default: O1 on npu and gpu, O0 on cpu)")
    add("--amp-dtype", choices=["float16", "bfloat16"],
        help="low precision of O1 and O2 (default: float16 on npu and gpu, bfloat16 on cpu)")
    add("--compile", action="store_true", help="train with torch.compile")
    add("--loss-scale", type=real(tiny, word="dynamic"), default="dynamic", help="dynamic, or > 0")
    add("--amp-backend", choices=["auto", "apex", "native"], default="auto",
        help="auto: apex where it is installed with amp, else native")

    add = parser.add_argument_group("devices and processes").add_argument
    add("--device", choices=["npu", "gpu", "cpu"], help="(default: the best one available)")
    add("--device-list", type=card_list, default="", help="cards of this node, such as 0,1,2,3")
    add("--npu", type=count(0), help="card of a run on one card")
    add("--multiprocessing-distributed", action="store_true", help="one process per listed card")
    add("--local_rank", "--local-rank", type=count(0), help="rank on this node, if you start each")
    add("--world-size", type=count(-1), default=-1, help="number of nodes (default: 1)")
    add("--rank", type=count(-1), default=-1, help="rank of this node (default: 0)")
    add("--dist-url", default="env://", help="tcp://HOST:PORT, file:///PATH or env://")
    add("--dist-backend", help="backend (default: hccl, nccl or gloo, by device)")
    add("--dist-timeout", type=real(1, 1e6), default=600.0, help="seconds to wait for other ranks")

    add = parser.add_argument_group("checkpoints and logs").add_argument
    add("--output-dir", default=".", help="folder for checkpoints and metrics.csv")
    add("--resume", help="checkpoint to resume from; 'auto': the newest valid one in --output-dir")
    add("--save-freq", type=count(1), help="save every so many steps, besides after each epoch")
    add("--keep", type=count(1, 100), default=2, help="checkpoints that are kept")
    add("-e", "--evaluate", action="store_true", help="evaluate the model of --resume, and end")
    add("-p", "--print-freq", type=count(1), default=10, help="steps between two log lines")
    add("--tensorboard", help="folder to write TensorBoard events to")
    add("--run-prof", action="store_true", help="profile a few steps, and end")

    argv = list(sys.argv[1:] if argv is None else argv)
    flags = parser.parse_args(argv)
    if flags.recipe:
        recipe = RECIPES[flags.recipe].items()
        words = [f"--{name.replace('_', '-')}={value}" for name, value in recipe]
        flags = parser.parse_args(words + argv)  # of a flag that comes twice, the last
    flags.argv = argv
    flags.nodes, flags.node_rank = max(1, flags.world_size), max(0, flags.rank)
    if flags.data is None and not flags.synthetic:
        parser.error("no data folder: give one that holds train/ and val/, or --synthetic N")
    if flags.val_crop_size > flags.val_resize_size:
        parser.error(f"--val-crop-size {flags.val_crop_size} must be at most --val-resize-size "
                     f"{flags.val_resize_size}")
    if flags.weights and not flags.pretrained:
        parser.error("--weights has no effect without --pretrained (--resume continues a run)")
    if flags.evaluate and not (flags.resume or flags.pretrained):
        parser.error("-e has no model: give --resume FILE or --pretrained")
    if flags.node_rank >= flags.nodes:
        parser.error(f"--rank {flags.rank}, of this node, must be below --world-size {flags.nodes}")
    return flags


# --- 3. Devices and processes ---------------------------------------------------------------------

@dataclass(frozen=True)
class Backend:
    """What differs between the kinds of device."""

    name: str
    type: str  # of torch.device; torch.<type> drives the cards
    collective: str
    amp_dtype: torch.dtype
    opt_level: str  # the default of --opt-level
    channels_last: bool
    fused_sgd: tuple = None  # the first torch whose SGD has a fused kernel that works here

BACKENDS = {
    "npu": Backend("npu", "npu", "hccl", torch.float16, "O1", False),
    # The fused SGD of torch 2.3 and 2.4 refuses weights in channels_last.
    "gpu": Backend("gpu", "cuda", "nccl", torch.float16, "O1", True, fused_sgd=(2, 5)),
    # torch 1.5 and 1.8 convolve in NCHW on the CPU.
    "cpu": Backend("cpu", "cpu", "gloo", torch.bfloat16, "O0", TORCH >= (2, 0), fused_sgd=(2, 4)),
}

@dataclass(frozen=True)
class Runtime:
    """The device of this process and its rank."""

    backend: Backend
    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_size: int = 1  # processes on this node
    module: object = None  # torch.cuda or torch.npu
    copy_stream: object = None  # one for all copies: a stream keeps the memory that it has used

    def synchronize(self):
        if self.module:
            self.module.synchronize()

def device_count(backend):
    """Returns the number of this machine's cards, and the reason should there be none."""
    if backend.name == "cpu":
        return 1, ""
    if backend.name == "npu":  # a second thread issues operators; level 2 leaves it more of them
        os.environ.setdefault("TASK_QUEUE_ENABLE", "2" if TORCH >= (2, 5) else "1")
    if backend.name == "npu" and not hasattr(torch, "npu"):  # Ascend's torch 1.5 has it built in
        try:
            importlib.import_module("torch_npu")
        except (ImportError, RuntimeError, SystemExit) as error:  # some exit where CANN is missing
            return 0, f"torch_npu does not import ({first_line(error)})"
    module = getattr(torch, backend.type, None)
    count = module.device_count() if module and module.is_available() else 0
    return count, f"torch.{backend.type} finds no card"

def select_backend(flags):
    """Returns the backend asked for, or the best one available with the reasons against others."""
    notes = []
    for backend in [BACKENDS[flags.device]] if flags.device else BACKENDS.values():
        count, reason = device_count(backend)
        if count:
            return backend, f" ({'; '.join(notes)})" if notes else ""
        notes.append(f"{backend.name}: {reason}")
    raise UserError(f"--device {flags.device} is not available: {notes[0]}")

def select_cards(flags, backend):
    """Returns the numbers of this node's cards; on the CPU any numbers, one per process."""
    count, _ = device_count(backend)
    cards = flags.device_list or (list(range(count)) if flags.npu is None else [flags.npu])
    if max(cards) >= count and backend.name != "cpu":
        raise UserError(f"card {max(cards)} is not available: this machine has {count}, numbered "
                        "from 0; give others with --device-list or --npu")
    return cards

def read_variable(name, low, high, default=None):
    """Returns a whole number from the environment; raises UserError where there is none."""
    text = os.environ.get(name, default)
    if not str(text).isdecimal() or not low <= int(text) <= high:
        raise UserError(f"{name} is {text!r}, expected {low} to {high}, as torchrun or srun set it")
    return int(text)

def resolve_rank(flags):
    """Returns rank, world size, local rank and processes of this node, from flags or a launcher."""
    cards, env = len(flags.device_list), os.environ
    if flags.multiprocessing_distributed:
        rank = flags.node_rank * cards + flags.local_rank
        return rank, flags.nodes * cards, flags.local_rank, cards
    if "RANK" in env or "WORLD_SIZE" in env:
        names, nodes = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), 1
    elif "SLURM_PROCID" in env and "SLURM_NTASKS" in env and flags.world_size == -1:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        nodes = read_variable("SLURM_NNODES", 1, 2 ** 20, default=1)
    elif cards > 1:
        raise UserError(f"--device-list names {cards} cards for one process: add "
                        "--multiprocessing-distributed")
    elif flags.local_rank is None:
        return flags.node_rank, flags.nodes, 0, 1
    else:
        raise UserError("--local_rank needs --multiprocessing-distributed and --device-list, or "
                        "RANK and WORLD_SIZE in the environment, which torchrun sets")
    size = read_variable(names[1], 1, 2 ** 20)
    rank = read_variable(names[0], 0, size - 1)
    local_size = read_variable("LOCAL_WORLD_SIZE", 1, size, default=size // nodes)
    if size % nodes or size % local_size or flags.world_size not in (-1, size):
        raise UserError(f"{names[1]} is {size}: expected the same number of ranks on each node, "
                        f"{local_size} here, and no other --world-size (found {flags.world_size})")
    local_rank = read_variable(names[2], 0, local_size - 1, default=rank % local_size)
    return rank, size, local_rank if flags.local_rank is None else flags.local_rank, local_size

def resolve_address(url, one_node):
    """Returns where the ranks meet; sets MASTER_ADDR and MASTER_PORT where env:// lacks them."""
    if url != "env://":
        return url
    nodes = re.sub(r"\[(\w+)[^]]*\]", r"\1", os.environ.get("SLURM_JOB_NODELIST", ""))  # n[3-5]: n3
    if not os.environ.setdefault("MASTER_ADDR", "127.0.0.1" if one_node else nodes.split(",")[0]):
        raise UserError("several nodes need an address: --dist-url tcp://HOST:PORT or MASTER_ADDR")
    job = read_variable("SLURM_JOB_ID", 0, 2 ** 63, default=9688)
    os.environ.setdefault("MASTER_PORT", str(20000 + job % 10000))
    return f"tcp://{os.environ['MASTER_ADDR']}:{read_variable('MASTER_PORT', 1, 65535)}"

def cores_per_process(processes=1):
    """Returns the usable cores of this machine, divided among so many processes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // processes)

def open_device(flags, backend):
    """Returns this process's ``Runtime``; its card is current before anything else uses it."""
    cards = select_cards(flags, backend)
    rank, world_size, local_rank, local_size = resolve_rank(flags)
    if backend.name == "cpu":
        threads = cores_per_process(local_size)
        # Only where it changes the number: torch 1.8's loader processes may hang after the call.
        if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        mnasnet.keep_freed_memory(local_size)  # before the loaders start, which inherit it
        return Runtime(backend, torch.device("cpu"), rank, world_size, local_size)
    if local_rank >= len(cards):
        raise UserError(f"local rank {local_rank} has no card: this node has {len(cards)}")
    device, module = torch.device(backend.type, cards[local_rank]), getattr(torch, backend.type)
    module.set_device(device)
    if TORCH >= (1, 12):
        torch.set_float32_matmul_precision("high")  # TF32, which convolutions use by default
    if hasattr(module, "set_option") and "ACL_OP_COMPILER_CACHE_MODE" not in os.environ:
        module.set_option({"ACL_OP_COMPILER_CACHE_MODE": "enable"})
    return Runtime(backend, device, rank, world_size, local_size, module, module.Stream())

def die_with_parent(parent, signum):
    """Asks the kernel (Linux) to send this process ``signum`` when the process ``parent`` ends."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signum))  # PR_SET_PDEATHSIG
    if os.getppid() != parent:  # it ended before the call
        os._exit(1)

class ProcessGroup:
    """All ranks of a run. Its collectives go over gloo, from host to host: no device waits."""

    def __init__(self, flags, runtime):
        """Raises UserError where not all ranks are found at --dist-url in time."""
        self.rank, self.size = runtime.rank, runtime.world_size
        self.signal = 0  # the last signal that this process received
        self.checkpoint = None  # path of the newest checkpoint
        self.waiting = False  # for images: a signal need not wait for them
        self.pending = []  # gathers that sync_step has started
        self.step_end, self.step_seconds = time.monotonic(), 0.0
        self.ended = threading.Event()
        if self.size == 1:
            return
        backend = flags.dist_backend or runtime.backend.collective
        one_node = runtime.local_size == self.size
        env, address = os.environ, resolve_address(flags.dist_url, one_node)
        local = address.startswith(("file:", "tcp://127.0.0.1:", "tcp://localhost:"))
        if one_node and local and os.path.exists("/sys/class/net/lo"):
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one node does not use the network
        if TORCH < (2, 0):
            env.setdefault("NCCL_ASYNC_ERROR_HANDLING", "1")  # else nccl waits for ever
        limit = datetime.timedelta(seconds=flags.dist_timeout)
        # nccl and hccl abort the process: gloo's time limit, after which we name ranks, is first.
        margin = datetime.timedelta(seconds=0 if backend == "gloo" else 60)
        failed = f"rendezvous failed at {address} within {flags.dist_timeout:g} s"
        advice = "start all ranks with the same --dist-url, tcp://HOST:PORT, file:///PATH or env://"
        try:
            with self.time_limit(flags.dist_timeout + 10, f"{failed} (no answer): {advice}"):
                store, _, _ = next(rendezvous(flags.dist_url, self.rank, self.size, timeout=limit))
                # torchrun keeps its store when it restarts the ranks.
                self.store = dist.PrefixStore(env.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
                dist.init_process_group(backend, store=self.store, rank=self.rank,
                                        world_size=self.size, timeout=limit + margin)
                self.group = dist.new_group(backend="gloo", timeout=limit)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"rank {self.rank}: {failed} ({first_line(error)}): {advice}")
        if self.rank == 0:
            print(f"=> {self.size} processes, rendezvous at {address}, collectives over {backend}",
                  flush=True)

    @contextlib.contextmanager
    def time_limit(self, seconds, error):
        """Ends the process where its block takes longer; torch's store may wait for ever."""
        timer = threading.Timer(seconds, self.give_up, [error])
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def give_up(self, error):
        print_error(error, self.rank)
        os._exit(1)

    @contextlib.contextmanager
    def handle_signals(self, checkpoint):
        """Makes a signal a request to save and end; ``checkpoint`` is the path of the newest one.
        Python handles no signal inside an operator, so a thread ends a process that hangs there."""
        self.checkpoint = checkpoint
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        install_handler(self.receive_signal)
        threading.Thread(target=self.end_in_time, args=(reader,), daemon=True).start()
        try:
            yield
        finally:
            self.ended.set()
            signal.set_wakeup_fd(-1)
            os.close(writer)
            install_handler(signal.SIG_DFL)

    def receive_signal(self, signum, frame):
        self.signal = signum
        # Several ranks have to agree on their last step, and torch 1.5 starts its loaders here.
        if self.waiting and self.size == 1 and TORCH >= (1, 7):
            self.waiting = False
            raise Stopped(signum)

    def end_in_time(self, reader):
        """Ends the process 30 s and two steps after a signal, where other ranks or loaders hang."""
        for received in iter(lambda: os.read(reader, 1), b""):
            signum = received[0]  # SIGCHLD, too, when a loader ends
            if signum in SIGNALS and not self.ended.wait(30 + 2 * self.step_seconds):
                self.stop_unsaved(signum)

    def stop_unsaved(self, signum):
        saved = self.checkpoint and os.path.exists(self.checkpoint)
        print(f"=> {signal.Signals(signum).name}: stopped without saving, as no step ended; the "
              f"last checkpoint is {self.checkpoint if saved else 'none'}",
              file=sys.stderr, flush=True)
        os._exit(128 + signum)

    def sync_step(self, unreadable, last):
        """Starts to gather the signal and the number of unreadable images of each rank's step.
        Returns any signal, or 0, and the sum of the images from the step before, as a gather runs
        during the next step. The ``last`` step, and a single process, include their own."""
        now = time.monotonic()
        self.step_seconds, self.step_end = now - self.step_end, now
        self.pending.append(self.start_gather(torch.tensor([self.signal, unreadable])))
        due = len(self.pending) - (self.size > 1 and not last)
        rows = [self.finish_gather(*self.pending.pop(0)) for _ in range(due)]
        rows = torch.cat(rows or [torch.zeros(1, 2)])
        return int(rows[:, 0].max()), int(rows[:, 1].sum())

    def start_gather(self, row):
        """Starts to gather the ``row`` [N] of every rank; ``finish_gather`` takes the result."""
        rows = [row.clone() for _ in range(self.size)]
        if self.size == 1:
            return rows, None
        return rows, dist.all_gather(rows, row, group=self.group, async_op=True)

    def finish_gather(self, rows, work):
        if work:
            work.wait()
        return torch.stack(rows)

    def gather(self, row):
        """Returns the ``row`` [N] of every rank as [world size, N]; on the host."""
        return self.finish_gather(*self.start_gather(row))

    def sum(self, values):
        """Returns the sums of a list of numbers over all ranks, in float64."""
        return self.gather(torch.tensor(values, dtype=torch.float64)).sum(0).tolist()

    def describe(self, error):
        """Returns one line about an error, or "" for a bug; names the ranks that do not respond."""
        collective = re.search("gloo|nccl|hccl|ProcessGroup|Connection|pair closure|"
                               "(Read|Write|Connect) (error|timeout)", str(error), re.I)
        if self.size == 1 or not (collective and isinstance(error, RuntimeError)):
            return machine_error(error)
        if self.signal:  # no error: another rank received it, too, and has ended
            self.stop_unsaved(self.signal)
        message = f"does not respond ({first_line(error)}): see its output, then --resume auto"
        silent = ["rank 0"]  # which holds the store
        with self.time_limit(8, f"rank 0 {message}"), contextlib.suppress(RuntimeError):
            self.store.add(f"alive/{self.rank}", 1)
            time.sleep(3)
            silent = [f"rank {r}" for r in range(self.size) if not self.store.add(f"alive/{r}", 0)]
        return f"{', '.join(silent) or 'another rank'} {message}"

    def report(self, error):
        """Prints an error, unless another rank has reported one: they would repeat each other."""
        with contextlib.suppress(RuntimeError), self.time_limit(8, error):  # of its thread, too
            if self.size > 1 and self.store.add("error", 1) > 1:
                return
        print_error(error, self.rank if self.size > 1 else None)

def wait_children(children, first_rank, received):
    """Forwards the signals in the list ``received``; returns 128 plus the first, or the status of
    the first child that fails, or 0. The others then have 10 s to end, or 60 s if it has saved."""
    status, deadline = 0, math.inf
    while any(child.returncode is None for child in children):
        time.sleep(0.05)
        if time.monotonic() > deadline:
            received.append(signal.SIGKILL)
        while received:
            signum = received.pop(0)
            status = status or 128 + signum
            for child in children:
                child.send_signal(signum)
        for rank, child in enumerate(children, first_rank):
            code = child.poll()
            if code and deadline == math.inf:
                if code < 0 and not status:
                    name = signal.Signals(-code).name
                    print_error(f"rank {rank} was killed by {name}; ending the others")
                status = status or (code if code > 0 else 128 - code)
                saved = code - 128 in SIGNALS  # the others save, too: SIGTERM would cut that short
                deadline = time.monotonic() + (60 if saved else 10)
                if not saved:
                    received.append(signal.SIGTERM)
    return status

def launch(flags, backend):
    """Starts one process per card of this node and returns their exit status."""
    argv, processes = flags.argv, len(flags.device_list)
    parent, received = os.getpid(), []
    install_handler(lambda signum, frame: received.append(signum))
    os.environ.setdefault("OMP_NUM_THREADS", str(cores_per_process(processes)))
    end = argv.index("--") if "--" in argv else len(argv)  # what follows are no flags

    def prepare_child():
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # until main.py's first lines
        die_with_parent(parent, signal.SIGTERM)

    with tempfile.TemporaryDirectory(prefix="mnasnet-") as folder:
        if flags.nodes == 1 and flags.dist_url == "env://" and "MASTER_ADDR" not in os.environ:
            flags.dist_url = f"file://{folder}/rendezvous"  # one node needs no port
        command = [sys.executable, __file__, *argv[:end], "--dist-url", flags.dist_url, "--device",
                   backend.name, "--device-list", ",".join(map(str, flags.device_list))]
        children = [subprocess.Popen([*command, "--local_rank", str(local_rank), *argv[end:]],
                                     start_new_session=True, preexec_fn=prepare_child)
                    for local_rank in range(processes)]
        return wait_children(children, flags.node_rank * processes, received)


# --- 4. Data --------------------------------------------------------------------------------------

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MEAN = (0.485, 0.456, 0.406)  # of ImageNet's red, green and blue, from torchvision's references
STD = (0.229, 0.224, 0.225)
MAX_LOADERS = 32  # of a process, unless it is told otherwise; as many feed any card
LARGE_JPEG = 2 ** 18  # bytes; a photo that is worth decoding at a fraction of its resolution
MAX_PIXELS = Image.MAX_IMAGE_PIXELS  # 89 million: a loader stays below 1.5 GB

@functools.lru_cache(None)
def jpeg_decoder():
    """Returns torchvision's JPEG decoder, bytes -> uint8 [3, H, W], or None to use Pillow."""
    with contextlib.suppress(ImportError, RuntimeError):
        if TORCH >= (2, 1):  # F.interpolate antialiases uint8
            from torchvision.io import ImageReadMode, decode_jpeg
            return lambda data: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8),
                                            mode=ImageReadMode.RGB)
    return None

def jpeg_pixels(data):
    """Returns the number of pixels that a JPEG's header claims, or 0 (ITU-T T.81, B.2.2)."""
    position = 2
    while data[position:position + 1] == b"\xff" and position + 9 <= len(data):
        length, _, height, width = struct.unpack_from(">HBHH", data, position + 2)
        if 0xC0 <= data[position + 1] <= 0xCF and data[position + 1] not in (0xC4, 0xC8, 0xCC):
            return height * width
        position += 2 + length
    return 0

def crop_with_torch(image, get_crop, size):
    """Returns the crop of a decoded image [3, H, W] as uint8 [size, size, 3]."""
    (left, top, w, h), (width, height), (x, y) = get_crop(image.shape[2], image.shape[1])
    region = image[None, :, top:top + h, left:left + w]
    if (w, h) != (width, height):
        region = F.interpolate(region, (height, width), mode="bilinear", antialias=True)
    return region[0, :, y:y + size, x:x + size].permute(1, 2, 0).numpy()

def to_rgb(image):
    """Converts any mode that Pillow decodes: 16 bits are scaled to 8, transparency is white."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion clips at 255
        pixels = np.array(image)
        np.clip(pixels, 0, 65535, out=pixels)
        pixels //= 257
        image = Image.fromarray(pixels.astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image if image.mode == "RGBA" else image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(layer, mask=layer)
    return image if image.mode == "RGB" else image.convert("RGB")

def read_with_pillow(data, get_crop, size):
    """Returns the crop of an encoded image as uint8 [size, size, 3]; one resize does it all."""
    image = Image.open(io.BytesIO(data))  # raises above 2 * MAX_PIXELS, the limit for JPEG
    width, height = image.size
    copies = 2 if image.format == "WEBP" or image.mode in ("LA", "PA") else 1
    if image.format not in ("JPEG", "MPO") and width * height * copies > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels, at most {MAX_PIXELS // copies} are decoded")
    (left, top, w, h), resized, corner = get_crop(width, height)
    scale_x, scale_y = w / resized[0], h / resized[1]
    left, top = left + corner[0] * scale_x, top + corner[1] * scale_y
    box = (left, top, left + size * scale_x, top + size * scale_y)  # in pixels of the file
    # JPEG decodes faster at 1/2, 1/4 or 1/8 of the resolution; twice the crop's is enough.
    image.draft("RGB", tuple(int(2 * side / max(2, min(scale_x, scale_y))) for side in image.size))
    image = to_rgb(image)
    factor = round(width / image.width)
    # Rounding may put an edge just outside the image.
    box = tuple(min(max(edge / factor, 0), image.size[i % 2]) for i, edge in enumerate(box))
    return np.asarray(image.resize((size, size), Image.BILINEAR, box=box))

def read_image(path, get_crop, size):
    """Returns the ``Crop`` get_crop(width, height) of an image file: uint8 [size, size, 3],
    antialiased bilinear, without EXIF rotation. Raises OSError where it can't be decoded."""
    if not os.path.isfile(path):  # opening a pipe would wait for its writer
        raise OSError("not a regular file")
    with open(path, "rb") as file:
        data = file.read()
    decode = jpeg_decoder()
    if decode and len(data) < LARGE_JPEG and 0 < jpeg_pixels(data) < 2 ** 24:
        with contextlib.suppress(RuntimeError):  # CMYK, or damaged: Pillow decides
            return crop_with_torch(decode(data), get_crop, size)
    try:
        return read_with_pillow(data, get_crop, size)
    except Exception as error:  # Pillow's plugins raise SyntaxError, struct.error, IndexError, ...
        if "cannot identify image file" in str(error):  # and the address of an object
            raise OSError("not an image of a format that Pillow knows")
        raise OSError(f"{type(error).__name__}: {first_line(error)}")

def visible_entries(folder):
    """Returns the entries of a folder, without hidden ones."""
    return [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]

def list_images(folder, above):
    """Returns the paths of the images below a folder, without hidden ones. A link to itself or to
    one of the folders ``above`` it is not followed. Raises OSError where a folder can't be read."""
    above, paths = above + (os.path.realpath(folder),), []
    for entry in visible_entries(folder):
        if entry.is_dir():
            if not entry.is_symlink() or os.path.realpath(entry.path) not in above:
                paths += list_images(entry.path, above)
        elif entry.name.lower().endswith(EXTENSIONS):
            paths.append(entry.path)
    return paths

class ImageFolder:
    """The images of a folder with one folder per class: ``classes``, ``paths`` and ``labels`` [N],
    numpy arrays in one block each, which loaders share. Raises UserError where there are none."""

    def __init__(self, root):
        self.root = os.path.abspath(root)
        if not os.path.isdir(root):
            raise UserError(f"no folder {root!r}: expected train/ and val/ with a folder per class")
        found = []
        try:
            self.classes = sorted(e.name for e in visible_entries(root) if e.is_dir())
            for name in self.classes:
                folder = os.path.join(self.root, name)
                paths = list_images(folder, (os.path.realpath(self.root),))
                if not paths:
                    raise UserError(f"class folder {folder!r} holds no image "
                                    f"({' '.join(EXTENSIONS)}): add some or remove it")
                found.append(sorted(os.fsencode(path[len(self.root) + 1:]) for path in paths))
        except OSError as error:
            raise UserError(f"can't read {error.filename!r}: {error.strerror}")
        if not found:
            raise UserError(f"{root!r} holds no folders: expected one folder of images per class")
        self.paths = np.concatenate(found)
        self.labels = np.repeat(np.arange(len(found)), [len(paths) for paths in found])

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    def read(self, index, get_crop, size):
        return read_image(self.path(index), get_crop, size)

class SyntheticImages(ImageFolder):
    """Images of noise, the same in every run, to measure without data."""

    def __init__(self, count):
        self.classes = [f"{label:04d}" for label in range(1000)]
        self.labels = np.arange(count) % len(self.classes)

    def read(self, index, get_crop, size):
        pixels = np.random.RandomState(index).bytes(size * size * 3)
        return np.frombuffer(pixels, np.uint8).reshape(size, size, 3)

def open_images(flags):
    """Returns the training images, or None for an evaluation, and the validation images."""
    if flags.synthetic:
        images = SyntheticImages(flags.synthetic)
        return None if flags.evaluate else images, images
    train = None if flags.evaluate else ImageFolder(os.path.join(flags.data, "train"))
    val = ImageFolder(os.path.join(flags.data, "val"))
    if train and train.classes != val.classes:
        odd = min(set(train.classes) ^ set(val.classes))
        raise UserError(f"train/ has {len(train.classes)} classes and val/ {len(val.classes)}, "
                        f"which must be the same: {odd!r} is only in one of them")
    return train, val

# A box (left, top, width, height) of an image, its new size, and the corner of the square to cut.
Crop = namedtuple("Crop", "box resized corner")

def random_resized_crop(width, height, size, scale, rng):
    """RandomResizedCrop: a part of at least ``scale`` of the image's area, ratio 3/4 to 4/3."""
    for _ in range(10):
        area = width * height * rng.uniform(scale, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return Crop((left, top, w, h), (size, size), (0, 0))
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return Crop(((width - w) // 2, (height - h) // 2, w, h), (size, size), (0, 0))

def resize_center_crop(width, height, resize, size):
    """Resize of the shorter side, then CenterCrop."""
    resized = tuple(int(resize * side / min(width, height)) for side in (width, height))
    corner = tuple(round((side - size) / 2) for side in resized)
    return Crop((0, 0, width, height), resized, corner)

def build_augmentation(flags):
    """Returns torchvision's transforms of a crop, uint8 [S, S, 3], in the order of its references,
    or None for none. Raises UserError where this torchvision lacks one."""
    if not (flags.color_jitter or flags.auto_augment or flags.random_erasing):
        return None
    from torchvision import __version__, transforms
    steps = [Image.fromarray]
    try:
        if flags.color_jitter:
            steps.append(transforms.ColorJitter(*[flags.color_jitter] * 3))
        if flags.auto_augment:
            name = {"ra": "RandAugment", "ta": "TrivialAugmentWide"}[flags.auto_augment]
            # By nearest neighbour, the default: bilinear takes twice as long.
            augment = getattr(transforms, name)()
            if name == "TrivialAugmentWide":  # a table made for each image was a third of its time
                augment._augmentation_space = functools.lru_cache(None)(augment._augmentation_space)
            steps.append(augment)
        steps.append(np.array)
        if flags.random_erasing:  # with the mean colour, as after the normalization
            erase = transforms.RandomErasing(flags.random_erasing, value=[255 * m for m in MEAN])
            steps.append(lambda crop: erase(torch.from_numpy(crop).permute(2, 0, 1)))
            steps.append(lambda crop: crop.permute(1, 2, 0).numpy())
    except AttributeError as error:
        raise UserError(f"torchvision {__version__} is too old, 0.12 has all transforms: {error}")
    return transforms.Compose(steps)

def copy_image(image, target):
    """Copies an image, uint8 [S, S, 3]. Where the strides differ (torch resizes planes, a flip
    reverses rows), numpy copies channel by channel faster."""
    for channel in [slice(None)] if image.strides[1:] == target.strides[1:] else range(3):
        target[..., channel] = image[..., channel]

class ImageBatches(torch.utils.data.Dataset):
    """Whole batches: ``self[number, epoch, indices]`` puts images into a slot of ``ring``, uint8
    [slots, batch size, size, size, 3], which the loader processes share. Returns the slot, labels,
    int64 [n], and (index, reason) of each unreadable image: in training another one of its class
    replaces it, in evaluation (no seed) a black one with label -1, which no prediction matches.
    What is done to an image depends on (seed, epoch, index) alone, not on the number of loaders."""

    def __init__(self, images, flags, seed, batch_size, slots):
        self.images, self.seed = images, seed
        self.resize, self.scale = flags.val_resize_size, flags.train_crop_scale
        self.size = flags.val_crop_size if seed is None else flags.train_crop_size
        self.augment = None if seed is None else build_augmentation(flags)
        shape = (slots, batch_size, self.size, self.size, 3)
        memory = mmap.mmap(-1, int(np.prod(shape)))  # shared, and without a name
        self.ring = np.frombuffer(memory, np.uint8).reshape(shape)

    def __getitem__(self, key):
        number, epoch, indices = key
        slot = number % len(self.ring)
        labels, unreadable = self.images.labels[indices], []
        for position, index in enumerate(indices):
            try:
                image = self.load(epoch, index)
            except OSError as error:
                unreadable.append((int(index), first_line(error)))
                if self.seed is None:
                    image = np.zeros((1, 1, 3), np.uint8)
                    labels[position] = -1
                else:
                    image = self.load_substitute(epoch, index)
            copy_image(image, self.ring[slot, position])
        return slot, labels, unreadable

    def load(self, epoch, index):
        """Returns an augmented image, in evaluation the center crop: uint8 [size, size, 3]."""
        if self.seed is None:
            get_crop = functools.partial(resize_center_crop, resize=self.resize, size=self.size)
            return self.images.read(index, get_crop, self.size)
        rng = random.Random(((self.seed << 20) + epoch << 40) + int(index))
        get_crop = functools.partial(random_resized_crop, size=self.size, scale=self.scale, rng=rng)
        image = self.images.read(index, get_crop, self.size)
        image = image[:, ::-1] if rng.random() < 0.5 else image
        if self.augment:
            draw = rng.getrandbits(32)
            random.seed(draw)  # torchvision 0.2 draws from it
            torch.default_generator.manual_seed(draw)
            crop = np.empty(image.shape, np.uint8)
            copy_image(image, crop)
            image = self.augment(crop)
        return image

    def load_substitute(self, epoch, index):
        """Returns the next image of the same class that can be read."""
        same_class = np.flatnonzero(self.images.labels == self.images.labels[index])
        for other in np.roll(same_class, -np.searchsorted(same_class, index))[1:]:
            with contextlib.suppress(OSError):
                return self.load(epoch, other)
        name = self.images.classes[self.images.labels[index]]
        raise UserError(f"no image of class {name!r} can be read: {self.images.path(index)}")

class BatchSampler(torch.utils.data.Sampler):
    """The keys of ``ImageBatches`` for one rank. Training: full batches in the order of (seed,
    epoch), from ``first_image`` on. Evaluation (no seed): every image once, without padding."""

    def __init__(self, count, batch_size, runtime, seed=None):
        self.count, self.batch_size, self.runtime, self.seed = count, batch_size, runtime, seed
        self.total_batch = batch_size * runtime.world_size  # images of a step, all ranks
        self.epoch, self.first_image = 0, 0

    def __len__(self):
        """Steps that all ranks take; in evaluation some may have no image left for the last."""
        left = self.count - self.first_image
        return left // self.total_batch if self.seed is not None else -(-left // self.total_batch)

    def __iter__(self):
        rank, world_size = self.runtime.rank, self.runtime.world_size
        if self.seed is None:
            indices = np.arange(self.first_image + rank, self.count, world_size)
        else:
            order = np.random.RandomState([self.seed, self.epoch]).permutation(self.count)
            steps = order[self.first_image:][:len(self) * self.total_batch]
            indices = steps.reshape(len(self), world_size, self.batch_size)[:, rank].ravel()
        for number, first in enumerate(range(0, len(indices), self.batch_size)):
            yield number, self.epoch, indices[first:first + self.batch_size]

def init_loader(parent, index):
    """Ends a loader process with its parent, which trains and handles the signals."""
    signal.set_wakeup_fd(-1)
    die_with_parent(parent, signal.SIGKILL)
    install_handler(signal.SIG_IGN)

def end_loaders():
    """Ends the loader processes; they ignore SIGTERM, for which torch would wait at exit."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report their end
    for child in multiprocessing.active_children():
        child.kill()

def make_loader(images, flags, runtime, batch_size, workers, seed=None):
    """Returns the loader of images: for training where a seed is given, else for evaluation."""
    # Two slots a worker (DataLoader's prefetch_factor), one for the batch in use, one for the next.
    batches = ImageBatches(images, flags, seed, batch_size, slots=2 * workers + 2)
    sampler = BatchSampler(len(images), batch_size, runtime, seed)
    persistent = {"persistent_workers": True} if workers and TORCH >= (1, 7) else {}
    warnings.filterwarnings("ignore", module="PIL|torchvision")  # size, metadata, deprecation
    jpeg_decoder()  # imported before the loaders start, not in each of them
    parent = os.getpid()
    # A queue to a process that has ended would print a traceback: a loader then ends, too.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(
        lambda *error: os.getpid() == parent or os._exit(1))
    loader = torch.utils.data.DataLoader(
        batches, batch_size=None, sampler=sampler, num_workers=workers, collate_fn=tuple,
        worker_init_fn=functools.partial(init_loader, parent),
        multiprocessing_context="fork" if workers else None,  # Python 3.14's would copy the ring
        timeout=flags.dist_timeout if workers else 0, **persistent)
    if persistent:
        # Starts the workers with nothing to fetch: later they would inherit the memory of a step.
        sampler.first_image = sampler.count
        iter(loader)
        sampler.first_image = 0
    atexit.register(end_loaders)
    return loader

def prefetch(loader, runtime, dtype):
    """Yields batches on the device: normalized images, ``dtype`` [n, 3, S, S], targets [n], and the
    unreadable images. Copies uint8 from pinned memory on a stream of its own, a batch ahead."""
    device, module, stream = runtime.device, runtime.module, runtime.copy_stream
    # Repeated for a row of pixels: broadcasting three values is slow on the CPU.
    size = loader.dataset.ring.shape[2]
    mean = torch.tensor([255 * m for m in MEAN] * size, device=device)
    scale = torch.tensor([1 / (255 * s) for s in STD] * size, device=device)
    npu, channels_last = runtime.backend.name == "npu", runtime.backend.channels_last
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    target_dtype = torch.int32 if npu and TORCH < (1, 10) else torch.int64  # of cross entropy
    pinned = module is not None and (not npu or TORCH >= (1, 12))  # older: CUDA alone
    pin_options = {"device": "npu"} if npu and TORCH < (2, 6) else {}
    ready, batches = None, iter(loader)
    for worker in getattr(batches, "_workers", ()):  # torch 1.5 waits for a stopped one for ever
        worker.join = functools.partial(worker.join, timeout=10)
    for slot, labels, unreadable in batches:
        images = torch.from_numpy(loader.dataset.ring[slot, :len(labels)])
        targets = torch.from_numpy(labels)
        if pinned:
            images, targets = images.pin_memory(**pin_options), targets.pin_memory(**pin_options)
        with module.stream(stream) if module else contextlib.nullcontext():
            # torch_npu copies even unpinned memory asynchronously, when it may be freed already.
            images = images.to(device, non_blocking=pinned)
            targets = targets.to(device, non_blocking=pinned).to(target_dtype)
        if ready:
            yield ready
        if module:
            module.current_stream().wait_stream(stream)
            images.record_stream(module.current_stream())
            targets.record_stream(module.current_stream())
        rows = images.view(-1, size, 3 * size).float().sub_(mean).mul_(scale).to(dtype)
        images = rows.view(images.shape).permute(0, 3, 1, 2)
        ready = images.contiguous(memory_format=memory_format), targets, unreadable
    if ready:
        yield ready

def mix_batch(images, targets, num_classes, flags, rng):
    """Returns images [n, 3, S, S] and probabilities of the classes [n, C] after MixUp (Zhang et
    al., 2017, arXiv 1710.09412) or CutMix (Yun et al., 2019, arXiv 1905.04899), as torchvision
    computes them, each image with the one before it; without both flags, images and targets."""
    if not (flags.mixup or flags.cutmix):
        return images, targets
    cut = flags.cutmix and (not flags.mixup or rng.random() < 0.5)
    alpha = flags.cutmix if cut else flags.mixup
    share = rng.betavariate(alpha, alpha)  # that the image keeps
    others = images.roll(1, 0)
    if cut:
        height, width = images.shape[2:]
        x, y, half = rng.randrange(width), rng.randrange(height), 0.5 * math.sqrt(1 - share)
        left, right = max(0, x - int(half * width)), min(width, x + int(half * width))
        top, bottom = max(0, y - int(half * height)), min(height, y + int(half * height))
        images[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        share = 1 - (right - left) * (bottom - top) / (width * height)
    else:
        images = others.mul_(1 - share).add_(images.mul(share))
    classes = torch.arange(num_classes, dtype=targets.dtype, device=targets.device)
    one_hot = (targets.view(-1, 1) == classes).float()
    return images, one_hot.roll(1, 0).mul_(1 - share).add_(one_hot.mul(share))


# --- 5. Mixed precision ---------------------------------------------------------------------------

def optimizer_parameters(optimizer):
    """Returns what the optimizer updates: the model's parameters in order, or their masters."""
    places = [(place, parameter) for group in optimizer.param_groups for place, parameter
              in zip(group.get("places", range(len(group["params"]))), group["params"])]
    return [parameter for _, parameter in sorted(places, key=lambda pair: pair[0])]

def find_apex(flags, backend, low=True):
    """Returns apex.amp, or None for native and O0, and the reason against an installed apex."""
    if flags.amp_backend == "apex" and flags.amp_dtype == "bfloat16":
        raise UserError("--amp-dtype bfloat16: apex has float16 alone, use --amp-backend native")
    fits = low and backend.name != "cpu" and flags.amp_dtype != "bfloat16"
    if flags.amp_backend == "native" or (flags.amp_backend == "auto" and not fits):
        return None, ""
    try:
        from apex import amp
        ascend = "combine_grad" in inspect.signature(amp.initialize).parameters
        if backend.name == ("npu" if ascend else "gpu"):
            return (amp if low else None), ""
        reason = f"the installed apex is {'Ascend' if ascend else 'NVIDIA'}'s and needs its card"
    except Exception as error:  # one that was built for another torch fails in any way
        missing = re.search("(named|import of) '?apex'?( |$)|name 'amp'", str(error))
        reason = "" if missing else f"apex does not import ({first_line(error)})"
    if flags.amp_backend == "apex":
        reason = reason or "no apex.amp is installed (NVIDIA removed it from apex in 2025)"
        raise UserError(f"--amp-backend apex: {reason}. --amp-backend native computes the same")
    return None, reason

def low_precision(flags, runtime):
    """Returns the dtype of O1 and O2. Raises UserError where the card or torch does not have it."""
    backend, module = runtime.backend, runtime.module
    dtype = getattr(torch, flags.amp_dtype) if flags.amp_dtype else backend.amp_dtype
    if dtype == backend.amp_dtype:
        return dtype
    supported, options = getattr(module, "is_bf16_supported", lambda: False), {}
    if "including_emulation" in inspect.signature(supported).parameters:
        options["including_emulation"] = False  # which is slow
    if not supported(**options):
        raise UserError(f"--amp-dtype {flags.amp_dtype} is not available on this {backend.name} "
                        f"with torch {torch.__version__}: use {str(backend.amp_dtype)[6:]}, or "
                        "--opt-level O0")
    return dtype

def find_native_amp(backend, dtype):
    """Returns the classes (or partials) of autocast, None where torch has none, and GradScaler."""
    npu_amp = backend.name == "npu" and hasattr(getattr(torch.npu, "amp", None), "autocast")
    if npu_amp and dtype == torch.float16:
        return torch.npu.amp.autocast, torch.npu.amp.GradScaler  # reads older cards' overflow flag
    autocast, scaler = None, torch.cuda.amp.GradScaler
    if TORCH >= (1, 10):
        autocast = functools.partial(torch.autocast, backend.type, dtype=dtype)
    elif backend.name == "gpu" and TORCH >= (1, 6):
        autocast = torch.cuda.amp.autocast
    if TORCH >= (2, 3):
        scaler = functools.partial(torch.amp.GradScaler, backend.type)
    return autocast, scaler

class Precision:
    """O0, O1 or O2, through apex or native. O1 runs convolutions and the classifier in low
    precision. O2 keeps the whole model in it except BatchNorm, and the optimizer updates fp32
    master weights. float16 has a loss scale. Raises UserError where this torch lacks the level.
    Use: ``prepare`` a model, build its optimizer, ``initialize`` both, then wrap it in DDP."""

    def __init__(self, flags, runtime):
        backend = runtime.backend
        self.level = flags.opt_level or backend.opt_level
        self.fixed_scale = None if flags.loss_scale == "dynamic" else flags.loss_scale
        self.clip_grad = flags.clip_grad
        self.verbosity = 0 if runtime.rank else 1
        low = self.level != "O0"
        self.apex, self.note = find_apex(flags, backend, low)
        self.ascend_options = {"combine_grad": True} if backend.name == "npu" else {}  # of apex
        self.conv_dtype = low_precision(flags, runtime) if low else torch.float32
        if low and backend.name == "cpu" and not mnasnet.has_fast_depthwise(self.conv_dtype):
            self.note = "slow with this processor and torch: O0 is faster"
        native_o2 = self.level == "O2" and not self.apex
        self.input_dtype = self.conv_dtype if native_o2 else torch.float32
        self.uses_loss_scale = self.conv_dtype == torch.float16
        self.autocast, self.scaler, self.masters = contextlib.nullcontext, None, []
        if self.apex:
            return
        autocast, scaler = find_native_amp(backend, self.conv_dtype)
        if low and autocast is None:
            hint = "" if backend.name == "cpu" else ", or install an apex that has amp"
            raise UserError(f"--opt-level {self.level} on {backend.name} needs autocast, which "
                            f"torch {torch.__version__} lacks there: use --opt-level O0{hint}")
        if self.level == "O1":
            self.autocast = autocast
        self.scaler = scaler(init_scale=self.fixed_scale or 2.0 ** 16, enabled=self.uses_loss_scale)

    def __str__(self):
        kind = "apex" if self.apex else str(self.conv_dtype)[6:].replace("float32", "fp32")
        return f"{self.level} ({kind}{'; ' if self.note else ''}{self.note})"

    def prepare(self, model):
        """Returns the parameters to optimize; native O2 converts the model to low precision."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        self.frozen = {name: p.detach().clone() for name, p in model.named_parameters()
                       if not p.requires_grad}  # O2 has no master weights of them
        if self.input_dtype == torch.float32:
            return parameters
        self.masters = [(p, p.detach().clone().requires_grad_()) for p in parameters]
        self.convert(model)
        return [master for _, master in self.masters]

    def convert(self, model):
        """Converts an fp32 model to what ``evaluate`` computes in; returns it."""
        for module in model.modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):  # all but BatchNorm
                module.to(self.input_dtype)
        return model

    def initialize(self, model, optimizer=None):
        """Returns the model and, in training, the optimizer, patched by apex where it is used."""
        if not self.apex:
            return model, optimizer
        options = {"opt_level": self.level, "verbosity": self.verbosity, "loss_scale": "dynamic"}
        if optimizer is None:
            return self.apex.initialize(model, **options), None
        if self.fixed_scale:  # apex skips overflows of dynamic scales only: bounds fix one
            options.update(min_loss_scale=self.fixed_scale, max_loss_scale=self.fixed_scale)
        weights = [p.detach().clone() for p in model.parameters() if p.requires_grad]
        model, optimizer = self.apex.initialize(model, optimizer, **options, **self.ascend_options)
        if self.fixed_scale:
            scaler = {"loss_scale": self.fixed_scale, "unskipped": 0}
            self.apex.load_state_dict({"loss_scaler0": scaler})
        # apex makes its fp32 weights at the first zero_grad, of rounded ones. Here they are made
        # before a checkpoint's momentum is loaded, and get the exact weights.
        optimizer.zero_grad()
        for parameter, weight in zip(optimizer_parameters(optimizer), weights):
            parameter.data.copy_(weight)
        return model, optimizer

    def backward(self, loss, optimizer, last=True):
        """Accumulates the gradients of a loss; ``last``: no other follows before the step."""
        if self.apex:
            with self.apex.scale_loss(loss, optimizer, delay_unscale=not last) as scaled_loss:
                scaled_loss.backward()
        else:
            self.scaler.scale(loss).backward()

    def step(self, optimizer):
        """Takes a step unless the gradients overflowed, and clears them."""
        for parameter, master in self.masters:
            if master.grad is None:  # made once: Ascend's fused SGD keeps its first address
                master.grad = torch.empty_like(master)
            master.grad.copy_(parameter.grad)
        if self.clip_grad:
            if not self.apex:
                self.scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(optimizer_parameters(optimizer), self.clip_grad)
        if self.apex:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update(self.fixed_scale)
        optimizer.zero_grad()
        for parameter, master in self.masters:
            parameter.data.copy_(master.data)
            parameter.grad = None

    def fp32_state(self, model, optimizer):
        """Returns the state dict of a model in training, with the weights in fp32 also under O2."""
        state_dict = model.state_dict()
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        state_dict.update(zip(names, optimizer_parameters(optimizer)), **self.frozen)
        return state_dict

    def state_dict(self):
        return (self.apex or self.scaler).state_dict()

    def load_state_dict(self, state):
        """Loads a loss scale that is not fixed; returns False for one of another --amp-backend."""
        fits = not state or ("loss_scaler0" if self.apex else "scale") in state
        if state and fits and not self.fixed_scale:
            (self.apex or self.scaler).load_state_dict(state)
        return fits


# --- 6. Model, EMA, optimizer, schedule, loss -----------------------------------------------------

def build_model(flags, runtime, num_classes, dtype=torch.float32):
    """Returns the network on its device; ``dtype`` is what its convolutions will compute in."""
    model = getattr(mnasnet, flags.arch)(
        num_classes=num_classes, dropout=flags.dropout, bn_momentum=flags.bn_momentum,
        bn_eps=flags.bn_eps)
    model.layers.requires_grad_(flags.freeze != "features")
    if runtime.backend.name == "cpu":
        mnasnet.optimize_for_cpu(model, dtype)
    options = {"memory_format": torch.channels_last} if runtime.backend.channels_last else {}
    return model.to(runtime.device, **options)

class EMA:
    """A ``model`` of the exponential moving averages of weights and BatchNorm statistics, in fp32.
    As in TensorFlow, the decay grows to ``decay``: the initial weights are soon forgotten."""

    def __init__(self, model, decay, steps):
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.decay, self.steps, self.step, self.pairs = decay, steps, 0, []

    def track(self, state_dict):
        """Follows the tensors of a model in training."""
        self.pairs = [(average, state_dict[name]) for name, average
                      in self.model.state_dict().items() if average.is_floating_point()]

    @torch.no_grad()
    def update(self):
        """To be called after each step."""
        self.step += 1
        if self.step % self.steps == 0:
            updates = self.step // self.steps
            decay = min(self.decay, (1 + updates) / (10 + updates))
            for average, value in self.pairs:
                average.lerp_(value, 1 - decay)

class RMSpropTF(torch.optim.Optimizer):
    """RMSProp as TensorFlow computes it: epsilon is inside the root, the mean square starts at 1,
    and the learning rate is inside the momentum. (Tieleman and Hinton, 2012; the decay of 0.9 and
    the epsilon are those of TensorFlow's MnasNet.)"""

    def __init__(self, parameters, lr, momentum, weight_decay):
        super().__init__(parameters, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        for parameter in optimizer_parameters(self):
            self.state[parameter]["square_avg"] = torch.ones_like(parameter)
            self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                square = self.state[parameter]["square_avg"]
                velocity = self.state[parameter]["momentum_buffer"]
                grad = parameter.grad.add(parameter, alpha=group["weight_decay"])
                square.mul_(0.9).addcmul_(grad, grad, value=0.1)
                scale = square.add(1e-3).sqrt_()
                velocity.mul_(group["momentum"]).addcdiv_(grad, scale, value=group["lr"])
                parameter.sub_(velocity)

def parameter_groups(model, parameters, flags):
    """Returns the ``parameters`` of a model in one group for each weight decay, with their
    ``places`` in the model. As in torchvision's references, --bias-weight-decay comes first."""
    modules, groups = dict(model.named_modules()), {}
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    for place, (name, parameter) in enumerate(zip(names, parameters)):
        module, _, kind = name.rpartition(".")
        norm = isinstance(modules[module], torch.nn.BatchNorm2d)
        decays = (flags.bias_weight_decay if kind == "bias" else None,
                  flags.norm_weight_decay if norm else None, flags.wd)
        decay = next(value for value in decays if value is not None)
        group = groups.setdefault(decay, {"params": [], "places": [], "weight_decay": decay})
        group["params"].append(parameter)
        group["places"].append(place)
    return list(groups.values())

def build_optimizer(flags, runtime, precision, parameters):
    """Returns the optimizer of parameters or groups of them; SGD is Nesterov's, fused if it can."""
    backend = runtime.backend
    options = {"lr": flags.lr, "momentum": flags.momentum, "weight_decay": flags.wd}
    if flags.opt == "rmsprop":
        return RMSpropTF(parameters, **options)
    options["nesterov"] = flags.momentum > 0
    if backend.name == "npu":  # apex's is for apex's amp, torch_npu's for torch's
        module = "apex.optimizers" if precision.apex else "torch_npu.optim"
        with contextlib.suppress(ImportError, AttributeError):
            return importlib.import_module(module).NpuFusedSGD(parameters, **options)
    if backend.fused_sgd and TORCH >= backend.fused_sgd:
        options["fused"] = True
    optimizer = torch.optim.SGD(parameters, **options)
    if flags.momentum:
        # After a first step that overflows, the fused one would start from uninitialized memory.
        for parameter in optimizer_parameters(optimizer):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer

def warm_up_ddp(model, runtime, precision):
    """Runs backward twice and drops the gradients. DDP rearranges its buckets after that, and sums
    of more than two ranks round differently then: a resumed run would not be bit-identical."""
    model.eval()
    for _ in range(2):
        images = torch.zeros(1, 3, 32, 32, dtype=precision.input_dtype, device=runtime.device)
        with precision.autocast():
            model(images).sum().backward()
        model.zero_grad()

def wrap_for_training(model, flags, runtime, precision):
    """Returns the model compiled, and in DistributedDataParallel, where that is asked for."""
    if flags.compile and TORCH < (2, 0):
        raise UserError(f"--compile needs torch 2.0 or later, this is torch {torch.__version__}")
    if runtime.world_size > 1:
        # average_running_stats replaces the broadcast of the statistics in every step.
        options = {"broadcast_buffers": False,
                   "device_ids": [runtime.device.index] if runtime.module else None}
        # apex detaches gradients, Ascend's fused SGD moves them.
        if TORCH >= (1, 7) and not precision.apex and runtime.backend.name != "npu":
            options["gradient_as_bucket_view"] = True
        if TORCH >= (1, 11) and flags.accumulate == 1:
            options["static_graph"] = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = torch.nn.parallel.DistributedDataParallel(model, **options)
        if not precision.apex:  # it caches the casts of weights until its own backward
            warm_up_ddp(model, runtime, precision)
    return torch.compile(model) if flags.compile else model

def learning_rate(flags, epoch):
    """Returns the rate after ``epoch`` epochs: a linear warm-up, then half a cosine from its end to
    the last epoch, or steps of --decay-epochs, counted from the first epoch as TensorFlow does."""
    if epoch < flags.warmup:
        start = flags.lr_warmup_decay
        return flags.lr * (start + (1 - start) * epoch / flags.warmup)
    if flags.schedule == "exponential":
        return flags.lr * flags.decay_rate ** (epoch // flags.decay_epochs)
    progress = (epoch - flags.warmup) / max(1, flags.epochs - flags.warmup)
    return flags.lr * 0.5 * (1 + math.cos(math.pi * progress))

def smoothed_cross_entropy(logits, targets, smoothing):
    """Returns the mean cross entropy of logits [N, C] and targets, classes [N] or probabilities
    [N, C], in every torch alike. All classes share the fraction ``smoothing`` of a target (Szegedy
    et al., 2015, arXiv 1512.00567, section 7)."""
    log_probs = F.log_softmax(logits.float(), 1)
    if targets.dim() == 1:
        loss = F.nll_loss(log_probs, targets)
    else:
        loss = -(targets * log_probs).sum(1).mean()
    return (1 - smoothing) * loss - smoothing * log_probs.mean()

def topk_correct(logits, targets):
    """Returns how many targets [N] are the first and among the first five of logits [N, C]."""
    top = logits.topk(min(5, logits.shape[1]), 1)[1]
    correct = (top == targets.view(-1, 1)).float()
    return correct[:, 0].sum(), correct.sum()

def set_running_stats(model, stats):
    """Sets the BatchNorm statistics to a row of what ``average_running_stats`` returned."""
    buffers = [b for b in model.buffers() if b.is_floating_point()]
    for buffer, values in zip(buffers, stats.split([len(b) for b in buffers])):
        buffer.copy_(values)

def average_running_stats(model, group):
    """Gives all ranks the mean of their BatchNorm statistics, so that they are the same model.
    Returns what each rank had: float64 [world size, number of statistics]."""
    own = torch.cat([b for b in model.buffers() if b.is_floating_point()])
    stats = group.gather(own.cpu().double())
    set_running_stats(model, stats.mean(0))
    return stats


# --- 7. Checkpoints and logging -------------------------------------------------------------------

# A run's weights do not depend on these flags, or the settings below hold what they resolve to.
UNRELATED = set("""data workers max_bad pretrained weights start_epoch device_list npu world_size
    multiprocessing_distributed local_rank rank nodes node_rank dist_url dist_backend dist_timeout
    recipe output_dir resume save_freq keep evaluate print_freq tensorboard run_prof synthetic
    argv""".split())
COLUMNS = ("epoch", "lr", "train_loss", "train_acc1", "val_loss", "acc1", "acc5", "fps", "seconds",
           "data_wait")  # of metrics.csv
EMA_COLUMNS = ("ema_loss", "ema_acc1", "ema_acc5")  # with --ema
MAX_OVERFLOWS = 20  # losses in a row; 16 halvings of the initial loss scale, 65536, leave 1

def checkpoint_path(flags, age=0):
    """Returns the path of the newest checkpoint, or of the one that is ``age`` saves older."""
    return os.path.join(flags.output_dir, f"checkpoint{f'-{age}' if age else ''}.pth.tar")

def optimizer_state(optimizer):
    """Returns ``state_dict()`` on the host, parameters numbered in order (torch 1.5: addresses)."""
    states = {}
    for number, parameter in enumerate(optimizer_parameters(optimizer)):
        state = optimizer.state[parameter].items()
        states[number] = {key: value.cpu() for key, value in state if value is not None}
    group = {"lr": optimizer.param_groups[0]["lr"], "params": list(states)}
    return {"state": states, "param_groups": [group]}

def settings(run):
    """Returns the flags and other plain values that the trained weights depend on."""
    values = {name: value for name, value in vars(run.flags).items() if name not in UNRELATED}
    sampler = run.train_loader.sampler
    return dict(values, device=run.runtime.backend.name, opt_level=run.precision.level,
                seed=run.seed, batch_size=sampler.total_batch, train_images=sampler.count,
                processes=run.group.size)

def check_finite(state, name, advice):
    """Raises UserError where a tensor of the dictionary ``state`` holds NaN or infinity."""
    for key, tensor in state.items():
        if torch.is_tensor(tensor) and not torch.isfinite(tensor).all():
            raise UserError(f"{name} holds values that are not finite ({key}): {advice}")

def to_host(state_dict):
    """Replaces the tensors by contiguous copies on the host, floating point ones in fp32."""
    for name, tensor in state_dict.items():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        state_dict[name] = torch.empty(tensor.shape, dtype=dtype).copy_(tensor.detach())
    return state_dict

def snapshot(run):
    """Returns all that a resumed run needs, as tensors and plain values. All ranks take part."""
    # Each rank's own statistics and totals make a resumed run equal to the last bit.
    stats = average_running_stats(run.model, run.group)
    totals = run.group.gather(run.totals.double().cpu())
    state_dict = to_host(run.precision.fp32_state(run.model, run.optimizer))
    set_running_stats(run.model, stats[run.runtime.rank])
    check_finite(state_dict, "the model", "it is not saved. Try a lower --lr or a longer --warmup")
    checkpoint = {
        "arch": run.flags.arch, "state_dict": state_dict, "running_stats": stats,
        "optimizer": optimizer_state(run.optimizer), "amp": run.precision.state_dict(),
        "epoch": run.epoch, "images": run.images, "totals": totals,
        "best_acc1": run.best_acc1, "history": run.history, "seed": run.seed,
        "classes": run.train_loader.dataset.images.classes, "flags": settings(run),
        "torch": str(torch.__version__),
    }
    if run.ema:
        stats = average_running_stats(run.ema.model, run.group)
        checkpoint["ema"] = {"state_dict": to_host(run.ema.model.state_dict()),
                             "running_stats": stats, "step": run.ema.step}
        set_running_stats(run.ema.model, stats[run.runtime.rank])
    return checkpoint

def write_file(content, path, older=()):
    """Writes bytes to ``path`` by renaming a temporary file; the present files of ``path`` and
    ``older`` each get the next older name. Raises UserError where it fails, with none changed."""
    try:
        with contextlib.suppress(FileNotFoundError):
            os.remove(f"{path}.tmp")
        with open(f"{path}.tmp", "xb") as file:  # not through a link that is there
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for source, target in reversed(list(zip([path, *older], older))):
            if os.path.exists(source):
                os.replace(source, target)
        os.replace(f"{path}.tmp", path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")
        raise UserError(f"can't write {path}: {first_line(error)}. What was there is unchanged. "
                        "Make room, or give another folder")

def encode(checkpoint):
    """Returns the bytes of a checkpoint file."""
    content = io.BytesIO()
    # In memory, as torch 1.8 aborts where it writes to a full disk itself, and not by torch.save,
    # which some versions of torch_npu replace by one that loses strings.
    torch.serialization.save(checkpoint, content, _use_new_zipfile_serialization=True)
    return content.getvalue()

def save(run, best=False, best_ema=False):
    """Writes checkpoint.pth.tar, and before it the best models if these are the best: after a crash
    between the two, the evaluation that chose the best is done again."""
    checkpoint, folder = snapshot(run), run.flags.output_dir
    if run.runtime.rank == 0:
        content = encode(checkpoint)
        paths = [checkpoint_path(run.flags, age) for age in range(run.flags.keep)]
        if best:
            write_file(content, os.path.join(folder, "model_best.pth.tar"))
        if best_ema:
            averaged = dict(checkpoint, state_dict=checkpoint["ema"]["state_dict"])
            write_file(encode(averaged), os.path.join(folder, "model_best_ema.pth.tar"))
        write_file(content, paths[0], paths[1:])

class SafePickle:
    """In place of the pickle module where torch.load has no ``weights_only``: data, no code."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if re.fullmatch(r"collections\.OrderedDict|torch\.(Size|\w*Storage)|"
                            r"torch\._utils\._rebuild_(tensor_v2|parameter)|argparse\.Namespace",
                            f"{module}.{name}"):
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")

    load = staticmethod(lambda file, **options: SafePickle.Unpickler(file, **options).load())

def read_checkpoint(path):
    """Returns a checkpoint file as a dictionary, and never runs code from it. Raises UserError
    where it is missing, damaged, or holds more than tensors and plain values."""
    options = {"weights_only": True} if TORCH >= (1, 13) else {"pickle_module": SafePickle}
    if TORCH >= (2, 4):
        torch.serialization.add_safe_globals([argparse.Namespace])  # torchvision's and timm's flags
    try:
        with open(path, "rb") as file:
            start = file.read(2)
        if path.endswith(".safetensors"):
            return importlib.import_module("safetensors.torch").load_file(path)
        if start == b"PK" and zipfile.ZipFile(path).testzip():
            raise ValueError("a checksum does not match")
        if start != b"PK" and start[:1] != b"\x80":  # torch before 1.6 wrote a bare pickle
            raise ValueError(f"it starts with {start}, which torch.save never writes")
        return dict(torch.load(path, map_location="cpu", **options))
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"no checkpoint {path!r} ({error.strerror}): give a file that can be read")
    except Exception as error:  # damaged bytes lead to almost any
        reason = str(error).rsplit("Unpickler error: ", 1)[-1]  # after advice to load it unsafely
        code = re.search(r"GLOBAL (\S+)", reason)
        if code:
            reason = f"it could run code ({code.group(1)}): save its tensors alone, as a state_dict"
        raise UserError(f"{path} can't be read as a checkpoint: {first_line(reason)}")

def saved_flags(checkpoint):
    """Returns the flags that a checkpoint was trained with, defaults where it does not say."""
    return dict(vars(parse_args(["data"])), **checkpoint.get("flags", {}))

def adopt_flags(flags, checkpoint):
    """Returns the flags of an evaluation, those of the model from its checkpoint unless the command
    line has them, and a list of the flags that came from the checkpoint."""
    saved = dict(checkpoint.get("flags", {}))
    if checkpoint.get("arch") in mnasnet.ARCHITECTURES:  # timm's have other names
        saved["arch"] = checkpoint["arch"]
    names = ("arch", "bn_eps", "val_resize_size", "val_crop_size", "opt_level", "amp_dtype")
    words = {name: f"--{name.replace('_', '-')}={saved[name]}" for name in names
             if saved.get(name) is not None}
    adopted = parse_args([*words.values(), *flags.argv])  # of a flag that comes twice, the last
    return adopted, [word for name, word in words.items()
                     if getattr(adopted, name) != getattr(flags, name)]

def find_checkpoint(flags):
    """Returns the checkpoint that --resume asks for, and its path; ({}, None) for none."""
    if flags.resume != "auto":
        return (read_checkpoint(flags.resume), flags.resume) if flags.resume else ({}, None)
    paths = list(filter(os.path.exists, (checkpoint_path(flags, age) for age in range(100))))
    for path in paths:
        try:
            return read_checkpoint(path), path
        except UserError as error:
            print(f"=> {error}; trying the one before", file=sys.stderr, flush=True)
    if paths:
        raise UserError(f"--resume auto: none of {', '.join(paths)} can be used: remove them to "
                        "start from scratch")
    if flags.evaluate and not flags.pretrained:
        raise UserError(f"--resume auto: no checkpoint in {flags.output_dir!r} to evaluate")
    return {}, None

@contextlib.contextmanager
def loading(path):
    """Raises UserError for the errors that unexpected values in the file ``path`` lead to."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(f"{path} does not hold what a checkpoint of main.py holds "
                        f"({type(error).__name__}: {first_line(error)}): give another file")

def find_state(checkpoint, path):
    """Returns the state dict of a checkpoint of any trainer of MnasNet, under the model's names.
    Raises UserError where it holds none, or values that are not finite."""
    state = checkpoint.get("state_dict", checkpoint.get("model", checkpoint))
    items = state.items() if isinstance(state, dict) else ()
    # DistributedDataParallel and torch.compile put these before each name.
    state = {re.sub(r"^(module\.|_orig_mod\.)+", "", str(name)): value for name, value in items}
    if "conv_stem.weight" in state:
        state = mnasnet.rename_from_timm(state)
    if not torch.is_tensor(state.get("classifier.1.weight")):
        raise UserError(f"{path} is not a MnasNet checkpoint: it has no classifier.1.weight")
    check_finite(state, path, "give another file")
    return state

def load_weights(model, checkpoint, path, classes, new_classifier=False):
    """Loads a checkpoint's state dict; ``new_classifier`` keeps the model's own where the classes
    differ. Returns a note for the log. Raises UserError where model or classes do not fit."""
    state, note = find_state(checkpoint, path), ""
    count = len(state["classifier.1.weight"])
    if count != model.num_classes or checkpoint.get("classes", classes) != classes:
        found = f"{count} {'other ' if count == model.num_classes else ''}classes"
        if not new_classifier:
            raise UserError(f"{path} was trained on {found}, the data has {model.num_classes}: "
                            "give the same data, or fine-tune by --pretrained --weights")
        note = f": {found} there, {model.num_classes} here, the classifier is re-initialised"
        state.update(model.classifier.state_dict(prefix="classifier."))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()[:200]
        raise UserError(f"{path} does not fit MnasNet-{model.variant}, alpha {model.alpha} "
                        f"({reason}): give the -a it was trained with, "
                        f"{checkpoint.get('arch', 'unknown')}")
    return note

def load_pretrained(model, flags, classes):
    """Loads torchvision's published weights, or those of --weights; returns a line for the log."""
    source = flags.weights or mnasnet.WEIGHTS.get(flags.arch)
    if not source:
        raise UserError(f"torchvision publishes no weights of {flags.arch}: give --weights FILE")
    if flags.weights:
        checkpoint = read_checkpoint(source)
    else:
        options = {"weights_only": True} if TORCH >= (2, 6) else {}
        try:
            checkpoint = torch.hub.load_state_dict_from_url(
                source, map_location="cpu", progress=False, check_hash=True, **options)
        except Exception as error:  # a damaged file in the cache leads to almost any
            raise UserError(f"can't download {source} ({first_line(error)}): give --weights FILE")
    note = load_weights(model, checkpoint, source, classes, new_classifier=not flags.evaluate)
    bn_eps = checkpoint.get("flags", {}).get("bn_eps", flags.bn_eps)
    if bn_eps != flags.bn_eps:
        note += f"; they were trained with --bn-eps {bn_eps}, now {flags.bn_eps}"
    return f"=> weights of {source}{note}"

def load_optimizer_state(optimizer, saved):
    """Copies each parameter's state, in order, and the learning rate, but no options (fused depends
    on the device). Raises ValueError where the number, a name or a shape differs."""
    names = [name for group in saved["param_groups"] for name in group["params"]]
    parameters = optimizer_parameters(optimizer)
    if len(names) != len(parameters):
        raise ValueError(f"it has {len(names)} parameters, expected {len(parameters)}")
    for group in optimizer.param_groups:
        group["lr"] = saved["param_groups"][0]["lr"]
    for name, parameter in zip(names, parameters):
        state, saved_state = optimizer.state[parameter], saved["state"].get(name, {})
        for key, value in saved_state.items():
            if value is None:  # without momentum
                continue
            if value.shape != parameter.shape or (state and set(state) != set(saved_state)):
                raise ValueError(f"it has {key} of {value.shape}, expected "
                                 f"{', '.join(state) or key} of {parameter.shape}")
            # In the parameter's order in memory, which a fused optimizer needs.
            state[key] = torch.empty_like(parameter).copy_(value)

def write_metrics(run):
    """Writes metrics.csv, a row for each epoch, and to TensorBoard the last evaluation."""
    columns = COLUMNS + (EMA_COLUMNS if run.ema else ())
    rows = [dict(dict.fromkeys(EMA_COLUMNS, math.nan), **row) for row in run.history]
    lines = [columns] + [[f"{row[name]:.6g}" for name in columns] for row in rows]
    content = "".join(",".join(line) + "\n" for line in lines).encode()
    write_file(content, os.path.join(run.flags.output_dir, "metrics.csv"))
    if run.tensorboard:
        row = run.history[-1]
        for name in ("val_loss", "acc1", "acc5", *(EMA_COLUMNS if run.ema else ())):
            run.tensorboard.add_scalar(f"val/{name.replace('val_', '')}", row[name], row["epoch"])
        run.tensorboard.flush()

def restore_ranks(run, checkpoint):
    """Restores what each rank had of its own, or an equal part where their number has changed."""
    totals, ema = checkpoint["totals"], checkpoint.get("ema")
    rank, same = run.runtime.rank, len(totals) == run.group.size
    restored = [(run.model, checkpoint["running_stats"])]
    if run.ema and ema:
        run.ema.model.load_state_dict(ema["state_dict"])
        run.ema.step = int(ema["step"])
        restored.append((run.ema.model, ema["running_stats"]))
    for model, stats in restored:
        set_running_stats(model, stats[rank] if same else stats.mean(0))
    if totals.shape[1] == len(run.totals):  # else of an earlier version
        run.totals.copy_(totals[rank] if same else totals.sum(0) / run.group.size)
    saved = saved_flags(checkpoint)
    changes = [f"{name.replace('_', ' ')} {saved.get(name)}, now {value}"
               for name, value in settings(run).items() if saved.get(name) != value]
    if changes:
        run.log("=> no longer bit-identical to an uninterrupted run: it had " + "; ".join(changes))

def restore(run, checkpoint, path):
    """Resumes from a checkpoint; one of Ascend's reference implementation has less to restore."""
    if "optimizer" in checkpoint:
        load_optimizer_state(run.optimizer, checkpoint["optimizer"])
    if not run.precision.load_state_dict(checkpoint.get("amp")):
        run.log(f"=> the loss scale of {path} is of another --amp-backend: it is re-initialised")
    run.epoch = int(checkpoint.get("epoch", run.epoch))
    run.images = int(checkpoint.get("images", 0))
    run.best_acc1 = float(checkpoint.get("best_acc1", 0))
    run.history = list(checkpoint.get("history", ()))
    if run.images > run.train_loader.sampler.count:
        raise UserError(f"{path} is {run.images} images into an epoch, and the data has fewer: "
                        "give the data it was trained on")
    run.log(f"=> resumed from {path}: epoch {run.epoch}, {run.images} images into it")
    if "running_stats" in checkpoint:  # not in those of the reference implementation
        restore_ranks(run, checkpoint)

@contextlib.contextmanager
def lock_folder(path):
    """Makes a folder and holds it for this run alone; raises UserError where that is impossible."""
    try:
        os.makedirs(path, exist_ok=True)
        folder = os.open(path, os.O_RDONLY)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise UserError(f"can't use --output-dir {path!r}: {error.strerror}")
    try:
        for _ in range(100):  # the processes of a killed run may need seconds to end
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            time.sleep(0.1)
        else:
            raise UserError(f"another run writes to {path!r}: give another --output-dir")
        yield
    finally:
        fcntl.flock(folder, fcntl.LOCK_UN)  # loaders have inherited it
        os.close(folder)

def set_results_aside(run):
    """Moves what an earlier run left in --output-dir into a folder of its own there."""
    root = run.flags.output_dir
    results = (r"(checkpoint(-\d+)?|model_best(_ema)?)\.pth\.tar|"
               r"metrics\.csv|args\.json|bad_images\.txt")
    names = [name for name in os.listdir(root) if re.fullmatch(results, name)]
    if set(names) - {"args.json", "bad_images.txt"}:  # those of a run that was stopped early
        folder = tempfile.mkdtemp(dir=root, prefix=time.strftime("previous-%Y%m%d-%H%M%S-"))
        os.chmod(folder, os.stat(root).st_mode & 0o777)
        for name in names:
            os.replace(os.path.join(root, name), os.path.join(folder, name))
        run.log(f"=> the results of an earlier run are now in {folder}")

def prepare_folder(run, path):
    """Writes what the run that resumes from ``path``, or None, knows at its start: args.json, with
    all flags and what they resolved to, and metrics.csv."""
    folder = run.flags.output_dir
    if not path or not os.path.samefile(os.path.dirname(path) or ".", folder):
        set_results_aside(run)
    values = dict(vars(run.flags), **settings(run), torch=str(torch.__version__))
    write_file(json.dumps(values, indent=1).encode(), os.path.join(folder, "args.json"))
    if run.history:
        with loading(path):
            write_metrics(run)

def report_unreadable(flags, images, unreadable, total):
    """Adds a step's ``unreadable``, (index, reason), to the log and bad_images.txt, once each.
    Raises UserError where ``total``, of this pass and all ranks, is more than --max-bad."""
    listed = os.path.join(flags.output_dir, "bad_images.txt")
    for index, reason in unreadable:
        name = repr(images.path(index))[1:-1]  # on one line
        try:
            file = os.open(listed, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
            with open(file, "r+", encoding="utf-8", errors="replace") as lines:
                if name in {line.split("\t")[0] for line in lines}:
                    continue
                lines.write(f"{name}\t{reason}\n")
        except OSError as error:
            if not flags.evaluate:  # which writes nothing else
                raise UserError(f"can't write {listed}: {first_line(error)}")
        print(f"=> can't read {name}: {reason}", flush=True)
    limit = max(10, len(images) // 1000) if flags.max_bad is None else flags.max_bad
    if total > limit:
        raise UserError(f"{total} images can't be read, more than --max-bad {limit}: see {listed}")

class EpochMeter:
    """The figures of an epoch. Those of the steps stay on the device until they are printed."""

    def __init__(self, run, steps):
        self.run, self.steps, self.sampler = run, steps, run.train_loader.sampler
        # Left out of the throughput: compilation and caches are not steady yet.
        self.warm_up_steps = 0 if run.steady_images else min(5, len(self.sampler) // 2)
        self.begin, self.steps_done, self.data_time = time.monotonic(), 0, 0.0
        self.last_line = self.warm_up_end = np.zeros(3)  # what read() returned at these times
        self.first_weights = optimizer_parameters(run.optimizer)[-1].detach().clone()

    def read(self):
        """Returns the steps, the seconds and the seconds of waiting for images up to now."""
        return np.array([self.steps_done, time.monotonic() - self.begin, self.data_time])

    def update(self, loss, logits, targets):
        """Adds a step to the run's totals, on the device: loss, over images; images of finite loss;
        top 1; top 5; images; and losses that were not finite, in a row that may span epochs."""
        totals, count, finite = self.run.totals, len(targets), torch.isfinite(loss)
        self.figures = torch.stack((loss, *topk_correct(logits, targets)))
        totals[0] += count * loss.masked_fill(~finite, 0)
        totals[1] += count * finite.float()
        totals[2:4] += self.figures[1:]
        totals[4] += count
        totals[5] = (totals[5] + 1).masked_fill(finite, 0)
        self.steps_done += 1
        if self.steps_done == self.warm_up_steps:
            self.run.runtime.synchronize()
            self.warm_up_end = self.read()

    def check_loss(self, step):
        """Raises UserError where losses are not finite; a loss scale allows some of them."""
        run, count = self.run, self.run.totals[5].item()
        if count >= (MAX_OVERFLOWS if run.precision.uses_loss_scale else 1):
            lr = run.optimizer.param_groups[0]["lr"]
            raise UserError(
                f"the loss is {self.figures[0]} at epoch {run.epoch} step {step} (lr {lr:.6g}), "
                f"not finite for {count:.0f} steps. Try a lower --lr or a longer --warmup")

    def print_step(self, step):
        """Prints this rank's last step, and the times of all since the last line."""
        run, now, total = self.run, self.read(), self.sampler.total_batch
        steps, seconds, waiting = now - self.last_line
        self.last_line = now
        steady = now - self.warm_up_end if self.steps_done > self.warm_up_steps else now
        step_time = steady[1] / steady[0]
        epochs_left = run.flags.epochs - run.epoch
        steps_left = self.steps * epochs_left - step - 1
        time_left = steps_left * step_time + epochs_left * run.evaluation_seconds
        loss, top1, _ = self.figures.tolist()
        acc1, fps = 100 * top1 / self.sampler.batch_size, total * steps / seconds
        lr = run.optimizer.param_groups[0]["lr"]
        run.log(f"Epoch: [{run.epoch}][{step:{len(str(self.steps))}d}/{self.steps}]\t"
                f"Time {seconds / steps:.3f}\tData {waiting / steps:.3f}\tLoss {loss:.4f}\t"
                f"Acc@1 {acc1:.2f}\tLR {lr:.4g}\tETA {datetime.timedelta(seconds=int(time_left))}\t"
                f"FPS {fps:.2f} ( {total / step_time:.2f} )")
        if run.tensorboard:
            for name, value in (("loss", loss), ("acc1", acc1), ("lr", lr), ("fps", fps)):
                run.tensorboard.add_scalar(f"train/{name}", value, run.epoch * self.steps + step)

    def summarize(self):
        """Returns the epoch's part of a row of metrics.csv, over all ranks."""
        run = self.run
        run.runtime.synchronize()
        if (run.precision.uses_loss_scale and len(self.sampler) >= MAX_OVERFLOWS and run.flags.lr
                and torch.equal(optimizer_parameters(run.optimizer)[-1], self.first_weights)):
            raise UserError(f"no step of epoch {run.epoch} has changed the weights: all gradients "
                            f"overflow at --loss-scale {run.flags.loss_scale}. Try a lower one")
        now = self.read()
        steps, steady_seconds, _ = (now - self.warm_up_end).tolist()
        images = int(steps) * self.sampler.total_batch
        run.steady_images += images
        run.steady_seconds += steady_seconds
        _, seconds, data_time = now.tolist()
        sums = run.group.sum(run.totals.tolist() + [data_time / seconds / run.group.size])
        loss, finite, top1, _, seen, _, data_wait = sums
        if data_wait > 0.1:
            run.log(f"=> {100 * data_wait:.0f} % of epoch {run.epoch} was spent waiting "
                    f"for images: raise --workers (now {run.train_loader.num_workers}), or use "
                    "more or faster cores")
        return {"train_loss": loss / max(1, finite), "train_acc1": 100 * top1 / seen,
                "fps": images / steady_seconds, "data_wait": data_wait, "seconds": seconds}


# --- 8. Training ----------------------------------------------------------------------------------

@dataclass
class Run:
    """The parts of a run that the functions below share."""

    flags: argparse.Namespace
    runtime: Runtime
    group: ProcessGroup
    precision: Precision
    model: torch.nn.Module
    val_loader: torch.utils.data.DataLoader
    seed: int
    train_loader: torch.utils.data.DataLoader = None
    train_model: torch.nn.Module = None  # the model, wrapped for training
    optimizer: torch.optim.Optimizer = None
    ema: EMA = None
    tensorboard: object = None
    epoch: int = 0
    images: int = 0  # of this epoch so far, over all ranks
    totals: torch.Tensor = None  # of this epoch and rank, on the device, see EpochMeter.update
    best_acc1: float = 0.0
    history: list = field(default_factory=list)  # the rows of metrics.csv
    steady_images: int = 0  # for the throughput: without warm-up, since this start of the run
    steady_seconds: float = 0.0
    evaluation_seconds: float = 0.0  # of the last one, for the remaining time

    def log(self, text):
        """Prints a line; only rank 0 does."""
        try:
            if self.runtime.rank == 0:
                print(text, flush=True)
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # else Python fails once more at exit
            raise UserError(f"can't write to stdout: {error.strerror}")

def seed_step(run):
    """Seeds dropout, and returns a Random, from (seed, epoch, images, rank): a resumed run draws
    the same, with no generator state in its checkpoint."""
    entropy = (run.seed, run.epoch, run.images, run.runtime.rank)
    draw = int(np.random.SeedSequence(entropy).generate_state(1)[0])
    (run.runtime.module or torch.default_generator).manual_seed(draw)  # not of all devices: slow
    return random.Random(draw)

def train_step(run, images, targets):
    """Takes one optimizer step on images [n, 3, S, S] and targets, [n] or probabilities [n, C];
    returns loss and logits, detached, on the device: nothing here waits for it."""
    losses, outputs = [], []
    no_sync = getattr(run.train_model, "no_sync", contextlib.nullcontext)  # DDP alone has it
    parts = list(zip(images.chunk(run.flags.accumulate), targets.chunk(run.flags.accumulate)))
    for number, (part, part_targets) in enumerate(parts, 1):
        last = number == len(parts)
        with contextlib.nullcontext() if last else no_sync():
            with run.precision.autocast():
                logits = run.train_model(part)
                loss = smoothed_cross_entropy(logits, part_targets, run.flags.label_smoothing)
                loss = loss * (len(part) / len(images))
            run.precision.backward(loss, run.optimizer, last)
        losses.append(loss.detach())
        outputs.append(logits.detach())
    run.precision.step(run.optimizer)
    if run.ema:
        run.ema.update()
    return torch.stack(losses).sum(), torch.cat(outputs)

def train_epoch(run):
    """Trains the rest of the epoch; returns its part of a row of metrics.csv. Raises Stopped where
    a signal has come, UserError where the loss is not finite or too many images are unreadable."""
    flags, sampler = run.flags, run.train_loader.sampler
    sampler.epoch, sampler.first_image = run.epoch, run.images
    first, bad = run.images // sampler.total_batch, 0
    steps = first + len(sampler)
    run.model.train(flags.freeze == "none")
    run.model.classifier.train()  # dropout
    meter = EpochMeter(run, steps)
    batches = prefetch(run.train_loader, run.runtime, run.precision.input_dtype)
    for step in range(first, steps):
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(flags, run.epoch + step / steps)
        begin = time.monotonic()
        run.group.waiting = True
        images, targets, unreadable = next(batches)
        run.group.waiting = False
        meter.data_time += time.monotonic() - begin
        # After next(batches): a DataLoader draws from the same generator when it starts.
        rng = seed_step(run)
        mixed = mix_batch(images, targets, run.model.num_classes, flags, rng)
        loss, logits = train_step(run, *mixed)
        meter.update(loss, logits, targets)
        run.images += sampler.total_batch

        signum, total = run.group.sync_step(len(unreadable), last=step == steps - 1)
        bad += total
        report_unreadable(flags, run.train_loader.dataset.images, unreadable, bad)
        due = flags.save_freq and (run.epoch * steps + step + 1) % flags.save_freq == 0
        if signum or due or step % flags.print_freq == 0 or step == steps - 1:
            meter.check_loss(step)
        if step % flags.print_freq == 0:
            meter.print_step(step)
        if signum:
            raise Stopped(signum)
        if due:
            save(run)
    return meter.summarize()

def evaluate(run, model):
    """Evaluates a model on every validation image once; an unreadable one counts as wrong. Returns
    the loss (cross entropy, no label smoothing), Acc@1 and Acc@5 in percent, and images per second.
    Raises Stopped where a signal has come; the next start evaluates again."""
    flags, sampler = run.flags, run.val_loader.sampler
    model.eval()
    if run.runtime.backend.name == "cpu":
        model = mnasnet.fold_batchnorm(model)
    no_grad = torch.no_grad if TORCH < (1, 9) else torch.inference_mode
    totals = torch.zeros(3, device=run.runtime.device)  # loss, top 1, top 5
    seen = own_bad = bad = 0  # images of this rank, and unreadable ones of it and of all ranks
    begin = time.monotonic()
    batches = prefetch(run.val_loader, run.runtime, run.precision.input_dtype)
    for step in range(len(sampler)):
        run.group.waiting = True
        images, targets, unreadable = next(batches, (None, (), ()))
        run.group.waiting = False
        if len(targets):
            with no_grad(), run.precision.autocast():
                logits = model(images).float()
                loss = F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
                totals += torch.stack((loss, *topk_correct(logits, targets)))
        seen += len(targets)
        own_bad += len(unreadable)
        signum, total = run.group.sync_step(len(unreadable), last=step == len(sampler) - 1)
        bad += total
        report_unreadable(flags, run.val_loader.dataset.images, unreadable, bad)
        if signum:
            raise Stopped(signum)
        if step % flags.print_freq == 0 and seen:
            loss, top1, top5 = totals.tolist()
            run.log(f"Test: [{step:{len(str(len(sampler)))}d}/{len(sampler)}]\t"
                    f"Time {(time.monotonic() - begin) / (step + 1):6.3f}\t"
                    f"Loss {loss / max(1, seen - own_bad):.4e}\t"
                    f"Acc@1 {100 * top1 / seen:6.2f}\tAcc@5 {100 * top5 / seen:6.2f}")
    loss, top1, top5, seen = run.group.sum(totals.tolist() + [seen])
    if seen != sampler.count:
        raise UserError(f"evaluated {seen:.0f} images of {sampler.count}: please report this bug")
    acc1, acc5 = 100 * top1 / seen, 100 * top5 / seen
    run.log(f" * Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} "
            f"({top1:.0f} and {top5:.0f} of {seen:.0f} images)")
    if not math.isfinite(loss) and flags.evaluate:
        raise UserError(f"the loss is {loss}: the accuracy of such a model means nothing")
    return loss / max(1, seen - bad), acc1, acc5, seen / (time.monotonic() - begin)

def print_result(run, acc1, acc5, fps, loss):
    """Prints the line that the launch scripts read."""
    run.log(f"Result: Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} images/sec {fps:.2f} loss {loss:.4f}")

def train(run):
    """Trains the epochs that are left; after each it evaluates and saves."""
    while run.epoch < run.flags.epochs:
        try:
            row = train_epoch(run)
            average_running_stats(run.model, run.group)
            begin = time.monotonic()
            if run.ema:
                average_running_stats(run.ema.model, run.group)
                averaged = run.precision.convert(copy.deepcopy(run.ema.model))
                run.log("=> EMA:")
                row["ema_loss"], row["ema_acc1"], row["ema_acc5"], _ = evaluate(run, averaged)
            row["val_loss"], row["acc1"], row["acc5"], _ = evaluate(run, run.model)
            run.evaluation_seconds = time.monotonic() - begin
        except Stopped:
            run.group.ended.set()  # however long it takes to save
            save(run)
            raise
        row.update(epoch=run.epoch, lr=learning_rate(run.flags, run.epoch))
        best = row["acc1"] > run.best_acc1 or not run.history
        best_ema = run.ema and all(row["ema_acc1"] > old.get("ema_acc1", -1) for old in run.history)
        run.best_acc1 = max(row["acc1"], run.best_acc1)
        run.history = run.history + [row]
        run.epoch, run.images = run.epoch + 1, 0
        run.totals[:5].zero_()
        save(run, best, best_ema)
        if run.runtime.rank == 0:
            write_metrics(run)
        run.log(f"=> epoch {row['epoch']}: {row['seconds']:.1f} s, train loss "
                f"{row['train_loss']:.4f} Acc@1 {row['train_acc1']:.2f}, val loss "
                f"{row['val_loss']:.4f} Acc@1 {row['acc1']:.2f} (best {run.best_acc1:.2f}), "
                f"FPS {row['fps']:.2f} ( {row['fps']:.2f} )")  # twice: the form of print_step
    if not run.history:
        raise UserError(f"next epoch {run.epoch}, --epochs {run.flags.epochs}: nothing to do")
    best = max(run.history, key=lambda row: row["acc1"])
    fps = next((row["fps"] for row in reversed(run.history) if row["fps"]), 0.0)
    if run.steady_images:  # else only an evaluation was left
        fps = run.steady_images / run.steady_seconds
    print_result(run, best["acc1"], best["acc5"], fps, run.history[-1]["train_loss"])

def profiler_options(device):
    """Returns what makes torch.autograd.profiler.profile record the kernels of a device type."""
    if device == "cpu":
        return {}
    if TORCH < (2, 1):
        return {f"use_{device}": True}
    return {"use_device": device, "use_kineto": device == "cuda"}  # which traces CUDA's kernels

def profile(run):
    """Profiles a few training steps: trace.json in --output-dir, the top operators on stdout."""
    warm_up, steps, device = 3, 5, run.runtime.backend.type
    if len(run.train_loader.sampler) < warm_up + steps:
        raise UserError(f"--run-prof needs data for {warm_up + steps} steps: lower --batch-size")
    batches = prefetch(run.train_loader, run.runtime, run.precision.input_dtype)
    run.model.train()
    profilers, options = torch.autograd.profiler, profiler_options(device)
    if device == "npu" and hasattr(sys.modules.get("torch_npu"), "profiler"):
        profilers, options = sys.modules["torch_npu"].profiler, {}  # which knows CANN's kernels
    for _ in range(warm_up):
        train_step(run, *next(batches)[:2])
    run.runtime.synchronize()
    with profilers.profile(**options) as profiler:
        for _ in range(steps):
            train_step(run, *next(batches)[:2])
        run.runtime.synchronize()
    if run.runtime.rank == 0:
        path = os.path.join(run.flags.output_dir, "trace.json")
        profiler.export_chrome_trace(path)
        order = "cuda_time_total" if device == "cuda" else "self_cpu_time_total"
        if hasattr(profiler, "key_averages"):  # torch_npu's makes no table
            print(profiler.key_averages().table(sort_by=order, row_limit=10))
        print(f"=> {steps} steps profiled; open {path} in chrome://tracing", flush=True)


# --- 9. Entry -------------------------------------------------------------------------------------

def agree_on_seed(flags, group, seed, data):
    """Returns rank 0's seed. Raises UserError where the ranks differ in flags or ``data``."""
    names = sorted(set(vars(flags)) - UNRELATED - {"device", "seed"})
    described = repr([data] + [getattr(flags, name) for name in names])
    seeds, sums = group.gather(torch.tensor([seed, zlib.crc32(described.encode())])).t().tolist()
    if len(set(sums)) > 1:
        raise UserError("the ranks differ in flags, data or checkpoint: start all with the same")
    return seeds[0]

def seed_everything(seed, deterministic):
    """Seeds torch; its operators also become deterministic where the user gave the seed."""
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = deterministic
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic and TORCH >= (1, 8):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if deterministic and TORCH >= (2, 2):
        torch.utils.deterministic.fill_uninitialized_memory = False  # no such memory is read here

def open_tensorboard(folder):
    try:
        from torch.utils.tensorboard import SummaryWriter
        return SummaryWriter(folder)
    except ImportError:
        raise UserError("--tensorboard needs its package: pip install tensorboard")
    except OSError as error:
        raise UserError(f"can't write to --tensorboard {folder!r}: {error.strerror}")

def build_run(flags, runtime, group, notes, checkpoint, path):
    """Returns a run with its loaders and its model, loaded from ``checkpoint`` or --pretrained."""
    train_images, val_images = open_images(flags)
    classes = val_images.classes
    with loading(path):
        drawn = int(checkpoint.get("seed", random.SystemRandom().randrange(2 ** 31)))
    seed = agree_on_seed(flags, group, drawn if flags.seed is None else flags.seed,
                         (classes, len(val_images), len(train_images or ()),
                          checkpoint.get("epoch"), checkpoint.get("images")))
    seed_everything(seed, deterministic=flags.seed is not None)
    precision = Precision(flags, runtime)
    batch_size = flags.batch_size // runtime.local_size
    cores = min(MAX_LOADERS, cores_per_process(runtime.local_size))
    workers = cores if flags.workers is None else flags.workers
    total, available = batch_size * runtime.world_size, len(train_images or val_images)
    if total < 1 or (train_images and total > available):
        raise UserError(f"--batch-size {flags.batch_size} gives steps of {total} images: expected "
                        f"at least one per process, and at most the {available} of the data")
    if flags.lr_base_size:
        flags.lr *= total / flags.lr_base_size
    model = build_model(flags, runtime, len(classes), precision.conv_dtype)
    val_loader = make_loader(val_images, flags, runtime, batch_size, workers)
    run = Run(flags, runtime, group, precision, model, val_loader, seed, epoch=flags.start_epoch,
              totals=torch.zeros(6, device=runtime.device))
    run.log(f"=> {flags.arch} on {runtime.device}{notes}, {group.size} process(es) with batch size "
            f"{batch_size}, {workers} worker(s) each, {precision}, seed {seed}")
    if flags.recipe:
        values = (f"{name}={getattr(flags, name)}" for name in RECIPES[flags.recipe])
        run.log(textwrap.fill(f"=> recipe {flags.recipe}: {', '.join(values)}", 100))
    if flags.synthetic and flags.data:
        run.log(f"=> --synthetic: {flags.data} is not read")
    with loading(path or flags.weights or flags.arch):
        if path:
            load_weights(model, checkpoint, path, classes)
        elif flags.pretrained:
            run.log(load_pretrained(model, flags, classes))
    if path and flags.pretrained:
        run.log(f"=> --resume {path} wins over --pretrained")
    if train_images:
        run.ema = EMA(model, flags.ema, flags.ema_steps) if flags.ema else None
        run.train_loader = make_loader(train_images, flags, runtime, batch_size, workers, seed)
    if flags.tensorboard and runtime.rank == 0:
        run.tensorboard = open_tensorboard(flags.tensorboard)
    return run

def prepare_training(run):
    """Gives a run its optimizer, and its model as training wants it."""
    parameters = run.precision.prepare(run.model)
    groups = parameter_groups(run.model, parameters, run.flags)
    optimizer = build_optimizer(run.flags, run.runtime, run.precision, groups)
    run.model, run.optimizer = run.precision.initialize(run.model, optimizer)
    if run.ema:
        run.ema.track(run.precision.fp32_state(run.model, run.optimizer))
    run.train_model = wrap_for_training(run.model, run.flags, run.runtime, run.precision)

def run_training(flags, runtime, group, notes):
    """Trains, evaluates or profiles."""
    locks = runtime.rank == 0 and not flags.evaluate  # another node may not have the folder
    with lock_folder(flags.output_dir) if locks else contextlib.nullcontext():
        group.gather(torch.zeros(1))  # the run that held the folder has saved its checkpoint
        checkpoint, path = find_checkpoint(flags)
        source = path or flags.weights
        if flags.evaluate and source:
            with loading(source):
                flags, taken = adopt_flags(flags, checkpoint if path else read_checkpoint(source))
            notes += f", with {' '.join(taken)} of {source}" if taken else ""
        run = build_run(flags, runtime, group, notes, checkpoint, path)
        if flags.evaluate:
            run.model, _ = run.precision.initialize(run.precision.convert(run.model))
            with group.handle_signals(None):
                loss, acc1, acc5, fps = evaluate(run, run.model)
            return print_result(run, acc1, acc5, fps, loss)
        prepare_training(run)
        if path:
            with loading(path):
                restore(run, checkpoint, path)
        if runtime.rank == 0 and not flags.run_prof:
            prepare_folder(run, path)
        with group.handle_signals(checkpoint_path(flags)):
            return profile(run) if flags.run_prof else train(run)

def main_worker(flags, backend, notes):
    """Runs one process, from its device to its exit status."""
    runtime = open_device(flags, backend)
    group = ProcessGroup(flags, runtime)
    try:
        run_training(flags, runtime, group, notes)
        status = 128 + group.signal if group.signal else 0  # one that came too late to stop it
    except Stopped as stopped:
        signum = stopped.args[0]
        status = 128 + signum
        end_loaders()
        if runtime.rank == 0:
            saved = "" if flags.evaluate else ", saved; --resume auto continues from here"
            print(f"=> {signal.Signals(signum).name}: stopped{saved}", file=sys.stderr, flush=True)
    except Exception as error:
        status = 1
        end_loaders()  # torch waits for one that hangs
        # An iterator that is half made complains when it is deleted; Python 3.7 lacks the hook.
        sys.unraisablehook = lambda unraisable: None
        torch.utils.data.dataloader._MultiProcessingDataLoaderIter._shutdown = True
        text = str(error) if isinstance(error, UserError) else group.describe(error)
        if text:
            group.report(text)
        else:
            traceback.print_exc()
    if group.size > 1:
        if status == 0:
            atexit._run_exitfuncs()
        sys.stdout.flush()
        os._exit(status)  # torch would wait for ranks that are gone, or abort in its own threads
    return status

def main(argv=None):
    """Runs a command line and returns the exit status."""
    flags = parse_args(argv)
    try:
        if sys.stdout is None:  # the next file that is opened would receive what C code prints
            raise UserError("stdout is closed: send it to a file or to /dev/null")
        if hasattr(sys.stdout, "reconfigure"):  # not in a notebook
            sys.stdout.reconfigure(errors="backslashreplace")  # for names that its encoding lacks
        backend, notes = select_backend(flags)
        if flags.multiprocessing_distributed:
            flags.device_list = select_cards(flags, backend)
            if flags.local_rank is None:
                open_images(flags)  # one message for a mistake, before starting the processes
                return launch(flags, backend)
        return main_worker(flags, backend, notes)
    except (UserError, OSError) as error:
        print_error(error)
        return 1

if __name__ == "__main__":
    sys.exit(main())
