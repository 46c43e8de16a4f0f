"""The scripts of tools/, as a user runs them."""

import functools
import shutil

import pytest

from helpers import run_program, the_error

check_data = functools.partial(run_program, "tools/check_data.py")


def test_check_data_lists_the_images_that_can_not_be_read(images, tmp_path):
    shutil.copytree(str(images), str(tmp_path / "data"))
    bad = [tmp_path / "data" / split / "class 1" / "0 bäd.jpg" for split in ("train", "val")]
    for path in bad:
        path.write_bytes(b"<html>")
    result = check_data(tmp_path / "data", "-j", 2)
    *lines, last = result.stdout.splitlines()
    assert result.returncode == 1 and last == "2 bad image(s)", result.stderr
    assert [line.split("\t")[0] for line in lines] == [f"bad: {path}" for path in bad]
    assert all(line.split("\t")[1] for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [[], ["-j", 0]], ids=["default", "none"])
def test_check_data_of_good_images(images, workers):
    result = check_data(images, *workers, LANG="C")  # a real start: it collects garbage later
    assert result.returncode == 0 and result.stdout == "0 bad image(s)\n", result.stderr
    progress = [line.rsplit(", ", 1)[0] for line in result.stderr.splitlines()]
    assert progress == ["train: 32 of 32 images", "val: 31 of 31 images"]


def test_check_data_names_the_classes_that_differ(images, tmp_path):
    shutil.copytree(str(images), str(tmp_path / "data"))
    (tmp_path / "data" / "val" / "class 1").rename(tmp_path / "data" / "val" / "class 9")
    result = check_data(tmp_path / "data", "-j", 1)
    assert result.returncode == 1, result.stderr
    *lines, last = result.stdout.splitlines()
    assert [line.split("\t")[0] for line in lines] == [
        f"bad: {tmp_path / 'data' / name}" for name in ("train/class 1", "val/class 9")]
    assert last == "0 bad image(s)"  # the images are read all the same


def test_check_data_says_what_is_wrong(tmp_path):
    assert "no folder" in the_error(check_data(tmp_path))
    assert check_data().returncode == 2 and check_data("d", "--what").returncode == 2
