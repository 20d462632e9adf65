"""
What is a model of the opponent worth? Defenders with equal memory beside each other, in 24 learning runs.

  python benchmark/compare_lemol.py uav             # 45 minutes of one core; continues where it was stopped
  python benchmark/compare_lemol.py simple_push maddpg ep      # some defenders; maddpg must have played before

The models are trained once, on four cycles of `lemol.py --env uav`. Then every defender plays one cycle of 24
learning runs in which both players learn. All of them see what they observe and, beside it, the state of one
in-episode LSTM (the ablated model's), which is their memory; they differ in what else they are given:
  maddpg      nothing: a plain learner with memory
  uninformed  a guess that is noise
  ablated     the guess of the ablated model, which is a function of the same memory
  stored, ep  the guess of LeMOL; in eq. (7) as it was in play, or as it is now
  oracle, policy, hidden   the other's action, his policy, or what he hides: uav, his place; simple_push, the
              goal. These three are bounds.
Then everyone meets the same opponents again: the actors that learned against maddpg, recorded every ten
episodes. Once with a defender that learns anew while they change, and once with his last policy of the first
cycle, which learns no more, while a model's h does. A run is a row of results/lemol-<env>-equal-<defender>.csv.
"""

import datetime
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
import lemol  # noqa: E402
import run  # noqa: E402

KINDS = {"maddpg": "maddpg", "uninformed": "uninformed", "ablated": "ablated", "stored": "ep", "ep": "ep",
         "oracle": "oracle", "policy": "policy", "hidden": "uninformed"}  # defender: --om
RUNS, EVERY = 24, 10  # learning runs of a cycle, episodes between recorded actors
plain_env = lemol.make_env


class Remember:
    """An env whose agent i also sees his memory and, if he is told, what the other hides (else zeros)."""

    def __init__(self, env, i, memory, told):
        self.env, self.i, self.memory, self.told = env, i, memory, told
        self.is_uav = hasattr(env, "listening")
        self.obs_dims = [*env.obs_dims]
        self.obs_dims[i] += len(memory.u0[0]) + (6 if self.is_uav else 2)

    def __getattr__(self, name):
        return getattr(self.env, name)

    def hidden(self):
        if self.is_uav:  # row and column of the target
            return F.one_hot(self.env.place[0], 3).flatten(1)
        return F.one_hot(torch.as_tensor(self.env.goal[0]), 2)

    def extended(self, obs):
        obs = [*obs]
        with torch.no_grad():
            _, self.u = lemol.unroll(self.memory.episode, obs[self.i][:, None], self.u)
        obs[self.i] = torch.cat([obs[self.i], self.u[0], self.hidden() * float(self.told)], 1)
        return tuple(obs)

    def reset(self):
        self.u = self.memory.begin(self.env.num_envs)
        return self.extended(self.env.reset())

    def step(self, action):
        obs, *rest = self.env.step(action)
        return self.extended(obs), *rest


def models(args, folder):
    """The state of trained models, "om." and "ablated.": four cycles of lemol.py and 20 more sweeps."""
    path = folder / "models.pt"
    if not path.exists():
        torch.manual_seed(0)
        env = lemol.make_env(args, args.traj_per_iter)
        match = lemol.Match(args, env)
        while len(match.history) < args.n_opp_cycles:
            lemol.iterate(match, env, args)
        lemol.train_models(match, replace(args, om_training_iters=20))
        torch.save(match.models.state_dict(), path)
    return torch.load(path)


def widened(state, kind, obs_dim, act_dim, more):
    """The weights of the models of a Match whose obs have `more` columns, which they do not read."""
    out = {}
    for name, x in state.items():
        if "weight_ih" in name and "core" not in name:
            at = obs_dim + act_dim * ("block" in name)  # behind [a^-i; o^i], or behind o^i
            x = torch.cat([x[:, :at], torch.zeros(len(x), more), x[:, at:]], 1)
        if kind == "ep" or name.startswith("ablated"):
            out[name if kind == "ep" else name.replace("ablated", "om")] = x
    return out


def play(match, env, args, i, learners, opponents=None, actor=None):
    """A cycle: returns of agent i (R, E), and the other's actors every ten episodes. `opponents` are such
    actors, to be met again; `actor` is a policy of agent i to begin with."""
    match.restart()
    meet = lambda j, net: [p.data.copy_(x) for p, x in zip(match.theta[f"actor{j}"], net)]
    if actor:
        meet(i, actor)
    if opponents:
        meet(1 - i, opponents[0])
    explore = lemol.make_env(args, match.runs * args.batch_size)
    lemol.record(match, lemol.rollout(explore, match, args))
    actors = []

    def update(t):
        if t == 0:
            for j in learners:
                lemol.learn(match, j, args)

    for e in range(args.num_episodes - args.batch_size):
        if e % EVERY == 0:
            if opponents:
                meet(1 - i, opponents[e // EVERY])
            actors.append([p.detach().clone() for p in match.theta[f"actor{1 - i}"]])
        rows = lemol.rollout(env, match, args, update)
        lemol.record(match, rows)
        if match.om:
            with torch.no_grad():
                match.hc = match.om.advance(lemol.event_of(rows, i)[..., :-1], match.hc)
    return lemol.returns_of(lemol.episodes(match, args.batch_size))[..., i], actors


def cell(name, args, i, state, folder):
    """All that is measured of one defender: {tag: (R,)}, and curves {tag: (R, points)}."""
    om = KINDS[name]
    sides = ("bad_policy", "good_policy")
    args = replace(args, om=om, traj_per_iter=RUNS, stored_guesses=name == "stored")
    if om == "maddpg":
        args = replace(args, om="uninformed", **{sides[i]: "maddpg"})
    raw = plain_env(args, 1)
    memory = lemol.OpponentModel("ablated", raw.obs_dims[i], 0, raw.action_dims[1 - i], args)
    memory.load_state_dict({k[8:]: x for k, x in state.items() if k.startswith("ablated.")})
    lemol.make_env = lambda args, n: Remember(plain_env(args, n), i, memory, name == "hidden")
    torch.manual_seed(1)
    env = lemol.make_env(args, RUNS)
    match = lemol.Match(args, env)
    if match.om:
        more = match.obs_dims[i] - raw.obs_dims[i]
        match.models.load_state_dict(widened(state, om, raw.obs_dims[i], raw.action_dims[1 - i], more))
    # both learn
    both, opponents = play(match, env, args, i, (0, 1))
    values = {"return": both.mean(1), "return_late": both[:, -100:].mean(1)}
    for model, net in match.models.items():
        runs = lemol.event_of(lemol.episodes(match, args.batch_size), i).flatten(1, 2)
        values[f"{model}_ce"] = [lemol.recount(match, net, x[None])[0] for x in runs]
    rows = lemol.rollout(lemol.make_env(args, RUNS * args.eval_episodes), match, args)
    values["last"] = lemol.returns_of(rows)[:, i].view(RUNS, -1).mean(1)
    # the recorded opponents again
    path = folder / "opponents.pt"
    if name == "maddpg":
        torch.save(opponents, path)
    opponents = torch.load(path)
    actor = [p.detach().clone() for p in match.theta[f"actor{i}"]]
    for tag, learners, start in (("anew", (i,), None), ("frozen", (), actor)):
        torch.manual_seed(2)
        again, _ = play(match, env, args, i, learners, opponents, start)
        values[tag], values[f"{tag}_late"] = again.mean(1), again[:, -100:].mean(1)
    return values, both


def main():
    name = sys.argv[1]
    args = lemol.Args(**lemol.preset(lemol.Args(env=name)) | dict(env=name))
    torch.set_num_threads(1)
    i = (args.bad_policy, args.good_policy).index("lemol")
    folder = ROOT / "runs" / f"equal-{name}"
    folder.mkdir(parents=True, exist_ok=True)
    state = models(args, folder)
    for kind in sys.argv[2:] or KINDS:
        path = run.RESULTS / f"lemol-{name}-equal-{kind}.csv"
        if path.exists():
            continue
        began = time.time()
        values, both = cell(kind, args, i, state, folder)
        rows = [["seed", "step", "tag", "value"]]
        steps = torch.arange(1, len(both[0]) // 50 + 1) * 50 * args.max_episode_len
        for r in range(RUNS):
            rows += [[r + 1, step.item(), "charts/episodic_return", f"{x:.4g}"]
                     for step, x in zip(steps, both[r].unflatten(0, (-1, 50)).mean(1))]
            rows += [[r + 1, "final", f"eval/{tag}", f"{float(x[r]):.5g}"] for tag, x in values.items()]
            rows.append([r + 1, "final", "global_step", args.num_episodes * args.max_episode_len])
        run.write_result(path, {
            "command": f"python benchmark/compare_lemol.py {name}", "seeds": f"learning runs 1 to {RUNS}",
            "machine": run.machine(), "minutes": f"{(time.time() - began) / 60:.1f}", "commit": run.commit(),
            "date": datetime.date.today(), "note": f"defender: {kind}"}, rows)


if __name__ == "__main__":
    main()
