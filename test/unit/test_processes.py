"""Devices and processes: which one this is, who starts them, how they find each other."""

import os
import pathlib
import shutil
import signal

import pytest

import main
from helpers import (SMALL, command_line, finish, free_port, parse, processes_of, read_until,
                     several, start, start_main, the_error, torchrun, wait_for)

FOUR = several(4)
FIVE_OF_8 = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
SLURM_5_OF_8 = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "SLURM_NNODES": "2"}
SLURM_JOB = {"SLURM_JOB_NODELIST": "", "SLURM_JOB_ID": "", "MASTER_ADDR": "", "MASTER_PORT": ""}


@pytest.fixture
def environment(monkeypatch):
    """A function that leaves of the variables of launchers only those that are given."""

    def set_variables(variables):
        for name in list(FIVE_OF_8) + list(SLURM_5_OF_8) + list(SLURM_JOB):
            monkeypatch.setenv(name, "")  # is restored in the end, where main.py sets it
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


@pytest.mark.parametrize("arguments,variables,expected", [
    ([], {}, (0, 1, 0, 1)),
    (FOUR + ["--local_rank", "3"], {}, (3, 4, 3, 4)),
    (FOUR + ["--local-rank", "1", "--world-size", "2", "--rank", "1"], {}, (5, 8, 1, 4)),
    ([], FIVE_OF_8, (5, 8, 1, 4)),
    (["--local_rank", "1"], {"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 1, 2)),
    (["--world-size", "2", "--rank", "1"], {}, (1, 2, 0, 1)),
    ([], SLURM_5_OF_8, (5, 8, 1, 4)),
    ([], {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"}, (1, 2, 1, 2)),
    ([], {"SLURM_PROCID": "0"}, (0, 1, 0, 1)),  # a batch script, without srun
    ([], dict(SLURM_5_OF_8, **FIVE_OF_8), (5, 8, 1, 4)),  # torchrun within a job
    (["--world-size", "2", "--rank", "1"], SLURM_5_OF_8, (1, 2, 0, 1))])
def test_the_rank_of_a_process(environment, arguments, variables, expected):
    environment(variables)
    assert tuple(main.resolve_rank(parse(*arguments))) == expected


@pytest.mark.parametrize("arguments,variables,words", [
    ([], {"RANK": "1"}, "WORLD_SIZE is None"), ([], {"WORLD_SIZE": "2"}, "RANK is None"),
    ([], {"RANK": "2", "WORLD_SIZE": "2"}, "RANK is '2', expected 0 to 1"),
    ([], {"RANK": "a", "WORLD_SIZE": "2"}, "RANK is 'a'"),
    ([], dict(FIVE_OF_8, LOCAL_RANK="4"), "LOCAL_RANK is '4', expected 0 to 3"),
    ([], dict(FIVE_OF_8, LOCAL_WORLD_SIZE="3"), "the same number of ranks on each node"),
    ([], dict(SLURM_5_OF_8, SLURM_NNODES="3"), "the same number of ranks on each node"),
    ([], dict(SLURM_5_OF_8, SLURM_PROCID="8"), "SLURM_PROCID is '8', expected 0 to 7"),
    (["--world-size", "4"], FIVE_OF_8, "no other --world-size"),
    (["--local_rank", "1"], {}, "--local_rank needs --multiprocessing-distributed"),
    (["--local_rank", "0", "--device-list", "0"], {}, "--local_rank needs")])
def test_ranks_that_can_not_be(environment, arguments, variables, words):
    environment(variables)
    with pytest.raises(main.UserError, match=words):
        main.resolve_rank(parse(*arguments))


@pytest.mark.parametrize("url,one_node,variables,expected", [
    ("tcp://a:1", False, {"MASTER_PORT": "x"}, "tcp://a:1"),
    ("env://", True, {}, "tcp://127.0.0.1:29688"),
    ("env://", True, {"SLURM_JOB_NODELIST": "a[1-2]", "SLURM_JOB_ID": "7"},
     "tcp://127.0.0.1:20007"),
    ("env://", False, {"MASTER_ADDR": "a", "MASTER_PORT": "1"}, "tcp://a:1"),
    ("env://", False, {"SLURM_JOB_NODELIST": "n[03-05,9],b", "SLURM_JOB_ID": "70007"},
     "tcp://n03:20007"),
    ("env://", False, {"SLURM_JOB_NODELIST": "gpu-a,gpu-b", "SLURM_JOB_ID": "1"},
     "tcp://gpu-a:20001")])
def test_where_the_ranks_meet(environment, url, one_node, variables, expected):
    environment(variables)
    assert main.resolve_address(url, one_node) == expected


@pytest.mark.parametrize("one_node,variables,words", [
    (True, {"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc', expected 1 to 65535"),
    (False, {}, "several nodes need an address")])
def test_an_address_that_can_not_be(environment, one_node, variables, words):
    environment(variables)
    with pytest.raises(main.UserError, match=words):
        main.resolve_address("env://", one_node)


def test_two_tasks_of_a_slurm_job(images, tmp_path):
    job = {"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_JOB_ID": str(free_port()),
           "SLURM_JOB_NODELIST": "localhost"}
    outputs = finish([start_main(images, "--epochs", 1, cwd=tmp_path, SLURM_PROCID=str(task),
                                 SLURM_LOCALID=str(task), **job) for task in range(2)])
    check_outputs(outputs)
    assert "2 processes, rendezvous at tcp://127.0.0.1:2" in outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize("both,second", [
    ([], ["--lr", "0.5"]), ([], ["-b", "6"]),
    (["--resume", "auto"], ["--output-dir", "a folder without a checkpoint"])])
def test_ranks_with_other_flags_or_checkpoints_are_refused(
        images, trained, tmp_path, both, second):
    shutil.copy(str(trained[0] / "checkpoint.pth.tar"), str(tmp_path))
    url = f"tcp://127.0.0.1:{free_port()}"
    runs = [start_main(images, "--epochs", 1, *several(2), "--local_rank", rank, "--dist-url", url,
                       *both, *more, cwd=tmp_path) for rank, more in enumerate([[], second])]
    outputs = [run.communicate(timeout=300)[0] for run in runs]
    assert [run.returncode for run in runs] == [1, 1]
    assert sum("the ranks differ in flags, data or checkpoint" in out for out in outputs) >= 1


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


@pytest.mark.slow
def test_torchrun(images, tmp_path):
    output, = finish([start(torchrun(2) + SMALL + [str(images), "--epochs", "1"], tmp_path)])
    assert output.count("Result:") == 1, output


@pytest.mark.slow
def test_two_nodes_of_one_process_are_one_run(images, tmp_path):
    address = f"tcp://127.0.0.1:{free_port()}"
    outputs = finish([start_main(
        images, "--epochs", 1, "--world-size", 2, "--rank", node, "--dist-url", address,
        cwd=tmp_path) for node in range(2)])
    check_outputs(outputs)
    assert f"2 processes, rendezvous at {address}" in outputs[0] and "of 31 images" in outputs[0]


@pytest.mark.slow
def test_flags_end_before_the_data_folder(images, tmp_path):
    output, = finish([start_main("--epochs", 1, *several(2), "--", images, cwd=tmp_path)])
    check_outputs([output])


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
    assert wait_for(lambda: not processes_of(tmp_path))
    assert (tmp_path / "checkpoint.pth.tar").exists()


class Store:
    """In place of torch's: no rank ever counts up."""

    def add(self, key, amount):
        return 0


@pytest.mark.parametrize("message", [
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:575] Connection closed by peer",
    "Application timeout caused pair closure",  # torch 1.5 and 1.8
    "Read timeout [127.0.0.1]:5000",
    "NCCL communicator was aborted on rank 0"])
def test_an_error_of_a_collective_names_the_silent_ranks(monkeypatch, message):
    group = main.ProcessGroup(parse(), main.Runtime(main.BACKENDS["cpu"], "cpu"))
    group.size, group.store = 2, Store()
    monkeypatch.setattr(main.time, "sleep", lambda seconds: None)
    assert group.describe(RuntimeError(message)).startswith("rank 0, rank 1 does not respond")


def test_where_no_thread_can_be_started_one_line_says_so(monkeypatch, capsys):
    """As under a limit of processes, which the group's own threads are counted in."""
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    group = main.ProcessGroup(parse(), main.Runtime(main.BACKENDS["cpu"], "cpu"))
    monkeypatch.setattr(main.threading.Timer, "start", refuse)
    group.report(group.describe(RuntimeError("can't start new thread")))
    error = capsys.readouterr().err
    assert error.startswith("main.py: error: can't start new thread: ") and error.count("\n") == 1
    assert "ulimit" in error


@pytest.mark.parametrize("error", [
    RuntimeError("DataLoader timed out after 5 seconds"), OSError("Connection refused")])
def test_an_error_of_the_machine_names_no_rank(error):
    group = main.ProcessGroup(parse(), main.Runtime(main.BACKENDS["cpu"], "cpu"))
    group.size = 2
    assert "respond" not in group.describe(error)
