"""The token loop over any runner: batches, decoding options, streams of events.

What a graph must give: `logits`; or `values, ids, logsumexp, code_logits` with the runner's `head`, which chooses the
same tokens and builds V logits of a row only where its best tokens do not decide; or `ids, logprob`, drawn in the graph
from `temperature` and `uniform`, for plain sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from export_vq import feeds as fd
from export_vq.decoding import DecodingOptions, check_token
from export_vq.detokenize import Decode, TextStream
from export_vq.errors import UserError
from export_vq.kv_cache import open_cache
from export_vq.sampling import next_token
from export_vq.scores import ScoreReader, Scores


@dataclass(frozen=True)
class TokenEvent:
    """One new token of one request.

    Attributes:
        request: index of the request in the batch.
        token_id: the token.
        text: what became ready to show with it, whole characters only; may be empty, as text is held back that may
            begin a stop string.
        logprob: of the token, see DecodingOptions.logprobs; None where not asked for.
        top_logprobs: (token id, log-probability) of the best tokens, falling.
        finish_reason: 'stop' (a stop string or one of eos_ids), 'length' (max_new_tokens), None: it goes on.
    """

    request: int
    token_id: int
    text: str
    logprob: float | None
    top_logprobs: tuple[tuple[int, float], ...]
    finish_reason: str | None


def generate(
    runner: fd.Runner, prompt: list[int], max_new_tokens: int, eos_ids: frozenset[int] = frozenset()
) -> Iterator[int]:
    """Greedy decoding: yields token ids as they come, at most `max_new_tokens`, ending before any of `eos_ids`.

    Equal logits give the lower token id.

    Raises:
        UserError: the graph draws its tokens itself.
    """
    _refuse_sampler(runner, "greedy decoding")
    batch = _Batch(runner, [prompt], max_new_tokens)
    for made in range(1, max_new_tokens + 1):
        outputs = batch.infer({})
        # A graph that chooses gives the best first; argmax takes the first of equals.
        token = int(outputs["ids"][0, -1, 0] if "ids" in outputs else np.argmax(outputs["logits"][0, -1]))
        if token in eos_ids:
            return
        yield token
        if made < max_new_tokens:
            batch.append([0], [token])


def stream(
    runner: fd.Runner,
    prompts: Sequence[Sequence[int]],
    options: DecodingOptions | Sequence[DecodingOptions],
    decode: Decode | None = None,
) -> Iterator[TokenEvent]:
    """Decode a batch of requests, which stop one by one; an event for every new token, as it comes.

    Args:
        runner: the model.
        prompts: token ids of each request, of any lengths from 1.
        options: of all requests, or one for each.
        decode: token ids -> text; None: events carry no text.

    Raises:
        UserError: a prompt or an option cannot be used, before anything runs where that can be known; the graph cannot
            do what the options ask; or the model's logits hold NaN or infinity.
    """
    each = [options] * len(prompts) if isinstance(options, DecodingOptions) else list(options)
    if not prompts or len(each) != len(prompts):
        raise UserError(
            f"{len(prompts)} prompts with {len(each)} options were given, expected one for each of 1 or more"
        )
    for i, prompt in enumerate(prompts):
        if not len(prompt):
            raise UserError(f"prompt {i} is empty, expected at least one token; give a text to go on from")
    if decode is None and any(one.stop for one in each):
        raise UserError("stop strings were given without a tokenizer to see them with; give one, or use eos_ids")
    head = runner.head
    requests = [
        _Request(i, list(prompt), one, decode) for i, (prompt, one) in enumerate(zip(prompts, each, strict=True))
    ]
    if head is not None:
        for request in requests:
            request.check_tokens(len(head.codes))
    if runner.signature.output == "sample":
        _check_plain(runner, each)
        return _drawn_inside(runner, requests)
    return _drawn_here(runner, requests, head)


def _drawn_here(runner: fd.Runner, requests: list[_Request], head: fd.HeadTables | None) -> Iterator[TokenEvent]:
    reader = ScoreReader(head)
    batch = _Batch(runner, [request.prompt for request in requests], _most_tokens(requests))
    while requests:
        outputs = batch.infer({})
        if "logits" not in outputs and head is None:
            raise UserError(
                f"{runner.name}: the graph has code logits but no constants lm_head.codes to read them by; export it again"
            )
        events = [request.choose(reader.read(outputs, row), runner.name) for row, request in enumerate(requests)]
        yield from events
        requests = batch.advance(requests, events)


def _drawn_inside(runner: fd.Runner, requests: list[_Request]) -> Iterator[TokenEvent]:
    temperature = np.array([requests[0].options.temperature], np.float32)
    batch = _Batch(runner, [request.prompt for request in requests], _most_tokens(requests))
    while requests:
        # Rounding to the nearest float32 could give 1, which is outside [0, 1).
        uniform = np.floor([[request.uniform() * 2**24] for request in requests]) / 2**24
        # A graph that draws at every position gets the same number for all; only the last draw counts.
        uniform = np.repeat(uniform, 1 if runner.signature.last_token else batch.width, axis=1)
        outputs = batch.infer({"temperature": temperature, "uniform": uniform.astype(np.float32)})
        events = [
            request.take(
                int(outputs["ids"][row, -1]),
                float(outputs["logprob"][row, -1]) if request.options.logprobs is not None else None,
            )
            for row, request in enumerate(requests)
        ]
        yield from events
        requests = batch.advance(requests, events)


class _Request:
    """One row of the batch: what it has seen and made."""

    def __init__(self, index: int, prompt: list[int], options: DecodingOptions, decode: Decode | None) -> None:
        self.prompt, self.options = prompt, options
        self._index = index
        self._seen = set(prompt)
        self._made = 0
        self._text = TextStream(decode or (lambda _: ""), prompt, options.stop)
        self._random = np.random.Generator(np.random.PCG64(options.seed))  # its own: other rows do not move it

    def check_tokens(self, vocab_size: int) -> None:
        self.options.check_tokens(vocab_size)
        for token in self.prompt:
            check_token(f"prompt {self._index}", token, vocab_size)

    def uniform(self) -> float:
        return float(self._random.random())

    def choose(self, scores: Scores, name: str) -> TokenEvent:
        """The next token from the model's scores."""
        if not self._made:
            self.check_tokens(scores.vocab_size)
        if not scores.sound:
            raise UserError(
                f"{name}: the logits of new token {self._made + 1} of request {self._index} hold NaN or infinity, expected "
                "numbers; export with --dtype fp32 or bf16"
            )
        token = next_token(scores, self.options, self._seen, self.uniform())
        return self.take(token, *_logprobs(scores, token, self.options.logprobs))

    def take(self, token: int, logprob: float | None, top: tuple[tuple[int, float], ...] = ()) -> TokenEvent:
        """Write the token down."""
        self._made += 1
        self._seen.add(token)
        reason: str | None
        if token in self.options.eos_ids:
            text, reason = self._text.finish()[0], "stop"
        else:
            text, stopped = self._text.push(token)
            if self._made == self.options.max_new_tokens and not stopped:
                rest, stopped = self._text.finish()
                text += rest
            reason = "stop" if stopped else "length" if self._made == self.options.max_new_tokens else None
        return TokenEvent(self._index, token, text, logprob, top, reason)


class _Batch:
    """Prompts, left padded, and their KV cache."""

    def __init__(self, runner: fd.Runner, prompts: list[list[int]], max_new_tokens: int) -> None:
        self._signature = runner.signature
        ids, self._mask = fd.left_pad(prompts)
        # The last new token of a text is not run.
        self._cache = open_cache(runner, len(prompts), ids.shape[1] + max_new_tokens - 1)
        self._feeds = fd.token_feeds(self._signature, ids, self._mask)

    @property
    def width(self) -> int:
        """Positions of the next call."""
        return int(self._feeds["input_ids"].shape[1])

    def infer(self, more: fd.Feeds) -> fd.Feeds:
        return self._cache.infer(self._feeds | more)

    def append(self, rows: list[int], tokens: list[int]) -> None:
        """Go on with some of the rows, and a token for each."""
        if len(rows) < len(self._mask):
            self._mask = self._mask[rows]
            self._cache.keep(rows)
        self._mask = np.pad(self._mask, ((0, 0), (0, 1)), constant_values=1)
        self._feeds = fd.token_feeds(self._signature, np.array(tokens, np.int64)[:, None], self._mask)

    def advance(self, requests: list[_Request], events: list[TokenEvent]) -> list[_Request]:
        """Go on with the rows that have not finished; returns their requests."""
        rows = [row for row, event in enumerate(events) if event.finish_reason is None]
        if rows:
            self.append(rows, [events[row].token_id for row in rows])
        return [requests[row] for row in rows]


def _most_tokens(requests: list[_Request]) -> int:
    return max(request.options.max_new_tokens for request in requests)


def _logprobs(scores: Scores, token: int, n: int | None) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    """Log-probability of a token and of the n best, under the model's own distribution."""
    if n is None:
        return None, ()
    nothing = np.zeros(0, np.int64)
    total = scores.log_total(1.0, nothing)
    top: list[tuple[int, float]] = []
    if n:
        best = scores.best(n, nothing)
        top = [(int(i), float(y) - total) for i, y in zip(best.ids[:n], best.values[:n], strict=True)]
    return float(scores.logits(np.array([token]))[0]) - total, tuple(top)


def _refuse_sampler(runner: fd.Runner, what: str) -> None:
    if runner.signature.output == "sample":
        raise UserError(
            f"{runner.name}: the graph draws its tokens itself, which is plain sampling at one temperature above 0; for "
            f"{what} export with --output topk or --output logits"
        )


def _check_plain(runner: fd.Runner, options: list[DecodingOptions]) -> None:
    """A graph that ends in VQSample knows temperature and nothing else; its logprob is the tempered distribution's."""
    asked = {
        "temperature 0": any(one.temperature == 0 for one in options),
        "several temperatures in a batch": len({one.temperature for one in options}) > 1,
        "top_k": any(one.top_k for one in options),
        "top_p": any(one.top_p < 1 for one in options),
        "min_p": any(one.min_p for one in options),
        "repetition_penalty": any(one.repetition_penalty != 1 for one in options),
        "logit_bias": any(one.logit_bias for one in options),
        "logprobs of the best tokens": any(one.logprobs for one in options),
        "logprobs at a temperature other than 1": any(
            one.logprobs is not None and one.temperature != 1 for one in options
        ),
    }
    for what, wanted in asked.items():
        if wanted:
            _refuse_sampler(runner, what)
