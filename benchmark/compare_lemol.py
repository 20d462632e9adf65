"""
What is a model of the opponent worth? Defenders with equal memory beside each other, in 24 learning runs.

  python benchmark/compare_lemol.py uav                  # 25 minutes of one core; continues where it stopped
  python benchmark/compare_lemol.py simple_push maddpg ep    # some defenders; maddpg comes first

The models are trained once, on four cycles of eight runs. Then each defender plays one cycle of 24
runs in which both players learn. Beside his observation every defender sees the state of one in-episode LSTM,
the ablated model's: this is his memory. What differs is what he is given beyond that:
  maddpg      nothing: a plain learner with memory
  uninformed  a guess that is noise
  ablated     the guess of the ablated model, a function of the same memory
  ep          LeMOL's guess
  oracle, policy, hidden    bounds: the other's action, his policy, or what he hides (uav: his place;
              simple_push: the goal)
Then each meets the opponents again that learned against maddpg, recorded every ten episodes. Once he learns
anew while they change ("anew"), once he plays his last policy and learns no more, while h goes on ("frozen").
The unit is a learning run: the "seeds" of results/lemol-<env>-equal-<defender>.csv.
"""

import datetime
import sys
import time
from dataclasses import replace
from pathlib import Path

import run
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import lemol  # noqa: E402
from envs.pursuit import Pursuit  # noqa: E402

KINDS = {"maddpg": "maddpg", "ep": "ep", "ablated": "ablated", "policy": "policy",
         "oracle": "oracle", "hidden": "uninformed", "uninformed": "uninformed"}  # defender: --om
RUNS, EVERY = 24, 10  # learning runs of a cycle, episodes between recorded actors
SIZES = dict(num_episodes=628, batch_size=128, traj_per_iter=8, n_opp_cycles=4, chunk_length=20,
             om_training_iters=5, num_traj_to_train=8)
make_env = lemol.make_env


class Remember:
    """An env whose agent i also sees his memory and, if he is told, what the other hides (else zeros)."""

    def __init__(self, env, i, memory, told):
        self.env, self.i, self.memory, self.told = env, i, memory, told
        self.uav = isinstance(env, Pursuit)
        self.obs_dims = [*env.obs_dims]
        self.obs_dims[i] += len(memory.u0[0]) + (6 if self.uav else 2)

    def __getattr__(self, name):
        return getattr(self.env, name)

    def extended(self, obs):
        with torch.no_grad():
            self.u = self.memory.remember(obs[self.i], self.u)
        hidden = F.one_hot(self.env.place[0], 3).flatten(1) if self.uav else F.one_hot(
            torch.as_tensor(self.env.goal[0]), 2)
        obs = [*obs]
        obs[self.i] = torch.cat([obs[self.i], self.u[0], hidden * float(self.told)], 1)
        return obs

    def reset(self):
        self.u = self.memory.begin(self.env.num_envs)
        return self.extended(self.env.reset())

    def step(self, action):
        obs, *rest = self.env.step(action)
        return self.extended(obs), *rest


def trained_models(args, path):
    """The state of the models: four cycles of lemol.py, and 20 more sweeps over all their runs."""
    if not path.exists():
        torch.manual_seed(0)
        env = make_env(args, args.traj_per_iter)
        match = lemol.Match(args, env)
        while len(match.history) < args.n_opp_cycles:
            lemol.iterate(match, env, args)
        lemol.train_models(match, replace(args, om_training_iters=20))
        torch.save(match.models.state_dict(), path)
    return torch.load(path)


def widened(state, om, obs_dim, act_dim, more):
    """The models for a Match whose observations have `more` columns, which they do not read."""
    out = {}
    for name, x in state.items():
        if "weight_ih" in name and "core" not in name:
            at = obs_dim + act_dim * ("block" in name)  # behind o^i, or behind [a^-i; o^i]
            x = torch.cat([x[:, :at], torch.zeros(len(x), more), x[:, at:]], 1)
        if om == "ep":
            out[name] = x
        elif name.startswith("ablated."):
            out[name.replace("ablated", "om")] = x
    return out


def play(match, env, args, i, learners, opponents=None, actor=None):
    """A cycle: returns of agent i (R, E), and the other's actors every ten episodes. `opponents` are such
    actors, to be met again; `actor` is a policy of agent i to begin with."""
    def become(j, net):
        for p, x in zip(match.theta[f"actor{j}"], net):
            p.data.copy_(x)

    match.restart()
    if opponents:
        become(1 - i, opponents[0])
    if actor:
        become(i, actor)
    lemol.record(match, lemol.rollout(lemol.make_env(args, RUNS * args.batch_size), match, args))
    actors = []
    for e in range(args.num_episodes - args.batch_size):
        if e % EVERY == 0:
            if opponents:
                become(1 - i, opponents[e // EVERY])
            actors.append([p.detach().clone() for p in match.theta[f"actor{1 - i}"]])
        for j in learners:
            lemol.learn(match, j, args)
        rows = lemol.rollout(env, match, args)
        lemol.record(match, rows)
        if match.om:
            with torch.no_grad():
                match.hc = match.om.advance(lemol.event_of(rows, i)[..., :-1], match.hc)
    return lemol.returns_of(lemol.episodes(match, args.batch_size))[..., i], actors


def cell(kind, args, i, state, folder):
    """All that is measured of one defender: {tag: (R,)}, and the returns while both learn (R, E)."""
    om = KINDS[kind]
    args = replace(args, traj_per_iter=RUNS)
    args = replace(args, **{("bad_policy", "good_policy")[i]: "maddpg"} if om == "maddpg" else dict(om=om))
    raw = make_env(args, 1)
    O, A = raw.obs_dims[i], raw.action_dims[1 - i]
    memory = lemol.OpponentModel("ablated", O, 0, A, args)
    memory.load_state_dict({k[8:]: x for k, x in state.items() if k.startswith("ablated.")})
    lemol.make_env = lambda args, n: Remember(make_env(args, n), i, memory, kind == "hidden")
    torch.manual_seed(1)
    env = lemol.make_env(args, RUNS)
    match = lemol.Match(args, env)
    if match.om:
        match.models.load_state_dict(widened(state, om, O, A, match.obs_dims[i] - O))
    # both learn
    both, opponents = play(match, env, args, i, (0, 1))
    values = {"return": both.mean(1), "return_late": both[:, -100:].mean(1)}
    for model, net in match.models.items():
        runs = lemol.event_of(lemol.episodes(match, args.batch_size), i).flatten(1, 2)
        with torch.no_grad():
            values[f"{model}_ce"] = torch.tensor([lemol.score_model(match, net, x[None])[0] for x in runs])
    rows = lemol.rollout(lemol.make_env(args, RUNS * args.eval_episodes), match, args)
    values["last"] = lemol.returns_of(rows)[:, i].view(RUNS, -1).mean(1)
    # the recorded opponents again
    if kind == "maddpg":
        torch.save(opponents, folder / "opponents.pt")
    opponents = torch.load(folder / "opponents.pt")
    actor = [p.detach().clone() for p in match.theta[f"actor{i}"]]
    for tag, learners, start in (("anew", (i,), None), ("frozen", (), actor)):
        torch.manual_seed(2)
        again, _ = play(match, env, args, i, learners, opponents, start)
        values[tag], values[f"{tag}_late"] = again.mean(1), again[:, -100:].mean(1)
    return values, both


def main():
    name, *kinds = sys.argv[1:]
    torch.set_num_threads(1)
    args = lemol.Args(**lemol.preset(lemol.Args(env=name)) | dict(env=name) | SIZES)
    i = (args.bad_policy, args.good_policy).index("lemol")
    folder = run.ROOT / "runs" / f"equal-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    state = trained_models(args, folder / "models.pt")
    for kind in kinds or KINDS:
        path = run.RESULTS / f"lemol-{name}-equal-{kind}.csv"
        if path.exists():
            continue
        began = time.time()
        values, both = cell(kind, args, i, state, folder)
        rows = [["seed", "step", "tag", "value"]]
        for r in range(RUNS):
            for k, x in enumerate(both[r].unflatten(0, (-1, 50)).mean(1), 1):
                rows.append([r + 1, 50 * k * args.max_episode_len, "charts/episodic_return", f"{x:.4g}"])
            rows += [[r + 1, "final", f"eval/{tag}", f"{x[r]:.5g}"] for tag, x in values.items()]
            rows.append([r + 1, "final", "global_step", args.num_episodes * args.max_episode_len])
        run.write_result(path, {
            "command": f"python benchmark/compare_lemol.py {name}", "seeds": f"1 to {RUNS}, learning runs",
            "machine": run.machine(), "minutes": f"{(time.time() - began) / 60:.1f}", "commit": run.commit(),
            "date": datetime.date.today(), "note": f"the defender {kind}"}, rows)


if __name__ == "__main__":
    main()
