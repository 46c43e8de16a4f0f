"""Best Acc@1 of the recipes on a small set of images, beside the trainers that they come from.

DATA holds train/ and val/ with one folder of images per class, as for main.py. --timm is a checkout
of pytorch-image-models, whose train.py is run, and --torchvision the folder references/
classification of torchvision's repository; rows without their folder are left out.

Learning rates, decays and averages of the recipes are for hundreds of epochs. Here they are scaled
to --epochs, alike on both sides: one epoch of warm-up, steps of the exponential schedule in
proportion, an EMA of 0.99 for rmsprop, whose accuracy is that of the averaged model, and none for
strong. Defaults are those of each trainer, for the same number of epochs, batch size and image
size. Each row is trained once a seed.

The trainers draw their first weights from other ranges. Rows "from timm's (torchvision's) weights"
train main.py from weights that these have drawn, so that all settings are the same. torchvision's
BatchNorm has a momentum of 0.0003, too low for a few hundred steps: "strong, torchvision" is
trained with 0.1, torch's default.
"""

import csv
import functools
import pathlib
import re
import sys
import tempfile

import torch
import torchvision

import common


def count_classes(flags):
    return len(list((pathlib.Path(flags.data) / "train").iterdir()))


def draw_weights(package, flags, seed):
    """Returns the state dict of a network that timm or torchvision has just made."""
    torch.manual_seed(seed)
    if package == "timm":
        import timm
        name = common.TIMM_NAMES[flags.arch]
        return timm.create_model(name, num_classes=count_classes(flags)).state_dict()
    return getattr(torchvision.models, flags.arch)(num_classes=count_classes(flags)).state_dict()


def train_ours(flags, seed, options, weights_of=None):
    """The best Acc@1 of a run of main.py, in percent; from the weights of a package if named."""
    column = "ema_acc1" if "--ema" in options else "acc1"
    with tempfile.TemporaryDirectory(prefix="bench-") as output:
        if weights_of:
            path = pathlib.Path(output) / "first_weights.pth"
            torch.save(draw_weights(weights_of, flags, seed), str(path))
            options = [*options, "--pretrained", "--weights", path]
        common.run_python([
            common.ROOT / "main.py", flags.data, *common.shared_options(flags), "--seed", seed,
            "--workers", flags.workers, "--output-dir", output, *options,
            "--epochs", flags.epochs, "--train-crop-size", flags.size,
            "--val-crop-size", flags.size, "--val-resize-size", flags.size])
        with open(pathlib.Path(output) / "metrics.csv") as file:
            return max(float(row[column]) for row in csv.DictReader(file))


def train_with_timm(flags, seed, options):
    """The same of timm's train.py, which evaluates the averaged model if there is one."""
    with tempfile.TemporaryDirectory(prefix="bench-") as output:
        common.run_python([
            pathlib.Path(flags.timm) / "train.py", "--data-dir", flags.data, "--device", "cpu",
            "--model", common.TIMM_NAMES[flags.arch], "--num-classes", count_classes(flags),
            "--seed", seed, "--epochs", flags.epochs, "-b", flags.batch_size,
            "--workers", flags.workers, "--input-size", 3, flags.size, flags.size,
            "--crop-pct", 1, "--output", output, "--no-prefetcher", *options])
        summary, = pathlib.Path(output).rglob("summary.csv")
        with summary.open() as file:
            return max(float(row["eval_top1"]) for row in csv.DictReader(file))


# torchvision's train.py has no flags for the seed and the momentum, its first two arguments here.
TORCHVISION = """
import os, runpy, sys, torch, torchvision.models.mnasnet as mnasnet
torch.manual_seed(int(sys.argv[1]))
mnasnet._BN_MOMENTUM = float(sys.argv[2])
del sys.argv[:3]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def train_with_torchvision(flags, seed, options, momentum=1 - 0.9997):
    """The same of torchvision's train.py."""
    output = common.run_python([
        "-c", TORCHVISION, seed, momentum, pathlib.Path(flags.torchvision) / "train.py",
        "--data-path", flags.data, "--device", "cpu", "--model", flags.arch,
        "--epochs", flags.epochs, "-b", flags.batch_size, "-j", flags.workers,
        "--train-crop-size", flags.size, "--val-crop-size", flags.size,
        "--val-resize-size", flags.size, "--output-dir", "", *options])
    return max(map(float, re.findall(r"^Test: +Acc@1 ([\d.]+)", output, re.M)))


def make_rows(flags):
    """Returns name -> (function that trains, its options, its other arguments)."""
    decay = 2.4 * flags.epochs / 350  # epochs; 2.4 of the recipe's 350
    shared_by_timm = [
        "--color-jitter", 0, "--interpolation", "bilinear", "--train-interpolation", "bilinear",
        "--warmup-epochs", 1, "--sched-on-updates", "--smoothing", 0.1, "--drop", 0.2,
        "--weight-decay", 1e-5]
    modelzoo = ["--recipe", "modelzoo", "--lr", 0.03, "--warmup", 1, "--norm-weight-decay", 0,
                "--bias-weight-decay", 0]
    rmsprop = ["--recipe", "rmsprop", "--warmup", 1, "--decay-epochs", decay, "--ema", 0.99]
    strong = ["--recipe", "strong", "--warmup", 1]
    rows = {
        "modelzoo": (train_ours, modelzoo),
        "modelzoo, from timm's weights": (train_ours, modelzoo, "timm"),
        "modelzoo, timm": (train_with_timm, shared_by_timm + [
            "--opt", "sgd", "--lr", 0.03, "--warmup-lr", 0.003, "--warmup-prefix",
            "--sched", "cosine", "--min-lr", 0]),
        "rmsprop": (train_ours, rmsprop),
        "rmsprop, from timm's weights": (train_ours, rmsprop, "timm"),
        "rmsprop, timm": (train_with_timm, shared_by_timm + [
            "--opt", "rmsproptf", "--opt-eps", 1e-3, "--lr", 0.016 * flags.batch_size / 256,
            "--warmup-lr", 0, "--sched", "step", "--decay-epochs", decay, "--decay-rate", 0.97,
            "--bn-momentum", 0.01, "--bn-eps", 1e-3, "--model-ema", "--model-ema-decay", 0.99]),
        "strong": (train_ours, strong),
        "strong, from torchvision's weights": (train_ours, strong, "torchvision"),
        "strong, torchvision": (train_with_torchvision, [
            "--lr", 0.5 * flags.batch_size / 1024, "--lr-scheduler", "cosineannealinglr",
            "--lr-warmup-epochs", 1, "--lr-warmup-method", "linear", "--lr-warmup-decay", 0.01,
            "--wd", 2e-5, "--norm-weight-decay", 0, "--label-smoothing", 0.1,
            "--auto-augment", "ta_wide", "--random-erase", 0.1, "--mixup-alpha", 0.2,
            "--cutmix-alpha", 1.0], 0.1),
        "small": (train_ours, ["--recipe", "small"]),
        "defaults, timm": (train_with_timm, []),
        "defaults, torchvision": (train_with_torchvision, []),
    }
    folders = {train_ours: ".", train_with_timm: flags.timm,
               train_with_torchvision: flags.torchvision}
    wanted = flags.rows.split("/") if flags.rows else rows
    return {name: row for name, row in rows.items() if folders[row[0]] and name in wanted}


def parse_args():
    parser = common.make_parser(__doc__)
    parser.add_argument("data", metavar="DATA", help="folder with train/ and val/")
    common.add_model_flags(parser, "images a step", "side of an image")
    parser.set_defaults(arch="mnasnet0_5", batch_size=32, size=48)
    add = parser.add_argument
    add("--epochs", type=int, default=20, metavar="N", help="of each row")
    add("--workers", type=int, default=1, metavar="N", help="loader processes")
    add("--timm", metavar="DIR", help="checkout of pytorch-image-models")
    add("--torchvision", metavar="DIR", help="torchvision's references/classification")
    add("--rows", metavar="A/B", help="only these rows")
    return parser.parse_args()


def main():
    flags = parse_args()
    print(common.describe_machine(flags.device))
    rows = make_rows(flags)

    def train(row, seed):
        function, options, *more = rows[row]
        return function(flags, seed, options, *more)

    common.train_by_seed({name: functools.partial(train, name) for name in rows}, flags.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
