"""`export-vq generate` on a folder as the main job writes it."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys

import commands
import pytest
import torch
from checkpoints import tiny_model

from export_vq.bundle import Bundle
from export_vq.decoding import DecodingOptions
from export_vq.generate import stream
from export_vq.graph import ExportOptions
from export_vq.records import OnnxArtifact
from export_vq.runners import OrtRunner, signature_of
from export_vq.steps import export_step
from export_vq.terminal import Steps
from export_vq.textmodel import TextModel


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    export_step(lambda: tiny_model("llama", "product"), "hash", Bundle(out), ExportOptions(), Steps())
    return out


@pytest.fixture
def run(folder):
    """(exit code, stdout, stderr) of `export-vq generate FOLDER ARGS`."""
    return lambda *args, folder=folder: commands.run("generate", folder, *args)


def test_greedy_text_is_what_transformers_writes(run):
    loaded = tiny_model("llama", "product")
    tokenizer = loaded.tokenizer()
    ids = tokenizer("the hat", return_tensors="pt")["input_ids"]
    made = loaded.model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=10, eos_token_id=1
    )
    code, stdout, stderr = run("--prompt", "the hat", "--max-new-tokens", 10)
    assert code == 0
    assert stdout == tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True) + "\n"
    count = len(made[0]) - ids.shape[1]
    assert re.fullmatch(
        rf"{count} tokens, the first after \d+\.\d{{3}} s, then \d+\.\d tokens/s; model\.onnx in ONNX Runtime .*\n",
        stderr,
    )


def test_logits_are_not_built_where_a_graph_gives_them_and_the_text_is_the_same(folder):
    """Greedy, filtered, and from all of V when hot: what the graph itself gives, which stays as it is."""
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    each = [
        DecodingOptions(max_new_tokens=20),
        DecodingOptions(max_new_tokens=20, temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.3, seed=1),
        DecodingOptions(max_new_tokens=20, temperature=3.0, seed=2),
    ]
    prompt = tiny_model("llama", "product").tokenizer()("the hat")["input_ids"]
    signature = signature_of(OnnxArtifact.load(folder / "model.onnx.json"))
    with TextModel(folder) as model, OrtRunner(folder / "model.onnx", signature) as as_exported:
        assert (model.runner.signature.output, as_exported.signature.output) == ("topk", "logits")
        assert model.runner.signature.last_token
        for options in each:
            written = [event.token_id for event in model.write("the hat", options)]
            options = dataclasses.replace(options, eos_ids=model.eos_ids)
            assert written == [event.token_id for event in stream(as_exported, [prompt], options)]
    assert files == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_json_holds_text_tokens_and_logprobs_and_a_seed_repeats_it(run):
    args = ("--prompt", "the hat", "--max-new-tokens", 12, "--seed", 4, "--logprobs", 2, "--json")
    args += ("--logit-bias", "1=-inf", "--top-p", 0.9, "--repetition-penalty", 1.2)
    code, stdout, _ = run(*args)
    assert code == 0
    result = json.loads(stdout)
    assert len(result["tokens"]) == 12
    assert result["finish_reason"] == result["tokens"][-1]["finish_reason"] == "length"
    assert result["text"] == "".join(token["text"] for token in result["tokens"])
    for token in result["tokens"]:
        assert token["token_id"] != 1
        (best, high), (_, low) = token["top_logprobs"]
        assert 0 > high >= low
        assert token["logprob"] <= high
        assert token["logprob"] == high or token["token_id"] != best
    assert run(*args)[1] == stdout
    greedy = json.loads(run("--prompt", "the hat", "--max-new-tokens", 12, "--json")[1])
    assert greedy["text"] != result["text"]


def test_text_ends_before_a_stop_string_and_where_the_positions_end(run):
    whole = run("--prompt", "the hat", "--logit-bias", "1=-inf", "--max-new-tokens", 1000, "--json")[1]
    whole = json.loads(whole)
    prompt = len(tiny_model("llama", "product").tokenizer()("the hat")["input_ids"])
    assert len(whole["tokens"]) == 64 - prompt
    assert whole["finish_reason"] == "length"
    stop = whole["text"][4:7]
    text = run("--prompt", "the hat", "--logit-bias", "1=-inf", "--stop", stop)[1]
    assert text == whole["text"][: whole["text"].index(stop)] + "\n"


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--temperature", -1), "temperature is -1.0, expected 0 (greedy)"),
        (("--top-p", 0), "top_p is 0.0"),
        (("--logit-bias", "97=1"), "logit_bias holds token id 97, expected 0 to 96"),
        (("--logit-bias", "x"), "'x' is not a token id"),
        (("--prompt", "a" * 64), "has 64 tokens, expected fewer than the model's 64 positions"),
        (("--prompt", ""), "the prompt is empty"),
        (("--backend", "cuda"), "--backend is 'cuda', but the ONNX Runtime here offers"),
        (("--backend", "tensorrt"), "holds no TensorRT engine of the VQ model; build one with: export-vq build"),
        (("--prompts", "x.txt"), "with --prompt TEXT or --prompts FILE, one of them"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_exit_code_2(run, args, words):
    code, stdout, stderr = run(*(() if "--prompt" in args else ("--prompt", "the")), *args)
    assert (code, stdout) == (2, "")
    assert words in " ".join(stderr.split())
    assert "Traceback" not in stderr


# ------------------------------------------------------------------------------------------------- files of prompts


PROMPTS = ["the hat", "on the mat", "a", "the rat sat on the mat", "then", "at"]


def test_every_prompt_of_a_file_is_a_line_with_what_it_gives_alone(run, tmp_path):
    """In batches that do not divide them, of rows that end apart."""
    (tmp_path / "prompts.txt").write_text("\n".join([*PROMPTS[:3], "", *PROMPTS[3:], ""]))
    named = [{"id": f"p{i}", "prompt": text} for i, text in enumerate(PROMPTS)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, named)))
    common = ("--max-new-tokens", 9, "--seed", 3, "--stop", "q")
    alone = [json.loads(run("--prompt", text, *common, "--json")[1]) for text in PROMPTS]
    assert {one["finish_reason"] for one in alone} == {"length", "stop"}
    for size in (1, 4):
        code, stdout, stderr = run("--prompts", tmp_path / "prompts.txt", *common, "--batch-size", size)
        found = [json.loads(line) for line in stdout.splitlines()]
        assert code == 0
        assert [one["id"] for one in found] == [1, 2, 3, 5, 6, 7]
        expected = [{name: one[name] for name in ("prompt", "text", "finish_reason")} for one in alone]
        assert [{name: value for name, value in one.items() if name != "id"} for one in found] == expected
        assert stderr.startswith(f"{sum(len(one['tokens']) for one in alone)} tokens")
    _, stdout, _ = run("--prompts", tmp_path / "prompts.jsonl", *common, "--json")
    found = [json.loads(line) for line in stdout.splitlines()]
    assert [one["id"] for one in found] == ["p0", "p1", "p2", "p3", "p4", "p5"]
    assert [one["text"] for one in found] == [one["text"] for one in alone]
    ids = [[token["token_id"] for token in one["tokens"]] for one in alone]
    assert [[token["token_id"] for token in one["tokens"]] for one in found] == ids


def test_a_bad_prompt_is_found_before_any_is_run(run, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("the hat\n\n" + "a" * 70)
    code, stdout, stderr = run("--prompts", file)
    assert (code, stdout) == (2, "")
    assert "prompts.txt line 3 has 70 tokens, expected fewer than the model's 64" in " ".join(stderr.split())


# ------------------------------------------------------------------------------------------------------------ chat


@pytest.fixture(params=["tokenizer_config.json", "chat_template.jinja"])
def instruct(request, folder, tmp_path):
    """The folder with a chat template, in each of the places where it may be."""
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}|{% endfor %}"
    template += "{% if add_generation_prompt %}assistant:{% endif %}"
    settings = json.loads((out / "tokenizer_config.json").read_text()) | {"bos_token": "</s>"}
    if request.param == "chat_template.jinja":
        (out / request.param).write_text(template)
    else:
        settings["chat_template"] = template
    (out / "tokenizer_config.json").write_text(json.dumps(settings))
    return out


def test_an_instruct_model_answers_a_message_unless_it_is_raw(run, instruct):
    """The template's special tokens are tokens, not their letters."""
    args = ("--max-new-tokens", 8, "--logit-bias", "1=-inf")
    written = "</s>user: the hat|assistant:"
    with TextModel(instruct) as model:
        assert model.encode("the hat") == model.encode(written, raw=True)
        assert model.encode("the hat")[0] == 1
    chat = run("--prompt", "the hat", *args, folder=instruct)[1]
    assert chat == run("--prompt", written, *args)[1]
    raw = run("--prompt", "the hat", *args, "--raw", folder=instruct)[1]
    assert raw == run("--prompt", "the hat", *args)[1] != chat


def test_a_template_that_fails_is_one_sentence(run, instruct):
    (instruct / "chat_template.jinja").write_text("{{ raise_exception('only poems') }}")
    code, stdout, stderr = run("--prompt", "the hat", folder=instruct)
    assert (code, stdout) == (2, "")
    assert "chat template cannot be used (only poems); give the prompt as it is with --raw" in " ".join(stderr.split())


# ---------------------------------------------------------------------------------------------------------- Ctrl-C


def test_ctrl_c_keeps_the_text_so_far(folder, tmp_path):
    """From a model that would write for minutes: the text is there, exit code 130, no traceback."""
    out = tmp_path / "out"
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 10**6}))
    command = [sys.executable, "-m", "export_vq.cli", "generate", out, "--prompt", "the hat", "--logit-bias", "1=-inf"]
    with subprocess.Popen(
        [*map(str, command), "--max-new-tokens", "900000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Tests that run in the background of a shell ignore the signal, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        begin = process.stdout.read(20)
        process.send_signal(signal.SIGINT)
        rest, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert len(begin) == 20
    assert rest.endswith("\n")
    assert "Traceback" not in stderr
    assert re.match(r"\d+ tokens, the first after .* tokens/s; model\.onnx in ONNX Runtime", stderr)


# --------------------------------------------------------------------------------------------------- missing files


@pytest.mark.parametrize("missing", ["model.onnx", "config.json", "tokenizer.json"])
def test_a_folder_without_its_files_is_refused_by_name(run, folder, tmp_path, missing):
    for file in folder.iterdir():
        if file.is_file() and file.name != missing:
            (tmp_path / file.name).symlink_to(file)
    code, _, stderr = run("--prompt", "the", folder=tmp_path)
    assert code == 2
    assert f"holds no {missing}" in " ".join(stderr.split())
