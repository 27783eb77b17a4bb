"""Ray Serve, really run: replicas on this machine, one of them killed under load."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from variator_export.serving.ray import AppArguments

SCRIPT = Path(__file__).parent / "check_ray.py"


def test_a_replica_that_is_killed_costs_no_request(embedding_bundle: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(embedding_bundle)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["outcomes"].keys() == {"200", "wrong"}
    assert found["outcomes"]["wrong"] == 0
    assert found["outcomes"]["200"] > 50
    assert len(found["before"]) == 2
    assert sum(found["after"].values()) > 10, "requests go on after the kill"
    assert found["after"][found["killed"]] <= 6, "answers that were on their way"
    assert found["by_name"] == {"one": 200, "other@4": 200, "third": 404}
    assert found["listed"] == [
        f"{name}{variant}"
        for name in ("one", "other")
        for variant in ("", "@ratio-1", "@ratio-2", "@ratio-4")
    ]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "give bundle=FOLDER"),
        ({"bundle": "a", "bundles": {"b": "b"}}, "and not both"),
        ({"bundle": "a", "policy": "best"}, "policy 'best' is none of backlog, slack, static"),
        ({"bundle": "a", "min_replicas": 3}, "max_replicas is smaller"),
        ({"bundle": "a", "slo": 3}, "Extra inputs"),
    ],
)
def test_wrong_arguments_are_said(arguments: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        AppArguments.model_validate(arguments)
