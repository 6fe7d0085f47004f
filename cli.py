"""Command line over msae: parse, one library call, show."""

import contextlib
import dataclasses
import datetime
import functools
import json
import math
import os
import shlex
import signal
import statistics
import sys
import time
from pathlib import Path

import click
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

import msae

HERE = Path(__file__).parent
console = Console()

# Replications of the ReLU + L1 original (noanabeshima/matryoshka-saes): a post of 2026, one seed.
PUBLISHED = {"matryoshka": {"fvu": 0.021, "l0": 1.13, "clean": 20, "features": 20},
             "vanilla": {"fvu": 0.000, "l0": 0.86, "clean": 11, "features": 20}}
COLOURS = ((13, 8, 42), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # dark 0 to bright 1


class Commands(click.Group):
    """A group that turns what the library refuses into one line and an exit code, never a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except OSError as error:
            raise click.ClickException(f"{error.filename}: {error.strerror}" if error.filename else str(error)) from None
        except ValueError as error:
            raise click.ClickException(str(error)) from None
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not any(word in str(error) for word in ("allocate", "out of memory", "size calculation overflowed")):
                raise
            raise click.ClickException(f"not enough memory, try fewer latents or a smaller batch: {' '.join(str(error).split()):.200}") from None
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            raise SystemExit(130) from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
def main():
    """Matryoshka sparse autoencoders: train them, look at them, share them."""


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
    folder = msae.output_folder(out, own={"toy.json", "toy.svg"})
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
    report = results[0] if seeds == 1 else {"seeds": results}
    for name, text in {"toy.json": json.dumps(report, indent=2) + "\n", "toy.svg": svg(maps)}.items():
        with msae.atomic(folder / name) as path:
            path.write_text(text, encoding="utf-8")
    console.print(toy_table(results))
    console.print(absorption_table(results[0]))
    console.print(terminal_maps(maps))
    console.print(f"{sum(r['seconds'] for r in results):.0f} s; wrote {folder / 'toy.json'} and {folder / 'toy.svg'}", highlight=False)


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
            'font-family="system-ui, sans-serif">\n<rect width="100%" height="100%" rx="8" fill="#fff"/>\n' + "\n".join(parts) + "\n</svg>\n")


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
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default="cuda if there is one, else cpu")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]),
              help="Of the products; weights stay float32.  [default: bfloat16 on cuda, else float32]")
@click.option("--out", type=click.Path(file_okay=False), help="A new folder.  [default: a new one under runs/]")
@click.option("--resume", is_flag=True, help="Go on with the run in --out (or the newest default folder) where its checkpoint is.")
@click.option("--init-from", type=click.Path(exists=True, file_okay=False), help="Start a new run from the weights of this checkpoint.")
@click.option("--save-minutes", type=float, default=10, help="Minutes between checkpoints.")
@click.option("--config", type=click.Path(exists=True, dir_okay=False), help="JSON with any TrainConfig fields; options override it.")
def train(acts, device, out, config, spare, baseline, resume, init_from, save_minutes, **options):
    """Train on activations and save a checkpoint that SAELens opens too.

    A tenth of the rows (at most 16,384) is set aside at random for the figures shown at the end. Ctrl-C saves first;
    the same command with --resume goes on. With several processes, torchrun takes the place of python.

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
    with processes(device) as (device, first):
        rows, held_out = msae.Rows(acts).split_off(0.1, cfg.seed)
        folder = Path(out or default_folder(f"runs/{Path(acts).stem}-{cfg.n_latents}", existing=resume))
        figures = {}
        for name, own, where in (("matryoshka", cfg, folder), ("vanilla", cfg.vanilla(), folder / "vanilla"))[: 1 + baseline]:
            again = resume and (name == "matryoshka" or (where / msae.STATE).exists())
            with resume_hint(where, folder, out), progress() as bar:
                sae = msae.train(rows, own, device=device, out=where, resume=again, save_minutes=save_minutes,
                                 init_from=init_from if name == "matryoshka" and not again else None, on_log=bar.reporter(name if baseline else "train", own) if first else None)
            figures[name] = msae.evaluate(sae, held_out) if first else None
    if first:
        console.print(figures_table(figures))
        console.print("dead: latents that never fire on these rows; cosine: mean over latents of the largest with another decoder row\n"
                      f"\nsaved {folder}\nload it with  sae = msae.MatryoshkaSAE.load({str(folder)!r})", highlight=False)


@contextlib.contextmanager
def processes(device):
    """(this process's device, whether it is the first): joins the processes that torchrun started, if it did."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        if "LOCAL_RANK" not in os.environ:
            yield device, True
            return
        on_cuda = device.startswith("cuda")
        if on_cuda and device != "cuda":
            raise click.BadParameter(f"{device!r} must have no number under torchrun, which gives each process its own", param_hint="--device")
        device = f"cuda:{os.environ['LOCAL_RANK']}" if on_cuda else device
        msae.check_device(device)
        torch.distributed.init_process_group("nccl" if on_cuda else "gloo", device_id=torch.device(device) if on_cuda else None)
        yield device, torch.distributed.get_rank() == 0
        torch.distributed.destroy_process_group()
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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


def figures_table(figures):
    """Figures on held-out rows: a row per prefix of the Matryoshka SAE, the whole SAE last, then its vanilla twin."""
    table = new_table("", "latents", "FVU", "L0", "dead", "cosine", title=f"{figures['matryoshka']['rows']:,} held-out rows")
    for name, found in figures.items():
        for level in found["prefixes"]:
            last = level is found["prefixes"][-1]
            table.add_row(name if level is found["prefixes"][0] else "", f"{level['latents']:,}", f"{level['fvu']:.4f}", f"{level['l0']:.2f}",
                          *((f"{found['dead']:.2%}", f"{found['max_cosine']:.3f}") if last else ()), end_section=last)
    return table


# ---------------------------------------------------------------------------------------------------------------- bench


@main.command()
@click.option("--latents", type=click.IntRange(1, 2**31), default=3072)
@click.option("--d-model", type=click.IntRange(1, 2**31), default=768)
@click.option("--batch-size", type=click.IntRange(1, 2**31), default=2048)
@click.option("--k", type=float, default=30)
@click.option("--steps", type=click.IntRange(min=1), default=20, help="Steps to time, after three to warm up.")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu", show_default="cuda if there is one, else cpu")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="[default: bfloat16 on cuda, else float32]")
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

    times = [(clock(lambda: torch.mm(a, W, out=product)), clock(lambda: trainer.step(x))) for _ in range(steps + 3)][3:]  # in turn: drift cancels
    alone, step = (statistics.median(t) for t in zip(*times))
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()
    table = new_table("", "", show_header=False)
    table.add_row("encoder product alone", f"{1e3 * alone:.1f} ms")
    table.add_row("training step", f"{1e3 * step:.1f} ms, {step / alone:.2f} x the product")
    table.add_row("rows per second", f"{batch_size / step:,.0f}")
    table.add_row("peak memory", f"{peak / 2**20:,.0f} MiB" if peak else "not known here")
    console.print(f"batch {batch_size:,}, width {d_model:,}, {latents:,} latents, k {k:g}, {len(trainer.prefixes())} prefixes, "
                  f"{trainer.dtype} on {device}", highlight=False)
    console.print(table)


def peak_memory():
    """Peak resident memory of this process in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ------------------------------------------------------------------------------------------------------------- progress


class progress:
    """A live line per training run in a terminal, a plain line every few seconds elsewhere."""

    def __enter__(self):
        self.wide = console.width >= 95 or not console.is_terminal
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=10), TextColumn("{task.fields[figures]}"))
        self.bar = Progress(*(columns if self.wide else columns[::2]), console=console, disable=not console.is_terminal)
        self.bar.start()
        return self

    def __exit__(self, *error):
        self.bar.stop()

    def reporter(self, label, cfg):
        """A callback for ``msae.train`` that shows its figures."""
        task, shown = self.bar.add_task(label, total=cfg.steps, figures=""), -math.inf

        def show(figures):
            nonlocal shown
            left = datetime.timedelta(seconds=min(10**12, round((cfg.steps - figures["step"]) * cfg.batch_size / max(1, figures["rows_per_second"]))))
            rate, dead = f"{figures['rows_per_second']:,.0f} rows/s  ", f"  dead {figures['dead']:.1%}"
            line = f"{figures['step']}/{cfg.steps}  {rate if self.wide else ''}{left} left  FVU {figures['fvu']:.3f}  L0 {figures['l0']:.1f}"
            line += dead if self.wide else ""
            self.bar.update(task, completed=figures["step"], figures=line)
            if not console.is_terminal and (figures["step"] == cfg.steps or time.monotonic() - shown > 10):
                shown = time.monotonic()
                print(f"{label}  step {line}", flush=True)
        return show


if __name__ == "__main__":
    main()
