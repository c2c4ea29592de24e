"""The storage contract on every storage at hand; another one is added by a class with a `url`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contracts.storage_contract import StorageContract
from tests.support.postgres import PostgresServer


class TestSqlite(StorageContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"sqlite:///{tmp_path}/folder/study.db"


class TestJournalFile(StorageContract):
    @pytest.fixture
    def url(self, tmp_path: Path) -> str:
        return f"journal://{tmp_path}/folder/study.journal"


class TestPostgresql(StorageContract):
    @pytest.fixture
    def url(self, postgres_server: PostgresServer) -> str:
        return postgres_server.new_database()
