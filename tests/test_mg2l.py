"""The maths of mg2l.py: by hand, by plain loops, by torch's own functions, by enumeration."""

import copy
import itertools
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mg2l as m

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmark"))
import naive_mg2l as naive

close = torch.testing.assert_close


def make_args(**kw):
    small = dict(env="spread", latent_dim=8, encoder_units=8, share_tran=False, hidden=16, context_size=6,
                 num_envs=6, context_envs=3, warm_up=0, horizon=5, ring_size=4, ppo_epochs=2,
                 encoder_updates=2, eval_episodes=3, eval_context=7, seed=0)
    return m.resolve(m.Args(**small | kw))


def made(**kw):
    """args, env, params, optimizers, norm, and a ring that holds an episode of each task."""
    args = make_args(**kw)
    torch.manual_seed(args.seed)
    env = m.make_env(args, args.num_envs + args.context_envs)
    params, optimizers, norm, ring = m.build(args, env)
    for _ in range(2):
        m.iterate(env, params, optimizers, norm, ring, env.all_tasks(), 0, args)
    return args, env, params, optimizers, norm, ring


def encoder(n=3, features=7, C=8, **kw):
    args = make_args(**dict(dict(latent_dim=C), **kw))
    return m.make_encoder(n, features, C, args), args


def nonzero(x):
    return x is not None and bool((x != 0).any())


# ---------------------------------------------------------------- networks
def test_stacked_mlp_equals_separate_modules():
    p, x = m.make_mlp(3, [5, 16, 16, 2], 0.01), torch.randn(3, 7, 5)
    for k in p:  # scales and shifts that are not 1 and 0
        p[k] = p[k] + 0.1 * torch.randn_like(p[k])
    out = m.mlp(p, x)
    for i in range(3):
        h = x[i]
        for l in range(3):
            h = F.layer_norm(h, h.shape[-1:], p[f"scale{l}"][i, :, 0], p[f"shift{l}"][i, 0])
            h = h @ p[f"w{l}"][i] + p[f"b{l}"][i]
            h = h.relu() if l < 2 else h
        close(out[i], h, rtol=1e-4, atol=1e-5)
    shared = {k: v[:1] for k, v in p.items()}
    close(m.mlp(shared, x)[1], m.mlp({k: v[[0, 0, 0]] for k, v in p.items()}, x)[1])


def test_size_of_the_encoder_is_the_released_one():
    p, _ = encoder(n=2, features=23, C=64, encoder_units=64, encoder_layers=1)
    assert sum(x.numel() for k, x in p.items()) == 53_634 - 2  # the two pools' score biases cancel in softmax
    nets = m.make_actor(2, 74, 256, 2, False), m.make_mlp(2, [20 + 64, 256, 256, 1], 1.0)
    sizes = [sum(x.numel() for x in p.values()) // 2 for p in nets]
    assert sizes == [86_680, 89_001]


@pytest.mark.parametrize("discrete", [False, True])
def test_log_probabilities_and_entropies_are_those_of_torch(discrete):
    p = m.make_actor(2, 5, 8, 3, discrete)
    out = torch.randn(2, 4, 3)
    if discrete:
        own = torch.distributions.Categorical(logits=out)
    else:
        p["log_std"] += 0.3 * torch.randn(2, 1, 3)
        normal = torch.distributions.Normal(out, p["log_std"].exp().expand_as(out))
        own = torch.distributions.Independent(normal, 1)
    action = own.sample()
    logprob, entropy = m.log_prob_entropy(p, out, action)
    close(logprob, own.log_prob(action))
    close(entropy, own.entropy())


# ---------------------------------------------------------------- 1. the pool
@pytest.mark.parametrize("kind, blocks", [("pia", 0), ("mean", 0), ("poe", 0), ("pia", 2)])
def test_a_pool_forgets_order_and_repetition(kind, blocks):
    p, _ = encoder(pool=kind, n_blocks=blocks)
    p, x = m.under(p, "agg"), torch.randn(5, 11, 8)
    y, weight = m.pool(p, x, kind)
    close(m.pool(p, x[:, torch.randperm(11)], kind)[0], y, rtol=1e-4, atol=1e-5)
    close(m.pool(p, x.repeat(1, 2, 1), kind)[0], y, rtol=1e-4, atol=1e-5)
    close(weight.sum(-1), torch.ones(5))
    if not blocks:
        close(m.pool(p, x[:, :1], kind)[0], (x[:, 0] @ p["wv"] + p["bv"]) @ p["wo"] + p["bo"])
    if kind != "mean":  # a code of positions breaks it
        place = torch.linspace(-1, 1, 11)[:, None]
        one, other = (m.pool(p, y + place, kind)[0] for y in (x, x.flip(1)))
        assert not torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("kind, blocks", [("pia", 0), ("mean", 0), ("poe", 0), ("pia", 1)])
def test_a_layer_may_wait_until_after_the_pool(kind, blocks):
    p, _ = encoder(pool=kind, n_blocks=blocks)
    p, x, w, b = m.under(p, "agg"), torch.randn(3, 4, 6, 8), torch.randn(3, 8, 8), torch.randn(3, 1, 8)
    one, weight = m.pool(p, x, kind, (w, b))
    two, other = m.pool(p, m.linear(x.flatten(1, 2), w, b).view_as(x), kind)
    close(one, two, rtol=1e-4, atol=1e-4)
    close(weight, other, rtol=1e-4, atol=1e-5)


def test_poe_is_the_mean_of_the_product_of_gaussians():
    p = {"wa": torch.randn(2, 2), "wv": torch.randn(2, 2), "bv": torch.randn(2), "wo": torch.eye(2),
         "bo": torch.zeros(2)}
    x, grid = torch.randn(3, 2), torch.linspace(-20, 20, 40_001, dtype=torch.float64)
    mean, tau = x @ p["wv"] + p["bv"], F.softplus(x @ p["wa"])
    logs = -0.5 * tau[:, :, None] * (grid - mean[:, :, None]) ** 2
    density = (logs.sum(0) - logs.sum(0).amax(-1, keepdim=True)).exp()
    close(m.pool(p, x, "poe")[0].double(), (density * grid).sum(-1) / density.sum(-1), rtol=1e-3, atol=1e-4)


# ---------------------------------------------------------------- 2., 3. who sees what
def test_order_of_the_agents():
    p, args = encoder()
    x = torch.randn(4, 3, 8)
    glob = m.under(p, "glob")
    close(m.pool(glob, x[:, [2, 0, 1]])[0], m.pool(glob, x)[0], rtol=1e-4, atol=1e-5)
    c = torch.randn(1, 4, 6, 7).expand(3, -1, -1, -1)  # the same for all: yet each has its own nets
    q = m.encode(p, c, args)
    assert not torch.allclose(q.mu_l[0], q.mu_l[1], atol=1e-3)
    swapped = {k: v[[1, 0, 2]] if k.startswith(("tran", "local")) else v for k, v in p.items()}
    close(m.encode(swapped, c, args).mu_l, q.mu_l[[1, 0, 2]])


@pytest.mark.parametrize("as_coded", [False, True])
def test_a_local_latent_depends_on_all_own_transitions_and_on_no_others(as_coded):
    p, args = encoder(as_coded=as_coded)
    p = {k: v * (30 if as_coded and v.dim() > 1 else 1) for k, v in p.items()}
    c = torch.randn(3, 2, 6, 7)
    q = m.encode(p, c, args)
    reached = torch.zeros(3, 6)
    for j, t in itertools.product(range(3), range(6)):
        other = c.clone()
        other[j, :, t] += 1
        reached[j, t] = (m.encode(p, other, args).mu_l[0] - q.mu_l[0]).abs().max()
    if as_coded:  # the released fault: agent 0's latent is made of all agents' first transition
        assert (reached[:, 0] > 0).all() and (reached[:, 1:] == 0).all()
    else:
        assert (reached[0] > 0).all() and (reached[1:] == 0).all()


def test_priority_keeps_locality_and_prefers_heavy_transitions():
    p, args = encoder(priority=True, context_size=400)
    c = torch.randn(3, 2, 12, 7)
    weight = m.encode(p, c, args).weight
    tagged = c.clone()
    drawn = m.draw_context(p, lambda B: tagged.repeat(1, 1, B // 12 + 1, 1)[:, :, :B], 3000, args)
    found = (drawn[:, :, :, None] == c[:, :, None]).all(-1).float().mean(2)  # (n, R, 12)
    close(found.sum(-1), torch.ones(3, 2))  # each agent drew from its own
    close(found, weight, rtol=0, atol=0.05)


# ---------------------------------------------------------------- 4., 5. the bound of eq. (9)
def mutual_information(means, n):
    """I(mean of n samples; task) for N(mu_k, 1), by quadrature."""
    x = np.linspace(-12, 12, 20_001)
    dx, sd = x[1] - x[0], 1 / math.sqrt(n)
    p = np.exp(-0.5 * ((x - np.array(means)[:, None]) / sd) ** 2) / (sd * math.sqrt(2 * math.pi))
    mix = p.mean(0)
    return float((p * np.log(np.maximum(p, 1e-300) / np.maximum(mix, 1e-300))).sum(1).mean() * dx)


@pytest.mark.parametrize("means, n", [((-0.5, 0.5), 4), ((-1.0, 0.0, 1.0), 2), ((-0.5, 0.5), 1)])
def test_log_K_minus_the_loss_bounds_the_mutual_information(means, n):
    """The best scores that dot products of (x, 1) with (a mu, b) can give: keys from 64 samples each."""
    torch.manual_seed(0)
    mu, M, true = torch.tensor(means), 60_000, mutual_information(means, n)
    K = len(means)
    tasks = torch.randint(K, (M,))
    query = mu[tasks] + torch.randn(M) / math.sqrt(n)
    key = mu + torch.randn(M, K) / 8
    scores = n * (query[:, None] * key - key**2 / 2)  # log densities of the query, to a constant
    bound = math.log(K) - m.info_nce(scores, tasks)[0].item()
    assert true - 0.03 <= bound <= true + 0.01


def test_identical_tasks_are_told_by_chance_and_separate_ones_surely():
    torch.manual_seed(0)
    K, M = 3, 6000
    tasks = torch.arange(M) % K
    loss, accuracy = m.info_nce(0.1 * torch.randn(M, K), tasks)
    assert abs(accuracy - 1 / K) < 3 * math.sqrt(2 / 9 / M) and math.log(K) - loss <= 0.01
    loss, accuracy = m.info_nce(10 * F.one_hot(tasks, K) + torch.randn(M, K), tasks)
    assert accuracy > 0.999 and math.log(K) - loss > 0.95 * math.log(K)


# ---------------------------------------------------------------- 6. eq. (10)
def test_local_loss_is_the_plain_double_loop():
    torch.manual_seed(0)
    n, M, K, C = 3, 5, 4, 6
    z, key, zi, key_i = torch.randn(M, C), torch.randn(K, C), torch.randn(n, M, C), torch.randn(n, K, C)
    tasks = torch.randint(K, (M,))
    total = {"joint": 0.0, "own": 0.0}
    for i, r in itertools.product(range(n), range(M)):
        own = torch.stack([zi[i, r] @ key_i[i, k] for k in range(K)])
        both = torch.stack([torch.cat([z[r], zi[i, r]]) @ torch.cat([key[k], key_i[i, k]]) for k in range(K)])
        total["own"] -= own.log_softmax(0)[tasks[r]] / (n * M)
        total["joint"] -= both.log_softmax(0)[tasks[r]] / (n * M)
    for kind in total:
        close(m.local_loss(z, key, zi, key_i, tasks, kind)[0], total[kind])
    shuffled = m.local_loss(z, key, zi[[2, 0, 1]], key_i[[2, 0, 1]], tasks)[0]  # agents with their nets
    close(shuffled, total["joint"])


def task_free(n, rows, K):
    """Latents that are one-hot in the agent and say nothing of the task."""
    eye = 30 * torch.eye(n)
    return eye[:, None].expand(n, rows, n), eye[:, None].expand(n, K, n)


def test_latents_that_only_name_the_agent_win_nothing_but_in_the_released_code():
    n, K, M = 3, 5, 15
    tasks, zero = torch.arange(M) % K, torch.zeros(M, 4)
    zi, key = task_free(n, M, K)
    loss, _, alone = m.local_loss(zero, torch.zeros(K, 4), zi, key, tasks)
    assert loss.item() == pytest.approx(math.log(K), rel=1e-4)
    negatives = zi[:, :, None].expand(n, M, K - 1, n)
    coded = m.as_coded_losses((zero, zero, zero[:, None].expand(M, K - 1, 4)), (zi, zi, negatives), K)[1]
    assert coded.item() < math.log(K) - 0.3  # 1.10: the fault


def test_the_released_local_loss_by_its_flat_index():
    torch.manual_seed(0)
    n, K, M, C = 3, 4, 5, 6
    z = torch.randn(M, C), torch.randn(M, C), torch.randn(M, K - 1, C)
    zi = torch.randn(n, M, C), torch.randn(n, M, C), torch.randn(n, M, K - 1, C)
    total = 0.0
    for r in range(M * n):
        scores = [z[0][r % M] @ z[1][r % M] + zi[0][r % n, r // n] @ zi[1][r % n, r // n]]
        for j in range(K - 1):
            f = r * (K - 1) + j
            row, key, agent = f // ((K - 1) * n), f % ((K - 1) * n) // n, f % n
            scores.append(z[0][r % M] @ z[2][r % M, j] + zi[0][r % n, r // n] @ zi[2][agent, row, key])
        total -= torch.stack(scores).log_softmax(0)[0] / (M * n)
    close(m.as_coded_losses(z, zi, K)[1], total)


# ---------------------------------------------------------------- 7. who learns from what
PARTS = {"tran": ("tran",), "pools": ("agg", "glob"), "rho_g": ("rho_g",), "local": ("local",),
         "rho_l": ("rho_l",)}
ROUTES = {  # of spec 1.4: which parts of the encoder a loss reaches
    "global": {"tran", "pools", "rho_g"}, "local": {"local", "rho_l"}, "critic": {"tran", "pools", "rho_g"},
    "actor": set()}


@pytest.mark.parametrize("loss", ROUTES)
def test_each_loss_reaches_what_it_should(loss):
    args, env, params, _, norm, ring = made()
    phi = params["encoder"]
    M, K = args.num_envs, 3
    tasks = torch.arange(M) % K
    context = ring.sample(torch.cat([tasks, torch.arange(K)]), args.context_size, args.mix)
    q = m.encode(phi, context, args)
    z, zi = m.draw_latents(q)
    obs = torch.randn(2, M, 10)
    told, seen = m.latents(phi, context[:, :M], (torch.randn(M, 8), torch.randn(2, M, 8)), args)
    value = {
        "global": lambda: m.info_nce(z[:M] @ z[M:].T, tasks)[0] + m.kl_standard(q.mu_g, q.sd_g),
        "local": lambda: m.local_loss(z[:M], z[M:], zi[:, :M], zi[:, M:], tasks)[0]
        + m.kl_standard(q.mu_l, q.sd_l) + m.kl_distil(q.mu_g, q.sd_g, q.mu_l, q.sd_l),
        "critic": lambda: m.critic(params["critic"], obs, seen).sum(),
        "actor": lambda: m.actor(params["theta"], obs, told).square().sum()}[loss]()
    grads = torch.autograd.grad(value, [*phi.values(), *params["theta"].values(), *params["critic"].values()],
                                allow_unused=True)
    by_name = dict(zip(phi, grads))
    for part, prefixes in PARTS.items():
        mine = [g for k, g in by_name.items() if k.split(".")[0] in prefixes]
        assert any(map(nonzero, mine)) == (part in ROUTES[loss]), part
    theta, psi = grads[len(phi) : len(phi) + len(params["theta"])], grads[len(phi) + len(params["theta"]) :]
    assert any(map(nonzero, theta)) == (loss == "actor") and any(map(nonzero, psi)) == (loss == "critic")


def test_in_training_actors_leave_the_encoder_and_critics_move_it_but_for_its_local_part():
    args, env, params, optimizers, norm, ring = made(encoder_updates=0, lr=1e-2)
    before = copy.deepcopy({g: {k: v.detach() for k, v in p.items()} for g, p in params.items()})
    m.iterate(env, params, optimizers, norm, ring, env.all_tasks(), 3, args)
    moved = {k for k, v in params["encoder"].items() if not torch.equal(v, before["encoder"][k])}
    assert moved and not any(k.startswith(("local", "rho_l")) for k in moved)
    assert all(not torch.equal(params[g]["w1"], before[g]["w1"]) for g in ("theta", "critic"))


# ---------------------------------------------------------------- 8. small pieces
def test_kl_against_torch():
    mu, sd, mu_i, sd_i = torch.randn(5), torch.rand(5) + 0.1, torch.randn(5), torch.rand(5) + 0.1
    normal = torch.distributions.Normal
    close(m.kl_standard(mu, sd), torch.distributions.kl_divergence(normal(mu, sd), normal(0.0, 1.0)).mean())
    close(m.kl_distil(mu, sd, mu_i, sd_i),
          torch.distributions.kl_divergence(normal(mu, sd), normal(mu_i, sd_i)).mean())
    assert m.kl_standard(torch.zeros(1), torch.ones(1)) == 0
    rho = torch.linspace(0.5, 1.6, 1001)
    coded = torch.stack([m.kl_as_coded(torch.zeros(1), r) for r in rho])
    assert coded.min().item() == pytest.approx(-0.6387, abs=1e-4)
    assert rho[coded.argmin()].item() == pytest.approx(1.0497, abs=2e-3)


def test_huber_is_symmetric_and_the_released_one_is_not():
    e = torch.tensor([-20.0, -10.0, -1.0, 0.0, 1.0, 20.0])
    close(m.huber(e), torch.tensor([150.0, 50.0, 0.5, 0.0, 0.5, 150.0]))
    close(m.huber(e, one_sided=True), torch.tensor([0.0, 50.0, 0.5, 0.0, 0.5, 150.0]))


def test_product_of_gaussian_factors():
    mu, rho = torch.randn(1, 1, 4, 3), torch.randn(1, 1, 4, 3)
    q = m.product(torch.cat([mu, rho], -1))
    tau = F.softplus(rho)
    mean, sd = mu[0, 0, 0], tau[0, 0, 0] ** -0.5
    for t in range(1, 4):  # one factor after the other
        total = sd**-2 + tau[0, 0, t]
        mean, sd = (mean * sd**-2 + mu[0, 0, t] * tau[0, 0, t]) / total, total**-0.5
    close(q.mu_l[0, 0], mean)
    close(q.sd_l[0, 0], sd)


# ---------------------------------------------------------------- 9., 10., 11. the base learner
def brute_gae(reward, value, ended, gamma, lam):
    """sum_u (gamma lambda)^u delta_{t+u} up to the end of the episode."""
    T, adv = len(reward), []
    for t in range(T):
        total, weight = 0.0, 1.0
        for u in range(t, T):
            total += weight * (reward[u] + gamma * (1 - ended[u]) * value[u + 1] - value[u])
            if ended[u]:
                break
            weight *= gamma * lam
        adv.append(total)
    return adv


def test_gae_against_the_sum():
    torch.manual_seed(0)
    n, T, M = 2, 9, 6
    reward, value = torch.randn(n, T, M), torch.randn(n, T + 1, M)
    end = torch.tensor([9, 9, 3, 8, 0, 5])  # an episode of 9 is cut by the horizon
    ended = (torch.arange(T)[:, None] == end).float()
    alive = (torch.arange(T)[:, None] <= end).float()
    adv = m.gae(reward * alive, value, alive, ended, 0.9, 0.8)
    for i, r in itertools.product(range(n), range(M)):
        want = brute_gae(reward[i, :, r].tolist(), value[i, :, r].tolist(), ended[:, r].tolist(), 0.9, 0.8)
        last = min(int(end[r]) + 1, T)
        close(adv[i, :last, r], torch.tensor(want[:last]), rtol=1e-4, atol=1e-5)
        assert not adv[i, last:, r].any()
    one, nothing = torch.ones(T, M), torch.zeros(T, M)
    deltas = reward + 0.9 * value[:, 1:] - value[:, :-1]
    close(m.gae(reward, value, one, nothing, 0.9, 0.0), deltas)
    power = 0.9 ** torch.arange(T)
    whole = (power[:, None] * reward[0]).sum(0) + 0.9**T * value[0, -1] - value[0, 0]  # the last value counts
    close(m.gae(reward, value, one, nothing, 0.9, 1.0)[0, 0], whole)


def test_value_norm():
    norm, x = m.ValueNorm(2, "cpu"), torch.randn(2, 50) * torch.tensor([[3.0], [0.01]]) - 7
    norm.update(x, torch.full((50,), 0.02))
    mean, sd = norm.moments()
    close(mean[:, 0], x.mean(1), rtol=1e-3, atol=1e-3)
    assert sd[0].item() == pytest.approx(x[0].std(correction=0).item(), rel=1e-2)
    assert sd[1].item() == pytest.approx(0.1)  # the floor of the variance is 0.01
    close(norm.denorm(norm.norm(x)), x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("as_coded", [False, True])
def test_the_first_ratio_is_one_unless_as_coded(as_coded):
    args, env, params, optimizers, norm, ring = made(as_coded=as_coded, context_size=6)
    if as_coded:  # at the released start latents have noise enough, but heads of 0.01 hide it
        with torch.no_grad():
            params["theta"]["w2"] *= 100
    logs, _ = m.iterate(env, params, optimizers, norm, ring, env.all_tasks(), 5, args)
    assert (logs["losses/first_ratio_sd"] < 1e-5) == (not as_coded)


def test_without_advantage_the_actor_follows_the_entropy_alone():
    logprob, entropy = torch.randn(2, 8, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    weight = torch.full((8,), 1 / 8)
    loss = m.actor_loss(logprob, logprob.detach() + 0.1, torch.zeros(2, 8), entropy, weight, 0.2, 0.01)
    grads = torch.autograd.grad(loss.sum(), [logprob, entropy])
    assert not grads[0].any()
    close(grads[1], torch.full((2, 8), -0.01 / 8))


def test_clipped_losses_by_hand():
    w = torch.tensor([0.5, 0.5])
    ratio = torch.tensor([[1.5, 0.5]]).log()
    for adv, gain in ([1.0, 1.0], 1.2 + 0.5), ([-1.0, -1.0], -1.5 - 0.8):
        loss = m.actor_loss(ratio, torch.zeros(1, 2), torch.tensor([adv]), torch.zeros(1, 2), w, 0.2, 0.01)
        assert loss.item() == pytest.approx(-gain / 2)
    value, old, target = (torch.tensor([x]) for x in ([1.0, 0.1], [0.0, 0.0], [1.0, 1.0]))
    want = 0.5 * 0.5 * (0.8**2 + 0.9**2)  # the clipped value, 0.2, is the worse one; 0.1 is not clipped
    assert m.critic_loss(value, old, target, w, 0.2).item() == pytest.approx(want)


def test_a_stacked_update_is_that_of_separate_networks():
    """Loss, clipping by agent, and Adam, for agent 1 alone and in a stack of three."""
    torch.manual_seed(0)
    stack, x, adv = m.make_mlp(3, [4, 8, 8, 1], 1.0), torch.randn(3, 20, 4), 50 * torch.randn(3, 20)
    adv[2] *= 100  # its gradient is clipped far more than the others'
    alone = {k: v[1:2].clone().requires_grad_() for k, v in stack.items()}
    stack = {k: v.requires_grad_() for k, v in stack.items()}
    for p, rows in (stack, slice(0, 3)), (alone, slice(1, 2)):
        o = torch.optim.Adam([*p.values()], 1e-3, eps=1e-5, fused=True)
        for _ in range(3):
            m.step([o], (m.mlp(p, x[rows])[..., 0] * adv[rows]).mean(1).sum(), [p], 10.0)
    for k in stack:
        close(stack[k][1:2], alone[k], rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- 12. rings
def numbered(n, T, R, start):
    """x[i, t, r, 0] = 1000 r + start + t, x[i, t, r, 1] = the agent."""
    x = torch.zeros(n, T, R, 2)
    x[..., 0] = start + torch.arange(T)[:, None] + 1000.0 * torch.arange(R)
    x[..., 1] = torch.arange(n).view(n, 1, 1).expand(n, T, R)
    return x


@pytest.mark.parametrize("mix", ["all", "few"])
def test_a_ring_keeps_the_newest_whole_and_aligned(mix):
    torch.manual_seed(0)
    ring = m.Ring(2, 3, 4, 5, 2, "cpu")
    with pytest.raises(ValueError, match="ring of task 1 is empty"):
        ring.append(torch.tensor([0]), numbered(2, 5, 1, 0), torch.tensor([5]))
        ring.sample(torch.tensor([0, 1]), 3, mix)
    for e in range(6):  # six episodes into four places; the last is cut short
        ring.append(torch.tensor([2, 1]), numbered(2, 5, 2, 10 * e), torch.tensor([5 if e < 5 else 2, 5]))
    c = ring.sample(torch.tensor([2, 1, 2]), 4000, mix)
    assert c.shape == (2, 3, 4000, 2)
    assert torch.equal(c[0, ..., 0], c[1, ..., 0]) and (c[1, ..., 1] == 1).all()  # the same times for all
    newest = {10 * e + t for e in (2, 3, 4) for t in range(5)} | {50, 51}
    if mix == "all":
        assert set(c[0, 0, :, 0].tolist()) == newest
    assert set(c[0, :, :, 0].unique().tolist()) <= newest | {x + 1000 for x in range(60)}
    assert (c[0, 1, :, 0] >= 1020).all() and (c[0, [0, 2], :, 0] < 1000).all()


def test_a_context_of_few_comes_from_1_to_32_episodes():
    ring = m.Ring(1, 1, 1000, 1, 2, "cpu")
    x = torch.zeros(1, 1, 1000, 2)
    x[..., 0] = torch.arange(1000)
    ring.append(torch.zeros(1000, dtype=torch.long), x, torch.ones(1000))
    torch.manual_seed(0)
    c = ring.sample(torch.zeros(300, dtype=torch.long), 500, "few")[0, ..., 0]
    counts = [len(row.unique()) for row in c]
    assert min(counts) == 1 and 28 <= max(counts) <= 32 and 30 < counts.count(1) < 75  # 1/6 of 300


def test_tasks_are_shared_out_fairly():
    for K, M in (3, 32), (2, 16), (50, 16):
        torch.manual_seed(0)
        index = m.choose_tasks(K, M, 4, None)
        counts = torch.bincount(index[:M], minlength=K)
        assert counts.max() - counts.min() <= 1 and len(index) == M + 4
    assert m.choose_tasks(5, 2, 2, 4).tolist() == [4, 0, 1, 2]  # in turn, before training


# ---------------------------------------------------------------- other methods
def test_the_next_step_of_a_gru_is_that_of_torch():
    U, p = m.MATE_UNITS, m.make_mate(2, 2, 4, 3)
    p = {k: v + 0.1 * torch.randn_like(v) for k, v in p.items()}
    obs, action, reward, h = (torch.randn(2, 5, *k) for k in ((4,), (3,), (), (U,)))
    new, out = m.mate_step(p, h, obs, action, reward)
    for i in range(2):
        cell = torch.nn.GRUCell(U, U)
        order = [1, 0, 2]  # torch: reset, update, new
        blocks = lambda x: torch.cat([x.chunk(3, -1)[k] for k in order], -1)  # noqa: B023
        cell.weight_ih.data, cell.weight_hh.data = (blocks(p[f"{k}.w"][i]).T for k in "xh")  # noqa: B023
        cell.bias_ih.data, cell.bias_hh.data = (blocks(p[f"{k}.b"][i, 0]) for k in "xh")  # noqa: B023
        x = (torch.cat([obs[i], action[i], reward[i, :, None]], -1) @ p["in.w"][i] + p["in.b"][i]).relu()
        close(new[i], cell(x, h[i]), rtol=1e-4, atol=1e-5)
        close(out[i], new[i] @ p["out.w"][i] + p["out.b"][i], rtol=1e-4, atol=1e-5)


def test_mate_trains_on_what_it_was_told_while_playing():
    args, env, params, *_ = made(method="mate")
    latent = m.mate_latent(params["encoder"], 2, 6, 2, False, "cpu")
    play = m.rollout(env, params["theta"], env.sample_tasks(6), latent)
    x = m.transitions(play)
    seen = {}
    original = m.mate_step
    try:
        m.mate_step = lambda p, h, *a: seen.setdefault(len(seen), original(p, h, *a))
        loss, _ = m.mate_loss(params["encoder"], x, play.obs, play.alive, 0.1)
    finally:
        m.mate_step = original
    close(torch.stack([seen[t][1] for t in range(5)], 1), play.zi, rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(loss, [*params["encoder"].values()])
    assert all(map(nonzero, [g for k, g in zip(params["encoder"], grads) if k.endswith(".w")]))


OTHERS = [dict(method=x) for x in ("none", "task-given", "global-only", "pearl", "mate")]
OTHERS += [dict(pool="poe"), dict(n_blocks=1), dict(local_loss="kl"), dict(as_coded=True), dict(keys=1),
           dict(share_params=True), dict(share_tran=True), dict(minibatches=2), dict(priority=True),
           dict(env="hunting")]


@pytest.mark.parametrize("kw", OTHERS)
def test_every_method_trains(kw):
    args, env, params, optimizers, norm, ring = made(**kw)
    before = {g: [v.detach().clone() for v in p.values()] for g, p in params.items()}
    logs, steps = m.iterate(env, params, optimizers, norm, ring, env.all_tasks(), 5, args)
    assert steps == (args.num_envs + args.context_envs) * 5
    assert all(math.isfinite(float(v)) for v in logs.values())
    for group, p in params.items():
        assert not p or any(not torch.equal(a, b) for a, b in zip(before[group], p.values())), group
    test = m.meta_test(args, params, "train")
    shots = {"random", "0"} | ({"1", "2", "4", "8", "mean"} if args.method in m.WITH_CONTEXT else set())
    assert set(test.returns) == shots and all(x.shape == (len(test.tasks), 3) for x in test.returns.values())


def test_at_first_the_prior_plays_all_rows_and_only_the_encoder_learns():
    args, env, params, optimizers, norm, ring = made(warm_up=3)
    before = copy.deepcopy({g: {k: v.detach() for k, v in p.items()} for g, p in params.items()})
    episodes = ring.next.clone()
    logs, _ = m.iterate(env, params, optimizers, norm, ring, env.all_tasks(), 2, args)
    same = lambda g: all(torch.equal(v, params[g][k]) for k, v in before[g].items())
    assert same("theta") and same("critic") and not same("encoder") and "adapt/return_1" not in logs
    assert ((ring.next - episodes) % args.ring_size == 3).all()  # nine rows, three tasks
    m.iterate(env, params, optimizers, norm, ring, env.all_tasks(), 3, args)
    assert not same("theta") and not same("critic")


def test_share_params_has_one_network_and_learns_from_all_agents():
    args, env, params, *_ = made(share_params=True)
    assert {len(v) for p in (params["theta"], params["critic"]) for v in p.values()} == {1}
    x = torch.randn(2, 4, 18)
    assert torch.equal(m.mlp(params["theta"], x)[1:], m.mlp(params["theta"], x[1:]))


def test_an_eye_is_two_convolutions_of_the_picture():
    eye, obs = m.make_eye(), torch.randn(3, 2, 1125)
    out = m.see(eye, obs)
    assert out.shape == (3, 2, 288) and m.see({}, obs) is obs
    conv = [torch.nn.Conv2d(c, d, 3, stride=2, bias=False) for c, d in ((5, 16), (16, 32))]
    for l, c in enumerate(conv):
        c.weight.data = eye[f"eye{l}"].view_as(c.weight)
    picture = obs[1, 0].view(15, 15, 5)
    close(out[1, 0], conv[1](conv[0](picture.permute(2, 0, 1)).relu()).relu().flatten())


class Pictures:
    """Two agents see the same picture: at first one dot, there or not there by the task, then noise."""

    num_agents, obs_dims, obs_shape, action_dims, horizon = 2, (1125, 1125), (15, 15, 5), (3, 3), 4
    discrete, device = True, "cpu"

    def __init__(self, B):
        self.num_envs = B

    def reset(self, task=None):
        x = torch.zeros(self.num_envs, 15, 15, 5)
        x[:, 4, 4, 0] = task[:, 0]
        return (x.flatten(1),) * 2

    def step(self, action):
        no = torch.zeros(self.num_envs, dtype=torch.bool)
        obs = (torch.randn(self.num_envs, 1125),) * 2
        return obs, torch.randn(self.num_envs, 2), no, no, {}

    def all_tasks(self, split="train"):
        return torch.eye(2)

    def sample_tasks(self, n, split="train"):
        return torch.eye(2)[torch.randint(2, (n,))]


@pytest.mark.parametrize("shared", [True, False])
def test_every_network_learns_through_an_eye_where_agents_share_it(monkeypatch, shared):
    monkeypatch.setattr(m, "make_env", lambda args, n: Pictures(n))
    args, env, params, optimizers, norm, ring = made(horizon=4, share_params=shared)
    before = {(g, k): v.detach().clone() for g, p in params.items() for k, v in p.items() if "eye" in k}
    assert len(before) == (6 if shared else 0)
    m.iterate(env, params, optimizers, norm, ring, env.all_tasks(), 5, args)
    assert all(not torch.equal(v, params[g][k]) for (g, k), v in before.items())
    o, rest, after = torch.randn(2, 5, 1125), torch.randn(2, 5, 4), torch.randn(2, 5, 1125)
    if shared:  # E_tran reads both pictures and what is between them
        p, x = params["encoder"], torch.cat([o, rest, after], -1)
        seen = torch.cat([m.see(m.under(p, "tran"), o), rest, m.see(m.under(p, "tran"), after)], -1)
        plain = {k: v for k, v in p.items() if "eye" not in k}
        close(m.encode(p, x[:, :, None], args).mu_l, m.encode(plain, seen[:, :, None], args).mu_l)


# ---------------------------------------------------------------- rollout and meta-test
class Short:
    """Two agents; row r ends for good after step r + 1. Observations count the steps."""

    num_agents, obs_dims, action_dims, discrete, device, horizon = 2, (1, 1), (3, 3), True, "cpu", 6

    def __init__(self, B=4):
        self.num_envs = B

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
        reward = torch.stack([torch.ones(self.num_envs), torch.full((self.num_envs,), 2.0)], 1)
        never = torch.zeros(self.num_envs, dtype=torch.bool)
        return self.observe(), torch.where(alive[:, None], reward, 99.0), ~(self.t < torch.arange(
            self.num_envs) + 1), never, {}


def test_an_early_end_is_a_mask_and_play_stops_when_all_have_ended():
    theta = m.make_actor(2, 1, 8, 3, True)
    none = torch.zeros(1, 4, 0)
    play = m.rollout(Short(), theta, None, m.constant(none, none))
    assert play.alive.sum(0).tolist() == [1, 2, 3, 4] and play.alive.shape[0] == 4
    assert play.reward[0].sum(0).tolist() == [1, 2, 3, 4] and play.reward[1].sum(0).tolist() == [2, 4, 6, 8]
    assert play.ended.sum(0).tolist() == [1, 1, 1, 1]
    x = m.transitions(play, 3)
    assert x.shape == (2, 4, 4, 6) and (x[0, :, 3, 5] == x[0, :, 3, 0] + 1).all()
    assert (x[..., 1:4].sum(-1) == 1).all() and torch.equal(x[..., 1:4].argmax(-1), play.action)


def test_a_trial_infers_from_its_own_episodes_and_steps_only():
    torch.manual_seed(0)
    args = make_args(eval_context=500)
    n, s, T, R = 2, 2, 3, 4
    x = torch.zeros(n, s, T, R, 3)
    for i, e, t, r in itertools.product(range(n), range(s), range(T), range(R)):
        x[i, e, t, r, 0] = 1000 * i + 100 * e + 10 * t + r
    lengths = torch.tensor([[3, 3, 3, 1], [3, 2, 3, 3]])
    seen = []
    encode = m.encode
    try:
        m.encode = lambda p, c, a: seen.append(c)
        m.infer_from({}, x, lengths, args)
    finally:
        m.encode = encode
    c = seen[0][..., 0]  # (n, R, B)
    assert c.shape == (2, 4, 500) and torch.equal(c[0] + 1000, c[1])
    assert set(c[0, 0].tolist()) == {0, 10, 20, 100, 110, 120}
    assert set(c[0, 1].tolist()) == {1, 11, 21, 101, 111}
    assert set(c[0, 3].tolist()) == {3, 103, 113, 123}


def test_trials_whose_episodes_all_end_early_are_evaluated():
    pytest.importorskip("mujoco")
    args, _, params, *_ = made(env="hopper_param", num_envs=4, minibatches=1, horizon=150)
    test = m.meta_test(args, params, "test")  # hoppers fall early, each time at another step
    assert all(x.shape == (10, 3) and x.isfinite().all() for x in test.returns.values())


def test_accuracies_find_the_task_and_never_meet_their_own_trial():
    K, E = 3, 4
    eye = torch.eye(K).repeat_interleave(E, 0)
    right = m.accuracies((eye, eye[None]), (eye, eye[None]), K, E, 2)
    assert right == {"z": 1.0, "pair": 1.0, "zi": 1.0}
    unique = torch.eye(K * E)  # a latent that names the trial: met only if a trial is its own key
    scores = m.accuracies((unique, unique[None]), (unique, unique[None]), K, E, 8)
    assert scores["z"] == pytest.approx(1 / 3)  # all scores 0: the first task is guessed


def test_bad_worlds_are_refused(monkeypatch, capsys):
    for kw, word in ((dict(obs_dims=(3, 4)), "alike"), (dict(tasks=1), "one task")):
        every = torch.eye(kw.get("tasks", 3))
        env = SimpleNamespace(obs_dims=kw.get("obs_dims", (3, 3)), action_dims=(2, 2),
                              all_tasks=lambda split="train", every=every: every)
        monkeypatch.setattr(m.envs, "make", lambda *a, env=env, **k: env)
        with pytest.raises(SystemExit) as stop:
            m.make_env(make_args(), 2)
        assert stop.value.code == 2 and word in capsys.readouterr().err


# ---------------------------------------------------------------- the twin of the benchmark
def grads_of(loss, *groups):
    return torch.autograd.grad(loss, [x for p in groups for x in p.values()], allow_unused=True)


def equal_grads(one, two):
    assert sum(map(nonzero, one)) > 5
    for a, b in zip(one, two):
        if nonzero(a) or nonzero(b):  # what a loss does not reach has none, or zeros
            close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("share", [False, True])
def test_the_naive_twin_has_the_same_gradients(monkeypatch, share):
    args, env, params, _, norm, ring = made(encoder_layers=2, keys=2, share_tran=share)
    M, K, phi = args.num_envs, 3, params["encoder"]
    assert len(phi["tran.w0"]) == (1 if share else 2) and len(phi["local.w0"]) == 2
    tasks, eps = torch.arange(M) % K, [torch.randn(M + 2 * K, 8), torch.randn(2, M + 2 * K, 8)]
    contexts = ring.sample(torch.cat([tasks, torch.arange(K).repeat(2)]), 6, "few")
    monkeypatch.setattr(m.Ring, "sample", lambda *_: contexts)
    draws = iter(eps)
    monkeypatch.setattr(m, "randn", lambda *shape, device: next(draws))
    one = m.encoder_losses(phi, ring, tasks, args)[0]
    two = naive.encoder_loss(phi, [list(c) for c in contexts.transpose(0, 1)], tasks.tolist(), K, args.keys,
                             args.kl_coef, *eps, args.encoder_layers)
    close(one, two, rtol=1e-4, atol=1e-5)
    equal_grads(grads_of(one, phi), grads_of(two, phi))
    # actors and critics, and what the critics tell the encoder
    R, (zi, zc) = M, m.latents(phi, contexts[:, :M], (eps[0][:M], eps[1][:, :M]), args)
    obs, action, old, adv, target = (torch.randn(2, R, *k) for k in ((10,), (2,), (), (), ()))
    logprob, weight = 0.3 * torch.randn(2, R) - 3, torch.full((R,), 1 / R)
    mine, entropy = m.log_prob_entropy(params["theta"], m.actor(params["theta"], obs, zi), action)
    one = m.actor_loss(mine, logprob, adv, entropy, weight, args.clip_coef, args.ent_coef).sum()
    value = m.critic(params["critic"], obs, zc)
    one = one + m.critic_loss(value, old, target, weight, args.clip_coef).sum()
    z = [naive.encode(phi, list(contexts[:, r]), args.encoder_layers)[0] for r in range(R)]
    z = torch.stack([mu + sd * e for (mu, sd), e in zip(z, eps[0])])
    two = sum(sum(naive.ppo_losses(params, i, obs, zi[i], z, action[i],
                                   logprob[i], old[i], adv[i], target[i], args)) for i in range(2))
    close(one, two, rtol=1e-4, atol=1e-5)
    equal_grads(grads_of(one, *params.values()), grads_of(two, *params.values()))


def test_the_naive_twin_trains():
    args, env, params, optimizers, norm, ring = made()
    twin = naive.Naive(lambda: m.make_env(args, 1), args, params, optimizers, norm, ring, env.all_tasks())
    before = [v.detach().clone() for p in params.values() for v in p.values()]
    twin.iterate()
    after = [v for p in params.values() for v in p.values()]
    assert sum(not torch.equal(a, b) for a, b in zip(before, after)) > len(before) * 0.8


# ---------------------------------------------------------------- 17. does the encoder learn
def test_contexts_of_random_play_are_told_apart():
    """Contexts of all random-play episodes in small rings; 300 updates with the paper's encoder."""
    args = m.resolve(m.Args(env="spread", paper=True, num_envs=26))
    torch.set_num_threads(1)
    torch.manual_seed(0)
    env = m.make_env(args, 30)
    params, optimizers, norm, ring = m.build(args, env)
    m.iterate(env, params, optimizers, norm, ring, env.all_tasks(), 0, dict_of(args, encoder_updates=0))
    found = []
    for _ in range(300):
        loss, logs = m.encoder_losses(params["encoder"], ring, torch.arange(32) % 3, args)
        m.step([optimizers["encoder"]], loss, [params["encoder"]])
        found.append([logs["latent/accuracy_z"], logs["latent/accuracy_zi"]])
    z, zi = torch.tensor(found[-30:]).mean(0)
    assert z > 0.95 and zi > 0.8


def dict_of(args, **kw):
    other = copy.copy(args)
    other.__dict__.update(kw)
    return other
