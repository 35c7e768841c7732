"""A dialogue with a model, spelled exactly as its training was."""

from __future__ import annotations

from typing import IO, Any

import torch
from transformers import TextStreamer

from lorica.attach.activate import activate
from lorica.cli.opening import Subject
from lorica.errors import ConfigError
from lorica.tasks.causal_lm import CausalLM, stop_tokens
from lorica.tasks.task import device_of
from lorica.tasks.text_classification import TextClassification


class Dialogue:
    """Keeps the turns of a chat. A model without a chat template is asked prompt by prompt.

    Args:
        opened: the model and how to ask it.
        max_new_tokens, temperature, top_p: of an answer.
        system: message that begins every chat; only with a chat template.
    """

    def __init__(
        self,
        opened: Subject,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        system: str | None,
    ) -> None:
        self.opened, self.max_new_tokens, self.temperature, self.top_p = (
            opened,
            max_new_tokens,
            temperature,
            top_p,
        )
        tokenizer: Any = opened.task.tokenizer  # type: ignore[attr-defined]
        self.tokenizer = tokenizer
        self.chats = isinstance(opened.task, CausalLM) and bool(
            getattr(tokenizer, "chat_template", None)
        )
        if system and not self.chats:
            raise ConfigError(
                "--system has no effect: the tokenizer has no chat template", mend="leave it out"
            )
        self.opening = [{"role": "system", "content": system}] if system else []
        self.turns = list(self.opening)

    def describe(self) -> str:
        what = f"{type(self.opened.model).__name__}, {self.opened.task.kind}"
        return what + (", with its adapter" if self.opened.adapter else ", without an adapter")

    def command(self, text: str) -> str:
        """Carry out a line that begins with a slash; returns what to tell."""
        if text == "/clear":
            self.turns = list(self.opening)
            return "forgotten"
        if text in ("/base", "/tuned"):
            if self.opened.adapter is None:
                return "there is no adapter here"
            activate(self.opened.model, self.opened.adapter if text == "/tuned" else None)
            return "the adapter answers" if text == "/tuned" else "the base answers"
        return f"unknown: {text}; there are /base /tuned /clear /quit"

    def answer(self, text: str, stream: IO[str]) -> str:
        """Answer one input, written to `stream` as it comes."""
        task = self.opened.task
        if isinstance(task, TextClassification):
            (found,) = task.predict(self.opened.model, [{"text": text, "label": task.labels[0]}])
            answer = task.labels[int(found.output)]  # type: ignore[arg-type]
            print(answer, file=stream, flush=True)
            return answer
        record = {"prompt": text}
        if self.chats:
            self.turns.append({"role": "user", "content": text})
            record = {"messages": self.turns}
        answer = self._generate(record, stream)
        if self.chats:
            self.turns.append({"role": "assistant", "content": answer})
        return answer

    @torch.no_grad()
    def _generate(self, record: dict, stream: IO[str]) -> str:
        model: Any = self.opened.model
        task = self.opened.task
        if isinstance(task, CausalLM):
            ids = task.encoder.prompt_ids(record)
            stop = list(
                dict.fromkeys([*task.encoder.stop_ids, *stop_tokens(model, self.tokenizer)])
            )
        else:
            ids = self.tokenizer(record["prompt"])["input_ids"]
            stop = stop_tokens(model, self.tokenizer)
        writer = _Writer(self.tokenizer, stream, skip_prompt=isinstance(task, CausalLM))
        given = torch.tensor([ids], device=device_of(model))
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            sampling = {
                "do_sample": True,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "top_k": 0,
            }
        fill = self.tokenizer.pad_token_id
        model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=self.max_new_tokens,
            pad_token_id=fill if fill is not None else (stop[0] if stop else 0),
            eos_token_id=stop or None,
            streamer=writer,
            **sampling,
        )
        return writer.text.strip()


class _Writer(TextStreamer):
    """Writes words as they are finished, and keeps the whole."""

    def __init__(self, tokenizer: Any, stream: IO[str], *, skip_prompt: bool) -> None:
        super().__init__(tokenizer, skip_prompt=skip_prompt, skip_special_tokens=True)
        self.stream, self.text = stream, ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        print(text, end="\n" if stream_end else "", file=self.stream, flush=True)
