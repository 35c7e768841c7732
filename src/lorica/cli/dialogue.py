"""A dialogue with a model, spelled exactly as its training was."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from typing import IO, Any

import torch
from transformers import TextStreamer

from lorica.attach.activate import activate
from lorica.cli.opening import Subject
from lorica.errors import ConfigError, nearest
from lorica.tasks.causal_lm import CausalLM, stop_tokens
from lorica.tasks.seq2seq import Seq2Seq
from lorica.tasks.task import device_of, filler, num_positions
from lorica.tasks.text_classification import TextClassification

COMMANDS = ("/base", "/tuned", "/clear", "/quit")


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn: at temperature 0 always the likeliest token."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0

    def options(self) -> dict[str, Any]:
        """The same for `generate` of transformers."""
        if self.temperature == 0:
            return {"do_sample": False, "num_beams": 1}
        return {
            "do_sample": True,
            "num_beams": 1,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": 0,
        }


class Dialogue:
    """Keeps the turns of a chat, or asks prompt by prompt.

    Args:
        opened: the model and how to ask it.
        sampling: of the answers.
        system: message that begins every chat; None takes that of the training.
        turns: whether to ask with the chat template; None: as the training was, else where the
            tokenizer has one.

    Raises:
        ConfigError: a system message or turns for a model that is not asked so.
    """

    def __init__(
        self,
        opened: Subject,
        sampling: Sampling,
        *,
        system: str | None = None,
        turns: bool | None = None,
    ) -> None:
        self.opened, self.sampling = opened, sampling
        self.tokenizer: Any = opened.task.tokenizer
        self.tuned = opened.adapter is not None
        known = opened.format == "chat" if opened.format else bool(self.tokenizer.chat_template)
        causal = isinstance(opened.task, CausalLM)
        if turns and not causal:
            raise ConfigError(f"--turns has no effect with {opened.task.kind}", mend="leave it out")
        self.chats = causal and (known if turns is None else turns)
        if system and not self.chats:
            raise ConfigError(
                "--system has no effect: this model is asked prompt by prompt",
                mend="leave it out, or ask with the chat template: --turns",
            )
        system = system or (opened.system if self.chats else None)
        self.opening = [{"role": "system", "content": system}] if system else []
        self.turns = list(self.opening)

    def describe(self) -> str:
        """What answers, and how it is asked."""
        if isinstance(self.opened.task, TextClassification):
            how = f"one of {', '.join(self.opened.task.labels[:6])}"
        else:
            how = "in turns of a chat" if self.chats else "prompt by prompt"
        adapter = "with its adapter" if self.tuned else "without an adapter"
        return f"{type(self.opened.model).__name__} {adapter}, asked {how}"

    def command(self, text: str) -> str:
        """Carry out a line that begins with a slash; returns what to tell."""
        if text == "/clear":
            self.turns = list(self.opening)
            return "forgotten"
        if text in ("/base", "/tuned"):
            if self.opened.adapter is None:
                return "there is no adapter here"
            self.tuned = text == "/tuned"
            activate(self.opened.model, self.opened.mixture if self.tuned else None)
            return "the adapter answers" if self.tuned else "the base answers"
        near = nearest(text, COMMANDS)
        hint = f"did you mean {near}?" if near else f"there are {' '.join(COMMANDS)}"
        return f"{text} is no command; {hint}"

    def answer(self, text: str, stream: IO[str]) -> str:
        """Answer one input, written to `stream` as it comes."""
        task = self.opened.task
        if isinstance(task, TextClassification):
            (found,) = task.predict(self.opened.model, [{"text": text, "label": task.labels[0]}])
            answer = task.labels[int(found.output)]  # type: ignore[arg-type]
            print(answer, file=stream, flush=True)
            return answer
        record: dict[str, Any] = {"prompt": text}
        if self.chats:
            record = {"messages": [*self.turns, {"role": "user", "content": text}]}
        answer = self._generate(record, stream)
        if self.chats:  # a stopped answer leaves no turn
            self.turns = [*record["messages"], {"role": "assistant", "content": answer}]
        return answer

    @torch.no_grad()
    def _generate(self, record: dict, stream: IO[str]) -> str:
        model: Any = self.opened.model
        task = self.opened.task
        limit, room = num_positions(model), self.sampling.max_new_tokens
        if limit is not None:  # an answer may fill half of the positions, a prompt the others
            room = min(room, limit // 2)
        if isinstance(task, CausalLM):
            ids = task.encoder.prompt_ids(record, most=None if limit is None else limit - room)
            stop = list(
                dict.fromkeys([*task.encoder.stop_ids, *stop_tokens(model, self.tokenizer)])
            )
        else:
            assert isinstance(task, Seq2Seq)
            ids = task.prompt_ids(record)
            stop = stop_tokens(model, self.tokenizer)
        writer = _Writer(self.tokenizer, stream, skip_prompt=isinstance(task, CausalLM))
        given = torch.tensor([ids or stop[:1] or [0]], device=device_of(model))
        model.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=room,
            pad_token_id=filler(model, self.tokenizer),
            eos_token_id=stop or None,
            streamer=writer,
            **self.sampling.options(),
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


def converse(dialogue: Dialogue) -> None:
    """Answer line by line until the input ends or says /quit.

    On a terminal with a prompt, a line editor, and Ctrl-C for the answer alone.
    """
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):  # absent on some systems; then there is no history
            import readline  # noqa: F401
        print(f"{dialogue.describe()}\n{'  '.join(COMMANDS)}", file=sys.stderr)
    while True:
        try:
            line = input("> ") if terminal else sys.stdin.readline()
        except (EOFError, KeyboardInterrupt) as end:  # at the prompt both mean: enough
            if isinstance(end, KeyboardInterrupt) and not terminal:
                raise
            print(file=sys.stderr)
            return
        if not line and not terminal:
            return
        text = line.strip()
        if text == "/quit":
            return
        if text.startswith("/"):
            print(dialogue.command(text), file=sys.stderr)
        elif text:
            _answer(dialogue, line.rstrip("\n"), terminal)


def _answer(dialogue: Dialogue, text: str, terminal: bool) -> None:
    try:
        dialogue.answer(text, sys.stdout)
    except KeyboardInterrupt:
        if not terminal:
            raise
        print("\n(stopped)", file=sys.stderr)
