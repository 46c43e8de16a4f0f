"""The command line: what is understood, and what is refused before anything starts."""

import pytest

import main
from helpers import the_error


@pytest.mark.parametrize("arguments,words", [
    ([], "no data folder"), (["d", "--epochs", "none"], "whole number"),
    (["d", "-b", "0"], "expected 1 or more"), (["d", "--keep", "101"], "expected 1 to 100"),
    (["d", "--lr", "nan"], "expected 0"),
    (["d", "--device", "tpu"], "npu"), (["d", "--device-list", "0,0"], "different numbers"),
    (["d", "-e"], "--resume"), (["d", "--weights", "w.pth"], "--pretrained"),
    (["d", "--val-crop-size", "300"], "--val-resize-size"),
    (["d", "--rank", "2", "--world-size", "2"], "--world-size"),
    (["d", "--what"], "unrecognized arguments: --what"),
    (["d", "--batch", "20"], "unrecognized arguments: --batch"),
    (["d", "--dist-timeout", "1e300"], "expected 1 to 1000000")])
def test_an_invalid_command_line_is_refused_in_one_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        main.parse_args(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and error.count("\n") == 1


def test_the_reference_command_line_is_understood():
    flags = main.parse_args(
        "--device npu --device-list 0,1,2,3,4,5,6,7 -a mnasnet1_0 -j 16 --epochs 300 "
        "--start-epoch 1 -b 4096 --ls 0.1 --learning-rate 1.4 --momentum 0.9 --weight-decay 1e-5 "
        "-p 20 --world-size 1 --rank 0 --npu 3 --dist-url env:// --dist-backend hccl --seed 49 "
        "--warmup 5 --local_rank 2 --run-prof --multiprocessing-distributed data".split())
    assert flags.device_list == list(range(8)) and flags.local_rank == 2
    assert (flags.lr, flags.wd, flags.label_smoothing, flags.batch_size) == (1.4, 1e-5, 0.1, 4096)


def test_short_flags_take_their_value_at_once():
    assert main.parse_args(["d", "-b64", "-j2"]).batch_size == 64


def test_what_wins_is_said(images, trained, run_here):
    path = trained[0] / "checkpoint.pth.tar"
    result = run_here("a folder", "--synthetic", 16, "--epochs", 1)
    assert "=> --synthetic: a folder is not read" in result.stdout
    result = run_here(images, "--resume", path, "--pretrained", "--weights", "none", "--epochs", 2)
    assert result.returncode == 0 and f"=> --resume {path} wins over --pretrained" in result.stdout


def test_help_shows_the_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        main.parse_args(["--help"])
    assert stop.value.code == 0 and "(default: 256)" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("arguments,words", [
    (["-e", "--resume", "auto"], "--resume auto: no checkpoint in '.' to evaluate"),
    (["--resume", "nowhere.pth"], "no checkpoint 'nowhere.pth'"),
    (["--epochs", "2", "--start-epoch", "5"], "next epoch 5, --epochs 2: nothing to do"),
    (["-b", "64"], "--batch-size 64 gives steps of 64 images"),
    (["--device-list", "0,1"], "add --multiprocessing-distributed")])
def test_flags_that_do_not_fit_what_is_found(run_here, arguments, words):
    assert words in the_error(run_here("--synthetic", 16, *arguments))
