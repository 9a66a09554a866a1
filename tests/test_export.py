"""`edgelora export`: Modelfiles and commands as Ollama, llama-server and shells read them."""

from __future__ import annotations

import csv
import json
import os
import shlex
from pathlib import Path

import pico
import pytest
from cli_runner import run
from folders import factors
from go_templates import read_modelfile, render_go
from safetensors.numpy import load_file
from test_template import FAMILIES, joined, opened

from edgelora.adapters.base import read_base
from edgelora.adapters.gguf_lora import PairPlan, open_lora, write_lora
from edgelora.adapters.lora import LoraPair
from edgelora.adapters.merge import merge_adapters
from edgelora.adapters.peft import convert, read_adapter, write_peft
from edgelora.datasets.records import Message
from edgelora.datasets.template import NAMED, Template, open_template
from edgelora.errors import UnsupportedFile
from edgelora.export.chat_form import ChatForm, find_form, to_go, to_jinja
from edgelora.export.llama_server import command_line, server_words
from edgelora.export.ollama import make_modelfile, quoted

TALK = [
    Message("user", "What is it?\n\nA {{ .Content }} {% if %}"),
    Message("assistant", '"Yes", he said.'),
    Message("user", "  spaces\tand tabs in the middle, so"),
]
LED = [Message("system", "Be brief.\nVery."), *TALK]


def raw(text: str, eos: str = "</s>") -> Template:
    return open_template(None, text, "<s>", eos, {"<s>", "</s>"})


def families() -> dict[str, tuple[Template, str]]:
    """Each template with the BOS that its vocabulary adds by itself."""
    found = {name: (opened(name), "" if name == "smollm2" else FAMILIES[name][1])
             for name in FAMILIES}  # fmt: skip
    found |= {name: (raw(NAMED[name]), "<s>") for name in ("alpaca", "chatml")}
    found["braces"] = (raw('{"q": "{prompt}", "x": {'), "<s>")
    return found


@pytest.mark.parametrize("name", families())
@pytest.mark.parametrize("turns", [TALK[:1], TALK, LED[:2], LED], ids=["one", "talk", "led", "all"])
def test_forms_write_what_the_template_does(name: str, turns: list[Message]) -> None:
    template, bos = families()[name]
    form = find_form(template, bos)
    # Some templates strip contents; a form does not.
    turns = [Message(turn.role, turn.content.strip()) for turn in turns]
    wanted = joined(template.render(turns)).removeprefix(bos)
    assert form.render(turns) == wanted
    assert render_go(to_go(form), turns) == wanted
    jinja = open_template(None, to_jinja(form), "", "", template.control_tokens)
    assert joined(jinja.render(turns)) == wanted


def test_a_form_by_hand() -> None:
    form = find_form(raw("Q: {prompt}\nA:"), "<s>")
    assert form == ChatForm("Q: ", "Q: ", "\n\n", "\nA:", "", "</s>Q: ")
    assert render_go(to_go(form), TALK[:1]).endswith("{% if %}\nA:")


def test_a_template_that_looks_into_turns_is_refused() -> None:
    counting = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    for template in (raw(NAMED["sni"]), raw(counting)):
        with pytest.raises(UnsupportedFile, match="looks into the turns"):
            find_form(template, "")


@pytest.mark.parametrize(
    "value",
    ["/a b/c.gguf", 'x"y', "x\ny", ' "x" ', "  x", "", "<|im_end|>", "a\n\n b\t", "ä→🙂", "#x"],
)
def test_values_of_a_modelfile_are_read_back(value: str) -> None:
    assert read_modelfile(f"FROM {quoted(value)}\nADAPTER x\n") == [("FROM", value),
                                                                    ("ADAPTER", "x")]  # fmt: skip


@pytest.mark.parametrize("value", ["a\x07b", 'a"""b', '"a', 'a"', "a\xa0b", "a\rb"])
def test_what_a_modelfile_cannot_hold(value: str) -> None:
    with pytest.raises(UnsupportedFile, match="a Modelfile cannot hold"):
        quoted(value)


def test_any_text_of_a_template_is_read_back(tmp_path: Path) -> None:
    odd = 'a"""b {{ {"c" }\r\n\x07 {{{ "'
    form = ChatForm(odd, odd + "1", odd + "2", odd + "3", odd + "4", odd + "5")
    text = make_modelfile(tmp_path / "b.gguf", tmp_path / "a.gguf", form, stops=["a b", "c\n"])
    commands = read_modelfile(text)
    assert [name for name, _ in commands[:3]] == ["FROM", "ADAPTER", "TEMPLATE"]
    assert commands[0][1] == str((tmp_path / "b.gguf").absolute())
    assert commands[3:] == [("PARAMETER stop", "a b"), ("PARAMETER stop", "c\n")]
    for turns in (TALK, LED):
        assert render_go(commands[2][1], turns) == form.render(turns)


def test_words_of_the_command_survive_their_shells(tmp_path: Path) -> None:
    base, adapter = tmp_path / "the base.gguf", tmp_path / "it's, ours.gguf"
    words = server_words(base, adapter, scale=0.5)
    assert shlex.split(command_line(words, windows=False)) == words
    assert words[:3] == ["llama-server", "--model", str(base)]
    (fields,) = csv.reader([words[words.index("--lora-scaled") + 1]])
    assert fields == [f"{adapter}:0.5"]
    assert words[-1] == "--jinja"
    plain = server_words(base, tmp_path / "a.gguf")
    assert plain[3:] == ["--lora", str(tmp_path / "a.gguf"), "--jinja"]
    # CommandLineToArgvW's rules, by hand: quotes around spaces, backslashes before quotes.
    windows = command_line(["llama-server", "--model", "C:\\a b\\c.gguf", 'x"y'], windows=True)
    assert windows == 'llama-server --model "C:\\a b\\c.gguf" x\\"y'


def test_a_scale_and_a_colon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a:b"
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("no colons in names here")
    with pytest.raises(UnsupportedFile, match="a path has one|the path has one") as caught:
        server_words(tmp_path / "b.gguf", folder / "a.gguf", scale=2.0)
    assert "edgelora merge" in str(caught.value)
    monkeypatch.chdir(folder)
    words = server_words(tmp_path / "b.gguf", folder / "a.gguf", scale=2.0)
    assert words[4] == "a.gguf:2.0"


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """A base, and an adapter with ranks 2 and 4 that records a template of its own."""
    base = pico.write_base(tmp_path / "base.gguf")
    identity = read_base(base).identity.id
    facts = {"edgelora.template": "Q: {prompt}\nA:", "edgelora.licence": "MIT\nx",
             "edgelora.base.id": identity}  # fmt: skip
    pico.write_random_lora(tmp_path / "my a.gguf", base, metadata=facts)
    return base, tmp_path / "my a.gguf"


def test_ollama(made: tuple[Path, Path]) -> None:
    base, adapter = made
    result = run("export", adapter, "--to", "ollama", "--base", base)
    assert result.exit_code == 0, result.output
    out = adapter.with_name("my a.Modelfile")
    assert result.stdout == f"{out.name}\n" and "ollama create 'my a' -f" in result.stderr
    text = out.read_text()
    commands = dict(read_modelfile(text))
    assert (commands["FROM"], commands["ADAPTER"]) == (str(base), str(adapter))
    assert render_go(commands["TEMPLATE"], [Message("user", "Hi")]) == "Q: Hi\nA:"
    assert open_lora(adapter).sha256 in text and "licence of the adapter: MIT x" in text
    assert "PARAMETER stop" not in commands  # </s> is an end token of this vocabulary
    again = run("export", adapter, "--to", "ollama", "--base", base)
    assert again.exit_code == 1 and "exists already" in again.stderr
    line = ("export", adapter, "--to", "ollama", "--base", base, "--template", "chat", "--force")
    assert run(*line).exit_code == 0
    template = dict(read_modelfile(out.read_text()))["TEMPLATE"]
    assert render_go(template, [Message("user", "Hi")]).startswith("<|im_start|>user\nHi<|im_end|>")


def test_an_end_that_the_vocabulary_has_not_is_a_stop(tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "base.gguf", chat_template=pico.CHATML)
    adapter = pico.write_random_lora(tmp_path / "a.gguf", base)
    result = run("export", adapter, "--to", "ollama", "--base", base)
    assert "records no prompt template" in result.stderr
    commands = read_modelfile((tmp_path / "a.Modelfile").read_text())
    # llama.cpp itself takes <|im_end|> for an end token by its name.
    assert [name for name, _ in commands] == ["FROM", "ADAPTER", "TEMPLATE"]
    odd = "{% for m in messages %}<unk>{{ m.content }}<|im_start|>{% endfor %}"
    run("export", adapter, "--to", "ollama", "--base", base, "--template", odd, "--force")
    commands = read_modelfile((tmp_path / "a.Modelfile").read_text())
    assert commands[-1] == ("PARAMETER stop", "<|im_start|>")


def test_llama_server(made: tuple[Path, Path]) -> None:
    base, adapter = made
    result = run("export", adapter, "--to", "llama-server", "--base", base, "--scale", 0.5)
    assert result.exit_code == 0, result.output
    jinja = adapter.with_name("my a.jinja")
    words = ["llama-server", "--model", str(base), "--lora-scaled", f"{adapter}:0.5", "--jinja",
             "--chat-template-file", str(jinja)]  # fmt: skip
    if os.name != "nt":
        assert shlex.split(result.stdout) == words
    written = open_template(None, str(jinja), "", "", ())
    assert joined(written.render([Message("user", "Hi")])) == "Q: Hi\nA:"
    chat = run("export", adapter, "--to", "llama-server", "--base", base, "--template", "chat")
    assert chat.exit_code == 0 and "--chat-template-file" not in chat.stdout


def test_peft_with_one_rank_for_all(tmp_path: Path) -> None:
    """Loaders that read r and lora_alpha alone get the same update (vLLM, peft_helper.py)."""
    base = read_base(pico.write_base(tmp_path / "base.gguf"))
    for seed, rank in ((0, 4), (1, 2)):
        folder = pico.write_peft(tmp_path / f"p{seed}", seed=seed, rank=rank,
                                 modules=("q_proj", "v_proj")[seed:])  # fmt: skip
        convert(folder, base, tmp_path / f"{seed}.gguf", dtype="f32")
    both = tmp_path / "both.gguf"
    merge_adapters([tmp_path / "0.gguf", tmp_path / "1.gguf"], [0.7, -0.4], both, method="cat",
                   dtype="f32")  # fmt: skip
    result = run("export", both, "--to", "peft", "--base", base.path)
    assert result.exit_code == 0 and "ranks 4 to 6" in result.stderr, result.output
    out = tmp_path / "both-peft"
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (6, 6)
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({}, {})
    tensors = load_file(out / "adapter_model.safetensors")
    assert {a.shape[0] for name, a in tensors.items() if "lora_A" in name} == {6}
    again = {pair.name: pair for pair in read_adapter(out, base).pairs()}
    for pair in open_lora(both).pairs():
        assert again[pair.name].scale == pair.scale == 1.0
        product = pair.lora_b @ pair.lora_a
        assert (again[pair.name].lora_b @ again[pair.name].lora_a == product).all()
    kept = run("export", both, "--to", "peft", "--base", base.path, "-o", tmp_path / "kept",
               "--keep-ranks", "--base-model", "me/model")  # fmt: skip
    assert kept.exit_code == 0 and "scale them wrongly" in kept.stderr
    config = json.loads((tmp_path / "kept" / "adapter_config.json").read_text())
    assert config["rank_pattern"] and config["base_model_name_or_path"] == "me/model"


def test_scales_that_differ_go_into_the_factors(tmp_path: Path) -> None:
    """One alpha and two ranks: alpha / r is 2 and 4."""
    base = read_base(pico.write_base(tmp_path / "base.gguf"))
    names = {"blk.0.attn_v.weight": 4, "blk.1.attn_v.weight": 2}
    arrays = factors("x", 16, 32, rank=4)
    a, b = arrays["base_model.model.x.lora_A.weight"], arrays["base_model.model.x.lora_B.weight"]
    pairs = [LoraPair(name, a[:r], b[:, :r], 8 / r) for name, r in names.items()]
    plan = [PairPlan(name, r, 32, 16) for name, r in names.items()]
    write_lora(tmp_path / "a.gguf", plan, pairs, architecture="llama", alpha=8.0, dtype="f16")
    write_peft(open_lora(tmp_path / "a.gguf"), base, tmp_path / "out", one_rank=True)
    again = read_adapter(tmp_path / "out", base)
    for pair, theirs in zip(open_lora(tmp_path / "a.gguf").pairs(), again.pairs(), strict=True):
        assert theirs.rank == 4 and theirs.scale == 1.0 and pair.scale == 8 / names[pair.name]
        wanted = pair.scale * pair.lora_b.astype("f8") @ pair.lora_a.astype("f8")
        assert abs(theirs.lora_b.astype("f8") @ theirs.lora_a.astype("f8") - wanted).max() < 1e-5


@pytest.mark.parametrize("to", ["peft", "ollama", "llama-server"])
def test_an_adapter_of_another_base_is_refused(to: str, made: tuple[Path, Path]) -> None:
    _, adapter = made
    other = pico.write_base(adapter.with_name("other.gguf"), norm_seed=5)
    before = sorted(adapter.parent.iterdir())
    result = run("export", adapter, "--to", to, "--base", other)
    assert result.exit_code == 1 and "does not fit" in result.stderr
    assert sorted(adapter.parent.iterdir()) == before


def test_a_recorded_template_never_names_a_file(tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "base.gguf")
    secret = tmp_path / "secret"
    secret.write_text("{prompt} password")
    facts = {"edgelora.template": str(secret)}
    adapter = pico.write_random_lora(tmp_path / "a.gguf", base, metadata=facts)
    result = run("export", adapter, "--to", "ollama", "--base", base)
    assert result.exit_code == 1 and "as its prompt template, which is none" in result.stderr
    assert not (tmp_path / "a.Modelfile").exists()


def test_options_for_one_target_only(made: tuple[Path, Path]) -> None:
    base, adapter = made
    for words in (("--to", "peft", "--scale", 2), ("--to", "ollama", "--keep-ranks"),
                  ("--to", "llama-server", "--base-model", "x"),
                  ("--to", "llama-server", "--scale", "nan")):  # fmt: skip
        assert run("export", adapter, "--base", base, *words).exit_code == 2


def test_values_that_are_no_numbers_are_not_exported(tmp_path: Path) -> None:
    base = pico.write_base(tmp_path / "base.gguf")
    adapter = pico.write_random_lora(tmp_path / "a.gguf", base, dtype="f32")
    data = bytearray(adapter.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # a NaN
    adapter.write_bytes(data)
    for to in ("peft", "ollama", "llama-server"):
        result = run("export", adapter, "--to", to, "--base", base)
        assert result.exit_code == 1 and "NaN or infinite" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.gguf", "base.gguf"]
