"""Command line over msae: parse, one library call, show."""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import re
import shlex
import shutil
import sys
import time
from pathlib import Path
from statistics import fmean, median

import click
import numpy as np
import torch
from click import IntRange, option
from rich import box
from rich.columns import Columns
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import msae

HERE = Path(__file__).parent
EVAL, ORIGIN = "eval.json", ("model_name", "hook_name", "dataset", "base_model")
DROPPED = (msae.BEGIN, msae.PAD)
DATASET, PUBLISHED_TOKENS = "noanabeshima/TinyModelTokIds", ("train.jsonl", "validation.jsonl")
OLD_FILE, NEW_FILE = click.Path(exists=True, dir_okay=False), click.Path(dir_okay=False)
FOLDER = click.Path(file_okay=False)
console = Console(markup=False, emoji=False, highlight=False)

dtype_option = option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
                      help="Of the products alone.  [default: bfloat16 on cuda, else float32]")
device_option = option("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                       show_default="cuda if there is one, else cpu", help="cpu, cuda, cuda:1, ...")
model_option = option("--model", "model_path", default="tiny_model.pt", help="State dict of a TinyModel: a "
                      "file, or a published name: tiny_model.pt, tiny_model_2L_1E.pt, tiny_model_2L_3E.pt")
layer_option = option("--layer", type=IntRange(min=0), default=3,
                      help="The residual stream that enters this block; 4: after the last.")


class Commands(click.Group):
    """A group that turns what the library refuses into one line and an exit code, never a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (OSError, ValueError) as error:
            text = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            text = f"not enough memory, try fewer latents or a smaller batch: {msae.one_line(error)}"
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            raise SystemExit(130) from None
        raise click.ClickException(" ".join(text.split()))


def out_of_memory(error):
    signs = ("allocate", "out of memory", "size calculation overflowed")  # in torch's messages
    return isinstance(error, MemoryError) or any(sign in str(error) for sign in signs)


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main():
    """Matryoshka sparse autoencoders: train them, look at them, share them.

    \b
    Examples:
      python cli.py toy
      python cli.py train --help
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # not a line for each try of a connection


def read_json(path):
    """The object in a JSON file; ``ValueError`` names the file and the fault."""
    with msae.reading(path, "a JSON object"):
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows editors put a byte order mark
        return dict(**json.loads(text))


def new_config(settings, kind=msae.TrainConfig):
    """``kind(**settings)``; a setting that is unknown, missing or of a wrong type is a ``ValueError``."""
    try:
        return kind(**settings)
    except TypeError as error:
        raise ValueError(f"settings: {error}") from None


def writable(folder):
    """Make ``folder`` if there is none; ``PermissionError`` before any work that could not be saved."""
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} is not writable: choose another output folder")
    return folder


def show_table(title, columns, rows, **options):
    """Print rows of strings; None ends a section."""
    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD,
                  padding=(0, int(console.width >= 70), 0, 0), **options)
    for row in rows:
        table.add_section() if row is None else table.add_row(*row)
    console.print(table)


class Lines(Progress):
    """A live line per run in a terminal, a plain line every ten seconds elsewhere."""

    def __init__(self):
        left, right = TextColumn("{task.description}"), TextColumn("{task.fields[figures]}")
        bar = [BarColumn(bar_width=10)] if console.width >= 95 else []
        super().__init__(left, *bar, MofNCompleteColumn(), right, TimeRemainingColumn(), console=console,
                         disable=not console.is_terminal, speed_estimate_period=3600)  # reports may be rare

    def counter(self, label, total, unit="rows", per_step=1):
        """A callback: how many of ``total`` are done and, if known, units per second and figures."""
        task, started, printed = self.add_task(label, total=total, figures=""), time.monotonic(), -math.inf

        def show(done, rate=None, figures=""):
            nonlocal printed
            now = time.monotonic()
            rate = max(done, 1) / max(now - started, 1e-9) if rate is None else max(rate, 1)
            speed = f"{rate:,.0f} {unit}/s"
            beside = f"{speed}  {figures}" if console.width >= 95 else figures or speed
            self.update(task, completed=done, figures=beside)
            if not console.is_terminal and (done == total or now - printed > 10):
                printed = now
                left = datetime.timedelta(seconds=min(10**12, round((total - done) * per_step / rate)))
                place = f"step {done}/{total}" if figures else f"{done:,}/{total:,} {unit}"
                print(f"{label}  {place}  {speed}  {left} left  {figures}".rstrip(), flush=True)
        return show

    def reporter(self, label, cfg):
        """A callback for ``msae.train``."""
        text = "FVU {fvu:.3f}  L0 {l0:.1f}  dead {dead:.1%}"
        show = self.counter(label, cfg.steps, per_step=cfg.batch_size)
        return lambda found: show(found["step"], found["rows_per_second"], text.format(**found))


# -------------------------------------------------------------------------------------------------------- toy

# Replications of the ReLU + L1 original (noanabeshima/matryoshka-saes): a post of 2026, one seed.
PUBLISHED = {"matryoshka": {"fvu": 0.021, "l0": 1.13, "clean": 20, "features": 20},
             "vanilla": {"fvu": 0.000, "l0": 0.86, "clean": 11, "features": 20}}
COLOURS = ((13, 8, 42), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # dark 0 to bright 1


@main.command()
@option("--config", type=OLD_FILE, default=HERE / "toy_config.json", show_default="toy_config.json",
        help="The feature tree and the training settings.")
@option("--seed", type=IntRange(0, 2**62), default=0, help="First seed: of directions, rows and weights.")
@option("--seeds", type=IntRange(min=1), default=1, help="Number of seeds, one after the other.")
@option("--out", type=FOLDER, default="runs/toy", help="Folder for toy.json and toy.svg.")
def toy(config, seed, seeds, out):
    """The absorption experiment: a Matryoshka and a vanilla SAE on a tree of features.

    \b
    Examples:
      python cli.py toy
      python cli.py toy --seeds 10 --out runs/ten-seeds
    """
    settings, results = read_json(config), []
    toy_setup(settings, seed)
    folder = writable(Path(out))
    torch.set_num_threads(1)  # 20 x 20 matrices: threads would only wait for each other
    for number in range(seed, seed + seeds):
        started, (tree, configs) = time.perf_counter(), toy_setup(settings, number)
        with Lines() as lines:
            saes = {name: msae.train(tree, cfg, on_log=lines.reporter(f"seed {number} {name}", cfg))
                    for name, cfg in configs.items()}
        figures = {name: msae.toy_figures(sae, tree, seed=number + 1_000_003) for name, sae in saes.items()}
        results.append({"seed": number, "seconds": round(time.perf_counter() - started, 1), **figures})
        if number == seed:
            maps = heat_maps(tree, saes)
    columns = ("", "seed", "FVU", "L0", "clean", "cos", "min", "absorbed")
    show_table("True features recovered", columns, toy_rows(results))
    columns = ("parent", "children", *PUBLISHED)
    show_table(f"Absorption by child, seed {seed}", columns, absorption_rows(results[0]))
    console.print(terminal_maps(maps))
    msae.write(folder / "toy.json", results[0] if seeds == 1 else {"seeds": results})
    msae.write(folder / "toy.svg", svg(maps))
    taken = sum(result["seconds"] for result in results)
    click.echo(f"{taken:.0f} s; wrote {folder / 'toy.json'} and {folder / 'toy.svg'}")


def toy_setup(settings, seed=0):
    """The tree and the configs {"matryoshka", "vanilla"} of settings: tree, train, d_model, norm_std."""
    for name in {"tree", "train", *settings}:
        if name not in ("tree", "train", "d_model", "norm_std"):
            raise ValueError(f"the toy's settings are tree, train, d_model, norm_std, got {name!r}")
        if name in ("tree", "train") and not isinstance(settings.get(name), dict):
            raise ValueError(f"{name} must be an object, got {settings.get(name)!r:.100}")
    size = {name: settings[name] for name in ("d_model", "norm_std") if name in settings}
    tree = new_config({"spec": settings["tree"], "seed": seed, **size}, kind=msae.FeatureTree)
    cfg = new_config({"n_latents": len(tree.parent_of), **settings["train"], "seed": seed})
    return tree, {"matryoshka": cfg, "vanilla": cfg.vanilla()}


def toy_rows(results):
    """A row per SAE and seed, the means over several seeds, and the published figures."""
    def row(name, seed, figures):
        rates = [pair["rate"] for pair in figures.get("absorption", ()) if pair["rate"] is not None]
        cosines = (f"{figures[key]:.3f}" if key in figures else "" for key in ("mean_cosine", "min_cosine"))
        clean = f"{round(figures['clean'], 2):g}/{figures['features']:g}"
        absorbed = f"{fmean(rates):.2f}" if rates else ""
        return name, str(seed), f"{figures['fvu']:.3f}", f"{figures['l0']:.2f}", clean, *cosines, absorbed

    for name, published in PUBLISHED.items():
        own = [result[name] for result in results]
        yield from (row(name, result["seed"], result[name]) for result in results)
        if len(own) > 1:
            mean = {key: fmean(figures[key] for figures in own) for key in own[0] if key != "absorption"}
            mean["absorption"] = [pair for figures in own for pair in figures["absorption"]]
            yield row(name, "mean", mean)
        yield row("  published", "", published)
        yield None


def absorption_rows(result):
    """The rate of every parent-child pair, a parent per row."""
    for parent in dict.fromkeys(pair["parent"] for pair in result["matryoshka"]["absorption"]):
        own = [[pair for pair in result[sae]["absorption"] if pair["parent"] == parent] for sae in PUBLISHED]
        rates = [["  - " if p["rate"] is None else f"{p['rate']:.2f}" for p in pairs] for pairs in own]
        yield str(parent), " ".join(str(pair["child"]) for pair in own[0]), *map("  ".join, rates)


def heat_maps(tree, saes):
    """Three (feature, latent) maps: what each latent does when one feature, with its parents, is on."""
    pure, norms = tree.pure_features(), tree.directions.norm(dim=1)
    acts = {name: msae.matched_acts(sae, tree, pure @ tree.directions) / norms for name, sae in saes.items()}
    return {name: values.tolist() for name, values in {"true features": pure, **acts}.items()}


def colour(value):
    """Hex colour of a value, which is clipped to [0, 1]."""
    stops = np.linspace(0, 1, len(COLOURS))
    return "#" + "".join(f"{round(np.interp(value, stops, channel)):02x}" for channel in zip(*COLOURS))


def terminal_maps(maps):
    """The maps, two cells to a character; shades of grey characters where there is no colour."""
    panels = []
    for title, values in maps.items():
        text = Text(f"{title}\n", no_wrap=True)
        for upper, lower in zip(values[::2], [*values[1::2], [0.0] * len(values)]):
            for a, b in zip(upper, lower):
                if console.color_system and not console.no_color:
                    text.append("▀", f"{colour(a)} on {colour(b)}")
                else:
                    text.append(" .:*#"[round(4 * min(max((a + b) / 2, 0), 1))])
            text.append("\n")
        panels.append(text)
    return Columns(panels, padding=(0, 3))


def svg(maps, cell=11):
    """The maps as a picture: a row per input, one feature and its parents; a column per matched latent."""
    side, parts = cell * len(maps["true features"]), []

    def label(text, place, style='font-size="11" fill="#667"'):
        parts.append(f'<text transform="translate({place}" text-anchor="middle" {style}>{text}</text>')

    label("input: one feature and its parents", f"22 {34 + side / 2}) rotate(-90)")
    for panel, (title, values) in enumerate(maps.items()):
        left = 32 + panel * (side + 26)
        label(title.capitalize(), f"{left + side / 2} 22)", 'font-size="14" font-weight="600"')
        label("latent matched to feature" if panel else "feature", f"{left + side / 2} {side + 52})")
        parts += [f'<rect x="{left + j * cell}" y="{34 + i * cell}" width="{cell - 1}" height="{cell - 1}" '
                  f'fill="{colour(value)}"/>' for i, row in enumerate(values) for j, value in enumerate(row)]
    size = f"{20 + len(maps) * (side + 26)} {side + 62}"
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" '
            'font-family="system-ui, sans-serif">\n<rect width="100%" height="100%" rx="8" fill="#fff"/>\n'
            + "\n".join(parts) + "\n</svg>\n")


# ------------------------------------------------------------------------------------------------------ train


def numbers(ctx, param, value):
    """``--prefixes`` as a tuple of lengths or fractions."""
    try:
        return value and tuple(float(n) if "." in n else int(n) for n in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers with commas between") from None


@main.command()
@option("--acts", required=True, help="A .npy of floats, (rows, D) or (docs, positions, D), or a folder.")
@option("--latents", "n_latents", type=int, help="Number of latents F.  [required, here or in --config]")
@option("--k", type=float, help="Active latents per row, on average.  [default: 30]")
@option("--prefixes", callback=numbers, help="Lengths or fractions.  [default: F/16, F/8, F/4, F/2, F]")
@option("--pareto", "n_prefixes", type=int, help="Instead, sample this many prefixes at every step.")
@option("--spare", type=click.FloatRange(0, 1000), help="Start with this share of F more latents and prune "
        "the least energetic: lowers FVU by about 1 %.  [default: 0.25]")
@option("--baseline", is_flag=True, help="Then train the vanilla twin on the same batches and show both.")
@option("--steps", type=int, help="Optimizer steps.  [default: 10000]")
@option("--batch-size", type=int, help="Rows per step, of all processes together.  [default: 2048]")
@option("--lr", type=float, help="Peak learning rate of Adam.  [default: 0.24 / sqrt(F), at most 0.01]")
@option("--seed", type=int, help="Of weights, row order and held-out rows.  [default: 0]")
@device_option
@dtype_option
@option("--out", type=FOLDER, help="A new folder.  [default: a new one under runs/]")
@option("--resume", is_flag=True, help="Go on with the run in --out, or in the newest default folder.")
@option("--save-minutes", type=float, default=10, help="Minutes between checkpoints.")
@option("--config", type=OLD_FILE, help="JSON with any TrainConfig fields; options override it.")
def train(acts, device, out, config, spare, baseline, resume, save_minutes, **options):
    """Train on activations and save a checkpoint that SAELens opens too.

    A tenth of the rows (at most 16,384) is set aside in random blocks for the figures at the end (eval.json).
    Ctrl-C saves first; the same command with --resume goes on. With several processes, torchrun takes the
    place of python. The checkpoint keeps model_name, hook_name, dataset, base_model of acts.npy.json, if any.

    \b
    Examples:
      python cli.py train --acts acts.npy --latents 3072
      python cli.py train --acts acts.npy --latents 3072 --pareto 10 --k 40 --out runs/pareto
      python cli.py train --acts shards/ --latents 3072 --baseline
      torchrun --nproc-per-node 2 cli.py train --acts acts.npy --latents 3072
    """
    cfg, beside, figures = run_config(config, spare, options), Path(f"{Path(acts)}.json"), {}
    about = read_json(beside) if beside.is_file() else {}
    about = {name: about[name] for name in ORIGIN if name in about}
    with processes(device) as (device, first):
        rows, held_out = msae.Rows(acts).split_off(0.1, cfg.seed)
        default = Path("runs", f"{Path(acts).stem}-{cfg.n_latents}")
        with contextlib.nullcontext(Path(out)) if out else default_folder(default, resume, first) as folder:
            runs = [("matryoshka", cfg, folder), ("vanilla", cfg.vanilla(), folder / "vanilla")]
            runs = runs[: 1 + baseline]
            goes_on = [resume and (where == folder or (where / msae.STATE).exists()) for *_, where in runs]
            for (name, own, where), again in zip(runs, goes_on):
                with resume_hint(where, folder, out), Lines() as lines:
                    show = lines.reporter(name if baseline else "train", own) if first else None
                    sae = msae.train(rows, own, device=device, out=where, resume=again, metadata=about,
                                     on_log=show, save_minutes=save_minutes)
                if first:
                    figures[name] = msae.evaluate(sae, held_out)
                    msae.write(where / EVAL, figures[name])
    if first:
        show_figures(figures, "held-out rows")
        click.echo("dead: latents that never fire on these rows; cosine: mean over latents of the largest "
                   f"with another decoder row\n\nsaved {folder}\n"
                   f"load it with  sae = msae.MatryoshkaSAE.load({str(folder)!r})")


def run_config(path, spare, options):
    """The ``TrainConfig`` of a JSON file and the options given, which win; ``spare``: share of latents."""
    given = {name: value for name, value in options.items() if value is not None}
    settings = {**(read_json(path) if path else {}), **given}
    if ("prefixes" in given) != ("n_prefixes" in given):
        settings.pop("n_prefixes" if "prefixes" in given else "prefixes", None)
    if spare is None and "n_latents_start" in settings:
        return new_config(settings)
    cfg = new_config({**settings, "n_latents_start": None})
    more = round((0.25 if spare is None else spare) * cfg.n_latents)
    return dataclasses.replace(cfg, n_latents_start=cfg.n_latents + more)


@contextlib.contextmanager
def processes(device):
    """(this process's device, whether it is the first); joins the processes that torchrun started, if any."""
    several, on_cuda, old = "LOCAL_RANK" in os.environ, device.startswith("cuda"), {}
    for name in {"SIGTERM", "SIGHUP"} & set(dir(signal)):  # Windows has no SIGHUP
        number = getattr(signal, name)
        if signal.getsignal(number) is not signal.SIG_IGN:
            old[number] = signal.signal(number, lambda number, _: sys.exit(128 + number)) or signal.SIG_DFL
    try:
        if several and on_cuda:
            if device != "cuda":
                raise click.BadParameter(f"{device!r} must have no number under torchrun, which gives each "
                                         "process its own", param_hint="--device")
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(msae.check_device(device))
        if several:
            own = torch.device(device) if on_cuda else None
            torch.distributed.init_process_group("nccl" if on_cuda else "gloo", device_id=own)
        yield device, msae.rank_and_world()[0] == 0
    except RuntimeError as error:
        if not several or out_of_memory(error):
            raise
        raise ConnectionError(f"another process of this run is lost: {msae.one_line(error)}") from None
    finally:
        if several and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for number, handler in old.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def default_folder(path, resume, first):
    """The newest of ``path``, ``path-2``, ... to ``resume``; else the next, made by the ``first`` process.

    A run that starts at the same time finds it taken. It is removed again if nothing was written.
    """
    names = [path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 10_000))]
    there = [(name / msae.STATE if resume else name).exists() for name in names]
    newest = max((i for i, found in enumerate(there) if found), default=-1)
    folder = names[max(newest, 0)]
    for name in names[newest + 1:] if first and not resume else ():
        with contextlib.suppress(FileExistsError):
            name.mkdir(parents=True)
            folder = name
            break
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):  # it holds something
            folder.rmdir()
            folder.parent.rmdir()


@contextlib.contextmanager
def resume_hint(where, folder, out):
    """Say how to go on when a signal or a lost process ends the training in the folder ``where``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, RuntimeError):
        if (where / msae.STATE).exists() and os.environ.get("RANK", "0") == "0":
            state = torch.load(where / msae.STATE, map_location="cpu", weights_only=True, mmap=True)
            several = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
            place = [] if out else ["--out", str(folder)]
            command = [*(several if "LOCAL_RANK" in os.environ else ["python"]), *sys.argv, *place]
            command += [] if "--resume" in sys.argv else ["--resume"]
            click.echo(f"step {state['trainer']['steps_done']} is saved in {where}; go on with\n"
                       f"  {shlex.join(command)}", err=True)
        raise


def show_figures(figures, kind):
    """A table of figures on rows: for each SAE a row per prefix, the whole SAE last."""
    rows = []
    for name, found in figures.items():
        for level in found["prefixes"]:
            rows.append([name, f"{level['latents']:,}", f"{level['fvu']:.4f}", f"{level['l0']:.2f}",
                         f"{level['max_cosine']:.3f}"])
            name = ""
        rows[-1].append(f"{found['dead']:.2%}")
        rows.append(None)
    columns = ("", "latents", "FVU", "L0", "cosine", "dead")
    show_table(f"{next(iter(figures.values()))['rows']:,} {kind}", columns, rows)


# --------------------------------------------------------------------------------------- harvest and evaluate


def tiny_model(path, layer, device):
    """(model, names of the places where its residual stream can be read), on the device."""
    device, model = msae.check_device(device), msae.TinyModel.load(path)
    if layer >= len(model.layers):
        text = f"{layer} must be at most {len(model.layers) - 1}, after the last block of {path}"
        raise click.BadParameter(text, param_hint="--layer")
    return model.to(device), [*(f"torso.{i}.input" for i in range(len(model.torso))), "lm_head.input"]


def token_reader(path, model, batch_size):
    """A function that starts reading the token file, or the published one of that name, anew."""
    if path in PUBLISHED_TOKENS and not Path(path).exists():
        path = msae.download(DATASET, [path], repo_type="dataset") / path
    n_vocab, n_positions = len(model.embed.weight), model.pos_embed.shape[1]
    return functools.partial(read_tokens, path, n_vocab, n_positions, batch_size)


def read_tokens(path, n_vocab=10_000, n_positions=256, batch_size=64):
    """Token ids in batches (B, T), of a ``.jsonl`` with {"tok_ids": [...]} a line or a ``.npy`` (docs, T).

    ``ValueError`` names the line or row with an id outside [0, n_vocab), more than ``n_positions`` ids, or
    another length than the first.
    """
    docs, length = [], None
    for where, ids in npy_docs(path) if str(path).endswith(".npy") else jsonl_docs(path):
        length = length or len(ids)
        if not 0 < len(ids) <= n_positions:
            rule = f"tok_ids must be 1 to {n_positions} ids, the positions of the model"
            raise ValueError(f"{where}: {rule}, got {len(ids)}")
        if len(ids) != length:
            raise ValueError(f"{where}: tok_ids must be {length} ids as in the first, got {len(ids)}")
        low, high = ids.min(), ids.max()
        if low < 0 or high >= n_vocab:
            raise ValueError(f"{where}: ids must lie in [0, {n_vocab}), got {low if low < 0 else high}")
        docs.append(ids.astype(np.int64))
        if len(docs) == batch_size:
            yield torch.from_numpy(np.stack(docs))
            docs = []
    if docs:
        yield torch.from_numpy(np.stack(docs))


def npy_docs(path):
    array = msae.read_npy(path)
    if array.dtype.kind not in "iu" or array.ndim != 2:
        raise ValueError(f"{path} must hold whole numbers (docs, positions), got {array.dtype} {array.shape}")
    return ((f"{path}, row {i}", row) for i, row in enumerate(array))


def jsonl_docs(path):
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(2**20), b""), 1):  # no line is as long
            where = f"{path}, line {number}"
            with msae.reading(where, '{"tok_ids": [whole numbers]}'):
                ids = np.array(json.loads(line)["tok_ids"])
                if ids.ndim != 1 or ids.dtype.kind != "i":
                    raise ValueError(f"they are {ids.dtype} {ids.shape}")
            yield where, ids


@main.command()
@model_option
@layer_option
@device_option
@option("--tokens", default="train.jsonl",
        help='Token ids: a .jsonl of {"tok_ids": [...]}, a .npy (docs, positions), or the published file.')
@option("--max-rows", type=IntRange(min=1), default=30_000_000, help="Stop after this many.")
@option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", help="Of the rows.")
@option("--out", type=NEW_FILE, default="acts.npy", help="A new file.")
def harvest(model_path, layer, device, tokens, max_rows, dtype, out):
    """Residual stream activations of TinyModel as rows for train, without those of [BEGIN] and [PAD].

    \b
    Examples:
      python cli.py harvest
      python cli.py harvest --layer 2 --max-rows 1000000 --out layer2.npy
      python cli.py harvest --model mine.pt --tokens tokens.jsonl
    """
    out, total = Path(out), 0
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another --out")
    folder = writable(out.parent)
    model, hooks = tiny_model(model_path, layer, device)
    width, batches = model.embed.weight.shape[1], token_reader(tokens, model, batch_size=64)
    for ids in batches():  # all of them are checked before the first is used
        total = min(total + int((~torch.isin(ids, torch.tensor(DROPPED))).sum()), max_rows)
        if total == max_rows:
            break
    size, free = total * width * np.dtype(dtype).itemsize, shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"{out} would take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: "
                      "lower --max-rows, or choose another --out")
    with Lines() as lines:
        n = msae.harvest(model, model.layers[layer], batches(), out, at="input", drop=DROPPED, dtype=dtype,
                         max_rows=max_rows, on_rows=lines.counter("harvest", total))
    about = {"model_name": Path(model_path).name, "hook_name": hooks[layer],
             "dataset": tokens if Path(tokens).exists() else DATASET}
    if not Path(model_path).exists():  # then it came from the Hub
        about["base_model"] = msae.TINY_MODEL[0]
    msae.write(f"{out}.json", about)
    click.echo(f"{n:,} rows of width {width} in {out}; next:  "
               f"python cli.py train --acts {shlex.quote(str(out))} --latents 3072")


@main.command("eval")
@click.argument("checkpoints", nargs=-1, required=True)
@option("--acts", required=True, help="Activations that training did not see, as for train.")
@option("--labels", type=OLD_FILE, help="A .npy with a whole number, or 0 and 1s, for each row of --acts: "
        "adds probing, absorption and erasure, on at most 20,000 of them.")
@option("--tokens", help="Ids as for harvest: adds the loss of TinyModel with reconstructions spliced in.")
@option("--max-tokens", type=IntRange(min=1), default=100_000, help="Use this many of --tokens.")
@model_option
@layer_option
@device_option
@option("--out", type=NEW_FILE, help="JSON file.  [default: eval.json in each checkpoint's folder]")
def evaluate(checkpoints, acts, labels, tokens, max_tokens, model_path, layer, device, out):
    """Figures of one or more checkpoints over a whole set of rows, for each prefix.

    \b
    Examples:
      python cli.py eval runs/acts-3072 --acts held.npy
      python cli.py eval runs/acts-3072 runs/acts-3072/vanilla --acts held.npy --labels labels.npy
      python cli.py eval runs/acts-3072 --acts held.npy --tokens validation.jsonl --layer 3
    """
    rows, device, results = msae.Rows(acts), msae.check_device(device), {}
    x, y, label_names = label_rows(labels, rows) if labels else (None, None, None)
    saes = {path: msae.MatryoshkaSAE.load(path) for path in checkpoints}
    for path, sae in saes.items():
        if len(sae.b_dec) != rows.d_model:
            raise ValueError(f"{path} is for rows of width {len(sae.b_dec)}, {acts} has {rows.d_model}")
    if tokens:
        model, hooks = tiny_model(model_path, layer, device)
        batches = token_reader(tokens, model, batch_size=8)  # logits take much memory
        for path, sae in saes.items():
            if sae.metadata.get("hook_name") in {*hooks} - {hooks[layer]}:
                text = f"{layer} is not where {path} was trained, {sae.metadata['hook_name']}"
                raise click.BadParameter(text, param_hint="--layer")
    files = {Path(out): None} if out else {Path(path) / EVAL: path for path in saes if Path(path).is_dir()}
    for file in files:
        writable(file.parent)
    ends = [Path(path).name for path in saes]
    names = {path: end if ends.count(end) == 1 else path for path, end in zip(saes, ends)}
    with Lines() as lines:
        for path, sae in saes.items():
            name, more = names[path], {}
            sae.to(device)
            if tokens:  # and labels first, as they may be refused and rows may take hours
                count = lines.counter(f"{name} spliced in", max_tokens, "tokens")
                ids = limited(batches(), max_tokens, count)
                more["loss"] = msae.loss_recovered(model, model.layers[layer], sae, ids, drop=DROPPED)
            if labels:
                more["labels"] = {**msae.probe(sae.cpu(), x, y), "labels": label_names}
            figures = msae.evaluate(sae.to(device), rows, on_rows=lines.counter(name, len(rows)))
            results[path] = {"checkpoint": path, "acts": acts, **figures, **more}
    show_results({names[path]: found for path, found in results.items()})
    whole = list(results.values())
    whole = whole[0] if len(whole) == 1 else whole
    for file, path in files.items():
        msae.write(file, results.get(path, whole))
    click.echo(f"wrote {', '.join(map(str, files)) or 'nothing: no folder, no --out'}")


def label_rows(path, rows, most=20_000):
    """(x (n, D), y (n, C) booleans, C names) of at most ``most`` of ``rows``, in random whole blocks.

    ``path``: a ``.npy`` with a whole number, or C of 0 and 1, for each row; ``ValueError`` for anything else.
    """
    labels, n = msae.read_npy(path), len(rows)
    labels = labels.reshape(-1) if labels.size == n else labels
    if labels.dtype.kind not in "iub" or labels.ndim not in (1, 2) or len(labels) != n or labels.size == 0:
        found = f"{labels.dtype} {labels.shape}"
        raise ValueError(f"{path} must hold whole numbers ({n},) or 0 and 1 ({n}, C), got {found}")
    values = np.unique(labels).astype(np.int64)
    if len(values) > 1000 or labels.ndim == 2 and not set(values) <= {0, 1}:
        rule = "at most 1000 different values" if labels.ndim == 1 else "0 and 1 where it has columns"
        raise ValueError(f"{path} must hold {rule}, got {values[:5]}, ... ({len(values)})")
    sizes = np.array([stop - start for _, start, stop in rows.blocks])
    order = np.random.default_rng(0).permutation(len(sizes))
    chosen = np.sort(order[sizes[order].cumsum() <= most])
    blocks = np.split(labels, sizes.cumsum()[:-1])
    y = np.concatenate([blocks[i] for i in chosen]).astype(np.int64)
    names = values.tolist() if y.ndim == 1 else range(y.shape[1])
    y = y[:, None] == values if y.ndim == 1 else y == 1
    return torch.from_numpy(rows.keep(chosen).read()), torch.from_numpy(y), [str(name) for name in names]


def limited(batches, n_most, on_tokens):
    """The first batches of token ids, ``n_most`` ids or a few more; ``on_tokens`` gets the number done."""
    done = 0
    for ids in batches:
        yield ids
        done += ids.numel()
        on_tokens(min(done, n_most))
        if done >= n_most:
            return


def show_results(results):
    """The tables of eval."""
    show_figures(results, "rows")
    show_frequencies(results)
    for name, found in results.items():
        if "loss" in found:
            loss = found["loss"]
            rows = [("clean", "", f"{loss['clean']:.4f}", "100.0%")]
            rows += [("zeroed", "", f"{loss['zeroed']:.4f}", "0.0%"), None]
            for level in loss["prefixes"]:
                numbers = f"{level['latents']:,}", f"{level['spliced']:.4f}"
                rows.append(("spliced", *numbers, percent(level["recovered"])))
            title = f"Cross-entropy over {loss['tokens']:,} tokens, {name} spliced in"
            show_table(title, ("", "latents", "loss", "recovered"), rows)
        if "labels" in found:
            show_labels(name, found["labels"])


def percent(share):
    return "" if share is None else f"{share:.1%}"


def show_frequencies(results):
    """How many latents fire how often: a row per half decade, a column per SAE."""
    found, rows = [each["frequencies"] for each in results.values()], []
    edges, counts = found[0]["edges"], np.array([each["counts"] for each in found])
    used, width = counts.any(axis=0).nonzero()[0], max(6, (console.width - 20) // len(counts) - 12)
    for i in range(used.min(), used.max() + 1) if len(used) else ():
        bars = ("█" * round(width * column[i] / max(1, column.max())) for column in counts)
        cells = (f"{bar} {n:,}" for bar, n in zip(bars, counts[:, i]))
        rows.append((f"{edges[i]:.1e} to {edges[i + 1]:.1e}", *cells))
    show_table("Latents by the share of rows they fire on", ("fires on", *results), rows)


def show_labels(name, found):
    rows = [("raw rows", "", "", f"{found['raw']['f1']:.3f}"), None]
    for level in found["prefixes"]:
        f1 = {score["k"]: f"{score['f1']:.3f}" for score in level["probes"]}
        rows.append((f"{level['latents']:,}", *(f1.get(k, "") for k in (1, 2, 5)),
                     percent(level["absorption"]), f"{level['splitting']:.1f}"))
    erased = (f"top {each['latents']} {each['own']:.3f} {each['others']:.3f}" for each in found["erasure"])
    show_table(f"{name}, {len(found['labels'])} labels on {found['rows']:,} rows: F1 of k-sparse probes",
               ("latents", "k=1", "2", "5", "absorbed", "split"), rows,
               caption="erasure, fall of balanced accuracy, own and others': " + "; ".join(erased))


# ------------------------------------------------------------------------------------------------------ bench


@main.command()
@option("--latents", type=IntRange(1, 2**31), default=3072, help="Number of latents F.")
@option("--d-model", type=IntRange(1, 2**31), default=768, help="Width D of the rows.")
@option("--batch-size", type=IntRange(1, 2**31), default=2048, help="Rows per step.")
@option("--k", type=float, default=30, help="Active latents per row.")
@option("--steps", type=IntRange(min=1), default=20, help="Steps to time, after three to warm up.")
@device_option
@dtype_option
def bench(latents, d_model, batch_size, k, steps, device, dtype):
    """This machine's training step, beside the encoder product alone, which no SAE can do without.

    \b
    Examples:
      python cli.py bench
      python cli.py bench --latents 24576 --steps 10
    """
    device, cfg = msae.check_device(device), msae.TrainConfig(latents, k, batch_size=batch_size, dtype=dtype)
    trainer, on_cuda = msae.Trainer(cfg, d_model, device), device.type == "cuda"
    x = torch.randn(batch_size, 8) @ torch.randn(8, d_model) / 2 + torch.randn(batch_size, d_model)
    x = x.to(device) / d_model**0.5
    a, W = (t.to(getattr(torch, trainer.dtype)) for t in (x, torch.randn(d_model, latents, device=device)))
    product, wait = a @ W, functools.partial(torch.cuda.synchronize, device) if on_cuda else lambda: None

    def clock(call, *arguments, **options):
        wait()
        started = time.perf_counter()
        call(*arguments, **options)
        wait()
        return time.perf_counter() - started

    pairs = [(clock(torch.mm, a, W, out=product), clock(trainer.step, x)) for _ in range(steps + 3)]
    alone, step = (median(times) for times in zip(*pairs[3:]))  # in turn, so that drift cancels
    peak = torch.cuda.max_memory_allocated(device) if on_cuda else peak_memory()
    console.print(f"batch {batch_size:,}, width {d_model:,}, {latents:,} latents, k {k:g}, "
                  f"{len(trainer.step_prefixes())} prefixes, {trainer.dtype} on {device}")
    show_table(None, ("", ""), show_header=False, rows=[
        ("encoder product alone", f"{1e3 * alone:.1f} ms"),
        ("training step", f"{1e3 * step:.1f} ms, {step / alone:.2f} x the product"),
        ("rows per second", f"{batch_size / step:,.0f}"),
        ("peak memory of this process", f"{peak / 2**20:,.0f} MiB" if peak else "not known here")])


def peak_memory():
    """Peak resident memory of this process in bytes; 0 where the system does not tell."""
    with contextlib.suppress(ImportError):
        import resource
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return 0


# ------------------------------------------------------------------------------------------------------- push

CARD = """---
library_name: saelens
license: {license}
{base}tags: [sparse-autoencoder, matryoshka, mechanistic-interpretability]
---

# {title}

A Matryoshka sparse autoencoder: {F} latents for raw activations of width {D}. Each of its prefixes, the first
{prefixes} latents, is a sparse autoencoder too.

{facts}

## Figures

{figures}

## Use

With `msae.py`, one file:

```python
import torch, msae

sae = msae.MatryoshkaSAE.load({source})
x = torch.randn(8, {D})  # raw activations, (rows, {D})
codes = sae.encode(x)  # (8, {F})
general = sae.encode(x, prefix={p})  # (8, {p}): the SAE that the first {p} latents are
recon = sae.decode(codes)  # (8, {D})
```

With SAELens (`pip install sae-lens`):

```python
import torch
from huggingface_hub import snapshot_download
from sae_lens import SAE

sae = SAE.load_from_disk(snapshot_download({source}))
codes = sae.encode(torch.randn(8, {D}))
recon = sae.decode(codes)
```
"""
LEGEND = """On {:,} rows {}. FVU: squared error over variance; L0: active latents per row;
dead: latents that never fire; cosine: mean over latents of the largest with another decoder row."""


@main.command()
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.argument("repo", required=False)
@option("--private/--public", default=None, show_default=False, help="Of a new repository.")
@option("--revision", help="Branch to commit to, created if it is new.  [default: main]")
@option("--commit-message", default="Upload a Matryoshka SAE", help="First line of the commit.")
@option("--create-pr", is_flag=True, help="Open a pull request with the commit.")
@option("--token", help="Access token.  [default: of `hf auth login` or HF_TOKEN]")
@option("--license", default="mit", help="Of the weights, for the card.")
@option("--dry-run", is_flag=True, help="Show what would go up, without touching the network.")
def push(checkpoint, repo, private, token, license, dry_run, revision, create_pr, commit_message):
    """Upload CHECKPOINT to REPO on the Hugging Face Hub, with a model card, in one commit.

    CHECKPOINT defaults to the newest under runs/, REPO to its folder's name under your name. Weights, configs
    and metrics go up; the state of the optimizer never.

    \b
    Examples:
      python cli.py push
      python cli.py push runs/mine ada/mine --private
      python cli.py push runs/mine ada/mine --dry-run
    """
    if create_pr and revision:
        raise click.UsageError("--create-pr opens a pull request to main: leave --revision out")
    folder = (checkpoint or newest_checkpoint()).resolve()
    sae, repo = msae.MatryoshkaSAE.load(folder), repo or folder.name
    names = [name for name in (msae.WEIGHTS, msae.CONFIG, msae.METRICS, EVAL) if (folder / name).is_file()]
    files = {name: (folder / name).read_bytes() for name in names}
    files["config.json"] = files[msae.CONFIG]  # the Hub counts downloads by it
    figures = card_figures(folder)
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.utils import validate_repo_id
        validate_repo_id(repo)
        api = HfApi(token=token)
        if dry_run:
            name = repo if "/" in repo else f"YOUR_NAME/{repo}"
        else:
            name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        files["README.md"] = model_card(sae, figures, name, license, revision).encode()
        if dry_run:
            lines = "".join(f"{len(content):>13,}  {file}\n" for file, content in files.items())
            click.echo(f"would push {folder} to {name}, in one commit:\n{lines}")
            click.echo(files["README.md"])
            return
        if revision and not api.revision_exists(name, revision):
            api.create_branch(name, branch=revision)
        commit = api.create_commit(name, [CommitOperationAdd(*file) for file in files.items()],
                                   commit_message=commit_message, revision=revision, create_pr=create_pr)
    except Exception as error:  # of huggingface_hub, its HTTP library, Xet
        text = re.sub("Bearer .*", "Bearer ...", msae.one_line(error))
        raise OSError(f"{folder} cannot be pushed to {repo}: {text}") from None
    click.echo(commit.pr_url or f"{api.endpoint}/{name}" + (f"/tree/{revision}" if revision else ""))


def newest_checkpoint():
    """The folder under runs/ that was saved last; a vanilla twin counts as part of its Matryoshka SAE."""
    found = [path for path in Path("runs").rglob(msae.WEIGHTS) if not (path.parents[1] / path.name).exists()]
    if not found:
        raise FileNotFoundError("there is no checkpoint under runs/: train one, or name its folder")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def model_card(sae, figures, repo, license, revision):
    """The README.md of ``repo``."""
    known = {name: value for name, value in sae.metadata.items() if value}
    facts = [f"- {name.replace('_', ' ')}: {known.get(name, 'not recorded')}" for name in (*ORIGIN, "k")]
    if isinstance(known.get("training"), dict):
        settings = (f"{name} {value}" for name, value in known["training"].items() if value is not None)
        facts.append(f"- settings: {', '.join(settings)}")
    return CARD.format(
        license=json.dumps(license), title=repo.split("/")[1], figures=figures, facts="\n".join(facts),
        F=len(sae.b_enc), D=len(sae.b_dec), p=sae.prefixes[0], prefixes=", ".join(map(str, sae.prefixes)),
        base=f"base_model: {json.dumps(known['base_model'])}\n" if "base_model" in known else "",
        source=f"{repo!r}, revision={revision!r}" if revision else repr(repo))


def card_figures(folder):
    """A table of eval.json, or a sentence on the last line of metrics.jsonl."""
    with msae.reading(f"{EVAL} or {msae.METRICS} in {folder}", "what training writes"):
        if (folder / EVAL).is_file():
            found = read_json(folder / EVAL)
            rows = [f"| {p['latents']:,} | {p['fvu']:.4f} | {p['l0']:.2f} | | |" for p in found["prefixes"]]
            rows[-1] = f"{rows[-1][:-4]} {found['dead']:.2%} | {found['max_cosine']:.3f} |"
            of = f"of {found['acts']}" if "acts" in found else "that training did not see"
            head = ["| latents | FVU | L0 | dead | cosine |", "|---|---|---|---|---|"]
            return "\n".join([*head, *rows, "", LEGEND.format(found["rows"], of)])
        text, metrics = "There was no evaluation on held-out rows.", folder / msae.METRICS
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        if lines:
            text += (" On a training batch at step {step:,}: FVU {fvu:.4f}, L0 {l0:.2f}, dead {dead:.2%}."
                     .format(**json.loads(lines[-1])))
        return text


if __name__ == "__main__":
    signal.signal(signal.SIGINT, before)
    main()
