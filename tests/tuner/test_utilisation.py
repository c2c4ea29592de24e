from __future__ import annotations

import pytest

from tuner.utilisation import Utilisation


def test_time_counts_only_while_proposals_remain() -> None:
    used = Utilisation(devices=4)
    used.add(10.0, 0, proposals_remain=True)
    used.add(11.0, 3, proposals_remain=True)
    used.add(13.0, 2, proposals_remain=True)
    used.add(20.0, 0, proposals_remain=False)
    assert used.use.reserved_device_s == pytest.approx(2 * 3)
    assert used.use.device_s == pytest.approx(3 * 4)
    assert str(used.use).startswith("while proposals remained, trials held 50% of the device-seconds")


def test_nothing_is_used_before_time_passes() -> None:
    used = Utilisation(devices=4)
    used.add(1.0, 4, proposals_remain=True)
    assert used.use.share == 0.0
