"""Train autoregressive pixel transformers on scikit-learn's digits, alike but for their attention.

Softmax, Krause, linear, Hadamard linear, selective synchronization and affine-scaled attention. Real data, no download: 1,797
handwritten digits of 8x8 pixels with 17 grey levels, read pixel by pixel in raster order. The models have the same parameters
(but for bandwidths, a coupling and the scale of affine attention), start from the same values and see the same batches.

    python examples/train_digits.py
    python examples/train_digits.py --models softmax hadamard --steps 400

Needs `pip install '.[examples]'`. The default run takes about two minutes on two CPU cores: layers of nearfar run there
as their PyTorch references. Loss curves and sampled images go to examples/out/.
"""

import argparse
import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from console import add_arguments, make_console, plt, positive, save, track
from pages import write_table
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import nearfar as nf

SIDE = 8
PIXELS = SIDE * SIDE
LEVELS = 17
START = LEVELS  # the token before the first pixel

DIM, HEADS, LAYERS, DROPOUT = 64, 4, 3, 0.1
BATCH = 64
LEARNING_RATE, WEIGHT_DECAY, WARMUP = 1e-2, 0.1, 20


def krause_attention():
    """Of the last 32 pixels, four rows, each head keeps the 16 whose keys are nearest."""
    return nf.nn.KrauseAttention(DIM, HEADS, locality=nf.SlidingWindow(4 * SIDE - 1, 0), top_k=16)


def linear_attention():
    """Features of all earlier pixels, 16 a head."""
    return nf.nn.LinearAttention(DIM, HEADS, causal=True)


def hadamard_attention():
    """Features of all earlier pixels, 64 a head: the products of 8 and 8, from the same 16 numbers."""
    return nf.nn.HadamardAttention(DIM, HEADS, factor_widths=(8, 8), causal=True)


def synchronization_attention():
    """Earlier pixels whose oscillators lock. At the paper's scale of frequencies, 1, hardly any would."""
    return nf.nn.SynchronizationAttention(DIM, HEADS, causal=True, frequency_scale=0.5 * (DIM / HEADS) ** -0.5, bias=False)


def affine_attention(**options):
    """Every earlier pixel, by softmax weights that each pixel and head scales and shifts."""
    # The weight of the scale is drawn aside, so that all that is drawn later is what the other models draw.
    with torch.random.fork_rng(devices=[]):
        layer = nf.nn.AffineScaledAttention(DIM, HEADS, causal=True, **options)
    SoftmaxAttention()  # draws as much as every other layer
    return layer


class SoftmaxAttention(nn.Module):
    """Causal softmax attention over every earlier pixel, with the projections of the layers of nf.nn."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(DIM, DIM, bias=False) for _ in range(4))

    def forward(self, x):
        q, k, v = (
            proj(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(self.attend(q, k, v).transpose(1, 2).flatten(2))

    def attend(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


MODELS = {
    "softmax": SoftmaxAttention,
    "krause": krause_attention,
    "linear": linear_attention,
    "hadamard": hadamard_attention,
    "synchronization": synchronization_attention,
    "affine": affine_attention,
}


class Block(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention_norm, self.attention = nn.LayerNorm(DIM), attention()
        self.mlp_norm = nn.LayerNorm(DIM)
        self.mlp = nn.Sequential(nn.Linear(DIM, 4 * DIM), nn.GELU(), nn.Linear(4 * DIM, DIM))
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x):
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class PixelTransformer(nn.Module):
    """Tokens (B, N), the start token first, to logits (B, N, LEVELS) of the next pixel."""

    def __init__(self, attention):
        super().__init__()
        self.level = nn.Embedding(LEVELS + 1, DIM)
        self.row = nn.Parameter(torch.randn(SIDE, 1, DIM))
        self.column = nn.Parameter(torch.randn(SIDE, DIM))
        self.blocks = nn.Sequential(*(Block(attention) for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(DIM), nn.Linear(DIM, LEVELS)

    def forward(self, tokens):
        position = (self.row + self.column).flatten(0, 1)  # of the pixel to predict
        x = self.level(tokens) + position[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def load_images(device):
    """(training, held-out) images, int64 (images, PIXELS); a fifth of every digit is held out."""
    digits = load_digits()
    split = train_test_split(digits.data, test_size=0.2, stratify=digits.target, random_state=0)
    return tuple(torch.as_tensor(part, dtype=torch.int64, device=device) for part in split)


def bits_per_pixel(model, images):
    """Mean negative log-likelihood in bits, differentiable."""
    tokens = F.pad(images[:, :-1], (1, 0), value=START)
    return F.cross_entropy(model(tokens).flatten(0, 1), images.flatten()) / math.log(2)


@torch.no_grad()
def held_out_bits(model, images):
    """Bits per pixel of a trained model, from here on in eval mode."""
    return bits_per_pixel(model.eval(), images).item()


def histogram_bits_per_pixel(train, held_out, per_position):
    """Held-out bits per pixel of the grey-level frequencies of the training images, counts started at 1."""
    counts = F.one_hot(train, LEVELS).sum(0) + 1
    counts = counts if per_position else counts.sum(0).expand(PIXELS, LEVELS)
    bits = -(counts / counts.sum(1, keepdim=True)).log2()
    return bits[torch.arange(PIXELS, device=held_out.device), held_out].mean().item()


class Run(NamedTuple):
    """A training: the model, and of every step its loss in bits per pixel and the norm of the loss's gradient, unclipped."""

    model: nn.Module
    losses: list[float]
    gradient_norms: list[float]
    seconds: float


def train(attention, images, steps, seed, progress, name):
    torch.manual_seed(seed)
    model = PixelTransformer(attention).to(images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    batches = torch.Generator().manual_seed(seed)
    task = progress.add_task(name, total=steps, loss=float("nan"))

    bits_per_pixel(model, images[:BATCH]).backward()  # outside the clock: on a GPU the first call compiles kernels
    optimizer.zero_grad()
    synchronize(images.device)
    started = time.perf_counter()
    losses, norms = [], []
    for step in range(steps):
        batch = images[torch.randint(len(images), (BATCH,), generator=batches).to(images.device)]
        loss = bits_per_pixel(model, batch)
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.detach())
        if step % 10 == 0:
            progress.update(task, loss=loss.item())
        progress.advance(task)
    synchronize(images.device)
    seconds = time.perf_counter() - started
    return Run(model, torch.stack(losses).tolist(), torch.stack(norms).tolist(), seconds)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def sample(model, count, seed, device):
    """Images drawn pixel by pixel from the model, (count, PIXELS)."""
    generator = torch.Generator(device).manual_seed(seed)
    tokens = torch.full((count, 1), START, device=device)
    for _ in range(PIXELS):
        probabilities = model(tokens)[:, -1].softmax(-1)
        tokens = torch.cat((tokens, torch.multinomial(probabilities, 1, generator=generator)), 1)
    return tokens[:, 1:]


LOSS = "{task.fields[loss]:.3f} bits/pixel"


def window_of(steps, most=10):
    """Steps that a point of a smoothed curve is the mean of: few for a short run, which would be a single point."""
    return max(1, min(most, steps // 5))


def draw_losses(curves):
    """curves: name -> (training losses, held-out bits per pixel)."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, (losses, held_out) in curves.items():
        window = window_of(len(losses))
        smooth = torch.tensor(losses).unfold(0, window, 1).mean(1).tolist()
        (line,) = axes.plot(range(window, len(losses) + 1), smooth, label=name)
        axes.axhline(held_out, color=line.get_color(), linestyle=":", linewidth=1)
    axes.set(xlabel="step", ylabel="bits per pixel", title=f"Pixel transformers on 8x8 digits, {PIXELS} tokens an image")
    axes.legend(
        title=f"solid: training, mean of {window} steps\ndotted: held out at the end", alignment="left", frameon=False
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_images(rows):
    """rows: name -> images (count, PIXELS)."""
    figure, grid = plt.subplots(len(rows), 10, figsize=(10, 1.2 * len(rows)), squeeze=False, layout="constrained")
    figure.suptitle("8x8 digits, drawn pixel by pixel from each model")
    for axes_row, (name, images) in zip(grid, rows.items(), strict=True):
        axes_row[0].set_title(name, loc="left", fontsize=9)
        for axes, image in zip(axes_row, images.reshape(-1, SIDE, SIDE).tolist(), strict=True):
            axes.imshow(image, cmap="gray_r", vmin=0, vmax=LEVELS - 1)
            axes.set_axis_off()
    return figure


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which to train (default: all)")
    parser.add_argument("--steps", type=positive, default=200, help="optimizer steps of each model (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the samples")
    add_arguments(parser, device=True)
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    console = make_console()
    images, held_out = load_images(device)

    table = Table(
        title=f"{len(held_out)} held-out digits after {options.steps} steps of {BATCH} images on {device}",
        caption="tokens/s and seconds are those of training",
    )
    table.add_column("model", no_wrap=True)
    for column in ("bits/pixel", "parameters", "tokens/s", "seconds"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_row("uniform, log2(17)", f"{math.log2(LEVELS):.3f}")
    table.add_row("histogram", f"{histogram_bits_per_pixel(images, held_out, per_position=False):.3f}")
    table.add_row("histogram per position", f"{histogram_bits_per_pixel(images, held_out, per_position=True):.3f}")

    curves, pictures = {}, {"held-out digits": held_out[:10]}
    with track(console, LOSS) as progress:
        for name in options.models:
            model, losses, _, seconds = train(MODELS[name], images, options.steps, options.seed, progress, name)
            bits = held_out_bits(model, held_out)
            curves[name] = losses, bits
            pictures[f"sampled from {name}"] = sample(model, 10, options.seed, device)
            parameters = sum(parameter.numel() for parameter in model.parameters())
            tokens = options.steps * BATCH * PIXELS
            table.add_row(name, f"{bits:.3f}", f"{parameters:,}", f"{tokens / seconds:,.0f}", f"{seconds:.1f}")
    console.print(table)
    if options.page:
        write_table(options.page, "train_digits", table)

    losses = {name: {"training": losses, "held_out": held_out} for name, (losses, held_out) in curves.items()}
    samples = {name: images.tolist() for name, images in pictures.items()}
    console.print(save(draw_losses(curves), options.out, "losses", losses), soft_wrap=True)
    console.print(save(draw_images(pictures), options.out, "samples", samples), soft_wrap=True)
    return curves


if __name__ == "__main__":
    main()
