"""The maths of coded_maddpg.py: codes, exact decoding, hand-written gradients, and learners that die."""

import contextlib
import itertools
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import coded_maddpg as c

SCHEMES = ["uncoded", "replication", "mds", "random", "ldpc", "sparse-mds"]


def setup(env="simple_spread", worlds=4, **kw):
    """args, env, spec, nets, optimizer, replay of a small problem, after 20 iterations without an update."""
    kw = dict(env=env, num_units=8, batch_size=32, horizon=5, replay_size=2000, learning_starts=400) | kw
    args = c.resolve(c.Args(**kw))
    torch.set_num_threads(1)  # as learners have: more may split the sums differently
    torch.manual_seed(args.seed)
    world = c.make_env(args, worlds)
    spec, nets, optimizer = c.build(args, world)
    s = c.shape(spec)
    replay = c.Replay(args.replay_size, world.horizon, s.M * s.O, s.M, s.M * s.A, "cpu")
    for k in range(20):
        replay.append(*c.rollout(world, spec, nets["theta"], (1, k, c.PLAY)))
    return args, world, spec, nets, optimizer, replay


def job_of(spec, nets, optimizer, replay, t=1):
    return c.make_job(spec, nets, optimizer, replay.sample(1, t, spec.batch_size), t)


def trajectory(engine_of=lambda args, spec: c.Central(spec), updates=20, **kw):
    """Everything that training changes, after so many iterations."""
    args, world, spec, nets, optimizer, replay = setup(**kw)
    engine = engine_of(args, spec)
    try:
        for k in range(updates):
            c.iterate(world, spec, nets, optimizer, replay, engine, args, k + 1)
    finally:
        engine.close()
    return [*nets.values(), optimizer["m"], optimizer["v"], replay.obs[:200]]


def same(a, b):
    return all(map(torch.equal, a, b))


# ---------------------------------------------------------------- codes, eq. (1)
@pytest.mark.parametrize("M, s", [(3, 12), (5, 10), (8, 7), (10, 5)])
def test_what_each_scheme_survives(M, s):
    for scheme in ("mds", "sparse-mds", "mds-paper"):
        assert c.make_code(scheme, 15, M).survives == s
    assert c.make_code("replication", 15, M).survives == 15 // M - 1
    assert c.make_code("uncoded", 15, M).survives == 0
    if M in (8, 10):
        assert c.make_code("ldpc", 15, M).survives == 1
        assert c.make_code("random", 15, M, seed=30).survives == s


def test_loads_and_condition_numbers_are_those_of_the_reference():
    load = lambda scheme, M: np.count_nonzero(c.make_code(scheme, 15, M).C, axis=1)
    assert (load("ldpc", 8).sum(), load("ldpc", 8).max()) == (28, 4)
    assert (load("ldpc", 10).sum(), load("ldpc", 10).max()) == (34, 6)
    assert (load("sparse-mds", 8).sum(), set(load("sparse-mds", 8))) == (64, {4, 5})
    assert (load("sparse-mds", 10).sum(), set(load("sparse-mds", 10))) == (60, {4})
    assert set(load("mds-paper", 8)) == {8} and set(load("replication", 8)) == {1}
    # medians and maxima over all minimal sets of learners, as measured independently
    for scheme, M, median, worst in [("mds", 3, 6.5, 2e3), ("mds", 5, 18, 9e4), ("mds", 8, 26, 4e5),
                                     ("mds", 10, 21, 1.5e5), ("mds-paper", 3, 4e5, 5e9),
                                     ("mds-paper", 8, 1.2e9, 1.4e12)]:
        found = c.conditions(c.make_code(scheme, 15, M).C, M)
        assert np.median(found) == pytest.approx(median, rel=0.15)
        assert found.max() == pytest.approx(worst, rel=0.3)


def test_ldpc_parity_rows():
    rows = lambda *k: sorted(np.flatnonzero(row).tolist() for row in parity(c.array_ldpc(*k)))
    parity = lambda C: C[C.shape[1] :]
    assert rows(3, 5, 3) == [[0, 1, 2, 7], [0, 1, 3, 7], [0, 1, 4, 7], [0, 5, 7], [0, 6, 7], [1], [1]]
    assert rows(3, 5, 2) == [[0, 1, 2, 3, 4, 9], [0, 1, 2, 8, 9], [0, 1, 5, 9], [0, 2, 3, 7, 9], [0, 3, 6, 9]]


P_DECODABLE = {  # after s uniform losses, s = 0 ... 7
    ("replication", 8): [1, 0.933, 0.800, 0.615, 0.410, 0.224, 0.090, 0.020],
    ("ldpc", 8): [1, 1, 0.943, 0.829, 0.668, 0.484, 0.288, 0.112],
    ("replication", 10): [1, 0.667, 0.381, 0.176, 0.059, 0.011, 0, 0],
    ("ldpc", 10): [1, 1, 0.943, 0.829, 0.624, 0.320, 0, 0],
}


@pytest.mark.parametrize("scheme, M", P_DECODABLE)
def test_probability_of_decoding(scheme, M):
    C = c.make_code(scheme, 15, M).C
    for s, p in enumerate(P_DECODABLE[scheme, M]):
        left = itertools.combinations(range(15), 15 - s)
        assert np.mean([c.decodable(C[list(rows)]) for rows in left]) == pytest.approx(p, abs=6e-4)


def peel(rows):
    """Which agents peeling finds: read off a row with one unknown, subtract it everywhere, again."""
    unknown = set(range(rows.shape[1]))
    while ready := [row for row in rows if len(unknown & set(np.flatnonzero(row))) == 1]:
        unknown -= set(np.flatnonzero(ready[0]))
    return not unknown


def test_every_subset_of_small_codes_and_peeling_against_rank():
    stronger = 0
    for N in range(1, 9):
        for M in range(1, N + 1):
            subsets = list(itertools.product([False, True], repeat=N))
            codes = [c.make_code(s, N, M).C for s in ("uncoded", "replication", "mds", "sparse-mds")]
            codes += [c.array_ldpc(2, 4, g) for g in (1, 2, 3) if (N, M) == c.array_ldpc(2, 4, g).shape]
            for C in codes:
                ranks = np.linalg.matrix_rank(C * np.array(subsets)[:, :, None])
                for subset, rank in zip(subsets, ranks):
                    rows = C[list(subset)]
                    assert c.decodable(rows) == (rank == M)
                    if N < 7:
                        assert (c.undecodable_agents(rows) == []) == (rank == M)
                    if C.min() == 0 and C.max() == 1:
                        assert rank == M or not peel(rows)
                        stronger += rank == M and not peel(rows)
    C = c.make_code("ldpc", 15, 10).C
    for loss in itertools.combinations(range(15), 3):  # and where rank beats peeling
        rows = np.delete(C, loss, 0)
        assert c.decodable(rows) or not peel(rows)
        stronger += c.decodable(rows) and not peel(rows)
    assert stronger > 0


def test_codes_that_cannot_work_are_refused():
    for scheme in SCHEMES:
        with pytest.raises(ValueError, match="fewer than"):
            c.make_code(scheme, 4, 5)
    with pytest.raises(ValueError, match="does not reach rank"):
        c.make_code("random", 15, 8, p=0.01)
    with pytest.raises(ValueError, match="15 learners for 8 agents"):
        c.make_code("ldpc", 15, 7)
    for text in "3,5", "3,5,x", "0,5,3", "3,5,2":
        with pytest.raises(ValueError):
            c.make_code("ldpc", 15, 8, ldpc=text)
    assert np.array_equal(c.make_code("ldpc", 15, 8, ldpc="3,5,3").C, c.make_code("ldpc", 15, 8).C)


# ---------------------------------------------------------------- exact decoding, eqs. (7)-(9)
def numbers(M, P=96):
    """(M, P) on the grid, with zeros, neighbours of very different size, and the largest there are."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(M, P, generator=g) * 10.0 ** -torch.randint(0, 9, (M, P), generator=g)
    x[torch.rand(M, P, generator=g) < 0.2] = 0
    x[:, :8] = 0.5
    return c.clip_to_grid(x, {"all": (P,)}, 0.5), 0.5


@pytest.mark.parametrize("M", [3, 5, 8, 10])
@pytest.mark.parametrize("scheme", ["mds", "sparse-mds", "random", "ldpc"])
def test_every_decodable_set_gives_the_same_bits(scheme, M):
    if scheme == "ldpc" and M in (3, 5):
        pytest.skip("there is no such LDPC code of 15 rows")
    C, (X, clip) = c.make_code(scheme, 15, M).C, numbers(M)
    Y = torch.from_numpy(C) @ X.double()
    decoded = 0
    for rows in map(list, itertools.combinations(range(15), M)):
        if c.decodable(C[rows]):
            assert torch.equal(c.decode(C[rows], Y[rows], clip), X)
            decoded += 1
    assert decoded == math.comb(15, M) if "mds" in scheme else decoded > 0.03 * math.comb(15, M)


def test_encoding_does_not_round():
    from fractions import Fraction

    X, _ = numbers(10)
    for scheme in SCHEMES:
        C = c.make_code(scheme, 15, 10).C
        for row in C[:, :]:
            y = torch.zeros(X.shape[1], dtype=torch.float64)
            for i in np.flatnonzero(row):
                y.add_(X[i], alpha=float(row[i]))
            terms = [[Fraction(a) * Fraction(b) for a, b in zip(row.tolist(), x)] for x in X.T[:20].tolist()]
            exact = [sum(column) for column in terms]
            assert [Fraction(v) for v in y[:20].tolist()] == exact


def test_decoding_tells_when_learners_disagree():
    C, (X, clip) = c.make_code("sparse-mds", 15, 8).C, numbers(8)
    Y = torch.from_numpy(C) @ X.double()
    Y[3, 5] += 1e-9  # one learner, one number, the ninth decimal
    with pytest.raises(c.Stopped, match="contradict"):
        c.decode(C[:9], Y[:9], clip)


# ---------------------------------------------------------------- gradients, eqs. (2)-(6)
def reference(job, spec, t, i):
    """x_i with autograd and torch's own clipping and Adam, agent by agent, in float64."""
    s, d = c.shape(spec), torch.float64
    job = c.Job(*(z.to(d) for z in job))
    net = lambda p, x: (F.relu(F.relu(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]) @ p["w3"].mT + p["b3"].mT)
    single = lambda flat, shapes: {k: v[0].clone() for k, v in c.unflatten(flat[None], shapes).items()}
    leaf = lambda flat, shapes: {k: v.requires_grad_() for k, v in single(flat, shapes).items()}
    A, start = sum(spec.splits[i]), s.M * s.O + i * s.A
    seen = torch.zeros(s.D, dtype=d)
    for j in range(s.M):
        if i == j or not spec.local[i]:
            seen[j * s.O : j * s.O + spec.obs_dims[j]] = 1
            seen[s.M * s.O + j * s.A : s.M * s.O + j * s.A + sum(spec.splits[j])] = 1
    q, p = leaf(job.critic[i], s.critic), leaf(job.theta[i], s.actor)
    target = single(job.target_critic[i], s.critic)
    y = job.end[:, i] + spec.gamma * (1 - job.end[:, s.M]) * net(target, job.x_next * seen)[:, 0]
    loss_q = (net(q, job.x * seen)[:, 0] - y).square().mean()
    g_q = dict(zip(q, torch.autograd.grad(loss_q, [*q.values()])))
    g_q["w1"] = g_q["w1"] * seen[:, None]
    flat_q = torch.cat([(g * min(1, spec.clip / g.norm())).flatten() for g in g_q.values()])
    m = 0.9 * job.m[i] + 0.1 * flat_q
    v = 0.999 * job.v[i] + 0.001 * flat_q**2
    new = job.critic[i] - spec.lr * math.sqrt(1 - 0.999**t) / (1 - 0.9**t) * m / (v.sqrt() + 1e-8)
    new = single(new, s.critic)
    logits = net(p, job.x[:, i * s.O : (i + 1) * s.O])[:, :A]
    gumbel = -c.noise(spec.seed, t, i, (s.A, len(job.x))).log().to(d).T[:, :A]
    action = torch.cat([z.softmax(1) for z in (logits + gumbel).split(spec.splits[i], 1)], 1)
    x = torch.cat([job.x[:, :start], action, job.x[:, start + A :]], 1)
    loss_p = -net(new, x * seen).mean() + 1e-3 * logits.square().mean()
    g_p = torch.autograd.grad(loss_p, [*p.values()])
    flat_p = torch.cat([(g * min(1, spec.clip / g.norm())).flatten() for g in g_p])
    return torch.cat([flat_q, flat_p]), loss_q, loss_p


@pytest.mark.parametrize("kw", [dict(env="simple_spread"), dict(env="simple_spread", good_policy="ddpg"),
                                dict(env="simple_tag", adv_policy="ddpg", num_agents=3, num_adversaries=2),
                                dict(env="simple_adversary", max_grad_norm=0.02)])
def test_update_against_autograd(kw):
    args, _, spec, nets, optimizer, replay = setup(**kw)
    optimizer["m"] = 1e-3 * torch.randn_like(optimizer["m"])
    optimizer["v"] = 1e-6 * torch.rand_like(optimizer["v"])
    if (mask := c.critic_mask(spec)) is not None:  # where the gradient is always zero, so are the moments
        for name in "mv":
            c.unflatten(optimizer[name][:, : c.shape(spec).P_critic], c.shape(spec).critic)["w1"].mul_(mask)
    job = job_of(spec, nets, optimizer, replay, t=7)
    clipped = 0
    for i in range(len(spec.obs_dims)):
        x, loss = c.agent_update(job, spec, 7, i, i + 1)
        expected, loss_q, loss_p = reference(job, spec, 7, i)
        assert torch.allclose(x[0].double(), expected, rtol=2e-4, atol=2e-7)
        assert loss[0].tolist() == pytest.approx([loss_q.item(), loss_p.item()], rel=1e-4, abs=1e-6)
        s = c.shape(spec)
        norms = [g.norm().item() for g in x[0, : s.P_critic].split([*map(math.prod, s.critic.values())])]
        assert max(norms) <= args.max_grad_norm * 1.0001
        clipped += max(norms) > args.max_grad_norm * 0.999
    assert clipped or args.max_grad_norm > 0.1  # the last case does clip


def test_two_blocks_and_smaller_actions():
    spec = c.Spec((4, 3, 5), ((5, 3), (3,), (2, 2)), (False, True, False), 8, 16, 0.9, 0.01, 0.5, 3)
    torch.manual_seed(0)
    nets, s = c.make_nets(spec), c.shape(spec)
    e = c.noise(3, 1, 5, (s.M, s.A, 16))
    a = c.gumbel_softmax(torch.randn(s.M, s.A, 16), e, c.blocks(spec))
    for i, split in enumerate(spec.splits):
        assert all(torch.allclose(block.sum(0), torch.ones(16)) for block in a[i, : sum(split)].split(split))
    assert a[1, 3:].abs().max() == 0 and a[2, 4:].abs().max() == 0
    obs = torch.cat([F.pad(torch.randn(16, n), (0, s.O - n)) for n in spec.obs_dims], 1)
    act = a.permute(2, 0, 1).flatten(1)
    zeros = {k: torch.zeros(s.M, s.P_critic + s.P_actor) for k in "mv"}
    job = c.make_job(spec, nets, zeros, (obs, obs.flip(0), act, torch.rand(16, s.M + 1).round()), 1)
    for i in range(s.M):
        x, _ = c.agent_update(job, spec, 1, i, i + 1)
        assert torch.allclose(x[0].double(), reference(job, spec, 1, i)[0], rtol=1e-4, atol=1e-7)


def test_padding_stays_zero():
    args, world, spec, nets, optimizer, replay = setup("simple_adversary")
    for k in range(5):
        c.iterate(world, spec, nets, optimizer, replay, c.Central(spec), args, k)
    s = c.shape(spec)
    w1, O = c.unflatten(nets["theta"], s.actor)["w1"], spec.obs_dims[0]
    assert O < s.O and w1[0, O:].abs().max() == 0 < w1[0, :O].abs().min()


def test_local_critic_does_not_see_the_others():
    _, _, spec, nets, optimizer, replay = setup(good_policy="ddpg")
    job, s = job_of(spec, nets, optimizer, replay), c.shape(spec)
    other = job.x.clone()
    other[:, s.O : s.M * s.O] = 7.0  # observations of agents 1, 2
    other[:, s.M * s.O + s.A :] = 7.0
    assert torch.equal(*(c.agent_update(j, spec, 1, 0, 1)[0] for j in (job, job._replace(x=other))))
    assert not torch.equal(*(c.agent_update(j, spec, 1, 1, 2)[0] for j in (job, job._replace(x=other))))


@pytest.mark.parametrize("kw", [{}, dict(env="simple_adversary"), dict(good_policy="ddpg"),
                                dict(num_units=64, batch_size=1024, learning_starts=400, num_agents=4)])
def test_stacked_update_is_the_same_as_one_agent_at_a_time(kw):
    _, _, spec, nets, optimizer, replay = setup(**kw)
    job, M = job_of(spec, nets, optimizer, replay), len(spec.obs_dims)
    one, losses = c.all_updates(job, spec, 1)
    stacked, stacked_losses = c.agent_update(job, spec, 1, 0, M)
    assert torch.allclose(one, stacked, rtol=1e-4, atol=1e-7)
    assert torch.allclose(losses, stacked_losses, rtol=1e-4)


def test_td_target_by_hand():
    eye, zero = torch.eye(2)[None], torch.zeros(1, 1, 2)
    last = dict(w3=torch.tensor([[[1.0, 2.0]]]), b3=torch.tensor([[[0.5]]]))
    target = dict(w1=eye, b1=zero, w2=eye, b2=zero, **last)
    x = torch.tensor([[[1.0, 1.0], [2.0, -3.0]]])  # q = 3.5 and, with the -3 cut off by the ReLU, 2.5
    y = c.td_target(target, x, torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 1.0]]), 0.5)
    assert y.tolist() == [[1 + 0.5 * 3.5, 1.0]]


def test_adam_is_tensorflows():
    g, p, lr = torch.tensor([0.3, -1e-8, 0.0]), torch.zeros(3, dtype=torch.float64), 0.01
    m = v = torch.zeros(3)
    m64, v64 = np.zeros(3), np.zeros(3)
    for n in range(1, 6):
        change, m, v = c.adam(g * n, m, v, n, lr)
        gn = g.double().numpy() * n
        m64, v64 = 0.9 * m64 + 0.1 * gn, 0.999 * v64 + 0.001 * gn**2
        p -= torch.from_numpy(lr * math.sqrt(1 - 0.999**n) / (1 - 0.9**n) * m64 / (np.sqrt(v64) + 1e-8))
        expected = -lr * math.sqrt(1 - 0.999**n) / (1 - 0.9**n) * m64 / (np.sqrt(v64) + 1e-8)
        assert change.double().numpy() == pytest.approx(expected, rel=1e-4, abs=1e-12)


def test_soft_update_and_order_of_the_parts():
    args, _, spec, nets, optimizer, _ = setup()
    s, before = c.shape(spec), {k: v.clone() for k, v in nets.items()}
    X = torch.zeros(s.M, s.P_critic + s.P_actor)
    X[1, s.P_critic] = 0.1  # the first weight of agent 1's actor
    c.apply_update(nets, optimizer, X, args)
    moved = nets["theta"] - before["theta"]
    assert moved[1, 0].item() == pytest.approx(-args.lr, rel=1e-3) and moved.count_nonzero() == 1
    assert torch.equal(nets["critic"], before["critic"])
    gap = nets["target_theta"] - before["target_theta"]
    assert gap[1, 0].item() == pytest.approx(-args.lr * args.tau, rel=1e-2)


# ---------------------------------------------------------------- noise
def test_noise_is_keyed_and_is_gumbel():
    a = c.noise(1, 5, 2, (3, 4))
    torch.rand(7), np.random.rand(3)  # nobody's stream
    assert torch.equal(a, c.noise(1, 5, 2, (3, 4)))
    others = [c.noise(*key, (3, 4)) for key in ((2, 5, 2), (1, 6, 2), (1, 5, 3), (5, 1, 2))]
    assert not any(torch.equal(a, b) for b in others)
    gumbel = -c.noise(0, 0, 0, (200_000,)).log()
    assert gumbel.mean().item() == pytest.approx(0.5772, abs=0.01)
    assert gumbel.var().item() == pytest.approx(math.pi**2 / 6, rel=0.02)
    logits = torch.tensor([0.0, 1.0, 2.0])[None, :, None].expand(1, 3, 50_000)
    hard = c.gumbel_softmax(logits, c.noise(0, 0, 1, logits.shape), ()).argmax(1)
    frequency = torch.bincount(hard[0]) / 50_000
    assert torch.allclose(frequency, torch.tensor([0.0, 1.0, 2.0]).softmax(0), atol=0.01)


def test_softmax_backward_against_autograd():
    z = torch.randn(2, 5, 7, requires_grad=True)
    d, e = torch.randn(2, 5, 7), c.noise(0, 0, 0, (2, 5, 7))
    one = torch.tensor([1, 1, 0, 0, 0], dtype=torch.bool)[None, :, None].expand(2, 5, 1)
    for masks in (), (one, ~one):
        action = c.gumbel_softmax(z, e, masks)
        expected = torch.autograd.grad((action * d).sum(), z)[0]
        assert torch.allclose(c.softmax_backward(action.detach(), d, masks), expected, atol=1e-6)


# ---------------------------------------------------------------- replay and rollout
def test_replay_is_a_ring_of_episodes():
    replay, H = c.Replay(12, 3, 2, 1, 1, "cpu"), 3
    for k in range(6):  # episode k: observations 10k, 10k + 1, ...
        obs = (10.0 * k + torch.arange(H + 1.0)).view(H + 1, 1, 1).expand(-1, 1, 2)
        replay.append(obs, obs[:H, :, :1], torch.cat([obs[:H, :, :1], torch.zeros(H, 1, 1)], 2))
    assert len(replay) == 12
    obs, next_obs, act, end = replay.sample(1, 1, 500)
    assert torch.equal(next_obs, obs + 1)
    assert torch.equal(act[:, 0], obs[:, 0]) and torch.equal(end[:, 0], obs[:, 0])
    assert set(obs[:, 0].tolist()) == {10.0 * k + t for k in (2, 3, 4, 5) for t in range(H)}
    assert torch.equal(obs, replay.sample(1, 1, 500)[0]) and not torch.equal(obs, replay.sample(1, 2, 500)[0])


def test_rollout_stores_what_happened():
    args, world, spec, nets, *_ = setup("simple_adversary")
    torch.manual_seed(3)
    obs, act, end = c.rollout(world, spec, nets["theta"], (1, 2, 3))
    torch.manual_seed(3)
    o = world.reset()
    s = c.shape(spec)
    for t in range(args.horizon):
        for i in range(s.M):
            assert torch.equal(obs[t, :, i * s.O : i * s.O + spec.obs_dims[i]], o[i])
        o, reward, *_ = world.step(tuple(act[t].view(4, s.M, s.A).unbind(1)))
        assert torch.equal(end[t, :, :-1], reward) and end[t, :, -1].abs().max() == 0
    assert torch.equal(obs[-1, :, : spec.obs_dims[0]], o[0])


# ---------------------------------------------------------------- coded = centralised, bit by bit
def inline(scheme, **change):
    def engine_of(args, spec):
        code = c.make_code(scheme, 15, len(spec.obs_dims), args.seed)
        return c.Inline(code._replace(**change), spec, args)

    return engine_of


SLOW = dict(num_learners=15, num_stragglers=4, straggler_delay=1e3)  # four random losses in every update


@pytest.mark.parametrize("scheme", ["mds", "sparse-mds", "random", "replication"])
def test_coded_trajectory_is_the_centralised_one(scheme):
    assert same(trajectory(updates=60), trajectory(inline(scheme), updates=60, **SLOW))


@pytest.mark.parametrize("scheme", ["uncoded", "replication", "mds", "random", "ldpc", "sparse-mds"])
def test_coded_trajectory_with_eight_agents(scheme):
    assert same(trajectory(num_agents=8), trajectory(inline(scheme), num_agents=8, **SLOW))


def test_coded_trajectory_of_unequal_agents():
    kw = dict(env="simple_tag", num_agents=5, adv_policy="ddpg")
    assert same(trajectory(**kw), trajectory(inline("sparse-mds"), **kw, **SLOW))


@pytest.mark.parametrize("scheme, change", [("mds", dict(exact=False)), ("mds-paper", {})])
def test_single_precision_and_the_papers_matrix_depart(scheme, change):
    one, two = trajectory(num_agents=8), trajectory(inline(scheme, **change), num_agents=8, **SLOW)
    gap = (one[0] - two[0]).abs().max()
    assert gap > (1e-2 if scheme == "mds-paper" else 1e-6)


def test_noise_that_is_not_keyed_is_found_out(monkeypatch):
    keyed = c.noise
    stream = torch.Generator().manual_seed(0)
    draw = lambda size: torch.empty(size).exponential_(generator=stream)
    free = lambda seed, t, k, size: keyed(seed, t, k, size) if k > 99 else draw(size)
    monkeypatch.setattr(c, "noise", free)
    with pytest.raises(c.Stopped, match="contradict"):
        trajectory(inline("sparse-mds"), num_agents=8, **SLOW)


# ---------------------------------------------------------------- time of an iteration, eq. (13)
def test_iteration_times_have_their_closed_forms():
    M, work, delay = 8, 0.02, 0.25
    for k in (0, 2, 4, 7):
        times = {}
        for scheme in SCHEMES:
            C = c.make_code(scheme, 15, M).C
            slow = [c.slow_ones(C, 1, t, k) for t in range(300)]
            times[scheme] = np.mean([c.arrivals(C, s, work, delay)[1] for s in slow])
        assert times["uncoded"] == pytest.approx(work + delay * (k > 0))
        assert work * 7 - 1e-9 <= times["mds"] <= work * M + 1e-9  # our Chebyshev rows have some zeros
        assert 4 * work - 1e-9 <= times["sparse-mds"] <= 5 * work + 1e-9
        lost = 1 - P_DECODABLE["replication", 8][k]
        assert times["replication"] == pytest.approx(work + delay * lost, abs=0.02)
        assert times["ldpc"] <= 4 * work + delay * (1 - P_DECODABLE["ldpc", 8][k]) + 0.02
    eight = np.arange(15) < 8  # one too many
    assert c.arrivals(c.make_code("mds", 15, 8).C, eight, work, delay)[1] > delay


def test_stragglers_are_keyed_and_among_the_learners_with_work():
    C = c.make_code("uncoded", 15, 3).C
    draws = [c.slow_ones(C, 1, t, 2) for t in range(50)]
    assert all(d.sum() == 2 and not d[3:].any() for d in draws)
    assert len({tuple(d) for d in draws}) == 3 and np.array_equal(draws[7], c.slow_ones(C, 1, 7, 2))


# ---------------------------------------------------------------- learners as processes
LOCAL = dict(num_learners=15, num_agents=8, learner_timeout=30.0)


def local(during=lambda pool, t: None, scheme="sparse-mds"):
    """A pool of real processes; `during(pool, t)` runs when the jobs of update t have been sent."""

    def engine_of(args, spec):
        pool = c.LocalPool(c.make_code(scheme, 15, len(spec.obs_dims), args.seed), spec, args)
        listen, seen = pool.listen, set()

        def spy(t, answers):
            if t not in seen:
                seen.add(t)
                during(pool, t)
            return listen(t, answers)

        pool.listen = spy
        return pool

    return engine_of


def kill(pool, learners, how=signal.SIGKILL):
    for j in learners:
        os.kill(pool.process[j].pid, how)


def wake(pool, learners):
    for j in learners:
        with contextlib.suppress(ProcessLookupError):  # the run may be over, and its learners closed
            kill(pool, [j], signal.SIGCONT)


@pytest.fixture(scope="module")
def undisturbed():
    return trajectory(updates=12, num_agents=8)


def test_processes_give_the_centralised_trajectory(undisturbed):
    kw = LOCAL | dict(num_stragglers=4, straggler_delay=30.0)  # nobody waits for those
    start = time.time()
    assert same(undisturbed, trajectory(local(), updates=12, **kw))
    assert time.time() - start < 30


def test_seven_learners_killed_one_after_another_in_mid_iteration(undisturbed):
    def during(pool, t):
        if 2 <= t <= 8:
            kill(pool, [2 * (t - 2)])

    engines = []
    engine_of = lambda *a: engines.append(local(during)(*a)) or engines[0]
    assert same(undisturbed, trajectory(engine_of, updates=12, agent_seconds=0.01, **LOCAL))
    assert engines[0].restarts == 7


def test_hung_learners_are_neither_waited_for_nor_trusted(undisturbed):
    pools = []

    def during(pool, t):
        if t == 3:
            kill(pool, range(7), signal.SIGSTOP)  # in mid-job, or idle
        if t == 7:
            kill(pool, range(7), signal.SIGCONT)  # their answers are of an old update
        pools.append(pool)

    assert same(undisturbed, trajectory(local(during), updates=12, agent_seconds=0.01, **LOCAL))
    assert pools[0].restarts == 0


def test_a_hung_learner_is_replaced_after_the_timeout(undisturbed):
    pools = []

    def during(pool, t):
        pools.append(pool)
        if t == 3:
            kill(pool, range(8), signal.SIGSTOP)  # one too many: the update needs a replacement

    kw = LOCAL | dict(learner_timeout=3.0)
    assert same(undisturbed, trajectory(local(during), updates=12, agent_seconds=0.01, **kw))
    assert pools[0].restarts >= 1


MISSING = ("update 3 is undecodable: learners [0, 1, 2, 3, 4, 5, 6, 7] are gone, and the 7 left do not "
           "determine agents")


LEARNER = c.learner


def late(*given):
    """A learner that takes its time to start: so no killed one is back before all are found dead."""
    time.sleep(1)
    LEARNER(*given)


@pytest.fixture
def eight_at_once(monkeypatch):
    def during(pool, t):
        if t == 3:
            monkeypatch.setattr(c, "learner", late)
            kill(pool, range(8))

    return during


def test_learners_that_are_still_at_their_last_job_are_not_gone(undisturbed):
    def during(pool, t):
        if t == 2:
            kill(pool, range(8, 13), signal.SIGSTOP)  # late from now on
        if t == 3:
            kill(pool, [2])  # agent 2 now is with the late ones alone
            threading.Timer(0.5, wake, (pool, range(8, 13))).start()

    kw = LOCAL | dict(agent_seconds=0.02, on_undecodable="stop")
    assert same(undisturbed, trajectory(local(during, "ldpc"), updates=12, **kw))


@pytest.mark.parametrize("policy", ["wait", "compute"])
def test_eight_killed_at_once(policy, undisturbed, eight_at_once, capfd):
    kw = LOCAL | dict(on_undecodable=policy, agent_seconds=0.05)
    assert same(undisturbed, trajectory(local(eight_at_once), updates=12, **kw))
    assert (MISSING in capfd.readouterr().err) == (policy == "wait")


def test_all_killed(undisturbed):
    everyone = lambda pool, t: t == 3 and kill(pool, range(15))
    for policy in "wait", "compute":
        kw = LOCAL | dict(on_undecodable=policy, agent_seconds=0.05)
        assert same(undisturbed, trajectory(local(everyone), updates=12, **kw))


def test_a_learner_that_dies_again_and_again_ends_the_run():
    def during(pool, t):
        pool.failures = dict.fromkeys(pool.failures, 5)  # as if each had died so often since its last answer
        kill(pool, [0])

    with pytest.raises(c.Stopped, match="died 6 times in a row"):
        trajectory(local(during), agent_seconds=0.05, **LOCAL)


TINY = dict(num_units=8, batch_size=8, horizon=5, num_agents=8, num_learners=15, learning_starts=40,
            replay_size=400, agent_seconds=0.02, eval_episodes=2, save_every=3)


def test_too_many_dead_stop_with_a_checkpoint_that_resumes(tmp_path, monkeypatch, eight_at_once, capfd):
    whole = c.train(c.Args(total_steps=200, run_dir=str(tmp_path / "whole"), **TINY))
    monkeypatch.setattr(c, "make_engine", lambda args, spec: local(eight_at_once)(args, spec))
    args = dict(total_steps=200, run_dir=str(tmp_path / "r"), on_undecodable="stop", **TINY)
    with pytest.raises(SystemExit) as end:
        c.train(c.Args(**args))
    assert end.value.code == 1 and MISSING in capfd.readouterr().err
    checkpoint = torch.load(tmp_path / "r" / "checkpoint.pt")
    assert checkpoint["optimizers"]["adam"]["n"] == 2 and checkpoint["iteration"] == 4
    monkeypatch.undo()
    resumed = c.train(c.Args(resume=str(tmp_path / "r" / "checkpoint.pt"), **args))
    assert all(torch.equal(whole[g][k], resumed[g][k]) for g in whole for k in whole[g])


def test_ctrl_c_while_waiting_ends_the_wait():
    def during(pool, t):
        pool.interrupted = lambda: True

    with pytest.raises(c.Stopped):
        trajectory(local(during), agent_seconds=1.0, **LOCAL)


def alive(mark):
    """Processes with this mark in their environment."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if mark.encode() in Path(f"/proc/{pid}/environ").read_bytes():
                found.append(int(pid))
    return found


def test_learners_leave_with_a_controller_that_is_killed(tmp_path):
    from test_scripts import flags, launch, wait_for

    mark = f"CODED_MADDPG_TEST={os.getpid()}"
    process = launch("coded_maddpg", *flags(**TINY, total_steps=10**6, run_dir=tmp_path / "r"),
                     env=os.environ | dict([mark.split("=")]))
    wait_for(tmp_path / "r" / "checkpoint.pt", process)
    assert len(alive(mark)) > 15
    process.kill()
    process.wait()
    end = time.time() + 20
    while alive(mark) and time.time() < end:
        time.sleep(0.1)
    assert not alive(mark)


# ---------------------------------------------------------------- learners on a Ray cluster
@pytest.fixture
def cluster():
    pytest.importorskip("ray")
    start = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port=26379"]
    options = ["--num-cpus=2", "--include-dashboard=false", "--disable-usage-stats"]
    process = subprocess.Popen(start + options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 60
    while time.time() < end and process.poll() is None:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", 26379), timeout=1).close()
            break
        time.sleep(0.2)
    time.sleep(3)  # the node joins its own cluster
    yield "127.0.0.1:26379"
    process.terminate()
    process.wait(60)


def test_ray_actors_give_the_same_bits_even_if_one_is_killed(cluster):
    kw = dict(num_agents=3, num_learners=5, agent_seconds=0.05, learner_timeout=30.0)
    pools = []

    def engine_of(args, spec):
        pools.append(c.RayPool(c.make_code("sparse-mds", 5, 3, args.seed), spec, args))
        listen, seen = pools[0].listen, []

        def spy(t, answers):
            if t == 3 and not seen:  # in mid-job
                seen.append(t)
                pools[0].ray.kill(pools[0].actors[1])
            return listen(t, answers)

        pools[0].listen = spy
        return pools[0]

    without = trajectory(updates=12, num_agents=3)
    slow = dict(num_stragglers=1, straggler_delay=5.0)
    assert same(without, trajectory(engine_of, updates=12, ray_address=cluster, **kw, **slow))
    assert pools[0].restarts == 1


def test_without_a_cluster_ray_is_one_line_and_code_2(capfd):
    args = c.resolve(c.Args(num_learners=5, engine="ray", ray_address="127.0.0.1:1"))
    with pytest.raises(SystemExit) as end:
        c.make_engine(args, c.make_spec(args, c.make_env(args, 1)))
    text = capfd.readouterr()
    assert end.value.code == 2 and text.out == "" and len(text.err.strip().splitlines()) == 1
