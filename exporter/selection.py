"""What is kept of rows of V logits, in standard ONNX: the k best tokens with the normaliser, or one drawn token.

The text serves two: the bodies of `VQTopK` and `VQSample` (bodies.py), inside their loop over rows, and the dense twin,
over all rows of its MatMul. It reads `y` float32 [n, V] and CONSTANTS.
"""

from __future__ import annotations

from typing import Final

import onnx
import onnx_ir as ir

from export_vq import contract
from export_vq.outputs import TENSORS

DENSE_OPS: Final = {contract.TOP_K: "TopKOfLogits", contract.SAMPLE: "SampleOfLogits"}
"""Op -> the function that gives the same out of V logits. No file holds it: the twin has it inlined."""
BLOCK: Final = 256
"""Tokens whose chances are added up before the blocks are: at most 256 + V / 256 roundings in a sum, where one running sum
has V. TensorRT has no float64 to sum in."""

CONSTANTS: Final = f"""
zero = Constant <value_ints = [0]> ()
one = Constant <value_ints = [1]> ()
two = Constant <value_ints = [2]> ()
last = Constant <value_ints = [-1]> ()
end = Constant <value_ints = [{2**63 - 1}]> ()
"""

K: Final = f"""
k = Constant <value_int: int = @{contract.NUM_BEST}> ()
k1 = Unsqueeze (k, zero)
"""
"""The attribute as `k1` [1], which TOP_K reads."""

TOP_K: Final = """
best, which = TopK <axis = -1> (y, k1)
peak = ReduceMax <keepdims = 1> (y, last)
below = Sub (y, peak)
weights = Exp (below)
weight = ReduceSum <keepdims = 1> (weights, last)
log_weight = Log (weight)
norm = Add (peak, log_weight)
"""
"""`best` float32 and `which` int64 [n, k], where TopK itself puts equal values in the order of their ids; `norm` [n, 1]."""

COLUMN: Final = """
column = Constant <value_ints = [-1, 1]> ()
draws = Reshape (uniform, column)
"""
"""The input `uniform` [..] as `draws` [n, 1]."""

SAMPLE: Final = f"""
block = Constant <value_ints = [{BLOCK}]> ()
unpadded = Constant <value_ints = [0, 0, 0]> ()
axis1 = Constant <value_int = 1> ()
axis2 = Constant <value_int = 2> ()
step = Constant <value_int = 1> ()
first = Constant <value_int = 0> ()
none = Constant <value_float = 0.0> ()
peak = ReduceMax <keepdims = 1> (y, last)
below = Sub (y, peak)
tempered = Div (below, temperature)
exact = Exp (tempered)
n_v = Shape (y)
n_rows = Slice (n_v, zero, one)
v_rows = Slice (n_v, one, two)
minus_v = Neg (v_rows)
short = Mod (minus_v, block)
pads = Concat <axis = 0> (unpadded, short)
weights = Pad (exact, pads, none)
width = Add (v_rows, short)
num_blocks = Div (width, block)
in_blocks = Concat <axis = 0> (n_rows, num_blocks, block)
in_rows = Concat <axis = 0> (n_rows, width)
blocks = Reshape <allowzero = 1> (weights, in_blocks)
inside = CumSum (blocks, axis2)
block_sums = Slice (inside, last, end, two)
before = CumSum <exclusive = 1> (block_sums, axis1)
reached_blocks = Add (before, inside)
reached = Reshape <allowzero = 1> (reached_blocks, in_rows)
weight = Slice (reached, last, end, one)
target = Mul (u, weight)
passes = Greater (reached, target)
possible = Greater (weights, none)
takes = And (passes, possible)
limit = Squeeze (width, zero)
places = Range (first, limit, step)
minus_one = Neg (step)
taken = Where (takes, places, limit)
foremost = ReduceMin <keepdims = 1> (taken, last)
living = Where (possible, places, minus_one)
hindmost = ReduceMax <keepdims = 1> (living, last)
drawn = Min (foremost, hindmost)
place = Max (drawn, first)
log_chance = GatherElements <axis = 1> (tempered, place)
log_weight = Log (weight)
chance = Sub (log_chance, log_weight)
"""
"""`place` int64 [n, 1] and its log-probability `chance` [n, 1], from `u` [n, 1] and `temperature` [1].

The place is the first whose sum of weights passes u times the whole. Weight 0 is never drawn; where rounding leaves no sum
above, it is the last place that has any weight, and 0 where NaN leaves none.
"""


def dense_selection(op: str, opset: int, *, ordered: bool = False) -> ir.Function:
    """What `op` gives, out of logits T [.., V] instead of code logits: the end of the dense twin.

    Args:
        op: a key of DENSE_OPS.
        opset: of the default domain.
        ordered: draw in the order of the last input, int64 [V], instead of that of token ids. The twin of one codebook has
            to, so that the same `uniform` gives the same token; laying V logits anew is next to nothing beside their MatMul.
    """
    drawn_with = tuple(name for name in TENSORS[op][0] if name in ("temperature", "uniform"))
    inputs = ("logits", *drawn_with, *(("order",) if ordered else ()))
    outputs = TENSORS[op][1]
    if op == contract.TOP_K:
        attributes, lines = f"<{contract.NUM_BEST}>", K + TOP_K + top_k_outputs("best", "which", "norm")
    else:
        token = "token = Gather <axis = 0> (order, place)" if ordered else "token = Identity (place)"
        attributes, lines = "", f"{COLUMN} u = Identity (draws)\n{SAMPLE} {token}\n{sample_outputs('token', 'chance')}"
    text = f"""
    <opset_import: ["" : {opset}], domain: "{contract.DOMAIN}">
    {DENSE_OPS[op]} {attributes} ({", ".join(inputs)}) => ({", ".join(outputs)})
    {{
      {CONSTANTS}
      wide = Cast <to = 1> (logits)
      rows = Flatten <axis = -1> (wide)
      y = {"Gather <axis = 1> (rows, order)" if ordered else "Identity (rows)"}
      lead = Shape <start = 0, end = -1> (logits)
      {lines}
    }}
    """
    return ir.serde.deserialize_function(onnx.parser.parse_function(text))


def top_k_outputs(best: str, which: str, norm: str) -> str:
    """Lines for the outputs of `VQTopK` from what was kept of the rows; `lead` is the shape before the last dimension."""
    return reshaped("values", best, "k1") + reshaped("ids", which, "k1") + reshaped("logsumexp", norm)


def sample_outputs(token: str, chance: str) -> str:
    """Lines for the outputs of `VQSample`."""
    return reshaped("ids", token) + reshaped("logprob", chance)


def reshaped(output: str, rows: str, width: str = "") -> str:
    """Lines that make `output` [*lead, *width] of rows; without a width each row is one number."""
    if not width:
        return f"{output} = Reshape <allowzero = 1> ({rows}, lead)\n"
    shape = f"{output}_shape = Concat <axis = 0> (lead, {width})\n"
    return f"{shape}{output} = Reshape <allowzero = 1> ({rows}, {output}_shape)\n"
