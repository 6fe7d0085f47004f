"""Command line over msae: parse, one library call, show."""

import os
import signal

if __name__ == "__main__":  # Ctrl-C during the imports, which take seconds
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, lambda *_: (os.write(2, b"interrupted\n"), os._exit(130)))

import contextlib
import datetime
import itertools
import json
import math
import shlex
import shutil
import statistics
import sys
import time
from pathlib import Path

import click
import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

import msae

HERE = Path(__file__).parent
EVAL, ABOUT = "eval.json", ("model_name", "hook_name", "dataset", "base_model")
OUT_OF_MEMORY = ("allocate", "out of memory", "size calculation overflowed")  # in torch's messages
console = Console(markup=False, emoji=False, highlight=False)

# Replications of the ReLU + L1 original (noanabeshima/matryoshka-saes): a post of 2026, one seed.
PUBLISHED = {"matryoshka": {"fvu": 0.021, "l0": 1.13, "clean": 20, "features": 20},
             "vanilla": {"fvu": 0.000, "l0": 0.86, "clean": 11, "features": 20}}
COLOURS = ((13, 8, 42), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # dark 0 to bright 1

DTYPES = click.Choice(["float32", "bfloat16", "float16"])
device_option = click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                             show_default="cuda if there is one, else cpu", help="cpu, cuda, cuda:1, ...")
dtype_option = click.option("--dtype", type=DTYPES, help="Of the products; weights stay float32.  "
                            "[default: bfloat16 on cuda, else float32]")


class Commands(click.Group):
    """A group that turns what the library refuses into one line and an exit code, never a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (OSError, ValueError) as error:
            text = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
            raise click.ClickException(" ".join(text.split())) from None
        except (MemoryError, RuntimeError) as error:
            text = msae.one_line(error)
            if isinstance(error, RuntimeError) and not any(sign in text for sign in OUT_OF_MEMORY):
                raise
            raise click.ClickException(f"not enough memory, try fewer latents or a smaller batch: {text}") from None
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            raise SystemExit(130) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main():
    """Matryoshka sparse autoencoders: train them, look at them, share them.

    \b
    Examples:
      python cli.py toy
      python cli.py train --help
    """
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # not a line for each try of a connection
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def read_json(path):
    """The object in a JSON file; ``ValueError`` names the file and the place of the fault."""
    with msae.reading(path, "a file with a JSON object"):
        return dict(json.loads(Path(path).read_text(encoding="utf-8-sig")))  # Windows editors put a mark first


def new_config(settings):
    """A ``TrainConfig``; a setting that is unknown or missing is a ``ValueError`` that names it."""
    try:
        return msae.TrainConfig(**settings)
    except TypeError as error:
        raise ValueError(f"settings: {error}") from None


# -------------------------------------------------------------------------------------------------------- toy


def toy_setup(settings, seed=0):
    """The tree and the configs {"matryoshka", "vanilla"} of a toy experiment; vanilla has one prefix, all else equal.

    ``settings``: {"tree": a ``FeatureTree`` spec, "train": ``TrainConfig`` fields; optional "d_model", "norm_std"}.
    """
    spec, fields = settings.get("tree"), settings.get("train")
    known = isinstance(fields, dict) and not set(settings) - {"tree", "train", "d_model", "norm_std"}
    if not known:
        raise ValueError(f"a toy has the settings tree, train, and optional d_model, norm_std, got {settings!s:.200}")
    try:
        tree = msae.FeatureTree(spec, settings.get("d_model"), settings.get("norm_std", 0.05), seed)
    except TypeError as error:
        raise ValueError(f"d_model and norm_std must be numbers: {error}") from None
    cfg = new_config({"n_latents": len(tree.parent_of), **fields, "seed": seed})
    return tree, {"matryoshka": cfg, "vanilla": cfg.vanilla()}


@main.command()
@click.option("--config", type=click.Path(exists=True, dir_okay=False), default=HERE / "toy_config.json",
              show_default="toy_config.json", help="The feature tree and the training settings.")
@click.option("--seed", type=click.IntRange(0, 2**62), default=0, help="First seed: of directions, rows and weights.")
@click.option("--seeds", type=click.IntRange(min=1), default=1, help="Number of seeds, one after the other.")
@click.option("--out", type=click.Path(file_okay=False), default="runs/toy", help="Folder for toy.json and toy.svg.")
def toy(config, seed, seeds, out):
    """The absorption experiment: a Matryoshka and a vanilla SAE on a tree of features.

    \b
    Examples:
      python cli.py toy
      python cli.py toy --seeds 10 --out runs/ten-seeds
    """
    settings, results, folder = read_json(config), [], Path(out)
    toy_setup(settings, seed)
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # 20 x 20 matrices: threads would only wait for each other
    for number in range(seed, seed + seeds):
        started = time.perf_counter()
        tree, configs = toy_setup(settings, number)
        with progress() as bar:
            saes = {name: msae.train(tree, cfg, on_log=bar.reporter(f"seed {number} {name}", cfg))
                    for name, cfg in configs.items()}
        figures = {name: msae.toy_figures(sae, tree, seed=number + 1_000_003) for name, sae in saes.items()}
        results.append({"seed": number, "seconds": round(time.perf_counter() - started, 1), **figures})
        if number == seed:
            maps = heat_maps(tree, saes)
            msae.write(folder / "toy.svg", svg(maps))
        msae.write(folder / "toy.json", results[0] if seeds == 1 else {"seeds": results})
    console.print(toy_table(results))
    console.print(absorption_table(results[0]))
    console.print(terminal_maps(maps))
    click.echo(f"{sum(r['seconds'] for r in results):.0f} s; wrote {folder / 'toy.json'} and {folder / 'toy.svg'}")


def new_table(*columns, **options):
    gap = 1 if console.width >= 70 else 0
    return Table(*columns, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, gap, 0, 0), **options)


def toy_table(results):
    """One row per SAE and seed, the means over several seeds, and the published figures."""
    table = new_table("", "seed", "FVU", "L0", "clean", "cos", "min", "absorbed", title="True features recovered")

    def add(name, seed, found, **options):
        def mean(key, digits):
            return f"{statistics.mean(f[key] for f in found):.{digits}f}" if key in found[0] else ""
        rates = [pair["rate"] for f in found for pair in f.get("absorption", ()) if pair["rate"] is not None]
        clean = f"{float(mean('clean', 2)):g}/{found[0]['features']}"
        table.add_row(name, seed, mean("fvu", 3), mean("l0", 2), clean, mean("mean_cosine", 3), mean("min_cosine", 3),
                      f"{statistics.mean(rates):.2f}" if rates else "", **options)

    for name in ("matryoshka", "vanilla"):
        for r in results:
            add(name, str(r["seed"]), [r[name]])
        if len(results) > 1:
            add(name, "mean", [r[name] for r in results], style="bold")
        add("  published", "", [PUBLISHED[name]], style="dim", end_section=True)
    return table


def absorption_table(result):
    """Absorption rate of every parent-child pair, a parent per row."""
    table = new_table("parent", "children", "matryoshka", "vanilla", title=f"Absorption by child, seed {result['seed']}")
    for parent in dict.fromkeys(pair["parent"] for pair in result["vanilla"]["absorption"]):
        cells = []
        for name in ("matryoshka", "vanilla"):
            pairs = [pair for pair in result[name]["absorption"] if pair["parent"] == parent]
            cells.append("  ".join("  - " if pair["rate"] is None else f"{pair['rate']:.2f}" for pair in pairs))
        table.add_row(str(parent), " ".join(str(pair["child"]) for pair in pairs), *cells)
    return table


def heat_maps(tree, saes):
    """Three (feature, latent) maps: what each latent does when one feature, and with it its parents, is on."""
    pure = tree.pure_features()
    maps = {"true features": pure.tolist()}
    for name, sae in saes.items():
        maps[name] = (msae.matched_acts(sae, tree, pure @ tree.directions) / tree.directions.norm(dim=1)).tolist()
    return maps


def colour(value):
    """Hex colour of a value in [0, 1]; values outside are clipped."""
    place = min(max(value, 0.0), 1.0) * (len(COLOURS) - 1)
    low = min(int(place), len(COLOURS) - 2)
    mixed = (a + (b - a) * (place - low) for a, b in zip(COLOURS[low], COLOURS[low + 1]))
    return "#" + "".join(f"{round(part):02x}" for part in mixed)


def terminal_maps(maps):
    """The maps side by side, two cells to a character; shades of grey characters where there is no colour."""
    panels = []
    for values in maps.values():
        text = Text(no_wrap=True)
        for upper, lower in itertools.zip_longest(values[::2], values[1::2], fillvalue=[0.0] * len(values[0])):
            for a, b in zip(upper, lower):
                if console.color_system and not console.no_color:
                    text.append("▀", f"{colour(a)} on {colour(b)}")
                else:
                    text.append(" .:*#"[round(4 * min(max((a + b) / 2, 0), 1))])
            text.append("\n")
        panels.append(text)
    grid = Table.grid(padding=(0, 3))
    wide = console.width >= sum(len(values[0]) + 3 for values in maps.values())
    for row in ([maps, panels] if wide else [(item,) for pair in zip(maps, panels) for item in pair]):
        grid.add_row(*row)
    return grid


def svg(maps, cell=11):
    """The maps as a picture: a row has one feature and its parents on, columns are the latents matched to features."""
    side = cell * len(maps["true features"])
    parts = [f'<text transform="translate(22 {34 + side / 2}) rotate(-90)" text-anchor="middle" font-size="11" '
             'fill="#667">input: one feature and its parents</text>']
    for panel, (title, values) in enumerate(maps.items()):
        x, below = 32 + panel * (side + 26), "latent matched to feature" if panel else "feature"
        middle = f'x="{x + side / 2}" text-anchor="middle"'
        parts.append(f'<text {middle} y="22" font-size="14" font-weight="600">{title.capitalize()}</text>')
        parts.append(f'<text {middle} y="{side + 52}" font-size="11" fill="#667">{below}</text>')
        for (i, row), j in itertools.product(enumerate(values), range(len(values[0]))):
            parts.append(f'<rect x="{x + j * cell}" y="{34 + i * cell}" width="{cell - 1}" height="{cell - 1}" '
                         f'fill="{colour(row[j])}"/>')
    size = f"0 0 {20 + len(maps) * (side + 26)} {side + 62}"
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" font-family="system-ui, sans-serif">\n'
            '<rect width="100%" height="100%" rx="8" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n")


# ------------------------------------------------------------------------------------------------------ train


def numbers(ctx, param, value):
    """``--prefixes`` as a tuple of lengths or fractions."""
    try:
        return value and tuple(float(n) if "." in n else int(n) for n in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers with commas between") from None


@main.command()
@click.option("--acts", required=True, type=click.Path(),
              help="Activations: a .npy of floats, (rows, D) or (docs, positions, D), or a folder of them.")
@click.option("--latents", "n_latents", type=int, help="Number of latents F.  [required, here or in --config]")
@click.option("--k", type=float, help="Active latents per row, on average.  [default: 30]")
@click.option("--prefixes", callback=numbers,
              help="Lengths as 192,384,...,F or fractions.  [default: F/16, F/8, F/4, F/2, F]")
@click.option("--pareto", "n_prefixes", type=int, help="Instead, sample this many prefixes at every step.")
@click.option("--spare", type=click.FloatRange(0, 1000),
              help="Start with this share of F more latents and prune the least energetic.  [default: 0.25]")
@click.option("--baseline", is_flag=True, help="Then train the vanilla twin on the same batches and show both.")
@click.option("--steps", type=int, help="Optimizer steps.  [default: 10000]")
@click.option("--batch-size", type=int, help="Rows per step, of all processes together.  [default: 2048]")
@click.option("--lr", type=float, help="Peak learning rate of Adam.  [default: 0.24 / sqrt(F), at most 0.01]")
@click.option("--seed", type=int, help="Of weights, row order and held-out rows.  [default: 0]")
@device_option
@dtype_option
@click.option("--out", type=click.Path(file_okay=False), help="A new folder.  [default: a new one under runs/]")
@click.option("--resume", is_flag=True, help="Go on with the run in --out, or in the newest default folder.")
@click.option("--save-minutes", type=click.FloatRange(min=0), default=10, help="Minutes between checkpoints.")
@click.option("--config", type=click.Path(exists=True, dir_okay=False),
              help="JSON with any TrainConfig fields; options override it.")
def train(acts, device, out, config, spare, baseline, resume, save_minutes, **options):
    """Train on activations and save a checkpoint that SAELens opens too.

    A tenth of the rows, at most 16,384, is set aside in blocks for the figures shown at the end (eval.json). Ctrl-C
    saves first; the same command with --resume goes on. With several processes, torchrun takes the place of python.
    The checkpoint records the model_name, hook_name, dataset and base_model that acts.npy.json gives acts.npy.

    \b
    Examples:
      python cli.py train --acts acts.npy --latents 3072
      python cli.py train --acts acts.npy --latents 3072 --pareto 10 --k 40 --out runs/pareto
      python cli.py train --acts shards/ --latents 3072 --baseline
      torchrun --nproc-per-node 2 cli.py train --acts acts.npy --latents 3072
    """
    cfg, figures = train_config(config, spare, options), {}
    about = read_json(f"{Path(acts)}.json") if Path(f"{Path(acts)}.json").is_file() else {}
    about = {key: about[key] for key in ABOUT if key in about}
    with processes(device) as (device, first):
        rows, held_out = msae.Rows(acts).split_off(0.1, cfg.seed)
        path = f"runs/{Path(acts).stem}-{cfg.n_latents}"
        with run_folder(path, out, resume, first) as folder:
            twins = {"matryoshka": (cfg, folder), "vanilla": (cfg.vanilla(), folder / "vanilla")}
            for name, (own, where) in itertools.islice(twins.items(), 1 + baseline):
                again = resume and (name == "matryoshka" or (where / msae.STATE).exists())
                with resume_hint(where, folder, out), progress() as bar:
                    show = bar.reporter(name if baseline else "train", own) if first else None
                    sae = msae.train(rows, own, device=device, out=where, resume=again, save_minutes=save_minutes,
                                     on_log=show, metadata=about)
                if first:
                    figures[name] = msae.evaluate(sae, held_out)
                    msae.write(where / EVAL, figures[name])
    if first:
        console.print(figures_table(figures, "held-out rows"))
        click.echo("dead: latents that never fire on these rows; cosine: mean over latents of the largest with another "
                   f"decoder row\n\nsaved {folder}\nload it with  sae = msae.MatryoshkaSAE.load({str(folder)!r})")


def train_config(config, spare, options):
    """The settings of a run: the options given override those of the file ``config``."""
    settings, given = read_json(config) if config else {}, {k: v for k, v in options.items() if v is not None}
    for name, other in (("n_prefixes", "prefixes"), ("prefixes", "n_prefixes")):
        if name in given and other not in given:
            settings.pop(other, None)
    settings.update(given)
    if spare is not None or "n_latents_start" not in settings:
        settings.pop("n_latents_start", None)
        F = new_config(settings).n_latents
        settings["n_latents_start"] = F + round((0.25 if spare is None else spare) * F)
    return new_config(settings)


@contextlib.contextmanager
def run_folder(path, out, resume, first):
    """The folder ``out``; else the last of ``path``, ``path-2``, ... to resume, or the next, which ``mkdir`` claims."""
    names = [path, *(f"{path}-{i}" for i in range(2, 10**4))]
    free = next(i for i, name in enumerate(names) if not Path(name).exists())
    folder = Path(out or names[max(free - 1, 0) if resume else free])
    while first and not out and not resume:
        try:
            folder.mkdir(parents=True)
            break
        except FileExistsError:  # another run took it just now
            free += 1
            folder = Path(names[free])
    try:
        yield folder
    finally:
        if first and not out:
            with contextlib.suppress(OSError):
                folder.rmdir()  # only if it is empty, after a run that was refused
                folder.parent.rmdir()


@contextlib.contextmanager
def processes(device):
    """(this process's device, whether it is the first): joins the processes that torchrun started, if it did."""
    handlers = {}
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, signal.SIGTERM)  # Windows has no SIGHUP
        if signal.getsignal(number) is not signal.SIG_IGN:
            handlers.setdefault(number, signal.signal(number, lambda number, _: sys.exit(128 + number)))
    several, on_cuda = "LOCAL_RANK" in os.environ, device.startswith("cuda")
    if several and on_cuda and device != "cuda":
        raise click.BadParameter(f"{device!r} must have no number under torchrun", param_hint="--device")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if several and on_cuda else device
    msae.check_device(device)
    try:
        if several and on_cuda:
            torch.cuda.set_device(device)
        if several:
            torch.distributed.init_process_group("nccl" if on_cuda else "gloo")
        yield device, msae.rank_and_world()[0] == 0
    except RuntimeError as error:
        if not several:
            raise
        raise ConnectionError(f"another process of this run is lost: {msae.one_line(error)}") from None
    finally:
        if several and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextlib.contextmanager
def resume_hint(where, folder, out):
    """Say how to go on when a signal or a lost process ends the training in the folder ``where``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, RuntimeError):
        if (where / msae.STATE).exists() and os.environ.get("RANK", "0") == "0":
            added = [*(() if out else ("--out", str(folder))), *(() if "--resume" in sys.argv else ("--resume",))]
            several = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", "1")]
            command = [*(several if "LOCAL_RANK" in os.environ else ["python"]), *sys.argv, *added]
            click.echo(f"saved in {where}; go on with\n  {shlex.join(command)}", err=True)
        raise


def figures_table(figures, kind):
    """Figures on rows: for each SAE a row per prefix, the whole SAE last."""
    n = next(iter(figures.values()))["rows"]
    table = new_table("", "latents", "FVU", "L0", "cosine", "dead", title=f"{n:,} {kind}")
    for name, found in figures.items():
        for level in found["prefixes"]:
            last = level["latents"] == found["prefixes"][-1]["latents"]
            table.add_row(name, f"{level['latents']:,}", f"{level['fvu']:.4f}", f"{level['l0']:.2f}",
                          f"{level['max_cosine']:.3f}", f"{found['dead']:.2%}" if last else "", end_section=last)
            name = ""
    return table


# --------------------------------------------------------------------------------------- harvest and evaluate

DATASET = "noanabeshima/TinyModelTokIds"


def tiny_model_options(command):
    for option in (
        click.option("--model", "model_path", default="tiny_model.pt",
                     help="State dict of a TinyModel: a file, or one of the Hub's, such as tiny_model_2L_1E.pt."),
        click.option("--layer", type=click.IntRange(min=0), default=3,
                     help="The residual stream that enters this block; 4: after the last."),
        device_option,
    ):
        command = option(command)
    return command


def tiny_model(path, layer, device):
    """(model, the module that the residual stream of the layer enters, the name of that place)."""
    device, model = msae.check_device(device), msae.TinyModel.load(path)
    if layer >= len(model.layers):
        rule = f"{layer} must be at most {len(model.layers) - 1}, after the last block of {path}"
        raise click.BadParameter(rule, param_hint="--layer")
    return model.to(device), model.layers[layer], f"torso.{layer}.input" if layer < len(model.torso) else "lm_head.input"


def token_batches(path, model, batch_size=64):
    """A function that starts reading the token file, or the published one of that name, anew."""
    if path in ("train.jsonl", "validation.jsonl") and not Path(path).exists():
        path = msae.download(DATASET, [path], repo_type="dataset") / path
    return lambda: read_tokens(path, len(model.embed.weight), model.pos_embed.shape[1], batch_size)


def read_tokens(path, n_vocab=10_000, n_positions=256, batch_size=64):
    """Token ids in batches (B, T) of a ``.jsonl`` with {"tok_ids": [...]} in each line, or a ``.npy`` (docs, T).

    ``ValueError`` names the line or row with an id outside [0, n_vocab), more than ``n_positions`` ids, or another
    length than the first.
    """
    docs, length = [], None
    for where, ids in npy_docs(path) if str(path).endswith(".npy") else jsonl_docs(path):
        length = length or len(ids)
        if not 0 < len(ids) <= n_positions:
            raise ValueError(f"{where}: tok_ids must be 1 to {n_positions} ids, the positions of the model, got {len(ids)}")
        if len(ids) != length:
            raise ValueError(f"{where}: tok_ids must be {length} ids as in the first, got {len(ids)}")
        outside = ids[(ids < 0) | (ids >= n_vocab)]
        if len(outside):
            raise ValueError(f"{where}: ids must lie in [0, {n_vocab}), got {outside[0]}")
        docs.append(torch.from_numpy(ids.astype(np.int64)))
        if len(docs) == batch_size:
            yield torch.stack(docs)
            docs = []
    if docs:
        yield torch.stack(docs)


def npy_docs(path):
    array = msae.read_npy(path)
    if array.dtype.kind not in "iu" or array.ndim != 2:
        raise ValueError(f"{path} must hold whole numbers (docs, positions), got {array.dtype} {array.shape}")
    return ((f"{path}, row {i}", np.array(row)) for i, row in enumerate(array))


def jsonl_docs(path):
    with open(path, "rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(1 << 20), b""), 1):
            where = f"{path}, line {number}"
            with msae.reading(where, '{"tok_ids": [whole numbers]}'):
                ids = np.array(json.loads(line)["tok_ids"])
                if ids.ndim != 1 or ids.dtype.kind != "i":
                    raise ValueError(f"tok_ids must be a list of whole numbers, got {ids.dtype} {ids.shape}")
            yield where, ids


@main.command()
@tiny_model_options
@click.option("--tokens", default="train.jsonl",
              help='Token ids: a .jsonl of {"tok_ids": [...]}, a .npy (docs, positions), or the published file.')
@click.option("--max-rows", type=click.IntRange(min=1), default=30_000_000, help="Stop after this many.")
@click.option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", help="Of the rows in the file.")
@click.option("--out", type=click.Path(dir_okay=False), default="acts.npy", help="A new file.")
def harvest(model_path, layer, device, tokens, max_rows, dtype, out):
    """Residual stream activations of TinyModel as rows for train, without those of [BEGIN] and [PAD].

    \b
    Examples:
      python cli.py harvest
      python cli.py harvest --layer 2 --max-rows 1000000 --out layer2.npy
      python cli.py harvest --model mine.pt --tokens tokens.jsonl
    """
    out, drop, total = Path(out), (msae.BEGIN, msae.PAD), 0
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another --out")
    model, module, place = tiny_model(model_path, layer, device)
    batches, width = token_batches(tokens, model), model.embed.weight.shape[1]
    for ids in batches():  # all of them are checked before the first is used
        total = min(total + int((~torch.isin(ids, torch.tensor(drop))).sum()), max_rows)
        if total == max_rows:
            break
    out.parent.mkdir(parents=True, exist_ok=True)
    size, free = total * width * np.dtype(dtype).itemsize, shutil.disk_usage(out.parent).free
    if size > free:
        raise OSError(f"{out} would take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: lower --max-rows")
    with progress() as bar:
        n = msae.harvest(model, module, batches(), out, at="input", drop=drop, dtype=dtype, max_rows=max_rows,
                         on_rows=bar.counter("harvest", total))
    published = {} if Path(model_path).exists() else {"base_model": msae.TINY_MODEL[0]}
    msae.write(f"{out}.json", {"model_name": Path(model_path).name, "hook_name": place, **published,
                               "dataset": tokens if Path(tokens).exists() else DATASET})
    click.echo(f"{n:,} rows of width {width} in {out}; next:  "
               f"python cli.py train --acts {shlex.quote(str(out))} --latents {4 * width}")


@main.command("eval")
@click.argument("checkpoints", nargs=-1, required=True)
@click.option("--acts", required=True, type=click.Path(), help="Activations that training did not see, as for train.")
@click.option("--labels", type=click.Path(exists=True, dir_okay=False),
              help="A .npy with a whole number, or a row of 0 and 1, for each row of --acts: adds probing, absorption "
                   "and erasure, on at most 20,000 of them.")
@click.option("--tokens", help="Token ids as for harvest: adds the loss of TinyModel with reconstructions spliced in.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=100_000, help="Use this many of --tokens.")
@tiny_model_options
@click.option("--out", type=click.Path(dir_okay=False), help="JSON file.  [default: eval.json in each folder]")
def evaluate(checkpoints, acts, labels, tokens, max_tokens, model_path, layer, device, out):
    """Figures of one or more checkpoints over a whole set of rows, for each prefix.

    \b
    Examples:
      python cli.py eval runs/acts-3072 --acts held.npy
      python cli.py eval runs/acts-3072 runs/acts-3072/vanilla --acts held.npy --labels labels.npy
      python cli.py eval runs/acts-3072 --acts held.npy --tokens validation.jsonl --layer 3
    """
    rows, device, results = msae.Rows(acts), msae.check_device(device), {}
    labelled = label_rows(labels, rows) if labels else None
    saes = {path: msae.MatryoshkaSAE.load(path) for path in checkpoints}
    for path, sae in saes.items():
        if len(sae.b_dec) != rows.d_model:
            raise ValueError(f"{path} is for rows of width {len(sae.b_dec)}, {acts} has {rows.d_model}")
    if tokens:
        model, module, place = tiny_model(model_path, layer, device)
        batches = token_batches(tokens, model, batch_size=8)  # logits take much memory
        for path, sae in saes.items():
            trained = sae.metadata.get("hook_name") or place
            if trained != place and trained.startswith(("torso.", "lm_head.")):
                raise click.BadParameter(f"{layer} is not where {path} was trained, {trained}", param_hint="--layer")
    names = short_names(checkpoints)
    with progress() as bar:
        for path, sae in saes.items():
            figures = msae.evaluate(sae.to(device), rows, on_rows=bar.counter(names[path], len(rows)))
            found = results[names[path]] = {"checkpoint": path, "acts": acts, **figures}
            if tokens:
                ids = limited(batches(), max_tokens, bar.counter(f"{names[path]} spliced in", max_tokens, "tokens"))
                found["loss"] = msae.loss_recovered(model, module, sae, ids, drop=(msae.BEGIN, msae.PAD))
            if labels:
                found["labels"] = {**msae.probe(sae.cpu(), *labelled[:2]), "labels": labelled[2]}
    contents = list(results.values())
    files = {Path(out): contents[0] if len(contents) == 1 else contents} if out else {
        Path(found["checkpoint"], EVAL): found for found in contents if Path(found["checkpoint"]).is_dir()}
    for file, content in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        msae.write(file, content)
    show_figures(results)
    click.echo(f"wrote {', '.join(map(str, files)) or 'nothing: no folder, no --out'}")


def label_rows(path, rows, most=20_000):
    """(rows (n, D), labels (n, C) of booleans, names (C,)) of random blocks of ``rows``, ``most`` rows or fewer."""
    labels = np.asarray(msae.read_npy(path))
    labels = labels.ravel() if labels.size == len(rows) else labels
    if labels.dtype.kind not in "iub" or labels.ndim not in (1, 2) or len(labels) != len(rows) or labels.size == 0:
        needed = f"whole numbers ({len(rows)},) or 0 and 1 ({len(rows)}, C)"
        raise ValueError(f"{path} must hold {needed}, got {labels.dtype} {labels.shape}")
    names = [str(i) for i in range(labels.shape[1])] if labels.ndim == 2 else []
    if labels.ndim == 1:
        values = np.unique(labels)
        if len(values) > 1000:
            raise ValueError(f"{path} must hold at most 1000 different labels, got {len(values)}")
        names, labels = [str(value) for value in values], labels[:, None] == values
    elif not ((labels == 0) | (labels == 1)).all():
        raise ValueError(f"{path} must hold 0 and 1 where it has columns, got others")
    order = np.random.default_rng(0).permutation(len(rows.blocks))
    chosen = np.sort(order[: max(1, most // rows.block)])
    starts = np.cumsum([0, *(stop - start for _, start, stop in rows.blocks)])
    y = np.concatenate([labels[starts[i]:starts[i + 1]] for i in chosen]) == 1
    return torch.from_numpy(rows.keep(chosen).read()), torch.from_numpy(y), names


def limited(ids, most, on_tokens):
    """The first batches of token ids, ``most`` ids or a few more; ``on_tokens`` is called with how many are done."""
    done = 0
    for batch in ids:
        yield batch
        done += batch.numel()
        on_tokens(min(done, most))
        if done >= most:
            return


def short_names(paths):
    """Each path's last part, or the whole where two share it."""
    ends = [Path(path).name for path in paths]
    return {path: end if ends.count(end) == 1 else path for path, end in zip(paths, ends)}


def show_figures(results):
    console.print(figures_table(results, "rows"))
    console.print(frequency_bars(results))
    for name, found in results.items():
        if "loss" in found:
            console.print(loss_table(name, found["loss"]))
        if "labels" in found:
            console.print(label_table(name, found["labels"]))


def frequency_bars(figures):
    """How many latents fire how often: a row per half decade, a column per SAE."""
    table = new_table("fires on", *figures, title="Latents by the share of rows they fire on")
    edges = next(iter(figures.values()))["frequencies"]["edges"]
    counts = [found["frequencies"]["counts"] for found in figures.values()]
    used = [i for i in range(len(edges) - 1) if any(column[i] for column in counts)]
    width = max(6, (console.width - 20) // len(counts) - 12)
    for i in range(used[0], used[-1] + 1) if used else ():
        bars = (f"{'█' * round(width * column[i] / max(*column, 1))} {column[i]:,}" for column in counts)
        table.add_row(f"{edges[i]:.1e} to {edges[i + 1]:.1e}", *bars)
    return table


def loss_table(name, loss):
    table = new_table("", "latents", "loss", "recovered",
                      title=f"Cross-entropy over {loss['tokens']:,} tokens, {name} spliced in")
    table.add_row("clean", "", f"{loss['clean']:.4f}", "100.0%")
    table.add_row("zeroed", "", f"{loss['zeroed']:.4f}", "0.0%", end_section=True)
    for level in loss["prefixes"]:
        table.add_row("spliced", f"{level['latents']:,}", f"{level['spliced']:.4f}", percent(level["recovered"]))
    return table


def percent(share):
    return "" if share is None else f"{share:.1%}"


def label_table(name, found):
    table = new_table("latents", "k=1", "2", "5", "absorbed", "split",
                      title=f"{name}, {len(found['labels'])} labels on {found['rows']:,} rows: F1 of k-sparse probes")
    table.add_row("raw rows", "", "", f"{found['raw']['f1']:.3f}", end_section=True)
    for level in found["prefixes"]:
        f1 = {score["k"]: f"{score['f1']:.3f}" for score in level["probes"]}
        table.add_row(f"{level['latents']:,}", *(f1.get(k, "") for k in (1, 2, 5)), percent(level["absorption"]),
                      f"{level['splitting']:.1f}")
    table.caption = "erasure, fall of balanced accuracy, own and others': " + "; ".join(
        f"top {e['latents']} {e['own']:.3f} {e['others']:.3f}" for e in found["erasure"])
    return table


# ------------------------------------------------------------------------------------------------------ bench


@main.command()
@click.option("--latents", type=click.IntRange(1, 2**31), default=3072, help="Number of latents F.")
@click.option("--d-model", type=click.IntRange(1, 2**31), default=768, help="Width D of the rows.")
@click.option("--batch-size", type=click.IntRange(1, 2**31), default=2048, help="Rows per step.")
@click.option("--k", type=float, default=30, help="Active latents per row.")
@click.option("--steps", type=click.IntRange(min=1), default=20, help="Steps to time, after three to warm up.")
@device_option
@dtype_option
def bench(latents, d_model, batch_size, k, steps, device, dtype):
    """This machine's training step, beside the encoder product alone, which no SAE can do without.

    \b
    Examples:
      python cli.py bench
      python cli.py bench --latents 24576 --steps 10
    """
    device = msae.check_device(device)
    trainer = msae.Trainer(msae.TrainConfig(n_latents=latents, k=k, batch_size=batch_size, dtype=dtype), d_model, device)
    x = torch.randn(batch_size, 8) @ torch.randn(8, d_model) / 2 + torch.randn(batch_size, d_model)
    x = x.to(device) / d_model**0.5
    a, W = (t.to(getattr(torch, trainer.dtype)) for t in (x, torch.randn(d_model, latents, device=device)))
    product = a @ W

    def clock(call):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - started

    pairs = [(clock(lambda: torch.mm(a, W, out=product)), clock(lambda: trainer.step(x))) for _ in range(steps + 3)]
    alone, step = (statistics.median(times) for times in zip(*pairs[3:]))  # in turn, so that drift cancels
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    table = new_table("", "", show_header=False)
    table.add_row("encoder product alone", f"{1e3 * alone:.1f} ms")
    table.add_row("training step", f"{1e3 * step:.1f} ms, {step / alone:.2f} x the product")
    table.add_row("rows per second", f"{batch_size / step:,.0f}")
    table.add_row("peak memory of this process", f"{peak / 2**20:,.0f} MiB" if peak else "not known here")
    console.print(f"batch {batch_size:,}, width {d_model:,}, {latents:,} latents, k {k:g}, "
                  f"{len(trainer.step_prefixes())} prefixes, {trainer.dtype} on {device}")
    console.print(table)


def peak_memory():
    """Peak resident memory of this process in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------------------------- push

CARD = """---
library_name: saelens
license: {license}
{base}tags:
- sparse-autoencoder
- matryoshka
- mechanistic-interpretability
---

# {title}

A Matryoshka sparse autoencoder: {F} latents for raw activations of width {D}. Each of its prefixes, the first {prefixes}
latents, is a sparse autoencoder too.

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

sae = {saelens}
codes = sae.encode(torch.randn(8, {D}))
recon = sae.decode(codes)
```
"""
LEGEND = """On {:,} rows {}. FVU: squared error over variance; L0: active latents per row;
dead: latents that never fire; cosine: mean over latents of the largest with another decoder row."""


@main.command()
@click.argument("checkpoint", required=False, type=click.Path(path_type=Path))
@click.argument("repo", required=False)
@click.option("--private/--public", default=None, show_default=False,
              help="Who sees a new repository.  [default: your Hub settings]")
@click.option("--revision", help="Branch to commit to, created if it is new.  [default: main]")
@click.option("--commit-message", default="Upload a Matryoshka SAE", help="First line of the commit.")
@click.option("--create-pr", is_flag=True, help="Open a pull request with the commit.")
@click.option("--token", help="Access token.  [default: of `hf auth login` or HF_TOKEN]")
@click.option("--license", default="mit", help="Of the weights, for the card.")
@click.option("--dry-run", is_flag=True, help="Show what would go up, without touching the network.")
def push(checkpoint, repo, private, revision, commit_message, create_pr, token, license, dry_run):
    """Upload CHECKPOINT to REPO on the Hugging Face Hub, with a model card, in one commit.

    CHECKPOINT defaults to the newest under runs/, REPO to its folder's name under your name. Weights, configs,
    metrics and card go up; the training state never.

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
    card = (sae, folder, license, revision)
    if dry_run:
        repo = repo if "/" in repo else f"YOUR_NAME/{repo}"
        files["README.md"] = model_card(repo, *card).encode()
        click.echo(f"would push {folder} to {repo}, in one commit:")
        click.echo("".join(f"{len(content):>13,}  {name}\n" for name, content in files.items()))
        click.echo(files["README.md"].decode())
        return
    model_card(f"you/{repo}", *card)  # refuses bad figures before the network is touched
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
        api = HfApi(token=token)
        repo = api.create_repo(repo, private=private, exist_ok=True).repo_id
        files["README.md"] = model_card(repo, *card).encode()
        if revision and not api.revision_exists(repo, revision):
            api.create_branch(repo, branch=revision)
        commit = api.create_commit(repo, [CommitOperationAdd(*item) for item in files.items()],
                                   commit_message=commit_message, revision=revision, create_pr=create_pr)
    except Exception as error:  # of its own, of its HTTP library, of Xet
        raise OSError(f"{folder} cannot be pushed to {repo}: {msae.one_line(error)}") from None
    click.echo(commit.pr_url or f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else ""))


def newest_checkpoint():
    """The folder under runs/ that was saved last; a vanilla twin counts as part of its Matryoshka SAE."""
    found = [path for path in Path("runs").rglob(msae.WEIGHTS) if not (path.parent.parent / msae.WEIGHTS).exists()]
    if not found:
        raise FileNotFoundError("there is no checkpoint under runs/: train one, or name its folder")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def model_card(repo, sae, folder, license, revision=None):
    """The README.md of ``repo``; its figures are those of eval.json in ``folder``, or the last of metrics.jsonl."""
    known = sae.metadata
    facts = {**{name: known.get(name) or "not recorded" for name in ABOUT}, "k": known.get("k")}
    if isinstance(known.get("training"), dict):
        given = (f"{name} {value}" for name, value in known["training"].items() if value is not None)
        facts["settings"] = ", ".join(given)
    at = f", revision={revision!r}" if revision else ""
    with msae.reading(f"{EVAL} or {msae.METRICS} in {folder}", "what training writes"):
        figures = card_figures(folder)
    base = f"base_model: {json.dumps(known['base_model'])}\n" if known.get("base_model") else ""
    return CARD.format(license=json.dumps(license), base=base, title=repo.split("/")[-1], F=len(sae.b_enc),
                       D=len(sae.b_dec), p=sae.prefixes[0], prefixes=", ".join(map(str, sae.prefixes)),
                       figures=figures, source=f"{repo!r}{at}",
                       facts="\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items() if value),
                       saelens=f"SAE.load_from_disk(snapshot_download({repo!r}{at}))")


def card_figures(folder):
    """A table of eval.json, or else a sentence of the last line of metrics.jsonl."""
    missing = "There was no evaluation on held-out rows."
    if (folder / EVAL).is_file():
        found = read_json(folder / EVAL)
        *inner, whole = [f"| {p['latents']:,} | {p['fvu']:.4f} | {p['l0']:.2f} |" for p in found["prefixes"]]
        rows = f"of {found['acts']}" if "acts" in found else "that training did not see"
        whole += f" {found['dead']:.2%} | {found['max_cosine']:.3f} |"
        return "\n".join(["| latents | FVU | L0 | dead | cosine |", "|---|---|---|---|---|",
                          *(f"{row} | |" for row in inner), whole, "", LEGEND.format(found["rows"], rows)])
    if (folder / msae.METRICS).is_file() and (lines := (folder / msae.METRICS).read_text().splitlines()):
        last = json.loads(lines[-1])
        return (f"{missing} On a training batch at step {last['step']:,}: FVU {last['fvu']:.4f}, L0 {last['l0']:.2f}, "
                f"dead {last['dead']:.2%}.")
    return missing


# --------------------------------------------------------------------------------------------------- progress


class progress:
    """A live line per run in a terminal, a plain line every few seconds elsewhere."""

    def __enter__(self):
        self.wide = console.width >= 95 or not console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=10), TextColumn("{task.fields[figures]}"))
        columns = columns if self.wide else columns[::2]
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal)
        self.bar.start()
        return self

    def __exit__(self, *error):
        self.bar.stop()

    def line(self, label, total, unit="rows"):
        """A function to show the number done of ``total``, units per second, seconds left, and what is around them."""
        task, shown = self.bar.add_task(label, total=total, figures=""), -math.inf

        def show(done, rate, seconds, before, after=""):
            nonlocal shown
            left = datetime.timedelta(seconds=min(10**12, round(seconds)))
            line = f"{before}  {f'{rate:,.0f} {unit}/s  ' if self.wide else ''}{left} left{after}"
            self.bar.update(task, completed=done, figures=line)
            if not console.is_terminal and (done == total or time.monotonic() - shown > 10):
                shown = time.monotonic()
                print(f"{label}  {line}", flush=True)
        return show

    def counter(self, label, total, unit="rows"):
        """A callback that shows how many units of ``total`` are done."""
        show, started = self.line(label, total, unit), time.monotonic()

        def count(n):
            rate = max(n, 1) / max(time.monotonic() - started, 1e-9)
            show(n, rate, (total - n) / rate, f"{n:,}/{total:,} {unit}")
        return count

    def reporter(self, label, cfg):
        """A callback for ``msae.train`` that shows its figures."""
        show, step_word = self.line(label, cfg.steps), "" if console.is_terminal else "step "

        def report(figures):
            step, rate = figures["step"], max(1, figures["rows_per_second"])
            dead = f"  dead {figures['dead']:.1%}" if self.wide else ""
            show(step, rate, (cfg.steps - step) * cfg.batch_size / rate, f"{step_word}{step}/{cfg.steps}",
                 f"  FVU {figures['fvu']:.3f}  L0 {figures['l0']:.1f}{dead}")
        return report


if __name__ == "__main__":
    signal.signal(signal.SIGINT, before)
    main()
