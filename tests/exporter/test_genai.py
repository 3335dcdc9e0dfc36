"""onnxruntime-genai, the stock package, on an output folder: the tokens that PyTorch writes."""

import json
import shutil

import bundles
import pytest
import torch

from export_vq.files import write_text
from export_vq.genai import refusal, write_genai_config
from export_vq.records import OnnxArtifact
from export_vq.runners import native_library

TEXT = "thecat,andthehat"  # the package's own tokenizer code reads the same file; characters keep it honest


def _greedy(ids, count):
    """What transformers' generate writes: token ids."""
    model = bundles.llama().model
    with torch.inference_mode():
        rows = torch.tensor(ids)
        made = model.generate(
            rows, attention_mask=torch.ones_like(rows), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
    return made[:, rows.shape[1] :].tolist()


def _written(og, model, rows, count):
    """Greedy continuations of token rows of one length."""
    params = og.GeneratorParams(model)
    width = len(rows[0])
    params.set_search_options(max_length=width + count, batch_size=len(rows), do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens(rows)
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(i)[width:]] for i in range(len(rows))]


@pytest.fixture(scope="module")
def og():
    return pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is in the extra 'dev'")


def _with_an_end_not_in(out, continuations):
    """The tiny model meets its end token by chance; nothing may stop a comparison."""
    config = json.loads((out / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = min(set(range(97)) - {token for row in continuations for token in row})
    (out / "genai_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("last_token", [False, True])
def test_the_stock_package_writes_the_tokens_of_pytorch(og, tmp_path, last_token):
    shutil.copytree(bundles.exported(last_token=last_token), tmp_path, dirs_exist_ok=True)
    ids = bundles.llama().tokenizer()(TEXT)["input_ids"]
    both = [ids, [(7 * token + 3) % 97 for token in ids]]
    expected = _greedy(both, 24)
    _with_an_end_not_in(tmp_path, expected)
    model = og.Model(str(tmp_path))
    assert [int(token) for token in og.Tokenizer(model).encode(TEXT)] == ids
    assert _written(og, model, [ids], 24) == expected[:1]
    assert _written(og, model, both, 24) == expected


def test_with_the_bundles_library_the_native_kernel_runs_the_head(og, tmp_path):
    library = native_library()
    if library is None:
        pytest.skip("libvq_ort.so is not built; run: export-vq plugins build")
    shutil.copytree(bundles.exported(), tmp_path, dirs_exist_ok=True)
    expected = _greedy([[5, 9, 40, 17]], 8)
    _with_an_end_not_in(tmp_path, expected)
    (tmp_path / "lib").mkdir()
    shutil.copy(library.path, tmp_path / "lib")
    config = og.Config(str(tmp_path))
    session = {"custom_ops_library": "lib/libvq_ort.so", "enable_profiling": str(tmp_path / "profile")}
    config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
    model = og.Model(config)
    assert _written(og, model, [[5, 9, 40, 17]], 8) == expected
    del model  # writes the profile
    (profile,) = tmp_path.glob("profile*")
    ran = [event.get("args", {}).get("op_name") for event in json.loads(profile.read_text())]
    assert "VQGatherScatter" in ran


def test_the_config_says_what_the_graph_and_the_generation_config_say(tmp_path):
    shutil.copytree(bundles.exported(), tmp_path, dirs_exist_ok=True)
    artifact = OnnxArtifact.load(tmp_path / "model.onnx.json")
    write_text(
        tmp_path / "generation_config.json",
        json.dumps({"eos_token_id": [2, 3], "do_sample": True, "top_p": 0.9, "pad_token_id": None}),
    )
    write_genai_config(tmp_path, artifact, bundles.llama().config)
    told = json.loads((tmp_path / "genai_config.json").read_text())
    decoder = told["model"]["decoder"]
    assert (told["model"]["eos_token_id"], told["model"]["pad_token_id"], told["model"]["bos_token_id"]) == (
        [2, 3],
        2,
        1,
    )
    assert (told["search"]["do_sample"], told["search"]["top_p"], told["search"]["temperature"]) == (True, 0.9, 1.0)
    assert (told["model"]["vocab_size"], told["model"]["context_length"]) == (97, 64)
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 2, 8)
    named = [name % i if "%d" in name else name for i in (0, 1) for name in decoder["inputs"].values()]
    assert set(named) == set(artifact.input_names)
    named = [name % i if "%d" in name else name for i in (0, 1) for name in decoder["outputs"].values()]
    assert set(named) == set(artifact.output_names)


def test_a_graph_that_genai_cannot_run_gets_no_config_and_a_reason(tmp_path):
    out = bundles.exported("topk", last_token=True)
    assert not (out / "genai_config.json").exists()
    assert "gives topk; export with --output logits" in refusal(OnnxArtifact.load(out / "model.onnx.json"))
    shutil.copytree(out, tmp_path, dirs_exist_ok=True)
    (tmp_path / "genai_config.json").write_text("of the graph that was there before")
    write_genai_config(tmp_path, OnnxArtifact.load(out / "model.onnx.json"), bundles.llama().config)
    assert not (tmp_path / "genai_config.json").exists()
