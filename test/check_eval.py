#!/usr/bin/env python3
"""Compares what eval_t6 wrote with lm-evaluation-harness.

    test/check_eval.py EXPECTED LOG SCORES SHOTS CONTEXT [TOLERANCE]

EXPECTED: a folder of the harness's TASK_SHOTSshot.json and summary.json, or one .jsonl.gz of them. LOG and SCORES:
files of --log and --json. TOLERANCE: of a log-likelihood, per continuation token (2e-4). Above 1e-3, for a program in
bf16, another choice is right too where the harness's lead is within the tolerance, and such tasks' scores are not
compared. Prints a line per task, and ends with "N passed, N failed"."""
import gzip
import json
import pathlib
import sys


def read_expected(path):
    """The harness's files by name, without .json."""
    if path.is_dir():
        return {f.stem: json.loads(f.read_text()) for f in path.glob("*.json")}
    with gzip.open(path, "rt") as lines:
        return {file["file"]: file["content"] for file in map(json.loads, lines)}


def lengths(choices, metric):
    """What a metric divides log-likelihoods by."""
    return [{"acc": 1, "norm": len(c), "bytes": len(c.encode())}[metric] for c in choices]


def prediction(loglikelihoods, length):
    """The choice that a metric takes: the first of the largest."""
    values = [ll / n if n else float("-inf") for ll, n in zip(loglikelihoods, length)]
    return values.index(max(values))


class Comparison:
    def __init__(self, tolerance):
        self.tolerance, self.worst, self.errors, self.requests = tolerance, 0, [], 0
        self.exact, self.turned = tolerance < 1e-3, 0

    def same(self, what, got, want):
        if got != want:
            self.errors.append(f"{what}: {got} instead of {want}")

    def item(self, item, requests, context):
        run, where = item["runs"][context], f"doc {item['doc_id']}"
        self.same(f"{where}: choices", len(requests), len(item["requests"]))
        for i, (request, want) in enumerate(zip(requests, item["requests"])):
            at = f"{where}, choice {i}"
            for key in "context_tokens", "continuation_tokens":
                self.same(f"{at}: {key}", request[key], want.get(key) or item[key])
            self.same(f"{at}: few-shot rows", request["fewshot"], item.get("fewshot", []))
            self.same(f"{at}: gold", request["gold"], item["gold"])
            self.same(f"{at}: context_used", request["context_used"], run["context_used"][i])
            if self.exact:
                self.same(f"{at}: is_greedy", request["is_greedy"], run["is_greedy"][i])
            difference = abs(request["loglikelihood"] - run["loglikelihood"][i]) / len(request["continuation_tokens"])
            self.worst = max(self.worst, difference)
            if not difference <= self.tolerance:
                self.errors.append(f"{at}: log-likelihood {request['loglikelihood']}, not {run['loglikelihood'][i]}")
            self.requests += 1
        for metric in "acc", "norm", "bytes":
            if f"pred_{metric}" in run:
                self.choice(f"{where}: choice by {metric}", requests, run, lengths(item["choices"], metric),
                            run[f"pred_{metric}"])

    def choice(self, what, requests, run, length, want):
        got = prediction([r["loglikelihood"] for r in requests], length)
        if got != want and not self.exact and length[got]:
            lead = run["loglikelihood"][want] / length[want] - run["loglikelihood"][got] / length[got]
            allowed = sum(self.tolerance * len(requests[i]["continuation_tokens"]) / length[i] for i in (want, got))
            self.turned += lead <= allowed
            if lead <= allowed:
                return
        self.same(what, got, want)


def main():
    expected = read_expected(pathlib.Path(sys.argv[1]))
    shots, context = sys.argv[4], sys.argv[5]
    tolerance = float(sys.argv[6]) if len(sys.argv) > 6 else 2e-4
    log = [json.loads(line) for line in open(sys.argv[2])]
    scores = json.load(open(sys.argv[3]))["scores"]
    passed = failed = 0
    documents = {}
    for request in log:
        documents.setdefault(request["task"], {}).setdefault(request["doc_id"], []).append(request)
    turned = set()
    for task in sorted(documents):
        c = Comparison(tolerance)
        want = expected[f"{task}_{shots}shot"]
        c.same("documents", len(documents[task]), len(want["items"]))
        for item in want["items"]:
            c.item(item, documents[task].get(item["doc_id"], []), context)
        if c.turned:
            turned |= {task} | ({name for name in scores if name.startswith("mmlu")} if task[:4] == "mmlu" else set())
        close = f", {c.turned} close choices differ" if c.turned else ""
        failed += bool(c.errors)
        passed += not c.errors
        print(f"{'FAIL' if c.errors else 'ok  '} {task}, {shots}-shot, context {context}: {c.requests} requests, "
              f"log-likelihoods within {c.worst:.1e} per token{close}; {'; '.join(c.errors[:3])}")
    wrong = []
    subjects = {name for name in documents if name.startswith("mmlu_")}
    if subjects < {file.rsplit("_", 1)[0] for file in expected if file.startswith("mmlu_")}:     # groups of fewer rows
        scores = {task: scores[task] for task in scores if task in documents}
    scores = {task: scores[task] for task in scores if task not in turned}
    for task, score in scores.items():
        want = expected["summary"]["scores"][task][f"{shots}shot"][context]
        wrong += [f"{task}: {sorted(score)} instead of {sorted(want)}"] if set(score) != set(want) else [
            f"{task} {key}: {score[key]} instead of {want[key]}" for key in want
            if score[key] != want[key] and not (isinstance(score[key], float) and abs(score[key] - want[key]) < 1e-9)]
    passed, failed = passed + (not wrong and bool(scores)), failed + bool(wrong or not scores)
    result = "FAIL" if wrong or not scores else "ok  "
    print(f"{result} {len(scores)} scores and standard errors; {'; '.join(wrong[:3])}")
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


main()
