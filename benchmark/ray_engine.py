"""
coded_maddpg.py with its learners as actors on Ray, on this machine or on a cluster; every other argument is
the script's.

  python benchmark/ray_engine.py --env simple_spread --num-learners 15  # here
  RAY_ADDRESS=auto python benchmark/ray_engine.py --env simple_spread --num-learners 15    # a running cluster

Nodes join one by `ray start --address host:port`. They need torch, numpy and tyro, not this repository.
"""

import os
import queue
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import coded_maddpg as c  # noqa: E402


class Ray:
    """What coded_maddpg.Local is for processes. Of Ray's own restarts and cancellation nothing is used."""

    def __init__(self, code, spec, args):
        try:
            import ray

            if not ray.is_initialized():
                address = os.environ.get("RAY_ADDRESS", "local")
                ray.init(address, log_to_driver=False, logging_level="CRITICAL")
        except Exception as error:
            c.fail(f"no Ray: {type(error).__name__}: {error}")
        for module in (c, sys.modules[__name__]):
            ray.cloudpickle.register_pickle_by_value(module)
        self.Actor = ray.remote(num_cpus=0.1, max_concurrency=2, scheduling_strategy="SPREAD")(RemoteLearner)
        self.ray, self.code, self.given = ray, code, (spec, code.exact, args.agent_seconds)
        self.actors, self.pending = {}, {}

    def publish(self, job):
        self.job = self.ray.put([tensor.cpu().numpy() for tensor in job])

    def start(self, j):
        self.actors[j], self.pending[j] = self.Actor.remote(self.code.C[j], *self.given), queue.SimpleQueue()
        self.pending[j].put(self.actors[j].ready.remote())

    def send(self, j, t, delay):
        if t < 0:
            self.actors[j].cancel.remote(-t)
        else:
            self.pending[j].put(self.actors[j].work.remote(self.job, t, delay))

    def receive(self, j):
        t, answer = self.ray.get(self.pending[j].get())
        return t, answer and (torch.from_numpy(answer[0].copy()), answer[1])

    def kill(self, j):
        self.ray.kill(self.actors[j])

    def close(self):
        for actor in self.actors.values():
            self.ray.kill(actor)


class RemoteLearner:
    """A learner as an actor with two threads, one of which listens for cancel."""

    def __init__(self, row, *given):
        torch.set_num_threads(1)
        self.row, self.given, self.stop = row, given, 0

    def ready(self):
        return 0, None

    def cancel(self, t):
        self.stop = t

    def work(self, arrays, t, delay):
        spec, exact, agent_seconds = self.given

        def cancelled(seconds):
            end = time.monotonic() + seconds
            while self.stop < t and time.monotonic() < end:
                time.sleep(0.005)
            return self.stop >= t

        job = c.Job(*(torch.from_numpy(array.copy()) for array in arrays))
        answer = c.encode(self.row, job, spec, t, exact, cancelled, agent_seconds, delay)
        return t, answer and (answer[0].numpy(), answer[1])


if __name__ == "__main__":
    c.Local = Ray
    c.train(c.parse())
