"""Conversations to token ids through a chat template. Used by `LLM.chat` and by the row path of `pipelines`, on any thread.

The template writes the special tokens, so its text is encoded without those that a tokenizer adds by itself: BOS never comes twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from nanovllm.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]

# Arguments of `apply_chat_template` that no template sees: as variables of one they would change what is returned.
_RESERVED = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
}


REFUSED = "the chat template refuses the messages"


class ChatError(ValueError):
    """What is wrong with one conversation, in one line."""


class ChatRenderer:
    """Renders conversations for one model.

    Args:
        tokenizer: of the model; None where it has none.
        model: its name, for messages.
        chat_template: used instead of the model's own: Jinja as in `tokenizer_config.json`, or the name of one of several there.
        add_generation_prompt: end with the beginning of the assistant's turn.
        continue_final_message: leave the last message open, so that the model goes on with it.
        template_variables: further variables of the template, for example `enable_thinking`.

    Raises:
        UserError: there is no tokenizer or no template, the template is not Jinja, or the options do not go together.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None,
        model: str,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_variables: Mapping[str, Any] | None = None,
    ) -> None:
        if tokenizer is None:
            raise UserError(f"model {model!r} has no tokenizer and so no chat template; give prompts as token ids")
        if not (chat_template or tokenizer.chat_template):
            raise UserError(
                f"model {model!r} has no chat template; give one (chat_template, chat_template_file in a job), or render the "
                "prompts yourself and give them as text"
            )
        check_template_variables(template_variables or {})
        if add_generation_prompt and continue_final_message:
            raise UserError(
                "add_generation_prompt and continue_final_message do not go together: the first begins a new message"
            )
        self._tokenizer = tokenizer
        self._options: dict[str, Any] = {
            **(template_variables or {}),
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
        }
        try:
            self.text([{"role": "user", "content": "x"}])
        except ChatError as error:
            if isinstance(error.__cause__, jinja2.TemplateSyntaxError):
                raise UserError(f"the chat template is not Jinja: {error.__cause__.message}") from None
            # Anything else is about this conversation: a template may ask for a system message.

    def with_variables(self, **options: Any) -> ChatRenderer:
        """A renderer with other options for single conversations: template variables, or those of the constructor.

        Raises:
            UserError: as the constructor.
        """
        check_template_variables({name: value for name, value in options.items() if name not in _PER_CONVERSATION})
        merged = {**self._options, **options}
        if merged["add_generation_prompt"] and merged["continue_final_message"]:
            raise UserError("add_generation_prompt and continue_final_message do not go together")
        other = object.__new__(ChatRenderer)
        other._tokenizer, other._options = self._tokenizer, merged
        return other

    @property
    def is_text(self) -> bool:
        """Whether the tokens of a conversation are those of its `text`.

        A tokenizer with an `apply_chat_template` of its own may make tokens that no text stands for.
        """
        from transformers import PreTrainedTokenizerBase

        return type(self._tokenizer).apply_chat_template is PreTrainedTokenizerBase.apply_chat_template

    def text(self, messages: object) -> str:
        """The text of a conversation.

        Raises:
            ChatError: `messages` is no conversation, or the template refuses it.
        """
        rendered: str = self._render(messages, tokenize=False)
        return rendered

    def token_ids(self, messages: object) -> list[int]:
        """The token ids of a conversation.

        Raises:
            ChatError: as `text`; or the tokenizer cannot encode it.
        """
        ids: list[int] = self._render(messages, tokenize=True)
        return ids

    def _render(self, messages: object, tokenize: bool) -> Any:
        conversation = check_messages(messages)
        try:
            return self._tokenizer.apply_chat_template(
                conversation, tokenize=tokenize, return_dict=False, **self._options
            )
        except Exception as error:  # a template is a program: it may raise anything
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ChatError(f"{REFUSED}: {reason}") from error


_PER_CONVERSATION = {"add_generation_prompt", "continue_final_message"}


def check_template_variables(variables: Mapping[str, Any]) -> None:
    """Refuse names that are not variables of a template.

    Raises:
        UserError: naming one.
    """
    wrong = sorted(_RESERVED & set(variables))
    if wrong:
        raise UserError(
            f"chat_template_kwargs has {wrong[0]!r}, which is not a variable of templates; set it by itself or leave it out"
        )


def check_messages(messages: object) -> list[Message]:
    """A conversation as templates take it.

    Keys that are None are left out, as rows of a table have every key; content in parts becomes one string, a line for
    each part of type "text".

    Raises:
        ChatError: it is not a list of messages that have a role and content as text.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ChatError(f"messages are {type(messages).__name__}, not a list of role and content")
    if not messages:
        raise ChatError("messages are empty")
    return [_check_message(number, message) for number, message in enumerate(messages, 1)]


def _check_message(number: int, message: object) -> Message:
    if not isinstance(message, Mapping):
        raise ChatError(f"message {number} is {type(message).__name__}, not role and content")
    plain = {str(key): value for key, value in message.items() if value is not None}
    role = plain.get("role")
    if not isinstance(role, str) or not role:
        raise ChatError(f"message {number} has no role; it must be a string such as 'user'")
    if "content" in plain:
        plain["content"] = _content(number, plain["content"])
    elif plain.get("tool_calls"):
        plain["content"] = ""
    else:
        raise ChatError(f"message {number} (role {role!r}) has no content")
    return plain


def _content(number: int, content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise ChatError(f"the content of message {number} is {type(content).__name__}, not a string")
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(text, str):
            raise ChatError(f"message {number} has a part of type {kind!r}; only text can be used")
        texts.append(text)
    return "\n".join(texts)
