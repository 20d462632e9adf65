"""
The iteration of mg2l.py written the obvious way, as the yardstick of its speed: one world, one agent and one
context after the other, a layer norm with scale and shift before each layer, the encoder's layers before the
pool. The maths is that of mg2l.py with its defaults; the parameters have its names and shapes, agents first,
so that the gradients of both can be compared.
"""

import math

import torch
import torch.nn.functional as F


def layer(p, i, name, l, x):
    """Layer l of agent i's network, with the norm before it if it has one; x (R, in)."""
    i = i if len(p[f"{name}w{l}"]) > 1 else 0  # one for all
    if f"{name}scale{l}" in p:
        scale, shift = p[f"{name}scale{l}"][i, :, 0], p[f"{name}shift{l}"][i, 0]
        x = F.layer_norm(x, x.shape[-1:], scale, shift)
    return x @ p[f"{name}w{l}"][i] + p[f"{name}b{l}"][i, 0]


def mlp(p, i, x):
    return layer(p, i, "", 2, layer(p, i, "", 1, layer(p, i, "", 0, x).relu()).relu())


def pia(p, name, x):
    """A set (S, C) -> (C,)."""
    weight = (x @ p[f"{name}.wa"])[:, 0].softmax(0)
    value = x @ p[f"{name}.wv"] + p[f"{name}.bv"]
    return (weight[:, None] * value).sum(0) @ p[f"{name}.wo"] + p[f"{name}.bo"]


def encode(p, contexts, layers):
    """(mu, sigma) of z and those of each z^i, of one context (B, F) of each agent."""
    pooled = []
    for i, c in enumerate(contexts):
        x = c
        for l in range(layers):
            x = F.gelu(layer(p, i, "tran.", l, x))
        pooled.append(pia(p, "agg", layer(p, i, "tran.", layers, x)))
    sigma = lambda name, mu: F.softplus(mu @ p[f"{name}.w"] + p[f"{name}.b"])
    mu_g, local = pia(p, "glob", torch.stack(pooled)), []
    for i, x in enumerate(pooled):
        mu = layer(p, i, "local.", 1, F.gelu(layer(p, i, "local.", 0, x.detach()[None])))[0]
        local.append((mu, sigma("rho_l", mu)))
    return (mu_g, sigma("rho_g", mu_g)), local


def encoder_loss(p, contexts, tasks, K, keys, kl_coef, eps_g, eps_l, layers):
    """contexts[r][i] (B, F): M queries, then `keys` for each of the K tasks in turn; eps_g (M + keys K, C)"""
    M, n, z, zi, kl_g, kl_l = len(tasks), len(contexts[0]), [], [], [], []
    kl = lambda mu, sd: 0.5 * (mu**2 + sd**2 - 2 * sd.log() - 1).mean()
    for r, context in enumerate(contexts):
        (mu, sd), local = encode(p, context, layers)
        z.append(mu + sd * eps_g[r])
        zi.append([m + s * eps_l[i, r] for i, (m, s) in enumerate(local)])
        kl_g.append(kl(mu, sd))
        kl_l += [kl(m, s) for m, s in local]
    mean_key = lambda latent, k: sum(latent[M + j * K + k] for j in range(keys)) / keys
    loss_g = loss_l = 0.0
    for r, task in enumerate(tasks):
        loss_g = loss_g - torch.stack([z[r] @ mean_key(z, k) for k in range(K)]).log_softmax(0)[task] / M
        for i in range(n):
            own = [x[i] for x in zi]
            scores = torch.stack([own[r] @ mean_key(own, k) for k in range(K)])
            loss_l = loss_l - scores.log_softmax(0)[task] / (M * n)
    return loss_g + loss_l + kl_coef * (sum(kl_g) / len(kl_g) + sum(kl_l) / len(kl_l))


def ppo_losses(params, i, obs, zi, z, action, old_logprob, old_value, adv, target, args):
    """Of agent i: obs (n, R, O), its latents zi (R, C), the critics' z (R, C), the rest (R, .)."""
    theta, out = params["theta"], mlp(params["theta"], i, torch.cat([obs[i], zi], 1))
    normal = torch.distributions.Normal(out, theta["log_std"][i].exp().expand_as(out))
    ratio = (normal.log_prob(action).sum(1) - old_logprob).exp()
    gain = torch.minimum(ratio * adv, ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef) * adv)
    actor = -(gain + args.ent_coef * normal.entropy().sum(1)).mean()
    value = mlp(params["critic"], i, torch.cat([*obs, z], 1))[:, 0]
    clipped = old_value + (value - old_value).clamp(-args.clip_coef, args.clip_coef)
    huber = lambda v: F.huber_loss(v, target, reduction="none", delta=10.0)
    return actor, torch.maximum(huber(value), huber(clipped)).mean()


class Naive:
    """Trains the params and optimizers that mg2l.build() gives."""

    def __init__(self, make_world, args, params, optimizers, norm, ring, tasks):
        self.args, self.params, self.optimizers, self.norm = args, params, optimizers, norm
        self.world, self.ring, self.tasks = make_world(), ring, tasks

    def infer(self, index):
        """Of one row: its context, the noise, z and z^i."""
        context = self.ring.sample(torch.tensor([index]), self.args.context_size, self.args.mix)[:, 0]
        (mu, sd), local = encode(self.params["encoder"], list(context), self.args.encoder_layers)
        eps = torch.randn_like(mu)
        return context, eps, mu + sd * eps, [m + s * torch.randn_like(m) for m, s in local]

    @torch.no_grad()
    def episode(self, index, zi):
        """One world: lists over time of obs (n, O), action (n, A), logprob (n,), reward (n,)."""
        theta, n = self.params["theta"], self.world.num_agents
        obs, steps = self.world.reset(self.tasks[index : index + 1]), []
        for _ in range(self.world.horizon):
            action, logprob = [], []
            for i in range(n):
                out = mlp(theta, i, torch.cat([obs[i][0], zi[i]])[None])[0]
                normal = torch.distributions.Normal(out, theta["log_std"][i, 0].exp())
                action.append(normal.sample())
                logprob.append(normal.log_prob(action[-1]).sum())
            after, reward, *_ = self.world.step([a[None] for a in action])
            steps.append((torch.cat(obs), torch.stack(action), torch.stack(logprob), reward[0]))
            obs = after
        obs_, *others = (torch.stack(x) for x in zip(*steps))
        return torch.cat([obs_, torch.cat(obs)[None]]), *others

    def remember(self, index, episode):
        obs, action, _, reward = episode
        x = torch.cat([obs[:-1], action, reward[..., None], obs[1:]], -1).transpose(0, 1)  # (n, T, F)
        self.ring.append(torch.tensor([index]), x[:, :, None], torch.tensor([x.shape[1]]))

    def iterate(self):
        args, K, n, plays = self.args, len(self.tasks), self.world.num_agents, []
        index = [r % K for r in range(args.num_envs)]
        for k in index:
            with torch.no_grad():
                context, eps, z, zi = self.infer(k)
            plays.append((context, eps, z, zi, *self.episode(k, zi)))
        self.learn(plays)
        for _ in range(args.encoder_updates):
            every = [*index, *(list(range(K)) * args.keys)]
            sample = lambda k: list(self.ring.sample(torch.tensor([k]), args.context_size, args.mix)[:, 0])
            contexts, C = [sample(k) for k in every], args.latent_dim
            eps = torch.randn(len(every), C), torch.randn(n, len(every), C)
            loss = encoder_loss(self.params["encoder"], contexts, index, K, args.keys, args.kl_coef, *eps,
                                args.encoder_layers)
            self.step(["encoder"], loss)
        for r in range(args.context_envs):
            self.remember(r % K, self.episode(r % K, list(torch.randn(n, args.latent_dim))))

    def step(self, groups, loss):
        tensors = [x for g in groups for x in self.params[g].values()]
        for x, g in zip(tensors, torch.autograd.grad(loss, tensors, allow_unused=True)):
            x.grad = g
        for g in groups:
            for i in range(self.world.num_agents if g != "encoder" else 0):
                mine = [x.grad[i] for x in self.params[g].values()]
                norm = math.sqrt(sum(float((x**2).sum()) for x in mine))
                for x in mine:
                    x *= min(1.0, self.args.max_grad_norm / (norm + 1e-6))
            self.optimizers[g].step()

    def learn(self, plays):
        args, n = self.args, self.world.num_agents
        obs = torch.cat([p[4][:-1] for p in plays]).transpose(0, 1)  # (n, M T, O)
        old, ret, adv = [], [], []
        with torch.no_grad():
            mean, sd = self.norm.moments()
            for i in range(n):
                for _, _, z, _, o, _, _, reward in plays:
                    joint = torch.cat([o.flatten(1), z.expand(len(o), -1)], 1)
                    value = mlp(self.params["critic"], i, joint)[:, 0]
                    v, acc, a = (value * sd[i] + mean[i]).tolist(), 0.0, []
                    for t in reversed(range(len(reward))):
                        delta = float(reward[t, i]) + args.gamma * v[t + 1] - v[t]
                        acc = delta + args.gamma * args.gae_lambda * acc
                        a.append(acc)
                    adv.append(torch.tensor(a[::-1]))
                    ret.append(adv[-1] + torch.tensor(v[:-1]))
                    old.append(value[:-1])
        old, ret, adv = (torch.cat(x).view(n, -1) for x in (old, ret, adv))
        adv = (adv - adv.mean(1, keepdim=True)) / (adv.std(1, keepdim=True, correction=0) + 1e-5)
        T = len(plays[0][5])
        zi = [torch.cat([p[3][i].expand(T, -1) for p in plays]) for i in range(n)]
        action, logprob = (torch.cat([p[k] for p in plays]) for k in (5, 6))
        for _ in range(args.ppo_epochs):
            self.norm.update(ret, torch.full_like(ret[0], 1 / ret.shape[1]))
            z, target, actors, critics = [], self.norm.norm(ret), 0.0, 0.0
            for context, eps, *_ in plays:
                mu, sd = encode(self.params["encoder"], list(context), args.encoder_layers)[0]
                z.append((mu + sd * eps).expand(T, -1))
            for i in range(n):
                actor, critic = ppo_losses(self.params, i, obs, zi[i], torch.cat(z), action[:, i],
                                           logprob[:, i], old[i], adv[i], target[i], args)
                actors, critics = actors + actor, critics + critic
            self.step(["theta"], actors)
            self.step(["critic", "encoder"], critics)
