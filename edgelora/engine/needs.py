"""What memory a base takes, estimated from its header before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gguf import GGMLQuantizationType

from edgelora.adapters.base import read_base
from edgelora.gguf_file import open_gguf

_PLAIN = {GGMLQuantizationType[name] for name in ("F32", "F16", "BF16")}
_F16_BYTES, _F32_BYTES = 2, 4
_COMFORTABLE = 1.5


@dataclass(frozen=True)
class Needs:
    """Memory of an open base. NOT covered: adapters (small) and the graph's own buffers (small).

    Attributes:
        weights_bytes: the tensors, memory-mapped: shared pages that the system may drop and read
            again.
        repacked_bytes: at most so much of them is copied into private memory in the layout that
            this CPU multiplies fastest; 0 with --low-ram.
        kv_bytes: keys and values of `n_ctx` tokens in F16 (less where a window slides).
        logits_bytes: the output rows of a batch of `n_batch` tokens.
    """

    n_ctx: int
    n_batch: int
    weights_bytes: int
    repacked_bytes: int
    kv_bytes: int
    logits_bytes: int

    @property
    def private_bytes(self) -> int:
        """What must be in RAM, repacked copies aside."""
        return self.kv_bytes + self.logits_bytes

    def verdict(self, available_bytes: int) -> str:
        """One sentence on what fits `available_bytes` of RAM."""
        if self.private_bytes + self.weights_bytes <= available_bytes:
            return "fits"
        if self.private_bytes <= available_bytes:
            return (
                "fits only with --low-ram, and slowly: the weights do not stay in RAM and are "
                "read from the disk again for each batch"
            )
        return "does not fit: use a smaller base"


def needs_of(path: Path, *, n_ctx: int = 4096, n_batch: int = 512) -> Needs:
    """Estimate from the header alone.

    Raises:
        InvalidFile, UnsupportedFile: as adapters.base.read_base does.
    """
    base = read_base(path)
    tensors = open_gguf(path).tensors.values()
    matrices = [t for t in tensors if len(t.shape) == 2 and t.name != "token_embd.weight"]
    return Needs(
        n_ctx=n_ctx,
        n_batch=n_batch,
        weights_bytes=sum(tensor.size_bytes for tensor in tensors),
        repacked_bytes=sum(t.size_bytes for t in matrices if t.ggml_type not in _PLAIN),
        kv_bytes=2 * base.n_layer * base.n_head_kv * base.head_dim * _F16_BYTES * n_ctx,
        logits_bytes=n_batch * base.n_vocab * _F32_BYTES,
    )


def shortage(path: Path, available_bytes: int) -> str:
    """Why the weights of a base should stay mapped; "" where the free memory is ample.

    Repacked copies may take as much as the file, and the file's pages want to stay in RAM too.
    """
    size_bytes = path.stat().st_size
    if available_bytes >= _COMFORTABLE * size_bytes:
        return ""
    return (
        f"{available_bytes / 1e9:.2f} GB of RAM are free, less than {_COMFORTABLE:g} times the "
        f"{size_bytes / 1e9:.2f} GB of {path.name}: --low-ram was chosen, which takes less memory "
        "and is slower (--no-low-ram chooses otherwise)"
    )
