"""Every env against the package that users trust, on the same states and actions, or against its rules
written out the obvious way: mpe2, gymnasium's MuJoCo v5, MaMuJoCo, rware. A test skips where its package is
missing."""

import math
from itertools import combinations
from types import SimpleNamespace

import gymnasium
import mujoco
import numpy as np
import pytest
import torch
from test_envs import tupled

from envs import WORLDS, make
from envs.goal_robots import ANT_POSE, TEXTS
from envs.multi_agent_mujoco import FIELDS
from envs.warehouse import LAYOUTS, SHELVES, WIDTH, number

equal, close = np.array_equal, np.testing.assert_allclose
NOTHING, FORWARD, LEFT, RIGHT, TOGGLE = range(5)
UP, DOWN, WEST, EAST = range(4)


# ---------------- envs/particle.py: mpe2, and the rules of 2017 written out
B = 4  # worlds side by side
PARTICLES = [name for name, (module, _) in WORLDS.items() if module == "particle"]


def put(env, goal=None, **state):
    """Brings worlds into a state, worlds first: pos, vel (B, bodies, 2), action (B, sum A), goal (B, G), task
    (B, D). What is not named stays. Returns the observations, as a tuple."""
    for name, x in state.items():
        getattr(env, "place" if name == "pos" and hasattr(env, "place") else name).T[:] = x
    if hasattr(env, "goal"):
        env._aim(env.goal if goal is None else np.array(goal, int).T)
    return tupled(env._observe())


def random_action(env, rng, soft):
    """Numbers (B,), or floats (B, A) in steps of 1 / 1024, whose differences mpe2's float32 holds exactly;
    some rows are all zeros, which is silence."""
    if soft:
        action = [rng.integers(1025, size=(env.num_envs, n)) / 1024 for n in env.action_dims]
        action = [torch.tensor(a * (rng.random((len(a), 1)) < 0.8)).float() for a in action]
    else:
        action = [torch.tensor(rng.integers(math.prod(s), size=env.num_envs)) for s in env.action_splits]
    return tuple(action) if env.num_agents > 1 else action[0]


def theirs(name, **options):
    """mpe2's world of that name. Skips the test where mpe2 is not installed."""
    pytest.importorskip("mpe2", reason="parity needs mpe2 (pip install mpe2)")
    version = 4 if name == "simple_speaker_listener" else 3
    module = __import__(f"mpe2.{name}_v{version}", fromlist=["parallel_env"])
    return module.parallel_env(max_cycles=1000, **options)


CASES = [  # our options, and those of mpe2 for the same world
    *((name, {}, {}) for name in PARTICLES),
    ("simple_spread", dict(num_agents=8), dict(N=8)),
    ("simple_tag", dict(num_agents=3), dict(num_good=1, num_adversaries=2, num_obstacles=1)),
    ("simple_tag", dict(num_agents=8, num_adversaries=5), dict(num_good=3, num_adversaries=5)),
    ("simple_adversary", dict(num_agents=8), dict(N=7)),
    ("simple_world_comm", dict(num_agents=8, num_adversaries=5), dict(num_good=3, num_adversaries=5)),
]


def goals_of(name, world):
    """The numbers of the landmarks that are goals (or the key) in mpe2's world, in the order of ours."""
    agents, number = world.agents, lambda x: next(i for i, m in enumerate(world.landmarks) if m is x)
    if name in ("simple_adversary", "simple_push"):
        return [number(agents[0].goal_a)]
    if name == "simple_crypto":
        return [number(agents[0].goal_a), int(agents[2].key.argmax())]
    if name in ("simple_speaker_listener", "simple_reference"):
        return [number(agent.goal_b) for agent in agents if agent._goal_b is not None]
    return []


def crowd(rng, worlds, env):
    """Puts mpe2's worlds and ours into the same random states, with the first two agents in contact and in a
    third of them nearly all bodies. Returns our observation."""
    for world in worlds:
        scale = rng.choice([0.15, 0.5, 1.1, 4])  # the last is outside the square
        for body in world.entities:
            body.state.p_pos = rng.uniform(-scale, scale, 2)
        for agent in world.agents[1:2]:
            agent.state.p_pos = world.agents[0].state.p_pos + rng.uniform(-0.06, 0.06, 2)
        for agent in world.agents:
            agent.state.p_vel = rng.uniform(-1.5, 1.5, 2) * agent.movable
    return put(env, action=0, goal=[goals_of(env.name, world) for world in worlds],
               pos=[[body.state.p_pos for body in world.entities] for world in worlds],
               vel=[[agent.state.p_vel for agent in world.agents] for world in worlds])


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("name, ours, other", CASES)
def test_the_same_steps_as_mpe2(name, ours, other, soft):
    env, rng = make(name, B, horizon=1000, **ours), np.random.default_rng(0)
    copies = [theirs(name, continuous_actions=soft, **other) for _ in range(B)]
    raw, pushes, names = [copy.unwrapped for copy in copies], 0, copies[0].possible_agents
    assert env.obs_dims == tuple(copies[0].observation_space(a).shape[0] for a in names)
    assert env.num_adversaries == sum("adversary" in a or a == "eve_0" for a in names)
    for episode in range(3):
        for b, copy in enumerate(copies):
            copy.reset(seed=100 * episode + b)
        obs, gain = crowd(rng, [r.world for r in raw], env), [[]] * B
        seen = [[r.observe(agent) for agent in names] for r in raw]
        for _ in range(8):
            for b in range(B):
                assert all(np.allclose(o[b], x, rtol=1e-6, atol=1e-7) for o, x in zip(obs, seen[b]))
            action, before = random_action(env, rng, soft), env.dist[: len(env.touch)]
            pushes += (before < env.touch[:, :, None]).sum()
            obs, reward, *_ = env.step(action)
            obs = tupled(obs)
            for b, copy in enumerate(copies):
                moves = {a: x[b].numpy() if soft else int(x[b]) for a, x in zip(names, tupled(action))}
                seen[b], gain[b], *_ = (list(x.values()) for x in copy.step(moves))
            place = [[body.state.p_pos for body in r.world.entities] for r in raw]
            close(env.place.T, place, rtol=0, atol=1e-9)
            close(env.gain.T, gain, rtol=0, atol=1e-9)
            close(reward, gain, rtol=1e-6, atol=1e-6)
    assert pushes > 2 * B or not len(env.touch)  # the forces were there


def test_an_episode_begins_like_theirs():
    """Where bodies and goals may be: every coordinate of every entity, over many worlds."""
    for name in PARTICLES:
        env, copy = make(name, 400), theirs(name)
        env.reset()
        starts, goals = [], []
        for seed in range(400):
            copy.reset(seed=seed)
            starts.append([body.state.p_pos for body in copy.unwrapped.world.entities])
            goals.append(goals_of(name, copy.unwrapped.world))
        starts = np.array(starts)
        close(env.place.T.min(0), starts.min(0), atol=0.06)  # 0.9 and 1 are told apart
        close(env.place.T.max(0), starts.max(0), atol=0.06)
        assert not env.vel.any() and not env.action.any()
        for mine, their in zip(env.goal, np.array(goals).T):
            share = np.bincount(their) / 400
            close(np.bincount(mine, minlength=len(share)) / 400, share, atol=0.15)


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0)


def plain_step(pos, vel, force, size, solid, top):
    """(pos, vel) of one world after a step of 2017, one body after the other. The first len(vel) move; those
    in `solid` push them off; top: the movers' speed limits."""
    force = [list(f) for f in force]
    for i in range(len(vel)):
        for j in solid:
            if j != i and (d := math.dist(pos[i], pos[j])) > 0:
                push = 100 * 1e-3 * softplus((size[i] + size[j] - d) / 1e-3) / d
                force[i] = [f + push * (x - y) for f, x, y in zip(force[i], pos[i], pos[j])]
    vel = [[0.75 * v + 0.1 * f for v, f in zip(*both)] for both in zip(vel, force)]
    vel = [[v * min(1, limit / max(math.hypot(*way), 1e-9)) for v in way] for way, limit in zip(vel, top)]
    return [[x + 0.1 * v for x, v in zip(*both)] for both in zip(pos, vel)] + pos[len(vel) :], vel


def original_reward(env, pos, mpe2):
    """The rewards of 2017 at these positions, agent by agent. mpe2: those of that package, for scenarios in
    which nothing changed."""
    N, K, L = env.num_agents, env.num_adversaries, env.landmarks
    far = lambda i, j: math.dist(pos[i], pos[j])
    goal = [N + g for g in env.goal[:, 0]]
    if env.name == "simple_spread":
        touch = lambda i, j: far(i, j) < env.radii[i] + env.radii[j]
        cover = sum(min(far(i, N + l) for i in range(N)) for l in range(L))
        return [sum(-cover - sum(touch(i, j) for j in range(N)) for i in range(N))] * N  # also j = i
    if env.name == "simple_adversary":
        good = sum(far(k, goal[0]) for k in range(K)) - min(far(i, goal[0]) for i in range(K, N))
        return [-(far(k, goal[0]) ** 2) for k in range(K)] + [good] * (N - K)
    if env.name == "simple_push":
        return [min(far(i, goal[0]) for i in range(K, N)) - far(k, goal[0]) for k in range(K)] + \
            [-far(i, goal[0]) for i in range(K, N)]
    if env.name == "simple_speaker_listener":
        return [-2 * far(1, goal[0]) ** 2] * 2
    if env.name == "simple_reference":
        return [-(far(1, goal[0]) ** 2) - far(0, goal[1]) ** 2] * 2
    if env.name == "simple_world_comm":  # 0.05 times the way to food has the other sign
        return [r + 0.1 * (i >= K) * min(far(i, N + 1), far(i, N + 2)) for i, r in enumerate(mpe2)]
    return mpe2


@pytest.mark.parametrize("name, options", [
    *((name, {}) for name in PARTICLES),
    *((name, dict(num_agents=7, num_adversaries=3)) for name in ("simple_adversary", "simple_push",
                                                                "simple_world_comm"))])
def test_steps_and_rewards_of_the_original(name, options):
    env, twin = (make(name, 1, dialect=dialect, **options) for dialect in ("mpe", "mpe2"))
    rng = np.random.default_rng(1)
    top = [math.inf] * env.num_agents if env.limit is None else env.limit[:, 0]
    for scale in (0.2, 0.5, 1, 2):
        env.reset()
        put(env, pos=scale * env.place.T, vel=rng.uniform(-1, 1, (1, env.num_agents, 2)))
        for _ in range(8):
            action, (pos,), (vel,) = random_action(env, rng, True), env.place.T.tolist(), env.vel.T.tolist()
            pushes = [a[0].tolist() if split[0] == 5 else [0] * 5  # who only speaks stands still
                      for a, split in zip(tupled(action), env.action_splits)]
            force = [[t * (a[1] - a[2]), t * (a[3] - a[4])] for t, a in zip(env.thrust[:, 0], pushes)]
            pos, vel = plain_step(pos, vel, force, env.radii, range(len(env.touch)), top)
            env.step(action)
            close(env.place.T[0], pos, rtol=0, atol=1e-9)
            close(env.vel.T[0], vel, rtol=0, atol=1e-9)
            put(twin, goal=env.goal.T, pos=env.place.T, vel=env.vel.T, action=env.action.T)
            wanted = original_reward(env, pos, twin.reward(twin.dist)[:, 0])
            close(env.gain[:, 0], wanted, rtol=0, atol=1e-9)


# ---------------- envs/targets.py: the rules written out body by body
TARGETS = ["spread", "spread_large", "hunting", "hunting_large"]


@pytest.mark.parametrize("name", TARGETS)
def test_the_same_steps_as_the_rules_written_out(name, monkeypatch):
    B, rng, met = 5, np.random.default_rng(0), 0
    env, hunting, large = make(name, B, horizon=200), "hunting" in name, name.endswith("large")
    env.reset(env.all_tasks()[torch.arange(B) % len(env.all_tasks())])
    env.pos[..., 0] *= 0.25  # a crowd
    env.pos[..., 1] *= 1.3  # at the walls and beyond
    put(env)
    N, M = (3, 5 + large) if hunting else (2 + large,) * 2
    size = [0.15] * N + [0.05] * (N + 1)
    if hunting:
        size = [0.1] * 3 + [0.05] * (2 + large) + [0.2] * (2 * large)
    top, solid = ([1.0] * 3 + [1.2] * (M - 3), range(len(size))) if hunting else ([math.inf] * N, [])
    wall = lambda d, s: math.copysign(0.1, d) * softplus((s + 0.2 - abs(d)) / 1e-3)
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype=None: torch.full(shape, 0.75, dtype=dtype))
    for _ in range(60):
        states = env.pos.T.tolist(), env.vel.T.tolist()
        push = 1.3 * rng.normal(size=(B, N, 2)).astype(np.float32)
        obs, reward, terminated, *_ = env.step(torch.tensor(push).unbind(1))
        for b, (pos, vel, task) in enumerate(zip(*states, env.task.T.tolist())):
            action = [*push[b].tolist(), *[[0.5, 0.5]] * (M - N)]  # who wanders draws 0.75
            if hunting:  # the prey that counts flees
                prey = N + task.index(1)
                d, near = min((math.dist(p, pos[prey]), p) for p in pos[:N])
                action[prey] = [(y - x) / d for x, y in zip(near, pos[prey])]
            force = [[(3 if hunting else 5) * u + wall(x - 1.2, s) + wall(x + 1.2, s) for u, x in zip(a, p)]
                     for a, p, s in zip(action, pos, size)]
            pos, _ = plain_step(pos, vel, force, size, solid, top)
            close(env.pos.T[b], pos, rtol=0, atol=1e-10)
            far = [[math.dist(p, q) for q in pos] for p in pos]
            met += any(far[i][j] < size[i] + size[j] for i, j in combinations(range(len(pos)), 2))
            for i in range(N):
                others = [j for j in range(len(pos)) if j != i]
                others = others if hunting else others[N - 1 :] + others[: N - 1]
                sees = [not hunting or far[i][j] < 1.414 for j in others]
                ways = [s * (y - x) for j, s in zip(others, sees) for x, y in zip(pos[i], pos[j])]
                dists = [s * far[i][j] for j, s in zip(others, sees)] if hunting else []
                close(obs[i][b], [*pos[i], *ways, *dists], atol=1e-5)
            counts = [N + k for k, c in enumerate(task) if c]
            if hunting:
                gaps = [far[i][counts[0]] for i in range(N)]
                wanted = [-0.1 * sum(gaps) + 10 * (d < 0.15) for d in gaps]
            else:
                wanted = [-N * sum(min(far[i][j] for i in range(N)) for j in counts)] * N
            close(reward[b], wanted, rtol=1e-5, atol=1e-5)
        assert not terminated.any()
    assert met  # bodies did touch


@pytest.mark.parametrize("name, low, high", [("spread", -295, -273), ("hunting", -46, -41)])
def test_random_play_returns_what_the_original_does(name, low, high):
    """-284 and -43.5 were measured with the paper's own worlds."""
    torch.manual_seed(0)
    env, total = make(name, 256), 0
    env.reset()
    for _ in range(100):
        total = total + env.step(torch.randn(env.num_agents, 256, 2))[1].mean(1)
    assert low < total.mean() < high


# ---------------- envs/warehouse.py: rware 2.0
BOTH = "\n".join([".........."] + ["..xx..xx.."] * 7 + ["..........", "....gg...."])
HALVES = {"both": "..xx..xx..", "right": "......xx..", "left": "..xx......"}


def text(layout):
    """The layout as rware reads it."""
    rows = BOTH.split("\n")
    for y in range(1, 8):
        kept = layout in HALVES or (y < 5 if layout == "top" else y > 3)
        rows[y] = HALVES.get(layout, HALVES["both"]) if kept else ".........."
    return "\n".join(rows)


def one_hot(*layouts):
    return torch.eye(5)[[list(LAYOUTS).index(k) for k in layouts]]


class Luck:
    """Stands for rware's random generator: chooses what our row chose."""

    def __init__(self, env, b):
        self.env, self.b = env, b

    def choice(self, candidates):
        # Which goal asks? It asks with the list as it is, so the shelf on the first goal is still on it.
        first = self.world.grid[1, 9, 4]
        goal = 0 if first and self.world.shelfs[first - 1] in self.world.request_queue else 1
        return candidates[int(self.env.luck[self.b, 2 * (self.env.t - 1) + goal] * len(candidates))]


def twin(rware, env, b, layout):
    """rware's world in the state of row b."""
    world = rware.Warehouse(3, 8, 1, env.num_agents, 0, 2, 4, None, None, rware.RewardType.INDIVIDUAL,
                            layout=text(layout))
    world.reset(seed=0)
    world._np_random = Luck(env, b)
    world._np_random.world = world
    where = lambda cell: (int(cell % WIDTH) - 2, int(cell // WIDTH) - 2)
    standing = sorted((s.y, s.x) for s in world.shelfs)
    assert standing == sorted((c // WIDTH - 2, c % WIDTH - 2) for c in SHELVES[list(LAYOUTS).index(layout)])
    assert [(s.y, s.x) for s in world.shelfs] == standing  # in reading order, as ours
    for s, shelf in enumerate(world.shelfs):
        shelf.x, shelf.y = where(env.shelf[b, s])
    for i, robot in enumerate(world.agents):
        robot.x, robot.y = where(env.cell[b, i])
        robot.dir = rware.Direction(int(env.direction[b, i]))
        s = env.carries[b, i]
        robot.carrying_shelf = world.shelfs[s] if s < env.shelf.shape[1] - 1 else None
    world.request_queue = [world.shelfs[s] for s in np.flatnonzero(env.requested[b])]
    world._recalc_grid()
    return world


def load(env, draw):
    """Robots that stand on no shelf get one to carry, mostly a requested one, so that much is delivered."""
    for b in range(env.num_envs):
        free = [s for s in np.flatnonzero(env.there[b]) if env.shelf[b, s] not in env.cell[b]]
        free.sort(key=lambda s: (not env.requested[b, s], draw.random()))
        for i in range(env.num_agents):
            if draw.random() < 0.7 and free and env.cell[b, i] not in env.shelf[b]:
                s = free.pop(0)
                env.shelf[b, s], env.carries[b, i] = env.cell[b, i], s


def bold(env, draw):
    """(B, N) actions. Who carries what is asked for mostly goes to the goals; the others wander about."""
    shape, (x, y) = env.cell.shape, (env.cell % WIDTH - 2, env.cell // WIDTH - 2)
    heading = np.where(y < 9, DOWN, np.where(x < 4, EAST, WEST))
    heading = np.where((x < 4) & (draw.random(shape) < 0.5), EAST, heading)
    heading = np.where((x > 5) & (draw.random(shape) < 0.5), WEST, heading)
    seek = np.where(env.direction == heading, FORWARD, draw.choice([LEFT, RIGHT], shape))
    wander = draw.choice(5, shape, p=[0.05, 0.6, 0.15, 0.15, 0.05])
    eager = env.requested[env.row, env.carries] & (draw.random(shape) < 0.8)
    return torch.tensor(np.where(eager, seek, wander))


def same_order(monkeypatch, rware):
    """rware's graph library lists a part of a graph in the graph's own order, not in that of a Python set."""
    import networkx

    class Graph(networkx.DiGraph):
        def subgraph(self, nodes):
            part = networkx.DiGraph()
            part.add_edges_from(edge for edge in self.edges if edge[0] in nodes)
            return part

    monkeypatch.setattr(rware, "nx", SimpleNamespace(
        DiGraph=Graph, weakly_connected_components=networkx.weakly_connected_components,
        algorithms=networkx.algorithms, NetworkXNoCycle=networkx.NetworkXNoCycle))


def same(env, world, b):
    none = env.shelf.shape[1] - 1
    where = lambda cell: (int(cell % WIDTH) - 2, int(cell // WIDTH) - 2)
    carried = [r.carrying_shelf.id - 1 if r.carrying_shelf else none for r in world.agents]
    assert [(r.x, r.y) for r in world.agents] == [where(c) for c in env.cell[b]]
    assert [r.dir.value for r in world.agents] == env.direction[b].tolist()
    assert carried == env.carries[b].tolist()
    assert [(s.x, s.y) for s in world.shelfs] == [where(c) for c in env.shelf[b, : len(world.shelfs)]]
    assert {s.id - 1 for s in world.request_queue} == set(np.flatnonzero(env.requested[b]))


@pytest.mark.parametrize("N, ordered, episodes", [(4, True, 2), (12, True, 2), (4, False, 3)])
def test_the_same_steps_as_rware(N, ordered, episodes, monkeypatch):
    """To the last shelf if rware's graphs are `ordered`; else only chains of equal length differ."""
    rware = pytest.importorskip("rware.warehouse")
    if ordered:
        same_order(monkeypatch, rware)
    torch.manual_seed(N)
    draw, layouts, paid, stuck, differ, B = np.random.default_rng(N), [*LAYOUTS] * 2, 0, 0, 0, 10
    env = make("rware", B, num_agents=N)
    for _ in range(episodes):
        env.reset(one_hot(*layouts))
        load(env, draw)
        obs = env._observe()
        worlds = [twin(rware, env, b, layouts[b]) for b in range(B)]
        theirs = [[w._make_obs(a) for a in w.agents] for w in worlds]
        for _ in range(30):
            assert all(equal(o[b].numpy(), t) for b in range(B) for o, t in zip(obs, theirs[b]))
            action, before = bold(env, draw), env.cell.copy()
            obs, reward, terminated, truncated, _ = env.step(list(action.T))
            for b in range(B):
                theirs[b], wanted, done, late, _ = worlds[b].step(action[b].tolist())
                now = np.array([number(r.x, r.y) for r in worlds[b].agents])
                if ordered or equal(now, env.cell[b]):
                    assert reward[b].tolist() == wanted and not done and not late and not terminated[b]
                    same(env, worlds[b], b)
                    continue
                differ += 1
                assert (now != before[b]).sum() == (env.cell[b] != before[b]).sum()  # as many robots move
                assert {*now} - {*before[b]} == {*env.cell[b]} - {*before[b]}  # into the same cells
                worlds[b] = twin(rware, env, b, layouts[b])  # it goes on from our state
                theirs[b] = [worlds[b]._make_obs(a) for a in worlds[b].agents]
            paid += reward.sum().item()
            stuck += ((action.numpy() == FORWARD) & (env.cell == before)).sum()
    assert paid > 10 * episodes and stuck > 80 * episodes  # deliveries and collisions were compared
    assert differ < 0.005 * B * 30 * episodes


# ---------------- envs/mujoco.py: gymnasium's HalfCheetah-v5 and Ant-v5, bit by bit
LOCOMOTION = ["half_cheetah_dir", "half_cheetah_vel", "ant_dir", "ant_vel", "ant_goal"]


def reference(env):
    """One gymnasium env a row, in the row's state."""
    kind = "HalfCheetah-v5" if env.obs_dims == (20,) else "Ant-v5"
    nq, twins = env.sim.model.nq, []
    for state in env.state:
        twin = gymnasium.make(kind).unwrapped
        twin.reset(seed=0)
        twin.set_state(state[1 : 1 + nq], state[1 + nq :])
        twins.append(twin)
    return twins


@pytest.mark.parametrize("name", LOCOMOTION)
def test_locomotion_is_bit_equal_to_gymnasium(name):
    B, H, cheetah = 4, 200, name.startswith("half")
    scale = torch.tensor([[1.0 if cheetah else 0.1]] * 2 + [[1.0]] * 2)  # ants fall under wild actions
    torch.manual_seed(1)
    env = make(name, B, horizon=H)
    obs = env.reset()

    def torso_is_right(b, qpos):
        frame.qpos[:] = qpos
        mujoco.mj_kinematics(env.sim.model, frame)
        torso = frame.body("torso")
        wanted = torso.xpos if cheetah else np.concatenate([torso.xmat, torso.xpos])
        close(obs[b, -len(wanted):].numpy(), wanted, rtol=1e-6, atol=1e-7)

    twins, frame = reference(env), mujoco.MjData(env.sim.model)
    over, slip = np.zeros(B, bool), []
    for b in range(B):  # a drawn orientation is not of unit length
        torso_is_right(b, env.state[b, 1 : 1 + env.sim.model.nq])
    for t in range(H):
        before = env.state.copy()
        action = scale * torch.randn(B, *env.action_dims)
        obs, reward, terminated, truncated, info = env.step(action)
        action = action.clamp(-1, 1)  # as ours does
        for b in np.flatnonzero(~over):
            twin, task = twins[b], env.task[b]
            twin.data.qacc_warmstart[:] = 0  # the stated convention
            seen, _, ended, _, paid = twin.step(action[b].double().numpy())
            assert equal(env.state[b, 1:], np.concatenate([twin.data.qpos, twin.data.qvel]))
            skipped = 0 if cheetah else 2  # v5 hides x (HalfCheetah), x and y (Ant)
            mine = obs[b, skipped : skipped + 17 + 10 * (not cheetah)]
            assert equal(mine.numpy(), seen[: len(mine)].astype(np.float32))
            torso_is_right(b, twin.data.qpos)

            v = (twin.data.qpos[0] - before[b, 1]) / 0.05
            close(v, paid["x_velocity"], atol=1e-12 if cheetah else 0.3)  # Ant-v5's positions lag
            slip.append(abs(v - paid["x_velocity"]))
            gain = {"dir": task[0] * v, "vel": -abs(v - task[0]),
                    "goal": -np.abs(twin.data.qpos[:2] - task[:2].repeat(3 - len(task))).sum()}[env.kind]
            if cheetah:
                wanted = gain + 0.5 * paid["reward_ctrl"]  # 0.05 |u|^2 where v5 pays 0.1
            else:
                alive = {"dir": 0.05, "vel": 1.05, "goal": 4.05}[env.kind]
                wanted = gain + 0.01 * paid["reward_ctrl"] + alive  # 0.005 |u|^2 where v5 pays 0.5
            close(reward[b, 0].item(), wanted, rtol=1e-6, atol=1e-7)
            assert terminated[b].item() == ended
            over[b] = ended
        assert truncated.tolist() == [t == H - 1] * B and not info["diverged"].any()
    assert not over[:2].any() and over[2:].any() != cheetah  # both ways to end were compared
    assert cheetah or np.mean(slip) < 0.02


# ---------------- envs/goal_robots.py: one MjData stepped in a loop
GOAL_ROBOTS = ["wheeled", "small_ant", "reacher2", "reacher4"]


@pytest.mark.parametrize("name", GOAL_ROBOTS)
@pytest.mark.parametrize("stale", [False, True])
def test_goal_robots_are_one_mjdata_in_a_loop(name, stale):
    env = make(name, 2, stale=stale)
    goal = np.array([[0.9, 0.1], [-0.3, 0.4]])
    env.reset(torch.tensor(goal))
    model = mujoco.MjModel.from_xml_string(TEXTS[name]())
    *robots, frame = [mujoco.MjData(model) for _ in range(3)]

    def where(q):
        """Of an arm its tip, as the model's own kinematics say."""
        frame.qpos[:] = q
        mujoco.mj_kinematics(model, frame)
        return frame.geom_xpos[-1, :2].copy() if name.startswith("reacher") else q[:2]

    if name == "small_ant":
        for robot in robots:
            robot.qpos[:] = ANT_POSE
    draw, over = torch.Generator().manual_seed(3), np.zeros(2, bool)
    speed = 100 if name == "reacher2" else 50
    for _ in range(200):
        action = torch.randn(2, model.nu, generator=draw)
        obs, reward, terminated, _, info = env.step(action)
        for b in np.flatnonzero(~over):
            robot, u = robots[b], action[b].double().clamp(-1, 1).numpy()
            robot.ctrl[:] = speed * u
            robot.qacc_warmstart[:] = 0  # the stated convention
            for substep in range(5):
                if substep == 4:
                    before_last = robot.qpos.copy()
                mujoco.mj_step(model, robot)
            assert np.array_equal(env.state[b, 1:], np.concatenate([robot.qpos, robot.qvel]))
            robot_q = before_last if stale else robot.qpos
            p, q, v = where(robot_q), robot.qpos, robot.qvel
            seen = {"wheeled": [q[:3], np.sin(q[3:4]), np.cos(q[3:4]), v[:4]], "small_ant": [q, v]}
            seen = seen.get(name, [np.cos(q), np.sin(q), v, where(q)])
            close(obs[b].numpy(), np.concatenate(seen), rtol=1e-6, atol=1e-7)
            gap = np.linalg.norm(p - goal[b])
            close(reward[b, 0].item(), -gap - 0.001 * 0.5 * (u**2).sum(), rtol=1e-6)
            radius = {"wheeled": 0.02, "small_ant": 0.03, "reacher2": 0.06, "reacher4": 0.11}[name]
            fallen = name == "small_ant" and not 0.15 <= robot.qpos[2] <= 0.45
            over[b] = gap < radius or fallen
            assert terminated[b].item() == over[b] and info["arrived"][b].item() == (gap < radius)
            if stale and name == "wheeled":  # the authors' body position
                close(p, robot.xpos[1, :2], atol=1e-12)


# ---------------- envs/multi_agent_mujoco.py: gymnasium, and MaMuJoCo
DRIVEN = {"cheetah_dir": ("HalfCheetah", "2x3"), "hopper_param": ("Hopper", "3x1"),
          "two_agent_half_cheetah": ("HalfCheetah", "2x3")}


def bring(twin, env, b):
    """Brings a gymnasium env into row b's state and, for a Hopper, to its task's numbers."""
    if env.name == "hopper_param":
        for field, scale in zip(FIELDS, env.task[b]):
            getattr(twin.model, field)[:] *= scale
        mujoco.mj_setConst(twin.model, twin.data)
    nq = twin.model.nq
    twin.set_state(env.state[b, 1 : 1 + nq], env.state[b, 1 + nq :])
    return twin


def steady(env, t):
    """Feedback that keeps hoppers on their foot for about 45 steps."""
    q, v = env.state[:, 1:7], env.state[:, 7:]
    u = 8 * (0.05 * np.sin(0.3 * t) - q)[:, 3:] - 0.4 * v[:, 3:]
    u[:, 2] += 4 * q[:, 2] + v[:, 2] + 0.6 * v[:, 0]
    return [torch.tensor(np.clip(u[:, i : i + 1], -1.3, 1.3), dtype=torch.float32) for i in range(3)]


@pytest.mark.parametrize("name", DRIVEN)
def test_drivers_are_bit_equal_to_mamujoco(name):
    """Both are stepped side by side, also on after a fall."""
    mamujoco = pytest.importorskip("gymnasium_robotics").mamujoco_v1
    torch.manual_seed(1)
    env, draw, fallen = make(name, 4), torch.Generator().manual_seed(0), 0
    obs = env.reset(torch.tensor([[1.0], [-1.0]] * 2) if "cheetah" in name else None)
    if name == "hopper_param":  # what a driver sees of a speed ends at 10
        env.state[3, 10:] = 12, -12, 11
        obs = env._see()
    worlds = [mamujoco.parallel_env(*DRIVEN[name], agent_obsk=0, global_categories=()) for _ in range(4)]
    names, twins = worlds[0].possible_agents, []
    for b, world in enumerate(worlds):
        world.reset(seed=0)
        twins.append(bring(world.single_agent_env.unwrapped, env, b))
    for t in range(200):
        for b, world in enumerate(worlds):
            seen = [twins[b]._get_obs()] * 2 if "two" in name else world._get_obs().values()
            assert all(equal(o[b], x.astype(np.float32)) for o, x in zip(obs, seen, strict=True))
        action = [torch.randn(4, n, generator=draw) for n in env.action_dims]
        action = steady(env, t) if name == "hopper_param" and t < 100 else action
        obs, reward, terminated, _, info = env.step(action)
        env.terminated[:] = False  # nobody rests here
        joint = torch.cat(action, 1).double().numpy()
        for b, twin in enumerate(twins):
            twin.data.qacc_warmstart[:] = 0  # the stated convention
            parts = np.split(joint[b], np.cumsum(env.action_dims)[:-1])
            _, *rest = worlds[b].step(dict(zip(names, parts)))
            wanted, ended, _, paid = (x["agent_0"] for x in rest)
            assert equal(env.state[b, 1:], np.concatenate([twin.data.qpos, twin.data.qvel]))
            if name == "cheetah_dir":
                wanted = env.task[b, 0] * paid["reward_forward"] + paid["reward_ctrl"]
            elif name == "two_agent_half_cheetah":
                cost = -0.1 * (np.clip(joint[b], -1, 1) ** 2).sum()  # of what reaches the motors
                wanted = env.task[b, 0] * paid["reward_forward"] + cost
            assert equal(reward[b].numpy(), np.full(env.num_agents, wanted).astype(np.float32))
            assert terminated[b].item() == ended
            fallen += ended
        assert not info["diverged"].any()
    assert fallen < 4 * 170 and (fallen > 0) == (name == "hopper_param")  # many steps of both kinds


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
