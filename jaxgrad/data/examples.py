"""An example: a prompt and the response whose loss is measured. No file and no tokenizer here.

`data.read` makes examples of a file's records; `data.tokens` makes tokens of them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# system to tool: as OpenAI and Hugging Face write them. The last three are older names of tool, which some
# chat templates know instead.
ROLES = ("system", "user", "assistant", "developer", "tool", "function", "ipython", "observation")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    Attributes:
        role: One of `ROLES`.
        content: Its text; "" if it has none.
        more: The turn's other fields that a chat template may print, as the record has them:
            reasoning_content, tool_calls, name, ...
    """

    role: str
    content: str
    more: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GivenTokens:
    """The tokens of a record that was tokenized before.

    Attributes:
        token_ids: All of them.
        targets: For each token, whether its loss counts.
    """

    token_ids: tuple[int, ...]
    targets: tuple[bool, ...]


@dataclass(frozen=True)
class Example:
    """A prompt and its response.

    Attributes:
        index: Position of the record in its file, from 0.
        id: 16 hex digits that depend only on messages and response: the same content has the same id at any
            position and in any file format.
        messages: The prompt's turns, without the response; empty for plain text, all of whose tokens
            are targets, and for tokens that were given.
        response: The text whose loss is measured: the content of the last turn.
        reply: The last turn in full, where it has more than its text; else None.
        template_values: What else of the record a chat template reads: tools, documents, ...
        given: The tokens, if the record has them instead of text.
        joint: What stands between prompt and response where no chat template is applied: a newline, or
            nothing for a record whose two texts are to be put together as they are.
    """

    index: int
    id: str
    messages: tuple[Message, ...]
    response: str
    reply: Message | None = None
    template_values: Mapping[str, Any] = field(default_factory=dict)
    given: GivenTokens | None = None
    joint: str = "\n"

    @property
    def reply_text(self) -> str:
        """The response as results keep it: its text, and as JSON what else the reply has (tool calls)."""
        more = {} if self.reply is None else self.reply.more
        rest = {name: value for name, value in more.items() if value is not None}
        if not rest:
            return self.response
        told = json.dumps(rest, ensure_ascii=False, default=repr)
        return f"{self.response}\n{told}" if self.response else told

    @property
    def instruction(self) -> str:
        """The prompt as plain text: the contents of its turns, joined by newlines."""
        return "\n".join(message.content for message in self.messages)


@dataclass(frozen=True)
class Fields:
    """The names of a record's fields, set by the flags --instruction_field and so on."""

    instruction: str = "instruction"
    input: str = "input"
    output: str = "output"
