"""The zoo: what a coordinate check must catch, and what it must leave alone, as data.

Every bug is done to a correct model or optimizer after it was built, as a user's slip would be,
and never to anything that the check could read a confession from. `tests/mutransfer/
test_coord_zoo.py` runs each once on a small ladder, `benchmarks/coord_zoo.py` twenty times on
the default one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mutransfer.apply import Geometry, initialize, parametrize
from mutransfer.coord_check import CoordCheckResult, Trainable, coord_check
from mutransfer.coord_expect import Axis
from mutransfer.coord_text import culprits
from mutransfer.optimizers import Matrix, Optimizers
from mutransfer.progress import Report, quiet
from mutransfer.rules import BaseParams
from proxies.decoder import Decoder, DecoderConfig, meta_decoder
from proxies.presets import TINY

PARAMS = BaseParams(
    lr=2**-7, embedding_lr_ratio=2.0, init_std=0.1, embedding_multiplier=3.0,
    output_multiplier=2.0, residual_multiplier=1.5, weight_decay=0.1,
)  # fmt: skip
BASE, BASE_LAYERS = 32, 2


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much a check runs; the first seed of check n is n * seeds."""

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    seeds: int
    steps: int
    vocab: int = 64
    batch: int = 4
    seq: int = 16


SMALL = Size(widths=(32, 64, 128), depths=(2, 4, 8), seeds=2, steps=4)
DEFAULT = Size(widths=(32, 64, 128, 256), depths=(2, 4, 8, 16), seeds=3, steps=8, vocab=256)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A family of correct models.

    Attributes:
        name: Its name in results.
        matrix: Optimizer of the hidden matrices.
        tied: Whether the head is the embedding.
        heads: `gqa` two query heads per KV head; `mha` one; `growing` a head_dim that grows with
            the width instead of the number of heads; `one_kv` one KV head at every width.
        axis: What the models differ in.
        rules: Name of the parametrization.
        base_width: The base width that was typed; right is `BASE`.
    """

    name: str
    matrix: Matrix = "adamw"
    tied: bool = True
    heads: Literal["gqa", "mha", "growing", "one_kv"] = "gqa"
    axis: Axis = "width"
    rules: str = "completep-tied"
    base_width: int = BASE

    def config(self, size: int, vocab: int) -> DecoderConfig:
        """The model at a width, or at a depth and the base width."""
        width, layers = (size, None) if self.axis == "width" else (BASE, size)
        narrow = TINY.narrow(width, layers)
        change: dict[str, Any] = {"vocab_size": vocab, "tied": self.tied}
        if self.heads == "mha":
            change["n_kv_heads"] = narrow.n_heads
        elif self.heads == "one_kv":
            change["n_kv_heads"] = 1
        elif self.heads == "growing":
            base = TINY.narrow(BASE)
            change |= {"n_heads": base.n_heads, "n_kv_heads": base.n_kv_heads,
                       "head_dim": base.head_dim * width // BASE}  # fmt: skip
        return narrow.model_copy(update=change)


@dataclass
class Built:
    """A correct build for a bug to break; `m` and `r` are its width and depth ratio."""

    model: Decoder
    optimizers: Optimizers
    m: float
    r: float
    seed: int
    trainable: Trainable | None = field(default=None, repr=False)

    def weights(self, *patterns: str) -> list[Tensor]:
        """Parameters by shell patterns of their names."""
        named = self.model.named_parameters()
        return [p for name, p in named if any(fnmatch(name, each) for each in patterns)]

    @torch.no_grad()
    def rescale(self, factor: float, *patterns: str) -> None:
        """Multiplies initial weights."""
        for weight in self.weights(*patterns):
            weight.mul_(factor)

    def groups(self, *patterns: str) -> list[dict[str, Any]]:
        """Groups with these parameters and no others, split off where they have company."""
        wanted, found = {id(p) for p in self.weights(*patterns)}, []
        for optimizer in (self.optimizers.aux, self.optimizers.matrix):
            for group in list(optimizer.param_groups):
                names = group.get("param_names", [""] * len(group["params"]))
                pairs = list(zip(names, group["params"], strict=True))
                chosen = [pair for pair in pairs if id(pair[1]) in wanted]
                if not chosen:
                    continue
                if len(chosen) < len(pairs):
                    left = [pair for pair in pairs if id(pair[1]) not in wanted]
                    group |= {"params": [p for _, p in left], "param_names": [n for n, _ in left]}
                    group = {**group, "params": [p for _, p in chosen],
                             "param_names": [n for n, _ in chosen]}  # fmt: skip
                    optimizer.param_groups.append(group)
                found.append(group)
        return found

    def lr(self, factor: float, *patterns: str) -> None:
        """Multiplies peak learning rates."""
        for group in self.groups(*patterns):
            group["lr"] = group["peak_lr"] = group["lr"] * factor

    def set(self, key: str, value: object, *patterns: str) -> None:
        """Sets an option of groups."""
        for group in self.groups(*(patterns or ("*",))):
            group[key] = value

    def after_steps(self, act: Callable[[], object]) -> None:
        """Does something after every step of the optimizer."""
        step = self.optimizers.step

        def stepped() -> None:
            step()
            act()

        self.optimizers.step = stepped  # type: ignore[method-assign]

    def every_lr(self, lr: float) -> None:
        """What a schedule does that assigns."""
        for group in self.optimizers.groups:
            group["lr"] = lr


Injector = Callable[[Built], object]
HIDDEN = ("layers.*.attention.*.weight", "layers.*.mlp.*.weight")
GAINS = ("*norm.weight",)
NORM = ("norm.weight",)
OUT = ("*.o.weight", "*.down.weight")
ADAMW, MUON = Variant(name="adamw"), Variant(name="muon", matrix="muon")
UNTIED = Variant(name="adamw untied", tied=False)
DEPTH = Variant(name="adamw depth", axis="depth")
GROWING = Variant(name="adamw growing heads", heads="growing")
UNIT_RMS = Variant(name="muon unit_rms", matrix="muon", rules="completep")
ONE_KV = Variant(name="muon unit_rms, one KV head", matrix="muon", rules="completep",
                 heads="one_kv")  # fmt: skip
TYPO = Variant(name="adamw, base width typed wrong in the table too", base_width=2 * BASE)

CORRECT: tuple[Variant, ...] = (
    *(
        Variant(
            name=f"{matrix}{'' if tied else ' untied'}{'' if heads == 'gqa' else ' mha'}",
            matrix=matrix, tied=tied, heads=heads,
        )
        for matrix in ("adamw", "muon")
        for tied in (True, False)
        for heads in ("gqa", "mha")
    ),
    GROWING, UNIT_RMS, ONE_KV, DEPTH,
    Variant(name="muon depth", axis="depth", matrix="muon"),
    Variant(name="adamw untied depth", axis="depth", tied=False),
)  # fmt: skip
"""No check of these may FAIL."""


@dataclass(frozen=True, kw_only=True)
class Bug:
    """One slip.

    Attributes:
        name: What is wrong.
        inject: Does it to a correct build.
        caught: By what: `measured` slopes alone, the `symbolic` check alone, or neither, so that
            only the `preflight` of the real target is left.
        says: What the first measured culprit says, all parts in order, for `measured`; what the
            first symbolic one says, for `symbolic`.
        reason: Why slopes cannot see it; empty for `measured`.
        variant: The model that it is done to.
        hidden: Whether it lies where the symbolic check does not look (the forward pass).
    """

    name: str
    inject: Injector
    says: tuple[str, ...]
    caught: Literal["measured", "symbolic", "preflight"] = "measured"
    reason: str = ""
    variant: Variant = ADAMW
    hidden: bool = False


def _multiply_output(b: Built, factor: float) -> None:
    b.model.output_multiplier.mul_(factor)


def _hook(module: nn.Module, factor: float) -> None:
    module.register_forward_hook(lambda _module, _inputs, output: output * factor)


def _detach(module: nn.Module) -> None:
    module.register_forward_hook(lambda _module, _inputs, output: output.detach())


def _lose_output_multiplier(b: Built) -> None:
    b.after_steps(lambda: b.model.output_multiplier.fill_(PARAMS.output_multiplier))


def _wrong_base(b: Built) -> None:
    """Everything as if the base width were twice as large, the table being right."""
    b.rescale(math.sqrt(2), *HIDDEN)
    b.lr(2, *HIDDEN)
    _multiply_output(b, 2)


def _scale(b: Built, factor: float) -> None:
    b.model.attention_multiplier.mul_(factor)


def _branches(b: Built, factor: float) -> None:
    b.model.residual_multiplier.mul_(factor)


CONSTANT = "all widths shift by one factor, and a slope does not see a factor"
NOT_DIVIDED = "the learning rate is not divided by the width"
LIKE_HIDDEN = "the learning rate is scaled like a hidden matrix's"
NO_INIT = "right is width^-0.50: the init std is not divided by the square root of the width"
NO_OUTPUT = "the output multiplier is not divided by the width"
ASSIGNS = "a schedule assigns learning rates instead of multiplying them"
NO_ROOT = "Muon's step is not divided by the square root of the width"
STILL = "nothing moves it: frozen, in no optimizer group, or without a gradient"
ALL = "layers.*.attention.{q,k,v,o}, layers.*.mlp.{gate,up,down}"

ZOO: tuple[Bug, ...] = (
    Bug(
        name="hidden lr not scaled",
        inject=lambda b: b.lr(b.m, *HIDDEN),
        says=(f"first updates of {ALL} scale as width^", "right is width^-1.00", NOT_DIVIDED),
    ),
    Bug(
        name="hidden lr divided by d instead of d/d0",
        inject=lambda b: b.lr(1 / BASE, *HIDDEN),
        caught="symbolic", reason=CONSTANT,
        says=("learning rate of layers.*.attention.q.weight is", "the table says",
              "and 6 more like it"),
    ),
    Bug(
        name="init not scaled",
        inject=lambda b: b.rescale(math.sqrt(b.m), *HIDDEN),
        says=(f"initial weights of {ALL} scale as width^", NO_INIT),
    ),
    Bug(
        name="o forgotten in init",
        inject=lambda b: b.rescale(math.sqrt(b.m), "*.o.weight"),
        says=("initial weights of layers.*.attention.o scale as width^", NO_INIT),
    ),
    Bug(
        name="down forgotten in init",
        inject=lambda b: b.rescale(math.sqrt(b.m), "*.down.weight"),
        says=("initial weights of layers.*.mlp.down scale as width^", NO_INIT),
    ),
    Bug(
        name="o and down forgotten in init",
        inject=lambda b: b.rescale(math.sqrt(b.m), *OUT),
        says=("initial weights of layers.*.attention.o, layers.*.mlp.down scale", NO_INIT),
    ),
    Bug(
        name="logits multiplier missing",
        inject=lambda b: _multiply_output(b, b.m),
        says=("self-token logits at init scale as width^+", NO_OUTPUT),
    ),
    Bug(
        name="logits multiplier undone in the forward pass",
        inject=lambda b: _hook(b.model.norm, b.m),
        hidden=True,
        says=("self-token logits at init scale as width^+", NO_OUTPUT),
    ),
    Bug(
        name="logits divided once more in the forward pass",
        inject=lambda b: _hook(b.model.norm, 1 / b.m),
        hidden=True,
        says=("other-token logits at init scale as width^-1.",
              "the output multiplier is divided by the width more than once"),
    ),
    Bug(
        name="logits multiplier missing, untied",
        inject=lambda b: _multiply_output(b, b.m), variant=UNTIED,
        says=("-token logits at init scale as width^+", NO_OUTPUT),
    ),
    Bug(
        name="logits multiplier doubled",
        inject=lambda b: _multiply_output(b, 1 / b.m),
        says=("other-token logits at init scale as width^-1.",
              "the output multiplier is divided by the width more than once"),
    ),
    Bug(
        name="logits multiplier dropped after step 0",
        inject=_lose_output_multiplier,
        says=("changes in the logits scale as width^+",
              "the output multiplier is right at init and lost after the first step"),
    ),
    Bug(
        name="tied weight rescaled",
        inject=lambda b: b.rescale(math.sqrt(b.m), "embedding.weight"),
        says=("initial weights of embedding scale as width^+0.", "right is width^+0.00",
              "the init std grows with the width"),
    ),
    Bug(
        name="embedding lr scaled like a hidden one",
        inject=lambda b: b.lr(1 / b.m, "embedding.weight"),
        says=("first updates of embedding scale as width^-1.00", LIKE_HIDDEN),
    ),
    Bug(
        name="embedding lr scaled like a hidden one, under Muon",
        inject=lambda b: b.lr(1 / b.m, "embedding.weight"), variant=MUON,
        says=("first updates of embedding scale as width^-1.00", LIKE_HIDDEN),
    ),
    Bug(
        name="norm gains in the hidden group",
        inject=lambda b: b.lr(1 / b.m, *GAINS, *NORM),
        says=("first updates of layers.*.{attention_norm,mlp_norm}, norm scale as width^-1.00",
              LIKE_HIDDEN),
    ),
    Bug(
        name="eps too large",
        inject=lambda b: b.set("eps", 1e-2 / b.m),
        says=("eps takes up to", "off the steps of", "eps is not small against Adam's sqrt(v)",
              "too large"),
    ),
    Bug(
        name="eps too large and unscaled",
        inject=lambda b: b.set("eps", 1e-3),
        says=("eps takes up to", "off the steps of", "not scaled down with the width"),
    ),
    Bug(
        name="eps unscaled",
        inject=lambda b: b.set("eps", PARAMS.eps),
        caught="symbolic",
        reason="at 1e-8 eps is so far below the gradients of these models that no step changes",
        says=("eps of embedding.weight is 1e-08; the table says 5e-09 (and 10 more",),
    ),
    Bug(
        name="weight decay not compensated",
        inject=lambda b: b.set("weight_decay", PARAMS.weight_decay, *HIDDEN),
        caught="symbolic",
        reason="decay shows after 1/(lr wd), over a thousand steps",
        says=("weight decay of layers.*.attention.q.weight is 0.1; the table says 0.2 (and 6",),
    ),
    Bug(
        name="beta2 of torch's default",
        inject=lambda b: b.set("betas", (0.9, 0.999)),
        caught="symbolic", reason="the same at all widths",
        says=("beta2 of embedding.weight is 0.999; the table says 0.95",),
    ),
    Bug(
        name="1/sqrt(d) attention with growing head_dim",
        inject=lambda b: _scale(b, math.sqrt(b.m)), variant=GROWING,
        says=("attention logits at init scale as width^", "right is width^-0.50",
              "the softmax scale is 1/sqrt(head_dim) where 1/head_dim is right"),
    ),
    Bug(
        name="softmax scale that grows, fixed head_dim",
        inject=lambda b: _scale(b, math.sqrt(b.m)),
        says=("attention logits at init scale as width^+", "the softmax scale"),
    ),
    Bug(
        name="K and V as wide as Q for Muon, fixed q:kv",
        inject=lambda b: b.lr(math.sqrt(2), "*.k.weight", "*.v.weight"), variant=UNIT_RMS,
        caught="symbolic", reason=f"the ratio of the heads is fixed: {CONSTANT}",
        says=("learning rate times update scale of layers.*.attention.k.weight is",
              "and 1 more like it"),
    ),
    Bug(
        name="K and V as wide as Q for Muon, one KV head",
        inject=lambda b: b.lr(math.sqrt(2 * b.m), "*.k.weight", "*.v.weight"), variant=ONE_KV,
        says=("operator norms of the updates of layers.*.attention.{k,v} scale as width^+0.",
              "Muon's step"),
    ),
    Bug(
        name="a schedule that assigns the base lr",
        inject=lambda b: b.after_steps(lambda: b.every_lr(PARAMS.lr)),
        says=(f"later updates of {ALL} scale as width^", "right is width^-1.00", ASSIGNS),
    ),
    Bug(
        name="a schedule that assigns the hidden lr",
        inject=lambda b: b.after_steps(lambda: b.every_lr(PARAMS.lr / b.m)),
        says=("later updates of embedding, norm, layers.*.{attention_norm,mlp_norm} scale",
              "right is width^+0.00", ASSIGNS),
    ),
    Bug(
        name="Muon's lr not scaled",
        inject=lambda b: b.lr(math.sqrt(b.m), *HIDDEN), variant=MUON,
        says=(f"operator norms of the updates of {ALL} scale as width^+0.", NO_ROOT),
    ),
    Bug(
        name="Muon's lr divided by the width",
        inject=lambda b: b.lr(1 / math.sqrt(b.m), *HIDDEN), variant=MUON,
        says=(f"operator norms of the updates of {ALL} scale as width^-0.",
              "Muon's step is divided by the width where the square root is right"),
    ),
    Bug(
        name="branches ~ depth^-1/2",
        inject=lambda b: _branches(b, math.sqrt(b.r)), variant=DEPTH,
        says=("changes in what a block adds scale as depth^-0.",
              "right is depth^-1.00", "shrinks slower than 1/depth"),
    ),
    Bug(
        name="branches not scaled with the depth",
        inject=lambda b: _branches(b, b.r), variant=DEPTH,
        says=("what a block adds at init scales as depth^+0.",
              "right is at most depth^-0.50", "the residual multiplier does not shrink"),
    ),
    Bug(
        name="init ~ depth^-1/2 on top of the branch multiplier",
        inject=lambda b: b.rescale(1 / math.sqrt(b.r), *OUT), variant=DEPTH,
        says=("initial weights of layers.*.attention.o, layers.*.mlp.down scale as depth^-0.50",
              "the init std shrinks with the depth"),
    ),
    Bug(
        name="lr ~ depth^-1/2 in the blocks, as alpha = 1/2 would have it",
        inject=lambda b: b.lr(1 / math.sqrt(b.r), *HIDDEN), variant=DEPTH,
        says=(f"first updates of {ALL} scale as depth^-0.50", "right is depth^+0.00",
              "the learning rate shrinks with the depth"),
    ),
    Bug(
        name="base width typed wrong, the table right",
        inject=_wrong_base,
        caught="symbolic", reason=CONSTANT,
        says=("learning rate of layers.*.attention.q.weight is", "and 6 more like it"),
    ),
    Bug(
        name="base width typed wrong, in the table too",
        inject=lambda b: None, variant=TYPO,
        caught="preflight",
        reason=f"{CONSTANT}; model, optimizer and table agree on the wrong base",
        says=(),
    ),
    Bug(
        name="a frozen group",
        inject=lambda b: [p.requires_grad_(False) for p in b.weights("*.k.weight")],
        says=("first updates of layers.*.attention.k: ", STILL),
    ),
    Bug(
        name="a frozen group, under Muon",
        inject=lambda b: [p.requires_grad_(False) for p in b.weights("*.k.weight")],
        variant=MUON,
        says=("first updates of layers.*.attention.k: ", STILL),
    ),
    Bug(
        name="values without a gradient",
        inject=lambda b: [_detach(block.attention.v) for block in b.model.layers], hidden=True,
        says=("first updates of layers.*.attention.v: ", STILL),
    ),
    Bug(
        name="queries scaled by hand in the forward pass",
        inject=lambda b: [_hook(block.attention.q, math.sqrt(b.m)) for block in b.model.layers],
        hidden=True,
        says=("activations of layers.*.attention.q at init scale as width^+",
              "does not shrink with the fan-in"),
    ),
    Bug(
        name="branches that grow in the forward pass",
        inject=lambda b: [_hook(out, math.sqrt(b.m)) for block in b.model.layers
                          for out in (block.attention.o, block.mlp.down)],
        hidden=True,
        says=("activations of layers.*.attention.o, layers.*.mlp.down at init scale as width^+",
              "does not shrink with the fan-in"),
    ),
    Bug(
        name="a group that no optimizer has",
        inject=lambda b: [g.update(params=[], param_names=[]) for g in b.groups("*.up.weight")],
        says=("first updates of layers.*.mlp.up: ", STILL),
    ),
)  # fmt: skip


def bug(name: str) -> Bug:
    """The bug of that name."""
    return next(each for each in ZOO if each.name == name)


def make(
    variant: Variant, size: int, seed: int, inject: Injector = lambda built: None,
    *, run: Size = SMALL,
) -> Trainable:  # fmt: skip
    """One model of a variant with its optimizer and batch, the bug done to it."""
    config = variant.config(size, run.vocab)
    base = variant.config(BASE if variant.axis == "width" else size, run.vocab)
    layers = BASE_LAYERS if variant.axis == "depth" else config.n_layers
    geometry = Geometry(
        base_width_mult=BASE / variant.base_width, base_width=variant.base_width,
        n_layers=config.n_layers, base_n_layers=layers,
        head_dim=config.head_dim, base_head_dim=base.head_dim,
    )  # fmt: skip
    table = parametrize(
        meta_decoder(config), meta_decoder(base), PARAMS, variant.rules, geometry=geometry
    )
    model = Decoder(config)
    initialize(model, table, seed=seed)
    optimizers = Optimizers(model, table, variant.matrix)
    inject(Built(model, optimizers, config.d_model / BASE, config.n_layers / layers, seed))
    generator = torch.Generator().manual_seed(seed)
    batch = torch.randint(run.vocab, (run.batch, run.seq + 1), generator=generator)
    return Trainable(
        model=model, optimizer=optimizers, loss=lambda: model.loss(batch), table=table,
        tokens=batch[:, :-1],
    )  # fmt: skip


def check(
    variant: Variant, inject: Injector = lambda built: None, *, run: Size = SMALL, number: int = 0,
    progress: Report = quiet,
) -> CoordCheckResult:  # fmt: skip
    """One whole check; checks of different numbers share no seed."""

    def factory(size: int, seed: int) -> Trainable:
        return make(variant, size, number * run.seeds + seed, inject, run=run)

    sizes = run.widths if variant.axis == "width" else run.depths
    return coord_check(factory, sizes, seeds=run.seeds, steps=run.steps, axis=variant.axis,
                       progress=progress)  # fmt: skip


def measured(result: CoordCheckResult) -> tuple[str, ...]:
    """The culprits, had there been no symbolic check."""
    return culprits(result.quantities, ())
