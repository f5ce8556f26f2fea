#!/usr/bin/env bash
# One would guess that POST /step on an OpenEnv server goes on with what POST /reset began, as /reset, /step and /state
# read. Each request makes an environment of its own: a step answers one that was never reset (or raises), and /state
# tells of a third. Only the WebSocket at /ws is a session.
set -euo pipefail
folder=$(mktemp -d)
trap 'kill "${server:-}" 2>/dev/null || true; wait 2>/dev/null || true; rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet openenv==0.10.0
venv/bin/openenv init echo_env > init.log
port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
(cd echo_env && exec ../venv/bin/python -m uvicorn server.app:app --host 127.0.0.1 --port "$port" --log-level warning) &
server=$!

cat > ask.py <<'PYTHON'
import importlib.metadata
import json
import sys
import time
import urllib.request

url = f"http://127.0.0.1:{sys.argv[1]}"


def ask(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request, timeout=60))


for _ in range(600):
    try:
        ask("/health")
        break
    except OSError:
        time.sleep(0.2)
ask("/reset", {"seed": 1, "episode_id": "mine"})
steps = [ask("/step", {"action": {"message": text}}) for text in ("one", "two")]
states = [ask("/state") for _ in range(2)]
print("version    openenv", importlib.metadata.version("openenv"))
print("expected   after a reset as episode 'mine' and two steps, /state says 'mine' and step_count 2")
print("seen      ", *states, "and of the second step", steps[1].get("metadata"))
counts = [state["step_count"] for state in states]
forgets = "mine" not in [state["episode_id"] for state in states] and counts == [0, 0]
print("behaviour  every request has an environment of its own" if forgets else "behaviour  no longer so")
sys.exit(not forgets)
PYTHON
venv/bin/python ask.py "$port"
