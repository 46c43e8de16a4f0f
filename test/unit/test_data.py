"""From files to batches: folders, crops, decoding, unreadable images, the order, the loader."""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import main
from helpers import (ROOT, STEADY, claim_size, counts, cpu_runtime, differences, losses, parse,
                     read_checkpoint, run_main, the_error)


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


@pytest.mark.parametrize("with_torch", [True, False], ids=["torchvision", "Pillow"])
def test_a_jpeg_that_claims_too_many_pixels_is_refused(images, tmp_path, monkeypatch, with_torch):
    if not with_torch:
        monkeypatch.setattr(main, "jpeg_decoder", lambda: None)
    whole = next((images / "val" / "class 0").iterdir()).read_bytes()
    assert main.jpeg_pixels(whole) == 28 * 28
    path = tmp_path / "bomb.jpg"
    path.write_bytes(claim_size(whole, 65500, 65500))
    with pytest.raises(OSError, match="pixels"):
        read(path)
    Image.new("RGB", (40, 30)).save(str(path), quality=95, progressive=True)
    assert main.jpeg_pixels(path.read_bytes()) == 1200 and read(path).max() <= 1
    for content in (b"", b"\xff\xd8", b"\xff\xd8\xff", b"\xff\xd8" + b"\xff\xe0\0\x04ab" * 3):
        assert main.jpeg_pixels(content) == 0


PEAK = """
import re, sys, main
for path in sys.argv[1:]:
    try:
        main.read_image(path, lambda w, h: main.resize_center_crop(w, h, 256, 224), 224)
        print("read")
    except OSError as error:
        print(error)
# Not ru_maxrss, which counts the process that started this one, too.
print(int(re.search("VmHWM: *\t *(\\d+) kB", open("/proc/self/status").read()).group(1)) // 1024)
"""


@pytest.mark.slow
def test_odd_images_take_less_than_1_5_gigabytes(tmp_path):
    side = int(main.MAX_PIXELS ** 0.5)
    for mode, name, size in [
            ("RGBA", "clear.png", side), ("I;16", "deep.png", side), ("LA", "grey.png", 6600),
            ("CMYK", "print.tif", side), ("RGB", "photo.jpg", 13300), ("RGB", "a.webp", 6600),
            ("LA", "large.png", 7000)]:
        image = Image.new(mode, (size, size))
        options = {"compression": "tiff_lzw"} if name.endswith("tif") else {"compress_level": 1}
        image.save(str(tmp_path / name), method=0, **options)
        done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path / name)], cwd=str(ROOT),
                              stdout=subprocess.PIPE, universal_newlines=True, timeout=300)
        said, megabytes = done.stdout.splitlines()
        assert said == "read" or "large" in name and "pixels, at most" in said, (name, said)
        assert int(megabytes) < 1500, (name, megabytes)


def test_a_link_to_a_folder_above_is_not_followed(images, tmp_path):
    shutil.copytree(str(images / "val"), str(tmp_path / "val"))
    folder = tmp_path / "val" / "class 0"
    (folder / "loop").symlink_to(folder)
    (folder / "below").mkdir()
    (folder / "below" / "up").symlink_to(tmp_path / "val")
    (folder / "other").symlink_to(images / "train" / "class 0")  # no loop: followed
    found = main.ImageFolder(str(tmp_path / "val"))
    extra = len(list((images / "train" / "class 0").iterdir()))
    assert len(found) == len(main.ImageFolder(str(images / "val"))) + extra


def test_a_folder_that_can_not_be_read_is_named(images, monkeypatch):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("class 2"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(main.UserError, match="can't read '.*class 2': Permission denied"):
        main.ImageFolder(str(images / "val"))


def test_the_reason_of_an_unknown_format_names_no_object(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"<html>")
    with pytest.raises(OSError, match="^not an image of a format that Pillow knows$"):
        read(tmp_path / "a.jpg")


def test_a_file_that_is_not_regular_is_refused(tmp_path):
    os.mkfifo(str(tmp_path / "pipe.jpg"))
    (tmp_path / "folder.jpg").mkdir()
    for name in ("pipe.jpg", "folder.jpg"):
        with pytest.raises(OSError, match="not a regular file"):
            read(tmp_path / name)


def test_what_is_hidden_is_ignored(images, tmp_path):
    shutil.copytree(str(images / "val"), str(tmp_path / "val"))
    (tmp_path / "val" / ".cache").mkdir()
    folder = tmp_path / "val" / "class 0"
    shutil.copytree(str(images / "val" / "class 0"), str(folder / ".ipynb_checkpoints"))
    (folder / "._0.png").write_bytes(b"of another system")
    found, expected = main.ImageFolder(str(tmp_path / "val")), main.ImageFolder(str(images / "val"))
    assert found.classes == expected.classes and found.paths.tolist() == expected.paths.tolist()


def test_a_signal_during_the_decoding_is_no_unreadable_image(images, tmp_path, monkeypatch):
    def stop(*arguments):
        raise main.Stopped(15)

    shutil.copy(str(next((images / "val" / "class 0").iterdir())), str(tmp_path / "image.png"))
    monkeypatch.setattr(main.Image, "open", stop)
    monkeypatch.setattr(main, "jpeg_decoder", lambda: None)
    with pytest.raises(main.Stopped):
        read(tmp_path / "image.png")


@pytest.mark.parametrize("seed", [1, None], ids=["training", "evaluation"])
def test_an_image_that_can_not_be_read(images, data, seed):
    folder = main.ImageFolder(str(data / "train"))
    with open(folder.path(9), "wb") as file:
        file.write(b"<html>")
    indices = np.arange(7, 11)
    good = main.ImageFolder(str(images / "train"))
    damaged, whole = [main.ImageBatches(found, parse(), seed, batch_size=4, slots=1)
                      for found in (folder, good)]
    _, labels, unreadable = damaged[0, 0, indices]
    assert whole[0, 0, indices][2] == []
    batch = damaged.ring[0]
    assert [index for index, _ in unreadable] == [9] and unreadable[0][1].count("\n") == 0
    others = [0, 1, 3]
    assert np.array_equal(batch[others], whole.ring[0][others])
    if seed is None:  # no prediction is right
        assert labels.tolist() == [0, 1, -1, 1]
    else:  # another image of its class
        assert labels.tolist() == [0, 1, 1, 1] and batch[2].std() > 0


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
    seen = [index for batches in taken for _, _, indices in batches for index in indices]
    assert sorted(seen) == list(range(31))


def steps_of(world, batch, first_image=0):
    """The images of each step of an epoch, those of all processes together."""
    ranks = []
    for rank in range(world):
        sampler = main.BatchSampler(40, batch, cpu_runtime(rank, world), seed=3)
        sampler.epoch, sampler.first_image = 5, first_image
        ranks.append([list(indices) for _, _, indices in sampler])
    return [sum(step, []) for step in zip(*ranks)]


def test_the_order_of_training_resumes_within_an_epoch_and_does_not_depend_on_the_processes():
    whole = steps_of(1, 8)
    assert whole == steps_of(2, 4) == steps_of(4, 2)
    assert whole[2:] == steps_of(2, 4, first_image=16)
    assert sorted(sum(whole, [])) == list(range(40)) != sum(whole, [])


@pytest.mark.parametrize("workers", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_the_result_does_not_depend_on_the_workers(images, trained, tmp_path, workers):
    arguments = [images, "--epochs", 2, "--seed", 1, *STEADY]
    losses(run_main(*arguments, "--workers", workers, cwd=tmp_path))
    assert differences(read_checkpoint(trained[0]), read_checkpoint(tmp_path)) == []


def arrays(loader, batch):
    """The images and labels of a loader's batch."""
    slot, labels, _ = batch
    return loader.dataset.ring[slot, :len(labels)], labels


@pytest.mark.parametrize("cores,arguments,expected", [
    (3, [], 3), (256, [], 32), (256, ["--workers", 40], 40)])
def test_the_number_of_loaders(monkeypatch, cores, arguments, expected):
    seen = []
    monkeypatch.setattr(main, "cores_per_process", lambda processes: cores // processes)
    monkeypatch.setattr(main, "make_loader", lambda *given: seen.append(given[4]))
    flags = main.parse_args(["--synthetic", "1000", *map(str, arguments)])
    runtime = cpu_runtime()
    main.build_run(flags, runtime, main.ProcessGroup(flags, runtime), "", {}, None)
    assert seen == [expected] * 2  # for training and for evaluation


@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("seed", [4, None], ids=["training", "evaluation"])
def test_batches_of_loader_processes_are_those_of_none(images, workers, seed):
    """Over two epochs, a slow consumer, a full ring, and in evaluation an odd last batch."""
    folder, flags = main.ImageFolder(str(images / "val")), parse("--dist-timeout", 60)
    loader, alone = [main.make_loader(folder, flags, cpu_runtime(), 2, number, seed)
                     for number in (workers, 0)]
    for epoch in range(2):
        loader.sampler.epoch = alone.sampler.epoch = epoch
        batches = iter(loader)
        first = next(batches)
        count = 0
        for expected in alone:
            time.sleep(0.02 * (count % 3 == 0))
            second = next(batches, None)  # asked for while the first is in use
            pairs = zip(arrays(loader, first), arrays(alone, expected))
            assert [np.array_equal(a, b) for a, b in pairs] == [True, True]
            first, count = second, count + 1
        assert first is None and count == len(loader.sampler)


def test_loaders_share_memory_where_python_does_not_fork_by_default(images):
    """As from Python 3.14 on."""
    flags = parse("--dist-timeout", 60)
    default = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)
    try:
        loader = main.make_loader(main.ImageFolder(str(images / "val")), flags, cpu_runtime(), 2, 1)
        assert [arrays(loader, batch)[0].any() for batch in loader] == [True] * len(loader.sampler)
    finally:
        multiprocessing.set_start_method(default, force=True)


def test_a_loader_that_stops_after_its_last_batch_is_not_waited_for(images):
    """torch 1.5 ends the loaders with the epoch."""
    others = multiprocessing.active_children()
    folder, flags = main.ImageFolder(str(images / "val")), parse("--dist-timeout", 60)
    loader = main.make_loader(folder, flags, cpu_runtime(), 8, 1, seed=4)
    batches = main.prefetch(loader, cpu_runtime(), torch.float32)
    for _ in range(len(loader.sampler) - 1):  # prefetch has then taken the last one, too
        next(batches)
    child, = set(multiprocessing.active_children()) - set(others)
    os.kill(child.pid, signal.SIGSTOP)
    limit = threading.Timer(60, child.kill)
    limit.start()
    assert len(list(batches)) == 1 and child.is_alive()
    limit.cancel()
    os.kill(child.pid, signal.SIGCONT)


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


@pytest.mark.parametrize("batches", [
    pytest.param(0, marks=pytest.mark.slow), 3, pytest.param(8, marks=pytest.mark.slow)])
def test_a_script_that_keeps_a_loader_until_its_exit_ends(batches):
    done = subprocess.run([sys.executable, "-c", KEPT_LOADER, str(batches)], cwd=str(ROOT),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True,
                          timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{batches}\n", "")
