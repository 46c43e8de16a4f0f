"""What can go wrong while a run is under way: it ends soon with one message, and goes on from where it was."""

import argparse
import fcntl
import io
import os
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import chaos
import main
from conftest import ROOT, SMALL, checkpoint, free_port, run_main, the_error, torchrun

pytestmark = pytest.mark.slow
BF16 = hasattr(torch, "autocast")


def start(*arguments, cwd, **options):
    """main.py in the background, with stdout and stderr together as text."""
    return subprocess.Popen([sys.executable, str(ROOT / "main.py")] + [str(a) for a in arguments], cwd=str(cwd),
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True, **options)


def read_until(run, pattern):
    """The lines up to the first that matches."""
    lines = []
    for line in run.stdout:
        lines.append(line)
        if re.search(pattern, line):
            break
    return lines


def cards(count):
    return ["--multiprocessing-distributed", "--device-list", ",".join(map(str, range(count)))]


def rank_of(run, rank):
    """The process id of one of the ranks that a command has started."""
    for pid in os.listdir("/proc"):
        if pid.isdigit() and chaos.parent(int(pid)) == run.pid and (
                "--local_rank\0{}\0".format(rank) in chaos.command_line(int(pid))):
            return int(pid)
    raise AssertionError("no rank {}".format(rank))


@pytest.mark.parametrize("processes,level,signum", [(1, "O0", "KILL"), (2, "O0", "TERM")] + (
    [(2, "O1", "KILL")] if BF16 else []))
def test_stopped_at_random_moments(tmp_path, processes, level, signum):
    chaos.make_images(tmp_path / "data")
    arguments = argparse.Namespace(kills=4, signal=signum, script=False, rank=processes > 1, epochs=2)
    stops, _, longest, left, leaked, problems = chaos.torment(
        arguments, tmp_path / "data", tmp_path / "runs", processes, level, random.Random(processes))
    assert problems == [] and stops == 4 and left == 0 and leaked == 0
    assert longest < 30


@pytest.mark.parametrize("moment", [r"^Epoch: \[0\]\[1/", r"^Test: \[0/"], ids=["training", "evaluation"])
def test_one_of_eight_is_killed(images, tmp_path, moment):
    run = start(images, "--epochs", 30, *cards(8), *SMALL, "-b", "16", cwd=tmp_path)
    read_until(run, moment)
    begin = time.time()
    os.kill(rank_of(run, 5), signal.SIGKILL)
    out = run.communicate(timeout=120)[0]
    assert run.returncode not in (0, None) and time.time() - begin < 60
    assert "rank 5 was killed by SIGKILL" in out and chaos.processes_of(tmp_path) == []


def test_a_stuck_rank_is_named(images, tmp_path):
    run = start(images, "--epochs", 30, "--dist-timeout", 8, *cards(2), *SMALL, cwd=tmp_path)
    read_until(run, r"^Epoch: \[0\]\[1/")
    stuck = rank_of(run, 1)
    os.kill(stuck, signal.SIGSTOP)
    out = run.communicate(timeout=120)[0]
    assert run.returncode not in (0, None) and out.count("error:") == 1, out
    assert "rank 1 gone or stuck" in out and chaos.processes_of(tmp_path) == []


def test_a_rank_that_can_not_read_its_data_is_named(images, tmp_path):
    shutil.copytree(str(images), str(tmp_path / "data"))
    address = "tcp://127.0.0.1:{}".format(free_port())
    runs = [start(data, *cards(2), "--local_rank", rank, "--dist-url", address, "--dist-timeout", 60, *SMALL,
                  cwd=tmp_path) for rank, data in enumerate([images, tmp_path / "nowhere"])]
    out = [run.communicate(timeout=120)[0] for run in runs]
    assert all(run.returncode for run in runs)
    assert "rank 1: no folder" in out[1] and "nowhere" in out[1], out


def test_nobody_comes(images, tmp_path):
    result = run_main(images, *cards(2), "--local_rank", 0, "--dist-url", "tcp://127.0.0.1:{}".format(free_port()),
                      "--dist-timeout", 3, cwd=tmp_path)
    assert "within 3 s" in the_error(result)


@pytest.mark.parametrize("url", ["tcp://127.0.0.1", "tcp://127.0.0.1:70000", "http://127.0.0.1:80"])
def test_an_address_that_is_none(tmp_path, url):
    result = run_main("--synthetic", 16, *cards(2), "--local_rank", 0, "--dist-url", url, cwd=tmp_path)
    assert "is no address: expected tcp://HOST:PORT" in the_error(result)


def test_a_port_in_use(images, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        result = run_main(images, *cards(2), "--local_rank", 0, "--dist-url", "tcp://127.0.0.1:{}".format(port),
                          "--dist-timeout", 5, cwd=tmp_path)
    assert str(port) in the_error(result)


def test_two_runs_at_once(images, tmp_path):
    runs, places = [], [tmp_path / name for name in "ab"]
    for place in places:
        place.mkdir()
        runs.append(start(images, "--epochs", 2, "--seed", 1, *cards(2), *SMALL, cwd=place))
    out = [run.communicate(timeout=200)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0], out
    assert chaos.folders_differ(*places) == []


def test_two_runs_in_one_folder(images, tmp_path):
    folder = os.open(str(tmp_path), os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    refused = run_main(images, "--epochs", 1, cwd=tmp_path)
    os.close(folder)
    assert "another run writes to" in the_error(refused)


def test_torchrun_starts_a_killed_rank_again(images, tmp_path):
    command = torchrun(2, restarts=1)
    command += [str(images), "--epochs", "2", "--seed", "1", "--save-freq", "1", "--resume", "auto"] + SMALL
    run = subprocess.Popen(command, cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                           universal_newlines=True)
    read_until(run, r"^Epoch: \[0\]\[2/")
    ranks = [pid for pid in chaos.processes_of(tmp_path) if chaos.parent(pid) == run.pid]
    os.kill(max(ranks), signal.SIGKILL)
    out, status = run.communicate(timeout=200)[0], run.returncode
    if "--max-restarts" not in command:  # the older launcher ends, and goes on when it is started again
        assert status != 0
        out = subprocess.run(command, cwd=str(tmp_path), stdout=subprocess.PIPE, universal_newlines=True).stdout
        status = 0
    assert status == 0 and "resumed from" in out and "Result:" in out, out


# Files


@pytest.fixture(scope="module")
def one_epoch(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one epoch")
    assert run_main(images, "--epochs", 2, "--seed", 1, "--save-freq", 2, cwd=folder).returncode == 0
    return folder


def go_on(folder, images, **options):
    return run_main(images, "--epochs", 3, "--seed", 1, "--resume", "auto", cwd=folder, **options)


def test_a_full_disk(images, one_epoch, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(str(one_epoch), str(folder))
    before = (folder / "checkpoint.pth.tar").read_bytes()
    command = [sys.executable, str(ROOT / "main.py"), str(images), "--epochs", "3", "--resume", "auto"] + SMALL
    result = subprocess.run(command, cwd=str(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            universal_newlines=True,
                            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, 2 ** 20)))
    error = the_error(result)
    assert "can't write" in error and "the last good checkpoint is ./checkpoint.pth.tar" in error
    assert (folder / "checkpoint.pth.tar").read_bytes() == before and not list(folder.glob("*.tmp"))
    assert go_on(folder, images).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """(a folder on a file system of its own, a function that gives it so many bytes); only root can have one."""
    folder = tmp_path / "small disk"
    folder.mkdir()

    def mount(size, *options):
        return subprocess.call(["mount", "-t", "tmpfs", "-o", ",".join(options + ("size={}".format(size),)), "none",
                                str(folder)], stderr=subprocess.DEVNULL)

    if not shutil.which("mount") or mount(2 ** 30):
        pytest.skip("no file system can be mounted here")
    yield folder, lambda size: mount(size, "remount")
    subprocess.check_call(["umount", str(folder)])


def test_a_disk_that_fills_up(images, one_epoch, small_disk, tmp_path):
    disk, resize = small_disk
    shutil.copy(str(one_epoch / "checkpoint.pth.tar"), str(disk))
    size = (disk / "checkpoint.pth.tar").stat().st_size
    assert resize(size * 3 // 2) == 0  # room for half a checkpoint beside it
    error = the_error(go_on(disk, images))
    assert "No space left" in error and "the last good checkpoint is ./checkpoint.pth.tar" in error
    assert sorted(path.name for path in disk.iterdir()) == ["checkpoint.pth.tar", "metrics.csv"]
    assert resize(size * 9) == 0
    shutil.copytree(str(disk), str(tmp_path / "roomy"))
    for folder in (disk, tmp_path / "roomy"):
        assert go_on(folder, images).returncode == 0
    assert chaos.differences(checkpoint(disk), checkpoint(tmp_path / "roomy")) == []


@pytest.mark.parametrize("damage", ["cut", "flipped", "half written"])
def test_damaged_checkpoints_are_passed_over(images, one_epoch, tmp_path, damage):
    folder = tmp_path / "copy"
    shutil.copytree(str(one_epoch), str(folder))
    path = folder / "checkpoint.pth.tar"
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[:len(whole) // 2])
    elif damage == "flipped":
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1:])
    else:
        (folder / "checkpoint.pth.tar.tmp").write_bytes(whole[:1000])
    result = go_on(folder, images)
    assert result.returncode == 0, result.stderr
    assert ("damaged" in result.stderr) == (damage != "half written")
    assert "resumed from ./checkpoint{}.pth.tar".format("" if damage == "half written" else "-1") in result.stdout


def test_any_cut_and_any_flipped_bit(one_epoch, tmp_path, capfd):
    """At 20 places each: the file is passed over, or nothing that it holds has changed."""
    for name in ("checkpoint.pth.tar", "checkpoint-1.pth.tar"):
        shutil.copy(str(one_epoch / name), str(tmp_path))
    path, rng = tmp_path / "checkpoint.pth.tar", random.Random(0)
    before, whole = main.read_checkpoint(str(path)), path.read_bytes()
    flags = main.parse_args(["data", "--resume", "auto", "--output-dir", str(tmp_path)])
    places = rng.sample(range(len(whole)), 30) + list(range(5)) + [len(whole) - i for i in range(1, 6)]
    for number, place in enumerate(places):
        flipped = bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1:]
        path.write_bytes(whole[:place] + (flipped if number % 2 else b""))
        found, name = main.find_checkpoint(flags)
        if name == str(path):
            assert chaos.differences(found, before) == [], place
        else:
            assert name.endswith("checkpoint-1.pth.tar") and "trying the one before" in capfd.readouterr().err


def test_killed_while_it_writes(images, one_epoch, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(str(one_epoch), str(folder))
    script = ("import os, signal, sys, main\n"
              "def fsync(file):\n"
              "    if os.readlink('/proc/self/fd/{}'.format(file)).endswith('.pth.tar.tmp'):\n"
              "        os.truncate(file, 1000)\n"
              "        os.kill(os.getpid(), signal.SIGKILL)\n"
              "os.fsync = fsync\n"
              "sys.exit(main.main(sys.argv[1:]))")
    killed = subprocess.run([sys.executable, "-c", script, str(images), "--epochs", "3", "--resume", "auto"] + SMALL,
                            cwd=str(folder), env=dict(os.environ, PYTHONPATH=str(ROOT)), stdout=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert (folder / "checkpoint.pth.tar.tmp").stat().st_size == 1000
    result = go_on(folder, images)
    assert result.returncode == 0 and "resumed from ./checkpoint.pth.tar" in result.stdout, result.stderr


def test_all_checkpoints_damaged(images, one_epoch, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(str(one_epoch), str(folder))
    for path in folder.glob("checkpoint*"):
        path.write_bytes(b"PK rubbish")
    result = go_on(folder, images)
    assert result.returncode == 1 and "remove them to start anew" in result.stderr.splitlines()[-1]


def test_output_dir_that_can_not_be(images, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--output-dir" in the_error(run_main(images, "--output-dir", "file/below", cwd=tmp_path))


def test_the_world_size_changed(images, one_epoch, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(str(one_epoch), str(folder))
    result = run_main(images, "--epochs", 3, "--seed", 1, "--resume", "auto", *cards(2), cwd=folder)
    assert result.returncode == 0 and "no longer bit-identical" in result.stdout
    assert "it had 1 processes, now 2" in result.stdout


def test_the_data_set_shrank(images, one_epoch, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(str(images), str(data))
    for path in list((data / "train" / "class 0").iterdir())[1:]:
        path.unlink()
    shutil.copy(str(one_epoch / "checkpoint-1.pth.tar"), str(tmp_path / "checkpoint.pth.tar"))
    assert "32 images into an epoch" in the_error(go_on(tmp_path, data))


def test_a_class_without_a_readable_image(images, tmp_path):
    shutil.copytree(str(images), str(tmp_path / "data"))
    for path in (tmp_path / "data" / "train" / "class 1").iterdir():
        path.write_bytes(b"rubbish")
    error = the_error(run_main(tmp_path / "data", "--epochs", 1, cwd=tmp_path))
    assert error.startswith("main.py: error: no image of class 'class 1' can be read: ")


def test_a_loss_that_is_not_finite(images, tmp_path):
    error = the_error(run_main(images, "--epochs", 3, "--seed", 1, cwd=tmp_path, after=["--lr", "1e30"]))
    assert re.search(r"the loss is (nan|inf) at epoch 0 step \d+ \(lr [\d.]+e\+\d+\)", error)
    assert "no checkpoint yet" in error and not list(tmp_path.glob("*.pth.tar"))


def test_paths_are_only_paths(images, tmp_path):
    data = tmp_path / "a $(touch ran) `touch ran` 'q' \"d\" ü\nnew"
    shutil.copytree(str(images), str(data))
    (data / "train" / "class 0" / "-e $(touch ran) ü\n.jpg").write_bytes(b"no image")
    output = tmp_path / "-out put;touch ran"
    for line in ([sys.executable, str(ROOT / "main.py"), str(data), "--epochs", "1", "--output-dir=" + str(output)],
                 ["bash", str(ROOT / "test" / "train_full_1p.sh"), "--python=" + sys.executable, "--device=cpu",
                  "--data_path=" + str(data), "--device_id=8", "--epochs=1", "--batch_size=8", "--lr=0.01", "--",
                  "--output-dir=" + str(output)]):
        own = [w for w in SMALL if w not in ("--device", "cpu", "-b", "8")] if line[0] == "bash" else SMALL
        done = subprocess.run(line + own, cwd=str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              universal_newlines=True)
        assert done.returncode == 0, done.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([data.name, output.name])
    assert len((output / "bad_images.txt").read_text(encoding="utf-8").splitlines()) == 1


# Images


def png(width, height, mode=2, chunks=b""):
    """A PNG's beginning: header and whatever follows."""
    header = struct.pack(">IIBBBBB", width, height, 8, mode, 0, 0, 0)
    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunks


def odd_images():
    """(good files, broken files): name -> bytes, 60 in all."""
    rng = np.random.RandomState(0)
    photo = Image.fromarray(rng.randint(0, 256, (48, 40, 3)).astype(np.uint8))
    good, broken = {}, {}

    def encoded(image, kind, **options):
        out = io.BytesIO()
        image.save(out, kind, **options)
        return out.getvalue()

    for mode in ("RGB", "L", "CMYK", "1", "P", "RGBA", "LA"):
        image = photo.convert("RGB").convert("L" if mode in ("LA", "1") else mode).convert(mode)
        for kind in {"RGB": ("JPEG", "PNG", "BMP", "TIFF", "PPM"), "L": ("JPEG", "PNG", "BMP", "TIFF"),
                     "CMYK": ("JPEG", "TIFF"), "1": ("PNG", "BMP"), "P": ("PNG", "BMP"), "RGBA": ("PNG", "TIFF"),
                     "LA": ("PNG",)}[mode]:
            good["{} {}.JPEG".format(mode, kind)] = encoded(image, kind)
    good["16 bit.png"] = encoded(Image.fromarray(rng.randint(0, 65536, (48, 40)).astype(np.uint16)), "PNG")
    good["progressive.jpg"] = encoded(photo, "JPEG", progressive=True)
    good["one pixel.png"] = encoded(photo.resize((1, 1)), "PNG")
    good["a line.jpg"] = encoded(photo.resize((300, 1)), "JPEG")
    good["turned.jpg"] = encoded(photo, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0")
    good["palette clear.png"] = encoded(photo.convert("P"), "PNG", transparency=0)
    jpeg, whole_png = encoded(photo, "JPEG"), encoded(photo, "PNG")
    for share in (2, 30, 50, 70):
        broken["cut {}.jpg".format(share)] = jpeg[:len(jpeg) * share // 100]
        broken["cut {}.png".format(share)] = whole_png[:len(whole_png) * share // 100]
    broken["empty.jpg"] = b""
    broken["page.jpg"] = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    broken["zeros.jpg"] = bytes(5000)
    broken["bomb.png"] = png(60000, 60000)
    broken["no data.png"] = png(40, 40)
    broken["nothing wide.png"] = png(0, 40)
    broken["odd type.png"] = png(40, 40, mode=5)
    while len(good) + len(broken) < 60:
        broken["noise {}.jpg".format(len(broken))] = jpeg[:3] * (len(broken) % 2) + rng.bytes(400)
    return good, broken


def test_sixty_odd_images(images, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(str(images), str(data))
    good, broken = odd_images()
    for split in ("train", "val"):
        for name, content in list(good.items()) + list(broken.items()):
            (data / split / "class 2" / name).write_bytes(content)
    result = run_main(data, "--epochs", 1, "--seed", 1, "--max-bad", 100, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    named = [os.path.relpath(line.split("\t")[0], str(data)) for line in
             (tmp_path / "bad_images.txt").read_text().splitlines()]
    expected = sorted(os.path.join(split, "class 2", name) for split in ("train", "val") for name in broken)
    assert sorted(named) == [name for name in expected if name in named] and len(set(named)) == len(named)
    assert [n for n in sorted(named) if n.startswith("val")] == [n for n in expected if n.startswith("val")]
    assert "of 91 images" in result.stdout
    checked = run_main(data, "--check-data", cwd=tmp_path)
    listed = [os.path.relpath(line[5:].split("\t")[0], str(data)) for line in checked.stdout.splitlines()
              if line.startswith("bad: ")]
    assert checked.returncode == 1 and sorted(listed) == expected
