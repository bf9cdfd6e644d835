# A stand-in for the Hugging Face hub, for test_data.sh: lists the parquet files of a folder, which are those of
# FineWeb-Edu or in folders REPOSITORY/CONFIG, and redirects to a second server of another name, which has them, with
# ranges. The first request for each file is cut off halfway, and the
# second one for p3.parquet ends with a wrong byte. Neither server must be asked for a file with a token that is not for
# it. Prints the hub's port.
#   hub.py FOLDER [norange] [always-cut] [token=TOKEN]     norange: without ranges; always-cut: every request is cut off
import glob, hashlib, http.server, json, os, sys, threading

folder, modes = sys.argv[1], sys.argv[2:]
token = next((m[6:] for m in modes if m.startswith("token=")), None)
asked = {}


class Handler(http.server.BaseHTTPRequestHandler):
    def answer(self, status, body=b"", headers={}, stop=None):
        self.send_response(status)
        for key in headers:
            self.send_header(key, headers[key])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:stop])

    def log_message(self, *args):
        pass


class Hub(Handler):
    def do_GET(self):
        if self.headers.get("Authorization") != (token and "Bearer " + token):
            return self.answer(401)
        if "/api/" not in self.path:
            name = self.path.removeprefix("/datasets/").replace("/resolve/main/", "/")
            name = name.rsplit("/", 1)[1] if "fineweb" in name else name
            known = os.path.exists(os.path.join(folder, name))
            return self.answer(302 if known else 404, b"", {"Location": f"http://localhost:{store_port}/{name}"})
        asked_for, prefix = self.path.split("/tree/main")[0].removeprefix("/api/datasets/"), "sample/10BT/"
        there = folder if "fineweb" in asked_for else os.path.join(folder, asked_for)
        if there != folder:
            prefix = ""
        if not os.path.isdir(there):
            return self.answer(404)
        tree = []
        for path in sorted(p for p in glob.glob(there + "/**", recursive=True) if os.path.isfile(p)):
            data = open(path, "rb").read()
            lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
            name = prefix + os.path.relpath(path, there)
            tree.append({"type": "file", "path": name, "size": len(data), "lfs": lfs})
        self.answer(200, json.dumps(tree).encode())


class Store(Handler):
    def do_GET(self):
        if "Authorization" in self.headers:
            return self.answer(400)
        name = self.path[1:]
        data = open(os.path.join(folder, name), "rb").read()
        asked[name] = asked.get(name, 0) + 1
        start = 0 if "norange" in modes else int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        part = data[start:]
        if asked[name] == 2 and name == "p3.parquet":
            part = part[:-1] + bytes([part[-1] ^ 1])
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        cut = asked[name] == 1 or "always-cut" in modes
        self.answer(206 if start else 200, part, headers, len(part) // 2 if cut else None)


store = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Store)
store_port = store.server_address[1]
threading.Thread(target=store.serve_forever, daemon=True).start()
hub = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
print(hub.server_address[1], flush=True)
hub.serve_forever()
