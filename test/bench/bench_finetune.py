"""Acc@1 of fine-tuning on a small set of images, beside training from scratch for as many epochs.

DATA holds train/ and val/ with one folder of images per class, as for main.py. The first half of
the classes, with up to --pretrain-images images each, gives the weights. The small set is the other
half, with --images training images each. Up to --val-images of a class are for evaluation. Each row
is trained once a seed.
"""

import functools
import pathlib
import re
import sys
import tempfile

import common

def link_images(source, target, classes, count):
    """Links the first ``count`` images of each class folder."""
    for name in classes:
        (target / name).mkdir(parents=True)
        for path in sorted((source / name).iterdir())[:count]:
            (target / name / path.name).symlink_to(path)


def make_sets(flags, folder):
    """Makes the data folders pretrain and small, each with train/ and val/."""
    data = pathlib.Path(flags.data).resolve()
    classes = sorted(path.name for path in (data / "train").iterdir() if path.is_dir())
    half = len(classes) // 2
    for name, members, count in (("pretrain", classes[:half], flags.pretrain_images),
                                 ("small", classes[half:], flags.images)):
        link_images(data / "train", folder / name / "train", members, count)
        link_images(data / "val", folder / name / "val", members, flags.val_images)
        print(f"{name}: {', '.join(members)}; up to {count} training images each", flush=True)


def train(flags, data, output, epochs, seed, *options):
    """The best Acc@1 of a run of main.py, in percent."""
    output = common.run_python([
        common.ROOT / "main.py", data, *common.shared_options(flags), "--epochs", epochs,
        "--seed", seed, "--lr", flags.lr, "--warmup", 1, "--train-crop-size", flags.size,
        "--train-crop-scale", 0.4, "--val-crop-size", flags.size, "--val-resize-size", flags.size,
        "--output-dir", output, *options])
    return float(re.search(r"^Result: Acc@1 ([\d.]+)", output, re.M).group(1))


def parse_args():
    parser = common.make_parser(__doc__)
    parser.add_argument("data", metavar="DATA", help="folder with train/ and val/")
    common.add_model_flags(parser, "images a step", "side of an image")
    parser.set_defaults(arch="mnasnet0_5", batch_size=32, size=64)
    add = parser.add_argument
    add("--images", type=int, default=50, metavar="N", help="training images of a class")
    add("--pretrain-images", type=int, default=2000, metavar="N", help="the same of the other half")
    add("--val-images", type=int, default=200, metavar="N", help="validation images of a class")
    add("--epochs", type=int, default=20, metavar="N", help="of each row")
    add("--pretrain-epochs", type=int, default=12, metavar="N", help="of the other half")
    add("--lr", type=float, default=0.03, help="peak learning rate of all runs")
    return parser.parse_args()


def main():
    flags = parse_args()
    print(common.describe_machine(flags.device))
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        folder = pathlib.Path(scratch)
        make_sets(flags, folder)
        best = train(flags, folder / "pretrain", folder / "weights", flags.pretrain_epochs, 0)
        print(f"pretrained for {flags.pretrain_epochs} epochs: Acc@1 {best}", flush=True)
        weights = ["--pretrained", "--weights", folder / "weights" / "model_best.pth.tar"]
        rows = {"from scratch": [], "fine-tuned": weights,
                "fine-tuned, --freeze features": weights + ["--freeze", "features"]}

        def train_row(name, seed):
            output = folder / f"{name} {seed}"
            return train(flags, folder / "small", output, flags.epochs, seed, *rows[name])

        common.train_by_seed({name: functools.partial(train_row, name) for name in rows},
                             flags.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
