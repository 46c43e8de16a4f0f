"""Classifies images with a checkpoint, and measures its accuracy where their classes are known.

    python tools/predict.py CHECKPOINT PATH... [--topk 5] [--csv FILE]

It prints a line for each image: path, class and probability of each guess, separated by tabs. If
the subfolders of a PATH are named as the checkpoint's classes, as in val/, it also prints accuracy,
precision and recall of each class, and the most frequent confusions. An image that can't be read is
named on stderr and counts as wrong. It ends with status 0; 1 after an error, 2 for an invalid
command line.
"""

import argparse
import collections
import csv
import os
import signal
import sys

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), os.pardir))

import numpy as np
import torch

import main as trainer
import mnasnet


class Images(trainer.ImageFolder):
    """The images of some paths; ``labels`` are -1 where the true class is unknown. Raises OSError
    where a path can't be read, UserError where there is no image."""

    def __init__(self, paths, classes):
        self.root, found = "", []
        for path in paths:
            os.stat(path)
            found += self.find(path, classes) if os.path.isdir(path) else [(-1, os.fsencode(path))]
        if not found:
            raise trainer.UserError(f"no image ({' '.join(trainer.EXTENSIONS)}) in {paths}")
        self.labels, self.paths = map(np.array, zip(*found))

    def find(self, folder, classes):
        """Returns (label, path) of a folder's images, in the order of training."""
        found = [(os.path.relpath(os.path.dirname(path), folder).split(os.sep)[0],
                  os.fsencode(path)) for path in trainer.list_images(folder, above=())]
        labels = {name: label for label, name in enumerate(classes)}
        # "." is the folder itself: training ignores its own images, and hidden subfolders.
        known = all(name in labels or name[0] == "." for name, _ in found)
        return sorted((labels.get(name, -1) if known else -1, path) for name, path in found)


def load_model(arguments):
    """Returns the model as main.py evaluates it, its classes, ``Precision``, flags and ``Runtime``.
    Raises UserError where the checkpoint can't be used."""
    path = arguments.checkpoint
    checkpoint = trainer.read_checkpoint(path)
    missing = [name for name in ("arch", "flags", "classes") if name not in checkpoint]
    if missing:
        print(f"predict.py: {path} has no {', no '.join(missing)}: main.py's defaults are used, "
              "and numbers for classes", file=sys.stderr)
    # One process, also in the environment of torchrun or SLURM.
    words = [".", "--multiprocessing-distributed", "--device-list=0", "--local_rank=0"]
    words += [f"--{name}={value}" for name, value in vars(arguments).items()
              if name in ("device", "workers", "batch-size", "opt-level") and value is not None]
    with trainer.loading(path):
        saved = dict(checkpoint, arch=arguments.arch) if arguments.arch else checkpoint
        flags, _ = trainer.adopt_flags(trainer.parse_args(words), saved)
        count = len(trainer.find_state(checkpoint, path)["classifier.1.weight"])
        classes = list(checkpoint.get("classes", map(str, range(count))))
    runtime = trainer.open_device(flags, trainer.select_backend(flags)[0])
    precision = trainer.Precision(flags, runtime)
    precision.verbosity = 0  # apex would print between the predictions
    model = trainer.build_model(flags, runtime, len(classes), precision.conv_dtype)
    with trainer.loading(path):
        trainer.load_weights(model, checkpoint, path, classes)
    precision.prepare(model)
    model = precision.initialize(model)[0].eval()
    if precision.level == "O0" and runtime.backend.name == "cpu":
        model = mnasnet.fold_batchnorm(model)
    return model, classes, precision, flags, runtime


def predict(model, precision, batches, topk):
    """Yields for each image its guesses, best first, their probabilities, and the reason why it
    can't be read, or None. There are at least five guesses, as in main.py, where so many classes
    exist: which of two equal logits comes first may depend on their number."""
    no_grad = torch.no_grad if trainer.TORCH < (1, 9) else torch.inference_mode
    first = 0
    for images, _, unreadable in batches:
        with no_grad(), precision.autocast():
            logits = model(images).float()
            guesses = logits.topk(min(max(5, topk), logits.shape[1]), 1)[1]
            probabilities = logits.softmax(1).gather(1, guesses)
        reasons = dict(unreadable)
        for index, row in enumerate(zip(guesses.tolist(), probabilities.tolist()), first):
            yield (*row, reasons.get(index))
        first += len(images)


def report(write, classes, labels, guesses):
    """Writes accuracy, precision and recall of the classes, worst recall first, and the most
    frequent confusions of guesses [N, k]; they are -1 for an unreadable image."""
    first, correct = guesses[:, 0], guesses == labels[:, None]
    top1, top5, count = correct[:, 0].sum(), correct.sum(), len(labels)
    print(f"\n * Acc@1 {100 * top1 / count:.3f} Acc@5 {100 * top5 / count:.3f} "
          f"({top1} and {top5} of {count} images)\n")
    hits, guessed, support = [np.bincount(which, minlength=len(classes)) for which in
                              (labels[correct[:, 0]], first[first >= 0], labels)]
    precision, recall = hits / np.maximum(1, guessed), hits / np.maximum(1, support)
    write(["class", "precision", "recall", "support"])
    for label in np.argsort(recall, kind="mergesort"):
        if support[label]:
            write([classes[label], f"{precision[label]:.4f}", f"{recall[label]:.4f}",
                   support[label]])
    print()
    write(["true class", "predicted", "count"])
    wrong = (first != labels) & (first >= 0)
    confusions = collections.Counter(zip(labels[wrong], first[wrong]))
    for (label, guess), times in confusions.most_common(10):
        write([classes[label], classes[guess], times])


def classify(arguments):
    """Prints the predictions and the report, and writes the CSV file. Returns the exit status: 1
    where no image can be read."""
    model, classes, precision, flags, runtime = load_model(arguments)
    images = Images(arguments.paths, classes)
    workers = trainer.cores_per_process() if flags.workers is None else flags.workers
    workers = min(workers, len(images) // flags.batch_size)  # none for few images
    loader = trainer.make_loader(images, flags, runtime, flags.batch_size, workers)
    batches = trainer.prefetch(loader, runtime, precision.input_dtype)
    topk = min(arguments.topk, len(classes))
    best = np.full((len(images), min(5, len(classes))), -1)
    write = csv.writer(sys.stdout, "excel-tab", lineterminator="\n").writerow
    with open(arguments.csv or os.devnull, "w", encoding="utf-8", errors="surrogateescape") as file:
        save = csv.writer(file, lineterminator="\n").writerow
        save(["path", "true class"] + [f"{word} {rank}" for rank in range(1, topk + 1)
                                       for word in ("class", "probability")])
        predictions = predict(model, precision, batches, topk)
        for index, (guesses, probabilities, reason) in enumerate(predictions):
            path, label, row = images.path(index), images.labels[index], []
            if reason:
                print(f"predict.py: can't read {path!r}: {reason}", file=sys.stderr)
            else:
                best[index] = guesses[:best.shape[1]]
                for guess, probability in zip(guesses[:topk], probabilities):
                    row += [classes[guess], f"{probability:.4f}"]
                write([path] + row)
            save([path, classes[label] if label >= 0 else ""] + row)
    unreadable, known = np.sum(best[:, 0] < 0), images.labels >= 0
    if known.any():
        report(write, classes, images.labels[known], best[known])
    if unreadable:
        print(f"predict.py: {unreadable} of {len(images)} image(s) can't be read", file=sys.stderr)
    return 1 if unreadable == len(images) else 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", help="such as model_best.pth.tar")
    add("paths", nargs="+", metavar="PATH", help="image, or folder of images")
    add("--topk", type=trainer.number(int, 1), default=5, help="guesses per image (default: 5)")
    add("--csv", metavar="FILE", help="also write the predictions to this file")
    add("--device", choices=list(trainer.BACKENDS), help="(default: the best one available)")
    add("-j", "--workers", type=trainer.number(int, 0), help="loaders (default: one per core)")
    add("-b", "--batch-size", dest="batch-size", type=trainer.number(int, 1), help="(default: 256)")
    add("-a", "--arch", choices=sorted(mnasnet.WEIGHTS), help="(default: the checkpoint's)")
    add("--opt-level", dest="opt-level", choices=["O0", "O1", "O2"],
        help="(default: the checkpoint's)")
    arguments = parser.parse_intermixed_args()
    for signum in (signal.SIGINT, signal.SIGPIPE):  # Ctrl-C, and | head: no traceback
        signal.signal(signum, signal.SIG_DFL)
    sys.stdout.reconfigure(errors="backslashreplace")  # a file's name may hold any bytes
    try:
        return classify(arguments)
    except (trainer.UserError, OSError, RuntimeError, MemoryError) as error:
        named = isinstance(error, (trainer.UserError, OSError))
        message = str(error) if named else trainer.machine_error(error)
        if not message:
            raise
        print(f"predict.py: error: {message}", file=sys.stderr)
    except SystemExit:  # main.py has printed which flag of the checkpoint is invalid
        pass
    return 1


if __name__ == "__main__":
    sys.exit(main())
