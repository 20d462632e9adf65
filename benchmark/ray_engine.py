"""
coded_maddpg.py with its learners as actors on Ray, on this machine or on a cluster; every other argument is
the script's.

  python benchmark/ray_engine.py --env simple_spread --num-learners 15          # here
  RAY_ADDRESS=host:port python benchmark/ray_engine.py --num-learners 15        # on a cluster

Nodes join a cluster by `ray start --address host:port`; they need what requirements.txt lists, and not this
repository.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import coded_maddpg as c  # noqa: E402
from coded_maddpg import Job, encode  # noqa: E402


class RayLearners(c.Learners):
    """Of Ray's own restarts and cancellation nothing is used: a lost actor is replaced by a new one."""

    def __init__(self, C, spec, args):
        c.Central.__init__(self, C, spec, args)
        try:
            import ray

            if not ray.is_initialized():
                address = os.environ.get("RAY_ADDRESS", "local")
                ray.init(address, log_to_driver=False, logging_level="CRITICAL")
        except Exception as error:
            c.fail(f"no Ray: {type(error).__name__}: {error}")
        for module in (c, sys.modules[__name__]):  # what RemoteLearner names travels; nodes need no file
            if module.__name__ != "__main__":  # which travels anyway
                ray.cloudpickle.register_pickle_by_value(module)
        options = dict(num_cpus=0.1, max_concurrency=2, scheduling_strategy="SPREAD")
        self.ray, self.Actor = ray, ray.remote(**options)(RemoteLearner)
        self.busy, self.restarts = dict.fromkeys(range(len(C)), 0), 0
        self.process, self.pending = {}, {}

    def publish(self, job):
        self.job = self.ray.put([tensor.cpu().numpy() for tensor in job])
        for j in self.busy.keys() - self.process.keys():
            self.start(j)

    def start(self, j):
        self.process[j] = self.Actor.remote(self.C[j], self.spec)
        self.pending[self.process[j].ready.remote()] = j

    def send(self, j, t, hold):
        if t < 0:
            self.process[j].cancel.remote(-t)
        else:
            self.pending[self.process[j].work.remote(self.job, t, hold)] = j

    def receive(self, seconds):
        self.ray.wait([*self.pending], timeout=seconds)
        done, _ = self.ray.wait([*self.pending], num_returns=len(self.pending), timeout=0)
        for ref in done:
            j = self.pending.pop(ref, None)
            if j is None:  # of an actor that has been replaced meanwhile
                continue
            try:
                t, answer = self.ray.get(ref)
                yield j, t, None if answer is None else torch.from_numpy(np.array(answer))
            except self.ray.exceptions.RayError:
                yield j, -1, None

    def kill(self, j):
        self.pending = {ref: k for ref, k in self.pending.items() if k != j}
        self.ray.kill(self.process[j])


class RemoteLearner:
    """A learner as an actor with two threads, one of which listens for cancel."""

    def __init__(self, row, spec):
        torch.set_num_threads(1)
        self.row, self.spec, self.stop = row, spec, 0

    def ready(self):
        return 0, None

    def pid(self):
        return os.getpid()

    def cancel(self, t):
        self.stop = t

    def work(self, arrays, t, hold):
        def cancelled(seconds):
            end = time.monotonic() + seconds
            while self.stop < t and time.monotonic() < end:
                time.sleep(0.005)
            return self.stop >= t

        job = Job(*(torch.from_numpy(np.array(array)) for array in arrays))  # copies: Ray's are read-only
        answer = encode(self.row, job, self.spec, t, cancelled, hold)
        return t, None if answer is None else answer.numpy()


if __name__ == "__main__":
    c.Learners = RayLearners
    c.train(c.parse())
