#!/usr/bin/env bash
# From a fresh Debian or Ubuntu to a trained model and a story written by it, in about six minutes on two cores:
# installs what is missing, builds, makes the toy corpus, trains a small T6. With an NVIDIA GPU and nvcc it trains on
# the GPU, in seconds. A second run reuses what is there. On other distributions setup.sh names what is missing.
set -euo pipefail
cd "$(dirname "$0")/.."
out=out/quickstart
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-20000}      # long spinning of idle threads is slow on a shared machine

scripts/setup.sh
trainer=train_t6
if nvidia-smi -L >/dev/null 2>&1 && make -s check-nvcc 2>/dev/null; then trainer=train_t6cu; fi
make -s $trainer generate_t6 data/toy_corpus
[ -s data/toy/toy_manifest.json ] || ./data/toy_corpus -o data/toy

# Ctrl-C, SIGTERM and SIGHUP go to the trainer, which saves a checkpoint; then this script ends. A second Ctrl-C ends
# both at once. Two within a second are one: some programs pass on what the terminal has already sent to all.
run="" signals=0 interrupted=""
pass_on() {
    signals=$((signals + 1))
    if [ "$1" = INT ]; then
        if [ -n "$interrupted" ] && [ $SECONDS -gt "$interrupted" ]; then kill -KILL $run 2>/dev/null || :; fi
        interrupted=${interrupted:-$SECONDS}
    fi
    kill $run 2>/dev/null || :
}
./$trainer -o "$out" --resume --save-every 1000 --keep 1 --val-every 2000 --val-tokens 0 \
    --sample-every 5000 --temperature 0.5 &
run=$!
for name in INT TERM HUP; do trap "pass_on $name" $name; done
seen=""
until [ "$seen" = $signals ]; do        # a signal ends wait before the trainer has ended
    seen=$signals code=0
    wait $run || code=$?
done
[ $signals = 0 ] || exit 130
[ $code = 0 ] || exit $code

entropy=$(sed -n 's/.*"val_bits_per_byte": *\([0-9.]*\).*/\1/p' data/toy/toy_entropy.json)
loss=$(sed -n 's/.*"val_bits_per_byte":\([0-9.]*\).*/\1/p' "$out/metrics.jsonl" | tail -1)
bytes=$(wc -c <data/toy/toy_val.txt)
xz=0
if command -v xz >/dev/null; then xz=$(xz -9e -c data/toy/toy_val.txt | wc -c); fi

echo
if command -v gnuplot >/dev/null; then
    scripts/plot_log.sh "$out"
    echo
fi
echo "Bits per byte of the validation text:"
awk -v loss="$loss" -v entropy="$entropy" -v xz="$xz" -v bytes="$bytes" 'BEGIN {
    printf "  this model             %.3f\n", loss
    printf "  entropy of the corpus  %.3f   (the best that any model can do; this one needs %.2f times that)\n",
        entropy, loss / entropy
    if (xz) printf "  xz -9                  %.3f\n", 8 * xz / bytes }'
echo
echo "A story written by this model:"
./generate_t6 -e "$out" -p '<|endoftext|>' --echo 0 --temperature 0.5 --stats
echo
echo "References in 500 stories at temperature 1: the words that a story must repeat, such as who had which thing"
./generate_t6 -e "$out" -p '<|endoftext|>' --echo 0 --temperature 1 --num-samples 500 --seed 1 >"$out/stories.txt"
data/toy_corpus --judge "$out/stories.txt"
