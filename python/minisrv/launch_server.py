"""`python -m minisrv.launch_server --model X`, also `minisrv serve X`: run a server."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from minisrv import log
from minisrv.command_line import parse_command_line
from minisrv.config import ServerConfig
from minisrv.console import Console
from minisrv.errors import ConfigError, MinisrvError
from minisrv.supervision.standard_streams import open_standard_streams

if TYPE_CHECKING:
    from minisrv.supervision.supervisor import Supervisor

BACKLOG = 2048


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Serve until a signal or a failure; exit status 0: stopped, 1: failed, 2: wrong option."""
    parser = argparse.ArgumentParser(
        prog=prog or "python -m minisrv.launch_server",
        description="Serve a model over an OpenAI-compatible API.",
        epilog="Each option is also an environment variable: --max-seq-len is MINISRV_MAX_SEQ_LEN.",
    )
    open_standard_streams()
    config, _ = parse_command_line(parser, argv)
    try:
        serve(config)
    except MinisrvError as error:
        sys.stderr.write(f"minisrv: {error.message}\n")
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def serve(config: ServerConfig) -> None:
    """Run the server until SIGINT, SIGTERM or SIGHUP. Raises MinisrvError if it fails.

    After the first signal open requests may end, for up to --drain-timeout; a second one ends
    them at once. During the start the first signal ends the server at once.
    """
    log.setup(
        "supervisor", config.log_level, config.log_format, own_process=True, owner=os.getpid()
    )
    check_certificate(config)
    _check_access(config)
    listeners = listen(config.host, config.port)
    console = Console(config, listeners[0].getsockname()[1])
    # Imported late, so that --help and a port in use are reported at once.
    from minisrv.supervision.supervisor import Supervisor

    supervisor = Supervisor(config, listeners=listeners, on_notice=console.show)
    with _signals_stop(supervisor):
        # Whoever reads this line may send a signal at once.
        console.announce()
        try:
            supervisor.run()
        finally:
            console.close()


def listen(host: str, port: int) -> list[socket.socket]:
    """Sockets that accept connections on `host`:`port`. Raises MinisrvError.

    `::` and `localhost` mean both IPv4 and IPv6, as far as the system has them.
    """
    try:
        if host != "localhost":
            return [_listen(host, port)]
        listeners = [_listen("127.0.0.1", port)]
        with contextlib.suppress(OSError) if port == 0 else _unless_no_ipv6():
            listeners.append(_listen("::1", listeners[0].getsockname()[1]))
        return listeners
    except OSError as error:
        raise MinisrvError(
            f"cannot listen on {host} port {port}: {error.strerror}; "
            "choose another --port (0 picks a free one) or --host"
        ) from error


def _listen(host: str, port: int) -> socket.socket:
    if ":" not in host:
        return socket.create_server((host, port), backlog=BACKLOG)
    both = host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server(
        (host, port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=both
    )


@contextlib.contextmanager
def _unless_no_ipv6() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            raise


def _check_access(config: ServerConfig) -> None:
    """Raise ConfigError for a key or an allowed host that the frontend could not use."""
    if config.api_key or config.api_key_file or config.admin_key is not None:
        from minisrv.frontend.http.access import Keys

        Keys.of(config)
    if config.allowed_host:
        from minisrv.frontend.http.hosts import AllowedHosts

        AllowedHosts(config)


def check_certificate(config: ServerConfig) -> None:
    """Raise ConfigError unless the certificate and its key can be used together."""
    if config.ssl_certfile is None:
        return
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # Without a password here, OpenSSL would ask for that of an encrypted key.
        context.load_cert_chain(config.ssl_certfile, config.ssl_keyfile, password="")
    except OSError as error:
        files = " and ".join(filter(None, (config.ssl_certfile, config.ssl_keyfile)))
        raise ConfigError(f"the certificate in {files} cannot be used: {error.strerror}") from error


@contextlib.contextmanager
def _signals_stop(supervisor: Supervisor) -> Iterator[None]:
    """Have SIGINT, SIGTERM and SIGHUP (a closed terminal) stop the supervisor, even in a wait."""
    signals = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup ignores it
        signals.append(signal.SIGHUP)
    handlers = {number: signal.signal(number, lambda *_: None) for number in signals}
    wake_fd = signal.set_wakeup_fd(supervisor.wake_fd)
    try:
        yield
    finally:
        signal.set_wakeup_fd(wake_fd)
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
