"""Images per second of training from files: reading, decoding, augmenting, training.

Compares main.py, run as a user would, with the loop that most ImageNet trainers have: Pillow,
RandomResizedCrop, flip, ToTensor and Normalize in a DataLoader with 4 workers, NCHW in fp32, and
the loss and the accuracies read back at every step. With --against DIR it compares main.py with
that of another checkout. All get the same JPEG files, network, batch size and number of steps,
each in a process of its own, in turn. The first 5 steps (at most half of them) are not counted.

O0 computes in fp32 like the baseline loop, O1 in low precision. With --optimisations, main.py also
runs on generated images (no file to read or decode) and without each of its optimisations. Take at
least 20 steps: the batches that the loaders have ready when the count begins cost nothing.
"""

import functools
import pathlib
import statistics
import sys
import tempfile
import time

import torch

import common


def batch_accuracy(logits, targets, k):
    """Acc@k of a batch, read back from the device."""
    top = logits.topk(min(k, logits.shape[1]), 1)[1]
    return 100 * (top == targets.view(-1, 1)).any(1).float().mean().item()


def baseline_loop(flags):
    """Trains for one epoch as most trainers do; prints the result as main.py does."""
    device = common.torch_device(flags)
    torch.backends.cudnn.benchmark = True
    loader = common.baseline_loader(flags, train=True)
    model = common.build_network(flags.arch).to(device)
    criterion = torch.nn.CrossEntropyLoss().to(device)
    optimizer = torch.optim.SGD(
        model.parameters(), 0.0, momentum=0.9, weight_decay=1e-5, nesterov=True)
    skipped = min(5, len(loader) // 2)
    losses, acc1, acc5 = [], [], []
    model.train()
    start = time.time()
    for step, (images, targets) in enumerate(loader):
        if step == skipped:
            start = time.time()  # the device is idle: .item() below waited for it
        images = images.to(device, non_blocking=True)
        targets = targets.to(device, non_blocking=True)
        logits = model(images)
        loss = criterion(logits, targets)
        losses.append(loss.item())
        acc1.append(batch_accuracy(logits, targets, 1))
        acc5.append(batch_accuracy(logits, targets, 5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    rate = flags.batch_size * (len(loader) - skipped) / (time.time() - start)
    print(f"Result: Acc@1 {statistics.mean(acc1):.3f} Acc@5 {statistics.mean(acc5):.3f} "
          f"images/sec {rate:.2f} loss {statistics.mean(losses):.4f}")


# Statements before main.main() that keep main.py from using one of its optimisations.
WITHOUT = {
    "channels_last": "main.BACKENDS[device] = "
                     "dataclasses.replace(main.BACKENDS[device], channels_last=False)",
    "reuse of freed memory": "mnasnet.keep_freed_memory = lambda processes: None",
    "fast depthwise gradients": "mnasnet.has_fast_depthwise = lambda dtype: False",
    "torchvision's JPEG decoder": "main.jpeg_decoder = lambda: None",
}

# Pieces of the recipes, as flags.
EMA = ["--ema", 0.9999]
MIXING = ["--mixup", 0.2, "--cutmix", 1]
AUGMENTATION = ["--auto-augment", "ta", "--random-erasing", 0.1]
PIECES = {"EMA": EMA, "MixUp and CutMix": MIXING, "TrivialAugment and RandomErasing": AUGMENTATION,
          "all of these": EMA + MIXING + AUGMENTATION}


def program_without(optimisation, device):
    """main.py without one optimisation, as arguments of the Python interpreter."""
    code = (f"import sys; sys.path.insert(0, {str(common.ROOT)!r}); "
            "import dataclasses, main, mnasnet; "
            f"device = {device!r}; {WITHOUT[optimisation]}; sys.exit(main.main())")
    return ["-c", code]


class Trainer:
    """Runs main.py for one short epoch; every method returns images per second."""

    def __init__(self, flags, folder, output):
        self.flags = flags
        self.folder = folder
        self.output = output

    def run(self, program, level, images):
        workers = [] if self.flags.workers is None else ["--workers", self.flags.workers]
        return common.images_per_second(common.run_python([
            *program, *images, *common.shared_options(self.flags), *workers, "--opt-level", level,
            "--epochs", 1, "--lr", 0, "--wd", 1e-5, "--train-crop-size", self.flags.size,
            "--output-dir", self.output]))

    def from_files(self, repository, level):
        return self.run([repository / "main.py"], level, [self.folder])

    def from_generated_images(self, level):
        count = self.flags.steps * self.flags.batch_size
        images = ["--synthetic", count, "--val-crop-size", 32, "--val-resize-size", 32]
        return self.run([common.ROOT / "main.py"], level, images)

    def without(self, optimisation, level):
        program = program_without(optimisation, self.flags.device)
        return self.run(program, level, [self.folder])


def piece_rows(flags, trainer):
    """The rows of --pieces, and the row that each is divided by (see common.comparison)."""
    rows, references = {}, {}
    program = [common.ROOT / "main.py"]
    for level in flags.levels.split(","):
        for name, options in PIECES.items():
            images = [trainer.folder, *options]
            rows[f"{level}, {name}"] = functools.partial(trainer.run, program, level, images)
            references[f"{level}, {name}"] = f"main.py {level}"
    return rows, references


def optimisation_rows(flags, trainer):
    """The rows of --optimisations, and the row that each is divided by (see common.comparison)."""
    rows, references = {}, {}
    for level in flags.levels.split(","):
        new = {f"{level}, generated images":
               functools.partial(trainer.from_generated_images, level)}
        for optimisation in WITHOUT:
            name = f"{level} without {optimisation}"
            new[name] = functools.partial(trainer.without, optimisation, level)
        rows.update(new)
        references.update(dict.fromkeys(new, f"main.py {level}"))
    return rows, references


def print_share_of_step(figures, level):
    """Prints how much of the time the step alone takes, and what is left to read an image."""
    from_files = figures.get(f"main.py {level}")
    generated = figures.get(f"{level}, generated images")
    if not from_files or not generated:
        return
    whole, step = statistics.median(from_files), statistics.median(generated)
    rest = common.usable_cores() * 1000 * (1 / whole - 1 / step)
    print(f"{level}: the training step takes {100 * whole / step:.0f} % of the time; the rest is "
          f"{rest:.1f} ms of one core an image")


def parse_args():
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--images", type=int, default=200, metavar="N",
        help="different images; they are repeated for the number of steps")
    add("--steps", type=int, default=25, metavar="N", help="steps of each run")
    add("--optimisations", action="store_true",
        help="also run on generated images, and without each optimisation of main.py")
    add("--pieces", action="store_true", help="also run with EMA, MixUp, CutMix, augmentation")
    common.add_comparison_flags(parser, "side of a training crop")
    return parser.parse_args()


def main():
    flags = parse_args()
    if flags.baseline_loop:
        return baseline_loop(flags)
    print(common.describe_machine(flags.device))
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = pathlib.Path(scratch) / "images"
        common.make_images(
            folder, flags.steps * flags.batch_size, common.CLASSES, flags.images)
        print(f"training from files: {flags.arch}, {flags.size} px, batch {flags.batch_size}, "
              f"{flags.steps} steps, {flags.device}")
        trainer = Trainer(flags, folder, pathlib.Path(scratch) / "output")

        def baseline():
            return common.images_per_second(common.run_baseline(__file__, flags, folder))

        rows, references = common.comparison(flags, baseline, trainer.from_files)
        columns = {flags.against or common.BASELINE: references}
        if flags.optimisations:
            more, columns["main.py"] = optimisation_rows(flags, trainer)
            rows.update(more)
        if flags.pieces:
            more, columns["main.py"] = piece_rows(flags, trainer)
            rows.update(more)
        figures = common.interleave(rows, flags.rounds)
    common.print_table(figures, columns)
    for level in flags.levels.split(","):
        print_share_of_step(figures, level)
    return 0 if len(figures) == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
