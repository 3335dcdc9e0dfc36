"""What a machine may refuse: room on the disk, permissions, a folder to itself, memory."""

import os
import shutil
import signal
import time

import pytest
import torch
import warm_jobs
from checkpoints import save_tiny, tiny_config, tiny_head, tiny_tokenizer_files

from export_vq import manifest
from export_vq.load import LoadedModel, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_tiny(path)
    return path


@pytest.fixture(scope="module")
def sealed(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("sealed") / "out"
    assert warm_jobs.finish(out.with_name("log"), "export", model, "-o", out)[0] == 0
    return out


@pytest.fixture
def out(sealed, tmp_path):
    shutil.copytree(sealed, tmp_path / "out")
    return tmp_path / "out"


def _refusal(code, printed):
    """The sentence of a command that was refused, and nothing else but its progress."""
    assert code == 2, printed
    assert "Traceback" not in printed
    (line,) = [line for line in printed.splitlines() if line.startswith("error: ")]
    return line


_JOB = ("--positions", 256, "--threads", 1)


@pytest.mark.parametrize("kib", [4, 40, 100])
def test_a_full_disk_leaves_the_old_output_and_a_rerun_completes(model, out, tmp_path, kib):
    """A graph has 110 KiB and more."""
    before = manifest.read(out)
    job = (model, "-o", out, "--output", "topk", "--top-k", 5, *_JOB)
    sentence = _refusal(*warm_jobs.finish(tmp_path / "log", *job, file_bytes=kib << 10))
    assert "File too large" in sentence
    assert "room" in sentence
    assert manifest.read(out) == before
    assert manifest.verify(out) == ()
    code, printed = warm_jobs.finish(tmp_path / "log", *job)
    assert code == 0, printed
    assert manifest.verify(out) == ()
    assert manifest.read(out) != before


@pytest.mark.parametrize("command", ["run", "export"])
def test_a_read_only_folder_is_left_alone(model, out, tmp_path, command):
    before = manifest.read(out)
    out.chmod(0o555)
    try:
        sentence = _refusal(*warm_jobs.finish(tmp_path / "log", command, model, "-o", out, "--output", "topk"))
        assert str(out) in sentence
        assert "Permission denied" in sentence
        assert manifest.verify(out) == ()
        assert manifest.read(out) == before
    finally:
        out.chmod(0o755)


def test_an_output_below_a_read_only_folder_or_a_file_is_refused(model, tmp_path):
    (tmp_path / "place").mkdir(mode=0o555)
    (tmp_path / "file").touch()
    for place in ("place", "file"):
        sentence = _refusal(*warm_jobs.finish(tmp_path / "log", model, "-o", tmp_path / place / "out"))
        assert f"{place}/out: cannot write there" in sentence
    (tmp_path / "place").chmod(0o755)


@pytest.mark.parametrize("folder", [False, True])
def test_an_unreadable_model_is_refused_and_no_output_begun(tmp_path, folder):
    path = tmp_path / ("model" if folder else "model.pt")
    save_tiny(path)
    secret = path / "model.safetensors" if folder else path
    secret.chmod(0)
    for command in (("inspect", path), (path, "-o", tmp_path / "out"), ("export", path, "-o", tmp_path / "out")):
        sentence = _refusal(*warm_jobs.finish(tmp_path / "log", *command))
        assert secret.name in sentence
        assert "ermission denied" in sentence
    assert not (tmp_path / "out").exists()


def test_an_output_folder_with_an_unreadable_file_is_told(out, tmp_path):
    (out / "model.onnx").chmod(0)
    code, printed = warm_jobs.finish(tmp_path / "log", "inspect", out, "--verify")
    assert code == 1
    assert "model.onnx: cannot be read (Permission denied)" in printed
    _refusal(*warm_jobs.finish(tmp_path / "log", "generate", out, "--prompt", "the"))


def test_of_two_runs_at_once_one_ends_well_and_one_is_told_why_not(model, tmp_path):
    out = tmp_path / "out"
    first = warm_jobs.start(tmp_path / "first", model, "-o", out, *_JOB)
    while not list(out.glob("steps/next-*")):
        assert first.is_alive()
        time.sleep(0.001)
    os.kill(first.pid, signal.SIGSTOP)  # it is there for as long as the other one looks
    try:
        sentence = _refusal(*warm_jobs.finish(tmp_path / "second", model, "-o", out, *_JOB))
        assert "another export-vq is writing there" in sentence
    finally:
        os.kill(first.pid, signal.SIGCONT)
    first.join(300)
    assert first.exitcode == 0
    assert manifest.verify(out) == ()


def _save_wide(path, **sizes):
    """Write a Llama of six layers; returns the bytes of its tensors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**tiny_config("llama"), "num_hidden_layers": 6, **sizes}
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config, tie_word_embeddings=False))
    head = tiny_head("product", config["hidden_size"], config["vocab_size"])
    network.set_output_embeddings(head)
    files = tiny_tokenizer_files(config["vocab_size"])
    save_model(LoadedModel(network.eval(), head, config, files, "wide", ""), path)
    return sum(tensor.nbytes for tensor in torch.load(path, weights_only=True)["state_dict"].values())


def test_the_peak_of_memory_is_below_three_times_the_model(tmp_path):
    """Beyond what exporting the same graph with almost no weights takes. The weights lie beside the graph, as those of every
    model above 100 MiB do."""
    peaks, sizes = [], []
    for width in ({}, {"hidden_size": 384, "intermediate_size": 1024, "vocab_size": 8192}):
        sizes.append(_save_wide(tmp_path / "m.pt", **width))
        job = ("export", tmp_path / "m.pt", "-o", tmp_path / "out", "--external-data-mb", 0)
        code, printed = warm_jobs.finish(tmp_path / "log", *job)
        assert code == 0, printed
        peaks.append(warm_jobs.peak_bytes(tmp_path / "log"))
    assert sizes[1] > 40 << 20
    ratio = (peaks[1] - peaks[0]) / (sizes[1] - sizes[0])
    print(f"exporting {sizes[1] / 2**20:.0f} MiB takes {ratio:.2f} times as much memory")
    assert ratio < 3
