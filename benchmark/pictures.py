"""
The figure of README.md that needs a run: paths to six held-out goals of nav2d, before and after inner steps.

  python benchmark/pictures.py runs/nav2d benchmark/pictures/nav2d-paths.png
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1]))
import maml_rl  # noqa: E402


def main(run, target):
    """One episode (thin) and the mean of all (thick) for each number of inner steps; the star is the goal."""
    state = maml_rl.load(run)
    args = maml_rl.Args(**state["args"])
    net, x, _ = maml_rl.build(args, maml_rl.make_env(args, 1))
    goals, batches = maml_rl.evaluate(args, net, x.copy_(state["x"]))
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


if __name__ == "__main__":
    main(*sys.argv[1:])
