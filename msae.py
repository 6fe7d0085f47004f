"""A Matryoshka sparse autoencoder (SAE) in one file: nested dictionaries, trained as one set of latents.

    encode (training)    pre  = relu((x - b_dec) @ W_enc + b_enc); acts = the round(k B) largest of pre
    encode (inference)   acts = pre * (pre > threshold)
    prefix p             recon_p = b_dec + acts[:, :p] @ W_dec[:p]
    nested loss          L = sum_p w_p mean_B |x - recon_p|^2,  sum_p w_p = 1

Every prefix of the latents has to reconstruct alone, so the early latents stay general and are not absorbed
by the specialised ones that follow. One prefix, of all latents, is the plain BatchTopK SAE. B batch rows,
D model width, F latents, P prefixes. Not included: L1 and gated SAEs, transcoders, thresholds per latent.

Sections 1 to 4 are the whole method as it stands above: autoencoder, selection and loss, settings, trainer.
5 is the same step, fast. Around them: 6 runs, 7 files, 8 metrics, 9 the toy, 10 language models.

Sources: nested loss: Bussmann, Nabeshima, Karvonen, Nanda 2025, arXiv 2503.17547. Pareto prefixes, the toy:
noanabeshima/matryoshka-saes. BatchTopK: Bussmann, Leask, Nanda 2024, arXiv 2412.06410. AuxK: Gao et al. 2024,
arXiv 2406.04093.
"""

import collections.abc
import contextlib
import copy
import dataclasses
import hashlib
import itertools
import json
import math
import mmap
import os
import re
import signal
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import distributed, nn


def _require(ok, rule, value):
    if not ok:
        raise ValueError(f"{rule}, got {value!s:.300}")


# ----------------------------------------------------------------------------------------- 1. the autoencoder
# What is trained, saved and used: four parameters and a threshold, on disk in SAELens' JumpReLU format.
# Uses ``prefix_lengths`` of section 2 and the readers and writers of section 7.

WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
SAELENS = {"architecture": "jumprelu", "normalize_activations": "none", "reshape_activations": "none"}


class MatryoshkaSAE(nn.Module):
    """Sparse autoencoder whose every prefix of latents is an autoencoder too.

        acts  = pre * (pre > threshold),  pre = relu((x - b_dec) @ W_enc + b_enc)      (..., D) -> (..., F)
        recon = acts @ W_dec + b_dec                                                   (..., F) -> (..., D)

    Starts with random unit rows of ``W_dec (F, D)`` and ``W_enc = W_dec.T``; ``threshold (F,)`` is one number
    repeated where it was trained here. ``metadata``: what its checkpoint says of it.
    """

    def __init__(self, d_model, n_latents, prefixes=None, generator=None):
        super().__init__()
        W_dec = nn.functional.normalize(torch.randn(n_latents, d_model, generator=generator), dim=1)
        self.W_enc = nn.Parameter(W_dec.T.clone(memory_format=torch.contiguous_format))
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("threshold", torch.zeros(n_latents))
        self.prefixes = prefix_lengths(n_latents, prefixes)
        self.metadata = {}

    def pre_acts(self, x, prefix=None):
        """``relu((x - b_dec) @ W_enc + b_enc)`` of the first ``prefix`` latents: (..., D) -> (..., p)."""
        D = len(self.b_dec)
        _require(x.shape[-1:] == (D,), f"the last dimension of x must be the model width {D}", tuple(x.shape))
        x = x.to(self.b_dec.dtype) - self.b_dec
        return torch.relu(x @ self.W_enc[:, :prefix] + self.b_enc[:prefix])

    def encode(self, x, prefix=None):
        """Codes of raw ``x``: (..., D) -> (..., F), or (..., prefix) of the SAE in the first latents."""
        F = len(self.b_enc)
        _require(prefix is None or 1 <= prefix <= F, f"prefix must lie in [1, {F}]", prefix)
        pre = self.pre_acts(x, prefix)
        return pre * (pre > self.threshold[:prefix])

    def decode(self, acts):
        """Reconstruction by the latents given: (..., p) -> (..., D) for any prefix p <= F."""
        return acts @ self.W_dec[: acts.shape[-1]] + self.b_dec

    def forward(self, x):
        return self.decode(self.encode(x))

    def save(self, folder):
        """Write weights and ``cfg.json`` into ``folder``, as SAELens 6 loads them (``load_from_disk``)."""
        metadata = {**self.metadata, "sae_lens_version": "6.0.0", "prefixes": list(self.prefixes)}
        cfg = {**SAELENS, "d_in": len(self.b_dec), "d_sae": len(self.b_enc), "apply_b_dec_to_input": True,
               "dtype": "float32", "device": "cpu", "metadata": metadata}
        tensors = {name: tensor.float().cpu().contiguous() for name, tensor in self.state_dict().items()}
        Path(folder).mkdir(parents=True, exist_ok=True)
        write(Path(folder, WEIGHTS), safetensors.torch.save(tensors))
        write(Path(folder, CONFIG), cfg)

    @classmethod
    def load(cls, source, device="cpu", revision=None):
        """Read a JumpReLU SAE of ``save`` or of SAELens; nothing is unpickled.

        ``source``: a folder, or the Hub repository "user/name" at ``revision``. ``ValueError`` names what is
        missing, misshapen, foreign or not finite; ``OSError`` what cannot be read.
        """
        on_hub = isinstance(source, str) and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source)
        on_hub = on_hub and not Path(source).parent.is_dir()
        _require(on_hub or revision is None, f"revision needs a Hub repository, {source} is none", revision)
        folder = download(source, [CONFIG, WEIGHTS], revision) if on_hub else Path(source)
        with reading(folder, "a JumpReLU checkpoint of SAELens"):
            cfg = json.loads((folder / CONFIG).read_text())
            for name, needed in SAELENS.items():  # the last is missing in older ones
                _require(cfg.get(name, "none") == needed, f"{name} must be {needed}", repr(cfg.get(name)))
            metadata = {"prefixes": [cfg["d_sae"]], **(cfg.get("metadata") or {})}
            sae = cls(cfg["d_in"], cfg["d_sae"], metadata["prefixes"], torch.Generator())
            sae.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))  # these five, of these shapes
            sound = all(tensor.isfinite().all() for tensor in sae.state_dict().values())
            _require(sound, "its tensors must be finite", "NaN or infinity")
        if not cfg.get("apply_b_dec_to_input", True):  # x @ W_enc = (x - b_dec) @ W_enc + b_dec @ W_enc
            sae.b_enc.data += sae.b_dec.data @ sae.W_enc.data
        dropped = ("sae_lens_version", "prefixes")
        sae.metadata = {name: value for name, value in metadata.items() if name not in dropped}
        return sae.to(device)

# ------------------------------------------------------------------------------- 2. prefixes, selection, loss
# The method as pure functions, each its literal formula; autograd gives the gradients.
# Uses torch alone.

FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # the widths of Bussmann et al.'s code


def prefix_lengths(n_latents, prefixes=None):
    """Increasing lengths that end in ``n_latents``, of such or of fractions that end in 1 (``FRACTIONS``)."""
    given = FRACTIONS if prefixes is None else tuple(prefixes)
    increasing = len(given) > 0 and given[0] > 0 and all(a < b for a, b in zip(given, given[1:]))
    lengths = increasing and given[-1] == n_latents and all(p == int(p) for p in given)
    _require(increasing and (lengths or given[-1] == 1),
             f"prefixes must increase and end in n_latents={n_latents} (or, as fractions, in 1)", list(given))
    return tuple(sorted({int(p) if lengths else max(1, round(p * n_latents)) for p in given}))


def sample_prefixes(n_latents, n_prefixes, power=0.5, generator=None):
    """``n_latents`` and ``n_prefixes - 1`` smaller lengths ``L`` of ``P(L) ~ L^power - (L-1)^power``.

    Without replacement. ``power`` 1 is uniform, towards 0 favours short prefixes (the original's comment,
    noanabeshima/matryoshka-saes, has that inverted).
    """
    if n_prefixes == 1:
        return (n_latents,)
    weights = (torch.arange(n_latents, dtype=torch.float64) ** power).diff()
    drawn = torch.multinomial(weights, n_prefixes - 1, generator=generator) + 1
    return (*sorted(drawn.tolist()), n_latents)


def batch_topk(pre, n):
    """The ``n`` largest entries of ``pre`` (B, F), and their row-major positions, increasing: (n,), (n,)."""
    values, index = pre.flatten().topk(min(n, pre.numel()))
    index, by_position = index.sort()
    return values[by_position], index


def nested_loss(x, acts, W_dec, b_dec, prefixes, weights=None):
    """``sum_p w_p mean_B |x - b_dec - acts[:, :p] @ W_dec[:p]|^2``: a scalar.

    ``x (B, D)``, ``acts (B, F)``; ``prefixes`` end in F, weights default to 1/P. Each block of latents
    between two prefixes is decoded once. Learning rates do not transfer from the peers: dictionary_learning
    weighs each term 1/P^2, SAELens 1, bartbussmann adds a level of b_dec alone.
    """
    weights = weights or [1 / len(prefixes)] * len(prefixes)
    sizes = np.diff(prefixes, prepend=0).tolist()
    recon, loss = b_dec, 0.0
    for block, rows, weight in zip(acts.split(sizes, dim=1), W_dec.split(sizes), weights):
        recon = recon + block @ rows
        loss = loss + weight * (x - recon).pow(2).sum(dim=1).mean()
    return loss


def aux_loss(sae, x, residual, dead):
    """AuxK: ``mean |residual - a @ W_dec[dead]|^2 / mean |residual - mean|^2``, a scalar, about 1.

    ``residual (B, D)`` is a constant; ``a`` keeps per row the ``min(D / 2, n_dead)`` largest of ``relu(pre)``
    among the latents ``dead`` (indices). Gao et al. 2024, section A.2.
    """
    residual = residual.detach().float()
    pre = torch.relu((x - sae.b_dec.detach()) @ sae.W_enc[:, dead] + sae.b_enc[dead])
    values, index = pre.topk(min(x.shape[1] // 2 or 1, len(dead)), dim=1)
    recon = torch.zeros_like(pre).scatter(1, index, values) @ sae.W_dec[dead]
    spread = (residual - residual.mean(dim=0)).pow(2).sum(dim=1).mean()
    return (residual - recon).pow(2).sum(dim=1).mean() / spread.clamp_min(1e-12)


# ------------------------------------------------------------------------------------------------ 3. settings
# All that a run depends on beside its rows, checked once, with the schedules that follow from it.
# Uses section 2's ``prefix_lengths``.

SIZE, RATE = (1, 2**31), (1e-12, 2**63)
BOUNDS = {  # of single numbers, both included
    "n_latents": SIZE, "n_latents_start": SIZE, "n_prefixes": SIZE, "batch_size": SIZE, "steps": SIZE,
    "k": RATE, "k_start": RATE, "lr": RATE, "clip": RATE, "pareto_power": (1e-9, 1), "decay_fraction": (0, 1),
    "warmup_steps": (0, 2**31), "k_anneal_steps": (0, 2**31), "aux_coef": (0, 2**63),
    "dead_after": (1, 2**62), "seed": (0, 2**62),
}


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """All settings of a run. ``ValueError`` names the field, the rule and the value that breaks it.

    The same config and rows give, on one machine and device, the same weights: bit for bit on the CPU.
    """

    n_latents: int
    k: float = 30.0                     # active latents per row, on average over the batch; need not be whole
    prefixes: tuple | None = None       # lengths that end in n_latents, or fractions that end in 1; FRACTIONS
    n_prefixes: int | None = None       # instead: sample this many at every step (Pareto)
    pareto_power: float = 0.5           # towards 0 favours short prefixes, 1 is uniform
    level_weights: tuple | None = None  # w_p, one per prefix, scaled to sum 1; None: all equal
    order: str = "stored"               # "energy": prefixes run over the latents sorted by their mean square
    batch_size: int = 2048              # rows
    steps: int = 10_000
    lr: float | None = None             # Adam's peak rate; None: default_lr(n_latents)
    betas: tuple = (0.9, 0.999)
    warmup_steps: int | None = None     # of linear rise from 0; None: a tenth of the steps, at most 1000
    decay_fraction: float = 0.2         # of the steps, at the end, in which lr falls linearly to 0
    k_start: float | None = None        # k at step 0, moving linearly to k over k_anneal_steps; None: k
    k_anneal_steps: int = 0
    n_latents_start: int | None = None  # with spare ones: the least energetic go until n_latents are left
    prune_window: tuple = (0.2, 0.6)    # fractions of the steps between which they go
    aux_coef: float = 1 / 32            # weight of the loss that revives dead latents
    dead_after: int = 200_000           # rows without firing that make a latent dead
    clip: float = 1.0                   # largest norm of the whole gradient
    dtype: str | None = None            # of the products: float32, bfloat16, float16; None: bfloat16 on CUDA
    seed: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            self._check_field(field.name, getattr(self, field.name), field.type)
        F, B, k_least = self.n_latents, self.batch_size, min(self.k, self.k_start or self.k)
        n, weights = len(self.weights()), self.level_weights or (1,)
        window, betas = self.prune_window, self.betas
        for name, ok, rule in (
            ("k", self.k <= F, f"be at most n_latents={F}"),
            ("k", round(k_least * B) >= 1, f"give at least one active entry in a batch of batch_size={B}"),
            ("k_start", (self.k_start or 1) <= F, f"be at most n_latents={F}"),
            ("k_anneal_steps", self.k_anneal_steps > 0 or not self.k_start, "be at least 1 with k_start"),
            ("n_prefixes", (self.n_prefixes or 1) <= F, f"be at most n_latents={F}"),
            ("n_prefixes", self.n_prefixes is None or self.prefixes is None, "not be given with prefixes"),
            ("level_weights", n == (self.n_prefixes or len(self.levels())), "be one number for each prefix"),
            ("level_weights", min(weights) >= 0 < sum(weights), "not be negative, and not all 0"),
            ("order", self.order in ("stored", "energy"), 'be "stored" or "energy"'),
            ("betas", len(betas) == 2 and 0 <= min(betas) <= max(betas) < 1, "be two in [0, 1)"),
            ("n_latents_start", (self.n_latents_start or F) >= F, f"be at least n_latents={F}"),
            ("prune_window", len(window) == 2 and 0 <= window[0] < window[1] <= 1, "be two fractions a < b"),
            ("dtype", self.dtype in (None, "float32", "bfloat16", "float16"),
             "be float32, bfloat16 or float16"),
        ):
            _require(ok, f"{name} must {rule}", getattr(self, name))

    def _check_field(self, name, value, kind):
        if isinstance(value, (list, np.generic)):
            value = tuple(value) if isinstance(value, list) else value.item()
            object.__setattr__(self, name, value)
        numbers = value if isinstance(value, tuple) else () if isinstance(value, str | None) else (value,)
        sound = all(type(n) in (int, float) and abs(n) < 2**63 for n in numbers)
        kind = kind | int if isinstance(0.5, kind) else kind
        rule = f"{name} must be {getattr(kind, '__name__', kind)}"
        _require(sound and isinstance(value, kind), rule, repr(value))
        low, high = BOUNDS.get(name, (None, None))
        inside = low is None or value is None or low <= value <= high
        _require(inside, f"{name} must lie in [{low}, {high}]", value)

    def vanilla(self):
        """The plain BatchTopK twin: one prefix, of all latents; everything else equal."""
        return dataclasses.replace(self, prefixes=(self.n_latents,), n_prefixes=None, level_weights=None)

    def levels(self):
        """Prefix lengths of the finished SAE: those of training, the default ones where they are sampled."""
        return prefix_lengths(self.n_latents, self.prefixes)

    def weights(self):
        """Level weights ``w_p``, which sum to 1."""
        given = self.level_weights or (1,) * (self.n_prefixes or len(self.levels()))
        return [w / (sum(given) or 1) for w in given]

    def lr_at(self, step):
        """Learning rate of step number ``step`` (from 0): linear warm-up, constant, linear decay to 0."""
        warmup = min(self.steps // 10, 1000) if self.warmup_steps is None else self.warmup_steps
        rise = (step + 1) / warmup if step < warmup else 1.0
        fall = (self.steps - step) / max(self.decay_fraction * self.steps, 1.0)
        return (self.lr or default_lr(self.n_latents)) * min(rise, fall, 1.0)

    def k_at(self, step):
        """Active latents per row at step number ``step``."""
        done = min(1.0, step / self.k_anneal_steps) if self.k_start else 1.0
        return self.k if done == 1 else self.k_start + (self.k - self.k_start) * done

    def latents_at(self, step):
        """Number of latents at step number ``step``, spare ones included."""
        first, last = (fraction * self.steps for fraction in self.prune_window)
        spare = (self.n_latents_start or self.n_latents) - self.n_latents
        return self.n_latents + math.ceil(spare * min(max((last - step) / (last - first), 0.0), 1.0))


def default_lr(n_latents):
    """Adam's peak learning rate, ``min(0.01, 0.24 / sqrt(n_latents))``, after sweeps (README)."""
    return min(0.01, 0.24 / math.sqrt(n_latents))


# --------------------------------------------------------------------------------------------- 4. the trainer
# One SAE in training: a step, and what is kept between steps.
# Uses sections 1 to 3, and of section 5 ``fast_step``, which does what ``literal_step`` does.


class Trainer:
    """One SAE in training: ``step(x)`` is an optimizer step on raw rows (B, D), ``export()`` the SAE to keep.

    ``trainer.sae`` sees ``x / scale`` and starts with ``b_dec = mean / scale``, so a common mean, however
    large, neither silences latents nor shrinks what is to be learned. The smallest entry that a batch keeps
    is its ``cut``; ``sae.threshold``, by which rows are encoded alone, is the moving average of the cuts.
    """

    def __init__(self, cfg, d_model, device="cpu", mean=None, scale=1.0):
        self.cfg, self.scale, self.device = cfg, float(scale), torch.device(device)
        self.dtype = cfg.dtype or ("bfloat16" if self.device.type == "cuda" else "float32")
        kind, low = self.device.type, self.dtype != "float32"
        self.autocast = torch.autocast(kind, getattr(torch, self.dtype), enabled=low)
        self.scaler = torch.amp.GradScaler(kind, enabled=self.dtype == "float16")
        generator = torch.Generator().manual_seed(cfg.seed)
        self.sae = MatryoshkaSAE(d_model, cfg.latents_at(0), None, generator).to(self.device)
        if mean is not None:
            self.sae.b_dec.data.copy_(mean / self.scale)
        eps = 1.5e-5 * cfg.k / cfg.n_latents  # near a rare latent's gradient: below it Adam takes full steps
        betas = tuple(map(float, cfg.betas))
        fused = kind in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(self.sae.parameters(), 0.0, betas, eps, fused=fused)
        self.fast = kind == "cpu" and not low and torch.backends.mkl.is_available()
        self.buffer = None  # of the fast step, kept as fresh memory is slow
        self.world = rank_and_world()[1]
        self.stop = False   # a wish to end the run; after a step of several processes, whether any has it
        self.steps_done = 0
        self.rows_silent = torch.zeros_like(self.sae.b_enc.data, dtype=torch.long)  # since each latent fired
        self.energy = torch.zeros_like(self.sae.b_enc.data)                         # running mean of acts^2
        self.cut = torch.zeros((), device=self.device)

    def step(self, x):
        """Take one optimizer step on raw rows ``x`` (B, D); return the loss, a scalar on the device."""
        x = x.to(self.device, torch.float32, non_blocking=True) / self.scale
        values, index, loss = fast_step(self, x) if self.fast else self.literal_step(x)  # and the gradients
        loss = self.observe(values, index, loss + self.revive(x, values, index), len(x))
        self.optimize()
        self.steps_done += 1
        self.prune(self.cfg.latents_at(self.steps_done))
        return loss

    def literal_step(self, x):
        """Gradients of the nested loss by autograd: (entries kept (n,), their row-major positions, loss)."""
        sae, order = self.sae, self.prefix_order()
        self.optimizer.zero_grad()
        with self.autocast:
            pre = sae.pre_acts(x)
            values, index = batch_topk(pre, self.n_kept(len(x)))
            acts = torch.zeros_like(pre).flatten().scatter(0, index, values).view_as(pre)[:, order]
            loss = nested_loss(x, acts, sae.W_dec[order], sae.b_dec, self.step_prefixes(), self.cfg.weights())
        self.scaler.scale(loss).backward()
        return values.detach(), index, loss.detach()

    def revive(self, x, values, index):
        """Add the gradients of AuxK on the dead latents, if there are any; return its part of the loss."""
        dead, F = (self.rows_silent >= self.cfg.dead_after).nonzero().squeeze(1), len(self.energy)
        if len(dead) == 0 or self.cfg.aux_coef == 0:
            return 0.0
        starts = torch.searchsorted(index // F, torch.arange(len(x) + 1, device=index.device))
        recon = weighted_row_sums(values, index % F, starts, self.sae.W_dec.detach())
        with self.autocast:
            loss = self.cfg.aux_coef * aux_loss(self.sae, x, x - self.sae.b_dec - recon, dead)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def n_kept(self, rows):
        """How many entries this step keeps of so many rows."""
        return max(1, round(self.cfg.k_at(self.steps_done) * rows))

    def step_prefixes(self):
        """This step's prefix lengths, fixed or freshly drawn. The last takes in the spare latents."""
        cfg, levels = self.cfg, self.cfg.levels()
        if cfg.n_prefixes is not None:  # by the step's number, so that a resumed run draws the same
            seed = np.random.SeedSequence((cfg.seed, self.steps_done)).generate_state(1)[0]
            generator = torch.Generator().manual_seed(int(seed))
            levels = sample_prefixes(cfg.n_latents, cfg.n_prefixes, cfg.pareto_power, generator)
        return (*levels[:-1], len(self.energy))

    def prefix_order(self):
        """Index from prefix position to latent: by energy (F,), or all as stored."""
        by_energy = self.cfg.order == "energy"
        return self.energy.argsort(descending=True, stable=True) if by_energy else slice(None)

    @torch.no_grad()
    def observe(self, values, index, loss, rows):
        """Update cut, threshold, silent rows and energy by the entries kept of so many rows.

        Threshold and energy are means over about 100 and 20 steps: L0 is to be steady, the order fresh.
        Processes average all that, and the gradients, before anything changes.
        """
        per_latent = torch.zeros(2, len(self.energy), device=self.device)  # share of active rows, mean square
        entries = torch.stack([(values > 0).float(), values.square()])
        per_latent.index_add_(1, index % len(self.energy), entries).div_(rows)
        few_positive = len(values) < self.n_kept(rows)
        cut = torch.zeros_like(loss) if few_positive else values.min()
        seen = torch.cat([per_latent.flatten(), torch.stack([cut, loss, torch.full_like(loss, self.stop)])])
        if self.world > 1:
            for tensor in (seen, *(parameter.grad for parameter in self.sae.parameters())):
                distributed.all_reduce(tensor)
                tensor /= self.world
            self.stop = bool(seen[-1] > 0)
        first, (active, energy), self.cut = self.steps_done == 0, seen[:-3].view(2, -1), seen[-3]
        self.sae.threshold.lerp_(self.cut, 1.0 if first else 0.01)
        self.rows_silent.add_(rows * self.world).masked_fill_(active > 0, 0)
        self.energy.lerp_(energy, 1.0 if first else 0.05)
        return seen[-2]

    @torch.no_grad()
    def optimize(self):
        """Clip, Adam; decoder rows lose the gradient along themselves before and are unit again after."""
        W_dec, parameters = self.sae.W_dec, list(self.sae.parameters())
        self.scaler.unscale_(self.optimizer)
        size = max(1, CACHED // W_dec.shape[1])
        for grad, w in zip(W_dec.grad.split(size), W_dec.split(size)):
            grad.addcmul_((grad * w).sum(dim=1, keepdim=True), w, value=-1)
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        if self.device.type != "cpu" or norm > self.cfg.clip:  # a pass over all gradients, saved on the CPU
            nn.utils.clip_grads_with_norm_(parameters, self.cfg.clip, norm)
        self.optimizer.param_groups[0]["lr"] = self.cfg.lr_at(self.steps_done)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        W_dec /= W_dec.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def prune(self, n):
        """Keep the ``n`` most energetic latents, with their optimizer state.

        With just as many latents as features, one may settle on a job of little worth while a feature has
        none, as in k-means. Starting with too many and dropping the least energetic leaves each its own.
        """
        if n == len(self.energy):
            return
        keep, sae = self.energy.topk(n).indices.sort().values, self.sae
        self.rows_silent, self.energy = self.rows_silent[keep], self.energy[keep]
        sae.threshold = sae.threshold[keep]
        for parameter, dim in ((sae.W_enc, 1), (sae.b_enc, 0), (sae.W_dec, 0)):
            moments, parameter.grad = self.optimizer.state[parameter], None
            parameter.data = parameter.data.index_select(dim, keep)
            for name in ("exp_avg", "exp_avg_sq") if moments else ():
                moments[name] = moments[name].index_select(dim, keep)

    @torch.no_grad()
    def measure(self, x):
        """{"fvu", "l0", "dead", "threshold"} on raw ``x``, at the running threshold, with spare latents."""
        x = x.to(self.device, torch.float32) / self.scale
        acts, dead = self.sae.encode(x), self.rows_silent >= self.cfg.dead_after
        error, total = (x - self.sae.decode(acts)).pow(2).sum(), (x - x.mean(dim=0)).pow(2).sum()
        return {"fvu": float(error / total), "l0": float((acts > 0).sum() / len(x)),
                "dead": float(dead.float().mean()), "threshold": float(self.sae.threshold[0]) * self.scale}

    @torch.no_grad()
    def export(self):
        """A copy for raw rows: scale folded in, latents in prefix order, spare ones left out."""
        keep = self.energy.argsort(descending=True, stable=True)[: self.cfg.n_latents]
        keep = keep.sort().values if self.cfg.order == "stored" else keep
        W_enc, b_enc, W_dec, b_dec = self.sae.parameters()
        sae = MatryoshkaSAE(len(b_dec), len(keep), self.cfg.levels(), torch.Generator()).to(self.device)
        sae.load_state_dict({"W_enc": W_enc[:, keep], "b_enc": b_enc[keep] * self.scale, "W_dec": W_dec[keep],
                             "b_dec": b_dec * self.scale, "threshold": self.sae.threshold[keep] * self.scale})
        sae.metadata = {"k": self.cfg.k, "training": dataclasses.asdict(self.cfg)}
        sound = sae.W_dec.any(dim=1).all() and all(tensor.isfinite().all() for tensor in sae.parameters())
        _require(sound, f"training diverged by step {self.steps_done}, try a lower lr: weights", "NaN or 0")
        return sae

    def state_dict(self):
        """All that the next steps depend on beside the config and the rows."""
        names = ("steps_done", "scale", "rows_silent", "energy", "cut")
        values = {name: getattr(self, name) for name in names}
        return values | {name: getattr(self, name).state_dict() for name in ("sae", "optimizer", "scaler")}

    def load_state_dict(self, state):
        """Go on from ``state``, of a trainer with the same config: bit for bit on the CPU."""
        self.steps_done, self.scale = state["steps_done"], state["scale"]
        self.prune(self.cfg.latents_at(self.steps_done))
        for name in ("sae", "optimizer", "scaler"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("rows_silent", "energy", "cut"):
            setattr(self, name, state[name].to(self.device))


@torch.no_grad()
def calibrate(sae, rows, k, batch_size=2048):
    """Set the threshold to a mean L0 of ``k`` on raw ``rows`` (n, D), or to 0 where fewer are positive."""
    n = round(k * len(rows))
    for floor in (0.5 * float(sae.threshold.max()), 0.0):
        pre = (sae.pre_acts(x.to(sae.b_dec.device)) for x in rows.split(batch_size))
        above = torch.cat([part[part > floor] for part in pre])
        if len(above) > n:
            sae.threshold.fill_(above.topk(n + 1).values[-1])
            return
    sae.threshold.zero_()


# ------------------------------------------------------------------------------------- 5. the same step, fast
# Of B x F entries about k / F survive, so each product but the encoder's becomes a sum over the survivors: 99
# against 415 ms at F 3072, D 768, B 2048 on 2 cores; 2.9 against 3.8 on the toy. Uses torch and numpy alone.

CACHED = 1 << 19  # numbers that stay in a core's cache until their next use: 2 MiB of float32


@torch.no_grad()
def fast_step(trainer, x):
    """What ``Trainer.literal_step`` does, without autograd and without ever holding the (B, F) entries."""
    sae, F, prefixes = trainer.sae, len(trainer.energy), trainer.step_prefixes()
    x, shape = x - sae.b_dec, (len(x), len(prefixes), x.shape[1])
    # the cut seldom falls by a tenth from one step to the next; where it does, the search starts again lower
    values, index = sparse_topk(x, sae.W_enc, sae.b_enc, trainer.n_kept(len(x)), 0.9 * float(trainer.cut))
    place = index
    if trainer.cfg.order == "energy":  # within each row by prefix position
        position = trainer.prefix_order().argsort()
        place, by_place = (index - index % F + position[index % F]).sort()
        values, index = values[by_place], index[by_place]
    block_ends = (torch.arange(0, len(x) * F, F)[:, None] + torch.tensor(prefixes)).flatten()
    starts = nn.functional.pad(torch.searchsorted(place, block_ends), (1, 0))
    if trainer.buffer is None or trainer.buffer.shape != shape:
        trainer.buffer = x.new_empty(shape)
    latent, weights = index % F, trainer.cfg.weights()
    loss, d_values = sparse_loss(x, values, latent, starts, sae.W_dec, weights, trainer.buffer)
    write_gradients(sae, x, values, d_values, latent, starts, trainer.buffer)
    return values, index, loss


def sparse_topk(x, W_enc, b_enc, n, floor=0.0):
    """``batch_topk`` of ``relu(x @ W_enc + b_enc)``, without entries of 0, that never holds all of it.

    Exact for every ``floor``: it searches above that first, and lower where fewer than ``n`` lie there.
    """
    if floor <= 0:
        sample_pre = torch.addmm(b_enc, x[:: max(1, len(x) // 64)], W_enc).flatten()
        share = n / len(x) / W_enc.shape[1]
        floor = max(0.0, 0.7 * float(sample_pre.topk(max(1, round(share * len(sample_pre)))).values[-1]))
    for floor in (floor, floor / 2, 0.0):
        values, index = entries_above(floor, x, W_enc, b_enc)
        if len(values) >= n:
            break
    if len(values) > n:
        keep = torch.from_numpy(np.sort(np.argpartition(values.numpy(), -n)[-n:]))
        values, index = values[keep], index[keep]
    return values, index


def entries_above(floor, x, W_enc, b_enc):
    """Values and increasing row-major positions of the entries of ``x @ W_enc + b_enc`` above ``floor``.

    The one dense B x D x F product of a step, a few latents at a time: their block is searched in the cache.
    """
    (B, _), F, parts = x.shape, len(b_enc), []
    width = max(1, 4 * CACHED // B)  # 4: each number is read once only
    for start in range(0, F, width):
        end = min(start + width, F)
        pre = torch.addmm(b_enc[start:end], x, W_enc[:, start:end]).numpy().ravel()
        above = np.flatnonzero(pre > floor)  # 3 ms for 6 million numbers, torch 14
        row, latent = np.divmod(above, end - start)
        parts.append((row, latent + start, pre[above]))
    row, latent, values = map(np.concatenate, zip(*parts))
    order = stable_order(row, B)
    return torch.from_numpy(values[order]), torch.from_numpy((row * F + latent)[order])


def stable_order(keys, end):
    """Stable argsort of numbers in [0, end): numpy sorts 61,000 of 16 bits by radix: 0.5 ms, torch 2.5."""
    return np.argsort(keys.astype(np.uint16 if end <= 1 << 16 else np.int64), kind="stable")


def sparse_loss(x, values, latent, starts, W_dec, weights, G):
    """``nested_loss`` of sparse codes, gradients in closed form: (loss, d_values (n,)), ``G`` (B, P, D).

    ``x`` is without ``b_dec``. In row ``b`` the block of latents that ends with prefix ``p`` has the
    ``values`` of the ``latent`` from ``starts[b P + p]`` to the next start, which decode to ``R_p``; ``R_1``
    takes ``-x`` in. So the residual of prefix ``p`` is ``sum_{i <= p} R_i``, and the loss a quadratic form:

        L = 1/2 sum_b sum_ij K_ij <R_i, R_j>,  K_ij = 2/B sum_{p >= max(i, j)} w_p

    Hence ``dL/dR = G = K R`` and ``d_values = <G_j, W_dec>``.
    """
    (B, D), P = x.shape, len(weights)
    weight_from = torch.tensor([2 / B * sum(weights[p:]) for p in range(P)])
    K = torch.minimum(weight_from, weight_from[:, None])
    size = max(1, CACHED // (P * D))
    for start in range(0, B, size):
        end = min(start + size, B)
        R = weighted_row_sums(values, latent, starts[start * P:end * P + 1], W_dec).view(-1, P, D)
        R[:, 0] -= x[start:end]
        torch.matmul(K, R, out=G[start:end])
    with warnings.catch_warnings():  # torch calls its CSR support beta, once per process
        warnings.simplefilter("ignore")
        zeros, shape = torch.zeros_like(values), (B * P, len(W_dec))
        entries = torch.sparse_csr_tensor(starts.int(), latent.int(), zeros, shape, check_invariants=False)
    d_values = torch.sparse.sampled_addmm(entries, G.flatten(0, 1), W_dec.T).values()
    return (values @ d_values - (G[:, 0] * x).sum()) / 2, d_values


def weighted_row_sums(values, index, starts, rows):
    """``sum_i values[i] * rows[index[i]]`` over ``starts[j] <= i < starts[j + 1]``, for each j, D wide."""
    part = slice(int(starts[0]), int(starts[-1]))
    return nn.functional.embedding_bag(index[part], rows, starts[:-1] - starts[0], mode="sum",
                                       per_sample_weights=values[part])


def write_gradients(sae, x, values, d_values, latent, starts, G):
    """All gradients, into the parameters' ``grad``, whose memory is kept: sums over the active entries.

    ``dW_dec = A_j.T @ G_j`` for the latents of block ``j``, ``dW_enc = x.T @ dA``, ``db_enc`` the column sums
    of ``dA``, ``db_dec = sum_B G_1 - W_enc @ db_enc``.
    """
    (B, P, D), F = G.shape, len(sae.W_dec)
    for parameter in sae.parameters():
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
    order = torch.from_numpy(stable_order(latent.numpy(), F))
    row_block = torch.repeat_interleave(torch.arange(B * P), starts.diff())[order]
    values, by_latent, row = values[order], d_values[order], row_block // P
    starts = nn.functional.pad(torch.bincount(latent, minlength=F).cumsum(0), (1, 0))
    size = max(1, CACHED // D)
    for start in range(0, F, size):
        end = min(start + size, F)
        part = starts[start:end + 1]
        sae.W_dec.grad[start:end] = weighted_row_sums(values, row_block, part, G.flatten(0, 1))
        sae.W_enc.grad[:, start:end] = weighted_row_sums(by_latent, row, part, x).T
    sae.b_enc.grad.zero_().index_add_(0, latent, d_values)
    torch.sub(G[:, 0].sum(dim=0), sae.W_enc @ sae.b_enc.grad, out=sae.b_dec.grad)


# ---------------------------------------------------------------------------------------------------- 6. runs
# The loop around the trainer: checkpoints, signals, several processes. A cut run goes on where it was.
# Uses sections 1 to 4 and the files of 7.

STATE, METRICS = "training_state.pt", "metrics.jsonl"
ASIDE = 16_384  # rows, at most, that give mean and scale, and others that give the final threshold


def train(acts, cfg, *, device="cpu", out=None, resume=False, save_minutes=10.0, on_log=None, log_every=50,
          metadata=None):
    """Train on ``acts``, what ``Rows`` takes or a reader like ``FeatureTree``: the SAE for raw activations.

    ``out``: a new or empty folder for metrics and checkpoint, written at the start, every ``save_minutes``
    and however the loop ends; ``resume`` goes on from there. SIGINT, SIGTERM and SIGHUP act after the current
    step. ``on_log`` gets {"step", "loss", "fvu", "l0", "dead", "threshold", "rows_per_second"} every
    ``log_every`` steps. ``metadata``: what the checkpoint is to say of the rows. Under torch.distributed each
    process takes its share of every batch. ``ValueError`` for bad rows, or settings or rows other than those
    resumed; ``OSError`` for an ``out`` in use.
    """
    _require(not resume or out is not None, "resume needs out, the folder to go on in", out)
    device, (rank, world) = check_device(device), rank_and_world()
    # rows aside for the threshold: calibrated on rows trained on, it lets too few entries pass on others
    data, aside = (acts if hasattr(acts, "batches") else Rows(acts)).split_off(0.05, cfg.seed)
    sample, aside = data.sample(ASIDE, cfg.seed), aside.sample(ASIDE, cfg.seed)
    trainer = Trainer(cfg, data.d_model, device, *mean_and_scale(sample))
    fingerprint = {**dataclasses.asdict(cfg), "rows": getattr(data, "n", None), "processes": world,
                   "checksum of a sample of the rows": hashlib.sha256(sample.numpy()).hexdigest()[:16]}
    if resume:
        trainer.load_state_dict(read_state(Path(out), fingerprint))
    batches = training_batches(data, trainer)
    folder = None if out is None or rank > 0 else Path(out) if resume else new_folder(out)
    started, first = time.monotonic(), trainer.steps_done

    def checkpoint():
        sae = trainer.export()
        sae.metadata.update(metadata or {})
        if trainer.steps_done:
            calibrate(sae, aside, cfg.k)
        if folder:
            write_state(folder, fingerprint, trainer)
            sae.save(folder)
        return sae

    with deferred_signals() as received:
        if folder and not resume:
            checkpoint()
        try:
            saved = time.monotonic()
            for x in batches:
                trainer.stop = bool(received)
                loss = trainer.step(x)
                if trainer.steps_done % log_every == 0 or trainer.steps_done == cfg.steps:
                    rate = (trainer.steps_done - first) * cfg.batch_size / (time.monotonic() - started)
                    figures = {"step": trainer.steps_done, "loss": float(loss), **trainer.measure(x[:512])}
                    log_figures(folder, on_log, {**figures, "rows_per_second": round(rate)})
                if trainer.stop:
                    break
                if folder and time.monotonic() - saved > 60 * save_minutes:
                    checkpoint()
                    saved = time.monotonic()
            ended = trainer.stop or trainer.steps_done == cfg.steps
            _require(ended, f"batches must last for {cfg.steps} steps, they ended after", trainer.steps_done)
        except Exception:  # a row that cannot be used, a callback, a lost process: the steps so far stand
            checkpoint()
            raise
        if trainer.stop and not received:
            received.append(signal.SIGTERM)  # another process got it
        return checkpoint()


def log_figures(folder, on_log, figures):
    if folder:
        with open(folder / METRICS, "a") as file:
            file.write(json.dumps(figures) + "\n")
    if on_log:
        on_log(figures)


def mean_and_scale(sample):
    """Mean (D,) and root mean squared distance from it; ``ValueError`` where float32 would lose that."""
    mean = sample.mean(dim=0, dtype=torch.float64)
    scale = float((sample - mean).norm()) / len(sample) ** 0.5
    _require(max(1e-18, 1e-6 * float(mean.norm())) < scale < 1e18, "the rows must not be all zero, equal to "
             "a millionth, or beyond 1e18; their root mean squared distance from their mean", scale)
    return mean, scale


def training_batches(data, trainer):
    """The batches of the steps to come; ``ValueError`` where processes or rows cannot fill them."""
    cfg, (rank, world) = trainer.cfg, rank_and_world()
    _require(cfg.batch_size % world == 0, f"batch_size must be a multiple of {world}", cfg.batch_size)
    batches = data.batches(cfg.batch_size // world, cfg.seed, trainer.steps_done, rank, world)
    batches = itertools.islice(batches, cfg.steps - trainer.steps_done)
    if not isinstance(data, Rows):  # a thread would take a third longer over the toy's small steps
        return batches
    _require(len(data) >= cfg.batch_size and len(data.blocks) >= world,
             f"batch_size must be at most the number of training rows {len(data)}", cfg.batch_size)
    return prefetch(batches, pin=trainer.device.type == "cuda")


def write_state(folder, fingerprint, trainer):
    """What ``read_state`` reads, with the length of the metrics so far."""
    log_bytes = (folder / METRICS).stat().st_size if (folder / METRICS).exists() else 0
    state = {"fingerprint": fingerprint, "log_bytes": log_bytes, "trainer": trainer.state_dict()}
    with atomic(folder / STATE) as temporary:
        try:
            torch.save(state, temporary)
        except RuntimeError as error:  # torch's word for a full disk
            raise OSError(one_line(error)) from None


def read_state(folder, fingerprint):
    """The trainer's state; ``ValueError`` names what of settings and rows differs. Cuts off later metrics."""
    path, metrics = folder / STATE, folder / METRICS
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {STATE}, there is nothing to resume")
    with reading(path, "a training state"):
        state = torch.load(path, map_location="cpu", weights_only=True)
        started, log_bytes, trainer_state = state["fingerprint"], state["log_bytes"], state["trainer"]
    for name, value in fingerprint.items():
        was = started.get(name)
        _require(was == value, f"{name} must be as in the run to resume, {was}", value)
    if metrics.exists() and metrics.stat().st_size > log_bytes:
        os.truncate(metrics, log_bytes)
    return trainer_state


def new_folder(path):
    """Make the folder ``path``; ``OSError`` if it holds anything but files cut while they were written."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    held = sorted(file.name for file in folder.iterdir() if not file.name.endswith(".tmp"))
    if held:
        raise FileExistsError(f"{folder} is not empty, it holds {held[0]}: choose another output folder")
    return folder


@contextlib.contextmanager
def deferred_signals():
    """Collect SIGINT, SIGTERM, SIGHUP in the list this yields; raise the first at the end.

    Those that are ignored stay so; a second Ctrl-C acts at once.
    """
    received, old = [], {}

    def note(number, frame):
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    in_main = threading.current_thread() is threading.main_thread()  # others cannot set handlers
    for name in ("SIGINT", "SIGTERM", "SIGHUP") if in_main else ():
        number = getattr(signal, name, signal.SIGTERM)  # Windows has no SIGHUP
        if signal.getsignal(number) not in (signal.SIG_IGN, note):
            old[number] = signal.signal(number, note) or signal.SIG_DFL
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    if received:
        signal.raise_signal(received[0])


def rank_and_world():
    """(number of this process, number of processes) under torch.distributed; (0, 1) alone."""
    on = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if on else (0, 1)


def check_device(device):
    """``torch.device`` of that name; ``ValueError`` if this machine or this build of torch lacks it."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device {device!r:.100} is not available here: {one_line(error)}") from None
    return torch.device(device)


# --------------------------------------------------------------------------------------------------- 7. files
# Activation rows of any number, read in random order; files written whole; what the Hub has.
# Uses numpy, torch and, to download, huggingface_hub.

BLOCK = 256         # consecutive rows, at most, that are read, and set aside, together
POOL_BYTES = 2**28  # of float32 rows in memory, whose order is mixed


class Rows:
    """Activation rows (n, D), as float32: an array, a tensor, a ``.npy`` file or a folder of them by name.

    float16, float32 or float64, (rows, D) or (docs, positions, D). Files are read block by block, so memory
    does not grow with them. ``ValueError`` for anything else, and for a row that is read and not finite.
    """

    def __init__(self, source):
        paths = [source] if isinstance(source, (str, os.PathLike)) else []
        if paths and os.path.isdir(source):
            paths = sorted(Path(source).glob("*.npy"))
            _require(paths, f"{source} must be a .npy file or a folder of them", "a folder without any")
        parts = [as_rows(array) for array in (map(read_npy, paths) if paths else [source])]
        total, self.d_model = sum(map(len, parts)), parts[0].shape[1]
        for part in parts:
            width = part.shape[1]
            _require(width == self.d_model, f"{name_of(part)} must be {self.d_model} wide", width)
        self.block = min(BLOCK, -(-total // 64))
        self.blocks = [(part, start, min(start + self.block, len(part)))
                       for part in parts for start in range(0, len(part), self.block)]

    def __len__(self):
        return sum(stop - start for _, start, stop in self.blocks)

    n = property(__len__)

    def keep(self, numbers):
        """The rows of the blocks with these numbers, in order."""
        chosen = copy.copy(self)
        chosen.blocks = [self.blocks[number] for number in sorted(numbers)]
        return chosen

    def split_off(self, fraction, seed):
        """Set a random ``fraction`` of the blocks aside, at most 16,384 rows: (the others, those).

        Whole blocks, as the neighbours of a row, of the same text, tell much of it.
        """
        order = np.random.default_rng(seed).permutation(len(self.blocks)).tolist()
        n = min(max(1, round(fraction * len(order))), ASIDE // self.block)
        return self.keep(order[n:]), self.keep(order[:n])

    def sample(self, n, seed):
        """At most ``n`` rows (n, D), up to 16,384, of blocks that depend on ``seed`` alone."""
        return torch.from_numpy(self.split_off(1.0, seed)[1].read()[:n])

    def read(self, memory=None):
        """All rows as an array (n, D), at the start of ``memory`` if that is given."""
        if memory is None:
            memory = np.empty((len(self), self.d_model), np.float32)
        rows, end = memory[: len(self)], 0
        for part, start, stop in self.blocks:
            block, end = rows[end:end + stop - start], end + stop - start
            block[:] = read_part(part, start, stop)
            finite = np.isfinite(block).all(axis=1)
            if not finite.all():
                where = f"row {start + int(finite.argmin())}"
                raise ValueError(f"{name_of(part)} has a NaN or infinite value (as float32) in {where}")
        return rows

    def chunks(self, n=4096):
        """All rows once, in order, as tensors of about ``n`` rows."""
        numbers, per_chunk = range(len(self.blocks)), max(1, n // self.block)
        for place in numbers[::per_chunk]:
            yield torch.from_numpy(self.keep(numbers[place:place + per_chunk]).read())

    def batches(self, batch_size, seed, start=0, rank=0, world=1):
        """Endless batches (batch_size, D) from number ``start`` on; each row once an epoch, in seeded order.

        Blocks are permuted, and the rows of a pool of blocks again: memory is bounded by the pool. Of
        ``world`` processes, ``rank`` reads every ``world``-th block.
        """
        per_pool = max(1, POOL_BYTES // (4 * self.block * self.d_model))
        memory = np.empty((min(per_pool, len(self.blocks)) * self.block, self.d_model), np.float32)
        batch, filled, skip = np.empty((batch_size, self.d_model), np.float32), 0, start * batch_size
        for epoch in itertools.count():
            blocks = np.random.default_rng([seed, epoch]).permutation(len(self.blocks))[rank::world]
            for place in range(0, len(blocks), per_pool):
                pool = self.keep(blocks[place:place + per_pool])
                if skip >= len(pool):
                    skip -= len(pool)
                    continue
                rows = pool.read(memory)
                order, skip = np.random.default_rng([seed, epoch, place]).permutation(len(rows))[skip:], 0
                while len(order):
                    taken, order = np.split(order, [batch_size - filled])
                    free = batch[filled:filled + len(taken)]
                    np.take(rows, taken, axis=0, out=free, mode="clip")  # "raise" would copy once more
                    filled += len(taken)
                    if filled == batch_size:
                        yield torch.from_numpy(batch)
                        batch, filled = np.empty_like(batch), 0


def as_rows(array):
    """An array, a tensor or the map of a file as rows (n, D), checked but for its values."""
    name = name_of(array)
    if isinstance(array, torch.Tensor):
        array = (array.float() if array.dtype == torch.bfloat16 else array).detach().cpu().numpy()
    kind = type(array).__name__
    _require(isinstance(array, np.ndarray), f"{name} must be an array, a tensor or a path", kind)
    sound = array.dtype.kind == "f" and array.dtype.itemsize <= 8 and array.ndim in (2, 3) and array.size > 0
    _require(sound and (array.flags.c_contiguous or array.ndim == 2),
             f"{name} must hold float16, float32 or float64 in C order, of the shape (rows, D) or (docs, "
             "positions, D), none of them 0", f"{array.dtype} {array.shape}")
    whole_file = isinstance(array.base, mmap.mmap) and array.flags.c_contiguous
    return (array if whole_file else np.asarray(array)).reshape(-1, array.shape[-1])


def read_part(rows, start, stop):
    """``rows[start:stop]``, of a file by a plain read: a map takes memory and dies with its file."""
    if not isinstance(rows, np.memmap):
        return rows[start:stop]
    count, offset = (stop - start) * rows.shape[1], start * rows.shape[1] * rows.itemsize
    values = np.fromfile(rows.filename, rows.dtype, count, offset=rows.offset + offset)
    _require(len(values) == count, f"{name_of(rows)} must not shrink while it is read, rows", stop)
    return values.reshape(-1, rows.shape[1])


def name_of(array):
    return str(getattr(array, "filename", None) or "the array")


def prefetch(batches, pin=False, depth=8):
    """The same batches, made up to ``depth`` ahead by a background thread; with ``pin`` in pinned memory."""
    def load():
        batch = next(batches, None)
        return batch.pin_memory() if pin and batch is not None else batch

    with ThreadPoolExecutor(1) as thread:
        ahead = collections.deque(thread.submit(load) for _ in range(depth))
        while (batch := ahead.popleft().result()) is not None:
            ahead.append(thread.submit(load))
            yield batch


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


@contextlib.contextmanager
def atomic(path):
    """Yield a path to write, then fsync and rename it: ``path`` is the old file or the whole new one."""
    temporary = Path(path).with_name(f".{Path(path).name}.tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path} could not be written: {error}") from None
    finally:
        temporary.unlink(missing_ok=True)


def write(path, content):
    """Write bytes or text, and anything else as JSON; a reader sees the old file or the new one."""
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content, indent=2) + "\n"
    with atomic(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def download(repo, names, revision=None, repo_type="model"):
    """Folder of these files of a Hub repository, all of one commit, in huggingface_hub's cache."""
    try:
        from huggingface_hub import snapshot_download
        return Path(snapshot_download(repo, repo_type=repo_type, revision=revision, allow_patterns=names))
    except Exception as error:  # of its own, of its HTTP library, of Xet
        raise OSError(f"{repo} cannot be read from the Hub: {one_line(error)}") from None


# ------------------------------------------------------------------------------------------------- 8. metrics
# Figures of a finished SAE: on rows, spliced into a language model, and against labels.
# Uses the SAE, ``Rows`` and section 10's ``activation_hook``.


@torch.no_grad()
def evaluate(sae, rows, batch_size=4096, on_rows=None):
    """Figures of ``sae`` over all ``rows`` (raw, anything ``Rows`` takes), in one pass.

    ``fvu = sum |x - recon|^2 / sum |x - mean|^2``, ``l0`` active latents per row, ``dead`` share of latents
    that never fire here, ``max_cosine`` mean over latents of the largest with another decoder row, all but
    ``dead`` by prefix too; ``frequencies``: how many latents fire on a share in [edge, next).
    """
    rows = rows if isinstance(rows, Rows) else Rows(rows)
    levels, device, n, done = sae.prefixes, sae.b_dec.device, len(rows), 0
    sizes, error = np.diff(levels, prepend=0).tolist(), np.zeros(len(levels))
    fired = torch.zeros(len(sae.b_enc), dtype=torch.long, device=device)  # rows where each latent is on
    sums, squares = torch.zeros(rows.d_model, dtype=torch.float64), 0.0
    for x in rows.chunks(batch_size):
        x, done = x.to(device), done + len(x)
        acts, recon = sae.encode(x), sae.b_dec
        fired += (acts > 0).sum(dim=0)
        for i, (block, W_dec) in enumerate(zip(acts.split(sizes, dim=1), sae.W_dec.split(sizes))):
            recon = recon + block @ W_dec
            error[i] += float((x - recon).pow(2).sum(dim=1).cpu().double().sum())
        offset = (x - sae.b_dec).cpu().double()  # near the mean, so that the variance does not cancel
        sums += offset.sum(dim=0)
        squares += float(offset.pow(2).sum())
        if on_rows:
            on_rows(done)
    total, share = squares - float(sums.pow(2).sum()) / n, fired.cpu().double() / n
    prefixes = [{"latents": p, "fvu": e / total if total > 0 else math.nan, "l0": float(share[:p].sum()),
                 "max_cosine": max_cosine(sae.W_dec[:p])} for p, e in zip(levels, error.tolist())]
    counts, edges = np.histogram(share[share > 0].log10().numpy(), bins=16, range=(-8, 0))
    return {"rows": n, **prefixes[-1], "dead": float((share == 0).double().mean()), "prefixes": prefixes,
            "frequencies": {"edges": (10.0**edges).tolist(), "counts": counts.tolist()}}


@torch.no_grad()
def max_cosine(W_dec, block=2048):
    """Mean over the rows of ``W_dec`` (F, D) of the largest cosine with any other row; 0 for a single row."""
    rows, total = nn.functional.normalize(W_dec, dim=1), 0.0
    for start in range(0, len(rows) if len(rows) > 1 else 0, block):
        cosine = rows[start:start + block] @ rows.T
        cosine.diagonal(start).fill_(-1.0)
        total += float(cosine.amax(dim=1).sum())
    return total / len(rows)


@torch.no_grad()
def loss_recovered(model, module, sae, batches, at="input", drop=()):
    """Cross-entropy, nats per token, of ``model`` with the stream at ``module`` left, zeroed, coded.

    ``batches`` of token ids (B, T); positions whose id is in ``drop`` keep their stream and are not
    predicted. ``recovered = (zeroed - spliced) / (zeroed - clean)``, by prefix; None where those are equal.
    """
    device, n = next(model.parameters()).device, 0
    through = [lambda x, p=p: sae.decode(sae.encode(x, p)) for p in sae.prefixes]
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
    _require(n > 0, "the batches must have tokens to predict, number of them", n)
    clean, zeroed, *spliced = (sums / n).tolist()
    gap = zeroed - clean
    return {"clean": clean, "zeroed": zeroed, "tokens": n, "prefixes": [
        {"latents": p, "spliced": loss, "recovered": (zeroed - loss) / gap if gap else None}
        for p, loss in zip(sae.prefixes, spliced)]}


@torch.no_grad()
def probe(sae, x, y, seed=0, max_k=5, erased=(1, 2, 5)):
    """How labels ``y`` (n, C), booleans, of rows ``x`` (n, D) are told by few latents; half is held out.

    Accuracy and F1 of logistic regression on the raw rows, ``sparse_probing`` by prefix, ``erase`` by number
    erased. On the CPU. ``ValueError`` where a label lacks rows with or without it.
    """
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = ((x[half].float(), y[half]) for half in (order[: len(x) // 2], order[len(x) // 2:]))
    counts = [labels.sum(0) for _, y in (train, test) for labels in (y, ~y)]
    rarest = torch.stack(counts).amin(dim=0)
    _require((rarest > 0).all(), "each label needs rows with and without it in both halves; not so label",
             int(rarest.argmin()))
    w, b = logistic_regression(*train)
    raw, y = probe_logits(test[0], w, b), train[1]
    share = torch.where(y, 1 / y.sum(0), -1 / (~y).sum(0))
    # (C, F): mean activation on the rows with a label, less that on those without
    difference = sum(part.T @ sae.encode(rows) for rows, part in zip(train[0].split(2048), share.split(2048)))
    scores = probe_scores(raw > 0, test[1])
    return {"rows": len(x), "raw": {name: mean_known(scores[name]) for name in ("accuracy", "f1")},
            "prefixes": [sparse_probing(sae, difference[:, :p], train, test, raw > 0, max_k)
                         for p in sae.prefixes],
            "erasure": [erase(sae, n, difference, test, w, raw) for n in erased if n <= len(sae.b_enc)]}


def logistic_regression(x, y, l2=1e-3, steps=100):
    """One probe per label: ``x`` (n, d), or (C, n, d) of its own, ``y`` (n, C) -> (w (C, d), b (C,)).

    Mean cross-entropy of ``sigmoid(x @ w + b)`` plus ``l2 |w|^2`` on standardised inputs, by LBFGS.
    """
    mean, std = x.mean(dim=-2, keepdim=True), x.std(dim=-2, keepdim=True).clamp_min(1e-12)
    x, target = (x - mean) / std, y.T.float()
    w, b = (torch.zeros(shape, requires_grad=True) for shape in ((len(target), x.shape[-1]), (len(target),)))
    optimizer = torch.optim.LBFGS([w, b], max_iter=steps, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        entropy = nn.functional.binary_cross_entropy_with_logits(probe_logits(x, w, b), target)
        total = entropy * len(target) + l2 * w.pow(2).sum()
        total.backward()
        return total

    with torch.enable_grad():
        optimizer.step(loss)
    w = w.detach() / std.squeeze(-2)
    return w, b.detach() - (w * mean.squeeze(-2)).sum(dim=1)


def probe_logits(x, w, b):
    """``x`` (n, d) or (C, n, d), ``w`` (C, d), ``b`` (C,) -> (C, n)."""
    return (x @ w[:, :, None]).squeeze(2) + b[:, None] if x.dim() == 3 else w @ x.T + b[:, None]


def probe_scores(seen, y):
    """Accuracy, balanced accuracy and F1 of predictions ``seen`` (C, n) of ``y`` (n, C), each (C,)."""
    hit, y = seen & y.T, y.T
    recall, rejected = hit.sum(1) / y.sum(1), (~seen & ~y).sum(1) / (~y).sum(1)
    return {"accuracy": (seen == y).float().mean(1), "balanced": (recall + rejected) / 2,
            "f1": 2 * hit.sum(1) / (seen.sum(1) + y.sum(1))}


def codes_of(sae, rows, latents):
    """Codes of ``rows`` (n, D) by the ``latents`` (C, m): (C, n, m)."""
    return torch.cat([sae.encode(part)[:, latents] for part in rows.split(2048)]).movedim(0, 1)


def mean_known(values):
    """Mean of those that are not NaN, None if there are none."""
    mean = float(values.nanmean())
    return None if math.isnan(mean) else mean


def sparse_probing(sae, difference, train, test, seen, max_k):
    """Figures of the first latents, as many as ``difference`` (C, p) has columns.

    ``probes``: logistic regression on the k latents of largest |difference| (Gurnee et al. 2023, arXiv
    2305.01610). ``absorption``: share of the positives ``seen`` (C, n) by the raw probe on which the latent
    of largest difference is silent. ``splitting``: how many latents raise F1 by more than 0.03 each. Both
    after Chanin et al. 2024, arXiv 2409.14507, who find the main latents by probe weights and demand that an
    absorbing latent be found.
    """
    (x, y), (x_test, y_test), p = train, test, difference.shape[1]
    top = difference.abs().topk(min(max_k, p), dim=1).indices
    codes, codes_test, scores = codes_of(sae, x, top), codes_of(sae, x_test, top), []  # (C, n, max_k)
    for k in range(1, top.shape[1] + 1):
        logits = probe_logits(codes_test[:, :, :k], *logistic_regression(codes[:, :, :k], y))
        scores.append(probe_scores(logits > 0, y_test))
    gains = torch.stack([score["f1"] for score in scores]).diff(dim=0) > 0.03
    positives, main = y_test.T & seen, difference.argmax(dim=1, keepdim=True)
    absorbed = (positives & (codes_of(sae, x_test, main).squeeze(2) == 0)).sum(1) / positives.sum(1)
    probes = [{"k": k, **{name: mean_known(score[name]) for name in ("accuracy", "f1")}}
              for k, score in enumerate(scores, 1)]
    return {"latents": p, "probes": probes, "splitting": mean_known(1.0 + gains.cumprod(dim=0).sum(0)),
            "absorption": mean_known(absorbed),
            "absorption_by_label": [mean_known(rate) for rate in absorbed]}


def erase(sae, n, difference, test, w, raw):
    """Balanced accuracy that raw probes ``w`` (C, D) lose without a label's top ``n`` latents: own, others'.

    Top by difference x (decoder row . probe), the first-order effect. After SAEBench's targeted probe
    perturbation, arXiv 2503.09532, which takes the latents out of the reconstruction, and balances classes.
    """
    (x, y), falls = test, []  # of all probes, for each label erased
    top = (difference * (w @ sae.W_dec.T)).topk(n, dim=1).indices
    before = probe_scores(raw > 0, y)["balanced"]
    for latents, codes in zip(top, codes_of(sae, x, top)):
        left = raw - (codes @ (sae.W_dec[latents] @ w.T)).T
        falls.append(before - probe_scores(left > 0, y)["balanced"])
    total, own = float(torch.stack(falls).sum()), float(torch.stack(falls).trace())
    return {"latents": n, "own": own / len(w), "others": (total - own) / max(1, len(w) * (len(w) - 1))}


# ------------------------------------------------------------------------------------------------- 9. the toy
# Rows whose true features are known, and how well an SAE finds them.
# Uses torch and, for the figures, ``evaluate``.


class FeatureTree:
    """A tree of features, each on only where its parent is: the toy of noanabeshima/matryoshka-saes.

    ``spec``: a node {"active_prob": given that the parent is on, "is_read_out": false for a hidden node,
    "is_binary": false for a magnitude in [0.5, 1.5), "mutually_exclusive_children": true for at most one at a
    time, "children": [nodes], "id"}. Directions are orthogonal, with norms 1 + norm_std N(0, 1).
    ``ValueError`` names the bad node.
    """

    def __init__(self, spec, d_model=None, norm_std=0.05, seed=0):
        self.nodes = []      # (parent, column, low, high, read out, binary), on if low <= column < high
        self.n_columns = 0   # random columns: one a node, one for all children that exclude each other
        self.parent_of = []  # for each feature the feature above it, or None
        self._add("tree", spec, None, None, None, 0.0)
        n, self.d_model = len(self.parent_of), d_model or len(self.parent_of)
        _require(1 <= n <= self.d_model <= 2048,
                 f"d_model must be at least 1, the read-out features {n}, at most 2048", self.d_model)
        _require(0 <= norm_std < 1, "norm_std must lie in [0, 1)", norm_std)
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(self.d_model, self.d_model, generator=generator)).Q
        self.directions = basis[:n] * (1 + norm_std * torch.randn(n, 1, generator=generator))

    def _add(self, path, spec, *place):
        try:
            self._add_node(path, *place, **spec)
        except (TypeError, RecursionError) as error:  # Python's words for an unknown or missing key
            raise ValueError(f"{path}: {one_line(error)}") from None

    def _add_node(self, path, parent, feature, column, low, /, active_prob, is_read_out=True, is_binary=True,
                  mutually_exclusive_children=False, children=(), id=None):
        _require(0 <= active_prob <= 1, f"{path}.active_prob must lie in [0, 1]", active_prob)
        flags = (is_read_out, is_binary, mutually_exclusive_children)
        sound = all(isinstance(flag, bool) for flag in flags)
        _require(sound, f"{path}: its flags must be true or false", flags)
        column, node = self._column() if column is None else column, len(self.nodes)
        self.nodes.append((parent, column, low, low + active_prob, is_read_out, is_binary))
        if is_read_out:
            self.parent_of.append(feature)
            feature = len(self.parent_of) - 1
        shared, low = self._column() if mutually_exclusive_children else None, 0.0
        for i, child in enumerate(children):
            self._add(f"{path}.children[{i}]", child, node, feature, shared, low)
            low += child["active_prob"] if mutually_exclusive_children else 0.0
        _require(low <= 1 + 1e-9, f"{path}.children exclude each other: active_prob may sum to 1", low)

    def _column(self):
        self.n_columns += 1
        return self.n_columns - 1

    @property
    def pairs(self):
        """(parent, child) feature numbers."""
        return [(p, c) for c, p in enumerate(self.parent_of) if p is not None]

    def sample_features(self, n, generator):
        """Feature activations (n, n_features): one uniform draw a node, or a set of exclusive siblings."""
        draws, on, features = torch.rand(self.n_columns, n, generator=generator), [], []
        for parent, column, low, high, *_ in self.nodes:
            node = (draws[column] >= low) & (draws[column] < high)
            on.append(node if parent is None else node & on[parent])
        for node, (*_, read_out, binary) in zip(on, self.nodes):
            if read_out:
                features.append(node.float() if binary else node * (0.5 + torch.rand(n, generator=generator)))
        return torch.stack(features, dim=1)

    def batches(self, batch_size, seed, start=0, rank=0, world=1):
        """Endless rows (batch_size, D) = features @ directions, sampled about 20,000 at a time."""
        generator, per_draw = torch.Generator().manual_seed(seed + rank), max(1, 20_000 // batch_size)
        n = per_draw * batch_size
        draws = (self.sample_features(n, generator) @ self.directions for _ in itertools.count())
        return itertools.islice((batch for rows in draws for batch in rows.split(batch_size)), start, None)

    def sample(self, n, seed):
        """``n`` rows (n, D) that depend on ``seed`` alone."""
        return next(self.batches(n, seed))

    def split_off(self, fraction, seed):
        """Endless rows need no splitting: (itself, itself), for ``train``."""
        return self, self

    def pure_features(self):
        """Activations (n_features, n_features): in row i feature i and its parents are on, nothing else."""
        pure = torch.eye(len(self.parent_of))
        for parent, child in self.pairs:
            pure[child] += pure[parent]
        return pure


def true_cosines(sae, tree):
    """|cosine| of every true direction with every decoder row: (n_features, F)."""
    return (nn.functional.normalize(tree.directions, dim=1) @ sae.W_dec.detach().T).abs()


@torch.no_grad()
def matched_acts(sae, tree, rows):
    """Codes (n, n_features) of ``rows`` by the latents matched to the features, greedily by |cosine|."""
    cosine, codes = true_cosines(sae, tree), sae.encode(rows)
    matched = torch.zeros(len(rows), len(cosine))
    for _ in range(min(cosine.shape)):
        feature, latent = divmod(int(cosine.argmax()), cosine.shape[1])
        matched[:, feature] = codes[:, latent]
        cosine[feature] = cosine[:, latent] = -1.0
    return matched


def toy_figures(sae, tree, seed, n=20_000):
    """Figures on ``n`` fresh toy rows: ``evaluate``'s, and how well the true features are recovered.

    ``clean`` counts best |cosine| >= 0.9; ``absorption``: a child's rows without its parent's latent.
    """
    features = tree.sample_features(n, torch.Generator().manual_seed(seed))
    rows = features @ tree.directions
    cosine, silent = true_cosines(sae, tree).amax(dim=1), (matched_acts(sae, tree, rows) == 0).float()
    figures = evaluate(sae, rows)
    absorption = [{"parent": p, "child": c, "rate": mean_known(silent[features[:, c] > 0, p])}
                  for p, c in tree.pairs]
    return {"fvu": figures["fvu"], "l0": figures["l0"], "features": len(cosine),
            "clean": int((cosine >= 0.9).sum()), "mean_cosine": float(cosine.mean()),
            "min_cosine": float(cosine.min()), "absorption": absorption}


# ---------------------------------------------------------------------------------------- 10. language models
# Where rows come from: TinyModel, a hook for the activations of any module, and their way into a file.
# Uses torch alone; the file and the Hub by section 7.

TINY_MODEL = "noanabeshima/tiny_model", "502a1f2453f61260c937f7807a1270a167faba07"
BEGIN, PAD = 9996, 9998  # token ids: before each text, and after those that are shorter


class TinyModel(nn.Module):
    """The language model noanabeshima/tiny_model, without layer norm: ids (B, T) -> logits (B, T, V).

        x = embed[ids] + pos_embed[:T]
        per block: x += O(attention(Q x, K x, V x));  x += write_out(relu(read_in(x)))

    The stream of layer i enters ``layers[i]``, the last of which is ``lm_head``. The original's forward pass
    returns log-probabilities.
    """

    def __init__(self, n_layers=4, d_model=768, n_heads=16, d_mlp=3072, n_vocab=10_000, n_positions=256):
        super().__init__()
        self.embed = nn.Embedding(n_vocab, d_model)
        self.pos_embed = nn.Parameter(torch.zeros(1, n_positions, d_model))
        self.torso = nn.Sequential(*(_Block(d_model, n_heads, d_mlp) for _ in range(n_layers)))
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
            model = cls(n_layers, d_model, 16, len(state["torso.0.mlp.read_in.bias"]), n_vocab, n_positions)
            model.load_state_dict(state)
        return model.eval()


class _Block(nn.Module):
    def __init__(self, d_model, n_heads, d_mlp):
        super().__init__()
        self.n_heads = n_heads
        self.attn = nn.ModuleDict({name: nn.Linear(d_model, d_model, bias=name == "O") for name in "QKVO"})
        read_in, write_out = nn.Linear(d_model, d_mlp), nn.Linear(d_mlp, d_model)
        self.mlp = nn.ModuleDict({"read_in": read_in, "write_out": write_out})

    def forward(self, x):
        q, k, v = (self.attn[name](x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for name in "QKV")
        heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, heads, T, D/heads)
        x = x + self.attn["O"](heads.transpose(1, 2).flatten(-2))
        return x + self.mlp["write_out"](torch.relu(self.mlp["read_in"](x)))


class _Stop(Exception):
    """Ends a forward pass after the module of interest."""


@contextlib.contextmanager
def activation_hook(module, at="output", replace=None, stop=False):
    """Capture the "input" (first argument) or "output" (first item) of any ``module``, a tensor per call.

    ``replace``: a function of that tensor whose result takes its place. ``stop`` ends the forward pass there.
    """
    _require(at in ("input", "output"), 'at must be "input" or "output"', repr(at))
    captured = []

    def take(x):
        _require(isinstance(x, torch.Tensor),
                 f"the {at} of {type(module).__name__} must be a tensor or start with one", type(x).__name__)
        captured.append(x.detach())
        if stop:
            raise _Stop
        return x if replace is None else replace(x).to(x)

    def on_input(module, args, kwargs):
        if args:
            return (take(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs), None)
        return args, {**kwargs, name: take(kwargs.get(name))}

    def on_output(module, args, kwargs, output):
        return (take(output[0]), *output[1:]) if isinstance(output, tuple) else take(output)

    register = module.register_forward_pre_hook if at == "input" else module.register_forward_hook
    handle = register(on_input if at == "input" else on_output, with_kwargs=True)
    try:
        yield captured
    except _Stop:
        pass
    finally:
        handle.remove()


@torch.no_grad()
def harvest(model, module, batches, out, at="output", drop=(), dtype="float16", max_rows=None, on_rows=None):
    """Write the activations of ``module`` in ``model`` to ``out``, a ``.npy`` (rows, D); return their number.

    ``batches``: token ids (B, T), or dicts of what ``model`` takes by name, with "input_ids". Ids in
    ``drop``, and what an "attention_mask" leaves out, give no row. ``out`` appears when it is whole.
    """
    _require(not model.training, "model must be in evaluation mode, model.eval(): training", model.training)
    _require(dtype in ("float16", "float32"), "dtype must be float16 or float32", dtype)
    n, header = 0, {"descr": np.dtype(dtype).str, "fortran_order": False}
    with atomic(out) as temporary, open(temporary, "wb") as file:  # a map dies on a full disk
        for batch in batches:
            rows = _rows_of(model, module, batch, at, drop)[: None if max_rows is None else max_rows - n]
            rows = rows.to(getattr(torch, dtype))
            _require(rows.isfinite().all(), f"activations must fit in {dtype}", "one too large, or NaN")
            if file.tell() == 0:
                np.lib.format.write_array_header_1_0(file, {**header, "shape": rows.shape})
            file.write(rows.cpu().numpy().data)
            n += len(rows)
            if on_rows:
                on_rows(n)
            if n == max_rows:
                break
        _require(n > 0, "the batches must give at least one row, number of them", n)
        file.seek(0)  # numpy leaves room for the first number to grow
        np.lib.format.write_array_header_1_0(file, {**header, "shape": (n, rows.shape[1])})
    return n


def _rows_of(model, module, batch, at, drop):
    """The activations (n, D) of one batch of ``harvest``."""
    named, device = isinstance(batch, collections.abc.Mapping), next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in (batch.items() if named else [("input_ids", batch)])}
    ids = inputs["input_ids"]
    with activation_hook(module, at, stop=True) as captured:
        model(**inputs) if named else model(ids)
    found = tuple(captured[0].shape) if captured else "no call"
    wanted = tuple(ids.shape)
    _require(found[:-1] == wanted, f"module must give a vector for each of the ids {wanted}", found)
    mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    return captured[0][mask & ~torch.isin(ids, torch.tensor(list(drop), device=device, dtype=ids.dtype))]
