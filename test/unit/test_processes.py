"""Devices and processes: which one this is, who starts them, how they find each other."""

import os
import pathlib
import signal

import pytest

import main
from helpers import (SMALL, command_line, finish, free_port, parse, processes_of, read_until,
                     several, start, start_main, the_error, torchrun)

FOUR = several(4)
FIVE_OF_8 = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}


@pytest.mark.parametrize("arguments,variables,expected", [
    ([], {}, (0, 1, 0, 1)),
    (FOUR + ["--local_rank", "3"], {}, (3, 4, 3, 4)),
    (FOUR + ["--local-rank", "1", "--world-size", "2", "--rank", "1"], {}, (5, 8, 1, 4)),
    ([], FIVE_OF_8, (5, 8, 1, 4)),
    (["--local_rank", "1"], {"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 1, 2)),
    (["--world-size", "2", "--rank", "1"], {}, (1, 2, 0, 1))])
def test_the_rank_of_a_process(monkeypatch, arguments, variables, expected):
    for name in FIVE_OF_8:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert tuple(main.resolve_rank(parse(*arguments))) == expected


@pytest.mark.parametrize("device", ["npu", "gpu"])
def test_a_device_that_is_not_available_is_refused(run_here, device):
    if main.device_count(main.BACKENDS[device])[0]:
        pytest.skip(f"this machine has {device}")
    error = the_error(run_here("--synthetic", 16, "--device", device))
    assert f"--device {device} is not available" in error


def check_outputs(outputs):
    """The first process prints the result, and no other."""
    assert "Result:" in outputs[0], outputs
    assert not any("Result:" in output for output in outputs[1:]), outputs


def test_processes_started_from_outside(images, tmp_path):
    address = f"tcp://127.0.0.1:{free_port()}"
    outputs = finish([start_main(
        images, "--epochs", 1, *several(2), "--local_rank", rank, "--world-size", 1, "--rank", 0,
        "--dist-url", address, cwd=tmp_path) for rank in range(2)])
    check_outputs(outputs)
    assert f"2 processes, rendezvous at {address}, collectives over gloo" in outputs[0]


def test_torchrun(images, tmp_path):
    output, = finish([start(torchrun(2) + SMALL + [str(images), "--epochs", "1"], tmp_path)])
    assert output.count("Result:") == 1, output


def test_two_nodes_of_one_process_are_one_run(images, tmp_path):
    address = f"tcp://127.0.0.1:{free_port()}"
    outputs = finish([start_main(
        images, "--epochs", 1, "--world-size", 2, "--rank", node, "--dist-url", address,
        cwd=tmp_path) for node in range(2)])
    check_outputs(outputs)
    assert f"2 processes, rendezvous at {address}" in outputs[0] and "of 31 images" in outputs[0]


@pytest.mark.slow
def test_two_nodes_of_two_processes(images, tmp_path):
    address = f"tcp://127.0.0.1:{free_port()}"
    outputs = finish([start_main(
        images, "--epochs", 1, *several(2), "--world-size", 2, "--rank", node,
        "--dist-url", address, cwd=tmp_path) for node in range(2)])
    check_outputs(outputs)
    assert f"4 processes, rendezvous at {address}" in outputs[0] and "of 31 images" in outputs[0]


LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")


def listening_addresses(pid):
    """The addresses, as the kernel writes them, that a process listens to."""
    inodes, found = set(), []
    for entry in pathlib.Path(f"/proc/{pid}/fd").iterdir():
        try:
            inodes.add(os.readlink(str(entry)))
        except OSError:
            pass
    for table in ("tcp", "tcp6"):
        path = pathlib.Path(f"/proc/{pid}/net/{table}")
        for line in path.read_text().splitlines()[1:] if path.exists() else []:
            fields = line.split()
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in inodes:
                found.append(fields[1].split(":")[0])
    return found


def test_processes_of_one_node_listen_to_no_network_and_end_together(images, tmp_path):
    run = start_main(images, "--epochs", 30, *several(2), cwd=tmp_path)
    lines = read_until(run, r"^Epoch: \[0\]\[1/")
    pids = processes_of(tmp_path)
    ranks = [pid for pid in pids if "--local_rank" in command_line(pid)]
    addresses = [address for pid in pids for address in listening_addresses(pid)]
    run.send_signal(signal.SIGTERM)
    output = "".join(lines) + run.communicate(timeout=120)[0]
    assert run.returncode == 143 and "SIGTERM: stopped" in output, output
    assert len(ranks) >= 2 and all(address in LOOPBACK for address in addresses), addresses
    assert processes_of(tmp_path) == []
    assert (tmp_path / "checkpoint.pth.tar").exists()
