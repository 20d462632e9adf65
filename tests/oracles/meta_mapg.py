"""
The outer iteration of meta_mapg.py written the obvious way: one chain, agents in a Python loop, one-hot
observations through Linear and an LSTM cell at every time step while playing, and autograd through all of it.
The script must match its gradients (tests/test_meta_mapg.py); benchmark/speed.py uses it as its yardstick.
"""

import torch
import torch.nn.functional as F


def network(p, obs, memory):
    """One time step: obs (K, S) -> outputs (K, A) and the new (h, c). {"table": (S, A)} has no memory."""
    if "table" in p:
        return obs @ p["table"], None
    h, c = memory or [obs.new_zeros(len(obs), p["w_hh"].shape[1])] * 2
    x = F.relu(F.linear(obs, p["w1"], p["b1"]))
    gates = F.linear(x, p["w_ih"], p["b_ih"]) + F.linear(h, p["w_hh"], p["b_hh"])
    i, f, g, o = gates.chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
    h = torch.sigmoid(o) * torch.tanh(c)
    return F.linear(h, p["w2"], p["b2"]), (h, c)


def rollout(env, players, critic, recorded=None):
    """Play K episodes with the graph attached; if there are `recorded` (H, K, N) actions, those are taken.
    Returns observations (H, K, S), log-probabilities and rewards (H, K) of each agent, values and the entropy
    of agent 0."""
    obs, memories, critic_memory = env.reset(), [None] * len(players), None
    seen, logprobs, rewards, values, entropies = [], [[] for _ in players], [[] for _ in players], [], []
    for t in range(env.horizon):
        seen.append(obs[0])
        actions = []
        for a, p in enumerate(players):
            out, memories[a] = network(p, obs[a], memories[a])
            log_pi = out.log_softmax(-1)
            if recorded is None:
                action = torch.distributions.Categorical(logits=log_pi).sample()
            else:
                action = recorded[t, :, a]
            logprobs[a].append(log_pi.gather(-1, action[:, None])[:, 0])
            actions.append(action)
            if a == 0:
                entropies.append(-(log_pi.exp() * log_pi).sum(-1))
        value, critic_memory = network(critic, obs[0], critic_memory)
        values.append(value[:, 0])
        obs, reward, *_ = env.step(actions)
        for a in range(len(players)):
            rewards[a].append(reward[:, a])
    logprobs, rewards = [torch.stack(x) for x in logprobs], [torch.stack(x) for x in rewards]
    return torch.stack(seen), logprobs, rewards, torch.stack(values), torch.stack(entropies)


def discounted(reward, factor):
    """sum_{u >= t} factor^(u-t) r_u over the first dimension."""
    out = [reward[-1]]
    for r in reversed(reward[:-1]):
        out.append(r + factor * out[-1])
    return torch.stack(out[::-1])


def baseline(obs, reward, gamma, ridge=1e-5):
    """Regression of the return on [o, o^2, t, t^2, t^3, 1], t in hundreds of steps. -> (H, K)"""
    H, K, _ = obs.shape
    obs, t = obs.double(), torch.arange(H, dtype=torch.float64).view(H, 1, 1).expand(H, K, 1) / 100
    x = torch.cat([obs, obs**2, t, t**2, t**3, torch.ones_like(t)], -1).flatten(0, 1)
    target = discounted(reward.double(), gamma).flatten()
    w = torch.linalg.solve(x.T @ x + ridge * torch.eye(x.shape[1], dtype=x.dtype), x.T @ target)
    return (x @ w).view(H, K).to(reward.dtype)


def box(z):
    return torch.exp(z - z.detach())


def inner_update(players, lrs, obs, logprobs, rewards, args):
    """A step of every agent on its Loaded DiCE objective; all agents' log-probabilities are its nodes."""
    nodes, updated = sum(logprobs), []
    for p, lr, reward in zip(players, lrs, rewards):
        advantage = discounted(reward, args.gamma) - baseline(obs, reward, args.gamma)
        objective, w = 0.0, torch.zeros_like(nodes[0])
        for t, node in enumerate(nodes):
            w = args.dice_lambda * w + node
            objective = objective + args.gamma**t * ((box(w) - box(w - node)) * advantage[t]).mean()
        grads = torch.autograd.grad(objective, list(p.values()), create_graph=True)
        updated.append({name: value + lr * g for (name, value), g in zip(p.items(), grads)})
    return updated


class Link(torch.autograd.Function):
    """The same tensors; on the way back their gradients are shortened to a joint norm of at most `limit`."""

    @staticmethod
    def forward(ctx, limit, *tensors):
        ctx.limit = limit
        return tuple(x.clone() for x in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        norm = sum((g**2).sum() for g in gradients).sqrt().item()
        return None, *(g * min(1, ctx.limit / (norm + 1e-6)) for g in gradients)


def chain_losses(env, actor, eta, critic, peers, args, recorded=None):
    """The losses of actor and critic for one chain. env: K games with one-hot observations; peers: dicts."""
    players, loss, critic_loss = [actor, *peers], 0.0, 0.0
    for l in range(args.chain_length + 1):
        play = recorded[l] if recorded is not None else None
        obs, logprobs, rewards, values, entropies = rollout(env, players, critic, play)
        if l == 0:
            loss = loss - args.ent_coef * entropies.sum(0).mean()
        else:
            value, reward = values.detach(), rewards[0]
            after = torch.cat([value[1:], torch.zeros_like(value[:1])])
            adv = discounted(reward + args.gamma * after - value, args.gamma * args.gae_lambda)
            loss = loss - (adv * sum(logprobs)).sum(0).mean()
            critic_loss = critic_loss + ((values - discounted(reward, args.gamma)) ** 2).mean()
        if l < args.chain_length:
            lrs = [eta[l], *[args.peer_lr] * len(peers)]
            players = inner_update(players, lrs, obs, logprobs, rewards, args)
            linked = iter(Link.apply(args.link_clip, *[x for p in players for x in p.values()]))
            players = [{name: next(linked) for name in p} for p in players]
    return loss / (args.chain_length + 1), critic_loss / (args.chain_length + 1)


def gradients(env, actor, eta, critic, peers, args, recorded=None):
    """Lists of gradients for actor, step sizes and critic of one chain."""
    loss, critic_loss = chain_losses(env, actor, eta, critic, peers, args, recorded)
    *by_actor, by_eta = torch.autograd.grad(loss, [*actor.values(), eta])
    return by_actor, by_eta, torch.autograd.grad(critic_loss, [*critic.values()])
