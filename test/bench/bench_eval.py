"""Images per second of an evaluation from JPEG files, and its counts.

Compares ``main.py -e``, run as a user would, with the loop that most ImageNet trainers have:
Pillow, Resize, CenterCrop, ToTensor and Normalize in a DataLoader with 4 workers, NCHW in fp32, and
the accuracies read back after every batch. With --against DIR it compares main.py with that of
another checkout. All get the same files, weights and batch size, each in a process of its own, in
turn; the time runs from before the loaders start to the last count. The network is trained first,
for a minute, to tell the images' tints apart.

The counts (correct in the top 1, in the top 5, of how many) should be the same; one image in 500
may differ, since main.py and the baseline loop resize with different roundings.
"""

import pathlib
import sys
import tempfile
import time

import torch

import common


def train_weights(folder, output, flags):
    """A state dict after a minute of training, which main.py of any version loads."""
    common.run_python([
        common.ROOT / "main.py", folder, "--device", flags.device, "-a", flags.arch, "-b", 32,
        "--epochs", 3, "--lr", 0.1, "--dropout", 0, "--train-crop-size", 64,
        "--train-crop-scale", 0.5, "--val-crop-size", 64, "--val-resize-size", 73,
        "--opt-level", "O0", "--seed", 0, "--output-dir", output])
    checkpoint = torch.load(str(output / "checkpoint.pth.tar"), map_location="cpu")
    path = output / "weights.pth"
    torch.save(checkpoint["state_dict"], str(path))
    return path


def baseline_loop(flags):
    """Evaluates as most trainers do; prints the result as main.py does."""
    device = common.torch_device(flags)
    torch.backends.cudnn.benchmark = True
    loader = common.baseline_loader(flags, train=False)
    model = common.build_network(flags.arch)
    model.load_state_dict(torch.load(flags.weights, map_location="cpu"))
    model = model.to(device).eval()
    criterion = torch.nn.CrossEntropyLoss().to(device)
    loss, top1, top5, seen = 0.0, 0, 0, 0
    start = time.time()
    with torch.no_grad():
        for images, targets in loader:
            images = images.to(device, non_blocking=True)
            targets = targets.to(device, non_blocking=True)
            logits = model(images)
            loss += criterion(logits, targets).item() * len(targets)
            correct = logits.topk(5, 1)[1] == targets.view(-1, 1)
            top1 += correct[:, 0].sum().item()
            top5 += correct.sum().item()
            seen += len(targets)
    rate = seen / (time.time() - start)
    accuracy = f"Acc@1 {100 * top1 / seen:.3f} Acc@5 {100 * top5 / seen:.3f}"
    print(f" * {accuracy} ({top1} and {top5} of {seen} images)")
    print(f"Result: {accuracy} images/sec {rate:.2f} loss {loss / seen:.4f}")


class Evaluator:
    """Runs evaluations, and keeps the counts of the first one of each row in ``counts``."""

    def __init__(self, flags, folder, weights):
        self.flags = flags
        self.folder = folder
        self.weights = weights
        self.counts = {}

    def keep_counts(self, row, output):
        self.counts.setdefault(row, common.topk_counts(output))
        return common.images_per_second(output)

    def baseline(self):
        output = common.run_baseline(
            __file__, self.flags, self.folder, "--weights", self.weights)
        return self.keep_counts(common.BASELINE, output)

    def main(self, repository, level):
        flags = self.flags
        workers = [] if flags.workers is None else ["--workers", flags.workers]
        output = common.run_python([
            repository / "main.py", self.folder, "-e", "--resume", self.weights,
            *common.shared_options(flags), *workers, "--opt-level", level,
            "--val-crop-size", flags.size, "--val-resize-size", flags.size * 8 // 7])
        name = "main.py" if repository == common.ROOT else flags.against
        return self.keep_counts(f"{name} {level}", output)


def parse_args():
    parser = common.make_parser(__doc__)
    add = parser.add_argument
    add("--images", type=int, default=1000, metavar="N", help="images evaluated")
    add("--photos", type=int, default=200, metavar="N", help="how many of them differ")
    add("--large", type=int, default=0, metavar="N",
        help="how many of these are large photographs, 2000x1500")
    common.add_comparison_flags(parser, "side of the centre crop, of an image 8/7 of it")
    add("--weights", metavar="FILE", help="with --baseline-loop: the state dict")
    return parser.parse_args()


def main():
    flags = parse_args()
    if flags.baseline_loop:
        return baseline_loop(flags)
    print(common.describe_machine(flags.device))
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = pathlib.Path(scratch) / "images"
        common.make_images(folder, 640, flags.images, flags.photos, flags.large)
        weights = train_weights(folder, pathlib.Path(scratch) / "run", flags)
        evaluator = Evaluator(flags, folder, weights)
        rows, references = common.comparison(flags, evaluator.baseline, evaluator.main)
        figures = common.interleave(rows, flags.rounds)
    common.print_table(figures, {flags.against or common.BASELINE: references})
    print()
    for name in figures:
        top1, top5, images = evaluator.counts[name]
        print(f"{name}: {top1} correct in the top 1, {top5} in the top 5, of {images} images")
    return 0 if len(figures) == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
