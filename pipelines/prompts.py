"""From a row's columns to its prompt: text, a conversation through a chat template, or token ids. Part of `requests`."""

from __future__ import annotations

import json
from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple, cast

import pyarrow as pa

from nanovllm import UserError
from nanovllm.utils.chat import REFUSED, ChatError, ChatRenderer, Message, check_messages
from nanovllm.utils.validation import suggest
from pipelines.job import PromptConfig
from pipelines.row_values import OBJECTS, RowError, TokenIds, is_text, list_item
from pipelines.templates import RowTemplate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Rendered(NamedTuple):
    """A prompt as text that holds its special tokens: the tokenizer adds none.

    Attributes:
        text: of the prompt.
        refused: how the error of a text begins that the tokenizer cannot encode.
    """

    text: str
    refused: str

    def token_ids(self, tokenizer: PreTrainedTokenizerBase) -> list[int]:
        """The prompt's token ids.

        Raises:
            RowError: the tokenizer cannot encode it.
        """
        try:
            ids: list[int] = tokenizer.encode(self.text, add_special_tokens=False)
        except Exception as error:  # tokenizers raise many kinds
            raise RowError(f"{self.refused}: {' '.join(str(error).split()) or type(error).__name__}") from None
        return ids


# Plain text is for the tokenizer to complete.
Prompt = str | Rendered | TokenIds


class Prompts:
    """Makes the prompts of one job.

    Args:
        config: which column they come from, and how.
        schema: of the input.

    Attributes:
        columns: input columns that are read.
        token_column: the one that holds prompts as lists of token ids, where one does.

    Raises:
        UserError: a column is missing or of a type that holds no prompts, or the template is wrong.
    """

    def __init__(self, config: PromptConfig, schema: pa.Schema) -> None:
        self._config = config
        self._template: RowTemplate | None = None
        self._chat: ChatRenderer | None = None
        self._few_shot = _few_shot(config)
        self.token_column: str | None = None
        if config.template is not None:
            self._template = RowTemplate(config.template, schema.names)
            self.columns = self._template.columns
            return
        setting, name = ("messages", config.messages) if config.messages else ("column", config.column)
        assert name is not None  # `PromptConfig` gives one where nothing else is given
        self._column = name
        self.columns = [name]
        if name not in schema.names:
            raise UserError(f"input has no column {name!r} (prompt.{setting}): {suggest(name, schema.names)}")
        kind = schema.field(name).type
        if not _may_hold(kind, setting):
            wanted = {
                "column": "prompts are strings, or lists of token ids",
                "messages": "conversations are lists of structs with role and content, or JSON text",
            }
            raise UserError(
                f"column {name!r} (prompt.{setting}) is {kind}; {wanted[setting]}: name another column or cast it"
            )
        if setting == "column" and list_item(kind) is not None:
            if config.chat:
                raise UserError(f"column {name!r} holds token ids, which no chat template takes; leave out prompt.chat")
            self.token_column = name

    def attach(self, tokenizer: PreTrainedTokenizerBase | None, model: str) -> None:
        """Make ready to render for a model.

        Raises:
            UserError: prompts go through a chat template, and the model has none, or one's own is wrong.
        """
        if self._config.uses_chat:
            self._chat = ChatRenderer(
                tokenizer,
                model,
                chat_template=self._config.chat_template,
                add_generation_prompt=self._config.add_generation_prompt,
                template_variables=self._config.chat_template_kwargs,
            )

    def source(self, row: Mapping[str, object]) -> str | TokenIds | list[Message]:
        """What the prompt of a row is made of: text, token ids, or a conversation.

        Raises:
            RowError: a value is null, empty or of another kind, or the row's template refuses it.
        """
        if self._config.messages is not None:
            return read_messages(row[self._column])
        value = self._template.render(row) if self._template else row[self._column]
        return check_prompt_value(value)

    def render(self, row: Mapping[str, object]) -> Prompt:
        """The prompt of a row: text for the tokenizer, or token ids.

        Raises:
            RowError: as `source`, or the chat template refuses it.
        """
        source = self.source(row)
        if self._config.messages is not None:
            return self._through_chat(cast("list[Message]", source))
        if not self._config.chat:
            return cast("str | list[int]", source)
        if not isinstance(source, str):
            raise RowError("prompt is a list, not a string")
        return self._through_chat([{"role": "user", "content": source}])

    def _through_chat(self, messages: list[Message]) -> Rendered | list[int]:
        assert self._chat is not None  # `attach` has made it
        own = messages[:1] if messages[0]["role"] == "system" else []
        if not own and self._config.system is not None:
            first: list[Message] = [{"role": "system", "content": self._config.system}]
        else:
            first = own
        return render_chat(self._chat, [*first, *self._few_shot, *messages[len(own) :]])


def render_chat(chat: ChatRenderer, messages: object) -> Rendered | list[int]:
    """A row's conversation as a prompt.

    Raises:
        RowError: the template refuses it.
    """
    try:
        return Rendered(chat.text(messages), REFUSED) if chat.is_text else chat.token_ids(messages)
    except ChatError as error:
        raise RowError(str(error)) from None


def check_prompt_value(value: object) -> str | TokenIds:
    """A prompt as the engine takes it.

    Raises:
        RowError: the value is null, empty, or neither a string nor a list.
    """
    if value is None or value != value:  # a NaN is what pandas makes of a null
        raise RowError("prompt is null")
    if isinstance(value, bytes):
        raise RowError("prompt is not valid UTF-8")
    if not isinstance(value, (str, list, array)):
        raise RowError(f"prompt is {type(value).__name__}, not a string")
    if not value:
        raise RowError("prompt is empty")
    return value


def read_messages(value: object) -> list[Message]:
    """A conversation from a column's value.

    Raises:
        RowError: it is null or none.
    """
    if value is None:
        raise RowError("messages are null")
    if isinstance(value, bytes):
        raise RowError("messages are not valid UTF-8")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"messages are not JSON: {error}") from None
    try:
        return check_messages(value)
    except ChatError as error:
        raise RowError(str(error)) from None


def _may_hold(kind: pa.DataType, setting: str) -> bool:
    if is_text(kind) or kind == OBJECTS:
        return True
    item = list_item(kind)
    if item is None:
        return False
    if setting == "column":
        return bool(pa.types.is_integer(item))
    return bool(pa.types.is_struct(item)) and {"role", "content"} <= {
        item.field(i).name for i in range(item.num_fields)
    }


def _few_shot(config: PromptConfig) -> list[Message]:
    messages: list[Message] = []
    for turn in config.few_shot or ():
        if "role" in turn:
            messages.append(dict(turn))
        else:
            messages += [{"role": role, "content": turn[role]} for role in ("user", "assistant")]
    return messages
