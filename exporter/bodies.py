"""The ops in standard ONNX, as function bodies: what stock runtimes run where our kernels are not.

Every body takes one row at a time: the scores of each codebook looked up with GatherElements and summed to V logits, of
which it keeps what the op gives (selection.py). A loop over rows keeps the scratch at [M, V] whatever the batch; Gather
over all rows would need [rows, V, M]. On one core of a 2-core x86 server at V=49152, K=256, ONNX Runtime 1.31 took 17 ms
a row for M=144 this way and 74 ms with Gather; 0.1 and 0.8 ms for M=1, K=512. An empty batch is zero iterations.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir as ir

from export_vq import contract
from export_vq.outputs import TENSORS
from export_vq.selection import COLUMN, CONSTANTS, SAMPLE, TOP_K, K, reshaped, sample_outputs, top_k_outputs


@dataclass(frozen=True)
class _Op:
    """What an op does besides the sums, as text: before the loop, with the logits `y` [1, V] of row `i`, and after.

    `kept` names the values that each row leaves, with their types: `best` of every row is `best_rows` [n, 1, ..] after.
    """

    kept: dict[str, str]
    after: str
    before: str = ""
    per_row: str = ""
    attributes: tuple[str, ...] = (contract.NUM_CODEBOOKS,)


_OPS = {
    contract.GATHER_SCATTER: _Op(
        kept={"y": "float"},
        after=reshaped("shaped", "y_rows", "v1") + "logits = CastLike (shaped, code_logits)",
    ),
    contract.TOP_K: _Op(
        kept={"best": "float", "which": "int64", "norm": "float"},
        after=top_k_outputs("best_rows", "which_rows", "norm_rows"),
        before=K,
        per_row=TOP_K,
        attributes=(contract.NUM_CODEBOOKS, contract.NUM_BEST),
    ),
    contract.SAMPLE: _Op(
        kept={"place": "int64", "chance": "float"},
        after=sample_outputs("token_rows", "chance_rows"),
        before=COLUMN,
        per_row="i1 = Unsqueeze (i, zero)\n u = Gather <axis = 0> (draws, i1)\n" + SAMPLE,
    ),
}


def function_body(op: str, *, num_codebooks: int, has_bias: bool, opset: int) -> ir.Function:
    """The model-local function of an op.

    Args:
        op: a key of outputs.TENSORS.
        num_codebooks, has_bias: of the node that it stands for. The input of a missing bias is left out where it is the
            last; `VQSample` has it in the middle, so there the function takes it and reads nothing.
        opset: of the default domain.
    """
    does = _OPS[op]
    inputs, outputs = TENSORS[op]
    if not has_bias and inputs[-1] == "bias":
        inputs = inputs[:-1]
    by_code = op == contract.SAMPLE and num_codebooks == 1
    text = f"""
    <opset_import: ["" : {opset}], domain: "{contract.DOMAIN}">
    {op} <{", ".join(does.attributes)}> ({", ".join(inputs)}) => ({", ".join(outputs)})
    {{
      {CONSTANTS}
      m = Constant <value_int: int = @{contract.NUM_CODEBOOKS}> ()
      m1 = Unsqueeze (m, zero)
      table_shape = Concat <axis = 0> (m1, last)
      v1 = Shape <start = 0, end = 1> (codes)
      {_laid_out(by_code, has_bias)}
      index = Transpose <perm = [1, 0]> (laid_codes)
      scores = Cast <to = 1> (code_logits)
      rows = Flatten <axis = -1> (scores)
      n1 = Shape <start = 0, end = 1> (rows)
      n = Squeeze (n1, zero)
      {does.before}
      yes = Constant <value = bool {{1}}> ()
      {", ".join(f"{name}_rows" for name in does.kept)} = Loop (n, yes) <body = one_row (int64 i, bool go)
        => (bool go_on, {", ".join(f"{type_}[1, {name}_width] {name}" for name, type_ in does.kept.items())})
        {{
          go_on = Identity (go)
          row = Gather <axis = 0> (rows, i)
          table = Reshape (row, table_shape)
          picked = GatherElements <axis = 1> (table, index)
          {_sum(num_codebooks, has_bias)}
          {does.per_row}
        }}>
      lead = Shape <start = 0, end = -1> (code_logits)
      {_tokens(op, by_code)}
      {does.after}
    }}
    """
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


def _laid_out(by_code: bool, has_bias: bool) -> str:
    """`laid_codes` [V, M] and `bias32` float32 [V] in the order of token ids, or `by_code`: of (code, token id), in which
    `VQSample` draws with one codebook. That `order` is TopK of the codes, the smallest first and equal ones by id; codes
    are constants, so runtimes sort them once.
    """
    if not by_code:
        return "laid_codes = Identity (codes)\n" + ("bias32 = Cast <to = 1> (bias)" if has_bias else "")
    sort = """
    code = Squeeze (codes, one)
    rising, order = TopK <axis = 0, largest = 0> (code, v1)
    laid_codes = Unsqueeze (rising, one)
    """
    return sort + (
        "laid_bias = Gather <axis = 0> (bias, order)\n bias32 = Cast <to = 1> (laid_bias)" if has_bias else ""
    )


def _sum(num_codebooks: int, has_bias: bool) -> str:
    """picked [M, V] -> y [1, V]. A sum over one row, or adding no bias, would only copy."""
    summed = "ReduceSum <keepdims = 1> (picked, zero)" if num_codebooks > 1 else "Identity (picked)"
    return f"sums = {summed}\n y = Add (sums, bias32)" if has_bias else f"y = {summed}"


def _tokens(op: str, by_code: bool) -> str:
    """Places are token ids, but for those of an order."""
    if op != contract.SAMPLE:
        return ""
    return f"token_rows = {'Gather <axis = 0> (order, place_rows)' if by_code else 'Identity (place_rows)'}"
