"use strict";

/**
 * The mathematics of the explorer: the functions, their derivatives, gains, distributions and names.
 *
 * No DOM in here. A page loads it as a plain script, which also works from file://, and finds `hfGem`; Node requires
 * it. `tests/test_explorer.py` compares all of it with the Python package.
 *
 * An activation f(x) = x gate(x) is an object of functions of a number:
 *   gate, shut          f(x) / x, and 1 minus that, computed without cancellation
 *   slope, curvature    the first and second derivative
 *   value, distance     f(x), and how far that is from ReLU
 * and of two numbers: f falls up to x = dip and rises from there on, and is nowhere further than reach from ReLU.
 */
globalThis.hfGem = (() => {
    const LIMITS = { n: [1, 32], eps: [1e-12, 1e4] };
    const TITLES = { gem: "GEM", egem: "E-GEM", segem: "SE-GEM" };
    const DEFAULT_EPS = 1e-4;

    const within = (x, [low, high]) => x >= low && x <= high;
    const normalDensity = (x) => Math.exp((-x * x) / 2) / Math.sqrt(2 * Math.PI);

    /** The probability that a unit normal number is at most x, to a few roundings. */
    function normalCdf(x) {
        if (x < -3) return normalTail(-x);
        if (x > 3) return 1 - normalTail(x);
        let [term, sum] = [x, x];
        for (let k = 3; Math.abs(term) > 1e-17 * Math.abs(sum); k += 2) {
            term *= (x * x) / k;
            sum += term;
        }
        return 0.5 + normalDensity(x) * sum;
    }

    /** 1 - normalCdf(x) for x >= 3: Laplace's continued fraction. */
    function normalTail(x) {
        let fraction = x;
        for (let k = 60; k > 0; k--) fraction = x + k / fraction;
        return normalDensity(x) / fraction;
    }

    /** The x between two numbers up to which a condition holds, or from which on it does if `low` fails it. */
    function boundary(holds, low, high) {
        const below = holds(low);
        for (let step = 0; step < 64; step++) {
            const middle = (low + high) / 2;
            if (holds(middle) === below) low = middle;
            else high = middle;
        }
        return (low + high) / 2;
    }

    function activation(functions) {
        const { gate, shut } = functions;
        return {
            value: (x) => x * gate(x),
            distance: (x) => Math.abs(x) * (x > 0 ? shut(x) : gate(x)),
            ...functions,
        };
    }

    // ---- the family

    /** Where the gate is half open. */
    const halfPoint = (n, eps) => eps ** (1 / (2 * n));

    /** A member of the family. The gate is a function of x over its half point, so that no power of eps overflows. */
    function member(family, n, eps) {
        const half = halfPoint(n, eps);
        const open = (x) => 1 / (1 + (half / x) ** (2 * n)); // the s of the documentation, for x > 0
        const closed = (x) => 1 / (1 + (x / half) ** (2 * n)); // 1 - s
        const bend = (x) => (2 * n * open(x) * closed(x) * (1 + 2 * n - 4 * n * open(x))) / x;
        const reach = largestDistance(n, eps);
        if (family === "segem") {
            return activation({
                gate: (x) => (x < 0 ? closed(-x) : 1),
                shut: (x) => (x < 0 ? open(-x) : 0),
                slope: (x) => (x < 0 ? closed(-x) * (1 - 2 * n * open(-x)) : 1),
                curvature: (x) => (x < 0 ? bend(-x) : 0),
                dip: -half * (2 * n - 1) ** (-1 / (2 * n)),
                reach,
            });
        }
        return activation({
            gate: (x) => (x > 0 ? open(x) : 0),
            shut: (x) => (x > 0 ? closed(x) : 1),
            slope: (x) => (x > 0 ? open(x) * (1 + 2 * n * closed(x)) : 0),
            curvature: (x) => (x > 0 ? bend(x) : 0),
            dip: 0,
            reach,
        });
    }

    /** The smallest and the largest slope of a member. */
    function slopeRange(family, n) {
        return family === "segem" ? [-((2 * n - 1) ** 2) / (8 * n), 1] : [0, (2 * n + 1) ** 2 / (8 * n)];
    }

    /** The largest distance of a member to ReLU. */
    const largestDistance = (n, eps) => (halfPoint(n, eps) * (2 * n - 1) ** ((2 * n - 1) / (2 * n))) / (2 * n);

    // ---- the activations beside it

    const sigmoid = (x) => (x < 0 ? Math.exp(x) / (1 + Math.exp(x)) : 1 / (1 + Math.exp(-x)));

    /** 1 - tanh(log(1 + e^x)), the part of x that Mish takes off. */
    function mishShut(x) {
        const u = Math.exp(-Math.abs(x));
        return x < 0 ? 2 / (2 + u * (2 + u)) : (2 * u * u) / (1 + 2 * u * (1 + u));
    }

    function mishGate(x) {
        const u = Math.exp(-Math.abs(x));
        return x < 0 ? (u * (2 + u)) / (2 + u * (2 + u)) : (1 + 2 * u) / (1 + 2 * u * (1 + u));
    }

    const BASELINES = {
        relu: activation({
            title: "ReLU",
            gate: (x) => (x > 0 ? 1 : 0),
            shut: (x) => (x > 0 ? 0 : 1),
            slope: (x) => (x > 0 ? 1 : 0),
            curvature: () => 0,
            dip: 0,
        }),
        gelu: activation({
            title: "GELU",
            gate: normalCdf,
            shut: (x) => normalCdf(-x),
            slope: (x) => normalCdf(x) + x * normalDensity(x),
            curvature: (x) => (2 - x * x) * normalDensity(x),
        }),
        silu: activation({
            title: "SiLU",
            gate: sigmoid,
            shut: (x) => sigmoid(-x),
            slope: (x) => sigmoid(x) * (1 + x * sigmoid(-x)),
            curvature: (x) => sigmoid(x) * sigmoid(-x) * (2 + x * (sigmoid(-x) - sigmoid(x))),
        }),
        mish: activation({
            title: "Mish",
            gate: mishGate,
            shut: mishShut,
            slope: (x) => mishGate(x) + x * mishShut(x) * (1 + mishGate(x)) * sigmoid(x),
            curvature(x) {
                const rise = mishShut(x) * (1 + mishGate(x)) * sigmoid(x); // of the gate
                return rise * (2 + x * (sigmoid(-x) - 2 * mishGate(x) * sigmoid(x)));
            },
        }),
    };
    for (const baseline of Object.values(BASELINES)) {
        baseline.dip ??= boundary((x) => baseline.slope(x) < 0, -3, 0);
        baseline.reach = 0.5; // Mish is the furthest, by 0.31
    }

    // ---- on normal inputs

    // A trapezoidal sum over log|z|, as in hf_gem.gain. Up to n = 32 the poles of a gate are pi/64 away at least, so that
    // this step is enough for all digits; below e^-14 a square has nothing to add.
    const STEP = 1 / 256;
    const NODES = [];
    for (let w = -14; w < Math.log(40); w += STEP)
        NODES.push([Math.exp(w), normalDensity(Math.exp(w)) * Math.exp(w) * STEP]);

    /** The root mean square of the outputs on normal inputs with a root mean square of `rms`. */
    function outputRms({ value }, rms) {
        let moment = 0;
        for (const [z, weight] of NODES) moment += weight * (value(z * rms) ** 2 + value(-z * rms) ** 2);
        return Math.sqrt(moment);
    }

    /** `hf_gem.gain`: what the weights of a layer are drawn with to keep the second moment of a unit normal input. */
    const gain = (f) => 1 / outputRms(f, 1);

    /** The distribution function of the outputs on normal inputs with a root mean square of `rms`. */
    function outputCdf({ value, dip, reach }, rms) {
        const lowest = value(dip);
        const far = Math.min(dip, -40 * rms); // no input is further out
        return (y) => {
            if (y < lowest) return 0;
            // Beyond the dip, values may be so close to the lowest that they are rounded to it.
            const right = y === lowest ? dip : boundary((x) => value(x) <= y, dip, Math.max(y, 0) + reach);
            const left = y < 0 ? boundary((x) => value(x) <= y, far, dip) : -Infinity;
            return normalCdf(right / rms) - normalCdf(left / rms);
        };
    }

    // ---- names

    const NAME = /^(gem|egem|segem)(?:_n(\d+))?(?:_eps(\d+(?:\.\d*)?(?:em?[+-]?\d+)?))?$/i;

    /** A number as people and names write it: 0.01, 1e-6, 1em6. NaN if it is none. */
    const readNumber = (text) => (text.trim() ? Number(text.trim().toLowerCase().replace("em", "e-")) : NaN);

    /** An eps as Python prints it, with m for the minus of an exponent. */
    function printEps(eps) {
        const [mantissa, exponent] = eps.toExponential().split("e");
        if (exponent >= -4 && exponent < 16) return String(eps);
        return `${mantissa}e${exponent.replace("-", "m").replace("+", "")}`;
    }

    /** The canonical name of a member, as `GemSpec.name` in hf_gem/family/names.py. */
    function printName({ family, n, eps }) {
        const given = family !== "gem" && eps !== DEFAULT_EPS;
        return family + (n === 1 ? "" : `_n${n}`) + (given ? `_eps${printEps(eps)}` : "");
    }

    /** The family, n and eps of a name; null if it has none, or n or eps is outside LIMITS. */
    function parseName(name) {
        const match = NAME.exec(name);
        if (!match) return null;
        const family = match[1].toLowerCase();
        const n = Number(match[2] ?? 1);
        if (family === "gem" && match[3]) return null;
        const eps = family === "gem" ? 1 : match[3] ? readNumber(match[3]) : DEFAULT_EPS;
        return within(n, LIMITS.n) && within(eps, LIMITS.eps) ? { family, n, eps } : null;
    }

    return {
        ...{ LIMITS, TITLES, DEFAULT_EPS, BASELINES, within, normalCdf },
        ...{ member, halfPoint, slopeRange, largestDistance, gain, outputRms, outputCdf },
        ...{ readNumber, printEps, printName, parseName },
    };
})();

if (typeof module === "object") module.exports = globalThis.hfGem;
