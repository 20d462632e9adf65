"""Coded MADDPG on a PettingZoo env: python own_env.py --env spread"""
from mpe2 import simple_spread_v3

import coded_maddpg
from envs.adapters import from_pettingzoo


def make_env(args, num_envs):
    return from_pettingzoo(simple_spread_v3.parallel_env, num_envs, horizon=args.horizon)


coded_maddpg.make_env = make_env
coded_maddpg.train(coded_maddpg.parse())
