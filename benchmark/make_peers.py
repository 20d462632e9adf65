"""
Make the peers of meta_mapg.py's half_cheetah_dir: two Gaussian LSTMs, a leg each, learn to run to the left by
recurrent PPO, and the front leg of iteration n becomes peer n.

    python benchmark/make_peers.py peers.npz [--seed 1] [--iterations 500]        # 9 minutes of one core
    python meta_mapg.py --env half_cheetah_dir --personas peers.npz

How the paper's peers were trained is not said; this is ours. benchmark/peers/half_cheetah_dir.npz was made by
an earlier version of this, with the same algorithm.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import envs
import meta_mapg as m
from envs.multi_agent_mujoco import GRID, KEPT, write_peers

GAMMA, LAMBDA, CLIP, EPOCHS, ACTOR_LR, CRITIC_LR = 0.95, 0.95, 0.2, 2, 1e-4, 1e-3


def ppo_loss(logprob, old, adv, clip_coef=CLIP):
    """The clipped surrogate, mean over all steps. logprob, old (N, H, K), adv (1, H, K)."""
    ratio = (logprob - old).exp()
    return -torch.min(ratio * adv, ratio.clamp(1 - clip_coef, 1 + clip_coef) * adv).mean()


class Pair:
    """Two actors, a row each of one Player, and their critic."""

    def __init__(self, episodes=64, horizon=200):
        self.env = envs.make("two_agent_half_cheetah", episodes, horizon=horizon, direction=-1)
        actor, critic = m.lstm_shapes(17, 3, gaussian=True), m.lstm_shapes(17, 1)
        self.actors = m.Player(torch.stack([m.initial(actor), m.initial(actor)]), actor)
        self.critic = m.Player(m.initial(critic)[None], critic)
        self.moments = [torch.zeros(3, p.flat.numel()) for p in (self.actors, self.critic)]
        self.k = 0

    def update(self):
        """One iteration on whole episodes. Returns the mean return of an episode."""
        batch = m.rollout(self.env, [self.actors._replace(flat=x[None]) for x in self.actors.flat])
        state = batch.state.expand(2, -1, -1, -1)  # (N, H, K, S)
        action, reward = batch.action[0].movedim(2, 0), batch.reward[:, 0] / 100  # (N, H, K, A), (1, H, K)
        with torch.no_grad():
            old = m.policy(self.actors, m.outputs(self.actors, state)[0]).log_prob(action)
            value = m.outputs(self.critic, batch.state)[0][..., 0]
            adv = m.gae(reward, value, GAMMA, LAMBDA)
            target, adv = adv + value, (adv - adv.mean()) / adv.std()
        for _ in range(EPOCHS):
            self.k += 1
            actors, critic = self.actors.constant(), self.critic.constant()
            losses = (ppo_loss(m.policy(actors, m.outputs(actors, state)[0]).log_prob(action), old, adv),
                      (m.outputs(critic, batch.state)[0][..., 0] - target).square().mean())
            rates = ACTOR_LR, CRITIC_LR
            groups = zip((self.actors, self.critic), (actors, critic), losses, self.moments, rates)
            for p, q, loss, moments, lr in groups:
                gradient, = torch.autograd.grad(loss, q.flat)
                gradient = m.clip(gradient.flatten()[None], 10.0)[0][0]
                p.flat.add_(m.amsgrad(moments, gradient, lr, self.k, eps=1e-8).view_as(p.flat))
        return batch.reward[:, 0].sum(1).mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--iterations", type=int, default=500)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    pair, weights, returns = Pair(), [], []
    for n in range(args.iterations):
        if n in KEPT:
            weights.append((pair.actors.flat[1] / GRID).round().short())
        returns.append(pair.update())
        if n % 25 == 0:
            print(f"iteration {n}: return {returns[-1]:+.1f}", flush=True)
    write_peers(args.path, torch.stack(weights), torch.tensor(returns))


if __name__ == "__main__":
    main()
