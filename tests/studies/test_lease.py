"""The lease contract on every storage."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contracts.lease_contract import LeaseContract
from tests.support.postgres import PostgresServer


class TestSqliteLease(LeaseContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/study.db"


@pytest.mark.long
class TestJournalLease(LeaseContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"journal://{tmp_path}/study.journal"


class TestPostgresqlLease(LeaseContract):
    @pytest.fixture
    def url(self, postgres_server: PostgresServer) -> str:
        return postgres_server.new_database()
