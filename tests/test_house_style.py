"""The six scripts are one house: the same rooms, the same common blocks, docstrings that are true."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parent.parent
NAMES = ["meta_mapg", "mg2l", "coded_maddpg", "lemol", "tesp", "maml_rl"]
SCRIPTS = [name for name in NAMES if (ROOT / f"{name}.py").exists()]
ROOMS = ["Arguments", "Environment", "Networks", "Rollout", "Objectives", "Update", "Evaluation",
         "Logging and checkpoints", "Train"]
COMMON = ["env", "seed", "device", "num_threads", "total_steps", "eval_every", "eval_episodes", "save_every",
          "run_dir", "resume", "evaluate", "capture_video", "track"]

each_script = pytest.mark.parametrize("name", SCRIPTS)


def source(name):
    return (ROOT / f"{name}.py").read_text()


def room(name, number):
    return re.search(rf"^# =+ {number}\. .*?(?=^# =+ \d\. |\Z)", source(name), re.S | re.M).group()


def common_arguments(name):
    return re.search(r"    # --- experiment: .*?(?=    # --- algorithm)", source(name), re.S).group()


def arguments(name):
    cls = next(n for n in ast.parse(source(name)).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    return [(n.target.id, cls.body[i + 1]) for i, n in enumerate(cls.body) if isinstance(n, ast.AnnAssign)]


@each_script
def test_nine_rooms_in_the_same_order(name):
    assert re.findall(r"^# =+ (\d)\. (.+)$", source(name), re.M) == [(str(i), r) for i, r in enumerate(ROOMS)]


def test_common_arguments_and_room_7_are_the_same_text_everywhere():
    assert len({common_arguments(name) for name in SCRIPTS}) == 1
    assert len({room(name, 7) for name in SCRIPTS}) == 1


@each_script
def test_common_arguments_come_first(name):
    assert [field for field, _ in arguments(name)][: len(COMMON)] == COMMON


@each_script
def test_every_argument_has_a_help_text(name):
    for field, after in arguments(name):
        assert isinstance(after, ast.Expr) and after.value.value.strip(), field


@each_script
def test_the_map_leads_to_functions_that_exist(name):
    tree, doc = ast.parse(source(name)), source(name).split('"""')[1]
    names = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for target in re.findall(r"-> +([A-Za-z_.]+)\(\)", doc):
        assert set(target.split(".")) <= names, target


@each_script
def test_cited_equations_and_departures_are_those_of_the_docstring(name):
    _, doc, body = source(name).split('"""', 2)
    defined = set(re.findall(r"\((\d+)\) +->", doc))
    cited = {n for tag in re.findall(r"eqs?\. ([(\d)\-, and]+)", body) for n in expand(tag)}
    assert cited == defined
    assert set(re.findall(r"\[D\d\]", body)) == set(re.findall(r"\[D\d\]", doc))


def expand(tag):
    """"(1)-(3) and (8)" -> {"1", "2", "3", "8"}"""
    found = set(re.findall(r"\((\d+)\)", tag))
    for first, last in re.findall(r"\((\d+)\)-\((\d+)\)", tag):
        found |= {str(n) for n in range(int(first), int(last) + 1)}
    return found


@each_script
def test_every_command_in_the_docstring_parses(name):
    module = importlib.import_module(name)
    commands = re.findall(rf"(?:python|torchrun[^#\n]*?) {name}\.py([^#\n]*)", module.__doc__)
    assert len(commands) >= 3
    for command in commands:
        tyro.cli(module.Args, args=shlex.split(command))


@each_script
def test_sizes(name):
    for node in ast.walk(ast.parse(source(name))):
        if isinstance(node, ast.FunctionDef):
            limit = 80 if node.name == "train" else 60
            assert node.end_lineno - node.lineno < limit, node.name
    assert max(map(len, source(name).splitlines())) <= 110


def test_scripts_share_nothing_but_envs():
    for name in SCRIPTS:
        imported = set(re.findall(r"^\s*(?:import|from) +(\w+)", source(name), re.M))
        assert not imported & set(NAMES), name
    assert not (ROOT / "utils.py").exists()


def test_worlds_hold_no_learning():
    learning = re.compile(r"nn\.(Module|Linear|Sequential)|torch\.optim|argparse|tyro")
    for path in (ROOT / "envs").glob("*.py"):
        assert not learning.search(path.read_text()), path
