"""From files to batches: folders, crops, decoding, unreadable images, the order, the loader."""

import os
import random
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import main
from helpers import (ROOT, STEADY, counts, cpu_runtime, differences, losses, parse, read_checkpoint,
                     run_main, the_error)


@pytest.fixture
def data(images, tmp_path):
    """A copy of the image folder."""
    shutil.copytree(str(images), str(tmp_path / "data"))
    return tmp_path / "data"


def test_a_folder_of_images(tmp_path):
    names = ["a/4.jpg", "a/below/3.jpeg", "b/1.PNG", "b/2.jpg"]
    for name in reversed(names + ["b/notes.txt"]):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    folder = main.ImageFolder(str(tmp_path))
    assert folder.classes == ["a", "b"] and folder.labels.tolist() == [0, 0, 1, 1]
    paths = [folder.path(index) for index in range(len(folder))]
    assert paths == [str(tmp_path / name) for name in names]


def no_folder(data):
    shutil.rmtree(str(data))


def no_val(data):
    shutil.rmtree(str(data / "val"))


def empty_class(data):
    no_images = data / "val" / "class 1"
    shutil.rmtree(str(no_images))
    no_images.mkdir()


def other_classes(data):
    (data / "val" / "class 1").rename(data / "val" / "class 9")


@pytest.mark.parametrize("change,words", [
    (no_folder, "no folder"), (no_val, "no folder"), (empty_class, "holds no image"),
    (other_classes, "only in one of them")])
def test_a_folder_of_the_wrong_shape_is_refused(data, run_here, change, words):
    change(data)
    assert words in the_error(run_here(data))


def crop_step_by_step(image, get_crop, size):
    """Crop, then resize, then crop again: the usual Pillow steps, one after the other."""
    crop = get_crop(*image.size)
    (left, top, width, height), (x, y) = crop.box, crop.corner
    image = image.convert("RGB").crop((left, top, left + width, top + height))
    image = image.resize(tuple(crop.resized), Image.BILINEAR)
    return np.asarray(image.crop((x, y, x + size, y + size)), dtype=np.float32)


@pytest.mark.parametrize("shape", [(500, 375), (375, 500), (230, 230), (1600, 1200), (40, 300)])
def test_images_are_those_of_the_usual_pipeline(tmp_path, shape):
    noise = np.random.RandomState(0).randint(0, 256, (shape[1] // 20 + 2, shape[0] // 20 + 2, 3))
    path = str(tmp_path / "a.jpg")
    Image.fromarray(noise.astype(np.uint8)).resize(shape, Image.BICUBIC).save(path, quality=90)

    def center_crop(width, height):
        return main.resize_center_crop(width, height, 72, 64)

    for seed in range(4):
        def random_crop(width, height):
            return main.random_resized_crop(width, height, 64, 0.3, random.Random(seed))

        for get_crop in (random_crop, center_crop):
            found = main.read_image(path, get_crop, 64).astype(np.float32)
            expected = crop_step_by_step(Image.open(path), get_crop, 64)
            assert found.shape == (64, 64, 3) and np.abs(found - expected).mean() < 2


@pytest.mark.parametrize("shape", [(1, 1), (3, 500), (500, 3), (64, 48)])
def test_a_random_crop_lies_in_the_image(shape):
    rng = random.Random(0)
    for _ in range(100):
        crop = main.random_resized_crop(*shape, 32, 0.08, rng)
        left, top, width, height = crop.box
        assert left >= 0 and top >= 0 and width > 0 and height > 0
        assert left + width <= shape[0] and top + height <= shape[1]
        assert tuple(crop.resized) == (32, 32) and tuple(crop.corner) == (0, 0)


def read(path):
    return main.read_image(str(path), lambda w, h: main.resize_center_crop(w, h, 32, 32), 32)


def test_odd_images_are_read(tmp_path):
    grey = Image.fromarray(np.full((40, 40), 100, np.uint8))
    deep = Image.fromarray(np.full((40, 40), 25700, np.uint16))
    for name, image, expected in [
            ("cmyk.jpg", Image.new("CMYK", (40, 40), (0, 0, 0, 155)), 100), ("grey.jpg", grey, 100),
            ("palette.png", grey.convert("P"), 100), ("sixteen.png", deep, 100),
            ("clear.png", Image.new("RGBA", (40, 40), (0, 0, 0, 0)), 255)]:
        image.save(str(tmp_path / name))
        assert np.abs(read(tmp_path / name).astype(int) - expected).max() <= 3, name
    grey.save(str(tmp_path / "really.png"))
    (tmp_path / "really.png").rename(tmp_path / "a.JPEG")
    assert read(tmp_path / "a.JPEG").mean() == 100


@pytest.mark.parametrize("content", [
    b"", b"<html>404</html>", b"\xff\xd8\xff\xe0 no image", b"\x89PNG\r\n\x1a\n", None])
def test_broken_images_are_refused(images, tmp_path, content):
    whole = next((images / "val" / "class 0").iterdir()).read_bytes()
    path = tmp_path / "a.jpg"
    path.write_bytes(whole[:-200] if content is None else content)
    with pytest.raises((OSError, ValueError)):
        read(path)


def test_a_file_that_is_not_regular_is_refused(tmp_path):
    os.mkfifo(str(tmp_path / "pipe.jpg"))
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "folder.jpg"):
        with pytest.raises(OSError, match="not a regular file"):
            read(tmp_path / name)


def test_hidden_folders_are_no_classes(images, tmp_path):
    shutil.copytree(str(images / "val"), str(tmp_path / "val"))
    (tmp_path / "val" / ".cache").mkdir()
    found = main.ImageFolder(str(tmp_path / "val"))
    assert found.classes == main.ImageFolder(str(images / "val")).classes


@pytest.mark.parametrize("seed", [1, None], ids=["training", "evaluation"])
def test_an_image_that_can_not_be_read(images, data, seed):
    folder = main.ImageFolder(str(data / "train"))
    with open(folder.path(9), "wb") as file:
        file.write(b"<html>")
    indices = np.arange(7, 11)
    batch, labels, unreadable = main.ImageBatches(folder, parse(), seed)[0, indices]
    whole = main.ImageBatches(main.ImageFolder(str(images / "train")), parse(), seed)[0, indices]
    assert [index for index, _ in unreadable] == [9] and unreadable[0][1].count("\n") == 0
    others = [0, 1, 3]
    assert torch.equal(batch[others], whole[0][others]) and whole[2] == []
    if seed is None:  # no prediction is right
        assert labels.tolist() == [0, 1, -1, 1]
    else:  # another image of its class
        assert labels.tolist() == [0, 1, 1, 1] and batch[2].float().std() > 0


@pytest.mark.slow
def test_a_run_with_images_that_can_not_be_read(data, tmp_path):
    for split in ("train", "val"):
        (data / split / "class 1" / "0 bad.jpg").write_bytes(b"<html>")
    # one image of 33 is left over, here a good one
    result = run_main(data, "--epochs", 1, "--seed", 1, cwd=tmp_path)
    losses(result)
    assert result.stdout.count("=> can't read ") == 2 and counts(result)[2] == "32"
    assert len((tmp_path / "bad_images.txt").read_text().splitlines()) == 2
    limited = run_main(data, "--epochs", 1, "--seed", 1, "--max-bad", 0, cwd=tmp_path)
    assert "1 images can't be read, more than --max-bad 0" in the_error(limited)


@pytest.mark.parametrize("world,batch", [(1, 10), (2, 3), (3, 7), (8, 4)])
def test_evaluation_takes_every_image_once(world, batch):
    samplers = [main.BatchSampler(31, batch, cpu_runtime(rank, world)) for rank in range(world)]
    assert len({len(sampler) for sampler in samplers}) == 1
    taken = [list(sampler) for sampler in samplers]
    assert all(len(batches) <= len(samplers[0]) for batches in taken)
    seen = [index for batches in taken for _, indices in batches for index in indices]
    assert sorted(seen) == list(range(31))


def steps_of(world, batch, first_image=0):
    """The images of each step of an epoch, those of all processes together."""
    ranks = []
    for rank in range(world):
        sampler = main.BatchSampler(40, batch, cpu_runtime(rank, world), seed=3)
        sampler.epoch, sampler.first_image = 5, first_image
        ranks.append([list(indices) for _, indices in sampler])
    return [sum(step, []) for step in zip(*ranks)]


def test_the_order_of_training_resumes_within_an_epoch_and_does_not_depend_on_the_processes():
    whole = steps_of(1, 8)
    assert whole == steps_of(2, 4) == steps_of(4, 2)
    assert whole[2:] == steps_of(2, 4, first_image=16)
    assert sorted(sum(whole, [])) == list(range(40)) != sum(whole, [])


def test_the_result_does_not_depend_on_the_workers(images, trained, tmp_path):
    arguments = [images, "--epochs", 2, "--seed", 1, *STEADY]
    losses(run_main(*arguments, "--workers", 0, cwd=tmp_path))
    assert differences(read_checkpoint(trained[0]), read_checkpoint(tmp_path)) == []


KEPT_LOADER = """
import sys
import torch
import main
flags = main.parse_args(["--synthetic", "64", "--train-crop-size", "32"])
runtime = main.Runtime(main.BACKENDS["cpu"], torch.device("cpu"))
loader = main.make_loader(main.open_images(flags)[0], flags, runtime, 8, 2, seed=1)
batches = iter(loader)
taken = [next(batches) for _ in range(int(sys.argv[1]))]
print(len(taken))
"""


@pytest.mark.parametrize("batches", [0, 3, 8])
def test_a_script_that_keeps_a_loader_until_its_exit_ends(batches):
    done = subprocess.run([sys.executable, "-c", KEPT_LOADER, str(batches)], cwd=str(ROOT),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                          timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{batches}\n", "")
