# A stand-in for the Hugging Face hub, for test_data.sh: lists the parquet files of a folder and serves them, with
# ranges. The first request for each file is cut off halfway, and the second one for p3.parquet ends with a wrong byte.
# Prints its port.
import hashlib, http.server, json, os, sys

folder = sys.argv[1]
asked = {}


class Hub(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if "/api/" in self.path:
            tree = []
            for f in sorted(os.listdir(folder)):
                data = open(os.path.join(folder, f), "rb").read()
                lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data)}
                tree.append({"type": "file", "path": "sample/10BT/" + f, "size": len(data), "lfs": lfs})
            return self.answer(200, json.dumps(tree).encode(), {}, None)
        name = self.path.rsplit("/", 1)[1]
        data = open(os.path.join(folder, name), "rb").read()
        asked[name] = asked.get(name, 0) + 1
        start = int(self.headers.get("Range", "bytes=0-")[6:].split("-")[0])
        part = data[start:]
        if asked[name] == 2 and name == "p3.parquet":
            part = part[:-1] + bytes([part[-1] ^ 1])
        headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {}
        self.answer(206 if start else 200, part, headers, len(part) // 2 if asked[name] == 1 else None)

    def answer(self, status, body, headers, stop):
        self.send_response(status)
        for key in headers:
            self.send_header(key, headers[key])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:stop])

    def log_message(self, *args):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
print(server.server_address[1], flush=True)
server.serve_forever()
