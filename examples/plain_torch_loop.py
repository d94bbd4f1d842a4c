"""Trains a model of your own from a bundle: python examples/plain_torch_loop.py bundle.json"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from own_model import NextByte

from mutransfer import Bundle, param_groups
from mutransfer.schedule import WSD, set_lr


def train(path: str, steps: int = 100) -> list[float]:
    bundle = Bundle.load(path)
    model = NextByte(**bundle.target.config)
    table = bundle.apply(model, seed=0)
    optimizer = torch.optim.AdamW(param_groups(model, table, "adamw"))
    text = torch.tensor(list(Path(__file__).read_bytes())).unfold(0, model.context + 1, 1)
    losses = []
    for step in range(steps):
        set_lr(optimizer.param_groups, WSD().factor(step, steps))
        batch = text[torch.randint(len(text), (64,))]
        loss = F.cross_entropy(model(batch[:, :-1]), batch[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    print(f"loss after training: {train(sys.argv[1])[-1]:.3f} nats")
