"""
MADDPG written the obvious way, as a yardstick for speed: one mpe2 world, one agent after the other, a module
for each network, autograd, as in the public PyTorch ports. The same hyper-parameters as coded_maddpg.py.
"""

import numpy as np
import torch
from mpe2 import simple_spread_v3
from torch import nn
from torch.nn import functional


def mlp(n, out, hidden=64):
    return nn.Sequential(nn.Linear(n, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(),
                         nn.Linear(hidden, out))


def gumbel_softmax(logits):
    return functional.softmax(logits - torch.empty_like(logits).exponential_().log(), -1)


class Maddpg:
    def __init__(self, num_agents, horizon=25, size=100_000):
        self.env = simple_spread_v3.parallel_env(N=num_agents, max_cycles=horizon, continuous_actions=True)
        self.names, O, D = self.env.possible_agents, 6 * num_agents, num_agents * (6 * num_agents + 5)
        self.actors, self.targets = ([mlp(O, 5) for _ in self.names] for _ in range(2))
        self.critics, self.target_critics = ([mlp(D, 1) for _ in self.names] for _ in range(2))
        self.adam = [[torch.optim.Adam(net.parameters(), lr=0.01) for net in nets]
                     for nets in (self.actors, self.critics)]
        self.memory = [[np.zeros((size, w), np.float32) for w in (O, 5, 1, O)] for _ in self.names]
        self.stored, self.size = 0, size

    def episode(self):
        obs, _ = self.env.reset()
        while self.env.agents:
            with torch.no_grad():
                act = {name: gumbel_softmax(actor(torch.from_numpy(obs[name])[None]))[0].numpy()
                       for name, actor in zip(self.names, self.actors)}
            following, reward, *_ = self.env.step(act)
            k = self.stored % self.size
            for name, memory in zip(self.names, self.memory):
                for store, value in zip(memory, (obs[name], act[name], reward[name], following[name])):
                    store[k] = value
            obs, self.stored = following, self.stored + 1

    def update(self, batch_size=1024, gamma=0.95, tau=0.01):
        for i in range(len(self.names)):
            index = np.random.randint(min(self.stored, self.size), size=batch_size)
            obs, act, reward, following = zip(*([torch.from_numpy(store[index]) for store in memory]
                                                for memory in self.memory))
            with torch.no_grad():
                a_next = [gumbel_softmax(target(o)) for target, o in zip(self.targets, following)]
                y = reward[i] + gamma * self.target_critics[i](torch.cat([*following, *a_next], 1))
            self.update_agent(i, obs, act, y)
        with torch.no_grad():
            for nets, targets in (self.actors, self.targets), (self.critics, self.target_critics):
                for net, target in zip(nets, targets):
                    for p, q in zip(net.parameters(), target.parameters()):
                        q.lerp_(p, tau)

    def update_agent(self, i, obs, act, y, softmax=gumbel_softmax):
        """A step of agent i's critic, then of its actor. obs, act: lists over agents; y (B, 1)."""
        loss = (self.critics[i](torch.cat([*obs, *act], 1)) - y).square().mean()
        self.step(self.adam[1][i], self.critics[i], loss)
        logits, own = self.actors[i](obs[i]), list(act)
        own[i] = softmax(logits)
        loss = -self.critics[i](torch.cat([*obs, *own], 1)).mean() + 1e-3 * logits.square().mean()
        self.step(self.adam[0][i], self.actors[i], loss)

    @staticmethod
    def step(adam, net, loss):
        adam.zero_grad()
        loss.backward()
        for p in net.parameters():
            nn.utils.clip_grad_norm_([p], 0.5)
        adam.step()
