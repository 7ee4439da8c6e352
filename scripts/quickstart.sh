#!/usr/bin/env bash
# From unlabelled audio to a transcript, on the embedded corpus:  bash scripts/quickstart.sh [SEED]
#
# Pre-trains on the training audio without its text, fine-tunes on its transcripts, trains the same model from scratch
# with the same fine-tuning, and scores both on the test split, whose texts neither has seen.
set -euo pipefail

source "$(dirname "$0")/environment.sh" pinned
cd "$root"
seed="${1:-0}"
out="${OUT:-runs/quickstart}"
python="$venv/bin/python"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
rm -rf "$out"
mkdir -p "$out"
started=$SECONDS

bf16=False
if "$python" -c 'import sys, torch; sys.exit(not torch.cpu._is_avx512_bf16_supported())'; then
  bf16=True  # half again as fast where the processor has it
fi
common=(--use_cpu True --bf16 "$bf16" --seed "$seed")

echo "1/4  Pre-training on 19 minutes of audio, without text"
"$python" scripts/pretrain.py --config scripts/configs/quickstart_pretrain.yaml "${common[@]}" \
  --output_dir "$out/encoder" 2> >(tee "$out/encoder.log" >&2)

echo "2/4  Fine-tuning it on transcripts; beside it, the same model from scratch (log: $out/scratch.log)"
OMP_NUM_THREADS=1 "$python" scripts/finetune_ctc.py --config scripts/configs/quickstart_ctc.yaml "${common[@]}" \
  --model tiny --model_options $(grep -oE '\b[a-z_]+=[0-9.]+' scripts/configs/quickstart_pretrain.yaml) \
  --output_dir "$out/scratch" --disable_tqdm True > "$out/scratch.log" 2>&1 &
scratch=$!
OMP_NUM_THREADS=1 "$python" scripts/finetune_ctc.py --config scripts/configs/quickstart_ctc.yaml "${common[@]}" \
  --model "$out/encoder" --output_dir "$out/recognizer" 2> >(tee "$out/recognizer.log" >&2)
wait "$scratch"

echo "3/4  Scoring both on the test split"
for model in recognizer scratch; do
  "$python" scripts/evaluate.py --model "$out/$model" --split test --output_file "$out/$model/test.json" > "$out/$model-test.log" 2>&1 &
done
wait

echo "4/4  Transcribing"
"$python" scripts/quickstart_summary.py "$out" "$((SECONDS - started))"
