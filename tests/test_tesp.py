"""TESP's equations by hand, by finite differences and against a loop over tasks (tests/oracles/tesp.py)."""

import importlib.util
import math
from dataclasses import replace

import pytest
import torch
from test_house_style import ROOT

import tesp
from envs.goal_robots import TEXTS
from tesp import Args, Batch, Episodes, Net, Play, adapted, keep

spec = importlib.util.spec_from_file_location("oracle_tesp", ROOT / "tests" / "oracles" / "tesp.py")
spec.loader.exec_module(oracle := importlib.util.module_from_spec(spec))
close = torch.testing.assert_close
S, A, U, D = 3, 2, 4, 3  # observation, action, GRU units, embedding
FEATURES = S + 2 * A + 1

# for tests/test_scripts.py: the smallest run, the transitions of one iteration in it, lines that are refused
TINY = dict(env="nav2d", num_tasks=4, num_episodes=3, horizon=5, hidden=8, gru_units=4, latent_dim=2,
            buffer_size=2, eval_tasks=3, num_threads=1, save_every=1)
STEPS = 4 * 3 * 5 * 5
BAD = ["--buffer nonsense", "--env ipd", "--method nonsense", "--num-tasks 0", "--buffer-size 0", "--gamma 2",
       "--inner-steps -1", "--outer-lr -1"]


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small(**kw):
    sizes = dict(env="nav2d", num_tasks=2, num_episodes=3, horizon=6, hidden=5, gru_units=U, latent_dim=D,
                 buffer_size=2, inner_steps=2, num_threads=1)
    return Args(**sizes | kw)


def make_net(adapt_policy=False, scale=0.3):
    """A net with weights far from their small start, phi (P,) and psi (Q,)."""
    torch.manual_seed(0)
    encoder, policy = tesp.make_encoder(FEATURES, U, D), tesp.make_policy(S, A, 5, D)
    net = Net(*({k: tuple(v.shape) for k, v in p.items()} for p in (encoder, policy)), adapt_policy)
    phi, psi = (scale * torch.randn(sum(math.prod(s) for s in shapes.values())) for shapes in net[:2])
    return (net, torch.cat([phi, psi]), psi[:0]) if adapt_policy else (net, phi, psi)


def make_play(M=2, H=5, E=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)
    length = torch.randint(2, H + 1, (M, E), generator=g)
    length[0, 0] = H
    mask = (torch.arange(H)[:, None] < length[:, None]).to(torch.get_default_dtype())
    obs, action, mean = (draw(M, H, E, n) for n in (S, A, A))
    log_std = 0.1 * draw(M, H, E, A)
    return Play(obs, action, mean, log_std, -draw(M, H, E).abs() * mask, mask, torch.zeros(M, E))


# ---------------------------------------------------------------- (3), (4): the encoder
def test_gru_by_hand(double):
    x = torch.ones(1, 2, 2, 1)
    w = torch.tensor([[[1.0, 1.0, 1.0]]]), torch.tensor([[[0.0, 0.0, 1.0]]]), torch.zeros(1, 3)
    h = tesp.gru(*w, x, torch.tensor([[1, 2]]))
    first = 0.3 * math.tanh(1)
    close(h[0, :, 0], torch.tensor([first, 0.7 * first + 0.3 * math.tanh(1 + 0.7 * first)]))
    close(h[0, :, 0], torch.tensor([0.228478, 0.406240]), atol=1e-6, rtol=0)


def test_encoder_equals_the_oracle_on_ragged_episodes_whatever_the_padding():
    net, phi, _ = make_net()
    x, length = torch.randn(3, 4, 9, FEATURES), torch.randint(1, 10, (3, 4))
    phi = phi + 0.2 * torch.randn(3, len(phi))
    p = tesp.unflatten(phi, net.encoder)
    z = tesp.encode(p, Episodes(x, length, None))
    for i in range(3):
        own = {k: v[i] for k, v in p.items()}
        close(z[i], oracle.encode(own, [(0.0, e[:n]) for e, n in zip(x[i], length[i])]))
    padding = torch.arange(9)[:, None] >= length[..., None, None]
    assert torch.equal(z, tesp.encode(p, Episodes(x.masked_fill(padding, 7e3), length, None)))


def test_empty_buffer_gives_zero_and_no_gradient():
    net, phi, _ = make_net()
    phi = phi.expand(2, -1).clone().requires_grad_()
    z = tesp.encode(tesp.unflatten(phi, net.encoder), None)
    assert torch.equal(z, torch.zeros(2, D)) and not z.requires_grad


def test_initial_weights():
    torch.manual_seed(0)
    e, p = tesp.make_encoder(14, 256, 8), tesp.make_policy(9, 2, 256, 8)
    close(e["wh"] @ e["wh"].T, torch.eye(256), atol=1e-5, rtol=0)
    limit = math.sqrt(6 / (14 + 3 * 256))
    assert 0.98 * limit < e["wx"].abs().max() <= limit
    for w, norm in ((e["wp"], 0.01), (p["w0"], 1), (p["w1"], 1), (p["w2"], 0.01)):
        close(w.norm(dim=0), torch.full((w.shape[1],), float(norm)))
    assert sum(v.numel() for v in e.values()) == 210_184 and sum(v.numel() for v in p.values()) == 71_428
    assert all((v == 0).all() for q in (e, p) for k, v in q.items() if k[0] == "b")


@pytest.mark.parametrize("env, size", [("wheeled", 491_796), ("small_ant", 784_464)])
def test_the_papers_sizes(env, size):
    args = Args(**{"env": env} | tesp.preset(Args(env=env, paper=True)))
    assert len(tesp.build(args, tesp.make_env(args, 1))[1]) == size
    assert (args.num_tasks, args.num_episodes, args.horizon, args.buffer_size) == (20, 25, 200, 16)
    assert tesp.preset(Args(env="reacher2", method="maesn"))["latent_coef"] == 0.001


def test_policy_is_an_mlp_on_observation_and_embedding():
    torch.manual_seed(0)
    p, obs, z = tesp.make_policy(S, A, 5, D), torch.randn(2, 12, S), torch.randn(2, D)
    p = {k: torch.randn_like(v) for k, v in p.items()}
    x = torch.cat([obs, z[:, None].expand(-1, 12, -1)], -1)
    x = torch.tanh(torch.tanh(x @ p["w0"] + p["b0"]) @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]
    mean, log_std = tesp.policy(p, obs, z)
    close(mean, x[..., :A])
    close(log_std, x[..., A:])
    stacked = {k: torch.stack([v, 2 * v]) for k, v in p.items()}
    close(tesp.policy(stacked, obs, z)[0][0], mean[0])
    assert not torch.allclose(tesp.policy(stacked, obs, z)[0][1], mean[1])


# ---------------------------------------------------------------- (1): the buffer
def batch_of(returns, lengths):
    x = torch.tensor(returns)[..., None, None] * torch.ones(1, len(returns[0]), 3, 2)
    return Episodes(x, torch.tensor(lengths), torch.tensor(returns))


def test_keep_ranks_by_return_and_moves_everything_along():
    b = keep(None, batch_of([[5.0, 1.0, 4.0]], [[3, 1, 2]]), "best", 3)
    b = keep(b, batch_of([[3.0, 6.0]], [[1, 2]]), "best", 3)
    assert b.ret.tolist() == [[6.0, 5.0, 4.0]] and b.length.tolist() == [[2, 3, 2]]
    assert b.x[0, :, 0, 0].tolist() == [6.0, 5.0, 4.0]
    b = keep(b, batch_of([[5.0]], [[1]]), "best", 2)
    assert b.length.tolist() == [[2, 3]]  # a tie: the older one stays


def test_the_other_buffers():
    old, new = batch_of([[5.0, 1.0, 4.0]], [[3, 1, 2]]), batch_of([[3.0, 6.0, 0.0]], [[1, 2, 3]])
    assert keep(old, new, "last", 2).ret.tolist() == [[3.0, 6.0, 0.0]]
    assert keep(old, new, "all", 2).ret.tolist() == [[5.0, 1.0, 4.0, 3.0, 6.0, 0.0]]


def test_features_are_observation_distribution_and_reward():
    play = make_play()
    e = tesp.episodes(play)
    assert torch.equal(e.length, play.mask.sum(1).long()) and torch.equal(e.ret, play.reward.sum(1))
    n = e.length[1, 0]
    wanted = torch.cat([play.obs, play.mean, play.log_std, play.reward[..., None]], -1)[1, :n, 0]
    assert torch.equal(e.x[1, 0, :n], wanted) and (e.x[1, 0, n:] == 0).all()
    assert wanted.shape[1] == FEATURES


# ---------------------------------------------------------------- (5)-(7), (9): batches and losses
def test_gae_by_hand_stops_at_the_end():
    reward = torch.tensor([[[-1.0], [-2.0], [-3.0], [0.0]]])
    value = torch.tensor([[[0.5], [0.25], [1.0], [9.0]]])
    mask = torch.tensor([[[1.0], [1.0], [1.0], [0.0]]])
    d = [-1 + 0.9 * 0.25 - 0.5, -2 + 0.9 * 1.0 - 0.25, -3 - 1.0]
    a2 = d[2]
    a1 = d[1] + 0.45 * a2
    a0 = d[0] + 0.45 * a1
    close(tesp.gae(reward, value, mask, 0.9, 0.5), torch.tensor([[[a0], [a1], [a2], [0.0]]]))
    whole = tesp.gae(reward, value, torch.ones_like(mask), 0.9, 0.5)
    close(whole[0, -1], torch.tensor([0.0 - 9.0]))  # the time limit is an end too


def test_baseline_solves_the_ridge_regression_of_each_task(double):
    play = make_play(M=2, H=12, E=4)
    ret = tesp.returns_to_go(play.reward, 0.99)
    value = tesp.linear_baseline(11 * play.obs, ret, play.mask)
    for i in range(2):
        x, y = [], []
        for t in range(12):
            for e in range(4):
                if play.mask[i, t, e]:
                    o = (11 * play.obs[i, t, e]).clamp(-10, 10)
                    x.append(torch.cat([o, o**2, torch.tensor([t / 100, (t / 100) ** 2, (t / 100) ** 3, 1])]))
                    y.append(ret[i, t, e])
        x, y = torch.stack(x), torch.stack(y)
        w = torch.linalg.solve(x.T @ x + 1e-5 * torch.eye(x.shape[1]), x.T @ y)
        close(value[i][play.mask[i] > 0], x @ w, atol=1e-7, rtol=1e-7)
    assert (value[play.mask == 0] == 0).all()


def test_process_keeps_the_valid_steps_and_does_not_normalise():
    play, args = make_play(), small()
    batch = tesp.process(play, args)
    counts = play.mask.sum((1, 2))
    assert batch.weight.shape[1] == counts.max()
    close(batch.weight.sum(1), torch.ones(2))
    for i in range(2):
        n = int(counts[i])
        assert (batch.weight[i, :n] == 1 / n).all() and (batch.weight[i, n:] == 0).all()
        assert torch.equal(batch.obs[i, :n], play.obs[i][play.mask[i] > 0])
        assert torch.equal(batch.action[i, :n], play.action[i][play.mask[i] > 0])
    value = tesp.linear_baseline(play.obs, tesp.returns_to_go(play.reward, 0.99), play.mask)
    adv = tesp.gae(play.reward, value, play.mask, 0.99, 0.97)
    assert torch.equal(batch.adv[0, : int(counts[0])], adv[0][play.mask[0] > 0])


def test_log_prob_and_kl_are_those_of_torch():
    mean, log_std, action, other, log_other = torch.randn(5, 7, A)
    p = torch.distributions.Normal(mean, log_std.exp())
    q = torch.distributions.Normal(other, log_other.exp())
    close(tesp.log_prob(mean, log_std, action), p.log_prob(action).sum(-1))
    close(tesp.gaussian_kl(mean, log_std, other, log_other),
          torch.distributions.kl_divergence(p, q).sum(-1), rtol=1e-4, atol=1e-4)


def test_surrogate_is_ppos():
    n = 6
    mean, log_std, action, old_mean = torch.randn(4, 1, n, A)
    old_log, adv = 0.1 * torch.randn(1, n, A), torch.randn(1, n)
    logprob = tesp.log_prob(old_mean, old_log, action)
    rows = Batch(None, action, old_mean, old_log, logprob, adv, torch.full((1, n), 1 / n))
    loss, kl = tesp.surrogate(mean, log_std, rows, 0.15)
    wanted = 0
    for k in range(n):
        ratio = math.exp(tesp.log_prob(mean, log_std, action)[0, k] - logprob[0, k])
        wanted -= min(ratio * adv[0, k], min(max(ratio, 0.85), 1.15) * adv[0, k]) / n
    close(loss, wanted[None])
    close(kl, tesp.gaussian_kl(old_mean, old_log, mean, log_std).mean(1))


# ---------------------------------------------------------------- (2), (8), (10): updates
def test_accumulated_first_order_update(double):
    hessian, c = torch.tensor([[2, 0.5], [0.5, 1]]), torch.tensor([1.0, -1.0])
    phi, alpha, g = torch.zeros(2), torch.full((2,), 0.1), torch.zeros(1, 2)
    for _ in range(3):
        g = g + (adapted(phi, alpha, g) - c) @ hessian
    result = adapted(phi, alpha, g)
    close(result, torch.tensor([[0.373125, -0.155875]]), atol=1e-10, rtol=0)
    d = (result - c) @ hessian  # with g as a constant
    close(d[0], torch.tensor([-0.8316875, 0.5306875]), atol=1e-10, rtol=0)
    close(-(g * d)[0], torch.tensor([-3.10323398, -0.82720914]), atol=1e-8, rtol=0)


def outer_setting(adapt_policy=False, **kw):
    """Everything that outer_gradient() needs, at random, and V as if played by the adapted policy."""
    args = small(adapt_policy=adapt_policy, **kw)
    net, phi, psi = make_net(adapt_policy)
    alpha = torch.full_like(phi, 0.05)
    alpha[::3], alpha[1::3] = 0.3, -0.2  # beyond the bound on both sides
    x, g = torch.cat([phi, alpha, psi]), torch.randn(2, len(phi))
    buffer, batch = tesp.episodes(make_play(seed=5)), tesp.process(make_play(), args)
    with torch.no_grad():
        encoder, actor = net.parts(adapted(phi, alpha, g), psi)
        mean, log_std = tesp.policy(actor, batch.obs, tesp.encode(encoder, buffer))
    logprob = tesp.log_prob(mean, log_std, batch.action)
    return net, x, g, buffer, batch._replace(mean=mean, log_std=log_std, logprob=logprob), args


@pytest.mark.parametrize("adapt_policy", [False, True])
def test_outer_gradient_is_that_of_the_box(adapt_policy, double):
    """dL/dphi = mean of d_i, dL/dalpha = -mean of g_i d_i within the bound and 0 beyond it."""
    net, x, g, buffer, batch, args = outer_setting(adapt_policy, latent_coef=0.5)
    batch = batch._replace(logprob=batch.logprob + 0.2 * torch.randn_like(batch.logprob))  # some ratios clip
    phi, alpha, psi = net.split(x)
    phi_i = adapted(phi, alpha, g).requires_grad_()
    encoder, actor = net.parts(phi_i, psi)
    z = tesp.encode(encoder, buffer)
    loss, kl = tesp.surrogate(*tesp.policy(actor, batch.obs, z), batch, args.clip_coef)
    d = torch.autograd.grad((loss + 0.5 * (z**2).mean(1)).sum(), phi_i)[0]
    P, inside = len(phi), alpha.abs() < 0.1
    *values, gradient = tesp.outer_gradient(net, x, g, buffer, batch, args)
    close(values, [loss.mean(), kl.mean()])
    close(gradient[:P], d.mean(0))
    close(gradient[P : 2 * P], -(g * d).mean(0) * inside)
    assert gradient[P : 2 * P][inside].abs().max() > 0
    for off in (replace(args, learn_alpha=False), replace(args, method="maml")):
        frozen = tesp.outer_gradient(net, x, g, buffer, batch, off)[-1]
        assert (frozen[P : 2 * P] == 0).all() and torch.equal(frozen[:P], gradient[:P])


def test_the_first_evaluation_of_ppo():
    *setting, batch, args = outer_setting()
    loss, kl, _ = tesp.outer_gradient(*setting, batch, args)
    close(loss, -(batch.weight * batch.adv).sum(1).mean())  # all ratios are 1
    assert kl.abs() < 1e-6


def scripted(plays):
    """A play() for adapt() that hands out stored plays."""
    left = iter(plays)
    return lambda actor, z: next(left)


def test_inner_gradient_equals_central_differences(double):
    args = small(inner_steps=1)
    net, phi, psi = make_net()
    plays = [make_play(seed=s) for s in range(3)]
    x = torch.cat([phi, torch.zeros_like(phi), psi])
    g = tesp.adapt(net, x, 2, scripted(plays), args)[0]
    buffer = keep(None, tesp.episodes(plays[0]), "best", args.buffer_size)
    batch = tesp.process(plays[1], args)

    def loss(phi):
        encoder, actor = net.parts(phi.expand(2, -1), psi)
        return tesp.inner_loss(*tesp.policy(actor, batch.obs, tesp.encode(encoder, buffer)), batch)

    for j in torch.randperm(len(phi))[:40].tolist():
        step = torch.zeros_like(phi)
        step[j] = 1e-5
        close(g[:, j], (loss(phi + step) - loss(phi - step)) / 2e-5, atol=1e-6, rtol=1e-6)
    assert g.abs().max() > 1e-2


def test_inner_gradients_are_clipped_to_norm_60(double):
    args = small(inner_steps=1, horizon=12)
    net, phi, psi = make_net()
    plays = [make_play(H=12, E=4, seed=s) for s in range(3)]
    x = torch.cat([phi, torch.zeros_like(phi), psi])
    free = tesp.adapt(net, x, 2, scripted(plays), args)[0]
    plays[1] = plays[1]._replace(reward=1e6 * plays[1].reward)
    clipped = tesp.adapt(net, x, 2, scripted(plays), args)[0]
    close(clipped.norm(dim=1), torch.full((2,), 60.0))
    close(clipped / 60, free / free.norm(dim=1, keepdim=True), atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------- (8), (11): an iteration
def one_iteration(**kw):
    args = small(**kw)
    torch.manual_seed(args.seed)
    env = tesp.make_env(args, args.num_tasks * args.num_episodes)
    net, x, optimizer = tesp.build(args, env)
    before = x.clone()
    logs, returns = tesp.meta_update(env, net, x, optimizer, args)
    return before, x, logs, returns


@pytest.mark.parametrize("kw", [dict(outer_lr=10.0), dict(outer_lr=1e-3, delta=1e-6)])
def test_iterates_too_far_away_are_given_back_bit_by_bit(kw):
    before, after, logs, _ = one_iteration(epochs=6, **kw)
    assert torch.equal(before, after) and logs["losses/iterate"] == 0


def test_the_best_iterate_is_kept():
    before, after, logs, _ = one_iteration(outer_lr=1e-4, epochs=6)
    assert logs["losses/iterate"] == 5 and 0 < logs["losses/kl"] < 0.01 and not torch.equal(before, after)
    assert (after - before).abs().max() < 5 * 1.5e-4  # five steps of Adam for six evaluations


def test_an_iteration_equals_that_of_the_oracle():
    """All of it, env included: the order of gradients and buffer, eqs. (1)-(11)."""
    args = small(env="wheeled", num_tasks=3, horizon=12, inner_lr=0.05, outer_lr=1e-3, epochs=5, hidden=8)
    torch.manual_seed(1)
    env = tesp.make_env(args, 9)
    net, x, optimizer = tesp.build(args, env)

    def named(x):
        phi, alpha, psi = net.split(x)
        shapes = (net.encoder, net.encoder, net.policy)
        return [tesp.unflatten(part, shape) for part, shape in zip((phi, alpha, psi), shapes)]

    twin = [{k: v.clone().requires_grad_() for k, v in p.items()} for p in named(x)]
    with torch.random.fork_rng():
        goals = env.sample_tasks(3)
        noise = [torch.randn(3, 12, 3, 2) for _ in range(4)]
    before = x.clone()
    _, returns = tesp.meta_update(env, net, x, optimizer, args)
    robots = oracle.SerialWheeled(3, 12, TEXTS["wheeled"]())
    theirs = oracle.meta_update(robots, *twin, goals, lambda task, phase: noise[phase][task], args)
    close(returns, torch.tensor(theirs).float(), atol=1e-5, rtol=1e-5)
    assert (x - before).abs().max() > 3e-3
    for mine, p in zip(named(x), twin):
        for k in p:
            close(mine[k], p[k].detach(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["maml", "meta-sgd", "maesn"])
def test_what_the_fast_updates_of_a_baseline_move(method):
    args = small(method=method)
    torch.manual_seed(0)
    env = tesp.make_env(args, 6)
    net, x, optimizer = tesp.build(args, env)
    phi, alpha, psi = net.split(x.clone())
    assert len(phi) == (D if method == "maesn" else tesp.size(net.policy))
    assert len(psi) == (tesp.size(net.policy) if method == "maesn" else 0)
    _, returns = tesp.meta_update(env, net, x, optimizer, args)
    after = net.split(x)
    assert len(returns) == 3  # D_0, D_1, V: no warm-up
    assert not torch.equal(after[0], phi) and torch.equal(after[1], alpha) == (method == "maml")


@pytest.mark.parametrize("method", ["tesp", "maml", "meta-sgd", "maesn"])
def test_all_methods_meet_the_same_goals(method, monkeypatch):
    args, seen = small(method=method, eval_tasks=5, seed=7), []
    net, x, _ = tesp.build(args, tesp.make_env(args, 1))
    play = tesp.rollout
    monkeypatch.setattr(tesp, "rollout", lambda env, p, z, goals, noise: (seen.append(goals), play(
        env, p, z, goals, noise))[1])
    tesp.evaluate_all(args, net, x, ["test"])
    torch.manual_seed(tesp.TEST_SEED)
    wanted = tesp.make_env(args, 1).sample_tasks(5, "test")
    assert len(seen) == len(tesp.phases(args)) and all(torch.equal(goals, wanted) for goals in seen)


@pytest.mark.parametrize("kw", [dict(inner_steps=0), dict(buffer="last"), dict(buffer="all"),
                                dict(adapt_policy=True), dict(learn_alpha=False), dict(epochs=1)])
def test_variants_run(kw):
    args = dict(inner_steps=1) | kw
    before, after, logs, returns = one_iteration(**args)
    assert all(math.isfinite(v) for v in logs.values()) and len(returns) == args["inner_steps"] + 2
    assert torch.equal(before, after) == (args.get("epochs") == 1)


def test_rollout_plays_one_masked_episode_a_row():
    args = small(horizon=30)
    env = tesp.make_env(args, 2 * 3)
    p = {k: torch.zeros_like(v) for k, v in tesp.make_policy(2, 2, 5, D).items()}
    p["b2"] = torch.tensor([0.05, 0.0, -9.0, -9.0])  # mean and log std: 0.05 to the right at every step
    goals = torch.tensor([[0.3, 0.0], [0.0, 0.4]])
    play = tesp.rollout(env, p, torch.zeros(2, D), goals, torch.zeros(2, 30, 3, 2))
    assert play.mask[0].sum(0).tolist() == [6, 6, 6] and play.mask[1].sum(0).tolist() == [30, 30, 30]
    close(play.reward[0, :6, 0], -torch.tensor([0.25, 0.2, 0.15, 0.1, 0.05, 0.0]), atol=1e-6, rtol=0)
    assert (play.reward[0, 6:] == 0).all() and play.arrived.tolist() == [[1, 1, 1], [0, 0, 0]]
