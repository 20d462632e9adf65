"""What every script promises beyond its maths: runs, logs, checkpoints, resume, evaluation, bad input."""

import csv
import importlib
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from test_house_style import ROOT, SCRIPTS

PEERS = str(Path(tempfile.gettempdir()) / f"peers-{os.getpid()}.npz")

# The smallest run of each script (arguments as Python values), and the steps of one outer iteration in it.
TINY = {
    "meta_mapg": dict(env="ipd", policy="lstm", num_chains=2, num_episodes=4, horizon=5, chain_length=2,
                      num_threads=1, save_every=1),
    "maml_rl": dict(env="nav2d", num_tasks=4, num_episodes=3, horizon=5, eval_tasks=4, eval_episodes=3,
                    num_threads=1, save_every=1),
    "tesp": dict(env="nav2d", num_tasks=4, num_episodes=3, horizon=5, hidden=8, gru_units=4, latent_dim=2,
                 buffer_size=2, eval_tasks=3, num_threads=1, save_every=1),
    "coded_maddpg": dict(env="simple_spread", horizon=5, batch_size=8, num_units=8, learning_starts=20,
                         replay_size=200, num_threads=1, eval_episodes=4, save_every=1),
    "lemol": dict(env="simple_push", traj_per_iter=2, batch_size=2, segment=2, num_episodes=8,
                  max_episode_len=4, chunk_length=2, num_units=8, lstm_hidden_dim=4,
                  episode_embedding_dim=4, in_ep_lstm_dim=4, om_training_iters=1,
                  num_traj_to_train=2, eval_episodes=2, num_threads=1, save_every=1),
    "mg2l": dict(env="spread", num_envs=3, context_envs=2, horizon=5, hidden=8, latent_dim=4, encoder_units=4,
                 context_size=4, encoder_updates=2, keys=2, ring_size=3, warm_up=1,
                 ppo_epochs=2, eval_episodes=2, num_threads=1, save_every=1),
}
# A script in another of its worlds, "<script> <world>": what else it needs is made by prepare().
TINY["meta_mapg half_cheetah_dir"] = TINY["meta_mapg"] | dict(env="half_cheetah_dir", personas=PEERS)
ITERATION = {"meta_mapg": 2 * 3 * 4 * 5, "meta_mapg half_cheetah_dir": 2 * 3 * 4 * 5,
             "maml_rl": 4 * 3 * 5 * 2, "tesp": 4 * 3 * 5 * 5,
             "coded_maddpg": 4 * 5, "lemol": 2 * 2 * 4, "mg2l": (3 + 2) * 5}
BAD = {  # command lines that must end in one line and exit code 2
    "meta_mapg": ["--method nonsense", "--num-chains 0", "--num-chains many", "--chain-length 0", "--gamma 1",
                  "--gradient exact --policy lstm", "--env rps --gradient exact", "--opponent-model",
                  "--personas missing.npz", "--no-own-learning --no-peer-learning",
                  "--env half_cheetah_dir --personas missing.npz",
                  "--env half_cheetah_dir --personas truncated.pt", "--pretrain-peers",
                  "--env half_cheetah_dir --personas p --policy table",
                  "--env half_cheetah_dir --personas p --opponent-model"],
    "maml_rl": ["--method nonsense", "--env ipd", "--inner-steps 0", "--num-tasks 0", "--gamma 2",
                "--delta 0", "--family fo-ppo --e-maml", "--outer promp --inner-grad dice"],
    "tesp": ["--buffer nonsense", "--env ipd", "--env ant_goal", "--num-tasks 0", "--buffer-size 0",
             "--gamma 2", "--inner-steps -1", "--eval-noise -1", "--outer-lr 0"],
    "coded_maddpg": ["--scheme nonsense", "--env ipd", "--batch-size 0", "--gamma 2", "--seed -1",
                     "--replay-size 100", "--num-learners 2", "--num-learners 15 --num-agents 16",
                     "--num-learners 15 --num-agents 7 --scheme ldpc", "--num-learners 3 --num-stragglers 4",
                     "--num-learners 15 --scheme random --code-p 0.01",
                     "--num-learners 15 --engine ray --ray-address 127.0.0.1:1",
                     "--env simple --num-agents 2", "--env simple_tag --num-agents 3 --num-adversaries 3"],
    "lemol": ["--env simple_spread", "--env ipd", "--om ep --agent-update-freq 1", "--chunk-length 5000",
              "--bad-policy ppo", "--bad-policy lemol --good-policy lemol", "--good-policy maddpg_lemol",
              "--bad-policy maddpg_ddpg --good-policy maddpg_ddpg", "--batch-size 2000", "--gamma 2",
              "--episode-embedding-dim 3", "--om oracle --fully-decentralise-lemol", "--num-episodes many",
              "--trajectories truncated.pt", "--traj-per-iter 0"],
    "mg2l": ["--method nonsense", "--env ipd", "--context-envs 0", "--num-envs 0", "--gamma 2", "--lr 0",
             "--eval-episodes 1", "--num-envs 32 --minibatches 5", "--as-coded --method pearl",
             "--as-coded --context-size 1", "--n-blocks 1 --encoder-units 6", "--context-size many"],
}
EVERYWHERE = ["--env nonsense", "--nonsense 3", "--resume missing.pt", "--resume truncated.pt",
              "--resume foreign.pt", "--evaluate foreign.pt", "--device nonsense", "--run-dir occupied"]
each_script = pytest.mark.parametrize("name", SCRIPTS)
each_world = pytest.mark.parametrize("name", [*SCRIPTS, *(name for name in TINY if " " in name)])


@pytest.fixture(scope="module", autouse=True)
def prepare():
    """The population of meta_mapg half_cheetah_dir, untrained."""
    import meta_mapg as m

    weights = torch.randint(-100, 100, (1, sum(math.prod(shape) for shape in m.PEER.values())))
    m.write_population(PEERS, weights.short().repeat(len(m.KEPT), 1), torch.zeros(500))
    yield
    os.unlink(PEERS)


def flags(**kw):
    return [x for k, v in kw.items() for x in (f"--{k.replace('_', '-')}", str(v))]


def launch(name, *args, cwd=ROOT, **kw):
    name = name.split()[0]
    script = Path(cwd) / f"{name}.py"  # the copy in cwd if there is one
    command = [sys.executable, str(script if script.exists() else ROOT / f"{name}.py"), *args]
    return subprocess.Popen(command, cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)


def run(name, *args, **kw):
    process = launch(name, *args, **kw)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def weights(name, folder, iterations=3, without=("rng",), **kw):
    """All tensors that a run of so many iterations leaves in its checkpoint, without some entries."""
    module = importlib.import_module(name.split()[0])
    args = TINY[name] | dict(total_steps=iterations * ITERATION[name], run_dir=str(folder)) | kw
    module.train(module.Args(**args))
    return tensors(folder, without)


def stored(folder):
    return torch.load(Path(folder) / "checkpoint.pt", weights_only=True)


def tensors(folder, without=("rng",)):
    def walk(x):
        if torch.is_tensor(x):
            return [x]
        return [t for v in x.values() for t in walk(v)] if isinstance(x, dict) else []

    return walk({k: v for k, v in stored(folder).items() if k not in without})


def same(a, b):
    return len(a) == len(b) > 0 and all(map(torch.equal, a, b))


def rows(folder):
    with open(Path(folder) / "metrics.csv") as file:
        return [(int(r["step"]), r["tag"], float(r["value"])) for r in csv.DictReader(file)]


@each_world
def test_same_seed_same_weights_other_seed_others(name, tmp_path):
    one, two, other = (weights(name, tmp_path / d, seed=s) for d, s in (("a", 1), ("b", 1), ("c", 2)))
    assert same(one, two) and not same(one, other)


@each_world
def test_evaluation_leaves_training_alone(name, tmp_path):
    never = weights(name, tmp_path / "never", without=("rng", "best"), eval_every=0)
    often = weights(name, tmp_path / "often", without=("rng", "best"), eval_every=1)
    assert same(never, often)
    assert torch.equal(*(stored(tmp_path / d)["rng"]["torch"] for d in ("never", "often")))


@each_world
def test_resume_is_bit_exact(name, tmp_path):
    without = ("rng", "best")  # a run that ends also validates, and may so find a better "best"
    whole = weights(name, tmp_path / "whole", 4, without)
    weights(name, tmp_path / "half", 2)
    again = weights(name, tmp_path / "half", 4, without, resume=str(tmp_path / "half/checkpoint.pt"))
    assert same(whole, again)
    # the log reads as if nothing had happened: every row once, and the same rows but for the speed
    logged = lambda d: [r for r in rows(tmp_path / d) if "SPS" not in r[1] and "eval" not in r[1]]
    assert logged("whole") == logged("half") and len(logged("half")) == len({r[:2] for r in logged("half")})


@each_script
def test_copied_alone_it_runs_and_logs(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    shutil.copytree(ROOT / "envs", tmp_path / "envs", ignore=shutil.ignore_patterns("__pycache__"))
    args = flags(**TINY[name], total_steps=2 * ITERATION[name], run_dir="r")
    code, out, err = run(name, *args, cwd=tmp_path)
    assert code == 0, err
    assert "Traceback" not in err
    assert {p.name for p in tmp_path.iterdir()} - {"__pycache__"} == {f"{name}.py", "envs", "r"}
    logged = rows(tmp_path / "r")
    tags = {tag for _, tag, _ in logged}
    assert {"charts/episodic_return", "charts/SPS", "charts/episodic_return/agent_0"} <= tags
    assert max(step for step, _, _ in logged) == 2 * ITERATION[name]
    args, final = (json.loads((tmp_path / "r" / f).read_text()) for f in ("args.json", "eval.json"))
    assert args["env"] == TINY[name]["env"] and None not in (args["total_steps"], args["num_threads"])
    assert final["global_step"] == 2 * ITERATION[name] and final["seed"] == args["seed"]
    assert {tag for tag in final if tag.startswith("eval/")} <= tags

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "r")).Reload()
    for tag in tags:
        events, mine = board.Scalars(tag), [(s, v) for s, t, v in logged if t == tag]
        assert [e.step for e in events] == [s for s, _ in mine]
        assert [e.value for e in events] == pytest.approx([v for _, v in mine], rel=1e-4), tag


def wait_for(path, process, seconds=120):
    end = time.time() + seconds
    while not path.exists():
        assert process.poll() is None and time.time() < end, process.communicate()
        time.sleep(0.02)


@each_world
def test_kill_9_then_resume_gives_the_same_weights(name, tmp_path):
    whole, steps = weights(name, tmp_path / "whole", iterations=40), 40 * ITERATION[name]
    process = launch(name, *flags(**TINY[name], total_steps=steps, run_dir=tmp_path / "killed"))
    checkpoint = tmp_path / "killed" / "checkpoint.pt"
    wait_for(checkpoint, process)
    process.kill()
    process.wait()
    assert stored(tmp_path / "killed")["global_step"] < steps
    code, _, err = run(name, "--resume", str(checkpoint))  # the rest of the arguments is in the checkpoint
    assert code == 0, err
    assert same(whole, tensors(tmp_path / "killed"))


@each_world
def test_ctrl_c_saves_first(name, tmp_path):
    process = launch(name, *flags(**TINY[name], total_steps=10**6 * ITERATION[name], run_dir=tmp_path / "r"))
    wait_for(tmp_path / "r" / "checkpoint.pt", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err
    last = max(step for step, _, _ in rows(tmp_path / "r"))
    assert stored(tmp_path / "r")["global_step"] == last  # nothing that was logged is lost


@each_world
def test_evaluate_prints_the_same_table_twice(name, tmp_path):
    weights(name, tmp_path)
    final = (tmp_path / "eval.json").read_text()
    (_, one, _), (_, two, _) = (run(name, "--evaluate", str(tmp_path / "checkpoint.pt")) for _ in range(2))
    assert one == two and len(one.splitlines()) > 2
    assert (tmp_path / "eval.json").read_text() == final  # that of the training run, to the digit


@each_script
def test_a_non_finite_loss_stops_the_run_and_spares_the_checkpoint(name, tmp_path):
    weights(name, tmp_path)
    state = stored(tmp_path)
    next(iter(state["params"]["theta"].values())).fill_(float("nan"))
    torch.save(state, tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    code, _, err = run(name, *flags(resume=tmp_path / "checkpoint.pt", total_steps=6 * ITERATION[name]))
    assert code == 1 and len(err.strip().splitlines()) == 1 and "not finite" in err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


@each_script
def test_a_full_disk_leaves_the_last_checkpoint(name, tmp_path):
    weights(name, tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    half = len(before) // 2  # as if the disk were full: no file may grow beyond this
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))
    more = flags(resume=tmp_path / "checkpoint.pt", total_steps=6 * ITERATION[name])
    code, _, err = run(name, *more, preexec_fn=limit)
    assert code == 2 and len(err.strip().splitlines()) == 1, err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("name, line", [(name, line) for name in SCRIPTS for line in EVERYWHERE + BAD[name]])
def test_bad_input_is_one_line_and_exit_code_2(name, line, tmp_path):
    (tmp_path / "truncated.pt").write_bytes(b"PK\x03\x04 not the whole of it")
    torch.save({"script": "another"}, tmp_path / "foreign.pt")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "metrics.csv").write_text("precious\n")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    code, out, err = run(name, *line.split(), cwd=tmp_path)
    assert code == 2 and out == "" and len(err.strip().splitlines()) == 1, err
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("name", [n for n in TINY if n.split()[0] in SCRIPTS
                                  and "torchrun" in (ROOT / f"{n.split()[0]}.py").read_text()])
def test_two_processes_give_the_result_of_one(name, tmp_path):
    one = weights(name, tmp_path / "one")
    args = flags(**TINY[name], total_steps=3 * ITERATION[name], run_dir=tmp_path / "two")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, f"{name.split()[0]}.py", *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    two = tensors(tmp_path / "two")
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(one, two)) and len(one) == len(two)
