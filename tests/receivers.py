"""A real mail server and web server on the loopback, which keep the messages they get."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email import message_from_bytes, policy
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session


class MailServer:
    """``received``: recipients and mail of each message."""

    def __init__(self) -> None:
        self.received: list[tuple[list[str], EmailMessage]] = []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.controller = Controller(self, hostname="127.0.0.1", port=port)

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:
        """What the library calls when a message has arrived."""
        mail: Any = message_from_bytes(envelope.content, policy=policy.default)  # type: ignore[arg-type]
        self.received.append((envelope.rcpt_tos, mail))
        return "250 kept"

    @property
    def connection(self) -> str:
        """Airflow's connection ``smtp_default``, as an environment variable holds it."""
        options = {"disable_ssl": True, "disable_tls": True, "from_email": "airflow@example.org"}
        port = self.controller.port
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
    mail = MailServer()
    mail.controller.start()
    try:
        with WebServer() as web:
            threading.Thread(target=web.serve_forever, daemon=True).start()
            yield mail, web
            web.shutdown()
    finally:
        mail.controller.stop()


def settings_of(mail: MailServer, web: WebServer, to: str = "ann@example.org") -> dict[str, str]:
    """The environment by which Airflow sends both ways, as if they were set up in its UI."""
    return {
        "AIRFLOW_VAR_FAST_CPT_MAIL_TO": to,
        "AIRFLOW_CONN_SMTP_DEFAULT": mail.connection,
        "AIRFLOW_CONN_FAST_CPT_WEBHOOK": web.connection,
    }
