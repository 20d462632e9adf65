"""Meta-MAPG: each equation against closed forms, enumeration of all outcomes or finite differences.

The iterated prisoner's dilemma of most tests is played by the tables X (ours) and Y (the peer's), with their
own step sizes .1 and 1; the expected numbers were computed once, independently of the script."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import meta_mapg as m
from envs.matrix_games import CLASSES, SPLITS, MatrixGame, draw_personas

torch.set_num_threads(1)
X = torch.tensor([[0.1, -0.2], [0.3, 0], [-0.4, 0.2], [0, 0.5], [0.25, -0.1]], dtype=torch.float64)
Y = torch.tensor([[0.2, 0.8], [0.4, 0.6], [0.1, 0.9], [0.35, 0.65], [0.3, 0.7]], dtype=torch.float64).log()
IPD = MatrixGame("ipd", 1).reward_table
RPS = MatrixGame("rps", 1).reward_table


def arguments(**kw):
    """Args as train() would see them; the gradient is exact unless it is said otherwise."""
    return m.resolve(m.Args(**dict(dict(chain_length=1, horizon=10, gamma=0.96, num_threads=1), **kw)))


def numbers(*x):
    return torch.tensor(x, dtype=torch.float64)


def grad(y, x, **kw):
    """dy/dx of the same shape as x, zeros where no path leads from x to y."""
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
    if not (g := grad(value, y, create_graph=True)).requires_grad:
        return torch.zeros(y.numel(), x.numel(), dtype=x.dtype)
    return torch.stack([grad(e, x, retain_graph=True).flatten() for e in g.flatten()])


# ---------------------------------------------------------------- the chain of learners, nothing sampled
def toy(x, y, shaping, a=0.75):
    """V^i = x y = -V^j after one step of both; x, y (C,) -> V1 and its gradient by x, as the script chains
    them."""
    p, q = m.leaves({"x": x}), m.leaves({"y": y})
    value = torch.stack([p["x"] * q["y"], -p["x"] * q["y"]], 1)
    new = m.ascend([p, q], value, [a, a], True)
    v1 = new[0]["x"] * (new[1] if shaping else m.leaves(new[1]))["y"]
    return v1.detach(), torch.autograd.grad(v1.sum(), p["x"])[0]


def test_toy_game_gradients_with_and_without_peer_learning():  # T1, eq. (3)
    x, y = numbers(0.5, 0.2), numbers(-0.4, 0.9)
    for shaping, expected in (True, (-0.925, 0.09375)), (False, (-0.775, 0.75)):
        v1, g = toy(x, y, shaping)
        torch.testing.assert_close(v1, numbers(-0.155, 0.65625))
        torch.testing.assert_close(g, numbers(*expected))


def test_toy_game_with_peer_learning_wins_and_without_it_ends_in_nothing():  # T1
    line = (torch.arange(40, dtype=torch.float64) + 0.5) / 20 - 1  # x_0, y ~ U(-1, 1)
    start, y = torch.cartesian_prod(line, line).T
    curve = {}
    for shaping in (True, False):
        x, curve[shaping] = start, []
        for _ in range(800):
            v1, g = toy(x, y, shaping)
            curve[shaping].append(v1.mean().item())
            x = x + 0.01 * g
    assert abs(curve[True][-1] - 0.2713) < 1e-3
    torch.testing.assert_close(x, y / 0.75, atol=0.01, rtol=0)
    assert abs(max(curve[False]) - 0.1736) < 1e-3 and abs(np.argmax(curve[False]) - 92) <= 1
    assert abs(curve[False][-1]) < 0.003


def test_exact_value_of_known_tables():  # T2, eq. (8)
    uniform, mostly_c = torch.zeros(1, 5, 2).double(), numbers(0.25, 0.75).log().expand(1, 5, 2)
    for H in (1, 2, 7, 150):
        mean = m.exact_value(uniform, mostly_c, IPD, 1.0, H)[0] / H
        torch.testing.assert_close(mean, numbers(0.5, -0.25)[None])
    for H, v in (2, 0.98), (10, 4.189592050), (150, 12.472609815):
        assert abs(m.exact_value(uniform, mostly_c, IPD, 0.96, H)[0][0, 0] - v) < 1e-8
    for H, v in (2, (1.1669362587, -0.6385133501)), (10, (4.2600814563, -1.9823920691)):
        torch.testing.assert_close(m.exact_value(X[None], Y[None], IPD, 0.96, H)[0][0], numbers(*v))


def test_exact_value_equals_the_forward_recursion_for_every_horizon():  # eq. (8): its doubling of powers
    torch.manual_seed(0)
    for reward, S, A in (IPD, 5, 2), (RPS, 10, 3):
        x, y = torch.randn(2, 3, S, A, dtype=torch.float64)
        P = (x.softmax(-1)[..., :, None] * y.softmax(-1)[..., None, :]).flatten(2)
        d, value, visits = F.one_hot(torch.zeros(3, dtype=torch.long), S).double(), 0.0, 0.0
        for t in range(20):
            d = F.pad(torch.einsum("cs,csn->cn", d, P), (1, 0))
            value, visits = value + 0.9**t * d @ reward.double(), visits + 0.9**t * d[:, 1:]
            got = m.exact_value(x, y, reward, 0.9, t + 1)
            torch.testing.assert_close(got[0], value)
            torch.testing.assert_close(got[1], visits)


def chain(x, args, y=Y, eta=None):
    """sum_l V^i(phi_l) over the scored l, and the joint policies, from the script's own chain."""
    x = x if x.requires_grad else x.clone().requires_grad_()  # the inner steps differentiate by it
    eta = torch.full((1, args.chain_length), 0.1, dtype=x.dtype) if eta is None else eta
    loss, policies = m.exact_chain({"logits": x[None]}, eta, y[None, None], IPD, args)
    return -loss[0] * len(policies), policies  # the loss is divided by the number of batches


def chain_gradient(args, x=X):
    x = x.clone().requires_grad_()
    total, policies = chain(x, args)
    return grad(total, x), m.exact_value(*policies[-1], IPD, args.gamma, args.horizon)[0][0, 0].item()


META_GRADIENTS = [  # L, H, --peer-learning, V^i(phi_L), gradient by the logits of C
    (1, 2, True, 1.0095055620, (-0.30948909, -0.07586982, -0.06227196, -0.05161744, -0.03904844)),
    (1, 2, False, 1.0095055620, (-0.28199962, -0.03690741, -0.09873619, -0.02386972, -0.06768096)),
    (1, 10, True, 1.4199096492, (-0.44994607, -1.3105156, -0.47277281, -1.10447417, -0.29871598)),
    (1, 10, False, 1.4199096492, (-0.36596897, -0.55680521, -0.83750197, -0.44710605, -0.60704197)),
    (2, 10, True, -1.5526780480, (-0.90621671, -3.39515017, -0.19942895, -3.08943831, 0.53224540)),
]


@pytest.mark.parametrize("L, H, peer, value, expected", META_GRADIENTS)
def test_exact_meta_gradient(L, H, peer, value, expected):  # T3
    g, v = chain_gradient(arguments(chain_length=L, horizon=H, peer_learning=peer))
    assert abs(v - value) < 1e-9
    torch.testing.assert_close(g[:, 1], numbers(*expected), atol=1e-8, rtol=0)
    torch.testing.assert_close(g[:, 0], -g[:, 1])


@pytest.mark.parametrize("L", [1, 2])
def test_exact_meta_gradient_and_that_of_eta_equal_finite_differences(L):  # T3, eq. (3)
    args, eta = arguments(chain_length=L), torch.linspace(0.1, 0.4, L, dtype=torch.float64)[None]
    x, free = X.clone().requires_grad_(), eta.clone().requires_grad_()
    g = torch.autograd.grad(chain(x, args, eta=free)[0], [x, free])
    torch.testing.assert_close(g[0], central(lambda x: chain(x, args, eta=eta)[0], X), atol=1e-8, rtol=0)
    torch.testing.assert_close(g[1], central(lambda e: chain(X, args, eta=e)[0], eta), atol=1e-8, rtol=0)
    assert g[1].abs().min() > 0.01


def frozen(which, args):
    """sum_l V^i with one side's later policies held at their values for X; the other side's move with x."""
    held = chain(X, args)[1]

    def f(x):
        pairs = zip(held[1:], chain(x, args)[1][1:])
        xy = [(h[0], n[1]) if which == "own" else (n[0], h[1]) for h, n in pairs]
        return sum(m.exact_value(*p, IPD, args.gamma, args.horizon)[0][0, 0] for p in xy).detach()

    return f


@pytest.mark.parametrize("L", [1, 2])
def test_without_own_learning_only_the_peers_later_policies_move(L):  # T3, [D6]
    args = arguments(chain_length=L, own_learning=False)
    g = chain_gradient(args)[0]
    torch.testing.assert_close(g, central(frozen("own", args), X), atol=1e-8, rtol=0)
    whole = chain_gradient(arguments(chain_length=L))[0]
    if L == 1:  # one step only: the two ablations add up to the whole
        torch.testing.assert_close(g + chain_gradient(arguments(peer_learning=False))[0], whole)
    assert (g - whole).norm() > 0.1


def test_lola_looks_ahead_with_the_peer_alone_and_reinforce_not_at_all():  # [D6]
    value = lambda x, y: m.exact_value(x[None], y[None], IPD, 0.96, 10)[0][0]

    def ahead(x, steps):
        y = Y.clone().requires_grad_()
        for _ in range(steps):
            y = y + grad(value(x, y)[1], y, create_graph=True)
        return value(x, y)[0].detach()

    for method, steps in ("lola-dice", 1), ("lola-dice", 3), ("reinforce", 0):
        g = chain_gradient(arguments(method=method, look_ahead=max(steps, 1), chain_length=2))[0]
        torch.testing.assert_close(g, central(lambda x, n=steps: ahead(x, n), X), atol=1e-8, rtol=0)


def test_where_payoffs_add_up_the_peer_term_is_zero():  # T5
    v = lambda reward, *xy: m.exact_value(*xy, reward, 0.96, 1)[0][0, 1]
    x, y = X[None].clone().requires_grad_(), Y[None].clone().requires_grad_()
    assert mixed(v(IPD, x, y), y, x).abs().max() < 1e-16  # one-shot dilemma: V^j = -.5 + 2 p - q
    torch.testing.assert_close(chain_gradient(arguments(horizon=1))[0],
                               chain_gradient(arguments(horizon=1, peer_learning=False))[0])
    torch.manual_seed(0)
    x, y = torch.randn(2, 1, 10, 3, dtype=torch.float64).requires_grad_().unbind()
    assert mixed(v(RPS, x, y), y, x).abs().max() > 0.01
    pennies = torch.tensor([[0, 0], [1, -1], [-1, 1], [-1, 1], [1, -1.0]])
    x, y = X[None].clone().requires_grad_(), Y[None].clone().requires_grad_()
    assert mixed(v(pennies, x, y), y, x).abs().max() > 0.01


# ---------------------------------------------------------------- DiCE and the estimators, by enumeration
def histories(x, y, H=2):
    """All joint histories of H steps as chains of one episode: players, batch, their probabilities."""
    actions = torch.tensor(list(itertools.product(range(2), repeat=2 * H))).view(-1, H, 1, 2)  # (C, H, 1, N)
    index = 1 + 2 * actions[..., 0] + actions[..., 1]
    state = torch.cat([torch.zeros_like(index[:, :1]), index[:, :-1]], 1)
    players = [{"logits": p.expand(len(actions), -1, -1)} for p in (x, y)]
    batch = m.Batch(state, actions, IPD[index].double())
    return players, batch, m.log_probs(players, batch).sum((1, 2, 3)).exp().detach()


def test_dice_has_the_value_and_the_derivatives_of_the_expectation():  # T4, eq. (2)
    torch.manual_seed(0)
    x, y = X.clone().requires_grad_(), Y.clone().requires_grad_()
    value = m.exact_value(x[None], y[None], IPD, 0.96, 2)[0][0]
    players, batch, p = histories(x, y)
    assert len(p) == 16 and abs(p.sum() - 1) < 1e-14
    logprob, reward = m.log_probs(players, batch), batch.reward.movedim(-1, 1)
    both = logprob.sum(1, keepdim=True).expand_as(logprob)
    by_state = torch.randn(2, 5, 2, dtype=torch.float64)  # an arbitrary b^a(t, s)
    baseline = by_state[torch.arange(2)[:, None], batch.state].movedim(-1, 1)  # (16, N, H, 1)
    exact_y = numbers(-0.17823092, -0.02647031, -0.03970547, -0.01858835, -0.06863391)
    for b in baseline, torch.zeros_like(baseline):
        shaped = p @ m.dice_objective(both, reward, b, 0.96)
        own = p @ m.dice_objective(logprob, reward, b, 0.96)
        for objective in shaped, own:
            torch.testing.assert_close(objective.detach(), value.detach(), atol=1e-14, rtol=0)
            for a, z in (0, x), (1, y):  # each agent by its own parameters
                g = grad(objective[a], z, retain_graph=True)
                torch.testing.assert_close(g, grad(value[a], z, retain_graph=True), atol=1e-14, rtol=0)
            g = grad(objective[1], y, retain_graph=True)[:, 1]
            torch.testing.assert_close(g, exact_y, atol=1e-8, rtol=0)
        second = mixed(value[1], y, x)
        assert second.abs().max() > 0.01
        torch.testing.assert_close(mixed(shaped[1], y, x), second, atol=1e-14, rtol=0)
        assert mixed(own[1], y, x).abs().max() == 0  # own nodes: the peer's step ignores us


PENNIES = torch.tensor([[[1, -1], [-1, 1]], [[-1, 1], [1, -1]]]).double()  # [a^i, a^j] -> r^i, r^j


def after_all_outcomes(K, dice):
    """One-shot matching pennies, all 4^K batches of K episodes: log-probs, probabilities, phi_1, x. Without
    dice the step is that of log pi * r, in which the samples do not depend on x."""
    x = numbers(0.2, -0.3)[None, None].requires_grad_()
    actions = torch.tensor(list(itertools.product(range(2), repeat=2 * K))).view(-1, 1, K, 2)
    players = [{"logits": p.expand(len(actions), -1, -1)} for p in (x, numbers(-0.5, 0.4)[None, None])]
    players[1]["logits"] = players[1]["logits"].clone().requires_grad_()
    batch = m.Batch(torch.zeros_like(actions[..., 0]), actions, PENNIES[actions[..., 0], actions[..., 1]])
    logprob, reward = m.log_probs(players, batch), batch.reward.movedim(-1, 1)
    nodes = logprob.sum(1, keepdim=True).expand_as(logprob)
    objective = m.dice_objective(nodes, reward, torch.zeros_like(reward), 0.96)
    objective = objective if dice else (logprob * reward).sum(2).mean(2)
    new = m.ascend(players, objective, [0.1, 1.0], True)
    return logprob, logprob.sum((1, 2, 3)).exp(), new, x


ESTIMATORS = [  # K, true gradient, "last", "code", E V^i(phi_1)
    (1, 0.24848960, 0.24423993, 0.28212212, -0.09908194),
    (2, 0.25873995, 0.25804638, 0.27583662, -0.10600853),
    (3, 0.26297130, 0.26271466, 0.27438825, -0.10837535),
    (4, 0.26524257, 0.26511605, 0.27380300, -0.10958257),
]


@pytest.mark.parametrize("K, true, last, code, value", ESTIMATORS)
def test_expectation_of_the_estimators(K, true, last, code, value):  # T6, eq. (5), [D2]
    expected = lambda new: torch.einsum("ca,cb,ab->c", *(p["logits"][:, 0].softmax(-1) for p in new),
                                        PENNIES[..., 0])
    _, prob, new, x = after_all_outcomes(K, dice=False)
    v = prob @ expected(new)  # score form: the update's samples are held, their probability moves
    assert abs(v - value) < 1e-8 and abs(grad(v, x)[0, 0, 1] - true) < 1e-8

    for estimator, wanted in ("last", last), ("code", code):
        lp_0, prob, new, x = after_all_outcomes(K, dice=True)
        loss = 0.0
        for a in itertools.product(range(2), repeat=2):  # the four outcomes of tau_1
            action = torch.tensor(a).expand(4**K, 1, K, 2)
            batch = m.Batch(torch.zeros_like(action[..., 0]), action, None)
            lp_1 = m.log_probs(new, batch)
            weight = (prob * lp_1[..., 0].sum((1, 2)).exp()).detach()
            adv = PENNIES[a][0].expand(4**K, 1, K)
            loss = loss + weight @ m.outer_loss([lp_0, lp_1], [None, adv], estimator=estimator)
        assert abs(-grad(loss, x)[0, 0, 1] - wanted) < 1e-8


def test_expected_update_is_the_limit_of_many_episodes():  # T6, K = infinity
    x, y = numbers(0.2, -0.3)[None, None].requires_grad_(), numbers(-0.5, 0.4)[None, None].requires_grad_()
    v = lambda x, y: torch.einsum("a,b,abn->n", x[0, 0].softmax(-1), y[0, 0].softmax(-1), PENNIES)[None]
    new = m.ascend([{"logits": x}, {"logits": y}], v(x, y), [0.1, 1.0], True)
    after = v(*(p["logits"] for p in new))[0, 0]
    assert abs(after + 0.11332484) < 1e-8 and abs(grad(after, x)[0, 0, 1] - 0.27272626) < 1e-8


@pytest.mark.parametrize("own, peer", [(True, True), (False, True), (True, False)])
def test_outer_loss_equals_its_sum_written_out(own, peer):  # eq. (5)
    torch.manual_seed(0)
    C, N, H, K, L = 2, 3, 4, 5, 3
    lp, adv = torch.randn(L + 1, C, N, H, K).double(), torch.randn(L + 1, C, H, K).double()
    for estimator in "last", "code":
        expected = torch.zeros(C, dtype=torch.float64)
        for l in range(1, L + 1):
            score = lp[0, :, 0] if estimator == "code" else 0.0
            for n in range(1 if estimator == "code" else l, l + 1):
                score = score + own * lp[n, :, 0] + peer * (lp[n, :, 1] + lp[n, :, 2])
            expected -= (score * adv[l]).sum((1, 2)) / K
        got = m.outer_loss(list(lp), [None, *adv[1:]], own, peer, estimator)
        torch.testing.assert_close(got, expected)
    got = m.outer_loss(list(lp[:1]), list(adv[:1]), own, peer)  # REINFORCE scores phi_0 itself
    torch.testing.assert_close(got, -(lp[0, :, 0] * adv[0]).sum((1, 2)) / K)


# ---------------------------------------------------------------- worlds and personas
def test_landmarks_of_fixed_strategies_against_personas():  # T7
    pool = [draw_personas(("defective", "cooperative"), 5, 2, seed) for seed in range(40)]
    cooperate = {"all-D": [0] * 5, "all-C": [1] * 5, "uniform": [0.5] * 5}
    landmarks = {"cooperative": (1.023, 0.023, 0.511), "defective": (-0.023, -1.023, -0.511)}
    for name, expected in landmarks.items():
        y = torch.cat([split[name] for population in pool for split in population.values()]).double()
        for pc, value in zip(cooperate.values(), expected):
            pc = torch.tensor(pc, dtype=torch.float64)
            x = torch.stack([1 - pc, pc], -1).clamp(min=1e-30).log().expand(len(y), 5, 2)
            mean = m.exact_value(x, y, IPD, 1.0, 150)[0][:, 0].mean() / 150
            assert abs(mean - value) < 0.01, (name, pc)  # a standard error is .0025


def test_landmarks_of_rock_paper_scissors():  # T7
    for preferred, (name, best) in enumerate(zip(CLASSES["rps"], (1, 2, 0))):
        pools = [draw_personas(CLASSES["rps"], 10, 3, seed) for seed in range(20)]
        y = torch.cat([split[name] for pool in pools for split in pool.values()]).double()
        means = []
        for action in range(3):
            x = torch.full((len(y), 10, 3), -60.0).double()
            x[..., action] = 0
            means.append(m.exact_value(x, y, RPS, 1.0, 50)[0][:, 0].mean().item() / 50)
        assert np.argmax(means) == best and abs(means[best] - 0.529) < 0.015
        assert abs(means[preferred]) < 1e-3
        uniform = m.exact_value(torch.zeros(len(y), 10, 3).double(), y, RPS, 1.0, 50)[0]
        assert uniform.abs().max() < 1e-12


def test_rewards_and_coding_of_states():  # T7
    env = MatrixGame("ipd", 4, horizon=2, index_obs=True)
    assert (env.reset()[0] == 0).all()
    D, C = 0, 1
    obs, reward, _, truncated, _ = env.step(torch.tensor([[D, D, C, C], [D, C, D, C]]))
    assert obs[0].tolist() == obs[1].tolist() == [1, 2, 3, 4] and not truncated.any()
    assert reward.tolist() == [[-0.5, -0.5], [1.5, -1.5], [-1.5, 1.5], [0.5, 0.5]]
    assert set(IPD[1:].sum(1).tolist()) == {-1, 0, 1}
    assert env.step(torch.tensor([[D, D, C, C], [D, C, D, C]]))[3].all()
    env = MatrixGame("rps", 9, index_obs=True)
    env.reset()
    own, other = torch.cartesian_prod(torch.arange(3), torch.arange(3)).T
    obs, reward, *_ = env.step([own, other])
    assert obs[0].tolist() == list(range(1, 10))
    assert reward[:, 0].tolist() == [0, -1, 1, 1, 0, -1, -1, 1, 0]


@pytest.mark.parametrize("name", ["rps", "rps3", "rps4"])
def test_rock_paper_scissors_is_zero_sum_and_averages_over_pairs(name):  # T7
    env = MatrixGame(name, 1, index_obs=True)
    N = env.num_agents
    assert env.states == 1 + 3**N and env.reward_table.sum(1).abs().max() < 1e-6
    env.reset()
    action = [0] + [1] * (N - 1)  # rock among papers
    obs, reward, *_ = env.step([torch.tensor([a]) for a in action])
    assert obs[0].item() == 1 + sum(a * 3 ** (N - 1 - i) for i, a in enumerate(action))
    torch.testing.assert_close(reward[0], torch.tensor([-1.0] + [1 / (N - 1)] * (N - 1)))
    assert env.sample_tasks(6).shape == (6, N - 1, env.states, 3)


@pytest.mark.parametrize("game, S, A", [("ipd", 5, 2), ("rps", 10, 3)])
@pytest.mark.parametrize("ood", [False, True])
def test_personas_prefer_their_action_and_the_splits_are_apart(game, S, A, ood):  # T7
    personas, again, other = (draw_personas(CLASSES[game], S, A, seed, ood) for seed in (0, 0, 1))
    for a, name in enumerate(CLASSES[game]):
        p = {split: personas[split][name].softmax(-1) for split in SPLITS}
        assert {split: len(v) for split, v in p.items()} == {"train": 200, "val": 20, "test": 20}
        every = torch.cat(list(p.values()))
        assert every.shape == (240, S, A) and len(every.flatten(1).unique(dim=0)) == 240
        own, rest = every[..., a], every[..., [b for b in range(A) if b != a]]
        assert 1 / A - 1e-6 <= own.min() and own.max() <= 1 and own.min() < 1 / A + 0.01 and own.max() > 0.99
        assert abs(own.mean() - (1 + 1 / A) / 2) < 0.02
        assert (rest.amax(-1) - rest.amin(-1)).max() < 1e-6
        extreme = {split: (own := v[..., a]).logit().mean(1) for split, v in p.items()}
        beyond = extreme["test"].min() > torch.cat([extreme["train"], extreme["val"]]).max()
        assert beyond == ood
        for split in SPLITS:
            assert torch.equal(personas[split][name], again[split][name])
            assert not torch.equal(personas[split][name], other[split][name])


def test_personas_from_a_file_are_the_ones_played(tmp_path):
    drawn = draw_personas(CLASSES["ipd"], 5, 2, seed=3)
    arrays = {f"{name}_{split}": v.numpy() for split in SPLITS for name, v in drawn[split].items()}

    def made(**changed):
        np.savez(tmp_path / "p.npz", **{k: v for k, v in (arrays | changed).items() if v is not None})
        return MatrixGame("ipd", 1, personas=tmp_path / "p.npz")

    for split in SPLITS:
        for name, tasks in made().tasks_by_class(split).items():
            assert torch.equal(tasks[:, 0], drawn[split][name])
    infinite = np.full((3, 5, 2), -np.inf)
    for bad, words in [(None, "no array defective_val"), (np.zeros((3, 10, 2)), "must be finite, .n, 5, 2."),
                       (np.zeros((0, 5, 2)), "must be finite"), (infinite, "must be finite")]:
        with pytest.raises(ValueError, match=words):
            made(defective_val=bad)
    with pytest.raises(ValueError, match="cannot be read"):
        MatrixGame("ipd", 1, personas=tmp_path / "missing.npz")
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(ValueError, match="cannot be read"):
        MatrixGame("ipd", 1, personas=tmp_path / "text.npz")


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
    torch.testing.assert_close(m.returns_to_go(r, gamma), ret)
    torch.testing.assert_close(m.gae(r, v, gamma, lam), adv)
    torch.testing.assert_close(m.gae(r, 0 * v, gamma, 1.0), ret)


def test_baseline_is_the_regression_on_all_features():  # T9, eq. (1), [D1]
    torch.manual_seed(0)
    C, N, H, K, S, gamma, ridge = 2, 2, 7, 9, 5, 0.9, 1e-5
    state = torch.randint(S, (C, H, K))
    reward = torch.randn(C, N, H, K).double() + state[:, None]
    fits = {s: m.linear_baseline(state, reward, S, gamma, scrambled=s) for s in (False, True)}
    for c, a in itertools.product(range(C), range(N)):
        rows, aligned, scrambled = [], [], []
        ret = m.returns_to_go(reward[c, a], gamma)
        for t, k in itertools.product(range(H), range(K)):  # time-major rows
            o = F.one_hot(state[c, t, k], S).double()
            rows.append(torch.cat([o, o**2, numbers(t / 100, (t / 100) ** 2, (t / 100) ** 3, 1)]))
            aligned.append(ret[t, k])
            scrambled.append(ret.T.flatten()[t * K + k])  # batch-major targets: row k' H + t'
        x = torch.stack(rows)
        ridged = torch.cat([x, math.sqrt(ridge) * torch.eye(2 * S + 4).double()])
        for s, target in (False, aligned), (True, scrambled):
            target = torch.stack(target)
            padded = torch.cat([target, torch.zeros(2 * S + 4).double()])
            expected = x @ torch.linalg.lstsq(ridged, padded[:, None]).solution[:, 0]
            torch.testing.assert_close(fits[s][c, a].flatten(), expected, atol=1e-7, rtol=0)
            if not s:
                r2 = 1 - (target - expected).square().sum() / (target - target.mean()).square().sum()
                assert r2 > 0.1


# ---------------------------------------------------------------- the LSTM
def lstm_params(C, S, outputs, hidden=6, dtype=torch.float64, gaussian=False):
    """C different networks with random biases, which make_lstm leaves at zero."""
    shape = m.lstm_shapes(S, outputs, hidden, gaussian)
    return {k: (0.6 * torch.randn(C, *v)).to(dtype).requires_grad_() for k, v in shape.items()}


def reference(p, state):
    """The network by torch.nn.LSTMCell, one chain at a time, on (C, T, K) or (C, T, K, S) states."""
    out = []
    for c, states in enumerate(state):
        q = {k: v[c] for k, v in p.items()}
        S, hidden = q["w1"].shape[1], q["w1"].shape[0]
        cell, memory = torch.nn.LSTMCell(hidden, hidden), None
        weights = dict(weight_ih=q["w_ih"], weight_hh=q["w_hh"], bias_ih=q["b_ih"], bias_hh=q["b_hh"])
        for s in states:
            x = (s if s.is_floating_point() else F.one_hot(s, S)).to(q["w1"])
            z = F.relu(F.linear(x, q["w1"], q["b1"]))
            memory = torch.func.functional_call(cell, weights, (z, memory) if memory else (z,))
            out.append(F.linear(memory[0], q["w2"], q["b2"]))
    return torch.stack(out).view(*state.shape[:3], -1)


@pytest.mark.parametrize("kind", ["index", "numbers"])
def test_lstm_equals_torch_lstm_cell_with_its_first_and_second_derivatives(kind):  # T9
    torch.manual_seed(0)
    p, state = lstm_params(3, 5, 2), torch.randint(5, (3, 4, 7))
    state = torch.randn(3, 4, 7, 5) if kind == "numbers" else state
    results = []
    for net in m.lstm_outputs, reference:
        out = net(p, state)
        first = torch.autograd.grad(out.log_softmax(-1).square().sum(), p.values(), create_graph=True)
        second = torch.autograd.grad(sum(g.pow(3).sum() for g in first), p.values())
        results.append([out, *first, *second])
    for name, ours, torchs in zip(["outputs", *p, *p], *results):
        torch.testing.assert_close(ours, torchs, msg=lambda e, name=name: f"{name}: {e}")
    if kind == "numbers":
        p["log_std"] = torch.zeros(3, 2)
    with torch.no_grad():  # the same net step by step, as rollout() plays it
        step = m.player(p)
        if kind == "numbers":  # then it says the means
            played = torch.stack([step(s) for s in state.unbind(1)], 1)
            return torch.testing.assert_close(played, reference(p, state))
        played = torch.stack([step(s) for s in state.unbind(1)], 1)
        torch.testing.assert_close(played, reference(p, state).softmax(-1))
        torch.testing.assert_close(m.log_policy(p, state).exp(), played)
        assert not torch.allclose(m.player(p)(state[:, 1]), played[:, 1])  # it has a memory


def test_recurrence_passes_gradcheck_and_gradgradcheck():  # T9
    torch.manual_seed(0)
    C, S, T, K, H = 2, 3, 4, 2, 2
    table = torch.randn(C, S, 4 * H, dtype=torch.float64, requires_grad=True)
    w = torch.randn(C, 4 * H, H, dtype=torch.float64, requires_grad=True)
    rows = torch.randint(S, (C, T, K)) + S * torch.arange(C)[:, None, None]
    scan = lambda table, w: m.LSTMScan.apply(table, w, rows)
    assert torch.autograd.gradcheck(lambda *x: scan(*x)[:3], (table, w))  # h, gates, c
    assert torch.autograd.gradgradcheck(lambda *x: scan(*x)[0], (table, w))
    z = torch.randn(C, T, K, 4 * H, dtype=torch.float64, requires_grad=True)  # inputs in place of a table
    scan = lambda z, w: m.LSTMScan.apply(z, w, None)
    assert torch.autograd.gradcheck(lambda *x: scan(*x)[:3], (z, w))
    assert torch.autograd.gradgradcheck(lambda *x: scan(*x)[0], (z, w))


def test_networks_have_the_papers_sizes_and_initialisation():  # section 3 of the paper's code
    sizes = [(5, 2, False, 33_794), (5, 1, False, 33_729), (10, 3, False, 34_179), (17, 3, True, 34_630),
             (17, 1, False, 34_497)]
    for states, outputs, gaussian, count in sizes:
        p = m.make_lstm(states, outputs, gaussian=gaussian)
        assert sum(v.numel() for v in p.values()) == count
        assert all((v == 0).all() for k, v in p.items() if k.startswith("b") or k == "log_std")
        for k in "w_ih", "w_hh":
            assert abs(p[k].std() - math.sqrt(2 / (256 + 64))) < 0.003


# ---------------------------------------------------------------- the outer step
def test_amsgrad_steps():  # T10, eq. (7)
    for g, ours, torchs in (1.0, -0.96935, -0.99900), (0.01, -0.24025, -0.90909):
        assert abs(m.AMSGrad(1, 1.0, "cpu").step(torch.tensor([g])).item() - ours) < 1e-5
        p = torch.zeros(1, requires_grad=True)
        p.grad = torch.tensor([g])
        torch.optim.Adam([p], lr=1.0, eps=1e-3, amsgrad=True).step()
        assert abs(p.item() - torchs) < 1e-5
    torch.manual_seed(0)
    grads = 1e6 * torch.randn(60, 3) * torch.linspace(1, 0.01, 60)[:, None]  # eps vanishes beside these
    ours, p = m.AMSGrad(3, 0.1, "cpu"), torch.zeros(3, requires_grad=True)
    adam = torch.optim.Adam([p], lr=0.1, amsgrad=True)
    for g in grads:
        before, p.grad = p.detach().clone(), g
        adam.step()
        torch.testing.assert_close(ours.step(g), p.detach() - before, rtol=1e-4, atol=1e-6)


def test_pcgrad_removes_conflicts_and_nothing_else():  # T11, eq. (6)
    both = torch.tensor([[0, 1], [1, 0]])
    got = m.pcgrad(torch.tensor([[1.0, 0], [-1, 1]]), both)
    torch.testing.assert_close(got, torch.tensor([[0.5, 0.5], [0, 1]]))
    agreeing = torch.tensor([[1.0, 0], [1, 1]])
    assert torch.equal(m.pcgrad(agreeing, both), agreeing)
    torch.manual_seed(0)
    g, order = torch.randn(5, 4), torch.rand(5, 5).argsort(1)
    expected = g.clone()
    for i in range(5):  # the running gradient against the original ones, in its own order
        for j in order[i].tolist():
            expected[i] -= min(expected[i] @ g[j] / (g[j] @ g[j] + 1e-8), 0) * g[j]
    torch.testing.assert_close(m.pcgrad(g, order), expected)
    assert (expected - g).norm(dim=1).max() > 0.1


def test_clip_scales_long_gradients_only():  # eq. (6)
    g = torch.tensor([[30.0, 40.0], [0.3, 0.4]])
    clipped, norm = m.clip(g, 10.0)
    torch.testing.assert_close(clipped, torch.tensor([[6.0, 8.0], [0.3, 0.4]]))
    torch.testing.assert_close(norm, torch.tensor([50.0, 0.5]))


# ---------------------------------------------------------------- sampled chains: what depends on what
def sampled(game="ipd", C=2, policy="table", tasks=None, theta=None, psi=None, part=None, **kw):
    """The pieces of one sampled_chain in float64: losses, batches, and the leaves they may depend on."""
    kw = dict(dict(chain_length=2, num_episodes=4, horizon=5, ent_coef=0.0), **kw)
    args = arguments(env=game, policy=policy, gradient="sampled", num_chains=C, **kw)
    first, n = part or (0, C)  # of C chains, those that this process would own
    env = m.make_env(args, n * args.num_episodes)
    S, A = env.states, env.actions
    if theta is None and policy == "table":
        theta, psi = {"logits": torch.randn(C, S, A)}, {"values": torch.randn(C, S, 1)}
    elif theta is None:
        hidden = 6 if env.discrete else 64  # as the peers' there
        theta, psi = lstm_params(C, S, A, hidden, gaussian=not env.discrete), lstm_params(C, S, 1, hidden)
    tasks = env.sample_tasks(C) if tasks is None else tasks
    double = lambda p: m.leaves({k: v[first : first + n].double() for k, v in p.items()})
    theta, psi = double(theta), double(psi or {"values": torch.zeros(C, S, 1)})
    eta = torch.full((n, args.chain_length), args.inner_lr, dtype=torch.float64, requires_grad=True)
    part = tasks[first : first + n].double()
    loss, critic_loss, batches = m.sampled_chain(env, theta, eta, psi, part, args, (first, C))
    return SimpleNamespace(args=args, theta=theta, psi=psi, eta=eta, tasks=tasks, env=env, batches=batches,
                           loss=loss, critic_loss=critic_loss)


def gradients(run, loss=None):
    """Of both losses by everything, (C, P)."""
    every = [*run.theta.values(), run.eta, *run.psi.values()]
    loss = (run.loss + run.critic_loss).sum() if loss is None else loss
    return torch.cat([grad(loss, p, retain_graph=True).flatten(1) for p in every], 1)


def spy(monkeypatch):
    """What outer_loss is given: a list that fills up with (log-probs, advantages)."""
    calls, real = [], m.outer_loss

    def outer_loss(logprobs, advantages, *rest):
        calls.append((logprobs, advantages))
        return real(logprobs, advantages, *rest)

    monkeypatch.setattr(m, "outer_loss", outer_loss)
    return calls


@pytest.mark.parametrize("policy", ["table", "lstm"])
@pytest.mark.parametrize("shaping", [True, False])
def test_our_parameters_reach_the_peers_only_by_shaping(policy, shaping, monkeypatch):  # T12
    torch.manual_seed(0)
    calls = spy(monkeypatch)
    run = sampled(policy=policy, peer_learning=shaping)
    (logprobs, advantages), = calls
    for l, logprob in enumerate(logprobs):
        by_theta = [grad(logprob[:, 1].sum(), p, retain_graph=True) if logprob[:, 1].requires_grad else 0 * p
                    for p in run.theta.values()]
        by_eta = grad(logprob[:, 0].sum(), run.eta, retain_graph=True)
        assert any((g != 0).any() for g in by_theta) == (shaping and l > 0)
        assert [(by_eta[:, n] != 0).all().item() for n in range(2)] == [l > 0, l > 1]
    assert advantages[0] is None and not any(a.requires_grad for a in advantages[1:])


@pytest.mark.parametrize("policy", ["table", "lstm"])
def test_the_two_losses_share_no_parameters(policy):  # T12
    torch.manual_seed(0)
    run = sampled(policy=policy)
    own = len(torch.cat([p.flatten(1) for p in [*run.theta.values(), run.eta]], 1)[0])
    actor, critic = (gradients(run, loss.sum()) for loss in (run.loss, run.critic_loss))
    assert (actor[:, own:] == 0).all() and (actor[:, :own] != 0).any()
    assert (critic[:, :own] == 0).all() and (critic[:, own:] != 0).any()


@pytest.mark.parametrize("policy", ["table", "lstm"])
def test_training_and_test_take_the_same_step(policy):  # T12, eqs. (1)-(3)
    torch.manual_seed(0)
    run = sampled(policy=policy, horizon=8)
    players = [run.theta, *m.peers_of(run.tasks.double())]
    steps = []
    for shaping, graph in itertools.product((True, False), repeat=2):
        lrs = [run.eta[:, 0], 1.0]
        logprob, new = m.inner_update(players, run.batches[0], lrs, run.args, 5, shaping, graph)
        assert new[0][next(iter(new[0]))].requires_grad  # by eta, at least
        steps.append(torch.cat([v.flatten() for p in new for v in p.values()]))
        peer = new[1]["logits"][:, 0, 0].sum()
        depends = [(grad(peer, p, retain_graph=True) != 0).any() for p in run.theta.values()]
        assert any(depends) == (graph and shaping)
    for step in steps[1:]:
        torch.testing.assert_close(step, steps[0])
    assert (steps[0] - torch.cat([v.flatten() for p in players for v in p.values()])).abs().max() > 0.01
    reward = run.batches[0].reward.movedim(-1, 1).double().requires_grad_()
    assert not m.linear_baseline(run.batches[0].state, reward, 5, 0.96).requires_grad


def test_step_equals_the_plain_policy_gradient():  # eq. (3)
    torch.manual_seed(0)
    run = sampled(horizon=6)
    players, batch = [run.theta, *m.peers_of(run.tasks.double())], run.batches[0]
    _, new = m.inner_update(players, batch, [run.eta[:, 0], None], run.args, 5, True, True)
    assert new[1] is players[1]  # None: stands still
    reward = batch.reward.movedim(-1, 1).double()
    b = m.linear_baseline(batch.state, reward, 5, 0.96)[:, 0]
    weight = 0.96 ** torch.arange(6.0).double()[:, None] * (m.returns_to_go(reward[:, 0], 0.96) - b)
    surrogate = (m.log_probs(players, batch)[:, 0] * weight).sum(1).mean(1)
    g = grad(surrogate.sum(), run.theta["logits"])
    torch.testing.assert_close(new[0]["logits"], run.theta["logits"] + 0.1 * 10 * g)


def test_losses_of_critic_and_entropy_in_closed_form():  # [D2]: what surrounds eq. (5)
    theta, psi = {"logits": torch.zeros(2, 5, 2)}, {"values": torch.full((2, 5, 1), 0.7)}
    runs = []
    for weight in 0.0, 0.5:
        torch.manual_seed(0)
        runs.append(sampled(theta=theta, psi=psi, ent_coef=weight))
    bonus = runs[1].loss - runs[0].loss
    torch.testing.assert_close(bonus, -0.5 * 5 * math.log(2) / 3 * torch.ones(2).double())  # H ln 2 / (L + 1)
    ret = [m.returns_to_go(batch.reward[..., 0].double(), 0.96) for batch in runs[0].batches]
    expected = sum(((0.7 - r) ** 2).mean((1, 2)) for r in ret[1:]) / 3  # phi_0 is not scored
    torch.testing.assert_close(runs[0].critic_loss, expected, rtol=1e-6, atol=0)


# ---------------------------------------------------------------- sampled chains: the numbers
def test_sampled_inner_gradient_equals_the_exact_one():  # T13
    torch.manual_seed(0)
    C, K = 40, 500  # 20,000 episodes
    args = arguments(gradient="sampled", num_episodes=K)
    env = m.make_env(args, C * K)
    players = [m.leaves({"logits": p}, C) for p in (X, Y)]
    batch = m.rollout(env, players, K)
    new = m.inner_update(players, batch, [1.0, 1.0], args, 5, True, False)[1]
    x, y = X[None].clone().requires_grad_(), Y[None].clone().requires_grad_()
    value = m.exact_value(x, y, IPD, 0.96, 10)[0][0]
    for a, z in (0, x), (1, y):
        g = new[a]["logits"] - players[a]["logits"]
        error = (g.mean(0) - grad(value[a], z, retain_graph=True)[0]) / (g.std(0) / math.sqrt(C))
        assert error.abs().max() < 4
        assert (g.std(0) / math.sqrt(C)).max() < 0.03 * g.mean(0).norm()  # else it shows nothing
    mean = (batch.reward * 0.96 ** torch.arange(10.0)[:, None, None]).sum(1).mean((0, 1))
    torch.testing.assert_close(mean.double(), value.detach(), atol=0.05, rtol=0)


VARIANTS = [dict(), dict(own_learning=False), dict(method="meta-pg"), dict(method="lola-dice"),
            dict(method="reinforce"), dict(chain_length=2), dict(estimator="code"), dict(opponent_model=True)]


@pytest.mark.parametrize("kw", VARIANTS, ids=lambda kw: str(kw)[1:-1] or "whole")
def test_sampled_meta_gradient_equals_the_exact_one(kw):  # T13: eqs. (1)-(5) against (8)
    torch.manual_seed(0)
    C, gamma = 100, 1 - 1e-9  # eq. (5) has no weights gamma^t, so only gamma = 1 has the gradient of V
    kw = dict(dict(gamma=gamma, gae_lambda=1.0, horizon=3, inner_lr=0.5, peer_lr=3.0, chain_length=1), **kw)
    start = dict(theta={"logits": X.expand(C, 5, 2)}, tasks=Y.expand(C, 1, 5, 2))
    run = sampled(**start, C=C, num_episodes=400, **kw)
    g = gradients(run, run.loss.sum())[:, :10]
    exact = m.leaves({"logits": X}, 1)
    eta = torch.full((1, run.args.chain_length), 0.5, dtype=torch.float64)
    kw.pop("opponent_model", None)  # a model that fits is as good as the peer itself
    loss = m.exact_chain(exact, eta, Y[None, None], IPD, arguments(**kw))[0]
    error = g.std(0) / math.sqrt(C)
    distance = lambda wanted: ((g.mean(0) - wanted) / error).abs().max()
    assert distance(grad(loss, exact["logits"]).flatten()) < 4
    if kw.get("method") not in ("meta-pg", "reinforce") and run.args.own_learning:
        loss = m.exact_chain(exact, eta, Y[None, None], IPD, arguments(**kw, peer_learning=False))[0]
        assert distance(grad(loss, exact["logits"]).flatten()) > 6  # a missing peer term would be seen


def test_batched_chains_equal_one_chain_at_a_time():  # T13
    for policy in "lstm", "table":
        torch.manual_seed(0)
        whole = sampled(policy=policy, C=3)
        given = dict(policy=policy, C=3, theta=whole.theta, psi=whole.psi, tasks=whole.tasks)
        torch.manual_seed(1)
        batched = gradients(sampled(**given))
        for c in range(3):
            torch.manual_seed(1)
            alone = gradients(sampled(**given, part=(c, 1)))
            torch.testing.assert_close(alone[0], batched[c])
        assert (batched[0] - batched[1]).abs().max() > 1e-3


def test_equal_personas_and_equal_random_numbers_give_equal_gradients(monkeypatch):  # T13
    torch.manual_seed(0)
    first = sampled(policy="lstm", C=1)
    same = lambda p: {k: v.expand(3, *v.shape[1:]) for k, v in p.items()}
    given = dict(policy="lstm", C=3, theta=same(first.theta), psi=same(first.psi),
                 tasks=first.tasks.expand(3, 1, 5, 2))
    different = gradients(sampled(**given))
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda H, C, *rest, **kw: rand(H, 1, *rest, **kw).expand(H, C, *rest))
    equal = gradients(sampled(**given))
    for c in 1, 2:
        torch.testing.assert_close(equal[c], equal[0])
        assert (different[c] - different[0]).abs().max() > 1e-3


OPTIONS = [dict(), dict(policy="lstm"), dict(method="meta-pg"), dict(opponent_model=True)]


@pytest.mark.parametrize("kw", OPTIONS, ids=["table", "lstm", "meta-pg", "opponent-model"])
def test_recomputing_saves_memory_and_changes_no_gradient(kw):  # T13, --recompute
    torch.manual_seed(0)
    start = sampled(**kw)
    results = []
    for recompute in False, True:
        torch.manual_seed(1)
        results.append(gradients(sampled(theta=start.theta, psi=start.psi, tasks=start.tasks,
                                         recompute=recompute, **kw)))
    torch.testing.assert_close(results[1], results[0])


def test_critic_learns_and_all_stays_finite():  # T14
    torch.manual_seed(0)
    args = arguments(policy="lstm", num_chains=4, num_episodes=8, horizon=20, chain_length=2, critic_lr=0.01,
                     outer_lr=1e-5)  # the policy hardly moves, and the critic has one task to learn
    env = m.make_env(args, 4 * 8)
    tasks = env.tasks_by_class("train")["defective"][:4]
    env.sample_tasks = lambda n: tasks
    params, optimizers = m.build(args, env)
    every = [v for p in params.values() for v in p.values()]
    before, losses = [v.clone() for v in every], []
    for _ in range(25):
        logs, reward = m.outer_update(env, params, optimizers, args)
        assert all(math.isfinite(v) for v in logs.values()) and reward.isfinite().all()
        assert reward.shape == (3, 2)
        losses.append(logs["losses/critic"].item())
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:3])
    assert all(v.isfinite().all() and not torch.equal(v, w) for v, w in zip(every, before))


# ---------------------------------------------------------------- opponent modelling, more than two agents
def observed(shares, frequency, n=4000):
    """A batch of one chain in which the share of each state and the peer's P(action 1) there are given."""
    state = torch.arange(len(shares)).repeat_interleave((torch.tensor(shares) * n).round().long())
    action = torch.zeros_like(state)
    for s, f in enumerate(frequency):
        seen = (state == s).nonzero()[:, 0]
        action[seen[: round(f * len(seen))]] = 1
    return m.Batch(state.view(1, 1, -1), torch.stack([1 - action, action], -1).view(1, 1, -1, 2), None)


@pytest.mark.parametrize("shares", [(0.01, 0.24, 0.25, 0.25, 0.25), (0.01, 0.9, 0.05, 0.03, 0.01)],
                         ids=["even", "mostly-one-state"])
def test_fitted_opponent_has_the_frequencies_of_the_actions_seen(shares):  # eq. (9)
    torch.manual_seed(0)
    frequency = (0.5, 0.6, 0.3, 0.8, 0.5)
    batch = observed(shares, frequency)
    seen = [i for i, share in enumerate(shares) if share >= 0.2]
    start = torch.randn(1, 5, 2)
    got = m.fit_opponent({"logits": start}, batch, agent=1)["logits"][0].softmax(-1)[:, 1]
    torch.testing.assert_close(got[seen], torch.tensor(frequency)[seen], atol=0.02, rtol=0)
    mirrored = m.fit_opponent({"logits": start}, batch, agent=0)["logits"][0].softmax(-1)[:, 0]
    torch.testing.assert_close(mirrored[seen], got[seen], atol=0.02, rtol=0)


def test_fitted_opponent_keeps_the_derivative_of_the_model():  # eq. (9)
    x = torch.randn(1, 5, 2, requires_grad=True)
    fit = m.fit_opponent({"logits": 3 * x}, observed((0.2,) * 5, (0.5,) * 5), agent=1)["logits"]
    assert (fit - 3 * x).abs().max() > 0.1
    weight = torch.randn(1, 5, 2)
    torch.testing.assert_close(grad((weight * fit).sum(), x), 3 * weight)
    unseen = m.fit_opponent({"logits": x}, observed((1.0, 0, 0, 0, 0), (0.5,) * 5), agent=1)["logits"]
    torch.testing.assert_close(unseen[:, 1:], x[:, 1:])  # nothing was learned about the other states


@pytest.mark.parametrize("game", ["ipd", "rps3"])
def test_opponent_model_carries_the_gradient_in_place_of_the_peers(game, monkeypatch):  # eq. (9)
    calls = spy(monkeypatch)
    fitted, real = [], m.fit_opponent
    monkeypatch.setattr(m, "fit_opponent", lambda *a: fitted.append((a[2], real(*a))) or fitted[-1][1])
    torch.manual_seed(0)
    run = sampled(game, opponent_model=True, own_learning=False, num_episodes=64)
    N = run.env.num_agents
    assert run.loss.isfinite().all() and [agent for agent, _ in fitted] == 3 * list(range(1, N))
    for l, logprob in enumerate(calls[0][0]):  # the terms of the peers are those of their models
        for j in range(1, N):
            index = run.batches[l].action[..., j, None]
            model = fitted[l * (N - 1) + j - 1][1]
            model = m.log_policy(model, run.batches[l].state).gather(-1, index)[..., 0]
            torch.testing.assert_close(logprob[:, j], model)
            by_theta = [grad(logprob[:, j].sum(), p, retain_graph=True) if logprob.requires_grad else 0 * p
                        for p in run.theta.values()]
            assert any((g != 0).any() for g in by_theta) == (l > 0)
    assert (gradients(run, run.loss.sum())[:, : run.theta["logits"][0].numel()] != 0).any()


@pytest.mark.parametrize("game", ["rps3", "rps4"])
def test_each_of_many_agents_follows_its_own_reward(game):  # eq. (3)
    torch.manual_seed(0)
    run = sampled(game, chain_length=1)
    N, S = run.env.num_agents, run.env.states
    assert run.loss.shape == (2,) and gradients(run).isfinite().all()
    assert run.batches[0].action.shape == (2, 5, 4, N)
    players = [run.theta, *m.peers_of(run.tasks.double())]

    def step(batch):
        new = m.inner_update(players, batch, [run.eta[:, 0]] + [1.0] * (N - 1), run.args, S, True, True)[1]
        return [p["logits"] for p in new]

    before = step(run.batches[0])
    for a in range(N):
        scale = torch.ones(N)
        scale[a] = 5.0
        after = step(run.batches[0]._replace(reward=run.batches[0].reward * scale))
        assert [not torch.allclose(p, q) for p, q in zip(before, after)] == [b == a for b in range(N)]
    for peer in before[1:]:  # and we shape each of them
        assert (grad(peer.square().sum(), run.theta["logits"], retain_graph=True) != 0).any()


# ---------------------------------------------------------------- two-agent HalfCheetah, Gaussian LSTMs
def peers(n, scale=0.2, seed=0):
    """n weight vectors of peers, all different."""
    draw = torch.Generator().manual_seed(seed)
    size = sum(math.prod(shape) for shape in m.PEER.values())
    return scale * torch.randn(n, size, generator=draw)


@pytest.fixture(scope="module")
def personas(tmp_path_factory):
    """A population in a file: one random peer, and 324 that differ from it in one weight."""
    path = tmp_path_factory.mktemp("peers") / "peers.npz"
    weights = (peers(1, 0.05) / m.GRID).round().short().repeat(len(m.KEPT), 1)
    weights[torch.arange(len(m.KEPT)), torch.arange(len(m.KEPT))] += 100
    m.write_population(path, weights, torch.zeros(500))
    return str(path)


def cheetah(personas, C=2, seed=0, **kw):
    """sampled() in half_cheetah_dir, with peers and step sizes that make all terms large."""
    torch.manual_seed(seed)
    kw = dict(dict(peer_lr=0.5, inner_lr=0.5, tasks=peers(C)[:, None], num_episodes=3), **kw)
    return sampled("half_cheetah_dir", C, "lstm", personas=personas, **kw)


def test_gaussian_policy_is_that_of_torch():  # spec of the policy
    torch.manual_seed(0)
    p, state = lstm_params(2, 5, 3, gaussian=True), torch.randn(2, 4, 6, 5, dtype=torch.float64)
    action = 2 * torch.randn(2, 4, 6, 3, dtype=torch.float64)
    pi = torch.distributions.Normal(reference(p, state), p["log_std"].exp()[:, None, None])
    torch.testing.assert_close(m.log_prob(p, state, action), pi.log_prob(action).sum(-1))
    torch.testing.assert_close(m.entropy(p, state).expand(2, 4, 6), pi.entropy().sum(-1))
    noise = torch.randn(2, 6, 3, dtype=torch.float64)
    drawn = m.draw(p, pi.mean[:, 1], noise)
    torch.testing.assert_close((drawn - pi.mean[:, 1]) / pi.stddev[:, 0], noise)
    narrow = {**p, "log_std": torch.full((2, 3), -100.0).double()}
    assert m.log_prob(narrow, state, pi.mean).isfinite().all()  # sigma stops at 1e-6
    torch.testing.assert_close(m.std_of(narrow), torch.full((2, 1, 1, 3), 1e-6).double())


def test_entropy_of_categorical_policies_is_that_of_torch():
    p, state = lstm_params(2, 5, 3), torch.randint(5, (2, 4, 6))
    expected = torch.distributions.Categorical(logits=reference(p, state)).entropy()
    torch.testing.assert_close(m.entropy(p, state), expected)


def test_baseline_of_numbers_is_the_regression_on_all_features():  # eq. (1)
    torch.manual_seed(0)
    C, N, H, K, S, gamma, ridge = 2, 2, 7, 9, 4, 0.9, 1e-5
    state, reward = torch.randn(C, H, K, S).double(), torch.randn(C, N, H, K).double()
    reward = reward + state[:, None, ..., 0] - state[:, None, ..., 1] ** 2
    got = m.linear_baseline(state, reward, S, gamma)
    for c, a in itertools.product(range(C), range(N)):
        o, t = state[c].flatten(0, 1), (torch.arange(H) / 100.0).double().repeat_interleave(K)[:, None]
        x = torch.cat([o, o**2, t, t**2, t**3, t**0], 1)
        ret = m.returns_to_go(reward[c, a], gamma).flatten()
        w = torch.linalg.lstsq(torch.cat([x, math.sqrt(ridge) * torch.eye(2 * S + 4).double()]),
                               torch.cat([ret, torch.zeros(2 * S + 4).double()])[:, None]).solution[:, 0]
        torch.testing.assert_close(got[c, a].flatten(), x @ w, atol=1e-6, rtol=0)
        assert (ret - x @ w).var() < 0.9 * ret.var()


def by_hand(run, c):
    """The losses of chain c written out on what it has recorded: nothing of the script's but the baseline and
    the advantage. eqs. (2), (3), (5)"""
    args, theta = run.args, {k: v[c : c + 1] for k, v in run.theta.items()}
    psi = {k: v[c : c + 1] for k, v in run.psi.items()}
    players = [theta, m.peers_of(run.tasks[c : c + 1].double())[0]]
    discount = args.gamma ** torch.arange(args.horizon).double()[:, None]
    loss = critic_loss = 0.0
    for l, batch in enumerate(run.batches):
        batch = m.Batch(*(x[c : c + 1] for x in batch))
        pi = [torch.distributions.Normal(reference(p, batch.state), p["log_std"].exp()[:, None, None])
              for p in players]
        lp = [pi[a].log_prob(batch.action[..., a, :]).sum(-1)[0] for a in range(2)]  # (H, K)
        reward = batch.reward.movedim(-1, 1).double()
        if l:
            value = reference(psi, batch.state)[..., 0]
            adv = m.gae(reward[:, 0], value.detach(), args.gamma, args.gae_lambda)[0]
            score = lp[0] + lp[1] if args.peer_learning else lp[0]
            loss = loss - (adv * score).sum(0).mean()
            critic_loss = critic_loss + (value[0] - m.returns_to_go(reward[0, 0], args.gamma)).square().mean()
        if l < len(run.batches) - 1:
            b, new = m.linear_baseline(batch.state, reward, 17, args.gamma)[0], []
            for a, lr in (0, run.eta[c, l]), (1, args.peer_lr):
                node = lp[0] + lp[1] if args.peer_learning else lp[a]
                box = lambda z: (z - z.detach()).exp()
                objective = discount * (box(node.cumsum(0)) * reward[0, a] + (1 - box(node)) * b[a])
                objective = objective.sum(0).mean()
                g = torch.autograd.grad(objective, [*players[a].values()], create_graph=True)
                new.append({k: v + lr * d for (k, v), d in zip(players[a].items(), g)})
            players = new if args.peer_learning else [new[0], m.leaves(new[1])]
    return loss / len(run.batches), critic_loss / len(run.batches)


@pytest.mark.parametrize("kw", [dict(), dict(method="meta-pg"), dict(recompute=True)], ids=str)
def test_cheetah_losses_and_gradients_equal_those_written_out(kw, personas):  # eqs. (1)-(5)
    run = cheetah(personas, **kw)
    ours = gradients(run)
    for c in range(2):
        loss, critic_loss = by_hand(run, c)
        torch.testing.assert_close(run.loss[c], loss)
        torch.testing.assert_close(run.critic_loss[c], critic_loss)
        every = [*run.theta.values(), run.eta, *run.psi.values()]
        wanted = torch.cat([grad(loss + critic_loss, p, retain_graph=True)[c].flatten() for p in every])
        assert wanted.norm() > 1e-3
        assert (ours[c] - wanted).norm() < 1e-6 * wanted.norm()
    if not kw:  # the peer term is there to be seen
        mine = torch.cat([p.flatten(1) for p in run.theta.values()], 1).shape[1]
        other = cheetah(personas, method="meta-pg")
        assert (gradients(other)[:, :mine] - ours[:, :mine]).norm() > 0.01 * ours[:, :mine].norm()


@pytest.mark.parametrize("shaping", [True, False])
def test_cheetah_peer_feels_us_only_by_shaping(shaping, personas, monkeypatch):  # T12
    calls = spy(monkeypatch)
    run = cheetah(personas, peer_learning=shaping)
    for l, logprob in enumerate(calls[0][0]):
        by_theta = [grad(logprob[:, 1].sum(), p, retain_graph=True) if logprob[:, 1].requires_grad else 0 * p
                    for p in run.theta.values()]
        assert any((g != 0).any() for g in by_theta) == (shaping and l > 0)


def test_cheetah_chains_side_by_side_equal_one_at_a_time(personas):  # T13
    whole = cheetah(personas, C=3)
    given = dict(C=3, theta=whole.theta, psi=whole.psi, tasks=whole.tasks)
    batched = gradients(cheetah(personas, **given, seed=1))
    for c in range(3):
        alone = gradients(cheetah(personas, **given, seed=1, part=(c, 1)))
        torch.testing.assert_close(alone[0], batched[c], rtol=1e-5, atol=1e-9)
    assert (batched[0] - batched[1]).norm() > 1e-3 * batched[0].norm()


def test_cheetah_runs_to_the_right_with_peers_and_to_the_left_without(personas):
    for kw, direction in (dict(personas=personas), 1), (dict(pretrain_peers=True), -1):
        args = arguments(env="half_cheetah_dir", num_episodes=2, **kw)
        env = m.make_env(args, 2)
        obs = env.reset(part=(0, 2))
        assert [o.shape for o in obs] == [(2, 17)] * 2
        action = [torch.tensor([[0.1, -2.0, 0.3]] * 2), torch.tensor([[5.0, 0.2, 0.0]] * 2)]
        before = env.world.state[:, 1].copy()
        reward = env.step(action)[1]
        v = (env.world.state[:, 1] - before) / 0.05
        cost = 0.1 * (0.1**2 + 1 + 0.3**2 + 1 + 0.2**2)
        expected = torch.tensor((direction * v - cost) / 100).float()[:, None].expand(2, 2)
        torch.testing.assert_close(reward, expected)
        assert abs(v).min() > 0.01
        torch.testing.assert_close(m.per_episode(reward, args), expected * 1000)  # H = 10


def test_the_population_we_ship_is_the_default_and_its_absence_is_one_line(monkeypatch, tmp_path, capsys):
    env = m.make_env(m.resolve(m.Args(env="half_cheetah_dir")), 1)
    assert env.population.shape == (len(m.KEPT), sum(math.prod(shape) for shape in m.PEER.values()))
    apart = (env.population[1:] - env.population[:-1]).abs().amax(1)
    assert (apart > 0).all(), "each iteration of pre-training has moved the weights"
    monkeypatch.setattr(m, "POPULATION", tmp_path / "peers.npz")
    with pytest.raises(SystemExit) as stop:
        m.resolve(m.Args(env="half_cheetah_dir"))
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "--pretrain-peers" in said and said.count("\n") == 1


def test_populations_survive_the_file_and_have_the_splits_of_the_authors(personas, tmp_path):
    assert [len(m.SPLITS[s]) for s in ("train", "val", "test")] == [275, 25, 25] and len(set(m.KEPT)) == 325
    assert sorted(m.SPLITS["train"] + m.SPLITS["val"]) == list(range(300))
    weights = (peers(325, 1.0) / m.GRID).round().short()
    m.write_population(tmp_path / "p.npz", weights, torch.arange(500.0))
    first = (tmp_path / "p.npz").read_bytes()
    read = m.read_population(str(tmp_path / "p.npz"))
    assert torch.equal(read, weights * m.GRID)
    m.write_population(tmp_path / "p.npz", weights, torch.arange(500.0))
    assert (tmp_path / "p.npz").read_bytes() == first
    args = arguments(env="half_cheetah_dir", personas=personas)
    env, whole = m.make_env(args, 1), m.read_population(personas)
    test = env.tasks_by_class("test")["left"]
    assert test.shape == (25, 1, 34_630) and torch.equal(test[0, 0], whole[300])
    assert torch.equal(env.tasks_by_class("val")["left"][1, 0], whole[9])
    torch.manual_seed(0)
    base = torch.cat([whole[1, :1], whole[0, 1:]])  # peer n differs from it in weight n
    seen = {int((p != base).nonzero()) for p in env.sample_tasks(200)[:, 0]}
    assert len(seen) > 100 and not seen & set(m.VALIDATION) and max(seen) < 300
    p, = m.peers_of(test[:2])
    assert {k: v.shape[1:] for k, v in p.items()} == m.PEER
    assert torch.equal(torch.cat([v.flatten(1) for v in p.values()], 1), test[:2, 0])
    m.write_population(tmp_path / "short.npz", weights[:40], torch.zeros(40))
    (tmp_path / "text.npz").write_text("no zip")
    for name, words in ("short", "wanted 325"), ("text", "cannot be read"), ("missing", "cannot be read"):
        with pytest.raises(ValueError, match=words):
            m.read_population(str(tmp_path / f"{name}.npz"))


def test_ppo_loss_by_hand():  # eq. (10)
    old, adv = torch.zeros(2, 1, 3), torch.tensor([[[1.0, -1.0, 2.0]]])
    new = torch.tensor([[[1.5, 1.5, 0.9]], [[0.5, 0.5, 1.1]]]).log().requires_grad_()
    loss = m.ppo_loss(new, old, adv)
    assert abs(loss.item() + (1.2 - 1.5 + 1.8 + 0.5 - 0.8 + 2.2) / 6) < 1e-6
    clipped = grad(loss, new) == 0  # beyond the trust region in the direction of gain: no pull
    assert clipped.tolist() == [[[True, False, False]], [[False, True, False]]]


def test_pretraining_learns_records_who_played_and_goes_on_bit_by_bit(tmp_path):  # [D7]
    kw = dict(env="half_cheetah_dir", pretrain_peers=True, num_episodes=4, horizon=8, num_threads=1,
              save_every=3)
    start = lambda folder, n, **more: m.train(m.Args(**kw, total_steps=n * 32, run_dir=str(folder), **more))
    whole = start(tmp_path / "whole", 6)
    start(tmp_path / "half", 3)
    again = start(tmp_path / "half", 6, resume=str(tmp_path / "half/checkpoint.pt"))
    other = start(tmp_path / "other", 6, seed=2)
    for group in whole:
        assert all(torch.equal(whole[group][k], again[group][k]) for k in whole[group])
        assert not all(torch.equal(whole[group][k], other[group][k]) for k in whole[group])
    one, two, three = ((tmp_path / d / "peers.npz").read_bytes() for d in ("whole", "half", "other"))
    assert one == two != three
    torch.manual_seed(1)  # the first peer is the untrained front leg
    args = m.resolve(m.Args(**kw))
    first = m.build(args, m.make_env(args, 4))[0]["theta"]
    with np.load(tmp_path / "whole" / "peers.npz") as data:
        stored = np.cumsum(data["steps"], 1).T * m.GRID
        assert data["returns"].shape == (6,) and stored.shape == (6, 34_630)
    flat = torch.cat([v[1].flatten() for v in first.values()])
    assert (torch.from_numpy(stored[0]) - flat).abs().max() <= m.GRID / 2 + 1e-7
    last = torch.cat([v[1].flatten() for v in whole["theta"].values()])
    assert (last - flat).abs().max() > 1e-3 > (torch.from_numpy(stored[5]) - last).abs().mean()
