"""The main job killed at 50 random moments: the folder holds the old output or the new one, whole, and runs."""

import random
import time

import pytest
import warm_jobs
from checkpoints import save_tiny

from export_vq import manifest
from export_vq.decoding import DecodingOptions
from export_vq.textmodel import TextModel

KILLS = 50
_WANTED = {"logits": (), "topk": ("--output", "topk", "--top-k", "5")}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "model.pt"
    save_tiny(path)
    return path


def _job(model, out, output):
    return (model, "-o", out, "--positions", 256, "--threads", 1, *_WANTED[output])


def _shipped(out):
    """What the manifest lists, but for the report: it holds timings."""
    return {name: digest for name, digest in manifest.read(out).files.items() if not name.startswith("report.")}


def _written(out):
    with TextModel(out, threads=1) as text:
        return [event.token_id for event in text.write("the cat", DecodingOptions(max_new_tokens=4, temperature=0))]


def test_a_kill_at_any_moment_leaves_the_old_or_the_new_output_and_a_rerun_completes(model, tmp_path):
    log, shipped, seconds = tmp_path / "log", {}, 0.0
    for output in _WANTED:
        start = time.perf_counter()
        assert warm_jobs.finish(log, *_job(model, tmp_path / output, output))[0] == 0
        seconds = time.perf_counter() - start
        shipped[output] = _shipped(tmp_path / output)
    tokens = _written(tmp_path / "logits")

    moments, out, old, kills, replaced = random.Random(0), tmp_path / "out", None, 0, 0
    wanted = "logits"
    while kills < KILLS or replaced < 2:
        job = warm_jobs.start(log, *_job(model, out, wanted))
        job.join(moments.uniform(0, seconds) if kills < KILLS else None)
        job.kill()
        job.join()
        assert job.exitcode in (0, -9), log.read_text()
        kills += job.exitcode == -9
        if not (out / "manifest.json").is_file() and not (out / "steps" / "commit").is_dir():
            assert old is None
            continue
        found = _shipped(out)
        assert manifest.verify(out) == ()
        assert _written(out) == tokens
        assert found in (shipped[wanted], shipped.get(old))
        if found == shipped[wanted]:
            old, wanted, replaced = wanted, "topk" if wanted == "logits" else "logits", replaced + 1

    code, printed = warm_jobs.finish(log, *_job(model, out, wanted))
    assert code == 0, printed
    assert manifest.verify(out) == ()
    assert _shipped(out) == shipped[wanted]
    assert all(path.suffix == ".json" for path in (out / "steps").iterdir())  # nothing unfinished is left
