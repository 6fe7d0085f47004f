"""A Matryoshka sparse autoencoder (SAE) in one file: many nested dictionaries trained as one set of latents.

    encode (training)   pre  = relu((x - b_dec) @ W_enc + b_enc);  acts = the round(k B) largest entries of pre
    encode (inference)  acts = pre * (pre > threshold)
    prefix p            recon_p = b_dec + acts[:, :p] @ W_dec[:p]
    nested loss         L = sum_p w_p mean_B |x - recon_p|^2,  sum_p w_p = 1

Every prefix of the latents has to reconstruct alone, so the early latents stay general and are not absorbed by the
specialised ones that follow. One prefix, of all latents, is the plain BatchTopK SAE.

Dimension key: B batch rows, D model width, F latents, P prefixes.

Sources: nested loss, absorption: Bussmann, Nabeshima, Karvonen, Nanda 2025, arXiv 2503.17547. Pareto prefixes and the toy:
noanabeshima/matryoshka-saes. BatchTopK: Bussmann, Leask, Nanda 2024, arXiv 2412.06410. AuxK: Gao et al. 2024, arXiv 2406.04093.

Not included: L1 and gated SAEs, transcoders, crosscoders, learned thresholds per latent.
"""

import collections.abc
import contextlib
import copy
import dataclasses
import functools
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
import typing
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import distributed, nn

# ---------------------------------------------------------------------------------------------------------- 1. settings


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """All settings of one training run. ``ValueError`` names the field, the rule and the value that breaks it.

    The same config and rows give, on one machine and device, the same weights: bit for bit on the CPU.
    """

    n_latents: int
    k: float = 30.0                    # active latents per row, on average over the batch; need not be whole
    prefixes: tuple | None = None      # lengths that end in n_latents, or fractions that end in 1; None: 1/16, 1/8, 1/4, 1/2, 1
    n_prefixes: int | None = None      # instead: sample this many at every step (Pareto)
    pareto_power: float = 0.5          # towards 0 favours short prefixes, 1 is uniform
    level_weights: tuple | None = None  # w_p, one per prefix, scaled to sum 1; None: all equal
    order: str = "stored"              # "energy": prefixes run over the latents sorted by their running mean square
    batch_size: int = 2048             # rows
    steps: int = 10_000
    lr: float | None = None            # Adam's peak rate; None: default_lr(n_latents)
    betas: tuple = (0.9, 0.999)
    warmup_steps: int | None = None    # of linear rise from 0; None: a tenth of the steps, at most 1000
    decay_fraction: float = 0.2        # of the steps, at the end, in which lr falls linearly to 0
    k_start: float | None = None       # k at step 0, moving linearly to k over k_anneal_steps; None: k throughout
    k_anneal_steps: int = 0
    n_latents_start: int | None = None  # spare latents at first: the least energetic go until n_latents are left
    prune_window: tuple = (0.2, 0.6)   # fractions of the steps between which they go
    aux_coef: float = 1 / 32           # weight of the loss that revives dead latents
    dead_after: int = 200_000          # rows without firing that make a latent dead
    clip: float = 1.0                  # largest norm of the whole gradient
    dtype: str | None = None           # of the products: float32, bfloat16, float16 (autocast; weights, threshold and losses stay
    #                                    float32); None: bfloat16 on CUDA, else float32
    seed: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            object.__setattr__(self, field.name, tuple(value) if isinstance(value, list) else value)
            _check_type(field, getattr(self, field.name))
        F, window = self.n_latents, self.prune_window
        for name, ok, rule in (
            ("n_latents", F >= 1, "be at least 1"),
            ("k", 0 < self.k <= F, f"lie in (0, n_latents={F}]"),
            ("k_start", self.k_start is None or 0 < self.k_start <= F, f"lie in (0, n_latents={F}]"),
            ("batch_size", self.batch_size >= 1, "be at least 1"),
            ("k", round(min(self.k, self.k_start or F) * self.batch_size) >= 1,
             f"give at least one active entry in a batch of batch_size={self.batch_size}"),
            ("n_prefixes", self.n_prefixes is None or 1 <= self.n_prefixes <= F, f"lie in [1, n_latents={F}]"),
            ("n_prefixes", self.n_prefixes is None or self.prefixes is None, "not be given together with prefixes"),
            ("pareto_power", 0 < self.pareto_power <= 1, "lie in (0, 1]"),
            ("order", self.order in ("stored", "energy"), 'be "stored" or "energy"'),
            ("steps", self.steps >= 1, "be at least 1"),
            ("lr", self.lr is None or self.lr > 0, "be positive"),
            ("betas", len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas), "be two numbers in [0, 1)"),
            ("warmup_steps", (self.warmup_steps or 0) >= 0, "not be negative"),
            ("decay_fraction", 0 <= self.decay_fraction <= 1, "lie in [0, 1]"),
            ("k_anneal_steps", self.k_anneal_steps >= (self.k_start is not None), "be at least 1 with k_start, else at least 0"),
            ("n_latents_start", (self.n_latents_start or F) >= F, f"be at least n_latents={F}"),
            ("prune_window", len(window) == 2 and 0 <= window[0] < window[1] <= 1, "be two increasing fractions"),
            ("aux_coef", self.aux_coef >= 0, "not be negative"),
            ("dead_after", self.dead_after >= 1, "be at least 1"),
            ("clip", self.clip > 0, "be positive"),
            ("dtype", self.dtype in (None, "float32", "bfloat16", "float16"), "be float32, bfloat16 or float16"),
            ("seed", self.seed >= 0, "not be negative"),
        ):
            _require(ok, f"{name} must {rule}", getattr(self, name))
        n, w = self.n_prefixes or len(self.levels()), self.level_weights
        _require(w is None or len(w) == n and min(w) >= 0 and sum(w) > 0,
                 f"level_weights must be {n} numbers, one per prefix, none negative and not all 0", w)

    @classmethod
    def from_dict(cls, settings):
        """Build a config from JSON-like ``settings``; an unknown key is refused by name."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            _require(name in known, f"settings must be among {', '.join(known)}", repr(name))
        _require("n_latents" in settings, "n_latents, the number of latents, must be given", "none")
        return cls(**settings)

    def vanilla(self):
        """The plain BatchTopK twin: one prefix, of all latents; everything else equal."""
        return dataclasses.replace(self, prefixes=(self.n_latents,), n_prefixes=None, level_weights=None)

    def levels(self):
        """The prefix lengths that describe the finished SAE: those of training, or the default ones where they are sampled."""
        return fixed_prefixes(self.n_latents, self.prefixes)

    def weights(self):
        """Level weights ``w_p``, which sum to 1."""
        given = self.level_weights or (1,) * (self.n_prefixes or len(self.levels()))
        return [w / sum(given) for w in given]

    def lr_at(self, step):
        """Learning rate of step number ``step`` (from 0): linear warm-up, constant, linear decay to 0."""
        warmup = min(self.steps // 10, 1000) if self.warmup_steps is None else self.warmup_steps
        rise = (step + 1) / warmup if step < warmup else 1.0
        fall = (self.steps - step) / max(self.decay_fraction * self.steps, 1.0)
        return (self.lr or default_lr(self.n_latents)) * min(rise, fall, 1.0)

    def k_at(self, step):
        """Active latents per row at step number ``step``."""
        if self.k_start is None or step >= self.k_anneal_steps:
            return self.k
        return self.k_start + (self.k - self.k_start) * step / self.k_anneal_steps

    def latents_at(self, step):
        """Number of latents at step number ``step``, spare ones included."""
        first, last = (fraction * self.steps for fraction in self.prune_window)
        spare = (self.n_latents_start or self.n_latents) - self.n_latents
        return self.n_latents + math.ceil(spare * min(max((last - step) / (last - first), 0.0), 1.0))


def default_lr(n_latents):
    """Adam's peak learning rate, ``min(0.01, 0.24 / sqrt(n_latents))``, after sweeps on real activations (README)."""
    return min(0.01, 0.24 / math.sqrt(n_latents))


def _require(ok, rule, value):
    if not ok:
        raise ValueError(f"{rule}, got {value!s:.300}")


def _one_line(error):
    return f"{' '.join(str(error).split()):.300}"


def _check_type(field, value):
    kinds = typing.get_args(field.type) or (field.type,)
    fits = isinstance(value, kinds) or float in kinds and isinstance(value, int)
    if fits and not isinstance(value, (str, type(None))):
        numbers = value if isinstance(value, tuple) else (value,)
        fits = all(isinstance(v, (int, float)) and not isinstance(v, bool) and abs(v) < 2**63 for v in numbers)
    names = {int: "a whole number", float: "a number", str: "a string", tuple: "a list of numbers", type(None): "null"}
    _require(fits, f"{field.name} must be {' or '.join(names[kind] for kind in kinds)}, numbers below 2^63", repr(value))


# ---------------------------------------------------------------------------------------------------------- 2. prefixes

FRACTIONS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)


def fixed_prefixes(n_latents, prefixes=None):
    """Increasing prefix lengths that end in ``n_latents``.

    ``prefixes``: such lengths, or fractions of ``n_latents`` that end in 1 (rounded, duplicates dropped); None means
    1/16, 1/8, 1/4, 1/2, 1, the widths of Bussmann et al.'s code. ``ValueError`` if they do not increase or end elsewhere.
    """
    given = FRACTIONS if prefixes is None else tuple(prefixes)
    increasing = len(given) > 0 and given[0] > 0 and all(a < b for a, b in zip(given, given[1:]))
    lengths = increasing and given[-1] == n_latents and all(p == int(p) for p in given)
    _require(increasing and (lengths or given[-1] == 1),
             f"prefixes must increase and end in n_latents={n_latents} (or, as fractions, in 1)", list(given))
    return tuple(int(p) for p in given) if lengths else tuple(sorted({max(1, round(p * n_latents)) for p in given}))


def sample_prefixes(n_latents, n_prefixes, power=0.5, generator=None):
    """``n_prefixes`` increasing lengths: ``n_latents`` and draws without replacement with ``P(L) ~ L^power - (L-1)^power``.

    ``L`` runs over 1..n_latents-1. ``power`` 1 is uniform, towards 0 favours short prefixes (the comment in the original
    code, noanabeshima/matryoshka-saes, has the direction inverted).
    """
    if n_prefixes == 1:
        return (n_latents,)
    drawn = torch.multinomial(_pareto_weights(n_latents, power), n_prefixes - 1, generator=generator) + 1
    return (*sorted(drawn.tolist()), n_latents)


@functools.lru_cache(maxsize=4)
def _pareto_weights(n_latents, power):
    powers = torch.arange(n_latents, dtype=torch.float64) ** power
    return powers.diff()


# --------------------------------------------------------------------------------------------------------- 3. selection


def batch_topk(pre, n, floor=0.0):
    """Positions of the ``n`` largest positive entries of ``pre`` (B, F), as increasing row-major indices (at most n,).

    Exact for every ``floor``: only entries above it are searched, all positive ones when too few lie above. Of equal
    entries at the cut, those that come first in row-major order are kept.
    """
    flat = pre.detach().flatten()
    index = (flat > floor).nonzero().squeeze(1)
    if len(index) < n and floor > 0:
        index = (flat > 0).nonzero().squeeze(1)
    return index[largest(flat[index], n)]


def largest(values, n):
    """Increasing positions of the ``n`` largest ``values`` (m,), or of all where they are fewer; of equals the first."""
    if len(values) <= n:
        return torch.arange(len(values), device=values.device)
    if values.device.type == "cpu":  # 0.3 ms for 75,000 values; torch's topk 6
        cut = float(np.partition(values.float().numpy(), -n)[-n])
    else:
        cut = values.topk(n).values[-1]
    keep = values > cut
    ties = (values == cut).nonzero().squeeze(1)
    keep[ties[: n - int(keep.sum())]] = True
    return keep.nonzero().squeeze(1)


CACHED = 1 << 19  # numbers in the blocks that the sparse step works on, 2 MiB: their next use finds them in the cache


def sparse_topk(x, W_enc, b_enc, n, floor=0.0):
    """``batch_topk`` of ``pre = relu(x @ W_enc + b_enc)`` that never holds all of ``pre``: (values (n,), indices (n,)).

    Exact for every ``floor``: when fewer than ``n`` entries lie above it, the search starts again lower, at 0.7 of the cut
    among a few of the rows, and at last from 0.
    """
    values, index = entries_above(floor, x, W_enc, b_enc) if floor > 0 else (b_enc[:0], None)
    if len(values) < n:
        some = torch.addmm(b_enc, x[:: max(1, len(x) // 64)], W_enc).flatten()
        floor = 0.7 * float(some.topk(max(1, round(n / len(x) / W_enc.shape[1] * len(some)))).values[-1])
        values, index = entries_above(max(floor, 0.0), x, W_enc, b_enc)
    if len(values) < n and floor > 0:
        values, index = entries_above(0.0, x, W_enc, b_enc)
    keep = largest(values, n)
    return values[keep], index[keep]


def entries_above(floor, x, W_enc, b_enc):
    """Values and increasing row-major indices of the entries of ``x @ W_enc + b_enc`` above ``floor``.

    The only dense B x D x F product of a sparse step, a few latents at a time: their block is searched while in the cache.
    """
    (B, _), F, parts = x.shape, len(b_enc), []
    width = max(1, 4 * CACHED // B)
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
    """Stable argsort of whole numbers in [0, end): for 16 bits numpy sorts by radix, 0.5 ms for 61,000 keys; torch 2.5 ms."""
    return np.argsort(keys.astype(np.uint16 if end <= 1 << 16 else np.int64), kind="stable")


# ------------------------------------------------------------------------------------------------------- 4. autoencoder


class MatryoshkaSAE(nn.Module):
    """Sparse autoencoder whose every prefix of latents is an autoencoder too.

        acts  = pre * (pre > threshold),  pre = relu((x - b_dec) @ W_enc + b_enc)      (..., D) -> (..., F)
        recon = acts @ W_dec + b_dec                                                   (..., F) -> (..., D)

    Parameters ``W_enc (D, F)``, ``b_enc (F,)``, ``W_dec (F, D)`` with unit rows, ``b_dec (D,)``; buffer ``threshold``, a
    float32 scalar >= 0. Starts with random unit decoder rows and ``W_enc = W_dec.T``. ``prefixes``: the lengths to
    evaluate, increasing, the last is F. ``metadata``: what the checkpoint says about its training.
    """

    def __init__(self, d_model, n_latents, prefixes=None, generator=None):
        super().__init__()
        W_dec = torch.randn(n_latents, d_model, generator=generator)
        W_dec /= W_dec.norm(dim=1, keepdim=True)
        self.W_enc = nn.Parameter(W_dec.T.clone())
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("threshold", torch.tensor(0.0))
        self.prefixes = fixed_prefixes(n_latents, prefixes)
        self.metadata = {}

    def pre_acts(self, x, prefix=None):
        """``relu((x - b_dec) @ W_enc + b_enc)`` of the first ``prefix`` latents (default all): (..., D) -> (..., prefix)."""
        _require(x.shape[-1:] == self.b_dec.shape, f"the last dimension of x must be the model width {len(self.b_dec)}", tuple(x.shape))
        return torch.relu((x.to(self.b_dec.dtype) - self.b_dec) @ self.W_enc[:, :prefix] + self.b_enc[:prefix])

    def encode(self, x, prefix=None):
        """Codes of raw activations ``x``: (..., D) -> (..., F), or (..., prefix) of the SAE that the first latents are."""
        _require(prefix is None or 1 <= prefix <= len(self.b_enc), f"prefix must lie in [1, {len(self.b_enc)}]", prefix)
        pre = self.pre_acts(x, prefix)
        return pre * (pre > self.threshold)

    def decode(self, acts):
        """Reconstruction by the latents given, all or a prefix: (..., p) -> (..., D) for any p <= F."""
        return acts @ self.W_dec[: acts.shape[-1]] + self.b_dec

    def forward(self, x):
        return self.decode(self.encode(x))

    def save(self, folder):
        """Write ``sae_weights.safetensors`` and ``cfg.json`` into ``folder``, as SAELens 6 loads them (``load_from_disk``)."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        cfg = {"architecture": "jumprelu", "d_in": len(self.b_dec), "d_sae": len(self.b_enc), "dtype": "float32", "device": "cpu",
               **SAELENS, "metadata": {"sae_lens_version": "6.0.0", "prefixes": list(self.prefixes), **self.metadata}}
        write(folder / WEIGHTS, save({**self._tensors(), "threshold": self.threshold.float().cpu().repeat(len(self.b_enc))}))
        write(folder / CONFIG, cfg)

    def to_dictionary_learning(self, folder):
        """Write ``ae.pt`` and ``config.json``, as dictionary_learning 0.1 (``load_dictionary``) and ``load`` read them.

        k is rounded, and 1 where it is unknown.
        """
        folder, k, sizes = Path(folder), max(1, round(self.metadata.get("k") or 1)), np.diff(self.prefixes, prepend=0).tolist()
        folder.mkdir(parents=True, exist_ok=True)
        more = {"threshold": self.threshold.float().cpu(), "k": torch.tensor(k, dtype=torch.int32), "group_sizes": torch.tensor(sizes)}
        trainer = {"dict_class": DICT_CLASS, "activation_dim": len(self.b_dec), "dict_size": len(self.b_enc), "k": k,
                   "group_sizes": sizes, "lm_name": self.metadata.get("model_name"), "submodule_name": self.metadata.get("hook_name")}
        with atomic(folder / AE) as path:
            torch.save({**self._tensors(), **more}, path)
        write(folder / "config.json", {"trainer": trainer})

    def _tensors(self):
        return {name: p.detach().float().cpu().contiguous() for name, p in self.named_parameters()}

    def for_saebench(self, model_name=None, hook_name=None):
        """This SAE with the ``cfg`` that SAEBench's evals read of a custom SAE (``custom_saes/base_sae.py`` there).

        Names default to the checkpoint's; the layer is the first number in ``hook_name``. ``ValueError`` if they are unknown.
        """
        model_name, hook_name = model_name or self.metadata.get("model_name"), hook_name or self.metadata.get("hook_name") or ""
        layer = re.search(r"\d+", hook_name)
        _require(model_name and layer, "model_name and a hook_name with a layer must be given", (model_name, hook_name))
        fields = {"model_name": model_name, "d_in": len(self.b_dec), "d_sae": len(self.b_enc), "hook_name": hook_name,
                  "hook_layer": int(layer[0]), "dtype": str(self.dtype).split(".")[1], "device": str(self.device),
                  "architecture": "matryoshka_batch_topk", "prepend_bos": True, "normalize_activations": "none", "seqpos_slice": (None,),
                  "apply_b_dec_to_input": True, "activation_fn_str": "relu", "activation_fn_kwargs": {}, "model_from_pretrained_kwargs": {},
                  "dataset_path": "", "dataset_trust_remote_code": False, "training_tokens": -1, **dict.fromkeys(
                      ("context_size", "hook_head_index", "finetuning_scaling_factor", "sae_lens_training_version", "neuronpedia_id"))}
        self.cfg = dataclasses.make_dataclass("SAEBenchConfig", fields)(**fields)  # a dataclass: the evals call asdict
        return self

    device = property(lambda self: self.b_dec.device)
    dtype = property(lambda self: self.b_dec.dtype)

    @classmethod
    def load(cls, source, device="cpu", revision=None, prefix=None):
        """Read a checkpoint of ``save``, ``to_dictionary_learning``, SAELens or dictionary_learning.

        ``source``: a folder, or where there is no such folder and it is a string "user/name", that repository on the Hub, at
        ``revision`` (branch, tag, commit). ``prefix``: keep only the first latents. ``ValueError`` names what is missing, misshapen,
        foreign or not finite; ``OSError`` what cannot be read. Nothing is unpickled but tensors, and from the Hub nothing at all.
        """
        tensors, cfg, path = read_checkpoint(hub_folder(source, revision))
        D, F, metadata = cfg.get("d_in"), cfg.get("d_sae"), cfg.get("metadata") or {}
        _require(all(isinstance(n, int) and n > 0 for n in (D, F)), f"d_in and d_sae beside {path} must be whole numbers above 0", (D, F))
        prefixes = metadata.get("prefixes") if isinstance(metadata, dict) else 0
        _require(prefixes is None or isinstance(prefixes, list) and all(isinstance(p, int) for p in prefixes),
                 f"metadata beside {path} must be an object whose prefixes are whole numbers", repr(metadata))
        shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), "threshold": (F,)}
        check_tensors(tensors, {name: f"float32 {shape}" for name, shape in shapes.items()}, path)
        threshold = tensors["threshold"].clamp(min=0)  # dictionary_learning's -1 before the first batch lets all positive entries pass
        _require(bool((threshold == threshold[0]).all()), f"threshold in {path} must be one number, repeated", "several")
        _require(prefix is None or 1 <= prefix <= F, f"prefix must lie in [1, {F}]", prefix)
        p = prefix or F
        sae = cls(D, p, [*(n for n in fixed_prefixes(F, prefixes) if n < p), p])
        sae.load_state_dict({"W_enc": tensors["W_enc"][:, :p], "b_enc": tensors["b_enc"][:p], "W_dec": tensors["W_dec"][:p],
                             "b_dec": tensors["b_dec"], "threshold": threshold[0]})
        left_out = ("sae_lens_version", "prefixes", "k" if p < F else None)  # k is that of all latents
        sae.metadata = {name: value for name, value in metadata.items() if name not in left_out}
        return sae.to(device)


# --------------------------------------------------------------------------------------------------------------- 5. loss


def nested_loss(x, acts, W_dec, b_dec, prefixes, weights=None):
    """Nested reconstruction loss: ``sum_p w_p mean_B |x - b_dec - acts[:, :p] @ W_dec[:p]|^2``.

    ``x (B, D)``, ``acts (B, F)``, ``W_dec (F, D)``, ``b_dec (D,)`` -> scalar. ``weights`` default to 1/P each.
    Each block of latents between two prefixes is decoded once. Learning rates do not transfer from the peers:
    dictionary_learning weighs each term 1/P^2, SAELens 1, bartbussmann adds a level of ``b_dec`` alone.
    """
    weights = weights or [1 / len(prefixes)] * len(prefixes)
    recon, loss, start = b_dec, 0.0, 0
    for end, weight in zip(prefixes, weights):
        recon = recon + acts[:, start:end] @ W_dec[start:end]
        loss = loss + weight * (x - recon).pow(2).sum(dim=1).mean()
        start = end
    return loss


def sparse_loss(x, values, latent, ends, W_dec, weights, G):
    """``nested_loss`` of sparse codes, with its gradients in closed form: (loss, d_values (n,)), and in ``G`` (B, P, D).

    ``x`` (B, D) is centred, without ``b_dec``. Row ``b`` has in the block of latents between the prefixes ``p - 1`` and
    ``p`` the ``values`` of the ``latent`` from ``ends[b P + p]`` to ``ends[b P + p + 1]``, which decode to ``R_p``; the
    first block takes ``-x`` in. The residual of prefix ``p`` is ``sum_{i <= p} R_i``, so the loss is a quadratic form:

        L = 1/2 sum_b sum_ij K_ij <R_i, R_j>,  K_ij = 2/B sum_{p >= max(i, j)} w_p

    Hence ``dL/dR = G = K R`` and ``d_values = <G_j, W_dec>``. ``embedding_bag`` is a product of a sparse and a dense
    matrix here, on a CPU twice as fast as ``torch.sparse`` has it.
    """
    (B, D), P = x.shape, len(weights)
    rest = torch.tensor([2 / B * sum(weights[j:]) for j in range(P)])
    K = torch.minimum(rest, rest[:, None])
    size = max(1, CACHED // (P * D))
    for start in range(0, B, size):
        end = min(start + size, B)
        R = bags(values, latent, ends[start * P:end * P + 1], W_dec).view(-1, P, D)
        R[:, 0] -= x[start:end]
        torch.matmul(K, R, out=G[start:end])
    with warnings.catch_warnings():  # torch calls its CSR support beta, once per process
        warnings.simplefilter("ignore")
        entries = torch.sparse_csr_tensor(ends.int(), latent.int(), torch.zeros_like(values), (B * P, len(W_dec)), check_invariants=False)
    d_values = torch.sparse.sampled_addmm(entries, G.flatten(0, 1), W_dec.T).values()
    return (values @ d_values - (G[:, 0] * x).sum()) / 2, d_values


def bags(values, index, ends, rows):
    """Sums ``sum_i values[i] * rows[index[i]]``, one for each ``ends[j] <= i < ends[j + 1]``: (len(ends) - 1, D)."""
    part = slice(int(ends[0]), int(ends[-1]))
    return nn.functional.embedding_bag(index[part], rows, ends[:-1] - ends[0], mode="sum", per_sample_weights=values[part])


def write_gradients(sae, x, values, d_values, cell, latent, G):
    """The gradients of all parameters, into their ``grad``, whose memory is kept: sums over the active entries.

    ``dW_dec = A_j.T @ G_j`` for the latents of block ``j``, ``dW_enc = x.T @ dA``, ``db_enc`` the column sums of ``dA``,
    ``db_dec = sum_B G_1 - W_enc @ db_enc``. ``x`` is centred; ``cell``: ``b P + j`` of each entry.
    """
    (_, P, D), F = G.shape, len(sae.W_dec)
    for parameter in sae.parameters():
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
    order = torch.from_numpy(stable_order(latent.numpy(), F))
    ends = nn.functional.pad(torch.bincount(latent, minlength=F).cumsum(0), (1, 0))
    values, by_latent, cell = values[order], d_values[order], cell[order]
    row = cell // P
    size = max(1, CACHED // D)
    for start in range(0, F, size):
        end = min(start + size, F)
        sae.W_dec.grad[start:end] = bags(values, cell, ends[start:end + 1], G.flatten(0, 1))
        sae.W_enc.grad.T[start:end] = bags(by_latent, row, ends[start:end + 1], x)
    sae.b_enc.grad.zero_().index_add_(0, latent, d_values)
    torch.sub(G[:, 0].sum(dim=0), sae.W_enc @ sae.b_enc.grad, out=sae.b_dec.grad)


def aux_loss(sae, x, residual, dead):
    """AuxK: how badly the dead latents reconstruct ``residual`` (B, D), which carries no gradient: (scalar, about 1).

    ``mean |residual - a @ W_dec[dead]|^2 / mean |residual - mean|^2``, where ``a`` keeps per row the ``min(D / 2, n_dead)``
    largest of ``relu(pre)`` among the latents ``dead`` (indices). b_dec takes no part. Gao et al. 2024, section A.2.
    """
    residual = residual.detach().float()
    pre = torch.relu((x - sae.b_dec.detach()) @ sae.W_enc[:, dead] + sae.b_enc[dead])
    values, index = pre.topk(min(x.shape[1] // 2 or 1, len(dead)), dim=1)
    recon = torch.zeros_like(pre).scatter(1, index, values) @ sae.W_dec[dead]
    spread = (residual - residual.mean(dim=0)).pow(2).sum(dim=1).mean()
    return (residual - recon).pow(2).sum(dim=1).mean() / spread.clamp_min(1e-12)


# ----------------------------------------------------------------------------------------------------------- 6. training


class Trainer:
    """One SAE in training: ``step(x)`` is one optimizer step on raw rows ``x`` (B, D); ``export()`` is the SAE to keep.

    ``trainer.sae`` sees ``x / scale``; ``train`` gives the root mean squared distance of the rows from their mean. ``b_dec``
    starts at ``mean / scale``. So a common mean, however large, neither silences latents nor shrinks what is to be learned.
    """

    def __init__(self, cfg, d_model, device="cpu", mean=None, scale=1.0):
        self.cfg, self.scale, self.device = cfg, float(scale), torch.device(device)
        self.dtype = cfg.dtype or ("bfloat16" if self.device.type == "cuda" else "float32")
        self.sae = MatryoshkaSAE(d_model, cfg.latents_at(0), None, torch.Generator().manual_seed(cfg.seed)).to(self.device)
        if mean is not None:
            self.sae.b_dec.data.copy_(mean / self.scale)
        fused = self.device.type in ("cpu", "cuda")
        eps = 1.5e-5 * cfg.k / cfg.n_latents  # near a rare latent's gradient, which Adam would otherwise blow up to full steps
        self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=0.0, betas=cfg.betas, eps=eps, fused=fused)
        for name, parameter in self.sae.named_parameters():
            like = parameter.data.T if name == "W_enc" else parameter.data  # as the optimizer sees it
            self.optimizer.state[parameter] = {"step": torch.zeros((), device=self.device if fused else "cpu"),
                                               "exp_avg": torch.zeros_like(like), "exp_avg_sq": torch.zeros_like(like)}
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == "float16")
        # Sparse against dense step on 2 CPU cores: 99 against 415 ms at F 3072, D 768, B 2048; 2.9 against 3.8 ms on the toy.
        self.sparse = self.device.type == "cpu" and self.dtype == "float32" and torch.backends.mkl.is_available()
        self.world = process_place()[1]
        self.steps_done = 0
        self.rows_silent = torch.zeros_like(self.sae.b_enc.data, dtype=torch.long)  # since each latent fired
        self.energy = torch.zeros_like(self.sae.b_enc.data)                         # running mean of acts^2
        self.cut = 0.0      # smallest active value of the last step: where the next search starts, which no result depends on
        self.buffer = None  # of the sparse step, kept as fresh memory is slow

    def autocast(self):
        """Autocast to the configured dtype; without effect for float32."""
        return torch.autocast(self.device.type, getattr(torch, self.dtype), enabled=self.dtype != "float32")

    def step(self, x):
        """Take one optimizer step on raw rows ``x`` (B, D); return the loss, a scalar on the device."""
        _require(x.shape[1:] == self.sae.b_dec.shape, f"rows must have the shape (B, {len(self.sae.b_dec)})", tuple(x.shape))
        x = x.to(self.device, torch.float32, non_blocking=True) / self.scale
        values, index, loss = self.sparse_step(x) if self.sparse else self.dense_step(x)
        dead = (self.rows_silent >= self.cfg.dead_after).nonzero().squeeze(1)
        if len(dead) and self.cfg.aux_coef:
            loss = loss + self.revive(x, values, index, dead)
        seen = self.observe(values, index, loss, len(x))
        if self.world > 1:  # before anything changes, so that a process lost here leaves the step undone
            average(seen, *(parameter.grad for parameter in self.sae.parameters()))
        self.optimize()
        self.track(seen, len(x) * self.world)
        if (n := self.cfg.latents_at(self.steps_done)) < len(self.energy):
            self.prune(n)
        return seen[-1]

    @torch.no_grad()
    def sparse_step(self, x):
        """Write the gradients of the nested loss: (active values (n,), their row-major positions (n,), loss)."""
        sae, (n, floor), order, F = self.sae, self.selection(x), self.prefix_order(), len(self.energy)
        x, prefixes, weights = x - sae.b_dec, self.step_prefixes(), self.cfg.weights()
        values, index = sparse_topk(x, sae.W_enc, sae.b_enc, n, floor)
        latent, key = index % F, index
        if order is not None:  # within each row, by position
            key, by_key = (index - latent + order.argsort()[latent]).sort()
            values, index, latent = values[by_key], index[by_key], latent[by_key]
        block_ends = (torch.arange(0, len(x) * F, F)[:, None] + torch.tensor(prefixes)).flatten()
        ends = nn.functional.pad(torch.searchsorted(key, block_ends), (1, 0))
        cell = torch.repeat_interleave(torch.arange(len(block_ends)), ends.diff())
        if self.buffer is None or self.buffer.shape != (len(x), len(prefixes), x.shape[1]):
            self.buffer = x.new_empty(len(x), len(prefixes), x.shape[1])
        loss, d_values = sparse_loss(x, values, latent, ends, sae.W_dec, weights, self.buffer)
        write_gradients(sae, x, values, d_values, cell, latent, self.buffer)
        return values, index, loss

    def dense_step(self, x):
        """The same by autograd of the literal formula."""
        sae, order = self.sae, self.prefix_order()
        self.optimizer.zero_grad()
        with self.autocast():
            pre = sae.pre_acts(x)
            index = batch_topk(pre, *self.selection(x))
            kept = torch.zeros_like(pre).view(-1).index_fill_(0, index, 1.0).view_as(pre)
            acts = pre * kept
            acts_in_order, W_dec = (acts, sae.W_dec) if order is None else (acts[:, order], sae.W_dec[order])
            loss = nested_loss(x, acts_in_order, W_dec, sae.b_dec, self.step_prefixes(), self.cfg.weights())
        self.scaler.scale(loss).backward()
        return acts.detach().view(-1)[index], index, loss.detach()

    def revive(self, x, values, index, dead):
        """Add the gradients of AuxK on the latents ``dead`` (indices); return its part of the loss."""
        F = len(self.energy)
        ends = torch.searchsorted(index // F, torch.arange(len(x) + 1, device=index.device))
        residual = x - self.sae.b_dec.detach() - bags(values.float(), index % F, ends, self.sae.W_dec.detach())
        with self.autocast():
            loss = self.cfg.aux_coef * aux_loss(self.sae, x, residual, dead)
        self.scaler.scale(loss).backward()
        return loss.detach()

    def step_prefixes(self):
        """This step's prefix lengths: the fixed ones, or a fresh Pareto draw. The last takes in the spare latents."""
        cfg, levels = self.cfg, self.cfg.levels()
        if cfg.n_prefixes is not None:
            seed = np.random.SeedSequence((cfg.seed, self.steps_done)).generate_state(1)[0]  # a resumed run draws the same
            levels = sample_prefixes(cfg.n_latents, cfg.n_prefixes, cfg.pareto_power, torch.Generator().manual_seed(int(seed)))
        return (*levels[:-1], len(self.energy))

    def selection(self, x):
        """(number of entries to keep at this step's k, floor under which the search need not look)."""
        return max(1, round(self.cfg.k_at(self.steps_done) * len(x))), 0.9 * float(self.cut)

    @torch.no_grad()
    def prune(self, n):
        """Keep the ``n`` most energetic latents, with their optimizer state.

        With exactly as many latents as features, one may settle on a job of little worth while a feature stays without,
        as in k-means. Starting with too many and dropping the least energetic ones leaves each feature its own.
        """
        keep, sae = self.energy.topk(n).indices.sort().values, self.sae
        self.rows_silent, self.energy = self.rows_silent[keep], self.energy[keep]
        transpose_(sae.W_enc)
        for parameter in (sae.W_enc, sae.b_enc, sae.W_dec):
            state, grad, parameter.grad = self.optimizer.state[parameter], parameter.grad, None
            parameter.data = parameter.data[keep]
            parameter.grad = None if grad is None else grad[keep]
            state.update({name: state[name][keep] for name in ("exp_avg", "exp_avg_sq")})
        transpose_(sae.W_enc)

    def prefix_order(self):
        """Index map from prefix position to latent (F,), or None when prefixes run over the latents as stored."""
        return self.energy.argsort(descending=True, stable=True) if self.cfg.order == "energy" else None

    @torch.no_grad()
    def optimize(self):
        """Clip, Adam; decoder rows lose the gradient along themselves before and are unit again after."""
        W_dec, size = self.sae.W_dec, max(1, CACHED // self.sae.W_dec.shape[1])
        self.scaler.unscale_(self.optimizer)
        for grad, w in zip(W_dec.grad.split(size), W_dec.split(size)):
            grad.addcmul_((grad * w).sum(dim=1, keepdim=True), w, value=-1)
        grads = [parameter.grad for parameter in self.sae.parameters()]
        shrink = (self.cfg.clip / nn.utils.get_total_norm(grads)).clamp(max=1.0)
        if self.device.type != "cpu" or shrink < 1:  # a pass over all gradients, saved on the CPU
            torch._foreach_mul_(grads, shrink)
        self.optimizer.param_groups[0]["lr"] = self.cfg.lr_at(self.steps_done)
        transpose_(self.sae.W_enc)  # to (F, D), as it is stored: of any other order fused Adam copies the gradient, 3 of 105 ms
        self.scaler.step(self.optimizer)
        transpose_(self.sae.W_enc)
        self.scaler.update()
        W_dec /= W_dec.norm(dim=1, keepdim=True)

    @torch.no_grad()
    def observe(self, values, index, loss, rows):
        """What is learned without gradients, in one tensor: per latent its share of active rows and mean square; cut and loss."""
        per_latent = torch.zeros(2, len(self.energy), device=self.device)
        values = values.float()
        per_latent.index_add_(1, index % len(self.energy), torch.stack([torch.ones_like(values), values.square()])).div_(rows)
        cut = values.min() if len(values) else values.new_zeros(())
        return torch.cat([per_latent.flatten(), torch.stack([cut, loss.float()])])

    @torch.no_grad()
    def track(self, seen, rows):
        """Update threshold, silent rows and energy by what ``observe`` saw in ``rows`` rows."""
        first, (active, energy), self.cut = self.steps_done == 0, seen[:-2].view(2, -1), seen[-2]
        self.sae.threshold.lerp_(self.cut, 1.0 if first else 0.01)
        self.rows_silent.add_(rows).masked_fill_(active > 0, 0)
        self.energy.lerp_(energy, 1.0 if first else 0.05)
        self.steps_done += 1

    @torch.no_grad()
    def measure(self, x):
        """{"fvu", "l0", "dead", "threshold"} on raw rows ``x``, at the running threshold, spare latents included."""
        x = x.to(self.device, torch.float32) / self.scale
        acts = self.sae.encode(x)
        error, total = (x - self.sae.decode(acts)).pow(2).sum(), (x - x.mean(dim=0)).pow(2).sum()
        return {"fvu": float(error / total), "l0": float((acts > 0).sum() / len(x)),
                "dead": float((self.rows_silent >= self.cfg.dead_after).float().mean()),
                "threshold": float(self.sae.threshold) * self.scale}

    @torch.no_grad()
    def export(self):
        """A copy for raw activations: scale folded into ``b_enc``, ``b_dec``, ``threshold``, latents laid out in prefix order.

        Spare latents that are still in training are left out, so that every checkpoint has the shape of the last one.
        """
        keep = self.energy.argsort(descending=True, stable=True)[: self.cfg.n_latents]
        keep = keep.sort().values if self.cfg.order == "stored" else keep
        sae = MatryoshkaSAE(len(self.sae.b_dec), self.cfg.n_latents, self.cfg.levels()).to(self.device)
        sae.W_enc.copy_(self.sae.W_enc[:, keep])
        sae.b_enc.copy_(self.sae.b_enc[keep] * self.scale)
        sae.W_dec.copy_(self.sae.W_dec[keep])
        sae.b_dec.copy_(self.sae.b_dec * self.scale)
        sae.threshold.copy_(self.sae.threshold * self.scale)
        sae.metadata = {"k": self.cfg.k, "training": dataclasses.asdict(self.cfg)}
        return sae

    @torch.no_grad()
    def start_from(self, sae):
        """Take over the weights of a saved SAE, with unit decoder rows: the inverse of ``export``.

        ``ValueError`` for another shape or a decoder row of zeros.
        """
        shape, needed = tuple(sae.W_dec.shape), tuple(self.sae.W_dec.shape)
        _require(shape == needed, f"the SAE to start from must have W_dec (latents with spare ones, width) {needed}", shape)
        norm = sae.W_dec.norm(dim=1)
        _require(bool((norm > 0).all()), "decoder rows of the SAE to start from must not be zero, number of the first", int(norm.argmin()))
        self.sae.W_enc.copy_(sae.W_enc * norm)
        self.sae.b_enc.copy_(sae.b_enc * norm / self.scale)
        self.sae.W_dec.copy_(sae.W_dec / norm[:, None])
        self.sae.b_dec.copy_(sae.b_dec / self.scale)

    def state_dict(self):
        """All that the next steps depend on beside the config and the rows: a flat dict of tensors."""
        state = {"threshold": self.sae.threshold, "rows_silent": self.rows_silent, "energy": self.energy,
                 "steps_done": torch.tensor(self.steps_done), "scale": torch.tensor(self.scale, dtype=torch.float64)}
        for name, parameter in self.sae.named_parameters():
            state[name] = parameter.detach()
            state.update({f"{name}.{key}": value for key, value in self.optimizer.state[parameter].items()})
        state.update({f"scaler.{name}": torch.tensor(value) for name, value in self.scaler.state_dict().items()})
        return {name: tensor.cpu().contiguous() for name, tensor in state.items()}

    def load_state_dict(self, state):
        """Go on from ``state``, bit for bit on the CPU; ``ValueError`` names a tensor in it that is missing, misshapen or not finite."""
        done, last = state.get("steps_done", torch.tensor([])), self.cfg.steps
        _require(dtype_and_shape(done) == "int64 ()" and 0 <= done <= last,
                 f"steps_done in {STATE} must be one whole number in [0, {last}]", done)
        self.prune(self.cfg.latents_at(int(done)))
        check_tensors(state, {name: dtype_and_shape(tensor) for name, tensor in self.state_dict().items()}, STATE)
        _require(state["scale"] > 0, f"scale in {STATE} must be positive", float(state["scale"]))
        for name, parameter in self.sae.named_parameters():
            value, moments = state[name].to(self.device), self.optimizer.state[parameter]
            parameter.data = value.T.contiguous().T if name == "W_enc" else value  # stored as its transpose, as at the start
            moments.update({key: state[f"{name}.{key}"].to(moment.device) for key, moment in moments.items()})
        self.sae.threshold.copy_(state["threshold"])
        self.rows_silent, self.energy = state["rows_silent"].to(self.device), state["energy"].to(self.device)
        self.steps_done, self.scale = int(state["steps_done"]), float(state["scale"])
        self.scaler.load_state_dict({name: state[f"scaler.{name}"].item() for name in self.scaler.state_dict()})


def train(acts, cfg, *, device="cpu", out=None, resume=False, init_from=None, save_minutes=10.0, on_log=None, log_every=50, metadata=None):
    """Train on ``acts`` and return the SAE for raw activations.

    ``acts``: what ``Rows`` takes, or a reader: ``Rows``, ``FeatureTree``, any object with their ``d_model``, ``batches``,
    ``sample`` and ``split_off``. A twentieth of the rows (at most 16,384) is set aside to calibrate the threshold: on rows
    trained on over many epochs, L0 comes out lower than on new ones.
    ``out``: a new or empty folder for ``metrics.jsonl`` and the checkpoint, written at the start, every ``save_minutes`` and
    at the end. SIGINT and SIGTERM are raised after the current step, once it is saved. ``resume``: go on from there.
    ``init_from``: a checkpoint whose weights a new run starts with. ``on_log``: called every ``log_every`` steps with
    {"step", "loss", "fvu", "l0", "dead", "threshold", "rows_per_second"}. ``metadata``: what checkpoints say of the rows, such as
    {"model_name", "hook_name", "dataset", "base_model"}. Under torch.distributed each process takes its share of every batch.
    ``ValueError`` for bad rows, or rows or a config other than those resumed; ``OSError`` if ``out`` is not empty, or in use
    by another run, or the disk full.
    """
    device, (rank, world) = check_device(device), process_place()
    _require(not resume or out is not None and init_from is None, "resume needs out and no init_from", (out, init_from))
    _require(save_minutes >= 0 and log_every >= 1, "save_minutes must be at least 0 and log_every 1", (save_minutes, log_every))
    trainer, data, aside, origin = _begin(acts, cfg, device, world)
    if resume:
        trainer.load_state_dict(load_state(out, origin))
    elif init_from is not None:
        trainer.start_from(MatryoshkaSAE.load(init_from, device))
    batches = data.batches(cfg.batch_size // world, cfg.seed, trainer.steps_done, rank, world)
    claim = claimed_folder(out, own=None if resume else ()) if out is not None and rank == 0 else contextlib.nullcontext()

    def report(x, loss, rate):
        figures = {"step": trainer.steps_done, "loss": loss, **trainer.measure(x[:512]), "rows_per_second": round(rate)}
        if metrics:
            print(json.dumps(figures), file=metrics, flush=True)
        if on_log:
            on_log(figures)

    with claim as folder, metrics_file(folder, trainer.steps_done) as metrics, deferred_signals() as received:
        checkpoint = functools.partial(_checkpoint, trainer, aside, folder, origin, metadata or {})
        if folder and not resume:
            checkpoint()
        logged, saved, first, stop = time.monotonic(), time.monotonic(), trainer.steps_done, False
        if isinstance(data, Rows):  # a thread would take a third longer over the toy's small steps
            batches = prefetch(itertools.islice(batches, cfg.steps - first), pin=device.type == "cuda")
        while trainer.steps_done < cfg.steps and not stop:
            try:
                x = next(batches, None)
                _require(x is not None, "batches must not end before the last step, ended after step", trainer.steps_done)
                loss = trainer.step(x)
                stop = agreed(received, trainer.steps_done, device)
            except (OSError, ValueError):  # a row that cannot be used, a lost process: the steps so far stand
                if folder:
                    checkpoint()
                raise
            if trainer.steps_done % log_every == 0 or trainer.steps_done == cfg.steps:
                _require(math.isfinite(loss), f"training diverged by step {trainer.steps_done}, try a lower lr: loss", float(loss))
                report(x, float(loss), (trainer.steps_done - first) * cfg.batch_size / (time.monotonic() - logged))
                logged, first = time.monotonic(), trainer.steps_done
            if folder and time.monotonic() - saved > 60 * save_minutes and trainer.steps_done < cfg.steps:
                checkpoint()
                saved = time.monotonic()
        if stop and not received:
            received.append(signal.SIGTERM)  # another process got it
        return checkpoint()


def transpose_(parameter):
    """Transpose a parameter and its gradient, as views of the same memory."""
    grad, parameter.grad = parameter.grad, None
    parameter.data = parameter.data.T
    parameter.grad = None if grad is None else grad.T


def _begin(acts, cfg, device, world):
    """(trainer, training rows, rows (n, D) for calibration, the settings and rows that a resumed run must share)."""
    _require(cfg.batch_size % world == 0, f"batch_size must be a multiple of the number of processes {world}", cfg.batch_size)
    least = round(min(cfg.k, cfg.k_start or cfg.k) * cfg.batch_size / world)
    _require(least >= 1, f"k must give each of {world} processes at least one active entry in its share of a batch", cfg.k)
    data, aside = (acts if hasattr(acts, "batches") else Rows(acts)).split_off(0.05, cfg.seed)
    sample = data.sample(ASIDE, cfg.seed)
    mean = sample.mean(dim=0, dtype=torch.float64)
    scale = float((sample - mean).norm()) / len(sample) ** 0.5
    _require(max(1e-18, 1e-6 * float(mean.norm())) < scale < 1e18, "the rows must not be all zero, equal to a millionth, or beyond 1e18; "
             "their root mean squared distance from their mean", scale)
    trainer = Trainer(cfg, data.d_model, device, mean, scale)
    origin = {**dataclasses.asdict(cfg), "rows": len(data) if isinstance(data, Rows) else None, "width": data.d_model,
              "checksum of a sample of the rows": hashlib.sha256(sample.cpu().numpy()).hexdigest()[:16], "processes": world}
    return trainer, data, aside.sample(ASIDE, cfg.seed), origin


def _checkpoint(trainer, aside, folder, origin, metadata):
    """The SAE as it is now, calibrated on rows ``aside``; written to ``folder``, if any, with the state to resume from."""
    sae = trainer.export()
    sae.metadata.update(metadata)
    sound = sae.W_dec.any(dim=1).all() and all(tensor.isfinite().all() for tensor in sae.state_dict().values())
    _require(sound, f"training diverged by step {trainer.steps_done}, try a lower lr: weights", "NaN, infinity or decoder rows of 0")
    if trainer.steps_done:
        calibrate(sae, aside, trainer.cfg.k)
    if folder:
        write(folder / STATE, save(trainer.state_dict(), {"origin": json.dumps(origin)}))
        sae.save(folder)
    return sae


@torch.no_grad()
def calibrate(sae, rows, k, batch_size=2048):
    """Set the threshold so that on raw ``rows`` (n, D) the mean L0 is ``k``, or all positive entries where they are fewer."""
    n, floor = round(k * len(rows)), 0.5 * float(sae.threshold)
    for floor in (floor, 0.0):
        above = torch.cat([pre[pre > floor] for pre in (sae.pre_acts(x.to(sae.b_dec.device)) for x in rows.split(batch_size))])
        if len(above) > n:
            sae.threshold.copy_(above.topk(n + 1).values[-1])
            return
    sae.threshold.zero_()


def process_place():
    """(number of this process, number of processes) under torch.distributed; (0, 1) alone."""
    on = distributed.is_available() and distributed.is_initialized()
    return (distributed.get_rank(), distributed.get_world_size()) if on else (0, 1)


def average(*tensors):
    """Replace each tensor by its mean over the processes; ``ConnectionError`` if one of them is gone (gloo; NCCL ends the process)."""
    for tensor in tensors:
        try:
            distributed.all_reduce(tensor if tensor.is_contiguous() else tensor.T)
        except RuntimeError as error:
            raise ConnectionError(f"another process of this run is lost: {str(error).split('. ')[0]}") from None
        tensor /= process_place()[1]


def agreed(flag, step, device):
    """Whether the flag is set in any process; several processes ask each other in every tenth step only."""
    if process_place()[1] == 1:
        return bool(flag)
    if step % 10:
        return False
    average(share := torch.tensor(float(bool(flag)), device=device))
    return bool(share)


@contextlib.contextmanager
def deferred_signals():
    """Collect SIGINT and SIGTERM in the list that this yields and raise the first again at the end; a second Ctrl-C acts at once."""
    received, old = [], {}

    def note(number, frame):
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is threading.main_thread():
        old = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        old = {number: handler for number, handler in old.items() if handler is not signal.SIG_IGN}
    for number in old:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler or signal.SIG_DFL)
    if received:
        signal.raise_signal(received[0])


# ------------------------------------------------------------------------------------------------------------ 7. metrics


@torch.no_grad()
def evaluate(sae, rows, batch_size=4096, on_rows=None):
    """Figures of ``sae`` over all ``rows`` (raw activations, anything ``Rows`` takes), in one pass.

    ``fvu = sum |x - recon|^2 / sum |x - mean|^2`` (predicting the mean gives 1), ``l0`` active latents per row, ``dead``
    fraction of latents that never fire on these rows, ``max_cosine`` mean over latents of the largest cosine with another
    decoder row, ``prefixes`` [{"latents", "fvu", "l0", "max_cosine"}] for each of ``sae.prefixes``, ``rows`` their number,
    ``frequencies`` {"edges", "counts"}: how many of the latents that fire do so on a share of the rows in [edge, next edge).
    ``on_rows``: called with the rows so far.
    """
    rows = rows if isinstance(rows, Rows) else Rows(rows)
    levels, device = sae.prefixes, sae.b_dec.device
    error = torch.zeros(len(levels), dtype=torch.float64)
    fired = torch.zeros(len(sae.b_enc), dtype=torch.long, device=device)  # rows in which each latent is active
    sums, squares, n = torch.zeros(rows.d_model, dtype=torch.float64), 0.0, 0
    for x in rows.chunks(batch_size):
        x, n = x.to(device), n + len(x)
        acts, recon, start = sae.encode(x), sae.b_dec, 0
        fired += (acts > 0).sum(dim=0)
        for i, end in enumerate(levels):
            recon = recon + acts[:, start:end] @ sae.W_dec[start:end]
            error[i] += float((x - recon).pow(2).sum(dim=1).cpu().double().sum())
            start = end
        offset = (x - sae.b_dec).cpu().double()  # near the mean, so that the variance does not cancel
        sums += offset.sum(dim=0)
        squares += float(offset.pow(2).sum())
        if on_rows:
            on_rows(n)
    total = squares - float(sums.pow(2).sum()) / len(rows)
    fvu = [e / total if total > 0 else math.nan for e in error.tolist()]
    fired = fired.cpu().double()
    l0, cosines = [float(fired[:p].sum()) / len(rows) for p in levels], [max_cosine(sae.W_dec[:p]) for p in levels]
    counts, edges = np.histogram((fired[fired > 0] / len(rows)).log10().numpy(), bins=16, range=(-8, 0))
    return {"rows": len(rows), "fvu": fvu[-1], "l0": l0[-1], "dead": float((fired == 0).double().mean()), "max_cosine": cosines[-1],
            "prefixes": [{"latents": p, "fvu": f, "l0": a, "max_cosine": c} for p, f, a, c in zip(levels, fvu, l0, cosines)],
            "frequencies": {"edges": (10.0**edges).tolist(), "counts": counts.tolist()}}


@torch.no_grad()
def loss_recovered(model, module, sae, batches, at="input", drop=()):
    """Cross-entropy of ``model``, in nats per next token, with the stream at ``module`` replaced: by nothing, zeros, and ``sae``.

    ``batches`` of token ids (B, T); positions whose id is in ``drop`` keep their stream and are not predicted. Returns
    {"clean", "zeroed", "tokens": how many, "prefixes": [{"latents", "spliced", "recovered"}]}, where
    ``recovered = (zeroed - spliced) / (zeroed - clean)``, None where those are equal.
    """
    def splice(prefix):
        return lambda x: sae.decode(sae.encode(x, prefix))

    swaps = [None, torch.zeros_like, *map(splice, sae.prefixes)]
    sums, n, device = [0.0] * len(swaps), 0, next(model.parameters()).device
    for ids in batches:
        ids = ids.to(device)
        keep = ~torch.isin(ids, torch.tensor(list(drop), device=device, dtype=ids.dtype))
        target = ids[:, 1:][keep[:, 1:]]
        n += len(target)
        for i, swap in enumerate(swaps):
            with activation_hook(module, at, swap and (lambda x, swap=swap: torch.where(keep[..., None], swap(x), x))):
                output = model(ids)
            logits = getattr(output, "logits", output)[:, :-1][keep[:, 1:]]
            sums[i] += float(nn.functional.cross_entropy(logits.float(), target, reduction="sum"))
    _require(n > 0, "the batches must have tokens to predict, number of them", n)
    clean, zeroed, *spliced = (total / n for total in sums)
    levels = [{"latents": p, "spliced": s,
               "recovered": (zeroed - s) / (zeroed - clean) if zeroed != clean else None} for p, s in zip(sae.prefixes, spliced)]
    return {"clean": clean, "zeroed": zeroed, "tokens": n, "prefixes": levels}


def logistic_regression(x, y, l2=1e-3, steps=100):
    """One probe per label, by LBFGS on standardised inputs: ``x`` (n, d), or (C, n, d) of its own, ``y`` (n, C) -> (w (C, d), b (C,)).

    Minimises the mean cross-entropy of ``sigmoid(x @ w + b)`` plus ``l2 |w|^2`` in standardised units.
    """
    mean, std = x.mean(dim=-2, keepdim=True), x.std(dim=-2, keepdim=True).clamp_min(1e-12)
    x, target = (x - mean) / std, y.T.float()
    w, b = torch.zeros(len(target), x.shape[-1], requires_grad=True), torch.zeros(len(target), requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=steps, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = nn.functional.binary_cross_entropy_with_logits(probe_logits(x, w, b), target) * len(target) + l2 * w.pow(2).sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    w = w.detach() / std.squeeze(-2)
    return w, b.detach() - (w * mean.squeeze(-2)).sum(dim=1)


def probe_logits(x, w, b):
    """``x`` (n, d) or (C, n, d), ``w`` (C, d), ``b`` (C,) -> (C, n)."""
    return (w @ x.T if x.dim() == 2 else torch.bmm(x, w[:, :, None]).squeeze(2)) + b[:, None]


def probe_scores(seen, y):
    """Accuracy, balanced accuracy and F1 of predictions ``seen`` (C, n) of ``y`` (n, C), each (C,)."""
    hit, y = seen & y.T, y.T
    recall, rejected = hit.sum(1) / y.sum(1), (~seen & ~y).sum(1) / (~y).sum(1)
    return {"accuracy": (seen == y).float().mean(1), "balanced_accuracy": (recall + rejected) / 2,
            "f1": 2 * hit.sum(1) / (seen.sum(1) + y.sum(1))}


@torch.no_grad()
def probe(sae, x, labels, seed=0, most=5, erased=(1, 2, 5)):
    """How rows ``x`` (n, D) with ``labels``, (n,) whole numbers or (n, C) of 0 and 1, are told by few latents; half is held out.

    {"rows", "labels", "raw": accuracy and F1 of logistic regression on the rows, means over the labels, "prefixes": [what
    ``sparse_probing`` returns], "erasure": [what ``erase`` returns, for each number ``erased``]}. ``ValueError`` where a label
    lacks rows with or without it. Runs on the CPU.
    """
    y, names = label_matrix(labels, len(x))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = ((x[half].float(), y[half]) for half in (order[: len(x) // 2], order[len(x) // 2:]))
    rare = torch.stack([count for _, y in (train, test) for count in (y.sum(0), (~y).sum(0))]).amin(dim=0)
    _require(bool(rare.min() > 0), "each label must have rows with it and without it in both halves; too few for label",
             names[int(rare.argmin())])
    w, b = logistic_regression(*train)
    raw = probe_logits(test[0], w, b)
    parts = [(sae.encode(rows), part.float()) for rows, part in zip(train[0].split(2048), train[1].split(2048))]
    with_label, without = sum(part.T @ acts for acts, part in parts), sum((1 - part).T @ acts for acts, part in parts)
    difference = with_label / train[1].sum(0)[:, None] - without / (~train[1]).sum(0)[:, None]  # (C, F)
    found = probe_scores(raw > 0, test[1])
    return {"rows": len(x), "labels": names, "raw": {name: _mean(found[name]) for name in ("accuracy", "f1")},
            "prefixes": [sparse_probing(sae, difference[:, :p], train, test, raw > 0, most) for p in sae.prefixes],
            "erasure": [erase(sae, n, difference, test, w, raw) for n in erased if n <= len(sae.b_enc)]}


def sparse_probing(sae, difference, train, test, seen, most):
    """Figures of the first latents, as many as ``difference`` (C, p) of mean activations has columns, over (rows, labels) ``test``.

    ``probes``: accuracy and F1, means over the labels, of logistic regression on the k = 1..``most`` latents of largest |mean
    difference| (Gurnee et al. 2023, arXiv 2305.01610). ``absorption``: share of the positives that the raw probe has ``seen``
    (C, n) and the label's main latent, of largest mean difference, is silent on. ``splitting``: how many latents a label needs,
    each raising F1 by more than 0.03. Both after Chanin et al. 2024, arXiv 2409.14507, who find the main latents by probe
    weights and demand that an absorbing latent be found.
    """
    (x, y), (x_test, y_test), p = train, test, difference.shape[1]
    top, main, scores = difference.abs().topk(min(most, p), dim=1).indices, difference.argmax(dim=1, keepdim=True), []  # (C, most), (C, 1)
    codes = _columns(sae, x, top)  # (C, n, most)
    *codes_test, main_codes = _columns(sae, x_test, torch.cat([top, main], dim=1)).unbind(dim=2)
    codes_test = torch.stack(codes_test, dim=2)
    for k in range(1, top.shape[1] + 1):
        scores.append(probe_scores(probe_logits(codes_test[:, :, :k], *logistic_regression(codes[:, :, :k], y)) > 0, y_test))
    gains = torch.stack([score["f1"] for score in scores]).diff(dim=0) > 0.03
    positives = y_test.T & seen
    absorbed = (positives & (main_codes == 0)).sum(1) / positives.sum(1)
    return {"latents": p, "absorption": _mean(absorbed),
            "absorption_by_label": [None if math.isnan(rate) else rate for rate in absorbed.tolist()],
            "splitting": _mean(1.0 + gains.cumprod(dim=0).sum(0)),
            "probes": [{"k": k, "accuracy": _mean(score["accuracy"]), "f1": _mean(score["f1"])} for k, score in enumerate(scores, 1)]}


def erase(sae, n, difference, test, w, raw):
    """By how much the raw probes ``w`` (C, D) lose balanced accuracy once each label's top ``n`` latents are taken out of the rows.

    {"latents": n, "own": of the label's probe, "others": mean over the others'}. Top by mean difference x (decoder row . probe),
    the first-order effect. Targeted probe perturbation of SAEBench, arXiv 2503.09532; deviations: the latents' contribution is
    taken out of the rows, not of their reconstruction, and balanced accuracy stands in for balanced classes.
    """
    x, y = test
    top, before = (difference * (w @ sae.W_dec.T)).topk(n, dim=1).indices, probe_scores(raw > 0, y)["balanced_accuracy"]
    falls = []  # of all probes, for each label erased
    for latents, codes in zip(top, _columns(sae, x, top)):
        falls.append(before - probe_scores(raw - (codes @ (sae.W_dec[latents] @ w.T)).T > 0, y)["balanced_accuracy"])
    falls = torch.stack(falls)
    own = falls.diagonal().sum()
    return {"latents": n, "own": float(own / len(w)), "others": float((falls.sum() - own) / max(1, len(w) * (len(w) - 1)))}


def _mean(values):
    """Mean of those that are not NaN, None if there are none."""
    mean = float(values.nanmean())
    return None if math.isnan(mean) else mean


def _columns(sae, rows, latents, size=2048):
    """Codes of ``rows`` (n, D) by the ``latents`` (C, m): (C, n, m)."""
    return torch.cat([sae.encode(part)[:, latents] for part in rows.split(size)]).movedim(0, 1)


def check_labels(labels, n):
    """``labels`` of ``n`` rows as a tensor: whole numbers (n,), or booleans (n, C) of 0 and 1; ``ValueError`` for anything else."""
    if isinstance(labels, torch.Tensor):
        labels = (labels.float() if labels.is_floating_point() else labels).cpu().numpy()
    labels = np.asarray(labels)
    labels = labels.flatten() if labels.size == n else labels
    _require(labels.dtype.kind in "iub" and labels.ndim in (1, 2) and len(labels) == n,
             f"labels must be whole numbers ({n},) or 0 and 1 ({n}, C)", f"{labels.dtype} {labels.shape}")
    if labels.ndim == 2:
        _require(bool(((labels == 0) | (labels == 1)).all()), "labels (n, C) must be 0 and 1", "others")
        return torch.from_numpy(labels == 1)
    labels = torch.from_numpy(labels.astype(np.int64))
    different = len(labels.unique())
    _require(different <= 1000, "labels must have at most 1000 different values", different)
    return labels


def label_matrix(labels, n):
    """The labels that ``check_labels`` takes as a boolean matrix (n, C), and the names of its columns."""
    labels = check_labels(labels, n)
    if labels.dim() == 2:
        return labels, [str(i) for i in range(labels.shape[1])]
    names = labels.unique()
    return labels[:, None] == names, [str(name) for name in names.tolist()]


@torch.no_grad()
def max_cosine(W_dec, block=2048):
    """Mean over the rows of ``W_dec`` (F, D) of the largest cosine with any other row; 0 for a single row."""
    rows = nn.functional.normalize(W_dec, dim=1)
    if len(rows) < 2:
        return 0.0
    best = []
    for start in range(0, len(rows), block):
        cosine = rows[start:start + block] @ rows.T
        cosine.diagonal(start).fill_(-1.0)
        best.append(cosine.max(dim=1).values)
    return float(torch.cat(best).mean())


# ----------------------------------------------------------------------------------------------------------- 8. toy data


class FeatureTree:
    """A tree of features, of which a child is on only where its parent is: the toy of noanabeshima/matryoshka-saes.

    ``spec``: a node {"active_prob": p given that the parent is on, "is_read_out": false for a hidden node, "is_binary": false
    for a magnitude uniform in [0.5, 1.5), "mutually_exclusive_children": true for at most one child at a time, whose
    probabilities then sum to at most 1, "children": [nodes], "id"}. Features are numbered from the root, depth first.
    ``d_model`` defaults to the number of features, whose directions are orthogonal, with norms 1 + norm_std N(0, 1).
    ``ValueError`` names the bad field.
    """

    def __init__(self, spec, d_model=None, norm_std=0.05, seed=0):
        self.nodes = []      # (parent node, random column, low, high, read out, binary): on where low <= column < high
        self.n_columns = 0   # random columns: one a node, one for all children that exclude each other
        self.parent_of = []  # for each feature the feature above it, or None
        self._add(spec, "tree")
        n = len(self.parent_of)
        _require(n >= 1, "tree must have at least one node that is read out; number of them", n)
        self.d_model = n if d_model is None else d_model
        _require(isinstance(self.d_model, int) and n <= self.d_model <= 2048,
                 f"d_model must lie in [number of features {n}, 2048]", self.d_model)
        _require(isinstance(norm_std, (int, float)) and 0 <= norm_std < 1, "norm_std must lie in [0, 1)", norm_std)
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(self.d_model, self.d_model, generator=generator)).Q
        self.directions = basis[:n] * (1 + norm_std * torch.randn(n, 1, generator=generator))

    def _add(self, spec, path, parent=None, feature=None, column=None, low=0.0):
        known = {"active_prob", "id", "is_read_out", "is_binary", "mutually_exclusive_children", "children"}
        _require(isinstance(spec, dict), f"{path} must be an object", repr(spec))
        unknown = sorted(set(spec) - known)
        _require(not unknown, f"{path} may only have the keys {', '.join(sorted(known))}", unknown)
        _require(path.count(".") <= 100, f"{path} must be at most 100 levels deep", path.count("."))
        p = spec.get("active_prob")
        _require(isinstance(p, (int, float)) and not isinstance(p, bool) and 0 <= p <= 1,
                 f"{path}.active_prob must be a number in [0, 1]", repr(p))
        flags = {"is_read_out": True, "is_binary": True, "mutually_exclusive_children": False}
        for name in flags:
            flags[name] = spec.get(name, flags[name])
            _require(isinstance(flags[name], bool), f"{path}.{name} must be true or false", repr(flags[name]))
        children = spec.get("children", [])
        _require(isinstance(children, list), f"{path}.children must be a list", repr(children))
        if column is None:
            column, self.n_columns = self.n_columns, self.n_columns + 1
        index = len(self.nodes)
        self.nodes.append((parent, column, low, low + p, flags["is_read_out"], flags["is_binary"]))
        if flags["is_read_out"]:
            self.parent_of.append(feature)
            feature = len(self.parent_of) - 1
        shared, low = None, 0.0
        if flags["mutually_exclusive_children"]:
            shared, self.n_columns = self.n_columns, self.n_columns + 1
        for i, child in enumerate(children):
            self._add(child, f"{path}.children[{i}]", index, feature, shared, low)
            low += child["active_prob"] if shared is not None else 0.0
        _require(low <= 1 + 1e-9, f"{path}.children exclude each other, so their active_prob must sum to at most 1", round(low, 9))

    @property
    def pairs(self):
        """(parent, child) feature numbers."""
        return [(p, c) for c, p in enumerate(self.parent_of) if p is not None]

    def sample_features(self, n, generator):
        """Feature activations (n, n_features): one uniform draw per node, or per set of exclusive siblings, for all rows at once."""
        draws = torch.rand(self.n_columns, n, generator=generator)
        on = []
        for parent, column, low, high, *_ in self.nodes:
            node = (draws[column] >= low) & (draws[column] < high) if high - low < 1 else torch.ones(n, dtype=torch.bool)
            on.append(node if parent is None else node & on[parent])
        columns = [o.float() if binary else o * (0.5 + torch.rand(n, generator=generator))
                   for o, (*_, read_out, binary) in zip(on, self.nodes) if read_out]
        return torch.stack(columns, dim=1)

    def batches(self, batch_size, seed, start=0, rank=0, world=1):
        """Endless rows of activations (batch_size, D) = features @ directions, sampled about 20,000 rows at a time."""
        generator, per_draw = torch.Generator().manual_seed(seed + rank), max(1, 20_000 // batch_size)
        draws = (self.sample_features(per_draw * batch_size, generator) @ self.directions for _ in itertools.count())
        return itertools.islice((batch for rows in draws for batch in rows.split(batch_size)), start, None)

    def sample(self, n, seed):
        """``n`` rows (n, D) that depend on ``seed`` alone."""
        return next(self.batches(n, seed))

    def split_off(self, fraction, seed):
        """Endless rows need no splitting: (itself, itself), for ``train``."""
        return self, self

    def pure_features(self):
        """Feature activations (n_features, n_features): in row i feature i is on, its parents too, and nothing else."""
        pure = torch.eye(len(self.parent_of))
        for child, parent in enumerate(self.parent_of):
            if parent is not None:
                pure[child] += pure[parent]
        return pure


@torch.no_grad()
def true_cosines(sae, tree):
    """|cosine| of every true direction with every decoder row: (n_features, F)."""
    return (nn.functional.normalize(tree.directions, dim=1) @ sae.W_dec.T).abs()


@torch.no_grad()
def matched_acts(sae, tree, rows):
    """Codes of ``rows`` by the latents that stand for the true features: (n, D) -> (n, n_features).

    Latents are matched to features greedily by |cosine| of the directions, none twice; without a latent left, the code is 0.
    """
    cosine = true_cosines(sae, tree)
    codes, matched = sae.encode(rows), torch.zeros(len(rows), len(cosine))
    for _ in range(min(cosine.shape)):
        feature, latent = divmod(int(cosine.argmax()), cosine.shape[1])
        matched[:, feature] = codes[:, latent]
        cosine[feature] = cosine[:, latent] = -1.0
    return matched


@torch.no_grad()
def toy_figures(sae, tree, seed, n=20_000):
    """Figures on ``n`` fresh toy rows: ``evaluate``'s fvu and l0, and how well the true features are recovered.

    ``cosine`` (n_features,): best |cosine| of each true direction with a decoder row; ``clean`` counts those >= 0.9.
    ``absorption`` per (parent, child): share of the rows with the child on where the parent's latent is silent.
    """
    features = tree.sample_features(n, torch.Generator().manual_seed(seed))
    rows = features @ tree.directions
    cosine = true_cosines(sae, tree).max(dim=1).values
    silent = matched_acts(sae, tree, rows) == 0
    absorption = [{"parent": p, "child": c, "rate": float(silent[on, p].float().mean()) if (on := features[:, c] > 0).any() else None}
                  for p, c in tree.pairs]
    found = evaluate(sae, rows)
    return {"fvu": found["fvu"], "l0": found["l0"], "clean": int((cosine >= 0.9).sum()), "features": len(cosine),
            "mean_cosine": float(cosine.mean()), "min_cosine": float(cosine.min()), "absorption": absorption}


def toy_setup(settings, seed=0):
    """The tree and the configs {"matryoshka", "vanilla"} of a toy experiment; vanilla has one prefix, all else equal.

    ``settings``: {"tree": a ``FeatureTree`` spec, "train": ``TrainConfig`` fields, n_latents defaulting to the number of
    features, and, optional, "d_model" and "norm_std"}.
    """
    for name in settings:
        _require(name in ("tree", "train", "d_model", "norm_std"), "the toy's settings are tree, train, d_model, norm_std", repr(name))
    for name in ("tree", "train"):
        _require(isinstance(settings.get(name), dict), f"{name} must be an object", repr(settings.get(name)))
    tree = FeatureTree(settings["tree"], settings.get("d_model"), settings.get("norm_std", 0.05), seed)
    cfg = TrainConfig.from_dict({"n_latents": len(tree.parent_of), **settings["train"], "seed": seed})
    return tree, {"matryoshka": cfg, "vanilla": cfg.vanilla()}


# --------------------------------------------------------------------------------------------------------- 9. TinyModel

TINY_MODEL = "noanabeshima/tiny_model", "502a1f2453f61260c937f7807a1270a167faba07"
SHA256 = {"tiny_model.pt": "dec406b1ad94cb345b2606d7f8cffa7c1114fcb60850e949eb17274cec30a8c3",
          "tiny_model_2L_1E.pt": "04e8df0cd677a7060558e5c9eb3aaa30dbfe84e4ecc92bf17ef0e405dcf33baf",
          "tiny_model_2L_3E.pt": "26dfc06da85d0e5d4de51a2e90108f9d585a81677bf4bac0ac079e780fda31f4"}
BEGIN, PAD = 9996, 9998  # token ids: before each text, and after those that are shorter


class TinyModel(nn.Module):
    """A language model of TinyStories without layer norm, noanabeshima/tiny_model: ids (B, T) -> logits (B, T, vocabulary).

        x = embed[ids] + pos_embed[:T];   per block: x += O(attention(Q x, K x, V x)), x += write_out(relu(read_in(x)))

    Causal softmax attention, scaled by 1/sqrt(head width). ``layers[i]`` is the module that the residual stream of layer
    ``i`` enters; the last, ``lm_head``, is after all blocks. Deviation: the original returns log-probabilities.
    """

    def __init__(self, n_layers=4, d_model=768, n_heads=16, d_mlp=3072, n_vocab=10_000, n_positions=256):
        super().__init__()
        self.embed = nn.Embedding(n_vocab, d_model)
        self.pos_embed = nn.Parameter(torch.zeros(1, n_positions, d_model))
        self.torso = nn.Sequential(*(_Block(d_model, n_heads, d_mlp) for _ in range(n_layers)))
        self.lm_head = nn.Linear(d_model, n_vocab)

    @property
    def layers(self):
        return [*self.torso, self.lm_head]

    def forward(self, ids):
        return self.lm_head(self.torso(self.embed(ids) + self.pos_embed[:, : ids.shape[1]]))

    @classmethod
    def load(cls, path="tiny_model.pt"):
        """Read a state dict in float32, from a file or, of the names in ``SHA256``, from the Hub; never unpickles objects.

        ``ValueError`` for another checksum or other tensors; ``OSError`` if there is no such file.
        """
        if not os.path.exists(path):
            if str(path) not in SHA256:
                raise FileNotFoundError(f"{path} is neither a file nor one of the published {', '.join(SHA256)}")
            name, path = str(path), hub_file(TINY_MODEL[0], str(path), TINY_MODEL[1])
            found = hashlib.sha256(Path(path).read_bytes()).hexdigest()
            _require(found == SHA256[name], f"{path} must have the sha256 {SHA256[name]}", found)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            n_layers = len({key.split(".")[1] for key in state if key.startswith("torso.")})
            (n_vocab, d_model), (_, n_positions, _) = state["embed.weight"].shape, state["pos_embed"].shape
            model = cls(n_layers, d_model, 16, len(state["torso.0.mlp.read_in.bias"]), n_vocab, n_positions)
            model.load_state_dict(state)
        except OSError:
            raise
        except Exception as error:  # of torch's reader, or a key or shape that does not fit
            raise ValueError(f"{path} is not a state dict of TinyModel: {_one_line(error)}") from None
        return model.eval()


class _Block(nn.Module):
    def __init__(self, d_model, n_heads, d_mlp):
        super().__init__()
        self.n_heads = n_heads
        self.attn = nn.ModuleDict({name: nn.Linear(d_model, d_model, bias=name == "O") for name in "QKVO"})
        self.mlp = nn.ModuleDict({"read_in": nn.Linear(d_model, d_mlp), "write_out": nn.Linear(d_mlp, d_model)})

    def forward(self, x):
        q, k, v = (self.attn[name](x).unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for name in "QKV")  # (B, heads, T, D / heads)
        heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn["O"](heads.transpose(1, 2).flatten(-2))
        return x + self.mlp["write_out"](torch.relu(self.mlp["read_in"](x)))


class _Stop(Exception):
    """Ends a forward pass after the module of interest."""


@contextlib.contextmanager
def activation_hook(module, at="output", replace=None, stop=False):
    """Capture the "input" or "output" of any ``module`` while the context lasts: a list with a detached tensor for each call.

    The input is the first argument; of a tuple output the first item counts. ``replace``: a function of that tensor whose
    result takes its place. ``stop`` ends the forward pass there, and the context with it. ``ValueError`` where there is no tensor.
    """
    _require(at in ("input", "output"), 'at must be "input" or "output"', repr(at))
    captured = []

    def take(x):
        _require(isinstance(x, torch.Tensor), f"the {at} of {type(module).__name__} must be a tensor or start with one", type(x).__name__)
        captured.append(x.detach())
        if stop:
            raise _Stop
        return x if replace is None else replace(x).to(x)

    def on_input(module, args, kwargs):
        if args:
            return (take(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs), None)
        return args, {**kwargs, name: take(kwargs.get(name))}

    def on_output(module, args, output):
        first = take(output[0] if isinstance(output, tuple) else output)
        return None if replace is None else (first, *output[1:]) if isinstance(output, tuple) else first

    handle = module.register_forward_pre_hook(on_input, with_kwargs=True) if at == "input" else module.register_forward_hook(on_output)
    try:
        yield captured
    except _Stop:
        pass
    finally:
        handle.remove()


@torch.no_grad()
def harvest(model, module, batches, out, at="output", drop=(), dtype="float16", max_rows=None, on_rows=None):
    """Write the activations of ``module`` in ``model`` to ``out``, a ``.npy`` (rows, D), as they come; return the number of rows.

    ``batches``: token ids (B, T), or dicts of what ``model`` takes by name, with "input_ids". Positions whose id is in
    ``drop``, or that an "attention_mask" leaves out, give no row. The forward pass ends after ``module``. ``out`` appears when
    it is whole, of ``dtype`` float16 or float32; written by plain appends, as a memory map dies where the disk is full.
    ``on_rows``: called with the rows so far.
    ``ValueError`` for a model in training mode, a value that ``dtype`` cannot hold, or no rows; ``OSError`` if the disk is full.
    """
    _require(not model.training, "model must be in evaluation mode, call model.eval(): training", model.training)
    _require(dtype in ("float16", "float32"), "dtype must be float16 or float32", dtype)
    device, n, width = next(model.parameters()).device, 0, None
    with atomic(out) as temporary:
        with open(temporary, "wb") as file:
            for batch in batches:
                named = isinstance(batch, collections.abc.Mapping)
                inputs = {name: value.to(device) for name, value in (batch.items() if named else [("input_ids", batch)])}
                ids = inputs["input_ids"]
                with activation_hook(module, at, stop=True) as captured:
                    model(**inputs) if named else model(ids)
                found = tuple(captured[0].shape) if captured else "no call"
                _require(found[:-1] == ids.shape, f"module must be called with one vector for each of the ids {tuple(ids.shape)}", found)
                mask = inputs.get("attention_mask", torch.ones_like(ids)).bool()
                keep = mask & ~torch.isin(ids, torch.tensor(list(drop), device=device, dtype=ids.dtype))
                rows = captured[0][keep][: None if max_rows is None else max_rows - n].to(getattr(torch, dtype))
                _require(bool(rows.isfinite().all()), f"activations must fit in {dtype}", "one that is too large, or NaN")
                if width is None:
                    width = rows.shape[1]
                    _write_header(file, dtype, 0, width)
                file.write(rows.cpu().numpy().data)
                n += len(rows)
                if on_rows:
                    on_rows(n)
                if n == max_rows:
                    break
            _require(n > 0, "the batches must give at least one row, number of them", n)
            file.seek(0)
            _write_header(file, dtype, n, width)
    return n


def _write_header(file, dtype, n, width):
    """Of a ``.npy``; of the same length for every ``n``, as numpy leaves room for the first number to grow."""
    np.lib.format.write_array_header_1_0(file, {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": (n, width)})


def read_tokens(path, n_vocab=10_000, n_positions=256, batch_size=64):
    """Token ids in batches (B, T) of a ``.jsonl`` with {"tok_ids": [...]} in each line, or a ``.npy`` (docs, T), as they are read.

    ``ValueError`` names the line or row with an id outside [0, n_vocab), more than ``n_positions`` ids, or another length than
    the first.
    """
    docs, length, stamp = [], None, _stamp(path)
    for where, ids in _npy_docs(path) if str(path).endswith(".npy") else _jsonl_docs(path):
        length = length or len(ids)
        _require(0 < len(ids) <= n_positions, f"{where}: tok_ids must be 1 to {n_positions} ids, the positions of the model", len(ids))
        _require(len(ids) == length, f"{where}: tok_ids must be {length} ids as in the first", len(ids))
        low, high = ids.min(), ids.max()
        _require(0 <= low and high < n_vocab, f"{where}: ids must lie in [0, {n_vocab})", low if low < 0 else high)
        docs.append(ids)
        if len(docs) == batch_size:
            yield torch.from_numpy(np.stack(docs))
            docs = []
    if _stamp(path) != stamp:
        raise OSError(f"{path} changed while it was read")
    if docs:
        yield torch.from_numpy(np.stack(docs))


def _npy_docs(path):
    array = read_npy(path)
    _require(array.dtype.kind in "iu" and array.ndim == 2, f"{path} must hold whole numbers (docs, positions)",
             f"{array.dtype} {array.shape}")
    _require(array.flags.c_contiguous, f"{path} must be in C order to be read as rows", "Fortran order")
    read = _file_reader(path, array)
    return ((f"{path}, row {i}", read(i, i + 1)[0].astype(np.int64)) for i in range(len(array)))


def _jsonl_docs(path, longest=1 << 20):
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(longest), b""), 1):
            where = f"{path}, line {number}"
            try:
                ids = np.array(json.loads(line)["tok_ids"])
                _require(ids.ndim == 1 and ids.dtype.kind == "i", "tok_ids must be a list of whole numbers", ids.dtype)
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise ValueError(f'{where} is not {{"tok_ids": [whole numbers]}}: {str(error)[:100]}') from None
            yield where, ids


# ------------------------------------------------------------------------------------------------------------- 10. files

BLOCK = 256                  # consecutive rows read together
POOL_BYTES = 2**28           # of float32 rows in memory, whose order is mixed
ASIDE = 16_384               # rows, at most, that give scale and mean, and others that give the final threshold
WEIGHTS, CONFIG, STATE, METRICS = "sae_weights.safetensors", "cfg.json", "training_state.safetensors", "metrics.jsonl"
AE, DICT_CLASS = "ae.pt", "MatryoshkaBatchTopKSAE"  # of dictionary_learning
SAELENS = {"apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none"}
OURS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
FORMATS = {  # SAELens' architecture, or dictionary_learning's class: the names of OURS in its files, then what more they hold
    "jumprelu": OURS, "batchtopk": (*OURS[:4], "topk_threshold"), "matryoshka_batchtopk": (*OURS[:4], "topk_threshold"),
    DICT_CLASS: (*OURS, "k", "group_sizes"),
}
HUB_ADVICE = {  # by the Hub's error code or the HTTP status
    "EntryNotFound": "there is no such file", "RevisionNotFound": "there is no such revision", 404: "not found, check the name",
    "GatedRepo": "it is gated, accept its terms on its page with the account of your token",
    "RepoNotFound": "there is no such repository, or it is private: check the name, or log in with `hf auth login`",
    401: "the token is missing or refused, log in with `hf auth login` or set HF_TOKEN", 500: "the Hub has a fault, try again later",
    403: "your token has no right to it: to push, use one with write access and a repository of yours, or --create-pr",
}


class Rows:
    """Activation rows (n, D), read as float32: of an array, a tensor, a ``.npy`` file or a folder of them in name order.

    float16, float32 or float64, of shape (rows, D) or (docs, positions, D). Files in C order are read block by block, so memory
    does not grow with them. ``ValueError`` for anything else, and for a row that is not finite when it is read; ``OSError`` for
    a file that cannot be read.
    """

    def __init__(self, source):
        self.skip = np.empty(0, np.int64)  # increasing numbers of rows to leave out
        self.parts = [_open_part(part) for part in _list_parts(source)]
        self.d_model = self.parts[0].d_model
        for part in self.parts:
            _require(part.d_model == self.d_model, f"{part.name} must have the width {self.d_model} of {self.parts[0].name}", part.d_model)
        self.starts = np.cumsum([0, *(part.n for part in self.parts)])
        self.total = int(self.starts[-1])

    def __len__(self):
        return self.total - len(self.skip)

    def split_off(self, fraction, seed):
        """Set a random ``fraction`` of the rows aside, at least 1 and at most 16,384, in memory: (the others, those)."""
        n = min(max(1, round(fraction * len(self))), ASIDE)
        _require(len(self) >= 2, f"{self.parts[0].name} has too few rows: setting some aside needs at least 2", len(self))
        chosen = np.sort(np.random.default_rng(seed).choice(len(self), n, replace=False, shuffle=False))
        chosen += np.searchsorted(self.skip - np.arange(len(self.skip)), chosen, side="right")  # among the rows not skipped
        others = copy.copy(self)
        others.skip = np.union1d(self.skip, chosen)
        return others, Rows(self.take(chosen))

    def take(self, numbers):
        """The rows with these ``numbers``, an array (n, D)."""
        return np.concatenate([self._read(row, row + 1) for row in numbers.tolist()])

    def _read(self, start, stop):
        """Rows ``start`` to ``stop`` without the skipped ones."""
        rows = np.empty((stop - start, self.d_model), np.float32)
        row, i = start, int(np.searchsorted(self.starts, start, side="right")) - 1
        while row < stop:
            part, begin = self.parts[i], int(self.starts[i])
            end, i = min(stop, begin + part.n), i + 1
            piece = rows[row - start:end - start]
            to_float32(part.read(row - begin, end - begin), piece)
            finite = np.isfinite(piece)
            if not finite.all():
                bad = row - begin + int(finite.all(axis=1).argmin())
                raise ValueError(f"{part.name} has a NaN or infinite value (as float32) in row {bad}")
            row = end
        skipped = self.skip[slice(*np.searchsorted(self.skip, (start, stop)))]
        return np.delete(rows, skipped - start, axis=0) if len(skipped) else rows

    def chunks(self, size):
        """All rows once, in order, as tensors of at most ``size`` rows."""
        for start in range(0, self.total, size):
            rows = self._read(start, min(start + size, self.total))
            if len(rows):
                yield torch.from_numpy(rows)

    def batches(self, batch_size, seed, start=0, rank=0, world=1):
        """Endless batches (batch_size, D) from number ``start`` on; every row once an epoch, in an order given by ``seed``.

        Blocks of consecutive rows are permuted, and the rows of a pool of blocks again, so memory is bounded by the pool.
        Of ``world`` processes, number ``rank`` reads every ``world``-th block of the permutation.
        """
        _require(len(self) >= batch_size * world, f"batch_size must be at most the number of training rows {len(self)}", batch_size * world)
        _require(self.total > BLOCK * (world - 1), f"the rows must fill a block of {BLOCK} for each of {world} processes", len(self))
        return self._batches(batch_size, seed, start * batch_size, rank, world)

    def _batches(self, batch_size, seed, skip, rank, world):
        batch, filled = np.empty((batch_size, self.d_model), np.float32), 0
        for pool, order in self._pools(seed, skip, rank, world):
            while len(order):
                taken, order = np.split(order, [batch_size - filled])
                np.take(pool, taken, axis=0, out=batch[filled:filled + len(taken)], mode="clip")  # "raise" would buffer
                filled += len(taken)
                if filled == batch_size:
                    yield torch.from_numpy(batch)
                    batch, filled = np.empty_like(batch), 0

    def _pools(self, seed, skip, rank, world):
        """Endless (rows, order in which to take them), after the first ``skip`` rows of this stream."""
        n_blocks = -(-self.total // BLOCK)
        kept = np.minimum(BLOCK, self.total - BLOCK * np.arange(n_blocks)) - np.bincount(self.skip // BLOCK, minlength=n_blocks)
        per_pool = max(1, POOL_BYTES // (4 * BLOCK * self.d_model))
        pool = np.empty((min(per_pool, n_blocks) * BLOCK, self.d_model), np.float32)
        for epoch in itertools.count():
            blocks = np.random.default_rng([seed, epoch]).permutation(n_blocks)[rank::world]
            for place in range(0, len(blocks), per_pool):
                chosen = np.sort(blocks[place:place + per_pool])
                n = int(kept[chosen].sum())
                if skip >= n:
                    skip -= n
                    continue
                end = 0
                for block in chosen.tolist():
                    rows = self._read(block * BLOCK, min((block + 1) * BLOCK, self.total))
                    pool[end:end + len(rows)] = rows
                    end += len(rows)
                yield pool, np.random.default_rng([seed, epoch, place]).permutation(n)[skip:]
                skip = 0

    def sample(self, n, seed):
        """At most ``n`` rows at random, that depend on ``seed`` alone."""
        return next(self.batches(min(n, len(self)), seed))


class _Part(typing.NamedTuple):
    name: str
    n: int
    d_model: int
    read: typing.Callable  # (start, stop) -> rows


def _list_parts(source):
    if not isinstance(source, (str, os.PathLike)):
        return [source]
    if not os.path.isdir(source):
        return [read_npy(source)]
    shards = sorted(Path(source).glob("*.npy"))
    _require(shards, f"{source} must be a .npy file or a folder of them", "a folder without any")
    return [read_npy(shard) for shard in shards]


def _open_part(array):
    name = str(getattr(array, "filename", None) or "the array")
    if isinstance(array, torch.Tensor):
        array = (array.float() if array.dtype == torch.bfloat16 else array).detach().cpu().numpy()
    _require(isinstance(array, np.ndarray), f"{name} must be an array, a tensor or a path", type(array).__name__)
    _require(array.dtype.kind == "f" and array.dtype.itemsize in (2, 4, 8), f"{name} must hold float16, float32 or float64", array.dtype)
    _require(array.ndim in (2, 3) and array.size > 0,
             f"{name} must have the shape (rows, D) or (docs, positions, D), none of them 0", array.shape)
    _require(array.flags.c_contiguous or array.ndim == 2, f"{name} must be in C order to be read as rows", "Fortran order")
    rows = array.reshape(-1, array.shape[-1])
    if isinstance(array, np.memmap) and isinstance(array.base, mmap.mmap) and array.mode == "r" and array.flags.c_contiguous:
        return _Part(name, *rows.shape, _file_reader(name, array))
    return _Part(name, *rows.shape, lambda start, stop: rows[start:stop])


def _stamp(path):
    """What changes when a file is written."""
    found = os.stat(path)
    return found.st_size, found.st_mtime_ns


def _file_reader(path, array):
    """(start, stop) -> rows of the ``.npy`` in C order that ``array`` maps, by plain reads: pages touched through a memory map
    would count as this process's memory."""
    stamp, dtype, offset, width = _stamp(path), array.dtype, array.offset, array.shape[-1]

    def read(start, stop):
        values = np.fromfile(path, dtype, (stop - start) * width, offset=offset + start * width * dtype.itemsize)
        if _stamp(path) != stamp:
            raise OSError(f"{path} changed while it was read")
        return values.reshape(-1, width)
    return read


def to_float32(rows, out):
    """Convert ``rows`` (n, D) into ``out``. For float16 torch is 10 times faster than numpy, and slices this small leave
    the threads of the training step alone."""
    rows = rows.astype(rows.dtype.newbyteorder("="), copy=not rows.flags.writeable)  # torch warns of memory it must not write to
    size = max(1, 32_767 // rows.shape[1])
    for start in range(0, len(rows), size):
        torch.from_numpy(out[start:start + size]).copy_(torch.from_numpy(rows[start:start + size]))


def read_npy(path):
    """The array in a ``.npy`` file, memory-mapped; ``ValueError`` if it is damaged or holds objects."""
    try:
        return np.lib.format.open_memmap(path, mode="r")
    except OSError:
        raise
    except Exception as error:  # numpy's parser raises whatever a damaged header leads it to
        raise ValueError(f"{path} is not a readable .npy file of numbers: {_one_line(error)}") from None


def prefetch(batches, pin=False, depth=8):
    """The same batches, made up to ``depth`` ahead by a background thread; in pinned memory for CUDA with ``pin``."""
    batches = iter(batches)

    def load():
        batch = next(batches, None)
        return batch.pin_memory() if pin and batch is not None else batch

    thread = ThreadPoolExecutor(1)
    ahead = collections.deque(thread.submit(load) for _ in range(depth))
    try:
        while (batch := ahead.popleft().result()) is not None:
            ahead.append(thread.submit(load))
            yield batch
    finally:
        thread.shutdown(cancel_futures=True)


def check_device(device):
    """``torch.device`` of the name ``device``; ``ValueError`` if this machine or this build of torch lacks it."""
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:
        raise ValueError(f"device {device!r:.100} is not available here: {_one_line(error)}") from None
    return torch.device(device)


def check_tensors(tensors, needed, where):
    """``ValueError`` unless the ``tensors`` are finite and have the names and kinds ``needed``, {"W_enc": "float32 (16, 32)", ...}."""
    for name in {**needed, **tensors}:
        found = dtype_and_shape(tensors[name]) if name in tensors else "none"
        _require(found == needed.get(name), f"{name} in {where} must be {needed.get(name, 'left out')}", found)
        _require(bool(tensors[name].isfinite().all()), f"{name} in {where} must be finite", "NaN or infinity")


def dtype_and_shape(tensor):
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def load_state(folder, origin):
    """What ``Trainer.load_state_dict`` needs of a run; ``ValueError`` names what of ``origin``, its settings and rows, differs."""
    path = Path(folder) / STATE
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no {STATE}, there is nothing to resume")
    try:
        with safe_open(path, "pt") as file:
            started = dict(json.loads(file.metadata()["origin"]))
            state = {name: file.get_tensor(name).clone() for name in file.keys()}  # aligned, as a run that was not cut has them
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    for name, value in json.loads(json.dumps(origin)).items():
        _require(started.get(name) == value, f"{name} must be as in the run to resume in {folder}, {started.get(name)}", value)
    return state


@contextlib.contextmanager
def metrics_file(folder, steps_done):
    """The open ``metrics.jsonl`` of a run, without lines from beyond ``steps_done``; None without a folder."""
    if folder is None:
        yield None
        return
    path = folder / METRICS
    lines = path.read_text(errors="replace").splitlines(keepends=True) if path.exists() else []
    try:
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= steps_done]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged, move it away to go on: {error}") from None
    write(path, "".join(kept))
    with open(path, "a") as file:
        yield file


def read_checkpoint(folder):
    """(OURS as float32 tensors, cfg, their file) of a folder in one of FORMATS; ``ValueError`` names what is foreign or damaged."""
    peer = (folder / AE).is_file() and not (folder / CONFIG).is_file()
    if not peer and not (folder / CONFIG).is_file():
        why = f"it has no {CONFIG}" if folder.is_dir() else "there is no such folder, and a Hub repository is named user/name"
        raise FileNotFoundError(f"{folder} is not a checkpoint: {why}")
    path, cfg = (folder / AE, {"architecture": DICT_CLASS, **SAELENS}) if peer else (folder / WEIGHTS, read_json(folder / CONFIG))
    architecture = cfg.get("architecture")
    _require(architecture in (*FORMATS,), f"{folder / CONFIG} must have one of the architectures {', '.join(FORMATS)}", repr(architecture))
    for key, needed in SAELENS.items():
        _require(cfg.get(key) == needed, f"{folder / CONFIG} must have {key} = {needed!r}", repr(cfg.get(key)))
    try:
        found = torch.load(path, "cpu", weights_only=True) if peer else load_file(path)
        names = FORMATS[architecture]
        _require(set(found) == set(names), f"{path} must hold the tensors {', '.join(names)}", ", ".join(found))
        tensors = {ours: found[theirs].float() for ours, theirs in zip(OURS, names)}
        if tensors["threshold"].ndim == 0:
            tensors["threshold"] = tensors["threshold"].repeat(len(tensors["b_enc"]))
        if peer:
            cfg = {"d_in": tensors["W_dec"].size(1), "d_sae": tensors["W_dec"].size(0),
                   "metadata": {"k": int(found["k"]), "prefixes": found["group_sizes"].cumsum(0).tolist()}}
        if cfg.get("rescale_acts_by_decoder_norm"):  # SAELens while it trains
            norm = tensors["W_dec"].norm(dim=1)
            tensors.update(W_enc=tensors["W_enc"] * norm, b_enc=tensors["b_enc"] * norm, W_dec=tensors["W_dec"] / norm[:, None])
    except (OSError, ValueError):
        raise
    except Exception as error:  # torch and safetensors raise whatever a damaged file leads them to
        raise ValueError(f"{path} is damaged or holds more than tensors: {type(error).__name__}: {_one_line(error)}") from None
    return tensors, cfg, path


def hub_folder(source, revision=None):
    """The folder ``source``; if there is none and it is a string "user/name", the downloaded checkpoint of that Hub repository."""
    if isinstance(source, Path) or Path(source).is_dir() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        _require(revision is None, f"revision must be given with a Hub repository alone, not with {source}", revision)
        return Path(source)
    try:
        commit = hub_file(source, CONFIG, revision).parent.name  # the cache has a folder per commit; both files are from one
        return hub_file(source, WEIGHTS, commit).parent
    except OSError as error:
        raise OSError(f"there is no folder {source} here, and on the Hub: {error}") from None


def hub_file(repo, name, revision=None, repo_type="model"):
    """Path of the file ``name`` of a Hub repository, downloaded to huggingface_hub's cache if it is not there yet.

    ``revision``: a branch, tag or commit. ``OSError``, of one line that says what to do, for every failure.
    """
    with hub_errors(f"{name} of the {repo_type} {repo}" + (f" at {revision}" if revision else "") + " cannot be read"):
        from huggingface_hub import hf_hub_download
        return Path(hf_hub_download(repo, name, revision=revision, repo_type=repo_type))


@contextlib.contextmanager
def hub_errors(what):
    """Turn whatever huggingface_hub raises inside into an ``OSError`` of one line: ``what``, why, and what to do."""
    try:
        yield
    except Exception as error:  # of its own, of its HTTP library, of Xet
        causes, why = [error], str(error).strip().split("\n")[0]
        while causes[-1].__cause__ or causes[-1].__context__:
            causes.append(causes[-1].__cause__ or causes[-1].__context__)
        answer = next((e.response for e in causes if getattr(e, "response", None) is not None), None)
        if answer is not None:
            status = answer.status_code
            why = HUB_ADVICE.get(answer.headers.get("X-Error-Code")) or HUB_ADVICE.get(min(status, 500)) or why
            why += f" (HTTP {status})"
        elif type(error).__name__ == "LocalTokenNotFoundError":
            why = HUB_ADVICE[401]
        elif isinstance(error, ImportError):
            why += ", pip install huggingface-hub"
        elif not isinstance(error, ValueError) and not getattr(error, "errno", None):  # its checks of names; the disk
            why = f"the connection to the Hub failed, check the network and try again ({str(causes[-1]).split(chr(10))[0]})"
        raise OSError(f"{what}: {why}") from None


def output_folder(path):
    """Create the folder ``path``; ``OSError`` if it is not writable."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not writable: choose another output folder")
    return folder


@contextlib.contextmanager
def claimed_folder(path, own=()):
    """Create the folder ``path`` and hold it; ``OSError`` if it holds more than those named in ``own`` (None: any), empty and cut files."""
    folder = output_folder(path)
    with locked(folder):
        foreign = sorted(f.name for f in folder.iterdir() if own is not None and f.name not in own
                         and not (f.name.startswith(".") and f.name.endswith(".tmp")) and (f.is_dir() or f.stat().st_size))
        if foreign:
            raise FileExistsError(f"{folder} is not empty, it holds {foreign[0]}: choose another output folder")
        yield folder


@contextlib.contextmanager
def locked(path):
    """Hold ``path``, a folder or a file to write, by a lock that ends with this process; ``OSError`` if another has it.

    Without effect on Windows and on file systems without locks.
    """
    if os.name != "posix":
        yield
        return
    import fcntl
    handle = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"{path} is in use by another run: wait for it, or choose another output") from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic(path):
    """Yield a temporary path to write; then fsync it and rename it to ``path``, which is the old file or the whole new one."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with locked(temporary):
            try:
                yield temporary
                with open(temporary, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary)):  # another file's
            raise
        raise OSError(f"{path} could not be written, the file there before is untouched: {error}") from None


def write(path, content):
    """Write bytes or text, and anything else as JSON; a reader sees the old file or the new one."""
    if not isinstance(content, (bytes, str)):
        content = json.dumps(content, indent=2) + "\n"
    with atomic(path) as temporary:
        temporary.write_bytes(content if isinstance(content, bytes) else content.encode())


def read_json(path):
    """The object in a JSON file; ``ValueError`` names the file and the place of the fault."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))  # Windows editors put a byte order mark
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    _require(isinstance(content, dict), f"{path} must hold a JSON object", type(content).__name__)
    return content
