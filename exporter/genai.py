"""`genai_config.json`: what the stock onnxruntime-genai package needs to load an output folder and write text with it.

The graph is the folder's own model.onnx: genai hands it to ONNX Runtime, which inlines the head's function or, with
`custom_ops_library`, runs our kernels. Fields: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from export_vq.files import write_text
from export_vq.records import OnnxArtifact

FILE = "genai_config.json"
_SEARCH = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.0}
"""What generation_config.json may say about the search, with Hugging Face's defaults."""


def refusal(artifact: OnnxArtifact) -> str:
    """Why onnxruntime-genai cannot run a graph, with the mend; '' when it can."""
    if artifact.form == "plugin":
        return "the plugin form runs in TensorRT only; export with --form portable"
    if artifact.output != "logits":
        return (
            f"it chooses tokens from logits itself, and this graph gives {artifact.output}; export with --output logits"
        )
    if len(set(artifact.cache_shapes)) != 1:
        return "it takes one shape of KV cache for all layers, and this model's layers differ; use export-vq generate"
    return ""


def write_genai_config(folder: Path, artifact: OnnxArtifact, config: dict[str, Any]) -> None:
    """Write `genai_config.json` beside an exported graph; remove an old one where genai cannot run the graph.

    Args:
        folder: holds the graph, and generation_config.json where the model has one.
        artifact: the graph's record.
        config: the Hugging Face config.
    """
    if refusal(artifact):
        (folder / FILE).unlink(missing_ok=True)
        return
    told = folder / "generation_config.json"
    generation = json.loads(told.read_text(encoding="utf-8")) if told.is_file() else {}
    made = _config(artifact, config, generation)
    write_text(folder / FILE, json.dumps(made, indent=2) + "\n")


def _config(artifact: OnnxArtifact, config: dict[str, Any], generation: dict[str, Any]) -> dict[str, Any]:
    heads, head_size = artifact.cache_shapes[0]
    context = config.get("max_position_embeddings") or config.get("n_positions") or config.get("n_ctx")
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in artifact.input_names}
    ids = {name: generation.get(name, config.get(name)) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    ends = ids["eos_token_id"]
    if ids["pad_token_id"] is None:  # genai wants one; what is padded is masked
        ids["pad_token_id"] = ends[0] if isinstance(ends, list) else ends
    search = {name: default if (v := generation.get(name)) is None else v for name, default in _SEARCH.items()}
    return {
        "model": {
            "type": "decoder",  # any decoder with these inputs; genai does nothing of its own for one architecture
            "vocab_size": artifact.spec.vocab_size,
            "context_length": context,
            **{name: value for name, value in ids.items() if value is not None},
            "decoder": {
                "filename": artifact.path,
                "hidden_size": config.get("hidden_size") or config.get("n_embd"),
                "head_size": head_size,
                "num_attention_heads": config.get("num_attention_heads") or config.get("n_head"),
                "num_key_value_heads": heads,
                "num_hidden_layers": len(artifact.cache_shapes),
                "inputs": {
                    **inputs,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
            },
        },
        # One buffer for past and present wants attention ops that write in place; this graph returns a longer cache.
        "search": {**search, "max_length": context, "num_beams": 1, "past_present_share_buffer": False},
    }
