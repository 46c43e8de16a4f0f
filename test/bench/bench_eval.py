"""Images per second of an evaluation from JPEG files, and its counts.

It compares ``main.py -e``, run as a user would, with the usual loop: Pillow, Resize, CenterCrop, ToTensor and
Normalize in a DataLoader with 4 workers, NCHW in fp32, the accuracies read back after every batch. Both get the same
files, weights and batch size, each in a process of its own, in turn; the time runs from before the loaders start to
the last count, in both. The network was trained for a minute to tell the images' tints apart.

How to read it: "x usual" is the ratio of the medians. The counts (right at the first guess, within five, of how many)
should be the same; one image in 500 may differ, since the two resize with different roundings.
"""

import pathlib
import sys
import tempfile
import time

import torch

import common


def usual_loader(folder, flags):
    from torchvision import datasets, transforms

    steps = [transforms.Resize(flags.size * 8 // 7), transforms.CenterCrop(flags.size), transforms.ToTensor(),
             transforms.Normalize(common.MEAN, common.STD)]
    images = datasets.ImageFolder(str(folder), transforms.Compose(steps))
    return torch.utils.data.DataLoader(images, batch_size=flags.batch_size, num_workers=flags.usual_workers,
                                       pin_memory=flags.device == "gpu")


def network(arch):
    import mnasnet

    return getattr(mnasnet, arch)(num_classes=common.CLASSES)


def trained_weights(folder, output, flags):
    """A checkpoint of main.py's, after a minute at most: enough to tell the images' tints apart for the most part."""
    common.run_main(folder, "--device", flags.device, "-a", flags.arch, "-b", 32, "--epochs", 3, "--lr", 0.1,
                    "--dropout", 0, "--train-crop-size", 64, "--train-crop-scale", 0.5, "--val-crop-size", 64,
                    "--val-resize-size", 73, "--opt-level", "O0", "--seed", 0, "--output-dir", output)
    return output / "checkpoint.pth.tar"


def usual_loop(flags):
    """One evaluation; prints the result as main.py does."""
    device = torch.device("cuda" if flags.device == "gpu" else "cpu")
    torch.backends.cudnn.benchmark = True
    loader, model = usual_loader(flags.usual_loop + "/val", flags), network(flags.arch)
    model.load_state_dict(torch.load(flags.weights, map_location="cpu")["state_dict"])
    model = model.to(device).eval()
    criterion = torch.nn.CrossEntropyLoss().to(device)
    loss, top1, top5, seen, begin = 0.0, 0, 0, 0, time.time()
    with torch.no_grad():
        for images, labels in loader:
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            logits = model(images)
            loss += criterion(logits, labels).item() * len(labels)
            hits = logits.topk(5, 1)[1] == labels.view(-1, 1)
            top1, top5 = top1 + hits[:, 0].sum().item(), top5 + hits.sum().item()
            seen += len(labels)
    rate = seen / (time.time() - begin)
    print(" * Acc@1 {:.3f} Acc@5 {:.3f} ({} and {} of {} images)".format(
        100 * top1 / seen, 100 * top5 / seen, top1, top5, seen))
    print("Result: Acc@1 {:.3f} Acc@5 {:.3f} images/sec {:.2f} loss {:.4f}".format(
        100 * top1 / seen, 100 * top5 / seen, rate, loss / seen))


def main():
    parser = common.parser_of(__doc__)
    add = parser.add_argument
    add("--images", type=int, default=1000, metavar="N", help="images evaluated")
    add("--photos", type=int, default=200, metavar="N", help="how many of them differ")
    common.add_comparison(parser, "side of the centre crop, of an image 8/7 of it")
    add("--weights", metavar="FILE", help="with --usual-loop: the checkpoint")
    flags = parser.parse_args()
    if flags.usual_loop:
        return usual_loop(flags)
    print(common.machine(flags.device))
    seen, options = {}, ["--device", flags.device, "-a", flags.arch, "-b", flags.batch_size]

    def measure(name, output):
        seen.setdefault(name, common.counts(output))
        return common.images_per_second(output)

    with tempfile.TemporaryDirectory(prefix="bench-") as place:
        folder = pathlib.Path(place) / "images"
        common.make_images(folder, 640, flags.images, flags.photos)
        weights = trained_weights(folder, pathlib.Path(place) / "run", flags)

        def usual():
            return measure("usual", common.run([
                __file__, "--usual-loop", folder, "--weights", weights, "--size", flags.size, "--usual-workers",
                flags.usual_workers] + options))

        def ours(level):
            more = ["--workers", flags.workers] if flags.workers is not None else []
            return measure("main.py -e " + level, common.run_main(
                folder, "-e", "--resume", weights, "--val-crop-size", flags.size, "--val-resize-size",
                flags.size * 8 // 7, "--opt-level", level, *(options + more)))

        ways = {"usual": usual}
        ways.update({"main.py -e " + level: (lambda level=level: ours(level)) for level in flags.levels.split(",")})
        figures = common.interleave(ways, flags.rounds)
    common.print_table(figures, ["usual"])
    print()
    for name in figures:
        print("{}: {} right at the first guess, {} within five, of {} images".format(name, *seen[name]))
    return 0 if len(figures) == len(ways) else 1


if __name__ == "__main__":
    sys.exit(main())
