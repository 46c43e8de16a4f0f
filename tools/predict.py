"""Classifies images with a checkpoint, and measures its accuracy where their classes are known.

    python tools/predict.py CHECKPOINT PATH... [--topk 5] [--csv FILE] [--device npu|gpu|cpu]

It prints path, class and probability of each guess; where folders are named as the classes, as in
val/, also accuracy, precision, recall and confusions. An unreadable image counts as wrong.
"""

import argparse
import csv
import os
import signal
import sys
from collections import Counter

for signum in (signal.SIGINT, signal.SIGPIPE):  # Ctrl-C, and | head: no traceback
    signal.signal(signum, signal.SIG_DFL)
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import numpy as np
import torch

import main as trainer


class Images(trainer.ImageFolder):
    """The images of some paths, in the order of training; label -1: in no folder of a class."""

    def __init__(self, paths, classes):
        self.root, found = "", []
        labels = {name: label for label, name in enumerate(classes)}
        for path in paths:
            for file in [path] if os.path.isfile(path) else trainer.list_images(path, above=()):
                folder = os.path.relpath(file, path).split(os.sep)[0]
                found.append((labels.get(folder, -1), os.fsencode(file)))
        if not found:
            raise trainer.UserError(f"no image ({' '.join(trainer.EXTENSIONS)}) in {paths}")
        self.labels, self.paths = map(np.array, zip(*sorted(found)))


def load_model(path, words):
    """Returns the model as main.py evaluates it, its classes, flags, Runtime and Precision."""
    one_process = ["--multiprocessing-distributed", "--device-list=0", "--local_rank=0"]
    flags = trainer.parse_args([".", *one_process, *words])
    runtime = trainer.open_device(flags, trainer.select_backend(flags)[0])
    checkpoint = trainer.read_checkpoint(path)
    with trainer.loading(path):
        flags, _ = trainer.adopt_flags(flags, checkpoint)
        count = len(trainer.find_state(checkpoint, path)["classifier.1.weight"])
        classes = list(checkpoint.get("classes", map(str, range(count))))
        precision = trainer.Precision(flags, runtime)
        precision.verbosity = 0  # apex would print between the predictions
        model = trainer.build_model(flags, runtime, len(classes), precision.conv_dtype)
        trainer.load_weights(model, checkpoint, path, classes)
    model = precision.initialize(precision.convert(model))[0].eval()
    if runtime.backend.name == "cpu":
        model = trainer.mnasnet.fold_batchnorm(model)
    return model, classes, flags, runtime, precision


def report(out, rows):
    """Writes accuracy, recalls, confusions; a row: true class, then guess, its probability, ..."""
    pairs = Counter(row[:2] for row in rows)
    support = Counter(row[0] for row in rows)
    guessed = Counter(row[1] for row in rows if len(row) > 1)
    top1, top5 = [sum(row[0] in row[1:end:2] for row in rows) for end in (2, 11)]
    print(f"\n * Acc@1 {100 * top1 / len(rows):.3f} Acc@5 {100 * top5 / len(rows):.3f} "
          f"({top1} and {top5} of {len(rows)} images)\n\nclass\tprecision\trecall\tsupport")
    for recall, name in sorted((pairs[name, name] / support[name], name) for name in support):
        precision = pairs[name, name] / max(1, guessed[name])
        out.writerow([name, f"{precision:.4f}", f"{recall:.4f}", support[name]])
    print("\ntrue class\tpredicted\tcount")
    out.writerows([[*pair, n] for pair, n in pairs.most_common() if pair[0] != pair[-1]][:10])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", help="such as model_best.pth.tar")
    add("paths", nargs="+", metavar="PATH", help="image, or folder of images")
    add("--topk", type=trainer.number(int, 1), default=5, help="guesses per image (default: 5)")
    add("--csv", metavar="FILE", default=os.devnull, help="also write the predictions to this file")
    for names in (["--device"], ["-a", "--arch"], ["-b", "--batch-size"], ["--opt-level"]):
        add(*names, dest="flags", metavar="VALUE", action="append", default=[],
            type=lambda value, name=names[-1]: f"{name}={value}", help="as in main.py")
    arguments = parser.parse_intermixed_args()
    model, classes, flags, runtime, precision = load_model(arguments.checkpoint, arguments.flags)
    images, names = Images(arguments.paths, classes), classes + [""]  # label -1 has no name
    workers = min(trainer.MAX_LOADERS, trainer.cores_per_process(),
                  len(images) // flags.batch_size)
    loader = trainer.make_loader(images, flags, runtime, flags.batch_size, workers)
    ranks, rows = range(1, min(arguments.topk, len(classes)) + 1), []
    head = sum(([f"class {n}", f"probability {n}"] for n in ranks), ["path", "true class"])
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold any bytes
    out = csv.writer(sys.stdout, "excel-tab", lineterminator="\n")
    with open(arguments.csv, "w", encoding="utf-8", errors="surrogateescape") as file:
        for batch, _, unreadable in trainer.prefetch(loader, runtime, precision.input_dtype):
            with torch.no_grad(), precision.autocast():
                logits = model(batch).float()
            best = logits.topk(min(max(5, len(ranks)), len(classes)), 1)[1]  # 5, as in main.py
            for labels, p in zip(best.tolist(), logits.softmax(1).tolist()):
                guesses = [(classes[label], f"{p[label]:.4f}") for label in labels]
                rows.append(sum(guesses, (images.path(len(rows)), names[images.labels[len(rows)]])))
            for index, reason in unreadable:
                rows[index] = rows[index][:2]
                print(f"predict.py: can't read {rows[index][0]!r}: {reason}", file=sys.stderr)
            out.writerows(row[:1] + row[2:len(head)] for row in rows[-len(best):] if row[2:])
        csv.writer(file, lineterminator="\n").writerows(row[:len(head)] for row in [head, *rows])
    if images.labels.max() >= 0:
        report(out, [row[1:] for row in rows if row[1]])
    unread = sum(len(row) == 2 for row in rows)
    return f"predict.py: error: {unread} of {len(rows)} image(s) can't be read" if unread else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (trainer.UserError, OSError, RuntimeError, MemoryError) as error:
        sys.exit(f"predict.py: error: {trainer.first_line(error)}")
