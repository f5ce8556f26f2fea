#!/usr/bin/env bash
# One would guess that the server that `openenv init` makes serves many clients at once: its environment says
# SUPPORTS_CONCURRENT_SESSIONS = True. It takes one session; and a second client is not refused at the handshake: its
# WebSocket opens, and the refusal (CAPACITY_REACHED) is the answer to whatever it says first.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "${server:-}" 2>/dev/null || true; wait 2>/dev/null || true; rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet openenv-core==0.3.0 aiohttp==3.13.2
venv/bin/openenv init echo_env > init.log
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
(cd echo_env && exec ../venv/bin/python -m uvicorn server.app:app --host 127.0.0.1 --port "$port" --log-level warning) &
server=$!

cat > connect.py <<'PYTHON'
import asyncio
import importlib.metadata
import pathlib
import sys

import aiohttp


async def main():
    url = f"http://127.0.0.1:{sys.argv[1]}/ws"
    async with aiohttp.ClientSession() as http:
        for _ in range(600):
            try:
                first = await http.ws_connect(url)
                break
            except aiohttp.ClientConnectionError:
                await asyncio.sleep(0.2)
        await first.send_json({"type": "reset", "data": {}})
        opening = (await first.receive_json())["data"]["observation"]
        second = await http.ws_connect(url)  # the handshake succeeds
        answer = await second.receive_json()
        return opening, answer


opening, answer = asyncio.run(main())
says = "SUPPORTS_CONCURRENT_SESSIONS: bool = True" in pathlib.Path(
    "echo_env/server/echo_env_environment.py"
).read_text()
print("version    openenv-core", importlib.metadata.version("openenv-core"))
print("expected   two clients have a session each; or the second one's handshake fails")
print("seen       first:", opening, "second:", answer)
one = says and answer["type"] == "error" and answer["data"]["code"] == "CAPACITY_REACHED"
print("behaviour  one session, and the second is refused after its handshake" if one else "behaviour  no longer so")
sys.exit(not one)
PYTHON
venv/bin/python connect.py "$port"
