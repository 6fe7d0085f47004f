"""Claims about msae, each against a naive oracle or a literal number. No GPU, no network."""

import base64
import collections
import contextlib
import html.parser
import http.server
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
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
import xml.etree.ElementTree
from pathlib import Path

import click.testing
import huggingface_hub.constants
import numpy as np
import pytest
import safetensors.torch
import torch

import cli
import msae

HERE = Path(__file__).parent
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
needs_fork = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="needs fork and the signals of POSIX"
)
torch.set_num_threads(1)  # OpenMP threads do not survive a fork


def rows(n=512, d=16, seed=0, scale=3.0, mean=5.0):
    g = np.random.default_rng(seed)
    return (g.laplace(size=(n, d)) @ g.normal(size=(d, d)) * scale / d**0.5 + mean).astype(
        np.float32
    )


def config(**changes):
    small = dict(n_latents=32, k=4.5, prefixes=(4, 12, 32), batch_size=64, steps=20)
    return msae.TrainConfig(**{**small, **changes})


def same(a, b):  # bit for bit
    if isinstance(a, torch.nn.Module):
        return same(a.state_dict(), b.state_dict())
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def toy_settings(**changes):
    settings = json.loads((HERE / "toy_config.json").read_text())
    return {**settings, "train": {**settings["train"], **changes}}


def tiny(n_vocab=50):
    torch.manual_seed(0)
    model = msae.TinyModel(3, 32, 64, n_vocab, 24).eval()
    torch.nn.init.normal_(model.pos_embed)
    return model


def run(*arguments, codes=(0,)):
    result = click.testing.CliRunner().invoke(
        cli.main, [str(a) for a in arguments], catch_exceptions=False
    )
    assert result.exit_code in codes, result.output
    return result.output


def refused(*arguments):
    """The one line with which the command line refuses these arguments."""
    *_, last = lines = run(*arguments, codes=(1, 2)).splitlines()
    assert [line for line in lines if line.startswith(("Error:", "Traceback"))] == [last]
    return last


def forked(work, output=os.devnull, **environment):
    """A fork of this process, for a function or the words of a command: importing torch is slow."""

    def child():
        os.dup2(file.fileno(), 1)
        os.dup2(1, 2)
        sys.stdout = sys.stderr = os.fdopen(1, "w", buffering=1)
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # jobs in a shell's background ignore it
        os.environ.update(environment)
        work() if callable(work) else typed(*work)

    with open(output, "w") as file:
        process = multiprocessing.get_context("fork").Process(target=child, daemon=True)
        process.start()
    return process


def typed(*arguments):
    sys.argv = ["cli.py", *map(str, arguments)]
    cli.main()


def wait_for_step_50(process, output):
    while "step 50/" not in Path(output).read_text():
        assert process.is_alive(), Path(output).read_text()
        process.join(0.005)


def stopping_at(n, step=msae.Trainer.step):
    def limited(trainer, x):
        if next(done) == n:
            raise KeyboardInterrupt
        return step(trainer, x)

    done = itertools.count()
    return limited


TRAIN = "train --acts acts.npy --latents 32 --k 4 --batch-size 64 --steps 80".split()
RESUME = [*TRAIN, "--out", "run", "--resume"]
ENDLESS = [*TRAIN, "--steps", "1000000", "--out", "new"]
LOOK = "look run --acts acts.npy --out page.html --vocab vocab.json".split()
HARVEST = "harvest --model tiny.pt --layer 2 --tokens ids.jsonl --out rows.npy".split()
EVAL = "eval run --acts acts.npy".split()
TOY = "toy --config toy.json --out toys".split()
BENCH = "bench --latents 8 --d-model 8 --batch-size 8 --k 2 --steps 1".split()
VOCABULARY = [
    "the",
    " Cat",
    "</script><script>alert(1)</script>",
    "\n",
    "<img src=x onerror=alert(2)>",
    "\0",
]
ABOUT = {
    "model_name": "tiny",
    "hook_name": "torso.1.input",
    "dataset": "ada/rows",
    "base_model": "ada/tiny",
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A folder of good files for all commands; ``run`` was cut at step 60 of 80."""
    folder = tmp_path_factory.mktemp("good")
    ids = np.random.default_rng(0).integers(0, 9000, (300, 20))
    ids[:, 0] = msae.BEGIN
    ids[:50, 15:] = msae.PAD
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        np.save("acts.npy", rows(3000).astype(np.float16))
        np.save("labels.npy", np.arange(3000) % 3 * 10)
        np.save("ids.npy", ids.astype(np.uint16))
        np.save("acts.ids.npy", np.stack([np.arange(3000) // 30, np.arange(3000) % 7], axis=1))
        msae.write("vocab.json", VOCABULARY)
        msae.write("ids.jsonl", b"".join(b'{"tok_ids": %a}\r\n' % row for row in ids.tolist()))
        torch.save(
            {key: value.bfloat16() for key, value in tiny(10_000).state_dict().items()}, "tiny.pt"
        )
        msae.write("acts.npy.json", {**ABOUT, "docs": 7})
        msae.write("toy.json", toy_settings(steps=4, batch_size=50))
        msae.write("train.json", vars(config(k_start=8, k_anneal_steps=3)))
        patch.setattr(msae.Trainer, "step", stopping_at(60))
        run(*TRAIN, "--out", "run", "--save-minutes", 0, codes=(130,))
        run("eval", "run", "--acts", "acts.npy")
    return folder


@pytest.fixture
def here(good, tmp_path, monkeypatch):
    shutil.copytree(good, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)


def no_hub(*arguments, allow_patterns, **options):
    raise OSError(f"{allow_patterns[0]} is not there")


def files():
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file()}


# ----------------------------------------------------------------------------------------- the loss


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
    x = torch.tensor([[3.0, 4.0]])
    acts = torch.tensor([[3.0, 2.0]])
    assert msae.nested_loss(x, acts, torch.eye(2), torch.zeros(2), (1, 2)) == 10.0
    assert msae.nested_loss(x, acts, torch.eye(2), torch.zeros(2), (1, 2), [0.25, 0.75]) == 7.0


@pytest.mark.parametrize("prefixes, weights", [((3, 5, 9), (0.5, 0.2, 0.3)), ((9,), (1.0,))])
def test_loss_and_gradients_equal_the_naive_loop(prefixes, weights):
    g = torch.Generator().manual_seed(0)
    acts = torch.rand(4, 9, generator=g) * (torch.rand(4, 9, generator=g) < 0.4)
    acts[1] = 0  # a row without an active latent
    x, W_dec, b_dec = (torch.randn(shape, generator=g).double() for shape in ((4, 6), (9, 6), (6,)))
    leaves = [t.double().requires_grad_() for t in (acts, W_dec, b_dec)]
    ours, naive = (loss(x, *leaves, prefixes, weights) for loss in (msae.nested_loss, naive_loss))
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


@pytest.mark.parametrize("blocked", [True, False], ids=["in blocks", "at once"])
@pytest.mark.parametrize("changes", STEPS.values(), ids=STEPS.keys())
def test_fast_loss_takes_the_steps_of_batch_loss(monkeypatch, changes, blocked):
    monkeypatch.setattr(msae, "in_tiles", lambda x: blocked)  # at once: as on a GPU
    cfg = config(clip=1e9, **changes)
    fast, literal = (
        msae.Trainer(cfg, 16, scale=4.0, loss=loss) for loss in (msae.fast_loss, msae.batch_loss)
    )
    batches = torch.from_numpy(rows(cfg.batch_size * 5, mean=0.3)).split(cfg.batch_size)
    # above 0.9 of a wrong cut lie too few entries, or many
    for x, wrong in zip(batches, (1, 1, 100, 0.01, 1)):
        fast.cut *= wrong
        torch.testing.assert_close(fast.step(x), literal.step(x), rtol=1e-5, atol=0)
        for a, b in zip(fast.sae.parameters(), literal.sae.parameters()):
            assert (a.grad - b.grad).norm() <= 1e-5 * b.grad.norm()
            b.data.copy_(a.data)
        assert torch.equal(fast.rows_silent, literal.rows_silent)
        assert torch.equal(fast.dead, literal.dead)
        torch.testing.assert_close(fast.energy, literal.energy)


@pytest.mark.parametrize("loss", [msae.batch_loss, msae.fast_loss])
def test_the_loss_that_is_passed_is_the_one_that_trains(monkeypatch, loss):
    saes = [msae.train(rows(3000), config(steps=50), loss=each) for each in (loss, msae.fast_loss)]
    for a, b in zip(saes[0].parameters(), saes[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(msae, "nested_loss", None)  # which the literal loss calls
    if loss is msae.batch_loss:
        with pytest.raises(TypeError, match="not callable"):
            msae.train(rows(3000), config(), loss=loss)


def test_aux_loss_equals_its_formula_and_moves_only_the_dead_latents():
    sae = msae.MatryoshkaSAE(4, 6)
    dead = [1, 3, 4]
    total = 0.0
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    weights = sae.W_enc, sae.b_enc, sae.W_dec
    for e, pre in zip(x, sae.pre_acts(x)):  # the residual of an SAE that keeps nothing is x
        top = sorted(dead, key=lambda j: pre[j])[
            -2:
        ]  # the two (D / 2) largest of three dead latents
        total += (e - sum(pre[j] * sae.W_dec[j] for j in top)).pow(2).sum()
    expected = total / (x - x.mean(dim=0)).pow(2).sum()
    ours = msae.aux_loss(x, x, sae.W_enc[:, dead], sae.b_enc[dead], sae.W_dec[dead])
    torch.testing.assert_close(ours, expected)
    grads = torch.autograd.grad(ours, weights, retain_graph=True)
    for grad, naive, dim in zip(grads, torch.autograd.grad(expected, weights), (1, 0, 0)):
        torch.testing.assert_close(grad, naive)
        others = torch.tensor([latent for latent in range(6) if latent not in dead])
        assert not grad.index_select(dim, others).any()


def test_two_fast_losses_in_one_step_and_a_factor_have_the_literal_gradients():
    def halves(loss):
        def both(sae, x, step):
            first, second = (loss(sae, half, step) for half in x.chunk(2))
            return 3 * first[0] + second[0], first[1]

        return both

    gradients = []
    for loss in (msae.fast_loss, msae.batch_loss):
        trainer = msae.Trainer(config(dead_after=64, clip=1e9), 16, loss=halves(loss))
        for x in torch.from_numpy(rows(64 * 3, mean=0.3)).split(64):
            trainer.step(x)
        gradients.append([parameter.grad for parameter in trainer.sae.parameters()])
    for a, b in zip(*gradients):
        assert (a - b).norm() <= 1e-4 * b.norm()


def l1_loss(sae, x, step):
    acts = sae.pre_acts(x)
    loss = msae.nested_loss(x, acts, sae.W_dec, sae.b_dec, step.prefixes, step.weights)
    return loss + 0.05 * acts.sum(dim=1).mean(), msae.Codes.of(acts)


def test_an_sae_of_a_loss_without_top_k_is_returned_as_it_was_trained():
    logged = []
    sae = msae.train(rows(20_000), config(), loss=l1_loss, calibrate=False, on_log=logged.append)
    figures = msae.evaluate(sae, rows(20_000))
    assert not sae.threshold.any()
    assert figures["l0"] == pytest.approx(logged[-1]["l0"], rel=0.05)
    assert figures["fvu"] == pytest.approx(logged[-1]["fvu"], rel=0.1)


def test_fast_loss_that_is_not_batch_loss_any_more_is_refused(monkeypatch):
    def changed(*arguments):
        return 2 * nested_loss(*arguments)

    nested_loss = msae.nested_loss
    monkeypatch.setattr(msae, "nested_loss", changed)
    with pytest.raises(ValueError, match="fast_loss is not batch_loss: .* loss=batch_loss"):
        msae.train(rows(1000), config())
    msae.train(rows(1000), config(), loss=msae.batch_loss)


@pytest.mark.parametrize(
    "change, names",
    [
        (dict(weights=(0.5, 0.5)), "weights must be 3"),
        (dict(prefixes=(4, 12, 100)), "prefixes must end with 32"),
    ],
)
def test_weights_and_prefixes_that_do_not_fit_are_refused(change, names):
    def misfit(sae, x, step):
        return msae.fast_loss(sae, x, step._replace(**change))

    with pytest.raises(ValueError, match=names):
        msae.train(rows(1000), config(), loss=misfit)


def test_a_loss_that_returns_something_else_is_refused():
    with pytest.raises(ValueError, match="must return .scalar, Codes., got Tensor"):
        msae.train(rows(1000), config(), loss=lambda sae, x, step: sae.W_enc.sum())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_training_makes_its_own_gradients_whatever_the_mode_of_the_caller(mode):
    cfg = config(dead_after=64, n_latents_start=40)
    expected = msae.train(rows(1000), cfg)
    with mode():
        assert same(msae.train(rows(1000), cfg), expected)


def test_gradients_are_written_into_the_memory_of_the_last_step():
    trainer = msae.Trainer(config(), 16)
    places = []
    for x in torch.from_numpy(rows(64 * 3)).split(64):
        trainer.step(x)
        places.append([trainer.sae.W_enc.grad.data_ptr(), trainer.sae.W_dec.grad.data_ptr()])
    assert places[0] == places[1] == places[2]


def test_a_step_on_the_meta_device_waits_for_no_value():
    # there is no data: what asks for a value, or mixes devices, raises
    for changes in ({}, dict(n_prefixes=4, prefixes=None)):
        trainer = msae.Trainer(config(**changes), 16, device="meta")
        for _ in range(trainer.steps_per_dead_list - 1):
            trainer.step(torch.empty(64, 16, device="meta"))
        with pytest.raises(
            NotImplementedError, match="nonzero"
        ):  # the list of dead latents is made anew
            trainer.step(torch.empty(64, 16, device="meta"))


def test_a_new_parameter_is_met_or_refused_by_name():
    class Gated(msae.MatryoshkaSAE):
        def __init__(self, *args):
            super().__init__(*args)
            self.W_gate = torch.nn.Parameter(torch.ones(len(self.b_enc)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(msae, "MatryoshkaSAE", Gated)
        with pytest.raises(ValueError, match="latent_dims .*W_gate"):
            msae.Trainer(config(), 16)
        patch.setattr(Gated, "latent_dims", {**Gated.latent_dims, "W_gate": 0}, raising=False)
        cfg = config(n_latents_start=40, steps=10)
        with pytest.raises(ValueError, match="fast_loss .*W_gate"):
            msae.train(rows(1000), cfg)
        sae = msae.train(rows(1000), cfg, loss=msae.batch_loss)
        assert len(sae.W_gate) == 32


@pytest.mark.parametrize("cut", [0.0, 0.5, 100.0])
@pytest.mark.parametrize(
    "n, bias", [(17, 0.0), (260, 0.0), (17, -9.0)], ids=["some", "all positive", "none positive"]
)
def test_the_n_largest_of_the_whole_batch_are_kept_in_row_major_order(monkeypatch, n, bias, cut):
    monkeypatch.setattr(msae, "CACHED", 10)  # blocks of 5 latents
    g = torch.Generator().manual_seed(0)
    x, W_enc, b_enc = (
        torch.randint(-2, 3, shape, generator=g).float() for shape in ((8, 6), (6, 33), (33,))
    )
    pre = torch.relu(x @ W_enc + b_enc + bias)  # with many ties, of which any may be kept
    largest = sorted(pre.flatten().tolist())[-n:]
    values, index = msae.batch_topk(pre, n)
    assert torch.equal(values, pre.flatten()[index])
    assert (index.diff() > 0).all()
    assert sorted(values.tolist()) == largest
    for select in (msae.topk_in_tiles, msae.topk_at_once):  # the former falls back on the latter
        values, index = select(x, W_enc, b_enc + bias, n, torch.tensor(cut))
        assert torch.equal(values, pre.flatten()[index])
        assert (index.diff() > 0).all()
        assert sorted(values.tolist()) == largest


def test_prefixes_are_lengths_or_fractions_and_a_small_power_favours_short_ones():
    assert msae.prefix_lengths(3072) == (192, 384, 768, 1536, 3072)
    assert msae.prefix_lengths(20, (0.1, 0.5, 1)) == (2, 10, 20)
    assert msae.prefix_lengths(1) == (1,)
    assert msae.sample_prefixes(6, 6) == (1, 2, 3, 4, 5, 6)
    g = torch.Generator().manual_seed(0)
    drawn = np.array(
        [[msae.sample_prefixes(101, 2, a, g) for _ in range(4000)] for a in (0.1, 0.5, 1)]
    )
    assert (drawn[..., 1] == 101).all()
    assert drawn[..., 0].min() >= 1
    assert drawn[..., 0].max() <= 100
    low, middle, uniform = drawn[..., 0].mean(axis=1)
    assert low < middle < uniform == pytest.approx(50.5, abs=2)
    assert (drawn[1, :, 0] == 1).mean() == pytest.approx(
        1 / 100**0.5, abs=0.02
    )  # (1^a - 0^a) / 100^a


# ----------------------------------------------------------------------------------------- settings


def test_schedules():
    cfg = config(
        steps=100,
        lr=1.0,
        warmup_steps=10,
        decay_fraction=0.2,
        k=4,
        k_start=8,
        k_anneal_steps=4,
        level_weights=(1, 1, 2),
        n_latents_start=36,
        prune_window=(0.5, 0.9),
    )
    assert [cfg.lr_at(s) for s in (0, 9, 50, 80, 90, 99)] == pytest.approx(
        [0.1, 1, 1, 1, 0.5, 0.05]
    )
    assert [cfg.k_at(s) for s in (0, 2, 4, 99)] == [8, 6, 4, 4]
    assert [cfg.latents_at(s) for s in (0, 50, 60, 61, 80, 89, 90, 99)] == [
        36,
        36,
        35,
        35,
        33,
        33,
        32,
        32,
    ]
    assert cfg.weights() == (0.25, 0.25, 0.5)
    assert cfg.vanilla().weights() == (1,)
    assert config().weights() == pytest.approx((1 / 3,) * 3)
    sizes = (20, 200, 4000), (4096, 512, 8192), (4096, 8192, 512)
    rates = [msae.TrainConfig(F, 1, batch_size=size, steps=steps).lr for F, size, steps in sizes]
    assert rates == pytest.approx([0.00474, 0.002063, 0.00825], rel=1e-3)


BAD_SETTINGS = {
    "k": [0, -1, 33, 0.001, float("nan"), True, "4", None],
    "n_latents": [0, -5, 2.5, None],
    "prefixes": [
        (),
        (4, 4, 32),
        (8, 4, 32),
        (4, 12),
        (4, 33),
        (0, 32),
        (-1, 32),
        (0.5, 0.2, 1),
        (4.5, 32),
    ],
    "n_prefixes": [0, 33],
    "pareto_power": [0, 1.5],
    "order": ["sorted"],
    "batch_size": [0],
    "steps": [0],
    "level_weights": [(1, 2), (1, -1, 1), (0, 0, 0), ("a", 1, 1)],
    "lr": [0, -1e-3, float("inf")],
    "betas": [(0.9,), (0.9, 1.0)],
    "warmup_steps": [-1],
    "decay_fraction": [-0.1, 1.1],
    "dtype": ["int8"],
    "seed": [-1],
    "k_start": [0, 40],
    "aux_coef": [-1],
    "k_anneal_steps": [-1],
    "dead_after": [0],
    "clip": [0],
    "n_latents_start": [31],
    "prune_window": [(0.5, 0.5), (0.2,), (0.5, 1.2)],
}


@pytest.mark.parametrize(
    "name, value", [(key, each) for key in BAD_SETTINGS for each in BAD_SETTINGS[key]]
)
def test_bad_settings_are_refused_by_name_in_one_line(name, value):
    changes = {"prefixes": None} if name == "n_prefixes" else {}
    with pytest.raises(ValueError, match=rf"\A.*{name}.*\Z"):
        config(**{**changes, name: value})


# ----------------------------------------------------------------------------------------- training


def test_training_learns_and_every_checkpoint_on_disk_is_whole_and_calibrated(tmp_path):
    (train, held_out) = msae.Rows(rows(50_000)).split_off(0.2, 0)
    seen = []
    sae = msae.train(
        train,
        config(steps=400, lr=0.01, n_latents_start=40),
        out=tmp_path,
        save_minutes=0,
        on_log=lambda _: seen.append(msae.MatryoshkaSAE.load(tmp_path)),
        log_every=80,
    )
    figures = msae.evaluate(sae, held_out)
    assert figures["fvu"] < 0.35
    assert figures["dead"] < 0.1
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
    assert figures["prefixes"] == sorted(figures["prefixes"], key=lambda level: -level["fvu"])
    saved = msae.MatryoshkaSAE.load(tmp_path)
    assert same(sae, saved)
    assert saved.metadata == json.loads(json.dumps(sae.metadata))
    for each in (*seen, saved):
        assert msae.evaluate(each, held_out)["l0"] == pytest.approx(4.5, rel=0.04)
        assert each.prefixes == (4, 12, 32)
        assert len(each.W_dec) == 32
        assert each.metadata["k"] == 4.5
    logged = [json.loads(line) for line in (tmp_path / msae.METRICS).read_text().splitlines()]
    assert [line["step"] for line in logged] == list(range(80, 401, 80))


def test_spare_latents_go_one_by_one_the_least_energetic_first():
    trainer = msae.Trainer(config(n_latents_start=48, steps=12, prune_window=(0.5, 0.8)), 16)
    sizes = []
    for batch in torch.from_numpy(rows(64 * 12)).split(64):
        trainer.step(batch)
        sizes.append(len(trainer.energy))
        msae.Trainer(trainer.cfg, 16).load_state_dict(
            trainer.state_dict()
        )  # wherever the run is cut
    assert sizes[:6] == [48] * 6
    assert sizes == sorted(sizes, reverse=True)
    assert 48 > sizes[6] > sizes[-1] == 32
    trainer.energy.copy_(torch.randperm(32))
    W_enc = trainer.sae.W_enc.detach().clone()
    moments = trainer.optimizer.state[trainer.sae.W_dec]
    best = trainer.energy >= 20
    average = moments["exp_avg"].clone()
    trainer.keep_latents(12)
    assert sorted(trainer.energy.tolist()) == list(range(20, 32))
    assert torch.equal(trainer.sae.W_enc, W_enc[:, best])
    assert torch.equal(moments["exp_avg"], average[best])
    big = config(n_latents=3072, prefixes=None, n_latents_start=3840, steps=1000)  # 64 at a time
    assert sorted({big.latents_at(step) for step in range(1000)}) == list(range(3072, 3841, 64))


@pytest.mark.parametrize("order, scale", [("stored", 7.0), ("energy", torch.arange(1.0, 17))])
def test_export_folds_the_scale_and_lays_latents_out_in_prefix_order(order, scale):
    data = torch.from_numpy(rows(640))
    trainer = msae.Trainer(config(order=order), 16, mean=data.mean(dim=0), scale=scale)
    inner = trainer.sae
    assert torch.equal(inner.b_dec.data, data.mean(dim=0) / scale)
    assert torch.equal(inner.W_enc, inner.W_dec.T)
    for x in data.split(64):
        trainer.step(x)
    where = (
        torch.arange(32)
        if order == "stored"
        else trainer.energy.argsort(descending=True, stable=True)
    )
    inner.threshold.fill_(trainer.cut)
    sae = trainer.export()
    length = (inner.W_dec * scale).norm(dim=1)
    expected = (inner.encode(data / scale) * length)[:, where]
    torch.testing.assert_close(sae.encode(data), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sae(data), scale * inner(data / scale), rtol=1e-4, atol=1e-4)
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-6


def test_a_massive_dimension_hides_no_other_and_is_remarked_on(here):
    data = rows(20_000)
    data[:, 3] = 1000 * (data[:, 3] - data[:, 3].mean())
    sae = msae.train(data, config(steps=400))
    figures, friendly = (
        msae.evaluate(sae, each)
        for sae, each in ((sae, data), (msae.train(rows(20_000), config(steps=400)), rows(20_000)))
    )
    variance = data.var(axis=0)
    x = torch.from_numpy(data)
    error = (x - sae(x)).square().mean(dim=0).detach().numpy()
    others = float(np.delete(error, 3).sum() / np.delete(variance, 3).sum())
    assert figures["massive"] == {
        "dims": 1,
        "share": pytest.approx(variance[3] / variance.sum(), rel=1e-4),
        "fvu_of_others": pytest.approx(others, rel=1e-3),
    }
    assert figures["fvu"] < 0.01
    assert others < 0.4
    assert figures["l0"] == pytest.approx(4.5, rel=0.02)
    remark = f"1 of 16 dimensions hold 100% of the variance; FVU of the others {others:.4f}"
    assert figures["remarks"] == [remark]
    assert friendly["remarks"] == []


def test_calibration_keeps_k_per_row():
    data = torch.from_numpy(rows(640))
    sae = msae.MatryoshkaSAE(16, 32)
    for threshold in (
        0.0,
        1e9,
    ):  # the search starts above half the present threshold and falls back
        sae.threshold.fill_(threshold)
        msae.calibrate(sae, data, 4.5)
        assert float((sae.encode(data) > 0).sum()) == pytest.approx(4.5 * 640, abs=1)  # rounding
    sae.threshold.copy_(torch.arange(1, 33))  # which only scales
    msae.calibrate(sae, data, 4.5)
    torch.testing.assert_close(sae.threshold, sae.threshold[0] * torch.arange(1.0, 33))
    assert float((sae.encode(data) > 0).sum()) == pytest.approx(4.5 * 640, abs=1)
    msae.calibrate(sae, data, 32)
    assert not sae.threshold.any()
    sae.metadata["k"] = 32
    (remark,) = msae.evaluate(sae, data)["remarks"]
    assert re.fullmatch(r"only 1\d\.\d positive entries a row for k = 32", remark)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_every_dtype_trains_with_float32_weights(dtype, device):
    torch.set_default_dtype(torch.float64)  # which is no concern of a trainer
    try:
        sae = msae.train(rows(20_000), config(dtype=dtype, steps=200), device=device).float()
    finally:
        torch.set_default_dtype(torch.float32)
    assert msae.evaluate(sae, rows(20_000))["l0"] == pytest.approx(4.5, rel=0.02)


def test_encode_of_a_prefix_is_the_start_of_the_codes():
    sae = msae.MatryoshkaSAE(16, 32)
    x = torch.from_numpy(rows(10)).view(2, 5, 16)
    sae.threshold.fill_(0.5)
    codes = sae.encode(x)
    assert codes.shape == (2, 5, 32)
    assert not ((codes > 0) & (codes <= 0.5)).any()
    torch.testing.assert_close(sae.encode(x.numpy(), prefix=8), codes[..., :8])
    torch.testing.assert_close(
        sae.decode(codes[..., :8]), codes[..., :8] @ sae.W_dec[:8] + sae.b_dec
    )
    for width, prefix, names in ((16, 0, "got 0"), (16, 33, "got 33"), (15, None, "15")):
        with pytest.raises(ValueError, match=names):
            sae.encode(x[..., :width], prefix)
    line = msae.MatryoshkaSAE(1, 4)  # of one dimension, where a transposed copy may be none
    assert line.W_enc.data_ptr() != line.W_dec.data_ptr()


@pytest.mark.parametrize("mean", [5.0, 1000.0])
def test_evaluate_equals_its_formulas_however_large_the_mean(mean):
    data = torch.from_numpy(rows(300, mean=mean))
    sae = msae.MatryoshkaSAE(16, 32, (4, 32))
    sae.threshold.fill_(2.0)
    sae.b_dec.data.copy_(data.mean(dim=0) + 1)
    figures = msae.evaluate(sae, data, batch_size=70)
    total = (data - data.double().mean(dim=0)).pow(2).sum()
    acts = sae.encode(data)
    for p, level in zip((4, 32), figures["prefixes"]):
        error = (data - sae.decode(acts[:, :p])).pow(2).sum()
        assert level["fvu"] == pytest.approx((error / total).item(), rel=1e-4)
        assert level["l0"] == pytest.approx(float((acts[:, :p] > 0).sum() / 300))
        assert level["dead"] == pytest.approx(float((acts[:, :p].amax(dim=0) == 0).float().mean()))
    cosine = sae.W_dec @ sae.W_dec.T - 2 * torch.eye(32)
    assert figures["max_cosine"] == pytest.approx(cosine.max(dim=1).values.mean().item(), rel=1e-5)


# -------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    "cfg, tensors, names",
    [
        ({"architecture": "gated"}, {}, "gated"),
        ({"d_in": 17}, {}, "17"),
        ({"metadata": [32]}, {}, "JumpReLU"),
        ({}, {"b_enc": None}, "b_enc"),
        ({}, {"mask": torch.ones(3)}, "mask"),
        ({}, {"b_enc": torch.full((32,), np.nan)}, "finite"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name(here, cfg, tensors, names):
    tensors = {**safetensors.torch.load_file(f"run/{msae.WEIGHTS}"), **tensors}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    msae.write(f"run/{msae.WEIGHTS}", safetensors.torch.save(tensors))
    msae.write(f"run/{msae.CONFIG}", {**json.loads(Path("run", msae.CONFIG).read_text()), **cfg})
    with pytest.raises(ValueError, match=names):
        msae.MatryoshkaSAE.load("run")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_every_row_is_read_once_an_epoch_in_a_seeded_order(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(msae, "POOL_BYTES", 4000)  # a ninth of the file
    data = (
        np.arange(900 * 2, dtype=np.float64).reshape(-1, 3, 2).astype(dtype)
    )  # (docs, positions, D)
    np.save(tmp_path / "a.npy", data)
    reader = msae.Rows(tmp_path / "a.npy")
    whole = torch.from_numpy(data.reshape(-1, 2).astype("f4"))
    batches = list(itertools.islice(reader.batches(100, seed=1), 18))
    epochs = torch.cat(batches).view(2, 900, 2)
    assert all(torch.equal(epoch.sort(dim=0).values, whole) for epoch in epochs)
    assert not torch.equal(*epochs)
    assert all(
        torch.equal(batch, next(reader.batches(100, 1, start)))
        for start, batch in enumerate(batches)
    )
    assert not torch.equal(batches[0], next(reader.batches(100, seed=2)))
    shares = [next(reader.batches(300, 1, 0, rank, 3)) for rank in range(3)]  # of three processes
    assert torch.equal(torch.cat(shares).sort(dim=0).values, whole)
    rest, aside = (
        {row[0] for row in part.read().tolist()} for part in reader.split_off(0.1, seed=0)
    )
    assert len(rest) == 810
    assert len(aside) == 90
    assert rest.isdisjoint(aside)


def test_shards_are_read_in_name_order_as_one_file_and_tensors_as_they_are(tmp_path):
    data = rows(1000, 4)
    for name, part in zip("bac", np.split(data, [300, 301])):
        np.save(tmp_path / f"{name}.npy", part)
    expected = np.concatenate([data[300:301], data[:300], data[301:]])
    found = torch.cat([part.read() for part in msae.Rows(tmp_path).successive(77)])
    assert torch.equal(found, torch.from_numpy(expected))
    np.save(tmp_path / "d.npy", rows(10, 5))
    (tmp_path / "none").mkdir()
    strange = np.ma.ones((3, 4)), torch.ones(3, 4).to_sparse(), torch.ones(3, 4, device="meta")
    for source, names in (
        (tmp_path, "d.npy .*4 .*got 5"),
        (tmp_path / "none", "none"),
        ([[1.0]], "list"),
        *zip(strange, ("MaskedArray", "the tensor", "the tensor")),
    ):
        with pytest.raises(ValueError, match=names):
            msae.Rows(source)
    data = torch.from_numpy(data).bfloat16()
    assert torch.equal(
        torch.cat([part.read() for part in msae.Rows(data).successive(77)]), data.float()
    )


def massive(n, every=128, length=300):
    """``rows(n)``, of which every 128th is replaced by one 300 times as far out as the median."""
    data = rows(n)
    distance = np.linalg.norm(data - np.median(data, axis=0), axis=1)
    data[::every] = (
        np.median(data, axis=0) + length * np.median(distance) * np.eye(16, dtype="f4")[3]
    )
    return data, np.delete(data, np.s_[::every], axis=0)


def test_massive_rows_are_left_out_wherever_rows_are_read_and_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(msae, "POOL_BYTES", 4 * 16 * 3000)
    data, near = massive(12_800)
    np.save(tmp_path / "a.npy", data)
    with pytest.warns(
        UserWarning, match=r"0.7\d% of 12,800 sampled rows .*10 times .* 299 times: left out"
    ):
        reader = msae.Rows(tmp_path / "a.npy")
    median = np.median(np.linalg.norm(data - np.median(data, axis=0), axis=1))
    assert reader.radius == pytest.approx(
        10 * median, rel=1e-3
    )  # torch takes the lower of the middle two
    assert np.array_equal(reader.read(), near)
    assert len(reader) == 12_800
    assert np.array_equal(torch.cat([part.read() for part in reader.successive(500)]), near)
    epoch = list(itertools.islice(reader.batches(128, seed=1), 100))
    assert {tuple(row) for batch in epoch for row in batch.tolist()} == {*map(tuple, near.tolist())}
    assert all(
        torch.equal(batch, next(reader.batches(128, 1, start))) for start, batch in enumerate(epoch)
    )
    sae = msae.MatryoshkaSAE(16, 8)
    figures = msae.evaluate(sae, data)
    expected = msae.evaluate(sae, near)
    assert msae.evaluate(sae, reader, max_norm=2) == figures  # the limit of the rows stays
    assert (figures["rows"], figures["left_out"], expected["left_out"]) == (12_700, 100, 0)
    assert figures["fvu"] == pytest.approx(expected["fvu"])
    assert figures["dead"] == expected["dead"]


@pytest.mark.parametrize(
    "every, length", [(15, 300), (1, 0), (3, 9)]
)  # too many; all the same; none so far
def test_rows_that_are_no_outliers_are_never_left_out(every, length, recwarn):
    data, _ = massive(3000, every, length)
    reader = msae.Rows(data)
    assert np.array_equal(reader.read(), data)
    said = [str(each.message) for each in recwarn if "median distance" in str(each.message)]
    if every == 15:
        assert len(said) == 1
        assert said[0].endswith("too many to leave out")
    else:
        assert not said


def test_training_on_massive_rows_is_training_on_the_others(here):
    data, near = massive(20_000)
    with pytest.warns(UserWarning, match="left out"):
        sae = msae.train(data, config(steps=300))
    saes = (
        sae,
        msae.train(near, config(steps=300)),
        msae.train(data, config(steps=300, max_norm=1e6)),
    )
    ours, alone, ruined = (msae.evaluate(each, near)["fvu"] for each in saes)
    assert ours < 1.1 * alone
    assert ruined > 1.5 * alone
    np.save("massive.npy", data)
    output = run(*TRAIN, "--acts", "massive.npy", "--out", "new")
    assert "left out" in output
    assert re.search(r"2,0\d\d held-out rows, \d\d too far out to count", output)
    found = json.loads(Path("new", "eval.json").read_text())
    assert found["rows"] + found["left_out"] in range(1900, 2100)
    assert found["left_out"] > 5
    output = run("eval", "new", "--acts", "massive.npy")
    assert re.search(r"19,8\d\d rows, 1\d\d too far out", output)
    assert "row 20,000/20,000" in output


@needs_fork
def test_reading_stays_small_and_never_maps_the_file(tmp_path, monkeypatch):
    def work():
        import resource

        for source in (small, big, np.load(big, mmap_mode="r")):
            list(map(len, itertools.islice(msae.Rows(source).batches(256, 0), 130)))
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)

    small = tmp_path / "small.npy"
    big = tmp_path / "big.npy"
    monkeypatch.setattr(msae, "POOL_BYTES", 2**24)
    monkeypatch.setattr(msae, "SAMPLE", 2**10)
    np.save(small, np.ones((1024, 1024), np.float16))
    np.save(big, np.ones((32 * 1024, 1024), np.float16))  # 64 MiB, and 128 as float32
    forked(work, tmp_path / "output").join()
    before, *peaks = map(float, (tmp_path / "output").read_text().split())
    assert len(peaks) == 2
    assert max(peaks) < before + 48


def test_a_file_that_shrinks_while_it_is_read_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(msae, "POOL_BYTES", 4 * 16 * 100)
    np.save(tmp_path / "a.npy", rows(1000))
    reader = msae.Rows(tmp_path / "a.npy")
    os.truncate(tmp_path / "a.npy", 30_000)
    for batches in ((part.read() for part in reader.successive(100)), reader.batches(100, 0)):
        with pytest.raises(ValueError, match="a.npy must not shrink"):
            list(itertools.islice(batches, 10))


# --------------------------------------------------------------------------------------- never lost

EVERYTHING = dict(
    prefixes=None,
    n_prefixes=4,
    order="energy",
    n_latents_start=40,
    dead_after=640,
    steps=60,
    k_start=8,
    k_anneal_steps=30,
)


def same_run(a, b):
    def read(folder):
        lines = [json.loads(line) for line in (folder / msae.METRICS).read_text().splitlines()]
        return {
            "log": [{**line, "rows_per_second": None} for line in lines],
            "state": torch.load(folder / msae.STATE, weights_only=True)["trainer"],
            **{name: (folder / name).read_bytes() for name in (msae.CONFIG, msae.WEIGHTS)},
        }

    return same(read(Path(a)), read(Path(b)))


def steps_on_disk(folder):
    return torch.load(Path(folder, msae.STATE), weights_only=True)["trainer"]["steps_done"]


@pytest.mark.parametrize("stop", [10, 25, 59, 60])
def test_a_resumed_run_is_bit_identical(tmp_path, stop):
    interrupt = unittest.mock.Mock(side_effect=[None] * (stop - 1) + [KeyboardInterrupt])

    def train(folder, **options):
        msae.train(rows(5000), config(**EVERYTHING), out=tmp_path / folder, log_every=1, **options)

    train("whole")
    with pytest.raises(
        KeyboardInterrupt
    ):  # after the log's line of this step, before its checkpoint
        train("cut", save_minutes=0, on_log=interrupt)
    assert steps_on_disk(tmp_path / "cut") == stop - 1
    train("cut", resume=True)
    assert same_run(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.parametrize(
    "change, changes, out, names",
    [
        (np.copy, dict(k=5.0), "run", "k .*4.5, got 5.0"),
        (np.copy, dict(steps=21), "run", "steps .* got 21"),
        (lambda x: x[1:], {}, "run", "rows"),
        (lambda x: x * 2, {}, "run", "checksum"),
        (np.copy, {}, None, "out"),
    ],
)
def test_resuming_something_else_is_refused_by_name(tmp_path, change, changes, out, names):
    msae.train(rows(1000), config(), out=tmp_path / "run")
    with pytest.raises((ValueError, OSError), match=names):
        msae.train(change(rows(1000)), config(**changes), out=out and tmp_path / out, resume=True)


@pytest.mark.parametrize("fault, names", [("bad row", "NaN"), ("callback", "no room")])
def test_bad_rows_met_late_or_a_callback_that_fails_keep_the_steps_done(
    tmp_path, monkeypatch, fault, names
):
    show = unittest.mock.Mock(
        side_effect=[None] * 6 + [OSError("no room") if fault == "callback" else None]
    )
    bad = rows(64)
    reader = msae.Rows(rows(2000))
    after = msae.Rows(bad)
    if fault == "bad row":
        bad[:] = np.nan
    parts = itertools.islice(reader.batches(64, 0), 7), after.batches(64, 0)
    monkeypatch.setattr(msae.Rows, "batches", lambda *_: itertools.chain(*parts))
    with pytest.raises((ValueError, OSError), match=names):
        msae.train(reader, config(), out=tmp_path, log_every=1, on_log=show)
    assert steps_on_disk(tmp_path) == 7


def test_a_second_ctrl_c_acts_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        msae.train(
            rows(1000),
            config(),
            out=tmp_path,
            log_every=1,
            on_log=lambda figures: list(map(signal.raise_signal, [signal.SIGINT] * 2)),
        )
    assert steps_on_disk(tmp_path) == 0


@needs_fork
def test_killed_at_random_moments_and_resumed_the_weights_are_the_same(here):
    command = [*TRAIN, "--steps", 300, "--pareto", 4]
    moments = random.Random(0)
    kills = 0
    process = None
    run(*command, "--out", "whole")
    while process is None or process.exitcode != 0:
        process = forked([*command, "--out", "cut", "--save-minutes", 0, "--resume"], "output")
        process.join(moments.uniform(0, 0.3) if kills < 8 else None)
        kills += process.is_alive()
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), Path("output").read_text()
    assert kills >= 3
    assert same_run("whole", "cut")


@needs_fork
@pytest.mark.parametrize("ignored", [False, True], ids=["heard", "ignored"])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_saves_and_says_how_to_go_on_unless_the_shell_ignores_it(here, name, ignored):
    def work():
        if ignored:
            signal.signal(number, signal.SIG_IGN)
        typed(*ENDLESS, "--steps", 300 if ignored else 10**6)

    number = getattr(signal, name)
    process = forked(work, "output")
    wait_for_step_50(process, "output")
    for _ in range(1 if name == "SIGINT" else 2):  # that of a wrapper and that of the group
        os.kill(process.pid, number)
    process.join()
    output = Path("output").read_text()
    assert process.exitcode == (0 if ignored else 128 + number)
    assert "Traceback" not in output
    assert ("with --out new --resume\n" in output) != ignored
    assert steps_on_disk("new") == 300 if ignored else steps_on_disk("new") >= 50
    assert msae.MatryoshkaSAE.load("new").prefixes == (2, 4, 8, 16, 32)


@needs_fork
def test_ctrl_c_in_a_shell_saves(here):
    process = subprocess.Popen(
        [sys.executable, HERE / "cli.py", *ENDLESS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline().startswith("2,718 rows of width 16, 282 more held out;")
    assert process.stdout.readline().startswith("train  step 50/")
    process.send_signal(signal.SIGINT)
    assert "--resume" in process.communicate()[0]
    assert process.returncode == 130
    assert steps_on_disk("new") >= 50


@needs_fork
@pytest.mark.parametrize(
    "command, name",
    [(RESUME, msae.STATE), ([*TRAIN, "--out", "new"], msae.STATE), (HARVEST, "rows.npy")],
    ids=["run", "new", "rows"],
)
def test_a_full_disk_is_one_line_and_what_was_there_stays(here, command, name):
    def work():
        import resource

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (4000, 4000)
        )  # a write beyond fails as on a full disk
        typed(*command)

    before = {file: content for file, content in files().items() if file.name != msae.METRICS}
    process = forked(work, "output")
    process.join()
    output = Path("output").read_text()
    assert process.exitcode == 1
    assert "Traceback" not in output
    assert name in " ".join(output.splitlines()[-2:])
    assert before.items() <= files().items()
    if name == msae.STATE:
        run(*command, "--resume")  # when there is room again


def two(*command):
    """Two forks with this command, in the environment that torchrun makes; output0 and output1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    return [forked(command, f"output{rank}", RANK=rank, LOCAL_RANK=rank, **place) for rank in "01"]


@needs_fork
def test_two_processes_stay_identical_and_train_as_well_as_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = rows(50_000)
    cfg = config(**{**EVERYTHING, "steps": 400, "lr": 0.01})
    train = msae.train

    def train_and_save(*arguments, **options):
        sae = train(*arguments, **options)
        sae.save(os.environ["RANK"])
        return sae

    np.save("acts.npy", data[:40_000])
    msae.write("train.json", vars(cfg))
    monkeypatch.setattr(msae, "train", train_and_save)
    for process in two("train", "--acts", "acts.npy", "--config", "train.json", "--out", "run"):
        process.join()
        assert process.exitcode == 0, Path("output0").read_text()
    first, *others = (Path(folder, msae.WEIGHTS).read_bytes() for folder in ("run", "0", "1"))
    assert others == [first, first]
    assert "FVU" in Path("output0").read_text()
    assert not Path("output1").read_text()
    saes = msae.MatryoshkaSAE.load("run"), train(data[:40_000], cfg)
    ours, alone = (msae.evaluate(sae, data[40_000:]) for sae in saes)
    assert ours["l0"] == pytest.approx(4.5, rel=0.03)
    assert ours["fvu"] < 1.2 * alone["fvu"]  # three standard deviations of this ratio over seeds


@needs_fork
@pytest.mark.parametrize(
    "how, code", [("lost process", 1), ("Ctrl-C", 130), ("SIGTERM to one", 143)]
)
def test_a_lost_process_or_a_signal_ends_the_job_with_a_checkpoint_to_resume(here, how, code):
    first, second = two(*ENDLESS)
    wait_for_step_50(first, "output0")
    number = {1: signal.SIGKILL, 130: signal.SIGINT, 143: signal.SIGTERM}[code]
    os.kill(second.pid, number)
    if how == "Ctrl-C":
        os.kill(first.pid, number)
    first.join()
    second.join()
    output = Path("output0").read_text()
    assert first.exitcode == code
    assert second.exitcode == (-signal.SIGKILL if code == 1 else code)
    assert "with --out new --resume\n" in output
    assert "held-out" not in output
    assert steps_on_disk("new") >= 50
    assert how != "lost process" or "Error:" in output


# ------------------------------------------------------------------------------------- toy, probing

HIDDEN = {"active_prob": 0.6, "is_read_out": False, "children": [{"active_prob": 0.5}]}
TREE = {
    "active_prob": 1.0,
    "is_read_out": False,
    "children": [
        {
            "active_prob": 0.5,
            "mutually_exclusive_children": True,
            "children": [{"active_prob": 0.3}, HIDDEN],
        },
        {"active_prob": 0.25, "is_binary": False, "id": "loud"},
    ],
}


def test_tree_samples_have_the_probabilities_of_the_spec():
    tree = msae.FeatureTree(TREE)
    z = tree.sample_features(200_000, torch.Generator().manual_seed(0))
    assert z.shape == (200_000, 4)
    assert tree.pairs == [(0, 1), (0, 2)]
    assert (z > 0).float().mean(dim=0).tolist() == pytest.approx([0.5, 0.15, 0.15, 0.25], abs=0.005)
    parent, first, second, loud = z.T
    assert not ((first > 0) & (second > 0)).any()  # the hidden node excludes its sibling
    assert not (((first > 0) | (second > 0)) & (parent == 0)).any()
    assert set(parent.tolist()) == {0.0, 1.0}
    loud = loud[loud > 0]
    assert loud.min() >= 0.5
    assert loud.max() < 1.5
    assert float(loud.mean()) == pytest.approx(1, abs=0.01)


def test_toy_config_is_the_published_tree():
    tree = msae.FeatureTree(toy_settings()["tree"], seed=3)
    z = tree.sample_features(100_000, torch.Generator().manual_seed(0))
    assert z.mean(dim=0).tolist() == pytest.approx(
        [0.15, 0.03, 0.03, 0.03] * 3 + [0.05] * 8, abs=0.004
    )
    gram = tree.directions @ tree.directions.T
    assert (gram - gram.diag().diag()).abs().max() < 1e-5
    assert float(tree.directions.norm(dim=1).mean()) == pytest.approx(1, abs=0.05)
    assert torch.equal(tree.sample(200, 5), tree.sample(200, 5))


@pytest.mark.parametrize(
    "spec, names",
    [
        ([], "tree is not"),
        ({"active_prob": 1.5}, "active_prob must"),
        ({"children": []}, "d_model"),
        ({"children": 3}, "tree is not"),
        ({"prob": 1}, "'prob'"),
        (
            {"children": [TREE, {**TREE, "children": [{"active_prob": "x"}]}]},
            "children[1] is not a node: chil",
        ),
        ({"mutually_exclusive_children": True, "children": [TREE, TREE]}, "must sum to at most 1"),
    ],
)
def test_a_bad_tree_is_refused_by_field(spec, names):
    with pytest.raises(ValueError, match=re.escape(names)):
        msae.FeatureTree({**TREE, **spec} if spec else spec)


def test_true_dictionary_is_clean_and_absorption_is_seen():
    tree = msae.FeatureTree(TREE)
    sae = msae.MatryoshkaSAE(4, 4)
    unit = tree.directions / tree.directions.norm(dim=1, keepdim=True)
    sae.load_state_dict(
        {
            "W_enc": unit.T,
            "b_enc": torch.zeros(4),
            "W_dec": unit,
            "b_dec": torch.zeros(4),
            "threshold": torch.full((4,), 1e-3),
        }
    )  # above rounding
    figures = msae.toy_figures(sae, tree, seed=0)
    assert figures["clean"] == 4
    assert figures["fvu"] < 1e-6
    assert [pair["rate"] for pair in figures["absorption"]] == [0, 0]
    sae.W_enc.data[:, 0] -= (
        2 * unit[1]
    )  # the parent's latent falls silent where the first child is on
    assert [pair["rate"] for pair in msae.toy_figures(sae, tree, seed=0)["absorption"]] == [1, 0]


def test_matryoshka_recovers_every_toy_feature_and_their_tree_and_vanilla_absorbs(tmp_path):
    tree, configs = cli.toy_setup(0, **toy_settings(steps=1500, k_anneal_steps=750))
    saes = [msae.train(tree.sample(300_000, seed=0), cfg) for cfg in configs.values()]
    ours, vanilla = (msae.toy_figures(sae, tree, seed=1) for sae in saes)
    assert ours["clean"] == 20
    assert ours["fvu"] <= 0.021
    assert 1.05 <= ours["l0"] <= 1.24
    assert vanilla["clean"] < 20
    assert vanilla["fvu"] < ours["fvu"]
    rates = [max(pair["rate"] for pair in figures["absorption"]) for figures in (ours, vanilla)]
    assert rates[0] < 0.05
    assert rates[1] > 0.5
    features = tree.sample_features(10_000, torch.Generator().manual_seed(2))
    # the parents as labels, without the tree
    x = features @ tree.directions
    y = features[:, [0, 4, 8]] > 0
    ours, vanilla = (msae.probe(sae, x, y) for sae in saes)
    assert ours["raw"]["accuracy"] == vanilla["raw"]["accuracy"] == 1.0
    ours, vanilla = (figures["prefixes"][-1] for figures in (ours, vanilla))
    assert ours["n_verdicts"] == vanilla["n_verdicts"] == 3
    assert ours["main_silent"] < 0.01
    assert vanilla["main_silent"] > 0.1
    assert ours["absorption"] < 0.01
    assert vanilla["absorption"] > 0.1
    assert ours["splitting"] == 1
    cli.toy_page(tmp_path / "look.html", saes[0], tree)
    data = page_data(tmp_path / "look.html")
    feature = {latent: number for number, (latent, cosine, parent) in enumerate(data["truth"])}
    found = {}
    for each in data["latents"]:
        parent = each["parent"]
        found[feature[each["latent"]]] = None if parent is None else feature[parent[0]]
    assert (
        found
        == dict(enumerate(tree.parent_of))
        == {n: truth[2] for n, truth in enumerate(data["truth"])}
    )


def test_logistic_regression_is_at_the_minimum_of_its_formula():
    x = torch.from_numpy(rows(400, 6))
    g = torch.Generator().manual_seed(0)
    y = torch.rand(400, 3, generator=g) < 0.3
    y[:, 1] |= x[:, 2] > 5
    w, b = msae.logistic_regression(x, y)
    mean = x.mean(0)
    std = x.std(0)
    w, b = ((w * std).requires_grad_(), (b + w @ mean).requires_grad_())  # in standardised units
    p = torch.sigmoid((x - mean) / std @ w.T + b)
    (-(torch.where(y, p, 1 - p)).log().mean(0).sum() + 1e-3 * w.pow(2).sum()).backward()
    assert w.grad.abs().max() < 1e-3
    assert b.grad.abs().max() < 1e-3


def test_probe_scores_by_hand():
    y = torch.tensor([[1], [1], [1], [0], [0]]).bool()
    seen = torch.tensor([[1, 1, 0, 1, 0]]).bool()
    scores, by_label = msae.probe_scores(seen, y)
    assert scores == pytest.approx({"accuracy": 3 / 5, "f1": 2 / 3})
    assert by_label == pytest.approx([2 / 3])


def is_absorbed(sae, x, latents, direction):
    """Whether one row's label is carried by another latent than its own, word by word."""
    acts = sae.encode(x)
    if any(acts[latent] > 0 for latent in latents):
        return False
    projection = float(x @ direction)
    added = [float(act * (row @ direction)) for act, row in zip(acts, sae.W_dec)]
    best = max(range(len(added)), key=lambda latent: added[latent])
    row = sae.W_dec[best]
    cosine = float(row @ direction / (row.norm() * direction.norm()))
    return projection > 0 and cosine >= 0.025 and added[best] >= 0.4 * projection


def naive_probe(sae, x, y, max_k=3):
    """One label: (k-sparse F1, share of the main latent, its latents, main silent, absorbed)."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order.tensor_split(2)
    acts = sae.encode(x)
    correlations = []
    for latent in range(acts.shape[1]):
        both = np.stack([acts[train, latent].double().numpy(), y[train].double().numpy()])
        correlations.append(np.corrcoef(both)[0, 1])
    ranked = sorted(range(len(correlations)), key=lambda latent: -correlations[latent])
    f1 = []
    for k in range(1, max_k + 1):
        w, b = msae.logistic_regression(acts[train][:, ranked[:k]], y[train, None])
        said = (acts[test][:, ranked[:k]] @ w[0] + b[0] > 0).tolist()
        true = y[test].tolist()
        n_both = sum(a and b for a, b in zip(said, true))
        f1.append(2 * n_both / (sum(said) + sum(true)))
    n_splits = 1
    while n_splits < max_k and f1[n_splits] > f1[n_splits - 1] + 0.03:
        n_splits += 1
    w, b = msae.logistic_regression(x[train], y[train, None])
    positives = [row for row in test.tolist() if y[row] and x[row] @ w[0] + b[0] > 0]
    silent = [row for row in positives if acts[row, ranked[0]] == 0]
    absorbed = [row for row in positives if is_absorbed(sae, x[row], ranked[:n_splits], w[0])]
    share = float((acts[test, ranked[0]] > 0).double().mean())
    rates = (len(silent) / len(positives), len(absorbed) / len(positives))
    return f1, share, n_splits, *rates


@torch.no_grad()
def test_probe_is_the_mean_of_its_words_over_the_labels_that_have_latents():
    # label 0: a latent that is silent with each of 16 children, whose own carry both
    # label 1: two latents, for rows with feature 4 and for those without
    # label 2: none; label 3: so weak that the raw rows hardly tell it
    g = torch.Generator().manual_seed(0)
    on = torch.rand(3000, 5, generator=g) < torch.tensor([0.3, 0.3, 0.2, 0.2, 0.5])
    y = on[:, :4]
    children = y[:, :1] & (torch.randint(40, (3000, 1), generator=g) == torch.arange(16))
    strength = torch.tensor([1, 1, 1, 0.03, 1] + [1] * 16)
    directions = torch.nn.functional.normalize(torch.randn(21, 32, generator=g), dim=1)
    noise = torch.randn(3000, 32, generator=g)
    x = torch.cat([on, children], dim=1) * strength @ directions + 0.01 * noise + 0.1
    sae = msae.MatryoshkaSAE(32, 19, (3, 19))
    rows = torch.cat([directions[[0, 1, 1]], directions[0] + directions[5:]])
    sae.W_dec.copy_(torch.nn.functional.normalize(rows, dim=1))
    dual = torch.linalg.pinv(directions)  # (D, 21): reads each feature alone
    zero, one, four = dual[:, [0, 1, 4]].T
    mains = torch.stack([zero - 2 * dual[:, 5:].sum(dim=1), one - 2 * four, one + four], dim=1)
    sae.W_enc.copy_(torch.cat([mains, dual[:, 5:]], dim=1))
    sae.b_enc.copy_(-0.1 * sae.W_enc.sum(dim=0))
    sae.b_enc[2] -= 1
    sae.threshold.fill_(0.5)
    probed = msae.probe(sae, x, y, max_k=3)
    found = probed["prefixes"]
    assert [level["n_verdicts"] for level in found] == [2, 2]
    assert probed["label_share"] == pytest.approx(y.double().mean().item())
    naive = [naive_probe(sae, x, label) for label in y.T]
    level = found[1]
    for k in range(3):
        expected = np.mean([f1[k] for f1, *_ in naive])
        assert level["probes"][k]["f1"] == pytest.approx(expected, abs=1e-6)
    assert level["main_share"] == pytest.approx(np.mean([share for _, share, *_ in naive]))
    with_latents = np.array([rates for _, _, *rates in naive[:2]])
    named = [level[name] for name in ("splitting", "main_silent", "absorption")]
    assert named == pytest.approx(with_latents.mean(axis=0), abs=1e-6)
    assert level["absorption_by_label"] == pytest.approx([*with_latents[:, 2], None, None])
    assert with_latents == pytest.approx(np.array([[1, 0.4, 0.4], [2, 0.5, 0]]), abs=0.05)
    assert found[0]["absorption"] == 0  # without the children's latents none carries the label


@torch.no_grad()
def test_a_labels_main_latent_is_the_one_that_correlates_most_and_not_a_large_one():
    # latent 1 is ten times as large, always on, and a little larger with the label
    g = torch.Generator().manual_seed(0)
    y = torch.rand(4000, 1, generator=g) < 0.2
    loud = 30 + 10 * torch.randn(4000, 1, generator=g) + 3 * y
    x = torch.cat([y.float(), loud], dim=1)
    sae = msae.MatryoshkaSAE(2, 2)
    sae.W_enc.copy_(torch.eye(2))
    sae.W_dec.copy_(torch.eye(2))
    level = msae.probe(sae, x, y)["prefixes"][0]
    assert level["probes"][0]["f1"] == 1
    assert level["main_share"] == pytest.approx(0.2, abs=0.02)
    acts = sae.encode(x).double()
    expected = np.corrcoef(torch.cat([y, acts], dim=1).numpy().T)[:1, 1:]
    assert msae.label_correlations(sae, x, y).numpy() == pytest.approx(expected)
    sae.W_enc[:, 1] = 0  # a dead latent
    assert msae.label_correlations(sae, x, y)[0, 1] == 0


def test_labels_without_latents_get_no_verdict():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 8, generator=g)
    y = x[:, :2] > 1  # the raw rows tell them, no latent does
    sae = msae.MatryoshkaSAE(8, 4, generator=g)
    sae.W_enc.data[:2] = 0
    found = msae.probe(sae, x, y)
    level = found["prefixes"][-1]
    assert found["raw"]["f1"] > 0.9
    assert level["n_verdicts"] == 0
    assert level["absorption_by_label"] == [None, None]
    assert {level[name] for name in ("splitting", "main_silent", "absorption")} == {None}


def test_another_latent_absorbs_a_label_if_it_carries_two_fifths_of_it():
    # of a row (1, 0) a latent whose decoder row is (c, s) adds c * c along the label, if it is on
    sae = msae.MatryoshkaSAE(2, 1)
    label = torch.tensor([[1.0, 0]])
    for share, is_carried in ((0.39, 0), (0.41, 1)):
        row = torch.tensor([share**0.5, (1 - share) ** 0.5])
        sae.W_dec.data[0] = row
        sae.W_enc.data[:, 0] = row
        n = msae.n_absorbed(sae, label, torch.tensor([[True]]), 1, label)
        assert n.tolist() == [is_carried]


def test_probe_tells_absorption_from_splitting_and_from_a_missing_latent():
    # 40 children, one at a time, of a label whose latent is silent on them. So each child's latent
    # carries the label too, but splits it by 1/80. Without the children's, it is missing there.
    g = torch.Generator().manual_seed(0)
    label = torch.rand(16_000, 1, generator=g) < 0.5
    child = torch.randint(80, (16_000, 1), generator=g)
    x = torch.cat([label, label & (child == torch.arange(40))], dim=1).float()
    sae = msae.MatryoshkaSAE(41, 41)
    sae.W_dec.data.copy_(torch.eye(41))
    sae.W_dec.data[1:, 0] = 1
    sae.W_dec.data /= sae.W_dec.data.norm(dim=1, keepdim=True)
    sae.W_enc.data.copy_(torch.eye(41))
    sae.W_enc.data[1:, 0] = -1
    figures = msae.probe(sae, x, label)["prefixes"][-1]
    assert figures["main_silent"] == figures["absorption"] == pytest.approx(0.5, abs=0.03)
    assert figures["splitting"] == 1
    sae.b_enc.data[1:] = -1
    figures = msae.probe(sae, x, label)["prefixes"][-1]
    assert figures["main_silent"] == pytest.approx(0.5, abs=0.03)
    assert figures["absorption"] == 0


def test_probe_finds_the_latent_of_a_label_and_its_splitting():
    # label 0 is dimension 0, of one latent
    # label 1 is dimension 1, of two latents: where dimension 2 is on, and where it is off
    on = torch.rand(4000, 3, generator=torch.Generator().manual_seed(0)) < 0.4
    sae = msae.MatryoshkaSAE(3, 3, (1, 3))
    sae.W_dec.data.copy_(torch.eye(3)[[0, 1, 1]])
    sae.W_enc.data.copy_(torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 1, -2]]))  # (D, F)
    sae.b_enc.data.copy_(torch.tensor([0.0, -1.0, 0]))
    figures = msae.probe(sae, on.float(), on[:, :2])
    short, level = figures["prefixes"]
    assert figures["raw"] == {"accuracy": 1.0, "f1": 1.0}
    assert (short["latents"], level["latents"]) == (1, 3)
    assert level["main_silent"] == pytest.approx(0.2, abs=0.03)
    assert level["splitting"] == 1.5
    assert level["absorption_by_label"] == [0, 0]  # what is split in two is none
    assert level["probes"][0]["f1"] < 0.95 > short["probes"][0]["f1"]
    assert level["probes"][1]["f1"] == 1.0
    with pytest.raises(ValueError, match="label 1 needs"):
        msae.probe(
            sae, on.float(), on[:, :2] | torch.tensor([False, True])
        )  # every row has label 1


# ---------------------------------------------------------------------------------- language models


def naive_tiny_model(state, ids, n_layers=3, n_heads=16):
    """noanabeshima/tiny_model, one text and one head at a time: logits and all residual streams."""
    logits = []
    streams = []
    for text in ids:
        x = state["embed.weight"][text] + state["pos_embed"][0, : len(text)]
        stream = []
        for i in range(n_layers):
            stream.append(x)
            part = {key.removeprefix(f"torso.{i}."): value for key, value in state.items()}
            out = torch.zeros_like(x)
            for head in torch.arange(x.shape[1]).chunk(n_heads):
                q, k, v = (x @ part[f"attn.{name}.weight"].T[:, head] for name in "QKV")
                scores = (q @ k.T / len(head) ** 0.5).exp().tril()
                out[:, head] = scores / scores.sum(dim=1, keepdim=True) @ v
            x = x + out @ part["attn.O.weight"].T + part["attn.O.bias"]
            hidden = (x @ part["mlp.read_in.weight"].T + part["mlp.read_in.bias"]).clamp_min(0)
            x = x + hidden @ part["mlp.write_out.weight"].T + part["mlp.write_out.bias"]
        streams.append([*stream, x])
        logits.append(x @ state["lm_head.weight"].T + state["lm_head.bias"])
    return torch.stack(logits), [torch.stack(layer) for layer in zip(*streams)]


@torch.no_grad()
def test_tiny_model_equals_its_description(good):
    model = msae.TinyModel.load(good / "tiny.pt")
    ids = torch.randint(10_000, (3, 17))
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    logits, streams = naive_tiny_model(model.state_dict(), ids)
    torch.testing.assert_close(model(ids), logits, rtol=1e-5, atol=1e-5)
    for layer, stream in zip(model.layers, streams, strict=True):
        with msae.activation_hook(layer, "input", stop=True) as captured:
            model(ids)
        torch.testing.assert_close(captured[0], stream, rtol=1e-5, atol=1e-5)


class Canary:  # leaves a file behind if it is unpickled
    def __reduce__(self):
        return Path.touch, (Path("canary"),)


class Wrapped(
    torch.nn.Module
):  # a block in the manner of other libraries: input by name, a tuple out
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.last = torch.nn.Linear(4, 4)
        self.block = torch.nn.Module()
        self.block.forward = lambda hidden_states, scale=1.0: (
            self.linear(hidden_states) * scale,
            "cache",
        )

    def forward(self, input_ids, attention_mask=None):
        return self.last(self.block(hidden_states=torch.eye(4)[input_ids], scale=2.0)[0])


@torch.no_grad()
def test_the_hook_captures_and_replaces_inputs_and_tuple_outputs():
    with (
        pytest.raises(ValueError, match="must be called"),
        msae.activation_hook(torch.nn.Linear(2, 2)),
    ):
        pass
    model = Wrapped().eval()
    ids = torch.tensor([[0, 1, 3]])
    empty = torch.nn.Module()
    with (
        msae.activation_hook(model.block, "input") as inputs,
        msae.activation_hook(model.block) as outputs,
    ):
        plain = model(ids)
    one_hot = torch.eye(4)[ids]
    zero = torch.zeros(1, 3, 4)
    empty.forward = lambda: None
    assert torch.equal(inputs[0], one_hot)
    assert torch.equal(outputs[0], 2 * model.linear(one_hot))
    for at, expected in (
        ("input", model.last(2 * model.linear(zero))),
        ("output", model.last(zero)),
    ):
        with msae.activation_hook(model.block, at, replace=lambda x: x.double() * 0):
            torch.testing.assert_close(model(ids), expected)
        with pytest.raises(ValueError, match=f"{at} .*NoneType"), msae.activation_hook(empty, at):
            empty()
    assert torch.equal(model(ids), plain)  # nothing stays behind


def test_harvest_writes_the_rows_of_the_stream_and_no_wasted_layer(tmp_path, monkeypatch):
    model = tiny()
    ids = torch.randint(3, 50, (40, 17))
    seen = []
    ids[:, 0] = 1
    ids[5:9, 12:] = 2
    with torch.no_grad(), msae.activation_hook(model.torso[1], "input") as captured:
        model(ids)
    expected = captured[0][(ids != 1) & (ids != 2)]
    later_layer = unittest.mock.Mock(side_effect=lambda x: x)
    monkeypatch.setattr(model.torso[2], "forward", later_layer)
    source = model, model.torso[1], ids.split(7)
    n = msae.harvest(
        *source, tmp_path / "a", "input", drop=(1, 2), dtype="float32", on_rows=seen.append
    )
    assert n == len(expected) == 40 * 16 - 20 == seen[-1]
    assert len(seen) == 6
    assert later_layer.call_count == 1  # a first look at the model
    assert len(later_layer.call_args.args[0]) == 1  # with one text
    np.testing.assert_allclose(np.load(tmp_path / "a"), expected, rtol=1e-5, atol=1e-6)
    assert msae.harvest(*source, tmp_path / "b", "input", drop=(1, 2), max_rows=123) == 123
    half = np.load(tmp_path / "b")
    assert half.dtype == np.float16
    assert half.shape == (123, 32)
    assert len(list(tmp_path.iterdir())) == 4
    place = ((ids != 1) & (ids != 2)).nonzero()  # text and position of each row
    texts = torch.stack([place[:, 0], ids[place[:, 0], place[:, 1]]], dim=1)
    for name, m in (("a", n), ("b", 123)):
        found = np.load(tmp_path / f"{name}.ids.npy")
        assert found.dtype == np.int32
        assert np.array_equal(found, texts[:m])
    np.testing.assert_allclose(half, expected[:123], rtol=1e-3, atol=1e-3)


def test_harvest_of_another_model_leaves_padding_out(tmp_path):
    model = Wrapped().eval()
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    batch = {"input_ids": torch.tensor([[0, 1, 2], [3, 0, 0]]), "attention_mask": mask}
    assert msae.harvest(model, model.block, [batch], tmp_path / "a", dtype="float32") == 4
    expected = 2 * model.linear(torch.eye(4)).detach()
    np.testing.assert_allclose(np.load(tmp_path / "a"), expected, rtol=1e-5)
    assert msae.harvest(model, model.block, [batch], tmp_path / "b", drop=(0,)) == 3
    assert mask.sum() == 4


class Counted(torch.nn.Module):
    """A causal model whose rows tell token and position: the sum of all tokens so far in the first
    number, the learned position in the second, or (T, B, D) if ``tokens_first``."""

    def __init__(self, tokens_first=False, takes_positions=True):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.block = torch.nn.Identity()
        self.tokens_first = tokens_first
        if not takes_positions:
            self.forward = lambda input_ids, attention_mask: self.rows(input_ids, attention_mask)

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.rows(input_ids, attention_mask, position_ids)

    def rows(self, input_ids, attention_mask=None, position_ids=None):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        x = torch.stack([(input_ids * mask).cumsum(dim=1), position_ids], dim=2) * self.scale
        return self.block(x.transpose(0, 1) if self.tokens_first else x)


TEXTS = [[3, 4, 5, 6], [7, 8], [9, 10, 11]]
ROWS = [[3, 0], [7, 1], [12, 2], [18, 3], [7, 0], [15, 1], [9, 0], [19, 1], [30, 2]]


def padded(side, **more):
    """The texts as a tokenizer gives them, padded on this side with 0s."""
    batch = {name: torch.zeros(3, 4, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    for row, text in enumerate(TEXTS):
        place = slice(4 - len(text), 4) if side == "left" else slice(len(text))
        batch["input_ids"][row, place] = torch.tensor(text)
        batch["attention_mask"][row, place] = 1
    return {**batch, **more}


@pytest.mark.parametrize("kind", [dict, collections.UserDict], ids=["dict", "UserDict"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_gives_the_rows_of_each_text_alone(tmp_path, side, kind):
    model = Counted().eval()
    batches = [kind(padded(side))]
    msae.harvest(model, model.block, batches, tmp_path / "a.npy", dtype="float32")
    assert np.load(tmp_path / "a.npy").tolist() == ROWS
    source = msae.Stream(model, model.block, batches, n_held_out=6)
    assert source.held_out.read().tolist() == ROWS[:6]


def test_padding_on_the_left_is_refused_where_a_model_would_count_it(tmp_path):
    model = Counted(takes_positions=False).eval()
    msae.harvest(model, model.block, [padded("right")], tmp_path / "a.npy")
    with pytest.raises(ValueError, match="Counted must take position_ids, or .* on the right"):
        msae.harvest(model, model.block, [padded("left")], tmp_path / "b.npy")


def test_keep_says_which_tokens_give_a_row(tmp_path):
    model = Counted().eval()
    keep = torch.tensor([[0, 1, 1, 0], [0, 1, 1, 1], [1, 0, 0, 1]])
    batches = [padded("right", keep=keep)]
    msae.harvest(model, model.block, batches, tmp_path / "a.npy", drop=(8,), dtype="float32")
    assert np.load(tmp_path / "a.npy").tolist() == [[7, 1], [12, 2], [9, 0]]
    batches[0]["keep"] = keep[:, 1:]
    with pytest.raises(ValueError, match=r"one shape, got .*\(1, 3\)"):
        msae.harvest(model, model.block, batches, tmp_path / "b.npy")


def test_rows_of_images_have_no_ids(tmp_path):
    class Vision(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = torch.nn.Linear(3, 2)

        def forward(self, pixel_values):
            return self.patches(pixel_values)

    model = Vision().eval()
    pixels = torch.randn(2, 5, 3)
    batch = {"pixel_values": pixels}
    with pytest.raises(ValueError, match=r'"keep" \(B, T\), got .*pixel_values'):
        msae.harvest(model, model.patches, [batch], tmp_path / "a.npy")
    batch["keep"] = torch.ones(2, 5)
    assert msae.harvest(model, model.patches, [batch], tmp_path / "a.npy", dtype="float32") == 10
    expected = model.patches(pixels).flatten(0, 1).detach()
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), expected, rtol=1e-6)
    assert [file.name for file in tmp_path.iterdir()] == ["a.npy"]


@pytest.mark.parametrize(
    "batch, names",
    [
        ([[1, 2]], "tensor of ids or a dict.*list"),
        ({"input_ids": [[1, 2]]}, "input_ids of a batch must be a tensor.*list"),
        ({"labels": torch.ones(1, 2)}, '"input_ids" or "keep".*labels'),
        (torch.ones(3, dtype=torch.long), r"must be \(B, T\).*\(3,\)"),
    ],
)
def test_what_is_no_batch_is_refused_wherever_batches_are_taken(tmp_path, batch, names):
    model = Counted().eval()
    sae = msae.MatryoshkaSAE(2, 4)
    with pytest.raises(ValueError, match=names):
        msae.harvest(model, model.block, [batch], tmp_path / "a.npy")
    with pytest.raises(ValueError, match=names):
        msae.Stream(model, model.block, [batch])
    with pytest.raises(ValueError, match=names):
        msae.loss_recovered(model, model.block, sae, [batch])


def test_tokens_first_is_refused_even_for_as_many_texts_as_tokens(tmp_path):
    model = Counted(tokens_first=True).eval()
    ids = torch.arange(16).view(4, 4)
    with pytest.raises(ValueError, match=r"\(B, T, D\) for token ids \(1, 4\), got \(4, 1, 2\)"):
        msae.harvest(model, model.block, [ids], tmp_path / "a.npy")


def test_rows_too_large_for_float16_are_counted(tmp_path):
    model = Counted().eval()
    texts = torch.tensor([[70_000, 0, 5], [1, 70_000, 6], [1, 2, 3]])
    names = "5 of 9 rows .*do not fit in float16, 1 of them first tokens; float32 has"
    with pytest.raises(ValueError, match=names):
        msae.harvest(model, model.block, [texts[2:], texts], tmp_path / "a.npy")
    sums_and_positions = [[1, 0], [3, 1], [6, 2]]
    assert np.load(tmp_path / "a.npy").tolist() == sums_and_positions  # what was written stands


@pytest.mark.parametrize(
    "names, options",
    [
        ("be called", {"module": torch.nn.ReLU()}),
        ("at least 1 row", {"drop": range(50)}),
        ("fit in float16", {}),
        ("evaluation mode", {"model": tiny().train()}),
    ],
)
def test_a_harvest_that_fails_leaves_no_file(tmp_path, names, options):
    model = tiny()
    ids = torch.ones(3, 4, 9, dtype=torch.long)
    model.torso[0].mlp["write_out"].bias.data.fill_(1e5 if names == "fit in float16" else 0)
    source = {
        "model": model,
        "module": model.torso[0],
        "batches": ids,
        "out": tmp_path / "a.npy",
        **options,
    }
    with pytest.raises(ValueError, match=names):
        msae.harvest(**source)
    assert not list(tmp_path.iterdir())


def test_a_harvest_that_is_cut_leaves_a_whole_file_of_its_rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(50, (6, 3, 9), generator=torch.Generator().manual_seed(0))
    model = tiny()
    source = {"model": model, "module": model.torso[0], "batches": ids, "drop": (1, 2, 3)}
    n_rows = msae.harvest(**source, out="whole.npy")

    def interrupt(n_done):
        if n_done > 60:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        msae.harvest(**source, out="cut.npy", on_rows=interrupt)
    for end in (".npy", ".ids.npy"):
        whole, cut = (np.load(f"{name}{end}") for name in ("whole", "cut"))
        assert 60 < len(cut) < n_rows
        assert np.array_equal(cut, whole[: len(cut)])
    with pytest.raises(ValueError, match="new file"):
        msae.harvest(**source, out="cut.npy")


def stream(batches=None, **options):
    """A source of TinyModel's stream into layer 1, and its rows, text by text."""
    model = tiny()
    ids = torch.randint(3, 50, (400, 17), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = 1
    ids[5:9, 12:] = 2
    texts = ids.split(7) if batches is None else batches(ids.split(7))
    source = {"at": "input", "drop": (1, 2), "pool": 1, "n_held_out": 600, **options}
    with torch.no_grad(), msae.activation_hook(model.torso[1], "input") as captured:
        model(ids)
    rows_of_text = [
        stream[(text != 1) & (text != 2)].half()
        for stream, text in zip(captured[0], ids, strict=True)
    ]
    return msae.Stream(model, model.torso[1], texts, **source), rows_of_text


def naive_pools(rows_of_text, n_held_out, n_pool, seed, n_epochs, texts_a_batch=7):
    """The rows of whole batches of text, as many as fill a pool, in an order of its own."""
    number = 0
    for _ in range(n_epochs):
        pool = []
        for first in range(0, len(rows_of_text), texts_a_batch):
            texts = range(first, min(first + texts_a_batch, len(rows_of_text)))
            pool += [row for text in texts if text >= n_held_out for row in rows_of_text[text]]
            is_last = texts[-1] == len(rows_of_text) - 1
            if len(pool) >= n_pool or is_last:
                order = np.random.default_rng([seed, number]).permutation(len(pool))
                yield torch.stack(pool)[torch.from_numpy(order)].float()
                number += 1
                pool = []


def test_a_stream_gives_the_rows_of_the_model_pool_by_pool():
    source, rows_of_text = stream()
    n_texts = source.n_aside
    held_out = torch.cat(rows_of_text[:n_texts])
    assert len(held_out) <= 600 < len(held_out) + len(rows_of_text[n_texts])
    assert torch.equal(source.held_out.read().half(), held_out)
    assert source.dtype == torch.float16
    expected = torch.cat(list(naive_pools(rows_of_text, n_texts, 64 * 16, seed=3, n_epochs=3)))
    n_batches = len(expected) // 16
    batches = list(itertools.islice(source.batches(16, seed=3), n_batches))
    assert torch.equal(torch.cat(batches), expected[: 16 * n_batches])
    for start in (1, 63, 64, 65, 100, 400, n_batches - 1):  # the model runs for one pool alone
        source.n_made = 0
        assert torch.equal(next(source.batches(16, seed=3, start=start)), batches[start])
        assert source.n_made <= 64 * 16 + 7 * 16


def test_training_on_a_stream_is_training_on_its_rows():
    source, rows_of_text = stream()
    cfg = config(batch_size=16, steps=150, seed=3)
    trainer = msae.Trainer.on(source, cfg, held_out=source.held_out)
    n_pool = math.ceil(150 * 16 / 3)  # three pools of equal size, as two of 64 batches are too few
    pools = naive_pools(rows_of_text, source.n_aside, n_pool, seed=3, n_epochs=1)
    rows_in_order = torch.cat(list(pools))
    for x in rows_in_order[: 150 * 16].split(16):
        trainer.step(x)
    assert same(msae.train(source, cfg), trainer.export())


@pytest.mark.parametrize("where", ["in a pool", "between pools", "while the model runs"])
@pytest.mark.parametrize("how", ["killed", "Ctrl-C"])
def test_a_run_on_a_stream_that_is_cut_goes_on_bit_for_bit(tmp_path, how, where):
    def cut(number):
        if number >= moment and how == "Ctrl-C":
            signal.raise_signal(signal.SIGINT)
        elif number >= moment:
            raise SystemExit  # nothing is saved any more

    cfg = config(batch_size=16, steps=150)
    whole = msae.train(stream()[0], cfg)
    moment = {"in a pool": 70, "between pools": 50, "while the model runs": 1200}[where]
    source, _ = stream()
    on_log = lambda figures: cut(figures["step"])  # noqa: E731
    if where == "while the model runs":
        source.on_rows = cut
        on_log = print
    options = {"out": tmp_path, "save_minutes": 0}
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        msae.train(source, cfg, on_log=on_log, log_every=1, **options)
    assert 40 < steps_on_disk(tmp_path) < 80
    source, _ = stream()
    assert same(msae.train(source, cfg, resume=True, **options), whole)


def test_a_stream_takes_what_can_be_iterated_anew_and_an_iterator_for_one_epoch(tmp_path):
    expected = next(stream()[0].batches(16))
    for batches in (list, iter, lambda texts: lambda: iter(texts)):
        assert torch.equal(next(stream(batches)[0].batches(16)), expected)
    source, rows_of_text = stream(iter)
    n_rows = sum(map(len, rows_of_text[source.n_aside :]))
    with pytest.raises(ValueError, match=f"start anew .*an end after {n_rows:,} rows"):
        msae.train(source, config(batch_size=16, steps=5000), out=tmp_path)
    assert steps_on_disk(tmp_path) == n_rows // 16


def test_processes_share_the_texts_of_a_stream():
    source, rows_of_text = stream()
    shares = []
    for rank in range(3):
        pools = source._pools(
            msae.Draw(16, 0, 0, rank, 3, torch.device("cpu"), None, lambda: False)
        )
        rows, order = next(pools)
        shares.append(rows[order])
    n_rows = sum(map(len, shares))
    everything = torch.cat(rows_of_text[source.n_aside :])
    for share in shares:
        assert 0.9 < 3 * len(share) / n_rows < 1.1
    # no row is in two shares, or twice in one
    given = collections.Counter(tuple(row) for share in shares for row in share.tolist())
    assert given <= collections.Counter(map(tuple, everything.tolist()))


def test_massive_rows_of_a_stream_are_left_out_and_beyond_float16_kept_in_float32():
    model = torch.nn.Sequential(torch.nn.Embedding(50, 8), torch.nn.Identity()).eval()
    model[0].weight.data[7] = 1e6
    ids = torch.randint(50, (400, 20), generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="left out"):
        source = msae.Stream(model, model[1], ids.split(8), pool=1, n_held_out=600)
    assert source.dtype == torch.float32
    batches = torch.cat(list(source.batches(16, end=100)))
    assert batches.abs().max() < 100


class Twice(torch.nn.Module):
    """Calls its layer twice."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(50, 8)
        self.layer = torch.nn.Linear(8, 8)

    def forward(self, ids):
        return self.layer(self.layer(self.embed(ids)))


class SequenceFirst(Twice):
    def forward(self, ids):
        return self.layer(self.embed(ids.T))


class Pooled(Twice):
    def forward(self, ids):
        return self.layer(self.embed(ids).mean(dim=1))


@pytest.mark.parametrize(
    "model, options, names",
    [
        (Twice().train(), {}, "evaluation mode"),
        (Twice().eval(), {}, "called once in a forward pass, calls, got 2"),
        (Twice().eval(), {"module": torch.nn.ReLU()}, "must be called in this context"),
        (SequenceFirst().eval(), {}, r"\(B, T, D\) for token ids \(1, 9\), got \(9, 1, 8\)"),
        (Pooled().eval(), {}, r"token ids \(1, 9\), got \(1, 8\)"),
        (tiny(), {"module": None, "drop": range(50)}, "must have rows"),
        (tiny(), {"module": None, "batches": ()}, "must hold texts"),
    ],
)
def test_a_stream_that_cannot_be_is_refused_before_any_step(model, options, names):
    source = {"module": getattr(model, "layer", None), "batches": torch.ones(4, 3, 9).long()}
    source |= options
    if source["module"] is None:
        source["module"] = model.torso[0]
    with pytest.raises(ValueError, match=names):
        msae.Stream(model, **source)


def test_train_on_tokens_needs_no_file_of_rows_and_resumes(here):
    command = "train --tokens ids.jsonl --model tiny.pt --layer 2 --latents 32 --k 4".split()
    command += "--batch-size 64 --steps 120".split()
    run(*command, "--out", "whole")
    with unittest.mock.patch.object(msae.Trainer, "step", stopping_at(60)):
        run(*command, "--out", "cut", "--save-minutes", 0, codes=(130,))
    output = run(*command, "--out", "cut", "--resume")
    assert same_run("whole", "cut")
    assert "rows of width 32, 5" in output  # held out, a tenth of 5,450 rows
    found = json.loads(Path("whole/eval.json").read_text())
    assert 500 < found["rows"] <= 545
    metadata = msae.MatryoshkaSAE.load("whole").metadata
    assert metadata["hook_name"] == "torso.2.input"
    assert "one of them" in refused(*command, "--acts", "acts.npy")
    assert "one of them" in refused("train", "--latents", 8)


@pytest.mark.parametrize(
    "line, names",
    [
        ("{", ""),
        ("[1, 2]", ""),
        ('{"tok_ids": 7}', ""),
        ('{"ids": [1]}', ""),
        ('{"tok_ids": "12"}', ""),
        ('{"tok_ids": [1.5, 2]}', "whole"),
        ('{"tok_ids": [1, 50]}', "50.*got 2 with 50"),
        ('{"tok_ids": [-1, 5]}', "got 2 with -1"),
        ('{"tok_ids": []}', ""),
        ('{"tok_ids": [1, 2, 3]}', "2 .*got 3"),
        ('{"tok_ids": [%s1]}' % ("1, " * 256), "256 ids.*got 257"),
        ('{"tok_ids": [1, 99999999999999999999]}', ""),
        ('{"tok_ids": [[1], [2]]}', ""),
        ("[" * 10**5, ""),
        ("\u00ff", ""),
    ],
    ids=range(15),
)
def test_a_bad_line_of_tokens_is_named_by_its_number(tmp_path, line, names):
    good = '{"tok_ids": [1, 2]}\n'
    (tmp_path / "ids.jsonl").write_bytes(f"{good}{good}{line}\n{good}".encode("latin-1"))
    with pytest.raises(ValueError, match=f"line 3.*{names}"):
        list(cli.read_tokens(tmp_path / "ids.jsonl", n_vocab=50))


@torch.no_grad()
def test_loss_recovered_by_hand():
    model = tiny()
    ids = torch.randint(2, 50, (6, 11))
    sae = msae.MatryoshkaSAE(32, 64, (16, 64))
    ids[:, 0] = 1
    figures = msae.loss_recovered(model, model.torso[1], sae, ids.split(4), "input", (1,))

    def loss(change):
        x = model.torso[0](model.embed(ids) + model.pos_embed[:, :11])
        x = torch.cat([x[:, :1], change(x[:, 1:])], dim=1)
        log_p = model.lm_head(model.torso[2](model.torso[1](x))).log_softmax(-1)
        return -np.mean([float(log_p[b, t, ids[b, t + 1]]) for b in range(6) for t in range(10)])

    clean = loss(lambda x: x)
    zeroed = loss(lambda x: 0 * x)
    short = loss(lambda x: sae.decode(sae.encode(x, 16)))
    full = loss(sae)
    found = [
        figures["clean"],
        figures["zeroed"],
        *(level["spliced"] for level in figures["prefixes"]),
    ]
    assert found == pytest.approx([clean, zeroed, short, full], rel=1e-5)
    assert figures["tokens"] == figures["rows"] == 60
    assert figures["uncovered"] == 0
    assert figures["all_coded"]["spliced"] == pytest.approx(full, rel=1e-5)
    assert figures["prefixes"][0]["recovered"] == pytest.approx(
        (zeroed - short) / (zeroed - clean), rel=1e-3
    )


@torch.no_grad()
def test_loss_recovered_leaves_rows_that_are_not_covered_as_they_are():
    model = tiny()
    ids = torch.randint(2, 50, (6, 11))
    sae = msae.MatryoshkaSAE(32, 64)
    with msae.activation_hook(model.torso[1]) as captured:
        clean = model(ids)
    rows = captured[0]
    distances = (rows - 0.1).norm(dim=2)
    sae.centre.fill_(0.1)
    sae.radius.fill_(distances.median())
    is_covered = distances <= distances.median()
    assert torch.equal(sae.covers(rows), is_covered)
    figures = msae.loss_recovered(model, model.torso[1], sae, ids.split(4))
    assert figures["uncovered"] == int((~is_covered).sum()) > 0

    def loss(stream):
        logits = model.lm_head(model.torso[2](stream))[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    spliced = torch.where(is_covered[:, :, None], sae(rows), rows)
    assert figures["clean"] == pytest.approx(loss(rows), rel=1e-5)
    assert figures["prefixes"][-1]["spliced"] == pytest.approx(loss(spliced), rel=1e-5)
    assert figures["all_coded"]["spliced"] == pytest.approx(loss(sae(rows)), rel=1e-5)
    with msae.activation_hook(model.torso[1], replace=sae.splice):
        assert not torch.allclose(model(ids), clean)


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_recovered_of_padded_texts_is_that_of_each_text_alone(side):
    model = Counted().eval()
    logits = torch.nn.Linear(2, 12)
    sae = msae.MatryoshkaSAE(2, 4)
    body = model.forward
    model.forward = lambda input_ids, attention_mask=None, position_ids=None: logits(
        body(input_ids, attention_mask, position_ids) / 10
    )
    total = n_tokens = 0
    for text in TEXTS:
        alone = msae.loss_recovered(model, model.block, sae, [torch.tensor([text])])
        total += alone["clean"] * alone["tokens"]
        n_tokens += alone["tokens"]
    figures = msae.loss_recovered(model, model.block, sae, [padded(side)], drop=(0,))
    assert figures["tokens"] == n_tokens == 6
    assert figures["clean"] == pytest.approx(total / 6, rel=1e-5)


def padded_rows():
    """(docs, positions, D) of which three quarters are padding, the mask, and the rows alone."""
    rows = torch.randn(300, 20, 8, generator=torch.Generator().manual_seed(0)).numpy()
    lengths = np.random.default_rng(0).integers(1, 10, 300)
    mask = np.arange(20) < lengths[:, None]
    rows[~mask] = 0
    return rows, mask, rows[mask]


def test_a_mask_takes_its_rows_and_no_others(tmp_path):
    rows, mask, alone = padded_rows()
    np.save(tmp_path / "mask.npy", mask)
    with pytest.warns(
        UserWarning, match=r"7\d.\d\d% of 6,000 sampled rows are the same, as padding"
    ):
        msae.Rows(rows)
    masked = msae.Rows(rows, mask=tmp_path / "mask.npy")
    assert len(masked) == masked.n_rows == len(alone)
    assert np.array_equal(masked.read(), alone)
    assert np.array_equal(masked.row_numbers(), np.flatnonzero(mask))
    train, held_out = masked.split_off(0.2)
    numbers = np.concatenate([train.row_numbers(), held_out.row_numbers()])
    assert np.array_equal(np.sort(numbers), np.flatnonzero(mask))
    n_batches = len(train) // 16
    epoch = torch.cat(list(train.batches(16, end=n_batches)))
    wanted = {row.tobytes() for row in train.read().numpy()}
    found = [row.tobytes() for row in epoch.numpy()]
    assert set(found) <= wanted
    assert len(set(found)) == len(found) == 16 * n_batches > len(wanted) - 16


def test_figures_of_masked_rows_are_those_of_the_rows_alone():
    rows, mask, alone = padded_rows()
    sae = msae.MatryoshkaSAE(8, 32)
    masked = msae.evaluate(sae, msae.Rows(rows, mask=torch.from_numpy(mask)))
    expected = msae.evaluate(sae, alone)
    assert masked["rows"] == expected["rows"] == len(alone)
    assert masked["fvu"] == pytest.approx(expected["fvu"], rel=1e-6)
    assert masked["l0"] == expected["l0"]
    assert msae.evaluate(sae, msae.Rows(rows, mask=np.ones(6000, int)))["rows"] == 6000


@pytest.mark.parametrize(
    "mask, names",
    [
        (np.ones(5999, bool), r"6000 values, one a row, got bool \(5999,\)"),
        (np.ones(6000), "booleans, or 0 and 1, got float64"),
        (np.full(6000, 7), "booleans, or 0 and 1, got .7"),
        (np.zeros((300, 20), bool), "take a row, got none"),
    ],
)
def test_a_mask_that_does_not_fit_is_refused(mask, names):
    with pytest.raises(ValueError, match=names):
        msae.Rows(padded_rows()[0], mask=mask)


def test_train_eval_and_look_take_a_mask(here):
    rows, mask, alone = padded_rows()
    np.save("acts.npy", rows)
    np.save("mask.npy", mask)
    np.save("alone.npy", alone)
    np.save("ids.npy", np.arange(6000).reshape(300, 20))
    np.save("labels.npy", np.arange(6000) % 2)
    quick = ["--latents", 16, "--k", 3, "--steps", 5, "--batch-size", 64]
    run("train", "--acts", "acts.npy", "--mask", "mask.npy", *quick, "--out", "masked")
    output = run(
        "eval", "masked", "--acts", "acts.npy", "--mask", "mask.npy", "--labels", "labels.npy"
    )
    run("eval", "masked", "--acts", "alone.npy")
    assert "padding" not in output
    masked, expected = (
        json.loads(Path(f"masked/eval-{n}.json").read_text()) for n in ("acts", "alone")
    )
    assert masked["fvu"] == pytest.approx(expected["fvu"], rel=1e-6)
    assert masked["labels"]["rows"] == len(alone)
    run("look", "masked", "--ids", "ids.npy")  # on the rows of training, with their mask
    shown = page_data("masked/look.html")
    assert shown["tokens"] == [str(number) for number in np.flatnonzero(mask)]
    assert "mask.npy" not in cli.files_to_push(Path("masked"))["cfg.json"].decode()


def test_a_checkpoint_knows_which_rows_it_covers(tmp_path):
    rows = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0))
    rows[::200] *= 300
    cfg = msae.TrainConfig(n_latents=16, k=3, steps=2, batch_size=64)
    with pytest.warns(UserWarning, match="left out"):
        source = msae.Rows(rows)
    sae = msae.train(source, cfg, out=tmp_path / "run")
    assert torch.equal(sae.covers(rows), source.is_near(rows))
    assert 0 < int((~sae.covers(rows)).sum()) <= 20
    loaded = msae.MatryoshkaSAE.load(tmp_path / "run")
    assert torch.equal(loaded.centre, sae.centre)
    assert torch.equal(loaded.splice(rows), sae.splice(rows))
    assert torch.equal(sae.splice(rows)[~sae.covers(rows)], rows[~sae.covers(rows)])
    (tmp_path / "run" / msae.LIMIT).unlink()  # as of SAELens
    assert msae.MatryoshkaSAE.load(tmp_path / "run").covers(1e9 * rows).all()


# ------------------------------------------------------------------------------------- command line


def test_toy_command_writes_figures_and_picture(here):
    msae.write("toy.json", toy_settings(steps=200, k_anneal_steps=100))
    output = run(*TOY, "--seed", 3, "--seeds", 2)
    assert all(word in output for word in ("matryoshka", "vanilla", "mean"))
    report = json.loads(Path("toys/toy.json").read_text())["seeds"]
    assert [each["seed"] for each in report] == [3, 4]
    assert report[0]["matryoshka"]["features"] == 20
    drawn = [line for line in output.splitlines() if re.match("[ 1][0-9] [#.]{20} ", line)]
    assert len(drawn) == 20
    assert drawn[2].startswith(" 2 #.#....")
    assert drawn[19].count("#") >= 1
    picture = "".join(xml.etree.ElementTree.parse("toys/toy.svg").getroot().itertext())
    assert all(words in picture for words in ("Vanilla", "##..", "absorbed"))
    assert len(page_data("toys/look.html")["truth"]) == 20


def test_options_override_the_config_and_a_new_run_takes_a_new_folder(here):
    settings = (
        b'\xef\xbb\xbf{"n_latents_start": 32,\r\n"n_prefixes": 4, "steps": 99, "lr": 0.01}\r\n'
    )
    Path("config.json").write_bytes(settings)  # as Windows writes
    command = [
        *TRAIN,
        "--config",
        "config.json",
        "--prefixes",
        "0.25,0.5,1",
        "--spare",
        "16",
        "--seed",
        "1",
    ]
    for folder in ("runs/acts-32", "runs/acts-32-2"):
        output = run(*command)
        assert folder in output
        assert "FVU" in output
        sae = msae.MatryoshkaSAE.load(folder)
        expected = {"steps": 80, "lr": 0.01, "seed": 1, "n_latents_start": 48, "n_prefixes": None}
        assert sae.prefixes == (8, 16, 32)
        assert expected.items() <= sae.metadata["training"].items()
        assert ABOUT.items() <= sae.metadata.items()
        assert "docs" not in sae.metadata


def test_baseline_trains_the_vanilla_twin_and_resume_finds_the_newest_folder(here):
    for more in (["--resume"], ["--baseline"], ["--baseline", "--resume"]):
        output = run(*TRAIN, *more)
        assert ("nothing is saved yet" in output) == (more == ["--resume"])
    assert "acts-32-2/vanilla was finished before" in output
    assert set(os.listdir("runs")) == {"acts-32", "acts-32-2"}
    assert re.search(r"vanilla +32 +0\.\d{4} +\d\.\d\d +0\.\d{3} +\d+\.\d\d%", output)
    ours, vanilla = (
        msae.MatryoshkaSAE.load(Path("runs/acts-32-2", name)) for name in ("", "vanilla")
    )
    assert vanilla.prefixes == (32,)
    assert ours.prefixes == (2, 4, 8, 16, 32)
    assert {**ours.metadata["training"], "prefixes": [32]} == vanilla.metadata["training"]


@pytest.mark.parametrize(
    "change, names",
    [
        (lambda x: x.astype(int), "int64"),
        (lambda x: x.ravel(), "(48000,)"),
        (lambda x: x[:0], "(0, 16)"),
        (lambda x: np.where(x == x[1234, 3], np.nan, x), "row 1234"),
        (lambda x: np.array([{"a": 1}]), "bad.npy"),
        (lambda x: np.where(x == x[7, 3], np.inf, x), "row 7"),
        (lambda x: x[:60], "batch_size"),
        (lambda x: x * 0, "differ"),
        (lambda x: x * 1e-20, "distance"),
        (lambda x: x * 1e20, "distance"),
        (lambda x: x * 0 + 5, "distance"),
        (lambda x: x + 1e8, "distance"),
        (lambda x: b"", "bad.npy"),
        (lambda x: b"activations", "bad.npy"),
        (lambda x: Path("acts.npy").read_bytes()[:-100], "bad.npy"),
    ],
)
def test_bad_rows_get_one_line_and_leave_no_trace(here, change, names):
    content = change(rows(3000))
    Path("bad.npy").write_bytes(content) if isinstance(content, bytes) else np.save(
        "bad.npy", content
    )
    before = files()
    assert names in refused(*TRAIN, "--acts", "bad.npy")
    assert files() == before


BAD_COMMANDS = {  # beside the good options; and what the message must name
    "train --acts no.npy": "no.npy",
    "train --out run": "run",
    "train --out rubbish --resume": "rubbish",
    "train --prefixes 8,x": "--prefixes",
    "train --device none": "none",
    "train --device cuda:9": "cuda:9",
    "train --config new.json": "'learning_rate'",
    "eval --acts tiny.pt": "tiny.pt",
    "train --config list.json": "list.json",
    "train --latents many": "many",
    "eval --labels 2.npy": "0 and 1",
    "harvest --model no.pt": "no.pt is not there",
    "harvest --model canary.pt": "canary.pt",
    "harvest --tokens no.jsonl": "no.jsonl",
    "harvest --tokens bad.jsonl": "line 301",
    "harvest --layer 4": "4 must be at most 3",
    "harvest --max-rows 0": "--max-rows",
    "harvest --out acts.npy": "acts.npy exists",
    "eval --labels ids.npy": "(300, 20)",
    "eval --labels acts.npy": "float16",
    "eval --tokens ids.jsonl --model tiny.pt --layer 2": "torso.1.input",
    "look --acts tiny.pt": "tiny.pt",
    "look --ids ids.npy": "(3000, 2)",
    "look --ids acts.npy": "float16",
    "look --vocab list.json": "list.json",
    "look --vocab canary.pt": "canary.pt",
    "look --ids no": "no",
    "look --out ids.npy": "--out",
    "look --acts wide.npy": "of width 16, wide.npy has 4",
    "toy --config list.json": "list.json",
    f"toy --seed {10**30}": "--seed",
    "bench --k 9": "got 9",
}


@pytest.mark.parametrize("command", BAD_COMMANDS)
def test_a_bad_command_gets_one_line_and_leaves_no_trace(here, monkeypatch, command):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    np.save("2.npy", np.full((3000, 2), 2))
    np.save("wide.npy", rows(3000, 4))
    torch.save(Canary(), "canary.pt")
    msae.write("list.json", [1])
    msae.write("new.json", {"learning_rate": 1})
    msae.write(
        "bad.jsonl",
        Path("ids.jsonl").read_bytes() + json.dumps({"tok_ids": [10_000] * 20}).encode(),
    )
    shutil.copytree("run", "rubbish")
    msae.write(f"rubbish/{msae.STATE}", b"?")
    before = files()
    (name, *words) = command.split()
    good = {
        "train": TRAIN,
        "harvest": HARVEST,
        "eval": EVAL,
        "toy": TOY,
        "bench": BENCH,
        "look": LOOK,
    }[name]
    assert BAD_COMMANDS[command] in refused(*good, *words)
    assert files() == before


def test_harvest_train_and_eval_from_tokens_to_a_verdict(here):
    ids = np.load("ids.npy")
    n = 300 * 19 - 50 * 5
    for name in ("ids.npy", "ids.jsonl"):
        assert np.array_equal(
            np.concatenate([part.reshape(-1, 20) for part in cli.read_tokens(name)]), ids
        )
    with unittest.mock.patch("shutil.disk_usage", return_value=unittest.mock.Mock(free=1000)):
        assert "0.0 GB" in refused(*HARVEST)
    assert f"{n:,} rows" in run(*HARVEST)
    assert np.load("rows.npy").shape == (n, 32)
    assert np.load("rows.npy").dtype == np.float16
    about = {"model_name": "tiny.pt", "hook_name": "torso.2.input", "dataset": "ids.jsonl"}
    assert json.loads(Path("rows.npy.json").read_text()) == about
    run(*TRAIN, "--acts", "rows.npy", "--baseline", "--out", "new")
    np.save("labels.npy", ids[(ids != msae.BEGIN) & (ids != msae.PAD)] % 3 * 10)
    output = run(
        "eval",
        "new",
        "new/vanilla",
        "--acts",
        "rows.npy",
        "--labels",
        "labels.npy",
        "--tokens",
        "ids.jsonl",
        "--model",
        "tiny.pt",
        "--layer",
        2,
        "--max-tokens",
        1000,
    )
    assert all(word in output for word in ("recovered", "absorbed", "k=5"))
    for folder, levels in (("new", 5), ("new/vanilla", 1)):
        assert (
            json.loads(Path(folder, "eval.json").read_text())["rows"] < n / 2
        )  # of training, left alone
        found = json.loads(Path(folder, "eval-rows.json").read_text())
        expected = msae.evaluate(msae.MatryoshkaSAE.load(folder), "rows.npy")
        assert {key: found[key] for key in expected} == expected
        assert found["rows"] == n
        assert all(
            len(part["prefixes"]) == levels for part in (found, found["loss"], found["labels"])
        )
        assert found["labels"]["labels"] == ["0", "10", "20"]
        assert found["loss"]["clean"] < 20


def test_one_dimension_and_one_row_are_said_in_words(here):
    np.save("line.npy", rows(3000, 1))
    output = run(*TRAIN, "--acts", "line.npy", "--out", "line")
    assert "hold" not in output
    assert json.loads(Path("line/eval.json").read_text())["massive"]["dims"] == 1
    for name, bad in (("one", rows(1)), ("same", rows(9) * 0 + 5)):
        np.save(f"{name}.npy", bad)
        assert "rows must differ" in refused("eval", "run", "--acts", f"{name}.npy")


@needs_fork
@pytest.mark.parametrize(
    "command, file",
    [
        (EVAL, "run/eval-acts.json"),
        ([*TRAIN, "--out", "new"], "new/eval.json"),
        (HARVEST, "rows.npy"),
        (TOY, "toys/look.html"),
        (LOOK, "page.html"),
    ],
    ids=["eval", "train", "harvest", "toy", "look"],
)
@pytest.mark.parametrize("stream", ["closed", "full", "ascii"])
def test_figures_are_written_whatever_becomes_of_the_terminal(here, stream, command, file):
    def work():
        if stream == "ascii":
            sys.stdout.reconfigure(encoding="ascii")
        else:
            reading, writing = os.pipe()
            os.close(reading)
            os.dup2(writing if stream == "closed" else os.open("/dev/full", os.O_WRONLY), 1)
            kept.extend([sys.stdout, sys.stderr])  # they would close what they stand for
            sys.stdout = os.fdopen(1, "w")
            sys.stderr = os.fdopen(2, "w")
        typed(*command)

    kept = []
    Path("run/eval-acts.json").unlink()
    process = forked(work, "output")
    process.join()
    assert process.exitcode == (stream != "ascii")
    assert "Traceback" not in Path("output").read_text()
    assert Path(file).stat().st_size > 1000


@pytest.mark.parametrize(
    "names", [["0", "1", "2"], ["4", "5"], ["1"]], ids=["columns", "numbers", "0 or 1"]
)
def test_the_labels_of_some_of_many_rows_stay_beside_them(here, names):
    data = np.random.default_rng(0).normal(size=(30_000, 3))
    np.save("acts.npy", data)
    labels = {3: data > 0.5, 2: (data[:, 0] > 0.5) + 4, 1: data[:, :1] > 0.5}[len(names)].astype(
        int
    )
    labels[:3] = 9 if len(names) == 2 else 0  # of which there are too few
    np.save("labels.npy", labels)
    msae.MatryoshkaSAE(3, 8).save("run")
    assert ("without: 9\n" in run(*EVAL, "--labels", "labels.npy", "--out", "one.json")) == (
        len(names) == 2
    )
    found = json.loads(Path("one.json").read_text())["labels"]
    assert found["labels"] == names
    assert 19_000 < found["rows"] <= 20_000
    assert found["raw"]["f1"] > 0.98


def test_eval_gives_no_verdict_on_labels_without_latents(here):
    data = np.random.default_rng(0).normal(size=(3000, 3)).astype(np.float32)
    np.save("acts.npy", data)
    np.save("labels.npy", data > 1)
    sae = msae.MatryoshkaSAE(3, 1)
    sae.W_enc.data[:, 0] = torch.tensor([1.0, 0, 0])  # reads label 0 alone
    sae.save("one")
    sae.W_enc.data[:] = 0
    sae.save("blind")
    output = run(*"eval one blind --acts acts.npy --labels labels.npy".split())
    verdict = "of 3 labels have latents: no verdict on absorption of the others"
    assert f"one: 1 {verdict}\nblind: 0 {verdict}\n" in output
    assert f"(the label: {(data > 1).mean():.1%})" in output
    assert re.search(r"blind +1 +0.000 +0.0% +0 +- +- +-", output)
    level = json.loads(Path("blind/eval-acts.json").read_text())["labels"]["prefixes"][0]
    assert level["absorption"] is None


def test_every_help_shows_an_example_and_bench_the_step_beside_the_product():
    for command in ("toy", "train", "harvest", "eval", "look", "push", "bench"):
        assert f"python cli.py {command}" in run(command, "--help")
        assert command in run("--help")
    assert ".." not in run("--help").split("Commands:")[1]
    assert msae.__version__ in run("--version")
    assert re.search(
        "(?s)8 . 2 spare latents.*encoder product alone.* x the product.*rows per", run(*BENCH)
    )


# --------------------------------------------------------------------------------------------- look


class Page(html.parser.HTMLParser):
    """Checks that every element is closed in order, and keeps the text of each script."""

    stack = ()
    scripts = ()

    def handle_starttag(self, tag, attributes):
        self.stack += (tag,) * (tag not in ("meta", "input"))

    def handle_endtag(self, tag):
        *self.stack, last = self.stack
        assert last == tag
        self.stack = tuple(self.stack)

    def handle_data(self, data):
        self.scripts += (data,) * (self.stack[-1:] == ("script",))


def page_data(path):
    page = Page()
    page.feed(Path(path).read_text(encoding="utf-8"))
    data, script = page.scripts
    assert not page.stack
    assert "<" not in data
    assert len(script.splitlines()) < 360
    return json.loads(data)


def naive_figures(codes, ends, cosine, i):
    a = codes[:, i]
    fits = {None: 0.6}
    for p in range(max([0, *(end for end in ends if end <= i)])):
        if codes[a > 0, p].any():
            cos = codes[:, p] @ a / np.linalg.norm(codes[a > 0, p]) / np.linalg.norm(a)
            fits[p] = cos * min(1, a.max() / codes[:, p].max())
    best = max(fits, key=fits.get)
    bins = np.minimum(15, a * 16 // (a.max() or 1))
    nearest = sorted(set(range(len(cosine))) - {i}, key=lambda j: -cosine[i, j])[:5]
    return {
        "latent": i,
        "share": np.mean(a > 0),
        "max": a.max(),
        "mean": a.sum() / max(1, np.sum(a > 0)),
        "histogram": [np.sum((a > 0) & (bins == bin)) for bin in range(16)],
        "largest": sorted(a.nonzero()[0], key=lambda row: -a[row])[:10],
        "nearest": pytest.approx(np.array([(j, cosine[i, j]) for j in nearest]), abs=1e-6),
        "parent": best and pytest.approx((best, fits[best])),
    }


def test_the_figures_of_latents_and_their_tree_equal_a_naive_loop():
    g = np.random.default_rng(0)
    sae = msae.MatryoshkaSAE(12, 12, (3, 8, 12))
    codes = g.random((600, 12)) * (g.random((600, 12)) < 0.2)
    parents = {}
    codes[:, 11] = 0  # never on
    for parent, child, size in (
        (1, 5, 1.0),
        (5, 9, 0.9),
        (0, 6, 0.3),
    ):  # the last one too small for a child
        codes[:, child] = np.where(g.random(600) < 0.4, size * codes[:, parent], 0)
    codes[70] = 1e4
    sae.W_enc.data = torch.eye(12)
    codes = codes.astype(np.float32).astype(float)
    with pytest.warns(UserWarning, match="left out"):
        sparse = msae.sparse_codes(sae, codes)
    assert sparse.is_far.nonzero()[0].tolist() == [70]
    codes[70] = 0
    entries = [(row, n, codes[row, n]) for row, n in zip(*codes.nonzero())]
    row_of_entry = np.arange(600).repeat(np.diff(sparse.starts))
    assert entries == [*zip(row_of_entry, sparse.latent, sparse.value)]
    cosine = (
        torch.nn.functional.cosine_similarity(sae.W_dec[:, None], sae.W_dec, dim=2).detach().numpy()
    )
    for figures, at, acts in msae.latent_figures(sae, sparse, [0, *range(3, 12)]):
        a = codes[:, figures["latent"]]
        fifths = figures.pop("fifths")
        assert np.array_equal(at, a.nonzero()[0])
        assert np.array_equal(acts, a[a > 0])
        borders = np.linspace(a[a > 0].min(initial=a.max()), a.max(), 6)
        fifth_of = [int(np.searchsorted(borders[1:5], a[row], side="right")) for row in fifths]
        filled = np.histogram(a[a > 0], borders)[0] if len(at) > 1 else [len(at)]
        assert fifth_of == [n for n in (4, 3, 2, 1, 0) if len(at) and filled[n]]
        assert figures == naive_figures(codes, sae.prefixes, cosine, figures["latent"])
        parents[figures["latent"]] = figures["parent"] and figures["parent"][0]
    assert [parents[i] for i in (0, 5, 6, 9, 11)] == [None, 1, None, 5, None]


def test_of_each_fifth_of_a_latents_range_that_holds_rows_there_is_one_the_largest_first():
    sae = msae.MatryoshkaSAE(1, 1, (1,))
    sae.W_enc.data = torch.ones(1, 1)
    # from 2 to 12: fifths end at 4, 6, 8, 10; none is from 6 to 8
    acts = torch.tensor([[0.0], [12], [3.5], [2], [4.5], [9], [5.9], [0], [9.9], [3]])
    by_fifth = [{1}, {5, 8}, {4, 6}, {2, 3, 9}]
    drawn = []
    for seed in range(40):
        codes = msae.sparse_codes(sae, acts)
        ((figures, _, _),) = msae.latent_figures(sae, codes, [0], seed)
        drawn.append(figures["fifths"])
    assert [set(rows) for rows in zip(*drawn)] == by_fifth
    ((figures, _, _),) = msae.latent_figures(sae, msae.sparse_codes(sae, torch.ones(3, 1)), [0])
    assert len(figures["fifths"]) == 1  # all are as large


def test_the_page_shows_tokens_in_their_text_as_text(here):
    run("look", "run", "--vocab", "vocab.json")  # the rows of training, the ids beside them
    data = page_data("run/look.html")
    x = torch.from_numpy(np.load("acts.npy")).float()
    tokens = [
        "the",
        " Cat",
        VOCABULARY[2],
        "⏎",
        VOCABULARY[4],
        "\\u0000",
        "6",
    ]  # the last by its number
    assert data["tokens"] == [tokens[id] for id in np.load("acts.ids.npy")[:, 1]]
    sample = page_data(HERE / "look.html")
    assert sample.keys() == data.keys()
    assert sample["latents"][0].keys() == data["latents"][0].keys()
    codes = msae.MatryoshkaSAE.load("run").encode(x).detach().numpy()
    assert [each["latent"] for each in data["latents"]] == [*range(32)]
    assert data["ends"] == [2, 4, 8, 16, 32]
    assert (data["rows"], data["far"]) == (3000, 0)
    is_silent = ~(codes > 0).any(axis=0)
    assert data["silent"] == [part.sum() for part in np.split(is_silent, [2, 4, 8, 16])]
    for figures, acts in zip(data["latents"], codes.T):
        assert figures["share"] == pytest.approx(np.mean(acts > 0), rel=1e-3)
        for context in figures["largest"] + figures["fifths"]:
            # of a text of 30 rows
            row = context["row"]
            start = context["row"] // 30 * 30
            first = max(start, row - 40)
            end = min(start + 30, row + 21)
            assert (context["from"], context["at"]) == (first, row - first)
            shades = [int(c, 36) for c in context["shades"]]
            assert shades == pytest.approx(35 * acts[first:end] / acts.max(), abs=0.51)
            assert context["act"] == pytest.approx(acts[row], rel=1e-3)
    shutil.copytree("run", "runs/mine")
    Path("acts.ids.npy").unlink()
    run(
        "look", "--acts", "acts.npy", "--rows", 500, "--latents", 9
    )  # the newest checkpoint, without tokens
    data = page_data("runs/mine/look.html")
    assert len(data["latents"]) == 9
    assert (data["rows"], data["far"]) == (470, 0)
    assert not data["tokens"]
    first = data["latents"][0]["largest"][0]
    others = np.setdiff1d(np.flatnonzero(codes[first["row"]]), data["latents"][0]["latent"])
    assert set(first["others"]) <= {*others}
    assert len(first["others"]) >= min(8, len(others))


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
SPLIT = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"}


def tokenizer_json(tokens, decoder, pre_tokenizer=None):
    return {
        "model": {"vocab": {token: id for id, token in enumerate(tokens)}},
        "decoder": decoder,
        "pre_tokenizer": pre_tokenizer,
    }


@pytest.mark.parametrize(
    "content, texts",
    [
        (["a", "Ġb"], ["a", " b"]),  # no decoder is said: half of the tokens start with Ġ
        (["Ġ"] + ["▁für", "é"] * 99, ["Ġ"] + [" für", "é"] * 99),  # Gemma's: one is Maltese
        (["Ġġ"] + ["café", "è"] * 9, ["Ġġ"] + ["café", "è"] * 9),  # words of Latin letters
        (["ĠÃ©", "x"] * 99 + ["<|▁|>"], [" é", "x"] * 99 + ["<|▁|>"]),  # a special token
        ({"▁x": 1, "": 0}, ["∅", " x"]),
        ([["▁u", -1]], [" u"]),
        (  # GPT-2, SmolLM2; tokens without Ġ tell nothing
            tokenizer_json(["Ã©", "Ċ"], BYTE_LEVEL, BYTE_LEVEL),
            ["é", "⏎"],
        ),
        (  # Llama 3, Qwen
            tokenizer_json(
                ["Ã©"], None, {"type": "Sequence", "pretokenizers": [SPLIT, BYTE_LEVEL]}
            ),
            ["é"],
        ),
        (tokenizer_json(["Ã©"], {"type": "Sequence", "decoders": [BYTE_LEVEL]}), ["é"]),
        (  # Gemma, Llama 2
            tokenizer_json(
                ["Ġa", "▁für", "<0x0A>", "▁▁", "Ã©"],
                {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
                SPLIT,
            ),
            ["Ġa", " für", "⏎", "  ", "Ã©"],
        ),
        (  # a pattern that reads like a type
            tokenizer_json(
                ["Ġa"], {"type": "Replace", "content": '"type": "ByteLevel"', "pattern": {}}
            ),
            ["Ġa"],
        ),
        (
            {
                "model": {"vocab": {"ĠÃ©": 1, "Ċ": 0}},
                "added_tokens": [{"id": 2, "content": "<|é|>"}],
            },
            ["⏎", " é", "<|é|>"],
        ),
    ],
)
def test_a_vocabulary_is_read_as_its_tokenizer_writes_it(tmp_path, content, texts):
    msae.write(tmp_path / "vocab.json", content)
    vocabulary = cli.read_vocab(tmp_path / "vocab.json")
    assert [cli.token_texts([vocabulary[id]]) for id in sorted(vocabulary)] == [[t] for t in texts]


# "日" is three bytes, "😀" four
@pytest.mark.parametrize(
    "contents, texts",
    [
        ([b"the", b" cat", b"\n", b""], ["the", " cat", "⏎", "∅"]),
        ([b" \xe6", b"\x97", b"\xa5\xe6", b"\x9c\xac"], [" ◌", "◌", "日◌", "本"]),
        ([b"\xf0\x9f", b"\x98\x80!"], ["◌", "😀!"]),
        ([b"\xf0", b" the", b"\x80"], ["◌", " the", "◌"]),  # parts of no character
        ([b"\xe6\x97"], ["◌◌"]),
        ([b"\xed\xa0\x80", "\u0000◌".encode()], ["◌◌◌", "\\u0000◌"]),  # half a surrogate pair
    ],
)
def test_a_character_cut_into_tokens_is_shown_by_the_last_of_them(contents, texts):
    assert cli.token_texts(contents) == texts


def test_a_character_is_not_joined_from_tokens_of_two_texts():
    vocabulary = {0: b"\xc3", 1: b"\xa9"}
    ids = np.array([0, 1, 0, 1, 7])
    tokens = cli.tokens_of_rows(ids, np.array([0, 0, 0, 1, 1]), vocabulary)
    assert tokens == ["◌", "é", "◌", "◌", "7"]


def test_vocabularies_and_ids_of_every_kind(tmp_path):
    for shape, document in (((3, 4), 1), (12, 0)):
        np.save(tmp_path / "ids.npy", np.arange(12, dtype=np.uint64).reshape(shape) + 2**63)
        assert [n[5] for n in cli.token_ids(tmp_path / "ids.npy", tmp_path, 12)] == [
            document,
            2**63 + 5,
        ]
    for name in ("ids", "two"):  # a folder of rows and what harvest writes beside them
        np.save(tmp_path / f"{name}.npy", rows(6))
        np.save(tmp_path / f"{name}.ids.npy", np.full((6, 2), len(name)))
    assert len(msae.Rows(tmp_path)) == len(cli.token_ids(None, tmp_path, 12)[1]) == 12


@pytest.fixture
def browser(tmp_path):
    """A function that has headless Chromium carry out a command of its DevTools protocol."""
    (commands, to) = os.pipe()
    (back, replies) = os.pipe()
    switches = f"--headless --no-sandbox --remote-debugging-pipe --user-data-dir={tmp_path}/home"
    words = [
        "bash",
        "-c",
        f'exec "$@" 3<&{commands} 4>&{replies}',
        "-",
        CHROMIUM,
        *switches.split(),
    ]
    process = subprocess.Popen(words, pass_fds=(commands, replies), stderr=subprocess.DEVNULL)
    os.close(replies)
    stream = os.fdopen(back, "rb")
    number = itertools.count()
    session = {}

    def call(method, **params):
        message = {"id": next(number), "method": method, "params": params, **session}
        os.write(to, json.dumps(message).encode() + b"\0")
        while (found := json.loads(b"".join(iter(lambda: stream.read(1), b"\0")))).get(
            "id"
        ) != message["id"]:
            call.events.append(found["method"])
        return found.get("result", {})

    call.events = []
    target = call("Target.createTarget", url="about:blank")["targetId"]
    session["sessionId"] = call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    yield call
    process.kill()
    process.wait()


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")


class OpenPage:
    """A page that is open in the browser, and what a reader does there."""

    def __init__(self, browser, path, address, title):
        self.browser = browser
        browser("Page.navigate", url=Path(path).resolve().as_uri() + address)
        end = time.monotonic() + 60
        while self.js("document.readyState + document.querySelector('h2')?.textContent") != (
            f"complete{title}"
        ):
            assert time.monotonic() < end

    def js(self, script):
        found = self.browser(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in found, found
        return found.get("result", {}).get("value")

    def texts(self, where):
        return self.js(f"[...document.querySelectorAll('{where}')].map(it => it.textContent)")

    def title_after(self, script):  # which leads to another latent
        return self.js(
            "new Promise(done => {"
            "onhashchange = () => done(document.querySelector('h2').innerText); "
            f"{script} }})"
        )

    def click(self, where):
        return self.title_after(f"document.querySelector('{where}').click()")

    def go(self, address):
        return self.title_after(f"location.hash = '{address}'")

    def search(self, text):  # the lines that are found
        self.js(
            f"document.querySelector('#find').value = '{text}'; "
            "document.querySelector('#find').dispatchEvent(new Event('input', {bubbles: true}))"
        )
        return self.texts("nav > details > details > summary .text")

    def press_enter(self):
        event = "new KeyboardEvent('keydown', {key: 'Enter', bubbles: true})"
        return self.title_after(f"document.querySelector('#find').dispatchEvent({event})")


needs_chromium = pytest.mark.skipif(not CHROMIUM, reason="needs Chromium")


@needs_chromium
def test_in_a_browser_links_lead_on_tokens_are_found_and_foreign_text_does_nothing(here, browser):
    tree = msae.FeatureTree(toy_settings()["tree"])
    sae = msae.MatryoshkaSAE(20, 20, (3, 20))
    order = sorted(
        range(20), key=lambda feature: feature not in (0, 4, 8)
    )  # those with children first
    sae.W_dec.data = tree.directions[order]
    sae.W_enc.data = tree.directions[order].T.contiguous()
    sae.save("tree")
    np.save("tree.npy", tree.sample(2000, 0))
    np.save("tree.ids.npy", np.stack([np.arange(2000) // 50, np.arange(2000) % 7], axis=1))
    run("look", "tree", "--acts", "tree.npy", "--vocab", "vocab.json")
    for domain in ("Runtime", "Log", "Page"):
        browser(f"{domain}.enable")
    page = OpenPage(browser, "tree/look.html", "#latent-17", "Latent 17")
    number = int(page.click("nav > details > details a").split()[1])
    beside = ".relations .line"
    assert number < 3 <= int(page.click(beside).split()[1])  # its child
    assert page.click(beside) == f"Latent {number}"  # whose parent it is
    found = page.search("CAT")
    assert found
    assert all(" Cat" in line for line in found)
    assert page.js("document.querySelectorAll('img, script').length") == 2
    page.go("#")
    assert page.js("document.querySelectorAll('img, script').length") == 2
    assert not {
        "Runtime.exceptionThrown",
        "Runtime.consoleAPICalled",
        "Log.entryAdded",
        "Page.javascriptDialogOpening",
    } & {*browser.events}


@pytest.fixture
def small_page(tmp_path, browser):
    """Latents 0, 1, 4 and 5 of 8 on 100 rows of one text, open in the browser."""
    tokens = [f" w{row}" for row in range(100)]
    words = {10: " cat", 20: " dog", 30: " dog", 35: "cat", 50: " odd", 52: " riv", 53: "er"}
    words[70] = " cat"
    for row, word in words.items():
        tokens[row] = word
    codes = np.zeros((100, 8))
    # row 50 is far larger than the others, as one row of a real model was for 28 latents of 1,024
    codes[[50, 10, 20, 30, 35, 70], 0] = 9, 3, 2.9, 2.8, 2.7, 1
    codes[[20, 50], 1] = 2, 1
    codes[[10, 70], 4] = 1.5, 0.5
    codes[[20, 50], 5] = 1.9, 0.9  # below 1
    row, latent = codes.nonzero()
    starts = np.append(0, np.bincount(row, minlength=100).cumsum())
    is_far = np.arange(100) == 99
    sparse = msae.SparseCodes(starts, latent, codes[row, latent], is_far)
    rows = cli.PageRows(sparse, np.arange(100), np.zeros(100), tokens)
    sae = msae.MatryoshkaSAE(8, 8, (4, 8))
    cli.write_page(tmp_path / "look.html", sae, rows, max_latents=4, title="Small")
    return OpenPage(browser, tmp_path / "look.html", "", "Small")


@needs_chromium
def test_in_the_tree_a_latent_is_known_by_the_most_frequent_tokens_of_its_contexts(small_page):
    names = dict(zip(small_page.texts("nav .number"), small_page.texts("nav .text")))
    assert names == {
        "0": "cat · dog · odd",
        "1": "dog · odd",  # as frequent: the larger activation
        "5": "dog · odd",
        "4": "cat w8 w9 cat w11 w12 w13",  # a token alone, and the text around it
    }


@needs_chromium
def test_search_finds_words_anywhere_in_the_contexts_and_enter_opens_the_first(small_page):
    around = " odd w51 river w54 w55"
    assert small_page.search("River") == [around] * 3  # of 0, 1 and 5
    assert small_page.press_enter() == "Latent 0"
    assert small_page.search("dog") == [" w18 w19 dog w21 w22 w23"] * 3
    assert small_page.texts("nav > details > details > summary .number") == ["1", "0", "5"]
    assert small_page.search("w59") == []  # beyond what the contexts show
    assert len(small_page.search("1")) > 1
    assert small_page.press_enter() == "Latent 1"


@needs_chromium
def test_a_click_shows_more_of_the_text(small_page):
    small_page.go("#latent-0")
    first = ".contexts section:first-of-type p:first-of-type bdi"
    assert len(small_page.texts(first)) == 10 + 1 + 5
    small_page.js("document.querySelector('.contexts button').click()")
    assert len(small_page.texts(first)) == 40 + 1 + 20
    assert small_page.texts(first)[40] == " odd"
    shades = small_page.js(
        f"[...document.querySelectorAll('{first}')].map(word => "
        "Math.round(90 * word.style.getPropertyValue('--strength')) / 10)"
    )
    assert [round(shade) for shade in shades if shade] == [3, 3, 3, 3, 9, 1]


@needs_chromium
def test_the_first_page_has_figures_and_says_which_latents_there_are(small_page):
    assert small_page.texts("td") == ["4", "4", "2", "2", "0", "8", "4", "2", "2", "1"]
    assert (
        "4 of 8 latents are shown; 50% of all are never on. 100 rows, of which 1"
        in (small_page.texts("main")[0])
    )
    assert "Underlined: the row in question" in small_page.texts("main dl")[0]
    assert small_page.go("#latent-9999") == "There is no latent 9999"
    assert small_page.go("#latent-2") == "Latent 2 is not on this page"


# --------------------------------------------------------------------------- the Hub and neighbours


class Hub(
    http.server.BaseHTTPRequestHandler
):  # what a push and a load need of its API; weights go by LFS
    # {name: {path: bytes}}, {sha256: bytes}, {last part of a path: status}
    repos = {}
    large = {}
    refuse = {}
    protocol_version = "HTTP/1.1"

    def answer(self, path, last, body):
        url = f"http://{self.headers['Host']}"
        repo = "/".join(path.split("/")[3:5])
        sent = json.loads(body) if body[:1] == b"{" and b"\n" not in body else {}
        if last == "create":
            self.repos["ada/" + sent["name"]] = {}
            return {"url": f"{url}/ada/{sent['name']}"}
        if "/preupload/" in path:
            lfs, plain = (
                {"uploadMode": mode, "shouldIgnore": False} for mode in ("lfs", "regular")
            )
            return {
                "files": [
                    {**f, **(lfs if f["path"] == msae.WEIGHTS else plain)} for f in sent["files"]
                ]
            }
        if last == "batch":
            return {
                "objects": [
                    {**file, "actions": {"upload": {"href": f"{url}/large/{file['oid']}"}}}
                    for file in sent["objects"]
                ]
            }
        if self.command == "PUT":
            self.large[last] = body
        elif "/commit/" in path:
            for item in (json.loads(line)["value"] for line in body.splitlines()[1:]):
                content = (
                    base64.b64decode(item["content"])
                    if "content" in item
                    else self.large[item["oid"]]
                )
                self.repos[repo][item["path"]] = content
        elif "/resolve/" in path:
            return self.repos["ada/mine"].get(last, b"")
        names = [
            {"rfilename": name, "path": name, "type": "file", "size": 1, "oid": "1"}
            for name in self.repos.get(repo, ())
        ]
        return (
            names
            if "/tree/" in path
            else {
                "id": repo,
                "sha": "1" * 40,
                "siblings": names,
                "commitOid": "1" * 40,
                "commitUrl": f"{url}/{repo}/commit/{'1' * 40}",
            }
        )

    def handle_request(self):
        path = self.path.partition("?")[0]
        last = path.split("/")[-1]
        content = self.answer(
            path, last, self.rfile.read(int(self.headers.get("Content-Length") or 0))
        )
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(self.refuse.get(last, 404 if "ada/none" in path or not content else 200))
        for name, value in (
            ("Content-Length", len(content)),
            ("ETag", last),
            ("X-Repo-Commit", "1" * 40),
            ("X-Error-Code", "" if content else "EntryNotFound"),
        ):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else content)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request
    log_message = unittest.mock.Mock()


@pytest.fixture
def hub(here, tmp_path, monkeypatch):
    """The address of a running Hub, which the client here uses, with a token and a cache."""
    monkeypatch.setattr(Hub, "repos", {})
    monkeypatch.setattr(Hub, "refuse", {})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(
        target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
    ).start()
    url = f"http://127.0.0.1:{server.server_port}"
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": url,
        "HUGGINGFACE_CO_URL_TEMPLATE": template,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value, raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # before the client tries again
    yield url
    server.shutdown()
    server.server_close()


@pytest.fixture
def api(here, monkeypatch):
    api = unittest.mock.MagicMock(endpoint="https://hub")
    api.create_repo.return_value.repo_id = "ada/mine"
    api.revision_exists.return_value = False
    monkeypatch.setattr(huggingface_hub, "HfApi", api.made)
    api.made.return_value = api
    return api


PUSHED = {"README.md", "config.json", "eval-acts.json"}
PUSHED |= {msae.CONFIG, msae.LIMIT, msae.METRICS, msae.WEIGHTS}


def test_push_without_arguments_load_and_the_snippets_of_the_card(hub):
    shutil.copytree("run", "runs/mine/vanilla")  # a twin, which does not count
    shutil.copytree("run", "runs/mine", dirs_exist_ok=True)
    assert run("push") == f"{hub}/ada/mine\n"
    pushed = Hub.repos["ada/mine"]
    assert set(pushed) == PUSHED
    assert pushed["config.json"] == pushed["cfg.json"]
    as_they_are = PUSHED & {*os.listdir("run")} - {"cfg.json"}
    assert all(pushed[name] == Path("run", name).read_bytes() for name in as_they_are)
    ours = msae.MatryoshkaSAE.load("ada/mine")
    local = msae.MatryoshkaSAE.load("run")
    assert local.metadata.pop("acts").endswith(
        "acts.npy"
    )  # a path of this machine is not for others
    assert same(ours, local)
    assert ours.prefixes == local.prefixes
    assert ours.metadata == local.metadata
    card = pushed["README.md"].decode()
    found = json.loads(pushed["eval-acts.json"])
    figures = "{fvu:.4f} {l0:.2f} {dead:.2%} {max_cosine:.3f} 3,000".format(**found).split()
    assert found["rows"] == 3000
    assert all(figure in card for figure in figures)
    assert "| 2 | 0." in card
    snippets = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names = {}
    for snippet in snippets[: 2 if importlib.util.find_spec("sae_lens") else 1]:
        exec(snippet, names)
        assert names["codes"].shape == (8, 32)
        assert names["recon"].shape == (8, 16)


@pytest.mark.parametrize(
    "options, passed, printed",
    [
        ("--private --token t", {"private": True, "token": "t"}, ""),
        (
            "--revision small",
            {"revision": "small", "branch": "small", "private": None},
            "/tree/small",
        ),
        ("--create-pr", {"create_pr": True, "revision": None}, "/pr/1"),
    ],
)
def test_the_options_of_push_pass_through(api, options, passed, printed):
    api.create_commit.return_value.pr_url = (
        "https://hub/ada/mine/pr/1" if "create_pr" in passed else None
    )
    assert run("push", "run", "ada/mine", *options.split()) == f"https://hub/ada/mine{printed}\n"
    sent = {name: value for call in api.mock_calls for name, value in call.kwargs.items()}
    assert passed.items() <= sent.items()


def test_dry_run_shows_files_and_card_and_touches_no_network(api):
    output = run("push", "run", "--dry-run")
    assert not api.create_repo.called
    assert not api.create_commit.called
    assert "YOUR_NAME/run" in output
    assert set(re.findall(r"^ +[\d,]+  (\S+)$", output, re.MULTILINE)) == PUSHED
    assert all(
        word in output for word in ("library_name: saelens", 'base_model: "ada/tiny"', "ada/rows")
    )
    Path("run/eval-acts.json").unlink()
    assert "no evaluation" in run("push", "run", "--dry-run")


def test_a_push_that_cannot_be_is_refused_in_one_line_without_the_token(api):
    assert "runs/" in refused("push")
    assert "cfg.json" in refused("push", "nowhere", "ada/mine")
    for stage, error in (
        ("create_commit", OSError("no\nnet Bearer hf_x")),
        ("create_repo", KeyError("net")),
    ):
        getattr(api, stage).side_effect = error
        line = refused("push", "run", "ada/mine", "--token", "hf_x")
        assert "ada/mine" in line
        assert "net" in line
        assert "hf_x" not in line
    msae.write("run/eval-acts.json", {"fvu": 1})
    assert "eval-acts.json" in refused("push", "run", "ada/mine")


def test_what_the_hub_refuses_is_one_line(hub):
    with pytest.raises(OSError, match=r"\Aada/none cannot be read from the Hub: .*404.*\Z"):
        msae.MatryoshkaSAE.load("ada/none")
    Hub.refuse["main"] = 500
    assert "500" in refused("push", "run", "ada/mine")
    assert not Hub.repos["ada/mine"]
    assert "'ada/my sae'" in refused("push", "run", "ada/my sae")


def test_a_folder_wins_over_a_repository_and_other_names_are_none(here, monkeypatch):
    asked = unittest.mock.Mock(side_effect=["run", KeyError("x\ny")])
    sae = msae.MatryoshkaSAE.load("run")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", asked)
    assert same(msae.MatryoshkaSAE.load("ada/mine", revision="v1"), sae)
    assert asked.call_args.args[0] == "ada/mine"
    assert asked.call_args.kwargs["revision"] == "v1"
    with pytest.raises(OSError, match="ada/mine cannot be read from the Hub: 'x.*y'$"):
        msae.MatryoshkaSAE.load("ada/mine")
    sae.save("ada/mine")
    assert same(msae.MatryoshkaSAE.load("ada/mine"), sae)
    for name in ("nothing", "runs/a/b", "./adb", "/ada/mine", "../ada/mine", Path("bob/none")):
        with pytest.raises(FileNotFoundError, match="cfg.json"):
            msae.MatryoshkaSAE.load(name)
    with pytest.raises(ValueError, match="revision"):
        msae.MatryoshkaSAE.load("run", revision="v1")


@pytest.mark.skipif(
    "MSAE_HUB_TEST" not in os.environ, reason="writes a private repository with your token"
)
def test_the_real_hub_takes_a_push_and_its_tiny_models_have_the_published_logits(here):
    api = huggingface_hub.HfApi()
    repo = f"{api.whoami()['name']}/msae-test-{os.getpid()}"
    try:
        assert run("push", "run", repo, "--private").strip().endswith(repo)
        assert same(msae.MatryoshkaSAE.load(repo), msae.MatryoshkaSAE.load("run"))
    finally:
        api.delete_repo(repo, missing_ok=True)
    for name, expected in {
        "tiny_model.pt": [13.61935, 27.03831, 14.77878, 15.21049, 19.16437],
        "tiny_model_2L_1E.pt": [14.83634, 27.60631, 16.46386, 16.65712, 19.72797],
        "tiny_model_2L_3E.pt": [25.15317, 39.79271, 28.82510, 27.84330, 31.72397],
    }.items():
        logits = msae.TinyModel.load(name)(torch.tensor([[9996, 51, 56, 4, 36]]))[0, -1, :5]
        torch.testing.assert_close(logits.detach(), torch.tensor(expected), rtol=1e-4, atol=1e-3)


def close_to(theirs, ours, x, tolerance=1e-6):
    for a, b in ((theirs.encode(x), ours.encode(x)), (theirs(x), ours(x))):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


def snippets_of(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def readme_parts():
    """(The README without what needs a real language model, and that section)."""
    before, heading, rest = (HERE / "README.md").read_text().partition("## A real language model\n")
    section, next_heading, after = rest.partition("\n## ")
    assert heading and next_heading
    return before + next_heading + after, section


def test_readme_snippets_run_in_order(hub):
    np.save("acts.npy", rows(5000, 64).astype(np.float16))
    snippets = snippets_of(readme_parts()[0])
    assert len(snippets) == 7
    names = {}
    for snippet in [*snippets, *snippets_of((HERE / "docs/details.md").read_text())]:
        if "sae_lens" in snippet and not importlib.util.find_spec("sae_lens"):
            continue
        exec(snippet, names)
        if 'out="runs/mine"' in snippet:
            run("push", "runs/mine", "ada/mine")
    x = torch.from_numpy(np.load("acts.npy")).float()
    # the twins of one pass are those of two runs
    for name, cfg in (("matryoshka", names["cfg"]), ("vanilla", names["cfg"].vanilla())):
        assert same(names[name], msae.train(np.load("acts.npy"), cfg))
    # the L1 SAE is what was trained: without a threshold
    assert not names["dense"].threshold.any()
    assert names["faded"].threshold.all()
    assert msae.evaluate(names["dense"], x)["l0"] > 30
    if importlib.util.find_spec("dictionary_learning"):
        for name in ("nnsight", "zstandard"):  # of its language-model half
            sys.modules.setdefault(name, unittest.mock.MagicMock())
        loading = importlib.import_module("dictionary_learning.utils")
        theirs = loading.load_dictionary("runs/theirs", "cpu")[0]
        close_to(theirs, msae.MatryoshkaSAE.load("runs/mine"), x)
        assert theirs.group_sizes.tolist() == [32, 32, 64, 128, 256]


@pytest.mark.skipif("MSAE_SMOLLM" not in os.environ, reason="opt-in: set MSAE_SMOLLM=1")
def test_readme_real_language_model_runs(here):
    words = "The elephant would rather sleep , and 3 others were slowly eating grass . ".split()
    Path("prose.txt").write_text(" ".join(random.Random(0).choices(words, k=120_000)))
    names = {}
    shorter = {
        "steps=1000": "steps=4",
        "[400:2000])": "[40:140]), n_held_out=2000",
        "[:400]": "[:30]",
        "[:32]": "[:2]",
    }
    for snippet in snippets_of(readme_parts()[1]):
        for long, short in shorter.items():
            snippet = snippet.replace(long, short)
        exec(snippet, names)
    run("eval", "runs/smol", "runs/smol-vanilla", "--acts", "held.npy", "--labels", "labels.npy")
    run("look", "runs/smol", "--acts", "held.npy", "--vocab", "smollm/tokenizer.json")


def test_saelens_opens_every_checkpoint_and_the_hub(hub):
    sae_lens = pytest.importorskip("sae_lens")
    x = torch.from_numpy(rows(1000))
    cfg = config(n_latents_start=40, order="energy", steps=100)
    msae.train(
        x,
        cfg,
        out="new",
        save_minutes=0,
        log_every=20,
        metadata=ABOUT,
        on_log=lambda _: close_to(
            sae_lens.SAE.load_from_disk("new"), msae.MatryoshkaSAE.load("new"), x
        ),
    )
    run("push", "new", "ada/mine")
    theirs = sae_lens.SAE.from_pretrained("ada/mine", ".")
    close_to(theirs, msae.MatryoshkaSAE.load("ada/mine"), x)
    metadata = theirs.cfg.metadata
    assert (metadata.k, list(metadata.prefixes), metadata.hook_name) == (
        4.5,
        [4, 12, 32],
        ABOUT["hook_name"],
    )


@pytest.mark.parametrize("centred", [True, False])
def test_jumprelu_saes_of_saelens_load(tmp_path, centred):
    sae_lens = pytest.importorskip("sae_lens")
    torch.manual_seed(0)
    settings = sae_lens.BatchTopKTrainingSAEConfig(
        d_in=16, d_sae=32, k=4, apply_b_dec_to_input=centred
    )
    theirs = sae_lens.TrainingSAE.from_dict(settings.to_dict())
    theirs.topk_threshold.fill_(0.01)
    theirs.b_dec.data.normal_()
    theirs.W_dec.data *= torch.rand(32, 1) + 0.5  # no unit rows
    theirs.save_inference_model(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    x = torch.from_numpy(rows(200, mean=0.5, scale=1.0))
    close_to(theirs, msae.MatryoshkaSAE.load(tmp_path), x, 1e-5)
    theirs.threshold.data.uniform_(0, 0.2)  # per latent
    theirs.save_model(tmp_path)
    close_to(theirs, msae.MatryoshkaSAE.load(tmp_path), x, 1e-5)
    assert 0 < float((theirs.encode(x) > 0).float().mean()) < 0.6


@pytest.mark.parametrize("centred", [True, False])
def test_each_latent_has_its_own_threshold_and_inputs_may_be_uncentred(tmp_path, centred):
    sae = msae.MatryoshkaSAE(16, 32)
    x = torch.from_numpy(rows(50, mean=0.5))
    sae.threshold.uniform_(0, 3)
    sae.b_dec.data.normal_()
    sae.save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    msae.write(tmp_path / "cfg.json", {**cfg, "apply_b_dec_to_input": centred})
    pre = torch.relu((x - sae.b_dec * centred) @ sae.W_enc + sae.b_enc)
    expected = torch.where(pre > sae.threshold, pre, 0)
    torch.testing.assert_close(
        msae.MatryoshkaSAE.load(tmp_path).encode(x), expected, rtol=1e-4, atol=1e-4
    )


ALONE = """
import sys
# no import of these succeeds
sys.modules.update(dict.fromkeys(["click", "rich", "huggingface_hub", "cli"]))
import msae, numpy as np, torch
rows = np.random.default_rng(0).normal(size=(2000, 8)).astype("f4")
trained = msae.train(rows, msae.TrainConfig(n_latents=16, k=3, batch_size=64, steps=30), out="run")
sae = msae.MatryoshkaSAE.load("run")
assert torch.equal(sae.W_enc, trained.W_enc) and 0 < msae.evaluate(sae, rows)["fvu"] < 1
msae.MatryoshkaSAE.load("ada/mine")
"""


def test_msae_works_copied_alone_into_a_folder(tmp_path):
    shutil.copy(HERE / "msae.py", tmp_path)
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True)
    # no warning before
    assert done.stderr.startswith("Traceback")
    assert not done.stdout
    assert re.match("OSError: ada/mine .*huggingface_hub", done.stderr.splitlines()[-1])


# ----------------------------------------------------------------------------- numbers under stress

STRESS = {  # what is done to the rows (n, 16), and settings
    "tiny": (lambda x: x * 1e-4, {}),
    "huge": (lambda x: x * 1e4, {}),
    "bounds": (lambda x: x * 1e15, {}),
    "one dimension 1000 times the others": (
        lambda x: x * np.where(np.arange(16) == 3, 1000, 1),
        {},
    ),
    "mean 400 times the spread": (lambda x: x + 1000, {}),
    "duplicates": (lambda x: x[np.arange(len(x)) % 50], {}),
    "a third zero rows": (lambda x: x * (np.arange(len(x)) % 3 > 0)[:, None], {}),
    "constant dimensions": (lambda x: x * (np.arange(16) < 3) + 2, {}),
    "one dimension": (lambda x: x[:, :1], dict(n_latents=4, prefixes=None, k=1.5)),
    "k of 0.5": (lambda x: x, dict(k=0.5)),
    "k = F": (lambda x: x, dict(k=32)),
    "one row": (lambda x: x, dict(batch_size=1)),
    "F < D": (lambda x: x, dict(n_latents=6, prefixes=None, k=2.5)),
    "one latent": (lambda x: x, dict(n_latents=1, prefixes=(1,), k=0.5)),
    "5,000 latents on 4 dimensions": (
        lambda x: x[:, :4],
        dict(n_latents=5000, prefixes=None, steps=20),
    ),
}


@pytest.mark.parametrize("change, settings", STRESS.values(), ids=STRESS.keys())
def test_strange_rows_and_sizes_keep_finite_weights_and_l0(change, settings):
    data = change(rows(8000)).astype(np.float32)
    sae = msae.train(data[:6000], config(**{"steps": 200, **settings}))
    figures = msae.evaluate(sae, data[6000:])
    k = settings.get("k", 4.5)
    assert all(tensor.isfinite().all() for tensor in (*sae.parameters(), sae.threshold))
    assert np.isfinite(figures["fvu"])
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 1e-5
    counts = (sae.encode(torch.from_numpy(data[6000:])) > 0).sum(dim=1).float()
    noise = counts.std() * (1 / 282 + 1 / 2000) ** 0.5  # of the rows that calibrate, and of these
    all_positive = figures["l0"] < k and not sae.threshold.any()
    assert abs(figures["l0"] - k) < max(0.05 * k, 4 * noise) or all_positive


@pytest.mark.parametrize("steps", [1, 20])
def test_a_diverged_run_is_refused_and_not_saved(tmp_path, steps):
    with pytest.raises(ValueError, match="diverged.* lr"):
        msae.train(rows(1000), config(lr=9e18, warmup_steps=0, steps=steps), out=tmp_path)
    assert torch.allclose(
        msae.MatryoshkaSAE.load(tmp_path).W_dec, msae.Trainer(config(), 16).export().W_dec
    )


# -------------------------------------------------------------------------------------------- enemy

FUZZ = int(
    os.environ.get("MSAE_FUZZ", 130)
)  # bad inputs, over all kinds; MSAE_FUZZ=2100 takes minutes
WORDS = (
    "null",
    "true",
    "-1",
    "0",
    "1",
    "17",
    "9999",
    str(2**31),
    str(2**62),
    "9" * 5000,
    "0.5",
    "1e-320",
    "1e308",
    "1e999",
    "NaN",
    "-Infinity",
    "",
    " ",
    '"x"',
    '"x\\ny"',
    "[]",
    "[[]]",
    "[1, 2]",
    "{}",
    "x\ny",
    '{"a": 1}',
    "(10**30, 8)",
    "'|O'",
    "'<c8'",
    "\0",
    "0.5,1",
    "[0, 0.999]",
    "cuda:9",
    "meta",
    "..",
    "é" * 9,
)
LONG = "[" * 10**5, f"[{'0, ' * 10**5}0]", '{"active_prob": 1, "children": [' * 450 + "]}" * 450
PARTS = rb"""-?\d[\w.+-]*|"[^"]*"|'[^']*'|\[[^\[\]]*\]|\([^()]*\)|true|null"""


def damaged(g, data):
    """``data`` cut, with a bit flipped, bytes put in, a value swapped; or a harmful pickle."""
    at = g.randrange(g.choice((len(data), min(len(data), 200))))
    part = g.choice(list(re.finditer(PARTS, data[:4000])))
    swapped = data[: part.start()] + g.choice(WORDS + LONG).encode() + data[part.end() :]
    flipped = data[:at] + bytes([data[at] ^ 1 << g.randrange(8)]) + data[at + 1 :]
    return g.choice(
        (swapped,) * 9
        + (
            data[:at],
            flipped,
            data[:at] + g.randbytes(8) + data[at:],
            data * 2,
            data[:at] + b"\xff" * 8 + data[at + 8 :],
            pickle.dumps(Canary()),
        )
    )


NEW = [*TRAIN, "--out", "new"]
PUSH = "push run ada/mine --dry-run".split()
ATTACKS = {  # the command that reads a damaged file; none: its options are bad
    "acts.npy": NEW,
    f"run/{msae.WEIGHTS}": EVAL,
    f"run/{msae.CONFIG}": EVAL,
    f"run/{msae.STATE}": RESUME,
    f"run/{msae.METRICS}": RESUME,
    "toy.json": TOY,
    "ids.jsonl": HARVEST,
    "tiny.pt": HARVEST,
    "train.json": "train --acts acts.npy --config train.json --out new".split(),
    "ids.npy": [*HARVEST, "--tokens", "ids.npy"],
    "labels.npy": [*EVAL, "--labels", "labels.npy"],
    "run/eval-acts.json": PUSH,
    "vocab.json": LOOK,
    "acts.ids.npy": LOOK,
    "": None,
    "stream": None,
}


def breaking_after(n, error):
    """Standard output that breaks after so many characters."""

    def write(stream, text):
        nonlocal n
        n -= len(text)
        if n < 0 < len(text) and stream.name == "<stdout>":
            raise error
        return io.TextIOWrapper.write(stream, text)

    return unittest.mock.patch.object(
        click.testing._NamedTextIOWrapper, "write", write, create=True
    )


def attack(name, number):
    g = random.Random(f"{name} {number}")
    words = list(ATTACKS[name] or g.choice((NEW, EVAL, HARVEST, TOY, PUSH, BENCH, LOOK)))
    stream = contextlib.nullcontext()
    error = g.choice((OSError(28, "full"), BrokenPipeError(32, "closed")))
    if name == "stream":
        stream = breaking_after(g.randrange(3000), error)
    elif name:
        Path(name).write_bytes(damaged(g, Path(name).read_bytes()))
    else:
        option = g.choice(
            [p for p in cli.main.commands[words[0]].params if p.param_type_name == "option"]
        )
        words += [option.opts[0]] if option.is_flag else [option.opts[0], g.choice(WORDS)]
    before = {path: data for path, data in files().items() if path.name != msae.METRICS}
    signal.alarm(60)
    msae.Trainer.step = stopping_at(60)
    runner = click.testing.CliRunner(charset=g.choice(("utf-8", "ascii", "cp1252")))
    with stream:
        result = runner.invoke(cli.main, words)
    lines = result.output.splitlines()
    code = result.exit_code
    after = files()
    errors = [line for line in lines if line.startswith("Error:")]
    kept = {
        "no traceback": isinstance(result.exception, (SystemExit, type(None)))
        and code in (0, 1, 2, 130),
        "one line": (errors == lines[-1:] * (code in (1, 2)) or name == "stream")
        and len(str(errors)) < 6000,
        "no code run": not Path("canary").exists(),
        "old files stay": code == 0 or before.items() <= after.items(),
        "no part of a file": not any(path.suffix == ".tmp" for path in after),
        "rows so far": not Path("rows.npy").exists() or len(np.load("rows.npy")) > 0,
        "good checkpoint": not Path("new").exists() or msae.MatryoshkaSAE.load("new"),
    }
    broken = [claim for claim, holds in kept.items() if not holds]
    return (
        f"{name} {number}: {broken} {result.exception!r:.300} {words} {lines[-3:]}\n"
        if broken
        else ""
    )


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs limits on memory")
@pytest.mark.parametrize("name", ATTACKS, ids=lambda name: name or "options")
def test_bad_input_gets_one_line_and_harms_nothing(good, name, tmp_path, monkeypatch):
    def work():
        import resource

        most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + 2**31
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        for number in range(FUZZ // len(ATTACKS)):
            shutil.copytree(good, tmp_path / "case")
            os.chdir(tmp_path / "case")
            print(attack(name, number), end="")
            shutil.rmtree(tmp_path / "case")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_hub)
    process = forked(work, tmp_path / "output")
    process.join()
    assert process.exitcode == 0, (tmp_path / "output").read_text()
    assert not (tmp_path / "output").read_text(), (tmp_path / "output").read_text()
