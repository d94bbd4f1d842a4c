"""Checks Llama as Hugging Face builds it: python examples/check_llama.py [picture.png]"""

import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mutransfer.apply import initialize
from mutransfer.coord_check import Trainable, coord_check
from mutransfer.coord_plot import coord_check_figure
from mutransfer.hugging_face import adopt
from mutransfer.optimizers import Optimizers
from mutransfer.rules import BaseParams

TEXT = torch.tensor(list(Path(__file__).read_bytes()))


def build(width: int) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=256, num_hidden_layers=2, num_attention_heads=width // 16, hidden_size=width,
        intermediate_size=3 * width, tie_word_embeddings=True))  # fmt: skip


def factory(width: int, seed: int) -> Trainable:
    model = build(width)
    table = adopt(model, build(64), BaseParams(lr=2**-6, init_std=0.1))
    initialize(model, table, seed=seed)
    tokens = TEXT[seed : seed + 512].view(8, 64)
    return Trainable(model=model, optimizer=Optimizers(model, table, "adamw"), table=table,
                     loss=lambda: model(tokens, labels=tokens).loss, tokens=tokens)  # fmt: skip


if __name__ == "__main__":
    result = coord_check(factory, (64, 128, 256), seeds=3, steps=4)
    picture = (sys.argv[1:] or [f"{tempfile.mkdtemp()}/coord_check.png"])[0]
    coord_check_figure(result).savefig(picture)
    print(f"{result.summary()}\npicture: {picture}")
    sys.exit(result.verdict == "FAIL")
