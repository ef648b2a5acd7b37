"""The command `hf-prune`: saved models reported on, compared, plotted and pushed, without a script."""

import json
import sys
from pathlib import Path
from typing import Annotated, cast

import typer
from huggingface_hub import CommitInfo
from huggingface_hub.errors import HfHubHTTPError
from typer import Argument, Option

from .folders import local_folder
from .history import HISTORY_NAME, PruningHistory
from .hub import push_to_hub
from .inspection import compare_folders, report_folder

app = typer.Typer(
    help="Pruned models: what is in them, and where they go.", no_args_is_help=True, add_completion=False,
    pretty_exceptions_enable=False,
)  # fmt: skip
Model = Annotated[str, Argument(help="A folder, or a name on the Hub.")]
Json = Annotated[bool, Option("--json", help="Print JSON.")]


@app.command()
def report(model: Model, as_json: Json = False) -> None:
    """The zeros of a saved model, tensor by tensor: N:M patterns, rows that are zero, size."""
    found = report_folder(local_folder(model), show_progress=True)
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else str(found))


@app.command()
def diff(
    a: Model, b: Annotated[str, Argument(help="Another one, of the same architecture.")], as_json: Json = False
) -> None:
    """Which zeros came and went from A to B, and how many weights moved. Exits with 1 if any differ."""
    found = compare_folders(local_folder(a), local_folder(b), show_progress=True)
    typer.echo(json.dumps(found.to_dict(), indent=2) if as_json else str(found))
    raise typer.Exit(0 if found.are_equal else 1)


@app.command()
def plot(
    history: Annotated[Path, Argument(help=f"{HISTORY_NAME}, or the folder that it is in.")],
    output: Annotated[Path, Option(help="An image; its suffix says which kind.")] = Path("pruning.png"),
    force: Annotated[bool, Option("--force", help="Write over a file that is there.")] = False,
) -> None:
    """The plot of a run: metric and sparsity over its steps."""
    if output.exists() and not force:
        raise ValueError(f"{output} is there already. Give --force to write over it, or another --output.")
    PruningHistory.load(history / HISTORY_NAME if history.is_dir() else history).plot(output)
    typer.echo(str(output))


@app.command()
def push(
    folder: Annotated[Path, Argument(help="A saved model.")],
    repo: Annotated[str, Argument(help="A name on the Hub: yours, or user/name.")],
    private: Annotated[bool | None, Option("--private/--public", help="Of a new repository.")] = None,
    as_json: Json = False,
) -> None:
    """Uploads a folder. The token is that of `hf auth login`, or HF_TOKEN."""
    commit = cast(CommitInfo, push_to_hub(folder, repo, private=private))
    typer.echo(json.dumps({"commit": commit.oid, "url": commit.commit_url}) if as_json else commit.commit_url)


def main() -> None:
    """Runs the command. What a user can mend is said in a line, with exit code 2."""
    try:
        app()
    except (ValueError, OSError, HfHubHTTPError) as error:
        typer.echo(f"hf-prune: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
