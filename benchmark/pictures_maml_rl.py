"""
Figures and tables of maml_rl.py that need a checkpoint: paths to six held-out goals; returns on the authors'
goals.

    python benchmark/pictures_maml_rl.py paths runs/nav2d paths.png
    python benchmark/pictures_maml_rl.py goals runs/a runs/b ...
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import maml_rl  # noqa: E402


def load(run):
    """The arguments of a run, its net and its x."""
    state = maml_rl.load(run)
    args = maml_rl.Args(**state["args"])
    net, x, _ = maml_rl.build(args, maml_rl.make_env(args, 1))
    return args, net, x.copy_(state["x"])


def paths(run, target):
    """One episode (thin) and the mean of all, before and after each inner step, for six held-out goals."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    args, net, x = load(run)
    goals, batches = maml_rl.evaluate(args, net, x)
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.4), sharex=True, sharey=True, layout="constrained")
    for i, ax in zip(range(0, len(goals), len(goals) // 6), axes.flat):
        for k, colour in zip(range(args.eval_steps + 1), ["0.6", "C0", "C1", "C2"]):
            walk = batches[k].obs[i].cpu()  # (H, E, 2)
            ax.plot(*walk[:, 0].T, color=colour, lw=0.5, alpha=0.5)
            ax.plot(*walk.mean(1).T, color=colour, lw=2.5, label=f"{k} steps")
        ax.plot(*goals[i].cpu(), "k*", ms=12)
        ax.set(xlim=(-0.6, 0.6), ylim=(-0.6, 0.6), aspect="equal")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(target, dpi=100)


def goals(*runs):
    """Mean and median return over nav2d's held-out goals and over the authors': 40 from numpy's seed 1."""
    theirs = torch.tensor(np.random.RandomState(1).uniform(-0.5, 0.5, (40, 2)), dtype=torch.float32)
    for run in runs:
        args, net, x = load(run)
        for name, tasks in ("held-out", None), ("authors'", theirs):
            env = maml_rl.make_env(args, 40 * args.eval_episodes)
            if tasks is not None:
                env.sample_tasks = lambda n, split, tasks=tasks: tasks
            args.eval_tasks = 40
            _, batches = maml_rl.evaluate(args, net, x, env)
            returns = torch.cat([batch.ret for batch in batches], 1)[..., 0]  # (40, steps + 1)
            for kind, row in ("mean", returns.mean(0)), ("median", returns.median(0).values):
                print(f"{run}  {name:9s} {kind:7s}" + "".join(f"{v:8.1f}" for v in row.tolist()))


if __name__ == "__main__":
    {"paths": paths, "goals": goals}[sys.argv[1]](*sys.argv[2:])
