"""A Matryoshka sparse autoencoder (SAE) in one file: nested dictionaries, trained as one set of
latents.

    encode (training)    pre  = relu((x - b_dec) @ W_enc + b_enc)
                         acts = the round(k B) largest entries of pre, the others 0
    encode (inference)   acts = pre * (pre > threshold)
    prefix p             recon_p = b_dec + acts[:, :p] @ W_dec[:p]
    nested loss          L = sum_p w_p mean_B |x - recon_p|^2,   sum_p w_p = 1

Every prefix of the latents has to reconstruct alone. So the early latents stay general and are not
absorbed by the specialised ones that follow. One prefix, of all latents, is the plain BatchTopK
SAE.

Shapes: B rows of a batch, D d_model, F n_latents, P prefixes, n_kept entries that a batch keeps.

Notable:
- A loss is one function (sae, x, step) -> (loss, codes). ``batch_loss`` is the literal formula,
  ``fast_loss`` the same value and gradients with one dense product, and the default. Pass your own.
- A checkpoint is a folder that SAELens opens as it is, for raw activations.
- Training goes on after a cut where it was, bit for bit on the CPU.
Not included: gated SAEs, transcoders, crosscoders.

Sections: 1 the autoencoder, 2 the loss, 3 the same loss, fast, 4 settings and trainer, 5 rows,
6 runs, 7 metrics, 8 the toy, 9 language models.

From arXiv: nested loss: Bussmann et al., 2503.17547; BatchTopK: Bussmann et al., 2412.06410; AuxK:
Gao et al., 2406.04093. From noanabeshima/matryoshka-saes: Pareto prefixes, energy order, the toy.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import inspect
import itertools
import json
import math
import mmap
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, distributed, nn

__version__ = "1.1.0"

Device = torch.device | str


def require(condition: Any, rule: str, value: Any) -> None:
    """``ValueError`` with the rule and the value that breaks it, in one line."""
    if not condition:
        raise ValueError(f"{rule}, got {value!s:.300}")


# ---------------------------------------------------------------------------------------------
# 1. The autoencoder: four parameters and a threshold, on disk in SAELens' JumpReLU format
# ---------------------------------------------------------------------------------------------

WEIGHTS = "sae_weights.safetensors"
CONFIG = "cfg.json"
LIMIT = "limit.safetensors"  # centre and radius, which SAELens does not know
# What SAELens calls the SAE below. Other values of these keys mean other computations.
SAELENS = {
    "architecture": "jumprelu",
    "normalize_activations": "none",
    "reshape_activations": "none",
}


class MatryoshkaSAE(nn.Module):
    """The SAE above. ``W_dec`` starts as random unit rows, ``W_enc`` as its transpose.

    ``prefixes``: rising lengths up to F, or fractions up to 1 (see ``prefix_lengths``)."""

    # Along which dimension each tensor lists the latents, for pruning, sorting and export. A new
    # parameter gets its entry here, and in ``fold_scale`` what becomes of it for raw rows.
    latent_dims = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "b_dec": None, "threshold": 0}

    def __init__(
        self,
        d_model: int,
        n_latents: int,
        prefixes: Sequence | None = None,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        W_dec = torch.randn(n_latents, d_model, generator=generator)
        W_dec = nn.functional.normalize(W_dec, dim=1)
        self.W_enc = nn.Parameter(W_dec.T.clone(memory_format=torch.contiguous_format))
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.W_dec = nn.Parameter(W_dec)
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("threshold", torch.zeros(n_latents))
        # raw rows beyond the radius were left out of training
        self.register_buffer("centre", torch.zeros(d_model), persistent=False)
        self.register_buffer("radius", torch.tensor(math.inf), persistent=False)
        self.prefixes = prefix_lengths(n_latents, prefixes)
        self.metadata: dict = {}  # what its checkpoint says of it

    def pre_acts(self, x: Tensor, prefix: int | None = None) -> Tensor:
        """``relu((x - b_dec) @ W_enc + b_enc)`` of ``prefix`` latents: (..., D) -> (..., p)."""
        width = len(self.b_dec)
        require(x.shape[-1:] == (width,), f"x must be {width} wide", tuple(x.shape))
        x = torch.as_tensor(x).to(self.b_dec.dtype) - self.b_dec
        return torch.relu(x @ self.W_enc[:, :prefix] + self.b_enc[:prefix])

    def encode(self, x: Tensor, prefix: int | None = None) -> Tensor:
        """``pre * (pre > threshold)`` of raw rows: (..., D) -> (..., F), or (..., prefix)."""
        if prefix is not None:
            n_latents = len(self.b_enc)
            require(1 <= prefix <= n_latents, f"prefix must lie in [1, {n_latents}]", prefix)
        pre = self.pre_acts(x, prefix)
        return pre * (pre > self.threshold[:prefix])

    def decode(self, acts: Tensor) -> Tensor:
        """``acts @ W_dec[:p] + b_dec``: (..., p) -> (..., D)."""
        return acts @ self.W_dec[: acts.shape[-1]] + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(self.encode(x))

    def covers(self, x: Tensor) -> Tensor:
        """Whether raw rows are like those of training: ``|x - centre| <= radius``, (..., D) ->
        (...)."""
        return (x.to(self.centre.dtype) - self.centre).norm(dim=-1) <= self.radius

    def splice(self, x: Tensor, prefix: int | None = None) -> Tensor:
        """``decode(encode(x))`` of the rows that it ``covers``, the others as they are: (..., D).

        Massive rows carry much of what a model does. Coded by an SAE that has never seen their
        like, they ruin its output."""
        recon = self.decode(self.encode(x, prefix))
        return torch.where(self.covers(x)[..., None], recon, x)

    @torch.no_grad()
    def fold_scale(self, scale: Tensor) -> None:
        """Turn this SAE, of rows ``x / scale``, in place into one of raw ``x``; ``scale`` is (D,).

        Decoder rows stay unit: their length goes over into the codes and what makes them."""
        self.b_dec *= scale
        self.W_enc /= scale[:, None]
        self.W_dec *= scale
        length = self.W_dec.norm(dim=1)
        self.W_dec /= length[:, None]
        self.W_enc *= length
        self.b_enc *= length
        self.threshold *= length

    def save(self, folder: Path | str) -> None:
        """Write weights and ``cfg.json`` into ``folder``, for SAELens 6's ``load_from_disk``."""
        # without a version SAELens drops the metadata
        metadata = {**self.metadata, "sae_lens_version": "6.0.0", "prefixes": list(self.prefixes)}
        cfg = {
            **SAELENS,
            "d_in": len(self.b_dec),
            "d_sae": len(self.b_enc),
            "dtype": "float32",
            "apply_b_dec_to_input": True,
            "device": "cpu",
            "metadata": metadata,
        }
        tensors = {}
        for name, tensor in self.state_dict().items():
            tensors[name] = tensor.float().cpu().contiguous()
        Path(folder).mkdir(parents=True, exist_ok=True)
        write(Path(folder, WEIGHTS), safetensors.torch.save(tensors))
        limit = {"centre": self.centre.cpu(), "radius": self.radius.cpu()}
        write(Path(folder, LIMIT), safetensors.torch.save(limit))
        write(Path(folder, CONFIG), cfg)

    @classmethod
    def load(cls, source: Path | str, device: Device = "cpu", revision: str | None = None):
        """Read a JumpReLU SAE, of ``save`` or of SAELens, from a folder or the Hub's "user/name".

        A folder of that name wins. ``ValueError`` for another architecture, damaged files, or
        weights that are not finite; ``OSError`` for what is not there."""
        if is_on_hub(source):
            folder = download(source, [CONFIG, WEIGHTS, LIMIT], revision)
        else:
            folder = Path(source)
            require(not revision, f"revision needs a Hub repository, {source} is none", revision)
        with reading(folder, "a JumpReLU checkpoint of SAELens"):
            cfg = json.loads((folder / CONFIG).read_text())
            for name, needed in SAELENS.items():
                found = cfg.get(name, "none")  # older files lack reshape_activations
                require(found == needed, f"{name} must be {needed}", repr(found))
            metadata = {"prefixes": [cfg["d_sae"]], **(cfg.get("metadata") or {})}
            prefixes = metadata.pop("prefixes")
            sae = cls(cfg["d_in"], cfg["d_sae"], prefixes, torch.Generator())
            sae.load_state_dict(safetensors.torch.load_file(folder / WEIGHTS))
            for name, tensor in sae.state_dict().items():
                require(tensor.isfinite().all(), f"{name} must be finite", "NaN or infinity")
            if (folder / LIMIT).exists():
                limit = safetensors.torch.load_file(folder / LIMIT)
                sae.centre.copy_(limit["centre"])
                sae.radius.copy_(limit["radius"])
        if not cfg.get("apply_b_dec_to_input", True):
            # its x @ W_enc is our (x - b_dec) @ W_enc + b_dec @ W_enc
            sae.b_enc.data += sae.b_dec.data @ sae.W_enc.data
        metadata.pop("sae_lens_version", None)
        sae.metadata = metadata
        return sae.to(device)


def is_on_hub(source: Path | str) -> bool:
    """Whether this names a Hub repository, "user/name", and there is no folder "user"."""
    if not isinstance(source, str) or source.count("/") != 1:
        return False
    return not Path(source).parent.is_dir()


# ---------------------------------------------------------------------------------------------
# 2. The loss, literally: prefixes, selection, nested loss, AuxK; autograd gives the gradients
# ---------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """What one optimizer step asks of its loss. A loss uses of it what it likes."""

    number: int  # steps done before this one
    n_kept: int  # entries of the batch to keep: round(k B)
    prefixes: tuple[int, ...]  # rising, the last is F
    weights: tuple[float, ...]  # w_p, one a prefix, sum 1
    dead: Tensor  # (m,) latents that have not fired for long
    aux_coef: float  # weight of the AuxK loss
    cut: Tensor  # smallest entry that the last step kept, 0 before the first
    memory: dict[str, Tensor]  # the gradients of the last step, for ``fast_loss`` to write over


class Codes(NamedTuple):
    """The entries of a batch (B, F) that a loss kept."""

    values: Tensor  # (n_kept,), without gradient
    index: Tensor  # (n_kept,) row-major positions, row * F + latent, rising

    @classmethod
    def of(cls, acts: Tensor) -> "Codes":
        """The positive entries of dense codes (B, F)."""
        flat = acts.detach().flatten()
        index = flat.nonzero().squeeze(1)
        return cls(flat[index], index)


def prefix_lengths(n_latents: int, prefixes: Sequence | None = None) -> tuple[int, ...]:
    """Rising lengths up to ``n_latents``, from such lengths or from fractions up to 1.

    Default: 1/16, 1/8, 1/4, 1/2, 1 (Bussmann et al.). ``ValueError`` where they do not rise to the
    end."""
    given = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0) if prefixes is None else tuple(prefixes)
    rule = f"prefixes must rise to {n_latents}, or to 1"
    require(all(a < b for a, b in itertools.pairwise((0, *given))), rule, given)
    if given[-1:] == (n_latents,) and all(p == int(p) for p in given):
        return tuple(int(p) for p in given)
    require(given[-1:] == (1,), rule, given)
    lengths = {max(1, round(fraction * n_latents)) for fraction in given}
    return tuple(sorted(lengths))


def sample_prefixes(
    n_latents: int, n_prefixes: int, power: float = 0.5, generator: torch.Generator | None = None
) -> tuple[int, ...]:
    """F and ``n_prefixes - 1`` shorter lengths, drawn by ``P(L) ~ L^power - (L-1)^power``.

    Pareto prefixes: a power towards 0 favours short ones, 1 is uniform."""
    weights = (torch.arange(n_latents, dtype=torch.float64) ** power).diff()
    drawn = torch.multinomial(weights, n_prefixes - 1, generator=generator) + 1
    return (*sorted(drawn.tolist()), n_latents)


def batch_topk(pre: Tensor, n_kept: int) -> tuple[Tensor, Tensor]:
    """The ``n_kept`` largest entries of all ``pre`` (B, F), and their row-major positions,
    rising."""
    values, index = pre.flatten().topk(min(n_kept, pre.numel()))
    index, by_position = index.sort()
    return values[by_position], index


def nested_loss(
    x: Tensor,
    acts: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    prefixes: Sequence[int],
    weights: Sequence[float] | None = None,
) -> Tensor:
    """``sum_p w_p mean_B |x - b_dec - acts[:, :p] @ W_dec[:p]|^2``, a scalar.

    ``x`` (B, D), ``acts`` (B, F); ``prefixes`` end in F, weights default to 1/P. The peers weigh
    differently, so their learning rates do not transfer (docs/details.md)."""
    if weights is None:
        weights = [1 / len(prefixes)] * len(prefixes)
    sizes = np.diff(prefixes, prepend=0).tolist()
    recon = b_dec
    loss = x.new_zeros(())
    groups = zip(acts.split(sizes, dim=1), W_dec.split(sizes), weights, strict=True)
    for group_acts, group_rows, weight in groups:
        recon = recon + group_acts @ group_rows
        loss = loss + weight * (x - recon).pow(2).sum(dim=1).mean()
    return loss


def aux_loss(x: Tensor, residual: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor) -> Tensor:
    """AuxK: ``mean |residual - a @ W_dec|^2 / mean |residual - mean|^2``, a scalar, about 1.

    ``x`` is without ``b_dec``, ``residual`` (B, D) a constant, the weights are those of the m dead
    latents alone; ``a`` keeps in each row the ``min(D / 2, m)`` largest of ``relu(x @ W_enc +
    b_enc)``. So the dead latents learn what the living ones leave. Gao et al. 2024, section A.2."""
    pre = torch.relu(x @ W_enc + b_enc)  # (B, m)
    n_active = min(max(1, x.shape[1] // 2), len(b_enc))
    values, index = pre.topk(n_active, dim=1, sorted=False)
    recon = torch.zeros_like(pre).scatter(1, index, values) @ W_dec
    variance = (residual - residual.mean(dim=0)).pow(2).sum(dim=1).mean()
    return (residual - recon).pow(2).sum(dim=1).mean() / variance.clamp_min(1e-12)


def batch_loss(sae: MatryoshkaSAE, x: Tensor, step: Step) -> tuple[Tensor, Codes]:
    """``nested_loss`` by the ``n_kept`` largest codes of x (B, D), + ``aux_coef * aux_loss``."""
    pre = sae.pre_acts(x)
    values, index = batch_topk(pre, step.n_kept)
    acts = torch.zeros_like(pre).flatten().scatter(0, index, values).view_as(pre)
    loss = nested_loss(x, acts, sae.W_dec, sae.b_dec, step.prefixes, step.weights)
    if len(step.dead) > 0 and step.aux_coef > 0:
        residual = (x - sae.decode(acts)).detach()
        dead = step.dead
        dead_weights = sae.W_enc[:, dead], sae.b_enc[dead], sae.W_dec[dead]
        revival = aux_loss(x - sae.b_dec.detach(), residual, *dead_weights)
        loss = loss + step.aux_coef * revival
    return loss, Codes(values.detach().float(), index)


# ---------------------------------------------------------------------------------------------
# 3. The same loss, fast: only k / F of the entries survive, so each product but the encoder's
#    becomes a sum over them, in float32; float16 then needs no loss scale
# ---------------------------------------------------------------------------------------------

# Numbers that stay in a core's cache until they are used next: 2 MiB of float32.
CACHED = 1 << 19


def fast_loss(sae: MatryoshkaSAE, x: Tensor, step: Step) -> tuple[Tensor, Codes]:
    """``batch_loss``: the same value, the same gradients of the parameters (none of ``x``), with
    one dense product instead of six.

    ``ValueError`` for an SAE with other parameters, and for prefixes or weights that do not fit."""
    known = ("W_enc", "b_enc", "W_dec", "b_dec")
    for name, _ in sae.named_parameters():
        if name not in known:
            raise ValueError(f"fast_loss knows no gradient of {name}: train with loss=batch_loss")
    n_latents = len(sae.b_enc)
    require(step.prefixes[-1] == n_latents, f"prefixes must end with {n_latents}", step.prefixes)
    rule = f"weights must be {len(step.prefixes)}, one a prefix"
    require(len(step.weights) == len(step.prefixes), rule, step.weights)
    parameters = (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
    loss, values, index = _FastLoss.apply(x, step, *parameters)
    return loss, Codes(values, index)


@torch.no_grad()
def check_fast_loss(sae: MatryoshkaSAE, x: Tensor, step: Step) -> None:
    """``ValueError`` if ``fast_loss`` of rows ``x`` is not ``batch_loss``, as after a change of
    one."""
    fast, _ = fast_loss(sae, x, step)
    literal, _ = batch_loss(sae, x, step)
    if not torch.isclose(fast, literal, rtol=1e-3):
        losses = f"{float(fast):.6g} for {float(literal):.6g}"
        raise ValueError(f"fast_loss is not batch_loss: {losses}; train with loss=batch_loss")


class _FastLoss(torch.autograd.Function):
    """Gradients in closed form: ``forward`` finds those of the codes, ``backward`` sums them."""

    @staticmethod
    def forward(ctx, x, step, W_enc, b_enc, W_dec, b_dec):
        ctx.in_tiles = in_tiles(x)
        x = x - b_dec
        select = topk_in_tiles if ctx.in_tiles else topk_at_once
        values, index = select(x, W_enc, b_enc, step.n_kept, step.cut)
        G = take_memory(step.memory, "G", (len(x), len(step.prefixes), x.shape[1]), x)
        ctx.dW_enc = take_memory(step.memory, "W_enc", W_enc.shape, x)
        ctx.dW_dec = take_memory(step.memory, "W_dec", W_dec.shape, x)
        with autocast(x.device, "float32"):
            loss, d_values, latent, row_group = nested_gradients(x, values, index, W_dec, step, G)
        ctx.dead_grads = ()
        if len(step.dead) > 0 and step.aux_coef > 0:
            residual = x - decode_entries(values, index, W_dec, len(x))
            revival, ctx.dead_grads = aux_gradients(x, residual, step.dead, W_enc, b_enc, W_dec)
            loss = loss + step.aux_coef * revival
        ctx.step = step
        ctx.save_for_backward(x, values, d_values, latent, row_group, G, W_enc)
        ctx.mark_non_differentiable(values, index)
        return loss, values, index

    @staticmethod
    def backward(ctx, d_loss, *_):
        x, values, d_values, latent, row_group, G, W_enc = ctx.saved_tensors
        n_groups = G.shape[1]
        values = values * d_loss
        d_values = d_values * d_loss
        dW_enc, dW_dec = ctx.dW_enc, ctx.dW_dec
        ctx.dW_enc = ctx.dW_dec = None  # autograd copies what somebody else holds

        latent, by_latent = latent.sort(stable=True)
        row_group = row_group[by_latent]
        starts = torch.searchsorted(latent, torch.arange(len(dW_dec) + 1, device=x.device))
        # dW_dec = acts_j.T @ G_j for the latents of group j; dW_enc = x.T @ d_pre
        sums_by_latent(dW_dec, values[by_latent], row_group, starts, G.flatten(0, 1), ctx.in_tiles)
        row = row_group // n_groups
        sums_by_latent(dW_enc.T, d_values[by_latent], row, starts, x, ctx.in_tiles)
        db_enc = x.new_zeros(len(dW_dec)).index_add_(0, latent, d_values[by_latent])
        # b_dec is added to every reconstruction and taken from every input
        db_dec = G[:, 0].sum(dim=0) * d_loss - W_enc @ db_enc

        if ctx.dead_grads:
            share = ctx.step.aux_coef / len(x)
            targets = ((dW_enc, 1), (db_enc, 0), (dW_dec, 0))
            for (grad, dim), dead_grad in zip(targets, ctx.dead_grads, strict=True):
                grad.index_add_(dim, ctx.step.dead, dead_grad * d_loss, alpha=share)
        ctx.step.memory["G"] = G
        return None, None, dW_enc, db_enc, dW_dec, db_dec


def take_memory(memory: dict[str, Tensor], name: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """An unfilled tensor: what ``memory`` keeps under that name, if it fits, else new.

    Fresh memory costs a page fault every 4 KiB: 15 % of a step at F = 24,576."""
    kept = memory.pop(name, None)
    if kept is not None and kept.shape == tuple(shape):
        return kept
    return torch.empty(shape, dtype=like.dtype, device=like.device)


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Products in ``dtype``, "float32" as they are, where the device knows ``torch.autocast``."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, getattr(torch, dtype), enabled=dtype != "float32")


def in_tiles(x: Tensor) -> bool:
    """Whether to work in tiles that stay in the cache: on a CPU in float32. Else at once."""
    return x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def topk_at_once(x: Tensor, W_enc: Tensor, b_enc: Tensor, n_kept: int, cut: Tensor | None = None):
    """``batch_topk`` of ``relu(x @ W_enc + b_enc)``, in float32. Waits for no value of a GPU."""
    values, index = batch_topk(torch.addmm(b_enc, x, W_enc), n_kept)
    return values.float().clamp_min(0), index


def topk_in_tiles(x: Tensor, W_enc: Tensor, b_enc: Tensor, n_kept: int, cut: Tensor):
    """The same on a CPU, faster: the one dense product of a step is made some latents at a time,
    and only entries above 0.9 of the ``cut``, the smallest of the last step, are looked at again.

    Exact: where too few lie above, all are made anew. 0.9, since the cut moves little in a step."""
    n_rows = len(x)
    n_latents = len(b_enc)
    if cut <= 0:
        return topk_at_once(x, W_enc, b_enc, n_kept)
    width = max(1, 4 * CACHED // n_rows)  # 4: each number is read just once
    found_values, found_index = [], []
    for start in range(0, n_latents, width):
        tile = slice(start, start + width)
        pre = torch.addmm(b_enc[tile], x, W_enc[:, tile])
        # numpy finds the places among 6 million numbers in 3 ms, torch in 14
        above = np.flatnonzero((pre > 0.9 * cut).numpy())
        row, latent = np.divmod(above, pre.shape[1])
        found_values.append(pre.numpy().ravel()[above])
        found_index.append(row * n_latents + latent + start)
    values = np.concatenate(found_values)
    if len(values) < n_kept:
        return topk_at_once(x, W_enc, b_enc, n_kept)
    largest = np.argpartition(values, -n_kept)[-n_kept:]
    index = torch.from_numpy(np.concatenate(found_index)[largest])
    index, by_position = index.sort()
    return torch.from_numpy(values[largest])[by_position], index


def weighted_row_sums(values: Tensor | None, index: Tensor, starts: Tensor, rows: Tensor) -> Tensor:
    """For each j: ``sum_i values[i] * rows[index[i]]`` over ``starts[j] <= i < starts[j + 1]``."""
    bags = starts[:-1]
    return nn.functional.embedding_bag(index, rows, bags, mode="sum", per_sample_weights=values)


def decode_entries(values: Tensor, index: Tensor, W_dec: Tensor, n_rows: int) -> Tensor:
    """``acts @ W_dec`` (B, D) of ``values`` at row-major positions ``index``, rising."""
    n_latents = len(W_dec)
    first_of_row = torch.arange(n_rows + 1, device=index.device)
    starts = torch.searchsorted(index // n_latents, first_of_row)
    return weighted_row_sums(values, index % n_latents, starts, W_dec)


def nested_gradients(
    x: Tensor, values: Tensor, index: Tensor, W_dec: Tensor, step: Step, G: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``nested_loss`` of sparse codes and its gradients; ``x`` (B, D) is without ``b_dec``.

    The latents between two prefixes are a group. In row b, group j decodes to ``R_j``; ``R_1``
    takes ``-x`` in. So level l, the groups up to l, leaves the residual ``sum_{j <= l} R_j``, and
    the loss is a quadratic form:

        L = 1/2 sum_b sum_ij K_ij <R_i, R_j>,   K_ij = 2/B sum_{l >= max(i, j)} w_l
        dL/dR = G = K R,    so   L = 1/2 sum_b sum_j <G_j, R_j>
        dL/dvalue = <G_j, W_dec[latent]>,   so   L = 1/2 (sum value dL/dvalue - sum_b <G_1, x>)

    Fills ``G`` (B, P, D). Returns the loss, and d_values, latent and row_group = row * P + group,
    each (n_kept,)."""
    n_rows, n_groups, d_model = G.shape
    device = x.device
    latent = index % len(W_dec)
    prefixes = torch.tensor(step.prefixes).to(device, non_blocking=True)
    group = torch.bucketize(latent, prefixes, right=True)
    row_group = index // len(W_dec) * n_groups + group
    starts = torch.searchsorted(row_group, torch.arange(n_rows * n_groups + 1, device=device))

    weight_from = [2 / n_rows * sum(step.weights[level:]) for level in range(n_groups)]
    weight_from = torch.tensor(weight_from).to(device, non_blocking=True)
    K = torch.minimum(weight_from, weight_from[:, None]).to(x.dtype)

    # On a CPU in parts of 16 MiB, which the allocator uses again; larger ones are fresh memory.
    n_part = max(1, 8 * CACHED // (n_groups * d_model)) if device.type == "cpu" else n_rows
    d_values = torch.empty_like(values)
    entry = 0
    for first_row in range(0, n_rows, n_part):
        rows = slice(first_row, first_row + n_part)
        bags = starts[first_row * n_groups : (first_row + n_part) * n_groups + 1]
        is_last = first_row + n_part >= n_rows
        end = len(values) if is_last else int(bags[-1])
        entries = slice(entry, end)
        with torch.enable_grad():
            leaf = values[entries].detach().requires_grad_()
            decoded = weighted_row_sums(leaf, latent[entries], bags - entry, W_dec.detach())
        R = decoded.detach().view_as(G[rows])
        R[:, 0] -= x[rows]
        torch.matmul(K, R, out=G[rows])
        # autograd has <G_j, W_dec[latent]>, entry by entry, as the gradient of the sums
        d_values[entries] = torch.autograd.grad(decoded, leaf, G[rows].flatten(0, 1))[0]
        entry = end
    d_values *= values > 0
    loss = (values @ d_values - torch.linalg.vecdot(G[:, 0], x).sum()) / 2
    return loss, d_values, latent, row_group


def aux_gradients(
    x: Tensor, residual: Tensor, dead: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """``aux_loss`` and B times its gradients for the dead latents' part of W_enc, b_enc and W_dec.

    On copies of their rows: through the whole matrices, autograd would fill as large ones with
    zeros. Times B, as float16 would lose the gradients of a mean."""
    parts = (W_enc.index_select(1, dead), b_enc.index_select(0, dead), W_dec.index_select(0, dead))
    with torch.enable_grad():
        leaves = [part.detach().requires_grad_() for part in parts]
        loss = aux_loss(x, residual, *leaves)
        grads = torch.autograd.grad(len(x) * loss, leaves)
    return loss.detach(), grads


def sums_by_latent(
    out: Tensor, values: Tensor, index: Tensor, starts: Tensor, rows: Tensor, tiled: bool
) -> None:
    """``weighted_row_sums`` of the entries of each latent into ``out`` (F, D).

    ``tiled``: in parts that stay in a CPU's cache, the sums and where they go (hence / 2). Else
    at once; as one thread of a GPU walks a whole sum, in two stages, the first of at most 64 terms
    each."""
    if tiled:
        size = max(1, CACHED // 2 // out.shape[1])
        for first in range(0, len(out), size):
            bags = starts[first : first + size + 1]
            entries = slice(int(bags[0]), int(bags[-1]))
            sums = weighted_row_sums(values[entries], index[entries], bags - bags[0], rows)
            out[first : first + size] = sums
        return
    every_64 = torch.arange(0, len(index), 64, device=out.device)
    cuts = torch.cat([starts, every_64]).sort().values
    partial_sums = weighted_row_sums(values, index, cuts, rows)
    numbers = torch.arange(len(cuts) - 1, device=out.device)
    out.copy_(weighted_row_sums(None, numbers, torch.searchsorted(cuts, starts), partial_sums))


# ---------------------------------------------------------------------------------------------
# 4. Settings and trainer: a step, its schedules, and what is kept between steps
# ---------------------------------------------------------------------------------------------

LARGEST = 2**63 - 1  # what torch takes for a whole number


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """All settings of a run; with its rows they fix the weights. ``ValueError`` names bad ones."""

    n_latents: int
    k: float = 30.0  # active latents per row, on average; need not be whole
    prefixes: tuple | None = None  # lengths, or fractions; None: 1/16, 1/8, 1/4, 1/2, 1
    n_prefixes: int | None = None  # instead: sample this many at every step (Pareto)
    pareto_power: float = 0.5  # towards 0 favours short prefixes, 1 is uniform
    level_weights: tuple | None = None  # w_p, scaled to sum 1; None: all equal
    order: str = "stored"  # "energy": latents are sorted by their mean square
    batch_size: int = 2048  # rows
    steps: int = 10_000
    lr: float | None = None  # Adam's peak rate; None: by n_latents, batch_size and steps
    betas: tuple = (0.9, 0.999)
    warmup_steps: int | None = None  # of linear rise; None: a tenth of the steps, at most 1000
    decay_fraction: float = 0.2  # of the steps, at the end, of linear fall to 0
    k_start: float | None = None  # at step 0, moving linearly to k over k_anneal_steps; None: k
    k_anneal_steps: int = 0  # at least 1 with k_start
    n_latents_start: int | None = None  # with spare ones, of which the least energetic go
    prune_window: tuple = (0.2, 0.6)  # fractions of the steps between which they go
    aux_coef: float = 1 / 32  # weight of the loss that revives dead latents
    dead_after: int = 200_000  # rows without firing that make a latent dead
    clip: float = 1.0  # largest norm of the whole gradient
    max_norm: float = 10.0  # rows further from the median one, in median distances, are left out
    dtype: str | None = None  # of the products: float32, bfloat16, float16; None: by device
    seed: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # of JSON
                object.__setattr__(self, field.name, tuple(value))
            elif isinstance(value, np.generic):
                object.__setattr__(self, field.name, value.item())
        n_latents = self.n_latents
        for name in ("n_latents", "batch_size", "steps", "dead_after"):
            self._check(name, 1, whole=True)
        self._check("seed", 0, whole=True)
        self._check("k", 0, n_latents)
        self._check("k_start", 1e-12, n_latents)
        self._check("k_anneal_steps", 0 if self.k_start is None else 1, whole=True)
        least_k = min(self.k, self.k_at(0))
        n_kept = round(least_k * self.batch_size)
        require(n_kept >= 1, "k must keep at least one entry of a batch", least_k)
        self._check("n_latents_start", n_latents, whole=True)
        self._check_list("prune_window", 0, 1, length=2)
        begin, end = self.prune_window
        require(begin < end, "prune_window must rise", self.prune_window)
        if self.lr is None:  # sweeps: docs/details.md
            rate = 0.0165 * (self.batch_size / self.steps) ** 0.25 / n_latents ** (1 / 6)
            object.__setattr__(self, "lr", min(0.01, rate))
        self._check("lr", 1e-12)
        self._check_list("betas", 0, 1 - 1e-9, length=2)
        self._check("warmup_steps", 0, whole=True)
        self._check("decay_fraction", 0, 1)
        self._check("aux_coef", 0)
        self._check("clip", 1e-12)
        self._check("max_norm", 1)
        dtypes = (None, "float32", "bfloat16", "float16")
        require(self.dtype in dtypes, f"dtype must be one of {dtypes}", repr(self.dtype))
        orders = ("stored", "energy")
        require(self.order in orders, f"order must be one of {orders}", repr(self.order))
        self._check_list("prefixes", 0)
        self._check("n_prefixes", 2, n_latents, whole=True)
        if self.n_prefixes is not None:
            require(self.prefixes is None, "n_prefixes must not come with prefixes", self.prefixes)
        self._check("pareto_power", 1e-9, 1)
        self._check_list("level_weights", 0, length=self.n_levels())
        if self.level_weights is not None:
            require(any(self.level_weights), "level_weights must not all be 0", self.level_weights)

    def _check(self, name: str, low: float, high: float = LARGEST, whole: bool = False):
        """A setting is a number in [low, high], or None where that is the default."""
        value = getattr(self, name)
        if value is None and type(self).__dataclass_fields__[name].default is None:
            return
        kind = int if whole else int | float
        rule = f"{name} must be a {'whole ' * whole}number in [{low}, {high}]"
        require(isinstance(value, kind), rule, repr(value))
        require(not isinstance(value, bool), rule, value)
        require(low <= value <= high, rule, value)

    def _check_list(self, name: str, low: float, high: float = LARGEST, length: int | None = None):
        """A setting is a list of numbers in [low, high], or None where that is the default."""
        values = getattr(self, name)
        if values is None and type(self).__dataclass_fields__[name].default is None:
            return
        require(isinstance(values, tuple), f"{name} must be a list of numbers", repr(values))
        require(length in (None, len(values)), f"{name} must be {length} numbers", values)
        rule = f"{name} must hold numbers in [{low}, {high}]"
        for value in values:
            require(isinstance(value, int | float), rule, values)
            require(low <= value <= high, rule, values)

    def vanilla(self) -> "TrainConfig":
        """The plain BatchTopK twin: one prefix, of all latents; everything else equal."""
        one_level = {"prefixes": (self.n_latents,), "n_prefixes": None, "level_weights": None}
        return dataclasses.replace(self, **one_level)

    def prefix_lengths(self) -> tuple[int, ...]:
        """Prefix lengths of the finished SAE: those of training, the default ones where sampled."""
        return prefix_lengths(self.n_latents, self.prefixes)

    def n_levels(self) -> int:
        """Prefixes at each step of training."""
        return self.n_prefixes or len(self.prefix_lengths())

    def weights(self) -> tuple[float, ...]:
        """Level weights ``w_p``, one a prefix, which sum to 1."""
        given = self.level_weights or (1,) * self.n_levels()
        return tuple(weight / sum(given) for weight in given)

    def lr_at(self, step: int) -> float:
        """Learning rate of step ``step`` (from 0): linear rise, constant, linear decay to 0."""
        warmup = min(self.steps // 10, 1000)
        if self.warmup_steps is not None:
            warmup = self.warmup_steps
        rise = (step + 1) / warmup if step < warmup else 1.0
        fall = (self.steps - step) / max(self.decay_fraction * self.steps, 1.0)
        return self.lr * min(rise, fall, 1.0)

    def k_at(self, step: int) -> float:
        """Active latents per row at step number ``step``."""
        if self.k_start is None or step >= self.k_anneal_steps:
            return self.k
        return self.k_start + (self.k - self.k_start) * step / self.k_anneal_steps

    def latents_at(self, step: int) -> int:
        """Number of latents at step number ``step``, spare ones included.

        They go in groups, as each time all weights are copied: ten groups, or more of at most
        64."""
        n_spare = (self.n_latents_start or self.n_latents) - self.n_latents
        group = max(1, min(64, n_spare // 10))
        begin, end = self.prune_window
        share = (end * self.steps - step) / ((end - begin) * self.steps)
        n_groups = math.ceil(n_spare / group * min(max(share, 0.0), 1.0))
        return self.n_latents + min(n_spare, n_groups * group)


Loss = Callable[[MatryoshkaSAE, Tensor, Step], tuple[Tensor, Codes]]


class Trainer:
    """An SAE in training: ``step(x)`` takes an optimizer step, ``export()`` gives the SAE to keep.

    ``trainer.sae`` is trained on ``x / scale``; ``scale`` is a number or one a dimension. It starts
    with ``b_dec = mean / scale``: a large mean would silence latents. ``cut``, the smallest entry
    that the last batch kept, stands for the threshold in training. ``loss``: ``fast_loss``,
    ``batch_loss`` or a function of yours, (sae, x, step) -> (scalar, ``Codes``). ``calibrate``: the
    threshold of the exported SAE keeps k latents a row; for a loss without top-k turn it off, and
    the threshold is that of ``trainer.sae``, 0 unless the loss moves it."""

    def __init__(
        self,
        cfg: TrainConfig,
        d_model: int,
        device: Device = "cpu",
        mean: Tensor | float = 0.0,
        scale: Tensor | float = 1.0,
        loss: Loss = fast_loss,
        calibrate: bool = True,
    ):
        self.cfg = cfg
        self.loss = loss
        self.calibrates = calibrate
        self.calibration_rows: Tensor | None = None  # raw (n, D), not trained on
        self.limit = (0.0, math.inf)  # centre and radius of the rows that are trained on
        self.device = torch.empty(0, device=device).device  # of cuda, cuda:0
        self.scale = torch.as_tensor(scale).float().expand(d_model).to(self.device)
        self.dtype = cfg.dtype
        if self.dtype is None:
            self.dtype = default_dtype(self.device, loss)

        generator = torch.Generator().manual_seed(cfg.seed)
        sae = MatryoshkaSAE(d_model, cfg.latents_at(0), None, generator)
        self.sae = sae.to(self.device, torch.float32)
        self.sae.b_dec.data += torch.as_tensor(mean).float().to(self.device) / self.scale
        for name in self.sae.state_dict():
            if name not in self.sae.latent_dims:
                raise ValueError(f"latent_dims must say where {name} lists the latents")
        # About a rare latent's gradient: a smaller eps would let Adam take full steps on noise.
        eps = 1.5e-5 * cfg.k / cfg.n_latents
        betas = tuple(float(beta) for beta in cfg.betas)
        fused = self.device.type in ("cpu", "cuda")
        self.optimizer = torch.optim.Adam(self.sae.parameters(), 0.0, betas, eps, fused=fused)

        self.stop = False  # a wish to end the run; of several processes, whether any has it
        self.steps_done = 0
        self.energy = torch.zeros_like(self.sae.b_enc.data)  # running mean of acts^2
        # rows since each latent fired
        self.rows_silent = torch.zeros_like(self.energy, dtype=torch.long)
        self.cut = self.energy.new_zeros(())  # smallest entry kept by the last step
        self.dead = self.rows_silent[:0]  # latents that are silent for long
        # Their number is a value to wait for on a GPU, so it is asked for rarely there.
        self.steps_per_dead_list = 1 if self.device.type == "cpu" else 10
        self.memory: dict[str, Tensor] = {}  # the last step's gradients, to be written over

    @classmethod
    def on(
        cls,
        rows: Any,
        cfg: TrainConfig,
        device: Device = "cpu",
        held_out: "Rows | None" = None,
        loss: Loss = fast_loss,
        calibrate: bool = True,
    ) -> "Trainer":
        """A trainer with mean and scale of a sample of ``rows`` (see ``Rows``), calibrated on
        ``held_out`` rows.

        The scale is the rms distance of the rows from their mean. Dimensions of more than 10 times
        the median spread are scaled down to that, as they would hide all others. Without
        ``held_out`` rows the sample calibrates; trained on, it lets a little less than k pass.
        ``ValueError`` for rows that are all equal, or beyond 1e18."""
        rows = as_source(rows, cfg.max_norm)
        sample = rows.sample(cfg.seed)
        mean = sample.mean(dim=0, dtype=torch.float64)
        spread = (sample - mean).norm(dim=0) / len(sample) ** 0.5  # (D,)
        distance = float(spread.norm())
        least = max(1e-18, 1e-6 * float(mean.norm()))
        rule = f"rows must differ, by an rms distance in ({least:.1g}, 1e18)"
        require(least < distance < 1e18, rule, distance)
        median = spread[spread > 0].median()
        stretch = (spread / (10 * median)).clamp_min(1.0)
        scale = stretch * (spread / stretch).norm()
        trainer = cls(cfg, rows.d_model, device, mean, scale, loss, calibrate)
        trainer.calibration_rows = sample if held_out is None else held_out.read()
        trainer.limit = (rows.centre, rows.radius)
        if loss is fast_loss:
            x = sample[:64].to(trainer.device) / trainer.scale
            check_fast_loss(trainer.sae, x, trainer.next_step(len(x)))
        return trainer

    @torch.inference_mode(False)
    @torch.enable_grad()
    def step(self, x: Tensor) -> Tensor:
        """Take one optimizer step on raw rows ``x`` (B, D); return the loss, on the device."""
        x = torch.as_tensor(x).to(self.device, torch.float32, non_blocking=True) / self.scale
        self.recycle_gradients()
        with autocast(self.device, self.dtype):
            result = self.loss(self.sae, x, self.next_step(len(x)))
        if not isinstance(result, tuple) or not isinstance(result[-1], Codes):
            raise ValueError(f"a loss must return (scalar, Codes), got {type(result).__name__}")
        loss, codes = result
        self.memory.clear()  # what a loss has not taken would be held in vain
        loss.backward()
        loss = self.observe(loss.detach(), codes, len(x))
        self.update_weights()
        self.steps_done += 1
        self.prune_and_sort()
        if self.steps_done % self.steps_per_dead_list == 0:
            self.find_dead()
        return loss

    def recycle_gradients(self):
        for name, parameter in self.sae.named_parameters():
            if parameter.grad is not None:
                self.memory[name] = parameter.grad
                parameter.grad = None

    def next_step(self, n_rows: int) -> Step:
        """What the next step, on ``n_rows`` rows, asks of its loss."""
        cfg = self.cfg
        lengths = cfg.prefix_lengths()
        if cfg.n_prefixes is not None:
            # seeded by the step's number, so that a resumed run draws the same
            seed = np.random.SeedSequence((cfg.seed, self.steps_done)).generate_state(1)[0]
            generator = torch.Generator().manual_seed(int(seed))
            lengths = sample_prefixes(cfg.n_latents, cfg.n_prefixes, cfg.pareto_power, generator)
        return Step(
            number=self.steps_done,
            n_kept=max(1, round(cfg.k_at(self.steps_done) * n_rows)),
            prefixes=(*lengths[:-1], len(self.energy)),  # the last takes in the spare latents
            weights=cfg.weights(),
            dead=self.dead,
            aux_coef=cfg.aux_coef,
            cut=self.cut,
            memory=self.memory,
        )

    @torch.no_grad()
    def observe(self, loss: Tensor, codes: Codes, n_rows: int) -> Tensor:
        """Update cut, silent rows and energy from what a batch kept; return the loss.

        Several processes average these, and the gradients."""
        latent = codes.index % len(self.energy)
        values = codes.values.float()
        is_on = (values > 0).float()
        seen = {
            "active": torch.zeros_like(self.energy).index_add_(0, latent, is_on) / n_rows,
            "energy": torch.zeros_like(self.energy).index_add_(0, latent, values.square()) / n_rows,
            "cut": values.min() if len(values) > 0 else self.cut,
            "loss": loss,
            "stop": torch.full_like(loss, self.stop),
        }
        _, world = rank_and_world()
        if world > 1:
            for tensor in (*seen.values(), *self.gradients()):
                distributed.all_reduce(tensor)
                tensor /= world
            self.stop = bool(seen["stop"] > 0)
        self.cut = seen["cut"]
        self.rows_silent.add_(n_rows * world).masked_fill_(seen["active"] > 0, 0)
        # a mean of about 20 steps: steady, and still fresh enough to sort by
        self.energy.lerp_(seen["energy"], 1.0 if self.steps_done == 0 else 0.05)
        return seen["loss"]

    def gradients(self) -> list[Tensor]:
        return [each.grad for each in self.sae.parameters() if each.grad is not None]

    @torch.no_grad()
    def update_weights(self):
        """Clip, Adam. Decoder rows lose the gradient along themselves, and are unit again after."""
        W_dec = self.sae.W_dec
        if W_dec.grad is not None:
            n_part = max(1, CACHED // W_dec.shape[1]) if self.device.type == "cpu" else len(W_dec)
            for grad, rows in zip(W_dec.grad.split(n_part), W_dec.split(n_part), strict=True):
                along = (grad * rows).sum(dim=1, keepdim=True)
                grad.addcmul_(along, rows, value=-1)
        norm = nn.utils.get_total_norm(self.gradients())
        # a pass over all gradients, saved where it changes nothing; a GPU would wait to know
        if self.device.type != "cpu" or norm > self.cfg.clip:
            nn.utils.clip_grads_with_norm_(self.sae.parameters(), self.cfg.clip, norm)
        self.optimizer.param_groups[0]["lr"] = self.cfg.lr_at(self.steps_done)
        self.optimizer.step()
        W_dec /= W_dec.norm(dim=1, keepdim=True)

    def prune_and_sort(self):
        """Let spare latents go when it is time. In order "energy", also sort them: every 5 steps,
        as weights and moments are copied."""
        n_latents = self.cfg.latents_at(self.steps_done)
        by_energy = self.cfg.order == "energy"
        if n_latents < len(self.energy) or (by_energy and self.steps_done % 5 == 0):
            self.keep_latents(n_latents)
            self.find_dead()

    def find_dead(self):
        is_dead = self.rows_silent >= self.cfg.dead_after
        self.dead = is_dead.nonzero().squeeze(1)

    def most_energetic(self, n_latents: int) -> Tensor:
        return self.energy.argsort(descending=True, stable=True)[:n_latents]

    @torch.no_grad()
    def keep_latents(self, n_latents: int):
        """Keep the most energetic latents, with optimizer state, in the order of the config."""
        keep = self.most_energetic(n_latents)
        if self.cfg.order == "stored":
            keep = keep.sort().values
        self.rows_silent = self.rows_silent[keep]
        self.energy = self.energy[keep]
        self.sae.threshold = self.sae.threshold[keep]
        for name, parameter in self.sae.named_parameters():
            dim = self.sae.latent_dims[name]
            if dim is None:
                continue
            parameter.data = parameter.data.index_select(dim, keep)
            state = self.optimizer.state[parameter]
            for moment in ("exp_avg", "exp_avg_sq"):
                if moment in state:
                    state[moment] = state[moment].index_select(dim, keep)

    @torch.no_grad()
    def measure(self, x: Tensor) -> dict[str, float]:
        """{"fvu", "l0", "dead", "cut"} on raw rows ``x``, by the entries from the cut on or,
        without calibration, above the threshold.

        FVU as in ``evaluate``, spare latents included; ``dead`` is the share of latents that were
        silent for ``dead_after`` rows of training."""
        x = x.to(self.device, torch.float32)
        if self.calibrates:
            pre = self.sae.pre_acts(x / self.scale)
            acts = pre * (pre >= self.cut)
        else:
            acts = self.sae.encode(x / self.scale)
        errors = ErrorSums(self.sae.b_dec * self.scale, 1)
        errors.add(x, [self.sae.decode(acts) * self.scale])
        is_dead = self.rows_silent >= self.cfg.dead_after
        return {
            "fvu": errors.fvu(0),
            "l0": float((acts > 0).sum() / len(x)),
            "dead": float(is_dead.float().mean()),
            "cut": float(self.cut),
        }

    @torch.no_grad()
    def export(self) -> MatryoshkaSAE:
        """A copy for raw rows: scale folded in, in prefix order, no spare latents, calibrated.

        ``ValueError`` where training has diverged."""
        keep = self.most_energetic(self.cfg.n_latents).sort().values
        tensors = {}
        for name, tensor in self.sae.state_dict().items():
            dim = self.sae.latent_dims[name]
            tensors[name] = tensor if dim is None else tensor.index_select(dim, keep)
        if self.calibrates:
            tensors["threshold"] = self.cut.expand(len(keep))
        d_model = len(self.scale)
        SAE = type(self.sae)
        sae = SAE(d_model, len(keep), self.cfg.prefix_lengths(), torch.Generator()).to(self.device)
        sae.load_state_dict(tensors)
        sae.fold_scale(self.scale)
        centre, radius = self.limit
        sae.centre.copy_(torch.as_tensor(centre))
        sae.radius.fill_(radius)
        sae.metadata = {"k": self.cfg.k, "training": dataclasses.asdict(self.cfg)}
        rule = f"diverged by step {self.steps_done}, lower lr: weights must be finite"
        for tensor in sae.parameters():
            require(tensor.isfinite().all(), rule, "NaN or infinity")
        require(sae.W_dec.any(dim=1).all(), rule, "decoder rows of 0")
        if self.calibrates and self.calibration_rows is not None and self.steps_done > 0:
            calibrate(sae, self.calibration_rows, self.cfg.k)
        return sae

    state_names = ("steps_done", "rows_silent", "energy", "cut")

    def state_dict(self) -> dict:
        """All that the next steps depend on beside the config, the loss and the rows."""
        state = {name: getattr(self, name) for name in self.state_names}
        state["sae"] = self.sae.state_dict()
        state["optimizer"] = self.optimizer.state_dict()
        return state

    def load_state_dict(self, state: dict) -> None:
        """Go on from ``state``, of the same config and rows: bit for bit on the CPU."""
        self.keep_latents(len(state["energy"]))
        self.sae.load_state_dict(state["sae"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in self.state_names:
            setattr(self, name, state[name])
        self.find_dead()


def default_dtype(device: torch.device, loss: Loss) -> str:
    """bfloat16 on a GPU that has it. On older ones float16, but only for ``fast_loss``, whose
    gradients are float32: those of another loss would vanish in float16."""
    if device.type != "cuda":
        return "float32"
    if torch.cuda.get_device_capability(device)[0] >= 8:
        return "bfloat16"
    return "float16" if loss is fast_loss else "float32"


def rank_and_world() -> tuple[int, int]:
    """(number of this process, number of processes) under torch.distributed; (0, 1) alone."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


@torch.no_grad()
def calibrate(sae: MatryoshkaSAE, rows: Tensor, k: float, batch_size: int = 2048) -> None:
    """Scale the threshold to a mean L0 of ``k`` on raw ``rows`` (n, D), or as near as it gets.

    The factor is the (k n + 1)-th largest ratio of an entry to its threshold; entries are compared
    with ``>``, so it lets k n pass."""
    threshold = sae.threshold
    if not threshold.all():
        threshold = torch.ones_like(threshold)
    n_largest = round(k * len(rows)) + 1
    largest = threshold.new_zeros(1)
    for x in rows.split(batch_size):
        ratios = sae.pre_acts(x.to(threshold.device)) / threshold
        largest = torch.cat([largest, ratios[ratios > largest.min()]])
        largest = largest.topk(min(n_largest, len(largest))).values
    sae.threshold = threshold * largest[-1]


# ---------------------------------------------------------------------------------------------
# 5. Rows: activations of any number, read in random order
# ---------------------------------------------------------------------------------------------

# Rows that follow each other and are read, and set aside, together: at most so many, and bytes.
BLOCK = 256
BLOCK_BYTES = 2**19
SAMPLE = 2**14  # rows that are enough to know scale, limit and threshold
POOL_BYTES = 2**30  # rows whose order is mixed; two such pools are held


class Part(NamedTuple):
    """Rows of one file or array. A file is open only while it is read: a memory map of a file that
    somebody cuts would kill the process."""

    name: str
    dtype: np.dtype
    n_rows: int
    d_model: int
    array: np.ndarray | None  # None: in the file of that name, from this byte on
    offset: int = 0

    def read(self, start: int, stop: int) -> np.ndarray:
        if self.array is not None:
            return self.array[start:stop]
        n_numbers = (stop - start) * self.d_model
        offset = self.offset + start * self.d_model * self.dtype.itemsize
        numbers = np.fromfile(self.name, self.dtype, n_numbers, offset=offset)
        rule = f"{self.name} must not shrink while read, row"
        require(len(numbers) == n_numbers, rule, stop)
        return numbers.reshape(-1, self.d_model)


def read_part(source: Any) -> Part:
    """An array, a tensor or a ``.npy`` file as rows (n, D). Values are checked when they are
    read."""
    array = source
    if isinstance(source, str | os.PathLike):
        array = read_npy(source)
    elif isinstance(source, Tensor):
        with reading("the tensor", "one of rows"):  # a sparse one, one on the meta device
            if source.dtype == torch.bfloat16:
                source = source.float()
            array = source.detach().cpu().numpy()
    is_array = type(array) in (np.ndarray, np.memmap)
    require(is_array, "rows must be an array, a tensor or a path", type(array))
    name = str(getattr(array, "filename", "the array"))
    rule = f"{name} must hold floats (rows, D) or (docs, positions, D)"
    found = f"{array.dtype} {array.shape}"
    require(array.dtype.str[1:] in ("f2", "f4", "f8"), rule, found)
    require(array.ndim in (2, 3), rule, found)
    require(array.size > 0, rule, found)
    d_model = array.shape[-1]
    n_rows = array.size // d_model
    is_map = isinstance(array.base, mmap.mmap)  # of a whole file
    if is_map and array.flags.c_contiguous and array.mode != "c":
        return Part(name, array.dtype, n_rows, d_model, None, array.offset)
    return Part(name, array.dtype, n_rows, d_model, np.asarray(array).reshape(n_rows, d_model))


def read_mask(source: Any, n_rows: int) -> np.ndarray:
    """Booleans (n_rows,) of an array, a tensor or a ``.npy`` of so many, in any shape."""
    is_path = isinstance(source, str | os.PathLike)
    mask = np.asarray(read_npy(source) if is_path else source)
    found = f"{mask.dtype} {mask.shape}"
    require(mask.dtype.kind in "biu", "mask must hold booleans, or 0 and 1", found)
    require(mask.size == n_rows, f"mask must hold {n_rows} values, one a row", found)
    is_flag = np.isin(mask, (0, 1))  # np.unique would sort all rows
    require(is_flag.all(), "mask must hold booleans, or 0 and 1", mask[~is_flag][:1])
    require(mask.any(), "mask must take a row", "none")
    return mask.reshape(-1).astype(bool)


def read_npy(path: Path | str) -> np.ndarray:
    """The array in a ``.npy`` file, memory-mapped; ``ValueError`` if damaged or of objects."""
    with reading(path, "a .npy file of numbers"):
        return np.lib.format.open_memmap(path, mode="r")


class Draw(NamedTuple):
    """Which rows a source is asked for, and in which order."""

    batch_size: int
    seed: int
    start: int  # number of the first batch
    rank: int  # number of this process
    world: int  # number of processes
    device: torch.device
    end: int | None  # number after the last batch; None: endless
    stop: Callable[[], bool]  # asked while a pool is made that takes long

    @property
    def n_skip(self) -> int:
        """Rows before the first."""
        return self.start * self.batch_size


class Source:
    """Rows (n, D) in pools, whose order is mixed: ``_pools`` says how to fill them."""

    d_model: int
    n_rows: int | None = None  # None: not known before the end
    centre: Tensor  # (D,) median row
    radius: float  # rows further from it are left out

    def _pools(self, draw: Draw) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless (rows, the order in which they are taken), on the device, but for the first
        ``n_skip`` rows."""
        raise NotImplementedError

    def batches(
        self,
        batch_size: int,
        seed: int = 0,
        start: int = 0,
        rank: int = 0,
        world: int = 1,
        device: Device = "cpu",
        end: int | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[Tensor]:
        """float32 batches (batch_size, D), in seeded order, from number ``start`` to ``end``, or
        endless. Each row comes once an epoch. Of ``world`` processes, ``rank`` takes its share.
        ``stop``: ends them early, while a pool is made."""
        draw = Draw(batch_size, seed, start, rank, world, torch.device(device), end, stop)
        n_batches = None if end is None else end - start
        return itertools.islice(self._batches(draw), n_batches)

    def _batches(self, draw: Draw) -> Iterator[Tensor]:
        size = draw.batch_size
        batch = torch.empty(0, self.d_model, device=draw.device)
        for rows, order in self._pools(draw):
            ends = range(size - len(batch), len(order), size)
            for chosen in order.tensor_split(list(ends)):
                new = rows.index_select(0, chosen).float()
                batch = torch.cat([batch, new]) if len(batch) > 0 else new
                if len(batch) == size:
                    yield batch
                    batch = batch[:0]


def distances(rows: Tensor, centre: Tensor) -> Tensor:
    """``|row - centre|`` of rows (n, D), on any device: (n,)."""
    # parts that stay in a CPU's cache; on a GPU some for each launch
    n_numbers = 2**16 if rows.device.type == "cpu" else 2**26
    size = max(1, n_numbers // rows.shape[1])
    centre = centre.to(rows.device)
    found = centre.new_empty(len(rows))
    for part, out in zip(rows.split(size), found.split(size), strict=True):
        torch.linalg.vector_norm(part - centre, dim=1, out=out)
    return found


def near_order(order: np.ndarray, is_near: Tensor, n_skip: int) -> Tensor:
    """``order`` (n,) from place ``n_skip`` on, without the rows left out, on their device.

    These are replaced by repeats of others. So the number of rows of a pool is known unread, and a
    resumed run skips pools without reading them."""
    near = order[is_near.cpu().numpy()[order]]
    n_places = len(order) if len(near) > 0 else 0
    places = np.resize(near, n_places)[n_skip:]
    return torch.from_numpy(places).to(is_near.device)


class Rows(Source):
    """Activation rows (n, D): an array, a tensor, a ``.npy`` file or a folder of them by name.

    float16, float32 or float64, (rows, D) or (docs, positions, D). Files are read block by block,
    so memory does not grow with them. ``ValueError`` for anything else, and for a row that is read
    and not finite.

    Rows further from the median row than ``max_norm`` times the median distance, by a sample, are
    left out, unless over 5 % are: a few massive ones ruin an SAE. A warning says so. Another tells
    of rows that are all the same, as padding is. ``mask``: which of all rows to take, booleans (n,)
    or (docs, positions), or their ``.npy``. ``Rows(rows)`` is a copy, with the limit and the mask
    that it has."""

    def __init__(self, source: Any, max_norm: float = 10.0, mask: Any = None):
        if isinstance(source, Rows):
            vars(self).update(vars(source))
            return
        require(max_norm >= 1, "max_norm must be at least 1", max_norm)
        sources = [source]
        if isinstance(source, str | os.PathLike) and os.path.isdir(source):
            files = sorted(Path(source).glob("*.npy"))
            sources = [file for file in files if not file.match("*.ids.npy")]  # of harvest
            require(sources, f"{source} must be a folder of .npy files", "one without any")
        self.parts = [read_part(each) for each in sources]
        self.d_model = self.parts[0].d_model
        for part in self.parts:
            rule = f"{part.name} must be {self.d_model} wide"
            require(part.d_model == self.d_model, rule, part.d_model)
        is_half = all(part.dtype == np.float16 for part in self.parts)
        self.dtype = np.dtype(np.float16 if is_half else np.float32)  # in memory
        # number of the first row of each part, and of all rows
        self.part_starts = np.cumsum([0, *(part.n_rows for part in self.parts)])
        row_bytes = self.d_model * self.dtype.itemsize
        # at least 64 blocks, so that a share of few rows can be set aside too
        self.block = min(BLOCK, max(1, BLOCK_BYTES // row_bytes), math.ceil(self.n_source / 64))
        self.blocks = np.arange(math.ceil(self.n_source / self.block))
        self.mask = None if mask is None else read_mask(mask, self.n_source)  # (n_source,)
        if self.mask is not None:
            n_taken = np.add.reduceat(self.mask, self._bounds()[0], dtype=int)
            self.blocks = self.blocks[n_taken > 0]
        self.centre = torch.zeros(self.d_model, dtype=torch.float32)
        self.radius = math.inf
        self._leave_out(max_norm)

    def _leave_out(self, max_norm: float):
        """Set centre and radius of the rows that count, from a sample; warn of those beyond."""
        sample = self.sample(seed=0)
        counts = collections.Counter(row.tobytes() for row in sample.numpy())
        n_same = max(counts.values())
        if len(counts) > 1 and n_same > max(10, 0.01 * len(sample)):  # more than chance has
            warnings.warn(
                f"{n_same / len(sample):.2%} of {len(sample):,} sampled rows are the same, as "
                "padding is: a mask leaves them out",
                stacklevel=3,
            )
        centre = sample.median(dim=0).values
        distances = (sample - centre).norm(dim=1)
        median = float(distances.median())
        if median == 0:  # most rows are the same
            return
        share = float((distances > max_norm * median).float().mean())
        what = "too many to leave out"
        if share <= 0.05:
            what = "left out (max_norm)"
            self.centre = centre
            self.radius = max_norm * median
        if share > 0:
            farthest = float(distances.max()) / median
            warnings.warn(
                f"{share:.2%} of {len(sample):,} sampled rows lie over {max_norm:g} times the "
                f"median distance from the median row, up to {farthest:,.0f} times: {what}",
                stacklevel=3,
            )

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Number of the first row of each block, and of the one after its last."""
        starts = self.blocks * self.block
        return starts, np.minimum(starts + self.block, self.part_starts[-1])

    def __len__(self) -> int:
        if self.mask is not None:
            return len(self.row_numbers())
        starts, stops = self._bounds()
        return int((stops - starts).sum())

    @property
    def n_rows(self) -> int:
        return len(self)

    @property
    def n_source(self) -> int:
        """Rows of the whole source."""
        return int(self.part_starts[-1])

    def row_numbers(self) -> np.ndarray:
        """Where in the whole source these rows lie: (n,), rising."""
        starts, stops = self._bounds()
        numbers = np.concatenate([np.arange(a, b) for a, b in zip(starts, stops, strict=True)])
        return numbers if self.mask is None else numbers[self.mask[numbers]]

    def keep(self, places: Sequence[int]) -> "Rows":
        """The rows of the blocks at these places among its blocks, in order."""
        chosen = Rows(self)
        chosen.blocks = self.blocks[np.sort(np.asarray(places, dtype=int))]
        return chosen

    def split_off(self, fraction: float, seed: int = 0) -> tuple["Rows", "Rows"]:
        """(The other rows, those set aside), at most 16,384. In random whole blocks, as neighbours
        of a row tell much of it."""
        order = np.random.default_rng(seed).permutation(len(self.blocks))
        n_aside = min(max(2, round(fraction * len(order))), SAMPLE // self.block)
        return self.keep(order[n_aside:]), self.keep(order[:n_aside])

    def random_blocks(self, most: int, seed: int = 0) -> "Rows":
        """Random whole blocks, of at most ``most`` rows, or one block."""
        order = np.random.default_rng(seed).permutation(len(self.blocks))
        return self.keep(order[: max(1, most // self.block)])

    def sample(self, seed: int) -> Tensor:
        """At most 16,384 rows of random blocks, without those left out: (n, D)."""
        return self.random_blocks(SAMPLE, seed).read()

    def successive(self, n_rows: int = 4096) -> Iterator["Rows"]:
        """All rows once, in order, as ``Rows`` of about ``n_rows`` each."""
        n_blocks = max(1, n_rows // self.block)
        places = range(len(self.blocks))
        return (self.keep(places[first : first + n_blocks]) for first in places[::n_blocks])

    def read(self) -> Tensor:
        """The rows in order, as one float32 tensor (n, D), without those left out."""
        rows = self.read_all()
        return rows[self.is_near(rows)].float()

    def read_all(self, memory: np.ndarray | None = None) -> Tensor:
        """All rows (n, D), into ``memory`` if given: float16 if all files are, else float32."""
        if memory is None:
            memory = np.empty((len(self), self.d_model), self.dtype)
        end = 0
        for start, stop in zip(*self._bounds(), strict=True):
            for piece in self._read_range(int(start), int(stop)):
                memory[end : end + len(piece)] = piece
                end += len(piece)
        return torch.from_numpy(memory[:end])

    def _read_range(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """The rows from number ``start`` to ``stop``, a piece for each file with some of them."""
        number = int(np.searchsorted(self.part_starts, start, side="right")) - 1
        while start < stop:
            first = int(self.part_starts[number])
            end = min(stop, int(self.part_starts[number + 1]))
            rows = self.parts[number].read(start - first, end - first)
            yield rows if self.mask is None else rows[self.mask[start:end]]
            start = end
            number += 1

    def is_near(self, rows: Tensor) -> Tensor:
        """Which of all its ``rows`` (n, D), on any device, are not left out: (n,).

        ``ValueError`` names a row that is not finite."""
        found = distances(rows, self.centre)
        if not found.isfinite().all():
            self._require_finite(rows)
        return found <= self.radius

    def _require_finite(self, rows: Tensor):
        is_finite = rows.isfinite().all(dim=1)
        if is_finite.all():  # large ones, of which only the squares are not
            return
        number = self.row_numbers()[int(is_finite.int().argmin())]
        part = int(np.searchsorted(self.part_starts, number, side="right")) - 1
        where = f"{self.parts[part].name}, row {number - self.part_starts[part]},"
        raise ValueError(f"{where} must be finite as float32, got NaN or infinity")

    def _pools(self, draw: Draw) -> Iterator[tuple[Tensor, Tensor]]:
        pools = self._read_pools(draw)
        with ThreadPoolExecutor(1) as thread:  # which reads one ahead
            ahead = thread.submit(next, pools)
            while True:
                rows, order = ahead.result()
                ahead = thread.submit(next, pools)
                if rows.is_cuda:  # they come from another stream
                    rows.record_stream(torch.cuda.current_stream(rows.device))
                    order.record_stream(torch.cuda.current_stream(rows.device))
                yield rows, order

    def _read_pools(self, draw: Draw) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks are shuffled, then the rows of each pool of blocks. Of several processes, each
        reads every ``world``-th block."""
        block_bytes = self.block * self.d_model * self.dtype.itemsize
        n_own = math.ceil(len(self.blocks) / draw.world)
        n_blocks = max(1, min(POOL_BYTES // block_bytes, n_own))
        # two memories, used in turn: one is filled while the other is trained on
        memories = np.empty((2, n_blocks * self.block, self.d_model), self.dtype)
        memory = itertools.cycle(memories)
        n_skip = draw.n_skip
        for epoch in itertools.count():
            random = np.random.default_rng([draw.seed, epoch])
            places = random.permutation(len(self.blocks))[draw.rank :: draw.world]
            for first in range(0, len(places), n_blocks):
                pool = self.keep(places[first : first + n_blocks])
                order = random.permutation(len(pool))
                if n_skip < len(order):
                    yield pool._to_device(order, n_skip, next(memory), draw.device)
                n_skip = max(0, n_skip - len(order))

    def _to_device(
        self, order: np.ndarray, n_skip: int, memory: np.ndarray, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        rows = self.read_all(memory)
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        with torch.cuda.stream(stream):  # copies beside the steps
            rows = rows.to(device)
            return rows, near_order(order, self.is_near(rows), n_skip)


def as_source(rows: Any, max_norm: float) -> Source:
    """``rows`` as they are, if they are a source, or ``Rows`` of them."""
    return rows if isinstance(rows, Source) else Rows(rows, max_norm)


# ---------------------------------------------------------------------------------------------
# 6. Runs: the loop around the trainer, checkpoints, signals; files that are written whole
# ---------------------------------------------------------------------------------------------

STATE = "training_state.pt"
METRICS = "metrics.jsonl"


@torch.inference_mode(False)
def train(
    acts: Any,
    cfg: TrainConfig,
    *,
    device: Device = "cpu",
    out: Path | str | None = None,
    resume: bool = False,
    loss: Loss = fast_loss,
    calibrate: bool = True,
    save_minutes: float = 10.0,
    on_log: Callable[[dict], None] = lambda figures: None,
    log_every: int = 50,
    metadata: dict | None = None,
) -> MatryoshkaSAE:
    """Train on the rows ``acts`` (see ``Rows``); return the SAE for raw activations.

    ``out``: a new or empty folder for metrics and checkpoint, written at the start, every
    ``save_minutes`` and however the loop ends; ``resume`` goes on there, if anything is saved.
    ``loss``, ``calibrate``: see ``Trainer``. ``on_log`` gets the figures of ``Trainer.measure``,
    and {"step", "loss", "rows_per_second"}. ``metadata``: for the checkpoint. A signal acts after
    the step: see ``deferred_signals``. ``ValueError`` for bad rows, and for settings or rows other
    than those resumed."""
    if resume:
        require(out is not None, "resume needs out, the folder to go on in", out)
    rows, held_out = as_source(acts, cfg.max_norm).split_off(0.05, cfg.seed)
    rank, world = rank_and_world()
    size = cfg.batch_size
    require(size % world == 0, f"batch_size must be a multiple of {world}", size)
    if rows.n_rows is not None:
        rule = f"batch_size must be at most {rows.n_rows}, the training rows"
        require(size <= rows.n_rows, rule, size)
    trainer = Trainer.on(rows, cfg, device, held_out, loss, calibrate)
    folder = None if out is None or rank > 0 else Path(out)
    run = _Run(trainer, folder, fingerprint(rows, cfg), metadata, on_log)
    is_resumed = resume and Path(out, STATE).exists()
    if is_resumed:
        run.restore(Path(out))
    first_step = trainer.steps_done
    with deferred_signals() as received:
        # of several processes none may leave alone, while the others wait for it in a step
        stop = lambda: world == 1 and len(received) > 0  # noqa: E731
        place = (rank, world, trainer.device)
        batches = rows.batches(size // world, cfg.seed, first_step, *place, cfg.steps, stop)
        if not is_resumed:
            run.start()
        last_saved = time.monotonic()
        try:
            for x in batches:
                trainer.stop = len(received) > 0
                step_loss = trainer.step(x)
                if trainer.steps_done % log_every == 0 or trainer.steps_done == cfg.steps:
                    run.log(float(step_loss), x)
                if trainer.stop:
                    break
                if time.monotonic() - last_saved > 60 * save_minutes:
                    run.checkpoint()
                    last_saved = time.monotonic()
        except Exception:  # a bad row, a callback, a lost process: the steps done stand
            with contextlib.suppress(ValueError):  # of weights that are no good any more
                run.checkpoint()
            raise
        if trainer.stop and not received:
            received.append(signal.SIGTERM)  # another process got it
        return run.checkpoint()


class _Run:
    """What a run writes: the SAE, the state to go on from, and a line for each log."""

    def __init__(self, trainer, folder, fingerprint, metadata, on_log):
        self.trainer = trainer
        self.folder = folder  # None: nothing is written
        self.fingerprint = fingerprint
        self.metadata = {} if metadata is None else metadata
        self.on_log = on_log
        self.started = time.monotonic()
        self.first_step = 0

    def start(self):
        """Take a new or empty folder, if the disk has room for the run, and write the first SAE."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for file in self.folder.iterdir():
            if file.suffix != ".tmp":
                message = f"{self.folder} holds {file.name}: choose a new or an empty output folder"
                raise FileExistsError(message)
        # W_enc and W_dec, two moments each and the SAE's, 4 bytes a number, old and new
        n_bytes = 64 * self.trainer.sae.W_dec.numel()
        free = shutil.disk_usage(self.folder).free
        if n_bytes > free:
            sizes = f"{n_bytes / 1e9:.2g} GB for checkpoints, {free / 1e9:.2g} free"
            raise OSError(f"{self.folder} needs {sizes}")
        self.checkpoint()

    def checkpoint(self) -> MatryoshkaSAE:
        """Export, and write the state and the SAE."""
        sae = self.trainer.export()
        sae.metadata.update(self.metadata)
        if self.folder is not None:
            log = self.folder / METRICS
            state = {
                "fingerprint": self.fingerprint,
                "log_bytes": log.stat().st_size if log.exists() else 0,
                "trainer": self.trainer.state_dict(),
            }
            write(self.folder / STATE, state)
            sae.save(self.folder)
        return sae

    def log(self, loss: float, x: Tensor):
        """Write and report the figures of a step on rows ``x``."""
        step = self.trainer.steps_done
        rule = f"diverged by step {step}, lower lr: the loss must be finite"
        require(math.isfinite(loss), rule, loss)
        n_rows = (step - self.first_step) * self.trainer.cfg.batch_size
        figures = {
            "step": step,
            "loss": loss,
            **self.trainer.measure(x[:512]),  # enough for a figure in passing
            "rows_per_second": round(n_rows / (time.monotonic() - self.started)),
        }
        if self.folder is not None:
            with open(self.folder / METRICS, "a") as file:
                file.write(json.dumps(figures) + "\n")
        self.on_log(figures)

    def restore(self, folder: Path):
        """Put trainer and log where the last checkpoint was; ``ValueError`` names what differs."""
        with reading(folder / STATE, "the state of such a run"):
            device = self.trainer.device
            state = torch.load(folder / STATE, map_location=device, weights_only=True)
            for name, value in self.fingerprint.items():
                before = state["fingerprint"].get(name)
                require(before == value, f"{name} must be as in the run to resume, {before}", value)
            self.trainer.load_state_dict(state["trainer"])
            self.first_step = self.trainer.steps_done
            with open(folder / METRICS, "ab") as file:
                file.truncate(min(file.tell(), state["log_bytes"]))


def fingerprint(rows: Source, cfg: TrainConfig) -> dict[str, Any]:
    """What marks a run: settings, number of rows and processes, checksum of a sample of rows."""
    checksum = hashlib.sha256(rows.sample(cfg.seed).numpy()).hexdigest()[:16]
    return {
        **dataclasses.asdict(cfg),
        "rows": rows.n_rows,
        "processes": rank_and_world()[1],
        "checksum of a sample of the rows": checksum,
    }


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGHUP, unless ignored, as a wish to stop; at the end the first
    acts: as its handler has it, or as ``SystemExit(128 + number)``. A second SIGINT acts at once;
    the others may come twice, from a job's wrapper and to its group."""
    received: list[int] = []

    def note(number, frame):
        if number == signal.SIGINT and number in received:
            raise KeyboardInterrupt
        received.append(number)

    handlers = {}
    if threading.current_thread() is threading.main_thread():  # no other can set handlers
        for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):  # Windows has no SIGHUP
            number = getattr(signal, name)
            if signal.getsignal(number) != signal.SIG_IGN:
                handlers[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        if handlers.get(received[0]) == signal.SIG_DFL:
            raise SystemExit(128 + received[0])
        signal.raise_signal(received[0])


@contextlib.contextmanager
def reading(path: Path | str, what: str) -> Iterator[None]:
    """Whatever a parser raises, but ``OSError``, becomes a ``ValueError`` that names the file."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is not {what}: {one_line(error)}") from None


def one_line(error: Exception) -> str:
    words = " ".join(str(error).split())
    return f"{words or type(error).__name__:.300}"


def write(path: Path | str, content: Any) -> None:
    """Write bytes, JSON, or (.pt) what ``torch.load`` reads: the old file stays until it is
    whole."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            if path.suffix == ".pt":
                torch.save(content, file)
            elif isinstance(content, bytes):
                file.write(content)
            else:
                file.write(json.dumps(content, indent=2).encode())
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the latter of torch.save on a full disk
        raise OSError(f"{path} could not be written: {one_line(error)}") from None
    finally:
        temporary.unlink(missing_ok=True)


def download(repo: str, names: list[str], revision: str | None = None, repo_type="model") -> Path:
    """Folder of these files of a Hub repository, all of one commit, in huggingface_hub's cache."""
    try:
        from huggingface_hub import snapshot_download

        where = {"repo_type": repo_type, "revision": revision}
        return Path(snapshot_download(repo, allow_patterns=names, **where))
    except Exception as error:  # of its own, of its HTTP library, of Xet
        raise OSError(f"{repo} cannot be read from the Hub: {one_line(error)}") from None


# ---------------------------------------------------------------------------------------------
# 7. Metrics: figures of a finished SAE, on rows, against labels, latent by latent
# ---------------------------------------------------------------------------------------------


class ErrorSums:
    """``FVU = sum |x - recon|^2 / sum |x - mean|^2`` over all rows, by the sums of each dimension.

    For several reconstructions of the same raw rows. ``origin`` (D,): near the mean, so that the
    variance does not cancel where the mean is large; a single row is measured from there."""

    def __init__(self, origin: Tensor, n_recons: int):
        self.origin = origin
        self.n_rows = 0
        width = len(origin)
        self.offsets = torch.zeros(width, dtype=torch.float64)
        self.squares = torch.zeros(width, dtype=torch.float64)
        self.errors = torch.zeros(n_recons, width, dtype=torch.float64)

    def add(self, x: Tensor, recons: Iterable[Tensor]) -> None:
        """Add rows ``x`` (B, D) and their reconstructions, each (B, D)."""
        offset = (x - self.origin).cpu().double()
        self.n_rows += len(x)
        self.offsets += offset.sum(dim=0)
        self.squares += offset.square().sum(dim=0)
        for error, recon in zip(self.errors, recons, strict=True):
            error += (x - recon).square().sum(dim=0).cpu().double()

    def variance(self) -> Tensor:
        """``sum (x - mean)^2`` of each dimension: (D,)."""
        if self.n_rows == 1:
            return self.squares
        return self.squares - self.offsets.square() / self.n_rows

    def fvu(self, recon: int, dims: Tensor | slice = slice(None)) -> float:
        """Of this reconstruction, over these dimensions, by default all."""
        return float(self.errors[recon, dims].sum() / self.variance()[dims].sum())


@torch.no_grad()
def evaluate(
    sae: MatryoshkaSAE,
    rows: Any,
    batch_size: int = 4096,
    max_norm: float = 10.0,
    on_rows: Callable[[int], None] = lambda n_done: None,
) -> dict[str, Any]:
    """Figures of ``sae`` over all raw ``rows`` (see ``Rows``), in raw units, by prefix too.

    ``fvu`` as in ``ErrorSums``; ``l0``, active latents per row; ``dead``, the share of latents that
    never fires; ``max_cosine``, the mean over decoder rows of the largest cosine with another;
    ``rows`` and how many were ``left_out``; ``massive``, the dimensions that hold 90 % of the
    variance and the FVU of the others; ``remarks``, in words. ``ValueError`` where all rows are
    equal."""
    rows = Rows(rows, max_norm)
    device = sae.b_dec.device
    sizes = np.diff(sae.prefixes, prepend=0).tolist()
    errors = ErrorSums(sae.b_dec, len(sizes))
    n_fired = torch.zeros_like(sae.b_enc, dtype=torch.long)  # rows where each latent is on
    n_done = 0
    for part in rows.successive(batch_size):
        x = part.read().to(device)
        acts = sae.encode(x)
        n_fired += (acts > 0).sum(dim=0)
        blocks = zip(acts.split(sizes, dim=1), sae.W_dec.split(sizes), strict=True)
        decoded = (block @ W_dec for block, W_dec in blocks)
        errors.add(x, itertools.islice(itertools.accumulate(decoded, initial=sae.b_dec), 1, None))
        n_done += len(part)
        on_rows(n_done)
    total = float(errors.variance().sum())
    rule = "rows must differ, within max_norm and 1e18: the sum of their variances"
    require(errors.n_rows > 1, rule, "one row")
    require(total > 1e-12 * float(errors.squares.sum()), rule, total)
    require(errors.errors.isfinite().all(), rule, total)

    share = n_fired.cpu().double() / errors.n_rows
    levels = []
    for level, p in enumerate(sae.prefixes):
        figures = {
            "latents": p,
            "fvu": errors.fvu(level),
            "l0": float(share[:p].sum()),
            "max_cosine": max_cosine(sae.W_dec[:p]),
            "dead": float((share[:p] == 0).double().mean()),
        }
        levels.append(figures)
    massive = massive_dimensions(errors)
    return {
        "rows": errors.n_rows,
        "left_out": len(rows) - errors.n_rows,
        **levels[-1],
        "massive": massive,
        "prefixes": levels,
        "remarks": remarks(sae, rows.d_model, massive, levels[-1]["l0"]),
    }


def massive_dimensions(errors: ErrorSums) -> dict[str, Any]:
    """How many dimensions hold 90 % of the variance, their ``share``, ``fvu_of_others`` or None."""
    largest, order = errors.variance().sort(descending=True)
    total = largest.sum()
    n_dims = 1 + int((largest.cumsum(0) < 0.9 * total).sum())
    others = float(largest[n_dims:].sum())
    return {
        "dims": n_dims,
        "share": 1 - others / float(total),
        "fvu_of_others": errors.fvu(-1, order[n_dims:]) if others > 0 else None,
    }


def remarks(sae: MatryoshkaSAE, d_model: int, massive: dict[str, Any], l0: float) -> list[str]:
    """What figures alone do not tell, in words."""
    notes = []
    n_dims = massive["dims"]
    is_massive = n_dims <= max(1, d_model / 20)  # a twentieth of the dimensions holds almost all
    if is_massive and massive["fvu_of_others"] is not None:
        notes.append(
            f"{n_dims} of {d_model} dimensions hold {massive['share']:.0%} of the variance; "
            f"FVU of the others {massive['fvu_of_others']:.4f}"
        )
    k = sae.metadata.get("k")
    if not sae.threshold.any() and k is not None and l0 < k:
        notes.append(f"only {l0:.1f} positive entries a row for k = {k}")
    return notes


def max_cosine(W_dec: Tensor, batch_size: int = 2048) -> float:
    """Mean over the rows of ``W_dec`` (F, D) of the largest cosine with another; 0 for one row."""
    rows = nn.functional.normalize(W_dec, dim=1)
    if len(rows) == 1:
        return 0.0
    nearest = []
    for part in rows.split(batch_size):
        cosines = part @ rows.T
        nearest.append(cosines.topk(2, dim=1).values[:, 1])  # the first is the row itself
    return float(torch.cat(nearest).mean())


@torch.no_grad()
def probe(sae: MatryoshkaSAE, x: Tensor, y: Tensor, seed: int = 0, max_k: int = 5) -> dict:
    """How few latents tell labels ``y`` (n, C), booleans, of raw rows ``x`` (n, D).

    Probes are trained on half the rows, and measured on the other half. Returns the number of
    ``rows``, a label's mean ``label_share`` of them, ``raw``: accuracy and F1 of logistic
    regression on the rows, and for each of the ``prefixes`` - ``probes``: the same on the k latents
    that correlate most with the label (``k_sparse_probes``); ``main_share``: the share of rows
    where the first of them, the main latent, is on; ``n_verdicts``: how many labels have latents;
    and of these alone, None if there are none - ``splitting``: how many latents tell a label;
    ``main_silent``: of the raw probe's true positives, the share on which the main latent is
    silent; ``absorption``: the share on which all latents that tell the label are, and another one
    carries it (``n_absorbed``). Means over labels.

    A label has latents if those that it is split into tell it with F1 of at least 0.5, and the raw
    probe with more than 0.6. SAEBench has only the second rule, and ranks latents by an L1 probe.
    ``ValueError`` for a label that a half of the rows has everywhere or nowhere."""
    x_train, x_test, y_train, y_test = halves(x, y, seed)
    directions, bias = logistic_regression(x_train, y_train)
    predicted = directions @ x_test.T + bias[:, None] > 0  # (C, n)
    raw, raw_f1 = probe_scores(predicted, y_test)
    positives = y_test.T & predicted
    n_positives = positives.sum(dim=1)
    correlations = label_correlations(sae, x_train, y_train)  # (C, F)
    levels = []
    for p in sae.prefixes:
        latents = correlations[:, :p].topk(min(max_k, p), dim=1).indices  # (C, k), best first
        codes_train = codes_by_label(sae, x_train, p, latents)
        codes_test = codes_by_label(sae, x_test, p, latents)
        probes, n_splits, split_f1 = k_sparse_probes(codes_train, codes_test, y_train, y_test)
        is_on = codes_test > 0  # (C, n, k)
        main_is_on = is_on[:, :, 0]
        is_split = torch.arange(latents.shape[1]) < n_splits[:, None]
        split_is_on = (is_on & is_split[:, None]).any(dim=2)
        # A label whose raw F1 is at most 0.6 is none of the model's features, says SAEBench. With
        # F1 below 0.5 a latent misses two rows of three even if it is on for nothing else: it is
        # another feature's. (A constant has F1 0.5 for a label on a third of the rows, no rarer.)
        has_latents = (raw_f1 > 0.6) & (split_f1 >= 0.5)
        main_silent = (positives & ~main_is_on).sum(dim=1) / n_positives
        n_carried = n_absorbed(sae, x_test, positives & ~split_is_on, p, directions)
        absorption = torch.where(has_latents, n_carried / n_positives, math.nan)
        level = {
            "latents": p,
            "probes": probes,
            "main_share": float(main_is_on.float().mean()),
            "n_verdicts": int(has_latents.sum()),
            "absorption": mean_known(absorption),
            "main_silent": mean_known(main_silent[has_latents]),
            "absorption_by_label": [mean_known(rate) for rate in absorption],
            "splitting": mean_known(n_splits[has_latents].float()),
        }
        levels.append(level)
    label_share = float(y.float().mean())
    return {"rows": len(x), "label_share": label_share, "raw": raw, "prefixes": levels}


def halves(x: Tensor, y: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x`` and ``y`` in a random order, as ``x_train, x_test, y_train, y_test``.

    ``ValueError`` for a label that one of them has everywhere or nowhere."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x_train, x_test = x[order].float().tensor_split(2)
    y_train, y_test = y[order].tensor_split(2)
    counts = [half.sum(0) for half in (y_train, ~y_train, y_test, ~y_test)]
    rarest = torch.stack(counts).amin(dim=0)
    rule = f"label {rarest.argmin()} needs rows with it and without it in both halves"
    require(rarest.all(), rule, 0)
    return x_train, x_test, y_train, y_test


def label_correlations(sae: MatryoshkaSAE, x: Tensor, y: Tensor) -> Tensor:
    """Correlation of each label of ``y`` (n, C) with each latent on rows ``x`` (n, D): (C, F).

    A label's latents come in the order of the difference of their means with it and without it,
    over their standard deviation. The difference alone (Gurnee et al. 2023) favours large ones. 0
    for a latent that never changes."""
    y = y.double()
    y = (y - y.mean(dim=0)) / y.std(dim=0, correction=0)
    product = total = squares = 0
    for rows, label in zip(x.split(2048), y.split(2048), strict=True):
        acts = sae.encode(rows).double()
        product += label.T @ acts
        total += acts.sum(dim=0)
        squares += acts.square().sum(dim=0)
    variance = squares / len(x) - (total / len(x)).square()
    return product / len(x) / variance.clamp_min(1e-24).sqrt()


def codes_by_label(sae: MatryoshkaSAE, x: Tensor, prefix: int, latents: Tensor) -> Tensor:
    """Codes of rows ``x`` (n, D) by each label's own ``latents`` (C, k): (C, n, k)."""
    codes = [sae.encode(rows, prefix)[:, latents] for rows in x.split(2048)]
    return torch.cat(codes).movedim(0, 1)


def k_sparse_probes(
    codes_train: Tensor, codes_test: Tensor, y_train: Tensor, y_test: Tensor
) -> tuple[list[dict[str, float]], Tensor, Tensor]:
    """Logistic regression on each label's first k latents, k = 1, 2, ...; codes are (C, n, max_k).

    Gurnee et al. 2023, arXiv 2305.01610. Returns [{"k", "accuracy", "f1"}], how many latents each
    label is split into (C,): as many as raise its F1 by more than 0.03 each (Chanin et al. 2024),
    and its F1 with these (C,)."""
    probes, f1 = [], []
    for k in range(1, codes_train.shape[2] + 1):
        w, b = logistic_regression(codes_train[:, :, :k], y_train)
        logits = torch.einsum("cnk,ck->cn", codes_test[:, :, :k], w) + b[:, None]
        scores, f1_by_label = probe_scores(logits > 0, y_test)
        probes.append({"k": k, **scores})
        f1.append(f1_by_label)
    f1 = torch.stack(f1)  # (max_k, C)
    is_gain = f1.diff(dim=0) > 0.03
    n_more = is_gain.cumprod(dim=0).sum(0)  # latents beyond the first
    return probes, 1 + n_more, f1.gather(0, n_more[None])[0]


def logistic_regression(x: Tensor, y: Tensor, l2=1e-3, steps=100) -> tuple[Tensor, Tensor]:
    """One probe a label: ``x`` (n, d), or (C, n, d) its own, ``y`` (n, C) -> w (C, d), b (C,).

    Mean cross-entropy of ``sigmoid(x @ w + b)`` plus ``l2 |w|^2`` on standardised inputs, by
    LBFGS."""
    mean = x.mean(dim=-2, keepdim=True)
    std = x.std(dim=-2, keepdim=True).clamp_min(1e-12)
    x = (x - mean) / std
    y = y.T.float()
    w = torch.zeros(len(y), x.shape[-1], requires_grad=True)
    b = torch.zeros(len(y), requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=steps, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = (w[:, None] @ x.mT).squeeze(1) + b[:, None]
        entropy = nn.functional.binary_cross_entropy_with_logits(logits, y)
        loss = len(y) * entropy + l2 * w.pow(2).sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    w = w.detach() / std.squeeze(-2)
    return w, b.detach() - (w * mean.squeeze(-2)).sum(dim=1)


def probe_scores(predicted: Tensor, y: Tensor) -> tuple[dict[str, float], Tensor]:
    """Of predictions (C, n) of ``y`` (n, C): mean accuracy and F1; F1 of each label (C,)."""
    f1 = 2 * (predicted & y.T).sum(1) / (predicted.sum(1) + y.sum(0))
    accuracy = float((predicted == y.T).float().mean())
    return {"accuracy": accuracy, "f1": float(f1.mean())}, f1


def n_absorbed(
    sae: MatryoshkaSAE, x: Tensor, missed: Tensor, prefix: int, directions: Tensor
) -> Tensor:
    """On how many rows another latent carries a label whose own are silent: (C,).

    Of rows ``x`` (n, D) those that are ``missed`` (C, n): where, of the latents, the one that adds
    most along the label's probe ``directions`` (C, D) adds at least 40 % of ``x @ direction``, and
    has a cosine of at least 0.025 with it. Chanin et al. 2024, arXiv 2409.14507, as in SAEBench
    0.6."""
    W_dec = sae.W_dec[:prefix]
    counts = torch.zeros(len(directions))
    for label, direction in enumerate(directions):
        along = W_dec @ direction
        cosine = nn.functional.cosine_similarity(W_dec, direction, dim=1)
        for rows in x[missed[label]].split(2048):
            added, latent = (sae.encode(rows, prefix) * along).max(dim=1)
            projection = rows @ direction
            carries = (projection > 0) & (added >= 0.4 * projection)
            counts[label] += (carries & (cosine[latent] >= 0.025)).sum()
    return counts


def mean_known(values: Tensor) -> float | None:
    """Mean of those that are not NaN, None if there are none."""
    mean = float(values.nanmean())
    return None if math.isnan(mean) else mean


class SparseCodes(NamedTuple):
    """Codes of n rows: the entries of row i are those from ``starts[i]`` to ``starts[i + 1]``."""

    starts: np.ndarray  # (n + 1,)
    latent: np.ndarray  # (entries,)
    value: np.ndarray  # (entries,), positive
    is_far: np.ndarray  # (n,) rows that are left out, without entries


@torch.no_grad()
def sparse_codes(
    sae: MatryoshkaSAE, rows: Any, on_rows: Callable[[int], None] = lambda n_done: None
) -> SparseCodes:
    """Codes of all raw ``rows`` (see ``Rows``)."""
    counts, latents, values, far = [], [], [], []
    n_done = 0
    for part in Rows(rows).successive():
        x = part.read_all()
        is_far = ~part.is_near(x)
        acts = sae.encode(x.to(sae.b_dec.device)).cpu().masked_fill(is_far[:, None], 0)
        counts.append((acts > 0).sum(dim=1))
        latents.append(acts.nonzero()[:, 1].int())
        values.append(acts[acts > 0].double())
        far.append(is_far)
        n_done += len(x)
        on_rows(n_done)
    starts = np.append(0, torch.cat(counts).cumsum(0).numpy())
    columns = (torch.cat(each).numpy() for each in (latents, values, far))
    return SparseCodes(starts, *columns)


@torch.no_grad()
def latent_figures(
    sae: MatryoshkaSAE, codes: SparseCodes, latents: Sequence[int], seed: int = 0
) -> Iterator[tuple[dict[str, Any], np.ndarray, np.ndarray]]:
    """Of each of ``latents``: figures, the rows where it is on, and its activations there.

    ``share`` of rows, ``max``, ``mean`` where on, ``histogram`` (16 bins, 0 to max), the 10
    ``largest`` rows, ``fifths``: of each fifth of its range of activations (least to max) that
    holds any, one row at random, the largest first; the 5 ``nearest`` [latent, cosine of decoder
    rows], and ``parent``: [latent, directed cosine], of the latents of earlier prefixes the one
    where it is largest, if at least 0.6, else None."""
    n_rows = len(codes.starts) - 1
    n_latents = len(sae.b_enc)
    row_of_entry = np.repeat(np.arange(n_rows), np.diff(codes.starts))
    peaks = np.zeros(n_latents)  # the largest activation of each
    np.maximum.at(peaks, codes.latent, codes.value)
    by_latent = np.argsort(codes.latent, kind="stable")
    bounds = np.searchsorted(codes.latent, np.arange(n_latents + 1), sorter=by_latent)
    prefix_starts = np.array((0, *sae.prefixes))
    for number, nearest in nearest_decoder_rows(sae.W_dec.cpu(), latents):
        entries = by_latent[bounds[number] : bounds[number + 1]]
        row_index = row_of_entry[entries]
        acts = codes.value[entries]
        parent = None
        n_earlier = prefix_starts[prefix_starts <= number][-1]
        if n_earlier > 0 and len(acts) > 0:
            fits = directed_cosines(codes, peaks, row_index, acts)[:n_earlier]
            best = int(fits.argmax())
            if fits[best] >= 0.6:  # as in appendix F of the paper
                parent = (best, fits[best])
        generator = np.random.default_rng([seed, number])
        largest = np.argsort(-acts, kind="stable")[:10]
        figures = {
            "latent": number,
            "share": len(acts) / n_rows,
            "max": peaks[number],
            "parent": parent,
            "histogram": np.histogram(acts, 16, (0, peaks[number]))[0].tolist(),
            "largest": row_index[largest].tolist(),
            "fifths": [int(generator.choice(part)) for part in by_fifth(row_index, acts)],
            "mean": acts.sum() / max(1, len(acts)),
            "nearest": nearest,
        }
        yield figures, row_index, acts


def by_fifth(row_index: np.ndarray, acts: np.ndarray) -> list[np.ndarray]:
    """``row_index`` in up to five parts, of equal parts of the range of ``acts``, from the top."""
    if len(acts) == 0:
        return []
    borders = np.linspace(acts.min(), acts.max(), 6)[1:-1]
    fifth = np.digitize(acts, borders)
    parts = [row_index[fifth == number] for number in (4, 3, 2, 1, 0)]
    return [part for part in parts if len(part) > 0]


def nearest_decoder_rows(
    W_dec: Tensor, latents: Sequence[int], n_nearest: int = 5
) -> Iterator[tuple[int, list[tuple[int, float]]]]:
    """For each of ``latents``: its number, and the [(latent, cosine)] of largest cosine with it."""
    directions = nn.functional.normalize(W_dec, dim=1)
    n_nearest = min(n_nearest, len(directions) - 1)
    for part in torch.as_tensor(latents).split(256):
        cosines = directions[part] @ directions.T
        cosines.scatter_(1, part[:, None], -2.0)  # not itself
        top = cosines.topk(n_nearest)
        for number, others, values in zip(
            part.tolist(), top.indices.tolist(), top.values.tolist(), strict=True
        ):
            yield number, list(zip(others, values, strict=True))


def directed_cosines(
    codes: SparseCodes, peaks: np.ndarray, row_index: np.ndarray, acts: np.ndarray
) -> np.ndarray:
    """``(sum a_p a / (|a_p| |a|)) min(1, max a / max a_p)`` of every latent p with the one that is
    on in the rows ``row_index``, with ``acts``; all sums over these rows: (F,). Nabeshima, arXiv
    2503.17547, app. F."""
    starts = codes.starts[row_index]
    sizes = codes.starts[row_index + 1] - starts
    # the numbers of all entries of these rows: each row's run counts up from its start
    run_offsets = np.repeat(starts - (sizes.cumsum() - sizes), sizes)
    entries = run_offsets + np.arange(sizes.sum())
    latent = codes.latent[entries]
    a_p = codes.value[entries]
    dot = np.bincount(latent, a_p * np.repeat(acts, sizes), len(peaks))
    norms = np.sqrt(np.bincount(latent, a_p**2, len(peaks)) * (acts @ acts))
    cosine = dot / np.maximum(norms, 1e-99)
    return cosine * np.minimum(1, acts.max() / np.maximum(peaks, 1e-99))


# ---------------------------------------------------------------------------------------------
# 8. The toy: rows whose true features are known, and how well an SAE finds them
# ---------------------------------------------------------------------------------------------


class _Node(NamedTuple):
    """A node of a feature tree: on where its parent is and ``low <= draws[draw] < high``."""

    parent: int | None  # number of the node above
    draw: int  # number of the uniform draw; siblings that exclude each other share one
    low: float
    high: float
    is_read_out: bool
    is_binary: bool


class FeatureTree:
    """A tree of features, each on only where its parent is (noanabeshima/matryoshka-saes).

    ``spec``: a node {"active_prob": given that the parent is on, "is_read_out": false for a hidden
    node, "is_binary": false for a magnitude in [0.5, 1.5), "mutually_exclusive_children": true for
    at most one at a time, "children": [nodes], "id"}. Directions are orthogonal, with norms 1 +
    norm_std N(0, 1). ``ValueError`` names a node that is none by its path."""

    def __init__(self, spec: dict, d_model: int | None = None, norm_std=0.05, seed=0):
        self.nodes: list[_Node] = []
        self.parent_of: list[int | None] = []  # for each feature the feature above it
        with reading("tree", "a node"):
            self._add(None, None, None, 0.0, **spec)
        n_features = len(self.parent_of)
        self.d_model = n_features if d_model is None else d_model
        rule = f"d_model must be in [1, 2048], at least {n_features}"
        require(1 <= n_features <= self.d_model <= 2048, rule, self.d_model)
        generator = torch.Generator().manual_seed(seed)
        basis = torch.linalg.qr(torch.randn(self.d_model, self.d_model, generator=generator)).Q
        norms = 1 + norm_std * torch.randn(n_features, 1, generator=generator)
        self.directions = basis[:n_features] * norms
        pairs = [(parent, child) for child, parent in enumerate(self.parent_of)]
        self.pairs = [(parent, child) for parent, child in pairs if parent is not None]

    def _add(
        self,
        parent,
        feature,
        draw,
        low,
        /,
        active_prob,
        is_read_out=True,
        is_binary=True,
        mutually_exclusive_children=False,
        children=(),
        id=None,
    ):
        """Add a node below node ``parent`` and feature ``feature``, and all that is below it."""
        require(0 <= active_prob <= 1, "active_prob must lie in [0, 1]", active_prob)
        number = len(self.nodes)
        if draw is None:
            draw = number
        self.nodes.append(_Node(parent, draw, low, low + active_prob, is_read_out, is_binary))
        if is_read_out:
            self.parent_of.append(feature)
            feature = len(self.parent_of) - 1
        # children that exclude each other share the draw of the first, in intervals side by side
        shared_draw = number + 1 if mutually_exclusive_children else None
        next_low = 0.0
        for i, child in enumerate(children):
            with reading(f"children[{i}]", "a node"):
                self._add(number, feature, shared_draw, next_low, **child)
                if mutually_exclusive_children:
                    next_low += child["active_prob"]
        require(
            next_low < 1 + 1e-9, "children that exclude each other must sum to at most 1", next_low
        )

    def sample_features(self, n_rows: int, generator: torch.Generator) -> Tensor:
        """Feature activations (n, n_features): a uniform draw a node, or a set of siblings."""
        draws = torch.rand(len(self.nodes), n_rows, generator=generator)
        is_on, features = [], []
        for node in self.nodes:
            draw = draws[node.draw]
            on = (draw >= node.low) & (draw < node.high)
            if node.parent is not None:
                on &= is_on[node.parent]
            is_on.append(on)
            if node.is_read_out:
                magnitude = 1.0
                if not node.is_binary:
                    magnitude = 0.5 + torch.rand(n_rows, generator=generator)
                features.append(on * magnitude)
        return torch.stack(features, dim=1)

    def sample(self, n_rows: int, seed: int) -> Tensor:
        """Rows (n, D) = features @ directions, which depend on ``seed`` alone."""
        features = self.sample_features(n_rows, torch.Generator().manual_seed(seed))
        return features @ self.directions


@torch.no_grad()
def matched_acts(sae: MatryoshkaSAE, tree: FeatureTree, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (n, n_features) of raw ``rows`` by the latents matched to the true features, greedily
    by |cosine|; and the largest |cosine| of each feature with a decoder row (n_features,)."""
    directions = nn.functional.normalize(tree.directions, dim=1)
    cosine = (directions @ sae.W_dec.T).abs()
    codes = sae.encode(rows)
    matched = torch.zeros(len(rows), len(cosine))
    unmatched = cosine.clone()
    for _ in range(min(cosine.shape)):
        feature, latent = divmod(int(unmatched.argmax()), unmatched.shape[1])
        matched[:, feature] = codes[:, latent]
        unmatched[feature] = -1.0
        unmatched[:, latent] = -1.0
    return matched, cosine.amax(dim=1)


def toy_figures(
    sae: MatryoshkaSAE, tree: FeatureTree, seed: int, n_rows: int = 20_000
) -> dict[str, Any]:
    """Figures on fresh toy rows: ``fvu``, ``l0``, and how well the true features are recovered.

    ``clean`` counts best |cosine| >= 0.9; ``absorption``, by parent and child: the share of the
    child's rows without the parent's latent."""
    features = tree.sample_features(n_rows, torch.Generator().manual_seed(seed))
    rows = features @ tree.directions
    acts, cosine = matched_acts(sae, tree, rows)
    figures = evaluate(sae, rows)
    absorption = []
    for parent, child in tree.pairs:
        is_silent = acts[features[:, child] > 0, parent] == 0
        rate = mean_known(is_silent.float())
        absorption.append({"parent": parent, "child": child, "rate": rate})
    return {
        "fvu": figures["fvu"],
        "l0": figures["l0"],
        "features": len(cosine),
        "clean": int((cosine >= 0.9).sum()),
        "mean_cosine": float(cosine.mean()),
        "min_cosine": float(cosine.min()),
        "absorption": absorption,
    }


# ---------------------------------------------------------------------------------------------
# 9. Language models: TinyModel, a hook for any module, rows into a file, the loss spliced
# ---------------------------------------------------------------------------------------------

TINY_MODEL = ("noanabeshima/tiny_model", "502a1f2453f61260c937f7807a1270a167faba07")
BEGIN = 9996  # token id before each text
PAD = 9998  # token id after those that are shorter
N_HEADS = 16


class TinyModel(nn.Module):
    """The language model noanabeshima/tiny_model: ids (B, T) -> logits (B, T, V).

    No layer norm. The stream of layer i enters ``layers[i]``, last ``lm_head``. The original
    returns log-probabilities."""

    def __init__(
        self,
        n_layers: int = 4,
        d_model: int = 768,
        d_mlp: int = 3072,
        n_vocab: int = 10_000,
        n_positions: int = 256,
    ):
        super().__init__()
        self.embed = nn.Embedding(n_vocab, d_model)
        self.pos_embed = nn.Parameter(torch.zeros(1, n_positions, d_model))
        self.torso = nn.Sequential(*(_Layer(d_model, d_mlp) for _ in range(n_layers)))
        self.lm_head = nn.Linear(d_model, n_vocab)
        self.layers = [*self.torso, self.lm_head]

    def forward(self, ids: Tensor) -> Tensor:
        stream = self.embed(ids) + self.pos_embed[:, : ids.shape[1]]
        return self.lm_head(self.torso(stream))

    @classmethod
    def load(cls, path: Path | str = "tiny_model.pt") -> "TinyModel":
        """Read a state dict, never objects: a file or, without one, the published one so named."""
        if not os.path.exists(path):
            repo, revision = TINY_MODEL
            path = download(repo, [str(path)], revision) / path
        with reading(path, "a state dict of TinyModel"):
            state = torch.load(path, map_location="cpu", weights_only=True)
            n_layers = len({key.split(".")[1] for key in state if key.startswith("torso.")})
            n_vocab, d_model = state["embed.weight"].shape
            _, n_positions, _ = state["pos_embed"].shape
            d_mlp = len(state["torso.0.mlp.read_in.bias"])
            model = cls(n_layers, d_model, d_mlp, n_vocab, n_positions)
            model.load_state_dict(state)
        return model.eval()


class _Layer(nn.Module):
    def __init__(self, d_model: int, d_mlp: int):
        super().__init__()
        attn = {name: nn.Linear(d_model, d_model, bias=name == "O") for name in "QKVO"}
        self.attn = nn.ModuleDict(attn)
        read_in = nn.Linear(d_model, d_mlp)
        write_out = nn.Linear(d_mlp, d_model)
        self.mlp = nn.ModuleDict({"read_in": read_in, "write_out": write_out})

    def forward(self, x: Tensor) -> Tensor:
        heads = []
        for name in "QKV":
            projected = self.attn[name](x).unflatten(-1, (N_HEADS, -1))
            heads.append(projected.transpose(1, 2))  # (B, 16, T, D/16)
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.attn["O"](mixed.transpose(1, 2).flatten(-2))
        return x + self.mlp["write_out"](torch.relu(self.mlp["read_in"](x)))


class _Stop(Exception):
    """Ends a forward pass after the module of interest."""


@contextlib.contextmanager
def activation_hook(
    module: nn.Module,
    at: str = "output",
    replace: Callable[[Tensor], Tensor] | None = None,
    stop: bool = False,
) -> Iterator[list[Tensor]]:
    """Capture "input" (first argument) or "output" (first item) of ``module``, a tensor a call.

    ``replace``: a function of that tensor whose result takes its place. ``stop``: end the forward
    pass. ``ValueError`` where the module is not called, or the value is no tensor."""
    require(at in ("input", "output"), 'at must be "input" or "output"', repr(at))
    name = type(module).__name__
    captured: list[Tensor] = []

    def capture(value: Any) -> Tensor:
        """Keep ``value``; return what takes its place, itself if nothing does."""
        is_tensor = isinstance(value, Tensor)
        require(is_tensor, f"{name}: its {at} must start with a tensor", type(value))
        captured.append(value.detach())
        if stop:
            raise _Stop
        return value if replace is None else replace(value).to(value)

    def input_hook(module, args, kwargs):
        if args:
            return (capture(args[0]), *args[1:]), kwargs
        key = next(iter(kwargs), None)
        return args, {**kwargs, key: capture(kwargs.get(key))}

    def output_hook(module, args, output):
        if isinstance(output, tuple):
            return capture(next(iter(output), None)), *output[1:]
        return capture(output)

    if at == "input":
        handle = module.register_forward_pre_hook(input_hook, with_kwargs=True)
    else:
        handle = module.register_forward_hook(output_hook)
    try:
        with contextlib.suppress(_Stop):
            yield captured
    finally:
        handle.remove()
    require(captured, f"{name} must be called in this context, calls", 0)


# Of text: token ids (B, T), or a dict of what a model takes by name, such as a tokenizer's. An
# entry "keep" (B, T) is not for the model. It says which tokens give a row: those of an assistant,
# say. Where there are no "input_ids", as of images, it has to be there.
Batch = Tensor | Mapping[str, Tensor]


def as_dict(batch: Batch) -> dict[str, Tensor]:
    """A batch by name; ``ValueError`` for what is none."""
    named = {"input_ids": batch} if isinstance(batch, Tensor) else batch
    is_dict = isinstance(named, Mapping)
    require(is_dict, "a batch must be a tensor of ids or a dict of tensors", type(batch))
    for name, value in named.items():
        require(isinstance(value, Tensor), f"{name} of a batch must be a tensor", type(value))
    mask = named.get("input_ids", named.get("keep"))
    require(mask is not None, 'a batch must have "input_ids" or "keep" (B, T)', list(named))
    require(mask.ndim == 2, "ids of a batch must be (B, T)", tuple(mask.shape))
    return dict(named)


def forward(model: nn.Module, batch: Batch) -> Any:
    """What ``model`` makes of a batch of text, on its own device."""
    device = next(model.parameters()).device
    inputs = {name: value.to(device) for name, value in as_dict(batch).items() if name != "keep"}
    if list(inputs) == ["input_ids"]:
        return model(inputs["input_ids"])  # whatever its argument is called
    return model(**inputs, **position_ids(model, inputs))


def position_ids(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """``position_ids`` (B, T) for texts that are padded on the left, where a model would count the
    padding too; ``ValueError`` if it does not take them. Else nothing."""
    mask = inputs.get("attention_mask")
    if mask is None or mask[:, 0].all() or "position_ids" in inputs:
        return {}
    takes = inspect.signature(model.forward).parameters
    rule = f"{type(model).__name__} must take position_ids, or texts be padded on the right"
    require("position_ids" in takes, rule, "padding on the left")
    return {"position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)}


def row_mask(batch: Batch, drop: Sequence[int]) -> Tensor:
    """Which tokens (B, T) give a row: those that are none of ``drop``, no padding, and in "keep" if
    that is there."""
    named = as_dict(batch)
    masks = [named[name].bool() for name in ("attention_mask", "keep") if name in named]
    if "input_ids" in named:
        ids = named["input_ids"]
        dropped = torch.tensor(list(drop), device=ids.device, dtype=ids.dtype)
        masks.append(~torch.isin(ids, dropped))
    shapes = [tuple(mask.shape) for mask in masks]
    require(len(set(shapes)) == 1, "ids and masks of a batch must have one shape", shapes)
    return torch.stack(masks).all(dim=0)


@torch.no_grad()
def activations(model: nn.Module, module: nn.Module, batch: Batch, mask: Tensor, at: str) -> Tensor:
    """Of ``module`` at the tokens of ``mask`` (B, T): (n, D), on the model's device.

    ``ValueError`` where the module gives no vector for each token."""
    with activation_hook(module, at, stop=True) as captured:
        forward(model, batch)
    found = captured[0]
    check_shape(module, found, mask)
    return found[mask.to(found.device)]


def check_shape(module: nn.Module, found: Tensor, mask: Tensor) -> None:
    """``ValueError`` unless what ``module`` gave is a vector for each token of ``mask`` (B, T)."""
    rule = f"{type(module).__name__} must give (B, T, D) for token ids {tuple(mask.shape)}"
    require(found.ndim == 3, rule, tuple(found.shape))
    require(found.shape[:2] == mask.shape, rule, tuple(found.shape))


@torch.no_grad()
def check_model(model: nn.Module, module: nn.Module, batch: Batch, at: str) -> None:
    """``ValueError`` unless ``model`` is in evaluation mode and calls ``module`` once.

    Of one text, whose (1, T, D) cannot be taken for (T, 1, D) of a module that lists tokens
    first."""
    require(not model.training, "model must be in evaluation mode, model.eval()", "one in training")
    text = {name: value[:1] for name, value in as_dict(batch).items()}
    with activation_hook(module, at) as captured:
        forward(model, text)
    rule = f"{type(module).__name__} must be called once in a forward pass, calls"
    require(len(captured) == 1, rule, len(captured))
    check_shape(module, captured[0], row_mask(text, ()))


def harvest(
    model: nn.Module,
    module: nn.Module,
    batches: Iterable[Batch],
    out: Path | str,
    at: str = "output",
    drop: Sequence[int] = (),
    dtype: str = "float16",
    max_rows: int | None = None,
    on_rows: Callable[[int], None] = lambda n_done: None,
) -> int:
    """Write the activations of ``module`` in ``model`` to ``out``, X.npy (rows, D), with number of
    the text and token id of each to X.ids.npy, int32 (rows, 2); return the number of rows.

    ``batches``: token ids (B, T), or dicts (see ``Batch``). Ids in ``drop``, and what an
    "attention_mask" or "keep" leaves out, give no row. Without "input_ids" there is no X.ids.npy.
    What is written so far is a whole file at any time. ``ValueError`` where ``out`` exists, rows do
    not fit, or there are none."""
    require(not Path(out).exists(), "out must be a new file", out)
    require(dtype in ("float16", "float32"), "dtype must be float16 or float32", dtype)
    ids_file = Path(out).with_suffix(".ids.npy")
    n_done = n_texts = 0
    for batch in batches:
        if n_texts == 0:
            check_model(model, module, batch, at)
        mask = row_mask(batch, drop)
        text_numbers = mask.nonzero()[:, 0] + n_texts
        n_texts += len(mask)
        if len(text_numbers) == 0:
            continue
        found = activations(model, module, batch, mask, at)
        rows = in_dtype(found, dtype, text_numbers).cpu().numpy()
        n_new = len(rows) if max_rows is None else min(len(rows), max_rows - n_done)
        ids = as_dict(batch).get("input_ids")
        if ids is not None:
            tokens = torch.stack([text_numbers, ids[mask]], dim=1).int().cpu().numpy()
            append_rows(ids_file, n_done, tokens[:n_new])
        append_rows(out, n_done, rows[:n_new])
        n_done += n_new
        on_rows(n_done)
        if n_done == max_rows:
            break
    require(n_done > 0, "the batches must give at least 1 row", n_done)
    return n_done


def in_dtype(rows: Tensor, dtype: str, text_numbers: Tensor) -> Tensor:
    """``rows`` (n, D) in ``dtype``; ``ValueError`` says how many do not fit, and how many of these
    are the first of their text, whose number is in ``text_numbers`` (n,)."""
    converted = rows.to(getattr(torch, dtype))
    is_bad = ~converted.isfinite().all(dim=1).cpu()
    if is_bad.any():
        is_first = text_numbers.diff(prepend=text_numbers[:1] - 1) != 0
        n_first = int(is_bad[is_first.cpu()].sum())
        found = f"{is_bad.sum()} of {len(rows)} rows of a batch do not fit in {dtype}"
        way_on = "" if dtype == "float32" else "; float32 has more range, in twice the disk"
        raise ValueError(f"{found}, {n_first} of them first tokens{way_on}")
    return converted


def append_rows(path: Path | str, n_before: int, rows: np.ndarray) -> None:
    """Put ``rows`` (m, D) behind the first ``n_before`` of the ``.npy`` at ``path``, a whole file
    meanwhile: rows first, then the header that counts them. It keeps its length, as numpy leaves
    room to count on."""
    header = {"descr": rows.dtype.str, "fortran_order": False, "shape": (n_before, rows.shape[1])}
    with open(path, "r+b" if n_before else "wb") as file:  # a map would die on a full disk
        np.lib.format.write_array_header_1_0(file, header)
        file.seek(n_before * rows.strides[0], os.SEEK_CUR)
        file.write(rows.data)
        file.seek(0)
        header["shape"] = (n_before + len(rows), rows.shape[1])
        np.lib.format.write_array_header_1_0(file, header)


class Stream(Source):
    """Rows of a model as it makes them, without a file: for ``train``, ``Trainer.on`` and loops.

    ``batches``: what can be iterated anew, or a function that returns an iterator, of token ids (B,
    T) or dicts (see ``harvest``); an iterator is good for one epoch. The model fills a pool of
    about ``pool`` bytes, at least 64 batches of training, on their device. Its order is mixed, it
    is used up, and the next one is filled. The first texts, whole ones with at most ``n_held_out``
    rows, are ``held_out``: they give scale, limit (``max_norm``, see ``Rows``) and threshold, and
    are not trained on. A run that is cut counts tokens, without the model, up to its pool.
    ``ValueError`` for a model, a module or batches that do not fit."""

    def __init__(
        self,
        model: nn.Module,
        module: nn.Module,
        batches: Iterable[Batch] | Callable[[], Iterable[Batch]],
        at: str = "output",
        drop: Sequence[int] = (),
        pool: int = POOL_BYTES,
        n_held_out: int = SAMPLE,
        max_norm: float = 10.0,
        on_rows: Callable[[int], None] = lambda n_made: None,
    ):
        self.activations = functools.partial(activations, model, module, at=at)
        self.source = batches
        self.drop = drop
        self.pool = pool
        self.on_rows = on_rows
        self.n_made = 0
        texts = self._texts()
        first = next(texts, None)
        require(first is not None, "batches must hold texts", "none")
        check_model(model, module, first, at)
        sample = self._hold_out(itertools.chain([first], texts), n_held_out)
        self.d_model = sample.shape[1]
        # float16 has half the memory of float32, if its range, 65,504, is enough
        fits = sample.dtype == torch.float32 and float(sample.abs().max()) < 2**15
        self.dtype = torch.float16 if fits else sample.dtype
        self.held_out = Rows(sample, max_norm)
        self.centre = self.held_out.centre
        self.radius = self.held_out.radius

    def _texts(self) -> Iterator[Batch]:
        """The batches of text of one epoch."""
        return iter(self.source() if callable(self.source) else self.source)

    def _hold_out(self, texts: Iterator[Batch], n_most: int) -> Tensor:
        """The rows (n, D) of the first texts; ``n_aside`` is the number of these texts."""
        taken, rows = [], []
        self.n_aside = n_rows = 0
        for batch in texts:
            taken.append(batch)
            mask = row_mask(batch, self.drop)
            ends = n_rows + mask.sum(dim=1).cumsum(0)  # rows up to the end of each text
            n_texts = int((ends <= n_most).sum())
            mask[n_texts:] = False
            rows.append(self.activations(batch, mask).cpu())
            n_rows += len(rows[-1])
            self.n_aside += n_texts
            if n_texts < len(mask):
                break
        if isinstance(self.source, Iterator):  # what was taken from it comes first
            self.source = itertools.chain(taken, texts)
        rule = f"the first texts must have rows, tokens in drop do not, and at most {n_most} each"
        require(n_rows > 0, rule, n_rows)
        return torch.cat(rows)

    def split_off(self, fraction: float, seed: int = 0) -> tuple["Stream", Rows]:
        """(This stream, the rows held out), whatever the fraction."""
        return self, self.held_out

    def sample(self, seed: int) -> Tensor:
        """The rows held out: (n, D)."""
        return self.held_out.read()

    def _pools(self, draw: Draw) -> Iterator[tuple[Tensor, Tensor]]:
        n_pool = max(self.pool // (self.d_model * self.dtype.itemsize), 64 * draw.batch_size)
        if draw.end is not None:  # pools of equal size, so that the last makes no row in vain
            n_all = draw.end * draw.batch_size
            n_pool = math.ceil(n_all / math.ceil(n_all / n_pool))
        memory = torch.empty(0, self.d_model, dtype=self.dtype, device=draw.device)
        n_seen = 0
        for number, (texts, n_rows) in enumerate(self._groups(draw, n_pool)):
            n_skip = draw.n_skip - n_seen
            n_seen += n_rows
            if n_skip >= n_rows:
                continue
            memory.resize_(n_rows, self.d_model)
            self._fill(memory, texts, draw.stop)
            if draw.stop():
                return
            found = distances(memory, self.centre)
            require(found.isfinite().all(), "activations must be finite", "NaN")
            order = np.random.default_rng([draw.seed, number]).permutation(n_rows)
            yield memory, near_order(order, found <= self.radius, max(0, n_skip))

    def _groups(self, draw: Draw, n_least: int) -> Iterator[tuple[list, int]]:
        """(Batches of text with masks, and their rows, ``n_least`` or more), by the masks alone.
        The last of an epoch has fewer."""
        n_all = 0
        while True:
            n_before = n_all
            group, n_rows = [], 0
            for batch, mask in self._own_texts(draw):
                group.append((batch, mask))
                n_rows += int(mask.sum())
                if n_rows >= n_least:
                    yield group, n_rows
                    n_all += n_rows
                    group, n_rows = [], 0
            if n_rows > 0:
                yield group, n_rows
            n_all += n_rows
            rule = (
                "batches must go on after those held out, and start anew as a list or function does"
            )
            require(n_all > n_before, rule, f"an end after {n_all:,} rows")

    def _own_texts(self, draw: Draw) -> Iterator[tuple[Batch, Tensor]]:
        """This process's batches of an epoch, and which of their tokens are rows to train on."""
        n_texts = 0
        for number, batch in enumerate(self._texts()):
            mask = row_mask(batch, self.drop)
            mask[: max(0, self.n_aside - n_texts)] = False
            n_texts += len(mask)
            if number % draw.world == draw.rank:
                yield batch, mask

    def _fill(self, memory: Tensor, texts: list, stop: Callable[[], bool]):
        """Run the model on the texts; what lies beyond the range of a dtype is far out anyway."""
        limit = torch.finfo(self.dtype).max
        end = 0
        for batch, mask in texts:
            if stop():
                return
            made = self.activations(batch, mask)
            memory[end : end + len(made)] = made.clamp(-limit, limit)
            end += len(made)
            self.n_made += len(made)
            self.on_rows(self.n_made)


@torch.no_grad()
def loss_recovered(
    model: nn.Module,
    module: nn.Module,
    sae: MatryoshkaSAE,
    batches: Iterable[Batch],
    at: str = "output",
    drop: Sequence[int] = (),
) -> dict[str, Any]:
    """Cross-entropy, nats per token, with the stream at ``module`` left, zeroed, coded.

    ``batches`` as for ``harvest``. Tokens that give no row keep their stream and are not predicted.
    Rows that ``sae`` does not cover, ``uncovered`` of ``rows``, keep it too (see ``splice``), but
    for the figures ``all_coded``. By prefix ``recovered = (zeroed - spliced) / (zeroed - clean)``,
    None for 0 / 0."""
    n_rows = n_uncovered = n_tokens = 0

    def clean(rows: Tensor) -> Tensor:
        nonlocal n_rows, n_uncovered
        n_rows += len(rows)
        n_uncovered += int((~sae.covers(rows)).sum())
        return rows

    swaps = [clean, torch.zeros_like, sae]
    swaps += [functools.partial(sae.splice, prefix=p) for p in sae.prefixes]
    sums = np.zeros(len(swaps))
    for batch in batches:
        keep, is_target, target = targets(batch, drop, next(model.parameters()).device)
        n_tokens += len(target)
        for i, swap in enumerate(swaps):
            with activation_hook(module, at, functools.partial(replace_rows, keep, swap)):
                output = forward(model, batch)
            logits = getattr(output, "logits", output)[:, :-1][is_target]
            sums[i] += float(nn.functional.cross_entropy(logits.float(), target, reduction="sum"))
    require(n_tokens > 0, "the batches must have tokens to predict", n_tokens)
    loss, zeroed, *coded = (sums / n_tokens).tolist()

    def recovered(spliced: float) -> float | None:
        return (zeroed - spliced) / (zeroed - loss) if zeroed != loss else None

    levels = [
        {"latents": p, "spliced": spliced, "recovered": recovered(spliced)}
        for p, spliced in zip(sae.prefixes, coded[1:], strict=True)
    ]
    return {
        "clean": loss,
        "zeroed": zeroed,
        "tokens": n_tokens,
        "rows": n_rows,
        "uncovered": n_uncovered,
        "all_coded": {"spliced": coded[0], "recovered": recovered(coded[0])},
        "prefixes": levels,
    }


def targets(
    batch: Batch, drop: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens (B, T) give a row; which positions (B, T - 1) predict one of them, none of which
    is padding; and the ids that they should predict."""
    named = as_dict(batch)
    require("input_ids" in named, 'batches must have "input_ids" to predict', list(named))
    keep = row_mask(batch, drop)
    is_target = keep[:, 1:].clone()
    if "attention_mask" in named:
        is_target &= named["attention_mask"][:, :-1].bool()
    target = named["input_ids"][:, 1:][is_target]
    return keep.to(device), is_target.to(device), target.to(device)


def replace_rows(keep: Tensor, swap: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``x`` (B, T, D) with ``swap`` of the rows (n, D) where ``keep`` (B, T) is."""
    return x.index_put((keep,), swap(x[keep]).to(x))
