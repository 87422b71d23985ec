"""LLM: the offline front door. `LLM(model).generate(prompts, SamplingParams(...))`, as nano-vllm and vLLM programs have it."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as Sized
from typing import Any

from tqdm.auto import tqdm

from nanovllm.engine.llm_engine import LLMEngine, Prompt
from nanovllm.errors import UserError
from nanovllm.outputs import RequestOutput
from nanovllm.sampling_params import SamplingParams

Message = dict[str, Any]
# Most prompts taken in before a step.
PROMPTS_PER_STEP = 128


class LLM(LLMEngine):
    """An engine with a batch interface. See `LLMEngine` for the arguments and errors."""

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
                for _ in range(room):
                    index, (prompt, param) = requests.popleft()
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

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        sampling_params: SamplingParams | Sized[SamplingParams] | None = None,
        use_tqdm: bool = True,
        **chat_template_kwargs: Any,
    ) -> list[RequestOutput]:
        """Generate the next turn of one or several conversations through the model's chat template.

        Args:
            messages: a conversation (list of {"role", "content"}) or a list of them.
            chat_template_kwargs: passed to the template, for example `enable_thinking=False`.

        Raises:
            UserError: the model has no tokenizer or no chat template.
        """
        if self.tokenizer is None or not self.tokenizer.chat_template:
            raise UserError(f"{self.config.model} has no chat template; render the prompts yourself and call generate")
        conversations = [messages] if messages and isinstance(messages[0], dict) else messages
        prompts = [
            # The template writes the special tokens; encoding its text again would add some twice.
            self.tokenizer.apply_chat_template(
                conversation, tokenize=True, return_dict=False, add_generation_prompt=True, **chat_template_kwargs
            )
            for conversation in conversations
        ]
        return self.generate(prompts, sampling_params, use_tqdm)


def _one_each(params: SamplingParams | Sized[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if params is None:
        params = SamplingParams()
    if isinstance(params, SamplingParams):
        return [params] * count
    if len(params) != count:
        raise UserError(f"{len(params)} sampling_params for {count} prompts; give one, or as many as prompts")
    return list(params)
