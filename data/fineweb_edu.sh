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
10B), whose parquet files it downloads to DIR/parquet, or from your own parquet files. To resume, run it again with the
same flags.

  --out DIR           default data/fineweb_edu_10B (or 100B, 350B; data/fineweb_edu with --parquet)
  --parquet GLOB      use these files (quote the glob) instead of downloading
  --delete-parquet    delete each parquet file once its tokens are on disk
  --jobs N            files to download in parallel (default 4)

Environment: HF_ENDPOINT (default https://huggingface.co), HF_TOKEN (sent there, if set), DUCKDB (the duckdb program),
TOKENIZE (the tokenize program).
END
}

program=fineweb_edu.sh
here=$(unset CDPATH && cd "$(dirname "$0")" && pwd)
. "$here/data_set.sh"
sample=10B out='' glob='' delete=0 jobs=4 shard_size=100000000 val_tokens=''
while [ $# -gt 0 ]; do
    case $1 in
    10B | 100B | 350B) sample=$1 ;;
    -h | --help) usage; exit 0 ;;
    --delete-parquet) delete=1 ;;
    --bytes) tokenize_flag "$1" ;;
    --out | --parquet | --jobs | --vocab | --threads | --shard-size | --val-tokens)
        [ -n "${2:-}" ] || die "$1: a value is missing"
        case $1 in
        --out) out=$2 ;;
        --parquet) glob=$2 ;;
        --jobs) [[ $2 =~ ^[1-9][0-9]?$ ]] || die "--jobs $2: not a number from 1 to 99"; jobs=$2 ;;
        *) tokenize_flag "$1" "$2" ;;
        esac
        shift ;;
    *) die "$1: not a flag or sample of this script; see --help" ;;
    esac
    shift
done
[ -n "$out" ] || out=$here/fineweb_edu$([ -n "$glob" ] || echo "_$sample")
val_tokens=${val_tokens:-$shard_size}
name=$out/fineweb_edu
manifest=${name}_manifest.json
parquet=$out/parquet
. "$here/hub.sh"
files=$url/datasets/HuggingFaceFW/fineweb-edu/resolve/main/sample/${sample}T
[ -x "$tokenize" ] || die "$tokenize does not exist; build it with: make tokenize"
mkdir -p "$out" 2>/dev/null || code=1 die "$out: cannot make this folder"

# One run at a time. Processes that survived a killed run hold the lock too, so this also waits for them.
exec 9>"$out/.lock"
flock -n 9 || { say "waiting for an earlier run that is still using $out"; flock 9; }
check_existing "$manifest"
scratch=$(mktemp -d)
trap 'kill $(jobs -p) 2>/dev/null || true; rm -rf "$scratch"' EXIT
trap 'exit 130' INT TERM
tokenize_arguments

need_duckdb

# DuckDB reads the file under the name in.parquet, so that no folder or name is taken for a pattern or for columns.
# Files from old programs have text without the mark of strings; it is text all the same.
sql="read_parquet('in.parquet', binary_as_string = true)"
set_input() { ln -sfn -- "$(absolute "$1")" "$scratch/in.parquet"; }    # FILE
absolute() { case $1 in /*) printf %s "$1" ;; *) printf %s "$PWD/$1" ;; esac; }

# ----------------------------------------------------------------------------------------------------------------------
# The manifest's files

# Sets xxh64 to a file's. tokenize computes it, for the manifest of an empty data set.
hash_file() {   # FILE
    rm -rf "$scratch/hash"
    printf '{"text":""}\n' | "$tokenize" --bytes --threads 1 --val-tokens 0 --source "$1" -o "$scratch/hash/x" \
        2>"$scratch/error" || code=$? die "$(sed 's/^[^:]*: //' "$scratch/error")"
    xxh64=$(sed -n 's/.*"documents": .*"xxh64": "\([0-9a-f]*\)".*/\1/p' "$scratch/hash/x_manifest.json")
}

# The manifest's line of a file, in part.
line_of() { local n=${1//\\/\\\\}; printf '{"file": "%s", "documents": ' "${n//\"/\\\"}"; }     # LISTED NAME

# Whether the tokens of a file are in the shards. A file on disk must have the listed content, and one to download the
# listed size; where the content is that of a file of another name, it is that file. Other content under a listed name
# is an error.
is_done() {     # FILE LISTED-NAME [BYTES]
    local bytes=${3:-}
    [ -e "$manifest" ] || return 1
    if [ -e "$1" ]; then
        bytes=$(stat -Lc %s -- "$1")
        if grep -q "\"documents\": .*\"bytes\": $bytes," "$manifest"; then
            # what this script has downloaded and does not delete is known by its name
            [ -n "$glob" ] || [ $delete = 1 ] || ! grep -qF "$(line_of "$2")" "$manifest" || return 0
            hash_file "$1"
            ! grep -q "\"documents\": .*\"bytes\": $bytes, \"xxh64\": \"$xxh64\"" "$manifest" || return 0
        fi
    fi
    grep -qF "$(line_of "$2")" "$manifest" || return 1
    [ ! -e "$1" ] && grep -F "$(line_of "$2")" "$manifest" | grep -q "\"bytes\": $bytes," ||
        die "$1: $manifest already lists a different file of this name; if both belong to the set, rename this one"
}

# The hub's list of the sample's files: their sizes in DIR/parquet/files, their checksums in SHA256SUMS next to it.
list_sample() {
    local tree=$url/api/datasets/HuggingFaceFW/fineweb-edu/tree/main/sample/${sample}T http list
    http=$(from_hub "$tree" "$scratch/tree" --retry 5) || {
        [[ $http != [1-9]* ]] || code=1 die "$(refusal "$http")"
        code=1 die "$url does not answer; without the network, pass the parquet files of FineWeb-Edu's" \
            "sample/${sample}T with --parquet 'FOLDER/*.parquet'"
    }
    list="FROM read_json('tree') WHERE path LIKE '%.parquet' ORDER BY path"
    query "$tree" "SELECT lfs.oid || '  ' || parse_filename(path) $list" >"$parquet/SHA256SUMS"
    query "$tree" "SELECT size || ' ' || parse_filename(path) $list" >"$scratch/files"
    [ -s "$scratch/files" ] || code=1 die "$url lists no parquet files for sample/${sample}T"
    echo "$sample" >"$parquet/sample"
    mv "$scratch/files" "$parquet/files.part" && mv "$parquet/files.part" "$parquet/files"
}

# ----------------------------------------------------------------------------------------------------------------------
# The list of files: paths[], the names under which the manifest lists them, and sizes[] if they are downloaded

# Expands a glob, in the order of names. Its longest part that exists is taken as it is, whatever characters it has.
expand() {  # GLOB
    local there=$1 IFS=''
    while [ -n "$there" ] && [ ! -e "$there" ]; do
        case $there in */*) there=${there%/*} ;; *) there='' ;; esac
    done
    shopt -s nullglob
    paths=("$there"${1#"$there"})
    shopt -u nullglob
    mapfile -d '' -t paths < <([ ${#paths[@]} = 0 ] || printf '%s\0' "${paths[@]}" | LC_ALL=C sort -z)
}

# Files of one name in several folders are listed with what differs of their paths: a%2F0.parquet, b%2F0.parquet.
name_files() {
    local i common=${paths[0]%/*}/ double
    names=("${paths[@]##*/}")
    declare -A seen=()
    for i in "${!names[@]}"; do seen[${names[i]}]=$((${seen[${names[i]}]:-0} + 1)); done
    for i in "${!paths[@]}"; do
        while [[ ${paths[i]} != "$common"* ]]; do
            common=${common%/}
            case $common in */*) common=${common%/*}/ ;; *) common=''; break ;; esac
        done
    done
    for i in "${!paths[@]}"; do
        [ "${seen[${names[i]}]}" = 1 ] || { double=${paths[i]#"$common"}; names[i]=${double//\//%2F}; }
    done
}

paths=() names=() sizes=()
if [ -n "$glob" ]; then
    expand "$glob"
    [ ${#paths[@]} -gt 0 ] || die "--parquet $glob: no such file"
    for f in "${paths[@]}"; do
        [ -e "$f" ] || die "--parquet $f: no such file"
        [ -f "$f" ] && [ -r "$f" ] || die "--parquet $f: not a file that can be read"
    done
    name_files
else
    mkdir -p "$parquet"
    [ ! -s "$parquet/sample" ] || [ "$(cat "$parquet/sample")" = "$sample" ] ||
        die "$out has the sample $(cat "$parquet/sample"), not $sample; give another --out"
    { [ -s "$parquet/files" ] && [ -s "$parquet/SHA256SUMS" ]; } || list_sample
    while read -r size f; do paths+=("$parquet/$f"); names+=("$f"); sizes+=("$size"); done <"$parquet/files"
fi

# ----------------------------------------------------------------------------------------------------------------------
# The work, file by file

# Whether the file's column text can be used; if not, one line says why. DuckDB does not tell a from A in names of
# columns, and renames the second of two.
check_columns() {   # FILE
    local why
    why=$(query "$1" "
        WITH c AS (SELECT column_name AS name, column_type AS type FROM (DESCRIBE FROM $sql)),
            t AS (SELECT type FROM c WHERE lower(name) = 'text')
        SELECT replace(CASE
            WHEN (SELECT count(*) FROM t) = 0 THEN 'there is no column text; its columns are '
                || (SELECT left(string_agg(name, ', '), 300) FROM c)
            WHEN (SELECT type FROM t) NOT IN ('VARCHAR', 'JSON') THEN 'its column text is of type '
                || (SELECT left(type, 300) FROM t) || ', not text'
            WHEN EXISTS (FROM c WHERE regexp_matches(lower(name), '^text_[0-9]+$')
                AND name NOT IN (SELECT name FROM parquet_schema('in.parquet')))
                THEN 'it has several columns named text'
            ELSE '' END, chr(10), ' ')") || exit
    [ -z "$why" ] || die "$1: $why"
}

add() {     # FILE LISTED-NAME [checked]: adds all of it to the shards, or nothing
    local f=$1 source=$1 wanted rows tokens=none expect status
    wanted=$(sha256_listed "$f") || exit
    [ -n "${3:-}" ] || [ -z "$wanted" ] || has_sha256 "$f" "$wanted" ||
        die "$f: damaged: its SHA-256 is not the one in SHA256SUMS"
    if [ "$2" != "${f##*/}" ]; then
        source=$scratch/$2
        ln -sfn -- "$(absolute "$f")" "$source"
    fi
    set_input "$f"
    check_columns "$f"
    rows=$(query "$f" "SELECT count(*) FROM $sql") || exit
    # Parquet files usually contain no checksums. Without SHA256SUMS, compare with the file's own token counts.
    if [ -z "$wanted" ] && [ $bytes = 0 ] &&
        [ -n "$(query "$f" "SELECT 1 FROM (DESCRIBE FROM $sql) WHERE lower(column_name) = 'token_count'")" ]; then
        tokens=$(query "$f" "
            WITH counts AS (SELECT TRY_CAST(token_count::VARCHAR AS BIGINT) AS n FROM $sql WHERE text IS NOT NULL)
            SELECT CASE WHEN count(*) != count(n) THEN 'none'
                ELSE greatest(0, least(1e15::BIGINT, coalesce(sum(n), 0)))::VARCHAR END FROM counts") || exit
        [ "$tokens" != none ] || say "note: $f: token_count is not a number in every row, so it is not checked"
    fi
    expect=(--rows "$rows")
    [ "$tokens" = none ] || expect+=(--tokens "$tokens")
    set +e
    run_duckdb -c "SET memory_limit = '4GB'; SET temp_directory = '.';
        COPY (SELECT text::VARCHAR AS text FROM $sql) TO '/dev/stdout' (FORMAT json)" 2>"$scratch/error" |
        "$tokenize" "${pass[@]}" "${expect[@]}" --source "$source" -o "$name"
    status=${PIPESTATUS[1]}
    set -e
    [ "$status" = 0 ] && return
    [ -s "$scratch/error" ] && say "$f: DuckDB: $(head -n 1 "$scratch/error")"
    code=$status
    [ "$tokens" = none ] ||
        die "$f: not added; if its number of tokens differs from its token_count column, it is damaged;" \
            "if you know that it is not: (cd $(printf %q "$(dirname -- "$f")") &&" \
            "sha256sum $(printf %q "${f##*/}") >>SHA256SUMS)"
    die "$f: not added"
}

pids=() started=0
for i in "${!paths[@]}"; do
    f=${paths[i]} base=${paths[i]##*/}
    if [ -z "$glob" ]; then
        for (( ; started < ${#paths[@]} && started < i + jobs; started++)); do
            is_done "${paths[started]}" "${names[started]}" "${sizes[started]}" || [ -e "${paths[started]}" ] ||
                { fetch "${paths[started]}" "${sizes[started]}" "$files/${paths[started]##*/}" & pids[started]=$!; }
        done
        [ -z "${pids[i]:-}" ] || wait "${pids[i]}" ||
            code=1 die "$base: $(cat "$scratch/$base.why" 2>/dev/null || echo "the download failed");" \
                "finished files are kept; run this again to resume"
    fi
    if is_done "$f" "${names[i]}" "${sizes[i]:-}"; then
        say "$((i + 1)) of ${#paths[@]}: ${names[i]} is in the shards already"
    else
        say "$((i + 1)) of ${#paths[@]}: ${names[i]}"
        add "$f" "${names[i]}" "${pids[i]:+checked}"
    fi
    [ $delete = 0 ] || rm -f -- "$f"
done
say "done: $manifest"
