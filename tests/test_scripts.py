"""What every script promises beyond its maths: runs, logs, checkpoints, resume, evaluation, bad input.

Each tests/test_<script>.py names its smallest run, TINY, the training transitions of one iteration in it,
STEPS, and command lines that must be refused, BAD. Most promises are tried in this process, by the parser.
"""

import csv
import functools
import importlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from test_house_style import ROOT, SCRIPTS

each_script = pytest.mark.parametrize("name", SCRIPTS)


def tiny(name):
    tests = importlib.import_module(f"test_{name}")
    return importlib.import_module(name), tests.TINY, tests.STEPS


def words(**kw):
    """Arguments as words of a command line."""
    line = []
    for name, value in kw.items():
        line += [f"--{'no-' * (value is False)}{name.replace('_', '-')}"]
        line += [] if isinstance(value, bool) else [str(value)]
    return line


def call(name, *line):
    """Run the command line in this process -> exit code, 0 if it comes back."""
    module = importlib.import_module(name)
    before, sys.argv = sys.argv, [f"{name}.py", *map(str, line)]
    try:
        module.train(module.parse())
    except SystemExit as end:
        return end.code or 0
    finally:
        sys.argv = before
    return 0


def train(name, folder, iterations=3, **kw):
    """A run of so many iterations -> its folder."""
    _, args, steps = tiny(name)
    args = args | dict(total_steps=iterations * steps, run_dir=folder) | kw
    assert call(name, *words(**args)) == 0
    return Path(folder)


@functools.cache
def trained(name):
    return train(name, Path(tempfile.mkdtemp()) / "run", 2)


def finished(name, folder):
    """A copy of a run of two iterations."""
    return Path(shutil.copytree(trained(name), folder))


def stored(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def tensors_in(x):
    """All tensors of nested dicts, lists and tuples."""
    if torch.is_tensor(x):
        return [x]
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return [t for part in parts for t in tensors_in(part)]


def tensors(folder, without=("rng", "args")):
    """All tensors of a checkpoint, but for some of its entries."""
    return tensors_in({k: v for k, v in stored(folder).items() if k not in without})


def same(a, b, without=("rng", "args")):
    a, b = tensors(a, without), tensors(b, without)
    return len(a) == len(b) > 0 and all(map(torch.equal, a, b))


def rows(folder, skip="SPS"):
    with open(Path(folder) / "metrics.csv") as file:
        return [(int(r["step"]), r["tag"], float(r["value"])) for r in csv.DictReader(file)
                if not re.search(skip, r["tag"])]


def launch(name, *line, cwd=ROOT):
    script = Path(cwd, f"{name}.py")
    command = [sys.executable, str(script if script.exists() else ROOT / f"{name}.py"), *map(str, line)]
    ascii_only = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}  # the tables have a "±"
    return subprocess.Popen(command, cwd=cwd, env=ascii_only, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def interrupt_after(monkeypatch, module, number):
    """Ctrl-C while the number-th iteration is logged."""
    log, count = module.Run.log, iter(range(10**9))

    def patched(self, *args):
        log(self, *args)
        if next(count) + 1 == number:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(module.Run, "log", patched)


# ---------------------------------------------------------------- seeds, resume, evaluation
@each_script
def test_the_seed_decides_and_evaluation_does_not(name, tmp_path):
    never, often = (train(name, tmp_path / f"{n}", eval_every=n) for n in (0, 1))
    assert same(never, often, ("rng", "args", "best"))  # who validates more often may find a better "best"
    assert torch.equal(stored(never)["rng"][0], stored(often)["rng"][0])
    assert not same(never, train(name, tmp_path / "other", seed=-2))


@each_script
def test_ctrl_c_saves_and_resume_is_bit_exact(name, tmp_path, monkeypatch, capsys):
    module = tiny(name)[0]
    whole, cut = train(name, tmp_path / "whole", 4), tmp_path / "cut"
    before = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        interrupt_after(patch, module, 2)
        train(name, cut, 4, save_every=100)
    assert signal.getsignal(signal.SIGINT) is before  # the caller's handler is back
    assert stored(cut)["step"] == rows(cut)[-1][0] < stored(whole)["step"]
    with open(cut / "metrics.csv", "a") as file:  # what a killed process logged after its last checkpoint
        file.write("99999999,charts/episodic_return,1\n")
    assert call(name, "--resume", cut) == 0  # every other argument comes from the checkpoint
    assert same(whole, cut) and torch.equal(stored(whole)["rng"][0], stored(cut)["rng"][0])
    assert rows(whole) == rows(cut)

    # it has ended: one line says so, and nothing changes
    bytes_before = (cut / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    assert call(name, "--resume", cut) == 2
    assert "--evaluate it, or give a larger --total-steps" in capsys.readouterr().err
    assert (cut / "checkpoint.pt").read_bytes() == bytes_before


@each_script
def test_resume_refuses_what_it_cannot_change(name, tmp_path, capsys):
    module, folder = tiny(name)[0], finished(name, tmp_path / "r")
    before = (folder / "checkpoint.pt").read_bytes(), (folder / "args.json").read_text()
    rate = next(n for n in ("outer_lr", "lr") if n in {f.name for f in module.fields(module.Args)})
    for extra in ((f"--{rate.replace('_', '-')}", 0.123), ("--run-dir", tmp_path / "other"), ("--seed", 9)):
        assert call(name, "--resume", folder, "--total-steps", 10**6, *extra) == 2
        assert "cannot change" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
    assert ((folder / "checkpoint.pt").read_bytes(), (folder / "args.json").read_text()) == before


@each_script
def test_evaluate_prints_the_table_of_the_end_twice(name, tmp_path, capsys, monkeypatch):
    folder = finished(name, tmp_path / "r")
    final = (folder / "eval.json").read_text()
    tables = []
    for _ in range(2):
        capsys.readouterr()
        assert call(name, "--evaluate", folder / "checkpoint.pt") == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1] and len(tables[0].splitlines()) > 2
    assert (folder / "eval.json").read_text() == final

    def refuse(self, *args, **kw):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:  # a folder that is read-only
        patch.setattr(Path, "write_text", refuse)
        assert call(name, "--evaluate", folder) == 0
    out = capsys.readouterr()
    assert out.out == tables[0] and "no eval.json" in out.err


@each_script
def test_what_a_run_logs(name, tmp_path, capsys):
    folder = train(name, tmp_path / "r", 2)
    out, logged = capsys.readouterr().out, rows(folder, skip="^$")
    tags = {tag for _, tag, _ in logged}
    assert {"charts/episodic_return", "charts/SPS"} <= tags and len(logged) == len({r[:2] for r in logged})
    assert out.startswith(f"{name}: {tiny(name)[1]['env']}, seed 1, ") and str(folder) in out.splitlines()[0]
    args, final = (json.loads((folder / f).read_text()) for f in ("args.json", "eval.json"))
    assert args["env"] == tiny(name)[1]["env"]
    assert final["global_step"] == logged[-1][0] and final["seed"] == 1
    assert {tag for tag in final if tag.startswith("eval/")} <= tags

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder)).Reload()
    for tag in tags:
        events, mine = board.Scalars(tag), [(s, v) for s, t, v in logged if t == tag]
        assert [e.step for e in events] == [s for s, _ in mine]
        assert [e.value for e in events] == pytest.approx([v for _, v in mine], rel=1e-4, nan_ok=True), tag


# ---------------------------------------------------------------- folders
@each_script
def test_runs_of_one_second_get_folders_of_their_own(name, tmp_path, monkeypatch):
    module, args, steps = tiny(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.time, "time", lambda: 1000.0 + next(ticks) * 1e-3)
    ticks = iter(range(10**9))
    made = []
    for _ in range(3):
        with module.Run(module.Args()) as run:
            made.append(run.dir)
    stem = f"{module.Args().env}__{name}__1__1000"
    assert [folder.name for folder in made] == [stem, f"{stem}-2", f"{stem}-3"]


@each_script
def test_a_full_disk_or_a_bad_loss_spares_the_checkpoint(name, tmp_path, capsys, monkeypatch):
    (module, _, steps), folder = tiny(name), finished(name, tmp_path / "r")

    def full(state, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    def goes_wrong():
        before = (folder / "checkpoint.pt").read_bytes()
        assert call(name, "--resume", folder, "--total-steps", 6 * steps) == 1
        assert (folder / "checkpoint.pt").read_bytes() == before
        return capsys.readouterr().err.strip().splitlines()

    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(module.torch, "save", full)
        assert "No space left" in goes_wrong()[-1]
    state = stored(folder)
    for x in tensors_in({k: v for k, v in state.items() if k not in ("rng", "args")}):
        if x.is_floating_point():
            x.fill_(math.nan)
    torch.save(state, folder / "checkpoint.pt")
    error, = goes_wrong()
    assert "not finite" in error


# ---------------------------------------------------------------- bad input
EVERYWHERE = ["--env nonsense", "--nonsense 3", "--resume missing.pt", "--resume truncated.pt",
              "--resume foreign.pt", "--evaluate foreign.pt", "--device nonsense", "--run-dir occupied",
              "--num-threads 0", "--total-steps many", "--capture-video", "--resume a --evaluate b"]


@each_script
def test_bad_input_ends_with_code_2_and_writes_nothing(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "truncated.pt").write_bytes(b"PK\x03\x04 not the whole of it")
    torch.save({"script": "another", "args": {}}, tmp_path / "foreign.pt")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "metrics.csv").write_text("precious\n")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for line in EVERYWHERE + importlib.import_module(f"test_{name}").BAD:
        assert call(name, *line.split()) == 2, line
        out, err = capsys.readouterr()
        tyro_box = f"{name}.py --help" in err  # tyro's own words
        assert out == "" and (len(err.strip().splitlines()) == 1 or tyro_box), (line, err)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before, line


@each_script
def test_a_checkpoint_of_another_version_is_named(name, tmp_path, capsys):
    folder = finished(name, tmp_path / "r")
    state = stored(folder)
    without_seed = {k: v for k, v in state["args"].items() if k != "seed"}
    for change in (dict(args=without_seed), dict(args=state["args"] | {"gone": 1}), dict(version=1)):
        torch.save(state | change, folder / "checkpoint.pt")
        for flag in ("--resume", "--evaluate"):
            assert call(name, flag, folder) == 2
            err = capsys.readouterr().err
            assert len(err.strip().splitlines()) == 1 and "version" in err


@each_script
def test_help_shows_the_values_of_the_world(name, capsys):
    module = tiny(name)[0]
    for env in module.PRESETS:
        assert call(name, "--env", env, "--help") == 0
        options = capsys.readouterr().out.split("show this help message")[1]
        out = " ".join(options.replace("│", " ").split())
        args = module.Args(**module.preset(module.Args(env=env)))
        for field, value in vars(args).items():
            flag = re.search(rf"--{field.replace('_', '-')}[ ,].*?\(default: ([^)]*)\)", out)
            assert flag and flag[1].replace(" ", "") == str(value).replace(" ", ""), (env, field)


# ---------------------------------------------------------------- as a user starts it
@each_script
def test_copied_alone_killed_and_resumed(name, tmp_path):
    """The one test a script that starts processes: the copy needs nothing but envs/."""
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    shutil.copytree(ROOT / "envs", tmp_path / "envs", ignore=shutil.ignore_patterns("__pycache__"))
    _, args, steps = tiny(name)
    args = args | dict(total_steps=20 * steps, save_every=1)
    whole = train(name, tmp_path / "whole", 20, save_every=1)
    process = launch(name, *words(**args, run_dir="r"), cwd=tmp_path)
    end = time.time() + 300
    while not (tmp_path / "r" / "checkpoint.pt").exists():
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.wait()
    process = launch(name, "--resume", "r", cwd=tmp_path)
    _, err = process.communicate(timeout=300)
    ended = "this run ended" in err  # the kill came after the last checkpoint
    assert (process.returncode == 0 or ended) and "Traceback" not in err, err
    assert same(whole, tmp_path / "r")
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == {f"{name}.py", "envs", "r", "whole"}


@each_script
def test_in_a_notebook(name):
    """Pasted into a cell there is no __file__, and nothing starts."""
    scope = {"__name__": "__main__"}
    exec(compile((ROOT / f"{name}.py").read_text(), "cell", "exec"), scope)
    assert scope["SCRIPT"] == "notebook" and callable(scope["train"])


@each_script
def test_training_from_python_leaves_the_arguments_alone(name, tmp_path):
    module, args, steps = tiny(name)
    args = module.Args(**args, total_steps=steps, run_dir=str(tmp_path / "r"))
    before = dict(vars(args))
    thread = threading.Thread(target=module.train, args=(args,))  # not the main thread: no signal handlers
    thread.start()
    thread.join()
    assert vars(args) == before and (tmp_path / "r" / "eval.json").exists()


@pytest.mark.parametrize("name", [n for n in SCRIPTS if "torchrun" in (ROOT / f"{n}.py").read_text()])
def test_two_processes_give_the_result_of_one(name, tmp_path):
    one, (_, args, steps) = train(name, tmp_path / "one"), tiny(name)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               f"{name}.py", *words(**args, total_steps=3 * steps, run_dir=tmp_path / "two")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two = tensors(tmp_path / "two")
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(tensors(one), two, strict=True))
