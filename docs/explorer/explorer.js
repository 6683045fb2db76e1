"use strict";

/** The page: its state, which is in the URL too, the controls that change it, and all that is drawn from it. */
(() => {
    const { BASELINES, TITLES, LIMITS } = hfGem;
    const { Chart, format, percent } = hfGemChart;
    const START = { family: "gem", n: 1, eps: 1e-4, rms: 1, range: 4, x: 1, beside: Object.keys(BASELINES) };
    const RANGES = { eps: LIMITS.eps, rms: [0.01, 10], range: [1e-6, 1e3] };
    const NUM_BINS = 40; // up to the largest output shown
    const find = (selector) => document.querySelector(selector);
    const all = (selector) => [...document.querySelectorAll(selector)];

    const narrow = matchMedia("(max-width: 480px)"); // a phone, as in explorer.css

    let state = START;

    /** The chosen member of the family; GEM has eps = 1. */
    const chosen = ({ family, n, eps }) => ({ family, n, eps: family === "gem" ? 1 : eps });

    // ---- state and URL

    function limits(key) {
        return key === "x" ? [-state.range, state.range] : RANGES[key];
    }

    function set(changes) {
        state = { ...state, ...changes };
        state.x = Math.min(state.range, Math.max(-state.range, state.x));
        schedule();
    }

    /** The state as `act=egem_n2&rms=0.55`, without what is as in START. */
    function print() {
        const fields = new URLSearchParams();
        const name = hfGem.printName(chosen(state));
        if (name !== hfGem.printName(chosen(START))) fields.set("act", name);
        for (const key of ["rms", "range", "x"]) if (state[key] !== START[key]) fields.set(key, state[key]);
        if (state.beside.length !== START.beside.length) fields.set("beside", state.beside.join(" "));
        return fields.size ? `#${fields}` : "";
    }

    /** Reads what `print` made. Missing and malformed fields are as in START. */
    function parse(hash) {
        const fields = new URLSearchParams(hash.slice(1));
        const read = { ...START };
        const member = hfGem.parseName(fields.get("act") ?? "");
        if (member) Object.assign(read, member, member.family === "gem" ? { eps: START.eps } : {});
        for (const key of ["rms", "range", "x"]) {
            const value = hfGem.readNumber(fields.get(key) ?? "");
            const range = key === "x" ? [-read.range, read.range] : RANGES[key];
            if (hfGem.within(value, range)) read[key] = value;
        }
        const names = fields.get("beside")?.split(" ");
        if (names) read.beside = START.beside.filter((name) => names.includes(name));
        return read;
    }

    // ---- drawing

    let scheduled = 0;
    let saving = 0;

    function schedule() {
        scheduled ||= requestAnimationFrame(() => {
            scheduled = 0;
            render();
        });
        // Browsers limit how often a page may change its URL.
        clearTimeout(saving);
        saving = setTimeout(() => {
            const url = location.pathname + location.search + print();
            if (location.hash !== print()) history.replaceState(null, "", url);
        }, 200);
    }

    const charts = Object.fromEntries(
        all("#charts figure").map((figure) => [
            figure.id,
            new Chart(figure, (x) => set({ x: Number(x.toPrecision(3)) })),
        ]),
    );
    let drawn = "";

    function render() {
        const spec = chosen(state);
        const member = hfGem.member(spec.family, spec.n, spec.eps);
        const activations = [
            { ...member, title: TITLES[spec.family], className: "c-chosen", strong: true },
            ...state.beside.map((name) => ({ ...BASELINES[name], className: `c-${name}`, dashed: name === "relu" })),
        ];
        document.documentElement.dataset.family = spec.family;
        renderControls(spec);
        // Moving the crosshair draws no curve again.
        const now = JSON.stringify({ ...state, x: 0 });
        const cdfs = activations.map((activation) => hfGem.outputCdf(activation, state.rms));
        if (now !== drawn) {
            drawn = now;
            renderNumbers(spec, member);
            drawCurves(spec, activations);
            drawOutputs(activations, cdfs);
        }
        for (const chart of Object.values(charts)) chart.read(state.x);
        renderTable(activations, cdfs);
    }

    function renderControls(spec) {
        for (const radio of all("[name=family]")) radio.checked = radio.value === spec.family;
        for (const box of all("[name=beside]")) box.checked = state.beside.includes(box.value);
        find("#n").value = spec.n;
        find("#n-value").value = spec.n;
        for (const key of ["eps", "rms", "range", "x"]) {
            const value = key === "eps" ? spec.eps : state[key];
            const [slider, entry] = [find(`#${key}`), find(`#${key}-exact`)];
            slider.value = key === "x" ? value / state.range : Math.log10(value);
            slider.setAttribute("aria-valuetext", String(value));
            if (document.activeElement === entry && hfGem.readNumber(entry.value) === value) continue;
            if (document.activeElement === entry && entry.ariaInvalid === "true") continue;
            entry.value = String(value);
            complain(key, "");
        }
        const fixed = spec.family === "gem";
        find("#eps").disabled = find("#eps-exact").disabled = fixed;
        if (fixed) find("#eps-note").textContent = "GEM has ε = 1. Choose E-GEM or SE-GEM to move it.";
    }

    function complain(key, message) {
        find(`#${key}-exact`).ariaInvalid = String(message !== "");
        find(`#${key}-note`).textContent = message;
    }

    function renderNumbers(spec, member) {
        const [n, t] = [spec.n, `<var>x</var><sup>${2 * spec.n}</sup>`];
        const half = hfGem.halfPoint(n, spec.eps);
        const [smallest, largest] = hfGem.slopeRange(spec.family, n);
        const [f, eps] = ["<var>f</var>(<var>x</var>)", String(spec.eps).replace("-", "−")];
        find("#formula").innerHTML =
            spec.family === "segem"
                ? `${f} = <var>x</var> for <var>x</var> ≥ 0, <span>else ${eps} <var>x</var> / (${t} + ${eps})</span>`
                : `${f} = <var>x</var><sup>${2 * n + 1}</sup> / (${t} + ${eps}) <span>for <var>x</var> > 0, else 0</span>`;
        find("#name").value = hfGem.printName(spec);
        const numbers = {
            gain: hfGem.gain(member),
            "largest-slope": largest,
            "smallest-slope": smallest,
            "largest-distance": hfGem.largestDistance(n, spec.eps),
            "half-point": half,
            ratio: half / state.rms,
            "output-rms": hfGem.outputRms(member, state.rms),
        };
        for (const [id, number] of Object.entries(numbers)) find(`#${id}`).textContent = format(number, 7);
    }

    /** The x at which curves are computed: evenly spaced, dense where the gate opens, and close to the step at 0. */
    function positions(range, half, n) {
        const right = [range * 1e-9];
        for (let i = 1; i <= 160; i++) right.push((range * i) / 160);
        for (let k = -240; k <= 240; k++) {
            const x = half * 2 ** (k / (30 * n));
            if (x < range) right.push(x);
        }
        right.sort((a, b) => a - b);
        return [...right.map((x) => -x).reverse(), 0, ...right];
    }

    /** The range of the curves and of two more values, with a margin on the scale that `map` gives. */
    function extent(curves, [low, high], map = (y) => y, unmap = (y) => y) {
        for (const { ys } of curves) {
            for (const y of ys) [low, high] = [Math.min(low, map(y)), Math.max(high, map(y))];
        }
        const pad = 0.06 * (high - low);
        return [unmap(low - pad), unmap(high + pad)];
    }

    function drawCurves(spec, activations) {
        const { range, rms } = state;
        const half = hfGem.halfPoint(spec.n, spec.eps);
        const xs = positions(range, half, spec.n);
        const opens = spec.family === "segem" ? -half : half;
        const least = { value: [0, 0], slope: [0, 1], curvature: [0, 0], gate: [0, 1], distance: [0, 0] };
        for (const [quantity, shown] of Object.entries(least)) {
            const curves = activations.map((f) => ({ ...f, xs, ys: xs.map(f[quantity]), read: f[quantity] }));
            const curved = quantity === "curvature";
            charts[quantity].draw({
                curves,
                x: [-range, range],
                y: curved ? extent(curves, shown, Math.asinh, Math.sinh) : extent(curves, shown),
                scale: curved ? "asinh" : "linear",
                band: [-rms, rms],
                dots: quantity === "gate" ? [{ x: opens, y: 0.5, className: "c-chosen" }] : [],
            });
            describe(quantity, activations, `for x from ${format(-range, 3)} to ${format(range, 3)}`);
        }
    }

    function drawOutputs(activations, cdfs) {
        const high = 3 * state.rms;
        const width = high / NUM_BINS;
        const inputs = Array.from({ length: 200 }, (_, i) => (-high * i) / 200);
        const lowest = Math.min(0, ...activations.flatMap(({ value }) => inputs.map(value)));
        const first = Math.min(Math.floor(lowest / width + 0.5) - 1, -4); // one bin is centred on 0
        const edges = Array.from({ length: NUM_BINS - first + 1 }, (_, i) => (first + i - 0.5) * width);
        const curves = activations.map((f, i) => {
            const heights = edges.map(cdfs[i]);
            const shares = heights.slice(1).map((height, k) => height - heights[k]);
            return {
                ...f,
                filled: f.strong,
                xs: shares.flatMap((_, k) => [edges[k], edges[k + 1]]),
                ys: shares.flatMap((share) => [share, share]),
                read: (y) => shares[Math.floor((y - edges[0]) / width)] ?? 0,
            };
        });
        charts.outputs.draw({ curves, x: [edges[0], edges.at(-1)], y: [3e-4, 1], scale: "log", write: percent });
        describe("outputs", activations, `for normal inputs with an rms of ${format(state.rms, 3)}`);
    }

    /** What a chart shows, for screen readers; the values themselves are in the table. */
    function describe(id, activations, where) {
        const what = find(`#${id} b`).textContent;
        const names = activations.map(({ title }) => title).join(", ");
        find(`#${id} svg`).setAttribute("aria-label", `${what} of ${names} ${where}`);
    }

    function renderTable(activations, cdfs) {
        const { x } = state;
        const digits = narrow.matches ? 3 : 6;
        const rows = {
            "f(x)": (f) => f.value(x),
            "f′(x)": (f) => f.slope(x),
            "f″(x)": (f) => f.curvature(x),
            gate: (f) => f.gate(x),
            distance: (f) => f.distance(x),
            "P(y ≤ x)": (_, i) => cdfs[i](x),
        };
        const heads = activations.map(
            ({ title, className }) => `<th scope="col" class="${className}"><i></i>${title}</th>`,
        );
        find("#readings caption").textContent = `At x = ${format(x, 7)}`;
        find("#readings thead tr").innerHTML = `<td></td>${heads.join("")}`;
        find("#readings tbody").innerHTML = Object.entries(rows)
            .map(([head, read]) => {
                const cells = activations.map((f, i) => {
                    const number = read(f, i);
                    return `<td><data value="${number}">${format(number, digits)}</data></td>`;
                });
                return `<tr><th scope="row">${head}</th>${cells.join("")}</tr>`;
            })
            .join("");
    }

    // ---- controls

    for (const radio of all("[name=family]")) radio.addEventListener("change", () => set({ family: radio.value }));
    for (const box of all("[name=beside]")) {
        box.addEventListener("change", () =>
            set({ beside: START.beside.filter((name) => find(`[value=${name}]`).checked) }),
        );
    }
    find("#n").addEventListener("input", (event) => set({ n: Number(event.target.value) }));

    for (const key of ["eps", "rms", "range", "x"]) {
        find(`#${key}`).addEventListener("input", ({ target }) => {
            const value = key === "x" ? target.value * state.range : 10 ** target.value;
            set({ [key]: Number(value.toPrecision(key === "x" ? 3 : 2)) });
        });
        find(`#${key}-exact`).addEventListener("input", ({ target }) => {
            const value = hfGem.readNumber(target.value);
            const [low, high] = limits(key);
            if (!hfGem.within(value, [low, high])) {
                const got = target.value.slice(0, 20) || "nothing";
                complain(key, `Got ${got}. Enter a number from ${format(low, 3)} to ${format(high, 3)}.`);
                return;
            }
            complain(key, "");
            set({ [key]: value });
        });
        // A refused entry gives way to the number in use.
        find(`#${key}-exact`).addEventListener("blur", schedule);
    }

    find("#zoom").addEventListener("click", () => {
        const { family, n, eps } = chosen(state);
        const half = Number(hfGem.halfPoint(n, eps).toPrecision(2));
        set({ range: Number((4 * half).toPrecision(2)), x: family === "segem" ? -half : half });
    });

    find("#copy").addEventListener("click", async () => {
        const name = find("#name");
        try {
            await navigator.clipboard.writeText(name.value);
        } catch {
            // Without https there is no clipboard API, but there is a selection.
            getSelection().selectAllChildren(name);
            document.execCommand("copy");
        }
        find("#copied").textContent = `Copied ${name.value}`;
        setTimeout(() => (find("#copied").textContent = ""), 2000);
    });

    find("#controls").addEventListener("submit", (event) => event.preventDefault());

    // ---- theme

    const prefersDark = matchMedia("(prefers-color-scheme: dark)");
    const isDark = () =>
        (document.documentElement.dataset.theme || (prefersDark.matches ? "dark" : "light")) === "dark";
    const showTheme = () => (find("#theme").textContent = isDark() ? "Light theme" : "Dark theme");
    prefersDark.addEventListener("change", showTheme);
    find("#theme").addEventListener("click", () => {
        const theme = isDark() ? "light" : "dark";
        document.documentElement.dataset.theme = theme;
        try {
            localStorage.setItem("hf-gem-explorer-theme", theme);
        } catch {
            // Storage is off: the choice holds for this page.
        }
        showTheme();
    });
    showTheme();

    // ---- start

    addEventListener("hashchange", () => set(parse(location.hash)));
    new ResizeObserver(() => {
        drawn = "";
        schedule();
    }).observe(find("#charts"));
    set(parse(location.hash));
})();
