"""A real mail server and web server on the loopback, which keep the messages they get."""

from __future__ import annotations

import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Conversation(socketserver.StreamRequestHandler):
    """SMTP (RFC 5321) as far as one mail without extensions needs it."""

    server: MailServer

    def handle(self) -> None:
        self.say(220)
        recipients: list[str] = []
        while line := self.rfile.readline():
            command = line[:4].upper()
            if command == b"QUIT":
                return self.say(221)
            if command == b"RCPT":
                recipients.append(line.decode().partition("<")[2].partition(">")[0])
            if command == b"DATA":
                self.say(354)
                self.server.received.append((recipients, self.mail()))
            self.say(250 if command in (b"EHLO", b"MAIL", b"RCPT", b"DATA", b"RSET") else 502)
        return None

    def mail(self) -> EmailMessage:
        lines: list[bytes] = []
        while (line := self.rfile.readline()) != b".\r\n":
            lines.append(line[1:] if line.startswith(b"..") else line)
        return message_from_bytes(b"".join(lines), policy=policy.default)  # type: ignore[return-value]

    def say(self, code: int) -> None:
        self.wfile.write(b"%d here\r\n" % code)


class MailServer(socketserver.ThreadingTCPServer):
    """``received``: recipients and mail of each message."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Conversation)
        self.received: list[tuple[list[str], EmailMessage]] = []

    @property
    def connection(self) -> str:
        """Airflow's connection ``smtp_default``, as an environment variable holds it."""
        options = {"disable_ssl": True, "disable_tls": True, "from_email": "airflow@example.org"}
        port = self.server_address[1]
        return json.dumps(
            {"conn_type": "smtp", "host": "127.0.0.1", "port": port, "extra": options}
        )


class _Post(BaseHTTPRequestHandler):
    server: WebServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append(json.loads(body))
        self.send_response(self.server.answer)
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


class WebServer(ThreadingHTTPServer):
    """``received``: the JSON of each request; ``answer`` is the status it gives."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Post)
        self.received: list[dict[str, Any]] = []
        self.answer = 200

    @property
    def connection(self) -> str:
        """Airflow's connection ``fast_cpt_webhook``, as an environment variable holds it."""
        url = f"http://127.0.0.1:{self.server_address[1]}/services/T0/secret"
        return json.dumps({"conn_type": "webhook", "password": url})


@contextmanager
def receivers() -> Iterator[tuple[MailServer, WebServer]]:
    """Both of them, listening."""
    with MailServer() as mail, WebServer() as web:
        for server in (mail, web):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        yield mail, web
        for server in (mail, web):
            server.shutdown()
