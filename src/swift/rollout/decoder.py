"""Continuous batching over a transformers model: prompts join and answers leave between any two tokens.

Owns: who waits, which row an answer has, when it ends. One thread calls `step`; others may submit and cancel.
Not here: keys and values (cache.py), how tokens are drawn (sampling.py), where a model comes from.

Shapes: R = rows in flight, N = flat tokens, S = prompts, V = vocabulary.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from swift.config.option import ConfigError
from swift.rollout.cache import Cache, spare_bytes
from swift.rollout.detokenize import AnswerText, decode_text
from swift.rollout.graphs import Graphs, can_record
from swift.rollout.pages import Pages
from swift.rollout.prompts import lay_out
from swift.rollout.sampling import Drawn, Marks, Shape, answer_key, draw, uniform
from swift.rollout.slots import Slots
from swift.rollout.types import Completion, End, Guide, Request, Token

PREFILL_TOKENS = 8192  # of prompts in one step, unless a single one is longer
Listener = Callable[[Token | End], None]


@dataclass(eq=False, slots=True)
class Ticket:
    """A request on its way. `completions` fill up in any order."""

    request: Request
    listen: Listener | None
    completions: list[Completion | None]
    cancelled: bool = False

    @property
    def done(self) -> bool:
        return None not in self.completions

    @property
    def answers(self) -> list[Completion]:
        """The completions of a ticket that is done."""
        return [c for c in self.completions if c is not None]


@dataclass(eq=False, slots=True)
class Row:
    """An answer that waits or is in flight."""

    ticket: Ticket
    index: int
    limit: int  # tokens
    ends: frozenset[int]
    writer: AnswerText | None  # where somebody listens, or a text may end the answer
    guide: Guide | None
    token_ids: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    top_logps: list[dict[int, float]] = field(default_factory=list)

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return len(self.ticket.request.token_ids) + len(self.token_ids)

    @property
    def read(self) -> list[int]:
        """What has to be read before the next token: the prompt, and what was answered already."""
        return self.ticket.request.token_ids + self.token_ids


class Decoder:
    """Answers requests with `model`, which has to be in evaluation mode and attend by FLAT_ATTENTION."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase,
        *,
        stop_token_ids: Sequence[int],
        context: int,
        max_rows: int,
        prefill_tokens: int = PREFILL_TOKENS,
        memory_bytes: int | None = None,
        version: int = 0,
    ) -> None:
        """`context`: tokens of prompt and answer together. `version`: of the weights, for the completions.

        `memory_bytes`: of keys and values; None = most of what is free. Where they do not suffice for all
        rows, the last ones wait and are read again later.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.stop_token_ids = frozenset(stop_token_ids)
        self.context, self.max_rows, self.prefill_tokens = context, max_rows, prefill_tokens
        self.version = version
        self.device = next(model.parameters()).device
        self.added_tokens = tokenizer.get_added_vocab()
        is_gpu = self.device.type == "cuda"
        # Kernels and graphs go to the thread's own GPU, whichever that is.
        self.on_device = partial(torch.cuda.device, self.device) if is_gpu else nullcontext
        paged = is_gpu and find_spec("triton") is not None
        memory_bytes = memory_bytes or spare_bytes(self.device)
        self.cache = make_cache(model, max_rows, context, memory_bytes, paged=paged)
        self.waiting: deque[list[Row]] = deque()  # rows in one list have the same to read
        self.cancelling = False  # something that waits or is in flight was cancelled
        self.rows: list[Row] = []
        # Of each row: the token that goes in next, where it stands, the key of its draws, their number.
        self.tokens, self.lengths, self.keys, self.steps = torch.zeros(
            4, max_rows, dtype=torch.int64, device=self.device
        )
        self.marks = Marks(max_rows, self.device)
        self.shape: Shape | None = None  # of the rows as they are
        self.graphs = Graphs(max_rows) if paged and can_record(model) else None

    def submit(self, request: Request, listen: Listener | None = None) -> Ticket:
        """Queues a request; `listen` hears of each token and each end, in the thread that steps.

        Raises ConfigError for a prompt that leaves no room for an answer.
        """
        length, room = len(request.token_ids), min(self.context, self.cache.most)
        if not 0 < length < room:
            holder = "the context" if room == self.context else "memory"
            raise ConfigError(
                f"the prompt has {length} tokens, {holder} holds {room}",
                hint="one token at least, and room for an answer",
            )
        ticket = Ticket(request, listen, [None] * request.count)
        self.waiting.append([self._row(ticket, index) for index in range(request.count)])
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Ends what is not complete with "abort" at the next step. A ticket that is done stays as it is."""
        ticket.cancelled = self.cancelling = True

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """The answers to each request, in order."""
        tickets = [self.submit(request) for request in requests]
        while self.step():
            pass
        return [ticket.answers for ticket in tickets]

    @torch.no_grad()
    def step(self) -> bool:
        """One token for every row, after prompts have joined as rows and the budget allow.

        False when nothing is in flight and nothing waits.
        """
        with self.on_device():
            if self.cancelling:
                self._drop_cancelled()
            joining = self._choose()
            if joining:
                self._prefill(joining)
            if self.rows:
                self._decode()
        return bool(self.rows or self.waiting)

    def reset(self) -> None:
        """Forgets everything in flight and frees the memory of keys and values."""
        self.waiting.clear()
        self.rows = []
        self.shape = self.marks.table = None
        self.lengths.zero_()
        self.graphs = Graphs(self.max_rows) if self.graphs else None
        self.cache.clear()

    def _drop_cancelled(self) -> None:
        self.cancelling = False  # first: a ticket that is cancelled from now on is dropped by the next step
        gone = [r for r, row in enumerate(self.rows) if row.ticket.cancelled]
        for r in gone:
            self._end(self.rows[r], "abort")
        self._remove(gone)
        for _ in range(len(self.waiting)):  # another thread may append meanwhile
            rows = self.waiting.popleft()
            if not rows[0].ticket.cancelled:
                self.waiting.append(rows)
                continue
            for row in rows:
                self._end(row, "abort")

    def _choose(self) -> list[list[Row]]:
        """Who joins now: in order, as long as there are rows, memory and tokens of the budget.

        A group joins as a whole, so that its prompt is read once, unless it never fits.
        """
        chosen: list[list[Row]] = []
        if not self.waiting:
            return chosen
        budget = self.prefill_tokens
        longest = max((row.length for row in self.rows), default=0)
        while self.waiting:
            rows = self.waiting[0]
            if chosen and (rows[0].length > budget or not self.cache.is_sized):
                break
            longest = max(longest, rows[0].length + 1)
            is_first = not self.rows and not chosen
            joined = self.cache.join(rows[0].length, len(rows), longest, whole=not is_first)
            if not joined:
                break
            self.waiting.popleft()
            if joined < len(rows):
                self.waiting.appendleft(rows[joined:])
            chosen.append(rows[:joined])
            budget -= rows[0].length
        return chosen

    def _row(self, ticket: Ticket, index: int) -> Row:
        request = ticket.request
        sampling = request.sampling
        # A stop text that is one special token never shows in the text: it is found by its id.
        special = {self.added_tokens[text] for text in sampling.stop if text in self.added_tokens}
        ends = self.stop_token_ids | special | set(sampling.stop_token_ids)
        limit = min(sampling.max_tokens, self.context - len(request.token_ids))
        writer = None
        if ticket.listen or sampling.stop:
            writer = AnswerText(self.tokenizer, sampling.stop, self._tail(request))
        return Row(ticket, index, limit, ends, writer, request.guide() if request.guide else None)

    def _tail(self, request: Request) -> list[int]:
        return request.token_ids[len(request.token_ids) - request.continued :]

    def _prefill(self, joining: list[list[Row]]) -> None:
        """Reads prompts as one flat row, and draws the next token of each of their answers."""
        prompts, counts = [rows[0].read for rows in joining], [len(rows) for rows in joining]
        new = [row for rows in joining for row in rows]
        read = lay_out(prompts)
        before, total = len(self.rows), len(self.rows) + len(new)
        attending = self.cache.reading(read, counts, max(map(len, prompts)))
        prompt_of = [i for i, count in enumerate(counts) for _ in range(count)]
        host = {
            "ids": read.ids, "places": read.places, "last": read.last,
            "lengths": [len(prompts[i]) for i in prompt_of], "prompt_of": prompt_of,
        }  # fmt: skip
        at = {name: torch.tensor(values).to(self.device, non_blocking=True) for name, values in host.items()}
        logits_SV = self._run(at["ids"], at["places"], attending, logits_to_keep=at["last"])
        self.rows += new
        keys = [answer_key(r.ticket.request.sampling.seed, r.ticket.request.first + r.index) for r in new]
        self.keys[before:total] = torch.tensor(keys).to(self.device)
        self.steps[before:total] = torch.tensor([len(row.token_ids) for row in new]).to(self.device)
        self.lengths[before:total] = at["lengths"]
        settings = [row.ticket.request.sampling for row in new]
        for r, (row, sampling) in enumerate(zip(new, settings, strict=True), start=before):
            prompt = row.ticket.request.token_ids
            self.marks.begin(r, sampling, prompt, row.token_ids, logits_SV.shape[1])
        shape = Shape.of(settings, logits_SV.shape[1], self.device)
        self.shape = None
        self._take(logits_SV[at["prompt_of"]], shape, slice(before, total))

    def _decode(self) -> None:
        """Runs the last token of every row, and draws the next."""
        self._evict(self.cache.grow([row.length for row in self.rows]))  # the last token is not stored yet
        size = len(self.rows)
        logits_RV = self.graphs.run(self._forward, size) if self.graphs else self._forward(size)
        self.lengths[:size] += 1
        if self.shape is None:
            settings = [row.ticket.request.sampling for row in self.rows]
            self.shape = Shape.of(settings, logits_RV.shape[1], self.device)
        self._take(logits_RV, self.shape, slice(0, size))

    def _evict(self, fitting: int) -> None:
        """Makes the last rows wait again where memory has room for fewer."""
        if len(self.rows) > fitting:
            self.waiting.extendleft([row] for row in reversed(self.rows[fitting:]))
            self.lengths[fitting : len(self.rows)] = 0
            del self.rows[fitting:]
            self.shape = None

    def _forward(self, size: int) -> Tensor:
        """[R, V] logits after the last token of the first `size` rows."""
        longest = max((row.length for row in self.rows), default=1)
        attending = self.cache.decoding(self.lengths[:size], longest)
        return self._run(self.tokens[:size], self.lengths[:size], attending)

    def _run(self, ids_N: Tensor, positions_N: Tensor, attending: object, **options: Tensor) -> Tensor:
        """The model on one flat row: logits of the positions kept, all unless told otherwise."""
        flat = {"input_ids": ids_N[None], "position_ids": positions_N[None], "segments": attending}
        logits: Tensor = self.model(**flat, use_cache=False, **options).logits[0]
        return logits

    def _take(self, logits: Tensor, shape: Shape, span: slice) -> None:
        """Draws a token for the rows of `span` and hands them on; rows that have ended leave."""
        self._guide(logits, span)
        marks = self.marks.of(span) if shape.has_penalty else None
        drawn = draw(logits, shape, uniform(self.keys[span], self.steps[span]), marks)
        self.tokens[span] = drawn.ids
        self.steps[span] += 1
        if marks is not None:
            marks.scatter_add_(1, drawn.ids[:, None], torch.ones_like(marks[:, :1]))
        self._remove(self._hand_out(drawn, span))

    def _guide(self, logits: Tensor, span: slice) -> None:
        """Takes away, in place, what the guides of the rows of `span` do not allow."""
        guided = [(i, row.guide) for i, row in enumerate(self.rows[span]) if row.guide]
        if not guided:
            return
        allowed = torch.zeros(len(guided), logits.shape[1], dtype=torch.bool)
        for line, (_, guide) in zip(allowed, guided, strict=True):
            known = guide.allowed()[: len(line)]
            line[: len(known)] = known
        at = torch.tensor([i for i, _ in guided]).to(self.device)
        logits[at] = logits[at].masked_fill(~allowed.to(self.device), -torch.inf)

    def _hand_out(self, drawn: Drawn, span: slice) -> list[int]:
        """Tokens to their rows, from the device at once; the numbers of rows that have ended."""
        # Ids are exact in float64, so that one transfer brings everything.
        columns = [drawn.ids[:, None], drawn.logps[:, None]]
        if drawn.top_ids is not None and drawn.top_logps is not None:
            columns += [drawn.top_ids, drawn.top_logps]
        table = torch.cat([column.double() for column in columns], dim=1).tolist()
        ended = []
        for r, (token, logp, *top) in enumerate(table, start=span.start):
            row = self.rows[r]
            row.token_ids.append(int(token))
            row.logps.append(logp)
            if row.guide:
                row.guide.take(row.token_ids[-1])
            wanted = row.ticket.request.sampling.top_logps
            if wanted:
                half = len(top) // 2
                pairs = zip(top[:wanted], top[half : half + wanted], strict=True)
                row.top_logps.append({int(t): p for t, p in pairs if p > -torch.inf})
            reason = self._advance(row)
            if reason:
                self._end(row, reason)
                ended.append(r)
        return ended

    def _advance(self, row: Row) -> str | None:
        """Tells of a row's last token; why the answer is over, if it is."""
        token, text = row.token_ids[-1], ""
        is_end = token in row.ends
        if row.writer and not is_end:
            text = row.writer.push(token)
        if row.ticket.listen:
            top = row.top_logps[-1] if row.top_logps else None
            row.ticket.listen(Token(row.index, token, row.logps[-1], text, top))
        if is_end or (row.writer and row.writer.stopped):
            return "stop"
        is_full = len(row.token_ids) >= row.limit or row.length > self.cache.most
        return "length" if is_full else None

    def _end(self, row: Row, reason: str) -> None:
        """The completion of a row, to its ticket and its listener."""
        rest = row.writer.flush() if row.writer else ""
        if row.writer:
            text = row.writer.text
            reason = "stop" if row.writer.stopped else reason
        else:
            ids = row.token_ids
            shown = ids[:-1] if ids and ids[-1] in row.ends else ids
            text = decode_text(self.tokenizer, shown, self._tail(row.ticket.request))
        completion = Completion(
            row.token_ids, row.logps, reason, text,
            row.top_logps if row.ticket.request.sampling.top_logps else None, self.version,
        )  # fmt: skip
        row.ticket.completions[row.index] = completion
        if row.ticket.listen:
            row.ticket.listen(End(row.index, rest, completion))

    def _remove(self, gone: list[int]) -> None:
        """Takes rows out; the last ones move into their places."""
        if not gone:
            return
        before, size = len(self.rows), len(self.rows) - len(gone)
        holes = [r for r in gone if r < size]
        movers = [r for r in range(size, before) if r not in set(gone)]
        moves = list(zip(movers, holes, strict=True))
        self.cache.remove(gone, moves, max((self.rows[r].length for r in movers), default=0))
        if moves:
            sources, targets = torch.tensor(moves).to(self.device).unbind(1)
            for column in (self.tokens, self.lengths, self.keys, self.steps, self.marks.table):
                if column is not None:
                    column[targets] = column[sources]
            for source, target in moves:
                self.rows[target] = self.rows[source]
        del self.rows[size:]
        self.lengths[size:before] = 0  # rows that are not in flight see nothing
        self.shape = None


def make_cache(model: Any, max_rows: int, context: int, memory_bytes: int, *, paged: bool) -> Cache:
    """Of the model's layers, on its device."""
    device = next(model.parameters()).device
    if not paged:
        return Slots(max_rows, context, memory_bytes, device)
    layers = model.config.get_text_config().num_hidden_layers
    return Pages(max_rows, context, memory_bytes, device, layers=layers)
