"""Grammars of constrained outputs, by llguidance: compiled once a schema, then one state a sequence that says which tokens
may come next. No torch; llguidance is imported when the first grammar is compiled.
"""

from __future__ import annotations

import itertools
import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from nanovllm.engine.token_masks import allow_only, mask_words
from nanovllm.errors import UserError
from nanovllm.structured_outputs import StructuredOutputsParams

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nanovllm.engine.reasoning import Constraint

# Compiled grammars kept; each takes about 190 KiB at a vocabulary of 151,936.
CACHE_SIZE = 512
# States that share one compiled form before another is made for the next ones: those of one share what they find out under a lock,
# so threads would wait for each other.
STATES_PER_MATCHER = 16
# Compiled forms of a grammar for each thread, at most. A text that ends in two to four characters has a mask that takes a hundred times the
# others' time, under that lock: with one form a thread, others would have nothing left that they may work on.
MATCHERS_PER_THREAD = 2
# A long constant is forced piece by piece.
MAX_FORCED_TOKENS = 256
# Sets of tokens that llguidance allows as a whole where a text may go on freely. Its own are of texts of up to 10 and 30 characters: a text
# that may have only some more had its masks made token by token, 1 ms each instead of 10 us.
_TEXT = r'[^"\\\x00-\x1F\x7F]'
_SLICES = [r"[\x20\x0A\x0D\x09]+", *(f"{_TEXT}{{1,{most}}}" for most in (*range(1, 11), 30)), f"{_TEXT}+"]
# JSON as `json.dumps` writes it, and with whitespace of the model's choice.
_FIXED_WHITESPACE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
_ANY_WHITESPACE = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,40}"}
# A schema cannot switch on what is refused here, keywords that are read over. Without \u no name has two spellings: with it
# "\u0061" passes for an additional property beside "a", and takes its place when it is read.
_JSON_OPTIONS = {"lenient": False, "coerce_one_of": False, "json_allowed_escapes": '"\\bfnrt'}


class GrammarCompiler:
    """Compiles grammars for one tokenizer, and fills the masks of their states. Every method may be called on any thread.

    Args:
        tokenizer: of the model; must be a fast one.
        vocab_size: width of the model's logits, which may be larger than the tokenizer's vocabulary, not smaller.
        eos_token_ids: all tokens that end a sequence; the tokenizer's own where the model names none.
        threads: that fill masks, beside the caller's; 1 fills them on the caller's.
        cache_size: compiled grammars kept, the least recently used goes first.

    Raises:
        UserError: llguidance is missing, or cannot read the tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        threads: int = 1,
        cache_size: int = CACHE_SIZE,
    ) -> None:
        llguidance = import_llguidance()
        self.vocab_size = vocab_size
        self.mask_words = mask_words(vocab_size)
        own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.eos_token_ids = tuple(dict.fromkeys([*eos_token_ids] or own))
        self.cache_size = cache_size
        self._matcher_type = llguidance.LLMatcher
        self._limits = llguidance.LLParserLimits(verbose_errors=False)
        self._tokenizer = _read_tokenizer(tokenizer, vocab_size, self.eos_token_ids)
        special = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._special_texts = sorted({*special, *tokenizer.all_special_tokens})
        self._free_words = np.empty(self.mask_words, np.int32)
        allow_only(self._free_words, set(range(len(tokenizer))) - set(self.eos_token_ids))
        self._threads = threads
        self._executor = llguidance.LLExecutor(threads) if threads > 1 else None
        # Waits for the threads, which need no lock of the interpreter, while its caller goes on.
        self._filler = ThreadPoolExecutor(1, "masks") if threads > 1 else None
        self._lock = threading.Lock()
        self._cache: OrderedDict[tuple[object, ...], Grammar | str] = OrderedDict()

    def compile(self, params: StructuredOutputsParams) -> Grammar:
        """The compiled grammar, kept for the next call with equal parameters.

        Raises:
            UserError: it cannot be compiled; one line that says why.
        """
        made = self._lookup(params)
        if isinstance(made, str):
            raise UserError(made)
        return made

    def problem(self, params: StructuredOutputsParams) -> str | None:
        """Why the grammar cannot be compiled, in one line, or None. Warnings of llguidance are problems too."""
        made = self._lookup(params)
        return made if isinstance(made, str) else None

    def accept_all(self, sampled: Sequence[tuple[Constraint, int]]) -> list[bool]:
        """`accept` of a token by each of several states, in parallel. Each comes from the state's mask: another would make it a failed one."""
        if self._executor is None:
            return [state.accept(token_id) for state, token_id in sampled]
        fits = [True] * len(sampled)
        jobs: list[tuple[int, int, tuple[Any, int]]] = []
        eos_token_ids = self.eos_token_ids
        for place, (state, token_id) in enumerate(sampled):
            inner = state.mask_state
            if inner is None or inner.is_finished or token_id in eos_token_ids:
                fits[place] = state.accept(token_id)
            else:
                jobs.append((inner.family, place, (inner.matcher, token_id)))
        if jobs:
            # As in `start_masks`: those that share a lock are side by side.
            jobs.sort()
            taken = self._executor.consume_token_par([job for _, _, job in jobs])
            for (_, place, _), fit in zip(jobs, taken, strict=True):
                fits[place] = fit
        return fits

    def start_masks(self, states: Sequence[Constraint], out: NDArray[np.int32]) -> Future[None] | None:
        """Fill row `i` of `out` ([n or more, W] int32, C-contiguous) with the mask of `states[i]`, on other threads.

        A state must not stand in the list twice. Who asks one of them for anything meanwhile waits for all.

        Returns:
            Done when the masks are; None where they are already.
        """
        if out.dtype != np.int32 or out.ndim != 2 or not out.flags.c_contiguous:
            raise ValueError("masks must be a C-contiguous int32 array [n, W]")
        if out.shape[1] != self.mask_words or out.shape[0] < len(states):
            raise ValueError(f"masks are {out.shape}, must be ({len(states)}, {self.mask_words})")
        jobs: list[tuple[int, int, GrammarState]] = []
        for row, state in enumerate(states):
            inner = state.mask_state if self._executor is not None else None
            if inner is None:
                state.fill_mask(out[row])
            else:
                jobs.append((inner.family, row, inner))
        if not jobs or self._executor is None or self._filler is None:
            return None
        # Each thread takes neighbours: those that share a lock are side by side.
        jobs.sort()
        ordered = [(inner.matcher, row) for _, row, inner in jobs]
        begun = threading.Lock()
        begun.acquire()
        filling = Filling()
        future = filling.future = self._filler.submit(self._fill, self._executor, ordered, out, begun, filling)
        begun.acquire()
        for _, _, inner in jobs:
            inner.filling = filling
        return future

    @staticmethod
    def _fill(
        executor: Any, ordered: list[tuple[Any, int]], out: NDArray[np.int32], begun: threading.Lock, done: Filling
    ) -> None:
        """Let the threads of `executor` write to `out`, which is held until they have: they know no more of it than its address.

        Who asked waits until `begun` is released: this thread would get the interpreter's lock only when that one has nothing to do.
        """
        begun.release()
        executor.unsafe_compute_mask_ptr(ordered, out.ctypes.data, out.strides[0], len(out))
        done.is_done = True

    def fill_masks(self, states: Sequence[Constraint], out: NDArray[np.int32]) -> None:
        """`start_masks`, to its end."""
        filling = self.start_masks(states, out)
        if filling is not None:
            filling.result()

    def _lookup(self, params: StructuredOutputsParams) -> Grammar | str:
        problem = params.problem()
        if problem:
            return problem
        key = params.key
        with self._lock:
            found = self._cache.get(key)
            if found is not None:
                self._cache.move_to_end(key)
                return found
        # Outside of the lock: threads compile side by side. Two that compile the same lose one's work.
        made = self._compile(params)
        with self._lock:
            self._cache[key] = made
            self._cache.move_to_end(key)
            while len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
        return made

    def _compile(self, params: StructuredOutputsParams) -> Grammar | str:
        # Where the text is forced, tokenizing it makes the token that ends turns or sequences of it.
        source = "\0".join(params.choice or ()) + (params.schema or params.regex or params.grammar or "").replace(
            "\\", ""
        )
        for text in self._special_texts:
            if text in source and params.kind != "grammar":
                return _refusal(
                    params, f"it holds the text of the special token {text!r}, which cannot be written as text"
                )
        try:
            text = _grammar_text(self._matcher_type, params)
        except ValueError as error:
            return _refusal(params, str(error))

        def compiled() -> Any:
            return self._matcher_type(self._tokenizer, text, log_level=0, limits=self._limits)

        matcher = compiled()
        if matcher.is_error():
            return _refusal(params, matcher.get_error())
        warnings = matcher.get_grammar_warnings()
        if warnings:
            return _refusal(params, "; ".join(warnings))
        most = MATCHERS_PER_THREAD * self._threads if self._threads > 1 else 1
        grammar = Grammar(matcher, compiled, most, self.eos_token_ids, self._free_words)
        reason = self._dead_end(grammar.start())
        return _refusal(params, reason) if reason else grammar

    def _dead_end(self, state: GrammarState) -> str | None:
        """Why the grammar ends where it begins, or None.

        A schema that no text satisfies, or none of finite length, may compile; it fails where the mask after its forced
        text is made. What fails further on is the `problem` of the sequence that comes there.
        """
        mask = np.empty(self.mask_words, np.int32)
        state.fill_mask(mask)
        if not state.problem and not (mask & self._free_words).any():
            return "it allows nothing but an empty output"
        state.matcher.consume_tokens(state.matcher.compute_ff_tokens())
        state.fill_mask(mask)
        return f"no finite text satisfies it, or it is too complex: {state.problem}" if state.problem else None


class Grammar:
    """A compiled grammar. `start()` gives the state of a new sequence, on any thread.

    Args:
        matcher: llguidance's, before the first token; compiled: makes another one.
        most: matchers to spread the states over.
    """

    def __init__(
        self,
        matcher: Any,
        compiled: Callable[[], Any],
        most: int,
        eos_token_ids: tuple[int, ...],
        free_words: NDArray[np.int32],
    ) -> None:
        self._matchers = [matcher]
        self._compiled = compiled
        self._most = most
        self._started = itertools.count()
        self._lock = threading.Lock()
        self._eos_token_ids = eos_token_ids
        self._free_words = free_words

    def start(self) -> GrammarState:
        """A state before the first token, independent of all others."""
        index = next(self._started) // STATES_PER_MATCHER % self._most
        with self._lock:
            if index >= len(self._matchers):
                self._matchers.append(self._compiled())
            matcher = self._matchers[min(index, len(self._matchers) - 1)]
        return GrammarState(matcher.deep_copy(), id(matcher), self._eos_token_ids, self._free_words)


class Filling:
    """Masks that other threads make. Hundreds of states ask each step whether they are, and a future answers under a lock."""

    __slots__ = ("future", "is_done")

    def __init__(self) -> None:
        self.future: Future[None] | None = None
        self.is_done = False

    def wait(self) -> None:
        """Until they are made."""
        if not self.is_done and self.future is not None:
            self.future.result()


class GrammarState:
    """Where one sequence stands in its grammar.

    Used by one thread at a time. The engine fills a mask, samples, and hands the token to `accept`; a preempted sequence keeps
    its state, since it keeps its tokens.
    """

    __slots__ = ("_eos_token_ids", "_free_words", "_matcher", "family", "filling", "is_finished")

    def __init__(
        self, matcher: Any, family: int, eos_token_ids: tuple[int, ...], free_words: NDArray[np.int32]
    ) -> None:
        self._matcher = matcher
        self.filling: Filling | None = None  # other threads make its mask
        self.family = family  # of states that share a lock
        self._eos_token_ids = eos_token_ids
        self._free_words = free_words
        self.is_finished = False  # an end-of-sequence token was accepted

    @property
    def matcher(self) -> Any:
        """llguidance's, when no other thread works with it: it refuses two."""
        if self.filling is not None:
            self.filling.wait()
            self.filling = None
        return self._matcher

    @property
    def needs_mask(self) -> bool:
        """Whether the next token is constrained: always."""
        return True

    @property
    def is_complete(self) -> bool:
        """The grammar may end here: what has been generated is valid as it is."""
        return bool(self.matcher.is_accepting()) and not self.matcher.is_error()

    @property
    def is_stopped(self) -> bool:
        """Nothing but an end-of-sequence token may follow; the engine may as well end the sequence."""
        return self.is_finished or (bool(self.matcher.is_stopped()) and not self.matcher.is_error())

    @property
    def problem(self) -> str | None:
        """Why the grammar cannot go on, or None: it grew past llguidance's limits. Masks then allow only the end."""
        return one_line(self.matcher.get_error()) if self.matcher.is_error() else None

    @property
    def mask_state(self) -> GrammarState:
        """The state whose mask is this one's."""
        return self

    def accept(self, token_id: int) -> bool:
        """Advance by a generated token; False, and nothing changes, where its text does not fit the grammar.

        All tokens of a mask fit, and where `forced_tokens` is empty no others. Where it is not, a token may fit that the mask
        leaves out, because it spells the forced text in another way.
        """
        if token_id in self._eos_token_ids:
            # A grammar that failed must be able to end, too; it is not complete then.
            if not (self.is_complete or self.matcher.is_error()):
                return False
            self.matcher.try_consume_tokens([token_id])  # its masks allow nothing but the end from here on
            self.is_finished = True
            return True
        if self.is_finished:
            return False
        return bool(self.matcher.try_consume_tokens([token_id]) == 1)

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        """Write the tokens allowed next to `mask` ([W] int32, contiguous), W = ceil(vocab / 32).

        Every end-of-sequence token of the model is allowed exactly where the grammar may end; ids past the tokenizer's
        vocabulary never are. At least one token is, unless the model has no end-of-sequence token.
        """
        self.matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)

    def fill_free_mask(self, mask: NDArray[np.int32]) -> None:
        """Write a mask that allows every token of the tokenizer that does not end the sequence."""
        mask[:] = self._free_words

    def forced_tokens(self) -> list[int]:
        """Tokens that may be appended without sampling, since the grammar leaves one text; they are not consumed.

        The text is forced, and the tokens are those that the tokenizer makes of it; the mask, too, allows no others. Never holds an end-of-sequence token. At most `MAX_FORCED_TOKENS` at a time.
        """
        if self.is_stopped:
            return []
        return list(self.matcher.compute_ff_tokens()[:MAX_FORCED_TOKENS])


def import_llguidance() -> Any:
    """The module llguidance.

    Raises:
        UserError: it is not installed.
    """
    try:
        import llguidance
        import llguidance.hf
    except ImportError as error:
        raise UserError(
            f"structured_outputs needs llguidance, which cannot be imported ({error}); pip install llguidance"
        ) from None
    return llguidance


def grammar_problem(params: StructuredOutputsParams) -> str | None:
    """Why `params` cannot be compiled, in one line, or None: without a tokenizer, for a check before a job starts.

    Raises:
        UserError: llguidance is missing.
    """
    problem = params.problem()
    if problem:
        return problem
    llguidance = import_llguidance()
    matcher_type = llguidance.LLMatcher
    try:
        text = _grammar_text(matcher_type, params)
    except ValueError as error:
        return _refusal(params, str(error))
    limits = llguidance.LLParserLimits(verbose_errors=False)
    _, messages = matcher_type.validate_grammar_with_warnings(text, limits=limits)
    return _refusal(params, "; ".join(messages)) if messages else None


def one_line(message: str) -> str:
    """A message of llguidance on one line, at most 300 characters."""
    text = " ".join(message.replace("<non-verbose/>", "").split())
    return text if len(text) <= 300 else text[:297] + "..."


def _read_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int, eos_token_ids: tuple[int, ...]) -> Any:
    from llguidance import hf

    if not eos_token_ids:
        raise UserError("structured_outputs needs an end-of-sequence token, and neither model nor tokenizer names one")
    try:
        return hf.from_tokenizer(tokenizer, n_vocab=vocab_size, eos_token=list(eos_token_ids), slices=_SLICES)
    except Exception as error:  # llguidance's are ValueError and RuntimeError; pyo3 has others
        raise UserError(f"structured_outputs cannot use this tokenizer: {one_line(str(error))}") from None


def _grammar_text(matcher_type: Any, params: StructuredOutputsParams) -> str:
    """The grammar as llguidance reads it. Raises ValueError where the schema is no JSON object."""
    if params.schema is not None:
        whitespace = _FIXED_WHITESPACE if params.disable_any_whitespace else _ANY_WHITESPACE
        return str(matcher_type.grammar_from_json_schema(params.schema, overrides={**_JSON_OPTIONS, **whitespace}))
    if params.kind == "regex":
        return str(matcher_type.grammar_from_regex(params.regex))
    if params.kind == "choice":
        # One terminal: its automaton follows all choices at once, also where one begins with another.
        return str(
            matcher_type.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(map(json.dumps, params.choice or ())))
        )
    return str(matcher_type.grammar_from_lark(params.grammar))


def _refusal(params: StructuredOutputsParams, reason: str) -> str:
    return f"structured_outputs {params.kind} cannot be compiled: {one_line(reason)}"
