"""Several ways to do the same thing, over several seeds, in one table and one honest sentence."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, ClassVar

from hf_transfer.environment import versions
from hf_transfer.errors import ConfigurationError
from hf_transfer.recipe import Recipe, RunResult, Split, TrainingRecipe
from hf_transfer.report import RunFolder, is_main_process
from hf_transfer.schema import merge, plain

if TYPE_CHECKING:
    from hf_transfer.data.prepared import PreparedData

_MAY_GROW = ("arms", "seeds")


@dataclass(kw_only=True)
class CompareRecipe(Recipe):
    """The same model and data trained in several ways, each with several seeds.

    Every run has a folder of its own and is not repeated once it is finished, so a comparison that was interrupted, or
    that has gained arms or seeds, is continued with ``--resume``. A seed decides the new head, the order of the
    examples and which examples are drawn (``data.seed``), and is the same for all arms.

    Args:
        arms: Overrides by name of the arm, ``recipe`` among them. An arm's ``search`` lists values by dotted option;
            the combination that scores best on validation data with the first seed is taken for all seeds.
        model: As in the recipe of an arm; common to all arms.
        data: The same.
        training: The same; ``output_dir`` is the folder of the comparison.
        seeds: One run each.
        keep_models: Save the model of every run in its folder, not only the figures.
    """

    name: ClassVar[str] = "compare"

    arms: dict[str, dict[str, Any]]
    model: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any]
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    keep_models: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.training.get("output_dir"):
            raise ConfigurationError("training.output_dir is missing: expected the folder to compare in (--output).")
        for option, values in (("arms", list(self.arms)), ("seeds", self.seeds)):
            folders = set(map(_folder_name, values))
            if not values or len(folders) < len(values) or "" in folders:
                raise ConfigurationError(f"{option} = {values}: expected at least one, and all different.")
        self._check_arms()

    def recipe(self, arm: str, *, seed: int) -> TrainingRecipe:
        """The recipe of one run: what is common, what the arm overrides, the seed, and a folder of its own."""
        return self._recipe(arm, seed, {}, Path(f"seed-{seed}"))

    def run(self, *, overwrite: bool = False, resume: bool = False) -> RunResult:
        """Run what is not finished yet, print the table, write ``results.json`` and ``results.md``."""
        folder = RunFolder(Path(self.training["output_dir"]))
        if is_main_process():
            folder.check(self.values(), overwrite=overwrite, resume=resume, may_grow=_MAY_GROW)
        split = _split_to_compare_on([self.recipe(arm, seed=self.seeds[0]).check() for arm in self.arms])
        if is_main_process():
            facts = {"seeds": self.seeds, "versions": versions()}
            folder.claim(self.values(), overwrite=overwrite, resume=resume, may_grow=_MAY_GROW, **facts)
        chosen = {arm: self._search(arm) for arm in self.arms}
        runs = {
            arm: [self._run(arm, seed, chosen[arm], split, Path(f"seed-{seed}")) for seed in self.seeds]
            for arm in self.arms
        }
        metric = runs[next(iter(runs))][0]["metric"]
        comparison = Comparison(
            metric=metric["name"],
            greater_is_better=metric["greater_is_better"],
            split=split,
            seeds=self.seeds,
            arms=[
                ArmResult(
                    name=arm,
                    scores=[run[split][metric["name"]] for run in runs[arm]],
                    trainable_parameters=runs[arm][0]["trainable_parameters"],
                    seconds=mean(run["seconds"] for run in runs[arm]),
                    chosen=chosen[arm],
                )
                for arm in self.arms
            ],
        )
        results = {**plain(comparison), "verdict": comparison.verdict()}
        if is_main_process():
            folder.write("results.json", results)
            folder.write("results.md", f"{comparison.table()}\n\n{comparison.verdict()}\n")
            folder.finish()
            print(f"\n{comparison.table()}\n\n{comparison.verdict()}\n{folder.path}/results.md")
        return RunResult(folder.path, results)

    def _check_arms(self) -> None:
        """Refuse all that is wrong with any arm at once; what is wrong with all of them is said once."""
        found: dict[str, list[str]] = {}
        for arm, overrides in self.arms.items():
            try:
                for changes in _combinations(overrides):
                    recipe = self._recipe(arm, self.seeds[0], changes, Path())
                    if changes and recipe.data.validation == 0:
                        raise ConfigurationError("search needs validation data to choose on, but data.validation = 0.")
            except ConfigurationError as error:
                for line in str(error).splitlines():
                    found.setdefault(line, []).append(arm)
        if found:
            lines = [
                line if len(arms) == len(self.arms) else f"arms.{arm}: {line}"
                for line, arms in found.items()
                for arm in arms[: 1 if len(arms) == len(self.arms) else None]
            ]
            raise ConfigurationError("\n".join(lines))

    def _recipe(self, arm: str, seed: int, changes: Mapping[str, Any], place: Path) -> TrainingRecipe:
        overrides = {key: value for key, value in self.arms[arm].items() if key != "search"}
        values = {"model": self.model, "data": {"seed": seed, **self.data}, "training": self.training}
        folder = Path(self.training["output_dir"], _folder_name(arm), place)
        run = {"training": {"seed": seed, "output_dir": str(folder), "disable_tqdm": True}}
        return TrainingRecipe.from_values(merge(merge(merge(values, overrides), changes), run))

    def _search(self, arm: str) -> dict[str, Any]:
        """The combination that scores best on validation data with the first seed."""
        combinations = _combinations(self.arms[arm])
        if len(combinations) == 1:
            return combinations[0]
        scores = []
        for changes in combinations:
            place = Path("search", _folder_name(_listed(changes)))
            metrics = self._run(arm, self.seeds[0], changes, "validation", place)
            scores.append(metrics["validation"][metrics["metric"]["name"]])
        best = max if metrics["metric"]["greater_is_better"] else min
        return combinations[scores.index(best(scores))]

    def _run(self, arm: str, seed: int, changes: Mapping[str, Any], split: Split, place: Path) -> dict[str, Any]:
        """The metrics of one run, which is read where it is finished."""
        recipe = self._recipe(arm, seed, changes, place)
        folder = Path(recipe.training["output_dir"])
        with _output_to(folder.with_name(f"{folder.name}.log")):
            metrics = recipe.run(resume=True, score=[split], save=self.keep_models).metrics
        if is_main_process():
            name, tried = metrics["metric"]["name"], f", {_listed(changes)}" if changes else ""
            score, seconds = metrics[split][name], metrics["seconds"]
            print(f"{arm}, seed {seed}{tried}: {split} {_words(name)} {score:.3f} after {seconds:.1f} s", flush=True)
        return metrics


@dataclass(frozen=True)
class ArmResult:
    """What one arm reached.

    Args:
        name: The arm's.
        scores: One per seed.
        trainable_parameters: How many trained.
        seconds: Of training, the mean over the seeds.
        chosen: What its search chose, by option.
    """

    name: str
    scores: list[float]
    trainable_parameters: int
    seconds: float
    chosen: dict[str, Any]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return mean(self.scores)

    @property
    def spread(self) -> float:
        """Sample standard deviation over the seeds; a single one shows none."""
        return stdev(self.scores) if len(self.scores) > 1 else 0.0

    def __str__(self) -> str:
        return f"{self.mean:.3f}" + (f" ± {self.spread:.3f}" if len(self.scores) > 1 else "")


@dataclass(frozen=True)
class Comparison:
    """What several arms reached, and what that says.

    Args:
        metric: The task's main metric.
        greater_is_better: Whether it grows with quality.
        split: Where it was measured: test where there is a test split, else validation.
        seeds: The runs of each arm.
        arms: Their results.
    """

    metric: str
    greater_is_better: bool
    split: Split
    seeds: list[int]
    arms: list[ArmResult]

    @property
    def ranked(self) -> list[ArmResult]:
        """The arms, best mean first."""
        return sorted(self.arms, key=lambda arm: arm.mean, reverse=self.greater_is_better)

    def table(self) -> str:
        """The arms as Markdown, best first, and what the columns mean."""
        rows = [f"| {arm.name} | {arm} | {arm.trainable_parameters:,} | {arm.seconds:.1f} |" for arm in self.ranked]
        searched = [
            f"Chosen for {arm.name} on validation data with seed {self.seeds[0]}: {_listed(arm.chosen)}."
            for arm in self.arms
            if arm.chosen
        ]
        spread = "mean ± standard deviation over seeds" if len(self.seeds) > 1 else "seed"
        seeds = ", ".join(map(str, self.seeds))
        return "\n".join(
            [
                f"| | {self.split} {_words(self.metric)} | trainable parameters | seconds |",
                "|---|---:|---:|---:|",
                *rows,
                "",
                f"{self.split.capitalize()} {_words(self.metric)}: {spread} {seeds}. Seconds: training of one run.",
                *searched,
            ]
        )

    def verdict(self) -> str:
        """Which arm wins, whether by more than the spread of the seeds, and which loses."""
        best, *others = self.ranked
        found = f"{best.name} has the best {self.split} {_words(self.metric)}, {best}."
        if others:
            second, spread = others[0], max(best.spread, others[0].spread)
            ahead = abs(best.mean - second.mean)
            if len(self.seeds) == 1:
                judged = "one seed shows no spread, so the order may be chance"
            elif ahead > spread:
                judged = f"more than the spread of the seeds ({spread:.3f})"
            else:
                judged = f"within the spread of the seeds ({spread:.3f}), so these runs do not tell the two apart"
            found += f" It is {ahead:.3f} better than {second.name} ({second}): {judged}."
        if len(others) > 1:
            found += f" {others[-1].name} comes last with {others[-1]}."
        return found


def _combinations(overrides: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every combination of the values in an arm's ``search``; one empty combination without."""
    choices = _by_path(overrides.get("search", {}), "search")
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def _by_path(search: Any, where: str) -> dict[str, list[Any]]:
    """The lists of values by dotted option, whether options are dotted or nested."""
    if isinstance(search, list) and search:
        return {where.removeprefix("search."): search}
    if not isinstance(search, Mapping):
        raise ConfigurationError(f"{where} = {search!r}: expected a list of values for each option to search.")
    return {
        path: values for name, inner in search.items() for path, values in _by_path(inner, f"{where}.{name}").items()
    }


def _split_to_compare_on(prepared: Sequence[PreparedData]) -> Split:
    """Test data where all arms have them, else validation data."""
    if all(data.test is not None for data in prepared):
        return "test"
    if all(data.validation is not None for data in prepared):
        return "validation"
    raise ConfigurationError("data: there are neither test nor validation data to compare on.")


def _listed(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{option}={value}" for option, value in options.items())


def _folder_name(name: object) -> str:
    return re.sub(r"[^\w.=,-]+", "-", str(name)).strip("-").lower()


def _words(metric: str) -> str:
    return metric.replace("_", " ")


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send what a run prints into a file beside its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file, redirect_stdout(file), redirect_stderr(file):
        yield
