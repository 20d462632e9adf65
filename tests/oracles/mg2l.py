"""
The iteration of mg2l.py written the obvious way: one row, one agent and one context after the other. The
maths is that of mg2l.py in an env that never ends early; the parameters have its names and shapes, so that
what both make of the same numbers can be compared. Also the yardstick of its speed, where actions are
continuous.
"""

import math

import torch
import torch.nn.functional as F
from torch.distributions import Normal


def layer(p, name, l, i, x):
    """Layer l of agent i's network, with the norm before it; parts of the encoder take their input as it is;
    x (R, in)."""
    i = i if len(p[f"{name}w{l}"]) > 1 else 0  # one for all
    if l or not name:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return x @ p[f"{name}w{l}"][i] + p[f"{name}b{l}"][i, 0]


def mlp(p, i, x):
    return layer(p, "", 2, i, layer(p, "", 1, i, layer(p, "", 0, i, x).relu()).relu())


def pool(p, name, x):
    """A set (S, H) -> (outputs,)."""
    weight = (x @ p[f"{name}.wa"])[:, 0].softmax(0)
    out = sum(w * (row @ p[f"{name}.wv"] + p[f"{name}.bv"]) for w, row in zip(weight, x))
    return out @ p[f"{name}.wo"] + p[f"{name}.bo"]


def encode(p, context):
    """(mu, sigma) of z and of each z^i, of one context (n, B, F)."""
    pooled = []
    for c in context:
        e = F.gelu(layer(p, "transition.", 0, 0, c))
        e = F.gelu(layer(p, "transition.", 1, 0, e))
        e = F.gelu(layer(p, "transition.", 2, 0, e))
        pooled.append(pool(p, "pool", layer(p, "transition.", 3, 0, e)))
    mu, local = pool(p, "agents", torch.stack(pooled)), []
    for i, x in enumerate(pooled):
        h = F.gelu(layer(p, "local.", 0, i, x.detach()[None]))
        mu_i = layer(p, "local.", 1, i, h)[0]
        local.append((mu_i, F.softplus(mu_i @ p["local_sigma.w"] + p["local_sigma.b"])))
    return (mu, F.softplus(mu @ p["sigma.w"] + p["sigma.b"])), local


def kl(mu, sd):
    return 0.5 * (mu**2 + sd**2 - 2 * sd.log() - 1).mean()


def encoder_loss(p, contexts, tasks, K, keys, kl_coef, eps, eps_i, keep):
    """contexts[r] (n, B, F): M queries, then `keys` rounds of one of each task; keep[m]: query m sees z."""
    M, n = len(tasks), len(contexts[0])
    z, zi, kl_z, kl_zi = [], [], [], []
    for r, context in enumerate(contexts):
        (mu, sd), local = encode(p, context)
        z.append(mu + sd * eps[r])
        zi.append([mu_i + sd_i * eps_i[i, r] for i, (mu_i, sd_i) in enumerate(local)])
        if r < M:
            kl_z.append(kl(mu, sd))
            kl_zi += [kl(*pair) for pair in local]
    key = [sum(z[M + j * K + k] for j in range(keys)) / keys for k in range(K)]
    key_i = [[sum(zi[M + j * K + k][i] for j in range(keys)) / keys for i in range(n)] for k in range(K)]
    loss = loss_i = 0.0
    for r, task in enumerate(tasks):
        scores = torch.stack([z[r] @ key[k] for k in range(K)])
        loss = loss - scores.log_softmax(0)[task] / M
        for i in range(n):
            own = torch.stack([zi[r][i] @ key_i[k][i] for k in range(K)])
            both = own + scores.detach() if keep[r] else own
            loss_i = loss_i - both.log_softmax(0)[task] / (M * n)
    return loss + loss_i + kl_coef * (sum(kl_z) / M + sum(kl_zi) / (M * n))


def advantages(reward, value, gamma, gae_lambda):
    """A_t = sum_u (gamma lambda)^u d_{t+u} of one agent in one row: T rewards, T + 1 values."""
    T = len(reward)
    delta = [reward[t] + gamma * value[t + 1] - value[t] for t in range(T)]
    return [sum((gamma * gae_lambda) ** (u - t) * delta[u] for u in range(t, T)) for t in range(T)]


def clip(grads, most):
    norm = math.sqrt(sum(float((g**2).sum()) for g in grads))
    for g in grads:
        g *= min(1.0, most / (norm + 1e-6))


def step(params, optimizers, group, loss):
    optimizers[group].zero_grad()
    loss.backward()
    if group != "encoder":
        for i in range(len(params[group]["w0"])):
            clip([x.grad[i] for x in params[group].values()], 10.0)
    optimizers[group].step()


class Moments:
    """Running mean and deviation of each agent's returns."""

    def __init__(self, n):
        self.weight, self.total, self.square = [0.0] * n, [0.0] * n, [0.0] * n

    def update(self, i, x):
        new = 1.0, float(x.mean()), float((x**2).mean())
        for sums, one in zip((self.weight, self.total, self.square), new):
            sums[i] = 0.99999 * sums[i] + one

    def of(self, i):
        weight = max(self.weight[i], 1.0)
        mean = self.total[i] / weight
        return mean, math.sqrt(max(self.square[i] / weight - mean**2, 1e-4))


def judge(actor, i, x, action):
    """log pi(action) and the entropy, (R,) each, of agent i at inputs (R, in)."""
    out = mlp(actor, i, x)
    if "log_std" in actor:
        pi = Normal(out, actor["log_std"][i].exp())
        return pi.log_prob(action).sum(1), pi.entropy().sum(1)
    chance = out.softmax(1)
    return chance[range(len(action)), action].log(), -(chance * chance.log()).sum(1)


def learn(params, optimizers, moments, rows, args):
    """PPO. rows: dicts of obs (T + 1, n, O), action (T, n[, A]), logprob and reward (T, n), zi (n, C), z
    (C,); context (n, B, F), or None for a row of the prior, and the noise (C,) of its z."""
    actor, critic, n = params["actor"], params["critic"], rows[0]["obs"].shape[1]
    T, old, ret, adv = len(rows[0]["action"]), [], [], []  # old[i][r] (T,), and so on
    for i in range(n):
        mean, sd = moments.of(i)
        old_i, adv_i, ret_i = [], [], []
        for row in rows:
            with torch.no_grad():
                x = torch.cat([row["obs"].flatten(1), row["z"].expand(T + 1, -1)], 1)
                value = mlp(critic, i, x)[:, 0]
            a = torch.tensor(advantages(row["reward"][:, i], value * sd + mean, args.gamma, args.gae_lambda))
            old_i.append(value[:-1])
            adv_i.append(a)
            ret_i.append(a + value[:-1] * sd + mean)
        a = torch.cat(adv_i)
        old.append(old_i)
        adv.append([(x - a.mean()) / (a.std(correction=0) + 1e-5) for x in adv_i])
        ret.append(ret_i)
    for _ in range(args.ppo_epochs):
        z = []  # of each row, made anew in each pass
        for row in rows:
            now = row["z"]
            if row["context"] is not None:
                mu, sd = encode(params["encoder"], row["context"])[0]
                now = mu + sd * row["noise"]
            z.append(now)
        told = [x.detach().requires_grad_() for x in z]
        for batch in torch.randperm(len(rows)).chunk(args.minibatches):
            chosen = [rows[r] for r in batch]
            obs, action, old_logprob = (
                torch.cat([row[k][:T] for row in chosen]) for k in ("obs", "action", "logprob"))
            loss = 0.0
            for i in range(n):
                zi = torch.cat([row["zi"][i].expand(T, -1) for row in chosen])
                logprob, entropy = judge(actor, i, torch.cat([obs[:, i], zi], 1), action[:, i])
                ratio = (logprob - old_logprob[:, i]).exp()
                a = torch.cat([adv[i][r] for r in batch])
                gain = torch.minimum(ratio * a, ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef) * a)
                loss = loss - (gain + args.ent_coef * entropy).mean()
            step(params, optimizers, "actor", loss)
            loss = 0.0
            for i in range(n):
                old_i, ret_i = (torch.cat([x[i][r] for r in batch]) for x in (old, ret))
                moments.update(i, ret_i)
                mean, sd = moments.of(i)
                joint = torch.cat([obs.flatten(1), torch.cat([told[r].expand(T, -1) for r in batch])], 1)
                value = mlp(critic, i, joint)[:, 0]
                clipped = old_i + (value - old_i).clamp(-args.clip_coef, args.clip_coef)
                target = (ret_i - mean) / sd
                huber = [F.huber_loss(v, target, reduction="none", delta=10.0) for v in (value, clipped)]
                loss = loss + torch.maximum(*huber).mean()
            step(params, optimizers, "critic", loss)
        if any(row["context"] is not None for row in rows):
            step(params, optimizers, "encoder", sum(x @ own.grad for x, own in zip(z, told)))


def episode(env, params, task, zi):
    """One env: obs, action, logprob, reward as learn() takes them."""
    actor, obs, steps = params["actor"], torch.cat(env.reset(task)), []
    with torch.no_grad():
        for _ in range(env.horizon):
            action, logprob = [], []
            for i, o in enumerate(obs):
                mean = mlp(actor, i, torch.cat([o, zi[i]])[None])[0]
                pi = Normal(mean, actor["log_std"][i, 0].exp())
                action.append(pi.sample())
                logprob.append(pi.log_prob(action[-1]).sum())
            after, reward, *_ = env.step(tuple(a[None] for a in action))
            steps.append((obs, torch.stack(action), torch.stack(logprob), reward[0]))
            obs = torch.cat(after)
    seen, action, logprob, reward = map(list, zip(*steps))
    row = dict(obs=torch.stack([*seen, obs]), action=torch.stack(action), logprob=torch.stack(logprob))
    return row | dict(reward=torch.stack(reward))


def iterate(env, learner, moments, tasks, args):
    """One iteration, after the rings have been filled; `env` holds one env."""
    params, ring, K, n, rows = learner.params, learner.ring, len(tasks), env.num_agents, []
    index = [r % K for r in range(args.num_envs + args.context_envs)]
    for r, k in enumerate(index):
        noise = torch.randn(n + 1, args.latent_dim)
        row = dict(context=None, noise=noise[0], z=noise[0], zi=noise[1:])
        if r < args.num_envs:
            context = ring.sample(torch.tensor([k]), args.context_size)[:, 0]
            with torch.no_grad():
                (mu, sd), local = encode(params["encoder"], context)
            zi = torch.stack([mu_i + sd_i * eps for (mu_i, sd_i), eps in zip(local, noise[1:])])
            row = dict(context=context, noise=noise[0], z=mu + sd * noise[0], zi=zi)
        rows.append(row | episode(env, params, tasks[k : k + 1], row["zi"]))
    learn(params, learner.optimizers, moments, rows[: args.num_envs], args)
    for k, row in zip(index[args.num_envs :], rows[args.num_envs :]):
        o = row["obs"]
        x = torch.cat([o[:-1], row["action"], row["reward"][..., None], o[1:] - o[:-1]], -1)
        ring.append(torch.tensor([k]), x.transpose(0, 1)[:, :, None], torch.tensor([len(x)]))
    for _ in range(args.encoder_updates):
        queries = torch.randint(K, (args.queries,)).tolist()
        every = queries + list(range(K)) * args.keys
        contexts = [ring.sample(torch.tensor([k]), args.query_size)[:, 0] for k in every]
        eps = torch.randn(n + 1, len(every), args.latent_dim)
        keep = torch.rand(args.queries) < 0.5
        loss = encoder_loss(params["encoder"], contexts, queries, K, args.keys, args.kl_coef,
                            eps[0], eps[1:], keep)
        step(params, learner.optimizers, "encoder", loss)
