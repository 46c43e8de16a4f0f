"""Images per second of the whole training loop: reading, decoding, augmenting, training.

It compares main.py, run as a user would, with the loop that most ImageNet trainers have: Pillow, RandomResizedCrop,
flip, ToTensor and Normalize in a DataLoader with 4 workers, NCHW in fp32, and the loss and the accuracies read back
at every step. Both get the same JPEG files, network, batch size and number of steps, each in a process of its own,
in turn. The first 5 steps (at most half of them) are not counted, in both.

How to read it: "x usual" is the ratio of the medians. O0 computes in fp32 like the usual loop; O1 in low precision.
With --levers, "no files" is main.py on generated images, what the step alone allows, and each of main.py's levers is
left out in turn. Take at least 20 steps: the batches which the loaders have ready when the count begins are for free, in
both.
"""

import functools
import os
import pathlib
import statistics
import sys
import tempfile
import time

import torch

import common


def usual_loader(folder, flags):
    from torchvision import datasets, transforms

    steps = [transforms.RandomResizedCrop(flags.size), transforms.RandomHorizontalFlip(), transforms.ToTensor(),
             transforms.Normalize(common.MEAN, common.STD)]
    images = datasets.ImageFolder(folder, transforms.Compose(steps))
    return torch.utils.data.DataLoader(images, batch_size=flags.batch_size, shuffle=True, drop_last=True,
                                       num_workers=flags.usual_workers, pin_memory=flags.device == "gpu")


def usual_model(arch):
    """torchvision's network, or where it has none by that name this repository's, which is the same."""
    import torchvision

    build = getattr(torchvision.models, arch, None)
    if build is None:
        import mnasnet

        build = getattr(mnasnet, arch)
    return build(num_classes=common.CLASSES)


def accuracy(logits, labels, k):
    """Acc@k of a batch, read back."""
    top = logits.topk(min(k, logits.shape[1]), 1)[1]
    return 100 * (top == labels.view(-1, 1)).any(1).float().mean().item()


def usual_loop(flags):
    """One epoch; prints the result as main.py does."""
    device = torch.device("cuda" if flags.device == "gpu" else "cpu")
    torch.backends.cudnn.benchmark = True
    loader, model = usual_loader(os.path.join(flags.usual_loop, "train"), flags), usual_model(flags.arch).to(device)
    criterion = torch.nn.CrossEntropyLoss().to(device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-5, nesterov=True)
    skip, losses, top1, top5 = min(5, len(loader) // 2), [], [], []
    model.train()
    begin = time.time()
    for step, (images, labels) in enumerate(loader):
        if step == skip:
            begin = time.time()  # the .item() below waited for the device
        images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        logits = model(images)
        loss = criterion(logits, labels)
        losses.append(loss.item())
        top1.append(accuracy(logits, labels, 1))
        top5.append(accuracy(logits, labels, 5))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    rate = flags.batch_size * (len(loader) - skip) / (time.time() - begin)
    print("Result: Acc@1 {:.3f} Acc@5 {:.3f} images/sec {:.2f} loss {:.4f}".format(
        sum(top1) / len(top1), sum(top5) / len(top5), rate, sum(losses) / len(losses)))


# How main.py is kept from using each of its levers; for what they are, see there.
WITHOUT = {
    "channels_last": "import main; main.keeps_channels_last = lambda kind: False",
    "freed memory kept": "import main; main.keep_freed_memory = lambda processes: False",
    "own depthwise": "import main; main.has_fast_depthwise = lambda dtype: False",
    "fast decoder": "import main; main.fast_decoder = lambda: None",
    "own ReLU": "import main; main.replace_relu = lambda model: None",
}


def ways(flags, folder, output):
    """name -> a function that runs it and gives images per second."""
    def usual():
        return common.images_per_second(common.run([
            __file__, "--usual-loop", folder, "--device", flags.device, "-a", flags.arch, "-b", flags.batch_size,
            "--size", flags.size, "--usual-workers", flags.usual_workers]))

    def ours(level, *more, images=(folder,), program=(common.ROOT / "main.py",)):
        if flags.workers is not None:
            more += ("--workers", flags.workers)
        return common.images_per_second(common.run(program + images + (
            "--device", flags.device, "-a", flags.arch, "-b", flags.batch_size, "--epochs", 1, "--lr", 0.01,
            "--wd", 1e-5, "--train-crop-size", flags.size, "--opt-level", level, "--output-dir", output) + more))

    table = {"usual": usual}
    for level in flags.levels.split(","):
        table["main.py " + level] = functools.partial(ours, level)
        if not flags.levers:
            continue
        table["main.py {}, no files".format(level)] = functools.partial(
            ours, level, "--val-crop-size", 32, "--val-resize-size", 32,
            images=("--synthetic", flags.steps * flags.batch_size))
        for lever, change in WITHOUT.items():
            code = "import sys; sys.path.insert(0, {!r}); {}; sys.exit(main.main())".format(str(common.ROOT), change)
            table["{} without {}".format(level, lever)] = functools.partial(ours, level, program=("-c", code))
    return table


def account(level, whole, alone):
    """Says what of the time of a loop from files the step alone takes, and what is left for an image's reading."""
    if whole and alone:
        whole, alone = statistics.median(whole), statistics.median(alone)
        left = common.cores() * 1000 * (1 / whole - 1 / alone)
        print("{}: {:.0f} % of the time is the step's; the rest is {:.1f} ms of a core for an image".format(
            level, 100 * whole / alone, left))


def main():
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("--images", type=int, default=200, metavar="N", help="different images; they come again and again")
    add("--steps", type=int, default=25, metavar="N", help="steps of each run")
    add("--levers", action="store_true", help="also run on generated images, and without each of main.py's levers")
    common.add_comparison(parser, "side of a training crop")
    flags = parser.parse_args()
    if flags.usual_loop:
        return usual_loop(flags)
    print(common.machine(flags.device))
    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        folder = pathlib.Path(place) / "images"
        common.make_images(folder, flags.steps * flags.batch_size, common.CLASSES, flags.images)
        print("whole loop: {}, {} px, batch {}, {} steps, {}".format(
            flags.arch, flags.size, flags.batch_size, flags.steps, flags.device))
        table = ways(flags, folder, pathlib.Path(place) / "output")
        figures = common.interleave(table, flags.rounds)
        expected = len(table)
    common.print_table(figures, ["usual"])
    for level in flags.levels.split(","):
        account(level, *(figures.get(name.format(level)) for name in ("main.py {}", "main.py {}, no files")))
    return 0 if len(figures) == expected else 1


if __name__ == "__main__":
    sys.exit(main())
