"""Vocabulary trimming: small tokenizers of every kind, tiny models of every architecture."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import math
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_config, tiny_model, tiny_tokenizer_files
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from export_vq.compress import CompressOptions, compress_model
from export_vq.errors import UserError
from export_vq.load import TESTED_MODEL_TYPES, LoadedModel, load_dense
from export_vq.trim import Trimmed, bits_per_byte, trim_vocabulary
from export_vq.trim.tokenizer import closure

LATIN = (
    "The quick brown fox jumps over the lazy dog; then it rests in the shade of the other trees, 12 or 345 minutes. "
    "Déjà vu: the café's naïve façade, where foxes were resting and other dogs were jumping over the quicker ones. "
)
CYRILLIC = "Быстрая лиса прыгает через ленивую собаку и отдыхает в тени других деревьев, пока собака спит. "
GREEK = "Η γρήγορη αλεπού πηδάει πάνω από τον τεμπέλη σκύλο και ξεκουράζεται στη σκιά των δέντρων. "
CORPUS = [LATIN, CYRILLIC, GREEK, "🦊🦊 🐶 über 日本語 日本", "   indented\n\n\ttwice  \n"] * 3
TEXT = LATIN * 20
SPECIAL = ["<unk>", "<s>", "</s>"]

# ---------------------------------------------------------------------------------------------------------- tokenizers


def byte_level(ignore_merges: bool = False) -> Tokenizer:
    """As GPT-2, Llama 3, Qwen and SmolLM2 have: BPE over bytes; special tokens at both ends of the ids."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=419, special_tokens=SPECIAL[:2], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.add_tokens([AddedToken("<|code|>", normalized=False)])
    tokenizer.add_special_tokens(["<|end|>"])
    tokenizer.post_processor = _ends(tokenizer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Gemma and Mistral have, converted from SentencePiece: any two tokens whose sum is one are a merge, lower ids first."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "▁")
    pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=520, special_tokens=SPECIAL + pieces, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    vocab = trained.get_vocab()
    words = sorted((token for token in vocab if token not in SPECIAL + pieces), key=vocab.__getitem__)
    merges = [
        (token[:at], token[at:])
        for token in words
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    ]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = _ends(tokenizer)
    return tokenizer


def unigram() -> Tokenizer:
    """Special tokens last, so that their ids change."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=260, special_tokens=SPECIAL, unk_token="<unk>", max_piece_length=8, show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    pieces = [(piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"]]
    pieces = pieces[3:] + pieces[:3]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=len(pieces) - 3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", len(pieces) - 1), ("<s>", len(pieces) - 2))
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=340, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 1))
    return tokenizer


def _ends(tokenizer: Tokenizer) -> processors.PostProcessor:
    ends = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    return processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)


TOKENIZERS = {
    "byte-level": byte_level,
    "byte-level, whole words first": functools.partial(byte_level, ignore_merges=True),
    "byte fallback": byte_fallback,
    "unigram": unigram,
    "word pieces": word_piece,
}


@functools.cache
def files_of(kind: str) -> dict[str, str]:
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
    tokenizer = TOKENIZERS[kind]()
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("</s>"), pad_token="</s>")
    return {"tokenizer.json": tokenizer.to_str(), "tokenizer_config.json": json.dumps(config)}


def dense_model(
    files: dict[str, str], model_type: str = "llama", tied: bool = False, surplus: int = 5, **fields: Any
) -> LoadedModel:
    """A tiny ordinary model with this tokenizer and `surplus` rows that no token has."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = Tokenizer.from_str(files["tokenizer.json"])
    v, start, end = tokenizer.get_vocab_size() + surplus, *map(tokenizer.token_to_id, ("<s>", "</s>"))
    ids = {"bos_token_id": start, "eos_token_id": end, "pad_token_id": end}
    config = AutoConfig.for_model(
        **{**tiny_config(model_type), **ids, "vocab_size": v, "tie_word_embeddings": tied, **fields}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return LoadedModel(model, None, model.config.to_dict(), dict(files), "tiny", "")


@functools.cache
def trimmed_pair(kind: str, keep: str) -> tuple[Any, Any, Trimmed]:
    """The full tokenizer, the trimmed one, and what trimming gave."""
    dense = dense_model(files_of(kind))
    trimmed = trim_vocabulary(dense, keep, TEXT)
    return dense.tokenizer(), trimmed.model.tokenizer(), trimmed


def write(loaded: LoadedModel, folder: Path) -> None:
    loaded.model.save_pretrained(folder)
    for name, content in loaded.tokenizer_files.items():
        (folder / name).write_text(content, encoding="utf-8")


def encoded(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def decoded(tokenizer: Any, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def logits(loaded: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(input_ids=ids).logits


# ------------------------------------------------------------------------------------------------------- the tokenizer

texts = st.text(max_size=30) | st.lists(
    st.sampled_from([*" ".join(CORPUS[:5]).split(), " ", "\n", "the", "<s>", "<|code|>"]), max_size=12
).map(" ".join)
EVERY_KIND = [(kind, keep) for kind in TOKENIZERS for keep in ("1", "40", "script:latin", "script:cyrillic,greek")]


@pytest.mark.parametrize(("kind", "keep"), EVERY_KIND)
@settings(max_examples=25, deadline=None)
@given(text=texts)
def test_any_text_encodes_and_comes_back(kind: str, keep: str, text: str) -> None:
    full, small, trimmed = trimmed_pair(kind, keep)
    ids = encoded(small, text)
    assert all(i < len(trimmed.kept) for i in ids)
    assert decoded(small, ids) == decoded(full, encoded(full, text))
    if kind.startswith("byte-level"):
        assert decoded(small, ids) == text


@pytest.mark.parametrize(("kind", "keep"), EVERY_KIND)
def test_tokens_that_could_be_reached_still_can(kind: str, keep: str) -> None:
    full, small, trimmed = trimmed_pair(kind, keep)
    before, after = full.backend_tokenizer.model, small.backend_tokenizer.model
    tokens = full.convert_ids_to_tokens(trimmed.kept.tolist())
    assert small.convert_ids_to_tokens(range(len(tokens))) == tokens
    reached = [token for token in tokens if [piece.value for piece in before.tokenize(token)] == [token]]
    assert reached
    for token in reached:
        assert [piece.value for piece in after.tokenize(token)] == [token]


latin_texts = st.text("aefhinortux éïàđŘ.,!?0123🦊\n", max_size=40) | st.lists(
    st.sampled_from(LATIN.split()), max_size=20
).map(" ".join)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=25, deadline=None)
@given(text=latin_texts)
def test_a_text_in_the_kept_script_is_encoded_as_before(kind: str, text: str) -> None:
    full, small, trimmed = trimmed_pair(kind, "script:latin")
    assert trimmed.kept[encoded(small, text)].tolist() == encoded(full, text)
    assert len(encoded(small, CYRILLIC)) > len(encoded(full, CYRILLIC))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_added_tokens_and_templates_follow(kind: str) -> None:
    full, small, trimmed = trimmed_pair(kind, "1")
    assert set(small.get_added_vocab()) == set(full.get_added_vocab())
    for name in ("unk_token", "bos_token", "eos_token", "pad_token"):
        assert getattr(small, name) == getattr(full, name)
    text = "a fox"
    kept = trimmed.kept[small(text)["input_ids"]].tolist()
    assert (kept[0], kept[-1]) == (full.bos_token_id, full.eos_token_id)
    # And for readers of tokenizer.json alone.
    raw = Tokenizer.from_str(trimmed.model.tokenizer_files["tokenizer.json"])
    assert raw.encode(text).ids == small(text)["input_ids"]
    assert raw.padding["pad_id"] == small.pad_token_id


def test_the_smallest_byte_level_vocabulary_is_bytes_and_added_tokens() -> None:
    full, _, trimmed = trimmed_pair("byte-level", "1")
    token = full.convert_ids_to_tokens(Counter(encoded(full, TEXT)).most_common(1)[0][0])
    assert len(token) <= 2  # no part of it is merged itself
    expected = {*pre_tokenizers.ByteLevel.alphabet(), *full.get_added_vocab(), token}
    assert set(full.convert_ids_to_tokens(trimmed.kept.tolist())) == expected


def test_the_merges_kept_are_those_that_bpe_takes() -> None:
    """abc can be a + bc or ab + c; the first merge in the list wins, so bc is on the way and ab is not."""
    vocab = {token: i for i, token in enumerate(["a", "b", "c", "ab", "bc", "abc", "ca", "cab"])}
    merges = [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc"), ("c", "ab")]
    data = json.loads(Tokenizer(models.BPE(vocab, merges)).to_str())
    assert closure(data, {"abc"}) == {"a", "b", "c", "bc", "abc"}
    assert closure(data, {"cab"}) == {"a", "b", "c", "ab", "cab"}
    assert closure(data, {"ca"}) == {"a", "b", "c", "ca"}  # no merge makes it
    data["model"]["merges"] = [" ".join(merge) for merge in merges]  # as older files have them
    assert closure(data, {"abc"}) == {"a", "b", "c", "bc", "abc"}


# ------------------------------------------------------------------------------------------------------- the selection


@pytest.mark.parametrize("number", [1, 17, 60, 422])
def test_the_most_frequent_tokens_are_kept_lower_ids_first(number: int) -> None:
    full, _, trimmed = trimmed_pair("byte-level", str(number))
    counts = Counter(encoded(full, TEXT))
    wanted = sorted(range(len(full)), key=lambda i: (-counts[i], i))[:number]
    assert set(wanted) <= set(trimmed.kept.tolist())
    if number < 100:  # a larger number need not add more than the closure does
        more = trimmed_pair("byte-level", "200")[2]
        assert set(trimmed.kept.tolist()) <= set(more.kept.tolist())


@pytest.mark.parametrize("kind", ["byte-level", "byte fallback"])
def test_scripts_decide_by_character(kind: str) -> None:
    full, small, _ = trimmed_pair(kind, "script:cyrillic,greek")
    dropped = set(full.get_vocab()) - set(small.get_vocab())
    kept = {full.convert_tokens_to_string([token]) for token in small.get_vocab() if token not in SPECIAL}
    assert {" ", "1", "."} <= kept
    assert any("соба" in word for word in kept)
    for token in dropped:  # the Unicode name of a letter begins with its script's
        scripts = {unicodedata.name(letter, "none").split()[0] for letter in full.convert_tokens_to_string([token])}
        assert scripts & {"LATIN", "CJK"}, token
    letters = {unicodedata.name(letter).split()[0] for word in kept for letter in word if letter.isalpha()}
    assert letters - {"LATIN"} == {"CYRILLIC", "GREEK"}
    latin = {word for word in kept if any(unicodedata.name(letter, "").startswith("LATIN") for letter in word)}
    assert all(len(word) == 1 or word.startswith("<") for word in latin)  # bytes and added tokens


def test_a_file_names_tokens_or_ids(tmp_path: Path) -> None:
    dense = dense_model(files_of("byte-level"))
    tokenizer = dense.tokenizer()
    word, other = "Ġthe", tokenizer.convert_tokens_to_ids("Ġfox")
    path = tmp_path / "keep.txt"
    path.write_text(f"{word}\n\n{other}\n", encoding="utf-8")
    kept = trim_vocabulary(dense, str(path), "").model.tokenizer().get_vocab()
    assert {word, "Ġfox"} <= set(kept)
    assert "Ġdog" not in kept
    for line, says in ((f"{word}\nnonesuch\n", "line 2 is 'nonesuch'"), ("999999", "line 1 is '999999'")):
        path.write_text(line, encoding="utf-8")
        with pytest.raises(UserError, match=rf"keep.txt: {says}"):
            trim_vocabulary(dense, str(path), "")
    path.write_text("\n\n")
    with pytest.raises(UserError, match=r"keep.txt: names no token"):
        trim_vocabulary(dense, str(path), "")
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"keep.txt: not UTF-8"):
        trim_vocabulary(dense, str(path), "")


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        ("0", "--keep-tokens is 0, expected 1 to"),
        ("-7", "--keep-tokens is -7, expected 1 to"),
        ("426", "--keep-tokens is 426, expected 1 to 422"),
        ("no/such/file", "--keep-tokens is 'no/such/file'.*expected a number of tokens, script:NAME, or a file"),
        ("", "--keep-tokens is"),
        ("script:", "'' is no Unicode script"),
        ("script:klingon", "'klingon' is no Unicode script"),
        ("script:latin}|.", "is no Unicode script"),
        ("script:latin,thai", "no token of this vocabulary is written in thai"),
    ],
)
def test_selections_that_make_no_sense_are_refused(keep: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        trim_vocabulary(dense_model(files_of("byte-level")), keep, TEXT)


# ----------------------------------------------------------------------------------------------------------- the model


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", TESTED_MODEL_TYPES)
def test_kept_tokens_have_the_same_logits(model_type: str, tied: bool, tmp_path: Path) -> None:
    write(dense_model(files_of("byte-level"), model_type, tied), tmp_path / "full")
    dense = load_dense(tmp_path / "full")
    state = copy.deepcopy(dense.model.state_dict())
    config, files = copy.deepcopy(dense.config), dict(dense.tokenizer_files)
    trimmed = trim_vocabulary(dense, "script:latin", "")
    small, kept = trimmed.model, trimmed.kept
    assert kept.dtype == torch.int64
    assert torch.equal(kept, kept.unique())
    assert len(kept) < len(dense.tokenizer()) < dense.config["vocab_size"]
    # The caller's model is as it was.
    assert all(torch.equal(value, state[name]) for name, value in dense.model.state_dict().items())
    assert (dense.config, dense.tokenizer_files) == (config, files)
    assert dense.model.config.vocab_size == config["vocab_size"]
    # Same hidden states, same rows: bit for bit where the product has the same shape, to rounding where it has not.
    new = torch.randint(0, len(kept), (3, 17), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        layer, seen = dense.model.get_output_embeddings(), []
        with layer.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
            full = logits(dense, kept[new])
        bias = None if layer.bias is None else layer.bias[kept]
        same = torch.nn.functional.linear(seen[0], layer.weight[kept], bias)
    found = logits(small, new)
    assert torch.equal(found, same)
    torch.testing.assert_close(found, full[..., kept])
    # Both layers are small, and one where they were one.
    embedding, output = small.model.get_input_embeddings(), small.model.get_output_embeddings()
    assert (embedding.weight is output.weight) is tied
    assert embedding.num_embeddings == output.out_features == small.config["vocab_size"] == len(kept)
    assert small.model.config.vocab_size == len(kept)
    assert all(getattr(module, "vocab_size", len(kept)) == len(kept) for module in small.model.modules())
    old_padding = dense.model.get_input_embeddings().padding_idx
    assert old_padding is None or kept[embedding.padding_idx] == old_padding
    # On disk and back.
    write(small, tmp_path / "small")
    back = load_dense(tmp_path / "small")
    assert torch.equal(logits(back, new), found)
    assert back.tied_embedding is tied
    assert back.tokenizer().get_vocab() == small.tokenizer().get_vocab()
    assert back.config == small.config


def test_an_output_bias_is_kept_by_token() -> None:
    dense = dense_model(files_of("byte-level"))
    layer = dense.model.get_output_embeddings()
    layer.bias = torch.nn.Parameter(torch.arange(layer.out_features, dtype=torch.float32))
    trimmed = trim_vocabulary(dense, "30", TEXT)
    assert torch.equal(trimmed.model.model.get_output_embeddings().bias.detach(), trimmed.kept.float())


def test_training_the_trimmed_model_leaves_the_original_alone() -> None:
    dense = dense_model(files_of("byte-level"), tied=True)
    state = copy.deepcopy(dense.model.state_dict())
    small = trim_vocabulary(dense, "30", TEXT).model.model
    with torch.no_grad():
        for value in small.parameters():
            assert value.requires_grad
            value.zero_()
    assert all(torch.equal(value, state[name]) for name, value in dense.model.state_dict().items())


@pytest.mark.parametrize("tied", [False, True])
def test_a_trimmed_model_can_be_compressed(tied: bool) -> None:
    trimmed = trim_vocabulary(dense_model(files_of("byte-level"), "qwen3", tied), "300", TEXT)
    vq = compress_model(trimmed.model, TEXT, CompressOptions(num_codes=16, calibration_tokens=512))
    assert vq.spec.vocab_size == len(trimmed.kept)
    assert vq.model.get_input_embeddings().num_embeddings == len(trimmed.kept)
    assert logits(vq, torch.tensor([[3, 4]])).shape == (1, 2, len(trimmed.kept))


# ------------------------------------------------------------------------------------------------------- ids elsewhere


def test_ids_in_both_configs_are_renumbered() -> None:
    dense = dense_model(files_of("byte-level"))
    full = dense.tokenizer()
    end, e, row = full.convert_tokens_to_ids("<|end|>"), full.convert_tokens_to_ids("e"), len(full) + 2
    gone = max(encoded(full, CYRILLIC))
    fields = {
        "eos_token_id": [2, end],
        "forced_eos_token_id": end,
        "pad_token_id": row,  # a row that no token has
        "decoder_start_token_id": 10**6,  # beyond all: a class's default
        "suppress_tokens": [gone, e],
        "bad_words_ids": [[e, gone], [end, e]],
    }
    for name, value in fields.items():
        setattr(dense.model.generation_config, name, value)
    dense.tokenizer_files["generation_config.json"] = json.dumps({**fields, "top_k": 5})
    dense.config["eos_token_id"] = dense.model.config.eos_token_id = end
    trimmed = trim_vocabulary(dense, "script:latin", "")
    small = trimmed.model
    assert gone not in trimmed.kept
    new = {old: i for i, old in enumerate(trimmed.kept.tolist())}
    expected = {
        "eos_token_id": [2, new[end]],
        "forced_eos_token_id": new[end],
        "pad_token_id": new[row],
        "decoder_start_token_id": 10**6,
        "suppress_tokens": [new[e]],
        "bad_words_ids": [[new[end], new[e]]],
    }
    generation = small.model.generation_config.to_dict()
    assert {name: generation[name] for name in fields} == expected
    assert json.loads(small.tokenizer_files["generation_config.json"]) == {**expected, "top_k": 5}
    assert small.config["eos_token_id"] == small.model.config.eos_token_id == new[end]
    assert small.config["bos_token_id"] == 1


def test_an_added_token_beyond_the_rows_stays_beyond() -> None:
    """Gemma 3's text models come with an image token whose id is vocab_size."""
    dense = dense_model(files_of("byte-level"), surplus=-1)
    full = dense.tokenizer()
    assert full.convert_tokens_to_ids("<|end|>") == dense.config["vocab_size"]
    trimmed = trim_vocabulary(dense, "20", TEXT)
    small = trimmed.model.tokenizer()
    assert small.convert_tokens_to_ids("<|end|>") == len(trimmed.kept) == trimmed.model.config["vocab_size"]
    assert encoded(small, "<|end|>") == [len(trimmed.kept)]


@pytest.mark.parametrize("name", ["sequence_bias", "force_words_ids", "forced_decoder_ids"])
def test_ids_that_cannot_follow_are_refused(name: str) -> None:
    dense = dense_model(files_of("byte-level"))
    dense.tokenizer_files["generation_config.json"] = json.dumps({name: [[[7], 1.0]]})
    with pytest.raises(UserError, match=rf"the config sets {name}"):
        trim_vocabulary(dense, "20", TEXT)


# ------------------------------------------------------------------------------------------------ the tokenizer's files


@pytest.mark.parametrize("name", ["GPT2Tokenizer", "Qwen2Tokenizer", "LlamaTokenizer", "TokenizersBackend", None])
def test_every_class_of_tokenizer_loads_the_new_files(name: str | None) -> None:
    kind = "byte fallback" if name == "LlamaTokenizer" else "byte-level"
    dense = dense_model(files_of(kind))
    data = json.loads(dense.tokenizer_files["tokenizer.json"])
    config = json.loads(dense.tokenizer_files["tokenizer_config.json"])
    config["added_tokens_decoder"] = {
        str(token["id"]): {field: value for field, value in token.items() if field != "id"}
        for token in data["added_tokens"]
    }
    config["chat_template"] = "{{ messages }}"
    del config["tokenizer_class"]
    if name:
        config["tokenizer_class"] = name
    stale = {"vocab.json": json.dumps(data["model"]["vocab"]), "merges.txt": "#version: 0.2\n"}
    added = {token["content"]: token["id"] for token in data["added_tokens"]}
    beside = {"added_tokens.json": json.dumps(added), "special_tokens_map.json": '{"bos_token": "<s>"}'}
    dense.tokenizer_files.update({"tokenizer_config.json": json.dumps(config), **stale, **beside})
    full = dense.tokenizer()
    trimmed = trim_vocabulary(dense, "script:latin", "")
    small, files = trimmed.model.tokenizer(), trimmed.model.tokenizer_files
    assert type(small) is type(full)
    assert small.chat_template == full.chat_template == "{{ messages }}"
    assert small.all_special_tokens == full.all_special_tokens
    assert {token: int(trimmed.kept[i]) for token, i in small.get_added_vocab().items()} == full.get_added_vocab()
    ids = encoded(full, LATIN + "<s><|code|>")
    assert trimmed.kept[encoded(small, LATIN + "<s><|code|>")].tolist() == ids
    assert decoded(small, encoded(small, CYRILLIC)) == decoded(full, encoded(full, CYRILLIC))
    assert not set(stale) & set(files)
    assert files["special_tokens_map.json"] == beside["special_tokens_map.json"]
    assert {token: int(trimmed.kept[i]) for token, i in json.loads(files["added_tokens.json"]).items()} == added


def test_older_tokenizer_files_become_a_tokenizer_json() -> None:
    data = json.loads(files_of("byte-level")["tokenizer.json"])
    dense = dense_model(files_of("byte-level"))
    vocab = data["model"]["vocab"] | {token["content"]: token["id"] for token in data["added_tokens"]}
    dense.tokenizer_files.clear()
    dense.tokenizer_files.update(
        {
            "vocab.json": json.dumps(vocab),
            "merges.txt": "#version: 0.2\n" + "\n".join(" ".join(merge) for merge in data["model"]["merges"]),
            "tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|end|>", "bos_token": "<s>"}',
        }
    )
    trimmed = trim_vocabulary(dense, "script:latin", "")
    assert set(trimmed.model.tokenizer_files) == {"tokenizer.json", "tokenizer_config.json"}
    full, small = dense.tokenizer(), trimmed.model.tokenizer()
    assert trimmed.kept[encoded(small, LATIN)].tolist() == encoded(full, LATIN)
    assert decoded(small, encoded(small, GREEK)) == GREEK


# -------------------------------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize("block", [2, 7, 16, 10**6])
def test_bits_per_byte_are_those_of_the_definition(block: int) -> None:
    dense = dense_model(files_of("byte-level"))
    text = "Déjà vu: sphinx of black quartz, judge my vow!"
    ids = encoded(dense.tokenizer(), text)
    assert 16 < len(ids) < dense.max_positions
    bits = 0.0
    for place in range(1, len(ids)):  # one prediction at a time, from the tokens that its window holds
        start = (place - 1) // (block - 1) * (block - 1)
        row = logits(dense, torch.tensor([ids[start:place]]))[0, -1].double()
        bits -= float(row.log_softmax(-1)[ids[place]]) / math.log(2)
    assert bits_per_byte(dense, text, block) == pytest.approx(bits / len(text.encode("utf-8")), rel=1e-5)


def test_bits_per_byte_count_all_windows_of_a_long_text() -> None:
    """An untrained model with zero output says ln V nats a token, whatever the windows."""
    dense = dense_model(files_of("byte-level"))
    torch.nn.init.zeros_(dense.model.get_output_embeddings().weight)
    text = LATIN * 2
    predicted = len(encoded(dense.tokenizer(), text)) - 1
    expected = predicted * math.log2(dense.config["vocab_size"]) / len(text.encode("utf-8"))
    for block in (5, 50):
        assert bits_per_byte(dense, text, block) == pytest.approx(expected, rel=1e-6)
    with pytest.raises(UserError, match="the text has 1 tokens, at least 2"):
        bits_per_byte(dense, "e")


# ----------------------------------------------------------------------------------------------------------- refusals


def test_models_and_tokenizers_that_cannot_be_trimmed_are_refused() -> None:
    with pytest.raises(UserError, match="has a VQ-Logits head already"):
        trim_vocabulary(tiny_model(), "50", TEXT)
    dense = dense_model(files_of("byte-level"))
    data = json.loads(files_of("byte-level")["tokenizer.json"])
    words = {"type": "WordLevel", "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "fox": 3}, "unk_token": "<unk>"}
    added = [{**token, "id": i} for i, token in enumerate(data["added_tokens"][:3])]
    marked = {**data["model"], "end_of_word_suffix": "</w>"}
    for changed, says in (
        (
            {"model": words, "added_tokens": added},
            "the tokenizer's model is WordLevel, expected BPE, Unigram, WordPiece",
        ),
        ({"model": marked}, "merges mark word parts with '</w>'"),
    ):
        dense.tokenizer_files["tokenizer.json"] = json.dumps({**data, **changed})
        with pytest.raises(UserError, match=says):
            trim_vocabulary(dense, "2", TEXT)
    dense.tokenizer_files.clear()
    with pytest.raises(UserError, match="no tokenizer in the checkpoint"):
        trim_vocabulary(dense, "50", TEXT)


def test_a_tokenizer_that_numbers_its_tokens_with_gaps_is_refused() -> None:
    """A row without a token, named by the config, lies below an added token: readers number that one by counting."""
    files = files_of("byte-level")
    data = json.loads(files["tokenizer.json"])
    hole = data["model"]["vocab"].pop(max(data["model"]["vocab"], key=data["model"]["vocab"].__getitem__))
    data["model"]["merges"].pop()
    assert hole + 1 == min(token["id"] for token in data["added_tokens"] if token["id"] > hole)
    dense = dense_model({**files, "tokenizer.json": json.dumps(data)})
    assert hole in dense.tokenizer().get_vocab().values()  # the reader moved the added tokens down


def test_a_space_stays_one_where_bytes_could_stand_for_it(tmp_path: Path) -> None:
    """As bytes, the sign that stands for a space would not be turned back."""
    dense = dense_model(files_of("byte fallback"))
    (tmp_path / "keep.txt").write_text("e\n", encoding="utf-8")
    small = trim_vocabulary(dense, str(tmp_path / "keep.txt"), "").model.tokenizer()
    assert set(small.get_vocab()) == {*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "e"}
    assert decoded(small, encoded(small, "die Füchse  hier")) == "die Füchse  hier"


def test_a_character_vocabulary_keeps_all_characters() -> None:
    """Without bytes to fall back to, a character that goes could never be read again."""
    dense = dense_model(tiny_tokenizer_files(211), bos_token_id=1, eos_token_id=1, pad_token_id=1)
    trimmed = trim_vocabulary(dense, "3", "the then these")
    tokens = set(trimmed.model.tokenizer().get_vocab())
    letters = {chr(code) for code in range(32, 127)}
    assert letters < tokens
    assert len(tokens - letters - {"<unk>", "</s>"}) <= 3
    assert list(itertools.islice(trimmed.kept.tolist(), 97)) == list(range(97))
