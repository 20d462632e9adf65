"""Meta-MAPG: each equation against closed forms, enumeration of all outcomes or finite differences.

The iterated prisoner's dilemma of most tests is played by the tables X (ours) and Y (the peer's), with their
own step sizes .1 and 1; the expected numbers were computed once, independently of the script."""

import importlib.util
import itertools
import math
import os
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import meta_mapg as oracle
from test_house_style import ROOT

import envs
import meta_mapg as m
from envs.matrix_games import CLASSES, MatrixGame, draw_personas
from envs.multi_agent_mujoco import GRID, KEPT, PEER_SPLITS, PEERS, VALIDATION, read_peers, write_peers

# for tests/test_scripts.py: the smallest run, the transitions of one iteration in it, lines that are refused
TINY = dict(env="ipd", gradient="sampled", num_chains=2, num_episodes=4, eval_episodes=4, horizon=5,
            chain_length=2, num_threads=1, save_every=1)
STEPS = 3 * 2 * 4 * 5
BAD = ["--env nav2d", "--env spread", "--gamma 2", "--num-chains 0", "--method nonsense", "--look-ahead 0",
       "--env rps --policy table --gradient exact", "--opponent-model", "--personas missing.npz",
       "--env half_cheetah_dir --policy table", "--env half_cheetah_dir --personas missing.npz",
       "--dice-lambda 1.1"]

torch.set_num_threads(1)
close = torch.testing.assert_close
X = torch.tensor([[0.1, -0.2], [0.3, 0], [-0.4, 0.2], [0, 0.5], [0.25, -0.1]], dtype=torch.float64)
Y = torch.tensor([[0.2, 0.8], [0.4, 0.6], [0.1, 0.9], [0.35, 0.65], [0.3, 0.7]], dtype=torch.float64).log()
IPD, RPS = MatrixGame("ipd", 1).reward_table, MatrixGame("rps", 1).reward_table
GAME = SimpleNamespace(discrete=True, obs_dims=(5, 5), action_dims=(2, 2), reward_table=IPD)


def arguments(**kw):
    """Args as parse() would make them; the gradient is exact unless it is said otherwise."""
    kw = dict(chain_length=1, horizon=10, gamma=0.96, num_threads=1) | kw
    return m.Args(**m.preset(m.Args(**kw)) | kw)


def module(path):
    """A script of this repository."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    out = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(out)
    return out


def numbers(*x):
    return torch.tensor(x, dtype=torch.float64)


def player(table):
    """A Player of (C, S, A) logits."""
    return m.Player(table.flatten(1), {"table": tuple(table.shape[1:])})


def grad(y, x, **kw):
    """dy/dx of the same shape as x, zeros where no path leads from x to y."""
    if not y.requires_grad:
        return torch.zeros_like(x)
    return torch.autograd.grad(y, x, allow_unused=True, materialize_grads=True, **kw)[0]


def central(f, x, eps=1e-5):
    """Central finite differences of the number f(x)."""
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        d = torch.zeros_like(x)
        d.view(-1)[i] = eps
        out.view(-1)[i] = (f(x + d) - f(x - d)) / (2 * eps)
    return out


def mixed(value, y, x):
    """d2 value / dx dy, (size of y, size of x)."""
    g = grad(value, y, create_graph=True)
    return torch.stack([grad(e, x, retain_graph=True).flatten() for e in g.flatten()])


# ---------------------------------------------------------------- the chain of learners, nothing sampled
def test_exact_value_of_known_tables():  # T2, eq. (8)
    uniform, mostly_c = torch.zeros(1, 5, 2).double(), numbers(0.25, 0.75).log().expand(1, 5, 2)
    for H in (1, 2, 7, 150):
        close(m.exact_value(uniform, mostly_c, IPD, 1.0, H) / H, numbers(0.5, -0.25)[None])
    for H, v in (2, (1.1669362587, -0.6385133501)), (10, (4.2600814563, -1.9823920691)):
        close(m.exact_value(X[None], Y[None], IPD, 0.96, H)[0], numbers(*v))
    assert abs(m.exact_value(uniform, mostly_c, IPD, 0.96, 150)[0, 0] - 12.472609815) < 1e-8


def chain(x, args, eta=None):
    """sum of V^i(phi_l) over the scored l, from the script's own chain."""
    plan = m.chain_plan(args, 1.0)
    eta = torch.full((1, args.chain_length), 0.1, dtype=x.dtype) if eta is None else eta
    x = x if x.requires_grad else x.clone().requires_grad_()  # the inner steps differentiate by it
    loss = m.exact_chain(GAME, player(x[None]), eta, None, Y[None, None], plan, args).loss[0]
    return -loss * (plan[0] + 1)  # which is divided by the number of batches


def chain_gradient(args):
    x = X.clone().requires_grad_()
    return grad(chain(x, args), x)


META_GRADIENTS = [  # L, H, method, sum of V^i(phi_l), gradient by the logits of C
    (1, 10, "meta-mapg", 1.4199096492, (-0.44994607, -1.3105156, -0.47277281, -1.10447417, -0.29871598)),
    (1, 10, "meta-pg", 1.4199096492, (-0.36596897, -0.55680521, -0.83750197, -0.44710605, -0.60704197)),
    (2, 10, "meta-mapg", 1.4199096492 - 1.5526780480,
     (-0.90621671, -3.39515017, -0.19942895, -3.08943831, 0.53224540)),
]


@pytest.mark.parametrize("L, H, method, value, expected", META_GRADIENTS)
def test_exact_meta_gradient(L, H, method, value, expected):  # T3
    args = arguments(chain_length=L, horizon=H, method=method)
    assert abs(chain(X, args) - value) < 1e-9
    g = chain_gradient(args)
    close(g[:, 1], numbers(*expected), atol=1e-8, rtol=0)
    close(g[:, 0], -g[:, 1])


def test_gradient_of_the_step_sizes_equals_finite_differences():  # T3, eq. (3)
    args, eta = arguments(chain_length=2), numbers(0.1, 0.4)[None].requires_grad_()
    g = grad(chain(X, args, eta), eta)
    close(g, central(lambda e: chain(X, args, e).detach(), eta.detach()), atol=1e-8, rtol=0)
    assert g.abs().min() > 0.01


def test_the_two_ablations_add_up_to_the_whole_in_a_chain_of_one():  # [D6]
    parts = [chain_gradient(arguments(method=method)) for method in ("no-own-learning", "meta-pg")]
    close(sum(parts), chain_gradient(arguments()))
    assert min(part.norm() for part in parts) > 0.1


def test_lola_looks_ahead_with_the_peer_alone_and_reinforce_not_at_all():  # [D6]
    def ahead(x, steps):
        y = Y.clone().requires_grad_()
        for _ in range(steps):
            y = y + grad(m.exact_value(x[None], y[None], IPD, 0.96, 10)[0, 1], y, create_graph=True)
        return m.exact_value(x[None], y[None], IPD, 0.96, 10)[0, 0].detach()

    for method, steps in ("lola-dice", 1), ("lola-dice", 3), ("reinforce", 0):
        g = chain_gradient(arguments(method=method, look_ahead=max(steps, 1), chain_length=2))
        close(g, central(lambda x, n=steps: ahead(x, n), X), atol=1e-8, rtol=0)


def test_chains_grow_and_only_with_the_flag():  # [D4]
    args = arguments(chain_length=7, grow_chains=True)
    assert [m.chain_plan(args, p)[0] for p in (0, 0.19, 0.2, 0.44, 0.45, 1)] == [1, 1, 3, 3, 7, 7]
    assert m.chain_plan(arguments(chain_length=2, grow_chains=True), 0.5)[0] == 2
    assert m.chain_plan(arguments(chain_length=7), 0)[0] == 7


# ---------------------------------------------------------------- DiCE and the estimators, by enumeration
@pytest.mark.parametrize("with_baseline", [False, True])
def test_loaded_dice_has_the_derivatives_of_the_expectation(with_baseline):  # T4, eq. (2), [D2]
    torch.manual_seed(0)
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    value = m.exact_value(x[None], y[None], IPD, 0.96, 3)[0]
    # all joint histories of three steps, as chains of one episode
    actions = torch.tensor(list(itertools.product(range(2), repeat=6))).view(-1, 3, 1, 2)  # (C, H, 1, N)
    index = 1 + 2 * actions[..., 0] + actions[..., 1]
    state = F.pad(index[:, :-1], (0, 0, 1, 0))
    batch = m.Batch(state, actions, IPD[index].double().movedim(-1, 1))
    logprob = m.log_probs([player(z.expand(64, -1, -1)) for z in (x, y)], batch)
    p = logprob.sum((1, 2, 3)).exp().detach()
    assert len(p) == 64 and abs(p.sum() - 1) < 1e-14
    both = logprob.sum(1, keepdim=True).expand_as(logprob)
    by_state = torch.randn(3, 5, 2, dtype=torch.float64) * with_baseline  # an arbitrary b^a(t, s)
    b = by_state[torch.arange(3)[:, None], batch.state].movedim(-1, 1)  # (C, N, H, 1)
    shaped, own, forgetful = (p @ m.dice_objective(nodes, batch.reward, b, 0.96, lam)
                              for nodes, lam in ((both, 1.0), (logprob, 1.0), (both, 0.5)))
    for objective in shaped, own, forgetful:
        assert objective.abs().max() == 0  # what counts is its derivatives; each agent by its own parameters
        for a, z in (0, x), (1, y):
            wanted = grad(value[a], z, retain_graph=True)
            close(grad(objective[a], z, retain_graph=True), wanted, atol=1e-14, rtol=0)
    second = mixed(value[1], y, x)
    close(mixed(shaped[1], y, x), second, atol=1e-14, rtol=0)
    assert mixed(own[1], y, x).abs().max() == 0  # own nodes: the peer's step ignores us
    assert (mixed(forgetful[1], y, x) - second).abs().max() > 0.01  # lambda < 1: a bias


def test_link_shortens_the_gradient_of_each_chain_on_the_way_back_alone():  # [D4]
    x, y = (torch.randn(2, n, requires_grad=True) for n in (3, 2))
    weight = torch.tensor([[3.0, 0, 0, 0, 4.0], [0.3, 0, 0, 0, 0.4]])  # norms 5 and .5
    for limit, factor in (1.0, (0.2, 1.0)), (math.inf, (1.0, 1.0)):
        new = m.link([m.Player(x, {"a": (3,)}), m.Player(y, {"b": (2,)})], limit)
        assert torch.equal(new[0].flat, x) and torch.equal(new[1].flat, y) and new[1].shapes == {"b": (2,)}
        g = torch.autograd.grad((torch.cat([p.flat for p in new], 1) * weight).sum(), [x, y])
        close(torch.cat(g, 1), weight * torch.tensor(factor)[:, None])


# ---------------------------------------------------------------- returns, advantages, baseline
def test_returns_and_advantages_equal_double_loops():  # T9, eq. (4)
    torch.manual_seed(0)
    H, gamma, lam = 6, 0.9, 0.8
    r, v = torch.randn(2, 3, H, 4, dtype=torch.float64)  # (C, H, K)
    ret, adv = torch.zeros_like(r), torch.zeros_like(r)
    for t in range(H):
        for u in range(t, H):
            v_next = v[:, u + 1] if u + 1 < H else 0.0
            ret[:, t] += gamma ** (u - t) * r[:, u]
            adv[:, t] += (gamma * lam) ** (u - t) * (r[:, u] + gamma * v_next - v[:, u])
    close(m.returns_to_go(r, gamma), ret)
    close(m.gae(r, v, gamma, lam), adv)
    close(m.gae(r, 0 * v, gamma, 1.0), ret)


def test_baseline_is_the_regression_on_all_features():  # T9, eq. (1), [D1]
    torch.manual_seed(0)
    C, N, H, K, S, gamma, ridge = 2, 2, 7, 9, 5, 0.9, 1e-5
    state = torch.randn(C, H, K, S).double()
    reward = torch.randn(C, N, H, K).double() + state[:, None, ..., 0]
    got = m.linear_baseline(state, reward, gamma)
    t = (torch.arange(H) / 100.0).double().repeat_interleave(K)[:, None]  # rows go by time, as in state
    for c, a in itertools.product(range(C), range(N)):
        o = state[c].flatten(0, 1)
        x = torch.cat([o, o**2, t, t**2, t**3, t**0], 1)
        ret = m.returns_to_go(reward[c, a], gamma).flatten()
        ridged = torch.cat([x, math.sqrt(ridge) * torch.eye(2 * S + 4).double()])
        padded = torch.cat([ret, torch.zeros(2 * S + 4).double()])[:, None]
        close(got[c, a].flatten(), x @ torch.linalg.lstsq(ridged, padded).solution[:, 0], atol=1e-6, rtol=0)
        assert (ret - got[c, a].flatten()).var() < 0.9 * ret.var()


# ---------------------------------------------------------------- the networks
def test_lstm_equals_torch_lstm_cell_with_its_first_and_second_derivatives():  # T9
    torch.manual_seed(0)
    C, H, K, S = 3, 4, 7, 5
    shapes, state = m.lstm_shapes(S, 2), torch.randn(C, H, K, S)
    flat = 0.2 * torch.randn(C, sum(map(math.prod, shapes.values())), dtype=torch.float64)  # biases too
    net = m.Player(flat.requires_grad_(), shapes)

    def torchs(c):
        q, memory, out = {k: v[c] for k, v in net.parts().items()}, None, []
        weights = dict(weight_ih=q["w_ih"], weight_hh=q["w_hh"], bias_ih=q["b_ih"], bias_hh=q["b_hh"])
        for s in state[c].double():
            z = F.relu(F.linear(s, q["w1"], q["b1"]))
            cell = torch.nn.LSTMCell(64, 64)
            memory = torch.func.functional_call(cell, weights, (z, memory) if memory else (z,))
            out.append(F.linear(memory[0], q["w2"], q["b2"]))
        return torch.stack(out)

    results = []
    for out in m.outputs(net, state)[0], torch.stack([torchs(c) for c in range(C)]):
        first = grad(out.log_softmax(-1).square().sum(), net.flat, create_graph=True)
        results.append([out, first, grad(first.pow(3).sum(), net.flat)])
    for ours, wanted in zip(*results):
        close(ours, wanted)
    memory, steps = None, []  # the same net step by step, as rollout() plays it
    for s in state.unbind(1):
        out, memory = m.outputs(net, s[:, None], memory)
        steps.append(out)
    close(torch.cat(steps, 1), results[0][0])


def test_networks_have_the_papers_sizes_and_initialisation():
    sizes = [(5, 2, False, 33_794), (5, 1, False, 33_729), (10, 3, False, 34_179), (17, 3, True, 34_630)]
    for states, outputs, gaussian, count in sizes:
        shapes = m.lstm_shapes(states, outputs, gaussian)
        p = m.Player(m.initial(shapes)[None], shapes).parts()
        assert sum(v.numel() for v in p.values()) == count
        assert all((v == 0).all() for k, v in p.items() if k.startswith("b") or k == "log_std")
        assert abs(p["w_hh"].std() - math.sqrt(2 / (256 + 64))) < 0.003


# ---------------------------------------------------------------- the outer step
def test_amsgrad_steps():  # T10, eq. (7)
    first = m.amsgrad(torch.zeros(3, 1), torch.tensor([0.01]), 1.0, 1)
    close(first, torch.tensor([-0.24025]), atol=1e-5, rtol=0)  # torch.optim.Adam: -.90909
    torch.manual_seed(0)
    grads = 1e6 * torch.randn(60, 3) * torch.linspace(1, 0.01, 60)[:, None]  # eps vanishes beside these
    moments, p = torch.zeros(3, 3), torch.zeros(3, requires_grad=True)
    adam = torch.optim.Adam([p], lr=0.1, amsgrad=True)
    for k, g in enumerate(grads):
        before, p.grad = p.detach().clone(), g
        adam.step()
        close(m.amsgrad(moments, g, 0.1, k + 1), p.detach() - before, rtol=1e-4, atol=1e-6)


def test_pcgrad_removes_conflicts_and_nothing_else():  # T11, eq. (6)
    agreeing = torch.tensor([[1.0, 0], [1, 1]])
    assert torch.equal(m.pcgrad(agreeing, torch.tensor([[0, 1], [1, 0]])), agreeing)
    g, order = torch.randn(5, 4), torch.rand(5, 5).argsort(1)
    expected = g.clone()
    for i in range(5):  # the running gradient against the original ones, in its own order
        for j in order[i].tolist():
            expected[i] -= min(expected[i] @ g[j] / (g[j] @ g[j] + 1e-8), 0) * g[j]
    close(m.pcgrad(g, order), expected)
    clipped, norm = m.clip(torch.tensor([[30.0, 40.0], [0.3, 0.4]]), 10.0)
    close(clipped, torch.tensor([[6.0, 8.0], [0.3, 0.4]]))
    close(norm, torch.tensor([50.0, 0.5]))


def test_the_rate_falls_and_steps_shrink_with_it():  # [D4]
    def moved(anneal, progress):
        torch.manual_seed(0)
        args = arguments(num_chains=2, anneal_lr=anneal)
        env = m.make_env(args, 2)
        params, moments = m.build(args, env)
        m.outer_update(env, params, moments, args, 0, progress)
        return params["actor"]

    whole = moved(True, 0.0)
    close(moved(False, 0.75), whole)
    close(moved(True, 0.75), 0.25 * whole)


# ---------------------------------------------------------------- sampled chains
def sampled(game="ipd", C=2, policy="table", given=None, **kw):
    """One sampled_chain in float64 and what it may depend on. given: an earlier one, to start alike."""
    kw = dict(chain_length=2, num_episodes=4, horizon=5, ent_coef=0.0, link_clip=math.inf, dice_lambda=1.0,
              grow_chains=False) | kw
    args = arguments(env=game, policy=policy, gradient="sampled", num_chains=C, **kw)
    env = m.make_env(args, C * args.num_episodes)
    nets = m.networks(args, env)
    flats = [0.2 * torch.randn(C, sum(map(math.prod, net.values()))) for net in nets]
    actor, critic = given.leaves if given else [m.Player(x.double(), net) for x, net in zip(flats, nets)]
    tasks = given.tasks if given else env.sample_tasks(C)
    actor, critic = actor.constant(), critic.constant()
    eta = torch.full((C, args.chain_length), args.inner_lr, dtype=torch.float64, requires_grad=True)
    out = m.sampled_chain(env, actor, eta, critic, tasks.double(), m.chain_plan(args, 1.0), args)
    return SimpleNamespace(args=args, leaves=(actor, critic), eta=eta, tasks=tasks, env=env, out=out)


def gradients(run):
    """Of both losses by everything, (C, P)."""
    loss = (run.out.loss + run.out.critic_loss).sum()
    every = run.leaves[0].flat, run.eta, run.leaves[1].flat
    return torch.cat([grad(loss, p, retain_graph=True) for p in every], 1)


@pytest.mark.parametrize("method", ["meta-mapg", "meta-pg"])
def test_training_and_test_take_the_same_step_and_only_shaping_reaches_the_peer(method):  # T12, eqs. (1)-(3)
    torch.manual_seed(0)
    run = sampled(horizon=8, method=method)
    players = [run.leaves[0], *m.peers_of(run.tasks.double(), run.env)]
    batch = m.rollout(run.env, players)
    batch = batch._replace(reward=batch.reward.double())
    logprob, steps = m.log_probs(players, batch), []
    for training in True, False:
        new = m.inner_update(players, logprob, batch, [run.eta[:, [0]], 1.0], run.args, training)
        steps.append(torch.cat([p.flat for p in new], 1))
        depends = grad(new[1].flat[:, 0].sum(), run.leaves[0].flat, retain_graph=True)
        assert (depends != 0).any() == (training and method == "meta-mapg")
    close(*steps)


VARIANTS = [dict(), dict(method="no-own-learning"), dict(method="meta-pg"), dict(method="lola-dice"),
            dict(method="reinforce"), dict(chain_length=2), dict(opponent_model=True)]


@pytest.mark.parametrize("kw", VARIANTS, ids=lambda kw: str(kw)[1:-1] or "whole")
def test_sampled_meta_gradient_equals_the_exact_one(kw):  # T13: eqs. (1)-(5) against (8)
    torch.manual_seed(0)
    C, gamma = 100, 1 - 1e-9  # eq. (5) has no weights gamma^t, so only gamma = 1 has the gradient of V
    kw = dict(gamma=gamma, gae_lambda=1.0, horizon=3, inner_lr=0.5, peer_lr=3.0, chain_length=1) | kw
    critic = player(torch.zeros(C, 5, 1).double())
    start = SimpleNamespace(leaves=(player(X.expand(C, 5, 2)), critic), tasks=Y.expand(C, 1, 5, 2))
    run = sampled(given=start, C=C, num_episodes=400, **kw)
    g = grad(run.out.loss.sum(), run.leaves[0].flat)
    error = g.std(0) / math.sqrt(C)
    kw.pop("opponent_model", None)  # a model that fits is as good as the peer itself
    eta, x = torch.full((1, run.args.chain_length), 0.5, dtype=torch.float64), X.clone().requires_grad_()

    def distance(args):
        wanted = -grad(chain(x, args, eta), x).flatten() / (m.chain_plan(args, 1.0)[0] + 1)
        return ((g.mean(0) - wanted) / error).abs().max()

    assert distance(arguments(**kw)) < 4
    if kw.get("method", "meta-mapg") == "meta-mapg":
        assert distance(arguments(**kw | dict(method="meta-pg"))) > 6  # a missing peer term would be seen


@pytest.mark.parametrize("game, policy", [("ipd", "lstm"), ("rps", "lstm"), ("rps3", "table")])
def test_gradients_equal_those_of_the_oracle(game, policy, monkeypatch):  # eqs. (1)-(5)
    torch.manual_seed(0)
    batches, real = [], m.rollout
    monkeypatch.setattr(m, "rollout", lambda *a: batches.append(real(*a)) or batches[-1])
    run = sampled(game, policy=policy, horizon=6, num_episodes=5, ent_coef=0.5, dice_lambda=0.7,
                  link_clip=0.1)
    ours = gradients(run)
    world = envs.make(game, 5, horizon=6)  # one-hot observations
    for c in range(2):
        actor, critic = ({k: v[c].detach().requires_grad_() for k, v in p.parts().items()}
                         for p in run.leaves)
        peers = [{"table": logits.double().clone().requires_grad_()} for logits in run.tasks[c]]
        eta = run.eta[c].detach().clone().requires_grad_()
        recorded = [batch.action[c] for batch in batches]
        monkeypatch.setattr(world, "reset", lambda: [o.double() for o in type(world).reset(world)])
        monkeypatch.setattr(world, "step", lambda a: double(type(world).step(world, a)))
        by_actor, by_eta, by_critic = oracle.gradients(world, actor, eta, critic, peers, run.args, recorded)
        wanted = torch.cat([g.flatten() for g in (*by_actor, by_eta, *by_critic)])
        close(ours[c], wanted, rtol=1e-4, atol=1e-6)


def double(step):
    obs, reward, *rest = step
    return [o.double() for o in obs], reward.double(), *rest


# ---------------------------------------------------------------- opponent modelling
def test_fitted_opponent_has_the_frequencies_seen_and_the_derivative_of_the_model():  # eq. (9)
    state = torch.tensor([0, 3]).repeat_interleave(2000).view(1, 1, -1)  # 0 and 3: action 1 in 20, 70 %
    action = torch.cat([torch.arange(2000) < 400, torch.arange(2000) < 1400]).long().view(1, 1, -1)
    batch = m.Batch(state, torch.stack([1 - action, action], -1), None)
    x = torch.randn(1, 5, 2).log_softmax(-1).requires_grad_()
    fit = m.fit_opponent(player(3 * x), batch, agent=1)
    pi = fit.parts()["table"].softmax(-1)[0]
    close(pi[[0, 3], 1], torch.tensor([0.2, 0.7]), atol=1e-3, rtol=0)
    close(pi[[1, 2, 4]], (3 * x).softmax(-1)[0, [1, 2, 4]])  # not seen: as before
    weight = torch.randn(1, 10)
    close(grad((weight * fit.flat).sum(), x), 3 * weight.view(1, 5, 2))
    close(m.fit_opponent(player(x), batch, agent=0).parts()["table"].softmax(-1)[0, 0, 1], torch.tensor(0.8),
          atol=1e-3, rtol=0)
    assert gradients(sampled("rps3", chain_length=1, opponent_model=True)).isfinite().all()  # two models


# ---------------------------------------------------------------- personas and peers
def test_landmarks_of_fixed_strategies_against_personas():  # T7
    pool = [draw_personas(CLASSES["ipd"], 5, 2, seed) for seed in range(20)]
    landmarks = {"cooperative": (1.023, 0.023, 0.511), "defective": (-0.023, -1.023, -0.511)}
    for name, expected in landmarks.items():
        y = torch.cat([split[name] for population in pool for split in population.values()]).double()
        for cooperate, value in zip((0.0, 1.0, 0.5), expected):
            x = numbers(1 - cooperate, cooperate).clamp(min=1e-30).log().expand(len(y), 5, 2)
            mean = m.exact_value(x, y, IPD, 1.0, 150)[:, 0].mean() / 150
            assert abs(mean - value) < 0.015, (name, cooperate)


def test_converter_of_the_authors_pickles(tmp_path, monkeypatch):
    for name, split in itertools.product(CLASSES["ipd"], ("train", "val", "test")):
        (tmp_path / name).mkdir(exist_ok=True)
        tables = [torch.full((5, 2), 0.5).log() for _ in range(3)]
        (tmp_path / name / split).write_bytes(pickle.dumps(tables))
    monkeypatch.setattr("sys.argv", ["", str(tmp_path), str(tmp_path / "p.npz")])
    module("benchmark/personas_from_pickle.py")
    tasks = MatrixGame("ipd", 1, personas=tmp_path / "p.npz").tasks_by_class("val")["defective"]
    close(tasks, torch.full((3, 1, 5, 2), math.log(0.5)))


def population(path, scale=0.05):
    """A file of peers: one random peer, and 324 that differ from it in one weight. Their weights."""
    torch.manual_seed(0)
    weights = (scale * torch.randn(1, 34_630) / GRID).round().short().repeat(len(KEPT), 1)
    weights[torch.arange(len(KEPT)), torch.arange(len(KEPT))] += 100
    write_peers(path, weights, torch.zeros(500))
    return weights * GRID


def test_peers_survive_the_file_and_have_the_splits_of_the_authors(tmp_path):
    assert [len(PEER_SPLITS[s]) for s in ("train", "val", "test")] == [275, 25, 25] and len(set(KEPT)) == 325
    weights = population(tmp_path / "p.npz")
    env = envs.make("half_cheetah_peers", 2, peers=tmp_path / "p.npz", horizon=5)
    assert torch.equal(env.tasks_by_class("test")["left"][:, 0], weights[300:])
    assert torch.equal(env.tasks_by_class("val")["left"][1, 0], weights[9])
    torch.manual_seed(0)
    base = torch.cat([weights[1, :1], weights[0, 1:]])  # peer n differs from it in weight n
    seen = {int((p != base).nonzero()) for p in env.sample_tasks(200)[:, 0]}
    assert len(seen) > 100 and not seen & set(VALIDATION) and max(seen) < 300
    net, = m.peers_of(env.sample_tasks(2), env)
    assert net.flat.shape == (2, 34_630) and net.parts()["log_std"].shape == (2, 3)
    with pytest.raises(ValueError, match="not a file of"):
        read_peers(str(tmp_path / "missing.npz"))
    shipped = read_peers(os.path.abspath(PEERS))
    assert shipped.shape == (325, 34_630) and ((shipped[1:] - shipped[:-1]).abs().amax(1) > 0).all()


def test_a_cheetahs_peer_is_shaped_too(tmp_path):  # eqs. (1)-(5), Gaussian players
    population(tmp_path / "p.npz", 0.2)
    kw = dict(game="half_cheetah_dir", policy="lstm", personas=str(tmp_path / "p.npz"), peer_lr=0.1,
              inner_lr=0.1, num_episodes=8, horizon=5, reward_scale=1.0)
    torch.manual_seed(0)
    start = sampled(**kw)
    torch.manual_seed(1)
    whole = gradients(sampled(given=start, **kw))[:, :34_630]  # of the actor
    torch.manual_seed(1)
    without = gradients(sampled(given=start, method="meta-pg", **kw))[:, :34_630]
    assert whole.isfinite().all() and (whole - without).norm() > 0.01 * whole.norm()


def test_making_peers_learns_and_is_reproducible():
    make_peers = module("benchmark/make_peers.py")
    old, adv = torch.zeros(2, 1, 3), torch.tensor([[[1.0, -1.0, 2.0]]])
    new = torch.tensor([[[1.5, 1.5, 0.9]], [[0.5, 0.5, 1.1]]]).log().requires_grad_()
    loss = make_peers.ppo_loss(new, old, adv)
    assert abs(loss.item() + (1.2 - 1.5 + 1.8 + 0.5 - 0.8 + 2.2) / 6) < 1e-6
    flats = []
    for _ in range(2):
        torch.manual_seed(1)
        pair = make_peers.Pair(episodes=4, horizon=8)
        before = pair.actors.flat.clone()
        assert all(np.isfinite(pair.update()) for _ in range(2))
        flats.append(pair.actors.flat)
        assert (flats[-1] - before).abs().max() > 1e-4
    assert torch.equal(*flats)
