"""The command ``hf-transfer``: run a recipe, run its teacher, describe a method, show the environment."""

from __future__ import annotations

import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from hf_transfer.errors import ConfigurationError, nearest
from hf_transfer.report import is_main_process

app = typer.Typer(
    help="Transfer learning for transformers, from one YAML file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="The recipe's YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Changes to it, such as training.seed=1.")
    ] = None,
    output: Annotated[str | None, typer.Option(help="The run folder, instead of training.output_dir.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete an earlier run in that folder.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in that folder.")] = False,
) -> None:
    """Train what a recipe says, score it, and write its run folder.

    For several processes: accelerate launch -m hf_transfer run RECIPE ...
    """
    with _one_message():
        from hf_transfer.recipe import Recipe

        changes = list(overrides or [])
        if output is not None:
            changes.append(f"training.output_dir={json.dumps(output)}")
        Recipe.load(recipe, changes).run(overwrite=overwrite, resume=resume)


@app.command()
def teach(
    recipe: Annotated[str, typer.Argument(help="A distillation recipe with a 'store' section.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY.PATH=VALUE", help="Changes to it.")] = None,
) -> None:
    """Run a recipe's teacher once over the training data and store its predictions, for runs without the teacher.

    A run that was stopped goes on where it was.
    """
    with _one_message():
        from hf_transfer.distill import DistillationRecipe

        loaded = DistillationRecipe.load(recipe, list(overrides or []))
        store = loaded.teach()
        typer.echo(f"{len(store):,} examples, {store.row_count:,} predictions, in {store.directory}")


@app.command("describe")
def describe_method(
    method: Annotated[
        str | None,
        typer.Argument(
            help="A recipe, an objective, 'training', or a PEFT method as 'adapter.lora'; all if left out."
        ),
    ] = None,
) -> None:
    """List the methods, or the options of one: types, defaults and papers."""
    with _one_message():
        if method is None:
            _print_table(("method", "what it does"), _methods())
            return
        from hf_transfer.schema import describe, prose

        cls = _find(method)
        options = [(option.name, option.type, option.default or "required", option.doc) for option in describe(cls)]
        typer.echo(f"{prose(cls)}\n")
        _print_table(("option", "type", "default", "meaning"), options)


@app.command()
def env() -> None:
    """Show what a bug report needs: versions, platform, devices."""
    from hf_transfer.environment import environment

    for name, value in environment().items():
        typer.echo(f"{name}: {value}")


def main() -> None:
    """Run the command; processes beside the main one print nothing but errors."""
    if not is_main_process():
        _silence()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of optional kernels whenever PEFT is imported
    app(prog_name="hf-transfer")


@contextmanager
def _one_message() -> Iterator[None]:
    """Turn a refusal into its message and exit code 2, said once per machine."""
    try:
        yield
    except ConfigurationError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from None


def _methods() -> list[tuple[str, str]]:
    """Everything that can be described, with the first line of what its class says."""
    from hf_transfer.objectives import OBJECTIVES
    from hf_transfer.recipe import RECIPES, recipe_class

    classes = {name: recipe_class(name) for name in RECIPES} | dict(OBJECTIVES)
    named = [(name, (cls.__doc__ or "").strip().partition("\n")[0]) for name, cls in classes.items()]
    return [
        *named,
        ("training", "Options of transformers.TrainingArguments."),
        ("adapter.NAME", "Options of a PEFT method, such as adapter.lora."),
    ]


def _find(method: str) -> type:
    from hf_transfer.objectives import OBJECTIVES
    from hf_transfer.recipe import RECIPES, adapter_class, recipe_class

    if method in RECIPES:
        return recipe_class(method)
    if method in OBJECTIVES:
        return OBJECTIVES[method]
    if method == "training":
        from transformers import TrainingArguments

        return TrainingArguments
    kind, _, name = method.partition(".")
    if kind == "adapter":
        return adapter_class(name)
    raise ConfigurationError(f"'{method}' is no method. {nearest(method, [*RECIPES, *OBJECTIVES, 'training'])}")


def _print_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*header, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def _silence() -> None:
    os.environ.update(
        TRANSFORMERS_VERBOSITY="error", DATASETS_VERBOSITY="error", TORCH_CPP_LOG_LEVEL="ERROR", TQDM_DISABLE="1"
    )
    warnings.simplefilter("ignore")
    sys.stdout = open(os.devnull, "w")
