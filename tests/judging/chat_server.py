"""A small OpenAI-compatible server in this process, which says what a test wants it to say."""

import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KEY = "sk-Very-Secret-0123456789"
VARIABLE = "TEST_JUDGE_KEY"


def data_of(request):
    """The JSON object of a question, and its code."""
    text = request["messages"][0]["content"]
    (code,) = set(re.findall(r"^([0-9a-f]{8})$", text, re.MULTILINE))
    return json.loads(text.split(f"\n{code}\n")[1]), code


def answered(request, text=None, **fields):
    """A reply with status 200: what an obedient judge says, or a text."""
    data, code = data_of(request)
    response = data["response"]
    verdict = (
        "refusal"
        if "sorry" in response
        else "evasion"
        if "why do you ask" in response
        else "degenerate"
        if "salad" in response
        else "answered"
    )
    content = f"{code} {verdict}" if text is None else text
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 100, "completion_tokens": 7}
    return 200, {}, {"choices": [choice], "usage": usage, **fields}


class ChatServer:
    """Replies by `script`: (request, its number from 0) -> (status, headers, body).

    The body is an object (sent as JSON), bytes, or an iterator of bytes that are sent one by one.
    """

    def __init__(self):
        self.script = lambda request, number: answered(request)
        self.delay = 0.0
        self.clear()
        self._lock = threading.Lock()

    def clear(self):
        self.requests, self.headers, self.paths, self.times = [], [], [], []
        self.at_once = self.most_at_once = 0

    def reply(self, path, headers, content):
        request = json.loads(content)
        with self._lock:
            number = len(self.requests)
            self.requests.append(request)
            self.headers.append(headers)
            self.paths.append(path)
            self.times.append(time.monotonic())
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self.delay)
        try:
            return self.script(request, number)
        finally:
            with self._lock:
                self.at_once -= 1


@contextmanager
def chat_server():
    """A server on a free port; `url` is its base address."""
    chat = ChatServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.do_POST()

        def do_POST(self):
            content = self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"null"
            status, headers, body = chat.reply(self.path, dict(self.headers), content)
            parts = body
            if not hasattr(body, "__next__"):
                parts = [body if isinstance(body, bytes) else json.dumps(body).encode()]
                headers = {"Content-Length": str(len(parts[0])), **headers}
            try:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Connection", "close")
                    self.close_connection = True
                self.end_headers()
                for part in parts:
                    self.wfile.write(part)
                    self.wfile.flush()
            except OSError:
                self.close_connection = True  # the client left

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            pass

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    chat.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield chat
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
