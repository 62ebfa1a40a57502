"""A headless Chromium, driven by its own protocol over a pipe: no package is needed."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time

BINARY = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """A page, with all that its console said in ``errors``."""

    def __init__(self, profile):
        ends = [theirs, self._out, self._in, ours] = [*os.pipe(), *os.pipe()]
        # Above those that the shell is to make of them.
        theirs, ours = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (theirs, ours))
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe",
                 f"--user-data-dir={profile}", "--window-size=1280,900", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]  # fmt: skip
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{theirs} 4>&{ours}', BINARY, *flags, "about:blank"]
        self._process = subprocess.Popen(
            command, pass_fds=(theirs, ours), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for end in (ends[0], ends[3], theirs, ours):
            os.close(end)
        self._number, self._rest, self._session, self.errors, self.requests = 0, b"", None, [], []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **parameters):
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            found = self._read()
            if found.get("id") == self._number:
                assert "error" not in found, found
                return found["result"]

    def _read(self):
        while b"\0" not in self._rest:
            more = os.read(self._in, 2**20)
            assert more, "the browser has ended"
            self._rest += more
        message, self._rest = self._rest.split(b"\0", 1)
        found = json.loads(message)
        self._note(found.get("method"), found.get("params", {}))
        return found

    def _note(self, method, said):
        if method == "Runtime.exceptionThrown":
            self.errors.append(said["exceptionDetails"])
        elif method == "Log.entryAdded" and said["entry"]["level"] in ("error", "warning"):
            self.errors.append(said["entry"])
        elif method == "Runtime.consoleAPICalled" and said["type"] in ("error", "warning"):
            self.errors.append(said)
        elif method == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])

    def open(self, place):
        """A file, or an address on this machine."""
        self.call("Page.navigate", url=place if isinstance(place, str) else place.resolve().as_uri())
        for _ in range(300):
            if self.run("document.readyState") == "complete":
                return
            time.sleep(0.1)
        raise AssertionError("the page did not load")

    def run(self, script):
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def key(self, key):
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, **(text if kind == "keyDown" else {}))

    def hover(self, selector):
        where = self.run(
            f"(() => {{ const r = document.querySelector({selector!r}).getClientRects()[0]; return [r.x + r.width / 2, r.y + r.height / 2]; }})()"
        )
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=where[0], y=where[1])

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        self._process.terminate()
        self._process.wait(20)
        os.close(self._in), os.close(self._out)
