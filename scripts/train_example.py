"""Train a small language model with a VQ head from scratch, with Hugging Face's Trainer.

    python scripts/train_example.py TEXT.txt [TEXT.txt ..] --output model.pt
    export-vq model.pt

The texts are cut into blocks; the last tenth is held out. The defaults take about a minute on two CPU cores; a larger model
is a matter of arguments, and several GPUs of starting the script with `accelerate launch`. `VQCausalLMLoss` is all that
Trainer needs: it takes the loss from hidden states, with one codebook without ever building V logits.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
)

from export_vq.checkpoint import tokenizer_files
from export_vq.compress.soft import SoftMapping, reparametrise, settle
from export_vq.head import VQHead
from export_vq.load import LoadedModel, save_model
from export_vq.quality.floor import mapping_floor
from export_vq.text import read_text, token_blocks
from export_vq.tuning.loss import VQCausalLMLoss


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("texts", nargs="+", type=Path, help="UTF-8 text files")
    parser.add_argument("--output", type=Path, default=Path("model.pt"))
    parser.add_argument("--kind", choices=("single", "product"), default="product")
    parser.add_argument("--num-codes", type=int, default=64, help="K")
    parser.add_argument(
        "--num-codebooks", type=int, default=16, help="M, for --kind product: a divisor of --hidden-size"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=2048, help="of the tokenizer trained on the texts, 257 or more"
    )
    parser.add_argument("--hidden-size", type=int, default=128)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--block", type=int, default=128, help="tokens that the model sees together")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument(
        "--learn-mapping", action="store_true", help="with --kind single: learn which token has which code"
    )
    parser.add_argument("--reparametrise", action="store_true", help="move all codes together, so that none dies")
    parser.add_argument("--bf16", action="store_true", help="products in bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.vocab_size < 257:
        parser.error(f"--vocab-size is {given.vocab_size}, expected 257 or more: 256 bytes and the end of text")
    if given.kind == "product" and given.hidden_size % given.num_codebooks:
        parser.error(f"--num-codebooks is {given.num_codebooks}, expected a divisor of {given.hidden_size}")
    if given.learn_mapping and given.kind != "single":
        parser.error("--learn-mapping is for --kind single: a token of a product head has many codes")
    if given.learn_mapping and given.reparametrise:
        parser.error("--learn-mapping and --reparametrise do not go together; give one of them")
    return given


def byte_level_bpe(text: str, vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with at most `vocab_size` ids; every byte is one, so that no text is foreign to it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def random_head(given: argparse.Namespace, counts: Tensor) -> VQHead:
    """Random codes, every code to equally many tokens; the bias starts as the log frequency of a token, counts [V]."""
    m = given.num_codebooks if given.kind == "product" else 1
    v, k = len(counts), given.num_codes
    codes = torch.stack([torch.randperm(v) % k for _ in range(m)], dim=1)  # [V, M]
    frequency = (counts + 1) / (counts + 1).sum()
    return VQHead.from_tensors(given.kind, 0.02 * torch.randn(m, k, given.hidden_size // m), codes, frequency.log())


def network(given: argparse.Namespace, head: torch.nn.Module, vocab_size: int, end: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=given.hidden_size,
        intermediate_size=3 * given.hidden_size,
        num_hidden_layers=given.layers,
        num_attention_heads=given.heads,
        max_position_embeddings=given.block,
        bos_token_id=end,
        eos_token_id=end,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    model.set_output_embeddings(head)
    return model


class Cooling(TrainerCallback):
    """Lowers the temperature of a soft mapping from 1 to a tenth over the run."""

    def __init__(self, mapping: SoftMapping) -> None:
        self.mapping = mapping

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: object, **_: object) -> None:
        del args, control
        self.mapping.temperature = 0.1 ** (state.global_step / state.max_steps)


def main() -> None:
    given = arguments()
    torch.manual_seed(given.seed)
    text = "\n\n".join(read_text(path) for path in given.texts)
    tokenizer = byte_level_bpe(text, given.vocab_size)
    blocks = token_blocks(tokenizer, text, given.block, vocab_size=given.vocab_size)
    held_out = max(1, len(blocks) // 10)
    if held_out == len(blocks):
        raise SystemExit(f"the texts have one block of {given.block} tokens, at least 2 were expected; give more text")
    train, test = blocks[:-held_out], blocks[-held_out:]
    head = random_head(given, torch.bincount(train.flatten(), minlength=len(tokenizer)))
    if given.reparametrise:
        reparametrise(head)
    free = SoftMapping.of(head) if given.learn_mapping else None
    model = network(given, head if free is None else free, len(tokenizer), tokenizer.eos_token_id)
    objective = VQCausalLMLoss(model)
    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            folder,
            max_steps=given.steps,
            per_device_train_batch_size=given.batch_size,
            per_device_eval_batch_size=given.batch_size,
            learning_rate=given.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=given.steps // 10,
            bf16=given.bf16,
            logging_steps=max(1, given.steps // 10),
            save_strategy="no",
            report_to="none",
            seed=given.seed,
            label_names=["labels"],
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        rows = [[{"input_ids": ids, "labels": ids} for ids in part] for part in (train, test)]
        trainer = Trainer(objective, settings, train_dataset=rows[0], eval_dataset=rows[1])
        if free is not None:
            trainer.add_callback(Cooling(free))
        trainer.train()
        loss = trainer.evaluate()["eval_loss"]
        tokenizer.save_pretrained(folder)
        files = tokenizer_files(Path(folder))
    if not trainer.is_world_process_zero():
        return
    if given.reparametrise:
        settle(head)
    if free is not None:
        head = free.cpu().harden()
        model.set_output_embeddings(head)
    floor = mapping_floor(head.cpu(), test[:, 1:])
    save_model(
        LoadedModel(model.cpu().eval(), head, model.config.to_dict(), files, str(given.output), ""), given.output
    )
    print(
        f"{given.output}: held-out perplexity {math.exp(loss):.1f} (no training of this mapping goes below {floor:.2f}), "
        f"{head.dead_codes} of {head.spec.num_codebooks * head.spec.num_codes} codes unused"
    )


if __name__ == "__main__":
    main()
