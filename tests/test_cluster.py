"""Work on the workers of a real Dask scheduler: every item answered once, whatever dies."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import clusters
import pytest
from clusters import Slow

from edgelora import cluster as cluster_module
from edgelora.cluster import Cluster, open_cluster
from edgelora.errors import ClusterError, DatasetError


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a scheduler with two workers, for tests that kill none of them."""
    with clusters.running(tmp_path_factory.mktemp("shared")) as processes:
        yield processes.address


@contextlib.contextmanager
def with_two_workers(address: str) -> Iterator[Cluster]:
    """Connected, with both workers there."""
    with open_cluster(address) as cluster:
        deadline = time.monotonic() + clusters.START_S
        while cluster._n_threads() < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        yield cluster


def numbered(n: int) -> Iterator[tuple[str, int]]:
    return ((f"item {i}", i) for i in range(n))


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ClusterError, match=r'pip install "edgelora\[cluster\]"'):
        with open_cluster("tcp://127.0.0.1:1"):
            pass


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "nonsense://here", "tcp://127.0.0.1:x"])
def test_no_scheduler_is_one_error(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_module, "CONNECT_S", 0.3)
    with pytest.raises(ClusterError, match="no scheduler of Dask answers there"):
        with open_cluster(address):
            pass


@pytest.mark.slow
def test_each_item_comes_back_once_with_its_own_answer(shared: str) -> None:
    with open_cluster(shared) as cluster:
        cluster.check(str)
        answers = list(cluster.each(clusters.refuse_odd, numbered(9)))
    assert sorted(key for key, _ in answers) == [f"item {i}" for i in range(9)]
    for key, answer in answers:
        n = int(key.split()[1])
        if n % 2:
            assert isinstance(answer, DatasetError)
            assert str(answer) == f"{n} is odd\n  - it is\nTake an even one."
        else:
            assert answer == n


@pytest.mark.slow
def test_warnings_of_the_work_are_told_once(shared: str, tmp_path: Path) -> None:
    told: list[str] = []
    with open_cluster(shared, told.append) as cluster:
        answers = dict(cluster.each(Slow(str(tmp_path), 0), numbered(6)))
    assert answers == {f"item {i}": 2 * i for i in range(6)}
    assert told == ["an odd number"]


@pytest.mark.slow
def test_items_are_taken_as_threads_are_free(shared: str, tmp_path: Path) -> None:
    taken: list[int] = []

    def endless() -> Iterator[tuple[int, int]]:
        while True:
            taken.append(len(taken))
            yield taken[-1], taken[-1]

    with with_two_workers(shared) as cluster:
        answers = cluster.each(Slow(str(tmp_path), 0.01), endless())
        for _ in range(10):
            next(answers)
            assert len(taken) <= 12
        answers.close()


@pytest.mark.slow
def test_an_interrupt_withdraws_what_has_not_begun(shared: str, tmp_path: Path) -> None:
    work = Slow(str(tmp_path), 0.3)
    with with_two_workers(shared) as cluster:
        with pytest.raises(KeyboardInterrupt):
            for _ in cluster.each(work, numbered(50)):
                raise KeyboardInterrupt
        n_begun = len(work.begun())
        time.sleep(1)
        assert len(work.begun()) == n_begun <= 4
        assert dict(cluster.each(clusters.refuse_odd, [("after", 2)])) == {"after": 2}


@pytest.mark.slow
def test_a_bug_in_the_work_ends_it_with_one_error(shared: str) -> None:
    with open_cluster(shared) as cluster:
        with pytest.raises(ClusterError, match=r"a worker failed \(ZeroDivisionError: \d / 0\)"):
            list(cluster.each(clusters.fail, numbered(4)))


@pytest.mark.slow
def test_workers_that_lack_the_code_are_named(
    shared: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "only_here.py").write_text("def probe(n=0):\n    return n\n")
    monkeypatch.syspath_prepend(tmp_path)
    import only_here  # type: ignore[import-not-found]

    with with_two_workers(shared) as cluster:
        with pytest.raises(ClusterError) as caught:
            cluster.check(only_here.probe)
        assert len(caught.value.problems) == 2
        assert all("No module named 'only_here'" in line for line in caught.value.problems)
        with pytest.raises(ClusterError, match="a worker failed"):
            list(cluster.each(only_here.probe, numbered(3)))


def kill_at_work(work: Slow, worker: subprocess.Popen[bytes]) -> None:
    """Kill a worker as it begins its next item, long before that is done."""

    def n_begun() -> int:
        return sum(pid == worker.pid for _, pid in work.begun())

    before, deadline = n_begun(), time.monotonic() + 30
    while n_begun() == before and time.monotonic() < deadline:
        time.sleep(0.01)
    worker.kill()


@pytest.mark.slow
def test_nothing_is_lost_with_a_killed_worker(tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    work = Slow(str(tmp_path / "notes"), 0.4)
    with clusters.running(tmp_path / "cluster") as processes:
        with with_two_workers(processes.address) as cluster:
            answers = []
            for answer in cluster.each(work, numbered(12)):
                answers.append(answer)
                if len(answers) == 3:
                    killer = Thread(target=kill_at_work, args=(work, processes.workers[0]))
                    killer.start()
            killer.join()
    assert sorted(answers) == sorted((f"item {i}", 2 * i) for i in range(12))
    begun = work.begun()
    dead = processes.workers[0].pid
    again = {n for n, times in Counter(n for n, _ in begun).items() if times > 1}
    assert 12 < len(begun) <= 14, "the killed worker was at work, and only that is done again"
    assert not again & {answer // 2 for _, answer in answers[:3]}, "answered before the kill"
    assert dead in {pid for _, pid in begun}
    assert dead not in {pid for _, pid in begun[-6:]}


@pytest.mark.slow
def test_an_item_that_kills_its_worker_is_refused_and_the_rest_is_done(tmp_path: Path) -> None:
    with clusters.running(tmp_path, allowed_failures=0) as processes:
        with with_two_workers(processes.address) as cluster:
            answers = dict(cluster.each(clusters.die_of_three, numbered(8)))
    error = answers.pop("item 3")
    assert isinstance(error, ClusterError) and "a worker died while at work on it" in str(error)
    assert answers == {f"item {i}": i for i in range(8) if i != 3}


@pytest.mark.slow
def test_without_workers_it_ends_after_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_module, "NO_WORKER_S", 1.0)
    with clusters.running(tmp_path, n_workers=0) as processes:
        with open_cluster(processes.address) as cluster:
            with pytest.raises(ClusterError, match="no worker for 1 s") as caught:
                cluster.check(str)
    assert f"dask worker {processes.address}" in caught.value.hint


@pytest.mark.slow
def test_a_scheduler_that_goes_is_told(tmp_path: Path) -> None:
    with clusters.running(tmp_path / "cluster") as processes:
        (tmp_path / "notes").mkdir()
        with open_cluster(processes.address) as cluster:
            with pytest.raises(ClusterError, match="the scheduler has gone") as caught:
                for _ in cluster.each(Slow(str(tmp_path / "notes"), 0.2), numbered(20)):
                    processes.scheduler.kill()
    assert "same command again" in caught.value.hint
