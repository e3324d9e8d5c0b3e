"""Labelling on a Ray cluster: shards, workers that die, machines that go, and the same rows as on one machine.

Ray is installed by `make proof-ray` only, in an environment of its own; elsewhere what needs a cluster is skipped. What a
worker does is tested without it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rlaif import cluster
from rlaif.cluster import Plan, Worker
from rlaif.data import comparisons
from rlaif.job import Job
from rlaif.labeler import Labeler
from rlaif.records import FatalError, RlaifError, UsageError
from rlaif.runner import Limits
from rlaif.store import HeldError, Store
from tests.conftest import clean_env, cli, in_process, make_rows, read_jsonl, write_jsonl
from tests.server import Server
from tests.test_runner import start

WIDTH = 4


# ------------------------------------------------------------ without a cluster


def planned(source: Path, out: Path, rows: int = 7, labeler: Labeler | None = None, **changes: Any) -> tuple[Job, Plan, int]:
    """A job, its plan as the driver makes it, and how many shards it has."""
    labeler = labeler or Labeler(engine="mock")
    job = Job(str(source), out, lambda: comparisons(str(source)), labeler.pairwise())
    job.shards.mkdir(exist_ok=True)
    given = {"labeler": labeler, "limits": Limits(4), "redo": False, "where": Path.cwd(), **changes}
    plan = Plan(job.shards, "token", job.source, job.method, **given)
    plan.begin()
    return job, plan, plan.write(job.items(), rows)


def reports(plan: Plan, count: int) -> list[dict[str, Any]]:
    worker = Worker(plan)
    return [json.loads(worker({"number": [number]})["report"][0]) for number in range(count)]


def summed(found: list[dict[str, Any]]) -> dict[str, Any]:
    sums: dict[str, Any] = {"workers": 1, "wall_seconds": 1.0}
    for report in found:
        sums = cluster._add(sums, report)
    return sums


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz", "parquet"])
def test_shards_make_the_rows_that_one_machine_makes(tmp_path: Path, ending: str) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", make_rows(25))
    job, plan, count = planned(source, tmp_path / f"o.{ending}")
    assert [len([*plan.shard(number).items()]) for number in range(count)] == [7, 7, 7, 4]
    made = cluster._written(job, plan, count, 25, summed(reports(plan, count)))
    in_process("label", source, "-o", tmp_path / f"whole.{ending}", "--engine", "mock")
    if ending == "jsonl.gz":  # the time is in its head
        assert [*comparable(job.out)] == [*comparable(tmp_path / f"whole.{ending}")]
    else:
        assert job.out.read_bytes() == (tmp_path / f"whole.{ending}").read_bytes()
    whole = json.loads((tmp_path / f"whole.{ending}.run.json").read_text())
    same = ("rows", "of_rows", "statuses", "settings", "complete", "all_runs", "notes")
    assert {name: made[name] for name in same} == {name: whole[name] for name in same}
    assert made["this_run"]["calls"] == 50
    assert made["this_run"].keys() == whole["this_run"].keys()
    # What OUT and its source hold too is gone; the stores are there, and nothing is asked again.
    left = {path.name.partition(".")[2] for path in job.shards.iterdir()}
    assert left == {"jsonl.store", "jsonl.run.json", "txt"}
    _, plan, count = planned(source, job.out)
    assert summed(reports(plan, count))["this_run"]["calls"] == 0


def comparable(path: Path) -> Iterator[Any]:
    from rlaif.data import read_rows

    for _, row in read_rows(str(path)):
        yield row


def test_rows_reach_a_worker_as_the_driver_read_them(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [{**row, "odd": [1.5, None, "\ud800"]} for row in make_rows(9)])
    job, plan, count = planned(source, tmp_path / "o.jsonl", rows=2)
    assert [item for number in range(count) for item in plan.shard(number).items()] == list(job.items())


def test_a_job_can_be_sent_to_another_process_whatever_its_method(tmp_path: Path) -> None:
    import pickle

    from rlaif.sample import Sampler, load_icl

    mine = tmp_path / "mine.jinja"
    mine.write_text('{% extends "pairwise/general.jinja" %}{% block preamble %}Mine.{% endblock %}')
    labelers = [Labeler(template=str(mine), shots=2, choose="nearest"), Labeler(constitution="general", cot="two-call")]
    methods = [labeler.pairwise() for labeler in labelers]
    mine.unlink()  # workers do not read the file
    for method in (*methods, Labeler().rater(), Labeler().ranker("listwise"), Sampler(icl=load_icl("urial"))):
        again = pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(method))))
        assert again.settings() == method.settings()
    sent = pickle.loads(pickle.dumps(methods[0])).template
    values = {"prompt": "p", "response_1": "<sample> x", "response_2": "y"}
    assert sent.render(**values) == methods[0].template.render(**values)
    assert "Mine." in sent.render(**values)[0][0]["content"]


def test_a_worker_that_does_not_see_the_folder_or_has_another_version_stops_the_run(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", make_rows(9))
    _, plan, count = planned(source, tmp_path / "o.jsonl")
    plan.proof.write_text("another folder's")
    (first, second) = reports(plan, count)
    assert "not seen here" in first["failed"]["message"]
    assert "not seen here" in second["failed"]["message"]  # the first reason stands
    assert "not seen here" in str(plan.stopped())
    assert not (tmp_path / "o.jsonl.shards" / "00000.jsonl.store").exists()
    _, plan, count = planned(source, tmp_path / "o.jsonl", version="0.0.9")
    assert "0.0.9" in reports(plan, count)[0]["failed"]["message"]


def test_a_stop_ends_a_shard_as_cleanly_as_ctrl_c_does(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", make_rows(400))
    labeler = Labeler(engine="mock", options={"latency": 0.03, "spread": 0.0})
    _, plan, _ = planned(source, tmp_path / "o.jsonl", 200, labeler, limits=Limits(16))
    threading.Timer(0.4, plan.stop, [{"message": "interrupted", "usage": False}]).start()
    first, second = reports(plan, 2)
    assert "stopping" in first["failed"]["message"]
    assert "interrupted" in second["failed"]["message"]
    with closing(Store(plan.shard(0).store_path)) as store:
        calls = store.usage().calls
    assert 20 < calls < 400
    assert not plan.shard(1).store_path.exists()
    plan.begin()
    again = reports(plan, 2)
    assert sum(report["this_run"]["calls"] for report in again) == 800 - calls


def test_a_shard_that_kills_its_workers_is_given_up(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", make_rows(5))
    _, plan, _ = planned(source, tmp_path / "o.jsonl")
    for _ in range(cluster.TRIES):
        plan.count_try(0)
    assert f"died {cluster.TRIES} times" in reports(plan, 1)[0]["failed"]["message"]
    _, plan, _ = planned(source, tmp_path / "o.jsonl")  # the next run begins to count anew
    assert reports(plan, 1)[0]["rows"] == 5


def test_a_store_that_a_lost_worker_holds_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", make_rows(5))
    _, plan, _ = planned(source, tmp_path / "o.jsonl")
    held = Store(plan.shard(0).store_path)
    monkeypatch.setattr(cluster.time, "sleep", lambda _: held.close())
    assert reports(plan, 1)[0]["rows"] == 5
    held = Store(plan.shard(0).store_path)
    monkeypatch.setattr(cluster, "HELD", -1.0)
    with pytest.raises(HeldError):
        Worker(plan)._work(0)
    held.close()


def test_shards_of_other_settings_are_not_put_together(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", make_rows(9))
    _, plan, count = planned(source, tmp_path / "o.jsonl")
    first, second = reports(plan, count)
    with pytest.raises(RlaifError, match="other settings"):
        summed([first, {**second, "settings": {**second["settings"], "engine": {"dtype": "fp32"}}}])


def test_sums_of_costs_take_an_unknown_one_for_nothing() -> None:
    assert cluster._plus({"cost_usd": None, "calls": 2}, {"cost_usd": 0.5, "calls": 3}) == {"cost_usd": 0.5, "calls": 5}
    assert cluster._plus({"cost_usd": 0.5, "calls": 2}, {"cost_usd": None, "calls": 3}) == {"cost_usd": 0.5, "calls": 5}
    assert cluster._plus({"cost_usd": None}, {"cost_usd": None}) == {"cost_usd": None}
    assert cluster._plus({"in_flight": 9}, {"in_flight": 7}) == {"in_flight": 9}


class Machines:
    """What Ray tells of a cluster."""

    def __init__(self, *machines: dict[str, float]):
        self.machines = machines

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True, "Resources": found} for found in self.machines] + [{"Alive": False, "Resources": {"CPU": 99}}]

    def cluster_resources(self) -> dict[str, float]:
        names = {name for found in self.machines for name in found}
        return {name: sum(found.get(name, 0) for found in self.machines) for name in names}


def test_one_worker_a_gpu_else_one_a_machine() -> None:
    vllm, server = Labeler(engine="vllm", model="m"), Labeler(engine="openai")
    gpus = Machines({"CPU": 0}, {"CPU": 64, "GPU": 8}, {"CPU": 64, "GPU": 8})
    plain = Machines({}, {"CPU": 16}, {"CPU": 8})
    assert [cluster._room(gpus, one, "a") for one in (vllm, server)] == [16, 2]
    assert cluster._room(plain, vllm, "a") == 2
    assert cluster._resources(gpus, 16, vllm) == {"num_gpus": 1}
    assert cluster._resources(gpus, 16, server) == {"num_cpus": 1}
    assert cluster._resources(plain, 2, vllm) == {"num_cpus": 8}
    assert cluster._resources(plain, 3, vllm) == {"num_cpus": 4}
    with pytest.raises(UsageError, match="--workers"):
        cluster._room(Machines({}), vllm, "a")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--workers", "2"], "go with --ray"),
        (["--shard-rows", "2"], "go with --ray"),
        (["--ray", "ray://x:1"], "HOST:PORT"),
        (["--ray", "127.0.0.1:1"], "no cluster there"),
        (["--ray", "local", "--max-cost", "1", "--price", "1,1"], "--max-cost does not go with --ray"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(tmp_path: Path, options: list[str], words: str) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", make_rows(3))
    with pytest.raises(UsageError, match=words):
        in_process("label", source, "-o", tmp_path / "o.jsonl", "--engine", "mock", *options)
    assert [path.name for path in tmp_path.iterdir()] == ["d.jsonl"]


def test_bad_rows_are_named_before_the_cluster_is_looked_for(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", [*make_rows(3), {"prompt": "p", "response_a": "x", "response_b": " "}])
    with pytest.raises(UsageError, match=r"line 4: column 'response_b' is empty"):
        in_process("label", source, "-o", tmp_path / "o.jsonl", "--engine", "mock", "--ray", "127.0.0.1:1")


def test_an_output_goes_on_where_it_was_begun(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "d.jsonl", make_rows(3))
    in_process("label", source, "-o", tmp_path / "one.jsonl", "--engine", "mock")
    with pytest.raises(UsageError, match="on one machine, without --ray"):
        in_process("label", source, "-o", tmp_path / "one.jsonl", "--engine", "mock", "--ray", "127.0.0.1:1")
    planned(source, tmp_path / "many.jsonl")
    with pytest.raises(UsageError, match="on a cluster, with --ray"):
        in_process("label", source, "-o", tmp_path / "many.jsonl", "--engine", "mock")


def test_ray_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ray", "ray.data"):
        monkeypatch.setitem(sys.modules, name, None)
    source = write_jsonl(tmp_path / "d.jsonl", make_rows(3))
    with pytest.raises(FatalError, match=r"ray is not installed: pip install 'rlaif\[ray\]'"):
        in_process("label", source, "-o", tmp_path / "o.jsonl", "--engine", "mock", "--ray", "local")


# ------------------------------------------------------------ on a cluster of three local machines


@pytest.fixture(scope="module")
def machines() -> Iterator[Any]:
    """A head without cores, and two machines with one each."""
    if find_spec("ray") is None:
        pytest.skip("needs Ray: make proof-ray")
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**clean_env(), "RAY_USAGE_STATS_ENABLED": "0"}.items():
            patch.setenv(name, value)
        patch.delenv("OPENAI_API_KEY", raising=False)
        from ray.cluster_utils import Cluster

        small = {"object_store_memory": 80_000_000, "include_dashboard": False}
        found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
        nodes = [found.add_node(num_cpus=1, object_store_memory=80_000_000) for _ in range(2)]
        yield found, nodes
        found.shutdown()


def spread(server: Server, machines: Any, path: Path, out: Path, *more: str) -> tuple[str, ...]:
    where = ("--ray", machines[0].address, "--concurrency", str(WIDTH))
    return ("label", str(path), "-o", str(out), "--engine", "openai", "--base-url", server.url, *where, *more)


def until(condition: Callable[[], bool], process: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def workers_of(node: Any) -> list[int]:
    """The processes of our workers on one machine, which are its raylet's children."""
    raylet = node.all_processes["raylet"][0].process.pid
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                title, parent = (folder / "cmdline").read_text(), (folder / "stat").read_text().rpartition(")")[2].split()[1]
            except OSError:
                continue
            if int(parent) == raylet and "MapWorker" in title:
                found.append(int(folder.name))
    return found


@pytest.mark.ray
def test_ctrl_c_lets_workers_finish_and_a_wrong_key_stops_them_all(server: Server, machines: Any, tmp_path: Path) -> None:
    server.latency = 0.1
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(200)), tmp_path / "o.jsonl"
    arguments = spread(server, machines, path, out)
    process = start(*arguments)
    until(lambda: len(server.bodies) >= 100, process)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "interrupted" in errors
    assert "the same command goes on" in errors
    assert "Traceback" not in errors
    assert not out.exists()
    asked = len(server.bodies)
    assert 100 <= asked < 400
    assert sum(server.answered.values()) == asked
    # The key of whoever gives the command is not sent along: the workers have their own, or none.
    server.key, server.latency = "right", 0.0
    refused = cli(*arguments, env={"OPENAI_API_KEY": "right"})
    assert refused.returncode == 1
    assert "Incorrect API key" in refused.stderr
    assert sum(server.answered.values()) == asked
    server.key = None
    assert cli(*arguments).returncode == 0
    assert [row["id"] for row in read_jsonl(out)] == [str(n) for n in range(200)]
    assert sum(server.answered.values()) == 400
    assert max(server.answered.values()) == 1
    assert json.loads((tmp_path / "o.jsonl.run.json").read_text())["shards"] == {"count": 2, "workers": 2}


@pytest.mark.ray
def test_a_killed_worker_and_a_lost_machine_cost_no_row_and_only_calls_in_flight(
    server: Server, machines: Any, tmp_path: Path
) -> None:
    server.latency = 0.1
    found, nodes = machines
    path, out = write_jsonl(tmp_path / "d.jsonl", make_rows(400)), tmp_path / "o.jsonl"
    process = start(*spread(server, machines, path, out, "--shard-rows", "40"))
    until(lambda: len(server.bodies) > 100 and all(len(workers_of(node)) == 1 for node in nodes), process)
    (killed,) = workers_of(nodes[0])
    os.kill(killed, signal.SIGKILL)
    before = len(server.bodies)
    # Another process takes the killed one's place.
    until(lambda: len(server.bodies) > before + 40 and workers_of(nodes[0]) not in ([], [killed]), process)
    found.remove_node(nodes[1], allow_graceful=False)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    rows = read_jsonl(out)
    assert [row["id"] for row in rows] == [str(n) for n in range(400)]
    assert len(server.answered) == 800
    assert 800 < len(server.bodies) <= 800 + 2 * WIDTH
    report = json.loads((tmp_path / "o.jsonl.run.json").read_text())
    assert report["statuses"]["ok"] == 400
    assert report["all_runs"]["calls"] == 800
    assert report["shards"]["count"] == 10
    server.latency = 0.0
    whole = tmp_path / "whole.jsonl"
    assert cli("label", path, "-o", whole, "--engine", "openai", "--base-url", server.url).returncode == 0
    assert whole.read_bytes() == out.read_bytes()
