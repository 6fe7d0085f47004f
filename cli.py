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
EVAL, ORIGIN = "eval.json", ("model_name", "hook_name", "dataset", "base_model")
OUT_OF_MEMORY = ("allocate", "out of memory", "size calculation overflowed")  # in torch's messages
console = Console(markup=False, emoji=False, highlight=False)

# Replications of the ReLU + L1 original (noanabeshima/matryoshka-saes): a post of 2026, one seed.
PUBLISHED = {"matryoshka": {"fvu": 0.021, "l0": 1.13, "clean": 20, "features": 20},
             "vanilla": {"fvu": 0.000, "l0": 0.86, "clean": 11, "features": 20}}
COLOURS = ((13, 8, 42), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # dark 0 to bright 1


device_option = click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, cuda:1, ...",
                             show_default="cuda if there is one, else cpu")


class Commands(click.Group):
    """A group that turns what the library refuses into one line and an exit code, never a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except (OSError, ValueError) as error:
            text = f"{error.filename}: {error.strerror}" if getattr(error, "filename", None) else str(error)
            raise click.ClickException(" ".join(text.splitlines())) from None
        except (MemoryError, RuntimeError) as error:
            text = " ".join(str(error).split())
            if isinstance(error, RuntimeError) and not any(sign in text for sign in OUT_OF_MEMORY):
                raise
            raise click.ClickException(f"not enough memory, try fewer latents or a smaller batch: {text:.200}") from None
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


# ------------------------------------------------------------------------------------------------------------------ toy


@main.command()
@click.option("--config", type=click.Path(exists=True, dir_okay=False), default=HERE / "toy_config.json", show_default="toy_config.json",
              help="The feature tree and the training settings.")
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
    settings, results = msae.read_json(config), []
    msae.toy_setup(settings, seed)
    folder = click.get_current_context().with_resource(msae.claimed_folder(out, own={"toy.json", "toy.svg"}))
    torch.set_num_threads(1)  # 20 x 20 matrices: threads would only wait for each other
    for number in range(seed, seed + seeds):
        started = time.perf_counter()
        tree, configs = msae.toy_setup(settings, number)
        with progress() as bar:
            saes = {name: msae.train(tree, cfg, on_log=bar.reporter(f"seed {number} {name}", cfg)) for name, cfg in configs.items()}
        figures = {name: msae.toy_figures(sae, tree, seed=number + 1_000_003) for name, sae in saes.items()}
        results.append({"seed": number, "seconds": round(time.perf_counter() - started, 1), **figures})
        if number == seed:
            maps = heat_maps(tree, saes)
    console.print(toy_table(results))
    console.print(absorption_table(results[0]))
    console.print(terminal_maps(maps))
    report = results[0] if seeds == 1 else {"seeds": results}
    msae.write(folder / "toy.json", report)
    msae.write(folder / "toy.svg", svg(maps))
    click.echo(f"{sum(r['seconds'] for r in results):.0f} s; wrote {folder / 'toy.json'} and {folder / 'toy.svg'}")


def new_table(*columns, **options):
    gap = 1 if console.width >= 70 else 0
    return Table(*columns, box=box.SIMPLE_HEAD, title_justify="left", padding=(0, gap, 0, 0), **options)


def toy_table(results):
    """One row per SAE and seed, the means over several seeds, and the published figures."""
    table = new_table("", "seed", "FVU", "L0", "clean", "cos", "min", "absorbed", title="True features recovered")
    for name in ("matryoshka", "vanilla"):
        for r in results:
            table.add_row(name, str(r["seed"]), *toy_cells(r[name]))
        if len(results) > 1:
            mean = {key: sum(r[name][key] for r in results) / len(results)
                    for key in ("fvu", "l0", "clean", "features", "mean_cosine", "min_cosine")}
            pairs = [pair for r in results for pair in r[name]["absorption"]]
            table.add_row(name, "mean", *toy_cells({**mean, "absorption": pairs}), style="bold")
        table.add_row("  published", "", *toy_cells(PUBLISHED[name]), style="dim", end_section=True)
    return table


def toy_cells(figures):
    def cell(key, digits):
        return f"{figures[key]:.{digits}f}" if key in figures else ""
    rates = [pair["rate"] for pair in figures.get("absorption", []) if pair["rate"] is not None]
    return (cell("fvu", 3), cell("l0", 2), f"{round(figures['clean'], 2):g}/{figures['features']:g}", cell("mean_cosine", 3),
            cell("min_cosine", 3), f"{sum(rates) / len(rates):.2f}" if rates else "")


def absorption_table(result):
    """Absorption rate of every parent-child pair, a parent per row."""
    table = new_table("parent", "children", "matryoshka", "vanilla", title=f"Absorption by child, seed {result['seed']}")
    pairs = list(zip(result["matryoshka"]["absorption"], result["vanilla"]["absorption"]))
    for parent in dict.fromkeys(ours["parent"] for ours, _ in pairs):
        own = [(a, b) for a, b in pairs if a["parent"] == parent]
        def rates(i):
            return "  ".join("  - " if pair[i]["rate"] is None else f"{pair[i]['rate']:.2f}" for pair in own)
        table.add_row(str(parent), " ".join(str(a["child"]) for a, _ in own), rates(0), rates(1))
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
    return "#" + "".join(f"{round(a + (b - a) * (place - low)):02x}" for a, b in zip(COLOURS[low], COLOURS[low + 1]))


def terminal_maps(maps):
    """The maps side by side, two cells to a character; shades of grey characters where there is no colour."""
    panels = []
    for values in maps.values():
        text = Text(no_wrap=True)
        for upper, lower in zip(values[::2], [*values[1::2], [0.0] * len(values[0])]):
            for a, b in zip(upper, lower):
                if console.color_system and not console.no_color:
                    text.append("▀", f"{colour(a)} on {colour(b)}")
                else:
                    text.append(" .:*#"[round(4 * min(max((a + b) / 2, 0), 1))])
            text.append("\n")
        panels.append(text)
    wide = console.width >= sum(len(values[0]) + 3 for values in maps.values())
    grid = Table.grid(padding=(0, 3))
    for row in ([maps, panels] if wide else [(item,) for pair in zip(maps, panels) for item in pair]):
        grid.add_row(*row)
    return grid


def svg(maps, cell=11):
    """The maps as a picture: rows are inputs with one feature and its parents on, columns the latents matched to features."""
    side, parts = cell * len(maps["true features"]), []
    parts.append(f'<text transform="translate(22 {34 + side / 2}) rotate(-90)" text-anchor="middle" font-size="11" fill="#667">'
                 "input: one feature and its parents</text>")
    for panel, (title, values) in enumerate(maps.items()):
        x, below = 32 + panel * (side + 26), "feature" if panel == 0 else "latent matched to feature"
        parts.append(f'<text x="{x + side / 2}" y="22" text-anchor="middle" font-size="14" font-weight="600">{title.capitalize()}</text>')
        parts.append(f'<text x="{x + side / 2}" y="{side + 52}" text-anchor="middle" font-size="11" fill="#667">{below}</text>')
        parts += [f'<rect x="{x + j * cell}" y="{34 + i * cell}" width="{cell - 1}" height="{cell - 1}" fill="{colour(v)}"/>'
                  for i, row in enumerate(values) for j, v in enumerate(row)]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {20 + len(maps) * (side + 26)} {side + 62}" '
            'font-family="system-ui, sans-serif">\n<rect width="100%" height="100%" rx="8" fill="#fff"/>\n'
            + "\n".join(parts) + "\n</svg>\n")


# ---------------------------------------------------------------------------------------------------------------- train


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
@click.option("--prefixes", callback=numbers, help="Lengths as 192,384,...,F or fractions.  [default: F/16, F/8, F/4, F/2, F]")
@click.option("--pareto", "n_prefixes", type=int, help="Instead, sample this many prefixes at every step.")
@click.option("--spare", type=click.FloatRange(0, 1000),
              help="Start with this share of F more latents and prune the least energetic: lowers FVU by about 1 %.  [default: 0.25]")
@click.option("--baseline", is_flag=True, help="Then train the vanilla twin on the same batches and show both.")
@click.option("--steps", type=int, help="Optimizer steps.  [default: 10000]")
@click.option("--batch-size", type=int, help="Rows per step, of all processes together.  [default: 2048]")
@click.option("--lr", type=float, help="Peak learning rate of Adam.  [default: 0.24 / sqrt(F), at most 0.01]")
@click.option("--seed", type=int, help="Of weights, row order and held-out rows.  [default: 0]")
@device_option
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
              help="Of the products; weights stay float32.  [default: bfloat16 on cuda, else float32]")
@click.option("--out", type=click.Path(file_okay=False), help="A new folder.  [default: a new one under runs/]")
@click.option("--resume", is_flag=True, help="Go on with the run in --out (or the newest default folder) where its checkpoint is.")
@click.option("--init-from", type=click.Path(exists=True, file_okay=False), help="Start a new run from the weights of this checkpoint.")
@click.option("--save-minutes", type=float, default=10, help="Minutes between checkpoints.")
@click.option("--config", type=click.Path(exists=True, dir_okay=False), help="JSON with any TrainConfig fields; options override it.")
def train(acts, device, out, config, spare, baseline, resume, init_from, save_minutes, **options):
    """Train on activations and save a checkpoint that SAELens opens too.

    A tenth of the rows (at most 16,384) is set aside at random for the figures shown at the end (eval.json). Ctrl-C saves first;
    the same command with --resume goes on. With several processes, torchrun takes the place of python. The checkpoint records
    the model_name, hook_name, dataset and base_model that acts.npy.json says acts.npy is from, if there is such a file.

    \b
    Examples:
      python cli.py train --acts acts.npy --latents 3072
      python cli.py train --acts acts.npy --latents 3072 --pareto 10 --k 40 --out runs/pareto
      python cli.py train --acts shards/ --latents 3072 --baseline
      torchrun --nproc-per-node 2 cli.py train --acts acts.npy --latents 3072
    """
    settings = {**(msae.read_json(config) if config else {}), **{name: v for name, v in options.items() if v is not None}}
    for given, other in (("n_prefixes", "prefixes"), ("prefixes", "n_prefixes")):
        if options[given] is not None and options[other] is None:
            settings.pop(other, None)
    if spare is None and "n_latents_start" not in settings:
        spare = 0.0 if init_from else 0.25
    cfg = msae.TrainConfig.from_dict(settings if spare is None else {**settings, "n_latents_start": None})
    cfg = cfg if spare is None else dataclasses.replace(cfg, n_latents_start=cfg.n_latents + round(spare * cfg.n_latents))
    beside = Path(f"{Path(acts)}.json")
    about = msae.read_json(beside) if beside.is_file() else {}
    about = {key: about[key] for key in ORIGIN if key in about}
    with processes(device) as (device, first):
        rows, held_out = msae.Rows(acts).split_off(0.1, cfg.seed)
        folder = Path(out or default_folder(f"runs/{Path(acts).stem}-{cfg.n_latents}", existing=resume))
        figures = {}
        for name, own, where in (("matryoshka", cfg, folder), ("vanilla", cfg.vanilla(), folder / "vanilla"))[: 1 + baseline]:
            again = resume and (name == "matryoshka" or (where / msae.STATE).exists())
            start = None if again or name == "vanilla" else init_from
            with resume_hint(where, folder, out), progress() as bar:
                show = bar.reporter(name if baseline else "train", own) if first else None
                sae = msae.train(rows, own, device=device, out=where, resume=again, init_from=start, save_minutes=save_minutes,
                                 on_log=show, metadata=about)
            if first:
                figures[name] = msae.evaluate(sae, held_out)
                msae.write(where / EVAL, figures[name])
    if first:
        console.print(figures_table(figures))
        click.echo("dead: latents that never fire on these rows; cosine: mean over latents of the largest with another decoder row\n"
                   f"\nsaved {folder}\nload it with  sae = msae.MatryoshkaSAE.load({str(folder)!r})")


@contextlib.contextmanager
def processes(device):
    """(this process's device, whether it is the first): joins the processes that torchrun started, if it did."""
    before = signal.getsignal(signal.SIGTERM)
    if before is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if "LOCAL_RANK" not in os.environ:
            yield device, True
            return
        on_cuda = device.startswith("cuda")
        if on_cuda and device != "cuda":
            raise click.BadParameter(f"{device!r} must have no number under torchrun, which gives each process its own",
                                     param_hint="--device")
        device = f"cuda:{os.environ['LOCAL_RANK']}" if on_cuda else device
        msae.check_device(device)
        torch.distributed.init_process_group("nccl" if on_cuda else "gloo", device_id=torch.device(device) if on_cuda else None)
        yield device, torch.distributed.get_rank() == 0
        torch.distributed.destroy_process_group()
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


@contextlib.contextmanager
def resume_hint(where, folder, out):
    """Say how to go on when a signal or a lost process ends the training in the folder ``where``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, ConnectionError):
        if (where / msae.STATE).exists() and os.environ.get("RANK", "0") == "0":
            added = [*(() if out else ("--out", str(folder))), *(() if "--resume" in sys.argv else ("--resume",))]
            start = ["torchrun", "--nproc-per-node", os.environ["LOCAL_WORLD_SIZE"]] if "LOCAL_RANK" in os.environ else ["python"]
            click.echo(f"saved in {where}; go on with\n  {shlex.join([*start, *sys.argv, *added])}", err=True)
        raise


def default_folder(path, existing):
    """``path``, ``path-2``, ``path-3``, ... : the first that does not exist, or the last that does."""
    names = [path, *(f"{path}-{i}" for i in range(2, 10**4))]
    free = next(i for i, name in enumerate(names) if not Path(name).exists())
    return names[max(free - 1, 0) if existing else free]


def figures_table(figures, kind="held-out rows"):
    """Figures on rows: for each SAE a row per prefix, the whole SAE last."""
    table = new_table("", "latents", "FVU", "L0", "cosine", "dead", title=f"{next(iter(figures.values()))['rows']:,} {kind}")
    for name, found in figures.items():
        first, last = found["prefixes"][0], found["prefixes"][-1]
        for level in found["prefixes"]:
            table.add_row(name if level is first else "", f"{level['latents']:,}", f"{level['fvu']:.4f}", f"{level['l0']:.2f}",
                          f"{level['max_cosine']:.3f}", f"{found['dead']:.2%}" if level is last else "", end_section=level is last)
    return table


# --------------------------------------------------------------------------------------------------- harvest and evaluate

DATASET = "noanabeshima/TinyModelTokIds", "train.jsonl", "validation.jsonl"


def tiny_model_options(command):
    for option in (
        click.option("--model", "model_path", default="tiny_model.pt",
                     help="State dict of a TinyModel: a file, or a published name: " + ", ".join(msae.SHA256)),
        click.option("--layer", type=click.IntRange(min=0), default=3,
                     help="The residual stream that enters this block; 4: after the last."),
        device_option,
    ):
        command = option(command)
    return command


def tiny_model(path, layer, device):
    """(model, the module that the residual stream of the layer enters)."""
    device, model = msae.check_device(device), msae.TinyModel.load(path)
    if layer >= len(model.layers):
        raise click.BadParameter(f"{layer} must be at most {len(model.layers) - 1}, after the last block of {path}", param_hint="--layer")
    return model.to(device), model.layers[layer]


def hook_name(model, layer):
    return f"torso.{layer}.input" if layer < len(model.torso) else "lm_head.input"


def token_batches(path, model, batch_size=64):
    """A function that starts reading the token file, or the published one of that name, anew."""
    if path in DATASET[1:] and not Path(path).exists():
        path = msae.hub_file(DATASET[0], path, repo_type="dataset")
    return lambda: msae.read_tokens(path, len(model.embed.weight), model.pos_embed.shape[1], batch_size)


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
    out, drop = Path(out), (msae.BEGIN, msae.PAD)
    if out.exists():
        raise FileExistsError(f"{out} exists: choose another --out")
    folder = msae.output_folder(out.parent)
    model, module = tiny_model(model_path, layer, device)
    batches, total = token_batches(tokens, model), 0
    for ids in batches():  # all of them are checked before the first is used
        total = min(total + int((~torch.isin(ids, torch.tensor(drop))).sum()), max_rows)
        if total == max_rows:
            break
    size, free = total * model.embed.weight.shape[1] * (2 if dtype == "float16" else 4), shutil.disk_usage(folder).free
    if size > free:
        raise OSError(f"{out} would take {size / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: lower --max-rows, or choose another --out")
    if out.exists():  # by now
        raise FileExistsError(f"{out} exists: choose another --out")
    with progress() as bar:
        n = msae.harvest(model, module, batches(), out, at="input", drop=drop, dtype=dtype, max_rows=max_rows,
                         on_rows=bar.counter("harvest", total))
    about = {"model_name": Path(model_path).name, "hook_name": hook_name(model, layer),
             "dataset": tokens if Path(tokens).exists() else DATASET[0]}
    if model_path in msae.SHA256:
        about["base_model"] = msae.TINY_MODEL[0]
    msae.write(f"{out}.json", about)
    click.echo(f"{n:,} rows of width {model.embed.weight.shape[1]} in {out}; next:  "
               f"python cli.py train --acts {shlex.quote(str(out))} --latents 3072")


@main.command("eval")
@click.argument("checkpoints", nargs=-1, required=True)
@click.option("--acts", required=True, type=click.Path(), help="Activations that training did not see, as for train.")
@click.option("--labels", type=click.Path(exists=True, dir_okay=False),
              help="A .npy with a whole number, or a row of 0 and 1, for each row of --acts: adds probing, absorption and erasure, "
                   "on at most 20,000 of them.")
@click.option("--tokens", help="Token ids as for harvest: adds the cross-entropy of TinyModel with reconstructions spliced in.")
@click.option("--max-tokens", type=click.IntRange(min=1), default=100_000, help="Use this many of --tokens.")
@tiny_model_options
@click.option("--out", type=click.Path(dir_okay=False), help="JSON file.  [default: eval.json in each checkpoint's folder]")
def evaluate(checkpoints, acts, labels, tokens, max_tokens, model_path, layer, device, out):
    """Figures of one or more checkpoints over a whole set of rows, for each prefix.

    \b
    Examples:
      python cli.py eval runs/acts-3072 --acts held.npy
      python cli.py eval runs/acts-3072 runs/acts-3072/vanilla --acts held.npy --labels labels.npy
      python cli.py eval runs/acts-3072 --acts held.npy --tokens validation.jsonl --layer 3
    """
    rows, device, results = msae.Rows(acts), msae.check_device(device), {}
    if labels:
        y = msae.check_labels(msae.read_npy(labels), len(rows))
        chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[:20_000])
        labelled = torch.from_numpy(rows.take(chosen)), y[chosen]
    saes = {path: msae.MatryoshkaSAE.load(path) for path in checkpoints}
    if tokens:
        model, module = tiny_model(model_path, layer, device)
        batches = token_batches(tokens, model, batch_size=8)  # logits take much memory
        names_here = [hook_name(model, i) for i in range(len(model.layers))]
        for path, sae in saes.items():
            trained = sae.metadata.get("hook_name")
            if trained in names_here and trained != names_here[layer]:
                raise click.BadParameter(f"{layer} is not where {path} was trained, {trained}", param_hint="--layer")
    files = {Path(out): None} if out else {Path(path) / EVAL: path for path in saes if Path(path).is_dir()}  # of one SAE, or all
    for file in files:
        msae.output_folder(file.parent)
    names = short_names(checkpoints)
    with progress() as bar:
        for path, sae in saes.items():
            figures = msae.evaluate(sae.to(device), rows, on_rows=bar.counter(names[path], len(rows)))
            found = results[path] = {"checkpoint": path, "acts": acts, **figures}
            if tokens:
                ids = limited(batches(), max_tokens, bar.counter(f"{names[path]} spliced in", max_tokens, "tokens"))
                found["loss"] = msae.loss_recovered(model, module, sae, ids, drop=(msae.BEGIN, msae.PAD))
            if labels:
                found["labels"] = msae.probe(sae.cpu(), *labelled)
    named = {names[path]: found for path, found in results.items()}
    console.print(figures_table(named, "rows"))
    console.print(frequency_bars(named))
    for name, found in named.items():
        if tokens:
            console.print(loss_table(name, found["loss"]))
        if labels:
            console.print(label_table(name, found["labels"]))
    contents = list(results.values())
    for file, of in files.items():
        msae.write(file, results[of] if of else contents[0] if len(contents) == 1 else contents)
    click.echo(f"wrote {', '.join(map(str, files)) or 'nothing: no folder, no --out'}")


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


def frequency_bars(figures):
    """How many latents fire how often: a row per half decade, a column per SAE."""
    table = new_table("fires on", *figures, title="Latents by the share of rows they fire on")
    edges, counts = next(iter(figures.values()))["frequencies"]["edges"], [f["frequencies"]["counts"] for f in figures.values()]
    used = [i for i in range(len(edges) - 1) if any(column[i] for column in counts)]
    width = max(6, (console.width - 20) // len(counts) - 12)
    for i in range(used[0], used[-1] + 1) if used else ():
        bars = (f"{'█' * round(width * column[i] / max(column))} {column[i]:,}" for column in counts)
        table.add_row(f"{edges[i]:.1e} to {edges[i + 1]:.1e}", *bars)
    return table


def loss_table(name, loss):
    table = new_table("", "latents", "loss", "recovered", title=f"Cross-entropy over {loss['tokens']:,} tokens, {name} spliced in")
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


# ---------------------------------------------------------------------------------------------------------------- bench


@main.command()
@click.option("--latents", type=click.IntRange(1, 2**31), default=3072, help="Number of latents F.")
@click.option("--d-model", type=click.IntRange(1, 2**31), default=768, help="Width D of the rows.")
@click.option("--batch-size", type=click.IntRange(1, 2**31), default=2048, help="Rows per step.")
@click.option("--k", type=float, default=30, help="Active latents per row.")
@click.option("--steps", type=click.IntRange(min=1), default=20, help="Steps to time, after three to warm up.")
@device_option
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
              help="Of the products.  [default: bfloat16 on cuda, else float32]")
def bench(latents, d_model, batch_size, k, steps, device, dtype):
    """This machine's training step, beside the encoder product alone, which no SAE can do without.

    \b
    Examples:
      python cli.py bench
      python cli.py bench --latents 24576 --steps 10
    """
    device = msae.check_device(device)
    trainer = msae.Trainer(msae.TrainConfig(n_latents=latents, k=k, batch_size=batch_size, dtype=dtype), d_model, device)
    x = (torch.randn(batch_size, 8) @ torch.randn(8, d_model) / 2 + torch.randn(batch_size, d_model)).to(device) / d_model**0.5
    a, W = (t.to(getattr(torch, trainer.dtype)) for t in (x, torch.randn(d_model, latents, device=device)))
    product, synchronize = a @ W, functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None

    def clock(call):
        synchronize()
        started = time.perf_counter()
        call()
        synchronize()
        return time.perf_counter() - started

    pairs = [(clock(lambda: torch.mm(a, W, out=product)), clock(lambda: trainer.step(x))) for _ in range(steps + 3)]
    alone, step = (statistics.median(times) for times in zip(*pairs[3:]))  # in turn, so that drift cancels
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    table = new_table("", "", show_header=False)
    table.add_row("encoder product alone", f"{1e3 * alone:.1f} ms")
    table.add_row("training step", f"{1e3 * step:.1f} ms, {step / alone:.2f} x the product")
    table.add_row("rows per second", f"{batch_size / step:,.0f}")
    table.add_row("peak memory of this process", f"{peak / 2**20:,.0f} MiB" if peak else "not known here")
    console.print(f"batch {batch_size:,}, width {d_model:,}, {latents:,} latents, k {k:g}, {len(trainer.step_prefixes())} prefixes, "
                  f"{trainer.dtype} on {device}")
    console.print(table)


def peak_memory():
    """Peak resident memory of this process in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ----------------------------------------------------------------------------------------------------------------- push

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
@click.option("--private/--public", default=None, show_default=False, help="Who sees a new repository.  [default: your Hub settings]")
@click.option("--revision", help="Branch to commit to, created if it is new.  [default: main]")
@click.option("--commit-message", default="Upload a Matryoshka SAE", help="First line of the commit.")
@click.option("--create-pr", is_flag=True, help="Open a pull request with the commit.")
@click.option("--token", help="Access token.  [default: of `hf auth login` or HF_TOKEN]")
@click.option("--license", default="mit", help="Of the weights, for the card.")
@click.option("--dry-run", is_flag=True, help="Show what would go up, without touching the network.")
def push(checkpoint, repo, private, revision, commit_message, create_pr, token, license, dry_run):
    """Upload CHECKPOINT to REPO on the Hugging Face Hub, with a model card, in one commit.

    CHECKPOINT defaults to the newest under runs/, REPO to its folder's name under your name. Weights, configs, metrics and card
    go up; the state of the optimizer never.

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
    files = {name: (folder / name).read_bytes() for name in (msae.WEIGHTS, msae.CONFIG)}
    files["config.json"] = files[msae.CONFIG]  # the Hub counts downloads by it
    files.update({name: (folder / name).read_bytes() for name in (msae.METRICS, EVAL) if (folder / name).is_file()})
    problem = f"{folder} cannot be pushed to {repo}"
    with msae.hub_errors(problem):
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.utils import validate_repo_id
        validate_repo_id(repo)
        api = HfApi(token=token)
        if "/" not in repo:
            repo = f"{'YOUR_NAME' if dry_run else api.whoami()['name']}/{repo}"
    files["README.md"] = model_card(sae, folder, repo, license, revision).encode()
    if dry_run:
        click.echo(f"would push {folder} to {repo}, in one commit:")
        click.echo("".join(f"{len(content):>13,}  {name}\n" for name, content in files.items()) + f"\n{files['README.md'].decode()}")
        return
    with msae.hub_errors(problem):
        api.create_repo(repo, private=private, exist_ok=True)
        if revision and not api.revision_exists(repo, revision):
            api.create_branch(repo, branch=revision)
        commit = api.create_commit(repo, [CommitOperationAdd(*item) for item in files.items()], commit_message=commit_message,
                                   revision=revision, create_pr=create_pr)
    click.echo(commit.pr_url or f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision else ""))


def newest_checkpoint():
    """The folder under runs/ that was saved last; a vanilla twin counts as part of its Matryoshka SAE."""
    found = [path for path in Path("runs").rglob(msae.WEIGHTS) if not (path.parent.parent / msae.WEIGHTS).exists()]
    if not found:
        raise FileNotFoundError("there is no checkpoint under runs/: train one, or name its folder")
    return max(found, key=lambda path: path.stat().st_mtime).parent


def model_card(sae, folder, repo, license, revision=None):
    """The README.md of ``repo``; its figures are those of eval.json in ``folder``, or the last of metrics.jsonl."""
    known = sae.metadata
    facts = {**{name: known.get(name) or "not recorded" for name in ORIGIN}, "k": known.get("k")}
    if isinstance(known.get("training"), dict):
        facts["settings"] = ", ".join(f"{name} {value}" for name, value in known["training"].items() if value is not None)
    at = f", revision={revision!r}" if revision else ""
    figures = "There was no evaluation on held-out rows."
    try:
        if (folder / EVAL).is_file():
            found = msae.read_json(folder / EVAL)
            *inner, whole = [f"| {p['latents']:,} | {p['fvu']:.4f} | {p['l0']:.2f} |" for p in found["prefixes"]]
            rows = f"of {found['acts']}" if "acts" in found else "that training did not see"
            figures = "\n".join(["| latents | FVU | L0 | dead | cosine |", "|---|---|---|---|---|", *(f"{row} | |" for row in inner),
                                 f"{whole} {found['dead']:.2%} | {found['max_cosine']:.3f} |", "", LEGEND.format(found["rows"], rows)])
        elif (folder / msae.METRICS).is_file() and (lines := (folder / msae.METRICS).read_text().splitlines()):
            last = json.loads(lines[-1])
            figures += (f" On a training batch at step {last['step']:,}: FVU {last['fvu']:.4f}, L0 {last['l0']:.2f}, "
                        f"dead {last['dead']:.2%}.")
    except (LookupError, TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{EVAL} or {msae.METRICS} in {folder} is not what training writes: {error!r}") from None
    base = f"base_model: {json.dumps(known['base_model'])}\n" if known.get("base_model") else ""
    return CARD.format(license=json.dumps(license), base=base, title=repo.split("/")[1], F=len(sae.b_enc), D=len(sae.b_dec),
                       p=sae.prefixes[0], prefixes=", ".join(map(str, sae.prefixes)), figures=figures, source=f"{repo!r}{at}",
                       facts="\n".join(f"- {name.replace('_', ' ')}: {value}" for name, value in facts.items() if value),
                       saelens=f"SAE.load_from_disk(snapshot_download({repo!r}{at}))")


# ------------------------------------------------------------------------------------------------------------- progress


class progress:
    """A live line per run in a terminal, a plain line every few seconds elsewhere."""

    def __enter__(self):
        self.wide = console.width >= 95 or not console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=10), TextColumn("{task.fields[figures]}"))
        self.bar = Progress(*(columns if self.wide else columns[::2]), console=console, disable=not console.is_terminal)
        self.bar.start()
        return self

    def __exit__(self, *error):
        self.bar.stop()

    def line(self, label, total, unit="rows"):
        """A function that shows: number done of ``total``, units per second, seconds left, and what comes before and after those."""
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
        show = self.line(label, cfg.steps)

        def report(figures):
            step, rate = figures["step"], max(1, figures["rows_per_second"])
            dead = f"  dead {figures['dead']:.1%}" if self.wide else ""
            show(step, rate, (cfg.steps - step) * cfg.batch_size / rate, f"{'' if console.is_terminal else 'step '}{step}/{cfg.steps}",
                 f"  FVU {figures['fvu']:.3f}  L0 {figures['l0']:.1f}{dead}")
        return report


if __name__ == "__main__":
    signal.signal(signal.SIGINT, before)
    main()
