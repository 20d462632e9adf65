"""TESP's equations against hand-computed numbers, step-by-step loops, autograd and finite differences."""

import importlib.util
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_house_style import ROOT

import tesp
from envs.goal_robots import TEXTS
from tesp import Args, Batch, Episodes, Net, Play, adapted, keep

close = torch.testing.assert_close
S, A, U, D = 3, 2, 4, 3  # observation, action, GRU units, embedding
FEATURES = S + 2 * A + 1

# for tests/test_scripts.py: the smallest run, the transitions of one iteration in it, lines that are refused
TINY = dict(env="nav2d", num_tasks=4, num_episodes=3, horizon=5, hidden=8, gru_units=4, latent_dim=2,
            buffer_size=2, eval_tasks=3, num_threads=1, save_every=1)
STEPS = 4 * 3 * 5 * 5
BAD = ["--buffer nonsense", "--env ipd", "--env ant_goal", "--num-tasks 0", "--buffer-size 0", "--gamma 2",
       "--inner-steps -1", "--outer-lr -1"]


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small(**kw):
    sizes = dict(env="nav2d", num_tasks=2, num_episodes=3, horizon=6, hidden=5, gru_units=U, latent_dim=D,
                 buffer_size=2, inner_steps=2, num_threads=1)
    return tesp.resolve(Args(**sizes | kw))


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


def loop_encode(p, x, length):
    """z of one task, step by step in numpy: p {name: array}, x (L, H, F)."""
    hs = lambda v: np.clip(0.2 * v + 0.5, 0, 1)
    e = []
    for episode, n in zip(x, length):
        h = np.zeros(len(p["wh"]))
        for t in range(n):
            i, U = episode[t] @ p["wx"] + p["b"], len(h)
            z = hs(i[:U] + h @ p["wh"][:, :U])
            r = hs(i[U : 2 * U] + h @ p["wh"][:, U : 2 * U])
            n_ = np.tanh(i[2 * U :] + (r * h) @ p["wh"][:, 2 * U :])
            h = z * h + (1 - z) * n_
        e.append(h @ p["wp"] + p["bp"])
    return np.mean(e, 0)


# ---------------------------------------------------------------- (3)-(5): the encoder


def test_gru_by_hand(double):
    x = torch.ones(1, 2, 2, 1)
    w = torch.tensor([[[1.0, 1.0, 1.0]]]), torch.tensor([[[0.0, 0.0, 1.0]]]), torch.zeros(1, 3)
    h = tesp.GRU.apply(*w, pack(x, torch.tensor([[1, 2]])))
    first = 0.3 * math.tanh(1)
    second = 0.7 * first + 0.3 * math.tanh(1 + 0.7 * first)
    close(h[0, :, 0], torch.tensor([second, first]))  # the longer episode comes first
    close(h[0, :, 0], torch.tensor([0.406240, 0.228478]), atol=1e-6, rtol=0)


def test_encoder_equals_a_loop_on_ragged_episodes_whatever_the_padding():
    net, phi, _ = make_net()
    x, length = torch.randn(3, 4, 9, FEATURES), torch.randint(1, 10, (3, 4))
    x[0, 0, 3:], length[0, 0] = math.nan, 3  # padding
    phi = phi + 0.2 * torch.randn(3, len(phi))
    p = tesp.unflatten(phi, net.encoder)
    z = tesp.encode(p, pack(torch.nan_to_num(x, 7e3), length))
    for i in range(3):
        own = {k: v[i].double().numpy() for k, v in p.items()}
        wanted = torch.tensor(loop_encode(own, x[i].double().numpy(), length[i]))
        close(z[i].double(), wanted, atol=1e-6, rtol=0)
    assert torch.equal(z, tesp.encode(p, pack(torch.nan_to_num(x, -5.0), length)))


def plain_gru(wx, wh, b, x, length):
    """The same cell for autograd, states (M, L, U) in the order of the episodes."""
    U, h = wh.shape[1], x.new_zeros(*length.shape, wh.shape[1])
    for t in range(x.shape[2]):
        i = x[:, :, t] @ wx + b[:, None]
        z, r = (0.2 * (i[..., : 2 * U] + h @ wh[..., : 2 * U]) + 0.5).clamp(0, 1).chunk(2, -1)
        n = torch.tanh(i[..., 2 * U :] + (r * h) @ wh[..., 2 * U :])
        h = torch.where((t < length)[..., None], z * h + (1 - z) * n, h)
    return h


def test_gru_backward_equals_autograd(double):
    torch.manual_seed(3)
    M, L, H, F = 3, 4, 9, 5
    w = [torch.randn(M, F, 3 * U), torch.randn(M, U, 3 * U), torch.randn(M, 3 * U)]
    w = [v.requires_grad_() for v in w]
    x, length = torch.randn(M, L, H, F), torch.randint(1, H + 1, (M, L))
    order = length.sort(1, descending=True)[1]
    mine = tesp.GRU.apply(*w, pack(x, length))
    theirs = plain_gru(*w, x, length).gather(1, order[..., None].expand(-1, -1, U))
    close(mine, theirs, atol=1e-12, rtol=0)
    v = torch.randn_like(mine)
    for a, b in zip(torch.autograd.grad(mine, w, v), torch.autograd.grad(theirs, w, v)):
        assert b.abs().max() > 0.1
        close(a, b, atol=1e-12, rtol=1e-12)


def test_empty_buffer_gives_zero_and_no_gradient():
    net, phi, _ = make_net()
    phi = phi.expand(2, -1).clone().requires_grad_()
    z = tesp.encode(tesp.unflatten(phi, net.encoder), None)
    assert torch.equal(z, torch.zeros(2, D)) and not z.requires_grad


def test_an_episode_repeated_counts_once():
    net, phi, _ = make_net()
    p = tesp.unflatten(phi[None], net.encoder)
    x, length = torch.randn(1, 1, 6, FEATURES), torch.tensor([[4]])
    close(tesp.encode(p, pack(x, length)), tesp.encode(p, pack(x.repeat(1, 5, 1, 1), length.repeat(1, 5))))


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
    args = tesp.resolve(Args(env=env, paper=True))
    assert len(tesp.build(args, tesp.make_env(args, 1))[1]) == size
    assert (args.num_tasks, args.num_episodes, args.horizon, args.buffer_size) == (20, 25, 200, 16)
    assert tesp.steps_per_iteration(args) == 500_000


def test_policy_is_an_mlp_on_observation_and_embedding():
    torch.manual_seed(0)
    p, obs, z = tesp.make_policy(S, A, 5, D), torch.randn(2, 3, 4, S), torch.randn(2, D)
    p = {k: torch.randn_like(v) for k, v in p.items()}
    x = torch.cat([obs, z[:, None, None].expand(-1, 3, 4, -1)], -1)
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


# ---------------------------------------------------------------- (6)-(8): batches


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


# ---------------------------------------------------------------- (2), (9), (11): updates


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
    x = torch.cat([phi, alpha, psi])
    g = torch.randn(2, len(phi))
    e = tesp.episodes(make_play(seed=5))
    packed, batch = pack(e.x, e.length), tesp.process(make_play(), args)
    with torch.no_grad():
        p, own = net.parts(adapted(phi, alpha, g), psi)
        mean, log_std = tesp.policy(tesp.unflatten(own, net.policy), batch.obs, tesp.encode(p, packed))
        batch = batch._replace(mean=mean, log_std=log_std, logprob=tesp.log_prob(mean, log_std, batch.action))
    return net, x, g, packed, batch, args


@pytest.mark.parametrize("adapt_policy", [False, True])
def test_outer_gradient_is_that_of_autograd(adapt_policy, double):
    net, x, g, packed, batch, args = outer_setting(adapt_policy, latent_coef=0.5)
    batch = batch._replace(logprob=batch.logprob + 0.2 * torch.randn_like(batch.logprob))  # some ratios clip
    leaf = x.clone().requires_grad_()
    phi, alpha, psi = net.split(leaf)
    p, own = net.parts(adapted(phi, alpha, g), psi)
    z = tesp.encode(p, packed)
    distribution = tesp.policy(tesp.unflatten(own, net.policy), batch.obs, z)
    loss, _ = tesp.surrogate(*distribution, batch, args.clip_coef)
    wanted = torch.autograd.grad((loss + 0.5 * (z**2).mean(1)).mean(), leaf)[0]
    *_, gradient = tesp.outer_gradient(net, x, g, packed, batch, args)
    close(gradient, wanted, atol=1e-12, rtol=1e-9)
    P = len(phi)
    by_alpha = gradient[P : 2 * P]
    assert by_alpha[::3].abs().max() == by_alpha[1::3].abs().max() == 0 < by_alpha[2::3].abs().max()
    frozen = tesp.outer_gradient(net, x, g, packed, batch, replace(args, learn_alpha=False))[-1]
    assert (frozen[P : 2 * P] == 0).all() and torch.equal(frozen[:P], gradient[:P])


def test_step_sizes_beyond_the_bound_act_as_the_bound():
    phi, g = torch.zeros(4), torch.ones(1, 4)
    close(adapted(phi, torch.tensor([0.05, 0.1, 7.0, -7.0]), g), torch.tensor([[-0.05, -0.1, -0.1, 0.1]]))


def test_the_first_evaluation_of_ppo():
    net, x, g, packed, batch, args = outer_setting()
    loss, kl, size, _ = tesp.outer_gradient(net, x, g, packed, batch, args)
    close(loss, -(batch.weight * batch.adv).sum(1).mean())  # all ratios are 1
    assert kl.abs() < 1e-6
    p, _ = net.parts(adapted(*net.split(x)[:2], g), net.split(x)[2])
    close(size, (tesp.encode(p, packed) ** 2).mean())


@pytest.mark.parametrize("adapt_policy", [False, True])
def test_groups_of_tasks_change_nothing(adapt_policy, monkeypatch):
    net, x, g, packed, batch, args = outer_setting(adapt_policy)
    whole = tesp.outer_gradient(net, x, g, packed, batch, args)
    monkeypatch.setattr(tesp, "ROWS", 1)  # one task at a time
    single = tesp.outer_gradient(net, x, g, packed, batch, args)
    for a, b in zip(whole, single):
        close(a, b, atol=1e-5, rtol=1e-4)
    for a, b in zip(whole[:3], tesp.outer_gradient(net, x, g, packed, batch, args, wanted=False)):
        close(a, b, atol=1e-6, rtol=1e-5)


def scripted(plays):
    """A play() for adapt() that hands out stored plays, and a list of the embeddings it was asked for."""
    asked = []

    def play(phase, p, z):
        asked.append(z.clone())
        return plays[phase]

    return play, asked


@pytest.mark.parametrize("adapt_policy", [False, True])
def test_adapt_is_the_algorithm_box(adapt_policy, double):
    """Against a loop over tasks that follows the box word by word, with autograd for every gradient."""
    args = small(adapt_policy=adapt_policy)
    net, phi, psi = make_net(adapt_policy)
    alpha = 0.05 * torch.randn(len(phi))
    plays = [make_play(seed=s) for s in range(4)]  # W, D_0, D_1, V
    play, asked = scripted(plays)
    out = tesp.adapt(net, torch.cat([phi, alpha, psi]), 2, play, args)
    for i in range(2):
        one = [Play(*(v[i : i + 1] for v in p)) for p in plays]
        g, buffer = torch.zeros(len(phi)), []

        def remember(e, buffer=buffer):
            buffer += list(zip(e.ret[0].tolist(), e.x[0], e.length[0]))
            buffer.sort(key=lambda item: -item[0])
            del buffer[args.buffer_size :]

        def embedding(weights, buffer=buffer):
            p, own = net.parts(weights[None], psi)
            x, length = torch.stack([b[1] for b in buffer])[None], torch.stack([b[2] for b in buffer])[None]
            last = plain_gru(p["wx"], p["wh"], p["b"], x, length)
            return (last @ p["wp"] + p["bp"]).mean(1), own

        assert (asked[0][i] == 0).all()
        remember(tesp.episodes(one[0]))
        for k in range(2):
            weights = adapted(phi, alpha, g).requires_grad_()
            z, own = embedding(weights)
            close(asked[k + 1][i], z[0].detach())
            b = tesp.process(one[k + 1], args)
            n = int(one[k + 1].mask.sum())
            mean, log_std = tesp.policy(tesp.unflatten(own, net.policy), b.obs, z)
            loss = -(tesp.log_prob(mean, log_std, b.action) * b.adv).sum() / n
            gk = torch.autograd.grad(loss, weights)[0]
            g = g + gk * min(1, 60 / gk.norm().item())
            remember(tesp.episodes(one[k + 1]))  # only now
        close(out.g[i], g, atol=1e-10, rtol=1e-8)
        z, _ = embedding(adapted(phi, alpha, g))
        close(asked[3][i], z[0])
        close(out.z[i], z[0])  # V was not added to the buffer
    assert len(out.plays) == 4 and len(out.batches) == 3


def test_inner_gradient_equals_central_differences(double):
    args = small(inner_steps=1)
    net, phi, psi = make_net()
    plays = [make_play(seed=s) for s in range(3)]
    x = torch.cat([phi, torch.zeros_like(phi), psi])
    g = tesp.adapt(net, x, 2, scripted(plays)[0], args).g
    e = keep(None, tesp.episodes(plays[0]), "best", args.buffer_size)
    batch = tesp.process(plays[1], args)

    def loss(phi):
        z = tesp.encode(tesp.unflatten(phi.expand(2, -1), net.encoder), pack(e.x, e.length))
        return tesp.inner_loss(*tesp.policy(tesp.unflatten(psi, net.policy), batch.obs, z), batch)

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
    free = tesp.adapt(net, x, 2, scripted(plays)[0], args).g
    plays[1] = plays[1]._replace(reward=1e6 * plays[1].reward)
    clipped = tesp.adapt(net, x, 2, scripted(plays)[0], args).g
    close(clipped.norm(dim=1), torch.full((2,), 60.0))
    close(clipped / 60, free / free.norm(dim=1, keepdim=True), atol=1e-6, rtol=1e-6)


# ---------------------------------------------------------------- (12): the outer step


def one_iteration(**kw):
    args = small(**kw)
    tesp.set_up(args)
    env = tesp.make_env(args, args.num_tasks * args.num_episodes)
    net, x, optimizer = tesp.build(args, env)
    before = x.clone()
    logs, returns = tesp.meta_update(env, net, x, optimizer, 0, args)
    return before, x, logs, returns


@pytest.mark.parametrize("kw", [dict(outer_lr=10.0), dict(outer_lr=1e-3, delta=1e-6)])
def test_iterates_too_far_away_are_given_back_bit_by_bit(kw):
    before, after, logs, _ = one_iteration(epochs=6, **kw)
    assert torch.equal(before, after) and logs["losses/iterate"] == 0


def test_the_best_iterate_is_kept():
    before, after, logs, returns = one_iteration(outer_lr=1e-4, epochs=6)
    assert logs["losses/iterate"] == 5 and 0 < logs["losses/kl"] < 0.01 and not torch.equal(before, after)
    assert (after - before).abs().max() < 5 * 1.5e-4  # five steps of Adam for six evaluations
    assert len(returns) == 4  # W, D_0, D_1, V


def test_an_iteration_equals_that_of_the_naive_twin():
    """All of it, worlds included, against a loop over tasks with autograd through everything."""
    spec = importlib.util.spec_from_file_location("naive_tesp", ROOT / "benchmark" / "naive_tesp.py")
    spec.loader.exec_module(naive := importlib.util.module_from_spec(spec))
    args = small(env="wheeled", num_tasks=3, horizon=12, inner_lr=0.05, outer_lr=1e-3, epochs=5, hidden=8)
    tesp.set_up(args)
    env = tesp.make_env(args, 9)
    net, x, optimizer = tesp.build(args, env)
    twin = [{k: v.clone().requires_grad_() for k, v in p.items()} for p in tesp.named(net, x).values()]
    state = torch.get_rng_state()
    goals = env.sample_tasks(3)
    torch.set_rng_state(state)
    before = x.clone()
    _, returns = tesp.meta_update(env, net, x, optimizer, 0, args)

    def noise(task, phase):
        return tesp.keyed_noise((args.seed, 0, 0), [task], phase, 12, 3, 2)[0]

    theirs = naive.meta_update(naive.SerialWheeled(3, 12, TEXTS["wheeled"]()), *twin, goals, noise, args)
    close(returns, torch.tensor(theirs).float(), atol=1e-5, rtol=1e-5)
    assert (x - before).abs().max() > 3e-3
    for mine, p in zip(tesp.named(net, x).values(), twin):
        for k in p:
            close(mine[k], p[k].detach(), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kw", [dict(inner_steps=0), dict(buffer="last"), dict(buffer="all"),
                                dict(adapt_policy=True), dict(learn_alpha=False), dict(epochs=1)])
def test_variants_run(kw):
    args = dict(inner_steps=1) | kw
    before, after, logs, returns = one_iteration(**args)
    assert all(math.isfinite(v) for v in logs.values()) and len(returns) == args["inner_steps"] + 2
    assert torch.equal(before, after) == (args.get("epochs") == 1)


def test_noise_depends_on_the_key_alone():
    draw = lambda key, tasks, phase: tesp.keyed_noise(key, tasks, phase, 3, 2)
    both = draw((1, 0, 5), range(4), 2)
    assert torch.equal(both[2:], draw((1, 0, 5), range(2, 4), 2))
    assert len({tuple(x.flatten().tolist()) for x in both}) == 4
    for other in (draw((2, 0, 5), range(4), 2), draw((1, 1, 5), range(4), 2), draw((1, 0, 6), range(4), 2),
                  draw((1, 0, 5), range(4), 3)):
        assert not torch.isclose(both, other).any()


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
    noise = torch.full((2, 30, 3, 2), 0.5)
    seen = tesp.rollout(env, p, torch.zeros(2, D), goals, torch.zeros(2, 30, 3, 2), noise)
    close(seen.obs[1], play.obs[1] + 0.5)


def test_through_policy_gives_what_it_is_asked_for():
    net, x, g, packed, batch, args = outer_setting()
    psi, z = net.split(x)[2], torch.randn(2, D)
    values, d_z, d_psi = through_policy(net.policy, psi, z, batch, tesp.inner_loss, (True, False))
    assert values.shape == (1, 2) and d_z.abs().max() > 0 and (d_psi == 0).all()


def test_table_and_summary():
    args = small()
    results = {"test": [torch.tensor([[-3.0, -2.0, -1.0, -0.5], [-5.0, -4.0, -1.0, -0.5]])] * 3}
    flat = tesp.summary(results)
    assert flat["eval/test/return_warmup"] == -4 and flat["eval/test/return_2"] == -0.5
    close(flat["eval/test/return_warmup_ci95"], 1.96 * math.sqrt(2) / math.sqrt(2))
    assert "warm-up" in tesp.table(results, args) and "D', held out" in tesp.table(results, args)


# ---------------------------------------------------------------- the authors' sampler
def sampler(lengths, size):
    """{(row, round)} that are kept: a plain clock. lengths[e]: those of row e's episodes, in turn."""
    kept, total, clock = set(), 0, [(lengths[e][0], e, 0) for e in range(len(lengths))]
    while total < size:
        end, e, r = min(clock, key=lambda x: (x[0], x[2], x[1]))
        kept.add((e, r))
        total += lengths[e][r]
        clock[e] = (end + lengths[e][r + 1], e, r + 1)
    return kept


def test_restarted_keeps_what_a_clock_keeps():
    torch.manual_seed(0)
    M, H, E = 3, 10, 4
    for _ in range(30):
        lengths = torch.randint(1, H + 1, (M, 60, E))  # of the rows' first, second, ... episodes
        lengths[:, 0] = 7  # at first all end at once
        plays, out = [], None
        while out is None:
            mask = (torch.arange(H)[:, None] < lengths[:, len(plays), None]).float()
            x = torch.randn(M, H, E, 2)
            plays.append(Play(x, x, x, x, torch.randn(M, H, E) * mask, mask, torch.ones(M, E)))
            out = tesp.restarted(plays, H * E)
        kept = out.mask[:, 0].unflatten(1, (len(plays), E))
        for i in range(M):
            rows = lengths[i].T.tolist()
            assert {(e, r) for r, e in kept[i].nonzero().tolist()} == sampler(rows, H * E)
        assert (out.mask.sum((1, 2)) >= H * E).all() and torch.equal(out.reward * out.mask, out.reward)
        close(tesp.episode_mean(out.reward.sum(1), out), out.reward.sum((1, 2)) / kept.sum((1, 2)))
        best = tesp.keep(None, tesp.episodes(out), "best", 3)
        assert best.length.min() >= 1 and best.ret.isfinite().all()


def test_restart_changes_nothing_where_no_episode_ends_early():
    def trained(**kw):
        args = small(**kw)
        torch.manual_seed(0)
        env = tesp.make_env(args, args.num_tasks * args.num_episodes)
        net, x, optimizer = tesp.build(args, env)
        tesp.meta_update(env, net, x, optimizer, 0, args)
        return x.detach()

    assert torch.equal(trained(), trained(restart=True))
    with pytest.raises(SystemExit):
        small(restart=True, buffer="all")
