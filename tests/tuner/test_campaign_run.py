"""Campaigns by their commands, with a real storage, on trials that are measured in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tuner
from studies.campaign_store import CampaignStore, campaign_study, create_campaign
from studies.history import StudyHistory
from studies.lease import take_lease
from studies.storage import open_storage
from tests.support.commands import Invoke, commands_in, stored_rows
from tests.tuner.test_campaign_webhooks import MESSAGE, serving
from tuner.campaigns import start
from tuner.campaigns.record import Record
from tuner.campaigns.schema import WebhookSection
from tuner.campaigns.webhooks import Post

URL = "sqlite:///tuner-data/studies.db"
CAMPAIGN = """
name: many
common:
  workload: {isl: 64, osl: 16, concurrency: [1, 2, 4]}
  objectives: [output_tokens_per_s, ttft_p50_ms]
  node_pools: {local: {cpus_per_node: 4, price_per_hour: 1.0}}
  engines: {llamacpp: {threads: [1, 2], max_num_seqs: [1, 4], batch_size: 512, ubatch_size: 512, flash_attention: true,
    kv_cache_dtype: f16}}
  space: {modes: [aggregated]}
  budget: {trials: 4, confirm: 1, control_every: 0}
matrix:
  users:
    few: {workload: {concurrency: [1, 2]}}
    many: {workload: {concurrency: [2, 4]}}
budget: {device_hours: 100}
slices: {trials: 2}
"""


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Invoke:
    (tmp_path / "campaign.yaml").write_text(CAMPAIGN)
    return commands_in(tmp_path, monkeypatch, capsys)


def status(invoke: Invoke, name: str = "many") -> Any:
    done = invoke("campaign", "status", name, "--json")
    assert done.code == 0, done.err
    return json.loads(done.out)


def measured_keys(*studies: str) -> list[str]:
    storage = open_storage(URL)
    trials = [trial for study in studies for trial in StudyHistory(storage, study).trials()]
    return [f"{trial.key}" for trial in trials if trial.is_finished]


def test_it_ends_by_itself_when_every_study_is_closed_and_says_so(invoke: Invoke) -> None:
    done = invoke("campaign", "run", "campaign.yaml")
    assert done.code == 0, done.err
    assert "The campaign is over: nothing is left to gain: every study is closed." in done.err
    found = status(invoke)
    assert [study["study"] for study in found["studies"]] == ["many.few", "many.many"]
    assert found["state"] == "over"
    assert all(study["closed"] == "the budget of trials is used" for study in found["studies"])
    assert [study["measured"] for study in found["studies"]] == [4, 4]
    assert found["slices"] == 4, "two slices of two trials each"
    assert found["spent"]["trials"] == 8
    rows = stored_rows()
    again = invoke("campaign", "run", "campaign.yaml")
    assert again.code == 0
    assert "over already" in again.err
    assert [row for row in stored_rows() if "trial_values" in row] == [row for row in rows if "trial_values" in row]
    assert "many: over, 2 studies, 2 closed" in invoke("campaign", "list").out
    assert "many.few" in invoke("campaign", "status", "many").out


@pytest.mark.long
def test_it_ends_at_its_budget_goes_on_with_a_raised_one_and_measures_nothing_twice(invoke: Invoke) -> None:
    first = invoke("campaign", "run", "campaign.yaml", "--set", "budget={device_hours: 0.03}", "--json")
    assert first.code == 0, first.err
    told = json.loads(first.out)
    assert told["over"] == "the budget is used"
    assert 0 < told["spent"]["trials"] < 8
    mean = told["spent"]["device_hours"] / told["spent"]["trials"]
    assert abs(told["spent"]["device_hours"] - 0.03) <= mean, "within a trial of the budget"
    more = invoke("campaign", "run", "campaign.yaml", "--json")
    assert json.loads(more.out)["over"].startswith("nothing is left to gain")
    keys = measured_keys("many.few", "many.many")
    assert len(keys) == 8
    assert len(set(keys[:4])) == len(set(keys[4:])) == 4


@pytest.mark.long
def test_other_studies_under_its_name_are_refused_and_more_are_welcome(invoke: Invoke, tmp_path: Path) -> None:
    invoke("campaign", "run", "campaign.yaml", "--set", "budget={device_hours: 0.001}")
    file = tmp_path / "campaign.yaml"
    file.write_text(CAMPAIGN.replace("osl: 16", "osl: 24"))
    refused = invoke("campaign", "run", "campaign.yaml")
    assert refused.code == 2
    assert "many.few: workload.osl.mean: 16 -> 24" in refused.err
    file.write_text(CAMPAIGN.replace("budget: {dev", "    one: {workload: {concurrency: 1}}\nbudget: {dev"))
    assert invoke("campaign", "run", "campaign.yaml", "--set", "budget={device_hours: 0.002}").code == 0
    assert [study["study"] for study in status(invoke)["studies"]][-1] == "many.one"


def test_of_two_runners_one_is_refused_and_a_paused_campaign_waits(invoke: Invoke) -> None:
    invoke("campaign", "run", "campaign.yaml", "--set", "budget={device_hours: 0.001}")
    with take_lease(open_storage(URL), campaign_study("many")):
        refused = invoke("campaign", "run", "campaign.yaml")
        assert refused.code == 2
        assert "campaign 'many' is run already: process" in refused.err
        assert status(invoke)["runner"].startswith("process ")
    assert invoke("campaign", "pause", "many").code == 0
    assert status(invoke)["waits_for"].startswith("paused by ")
    assert invoke("campaign", "stop", "many").code == 2, "nobody runs it"
    assert "no campaign 'other'" in invoke("campaign", "pause", "other").err
    done = invoke("campaign", "resume", "many", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["waits_for"] is None


def test_a_detached_runner_reads_the_campaign_from_the_storage_and_gets_the_urls_of_webhooks(
    invoke: Invoke, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(start, "detach", lambda *args: given.append(args))
    monkeypatch.setenv("MY_HOOK", "https://example.org/secret")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    hooks = "notify: [{url_env: MY_HOOK}, {url_env: NOT_HERE}, {url_file: /run/hook}]"
    (tmp_path / "campaign.yaml").write_text(CAMPAIGN + hooks)
    refused = invoke("campaign", "run", "campaign.yaml", "--detach")
    assert (refused.code, "--detach needs a Ray cluster that goes on" in refused.err) == (2, True)
    done = invoke("campaign", "run", "campaign.yaml", "--detach", "--address", "10.0.0.1:6379")
    assert (done.code, "The variable NOT_HERE is not set here" in done.out, "MY_HOOK" in done.out) == (0, True, False)
    assert invoke("campaign", "run", "many", "--detach", "--address", "10.0.0.1:6379").code == 0
    for task, place, storage, address in given:
        assert (task.job.name, task.job.lease) == ("many", campaign_study("many"))
        assert task.arguments == ("campaign", "run", "many")
        assert task.environment == {"MY_HOOK": "https://example.org/secret"}
        assert "secret" not in repr(task)
        assert [[pool.name for pool in pools] for pools in task.node_pools] == [["local"], ["local"]]
        assert (place.url, storage.url, address) == (URL, URL, "10.0.0.1:6379")
    assert status(invoke)["state"] == "stopped"
    with take_lease(open_storage(URL), campaign_study("many")):
        assert invoke("campaign", "run", "many", "--detach", "--address", "10.0.0.1:6379").code == 2
    assert len(given) == 2


def test_it_is_run_by_its_name_too_and_one_that_is_over_sends_what_had_not_left(invoke: Invoke, tmp_path: Path) -> None:
    with serving(200) as server:
        (tmp_path / "hook").write_text(server.url)
        hook = WebhookSection(url_file=str(tmp_path / "hook"), events=["end"])
        (tmp_path / "campaign.yaml").write_text(f"{CAMPAIGN}notify: [{{url_file: {hook.url_file}, events: [end]}}]\n")
        assert invoke("campaign", "run", "campaign.yaml", "--set", "budget={device_hours: 0.001}").code == 0
        assert [body["event"] for body in server.bodies] == ["end"]
        record = Record(CampaignStore(open_storage(URL), "many"))
        record.note_outbox(tuple(Post([hook]).parcels(replace(MESSAGE, event="end"))))
        assert "is over already" in invoke("campaign", "run", "many").err
        assert [body["text"] for body in server.bodies[1:]] == [MESSAGE.text]
    assert record.memory().outbox == ()
    refused = invoke("campaign", "run", "many", "--set", "budget.cost=3")
    assert (refused.code, "'many' is none; give *.yaml" in refused.err) == (2, True)
    assert "has no campaign 'other'; it has: many" in invoke("campaign", "run", "other").err
    lines = invoke("campaign", "logs", "many").out.splitlines()
    assert any("slice 1, search in many.few" in line for line in lines)
    assert invoke("campaign", "logs", "many", "--tail", "1", "--follow").out.splitlines() == lines[-1:]


def test_a_campaign_that_is_only_being_made_is_in_nobody_s_way(invoke: Invoke, tmp_path: Path) -> None:
    (tmp_path / "tuner-data").mkdir()
    create_campaign(open_storage(URL), "many")
    assert invoke("campaign", "list").out == "no campaigns\n"
    asked = invoke("campaign", "status", "many")
    assert (asked.code, "run its file again" in asked.err) == (2, True)
    assert invoke("campaign", "run", "campaign.yaml", "--set", "budget={device_hours: 0.001}").code == 0
    assert invoke("campaign", "list").out.startswith("many: over")
    assert "'campaign.many' is no study but keeps a campaign" in invoke("study", "status", "campaign.many").err


@pytest.mark.long
def test_the_python_api_does_what_the_commands_do(invoke: Invoke, tmp_path: Path) -> None:
    begun = tuner.run_campaign("campaign.yaml", "budget={device_hours: 0.001}")
    assert begun.status().state.name == "OVER"
    assert tuner.list_campaigns() == ("many",)
    with pytest.raises(tuner.TunerError, match="no campaign 'other'; it has: many"):
        tuner.load_campaign("other")
    found = tuner.load_campaign("many")
    assert found.studies == ("many.few", "many.many")
    lines = found.logs()
    assert [line.text for line in lines][-1].startswith("the campaign is over")
    assert found.logs(after=lines[-2].number) == lines[-1:]
    found.pause()
    assert status(invoke)["waits_for"].startswith("paused by ")
    with take_lease(open_storage(URL), campaign_study("many")) as lease:
        assert found.resume() is found, "someone runs it: the pause alone is taken back"
        assert found.stop() == str(found.status().seen.record.holder)  # type: ignore[union-attr]  # the lease is held
        lease.ensure()
    assert status(invoke)["waits_for"] is None
    assert found.resume().status().state.name == "OVER", "nobody does: it goes on, and is over"
    with pytest.raises(tuner.TunerError, match="nobody runs"):
        found.stop()
    assert found.write_report().read_text().startswith("<!doctype html>")
    assert found.write_report(form="markdown").name == "report.md"
    assert json.loads(found.write_report(tmp_path / "r.json", "json").read_text())["campaign"] == "many"
