#!/usr/bin/env bash
# One row of the paper's LibriSpeech table: fine-tune a SIZE on a SPLIT, tune the decoder, test (docs/librispeech.md).
# Run, from a folder that holds checkpoints/ and will hold manifests/:
#   DATA=corpora LM=lm/4-gram.arpa LEXICON=lm/lexicon.txt configs/recipes/librispeech.sh SIZE SPLIT
# The same command resumes; it keeps results that are newer than their checkpoint.
# SIZE: base, large or xlarge. SPLIT: 10min, 1h, 10h, 100h or 960h. The run folder is checkpoints/SIZE-SPLIT.
# DATA: folder that holds LibriSpeech and librispeech_finetuning; needed while manifests are missing.
# PRETRAINED: encoder to start from; by default the last iteration in checkpoints/SIZE.
# LM, LEXICON: n-gram language model and its lexicon; without them, only greedy decoding.
# SETS: test sets, by default "dev-clean dev-other test-clean test-other".
# EXTRA: more options of `hubert fit`, separated by spaces, such as those for 8 GPUs in the config's header.
# HUBERT: the command, by default `uv run hubert`.
# Output: SET.jsonl and SET.metrics.json (SET-lm with the language model), and a table row of word error rates.
# Hardware, time, expected numbers: the header of configs/finetune/SPLIT.yaml, or of large/ and xlarge/ beside it.
set -euf -o pipefail # -f: EXTRA and HUBERT are split at spaces, without expanding brackets

refuse() {
  echo "librispeech.sh: $1" >&2
  exit 2
}
hubert() { command ${HUBERT:-uv run hubert} "$@"; }

size=${1:-} split=${2:-} configs=$(CDPATH='' cd -- "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
(($# == 2)) || refuse "give a size and a split, as in: configs/recipes/librispeech.sh base 10h"
layers=(--config "$configs/finetune/$split.yaml")
case $size in
  base) pretrained=checkpoints/base/iteration2/last.ckpt ;;
  large) layers+=(--config "$configs/finetune/large/$split.yaml") pretrained=checkpoints/large/iteration1/last.ckpt ;;
  xlarge)
    layers+=(--config "$configs/finetune/large/$split.yaml" --config "$configs/finetune/xlarge/$split.yaml")
    pretrained=checkpoints/xlarge/iteration1/last.ckpt
    ;;
  *) refuse "the size '$size' is none of base, large and xlarge" ;;
esac
limited='' subsets=''
case $split in
  10min | 1h | 10h) limited=$split ;;
  100h) subsets=train-clean-100 ;;
  960h) subsets='train-clean-100 train-clean-360 train-other-500' ;;
  *) refuse "the split '$split' is none of 10min, 1h, 10h, 100h and 960h" ;;
esac
run=checkpoints/$size-$split
sets=${SETS:-dev-clean dev-other test-clean test-other}
pretrained=${PRETRAINED:-$pretrained}

[[ -e $pretrained ]] ||
  refuse "$pretrained: no such encoder; pre-train it (configs/pretrain/$size.yaml), or name another by PRETRAINED"
[[ ${LM:-} || ! ${LEXICON:-} ]] || refuse "LEXICON is set, and LM is not; give both or neither"
[[ ${LEXICON:-} || ! ${LM:-} ]] || refuse "LM is set, and LEXICON is not; make one of it by \`hubert lexicon\`"
for file in ${LM:+"$LM" "$LEXICON"}; do
  [[ -f $file ]] || refuse "$file: no such file; correct LM or LEXICON"
done

missing='' # parts of LibriSpeech, each followed by a comma
for set in $subsets dev-other $sets; do
  [[ -f manifests/$set.jsonl.gz || ,$missing == *,$set,* ]] || missing+=$set,
done
[[ ! -f manifests/$limited.jsonl.gz ]] || limited=''
if [[ $missing || $limited ]]; then
  [[ ${DATA:-} ]] || refuse "manifests are missing, and DATA is not set; give the folder that holds LibriSpeech"
  [[ -d $DATA ]] || refuse "$DATA: no such folder; correct DATA, which holds LibriSpeech"
  [[ ! $missing ]] || hubert prepare librispeech "$DATA" manifests --subsets "[${missing%,}]"
  [[ ! $limited ]] || hubert prepare librilight "$DATA" manifests
fi

hubert fit "${layers[@]}" --model.init_args.pretrained "$pretrained" ${EXTRA:-} --output "$run"
best=$run/best.ckpt decoder=$run/decoder.json
[[ -f $run/metrics.json ]] || refuse "$run: the fit did not end; the same command resumes"
[[ -f $best ]] || refuse "$run: no best.ckpt, so nothing was validated; let the fit take more steps, or validate earlier"

if [[ ${LM:-} && ! $decoder -nt $best ]]; then
  hubert tune-decoder "$best" '[manifests/dev-other.jsonl.gz]' "$decoder" --lm "$LM" --lexicon "$LEXICON" --trials 60
fi

# The hypotheses of a set, and their error rates: result SET NAME SINCE OPTIONS
result() {
  local set=$1 name=$run/$2 since=$3
  shift 3
  [[ $name.jsonl -nt $since ]] && return
  hubert test --config "$run/config.yaml" "--data.init_args.test=[manifests/$set.jsonl.gz]" "$@"
  [[ ! -f $run/scores.json ]] || cp "$run/scores.json" "$name.scores.json"
  cp "$run/test-metrics.json" "$name.metrics.json"
  cp "$run/test.jsonl" "$name.part"
  mv "$name.part" "$name.jsonl" # last and atomic: this file marks the set as finished
}
percent() { LC_ALL=C awk -F: '/"test\/wer"/ { printf "%.1f", 100 * $2 }' "$1"; }

greedy='' lm=''
for set in $sets; do
  result "$set" "$set" "$best"
  greedy+=/$(percent "$run/$set.metrics.json")
  [[ ${LM:-} ]] || continue
  result "$set" "$set-lm" "$decoder" --model.init_args.decoder "$decoder"
  lm+=/$(percent "$run/$set-lm.metrics.json")
done
echo "| labels | size | greedy, WER % on ${sets// /\/} | with LM |"
echo "| $split | $size | ${greedy#/} | ${lm:+${lm#/}} |"
