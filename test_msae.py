"""Claims about msae, each against a naive oracle or a literal number. Needs no GPU and no network."""

import base64
import collections
import contextlib
import copy
import dataclasses
import functools
import hashlib
import http.server
import importlib.util
import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unittest.mock
import urllib.parse
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner

import cli
import msae

HERE = Path(__file__).parent
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def rows(n=512, d=16, seed=0, scale=3.0, mean=5.0):
    """Correlated rows with a common mean, as float32 numpy."""
    g = np.random.default_rng(seed)
    return (g.laplace(size=(n, d)) @ g.normal(size=(d, d)) * scale / d**0.5 + mean).astype(np.float32)


def config(**changes):
    return msae.TrainConfig(**{**dict(n_latents=32, k=4.5, prefixes=(4, 12, 32), batch_size=64, steps=20), **changes})


# ------------------------------------------------------------------------------------------------------------- the loss


def naive_loss(x, acts, W_dec, b_dec, prefixes, weights):
    """The formula, one row, one prefix and one latent at a time."""
    loss = 0.0
    for p, w in zip(prefixes, weights):
        for b in range(len(x)):
            recon = b_dec
            for j in range(p):
                recon = recon + acts[b, j] * W_dec[j]
            loss = loss + w / len(x) * ((x[b] - recon) ** 2).sum()
    return loss


def test_loss_by_hand():
    # prefix 1 reconstructs (3, 0), error 16; prefix 2 reconstructs (3, 2), error 4
    x, acts, W_dec, b_dec = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 2.0]]), torch.eye(2), torch.zeros(2)
    assert msae.nested_loss(x, acts, W_dec, b_dec, (1, 2)) == 10.0
    assert msae.nested_loss(x, acts, W_dec, b_dec, (1, 2), [0.25, 0.75]) == 7.0
    assert msae.nested_loss(x, acts, W_dec, b_dec, (2,)) == 4.0


@pytest.mark.parametrize("prefixes, weights", [((3, 5, 9), (0.5, 0.2, 0.3)), ((9,), (1.0,)), (tuple(range(1, 10)), (1 / 9,) * 9)])
def test_loss_and_gradients_equal_the_naive_loop(prefixes, weights):
    g = torch.Generator().manual_seed(0)
    x, acts = torch.randn(4, 6, generator=g), torch.rand(4, 9, generator=g) * (torch.rand(4, 9, generator=g) < 0.4)
    acts[1] = 0  # a row without an active latent
    leaves = [t.double().requires_grad_() for t in (acts, torch.randn(9, 6, generator=g), torch.randn(6, generator=g))]
    ours, naive = msae.nested_loss(x.double(), *leaves, prefixes, weights), naive_loss(x.double(), *leaves, prefixes, weights)
    torch.testing.assert_close(ours, naive)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(naive, leaves)):
        torch.testing.assert_close(a, b)


STEPS = {
    "fixed prefixes": {},
    "one prefix": dict(prefixes=(32,)),
    "level weights": dict(level_weights=(3, 2, 1)),
    "Pareto prefixes": dict(prefixes=None, n_prefixes=5),
    "energy order": dict(order="energy"),
    "Pareto prefixes in energy order": dict(prefixes=None, n_prefixes=5, order="energy"),
    "dead latents": dict(dead_after=64),
    "more entries than are positive": dict(k=31),
    "spare latents": dict(n_latents_start=40, steps=5, prune_window=(0.0, 0.5)),
    "most rows without a survivor": dict(k=0.1),
    "one row": dict(batch_size=1),
}


def recorded_gradients(trainer):
    """A list to which each step adds its gradients, before the optimizer uses them and pruning drops them."""
    seen, optimize = [], trainer.optimize

    def recorded():
        seen.append([parameter.grad.clone() for parameter in trainer.sae.parameters()])
        optimize()

    trainer.optimize = recorded
    return seen


@pytest.mark.parametrize("changes", STEPS.values(), ids=STEPS.keys())
def test_sparse_step_equals_the_dense_step(changes):
    cfg = config(**changes)
    x = torch.from_numpy(rows(cfg.batch_size * 5, mean=0.3)).split(cfg.batch_size)
    sparse, dense = msae.Trainer(cfg, 16, scale=4.0), msae.Trainer(cfg, 16, scale=4.0)
    sparse.fast, dense.fast = True, False
    gradients = [recorded_gradients(trainer) for trainer in (sparse, dense)]
    for batch in x:
        torch.testing.assert_close(sparse.step(batch), dense.step(batch), rtol=1e-5, atol=0)
        for ours, literal in zip(gradients[0].pop(), gradients[1].pop()):
            assert (ours - literal).norm() <= 1e-5 * literal.norm()
        for a, b in zip(sparse.sae.parameters(), dense.sae.parameters()):
            b.data.copy_(a.data)
        assert torch.equal(sparse.rows_silent, dense.rows_silent)
        torch.testing.assert_close(sparse.energy, dense.energy)


def test_one_prefix_is_the_plain_batch_topk_sae():
    cfg, x = config(prefixes=(32,)), torch.from_numpy(rows(64, mean=0.0))
    trainer = msae.Trainer(cfg, 16)
    sae = trainer.sae
    pre = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    acts = pre * (pre >= pre.flatten().sort(descending=True).values[round(4.5 * 64) - 1])
    expected = (x - (acts @ sae.W_dec + sae.b_dec)).pow(2).sum(dim=1).mean()
    torch.testing.assert_close(trainer.step(x), expected.detach())


def test_aux_loss_moves_only_the_dead_latents():
    sae, x = msae.MatryoshkaSAE(8, 4), torch.randn(32, 8)
    msae.aux_loss(sae, x, x, torch.tensor([2])).backward()
    assert sae.W_enc.grad[:, 2].norm() > 0 and sae.b_enc.grad[2] != 0 and sae.W_dec.grad[2].norm() > 0
    assert sae.W_enc.grad[:, [0, 1, 3]].norm() == 0 and sae.W_dec.grad[[0, 1, 3]].norm() == 0 and sae.b_dec.grad is None


def test_aux_loss_equals_its_formula():
    g = torch.Generator().manual_seed(1)
    sae, x, residual = msae.MatryoshkaSAE(4, 6, generator=g), torch.randn(5, 4, generator=g), torch.randn(5, 4, generator=g)
    dead, total = [1, 3, 4], 0.0
    for e, row in zip(residual, x):  # the two (D / 2) largest of three dead latents
        pre = {j: max(0.0, ((row - sae.b_dec) @ sae.W_enc[:, j] + sae.b_enc[j]).item()) for j in dead}
        top = sorted(pre, key=pre.get)[-2:]
        total += (e - sum(pre[j] * sae.W_dec[j] for j in top)).pow(2).sum().item()
    expected = total / float((residual - residual.mean(dim=0)).pow(2).sum())
    assert msae.aux_loss(sae, x, residual, torch.tensor(dead)).item() == pytest.approx(expected, rel=1e-5)


# --------------------------------------------------------------------------------------------------- selection, prefixes


@pytest.mark.parametrize("change", [lambda pre: pre, lambda pre: pre.mul(2).round().div(2), lambda pre: -pre.abs()],
                         ids=["distinct", "ties", "none positive"])
def test_batch_topk_keeps_the_n_largest_in_row_major_order(change):
    pre = torch.relu(change(torch.randn(7, 11, generator=torch.Generator().manual_seed(0))))
    values, index = msae.batch_topk(pre, 17)
    assert torch.equal(values, pre.flatten()[index]) and (index.diff() > 0).all() and len(index) == 17
    assert sorted(values.tolist()) == sorted(pre.flatten().tolist())[-17:]


@pytest.mark.parametrize("floor", [0.0, 0.5, 100.0])
@pytest.mark.parametrize("n, bias", [(17, 0.0), (260, 0.0), (17, -9.0)], ids=["some", "all positive", "none positive"])
def test_search_by_blocks_of_latents_equals_the_search_of_the_whole_matrix(monkeypatch, n, bias, floor):
    monkeypatch.setattr(msae, "CACHED", 10)  # blocks of 5 latents
    g = torch.Generator().manual_seed(0)
    x, W_enc, b_enc = (torch.randint(-2, 3, shape, generator=g).float() for shape in ((8, 6), (6, 33), (33,)))
    pre = torch.relu(x @ W_enc + b_enc + bias)  # with many ties, of which any may be kept
    values, index = msae.sparse_topk(x, W_enc, b_enc + bias, n, floor)
    literal = msae.batch_topk(pre, n)[0]
    assert torch.equal(values.sort().values, literal[literal > 0].sort().values)
    assert torch.equal(values, pre.flatten()[index]) and (index.diff() > 0).all()


@pytest.mark.parametrize("order", ["stored", "energy"])
def test_no_result_depends_on_where_the_search_starts_or_on_kept_memory(order):
    cfg, batches = config(order=order, prefixes=None, n_prefixes=4), torch.from_numpy(rows(64 * 8)).split(64)
    through, cut_off = msae.Trainer(cfg, 16), msae.Trainer(cfg, 16)
    for i, x in enumerate(batches):
        through.step(x)
        cut_off.cut = torch.tensor((0.0, 1e-3, 1e9)[i % 3])
        cut_off.buffer = None
        cut_off.optimizer.zero_grad()
        cut_off.step(x)
        assert all(torch.equal(a, b) for a, b in zip(through.sae.state_dict().values(), cut_off.sae.state_dict().values()))


def test_k_is_an_average_over_the_batch():
    values, _ = msae.batch_topk(torch.rand(200, 20) + 0.1, round(1.2338 * 200))
    assert len(values) == 247


def test_prefixes():
    assert msae.prefix_lengths(3072) == (192, 384, 768, 1536, 3072)
    assert msae.prefix_lengths(20, (0.1, 0.5, 1)) == (2, 10, 20)
    assert msae.prefix_lengths(1) == (1,)
    assert msae.sample_prefixes(20, 1) == (20,)
    assert msae.sample_prefixes(6, 6) == (1, 2, 3, 4, 5, 6)


def test_small_pareto_power_favours_short_prefixes_and_one_is_uniform():
    g = torch.Generator().manual_seed(0)
    drawn = {power: np.array([msae.sample_prefixes(101, 2, power, g) for _ in range(4000)]) for power in (0.1, 0.5, 1.0)}
    assert all((d[:, 1] == 101).all() and d[:, 0].min() >= 1 and d[:, 0].max() <= 100 for d in drawn.values())
    assert drawn[0.1][:, 0].mean() < drawn[0.5][:, 0].mean() < drawn[1.0][:, 0].mean()
    assert drawn[1.0][:, 0].mean() == pytest.approx(50.5, abs=2)
    assert (drawn[0.5][:, 0] == 1).mean() == pytest.approx(1 / 100**0.5, abs=0.02)  # (1^a - 0^a) / 100^a


# --------------------------------------------------------------------------------------------------------------- config


def test_schedules():
    cfg = config(steps=100, lr=1.0, warmup_steps=10, decay_fraction=0.2, k=4, k_start=8, k_anneal_steps=4,
                 level_weights=(1, 1, 2), n_latents_start=36, prune_window=(0.5, 0.9))
    assert [cfg.lr_at(s) for s in (0, 9, 50, 80, 90, 99)] == pytest.approx([0.1, 1, 1, 1, 0.5, 0.05])
    assert [cfg.k_at(s) for s in (0, 2, 4, 99)] == [8, 6, 4, 4]
    assert [cfg.latents_at(s) for s in (0, 50, 60, 61, 80, 89, 90, 99)] == [36, 36, 35, 35, 33, 33, 32, 32]
    assert cfg.weights() == [0.25, 0.25, 0.5]


BAD_SETTINGS = {
    "k": [0, -1, 33, 0.001, float("nan"), True, "4", None],
    "n_latents": [0, -5, 2.5, None],
    "prefixes": [(), (4, 4, 32), (8, 4, 32), (4, 12), (4, 33), (0, 32), (-1, 32), (0.5, 0.2, 1), (4.5, 32), "4,32"],
    "n_prefixes": [0, 33], "pareto_power": [0, 1.5], "level_weights": [(1, 2), (1, -1, 1), (0, 0, 0), ("a", 1, 1)],
    "order": ["sorted"], "batch_size": [0], "steps": [0], "lr": [0, -1e-3, float("inf")], "betas": [(0.9,), (0.9, 1.0)],
    "decay_fraction": [-0.1, 1.1], "dtype": ["int8"], "seed": [-1], "k_start": [0, 40], "aux_coef": [-1], "dead_after": [0],
    "clip": [0], "warmup_steps": [-1], "k_anneal_steps": [-1],
    "n_latents_start": [31], "prune_window": [(0.5, 0.5), (0.2,), (0.5, 1.2)],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in BAD_SETTINGS.items() for value in values])
def test_bad_settings_are_refused_by_name_and_value(name, value):
    changes = {"prefixes": None} if name == "n_prefixes" else {}
    with pytest.raises(ValueError, match=name) as error:
        config(**{**changes, name: value})
    assert "\n" not in str(error.value)


def test_default_learning_rate_falls_with_the_root_of_the_width():
    assert msae.default_lr(1600) == pytest.approx(6e-3) and msae.default_lr(6400) == pytest.approx(3e-3) and msae.default_lr(20) == 0.01


# ------------------------------------------------------------------------------------------------------------- training


def test_training_learns_keeps_unit_rows_and_hits_k(tmp_path):
    train, held_out = msae.Rows(rows(80_000)).split_off(0.2, 0)
    sae = msae.train(train, config(steps=400, lr=0.01), out=tmp_path / "run")
    figures = msae.evaluate(sae, held_out)
    assert figures["fvu"] < 0.35 and figures["l0"] == pytest.approx(4.5, rel=0.02) and figures["dead"] < 0.1
    assert [p["fvu"] for p in figures["prefixes"]] == sorted((p["fvu"] for p in figures["prefixes"]), reverse=True)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    assert sae.threshold.min() >= 0
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(50, 401, 50))


def test_same_seed_same_weights_other_seed_other_weights():
    saes = [msae.train(rows(1000), config(seed=seed, prefixes=None, n_prefixes=4)) for seed in (0, 0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(saes[0].state_dict().values(), saes[1].state_dict().values()))
    assert not torch.equal(saes[0].W_dec, saes[2].W_dec)


def test_spare_latents_go_one_by_one_the_least_energetic_first():
    trainer = msae.Trainer(config(n_latents_start=48, steps=12, prune_window=(0.5, 0.8)), 16)
    sizes = []
    for batch in torch.from_numpy(rows(64 * 12)).split(64):
        trainer.step(batch)
        sizes.append(len(trainer.energy))
        msae.Trainer(trainer.cfg, 16).load_state_dict(trainer.state_dict())  # wherever the run is cut
    assert sizes[:6] == [48] * 6 and sizes[6] < 48 and sizes == sorted(sizes, reverse=True) and sizes[-1] == 32
    assert trainer.export().prefixes == (4, 12, 32)
    trainer.energy.copy_(torch.randperm(32))
    best = trainer.energy >= 20
    W_enc, moments = trainer.sae.W_enc.detach().clone(), trainer.optimizer.state[trainer.sae.W_dec]["exp_avg"].clone()
    trainer.prune(12)
    assert torch.equal(trainer.sae.W_enc, W_enc[:, best]) and sorted(trainer.energy.tolist()) == list(range(20, 32))
    assert torch.equal(trainer.optimizer.state[trainer.sae.W_dec]["exp_avg"], moments[best])


@pytest.mark.parametrize("order", ["stored", "energy"])
def test_export_folds_the_scale_and_lays_latents_out_in_prefix_order(order):
    data = torch.from_numpy(rows(640))
    trainer = msae.Trainer(config(order=order), 16, mean=data.mean(dim=0), scale=7.0)
    for x in data.split(64):
        trainer.step(x)
    sae, where = trainer.export(), torch.arange(32) if order == "stored" else trainer.prefix_order()
    torch.testing.assert_close(sae.encode(data), 7.0 * trainer.sae.encode(data / 7.0)[:, where], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(data), 7.0 * trainer.sae(data / 7.0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(32))
    assert order == "stored" or (trainer.energy[where].diff() <= 0).all()


def test_calibration_keeps_exactly_k_per_row():
    data, sae = torch.from_numpy(rows(640)), msae.MatryoshkaSAE(16, 32)
    for floor in (0.0, 1e9):  # the search starts above half the present threshold and falls back
        sae.threshold.fill_(floor)
        msae.calibrate(sae, data, 4.5)
        assert float((sae.encode(data) > 0).sum()) == 4.5 * 640
    msae.calibrate(sae, data, 32)
    assert not sae.threshold.any()


def test_b_dec_starts_at_the_mean_and_the_encoder_as_the_decoder():
    data = torch.from_numpy(rows(640))
    trainer = msae.Trainer(config(), 16, mean=data.mean(dim=0), scale=2.0)
    torch.testing.assert_close(trainer.sae.b_dec.data, data.mean(dim=0) / 2)
    assert torch.equal(trainer.sae.W_enc, trainer.sae.W_dec.T)


def test_a_reader_that_ends_early_is_an_error():
    class Short(msae.Rows):
        def batches(self, *arguments):
            return msae.itertools.islice(super().batches(*arguments), 7)

    with pytest.raises(ValueError, match="must last for 20 steps, they ended after, got 7"):
        msae.train(Short(rows(2000)), config())


def test_one_dimension_has_an_encoder_and_a_decoder_of_its_own(tmp_path):
    sae = msae.train(rows(1000, d=1), config(n_latents=4, prefixes=None, k=1.5), out=tmp_path)
    assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr() and msae.MatryoshkaSAE.load(tmp_path).W_enc.shape == (1, 4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_autocast_trains_with_float32_weights(dtype):
    sae = msae.train(rows(40_000), config(dtype=dtype, steps=200))
    assert {p.dtype for p in sae.state_dict().values()} == {torch.float32}
    assert msae.evaluate(sae, rows(40_000))["l0"] == pytest.approx(4.5, rel=0.02)


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_training_on_cuda(dtype):
    sae = msae.train(rows(40_000), config(dtype=dtype, steps=200), device="cuda")
    assert msae.evaluate(sae, rows(40_000))["l0"] == pytest.approx(4.5, rel=0.02)


# ------------------------------------------------------------------------------------------------------- SAE, evaluation


def test_encode_of_a_prefix_is_the_start_of_the_codes():
    sae, x = msae.MatryoshkaSAE(16, 32), torch.from_numpy(rows(10)).view(2, 5, 16)
    sae.threshold.fill_(0.5)
    codes = sae.encode(x)
    assert codes.shape == (2, 5, 32) and not ((codes > 0) & (codes <= 0.5)).any()
    torch.testing.assert_close(sae.encode(x, prefix=8), codes[..., :8])
    torch.testing.assert_close(sae.decode(codes[..., :8]), codes[..., :8] @ sae.W_dec[:8] + sae.b_dec)
    for bad in (lambda: sae.encode(x, prefix=0), lambda: sae.encode(x, prefix=33), lambda: sae.encode(x[..., :15])):
        with pytest.raises(ValueError):
            bad()


def test_evaluate_equals_its_formulas():
    data, sae = torch.from_numpy(rows(300)), msae.MatryoshkaSAE(16, 32, (4, 32))
    sae.threshold.fill_(2.0)
    figures = msae.evaluate(sae, data, batch_size=70)
    total, acts = (data - data.mean(dim=0)).pow(2).sum(), sae.encode(data)
    for p, level in zip((4, 32), figures["prefixes"]):
        assert level["fvu"] == pytest.approx(((data - sae.decode(acts[:, :p])).pow(2).sum() / total).item(), rel=1e-4)
        assert level["l0"] == pytest.approx(float((acts[:, :p] > 0).sum(dim=1).float().mean()))
    assert figures["dead"] == float((acts.amax(dim=0) == 0).float().mean())
    cosine = sae.W_dec @ sae.W_dec.T - 2 * torch.eye(32)
    assert figures["max_cosine"] == pytest.approx(cosine.max(dim=1).values.mean().item(), rel=1e-5)


def test_predicting_the_mean_has_fvu_one():
    data, sae = rows(300, mean=1000.0), msae.MatryoshkaSAE(16, 32)
    sae.b_dec.data.copy_(torch.from_numpy(data.mean(axis=0)))
    sae.threshold.fill_(1e9)
    figures = msae.evaluate(sae, data)
    assert figures["fvu"] == pytest.approx(1, rel=1e-3) and figures["l0"] == 0 and figures["dead"] == 1


# ---------------------------------------------------------------------------------------------------------------- files


def test_save_and_load_are_inverse(tmp_path):
    sae = msae.train(rows(1000), config(), out=tmp_path / "run")
    back = msae.MatryoshkaSAE.load(tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(sae.state_dict().values(), back.state_dict().values()))
    assert back.prefixes == (4, 12, 32) and back.metadata == json.loads(json.dumps(sae.metadata)) and back.metadata["k"] == 4.5
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["cfg.json", "metrics.jsonl", "sae_weights.safetensors", "training_state.pt"]


def damage(folder, how):
    weights, cfg = folder / "sae_weights.safetensors", folder / "cfg.json"
    tensors, settings = safetensors.torch.load_file(weights), json.loads(cfg.read_text())
    if how == "no cfg":
        cfg.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif how == "cut cfg":
        cfg.write_text(cfg.read_text()[:40])
    elif how == "foreign architecture":
        cfg.write_text(json.dumps({**settings, "architecture": "gated"}))
    elif how == "wrong shape":
        cfg.write_text(json.dumps({**settings, "d_in": 17}))
    elif how == "missing tensor":
        weights.write_bytes(safetensors.torch.save({k: v for k, v in tensors.items() if k != "b_enc"}))
    elif how == "extra tensor":
        weights.write_bytes(safetensors.torch.save({**tensors, "mask": torch.ones(3)}))
    elif how == "not finite":
        weights.write_bytes(safetensors.torch.save({**tensors, "b_enc": tensors["b_enc"] * float("nan")}))
    elif how == "metadata a list":
        cfg.write_text(json.dumps({**settings, "metadata": [32]}))


@pytest.mark.parametrize("how, names", [("no cfg", "cfg.json"), ("no weights", "sae_weights"), ("cut weights", "JumpReLU"),
                                        ("cut cfg", "JumpReLU"), ("foreign architecture", "gated"), ("wrong shape", "17"),
                                        ("missing tensor", "b_enc"), ("extra tensor", "mask"), ("not finite", "finite"), ("metadata a list", "mapping")])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, how, names):
    msae.MatryoshkaSAE(16, 32).save(tmp_path)
    damage(tmp_path, how)
    with pytest.raises((ValueError, OSError), match=names):
        msae.MatryoshkaSAE.load(tmp_path)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_every_row_is_read_once_an_epoch_in_a_seeded_order(tmp_path, dtype):
    data = np.arange(900 * 2, dtype=np.float64).reshape(-1, 3, 2).astype(dtype)  # (docs, positions, D)
    np.save(tmp_path / "a.npy", data)
    reader = msae.Rows(tmp_path / "a.npy")
    batches = list(msae.itertools.islice(reader.batches(100, seed=1), 18))
    epochs = torch.cat(batches).view(2, 900, 2)
    for epoch in epochs:
        assert torch.equal(epoch.sort(dim=0).values, torch.from_numpy(data.reshape(-1, 2).astype(np.float32)))
    assert not torch.equal(epochs[0], epochs[1])
    assert torch.equal(batches[0], next(reader.batches(100, seed=1))) and not torch.equal(batches[0], next(reader.batches(100, seed=2)))
    rest, aside = reader.split_off(0.1, seed=0)
    assert len(rest) == 810 and len(aside) == 90
    assert set(torch.cat(list(aside.chunks(64)))[:, 0].tolist()).isdisjoint(next(rest.batches(810, 0))[:, 0].tolist())


def test_tensors_of_any_float_are_rows_and_lists_are_not():
    data = torch.from_numpy(rows(100)).bfloat16()
    assert torch.equal(next(msae.Rows(data).chunks(100)), data.float())
    with pytest.raises(ValueError, match="list"):
        msae.Rows([[1.0]])


def test_pools_of_blocks_cover_a_file_larger_than_one_pool(monkeypatch):
    monkeypatch.setattr(msae, "BLOCK", 8)
    monkeypatch.setattr(msae, "POOL_BYTES", 4 * 8 * 4)
    reader = msae.Rows(np.arange(333.0)[:, None])
    seen = torch.cat(list(msae.itertools.islice(reader.batches(37, 0), 9)))
    assert sorted(seen.flatten().tolist()) == list(range(333))


def test_shards_are_read_in_name_order_as_one_file(tmp_path):
    data = rows(1000, 4)
    np.save(tmp_path / "one.npy", data)
    (tmp_path / "shards").mkdir()
    for name, part in zip("bac", np.split(data, [300, 301])):
        np.save(tmp_path / "shards" / f"{name}.npy", part)
    one, shards = msae.Rows(tmp_path / "one.npy"), msae.Rows(tmp_path / "shards")
    assert torch.equal(torch.cat(list(shards.chunks(77))), torch.from_numpy(np.concatenate([data[300:301], data[:300], data[301:]])))
    assert torch.equal(torch.cat(list(one.chunks(77))), torch.from_numpy(data))
    np.save(tmp_path / "shards" / "d.npy", rows(10, 5))
    with pytest.raises(ValueError, match="d.npy must be 4 wide, got 5"):
        msae.Rows(tmp_path / "shards")
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="none"):
        msae.Rows(tmp_path / "none")


def test_batches_go_on_from_any_position(monkeypatch):
    monkeypatch.setattr(msae, "BLOCK", 8)
    monkeypatch.setattr(msae, "POOL_BYTES", 4 * 8 * 4)
    reader, _ = msae.Rows(np.arange(333.0)[:, None]).split_off(0.1, 0)
    batches = list(msae.itertools.islice(reader.batches(37, 0), 30))
    for start in range(30):
        assert torch.equal(batches[start], next(reader.batches(37, 0, start)))


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_the_rows_of_an_epoch(monkeypatch, world):
    monkeypatch.setattr(msae, "BLOCK", 8)
    reader, _ = msae.Rows(np.arange(24.0 * 9)[:, None]).split_off(0.1, 0)
    seen = []
    for rank in range(world):
        blocks = np.random.default_rng([5, 0]).permutation(len(reader.blocks))[rank::world]
        seen += next(reader.batches(len(reader.keep(blocks)), 5, 0, rank, world)).flatten().tolist()
    assert sorted(seen) == torch.cat(list(reader.chunks(50))).flatten().tolist()


def test_reading_stays_small_and_never_maps_the_file(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "big.npy", "w+", np.float16, (200_000, 1024))
    array[:] = 1.0
    del array
    code = """
import resource, sys, itertools, numpy as np, msae
for source in (sys.argv[1], np.load(sys.argv[1], mmap_mode="r")):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for batch in itertools.islice(msae.prefetch(msae.Rows(source).batches(2048, 0)), 97): pass
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400 * 1024, source
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "big.npy"], check=True, cwd=HERE)


def test_a_file_that_shrinks_is_an_error(tmp_path):
    np.save(tmp_path / "a.npy", rows(1000))
    reader = msae.Rows(tmp_path / "a.npy")
    with open(tmp_path / "a.npy", "rb+") as file:
        file.truncate(30_000)
    with pytest.raises(ValueError, match="a.npy must not shrink while it is read"):
        list(reader.chunks(100))


def test_prefetch_keeps_the_order_and_passes_errors_on():
    assert [b.tolist() for b in msae.prefetch(iter(torch.arange(20).split(3)))] == [b.tolist() for b in torch.arange(20).split(3)]
    bad = rows(3000)
    bad[2999] = np.nan
    with pytest.raises(ValueError, match="row 2999"):
        list(msae.itertools.islice(msae.prefetch(msae.Rows(bad).batches(100, 0)), 30))


# ---------------------------------------------------------------------------------------------------------- never lost

EVERYTHING = dict(prefixes=None, n_prefixes=4, order="energy", n_latents_start=40, dead_after=640, steps=60, k_start=8, k_anneal_steps=30)


def same_run(a, b):
    """Whether two finished runs left the same files, times aside."""
    def read(folder):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [{k: v for k, v in line.items() if k != "rows_per_second"} for line in lines], (folder / "cfg.json").read_text()
    states = [torch.load(folder / msae.STATE, weights_only=True)["trainer"] for folder in (a, b)]
    return read(a) == read(b) and (a / msae.WEIGHTS).read_bytes() == (b / msae.WEIGHTS).read_bytes() and same(*states)


def same(a, b):
    """Whether two nested states are equal, tensors bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def steps_on_disk(folder):
    return torch.load(folder / msae.STATE, weights_only=True)["trainer"]["steps_done"]


@pytest.mark.parametrize("stop", [10, 25, 59, 60])
def test_a_resumed_run_is_bit_identical(tmp_path, stop):
    data, cfg = rows(5000), config(**EVERYTHING)
    msae.train(data, cfg, out=tmp_path / "whole", log_every=5)

    class Cut(Exception):
        pass

    def cut(figures):
        if figures["step"] == stop:
            raise Cut

    with pytest.raises(Cut):
        msae.train(data, cfg, out=tmp_path / "cut", log_every=5 if stop % 5 == 0 else 1, save_minutes=0, on_log=cut)
    msae.train(data, cfg, out=tmp_path / "cut", log_every=5, resume=True)
    if stop % 5 == 0:
        assert same_run(tmp_path / "whole", tmp_path / "cut")
    ours, whole = (torch.load(tmp_path / name / msae.STATE, weights_only=True) for name in ("cut", "whole"))
    assert same(ours["trainer"], whole["trainer"])


def test_every_checkpoint_on_disk_is_whole_and_calibrated(tmp_path):
    data, seen = rows(40_000), []

    def look(figures):
        sae = msae.MatryoshkaSAE.load(tmp_path / "run")
        seen.append(msae.evaluate(sae, data)["l0"])
        assert sae.prefixes == (4, 12, 32) and len(sae.W_dec) == 32

    msae.train(data, config(n_latents_start=40, steps=100), out=tmp_path / "run", save_minutes=0, on_log=look, log_every=20)
    assert len(seen) == 5 and seen == pytest.approx([4.5] * 5, rel=0.03)


@pytest.mark.parametrize("change, names", [(dict(k=5.0), "k must be .* 4.5, got 5.0"), (dict(steps=21), "steps"), (dict(seed=1), "seed"),
                                           ("rows", "rows must be as in the run to resume"), ("values", "checksum")])
def test_resuming_something_else_is_refused_by_name(tmp_path, change, names):
    data = rows(1000)
    msae.train(data, config(), out=tmp_path / "run")
    other = data[:-1] if change == "rows" else data * 2 if change == "values" else data
    with pytest.raises(ValueError, match=names):
        msae.train(other, config(**change) if isinstance(change, dict) else config(), out=tmp_path / "run", resume=True)


def test_nothing_to_resume_and_damaged_state(tmp_path):
    with pytest.raises(ValueError, match="resume needs out"):
        msae.train(rows(1000), config(), resume=True)
    with pytest.raises(OSError, match="nothing to resume"):
        msae.train(rows(1000), config(), out=tmp_path, resume=True)
    (tmp_path / msae.STATE).write_bytes(b"rubbish")
    with pytest.raises(ValueError, match="not a training state"):
        msae.train(rows(1000), config(), out=tmp_path, resume=True)


def test_a_bad_row_met_late_or_a_callback_that_fails_keeps_the_steps_done(tmp_path, monkeypatch):
    monkeypatch.setattr(msae, "POOL_BYTES", 4 * 16 * msae.BLOCK)
    monkeypatch.setattr(msae, "ASIDE", 256)
    data = rows(20_000)
    training = msae.Rows(data).split_off(0.05, 0)[0]
    last = np.random.default_rng([0, 0]).permutation(len(training.blocks))[-1]  # read last in the first epoch
    data[training.blocks[last][1] + 5] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        msae.train(data, config(steps=10**6), out=tmp_path / "run")
    assert steps_on_disk(tmp_path / "run") > 50

    def fail(figures):
        raise OSError("no room to print")

    with pytest.raises(OSError, match="no room to print"):
        msae.train(rows(2000), config(steps=100), out=tmp_path / "other", on_log=fail)
    assert steps_on_disk(tmp_path / "other") == 50


def command(*arguments, **options):
    """The command line in a process of its own, with one thread."""
    def listen():  # to Ctrl-C, also where the tests run in the background of a shell
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    options = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "preexec_fn": listen if os.name == "posix" else None, **options}
    return subprocess.Popen([sys.executable, "cli.py", *map(str, arguments)], cwd=HERE, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, **options)


def run_arguments(acts, out, steps=300):
    return ["train", "--acts", acts, "--latents", 32, "--k", 4, "--batch-size", 64, "--steps", steps, "--pareto", 4, "--out", out]


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
def test_killed_at_random_moments_and_resumed_the_weights_are_the_same(acts, tmp_path):
    assert command(*run_arguments(acts, tmp_path / "whole", steps=1500)).wait() == 0
    moments, kills, process = random.Random(0), 0, None
    while process is None or process.returncode != 0:
        resume = ["--resume"] if (tmp_path / "cut" / msae.STATE).exists() else []
        process = command(*run_arguments(acts, tmp_path / "cut", steps=1500), "--save-minutes", 0, *resume)  # saves after every step
        with contextlib.suppress(subprocess.TimeoutExpired):
            until = time.monotonic() + 20
            while not (tmp_path / "cut" / msae.STATE).exists() and time.monotonic() < until and process.poll() is None:
                time.sleep(0.01)
            process.wait(timeout=moments.uniform(0, 3) if kills < 4 else 100)
        kills += process.poll() is None
        process.kill()
        output = process.communicate()[0]
        assert process.returncode in (0, -signal.SIGKILL), output
    assert kills >= 3 and same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_ctrl_c_sigterm_and_sighup_save_and_say_how_to_go_on(acts, tmp_path, number, code):
    process = command(*run_arguments(acts, tmp_path / "run", steps=10**6))
    assert process.stdout.readline().startswith("train  step 50/")
    process.send_signal(number)
    output = process.communicate()[0]
    assert process.returncode == code and "Traceback" not in output
    hint = re.search(r"go on with\n  python (.*)", output)[1]
    assert hint.endswith("--resume") and f"--out {tmp_path / 'run'}" in hint
    steps = steps_on_disk(tmp_path / "run")
    assert steps >= 50 and msae.MatryoshkaSAE.load(tmp_path / "run").prefixes == (2, 4, 8, 16, 32)


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_the_shell_ignores_does_not_end_training(acts, tmp_path, number):
    process = command(*run_arguments(acts, tmp_path / "run", steps=300), preexec_fn=lambda: signal.signal(number, signal.SIG_IGN))
    assert process.stdout.readline().startswith("train  step 50/")
    process.send_signal(number)
    assert "L0" in process.communicate()[0] and process.returncode == 0
    assert steps_on_disk(tmp_path / "run") == 300


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_a_full_disk_is_one_line_and_the_checkpoint_before_still_loads(acts, tmp_path):
    run(*run_arguments(acts, tmp_path / "run", steps=60))
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    def limit():
        import resource
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))  # a write beyond it fails as on a full disk

    process = command(*run_arguments(acts, tmp_path / "run", steps=60), "--resume", preexec_fn=limit)
    output = process.communicate()[0]
    errors = [line for line in output.splitlines() if line.startswith("Error:")]
    assert process.returncode == 1 and len(errors) == 1 and msae.STATE in errors[0] and "Traceback" not in output
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


# ------------------------------------------------------------------------------------------------------ many processes

needs_gloo = pytest.mark.skipif(not torch.distributed.is_available() or not torch.distributed.is_gloo_available(), reason="needs gloo")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
TWO = """
import sys, numpy as np, torch, test_msae as t, msae
torch.distributed.init_process_group("gloo")
sae = msae.train(np.load("acts.npy"), t.config(**t.EVERYTHING | dict(steps=400, lr=0.01)), log_every=400)
sae.save(f"rank{torch.distributed.get_rank()}")
"""


@needs_gloo
def test_two_processes_stay_identical_and_train_as_well_as_one(tmp_path):
    data = rows(50_000)
    np.save(tmp_path / "acts.npy", data[:40_000])
    (tmp_path / "two.py").write_text(TWO)
    subprocess.run([*TORCHRUN, "two.py"], cwd=tmp_path, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)})
    first, second = (tmp_path / f"rank{rank}" / msae.WEIGHTS for rank in (0, 1))
    assert first.read_bytes() == second.read_bytes()
    alone = msae.train(data[:40_000], config(**{**EVERYTHING, "steps": 400, "lr": 0.01}))
    ours, one = (msae.evaluate(sae, data[40_000:]) for sae in (msae.MatryoshkaSAE.load(first.parent), alone))
    assert ours["fvu"] < 1.08 * one["fvu"] and ours["l0"] == pytest.approx(4.5, rel=0.03)


@needs_gloo
@pytest.mark.parametrize("how", ["lost process", "Ctrl-C", "SIGTERM to one"])
def test_a_lost_process_or_ctrl_c_ends_the_job_with_a_checkpoint_to_resume(acts, tmp_path, how):
    arguments = ["cli.py", *map(str, run_arguments(acts, tmp_path / "run", steps=10**6))]
    process = subprocess.Popen([*TORCHRUN, *arguments], cwd=HERE, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
    while not (line := process.stdout.readline()).startswith("train  step 50/"):
        assert line, "ended too early"
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        workers = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(workers[-1]), signal.SIGKILL if how == "lost process" else signal.SIGTERM)
    output = process.communicate()[0]
    assert process.returncode != 0 and "go on with\n  torchrun --nproc-per-node 2 cli.py train" in output
    assert how != "lost process" or "another process of this run is lost" in output
    assert "held-out rows" not in output
    assert steps_on_disk(tmp_path / "run") >= 50


# ------------------------------------------------------------------------------------------------------------------ toy

TREE = {"active_prob": 1.0, "is_read_out": False, "children": [
    {"active_prob": 0.5, "mutually_exclusive_children": True, "children": [
        {"active_prob": 0.3}, {"active_prob": 0.6, "is_read_out": False, "children": [{"active_prob": 0.5}]}]},
    {"active_prob": 0.25, "is_binary": False, "id": "loud"}]}


def test_tree_samples_have_the_probabilities_of_the_spec():
    tree = msae.FeatureTree(TREE)
    z = tree.sample_features(200_000, torch.Generator().manual_seed(0))
    assert z.shape == (200_000, 4) and tree.pairs == [(0, 1), (0, 2)]
    assert (z > 0).float().mean(dim=0).tolist() == pytest.approx([0.5, 0.15, 0.15, 0.25], abs=0.005)
    parent, first, second, loud = z.T
    assert not ((first > 0) & (second > 0)).any()                           # the hidden node excludes its sibling
    assert not (((first > 0) | (second > 0)) & (parent == 0)).any()
    assert set(parent.tolist()) == {0.0, 1.0}
    assert loud[loud > 0].min() >= 0.5 and loud.max() < 1.5 and float(loud[loud > 0].mean()) == pytest.approx(1, abs=0.01)


def test_toy_config_is_the_published_tree():
    tree = msae.FeatureTree(json.loads((HERE / "toy_config.json").read_text())["tree"], seed=3)
    z = tree.sample_features(100_000, torch.Generator().manual_seed(0))
    expected = [0.15, 0.03, 0.03, 0.03] * 3 + [0.05] * 8
    assert z.mean(dim=0).tolist() == pytest.approx(expected, abs=0.004) and float(z.sum(dim=1).mean()) == pytest.approx(1.12, abs=0.01)
    gram = tree.directions @ tree.directions.T
    assert (gram - gram.diag().diag()).abs().max() < 1e-5 and float(tree.directions.norm(dim=1).mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(next(tree.batches(200, 5)), next(tree.batches(200, 5)))


@pytest.mark.parametrize("path, value, names", [
    ((), [], "tree: "), (("active_prob",), 1.5, "tree.active_prob"), (("children", 1, "active_prob"), "x", "tree.children[1]: "),
    (("children", 0, "children", 0, "active_prob"), 0.5, "tree.children[0].children exclude each other"),
    (("children", 0, "is_binary"), 1, "tree.children[0]: its flags"), (("children",), 3, "tree: "),
    (("children", 0, "prob"), 1, "prob"), (("children",), [], "at least 1")])
def test_a_bad_tree_is_refused_by_field(path, value, names):
    tree = json.loads(json.dumps(TREE))
    place = tree
    for key in path[:-1]:
        place = place[key]
    if path:
        place[path[-1]] = value
    with pytest.raises(ValueError, match=re.escape(names)):
        msae.FeatureTree(tree if path else value)


def test_true_dictionary_is_clean_and_absorption_is_seen():
    tree = msae.FeatureTree(TREE)
    sae = msae.MatryoshkaSAE(4, 4)
    unit = tree.directions / tree.directions.norm(dim=1, keepdim=True)
    sae.W_dec.data.copy_(unit)
    sae.W_enc.data.copy_(unit.T)
    sae.threshold.fill_(1e-3)  # above rounding
    figures = msae.toy_figures(sae, tree, seed=0)
    assert figures["clean"] == 4 and figures["fvu"] < 1e-6 and [pair["rate"] for pair in figures["absorption"]] == [0, 0]
    sae.W_enc.data[:, 0] -= 2 * unit[1]  # the parent's latent falls silent where the first child is on
    assert [pair["rate"] for pair in msae.toy_figures(sae, tree, seed=0)["absorption"]] == [1, 0]


def test_matryoshka_recovers_every_toy_feature_and_vanilla_absorbs():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    settings = json.loads((HERE / "toy_config.json").read_text())
    settings["train"].update(steps=1500, k_anneal_steps=750)
    tree, configs = cli.toy_setup(settings, seed=0)
    saes = [msae.train(tree, cfg) for cfg in configs.values()]
    ours, vanilla = (msae.toy_figures(sae, tree, seed=1) for sae in saes)
    torch.set_num_threads(threads)
    assert ours["clean"] == 20 and ours["fvu"] <= 0.021 and 1.05 <= ours["l0"] <= 1.24
    assert vanilla["clean"] < 20 and vanilla["fvu"] < ours["fvu"]
    rates = [max(pair["rate"] for pair in figures["absorption"]) for figures in (ours, vanilla)]
    assert rates[0] < 0.05 and rates[1] > 0.5
    features = tree.sample_features(10_000, torch.Generator().manual_seed(2))
    parents = sorted({parent for parent, _ in tree.pairs})  # the features that can be absorbed, as labels without the tree
    ours, vanilla = (msae.probe(sae, features @ tree.directions, features[:, parents] > 0) for sae in saes)
    assert ours["raw"]["accuracy"] == vanilla["raw"]["accuracy"] == 1.0
    assert ours["prefixes"][-1]["absorption"] < 0.01 and vanilla["prefixes"][-1]["absorption"] > 0.1
    assert ours["erasure"][0]["own"] > 0.49 and vanilla["erasure"][0]["own"] < 0.4
    assert ours["erasure"][0]["others"] < 0.05 > vanilla["erasure"][0]["others"]


# -------------------------------------------------------------------------------------------------------------- probing


def test_logistic_regression_is_at_the_minimum_of_its_formula():
    x, y = torch.from_numpy(rows(400, 6)), torch.rand(400, 3, generator=torch.Generator().manual_seed(0)) < 0.3
    y[:, 1] |= x[:, 2] > 5
    w, b = msae.logistic_regression(x, y)
    mean, std = x.mean(0), x.std(0)
    w, b = ((w * std).requires_grad_(), (b + w @ mean).requires_grad_())  # in standardised units
    p = torch.sigmoid((x - mean) / std @ w.T + b)
    (-(torch.where(y, p, 1 - p)).log().mean(0).sum() + 1e-3 * w.pow(2).sum()).backward()
    assert w.grad.abs().max() < 1e-3 and b.grad.abs().max() < 1e-3


def test_probe_scores_by_hand():
    y, seen = torch.tensor([[1], [1], [1], [0], [0]]).bool(), torch.tensor([[1, 1, 0, 1, 0]]).bool()
    scores = msae.probe_scores(seen, y)
    assert (float(scores["accuracy"]), float(scores["f1"])) == pytest.approx((3 / 5, 2 / 3))
    assert float(scores["balanced"]) == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_probe_finds_the_latent_of_a_label_its_splitting_and_its_absorption():
    """Label 0 is dimension 0, seen by one latent; label 1 is dimension 1, with one latent where dimension 2 is on and one where not."""
    on = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    sae, x = msae.MatryoshkaSAE(3, 3, (1, 3)), on.float()
    sae.W_dec.data.copy_(torch.eye(3)[[0, 1, 1]])
    sae.W_enc.data.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 1, -2]]))  # (D, F)
    sae.b_enc.data.copy_(torch.tensor([0.0, -1.0, 0]))
    figures = msae.probe(sae, x, on[:, :2])
    assert figures["raw"] == {"accuracy": 1.0, "f1": 1.0} and [level["latents"] for level in figures["prefixes"]] == [1, 3]
    level, by_label = figures["prefixes"][1], figures["prefixes"][1]["absorption_by_label"]
    assert by_label[0] == 0 and by_label[1] == pytest.approx(0.4, abs=0.05) and level["splitting"] == 1.5
    assert level["probes"][0]["f1"] < 0.95 and level["probes"][1]["f1"] == 1.0 and figures["prefixes"][0]["probes"][0]["f1"] < 0.9
    assert figures["erasure"][0]["own"] == pytest.approx((0.5 + 0.5 * 0.6) / 2, abs=0.03) and figures["erasure"][0]["others"] == 0
    assert figures["erasure"][1]["own"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("labels, names", [(np.zeros(40), "float64"), (np.zeros(39, int), "(40,)"), (np.zeros((40, 0), int), "(40, 0)"),
                                           (np.zeros((40, 2), int) + 2, "0 and 1"), (np.arange(40), None)])
def test_labels_are_whole_numbers_or_columns_of_0_and_1(tmp_path, labels, names):
    data = msae.Rows(rows(40))
    np.save(tmp_path / "labels.npy", labels)
    if names:
        with pytest.raises(ValueError, match=re.escape(names)):
            cli.label_rows(tmp_path / "labels.npy", data)
        return
    x, y, columns = cli.label_rows(tmp_path / "labels.npy", data, most=17)
    assert x.shape == (17, 16) and y.shape == (17, 40) and columns == [str(i) for i in range(40)]
    assert all(torch.equal(row, torch.from_numpy(rows(40)[label])) for row, label in zip(x, y.int().argmax(dim=1)))


def test_a_label_that_every_row_has_cannot_be_probed():
    with pytest.raises(ValueError, match="label, got 1"):
        msae.probe(msae.MatryoshkaSAE(3, 4), torch.randn(40, 3), torch.tensor([[True, True], [False, True]]).repeat(20, 1))


# ------------------------------------------------------------------------------------------------------------ TinyModel


def tiny(n_layers=3, n_vocab=50, seed=0):
    torch.manual_seed(seed)
    model = msae.TinyModel(n_layers, 32, 16, 64, n_vocab, 24).eval()
    torch.nn.init.normal_(model.pos_embed)
    return model


def naive_tiny_model(state, ids, n_heads=16):
    """The description of noanabeshima/tiny_model, one text, one head and one position at a time: logits and all residual streams."""
    logits, streams = [], []
    for text in ids:
        x, stream = state["embed.weight"][text] + state["pos_embed"][0, : len(text)], []
        for i in range(1 + max(int(key.split(".")[1]) for key in state if key.startswith("torso"))):
            stream.append(x)
            part = {key.split(".", 2)[2]: value for key, value in state.items() if key.startswith(f"torso.{i}.")}
            out, size = torch.zeros_like(x), x.shape[1] // n_heads
            for h in range(n_heads):
                q, k, v = (x @ part[f"attn.{name}.weight"].T[:, h * size:(h + 1) * size] for name in "QKV")
                for t in range(len(x)):
                    scores = torch.tensor([float(q[t] @ k[s]) / size**0.5 for s in range(t + 1)]).exp()
                    out[t, h * size:(h + 1) * size] = (scores / scores.sum()) @ v[: t + 1]
            x = x + out @ part["attn.O.weight"].T + part["attn.O.bias"]
            hidden = (x @ part["mlp.read_in.weight"].T + part["mlp.read_in.bias"]).clamp_min(0)
            x = x + hidden @ part["mlp.write_out.weight"].T + part["mlp.write_out.bias"]
        streams.append([*stream, x])
        logits.append(x @ state["lm_head.weight"].T + state["lm_head.bias"])
    return torch.stack(logits), [torch.stack(layer) for layer in zip(*streams)]


@torch.no_grad()
def test_tiny_model_equals_its_description(tmp_path):
    model = tiny()
    keys = {"embed.weight", "pos_embed", "lm_head.weight", "lm_head.bias"} | {f"torso.{i}.{key}" for i in range(3) for key in (
        "attn.Q.weight", "attn.K.weight", "attn.V.weight", "attn.O.weight", "attn.O.bias",
        "mlp.read_in.weight", "mlp.read_in.bias", "mlp.write_out.weight", "mlp.write_out.bias")}
    assert set(model.state_dict()) == keys
    torch.save({key: value.bfloat16() for key, value in model.state_dict().items()}, tmp_path / "tiny.pt")
    model = msae.TinyModel.load(tmp_path / "tiny.pt")
    assert not model.training and {p.dtype for p in model.parameters()} == {torch.float32}
    ids = torch.randint(50, (3, 17))
    logits, streams = naive_tiny_model(model.state_dict(), ids)
    torch.testing.assert_close(model(ids), logits, rtol=1e-5, atol=1e-5)
    for layer, stream in zip(model.layers, streams, strict=True):
        with msae.activation_hook(layer, "input", stop=True) as captured:
            model(ids)
        torch.testing.assert_close(captured[0], stream, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.skipif("MSAE_HUB_TEST" not in os.environ, reason="downloads from the Hub where MSAE_HUB_TEST is set")
@pytest.mark.parametrize("name, expected", [("tiny_model.pt", [13.61935, 27.03831, 14.77878, 15.21049, 19.16437]),
                                            ("tiny_model_2L_1E.pt", [14.83634, 27.60631, 16.46386, 16.65712, 19.72797]),
                                            ("tiny_model_2L_3E.pt", [25.15317, 39.79271, 28.82510, 27.84330, 31.72397])])
def test_published_tiny_models_have_the_published_logits(name, expected):
    logits = msae.TinyModel.load(name)(torch.tensor([[9996, 51, 56, 4, 36]]))
    torch.testing.assert_close(logits[0, -1, :5], torch.tensor(expected), rtol=1e-4, atol=1e-3)


class Canary:
    def __reduce__(self):
        return Path.touch, (Path("canary"),)


@pytest.mark.parametrize("content", [{"embed.weight": torch.zeros(3, 4)}, {}, 3, Canary(), b"junk"], ids=str)
def test_a_file_that_is_not_a_tiny_model_is_refused_and_never_run(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, "bad.pt") if content != b"junk" else Path("bad.pt").write_bytes(content)
    with pytest.raises(ValueError, match="bad.pt is not a state dict of TinyModel"):
        msae.TinyModel.load("bad.pt")
    assert not Path("canary").exists()


class Wrapped(torch.nn.Module):
    """A block in the manner of other libraries: input by name, a tuple out."""

    def __init__(self):
        super().__init__()
        self.linear, self.last = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        self.block = torch.nn.Module()
        self.block.forward = lambda hidden_states, scale=1.0: (self.linear(hidden_states) * scale, "cache")

    def forward(self, input_ids, attention_mask=None):
        return self.last(self.block(hidden_states=torch.nn.functional.one_hot(input_ids, 4).float(), scale=2.0)[0])


@torch.no_grad()
def test_the_hook_captures_and_replaces_inputs_and_tuple_outputs():
    model, ids = Wrapped().eval(), torch.tensor([[0, 1, 3]])
    with msae.activation_hook(model.block, "input") as inputs, msae.activation_hook(model.block) as outputs:
        plain = model(ids)
    one_hot = torch.eye(4)[ids]
    assert torch.equal(inputs[0], one_hot) and torch.equal(outputs[0], 2 * model.linear(one_hot)) and not outputs[0].requires_grad
    for at in ("input", "output"):
        with msae.activation_hook(model.block, at, replace=lambda x: x.double() * 0):
            replaced = model(ids)
        expected = model.last(2 * model.linear(0 * one_hot)) if at == "input" else model.last(torch.zeros(1, 3, 4))
        torch.testing.assert_close(replaced, expected)
    assert torch.equal(model(ids), plain)  # nothing stays behind
    module = torch.nn.Module()
    module.forward = lambda: None
    for at in ("input", "output"):
        with pytest.raises(ValueError, match="must be a tensor or start with one, got NoneType"), msae.activation_hook(module, at):
            module()


def test_harvest_writes_the_rows_of_the_stream_and_no_wasted_layer(tmp_path, monkeypatch):
    model, ids = tiny(), torch.randint(3, 50, (40, 17))
    ids[:, 0], ids[5:9, 12:] = 1, 2
    with torch.no_grad(), msae.activation_hook(model.torso[1], "input") as captured:
        model(ids)
    expected = captured[0][(ids != 1) & (ids != 2)]
    monkeypatch.setattr(model.torso[2], "forward", None)
    seen = []
    n = msae.harvest(model, model.torso[1], ids.split(7), tmp_path / "a.npy", "input", drop=(1, 2), dtype="float32", on_rows=seen.append)
    assert n == len(expected) == 40 * 16 - 20 == seen[-1] and len(seen) == 6
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), expected, rtol=1e-5, atol=1e-6)
    assert msae.harvest(model, model.torso[1], ids.split(7), tmp_path / "b.npy", "input", drop=(1, 2), max_rows=123) == 123
    half = np.load(tmp_path / "b.npy")
    assert half.dtype == np.float16 and half.shape == (123, 32) and sorted(p.name for p in tmp_path.iterdir()) == ["a.npy", "b.npy"]
    np.testing.assert_allclose(half, expected[:123], rtol=1e-3, atol=1e-3)


def test_harvest_of_another_model_leaves_padding_out(tmp_path):
    model, mask = Wrapped().eval(), torch.tensor([[True, True, True], [True, False, False]])
    batch = {"input_ids": torch.tensor([[0, 1, 2], [3, 0, 0]]), "attention_mask": mask}
    assert msae.harvest(model, model.block, [batch], tmp_path / "a.npy", dtype="float32") == 4
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), (2 * model.linear(torch.eye(4)))[[0, 1, 2, 3]].detach(), rtol=1e-5)
    assert msae.harvest(model, model.block, [batch], tmp_path / "b.npy", drop=(0,)) == 3 and mask.sum() == 4


def test_a_cut_harvest_leaves_no_file(tmp_path):
    model, ids = tiny(), torch.randint(50, (4, 9))

    def cut(error):
        yield ids
        raise error
    for error in (KeyboardInterrupt(), OSError("gone")):
        with pytest.raises(type(error)):
            msae.harvest(model, model.torso[0], cut(error), tmp_path / "a.npy")
    model.torso[0].mlp["write_out"].bias.data.fill_(1e5)
    with pytest.raises(ValueError, match="fit in float16"):
        msae.harvest(model, model.torso[0], [ids], tmp_path / "a.npy")
    with pytest.raises(ValueError, match="evaluation mode"):
        msae.harvest(model.train(), model.torso[0], [ids], tmp_path / "a.npy")
    model.eval()
    with pytest.raises(ValueError, match="no call"):
        msae.harvest(model, torch.nn.Linear(2, 2), [ids], tmp_path / "a.npy")
    with pytest.raises(ValueError, match="at least one row"):
        msae.harvest(model, model.torso[0], [ids], tmp_path / "a.npy", drop=range(50), dtype="float32")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs a limit on file sizes")
def test_harvest_on_a_full_disk_is_an_error_and_leaves_no_file(tmp_path):
    import resource
    model, ids = tiny(), torch.randint(50, (64, 24))
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="a.npy could not be written"):
            msae.harvest(model, model.torso[0], [ids] * 100, tmp_path / "a.npy")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert not list(tmp_path.iterdir())


def test_tokens_are_read_from_jsonl_and_npy(tmp_path):
    ids = np.random.default_rng(0).integers(0, 50, (150, 9))
    np.save(tmp_path / "ids.npy", ids.astype(np.uint16))
    (tmp_path / "ids.jsonl").write_text("".join(json.dumps({"tok_ids": row}) + "\r\n" for row in ids.tolist()))
    for name in ("ids.npy", "ids.jsonl"):
        batches = list(cli.read_tokens(tmp_path / name, n_vocab=50))
        assert [len(b) for b in batches] == [64, 64, 22] and torch.equal(torch.cat(batches), torch.from_numpy(ids))


BAD_LINES = {"{": "line 3 is not", "": "line 3 is not", "[1, 2]": "line 3 is not", '{"tok_ids": 7}': "line 3 is not", '{"ids": [1]}': "line 3 is not",
             '{"tok_ids": [1.5, 2]}': "whole numbers", '{"tok_ids": [[1], [2]]}': "line 3 is not", '{"tok_ids": [true, false]}': "whole numbers",
             '{"tok_ids": [1, 50]}': r"line 3: ids must lie in \[0, 50\), got 50", '{"tok_ids": [-1, 5]}': r"got -1",
             '{"tok_ids": [1, 2, 3]}': "must be 2 ids as in the first, got 3", '{"tok_ids": []}': "line 3", '{"tok_ids": [1, 99999999999999999999]}': "line 3",
             '{"tok_ids": "12"}': "line 3 is not", "[" * 100_000: "line 3 is not", "\u00ff": "line 3 is not"}


@pytest.mark.parametrize("line", BAD_LINES, ids=lambda line: line[:30])
def test_a_bad_line_of_tokens_is_named_by_its_number(tmp_path, line):
    good = '{"tok_ids": [1, 2]}\n'
    (tmp_path / "ids.jsonl").write_bytes((good * 2 + line + "\n" + good).encode("latin-1"))
    with pytest.raises(ValueError, match=BAD_LINES[line]):
        list(cli.read_tokens(tmp_path / "ids.jsonl", n_vocab=50))
    (tmp_path / "long.jsonl").write_text(json.dumps({"tok_ids": [1] * 257}))
    with pytest.raises(ValueError, match="line 1: tok_ids must be 1 to 256 ids, the positions of the model, got 257"):
        list(cli.read_tokens(tmp_path / "long.jsonl"))


@torch.no_grad()
def test_loss_recovered_by_hand():
    model, ids = tiny(), torch.randint(2, 50, (6, 11))
    ids[:, 0] = 1
    sae = msae.MatryoshkaSAE(32, 64, (16, 64))
    figures = msae.loss_recovered(model, model.torso[1], sae, ids.split(4), drop=(1,))

    def loss(change):
        x = model.torso[0](model.embed(ids) + model.pos_embed[:, :11])
        x = torch.cat([x[:, :1], change(x[:, 1:])], dim=1)
        log_p = model.lm_head(model.torso[2](model.torso[1](x))).log_softmax(-1)
        return -np.mean([float(log_p[b, t, ids[b, t + 1]]) for b in range(6) for t in range(10)])
    clean, zeroed, short, full = loss(lambda x: x), loss(lambda x: 0 * x), loss(lambda x: sae.decode(sae.encode(x, 16))), loss(sae)
    assert figures["tokens"] == 60 and (figures["clean"], figures["zeroed"]) == pytest.approx((clean, zeroed), rel=1e-5)
    assert [level["spliced"] for level in figures["prefixes"]] == pytest.approx([short, full], rel=1e-5)
    assert figures["prefixes"][0]["recovered"] == pytest.approx((zeroed - short) / (zeroed - clean), rel=1e-3)


# --------------------------------------------------------------------------------------------------------- command line


def run(*arguments, code=0):
    """The command's output, after its exit code was checked; an unexpected error in it is raised."""
    result = CliRunner().invoke(cli.main, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture
def acts(tmp_path):
    np.save(tmp_path / "acts.npy", rows(3000).astype(np.float16))
    return tmp_path / "acts.npy"


def test_toy_command_writes_figures_and_picture(tmp_path):
    settings = json.loads((HERE / "toy_config.json").read_text())
    settings["train"].update(steps=200, k_anneal_steps=100)
    (tmp_path / "short.json").write_text(json.dumps(settings))
    output = run("toy", "--config", tmp_path / "short.json", "--seed", 3, "--seeds", 2, "--out", tmp_path / "out")
    assert "matryoshka" in output and "vanilla" in output and "published" in output
    report = json.loads((tmp_path / "out" / "toy.json").read_text())["seeds"]
    assert [r["seed"] for r in report] == [3, 4]
    assert set(report[0]["matryoshka"]) == {"fvu", "l0", "clean", "features", "mean_cosine", "min_cosine", "absorption"}
    assert (tmp_path / "out" / "toy.svg").read_text().count("<rect") == 3 * 400 + 1
    run("toy", "--config", tmp_path / "short.json", "--out", tmp_path / "out")  # its own files are replaced
    assert json.loads((tmp_path / "out" / "toy.json").read_text())["seed"] == 0


def test_train_command_saves_a_checkpoint_that_loads(acts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"n_latents": 99, "steps": 99, "lr": 0.01, "warmup_steps": 5}))
    for expected in ("acts-32", "acts-32-2"):
        output = run("train", "--acts", acts, "--latents", 32, "--k", 4, "--prefixes", "0.25,0.5,1", "--steps", 60,
                     "--batch-size", 128, "--seed", 1, "--config", "config.json")
        assert f"runs/{expected}" in output and "FVU" in output
        sae = msae.MatryoshkaSAE.load(tmp_path / "runs" / expected)
        assert sae.prefixes == (8, 16, 32) and sae.metadata["training"]["steps"] == 60 and sae.metadata["training"]["lr"] == 0.01
        assert sae.metadata["training"]["seed"] == 1


BAD_COMMANDS = {  # arguments after "train", and what the message must name
    "no file": (["--acts", "nowhere.npy", "--latents", 32], "nowhere.npy"),
    "not npy": (["--acts", "text.npy", "--latents", 32], "text.npy"),
    "cut npy": (["--acts", "cut.npy", "--latents", 32], "cut.npy"),
    "empty file": (["--acts", "nothing.npy", "--latents", 32], "nothing.npy"),
    "pickled": (["--acts", "pickled.npy", "--latents", 32], "pickled.npy"),
    "integers": (["--acts", "integers.npy", "--latents", 32], "int64"),
    "one dimension": (["--acts", "flat.npy", "--latents", 32], "shape"),
    "no rows": (["--acts", "empty.npy", "--latents", 32], "shape"),
    "NaN": (["--acts", "nan.npy", "--latents", 32, "--batch-size", 64], "row 1234"),
    "infinite": (["--acts", "inf.npy", "--latents", 32, "--batch-size", 64], "row 7"),
    "all zero": (["--acts", "zero.npy", "--latents", 32, "--batch-size", 64], "zero"),
    "fewer rows than a batch": (["--acts", "acts.npy", "--latents", 32, "--batch-size", 2900], "batch_size"),
    "no latents": (["--acts", "acts.npy"], "n_latents"),
    "latents not a number": (["--acts", "acts.npy", "--latents", "many"], "many"),
    "prefixes not increasing": (["--acts", "acts.npy", "--latents", 32, "--prefixes", "8,4,32"], "[8, 4, 32]"),
    "prefixes not ending in F": (["--acts", "acts.npy", "--latents", 32, "--prefixes", "8,16"], "n_latents=32"),
    "prefixes not numbers": (["--acts", "acts.npy", "--latents", 32, "--prefixes", "8,x"], "8,x"),
    "k of 0": (["--acts", "acts.npy", "--latents", 32, "--k", 0], "got 0"),
    "k above F": (["--acts", "acts.npy", "--latents", 32, "--k", 33], "got 33"),
    "k * B below 1": (["--acts", "acts.npy", "--latents", 32, "--k", 0.001, "--batch-size", 64], "at least one"),
    "unknown key": (["--acts", "acts.npy", "--latents", 32, "--config", "unknown.json"], "'learning_rate'"),
    "config not JSON": (["--acts", "acts.npy", "--latents", 32, "--config", "text.npy"], "text.npy"),
    "config a list": (["--acts", "acts.npy", "--latents", 32, "--config", "list.json"], "list.json"),
    "unknown device": (["--acts", "acts.npy", "--latents", 32, "--batch-size", 64, "--device", "abacus"], "abacus"),
    "folder in use": (["--acts", "acts.npy", "--latents", 32, "--batch-size", 64, "--out", "used"], "used"),
}


@pytest.mark.parametrize("arguments, names", BAD_COMMANDS.values(), ids=BAD_COMMANDS.keys())
def test_a_bad_command_gets_one_line_and_leaves_no_trace(acts, tmp_path, monkeypatch, arguments, names):
    monkeypatch.chdir(tmp_path)
    good = rows(3000)
    for name, array in {"integers": np.ones((9, 9), int), "flat": good.ravel(), "empty": good[:0], "zero": good * 0}.items():
        np.save(f"{name}.npy", array)
    for name, row, value in (("nan", 1234, np.nan), ("inf", 7, np.inf)):
        bad = good.copy()
        bad[row, 3] = bad[2000, 1] = value
        np.save(f"{name}.npy", bad)
    np.save("pickled.npy", np.array([{"a": 1}]), allow_pickle=True)
    Path("cut.npy").write_bytes(acts.read_bytes()[:-100])
    Path("text.npy").write_text("activations")
    Path("nothing.npy").touch()
    Path("unknown.json").write_text('{"learning_rate": 1}')
    Path("list.json").write_text("[1]")
    Path("used").mkdir()
    Path("used/cfg.json").write_text("precious")
    before = sorted(Path().rglob("*"))
    output = run("train", *arguments, code=2 if any(s in names for s in ("many", "8,x")) else 1)
    errors = [line for line in output.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1 and names in errors[0] and "Traceback" not in output
    assert sorted(Path().rglob("*")) == before and Path("used/cfg.json").read_text() == "precious"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA GPU")
def test_cuda_without_cuda_is_refused(acts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "'cuda' is not available" in run("train", "--acts", acts, "--latents", 32, "--batch-size", 64, "--device", "cuda", code=1)


def test_baseline_trains_the_vanilla_twin_and_resume_finds_the_newest_folder(acts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "--acts", acts, "--latents", 32, "--k", 4, "--steps", 60, "--batch-size", 128]
    for more in ([], ["--baseline"], ["--baseline", "--resume"]):  # the second makes runs/acts-32-2, the third resumes it
        output = run(*arguments, *more)
    assert "saved runs/acts-32-2" in output and not Path("runs/acts-32-3").exists()
    assert re.search(r"vanilla +32 +0\.\d{4} +\d\.\d\d +0\.\d{3} +\d+\.\d\d%", output) and "matryoshka" in output
    ours, vanilla = (msae.MatryoshkaSAE.load(Path("runs/acts-32-2") / name) for name in ("", "vanilla"))
    assert vanilla.prefixes == (32,) and ours.prefixes == (2, 4, 8, 16, 32)
    assert vanilla.metadata["training"]["seed"] == ours.metadata["training"]["seed"]
    assert "nothing to resume" in run(*arguments, "--resume", "--out", "elsewhere", code=1)


def test_options_override_the_config(acts, tmp_path):
    (tmp_path / "config.json").write_bytes(b'\xef\xbb\xbf{"n_latents_start": 32,\r\n"n_prefixes": 4, "steps": 5}\r\n')  # as Windows writes
    run("train", "--acts", acts, "--latents", 32, "--k", 4, "--batch-size", 64, "--config", tmp_path / "config.json", "--spare", 0.5,
        "--prefixes", "8,32", "--out", tmp_path / "run")
    settings = msae.MatryoshkaSAE.load(tmp_path / "run").metadata["training"]
    assert settings["n_latents_start"] == 48 and settings["prefixes"] == [8, 32] and settings["n_prefixes"] is None


def test_bench_shows_the_step_beside_the_product():
    output = run("bench", "--latents", 64, "--d-model", 32, "--batch-size", 64, "--k", 4, "--steps", 1, "--device", "cpu")
    assert "encoder product alone" in output and "x the product" in output and "MiB" in output
    assert "got 65" in run("bench", "--latents", 64, "--k", 65, code=1)


def test_unknown_settings_are_refused_by_name_and_toy_leaves_other_files_alone(tmp_path):
    with pytest.raises(ValueError, match="'latents'"):
        cli.new_config({"latents": 32})
    assert "--seed" in run("toy", "--seed", 10**30, "--out", tmp_path / "new", code=2)
    (tmp_path / "bad.json").write_text('{"tree": {"active_prob": 2}, "train": {}}')
    assert "tree.active_prob" in run("toy", "--config", tmp_path / "bad.json", "--out", tmp_path / "new", code=1)
    assert not (tmp_path / "new").exists()


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """A small model of the published vocabulary, and texts for it, some padded."""
    monkeypatch.chdir(tmp_path)
    torch.save({key: value.bfloat16() for key, value in tiny(n_vocab=10_000).state_dict().items()}, "tiny.pt")
    ids = np.random.default_rng(0).integers(0, 9000, (300, 20))
    ids[:, 0], ids[:50, 15:] = msae.BEGIN, msae.PAD
    Path("ids.jsonl").write_text("".join(json.dumps({"tok_ids": row}) + "\n" for row in ids.tolist()))
    return ids


def test_harvest_train_and_eval_from_tokens_to_a_verdict(texts, tmp_path):
    output = run("harvest", "--model", "tiny.pt", "--tokens", "ids.jsonl", "--layer", 2, "--out", "acts.npy")
    n = 300 * 19 - 50 * 5
    assert f"{n:,} rows" in output and np.load("acts.npy").shape == (n, 32) and np.load("acts.npy").dtype == np.float16
    about = json.loads(Path("acts.npy.json").read_text())
    assert about["model_name"] == "tiny.pt" and about["hook_name"] == "torso.2.input" and about["dataset"] == "ids.jsonl"
    assert "acts.npy exists" in run("harvest", "--model", "tiny.pt", "--tokens", "ids.jsonl", code=1)
    run("train", "--acts", "acts.npy", "--latents", 64, "--k", 4, "--steps", 60, "--batch-size", 256, "--baseline")
    np.save("labels.npy", texts[(texts != msae.BEGIN) & (texts != msae.PAD)] % 3 * 10)
    output = run("eval", "runs/acts-64", "runs/acts-64/vanilla", "--acts", "acts.npy", "--labels", "labels.npy",
                 "--tokens", "ids.jsonl", "--model", "tiny.pt", "--layer", 2, "--max-tokens", 1000)
    assert "recovered" in output and "absorbed" in output and "erasure" in output and "█" in output
    for folder, levels in (("runs/acts-64", 5), ("runs/acts-64/vanilla", 1)):
        found = json.loads(Path(folder, "eval.json").read_text())
        assert found["rows"] == n and len(found["prefixes"]) == len(found["loss"]["prefixes"]) == len(found["labels"]["prefixes"]) == levels
        assert found["labels"]["labels"] == ["0", "10", "20"] and found["loss"]["clean"] < 20 and sum(found["frequencies"]["counts"]) == round(64 * (1 - found["dead"]))
        expected = msae.evaluate(msae.MatryoshkaSAE.load(folder), "acts.npy")
        assert {key: found[key] for key in expected} == expected
    other_layer = run("eval", "runs/acts-64", "--acts", "acts.npy", "--tokens", "ids.jsonl", "--model", "tiny.pt", "--layer", 1, code=2)
    assert "1 is not where runs/acts-64 was trained, torso.2.input" in other_layer
    output = run("eval", "runs/acts-64", "--acts", "acts.npy", "--out", "one.json")
    assert "wrote one.json" in output and json.loads(Path("one.json").read_text())["checkpoint"] == "runs/acts-64"


@pytest.mark.parametrize("arguments, names", [
    (["harvest", "--model", "nowhere.pt"], "no nowhere.pt there"),
    (["harvest", "--model", "tiny.pt", "--tokens", "nowhere.jsonl"], "nowhere.jsonl"),
    (["harvest", "--model", "tiny.pt", "--tokens", "ids.jsonl", "--layer", 4], "4 must be at most 3"),
    (["harvest", "--model", "tiny.pt", "--tokens", "bad.jsonl"], "line 301: ids must lie in"),
    (["harvest", "--model", "tiny.pt", "--tokens", "ids.jsonl", "--max-rows", 0], "--max-rows"),
    (["eval", "nowhere", "--acts", "ids.npy"], "ids.npy"),
])
def test_bad_harvests_leave_no_file(texts, tmp_path, monkeypatch, arguments, names):
    Path("bad.jsonl").write_text(Path("ids.jsonl").read_text() + json.dumps({"tok_ids": [10_000] * 20}))
    before = sorted(tmp_path.iterdir())

    def no_hub(repo, names, *_, **__):
        raise OSError(f"no {names[0]} there")
    monkeypatch.setattr(msae, "download", no_hub)
    assert names in run(*arguments, code=2 if "--max-rows" in arguments or 4 in arguments else 1) and sorted(tmp_path.iterdir()) == before


def test_harvest_refuses_a_disk_that_is_too_small_before_it_starts(texts, tmp_path, monkeypatch):
    monkeypatch.setattr(cli.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    assert "would take 0.0 GB" in run("harvest", "--model", "tiny.pt", "--tokens", "ids.jsonl", code=1) and not Path("acts.npy").exists()


@pytest.mark.parametrize("command", [[], ["toy"], ["train"], ["harvest"], ["eval"], ["push"], ["bench"]])
def test_help_shows_an_example(command):
    output = run(*command, "--help")
    assert not command or f"python cli.py {command[0]}" in output


def test_readme_snippets_run(hub, tmp_path, monkeypatch):
    snippets = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    np.save("acts.npy", rows(5000, 64).astype(np.float16))
    for snippet in snippets:
        if "sae_lens" not in snippet or importlib.util.find_spec("sae_lens"):
            exec(snippet, {})
        if "msae.train(" in snippet:
            run("push", "runs/mine", "ada/mine")
    assert len(snippets) == 5
    if importlib.util.find_spec("dictionary_learning"):
        theirs, _ = dictionary_learning(monkeypatch).load_dictionary("runs/theirs", "cpu")
        ours, x = msae.MatryoshkaSAE.load("runs/mine"), torch.from_numpy(np.load("acts.npy")).float()
        close_to(theirs.encode(x), ours.encode(x))
        close_to(theirs(x), ours(x))
        assert theirs.group_sizes.tolist() == np.diff(ours.prefixes, prepend=0).tolist()


# ------------------------------------------------------------------------------------------- the Hub, on a loopback server


class Hub(http.server.ThreadingHTTPServer):
    """What the client speaks of the Hub's API, in memory: one commit is {path: bytes}; large files go by LFS and a second host.

    ``faults``: [method, part of the path, status or "cut", how often]: an answer instead of the right one, or half of one.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.commits, self.large, self.faults, self.seen, self.gated = {}, {}, {}, [], [], set()

    def handle_error(self, request, address):
        pass  # of connections that a test cuts

    def files(self, repo, revision="main"):
        return self.commits[self.repos[repo].get(revision, revision)]


class HubHandler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def reply(self, status, content=b"", **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:len(content) // 2] if self.cut else content)
        self.close_connection |= self.cut

    def fail(self, status, code=None):
        self.reply(status, {"error": "no"}, **({"X_Error_Code": code} if code else {}))

    def handle_request(self):
        hub, url = self.server, urllib.parse.urlsplit(self.path)
        path, self.cut = url.path, False
        size = int(self.headers.get("Content-Length") or 0)
        fault = next((f for f in hub.faults if f[0] == self.command and f[1] in path and f[3] > 0), None)
        if fault:
            fault[3] -= 1
            if fault[2] == "cut" and self.command != "GET":
                self.rfile.read(size // 2)
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
            if fault[2] == "cut":
                self.cut = True
        body = self.rfile.read(size)
        hub.seen.append(f"{self.command} {path}")
        if fault and not self.cut:
            return self.fail(fault[2], fault[4] if len(fault) > 4 else None)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if path.startswith("/large/"):
            return self.send_large(hub, path.removeprefix("/large/"), body, token)
        if token not in ("", "hf_good", "hf_read"):
            return self.fail(401)
        self.api(hub, path, url.query, body, token)

    def send_large(self, hub, oid, body, token):
        assert not token  # a storage host must not see it
        if self.command == "PUT":
            assert hashlib.sha256(body).hexdigest() == oid
            hub.large[oid] = body
            return self.reply(200)
        start = int(re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "bytes=0-"))[1])
        content = hub.large[oid]
        self.reply(206 if start else 200, content[start:], Content_Range=f"bytes {start}-{len(content) - 1}/{len(content)}", ETag=f'"{oid}"')

    def api(self, hub, path, query, body, token):
        if path == "/api/whoami-v2":
            return self.reply(200, {"type": "user", "name": "ada"}) if token else self.fail(401)
        if path == "/api/validate-yaml":
            return self.reply(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            wanted = json.loads(body)
            repo = f"{wanted['organization'] or 'ada'}/{wanted['name']}"
            if not token:
                return self.fail(401)
            if token == "hf_read" or wanted["organization"] not in (None, "ada"):
                return self.fail(403)
            if repo not in hub.repos:
                hub.repos[repo] = {"main": "0" * 40, "private": wanted.get("visibility") == "private" or wanted.get("private") is True}
                hub.commits["0" * 40] = {}
                return self.reply(200, {"url": f"{hub.url}/{repo}"})
            return self.reply(409, {"error": "exists", "url": f"{hub.url}/{repo}"})
        found = re.match(r"(?:/api/models)?/(\w+/[\w.-]+?)(?:\.git)?(?:/(.*))?$", path)
        repo, rest = found[1], (found[2] or "")
        if repo not in hub.repos or hub.repos[repo]["private"] and not token:
            return self.fail(404 if token else 401, "RepoNotFound")
        if repo in hub.gated:
            return self.fail(403, "GatedRepo")
        writes = self.command == "POST" and "create_pr=1" not in query and "/objects/batch" not in path
        if writes and (token != "hf_good" or not repo.startswith("ada/")):
            return self.fail(403)
        action, _, rest = rest.partition("/")
        getattr(self, f"on_{action or 'revision'}")(hub, repo, rest, query, body)

    def on_revision(self, hub, repo, revision, query, body):
        revision = urllib.parse.unquote(revision) or "main"
        commit = hub.repos[repo].get(revision, revision)
        if commit not in hub.commits:
            return self.fail(404, "RevisionNotFound")
        self.reply(200, {"_id": "1", "id": repo, "sha": commit, "siblings": [{"rfilename": name} for name in hub.commits[commit]]})

    def on_tree(self, hub, repo, rest, query, body):
        revision = rest.split("/")[0]
        self.reply(200, [{"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                         for name, content in hub.files(repo, revision).items()])

    def on_branch(self, hub, repo, branch, query, body):
        hub.repos[repo][branch] = hub.repos[repo]["main"]
        self.reply(200, {})

    def on_preupload(self, hub, repo, revision, query, body):
        self.reply(200, {"files": [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(".safetensors") else "regular",
                                    "shouldIgnore": False} for f in json.loads(body)["files"]]})

    def on_info(self, hub, repo, rest, query, body):
        self.reply(200, {"transfer": "basic", "objects": [{**o, "actions": {"upload": {"href": self.large(hub, o["oid"])}}}
                                                          for o in json.loads(body)["objects"]]})

    def large(self, hub, oid):
        return f"http://localhost:{hub.server_port}/large/{oid}"

    def on_commit(self, hub, repo, revision, query, body):
        files, commit = dict(hub.files(repo, revision)), hashlib.sha1(body).hexdigest()
        for item in map(json.loads, body.splitlines()):
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = hub.large[value["oid"]]
        hub.commits[commit] = files
        hub.repos[repo]["refs/pr/1" if "create_pr=1" in query else revision] = commit
        self.reply(200, {"success": True, "commitOid": commit, "commitUrl": f"{hub.url}/{repo}/commit/{commit}",
                         "pullRequestUrl": f"{hub.url}/{repo}/discussions/1"})

    def on_resolve(self, hub, repo, rest, query, body):
        revision, name = map(urllib.parse.unquote, rest.split("/", 1))
        commit = hub.repos[repo].get(revision, revision)
        if commit not in hub.commits:
            return self.fail(404, "RevisionNotFound")
        headers = {"X_Repo_Commit": commit}
        if (content := hub.commits[commit].get(name)) is None:
            return self.reply(404, X_Error_Code="EntryNotFound", **headers)
        oid = hashlib.sha256(content).hexdigest()
        if name.endswith(".safetensors"):
            return self.reply(302, Location=self.large(hub, oid), X_Linked_Size=len(content), X_Linked_Etag=f'"{oid}"', **headers)
        self.reply(200, content, ETag=f'"{oid}"', **headers)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A running Hub, which this process's client and those it starts use with the token hf_good and caches of their own."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    for name, value in {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_good", "HF_HUB_DISABLE_XET": "1",
                        "HF_HUB_DISABLE_PROGRESS_BARS": "1"}.items():
        monkeypatch.setenv(name, value)
    for name, value in {"ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hf" / "hub"), "HF_TOKEN_PATH": str(tmp_path / "hf" / "token"),
                        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}", "HF_HUB_DISABLE_XET": True,
                        "HF_HUB_DISABLE_PROGRESS_BARS": True}.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value, raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before the client tries again
    yield hub
    hub.shutdown()
    hub.server_close()


@pytest.fixture
def checkpoint(acts, tmp_path):
    """What the command trains, with the names of the rows' origin."""
    Path(f"{acts}.json").write_text(json.dumps({"model_name": "tiny", "hook_name": "blocks.3.hook_resid_pre", "dataset": "ada/rows",
                                                "base_model": "ada/tiny", "docs": 7}))
    run(*run_arguments(acts, tmp_path / "runs" / "mine", steps=60))
    return tmp_path / "runs" / "mine"


PUSHED = ["README.md", "cfg.json", "config.json", "eval.json", "metrics.jsonl", "sae_weights.safetensors"]


def test_push_without_arguments_then_load_is_bit_identical(hub, checkpoint, tmp_path):
    (tmp_path / "runs" / "mine" / "vanilla").mkdir()
    for name in (msae.WEIGHTS, msae.CONFIG):  # a twin, saved later
        (checkpoint / "vanilla" / name).write_bytes((checkpoint / name).read_bytes())
    done = subprocess.run([sys.executable, HERE / "cli.py", "push"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{hub.url}/ada/mine\n" and "hf_good" not in done.stderr
    assert sorted(hub.files("ada/mine")) == PUSHED and len(hub.commits) == 2
    assert all(hub.files("ada/mine")[name] == (checkpoint / name).read_bytes() for name in PUSHED if (checkpoint / name).exists())
    assert hub.files("ada/mine")["config.json"] == hub.files("ada/mine")["cfg.json"]
    pushed, local = (msae.MatryoshkaSAE.load(source) for source in ("ada/mine", checkpoint))
    assert all(torch.equal(a, b) for a, b in zip(pushed.state_dict().values(), local.state_dict().values()))
    assert pushed.prefixes == local.prefixes == (2, 4, 8, 16, 32) and pushed.metadata == local.metadata


def test_the_options_of_push(hub, checkpoint):
    assert run("push", checkpoint, "ada/other", "--private", "--commit-message", "first") == f"{hub.url}/ada/other\n"
    assert hub.repos["ada/other"]["private"]
    assert run("push", checkpoint, "other", "--revision", "small") == f"{hub.url}/ada/other/tree/small\n"
    assert run("push", checkpoint, "ada/other", "--create-pr") == f"{hub.url}/ada/other/discussions/1\n"
    assert set(hub.repos["ada/other"]) == {"main", "private", "small", "refs/pr/1"}
    assert b"revision='small'" in hub.files("ada/other", "small")["README.md"]
    for revision in ("small", "refs/pr/1", hub.repos["ada/other"]["main"]):
        assert msae.MatryoshkaSAE.load("ada/other", revision=revision).prefixes == (2, 4, 8, 16, 32)
    assert "--revision" in run("push", checkpoint, "ada/other", "--create-pr", "--revision", "small", code=2)
    hub.repos["bob/his"] = {"main": "0" * 40, "private": False}
    assert run("push", checkpoint, "bob/his", "--create-pr") == f"{hub.url}/bob/his/discussions/1\n"
    with pytest.raises(ValueError, match="revision"):
        msae.MatryoshkaSAE.load(checkpoint, revision="small")


def test_dry_run_shows_files_and_card_and_touches_no_network(hub, checkpoint, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.chdir(tmp_path)
    output = run("push", "--dry-run")
    assert not hub.seen and "YOUR_NAME/mine" in output
    assert all(re.search(rf"^ +[\d,]+  {name}$", output, re.MULTILINE) for name in PUSHED) and msae.STATE not in output
    assert "library_name: saelens" in output and 'base_model: "ada/tiny"' in output and "ada/rows" in output


FAULTS = {  # fault, changes of the environment, arguments, what the message must name
    "no token": ([], {"HF_TOKEN": None}, ["mine"], "cannot be pushed to"),
    "no token, full name": ([], {"HF_TOKEN": None}, ["ada/mine"], "cannot be pushed to"),
    "refused token": ([], {"HF_TOKEN": "hf_bad"}, ["mine"], "cannot be pushed to"),
    "refused token as an option": ([], {}, ["ada/mine", "--token", "hf_bad"], "cannot be pushed to"),
    "read token": ([], {"HF_TOKEN": "hf_read"}, ["ada/mine"], "cannot be pushed to"),
    "somebody else's": ([], {}, ["bob/his"], "cannot be pushed to"),
    "no such organization": ([], {}, ["nobody/mine"], "cannot be pushed to"),
    "bad name": ([], {}, ["ada/my sae"], "'ada/my sae'"),
    "two slashes": ([], {}, ["ada/my/sae"], "'ada/my/sae'"),
    "fault at create": ([["POST", "create", 503, 99]], {}, ["ada/mine"], "cannot be pushed to"),
    "fault at preupload": ([["POST", "preupload", 502, 99]], {}, ["ada/mine"], "cannot be pushed to"),
    "fault at upload": ([["PUT", "large", 500, 99]], {}, ["ada/mine"], "cannot be pushed to"),
    "fault at commit": ([["POST", "commit", 500, 99]], {}, ["ada/mine"], "cannot be pushed to"),
    "conflict at commit": ([["POST", "commit", 409, 99]], {}, ["ada/mine"], "cannot be pushed to"),
    "cut at upload": ([["PUT", "large", "cut", 99]], {}, ["ada/mine"], "cannot be pushed to"),
    "cut at commit": ([["POST", "commit", "cut", 99]], {}, ["ada/mine"], "cannot be pushed to"),
}


@pytest.mark.parametrize("faults, changes, arguments, names", FAULTS.values(), ids=FAULTS.keys())
def test_a_push_that_fails_is_one_line_and_commits_nothing(hub, tmp_path, monkeypatch, faults, changes, arguments, names):
    msae.MatryoshkaSAE(16, 32).save(tmp_path / "mine")
    hub.repos["bob/his"] = {"main": "0" * 40, "private": False}
    hub.commits["0" * 40] = {}
    hub.faults = [list(fault) for fault in faults]
    for name, value in changes.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    output = run("push", tmp_path / "mine", *arguments, code=1)
    errors = [line for line in output.splitlines() if line.startswith("Error:")]
    assert len(errors) == 1 and output.endswith(errors[0] + "\n") and names in errors[0] and "Traceback" not in output and "hf_" not in output
    assert list(hub.commits.values()) == [{}]


def test_a_push_survives_faults_that_pass(hub, tmp_path):
    sae = msae.MatryoshkaSAE(16, 32)
    sae.save(tmp_path / "mine")
    for faults in ([["POST", "preupload", 500, 2]], [["POST", "batch", 503, 1], ["PUT", "large", 500, 1]], [["PUT", "large", "cut", 2]]):
        hub.faults = faults
        hub.large.clear()
        run("push", tmp_path / "mine", "ada/mine")  # there from the second time on: 409
        assert not any(fault[3] for fault in faults)
    hub.faults = [["GET", "large", "cut", 3]]  # resumed where they were cut
    assert torch.equal(msae.MatryoshkaSAE.load("ada/mine").W_dec, sae.W_dec) and not any(fault[3] for fault in hub.faults)


@pytest.mark.parametrize("fault, names", [
    (["GET", "/api/models", 401, 99], "401"), (["GET", "/api/models", 503, 99], "503"),
    (["GET", "large", "cut", 99], ""), ("gated", "ada/mine"), ("revision", "v9"), ("missing", "ada/none"), ("down", ""), ("offline", "")])
def test_a_load_that_fails_says_why(hub, tmp_path, monkeypatch, fault, names):
    msae.MatryoshkaSAE(16, 32).save(tmp_path / "mine")
    run("push", tmp_path / "mine", "ada/mine")
    hub.faults = [fault] if isinstance(fault, list) else []
    hub.gated = {"ada/mine"} if fault == "gated" else set()
    if fault == "down":
        getattr(huggingface_hub, "close_session", lambda: None)()  # of connections kept alive
        hub.shutdown()
        hub.server_close()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", fault == "offline")
    with pytest.raises(OSError, match=f"cannot be read from the Hub: .*{names}") as error:
        msae.MatryoshkaSAE.load("ada/none" if fault == "missing" else "ada/mine", revision="v9" if fault == "revision" else None)
    assert "\n" not in str(error.value) and type(error.value) is OSError


def test_a_folder_wins_over_a_repository_and_other_names_are_explained(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here, there = msae.MatryoshkaSAE(4, 8), msae.MatryoshkaSAE(4, 8)
    here.save("mine")
    there.save("other")
    run("push", "other", "ada/mine")
    assert torch.equal(msae.MatryoshkaSAE.load("ada/mine").W_dec, there.W_dec)
    here.save("ada/mine")
    assert torch.equal(msae.MatryoshkaSAE.load("ada/mine").W_dec, here.W_dec)
    hub.seen.clear()
    for name in ("nothing", "runs/a/b", "./adb", "/ada/mine", "../ada/mine", Path("ada/none")):
        with pytest.raises(FileNotFoundError, match="cfg.json"):
            msae.MatryoshkaSAE.load(name)
    assert not hub.seen


def test_push_of_no_checkpoint_is_refused(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no checkpoint under runs/" in run("push", code=1)
    assert "cfg.json" in run("push", "nowhere", "ada/mine", code=1)
    assert "cfg.json" in run("push", tmp_path, "ada/mine", code=1)
    msae.MatryoshkaSAE(4, 8).save("mine")
    assert "no evaluation" in run("push", "mine", "ada/mine", "--dry-run")
    Path("mine/eval.json").write_text('{"fvu": 1}')
    assert "eval.json" in run("push", "mine", "ada/mine", code=1)
    assert not hub.seen


@pytest.mark.parametrize("library, revision", [("msae", None), ("msae", "small"), ("sae_lens", None), ("sae_lens", "small")])
def test_the_snippets_of_a_card_run_on_what_it_describes(hub, checkpoint, tmp_path, monkeypatch, library, revision):
    if library == "sae_lens":
        pytest.importorskip("sae_lens")
    run("push", checkpoint, "ada/mine", *(["--revision", revision] if revision else []))
    card = hub.files("ada/mine", revision or "main")["README.md"].decode()
    snippet = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[library == "sae_lens"]
    monkeypatch.chdir(tmp_path)
    exec(snippet, names := {})
    assert names["codes"].shape == (8, 32) and names["recon"].shape == (8, 16)
    figures = json.loads((checkpoint / "eval.json").read_text())
    assert f"| 32 | {figures['fvu']:.4f} | {figures['l0']:.2f} | {figures['dead']:.2%} | {figures['max_cosine']:.3f} |" in card and "| 2 | 0." in card


@pytest.mark.skipif("MSAE_HUB_TEST" not in os.environ, reason="writes a private repository with your token: set MSAE_HUB_TEST=1")
def test_push_and_load_on_the_real_hub(tmp_path):
    sae, api = msae.MatryoshkaSAE(16, 32), huggingface_hub.HfApi()
    sae.save(tmp_path / "mine")
    repo = f"{api.whoami()['name']}/msae-test-{os.getpid()}"
    try:
        assert run("push", tmp_path / "mine", repo, "--private").strip().endswith(repo)
        assert torch.equal(msae.MatryoshkaSAE.load(repo).W_enc, sae.W_enc) and sorted(set(api.list_repo_files(repo)) & set(PUSHED))
    finally:
        api.delete_repo(repo, missing_ok=True)


# ------------------------------------------------------------------------------------------------------------ neighbours


def close_to(theirs, ours):
    torch.testing.assert_close(theirs.detach(), ours.detach(), rtol=1e-6, atol=1e-6)


def test_saelens_opens_every_checkpoint_and_the_hub(hub, tmp_path):
    sae_lens = pytest.importorskip("sae_lens")
    x, seen = torch.from_numpy(rows(1000, mean=0.5, scale=1.0)), []

    def look(figures):
        ours, theirs = msae.MatryoshkaSAE.load(tmp_path / "run"), sae_lens.SAE.load_from_disk(tmp_path / "run")
        close_to(theirs.encode(x), ours.encode(x))
        close_to(theirs(x), ours(x))
        seen.append(float((ours.encode(x) > 0).float().sum(dim=1).mean()))

    origin = {"model_name": "tiny", "hook_name": "blocks.3.hook_resid_pre"}
    msae.train(x, config(n_latents_start=40, order="energy", steps=100), out=tmp_path / "run", save_minutes=0, log_every=20, on_log=look,
               metadata=origin)
    assert len(seen) == 5 and 0 < min(seen) < 32
    run("push", tmp_path / "run", "ada/mine")
    theirs = sae_lens.SAE.from_pretrained("ada/mine", ".")
    close_to(theirs.encode(x), msae.MatryoshkaSAE.load("ada/mine").encode(x))
    assert (theirs.cfg.metadata.k, list(theirs.cfg.metadata.prefixes)) == (4.5, [4, 12, 32])
    assert {name: theirs.cfg.metadata[name] for name in origin} == origin


@pytest.mark.parametrize("kind", ["trained there", "per latent", "no b_dec in the input"])
def test_jumprelu_saes_of_saelens_load(tmp_path, kind):
    sae_lens = pytest.importorskip("sae_lens")
    torch.manual_seed(0)
    settings = sae_lens.BatchTopKTrainingSAEConfig(d_in=16, d_sae=32, k=4, apply_b_dec_to_input=kind[:2] != "no")
    theirs = sae_lens.TrainingSAE.from_dict(settings.to_dict())
    theirs.topk_threshold.fill_(0.01)
    theirs.b_dec.data.normal_()
    theirs.W_dec.data *= torch.rand(32, 1) + 0.5  # no unit rows
    theirs.save_inference_model(tmp_path / "theirs")
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "theirs")
    if kind == "per latent":
        theirs.threshold.data.uniform_(0, 0.2)
        theirs.save_model(tmp_path / "theirs")
    x, ours = torch.from_numpy(rows(200, mean=0.5, scale=1.0)), msae.MatryoshkaSAE.load(tmp_path / "theirs")
    torch.testing.assert_close(theirs.encode(x).detach(), ours.encode(x).detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs(x).detach(), ours(x).detach(), rtol=1e-5, atol=1e-5)
    assert ours.prefixes == (32,) and 0 < float((ours.encode(x) > 0).float().mean()) < 0.6


def test_each_latent_has_its_own_threshold_and_older_checkpoints_load(tmp_path):
    sae, x = msae.MatryoshkaSAE(16, 32), torch.from_numpy(rows(50, mean=0.5))
    sae.threshold.uniform_(0, 3)
    sae.b_dec.data.normal_()
    sae.save(tmp_path)
    pre = torch.relu((x - sae.b_dec) @ sae.W_enc + sae.b_enc)
    expected = torch.where(pre > sae.threshold, pre, 0)
    torch.testing.assert_close(msae.MatryoshkaSAE.load(tmp_path).encode(x), expected)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "apply_b_dec_to_input": False}))
    pre = torch.relu(x @ sae.W_enc + sae.b_enc)
    torch.testing.assert_close(msae.MatryoshkaSAE.load(tmp_path).encode(x), torch.where(pre > sae.threshold, pre, 0),
                               rtol=1e-4, atol=1e-4)


def dictionary_learning(monkeypatch):
    """The package; modules of its language-model half that are not installed are left empty."""
    if importlib.util.find_spec("dictionary_learning") is None:
        pytest.skip("dictionary_learning is not installed")
    while True:
        try:
            return importlib.import_module("dictionary_learning.utils")
        except ModuleNotFoundError as error:
            for name in [name for name in sys.modules if name.startswith("dictionary_learning")]:
                del sys.modules[name]
            monkeypatch.setitem(sys.modules, error.name, unittest.mock.MagicMock())


ALONE = """
import sys, numpy as np

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("click", "rich", "huggingface_hub", "cli"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocked())
import msae, torch
rows = np.random.default_rng(0).normal(size=(2000, 8)).astype("f4")
cfg = msae.TrainConfig(n_latents=16, k=3, batch_size=64, steps=30)
trained = msae.train(rows, cfg, out="run")
sae = msae.MatryoshkaSAE.load("run")
assert torch.equal(sae.encode(torch.from_numpy(rows)), trained.encode(torch.from_numpy(rows)))
assert 0 < msae.evaluate(sae, rows)["fvu"] < 1
try:
    msae.MatryoshkaSAE.load("ada/mine")
except OSError as error:
    assert "huggingface_hub" in str(error), error
else:
    raise AssertionError
assert not {"click", "rich", "huggingface_hub"} & set(sys.modules)
"""


def test_msae_works_copied_alone_into_a_folder(tmp_path):
    (tmp_path / "msae.py").write_bytes((HERE / "msae.py").read_bytes())
    done = subprocess.run([sys.executable, "-c", ALONE], cwd=tmp_path, env={"PATH": "", "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout + done.stderr, done.stderr


# ------------------------------------------------------------------------------------------------- numbers under stress

STRESS = {  # what is done to the rows (n, 16), and settings
    "tiny": (lambda x: x * 1e-4, {}), "huge": (lambda x: x * 1e4, {}), "near the bounds": (lambda x: x * 1e15, {}),
    "one dimension 1000 times the others": (lambda x: x * np.where(np.arange(16) == 3, 1000, 1), {}),
    "mean 400 times the spread": (lambda x: x + 1000, {}), "duplicates": (lambda x: x[np.arange(len(x)) % 50], {}),
    "a third zero rows": (lambda x: x * (np.arange(len(x)) % 3 > 0)[:, None], {}), "constant dimensions": (lambda x: x * (np.arange(16) < 3) + 2, {}),
    "k of 0.5": (lambda x: x, dict(k=0.5)), "k = F": (lambda x: x, dict(k=32)), "F < D": (lambda x: x, dict(n_latents=6, prefixes=None, k=2.5)),
    "batches of 1": (lambda x: x, dict(batch_size=1)), "one latent": (lambda x: x, dict(n_latents=1, prefixes=(1,), k=0.5)),
    "5,000 latents on 4 dimensions": (lambda x: x[:, :4], dict(n_latents=5000, prefixes=None, steps=50)),
}


@pytest.mark.parametrize("change, settings", STRESS.values(), ids=STRESS.keys())
def test_strange_rows_and_sizes_keep_finite_weights_and_l0(change, settings):
    data = change(rows(60_000)).astype(np.float32)
    sae = msae.train(data[:40_000], config(**{"steps": 200, **settings}))
    figures, k = msae.evaluate(sae, data[40_000:]), settings.get("k", 4.5)
    assert all(tensor.isfinite().all() for tensor in sae.state_dict().values()) and np.isfinite(figures["fvu"])
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
    noise = (sae.encode(torch.from_numpy(data[40_000:44_000])) > 0).sum(dim=1).float().std() / 2000**0.5  # of 2,000 calibration rows
    assert abs(figures["l0"] - k) < max(0.05 * k, 4 * noise) or figures["l0"] < k and not sae.threshold.any()  # all positive entries are kept


@pytest.mark.parametrize("change", [lambda x: x * 1e-20, lambda x: x * 1e20, lambda x: x * 0 + 5, lambda x: x + 1e8], ids=["tiny", "huge", "equal", "mean"])
def test_rows_beyond_float32_are_refused(change):
    with pytest.raises(ValueError, match="their root mean squared distance from their mean, got"):
        msae.train(change(rows(1000)).astype(np.float32), config())


@pytest.mark.parametrize("steps", [1, 20])
def test_a_diverged_run_is_refused_and_not_saved(tmp_path, steps):
    with pytest.raises(ValueError, match="diverged by step .*, try a lower lr"):
        msae.train(rows(1000), config(lr=9e18, warmup_steps=0, steps=steps), out=tmp_path / "run")
    assert torch.equal(msae.MatryoshkaSAE.load(tmp_path / "run").W_dec, msae.Trainer(config(), 16).export().W_dec)


def test_no_drift_over_many_steps_and_both_paths_end_alike():
    data, cfg = rows(24_000), config(steps=800, lr=0.01, n_latents_start=40, dead_after=3200)
    trainers = [msae.Trainer(cfg, 16, mean=torch.from_numpy(data.mean(axis=0)), scale=12.0) for _ in range(2)]
    trainers[0].fast, trainers[1].fast = True, False
    for x in msae.itertools.islice(msae.Rows(data[:20_000]).batches(64, 0), cfg.steps):
        for trainer in trainers:
            trainer.step(x)
    ends = [trainer.export() for trainer in trainers]
    assert all((sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-5 for sae in ends)
    for sae in ends:
        msae.calibrate(sae, torch.from_numpy(data[:20_000]), cfg.k)
    sparse, dense = (msae.evaluate(sae, data[20_000:]) for sae in ends)
    assert sparse["fvu"] == pytest.approx(dense["fvu"], rel=0.03) and sparse["l0"] == pytest.approx(dense["l0"], rel=0.03)


# ---------------------------------------------------------------------------------------------------------------- enemy

FUZZ = int(os.environ.get("MSAE_FUZZ", 130))  # bad inputs, over all kinds; MSAE_FUZZ=2100 takes minutes
LIMIT, STEPS_AT_MOST = 2 << 30, 60            # bytes beyond those in use; steps before Ctrl-C
WIDE = {"active_prob": 1, "children": [{"active_prob": 1e-3}] * 6000}
DEEP = functools.reduce(lambda node, _: {"active_prob": 1, "children": [node]}, range(200), {"active_prob": 1})
VALUES = (None, True, False, 0, 1, 2, 3, -1, 10**4, 2**31, 2**62, 2**63, -10**400, 10**400, 0.5, 1.0, 1e-320, 1e308, -1e308, float("nan"),
          float("inf"), "", "x\ny", "1", "\0", [], [[]], [1, 2], [0.5, 1], [1e308] * 5, [10**400], {}, {"a": 1}, WIDE, DEEP)
WORDS = ("-1", "0", "1", "2", "16", "17", "9999", str(2**31), str(2**62), "9" * 30, "9" * 5000, "1e-320", "0.5", "1e308", "1e999", "nan", "inf",
         "-inf", "", " ", "x", "x\ny", "\0", "0.5,1", "1,2,16", ".1e999,1", "cuda:99", "hpu", "mkldnn", "meta", "float16", "energy", "..", "é" * 300)
SIZES = {"train": "--acts acts.npy --latents 16 --k 2 --batch-size 32 --steps 8 --device cpu --out new", "toy": "--config toy.json --out toys",
         "config": "--acts acts.npy --config train.json --device cpu --out new", "bench": "--latents 16 --d-model 8 --batch-size 8 --k 2 --steps 1 --device cpu",
         "harvest": "--model tiny.pt --layer 1 --tokens ids.jsonl --device cpu --out harvested.npy", "push": "run ada/mine --dry-run",
         "eval": "run --acts acts.npy --device cpu --out eval.json"}


def bad_bytes(g, data):
    """``data`` cut, with bits flipped, bytes put in or repeated, or a pickle that would leave a trace in its place."""
    at = g.randrange(len(data)) if g.random() < 0.5 else g.randrange(min(200, len(data)))
    return g.choice((lambda: data[:at], lambda: data[:at] + bytes([data[at] ^ 1 << g.randrange(8)]) + data[at + 1:], lambda: data + data[:at],
                     lambda: data[:at] + g.randbytes(8) + data[at:], lambda: data[:at] + b"\xff" * 8 + data[at + 8:],
                     lambda: pickle.dumps(Canary())))()


def bad_json(g, content):
    """The text of ``content`` with values swapped, dropped or added, or the text itself damaged; as bytes."""
    content = json.loads(json.dumps(content))
    for _ in range(g.randint(1, 2)):
        place, parent = content, {}
        while isinstance(place, (dict, list)) and place and (parent is not content or g.random() < 0.8):
            key, parent = g.choice(list(place) if isinstance(place, dict) else range(len(place))), place
            place = place[key]
        if parent:
            parent[key] = copy.deepcopy(g.choice(VALUES))
            if g.random() < 0.2:
                del parent[key]
    text = json.dumps(content).encode()
    changes = (lambda: b"\xef\xbb\xbf" + text, lambda: json.dumps(content, indent=1).replace("\n", "\r\n").encode(), lambda: bad_bytes(g, text),
               lambda: text[:-1] + b"," + text[1:], lambda: b'{"a":' * 10**5, lambda: b'{"k": %s}' % (b"9" * 5000), lambda: b"\xff\xfe" + text)
    return g.choice((lambda: text,) * 14 + changes)()


@np.errstate(over="ignore")
def bad_npy(g, data):
    """A ``.npy`` file with bytes, header or values damaged, or another kind of array."""
    array, file = np.load(io.BytesIO(data)), io.BytesIO()
    shape = g.choice(((10**12, 8), (10**30, 8), (-1, 8), (300, -8), (2**31, 2**31), (0, 8), (300, 0), (), (2400,), (2, 150, 8), (2400, 1), (1, 2400), (8.0, 3)))
    header = {"descr": g.choice(("<f4", "<f4", "<f2", ">f4", "|O", "<c8", "<i4", "<f16", "|V4", [("a", "<f4")], "<U9", "x", 7)),
              "fortran_order": g.choice((False, True, 2)), "shape": g.choice((shape, (300, 8)))}
    text = repr(header if g.random() < 0.8 else g.choice((header | {"more": 1}, [header], DEEP, "x"))).encode() + b"\n"
    spots = np.array(g.choices(range(array.size), k=g.choice((1, array.size))))
    array.flat[spots] = g.choice((np.nan, np.inf, 1e38, 1e-45, 0.0, -1e20) if array.dtype.kind == "f" else (-1, 0, 1, 50, 2**40))
    kind = g.choice((lambda a: a, np.asfortranarray, lambda a: a.astype(object), lambda a: np.array([Canary()] * 9), lambda a: a.astype("f8") * 1e300,
                     lambda a: a.astype("c8"), lambda a: a.view("f4,f4"), lambda a: a > 0, lambda a: a[:0], lambda a: a[:, :1], lambda a: a[:40],
                     lambda a: a.astype("f2"), lambda a: a[None, None], lambda a: a[0, 0]))(array)
    np.save(file, kind, allow_pickle=True)
    version = g.choice((b"\1\0", b"\2\0", b"\3\0", b"\7\0"))
    size = g.choice((len(text),) * 5 + (0, 60_000)).to_bytes(2 if version == b"\1\0" else 4, "little")
    return g.choice((lambda: bad_bytes(g, data), lambda: b"\x93NUMPY" + version + size + text + data[128:], file.getvalue))()


def bad_tensors(g, data):
    """A safetensors file with bytes or header damaged, or tensors that are missing, too many, misshapen or of strange values."""
    size = int.from_bytes(data[:8], "little")
    if g.random() < 0.3:
        return bad_bytes(g, data)
    if g.random() < 0.2:
        header = bad_json(g, json.loads(data[8:8 + size]))
        return g.choice((len(header), size, 2**40)).to_bytes(8, "little") + header + data[8 + size:]
    tensors, origin = safetensors.torch.load(data), json.loads(data[8:8 + size]).get("__metadata__")
    for name in g.sample(sorted(tensors), g.choice((1, 1, 2, len(tensors)))):
        t = tensors.pop(name)
        other = g.choice((t.flatten(), t[None], t.mT.contiguous() if t.dim() > 1 else t[None], t[..., :-1] if t.dim() else t, t.half(), t.double(), t.long(), t.bool(), t.to(torch.complex64),
                          t.to(torch.float8_e4m3fn), t * 0, t * 0 - 1, t * 0 + 2**40, t.float() * float("nan"), t.float() * 1e38, t.float() + float("inf"), None))
        tensors.update({} if other is None else {name + g.choice(("", "", "", ".x", "x")): other.clone()})
    return safetensors.torch.save(tensors, g.choice((origin, origin, {"origin": "[]"}, {"origin": "[" * 10**5}, {"format": "pt"}, None)))


def bad_lines(g, data):
    """A ``.jsonl`` file with one line changed, or the whole damaged."""
    lines = data.splitlines()
    number = g.randrange(len(lines))
    lines[number] = bad_json(g, json.loads(lines[number]))
    return bad_bytes(g, data) if g.random() < 0.2 else b"\n".join(lines)


def bad_file(name, change, *arguments):
    """A kind of attack: damage one file, then run the command that reads it."""
    def attack(g):
        data = Path(name).read_bytes()
        Path(name).write_bytes(change(g, json.loads(data) if change is bad_json else data))
        return [arguments[0].replace("config", "train"), *SIZES[arguments[0]].split(), *arguments[1:]]
    return attack


def bad_options(g):
    """Two options of any command with values at and beyond their bounds."""
    name = g.choice([name for name in SIZES if name in cli.main.commands])
    options = [p for p in cli.main.commands[name].params if p.param_type_name == "option" and p.name != "dry_run"]
    return [name, *SIZES[name].split(), *(word for p in g.sample(options, g.choice((1, 1, 2))) for word in ([p.opts[0]] if p.is_flag else [p.opts[0], g.choice(WORDS)]))]


RESUME = ("train", "--resume", "--out", "run", "--steps", "80")
ATTACKS = {"npy": bad_file("acts.npy", bad_npy, "train"), "weights": bad_file(f"run/{msae.WEIGHTS}", bad_tensors, "eval"),
           "cfg.json": bad_file(f"run/{msae.CONFIG}", bad_json, "eval"),
           "state": bad_file(f"run/{msae.STATE}", bad_bytes, *RESUME), "metrics": bad_file(f"run/{msae.METRICS}", bad_bytes, *RESUME),
           "toy config": bad_file("toy.json", bad_json, "toy"), "train config": bad_file("train.json", bad_json, "config"),
           "jsonl": bad_file("ids.jsonl", bad_lines, "harvest"), "token ids": bad_file("ids.npy", bad_npy, "harvest", "--tokens", "ids.npy"),
           "model": bad_file("tiny.pt", bad_bytes, "harvest"), "labels": bad_file("labels.npy", bad_npy, "eval", "--labels", "labels.npy"),
           "eval.json": bad_file("run/eval.json", bad_json, "push"), "options": bad_options}


@contextlib.contextmanager
def confined(monkeypatch):
    """Little memory, 60 steps before Ctrl-C, and an alarm for what hangs."""
    import resource
    steps, step, limits = [], msae.Trainer.step, resource.getrlimit(resource.RLIMIT_AS)

    def counted(trainer, x):
        steps.append(1)
        if len(steps) > STEPS_AT_MOST:
            raise KeyboardInterrupt
        return step(trainer, x)

    def hangs(*_):
        raise AssertionError("hangs")

    in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(msae.Trainer, "step", counted)
    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    resource.setrlimit(resource.RLIMIT_AS, (in_use + LIMIT, limits[1]))
    try:
        yield steps
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
        signal.alarm(0)
        monkeypatch.setattr(msae.Trainer, "step", step)


def whole(folder):
    """Whether the folder holds nothing of a checkpoint or all of a good one."""
    names = {path.name for path in folder.rglob("*")} if folder.is_dir() else set()
    return not any(name.endswith(".tmp") for name in names) and (not names & {msae.WEIGHTS, msae.CONFIG} or bool(msae.MatryoshkaSAE.load(folder)))


def attacked(kind, number, monkeypatch):
    """The exit code of one attack in the present folder, and what went wrong beside a refusal in one line, if anything."""
    arguments = ATTACKS[kind](random.Random(f"{kind} {number}"))
    before = {path: path.read_bytes() for path in Path("run").iterdir() if path.name != msae.METRICS}
    with confined(monkeypatch) as steps:
        result = CliRunner().invoke(cli.main, arguments)
    lines, code = result.output.splitlines(), result.exit_code
    faults = {
        "no traceback": isinstance(result.exception, (SystemExit, type(None))),
        "one line": [line for line in lines if line.startswith("Error:")] == lines[-1:] * (code in (1, 2)) and len("".join(lines[-1:])) < 6000,
        "exit code": code in (0, 1, 2) or code == 130 and len(steps) > STEPS_AT_MOST,
        "no code run": not Path("canary").exists(),
        "nothing of a refused harvest": code == 0 or not Path("harvested.npy").exists(),
        "whole new checkpoints": all(whole(Path(name)) for name in ("new", "new/vanilla")),
        "old checkpoint untouched": code == 0 or all(path.read_bytes() == data for path, data in before.items()),
    }
    broken = [name for name, kept in faults.items() if not kept]
    return code, broken and f"{kind} {number}: {broken} {result.exception!r:.300} {' '.join(arguments)[:300]} {result.output[-500:]}"


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs limits on memory")
@pytest.mark.parametrize("kind", ATTACKS)
def test_bad_input_gets_one_line_and_harms_nothing(kind, tmp_path, monkeypatch):
    seen, good = [], tmp_path / "good"
    good.mkdir()
    monkeypatch.chdir(good)
    np.save("acts.npy", rows(300, 8))
    settings = json.loads((HERE / "toy_config.json").read_text())
    settings["train"].update(steps=4, batch_size=50)
    Path("toy.json").write_text(json.dumps(settings))
    Path("train.json").write_text(json.dumps(dataclasses.asdict(msae.TrainConfig(n_latents=16, k=2, k_start=4, k_anneal_steps=3, batch_size=32, steps=8))))
    with confined(monkeypatch):
        run("train", *SIZES["train"].split(), "--out", "run", "--steps", 80, "--save-minutes", 0, code=130)
    Path("run/eval.json").write_text(json.dumps(msae.evaluate(msae.MatryoshkaSAE.load("run"), "acts.npy")))
    torch.save(msae.TinyModel(2, 16, 16, 32, 50, 8).state_dict(), "tiny.pt")
    ids = np.random.default_rng(0).integers(50, size=(300, 8))
    Path("ids.jsonl").write_text("".join(json.dumps({"tok_ids": row}) + "\n" for row in ids.tolist()))
    np.save("ids.npy", ids)
    np.save("labels.npy", ids[:, :1] % 3)
    for number in range(FUZZ // len(ATTACKS)):
        shutil.copytree(good, tmp_path / "case")
        monkeypatch.chdir(tmp_path / "case")
        seen.append(attacked(kind, number, monkeypatch))
        monkeypatch.chdir(tmp_path)
        shutil.rmtree("case")
    print(kind, dict(collections.Counter(code for code, _ in seen)))
    assert not any(faults := [fault for _, fault in seen if fault]), "\n\n".join(faults)
