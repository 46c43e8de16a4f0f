"""The rules of the repository that a program can check."""

import ast
import pathlib
import re
import symtable

import pytest

from helpers import ROOT, own_files

MAIN = ast.parse((ROOT / "main.py").read_text(encoding="utf-8"))
PYTHON = [path for path in own_files() if path.suffix == ".py"]
SCRIPTS = PYTHON + [path for path in own_files() if path.suffix == ".sh"] + [ROOT / ".ci" / "run"]
FORMER_NAMES = """
    Fault Kind KINDS Team Meter Synthetic BatchOrder find_place cards_present choose_kind
    share_of_cores share_news to_device train_plan val_plan fast_decoder pads_wrongly settle_buckets
    average_batchnorm set_batchnorm stepped_parameters copy_into counts_correct fast_depthwise
    load_momentum meeting_point serialise find_loss why_bad
""".split()
FORMER_WORDS = ["is not there", "starts anew", "starts fresh", "has the kernel", "has glibc",
                "of no use here", "meeting point", "own ReLU", "the usual loop", "剖析",
                "命令行不成立"]


def read(path):
    return path.read_text(encoding="utf-8")


def name_of(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("name,lines", [("main.py", 2231), ("mnasnet.py", 374)])
def test_a_file_can_be_read_in_one_sitting(name, lines):
    assert len(read(ROOT / name).splitlines()) <= lines


def test_no_line_is_over_100_columns():
    long = [f"{name_of(path)}:{number}" for path in SCRIPTS
            for number, line in enumerate(read(path).splitlines(), 1) if len(line) > 100]
    assert long == []


def test_strings_are_formatted_by_f_strings():
    calls = [f"{name_of(path)}:{node.lineno}" for path in PYTHON
             for node in ast.walk(ast.parse(read(path)))
             if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "format"]
    assert calls == []


def test_no_former_name_or_word_is_left():
    pattern = re.compile("|".join([rf"\b{name}\b" for name in FORMER_NAMES] + FORMER_WORDS))
    texts = SCRIPTS + [ROOT / "README.md", ROOT / "README.zh-CN.md"]
    found = [f"{name_of(path)}:{number}: {match.group()}" for path in texts
             if path != pathlib.Path(__file__).resolve()
             for number, line in enumerate(read(path).splitlines(), 1)
             for match in pattern.finditer(line)]
    assert found == []


def last_line(node):
    lines = [getattr(inner, "lineno", 0) for inner in ast.walk(node)]
    return max(lines + [getattr(node, "end_lineno", 0)])  # Python 3.7 has no end_lineno


def test_functions_of_main_fit_on_a_screen():
    functions = [node for node in ast.walk(MAIN) if isinstance(node, ast.FunctionDef)]
    long = {node.name for node in functions if last_line(node) - node.lineno >= 45}
    assert long <= {"parse_args"}


def first_lines():
    """The line in which each name of main.py's own module is defined first."""
    lines = {}
    for statement in MAIN.body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            lines.setdefault(statement.name, statement.lineno)
        for node in ast.walk(statement) if isinstance(statement, ast.Assign) else ():
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                lines.setdefault(node.id, node.lineno)
    return lines


def global_names(table):
    """The names that a function or class, and what is defined in it, take from the module."""
    names = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global()}
    return names.union(*(global_names(inner) for inner in table.get_children()))


def test_main_refers_to_nothing_further_down():
    lines = first_lines()
    tables = symtable.symtable(read(ROOT / "main.py"), "main.py", "exec").get_children()
    early = [f"{table.get_name()} uses {name}" for table in tables for name in global_names(table)
             if name != table.get_name() and lines.get(name, 0) > table.get_lineno()]
    assert early == []


def test_the_sections_of_main_are_those_of_its_docstring():
    banners = re.findall(r"^# --- ((\d+)\. .+) -+$", read(ROOT / "main.py"), re.M)
    docstring = " ".join(ast.get_docstring(MAIN).split())
    assert [int(number) for _, number in banners] == list(range(1, 10))
    assert [title for title, _ in banners if title not in docstring] == []
