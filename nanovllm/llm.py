"""LLM: the offline front door. `LLM(model).generate(prompts, SamplingParams(...))`, as nano-vllm and vLLM programs have it."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from collections.abc import Sequence as Sized
from typing import Any

from tqdm.auto import tqdm

from nanovllm.engine.llm_engine import LLMEngine, Prompt
from nanovllm.errors import UserError
from nanovllm.outputs import RequestOutput, error_output
from nanovllm.sampling_params import SamplingParams
from nanovllm.utils.chat import ChatError, ChatRenderer, Message
from nanovllm.utils.heap import settled_heap

# Most prompts taken in before a step.
PROMPTS_PER_STEP = 128


class LLM(LLMEngine):
    """An engine with a batch interface. See `LLMEngine` for the arguments and errors."""

    @settled_heap()
    def generate(
        self,
        prompts: Prompt | Sized[Prompt],
        sampling_params: SamplingParams | Sized[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate for every prompt; outputs stand in the order of the prompts.

        Args:
            prompts: strings and lists of token ids, mixed freely; a single string is one prompt.
            sampling_params: one for all prompts, or one each; the default is `SamplingParams()`.
            use_tqdm: show progress and tokens a second.

        Returns:
            One `RequestOutput` a prompt. A prompt that cannot run has `finish_reason` "error" and a message in `error`.

        Raises:
            UserError: not as many sampling parameters as prompts.
            EngineDeadError: a rank died.
        """
        prompt_list: list[Prompt] = [prompts] if isinstance(prompts, str) else list(prompts)  # type: ignore[arg-type]
        params = _one_each(sampling_params, len(prompt_list))
        outputs: list[RequestOutput | None] = [None] * len(prompt_list)
        indices: dict[int, int] = {}
        progress = tqdm(total=len(prompt_list), desc="Generating", dynamic_ncols=True, disable=not use_tqdm)
        start = self.generated_tokens
        try:
            requests = deque(enumerate(zip(prompt_list, params, strict=True)))
            while requests or self.has_work:
                # Prompts are tokenized while steps run on the device: a few each time, and before they are needed.
                room = min(len(requests), self.config.max_num_seqs - len(self.scheduler.waiting), PROMPTS_PER_STEP)
                taken = [requests.popleft() for _ in range(room)]
                token_ids = self._encoded([prompt for _, (prompt, _) in taken])
                for (index, (_, param)), prompt in zip(taken, token_ids, strict=True):
                    made = self.make_sequence(prompt, param)
                    if isinstance(made, dict):
                        outputs[index] = made
                        progress.update()
                    else:
                        indices[made.seq_id] = index
                        self.add(made)
                for seq, output in self.step():
                    outputs[indices[seq.seq_id]] = output
                    progress.update()
                elapsed = progress.format_dict["elapsed"]
                if use_tqdm and elapsed:
                    rate = (self.generated_tokens - start) / elapsed
                    progress.set_postfix_str(f"{rate:.0f} output tok/s", refresh=False)
        except BaseException:  # Ctrl-C too: the next call must find nothing of this one
            self.abandon()
            raise
        finally:
            progress.close()
        return [output for output in outputs if output is not None]

    def _encoded(self, prompts: list[Prompt]) -> list[Prompt]:
        """Prompts with token ids for text; as they are where the tokenizer refuses one, whose error its request will be."""
        texts = [prompt for prompt in prompts if isinstance(prompt, str)]
        if self.tokenizer is None:
            return prompts
        try:
            token_ids = iter(self.encode_batch(texts))
        except Exception:  # tokenizers raise many kinds
            return prompts
        return [next(token_ids) if isinstance(prompt, str) else prompt for prompt in prompts]

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | Sized[SamplingParams] | None = None,
        use_tqdm: bool = True,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **template_variables: Any,
    ) -> list[RequestOutput]:
        """Generate the next turn of one or several conversations through a chat template.

        Args:
            messages: a conversation (list of {"role", "content"}) or a list of them.
            sampling_params: one for all conversations, or one each.
            use_tqdm: show progress and tokens a second.
            chat_template: used instead of the model's own.
            add_generation_prompt: end the prompt with the beginning of the assistant's turn.
            continue_final_message: leave the last message open and go on with it; needs `add_generation_prompt=False`.
            chat_template_kwargs: variables of the template, for example `{"enable_thinking": False}`.
            template_variables: the same, as arguments.

        Returns:
            One `RequestOutput` a conversation; one that the template refuses has `finish_reason` "error".

        Raises:
            UserError: the model has no tokenizer or no chat template, or options do not go together.
        """
        chat = ChatRenderer(
            self.tokenizer,
            self.config.model,
            chat_template=chat_template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_variables={**(chat_template_kwargs or {}), **template_variables},
        )
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        params = _one_each(sampling_params, len(conversations))
        prompts: list[Prompt] = []
        failed: dict[int, RequestOutput] = {}
        for number, conversation in enumerate(conversations):
            try:
                prompts.append(chat.token_ids(conversation))
            except ChatError as error:
                failed[number] = error_output(str(error))
        fine = [number for number in range(len(conversations)) if number not in failed]
        outputs = dict(zip(fine, self.generate(prompts, [params[number] for number in fine], use_tqdm), strict=True))
        outputs |= failed
        return [outputs[number] for number in range(len(conversations))]


def _one_each(params: SamplingParams | Sized[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise UserError(f"{len(params)} sampling_params for {count} prompts; give one, or as many as prompts")
    return list(params)
