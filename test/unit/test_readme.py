"""What the README says of main.py, and what the repository must not hold."""

import re
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import main
from conftest import ROOT, SMALL, free_port, run_main


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_the_table_has_every_flag(name, monkeypatch):
    found = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", "\n".join(
        line.split("|")[1] for line in (ROOT / name).read_text(encoding="utf-8").splitlines()
        if line.startswith("| `-"))))
    seen = []
    add = main.argparse._ActionsContainer.add_argument
    monkeypatch.setattr(main.argparse._ActionsContainer, "add_argument",
                        lambda self, *names, **options: seen.extend(names) or add(self, *names, **options))
    main.parse_args(["somewhere"])
    assert {n for n in seen if n.startswith("-")} - {"-h", "--help"} <= found


def test_every_public_address_is_listed():
    statement = (ROOT / "public_address_statement.md").read_text(encoding="utf-8")
    names = ["main.py", "mnasnet.py", "README.md", "README.zh-CN.md", "LICENSE"] + [
        str(p.relative_to(ROOT)) for p in (ROOT / "test").glob("*.*") if p.is_file()]
    for name in names:
        for address in re.findall(r"https?://[\w./-]+\w", (ROOT / name).read_text(encoding="utf-8")):
            assert address in statement, "{} in {}".format(address, name)


def commands():
    """The commands of the README that train or evaluate."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    return [line for block in blocks for line in block.splitlines()
            if re.match(r"bash test/train_|python main.py|torchrun", line)]


@pytest.fixture(scope="module")
def place(images, tmp_path_factory):
    """A clone with a trained model beside it."""
    folder = tmp_path_factory.mktemp("a place")
    assert run_main(images, "--epochs", 1, cwd=folder).returncode == 0
    shutil.copy(str(ROOT / "main.py"), str(folder))
    shutil.copy(str(ROOT / "mnasnet.py"), str(folder))
    shutil.copytree(str(ROOT / "test"), str(folder / "test"),
                    ignore=shutil.ignore_patterns("output", "quickstart", "unit", "data"))
    return folder


def made_small(command, images):
    """The words of a command as they are but for the data, the interpreter, and what makes the run small."""
    words = [str(images) if w == "/data/imagenet" else w.replace("=/data/imagenet", "={}".format(images))
             for w in shlex.split(command)]
    eight = "8p" in command or "--device-list" in command
    if words[0] == "bash":
        after = words[words.index("--") + 1:] if "--" in words else []
        words = words[:words.index("--")] if "--" in words else words
        words += ["--device=cpu", "--batch_size=32", "--python=" + sys.executable]
        words += ["--epochs=1", "--lr=0.001"] if "eval" not in command else []
        own = [w for w in SMALL if w not in ("--device", "cpu")]
        for flag in ("-b", "--lr"):
            del own[own.index(flag):own.index(flag) + 2]
        return words + ["--"] + after + own
    words = [w if w != "5120" else "32" for w in words]
    launcher = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}[words[0]]
    words = ["2" if w == "8" else w for w in words]  # torchrun's number of processes
    return launcher + words[1:] + SMALL + ["--epochs", "1", "--lr", "0.001", "-b", "32" if eight else "8"]


@pytest.mark.slow
@pytest.mark.parametrize("command", commands())
def test_the_commands_run(command, images, place):
    if command.startswith("torchrun") and not hasattr(torch, "autocast"):
        assert subprocess.call([sys.executable, "-m", "torch.distributed.run", "--help"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL) != 0  # the README asks for torch 2.x there
        return
    words = made_small(command, images)
    if "O2" in words and not hasattr(torch, "autocast"):
        words[words.index("O2")] = "O0"
    environment = dict(main.os.environ, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    lines = [words]
    if "--local_rank" in words:
        at = words.index("--local_rank") + 1
        lines = [words[:at] + [str(rank)] + words[at + 1:] for rank in range(8)]
    if words[0] == "bash" or "--local_rank" not in words:
        del environment["MASTER_ADDR"], environment["MASTER_PORT"]
    runs = [subprocess.Popen(line, cwd=str(place), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                             universal_newlines=True) for line in lines]
    out = [run.communicate(timeout=300)[0] for run in runs]
    assert {run.returncode for run in runs} == {0}, out
    assert "Acc@1" in out[0] and ("Final Performance" in out[0]) == (words[0] == "bash")
