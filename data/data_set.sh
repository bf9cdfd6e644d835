# What the scripts that make data sets share. They source it, with $program and $here, their name and folder, set.

die() { echo "$program: $*" >&2; exit "${code:-2}"; }
say() { echo "$program: $*" >&2; }

tokenize=${TOKENIZE:-$here/tokenize}
bytes=0 vocab='' threads=''

# Takes a flag of tokenize's and its value, into bytes, vocab, threads, shard_size, val_tokens.
tokenize_flag() {   # FLAG [VALUE]
    case $1 in
    --bytes) bytes=1; return ;;
    --vocab) vocab=$2; return ;;
    esac
    [[ $2 =~ ^[0-9]{1,15}$ ]] || die "$1 $2: not a whole number"
    local name=${1#--}
    printf -v "${name//-/_}" %d "$((10#$2))"
}

# Checks that a data set which exists was made with the same flags.
check_existing() {      # MANIFEST
    [ -e "$1" ] || return 0
    field() { sed -n "s/^  \"$2\": \"*\([a-z0-9]*\)\"*,\$/\1/p" "$1" | head -n 1; }
    local made_bytes=0 made_size made_val flags
    made_size=$(field "$1" shard_size) made_val=$(field "$1" val_tokens) flags=" and GPT-2's vocabulary"
    [ -n "$made_size" ] && [ -n "$made_val" ] || die "$1: damaged, or not a manifest; delete this set and make it again"
    if [ "$(field "$1" vocab)" = bytes ]; then made_bytes=1 flags=' --bytes'; fi
    [ "$made_bytes $made_size $made_val" = "$bytes $shard_size $val_tokens" ] ||
        die "$1: this set was made with --shard-size $made_size --val-tokens $made_val$flags;" \
            "give the same flags, or another --out"
}

# Fills pass, tokenize's arguments. Without --bytes and --vocab it gets GPT-2's vocabulary.
tokenize_arguments() {
    pass=(--shard-size "$shard_size" --val-tokens "$val_tokens")
    [ -z "$threads" ] || pass+=(--threads "$threads")
    if [ $bytes = 1 ]; then pass+=(--bytes); return; fi
    if [ -z "$vocab" ]; then
        vocab=$here/gpt2.tiktoken
        "$here/gpt2_vocab.sh" >/dev/null || exit
    fi
    pass+=(--vocab "$vocab")
}
