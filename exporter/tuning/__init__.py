"""End-to-end tuning of a VQ-Logits model, and of an ordinary one with the same budget as the control.

The loss is alpha * KL(teacher || student) + (1 - alpha) * cross-entropy on next tokens. Codes stay as they are. Several
GPUs or machines share a batch when the program is started by `accelerate launch` (data parallel: every process holds the
whole model). Dropout is off: a teacher is followed better without, and nothing then depends on a random state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from export_vq.errors import UserError
from export_vq.load import LoadedModel
from export_vq.resume import RunFolder, fingerprint
from export_vq.tuning.options import CurvePoint, FinetuneOptions, FinetuneReport
from export_vq.tuning.parts import PARTS, TrainedParts, working_copy
from export_vq.tuning.run import FinetuneRun

__all__ = ["CurvePoint", "FinetuneOptions", "FinetuneReport", "FinetuneResult", "finetune"]


@dataclass(frozen=True)
class FinetuneResult:
    """The model at its best held-out loss, ready to run and to save, and what was done."""

    model: LoadedModel
    report: FinetuneReport


def finetune(
    loaded: LoadedModel,
    blocks: Tensor,
    held_out: Tensor,
    options: FinetuneOptions,
    folder: Path,
    teacher: LoadedModel | None = None,
    progress: Callable[[str, float], None] = lambda _step, _fraction: None,
) -> FinetuneResult:
    """Tune a model, from the start or from where an earlier call with the same arguments stopped.

    Args:
        loaded: a VQ-Logits model or an ordinary one, float32; it is left alone.
        blocks: text to train on, int64 [N, S].
        held_out: text to judge by, int64 [n, S].
        options: what to train and how long.
        folder: where the run keeps its state (one file, `training.pt`).
        teacher: an ordinary model over the same vocabulary; without one the loss is the cross-entropy alone.
        progress: called with what is being done, the loss in it, and the fraction done.

    Returns:
        On every process the same model, on the CPU.

    Raises:
        UserError: an option, the text or the teacher does not fit, or the folder holds another run.
    """
    from accelerate import Accelerator

    accelerator: Any = Accelerator()
    _check(loaded, blocks, held_out, options, teacher, accelerator.num_processes)
    work = working_copy(loaded)
    identity = {
        **dataclasses.asdict(options),
        "model": fingerprint(work.model.state_dict()),
        "text": fingerprint({"blocks": blocks}),
        "held-out text": fingerprint({"blocks": held_out}),
        "teacher": None if teacher is None else fingerprint(teacher.model.state_dict()),
    }
    parts = TrainedParts(work.model, options.parts, options.last_layers, options.lora_rank, options.seed)
    run = FinetuneRun(accelerator, parts, options, blocks, held_out, teacher, RunFolder(folder, identity))
    try:
        report = run.to_the_end(progress)
    finally:
        run.close()
    parts.merge()
    model = work.model.to("cpu").eval()
    head = None if loaded.head is None else model.get_output_embeddings()  # type: ignore[operator]
    return FinetuneResult(dataclasses.replace(work, model=model, head=head), report)


def _check(
    loaded: LoadedModel, blocks: Tensor, held_out: Tensor, options: FinetuneOptions, teacher: Any, processes: int
) -> None:
    if options.parts not in PARTS:
        raise UserError(f"parts is {options.parts!r}, expected one of {', '.join(PARTS)}; choose one of them")
    if options.dtype not in ("fp32", "bf16"):
        raise UserError(f"dtype is {options.dtype!r}, expected fp32 or bf16; choose one of them")
    for name in ("lora_rank", "steps", "batch_size", "micro_batch_size", "eval_every", "patience"):
        if getattr(options, name) < 1:
            raise UserError(f"{name} is {getattr(options, name)}, expected 1 or more; give a larger number")
    if options.last_layers < 0:
        raise UserError(f"last_layers is {options.last_layers}, expected 0 or more; give a larger number")
    if not 0 <= options.alpha <= 1:
        raise UserError(f"alpha is {options.alpha}, expected 0 to 1; it is the teacher's share of the loss")
    if options.batch_size % (processes * options.micro_batch_size):
        raise UserError(
            f"batch_size is {options.batch_size}, expected a multiple of {processes * options.micro_batch_size} "
            f"({processes} processes of micro_batch_size {options.micro_batch_size} each); change one of the two"
        )
    vocab_size = int(loaded.config["vocab_size"])
    for name, ids in (("training text", blocks), ("held-out text", held_out)):
        if ids.dim() != 2 or not len(ids) or ids.shape[1] < 2:
            raise UserError(
                f"the {name} has the shape {list(ids.shape)}, expected [1 or more, 2 or more]; give more text"
            )
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocab_size:
            raise UserError(
                f"the {name} holds the token id {int(ids.max())}, expected ids from 0 to {vocab_size - 1}; use the model's own tokenizer"
            )
    if teacher is not None and (teacher.head is not None or int(teacher.config["vocab_size"]) != vocab_size):
        raise UserError(
            f"{teacher.source}: not a teacher for {loaded.source}, expected an ordinary model with vocab_size {vocab_size}; "
            "give the dense model that the VQ model was made from"
        )
