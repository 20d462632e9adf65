"""The maths of maml_rl.py: known answers, finite differences, and the same result however it is computed."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import maml_rl as m

ROOT = Path(__file__).parent.parent
F64 = dict(dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(**kw):
    """Args of a small problem on nav2d: 3 tasks, 4 episodes of 20 steps, a net of 8-8."""
    args = dict(num_tasks=3, num_episodes=4, horizon=20, hidden=8, eval_tasks=3, eval_episodes=4)
    return m.resolve(m.Args(**dict(num_threads=1) | args | kw))


def problem(dtype=torch.float64, second_order=True, **kw):
    """args, net, x, mask and a chain of stored batches, sampled on nav2d."""
    args = small(**kw)
    env = m.make_env(args, args.num_tasks * args.num_episodes)
    net, x, mask, _ = m.build(args, env)
    x, mask, tasks = x.to(dtype), mask.to(dtype), env.sample_tasks(args.num_tasks)
    source = lambda k, phi: m.process(net, phi, m.rollout(env, net, phi, tasks), args)
    start = x.expand(len(tasks), -1)
    return args, net, x, mask, m.adapt(net, start, source, args.inner_steps, args, second_order)


def again(net, x, chain, args, second_order=True):
    """The inner steps anew from x (2P,) or (M, 2P) on the stored batches."""
    x = x.expand(len(chain.phis[0]), -1)
    return m.adapt(net, x, lambda k, phi: chain.batches[k], len(chain.grads), args, second_order)


# ---------------------------------------------------------------- the quadratic: numbers by hand
def test_1_quadratic():
    A, c = torch.tensor([[2, 0.5], [0.5, 1]], **F64), torch.tensor([1.0, -1], **F64)
    alpha, phi = torch.full((2,), 0.1, **F64), torch.zeros(1, 2, **F64, requires_grad=True)
    loss = lambda x: 0.5 * ((x - c) @ A * (x - c)).sum()
    g = torch.autograd.grad(loss(phi), phi, create_graph=True)[0]
    last = (phi - alpha * g).detach().requires_grad_()
    w = torch.autograd.grad(loss(last), last)[0]
    chain, zero = m.Chain([phi, last], [g], []), torch.zeros_like(w)
    close = lambda x, *y: torch.allclose(x, torch.tensor([y], **F64), atol=1e-12, rtol=0)
    d_theta, d_alpha = m.pull_back(chain, [zero, w], alpha).chunk(2, -1)
    assert close(d_theta, -1.00625, 0.53375) and close(d_alpha, -1.8375, -0.2625)
    first = m.pull_back(chain, [zero, w], alpha, first_order=True)
    assert close(first, -1.225, 0.525, -1.8375, -0.2625)
    # what phi_0 contributes to the loss by itself is added, and forward is the transpose of backward
    assert close(m.pull_back(chain, [zero + 1, w], alpha), -0.00625, 1.53375, -1.8375, -0.2625)
    v = torch.randn(1, 4, **F64)
    forward, backward = m.push_forward(chain, v, alpha), m.pull_back(chain, [zero, w], alpha)
    assert torch.allclose((forward * w).sum(), (v * backward).sum(), atol=1e-12)


# ---------------------------------------------------------------- the Gaussian bandit: why loglik is biased
def inner_derivatives(kind, steps, n=4_000_000, c=1.0, s=0.5, error=0.0):
    """Gradient and Hessian of -L_in by theta at 0 for n episodes of a ~ N(theta, s^2) under exact
    baselines; `error` a1^2 falsifies that of step 2. r1 = -(a1 - c)^2, r2 = -(a1 + a2 - 2c)^2."""
    theta = torch.zeros(1, **F64, requires_grad=True)
    a = s * torch.randn(1, steps, n, 1, **F64)
    d = a[..., 0] - c
    ret, base = -(d[:, :1] ** 2), torch.full((1, 1, n), -(c**2 + s**2), **F64)
    if steps == 2:
        # given a1, E[(a1 + a2 - 2c)^2] = (a1 - 2c)^2 + s^2; before, it is (2c)^2 + 2 s^2
        r2 = -((d[:, :1] + d[:, 1:]) ** 2)
        base_2 = -((d[:, :1] - c) ** 2 + s**2) + error * a[:, :1, :, 0] ** 2
        ret, base = torch.cat([ret + r2, r2], 1), torch.cat([base - (4 * c**2 + 2 * s**2), base_2], 1)
    logprob = m.log_prob(theta, torch.full((1,), math.log(s), **F64), a)  # (1, steps, n)
    weight = torch.full_like(ret, 1 / n)  # the sum over time, as J has it
    objective = -m.inner_loss(logprob, logprob.detach(), ret - base, weight, kind).sum()
    g = torch.autograd.grad(objective, theta, create_graph=True)[0]
    return g.item(), torch.autograd.grad(g, theta)[0].item()


@pytest.mark.parametrize("kind, answer", [("loglik", 1.600), ("ratio", 1.280), ("dice", 1.280)])
def test_2_bandit(kind, answer):
    g, H = inner_derivatives(kind, steps=1)
    assert -2 * (0.1 * g - 1) * (1 + 0.1 * H) == pytest.approx(answer, abs=0.02)  # theta 0, c 1, alpha 0.1


@pytest.mark.parametrize("kind, hessian", [("loglik", 0), ("ratio", -6), ("dice", -10)])
def test_2_bandit_of_two_steps(kind, hessian):
    g, H = inner_derivatives(kind, steps=2)
    assert g == pytest.approx(10, abs=0.05) and H == pytest.approx(hessian, abs=0.1)
    if kind == "dice":  # plain DiCE, box(c_t) A_t, would be off by 2 * error
        g, H = inner_derivatives(kind, steps=2, error=2.0)
        assert g == pytest.approx(10, abs=0.05) and H == pytest.approx(hessian, abs=0.2)


# ---------------------------------------------------------------- derivatives through learning, on nav2d
VARIANTS = {
    "maml": {}, "loglik": dict(inner_grad="loglik"), "two steps": dict(inner_steps=2, method="meta-sgd"),
    "maesn": dict(method="maesn"), "e-maml": dict(e_maml=True, inner_steps=2),
    "ppo": dict(outer="ppo", method="meta-sgd"), "promp": dict(outer="promp", inner_steps=2, kl_coef=1.0),
    "relu": dict(activation="relu"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_3_meta_gradient_against_central_differences(variant):
    args, net, x, mask, chain = problem(**VARIANTS[variant])
    x = x + 0.003 * torch.randn_like(x) * mask  # off the sampling policy: ratios are not 1
    scores = torch.randn(3, **F64)

    def loss(x):
        return m.outer_objective(net, again(net, x, chain, args), scores, args)[0].mean().item()

    _, _, g = m.meta_gradient(net, again(net, x, chain, args), x, scores, args)
    learned = mask.nonzero().flatten()[:: 3 if mask.mean() > 0.9 else 2]
    steps = 1e-6 * torch.eye(len(x), **F64)[learned]
    numeric = torch.tensor([(loss(x + s) - loss(x - s)) / 2e-6 for s in steps], **F64)
    assert (g[learned] - numeric).norm() < 1e-6 * numeric.norm()
    if variant == "maml":  # and FOMAML is another thing
        args.first_order = True
        assert (m.meta_gradient(net, chain, x, scores, args)[2] - g).norm() > 1e-3 * g.norm()


@pytest.mark.parametrize("method, K", [("maml", 1), ("meta-sgd", 2), ("maesn", 1)])
def test_4_fisher_product(method, K):
    args, net, x, mask, chain = problem(method=method, inner_steps=K)
    P = net.size
    u, v = torch.randn(2, 2 * P, **F64)

    def kl(x):  # without any of section 5: one graph from x through all steps
        phi, alpha = x[:P].expand(3, -1), x[P:]
        for D in chain.batches[:-1]:
            *_, logprob = m.distribution(net, phi, D)
            loss = m.inner_loss(logprob, D.logprob, D.adv, D.weight, "ratio").sum()
            phi = phi - alpha * torch.autograd.grad(loss, phi, create_graph=True)[0]
        V = chain.batches[-1]
        mean, log_std, _ = m.distribution(net, phi, V)
        return (V.weight * m.gaussian_kl(V.mean, V.log_std, mean, log_std)).sum((1, 2)).mean()

    x = x.clone().requires_grad_()
    value = kl(x)
    g = torch.autograd.grad(value, x, create_graph=True)[0]
    assert abs(value) < 1e-12 and g.norm() < 1e-12
    double = torch.autograd.grad(g, x, v)[0]
    F = m.fisher_product(net, chain, x[P:].detach())
    assert (F(v) - double).norm() < 1e-10 * double.norm()
    ends = [torch.autograd.grad(kl(x + h * v), x)[0] for h in (1e-5, -1e-5)]
    assert (F(v) - (ends[0] - ends[1]) / 2e-5).norm() < 1e-6 * double.norm()
    assert torch.allclose(u @ F(v), v @ F(u), rtol=1e-10) and v @ F(v) >= 0
    assert (F(v)[P:].norm() > 0) == (K > 0)  # phi_K depends on the step sizes too
    surrogate = m.outer_objective(net, chain, None, args)[0]
    if method != "maesn":
        assert surrogate.abs().max() < 1e-12  # normalised advantages, ratio 1


def test_5_trpo_step_on_a_quadratic():
    A = torch.randn(6, 6, **F64)
    A, x, g = A @ A.T + 0.1 * torch.eye(6, **F64), torch.randn(6, **F64), torch.randn(6, **F64)
    tried = []

    def trial(new, linear=1.0):
        tried.append(new)
        return linear * g @ (new - x), 0.5 * (new - x) @ A @ (new - x)

    new, loss, kl, j = m.trpo_step(x, torch.zeros((), **F64), g, lambda v: A @ v, trial, 0.01, 50, 1e-5)
    s = tried[0] - x
    assert 0.5 * s @ (A + 1e-5 * torch.eye(6, **F64)) @ s == pytest.approx(0.01, rel=1e-6)
    assert j == 0 and loss < 0 and kl <= 0.01 and torch.equal(new, tried[0])
    solution, residual = m.conjugate_gradient(lambda v: A @ v, g, 50)
    assert torch.allclose(A @ solution, g, atol=1e-4) and residual.norm() < 1e-5
    # a KL that grows twice as fast is met by the fourth trial, 0.8^(2*2) < 1/2 < 0.8^(2*1)
    twice = lambda new: (trial(new)[0], 2 * trial(new)[1])
    new, _, kl, j = m.trpo_step(x, torch.zeros((), **F64), g, lambda v: A @ v, twice, 0.01, 50, 1e-5)
    assert j == 2 and torch.allclose(new - x, 0.64 * s) and kl <= 0.01
    # a loss that only rises: x itself, bit by bit, after 15 trials
    tried.clear()
    rises = lambda new: trial(new, linear=-1.0)
    new, *_, j = m.trpo_step(x, torch.zeros((), **F64), g, lambda v: A @ v, rises, 0.01)
    assert torch.equal(new, x) and j == len(tried) == 15


def test_5_trpo_update_on_nav():
    args, net, x, mask, chain = problem()
    before = x.clone()
    logs = m.trpo_update(net, chain, x, mask, None, args)
    loss, kl = m.outer_objective(net, again(net, x, chain, args), None, args)
    assert loss.mean() < 0 and 0 < kl.mean() <= args.delta and not torch.equal(x, before)
    assert torch.allclose(logs["losses/outer"], loss.mean()) and torch.allclose(logs["losses/kl"], kl.mean())
    assert torch.equal(x[net.size :], before[net.size :])  # MAML's step sizes are no parameters
    args.delta, x = 0.0, before.clone()  # nothing can satisfy this
    m.trpo_update(net, chain, x, mask, None, args)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("family", ["maml", "fo-ppo"])
def test_6_all_tasks_at_once_equal_a_loop_over_tasks(family, dtype, tolerance):
    args, net, x, _, chain = problem(dtype, False, family=family, inner_steps=2, method="meta-sgd")
    for i in range(3):
        one = chain._replace(phis=[phi[i : i + 1] for phi in chain.phis],
                             batches=[type(b)(*[f[i : i + 1] for f in b[:-1]], 0) for b in chain.batches])
        alone = again(net, x, one, args, second_order=False)
        for together, single in zip(chain.phis, alone.phis):
            assert (together[i] - single[0]).abs().max() < tolerance
    assert (chain.phis[-1] - chain.phis[0]).abs().max() > 1e-4


# ---------------------------------------------------------------- the world that the numbers rest on
def test_7_half_cheetah_is_gymnasiums():
    """Bit by bit over 200 steps, under the stated convention; tests/test_mujoco.py has all worlds."""
    pytest.importorskip("mujoco")
    import gymnasium

    env = m.make_env(small(env="half_cheetah_dir", action_scale=1.0, horizon=200), 3)
    env.reset(torch.ones(3, 1))
    theirs = gymnasium.make("HalfCheetah-v5").unwrapped
    theirs.reset(seed=0)
    theirs.set_state(env.state[1, 1:10], env.state[1, 10:])  # time, qpos (9), qvel (9)
    for _ in range(200):
        action = torch.rand(3, 6) * 2 - 1
        theirs.data.qacc_warmstart[:] = 0
        obs, reward, *_ = env.step(action)
        v5_obs, _, *_, info = theirs.step(action[1].double().numpy())
        assert (v5_obs == env.state[1][2:]).all()
        cost = 0.05 * (action[1].double() ** 2).sum().item()
        assert reward[1, 0].item() == pytest.approx(info["x_velocity"] - cost, abs=1e-5)


# ---------------------------------------------------------------- batches
def test_8_baseline_recovers_what_is_linear():
    M, H, E = 2, 50, 6
    obs, mask = torch.randn(M, H, E, 3), torch.ones(M, H, E)
    t = (torch.arange(H) / 100)[None, :, None]
    w = torch.randn(M, 10)
    parts = [*obs.unbind(-1), *(obs**2).unbind(-1), t, t**2, t**3, 1 + 0 * t]
    ret = sum(w[:, n, None, None] * part for n, part in enumerate(parts))
    value = m.linear_baseline(obs, ret, mask)
    assert (value - ret).abs().max() < 1e-4
    reward = ret - 0.9 * torch.cat([ret[:, 1:], torch.zeros(M, 1, E)], 1)
    assert torch.allclose(m.returns_to_go(reward, 0.9), ret, atol=1e-4)
    assert m.gae(reward, value, mask, 0.9, 1.0).abs().mean() < 1e-3
    assert m.gae(reward, 0 * value, mask, 0.9, 1.0).abs().mean() > 0.1  # the test can fail
    # one episode of a world that does not move, and huge observations, which are clipped
    stuck = m.linear_baseline(torch.full((1, H, 1, 3), 0.3), torch.randn(1, H, 1), torch.ones(1, H, 1))
    assert stuck.isfinite().all()
    huge = m.linear_baseline(obs.sign() * 1e18, ret, mask)
    assert torch.equal(huge, m.linear_baseline(obs.sign() * 10, ret, mask))


def test_8_gae_by_hand():
    r, v = torch.tensor([1.0, 2, 4]).view(1, 3, 1), torch.tensor([0.5, 1, 2]).view(1, 3, 1)
    A = m.gae(r, v, torch.ones(1, 3, 1), 0.5, 0.5)  # delta: 1, 2, 2
    assert A.flatten().tolist() == [1 + (2 + 2 / 4) / 4, 2 + 2 / 4, 2]
    # the second step is the last: what stands after it counts for nothing, its value bootstraps nothing
    A = m.gae(r, v, torch.tensor([1.0, 1, 0]).view(1, 3, 1), 0.5, 0.5)
    assert A.flatten().tolist() == [1 + 1 / 4, 1, 0]


def test_9_steps_after_the_end_change_nothing():
    args, net, x, _, chain = problem(horizon=12)
    phi, D = chain.phis[0], chain.batches[0]
    mask = (torch.arange(12)[None, :, None] < torch.tensor([5, 12, 9, 7])).to(D.adv).expand(3, 12, 4)
    play = m.Play(D.obs, D.action, D.reward * mask, mask, 0)
    more = lambda y: torch.cat([y, 100 * torch.randn(3, 8, *y.shape[2:], **F64)], 1)
    none = torch.zeros(3, 8, 4, **F64)
    padded = m.Play(more(D.obs), more(D.action), *(torch.cat([y, none], 1) for y in (play.reward, mask)), 0)
    junk = m.Play(torch.where(mask[..., None] > 0, D.obs, 7), torch.where(mask[..., None] > 0, D.action, 9),
                  play.reward, mask, 0)
    a = m.process(net, phi.detach(), play, args)
    for other in (padded, junk):
        b = m.process(net, phi.detach(), other, args)
        assert torch.allclose(a.adv * mask, b.adv[:, :12] * mask, atol=1e-9)
        assert (b.adv[b.weight == 0] == 0).all()
        for kind in ("loglik", "ratio", "dice"):
            args.inner_grad = kind
            g, h = (m.inner_gradient(net, phi, batch, args, True) for batch in (a, b))
            v = torch.randn_like(phi)
            Hg, Hh = (torch.autograd.grad(y, phi, v)[0] for y in (g, h))
            assert torch.allclose(g, h, atol=1e-9) and torch.allclose(Hg, Hh, atol=1e-8) and Hg.norm() > 0
        one, two = (m.surrogate(y.logprob + 0.1, y.logprob, y.adv + 1, y.weight) for y in (a, b))
        assert torch.allclose(one, two, atol=1e-12)
        assert one.tolist() == pytest.approx([-math.exp(0.1)] * 3)
    assert a.weight.sum((1, 2)).tolist() == pytest.approx([1, 1, 1])
    A = a.adv[0][mask[0] > 0]
    assert A.mean().abs() < 1e-12 and A.std(correction=0).item() == pytest.approx(1)


def test_9_rollout_masks_what_follows_the_end():
    args = small(num_episodes=200, num_tasks=2, horizon=30)
    env = m.make_env(args, 400)
    net, *_ = m.build(args, env)
    p = m.unflatten(torch.zeros(net.size), net.shapes)
    p["b2"][:], p["log_std"][:] = torch.tensor([0.01, 0.005]), math.log(0.005)  # walks, almost straight
    tasks = torch.tensor([[0.2, 0.1], [0.5, 0.5]])
    play = m.rollout(env, net, m.flatten(p, net.shapes).expand(2, -1), tasks)
    ended = play.mask[0, -1] == 0
    assert 10 < ended.sum() < 200 and play.mask[1].all()
    first = play.mask[0].sum(0).long()  # steps that count; the last of them arrives
    for e in ended.nonzero().flatten()[:5].tolist():
        assert (play.reward[0, first[e] :, e] == 0).all() and (play.mask[0, : first[e], e] == 1).all()
        assert (play.obs[0, first[e], e] - tasks[0]).abs().max() < 0.01
    # row r belongs to task r // E: the first reward is the distance to that task's goal after the first step
    gap = (play.obs[:, 1] - tasks[:, None]).norm(dim=-1)
    assert torch.allclose(play.reward[:, 0], -gap, atol=1e-6)


def test_10_frozen_meta_sgd_is_maml():
    theta = {}
    for method in ("maml", "meta-sgd"):
        torch.manual_seed(3)
        args = small(method=method)
        env = m.make_env(args, 12)
        net, x, mask, _ = m.build(args, env)
        mask[net.size :] = 0  # alpha stays what it was
        for _ in range(3):
            m.meta_update(env, net, x, mask, None, args)
        theta[method] = x
    assert (theta["maml"] - theta["meta-sgd"]).abs().max() < 1e-6


def test_10_meta_sgd_learns_its_step_sizes():
    args, net, x, mask, chain = problem(method="meta-sgd")
    before = x.clone()
    m.trpo_update(net, chain, x, mask, None, args)
    assert (x[net.size :] != before[net.size :]).all()


def test_10_maesn_adapts_its_latent_alone():
    args, net, x, mask, chain = problem(method="maesn")
    first, last = (m.unflatten(phi.detach(), net.shapes) for phi in chain.phis)
    assert all(torch.equal(first[k], last[k]) == (k != "z") for k in first)
    assert first["z"][0].norm().item() == pytest.approx(0.01)
    x[net.size :] = 0
    still = again(net, x, chain, args)
    assert torch.equal(still.phis[1], still.phis[0])
    outputs = m.policy(m.unflatten(still.phis[1], net.shapes), chain.batches[1].obs)
    moved = m.policy(last, chain.batches[1].obs)
    assert torch.equal(outputs[0], m.policy(first, chain.batches[1].obs)[0])
    assert not torch.equal(moved[0], outputs[0])
    # the input is [o, z]: the same as an ordinary net that sees both
    plain = {k: v for k, v in last.items() if k != "z"}
    obs = chain.batches[1].obs
    wide = torch.cat([obs, last["z"][:, None, None].expand(*obs.shape[:3], -1)], -1)
    assert torch.allclose(m.policy(plain, wide)[0], moved[0], atol=1e-12)


@pytest.mark.parametrize("K", [1, 2])
def test_first_order_ppo(K):
    """Against plain autograd: theta's gradient is phi_K's own, alpha's is -G times it, 0 beyond the bound."""
    args, net, x, mask, chain = problem(family="fo-ppo", method="meta-sgd", inner_steps=K, inner_lr=0.05)
    P, V = net.size, chain.batches[-1]
    x[P::2] = 0.3  # beyond the bound of 0.1: acts as 0.1, and cannot be learned
    chain = again(net, x, chain, args)
    G = sum(chain.grads)
    assert torch.allclose(chain.phis[-1], x[:P] - x[P:].clamp(-0.1, 0.1) * G)

    class Recorder:
        seen = []

        def step(self):
            self.seen.append(x.grad.clone())
            x.sub_(0.01 * x.grad)

    args.epochs, args.delta, before = 3, 1e9, x.clone()
    m.first_order_ppo(net, chain, x, mask, Recorder(), args)
    phi = chain.phis[-1].detach().requires_grad_()
    ratio = torch.exp(m.distribution(net, phi, V)[2] - V.logprob)
    gain = torch.minimum(ratio * V.adv, ratio.clamp(0.85, 1.15) * V.adv)
    w = torch.autograd.grad(-(V.weight * gain).sum(), phi)[0]
    d_alpha = -(G * w).mean(0)
    d_alpha[::2] = 0
    assert torch.allclose(Recorder.seen[0], torch.cat([w.mean(0), d_alpha]), atol=1e-10)
    assert len(Recorder.seen) == 2 and not torch.equal(x, before)
    x.copy_(before)
    args.delta = 1e-12  # nothing but the first candidate lies within
    m.first_order_ppo(net, chain, x, mask, Recorder(), args)
    assert torch.equal(x, before)


def test_inner_gradient_of_fo_ppo_is_clipped_and_its_advantages_are_not_normalised():
    args, net, _, _, chain = problem(family="fo-ppo")
    D = chain.batches[0]
    value = m.linear_baseline(D.obs, m.returns_to_go(D.reward, 0.99), mask := (D.weight > 0).double())
    assert torch.allclose(D.adv, m.gae(D.reward, value, mask, 0.99, 0.97))
    g = m.inner_gradient(net, chain.phis[0], D._replace(adv=D.adv * 1e6), args, False)
    assert g.norm(dim=1).tolist() == pytest.approx([60.0] * 3)
    assert (chain.grads[0].norm(dim=1) < 60).all()


# ---------------------------------------------------------------- small closed forms
def test_gaussians():
    x, y, z = torch.randn(3, 5, 3, **F64)
    a, b = (torch.distributions.Normal(mean, torch.rand(5, 3, **F64) + 0.1) for mean in (y, z))
    assert torch.allclose(m.log_prob(a.loc, a.scale.log(), x), a.log_prob(x).sum(-1))
    kl = m.gaussian_kl(a.loc, a.scale.log(), b.loc, b.scale.log())
    assert torch.allclose(kl, torch.distributions.kl_divergence(a, b).sum(-1))


def test_clipped_surrogate_by_hand():
    ratio, adv = torch.tensor([0.5, 0.5, 2.0, 2.0]), torch.tensor([1.0, -1, 1, -1])
    shape = lambda x: x.view(4, 1, 1)
    loss = m.surrogate(shape(ratio.log()), torch.zeros(4, 1, 1), shape(adv), torch.ones(4, 1, 1), 0.3)
    assert loss.tolist() == pytest.approx([-0.5, 0.7, -1.3, 2.0])


def test_emaml_scores_what_was_sampled():
    args, net, _, _, chain = problem(e_maml=True)
    D, scores = chain.batches[0], torch.tensor([1.0, -2, 0], **F64)
    phi = chain.phis[0]
    *_, logprob = m.distribution(net, phi, D)
    term = m.exploration_score(logprob, D.logprob, D.weight, scores)
    assert term.abs().max() < 1e-12
    g = torch.autograd.grad(term.sum(), phi)[0]
    *_, logprob = m.distribution(net, phi, D)
    mean_score = torch.autograd.grad(logprob.mean((1, 2)).sum(), phi)[0]
    assert torch.allclose(g, -scores[:, None] * mean_score, atol=1e-12)


def test_extra_terms_of_the_outer_loss():
    loss = lambda net, chain, args, **kw: m.outer_objective(net, chain, None, m.Args(**vars(args) | kw))[0]
    args, net, x, _, chain = problem(method="maesn")
    z = m.unflatten(chain.phis[-1], net.shapes)["z"]
    gap = loss(net, chain, args, latent_coef=3.0) - loss(net, chain, args, latent_coef=0.0)
    assert torch.allclose(gap, 3 * (z**2).mean(1)) and gap.std() > 0  # the adapted latent, not z_0
    args, net, x, _, chain = problem(outer="promp", inner_steps=2)
    moved = again(net, x + 0.01, chain, args)
    kl = 0
    for phi, D in zip(moved.phis[:2], chain.batches):
        mean, log_std, _ = m.distribution(net, phi, D)
        kl = kl + m.gaussian_kl(D.mean, D.log_std, mean, log_std).mean((1, 2)) / 2
    gap = loss(net, moved, args, kl_coef=3.0) - loss(net, moved, args, kl_coef=0.0)
    assert torch.allclose(gap, 3 * kl) and (kl > 0).all()


def test_networks():
    p = m.make_policy(2, 2, 64)
    assert sum(v.numel() for v in p.values()) == 4484
    assert sum(v.numel() for v in m.make_policy(20, 6, 64).values()) == 5900
    p = m.make_policy(5, 3, 64, latent_dim=4, family="fo-ppo")
    assert torch.allclose(p["w0"].norm(dim=0), torch.ones(64)) and p["w0"].shape == (9, 64)
    assert torch.allclose(p["w2"].norm(dim=0), torch.full((6,), 0.01)) and "log_std" not in p
    shapes = {k: tuple(v.shape) for k, v in p.items()}
    back = m.unflatten(m.flatten(p, shapes), shapes)
    assert all(torch.equal(back[k], p[k]) for k in p)


# ---------------------------------------------------------------- learning, processes, the command line
def test_11_navigation_is_learned():
    args = m.resolve(m.Args(num_threads=1, seed=1))
    m.set_up(args)
    env = m.make_env(args, 400)
    net, x, mask, _ = m.build(args, env)
    returns = torch.stack([m.meta_update(env, net, x, mask, None, args)[1] for _ in range(15)])  # (15, 2)
    assert returns[-3:, 1].mean() - returns[:3, 1].mean() > 60
    assert (returns[:, 1] > returns[:, 0]).sum() >= 12


def command(*args, processes=1, cwd=ROOT):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    line = [sys.executable, *(launcher if processes > 1 else []), str(ROOT / "maml_rl.py"), *args]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, timeout=300, env=env)


@pytest.mark.parametrize("world", ["--horizon 30 --total-steps 2400",
                                   "--env half_cheetah_vel --horizon 5 --total-steps 400"])
def test_12_two_processes_give_the_result_of_one(world, tmp_path):
    small = f"{world} --num-tasks 4 --num-episodes 5 --hidden 16 --eval-tasks 2 --eval-episodes 2 --e-maml"
    both = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        done = command(*small.split(), "--run-dir", str(folder), processes=processes)
        assert done.returncode == 0, done.stderr
        both.append(torch.load(folder / "checkpoint.pt", weights_only=True))
    one, two = both
    assert one["iteration"] == two["iteration"] == 2
    for k, v in one["params"]["theta"].items():
        assert (v - two["params"]["theta"][k]).abs().max() < 1e-5, k
    assert json.loads((tmp_path / "1/eval.json").read_text()) == pytest.approx(
        json.loads((tmp_path / "2/eval.json").read_text()), rel=1e-4)


@pytest.mark.parametrize("kw", [{}, dict(outer="promp", inner_steps=2), dict(family="fo-ppo", method="maesn"),
                                dict(method="pretrained"), dict(method="maesn", first_order=True)])
def test_train_logs_resumes_and_evaluates(kw, tmp_path, capsys):
    kw = dict(num_tasks=2, num_episodes=3, horizon=6, hidden=8, eval_tasks=2, eval_episodes=3, num_threads=1,
              save_every=1) | kw
    one = m.steps_per_iteration(m.resolve(m.Args(**kw)))
    whole = m.train(m.Args(**kw, total_steps=4 * one, run_dir=str(tmp_path / "a"), eval_every=1))
    m.train(m.Args(**kw, total_steps=2 * one, run_dir=str(tmp_path / "b"), eval_every=0))
    path = str(tmp_path / "b/checkpoint.pt")
    stored = m.load(path)["args"] | dict(resume=path, total_steps=4 * one)
    rest = m.train(m.Args(**stored))
    for group in ("theta", "alpha"):
        assert all(torch.equal(whole[group][k], rest[group][k]) for k in whole[group])
    final = json.loads((tmp_path / "a/eval.json").read_text())
    assert final["global_step"] == 4 * one
    tags = {line.split(",")[1] for line in (tmp_path / "a/metrics.csv").read_text().splitlines()[1:]}
    K = 0 if kw.get("method") == "pretrained" else m.resolve(m.Args(**kw)).inner_steps
    wanted = {"charts/episodic_return", "charts/SPS", "grad/norm_outer", "eval/return_3"}
    wanted |= {"eval/random/return_3"} | {f"adapt/return_{k}" for k in range(K + 1)}
    assert wanted <= tags and f"adapt/return_{K + 1}" not in tags
    printed = capsys.readouterr().out
    m.train(m.Args(**m.load(path)["args"] | dict(evaluate=path)))
    assert capsys.readouterr().out in printed
    assert json.loads((tmp_path / "b/eval.json").read_text()) == final  # that of training, to the digit


def test_evaluation_shrinks_later_steps_and_holds_its_tasks():
    args = small(eval_tasks=4)
    net, x, *_ = m.build(args, m.make_env(args, 1))
    state = torch.get_rng_state()
    returns, tasks, batches = m.evaluate(args, net, x)
    assert torch.equal(torch.get_rng_state(), state) and returns.shape == (4, 4)
    args.seed = 2
    assert torch.equal(m.evaluate(args, net, x)[1], tasks)  # the same goals for every seed
    env = m.make_env(args, 16)
    chain = m.adapt(net, x.expand(4, -1), lambda k, phi: batches[k], 3, args)
    for k, lr in enumerate((0.1, 0.05, 0.05)):
        assert torch.allclose(chain.phis[k + 1], chain.phis[k] - lr * chain.grads[k], atol=1e-6)
    assert env.horizon == 20


def test_the_figure_of_paths(tmp_path):
    pytest.importorskip("matplotlib")
    args = small(eval_tasks=6)
    net, x, *_ = m.build(args, m.make_env(args, 1))
    assert m.capture(args, net, x, tmp_path).read_bytes()[:4] == b"\x89PNG"


def test_the_film_before_and_after(tmp_path):
    args = small(env="half_cheetah_dir", horizon=6, eval_episodes=2)
    net, x, *_ = m.build(args, m.make_env(args, 1))
    env = m.make_env(args, 1)
    env.reset()
    try:
        env.render()
    except RuntimeError as e:
        pytest.skip(str(e))
    film = pytest.importorskip("PIL.Image").open(m.capture(args, net, x, tmp_path))
    assert (film.n_frames, film.size) == (3, (320, 120))


@pytest.mark.parametrize("line", [
    "--inner-steps 0", "--env ipd", "--num-tasks 0", "--num-episodes 0", "--gamma 1.5", "--delta 0",
    "--outer promp --inner-grad dice", "--family fo-ppo --outer trpo", "--action-scale -1",
    "--inner-grad none"])
def test_bad_input_is_one_line_and_exit_code_2(line, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["maml_rl.py", *line.split(), "--run-dir", str(tmp_path / "r")])
    with pytest.raises(SystemExit) as stopped:
        m.train(m.cli(m.Args, m.__doc__))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2 and out == "" and len(err.strip().splitlines()) == 1
    assert not (tmp_path / "r").exists()


def test_a_world_without_tasks_is_refused(monkeypatch, capsys):
    class Bare:
        num_envs = 1

    monkeypatch.setattr(m.envs, "make", lambda *a, **kw: Bare())
    with pytest.raises(SystemExit) as stopped:
        m.make_env(small(), 1)
    assert stopped.value.code == 2 and "without tasks" in capsys.readouterr().err


def test_a_diverged_row_is_counted_and_the_run_goes_on(monkeypatch):
    if not importlib.util.find_spec("mujoco"):
        pytest.skip("needs mujoco")
    args = small(env="half_cheetah_vel", horizon=5)
    env = m.make_env(args, 12)
    net, x, mask, opt = m.build(args, env)
    step = env.step
    def spoil(action):
        action = action.clone()
        action[0] = math.nan
        return step(action)

    env.step = spoil
    logs, returns = m.meta_update(env, net, x, mask, opt, args)
    assert logs["charts/diverged"] == 2  # row 0, in D and in V
    assert returns.isfinite().all() and x.isfinite().all()
