#!/usr/bin/env bash
# From unlabelled audio to a transcript, on the embedded corpus:  bash scripts/quickstart.sh [SEED [FOLDER]]
#
# Pre-trains on the training audio without its text, fine-tunes on its transcripts, trains the same model from scratch
# for as many updates, and scores both on the test split, whose texts neither has seen, alone and with an n-gram of the
# training transcripts, where beam search could be installed.
set -euo pipefail

source "$(dirname "$0")/environment.sh" pinned
cd "$root"
seed="${1:-0}"
out="${2:-runs/quickstart}"
python="$venv/bin/python"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore
export OMP_NUM_THREADS=1  # two threads that share their cores with anything else take many times as long
rm -rf "$out/encoder" "$out/recognizer" "$out/scratch"
mkdir -p "$out"
started=$SECONDS

bf16=False
if "$python" -c 'import sys, torch; sys.exit(not torch.cpu._is_avx512_bf16_supported())'; then
  bf16=True  # half again as fast where the processor has it
fi
common=(--use_cpu True --bf16 "$bf16" --seed "$seed")

echo "1/4  Pre-training the encoder of the package further on 19 minutes of audio, without text"
"$python" scripts/pretrain.py --config scripts/configs/quickstart_pretrain.yaml "${common[@]}" \
  --output_dir "$out/encoder" 2> >(tee "$out/encoder.log" >&2)

echo "2/4  Fine-tuning it on transcripts; beside it, the same model from scratch (log: $out/scratch.log)"
finetune=("$python" scripts/finetune_ctc.py --config scripts/configs/quickstart_ctc.yaml "${common[@]}" --model "$out/encoder")
"${finetune[@]}" --from_scratch --output_dir "$out/scratch" --disable_tqdm True > "$out/scratch.log" 2>&1 &
scratch=$!
trap 'kill "$scratch" 2> /dev/null || true' EXIT
"${finetune[@]}" --output_dir "$out/recognizer" 2> >(tee "$out/recognizer.log" >&2)
if ! wait "$scratch"; then
  tail -n 20 "$out/scratch.log" >&2
  exit 1
fi

echo "3/4  Scoring both on the test split, alone and with an n-gram of the training transcripts"
evaluate=("$python" scripts/evaluate.py --device cpu --split test --add_to_card True)
score_both() {  # NAME OPTIONS
  model="$out/scratch"  # a command of its own rather than a function, so that the trap ends it
  "${evaluate[@]}" --model "$model" --output_file "$model/$1.json" "${@:2}" > "$out/scratch-$1.log" 2>&1 &
  scratch=$!
  model="$out/recognizer"
  "${evaluate[@]}" --model "$model" --output_file "$model/$1.json" "${@:2}" > "$out/recognizer-$1.log" 2>&1 \
    || { tail -n 20 "$out/recognizer-$1.log" >&2; exit 1; }
  wait "$scratch" || { tail -n 20 "$out/scratch-$1.log" >&2; exit 1; }
}
score_both test
if "$python" -c 'import kenlm, pyctcdecode' 2> /dev/null; then
  "$python" scripts/build_lm.py --model "$out/recognizer" --corpus demo --output_file "$out/lm.arpa" > "$out/lm.log" 2>&1 \
    || { tail -n 20 "$out/lm.log" >&2; exit 1; }
  # Weight and bonus were chosen on the validation clips.
  score_both test-ngram --beam_width 100 --lm "$out/lm.arpa" --lm_weight 0.75 --word_bonus 1
else
  echo "     without the n-gram: kenlm, which needs g++ to be built, is not in $venv; to try again, delete that"
fi

echo "4/4  Transcribing"
"$python" scripts/quickstart_summary.py "$out" "$((SECONDS - started))"
