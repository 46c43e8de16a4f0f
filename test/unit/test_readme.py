"""What the README says of main.py, and what the repository must not hold."""

import re

import pytest

import main
from conftest import ROOT


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
