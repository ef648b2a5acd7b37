"""The command `hf-prune`: models pruned, shrunk, reported on, compared and pushed, without a script.

Each command imports what it needs by itself: `--help` waits for neither torch nor Transformers.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, cast

import typer
from typer import Argument, Option

app = typer.Typer(
    help="Prune, shrink, inspect, compare and publish models.", no_args_is_help=True,
    add_completion=False, pretty_exceptions_enable=False,
)  # fmt: skip
Model = Annotated[str, Argument(help="A folder, or a name on the Hub.")]
Json = Annotated[bool, Option("--json", help="Print JSON.")]
Force = Annotated[bool, Option("--force", help="Write over what is there.")]
Output = Annotated[Path, Option(help="The folder to save into.")]
Compress = Annotated[bool, Option("--compress", help="Leave zeros out of the files, where that makes them smaller.")]
Device = Annotated[
    str | None, Option(help="Where to compute, such as cpu or cuda. By default cuda if there is one, else cpu.")
]
Criterion = Annotated[str | None, Option(help="magnitude, wanda, sparsegpt, taylor, …")]
Scope = Annotated[str | None, Option(help="auto, global, layer, row, erk, owl")]
MultipleOf = Annotated[int | None, Option(help="What the number of neurons that remain is a multiple of.")]
Reconstruct = Annotated[bool | None, Option(help="Whether what reads pruned structures is solved anew.")]
Samples = Annotated[int | None, Option(help="Number of calibration samples.")]
Length = Annotated[int | None, Option(min=1, help="Tokens per sample of text, at most 512.")]
BatchSize = Annotated[int | None, Option(min=1, help="Batch size; 8 by default.")]
Seed = Annotated[int, Option(help="Seed of drawn images, and of criteria that draw numbers.")]


@app.command(name="prune")
def prune_command(
    model: Model,
    output: Output,
    sparsity: Annotated[float | None, Option(help="Fraction of the targeted weights to remove, in [0, 1).")] = None,
    keep_parameters: Annotated[float | None, Option(help="Share of the parameters to keep, in (0, 1].")] = None,
    keep_flops: Annotated[float | None, Option(help="Share of the FLOPs of a batch to keep.")] = None,
    keep_latency: Annotated[float | None, Option(help="Share of the time of a batch to keep.")] = None,
    granularity: Annotated[str | None, Option(help="unstructured, 2:4, block:4x4, head, neuron, …")] = None,
    criterion: Criterion = None,
    scope: Scope = None,
    layer_sparsity: Annotated[
        str | None,
        Option(help="JSON of module names → sparsities, or @FILE, a sensitivity report."),
    ] = None,
    multiple_of: MultipleOf = None,
    uniform: Annotated[bool | None, Option(help="Whether as many structures go everywhere.")] = None,
    reconstruct: Reconstruct = None,
    config: Annotated[Path | None, Option(help="A folder with a pruning_config.json; flags override it.")] = None,
    calibration: Annotated[Path | None, Option(help="A text file, or a folder of images.")] = None,
    samples: Samples = None,
    length: Length = None,
    batch_size: BatchSize = None,
    scores: Annotated[
        Path | None, Option(help="A file that keeps what calibration finds; if it is there, it is read instead.")
    ] = None,
    seed: Seed = 0,
    compress: Compress = False,
    device: Device = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Prunes a model in one cut: pruned weights are zero, and shapes stay as they are."""
    from .calibration.saved_statistics import CalibrationStatistics
    from .config import PruningConfig
    from .plan import resolve
    from .pruning import collect_statistics, prune
    from .publishing.folders import local_folder
    from .publishing.hub import save_pretrained
    from .publishing.opening import open_model, open_processing
    from .publishing.readers import read_batches

    _require_room(output, force)
    flags = dict(sparsity=sparsity, granularity=granularity, criterion=criterion, scope=scope)
    flags |= dict(keep_parameters=keep_parameters, keep_flops=keep_flops, keep_latency=keep_latency)
    flags |= dict(layer_sparsity=layer_sparsity, multiple_of=multiple_of, uniform=uniform, reconstruct=reconstruct)
    flags |= dict(calibration_samples=samples)
    given = {name: value for name, value in flags.items() if value is not None}
    saved = {} if config is None else PruningConfig.from_pretrained(config).to_dict()
    asked = PruningConfig(**{**saved, **given})  # type: ignore[arg-type]
    if calibration is not None and not resolve(asked).looks_at_data:
        raise ValueError(
            f"the criterion {asked.criterion} with scope {asked.scope} looks at no data: leave --calibration out, or "
            "take another --criterion, such as wanda."
        )
    if calibration is None and (samples, length, batch_size) != (None, None, None):
        raise ValueError("--samples, --length and --batch-size need --calibration: give it, or leave them out.")
    folder = local_folder(model)
    opened, processing = open_model(folder, _device_of(device)), open_processing(folder)
    batches = None
    if calibration is not None:
        sizes = {name: value for name, value in (("length", length), ("batch_size", batch_size)) if value is not None}
        count = asked.calibration_samples
        batches = read_batches(calibration, opened, processing, samples=count, seed=seed, **sizes)
    statistics = None
    if scores is not None and scores.exists():
        statistics = CalibrationStatistics.load(scores)
        if samples is not None and statistics.samples != samples:
            raise ValueError(f"{scores} was made of {statistics.samples} samples, not {samples}. Take another file.")
    elif scores is not None:
        if batches is None:
            raise ValueError(f"there is no {scores}. Give --calibration too, and what it finds is kept there.")
        statistics = collect_statistics(opened, asked, batches)
        statistics.save(scores)
    report = prune(opened, asked, batches, statistics=statistics, seed=seed)
    base = _base_of(model, folder)
    save_pretrained(opened, output, processing_class=processing, config=asked, base_model=base, compress=compress)
    _print({"output": str(output), **report.to_dict()}, f"{report}\n\nSaved in {output}.", as_json)


@app.command(name="sensitivity")
def sensitivity_command(
    model: Model,
    calibration: Annotated[Path, Option(help="A text file or a folder of images, to measure the loss on.")],
    output: Annotated[Path, Option(help="The report to write; prune takes it as --layer-sparsity @FILE.")],
    granularity: Annotated[str, Option(help="unstructured, block:4x4, head, neuron, …")] = "unstructured",
    criterion: Criterion = None,
    scope: Scope = None,
    multiple_of: MultipleOf = None,
    reconstruct: Reconstruct = None,
    levels: Annotated[str, Option(help="The sparsities that each place is pruned to.")] = "0.25,0.5,0.75",
    picture: Annotated[Path | None, Option("--plot", help="Draw a heat map into this image too.")] = None,
    samples: Samples = None,
    length: Length = None,
    batch_size: BatchSize = None,
    seed: Seed = 0,
    device: Device = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """What each place of a model costs if it alone is pruned, and each kind: the change of the loss."""
    from .analysis.sensitivity import sensitivity
    from .config import PruningConfig
    from .publishing.folders import local_folder
    from .publishing.opening import open_model, open_processing
    from .publishing.readers import read_batches
    from .reporting.plots import require_matplotlib

    for path in (output, picture):
        if path is not None:
            _require_absent(path, force)
    if picture is not None:
        require_matplotlib()
    try:
        asked_levels = [float(level) for level in levels.split(",")]
    except ValueError as error:
        raise ValueError(f"--levels takes numbers with commas between them, got {levels!r}.") from error
    flags = dict(granularity=granularity, criterion=criterion, scope=scope, calibration_samples=samples)
    flags |= dict(multiple_of=multiple_of, reconstruct=reconstruct)
    asked = PruningConfig.from_dict({"sparsity": 0.5, **{n: value for n, value in flags.items() if value is not None}})
    folder = local_folder(model)
    opened = open_model(folder, _device_of(device))
    sizes = {name: value for name, value in (("length", length), ("batch_size", batch_size)) if value is not None}
    count = asked.calibration_samples
    batches = read_batches(calibration, opened, open_processing(folder), samples=count, seed=seed, **sizes)
    found = sensitivity(opened, asked, batches, levels=asked_levels, seed=seed)
    found.save(output)
    if picture is not None:
        found.plot(picture)
    _print({"output": str(output), **found.to_dict()}, f"{found}\n\nSaved in {output}.", as_json)


@app.command(name="shrink")
def shrink_command(
    model: Model,
    output: Output,
    compress: Compress = False,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """Removes heads, queries, neurons, widths, experts, layers and channels of which all is zero."""
    from .config import CONFIG_NAME, PruningConfig
    from .publishing.folders import local_folder
    from .publishing.hub import save_pretrained
    from .publishing.opening import open_model, open_processing
    from .reporting.history import HISTORY_NAME, PruningHistory
    from .reporting.savings import shrink_measured

    _require_room(output, force)
    folder = local_folder(model)
    opened, processing = open_model(folder), open_processing(folder)
    history = PruningHistory.load(folder / HISTORY_NAME) if (folder / HISTORY_NAME).is_file() else PruningHistory()
    history.costs = {
        **shrink_measured(opened),
        **({"masked": before} if (before := history.costs.get("masked")) else {}),
    }
    config = PruningConfig.from_pretrained(folder) if (folder / CONFIG_NAME).is_file() else None
    base = _base_of(model, folder)
    save_pretrained(
        opened, output, processing_class=processing, config=config, history=history, base_model=base, compress=compress
    )
    counts = {f"{name}_parameters": cost.parameters for name, cost in history.costs.items()}
    _print({"output": str(output), **counts}, f"{history.savings()}\n\nSaved in {output}.", as_json)


@app.command()
def report(
    model: Model,
    page: Annotated[Path | None, Option("--html", help="Write a page for a browser, pictures included.")] = None,
    force: Force = False,
    as_json: Json = False,
) -> None:
    """The zeros of a saved model, by tensor, N:M pattern, row, head, neuron, channel and layer, and its size."""
    from .publishing.folders import local_folder
    from .publishing.inspection import report_folder
    from .publishing.pages import page_of
    from .reporting.plots import require_matplotlib

    if page is not None:
        _require_absent(page, force)
        if not page.parent.is_dir():
            raise ValueError(f"there is no folder {page.parent} to write {page.name} into.")
        require_matplotlib()
    found = report_folder(local_folder(model), show_progress=True)
    if page is not None:
        page.write_text(page_of(model, found), encoding="utf-8")
    _print(found.to_dict(), str(found), as_json)


@app.command()
def diff(
    a: Model, b: Annotated[str, Argument(help="Another one, of the same architecture.")], as_json: Json = False
) -> None:
    """Which zeros came and went from A to B, and how many weights moved. Exits with 1 if any differ."""
    from .publishing.comparison import compare_folders
    from .publishing.folders import local_folder

    found = compare_folders(local_folder(a), local_folder(b), show_progress=True)
    _print(found.to_dict(), str(found), as_json)
    raise typer.Exit(0 if found.are_equal else 1)


@app.command()
def plot(
    history: Annotated[Path, Argument(help="pruning_history.json, or the folder that it is in.")],
    output: Annotated[Path, Option(help="An image; its suffix says which kind.")] = Path("pruning.png"),
    force: Force = False,
) -> None:
    """The plot of a run: metric and sparsity over its steps."""
    from .reporting.history import HISTORY_NAME, PruningHistory

    _require_absent(output, force)
    PruningHistory.load(history / HISTORY_NAME if history.is_dir() else history).plot(output)
    typer.echo(str(output))


@app.command()
def push(
    folder: Annotated[Path, Argument(help="A saved model.")],
    repo: Annotated[str, Argument(help="A name on the Hub: yours, or user/name.")],
    private: Annotated[
        bool | None, Option("--private/--public", help="Make a new repository private or public.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Uploads a folder. The token is that of `hf auth login`, or HF_TOKEN."""
    from huggingface_hub import CommitInfo

    from .publishing.hub import push_to_hub

    commit = cast(CommitInfo, push_to_hub(folder, repo, private=private))
    _print({"commit": commit.oid, "url": commit.commit_url}, commit.commit_url, as_json)


def main() -> None:
    """Runs the command. What a user can mend is said in a line, with exit code 2."""
    try:
        app()
    except SystemExit:  # How every command ends. Only an error is worth the import of those that may be expected.
        raise
    except _failures() as error:
        typer.echo(f"hf-prune: {error}", err=True)
        sys.exit(2)


def _failures() -> tuple[type[Exception], ...]:
    """What a user can mend."""
    import torch
    from huggingface_hub.errors import HfHubHTTPError

    # Network errors are the bases of the Hub's own: OSError, and that of the HTTP library which its client uses.
    network = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
    return (ValueError, ImportError, torch.OutOfMemoryError, *network)


def _device_of(asked: str | None) -> str:
    import torch

    return asked or ("cuda" if torch.cuda.is_available() else "cpu")


def _print(values: Mapping[str, object], text: str, as_json: bool) -> None:
    typer.echo(json.dumps(values, indent=2) if as_json else text)


def _require_absent(path: Path, force: bool) -> None:
    if path.exists() and not force:
        raise ValueError(f"{path} is there already. Give --force to write over it, or another place.")


def _require_room(folder: Path, force: bool) -> None:
    """Requires that nothing is lost if a model is saved into a folder."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, and a model is saved into a folder.")
    if not force and folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty. Give --force to replace the model in it, or another --output.")


def _base_of(model: str, folder: Path) -> str | None:
    """The name of the dense model on the Hub: the one that the card of a model gives, else its own."""
    from .publishing.cards import base_model_of
    from .publishing.hub import CARD_NAME

    return base_model_of(folder / CARD_NAME) or (None if Path(model).exists() else model)


if __name__ == "__main__":
    main()
