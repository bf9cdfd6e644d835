#!/usr/bin/env bash
# Draws the loss of one or more runs against the tokens they were trained on, in the terminal and as a PNG file.
#   scripts/plot_log.sh OUT           writes OUT/loss.png; OUT is the --out folder of a run
#   scripts/plot_log.sh OUT OUT...    draws the runs in one picture, named after their folders; writes loss.png
#   scripts/plot_log.sh --output FILE.png OUT...    writes FILE.png
# The last line of the output is the name of the file.
set -euo pipefail
usage="usage: scripts/plot_log.sh [--output FILE.png] OUT...   (without FILE: OUT/loss.png, for several runs loss.png)"
stop() { echo "plot_log: $2" >&2; exit "$1"; }

picture="" runs=()
while [ $# -gt 0 ]; do
    case $1 in
        -h | --help) echo "$usage"; exit 0 ;;
        --output) [ -n "${2:-}" ] || stop 2 "--output needs the name of a file"; picture=$2; shift ;;
        --output=?*) picture=${1#*=} ;;
        -*) stop 2 "$1: no such flag; $usage" ;;
        *) runs+=("$1") ;;
    esac
    shift
done
[ ${#runs[@]} -gt 0 ] || stop 2 "no run named; $usage"
command -v gnuplot >/dev/null || stop 1 "gnuplot is not installed; scripts/setup.sh installs it"
if [ -z "$picture" ]; then
    picture=loss.png
    [ ${#runs[@]} = 1 ] && picture=${runs[0]%/}/loss.png
fi

# points METRICS: two blocks of lines "TOKENS LOSS", training and validation. The tokens of a step are its time x its
# speed. If a step occurs twice (a resumed run), the later line counts, and what came between the two is dropped.
points() {
    awk '
        function number(key) {
            if (!match($0, "\"" key "\":[-+.e0-9]+")) return ""
            return substr($0, RSTART + length(key) + 3, RLENGTH - length(key) - 3)
        }
        number("step") == "" { next }
        { step = number("step") + 0 }
        /"val_loss":/ { val[step] = number("val_loss"); next }
        !/"loss":/ { next }
        {
            for (s = step; s <= last; s++) { delete loss[s]; delete val[s] }
            if (first == "") first = step
            last = step
            loss[step] = number("loss")
            size[step] = int(number("tokens_per_second") * number("ms") / 1000 + 0.5)
        }
        END {
            before = 0
            for (s = first; s <= last; s++) if (s in loss) {
                tokens += (s - before) * size[s]
                before = s
                at[s] = tokens
                if (loss[s] != "") printf "%.0f %s\n", tokens, loss[s]
            }
            print "\n"
            for (s = first; s <= last; s++) if (s in at && val[s] != "") printf "%.0f %s\n", at[s], val[s]
        }' "$1"
}

quoted() { printf "'%s'" "${1//\'/\'\'}"; }     # as a string of gnuplot's

names=()
for run in "${runs[@]}"; do
    [ -d "$run" ] || stop 2 "$run: no such folder"
    [ -f "$run/metrics.jsonl" ] && [ -s "$run/metrics.jsonl" ] ||
        stop 2 "$run/metrics.jsonl is missing or empty; is $run the --out folder of a run?"
    names+=("$(basename "$(cd "$run" && pwd)")")
done
script="" curves="" most=0
for i in "${!runs[@]}"; do
    metrics=${runs[i]}/metrics.jsonl
    data=$(points "$metrics")
    [ -n "${data%%$'\n'*}" ] || stop 2 "$metrics has no finished step yet"
    tokens=$(awk '$1 > most { most = $1 } END { printf "%.0f", most }' <<<"$data")
    [ "$tokens" -gt "$most" ] && most=$tokens
    script+="\$run$i << END"$'\n'"$data"$'\n'"END"$'\n'

    name=${names[i]}
    [ "$(printf '%s\n' "${names[@]}" | grep -cFx -e "$name")" = 1 ] || name=${runs[i]}
    training=$name validation="$name, validation"
    [ ${#runs[@]} = 1 ] && training=training validation=validation
    style="linetype $((i + 1))"
    curves+="${curves:+, }\$run$i index 0 using (\$1 / unit):2 with lines $style title $(quoted "$training")"
    if grep -q '^$' <<<"$data"; then    # there is a second block
        style="with linespoints pointtype 7 $style dashtype 2"
        curves+=", \$run$i index 1 using (\$1 / unit):2 $style title $(quoted "$validation")"
    fi
done
if [ "$most" -ge 1000000000 ]; then unit=1e9 label="tokens (billions)"
elif [ "$most" -ge 1000000 ]; then unit=1e6 label="tokens (millions)"
else unit=1.0 label=tokens; fi

(: >>"$picture") 2>/dev/null || stop 1 "$picture: cannot write this file; --output FILE.png names another"
script+="unit = $unit; set xrange [0:*]; set xlabel '$label'; set ylabel 'loss (nats per token)'; set key noenhanced
set terminal dumb 100 24; plot $curves
set terminal pngcairo size 1000,600; set output $(quoted "$picture"); set grid; replot"
exec 3>&1
errors=$(gnuplot - <<<"$script" 2>&1 >&3) || stop 1 "gnuplot could not draw $picture: $(tail -1 <<<"$errors")"
echo "$picture"
