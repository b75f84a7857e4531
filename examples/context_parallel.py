"""Train a small model whose sequence is sharded over processes: context parallelism.

Each process has the tokens of its shard and a whole copy of the model. Only attention looks beyond a shard: softmax attention
over a window of 16 keys exchanges a halo, linear attention a state. The gradients of parameters are parts, which are summed.
The task is to continue sequences that repeat 16 random tokens; the first 16 cannot be known. It runs on CPUs, or on one GPU
for each process:

    torchrun --nproc-per-node 2 examples/context_parallel.py
"""

import argparse
import math
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import nearfar as nf

PERIOD = 16
VOCABULARY = 24
LENGTH = 256  # tokens of a sequence, on all processes together
BATCH = 4
HEADS, WIDTH = 2, 16


class Attention(nn.Module):
    """Projections around an operator of nearfar.distributed, which is called with q, k and v (B, H, n, D)."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.out = nn.Linear(HEADS * WIDTH, HEADS * WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3 * HEADS, WIDTH)).transpose(1, 2).chunk(3, 1)
        return x + self.out(self.operator(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, group):
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, HEADS * WIDTH)
        self.phases = nn.Embedding(PERIOD, HEADS * WIDTH)
        self.layers = nn.Sequential(
            Attention(lambda q, k, v: nf.distributed.softmax_attention(q, k, v, window_size=(PERIOD - 1, 0), group=group)),
            Attention(lambda q, k, v: nf.distributed.linear_attention(q, k, v, causal=True, group=group)),
            nn.LayerNorm(HEADS * WIDTH),
            nn.Linear(HEADS * WIDTH, VOCABULARY),
        )

    def forward(self, tokens, positions):
        return self.layers(self.tokens(tokens) + self.phases(positions % PERIOD))


def train(group, steps, device="cpu"):
    """The loss of each step, in nats a token, the same on every rank."""
    torch.manual_seed(0)  # all ranks have the same parameters, and draw the same sequences
    model = Model(group).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    shard = torch.arange(LENGTH).chunk(group.size())[group.rank()].to(device)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        blocks = torch.randint(VOCABULARY, (BATCH, PERIOD), generator=generator).to(device)
        tokens, targets = blocks[:, shard % PERIOD], blocks[:, (shard + 1) % PERIOD]
        logits = model(tokens, shard)
        # This rank's part of the mean over all tokens, so that gradients add up to those of one process.
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / (BATCH * LENGTH)
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad, group=group)
        optimizer.step()
        total = loss.detach().clone()
        dist.all_reduce(total, group=group)
        losses.append(total.item())
    return losses


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    steps = parser.parse_args().steps
    on_gpus = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = f"cuda:{os.environ['LOCAL_RANK']}" if on_gpus else "cpu"
    dist.init_process_group("nccl" if on_gpus else "gloo")
    losses = train(dist.group.WORLD, steps, device)
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} processes on {device.split(':')[0]}, {LENGTH // dist.get_world_size()} tokens each")
        for step in range(0, steps, max(1, steps // 10)):
            print(f"step {step:4}: {losses[step]:.3f} nats a token")
        unknown = (PERIOD - 1) / LENGTH * math.log(VOCABULARY)
        print(f"last step: {losses[-1]:.3f}; {unknown:.3f} of it cannot be learned")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
