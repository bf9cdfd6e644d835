#!/bin/bash
# The data of the paper's tasks, for eval_t6: data/eval_tasks.sh --help
set -euo pipefail

usage() {
    cat <<'END'
usage: data/eval_tasks.sh [TASK...] [--out DIR] [--from DIR]

Gets the data of arc_easy, arc_challenge, boolq, hellaswag, openbookqa, piqa, winogrande, mmlu and sciq (default: all)
for eval_t6: the parquet files of the Hugging Face hub, to DIR/TASK/hub. What is there already stays; to resume, run it
again.

  --out DIR           default data/eval
  --from DIR          copy DIR/TASK, with files as their authors released them or with the hub's in hub/, instead of
                      downloading

Environment: HF_ENDPOINT (default https://huggingface.co), HF_TOKEN (sent there, if set), DUCKDB (the duckdb program).
END
}

program=eval_tasks.sh
here=$(unset CDPATH && cd "$(dirname "$0")" && pwd)
. "$here/data_set.sh"
. "$here/hub.sh"
out=$here/eval from='' tasks=()
while [ $# -gt 0 ]; do
    case $1 in
    arc_easy | arc_challenge | boolq | hellaswag | openbookqa | piqa | winogrande | mmlu | sciq) tasks+=("$1") ;;
    -h | --help) usage; exit 0 ;;
    --out | --from)
        [ -n "${2:-}" ] || die "$1: a value is missing"
        if [ "$1" = --out ]; then out=$2; else from=$2; fi
        shift ;;
    *) die "$1: not a flag or task of this script; see --help" ;;
    esac
    shift
done
[ ${#tasks[@]} -gt 0 ] || tasks=(arc_easy arc_challenge boolq hellaswag openbookqa piqa winogrande mmlu sciq)
[ -z "$from" ] || [ -d "$from" ] || die "--from $from: no such folder"
mkdir -p "$out" 2>/dev/null || code=1 die "$out: cannot make this folder"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM

# A task's files: of its release, with * for MMLU's subjects; and on the hub: repository, folder, tested and train split
release_of() {  # TASK
    case $1 in
    arc_easy) echo "ARC-Easy/ARC-Easy-Test.jsonl ARC-Easy/ARC-Easy-Train.jsonl" ;;
    arc_challenge) echo "ARC-Challenge/ARC-Challenge-Test.jsonl ARC-Challenge/ARC-Challenge-Train.jsonl" ;;
    boolq) echo "google/dev.jsonl google/train.jsonl" ;;
    hellaswag) echo "hellaswag_val.jsonl hellaswag_train.jsonl" ;;
    openbookqa) echo "test.jsonl train.jsonl" ;;
    piqa) echo "valid.jsonl valid-labels.lst train.jsonl train-labels.lst" ;;
    winogrande) echo "dev.jsonl train_xl.jsonl" ;;
    mmlu) echo "data/test/*_test.csv data/dev/*_dev.csv" ;;
    sciq) echo "test.json train.json" ;;
    esac
}
hub_of() {      # TASK
    case $1 in
    arc_easy) echo "allenai/ai2_arc ARC-Easy test train" ;;
    arc_challenge) echo "allenai/ai2_arc ARC-Challenge test train" ;;
    boolq) echo "aps/super_glue boolq validation train" ;;
    hellaswag) echo "Rowan/hellaswag data validation train" ;;
    openbookqa) echo "allenai/openbookqa main test train" ;;
    piqa) echo "baber/piqa data validation train" ;;
    winogrande) echo "allenai/winogrande winogrande_xl validation train" ;;
    mmlu) echo "cais/mmlu * test dev" ;;
    sciq) echo "allenai/sciq data test train" ;;
    esac
}

# Whether a folder has the tested rows of a task in a form that eval_t6 reads.
has_task() {    # FOLDER TASK
    local first hub split
    read -r first _ < <(release_of "$2")
    read -r _ hub split _ < <(hub_of "$2")
    (cd "$1" 2>/dev/null && { compgen -G "$first" || compgen -G "hub/$hub/$split-00000-of-00001.parquet"; }) >/dev/null
}

# Whether nothing is left to be downloaded of what an earlier run began to download.
is_complete() { # FOLDER
    local file
    [ -e "$1/hub/files" ] || return 0
    while read -r _ _ file; do [ -e "$1/hub/$file" ] || return 1; done <"$1/hub/files"
}

# What to put where, where there is neither network nor files.
advice() {      # TASK
    local repository folder test train
    read -r repository folder test train < <(hub_of "$1")
    echo "put $(release_of "$1") of its release, or $folder/{$test,$train}-00000-of-00001.parquet of the hub's" \
        "$repository under hub/, into $out/$1"
}

# Copies a task's folder, each file completely or not at all.
copy_task() {   # TASK
    local file to
    has_task "$from/$1" "$1" ||
        { echo "$from/$1 has no file that eval_t6 reads; $(advice "$1")" >"$scratch/why"; return 1; }
    while IFS= read -r -d '' file; do
        to=$out/$1/$file
        mkdir -p "$(dirname "$to")"
        cp -- "$from/$1/$file" "$to.part" && mv -- "$to.part" "$to" ||
            { echo "cannot write $to" >"$scratch/why"; return 1; }
    done < <(cd "$from/$1" && find -L . -type f \( -name '*.jsonl' -o -name '*.json' -o -name '*.csv' -o -name '*.lst' \
        -o -name '*.parquet' \) -print0)
}

# Downloads a task's parquet files, after the hub's list of them with sizes and checksums.
download_task() {       # TASK
    local repository folder test train tree http path bytes sum file
    read -r repository folder test train < <(hub_of "$1")
    tree="$url/api/datasets/$repository/tree/main$([ "$folder" = '*' ] || echo "/$folder")?recursive=true"
    http=$(from_hub "$tree" "$scratch/tree" --retry 2) || {
        [[ $http == [1-9]* ]] && why=$(refusal "$http") || why="$url does not answer"
        echo "$why; without the network, $(advice "$1")" >"$scratch/why"
        return 1
    }
    query "$tree" "SELECT size || ' ' || lfs.oid || ' ' || path FROM read_json('tree') WHERE regexp_matches(path,
        '^[^/]+/($test|$train)-00000-of-00001[.]parquet\$') AND path NOT LIKE 'all/%' ORDER BY path" >"$scratch/files"
    [ -s "$scratch/files" ] || { echo "$url lists no files of $repository" >"$scratch/why"; return 1; }
    mkdir -p "$out/$1/hub" && cp "$scratch/files" "$out/$1/hub/files.part" &&
        mv "$out/$1/hub/files.part" "$out/$1/hub/files"
    while read -r bytes sum path; do
        file=$out/$1/hub/$path
        mkdir -p "$(dirname "$file")"
        grep -qsxF "$sum  ${file##*/}" "$(dirname "$file")/SHA256SUMS" ||
            echo "$sum  ${file##*/}" >>"$(dirname "$file")/SHA256SUMS"
        { [ -e "$file" ] && has_sha256 "$file" "$sum"; } ||
            fetch "$file" "$bytes" "$url/datasets/$repository/resolve/main/$path" ||
            { mv "$scratch/${file##*/}.why" "$scratch/why"; return 1; }
    done <"$scratch/files"
}

failed=0
for task in "${tasks[@]}"; do
    if has_task "$out/$task" "$task" && is_complete "$out/$task"; then
        say "$task is there already"
        continue
    fi
    if [ -n "$from" ]; then get=copy_task; else get=download_task; [ -n "${duckdb:-}" ] || need_duckdb; fi
    if $get "$task"; then say "$task is in $out/$task"; else say "$task: $(cat "$scratch/why")"; failed=1; fi
done
exit $failed
