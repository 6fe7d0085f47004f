"""Command line over msae: parse, one library call, show."""

import os
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the imports take seconds: Ctrl-C ends them without a trace

import contextlib
import dataclasses
import io
import json
import math
import shutil
import sys
import time
import warnings
from pathlib import Path

import click
import numpy as np
import torch
from click import option
from rich import box
from rich.columns import Columns
from rich.console import Console, Group
from rich.progress import Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.terminal_theme import DEFAULT_TERMINAL_THEME
from rich.text import Text

import msae

EVALS, DROPPED = "eval*.json", (msae.BEGIN, msae.PAD)  # eval.json, of train, and eval-ROWS.json, of eval
DATASET, PUBLISHED_TOKENS = "noanabeshima/TinyModelTokIds", ("train.jsonl", "validation.jsonl")
OLD_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_FILE, FOLDER = click.Path(dir_okay=False, path_type=Path), click.Path(file_okay=False, path_type=Path)


class AtLeast(click.IntRange):
    def _describe_range(self):
        return f"{self.min} to {self.max}" if self.max else f"{self.min} or more"


class Terminal(Console):
    def on_broken_pipe(self):
        raise  # the BrokenPipeError that is handled: rich would exit, but the work is to be saved first


console = Terminal(markup=False, emoji=False, highlight=False)


def say(*words):
    """Print what is said in passing: a closed pipe or a full disk does not end the work."""
    with contextlib.suppress(OSError):
        console.print(*words, soft_wrap=True)


def available(ctx, param, name):
    """``torch.device`` of that name; ``ValueError`` if this machine or this build of torch has none."""
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:  # torchrun gives each process its own
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with msae.reading(f"--device {name!r:.100}", "available here"):
        return torch.ones(1, device=name).device


dtype_option = option("--dtype", help="Of the products: float32, bfloat16 or float16.  [default: by device]")
device_option = option("--device", default="cuda" if torch.cuda.is_available() else "cpu", callback=available,
                       help="Or cuda:1.")
model_option = option("--model", "model_path", default="tiny_model.pt", help="A file, or a published name.")
norm_option = option("--max-norm", type=click.FloatRange(1), default=10, help="As for train.")
layer_option = option("--layer", type=AtLeast(0), default=3, help="Stream into this block; 4: the end.")


class Commands(click.Group):
    """A group that turns what the library refuses into one line and an exit code, never a traceback."""

    def invoke(self, ctx):
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.exit(130)
        except (click.exceptions.Exit, BrokenPipeError):
            raise
        except (OSError, ValueError, MemoryError, RuntimeError) as error:
            raise click.ClickException(" ".join(str(error).split()) or "not enough memory") from None


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(msae.__version__, message="msae %(version)s")
def main():
    """Matryoshka sparse autoencoders: train, measure and share them."""
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # not a line for each try of a connection
    warnings.showwarning = lambda message, kind, *where: kind is UserWarning and say(message)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & {*dir(signal)}:  # Windows has no SIGHUP
        number = getattr(signal, name)
        if signal.getsignal(number) is signal.SIG_DFL:  # one that is ignored stays so
            signal.signal(number, leave)


def leave(number, frame):
    signal.signal(number, signal.SIG_DFL)  # a second one acts at once
    sys.exit(128 + number)


def must_be_new(file):
    if file and file.exists():
        raise FileExistsError(f"{file} exists: choose another --out")


def read_json(path):
    with msae.reading(path, "a JSON object"):
        return dict(**json.loads(path.read_text(encoding="utf-8-sig")))  # Windows puts a byte order mark


def cell(text, figures):
    """``text`` with figures filled in; nothing where one is missing or None."""
    try:
        return text.format(**figures)
    except (LookupError, TypeError):
        return ""


def show_table(title, columns, results, rows_of=list):
    """A section for each of ``results``, a row for each of its ``rows_of``; columns: texts for ``cell``."""
    table = Table("", *columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.columns[0].overflow = "fold"
    for name, found in results.items():
        for figures in rows_of(found):
            table.add_row(name, *(cell(text, figures) for text in columns.values()))
            name = ""
        table.add_section()
    console.width, width = max(80, console.width), console.width  # cut figures would be none
    console.print(title, table, sep="\n")
    console.width = width


@contextlib.contextmanager
def progress(label, total, text="{per_second:,.0f}/s"):
    """A live line in a terminal, else one every ten seconds; yields its callback, for a number or figures."""
    started, printed = time.monotonic(), -math.inf
    done = TextColumn("{task.description} {task.completed:,}/{task.total:,}", markup=False)
    columns = (done, TextColumn("{task.fields[figures]}"), TimeRemainingColumn())

    def show(found):
        nonlocal printed
        now = time.monotonic()
        if not isinstance(found, dict):
            found = {"step": found, "per_second": found / max(now - started, 1e-9)}
        lines.update(task, completed=found["step"], figures=text.format(**found))
        if not console.is_terminal and (found["step"] == total or now - printed > 10):
            printed = now
            say(*(column(lines.tasks[task]) for column in columns))

    with Progress(*columns, console=console, disable=not console.is_terminal,
                  speed_estimate_period=3600) as lines:  # reports may be rare
        task = lines.add_task(label, total=total, figures="")
        yield show


# -------------------------------------------------------------------------------------------------------- toy
RECOVERED = {"seed": "{seed}", "FVU": "{fvu:.3f}", "L0": "{l0:.2f}", "clean": "{clean:g}/{features:g}",
             "cos": "{mean_cosine:.3f}", "min": "{min_cosine:.3f}", "absorbed": "{absorbed:.2f}"}
TRAINING = "FVU {fvu:.3f} L0 {l0:.1f} dead {dead:.1%} {rows_per_second:,}/s"
SHADES = [*zip(".-+*#", ("#0d082a", "#57106e", "#bc3754", "#f98e09", "#fcffa4"))]  # 0 to 1


@main.command(epilog="Example: python cli.py toy --seeds 10 --out runs/ten-seeds")
@option("--config", type=OLD_FILE, default=Path(__file__).with_name("toy_config.json"), help="Settings.")
@option("--seed", type=AtLeast(0, 2**62), default=0, help="First seed: of directions, rows and weights.")
@option("--seeds", type=AtLeast(1), default=1, help="Number of seeds, one after the other.")
@option("--out", type=FOLDER, default="runs/toy", help="Folder for toy.json, toy.svg and look.html.")
def toy(config, seed, seeds, out):
    """Show absorption, and its cure, on a tree of features. Files are written after each seed."""
    settings, results = read_json(config), []
    torch.set_num_threads(1)  # 20 x 20 matrices: threads would only wait for each other
    for number in range(seed, seed + seeds):
        started, saes = time.perf_counter(), {}
        with msae.reading(config, "a toy"):
            tree, configs = toy_setup(number, **settings)
        n = configs["vanilla"].steps * configs["vanilla"].batch_size
        rows = tree.sample(min(n, 2**25 // tree.d_model), number)  # at most 128 MiB
        out.mkdir(parents=True, exist_ok=True)
        for name, cfg in configs.items():
            with progress(f"{name} {number}  step", cfg.steps, TRAINING) as show:
                saes[name] = msae.train(rows, cfg, on_log=show)
        figures = {name: msae.toy_figures(sae, tree, seed=number + 1_000_003) for name, sae in saes.items()}
        results.append({"seed": number, "seconds": round(time.perf_counter() - started, 1), **figures})
        msae.write(out / "toy.json", results[0] if seeds == 1 else {"seeds": results})
        paper = Console(record=True, width=6 * len(tree.parent_of) + 20, height=40, file=io.StringIO())
        paper.print(draw(tree, saes, width=2))
        svg = paper.export_svg(title="python cli.py toy", theme=DEFAULT_TERMINAL_THEME)
        msae.write(out / "toy.svg", svg.encode())
        toy_page(out / "look.html", saes["matryoshka"], tree)
    show_table("True features recovered", RECOVERED, {name: toy_rows(name, results) for name in configs})
    console.print(draw(tree, saes, width=1 + (console.width > 140)))
    click.echo(f"wrote {out / 'toy.json'}, {out / 'toy.svg'} and {out / 'look.html'}")


def toy_setup(seed, /, tree, train, **size):
    """The tree and the configs {"matryoshka", "vanilla"} of settings: tree, train, d_model, norm_std."""
    tree = msae.FeatureTree(tree, seed=seed, **size)
    cfg = msae.TrainConfig(**{"n_latents": len(tree.parent_of), **train, "seed": seed})
    return tree, {"matryoshka": cfg, "vanilla": cfg.vanilla()}


def pure_maps(tree, saes):
    """Matched codes of inputs that are one feature with its parents, {title: (n_features, n_features)}."""
    pure, norms = torch.eye(len(tree.parent_of)), tree.directions.norm(dim=1)
    for parent, child in tree.pairs:
        pure[child] += pure[parent]
    acts = {name: msae.matched_acts(sae, tree, pure @ tree.directions)[0] for name, sae in saes.items()}
    return {"true features": pure, **{name: values / norms for name, values in acts.items()}}


def toy_rows(name, results):
    """The figures of an SAE for each seed, and their mean if there are several."""
    rows = [{"seed": result["seed"], **result[name]} for result in results]
    for row in rows:
        rates = [pair["rate"] for pair in row.pop("absorption") if pair["rate"] is not None]
        row["absorbed"] = np.mean(rates) if rates else math.nan
    mean = {key: np.mean([row[key] for row in rows]) for key in rows[0]} | {"seed": "mean"}
    return [*rows, mean] if len(rows) > 1 else rows


def shade(value, width, silent=False):
    """(Signs, style) of a value from 0 to 1: a colour, or a sign where there are no colours."""
    sign, colour = SHADES[min(4, max(0, round(4 * float(value))))]
    ring = "o" if width == 1 else "()"
    return (ring, f"bold #00ccff on {colour}") if silent else (sign * width, f"{colour} on {colour}")


def draw(tree, saes, width):
    """The pure maps beside each other, with cells of ``width`` signs and parents in bold, and a legend."""
    maps, pictures = pure_maps(tree, saes), []
    true = maps["true features"]
    bold = ["bold" if i in tree.parent_of else "" for i in range(len(true))]
    numbers = [(f"{i:>{width}}"[-width:] if i % 2 == 0 else " " * width, bold[i]) for i in range(len(true))]
    for title, rows in maps.items():
        parts = [f"   {title.capitalize():^{len(true) * width}}\n   ", *numbers]
        for i, row in enumerate(rows):
            cells = [shade(value, width, on > 0.5 and value < 0.1) for value, on in zip(row, true[i])]
            parts += ["\n", (f"{i:>2} "[-3:], bold[i]), *cells]
        pictures.append(Text.assemble(*parts))
    legend = ("row: a feature is on, with its parent (bold); column: its latent\n", shade(0, width, True),
              " absorbed: on, but its latent is silent; 0 ", *(shade(i / 4, width) for i in range(5)), " 1")
    return Group(Columns(pictures, padding=(0, 3)), Text.assemble(*legend))


# ------------------------------------------------------------------------------------------------------ train
FIGURES = {"latents": "{latents:,}", "FVU": "{fvu:.4f}", "L0": "{l0:.2f}", "cosine": "{max_cosine:.3f}",
           "dead": "{dead:.2%}"}
TRAINED = FIGURES | {"silent": "{silent[share]:.2%}"}
FAMILY = {"latents": "{latents:,}", "FVU inside": "{fvu:.4f}", "FVU alone": "{alone[fvu]:.4f}",
          "L0 inside": "{l0:.2f}", "L0 alone": "{alone[l0]:.2f}", "cos inside": "{max_cosine:.3f}",
          "cos alone": "{alone[max_cosine]:.3f}"}
LEGEND = "cosine: mean of the largest with another decoder row; dead: never fire on these {rows:,} rows"
SILENT = "; silent: did not on the last {silent[rows]:,} of training"


def numbers(text):
    return tuple(float(n) if "." in n else int(n) for n in text.split(","))


@main.command(epilog="Example: python cli.py train --acts shards/ --latents 3072 --pareto 10 --k 40")
@option("--acts", required=True, help="A .npy of floats, (rows, D) or (docs, positions, D), or a folder.")
@option("--latents", "n_latents", type=int, help="Number of latents F.  [required, here or in --config]")
@option("--k", type=float, help="Active latents per row, on average.  [default: 30]")
@option("--prefixes", type=numbers, help="Lengths or fractions.  [default: .0625, .125, .25, .5, 1.0]")
@option("--pareto", "n_prefixes", type=int, help="Instead, sample this many prefixes at every step.")
@option("--spare", type=AtLeast(0), help="Spare latents at first.  [default: a quarter of F]")
@option("--baseline", is_flag=True, help="Then train the vanilla twin on the same batches and show both.")
@option("--family", is_flag=True, help="Then train a vanilla SAE of each prefix's size and L0, to compare.")
@option("--steps", type=int, help="Optimizer steps.  [default: 10000]")
@option("--batch-size", type=int, help="Rows per step, of all processes together.  [default: 2048]")
@option("--lr", type=float, help="Peak learning rate of Adam.  [default: by F, batch size and steps]")
@option("--seed", type=int, help="Of weights, row order and held-out rows.  [default: 0]")
@option("--max-norm", type=float, help="Leave out rows this many median distances out.  [default: 10]")
@device_option
@dtype_option
@option("--out", type=FOLDER, help="A new folder.  [default: a new one under runs/]")
@option("--resume", is_flag=True, help="Go on with the run in --out, or in the newest default folder.")
@option("--save-minutes", type=float, default=10, help="Minutes between checkpoints.")
@option("--config", type=OLD_FILE, help="JSON with any TrainConfig fields; options override it.")
def train(acts, device, out, config, spare, baseline, family, resume, save_minutes, **options):
    """Train on activations; SAELens opens the checkpoint.

    A tenth of the rows (at most 16,384) is set aside in random blocks for the figures at the end (eval.json).
    Ctrl-C saves first; the same command with --resume goes on. With several processes, torchrun takes the
    place of python. The checkpoint keeps model_name, hook_name, dataset, base_model of acts.npy.json, if any.
    """
    cfg, figures, last = run_config(config, spare, options), {}, {}
    beside = min(Path(acts).glob("*.npy.json"), default=Path(f"{Path(acts)}.json"))  # the first of a folder
    about = read_json(beside) if beside.is_file() else {}
    about = {key: about[key] for key in ("model_name", "hook_name", "dataset", "base_model") if key in about}
    about["acts"] = str(Path(acts).resolve())
    console.quiet = not (is_first := os.environ.get("RANK", "0") == "0")
    rows, held_out = msae.Rows(acts).within(cfg.max_norm).split_off(0.1, cfg.seed)
    folder = out or default_folder(Path("runs", f"{Path(acts).stem}-{cfg.n_latents}"), resume, is_first)
    runs = [("matryoshka", cfg, folder), *[("vanilla", cfg.vanilla(), folder / "vanilla")] * baseline]
    n_runs, started = len(runs) + family * len(cfg.prefix_lengths()), time.time()
    epochs = cfg.steps * cfg.batch_size / max(1, len(rows))
    try:
        new = ", where nothing is saved yet" if resume and not (folder / msae.STATE).exists() else ""
        say(f"{len(rows):,} rows of width {rows.d_model}, {len(held_out):,} more held out; {cfg.steps:,} "
            f"steps, {epochs:,.1f} epochs; {cfg.k:g} of {cfg.n_latents:,} latents a row; to {folder}{new}")
        if "LOCAL_RANK" in os.environ:  # of torchrun
            if device.type == "cuda":
                torch.cuda.set_device(device)
            torch.distributed.init_process_group()
            click.get_current_context().call_on_close(torch.distributed.destroy_process_group)
        for number, (name, own, where) in enumerate(runs, 1):  # which a family makes longer
            last.clear()
            part = f"{name} {number} of {n_runs}" if n_runs > 1 else "train"
            with progress(f"{part}  step", own.steps, TRAINING) as show:
                sae = msae.train(rows, own, device=device, out=where, resume=resume, metadata=about,
                                 on_log=lambda found: last.update(found) or show(found),
                                 save_minutes=save_minutes)
            found = figures[name] = figures_of(sae, held_out, own, last)
            if not last:
                say(f"{where} was finished before")
            if is_first and (last or not (where / "eval.json").exists()):
                msae.write(where / "eval.json", found)
            if family and where == folder:
                runs += [alone(cfg, level, folder) for level in found["prefixes"]]
    except BaseException:
        if is_first:
            show_how_to_resume(folder, started)
        raise
    finally:
        if is_first and not out:
            with contextlib.suppress(OSError):  # it holds something
                folder.rmdir()
                folder.parent.rmdir()
    pairs = [{"alone": figures.pop(f"alone-{level['latents']}"), **level}
             for level in figures["matryoshka"]["prefixes"] if family]
    show_figures("held-out rows", TRAINED, figures)
    if family:
        show_table("The SAE inside against the SAE alone", FAMILY, {"": pairs})
    console.print(f"\nsaved {folder}\nload it with  sae = msae.MatryoshkaSAE.load({str(folder)!r})\n"
                  f"measure it    python cli.py eval {folder} --acts OTHERS.npy\n"
                  f"look at it    python cli.py look {folder}\nshare it      python cli.py push {folder}",
                  soft_wrap=True)


def figures_of(sae, held_out, cfg, last):
    """Those of ``evaluate`` and, of the ``last`` step's figures, which latents were silent."""
    found = msae.evaluate(sae, held_out)
    if last:
        rows = min(cfg.dead_after, cfg.steps * cfg.batch_size)
        found["silent"] = found["prefixes"][-1]["silent"] = {"rows": rows, "share": last["dead"]}
        if last["dead"] > 0.1:
            found["remarks"].append(f"many are silent: try --lr {cfg.lr / 3:.1g}")
    return found


def run_config(path, spare, options):
    """The ``TrainConfig`` of a JSON file and the options given, which win; ``spare``: latents more."""
    settings = read_json(path) if path else {}
    if options["prefixes"] or options["n_prefixes"]:  # either replaces both
        settings |= {"prefixes": None, "n_prefixes": None}
    settings |= {name: value for name, value in options.items() if value is not None}
    if "n_latents" not in settings:
        raise click.UsageError("Missing option '--latents', the number of latents, or n_latents in --config.")
    with msae.reading("this run", "possible"):
        if spare is not None or "n_latents_start" not in settings:
            n_latents = msae.TrainConfig(**settings | {"n_latents_start": None}).n_latents
            settings["n_latents_start"] = n_latents + (round(n_latents / 4) if spare is None else spare)
        return msae.TrainConfig(**settings)


def alone(cfg, level, folder):
    """Name, config and folder of the vanilla twin of a prefix with these figures: its size, L0 and rate."""
    p, share = level["latents"], level["latents"] / cfg.n_latents
    own = dataclasses.replace(cfg.vanilla(), n_latents=p, prefixes=(p,), k_start=None,
                              k=max(level["l0"], 1 / cfg.batch_size),
                              n_latents_start=round((cfg.n_latents_start or cfg.n_latents) * share),
                              lr=cfg.lr / share ** (1 / 6))
    return f"alone-{p}", own, folder / f"alone-{p}"


def default_folder(path, resume, is_first):
    """Of ``path``, ``path-2``, ... the newest to resume, or the next, which mkdir grants to one run alone."""
    names = [path, *(path.with_name(f"{path.name}-{i}") for i in range(2, 1000))]
    if resume:
        states = (name / msae.STATE for name in names if (name / msae.STATE).exists())
        return max(states, key=os.path.getmtime, default=path / msae.STATE).parent
    for name in names if is_first else ():
        with contextlib.suppress(FileExistsError):
            name.mkdir(parents=True)
            return name
    return path


def show_how_to_resume(folder, started):
    state = max(folder.rglob(msae.STATE), key=os.path.getmtime, default=None)
    if state and state.stat().st_mtime > started:  # else it was refused
        steps = torch.load(state, map_location="cpu", weights_only=True, mmap=True)["trainer"]["steps_done"]
        click.echo(f"step {steps} is saved in {state.parent}; to go on, repeat the command with "
                   f"--out {folder} --resume", err=True)


def show_figures(title, columns, results):
    """Table, legend and remarks on what was found for each name in ``results``."""
    some = next(iter(results.values()))
    left_out = f", {some['left_out']:,} too far out to count" if some["left_out"] else ""
    show_table(f"{some['rows']:,} {title}{left_out}", columns, results, lambda found: found["prefixes"])
    remarks = (f"{name}: {remark}" for name, found in results.items() for remark in found["remarks"])
    console.print(cell(LEGEND, some) + cell(SILENT, some), *remarks, sep="\n", soft_wrap=True)


# --------------------------------------------------------------------------------------- harvest and evaluate
SPLICED = {"latents": "{latents:,}", "loss": "{spliced:.4f}", "recovered": "{recovered:.1%}"}
PROBED = {"latents": "{latents:,}", "raw": "{raw[f1]:.3f}", "k=1": "{probes[0][f1]:.3f}",
          "k=5": "{probes[4][f1]:.3f}", "main\nsilent": "{main_silent:.1%}", "absorbed": "{absorption:.1%}",
          "split": "{splitting:.1f}"}


def tiny_model(path, layer, device, tokens, n_most):
    """(model, names of the streams that enter its layers, ``read_tokens`` of a file or a published one)."""
    model = msae.TinyModel.load(path)
    if layer >= len(model.layers):
        raise click.UsageError(f"--layer {layer} must be at most {len(model.layers) - 1}, the end of {path}")
    if tokens in PUBLISHED_TOKENS and not Path(tokens).exists():
        tokens = msae.download(DATASET, [tokens], repo_type="dataset") / tokens
    hooks = [*(f"torso.{i}.input" for i in range(len(model.torso))), "lm_head.input"]
    ids = read_tokens(tokens, len(model.embed.weight), model.pos_embed.shape[1], n_most)
    return model.to(device), hooks, ids


def read_tokens(path, n_vocab=10_000, n_positions=256, n_most=math.inf):
    """Ids (docs, T) of a ``.npy`` or a ``.jsonl`` with {"tok_ids": [...]} a line, ``n_most`` and DROPPED."""
    docs, n, is_npy = [], 0, str(path).endswith(".npy")
    for number, line in enumerate(np.atleast_1d(msae.read_npy(path)) if is_npy else open(path, "rb"), 1):
        where = f"{path}, line {number}"
        with msae.reading(where, '{"tok_ids": [whole numbers]}'):
            ids = np.array(line if is_npy else json.loads(line)["tok_ids"])
            ids = ids.astype(np.int64, casting="same_kind")
            (n_ids,) = ids.shape
        wrong, n_first = ids[(ids < 0) | (ids >= n_vocab)], len(docs[0]) if docs else n_ids
        if len(wrong) or not 0 < n_ids == n_first <= n_positions:
            raise ValueError(f"{where}: tok_ids must be 1 to {n_positions} ids in [0, {n_vocab}), {n_first} "
                             f"as in the first, got {n_ids}" + (f" with {wrong[0]}" if len(wrong) else ""))
        docs.append(ids)
        n += np.isin(ids, DROPPED, invert=True).sum()
        if n >= n_most:
            break
    with msae.reading(path, "a file of token ids"):  # an empty one
        return torch.from_numpy(np.stack(docs))


@main.command(epilog="Example: python cli.py harvest --layer 2 --max-rows 1000000 --out layer2.npy")
@model_option
@layer_option
@device_option
@option("--tokens", default="train.jsonl", help='Lines of {"tok_ids": [...]}, a .npy, or a published file.')
@option("--max-rows", type=AtLeast(1), default=30_000_000, help="Stop after this many.")
@option("--dtype", type=click.Choice(["float16", "float32"]), default="float16", help="Of the rows.")
@option("--out", type=NEW_FILE, default="acts.npy", help="A new file.")
@option("--resume", is_flag=True, help="Go on behind the rows that --out holds, if any.")
def harvest(model_path, layer, device, tokens, max_rows, dtype, out, resume):
    """Write TinyModel's residual stream as rows for train. [BEGIN] and [PAD] give none."""
    if not resume:
        must_be_new(out)
    old = len(msae.read_npy(out)) if resume and out.exists() else 0
    max_rows = max(old, max_rows)
    model, hooks, ids = tiny_model(model_path, layer, device, tokens, max_rows)
    total = min(max_rows, int(torch.isin(ids, torch.tensor(DROPPED), invert=True).sum()))
    width = model.embed.weight.shape[1]
    size = total * (width * np.dtype(dtype).itemsize + 8)
    room = shutil.disk_usage(out.parent).free + (out.stat().st_size if out.exists() else 0)
    if size > room:
        raise OSError(f"{out} would take {size / 1e9:.1f} GB, {room / 1e9:.1f} GB are free: lower --max-rows")
    base = {} if Path(model_path).exists() else {"base_model": msae.TINY_MODEL[0]}  # from the Hub
    about, beside = {"model_name": Path(model_path).name, "hook_name": hooks[layer],
                     "dataset": tokens if Path(tokens).exists() else DATASET, **base}, Path(f"{out}.json")
    if old and beside.exists() and (was := read_json(beside)) != about:
        raise ValueError(f"--resume must go on with what {beside} says, {was}, got {about}")
    msae.write(beside, about)
    try:
        with progress("harvest  row", total) as show:
            n = msae.harvest(model, model.layers[layer], ids.split(64), out, at="input", drop=DROPPED,
                             dtype=dtype, max_rows=max_rows, resume=resume, on_rows=show)
    except (KeyboardInterrupt, SystemExit, OSError):
        click.echo(f"{out} keeps the rows so far; the same command with --resume goes on", err=True)
        raise
    click.echo(f"{n:,} rows in {out}; next:  python cli.py train --acts {out} --latents {4 * width}")


@main.command("eval", epilog="Example: python cli.py eval runs/acts-3072 --acts held.npy --labels labels.npy")
@click.argument("checkpoints", nargs=-1, required=True)
@option("--acts", required=True, help="Activations that training did not see, as for train.")
@option("--labels", type=OLD_FILE, help="A .npy, a whole number or 0s and 1s for each row: adds probing.")
@option("--tokens", help="Ids as for harvest: adds the loss of TinyModel with reconstructions spliced in.")
@option("--max-tokens", type=AtLeast(1), default=100_000, help="Use this many of --tokens.")
@model_option
@layer_option
@device_option
@norm_option
@option("--out", type=NEW_FILE, help="JSON file.  [default: eval-ACTS.json in each folder]")
def evaluate(checkpoints, acts, labels, tokens, max_tokens, model_path, layer, device, max_norm, out):
    """Measure checkpoints on rows, prefix by prefix."""
    rows, results, saes = msae.Rows(acts).within(max_norm), {}, {}
    if labels:
        x, y, label_names = label_rows(labels, rows)
    if tokens:
        model, hooks, ids = tiny_model(model_path, layer, device, tokens, max_tokens)
    for path in checkpoints:  # all of them before the first is measured
        sae = saes[path] = msae.MatryoshkaSAE.load(path)
        if len(sae.b_dec) != rows.d_model:
            raise ValueError(f"{path} is for rows of width {len(sae.b_dec)}, {acts} has {rows.d_model}")
        if tokens and (hook := sae.metadata.get("hook_name")) in hooks and hook != hooks[layer]:
            raise click.UsageError(f"--layer {layer} is not where {path} was trained, {hook}")
    must_be_new(out)
    for path, sae in saes.items():
        found = results[path] = {"checkpoint": path, "acts": Path(acts).name}
        if tokens:  # and labels first, as they may be refused and rows may take hours
            texts, module = ids.split(8), model.layers[layer]  # more logits would take much memory
            with progress(f"{path}  batch", len(texts)) as show:
                batches = (show(number) or batch for number, batch in enumerate(texts, 1))
                found["loss"] = msae.loss_recovered(model, module, sae.to(device), batches, drop=DROPPED)
        if labels:
            found["labels"] = {**msae.probe(sae.cpu(), x, y), "labels": label_names}
        with progress(f"{path}  row", len(rows)) as show:
            found |= msae.evaluate(sae.to(device), rows, on_rows=show)
        if out or Path(path).is_dir():  # not of the Hub
            file = out or Path(path, f"eval-{Path(acts).stem}.json")  # beside eval.json of the rows held out
            msae.write(file, list(results.values()) if out and len(saes) > 1 else found)
            say(f"wrote {file}")
    show_figures("rows", FIGURES, results)
    if tokens:
        title = "Cross-entropy over {tokens:,} tokens: {clean:.4f}, zeroed {zeroed:.4f}, spliced in"
        show_table(title.format(**found["loss"]), SPLICED, results, lambda each: each["loss"]["prefixes"])
    if labels:
        show_table("F1 of probes on raw rows and on k latents; what becomes of a label", PROBED, results,
                   lambda each: [each["labels"] | level for level in each["labels"]["prefixes"]])


def label_rows(path, rows, most=20_000):
    """(x (n, D), y (n, C) booleans, C names) of at most ``most`` of ``rows``, in random whole blocks."""
    labels, n = msae.read_npy(path), len(rows)
    labels = labels.reshape(-1) if labels.size == n else labels  # of shape (n, 1), (docs, positions)
    sound = labels.dtype.kind in "iub" and labels.shape in ((n,), (n, labels.size // n or 1))
    values = np.unique(labels).astype(np.int64) if sound else ()
    if not 0 < len(values) <= 1000 or labels.ndim == 2 and not set(values) <= {0, 1}:
        raise ValueError(f"{path} must hold whole numbers ({n},), up to 1000 different, or 0 and 1 ({n}, C), "
                         f"got {labels.dtype} {labels.shape} {labels.reshape(-1)[:5]}")
    rows, chosen = some_blocks(rows, most)
    x = rows.read_all()
    near = ~rows.too_far(x)
    y = labels[chosen][near.numpy()].astype(np.int64)
    names = np.arange(y.shape[1]) if y.ndim == 2 else np.setdiff1d(values, 0 if {*values} == {0, 1} else [])
    y = y == 1 if y.ndim == 2 else y[:, None] == names
    enough = np.minimum(y.sum(axis=0), (~y).sum(axis=0)) >= 10
    few = f"labels with less than 10 rows with them or without: {', '.join(map(str, names[~enough]))}"
    if not enough.any():
        raise ValueError(f"{path} has only {few}")
    if not enough.all():
        say(f"left out: {few}")
    return x[near].float(), torch.from_numpy(y[:, enough]), names[enough].astype(str).tolist()


def some_blocks(rows, most):
    """(Random whole blocks of ``rows``, at most ``most`` rows or one block; which of all rows they are)."""
    sizes = [stop - start for _, start, stop in rows.blocks]
    chosen = np.random.default_rng(0).permutation(len(sizes))[: max(1, most // max(sizes))]
    return rows.keep(chosen), np.isin(np.arange(len(sizes)), chosen).repeat(sizes)


# ------------------------------------------------------------------------------------------------------- look
PAGE = r"""<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">
<meta http-equiv=Content-Security-Policy content="default-src 'unsafe-inline'; script-src-attr 'none'"><style>
:root { color-scheme: light dark; print-color-adjust: exact } * { box-sizing: border-box; margin: 0 }
body { height: 100vh; display: grid; grid: auto 1fr / minmax(20em, 28em) 1fr; font: 15px/1.5 system-ui }
header { display: flex; flex-wrap: wrap; gap: .5em; padding: .8em } header > * { flex: 1 40%; min-width: 0 }
main { grid-area: 1 / 2 / 3; padding: .8em 1.6em; border-left: 1px solid silver } nav, main { overflow: auto }
input, select, small { font: inherit } a, b { color: light-dark(#8a3d05, #f2ab62); text-decoration: none }
h3 { margin: 1.3em 0 .4em; font-size: 1em } p { margin: .3em 0; overflow-wrap: anywhere }
summary { display: flex } summary::before { content: "▸"; flex: 0 0 1.3em; text-align: center }
[open] > summary::before { rotate: 90deg } summary:only-child::before { visibility: hidden }
details details { margin-left: .8em; content-visibility: auto; contain-intrinsic-height: auto 1.5em }
nav > * > summary { position: sticky; top: 0; z-index: 1 } small { padding-right: .3em; opacity: .7 }
nav > * > summary, .now, .line:hover { background: color-mix(in srgb, orange 13%, Canvas) }
.line { display: grid; grid: auto / minmax(3.1em, auto) 1fr auto; gap: .6em; flex: 1; color: inherit }
span { overflow: hidden; text-overflow: ellipsis; white-space: pre } p > span { white-space: pre-wrap }
bdi { background: color-mix(in srgb, orange calc(var(--a) * 60%), #0000) } .on { border-bottom: 2px solid }
svg { width: 100%; height: 5em; stroke: orange; stroke-width: .9; border-top: 1px solid; scale: 1 -1 }
.two { display: flex; flex-wrap: wrap; gap: 0 2em } .two > * { flex: 1 20em } .rows { flex: 3 30em }
@media (max-width: 900px), print { body { display: block } nav { max-height: 42vh } main { border: 0 } }
@media print { header, nav { display: none } }
</style><header><a href="#"><b></b></a><input id="find" placeholder="Number or token">
<select aria-label="Order"><option>by firing share</option><option>by children</option></select>
<select aria-label="Level"><option>All levels</option></select></header><nav></nav><main></main>
<script id="data" type="application/json">DATA</script><script type="module">
const $ = query => document.querySelector(query), [sort, level] = document.querySelectorAll("select");
const {about, ends, latents, title, tokens, truth = []} = JSON.parse($("#data").textContent);
const at = new Map(latents.map(l => [l.latent, l]));
const levels = ends.map((end, i) => `Level ${i + 1}: latents ${ends[i - 1] ?? 0} to ${end - 1}`);
for (const l of latents) Object.assign(l, {level: ends.findIndex(end => l.latent < end), below: []});
for (const l of latents) at.get(l.parent?.[0])?.below.push(l);
truth.forEach(([n], i) => at.get(n).name = `feature ${i}`);
const order = (a, b) => sort.selectedIndex * (b.below.length - a.below.length) || b.share - a.share;
const percent = share => `${+(100 * share).toPrecision(2)}%`;
const escaped = text => text.replace(/[&<]/g, c => `&#${c.charCodeAt()};`);
const token = (c, i = c.at) => tokens?.[c.from + i] ?? `row ${c.row}`;
const words = (c, before, after) => [...c?.shades ?? ""].map((shade, i) => `<bdi
  class="${i === c.at ? "on" : ""}" style="--a: ${parseInt(shade, 36) / 35}">${escaped(token(c, i))}</bdi>`
).filter((word, i) => i >= c.at - before && i <= c.at + after).join("");
const line = (n, note, text = at.get(n)?.name ?? words(at.get(n)?.shown, 2, 3)) =>
  `<a class=line ${at.has(n) ? `href=#latent-${n}` : ""}><b>${n}</b>
  <span>${text || "never on, or not on this page"}</span><small>${note}</small></a>`;
const nest = (own, below, open) => `<details ${open}><summary>${own}</summary>${below.join("")}</details>`;
const brief = l => line(l.latent, percent(l.share));
const branch = l => nest(brief(l), l.below.toSorted(order).map(branch), at.size < 100 ? "open" : "");
const grown = above => truth.flatMap(([n, cosine, parent], i) =>
  parent === above ? [nest(line(n, cosine, `feature ${i}`), grown(i), "open")] : []);
function drawTree() {
  const only = level.selectedIndex - 1, wanted = $("#find").value.trim().toLowerCase();
  const has = c => token(c).toLowerCase().includes(wanted);
  for (const l of latents) l.shown = l.largest.find(has) ?? l.largest[0];
  const found = latents.filter(l => (only < 0 || l.level === only) && (
    wanted ? `${l.latent}` === wanted || l.largest.some(has) : only >= 0 || !at.has(l.parent?.[0])));
  const byLevel = Object.entries(Object.groupBy(found.sort(order), l => l.level));
  $("nav").innerHTML = byLevel.map(([i, own]) =>
    nest(`${levels[i]} (${own.length})`, own.map(branch), "open")).join("") || "Nothing found";
  drawMain();
}
const section = (title, content) => content.length ? `<h3>${title}</h3>${content.join("")}` : "";
const row = c => `<p class=line><small title="row ${c.row}">${c.act.toPrecision(3)}</small>
  <span>${words(c, 10, 5)}${c.others?.map(n => `  <a href=#latent-${n}>${n}</a>`).join("") ?? ""}</span></p>`;
const histogram = counts => `<svg viewBox="0 0 16 ${Math.max(...counts)}" preserveAspectRatio="none">
  <path d="${counts.map((n, i) => `M${i + .5} 0V${n}`).join("")}"/></svg>`;
function drawMain() {
  const l = at.get(parseInt(location.hash.slice(8))), a = $(`nav a[href="#latent-${l?.latent}"]`);
  $("main").innerHTML = l ? `<h2>Latent ${l.latent}</h2><p>${levels[l.level]}. On in ${percent(l.share)} of
    the rows, largest ${l.max}, mean where on ${l.mean}.</p><div class=two><div class=rows>`
    + section("Where it is largest", l.largest.map(row))
    + section("At random where it is on", l.random.map(row)) + "</div><div>"
    + section(`Activations, from 0 to ${l.max}`, [histogram(l.histogram)])
    + section("Above it, with directed cosine", l.parent ? [line(...l.parent)] : [])
    + section("Below it, with share of the rows", l.below.toSorted(order).map(brief))
    + section("Nearest decoder rows, with cosine", l.nearest.map(near => line(...near))) + "</div></div>"
    : `<h2>${escaped(title)}</h2><p>${about}. Choose one, or press the down key.</p>`
    + section("The tree that there is, with the cosine of the latent nearest to each feature", grown(null));
  $("main").scrollTop = 0;
  for (const link of document.querySelectorAll("nav a")) link.classList.toggle("now", link === a);
  for (let up = a; up; up = up.parentElement.closest("details")) up.open = true;
  a?.scrollIntoView({block: "nearest"});
}
document.title = $("b").textContent = title;
level.append(...levels.map(title => new Option(title)));
$("header").addEventListener("input", drawTree);
addEventListener("hashchange", drawMain);
addEventListener("keydown", event => {
  const step = {ArrowDown: 1, ArrowUp: -1}[event.key];
  if (!step || event.target.tagName === "SELECT") return;
  const links = [...document.querySelectorAll("nav a")].filter(a => a.checkVisibility());
  location.replace(links[links.indexOf($(".now")) + step]?.hash ?? "#");
  event.preventDefault();
});
drawTree();
</script></html>
"""
BYTES = [b + 0xDC00 * (b > 127) for b in (*range(256), *range(33), *range(127, 161), 173)]  # of each letter


@main.command(epilog="Example: python cli.py look runs/tiny-3072 --acts held.npy --vocab tokenizer.json")
@click.argument("checkpoint", required=False)
@option("--acts", help="As for train.  [default: the rows of training]")
@option("--ids", type=OLD_FILE, help="A .npy of token ids: (rows,), (docs, positions), or (rows, 2) with the "
        "number of the document before each.  [default: X.ids.npy beside X.npy]")
@option("--vocab", type=OLD_FILE, help='A tokenizer.json, or JSON: [tokens] or {"token": id}.')
@option("--rows", "n_rows", type=AtLeast(1), default=200_000, help="Of more, read random blocks.")
@option("--latents", "most", type=AtLeast(1), default=4096, help="Of more, show the most frequent.")
@norm_option
@device_option
@option("--out", type=NEW_FILE, help="A new file.  [default: look.html in the checkpoint's folder]")
def look(checkpoint, acts, ids, vocab, n_rows, most, max_norm, device, out):
    """Write a page of the latents of CHECKPOINT as a tree. Without one, of the newest in runs/."""
    source = checkpoint or newest_checkpoint()
    file = out or Path(source if Path(source).is_dir() else "", "look.html")
    if out or not Path(source).is_dir():
        must_be_new(file)
    sae = msae.MatryoshkaSAE.load(source).to(device)
    acts = acts or str(sae.metadata.get("acts", "as --acts is missing"))
    rows, texts = msae.Rows(acts).within(max_norm), read_vocab(vocab) if vocab else {}
    if len(sae.b_dec) != rows.d_model:
        raise ValueError(f"{source} is for rows of width {len(sae.b_dec)}, {acts} has {rows.d_model}")
    (documents, ids), (rows, chosen) = token_ids(ids, acts, len(rows)), some_blocks(rows, n_rows)
    tokens = None if ids is None else [texts.get(id, str(id)) for id in ids[chosen].tolist()]
    with progress("look  row", len(rows)) as show:
        codes = msae.sparse_codes(sae, rows, on_rows=show)
    write_page(file, sae, codes, chosen, documents, tokens, most, title=f"{source}, {Path(acts).name}")
    click.echo(f"wrote {file}")


def token_ids(path, acts, n):
    """Document and token of each of ``n`` rows, by a file or harvest's beside ``acts``; without one, None."""
    beside = [file.with_suffix(".ids.npy") for file in sorted(Path(acts).glob("*.npy")) or [Path(acts)]]
    if not (files := [path] if path else [file for file in beside if file.exists()]):
        return np.arange(n), None
    ids = np.concatenate([np.atleast_1d(msae.read_npy(file)) for file in files])
    if ids.dtype.kind not in "iu" or ids.shape != (n, 2) and (ids.size != n or ids.ndim > 2):
        raise ValueError(f"{files[0]} must hold whole numbers ({n}, 2), ({n},) or (docs, positions), got "
                         f"{ids.dtype} {ids.shape}")
    return ids.T if ids.shape == (n, 2) else (np.arange(n) // ids.shape[-1], ids.reshape(-1))


def read_vocab(path):
    """{id: text} of a list of tokens, a map to ids or a tokenizer.json; what has no shape as sign or code."""
    signs = {"\n": "⏎", "\t": "⇥", "▁": " "}
    with msae.reading(path, "a list of tokens, a map of tokens to ids or a tokenizer.json"):
        found, added = json.loads(path.read_text(encoding="utf-8-sig")), []
        if isinstance(found, dict) and isinstance(found.get("model"), dict):
            found, added = found["model"]["vocab"], found.get("added_tokens") or []
        texts = [token if isinstance(token, str) else token[0] for token in found]
        if any("Ġ" in text for text in texts):  # each letter stands for a byte, as in GPT-2's
            texts = (text.translate(BYTES).encode(errors="surrogateescape") for text in texts)
            texts = [text.decode(errors="replace") for text in texts]
        texts = dict(zip(found.values() if isinstance(found, dict) else range(len(found)), texts))
        texts |= {each["id"]: each["content"] for each in added}
        return {id: "".join(signs.get(c, c if c.isprintable() else f"\\u{ord(c):04x}") for c in text) or "∅"
                for id, text in texts.items()}


def write_page(file, sae, codes, chosen, documents, tokens, most, **more):
    """Write the page of ``most`` latents at most, by the ``codes`` and ``tokens`` of the ``chosen`` rows."""
    def context(row, acts, of):
        near = [i for i in range(row - 10, row + 6) if 0 <= i < len(text) and text[i] == text[row]]
        shades = "".join(np.base_repr(round(35 * acts.get(i, 0) / of["max"]), 36) for i in near)
        others = latent[starts[row] + np.argsort(-value[starts[row]:starts[row + 1]])[:9]].tolist()
        return {"row": int(numbers[row]), "act": acts[row], "from": near[0], "at": row - near[0],
                "shades": shades, **({} if tokens else {"others": [n for n in others if n != of["latent"]]})}

    (starts, latent, value, far), F, ends = codes, len(sae.b_enc), list(sae.prefixes)
    latents, numbers, counts = [], np.flatnonzero(chosen), np.bincount(latent, minlength=F)
    shown = np.concatenate([np.sort(level[np.argsort(-counts[level])[: max(1, most * len(level) // F)]])
                            for level in np.split(np.arange(F), ends[:-1])])  # the same share of each level
    text = np.cumsum(np.r_[0, (np.diff(documents[chosen]) != 0) | (np.diff(numbers) != 1)])  # of each row
    with progress("look  latent", len(shown)) as show:
        for figures, at, own in msae.latent_figures(sae, starts, latent, value, shown):
            acts = dict(zip(at.tolist(), own.tolist()))
            for kind in ("largest", "random"):
                figures[kind] = [context(row, acts, figures) for row in figures[kind]]
            latents.append(figures)
            show(len(latents))
    about = f"{len(far):,} rows, {far.sum():,} too far out; the {len(shown):,} most frequent of {F:,} latents"
    data = {"about": about, "ends": ends, "latents": latents, "tokens": tokens, **more}
    data = json.loads(json.dumps(data), parse_float=lambda x: float(f"{float(x):.4g}"))
    data = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", r"\u003c")
    msae.write(file, PAGE.replace("DATA", data, 1).encode())  # foreign text cannot end the script


def toy_page(file, sae, tree):
    """The latents' tree on fresh toy rows, beside the features' tree."""
    features = tree.sample_features(20_000, torch.Generator().manual_seed(0))
    cosine, latent = (torch.nn.functional.normalize(tree.directions, dim=1) @ sae.W_dec.data.T).max(dim=1)
    tokens = [f"features {', '.join(map(str, row.nonzero()[:, 0].tolist()))}" for row in features]
    codes, n = msae.sparse_codes(sae, features @ tree.directions), len(tokens)
    write_page(file, sae, codes, np.full(n, True), np.arange(n), tokens, len(sae.b_enc), title="The toy",
               truth=[*zip(latent.tolist(), cosine.tolist(), tree.parent_of)])


def newest_checkpoint():
    if weights := max(Path("runs").glob(f"*/{msae.WEIGHTS}"), key=os.path.getmtime, default=None):
        return weights.parent
    raise FileNotFoundError("there is no checkpoint under runs/: train one, or name its folder")


# ------------------------------------------------------------------------------------------------------ bench
@main.command(epilog="Example: python cli.py bench --latents 24576 --steps 10")
@option("--latents", type=AtLeast(1, 2**31), default=3072, help="Number of latents F.")
@option("--d-model", type=AtLeast(1, 2**31), default=768, help="Width D of the rows.")
@option("--batch-size", type=AtLeast(1, 2**31), default=2048, help="Rows per step.")
@option("--k", type=float, default=30, help="Active latents per row.")
@option("--steps", type=AtLeast(1), default=20, help="Steps to time, after three to warm up.")
@device_option
@dtype_option
def bench(latents, d_model, batch_size, k, steps, device, dtype):
    """Time this machine's training step beside its encoder product."""
    spare = round(0.25 * latents)  # as train starts with
    cfg = msae.TrainConfig(latents, k, batch_size=batch_size, dtype=dtype, n_latents_start=latents + spare)
    trainer = msae.Trainer(cfg, d_model, device)
    x = torch.randn(batch_size, d_model, device=device) / d_model**0.5
    a, W = (t.to(getattr(torch, trainer.dtype)) for t in (x, trainer.sae.W_enc.detach()))
    product = a @ W

    def seconds(call):
        started = time.perf_counter()
        call().flatten()[0].item()  # waits for a GPU
        return time.perf_counter() - started

    pairs = [(seconds(lambda: torch.mm(a, W, out=product)), seconds(lambda: trainer.step(x)))
             for _ in range(steps + 3)]
    alone, step = np.median(pairs[3:], axis=0)  # in turn, so that drift cancels
    click.echo(f"batch {batch_size:,}, width {d_model:,}, {latents:,} + {spare:,} spare latents, "
               f"k {k:g}, {len(trainer.step_prefixes())} prefixes, {trainer.dtype} on {device}\n\n"
               f"encoder product alone  {1e3 * alone:,.1f} ms\n"
               f"training step          {1e3 * step:,.1f} ms, {step / alone:.2f} x the product\n"
               f"rows per second        {batch_size / step:,.0f}")
    if device.type == "cuda":
        click.echo(f"peak memory            {torch.cuda.max_memory_allocated(device) / 2**20:,.0f} MiB")


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

{figures}

```python
import torch, msae  # one file, msae.py
sae = msae.MatryoshkaSAE.load({source})
codes = sae.encode(torch.randn(8, {D}))  # raw activations -> (8, {F}); with prefix={p} -> (8, {p})
recon = sae.decode(codes)  # (8, {D})
```

```python
import huggingface_hub, sae_lens, torch  # pip install sae-lens
sae = sae_lens.SAE.load_from_disk(huggingface_hub.snapshot_download({source}))
recon = sae.decode(sae.encode(torch.randn(8, {D})))
```
"""


@main.command(epilog="Example: python cli.py push runs/mine ada/mine --dry-run")
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
    """Upload CHECKPOINT to REPO on the Hugging Face Hub, with a card. Without one, the newest in runs/."""
    folder = (checkpoint or newest_checkpoint()).resolve()
    repo = repo or folder.name
    name = repo if "/" in repo else f"YOUR_NAME/{repo}"
    card, names = model_card(folder, name, license, revision), {msae.WEIGHTS, msae.CONFIG, msae.METRICS}
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())
             if path.name in names or path.match(EVALS)}
    cfg = json.loads(files[msae.CONFIG])
    (cfg.get("metadata") or {}).pop("acts", None)  # a path on this machine
    files[msae.CONFIG] = files["config.json"] = json.dumps(cfg, indent=2).encode()  # the Hub counts by this
    files["README.md"] = card.encode()
    if dry_run:
        lines = "".join(f"{len(content):>13,}  {file}\n" for file, content in files.items())
        return click.echo(f"would push {folder} to {name}, in one commit:\n{lines}\n{card}")
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
        api = HfApi(token=token)
        repo_id = api.create_repo(repo, private=private, exist_ok=True).repo_id
        files["README.md"] = card.replace(name, repo_id).encode()
        if revision and not api.revision_exists(repo_id, revision):
            api.create_branch(repo_id, branch=revision)
        commit = api.create_commit(repo_id, [CommitOperationAdd(*file) for file in files.items()],
                                   commit_message=commit_message, revision=revision, create_pr=create_pr)
    except Exception as error:  # of huggingface_hub, its HTTP library, Xet; after "Bearer" follows a token
        raise OSError(f"{folder} not pushed to {repo}: {msae.one_line(error).split('Bearer')[0]}") from None
    click.echo(commit.pr_url or f"{api.endpoint}/{repo_id}" + (f"/tree/{revision}" if revision else ""))


def model_card(folder, repo, license, revision):
    """The README.md of ``repo``, with a table of eval.json if there is one."""
    sae, figures = msae.MatryoshkaSAE.load(folder), "There was no evaluation on held-out rows."
    if file := max(folder.glob(EVALS), default=None):  # eval.json, if it is there
        with msae.reading(file, "what eval writes"):
            found = json.loads(file.read_text())
            rows = [[cell(text, row) for text in TRAINED.values()] for row in found["prefixes"]]
            table = "\n".join(f"| {' | '.join(row)} |" for row in ([*TRAINED], ["---"] * len(TRAINED), *rows))
            of = found.get("acts", "held out from training")
            figures = (f"{table}\n\nOn {found['rows']:,} rows ({of}). FVU: squared error over variance; "
                       f"L0: active latents per row; {cell(LEGEND, found) + cell(SILENT, found)}.")
    base = sae.metadata.get("base_model")
    return CARD.format(
        license=json.dumps(license), base=f"base_model: {json.dumps(base)}\n" if base else "",
        title=repo.split("/")[-1], F=len(sae.b_enc), D=len(sae.b_dec), p=sae.prefixes[0], figures=figures,
        facts="\n".join(f"- {name}: {value}" for name, value in sae.metadata.items() if name != "acts"),
        source=f"{repo!r}, revision={revision!r}" if revision else repr(repo),
        prefixes=", ".join(map(str, sae.prefixes)))


if __name__ == "__main__":
    main()
