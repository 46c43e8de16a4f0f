"""Signals: each ends a run with its status, whatever the run is doing or waiting for."""

import signal
import time

import pytest

import fault_injection
from helpers import (ENDLESS, TORCH, free_port, main_command, parent, processes_of, read_checkpoint,
                     read_until, run_main, several, start, start_hanging, start_main, wait_for,
                     wait_until_it_waits)


def end_of(run, timeout=120):
    """What a run printed until it ended by itself, with no process left."""
    output = run.communicate(timeout=timeout)[0]
    assert "Traceback" not in output, output
    return output


@pytest.mark.parametrize("signum,status", [
    pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    pytest.param(signal.SIGUSR1, 138, marks=pytest.mark.slow), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_ends_with_its_status(images, tmp_path, signum, status):
    run = start_main(images, *ENDLESS, cwd=tmp_path)
    read_until(run, r"^Epoch: \[0\]\[0/")
    run.send_signal(signum)
    assert f"=> {signum.name}: stopped, saved" in end_of(run) and run.returncode == status
    assert read_checkpoint(tmp_path) and not processes_of(tmp_path)


@pytest.mark.slow
def test_nohup_is_respected(images, tmp_path):
    command = ["sh", "-c", "trap '' HUP; exec \"$@\"", "-"] + main_command(images, *ENDLESS)
    run = start(command, tmp_path)
    read_until(run, r"^Epoch: \[0\]\[0/")
    run.send_signal(signal.SIGHUP)
    read_until(run, r"^Epoch: \[2\]\[0/")
    run.send_signal(signal.SIGTERM)
    assert "SIGTERM: stopped, saved" in end_of(run) and run.returncode == 143


@pytest.mark.parametrize("count", [
    pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_ctrl_c_while_loaders_start(images, tmp_path, count):
    run = start_main(images, *ENDLESS, "--workers", 4, cwd=tmp_path)
    limit = time.monotonic() + 60
    while len([pid for pid in processes_of(tmp_path) if parent(pid) == run.pid]) < count:
        assert run.poll() is None and time.monotonic() < limit
    run.send_signal(signal.SIGINT)
    end_of(run)
    assert run.returncode in (130, -signal.SIGINT)
    # The kernel ends loaders whose parent has been killed, a moment later.
    assert wait_for(lambda: not processes_of(tmp_path), seconds=10)


def test_ctrl_c_during_the_imports_is_no_traceback(tmp_path):
    run = start_main("--synthetic", 16, cwd=tmp_path)
    limit = time.monotonic() + 60
    while "libtorch" not in maps_of(run.pid) and time.monotonic() < limit:
        time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    assert end_of(run) == "" and run.returncode == -signal.SIGINT


def maps_of(pid):
    """The files that a process has mapped, as text."""
    with open(f"/proc/{pid}/maps") as file:
        return file.read()


@pytest.mark.slow
@pytest.mark.skipif(TORCH < (1, 7), reason="torch 1.5 starts loaders while it waits for them")
def test_a_signal_ends_and_saves_a_run_that_waits_for_its_loaders(images, tmp_path):
    run = start_hanging(images, *ENDLESS, "--seed", 1, cwd=tmp_path)
    read_until(run, r"^Epoch: \[1\]\[0/")
    (tmp_path / "hang").touch()
    wait_until_it_waits(run)
    run.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    assert "SIGTERM: stopped, saved" in end_of(run) and run.returncode == 143
    assert time.monotonic() - begin < 20 and not processes_of(tmp_path)
    (tmp_path / "hang").unlink()
    images_done = read_checkpoint(tmp_path)["images"]
    resumed = run_main(images, "--resume", "auto", "--epochs", 3, cwd=tmp_path)
    assert f"{images_done} images into it" in resumed.stdout and resumed.returncode == 0


@pytest.mark.slow
def test_a_signal_ends_processes_that_wait_for_their_loaders(images, tmp_path):
    url = f"tcp://127.0.0.1:{free_port()}"
    runs = [start_hanging(images, *ENDLESS, "--save-freq", 1, *several(2), "--local_rank", rank,
                          "--dist-url", url, cwd=tmp_path) for rank in range(2)]
    read_until(runs[0], r"^Epoch: \[1\]\[0/")
    (tmp_path / "hang").touch()
    for run in runs:
        wait_until_it_waits(run)
    for run in runs:
        run.send_signal(signal.SIGTERM)
    for run in runs:
        assert "the last checkpoint is ./checkpoint.pth.tar" in end_of(run)
        assert run.returncode == 143
    assert not processes_of(tmp_path)


@pytest.fixture
def stopped_rank_0(images, tmp_path):
    """A function: three ranks that meet over tcp, of which the first stops while they train."""
    runs = []

    def start_and_stop(dist_timeout):
        url = f"tcp://127.0.0.1:{free_port()}"
        runs.extend(start_main(
            images, *ENDLESS, *several(3), "-b", 12, "--local_rank", rank, "--dist-url", url,
            "--dist-timeout", dist_timeout, cwd=tmp_path) for rank in range(3))
        read_until(runs[0], r"^Epoch: \[0\]\[1/")
        runs[0].send_signal(signal.SIGSTOP)
        return runs[1:]

    yield start_and_stop
    for run in runs:
        run.kill()
        run.wait()


@pytest.mark.slow
def test_a_rank_0_that_has_stopped_is_named(stopped_rank_0):
    begin = time.monotonic()
    for run in stopped_rank_0(5):
        assert "rank 0 does not respond" in end_of(run) and run.returncode == 1
    assert time.monotonic() - begin < 5 + 20 + 60  # start included; they would wait for ever


@pytest.mark.slow
def test_sigterm_ends_ranks_that_wait_for_rank_0(stopped_rank_0):
    runs = stopped_rank_0(600)
    time.sleep(2)
    for run in runs:
        run.send_signal(signal.SIGTERM)
    for run in runs:
        assert "SIGTERM: stopped without saving" in end_of(run) and run.returncode == 143


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_signals_at_random_moments_from_the_start_on(tmp_path, processes):
    flags = fault_injection.parse_args(["--fault", "start", "--kills", "4"])
    outcome = fault_injection.inject(flags, tmp_path, processes)
    assert outcome.problems == [] and outcome.stopped == 4
    assert outcome.left_running == outcome.left_in_shared_memory == outcome.left_in_temporary == 0


@pytest.mark.slow
@pytest.mark.parametrize("fault,processes", [("rank", 3), ("loader", 1)])
def test_ranks_and_loaders_that_stop_at_random_moments(tmp_path, fault, processes):
    flags = fault_injection.parse_args(["--fault", fault, "--kills", "2"])
    outcome = fault_injection.inject(flags, tmp_path, processes)
    assert outcome.problems == [] and outcome.stopped == 2 and outcome.left_running == 0
