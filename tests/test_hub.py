"""Files from a Hub on this machine: whole, resumed, refused; nothing of wrong bytes remains."""

from __future__ import annotations

import random
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import hub_server
import pytest
from hub_server import Fault, Hub
from test_bank_crash import files_limited_to

from edgelora.errors import HubError, HubUnreachable
from edgelora.hub import download
from edgelora.hub import repository as hub_repository
from edgelora.hub.download import fetch
from edgelora.hub.offline import offline
from edgelora.hub.repository import DATASET, Repository, RepositoryFile, read_repository

NAME = "Lots-of-LoRAs/Mistral-7B-Instruct-v0.2-4b-r16-task022"
WEIGHTS = f"{NAME}/adapter_model.safetensors"
DATA = random.Random(0).randbytes(300_000)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(download, "_PAUSE_S", 0.0)
    with hub_server.serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        hub.add(
            NAME,
            {"adapter_config.json": b'{"r": 16}', "adapter_model.safetensors": DATA},
            licence="mit",
        )
        yield hub


def weights(repository: Repository) -> RepositoryFile:
    (file,) = (f for f in repository.files if f.path == "adapter_model.safetensors")
    return file


def pull(target: Path, said: list[str] | None = None) -> Path:
    repository = read_repository(NAME)
    said = [] if said is None else said
    return fetch(repository, weights(repository), target, warn=said.append)


def test_a_repository_is_read_at_one_commit_with_the_hashes_of_its_files(hub: Hub) -> None:
    repository = read_repository(NAME)
    assert repository.commit == hub.commit("models", NAME)
    assert repository.licence == "mit" and repository.page == f"{hub.url}/{NAME}"
    sizes = {file.path: (file.size_bytes, file.sha256 is not None) for file in repository.files}
    assert sizes["adapter_model.safetensors"] == (len(DATA), True)
    assert sizes["adapter_config.json"] == (9, False)
    hub.add("Lots-of-LoRAs/task022", {}, kind="datasets")
    assert read_repository("Lots-of-LoRAs/task022", DATASET).page == (
        f"{hub.url}/datasets/Lots-of-LoRAs/task022"
    )


def test_a_file_comes_whole_and_the_token_goes_to_the_hub_alone(hub: Hub, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    repository = read_repository(NAME)
    target = tmp_path / "new" / "w.safetensors"
    fetch(repository, weights(repository), target, progress=lambda n, all_: seen.append((n, all_)))
    assert target.read_bytes() == DATA and [p.name for p in target.parent.iterdir()] == [
        target.name
    ]
    assert seen == sorted(seen) and seen[-1] == (len(DATA), len(DATA))
    said = {(a.path.startswith("/store/"), a.authorization) for a in hub.asked}
    assert said == {(False, "Bearer hf_secret"), (True, "")}
    assert {asked.user_agent.partition("/")[0] for asked in hub.asked} == {"edgelora"}
    n_asked = len(hub.asked)
    assert fetch(repository, weights(repository), target) == target
    assert len(hub.asked) == n_asked  # right already: nothing is asked for


def test_small_files_are_held_to_git_s_hash(hub: Hub, tmp_path: Path) -> None:
    repository = read_repository(NAME)
    (config,) = (f for f in repository.files if f.path == "adapter_config.json")
    expected = subprocess.run(
        ["git", "hash-object", "--stdin"], input=b'{"r": 16}', capture_output=True, check=True
    )
    assert config.git_sha1 == expected.stdout.decode().strip()
    assert fetch(repository, config, tmp_path / "c.json").read_bytes() == b'{"r": 16}'
    hub.faults[f"{NAME}/adapter_config.json"] = Fault(bytes_instead=b'{"r": 17}')
    with pytest.raises(HubError, match="git hash"):
        fetch(repository, config, tmp_path / "d.json")
    assert [path.name for path in tmp_path.iterdir()] == ["c.json"]


def test_a_cut_line_is_taken_up_where_it_was_cut(hub: Hub, tmp_path: Path) -> None:
    hub.faults[WEIGHTS] = Fault(cut_after=100_000, n_cuts=2)
    said: list[str] = []
    assert pull(tmp_path / "w", said).read_bytes() == DATA
    starts = [int(asked[6:-1] or 0) if asked else 0 for asked in hub.ranges()]
    assert starts == [0, 100_000, 200_000]
    assert len(said) == 2 and "cut after 100,000 of 300,000 bytes" in said[0]


@pytest.mark.slow
def test_the_next_process_asks_for_the_rest_only(hub: Hub, tmp_path: Path) -> None:
    hub.faults[WEIGHTS] = Fault(cut_after=0)
    with pytest.raises(HubUnreachable, match="goes on where it stopped"):
        pull(tmp_path / "w")
    hub.faults[WEIGHTS] = Fault(stall_after=250_000)
    code = """
        import sys
        from pathlib import Path
        from edgelora.hub.download import fetch
        from edgelora.hub.repository import read_repository
        repository = read_repository(sys.argv[1])
        (file,) = (f for f in repository.files if f.path == "adapter_model.safetensors")
        fetch(repository, file, Path(sys.argv[2]))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), NAME, str(tmp_path / "w")]
    with subprocess.Popen(command) as process:
        assert hub.stalled.wait(200)
        part = wait_for_part(tmp_path, 250_000)
        process.kill()
    assert not (tmp_path / "w").exists()
    del hub.faults[WEIGHTS]
    hub.asked.clear()
    assert pull(tmp_path / "w").read_bytes() == DATA
    assert hub.ranges() == ["bytes=250000-"] and not part.exists()


def wait_for_part(folder: Path, size: int) -> Path:
    """The part once it holds `size` bytes."""
    for _ in range(4000):
        for part in folder.glob("*.part"):
            if part.stat().st_size >= size:
                return part
        time.sleep(0.05)
    raise AssertionError(f"no part of {size} bytes in {list(folder.iterdir())}")


def test_a_server_without_ranges_sends_it_anew(hub: Hub, tmp_path: Path) -> None:
    hub.faults[WEIGHTS] = Fault(cut_after=100_000, n_cuts=1, no_ranges=True)
    assert pull(tmp_path / "w").read_bytes() == DATA
    assert hub.ranges() == ["", "bytes=100000-"]


def test_what_came_of_another_version_is_not_used(hub: Hub, tmp_path: Path) -> None:
    def die(_: str) -> None:
        hub.faults[WEIGHTS].cut_after = 0

    hub.faults[WEIGHTS] = Fault(cut_after=100_000)
    repository = read_repository(NAME)
    with pytest.raises(HubUnreachable):
        fetch(repository, weights(repository), tmp_path / "w", warn=die)
    (part,) = tmp_path.iterdir()
    assert part.stat().st_size == 100_000
    hub.faults.clear()
    hub.asked.clear()
    hub.add(NAME, {"adapter_model.safetensors": DATA[::-1]})
    assert pull(tmp_path / "w").read_bytes() == DATA[::-1]
    assert hub.ranges() == [""] and [path.name for path in tmp_path.iterdir()] == ["w"]


@pytest.mark.parametrize(
    ("sent", "what"),
    [
        (DATA[:-1] + b"x", "not those that the Hub promised"),
        (DATA + b"x", "more comes than the 300,000 bytes"),
        (DATA[:-1], "not those that the Hub promised"),
        (b"", "not those that the Hub promised"),
    ],
)
def test_of_wrong_bytes_nothing_remains(sent: bytes, what: str, hub: Hub, tmp_path: Path) -> None:
    hub.faults[WEIGHTS] = Fault(bytes_instead=sent)
    (tmp_path / "w").write_bytes(b"an older version")
    with pytest.raises(HubError, match=what):
        pull(tmp_path / "w")
    (kept,) = tmp_path.iterdir()
    assert kept.read_bytes() == b"an older version"


@pytest.mark.parametrize(
    ("status", "code", "error", "what"),
    [
        (401, "RepoNotFound", HubError, "no such repository, or a private one"),
        (404, "RepoNotFound", HubError, "no such repository, or a private one"),
        (401, "", HubError, "no such repository, or a private one"),
        (403, "", HubError, "forbidden"),
        (400, "", HubError, "the Hub refuses"),
        (503, "", HubUnreachable, "answers 503"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(
    status: int,
    code: str,
    error: type[HubError],
    what: str,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hub_repository, "_N_RETRIES", 0)
    hub.faults[NAME] = Fault(status=status, code=code)
    with pytest.raises(error, match=what) as caught:
        read_repository(NAME)
    assert NAME in str(caught.value) and bool(caught.value.hint) == (status != 400)


@pytest.mark.slow
def test_a_hub_that_asks_for_patience_gets_it(hub: Hub, tmp_path: Path) -> None:
    hub.faults[NAME] = Fault(status=429, n_refusals=1)
    repository = read_repository(NAME)
    hub.faults[NAME] = Fault(status=429, n_refusals=1)
    assert fetch(repository, weights(repository), tmp_path / "w").read_bytes() == DATA
    assert [asked.path for asked in hub.asked].count(f"/api/models/{NAME}") == 2


def test_without_huggingface_hub_the_extra_is_named(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=r'pip install "edgelora\[hub\]"'):
        read_repository(NAME)


def test_a_gated_repository_and_a_file_that_went_away(hub: Hub, tmp_path: Path) -> None:
    hub.faults[NAME] = Fault(status=403, code="GatedRepo")
    with pytest.raises(HubError, match="gated: its owner wants to be asked") as caught:
        pull(tmp_path / "w")
    assert f"Ask at {hub.url}/{NAME}" in str(caught.value) and "HF_TOKEN" in str(caught.value)
    hub.faults.clear()
    repository = read_repository(NAME)
    hub.add(NAME, {"adapter_model.safetensors": DATA[::-1]})
    with pytest.raises(HubError, match="not there any more"):
        fetch(repository, weights(repository), tmp_path / "w")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (b"<html>", "not JSON"),
        ([], "not a description"),
        ({"siblings": []}, "names no commit"),
        ({"sha": "f" * 40}, "lists no files"),
        ({"sha": "f" * 40, "siblings": [{"rfilename": "a"}]}, "no hash of its files"),
        (
            {"sha": "f" * 40, "siblings": [{"rfilename": "a", "size": -1, "blobId": "0" * 40}]},
            "no hash of its files",
        ),
    ],
)
def test_a_hostile_listing_is_refused(answer: object, what: str, hub: Hub) -> None:
    hub.faults[NAME] = Fault(answer=answer)
    with pytest.raises(HubError, match=what):
        read_repository(NAME)


def test_a_name_that_is_none(hub: Hub) -> None:
    for name in ("a/b/c", "../x", "a b/c", "a/.."):
        with pytest.raises(HubError, match="not the name of a repository"):
            read_repository(name)
    assert hub.asked == []


def test_nobody_answers(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_repository, "_N_RETRIES", 0)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubUnreachable, match="the connection failed"):
        read_repository(NAME)


def test_too_little_room_is_told_before(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "SPARE_BYTES", 1 << 60)
    with pytest.raises(HubError, match="GB more and .* GB are free"):
        pull(tmp_path / "w")
    assert hub.fetched() == [] and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_what_came_is_kept(hub: Hub, tmp_path: Path) -> None:
    with files_limited_to(200_000), pytest.raises(HubError, match=r"cannot be written \(File too"):
        pull(tmp_path / "w")
    (part,) = tmp_path.iterdir()
    assert 0 < part.stat().st_size <= 200_000
    assert pull(tmp_path / "w").read_bytes() == DATA and len(hub.ranges()) == 2
    assert hub.ranges()[1].startswith("bytes=")


def test_offline_nothing_is_asked(hub: Hub, tmp_path: Path) -> None:
    repository = read_repository(NAME)
    hub.asked.clear()
    with offline():
        with pytest.raises(HubError, match="needs the network, and this is offline"):
            read_repository(NAME)
        with pytest.raises(HubError, match="needs the network"):
            fetch(repository, weights(repository), tmp_path / "w")
    assert hub.asked == []
