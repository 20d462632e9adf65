"""The maths of mg2l.py: by hand, by plain loops, by torch's own functions, by enumeration, by its oracle."""

import copy
import importlib.util
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mg2l as m

spec = importlib.util.spec_from_file_location("mg2l_oracle", Path(__file__).parent / "oracles" / "mg2l.py")
oracle = importlib.util.module_from_spec(spec)
spec.loader.exec_module(oracle)
close = torch.testing.assert_close

TINY = dict(env="spread", latent_dim=4, hidden=8, context_size=6, num_envs=4, context_envs=3, warm_up=1,
            query_size=5, queries=5, horizon=5, ring_size=4, keys=2, ppo_epochs=2, encoder_updates=2,
            eval_episodes=3, eval_context=7, eval_shots=2)
STEPS = 7 * 5  # training transitions of an iteration
BAD = ["--eval-episodes 1", "--horizon 0", "--method maml", "--local-loss both", "--kl-coef -1", "--gamma 2",
       "--env ipd", "--env simple_spread", "--env simple_push"]


def made(iterations=2, **kw):
    """args, env, learner, tasks after some iterations: by default the rings are full."""
    args = m.Args(**TINY | kw)
    torch.manual_seed(0)
    env = m.make_env(args, args.num_envs + args.context_envs)
    learner, tasks = m.build(args, env), env.all_tasks("train")
    for iteration in range(iterations):
        m.iterate(env, learner, tasks, iteration, args)
    return args, env, learner, tasks


def encoder(n=3, features=7, **kw):
    args = m.Args(**TINY | kw)
    return m.make_encoder(n, features, 4, args.method), args


def moved(before, after):
    return {k for k, x in after.items() if not torch.equal(x, before[k])}


# ---------------------------------------------------------------- the oracle
def rows_of(play, args, zi, z, context, noise):
    """What the oracle takes for each row."""
    for r in range(play.alive.shape[1]):
        own = {k: getattr(play, k)[:, :, r].transpose(0, 1) for k in ("obs", "action", "logprob", "reward")}
        known = context is not None and r < context.shape[1]
        own |= dict(zi=zi[:, r], z=z[0, r], noise=noise[0][0, r])
        yield own | dict(context=context[:, r] if known else None)


@pytest.mark.parametrize("name", ["spread", "rware"])  # continuous actions, and choices
def test_an_update_of_ppo_is_that_of_the_oracle(name):
    args, env, learner, tasks = made(env=name, ppo_epochs=2, minibatches=2)
    with torch.no_grad():
        learner.params["actor"]["w2"] *= 300  # gradients that are clipped, by agent
    twin, moments = copy.deepcopy(learner), oracle.Moments(env.num_agents)
    for part, sums in zip(("weight", "total", "square"), learner.norm.sums):
        setattr(moments, part, sums[:, 0].tolist())
    index = torch.arange(7) % len(tasks)  # three rows of the prior too
    context, noise = learner.ring.sample(index[:4], 6), m.make_noise(env, args)
    with torch.no_grad():
        zi, z, _ = m.latents(learner.params["encoder"], tasks[index], context, noise, args)
    play = m.rollout(env, learner.params["actor"], tasks[index], zi)
    play = play._replace(reward=torch.randn_like(play.reward))
    torch.manual_seed(1)
    m.ppo_update(learner, play, tasks[index], zi, z, context, noise, args)
    before = copy.deepcopy(twin.params)
    torch.manual_seed(1)
    oracle.learn(twin.params, twin.optimizers, moments, [*rows_of(play, args, zi, z, context, noise)], args)
    for group, p in learner.params.items():
        assert len(moved(before[group], p)) > 5
        for name, x in p.items():
            close(x, twin.params[group][name], rtol=1e-3, atol=2e-5, msg=f"{group}.{name}")
    close(learner.norm.sums[1, :, 0], torch.tensor(moments.total), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["own", "joint"])
def test_the_encoders_loss_is_that_of_the_oracle(monkeypatch, kind):
    args, env, learner, _ = made(local_loss=kind)
    p, ring, tasks, C = learner.params["encoder"], learner.ring, torch.tensor([0, 1, 2, 1]), 4
    contexts = ring.sample(torch.cat([tasks, torch.arange(3).repeat(2)]), 6)
    eps = [torch.randn(1, 10, C), torch.randn(2, 10, C)]
    draws = iter(eps)
    monkeypatch.setattr(m.Ring, "sample", lambda *_: contexts)
    monkeypatch.setattr(m.Normal, "rsample", lambda d: d.mean + d.stddev * next(draws))
    torch.manual_seed(1)
    keep = torch.rand(4, 1)[:, 0] < 0.5 if kind == "joint" else torch.zeros(4, dtype=torch.bool)
    assert kind == "own" or 0 < keep.sum() < 4
    torch.manual_seed(1)
    one = m.encoder_losses(p, ring, tasks, args)[0]
    two = oracle.encoder_loss(p, [*contexts.transpose(0, 1)], tasks.tolist(), 3, 2, args.kl_coef, eps[0][0],
                              eps[1], keep)
    close(one, two, rtol=1e-4, atol=1e-5)
    pairs = [torch.autograd.grad(loss, [*p.values()]) for loss in (one, two)]
    for name, a, b in zip(p, *pairs):
        close(a, b, rtol=1e-3, atol=1e-5, msg=name)
    assert sum(bool(a.any()) for a in pairs[0]) == len(p)


def test_the_oracle_plays_a_whole_iteration():
    args, _, learner, tasks = made()
    before = copy.deepcopy(learner.params)
    oracle.iterate(m.make_env(args, 1), learner, oracle.Moments(2), tasks, args)
    assert all(len(moved(before[g], p)) > 0.8 * len(p) for g, p in learner.params.items())


# ---------------------------------------------------------------- eqs. (2), (3): who sees what
def test_a_pool_forgets_order_and_repetition():
    p, x = m.make_pool(5), torch.randn(2, 11, m.UNITS)
    y = m.pool(p, x)
    close(m.pool(p, x[:, torch.randperm(11)]), y, rtol=1e-4, atol=1e-5)
    close(m.pool(p, x.repeat(1, 2, 1)), y, rtol=1e-4, atol=1e-5)
    close(m.pool(p, x[:, :1]), (x[:, 0] @ p["wv"] + p["bv"]) @ p["wo"] + p["bo"], rtol=1e-4, atol=1e-5)
    close(m.pool(p, x, "mean"), (x.mean(1) @ p["wv"] + p["bv"]) @ p["wo"] + p["bo"], rtol=1e-4, atol=1e-5)
    place = torch.linspace(-1, 1, 11)[:, None]  # a code of positions breaks it
    assert not torch.allclose(m.pool(p, x + place), m.pool(p, x.flip(1) + place), atol=1e-4)


def test_a_local_latent_depends_on_all_own_transitions_and_on_no_others():
    p, args = encoder()
    c = torch.randn(3, 2, 6, 7)
    q = m.encode(p, c, args)[1].mean
    reached = torch.zeros(3, 6)
    for j, t in itertools.product(range(3), range(6)):
        other = c.clone()
        other[j, :, t] += 1
        reached[j, t] = (m.encode(p, other, args)[1].mean[0] - q[0]).abs().max()
    assert (reached[0] > 0).all() and (reached[1:] == 0).all()


def test_agents_share_the_encoder_but_for_their_local_nets():
    p, args = encoder()
    c = torch.randn(3, 2, 6, 7)
    z, zi = m.encode(p, c, args)
    order = [2, 0, 1]
    close(m.encode(p, c[order], args)[0].mean, z.mean, rtol=1e-4, atol=1e-5)
    swapped = {k: x[order] if k.startswith("local.") else x for k, x in p.items()}
    close(m.encode(swapped, c[order], args)[1].mean, zi.mean[order])
    assert not torch.allclose(m.encode(p, c[order], args)[1].mean, zi.mean[order], atol=1e-3)


REACHED = {"global": {"transition", "pool", "agents", "sigma"}, "local": {"local", "local_sigma"},
           "critic": {"transition", "pool", "agents", "sigma"}, "actor": set()}


@pytest.mark.parametrize("loss", REACHED)
def test_each_loss_reaches_what_it_should(loss):
    args, env, learner, tasks = made()
    p, index = learner.params["encoder"], torch.arange(7) % 3
    context = learner.ring.sample(index, 6)
    zi, z, q = m.latents(p, tasks[index], context, m.make_noise(env, args), args)
    own = q[1].rsample()
    value = {"global": m.info_nce(z[0] @ z[0, :3].T, index)[0] + m.kl_divergence(q[0], m.PRIOR).mean(),
             "local": m.local_loss(z[0], z[0, :3], own, own[:, :3], index)[0],
             "critic": m.values(learner.params["critic"], torch.randn(2, 7, 10), z).sum(),
             "actor": m.policy(learner.params["actor"], torch.randn(2, 7, 10), zi).mean.sum()}[loss]
    grads = torch.autograd.grad(value, [*p.values()], allow_unused=True)
    assert {k.split(".")[0] for k, g in zip(p, grads) if g is not None and g.any()} == REACHED[loss]


def test_the_product_of_gaussian_factors():
    mu, rho = torch.randn(1, 1, 4, 3), torch.randn(1, 1, 4, 3)
    q = m.product(torch.cat([mu, rho], -1))[1]
    tau = F.softplus(rho)
    mean, sd = mu[0, 0, 0], tau[0, 0, 0] ** -0.5
    for t in range(1, 4):  # one factor after the other
        total = sd**-2 + tau[0, 0, t]
        mean, sd = (mean * sd**-2 + mu[0, 0, t] * tau[0, 0, t]) / total, total**-0.5
    close(q.mean[0, 0], mean)
    close(q.stddev[0, 0], sd)


# ---------------------------------------------------------------- eq. (1): rings
def numbered(T, R, start):
    """x[i, t, r] = 1000 r + start + t, and the agent i."""
    x = torch.zeros(2, T, R, 2)
    x[..., 0] = start + torch.arange(T)[:, None] + 1000.0 * torch.arange(R)
    x[..., 1] = torch.arange(2).view(2, 1, 1)
    return x


def test_a_ring_keeps_the_newest_and_draws_transitions_uniformly_and_aligned(monkeypatch):
    monkeypatch.setattr(m.RunningNorm, "norm", lambda self, x: x / 1000)  # within the bounds of +-10
    torch.manual_seed(0)
    ring = m.Ring(2, 3, 4, 5, 2, "cpu")
    for e in range(6):  # six episodes into four places; the last of task 2 is cut short
        ring.append(torch.tensor([2, 1]), numbered(5, 2, 10 * e), torch.tensor([5 if e < 5 else 2, 5]))
    c = (1000 * ring.sample(torch.tensor([2, 1, 2]), 4000)).round()
    assert torch.equal(c[0, ..., 0], c[1, ..., 0]) and (c[1, ..., 1] == 1).all()  # (2, 3, 4000, 2)
    newest = {10 * e + t for e in (2, 3, 4) for t in range(5)} | {50, 51}
    values, counts = c[0, [0, 2], :, 0].unique(return_counts=True)
    assert set(values.tolist()) <= newest and set(c[0, 1, :, 0].tolist()) <= {
        1000 + 10 * e + t for e in (2, 3, 4, 5) for t in range(5)}
    # a step of the short episode is as likely as any other
    assert len(values) == 17 and (counts / 8000 - 1 / 17).abs().max() < 0.01


# ---------------------------------------------------------------- eqs. (5)-(8)
def test_gae_against_the_sum():
    torch.manual_seed(0)
    n, T, R, gamma, lam = 2, 9, 6, 0.9, 0.8
    reward, value = torch.randn(n, T, R), torch.randn(n, T + 1, R)
    end = torch.tensor([9, 9, 3, 8, 0, 5])  # an episode of 9 is cut by the horizon
    ended, alive = ((op(torch.arange(T)[:, None], end)).float() for op in (torch.eq, torch.le))
    adv = m.gae(reward * alive, value, alive, ended, gamma, lam)
    for i, r, t in itertools.product(range(n), range(R), range(T)):
        total = 0.0
        for u in range(t, min(T - 1, int(end[r])) + 1):
            nxt = 0 if ended[u, r] else value[i, u + 1, r]
            total += (gamma * lam) ** (u - t) * (reward[i, u, r] + gamma * nxt - value[i, u, r])
        close(adv[i, t, r], torch.as_tensor(total), rtol=1e-4, atol=1e-5)


def test_the_running_norm():
    norm, x = m.RunningNorm(2, 1, device="cpu"), torch.randn(2, 50) * torch.tensor([[3.0], [1e-3]]) - 7
    norm.update(x, torch.full((50,), 0.02))
    mean, sd = norm.moments()
    close(mean[:, 0], x.mean(1), rtol=1e-3, atol=1e-3)
    floor = torch.tensor(0.01)
    close(sd[:, 0], torch.stack([x[0].std(correction=0), floor]), rtol=1e-2, atol=1e-3)
    norm.update(x + 2, torch.full((50,), 0.02))
    close(norm.moments()[0][:, 0], x.mean(1) + 1, rtol=1e-3, atol=1e-3)


def test_clipped_losses_by_hand():
    w = torch.tensor([0.5, 0.5])
    ratio = torch.tensor([[1.5, 0.5]]).log()
    for adv, gain in ([1.0, 1.0], 1.2 + 0.5), ([-1.0, -1.0], -1.5 - 0.8):
        loss = m.actor_loss(ratio, torch.zeros(1, 2), torch.tensor([adv]), torch.ones(1, 2), w, 0.2, 0.01)
        assert loss.item() == pytest.approx(-gain / 2 - 0.01)
    value, old, target = (torch.tensor([x]) for x in ([1.0, 0.1], [0.0, 0.0], [1.0, 1.0]))
    want = 0.5 * 0.5 * (0.8**2 + 0.9**2)  # the clipped value, 0.2, is the worse one; 0.1 is not clipped
    assert m.critic_loss(value, old, target, w, 0.2).item() == pytest.approx(want)
    for value in -20.0, 20.0:  # Huber: 10 (20 - 5), on both sides
        loss = m.critic_loss(*torch.tensor([[[value]], [[value]], [[0.0]]]), torch.ones(1), 0.2)
        assert loss.item() == pytest.approx(150)


# ---------------------------------------------------------------- eqs. (10), (11)
def mutual_information(means, n):
    """I(mean of n samples; task) for N(mu_k, 1), by quadrature."""
    x = np.linspace(-12, 12, 20_001)
    dx, sd = x[1] - x[0], 1 / math.sqrt(n)
    p = np.exp(-0.5 * ((x - np.array(means)[:, None]) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))
    mix = p.mean(0)
    return float((p * np.log(np.maximum(p, 1e-300) / np.maximum(mix, 1e-300))).sum(1).mean() * dx)


@pytest.mark.parametrize("means, n", [((-0.5, 0.5), 4), ((-1.0, 0.0, 1.0), 2)])
def test_log_K_minus_the_loss_bounds_the_mutual_information(means, n):
    """The best scores that dot products of (x, 1) with (a mu, b) can give: keys from 64 samples each."""
    torch.manual_seed(0)
    mu, M, true = torch.tensor(means), 60_000, mutual_information(means, n)
    tasks = torch.randint(len(means), (M,))
    query = mu[tasks] + torch.randn(M) / math.sqrt(n)
    key = mu + torch.randn(M, len(means)) / 8
    scores = n * (query[:, None] * key - key**2 / 2)  # log densities of the query, to a constant
    bound = math.log(len(means)) - m.info_nce(scores, tasks)[0].item()
    assert true - 0.03 <= bound <= true + 0.01


def test_where_z_tells_the_task_joint_scores_teach_nothing_but_what_must_do_without_z_does():
    """Why joint forgets [D2]: the gradient of z^i vanishes unless z's score is dropped."""
    torch.manual_seed(0)
    tasks, eye = torch.arange(6) % 3, 30 * torch.eye(3)
    zi, key = torch.randn(2, 6, 4, requires_grad=True), torch.randn(2, 3, 4)
    keep = (torch.arange(6) % 2)[:, None]  # rows 1, 3, 5 see z
    for kept, learns in (1.0, []), (0.0, [0, 1, 2, 3, 4, 5]), (keep, [0, 2, 4]):
        loss = m.local_loss(eye[tasks], eye, zi, key, tasks, kept)[0]
        (g,) = torch.autograd.grad(loss, zi)
        assert (g.abs().amax((0, 2)) > 1e-3).nonzero().flatten().tolist() == learns


def test_latents_that_only_name_the_agent_win_nothing():
    eye = 30 * torch.eye(3)
    zi, key = eye[:, None].expand(3, 15, 3), eye[:, None].expand(3, 5, 3)
    loss, _ = m.local_loss(torch.zeros(15, 4), torch.zeros(5, 4), zi, key, torch.arange(15) % 5)
    assert loss.item() == pytest.approx(math.log(5), rel=1e-4)


# ---------------------------------------------------------------- an iteration
def test_at_first_the_prior_plays_alone_and_then_actors_learn_from_M_rows():
    args, env, learner, tasks = made(0, warm_up=3)
    for iteration in range(4):
        before, appended = copy.deepcopy(learner.params), int(learner.ring.next.sum())
        m.iterate(env, learner, tasks, iteration, args)
        groups = {group for group, p in learner.params.items() if moved(before[group], p)}
        wanted = [set(), {"encoder"}, {"encoder"}, {"actor", "critic", "encoder"}]  # the rings are empty at 0
        assert groups == wanted[iteration]
    assert (int(learner.ring.next.sum()) - appended - 3) % 4 == 0  # the last: three rows by the prior


def test_the_first_ratio_is_one():
    args, env, learner, tasks = made()
    index = torch.arange(7) % 3
    noise = m.make_noise(env, args)
    context = learner.ring.sample(index[:4], 6)
    zi, *_ = m.latents(learner.params["encoder"], tasks[index], context, noise, args)
    play = m.rollout(env, learner.params["actor"], tasks[index], zi)
    obs, action = play.obs[:, :5].flatten(1, 2), play.action.flatten(1, 2)
    logprob = m.policy(learner.params["actor"], obs, zi.repeat(1, 5, 1)).log_prob(action)
    close(logprob, play.logprob.flatten(1), rtol=1e-4, atol=1e-5)


OTHERS = [dict(method=x) for x in ("none", "task-given", "global-only", "pearl")]
OTHERS += [dict(local_loss="kl"), dict(local_loss="own"), dict(env="hunting"), dict(env="rware", keys=1)]


@pytest.mark.parametrize("kw", OTHERS)
def test_every_method_trains(kw):
    args, env, learner, tasks = made(**kw)
    before = copy.deepcopy(learner.params)
    logs, steps = m.iterate(env, learner, tasks, 5, args)
    assert steps == STEPS and all(math.isfinite(float(x)) for x in logs.values())
    assert all(moved(before[g], p) for g, p in learner.params.items() if p)
    results = m.meta_test(args, learner)
    names = {tag.removeprefix("eval/test/return_") for tag in results if f"{tag}_ci95" in results}
    assert names == {"0"} | ({"1", "2", "wrong"} if args.method in m.INFERS else set())


class Steps:
    """Two agents; row r ends for good after step r + 1. Observations count the steps. One task."""

    num_agents, obs_dims, action_dims, discrete, horizon = 2, (1, 1), (3, 3), True, 6

    def __init__(self, B=4):
        self.num_envs = B

    def all_tasks(self, split):
        return torch.ones(1, 1)

    def reset(self, task=None):
        self.t = 0
        return self.observe()

    def observe(self):
        t = torch.minimum(torch.tensor(float(self.t)), torch.arange(self.num_envs) + 1.0)
        return (t[:, None], t[:, None] + 100)

    def step(self, action):
        assert all(a.shape == (self.num_envs,) and a.max() < 3 for a in action)
        alive = self.t < torch.arange(self.num_envs) + 1
        self.t += 1
        reward = torch.tensor([1.0, 2.0]).expand(self.num_envs, 2)
        over = ~(self.t < torch.arange(self.num_envs) + 1)
        return self.observe(), torch.where(alive[:, None], reward, 99.0), over, over & False, {}


def test_an_early_end_is_a_mask_and_play_stops_when_all_have_ended():
    actor = m.make_mlp(2, [1, 8, 8, 3])
    play = m.rollout(Steps(), actor, None, torch.zeros(1, 4, 0))
    assert play.alive.sum(0).tolist() == [1, 2, 3, 4] and play.alive.shape[0] == 4
    assert play.reward[0].sum(0).tolist() == [1, 2, 3, 4] and play.reward[1].sum(0).tolist() == [2, 4, 6, 8]
    x = m.transitions(play, Steps())
    assert x.shape == (2, 4, 4, 6) and (x[0, :, 3, 5] == 1).all()  # o' - o
    assert torch.equal(x[..., 1:4].argmax(-1), play.action) and (x[..., 1:4].sum(-1) == 1).all()


def test_one_task_and_returns_that_never_vary_end_no_run(monkeypatch, tmp_path):
    monkeypatch.setattr(m, "make_env", lambda args, n: Steps(n))
    m.train(m.Args(**TINY | dict(horizon=6, run_dir=str(tmp_path / "r"), total_steps=60)))
    assert (tmp_path / "r" / "eval.json").exists()


# ---------------------------------------------------------------- eq. (13)
def test_the_share_told_finds_the_task_and_never_meets_its_own_trial():
    K, E = 3, 4
    eye = torch.eye(K).repeat_interleave(E, 0)[None]
    assert m.share_told(eye, eye, K, E) == 1
    unique = torch.eye(K * E)[None]  # a latent that names the trial: met only if a trial is its own key
    assert m.share_told(unique, unique, K, E) == pytest.approx(1 / 3)  # all 0: the first task


def test_a_trial_infers_from_its_own_episodes_and_the_wrong_task_from_anothers(monkeypatch):
    args, _, learner, _ = made()
    seen, plays, latents, rollout = [], [], m.latents, m.rollout

    def spy(p, tasks, context, noise, args):
        out = latents(p, tasks, context, noise, args)
        seen.append((context, out[0]))
        return out

    monkeypatch.setattr(m, "latents", spy)
    monkeypatch.setattr(m, "rollout", lambda *a: plays.append((a[3], rollout(*a))) or plays[-1][1])
    m.meta_test(args, learner)
    assert [c is None for c, _ in seen] == [True, False, False, True, False, False]
    assert torch.equal(plays[-1][0][:, 3:6], seen[4][1][:, :3])  # E = 3: task 1 is given task 0's latents
    first = m.transitions(plays[0][1], m.make_env(args, 1))  # (n, T, K E, F)
    mine = learner.ring.norm.norm(first.flatten(1, 2)).clamp(-10, 10).view_as(first)
    for r in range(9):  # after one episode: every transition of a context is one of this trial
        gap = (seen[1][0][:, r, :, None] - mine[:, None, :, r]).abs().amax(-1)  # (n, B, T)
        assert (gap.amin(-1) < 1e-5).all()
