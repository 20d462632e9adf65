import gymnasium

import maml_rl
from envs.adapters import from_gymnasium

class Gravity(gymnasium.Wrapper):
    def reset(self, seed=None, options=None):
        self.unwrapped.g = options["task"][0]  # a row of the tasks below
        return self.env.reset(seed=seed)

def make_env(args, num_envs, part=(0, 1)):
    tasks = {"train": [[g] for g in range(4, 16, 2)], "test": [[5], [9], [13]]}
    return from_gymnasium(lambda: Gravity(gymnasium.make("Pendulum-v1")), num_envs,
                          horizon=args.horizon, tasks=tasks, part=part)

maml_rl.make_env = make_env
maml_rl.train(maml_rl.parse())
