"""Make the embedded base of `lorica demo`: a tokenizer and a small Llama model.

    python scripts/pretrain_tiny.py --data DIR --output-dir src/lorica/base/embedded

DIR holds `tinyshakespeare.txt`, `the-verdict.txt` and `books/` (see TEXTS below), all in the public
domain. About 2.6 MB of text is far too little for knowledge, so the model is made for one ability,
the one that the adapter of a demonstration builds on: to copy what stands in its context.

- Prose teaches that slowly. A share of the windows are *recall windows*: a few short pieces of the
  same texts, most of them words drawn evenly from the texts' vocabulary so that no habit of the
  language helps, come again and again in a new order. The share falls to almost nothing while the
  learning rate decays, so that the finished base goes on with prose and does not parrot its prompt:
  copying on demand is what the adapter has to teach.
- A second stage at half the rate makes the copying precise: its invented words are blends that no
  text holds, or tokens drawn evenly, so that the rarest piece of a word is copied as surely as any.
- Training starts from a copying circuit (see `start_with_copying`), or else most of it would be
  spent waiting for one.
- The matrices are trained with Muon (Jordan 2024), the rest with AdamW.

Everything follows from `--seed`; another number of threads or version may change the last bits.
"""

import argparse
import json
import math
import random
import re
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save as safetensors_bytes
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from lorica.records.atomic import write_file

TEXTS = {  # file in --data -> what it is; all of it is in the public domain in the USA
    "tinyshakespeare.txt": "William Shakespeare, plays (the char-rnn selection)",
    "the-verdict.txt": "Edith Wharton, The Verdict (1908)",
    "books/alice_11.txt": "Lewis Carroll, Alice's Adventures in Wonderland (1865)",
    "books/pride_and_prejudice_1342.txt": "Jane Austen, Pride and Prejudice (1813)",
    "books/sherlock_1661.txt": "Arthur Conan Doyle, The Adventures of Sherlock Holmes (1892)",
    "books/wizard_of_oz.txt": "excerpts of L. Frank Baum, The Wonderful Wizard of Oz (1900); Lewis "
    "Carroll, Alice's Adventures in Wonderland; Bram Stoker, Dracula (1897); Alexandre Dumas, The "
    "Count of Monte Cristo (1846)",
}
PAD, BOS, EOS = "<pad>", "<s>", "</s>"
ROPE_THETA = 10000.0
# sizes of the starting circuit: embedding, note of the token before, query and key, copy
EMBED, NOTE, MATCH, COPY = 0.04, 0.2, 4.0, 0.6
# of a stage: steps, share of the learning rates, are the invented words blends and bare tokens
STAGES = ((500, 1.0, False), (300, 0.5, True))
# GPT-2's pattern, but every digit is a word
WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# what stands between the pieces of a recall window
MARKS = [*",;:.!\n", "--", " |", " and", " of", " in", " was", " is", " the", " by"]
PLAIN = str.maketrans(
    {"“": '"', "”": '"', "‘": "'", "’": "'", "—": "--", "…": "...", "\ufeff": "", "_": ""}
)


# ---- text ----


def clean(text: str, *, verse: bool) -> list[str]:
    """Paragraphs of one file: no Gutenberg header or licence, plain quotes, prose lines joined."""
    text = text.replace("\r\n", "\n").translate(PLAIN)
    started = re.search(r"^\*\*\* ?START OF TH.*$", text, re.MULTILINE)
    ended = re.search(r"^(End of (the )?Project Gutenberg|\*\*\* ?END OF TH)", text, re.MULTILINE)
    text = text[started.end() if started else 0 : ended.start() if ended else len(text)]
    text = re.sub(r"^Produced by .*$", "", text, flags=re.MULTILINE)
    text = re.sub(
        r'^ *([\[\]",.]+)$|",$|^ {4}"', "\n", text, flags=re.MULTILINE
    )  # one file is a JSON list
    paragraphs = re.split(r"\n\s*\n", text)
    lines = [[" ".join(line.split()) for line in p.strip().split("\n")] for p in paragraphs]
    joined = [("\n" if verse else " ").join(line for line in p if line) for p in lines]
    return [p for p in joined if len(p) > 1]


def read_texts(folder: Path) -> list[list[str]]:
    """The paragraphs of every text in TEXTS, one list per file."""
    missing = [name for name in TEXTS if not (folder / name).is_file()]
    if missing:
        raise SystemExit(
            f"{folder} lacks {', '.join(missing)}: pass the folder that holds these texts as --data"
        )
    raw = {name: (folder / name).read_bytes().decode("utf-8") for name in TEXTS}
    return [clean(text, verse=name == "tinyshakespeare.txt") for name, text in raw.items()]


def train_tokenizer(texts: list[list[str]], *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE of the texts. It puts BOS before a text by itself, as Llama's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(("\n".join(paragraphs) for paragraphs in texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return tokenizer


class Windows:
    """Draws windows (num_rows, length) of token ids from the texts, all from one generator."""

    def __init__(
        self,
        texts: list[list[str]],
        tokenizer: Tokenizer,
        *,
        length: int,
        strange: bool,
        seed: int,
    ) -> None:
        encoded = [
            tokenizer.encode_batch([p + "\n" for p in t], add_special_tokens=False) for t in texts
        ]
        self.texts = [[e.ids for e in paragraphs] for paragraphs in encoded]
        self.weights = [sum(map(len, paragraphs)) for paragraphs in self.texts]
        self.flat = [[i for ids in paragraphs for i in ids] for paragraphs in self.texts]
        self.random, self.strange = random.Random(seed), strange
        words = sorted({w for t in texts for p in t for w in re.findall(r"[A-Za-z]{2,}", p)})
        words += [self.blend(words) for _ in words] if strange else []
        spaced = tokenizer.encode_batch([" " + w for w in words], add_special_tokens=False)
        self.words = [e.ids for e in spaced]
        self.marks = [tokenizer.encode(mark, add_special_tokens=False).ids for mark in MARKS]
        self.bos, self.eos = tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)
        self.num_tokens, self.length = tokenizer.get_vocab_size(), length

    def blend(self, words: list[str]) -> str:
        """The head of a word with the tail of another, so that only copying can spell it."""
        head, tail = self.random.choices(words, k=2)
        return head[: (len(head) + 1) // 2] + tail[len(tail) // 2 :].lower()

    def prose(self) -> list[int]:
        """Runs of whole paragraphs, each a document between BOS and EOS."""
        ids: list[int] = []
        while len(ids) < self.length:
            (text,) = self.random.choices(self.texts, self.weights)
            at = self.random.randrange(len(text))
            size, document = self.random.randint(20, 2 * self.length), []
            while len(document) < size and at < len(text):
                document += text[at]
                at += 1
            ids += [self.bos, *document[:-1], self.eos]  # the last newline gives way to EOS
        return ids[: self.length]

    def piece(self, *, invented: bool) -> list[int]:
        """A few words or tokens drawn evenly from the vocabulary, or a cutting of a text."""
        if invented and self.strange and self.random.random() < 0.5:
            return self.random.choices(
                range(self.eos + 1, self.num_tokens), k=self.random.randint(2, 8)
            )
        if invented:
            words = self.random.choices(self.words, k=self.random.randint(1, 4))
            return [i for word in words for i in word]
        (flat,) = self.random.choices(self.flat, self.weights)
        at = self.random.randrange(len(flat) - 24)
        return flat[at : at + self.random.randint(3, 24)]

    def recall(self) -> list[int]:
        """A few pieces, in a new order every time round."""
        invented = self.random.random() < 0.6
        pieces = [self.piece(invented=invented) for _ in range(self.random.randint(3, 10))]
        ids = [self.bos]
        while len(ids) < self.length:
            self.random.shuffle(pieces)
            mark = self.random.choice(self.marks) if self.random.random() < 0.5 else None
            for piece in pieces:
                ids += piece + (mark or self.random.choice(self.marks))
        return ids[: self.length]

    def batch(self, num_rows: int, *, recall_share: float) -> torch.Tensor:
        rows = [
            self.recall() if self.random.random() < recall_share else self.prose()
            for _ in range(num_rows)
        ]
        return torch.tensor(rows)


# ---- training ----


class Muon(torch.optim.Optimizer):
    """Momentum, then about the nearest orthogonal matrix (Jordan 2024).

    https://kellerjordan.github.io/posts/muon/
    """

    def __init__(
        self, matrices, *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for matrix in group["params"]:
                state = self.state[matrix]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(matrix)
                state["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonal(torch.lerp(matrix.grad, state["momentum"], group["momentum"]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(
                    update, alpha=-group["lr"] * max(1, matrix.size(0) / matrix.size(1)) ** 0.5
                )


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """About U Vᵀ of the singular value decomposition, by the quintic iteration of Jordan (2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.mT if tall else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def make_model(arguments: argparse.Namespace, tokenizer: Tokenizer) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=arguments.hidden_size,
        intermediate_size=arguments.intermediate_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=arguments.num_heads,
        num_key_value_heads=arguments.num_heads,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    model = LlamaForCausalLM(config)
    if arguments.copying_start:
        start_with_copying(model)
    return model


@torch.no_grad()
def start_with_copying(model: LlamaForCausalLM) -> None:
    """Lay a copying circuit (an induction head) into the first two layers before training.

    Head 0 of layer 0 attends one token back, head 1 two tokens back: the embeddings get a common
    offset, which no softmax sees, and query and key turn it into one vector each, a rotation of so
    many positions apart. Head 0 notes what it finds in a subspace of its own. Heads 0 and 1 of
    layer 1 compare the token at hand with these notes and write the token that they attend to. All
    other writing starts at zero. From random weights this circuit takes most of the training to
    appear, because no part of it has a gradient before the others.
    (Elhage et al. 2021, A Mathematical Framework for Transformer Circuits.)
    """
    config, (first, second) = model.config, [layer.self_attn for layer in model.model.layers[:2]]
    hidden, size = config.hidden_size, config.hidden_size // config.num_attention_heads
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    signs = torch.randint(0, 2, (hidden,)) * 2.0 - 1
    model.model.embed_tokens.weight.mul_(EMBED / config.initializer_range).add_(EMBED * signs)
    basis = torch.linalg.qr(torch.cat([signs[:, None], torch.randn(hidden, hidden - 1)], 1)).Q
    write, read, copy = basis[:, 1 : 1 + size], basis[:, -size:].T, basis[:, 1 + size :].T
    pairs = torch.arange(size // 2)
    angles = ROPE_THETA ** (-pairs * 2 / size)
    strength = 8.0 * (pairs < size // 4)  # the fast pairs know the distance
    slow = (torch.arange(size) % (size // 2) >= size // 4).unsqueeze(1)  # the slow ones the content
    for head, distance in enumerate((1, 2)):
        rows = slice(head * size, (head + 1) * size)
        turn = torch.cat([torch.cos(distance * angles), -torch.sin(distance * angles)])
        query, key = strength.repeat(2) * turn, torch.cat([strength, 0 * strength])
        first.q_proj.weight[rows] = torch.outer(query, signs) / hidden
        first.k_proj.weight[rows] = torch.outer(key, signs) / hidden
        # the slow pairs of a head carry half of `read`: one head compares one half, one the other
        half = read.roll(head * size // 4, 0) * slow
        second.q_proj.weight[rows] = MATCH * half
        second.k_proj.weight[rows] = MATCH * write.T.roll(head * size // 4, 0) * slow
        values = copy[head * size : (head + 1) * size]
        second.v_proj.weight[rows], second.o_proj.weight[:, rows] = values, COPY * values.T
    first.v_proj.weight[:size], first.o_proj.weight[:, :size] = read, NOTE * write


def schedule(step: int, *, num_steps: int) -> tuple[float, float]:
    """(share of the learning rate, share of recall windows) at a step: flat, then falling."""
    done = step / num_steps
    rate = min(1.0, (step + 1) / 20, max(0.02, 2 * (1 - done)))
    recall = 0.7 - 1.6 * max(0.0, done - 0.5) if done < 0.9 else 0.05
    return rate, recall


def loss_of(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())


@torch.no_grad()
def recall_accuracy(model: torch.nn.Module, windows: Windows, *, num_rows: int = 24) -> float:
    """Share of tokens foreseen when pieces of invented words come again, first tokens left out."""
    picker, right, total = windows.random, 0, 0
    rows, marked = [], []
    for _ in range(num_rows):
        pieces = [windows.piece(invented=True) for _ in range(5)]
        pieces = [p for p in pieces if len(p) > 1] or [windows.words[0] * 2]
        row, mark = [windows.bos], [False]
        for again in (False, True):
            for piece in picker.sample(pieces, len(pieces)):
                row += piece + windows.marks[0]
                mark += [False] + [again] * (len(piece) - 1) + [False] * len(windows.marks[0])
        rows.append(row), marked.append(mark)
    for row, mark in zip(rows, marked, strict=True):
        guess = model(input_ids=torch.tensor([row])).logits[0, :-1].argmax(-1)
        hit = (guess == torch.tensor(row[1:])) & torch.tensor(mark[1:])
        right, total = right + int(hit.sum()), total + sum(mark[1:])
    return right / total


def train(
    model: LlamaForCausalLM,
    windows: Windows,
    held_out: Windows,
    *,
    num_steps: int,
    share: float,
    arguments: argparse.Namespace,
) -> None:
    """One stage, at `share` of the learning rates; prints the state every 50 steps."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    rates = share * arguments.matrix_learning_rate, share * arguments.learning_rate
    muon = Muon(matrices, lr=rates[0], weight_decay=0.1)
    adamw = torch.optim.AdamW(others, lr=rates[1], betas=(0.9, 0.95), weight_decay=0.01)
    fast = torch.compile(model) if arguments.compile else model
    prose = held_out.batch(32, recall_share=0.0)
    began = time.monotonic()
    for step in range(num_steps):
        rate, recall_share = schedule(step, num_steps=num_steps)
        loss = loss_of(fast, windows.batch(arguments.batch_size, recall_share=recall_share))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, peak in zip((muon, adamw), rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = peak * rate
            optimizer.step()
        model.zero_grad(set_to_none=True)
        if step % 50 == 49 or step + 1 == num_steps:
            with torch.no_grad():
                prose_loss = loss_of(model, prose).item()
            print(
                f"step {step + 1}/{num_steps}  loss {loss.item():.3f}  held-out prose "
                f"{prose_loss:.3f}  recall {recall_accuracy(model, held_out):.3f}  "
                f"{time.monotonic() - began:.0f} s",
                flush=True,
            )
            if not math.isfinite(prose_loss):
                raise SystemExit("the loss is not finite: lower --matrix-learning-rate")


# ---- files ----


def write_model(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """The files that transformers loads: written whole, readable by all, without local traces."""
    folder.mkdir(parents=True, exist_ok=True)
    model = model.to(torch.bfloat16)
    weights = {
        n: t.contiguous() for n, t in model.state_dict().items() if n != "lm_head.weight"
    }  # tied
    write_file(folder / "model.safetensors", safetensors_bytes(weights, metadata={"format": "pt"}))
    with tempfile.TemporaryDirectory() as temporary:
        model.config.architectures = ["LlamaForCausalLM"]
        model.config.dtype = torch.bfloat16
        model.config.save_pretrained(temporary)
        model.generation_config.save_pretrained(temporary)
        for name in ("config.json", "generation_config.json"):
            write_file(folder / name, (Path(temporary) / name).read_bytes())
    write_file(folder / "tokenizer.json", tokenizer.to_str(pretty=False))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config.max_position_embeddings,
        "padding_side": "right",
    }
    write_file(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
    write_file(folder / "NOTICE.md", notice())


def notice() -> str:
    texts = "\n".join(f"- {what}" for what in TEXTS.values())
    return (
        "# The embedded base\n\n"
        "A small Llama model with its own byte-level BPE, made by this project with\n"
        "`scripts/pretrain_tiny.py`. It has read only the texts below, which are in the public\n"
        "domain in the USA, without Project Gutenberg's header and licence text. Weights,\n"
        "tokenizer and configuration are part of Lorica, under its licence (Apache-2.0).\n\n"
        f"{texts}\n\n"
        "It exists so that `lorica demo` and the tests run offline. It knows nothing and is fit\n"
        "for no other use.\n"
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with the texts")
    parser.add_argument("--output-dir", type=Path, required=True, help="where the model goes")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--hidden-size", type=int, default=160)
    parser.add_argument("--intermediate-size", type=int, default=432)
    parser.add_argument("--num-layers", type=int, default=4)
    parser.add_argument("--num-heads", type=int, default=4)
    parser.add_argument(
        "--steps", type=int, nargs=2, default=[stage[0] for stage in STAGES], help="of each stage"
    )
    parser.add_argument("--batch-size", type=int, default=24, help="windows per step")
    parser.add_argument("--length", type=int, default=128, help="tokens per window")
    parser.add_argument(
        "--learning-rate", type=float, default=6e-3, help="AdamW: embedding and norms"
    )
    parser.add_argument(
        "--matrix-learning-rate", type=float, default=0.02, help="Muon: the matrices"
    )
    parser.add_argument("--copying-start", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile: a quarter faster where it works"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    torch.manual_seed(arguments.seed)
    texts = read_texts(arguments.data)
    tokenizer = train_tokenizer(texts, vocab_size=arguments.vocab_size)
    kept = [t[: max(1, math.floor(0.98 * len(t)))] for t in texts]
    last = [t[math.floor(0.98 * len(t)) :] for t in texts]
    model = make_model(arguments, tokenizer)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    for i, (num_steps, (_, share, strange)) in enumerate(zip(arguments.steps, STAGES, strict=True)):
        windows, held_out = (
            Windows(part, tokenizer, length=arguments.length + 1, strange=strange, seed=seed)
            for part, seed in ((kept, arguments.seed + i), (last, arguments.seed + i + 1))
        )
        print(f"stage {i + 1}: {sum(windows.weights):,} tokens of text")
        train(model, windows, held_out, num_steps=num_steps, share=share, arguments=arguments)
    write_model(arguments.output_dir, model, tokenizer)


if __name__ == "__main__":
    main()
