#!/usr/bin/env bash
# Draws the loss curve of a run: scripts/plot_log.sh OUT writes OUT/loss.png, and draws it in the terminal too.
set -euo pipefail
out=${1:?usage: scripts/plot_log.sh OUT, the folder that holds metrics.jsonl}
[ -s "$out/metrics.jsonl" ] || { echo "plot_log: $out/metrics.jsonl is missing or empty; is $out the --out of a run?" >&2; exit 2; }

points=$(mktemp -d)
trap 'rm -rf "$points"' EXIT
# the trainer writes one object a line, keys in a fixed order
sed -n 's/^{"step":\([0-9]*\),"loss":\([-+.e0-9]*\),.*/\1 \2/p' "$out/metrics.jsonl" >"$points/train"
sed -n 's/^{"step":\([0-9]*\),"val_loss":\([-+.e0-9]*\),.*/\1 \2/p' "$out/metrics.jsonl" >"$points/val"
[ -s "$points/train" ] || { echo "plot_log: $out/metrics.jsonl has no finished step yet" >&2; exit 2; }

curves="'$points/train' with lines title 'training'"
[ -s "$points/val" ] && curves="$curves, '$points/val' with linespoints pointtype 7 title 'validation'"
gnuplot -e "set terminal dumb 100 24; set xlabel 'step'; set ylabel 'loss'; plot $curves"
gnuplot -e "set terminal pngcairo size 1000,600; set output '$out/loss.png'; set grid; set xlabel 'step'; set ylabel 'loss (nats a token)'; plot $curves"
echo "$out/loss.png"
