"""A Matryoshka sparse autoencoder (SAE) in one file: nested dictionaries, trained as one set of latents.

    encode (training)    pre  = relu((x - b_dec) @ W_enc + b_enc); acts = the round(k B) largest of pre
    encode (inference)   acts = pre * (pre > threshold)
    prefix p             recon_p = b_dec + acts[:, :p] @ W_dec[:p]
    nested loss          L = sum_p w_p mean_B |x - recon_p|^2,  sum_p w_p = 1

Every prefix of the latents has to reconstruct alone, so the early latents stay general and are not absorbed
by the specialised ones that follow. One prefix, of all latents, is the plain BatchTopK SAE. B batch rows,
D model width, F latents, P prefixes. Not included: L1 and gated SAEs, transcoders.

Sections 1 to 4 are the whole method, literally, but for the gradients of ``batch_loss``, which 5 makes fast.
Around them: 6 runs, 7 files, 8 metrics, 9 the toy, 10 language models.

From arXiv: nested loss: Bussmann et al., 2503.17547; BatchTopK: Bussmann et al., 2412.06410; AuxK: Gao et
al., 2406.04093. From noanabeshima/matryoshka-saes: Pareto prefixes, energy order, the toy.
"""

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import mmap
import os
import shutil
import signal
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import distributed, nn

__version__ = "1.0.0"


def _require(ok, rule, value):
    if not ok:
        raise ValueError(f"{rule}, got {value!s:.300}")


# --------------------------------------- 1. the autoencoder
# What is trained, saved and used: four parameters and a threshold, on disk in SAELens' JumpReLU format.
# Uses ``prefix_lengths`` of section 2 and the readers and writers of section 7.

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
SAELENS = {"architecture": "jumprelu", "normalize_activations": "none", "reshape_activations": "none"}


class MatryoshkaSAE(nn.Module):
    """The SAE at the top of the file. ``W_dec`` starts as random unit rows, ``W_enc`` as its transpose."""

    def __init__(self, d_model, n_latents, prefixes=None, generator=None):
        super().__init__()
        W_dec = nn.functional.normalize(torch.randn(n_latents, d_model, generator=generator), dim=1)
        self.W_enc = nn.Parameter(W_dec.T.clone(memory_format=torch.contiguous_format))
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("threshold", torch.zeros(n_latents))  # one number repeated, of SAEs trained here
        self.prefixes = prefix_lengths(n_latents, prefixes)
        self.metadata = {}  # what its checkpoint says of it

    def pre_acts(self, x, prefix=None):
        """``relu((x - b_dec) @ W_enc + b_enc)`` of the first ``prefix`` latents: (..., D) -> (..., p)."""
        _require(x.shape[-1:] == self.b_dec.shape, f"x must be {len(self.b_dec)} wide", tuple(x.shape))
        x = torch.as_tensor(x).to(self.b_dec.dtype) - self.b_dec
        return torch.relu(x @ self.W_enc[:, :prefix] + self.b_enc[:prefix])

    def encode(self, x, prefix=None):
        """``pre * (pre > threshold)`` of raw ``x``: (..., D) -> (..., F), or (..., prefix)."""
        F = len(self.b_enc)
        _require(prefix is None or 1 <= prefix <= F, f"prefix must lie in [1, {F}]", prefix)
        pre = self.pre_acts(x, prefix)
        return pre * (pre > self.threshold[:prefix])

    def decode(self, acts):
        """``acts @ W_dec[:p] + b_dec``: (..., p) -> (..., D)."""
        return acts @ self.W_dec[: acts.shape[-1]] + self.b_dec

    def forward(self, x):
        return self.decode(self.encode(x))

    def save(self, folder):
        """Write weights and ``cfg.json`` into ``folder``, as SAELens 6 loads them (``load_from_disk``)."""
        metadata = {**self.metadata, "sae_lens_version": "6.0.0", "prefixes": list(self.prefixes)}
        cfg = {**SAELENS, "d_in": len(self.b_dec), "d_sae": len(self.b_enc), "dtype": "float32",
               "apply_b_dec_to_input": True, "device": "cpu", "metadata": metadata}
        tensors = {name: tensor.float().cpu().contiguous() for name, tensor in self.state_dict().items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        write(Path(folder, WEIGHTS), safetensors.torch.save(tensors))
        write(Path(folder, CONFIG), cfg)

    @classmethod
    def load(cls, source, device="cpu", revision=None):
        """Read a JumpReLU SAE, of ``save`` or of SAELens, from a folder or the Hub's "user/name"."""
        on_hub = isinstance(source, str) and source.count("/") == 1 and not Path(source).parent.is_dir()
        _require(on_hub or not revision, f"revision needs a Hub repository, {source} is none", revision)
        folder = download(source, [CONFIG, WEIGHTS], revision) if on_hub else Path(source)
        with reading(folder, "a JumpReLU checkpoint of SAELens"):
            cfg = json.loads((folder / CONFIG).read_text())
            for name, needed in SAELENS.items():  # the last is missing in older ones
                _require(cfg.get(name, "none") == needed, f"{name} must be {needed}", repr(cfg.get(name)))
            metadata = {"prefixes": [cfg["d_sae"]], **(cfg.get("metadata") or {})}
            sae = cls(cfg["d_in"], cfg["d_sae"], metadata.pop("prefixes"), torch.Generator())
            sae.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))  # these five, of these shapes
            for name, tensor in sae.state_dict().items():
                _require(tensor.isfinite().all(), f"{name} must be finite", "NaN or infinity")
        if not cfg.get("apply_b_dec_to_input", True):  # x @ W_enc = (x - b_dec) @ W_enc + b_dec @ W_enc
            sae.b_enc.data += sae.b_dec.data @ sae.W_enc.data
        sae.metadata = {name: value for name, value in metadata.items() if name != "sae_lens_version"}
        return sae.to(device)


# ----------------------------- 2. prefixes, selection, loss
# The method as pure functions, each its literal formula; autograd gives the gradients.
# Uses torch alone.


def prefix_lengths(n_latents, prefixes=None):
    """Rising lengths up to ``n_latents``, of such or of fractions up to 1 (by default Bussmann et al.'s)."""
    given = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0) if prefixes is None else tuple(prefixes)
    rising = len(given) > 0 and all(a < b for a, b in zip((0, *given), given))
    lengths = rising and given[-1] == n_latents and all(p == int(p) for p in given)
    _require(rising and (lengths or given[-1] == 1), f"prefixes must rise to {n_latents}, or to 1", given)
    return tuple(sorted({int(p) if lengths else max(1, round(p * n_latents)) for p in given}))


def sample_prefixes(n_latents, n_prefixes, power=0.5, generator=None):
    """``n_latents`` and ``n_prefixes - 1`` other lengths ``L``, with ``P(L) ~ L^power - (L-1)^power``."""
    weights = (torch.arange(n_latents, dtype=torch.float64) ** power).diff()
    drawn = torch.multinomial(weights, n_prefixes - 1, generator=generator) + 1
    return (*sorted(drawn.tolist()), n_latents)


def batch_topk(pre, n):
    """The ``n`` largest entries of ``pre`` (B, F), and their row-major positions, increasing: (n,), (n,)."""
    values, index = pre.flatten().topk(min(n, pre.numel()))
    index, by_position = index.sort()
    return values[by_position], index


def nested_loss(x, acts, W_dec, b_dec, prefixes, weights=None):
    """``sum_p w_p mean_B |x - b_dec - acts[:, :p] @ W_dec[:p]|^2`` of ``x (B, D)``, ``acts (B, F)``: scalar.
    ``prefixes`` end in F, weights default to 1/P. Learning rates do not transfer from the peers (README)."""
    weights = weights or [1 / len(prefixes)] * len(prefixes)
    sizes = np.diff(prefixes, prepend=0).tolist()
    recon, loss = b_dec, 0.0
    for block, rows, weight in zip(acts.split(sizes, dim=1), W_dec.split(sizes), weights):
        recon = recon + block @ rows
        loss = loss + weight * (x - recon).pow(2).sum(dim=1).mean()
    return loss


def batch_loss(sae, x, n, prefixes, weights=None):
    """A step's loss (gradients: section 5): ``nested_loss`` of ``x`` (B, D) by the ``n`` largest codes."""
    pre = sae.pre_acts(x)
    values, index = batch_topk(pre, n)
    acts = torch.zeros_like(pre).flatten().scatter(0, index, values).view_as(pre)
    return nested_loss(x, acts, sae.W_dec, sae.b_dec, prefixes, weights)


def aux_loss(x, residual, W_enc, b_enc, W_dec):
    """AuxK: ``mean |residual - a @ W_dec|^2 / mean |residual - mean|^2``, a scalar, about 1.
    ``x`` and the constant ``residual`` (B, D), ``x`` without ``b_dec``; weights of the m dead latents alone;
    ``a`` keeps per row the ``min(D / 2, m)`` largest of ``relu(pre)``. Gao et al. 2024, section A.2."""
    pre = torch.relu(x @ W_enc + b_enc)  # (B, m)
    values, index = pre.topk(min(x.shape[1] // 2 or 1, len(b_enc)), dim=1, sorted=False)
    recon = torch.zeros_like(pre).scatter(1, index, values) @ W_dec
    spread = (residual - residual.mean(dim=0)).pow(2).sum(dim=1).mean()
    return (residual - recon).pow(2).sum(dim=1).mean() / spread.clamp_min(1e-12)


# ---------------------------------------------- 3. settings
# All that a run depends on beside its rows, checked once, with the schedules that follow from it.
# Uses section 2's ``prefix_lengths``.

LEAST = {"k": 1e-12, "k_start": 1e-12, "lr": 1e-12, "clip": 1e-12, "pareto_power": 1e-9, "n_latents": 1,
         "max_norm": 1, "n_prefixes": 2, "batch_size": 1, "steps": 1, "dead_after": 1}  # of other numbers 0


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """All settings of a run, which with its rows fix the weights. ``ValueError`` names what is wrong."""

    n_latents: int
    k: float = 30.0  # active latents per row, on average; need not be whole
    prefixes: tuple | None = None  # lengths up to n_latents, or fractions up to 1; None: doubling from 1/16
    n_prefixes: int | None = None  # instead: sample this many at every step (Pareto)
    pareto_power: float = 0.5  # towards 0 favours short prefixes, 1 is uniform
    level_weights: tuple | None = None  # w_p, scaled to sum 1; None: all equal
    order: str = "stored"  # "energy": latents are sorted by their mean square
    batch_size: int = 2048  # rows
    steps: int = 10_000
    lr: float | None = None  # Adam's peak rate; None: by n_latents, batch_size and steps
    betas: tuple = (0.9, 0.999)
    warmup_steps: int | None = None  # of linear rise from 0; None: a tenth of the steps, at most 1000
    decay_fraction: float = 0.2  # of the steps, at the end, of linear fall to 0
    k_start: float | None = None  # at step 0, moving linearly to k over k_anneal_steps; None: k
    k_anneal_steps: int = 0  # at least 1 with k_start
    n_latents_start: int | None = None  # with spare ones, of which the least energetic go
    prune_window: tuple = (0.2, 0.6)  # fractions of the steps between which they go
    aux_coef: float = 1 / 32  # weight of the loss that revives dead latents
    dead_after: int = 200_000  # rows without firing that make a latent dead
    clip: float = 1.0  # largest norm of the whole gradient
    max_norm: float = 10.0  # rows further from the median one, in median distances, are left out
    dtype: str | None = None  # of the products: float32, bfloat16, float16; None: bfloat16 on CUDA
    seed: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            if isinstance(value, (list, np.generic)):  # of JSON, of numpy
                value = tuple(value) if isinstance(value, list) else value.item()
                object.__setattr__(self, name, value)
            kind = field.type | int if isinstance(0.5, field.type) else field.type
            rule = f"{name} must be {getattr(kind, '__name__', kind)}"
            _require(isinstance(value, kind), rule, repr(value))
            numbers, least = value if isinstance(value, tuple) else (value,), LEAST.get(name, 0)
            sound = all(type(n) in (int, float) and least <= n < 2**63 for n in numbers)
            _require(sound or isinstance(value, str | None), f"{rule} in [{least}, 2^63)", repr(value))
        if self.lr is None:  # sweeps: README
            rate = 0.0165 * (self.batch_size / self.steps) ** 0.25 / self.n_latents ** (1 / 6)
            object.__setattr__(self, "lr", min(0.01, rate))
        F, window = self.n_latents, self.prune_window
        n_prefixes, weights = self.n_prefixes or len(self.prefix_lengths()), self.weights()
        for name, most in dict(k=F, k_start=F, n_prefixes=F, pareto_power=1, decay_fraction=1).items():
            _require((value := getattr(self, name) or 0) <= most, f"{name} must be at most {most}", value)
        for name, ok, rule in (
            ("k", round(min(self.k, self.k_start or F) * self.batch_size) >= 1, "keep an entry of a batch"),
            ("k_anneal_steps", self.k_anneal_steps > 0 or not self.k_start, "be at least 1 with k_start"),
            ("n_prefixes", not self.n_prefixes or self.prefixes is None, "not be given with prefixes"),
            ("level_weights", len(weights) == n_prefixes and any(weights), "be one a prefix, not all 0"),
            ("order", self.order in ("stored", "energy"), 'be "stored" or "energy"'),
            ("betas", len(self.betas) == 2 and max(self.betas) < 1, "be two below 1"),
            ("n_latents_start", (self.n_latents_start or F) >= F, f"be at least n_latents={F}"),
            ("prune_window", len(window) == 2 and window[0] < window[1] <= 1, "be two fractions a < b"),
            ("dtype", self.dtype in (None, "float32", "bfloat16", "float16"), "be (b)float16 or float32"),
        ):
            _require(ok, f"{name} must {rule}", getattr(self, name))

    def vanilla(self):
        """The plain BatchTopK twin: one prefix, of all latents; everything else equal."""
        return dataclasses.replace(self, prefixes=(self.n_latents,), n_prefixes=None, level_weights=None)

    def prefix_lengths(self):
        """Prefix lengths of the finished SAE: those of training, the default ones where they are sampled."""
        return prefix_lengths(self.n_latents, self.prefixes)

    def weights(self):
        """Level weights ``w_p``, which sum to 1."""
        given = self.level_weights or (1,) * (self.n_prefixes or len(self.prefix_lengths()))
        return (np.array(given) / (sum(given) or 1)).tolist()

    def lr_at(self, step):
        """Learning rate of step number ``step`` (from 0): linear warm-up, constant, linear decay to 0."""
        warmup = min(self.steps // 10, 1000) if self.warmup_steps is None else self.warmup_steps
        rise = (step + 1) / warmup if step < warmup else 1.0
        fall = (self.steps - step) / max(self.decay_fraction * self.steps, 1.0)
        return self.lr * min(rise, fall, 1.0)

    def k_at(self, step):
        """Active latents per row at step number ``step``."""
        done = min(1.0, step / self.k_anneal_steps) if self.k_start else 1.0
        return self.k if done == 1 else self.k_start + (self.k - self.k_start) * done

    def latents_at(self, step):
        """Number of latents at step number ``step``, with the spare ones, which go up to 64 at a time."""
        first, last = (fraction * self.steps for fraction in self.prune_window)
        spare = (self.n_latents_start or self.n_latents) - self.n_latents
        group = max(1, min(64, spare // 10))
        left = math.ceil(spare / group * min(max((last - step) / (last - first), 0.0), 1.0))
        return self.n_latents + min(spare, left * group)


# ------------------------------------------- 4. the trainer
# One SAE in training: a step, and what is kept between steps.
# Uses sections 1 to 3, ``rank_and_world`` of 6, and what gives the gradients of ``batch_loss`` fast, of 5.


class Trainer:
    """One SAE in training: ``step(x)`` is an optimizer step on raw rows (B, D), ``export()`` the SAE to keep.
    ``trainer.sae`` sees ``x / scale``, a number or one a dimension, and starts with ``b_dec = mean / scale``:
    a large mean would silence latents. The smallest entry that a batch keeps is its ``cut``;
    ``sae.threshold``, by which rows are encoded alone, is the moving average of the cuts."""

    def __init__(self, cfg, d_model, device="cpu", mean=0.0, scale=1.0):
        self.cfg, self.device = cfg, torch.empty(0, device=device).device  # with its index
        self.scale = torch.as_tensor(scale).float().expand(d_model).to(self.device)
        kind = self.device.type
        old_gpu = kind == "cuda" and torch.cuda.get_device_capability(device)[0] < 8  # no bfloat16 units
        self.dtype = cfg.dtype or ("float32" if kind != "cuda" else "float16" if old_gpu else "bfloat16")
        low = self.dtype != "float32"
        self.autocast = torch.autocast(kind, getattr(torch, self.dtype), enabled=low)
        generator = torch.Generator().manual_seed(cfg.seed)
        self.sae = MatryoshkaSAE(d_model, cfg.latents_at(0), None, generator).to(self.device, torch.float32)
        self.sae.b_dec.data += torch.as_tensor(mean).float().to(self.device) / self.scale
        eps = 1.5e-5 * cfg.k / cfg.n_latents  # near a rare latent's gradient: below it Adam takes full steps
        betas, fused = tuple(map(float, cfg.betas)), kind in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(self.sae.parameters(), 0.0, betas, eps, fused=fused)
        self.in_blocks = kind == "cpu" and not low  # that stay in the cache; else whole matrices at once
        self.buffer = self.sae.b_enc.new_empty(0)  # for the gradients, kept as fresh memory is slow
        self.stop = False  # a wish to end the run; after a step of several processes, whether any has it
        self.steps_done = 0
        self.rows_silent = torch.zeros_like(self.sae.b_enc.data, dtype=torch.long)  # since each latent fired
        self.energy = torch.zeros_like(self.sae.b_enc.data)                         # running mean of acts^2
        self.cut = self.energy.new_zeros(())

    def step(self, x):
        """Take one optimizer step on raw rows ``x`` (B, D); return the loss, a scalar on the device."""
        x = x.to(self.device, torch.float32, non_blocking=True) / self.scale
        x -= self.sae.b_dec.detach()
        dead = self.rows_silent >= self.cfg.dead_after
        n_dead = dead.sum().to("cpu", non_blocking=True)  # a GPU has told when it starts with the gradients
        told = self.device.type == "cuda" and torch.cuda.current_stream(self.device).record_event()
        values, index, loss = self.gradients(x)
        if told:
            told.synchronize()
        loss = self.observe(values, index, loss + self.revive(x, values, index, dead, int(n_dead)), len(x))
        self.optimize()
        self.steps_done += 1
        n, by_energy = self.cfg.latents_at(self.steps_done), self.cfg.order == "energy"
        if n < len(self.energy) or by_energy and self.steps_done % 5 == 0:
            self.rearrange(n)
        return loss

    @torch.no_grad()
    def gradients(self, x):
        """Write those of ``batch_loss`` on ``x`` (B, D), here and below without ``b_dec``; return the entries
        kept (n,), their row-major positions, and the loss."""
        sae, n, prefixes = self.sae, self.n_kept(len(x)), self.step_prefixes()
        with self.autocast:
            select = sparse_topk if self.in_blocks else full_topk
            values, index = select(x, sae.W_enc, sae.b_enc, n, self.cut)
        G = self.buffer.resize_(len(x), len(prefixes), x.shape[1])
        loss, *entries = sparse_loss(x, values, index, prefixes, self.cfg.weights(), sae.W_dec, G)
        write_gradients(sae, x, values, *entries, G, self.in_blocks)
        return values, index, loss

    def revive(self, x, values, index, dead, n_dead):
        """Add the gradients of AuxK on the latents that are ``dead``; return its part of the loss."""
        if n_dead == 0 or self.cfg.aux_coef == 0:
            return 0.0
        sae, dead = self.sae, torch.nonzero_static(dead, size=n_dead).squeeze(1)
        starts = torch.searchsorted(index // len(sae.b_enc), torch.arange(len(x) + 1, device=index.device))
        residual = x - weighted_row_sums(values, index % len(sae.b_enc), starts, sae.W_dec.detach())
        places = (sae.W_enc, 1), (sae.b_enc, 0), (sae.W_dec, 0)
        # copies of their rows: through the whole matrices, autograd would fill as large ones with zeros
        leaves = [weight.detach().index_select(dim, dead).requires_grad_() for weight, dim in places]
        with self.autocast:
            loss = aux_loss(x, residual, *leaves)
        grads = torch.autograd.grad(len(x) * loss, leaves)  # times B: float16 would lose those of the mean
        for (weight, dim), grad in zip(places, grads):
            weight.grad.index_add_(dim, dead, grad, alpha=self.cfg.aux_coef / len(x))
        return self.cfg.aux_coef * loss.detach()

    def n_kept(self, rows):
        return max(1, round(self.cfg.k_at(self.steps_done) * rows))

    def step_prefixes(self):
        """This step's prefix lengths, fixed or freshly drawn. The last takes in the spare latents."""
        cfg, lengths = self.cfg, self.cfg.prefix_lengths()
        if cfg.n_prefixes is not None:  # by the step's number, so that a resumed run draws the same
            seed = np.random.SeedSequence((cfg.seed, self.steps_done)).generate_state(1)[0]
            generator = torch.Generator().manual_seed(int(seed))
            lengths = sample_prefixes(cfg.n_latents, cfg.n_prefixes, cfg.pareto_power, generator)
        return (*lengths[:-1], len(self.energy))

    @torch.no_grad()
    def observe(self, values, index, loss, rows):
        """Update cut, threshold, silent rows and energy; return the loss. Processes average gradients too."""
        F, world = len(self.energy), rank_and_world()[1]
        per_latent = self.energy.new_zeros(2, F)  # share of active rows, mean square
        entries = torch.stack([(values > 0).float(), values.square()])
        per_latent.index_add_(1, index % F, entries).div_(rows)
        others = torch.stack([values.min(), loss, torch.full_like(loss, self.stop)])
        seen = torch.cat([per_latent.flatten(), others])
        if world > 1:
            for tensor in (seen, *(parameter.grad for parameter in self.sae.parameters())):
                distributed.all_reduce(tensor)
                tensor /= world
            self.stop = bool(seen[-1] > 0)
        first, (active, energy), self.cut = self.steps_done == 0, seen[:-3].view(2, -1), seen[-3]
        self.sae.threshold.lerp_(self.cut, 1.0 if first else 0.01)  # a mean of about 100 steps: L0 is steady
        self.rows_silent.add_(rows * world).masked_fill_(active > 0, 0)
        self.energy.lerp_(energy, 1.0 if first else 0.05)  # of about 20: the order is fresh
        return seen[-2]

    @torch.no_grad()
    def optimize(self):
        """Clip, Adam; decoder rows lose the gradient along themselves before and are unit again after."""
        W_dec, parameters = self.sae.W_dec, list(self.sae.parameters())
        size = max(1, CACHED // W_dec.shape[1]) if self.in_blocks else len(W_dec)
        for grad, w in zip(W_dec.grad.split(size), W_dec.split(size)):
            grad.addcmul_((grad * w).sum(dim=1, keepdim=True), w, value=-1)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self.device.type != "cpu" or norm > self.cfg.clip:  # a pass over all gradients, saved on the CPU
            nn.utils.clip_grads_with_norm_(parameters, self.cfg.clip, norm)
        self.optimizer.param_groups[0]["lr"] = self.cfg.lr_at(self.steps_done)
        self.optimizer.step()
        W_dec /= W_dec.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def rearrange(self, n):
        """Keep the ``n`` most energetic latents, with their optimizer state, in the order of the config."""
        keep, sae = self.energy.argsort(descending=True, stable=True)[:n], self.sae
        keep = keep.sort().values if self.cfg.order == "stored" else keep
        self.rows_silent, self.energy = self.rows_silent[keep], self.energy[keep]
        sae.threshold = sae.threshold[:n]
        for parameter, dim in ((sae.W_enc, 1), (sae.b_enc, 0), (sae.W_dec, 0)):
            moments, parameter.grad = self.optimizer.state[parameter], None
            parameter.data = parameter.data.index_select(dim, keep)
            for name in ("exp_avg", "exp_avg_sq") if moments else ():
                moments[name] = moments[name].index_select(dim, keep)

    @torch.no_grad()
    def measure(self, x):
        """{"fvu", "l0", "dead", "threshold"} on raw ``x``, by its own largest entries, with spare latents."""
        x = x.to(self.device, torch.float32) / self.scale
        pre, dead = self.sae.pre_acts(x), self.rows_silent >= self.cfg.dead_after
        acts = pre * (pre >= batch_topk(pre, self.n_kept(len(x)))[0].min())
        middle = x.mean(dim=0) if len(x) > 1 else self.sae.b_dec
        error, total = (x - self.sae.decode(acts)).pow(2).sum(), (x - middle).pow(2).sum()
        return {"fvu": float(error / total), "l0": float((acts > 0).sum() / len(x)),
                "dead": float(dead.float().mean()), "threshold": float(self.sae.threshold[0])}

    @torch.no_grad()
    def export(self):
        """A copy for raw rows: scale folded in, latents in prefix order, spare ones left out."""
        keep = self.energy.topk(self.cfg.n_latents).indices.sort().values
        W_enc, b_enc, W_dec, b_dec = self.sae.parameters()
        W_enc, W_dec = W_enc[:, keep] / self.scale[:, None], W_dec[keep] * self.scale
        length = W_dec.norm(dim=1)  # goes over into the codes
        sae = MatryoshkaSAE(len(b_dec), len(keep), self.cfg.prefix_lengths(), torch.Generator())
        sae.load_state_dict({"W_enc": W_enc * length, "b_enc": b_enc[keep] * length,
                             "W_dec": W_dec / length[:, None], "b_dec": b_dec * self.scale,
                             "threshold": self.sae.threshold[keep] * length})
        sae.metadata = {"k": self.cfg.k, "training": dataclasses.asdict(self.cfg)}
        sound = sae.W_dec.any(dim=1).all() and all(tensor.isfinite().all() for tensor in sae.parameters())
        _require(sound, f"diverged by step {self.steps_done}, lower lr: weights must be finite", "NaN or 0")
        return sae.to(self.device)

    def state_dict(self):
        """All that the next steps depend on beside the config and the rows."""
        values = {name: getattr(self, name) for name in ("steps_done", "rows_silent", "energy", "cut")}
        return values | {name: getattr(self, name).state_dict() for name in ("sae", "optimizer")}

    def load_state_dict(self, state):
        """Go on from ``state``, of a trainer with the same config and rows: bit for bit on the CPU."""
        self.rearrange(len(state["energy"]))
        self.sae.load_state_dict(state["sae"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("steps_done", "rows_silent", "energy", "cut"):
            setattr(self, name, state[name])


@torch.no_grad()
def calibrate(sae, rows, k, batch_size=2048):
    """Scale the threshold to a mean L0 of ``k`` on raw ``rows`` (n, D), to 0 where fewer are positive."""
    old = sae.threshold if sae.threshold.all() else torch.ones_like(sae.threshold)
    largest = old.new_zeros(1)  # of the ratios to the old one, as many as are to pass and one more
    for x in rows.split(batch_size):
        ratios = sae.pre_acts(x.to(old.device)) / old
        largest = torch.cat([largest, ratios[ratios > largest.min()]])
        largest = largest.topk(min(round(k * len(rows)) + 1, len(largest))).values
    sae.threshold = old * largest[-1]


# ------------------------------------ 5. the gradients, fast
# Only k / F of the entries survive: each product but the encoder's becomes a sum over them, in float32, so
# that float16 needs no loss scale. Uses torch and numpy alone.

CACHED = 1 << 19  # numbers that stay in a core's cache until their next use: 2 MiB of float32


def full_topk(x, W_enc, b_enc, n, cut=None):
    """``batch_topk`` of ``relu(x @ W_enc + b_enc)``, as float32. Its shapes are known: no wait for a GPU."""
    values, index = batch_topk(torch.addmm(b_enc, x, W_enc), n)
    return values.float().clamp_min(0), index


def sparse_topk(x, W_enc, b_enc, n, cut):
    """The same on a CPU, faster where the ``cut``, the smallest of them, is about that of the last step. The
    one dense product of a step is made a few latents at a time: their block is searched in the cache."""
    (B, _), F, parts = x.shape, len(b_enc), []
    width = max(1, 4 * CACHED // B)  # 4: each number is read once only
    for start in range(0, F if cut > 0 else 0, width):
        end = min(start + width, F)
        pre = torch.addmm(b_enc[start:end], x, W_enc[:, start:end])
        above = np.flatnonzero((pre > 0.9 * cut).numpy())  # 3 ms for 6 million numbers, torch 14
        row, latent = np.divmod(above, end - start)
        parts.append((pre.numpy().ravel()[above], row * F + latent + start))
    if sum(len(values) for values, _ in parts) < n:  # it fell by more than a tenth, or few are positive
        return full_topk(x, W_enc, b_enc, n)
    values, index = map(np.concatenate, zip(*parts))
    keep = np.argpartition(values, -n)[-n:]
    index, order = torch.from_numpy(index[keep]).sort()
    return torch.from_numpy(values[keep])[order], index


def sparse_loss(x, values, index, prefixes, weights, W_dec, G):
    """``nested_loss`` of sparse codes and gradients in closed form: (loss, d_values (n,), latent (n,),
    row_block (n,)), into ``G`` (B, P, D) the others. In row ``b`` the block of latents that ends with prefix
    ``p`` has the ``values`` with ``row_block = b P + p``, which decode to ``R_p``; ``R_1`` takes ``-x`` in,
    without ``b_dec``. So prefix ``p`` leaves ``sum_{i <= p} R_i``, and the loss is a quadratic form:

        L = 1/2 sum_b sum_ij K_ij <R_i, R_j>,  K_ij = 2/B sum_{p >= max(i, j)} w_p

    Hence ``dL/dR = G = K R`` and ``d_values = <G_j, W_dec>``, by autograd of the sums that are ``R``."""
    (B, P, D), F, device = G.shape, len(W_dec), x.device
    prefixes, weight_from = (torch.tensor(numbers).to(device, non_blocking=True) for numbers in (
        prefixes, [2 / B * sum(weights[p:]) for p in range(P)]))
    K, latent = torch.minimum(weight_from, weight_from[:, None]).to(x.dtype), index % F
    row_block = index // F * P + torch.bucketize(latent, prefixes, right=True)
    starts = torch.searchsorted(row_block, torch.arange(B * P + 1, device=device))
    # on a CPU a part at a time: 16 MiB of memory are used again, more would be fresh, which is slow
    size = max(1, 8 * CACHED // (P * D)) if device.type == "cpu" else B
    firsts = range(0, B * P, size * P)
    cuts, d_values = [0, *(int(starts[first]) for first in firsts[1:]), len(values)], torch.empty_like(values)
    for x_part, G_part, first, start, end in zip(x.split(size), G.split(size), firsts, cuts, cuts[1:]):
        with torch.enable_grad():
            leaf = values[start:end].detach().requires_grad_()
            part = starts[first:first + size * P + 1] - start
            decoded = weighted_row_sums(leaf, latent[start:end], part, W_dec.detach())
        R = decoded.detach().view_as(G_part)
        R[:, 0] -= x_part
        torch.matmul(K, R, out=G_part)
        d_values[start:end] = torch.autograd.grad(decoded, leaf, G_part.flatten(0, 1))[0]
    d_values *= values > 0
    loss = (values @ d_values - torch.linalg.vecdot(G[:, 0], x).sum()) / 2
    return loss, d_values, latent, row_block


def weighted_row_sums(values, index, starts, rows):
    """``sum_i values[i] * rows[index[i]]`` over ``starts[j] <= i < starts[j + 1]``, for each j, D wide."""
    return nn.functional.embedding_bag(index, rows, starts[:-1], mode="sum", per_sample_weights=values)


def write_gradients(sae, x, values, d_values, latent, row_block, G, in_blocks):
    """All gradients, into the parameters' ``grad``, whose memory is kept: sums over the active entries.
    ``dW_dec = A_j.T @ G_j`` for the latents of block ``j``, ``dW_enc = x.T @ dA``, ``db_enc`` the column sums
    of ``dA``, ``db_dec = sum_B G_1 - W_enc @ db_enc``."""
    for parameter in sae.parameters():
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
    latents, order = latent.sort(stable=True)
    starts = torch.searchsorted(latents, torch.arange(len(sae.W_dec) + 1, device=G.device))
    sums_by_latent(sae.W_dec.grad, values[order], row_block[order], starts, G.flatten(0, 1), in_blocks)
    sums_by_latent(sae.W_enc.grad.T, d_values[order], row_block[order] // G.shape[1], starts, x, in_blocks)
    sae.b_enc.grad.zero_().index_add_(0, latent, d_values)
    torch.sub(G[:, 0].sum(dim=0), sae.W_enc @ sae.b_enc.grad, out=sae.b_dec.grad)


def sums_by_latent(out, values, index, starts, rows, in_blocks):
    """``weighted_row_sums`` into ``out`` (F, D), in blocks that stay in a CPU's cache; else all at once, a
    long sum, as one thread of a GPU walks it, by sums of at most 64 terms."""
    if in_blocks:
        size = max(1, CACHED // 2 // out.shape[1])  # 2: the sums, and where they go
        for start in range(0, len(out), size):
            ends = starts[start:start + size + 1]
            part = slice(int(ends[0]), int(ends[-1]))
            out[start:start + size] = weighted_row_sums(values[part], index[part], ends - ends[0], rows)
    else:
        cuts = torch.cat([starts, torch.arange(0, len(index), 64, device=out.device)]).sort().values
        numbers = torch.arange(len(cuts) - 1, device=out.device)
        rows = weighted_row_sums(values, index, cuts, rows)
        out.copy_(weighted_row_sums(None, numbers, torch.searchsorted(cuts, starts), rows))


# -------------------------------------------------- 6. runs
# The loop around the trainer: checkpoints, signals, several processes. A cut run goes on where it was.
# Uses sections 1 to 4 and the files of 7.

STATE, METRICS = "training_state.pt", "metrics.jsonl"


def train(acts, cfg, *, device="cpu", out=None, resume=False, save_minutes=10.0, on_log=lambda figures: None,
          log_every=50, metadata=None):
    """Train on the rows ``acts`` (see ``Rows``); return the SAE for raw activations.
    ``out``: a new or empty folder for metrics and checkpoint, written at the start, every ``save_minutes``
    and however the loop ends; ``resume`` goes on there, if anything is saved. Signals act after a step.
    ``on_log`` gets the figures of ``measure``, and {"step", "loss", "rows_per_second"}. ``metadata``: for the
    checkpoint. ``ValueError`` for bad rows, and settings or rows other than those resumed."""
    _require(not resume or out is not None, "resume needs out, the folder to go on in", out)
    trainer, data, aside, fingerprint = prepare(acts, cfg, device)
    if resume := resume and Path(out, STATE).exists():
        read_state(Path(out), fingerprint, trainer)
    rank, world = rank_and_world()
    folder = None if out is None or rank > 0 else Path(out)
    first_step, started = trainer.steps_done, time.monotonic()
    batches = data.batches(cfg.batch_size // world, cfg.seed, first_step, rank, world, trainer.device)

    def checkpoint():
        sae = trainer.export()
        sae.metadata.update(metadata or {})
        if trainer.steps_done and len(aside):
            calibrate(sae, aside, cfg.k)
        if folder:
            logged = (folder / METRICS).stat().st_size if (folder / METRICS).exists() else 0
            write(folder / STATE, {"fingerprint": fingerprint, "log_bytes": logged,
                                   "trainer": trainer.state_dict()})
            sae.save(folder)
        return sae

    with deferred_signals() as received:
        if folder and not resume:
            folder.mkdir(parents=True, exist_ok=True)
            if held := [file.name for file in folder.iterdir() if file.suffix != ".tmp"]:
                raise FileExistsError(f"{folder} holds {held[0]}: choose a new or an empty output folder")
            size = 64 * trainer.sae.W_dec.numel()  # bytes of weights, moments and the SAE, old and new
            if size > (free := shutil.disk_usage(folder).free):
                raise OSError(f"{folder} needs {size / 1e9:.2g} GB for checkpoints, {free / 1e9:.2g} free")
            checkpoint()
        try:
            saved = time.monotonic()
            while trainer.steps_done < cfg.steps and not trainer.stop:
                x, trainer.stop = next(batches), bool(received)
                loss = trainer.step(x)
                if trainer.steps_done % log_every == 0 or trainer.steps_done == cfg.steps:
                    figures = {"step": trainer.steps_done, "loss": float(loss), **trainer.measure(x[:512])}
                    rows = (trainer.steps_done - first_step) * cfg.batch_size
                    figures["rows_per_second"] = round(rows / (time.monotonic() - started))
                    if folder:
                        with open(folder / METRICS, "a") as file:
                            file.write(json.dumps(figures) + "\n")
                    on_log(figures)
                if folder and time.monotonic() - saved > 60 * save_minutes:
                    checkpoint()
                    saved = time.monotonic()
        except Exception:  # a row that cannot be used, a callback, a lost process: the steps done stand
            checkpoint()
            raise
        if trainer.stop and not received:
            received.append(signal.SIGTERM)  # another process got it
        return checkpoint()


def prepare(acts, cfg, device):
    """(new trainer, rows to train on, rows for the final threshold, what marks such a run)."""
    data, aside = Rows(acts).within(cfg.max_norm).split_off(0.05, cfg.seed)  # trained on, they let few pass
    n, world, sample = len(data), rank_and_world()[1], data.split_off(1.0, cfg.seed)[1].read()
    _require(cfg.batch_size % world == 0, f"batch_size must be a multiple of {world}", cfg.batch_size)
    _require(cfg.batch_size <= n, f"batch_size must be at most {n}, the training rows", cfg.batch_size)
    mean = sample.mean(dim=0, dtype=torch.float64)
    spread = (sample - mean).norm(dim=0) / len(sample) ** 0.5  # of each dimension
    least, size = max(1e-18, 1e-6 * float(mean.norm())), float(spread.norm())
    _require(least < size < 1e18, f"rows must differ, by an rms distance in ({least:.1g}, 1e18)", size)
    stretch = (spread / (10 * spread[spread > 0].median())).clamp_min(1.0)  # a few would hide all the others
    scale = stretch * (spread / stretch).norm()
    fingerprint = {**dataclasses.asdict(cfg), "rows": n, "processes": world,
                   "checksum of a sample of the rows": hashlib.sha256(sample.numpy()).hexdigest()[:16]}
    return Trainer(cfg, data.d_model, device, mean, scale), data, aside.read(), fingerprint


def read_state(folder, fingerprint, trainer):
    """Put trainer and metrics where they were; ``ValueError`` names what of settings or rows differs."""
    with reading(folder / STATE, "the state of such a run"):
        state = torch.load(folder / STATE, map_location=trainer.device, weights_only=True)
        for name, value in fingerprint.items():
            was = state["fingerprint"].get(name)
            _require(was == value, f"{name} must be as in the run to resume, {was}", value)
        trainer.load_state_dict(state["trainer"])
        with open(folder / METRICS, "ab") as file:
            file.truncate(min(file.tell(), state["log_bytes"]))


@contextlib.contextmanager
def deferred_signals():
    """Collect SIGINT, SIGTERM, SIGHUP, if not ignored; raise the first at the end. A second SIGINT acts."""
    received = []

    def note(number, frame):
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    with contextlib.ExitStack() as at_end:
        with contextlib.suppress(ValueError):  # only the main thread can set handlers
            for number in {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)}:
                if (before := signal.getsignal(number)) != signal.SIG_IGN:
                    signal.signal(number, note)
                    at_end.callback(signal.signal, number, before or signal.SIG_DFL)
        yield received
    if received:
        signal.raise_signal(received[0])


def rank_and_world():
    """(number of this process, number of processes) under torch.distributed; (0, 1) alone."""
    on = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if on else (0, 1)


# ------------------------------------------------- 7. files
# Activation rows of any number, read in random order; files written whole; what the Hub has.
# Uses numpy, torch and, to download, huggingface_hub.

BLOCK, BLOCK_BYTES = 256, 2**19  # consecutive rows, at most, that are read, and set aside, together
ASIDE, POOL_BYTES = 2**14, 2**30  # rows set aside; bytes of rows whose order is mixed, held twice


class Rows:
    """Activation rows (n, D), as float32: an array, a tensor, a ``.npy`` file or a folder of them by name.
    float16, float32 or float64, (rows, D) or (docs, positions, D). Files are read block by block, so memory
    does not grow with them. ``ValueError`` for anything else, and for a row that is read and not finite."""

    def __init__(self, source):
        if isinstance(source, Rows):
            vars(self).update(vars(source))
            return
        files = [source]
        if isinstance(source, (str, os.PathLike)) and os.path.isdir(source):  # with the ids of harvest
            files = [file for file in sorted(Path(source).glob("*.npy")) if not file.match("*.ids.npy")]
        _require(files, f"{source} must be a .npy file or a folder of them", "a folder without any")
        parts = [as_rows(file) for file in files]
        D = parts[0].shape[1]
        for file, part in zip(files, parts):
            _require(part.shape[1] == D, f"{file} must be {D} wide", part.shape[1])
        self.dtype = np.dtype("f2" if all(part.dtype == "f2" for part in parts) else "f4")  # in memory
        self.d_model, self.row_bytes = D, D * self.dtype.itemsize
        self.block = min(BLOCK, max(1, BLOCK_BYTES // self.row_bytes), -(-sum(map(len, parts)) // 64))
        self.centre, self.radius, self.limited = torch.zeros(D).float(), math.inf, False
        self.blocks = [(part, start, min(start + self.block, len(part)))
                       for part in parts for start in range(0, len(part), self.block)]

    def __len__(self):
        return sum(stop - start for _, start, stop in self.blocks)

    def within(self, max_norm):
        """All rows but those further from the median row than ``max_norm`` times the median distance, by a
        sample, unless over 5 % are: a few massive ones ruin an SAE. A limit set before stays."""
        _require(max_norm >= 1, "max_norm must be at least 1", max_norm)
        if self.limited:
            return self
        chosen, sample = Rows(self), self.split_off(1.0, 0)[1].read()
        chosen.limited, chosen.centre = True, sample.median(dim=0).values
        distance = (sample - chosen.centre).norm(dim=1)
        most = max_norm * float(distance.median()) or math.inf  # where most rows are the same
        far, times = float((distance > most).float().mean()), max_norm * float(distance.max()) / most
        chosen.radius = most if far <= 0.05 else math.inf
        what = "left out (max_norm)" if far <= 0.05 else "too many to leave out"
        if far:
            warnings.warn(f"{far:.2%} of {len(sample):,} sampled rows lie over {max_norm:g} times the median "
                          f"distance from the median row, up to {times:,.0f} times: {what}", stacklevel=3)
        return chosen

    def keep(self, numbers):
        """The rows of the blocks with these numbers, in order."""
        chosen = Rows(self)
        chosen.blocks = [self.blocks[number] for number in sorted(numbers)]
        return chosen

    def split_off(self, fraction, seed):
        """(The other rows, those set aside): random whole blocks, as neighbours of a row tell much of it."""
        order = np.random.default_rng(seed).permutation(len(self.blocks))
        n = min(max(2, round(fraction * len(order))), ASIDE // self.block)
        return self.keep(order[n:]), self.keep(order[:n])

    def read(self):
        """The rows as one float32 tensor (n, D), in order, without those left out."""
        rows = self.read_all()
        return rows[~self.too_far(rows)].float()

    def read_all(self, memory=None):
        """All rows (n, D), in ``memory`` if given, as float16 if that is what all files hold, or float32."""
        memory, end = np.empty((len(self), self.d_model), self.dtype) if memory is None else memory, 0
        for part, start, stop in self.blocks:
            block, end = memory[end:end + stop - start], end + stop - start
            rows = part[start:stop]
            if isinstance(part, np.memmap):  # a map takes memory and dies with its file
                rows = block if part.dtype == self.dtype else np.empty(block.shape, part.dtype)
                with open(part.filename, "rb", buffering=0) as file:
                    file.seek(part.offset + start * part.strides[0])
                    whole = file.readinto(rows) == rows.nbytes
                _require(whole, f"{part.filename} must not shrink while read, row", stop)
            if rows is not block:
                block[:] = rows
        return torch.from_numpy(memory[:end])

    def too_far(self, rows):
        """Which of all its ``rows`` (n, D), on any device, are left out: (n,)."""
        size = max(1, (2**16 if rows.device.type == "cpu" else 2**26) // self.d_model)  # that stay in a cache
        distance = self.centre.new_empty(len(rows), device=rows.device)
        for part, out in zip(rows.split(size), distance.split(size)):
            torch.linalg.vector_norm(part - self.centre.to(rows.device), dim=1, out=out)
        if not distance.isfinite().all():
            for part, start, stop in self.blocks:  # of large numbers only the squares are not finite
                finite, rows = rows[:stop - start].isfinite().all(dim=1), rows[stop - start:]
                where = f"{getattr(part, 'filename', 'the array')}, row {start + int(finite.int().argmin())},"
                _require(finite.all(), f"{where} must be finite as float32", "NaN or infinity")
        return distance > self.radius

    def parts(self, n=4096):
        """All rows once, in order, as ``Rows`` of about ``n`` each."""
        numbers, per_part = range(len(self.blocks)), max(1, n // self.block)
        return (self.keep(numbers[place:place + per_part]) for place in numbers[::per_part])

    def batches(self, batch_size, seed, start=0, rank=0, world=1, device="cpu"):
        """Endless batches (batch_size, D) from number ``start`` on; each row once an epoch, in seeded order.
        Blocks are permuted, and the rows of a pool of blocks again, on the ``device``. Two pools are there: a
        background thread reads the next. Of ``world`` processes, ``rank`` reads every ``world``-th block."""
        pools = self._pools(seed, start * batch_size, rank, world, torch.device(device))
        batch = torch.empty(0, self.d_model, device=device)
        with ThreadPoolExecutor(1) as thread:
            ahead = thread.submit(next, pools)
            while True:
                (rows, order), ahead = ahead.result(), thread.submit(next, pools)
                for tensor in (rows, order) if rows.is_cuda else ():  # made on another stream
                    tensor.record_stream(torch.cuda.current_stream(device))
                for taken in order.tensor_split([*range(batch_size - len(batch), len(order), batch_size)]):
                    part = rows.index_select(0, taken).float()
                    batch = torch.cat([batch, part]) if len(batch) else part
                    if len(batch) == batch_size:
                        yield batch
                        batch = batch[:0]

    def _pools(self, seed, skip, rank, world, device):
        """Endless (rows, the order in which they are taken), but for the first ``skip`` rows."""
        per_pool = max(1, min(POOL_BYTES // (self.block * self.row_bytes), -(-len(self.blocks) // world)))
        memory = itertools.cycle(np.empty((2, per_pool * self.block, self.d_model), self.dtype))  # used again
        for epoch in itertools.count():
            random = np.random.default_rng([seed, epoch])
            blocks = random.permutation(len(self.blocks))[rank::world]
            for place in range(0, len(blocks), per_pool):
                pool = self.keep(blocks[place:place + per_pool])
                order = random.permutation(len(pool))
                if skip < len(pool):
                    rows = pool.read_all(next(memory))
                    with torch.cuda.stream(torch.cuda.Stream(device) if device.type == "cuda" else None):
                        rows = rows.to(device)  # beside the steps
                        near = order[~pool.too_far(rows).cpu().numpy()[order]]
                        # the first ones also take the places of those left out
                        order = torch.from_numpy(np.resize(near, near.size and order.size)[skip:]).to(device)
                    yield rows, order
                skip = max(0, skip - len(pool))


def as_rows(source):
    """An array, a tensor or a ``.npy`` file as rows (n, D), checked but for its values."""
    array = read_npy(source) if isinstance(source, (str, os.PathLike)) else source
    if isinstance(array, torch.Tensor):
        with reading("the tensor", "one of rows"):  # a sparse one, a meta one
            array = (array.float() if array.dtype == torch.bfloat16 else array).detach().cpu().numpy()
    _require(type(array) in (np.ndarray, np.memmap), "rows must be an array, a tensor or a path", type(array))
    sound = array.dtype.kind == "f" and array.dtype.itemsize <= 8 and array.ndim in (2, 3) and array.size > 0
    name, found = getattr(array, "filename", "the array"), f"{array.dtype} {array.shape}"
    _require(sound, f"{name} must hold floats (rows, D) or (docs, positions, D)", found)
    whole_file = isinstance(array.base, mmap.mmap) and array.flags.c_contiguous and array.mode != "c"
    return (array if whole_file else np.asarray(array)).reshape(-1, array.shape[-1])


def read_npy(path):
    """The array in a ``.npy`` file, memory-mapped; ``ValueError`` if it is damaged or holds objects."""
    with reading(path, "a .npy file of numbers"):
        return np.lib.format.open_memmap(path, mode="r")


@contextlib.contextmanager
def reading(path, what):
    """Whatever a parser raises on a damaged file becomes a ``ValueError`` that names it; not ``OSError``."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not {what}: {one_line(error)}") from None


def one_line(error):
    return f"{' '.join(str(error).split()) or type(error).__name__:.300}"


def write(path, content):
    """Write bytes, what ``torch.load`` reads (.pt), or JSON; a reader sees the old file or the new one."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        with open(temporary, "wb") as file:
            if temporary.match("*.pt.tmp"):
                torch.save(content, file)
            else:
                file.write(content if isinstance(content, bytes) else json.dumps(content, indent=2).encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter of torch.save on a full disk
        raise OSError(f"{path} could not be written: {one_line(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def download(repo, names, revision=None, repo_type="model"):
    """Folder of these files of a Hub repository, all of one commit, in huggingface_hub's cache."""
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(repo, repo_type=repo_type, revision=revision, allow_patterns=names))
    except Exception as error:  # of its own, of its HTTP library, of Xet
        raise OSError(f"{repo} cannot be read from the Hub: {one_line(error)}") from None


# ----------------------------------------------- 8. metrics
# Figures of a finished SAE: on rows, spliced into a language model, and against labels.
# Uses the SAE, ``Rows`` and section 10's ``activation_hook``.


@torch.no_grad()
def evaluate(sae, rows, batch_size=4096, max_norm=10.0, on_rows=lambda done: None):
    """Figures of ``sae`` over raw ``rows``: ``fvu = sum |x - recon|^2 / sum |x - mean|^2``, ``l0`` active
    latents per row, ``dead`` share that never fires, mean ``max_cosine`` of a decoder row with another, all
    by prefix too; number of ``rows`` and those ``left_out``; ``massive``: the dimensions that hold 90 % of
    the variance, FVU of the others; ``frequencies``: latents on a share in [edge, next); ``remarks``."""
    rows, levels, device = Rows(rows).within(max_norm), sae.prefixes, sae.b_dec.device
    sizes, done, seen = np.diff(levels, prepend=0).tolist(), 0, 0
    fired = torch.zeros(len(sae.b_enc), dtype=torch.long, device=device)  # rows where each latent is on
    sums, squares, *errors = torch.zeros(2 + len(levels), rows.d_model, dtype=torch.float64)  # by dimension
    for part in rows.parts(batch_size):
        x = part.read().to(device)
        acts, recon = sae.encode(x), sae.b_dec
        fired += (acts > 0).sum(dim=0)
        for error, block, W_dec in zip(errors, acts.split(sizes, dim=1), sae.W_dec.split(sizes)):
            recon = recon + block @ W_dec
            error += (x - recon).square().sum(dim=0).cpu().double()
        offset = (x - sae.b_dec).cpu().double()  # near the mean, so that the variance does not cancel
        sums += offset.sum(dim=0)
        squares += offset.square().sum(dim=0)
        done, seen = done + len(x), seen + len(part)
        on_rows(seen)
    variance, share = squares - sums.square() / done, fired.cpu().double() / done
    total, (largest, order) = float(variance.sum()), variance.sort(descending=True)
    sound = total > 1e-12 * float(squares.sum()) and torch.stack(errors).isfinite().all()
    _require(sound, "rows must differ, within max_norm and 1e18: the sum of their variances", total)
    n = 1 + int((largest.cumsum(0) < 0.9 * total).sum())
    others = float(largest[n:].sum())
    massive = {"dims": n, "share": 1 - others / total,
               "fvu_of_others": float(errors[-1][order[n:]].sum()) / others if others > 0 else None}
    prefixes = [{"latents": p, "fvu": float(error.sum()) / total, "l0": float(share[:p].sum()),
                 "max_cosine": max_cosine(sae.W_dec[:p]), "dead": float((share[:p] == 0).double().mean())}
                for p, error in zip(levels, errors)]
    counts, edges = np.histogram(share[share > 0].log10().numpy(), bins=16, range=(-8, 0))
    notes = []
    if n <= max(1, rows.d_model / 20) and others > 0:
        notes.append(f"{n} of {rows.d_model} dimensions hold {massive['share']:.0%} of the variance; "
                     f"FVU of the others {massive['fvu_of_others']:.4f}")
    if not sae.threshold.any():
        notes.append(f"only {prefixes[-1]['l0']:.1f} positive entries a row for k = {sae.metadata.get('k')}")
    return {"rows": done, "left_out": len(rows) - done, **prefixes[-1], "massive": massive,
            "frequencies": {"edges": (10.0**edges).tolist(), "counts": counts.tolist()},
            "prefixes": prefixes, "remarks": notes}


def max_cosine(W_dec, block=2048):
    """Mean over the rows of ``W_dec`` (F, D) of the largest cosine with any other row; 0 for a single row."""
    rows = nn.functional.normalize(W_dec, dim=1)
    if len(rows) == 1:
        return 0.0
    nearest = [(part @ rows.T).topk(2, dim=1).values[:, 1] for part in rows.split(block)]  # after itself
    return float(torch.cat(nearest).mean())


@torch.no_grad()
def loss_recovered(model, module, sae, batches, at="input", drop=()):
    """Cross-entropy, nats per token, of ``model`` with the stream at ``module`` left, zeroed, coded.
    ``batches`` of token ids (B, T); those in ``drop`` keep their stream and are not predicted. By prefix
    ``recovered = (zeroed - spliced) / (zeroed - clean)``, None for 0 / 0."""
    device, n = next(model.parameters()).device, 0
    through = (lambda x, p=p: sae.decode(sae.encode(x, p)) for p in sae.prefixes)
    swaps = [lambda x: x, torch.zeros_like, *through]
    sums = np.zeros(len(swaps))
    for ids in batches:
        ids = ids.to(device)
        keep = ~torch.isin(ids, torch.tensor(list(drop), device=device, dtype=ids.dtype))
        target = ids[:, 1:][keep[:, 1:]]
        n += len(target)
        for i, swap in enumerate(swaps):
            with activation_hook(module, at, lambda x, swap=swap: torch.where(keep[..., None], swap(x), x)):
                output = model(ids)
            logits = getattr(output, "logits", output)[:, :-1][keep[:, 1:]]
            sums[i] += float(nn.functional.cross_entropy(logits.float(), target, reduction="sum"))
    _require(n > 0, "the batches must have tokens to predict", n)
    clean, zeroed, *spliced = (sums / n).tolist()
    gap = zeroed - clean
    return {"clean": clean, "zeroed": zeroed, "tokens": n, "prefixes": [
        {"latents": p, "spliced": loss, "recovered": (zeroed - loss) / gap if gap else None}
        for p, loss in zip(sae.prefixes, spliced)]}


@torch.no_grad()
def probe(sae, x, y, seed=0, max_k=5):
    """How few latents tell labels ``y`` (n, C), booleans, of rows ``x`` (n, D); half the rows are held out.
    ``raw``: logistic regression on the rows. By prefix: ``probes``, the same on the k latents whose mean
    differs most with the label (Gurnee et al. 2023, arXiv 2305.01610); ``splitting``, how many of these
    latents raise F1 by more than 0.03 each; of the raw probe's true positives, ``main_silent``, the share on
    which the latent of largest difference is silent, and ``absorption``, on which it and the split ones are,
    and of the active latents the one that adds most along the probe has a cosine above 0.025 with it (after
    Chanin et al. 2024, arXiv 2409.14507, who find that latent by its ablation)."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order].float(), y[order]
    (x_train, x_test), (y_train, y_test) = x.tensor_split(2), y.tensor_split(2)
    rarest = torch.stack([labels.sum(0) for labels in (y_train, ~y_train, y_test, ~y_test)]).amin(dim=0)
    _require(rarest.all(), f"label {rarest.argmin()} needs rows with it and without it in both halves", 0)
    w, b = logistic_regression(x_train, y_train)
    seen = w @ x_test.T + b[:, None] > 0
    positives, share = y_test.T & seen, torch.where(y_train, 1 / y_train.sum(0), -1 / (~y_train).sum(0))
    # (C, F): mean activation on the rows with a label, less that on those without
    difference = sum(part.T @ sae.encode(rows) for rows, part in zip(x_train.split(2048), share.split(2048)))
    figures = {"rows": len(x), "raw": probe_scores(seen, y_test)[0], "prefixes": []}
    for p in sae.prefixes:
        top = difference[:, :p].abs().topk(min(max_k, p), dim=1).indices  # (C, k)
        chosen = torch.cat([top, difference[:, :p].argmax(dim=1, keepdim=True)], dim=1)
        codes = torch.cat([sae.encode(rows, p)[:, chosen] for rows in x.split(2048)])  # (n, C, k + 1)
        codes, codes_test = codes.movedim(0, 1).tensor_split(2, dim=1)
        probes, f1 = [], []
        for k in range(1, top.shape[1] + 1):
            w_k, b_k = logistic_regression(codes[:, :, :k], y_train)
            logits = torch.einsum("cnk,ck->cn", codes_test[:, :, :k], w_k) + b_k[:, None]
            scores, by_label = probe_scores(logits > 0, y_test)
            probes.append({"k": k, **scores})
            f1.append(by_label)
        splits = 1 + (torch.stack(f1).diff(dim=0) > 0.03).cumprod(dim=0).sum(0)
        is_split = (difference.gather(1, top) > 0) & (torch.arange(top.shape[1]) < splits[:, None])
        main_silent = positives & (codes_test[:, :, -1] == 0)
        missed = main_silent & ~((codes_test[:, :, :-1] > 0) & is_split[:, None]).any(dim=2)
        absorbed = torch.stack([n_absorbed(sae, x_test[rows], p, along) for rows, along in zip(missed, w)])
        absorbed = absorbed / positives.sum(1)
        figures["prefixes"].append({
            "latents": p, "probes": probes, "absorption": mean_known(absorbed),
            "main_silent": mean_known(main_silent.sum(1) / positives.sum(1)),
            "absorption_by_label": [mean_known(rate) for rate in absorbed],
            "splitting": float(splits.float().mean())})
    return figures


def logistic_regression(x, y, l2=1e-3, steps=100):
    """One probe per label: ``x`` (n, d), or (C, n, d) of its own, ``y`` (n, C) -> (w (C, d), b (C,)).
    Mean cross-entropy of ``sigmoid(x @ w + b)`` plus ``l2 |w|^2`` on standardised inputs, by LBFGS."""
    mean, std = x.mean(dim=-2, keepdim=True), x.std(dim=-2, keepdim=True).clamp_min(1e-12)
    x, y = (x - mean) / std, y.T.float()
    w, b = (torch.zeros(shape, requires_grad=True) for shape in ((len(y), x.shape[-1]), (len(y),)))
    optimizer = torch.optim.LBFGS([w, b], max_iter=steps, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        logits = (w[:, None] @ x.mT).squeeze(1) + b[:, None]
        total = len(y) * nn.functional.binary_cross_entropy_with_logits(logits, y) + l2 * w.pow(2).sum()
        total.backward()
        return total

    optimizer.step(loss)
    w = w.detach() / std.squeeze(-2)
    return w, b.detach() - (w * mean.squeeze(-2)).sum(dim=1)


def probe_scores(seen, y):
    """Of predictions ``seen`` (C, n) of ``y`` (n, C): mean accuracy and F1, and the F1 of each label (C,)."""
    f1 = 2 * (seen & y.T).sum(1) / (seen.sum(1) + y.sum(0))
    return {"accuracy": float((seen == y.T).float().mean()), "f1": float(f1.mean())}, f1


def n_absorbed(sae, rows, prefix, along):
    """On how many ``rows`` (n, D) the active latent that adds most ``along`` a probe points there itself."""
    W_dec, n = sae.W_dec[:prefix], torch.zeros(())
    for part in rows.split(2048):
        added, latent = (sae.encode(part, prefix) * (W_dec @ along)).max(dim=1)
        n += ((added > 0) & (nn.functional.cosine_similarity(W_dec[latent], along, dim=1) > 0.025)).sum()
    return n


def mean_known(values):
    """Mean of those that are not NaN, None if there are none."""
    mean = float(values.nanmean())
    return None if math.isnan(mean) else mean


@torch.no_grad()
def sparse_codes(sae, rows, on_rows=lambda done: None):
    """Codes of all raw ``rows`` (n, D): ``starts`` (n + 1,), ``latent`` and ``value``, those of row i from
    ``starts[i]`` to ``starts[i + 1]``; and, without codes, which rows are too far out (n,)."""
    parts, done = [], 0
    for part in Rows(rows).parts():
        x = part.read_all()
        far = part.too_far(x)
        acts = sae.encode(x.to(sae.b_dec.device)).cpu().masked_fill(far[:, None], 0)
        parts.append(((acts > 0).sum(dim=1), acts.nonzero()[:, 1].int(), acts[acts > 0].double(), far))
        on_rows(done := done + len(x))
    counts, latent, value, far = (torch.cat(part).numpy() for part in zip(*parts))
    return np.append(0, counts.cumsum()), latent, value, far


@torch.no_grad()
def latent_figures(sae, starts, latent, value, latents, seed=0):
    """Of each of ``latents`` figures, the rows where it is on and its activations there, of ``sparse_codes``.
    ``share`` of rows, ``max``, ``mean``, ``histogram`` (16 bins, 0 to max), the 10 ``largest`` rows, 5 at
    ``random``, the 5 ``nearest`` [latent, cosine of decoder rows]; ``parent``: of the latents of earlier
    prefixes the one of largest ``directed_cosines``, if at least 0.6, as [latent, this], else None."""
    n, ends, by_latent = len(starts) - 1, np.array((0, *sae.prefixes)), np.argsort(latent, kind="stable")
    row, peaks = np.repeat(np.arange(n), np.diff(starts)), np.zeros(ends[-1])
    np.maximum.at(peaks, latent, value)
    bounds = np.searchsorted(latent, np.arange(len(peaks) + 1), sorter=by_latent)
    directions = nn.functional.normalize(sae.W_dec.cpu(), dim=1)
    for part in torch.as_tensor(latents).split(256):
        near = (directions[part] @ directions.T).scatter(1, part[:, None], -2.0).topk(min(5, len(peaks) - 1))
        for number, *nearest in zip(part.tolist(), near.indices.tolist(), near.values.tolist()):
            own = by_latent[bounds[number]:bounds[number + 1]]
            at, acts, random = row[own], value[own], np.random.default_rng([seed, number])
            earlier = ends[ends <= number][-1]
            fits = directed_cosines(starts, latent, value, peaks, at, acts)[:earlier] if earlier else at[:0]
            best = (int(fits.argmax()), fits.max()) if fits.max(initial=0) >= 0.6 else None
            yield {"latent": number, "share": len(at) / n, "max": peaks[number], "parent": best,
                   "histogram": np.histogram(acts, 16, (0, peaks[number] or 1))[0].tolist(),
                   "largest": at[np.argsort(-acts, kind="stable")[:10]].tolist(),
                   "random": random.choice(at, min(5, len(at)), replace=False).tolist(),
                   "mean": acts.sum() / max(1, len(at)), "nearest": [*zip(*nearest)]}, at, acts


def directed_cosines(starts, latent, value, peaks, at, acts):
    """``(sum a_p a / (|a_p| |a|)) min(1, max a / max a_p)`` of every latent p with the one that is on in the
    rows ``at``, with ``acts``; all sums over these rows: (F,). Nabeshima, arXiv 2503.17547, appendix F."""
    sizes = starts[at + 1] - starts[at]
    of = np.repeat(starts[at] - sizes.cumsum() + sizes, sizes) + np.arange(sizes.sum())  # their entries
    met, a_p = latent[of], value[of]
    dot = np.bincount(met, a_p * np.repeat(acts, sizes), len(peaks))
    lengths = np.sqrt(np.bincount(met, a_p**2, len(peaks)) * (acts @ acts))
    return dot / np.maximum(lengths, 1e-99) * np.minimum(1, acts.max(initial=0) / np.maximum(peaks, 1e-99))


# ----------------------------------------------- 9. the toy
# Rows whose true features are known, and how well an SAE finds them.
# Uses torch and, for the figures, ``evaluate``.


class FeatureTree:
    """A tree of features, each on only where its parent is: the toy of noanabeshima/matryoshka-saes.
    ``spec``: a node {"active_prob": given that the parent is on, "is_read_out": false for a hidden node,
    "is_binary": false for a magnitude in [0.5, 1.5), "mutually_exclusive_children": true for at most one at a
    time, "children": [nodes], "id"}. Directions are orthogonal, with norms 1 + norm_std N(0, 1)."""

    def __init__(self, spec, d_model=None, norm_std=0.05, seed=0):
        self.nodes = []      # (parent, draw, low, high, read out, binary), on if low <= draws[draw] < high
        self.parent_of = []  # for each feature the feature above it, or None
        with reading("tree", "a node"):
            self._add(None, None, None, 0.0, **spec)
        n, self.d_model = len(self.parent_of), d_model or len(self.parent_of)
        _require(1 <= n <= self.d_model <= 2048, f"d_model must be in [1, 2048], at least {n}", self.d_model)
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(self.d_model, self.d_model, generator=generator)).Q
        self.directions = basis[:n] * (1 + norm_std * torch.randn(n, 1, generator=generator))
        self.pairs = [(p, c) for c, p in enumerate(self.parent_of) if p is not None]  # (parent, child)

    def _add(self, parent, feature, draw, low, /, active_prob, is_read_out=True, is_binary=True,
             mutually_exclusive_children=False, children=(), id=None):
        _require(0 <= active_prob <= 1, "active_prob must lie in [0, 1]", active_prob)
        node, low_of_child = len(self.nodes), 0.0
        self.nodes.append((parent, draw or node, low, low + active_prob, is_read_out, is_binary))
        if is_read_out:
            self.parent_of.append(feature)
            feature = len(self.parent_of) - 1
        shared = node + 1 if mutually_exclusive_children else None  # the draw of the first child
        for i, child in enumerate(children):
            with reading(f"children[{i}]", "a node"):
                self._add(node, feature, shared, low_of_child, **child)
                low_of_child += child["active_prob"] if mutually_exclusive_children else 0.0
        _require(low_of_child < 1 + 1e-9, "children that exclude each other may sum to 1", low_of_child)

    def sample_features(self, n, generator):
        """Feature activations (n, n_features): one uniform draw a node, or a set of exclusive siblings."""
        draws, on, features = torch.rand(len(self.nodes), n, generator=generator), [], []
        for parent, draw, low, high, read_out, binary in self.nodes:
            node = (draws[draw] >= low) & (draws[draw] < high)
            on.append(node if parent is None else node & on[parent])
            if read_out:
                features.append(on[-1] * (1.0 if binary else 0.5 + torch.rand(n, generator=generator)))
        return torch.stack(features, dim=1)

    def sample(self, n, seed):
        """``n`` rows (n, D) = features @ directions, which depend on ``seed`` alone."""
        return self.sample_features(n, torch.Generator().manual_seed(seed)) @ self.directions


@torch.no_grad()
def matched_acts(sae, tree, rows):
    """(Codes (n, n_features) of ``rows`` by the latents matched to the true features, greedily by |cosine|;
    the largest |cosine| of each feature with a decoder row)."""
    cosine, codes = nn.functional.normalize(tree.directions, dim=1) @ sae.W_dec.T, sae.encode(rows)
    left, matched = cosine.abs(), torch.zeros(len(rows), len(cosine))
    for _ in range(min(cosine.shape)):
        feature, latent = divmod(int(left.argmax()), left.shape[1])
        matched[:, feature] = codes[:, latent]
        left[feature] = left[:, latent] = -1.0
    return matched, cosine.abs().amax(dim=1)


def toy_figures(sae, tree, seed, n=20_000):
    """Figures on ``n`` fresh toy rows: ``evaluate``'s, and how well the true features are recovered.
    ``clean`` counts best |cosine| >= 0.9; ``absorption``: a child's rows without its parent's latent."""
    features = tree.sample_features(n, torch.Generator().manual_seed(seed))
    rows = features @ tree.directions
    (acts, cosine), figures = matched_acts(sae, tree, rows), evaluate(sae, rows)
    absorption = [{"parent": p, "child": c, "rate": mean_known((acts[features[:, c] > 0, p] == 0).float())}
                  for p, c in tree.pairs]
    return {"fvu": figures["fvu"], "l0": figures["l0"], "features": len(cosine),
            "clean": int((cosine >= 0.9).sum()), "mean_cosine": float(cosine.mean()),
            "min_cosine": float(cosine.min()), "absorption": absorption}


# -------------------------------------- 10. language models
# Where rows come from: TinyModel, a hook for the activations of any module, and their way into a file.
# Uses torch alone; the file and the Hub by section 7.

TINY_MODEL = "noanabeshima/tiny_model", "502a1f2453f61260c937f7807a1270a167faba07"
BEGIN, PAD = 9996, 9998  # token ids: before each text, and after those that are shorter


class TinyModel(nn.Module):
    """The language model noanabeshima/tiny_model, without layer norm: ids (B, T) -> logits (B, T, V).
    The stream of layer i enters ``layers[i]``, last ``lm_head``. The original returns log-probabilities."""

    def __init__(self, n_layers=4, d_model=768, d_mlp=3072, n_vocab=10_000, n_positions=256):
        super().__init__()
        self.embed = nn.Embedding(n_vocab, d_model)
        self.pos_embed = nn.Parameter(torch.zeros(1, n_positions, d_model))
        self.torso = nn.Sequential(*(_Block(d_model, d_mlp) for _ in range(n_layers)))
        self.lm_head = nn.Linear(d_model, n_vocab)
        self.layers = [*self.torso, self.lm_head]

    def forward(self, ids):
        return self.lm_head(self.torso(self.embed(ids) + self.pos_embed[:, : ids.shape[1]]))

    @classmethod
    def load(cls, path="tiny_model.pt"):
        """Read a state dict, never objects, of a file or, without one, the published one of that name."""
        if not os.path.exists(path):
            path = download(TINY_MODEL[0], [str(path)], TINY_MODEL[1]) / path
        with reading(path, "a state dict of TinyModel"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            n_layers = len({key.split(".")[1] for key in state if key.startswith("torso.")})
            (n_vocab, d_model), (_, n_positions, _) = state["embed.weight"].shape, state["pos_embed"].shape
            model = cls(n_layers, d_model, len(state["torso.0.mlp.read_in.bias"]), n_vocab, n_positions)
            model.load_state_dict(state)
        return model.eval()


class _Block(nn.Module):
    def __init__(self, d_model, d_mlp):
        super().__init__()
        self.attn = nn.ModuleDict({name: nn.Linear(d_model, d_model, bias=name == "O") for name in "QKVO"})
        read_in, write_out = nn.Linear(d_model, d_mlp), nn.Linear(d_mlp, d_model)
        self.mlp = nn.ModuleDict({"read_in": read_in, "write_out": write_out})

    def forward(self, x):
        q, k, v = (self.attn[name](x).unflatten(-1, (16, -1)).transpose(1, 2) for name in "QKV")
        heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, 16, T, D/16)
        x = x + self.attn["O"](heads.transpose(1, 2).flatten(-2))
        return x + self.mlp["write_out"](torch.relu(self.mlp["read_in"](x)))


class _Stop(Exception):
    """Ends a forward pass after the module of interest."""


@contextlib.contextmanager
def activation_hook(module, at="output", replace=None, stop=False):
    """Capture the "input" (first argument given) or "output" (first item) of a ``module``, a tensor per call.
    ``replace``: a function of that tensor whose result takes its place. ``stop``: end the forward pass.
    ``ValueError`` where the module is not called."""
    _require(at in ("input", "output"), 'at must be "input" or "output"', repr(at))
    captured, name = [], type(module).__name__

    def hook(module, args, kwargs, *output):
        whole = output[0] if output else args or tuple(kwargs.values()) or None
        first, *rest = whole if isinstance(whole, tuple) else (whole,)
        _require(isinstance(first, torch.Tensor), f"{name}: its {at} must start with a tensor", type(first))
        captured.append(first.detach())
        if stop:
            raise _Stop
        if replace is None:
            return None
        new = (replace(first).to(first), *rest)
        if output:
            return new if isinstance(whole, tuple) else new[0]
        return (new, kwargs) if args else ((), dict(zip(kwargs, new)))

    register = module.register_forward_pre_hook if at == "input" else module.register_forward_hook
    handle = register(hook, with_kwargs=True)
    try:
        with contextlib.suppress(_Stop):
            yield captured
    finally:
        handle.remove()
    _require(captured, f"{name} must be called in this context, calls", 0)


@torch.no_grad()
def harvest(model, module, batches, out, at="output", drop=(), dtype="float16", max_rows=None, resume=False,
            on_rows=lambda done: None):
    """Write the activations of ``module`` in ``model`` to ``out``, X.npy (rows, D), with number of the text
    and token id of each to X.ids.npy, int32 (rows, 2); return the number of rows. What is written so far is
    whole at any time; ``resume`` goes on behind it, with the same model and ``batches``.
    ``batches``: token ids (B, T), or dicts of what ``model`` takes by name, with "input_ids". Ids in
    ``drop``, and what an "attention_mask" leaves out, give no row. ``ValueError`` where rows do not fit."""
    _require(resume or not Path(out).exists(), "out must be a new file, or resume be set", out)
    _require(not model.training, "model must be in evaluation mode, model.eval()", "one in training")
    _require(dtype in ("float16", "float32"), "dtype must be float16 or float32", dtype)
    n, n_texts, device, beside = 0, 0, next(model.parameters()).device, Path(out).with_suffix(".ids.npy")
    old = read_npy(out) if resume and Path(out).exists() else ()
    _require(len(old) == 0 or len(read_npy(beside)) >= len(old), f"{beside} must be as long as {out}", "less")
    least, max_rows = max(1, len(old)), max(len(old), max_rows or 2**62)
    for batch in batches:
        inputs = {"input_ids": batch} if isinstance(batch, torch.Tensor) else batch
        inputs = {name: value.to(device) for name, value in inputs.items()}
        ids = inputs["input_ids"]
        mask = ~torch.isin(ids, torch.tensor(list(drop), device=device, dtype=ids.dtype))
        mask &= inputs.get("attention_mask", mask).bool()
        tokens = torch.stack([mask.nonzero()[:, 0] + n_texts, ids[mask]], dim=1).int().cpu().numpy()
        n_texts += len(ids)
        if n + len(tokens) < least:
            n += len(tokens)
            continue
        with activation_hook(module, at, stop=True) as captured:
            model(ids) if isinstance(batch, torch.Tensor) else model(**inputs)
        rows = captured[0][mask].to(getattr(torch, dtype)).cpu().numpy()
        _require(rows.ndim == 2, "module must give a vector for each token id", tuple(captured[0].shape))
        _require(np.isfinite(rows).all(), f"activations must fit in {dtype}", "one too large, or NaN")
        if n < len(old):  # the last batch there, made again
            was, now = old[n:], rows[:len(old) - n]
            same = was.dtype == now.dtype and np.allclose(was, now, 0.01, 0.01 * np.median(abs(now)))
            _require(same, f"{out} must be of this model and these ids, in {dtype}, but differs after row", n)
        new = slice(max(0, len(old) - n), max_rows - n)
        append_rows(beside, n + new.start, tokens[new])
        append_rows(out, n + new.start, rows[new])
        n += len(rows[:new.stop])
        on_rows(n)
        if n == max_rows:
            break
    _require(n >= least, f"the batches must give at least {least} rows", n)
    return n


def append_rows(path, n, rows):
    """Put ``rows`` (m, D) behind the first ``n`` of the ``.npy`` at ``path``, which is whole meanwhile."""
    header = {"descr": rows.dtype.str, "fortran_order": False, "shape": (n, rows.shape[1])}
    with open(path, "r+b" if n else "wb") as file:  # a map dies on a full disk
        np.lib.format.write_array_header_1_0(file, header)
        file.seek(n * rows.strides[0], os.SEEK_CUR)
        file.write(rows.data)
        file.seek(0)  # the header is as long as before: numpy leaves room for n to grow
        np.lib.format.write_array_header_1_0(file, header | {"shape": (n + len(rows), rows.shape[1])})
