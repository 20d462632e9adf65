"""
LeMOL the obvious way, for tests and speed.py: one learning run, one env, one network at a time, autograd
modules, a replay buffer that is a list of tuples, and a call for everything in every step, as public
implementations have it. The algorithm is that of lemol.py with --om ep --stored-guesses: play, targets,
losses, clipping, model training.

  python tests/oracles/lemol.py       environment steps per second, updates included, at the paper's sizes
"""

import random
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import envs  # noqa: E402


def mlp(inputs, outputs, units=64):
    net = nn.Sequential(nn.Linear(inputs, units), nn.ReLU(), nn.Linear(units, units), nn.ReLU(),
                        nn.Linear(units, outputs))
    for layer in net[::2]:
        nn.init.xavier_uniform_(layer.weight), nn.init.zeros_(layer.bias)
    return net


def sample(logits):
    """Gumbel-softmax"""
    u = torch.rand_like(logits)
    return F.softmax(logits - torch.log(-torch.log(u)), -1)


class Buffer:
    def __init__(self):
        self.storage = []

    def add(self, *transition):
        self.storage.append(transition)

    def encode(self, index):
        columns = [[] for _ in self.storage[0]]
        for k in index:
            for column, value in zip(columns, self.storage[k]):
                column.append(np.asarray(value))
        return [torch.as_tensor(np.array(column), dtype=torch.float32) for column in columns]


class OpponentModel(nn.Module):
    """LeMOL-EP with in-episode LSTM."""

    def __init__(self, obs, event, actions, hidden=64, embedding=128, in_episode=32):
        super().__init__()
        self.block = nn.LSTM(event, embedding // 2, batch_first=True, bidirectional=True)
        self.core = nn.LSTM(embedding, hidden, batch_first=True)
        self.episode = nn.LSTM(obs, in_episode, batch_first=True)
        self.head = mlp(in_episode + hidden, actions)
        self.h0 = nn.Parameter(torch.zeros(2, 1, hidden))
        self.u0 = nn.Parameter(torch.zeros(2, 1, in_episode))

    def advance(self, events, state):
        _, (last, _) = self.block(events[None])
        return self.core(torch.cat([last[0], last[1]], -1)[:, None], state)[1]

    def predict(self, obs, state, u):
        z, u = self.episode(obs.view(1, 1, -1), u)
        return F.softmax(self.head(torch.cat([z[:, 0], state[0][0]], -1)), -1), u

    def forward(self, events, obs, state, length):
        M, T = events.shape[:2]
        _, (last, _) = self.block(events.reshape(-1, length, events.shape[-1]))
        seq, after = self.core(torch.cat([last[0], last[1]], -1).view(M, T // length, -1), state)
        before = torch.cat([state[0].transpose(0, 1), seq[:, :-1]], 1).repeat_interleave(length, 1)
        u = tuple(x[None].expand(-1, M * T // length, -1).contiguous() for x in self.u0)
        z, _ = self.episode(obs.reshape(-1, length, obs.shape[-1]), u)
        return self.head(torch.cat([z.reshape(M, T, -1), before], -1)), after


class Agent:
    def __init__(self, i, obs, act, models):
        self.i, self.models, self.buffer = i, models, Buffer()
        extra = act[1 - i] if models else 0
        self.actor, self.actor_target = mlp(obs[i] + extra, act[i]), mlp(obs[i] + extra, act[i])
        self.critic, self.critic_target = mlp(sum(obs) + sum(act), 1), mlp(sum(obs) + sum(act), 1)
        self.actor_target.load_state_dict(self.actor.state_dict())
        self.critic_target.load_state_dict(self.critic.state_dict())
        self.actor_adam = torch.optim.Adam(self.actor.parameters(), 1e-2)
        self.critic_adam = torch.optim.Adam(self.critic.parameters(), 1e-2)

    def act(self, obs, guess=None):
        with torch.no_grad():
            obs = torch.as_tensor(obs, dtype=torch.float32)[None]
            return sample(self.actor(torch.cat([obs, guess], -1) if self.models else obs))[0].numpy()


def step(net, adam, loss):
    adam.zero_grad()
    loss.backward()
    for p in net.parameters():
        nn.utils.clip_grad_norm_(p, 0.5)
    adam.step()


def update(agents, i, batch_size, gamma=0.95, polyak=0.01):
    """One update of agent i; agents[0] has the model."""
    me = agents[i]
    index = [random.randint(0, len(me.buffer.storage) - 1) for _ in range(batch_size)]
    (o0, a0, r0, n0, d0, guess), (o1, a1, r1, n1, d1) = (agent.buffer.encode(index) for agent in agents)
    reward, done = ((r0, d0), (r1, d1))[i]
    with torch.no_grad():
        b1 = sample(agents[1].actor_target(n1))
        b0 = sample(agents[0].actor_target(torch.cat([n0, b1], -1)))
        y = reward + gamma * (1 - done) * me.critic_target(torch.cat([n0, n1, b0, b1], -1))[:, 0]
    q_loss = ((me.critic(torch.cat([o0, o1, a0, a1], -1))[:, 0] - y) ** 2).mean()
    step(me.critic, me.critic_adam, q_loss)
    logits = me.actor(torch.cat([o0, guess], -1) if i == 0 else o1)
    both = [sample(logits), a1] if i == 0 else [a0, sample(logits)]
    loss = -me.critic(torch.cat([o0, o1, *both], -1)).mean() + 1e-3 * (logits**2).mean()
    step(me.actor, me.actor_adam, loss)
    for net, target in (me.actor, me.actor_target), (me.critic, me.critic_target):
        for p, t in zip(net.parameters(), target.parameters()):
            t.data.mul_(1 - polyak).add_(p.data, alpha=polyak)


def play(env, om, episodes, batch_size=1024, on_episode=None):
    """One learning run; returns the events after the exploration, (T, X). on_episode(number) follows each
    episode."""
    agents = [Agent(0, env.obs_dims, env.action_dims, True), Agent(1, env.obs_dims, env.action_dims, False)]
    state, block, events = (om.h0[:1], om.h0[1:]), [], []
    for episode in range(episodes):
        if episode >= batch_size:
            for i in (0, 1):
                update(agents, i, batch_size)
        obs, u = [o[0].numpy() for o in env.reset()], (om.u0[:1], om.u0[1:])
        block = []
        for _ in range(env.horizon):
            a1 = agents[1].act(obs[1])
            with torch.no_grad():
                guess, u = om.predict(torch.as_tensor(obs[0]), state, u)
            a0 = agents[0].act(obs[0], guess)
            after, reward, _, truncated, _ = env.step([torch.as_tensor(a)[None] for a in (a0, a1)])
            after, end = [o[0].numpy() for o in after], float(truncated[0])
            r0, r1 = reward[0].tolist()
            agents[0].buffer.add(obs[0], a0, r0, after[0], end, guess[0].numpy())
            agents[1].buffer.add(obs[1], a1, r1, after[1], end)
            block.append(np.concatenate([a1, obs[0], a0, [r0, end]]))
            obs = after
        if episode >= batch_size:
            with torch.no_grad():
                state = om.advance(torch.as_tensor(np.array(block), dtype=torch.float32), state)
            events += block
        if on_episode:
            on_episode(episode)
    return torch.as_tensor(np.array(events), dtype=torch.float32)


def train_model(om, adam, runs, chunk, length, rounds=5, size=8):
    """Sweeps over recorded runs (n, T, X), chunk by chunk."""
    for _ in range(rounds):
        x = torch.stack([random.choice(runs) for _ in range(size)])
        state = tuple(s[None].expand(-1, size, -1).contiguous() for s in om.h0)
        for t in range(0, x.shape[1] - chunk + 1, chunk):
            part = x[:, t : t + chunk]
            logits, state = om(part, part[..., 5:13], state, length)
            loss = -(part[..., :5] * F.log_softmax(logits, -1)).sum(-1).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            state = tuple(s.detach() for s in state)


def main(episodes=40, batch_size=1024):
    torch.set_num_threads(1)
    env, start = envs.make("simple_push", 1, horizon=25, dialect="mpe"), []

    def clock(episode):
        if episode == batch_size - 1:
            start.append((time.perf_counter(), time.process_time()))

    play(env, OpponentModel(8, 20, 5), batch_size + episodes, batch_size, clock)
    wall, cpu = time.perf_counter() - start[0][0], time.process_time() - start[0][1]
    print(f"{episodes * 25 / wall:,.0f} steps/s, {episodes * 25 / cpu:,.0f} per processor second")


if __name__ == "__main__":
    main()
