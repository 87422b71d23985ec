"""The engine's loop: scheduler, executor and output processor joined. `LLM` and `AsyncLLM` are its two front doors."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence as Sized
from concurrent.futures import Future, wait
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nanovllm.config import EngineConfig
from nanovllm.engine.block_manager import BlockManager
from nanovllm.engine.executor import create_executor
from nanovllm.engine.model_input import build_model_input, order_batch
from nanovllm.engine.output_processor import OutputProcessor, Verdict
from nanovllm.engine.poison import Poison
from nanovllm.engine.request_maker import Prompt, RequestMaker
from nanovllm.engine.row_sampling import SamplingInput, build_sampling_input, note_logprobs
from nanovllm.engine.scheduler import ScheduledSequence, Scheduler
from nanovllm.engine.sequence import Sequence, SequenceStatus
from nanovllm.engine.shared_prefix import PrefixSharing
from nanovllm.engine.stats import EngineStats, StepTimes
from nanovllm.outputs import RequestOutput
from nanovllm.preflight import check_model
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.log import get_logger
from nanovllm.utils.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from nanovllm.engine.ranks import RankLauncher
    from nanovllm.engine.reasoning import Constraint


# Words of a mask that are looked at before the others.
FIRST_WORDS = 64


class Flight(NamedTuple):
    """A step that was launched and not read yet. `settled`: ids of sequences whose sampled token does not count."""

    batch: list[ScheduledSequence]
    settled: set[int]


class Unsampled(NamedTuple):
    """What the step launched last will sample with, once its masks are `filled` (None: they are).

    Attributes:
        masked: ids of the sequences that the first of the masks belong to, in their order.
    """

    asked: SamplingInput
    masked: list[int]
    filled: Future[None] | None


# A token that was read and counts, with its sequence; and where the sequence's constraint has it already, what that says of it. A plain tuple:
# there is one for every token.
Read = tuple[Sequence, int, Verdict | None]


class LLMEngine:
    """One model and everything in flight on it.

    Args:
        model: local directory or hub id; options: fields of `EngineConfig`.
        launcher: makes the ranks of tensor parallelism; None: as child processes.

    Raises:
        UserError: an unknown option, or a model that cannot run; nothing has been loaded then.
    """

    unsampled: Unsampled | None
    # Whose masks the step had that sampled last, and those masks.
    masked: tuple[list[int], npt.NDArray[np.int32]]

    def __init__(self, model: str, *, launcher: RankLauncher | None = None, **options: Any) -> None:
        self.config = EngineConfig.create(model, **options)
        self.poison = Poison.from_environment()
        self.model_config = check_model(self.config)
        positions = self.model_config.rope.max_position(self.model_config.max_position_embeddings)
        self.max_model_len = min(self.config.max_model_len, positions)
        self.tokenizer: PreTrainedTokenizerBase | None = load_tokenizer(self.config)
        self.executor = create_executor(self.config, self.model_config, self.max_model_len, launcher)
        get_logger(__name__).info("%s: %s", self.config.model, self.executor.summary)
        self.requests = RequestMaker(
            self.config, self.model_config, self.tokenizer, self.max_model_len, self.executor.num_kvcache_blocks
        )
        self._start_empty()
        self.steps = self.prompt_tokens = self.generated_tokens = self.cached_tokens = 0
        self.step_times = StepTimes()

    @property
    def max_prompt_len(self) -> int:
        """Longest prompt that can run, in tokens: it leaves room to generate one, and fits the KV pool."""
        return self.requests.max_prompt_len

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with the special tokens the tokenizer adds by itself."""
        return self.requests.encode(text)

    def encode_batch(self, texts: Sized[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text, on all cores at once. Where the tokenizer refuses one it raises for all.

        Args:
            add_special_tokens: as `encode` does; without for text that holds them, as chat templates write it.
        """
        return self.requests.encode_batch(texts, add_special_tokens)

    def make_sequence(self, prompt: Prompt, params: SamplingParams) -> Sequence | RequestOutput:
        """Tokenize and check one request, on any thread; an output with `error` where it cannot run.

        A request of several sequences (samples, labels) is its first one: `step` returns that one when all have ended.
        """
        made = self.requests.make(prompt, params)
        if self.poison and isinstance(made, Sequence):
            self.poison.look(made.seq_id, self._as_text(prompt))
        return made

    def _as_text(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return prompt
        if self.tokenizer is None:
            return ""
        return str(self.tokenizer.decode(list(prompt), clean_up_tokenization_spaces=False))

    def add(self, seq: Sequence) -> None:
        """Queue a sequence from `make_sequence`."""
        for member in seq.members:
            self.prompt_tokens += member.num_prompt_tokens
            self.scheduler.add(member)

    def abort(self, seq: Sequence) -> None:
        """Stop working on an unfinished request."""
        for member in seq.members:
            if member.status is not SequenceStatus.FINISHED:
                self.scheduler.finish(member, "error")
            self.output_processor.forget(member)

    @property
    def has_work(self) -> bool:
        """Whether any sequence is unfinished, or a step still runs."""
        return self.scheduler.has_work or bool(self.in_flight)

    def step(self) -> list[tuple[Sequence, RequestOutput]]:
        """Launch one step and read the one before (with `async_scheduling` off: this one); the requests that finished.

        A step that has constrained rows is launched before it is known what they may sample: that begins with the next call, so
        that the host has the time of a whole step for masks, stop rules and the next step's schedule.

        Raises:
            EngineDeadError: a rank died; this engine cannot be used any more.
        """
        began = time.perf_counter()
        batch = order_batch(self.scheduler.schedule())
        asked = build_sampling_input(batch, self.model_config.vocab_size)
        work = build_model_input(batch, asked is not None, bool(self.config.lora_adapters)) if batch else None
        if work is not None and self.sharing is not None:
            shares, shared = self.sharing.update(batch, work.num_decodes, work.new_blocks)
            work = work._replace(shares=shares, shared=shared)
        self._sample()
        finished: list[tuple[Sequence, RequestOutput]] = []
        if work is not None:
            self.in_flight.append(Flight(batch, set()))
            if self.poison:
                self.poison.strike(batch)
            self.executor.launch(work)
            if asked is not None:
                if any(item.samples and item.seq.extra and item.seq.extra.needs_tokens for item in batch):
                    # What may come next depends on the tokens of the step before, which ends now; the device goes on with this one.
                    self.unsampled = self._constrain(asked, finished)
                else:
                    self.executor.sample(asked)
            self.steps += 1
        # Nothing to launch: what is in flight must come first.
        if self.in_flight and (not batch or len(self.in_flight) > self.config.async_scheduling):
            self._sample()
            self._apply(self._read(), finished)
        if batch:
            self.step_times.add(time.perf_counter() - began)
        return finished

    def _sample(self) -> None:
        """Let the step sample that waits for its masks, if one does."""
        if self.unsampled is None:
            return
        asked, masked, filled = self.unsampled
        self.executor.sample(asked, filled)
        self.unsampled = None
        self.masked = masked, asked.row_masks

    def _constrain(self, asked: SamplingInput, finished: list[tuple[Sequence, RequestOutput]]) -> Unsampled:
        """What the step launched last will sample with, from the tokens of the one before; it goes on at once where they leave one way."""
        batch, settled = self.in_flight[-1]
        asking = self._ask_for_forced_tokens(batch)
        reads: list[Read] = []
        while len(self.in_flight) > 1:
            reads += self._read()
        reads = self._accept(reads)
        ended = {read[0].seq_id for read in reads if self._surely_ends(read)}
        forced = self._worthwhile_forced_tokens(batch, asking - ended, {seq.seq_id for seq, _, _ in reads})
        if forced:
            self._apply(reads, finished)
            reads = []
        # Of rows that ask for nothing else: ids, rows and constraints; of others rows and constraints.
        masked: list[int] = []
        masked_rows: list[int] = []
        constraints: list[Constraint] = []
        limited_rows: list[int] = []
        limited: list[Constraint] = []
        is_over = SequenceStatus.FINISHED
        sampling = among_logits = -1
        for seq, _, _, samples in batch:
            sampling += samples
            extra = seq.extra
            if extra is None or not samples or not extra.samples_differently:
                continue
            among_logits += extra.needs_logits
            if seq.status is is_over or seq.seq_id in ended:
                continue
            constraint = extra.constraint
            if seq.seq_id in forced:
                settled.add(seq.seq_id)
                seq.num_pending -= 1
                seq.on_device = False  # it knows neither the last token nor how many there are
                for token_id in forced[seq.seq_id]:
                    if self._append((seq, token_id, None), finished):
                        break
            elif constraint is not None and constraint.needs_mask:
                if extra.needs_logits:
                    limited_rows.append(among_logits)
                    limited.append(constraint)
                else:
                    masked.append(seq.seq_id)
                    masked_rows.append(sampling)
                    constraints.append(constraint)
        constraints += limited
        # The copies of the step before to the device are done, as its tokens have come back.
        masks = self.executor.mask_buffer(len(constraints))
        filled = self.requests.grammars.start_masks(constraints, masks) if constraints else None
        self._apply(reads, finished)  # beside the threads that fill them
        bans: list[tuple[int, int]] = []
        needs_logits, among_logits = among_logits >= 0, -1
        for seq, _, _, samples in batch if needs_logits else ():
            if seq.extra is not None and samples and seq.extra.needs_logits:
                among_logits += 1
                if seq.status is not SequenceStatus.FINISHED:
                    banned = seq.extra.banned_next(seq.token_ids, seq.num_prompt_tokens)
                    bans += [(among_logits, token) for token in banned]
        return Unsampled(asked.with_grammar(masks, masked_rows, limited_rows, bans), masked, filled)

    def _ask_for_forced_tokens(self, batch: list[ScheduledSequence]) -> set[int]:
        """Ids of the sequences whose constraint is asked whether it leaves one way. That takes the host some microseconds each."""
        if self.executor.chunk_cost and len(batch) > 32:
            if self.steps % 4:
                return set()
            # Those whose last token was the only one its mask had: whoever begins a forced text is found a token later.
            ids, masks = self.masked
            words = masks.view(np.uint32)
            # Most masks have more among the first tokens already, which are the shortest texts.
            few = np.flatnonzero((words[:, :FIRST_WORDS] != 0).sum(axis=1, dtype=np.int16) <= 1)
            one = few[(words[few] != 0).sum(axis=1, dtype=np.int16) == 1]
            word = words[one].max(axis=1, initial=0)
            return {ids[row] for row in one[word & (word - 1) == 0]}
        return {seq.seq_id for seq, _, _, samples in batch if samples and seq.extra and seq.extra.constraint}

    def _worthwhile_forced_tokens(
        self, batch: list[ScheduledSequence], asking: set[int], ahead: set[int]
    ) -> dict[int, list[int]]:
        """What the constraints of a batch leave no choice about, by id of the sequences `asking`; nothing where sampling it token by token is
        faster. `ahead`: ids of those whose constraint knows one token more than they do."""
        forced: dict[int, list[int]] = {}
        for seq, _, _, samples in batch if asking else ():
            if seq.seq_id not in asking or not samples or seq.status is SequenceStatus.FINISHED:
                continue
            extra = seq.extra
            if extra is None or extra.constraint is None or extra.limits_tokens or seq.params.logprobs is not None:
                continue
            room = seq.max_new_tokens - seq.num_generated_tokens - 1 - (seq.seq_id in ahead)
            if len(tokens := extra.constraint.forced_tokens()[:room]) > 1:
                forced[seq.seq_id] = tokens
        saved = sum(len(tokens) - 1 for tokens in forced.values())
        return forced if saved >= self.executor.chunk_cost * len(batch) else {}

    def _read(self) -> list[Read]:
        """Read the oldest step in flight: its tokens that count."""
        result = self.executor.collect()
        batch, settled = self.in_flight.popleft()
        note_logprobs(batch, result)
        sampled = [item.seq for item in batch if item.samples]
        reads: list[Read] = []
        for seq, token_id in zip(sampled, result.tokens, strict=True):
            if seq.seq_id in settled:
                continue
            seq.num_pending -= 1
            if seq.status is not SequenceStatus.FINISHED:  # else: sampled before it was known that the sequence ends
                reads.append((seq, token_id, None))
        return reads

    def _accept(self, reads: list[Read]) -> list[Read]:
        """Hand the tokens to the constraints of their sequences, to all at once where nothing else can have chosen them."""
        accepted = list(reads)
        places: list[int] = []
        together: list[tuple[Constraint, int]] = []
        for place, (seq, token_id, _) in enumerate(reads):
            extra = seq.extra
            constraint = None if extra is None else extra.constraint
            if extra is None or constraint is None:
                continue
            if extra.accepts_together:
                places.append(place)
                together.append((constraint, token_id))
            else:
                accepted[place] = seq, token_id, Verdict(constraint.accept(token_id), constraint.is_stopped)
        fits = self.requests.grammars.accept_all(together) if together else ()
        for place, (constraint, token_id), fit in zip(places, together, fits, strict=True):
            accepted[place] = reads[place][0], token_id, Verdict(fit, constraint.is_stopped)
        return accepted

    def _surely_ends(self, read: Read) -> bool:
        """Whether an accepted token ends its sequence, as far as its constraint and length tell."""
        seq, _, verdict = read
        if verdict is None:
            return False
        return not verdict.fits or verdict.stopped or seq.num_generated_tokens + 1 >= seq.max_new_tokens

    def _apply(self, reads: list[Read], finished: list[tuple[Sequence, RequestOutput]]) -> None:
        """Apply the stop rules to the tokens that were read."""
        for read in reads:
            self._append(read, finished)

    def _append(self, read: Read, finished: list[tuple[Sequence, RequestOutput]]) -> bool:
        """Add a token to its sequence; whether that ends it. What is finished with it is added to `finished`."""
        seq, token_id, verdict = read
        self.generated_tokens += 1
        reason = self.output_processor.append(seq, token_id, verdict)
        if reason is None:
            return False
        self.scheduler.finish(seq, reason)
        self.cached_tokens += seq.num_cached_tokens
        own = self.output_processor.output(seq)
        output = own if seq.group is None else seq.group.finished(seq, own)
        if output is not None:
            finished.append((seq.members[0], output))
        return True

    def ids_in_step(self) -> set[int]:
        """Ids of the sequences in steps that have begun and not ended: where the engine died, the ones that may have done it."""
        return {item.seq.members[0].seq_id for flight in self.in_flight for item in flight.batch}

    def stats(self) -> EngineStats:
        """Counters and state; cheap enough for every second."""
        total = len(self.block_manager.blocks)
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            steps=self.steps,
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            cached_tokens=self.cached_tokens,
            preemptions=self.scheduler.num_preemptions,
            kv_usage=1 - self.block_manager.num_free_blocks / total,
            step_s=self.step_times.seconds,
            step_times=tuple(self.step_times.counts),
        )

    def exit(self) -> None:
        """Free the model and end its child processes."""
        self.executor.shutdown()

    def abandon(self) -> None:
        """Drop everything in flight, after an exception (Ctrl-C, say) cut a step short.

        The prefix cache goes too: it may promise blocks that were never computed. Several ranks end: they may be in the
        middle of a step, and their next answer would be taken for that of another.
        """
        if self.config.tensor_parallel_size > 1:
            self.exit()
        if self.unsampled is not None and self.unsampled.filled is not None:
            wait([self.unsampled.filled])  # the next masks go to the same memory
        self.executor.discard()
        self._start_empty()

    def _start_empty(self) -> None:
        self.unsampled = None
        self.masked = [], np.zeros((0, 1), dtype=np.int32)
        self.block_manager = BlockManager(
            self.executor.num_kvcache_blocks, self.config.kvcache_block_size, self.config.enable_prefix_caching
        )
        self.in_flight: deque[Flight] = deque()
        shape = self.executor.sharing
        self.sharing: PrefixSharing | None = None
        if shape is not None:
            rows = min(self.config.max_num_seqs, self.config.max_num_batched_tokens)
            blocks = -(-self.max_model_len // self.config.kvcache_block_size)
            self.sharing = PrefixSharing(rows, blocks, self.config.kvcache_block_size, shape)
        self.scheduler = Scheduler(self.config.max_num_seqs, self.config.max_num_batched_tokens, self.block_manager)
        self.output_processor = OutputProcessor(
            self.tokenizer, self.model_config.eos_token_ids, self.requests.think_tags
        )
