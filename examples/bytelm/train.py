"""Training, and what is measured during and after it."""

import math
import time
from typing import NamedTuple

import torch
from torch import nn

from bytelm import data
from bytelm.model import ByteModel, Size

# Learning rate, weight decay, the warm-up of 100 steps and the schedule, warm-up, stable and decay, are those of arXiv
# 2602.23057. Its clipping and betas are not known to us.
LEARNING_RATE, WEIGHT_DECAY, BETAS, CLIP = 1e-3, 0.1, (0.9, 0.95), 1.0


class Plan(NamedTuple):
    size: Size
    batch: int
    steps: int
    warmup: int
    decay: int  # last steps, over which the learning rate falls to 0
    held_out: int  # windows for bits per byte
    watched: int  # of these, windows whose attention weights are read

    def rate(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup, (self.steps - step) / max(self.decay, 1))


CPU = Plan(Size(dim=64, heads=4, layers=2, context=128), batch=8, steps=100, warmup=20, decay=20, held_out=64, watched=8)
GPU = Plan(Size(dim=512, heads=8, layers=6, context=2048), batch=8, steps=600, warmup=100, decay=100, held_out=64, watched=2)


def train(attention, text: data.Text, plan: Plan, seed: int, device: torch.device, progress, task) -> dict:
    """Train one model; its figures as they go into the record."""
    torch.manual_seed(seed)
    model = ByteModel(attention, plan.size).to(device)
    train_text, held_out = text.train.to(device), data.spaced(text.held_out.to(device), plan.held_out, plan.size.context)
    starts = torch.randint(
        len(train_text) - plan.size.context, (plan.steps, plan.batch), generator=torch.Generator().manual_seed(seed)
    ).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=device.type == "cuda"
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.rate)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda")

    untimed = min(10, plan.steps - 1)  # the first steps compile kernels
    losses, norms = [], []
    with autocast:
        before = watch(model, held_out[: plan.watched, :-1])
    for step in range(plan.steps):
        if step == untimed:
            synchronize(device)
            started = time.perf_counter()
        with autocast:
            loss = model.bits_per_byte(data.windows(train_text, starts[step], plan.size.context))
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), CLIP))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
        if step % 20 == 0:
            progress.update(task, loss=loss.item())
        progress.advance(task)
    synchronize(device)
    seconds = time.perf_counter() - started

    with torch.no_grad(), autocast:
        model.eval()
        bits = torch.stack([model.bits_per_byte(windows) for windows in held_out.split(plan.batch)]).mean().item()
        after = watch(model, held_out[: plan.watched, :-1])
    return {
        "seed": seed,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bits_per_byte": bits,
        "tokens_per_second": (plan.steps - untimed) * plan.batch * plan.size.context / seconds,
        "losses": rounded(losses),
        "gradient_norms": rounded(norms),
        "before": before,
        "after": after,
    }


@torch.no_grad()
def watch(model, tokens) -> dict[str, list[float]]:
    """By layer: the first token's share of the weights, their entropy in nats; of synchronization, the share of locked pairs.

    The query of the first token, which sees only itself, does not count. Entropy is that of |w| / sum |w|: weights of affine
    attention can be negative.
    """
    training = model.training
    model.eval()
    found = {}
    for attention, x in model.attention_inputs(tokens):
        weights = attention.weights(x)[:, :, 1:].abs()
        shares = weights / weights.sum(-1, keepdim=True).clamp_min(1e-12)
        found.setdefault("first_token_mass", []).append(shares[..., 0].mean().item())
        found.setdefault("entropy", []).append(torch.special.entr(shares).sum(-1).mean().item())
        if hasattr(attention, "locked_share"):
            found.setdefault("locked_share", []).append(attention.locked_share(x))
    model.train(training)
    return found


def rounded(numbers) -> list[float]:
    return [round(number, 4) if math.isfinite(number) else math.nan for number in torch.stack(numbers).tolist()]


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
