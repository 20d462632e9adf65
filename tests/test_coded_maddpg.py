"""The maths of coded_maddpg.py: codes, exact decoding, the update against its oracle, learners that die."""

import contextlib
import itertools
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from oracles import coded_maddpg as oracle

import coded_maddpg as c

TINY = dict(env="simple_spread", num_units=8, batch_size=8, horizon=5, num_envs=4, update_every=20,
            replay_size=400, learning_starts=20, eval_episodes=4)
STEPS = 20
BAD = ["--env nonsense", "--env simple_crypto --num-agents 8", "--gamma 1.5", "--lr -1", "--num-learners 2",
       "--num-learners 15 --scheme ldpc", "--num-learners 5 --num-stragglers 6", "--num-stragglers 1",
       "--num-learners 5 --num-stragglers 1 --straggler-delay 3 --learner-timeout 2", "--replay-size 100"]
SCHEMES = ["uncoded", "replication", "mds", "random", "ldpc", "sparse-mds"]


def setup(seed=1, **kw):
    """args, env, spec, nets, replay of a small problem, before its first iteration."""
    kw = dict(env="simple_spread", num_units=8, batch_size=32, horizon=5, num_envs=4, update_every=20,
              replay_size=2000, learning_starts=20) | kw
    args = c.Args(seed=seed, **kw)
    torch.set_num_threads(1)  # as learners have: more may split the sums differently
    torch.manual_seed(seed)
    env = c.make_env(args, args.num_envs)
    spec = c.make_spec(args, env)
    return args, env, spec, c.make_nets(spec, "cpu"), c.Replay(args, spec)


def trajectory(updates=12, during=None, **kw):
    """Everything that training changes after so many updates; during(engine, t): called before update t."""
    args, env, spec, nets, replay = setup(**kw)
    engine = c.make_engine(args, spec)
    solve = engine.solve

    def disturbed(t, job):
        if during:
            during(engine, t)
        return solve(t, job)

    engine.solve = disturbed
    with contextlib.closing(engine):
        for k in range(updates + 1):
            c.iterate(env, spec, nets, replay, engine, args, k + 1)
    return [*nets.values(), replay.rows[: replay.stored]]


def same(a, b):
    return all(map(torch.equal, a, b))


def a_job(**kw):
    args, env, spec, nets, replay = setup(**kw)
    for k in range(10):
        replay.append(c.rollout(env, spec, nets["actor"], (1, k, c.PLAY))[0])
    for kind in ("m_critic", "v_critic"):
        nets[kind] = 1e-4 * torch.rand_like(nets[kind])
    return args, spec, nets, c.make_job(spec, nets, replay.sample(1, 7, args.batch_size), 7)


# ---------------------------------------------------------------- codes, eqs. (1) and (8)
def survives(C):
    """The largest s such that whichever s of the learners with work are lost, the others are decodable."""
    N, M = C.shape
    for n in range(M, N + 1):
        s = np.linalg.svd(C[np.array([*itertools.combinations(range(N), n)])], compute_uv=False)
        if (s[:, -1] * 1e6 > s[:, 0]).all():
            return N - n
    return -1


@pytest.mark.parametrize("M, s", [(3, 12), (8, 7), (10, 5)])
def test_what_each_scheme_survives(M, s):
    codes = {scheme: c.make_code(scheme, 15, M) for scheme in ("uncoded", "replication", "mds", "sparse-mds")}
    assert [*map(survives, codes.values())] == [0, 15 // M - 1, s, s]
    assert np.count_nonzero(codes["sparse-mds"]) == M * (15 - M + 1)  # the least there can be


def array_code(p, rho, gamma):
    """[I; B] from the parity check [I B] over GF(2), block (a, b) of which is the cyclic shift by ab."""
    H = np.block([[np.roll(np.eye(p, dtype=int), a * b, 1) for b in range(rho)] for a in range(gamma)])
    pivots = []
    for col in range(p * rho):  # Gauss-Jordan elimination modulo 2
        below = np.flatnonzero(H[len(pivots) :, col]) + len(pivots)
        if len(below):
            H[[len(pivots), below[0]]] = H[[below[0], len(pivots)]]
            others = (H[:, col] == 1) & (np.arange(len(H)) != len(pivots))
            H[others] ^= H[len(pivots)]
            pivots.append(col)
    B = np.delete(H[: len(pivots)], pivots, 1)
    return np.vstack([np.eye(B.shape[1]), B])


@pytest.mark.parametrize("M, gamma, work", [(8, 3, (28, 4)), (10, 2, (34, 6))])
def test_ldpc_is_the_array_code(M, gamma, work):
    C = c.make_code("ldpc", 15, M)
    load = np.count_nonzero(C, axis=1)
    assert np.array_equal(C, array_code(3, 5, gamma))
    assert survives(C) == 1 and (load.sum(), load.max()) == work


def test_the_papers_powers_cannot_be_decoded_exactly():  # [D4]
    C = np.linspace(0.1, 0.5, 8) ** np.arange(14, -1, -1)[:, None]
    assert np.linalg.cond(C[:8]) > 1e10 and not c.decodable(C[:8])


P_DECODABLE = {  # after s uniform losses, s = 0 ... 7
    "replication": [1, 0.933, 0.800, 0.615, 0.410, 0.224, 0.090, 0.020],
    "ldpc": [1, 1, 0.943, 0.829, 0.668, 0.484, 0.288, 0.112],
}


@pytest.mark.parametrize("scheme", P_DECODABLE)
def test_probability_of_decoding(scheme):
    C = c.make_code(scheme, 15, 8)
    for s, p in enumerate(P_DECODABLE[scheme]):
        left = itertools.combinations(range(15), 15 - s)
        assert np.mean([c.decodable(C[list(rows)]) for rows in left]) == pytest.approx(p, abs=6e-4)


def test_decodable_is_full_rank_in_every_subset_of_small_codes():
    for N, M in [(4, 2), (5, 3), (7, 4)]:
        for scheme in ("uncoded", "replication", "mds", "sparse-mds"):
            C = c.make_code(scheme, N, M)
            for subset in itertools.product([False, True], repeat=len(C)):
                rows = C[list(subset)]
                full = len(rows) > 0 and np.linalg.matrix_rank(rows) == M
                assert c.decodable(rows) == full


# ---------------------------------------------------------------- exact coding, eqs. (7) and (9)
def numbers(M, P=96):
    """(M, P) on the grid: zeros, neighbours of very different size, the largest there are."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(M, P, generator=g) * 10.0 ** -torch.randint(0, 9, (M, P), generator=g)
    x[:, :8] = 0.5
    return torch.stack([c.clip_to_grid(c.layers(row, (5, 16)), P, 0.5) for row in x])


def answers(C, X):
    """What learners give: the sums y_j and, behind them, losses, here 0."""
    Y = torch.from_numpy(C) @ X.double()
    return torch.cat([Y, torch.zeros(len(C), 2 * len(X))], 1)


@pytest.mark.parametrize("M", [3, 8, 10])
@pytest.mark.parametrize("scheme", ["mds", "sparse-mds", "random"])
def test_decodable_sets_give_the_same_bits(scheme, M):
    C, X = c.make_code(scheme, 15, M), numbers(M)
    Y, decoded = answers(C, X), 0
    sets = [*itertools.combinations(range(15), M)][:: 1 if M == 3 else 16]
    for rows in map(list, sets):
        if c.decodable(C[rows]):
            assert torch.equal(c.decode(C[rows], Y[rows], 0.5)[0], X)
            decoded += 1
    assert decoded == len(sets) if "mds" in scheme else decoded > 0.4 * len(sets)


def test_decoding_tells_when_learners_disagree(capsys):
    C, X = c.make_code("sparse-mds", 15, 8), numbers(8)
    Y = answers(C, X)
    Y[3, 5] += 1e-9  # one learner, one number, the ninth decimal
    with pytest.raises(SystemExit) as end:
        c.decode(C[:9], Y[:9], 0.5)
    assert end.value.code == 1 and "contradict" in capsys.readouterr().err


def test_losses_are_those_of_whoever_computed_the_agent():
    C, X, losses = c.make_code("ldpc", 15, 8), numbers(8), torch.rand(8, 2, dtype=torch.float64)
    known = torch.from_numpy(C != 0)[:, :, None]
    Y = torch.cat([answers(C, X)[:, :-16], torch.where(known, losses, math.nan).flatten(1)], 1)
    assert torch.allclose(c.decode(C, Y, 0.5)[1], losses)


# ---------------------------------------------------------------- the update, eqs. (2)-(6), (10), (11)
def load_net(net, flat):
    """A flat vector into the oracle's nn.Sequential, whose weights are (out, in)."""
    shapes = [p.shape for p in net.parameters()]
    for p, part in zip(net.parameters(), flat.split([s.numel() for s in shapes])):
        p.data = part.view(*p.shape[::-1]).T.clone() if p.dim() == 2 else part.clone()


def flat_grad(net):
    return torch.cat([(p.grad.T if p.dim() == 2 else p.grad).flatten() for p in net.parameters()])


@pytest.mark.parametrize("clip", [0.5, 0.02])
def test_update_against_the_oracle(clip):
    args, spec, nets, job = a_job(num_units=64, max_grad_norm=clip)
    nets |= {"m_critic": 0 * nets["m_critic"], "v_critic": 0 * nets["v_critic"]}  # as torch's Adam begins
    job = job._replace(m_critic=nets["m_critic"], v_critic=nets["v_critic"])
    twin = oracle.Maddpg(3, size=10)
    found = []

    def step(adam, net, loss):
        adam.zero_grad()
        loss.backward()
        for p in net.parameters():
            torch.nn.utils.clip_grad_norm_([p], clip)
        found.append(flat_grad(net))
        adam.step()

    twin.step = step
    for adam in twin.adam[1]:  # TensorFlow's epsilon, at the first step
        adam.param_groups[0]["eps"] = 1e-8 / math.sqrt(1 - 0.999)
    obs, act = job.obs.split(spec.obs, 1), job.act.split(spec.act, 1)
    for i in range(3):
        load_net(twin.actors[i], nets["actor"][i])
        load_net(twin.critics[i], nets["critic"][i])
        load_net(twin.target_critics[i], nets["target_critic"][i])
        q = twin.target_critics[i](torch.cat([job.next_obs, job.next_act], 1)).detach()
        y = job.end[:, i : i + 1] + args.gamma * (1 - job.end[:, 3:]) * q
        noise = c.gumbel(spec.args.seed, 1, i, act[i].shape)
        twin.update_agent(i, obs, act, y, lambda z, noise=noise: (z + noise).softmax(1))
        x, _ = c.agent_update(job, spec, 1, i)
        expected = torch.cat(found[-2:])  # critic, actor
        assert torch.allclose(x, expected, atol=1e-6)


def test_two_blocks_of_actions_and_terminated():
    logits, noise = torch.randn(4, 15), torch.zeros(4, 15)
    a = c.gumbel_softmax(logits, noise, (5, 10))
    assert torch.allclose(a[:, :5], logits[:, :5].softmax(1))
    assert torch.allclose(a[:, 5:], logits[:, 5:].softmax(1))
    flat = torch.cat([torch.eye(2).flatten(), torch.zeros(2)] * 2 + [torch.tensor([1.0, 2.0, 0.5])])
    x = torch.tensor([[1.0, 1.0], [2.0, -3.0]])  # q = 3.5 and, with the -3 cut off by the ReLU, 2.5
    net = c.layers(flat, (2, 2, 2, 1))
    y = c.td_target(net, x, torch.ones(2), torch.tensor([0.0, 1.0]), 0.5)
    assert y.tolist() == [1 + 0.5 * 3.5, 1.0]


def test_local_critic_sees_its_own_only():
    _, spec, _, job = a_job(good_policy="ddpg")
    obs, act = job.obs.clone(), job.act.clone()
    obs[:, spec.obs[0] :] = 7.0
    act[:, spec.act[0] :] = 7.0
    other = job._replace(obs=obs, act=act)
    assert torch.equal(c.agent_update(job, spec, 1, 0)[0], c.agent_update(other, spec, 1, 0)[0])
    assert not torch.equal(c.agent_update(job, spec, 1, 1)[0], c.agent_update(other, spec, 1, 1)[0])


def test_adam_is_tensorflows():
    m = v = torch.zeros(2)
    m64, v64, g = np.zeros(2), np.zeros(2), np.array([0.3, -1e-8])
    for n in range(1, 6):
        change, m, v = c.adam(torch.tensor(g, dtype=torch.float32), m, v, n, 0.01)
        m64, v64 = 0.9 * m64 + 0.1 * g, 0.999 * v64 + 0.001 * g**2
        expected = -0.01 * math.sqrt(1 - 0.999**n) / (1 - 0.9**n) * m64 / (np.sqrt(v64) + 1e-8)
        assert change.double().numpy() == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_soft_update_and_the_order_of_the_parts():
    args, _, spec, nets, _ = setup()
    before = {k: v.clone() for k, v in nets.items()}
    X = torch.zeros(3, nets["critic"].shape[1] + nets["actor"].shape[1])
    X[1, nets["critic"].shape[1]] = 0.1  # the first weight of agent 1's actor
    c.apply_update(nets, X, 1, args)
    moved = nets["actor"] - before["actor"]
    assert moved[1, 0].item() == pytest.approx(-args.lr, rel=1e-3) and moved.count_nonzero() == 1
    assert torch.equal(nets["critic"], before["critic"])
    gap = nets["target_actor"] - before["target_actor"]
    assert gap[1, 0].item() == pytest.approx(-args.lr * args.tau, rel=1e-2)


# ---------------------------------------------------------------- noise, replay, rollout
def test_noise_is_keyed_and_is_gumbel():
    a = c.gumbel(1, 5, 2, (3, 4))
    torch.rand(7), np.random.rand(3)  # nobody's stream
    assert torch.equal(a, c.gumbel(1, 5, 2, (3, 4)))
    others = [c.gumbel(*key, (3, 4)) for key in ((2, 5, 2), (1, 6, 2), (1, 5, 3), (5, 1, 2))]
    assert not any(torch.equal(a, b) for b in others)
    noise = c.gumbel(0, 0, 0, (200_000,))
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)


def test_replay_is_a_ring_and_rollout_stores_what_happened():
    args, env, spec, nets, replay = setup(env="simple_adversary", replay_size=40)
    for k in range(3):  # 12 episodes into a ring of 8
        torch.manual_seed(k)
        replay.append(c.rollout(env, spec, nets["actor"], (1, k, 3))[0])
    assert replay.rows.shape[:2] == (8, 6) and replay.stored == 12
    torch.manual_seed(2)
    obs, rows = env.reset(), replay.rows[:4]  # the third batch lies over the first
    for t in range(args.horizon):
        o, act, end = rows[:, t].split(replay.widths, 1)
        assert torch.equal(o, torch.cat(obs, 1))
        obs, reward, *_ = env.step(act.split(spec.act, 1))
        assert torch.equal(end[:, :-1], reward) and not end[:, -1].any()
    assert torch.equal(rows[:, -1].split(replay.widths, 1)[0], torch.cat(obs, 1))
    one = replay.sample(1, 1, 300)
    assert same(one, replay.sample(1, 1, 300)) and not same(one, replay.sample(1, 2, 300))
    stored = {tuple(row) for row in replay.rows[:, 1:, : replay.widths[0]].flatten(0, 1).tolist()}
    assert {tuple(row) for row in one[3].tolist()} <= stored


# ---------------------------------------------------------------- coded = centralised, bit by bit
SLOW = dict(num_learners=15, num_stragglers=4, straggler_delay=1e3, engine="inline")  # four losses an update


@pytest.mark.parametrize("scheme", SCHEMES)
def test_coded_trajectory_is_the_centralised_one(scheme):
    assert same(trajectory(20, num_agents=8), trajectory(20, num_agents=8, scheme=scheme, **SLOW))


def test_coded_trajectory_of_unequal_agents():
    kw = dict(env="simple_tag", num_agents=5, adv_policy="ddpg")
    assert same(trajectory(**kw), trajectory(**kw, **SLOW))


def test_noise_that_is_not_keyed_is_found_out(monkeypatch, capsys):
    keyed, stream = c.gumbel, torch.Generator().manual_seed(0)
    free = lambda seed, t, k, size: keyed(seed, t, k, size) if k > 99 else torch.rand(size, generator=stream)
    monkeypatch.setattr(c, "gumbel", free)
    with pytest.raises(SystemExit):
        trajectory(num_agents=8, **SLOW)
    assert "contradict" in capsys.readouterr().err


def test_iteration_times_have_their_closed_forms():
    work, delay = 0.02, 0.25  # eq. (13)
    for k in (0, 4, 7):
        times = {}
        for scheme in SCHEMES:
            C = c.make_code(scheme, 15, 8)
            args = c.Args(agent_seconds=work, straggler_delay=delay, num_stragglers=k)
            times[scheme] = np.mean([c.arrivals(C, c.holds(C, t, args))[1] for t in range(300)])
        assert times["uncoded"] == pytest.approx(work + delay * (k > 0))
        assert times["mds"] == pytest.approx(8 * work, rel=0.13)
        assert 4 * work - 1e-9 <= times["sparse-mds"] <= 5 * work + 1e-9
        lost = 1 - P_DECODABLE["replication"][k]
        assert times["replication"] == pytest.approx(work + delay * lost, abs=0.02)


# ---------------------------------------------------------------- learners as processes
LOCAL = dict(num_learners=7, num_agents=4, agent_seconds=0.01)


@pytest.fixture(scope="module")
def undisturbed():
    return trajectory(num_agents=4)


def kill(engine, learners, how=signal.SIGKILL):
    for j in learners:
        if j in engine.process:
            os.kill(engine.process[j].pid, how)


@pytest.mark.parametrize("kind", ["slow", "killed", "hung", "all killed"])
def test_disturbed_processes_give_the_centralised_trajectory(kind, undisturbed):
    engines = []

    def during(engine, t):
        engines.append(engine)
        if kind == "killed":
            kill(engine, [t % 7])
        if kind == "all killed" and t == 3:
            kill(engine, range(7))
        if kind == "hung" and t in (3, 7):  # and back, with the answer to an old update
            kill(engine, range(3), signal.SIGSTOP if t == 3 else signal.SIGCONT)

    kw = LOCAL | (dict(num_stragglers=3, straggler_delay=30.0) if kind == "slow" else {})
    assert same(undisturbed, trajectory(during=during, **kw))
    assert (engines[0].restarts > 0) == ("killed" in kind)


def test_too_few_learners_cost_a_timeout_and_a_line(undisturbed, capfd):
    def during(engine, t):
        engine.args = replace(engine.args, learner_timeout=1.0 if t == 4 else 100.0)
        if t == 4:
            while engine.busy:  # until all have started
                for j, *_ in engine.receive(0.2):
                    del engine.busy[j]
            kill(engine, range(4), signal.SIGSTOP)

    assert same(undisturbed, trajectory(during=during, **LOCAL))
    (line,) = [text for text in capfd.readouterr().err.splitlines() if "waiting" not in text]
    assert line.startswith("coded_maddpg: update 4 is computed here, as too few have answered in ")
    assert line.endswith("replaced are learners [0, 1, 2, 3]")


def test_a_hung_learner_is_sent_no_more_than_its_pipe_holds(undisturbed):
    sent = []

    def during(engine, t):
        if t == 1:
            send = engine.send
            engine.send = lambda j, *message: (sent.append(j), send(j, *message))
        if t == 3:
            kill(engine, [2], signal.SIGSTOP)

    assert same(undisturbed, trajectory(during=during, **LOCAL))
    assert sent.count(2) <= 6 < 12 <= max(map(sent.count, range(7)))


def test_who_waits_for_learners_says_so(monkeypatch, capfd):
    clock = iter(range(0, 10**6, 4))  # seconds pass fast
    monkeypatch.setattr(c.time, "monotonic", lambda: next(clock))
    trajectory(updates=1, **LOCAL)
    first, second = capfd.readouterr().err.splitlines()
    assert first == "coded_maddpg: update 1: waiting for 7 of 7 learners"
    assert second.endswith("replaced are learners none")  # nobody had a job yet: they are still starting


@pytest.mark.parametrize("presses", [1, 2])
def test_ctrl_c_while_learners_start(tmp_path, presses):
    from test_scripts import words

    options = TINY | dict(num_learners=5, total_steps=10**6, run_dir=tmp_path / "r")
    line = [sys.executable, c.__file__, *words(**options)]
    pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process = subprocess.Popen(line, start_new_session=True, **pipes)
    while not list(tmp_path.glob("r/args.json")):
        time.sleep(0.05)
    for _ in range(presses):
        time.sleep(0.5)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everybody
    _, errors = process.communicate(timeout=60)  # returns when the last process has closed the pipes
    assert "AttributeError" not in errors  # of a learner that was only half started
    if presses == 1:
        assert process.returncode == 0 and "Traceback" not in errors
        assert (tmp_path / "r" / "checkpoint.pt").exists()
    else:  # in one line
        assert process.returncode == 1 and "Traceback" not in errors and "KeyboardInterrupt" in errors


@pytest.mark.slow
def test_a_program_without_the_guard_gets_one_line(tmp_path):
    program = tmp_path / "program.py"
    here = str(Path(c.__file__).parent)
    program.write_text(f"import sys; sys.path.insert(0, {here!r})\n"
                       "import coded_maddpg as c\n"
                       f"c.train(c.Args(**{TINY}, num_learners=3, run_dir={str(tmp_path / 'r')!r}))\n")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and "__name__" in done.stderr and len(done.stderr.splitlines()) < 4


@pytest.mark.slow
def test_killed_actors_on_ray_give_the_centralised_trajectory(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.syspath_prepend(Path(c.__file__).parent / "benchmark")
    monkeypatch.setattr(c, "Learners", __import__("ray_engine").RayLearners)

    def during(engine, t):
        if t in (3, 5):
            ray.kill(engine.process[t])

    engines = []
    assert same(trajectory(8), trajectory(8, lambda e, t: (engines.append(e), during(e, t)), num_learners=6))
    assert engines[0].restarts > 0
    ray.shutdown()


# ---------------------------------------------------------------- policies elsewhere
def test_a_trained_policy_returns_the_same_in_mpe2(tmp_path):
    mpe2 = pytest.importorskip("mpe2")
    from test_parity import put

    from envs.adapters import from_pettingzoo

    args = c.Args(num_agents=2, num_units=32, batch_size=256, total_steps=25_000, learning_starts=4000,
                  update_every=40, eval_every=0, eval_episodes=50, run_dir=str(tmp_path / "r"))
    c.train(args)  # -26; at random -40
    actor, raw, start = c.load(tmp_path / "r")["nets"]["actor"], [], {}
    env = c.make_env(args, 30)
    spec = c.make_spec(args, env)

    def make():
        raw.append(mpe2.simple_spread_v3.parallel_env(N=2, continuous_actions=True))
        return raw[-1]

    foreign = from_pettingzoo(make, 30)
    first = foreign.reset

    def theirs_first():
        obs = first()
        start["pos"] = np.array([[e.state.p_pos for e in r.unwrapped.world.entities] for r in raw])
        return obs

    def from_there():
        own()
        return put(env, vel=0, **start)

    own = env.reset
    foreign.reset, env.reset = theirs_first, from_there  # ours begins where mpe2 began
    key = (1, 1, c.EVAL)
    theirs = c.rollout(foreign, spec, actor, key)[1]
    ours = c.rollout(env, spec, actor, key)[1]
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-3)  # each agent in each episode
    assert ours.sum(1).mean() > c.rollout(env, spec, 0 * actor, key)[1].sum(1).mean() + 8
