"""One label, by NiceGUI with its own defaults: what the dashboard's first paint is compared with."""

from __future__ import annotations

import asyncio
import socket

import uvicorn
from fastapi import FastAPI
from nicegui import ui


def main() -> None:
    """Serve until ended, and say where."""
    app = FastAPI()

    @ui.page("/")
    def bare() -> None:
        ui.label("11 of 16 updates")

    ui.run_with(app, show_welcome_message=False)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, log_config=None))
        print(f"http://127.0.0.1:{listener.getsockname()[1]}/", flush=True)
        asyncio.run(server.serve(sockets=[listener]))


if __name__ == "__main__":
    main()
