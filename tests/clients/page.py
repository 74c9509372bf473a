#!/usr/bin/env python3
"""The page of the server in Chromium: searched, chatted, compared, uploaded to, by mouse and by keyboard, wide and narrow.

usage: page.py URL CHROMIUM ADAPTER_FOLDER [SCREENSHOT_FOLDER]

The server at URL takes uploads and has the adapters `yes-no` and `tenant/bone` of check.py; ADAPTER_FOLDER is the folder of `yes-no`. What no small
model does in time (thousands of adapters, names and answers that look like HTML, long answers, errors in their midst, keys, no uploads) is done by a
stand-in that serves the same page. Needs `playwright`. Ends with an error where something is not as it should be.
"""
import contextlib, http.server, json, pathlib, re, sys, tempfile, threading, time, urllib.parse, urllib.request, uuid

from playwright.sync_api import expect, sync_playwright

HOSTILE = "<img src=x onerror=alert(1)>"
MANY = 5000
NEEDED = ["adapter_config.json", "adapter_model.safetensors", "lorimer.json"]
LAUNCH = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


class StandIn(http.server.BaseHTTPRequestHandler):
    """The page, and calls that behave as seldom seen. The chat streams 300 words; its names: `fails`, `breaks`."""

    protocol_version = "HTTP/1.1"
    page, policy, asked, gone, uploads, received = b"", "", [], [], False, []
    error = staticmethod(lambda message: {"error": {"message": message, "code": "some"}})

    def log_message(self, *_):
        pass

    def send(self, body, status=200, kind="application/json", **more):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(body), **more}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        if self.path == "/":
            return self.send(self.page, kind="text/html; charset=utf-8", **{"Content-Security-Policy": self.policy})
        if self.headers["Authorization"] not in ("Bearer secret", "Bearer boss"):
            return self.send(self.error("the API key is needed, says the stand-in"), 401)
        if self.path == "/v1/adapters":
            unread = dict(method=None, rank=None, host_bytes=0, conversion_error=None)
            names = [HOSTILE, "fails", "breaks", *(f"many/adapter-{i:04}" for i in range(MANY - 3))]
            adapters = [{"name": name, **unread} for name in names]
            adapters[0] = {"name": HOSTILE, "method": HOSTILE, "rank": 64, "host_bytes": 1_234_567, "conversion_error": 0.0321}
            return self.send({"base": "a-base", "adapters": adapters})
        engine = dict(running=3, waiting=1, pages=1000, free_pages=400, adapter_pages=200, cached_pages=100, generated_tokens=int(time.time() * 50))
        figures = {"engine": engine, "first_token": {"sum": 1.5, "counts": [1, 2, 0]}}
        self.send({"figures": figures, "host_adapter_bytes": 2_500_000, "host_adapters": 7, "stopping": False, "uploads": self.uploads, "problems": []})

    def do_POST(self):
        if "/upload" in self.path:
            # Slow enough that its progress is seen.
            body, rest = b"", int(self.headers["Content-Length"])
            while rest and (some := self.rfile.read(min(rest, 1 << 20))):
                body, rest = body + some, rest - len(some)
                time.sleep(0.05)
            if rest:
                self.close_connection = True
                return self.gone.append(self.path)
            self.received.append((self.path, self.headers["Authorization"], body))
            return self.send(self.error(f"refused, says the stand-in, {HOSTILE}"), 422)
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(asked)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        event = lambda what: f"data: {json.dumps(what, ensure_ascii=False)}\n\n".encode()
        try:
            for i in range(300):
                if i == 3 and asked["model"] == "fails":
                    self.wfile.write(event(self.error("it failed in its midst")))
                    return
                if i == 3 and asked["model"] == "breaks":
                    return
                # Cut in the midst of a letter.
                whole = event({"choices": [{"delta": {"content": f"{HOSTILE} é{i}\n"}, "finish_reason": None}], "usage": {"completion_tokens": i + 1}})
                cut = whole.index("é".encode()) + 1
                for part in (whole[:cut], whole[cut:]):
                    self.wfile.write(part)
                    self.wfile.flush()
                    time.sleep(0.01)
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.gone.append(asked["model"])


@contextlib.contextmanager
def stand_in(url):
    with urllib.request.urlopen(url) as response:
        StandIn.page, StandIn.policy = response.read(), response.headers["Content-Security-Policy"]
    StandIn.asked, StandIn.gone, StandIn.received, StandIn.uploads = [], [], [], False
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), StandIn)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


class Look:
    """Pages of a browser, and what went wrong in them."""

    def __init__(self, browser, screenshots):
        self.browser, self.screenshots, self.problems, self.expected = browser, screenshots, [], set()

    @contextlib.contextmanager
    def page(self, url, width=1280, height=800, **more):
        context = self.browser.new_context(viewport={"width": width, "height": height}, **more)
        page = context.new_page()
        page.set_default_timeout(15_000)
        origin = "{0.scheme}://{0.netloc}/".format(urllib.parse.urlsplit(url))
        told = lambda message: self.problems.append(message.text) if message.type in ("error", "warning") else None
        page.on("pageerror", lambda e: self.problems.append(str(e)))
        page.on("console", told)
        page.on("dialog", lambda d: (self.problems.append("a dialog: " + d.message), d.dismiss()))
        page.on("request", lambda r: None if r.url.startswith(origin) else self.problems.append("asked " + r.url))
        page.goto(url)
        yield page
        context.close()

    def shot(self, page, name):
        # Whatever it shows, nothing scrolls sideways and nothing below the fold is needed.
        wide, high = page.evaluate("[document.scrollingElement.scrollWidth - innerWidth, document.scrollingElement.scrollHeight - innerHeight]")
        assert wide <= 0 and high <= 0, (name, wide, high)
        if self.screenshots:
            pathlib.Path(self.screenshots).mkdir(parents=True, exist_ok=True)
            page.screenshot(path=f"{self.screenshots}/{name}.png")

    def close(self):
        # Chromium tells every answer of these codes as an error.
        known = lambda p: any(f"responded with a status of {status}" in p for status in self.expected)
        left = [p for p in self.problems if not known(p)]
        assert not left, left


def send(page, text, key="Enter"):
    page.get_by_label("Message").fill(text)
    page.get_by_label("Message").press(key)
    expect(page.get_by_role("button", name="Send")).to_be_visible()


def upload(page, files, name=None):
    page.get_by_role("button", name="Upload…").click()
    page.locator("#folder" if isinstance(files, str) else "#many").set_input_files(files)
    if name is not None:
        page.get_by_label("Name, as").fill(name)


def chats_and_compares(look, url, heads):
    with look.page(url) as page:
        expect(page.locator("#adapters li").first).to_be_visible()
        with urllib.request.urlopen(url + "v1/adapters") as response:
            number = len(json.load(response)["adapters"])
        expect(page.locator("#adapters li")).to_have_count(number + 1)
        expect(page.locator("#count")).to_have_text(f"{number} adapters and the base")
        look.shot(page, "first")
        search = page.get_by_label("Search adapters")
        search.fill("YES n")
        expect(page.locator("#adapters li")).to_have_count(1)
        page.get_by_title("Chat with yes-no").click()
        search.fill("bone")
        page.get_by_title("Compare with tenant/bone").click()
        expect(page.locator(heads)).to_have_text(["yes-no", "tenant/bone"])
        send(page, "up 3")
        first = page.locator("section:first-child .assistant")
        expect(first.locator(".text")).to_have_text("yes")
        expect(page.locator("section footer")).to_contain_text([re.compile(r"^\d+ tokens · first [\d.]+ s")] * 2)
        expect(first.locator("footer")).to_contain_text("tokens/s")
        # A second turn, sent with the button; what is told of an adapter that was read.
        page.get_by_label("Message").fill("down 5")
        page.get_by_role("button", name="Send").click()
        expect(first.nth(1).locator(".text")).to_have_text("no")
        expect(page.locator("section:first-child .head small")).to_have_text(re.compile(r"^lora · rank 8 · [\d.]+ kB$"))
        expect(page.locator("section:nth-child(2) .head small")).to_contain_text("bone · rank 4")
        # Memory and throughput.
        expect(page.locator("#kinds li")).to_contain_text([re.compile(kind + r".*\d page.*%") for kind in ("keys of requests", "keys kept", "adapters", "free")])
        expect(page.locator("#kind-adapters")).not_to_contain_text(re.compile("^0 pages"))
        expect(page.locator("#host")).to_have_text(re.compile(r"\d+ adapters? in host memory: [\d.]+ kB"))
        expect(page.locator("#speed")).to_have_text(re.compile(r"^[\d.]+ tokens/s$"))
        expect(page.locator("#first")).to_contain_text("on average")
        assert page.locator("#pool div").nth(2).bounding_box()["width"] > 0
        search.fill("")
        look.shot(page, "compared")
        # Conversations are kept when another is chosen, and cleared when that is asked for.
        page.get_by_title(re.compile("^Chat with")).first.click()
        expect(page.locator("section:first-child .assistant")).to_have_count(0)
        page.get_by_title("Chat with yes-no").click()
        expect(first).to_have_count(2)
        page.get_by_role("button", name="Close tenant/bone").click()
        expect(page.locator("section")).to_have_count(1)
        page.get_by_role("button", name="Clear").click()
        expect(first).to_have_count(0)
        # Settings are sent, and their errors told; the text is not lost.
        page.locator("#settings summary").click()
        page.get_by_label("System prompt").fill("Be brief.")
        page.get_by_label("Temperature").fill("-1")
        look.expected |= {400, 422}
        page.get_by_label("Message").fill("up 4")
        page.get_by_role("button", name="Send").click()
        expect(page.locator("section .error")).to_contain_text("temperature")
        expect(page.get_by_label("Message")).to_have_value("up 4")
        page.get_by_label("Temperature").fill("1.5")
        page.get_by_label("Most tokens").fill("5")
        page.get_by_label("Seed").fill("7")
        expect(page.locator("#set")).to_have_text("Settings: temperature 1.5, 5 tokens, seed 7, a system prompt")
        sent = []
        page.on("request", lambda r: sent.append(r.post_data_json) if r.method == "POST" else None)
        send(page, "up 4")
        expect(first.nth(1).locator("footer")).to_contain_text("token")
        body = sent[0]
        assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "up 4"}], body
        assert (body["temperature"], body["max_tokens"], body["seed"], body["model"]) == (1.5, 5, 7, "yes-no"), body


def uploads(look, url, folder, heads):
    folder, name = pathlib.Path(folder), f"page/{uuid.uuid4().hex[:8]}"
    needed = [str(folder / file) for file in NEEDED if (folder / file).exists()]
    refused = lambda page: page.locator("#refused")
    with look.page(url) as page, tempfile.TemporaryDirectory() as scratch:
        # No adapter: refused before anything is sent.
        sent = []
        page.on("request", lambda r: sent.append(r.url) if "/upload" in r.url else None)
        upload(page, [needed[1]], "none")
        expect(refused(page)).to_contain_text("This is no adapter: there is no adapter_config.json among 1 file.")
        page.get_by_role("button", name="Upload", exact=True).click()
        expect(refused(page)).to_contain_text("Choose an adapter first")
        page.locator("#many").set_input_files([needed[0]])
        expect(refused(page)).to_contain_text("no weights")
        page.locator("#many").set_input_files(needed)
        for bad, sentence in [("", "Give it a name"), ("../up", "do not begin with a dot"), ("yes-no", "an adapter yes-no already")]:
            page.get_by_label("Name, as").fill(bad)
            page.get_by_role("button", name="Upload", exact=True).click()
            expect(refused(page)).to_contain_text(sentence)
        look.shot(page, "refused")
        assert not sent, sent
        # What the server refuses is told in its words.
        page.get_by_label("Name, as").fill("white space")
        page.get_by_role("button", name="Upload", exact=True).click()
        expect(refused(page)).to_contain_text("is no name of an adapter")
        damaged = pathlib.Path(scratch, "damaged")
        damaged.mkdir()
        for file in needed:
            (damaged / pathlib.Path(file).name).write_bytes(pathlib.Path(file).read_bytes())
        weights = damaged / NEEDED[1]
        weights.write_bytes(weights.read_bytes()[:-100])
        page.locator("#many").set_input_files([str(path) for path in damaged.iterdir()])
        page.get_by_label("Name, as").fill(name + "-damaged")
        page.get_by_role("button", name="Upload", exact=True).click()
        expect(refused(page)).not_to_be_empty()
        expect(refused(page)).not_to_contain_text("is no name of an adapter")
        look.shot(page, "refused-by-the-server")
        # What was chosen is still there after a look elsewhere, for a key, say.
        page.get_by_role("button", name="Cancel").click()
        page.get_by_role("button", name="Upload…").click()
        expect(page.locator("#chosen")).to_contain_text(NEEDED[1])
        expect(page.get_by_label("Name, as")).to_have_value(name + "-damaged")
        page.get_by_role("button", name="Cancel").click()
        # A folder, its name taken from the folder's, and chatted with at once.
        upload(page, str(folder))
        expect(page.get_by_label("Name, as")).to_have_value(folder.name)
        expect(page.locator("#chosen")).to_contain_text("adapter_model.safetensors")
        page.get_by_label("Name, as").fill(name)
        look.shot(page, "upload")
        page.get_by_role("button", name="Upload", exact=True).click()
        expect(page.locator("#notice")).to_contain_text("lora · rank 8")
        expect(page.locator(heads)).to_have_text([name])
        send(page, "up 6")
        expect(page.locator(".assistant .text")).to_have_text("yes")
        # Dropped files, for the same name, with leave to replace it.
        files = [{"name": pathlib.Path(f).name, "bytes": list(pathlib.Path(f).read_bytes())} for f in needed]
        page.evaluate("""files => {
            const data = new DataTransfer();
            for (const { name, bytes } of files) data.items.add(new File([new Uint8Array(bytes)], name));
            for (const kind of ['dragover', 'drop']) document.body.dispatchEvent(new DragEvent(kind, { dataTransfer: data, bubbles: true, cancelable: true }));
        }""", files)
        expect(page.locator("#chosen")).to_contain_text("lorimer.json" if len(files) > 2 else NEEDED[1])
        page.get_by_label("Name, as").fill(name)
        page.get_by_label("Replace").check()
        page.get_by_role("button", name="Upload", exact=True).click()
        expect(page.locator("#upload")).to_be_hidden()
        # The adapter goes while the page is open: the error is shown, not swallowed.
        look.expected |= {404}
        urllib.request.urlopen(urllib.request.Request(f"{url}v1/adapters/{name}", method="DELETE"))
        page.get_by_label("Message").fill("up 4")
        page.get_by_label("Message").press("Enter")
        expect(page.locator("section .error")).to_contain_text("no adapter")
        # Taken away on the page: asked first, and only then done.
        other = name + "-other"
        upload(page, needed, other)
        page.get_by_role("button", name="Upload", exact=True).click()
        expect(page.locator(heads)).to_have_text([other])
        for answer, there in [("Keep", 1), ("Remove", 0)]:
            page.get_by_role("button", name=f"Remove {other}").click()
            page.locator("#sure").get_by_role("button", name=answer).click()
            expect(page.locator("#sure")).to_be_hidden()
            expect(page.get_by_title(f"Chat with {other}")).to_have_count(there)
        expect(page.locator("#notice")).to_contain_text("removed")


def by_keyboard(look, url, heads):
    with look.page(url) as page:
        expect(page.locator("#adapters li").nth(1)).to_be_visible()
        keys, focused = page.keyboard, lambda locator: expect(locator).to_be_focused()
        expect(page.locator("#adapters [tabindex='0']")).to_have_count(1)
        keys.press("/")
        focused(page.get_by_label("Search adapters"))
        keys.type("yes-no")
        keys.press("ArrowDown")
        focused(page.get_by_title("Chat with yes-no"))
        keys.press("ArrowUp")
        focused(page.get_by_label("Search adapters"))
        keys.press("Enter")
        expect(page.locator(heads)).to_have_text(["yes-no"])
        focused(page.get_by_label("Message"))
        # Back to the search, down the list, and the second side.
        keys.press("Escape")
        focused(page.get_by_label("Search adapters"))
        keys.press("Delete")
        keys.press("ArrowDown")
        keys.press("End")
        keys.press("Home")
        bone = page.get_by_title("Chat with tenant/bone")
        for _ in range(page.locator("#adapters li").count()):
            if bone.evaluate("node => node === document.activeElement"):
                break
            keys.press("ArrowDown")
        focused(bone)
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        keys.press("ArrowRight")
        focused(page.get_by_title("Compare with tenant/bone"))
        keys.press("Enter")
        expect(page.locator(heads)).to_have_text(["yes-no", "tenant/bone"])
        focused(page.get_by_label("Message"))
        keys.type("up 3")
        keys.press("Shift+Enter")
        keys.press("Backspace")
        keys.press("Control+Enter")
        expect(page.locator("section:first-child .assistant .text")).to_have_text("yes")
        expect(page.locator("#said")).to_contain_text("yes-no answers: yes")
        # One stop of Tab for the whole list, and nothing that cannot be left.
        stops = []
        page.evaluate("document.activeElement.blur()")
        page.get_by_label("Search adapters").focus()
        for _ in range(16):
            stops.append(page.evaluate("document.activeElement.closest('#adapters') ? 'list' : document.activeElement.id || document.activeElement.textContent"))
            keys.press("Tab")
        assert stops[:3] == ["search", "add", "list"] and stops.count("list") == 1, stops
        assert ["prompt", "send"] == [stop for stop in stops if stop in ("prompt", "send")], stops
        # Shift+Enter in the search compares, and once more takes the side away.
        for number in (1, 2):
            page.get_by_label("Search adapters").fill("tenant/bone")
            keys.press("Shift+Enter")
            expect(page.locator("section")).to_have_count(number)
        # Upload's window opens, keeps the focus, and closes.
        page.get_by_role("button", name="Upload…").focus()
        keys.press("Enter")
        expect(page.locator("#upload")).to_be_visible()
        assert page.evaluate("document.activeElement.closest('dialog')?.id") == "upload"
        keys.press("Escape")
        expect(page.locator("#upload")).to_be_hidden()
        focused(page.get_by_role("button", name="Upload…"))


def on_a_phone(look, url, heads, width, scheme):
    with look.page(url, width, 740, has_touch=True, is_mobile=True, color_scheme=scheme) as page:
        expect(page.locator(heads)).to_have_count(1)
        expect(page.get_by_label("Message")).to_be_in_viewport(ratio=1)
        expect(page.locator("aside")).to_be_hidden()
        page.get_by_role("button", name="Adapters").tap()
        expect(page.get_by_title("Chat with yes-no")).to_be_in_viewport()
        look.shot(page, f"phone-{width}-{scheme}-list")
        targets = "nodes => nodes.filter(n => n.offsetParent && (n.offsetHeight < 44 || n.offsetWidth < 44)).map(n => n.outerHTML)"
        small = lambda: page.locator("button, summary, input:not([type=checkbox])").evaluate_all(targets)
        assert not small(), small()
        page.get_by_title("Chat with yes-no").tap()
        expect(page.get_by_label("Message")).to_be_in_viewport(ratio=1)
        page.get_by_role("button", name="Adapters").tap()
        page.get_by_title("Compare with tenant/bone").tap()
        page.get_by_label("Message").fill("up 3")
        page.get_by_role("button", name="Send").tap()
        expect(page.locator("section:first-child .assistant .text")).to_have_text("yes")
        expect(page.locator("section footer button")).to_have_count(2)
        expect(page.locator("section footer button").first).to_be_in_viewport()
        assert not small(), small()
        look.shot(page, f"phone-{width}-{scheme}-compared")
        page.locator("#settings summary").tap()
        expect(page.get_by_label("Seed")).to_be_in_viewport(ratio=1)
        look.shot(page, f"phone-{width}-{scheme}-settings")
        page.get_by_role("button", name="Adapters").tap()
        page.get_by_role("button", name="Upload…").tap()
        expect(page.get_by_role("button", name="Upload", exact=True)).to_be_in_viewport(ratio=1)
        look.shot(page, f"phone-{width}-{scheme}-upload")


def with_the_stand_in(look, url, heads):
    with stand_in(url) as url, look.page(url) as page, tempfile.TemporaryDirectory() as scratch:
        # Without the key the sentence is shown, the server is left alone, and the place for keys is open.
        look.expected |= {401, 422}
        expect(page.locator("#notice")).to_contain_text("the API key is needed, says the stand-in")
        page.get_by_label("API key").fill("secret")
        page.get_by_label("API key").press("Tab")
        expect(page.locator("#notice")).to_be_hidden()
        # Thousands of adapters.
        expect(page.locator("#adapters li")).to_have_count(200)
        expect(page.locator("#count")).to_have_text("200 of 5,001 shown; search for the others")
        search, began = page.get_by_label("Search adapters"), time.monotonic()
        search.press_sequentially("many 0123")
        expect(page.locator("#adapters li")).to_have_count(1)
        assert time.monotonic() - began < 5, "searching takes too long"
        took = page.evaluate("""() => {
            const field = document.getElementById('search'), began = performance.now();
            for (const text of ['m', 'ma', 'man', 'many', '']) { field.value = text; field.dispatchEvent(new Event('input')); document.body.offsetHeight; }
            return (performance.now() - began) / 5;
        }""")
        assert took < 600, f"{took:.0f} ms a letter"
        # No uploads, and that is said; figures.
        expect(page.locator("#off")).to_be_visible()
        expect(page.locator("#off")).to_contain_text("--allow-uploads")
        expect(page.get_by_role("button", name="Upload…")).to_be_hidden()
        expect(page.locator("#kinds")).to_contain_text(re.compile(r"300 pages, 30\s%.*100 pages, 10\s%.*200 pages, 20\s%.*400 pages, 40\s%"))
        expect(page.locator("#requests")).to_have_text("3 running, 1 waiting")
        expect(page.locator("#first")).to_contain_text("0.500 s")
        expect(page.locator("#host")).to_have_text("7 adapters in host memory: 2.5 MB")
        expect(page.locator("#speed")).to_have_text(re.compile(r"^[1-9][\d.]* tokens/s$"))
        # Names and answers are text, whatever they look like.
        page.get_by_title(f"Chat with {HOSTILE}").click()
        expect(page.locator(heads)).to_have_text([HOSTILE])
        expect(page.locator(".head small")).to_have_text(re.compile(re.escape(HOSTILE) + r" · rank 64 · 1.2 MB · converted, 3.2\s% off"))
        page.get_by_label("Message").fill(HOSTILE)
        page.get_by_label("Message").press("Enter")
        answer = page.locator(".assistant .text")
        expect(answer).to_contain_text(HOSTILE + " é5")
        # It comes in pieces, is followed, and is stopped by Escape; the server sees it.
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
        expect(page.locator(".assistant.busy")).to_have_count(1)
        expect(answer).to_contain_text("é40")
        assert page.locator(".log").evaluate("n => n.scrollHeight - n.scrollTop - n.clientHeight") < 60, "the answer is not followed"
        look.shot(page, "hostile")
        # Who reads further up is left there.
        page.locator(".log").evaluate("n => { n.scrollTop = 0; }")
        expect(answer).to_contain_text("é60")
        page.keyboard.press("Escape")
        expect(page.locator("footer")).to_contain_text("stopped")
        expect(page.get_by_role("button", name="Send")).to_be_visible()
        assert page.locator(".log").evaluate("n => n.scrollTop") == 0, "a reader was taken away"
        until = time.monotonic() + 10
        while HOSTILE not in StandIn.gone and time.monotonic() < until:
            time.sleep(0.05)
        assert HOSTILE in StandIn.gone, "the server was not left"
        assert page.locator("img").count() == 0
        # Copied whole.
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        page.get_by_role("button", name="Copy").click()
        expect(page.get_by_role("button", name="Copied")).to_be_visible()
        assert page.evaluate("navigator.clipboard.readText()") == answer.text_content()
        # The next turn tells what was said; the button stops, too.
        page.get_by_label("Message").fill("and then")
        page.get_by_role("button", name="Send").click()
        expect(answer.nth(1)).to_contain_text("é2")
        page.get_by_role("button", name="Stop").click()
        assert [m["role"] for m in StandIn.asked[-1]["messages"]] == ["user", "assistant", "user"], StandIn.asked[-1]
        # Errors in the midst of two answers: each is told, and what had come is kept.
        for name, title in [("fails", "Chat with"), ("breaks", "Compare with")]:
            search.fill(name)
            page.get_by_title(f"{title} {name}").click()
        send(page, "go")
        expect(page.locator("section .error")).to_have_text(["it failed in its midst", "The answer broke off."])
        expect(page.locator("section .text").last).to_contain_text("é2")
        expect(page.get_by_label("Message")).to_have_value("go")
        # Uploads with the admin key, told while they are under way; the server's words as text.
        StandIn.uploads = True
        page.get_by_label("Admin key").fill("boss")
        folder = pathlib.Path(scratch)
        (folder / NEEDED[0]).write_text("{}")
        (folder / NEEDED[1]).write_bytes(bytes(24 << 20))
        upload(page, [str(folder / file) for file in NEEDED[:2]], "team/x y")
        page.get_by_role("button", name="Upload", exact=True).click()
        expect(page.locator("#part")).to_have_text(re.compile(r"^[\d.]+ MB of 25\.2 MB$"))
        assert 0 < page.locator("#bar").evaluate("bar => bar.value") < 1
        look.shot(page, "uploading")
        expect(page.locator("#refused")).to_have_text(f"refused, says the stand-in, {HOSTILE}")
        path, key, body = StandIn.received[0]
        assert (path, key) == ("/v1/adapters/team/x%20y/upload?mode=create", "Bearer boss"), (path, key)
        assert b'filename="adapter_config.json"' in body and len(body) > 24 << 20, body[:300]
        # Broken off while it is sent.
        page.get_by_role("button", name="Upload", exact=True).click()
        expect(page.locator("#progress")).to_be_visible()
        page.keyboard.press("Escape")
        expect(page.locator("#upload")).to_be_hidden()
        assert page.evaluate("Object.keys(localStorage).length + Object.keys(sessionStorage).length") == 0
    with stand_in(look.url) as url, look.page(url, 375, 740, has_touch=True, is_mobile=True) as page:
        page.get_by_role("button", name="Adapters").tap()
        page.get_by_label("API key").fill("secret")
        page.get_by_label("API key").press("Enter")
        page.get_by_title(f"Chat with {HOSTILE}").tap()
        page.get_by_label("Message").fill("W" * 300)
        page.get_by_role("button", name="Send").tap()
        expect(page.locator(".assistant .text")).to_contain_text("é5")
        look.shot(page, "phone-hostile")
        page.get_by_role("button", name="Stop").tap()


def contrast(look, url):
    """Every text that is shown, against what lies behind it: 4.5 to 1 at least."""
    script = """() => {
        const rgb = c => (c.match(/[\\d.]+/g) ?? []).map(Number);
        const light = c => { const [r, g, b] = c.map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
        const behind = node => { for (; node; node = node.parentElement) { const c = rgb(getComputedStyle(node).backgroundColor); if (c.length === 3) return c; } return [255, 255, 255]; };
        const bad = [];
        for (const node of document.querySelectorAll('body *')) {
            const own = [...node.childNodes].some(n => n.nodeType === 3 && n.data.trim());
            if (!own || node.disabled || !node.checkVisibility() || ['SCRIPT', 'STYLE', 'NOSCRIPT'].includes(node.tagName)) continue;
            const [a, b] = [light(rgb(getComputedStyle(node).color).slice(0, 3)), light(behind(node))].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
            if (ratio < 4.5) bad.push([ratio, node.outerHTML]);
        }
        return bad;
    }"""
    for scheme in ("light", "dark"):
        with look.page(url, color_scheme=scheme) as page:
            page.get_by_title("Chat with yes-no").click()
            page.get_by_title("Compare with tenant/bone").click()
            send(page, "up 3")
            page.get_by_label("Message").fill("down 3")
            page.locator("#settings summary").click()
            page.locator("#keys summary").click()
            assert not (bad := page.evaluate(script)), (scheme, bad)
            look.shot(page, f"wide-{scheme}")
            page.get_by_role("button", name="Upload…").click()
            page.get_by_role("button", name="Upload", exact=True).click()
            assert not (bad := page.evaluate(script)), (scheme, bad)
            look.shot(page, f"wide-{scheme}-upload")


def check(page_url, chromium_path, folder_of_an_adapter, screenshots=None):
    url = page_url.rstrip("/") + "/"
    expect.set_options(timeout=15_000)
    heads = "section h2 bdi"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path, args=LAUNCH)
        look = Look(browser, screenshots)
        look.url = url
        chats_and_compares(look, url, heads)
        uploads(look, url, folder_of_an_adapter, heads)
        by_keyboard(look, url, heads)
        for width, scheme in [(375, "light"), (360, "dark")]:
            on_a_phone(look, url, heads, width, scheme)
        with_the_stand_in(look, url, heads)
        contrast(look, url)
        look.close()
        browser.close()


if __name__ == "__main__":
    if not 4 <= len(sys.argv) <= 5:
        sys.exit(__doc__)
    check(*sys.argv[1:])
    print("the page does what it should")
