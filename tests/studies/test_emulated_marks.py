"""Studies and trials of an emulated engine say so in the storage, where any reader of it sees it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import optuna

from search_spaces.hardware import NodePool
from search_spaces.known_gpus import known_gpu
from search_spaces.space import build_space
from studies.records import EMULATED
from studies.storage import open_storage
from studies.study import StudySetup, create_study
from tests.studies.toy import measure, small_space, toy_problem


def test_a_study_of_an_emulated_engine_is_marked(tmp_path: Path) -> None:
    pool = NodePool(name="h100", device=known_gpu("h100_sxm"), nodes=1, devices_per_node=8, price_per_hour=20.0)
    problem = replace(toy_problem(), node_pools=(pool,))
    space = build_space(problem, engines={"emulated": {"max_num_seqs": (1, 4)}}, loads=(1.0, 4.0))
    setup = StudySetup(
        name="marked",
        problem=problem,
        space=space,
        study_file="name: marked",
        directory=tmp_path,
        seed=0,
        budget_trials=4,
    )
    url = f"sqlite:///{tmp_path / 'studies.db'}"
    with create_study(open_storage(url), setup) as study:
        proposal = study.ask()
        outcome = replace(measure(small_space(toy_problem()).default()), emulated=True)
        record = study.tell(proposal, outcome)
        assert record.measurement is not None
        assert record.measurement.emulated
    stored = optuna.load_study(study_name="marked", storage=url)
    assert "EMULATED" in stored.user_attrs[EMULATED]
    assert "EMULATED" in str(open_storage(url).backend.get_study_system_attrs(stored._study_id))
    assert "EMULATED" in stored.trials[proposal.trial_number].user_attrs[EMULATED]
