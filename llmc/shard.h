// Token shards and the manifest beside them: what data/tokenize writes and the data loader reads.
//
// A shard (llm.c's format): 256 little-endian int32 {20240520, 1, number of tokens, 0 ...}, then that many uint16
// tokens. A data set NAME is DIR/NAME_val_000000.bin ..., DIR/NAME_train_000001.bin ..., numbered in the order of the
// token stream, validation first.
//
// DIR/NAME_manifest.json says what the shards are (ours; shards without one are read as GPT-2 tokens and not checksummed):
//   {"format": 1, "vocab": "gpt2" | "bytes", "vocab_size": 50257 | 257, "eot": 50256 | 256,
//    "documents": N, "shards": [{"file": "NAME_val_000000.bin", "tokens": N, "bytes": N, "xxh64": "16 hex digits"}, ...]}
// tokens counts what the shard holds, end-of-text tokens included; bytes is the text behind them (end-of-text counts
// zero), from which a loss in bits per byte follows; xxh64 is XXH64 with seed 0 over the whole file, as `xxhsum` prints it.
#ifndef LLMC_SHARD_H
#define LLMC_SHARD_H

#define SHARD_MAGIC 20240520
#define SHARD_VERSION 1
#define SHARD_HEADER_INTS 256
#define SHARD_HEADER_BYTES (SHARD_HEADER_INTS * 4)

#define BYTES_EOT 256           // the byte-level vocabulary: 256 bytes and end-of-text
#define BYTES_VOCAB_SIZE 257
#define GPT2_EOT 50256
#define GPT2_VOCAB_SIZE 50257

#endif
