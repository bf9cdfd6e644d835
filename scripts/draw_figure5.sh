#!/usr/bin/env bash
# Draws the paper's Figure 5 from our own measurements: the time of one layer's attention for one new token, against the
# length of the cached sequences, for each attention kind; both axes logarithmic.
#   build/flashtpa_decode figure >dev/results/figure5.tsv      measures (make build/flashtpa_decode; needs a GPU)
#   scripts/draw_figure5.sh                                    writes dev/results/figure5.png (needs gnuplot)
set -euo pipefail
cd "$(dirname "$0")/../dev/results"
[ -s figure5.tsv ] ||
    { echo "draw_figure5.sh: dev/results/figure5.tsv is missing; build/flashtpa_decode figure makes it" >&2; exit 2; }
mapfile -t kinds < <(awk -F '\t' 'NR > 1 && !seen[$1]++ { print $1 }' figure5.tsv)
mapfile -t sizes < <(awk -F '\t' 'NR > 1 && !seen[$2]++ { print $2 }' figure5.tsv)
{
    echo "set terminal pngcairo size $((400 * ${#sizes[@]})),480; set output 'figure5.png'; set datafile separator tab"
    echo "set logscale x 2; set logscale y 10; set format x '2^{%L}'; set grid; set key top left; set yrange [3:100000]"
    echo "set xlabel 'cached tokens'; set ylabel 'microseconds'; set multiplot layout 1, ${#sizes[@]}"
    for b in "${sizes[@]}"; do
        plot=""
        for i in "${!kinds[@]}"; do
            plot+="${plot:+, }'figure5.tsv' using (stringcolumn(1) eq '${kinds[i]}' && \$2 == $b ? \$3 : 1/0):4"
            plot+=" with linespoints linetype $((i + 1)) pointtype 7 pointsize 0.7 title '${kinds[i]}'"
        done
        echo "set title 'B = $b'; plot $plot"
    done
} | gnuplot -
echo dev/results/figure5.png
