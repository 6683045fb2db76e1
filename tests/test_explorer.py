"""The explorer of the documentation in a real browser, compared with the package."""

import functools
import http.server
import math
import shutil
import threading
from urllib.parse import urlsplit

import pytest
import torch
from torch.nn import functional

import hf_gem
from hf_gem import gain
from hf_gem.compare.looks import look
from hf_gem.family.names import GemSpec, is_name
from tests.helpers import ROOT

pytestmark = pytest.mark.slow  # a browser starts
playwright = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
FOLDER = ROOT / "docs" / "explorer"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if BROWSER is None:
    pytest.skip("needs Chromium or Chrome, and finds neither", allow_module_level=True)

BASELINES = {"relu": torch.relu, "gelu": functional.gelu, "silu": functional.silu, "mish": functional.mish}
MINUS, SLOPE = "\N{MINUS SIGN}", "f\N{PRIME}(x)"
SPECS = [
    GemSpec("gem"),
    GemSpec("gem", 3),
    GemSpec("egem"),
    GemSpec("egem", 2, 0.0123),
    GemSpec("egem", 1, 1e-12),
    GemSpec("egem", 8, 1e4),
    GemSpec("segem", 1, 1e4),
    GemSpec("segem", 4, 3e-7),
    GemSpec("segem", 8, 1e-12),
    GemSpec("gem", 32),
    GemSpec("egem", 32, 1e4),
    GemSpec("segem", 32, 1e-12),
]


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])  # CI is root in a container
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def site():
    """The address of the explorer on a server of this machine."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    handler = functools.partial(Handler, directory=str(FOLDER))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def compute(browser, site):
    """Evaluates JavaScript that uses the mathematics of the explorer."""
    page = browser.new_page()
    page.goto(site)
    yield page.evaluate
    page.close()


@pytest.fixture
def visit(browser, site):
    """Opens the explorer. Afterwards, checks that it sent no request to another host and logged no error."""
    contexts, complaints, hosts = [], [], set()

    def visit(fragment="", address=site, **options):
        context = browser.new_context(**{"viewport": {"width": 1400, "height": 900}, **options})
        contexts.append(context)
        context.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page = context.new_page()
        page.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(address + fragment)
        page.wait_for_function("document.querySelectorAll('#readings tbody tr').length")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert complaints == []
    assert hosts <= {urlsplit(site).netloc, ""}  # of data: and file: addresses


def settle(page):
    """Waits until the page has drawn its state and written it into its address."""
    # Its frame comes before ours, and the 200 ms after which it saves are over before ours.
    page.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 250)))")


def number(text):
    """The number in a text with a true minus sign."""
    return float(text.replace(MINUS, "-"))


def shown(page, selector):
    """A number as the page shows it."""
    return number(page.inner_text(selector))


def choose(page, spec):
    page.click(f"text='{spec.definition.title}' >> nth=0")
    page.focus("#n")
    for key in ["Home"] + ["ArrowRight"] * (spec.n - 1):
        page.keyboard.press(key)
    if spec.definition.fixed_eps is None:
        page.fill("#eps-exact", repr(spec.eps))
    settle(page)


def double(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def around(half, n):
    """Inputs on both sides of 0 where the gate opens, x^n in steps of 7e-5 of itself: a smooth maximum is missed by the
    square of that.
    """
    right = half * torch.logspace(-3 / n, 3 / n, 200_001, dtype=torch.float64)
    return torch.cat([-right.flip(0), right])


def derivatives(f, x):
    """f(x), f'(x) and f''(x)."""
    x = x.clone().requires_grad_()
    y = f(x)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    curvature = torch.autograd.grad(slope.sum(), x)[0] if slope.requires_grad else torch.zeros_like(x)
    return y.detach(), slope.detach(), curvature


def check_numbers(page, spec, rms):
    f = hf_gem.get_activation(spec.name)
    half = spec.eps ** (1 / (2 * spec.n))
    x = around(half, spec.n)
    y, slopes, _ = derivatives(f, x)
    expected = {
        "gain": gain(spec.name),
        "output-rms": 1 / gain(lambda z: f(z * rms)),
        "largest-slope": float(slopes.max()),
        "smallest-slope": float(slopes.min()),
        "largest-distance": float((y - x.relu()).abs().max()),
        "half-point": half,
        "ratio": half / rms,
    }
    for name, number in expected.items():
        assert shown(page, f"#{name}") == pytest.approx(number, rel=1e-6, abs=1e-12), name
    assert page.inner_text("#name") == spec.name


def test_sliders_move_the_numbers(visit):
    page = visit()
    check_numbers(page, GemSpec("gem"), rms=1)
    page.fill("#rms-exact", "0.55")
    for spec in SPECS:
        choose(page, spec)
        check_numbers(page, spec, rms=0.55)


def test_a_slider_is_dragged(visit):
    page = visit("#act=egem")
    box = page.locator("#eps").bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] + 20, middle)
    page.mouse.up()
    settle(page)
    check_numbers(page, GemSpec("egem", 1, 1e4), rms=1)
    assert page.input_value("#eps-exact") == "10000"


def test_it_opens_from_a_file(visit):
    page = visit("#act=segem_n2_eps0.1&rms=0.55", address=f"{FOLDER.as_uri()}/index.html")
    check_numbers(page, GemSpec("segem", 2, 0.1), rms=0.55)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_members(compute, spec):
    half = spec.eps ** (1 / (2 * spec.n))
    x = half * torch.cat([torch.linspace(-4, 4, 401, dtype=torch.float64), double(-1e3, -30, 30, 1e3)])
    x = x[x != 0]
    made = f"hfGem.member('{spec.family}', {spec.n}, {spec.eps!r})"
    found = quantities(compute, made, x)
    y, slope, curvature = derivatives(hf_gem.get_activation(spec.name), x)
    # Ten operations and a power of 2n, whose argument is rounded too. The terms of slope and curvature may cancel; they
    # are at most (2n + 1)^2 and (2n + 1)^3 / x.
    roundings = 2.0**-53 * (10 + 8 * spec.n)
    assert torch.allclose(found["value"], y, rtol=roundings, atol=0)
    assert torch.allclose(found["slope"], slope, rtol=0, atol=roundings * (1 + 2 * spec.n) ** 2)
    assert torch.allclose(found["curvature"] * x, curvature * x, rtol=0, atol=roundings * (1 + 2 * spec.n) ** 3)
    check_gate(found, x)


@pytest.mark.parametrize("name", BASELINES)
def test_baselines(compute, name):
    x = torch.linspace(-12, 12, 601, dtype=torch.float64)
    x = x[x != 0]
    found = quantities(compute, f"hfGem.BASELINES.{name}", x)
    y, slope, curvature = derivatives(BASELINES[name], x)
    for quantity, expected in (("value", y), ("slope", slope), ("curvature", curvature)):
        assert torch.allclose(found[quantity], expected, rtol=1e-13, atol=1e-14), quantity
    check_gate(found, x)


def quantities(compute, made, x):
    """All quantities of an activation at x, after a check that they are finite at tiny and huge inputs."""
    names = ("value", "slope", "curvature", "gate", "shut", "distance")
    read = f"xs => Object.fromEntries({list(names)}.map(name => [name, xs.map({made}[name])]))"
    extremes = compute(read, [sign * 10.0**k for sign in (-1, 1) for k in (-300, -30, 30, 150)] + [0.0])
    assert all(math.isfinite(number) for numbers in extremes.values() for number in numbers)
    return {name: double(*numbers) for name, numbers in compute(read, x.tolist()).items()}


def check_gate(found, x):
    assert torch.allclose(found["gate"] * x, found["value"], rtol=1e-15, atol=0)
    assert torch.allclose(found["gate"] + found["shut"], torch.ones_like(x), rtol=0, atol=2e-15)
    assert torch.allclose(found["distance"], (found["value"] - x.relu()).abs(), rtol=0, atol=2e-15 * float(x.max()))


@pytest.mark.parametrize(
    ("made", "name"),
    [(f"hfGem.BASELINES.{name}", name) for name in BASELINES]
    + [(f"hfGem.member('{s.family}', {s.n}, {s.eps!r})", s.name) for s in SPECS],
)
@pytest.mark.parametrize("rms", [0.1, 3])
def test_outputs(compute, made, name, rms):
    """The distribution of outputs, compared with counted outputs of equally likely inputs."""
    num = 1_000_000
    inputs = rms * torch.special.ndtri((torch.arange(num, dtype=torch.float64) + 0.5) / num)
    f = BASELINES.get(name) or hf_gem.get_activation(name)
    outputs = f(inputs).detach()
    outputs[(outputs == 0) & (inputs > 0)] = 5e-324  # with n = 32 some underflow, but are above 0
    outputs = outputs.sort().values
    y = torch.cat([torch.linspace(float(outputs[0]), float(outputs[-1]), 97, dtype=torch.float64), double(0.0)])
    y = y[(y == 0) | (y.abs() > 1e-9)]  # nearer to 0, roundings would decide on which side an output is
    counted = torch.searchsorted(outputs, y, right=True) / num
    found = compute(f"ys => ys.map(hfGem.outputCdf({made}, {rms}))", y.tolist())
    assert torch.allclose(double(*found), counted.double(), rtol=0, atol=2.5 / num)  # an input at either end


def test_names(compute):
    numbers = (1e-12, 1.5e-7, 1e-5, 9.9e-5, 1e-4, 0.00012, 0.1, 1 / 3, 1, 10, 1234.5, 1e4)
    specs = [GemSpec(family, n, eps) for family in ("egem", "segem") for n in (1, 8, 32) for eps in numbers]
    specs += [GemSpec("gem", n) for n in range(1, 33)]
    fields = [{"family": spec.family, "n": spec.n, "eps": spec.eps} for spec in specs]
    assert compute("specs => specs.map(hfGem.printName)", fields) == [spec.name for spec in specs]
    assert compute("names => names.map(hfGem.parseName)", [spec.name for spec in specs]) == fields
    spellings = ["EGEM_n2_EPS1e-6", "egem_n2_eps1em06", "egem_n02_eps0.000001"]
    assert compute("names => names.map(hfGem.parseName)", spellings) == [fields_of("egem_n2_eps1em6")] * 3
    for name in ("gem_eps1", "gem_n0", "gem_n33", "gelu", "egem_eps1em-6", "egem_n2_", "egem-n2", "egem_eps0", ""):
        assert not is_name(name)
        assert compute("name => hfGem.parseName(name)", name) is None


def fields_of(name):
    spec = hf_gem.parse(name)
    return {"family": spec.family, "n": spec.n, "eps": spec.eps}


def controls(page):
    """What all controls say."""
    return page.evaluate("[...document.querySelectorAll('input')].map(i => i.type + i.value + i.checked)")


def test_the_address_holds_the_state(visit):
    page = visit()
    settle(page)
    assert "#" not in page.url
    choose(page, GemSpec("segem", 3, 0.0025))
    for entry, number in (("#rms-exact", "0.16"), ("#range-exact", "2.5"), ("#x-exact", "-0.75")):
        page.fill(entry, number)
    page.click("text=SiLU >> nth=0")
    settle(page)
    fragment = "#" + urlsplit(page.url).fragment
    assert fragment == "#act=segem_n3_eps0.0025&rms=0.16&range=2.5&x=-0.75&beside=relu+gelu+mish"
    again = visit(fragment)
    assert controls(again) == controls(page)
    assert again.inner_text("#readings") == page.inner_text("#readings")
    # Links to a state, from the page itself; the second holds none that is valid.
    for other, name in (("#act=gem_n2", "gem_n2"), ("#act=gelu&rms=-1&range=many&x=99&beside=tanh", "gem")):
        again.evaluate("fragment => { location.hash = fragment }", other)
        settle(again)
        assert again.inner_text("#name") == name
        assert again.input_value("#rms-exact") == "1"
    page.click("text=Reset")
    settle(page)
    assert controls(page) == controls(visit())


def test_keyboard(visit):
    page = visit("#act=egem_n2_eps0.01")
    for label, key, entry, before, after in (
        ("n", "ArrowRight", "#n", "2", "3"),
        ("eps, logarithmic", "ArrowLeft", "#eps-exact", "0.01", "0.0089"),
        ("Input rms, logarithmic", "ArrowUp", "#rms-exact", "1", "1.1"),
        ("Largest x shown, logarithmic", "ArrowDown", "#range-exact", "4", "3.5"),
        ("x of the crosshair", "ArrowRight", "#x-exact", "1", "1.01"),
    ):
        slider = page.get_by_role("slider", name=label, exact=True)
        assert page.input_value(entry) == before
        slider.focus()
        page.keyboard.press(key)
        settle(page)
        assert page.input_value(entry) == after
        assert (slider.get_attribute("aria-valuetext") or slider.input_value()) == after
    page.get_by_role("radio", name="E-GEM", exact=True).focus()
    page.keyboard.press("ArrowRight")
    settle(page)
    assert page.inner_text("#name") == "segem_n3_eps0.0089"


# The name of what has the focus and the outline around it, which a radio button draws around its text; null at the end.
FOCUS = """() => {
    const focused = document.activeElement;
    if (focused === document.body) return null;
    const style = getComputedStyle(focused.type === "radio" ? focused.nextElementSibling : focused);
    const name = focused.ariaLabel || focused.labels?.[0]?.innerText || focused.innerText;
    return [name, `${style.outlineWidth} ${style.outlineStyle}`];
}"""


def test_focus_is_seen_wherever_it_goes(visit):
    page = visit("#act=egem")
    stops = []
    page.keyboard.press("Tab")
    while (stop := page.evaluate(FOCUS)) and len(stops) < 40:
        stops.append(stop)
        page.keyboard.press("Tab")
    names = [name for name, _ in stops]
    entries = [f"{name}, {way}" for name in ("eps", "Input rms", "Largest x shown") for way in ("logarithmic", "exact")]
    crosshair = ["x of the crosshair", "x of the crosshair, exact", "Zoom to the gate", "Reset"]
    baselines = ["ReLU", "GELU", "SiLU", "Mish"]
    assert names == ["Docs", "Dark theme", "E-GEM", "n", *entries, *crosshair, *baselines, "Copy the name"]
    assert {outline for _, outline in stops} == {"3px solid"}


@pytest.mark.parametrize("text", ["abc", "0", "-1", "1e9", "1e-13", "NaN", "Infinity", "", "1e--6", "9" * 500])
def test_an_entry_that_is_refused(visit, text):
    page = visit("#act=egem_n2_eps0.01")
    page.fill("#eps-exact", text)
    settle(page)
    assert page.get_attribute("#eps-exact", "aria-invalid") == "true"
    note = page.inner_text("#eps-note")
    assert note == f"Got {text[:20] or 'nothing'}. Enter a number from 1e{MINUS}12 to 10000."
    assert page.inner_text("#name") == "egem_n2_eps0.01"
    page.keyboard.press("Tab")
    settle(page)
    assert page.input_value("#eps-exact") == "0.01"
    assert page.get_attribute("#eps-exact", "aria-invalid") == "false"
    assert page.inner_text("#eps-note") == ""


def readings(page):
    """The table of readings: of each row, the numbers behind what is shown."""
    rows = page.locator("#readings tbody tr").all()
    cells = "row => [...row.querySelectorAll('data')].map(cell => Number(cell.value))"
    return {row.locator("th").inner_text(): row.evaluate(cells) for row in rows}


def test_the_crosshair_reads_the_curves(visit):
    page = visit("#act=egem_n2_eps0.01")
    box = page.locator("#slope svg").bounding_box()
    page.mouse.move(box["x"] + 0.25 * box["width"], box["y"] + 60)
    settle(page)
    x = float(page.input_value("#x-exact"))
    assert -4 < x < 0
    for position in (x, 0.3, 2.0):
        page.fill("#x-exact", str(position))
        settle(page)
        columns = [
            derivatives(f, double(position)) for f in (hf_gem.get_activation("egem_n2_eps0.01"), *BASELINES.values())
        ]
        rows = readings(page)
        for order, name in enumerate(("f(x)", SLOPE, "f″(x)")):
            assert rows[name] == pytest.approx([column[order].item() for column in columns], rel=1e-6, abs=1e-12)
        assert rows["gate"] == pytest.approx([column[0].item() / position for column in columns], rel=1e-6, abs=1e-12)
        away = [abs(column[0].item() - max(position, 0)) for column in columns]
        assert rows["distance"] == pytest.approx(away, rel=1e-6, abs=1e-12)
        # The labels beside the curves have two or three digits of the same numbers.
        labels = page.locator("#slope .value").all_text_contents()
        assert list(map(number, labels)) == pytest.approx(rows[SLOPE], rel=0.05, abs=1e-9)
        assert page.locator("#slope circle").count() == 5


def test_activations_are_switched_off(visit):
    page = visit("#act=gem_n2")
    assert page.locator("#value .curve").count() == 10  # each with the line to its label
    for name in ("ReLU", "GELU", "SiLU", "Mish"):
        page.get_by_role("checkbox", name=name).uncheck()
    settle(page)
    assert page.locator("#value .curve").count() == 2
    assert {len(row) for row in readings(page).values()} == {1}
    assert urlsplit(page.url).fragment == "act=gem_n2&beside="


def test_zoom_shows_the_gate(visit):
    page = visit("#act=segem_n2_eps1em12")
    page.click("text=Zoom to the gate")
    settle(page)
    assert page.input_value("#range-exact") == "0.004"
    assert readings(page)["gate"][0] == pytest.approx(0.5, abs=1e-6)


def test_copy(visit):
    page = visit("#act=egem_n2_eps1em6", permissions=["clipboard-read", "clipboard-write"])
    page.click("text=Copy the name")
    page.wait_for_selector("text=Copied egem_n2_eps1em6")
    assert page.evaluate("navigator.clipboard.readText()") == "egem_n2_eps1em6"


@pytest.mark.parametrize(
    "fragment",
    ["", "#act=segem_n8_eps1.2345678901em12&x=-0.0000123&range=0.0001", "#act=egem_eps10000&rms=10&range=1000"],
)
def test_a_phone_scrolls_one_way(visit, fragment):
    page = visit(fragment, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    ends = page.evaluate("[...document.querySelectorAll('main *')].map(e => e.getBoundingClientRect().right)")
    assert max(ends) <= 391
    # The controls of the function stay in view.
    page.evaluate("document.querySelector('#gate').scrollIntoView()")
    settle(page)
    assert 0 <= page.locator("#n").bounding_box()["y"] < 200


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_themes(visit, scheme):
    other = {"light": "dark", "dark": "light"}[scheme]
    page = visit(color_scheme=scheme)
    brightness = "parseInt(getComputedStyle(document.body).backgroundColor.match(/\\d+/)[0])"
    before = page.evaluate(brightness)
    assert (before > 200) == (scheme == "light")
    page.get_by_role("button", name=f"{other} theme").click()
    assert (page.evaluate(brightness) > 200) == (scheme == "dark")
    page.reload()
    assert (page.evaluate(brightness) > 200) == (scheme == "dark")
    page.get_by_role("button", name=f"{scheme} theme").click()
    assert page.evaluate(brightness) == before


def test_colours_are_those_of_the_other_pictures(visit):
    page = visit(color_scheme="light")
    # Families have a scale of colours; the explorer takes its middle.
    middle = {"gem": "gem", "egem": "egem_eps0.01", "segem": "segem_eps0.01"}
    for name, act in {**dict.fromkeys(BASELINES), **middle}.items():
        color = page.evaluate(f"getComputedStyle(document.documentElement).getPropertyValue('--{name}')")
        if name == "relu":  # it turns white where the page is dark
            color = color.removeprefix("light-dark(").partition(",")[0]
        assert color.lower() == look(act or name)["color"].lower()
