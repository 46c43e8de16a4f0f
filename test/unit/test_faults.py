"""What can go wrong during a run: it ends with one message, and resumes from where it was."""

import fcntl
import io
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from PIL import Image

import fault_injection
import main
from helpers import (ENDLESS, ROOT, SMALL, TINY, claim_size, counts, differences, finish,
                     folders_differ, free_port, main_command, make_images, needs_bf16, parent,
                     processes_of, read_checkpoint, read_until, run_main, run_program, several,
                     start, start_hanging, start_main, the_error, torchrun, wait_for)


def rank_of(run, folder, rank):
    """The process id of one of the ranks that a command has started."""
    pid = wait_for(lambda: fault_injection.ranks_of(run, folder).get(rank))
    assert pid, f"no rank {rank} of {run.args}"
    return pid


@pytest.fixture
def copy_of_trained(trained, tmp_path):
    """A copy of the folder that ``trained`` left."""
    return pathlib.Path(shutil.copytree(str(trained[0]), str(tmp_path / "copy")))


@pytest.fixture
def copy_of_images(images, tmp_path):
    return pathlib.Path(shutil.copytree(str(images), str(tmp_path / "data")))


def resume(folder, images, *arguments):
    """One more epoch of what ``trained`` left."""
    return run_main(images, "--epochs", 3, "--seed", 1, "--resume", "auto", *arguments, cwd=folder)


# Processes that are killed, stuck or missing


@pytest.mark.slow
@pytest.mark.parametrize("processes,level,signum", [
    (1, "O0", "KILL"), (2, "O0", "TERM"), pytest.param(2, "O1", "KILL", marks=needs_bf16)])
def test_a_run_stopped_at_random_moments_ends_as_an_undisturbed_one(
        tmp_path, processes, level, signum):
    make_images(tmp_path / "data")
    flags = fault_injection.parse_args(["--kills", "3", "--epochs", "2", "--signal", signum]
                                       + (["--rank"] if processes > 1 else []))
    outcome = fault_injection.compare_runs(
        flags, tmp_path / "data", tmp_path / "runs", processes, level, random.Random(processes))
    assert outcome.problems == [] and outcome.stopped == 3
    assert outcome.left_running == 0 and outcome.left_in_shared_memory == 0


@pytest.mark.slow
@pytest.mark.parametrize("moment", [r"^Epoch: \[0\]\[1/", r"^Test: \[0/"],
                         ids=["training", "evaluation"])
def test_one_of_eight_is_killed(images, tmp_path, moment):
    run = start_main(images, *ENDLESS, *several(8), "-b", 16, cwd=tmp_path)
    read_until(run, moment)
    os.kill(rank_of(run, tmp_path, 5), signal.SIGKILL)
    out = run.communicate(timeout=300)[0]
    assert run.returncode and "rank 5 was killed by SIGKILL; ending the others" in out, out
    assert wait_for(lambda: not processes_of(tmp_path))


@pytest.mark.slow
def test_a_stuck_rank_is_named(images, tmp_path):
    run = start_main(images, *ENDLESS, "--dist-timeout", 15, *several(2), cwd=tmp_path)
    read_until(run, r"^Epoch: \[0\]\[1/")
    os.kill(rank_of(run, tmp_path, 1), signal.SIGSTOP)
    out = run.communicate(timeout=300)[0]
    assert run.returncode and out.count("error:") == 1, out
    assert "rank 1 does not respond" in out
    assert wait_for(lambda: not processes_of(tmp_path))


@pytest.mark.slow
def test_a_rank_that_can_not_read_its_data_is_named(images, tmp_path):
    url = f"tcp://127.0.0.1:{free_port()}"
    runs = [start_main(data, *several(2), "--local_rank", rank, "--dist-url", url,
                       "--dist-timeout", 60, cwd=tmp_path)
            for rank, data in enumerate([images, tmp_path / "nowhere"])]
    out = [run.communicate(timeout=300)[0] for run in runs]
    assert all(run.returncode for run in runs)
    assert "rank 1: no folder" in out[1] and "nowhere" in out[1], out


def test_a_loader_that_hangs_is_one_line(images, tmp_path):
    (tmp_path / "hang").touch()
    run = start_hanging(images, "--dist-timeout", 5, cwd=tmp_path)
    out = run.communicate(timeout=300)[0]
    assert run.returncode == 1 and out.count("main.py: error: DataLoader timed out") == 1, out
    assert "Traceback" not in out and wait_for(lambda: not processes_of(tmp_path))


@pytest.mark.parametrize("killed", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_a_loader_that_is_killed_is_one_line(images, tmp_path, killed):
    run = start_main(images, *ENDLESS, "--workers", 2, cwd=tmp_path)
    read_until(run, r"^Epoch: \[0\]\[1/")
    loaders = [pid for pid in processes_of(tmp_path) if parent(pid) == run.pid]
    for pid in loaders[:killed]:
        os.kill(pid, signal.SIGKILL)
    out = run.communicate(timeout=120)[0]
    assert run.returncode == 1 and out.count("main.py: error: DataLoader worker") == 1, out
    assert "Traceback" not in out and wait_for(lambda: not processes_of(tmp_path))


@pytest.mark.parametrize("files", [16] + [
    pytest.param(files, marks=pytest.mark.slow) for files in (20, 24)])
def test_a_small_limit_of_open_files_is_one_line(images, tmp_path, files):
    command = ["sh", "-c", f"ulimit -n {files}; exec \"$@\"", "-"]
    result = subprocess.run(
        command + main_command(images, "--epochs", 1, "--workers", 2), cwd=str(tmp_path),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True, timeout=300)
    if result.returncode:
        assert "Too many open files" in the_error(result)


@pytest.mark.parametrize("size", [pytest.param("4k", marks=pytest.mark.slow), "1m"])
def test_a_small_dev_shm(images, tmp_path, size):
    """Loaders hand over images through memory that has no name there; only locks have."""
    mount = f"mount -t tmpfs -o size={size} none /dev/shm && exec \"$@\""
    command = ["unshare", "-m", "sh", "-c", mount, "-"]
    if not shutil.which("unshare") or subprocess.call(command + ["true"]):
        pytest.skip("no file system can be mounted here")
    result = subprocess.run(
        command + main_command(images, "--epochs", 1), cwd=str(tmp_path), timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    if size == "4k":
        assert "No space left on device" in the_error(result)
    else:
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("redirection,words", [
    pytest.param(">/dev/full", "can't write to stdout: No space left on device",
                 marks=pytest.mark.slow),
    ("| head -n 1", "can't write to stdout: Broken pipe"), (">&-", "stdout is closed")])
def test_a_stdout_that_takes_nothing_is_one_line(images, tmp_path, redirection, words):
    line = f"{{ \"$@\"; echo $? >status; }} {redirection}"
    result = subprocess.run(
        ["sh", "-c", line, "-"] + main_command(images, "--epochs", 2), cwd=str(tmp_path),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, universal_newlines=True, timeout=300)
    assert result.stderr.count("\n") == 1 and f"main.py: error: {words}" in result.stderr
    assert (tmp_path / "status").read_text() == "1\n"


def check_rendezvous_error(url, folder):
    """A rank that finds no others ends with one line."""
    error = the_error(run_main("--synthetic", 16, *several(2), "--local_rank", 0, "--dist-url", url,
                               "--dist-timeout", 3, cwd=folder))
    assert f"rank 0: rendezvous failed at {url} within 3 s (" in error
    assert "start all ranks with the same --dist-url, tcp://HOST:PORT" in error


def test_a_rendezvous_where_nobody_else_comes(tmp_path):
    check_rendezvous_error(f"tcp://127.0.0.1:{free_port()}", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("url", ["tcp://127.0.0.1", "tcp://127.0.0.1:70000", "http://127.0.0.1:80"])
def test_a_rendezvous_without_an_address(tmp_path, url):
    check_rendezvous_error(url, tmp_path)


@pytest.mark.slow
def test_a_rendezvous_at_a_port_in_use(tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        check_rendezvous_error(f"tcp://127.0.0.1:{listener.getsockname()[1]}", tmp_path)


@pytest.mark.slow
def test_two_runs_at_once(images, tmp_path):
    folders = [tmp_path / name for name in "ab"]
    for folder in folders:
        folder.mkdir()
    finish([start_main(images, "--epochs", 2, "--seed", 1, *several(2), cwd=folder)
            for folder in folders])
    assert folders_differ(*folders) == []


@pytest.mark.slow
def test_two_runs_in_one_folder(images, tmp_path):
    folder = os.open(str(tmp_path), os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    refused = run_main(images, "--epochs", 1, cwd=tmp_path)
    os.close(folder)
    assert "another run writes to" in the_error(refused)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_rank(images, tmp_path):
    command = torchrun(2, restarts=1) + main_command(
        images, "--epochs", 10, "--seed", 1, "--save-freq", 1, "--resume", "auto")[2:]
    run = start(command, tmp_path)
    read_until(run, r"^Epoch: \[0\]\[2/")
    os.kill(max(pid for pid in processes_of(tmp_path) if parent(pid) == run.pid), signal.SIGKILL)
    out, status = run.communicate(timeout=300)[0], run.returncode
    if "--max_restarts" not in command:  # the older launcher fails, and is started once more
        assert status != 0
        run = start(command, tmp_path)
        out, status = run.communicate(timeout=300)[0], run.returncode
    assert status == 0 and "resumed from" in out and "Result:" in out, out


# Disks and files


@pytest.mark.slow
def test_a_file_that_may_not_grow(images, copy_of_trained):
    path = copy_of_trained / "checkpoint.pth.tar"
    before = path.read_bytes()
    result = subprocess.run(
        main_command(images, "--epochs", 3, "--seed", 1, "--resume", "auto"),
        cwd=str(copy_of_trained), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        universal_newlines=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2 ** 20, 2 ** 20)))
    error = the_error(result)
    assert re.search(r"can't write \./(checkpoint|model_best)\.pth\.tar: ", error)
    assert "is unchanged" in error
    assert path.read_bytes() == before and not list(copy_of_trained.glob("*.tmp"))


@pytest.fixture
def small_disk(tmp_path):
    """(a folder with a file system of its own, a function that sets its size); needs root."""
    folder = tmp_path / "small disk"
    folder.mkdir()

    def mount(options):
        line = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        return subprocess.call(line, stderr=subprocess.DEVNULL)

    if not shutil.which("mount") or mount("size=1g"):
        pytest.skip("no file system can be mounted here")
    yield folder, lambda size: mount(f"remount,size={size}")
    subprocess.check_call(["umount", str(folder)])


@pytest.mark.slow
def test_a_disk_that_fills_up(images, trained, small_disk, tmp_path):
    disk, resize = small_disk
    shutil.copy(str(trained[0] / "checkpoint.pth.tar"), str(disk))
    size = (disk / "checkpoint.pth.tar").stat().st_size
    assert resize(size * 3 // 2) == 0  # leaves room for half of another checkpoint
    error = the_error(resume(disk, images))
    assert "No space left" in error and "is unchanged" in error
    assert sorted(path.name for path in disk.iterdir()) == [
        "args.json", "checkpoint.pth.tar", "metrics.csv"]
    assert resize(size * 9) == 0
    shutil.copytree(str(disk), str(tmp_path / "roomy"))
    for folder in (disk, tmp_path / "roomy"):
        assert resume(folder, images).returncode == 0
    # The first run there had no room for model_best.pth.tar.
    assert differences(read_checkpoint(disk), read_checkpoint(tmp_path / "roomy")) == []


def cut(content, position, rng):
    return content[:position]


def flip_a_bit(content, position, rng):
    flipped = content[position] ^ 1 << rng.randrange(8)
    return content[:position] + bytes([flipped]) + content[position + 1:]


@pytest.mark.parametrize("damage", [pytest.param(cut, marks=pytest.mark.slow), flip_a_bit])
def test_find_checkpoint_passes_over_a_damaged_file(copy_of_trained, capfd, damage):
    """At 100 positions each: the file is passed over, or nothing that it holds has changed."""
    path, rng = copy_of_trained / "checkpoint.pth.tar", random.Random(0)
    before, content = main.read_checkpoint(str(path)), path.read_bytes()
    flags = main.parse_args(["data", "--resume", "auto", "--output-dir", str(copy_of_trained)])
    ends = [0, 1, 4, len(content) - 4, len(content) - 1]
    for position in rng.sample(range(len(content)), 95) + ends:
        path.write_bytes(damage(content, position, rng))
        found, name = main.find_checkpoint(flags)
        if name == str(path):
            assert differences(found, before) == [], position
        else:
            assert name == str(copy_of_trained / "checkpoint-1.pth.tar")
            assert "trying the one before" in capfd.readouterr().err


def test_find_checkpoint_among_damaged_files_only(copy_of_trained):
    for path in copy_of_trained.glob("checkpoint*"):
        path.write_bytes(b"PK no checkpoint")
    flags = main.parse_args(["data", "--resume", "auto", "--output-dir", str(copy_of_trained)])
    with pytest.raises(main.UserError, match="can be used: remove them to start from scratch"):
        main.find_checkpoint(flags)


KILLED_IN_FSYNC = """
import os, signal, sys
import main

def fsync(file):
    if os.readlink(f"/proc/self/fd/{file}").endswith("/checkpoint.pth.tar.tmp"):
        os.truncate(file, 1000)
        os.kill(os.getpid(), signal.SIGKILL)

os.fsync = fsync
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_resumes_from_the_last_whole_checkpoint(images, copy_of_trained):
    """It was killed while it wrote the newest, and a disk has damaged the one before."""
    killed = subprocess.run(
        [sys.executable, "-c", KILLED_IN_FSYNC] + SMALL
        + [str(images), "--epochs", "3", "--seed", "1", "--resume", "auto"],
        cwd=str(copy_of_trained), stdout=subprocess.DEVNULL,
        env=dict(os.environ, PYTHONPATH=str(ROOT)))
    assert killed.returncode == -signal.SIGKILL
    assert (copy_of_trained / "checkpoint.pth.tar.tmp").stat().st_size == 1000
    newest = copy_of_trained / "checkpoint.pth.tar"
    newest.write_bytes(newest.read_bytes()[:-1000])
    result = resume(copy_of_trained, images)
    assert result.returncode == 0, result.stderr
    assert "checkpoint.pth.tar can't be read as a checkpoint" in result.stderr
    assert "resumed from ./checkpoint-1.pth.tar" in result.stdout


def test_an_output_dir_below_a_file(images, tmp_path):
    (tmp_path / "file").write_text("")
    assert "--output-dir" in the_error(run_main(images, "--output-dir", "file/below", cwd=tmp_path))


@pytest.mark.skipif(not os.path.isdir("/proc/sys"), reason="no folder that takes no files")
def test_an_output_dir_that_takes_no_file_is_noticed_before_the_first_step(images, tmp_path):
    result = run_main(images, "--output-dir", "/proc/sys", cwd=tmp_path)
    assert "can't use --output-dir '/proc/sys'" in the_error(result)
    assert "Epoch:" not in result.stdout


@pytest.mark.parametrize("folder", [
    pytest.param("nowhere", marks=pytest.mark.slow), "/proc/sys"])
def test_an_evaluation_needs_no_output_dir_for_bad_images(
        trained, copy_of_images, tmp_path, folder):
    (copy_of_images / "val" / "class 1" / "bad.jpg").write_bytes(b"no image")
    shutil.rmtree(str(copy_of_images / "train"))
    result = run_main(copy_of_images, "-e", "--resume", trained[0] / "checkpoint.pth.tar",
                      "--output-dir", folder, cwd=tmp_path)
    assert counts(result)[2] == "32" and "=> can't read " in result.stdout


@pytest.mark.parametrize("name", [
    pytest.param("checkpoint.pth.tar.tmp", marks=pytest.mark.slow), "bad_images.txt"])
def test_nothing_is_written_through_a_link(copy_of_images, tmp_path, name):
    (copy_of_images / "val" / "class 1" / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "precious").write_text("precious")
    (tmp_path / name).symlink_to("precious")
    result = run_main(copy_of_images, "--epochs", 1, cwd=tmp_path)
    assert (tmp_path / "precious").read_text() == "precious"
    if name == "bad_images.txt":
        assert "can't write ./bad_images.txt: " in the_error(result)
    else:
        assert result.returncode == 0 and read_checkpoint(tmp_path)


@pytest.mark.slow
def test_the_number_of_processes_changed(images, copy_of_trained):
    result = resume(copy_of_trained, images, *several(2))
    assert result.returncode == 0, result.stderr
    line = next(line for line in result.stdout.splitlines() if "no longer bit-identical" in line)
    assert "processes 1, now 2" in line and "epochs 2, now 3" in line


@pytest.mark.slow
def test_the_data_set_shrank(trained, copy_of_images, tmp_path):
    for path in sorted((copy_of_images / "train" / "class 0").iterdir())[1:]:
        path.unlink()
    shutil.copy(str(trained[0] / "checkpoint-1.pth.tar"), str(tmp_path / "checkpoint.pth.tar"))
    assert "32 images into an epoch" in the_error(resume(tmp_path, copy_of_images))


def test_a_loss_that_is_not_finite(images, tmp_path):
    error = the_error(run_main(images, "--epochs", 3, "--seed", 1, "--lr", "1e30", cwd=tmp_path))
    assert re.search(r"the loss is (nan|inf) at epoch 0 step \d+ \(lr [\d.]+e\+\d+\)", error)
    assert "lower --lr" in error and not list(tmp_path.glob("*.pth.tar"))


def test_a_step_of_one_small_image(run_here):
    crop = ["--train-crop-size", 32, "--val-crop-size", 32, "--val-resize-size", 32]
    error = the_error(run_here("--synthetic", 8, "-b", 1, "--epochs", 1, *crop))
    assert "1 value per channel" in error and "raise --batch-size" in error


@pytest.mark.slow
def test_paths_are_only_paths(images, tmp_path):
    """Nothing in the name of a file or a folder is run, split or taken for a flag, and it may hold
    what stdout can't show."""
    data = tmp_path / "a $(touch ran) `touch ran` 'q' \"d\" ü\nnew"
    shutil.copytree(str(images), str(data))
    bad = data / "train" / "class 0" / "-e $(touch ran) ü\n.jpg"
    next(bad.parent.iterdir()).rename(bad)  # 32 images: an epoch of full batches reads them all
    bad.write_bytes(b"no image")
    output = tmp_path / "-out put;touch ran"
    script = ["bash", str(ROOT / "test" / "train_full_1p.sh"), f"--python={sys.executable}",
              "--device=cpu", f"--data_path={data}", "--device_id=8", "--epochs=1",
              "--batch_size=8", "--lr=0.01", "--workers=1", "--"] + TINY
    for command in (main_command(data, "--epochs", 1), script):
        finish([start(command + [f"--output-dir={output}"], tmp_path, PYTHONIOENCODING="ascii")])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([data.name, output.name])
    listed = (output / "bad_images.txt").read_text(encoding="utf-8")
    assert len(listed.splitlines()) == 1


# Images


def test_a_class_without_a_readable_image(copy_of_images, tmp_path):
    for path in (copy_of_images / "train" / "class 1").iterdir():
        path.write_bytes(b"no image")
    error = the_error(run_main(copy_of_images, "--epochs", 1, cwd=tmp_path))
    assert error.startswith("main.py: error: no image of class 'class 1' can be read: ")


def encode(image, format, **options):
    """The bytes of an image file."""
    out = io.BytesIO()
    image.save(out, format, **options)
    return out.getvalue()


def png_header(width, height, color_type=2):
    """A PNG file that ends after its header."""
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, color_type, 0, 0, 0)
    length, checksum = struct.pack(">I", len(body) - 4), struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + length + body + checksum


FORMATS = {
    "RGB": ("JPEG", "PNG", "BMP", "TIFF", "PPM"), "L": ("JPEG", "PNG", "BMP", "TIFF"),
    "CMYK": ("JPEG", "TIFF"), "1": ("PNG", "BMP"), "P": ("PNG", "BMP"), "RGBA": ("PNG", "TIFF"),
    "LA": ("PNG",)}
EXIF_TURNED = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"


def unusual_images(photo, rng):
    """Name -> content of files that can be read."""
    files = {}
    for mode, formats in FORMATS.items():
        image = photo.convert("L" if mode in ("LA", "1") else mode).convert(mode)
        for format in formats:
            files[f"{mode} {format}.JPEG"] = encode(image, format)
    deep = Image.fromarray(rng.randint(0, 65536, (48, 40)).astype(np.uint16))
    files["16 bit.png"] = encode(deep, "PNG")
    files["progressive.jpg"] = encode(photo, "JPEG", progressive=True)
    files["one pixel.png"] = encode(photo.resize((1, 1)), "PNG")
    files["a line.jpg"] = encode(photo.resize((300, 1)), "JPEG")
    files["turned.jpg"] = encode(photo, "JPEG", exif=EXIF_TURNED)
    files["transparent palette.png"] = encode(photo.convert("P"), "PNG", transparency=0)
    return files


def broken_images(photo, rng):
    """Name -> content of files that can't be read."""
    jpeg, png = encode(photo, "JPEG"), encode(photo, "PNG")
    files = {
        "empty.jpg": b"", "zeros.jpg": bytes(5000),
        "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
        "bomb.png": png_header(60000, 60000), "bomb.jpg": claim_size(jpeg, 65500, 65500),
        "no data.png": png_header(40, 40),
        "no width.png": png_header(0, 40), "unknown type.png": png_header(40, 40, color_type=5)}
    for percent in (2, 30, 50, 70):
        files[f"cut {percent}.jpg"] = jpeg[:len(jpeg) * percent // 100]
        files[f"cut {percent}.png"] = png[:len(png) * percent // 100]
    for number in range(20):
        files[f"noise {number}.jpg"] = jpeg[:3] * (number % 2) + rng.bytes(400)
    return files


def test_sixty_unusual_and_broken_images(copy_of_images, tmp_path):
    rng = np.random.RandomState(0)
    photo = Image.fromarray(rng.randint(0, 256, (48, 40, 3)).astype(np.uint8))
    good, broken = unusual_images(photo, rng), broken_images(photo, rng)
    for split in ("train", "val"):
        for name, content in list(good.items()) + list(broken.items()):
            (copy_of_images / split / "class 2" / name).write_bytes(content)
    result = run_main(copy_of_images, "--epochs", 1, "--seed", 1, "--max-bad", 100, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"of {31 + len(good) + len(broken)} images" in result.stdout

    def names(lines):
        return sorted(os.path.relpath(line.split("\t")[0], str(copy_of_images)) for line in lines)

    expected = {split: sorted(os.path.join(split, "class 2", name) for name in broken)
                for split in ("train", "val")}
    found = names((tmp_path / "bad_images.txt").read_text().splitlines())
    in_train = [name for name in found if name.startswith("train")]
    # An epoch of full batches leaves out the last images of its order.
    assert set(in_train) <= set(expected["train"]) and len(set(in_train)) == len(in_train)
    assert [name for name in found if name.startswith("val")] == expected["val"]

    checked = run_program("tools/check_data.py", copy_of_images, "-j", 1)
    assert checked.returncode == 1, checked.stderr
    lines = checked.stdout.splitlines()
    listed = names(line[len("bad: "):] for line in lines if line.startswith("bad: "))
    assert listed == expected["train"] + expected["val"]
    assert lines[-1] == f"{len(listed)} bad image(s)"
