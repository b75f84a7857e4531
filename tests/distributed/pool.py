"""Processes of torch.distributed that are started once for a test file and run many cases: starting them takes seconds."""

import multiprocessing as mp
import traceback

import torch
import torch.distributed as dist

from nearfar.distributed import linear

COUNTS = 1, 2, 4


class Pool:
    """Four processes with gloo, of which groups of 1, 2 or 4 run a case."""

    def __init__(self, store):
        context = mp.get_context("forkserver")
        # Imported once for all of them; the references' checkpoints import Dynamo.
        context.set_forkserver_preload(["nearfar.distributed", "torch._dynamo", "triton.language"])
        self.pipes, self.processes = [], []
        for rank in range(max(COUNTS)):
            pipe, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, str(store), theirs), daemon=True)
            process.start()
            self.pipes.append(pipe)
            self.processes.append(process)

    def __call__(self, count, function, *arguments):
        """What function(group, rank, *arguments) returns on each rank of a group of `count`; raises what it raises."""
        for pipe in self.pipes[:count]:
            pipe.send((count, function, arguments))
        answers = [pipe.recv() for pipe in self.pipes[:count]]
        for rank, (_, failure) in enumerate(answers):
            assert failure is None, f"rank {rank} of {count}: {failure}"
        return [result for result, _ in answers]

    def close(self):
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(30)


def _work(rank, store, pipe):
    torch.set_num_threads(1)
    linear.PIECE = 8  # so that small shards have several pieces
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=max(COUNTS))
    groups = {count: dist.new_group(list(range(count))) for count in COUNTS}
    while (task := pipe.recv()) is not None:
        count, function, arguments = task
        try:
            pipe.send((function(groups[count], rank, *arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
    dist.destroy_process_group()
