"""2-D navigation against steps computed by hand, and its tasks."""

import pytest
import torch

from envs import make
from envs.base import STRIPES

close = torch.testing.assert_close


def test_steps_computed_by_hand():
    env = make("nav2d", 2, horizon=3)
    assert torch.equal(env.reset([[0.3, 0.4], [-0.1, 0.0]]), torch.zeros(2, 2))
    obs, reward, terminated, truncated, info = env.step(torch.tensor([[0.05, -0.02], [-3.0, 0.005]]))
    close(obs, torch.tensor([[0.05, -0.02], [-0.1, 0.005]]))  # the second row is clipped
    close(reward, -torch.tensor([[(0.25**2 + 0.42**2) ** 0.5], [0.005]]))
    assert terminated.tolist() == [False, True] and truncated.tolist() == [False, False] and info == {}
    obs, reward, terminated, truncated, _ = env.step(torch.full((2, 2), 0.1))
    close(obs, torch.tensor([[0.15, 0.08], [-0.1, 0.005]]))  # who has arrived rests, without reward
    close(reward, torch.tensor([[-((0.15**2 + 0.32**2) ** 0.5)], [0.0]]))
    assert terminated.tolist() == [False, True] and truncated.tolist() == [False, False]
    _, _, terminated, truncated, _ = env.step(torch.zeros(2, 2))
    assert terminated.tolist() == [False, True] and truncated.tolist() == [True, True]


@pytest.mark.parametrize("gap, over", [((0.009, 0.009), True), ((0.011, 0.0), False), ((0.0, -0.011), False)])
def test_arrival_needs_both_components(gap, over):
    env = make("nav2d", 1)
    env.reset(torch.tensor([gap]))
    assert env.step(torch.zeros(1, 2))[2].item() is over


def test_action_scale():
    env = make("nav2d", 1, action_scale=0.1)
    env.reset(torch.tensor([[0.5, 0.5]]))
    close(env.step(torch.tensor([[0.5, -7.0]]))[0], torch.tensor([[0.05, -0.1]]))


def test_tasks():
    env, n = make("nav2d", 3), 100_000
    torch.manual_seed(0)
    tasks = {split: env.sample_tasks(n, split) for split in ("train", "test")}
    stripes = {split: set(((t[:, 0].double() + 0.5) * STRIPES).floor().long().tolist())
               for split, t in tasks.items()}
    assert not stripes["train"] & stripes["test"]
    assert len(stripes["train"]) == 80 and len(stripes["test"]) == 20
    for t in tasks.values():
        assert t.shape == (n, 2) and t.dtype == torch.float32 and t.abs().max() <= 0.5
        close(t.mean(0), torch.zeros(2), atol=0.005, rtol=0)
        close(t.std(0), torch.full((2,), 1 / 12**0.5), atol=0.005, rtol=0)
    torch.manual_seed(0)
    assert torch.equal(env.sample_tasks(n), tasks["train"])
    assert (env.sample_tasks(n) != tasks["train"]).float().mean(0).min() > 0.99  # both components are drawn
    env.reset()
    assert len({tuple(t) for t in env.task.tolist()}) == 3  # one task a row
    state = torch.get_rng_state()
    env.reset(env.task)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn when the tasks are given


def test_render_shows_goal_and_point():
    env = make("nav2d", 2)
    env.reset([[0.0, 0.0], [0.5, 0.5]])
    frame = env.render(row=1, size=100)
    assert frame.shape == (100, 100, 3) and frame.dtype == "uint8"
    assert frame[25, 75].tolist() == [0, 160, 0] and frame[50, 50].tolist() == [0, 0, 0]
    assert frame[75, 25].tolist() == [255, 255, 255]
