"""Train the Mistral of `mistral_core/data/tiny` on Jane Austen's six novels, with a tokenizer of its own.

The novels are in the public domain; a Debian package has them. One CPU core takes ten to twenty minutes:

    apt-get install --no-install-recommends r-cran-janeaustenr
    Rscript -e 'writeLines(janeaustenr::austen_books()$text, "austen.txt", useBytes = TRUE)'
    python tools/train_tiny.py austen.txt out/
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from mistral_torch import GenerationConfig, MistralConfig, MistralForCausalLM, MistralTokenizer

CONFIG = MistralConfig(
    vocab_size=2048,
    hidden_size=176,
    intermediate_size=448,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,  # 6 x 32 is not 176, as in Mistral Nemo
    sliding_window=80,  # shorter than any text worth writing: the cache has to roll
    max_position_embeddings=4096,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,  # a fifth of the parameters: better spent on layers
    dtype="bfloat16",
)
CONTROL = ["<unk>", "<s>", "</s>"]
BOS, EOS = 1, 2
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "add_bos_token": True,
    "add_eos_token": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": CONFIG.max_position_embeddings,
}


def read_chapters(path: Path) -> list[list[str]]:
    """The chapters of the novels, each a list of paragraphs on one line each."""
    text = path.read_text(encoding="utf-8").replace("_", "")
    pieces = re.split(r"(?mi)^\s*(?:chapter|volume) [0-9ivxlc]+\W*$", text)
    chapters = [[" ".join(p.split()) for p in re.split(r"\n\s*\n", piece) if p.strip()] for piece in pieces]
    return [chapter for chapter in chapters if len(chapter) > 5]


def train_tokenizer(lines: list[str]) -> Tokenizer:
    """A byte-fallback BPE in the form of Mistral's own tokenizer.json."""
    byte_pieces = [f"<0x{byte:02X}>" for byte in range(256)]
    trainee = Tokenizer(models.BPE())
    trainee.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    words = Regex("\u2581?[A-Za-z]+|\u2581?[0-9]|\u2581?[^A-Za-z0-9\u2581]+")
    trainee.pre_tokenizer = pre_tokenizers.Split(words, "isolated")
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size, special_tokens=CONTROL + byte_pieces, show_progress=False
    )
    trainee.train_from_iterator(lines, trainer)

    # The merges have learned where words end: the finished tokenizer, like Mistral's, needs no rule for it.
    learned = json.loads(trainee.to_str())["model"]
    merges = [tuple(merge) for merge in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(learned["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = trainee.normalizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", BOS)]
    )
    tokenizer.add_special_tokens(CONTROL)
    return tokenizer


class Passages:
    """Token sequences that begin with <s> at any paragraph and run on, over the ends of chapters."""

    def __init__(self, chapters: list[list[str]], tokenizer: Tokenizer):
        self.openings, self.ends, tokens = [], [], []
        for chapter in chapters:
            openings = [tokenizer.encode(paragraph).ids for paragraph in chapter]
            # No space begins a line that follows another: [1:] takes away the one that encoding puts there.
            lines = [tokenizer.encode("\n" + line, add_special_tokens=False).ids[1:] for line in chapter]
            for opening, line in zip(openings, [openings[0], *lines[1:]], strict=True):
                tokens += line
                self.openings.append(opening)
                self.ends.append(len(tokens))
            tokens.append(EOS)
        self.tokens = np.array(tokens)

    def sample(self, rng: np.random.Generator, batch: int, length: int) -> torch.Tensor:
        """[batch, length] token ids, each row from a paragraph drawn at random."""
        drawn = rng.choice(np.searchsorted(self.ends, len(self.tokens) - length), batch)
        rows = [[*self.openings[i], *self.tokens[self.ends[i] : self.ends[i] + length]][:length] for i in drawn]
        return torch.tensor(np.array(rows))


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a twentieth of the steps, then a cosine down to a fiftieth of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))))


@torch.no_grad()
def held_out_loss(model: MistralForCausalLM, tokens: np.ndarray, length: int = 1024) -> float:
    """Mean loss in nats per token over pieces much longer than the window and than the training sequences."""
    pieces = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, 1, length)
    return float(np.mean([float(model(piece, labels=piece).loss) for piece in pieces]))


def main() -> None:
    """Read the arguments, train, and write config, weights and tokenizer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)

    chapters = read_chapters(args.text)
    training, held_out = [c for i, c in enumerate(chapters) if i % 30 != 29], chapters[29::30]
    tokenizer = train_tokenizer([line for chapter in training for line in chapter])
    passages, unseen = Passages(training, tokenizer), Passages(held_out, tokenizer).tokens
    characters = sum(len(line) + 1 for chapter in held_out for line in chapter)
    print(f"{len(passages.tokens)} tokens to learn, {len(unseen)} held out", flush=True)

    model = MistralForCausalLM(CONFIG)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)
    started, losses = time.perf_counter(), []
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr)
        ids = passages.sample(rng, args.batch, args.length)
        loss = model(ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            line = f"step {step + 1}: loss {np.mean(losses[-100:]):.3f}, {time.perf_counter() - started:.0f} s"
            if (step + 1) % 500 == 0 or step + 1 == args.steps:
                unseen_loss = held_out_loss(model, unseen)
                bits = unseen_loss / math.log(2) * len(unseen) / characters
                line += f"; held out {unseen_loss:.3f} ({bits:.3f} bits per character)"
            print(line, flush=True)

    model.generation_config = GenerationConfig(max_new_tokens=200, eos_token_id=EOS, extra={"bos_token_id": BOS})
    model.to(torch.bfloat16).save_pretrained(args.out)
    MistralTokenizer(tokenizer.to_str(pretty=True), TOKENIZER_CONFIG).save_pretrained(args.out)


if __name__ == "__main__":
    main()
