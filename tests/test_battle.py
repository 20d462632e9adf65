"""Gathering letters, where magent2 is installed: against the package's own interface, and by hand."""

import numpy as np
import pytest
import torch

from envs import make

pytest.importorskip("magent2")

from envs.battle import LETTERS, RING, food  # noqa: E402

N, STAY, UP, LEFT, RIGHT, DOWN = 48, 14, 29, 30, 31, 32
equal = np.array_equal


def letters(text):
    return torch.eye(4)[["ABCD".index(k) for k in text]]


def everyone(B, **special):
    """Actions: all stay but some, special = {"a3": action of agent 3 in all rows}."""
    action = torch.full((N, B), STAY)
    for key, value in special.items():
        action[int(key[1:])] = value
    return list(action)


def crowd(env, b, robots, pieces):
    """Row b anew: agents at `robots`, food at `pieces`; agents that are not given are far off."""
    engine = env.engines[b]
    engine.reset()
    far = [(x, y) for y in (36, 37, 38) for x in range(1, 39)][: N - len(robots)]
    engine.add_agents(env.agents, method="custom", pos=[*robots, *far])
    engine.add_agents(env.food, method="custom", pos=pieces)
    env._look(b, np.arange(N))
    return env


def mixed(draw, B):
    """(N, B) random actions, half of them attacks, so that much happens."""
    return torch.tensor(draw.choice([*range(29), *list(range(29, 33)) * 7], (N, B)))


@pytest.mark.parametrize("seed", [0, 1])
def test_same_as_the_packages_own_interface(seed):
    from magent2.environments.gather.gather import _parallel_env, default_reward_args

    close = [(x, y) for y in range(10, 30) for x in range(10, 30)]

    class Letters(_parallel_env):
        def generate_map(self):
            foods, robots = self.env.get_handles()
            self.env.add_agents(robots, method="custom", pos=places)
            self.env.add_agents(foods, method="custom", pos=pieces)

    torch.manual_seed(seed)
    draw = np.random.default_rng(seed)
    for k, letter in enumerate("ABCD"):
        env = make("gather", 1)
        obs = env.reset(letters(letter))
        places, pieces = RING, food(letter)
        if k % 2:  # not the ring but a crowd
            spots = [at for at in close if at not in pieces]
            places = [spots[i] for i in draw.permutation(len(spots))[:N]]
        twin = Letters(40, False, default_reward_args, 1000, False)
        theirs, _ = twin.reset(seed=3)
        env.engines[0].set_seed(3)
        obs = crowd(env, 0, places, pieces)._observe()
        paid = died = 0
        for _ in range(60):
            for i in range(N):
                wanted = theirs.get(f"omnivore_{i}", np.zeros((15, 15, 5)))
                if env.alive[0, i]:
                    assert equal(obs[i][0].view(15, 15, 5).numpy(), wanted)
                else:
                    assert not obs[i].any()
            action = mixed(draw, 1)
            before, names = env.alive.copy(), list(twin.agents)
            obs, reward, terminated, truncated, info = env.step(list(action))
            theirs, wanted, ended, _, _ = twin.step({n: int(action[int(n[9:]), 0]) for n in names})
            for i in range(N):
                assert before[0, i] == (f"omnivore_{i}" in names)
                assert reward[0, i].item() == np.float32(wanted.get(f"omnivore_{i}", 0))
                assert info["alive"][0, i].item() == (not ended.get(f"omnivore_{i}", True)) or terminated[0]
            paid, died = paid + (reward > 0.3).sum().item(), died + (before & ~env.alive).sum()
            if terminated[0]:
                break
        assert k % 2 == 0 or (paid > 20 and died > 3)  # meals and deaths were compared


def test_letters_and_ring():
    env = make("gather", 4)
    env.reset(env.all_tasks())
    assert env.left.tolist() == [162, 180, 117, 162] == [len(food(k)) for k in LETTERS]
    thirds = range(2, 39, 3)
    assert len(RING) == N and set(RING) == {at for k in thirds for at in ((k, 2), (k, 38), (2, k), (38, k))}
    for b, letter in enumerate(LETTERS):
        assert {tuple(p) for p in env.engines[b].get_pos(env.food).tolist()} == set(food(letter))
        assert [tuple(p) for p in env.engines[b].get_pos(env.agents).tolist()] == RING
        xs, ys = zip(*food(letter))
        assert (min(xs), max(xs), min(ys), max(ys)) == (13, 27, 10, 30)
        dots = np.zeros((7, 5), int)
        np.add.at(dots, ((np.array(ys) - 10) // 3, (np.array(xs) - 13) // 3), 1)
        assert ["".join(".#"[d // 9] for d in row) for row in dots] == list(LETTERS[letter])
    assert len(set(map(tuple, LETTERS.values()))) == 4


def test_sizes():
    env = make("gather", 3)
    obs = env.reset()
    assert (env.num_agents, env.obs_shape, env.horizon, env.discrete) == (N, (15, 15, 5), 100, True)
    assert env.obs_dims == (1125,) * N and env.action_dims == (33,) * N
    assert len(obs) == N and all(o.shape == (3, 1125) and o.dtype == torch.float32 for o in obs)


def test_moves_and_what_is_seen():
    torch.manual_seed(0)
    env = make("gather", 1)
    env.reset(letters("A"))
    place = lambda: env.engines[0].get_pos(env.agents)[0].tolist()
    cells = [(x, y) for y in range(-3, 4) for x in range(-3, 4) if x * x + y * y <= 9]
    assert len(cells) == 29
    for a, (dx, dy) in enumerate(cells):
        crowd(env, 0, [(20, 20), (23, 21)], [(18, 25)])
        env.step(everyone(1, a0=a))
        assert place() == [20 + dx, 20 + dy]
    crowd(env, 0, [(20, 20), (23, 21)], [(18, 25)])
    seen = env._observe()[0][0].view(15, 15, 5)
    assert [np.argwhere(seen[..., c].numpy()).tolist() for c in range(5)] == \
        [[], [[7, 7], [8, 10]], [[7, 7], [8, 10]], [[12, 5]], [[12, 5]]]
    crowd(env, 0, [(2, 2)], [(18, 25)])
    wall = env._observe()[0][0].view(15, 15, 5)[..., 0]
    assert wall[5, 5:14].all() and wall[5:14, 5].all() and wall.sum() == 17


def test_meals_by_hand():
    torch.manual_seed(0)
    env = make("gather", 2)
    env.reset(letters("AA"))
    for b in range(2):
        crowd(env, b, [(10, 10), (12, 10)], [(10, 11)] if b == 0 else [(10, 11), (5, 5)])
    for k in range(5):
        obs, reward, terminated, _, info = env.step(everyone(2, a0=DOWN, a1=LEFT))
        wanted = 0.39 if k < 4 else 4.89
        torch.testing.assert_close(reward[:, :3], torch.tensor([[wanted, -0.11, -0.01]] * 2))
        assert terminated.tolist() == [k == 4, False]  # a row ends when all is eaten
        assert info["food"].tolist() == ([1, 2] if k < 4 else [0, 1])
    last = [o.clone() for o in obs]
    obs, reward, terminated, truncated, info = env.step(everyone(2, a0=DOWN))
    assert terminated.tolist() == [True, False] and not reward[0].any() and reward[1].any()
    assert all(torch.equal(o[0], l[0]) for o, l in zip(obs, last)) and not truncated.any()
    env.reset(letters("AB"))
    assert not env.terminated.any() and env.left.tolist() == [162, 180] and env.alive.all()


def test_deaths():
    torch.manual_seed(0)
    env = make("gather", 1)
    env.reset(letters("A"))
    crowd(env, 0, [(10, 10), (11, 10), (20, 20)], [(30, 30)])
    obs, reward, *_, info = env.step(everyone(1, a0=RIGHT))
    assert info["alive"][0].tolist() == [i != 1 for i in range(N)] and not obs[1].any() and obs[0].any()
    torch.testing.assert_close(reward[0, :3], torch.tensor([-0.11, -1.0, -0.01]))
    obs, reward, *_, info = env.step(everyone(1, a1=LEFT, a2=0))  # the dead one does nothing; ids still fit
    assert info["alive"][0].sum() == N - 1 and reward[0, 1] == 0 and not obs[1].any()
    assert env.engines[0].get_pos(env.agents)[1].tolist() == [20, 17]


def test_torchs_seed_decides_row_by_row():
    def run(n, first, total, seed):
        torch.manual_seed(seed)
        env, seeds = make("gather", n), []
        for engine in env.engines:
            engine.set_seed = seeds.append
        env.reset(letters("B" * n), part=(first, total))
        return seeds

    whole = run(5, 0, 5, 0)
    assert len(set(whole)) == 5 and whole[2:] == run(3, 2, 5, 0) and whole != run(5, 0, 5, 1)


def test_tasks():
    torch.manual_seed(0)
    env = make("gather", 1)
    for split in "train", "test":
        assert torch.equal(env.all_tasks(split), torch.eye(4))
        assert (env.sample_tasks(4000, split).mean(0) - 0.25).abs().max() < 0.03


@pytest.mark.parametrize("call", [
    lambda: make("gather", 2, horizon=0), lambda: make("gather", 2).reset(torch.zeros(2, 4)),
    lambda: make("gather", 2).reset(torch.eye(4)), lambda: make("gather", 1).sample_tasks(2, "val"),
    lambda: [env := make("gather", 2), env.reset(), env.step(everyone(1))],
    lambda: [env := make("gather", 1), env.reset(), env.step(everyone(1, a0=33))],
    lambda: [env := make("gather", 1), env.reset(), env.step(everyone(1, a0=-1))]])
def test_bad_input_is_one_clear_line(call):
    with pytest.raises(ValueError) as e:
        call()
    assert "\n" not in str(e.value) and len(str(e.value)) < 200


def test_picture():
    env = make("gather", 2)
    env.reset(letters("AC"))
    frame = env.render(1)
    assert frame.shape == (240, 240, 3) and frame.dtype == np.uint8
    at = lambda x, y: frame[6 * y + 3, 6 * x + 3].tolist()
    assert at(2, 5) == [60, 90, 215] and at(13, 20) == [215, 60, 60] and at(0, 7) == [150] * 3
    assert at(26, 20) == [255] * 3  # C is open
