"""The maths of maml_rl.py: known answers, finite differences, an oracle."""

import importlib.util
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Normal, kl_divergence

import maml_rl as m

TINY = dict(env="nav2d", num_tasks=2, num_episodes=3, horizon=6, hidden=8, eval_tasks=4, eval_episodes=2,
            eval_steps=1)
STEPS = 2 * 3 * 6 * 2  # of one iteration: D and V
BAD = ["--inner-steps 0", "--num-tasks 0", "--gamma 1.5", "--delta -1", "--inner-grad none", "--env ipd",
       "--outer promp --inner-grad dice", "--e-maml --inner-grad ratio", "--e-maml --outer promp"]
F64 = dict(dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def small(**kw):
    """Args of a small problem on nav2d: 3 tasks, 4 episodes of 20 steps, a net of 8-8."""
    sizes = dict(num_tasks=3, num_episodes=4, horizon=20, hidden=8, eval_tasks=3, eval_episodes=4)
    return m.Args(**sizes | dict(fisher_every=1, delta=0.01, activation="tanh") | kw)


def problem(dtype=torch.float64, second_order=True, **kw):
    """args, net, x and a chain of stored batches, sampled on nav2d."""
    args = small(**kw)
    env = m.make_env(args, args.num_tasks * args.num_episodes)
    net, x, _ = m.build(args, env)
    net, x, tasks = net._replace(adapts=net.adapts.to(dtype)), x.to(dtype), env.sample_tasks(args.num_tasks)

    def play(phi):
        noise = torch.randn(args.horizon, args.num_tasks, args.num_episodes, 2)
        return m.process(m.rollout(env, net, phi, tasks, noise, args), args)

    return args, net, x, m.adapt(net, x.expand(len(tasks), -1), play, args.inner_steps, args, second_order)


# ---------------------------------------------------------------- Gaussian bandits: the inner losses, E-MAML
def inner_derivatives(kind, steps, n=1_000_000, c=1.0, s=0.5, error=0.0):
    """Gradient and Hessian of -L_in by theta at 0 for n episodes of a ~ N(theta, s^2) under exact
    baselines; `error` a1^2 falsifies that of step 2. r1 = -(a1 - c)^2, r2 = -(a1 + a2 - 2c)^2."""
    theta = torch.zeros(1, **F64, requires_grad=True)
    a = s * torch.randn(1, steps, n // 2, **F64)
    a = torch.cat([a, -a], 2)
    d = a - c
    ret, base = -(d[:, :1] ** 2), torch.full((1, 1, n), -(c**2 + s**2), **F64)
    if steps == 2:
        # given a1, E[(a1 + a2 - 2c)^2] = (a1 - 2c)^2 + s^2; before, it is (2c)^2 + 2 s^2
        r2 = -((d[:, :1] + d[:, 1:]) ** 2)
        base_2 = -((d[:, :1] - c) ** 2 + s**2) + error * a[:, :1] ** 2
        ret, base = torch.cat([ret + r2, r2], 1), torch.cat([base - (4 * c**2 + 2 * s**2), base_2], 1)
    logprob = Normal(theta, s).log_prob(a)  # (1, steps, n)
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
    assert g == pytest.approx(10, abs=0.1) and H == pytest.approx(hessian, abs=0.2)
    if kind == "dice":  # plain DiCE, box(c_t) A_t, would be off by 2 * error
        g, H = inner_derivatives(kind, steps=2, error=2.0)
        assert g == pytest.approx(10, abs=0.1) and H == pytest.approx(hessian, abs=0.4)


class Bandit:
    """A net whose policy is N(phi, 0.5^2) everywhere."""

    adapts = torch.ones(1, **F64)

    def __call__(self, phi, obs):
        mean = phi[:, None, None].expand(-1, 1, obs.shape[2], -1)
        return mean, torch.full_like(mean, math.log(0.5))


@pytest.mark.parametrize("E, alpha, fitted, truth, ours", [
    (5, 0.3, True, 0.775, 0.775), (5, 0.3, False, 0.609, 0.756), (40, 0.1, False, 1.284, 1.287)])
def test_e_maml_is_the_derivative_of_the_expected_return(E, alpha, fitted, truth, ours):
    """d/dtheta E_D[J(phi(theta, D))] at theta 0, J(phi) = -((phi - 1)^2 + 1/4), by common random numbers.
    `fitted`: the baseline is the mean of D, as in the script, and E-MAML is exact. With the exact baseline,
    which moves with theta, it lacks that baseline's derivative. Under ratio, or without, it is far off."""
    n, s = 800_000 // E, 0.5
    noise = torch.randn(n // 2, 1, E, 1, **F64)
    noise = torch.cat([noise, -noise])
    J = lambda a: -((a - 1) ** 2 + s**2)

    def adv(theta):
        r = -((theta + s * noise[..., 0] - 1) ** 2)
        return r - (r.mean(2, keepdim=True) if fitted else J(theta))

    theta = torch.zeros((), **F64, requires_grad=True)
    phi = theta + alpha * (adv(theta) * noise[..., 0] / s).mean(2)
    numbers = torch.autograd.grad(J(phi).mean(), theta)[0]
    assert numbers.item() == pytest.approx(truth, abs=0.01)

    def batch(phi):
        if phi.abs().max() == 0:  # D
            action, A = s * noise, adv(torch.zeros(1, **F64))
        else:  # V: one action whose score is 1 and whose advantage is J'(phi): the exact outer gradient
            action, A = (phi + s**2)[:, None, None], -2 * (phi - 1)[:, None]
        logprob = m.distribution(net, phi, action, action)[2]
        weight = torch.ones_like(A) / A.shape[2]
        return m.Batch(action, action, J(phi)[..., None], weight, A, 1, action, action, logprob)

    def gradient(inner_grad, e_maml):
        args = m.Args(inner_grad=inner_grad, e_maml=e_maml)
        x = torch.tensor([0, alpha], **F64).expand(n, -1)
        chain = m.adapt(net, x, batch, 1, args, True)
        V = chain.batches[1]
        mean, log_std = net(chain.phis[1], V.obs)
        chain.batches[1] = V._replace(mean=mean, log_std=log_std)
        scores = (V.ret - V.ret.mean()).flatten()
        return -m.meta_gradient(net, chain, scores, args)[2][0].item()

    net = Bandit()
    assert gradient("loglik", True) == pytest.approx(ours, abs=0.03)
    if E == 5:
        assert abs(gradient("loglik", False) - truth) > 0.07  # without E-MAML's term
        assert abs(gradient("ratio", True) - truth) > 0.2  # the path counted twice


def test_e_maml_is_not_ruled_by_a_task_whose_episodes_are_all_alike(monkeypatch):
    args = small(e_maml=True, inner_grad="loglik")
    env = m.make_env(args, 12)
    net, x, optimizer = m.build(args, env)
    net.unflatten(x.chunk(2)[0])["b2"][:] = 10.0  # all actions are clipped: the first goal is one step away
    env.sample_tasks = lambda n: torch.tensor([[0.1, 0.1], [0.4, -0.3], [-0.2, 0.5]])
    monkeypatch.setattr(m, "trpo_update", lambda net, chain, x, scores, args: (chain, scores))
    (chain, scores), _ = m.meta_update(env, net, x, optimizer, args)
    assert chain.batches[-1].scale[0] < 1e-3 < chain.batches[-1].scale[1:].min()
    assert scores.abs().max() < 1000 and scores.sum().abs() < 1e-3


# ---------------------------------------------------------------- derivatives through learning, on nav2d
VARIANTS = {
    "maml": {},
    "loglik": dict(inner_grad="loglik"),
    "two steps": dict(inner_steps=2, method="meta-sgd"),
    "maesn": dict(method="maesn"),
    "e-maml": dict(e_maml=True, inner_grad="loglik", inner_steps=2),
    "ppo": dict(outer="ppo", method="meta-sgd"),
    "promp": dict(outer="promp", inner_steps=2, kl_coef=1.0),
    "relu": dict(activation="relu"),
}


def learned(net, x, args):
    """The entries of x that an outer step may change."""
    alpha = net.adapts if args.method in ("meta-sgd", "maesn") else 0 * net.adapts
    return torch.cat([torch.ones_like(alpha), alpha])


@pytest.mark.parametrize("variant", VARIANTS)
def test_3_meta_gradient_against_central_differences(variant):
    args, net, x, chain = problem(**VARIANTS[variant])
    mask = learned(net, x, args)
    x = x + 0.003 * torch.randn_like(x) * mask  # off the sampling policy: ratios are not 1
    scores = torch.randn(3, **F64)

    def loss(x):
        return m.outer_objective(net, m.readapt(net, x, chain.batches, args), scores, args)[0].mean().item()

    _, _, g = m.meta_gradient(net, m.readapt(net, x, chain.batches, args, True), scores, args)
    some = mask.nonzero().flatten()[:: 7 if mask.mean() > 0.9 else 5]
    steps = 1e-6 * torch.eye(len(x), **F64)[some]
    numeric = torch.tensor([(loss(x + s) - loss(x - s)) / 2e-6 for s in steps], **F64)
    assert (g[some] - numeric).norm() < 1e-6 * numeric.norm()
    assert (g[mask == 0] == 0).all()  # MAML's step sizes are no parameters
    if variant == "maml":  # and FOMAML is another thing
        first = m.meta_gradient(net, m.readapt(net, x, chain.batches, args), scores, args)[2]
        assert (first - g).norm() > 1e-3 * g.norm()


@pytest.mark.parametrize("method, K", [("maml", 1), ("meta-sgd", 2), ("maesn", 1)])
def test_4_fisher_product(method, K):
    args, net, x, chain = problem(method=method, inner_steps=K)
    mask = learned(net, x, args)
    u, v = mask * torch.randn(2, len(x), **F64)

    def kl(x):  # without any of section 5: one graph from x through all steps
        theta, alpha = x.chunk(2)
        phi = theta.expand(3, -1)
        for D in chain.batches[:-1]:
            *_, logprob = m.distribution(net, phi, D.obs, D.action)
            loss = m.inner_loss(logprob, D.logprob, D.adv, D.weight, "ratio").sum()
            phi = phi - alpha * net.adapts * torch.autograd.grad(loss, phi, create_graph=True)[0]
        V = chain.batches[-1]
        return (V.weight * m.gaussian_kl(V.mean, V.log_std, *net(phi, V.obs))).sum((1, 2)).mean()

    x = x.clone().requires_grad_()
    value = kl(x)
    g = torch.autograd.grad(value, x, create_graph=True)[0]
    assert abs(value) < 1e-12 and g.norm() < 1e-12
    double = torch.autograd.grad(g, x, v)[0] * mask
    F = m.fisher_product(net, chain, 0.0)
    assert (F(v) - double).norm() < 1e-10 * double.norm()
    assert torch.allclose(m.fisher_product(net, chain, 0.5)(v), F(v) + 0.5 * v)
    ends = [torch.autograd.grad(kl(x + h * v), x)[0] * mask for h in (1e-5, -1e-5)]
    assert (F(v) - (ends[0] - ends[1]) / 2e-5).norm() < 1e-6 * double.norm()
    assert torch.allclose(u @ F(v), v @ F(u), rtol=1e-10) and v @ F(v) >= 0
    surrogate = m.outer_objective(net, chain, None, args)[0]
    if method != "maesn":
        assert surrogate.abs().max() < 1e-12  # normalised advantages, ratio 1


def test_4_curvature_of_some_episodes():
    args, net, x, chain = problem(num_episodes=10)
    for batch in chain.batches:
        few = m.thin(batch, 5)
        assert torch.equal(few.obs, batch.obs[:, :, [0, 5]])
        assert torch.allclose(few.weight.sum((1, 2)), torch.ones(3, **F64))
        assert torch.allclose(few.weight, batch.weight[:, :, [0, 5]] * 5)  # no episode ends early here
    before = x.clone()
    for every in (1, 5):
        y = before.clone()
        again = m.readapt(net, y, chain.batches, args, True)
        logs = m.trpo_update(net, again, y, None, small(fisher_every=every))
        loss, kl = m.outer_objective(net, m.readapt(net, y, chain.batches, args), None, args)
        assert loss.mean() < 0 < kl.mean() <= args.delta  # of all episodes
        assert torch.allclose(logs["losses/outer"], loss.mean())
        assert torch.allclose(logs["losses/kl"], kl.mean())
    args.delta, y = 0.0, before.clone()  # nothing can satisfy this
    m.trpo_update(net, m.readapt(net, y, chain.batches, args, True), y, None, args)
    assert torch.equal(y, before)


def test_5_trpo_step_on_a_quadratic():
    A = torch.randn(6, 6, **F64)
    A, x, g = A @ A.T + 0.1 * torch.eye(6, **F64), torch.randn(6, **F64), torch.randn(6, **F64)
    tried, zero = [], torch.zeros((), **F64)

    def trial(new, slope=1.0, curvature=1.0):
        tried.append(new)
        return slope * g @ (new - x), 0.5 * curvature * (new - x) @ A @ (new - x)

    product = A.__matmul__
    new, loss, kl = m.trpo_step(x, zero, g, product, trial, 0.01, 50)
    s = tried[0] - x
    assert 0.5 * s @ A @ s == pytest.approx(0.01, rel=1e-6)
    assert len(tried) == 1 and loss < 0 and kl <= 0.01 and torch.equal(new, tried[0])
    assert torch.allclose(A @ m.conjugate_gradient(product, g, 50), g, atol=1e-4)
    # a KL that grows twice as fast is met by the third trial, 0.8^(2*2) < 1/2 < 0.8^(2*1)
    tried.clear()
    new, _, kl = m.trpo_step(x, zero, g, product, lambda y: trial(y, 1.0, 2.0), 0.01, 50)
    assert len(tried) == 3 and torch.allclose(new - x, 0.64 * s) and kl <= 0.01
    # a loss that only rises: x itself, bit by bit, after 15 trials
    tried.clear()
    new, *_ = m.trpo_step(x, zero, g, product, lambda y: trial(y, -1.0), 0.01, 10)
    assert torch.equal(new, x) and len(tried) == 15


def test_6_all_tasks_at_once_equal_a_loop_over_tasks():
    args, net, x, chain = problem(second_order=False, inner_steps=2, method="meta-sgd")
    for i in range(3):
        one = [m.Batch(*(field[i : i + 1] for field in b)) for b in chain.batches]
        for together, single in zip(chain.phis, m.readapt(net, x, one, args).phis):
            assert (together[i] - single[0]).abs().max() < 1e-12
    assert (chain.phis[-1] - chain.phis[0]).abs().max() > 1e-4


def test_the_oracle_has_the_same_loss_and_gradient():
    """tests/oracles/maml_rl.py: one task after the other, nn.Module, double backward."""
    path = Path(__file__).parent / "oracles" / "maml_rl.py"
    spec = importlib.util.spec_from_file_location("maml_oracle", path)
    oracle = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(oracle)
    args, net, x, chain = problem(torch.float32, hidden=16, inner_grad="loglik")
    loss, _, g = m.meta_gradient(net, chain, None, args)
    policy, p = oracle.Policy(2, 2, 16), net.unflatten(x.chunk(2)[0])
    weights = {f"net.{2 * l}.weight": p[f"w{l}"].T for l in range(3)}
    biases = {f"net.{2 * l}.bias": p[f"b{l}"] for l in range(3)}
    policy.load_state_dict(weights | biases | {"log_std": p["log_std"]})
    params = dict(policy.named_parameters())
    trains, tests = ([(b.obs[i], b.action[i], b.adv[i], (b.weight[i] > 0).float()) for i in range(3)]
                     for b in chain.batches)
    V = chain.batches[1]
    olds = [oracle.Independent(Normal(mean, log_std.exp()), 1) for mean, log_std in zip(V.mean, V.log_std)]
    theirs, _ = oracle.surrogate(policy, params, trains, tests, olds, args.inner_lr, True)
    grads = dict(zip(params, torch.autograd.grad(theirs, [*params.values()])))
    ours = net.unflatten(g.chunk(2)[0])
    assert (theirs - loss).abs() < 1e-5
    for l in range(3):
        assert (grads[f"net.{2 * l}.weight"].T - ours[f"w{l}"]).norm() < 1e-4 * ours[f"w{l}"].norm()


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
    # one episode of an environment that does not move; huge observations, which are clipped; NaN, which shows
    stuck = m.linear_baseline(torch.full((1, H, 1, 3), 0.3), torch.randn(1, H, 1), torch.ones(1, H, 1))
    assert stuck.isfinite().all()
    huge = m.linear_baseline(obs.sign() * 1e18, ret, mask)
    assert torch.equal(huge, m.linear_baseline(obs.sign() * 10, ret, mask))
    assert m.linear_baseline(obs * math.nan, ret, mask).isnan().all()


def test_8_gae_by_hand():
    r, v = torch.tensor([1.0, 2, 4]).view(1, 3, 1), torch.tensor([0.5, 1, 2]).view(1, 3, 1)
    A = m.gae(r, v, torch.ones(1, 3, 1), 0.5, 0.5)  # delta: 1, 2, 2
    assert A.flatten().tolist() == [1 + (2 + 2 / 4) / 4, 2 + 2 / 4, 2]
    # the second step is the last: what stands after it counts for nothing, its value bootstraps nothing
    A = m.gae(r, v, torch.tensor([1.0, 1, 0]).view(1, 3, 1), 0.5, 0.5)
    assert A.flatten().tolist() == [1 + 1 / 4, 1, 0]


def test_9_steps_after_the_end_change_nothing():
    args, net, x, chain = problem(horizon=12)
    phi, D = chain.phis[0], chain.batches[0]
    mask = (torch.arange(12)[None, :, None] < torch.tensor([5, 12, 9, 7])).to(D.adv).expand(3, 12, 4)
    reward = torch.randn(3, 12, 4, **F64) * mask
    more = lambda y: torch.cat([y, 100 * torch.randn(3, 8, *y.shape[2:], **F64)], 1)
    none = torch.zeros(3, 8, 4, **F64)
    padded = more(D.obs), more(D.action), *(torch.cat([y, none], 1) for y in (reward, mask))
    obs, action = (torch.where(mask[..., None] > 0, y, 7) for y in (D.obs, D.action))
    played = lambda obs, action, *rest: (obs, action, *net(phi.detach(), obs), *rest)
    a = m.process(played(D.obs, D.action, reward, mask), args)
    for other in (padded, (obs, action, reward, mask)):
        b = m.process(played(*other), args)
        assert torch.allclose(a.adv * mask, b.adv[:, :12] * mask, atol=1e-9)
        assert torch.allclose(a.scale, b.scale)
        assert (b.adv[b.weight == 0] == 0).all()
        for kind in ("loglik", "ratio", "dice"):
            args.inner_grad = kind
            ends = [m.readapt(net, x, [batch, batch], args).phis[1] for batch in (a, b)]
            assert torch.allclose(*ends, atol=1e-9) and not torch.equal(ends[0], phi)
    assert a.weight.sum((1, 2)).tolist() == pytest.approx([1, 1, 1])
    A = a.adv[0][mask[0] > 0]
    assert A.mean().abs() < 1e-12 and A.std(correction=0).item() == pytest.approx(1)


def test_9_rollout_masks_what_follows_the_end():
    args = small(num_episodes=200, num_tasks=2, horizon=30)
    env = m.make_env(args, 400)
    net, x, _ = m.build(args, env)
    theta = 0 * x.chunk(2)[0]
    p = net.unflatten(theta)
    p["b2"][:], p["log_std"][:] = torch.tensor([0.01, 0.005]), math.log(0.005)  # walks, almost straight
    tasks = torch.tensor([[0.2, 0.1], [0.5, 0.5]])
    obs, *_, reward, mask = m.rollout(env, net, theta.expand(2, -1), tasks, torch.randn(30, 2, 200, 2), args)
    ended = mask[0, -1] == 0
    assert 10 < ended.sum() < 200 and mask[1].all()
    first = mask[0].sum(0).long()  # steps that count; the last of them arrives
    for e in ended.nonzero().flatten()[:5].tolist():
        assert (reward[0, first[e] :, e] == 0).all() and (mask[0, : first[e], e] == 1).all()
        assert (obs[0, first[e], e] - tasks[0]).abs().max() < 0.01
    # row r belongs to task r // E: the first reward is the distance to that task's goal after the first step
    gap = (obs[:, 1] - tasks[:, None]).norm(dim=-1)
    assert torch.allclose(reward[:, 0], -gap, atol=1e-6)


# ---------------------------------------------------------------- what each method moves
@pytest.mark.parametrize("method, share", [("maml", 0), ("meta-sgd", 1), ("maesn", 8 / 188),
                                           ("pretrained", 0)])
def test_10_step_sizes_are_learned_where_the_method_says_so(method, share):
    args = small(method=method, inner_lr=0.1)
    env = m.make_env(args, 12)
    net, x, optimizer = m.build(args, env)
    before = x.clone()
    logs, returns = m.meta_update(env, net, x, optimizer, args)
    theta, alpha = (x != before).chunk(2)
    assert alpha.double().mean().item() == pytest.approx(share) and theta.double().mean() > 0.9
    assert len(returns) == 1 + (method != "pretrained")


def test_10_maesn_adapts_its_latent_alone():
    args, net, x, chain = problem(method="maesn")
    first, last = (net.unflatten(phi.detach()) for phi in chain.phis)
    assert all(torch.equal(first[k], last[k]) == (k != "z") for k in first)
    assert first["z"][0].norm().item() == pytest.approx(0.01)
    # the input is [o, z]: the same as an ordinary net that sees both
    obs = chain.batches[1].obs
    wide = torch.cat([obs, last["z"][:, None, None].expand(*obs.shape[:3], -1)], -1)
    plain = m.Net({k: shape for k, shape in net.shapes.items() if k != "z"}, None, "tanh")
    assert torch.allclose(plain(chain.phis[1][:, :-8], wide)[0], net(chain.phis[1], obs)[0], atol=1e-12)


# ---------------------------------------------------------------- small closed forms
def test_gaussian_kl():
    y, z = torch.randn(2, 5, 3, **F64)
    a, b = (Normal(mean, torch.rand(5, 3, **F64) + 0.1) for mean in (y, z))
    by_hand = ((b.scale / a.scale).log() + (a.variance + (y - z) ** 2) / (2 * b.variance) - 0.5).sum(-1)
    assert torch.allclose(m.gaussian_kl(y, a.scale.log(), z, b.scale.log()), by_hand)
    assert torch.allclose(by_hand, kl_divergence(a, b).sum(-1))


def test_clipped_surrogate_by_hand():
    ratio, adv = torch.tensor([0.5, 0.5, 2.0, 2.0]), torch.tensor([1.0, -1, 1, -1])
    shape = lambda x: x.view(4, 1, 1)
    loss = m.surrogate(shape(ratio.log()), torch.zeros(4, 1, 1), shape(adv), torch.ones(4, 1, 1), 0.3)
    assert loss.tolist() == pytest.approx([-0.5, 0.7, -1.3, 2.0])


def test_extra_terms_of_the_outer_loss():
    loss = lambda net, chain, args, **kw: m.outer_objective(net, chain, None, m.Args(**vars(args) | kw))[0]
    args, net, x, chain = problem(method="maesn")
    z = net.unflatten(chain.phis[-1])["z"]
    gap = loss(net, chain, args, latent_coef=3.0) - loss(net, chain, args, latent_coef=0.0)
    assert torch.allclose(gap, 3 * (z**2).mean(1)) and gap.std() > 0  # the adapted latent, not z_0
    args, net, x, chain = problem(outer="promp", inner_steps=2)
    moved = m.readapt(net, x + 0.01, chain.batches, args)
    kl = 0
    for phi, D in zip(moved.phis[:2], chain.batches):
        kl = kl + m.gaussian_kl(D.mean, D.log_std, *net(phi, D.obs)).mean((1, 2)) / 2
    gap = loss(net, moved, args, kl_coef=3.0) - loss(net, moved, args, kl_coef=0.0)
    assert torch.allclose(gap, 3 * kl) and (kl > 0).all()


def test_networks():
    assert sum(v.numel() for v in m.make_policy(2, 2, 64, 0).values()) == 4484
    assert sum(v.numel() for v in m.make_policy(20, 6, 64, 0).values()) == 5900
    net, x, _ = m.build(args := small(), m.make_env(args, 1))
    back = torch.cat([p.flatten(1) for p in net.unflatten(x.chunk(2)[0].expand(2, -1)).values()], 1)
    assert torch.equal(back, x.chunk(2)[0].expand(2, -1))


# ---------------------------------------------------------------- evaluation
def test_evaluation_shrinks_later_steps_and_holds_its_tasks():
    args = small(eval_tasks=4)
    net, x, _ = m.build(args, m.make_env(args, 1))
    state = torch.get_rng_state()
    tasks, batches = m.evaluate(args, net, x)
    assert torch.equal(torch.get_rng_state(), state) and len(batches) == 4
    args.seed = 2
    assert torch.equal(m.evaluate(args, net, x)[0], tasks)  # the same goals for every seed
    chain = m.readapt(net, x, batches, args)
    whole = m.readapt(net, x, batches, m.Args(**vars(args) | dict(eval_later_lr=1.0)))
    step = lambda c, k: c.phis[k + 1] - c.phis[k]
    assert torch.equal(step(chain, 0), step(whole, 0))
    assert torch.allclose(step(chain, 1), 0.5 * step(whole, 1), atol=1e-6)
    assert step(chain, 1).abs().max() > 1e-3


def test_held_out_tasks_stand_for_all_tasks():
    """Both directions equally often, goals and speeds as far out as on average."""
    held_out = lambda env: m.make_env(small(env=env), 1).sample_tasks(40, "test")
    assert held_out("nav2d").norm(dim=1).mean().item() == pytest.approx(0.3826, rel=0.04)
    pytest.importorskip("mujoco")
    assert held_out("half_cheetah_vel").mean().item() == pytest.approx(1, abs=0.02)
    assert held_out("half_cheetah_dir").sum() == 0


def test_a_row_for_each_task_where_tasks_repeat():
    ret = torch.tensor([1.0, 5, 3, 6, 8])
    batches = [SimpleNamespace(ret=ret.view(5, 1, 1))] * 3
    rows = m.statistics("eval", torch.tensor([[1.0], [1], [1], [-1], [-1]]), batches)
    assert set(rows) == {"eval", "eval/task_-1", "eval/task_1"}
    assert rows["eval/task_1"][0].tolist() == [3] * 3 and rows["eval/task_-1"][0].tolist() == [7] * 3
    assert rows["eval"][0].tolist() == [5] * 3  # the two directions count the same
    halves = 1.96 * 2 / math.sqrt(3), 1.96 * math.sqrt(2) / math.sqrt(2)
    assert rows["eval/task_1"][1].tolist() == pytest.approx([halves[0]] * 3)
    assert rows["eval"][1].tolist() == pytest.approx([math.hypot(*halves) / 2] * 3)
    rows = m.statistics("eval", torch.arange(5)[:, None], batches)  # different tasks: one interval over them
    assert set(rows) == {"eval"} and rows["eval"][0][0].item() == pytest.approx(4.6)
    assert rows["eval"][1][0].item() == pytest.approx(1.96 * ret.std().item() / math.sqrt(5))
