"use strict";

/**
 * A small line chart in SVG: curves with labels at their ends, and a crosshair that reads them.
 *
 * Colours come from the classes of the page, so that a change of theme draws nothing again.
 */
globalThis.hfGemChart = (() => {
    const HEIGHT = 214;
    const MARGIN = { top: 8, right: 112, bottom: 22, left: 42 };
    const LINE = 14; // the distance between two labels

    /** A number for people: significant digits, no trailing zeros, a true minus sign. */
    function format(x, digits) {
        if (!Number.isFinite(x)) return "–";
        const small = Math.abs(x) < 1e-3 || Math.abs(x) >= 10 ** Math.max(digits, 6);
        const [mantissa, exponent] = x.toExponential(digits - 1).split("e");
        const text =
            x !== 0 && small ? `${Number(mantissa)}e${Number(exponent)}` : String(Number(x.toPrecision(digits)) || 0);
        return text.replaceAll("-", "−");
    }

    /** A number that fits beside a label. */
    const short = (y) => format(y, Math.abs(y) < 0.1 ? 2 : 3);
    const percent = (share) => (share < 5e-6 ? "0%" : `${format(share * 100, 3)}%`);

    // ---- scales: how a value becomes a height, which values may have ticks, and how they are written

    function linearTicks(low, high, count) {
        const rough = (high - low) / count;
        const magnitude = 10 ** Math.floor(Math.log10(rough));
        const step = [1, 2, 5, 10].find((factor) => factor * magnitude >= rough) * magnitude;
        const ticks = [];
        for (let k = Math.ceil(low / step); k * step <= high * (1 + 1e-12); k++) ticks.push(k * step);
        return ticks;
    }

    /** Candidates, the most important first: 0, 1, the powers of 10 from the largest, and 5 and 2 times these. */
    function asinhTicks() {
        const powers = Array.from({ length: 18 }, (_, i) => 10 ** (14 - i));
        const positive = [1, ...powers, ...powers.flatMap((power) => [5 * power, 2 * power])];
        return [0, ...positive.flatMap((y) => [y, -y])];
    }

    const SCALES = {
        linear: { map: (y) => y, ticks: (low, high) => linearTicks(low, high, 4), write: (y) => format(y, 3) },
        asinh: { map: Math.asinh, ticks: asinhTicks, write: (y) => format(y, 3) },
        log: { map: (y) => Math.log(Math.max(y, 1e-30)), ticks: () => [1, 0.1, 0.01, 1e-3], write: percent },
    };

    /** Moves heights apart to at least a distance, inside a range, in their order. */
    function spread(heights, gap, low, high) {
        const order = heights.map((_, i) => i).sort((a, b) => heights[a] - heights[b] || a - b);
        const placed = [...heights];
        let floor = low;
        for (const i of order) floor = (placed[i] = Math.max(placed[i], floor)) + gap;
        let ceiling = high;
        for (const i of order.reverse()) ceiling = (placed[i] = Math.min(placed[i], ceiling)) - gap;
        return placed;
    }

    class Chart {
        /**
         * @param {HTMLElement} figure Where the chart goes.
         * @param {(x: number) => void} onMove Called with the x under the pointer.
         */
        constructor(figure, onMove) {
            this.svg = figure.querySelector("svg");
            this.svg.innerHTML = "<g></g><g></g>";
            [this.plot, this.cross] = this.svg.children;
            this.clip = `clip-${figure.id}`;
            const move = (event) => {
                if (!this.data) return;
                const x = this.unmap(event.clientX - this.svg.getBoundingClientRect().left);
                if (this.shows(x)) onMove(x);
            };
            this.svg.addEventListener("pointermove", move);
            this.svg.addEventListener("pointerdown", move);
        }

        shows(x) {
            return x >= this.data.x[0] && x <= this.data.x[1];
        }

        /**
         * Draws everything but the crosshair.
         *
         * @param data x, y: ranges. scale: a name in SCALES. band: a range of x to shade. dots: points to mark.
         *   curves: className, title, strong, dashed, filled, xs, ys, read(x). write: how `read` prints a number.
         */
        draw(data) {
            this.data = data;
            this.width = this.svg.clientWidth;
            this.svg.setAttribute("viewBox", `0 0 ${this.width} ${HEIGHT}`);
            const scale = SCALES[data.scale];
            const [left, right] = [MARGIN.left, this.width - MARGIN.right];
            const [top, bottom] = [MARGIN.top, HEIGHT - MARGIN.bottom];
            const [x0, x1] = data.x;
            const [y0, y1] = data.y.map(scale.map);
            this.mapX = (x) => left + ((x - x0) / (x1 - x0)) * (right - left);
            this.unmap = (place) => x0 + ((place - left) / (right - left)) * (x1 - x0);
            this.mapY = (y) => bottom - ((scale.map(y) - y0) / (y1 - y0)) * (bottom - top);
            this.ends = data.curves.map(({ ys }) => Math.min(bottom, Math.max(top, this.mapY(ys.at(-1)))));
            // The chosen curve covers the others. A dashed one covers it, so that both show where they coincide.
            const rank = ({ dashed, strong }) => (dashed ? 2 : strong ? 1 : 0);
            const painted = [...data.curves].sort((a, b) => rank(a) - rank(b));
            this.labels = spread(this.ends, LINE, top + 4, bottom - 2);
            this.plot.innerHTML = [
                `<clipPath id="${this.clip}"><rect x="${left}" y="${top - 2}" width="${right - left}" height="${bottom - top + 4}"/></clipPath>`,
                this.bandSvg(top, bottom, left, right),
                this.ticksSvg(scale, left, right, top, bottom),
                `<g clip-path="url(#${this.clip})">${painted.map((curve) => this.curveSvg(curve, bottom)).join("")}`,
                `${(data.dots ?? []).map((dot) => this.dotSvg(dot, "mark")).join("")}</g>`,
                data.curves.map((curve, i) => this.leaderSvg(curve, i, right)).join(""),
            ].join("");
        }

        /** Moves the crosshair to x, and prints the value of each curve there beside its label. */
        read(x) {
            const { curves, write = short } = this.data;
            const labels = curves.map((curve, i) => this.labelSvg(curve, i, this.shows(x) ? write(curve.read(x)) : ""));
            const dots = curves.map((curve) => this.dotSvg({ x, y: curve.read(x), className: curve.className }, ""));
            const crosshair = `${this.placeSvg(x)}<g clip-path="url(#${this.clip})">${dots.join("")}</g>`;
            this.cross.innerHTML = (this.shows(x) ? crosshair : "") + labels.join("");
            for (const tick of this.plot.querySelectorAll(".below")) {
                const covered = this.shows(x) && Math.abs(tick.getAttribute("x") - this.mapX(x)) < 26;
                tick.style.visibility = covered ? "hidden" : "";
            }
        }

        labelSvg({ title, strong }, i, value) {
            const y = this.labels[i] + 4;
            const name = `<text x="${this.width - MARGIN.right + 13}" y="${y}">${title}</text>`;
            return `<g class="${strong ? "strong" : ""}">${name}<text class="value" x="${this.width - 1}" y="${y}">${value}</text></g>`;
        }

        ticksSvg(scale, left, right, top, bottom) {
            const line = (tick, ends) => `<line class="${tick === 0 ? "axis" : "grid"}" ${ends}/>`;
            const parts = [];
            const taken = [];
            for (const tick of scale.ticks(...this.data.y)) {
                const y = this.mapY(tick);
                if (y < top - 1 || y > bottom + 1 || taken.some((other) => Math.abs(other - y) < 20)) continue;
                taken.push(y);
                parts.push(line(tick, `x1="${left}" x2="${right}" y1="${y}" y2="${y}"`));
                parts.push(`<text class="tick" text-anchor="end" x="${left - 6}" y="${y + 4}">${scale.write(tick)}</text>`);
            }
            for (const tick of linearTicks(...this.data.x, 4)) {
                const [x, text] = [this.mapX(tick), format(tick, 3)];
                parts.push(line(tick, `x1="${x}" x2="${x}" y1="${top}" y2="${bottom}"`));
                parts.push(`<text class="tick below" text-anchor="middle" x="${x}" y="${bottom + 15}">${text}</text>`);
            }
            return parts.join("");
        }

        /** The line of the crosshair, and its x below it. */
        placeSvg(x) {
            const [place, bottom] = [this.mapX(x), HEIGHT - MARGIN.bottom];
            const line = `<line class="cross" x1="${place}" x2="${place}" y1="${MARGIN.top}" y2="${bottom}"/>`;
            return `${line}<text class="place" text-anchor="middle" x="${place}" y="${bottom + 15}">${format(x, 3)}</text>`;
        }

        bandSvg(top, bottom, left, right) {
            if (!this.data.band) return "";
            const [low, high] = this.data.band.map((x) => Math.min(right, Math.max(left, this.mapX(x))));
            return `<rect class="band" x="${low}" y="${top}" width="${high - low}" height="${bottom - top}"/>`;
        }

        curveSvg({ className, strong, dashed, filled, xs, ys }, bottom) {
            const far = 4 * HEIGHT; // the clip path hides all that is this far away
            const points = xs.map((x, i) => {
                const y = Math.min(far, Math.max(-far, this.mapY(ys[i])));
                return `${this.mapX(x).toFixed(2)} ${y.toFixed(2)}`;
            });
            const path = `M${points.join("L")}`;
            const [first, last] = [this.mapX(xs[0]), this.mapX(xs.at(-1))];
            const area = filled
                ? `<path class="area ${className}" d="${path}L${last} ${bottom}L${first} ${bottom}Z"/>`
                : "";
            return `${area}<path class="curve ${className}${strong ? " strong" : ""}${dashed ? " dashed" : ""}" d="${path}"/>`;
        }

        dotSvg({ x, y, className }, kind) {
            return `<circle class="dot ${kind} ${className}" cx="${this.mapX(x)}" cy="${this.mapY(y)}" r="${kind ? 5 : 3}"/>`;
        }

        leaderSvg({ className, strong }, i, right) {
            const style = `class="curve ${className}${strong ? " strong" : ""}"`;
            return `<path ${style} d="M${right + 1} ${this.ends[i]}L${right + 5} ${this.labels[i]}L${right + 10} ${this.labels[i]}"/>`;
        }
    }

    return { Chart, format, percent };
})();
