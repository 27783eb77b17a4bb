"""Ray Serve, really run on one machine: two bundles with two replicas each, one of them killed under load.

    python tests/check_ray.py BUNDLE

A program of its own, which `tests/test_ray.py` runs: Ray takes over the process that it is started in. Prints
one JSON document.
"""

import json
import os
import signal
import sys
import threading
import time
from collections import Counter

import httpx2
import ray
from ray import serve

from variator_export.serving.ray import AppArguments, app
from variator_export.sessions import Bundle

# A third of them before the kill. A busy machine answers few requests a second, so it takes longer.
_SECONDS, _AT_MOST_S, _REQUESTS = 6.0, 120.0, 60
_TEXTS = ["The ferry leaves at seven.", "A cat", "It rains in the mountains, they say."]


def main(bundle: str) -> None:
    """Serve, kill, compare, and print what happened."""
    ray.init(num_cpus=4, include_dashboard=False, logging_level="error", log_to_driver=False)
    arguments = AppArguments(
        bundles={"one": bundle, "other": bundle},
        slo_ms=10_000,
        allow_unknown_quality=True,
        calibration_seconds=0.05,
        min_replicas=2,
        max_replicas=2,
    )
    serve.start(http_options={"host": "127.0.0.1", "port": 8765})
    serve.run(app(arguments), name="embeddings", route_prefix="/")
    address = "http://127.0.0.1:8765"
    expected = Bundle.load(bundle).embed(_TEXTS, ratio=1).tolist()
    replicas: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    started = time.monotonic()

    def goes_on() -> bool:
        """Whether there are too few requests, or too little time has passed."""
        passed = time.monotonic() - started
        return passed < _SECONDS or (outcomes["200"] < _REQUESTS and passed < _AT_MOST_S)

    def client() -> None:
        with httpx2.Client(base_url=address, timeout=60) as own:
            while goes_on():
                response = own.post(
                    "/embed",
                    json={"inputs": _TEXTS, "normalize": False},
                    headers={"x-variator-ratio": "1", "x-variator-model": "one"},
                )
                outcomes[str(response.status_code)] += 1
                if response.status_code == 200:
                    replicas[response.headers["x-variator-replica"]] += 1
                    worst = max(
                        abs(a - b)
                        for one, other in zip(response.json(), expected, strict=True)
                        for a, b in zip(one, other, strict=True)
                    )
                    outcomes["wrong"] += worst > 1e-4

    threads = [threading.Thread(target=client) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(_SECONDS / 3)
    while outcomes["200"] < _REQUESTS / 3 and time.monotonic() < started + _AT_MOST_S / 2:
        time.sleep(0.1)
    before = dict(replicas)
    killed = max(before, key=lambda pid: before[pid])
    os.kill(int(killed), signal.SIGKILL)
    for thread in threads:
        thread.join()
    by_name = {
        name: httpx2.post(f"{address}/v1/embeddings", json={"input": "a", "model": name}).status_code
        for name in ("one", "other@4", "third")
    }
    listed = [model["id"] for model in httpx2.get(f"{address}/v1/models").json()["data"]]
    serve.shutdown()
    ray.shutdown()
    print(
        json.dumps(
            {
                "outcomes": dict(outcomes),
                "before": before,
                "killed": killed,
                "after": {pid: count - before.get(pid, 0) for pid, count in replicas.items()},
                "by_name": by_name,
                "listed": listed,
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1])
