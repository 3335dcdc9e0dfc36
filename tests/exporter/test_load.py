"""Checkpoint files: what is written comes back, and what is damaged is refused with one helpful line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import checkpoints
import pytest
import torch
from checkpoints import DAMAGES, Damage, save_dense, save_tiny, sound_data, tiny_model, write_folder, write_pt

from export_vq.checkpoint import read_checkpoint
from export_vq.embedding import VQEmbedding
from export_vq.errors import UserError
from export_vq.head import VQHead
from export_vq.load import TESTED_MODEL_TYPES, LoadedModel, load_dense, load_model, save_model, tie_embedding

IDS = torch.tensor([[5, 9, 20, 33, 50, 61, 7, 8, 90, 12, 13, 77]])


def logits(loaded: LoadedModel) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(IDS).logits


# ---------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("model_type", TESTED_MODEL_TYPES)
def test_every_architecture_comes_back_from_a_file_with_the_same_logits(tmp_path, model_type):
    saved = save_tiny(tmp_path / "model.pt", model_type)
    loaded = load_model(tmp_path / "model.pt")
    assert loaded.spec == saved.spec
    assert loaded.model_type == model_type
    assert torch.equal(logits(loaded), logits(saved))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("single", {}),
        ("single", {"bias": False}),
        ("product", {"rotation": True}),
        ("additive", {"bias": False}),
    ],
)
def test_a_file_and_a_folder_hold_the_same_model(tmp_path, kind, options):
    save_tiny(tmp_path / "model.pt", "qwen2", kind, **options)
    from_file = load_model(tmp_path / "model.pt")
    save_model(from_file, tmp_path / "folder")
    from_folder = load_model(tmp_path / "folder")
    assert from_folder.spec == from_file.spec
    assert from_folder.config == from_file.config
    assert from_folder.tokenizer_files == from_file.tokenizer_files
    assert torch.equal(logits(from_folder), logits(from_file))


def test_a_folder_may_be_split_into_shards(tmp_path):
    path = write_folder(tmp_path, sound_data(), shards=3)
    assert len(list(path.glob("model-*.safetensors"))) == 3
    assert torch.equal(logits(load_model(path)), logits(tiny_model("llama", "product", rotation=True)))


def test_third_party_names_are_read_as_ours(tmp_path):
    data = sound_data("single")
    tensors = data["state_dict"]
    tensors["vq.codebook_C"] = tensors.pop("lm_head.codebook")[0]  # [K, D]
    tensors["vq.mapping_M"] = tensors.pop("lm_head.codes")[:, 0]  # [V]
    loaded = load_model(write_pt(tmp_path, data))
    assert loaded.notes == (
        "vq.codebook_C was read as lm_head.codebook",
        "vq.mapping_M was read as lm_head.codes",
    )
    assert torch.equal(logits(loaded), logits(tiny_model("llama", "single")))


def test_a_soft_mapping_is_hardened_and_says_so(tmp_path):
    data = sound_data("single")
    codes = data["state_dict"].pop("lm_head.codes")
    scores = torch.rand(97, 24, generator=torch.Generator().manual_seed(0))
    data["state_dict"]["lm_head.code_scores"] = scores.scatter(1, codes.long(), 2.0)  # above all others, which are < 1
    loaded = load_model(write_pt(tmp_path, data))
    assert len(loaded.notes) == 1
    assert "lm_head.code_scores is a soft mapping" in loaded.notes[0]
    assert loaded.head is not None
    assert torch.equal(loaded.head.codes, codes)


def test_parameters_that_share_memory_in_the_file_are_apart_in_the_model(tmp_path):
    """A tensor under two names, a part of a larger one, one turned over: training one must not move another."""
    data = sound_data()
    state = data["state_dict"]
    first, second, part, turned = (f"model.layers.{i}.self_attn.{n}_proj.weight" for i in (0, 1) for n in ("q", "o"))
    state[first], state[second] = (value := torch.randn_like(state[first])), value
    state[part] = torch.stack([state[part], state[part]])[1]
    state[turned] = state[turned].T.contiguous().T
    write_pt(tmp_path, data)
    found = dict(load_model(tmp_path / "model.pt").model.named_parameters())
    for name in (first, second, part, turned):
        assert torch.equal(found[name], state[name])
        assert found[name].is_contiguous()
        assert found[name].untyped_storage().nbytes() == found[name].nbytes
    assert len({found[name].data_ptr() for name in (first, second, part, turned)}) == 4


def test_the_input_embedding_of_a_tied_model_stays_dense(tmp_path):
    data = sound_data()
    data["config"]["tie_word_embeddings"] = True
    loaded = load_model(write_pt(tmp_path, data))
    assert loaded.tied_embedding
    assert torch.equal(loaded.model.get_input_embeddings().weight, data["state_dict"]["model.embed_tokens.weight"])
    assert torch.equal(logits(loaded), logits(tiny_model("llama", "product", rotation=True)))


@pytest.mark.parametrize(("model_type", "tied"), [("gpt2", True), ("llama", False)])
def test_where_the_config_is_silent_the_architecture_decides_on_tying(model_type, tied):
    assert tiny_model(model_type).tied_embedding is tied


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_checkpoint_may_hold_any_floating_type(tmp_path, dtype):
    data = sound_data()
    tensors = data["state_dict"]
    data["state_dict"] = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    loaded = load_model(write_pt(tmp_path, data))
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, tensors[name].to(dtype).to(value.dtype)), name


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.int64]
)
def test_codes_may_have_any_integer_type(tmp_path, dtype):
    data = sound_data()
    codes = data["state_dict"]["lm_head.codes"]
    data["state_dict"]["lm_head.codes"] = codes.to(dtype)
    head = load_model(write_pt(tmp_path, data)).head
    assert head is not None
    assert head.codes.dtype == torch.int32
    assert torch.equal(head.codes, codes)


def test_half_precision_rounds_parameters_and_leaves_rotary_frequencies_alone(tmp_path):
    """Frequencies rounded to bfloat16 are off by up to 2^-9: two radians at position 1000."""
    save_tiny(tmp_path / "model.pt", "llama")
    single, half = (load_model(tmp_path / "model.pt", dtype=t).model for t in (torch.float32, torch.bfloat16))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.model.rotary_emb.inv_freq, single.model.rotary_emb.inv_freq)


def test_a_number_too_large_for_half_precision_is_refused(tmp_path):
    data = sound_data()
    data["state_dict"]["model.norm.weight"][3] = 70000.0  # float16 ends at 65504
    path = write_pt(tmp_path, data)
    load_model(path)
    with pytest.raises(UserError, match=r"model.norm.weight holds 70000.0 at \[3\], .* finite in float16"):
        load_model(path, dtype=torch.float16)


# ---------------------------------------------------------------------------------------------------- tied embeddings


@pytest.mark.parametrize("name", ["model.pt", "folder"])
@pytest.mark.parametrize("model_type", TESTED_MODEL_TYPES)
def test_a_tied_model_comes_back_without_an_embedding_in_the_file(tmp_path, model_type, name):
    saved = save_tiny(tmp_path / name, model_type, "additive", tied=True)
    loaded = load_model(tmp_path / name)
    assert loaded.spec == saved.spec
    assert loaded.spec.tie_embedding
    assert isinstance(loaded.model.get_input_embeddings(), VQEmbedding)
    assert torch.equal(logits(loaded), logits(saved))


@pytest.mark.parametrize("model_type", TESTED_MODEL_TYPES)
def test_a_tied_model_is_the_one_whose_embedding_is_the_dense_twin(model_type):
    untied = tiny_model(model_type)
    tied = tie_embedding(untied)
    with torch.no_grad():
        untied.model.get_input_embeddings().weight.copy_(untied.head.dense_twin().weight)
    assert torch.equal(logits(tied), logits(untied))
    assert tied.tied_embedding is untied.tied_embedding  # what the dense original was
    assert tie_embedding(tied) is tied


def test_tying_leaves_the_given_model_alone():
    untied = tiny_model()
    before, config = logits(untied), dict(untied.config)
    tied = tie_embedding(untied)
    with torch.no_grad():
        for parameter in tied.model.parameters():
            parameter.zero_()
    assert torch.equal(logits(untied), before)
    assert (untied.config, untied.spec.tie_embedding) == (config, False)


def test_an_embedding_of_another_width_than_the_head_cannot_be_tied():
    loaded = tiny_model()
    loaded.model.set_input_embeddings(torch.nn.Embedding(97, 16))
    with pytest.raises(
        UserError, match=r"tiny: the input embedding is \[97, 16\], expected \[97, 32\] like the head.*untied"
    ):
        tie_embedding(loaded)


def test_an_ordinary_model_cannot_be_tied(tmp_path):
    save_dense(tmp_path / "dense")
    with pytest.raises(UserError, match=r"ordinary output layer.*export-vq compress"):
        tie_embedding(load_dense(tmp_path / "dense"))


@pytest.mark.parametrize("name", ["model.pt", "folder"])
def test_a_tied_file_is_smaller_by_the_embedding(tmp_path, name):
    sizes = {}
    for tied in (False, True):
        save_tiny(tmp_path / str(tied) / name, "qwen3", tied=tied)
        files = [tmp_path / str(tied) / name, *(tmp_path / str(tied) / name).glob("*")]
        sizes[tied] = sum(file.stat().st_size for file in files if file.is_file())
    assert sizes[False] - sizes[True] > 4 * 211 * 32


@pytest.mark.parametrize("name", ["model.pt", "folder"])
@pytest.mark.parametrize(("num_codes", "bits"), [(256, 8), (257, 16), (65536, 16), (65537, 32)])
def test_code_ids_take_no_more_bits_on_disk_than_they_need(tmp_path, name, num_codes, bits):
    loaded = tiny_model("llama", "single")
    codes = torch.tensor([0, num_codes - 1, num_codes // 2]).repeat(33)[:97, None]
    head = VQHead.from_tensors("single", torch.randn(1, num_codes, 32), codes)
    loaded.model.set_output_embeddings(head)
    save_model(dataclasses.replace(loaded, head=head), tmp_path / name)
    stored = read_checkpoint(tmp_path / name)[1]["lm_head.codes"]
    assert stored.element_size() * 8 == bits
    back = load_model(tmp_path / name).head
    assert back.codes.dtype == torch.int32
    assert torch.equal(back.codes, head.codes)


# -------------------------------------------------------------------------------------------------------- damages


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.name)
def test_damage_is_refused_with_one_line_that_names_place_expectation_and_mend(tmp_path, damage: Damage):
    path = damage.make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as refusal:
        load_model(path)
    message = str(refusal.value)
    assert message.startswith(str(path))  # which file
    for words in damage.says:
        assert words in message
    assert "expected" in message
    assert "; " in message  # then the mend
    assert message.isprintable()  # one line, no escape codes
    assert len(message.removeprefix(str(path))) < 500
    # Nothing ran and nothing was left behind: the intruder of "code in the pickle" would have made a folder `ran`.
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("given", "what"), [("", "a folder of exported graphs"), ("model.onnx", "an ONNX file")])
def test_what_was_exported_is_not_taken_for_a_checkpoint(tmp_path, given, what):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a")
    with pytest.raises(UserError, match=f"{what}, expected a checkpoint.*give the one that it was made from"):
        read_checkpoint(tmp_path / given)


def test_the_intruder_would_make_itself_known(tmp_path):
    """The check above can fail: without protection, reading the same file does run the code in it."""
    damage = next(d for d in DAMAGES if d.name == "code in the pickle")
    torch.load(damage.make(tmp_path), weights_only=False)
    assert (tmp_path / "ran").is_dir()


def test_the_sound_originals_of_the_damages_load(tmp_path):
    """Each damage is one change away from these, so it is that change that is refused."""
    for kind in ("single", "product"):
        (tmp_path / kind).mkdir()
        assert load_model(write_pt(tmp_path / kind, sound_data(kind))).spec.kind == kind
        assert load_model(write_folder(tmp_path / kind, sound_data(kind))).spec.kind == kind


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bytes_are_refused_or_harmless(tmp_path, seed):
    """Bytes changed anywhere in a real file: a model that differs in numbers only, or a refusal; never another error."""
    path = write_pt(tmp_path, sound_data())
    random = torch.Generator().manual_seed(seed)
    content = bytearray(path.read_bytes())
    for at in torch.randint(0, len(content), (30,), generator=random).tolist():
        content[at] = int(torch.randint(0, 256, (1,), generator=random))
    path.write_bytes(content)
    refusal = ""
    try:
        assert load_model(path).spec == tiny_model("llama", "product", rotation=True).spec
    except UserError as error:
        refusal = str(error)
    assert not refusal or (refusal.startswith(str(path)) and refusal.isprintable())


# ------------------------------------------------------------------------------------------------------ tokenizers


TEXT = "Hello, the other thing {x} costs 12 + 3?"


@pytest.mark.parametrize("model_type", TESTED_MODEL_TYPES)
def test_the_tokenizer_in_the_checkpoint_reads_text_and_gives_it_back(tmp_path, model_type):
    save_tiny(tmp_path / "model.pt", model_type)
    loaded = load_model(tmp_path / "model.pt")
    tokenizer = loaded.tokenizer()
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert max(ids) < loaded.spec.vocab_size
    assert len(ids) <= len(TEXT)


def with_tokenizer(**files: str) -> LoadedModel:
    return dataclasses.replace(tiny_model("gpt2"), tokenizer_files=files)


def test_a_tokenizer_of_vocab_and_merges_is_read_by_its_class():
    letters = {chr(c): c - 33 for c in range(33, 127)} | {"Ġ": 94, "<|endoftext|>": 95}
    loaded = with_tokenizer(
        **{
            "vocab.json": json.dumps(letters),
            "merges.txt": "#version: 0.2\n",
            "tokenizer_config.json": json.dumps({"tokenizer_class": "GPT2Tokenizer"}),
        }
    )
    tokenizer = loaded.tokenizer()
    assert tokenizer.encode("hi you") == [letters[c] for c in "hiĠyou"]
    assert tokenizer.decode(tokenizer.encode("hi you")) == "hi you"


def test_a_tokenizer_that_names_code_of_its_own_is_read_without_it():
    files = checkpoints.tiny_tokenizer_files(97)
    settings = {**json.loads(files["tokenizer_config.json"]), "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]}}
    loaded = with_tokenizer(**{**files, "tokenizer_config.json": json.dumps(settings)})
    assert type(loaded.tokenizer()).__module__.startswith("transformers.")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "no tokenizer in the checkpoint"),
        ({"tokenizer_config.json": "{}"}, "no tokenizer in the checkpoint"),
        ({"vocab.json": "{}", "merges.txt": ""}, "the tokenizer cannot be read"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "{"}, "the tokenizer cannot be read"),
        ({"tokenizer.json": "{}", "vocab.txt": "\ud800"}, "the tokenizer cannot be read"),
        (
            {"vocab.json": "{}", "tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["code.Tokenizer", null]}}'},
            "the tokenizer cannot be read",
        ),
    ],
)
def test_a_tokenizer_that_cannot_be_had_is_named(files, says):
    with pytest.raises(UserError) as refusal:
        with_tokenizer(**files).tokenizer()
    assert str(refusal.value).startswith(f"tiny: {says}")
    assert "save the model again" in str(refusal.value)
    assert str(refusal.value).isprintable()


# --------------------------------------------------------------------------------------------------------- writing


@pytest.mark.parametrize("name", ["model.pt", "model"])
def test_writing_again_replaces_and_leaves_nothing_beside(tmp_path, name):
    save_tiny(tmp_path / name, seed=1)
    saved = save_tiny(tmp_path / name, seed=2)
    assert [child.name for child in tmp_path.iterdir()] == [name]
    assert torch.equal(logits(load_model(tmp_path / name)), logits(saved))


def test_a_folder_that_holds_other_things_is_not_overwritten(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis.txt.*-o"):
        save_tiny(tmp_path)
    assert [child.name for child in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_file_is_not_written_over_a_folder_nor_a_folder_over_a_file(tmp_path):
    (tmp_path / "model.pt").mkdir()
    (tmp_path / "model").write_text("a file")
    for name, says in (
        ("model.pt", "this is a folder, expected a file name"),
        ("model", "this is a file, expected a f"),
    ):
        with pytest.raises(UserError, match=says):
            save_tiny(tmp_path / name)
    assert (tmp_path / "model").read_text() == "a file"


def test_an_ordinary_model_cannot_be_written_as_a_vq_checkpoint(tmp_path):
    save_dense(tmp_path / "dense")
    with pytest.raises(UserError, match=r"ordinary output layer.*export-vq compress"):
        save_model(load_dense(tmp_path / "dense"), tmp_path / "model.pt")
    assert not (tmp_path / "model.pt").exists()


# ----------------------------------------------------------------------------------------------------- dense models


@pytest.mark.parametrize(("model_type", "tied"), [("llama", False), ("llama", True), ("gpt2", True), ("opt", False)])
def test_a_dense_model_is_read_as_transformers_reads_it(tmp_path, model_type, tied):
    model = save_dense(tmp_path / "dense", model_type, tied=tied)
    loaded = load_dense(tmp_path / "dense")
    assert loaded.head is None
    assert loaded.tied_embedding is tied
    assert loaded.tokenizer().decode(loaded.tokenizer().encode(TEXT)) == TEXT
    with torch.no_grad():
        assert torch.allclose(logits(loaded), model(IDS).logits, rtol=0, atol=1e-4)  # another attention kernel


def _without(name: str):
    def change(path: Path) -> None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(path / "model.safetensors")
        del tensors[name]
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})

    return change


def _config(**fields):
    def change(path: Path) -> None:
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, **fields}))

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda path: (path / "config.json").unlink(), "expected a .gguf file or a folder with config.json"),
        (lambda path: (path / "config.json").write_text("{"), "expected valid JSON"),
        (_config(model_type="bert"), "config.model_type is 'bert', which is not supported"),
        (_config(quantization_config={"quant_method": "gptq", "bits": 4}), "plain weights were expected"),
        (lambda path: (path / "model.safetensors").write_bytes(b"\xff" * 64), "expected a causal language model"),
        (lambda path: (path / "model.safetensors").unlink(), "expected a causal language model"),
        (_without("model.norm.weight"), "tensor model.norm.weight is missing"),
        (_config(hidden_size=48), "expected a causal language model"),
        (_config(num_hidden_layers=3), "is missing (9 such)"),
    ],
)
def test_a_dense_model_that_cannot_be_used_is_refused(tmp_path, change, says):
    path = tmp_path / "dense"
    save_dense(path)
    change(path)
    with pytest.raises(UserError) as refusal:
        load_dense(path)
    assert str(refusal.value).startswith(str(path))
    assert says in str(refusal.value)
    assert str(refusal.value).isprintable()


def test_a_damaged_gguf_file_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + b"\xff" * 60)
    with pytest.raises(UserError, match="expected a causal language model") as refusal:
        load_dense(path)
    assert str(refusal.value).startswith(str(path))
    assert str(refusal.value).isprintable()


def test_a_gguf_file_is_read_with_its_tokenizer(tmp_path):
    tensors = checkpoints.write_gguf(tmp_path / "model.gguf")
    loaded = load_dense(tmp_path / "model.gguf")
    assert (loaded.model_type, loaded.tied_embedding, loaded.head) == ("llama", True, None)
    rows = loaded.model.get_input_embeddings().weight.detach().numpy()
    assert (rows == tensors["token_embd.weight"]).all()
    assert loaded.tokenizer()("them")["input_ids"] == [2, 3 + ord("e") - 33, 3 + ord("m") - 33]
    assert logits(loaded).isfinite().all()
