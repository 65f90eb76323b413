"""A conversation: what was said, the settings of the next reply, and one turn."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from rich.console import Console

from ossia.config import InferConfig
from ossia.infer.display import Display
from ossia.infer.engine import Engine, Sampling
from ossia.template.history import reply_messages
from ossia.template.messages import Message


@dataclass
class Session:
    """`messages` are the exchanges, without the system text, which is `config.system`."""

    engine: Engine
    config: InferConfig
    console: Console
    messages: list[Message] = field(default_factory=list)
    think: str = "show"
    draws: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.reseed()

    def reseed(self) -> None:
        """From here on replies are drawn as in a conversation that begins."""
        self.draws = random.Random(self.config.seed)

    @property
    def conversation(self) -> list[Message]:
        """The messages as the model reads them."""
        return [*([Message("system", self.config.system)] if self.config.system else []), *self.messages]

    def note(self, text: str) -> None:
        """Print a line that nobody said."""
        self.console.print(text, style="dim", markup=False)

    def ask(self, question: str) -> None:
        """One turn; a stopped or empty one is no part of the conversation."""
        self.messages.append(Message("user", question))
        answer = None
        try:
            answer = self.reply(self.conversation)
        finally:
            if answer is None:
                self.messages.pop()
        if answer is None:
            self.note("(the question and what was said of the answer are not kept)")
        else:
            self.messages += answer

    def reply(self, messages: list[Message]) -> list[Message] | None:
        """Print the answer to `messages` and return it; None where it was stopped before its end or says nothing."""
        template, config = self.engine.template, self.config
        prompt = template.prompt(messages, reasoning_effort=config.reasoning_effort)
        splitter = template.stream()
        ids: list[int] = []
        stopped = False
        terminal = self.console.is_terminal and not self.console.is_dumb_terminal
        with Display(self.console, self.think, terminal and config.markdown is not False) as display:

            def take(token: int) -> None:
                ids.append(token)
                if config.stream:
                    display.push(splitter.push(token))

            seed = self.draws.getrandbits(32)
            sampling = Sampling(config.temperature, config.top_p, config.max_new_tokens, seed)
            try:
                self.engine.generate([prompt], sampling, take)
            except KeyboardInterrupt:
                stopped = True
            if not config.stream:
                for token in ids:
                    display.push(splitter.push(token))
            display.push(splitter.flush())
        reply = template.parse(ids)
        if stopped and not reply.finished:
            self.note("(stopped)")
            return None
        if not reply.finished:
            self.note(f"(cut at --max_new_tokens {config.max_new_tokens})")
        if not (reply.content.strip() or reply.thinking.strip() or reply.tool_calls):
            self.note("(an empty reply)")
            return None
        return reply_messages(template, ids)
