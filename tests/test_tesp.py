"""TESP's equations by hand, by finite differences and against a loop over tasks (tests/oracles/tesp.py)."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from oracles import tesp as oracle

import tesp
from tesp import Args, Episodes, Net, Play, adapted, keep

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


def told(play, task):
    """The episodes of one task as the oracle has them."""
    out, names = [], ("obs", "action", "mean", "log_std", "reward")
    for e, n in enumerate(play.mask[task].sum(0).int()):
        episode = {k: getattr(play, k)[task, :n, e] for k in names}
        logprob = tesp.log_prob(episode["mean"], episode["log_std"], episode["action"])
        out.append(episode | {"logprob": logprob})
    return out


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
    empty = tesp.encode({k: v.requires_grad_() for k, v in p.items()}, None)
    assert torch.equal(empty, torch.zeros(3, D)) and not empty.requires_grad


def test_initial_weights():
    torch.manual_seed(0)
    e, p = tesp.make_encoder(14, 256, 8), tesp.make_policy(9, 2, 256, 8)
    close(e["wh"] @ e["wh"].T, torch.eye(256), atol=1e-5, rtol=0)
    limit = math.sqrt(6 / (14 + 3 * 256))
    assert 0.98 * limit < e["wx"].abs().max() <= limit
    for w, norm in ((e["wp"], 0.01), (p["w0"], 1), (p["w1"], 1), (p["w2"], 0.01)):
        close(w.norm(dim=0), torch.full((w.shape[1],), float(norm)))
    assert all((v == 0).all() for q in (e, p) for k, v in q.items() if k[0] == "b")


@pytest.mark.parametrize("env, size", [("wheeled", 491_796), ("small_ant", 784_464)])
def test_the_papers_sizes(env, size):
    args = Args(**{"env": env} | tesp.preset(Args(env=env, paper=True)))
    assert len(tesp.build(args, tesp.make_env(args, 1))[1]) == size
    assert (args.num_tasks, args.num_episodes, args.horizon, args.buffer_size) == (20, 25, 200, 16)
    assert tesp.preset(Args(env="reacher2", method="maesn"))["latent_coef"] == 0.001


# ---------------------------------------------------------------- (1), (5), (6): buffers and batches
def test_buffers_are_those_of_the_oracle():  # eq. (1): ranks, features, order and lengths
    plays = [make_play(seed=s) for s in range(3)]
    buffer, theirs = None, [[], []]
    for play in plays:
        buffer = keep(buffer, tesp.episodes(play), "best", 3)
        theirs = [oracle.add(theirs[i], told(play, i), 3) for i in range(2)]
    for i, k in itertools.product(range(2), range(3)):
        ret, x = theirs[i][k]
        n = buffer.length[i, k]
        assert n == len(x) and torch.equal(buffer.x[i, k, :n], x) and (buffer.x[i, k, n:] == 0).all()
        close(buffer.ret[i, k].item(), ret)
    twins = tesp.episodes(plays[1]._replace(reward=plays[0].reward, mask=plays[0].mask))
    old, new = tesp.episodes(plays[0]), tesp.episodes(plays[1])
    best = [keep(None, old, "best", 2), keep(old, twins, "best", 2)]
    assert torch.equal(best[0].x[:, 0], best[1].x[:, 0])  # a tie: the older one stays
    assert torch.equal(keep(old, new, "last", 1).x, new.x)
    assert torch.equal(keep(old, new, "all", 1).x, torch.cat([old.x, new.x], 1))


def test_batches_are_those_of_the_oracle(double):  # eqs. (5) and (6), not normalised
    play, args = make_play(H=12, E=4), small()
    play = play._replace(obs=11 * play.obs)  # beyond the bound of the baseline's features
    batch = tesp.process(play, args)
    for i, valid in enumerate(play.mask > 0):  # (H, E)
        wanted, n = oracle.process(told(play, i), args), valid.sum()
        rows = (valid.flatten().cumsum(0) - 1).view_as(valid)  # ours go by time, theirs by episode
        for name, x in wanted.items():
            if name != "reward":
                close(getattr(batch, name)[i, rows.T[valid.T]], x, atol=1e-5, rtol=1e-5)
        assert (batch.weight[i, :n] == 1 / n).all() and (batch.weight[i, n:] == 0).all()
    assert batch.weight.shape[1] == play.mask.sum((1, 2)).max()


# ---------------------------------------------------------------- (2), (8), (10): updates
def test_accumulated_first_order_update(double):
    hessian, c = torch.tensor([[2, 0.5], [0.5, 1]]), torch.tensor([1.0, -1.0])
    phi, alpha, g = torch.zeros(2), torch.full((2,), 0.1), torch.zeros(1, 2)
    for _ in range(3):
        g = g + (adapted(phi, alpha, g) - c) @ hessian
    close(adapted(phi, alpha, g), torch.tensor([[0.373125, -0.155875]]), atol=1e-10, rtol=0)


@pytest.mark.parametrize("adapt_policy", [False, True])
def test_outer_gradient_is_that_of_the_oracle(adapt_policy, double):  # eqs. (2), (3), (9), (10)
    args = small(adapt_policy=adapt_policy, latent_coef=0.5)
    net, phi, psi = make_net(adapt_policy)
    alpha = torch.full_like(phi, 0.05)
    alpha[::3], alpha[1::3] = 0.3, -0.2  # beyond the bound on both sides
    x, g = torch.cat([phi, alpha, psi]).requires_grad_(), torch.randn(2, len(phi))
    played = make_play(seed=5)
    batch, buffer = tesp.process(make_play(), args), tesp.episodes(played)
    with torch.no_grad():  # V as if a policy close to the adapted one had played it: some ratios are clipped
        encoder, actor = net.parts(adapted(phi, alpha, g), psi)
        mean, log_std = tesp.policy(actor, batch.obs, tesp.encode(encoder, buffer))
        mean, log_std = mean + 0.1 * torch.randn_like(mean), log_std + 0.1 * torch.randn_like(mean)
    logprob = tesp.log_prob(mean, log_std, batch.action)
    batch = batch._replace(mean=mean, log_std=log_std, logprob=logprob)

    phi, alpha, psi = net.split(x)
    shapes, out = net.encoder | (net.policy if adapt_policy else {}), []  # shapes: what fast updates move
    for i, n in enumerate((batch.weight > 0).sum(1)):
        own, steps, moved = (tesp.unflatten(flat, shapes) for flat in (phi, alpha, g[i]))
        actor = oracle.adapted(own, steps, moved) if adapt_policy else tesp.unflatten(psi, net.policy)
        rows = {k: v[i, :n] for k, v in batch._asdict().items()}
        out.append(oracle.task_loss(own, steps, actor, moved, oracle.add([], told(played, i), 9), rows, args))
    loss, kl, square = (sum(column) / 2 for column in zip(*out))
    wanted = torch.autograd.grad(loss + 0.5 * square, x)[0]
    *values, gradient = tesp.outer_gradient(net, x, g, buffer, batch, args)
    close(values, [loss.detach(), kl.detach()])
    close(gradient, wanted)
    P = len(phi)
    assert wanted[P : 2 * P].abs().max() > 0 and kl > 1e-3
    for off in (replace(args, learn_alpha=False), replace(args, method="maml")):
        frozen = tesp.outer_gradient(net, x, g, buffer, batch, off)[-1]
        assert (frozen[P : 2 * P] == 0).all() and torch.equal(frozen[:P], gradient[:P])


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
    theirs = oracle.meta_update(tesp.make_env(args, 3), *twin, goals, lambda task, k: noise[k][task], args)
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
