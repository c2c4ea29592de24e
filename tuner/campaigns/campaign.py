"""A campaign: studies that share a budget, made of a matrix of choices over a common study file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import yaml
from pydantic import ValidationError

from search_spaces.errors import TunerError
from tuner.campaigns.schema import CampaignFile, Layer, Rules
from tuner.experiments import EXPERIMENTS, merged
from tuner.layers_file import LayerError
from tuner.study_errors import StudyFileError, describe
from tuner.study_file import differences, dump_study, overridden, parse_study, raw_tree, study_of_tree
from tuner.study_schema import StudyFile


class CampaignFileError(TunerError):
    """A campaign file cannot be used; the text lists every problem found."""


class CampaignChangedError(TunerError):
    """A campaign was begun with other studies than its file now says; the text holds the difference."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One combination of choices, and the study that it asks; `name` is that of the study."""

    name: str
    choices: Mapping[str, str]
    study: StudyFile


@dataclass(frozen=True, kw_only=True)
class StoredCell:
    """A cell as a storage keeps it: its study file is resolved, so that no other file is needed."""

    name: str
    choices: Mapping[str, str]
    study: str


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """Cells in the order of the matrix, and the rules that hold for all of them."""

    rules: Rules
    cells: tuple[Cell, ...]

    @property
    def name(self) -> str:
        """Name in the storage."""
        return self.rules.name

    def priority(self, cell: Cell) -> float:
        """How much the gain of `cell` counts; 1 where nothing is said of it."""
        fitting = [entry.priority for entry in self.rules.priorities if fits(entry.cells, cell.choices)]
        return fitting[-1] if fitting else 1.0

    def cell(self, name: str) -> Cell:
        """The cell called `name`."""
        return next(cell for cell in self.cells if cell.name == name)


def fits(wanted: Mapping[str, Sequence[str]], choices: Mapping[str, str]) -> bool:
    """True where every dimension of `wanted` has one of its choices."""
    return all(choices[dimension] in names for dimension, names in wanted.items())


def load_campaign(path: Path, overrides: Sequence[str] = ()) -> tuple[Campaign, str | None]:
    """The campaign of the file at `path`, and the storage that it names.

    `overrides` (`key=value`) apply to the rules. Raises `CampaignFileError`, or `StudyFileError` for a cell that is no
    study.
    """
    file = _checked(_with(raw_tree(path), overrides), str(path))
    rules = Rules.model_validate(file.model_dump(include=set(Rules.model_fields)))
    directory = path.resolve().parent
    return Campaign(rules=rules, cells=tuple(_cells(file, directory, str(path)))), file.storage


def _with(tree: dict[str, object], overrides: Sequence[str]) -> dict[str, object]:
    try:
        return overridden(tree, overrides)
    except StudyFileError as error:
        raise CampaignFileError(str(error)) from error


def _checked(tree: Mapping[str, object], name: str) -> CampaignFile:
    try:
        return CampaignFile.model_validate(tree)
    except ValidationError as error:
        problems = describe(error, {}, schema=CampaignFile)
        listed = "\n".join(f"  {problem}" for problem in problems)
        raise CampaignFileError(f"{name}: {len(problems)} problem(s)\n{listed}") from error


def _cells(file: CampaignFile, directory: Path, name: str) -> Iterator[Cell]:
    tree, home = _common(file, directory)
    if EXPERIMENTS in tree:
        raise CampaignFileError(f"{name}: the common study file has experiments; make them a dimension of the matrix")
    found = 0
    for names in product(*file.matrix.values()):
        choices = dict(zip(file.matrix, names, strict=True))
        if not any(fits(wanted, choices) for wanted in file.leave_out):
            found += 1
            layers = [file.matrix[dimension][choice] or {} for dimension, choice in choices.items()]
            yield _cell(file.name, choices, [tree, *layers], home)
    if not found:
        raise CampaignFileError(f"{name}: leave_out leaves no study; leave fewer combinations out")


def _common(file: CampaignFile, directory: Path) -> tuple[Layer, Path]:
    """The raw common study file, and the folder where its paths start."""
    if file.study is None:
        return dict(file.common or {}), directory
    path = (directory / Path(file.study).expanduser()).resolve()
    return raw_tree(path), path.parent


def _cell(campaign: str, choices: Mapping[str, str], layers: Sequence[Layer], home: Path) -> Cell:
    name = ".".join((campaign, *choices.values()))
    tree: dict[str, object] = {key: value for key, value in layers[0].items() if key not in ("name", "storage")}
    try:
        for (dimension, choice), layer in zip(choices.items(), layers[1:], strict=True):
            tree = merged(tree, layer, f"{dimension} {choice}")
    except LayerError as error:
        raise CampaignFileError(f"cell {name}: {error}") from error
    study = study_of_tree({**tree, "name": name}, home, name=f"cell {name}")
    return Cell(name=name, choices=choices, study=study)


def stored_cells(campaign: Campaign) -> tuple[StoredCell, ...]:
    """The cells of `campaign` as a storage keeps them."""
    return tuple(StoredCell(name=c.name, choices=c.choices, study=dump_study(c.study)) for c in campaign.cells)


def dump_rules(rules: Rules) -> str:
    """Canonical YAML of the rules."""
    return yaml.safe_dump(rules.model_dump(mode="json", exclude_none=True), sort_keys=True, allow_unicode=True)


def from_stored(rules: str, cells: Sequence[StoredCell], url: str) -> Campaign:
    """The campaign that a storage at `url` keeps; raises `CampaignFileError` where another version wrote it."""
    try:
        parsed = Rules.model_validate(yaml.safe_load(rules))
    except ValidationError as error:
        problems = "; ".join(describe(error, {}, schema=Rules))
        raise CampaignFileError(f"the stored campaign is not of this version: {problems}") from error
    return Campaign(
        rules=parsed,
        cells=tuple(
            Cell(
                name=cell.name,
                choices=cell.choices,
                study=parse_study(cell.study, name=f"stored study file of {cell.name}").model_copy(
                    update={"storage": url}
                ),
            )
            for cell in cells
        ),
    )


def check_same_cells(stored: Sequence[StoredCell], campaign: Campaign) -> None:
    """Raise `CampaignChangedError` where `campaign` has not the `stored` cells; new ones may come."""
    now = {cell.name: cell for cell in stored_cells(campaign)}
    changed: list[str] = []
    for cell in stored:
        if cell.name not in now:
            changed.append(f"  {cell.name} is not there any more")
        else:
            changed += [f"  {cell.name}: {line}" for line in differences(cell.study, now[cell.name].study)]
    if changed:
        raise CampaignChangedError(
            "\n".join(
                [
                    f"campaign {campaign.name!r} was begun with other studies; the differences (stored -> given):",
                    *changed,
                    "budget, priorities, pauses and the other rules may change, and studies may be added; to change",
                    f"studies, choose another name, or go on as it was with: tuner campaign resume {campaign.name}",
                ]
            )
        )
