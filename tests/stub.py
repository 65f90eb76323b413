"""An engine that gives one fixed reply; run as a program, it chats."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext


class StubEngine:
    """Reasons "thought", says "answer". Ctrl-C comes after `stop_after` tokens; each token takes `seconds`."""

    adapters = ()

    def __init__(self, template, seconds: float = 0.0) -> None:
        self.template = template
        self.seconds = seconds
        self.stop_after = 0
        self.asked = []
        words = (
            "<|channel|>analysis<|message|>thought<|end|><|start|>assistant<|channel|>final<|message|>answer<|return|>"
        )
        self.reply = template.tokenizer(words)["input_ids"]

    def without_adapter(self):
        return nullcontext()

    def generate(self, prompts, sampling, on_token):
        self.asked.append((prompts[0], sampling))
        for count, token in enumerate(self.reply, start=1):
            time.sleep(self.seconds)
            on_token(token)
            if count == self.stop_after:
                raise KeyboardInterrupt
        return [self.reply]


if __name__ == "__main__":
    import fcntl
    import termios
    from pathlib import Path

    from ossia.config import InferConfig
    from ossia.infer.chat import chat
    from ossia.model.tokenizer import load_tokenizer
    from ossia.template import load_template

    # The first process of a session: its terminal's Ctrl-C comes here.
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    folder, seconds, *flags = sys.argv[1:]
    config = InferConfig.from_args(["--model", folder, *flags], "chat", "")
    chat(StubEngine(load_template(load_tokenizer(Path(folder)), "harmony"), float(seconds)), config)
