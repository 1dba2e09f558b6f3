"""A loopback TCP proxy that holds back every request for some milliseconds: ``python latency.py PORT MILLISECONDS``.

It prints its own port. Answers pass at once, moved inside the kernel, so that the proxy costs next to no CPU time.
Linux.
"""

import fcntl
import os
import socket
import sys
import threading
import time

_PIPE_NBYTES = 1 << 20
_F_SETPIPE_SZ = 1031


def serve(target_port: int, delay_s: float) -> None:
    """Accept connections for ever; one thread a direction."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    print(listener.getsockname()[1], flush=True)
    while True:
        client, _ = listener.accept()
        server = socket.create_connection(("127.0.0.1", target_port))
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_requests, args=(client, server, delay_s), daemon=True).start()
        threading.Thread(target=_answers, args=(server, client), daemon=True).start()


def _requests(client: socket.socket, server: socket.socket, delay_s: float) -> None:
    try:
        while data := client.recv(1 << 16):
            time.sleep(delay_s)
            server.sendall(data)
        server.shutdown(socket.SHUT_WR)
    except OSError:
        # The other side has gone; its own thread ends the connection.
        return


def _answers(server: socket.socket, client: socket.socket) -> None:
    out, into = os.pipe()
    try:
        fcntl.fcntl(into, _F_SETPIPE_SZ, _PIPE_NBYTES)
        while held := os.splice(server.fileno(), into, _PIPE_NBYTES):
            while held:
                held -= os.splice(out, client.fileno(), held)
    except OSError:
        # As above: a client that hangs up is nothing to report.
        return
    finally:
        os.close(out)
        os.close(into)
        client.close()
        server.close()


if __name__ == "__main__":
    serve(int(sys.argv[1]), float(sys.argv[2]) / 1000)
