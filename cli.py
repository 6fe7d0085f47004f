"""The command line of msae: each command reads its options, calls the library, shows the result.

What all commands share comes first: the terminal, options, readers of files, tables and progress.
Then a section for each command, which starts with the command and goes on with what it calls:
train, harvest, eval, look, toy, bench, push. The method is in msae.py alone.
"""

import os
import signal

# The imports below take seconds. Until they are done, Ctrl-C ends the process without a traceback.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import contextlib
import io
import itertools
import json
import math
import re
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import click
import huggingface_hub
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
from torch.nn.functional import normalize

import msae

# ------------------------------------------------------------------------------------- the terminal
# Lines in passing may fail, as they end no work; the table at the end may not.


class Terminal(Console):
    """Standard output, whose end is an error like others."""

    def on_broken_pipe(self) -> NoReturn:
        raise  # the BrokenPipeError in hand: rich would exit here, before the work is saved


console = Terminal(markup=False, emoji=False, highlight=False)


def say(text: str) -> None:
    """Print a line in passing: a closed pipe or a full disk does not end the work."""
    with contextlib.suppress(OSError):
        console.print(text, soft_wrap=True)


def say_warning(message: Warning | str, category: type[Warning], *place: Any) -> None:
    """What ``warnings`` calls: the library's own warnings are shown, those of torch are not."""
    if category is UserWarning:
        say(str(message))


# --------------------------------------------------------------- options and the group of commands
# What a user gets wrong ends in one line: click refuses options, with exit code 2, and
# ``Commands`` says what the library refuses, with exit code 1.


class AtLeast(click.IntRange):
    """A whole number; the help text says its range in words."""

    def _describe_range(self) -> str:
        if self.max:
            return f"{self.min} to {self.max}"
        return f"{self.min} or more"


def available_device(ctx: click.Context, param: click.Parameter, name: str) -> torch.device:
    """The device of that name; ``ValueError`` if this machine or this build of torch has none."""
    if name.startswith("cuda") and "LOCAL_RANK" in os.environ:  # torchrun: one GPU a process
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    with msae.reading(f"--device {name!r:.100}", "available here"):
        return torch.ones(1, device=name).device


def numbers(text: str) -> tuple[float, ...]:
    """Lengths, as in "8,32", or fractions, which have a point, as in ".25,1.0"."""
    return tuple(float(number) if "." in number else int(number) for number in text.split(","))


EXISTING_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW_FILE = click.Path(dir_okay=False, path_type=Path)
FOLDER = click.Path(file_okay=False, path_type=Path)
FLOATS = click.Choice(["float16", "float32"])

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# options of several commands
with_device = option("--device", default=DEVICE, callback=available_device, help="Or cuda:1.")
with_dtype = option(
    "--dtype", help="Of the products: float32, bfloat16 or float16.  [default: by device]"
)
with_layer = option(
    "--layer", type=AtLeast(0), default=3, help="Stream into this block; 4: the end."
)
with_model = option(
    "--model", "model_path", default="tiny_model.pt", help="A file, or a published name."
)
with_max_norm = option("--max-norm", type=click.FloatRange(1), default=10, help="As for train.")
with_mask = option(
    "--mask",
    type=EXISTING_FILE,
    help="A .npy of booleans, one a row: which rows of --acts to take.",
)


class Commands(click.Group):
    """Turns what the library refuses into one line and an exit code, never a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            sys.exit(130)
        except (click.exceptions.Exit, BrokenPipeError):  # which click itself handles
            raise
        except (OSError, ValueError, MemoryError, RuntimeError) as error:
            line = " ".join(str(error).split())
            raise click.ClickException(line or "not enough memory") from None


SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True}


@click.group(cls=Commands, context_settings=SETTINGS)
@click.version_option(msae.__version__, message="msae %(version)s")
def main() -> None:
    """Matryoshka sparse autoencoders: train, measure and share them."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # one that is ignored stays so
        signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # not a line for each try of a connection
    warnings.showwarning = say_warning
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # an ascii terminal shows "?" for other characters


# ------------------------------------------------------------ readers of the command line's files
# Tokens, labels, ids, vocabularies, settings and the newest checkpoint. Each file is checked before
# the work starts, and an error names the file, and the line if it has some.

NO_ROW = (msae.BEGIN, msae.PAD)  # token ids whose activations are no rows
PART = "◌"  # the sign for a part of a character
SIGNS = {"\n": "⏎", "\t": "⇥"}
# the characters that Python makes of bytes that are no UTF-8
SIGNS.update({chr(0xDC00 + byte): PART for byte in range(128, 256)})


def read_json(path: Path) -> dict:
    """The object in a JSON file, which may start with the byte order mark of Windows."""
    with msae.reading(path, "a JSON object"):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        return dict(**content)  # a list is refused


def must_be_new(path: Path | None) -> None:
    """Refuse to write over a file; None stands for a default, which may be."""
    if path is not None and path.exists():
        raise FileExistsError(f"{path} exists: choose another --out")


def newest(paths: Iterable[Path]) -> Path | None:
    """The file that was written last."""
    return max(paths, key=os.path.getmtime, default=None)


def newest_checkpoint() -> Path:
    """The folder under runs/ whose weights were written last."""
    weights = newest(Path("runs").glob(f"*/{msae.WEIGHTS}"))
    if weights is None:
        raise FileNotFoundError("there is no checkpoint under runs/: train one, or name its folder")
    return weights.parent


def check_width(
    checkpoint: Path | str, sae: msae.MatryoshkaSAE, acts: str, rows: msae.Rows
) -> None:
    """``ValueError`` unless ``sae`` is for rows as wide as those of ``acts``."""
    width = len(sae.b_dec)
    if width != rows.d_model:
        raise ValueError(f"{checkpoint} is for rows of width {width}, {acts} has {rows.d_model}")


def read_tokens(
    path: Path | str, n_vocab: int = 10_000, n_positions: int = 256, n_most: float = math.inf
) -> torch.Tensor:
    """Token ids (docs, T) of a ``.npy``, or of a ``.jsonl`` with {"tok_ids": [...]} a line.

    Reading ends once there are ``n_most`` ids that give a row. ``ValueError`` names a bad line.
    """
    docs = []
    n_rows = 0
    for number, line in enumerate(lines_of(path), 1):
        where = f"{path}, line {number}"
        with msae.reading(where, '{"tok_ids": [whole numbers]}'):
            ids = ids_of_line(line)
        first = docs[0] if docs else ids
        check_ids(ids, where, len(first), n_vocab, n_positions)
        docs.append(ids)
        n_rows += np.isin(ids, NO_ROW, invert=True).sum()
        if n_rows >= n_most:
            break
    if not docs:
        raise ValueError(f"{path} is not a file of token ids: it is empty")
    return torch.from_numpy(np.stack(docs))


def lines_of(path: Path | str) -> Iterator[np.ndarray | bytes]:
    """The rows of a ``.npy``, the lines of any other file."""
    if str(path).endswith(".npy"):
        yield from np.atleast_1d(msae.read_npy(path))
    else:
        with open(path, "rb") as file:
            yield from file


def ids_of_line(line: np.ndarray | bytes) -> np.ndarray:
    """The token ids (T,) of a row, or of a line of JSON."""
    if isinstance(line, bytes):
        line = json.loads(line)["tok_ids"]
    ids = np.array(line).astype(np.int64, casting="same_kind")  # floats are refused
    if ids.ndim != 1:
        raise ValueError(f"the ids have shape {ids.shape}")
    return ids


def check_ids(ids: np.ndarray, where: str, n_ids: int, n_vocab: int, n_positions: int) -> None:
    """``ValueError`` unless these are ``n_ids`` ids, as many as in the first line."""
    problem = (
        f"{where}: tok_ids must be 1 to {n_positions} ids in [0, {n_vocab}), "
        f"{n_ids} as in the first, got {len(ids)}"
    )
    if not 0 < len(ids) == n_ids <= n_positions:
        raise ValueError(problem)
    outside = ids[(ids < 0) | (ids >= n_vocab)]
    if len(outside) > 0:
        raise ValueError(f"{problem} with {outside[0]}")


def label_rows(
    path: Path, rows: msae.Rows, max_rows: int = 20_000
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """(x (n, D), y (n, C) booleans, names of the C labels), of random blocks of ``rows``.

    A label with less than 10 rows with it, or without it, is left out: its probe would be noise.
    """
    labels, values = read_labels(path, rows.n_source)
    sample = rows.random_blocks(max_rows, seed=0)
    x = sample.read_all()
    is_near = sample.is_near(x)
    labels = labels[sample.row_numbers()][is_near.numpy()].astype(np.int64)
    y, names = label_columns(labels, values)
    n_with = y.sum(axis=0)
    is_common = np.minimum(n_with, len(y) - n_with) >= 10
    names = names.astype(str)
    rare = f"labels with less than 10 rows with them or without: {', '.join(names[~is_common])}"
    if not is_common.any():
        raise ValueError(f"{path} has only {rare}")
    if not is_common.all():
        say(f"left out: {rare}")
    y = torch.from_numpy(y[:, is_common])
    return x[is_near].float(), y, names[is_common].tolist()


def read_labels(path: Path, n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    """(Whole numbers (n,) or columns of 0 and 1 (n, C), the different values)."""
    labels = msae.read_npy(path)
    problem = (
        f"{path} must hold whole numbers ({n_rows},), up to 1000 different, or 0 and 1 "
        f"({n_rows}, C), got {labels.dtype} {labels.shape} {labels.reshape(-1)[:5]}"
    )
    if labels.size == n_rows:  # as (n, 1) or (docs, positions) too
        labels = labels.reshape(-1)
    if labels.dtype.kind not in "iub" or labels.ndim not in (1, 2) or len(labels) != n_rows:
        raise ValueError(problem)
    values = np.unique(labels).astype(np.int64)
    if not 0 < len(values) <= 1000:
        raise ValueError(problem)
    if labels.ndim == 2 and not set(values.tolist()) <= {0, 1}:
        raise ValueError(problem)
    return labels, values


def label_columns(labels: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(Booleans (n, C), C names): a column a value; for 0 and 1, one column alone."""
    if labels.ndim == 2:
        return labels == 1, np.arange(labels.shape[1])
    if values.tolist() == [0, 1]:
        values = values[1:]
    return labels[:, None] == values, values


def token_ids(path: Path | None, acts: Path | str, n: int) -> tuple[np.ndarray, np.ndarray | None]:
    """(Number of the document, token id) of each of the ``n`` rows of ``acts``: (n,), (n,).

    Without ``path`` they are those that harvest wrote beside ``acts``. Where there are none, each
    row is a document of its own, and the ids are None.
    """
    files = [path]
    if path is None:
        row_files = sorted(Path(acts).glob("*.npy")) or [Path(acts)]
        beside = [file.with_suffix(".ids.npy") for file in row_files]
        files = [file for file in beside if file.exists()]
    if not files:
        return np.arange(n), None
    ids = np.concatenate([np.atleast_1d(msae.read_npy(file)) for file in files])
    if ids.dtype.kind in "iu":
        if ids.shape == (n, 2):
            return ids[:, 0], ids[:, 1]
        if ids.size == n and ids.ndim <= 2:
            return np.arange(n) // ids.shape[-1], ids.reshape(-1)
    raise ValueError(
        f"{files[0]} must hold whole numbers ({n}, 2), ({n},) or (docs, positions), "
        f"got {ids.dtype} {ids.shape}"
    )


def read_vocab(path: Path) -> dict[int, bytes]:
    """{id: bytes of UTF-8} of a list of tokens, a map of tokens to ids, or a tokenizer.json."""
    with msae.reading(path, "a list of tokens, a map of tokens to ids or a tokenizer.json"):
        vocab = json.loads(path.read_text(encoding="utf-8-sig"))
        tokenizer = {}
        if isinstance(vocab, dict) and isinstance(vocab.get("model"), dict):  # a tokenizer.json
            tokenizer = vocab
            vocab = tokenizer["model"]["vocab"]
        ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
        # a Unigram tokenizer lists [token, score]
        tokens = [token if isinstance(token, str) else token[0] for token in vocab]
        to_bytes = bytes_of_letters if is_byte_level(tokenizer, tokens) else bytes_of_text
        contents = dict(zip(ids, map(to_bytes, tokens), strict=True))
        for token in tokenizer.get("added_tokens", []):  # never in letters for bytes
            contents[token["id"]] = bytes_of_text(token["content"])
        return contents


def is_byte_level(tokenizer: dict, tokens: list[str]) -> bool:
    """Whether the tokens are written in GPT-2's letters for bytes: the tokenizer.json says so.

    Where it says nothing, or is none, tokens are taken for such if nearly all are written in those
    letters, and many start with the letter for a space. Other vocabularies hold that letter, too.
    """
    steps = [tokenizer.get("decoder"), tokenizer.get("pre_tokenizer")]
    if any(steps):  # each may be a sequence of steps, which may be nested
        return '"type": "ByteLevel"' in json.dumps(steps)
    n_in_letters = sum(LETTERS.keys() >= set(token) for token in tokens)
    n_after_space = sum(token.startswith("Ġ") for token in tokens)
    if n_in_letters < 0.99 * len(tokens):  # a few special tokens may hold others
        return False
    return n_after_space >= 0.1 * len(tokens)  # 65 % of SmolLM2's, less where few are English


def gpt2_letters() -> dict[str, bytes]:
    """{letter: byte}: GPT-2 writes the bytes that cannot be printed as letters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {chr(byte): bytes([byte]) for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    for code, byte in enumerate(others, 256):
        letters[chr(code)] = bytes([byte])
    return letters


LETTERS = gpt2_letters()


def bytes_of_letters(token: str) -> bytes:
    """The bytes for which the letters stand, in a byte-level vocabulary such as GPT-2's."""
    known = (LETTERS.get(letter, letter.encode(errors="surrogatepass")) for letter in token)
    return b"".join(known)


def bytes_of_text(token: str) -> bytes:
    """The bytes of a token of any other vocabulary: SentencePiece's ▁ is a space, <0x0A> a byte."""
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
        return bytes.fromhex(token[3:5])
    return token.replace("▁", " ").encode(errors="surrogatepass")


def token_texts(contents: list[bytes]) -> list[str]:
    """The visible text of each token of a piece of text, of their bytes one after the other.

    A character whose bytes are in several tokens is shown by the last of them. A token that ends
    within a character shows ◌, and so does a byte that belongs to none.
    """
    text = b"".join(contents).decode(errors="surrogateescape")
    char_ends = np.cumsum([0, *(len(char.encode(errors="surrogateescape")) for char in text)])
    token_ends = np.cumsum([len(content) for content in contents])
    texts = [""] * len(contents)
    for char, token in zip(text, np.searchsorted(token_ends, char_ends[1:]), strict=True):
        texts[token] += char
    for token in np.flatnonzero(~np.isin(token_ends, char_ends)):
        texts[token] += PART
    return [visible(text) for text in texts]


def visible(text: str) -> str:
    """``text`` with a sign, or its code, for each character that has no shape."""
    if not text:
        return "∅"
    signs = ""
    for character in text:
        if character in SIGNS:
            signs += SIGNS[character]
        elif character.isprintable():
            signs += character
        else:
            signs += f"\\u{ord(character):04x}"
    return signs


# ------------------------------------------------------------------------------ tables and progress
# Texts are filled in from the dicts of figures that msae returns and writes as JSON.

FIGURE_COLUMNS = {  # heading: text of a cell, from the figures of a prefix
    "latents": "{latents:,}",
    "FVU": "{fvu:.4f}",
    "L0": "{l0:.2f}",
    "cosine": "{max_cosine:.3f}",
    "dead": "{dead:.2%}",
}
TRAINING_COLUMNS = {**FIGURE_COLUMNS, "silent": "{silent[share]:.2%}"}
LEGEND = (
    "cosine: mean of the largest with another decoder row; dead: never fire on these {rows:,} rows"
)
LEGEND_OF_SILENT = "; silent: did not on the last {silent[rows]:,} of training"
LOGGED = "train FVU {fvu:.3f} L0 {l0:.1f} dead {dead:.1%} {rows_per_second:,}/s"


def fill(text: str, figures: dict) -> str:
    """``text`` with ``figures`` filled in; nothing where one is missing, "-" where it is None."""
    try:
        return text.format(**figures)
    except LookupError:
        return ""
    except TypeError:
        return "-"


def show_table(title: str, columns: dict[str, str], sections: dict[str, list[dict]]) -> None:
    """Print a table with a section a name, a row for each of its figures."""
    table = Table("", *columns, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.columns[0].overflow = "fold"
    for name, rows in sections.items():
        label = name
        for figures in rows:
            cells = [fill(text, figures) for text in columns.values()]
            table.add_row(label, *cells)
            label = ""
        table.add_section()
    terminal_width = console.width
    console.width = max(80, terminal_width)  # in a narrower table figures would be cut
    console.print(title, table, sep="\n")
    console.width = terminal_width


def show_figures(title: str, columns: dict[str, str], results: dict[str, dict]) -> None:
    """Print the figures of ``evaluate`` for each name: table, legend and remarks."""
    first = next(iter(results.values()))
    title = f"{first['rows']:,} {title}"
    if first["left_out"]:
        title += f", {first['left_out']:,} too far out to count"
    show_table(title, columns, {name: figures["prefixes"] for name, figures in results.items()})
    lines = [legend(first)]
    for name, figures in results.items():
        lines += [f"{name}: {remark}" for remark in figures["remarks"]]
    console.print(*lines, sep="\n", soft_wrap=True)


def legend(figures: dict) -> str:
    """What the columns mean that have no unit."""
    return fill(LEGEND, figures) + fill(LEGEND_OF_SILENT, figures)


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[..., None]]:
    """A live line in a terminal; elsewhere a line every ten seconds, and one at the end.

    Yields ``show(done, text)``, to be called with the number done. The text is by default the rate.
    """
    count = TextColumn("{task.description} {task.completed:,}/{task.total:,}", markup=False)
    columns = (count, TextColumn("{task.fields[text]}"), TimeRemainingColumn())
    live = Progress(
        *columns,
        console=console,
        disable=not console.is_terminal,
        speed_estimate_period=3600,  # seconds: reports may be rare
    )
    task = live.add_task(label, total=total, text="")
    started = time.monotonic()
    last_printed = -math.inf

    def show(done: int, text: str | None = None) -> None:
        nonlocal last_printed
        now = time.monotonic()
        if text is None:
            rate = done / max(now - started, 1e-9)
            text = f"{rate:,.0f}/s"
        live.update(task, completed=done, text=text)
        is_due = done == total or now - last_printed > 10
        if is_due and not console.is_terminal:
            last_printed = now
            say(" ".join(str(column(live.tasks[0])) for column in columns))

    with live:
        yield show


@contextlib.contextmanager
def training_progress(label: str, n_steps: int) -> Iterator[Callable[[dict], None]]:
    """``progress`` of a run; yields a function for the figures that ``msae.train`` logs."""
    with progress(f"{label}  step", n_steps) as show:
        yield lambda figures: show(figures["step"], LOGGED.format(**figures))


# -------------------------------------------------------------------------------------------- train
# Rows to an SAE, one or, with a vanilla twin, two; their figures on rows held out.


@main.command(epilog="Example: python cli.py train --acts shards/ --latents 3072 --pareto 10")
@option("--acts", help="A .npy, (rows, D) or (docs, positions, D), or a folder.")
@with_mask
@option("--tokens", help="In place of --acts: texts, as for harvest, of which --model makes rows.")
@with_model
@with_layer
@option("--latents", "n_latents", type=int, help="Number of latents.  [required, or in --config]")
@option("--k", type=float, help="Active latents per row, on average.  [default: 30]")
@option("--prefixes", type=numbers, help="Lengths or fractions.  [default: .0625,.125,.25,.5,1.0]")
@option("--pareto", "n_prefixes", type=int, help="Instead, sample this many at every step.")
@option("--spare", type=AtLeast(0), help="Spare latents at first.  [default: a quarter of them]")
@option("--baseline", is_flag=True, help="Then train the vanilla twin on the same batches.")
@option("--steps", type=int, help="Optimizer steps.  [default: 10000]")
@option("--batch-size", type=int, help="Rows per step, of all processes together.  [default: 2048]")
@option("--lr", type=float, help="Peak rate of Adam.  [default: by latents, batch size and steps]")
@option("--seed", type=int, help="Of weights, row order and held-out rows.  [default: 0]")
@option("--max-norm", type=float, help="Drop rows this many median distances out.  [default: 10]")
@with_device
@with_dtype
@option("--out", type=FOLDER, help="A new folder.  [default: a new one under runs/]")
@option("--resume", is_flag=True, help="Go on with the run in --out, or in the newest default one.")
@option("--save-minutes", type=float, default=10, help="Minutes between checkpoints.")
@option("--config", type=EXISTING_FILE, help="JSON of any TrainConfig fields; options override it.")
def train(
    acts: str | None,
    mask: Path | None,
    tokens: str | None,
    model_path: str,
    layer: int,
    device: torch.device,
    out: Path | None,
    config: Path | None,
    spare: int | None,
    baseline: bool,
    resume: bool,
    save_minutes: float,
    **settings: Any,
) -> None:
    """Train on activations; SAELens opens the checkpoint.

    A tenth of the rows (at most 16,384) is set aside in random blocks for the figures at the end
    (eval.json). Ctrl-C saves first; the same command with --resume goes on. With several processes,
    torchrun takes the place of python. The checkpoint keeps model_name, hook_name, dataset,
    base_model of acts.npy.json, if any.

    With --tokens, TinyModel makes the rows while it trains, and no file holds them: its stream into
    --layer. The first texts are set aside, with at most a tenth of the rows.
    """
    if (acts is None) == (tokens is None):
        raise click.UsageError("Missing option '--acts', rows, or '--tokens', texts: one of them.")
    if mask is not None and acts is None:
        raise click.UsageError("--mask is about the rows of --acts, and --tokens was given.")
    cfg = run_config(config, spare, settings)
    is_first = os.environ.get("RANK", "0") == "0"  # of the processes of torchrun
    console.quiet = not is_first
    if acts is not None:
        source = msae.Rows(acts, cfg.max_norm, mask)
        metadata = metadata_of_rows(acts, mask)
    else:
        model = tiny_model(model_path, layer).to(device)
        source = stream(model, layer, tokens, cfg)
        metadata = metadata_of_harvest(model_path, hook_names(model)[layer], tokens)
    rows, held_out = source.split_off(0.1, cfg.seed)
    name = f"{Path(acts or tokens).stem}-{cfg.n_latents}"
    folder = out or default_folder(name, resume, is_first)
    started = time.time()
    options = {"device": device, "resume": resume, "save_minutes": save_minutes}
    results = {}
    try:
        say(describe_run(cfg, folder, rows, held_out, resume))
        join_processes(device)
        for run in make_runs(cfg, folder, baseline):
            results[run.name] = run_one(run, rows, held_out, is_first, metadata=metadata, **options)
    except BaseException:
        if is_first:
            show_how_to_resume(folder, started)
        raise
    finally:
        if is_first and out is None:
            remove_if_empty(folder)
    report(results, folder)


def run_config(path: Path | None, spare: int | None, options: dict) -> msae.TrainConfig:
    """The settings of a JSON file and of the options, which win where they are given."""
    settings = read_json(path) if path else {}
    given = {name: value for name, value in options.items() if value is not None}
    if "prefixes" in given or "n_prefixes" in given:  # either replaces both
        settings |= {"prefixes": None, "n_prefixes": None}
    settings |= given
    if "n_latents" not in settings:
        raise click.UsageError(
            "Missing option '--latents', the number of latents, or n_latents in --config."
        )
    with msae.reading("this run", "possible"):
        if spare is not None or "n_latents_start" not in settings:
            settings["n_latents_start"] = None
            n_latents = msae.TrainConfig(**settings).n_latents  # a number, as it was accepted
            if spare is None:
                spare = round(n_latents / 4)
            settings["n_latents_start"] = n_latents + spare
        return msae.TrainConfig(**settings)


def metadata_of_rows(acts: str, mask: Path | None) -> dict:
    """Where rows are from: their paths, and what the JSON file beside them, of harvest, says."""
    in_folder = sorted(Path(acts).glob("*.npy.json"))
    file = in_folder[0] if in_folder else Path(f"{Path(acts)}.json")
    about = read_json(file) if file.is_file() else {}
    names = ("model_name", "hook_name", "dataset", "base_model")
    metadata = {name: about[name] for name in names if name in about}
    metadata["acts"] = str(Path(acts).resolve())
    if mask is not None:
        metadata["mask"] = str(mask.resolve())
    return metadata


def stream(model: msae.TinyModel, layer: int, tokens: str, cfg: msae.TrainConfig) -> msae.Stream:
    """Rows of the stream into a layer, of as many texts as the run needs."""
    ids = tokens_for(model, tokens, cfg.steps * cfg.batch_size + msae.SAMPLE)
    n_rows = int(torch.isin(ids, torch.tensor(NO_ROW), invert=True).sum())
    return msae.Stream(
        model,
        model.layers[layer],
        ids.split(64),
        at="input",
        drop=NO_ROW,
        n_held_out=min(msae.SAMPLE, n_rows // 10),
        max_norm=cfg.max_norm,
    )


def default_folder(name: str, resume: bool, is_first: bool) -> Path:
    """Of runs/name, runs/name-2, ...: the newest run to resume, or else the next new one."""
    folder = Path("runs", name)
    candidates = [folder] + [Path("runs", f"{name}-{number}") for number in range(2, 1000)]
    if resume:
        states = [candidate / msae.STATE for candidate in candidates]
        newest_state = newest(state for state in states if state.exists())
        return newest_state.parent if newest_state else folder
    if is_first:  # the other processes write nothing
        for candidate in candidates:
            with contextlib.suppress(FileExistsError):
                candidate.mkdir(parents=True)  # of several runs that try, one alone succeeds
                return candidate
    return folder


def remove_if_empty(folder: Path) -> None:
    """Remove a folder of ``default_folder``, and runs/, unless they hold something."""
    with contextlib.suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()


def describe_run(
    cfg: msae.TrainConfig, folder: Path, rows: msae.Source, held_out: msae.Rows, resume: bool
) -> str:
    """The first line of train: what a user checks before hours of work."""
    n_rows = epochs = ""  # those of a stream are not known
    if rows.n_rows is not None:
        n_rows = f"{rows.n_rows:,} "
        epochs = f", {cfg.steps * cfg.batch_size / max(1, rows.n_rows):,.1f} epochs"
    text = (
        f"{n_rows}rows of width {rows.d_model}, {len(held_out):,} more held out; "
        f"{cfg.steps:,} steps{epochs}; "
        f"{cfg.k:g} of {cfg.n_latents:,} latents a row; to {folder}"
    )
    if resume and not (folder / msae.STATE).exists():
        text += ", where nothing is saved yet"
    return text


def join_processes(device: torch.device) -> None:
    """Under torchrun, join the other processes until the command ends."""
    if "LOCAL_RANK" not in os.environ:
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.distributed.init_process_group()
    click.get_current_context().call_on_close(torch.distributed.destroy_process_group)


class Run(NamedTuple):
    """An SAE to train."""

    name: str  # in the table
    label: str  # on the progress line
    cfg: msae.TrainConfig
    folder: Path


def make_runs(cfg: msae.TrainConfig, folder: Path, baseline: bool) -> list[Run]:
    """The run that was asked for and, as a ``baseline``, that of its vanilla twin."""
    if not baseline:
        return [Run("matryoshka", "train", cfg, folder)]
    return [
        Run("matryoshka", "matryoshka 1 of 2", cfg, folder),
        Run("vanilla", "vanilla 2 of 2", cfg.vanilla(), folder / "vanilla"),
    ]


def run_one(
    run: Run, rows: msae.Source, held_out: msae.Rows, is_first: bool, **options: Any
) -> dict:
    """Train; return the figures on ``held_out``, and write them to eval.json."""
    last_logged = {}
    with progress(f"{run.label}  step", run.cfg.steps) as show:

        def on_log(figures: dict) -> None:
            last_logged.update(figures)
            show(figures["step"], LOGGED.format(**figures))

        def on_rows(n_made: int) -> None:
            show(last_logged.get("step", 0), f"{n_made:,} rows made")

        if isinstance(rows, msae.Stream):
            rows.on_rows = on_rows
        sae = msae.train(rows, run.cfg, out=run.folder, on_log=on_log, **options)
    figures = msae.evaluate(sae, held_out)
    if last_logged:
        add_silent(figures, run.cfg, last_logged["dead"])
    else:
        say(f"{run.folder} was finished before")
    file = run.folder / "eval.json"
    if is_first and (last_logged or not file.exists()):
        msae.write(file, figures)
    return figures


def add_silent(figures: dict, cfg: msae.TrainConfig, share: float) -> None:
    """Add the ``share`` of latents that did not fire in the last rows of training."""
    silent = {"rows": min(cfg.dead_after, cfg.steps * cfg.batch_size), "share": share}
    figures["silent"] = silent
    figures["prefixes"][-1]["silent"] = silent
    if share > 0.1:
        figures["remarks"].append(f"many are silent: try --lr {cfg.lr / 3:.1g}")


def show_how_to_resume(folder: Path, started: float) -> None:
    """Say what is saved, unless the run was refused, so that nothing is since it ``started``."""
    state = newest(folder.rglob(msae.STATE))
    if state is None or state.stat().st_mtime <= started:
        return
    saved = torch.load(state, map_location="cpu", weights_only=True, mmap=True)
    steps = saved["trainer"]["steps_done"]
    click.echo(
        f"step {steps} is saved in {state.parent}; "
        f"to go on, repeat the command with --out {folder} --resume",
        err=True,
    )


def report(results: dict[str, dict], folder: Path) -> None:
    """Print the figures of the runs, and what can be done with the checkpoint."""
    show_figures("held-out rows", TRAINING_COLUMNS, results)
    console.print(
        "",
        f"saved {folder}",
        f"load it with  sae = msae.MatryoshkaSAE.load({str(folder)!r})",
        f"measure it    python cli.py eval {folder} --acts OTHERS.npy",
        f"look at it    python cli.py look {folder}",
        f"share it      python cli.py push {folder}",
        sep="\n",
        soft_wrap=True,
    )


# ------------------------------------------------------------------------------------------ harvest
# Tokens to rows: the stream of TinyModel, with a JSON file beside it that says where it is from.

DATASET = "noanabeshima/TinyModelTokIds"
PUBLISHED_TOKENS = ("train.jsonl", "validation.jsonl")
TOKENS_HELP = 'Lines of {"tok_ids": [...]}, a .npy, or the name of a published file.'


@main.command(epilog="Example: python cli.py harvest --layer 2 --max-rows 1000000 --out layer2.npy")
@with_model
@with_layer
@with_device
@option("--tokens", default="train.jsonl", help=TOKENS_HELP)
@option("--max-rows", type=AtLeast(1), default=30_000_000, help="Stop after this many.")
@option("--dtype", type=FLOATS, default="float16", help="Of the rows.")
@option("--out", type=NEW_FILE, default="acts.npy", help="A new file.")
def harvest(
    model_path: str,
    layer: int,
    device: torch.device,
    tokens: str,
    max_rows: int,
    dtype: str,
    out: Path,
) -> None:
    """Write TinyModel's residual stream as rows for train. [BEGIN] and [PAD] give none."""
    must_be_new(out)
    model = tiny_model(model_path, layer).to(device)
    ids = tokens_for(model, tokens, max_rows)
    is_row = torch.isin(ids, torch.tensor(NO_ROW), invert=True)
    n_rows = min(max_rows, int(is_row.sum()))
    width = model.embed.weight.shape[1]
    check_room(out, n_rows * (width * np.dtype(dtype).itemsize + 8))  # 8: document and token id
    metadata = metadata_of_harvest(model_path, hook_names(model)[layer], tokens)
    msae.write(Path(f"{out}.json"), metadata)
    try:
        with progress("harvest  row", n_rows) as show:
            n_written = msae.harvest(
                model,
                model.layers[layer],
                ids.split(64),
                out,
                at="input",
                drop=NO_ROW,
                dtype=dtype,
                max_rows=max_rows,
                on_rows=show,
            )
    except (KeyboardInterrupt, OSError):
        end = "keeps the rows so far" if out.exists() else "was not written"
        click.echo(f"{out} {end}", err=True)
        raise
    click.echo(
        f"{n_written:,} rows in {out}; "
        f"next:  python cli.py train --acts {out} --latents {4 * width}"
    )


def tiny_model(path: str, layer: int) -> msae.TinyModel:
    """The model of a file or of a published name, which must have that layer."""
    model = msae.TinyModel.load(path)
    last = len(model.layers) - 1
    if layer > last:
        raise click.UsageError(f"--layer {layer} must be at most {last}, the end of {path}")
    return model


def hook_names(model: msae.TinyModel) -> list[str]:
    """What checkpoints call the streams into the layers of ``model``."""
    blocks = [f"torso.{number}.input" for number in range(len(model.torso))]
    return [*blocks, "lm_head.input"]


def tokens_for(model: msae.TinyModel, tokens: str, n_most: int) -> torch.Tensor:
    """Ids (docs, T) that ``model`` can take, of a file or of a published one."""
    path = Path(tokens)
    if tokens in PUBLISHED_TOKENS and not path.exists():
        path = msae.download(DATASET, [tokens], repo_type="dataset") / tokens
    n_vocab = len(model.embed.weight)
    n_positions = model.pos_embed.shape[1]
    return read_tokens(path, n_vocab, n_positions, n_most)


def check_room(path: Path, n_bytes: int) -> None:
    """Refuse a file that the disk has no room for, before hours of work."""
    n_free = shutil.disk_usage(path.parent).free
    if n_bytes > n_free:
        raise OSError(
            f"{path} would take {n_bytes / 1e9:.1f} GB, {n_free / 1e9:.1f} GB are free: "
            "lower --max-rows"
        )


def metadata_of_harvest(model_path: str, hook_name: str, tokens: str) -> dict:
    """What train and push say of the rows: published names, or those of files here."""
    metadata = {
        "model_name": Path(model_path).name,
        "hook_name": hook_name,
        "dataset": tokens if Path(tokens).exists() else DATASET,
    }
    if not Path(model_path).exists():
        metadata["base_model"] = msae.TINY_MODEL[0]
    return metadata


# --------------------------------------------------------------------------------------------- eval
# Checkpoints to figures: on rows, against labels, and spliced into TinyModel.

LOSS_COLUMNS = {"latents": "{latents:,}", "loss": "{spliced:.4f}", "recovered": "{recovered:.1%}"}
UNCOVERED = (
    "{path}: {uncovered:,} of {rows:,} rows, too far out for its training, stay as they are; "
    "coded all the same the loss is {all_coded[spliced]:.4f}, {all_coded[recovered]:.1%} recovered"
)
PROBE_COLUMNS = {
    "latents": "{latents:,}",
    "k=1": "{probes[0][f1]:.3f}",
    "share": "{main_share:.1%}",
    "k=5": "{probes[4][f1]:.3f}",
    "labels": "{n_verdicts}",
    "main\nsilent": "{main_silent:.1%}",
    "absorbed": "{absorption:.1%}",
    "split": "{splitting:.1f}",
}
LEGEND_OF_PROBES = (
    "share: of rows, where the latent of k=1 is on (the label: {label_share:.1%})\n"
    "labels: how many have latents; the figures after it are of these alone"
)


@main.command("eval", epilog="Example: python cli.py eval runs/acts-3072 --acts held.npy")
@click.argument("checkpoints", nargs=-1, required=True)
@option("--acts", required=True, help="Activations that training did not see, as for train.")
@option("--labels", type=EXISTING_FILE, help="A .npy, a number or 0s and 1s a row: adds probing.")
@option("--tokens", help="Ids, as for harvest: adds the loss of TinyModel on reconstructions.")
@option("--max-tokens", type=AtLeast(1), default=100_000, help="Use this many of --tokens.")
@with_model
@with_layer
@with_device
@with_max_norm
@with_mask
@option("--out", type=NEW_FILE, help="JSON file.  [default: eval-ACTS.json in each folder]")
def evaluate(
    checkpoints: tuple[str, ...],
    acts: str,
    labels: Path | None,
    tokens: str | None,
    max_tokens: int,
    model_path: str,
    layer: int,
    device: torch.device,
    max_norm: float,
    mask: Path | None,
    out: Path | None,
) -> None:
    """Measure checkpoints on rows, prefix by prefix."""
    rows = msae.Rows(acts, max_norm, mask)
    if labels:
        x, y, label_names = label_rows(labels, rows)
    if tokens:
        model = tiny_model(model_path, layer).to(device)
        ids = tokens_for(model, tokens, max_tokens)
    saes = {path: msae.MatryoshkaSAE.load(path) for path in checkpoints}
    for path, sae in saes.items():  # all of them, before the first is measured
        check_width(path, sae, acts, rows)
        if tokens:
            check_layer(path, sae, model, layer)
    must_be_new(out)
    results = {}
    for path, sae in saes.items():
        figures = {"checkpoint": path, "acts": Path(acts).name}
        # tokens and labels may be refused, so they come before the rows, which may take hours
        if tokens:
            figures["loss"] = spliced_loss(path, sae.to(device), model, layer, ids)
        if labels:
            figures["labels"] = {**msae.probe(sae.cpu(), x, y), "labels": label_names}
        with progress(f"{path}  row", len(rows)) as show:
            figures |= msae.evaluate(sae.to(device), rows, on_rows=show)
        results[path] = figures
        write_figures(path, acts, out, results, len(saes))
    show_figures("rows", FIGURE_COLUMNS, results)
    if tokens:
        show_losses(results)
    if labels:
        show_probes(results)


def check_layer(path: str, sae: msae.MatryoshkaSAE, model: msae.TinyModel, layer: int) -> None:
    """Refuse a stream other than the one on which ``sae`` was trained, if it names one."""
    names = hook_names(model)
    trained_on = sae.metadata.get("hook_name")
    if trained_on in names and trained_on != names[layer]:
        raise click.UsageError(f"--layer {layer} is not where {path} was trained, {trained_on}")


def spliced_loss(
    path: str, sae: msae.MatryoshkaSAE, model: msae.TinyModel, layer: int, ids: torch.Tensor
) -> dict:
    """The cross-entropy of ``model`` with each prefix of ``sae`` spliced in, with progress."""
    batches = ids.split(8)  # documents: more logits would take much memory
    with progress(f"{path}  batch", len(batches)) as show:
        batches = show_each(batches, show)
        return msae.loss_recovered(model, model.layers[layer], sae, batches, "input", NO_ROW)


def show_each(batches: Iterable, show: Callable[[int], None]) -> Iterator:
    """The ``batches``, each of them shown when it is taken."""
    for number, batch in enumerate(batches, 1):
        show(number)
        yield batch


def write_figures(
    path: str, acts: str, out: Path | None, results: dict, n_checkpoints: int
) -> None:
    """Write what was found for ``path``: into its folder, or all results so far to ``out``."""
    figures = results[path]
    if out is None:
        if not Path(path).is_dir():  # it is on the Hub
            return
        out = Path(path, f"eval-{Path(acts).stem}.json")
    elif n_checkpoints > 1:
        figures = list(results.values())
    msae.write(out, figures)
    say(f"wrote {out}")


def show_losses(results: dict[str, dict]) -> None:
    """Print the cross-entropy, nats a token, and how much of it a prefix recovers."""
    losses = {path: figures["loss"] for path, figures in results.items()}
    title = "Cross-entropy over {tokens:,} tokens: {clean:.4f}, zeroed {zeroed:.4f}, spliced in"
    any_loss = next(iter(losses.values()))  # the same figures for all
    sections = {path: loss["prefixes"] for path, loss in losses.items()}
    show_table(title.format(**any_loss), LOSS_COLUMNS, sections)
    for path, loss in losses.items():
        if loss["uncovered"] > 0:
            click.echo(fill(UNCOVERED, {"path": path, **loss}))


def show_probes(results: dict[str, dict]) -> None:
    """Print what ``probe`` finds, mean over the labels: see its docstring."""
    probed = {path: figures["labels"] for path, figures in results.items()}
    any_probed = next(iter(probed.values()))  # the rows, and their raw probe, are the same for all
    title = "F1 of probes on k latents, {raw[f1]:.3f} on raw rows; what becomes of a label"
    sections = {path: figures["prefixes"] for path, figures in probed.items()}
    show_table(title.format(**any_probed), PROBE_COLUMNS, sections)
    lines = [LEGEND_OF_PROBES.format(**any_probed)]
    n_labels = len(any_probed["labels"])
    for path, figures in probed.items():
        n_verdicts = figures["prefixes"][-1]["n_verdicts"]
        if n_verdicts < n_labels:
            lines.append(
                f"{path}: {n_verdicts} of {n_labels} labels have latents: "
                "no verdict on absorption of the others"
            )
    console.print(*lines, sep="\n", soft_wrap=True)


# --------------------------------------------------------------------------------------------- look
# A checkpoint and rows to a page: look.html draws the data that is put into it here.

DATA_START = '<script id="data" type="application/json">'
N_BEFORE = 40  # rows of its text before a row; the page shows 10 of them at first
N_AFTER = 20  # and after it; 5 at first
IDS_HELP = (
    "A .npy of token ids: (rows,), (docs, positions), or (rows, 2) with the number of the document "
    "before each.  [default: X.ids.npy beside X.npy]"
)


@main.command(epilog="Example: python cli.py look runs/tiny-3072 --vocab tokenizer.json")
@click.argument("checkpoint", required=False)
@option("--acts", help="As for train.  [default: the rows of training]")
@option("--ids", "ids_path", type=EXISTING_FILE, help=IDS_HELP)
@option("--vocab", type=EXISTING_FILE, help='A tokenizer.json, or JSON: [tokens] or {"token": id}.')
@option("--rows", "max_rows", type=AtLeast(1), default=200_000, help="Of more, read random blocks.")
@option(
    "--latents", "max_latents", type=AtLeast(1), default=4096, help="Of more, the most frequent."
)
@with_max_norm
@with_mask
@with_device
@option("--out", type=NEW_FILE, help="A new file.  [default: look.html in the checkpoint's folder]")
def look(
    checkpoint: str | None,
    acts: str | None,
    ids_path: Path | None,
    vocab: Path | None,
    max_rows: int,
    max_latents: int,
    max_norm: float,
    mask: Path | None,
    device: torch.device,
    out: Path | None,
) -> None:
    """Write a page of the latents of CHECKPOINT as a tree. Without one, of the newest in runs/."""
    if checkpoint is None:
        checkpoint = str(newest_checkpoint())
    page = page_path(out, checkpoint)
    sae = msae.MatryoshkaSAE.load(checkpoint).to(device)
    if acts is None:
        acts = rows_of_training(checkpoint, sae)
        if mask is None:
            mask = sae.metadata.get("mask")
    rows = msae.Rows(acts, max_norm, mask)
    check_width(checkpoint, sae, acts, rows)
    documents, ids = token_ids(ids_path, acts, rows.n_source)
    vocabulary = read_vocab(vocab) if vocab else {}
    sample = rows.random_blocks(max_rows, seed=0)
    row_numbers = sample.row_numbers()
    text_numbers = number_texts(documents[row_numbers], row_numbers)
    tokens = None
    if ids is not None:
        tokens = tokens_of_rows(ids[row_numbers], text_numbers, vocabulary)
    with progress("look  row", len(sample)) as show:
        codes = msae.sparse_codes(sae, sample, on_rows=show)
    page_rows = PageRows(codes, row_numbers, text_numbers, tokens)
    write_page(page, sae, page_rows, max_latents, title=f"{checkpoint}, {Path(acts).name}")
    click.echo(f"wrote {page}")


def page_path(out: Path | None, checkpoint: str) -> Path:
    """Where the page goes: in a checkpoint's folder it may replace an older one."""
    if out is None and Path(checkpoint).is_dir():
        return Path(checkpoint, "look.html")
    if out is None:
        out = Path(f"{Path(checkpoint).name}.html")
    must_be_new(out)
    return out


def rows_of_training(checkpoint: str, sae: msae.MatryoshkaSAE) -> str:
    """The path of the rows that ``sae`` was trained on, which train put into its metadata."""
    if "acts" not in sae.metadata:
        raise click.UsageError(f"Missing option '--acts': {checkpoint} does not say its rows.")
    return str(sae.metadata["acts"])


def number_texts(documents: np.ndarray, row_numbers: np.ndarray) -> np.ndarray:
    """(n,): the same number for rows that follow each other in a document without a gap."""
    is_new = (np.diff(documents) != 0) | (np.diff(row_numbers) != 1)
    return np.append(0, is_new.cumsum())


def tokens_of_rows(
    ids: np.ndarray, text_numbers: np.ndarray, vocabulary: dict[int, bytes]
) -> list[str]:
    """The visible text of the token of each row; of an id without one, its number."""
    contents = [vocabulary.get(id, str(id).encode()) for id in ids.tolist()]
    starts = np.flatnonzero(np.diff(text_numbers, prepend=-1))
    tokens = []
    for start, stop in itertools.pairwise([*starts, len(ids)]):
        tokens += token_texts(contents[start:stop])
    return tokens


class PageRows(NamedTuple):
    """The n rows that a page is about."""

    codes: msae.SparseCodes
    row_numbers: np.ndarray  # (n,), in the file
    text_numbers: np.ndarray  # (n,), of the piece of text that a row belongs to
    tokens: list[str] | None  # n


def write_page(
    path: Path, sae: msae.MatryoshkaSAE, rows: PageRows, max_latents: int, **more: Any
) -> None:
    """Write the page of the latents; ``more`` is data for look.html, which says what it takes."""
    shown = most_frequent(sae, rows.codes, max_latents)
    latents = []
    with progress("look  latent", len(shown)) as show:
        for figures, row_index, acts in msae.latent_figures(sae, rows.codes, shown):
            act_of_row = dict(zip(row_index.tolist(), acts.tolist(), strict=True))
            for kind in ("largest", "fifths"):
                figures[kind] = [context(rows, row, figures, act_of_row) for row in figures[kind]]
            latents.append(figures)
            show(len(latents))
    is_on = np.isin(np.arange(len(sae.b_enc)), rows.codes.latent)
    data = {
        "rows": len(rows.codes.is_far),
        "far": int(rows.codes.is_far.sum()),
        "ends": list(sae.prefixes),
        "silent": [int(np.sum(~level)) for level in np.split(is_on, sae.prefixes[:-1])],
        "latents": latents,
        "tokens": rows.tokens,
        **more,
    }
    msae.write(path, fill_page(four_digits(data)))


def most_frequent(sae: msae.MatryoshkaSAE, codes: msae.SparseCodes, max_latents: int) -> np.ndarray:
    """The latents that fire most often, rising; of each level, between prefixes, the same share."""
    n_latents = len(sae.b_enc)
    counts = np.bincount(codes.latent, minlength=n_latents)
    shown = []
    for level in np.split(np.arange(n_latents), sae.prefixes[:-1]):
        n_shown = max(1, max_latents * len(level) // n_latents)
        by_count = np.argsort(-counts[level])
        shown.append(np.sort(level[by_count[:n_shown]]))
    return np.concatenate(shown)


def context(rows: PageRows, row: int, figures: dict, act_of_row: dict[int, float]) -> dict:
    """A row where a latent is on, with the activations of that latent around it in its text."""
    start = max(0, row - N_BEFORE)
    in_text = rows.text_numbers[start : row + N_AFTER + 1] == rows.text_numbers[row]
    neighbours = (start + np.flatnonzero(in_text)).tolist()
    shades = [round(35 * act_of_row.get(i, 0) / figures["max"]) for i in neighbours]
    entry = {
        "row": int(rows.row_numbers[row]),
        "act": act_of_row[row],
        "from": neighbours[0],
        "at": row - neighbours[0],
        "shades": "".join(np.base_repr(shade, 36) for shade in shades),  # 0 to z, a sign each
    }
    if rows.tokens is None:
        strongest = strongest_latents(rows.codes, row)
        entry["others"] = [latent for latent in strongest if latent != figures["latent"]]
    return entry


def strongest_latents(codes: msae.SparseCodes, row: int, max_latents: int = 9) -> list[int]:
    """The latents that are most active in a row, the largest first."""
    entries = slice(codes.starts[row], codes.starts[row + 1])
    by_value = np.argsort(-codes.value[entries])
    return codes.latent[entries][by_value[:max_latents]].tolist()


def four_digits(data: dict) -> dict:
    """``data`` with its floats rounded to four digits: the page is half as large."""
    text = json.dumps(data)
    return json.loads(text, parse_float=lambda number: float(f"{float(number):.4g}"))


def fill_page(data: dict) -> bytes:
    """The page look.html, beside this file, with ``data`` in place of its sample of data."""
    page = Path(__file__).with_name("look.html").read_text(encoding="utf-8")
    head, start, rest = page.partition(DATA_START)
    _, end, tail = rest.partition("</script>")
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    text = text.replace("<", r"\u003c")  # so that no token can end the script
    return "".join([head, start, text, end, tail]).encode()


# ---------------------------------------------------------------------------------------------- toy
# The feature tree to two SAEs, whose maps show what each latent does when one feature is on.

TOY_CONFIG = Path(__file__).with_name("toy_config.json")
TOY_COLUMNS = {
    "seed": "{seed}",
    "FVU": "{fvu:.3f}",
    "L0": "{l0:.2f}",
    "clean": "{clean:g}/{features:g}",
    "cos": "{mean_cosine:.3f}",
    "min": "{min_cosine:.3f}",
    "absorbed": "{absorbed:.2f}",
}
SHADES = [  # of 0, 1/4, ..., 1: a sign, and where there are colours, a colour
    (".", "#0d082a"),
    ("-", "#57106e"),
    ("+", "#bc3754"),
    ("*", "#f98e09"),
    ("#", "#fcffa4"),
]


@main.command(epilog="Example: python cli.py toy --seeds 10 --out runs/ten-seeds")
@option("--config", type=EXISTING_FILE, default=TOY_CONFIG, help="Settings.")
@option("--seed", type=AtLeast(0, 2**62), default=0, help="First seed: of tree, rows and weights.")
@option("--seeds", type=AtLeast(1), default=1, help="Number of seeds, one after the other.")
@option("--out", type=FOLDER, default="runs/toy", help="For toy.json, toy.svg and look.html.")
def toy(config: Path, seed: int, seeds: int, out: Path) -> None:
    """Show absorption, and its cure, on a tree of features. Files are written after each seed."""
    settings = read_json(config)
    torch.set_num_threads(1)  # 20 x 20 matrices: threads would only wait for each other
    # rows without any feature are all 0, and no padding
    warnings.filterwarnings("ignore", message=".*are the same, as padding is")
    results = []
    for toy_seed in range(seed, seed + seeds):
        started = time.perf_counter()
        with msae.reading(config, "a toy"):
            tree, configs = toy_setup(toy_seed, **settings)
        out.mkdir(parents=True, exist_ok=True)
        saes = train_toys(tree, configs, toy_seed)
        other_seed = toy_seed + 1_000_003  # so that no seed measures on rows that one trained on
        figures = {name: msae.toy_figures(sae, tree, other_seed) for name, sae in saes.items()}
        seconds = round(time.perf_counter() - started, 1)
        result = {"seed": toy_seed, "seconds": seconds, **figures}
        results.append(result)
        msae.write(out / "toy.json", result if seeds == 1 else {"seeds": results})
        msae.write(out / "toy.svg", toy_svg(tree, saes))
        toy_page(out / "look.html", saes["matryoshka"], tree)
    sections = {name: toy_rows(name, results) for name in configs}
    show_table("True features recovered", TOY_COLUMNS, sections)
    console.print(draw_maps(tree, saes, width=2 if console.width > 140 else 1))
    click.echo(f"wrote {out / 'toy.json'}, {out / 'toy.svg'} and {out / 'look.html'}")


def toy_setup(
    seed: int, /, tree: dict, train: dict, **size: Any
) -> tuple[msae.FeatureTree, dict[str, msae.TrainConfig]]:
    """The tree and the configs {"matryoshka", "vanilla"}; ``size``: d_model, norm_std."""
    tree = msae.FeatureTree(tree, seed=seed, **size)
    cfg = msae.TrainConfig(**{"n_latents": len(tree.parent_of), **train, "seed": seed})
    return tree, {"matryoshka": cfg, "vanilla": cfg.vanilla()}


def train_toys(
    tree: msae.FeatureTree, configs: dict[str, msae.TrainConfig], seed: int
) -> dict[str, msae.MatryoshkaSAE]:
    """An SAE for each of the configs, on the same rows, which are seen once."""
    cfg = configs["vanilla"]
    n_rows = min(cfg.steps * cfg.batch_size, 2**25 // tree.d_model)  # at most 128 MiB
    rows = tree.sample(n_rows, seed)
    saes = {}
    for name, cfg in configs.items():
        with training_progress(f"{name} {seed}", cfg.steps) as on_log:
            saes[name] = msae.train(rows, cfg, on_log=on_log)
    return saes


def toy_rows(name: str, results: list[dict]) -> list[dict]:
    """The figures of an SAE for each seed, and their mean if there are several."""
    rows = []
    for result in results:
        figures = {**result[name], "seed": result["seed"]}
        rates = [pair["rate"] for pair in figures.pop("absorption") if pair["rate"] is not None]
        figures["absorbed"] = np.mean(rates) if rates else math.nan
        rows.append(figures)
    if len(rows) > 1:
        mean = {key: np.mean([figures[key] for figures in rows]) for key in rows[0]}
        rows.append({**mean, "seed": "mean"})
    return rows


def pure_maps(
    tree: msae.FeatureTree, saes: dict[str, msae.MatryoshkaSAE]
) -> dict[str, torch.Tensor]:
    """{title: (features, features)}: row i is feature i with its parents, or its matched codes."""
    pure = torch.eye(len(tree.parent_of))
    for parent, child in tree.pairs:
        pure[child] += pure[parent]
    maps = {"true features": pure}
    norms = tree.directions.norm(dim=1)
    for name, sae in saes.items():
        acts, _ = msae.matched_acts(sae, tree, pure @ tree.directions)
        maps[name] = acts / norms
    return maps


def draw_maps(tree: msae.FeatureTree, saes: dict[str, msae.MatryoshkaSAE], width: int) -> Group:
    """The pure maps beside each other, with cells of ``width`` signs, and a legend."""
    maps = pure_maps(tree, saes)
    true = maps["true features"]
    pictures = [draw_map(title, values, true, tree, width) for title, values in maps.items()]
    legend = Text("row: a feature is on, with its parent (bold); column: its latent\n")
    legend.append(*shade(0, width, is_absorbed=True))
    legend.append(" absorbed: on, but its latent is silent; 0 ")
    for level in range(len(SHADES)):
        legend.append(*shade(level / 4, width))
    legend.append(" 1")
    return Group(Columns(pictures, padding=(0, 3)), legend)


def draw_map(
    title: str, values: torch.Tensor, true: torch.Tensor, tree: msae.FeatureTree, width: int
) -> Text:
    """A map of ``values``; rings where ``true`` is on and they are not; numbers of parents bold."""
    n_features = len(true)
    style = ["bold" if i in tree.parent_of else "" for i in range(n_features)]
    picture = Text(f"   {title.capitalize():^{n_features * width}}\n   ")
    for i in range(n_features):
        number = f"{i:>{width}}"[-width:] if i % 2 == 0 else " " * width  # every second fits
        picture.append(number, style[i])
    for i in range(n_features):
        picture.append("\n")
        picture.append(f"{i:>2} "[-3:], style[i])
        for value, true_value in zip(values[i].tolist(), true[i].tolist(), strict=True):
            is_absorbed = true_value > 0.5 and value < 0.1
            picture.append(*shade(value, width, is_absorbed))
    return picture


def shade(value: float, width: int, is_absorbed: bool = False) -> tuple[str, str]:
    """(Text, style) of a cell for a value from 0 to 1, or for one that is absorbed."""
    level = round(4 * value)
    sign, colour = SHADES[min(4, max(0, level))]
    if not is_absorbed:
        return sign * width, f"{colour} on {colour}"
    ring = "o" if width == 1 else "()"
    return ring, f"bold #00ccff on {colour}"


def toy_svg(tree: msae.FeatureTree, saes: dict[str, msae.MatryoshkaSAE]) -> bytes:
    """The maps as a picture: a terminal wide enough for three of them side by side."""
    paper = Console(record=True, width=6 * len(tree.parent_of) + 20, height=40, file=io.StringIO())
    paper.print(draw_maps(tree, saes, width=2))
    return paper.export_svg(title="python cli.py toy", theme=DEFAULT_TERMINAL_THEME).encode()


def toy_page(path: Path, sae: msae.MatryoshkaSAE, tree: msae.FeatureTree) -> None:
    """The page of an SAE on fresh toy rows: its tree, and the one that there is."""
    features = tree.sample_features(20_000, torch.Generator().manual_seed(0))
    tokens = []
    for row in features:
        active = row.nonzero()[:, 0].tolist()
        tokens.append(f"features {', '.join(map(str, active))}")
    codes = msae.sparse_codes(sae, features @ tree.directions)
    row_numbers = np.arange(len(tokens))
    rows = PageRows(codes, row_numbers, row_numbers, tokens)  # each row is a text by itself
    cosine, latent = (normalize(tree.directions, dim=1) @ sae.W_dec.data.T).max(dim=1)
    truth = list(zip(latent.tolist(), cosine.tolist(), tree.parent_of, strict=True))
    write_page(path, sae, rows, max_latents=len(sae.b_enc), title="The toy", truth=truth)


# -------------------------------------------------------------------------------------------- bench
# Times on this machine. The product of the encoder is what no step can do without.


N_WARM_UP = 3  # steps that are not counted


@main.command(epilog="Example: python cli.py bench --latents 24576 --steps 10")
@option("--latents", type=AtLeast(1, 2**31), default=3072, help="Number of latents F.")
@option("--d-model", type=AtLeast(1, 2**31), default=768, help="Width D of the rows.")
@option("--batch-size", type=AtLeast(1, 2**31), default=2048, help="Rows per step.")
@option("--k", type=float, default=30, help="Active latents per row.")
@option("--steps", type=AtLeast(1), default=20, help="Steps to time, after three to warm up.")
@with_device
@with_dtype
def bench(
    latents: int,
    d_model: int,
    batch_size: int,
    k: float,
    steps: int,
    device: torch.device,
    dtype: str | None,
) -> None:
    """Time this machine's training step beside its encoder product."""
    spare = round(0.25 * latents)  # as train starts with
    cfg = msae.TrainConfig(
        n_latents=latents, k=k, batch_size=batch_size, dtype=dtype, n_latents_start=latents + spare
    )
    trainer = msae.Trainer(cfg, d_model, device)
    x = torch.randn(batch_size, d_model, device=device) / d_model**0.5
    product_time, step_time = median_times(trainer, x, steps)
    click.echo(
        f"batch {batch_size:,}, width {d_model:,}, {latents:,} + {spare:,} spare latents, "
        f"k {k:g}, {len(cfg.prefix_lengths())} prefixes, {trainer.dtype} on {device}\n\n"
        f"encoder product alone  {1e3 * product_time:,.1f} ms\n"
        f"training step          {1e3 * step_time:,.1f} ms, "
        f"{step_time / product_time:.2f} x the product\n"
        f"rows per second        {batch_size / step_time:,.0f}"
    )
    if device.type == "cuda":
        n_bytes = torch.cuda.max_memory_allocated(device)
        click.echo(f"peak memory            {n_bytes / 2**20:,.0f} MiB")


def median_times(trainer: msae.Trainer, x: torch.Tensor, steps: int) -> tuple[float, float]:
    """Seconds of the product ``x @ W_enc`` and of a step, in turns, so that drift cancels."""
    dtype = getattr(torch, trainer.dtype)
    x_cast = x.to(dtype)
    W_enc = trainer.sae.W_enc.detach().to(dtype)
    product = x_cast @ W_enc
    product_times = []
    step_times = []
    for _ in range(N_WARM_UP + steps):
        product_times.append(seconds(lambda: torch.mm(x_cast, W_enc, out=product)))
        step_times.append(seconds(lambda: trainer.step(x)))
    return np.median(product_times[N_WARM_UP:]), np.median(step_times[N_WARM_UP:])


def seconds(call: Callable[[], torch.Tensor]) -> float:
    """How long ``call`` takes until its result can be read, which waits for a GPU."""
    started = time.perf_counter()
    result = call()
    result.flatten()[0].item()
    return time.perf_counter() - started


# --------------------------------------------------------------------------------------------- push
# A checkpoint to the Hub. The card says what it is, and how well it does by its eval*.json.

EVALS = "eval*.json"  # eval.json, of train, and eval-ACTS.json, of eval
CARD = """---
library_name: saelens
license: {license}
{base_model}tags: [sparse-autoencoder, matryoshka, mechanistic-interpretability]
---

# {title}

A Matryoshka sparse autoencoder: {F} latents for raw activations of width {D}. Each of its prefixes,
the first {prefixes} latents, is a sparse autoencoder too.

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
@option("--create-pr", is_flag=True, help="Open a pull request with the commit.")
@option("--token", help="Access token.  [default: of `hf auth login` or HF_TOKEN]")
@option("--license", default="mit", help="Of the weights, for the card.")
@option("--dry-run", is_flag=True, help="Show what would go up, without touching the network.")
def push(
    checkpoint: Path | None,
    repo: str | None,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    token: str | None,
    license: str,
    dry_run: bool,
) -> None:
    """Upload CHECKPOINT to REPO on the Hugging Face Hub, with a card.

    Without CHECKPOINT it is the newest in runs/.
    """
    if checkpoint is None:
        checkpoint = newest_checkpoint()
    folder = checkpoint.resolve()
    if repo is None:
        repo = folder.name
    name = repo if "/" in repo else f"YOUR_NAME/{repo}"
    card = model_card(folder, name, license, revision)
    files = files_to_push(folder)
    files["README.md"] = card.encode()
    if dry_run:
        lines = "".join(f"{len(content):>13,}  {file}\n" for file, content in files.items())
        click.echo(f"would push {folder} to {name}, in one commit:\n{lines}\n{card}")
        return
    try:
        api = huggingface_hub.HfApi(token=token)
        repo_id = api.create_repo(repo, private=private, exist_ok=True).repo_id
        files["README.md"] = card.replace(name, repo_id).encode()
        url = upload(api, repo_id, files, revision, create_pr)
    except Exception as error:  # of huggingface_hub, of its HTTP library, of Xet
        reason = msae.one_line(error).split("Bearer")[0]  # what follows is the token
        raise OSError(f"{folder} not pushed to {repo}: {reason}") from None
    click.echo(url)


def files_to_push(folder: Path) -> dict[str, bytes]:
    """{name: content}, without the state of training and without paths of this machine."""
    names = (msae.WEIGHTS, msae.CONFIG, msae.LIMIT, msae.METRICS)
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name in names or path.match(EVALS):
            files[path.name] = path.read_bytes()
    cfg = json.loads(files[msae.CONFIG])
    if cfg.get("metadata"):
        for name in ("acts", "mask"):
            cfg["metadata"].pop(name, None)
    files[msae.CONFIG] = json.dumps(cfg, indent=2).encode()
    files["config.json"] = files[msae.CONFIG]  # by which the Hub counts downloads
    return files


def upload(
    api: "huggingface_hub.HfApi",  # quoted, as huggingface_hub loads it on first use, which is slow
    repo_id: str,
    files: dict[str, bytes],
    revision: str | None,
    create_pr: bool,
) -> str:
    """Put ``files`` into a repository in one commit; return where they can be seen."""
    if revision and not api.revision_exists(repo_id, revision):
        api.create_branch(repo_id, branch=revision)
    commit = api.create_commit(
        repo_id,
        [huggingface_hub.CommitOperationAdd(name, content) for name, content in files.items()],
        commit_message="Upload a Matryoshka SAE",
        revision=revision,
        create_pr=create_pr,
    )
    if commit.pr_url:
        return commit.pr_url
    url = f"{api.endpoint}/{repo_id}"
    return f"{url}/tree/{revision}" if revision else url


def model_card(folder: Path, repo: str, license: str, revision: str | None) -> str:
    """The README.md of ``repo``: what the checkpoint is, how good it is, how to load it."""
    sae = msae.MatryoshkaSAE.load(folder)
    facts = [f"- {name}: {value}" for name, value in sae.metadata.items() if name != "acts"]
    base_model = sae.metadata.get("base_model")
    return CARD.format(
        license=json.dumps(license),
        base_model=f"base_model: {json.dumps(base_model)}\n" if base_model else "",
        title=repo.split("/")[-1],
        F=len(sae.b_enc),
        D=len(sae.b_dec),
        prefixes=", ".join(map(str, sae.prefixes)),
        p=sae.prefixes[0],
        facts="\n".join(facts),
        figures=figures_of_card(folder),
        source=f"{repo!r}, revision={revision!r}" if revision else repr(repo),
    )


def figures_of_card(folder: Path) -> str:
    """A table of eval.json, which is the last by name, or of another evaluation."""
    files = sorted(folder.glob(EVALS))
    if not files:
        return "There was no evaluation on held-out rows."
    with msae.reading(files[-1], "what eval writes"):
        figures = json.loads(files[-1].read_text())
        lines = [list(TRAINING_COLUMNS), ["---"] * len(TRAINING_COLUMNS)]
        for level in figures["prefixes"]:
            lines.append([fill(text, level) for text in TRAINING_COLUMNS.values()])
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
        source = figures.get("acts", "held out from training")
        return (
            f"{table}\n\nOn {figures['rows']:,} rows ({source}). FVU: squared error over variance; "
            f"L0: active latents per row; {legend(figures)}."
        )


if __name__ == "__main__":
    main()
