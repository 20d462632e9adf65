"""
The meta-iteration of tesp.py written the obvious way, as the yardstick of its speed: one task after the
other, a GRU cell a time step with autograd through it, a task's whole batch through the policy at once. The
maths is that of tesp.meta_update with its defaults, and the noise is handed in, so that the weights after an
iteration can be compared. The env has a row for each episode of one task.
"""

import math

import numpy as np
import torch


def encode(p, buffer):
    """z (d,) of one task: p {name: tensor}, buffer a list of (return, features (T, F))."""
    if not buffer:
        return torch.zeros_like(p["bp"])
    units, length = len(p["wh"]), max(len(x) for _, x in buffer)
    x = torch.stack([torch.nn.functional.pad(x, (0, 0, 0, length - len(x))) for _, x in buffer])
    lengths = torch.tensor([len(x) for _, x in buffer])
    h = x.new_zeros(len(buffer), units)
    for t in range(length):
        gates = x[:, t] @ p["wx"] + p["b"]
        recurrent = h @ p["wh"][:, : 2 * units]
        z = (0.2 * (gates[:, :units] + recurrent[:, :units]) + 0.5).clamp(0, 1)
        r = (0.2 * (gates[:, units : 2 * units] + recurrent[:, units:]) + 0.5).clamp(0, 1)
        n = torch.tanh(gates[:, 2 * units :] + (r * h) @ p["wh"][:, 2 * units :])
        h = torch.where((t < lengths)[:, None], z * h + (1 - z) * n, h)
    return (h @ p["wp"] + p["bp"]).mean(0)


def policy(psi, obs, z):
    """A torch.distributions.Normal over actions (..., A)."""
    x = torch.cat([obs, z.expand(*obs.shape[:-1], -1)], -1)
    x = torch.tanh(x @ psi["w0"] + psi["b0"])
    x = torch.tanh(x @ psi["w1"] + psi["b1"])
    mean, log_std = (x @ psi["w2"] + psi["b2"]).chunk(2, -1)
    return torch.distributions.Normal(mean, log_std.exp())


@torch.no_grad()
def sample(env, psi, z, goal, noise):
    """One batch of one task; noise (H, E, A). -> a list of episodes, each a dict of (T, ...)."""
    obs = env.reset(goal.expand(env.num_envs, -1))
    steps, alive = [], torch.ones(env.num_envs, dtype=torch.bool)
    for t in range(env.horizon):
        pi = policy(psi, obs, z)
        action = pi.mean + pi.stddev * noise[t]
        after, reward, terminated, _, _ = env.step(action)
        logprob = pi.log_prob(action).sum(-1)
        steps.append((obs, action, pi.mean, pi.stddev.log(), reward[:, 0], logprob, alive))
        obs, alive = after, alive & ~terminated
    columns = [torch.stack(x) for x in zip(*steps)]
    names = ("obs", "action", "mean", "log_std", "reward", "logprob")
    return [{k: x[columns[-1][:, e], e] for k, x in zip(names, columns)} for e in range(env.num_envs)]


def discounted(x, factor):
    out = []
    for v in reversed(x):
        out.append(v + factor * out[-1] if out else v)
    return torch.stack(out[::-1])


def process(episodes, args):
    """Flat tensors of all steps, with advantages."""
    features, targets = [], []
    for e in episodes:
        o = e["obs"].double().clamp(-10, 10)
        t = torch.arange(len(o), dtype=torch.float64)[:, None] / 100
        features.append(torch.cat([o, o**2, t, t**2, t**3, torch.ones_like(t)], 1))
        targets.append(discounted(e["reward"], args.gamma).double())
    x, y = torch.cat(features), torch.cat(targets)[:, None]
    gram = x.T @ x + 1e-5 * torch.eye(x.shape[1], dtype=x.dtype)
    w = torch.linalg.lstsq(gram, x.T @ y, driver="gelsd").solution
    adv = []
    for e, f in zip(episodes, features):
        value = (f @ w)[:, 0].float()
        delta = e["reward"] + args.gamma * torch.cat([value[1:], value.new_zeros(1)]) - value
        adv.append(discounted(delta, args.gamma * args.gae_lambda))
    return {k: torch.cat([e[k] for e in episodes]) for k in episodes[0]} | {"adv": torch.cat(adv)}


def add(buffer, episodes, size):
    new = [(e["reward"].sum().item(), torch.cat([e["obs"], e["mean"], e["log_std"], e["reward"][:, None]], 1))
           for e in episodes]
    return sorted(buffer + new, key=lambda item: -item[0])[:size]


def adapted(phi, alpha, g):
    return {k: phi[k] - alpha[k].clamp(-0.1, 0.1) * g[k] for k in phi}


def fast_updates(env, phi, alpha, psi, goal, noise, args):
    """The inner procedure of one task -> g {name: tensor}, the buffer, V, mean returns of the phases."""
    g, buffer = {k: torch.zeros_like(v) for k, v in phi.items()}, []
    episodes = sample(env, psi, encode(phi, buffer), goal, noise(0))
    returns = [np.mean([e["reward"].sum().item() for e in episodes])]
    buffer = add(buffer, episodes, args.buffer_size)
    for k in range(args.inner_steps + 1):
        weights = {name: v.detach().requires_grad_() for name, v in adapted(phi, alpha, g).items()}
        with torch.no_grad():
            z = encode(weights, buffer)
        episodes = sample(env, psi, z, goal, noise(k + 1))
        returns.append(np.mean([e["reward"].sum().item() for e in episodes]))
        batch = process(episodes, args)
        if k == args.inner_steps:
            return g, buffer, batch, returns
        pi = policy(psi, batch["obs"], encode(weights, buffer))
        loss = -(pi.log_prob(batch["action"]).sum(-1) * batch["adv"]).mean()
        grads = torch.autograd.grad(loss, list(weights.values()))
        norm = math.sqrt(sum((x**2).sum().item() for x in grads))
        g = {name: g[name] + x * min(1, 60 / (norm + 1e-12)) for name, x in zip(g, grads)}
        buffer = add(buffer, episodes, args.buffer_size)


def task_loss(phi, alpha, psi, g, buffer, batch, args):
    """Clipped loss and KL(old || new) of one task, and the mean square of its embedding."""
    z = encode(adapted(phi, alpha, g), buffer)
    pi = policy(psi, batch["obs"], z)
    ratio = (pi.log_prob(batch["action"]).sum(-1) - batch["logprob"]).exp()
    clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
    old = torch.distributions.Normal(batch["mean"], batch["log_std"].exp())
    kl = torch.distributions.kl_divergence(old, pi).sum(-1).mean()
    return -torch.minimum(ratio * batch["adv"], clipped * batch["adv"]).mean(), kl, (z**2).mean()


def meta_update(env, phi, alpha, psi, goals, noise, args):
    """One meta-iteration. phi, alpha, psi: {name: leaf}, changed in place; noise(task, phase) (H, E, A).
    Returns the mean returns of the phases."""
    leaves = [*phi.values(), *alpha.values(), *psi.values()]
    frozen = [{k: v.detach() for k, v in p.items()} for p in (phi, alpha, psi)]
    tasks = [fast_updates(env, *frozen, goal, lambda phase, i=i: noise(i, phase), args)
             for i, goal in enumerate(goals)]
    optimizer = torch.optim.Adam(leaves, lr=args.outer_lr)
    best, best_loss = None, math.inf
    for n in range(args.epochs):
        optimizer.zero_grad()
        losses, kls = [], []
        for g, buffer, batch, _ in tasks:
            loss, kl, square = task_loss(phi, alpha, psi, g, buffer, batch, args)
            ((loss + args.latent_coef * square) / len(tasks)).backward()
            losses.append(loss.item())
            kls.append(kl.item())
        if np.mean(kls) < args.delta and np.mean(losses) < best_loss:
            best, best_loss = [x.detach().clone() for x in leaves], np.mean(losses)
        if n < args.epochs - 1:
            optimizer.step()
    with torch.no_grad():
        for x, kept in zip(leaves, best):
            x.copy_(kept)
    return np.mean([returns for *_, returns in tasks], 0)
