"""Draws loss, accuracy, learning rate and throughput of one or several runs by epoch.

    python tools/plot_metrics.py DIR... --output FILE.png

DIR is the --output-dir of a run, which holds metrics.csv. Needs matplotlib. It ends with status 0;
with 1 where matplotlib or a metrics.csv is missing or damaged, with 2 for an invalid command line.
"""

import argparse
import csv
import os
import sys

# The title of each diagram, and its columns of metrics.csv: a solid line, a dashed, a dotted one.
DIAGRAMS = [("Loss", ["val_loss", "train_loss", "ema_loss"]),
            ("Acc@1, percent", ["acc1", "train_acc1", "ema_acc1"]),
            ("Learning rate", ["lr"]), ("Images per second", ["fps"])]


def read_metrics(folder):
    """Returns the columns of a run's metrics.csv that are drawn, as lists of numbers. Raises
    OSError where the file can't be read, ValueError where it is damaged."""
    path = os.path.join(folder, "metrics.csv")
    columns = {name: [] for name in ["epoch"] + [name for _, names in DIAGRAMS for name in names]}
    line = 1
    with open(path, newline="", encoding="utf-8") as file:
        try:
            for line, row in enumerate(csv.DictReader(file), 2):
                row = {"ema_loss": "nan", "ema_acc1": "nan", **row}  # which only --ema writes
                for name, values in columns.items():
                    values.append(float(row[name]))
        except (KeyError, TypeError, ValueError, csv.Error):
            raise ValueError(f"{path} is damaged: line {line} lacks a number for one of "
                             f"{', '.join(columns)}")
    if not columns["epoch"]:
        raise ValueError(f"{path} holds no epoch")
    return columns


def draw(runs, path):
    """Writes the diagrams of ``runs``, pairs of a name and columns, as an image; its format is that
    of the path's ending. Raises OSError or ValueError where that fails."""
    import matplotlib
    matplotlib.use("Agg")  # needs no display
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 8))
    for diagram, (title, columns) in zip(axes.flat, DIAGRAMS):
        lines = " (dashed: training, solid: validation, dotted: EMA)" if columns[1:] else ""
        diagram.set_title(title + lines)
        diagram.set_xlabel("Epoch")
        diagram.xaxis.get_major_locator().set_params(integer=True)
        diagram.grid(alpha=0.3)
        for number, (_, metrics) in enumerate(runs):
            for column, style in zip(columns, ("-", "--", ":")):
                diagram.plot(metrics["epoch"], metrics[column], style, color=f"C{number % 10}",
                             marker=".")
    axes[1, 1].set_ylim(bottom=0)
    # Else matplotlib would take what stands between two $ for a formula.
    names = [name.replace("$", r"\$") for name, _ in runs]
    figure.legend(axes[1, 1].lines, names, loc="lower center", ncol=4)
    figure.tight_layout(rect=(0, 0.03 + 0.025 * ((len(runs) + 3) // 4), 1, 1))
    figure.savefig(path, dpi=100, format=os.path.splitext(path)[1][1:] or "png")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="DIR", help="folder with metrics.csv")
    parser.add_argument("--output", required=True, metavar="FILE.png", help="image to write")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # for names that its encoding lacks
    names = [os.path.basename(os.path.abspath(folder)) for folder in arguments.runs]
    if len(set(names)) < len(names):
        names = arguments.runs
    try:
        runs = list(zip(names, map(read_metrics, arguments.runs)))
        draw(runs, arguments.output)
    except ImportError:
        return "plot_metrics.py: error: matplotlib is missing: pip install matplotlib"
    except (OSError, ValueError) as error:
        return f"plot_metrics.py: error: {error}"
    print(f"=> {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
