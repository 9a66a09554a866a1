"""What a person may choose about a server: an address, files, memory and limits."""

from __future__ import annotations

import ipaddress
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgelora.errors import EdgeLoRAError, NotFound

KEY_VARIABLE = "EDGELORA_API_KEY"


@dataclass(frozen=True)
class RequestLimits:
    """What one request may ask for; past a limit the answer is 400 (413 for the body).

    Attributes:
        max_body_bytes: large enough that an overlong prompt is told so with its number of tokens.
        max_n: answers to one prompt.
        max_stop: stop strings, and max_stop_bytes: UTF-8 bytes of each.
        max_schema_bytes, max_grammar_bytes: of a JSON schema and of a GBNF text.
        max_top_logprobs: alternatives at each token.
        max_logit_bias: tokens that are biased.
        max_scale: absolute value of an adapter's scale.
        max_adapters: adapters that one request combines.
        max_inputs: texts of one embeddings request, prompts of one completions request.
        max_tools: functions that one request offers.
    """

    max_body_bytes: int = 8 << 20
    max_n: int = 16
    max_stop: int = 16
    max_stop_bytes: int = 1024
    max_schema_bytes: int = 64 << 10
    max_grammar_bytes: int = 64 << 10
    max_top_logprobs: int = 20
    max_logit_bias: int = 1024
    max_scale: float = 100.0
    max_adapters: int = 16
    max_inputs: int = 2048
    max_tools: int = 128


@dataclass(frozen=True)
class Timeouts:
    """How long a client or an operator is waited for, in seconds.

    Attributes:
        request_s: from the first byte of a request to its last.
        write_s: for a client to read anything of an answer.
        keep_alive_s: between two requests of one connection.
        drain_s: for running requests, once the server is told to end.
    """

    request_s: float = 60.0
    write_s: float = 30.0
    keep_alive_s: float = 30.0
    drain_s: float = 30.0


@dataclass(frozen=True)
class Settings:
    """One server.

    Attributes:
        base: the GGUF file, and base_id: its id among the models ("" for the file's stem).
        adapters: GGUF LoRA files, and names of the bank's, that are loaded at the start; each is
            a model id by its stem.
        bank: a bank whose adapters for this base are known, and loaded when first asked for.
        adapter_folder: where POST /v1/adapters may load from; None for the bank's folder, or for
            nowhere where there is no bank.
        load_all: load the bank's adapters at the start.
        max_loaded: adapters in memory at once; past it the longest unused one of the bank leaves.
        host, port: 0 takes a free port.
        api_keys: any of them is accepted; () for an open server.
        cors_origins: origins of web pages on other sites that may use the server; "*" for all.
        n_slots, n_ctx: requests at once, and tokens of each (prompt and answer); 0 for what fits
            the free memory.
        kv_type: of the keys and values: f16, q8_0, q4_0, or f32 (no flash attention).
        cache_bytes: memory beside the KV cache for prefixes of finished requests, at most.
        low_ram: weights stay memory-mapped (None: the free memory decides, see
            engine.model.ModelOptions); mlock: they are locked in RAM.
        max_queue: requests that may wait; queue_timeout_s: and for how long.
        template: of the prompts; None for the base's own.
        n_threads: 0 for one for each physical core.
    """

    base: Path
    base_id: str = ""
    adapters: tuple[Path, ...] = ()
    bank: Path | None = None
    adapter_folder: Path | None = None
    load_all: bool = False
    max_loaded: int = 32
    host: str = "127.0.0.1"
    port: int = 8080
    api_keys: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    n_slots: int = 0
    n_ctx: int = 0
    n_batch: int = 512
    kv_type: str = "f16"
    cache_bytes: int = 256 << 20
    low_ram: bool | None = False
    mlock: bool = False
    max_queue: int = 64
    queue_timeout_s: float = 120.0
    template: str | None = None
    n_threads: int = 0
    limits: RequestLimits = field(default_factory=RequestLimits)
    timeouts: Timeouts = field(default_factory=Timeouts)

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @property
    def folder(self) -> Path | None:
        """Where POST /v1/adapters may load from."""
        if self.adapter_folder is not None or self.bank is None:
            return self.adapter_folder
        return self.bank / "adapters"


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine only."""
    name = host.strip("[]").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def read_api_keys(
    file: Path | None, environment: Mapping[str, str] = os.environ
) -> tuple[str, ...]:
    """The keys of a file, one a line, and those of EDGELORA_API_KEY, separated by commas.

    Raises:
        NotFound: no such file.
        EdgeLoRAError: a file or variable that is there and holds no key, or one that no HTTP
            header can carry: a server that was meant to be closed must not be open.
    """
    texts: list[tuple[str, list[str]]] = []
    if file is not None:
        try:
            texts.append((str(file), file.read_text(encoding="utf-8").splitlines()))
        except FileNotFoundError as error:
            raise NotFound(f"{file}: no such file of API keys") from error
        except (OSError, UnicodeDecodeError) as error:
            raise EdgeLoRAError(f"{file}: cannot be read as API keys ({error})") from error
    if KEY_VARIABLE in environment:
        texts.append((KEY_VARIABLE, environment[KEY_VARIABLE].split(",")))
    keys: list[str] = []
    for source, lines in texts:
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise EdgeLoRAError(f"{source}: holds no API key", hint="One key a line.")
        if not all(key.isascii() and key.isprintable() and " " not in key for key in found):
            raise EdgeLoRAError(f"{source}: a key of other characters than printable ASCII")
        keys += found
    return tuple(dict.fromkeys(keys))
