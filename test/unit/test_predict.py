"""tools/predict.py, as a user runs it."""

import csv
import functools
import re
import shutil

import numpy as np
import pytest
import torch

import main
import mnasnet
from helpers import counts, make_images, needs_bf16, run_main, run_program, the_error

CLASSES = [f"class {label}" for label in range(10)]
predict = functools.partial(run_program, "tools/predict.py")


def lines_of(result):
    """The lines of the predictions, of the accuracy, of the classes and of the confusions."""
    assert result.returncode == 0 or "image(s) can't be read" in result.stderr, result.stderr
    return [block.splitlines() for block in result.stdout.split("\n\n")]


def read_csv(path):
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def ten(tmp_path_factory):
    """(data folder with 6 validation images of 10 classes, their checkpoint).

    The network has fresh weights: it tells many of the images apart, and most of them wrongly.
    """
    folder = tmp_path_factory.mktemp("ten classes")
    make_images(folder, train=1, val=6, classes=10)
    torch.manual_seed(0)
    model = mnasnet.mnasnet0_5(num_classes=10)
    return folder, {
        "arch": "mnasnet0_5", "state_dict": model.state_dict(), "classes": CLASSES,
        "flags": {"val_resize_size": 40, "val_crop_size": 32, "opt_level": "O0"}}


@pytest.fixture
def checkpoint(ten, tmp_path):
    """A function that writes the checkpoint of ``ten`` with other values, and returns its path."""

    def write(**values):
        path = tmp_path / "model.pth.tar"
        content = dict(ten[1], **values)
        torch.save({name: value for name, value in content.items() if value is not None},
                   str(path))
        return path

    return write


@pytest.mark.parametrize("level,batch", [
    ("O0", 60), pytest.param("O0", 7, marks=pytest.mark.slow),
    pytest.param("O1", 7, marks=[needs_bf16, pytest.mark.slow]),
    pytest.param("O2", 60, marks=[needs_bf16, pytest.mark.slow])])
def test_counts_are_those_of_main(ten, checkpoint, tmp_path, level, batch):
    flags = {"val_resize_size": 64, "val_crop_size": 32, "opt_level": level}
    path = checkpoint(flags=flags)
    words = ["--device", "cpu", "-b", batch]
    result = predict(path, ten[0] / "val", *words)
    expected = run_main(ten[0], "-e", "--resume", path, *words, "-j", 1, cwd=tmp_path, small=False)
    assert counts(result) == counts(expected)


@pytest.mark.slow
def test_counts_of_a_trained_model(images, trained, tmp_path):
    folder, _ = trained
    path = folder / "model_best.pth.tar"
    result = predict(path, images / "val", "--device", "cpu", "-b", 8)
    expected = run_main(images, "-e", "--resume", path, cwd=tmp_path)
    assert counts(result) == counts(expected) and counts(result)[2] == "31"
    assert result.stderr == ""


@pytest.mark.slow
def test_a_line_names_the_best_classes_and_their_probabilities(ten, checkpoint):
    image = next((ten[0] / "val" / "class 3").iterdir())
    state = dict(ten[1]["state_dict"], **{
        "classifier.1.weight": torch.zeros(10, 1280),
        "classifier.1.bias": torch.tensor([0.3, 0.2, 0.5, 1e-6] + [1e-9] * 6).log()})
    [line], = lines_of(predict(checkpoint(state_dict=state), image, "--topk", 3, "--device", "cpu"))
    assert line.split("\t") == [str(image), "class 2", "0.5000", "class 0", "0.3000",
                                "class 1", "0.2000"]


def guesses_of(path):
    """(true classes, predicted classes, paths) of a CSV file; None for an unreadable image."""
    rows = read_csv(path)
    return ([row["true class"] for row in rows], [row["class 1"] or None for row in rows],
            [row["path"] for row in rows])


@pytest.mark.slow
def test_precision_and_recall_are_those_of_the_predictions(ten, checkpoint, tmp_path):
    bad = tmp_path / "val" / "class 4" / "0.jpg"
    shutil.copytree(str(ten[0] / "val"), str(tmp_path / "val"))
    bad.write_bytes(b"<html>")
    result = predict(checkpoint(), tmp_path / "val", "--csv", tmp_path / "out.csv", "--device",
                     "cpu", "-b", 16)
    true, guessed, paths = guesses_of(tmp_path / "out.csv")
    assert true == sorted(CLASSES * 6 + ["class 4"]) and guessed[paths.index(str(bad))] is None
    predictions, _, (_, *classes), (_, *confusions) = lines_of(result)
    assert len(predictions) == 60 and len(set(guessed)) > 3  # else the test says little
    pairs = list(zip(true, guessed))
    expected = []
    for name in CLASSES:
        hits = pairs.count((name, name))
        precision, recall = hits / max(1, guessed.count(name)), hits / true.count(name)
        expected.append((recall, f"{name}\t{precision:.4f}\t{recall:.4f}\t{true.count(name)}"))
    assert classes == [line for _, line in sorted(expected)]
    wrong = [pair for pair in pairs if pair[0] != pair[1] and pair[1]]
    found = [line.split("\t") for line in confusions]
    assert [int(count) for _, _, count in found] == sorted(
        map(wrong.count, set(wrong)), reverse=True)[:10]
    assert all(wrong.count((one, other)) == int(count) for one, other, count in found)
    right = sum(one == other for one, other in pairs)
    assert re.search(rf"^ \* Acc@1 .*\({right} and \d+ of 61 images\)$", result.stdout, re.M)
    assert result.stderr.splitlines() == [
        f"predict.py: can't read {str(bad)!r}: not an image of a format that Pillow knows",
        "predict.py: error: 1 of 61 image(s) can't be read"]
    assert result.returncode == 1


@pytest.mark.slow
def test_precision_and_recall_are_those_of_scikit_learn(ten, checkpoint, tmp_path):
    metrics = pytest.importorskip("sklearn.metrics")
    result = predict(checkpoint(), ten[0] / "val", "--csv", tmp_path / "out.csv", "--device", "cpu")
    true, guessed, _ = guesses_of(tmp_path / "out.csv")
    expected = metrics.precision_recall_fscore_support(true, guessed, zero_division=0)
    rows = [line.split("\t") for line in lines_of(result)[2][1:]]
    assert [row[0] for row in sorted(rows)] == CLASSES
    found = np.array([row[1:] for row in sorted(rows)], float)
    assert np.abs(found - np.stack(expected)[[0, 1, 3]].T).max() <= 5e-5
    confusion = metrics.confusion_matrix(true, guessed)
    for line in lines_of(result)[3][1:]:
        one, other, count = line.split("\t")
        assert confusion[CLASSES.index(one), CLASSES.index(other)] == int(count)


@pytest.mark.slow
def test_folders_of_other_names_are_left_out_of_the_accuracy(ten, checkpoint, tmp_path):
    shutil.copytree(str(ten[0] / "val"), str(tmp_path / "val"))
    (tmp_path / "val" / "class 1").rename(tmp_path / "val" / "other")
    predictions, _, classes, _ = lines_of(predict(checkpoint(), tmp_path / "val"))
    assert len(predictions) == 60
    names = sorted(line.split("\t")[0] for line in classes[1:])
    assert names == [name for name in CLASSES if name != "class 1"]
    [predictions] = lines_of(predict(checkpoint(), tmp_path / "val" / "other"))
    assert len(predictions) == 6


@pytest.mark.slow
def test_files_without_a_class_are_left_out_of_the_accuracy(ten, checkpoint, tmp_path):
    shutil.copytree(str(ten[0] / "val" / "class 1"), str(tmp_path / "val" / "class 1"))
    image = next((ten[0] / "val" / "class 2").iterdir())
    for name in ("no extension", "val/loose.jpg", "val/.hidden/image.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(str(image), str(tmp_path / name))
    result = predict(checkpoint(), tmp_path / "no extension", tmp_path / "val", "--device", "cpu")
    predictions, _, classes, _ = lines_of(result)
    paths = [line.split("\t")[0] for line in predictions]
    assert str(tmp_path / "no extension") in paths
    assert len(paths) == 8  # without the hidden one
    assert counts(result)[2] == "6" and [line.split("\t")[0] for line in classes[1:]] == ["class 1"]


@pytest.mark.slow
def test_names_that_would_break_a_line_are_quoted(ten, checkpoint, tmp_path):
    image = tmp_path / b"a\tb\n\xff.jpg".decode(errors="surrogateescape")
    shutil.copy(str(next((ten[0] / "val" / "class 2").iterdir())), str(image))
    result = predict(checkpoint(), image, "--topk", 1, "--csv", tmp_path / "out.csv")
    row, = csv.reader(result.stdout.splitlines(True), "excel-tab")
    assert row[0] == str(tmp_path / "a\tb\n\\udcff.jpg"), result.stderr
    with (tmp_path / "out.csv").open(errors="surrogateescape", newline="") as file:
        assert list(csv.reader(file))[1][0] == str(image)


@pytest.mark.slow
@pytest.mark.parametrize("topk,columns", [(7, 7), (50, 10)])
def test_topk(ten, checkpoint, tmp_path, topk, columns):
    result = predict(checkpoint(), ten[0] / "val", "--topk", topk, "--csv", tmp_path / "out.csv")
    rows = read_csv(tmp_path / "out.csv")
    assert len(rows) == 60 and len(rows[0]) == 2 + 2 * columns
    probabilities = [[float(row[f"probability {rank}"]) for rank in range(1, columns + 1)]
                     for row in rows]
    assert all(row == sorted(row, reverse=True) for row in probabilities)
    assert [line.split("\t") for line in lines_of(result)[0]] == [
        [value for name, value in row.items() if name != "true class"] for row in rows]


@pytest.mark.slow
def test_a_checkpoint_without_flags_and_classes(ten, checkpoint, tmp_path):
    result = predict(checkpoint(flags=None, classes=None), ten[0] / "val", "--device", "cpu")
    [predictions] = lines_of(result)
    assert {line.split("\t")[1] for line in predictions} <= {str(label) for label in range(10)}
    torch.save(ten[1]["state_dict"], str(tmp_path / "weights.pth"))
    plain = predict(tmp_path / "weights.pth", ten[0] / "val", "--device", "cpu", "-a", "mnasnet0_5")
    assert plain.stdout == result.stdout


@pytest.mark.slow
def test_a_launcher_in_the_environment_does_not_divide_the_images(ten, checkpoint):
    result = predict(checkpoint(), ten[0] / "val", "--device", "cpu", SLURM_PROCID="1",
                     SLURM_NTASKS="2", RANK="1", WORLD_SIZE="2")
    assert counts(result)[2] == "60"


@pytest.mark.slow
def test_errors_take_one_line(ten, checkpoint, tmp_path):
    path, val = checkpoint(), ten[0] / "val"
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("text")
    assert "no image" in the_error(predict(path, tmp_path / "empty"))
    assert "nowhere" in the_error(predict(path, val, tmp_path / "nowhere"))
    assert "as a checkpoint" in the_error(predict(tmp_path / "text", val))
    assert the_error(predict(tmp_path / "nowhere", val)).startswith("predict.py: error: no check")
    assert "nowhere" in the_error(predict(path, val, "--csv", tmp_path / "nowhere" / "out.csv"))
    result = predict(path, tmp_path / "text")
    assert result.returncode == 1 and "text': not an image" in result.stderr
    assert predict(path).returncode == predict(path, val, "--topk", 0).returncode == 2
    assert "resnet18" in the_error(predict(checkpoint(arch="resnet18"), val))
    assert "does not hold" in the_error(predict(checkpoint(classes=10), val))
    assert "10 classes" in the_error(predict(checkpoint(classes=CLASSES[1:]), val))
    if main.TORCH < (1, 10):
        flags = dict(ten[1]["flags"], opt_level="O1")
        assert "--opt-level O0" in the_error(predict(checkpoint(flags=flags), val))
        assert predict(checkpoint(flags=flags), val, "--opt-level", "O0").returncode == 0
