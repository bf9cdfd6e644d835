# What the scripts that download from the Hugging Face hub share: the hub's address and token, DuckDB, checksums,
# downloads. They source it after data_set.sh, with $scratch set to an empty folder before any function is called.

url=${HF_ENDPOINT:-https://huggingface.co}
url=${url%/}
token=${HF_TOKEN:-}
unset HF_TOKEN      # the programs that this script starts need not know it
[[ $token =~ ^[A-Za-z0-9._~+/=-]*$ ]] || die "HF_TOKEN: not a token; it may have letters, digits and ._~+/=- only"
[[ -z $token || $url =~ ^(https://|http://(localhost|127\.0\.0\.1)(:|/|$)) ]] ||
    die "HF_ENDPOINT $url: HF_TOKEN is sent to https:// only; unset it, or name such an address"

# ----------------------------------------------------------------------------------------------------------------------
# DuckDB: $DUCKDB, or the installed program, or one that pip or DuckDB's installer gets now

find_duckdb() {
    local d
    for d in "$(type -P duckdb || true)" "${HOME:-}/.duckdb/cli/latest/duckdb" "$here/duckdb/duckdb"; do
        [ -n "$d" ] && "$d" -version >/dev/null 2>&1 && { realpath "$d"; return; }
    done
    return 1
}

# The package is a zip archive with the program in it. It goes to data/duckdb.
install_from_package() {    # PIP...
    local found
    "$@" --version >/dev/null 2>&1 || return 1
    rm -rf "$scratch/package"
    "$@" download --quiet --no-deps --only-binary :all: --dest "$scratch/package" duckdb-cli >/dev/null 2>&1 ||
        return 1
    unzip -qo "$scratch"/package/*.whl -d "$scratch/package" 2>/dev/null ||
        python3 -m zipfile -e "$scratch"/package/*.whl "$scratch/package" 2>/dev/null || return 1
    found=$(find "$scratch/package" -type f -name duckdb | head -n 1)
    [ -n "$found" ] && chmod +x "$found" && mkdir -p "$here/duckdb" 2>/dev/null || return 1
    cp "$found" "$here/duckdb/duckdb.$$" && mv "$here/duckdb/duckdb.$$" "$here/duckdb/duckdb"
}

install_duckdb() {
    say "getting DuckDB's command-line program"
    install_from_package python3 -m pip || install_from_package pip3 || install_from_package pip ||
        curl -fsSL --connect-timeout 10 https://install.duckdb.org 2>/dev/null | sh >/dev/null 2>&1
}

# Sets duckdb to the program.
need_duckdb() {
    if [ -n "${DUCKDB:-}" ]; then
        duckdb=$(type -P "$DUCKDB") && "$duckdb" -version >/dev/null 2>&1 ||
            die "DUCKDB=$DUCKDB: this program does not run"
        duckdb=$(realpath "$duckdb")
    else
        duckdb=$(find_duckdb) || { install_duckdb || true; duckdb=$(find_duckdb); } ||
            code=1 die "DuckDB's command-line program is missing, and neither pip (duckdb-cli) nor install.duckdb.org" \
                "has it; install it, or set DUCKDB to its path"
    fi
}

run_duckdb() { (cd "$scratch" && exec "$duckdb" -init /dev/null "$@"); }

# Runs one statement and prints values as a|b. An error is one line that names FILE.
query() {   # FILE SQL
    run_duckdb -noheader -list -c "$2" 2>"$scratch/error" || die "$1: DuckDB: $(head -n 1 "$scratch/error")"
}

# ----------------------------------------------------------------------------------------------------------------------
# Checksums

# The file's SHA-256 in the SHA256SUMS of its folder, in any form that sha256sum reads or writes; nothing if it is not
# listed.
sha256_listed() {   # FILE
    local sums folder found
    folder=$(dirname -- "$1")
    sums=$folder/SHA256SUMS
    [ -e "$sums" ] || return 0
    found=$(name=${1##*/} folder=${folder%/} LC_ALL=C awk '
        { sub(/\r$/, ""); sum = file = "" }
        NR == 1 { sub(/^\357\273\277/, "") }
        /^SHA256 \(.*\) = [0-9A-Fa-f]+$/ {
            sum = $NF; file = $0
            sub(/^SHA256 \(/, "", file); sub(/\) = [0-9A-Fa-f]+$/, "", file)
        }
        sum == "" {
            escaped = sub(/^\\/, "")
            sum = $1; file = $0
            sub(/^[^ \t]+[ \t]+\*?/, "", file)
            if (escaped) gsub(/\\\\/, "\\", file)
        }
        {
            if (index(file, ENVIRON["folder"] "/") == 1) file = substr(file, length(ENVIRON["folder"]) + 2)
            while (sub(/^\.\/+/, "", file)) continue
            if (file == ENVIRON["name"]) print tolower(sum)
        }' "$sums" | sort -u)
    [[ $found =~ ^([0-9a-f]{64})?$ ]] ||
        die "$sums: lists ${1##*/} with two different sums, or with one that is not a SHA-256"
    [ -n "$found" ] || [ -z "${glob:-}" ] || say "note: $sums does not list ${1##*/}"
    printf %s "$found"
}

has_sha256() { [ "$(sha256sum <"$1" | cut -d ' ' -f 1)" = "$2" ]; }     # FILE WANTED

# ----------------------------------------------------------------------------------------------------------------------
# Downloads

# Prints the HTTP code. The token reaches curl on its standard input, where no list of processes shows it, and curl
# sends it to the hub only, not to where the hub redirects.
from_hub() {    # ADDRESS FILE [CURL'S FLAGS]; curl's error goes to the file scratch/FILE.error
    if [ -n "$token" ]; then printf 'header = "Authorization: Bearer %s"\n' "$token"; fi |
        curl -K - -fsSL --connect-timeout 20 --speed-limit 1 --speed-time 60 "${@:3}" -w '%{http_code}' -o "$2" "$1" \
            2>"$scratch/${2##*/}.error"
}
refusal() {     # HTTP-CODE: what to say to 401, 403, ...
    case $1 in
    401 | 403) echo "$url answers $1: $([ -n "$token" ] && echo "it refuses HF_TOKEN" || echo "set HF_TOKEN")" ;;
    *) echo "$url answers $1" ;;
    esac
}

# Downloads one file, resuming an earlier try, and tries again, with growing waits, as long as five tries in a row have
# not brought more of it. The file gets its name once its size and checksum are right. If it fails, the reason is in the
# file scratch/NAME.why.
fetch() {   # FILE BYTES ADDRESS
    local part=$1.part base=${1##*/} have best=-1 tries=0 http rc why
    size() { stat -c %s "$part" 2>/dev/null || echo 0; }
    while :; do
        have=$(size) rc=0 why=''
        if [ "$have" -gt "$2" ]; then rm -f "$part"; have=0; fi
        if [ "$have" -lt "$2" ]; then
            http=$(from_hub "$3" "$part" --retry 2 -C -) || rc=$?
            have=$(size)
        fi
        if [ "$have" = "$2" ]; then
            if has_sha256 "$part" "$(sha256_listed "$1")"; then mv "$part" "$1"; return; fi
            rm -f "$part"
            why="damaged: its SHA-256 is not the hub's"
        elif [ $rc = 0 ] || [ "$have" -gt "$2" ]; then
            rm -f "$part"
            why="$have bytes came instead of $2"
        elif [ $rc = 33 ] || [ "$http" = 416 ]; then    # the server cannot send the rest of a file
            rm -f "$part"
            why="the server cannot resume, so it starts anew"
        elif [ $rc = 22 ] && [[ $http = 4* && $http != 408 && $http != 429 ]]; then
            refusal "$http" >"$scratch/$base.why"
            return 1
        else
            why="the download stopped at $have of $2 bytes ($(head -n 1 "$scratch/$base.part.error"))"
        fi
        if [ "$have" -gt "$best" ]; then best=$have tries=0; fi
        tries=$((tries + 1))
        [ $tries -le 5 ] || { echo "$why" >"$scratch/$base.why"; return 1; }
        say "$base: $why; trying again"
        [ $rc = 33 ] || sleep $((1 << (tries - 1)))
    done
}
