"""Robots with several drivers: against gymnasium (always) and MaMuJoCo (where gymnasium-robotics is
installed), and hoppers whose parameters must not compound."""

import gymnasium
import mujoco
import numpy as np
import pytest
import torch

from envs import make
from envs.multi_agent_mujoco import FIELDS

WORLDS = {"cheetah_dir": "HalfCheetah", "hopper_param": "Hopper", "two_agent_half_cheetah": "HalfCheetah"}
equal, close = np.array_equal, np.testing.assert_allclose


def put(twin, env, b):
    """Brings a gymnasium env into row b's state and, for a Hopper, to its task's numbers."""
    if env.name == "hopper_param":
        for field, scale in zip(FIELDS, env.task[b]):
            getattr(twin.model, field)[:] *= scale
        mujoco.mj_setConst(twin.model, twin.data)
    nq = twin.model.nq
    twin.set_state(env.state[b, 1 : 1 + nq], env.state[b, 1 + nq :])
    return twin


def actions(env, scale, draw):
    return [scale * torch.randn(env.num_envs, n, generator=draw) for n in env.action_dims]


def steady(env, t):
    """Feedback that keeps hoppers on their foot for about 45 steps."""
    q, v = env.state[:, 1:7], env.state[:, 7:]
    u = 8 * (0.05 * np.sin(0.3 * t) - q)[:, 3:] - 0.4 * v[:, 3:]
    u[:, 2] += 4 * q[:, 2] + v[:, 2] + 0.6 * v[:, 0]
    return [torch.tensor(np.clip(u[:, i : i + 1], -1.3, 1.3), dtype=torch.float32) for i in range(3)]


def play(env, steps, scale=1.0, seed=0):
    draw, out = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        obs, reward, terminated, truncated, info = env.step(actions(env, scale, draw))
        state = torch.tensor(env.state)
        out.append((torch.cat(obs, 1), reward, terminated, truncated, info["diverged"], state))
    return [torch.stack(x) for x in zip(*out)]


def compare(env, twins, step, seen, steps=200):
    """Steps both side by side, also on after a fall. step(b, joint action) -> reward, ended, info; seen(b) ->
    what the drivers see. Returns how often a row was healthy and how often not."""
    draw, count = torch.Generator().manual_seed(0), np.zeros(2, int)
    for t in range(steps):
        action = steady(env, t) if env.name == "hopper_param" and t < 100 else actions(env, 1.0, draw)
        obs, reward, terminated, _, info = env.step(action)
        env.terminated[:] = False  # nobody rests here
        joint = torch.cat(action, 1).double().numpy()
        for b, twin in enumerate(twins):
            twin.data.qacc_warmstart[:] = 0  # the stated convention
            wanted, ended, paid = step(b, joint[b])
            assert equal(env.state[b, 1:], np.concatenate([twin.data.qpos, twin.data.qvel]))
            for mine, theirs in zip(obs, seen(b)):
                assert equal(mine[b].numpy(), np.asarray(theirs).astype(np.float32))
            if env.name == "cheetah_dir":
                wanted = env.task[b, 0] * paid["reward_forward"] + paid["reward_ctrl"]
            elif env.name == "two_agent_half_cheetah":
                cost = -0.1 * (np.clip(joint[b], -1, 1) ** 2).sum()  # of what reaches the motors
                wanted = env.task[b, 0] * paid["reward_forward"] + cost
            assert equal(reward[b].numpy(), np.full(env.num_agents, wanted).astype(np.float32))
            assert terminated[b].item() == ended
            count[int(ended)] += 1
        assert not info["diverged"].any()
    return count


# ---------------------------------------------------------------- parity


@pytest.mark.parametrize("name", WORLDS)
def test_bit_equal_to_gymnasium_for_200_steps(name):
    torch.manual_seed(1)
    env = make(name, 8 if name == "hopper_param" else 3)
    obs = env.reset(torch.tensor([[1.0], [-1.0], [1.0]]) if "cheetah" in name else None)
    twins = [put(gymnasium.make(f"{WORLDS[name]}-v5").unwrapped, env, b) for b in range(env.num_envs)]

    def seen(b):
        d = twins[b].data
        if name == "two_agent_half_cheetah":
            return [twins[b]._get_obs()] * 2
        if name == "cheetah_dir":
            joint = lambda j: [d.joint(j).qpos[0], d.joint(j).qvel[0]]
            return [[x for j in leg for x in joint(j)] for leg in (("bfoot", "bshin", "bthigh"),
                                                                  ("ffoot", "fshin", "fthigh"))]
        return [[d.joint(j).qpos[0], np.clip(d.joint(j).qvel[0], -10, 10)]
                for j in ("thigh_joint", "leg_joint", "foot_joint")]

    def step(b, joint):
        _, reward, ended, _, info = twins[b].step(joint)
        return reward, ended, info

    for b in range(env.num_envs):
        for mine, theirs in zip(obs, seen(b)):
            assert equal(mine[b].numpy(), np.asarray(theirs).astype(np.float32))
    healthy, fallen = compare(env, twins, step, seen)
    assert healthy >= 40 * env.num_envs and (fallen > 0) == (name == "hopper_param")


@pytest.mark.parametrize("name, conf", [("cheetah_dir", "2x3"), ("hopper_param", "3x1")])
def test_bit_equal_to_mamujoco_for_200_steps(name, conf):
    mamujoco = pytest.importorskip("gymnasium_robotics").mamujoco_v1
    torch.manual_seed(2)
    env = make(name, 4)
    obs = env.reset(torch.tensor([[1.0], [-1.0]] * 2) if name == "cheetah_dir" else None)
    worlds = [mamujoco.parallel_env(WORLDS[name], conf, agent_obsk=0, global_categories=()) for _ in range(4)]
    twins = []
    for b, world in enumerate(worlds):
        world.reset(seed=0)
        twins.append(put(world.single_agent_env.unwrapped, env, b))
        assert [world.observation_space(a).shape[0] for a in world.possible_agents] == list(env.obs_dims)
        assert [world.action_space(a).shape[0] for a in world.possible_agents] == list(env.action_dims)
    seen = lambda b: worlds[b]._get_obs().values()
    for b in range(4):
        for mine, theirs in zip(obs, seen(b)):
            assert equal(mine[b].numpy(), theirs.astype(np.float32))

    def step(b, joint):
        parts = np.split(joint, np.cumsum(env.action_dims)[:-1])
        out = worlds[b].step(dict(zip(worlds[b].possible_agents, parts)))
        return out[1]["agent_0"], out[2]["agent_0"], out[4]["agent_0"]

    compare(env, twins, step, seen)


# ---------------------------------------------------------------- contract, start, reward


@pytest.mark.parametrize("name, N, O, A, H, D", [
    ("cheetah_dir", 2, (6, 6), (3, 3), 1000, 1), ("hopper_param", 3, (2, 2, 2), (1, 1, 1), 1000, 4),
    ("two_agent_half_cheetah", 2, (17, 17), (3, 3), 200, 1)])
def test_sizes(name, N, O, A, H, D):
    env = make(name, 2)
    assert (env.num_agents, env.obs_dims, env.action_dims, env.horizon, env.task_dim, env.discrete) == \
        (N, O, A, H, D, False)
    assert make(name, 2, horizon=7).horizon == 7
    obs = env.reset()
    before = [o.clone() for o in obs]
    again, reward, *_ = env.step([torch.ones(2, n) for n in A])
    assert reward.shape == (2, N) and (reward == reward[:, :1]).all()
    assert all(torch.equal(o, b) and not torch.equal(o, a) for o, b, a in zip(obs, before, again))


def test_starts():
    torch.manual_seed(0)
    for name, low, std in ("cheetah_dir", 0.1, 0.1), ("hopper_param", 0.005, 0.01 / 12**0.5):
        env = make(name, 3000)
        env.reset(env.all_tasks()[:1].expand(3000, -1))
        nq = env.sim.model.nq
        q, v = env.state[:, 1 : 1 + nq] - env.sim.model.qpos0, env.state[:, 1 + nq :]
        assert np.abs(q).max() <= low
        close(q.std(0), 2 * low / 12**0.5, rtol=0.05)
        close(v.std(0), std, rtol=0.05)
        assert (np.abs(v).max() > 0.3) == (name == "cheetah_dir")  # a normal has tails
    assert env.sim.model.qpos0[1] == 1.25 and env.sim.dt == 0.008


@pytest.mark.parametrize("name, scale", [("cheetah_dir", 2.0), ("two_agent_half_cheetah", 2.0)])
def test_the_two_directions_sum_to_the_control_cost(name, scale):
    """r(+1) + r(-1) = 2 ctrl: of the actions asked for (cheetah_dir), or of those clipped."""
    def run(sign):
        torch.manual_seed(0)
        env = make(name, 2)
        env.reset(torch.full((2, 1), sign))
        return play(env, 20, scale)

    right, left = run(1.0), run(-1.0)
    assert torch.equal(right[0], left[0]) and torch.equal(right[-1], left[-1])  # the task is not seen
    draw, env = torch.Generator().manual_seed(0), make(name, 2)
    for t in range(20):
        a = torch.cat(actions(env, scale, draw), 1)
        cost = -0.1 * ((a if name == "cheetah_dir" else a.clamp(-1, 1)) ** 2).sum(1)
        torch.testing.assert_close((right[1] + left[1])[t, :, 0], 2 * cost, atol=1e-5, rtol=1e-6)


def test_each_driver_moves_its_own_leg():
    def run(i):
        torch.manual_seed(0)
        env = make("cheetah_dir", 1)
        env.reset()
        env.state[:, 2] += 2.0  # in the air, so that the floor does not join in
        start = env.state.copy()
        env.step([torch.full((1, 3), float(i == j)) for j in range(2)])
        return env.state[0, 4:10] - start[0, 4:10]

    rest, back, front = run(None), run(0), run(1)
    assert np.abs(back - rest)[:3].min() > 3 * np.abs(back - rest)[3:].max()
    assert np.abs(front - rest)[3:].min() > 3 * np.abs(front - rest)[:3].max()


def test_direction_of_the_two_agent_cheetah():
    assert make("two_agent_half_cheetah", 3).all_tasks().tolist() == [[1.0]]
    env = make("two_agent_half_cheetah", 3, direction=-1)
    env.reset()
    assert env.task.tolist() == [[-1.0]] * 3
    env.reset(torch.tensor([[1.0], [-1.0], [1.0]]))
    assert env.task[:, 0].tolist() == [1, -1, 1]


# ---------------------------------------------------------------- tasks of the hopper


def test_task_sets():
    torch.manual_seed(0)
    env = make("hopper_param", 1)
    train, test = env.all_tasks("train"), env.all_tasks("test")
    assert train.shape == (50, 4) and test.shape == (10, 4) and train.dtype == torch.float32
    both = torch.cat([train, test])
    assert 0.5 <= both.min() and both.max() <= 1.5 and len(both.unique(dim=0)) == 60
    close(train.numpy(), np.random.default_rng(0).uniform(0.5, 1.5, (50, 4)), rtol=1e-6)
    close(test.numpy(), np.random.default_rng(1).uniform(0.5, 1.5, (10, 4)), rtol=1e-6)
    for split, K in ("train", 50), ("test", 10):
        drawn, tasks = env.sample_tasks(20_000, split), env.all_tasks(split)
        count = (drawn[:, None] == tasks).all(-1).float().mean(0)
        close(count.sum(), 1, rtol=1e-5)
        assert (count - 1 / K).abs().max() < 0.008 * (10 / K) ** 0.5 + 0.002
    cheetah = make("cheetah_dir", 1)
    assert cheetah.all_tasks("train").tolist() == cheetah.all_tasks("test").tolist() == [[-1.0], [1.0]]


def test_parameters_never_compound():
    """A thousand random tasks leave base * scale, and a task that comes again its trajectory, bit by bit."""
    torch.manual_seed(0)
    env = make("hopper_param", 2)
    base = {field: getattr(env.sim.model, field).copy() for field in FIELDS}
    tasks = env.all_tasks()

    def run(k):
        torch.manual_seed(1)
        env.reset(tasks[[k, k]])
        return play(env, 15, scale=0.3)

    first, other = run(0), run(1)
    for _ in range(1000):
        env.reset(env.sample_tasks(2))
    for b in range(2):
        for field, scale in zip(FIELDS, env.task[b]):
            assert equal(getattr(env.sim.models[b], field), base[field] * scale), field
            assert equal(getattr(env.sim.model, field), base[field])
    again = run(0)
    assert all(map(torch.equal, first, again)) and not torch.equal(first[-1], other[-1])


def test_derived_numbers_follow_the_task():
    """What MuJoCo makes of mass and inertia when it compiles a model is made anew (mj_setConst)."""
    env = make("hopper_param", 2)
    env.reset(torch.tensor([[1.0, 1.0, 1.0, 1.0], [1.5, 1.0, 1.0, 1.5]]))
    plain, heavy = env.sim.models
    base = env.sim.model
    close(plain.dof_invweight0, base.dof_invweight0, rtol=1e-12)
    close(heavy.body_subtreemass, 1.5 * base.body_subtreemass, rtol=1e-12)
    assert (heavy.dof_invweight0[:2] < 0.7 * base.dof_invweight0[:2]).all()
    assert not equal(heavy.body_invweight0, base.body_invweight0)


@pytest.mark.parametrize("i", range(4))
def test_each_multiplier_matters_where_it_should(i):
    task = torch.ones(2, 4)
    task[1, i] = 1.4
    torch.manual_seed(0)
    env = make("hopper_param", 2)
    env.reset(task)
    changed = {f for f in FIELDS if not equal(getattr(env.sim.models[0], f), getattr(env.sim.models[1], f))}
    assert changed == {FIELDS[i]}
    env.state[1] = env.state[0]
    for _ in range(5):
        env.step([torch.tensor([[0.5], [0.5]])] * 3)
    if FIELDS[i] != "geom_friction":  # friction needs a slide; others show at once
        assert not equal(env.state[0], env.state[1])


def test_rows_with_one_task_share_a_model_and_rows_do_not_touch():
    torch.manual_seed(0)
    env, tasks = make("hopper_param", 6, threads=2), make("hopper_param", 1).all_tasks()
    env.reset(tasks[[3, 1, 3, 0, 1, 3]])
    assert len({id(m) for m in env.sim.models}) == 3
    start, together = env.state.copy(), play(env, 40, scale=0.3)
    for b, k in enumerate([3, 1, 3, 0, 1, 3]):
        solo, draw = make("hopper_param", 1, threads=0), torch.Generator().manual_seed(0)
        solo.reset(tasks[[k]])
        solo.state[:] = start[b]
        for t in range(40):
            action = [0.3 * torch.randn(6, 1, generator=draw)[b : b + 1] for _ in range(3)]
            obs, reward, terminated, *_ = solo.step(action)
            assert equal(solo.state[0], together[-1][t, b].numpy())
            assert torch.equal(reward[0], together[1][t, b]) and terminated[0] == together[2][t, b]


# ---------------------------------------------------------------- ends


def test_who_has_fallen_rests():
    torch.manual_seed(0)
    env = make("hopper_param", 5)
    env.reset()
    env.state[2, 2] = 0.6
    obs, reward, terminated, truncated, diverged, state = play(env, 10, scale=0.1)
    assert terminated.T.tolist() == [[b == 2] * 10 for b in range(5)] and not truncated.any()
    assert (reward[0, 2] != 0).all() and (reward[1:, 2] == 0).all()
    assert reward[0, 2, 0] < reward[0, 0, 0] - 0.5  # v5 pays nothing for being healthy to who is not
    assert (obs[:, 2] == obs[0, 2]).all() and (state[:, 2] == state[0, 2]).all() and not diverged.any()


def test_healthy_is_gymnasiums():
    twin, rng = gymnasium.make("Hopper-v5").unwrapped, np.random.default_rng(0)
    state = np.zeros((400, 13))
    state[:, 2] = rng.uniform(0.6, 1.3, 400)
    state[:, 3] = rng.uniform(-0.3, 0.3, 400)
    state[:, 4:] = rng.uniform(-1, 1, (400, 9)) * np.where(rng.random((400, 1)) < 0.3, 110, 5)
    wanted = []
    for s in state:
        twin.data.qpos[:], twin.data.qvel[:] = s[1:7], s[7:]
        wanted.append(twin.is_healthy)
    assert 0 < np.mean(wanted) < 1
    assert make("hopper_param", 1)._healthy(state).tolist() == wanted


@pytest.mark.parametrize("name", WORLDS)
def test_a_diverged_row_is_ended_and_counted(name):
    torch.manual_seed(0)
    env = make(name, 3)
    env.reset()
    action = [torch.zeros(3, n) for n in env.action_dims]
    action[1][1] = torch.nan
    for _ in range(2):
        obs, reward, terminated, _, info = env.step(action)
        assert info["diverged"].tolist() == [False, True, False] and terminated[1]
        assert (reward[1] == 0).all() and all(o.isfinite().all() for o in obs) and reward.isfinite().all()


def test_threads_change_nothing():
    def run(threads):
        torch.manual_seed(0)
        env = make("hopper_param", 23, threads=threads)
        env.reset()
        return play(env, 25)

    alone = run(0)
    assert alone[2].any()
    assert all(map(torch.equal, alone, run(3)))


def test_rows_shared_among_processes_start_as_in_one():
    world = lambda B: make("hopper_param", B, threads=1)
    task = world(1).all_tasks()[:5]
    torch.manual_seed(3)
    whole = torch.cat(world(5).reset(task), 1)
    parts = []
    for first, n in (0, 2), (2, 3):
        torch.manual_seed(3)
        parts.append(torch.cat(world(n).reset(task[first : first + n], part=(first, 5)), 1))
    assert torch.equal(torch.cat(parts), whole) and len(whole.unique(dim=0)) == 5


@pytest.mark.parametrize("call", [
    lambda: make("hopper_param", 2, horizon=0), lambda: make("hopper_param", 2).sample_tasks(3, "val"),
    lambda: make("hopper_param", 2).reset(torch.ones(2, 1)),
    lambda: make("hopper_param", 2).reset(torch.zeros(2, 4)),
    lambda: make("hopper_param", 1).reset(torch.full((1, 4), torch.nan)),
    lambda: make("two_agent_half_cheetah", 2, direction=0),
    lambda: [env := make("cheetah_dir", 2), env.reset(), env.step(torch.zeros(2, 6))],
    lambda: [env := make("cheetah_dir", 2), env.reset(), env.step([torch.zeros(2, 3)])]])
def test_bad_input_is_one_clear_line(call):
    with pytest.raises(ValueError) as e:
        call()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", WORLDS)
def test_picture(name):
    env = make(name, 2)
    env.reset()
    try:
        frame = env.render(1)
    except RuntimeError as e:
        pytest.skip(str(e))
    assert frame.shape == (240, 320, 3) and frame.dtype == np.uint8 and frame.std() > 5
