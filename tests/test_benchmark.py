"""benchmark/ and the READMEs: they stay short, their commands parse, results are kept as they were logged."""

import importlib
import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import tyro
from test_scripts import ROOT, train

sys.path.append(str(ROOT / "benchmark"))
import run  # noqa: E402
import speed  # noqa: E402


def test_budgets():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) <= 120 and len(readme.split()) <= 1300
    assert len((ROOT / "benchmark" / "README.md").read_text().splitlines()) <= 300
    assert len((ROOT / "benchmark" / "speed.py").read_text().splitlines()) <= 300


def check(script, words):
    """Let the script's own parser read the words of a command."""
    module = importlib.import_module(Path(script).stem)
    if hasattr(module, "Args"):
        tyro.cli(module.Args, args=words)
    elif module in (run, speed):
        rest = getattr(module.parse(words), "words", []) if module is run else []
        if rest:
            check(rest[0], rest[1:])


@pytest.mark.parametrize("readme", ["README.md", "benchmark/README.md"])
def test_every_command_of_the_readmes_parses(readme):
    pattern = r"(?:python|torchrun[^#\n`]*?) ((?:benchmark/)?\w+\.py)([^#\n`]*)"
    found = re.findall(pattern, (ROOT / readme).read_text())
    assert len(found) >= 10
    for script, words in found:
        assert (ROOT / script).exists(), script
        check(script, shlex.split(words))


@pytest.mark.parametrize("readme", ["README.md", "benchmark/README.md"])
def test_every_link_of_the_readmes_leads_to_a_file(readme):
    links = re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / readme).read_text())
    assert links and all(((ROOT / readme).parent / link).exists() for link in links)


def test_what_is_committed_is_shown():
    """No result, curve or picture lies about that no table, figure or page shows."""
    shown = importlib.import_module("shown")
    names = {row[2] for *_, rows in shown.TABLES.values() for row in rows}
    names |= {line[0] for panels in shown.FIGURES.values() for panel in panels for line in panel[3]}
    names |= {"speed", "stragglers"}
    assert {path.stem for path in (ROOT / "benchmark" / "results").glob("*.csv")} <= names
    pages = "".join((ROOT / name).read_text() for name in ("README.md", "benchmark/README.md"))
    for folder in ("curves", "pictures"):
        assert all(path.name in pages for path in (ROOT / "benchmark" / folder).iterdir())


@pytest.mark.parametrize("function, sizes", {case[2]: case[3] for case in speed.CASES}.items())
def test_speed_measures_ours_and_a_peer(function, sizes):
    seconds = speed.measure(function(**sizes | speed.QUICK[function]), rounds=1, least=0)
    assert "ours" in seconds and len(seconds) >= 2
    assert all(0 < each < math.inf for each in seconds.values())


def test_a_result_holds_what_the_runs_logged(tmp_path, monkeypatch):
    plot = importlib.import_module("plot")
    folders = [train("meta_mapg", tmp_path / f"{seed}", seed=seed) for seed in (1, 2)]
    run.keep(folders, tmp_path / "results" / "x.csv")
    monkeypatch.setattr(plot, "HERE", tmp_path)
    result = plot.Result("x")
    finals = [json.loads((folder / "eval.json").read_text()) for folder in folders]
    tag = next(tag for tag in finals[0] if tag.endswith("return_1"))
    assert result.number(tag)[0] == pytest.approx(sum(final[tag] for final in finals) / 2, rel=1e-4)
    rows = [line.split(",") for line in (folders[0] / "metrics.csv").read_text().splitlines()]
    logged = [float(value) for _, name, value in rows if name == "charts/episodic_return"]
    kept = [value for _, value in result.curves["charts/episodic_return"][1]]
    assert kept == pytest.approx(logged, rel=1e-4)
    assert result.meta["seeds"] == "1 2"
    check("meta_mapg.py", shlex.split(result.meta["command"])[2:])


def test_a_result_is_of_one_setting(tmp_path):
    folders = [train("meta_mapg", tmp_path / f"{seed}", seed=seed, gamma=0.9 + seed / 100) for seed in (1, 2)]
    with pytest.raises(SystemExit):
        run.keep(folders, tmp_path / "x.csv")
    assert not (tmp_path / "x.csv").exists()
