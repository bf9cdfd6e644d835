#!/bin/bash
# FineWeb-Edu to token shards: data/fineweb_edu.sh --help
#
# Each parquet file is one step, which happens completely or not at all: DuckDB reads it, tokenize adds its tokens to
# the shards and lists the file in their manifest. So a run may be stopped at any moment, by any means. The next run
# resumes after the last file in the manifest.
set -euo pipefail

usage() {
    cat <<'END'
usage: data/fineweb_edu.sh [10B|100B|350B] [options] [tokenize's --bytes --vocab --threads --shard-size --val-tokens]

Makes DIR/fineweb_edu_val_000000.bin, DIR/fineweb_edu_train_000001.bin ... from one of FineWeb-Edu's samples (default
10B), whose parquet files it downloads to DIR/parquet, or from your own parquet files. To resume, run it again.

  --out DIR           default data/fineweb_edu_10B (or 100B, 350B; data/fineweb_edu with --parquet)
  --parquet GLOB      use these files (quote the glob) instead of downloading
  --delete-parquet    delete each parquet file once its tokens are on disk
  --jobs N            files to download in parallel (default 4)

Environment: HF_ENDPOINT (default https://huggingface.co), DUCKDB (the duckdb program), TOKENIZE (the tokenize program).
END
}

die() { echo "fineweb_edu.sh: $*" >&2; exit "${code:-2}"; }
say() { echo "fineweb_edu.sh: $*" >&2; }

here=$(cd "$(dirname "$0")" && pwd)
sample=10B out= glob= delete=0 jobs=4 has_vocab=0 pass=()
while [ $# -gt 0 ]; do
    case $1 in
    10B | 100B | 350B) sample=$1 ;;
    -h | --help) usage; exit 0 ;;
    --delete-parquet) delete=1 ;;
    --bytes) pass+=("$1"); has_vocab=1 ;;
    --out | --parquet | --jobs | --vocab | --threads | --shard-size | --val-tokens)
        [ $# -ge 2 ] || die "$1: a value is missing"
        case $1 in
        --out) out=$2 ;;
        --parquet) glob=$2 ;;
        --jobs) [[ $2 =~ ^[1-9][0-9]?$ ]] || die "--jobs $2: not a number from 1 to 99"; jobs=$2 ;;
        --vocab) pass+=("$1" "$2"); has_vocab=1 ;;
        *) pass+=("$1" "$2") ;;
        esac
        shift ;;
    *) die "$1: not a flag or sample of this script; see --help" ;;
    esac
    shift
done
[ -n "$out" ] || out=$here/fineweb_edu$([ -n "$glob" ] || echo "_$sample")
tokenize=${TOKENIZE:-$here/tokenize}
name=$out/fineweb_edu
parquet=$out/parquet
url=${HF_ENDPOINT:-https://huggingface.co}
[ -x "$tokenize" ] || die "$tokenize does not exist; build it with: make tokenize"
mkdir -p "$out" || code=1 die "$out: cannot make this folder"

# One run at a time. Processes that survived a killed run hold the lock too, so this also waits for them.
exec 9>"$out/.lock"
flock -n 9 || { say "waiting for an earlier run that is still using $out"; flock 9; }
scratch=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM

if [ $has_vocab = 0 ]; then
    "$here/gpt2_vocab.sh" >/dev/null
    pass+=(--vocab "$here/gpt2.tiktoken")
fi

# ----------------------------------------------------------------------------------------------------------------------
# DuckDB: $DUCKDB, or the installed program, or one installed now, by DuckDB's installer or from PyPI's duckdb-cli

find_duckdb() {
    local d
    for d in "${DUCKDB:-}" "$(type -P duckdb || true)" "${HOME:-}/.duckdb/cli/latest/duckdb" "$here/duckdb/duckdb"; do
        [ -n "$d" ] && "$d" -version >/dev/null 2>&1 && { echo "$d"; return; }
    done
    return 1
}

install_duckdb() {
    say "installing DuckDB's command-line program"
    curl -fsSL --connect-timeout 10 https://install.duckdb.org 2>/dev/null | sh >/dev/null 2>&1 && return
    # A wheel is a zip archive; the program in it is duckdb_cli/duckdb.
    local page=${PIP_INDEX_URL:-https://pypi.org/simple} wheel
    page=${page%/}/duckdb-cli/
    wheel=$(curl -fsSL --connect-timeout 10 "$page" 2>/dev/null |
        grep -o "href=\"[^\"#]*manylinux[^\"#]*_$(uname -m)\.whl" | sed 's/^href="//' | tail -n 1) || return 1
    case $wheel in http*) ;; *) wheel=$page$wheel ;; esac
    curl -fsSL "$wheel" -o "$scratch/duckdb.zip" 2>/dev/null || return 1
    unzip -qo "$scratch/duckdb.zip" -d "$scratch/wheel" 2>/dev/null ||
        python3 -m zipfile -e "$scratch/duckdb.zip" "$scratch/wheel" 2>/dev/null || return 1
    mkdir -p "$here/duckdb"
    chmod +x "$scratch/wheel/duckdb_cli/duckdb"
    mv "$scratch/wheel/duckdb_cli/duckdb" "$here/duckdb/duckdb"
}

duckdb=$(find_duckdb) || { install_duckdb || true; duckdb=$(find_duckdb); } ||
    code=1 die "DuckDB's command-line program is missing and cannot be installed from install.duckdb.org or PyPI's" \
        "duckdb-cli (which needs unzip or python3); install it, or set DUCKDB to its path"

# Runs one statement and prints values as a|b. An error is one line that names FILE.
query() {   # FILE SQL
    "$duckdb" -init /dev/null -noheader -list -c "$2" 2>"$scratch/error" ||
        die "$1: DuckDB: $(head -n 1 "$scratch/error")"
}
sql_name() { printf "'%s'" "${1//\'/\'\'}"; }

# ----------------------------------------------------------------------------------------------------------------------
# The list of files: paths[], and sizes[] if they are downloaded. Checksums are in SHA256SUMS in the same folder.

paths=() sizes=()
if [ -n "$glob" ]; then
    while IFS= read -r f; do paths+=("$f"); done < <(compgen -G "$glob" | LC_ALL=C sort)
    [ ${#paths[@]} -gt 0 ] || die "--parquet $glob: no such file"
    double=$(printf '%s\n' "${paths[@]##*/}" | LC_ALL=C sort | uniq -d | head -n 1)
    [ -z "$double" ] || die "--parquet $glob: two files are named $double, but names must differ in the manifest"
else
    mkdir -p "$parquet"
    if [ ! -s "$parquet/files" ]; then
        tree=$url/api/datasets/HuggingFaceFW/fineweb-edu/tree/main/sample/${sample}T
        curl -fsL --connect-timeout 20 --retry 5 "$tree" -o "$scratch/tree.json" ||
            code=1 die "$url does not answer; without the network, pass the parquet files of FineWeb-Edu's" \
                "sample/${sample}T with --parquet 'FOLDER/*.parquet'"
        list="FROM read_json($(sql_name "$scratch/tree.json")) WHERE path LIKE '%.parquet' ORDER BY path"
        query "$tree" "SELECT lfs.oid || '  ' || parse_filename(path) $list" >"$parquet/SHA256SUMS"
        query "$tree" "SELECT size || ' ' || parse_filename(path) $list" >"$scratch/files"
        [ -s "$scratch/files" ] || code=1 die "$url lists no parquet files for sample/${sample}T"
        mv "$scratch/files" "$parquet/files.part" && mv "$parquet/files.part" "$parquet/files"
    fi
    while read -r size f; do paths+=("$parquet/$f"); sizes+=("$size"); done <"$parquet/files"
fi

# Whether the manifest lists the file. A different size means a different file of the same name, which is an error.
is_done() {
    local line bytes
    line=$(grep -sF "{\"file\": \"${1##*/}\", \"documents\": " "${name}_manifest.json") || return 1
    bytes=$(sed 's/.*"bytes": \([0-9]*\).*/\1/' <<<"$line")
    [ ! -e "$1" ] || [ "$(stat -Lc %s "$1")" = "$bytes" ] ||
        die "$1: ${name}_manifest.json already lists a different file of this name, with $bytes bytes"
}

sha256_wanted() {
    local sums
    sums=$(dirname "$1")/SHA256SUMS
    awk -v f="${1##*/}" '{ g = $2; sub(/^\*/, "", g); if (g == f) print $1 }' "$sums" 2>/dev/null || true
}

check_sha256() {    # FILE WANTED NAME
    [ "$(sha256sum <"$1" | cut -d ' ' -f 1)" = "$2" ] ||
        { say "$3: damaged: its SHA-256 is not the one in SHA256SUMS"; return 1; }
}

# Downloads one file, resuming an earlier try. The file gets its name once its size and checksum are right.
fetch() {   # FILE BYTES
    local part=$1.part have
    have=$(stat -c %s "$part" 2>/dev/null || echo 0)
    if [ "$have" -lt "$2" ]; then
        curl -fsSL --connect-timeout 20 --retry 10 --retry-delay 2 -C - -o "$part" \
            "$url/datasets/HuggingFaceFW/fineweb-edu/resolve/main/sample/${sample}T/${1##*/}" ||
            { say "${1##*/}: the download stopped; run this again to resume"; return 1; }
    fi
    have=$(stat -c %s "$part")
    if [ "$have" != "$2" ] || ! check_sha256 "$part" "$(sha256_wanted "$1")" "${1##*/}"; then
        rm -f "$part"
        say "${1##*/}: the download was damaged ($have of $2 bytes) and has been deleted; run this again"
        return 1
    fi
    mv "$part" "$1"
}

# ----------------------------------------------------------------------------------------------------------------------
# The work, file by file

add() {     # FILE: adds all of it to the shards, or nothing
    local f=$1 sql wanted rows tokens='' expect status
    wanted=$(sha256_wanted "$f")
    sql="read_parquet($(sql_name "$f"))"
    if [ -n "$glob" ] && [ -n "$wanted" ]; then check_sha256 "$f" "$wanted" "$f" || exit 2; fi
    rows=$(query "$f" "SELECT count(*) FROM $sql")
    # Parquet files usually contain no checksums. Without SHA256SUMS, compare with the file's own token counts.
    if [ -z "$wanted" ] && [[ " ${pass[*]} " != *" --bytes "* ]] &&
        [ -n "$(query "$f" "SELECT 1 FROM (DESCRIBE FROM $sql) WHERE column_name = 'token_count'")" ]; then
        tokens=$(query "$f" "SELECT sum(token_count)::BIGINT FROM $sql WHERE text IS NOT NULL")
    fi
    expect=(--rows "$rows")
    [ -z "$tokens" ] || expect+=(--tokens "$tokens")
    set +e
    "$duckdb" -init /dev/null -c "SET memory_limit = '4GB'; SET temp_directory = $(sql_name "$scratch");
        COPY (SELECT text FROM $sql) TO '/dev/stdout' (FORMAT json)" 2>"$scratch/error" |
        "$tokenize" "${pass[@]}" "${expect[@]}" --source "$f" -o "$name"
    status=${PIPESTATUS[1]}
    set -e
    [ "$status" = 0 ] && return
    [ -s "$scratch/error" ] && say "$f: DuckDB: $(head -n 1 "$scratch/error")"
    code=$status
    [ -z "$tokens" ] ||
        die "$f: not added; if its number of tokens differs from its token_count column, it is damaged;" \
            "if you know that it is not: (cd $(dirname "$f") && sha256sum ${f##*/} >>SHA256SUMS)"
    die "$f: not added"
}

pids=() started=0
for i in "${!paths[@]}"; do
    f=${paths[i]}
    if [ -z "$glob" ]; then
        for (( ; started < ${#paths[@]} && started < i + jobs; started++)); do
            is_done "${paths[started]}" || [ -e "${paths[started]}" ] ||
                { fetch "${paths[started]}" "${sizes[started]}" & pids[started]=$!; }
        done
        [ -z "${pids[i]:-}" ] || wait "${pids[i]}" || code=1 die "not complete; finished files are kept"
    fi
    if is_done "$f"; then
        say "$((i + 1)) of ${#paths[@]}: ${f##*/} is in the shards already"
    else
        say "$((i + 1)) of ${#paths[@]}: ${f##*/}"
        add "$f"
    fi
    [ $delete = 0 ] || rm -f "$f"
done
say "done: ${name}_manifest.json"
