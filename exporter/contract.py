"""The op contract, written once: what every graph, kernel and plugin agrees on.

Dimension letters, the same in documents, Python, C++ and CUDA:

=== =====================================
B   batch
S   sequence
D   hidden_size
V   vocab_size
M   num_codebooks
K   num_codes per codebook
=== =====================================
"""

from __future__ import annotations

from typing import Final

DOMAIN: Final = "com.vqlogits"
"""ONNX domain of the ops and namespace of the plugins."""

VERSION: Final = 1
"""Opset version of the domain; the plugin version is its decimal string."""

GATHER_SCATTER: Final = "VQGatherScatter"
GATHER_SCATTER_INPUTS: Final = ("code_logits", "codes", "bias")
"""code_logits T [.., M*K], codes int32 [V, M], bias T [V] (optional)."""
GATHER_SCATTER_OUTPUTS: Final = ("logits",)
"""logits T [.., V]."""
NUM_CODEBOOKS: Final = "num_codebooks"
"""Integer attribute of every op: M."""

TOP_K: Final = "VQTopK"
TOP_K_INPUTS: Final = GATHER_SCATTER_INPUTS
TOP_K_OUTPUTS: Final = ("values", "ids", "logsumexp")
"""values float32 [.., k] falling, equal ones by rising id; ids int64 [.., k]; logsumexp float32 [..] over all V."""
NUM_BEST: Final = "k"
"""Integer attribute of `VQTopK`: 1 to MAX_BEST, at most V."""
MAX_BEST: Final = 256

SAMPLE: Final = "VQSample"
SAMPLE_INPUTS: Final = (*GATHER_SCATTER_INPUTS, "temperature", "uniform")
"""The same three, temperature float32 [1] above 0, uniform float32 [..] in [0, 1)."""
SAMPLE_OUTPUTS: Final = ("ids", "logprob")
"""ids int64 [..]; logprob float32 [..] under softmax(logits / temperature)."""

CODE_BITS: Final = "code_bits"
"""Plugin form only: 8 or 16, the width of the packed code ids."""
VOCAB_SIZE: Final = "vocab_size"
"""Plugin form only: V, which the packed codes no longer show."""
PLUGIN_NAMESPACE: Final = "plugin_namespace"
PLUGIN_VERSION: Final = "plugin_version"

KINDS: Final = ("single", "product", "additive")
DTYPES: Final = ("fp32", "fp16", "bf16")

CONFIG_SECTION: Final = "vq_logits"
"""Section of the Hugging Face config that describes the head."""
CHECKPOINT_FORMAT: Final = "vq-logits"
CHECKPOINT_VERSION: Final = 1
HEAD_PREFIX: Final = "lm_head."
"""Where a checkpoint keeps the head's tensors: lm_head.codebook, .codes, .bias, .rotation."""


def code_bits(num_codes: int) -> int:
    """Width in bits of a packed code id: 8 up to 256 codes, 16 up to 65,536, else 32."""
    if num_codes <= 1 << 8:
        return 8
    return 16 if num_codes <= 1 << 16 else 32
