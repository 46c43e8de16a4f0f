"""Trains MnasNet on ImageNet, or on any folder of images, on Ascend NPUs, NVIDIA GPUs or the CPU.

1 card       python main.py /data/imagenet --device gpu
8 cards      python main.py /data/imagenet --device npu --multiprocessing-distributed --device-list 0,1,2,3,4,5,6,7
one of 8     python main.py /data/imagenet --multiprocessing-distributed --device-list 0,1,2,3,4,5,6,7 --local_rank 3
torchrun     torchrun --nproc_per_node 8 main.py /data/imagenet
2 nodes      python main.py ... --world-size 2 --rank 0 --dist-url tcp://node0:29500   (and --rank 1 on the other)
CPU          python main.py /data/imagenet --device cpu -b 64
evaluate     python main.py /data/imagenet -e --resume model_best.pth.tar
benchmark    python main.py --synthetic 5120 --epochs 1 -b 512

It leaves checkpoint.pth.tar, model_best.pth.tar and metrics.csv in --output-dir, and ends with status 0; with 1 after
an error, 2 for a command line that can't be; and with 143, 138 or 130 when SIGTERM, SIGUSR1 or Ctrl-C ended it, after
saving where it was. ``--resume auto`` goes on from there.
"""

import argparse
import contextlib
import copy
import ctypes
import datetime
import fcntl
import functools
import importlib
import inspect
import io
import math
import multiprocessing
import os
import pickle
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import OrderedDict
from dataclasses import dataclass, field

# torch 2.5 and later import torch_npu by themselves, which fails where CANN is missing. cards_present() imports it.
os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image

import mnasnet

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Fault(Exception):
    """What a user can put right: one line that says what was found, what was expected and what to do."""


# ---------------------------------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------------------------------


class Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        told = "(default" in action.help or action.default in (None, False, "")
        return action.help if told else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f"main.py: error: {message} (--help lists every flag)\n")


def number(kind, low, high=math.inf, above=False):
    """An argparse type: an int or float of at least ``low`` (``above``: more than it) and at most ``high``."""

    def convert(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if (low < value if above else low <= value) and value <= high and value < math.inf:
                return value
        what, bound = "a whole number" if kind is int else "a number", "above" if above else "of at least"
        most = "" if high == math.inf else f" and at most {high}"
        raise argparse.ArgumentTypeError(f"found {text!r}, expected {what} {bound} {low}{most}")

    return convert


def cards(text):
    """An argparse type: '0,1,3' as a list of different card numbers."""
    numbers = text.split(",") if text else []
    if not all(n.strip().isdigit() for n in numbers) or len({int(n) for n in numbers}) < len(numbers):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected different card numbers such as 0,1,2,3")
    return [int(n) for n in numbers]


def parse_args(argv=None):
    """The flags as a namespace; ends the program with status 2 and one line where a value can't be."""
    count, fraction = functools.partial(number, int), functools.partial(number, float)
    parser = Parser(description="Trains MnasNet.", formatter_class=Help)
    add = parser.add_argument_group("data").add_argument
    add("data", nargs="?", metavar="DIR", help="folder with train/ and val/, each with one folder a class")
    add("--synthetic", type=count(1), metavar="N", help="train and evaluate on N generated images instead")
    add("-j", "--workers", type=count(0), metavar="N",
        help="loader processes a training process (default: its share of the cores)")
    add("--train-crop-size", type=count(32), default=224, metavar="PX", help="side of a training crop")
    add("--train-crop-scale", type=fraction(0, 1, above=True), default=0.08, metavar="SHARE",
        help="least share of the image's area that a training crop takes")
    add("--val-resize-size", type=count(32), default=256, metavar="PX", help="shorter side before the centre crop")
    add("--val-crop-size", type=count(32), default=224, metavar="PX", help="side of the centre crop")
    add("--max-bad", type=count(0), metavar="N",
        help="end the run when more images than this can't be read (default: 0.1%% of the set, at least 10)")
    add("--check-data", action="store_true", help="read every image once, list the bad ones, and end")

    add = parser.add_argument_group("model").add_argument
    add("-a", "--arch", choices=sorted(mnasnet.WEIGHTS), default="mnasnet1_0", help="network")
    add("--bn-momentum", type=fraction(0, 1, above=True), default=0.1, metavar="M",
        help="weight of a new batch in BatchNorm's running statistics")
    add("--dropout", type=fraction(0, 1), default=0.2, metavar="P", help="share of the classifier's inputs zeroed")
    add("--freeze-bn", action="store_true", help="train with BatchNorm's running statistics as they are")
    add("--pretrained", action="store_true", help="start from torchvision's published weights")
    add("--weights", metavar="FILE", help="with --pretrained: take the weights from this file, not from the net")

    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=count(1), default=90, metavar="N", help="length of the schedule")
    add("--start-epoch", type=count(0), default=0, metavar="N", help="first epoch, for a restart by hand")
    add("-b", "--batch-size", type=count(1), default=256, metavar="N", help="images a step, all cards of this node")
    add("--lr", "--learning-rate", type=fraction(0), default=0.1, metavar="LR", help="highest learning rate")
    add("--warmup", type=count(0), default=0, metavar="N", help="epochs of linear warm-up from 0.1 x lr")
    add("--momentum", type=fraction(0, 1), default=0.9, metavar="M", help="Nesterov momentum")
    add("--wd", "--weight-decay", type=fraction(0), default=1e-4, metavar="W", help="weight decay")
    add("--label-smoothing", "--ls", type=fraction(0, 1), default=0.1, metavar="S",
        help="share of the target spread over all classes")
    add("--seed", type=count(0, 2 ** 31), metavar="N", help="fixes weights, order, augmentation and dropout, "
        "and asks torch for deterministic algorithms (default: drawn and printed)")

    add = parser.add_argument_group("precision").add_argument
    add("--opt-level", choices=["O0", "O1", "O2"], help="O0: fp32; O1: autocast; O2: low-precision model with fp32 "
        "master weights (default: O1 on npu and gpu, O0 on cpu)")
    add("--compile", action="store_true", help="train through torch.compile")
    add("--loss-scale", type=lambda text: text if text == "dynamic" else fraction(0, above=True)(text),
        default="dynamic", metavar="S", help="'dynamic' or a fixed number")
    add("--amp-backend", choices=["auto", "apex", "native"], default="auto",
        help="auto: apex where it has amp, else native")

    add = parser.add_argument_group("devices and processes").add_argument
    add("--device", choices=["npu", "gpu", "cpu"], help="(default: the best one present)")
    add("--device-list", type=cards, default="", metavar="0,1,...", help="cards of this node")
    add("--npu", type=count(0), metavar="ID", help="the card of a one-card run")
    add("--multiprocessing-distributed", action="store_true", help="one process a card of --device-list")
    add("--local_rank", "--local-rank", type=count(0), metavar="I",
        help="this process's place in --device-list, where each process is started from outside")
    add("--world-size", type=count(-1), default=-1, metavar="N", help="nodes (-1: one)")
    add("--rank", type=count(-1), default=-1, metavar="I", help="this node's number (-1: 0)")
    add("--dist-url", default="env://", metavar="URL",
        help="tcp://HOST:PORT or file:///PATH where the processes meet, or env:// (MASTER_ADDR, MASTER_PORT)")
    add("--dist-backend", metavar="NAME", help="collectives (default: hccl, nccl or gloo, by device)")
    add("--dist-timeout", type=fraction(1), default=600.0, metavar="SEC",
        help="how long a process waits for the others, at the start and at each step")

    add = parser.add_argument_group("checkpoints and logs").add_argument
    add("--output-dir", default=".", metavar="DIR", help="where checkpoints and metrics.csv go")
    add("--resume", metavar="FILE", help="go on from this checkpoint; 'auto': from the newest good one in --output-dir")
    add("--save-freq", type=count(1), metavar="STEPS", help="save every so many steps, besides after each epoch")
    add("--keep", type=count(1), default=2, metavar="N", help="checkpoints kept, the newest included")
    add("-e", "--evaluate", action="store_true", help="evaluate the model of --resume, and end")
    add("-p", "--print-freq", type=count(1), default=10, metavar="N", help="steps between two log lines")
    add("--tensorboard", metavar="DIR", help="write TensorBoard's events there, too")
    add("--run-prof", action="store_true", help="profile a few steps, print the costliest operators, and end")

    flags = parser.parse_args(argv)
    if flags.data is None and (flags.check_data or not flags.synthetic):
        parser.error("no data folder: give one with train/ and val/ in it, or --synthetic N")
    if flags.val_crop_size > flags.val_resize_size:
        parser.error(f"--val-crop-size {flags.val_crop_size} is larger than --val-resize-size "
                     f"{flags.val_resize_size}: it must fit in it")
    if flags.weights and not flags.pretrained:
        parser.error("--weights FILE does nothing alone: add --pretrained "
                     "(or --resume FILE to go on from a checkpoint)")
    if flags.evaluate and not (flags.resume or flags.pretrained):
        parser.error("-e has no model: give --resume FILE or --pretrained")
    flags.nodes, flags.node_rank = max(1, flags.world_size), max(0, flags.rank)
    if flags.node_rank >= flags.nodes:
        parser.error(f"--rank {flags.rank} is this node's number and must be below --world-size {flags.nodes}")
    return flags


# ---------------------------------------------------------------------------------------------------------------------
# Runtime: the device, the processes, and what they agree on
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """What differs between the kinds of device."""

    name: str
    module: str  # torch.<module> drives the cards; '' for the CPU
    collective: str
    amp_dtype: torch.dtype
    opt_level: str  # --opt-level where none is asked for
    channels_last: bool


KINDS = {
    "npu": Kind("npu", "npu", "hccl", torch.float16, "O1", False),
    "gpu": Kind("gpu", "cuda", "nccl", torch.float16, "O1", True),
    "cpu": Kind("cpu", "", "gloo", torch.bfloat16, "O0", True),
}


@dataclass(frozen=True)
class Runtime:
    """Where this process runs, and beside which others."""

    kind: Kind
    device: torch.device
    rank: int = 0
    world_size: int = 1
    local_size: int = 1  # processes on this node
    channels_last: bool = False

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def module(self):
        """``torch.cuda``, ``torch.npu`` or None."""
        return getattr(torch, self.kind.module) if self.kind.module else None

    def synchronize(self):
        if self.module:
            self.module.synchronize()


def first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def accepts(function, name):
    """Whether this torch's ``function`` has a parameter ``name``; how features are asked for here."""
    try:
        return name in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return name in (function.__doc__ or "")


def cards_present(kind):
    """How many cards of a kind this machine has: (count, why there are none)."""
    if kind.name == "cpu":
        return 1, ""
    if kind.name == "npu" and not hasattr(torch, "npu"):  # torch 1.5 for Ascend has it built in
        try:
            importlib.import_module("torch_npu")
        except (ImportError, RuntimeError, SystemExit) as error:  # some exit, with status 0, where CANN is missing
            return 0, f"torch_npu does not import ({first_line(error)})"
    module = getattr(torch, kind.module, None)
    count = module.device_count() if module and module.is_available() else 0
    return count, "" if count else f"torch.{kind.module} finds no card"


def choose_kind(flags):
    """The kind of device asked for, or else the best one present, and why it is none of those before: (kind, reasons).
    Raises a Fault where the device, or a card that is listed, is not there."""
    reasons, card = [], max(flags.device_list or [flags.npu or 0])
    for kind in [KINDS[flags.device]] if flags.device else KINDS.values():
        count, why = cards_present(kind)
        if not count:
            reasons.append(f"{kind.name}: {why}")
        elif kind.name == "cpu" or card < count:
            return kind, reasons
        else:
            flag, cards = ("--device-list", range(count)) if flags.device_list else ("--npu", [0])
            raise Fault(f"{flag} names card {card}, and this machine has {count} {kind.name} card(s): "
                        f"give {flag} {','.join(map(str, cards))}")
    raise Fault(f"--device {flags.device} is not there: {why}. Give a device that this machine has")


def find_place(flags):
    """This process among the others: its rank, how many there are, its rank on this node, how many are there."""
    listed, env = flags.device_list, os.environ
    if flags.multiprocessing_distributed:
        rank = flags.node_rank * len(listed) + flags.local_rank
        return rank, flags.nodes * len(listed), flags.local_rank, len(listed)
    if "RANK" in env and "WORLD_SIZE" in env:  # torchrun
        local_rank = int(env.get("LOCAL_RANK", 0)) if flags.local_rank is None else flags.local_rank
        world_size = int(env["WORLD_SIZE"])
        return int(env["RANK"]), world_size, local_rank, int(env.get("LOCAL_WORLD_SIZE", world_size))
    if len(listed) > 1:
        raise Fault(f"--device-list names {len(listed)} cards for one process: add --multiprocessing-distributed")
    return 0, 1, 0, 1


def open_device(flags, kind):
    """This process's ``Runtime``, its card made current before anything else touches it."""
    rank, world_size, local_rank, local_size = find_place(flags)
    card = local_rank if flags.npu is None else flags.npu
    if flags.device_list:
        if local_rank >= len(flags.device_list):
            raise Fault(f"local rank {local_rank} has no card: --device-list names {len(flags.device_list)}")
        card = flags.device_list[local_rank]
    device = torch.device(kind.module, card) if kind.module else torch.device("cpu")
    runtime = Runtime(kind, device, rank, world_size, local_size, kind.channels_last and keeps_channels_last(kind))
    module, threads = runtime.module, share_of_cores(local_size)
    if module:
        if card >= module.device_count():
            raise Fault(f"{kind.name} card {card} is not there: this machine has {module.device_count()}")
        module.set_device(device)
        if hasattr(torch, "set_float32_matmul_precision"):
            torch.set_float32_matmul_precision("high")  # TF32 for what stays fp32, as convolutions have by default
        if hasattr(module, "set_compile_mode"):  # Ascend: the built-in operators, not one compiled for each shape
            module.set_compile_mode(jit_compile=False)
        if hasattr(module, "set_option") and "ACL_OP_COMPILER_CACHE_MODE" not in os.environ:
            module.set_option({"ACL_OP_COMPILER_CACHE_MODE": "enable"})  # keeps what is compiled
    elif "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)  # not idly: torch 1.8's loader processes may hang after it
    return runtime


def usable_cores():
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def share_of_cores(processes):
    """Cores for each of the processes on this node."""
    return max(1, usable_cores() // processes)


def keeps_channels_last(kind):
    """Whether convolutions of this torch stay in channels_last, which on the CPU the first generations' do not."""
    images = torch.zeros(1, 8, 6, 6).to(memory_format=torch.channels_last)
    kept = F.conv2d(images, torch.zeros(8, 8, 3, 3)).is_contiguous(memory_format=torch.channels_last)
    return kept or bool(kind.module)


def die_with_parent(signum):
    """Has the kernel (Linux) send this process ``signum`` when its parent is gone, so that none is left behind."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signum))


def keep_freed_memory(processes):
    """Has glibc keep freed blocks, in pages of 2 MB; False where the C library is another. A step on the CPU takes and
    frees hundreds of MB: getting them back from the kernel page by page made it 1.4 times as long, small pages made it
    1.1 times as long. ``processes`` is how many share this machine's memory."""
    trim_threshold, mmap_max, huge_page = -1, -4, 14  # from malloc.h and mman.h
    try:
        libc = ctypes.CDLL("libc.so.6")
        kept = libc.mallopt(mmap_max, 0) and libc.mallopt(trim_threshold, -1)
    except (OSError, AttributeError):
        return False
    # The heap grows to what a large batch may take: addresses only, the pages come when they are written to. Where it
    # can't, or the kernel has no large pages, it stays as it is.
    size, page = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // processes, 2 ** 21
    libc.malloc.restype = ctypes.c_void_p
    block = libc.malloc(ctypes.c_size_t(size))
    if block:
        aligned = block + -block % page
        libc.madvise(ctypes.c_void_p(aligned), ctypes.c_size_t(size - page), huge_page)
        libc.free(ctypes.c_void_p(block))
    return bool(kept)


def meeting_point(flags, runtime, limit):
    """The store where the processes of a run find each other, and its address in words. Raises a Fault where the
    address is not one, its port is taken, or nobody answers there in time."""
    url, env = flags.dist_url, os.environ
    if url.startswith("file://"):
        return dist.FileStore(url[len("file://"):], runtime.world_size), url
    usual = f"tcp://{env.get('MASTER_ADDR', '127.0.0.1')}:{env.get('MASTER_PORT', '29688')}"
    if url == "env://":
        url = usual
    address = re.fullmatch(r"tcp://(.+):([0-9]+)", url)
    if not address or int(address.group(2)) > 65535:
        raise Fault(f"--dist-url {flags.dist_url!r} is no address: expected tcp://HOST:PORT, file:///PATH or env://")
    host, port = address.group(1), int(address.group(2))
    # torchrun may have a store there already, and keeps it over its restarts: each gets names of its own in it.
    there = url == usual and env.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and not flags.multiprocessing_distributed
    hosts, prefix = runtime.is_main and not there, "attempt" + env.get("TORCHELASTIC_RESTART_COUNT", "0")
    options = {}
    if accepts(dist.TCPStore.__init__, "wait_for_workers"):
        options["wait_for_workers"] = False  # init_process_group waits, and with a better message
    if hosts and host in ("127.0.0.1", "localhost") and accepts(dist.TCPStore.__init__, "master_listen_fd"):
        try:  # torch itself would listen on every interface
            options["master_listen_fd"] = socket.create_server(("127.0.0.1", port)).detach()
        except OSError as error:
            raise Fault(f"port {port} can't be used ([Errno {error.errno}] {os.strerror(error.errno)}): "
                        "give another in --dist-url or MASTER_PORT")
    try:
        return dist.PrefixStore(prefix, dist.TCPStore(host, port, runtime.world_size, hosts, limit, **options)), url
    except (RuntimeError, ValueError) as error:
        raise Fault(f"no meeting at {url} within {flags.dist_timeout:g} s ({first_line(error)}): are all processes "
                    "started, is the port free, does rank 0 run on that host?")


class Team:
    """All processes of a run: what they agree on goes over gloo between the hosts, and never waits for a device."""

    def __init__(self, flags, runtime):
        self.runtime, self.size, self.timeout, self.signal = runtime, runtime.world_size, flags.dist_timeout, 0
        if self.size == 1:
            return
        if runtime.local_size == self.size and os.path.exists("/sys/class/net/lo"):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one node: nothing listens to the network
        limit = datetime.timedelta(seconds=self.timeout)
        backend = flags.dist_backend or runtime.kind.collective
        if not hasattr(torch, "autocast"):  # torch 1.8 lets nccl wait for ever unless told not to
            os.environ.setdefault("NCCL_ASYNC_ERROR_HANDLING", "1")
        # nccl and hccl end a process that waits in vain; poll() is to be the first to notice, and names the others.
        longer = limit if backend == "gloo" else limit + datetime.timedelta(seconds=60)
        self.store, where = meeting_point(flags, runtime, limit)
        try:
            dist.init_process_group(backend, store=self.store, rank=runtime.rank, world_size=self.size, timeout=longer)
            self.group = dist.new_group(backend="gloo", timeout=limit)
        except (RuntimeError, ValueError) as error:
            raise Fault(f"rank {runtime.rank} of {self.size} found no others at {where} within {self.timeout:g} s "
                        f"({first_line(error)}): start all of them, with the same address")
        if runtime.is_main:
            print(f"=> {self.size} processes met at {where}, collectives over {backend}", flush=True)

    def listen(self):
        """From here on a signal is a request to save and end."""
        for signum in SIGNALS:
            signal.signal(signum, lambda number, frame: setattr(self, "signal", number))

    def poll(self, news=0):
        """The signal that any process has had (0: none), and the largest ``news``; all call this equally often."""
        if self.size == 1:
            return self.signal, news
        values = torch.tensor([self.signal, news])
        dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values.tolist()

    def gather(self, row):
        """[N] on the host -> [world size, N], a row a process."""
        rows = [row.clone() for _ in range(self.size)]
        if self.size > 1:
            dist.all_gather(rows, row, group=self.group)
        return torch.stack(rows)

    def sum(self, values):
        """The sums over the processes of a list of numbers, in float64."""
        return self.gather(torch.tensor(values, dtype=torch.float64)).sum(0).tolist()

    def first(self, value):
        """The first process's number, for all."""
        return self.gather(torch.tensor([value]))[0].item()

    @contextlib.contextmanager
    def faults(self):
        """Turns the error of a collective that did not come about into the Fault that names the processes which no
        longer answer: all others sign the store, those don't."""
        try:
            yield
        except RuntimeError as error:
            if self.size == 1 or not re.search("gloo|nccl|hccl|ProcessGroup|Connection", str(error), re.IGNORECASE):
                raise
            try:
                self.store.add(f"lost/{self.runtime.rank}", 1)
                time.sleep(min(3.0, self.timeout))
                silent = [rank for rank in range(self.size) if not self.store.add(f"lost/{rank}", 0)]
            except RuntimeError:
                silent = [0]  # its process holds the store
            names = ", ".join(f"rank {rank}" for rank in silent) or "another rank"
            raise Fault(f"{names} gone or stuck, no answer ({first_line(error)}). See its output; --resume auto goes "
                        "on from the last checkpoint")

    def speaks_first(self):
        """Whether this process is the first to report a fault; the others would only repeat it."""
        with contextlib.suppress(RuntimeError):  # the process that holds the store is gone
            return self.size == 1 or self.store.add("fault", 1) == 1
        return True


# ---------------------------------------------------------------------------------------------------------------------
# Precision
# ---------------------------------------------------------------------------------------------------------------------


class Precision:
    """O0, O1 or O2 over one model and one optimiser, through apex or native.

    O1 runs convolutions and the classifier in low precision. O2 keeps the whole model in it but BatchNorm, and the
    optimiser steps fp32 master weights. float16 trains under a loss scale, bfloat16 needs none.

    Use: ``parameters = precision.prepare(model)``, an optimiser over them, ``model, optimizer =
    precision.initialize(model, optimizer)``, and only then DistributedDataParallel. Raises a Fault where this torch, or
    this machine, lacks what the level needs.
    """

    def __init__(self, flags, runtime):
        kind = runtime.kind
        self.level, self.loss_scale = flags.opt_level or kind.opt_level, flags.loss_scale
        low = self.level != "O0"
        apex = find_apex(flags, kind) if low or flags.amp_backend == "apex" else None
        self.apex = apex if low else None
        self.conv_dtype = kind.amp_dtype if low else torch.float32  # what convolutions compute in
        self.input_dtype = self.conv_dtype if self.level == "O2" and not self.apex else torch.float32
        self.scales = self.conv_dtype == torch.float16  # a step may overflow without harm
        self.autocast, self.scaler, self.masters = contextlib.nullcontext, None, None
        if self.apex:
            return
        autocast = find_autocast(kind, self.conv_dtype)
        if low and autocast is None:
            raise Fault(f"--opt-level {self.level} on {kind.name} needs torch's own autocast there, which torch "
                        f"{torch.__version__} lacks: use --opt-level O0"
                        + ("" if kind.name == "cpu" else ", or install an apex that has amp"))
        if self.level == "O1":
            self.autocast = autocast
        scale = 2.0 ** 16 if self.loss_scale == "dynamic" else self.loss_scale
        self.scaler = find_scaler(kind)(init_scale=scale, enabled=self.scales)

    def __str__(self):
        how = "fp32" if self.level == "O0" else "apex" if self.apex else f"native, {str(self.conv_dtype)[6:]}"
        return f"{self.level} ({how})"

    def prepare(self, model):
        """The parameters to optimise. The model itself goes to low precision under native O2."""
        if self.input_dtype == torch.float32:
            return list(model.parameters())
        self.masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
        for module in model.modules():
            if not isinstance(module, torch.nn.BatchNorm2d):
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(self.conv_dtype)
        return self.masters

    def initialize(self, model, optimizer):
        """The model and the optimiser as apex wants them, before training."""
        if not self.apex:
            return model, optimizer
        options = {"combine_grad": True} if accepts(self.apex.initialize, "combine_grad") else {}  # Ascend's apex
        weights = [p.detach().clone() for p in model.parameters()]
        model, optimizer = self.apex.initialize(
            model, optimizer, opt_level=self.level, loss_scale=self.loss_scale, **options)
        # Has apex put its fp32 weights in the optimiser now, not at the first step, when a checkpoint's momentum has
        # been rounded to the model's float16. It makes them of rounded weights: they get back what was lost.
        optimizer.zero_grad()
        copy_into(stepped_parameters(optimizer), weights)
        return model, optimizer

    def backward_and_step(self, loss, model, optimizer):
        """Gradients of ``loss``, and the optimiser's step unless they overflowed; the gradients are cleared after."""
        if self.apex:
            with self.apex.scale_loss(loss, optimizer) as scaled:
                scaled.backward()
            optimizer.step()
        else:
            self.scaler.scale(loss).backward()
            if self.masters:
                for master, parameter in zip(self.masters, model.parameters()):
                    if master.grad is None:
                        master.grad = torch.empty_like(master)
                    master.grad.copy_(parameter.grad)  # Ascend's fused SGD goes on reading the memory it saw first
            self.scaler.step(optimizer)
            self.scaler.update(None if self.loss_scale == "dynamic" else self.loss_scale)
            if self.masters:
                copy_into(model.parameters(), self.masters)
                model.zero_grad()
        optimizer.zero_grad()

    def state_dict(self):
        return (self.apex or self.scaler).state_dict()

    def load_state_dict(self, state):
        """Takes a scaler's state in apex's form or in torch's own. A --loss-scale that is a number stays."""
        if not state:
            return
        state = state.get("loss_scaler0") or {"loss_scale": state["scale"], "unskipped": state["_growth_tracker"]}
        scale = state["loss_scale"] if self.loss_scale == "dynamic" else self.loss_scale
        if self.apex:
            self.apex.load_state_dict(OrderedDict(loss_scaler0=dict(state, loss_scale=scale)))
        else:
            state = dict(self.scaler.state_dict(), scale=scale, _growth_tracker=state["unskipped"])
            self.scaler.load_state_dict(state)


def copy_into(parameters, values):
    with torch.no_grad():
        for parameter, value in zip(parameters, values):
            parameter.copy_(value)


def stepped_parameters(optimizer):
    """What the optimiser steps, in the order of the model's parameters: these, or their fp32 masters."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def find_apex(flags, kind):
    """apex.amp where it is asked for, or there and able; None for torch's own."""
    if flags.amp_backend == "native" or (kind.name == "cpu" and flags.amp_backend == "auto"):
        return None
    try:
        from apex import amp  # `import apex` alone proves nothing: newer apex, and PyPI's other apex, have no amp

        amp.initialize
    except (ImportError, AttributeError):
        if flags.amp_backend == "auto":
            return None
        raise Fault("--amp-backend apex: no apex.amp is installed (NVIDIA removed it from apex in 2025). "
                    "--amp-backend native does the same")
    if kind.name == "cpu":
        raise Fault("--amp-backend apex: apex.amp does not run on the cpu. Use --amp-backend native")
    return amp


def find_autocast(kind, dtype):
    """What makes an autocast context for the device, or None where this torch has none."""
    if kind.name == "npu" and hasattr(getattr(torch.npu, "amp", None), "autocast"):
        return torch.npu.amp.autocast
    if hasattr(torch, "autocast"):
        return functools.partial(torch.autocast, kind.module or "cpu", dtype=dtype)
    return getattr(torch.cuda.amp, "autocast", None) if kind.name == "gpu" else None


def find_scaler(kind):
    """The class of gradient scaler for the device; where there is none, one that does nothing unless enabled."""
    if kind.name == "npu" and hasattr(getattr(torch.npu, "amp", None), "GradScaler"):
        return torch.npu.amp.GradScaler  # the older cards saturate, and only it reads their overflow flag
    if hasattr(getattr(torch, "amp", None), "GradScaler"):
        return functools.partial(torch.amp.GradScaler, kind.module or "cpu")
    return torch.cuda.amp.GradScaler


# ---------------------------------------------------------------------------------------------------------------------
# Data
# ---------------------------------------------------------------------------------------------------------------------

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, red, green, blue; from torchvision
LARGE = 50000  # images, from which on the index of a folder is kept: a second's scan


def class_names(root):
    """The class folders of a folder, sorted. Raises Fault where it is missing, or holds none."""
    if not os.path.isdir(root):
        raise Fault(f"no folder {root!r}: the data folder needs train/ and val/, with one folder a class in each")
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not classes:
        raise Fault(f"{root!r} holds no folders: expected one folder of images a class")
    return classes


def scan(root, classes):
    """What lies in the class folders of ``root``: ``paths`` of the images (bytes, relative) with their ``labels``, and
    all ``folders`` with the ``times`` (ns) of their last change, by which a kept index is known to be true still.
    Raises Fault where a class folder holds no image."""
    paths, labels, folders = [], [], [os.fsencode(root)]
    for label, name in enumerate(classes):
        for folder, below, files in os.walk(os.path.join(root, name), followlinks=True):
            below.sort()
            folders.append(os.fsencode(folder))
            inside = os.path.relpath(folder, root)
            paths += [os.fsencode(os.path.join(inside, f)) for f in sorted(files) if f.lower().endswith(EXTENSIONS)]
        if len(paths) == len(labels):
            raise Fault(f"class folder {os.path.join(root, name)!r} holds no image ({' '.join(EXTENSIONS)}): "
                        "add some or remove it")
        labels += [label] * (len(paths) - len(labels))
    # One block each, not a million objects: a worker shares the pages it only reads.
    return {"paths": np.array(paths), "labels": np.array(labels), "folders": np.array(folders),
            "times": np.array([os.stat(folder).st_mtime_ns for folder in folders])}


def scan_or_recall(root, classes, file):
    """``scan``, or what an earlier scan of a large folder left in ``file`` if no folder has changed since."""
    with contextlib.suppress(OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile), np.load(file) as kept:
        index = {name: kept[name] for name in ("paths", "labels", "folders", "times")}
        times = [os.stat(folder).st_mtime_ns for folder in index["folders"]]
        if os.fsdecode(index["folders"][0]) == root and times == index["times"].tolist():
            return index
    begin = time.time_ns()
    index = scan(root, classes)
    if len(index["paths"]) > LARGE and index["times"].max() < begin:  # no folder changed while it was read
        content = io.BytesIO()
        np.savez(content, **index)
        with contextlib.suppress(OSError, Fault):  # it only saves time
            os.makedirs(os.path.dirname(file), exist_ok=True)
            write_file(content.getbuffer(), file)
    return index


class Folder:
    """The images of a folder with one folder a class: ``classes``, ``paths`` (bytes, numpy) and ``labels`` [N]. Raises
    Fault where the folder is missing, or has no classes, or has a class without an image."""

    def __init__(self, root, index_file):
        self.root, self.classes = os.path.abspath(root), class_names(root)
        index = scan_or_recall(self.root, self.classes, index_file)
        self.paths, self.labels = index["paths"], index["labels"]

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    def read(self, index, plan, size):
        return read_image(self.path(index), plan, size)


class Synthetic:
    """N images of noise, for measuring without data; the same ones every time."""

    def __init__(self, count):
        self.classes = [f"{label:04d}" for label in range(1000)]
        self.labels = np.arange(count) % len(self.classes)

    def __len__(self):
        return len(self.labels)

    def read(self, index, plan, size):
        return np.frombuffer(np.random.RandomState(index).bytes(size * size * 3), np.uint8).reshape(size, size, 3)


def open_folder(flags, name):
    return Folder(os.path.join(flags.data, name), os.path.join(flags.output_dir, f"index-{name}.npz"))


def open_images(flags):
    """(training images, or None where nothing is trained; validation images). Raises Fault where a folder has the wrong
    shape, or the two have different classes."""
    if flags.synthetic:
        return Synthetic(flags.synthetic), Synthetic(flags.synthetic)
    train, val = (class_names(os.path.join(flags.data, name)) for name in ("train", "val"))
    if train != val:
        odd = min(set(train) ^ set(val))
        raise Fault(f"train/ has {len(train)} classes and val/ {len(val)}, which must be the same: {odd!r} is only in "
                    "one of them")
    val = open_folder(flags, "val")
    return None if flags.evaluate else open_folder(flags, "train"), val


def train_plan(size, least_area, rng):
    """RandomResizedCrop: what to cut from an image of a given width and height.

    A plan is a function (width, height) -> (box, resized, corner): cut ``box`` (left, top, width, height), resize it
    to ``resized`` (width, height), and of that take the crop whose upper left corner is ``corner``.
    """

    def plan(width, height):
        for _ in range(10):
            area = width * height * rng.uniform(least_area, 1)
            ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                left, top = rng.randint(0, width - w), rng.randint(0, height - h)
                break
        else:  # the largest centred crop of an allowed shape
            w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
            left, top = (width - w) // 2, (height - h) // 2
        return (left, top, w, h), (size, size), (0, 0)

    return plan


def val_plan(resize, size):
    """Resize of the shorter side, then CenterCrop, as a plan (see ``train_plan``)."""

    def plan(width, height):
        resized = [int(resize * side / min(width, height)) for side in (width, height)]
        return (0, 0, width, height), resized, [round((side - size) / 2) for side in resized]

    return plan


def read_image(path, plan, size):
    """The crop that ``plan`` takes of an image file: uint8 [size, size, 3], antialiased bilinear. EXIF rotation is
    ignored, as torchvision ignores it. Raises OSError or ValueError where the file can't be decoded."""
    with open(path, "rb") as file:
        data = file.read()
    decode = fast_decoder()
    # Past this size it is likely a photo that is worth decoding at a fraction of its size, which only Pillow does.
    if decode and data[:3] == b"\xff\xd8\xff" and len(data) < 2 ** 18:
        with contextlib.suppress(RuntimeError):  # CMYK, or broken: let Pillow say
            return crop_with_torch(decode(data), plan, size)
    try:
        return read_with_pillow(data, plan, size)
    except (OSError, ValueError):
        raise
    except Exception as error:  # Pillow's plugins raise SyntaxError, struct.error, IndexError, ... on broken files
        raise ValueError(f"{type(error).__name__}: {first_line(error)}")


@functools.lru_cache(None)
def fast_decoder():
    """torchvision's JPEG decoder, JPEG bytes -> uint8 [3, H, W], where torch can also resize uint8; else None."""
    try:
        from torchvision.io import ImageReadMode, decode_jpeg

        F.interpolate(torch.zeros(1, 3, 4, 4, dtype=torch.uint8), (2, 2), mode="bilinear", antialias=True)
    except (ImportError, RuntimeError, TypeError):
        return None
    warnings.filterwarnings("ignore", module="torchvision")  # from 0.29 on the decoder is deprecated
    return lambda data: decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def crop_with_torch(image, plan, size):
    """The crop of a decoded image [3, H, W]: uint8 [size, size, 3]."""
    (left, top, w, h), (width, height), (x, y) = plan(image.shape[2], image.shape[1])
    region = image[None, :, top:top + h, left:left + w]
    if (w, h) != (width, height):
        region = F.interpolate(region, (height, width), mode="bilinear", antialias=True)
    return region[0, :, y:y + size, x:x + size].permute(1, 2, 0).numpy()


def read_with_pillow(data, plan, size):
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        warnings.filterwarnings("ignore", category=UserWarning, module="PIL")  # odd EXIF, odd transparency
        image = Image.open(io.BytesIO(data))
        whole = image.size
        box, resized, corner = plan(*whole)
        # The part of the image that the crop is made of, in the image's own pixels: one resize does all.
        scale = box[2] / resized[0], box[3] / resized[1]
        left, top = (box[i] + corner[i] * scale[i] for i in (0, 1))
        # JPEG decodes at 1/2, 1/4 or 1/8 in less time; at twice the crop's resolution the difference can't be seen.
        image.draft("RGB", tuple(int(2 * s / max(2, min(scale))) for s in whole))
        image = to_rgb(image)
        factor = round(whole[0] / image.size[0])
        box = [edge / factor for edge in (left, top, left + size * scale[0], top + size * scale[1])]
        box = tuple(min(max(edge, 0), image.size[i % 2]) for i, edge in enumerate(box))  # float rounding at the edges
        return np.asarray(image.resize((size, size), Image.BILINEAR, box=box))


def to_rgb(image):
    """Any mode that Pillow decodes, as RGB: 16-bit scaled to 8, transparency over white."""
    if image.mode.startswith("I"):  # 16 bits a pixel; Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


class ImageBatches(torch.utils.data.Dataset):
    """Whole batches: ``self[epoch, indices]`` is (images uint8 [n, size, size, 3], labels int64 [n], bad indices).

    What is done to an image depends on (seed, epoch, index) alone, so that any number of workers gives the same
    batches. In training an image that can't be read gives its place to another of its class; in evaluation (no seed) to
    an empty one with label -1, which no prediction matches.
    """

    def __init__(self, images, flags, seed):
        self.images, self.flags, self.seed, self.train = images, flags, seed, seed is not None
        self.size = flags.train_crop_size if self.train else flags.val_crop_size

    def __getitem__(self, key):
        epoch, indices = key
        shape = (len(indices), self.size, self.size, 3)
        if torch.utils.data.get_worker_info():  # written once, in the memory that the training process reads
            shared = getattr(torch, "UntypedStorage", torch.ByteStorage)._new_shared(int(np.prod(shape)))
            block = torch.empty(0, dtype=torch.uint8).set_(shared).view(shape)
        else:
            block = torch.empty(shape, dtype=torch.uint8)
        rows, labels, bad = block.numpy(), torch.from_numpy(self.images.labels[indices]), []
        for row, index in enumerate(indices):
            try:
                rows[row] = self.load(epoch, index)
            except (OSError, ValueError):
                bad.append(int(index))
                if self.train:
                    rows[row] = self.load_substitute(epoch, index)
                else:
                    rows[row], labels[row] = 0, -1
        return block, labels, bad

    def load(self, epoch, index):
        if not self.train:
            return self.images.read(index, val_plan(self.flags.val_resize_size, self.size), self.size)
        rng = random.Random(((self.seed << 20) + epoch << 40) + int(index))
        image = self.images.read(index, train_plan(self.size, self.flags.train_crop_scale, rng), self.size)
        return image[:, ::-1] if rng.random() < 0.5 else image

    def load_substitute(self, epoch, index):
        """The next image of the same class that can be read."""
        same = np.flatnonzero(self.images.labels == self.images.labels[index])
        for other in np.roll(same, -np.searchsorted(same, index))[1:]:
            with contextlib.suppress(OSError, ValueError):
                return self.load(epoch, other)
        name = self.images.classes[self.images.labels[index]]
        raise Fault(f"no image of class {name!r} can be read: {self.images.path(index)}")


class BatchOrder(torch.utils.data.Sampler):
    """The keys of ``ImageBatches`` for one process. Training: full batches in an order that depends on (seed, epoch)
    alone, from ``first`` images on. Evaluation (no seed): every image once, shared out without padding."""

    def __init__(self, count, batch_size, runtime, seed=None):
        self.count, self.batch_size, self.runtime, self.seed = count, batch_size, runtime, seed
        self.total = batch_size * runtime.world_size  # images a step, all processes
        self.epoch, self.first = 0, 0

    def __len__(self):
        """Steps that all processes take together; in evaluation some may have nothing left for the last."""
        left = self.count - self.first
        return left // self.total if self.seed is not None else -(-left // self.total)

    def __iter__(self):
        rank, world, size = self.runtime.rank, self.runtime.world_size, self.batch_size
        if self.seed is None:
            mine = np.arange(self.first + rank, self.count, world)
        else:
            order = np.random.RandomState([self.seed, self.epoch]).permutation(self.count)[self.first:]
            mine = order[:len(self) * self.total].reshape(len(self), world, size)[:, rank].ravel()
        for first in range(0, len(mine), size):
            yield self.epoch, mine[first:first + size]


def make_loader(images, flags, runtime, batch_size, workers, seed=None):
    """The loader of batches of images: for training where a seed is given, else for evaluation."""
    order = BatchOrder(len(images), batch_size, runtime, seed)
    takes = functools.partial(accepts, torch.utils.data.DataLoader.__init__)
    lasting, options = workers > 0 and takes("persistent_workers"), {"pin_memory": runtime.kind.name != "cpu"}
    if lasting:
        options["persistent_workers"] = True
    if runtime.kind.name == "npu" and takes("pin_memory_device") and not hasattr(torch, "accelerator"):
        options["pin_memory_device"] = "npu"  # this torch would ask whether there is CUDA
    loader = torch.utils.data.DataLoader(
        ImageBatches(images, flags, seed), batch_size=None, sampler=order, num_workers=workers,
        worker_init_fn=quiet_worker, **options)
    if lasting:
        # Starts the processes now, with nothing to fetch yet. After the first steps they would be born with the memory
        # of these, which would then be there twice, and no longer in large pages (Linux copies it piece by piece).
        order.first = order.count
        iter(loader)
        order.first = 0
    return loader


def quiet_worker(index):
    """A loader process computes on one core, and leaves signals to the training process."""
    torch.set_num_threads(1)
    die_with_parent(signal.SIGKILL)
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def end_loaders():
    """Ends the loader processes. They ignore SIGTERM, for which the older torch would wait at exit for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would take their end for a fault
    for child in multiprocessing.active_children():
        child.kill()


@functools.lru_cache(None)
def copy_stream(module):
    """The stream of a process's copies to its card; one for all, since each keeps the memory that it has used."""
    return module.Stream()


def to_device(loader, runtime, dtype):
    """The loader's batches on the device: (images dtype [n, 3, S, S] normalised, labels [n], bad indices).

    Images travel as uint8, from pinned memory, on a stream of their own: one batch moves while another is computed on.
    """
    device, module = runtime.device, runtime.module
    mean = torch.tensor([255 * m for m in MEAN], device=device).view(1, 3, 1, 1)
    scale = torch.tensor([1 / (255 * s) for s in STD], device=device).view(1, 3, 1, 1)
    stream = copy_stream(module) if module else None
    # Ascend's loss took 32 bits in torch's first generations.
    old_npu = runtime.kind.name == "npu" and not hasattr(torch, "autocast")
    label_dtype = torch.int32 if old_npu else torch.int64

    def move(batch):
        images, labels, bad = batch
        # torch_npu copies later what is not pinned, too, and by then it may be gone.
        queued = {"non_blocking": runtime.kind.name != "npu" or images.is_pinned()}
        with module.stream(stream) if module else contextlib.nullcontext():
            images, labels = images.to(device, **queued), labels.to(device, **queued).to(label_dtype)
        return images, labels, bad, stream.record_event() if stream else None

    def finish(images, labels, bad, copied):
        if module:
            module.current_stream().wait_event(copied)
            images.record_stream(module.current_stream())
            labels.record_stream(module.current_stream())
        images = images.permute(0, 3, 1, 2)
        if not runtime.channels_last:
            images = images.contiguous()
        return images.float().sub_(mean).mul_(scale).to(dtype), labels, bad

    ahead = []
    for batch in loader:
        ahead.append(move(batch))
        if len(ahead) > 1:
            yield finish(*ahead.pop(0))
    for moved in ahead:
        yield finish(*moved)


# ---------------------------------------------------------------------------------------------------------------------
# Model, optimiser, schedule
# ---------------------------------------------------------------------------------------------------------------------


def build_model(flags, runtime, num_classes, dtype=torch.float32):
    """The network on its device; ``dtype`` is what its convolutions are to compute in."""
    model = getattr(mnasnet, flags.arch)(num_classes=num_classes, dropout=flags.dropout, bn_momentum=flags.bn_momentum)
    if runtime.kind.name == "cpu":
        if pads_wrongly():
            replace_depthwise(model, padded_depthwise)
        elif has_fast_depthwise(dtype):
            replace_depthwise(model, functools.partial(fast_depthwise, dtype))
            replace_relu(model)
    model = model.to(runtime.device)
    return model.to(memory_format=torch.channels_last) if runtime.channels_last else model


def replace_depthwise(model, forward):
    """Has the depthwise convolutions compute ``forward(conv, images)``; their parameters and names stay."""
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups > 1:
            module.forward = functools.partial(forward, module)


def replace_relu(model):
    for module in model.modules():
        if isinstance(module, torch.nn.ReLU):
            module.forward = FastReLU.apply


class FastReLU(torch.autograd.Function):
    """ReLU on the CPU, in place in both directions: between BatchNorm and convolution nothing else holds its gradient.
    A step in fp32 (224 px, batch 64) took 0.96 times as long.

    On bfloat16 images LeakyReLU of slope 0 gives the same numbers, NaN included, and took a third of the time on one
    processor (64 x 72 x 56 x 56: 3 ms, not 10), the same on another.
    """

    @staticmethod
    def forward(ctx, images):
        ctx.mark_dirty(images)
        F.leaky_relu_(images, 0.0) if images.dtype == torch.bfloat16 else F.relu_(images)
        ctx.save_for_backward(images)
        return images

    @staticmethod
    def backward(ctx, toward):
        images, = ctx.saved_tensors
        if toward.stride() != images.stride():  # a mean's gradient is one number in many places
            return torch.ops.aten.threshold_backward(toward, images, 0)
        return torch.ops.aten.threshold_backward.grad_input(toward, images, 0, grad_input=toward)


def pads_wrongly():
    """Whether this torch's depthwise convolution, on the CPU at stride 2, has wrong gradients of its weights (pytorch
    issue 50042), as in torch 1.5 and 1.8; 1.8 avoids it for multiples of 24 channels, by a loop over them."""
    weight = torch.zeros(8, 1, 3, 3, requires_grad=True)
    F.conv2d(torch.ones(1, 8, 6, 6), weight, stride=2, padding=1, groups=8).sum().backward()
    return weight.grad[0, 0].tolist() != [[4, 6, 6], [6, 9, 9], [6, 9, 9]]


def padded_depthwise(conv, images):
    """``conv`` with the padding done beforehand, only as far as its windows reach: right at every stride, and on 1.8
    a training step of mnasnet1_0 (32 images of 64 px, one thread) took 2.0 s, with the loop 8.7 s."""
    kernel, stride, before = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    below, right = (-(-side // stride) * stride - stride + kernel - before - side for side in images.shape[2:])
    return torch.mkldnn_convolution(F.pad(images, (before, right, before, below)), conv.weight, conv.bias, (0, 0),
                                    conv.stride, conv.dilation, conv.groups)


def has_fast_depthwise(dtype):
    """Whether ``fast_depthwise`` and ``FastReLU`` are of use: this torch can ask for one gradient alone (1.11 and
    later), and the CPU computes in ``dtype``. Not timed: two runs of one seed could then differ."""
    try:
        torch.ops.aten.convolution_backward
        return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return False


def fast_depthwise(dtype, conv, images):
    """``conv`` in ``dtype``, which is autocast's or the model's own, with the gradients of ``FastDepthwise``."""
    if not torch.is_grad_enabled():
        return torch.nn.Conv2d.forward(conv, images)
    return FastDepthwise.apply(images.to(dtype), conv.weight.to(dtype), conv.stride, conv.padding)


class FastDepthwise(torch.autograd.Function):
    """A depthwise convolution of images [N, C, H, W] and weights [C, 1, K, K] on the CPU, in bfloat16 or fp32.

    oneDNN has no fast kernel for some gradients, which are computed in another way here: that of 5x5 weights as two of
    5x3 weights (in fp32 at stride 1 only), and that of bfloat16 images at stride 2 in fp32. A step (224 px, batch 64)
    took in bfloat16 0.49 times as long as with oneDNN's own gradients, in fp32 0.97 times.
    """

    @staticmethod
    def forward(ctx, images, weight, stride, padding):
        ctx.save_for_backward(images, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(images, weight, None, stride, padding, 1, len(weight))

    @staticmethod
    def backward(ctx, toward):
        (images, weight), stride, padding = ctx.saved_tensors, ctx.stride, ctx.padding
        toward = toward.contiguous(memory_format=torch.channels_last)  # a mean's gradient comes in a slow layout

        def gradient(which, toward, images, weight, padding):
            wanted = [which == 0, which == 1, False]
            return torch.ops.aten.convolution_backward(toward, images, weight, None, stride, padding, [1, 1], False,
                                                       [0, 0], len(weight), wanted)[which]

        dtype = torch.float32 if stride[0] > 1 else images.dtype
        shape = torch.empty_like(images, dtype=dtype)  # not read
        of_images = gradient(0, toward.to(dtype), shape, weight.to(dtype), padding).to(images.dtype)
        if weight.shape[3] == 3 or (stride[0] > 1 and images.dtype == torch.float32):
            return of_images, gradient(1, toward, images, weight, padding), None, None
        of_weight = torch.empty_like(weight)
        reach = stride[1] * (toward.shape[3] - 1) + 3  # columns of the padded images that a kernel 3 wide meets
        for first in (0, 2):  # columns 0 to 2 of the weights, then 2 to 4
            left = padding[1] - first
            part = F.pad(images, (left, reach - left - images.shape[3]))
            of_weight[..., first:first + 3] = gradient(1, toward, part, weight[..., first:first + 3], (padding[0], 0))
        return of_images, of_weight, None, None


def fold_batchnorm(model):
    """A copy for evaluation, with each BatchNorm folded into the weights of the convolution before it: on the CPU 1.4
    times as fast in fp32, with logits that differ by rounding."""
    model = copy.deepcopy(model).eval()
    for layers in [module for module in model.modules() if isinstance(module, torch.nn.Sequential)]:
        for place, layer in enumerate(layers):
            if isinstance(layer, torch.nn.BatchNorm2d):
                layers[place - 1] = torch.nn.utils.fuse_conv_bn_eval(layers[place - 1], layer)
                layers[place] = torch.nn.Identity()
    return model


def has_fused_sgd(device):
    """Whether this torch has a fused SGD for the device; 2.3 has one, but not for the CPU. The operator is asked: the
    first step of an optimiser imports torch's compiler, a second that an evaluation need not wait."""
    weights, gradients = ([torch.zeros(1, device=device)] for _ in range(2))
    try:
        torch._fused_sgd_(weights, gradients, [], weight_decay=0.0, momentum=0.0, lr=0.1, dampening=0.0, nesterov=False,
                          maximize=False, is_first_step=False)
        return True
    except (AttributeError, RuntimeError):
        return False


def build_optimizer(flags, runtime, precision, parameters):
    """SGD with Nesterov momentum; the fused one where there is one for the device."""
    options = dict(lr=flags.lr, momentum=flags.momentum, weight_decay=flags.wd, nesterov=flags.momentum > 0)
    if runtime.kind.name == "npu":  # apex's goes with apex's amp, torch_npu's with torch's
        home = "apex.optimizers" if precision.apex else "torch_npu.optim"
        with contextlib.suppress(ImportError, AttributeError):
            return importlib.import_module(home).NpuFusedSGD(parameters, **options)
    elif has_fused_sgd(runtime.device):
        options["fused"] = True
    optimizer = torch.optim.SGD(parameters, **options)
    if "fused" in options and flags.momentum:
        # Where the first step overflows under a loss scale, the fused one takes memory as it lies for the momentum.
        for parameter in parameters:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def wrap_for_training(model, flags, runtime, precision):
    """``model``, or where there are several processes a DistributedDataParallel around it; compiled if asked for."""
    if flags.compile and not hasattr(torch, "compile"):
        raise Fault(f"--compile needs torch 2.0 or later, this is torch {torch.__version__}: leave it out")
    if runtime.world_size > 1:
        ddp = torch.nn.parallel.DistributedDataParallel
        # The running statistics are averaged before they are used (average_batchnorm), not sent around every step.
        # apex detaches gradients, and Ascend's fused SGD moves them, which neither can where they are views.
        views = not precision.apex and runtime.kind.name != "npu"
        options = {"broadcast_buffers": False, "gradient_as_bucket_view": views, "static_graph": True}
        options = {name: value for name, value in options.items() if accepts(ddp.__init__, name)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = ddp(model, device_ids=[runtime.device.index] if runtime.module else None, **options)
        if not precision.apex:  # which keeps low-precision weights from one forward to its own backward
            settle_buckets(model, runtime, precision)
    return torch.compile(model) if flags.compile else model


def settle_buckets(model, runtime, precision):
    """Two steps that change nothing. After these (one, where there is no static_graph) DistributedDataParallel arranges
    the gradients anew, by which the sums over more than two processes are rounded otherwise: a run that goes on would
    differ from one without a break."""
    model.eval()
    for _ in range(2):
        with precision.autocast():
            model(torch.zeros(1, 3, 32, 32, dtype=precision.input_dtype, device=runtime.device)).sum().backward()
        model.zero_grad()


def learning_rate(flags, epoch):
    """The learning rate at a point of the run, ``epoch`` being the epochs done, with their fraction: linear from a
    tenth of --lr over the warm-up, then half a cosine to 0."""
    if epoch < flags.warmup:
        return flags.lr * (0.1 + 0.9 * epoch / flags.warmup)
    return flags.lr * 0.5 * (1 + math.cos(math.pi * (epoch - flags.warmup) / max(1, flags.epochs - flags.warmup)))


def smoothed_cross_entropy(logits, labels, smoothing):
    """Mean cross entropy of [N, C] logits against targets that give ``smoothing`` of their weight to all classes alike
    (Szegedy et al., arXiv 1512.00567, section 7). The same formula in every torch."""
    logs = F.log_softmax(logits.float(), 1)
    return (1 - smoothing) * F.nll_loss(logs, labels) - smoothing * logs.mean()


def counts_correct(logits, labels):
    """How many labels are the first, and among the first five, of [N, C] logits: two tensors."""
    top = logits.topk(min(5, logits.shape[1]), 1)[1]
    hits = (top == labels.view(-1, 1)).float()
    return hits[:, 0].sum(), hits.sum()


def average_batchnorm(model, team, sums=()):
    """Gives all processes the mean of their running statistics, so that they evaluate one and the same model. Returns
    a row a process: what its own were, then its ``sums``; in float64, which float32 passes through unchanged."""
    statistics = torch.cat([b for b in model.buffers() if b.is_floating_point()]).cpu().double()
    rows = team.gather(torch.cat([statistics, torch.tensor(sums, dtype=torch.float64)]))
    set_batchnorm(model, rows.mean(0))
    return rows


def set_batchnorm(model, row):
    """Takes the running statistics from a row of ``average_batchnorm``."""
    first = 0
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(row[first:first + len(buffer)])
            first += len(buffer)


def make_deterministic():
    """Has torch use its deterministic algorithms, on every device."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    if hasattr(torch, "use_deterministic_algorithms"):
        torch.use_deterministic_algorithms(True)
    if hasattr(torch.utils, "deterministic"):
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written


# ---------------------------------------------------------------------------------------------------------------------
# Training loop
# ---------------------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """A signal ended the run after it was saved."""

    def __init__(self, signum):
        self.signum = signum


@dataclass
class Progress:
    """Where a run is: what a checkpoint carries besides tensors."""

    epoch: int = 0
    images: int = 0  # done in this epoch, all processes
    best_acc1: float = 0.0
    rows: list = field(default_factory=list)  # of metrics.csv
    sums: list = field(default_factory=lambda: [0.0] * 4)  # this process, this epoch: loss, top 1, top 5, steps


@dataclass
class Run:
    """The parts of a run, as the functions below share them."""

    flags: argparse.Namespace
    runtime: Runtime
    team: Team
    precision: Precision
    model: torch.nn.Module
    val_loader: torch.utils.data.DataLoader
    log: "Log"
    bad: set = field(default_factory=set)  # paths of the images that can't be read
    progress: Progress = field(default_factory=Progress)
    train_model: torch.nn.Module = None
    optimizer: torch.optim.Optimizer = None
    train_loader: torch.utils.data.DataLoader = None
    seed: int = 0
    steady_images: int = 0  # by this start of the run, first steps left out; with the seconds they took
    steady_seconds: float = 0.0


def train_epoch(run):
    """The rest of the current epoch; gives its part of a row of metrics.csv. Raises Stopped once a signal has come and
    the run is saved, Fault where the loss is not finite, too many images can't be read or another process is gone."""
    flags, progress, order = run.flags, run.progress, run.train_loader.sampler
    order.epoch, order.first = progress.epoch, progress.images
    done = progress.images // order.total
    steps = done + len(order)
    run.model.train(not flags.freeze_bn)
    run.model.classifier.train()  # dropout
    meter = Meter(run, steps)
    batches = to_device(run.train_loader, run.runtime, run.precision.input_dtype)
    for step in range(done, steps):
        images, labels, bad = meter.wait_for(batches)
        lr = run.optimizer.param_groups[0]["lr"] = learning_rate(flags, progress.epoch + step / steps)
        # Dropout draws the same whether or not the run was interrupted, with no generator's state in the checkpoint.
        numbers = np.random.SeedSequence((run.seed, progress.epoch, progress.images, run.runtime.rank))
        torch.manual_seed(int(numbers.generate_state(1)[0]))
        with run.precision.autocast():
            logits = run.train_model(images)
            loss = smoothed_cross_entropy(logits, labels, flags.label_smoothing)
        run.precision.backward_and_step(loss, run.model, run.optimizer)
        progress.images += order.total
        meter.add(step, lr, loss.detach(), *counts_correct(logits.detach(), labels))

        stop = share_news(run, run.train_loader, bad)
        if step % flags.print_freq == 0:
            meter.print_step(step)
        if stop or (flags.save_freq and (progress.epoch * steps + step + 1) % flags.save_freq == 0):
            meter.read()
            save(run)
        if stop:
            raise Stopped(stop)
    return meter.finish()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation
# ---------------------------------------------------------------------------------------------------------------------


def evaluate(run):
    """Every validation image once, whatever the number of processes and the batch size; one that can't be read counts
    as wrong. Returns loss (cross entropy, without label smoothing), Acc@1 and Acc@5 in per cent, and images per second.
    Raises Stopped where a signal came: the evaluation is done anew at the next start."""
    order, team, model = run.val_loader.sampler, run.team, run.model.eval()
    if run.precision.level == "O0" and run.runtime.kind.name == "cpu":
        model = fold_batchnorm(model)
    sums = torch.zeros(3, device=run.runtime.device)
    seen, readable, begin, steps = 0, 0, time.monotonic(), len(order)
    no_grad = getattr(torch, "inference_mode", torch.no_grad)
    batches = to_device(run.val_loader, run.runtime, run.precision.input_dtype)
    for step in range(steps):
        images, labels, bad = next(batches, (None, (), ()))
        if len(labels):
            with no_grad(), run.precision.autocast():
                logits = model(images).float()
                loss = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
                sums += torch.stack((loss,) + counts_correct(logits, labels))
            seen, readable = seen + len(labels), readable + len(labels) - len(bad)
        stop = share_news(run, run.val_loader, bad)
        if stop:
            raise Stopped(stop)
        if step % run.flags.print_freq == 0 and seen:
            loss, top1, top5 = sums.tolist()
            seconds, loss = (time.monotonic() - begin) / (step + 1), loss / max(1, readable)
            run.log.line(f"Test: [{step:{len(str(steps))}d}/{steps}]\tTime {seconds:6.3f}\tLoss {loss:.4e}\t"
                         f"Acc@1 {100 * top1 / seen:6.2f}\tAcc@5 {100 * top5 / seen:6.2f}")
    loss, top1, top5, seen, readable = team.sum(sums.tolist() + [seen, readable])
    if seen != order.count:
        raise Fault(f"evaluated {seen:.0f} images of {order.count}: this is a bug, please report it")
    acc1, acc5 = 100 * top1 / seen, 100 * top5 / seen
    run.log.line(f" * Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} ({top1:.0f} and {top5:.0f} of {seen:.0f} images)")
    return loss / max(1, readable), acc1, acc5, seen / (time.monotonic() - begin)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints
# ---------------------------------------------------------------------------------------------------------------------


def checkpoint_path(flags, age=0):
    """The newest checkpoint, or the one ``age`` saves older."""
    return os.path.join(flags.output_dir, f"checkpoint{f'-{age}' if age else ''}.pth.tar")


def snapshot(run):
    """All that a run needs to go on, as tensors and plain Python values; every process takes part."""
    progress, data = run.progress, run.train_loader.dataset.images
    # Each process's own running statistics and sums: what makes a resumed run the same to the last bit.
    rows = average_batchnorm(run.model, run.team, progress.sums)
    weights = run.model.state_dict()  # below in fp32, under O2 those that the optimiser steps
    weights.update(zip([name for name, _ in run.model.named_parameters()], stepped_parameters(run.optimizer)))
    for name, tensor in weights.items():
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        weights[name] = torch.empty(tensor.shape, dtype=dtype).copy_(tensor.detach())
    set_batchnorm(run.model, rows[run.runtime.rank])
    optimizer = run.optimizer.state_dict()
    group = optimizer["param_groups"][0]
    numbers = {name: place for place, name in enumerate(group["params"])}  # torch 1.5's are places in memory
    optimizer["state"] = {numbers[name]: {key: value.cpu() if torch.is_tensor(value) else value
                                          for key, value in state.items()}
                          for name, state in optimizer["state"].items()}
    group["params"] = list(numbers.values())
    return {
        "arch": run.flags.arch, "epoch": progress.epoch, "images": progress.images, "best_acc1": progress.best_acc1,
        "rows": progress.rows, "state_dict": weights, "optimizer": optimizer, "amp": run.precision.state_dict(),
        "processes": rows, "seed": run.seed, "classes": data.classes, "train_images": len(data),
        "batch": run.train_loader.sampler.total, "opt_level": run.precision.level,
    }


def save(run, best=False):
    """Writes checkpoint.pth.tar, and before it model_best.pth.tar if this is it: after a fault between the two, the
    evaluation that chose the best is done again."""
    payload = snapshot(run)
    if run.runtime.is_main:
        content = serialise(payload)
        if best:
            write_file(content, os.path.join(run.flags.output_dir, "model_best.pth.tar"))
        newest, *older = [checkpoint_path(run.flags, age) for age in range(run.flags.keep)]
        write_file(content, newest, older)


def serialise(payload):
    """The bytes of a checkpoint file: a zip, each part with a checksum. torch 1.8 aborts where it writes to a full disk
    itself."""
    content = io.BytesIO()
    # Not torch.save, in whose place torch_npu puts one that in some versions drops strings.
    torch.serialization.save(payload, content, _use_new_zipfile_serialization=True)
    return content.getbuffer()


def write_file(content, path, older=()):
    """Writes bytes under a temporary name, flushes, then renames; what was there before moves to the ``older`` names.
    Raises Fault where the disk is full, or the folder can't be written to; the files there are then as they were."""
    temporary, names = path + ".tmp", [path, *older]
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        for source, target in reversed(list(zip(names, names[1:]))):
            if os.path.exists(source):
                with contextlib.suppress(FileNotFoundError):
                    os.remove(target)
                try:
                    os.link(source, target)  # a second name: the first is never without a file
                except OSError:  # links can't be here
                    os.replace(source, target)
        os.replace(temporary, path)
        folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise Fault(f"can't write {path}: {first_line(error)}; {last_good(os.path.dirname(path))}. Make room, or give "
                    "another --output-dir")


def last_good(folder):
    """What to go on from after a fault, in words."""
    path = os.path.join(folder, "checkpoint.pth.tar")
    return "the last good checkpoint is " + path if os.path.exists(path) else "there is no checkpoint yet"


class SafePickle:
    """Stands in for the pickle module where torch.load has no ``weights_only``: tensors and plain values, no code."""

    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            if re.fullmatch(r"collections\.OrderedDict|torch\._utils\._rebuild_(tensor_v2|parameter)|"
                            r"torch\.(Size|\w*Storage)", f"{module}.{name}"):
                return super().find_class(module, name)
            raise pickle.UnpicklingError(f"{module}.{name}")

    @classmethod
    def load(cls, file, **options):
        return cls.Unpickler(file, **options).load()


def read_checkpoint(path):
    """A checkpoint file as a dictionary; never runs code from it. Raises Fault where there is no such file, it is
    damaged, or it holds more than tensors and plain values."""
    safe = {"weights_only": True} if accepts(torch.load, "weights_only") else {"pickle_module": SafePickle}
    try:
        with open(path, "rb") as file:
            broken = zipfile.ZipFile(file).testzip() if file.read(2) == b"PK" else None
        if broken:
            raise Fault(f"{path} is damaged: its part {broken} does not match its checksum. Use another file")
        loaded = torch.load(path, map_location="cpu", **safe)
    except Fault:
        raise
    except FileNotFoundError:
        raise Fault(f"no checkpoint {path!r}: give a file that is there")
    except pickle.UnpicklingError as error:
        named = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))  # in torch's page-long message
        raise Fault(f"{path} holds other things than tensors and plain values, and was not loaded, since they could "
                    f"run code ({named.group(1) if named else first_line(error)}). Save its state_dict alone")
    except Exception as error:  # damaged bytes lead to almost any
        raise Fault(f"{path} is damaged or no checkpoint ({first_line(error)}). Use another file")
    if not isinstance(loaded, dict):
        raise Fault(f"{path} holds a {type(loaded).__name__}, expected a state dict or a checkpoint")
    return loaded


def find_checkpoint(flags):
    """(checkpoint, its path) that --resume asks for: of 'auto' the newest good one in --output-dir; ({}, None) where
    none is asked for or there is none. Raises Fault where the file can't be used, of 'auto' none of those there."""
    if flags.resume != "auto":
        return (read_checkpoint(flags.resume), flags.resume) if flags.resume else ({}, None)
    paths = [path for path in (checkpoint_path(flags, age) for age in range(100)) if os.path.exists(path)]
    for path in paths:
        try:
            return read_checkpoint(path), path
        except Fault as fault:
            print(f"=> {fault}; trying the one before", file=sys.stderr, flush=True)
    if paths:
        raise Fault(f"--resume auto: none of {', '.join(paths)} can be used; remove them to start anew")
    if flags.evaluate and not flags.pretrained:
        raise Fault(f"--resume auto: no checkpoint in {flags.output_dir!r} to evaluate; name a file")
    return {}, None


def load_weights(model, checkpoint, path, new_classifier=False):
    """Fills a model from a checkpoint of ours or the reference's, or from a plain state dict. Raises Fault where the
    file is of another network or number of classes, which with ``new_classifier`` leaves the classifier as it is."""
    state = checkpoint.get("state_dict", checkpoint)
    if not isinstance(state, dict):
        raise Fault(f"{path} is no MnasNet checkpoint: its state_dict is a {type(state).__name__}")
    for prefix in ("module.", "_orig_mod."):
        if all(str(name).startswith(prefix) for name in state):
            versions = getattr(state, "_metadata", {})  # of the modules, whose names end without a dot
            state = OrderedDict((name[len(prefix):], value) for name, value in state.items())
            state._metadata = {(name + ".")[len(prefix):-1]: value for name, value in versions.items() if name}
    weight = state.get("classifier.1.weight")
    if not torch.is_tensor(weight):
        raise Fault(f"{path} is no MnasNet checkpoint: it has no classifier.1.weight")
    if len(weight) != model.num_classes:
        if not new_classifier:
            raise Fault(f"{path} was trained for {len(weight)} classes, the data has {model.num_classes}: give the "
                        "data it was trained on")
        state.update(("classifier.1." + name, p) for name, p in model.classifier[1].state_dict().items())
        print(f"=> {len(weight)} classes in {path}, {model.num_classes} here: the classifier starts fresh", flush=True)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        arch, detail = checkpoint.get("arch"), "".join(str(error).splitlines()[1:2]).strip()[:200]
        raise Fault(f"{path} does not fit mnasnet with alpha {model.alpha}"
                    f"{f', it is of {arch}' if isinstance(arch, str) else ''}: pass its own -a ({detail})")


def load_pretrained(model, flags):
    """torchvision's published weights for the arch, from --weights or else from the net, hash checked; their path."""
    path = flags.weights
    if not path:
        url, hub = mnasnet.WEIGHTS[flags.arch], torch.hub
        home = hub.get_dir() if hasattr(hub, "get_dir") else hub._get_torch_home()
        name = os.path.basename(url)
        path = os.path.join(home, "checkpoints", name)
        if not os.path.exists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            try:
                hub.download_url_to_file(url, path, name[:-4].rsplit("-", 1)[1], progress=False)
            except (OSError, RuntimeError) as error:
                raise Fault(f"can't fetch {url} ({first_line(error)}): fetch it by hand and pass --weights FILE")
    load_weights(model, read_checkpoint(path), path, new_classifier=True)
    return path


def load_momentum(optimizer, saved):
    """Takes the momentum, and the last learning rate, from the state dict of any torch's SGD. Not by
    ``load_state_dict``, which would also take what that SGD was: fused or not, as suited its torch and its device."""
    names = [name for group in saved["param_groups"] for name in group["params"]]
    parameters = stepped_parameters(optimizer)
    if len(names) != len(parameters):
        raise ValueError(f"it steps {len(names)} parameters, this one {len(parameters)}")
    optimizer.param_groups[0]["lr"] = saved["param_groups"][0]["lr"]
    for name, parameter in zip(names, parameters):
        if saved["state"].get(name):
            momentum = torch.empty_like(parameter)  # in the weight's order in memory, which the fused one needs
            optimizer.state[parameter]["momentum_buffer"] = momentum.copy_(saved["state"][name]["momentum_buffer"])


def restore(run, checkpoint, path):
    """Puts a run where a checkpoint of ours, or as far as it goes one of the reference's, left off."""
    classes = run.train_loader.dataset.images.classes
    if checkpoint.get("classes", classes) != classes:
        raise Fault(f"{path} was trained on other classes than the data has: give the data it was trained on")
    if "optimizer" in checkpoint:
        try:
            load_momentum(run.optimizer, checkpoint["optimizer"])
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise Fault(f"{path}: its optimiser does not fit ({type(error).__name__}: {first_line(error)})")
    run.precision.load_state_dict(checkpoint.get("amp"))
    run.progress = Progress(int(checkpoint.get("epoch", 0)), int(checkpoint.get("images", 0)),
                            float(checkpoint.get("best_acc1", 0)), list(checkpoint.get("rows", [])))
    if run.progress.images > run.train_loader.sampler.count:
        raise Fault(f"{path} is {run.progress.images} images into an epoch, and the data has fewer: give the data it "
                    "was trained on")
    run.log.line(f"=> resumed from {path}: epoch {run.progress.epoch}, {run.progress.images} images into it")
    if "processes" in checkpoint:
        restore_processes(run, checkpoint)
    if run.runtime.is_main and run.progress.rows:
        write_metrics(run.flags, run.progress.rows)


def restore_processes(run, checkpoint):
    """What each process had for itself, or where their number changed, an equal share of it."""
    rows, order, size = checkpoint["processes"], run.train_loader.sampler, run.team.size
    if len(rows) == size:
        row, changes = rows[run.runtime.rank], []
    else:
        row, changes = rows.mean(0), [f"{len(rows)} processes, now {size}"]
        row[-4:] *= len(rows) / size
    set_batchnorm(run.model, row)
    run.progress.sums = row[-4:].tolist()
    now = {"seed": run.seed, "train_images": order.count, "batch": order.total, "opt_level": run.precision.level}
    changes += [f"{name.replace('_', ' ')} {checkpoint.get(name)}, now {value}" for name, value in now.items()
                if checkpoint.get(name) != value]
    if changes:
        run.log.line(f"=> the result is no longer bit-identical to a run without a break: it had {'; '.join(changes)}")


# ---------------------------------------------------------------------------------------------------------------------
# Metering
# ---------------------------------------------------------------------------------------------------------------------

COLUMNS = ("epoch", "lr", "train_loss", "train_acc1", "val_loss", "acc1", "acc5", "fps", "seconds", "data_wait")
SKIPPED_STEPS = 5  # of a process's first epoch: compilation, cold caches and the loaders' start are not steady state
OVERFLOWS = 20  # steps in a row with a loss that is not finite, under a loss scale; 16 halvings of 65536 leave 1


class Log:
    """What the first process prints, and writes to TensorBoard; the others stay silent."""

    def __init__(self, flags, runtime):
        self.is_main, self.events = runtime.is_main, None
        if flags.tensorboard and self.is_main:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise Fault("--tensorboard needs the tensorboard package: pip install tensorboard, or leave it out")
            self.events = SummaryWriter(flags.tensorboard)

    def line(self, text):
        if self.is_main:
            print(text, flush=True)

    def scalars(self, row):
        if self.events:
            for name in COLUMNS[1:]:
                self.events.add_scalar(name, row[name], row["epoch"])
            self.events.flush()


def why_bad(images, index):
    """The decoder's reason, in one line; the loaders hand over only which images they could not read."""
    try:
        images.read(index, val_plan(64, 64), 64)
    except (OSError, ValueError) as error:
        return first_line(error).replace("\t", " ")
    return "could not be read before, and can now"


def share_news(run, loader, mine):
    """What the processes tell each other after a step: the signal that any has had (0: none), and the images that any
    could not read (``mine``: this one's indices), each named once in the log and in bad_images.txt. Raises Fault where
    there are more of them than --max-bad, or the file can't be written."""
    stop, most = run.team.poll(len(mine))
    if not most:
        return stop
    images, row = loader.dataset.images, torch.tensor(list(mine) + [-1] * (most - len(mine)))
    listed = os.path.join(run.flags.output_dir, "bad_images.txt")
    for index in sorted(set(run.team.gather(row).flatten().tolist()) - {-1}):
        path = images.path(index)
        if path not in run.bad and run.runtime.is_main:
            name = path if path.isprintable() else path.encode("unicode_escape").decode()
            reason = why_bad(images, index)
            run.log.line(f"=> can't read {name}: {reason}")
            try:
                with open(listed, "a+", encoding="utf-8", errors="surrogateescape") as file:
                    file.seek(0)
                    if name not in {line.split("\t")[0] for line in file}:  # of an earlier start of the run
                        file.write(f"{name}\t{reason}\n")
            except OSError as error:
                raise Fault(f"can't write {listed}: {first_line(error)}. Give another --output-dir")
        run.bad.add(path)
    limit = run.flags.max_bad if run.flags.max_bad is not None else max(10, len(images) // 1000)
    if len(run.bad) > limit:
        raise Fault(f"{len(run.bad)} images can't be read, more than --max-bad {limit}: see {listed}")
    return stop


class Meter:
    """The figures of one epoch. It reads back from the device only when it prints or when the run is saved."""

    def __init__(self, run, steps):
        self.run, self.steps, self.unread, self.overflows = run, steps, [], 0
        order = run.train_loader.sampler
        self.total, self.skip = order.total, 0 if run.steady_images else min(SKIPPED_STEPS, len(order) // 2)
        self.taken, self.waited = 0, 0.0
        self.begin = self.printed = self.steady = self.mark()

    def mark(self):
        """A point to measure from: (time, steps taken, seconds spent waiting for images)."""
        return time.monotonic(), self.taken, self.waited

    def since(self, mark):
        """(seconds a step, seconds of waiting a step)."""
        begin, taken, waited = mark
        return (time.monotonic() - begin) / (self.taken - taken), (self.waited - waited) / (self.taken - taken)

    def wait_for(self, batches):
        begin = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - begin
        return batch

    def add(self, step, lr, *figures):
        """Takes the loss and the counts of a step, still on the device."""
        self.unread.append((step, lr, torch.stack([f.float() for f in figures])))
        self.taken += 1
        if self.taken == self.skip:
            self.run.runtime.synchronize()
            self.steady = self.mark()

    def read(self):
        """Adds to the sums what has come since the last time; gives the last step's [loss, top 1, top 5], if any.
        Raises Fault where a loss is not finite."""
        values = torch.stack([figures for _, _, figures in self.unread]).tolist() if self.unread else [None]
        progress, scales = self.run.progress, self.run.precision.scales
        for (step, lr, _), (loss, top1, top5) in zip(self.unread, values):
            finite = math.isfinite(loss)
            self.overflows = 0 if finite else self.overflows + 1
            if not finite and (not scales or self.overflows >= OVERFLOWS):
                before = f", as in the {OVERFLOWS - 1} steps before it" if scales else ""
                raise Fault(f"the loss is {loss} at epoch {progress.epoch} step {step} (lr {lr:.6g}){before}; "
                            f"{last_good(self.run.flags.output_dir)}. Try a lower --lr or a longer --warmup")
            added = (loss if finite else 0.0, top1, top5, 1)
            progress.sums = [total + value for total, value in zip(progress.sums, added)]
        self.unread = []
        return values[-1]

    def print_step(self, step):
        """The line every --print-freq steps: each figure of now, and in brackets its average over the epoch. The
        figures of training are this process's, the FPS those of all."""
        loss, top1, top5 = self.read()
        run, progress, batch = self.run, self.run.progress, self.run.train_loader.sampler.batch_size
        mean_loss, mean1, mean5 = (total / progress.sums[3] for total in progress.sums[:3])
        (seconds, wait), (mean_seconds, mean_wait) = self.since(self.printed), self.since(self.begin)
        steady = self.since(self.steady)[0] if self.taken > self.skip else mean_seconds
        left = self.steps - step - 1 + self.steps * (run.flags.epochs - progress.epoch - 1)
        run.log.line("\t".join([
            f"Epoch: [{progress.epoch}][{step:{len(str(self.steps))}d}/{self.steps}]",
            f"Time {seconds:6.3f} ({mean_seconds:6.3f})",
            f"Data {wait:6.3f} ({mean_wait:6.3f})",
            f"Loss {loss:.4f} ({mean_loss:.4f})",
            f"Acc@1 {100 * top1 / batch:6.2f} ({100 * mean1 / batch:6.2f})",
            f"Acc@5 {100 * top5 / batch:6.2f} ({100 * mean5 / batch:6.2f})",
            f"ETA {datetime.timedelta(seconds=int(left * steady))}",
            f"FPS {self.total / seconds:.2f} ( {self.total / steady:.2f} )"]))
        self.printed = self.mark()

    def finish(self):
        """The epoch's part of a row of metrics.csv, all processes counted."""
        run, loader = self.run, self.run.train_loader
        self.read()
        run.runtime.synchronize()
        seconds, steady = time.monotonic() - self.begin[0], time.monotonic() - self.steady[0]
        images = self.total * (self.taken - self.steady[1])
        run.steady_images, run.steady_seconds = run.steady_images + images, run.steady_seconds + steady
        loss, top1, _, steps, waited = run.team.sum(run.progress.sums + [self.waited])
        share = waited / run.team.size / seconds
        if share > 0.1:
            more = "" if loader.num_workers < usable_cores() else ", or give the machine more or faster cores"
            run.log.line(f"=> {100 * share:.0f} % of epoch {run.progress.epoch} was spent waiting for images: "
                         f"raise --workers (now {loader.num_workers}){more}")
        return {"train_loss": loss / steps, "train_acc1": 100 * top1 / steps / loader.sampler.batch_size,
                "fps": images / steady, "seconds": seconds, "data_wait": share}


def write_metrics(flags, rows):
    lines = [COLUMNS] + [[str(row["epoch"])] + [f"{row[name]:.6g}" for name in COLUMNS[1:]] for row in rows]
    write_file("".join(",".join(line) + "\n" for line in lines).encode(), os.path.join(flags.output_dir, "metrics.csv"))


def profile(run):
    """Profiles a few training steps: a Chrome trace in --output-dir, and the ten costliest operators on the log."""
    warm, steps, there = 3, 5, len(run.train_loader.sampler)
    if there < warm + steps:
        raise Fault(f"--run-prof needs {warm + steps} steps, the data has {there}: lower --batch-size")
    batches = to_device(run.train_loader, run.runtime, run.precision.input_dtype)
    run.model.train()

    def take(steps):
        for _ in range(steps):
            images, labels, _ = next(batches)
            with run.precision.autocast():
                loss = smoothed_cross_entropy(run.train_model(images), labels, run.flags.label_smoothing)
            run.precision.backward_and_step(loss, run.model, run.optimizer)
        run.runtime.synchronize()

    take(warm)
    profiler, name, options = torch.autograd.profiler.profile, run.runtime.kind.module, {}
    if name:
        options = {"use_device": name} if accepts(profiler.__init__, "use_device") else {"use_" + name: True}
        if options.get("use_device") == "cuda":
            options["use_kineto"] = True  # or no kernel is in the trace
    with profiler(**options) as record:
        take(steps)
    if run.runtime.is_main:
        path = os.path.join(run.flags.output_dir, "trace.json")
        record.export_chrome_trace(path)
        order = "cuda_time_total" if name == "cuda" else "self_cpu_time_total"
        print(record.key_averages().table(sort_by=order, row_limit=10))
        print(f"=> {steps} steps profiled; open {path} in chrome://tracing", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# Entry
# ---------------------------------------------------------------------------------------------------------------------


def train(run):
    """All epochs that are left, each with its evaluation and its checkpoint."""
    flags, progress, log = run.flags, run.progress, run.log
    while progress.epoch < flags.epochs:
        row = train_epoch(run)
        average_batchnorm(run.model, run.team)
        try:
            val_loss, acc1, acc5, _ = evaluate(run)
        except Stopped:
            save(run)
            raise
        lr = learning_rate(flags, progress.epoch)
        row.update(epoch=progress.epoch, lr=lr, val_loss=val_loss, acc1=acc1, acc5=acc5)
        best = acc1 > progress.best_acc1 or not progress.rows
        progress.rows = [old for old in progress.rows if old["epoch"] < progress.epoch] + [row]
        progress.best_acc1 = max(acc1, progress.best_acc1)
        progress.epoch, progress.images, progress.sums = progress.epoch + 1, 0, [0.0] * 4
        save(run, best)
        if run.runtime.is_main:
            write_metrics(flags, progress.rows)
        log.scalars(row)
        log.line(f"=> epoch {row['epoch']} took {row['seconds']:.1f} s: loss {row['train_loss']:.4f}, best Acc@1 "
                 f"{progress.best_acc1:.3f}, FPS {row['fps']:.2f} ( {row['fps']:.2f} )")
    if not progress.rows:
        raise Fault(f"nothing to do: the next epoch is {progress.epoch}, and --epochs {flags.epochs} are to be done")
    best, last = max(progress.rows, key=lambda row: row["acc1"]), progress.rows[-1]
    if run.steady_images:
        fps = run.steady_images / run.steady_seconds
    else:  # only an evaluation was left to do
        fps = next((row["fps"] for row in reversed(progress.rows) if row["fps"]), 0.0)
    print_result(log, best["acc1"], best["acc5"], fps, last["train_loss"])


def print_result(log, acc1, acc5, fps, loss):
    """The line that the launch scripts read."""
    log.line(f"Result: Acc@1 {acc1:.3f} Acc@5 {acc5:.3f} images/sec {fps:.2f} loss {loss:.4f}")


def describe_speed(runtime, memory_kept, dtype):
    """The log's line of what makes a run fast here, and what this torch or machine lacks; None: of no use here."""
    kind = runtime.kind
    levers = [
        ("channels_last", runtime.channels_last if kind.channels_last else None),
        ("freed memory kept", memory_kept),
        ("own depthwise gradients", has_fast_depthwise(dtype) if kind.name == "cpu" else None),
        ("torchvision's JPEG decoder", fast_decoder() is not None),
        ("lasting loader processes", accepts(torch.utils.data.DataLoader.__init__, "persistent_workers")),
        ("fused SGD", has_fused_sgd(runtime.device) if kind.name != "npu" else None),
    ]
    there, missing = (", ".join(name for name, found in levers if found is wanted) for wanted in (True, False))
    return f"=> for speed: {there or 'nothing'}{'; not here: ' + missing if missing else ''}"


def prepare(flags, runtime, team, notes, checkpoint, path):
    """A run with all that an evaluation needs: the model, filled from what was asked for, and the validation images."""
    log = Log(flags, runtime)
    # --seed, or the interrupted run's, or one drawn by the first process
    seed = flags.seed if flags.seed is not None else checkpoint.get("seed", random.SystemRandom().randrange(2 ** 31))
    seed = int(team.first(seed))
    if flags.seed is not None:
        make_deterministic()
    elif runtime.module:
        torch.backends.cudnn.benchmark = True
    torch.manual_seed(seed)

    train_images, val_images = open_images(flags)
    batch = flags.batch_size // runtime.local_size
    workers = flags.workers if flags.workers is not None else share_of_cores(runtime.local_size)
    precision = Precision(flags, runtime)
    log.line(f"=> {flags.arch} on {runtime.device}{' ({})'.format('; '.join(notes)) if notes else ''}, {team.size} "
             f"process(es) of {batch} images a step, {workers} worker(s) each, {precision}, seed {seed}")
    if batch < 1:
        raise Fault(f"--batch-size {flags.batch_size} is less than an image for each of {runtime.local_size} processes")
    model = build_model(flags, runtime, len(val_images.classes), precision.conv_dtype)
    if flags.pretrained:
        log.line(f"=> weights of {load_pretrained(model, flags)}")
    if checkpoint:
        load_weights(model, checkpoint, path)
    memory_kept = keep_freed_memory(runtime.local_size) if runtime.kind.name == "cpu" else None
    log.line(describe_speed(runtime, memory_kept, precision.conv_dtype))
    run = Run(flags, runtime, team, precision, model, make_loader(val_images, flags, runtime, batch, workers), log,
              seed=seed)
    if not flags.evaluate:
        total = batch * runtime.world_size
        if len(train_images) < total:
            raise Fault(f"{len(train_images)} training images are fewer than the {total} of a step: lower --batch-size")
        run.train_loader = make_loader(train_images, flags, runtime, batch, workers, seed)
    return run


def work(flags, runtime, team, notes):
    """What a process does from meeting the others to the result."""
    checkpoint, path = find_checkpoint(flags)
    run = prepare(flags, runtime, team, notes, checkpoint, path)
    parameters = run.precision.prepare(run.model)
    if flags.evaluate:
        team.listen()
        loss, acc1, acc5, fps = evaluate(run)
        return print_result(run.log, acc1, acc5, fps, loss)
    optimizer = build_optimizer(flags, runtime, run.precision, parameters)
    run.model, run.optimizer = run.precision.initialize(run.model, optimizer)
    run.train_model = wrap_for_training(run.model, flags, runtime, run.precision)
    run.progress.epoch = flags.start_epoch
    with lock_folder(flags) if runtime.is_main else contextlib.nullcontext():
        if checkpoint:
            restore(run, checkpoint, path)
        team.listen()
        (profile if flags.run_prof else train)(run)


@contextlib.contextmanager
def lock_folder(flags):
    """Holds --output-dir for this run alone.

    Raises:
        Fault: another run writes there, or it can't be made.
    """
    try:
        os.makedirs(flags.output_dir, exist_ok=True)
        folder = os.open(flags.output_dir, os.O_RDONLY)
    except OSError as error:
        raise Fault(f"can't use --output-dir {flags.output_dir!r}: {error.strerror}")
    limit = time.monotonic() + 10  # what is left of a run that was killed may take some seconds to go
    try:
        while True:
            try:
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > limit:
                    raise Fault(f"another run writes to {flags.output_dir!r}: give this one its own --output-dir")
                time.sleep(0.1)
        yield
    finally:
        os.close(folder)


def print_error(fault, rank=""):
    text = str(fault).rsplit("Fault: ", 1)[-1].strip().replace("\n", " ")  # torch puts a traceback before a loader's
    print(f"main.py: error: {rank}{text}", file=sys.stderr, flush=True)


def worker(flags, kind, notes):
    """One process of a run, from the device to the exit status."""
    runtime = open_device(flags, kind)
    team = Team(flags, runtime)
    status = 0
    try:
        with team.faults():
            work(flags, runtime, team, notes)
    except Stopped as stopped:
        status = 128 + stopped.signum
        if runtime.is_main:
            saved = "" if flags.evaluate else ", saved; --resume auto goes on from here"
            print(f"=> {signal.Signals(stopped.signum).name}: stopped{saved}", file=sys.stderr, flush=True)
    except Fault as fault:
        status = 1
        if team.speaks_first():
            print_error(fault, f"rank {runtime.rank}: " if team.size > 1 else "")
    except Exception:
        if team.size == 1:
            raise
        traceback.print_exc()
        status = 1
    finally:
        end_loaders()
    if team.size > 1:
        if status:  # the others may be gone, and torch would wait for them
            sys.stdout.flush()
            os._exit(status)
        dist.destroy_process_group()
    return status


def check_data(flags):
    """Reads every image and lists the bad ones; the exit status."""
    runtime, found = Runtime(KINDS["cpu"], torch.device("cpu")), 0
    workers = flags.workers if flags.workers is not None else usable_cores()
    for name in ("train", "val"):
        images, done, begin = open_folder(flags, name), 0, time.monotonic()
        for _, labels, bad in make_loader(images, flags, runtime, 64, workers):
            done, found = done + len(labels), found + len(bad)
            for index in bad:
                print(f"bad: {ascii(images.path(index))[1:-1]}\t{why_bad(images, index)}")
            if done % 6400 < 64 or done == len(images):
                print(f"{name}: {done} of {len(images)} images, {done / (time.monotonic() - begin):.0f} a second",
                      file=sys.stderr, flush=True)
    print(f"{found} bad image(s)")
    return 1 if found else 0


def launch(flags, argv, kind):
    """Starts one process a card of this node, and ends them all when one fails; gives their exit status."""
    children, cards = [], flags.device_list
    with tempfile.TemporaryDirectory(prefix="mnasnet-") as folder:
        url = flags.dist_url
        if flags.nodes == 1 and url == "env://" and "MASTER_ADDR" not in os.environ:
            url = "file://" + os.path.join(folder, "meeting")  # one node needs no port
        environment = dict(os.environ)
        if kind.name == "cpu":
            environment.setdefault("OMP_NUM_THREADS", str(share_of_cores(len(cards))))
        for signum in SIGNALS:
            signal.signal(signum, lambda number, frame: tell(children, number))
        for place in range(len(cards)):
            command = [sys.executable, os.path.abspath(__file__), *argv, "--local_rank", str(place), "--dist-url", url,
                       "--device", kind.name, "--device-list", ",".join(map(str, cards))]
            children.append(subprocess.Popen(command, env=environment, start_new_session=True,
                                             preexec_fn=lambda: die_with_parent(signal.SIGTERM)))
        try:
            return watch(children, flags.node_rank * len(cards))
        finally:
            for child in children:  # with what it started: its process group
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def tell(children, signum):
    for child in children:
        if child.poll() is None:
            child.send_signal(signum)


def watch(children, first_rank):
    """Waits for the children. Once one has failed the others get 10 s to end, or 60 s to save after a signal."""
    deadline, status = math.inf, 0
    while True:
        codes = [child.poll() for child in children]
        failed = [(first_rank + place, code) for place, code in enumerate(codes) if code]
        if failed and not status:
            rank, code = failed[0]
            status = code if code > 0 else 128 - code
            saving = code in [128 + signum for signum in SIGNALS]
            deadline = time.monotonic() + (60 if saving else 10)
            if code < 0:
                print_error(f"rank {rank} was killed by {signal.Signals(-code).name}; ending the others")
            if not saving:
                tell(children, signal.SIGTERM)
        if None not in codes or time.monotonic() > deadline:
            return status
        time.sleep(0.05)


def main(argv=None):
    """The exit status of a command line."""
    argv = list(sys.argv[1:] if argv is None else argv)
    flags = parse_args(argv)
    try:
        if flags.check_data:
            return check_data(flags)
        kind, notes = choose_kind(flags)
        if flags.dist_backend not in (None, kind.collective, "gloo"):
            raise Fault(f"--dist-backend {flags.dist_backend} is not for {kind.name}: give {kind.collective}")
        if not flags.multiprocessing_distributed:
            return worker(flags, kind, notes)
        if not flags.device_list:
            if kind.name == "cpu":
                raise Fault("--multiprocessing-distributed on the cpu needs --device-list 0,1,...: a number a process")
            flags.device_list = list(range(cards_present(kind)[0]))
        if flags.local_rank is not None:
            return worker(flags, kind, notes)
        if not flags.synthetic:
            open_images(flags)  # one message, before as many processes say it
        return launch(flags, argv, kind)
    except Fault as fault:
        print_error(fault)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
