"""The six scripts are one house: the same rooms and common blocks, budgets, docstrings that are true."""

import ast
import functools
import importlib
import io
import re
import shlex
import tokenize
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parent.parent
NAMES = ["meta_mapg", "mg2l", "coded_maddpg", "lemol", "tesp", "maml_rl"]
SCRIPTS = [name for name in NAMES if "7. Runs" in (ROOT / f"{name}.py").read_text()]
ROOMS = ["Arguments", "Environment", "Networks", "Rollout", "Objectives", "Update", "Evaluation", "Runs",
         "Train"]
COMMON = ["env", "seed", "device", "num_threads", "total_steps", "eval_every", "eval_episodes", "save_every",
          "run_dir", "resume", "evaluate", "capture_video", "track"]
BUDGET = {  # script: lines, tokens of code
    "tesp": (800, 6500), "maml_rl": (800, 6500), "meta_mapg": (900, 8500), "mg2l": (900, 8500),
    "lemol": (900, 8000), "coded_maddpg": (900, 8000)}


each_script = pytest.mark.parametrize("name", SCRIPTS)


@functools.cache
def source(name):
    return (ROOT / f"{name}.py").read_text()


@functools.cache
def tree(name):
    return ast.parse(source(name))


def room(name, number):
    return re.search(rf"^# =+ {number}\. .*?(?=^# =+ \d\. |\Z)", source(name), re.S | re.M).group()


def definition(name, function):
    """The text of a top-level function."""
    node = next(n for n in tree(name).body if getattr(n, "name", None) == function)
    return ast.get_source_segment(source(name), node)


def arguments(name):
    """{field: the comment behind it}"""
    cls = next(n for n in tree(name).body if isinstance(n, ast.ClassDef) and n.name == "Args")
    lines = source(name).splitlines()
    found = [n for n in cls.body if isinstance(n, ast.AnnAssign)]
    return {n.target.id: lines[n.end_lineno - 1].partition("  # ")[2] for n in found}


def measure(name):
    """Lines of a script, its code tokens, tokens a line of code, and the share of non-blank lines that hold
    commentary: docstrings, comment lines, trailing comments."""
    text = source(name)
    lines = text.splitlines()
    docs, comments, trailing = set(), set(), set()
    for node in ast.walk(tree(name)):
        value = getattr(node, "value", None) if isinstance(node, ast.Expr) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            docs |= set(range(node.lineno, node.end_lineno + 1))
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for token in tokens:
        if token.type == tokenize.COMMENT:
            (comments if lines[token.start[0] - 1].strip().startswith("#") else trailing).add(token.start[0])
    full = {i for i, line in enumerate(lines, 1) if line.strip()}
    docs &= full
    code = full - docs - comments
    kinds = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
    count = sum(token.type in kinds and token.start[0] in code for token in tokens)
    return len(lines), count, count / len(code), len(docs | comments | trailing) / len(full)


# ---------------------------------------------------------------- size and density
@each_script
def test_budget(name):
    lines, tokens, density, commentary = measure(name)
    assert lines <= BUDGET[name][0] and tokens <= BUDGET[name][1] and density <= 12.5 and commentary >= 0.33
    plumbing = [len(room(name, number).strip().splitlines()) for number in (0, 7, 8)]
    assert plumbing[1] <= 100 and sum(plumbing) <= 270


@each_script
def test_functions_fit_on_a_screen_and_have_landmarks(name):
    text = source(name).splitlines()
    for node in ast.walk(tree(name)):
        if not isinstance(node, ast.FunctionDef):
            continue
        length = node.end_lineno - node.lineno + 1
        assert length <= (70 if node.name == "train" else 60), node.name
        if length > 22:  # a comment at least every twelve lines
            first = node.body[0].end_lineno if isinstance(node.body[0], ast.Expr) else node.lineno
            comments = [i for i in range(first + 1, node.end_lineno + 1) if "#" in text[i - 1]]
            marks = [first, *comments, node.end_lineno]
            assert max(b - a for a, b in zip(marks, marks[1:])) <= 13, node.name
    assert max(map(len, text)) <= 110


@each_script
def test_few_lambdas_and_no_packed_assignments(name):
    lambdas = [n for n in ast.walk(tree(name)) if isinstance(n, ast.Lambda)]
    in_calls = [a for n in ast.walk(tree(name)) if isinstance(n, ast.Call)
                for a in [*n.args, *(k.value for k in n.keywords)] if isinstance(a, ast.Lambda)]
    assert len(lambdas) <= 3 and not in_calls


# ---------------------------------------------------------------- one house
@each_script
def test_nine_rooms_in_the_same_order(name):
    assert re.findall(r"^# =+ (\d)\. (.+)$", source(name), re.M) == [(str(i), r) for i, r in enumerate(ROOMS)]


def test_common_blocks_are_the_same_text_everywhere():
    assert len({room(name, 7) for name in SCRIPTS}) <= 1
    for function in ("fail", "within", "parse"):
        assert len({definition(name, function) for name in SCRIPTS}) <= 1, function


@each_script
def test_arguments_have_help_and_the_common_ones_come_first(name):
    found = arguments(name)
    assert [*found][: len(COMMON)] == COMMON
    assert all(text or field == "device" for field, text in found.items())


@each_script
def test_the_map_leads_to_functions_that_exist(name):
    doc = source(name).split('"""')[1]
    names = {n.name for n in ast.walk(tree(name)) if isinstance(n, ast.FunctionDef | ast.ClassDef)}
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


def test_scripts_share_nothing_but_envs():
    for name in SCRIPTS:
        imported = set(re.findall(r"^\s*(?:import|from) +(\w+)", source(name), re.M))
        assert not imported & set(NAMES), name
    assert not (ROOT / "utils.py").exists()


def test_worlds_hold_no_learning():
    learning = re.compile(r"nn\.(Module|Linear|Sequential)|torch\.optim|argparse|tyro")
    for path in (ROOT / "envs").glob("*.py"):
        assert not learning.search(path.read_text()), path
