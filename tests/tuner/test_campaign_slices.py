"""Slices in processes of their own: what one is told, and what is told of one that could not begin."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from studies.history import StudyHistory
from studies.records import Origin
from studies.storage import open_storage
from tests.support.commands import connector
from tests.support.memory_runner import Silence
from tests.tuner.test_campaign_policy import campaign
from tuner.campaigns import slice_process
from tuner.campaigns.slices import Order, SlicesApart, _order_text
from tuner.places import STORAGE_VARIABLE, Place
from tuner.session import Again


def order(trials: int, again: Again | None = None) -> Order:
    study = campaign().cells[0].study
    portion = study.budget.model_copy(update={"trials": trials, "device_hours": 5.0})
    return Order(study=study, portion=portion, again=again, avoid=("bad-host",))


def test_a_process_carries_out_its_order_and_measures_once_more_what_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    avoided: list[object] = []

    def watched(address: str | None, study: object, avoid: object = ()) -> object:
        avoided.append((address, avoid))
        return connector(address, study)

    monkeypatch.setattr(slice_process, "connector", watched)
    monkeypatch.setenv(STORAGE_VARIABLE, f"sqlite:///{tmp_path}/studies.db")
    path = tmp_path / "order.json"
    for each in (order(2), order(2, Again(trial=0, runs=2))):
        path.write_text(_order_text(each))
        assert slice_process.main(path, "10.0.0.1:6379") == 0
    history = StudyHistory(open_storage(f"sqlite:///{tmp_path}/studies.db"), "many.few")
    assert [trial.origin for trial in history.trials()] == [Origin.DEFAULT, Origin.SCREENED, Origin.CONTROL]
    assert history.trials()[2].repeat_of == 0
    assert avoided == [("10.0.0.1:6379", ("bad-host",))] * 2
    assert "trial 2 measured" in capsys.readouterr().out


@pytest.mark.long
def test_a_slice_that_cannot_reach_the_cluster_is_told_with_its_last_words(tmp_path: Path) -> None:
    place = Place(url=f"sqlite:///{tmp_path}/studies.db", directory=tmp_path)
    slices, observer = SlicesApart(address="127.0.0.1:1", place=place, folder=tmp_path / "work", at_once=2), Silence()
    slices.start(order(2), observer)
    deadline = time.monotonic() + 240
    while not (ended := slices.ended()):
        assert time.monotonic() < deadline, observer.notes
        time.sleep(0.2)
    assert list(ended) == ["many.few"]
    assert str(ended["many.few"]).startswith("exit code 2: ")
    assert "127.0.0.1:1" in str(ended["many.few"])
    slices.close()
