"""The model card of an export: what it is, by which rules, and on what evidence."""

from __future__ import annotations

from collections.abc import Iterator

from full_scale.hf_names import Architecture
from full_scale.weights import Weights
from mutransfer.bundle import Bundle


def model_card(weights: Weights, architecture: Architecture, dtype: str) -> str:
    """The content of `README.md`."""
    return "\n".join([*_head(weights), *_loading(), *_numbers(weights, architecture, dtype),
                      *_origin(weights)]) + "\n"  # fmt: skip


def _head(weights: Weights) -> Iterator[str]:
    c = weights.config
    name = f"Decoder of {c.n_parameters:,} parameters"
    yield from ("---", "library_name: transformers", "pipeline_tag: text-generation",
                "tags: [muP, mutransfer]", "---", "", f"# {name}", "")  # fmt: skip
    yield (
        f"{c.n_layers} layers, width {c.d_model}, {c.n_heads} heads of {c.head_dim} "
        f"({c.n_kv_heads} for keys and values), SwiGLU of {c.d_ff}, vocabulary {c.vocab_size:,}, "
        f"{'tied' if c.tied else 'untied'} head, {c.max_seq_len:,} positions; "
        f"{c.n_nonembedding:,} parameters outside the embedding."
    )
    if weights.state is not None:
        yield f"Trained for {weights.state.step:,} steps, {weights.state.tokens:,} tokens."
    yield ""


def _loading() -> Iterator[str]:
    yield from (
        "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        'model = AutoModelForCausalLM.from_pretrained("this folder")',
        'tokenizer = AutoTokenizer.from_pretrained("this folder")', "```", "",
        "It needs no remote code.", "",
    )  # fmt: skip


def _numbers(weights: Weights, architecture: Architecture, dtype: str) -> Iterator[str]:
    m = weights.multipliers
    yield "## Parametrization"
    yield ""
    if architecture == "granite":
        yield f"The weights are those that were trained, in {dtype}; the multipliers are fields of"
        yield "`config.json`:"
    else:
        yield f"Llama has no multipliers: they are folded into the weights, in {dtype}."
        yield "The residual stream is as in training, so the norms' epsilon is too; the embedding"
        yield "holds its multiplier, q the softmax scale, o and down the residual multiplier, and"
        yield "the last norm's gain the rest. They were:"
    yield ""
    yield "| multiplier | value |"
    yield "|---|---|"
    for name, value in m:
        yield f"| {name} | {value!r} |"
    yield ""
    if dtype in ("bfloat16", "float16"):
        yield f"The weights are rounded to {dtype}; logits differ from training's accordingly."
        yield ""


def _origin(weights: Weights) -> Iterator[str]:
    bundle = weights.bundle
    if bundle is None:
        rules = weights.parametrization or "unknown"
        yield f"Weights from elsewhere; rules: {rules}. There is no evidence with them."
        return
    named, base = bundle.parametrization, bundle.base
    yield f"- rules: {named.name}, version {named.version}; m = 1 at width {base.base_width}"
    yield f"- bundle: SHA-256 `{bundle.sha256}`, of the experiment {bundle.experiment.name!r}"
    yield (
        f"- tuned on width {base.config.get('d_model')}, {base.config.get('n_layers')} layers, "
        f"with {bundle.batch_tokens:,} tokens per step and {bundle.horizon_tokens:,} in all"
    )
    yield f"- tokenizer: `{bundle.data.tokenizer_fingerprint[:12]}`"
    yield ""
    yield "## Evidence"
    yield ""
    yield from _evidence(bundle)


def _evidence(bundle: Bundle) -> Iterator[str]:
    evidence = bundle.evidence
    if evidence is None:
        yield "None: the bundle was accepted unverified."
        return
    study = evidence.study
    yield f"- sweep: {len(study.trials)} trials, {len(study.seeds)} seeds"
    coord, transfer = evidence.coord_check, evidence.transfer_check
    yield (f"- coordinate check: {coord.verdict}, {len(coord.slopes)} slopes" if coord
           else "- coordinate check: missing")  # fmt: skip
    if transfer is None:
        yield "- transfer check: missing"
        return
    yield f"- transfer check: {transfer.verdict}"
    for name in ("drift", "regret"):
        value, low, high = (getattr(transfer, name + end) for end in ("", "_low", "_high"))
        unit = "octaves of learning rate" if name == "drift" else "nats"
        shown = ["?" if x is None else f"{x:.4g}" for x in (value, low, high)]
        yield f"  - {name}: {shown[0]} [{shown[1]}, {shown[2]}] {unit}"
