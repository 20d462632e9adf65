"""
MAML with TRPO written the obvious way, as a yardstick for speed: one task after the other, a network through
torch.func.functional_call, the inner step kept as a graph, and the Hessian-vector product of the KL by double
backward, as in the public PyTorch implementations. The world of a task is the batched one, which flatters it.
"""

import torch
from torch import nn
from torch.distributions import Independent, Normal, kl_divergence
from torch.func import functional_call


class Policy(nn.Module):
    def __init__(self, obs_dim, action_dim, hidden):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(obs_dim, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(),
                                 nn.Linear(hidden, action_dim))
        self.log_std = nn.Parameter(torch.zeros(action_dim))

    def forward(self, obs):
        return Independent(Normal(self.net(obs), self.log_std.exp()), 1)


def episodes(env, policy, params, task, gamma):
    """obs, action, advantage, mask of E episodes of one task, (H, E, ...)."""
    with torch.no_grad():
        obs, alive, steps = env.reset(task.expand(env.num_envs, -1)), torch.ones(env.num_envs), []
        for _ in range(env.horizon):
            action = functional_call(policy, params, (obs,)).sample()
            following, reward, terminated, _, _ = env.step(action)
            steps.append((obs, action, reward[:, 0] * alive, alive))
            obs, alive = following, alive * ~terminated
        obs, action, reward, mask = (torch.stack(x) for x in zip(*steps))
        ret = torch.zeros_like(reward)
        for t in reversed(range(env.horizon)):
            ret[t] = reward[t] + (gamma * ret[t + 1] if t + 1 < env.horizon else 0)
        time = (torch.arange(env.horizon) / 100).view(-1, 1, 1).expand(*reward.shape, 1)
        x = torch.cat([obs, obs**2, time, time**2, time**3, torch.ones_like(time)], -1)
        x = (x * mask[..., None]).flatten(0, 1).double()
        gram = x.T @ x + 1e-5 * torch.eye(x.shape[1])
        w = torch.linalg.lstsq(gram, x.T @ ret.double().view(-1, 1), driver="gelsd").solution
        adv = (ret - (x @ w).view_as(ret).float()) * mask  # lambda = 1: what is left of the return
        mean, n = adv.sum() / mask.sum(), mask.sum()
        adv = (adv - mean) * mask / (((adv - mean) * mask).square().sum() / n).sqrt()
    return obs, action, adv, mask


def adapted(policy, params, batch, inner_lr, create_graph):
    obs, action, adv, mask = batch
    loss = -(functional_call(policy, params, (obs,)).log_prob(action) * adv).sum() / mask.sum()
    grads = torch.autograd.grad(loss, [*params.values()], create_graph=create_graph)
    return {k: p - inner_lr * g for (k, p), g in zip(params.items(), grads)}


def surrogate(policy, params, trains, tests, olds, inner_lr, create_graph):
    """Loss and KL, means over the tasks, through their inner steps."""
    losses, kls = [], []
    for train, (obs, action, adv, mask), old in zip(trains, tests, olds):
        new = functional_call(policy, adapted(policy, params, train, inner_lr, create_graph), (obs,))
        ratio = (new.log_prob(action) - old.log_prob(action)).exp()
        losses.append(-(ratio * adv).sum() / mask.sum())
        kls.append((kl_divergence(old, new) * mask).sum() / mask.sum())
    return torch.stack(losses).mean(), torch.stack(kls).mean()


def flat(tensors):
    return torch.cat([x.reshape(-1) for x in tensors])


def meta_iteration(env, policy, tasks, gamma=0.99, inner_lr=0.1, delta=0.01, cg_iters=10, damping=1e-5):
    params = dict(policy.named_parameters())
    trains, tests, olds = [], [], []
    for task in tasks:
        trains.append(episodes(env, policy, params, task, gamma))
        after = adapted(policy, params, trains[-1], inner_lr, False)
        tests.append(episodes(env, policy, after, task, gamma))
        with torch.no_grad():
            olds.append(functional_call(policy, after, (tests[-1][0],)))
    args = (trains, tests, olds, inner_lr)
    loss, kl = surrogate(policy, params, *args, True)
    weights = [*params.values()]
    g = flat(torch.autograd.grad(loss, weights, retain_graph=True)).detach()
    by_kl = flat(torch.autograd.grad(kl, weights, create_graph=True))

    def product(v):
        return flat(torch.autograd.grad(by_kl @ v, weights, retain_graph=True)).detach() + damping * v

    x, r = torch.zeros_like(g), g.clone()
    p, rr = r, r @ r
    for _ in range(cg_iters):
        z = product(p)
        x, r = x + rr / (p @ z) * p, r - rr / (p @ z) * z
        p, rr = r + (r @ r) / rr * p, r @ r
    step, start = (2 * delta / (x @ product(x))).sqrt() * x, flat(weights).detach()
    for j in range(15):
        nn.utils.vector_to_parameters(start - 0.8**j * step, weights)
        new_loss, kl = surrogate(policy, params, *args, False)
        if new_loss < loss and kl <= delta:
            return
    nn.utils.vector_to_parameters(start, weights)
