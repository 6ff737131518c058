"""A platform that behaves as its URL says; for tests.

    python3 receiver.py DIRECTORY [SECRET [CERTIFICATE]]

Listens on a port of its choice, which it writes to DIRECTORY/port, and appends to DIRECTORY/requests a line of JSON for each request
that it has read: that file is the truth about what arrived. While there is a file DIRECTORY/down it answers 500 to everything.
With CERTIFICATE, a file with a certificate and its key, it speaks TLS.

    /ok  /status/N  /retry-after/N/SECONDS  /json/TEXT  /delay/SECONDS  /first/N (500 to the first N requests of a webhook-id)
    /drip (a byte at a time, without end)  /reset  /close (in the middle of the answer)  /huge  /headers  /header (one without end)  /crawl (headers, a byte at a time)  /bytes  /redirect
    /echo/N (N bytes, then the header Authorization)  /escaped (the same as JSON, with slashes escaped)  /unicode (... with all characters escaped)  /deep/N (N arrays in each other)  /picky (500 to the task "bad")
    /numbers/N (an array of N)  /poison (no jsonb to the task "bad")  /held/STATUS/NAME (answers when there is a file DIRECTORY/NAME)
    /stops/STATUS/NAME (answers when there is none)
    /chaos/SEED (while there is a file DIRECTORY/chaos any of these, at random)
"""
import asyncio, base64, hashlib, hmac, json, os, random, socket, ssl, struct, sys, time, urllib.parse

directory, secret, certificate = (sys.argv[1:] + [None, None])[:3]
seen = {}
under_way = {}
rolls = {}
CHAOS = ["/ok", "/ok", "/ok", "/status/500", "/status/404", "/status/302", "/status/401", "/retry-after/429/1", "/retry-after/503/1", "/json/nonsense",
         "/delay/0.05", "/delay/5", "/drip", "/reset", "/close", "/huge", "/headers", "/header", "/bytes", "/deep/30000"]
log = open(os.path.join(directory, "requests"), "a", buffering=1)


def signed(headers, body):
    if not secret or "webhook-signature" not in headers:
        return None
    key = base64.b64decode(secret[6:]) if secret.startswith("whsec_") else secret.encode()
    text = b".".join([headers["webhook-id"].encode(), headers["webhook-timestamp"].encode(), body])
    expected = "v1," + base64.b64encode(hmac.new(key, text, hashlib.sha256).digest()).decode()
    return expected in headers["webhook-signature"].split(" ")


async def answer(writer, status, body=b"{}", headers=""):
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{headers}\r\n".encode() + body)
    await writer.drain()


async def behave(path, number, headers, body, reader, writer):
    word, *rest = path.strip("/").split("/")
    if os.path.exists(os.path.join(directory, "down")):
        await answer(writer, 500)
    elif word == "chaos":
        rolls.setdefault(rest[0], random.Random(rest[0]))
        chaos = os.path.exists(os.path.join(directory, "chaos"))
        await behave(rolls[rest[0]].choice(CHAOS) if chaos else "/ok", number, headers, body, reader, writer)
    elif word == "echo":
        await answer(writer, 200, ("x" * int(rest[0]) + headers["authorization"]).encode())
    elif word == "escaped":
        await answer(writer, 200, json.dumps(headers["authorization"]).replace("/", "\\/").encode())
    elif word == "unicode":
        await answer(writer, 200, ('"' + "".join("\\u%04X" % ord(c) for c in headers["authorization"]) + '"').encode())
    elif word == "status":
        await answer(writer, int(rest[0]))
    elif word == "retry-after":
        await answer(writer, int(rest[0]), headers=f"Retry-After: {rest[1]}\r\n")
    elif word == "json":
        await answer(writer, 200, urllib.parse.unquote(rest[0]).encode())
    elif word == "delay":
        await asyncio.sleep(float(rest[0]))  # -- slow handler
        await answer(writer, 200)
    elif word in ("held", "stops"):
        while os.path.exists(os.path.join(directory, rest[1])) == (word == "stops"):
            await asyncio.sleep(0.01)  # -- slow handler
        await answer(writer, int(rest[0]))
    elif word == "first":
        await answer(writer, 500 if number <= int(rest[0]) else 200)
    elif word == "deep":
        await answer(writer, 200, b"[" * int(rest[0]) + b"]" * int(rest[0]))
    elif word == "picky":
        await answer(writer, 500 if b'"task_key" : "bad"' in body else 200)
    elif word == "numbers":
        await answer(writer, 200, json.dumps(list(range(int(rest[0])))).encode())
    elif word == "poison":
        await answer(writer, 200, b'{"code": "\\u0000"}' if b'"task_key" : "bad"' in body else b'{"code": 0}')
    elif word == "redirect":
        await answer(writer, 302, headers="Location: /ok\r\n")
    elif word == "bytes":
        await answer(writer, 200, b"a\x00b\xff\xfe\xc3(\xf0\x9f\x98")
    elif word == "drip":
        writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 1000000\r\n\r\n")
        while True:
            writer.write(b"x")
            await writer.drain()
            await asyncio.sleep(0.05)  # -- slow handler
    elif word == "huge":
        writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 10000000000\r\n\r\n")
        while True:
            writer.write(b"x" * 65536)
            await writer.drain()
    elif word == "headers":
        writer.write(b"HTTP/1.1 200 X\r\n")
        while True:
            writer.write(b"X-Header: " + b"y" * 1000 + b"\r\n")
            await writer.drain()
    elif word == "header":
        writer.write(b"HTTP/1.1 200 X\r\nX-Header: ")
        while True:
            writer.write(b"y" * 1000)
            await writer.drain()
    elif word == "crawl":
        writer.write(b"HTTP/1.1 200 X\r\nX-Header: ")
        while True:
            writer.write(b"y")
            await writer.drain()
            await asyncio.sleep(0.05)  # -- slow handler
    elif word == "close":
        writer.write(b"HTTP/1.1 200 X\r\nContent-Length: 100\r\n\r\nhalf")
        await writer.drain()
        writer.close()
    elif word == "reset":
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.close()
    else:
        await answer(writer, 200)


async def serve(reader, writer):
    try:
        while True:
            first = await reader.readexactly(1)
            if first == b"\x16":        # TLS, which we do not speak
                writer.write(b"HTTP/1.1 400 X\r\n\r\n")
                break
            head = (first + await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            method, path, _ = head[0].split(" ", 2)
            headers = {k.lower(): v.strip() for k, v in (line.split(":", 1) for line in head[1:] if ":" in line)}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            key = headers.get("webhook-id", "")
            seen[key] = seen.get(key, 0) + 1
            under_way[path] = under_way.get(path, 0) + 1
            log.write(json.dumps({"at": time.time(), "method": method, "path": path, "id": key, "sequence": headers.get("webhook-sequence"),
                                  "under_way": under_way[path], "signed": signed(headers, body), "headers": headers, "body": body.decode("utf-8", "replace")}) + "\n")
            try:
                await behave(path, seen[key], headers, body, reader, writer)
            finally:
                under_way[path] -= 1
    except (asyncio.IncompleteReadError, ConnectionError):
        pass
    finally:
        writer.close()


async def main():
    tls = None
    if certificate:
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(certificate)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 22, backlog=1000, ssl=tls)
    with open(os.path.join(directory, "port.new"), "w") as f:
        f.write(str(server.sockets[0].getsockname()[1]))
    os.rename(os.path.join(directory, "port.new"), os.path.join(directory, "port"))
    await server.serve_forever()

asyncio.run(main())
