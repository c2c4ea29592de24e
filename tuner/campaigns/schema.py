"""The keys of a campaign file, with their types, limits and defaults."""

from __future__ import annotations

from datetime import UTC, date, datetime, time
from typing import Annotated, Any, Literal, Self
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from search_spaces.errors import InvalidValueError
from tuner.study_schema import (
    Count,
    KeyProblemError,
    Positive,
    Seconds,
    Section,
    Share,
    StorageUrl,
    StudyName,
)

DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
EVENTS = ("best", "drift", "failure", "budget", "end")
"""What webhooks are told of."""
Layer = dict[str, Any]  # raw keys of a study file, checked when they are put over the common part


def _as_list(value: object) -> object:
    return value if isinstance(value, list | type(None)) else [value]


def _as_moment(value: object) -> object:
    """A moment with its zone, as ISO 8601 text in UTC."""
    if isinstance(value, date) and not isinstance(value, datetime):
        value = datetime.combine(value, time())
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError as error:
            raise InvalidValueError(f"{value!r} is no moment; write such as 2027-01-31T06:00:00Z") from error
    if not isinstance(value, datetime):
        return value
    if value.tzinfo is None:
        raise InvalidValueError(f"{value.isoformat()} has no zone; write such as {value.isoformat()}Z for UTC")
    return value.astimezone(UTC).isoformat()


def _as_clock(value: object) -> object:
    """YAML 1.1 reads 20:30 as a number in base 60."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1440:
        return f"{value // 60:02d}:{value % 60:02d}"
    return value


def _clock(text: str) -> str:
    hour, colon, minute = text.partition(":")
    if not (colon and hour.isdigit() and minute.isdigit() and int(hour) < 24 and int(minute) < 60):
        raise InvalidValueError(f"{text!r} is no time of day; write such as '20:30'")
    return f"{int(hour):02d}:{int(minute):02d}"


def _zone(name: str) -> str:
    try:
        ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise InvalidValueError(f"{name!r} is no time zone; write such as UTC or Europe/Berlin") from error
    return name


Moment = Annotated[str, BeforeValidator(_as_moment)]
Clock = Annotated[str, BeforeValidator(_as_clock), AfterValidator(_clock)]
Zone = Annotated[str, AfterValidator(_zone)]
DayName = Literal["mon", "tue", "wed", "thu", "fri", "sat", "sun"]
EventName = Literal["best", "drift", "failure", "budget", "end"]
Names = Annotated[list[str], BeforeValidator(_as_list), Field(min_length=1)]


class PrioritySection(Section):
    """How much the studies of some cells count; of several entries that hold, the last one does."""

    cells: dict[str, Names] = Field(description="choices of the matrix, by dimension", examples=["{model: llama}"])
    priority: Positive = Field(description="factor on the expected gain; 1 is ordinary", examples=[2])


class CampaignBudget(Section):
    """What all studies may take together, whichever ends first."""

    device_hours: Positive | None = Field(
        default=None, description="GPU-hours (core-hours on CPU nodes) of all trials", examples=[200]
    )
    cost: Positive | None = Field(default=None, description="dollars that all trials may cost", examples=[1500])
    deadline: Moment | None = Field(
        default=None, description="when the last trial has ended", examples=["2027-01-31T06:00:00Z"]
    )

    @model_validator(mode="after")
    def _has_an_end(self) -> Self:
        if self.device_hours is None and self.cost is None and self.deadline is None:
            raise KeyProblemError("device_hours", "missing, and so are cost and deadline; give at least one of them")
        return self


class DailySection(Section):
    """What may be spent on one day; the rest waits for the next."""

    device_hours: Positive | None = Field(default=None, description="device-hours of a day", examples=[24])
    cost: Positive | None = Field(default=None, description="dollars of a day", examples=[200])
    zone: Zone = Field(default="UTC", description="time zone in which days begin", examples=["Europe/Berlin"])


class WindowSection(Section):
    """A time of the week in which nothing is measured; one that ends before it begins goes over midnight."""

    days: Annotated[list[DayName], BeforeValidator(_as_list), Field(min_length=1)] = Field(
        default_factory=lambda: list(DAYS),  # type: ignore[arg-type]  # the same words
        description="days on which it begins",
        examples=["[mon, tue]"],
    )
    begin: Clock = Field(description="time of day", examples=["'08:00'"])
    end: Clock = Field(description="time of day", examples=["'20:00'"])
    zone: Zone = Field(default="UTC", description="time zone", examples=["Europe/Berlin"])

    @model_validator(mode="after")
    def _has_a_length(self) -> Self:
        if self.begin == self.end:
            raise KeyProblemError("end", f"{self.end} is begin too; give another time")
        return self


class SlicesSection(Section):
    """In which portions the budget is given out."""

    trials: Count = Field(
        default=4, description="candidates that a study measures before others are asked", examples=[4]
    )
    first: Count | None = Field(
        default=None, description="candidates of each study's first slice; as many as trials by default", examples=[3]
    )
    side_by_side: Count | Literal["auto"] = Field(
        default="auto",
        description="studies at once on a joined cluster; auto: as many as have node pools of their own",
        examples=[2],
    )


class CloseSection(Section):
    """When a study has nothing left to gain, unless its own budget says so."""

    min_gain: Share = Field(
        default=0.005, description="expected growth of the hypervolume that is not worth a trial", examples=["0.5%"]
    )
    patience: Count = Field(default=4, description="proposals in a row that must be below min_gain", examples=[4])
    failed_slices: Count = Field(
        default=3, description="slices in a row without a measurement, after which a study is given up", examples=[3]
    )


class WatchSection(Section):
    """What is measured again when the ground has moved."""

    environment: bool = Field(
        default=True,
        description="measure the best configuration again when an engine, a driver or a node has changed",
        examples=["true"],
    )
    every: Seconds | None = Field(
        default=None, description="measure the best configuration of each study again so often", examples=["7d"]
    )
    quarantine: bool = Field(
        default=True, description="avoid nodes whose control measurements differ from the others'", examples=["true"]
    )
    quarantine_for: Seconds = Field(default=7 * 86400.0, description="how long such a node is avoided", examples=["7d"])


class WebhookSection(Section):
    """Who is told. The URL is a secret: it stands in the environment or in a file, never here."""

    url_env: str | None = Field(
        default=None, description="name of the environment variable that holds the URL", examples=["TUNER_WEBHOOK"]
    )
    url_file: str | None = Field(
        default=None, description="path of a file that holds the URL", examples=["/run/secrets/webhook"]
    )
    format: Literal["json", "slack"] = Field(default="json", description="form of what is sent", examples=["slack"])
    events: Annotated[list[EventName], Field(min_length=1)] = Field(
        default_factory=lambda: list(EVENTS),  # type: ignore[arg-type]  # the same words
        description="what is told",
        examples=["[best, end]"],
    )

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.url_env is None) == (self.url_file is None):
            raise KeyProblemError("url_env", "give url_env or url_file: one of the two says where the URL stands")
        return self


class Rules(Section):
    """What may change while a campaign goes on: everything but its studies."""

    name: StudyName = Field(description="name of the campaign in its storage", examples=["autumn"])
    priorities: list[PrioritySection] = Field(
        default_factory=list, description="which studies count more", examples=["[{cells: {model: a}, priority: 2}]"]
    )
    budget: CampaignBudget = Field(description="what all studies may take together", examples=["{device_hours: 200}"])
    per_day: DailySection = Field(
        default_factory=DailySection, description="what a day may cost", examples=["{cost: 200}"]
    )
    pauses: list[WindowSection] = Field(
        default_factory=list,
        description="when nothing is measured",
        examples=["[{begin: '08:00', end: '20:00'}]"],
    )
    slices: SlicesSection = Field(
        default_factory=SlicesSection, description="portions of the budget", examples=["{trials: 4}"]
    )
    close: CloseSection = Field(
        default_factory=CloseSection, description="when a study is done", examples=["{min_gain: 0.5%}"]
    )
    watch: WatchSection = Field(
        default_factory=WatchSection, description="what is measured again", examples=["{every: 7d}"]
    )
    notify: list[WebhookSection] = Field(
        default_factory=list, description="webhooks", examples=["[{url_env: TUNER_WEBHOOK, format: slack}]"]
    )


class CampaignFile(Rules):
    """A whole campaign file."""

    study: str | None = Field(
        default=None, description="path of the common study file, relative to this one", examples=["study.yaml"]
    )
    common: Layer | None = Field(
        default=None, description="the common study file itself, in place of its path", examples=["{objectives: ...}"]
    )
    matrix: dict[str, dict[str, Layer | None]] = Field(
        min_length=1,
        description="dimensions; each choice says what differs from the common study file",
        examples=["{model: {llama: {profiles: llama_70b}}}"],
    )
    leave_out: list[dict[str, Names]] = Field(
        default_factory=list, description="combinations that make no study", examples=["[{model: llama, pool: a100}]"]
    )
    storage: StorageUrl | None = Field(
        default=None, description="any Optuna storage URL", examples=["postgresql://host/tuner"]
    )

    @model_validator(mode="after")
    def _one_common_part(self) -> Self:
        if (self.study is None) == (self.common is None):
            raise KeyProblemError("study", "give study or common: the path of the common study file, or its keys")
        return self

    @model_validator(mode="after")
    def _watching_has_an_end(self) -> Self:
        if self.watch.every is not None and self.budget.deadline is None:
            raise KeyProblemError("watch.every", "keeps the campaign going until a deadline; give budget.deadline")
        return self

    @model_validator(mode="after")
    def _choices_known(self) -> Self:
        for dimension, choices in self.matrix.items():
            if not choices:
                raise KeyProblemError(f"matrix.{dimension}", "has no choice; give at least one, or leave it out")
        for place, chosen in (
            *((f"leave_out.{n}", cells) for n, cells in enumerate(self.leave_out)),
            *((f"priorities.{n}.cells", entry.cells) for n, entry in enumerate(self.priorities)),
        ):
            self._check_choices(place, chosen)
        return self

    def _check_choices(self, place: str, chosen: dict[str, list[str]]) -> None:
        for dimension, names in chosen.items():
            if dimension not in self.matrix:
                raise KeyProblemError(f"{place}.{dimension}", f"is no dimension; choose {', '.join(self.matrix)}")
            for name in names:
                if name not in self.matrix[dimension]:
                    known = ", ".join(self.matrix[dimension])
                    raise KeyProblemError(f"{place}.{dimension}", f"{name!r} is no choice of it; choose {known}")
