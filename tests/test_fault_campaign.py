"""A short form of `make fault-campaign`: every trial holds, and a campaign can be interrupted."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import fault_campaign

TRIALS = 24  # eight of each group


@pytest.mark.slow
def test_every_trial_of_a_short_campaign_holds(tmp_path: Path, monkeypatch) -> None:
    results = fault_campaign.campaign(tmp_path, seed=12, minutes=15, trials=TRIALS)
    assert [line for line in results if line["outcome"] != "held"] == []
    assert [line["index"] for line in results] == list(range(TRIALS))
    assert {line["group"] for line in results} == set(fault_campaign.GROUPS)

    def repeated(*_) -> dict[str, str]:
        raise AssertionError("a trial that was done is repeated")

    for group in fault_campaign.GROUPS:
        monkeypatch.setitem(fault_campaign.GROUPS, group, repeated)
    again = fault_campaign.campaign(tmp_path, seed=12, minutes=15, trials=TRIALS)
    assert again == results


def test_a_flipped_bit_that_nobody_reads_is_not_held(tmp_path: Path) -> None:
    """The judge of flips is not lenient: other values in a JSON file are another meaning."""
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    before.write_text('{"a": 1}')
    after.write_text('{"a": 3}')
    assert not fault_campaign.means_the_same(before, after)
    after.write_text('{"a":  1}')
    assert fault_campaign.means_the_same(before, after)


@pytest.mark.parametrize(
    ("event", "arguments", "changes"),
    [
        ("open", ("trial/out/a.json", "w", 0), True),
        ("open", ("trial/out/a.json", "r", 0), False),
        ("open", ("gold/a.json", "w", 0), False),
        ("os.rename", ("trial/a", "trial/b", -1, -1), True),
        ("os.listdir", ("trial",), False),
    ],
)
def test_faults_fall_on_operations_that_change_files(event, arguments, changes: bool) -> None:
    assert fault_campaign._changes_a_file(event, arguments, "trial") is changes
