#!/usr/bin/env bash
# The thirteen tasks of Xmodel-2.5 (arXiv 2511.19496) on an export, by lm-evaluation-harness.
#
#   pip install "mutransfer[eval]"
#   mutransfer export-hf runs/my-run exported --dtype bfloat16
#   docs/evaluation/thirteen_tasks.sh exported results
#
# Tasks, shots and metrics are those of the reference's own configuration, experiments/eval/config.yaml
# of its repository (see README.md here). The data sets are downloaded by the harness at first use.
# humaneval and mbpp execute what the model writes: run them where that does no harm. They are
# run only where ALLOW_CODE=1.
set -euo pipefail

if [ "$#" -ne 2 ]; then
    echo "usage: $0 EXPORTED_FOLDER RESULTS_FOLDER" >&2
    exit 2
fi
model=$1 results=$2
device=${DEVICE:-cuda:0}
batch=${BATCH:-16}

evaluate() { # task shots [more arguments]
    local task=$1 shots=$2
    shift 2
    lm_eval --model hf --model_args "pretrained=$model,dtype=bfloat16" \
        --tasks "$task" --num_fewshot "$shots" --device "$device" --batch_size "$batch" \
        --output_path "$results/$task" "$@"
}

#        task           shots    metric that the reference reports
evaluate arc_challenge  25     # acc_norm
evaluate arc_easy       25     # acc_norm
evaluate piqa           0      # acc_norm
evaluate hellaswag      10     # acc_norm
evaluate winogrande     5      # acc
evaluate bbh            3      # exact_match
evaluate mmlu           5      # acc
evaluate gsm8k          8      # exact_match
evaluate minerva_math   4      # math_verify (needs lm-eval[math])
evaluate cmmlu          5      # acc_norm
evaluate ceval-valid    5      # acc_norm
if [ "${ALLOW_CODE:-0}" = 1 ]; then
    export HF_ALLOW_CODE_EVAL=1
    evaluate humaneval  0 --confirm_run_unsafe_code # pass@1
    evaluate mbpp       3 --confirm_run_unsafe_code # pass_at_1
fi
