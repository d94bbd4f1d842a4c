"""Run by test_megatron.py in a Python with megatron-core: what upstream's own classes do, as JSON.

Reads {"arguments": [...], "tokens": [[...]], "folder": ... or null} from standard input. On the
CPU, one process. megatron-core's wheel lacks the argument parser of Megatron-LM's training script,
so arguments become fields of TransformerConfig and OptimizerConfig here, by its own renames.
"""

import json
import os
import sys

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.optimizer import (
    OptimizerConfig,
    _get_param_groups,
    get_mup_config_overrides,
    get_standard_config_overrides,
)
from megatron.core.tensor_parallel import random as parallel_random
from megatron.core.transformer.transformer_config import TransformerConfig

RENAMED = {
    "norm_epsilon": "layernorm_epsilon",
    "group_query_attention": None,
    "swiglu": None,
    "disable_bias_linear": None,
    "optimizer": "optimizer",
}


def read_arguments(words):
    options, name = {}, None
    for word in words:
        if word.startswith("--"):
            name = word[2:].replace("-", "_")
            options[name] = True
        else:
            try:
                options[name] = json.loads(word)
            except ValueError:
                options[name] = word
    return {RENAMED.get(k, k): v for k, v in options.items() if RENAMED.get(k, k)}


class NoFork:
    """Stands in for the tracker of CUDA's random states, which a CPU has none of."""

    def is_initialized(self):
        return False

    def fork(self, *names):
        import contextlib

        return contextlib.nullcontext()


def main():
    asked = json.load(sys.stdin)
    options = read_arguments(asked["arguments"])
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(asked["port"]))
    torch.distributed.init_process_group("gloo", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    torch.manual_seed(0)
    positions = options.pop("max_position_embeddings")
    rotary_base = options.pop("rotary_base")
    options.pop("position_embedding_type")
    tied = not options.pop("untie_embeddings_and_output_weights", False)
    optimizer_fields = set(OptimizerConfig.__dataclass_fields__)
    own = {k: options.pop(k) for k in list(options) if k in optimizer_fields}
    unknown = set(options) - set(TransformerConfig.__dataclass_fields__)
    assert not unknown, unknown
    config = TransformerConfig(
        **options, gated_linear_unit=True, activation_func=torch.nn.functional.silu,
        add_bias_linear=False, use_cpu_initialization=True, perform_initialization=True,
        bias_activation_fusion=False, masked_softmax_fusion=False, persist_layer_norm=False,
        bias_dropout_fusion=False, **asked.get("fields", {}),
    )  # fmt: skip
    torch.cuda.current_device = lambda: "cpu"  # where RoPE puts its frequencies
    parallel_random._CUDA_RNG_STATE_TRACKER = NoFork()
    parallel_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    model = GPTModel(
        config=config,
        transformer_layer_spec=get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=asked["vocab_size"],
        max_sequence_length=positions,
        position_embedding_type="rope",
        rotary_base=rotary_base,
        share_embeddings_and_output_weights=tied,
        parallel_output=False,
    )
    answer = {
        "multipliers": {
            "embedding": config.mup_embedding_mult,
            "output": config.mup_output_mult,
            "attention": config.softmax_scale,
        },
        "std": {n: float(p.detach().double().std()) for n, p in model.named_parameters()},
        "shapes": {n: list(p.shape) for n, p in model.named_parameters()},
    }
    if own:
        optimizer = OptimizerConfig(**own)
        overrides = get_standard_config_overrides(optimizer)
        overrides |= get_mup_config_overrides(optimizer, config.mup_width_mult)
        names = {id(p): n for n, p in model.named_parameters()}
        answer["groups"] = {}
        for group in _get_param_groups([model], optimizer, overrides):
            setting = {
                "lr": group.get("max_lr", optimizer.lr),
                "eps": group.get("eps", optimizer.adam_eps),
                "weight_decay": optimizer.weight_decay * group["wd_mult"],
            }
            for parameter in group["params"]:
                answer["groups"][names[id(parameter)]] = setting
    if asked.get("folder"):
        from safetensors.torch import load_file

        state = load_file(os.path.join(asked["folder"], "model.safetensors"))
        missing, unexpected = model.load_state_dict(state, strict=False)
        answer["missing"] = [n for n in missing if not n.endswith("_extra_state")]
        answer["unexpected"] = list(unexpected)
        tokens = torch.tensor(asked["tokens"])
        place = torch.arange(tokens.shape[1]).expand_as(tokens)
        length = tokens.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]
        model.eval()
        with torch.no_grad():
            logits = model(tokens, place, mask)
        answer["logits"] = logits.tolist()
    print("ANSWER" + json.dumps(answer))


main()
