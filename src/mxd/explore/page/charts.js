// The page's charts: SVG with real text (the map's canvas is in overview.js). Colours are classes: k-KIND, k-s1 … k-s6, k-one, k-minus.
"use strict";
(() => {
  const { h, svg, fmt } = mxd;

  const NAMES = {
    mxd: "MxD", "mxd-pk": "MxD-PK", "cp-mumoe": "CP-μMoE", mov: "MoV", transcoder: "Transcoder",
    "skip-transcoder": "Skip tr.", "topk-sae": "TopK SAE", dense: "Dense", additive: "Additive",
  };
  const [SQUARE, UP] = [[[-.9, -.9], [.9, -.9], [.9, .9], [-.9, .9]], [[0, -1.15], [1.1, .85], [-1.1, .85]]];
  const [DIAMOND, DOWN] = [[[0, -1.25], [1.25, 0], [0, 1.25], [-1.25, 0]], [[-1.1, -.85], [1.1, -.85], [0, 1.15]]];
  const PENTAGON = [[0, -1.2], [1.15, -.35], [.7, 1], [-.7, 1], [-1.15, -.35]];
  const HEXAGON = [[.6, -1.1], [1.2, 0], [.6, 1.1], [-.6, 1.1], [-1.2, 0], [-.6, -1.1]];
  const CORNERS = {
    transcoder: SQUARE, "skip-transcoder": UP, "topk-sae": DIAMOND, "cp-mumoe": DOWN, "mxd-pk": PENTAGON, mov: HEXAGON, additive: SQUARE,
    s2: SQUARE, s3: UP, s4: DIAMOND, s5: DOWN, s6: PENTAGON,
  };
  const WARP = {
    linear: [(v) => v, (u) => u], log: [Math.log10, (u) => 10 ** u], log2: [Math.log2, (u) => 2 ** u],
    symlog: [(v, c) => Math.asinh(v / c), (u, c) => c * Math.sinh(u)],
  };
  const clamp = (v, low, high) => Math.min(Math.max(v, low), high);

  /** A number on an axis: 0, 0.02, 1,500, 1e−5. */
  function tick(v) {
    const size = Math.abs(v);
    if (size && (size < 1e-3 || size >= 1e6)) return v.toExponential().replace(/-/g, "−").replace("e+", "e");
    return v.toLocaleString("en-GB", { maximumSignificantDigits: 4 }).replace("-", "−");
  }

  /** Round numbers from low to high, the most wanted first. */
  function candidates(low, high, kind, c, about) {
    const found = [];
    if (kind === "log2") for (let e = Math.ceil(Math.log2(low) - 1e-9); 2 ** e <= high * 1.0001; e++) found.push(2 ** e);
    else if (kind === "log") {
      const steps = high / low < 8 ? [1, 2, 3, 5, 7] : high / low < 100 ? [1, 2, 5] : high / low < 1000 ? [1, 3] : [1];
      for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++) for (const s of steps) found.push(Number(`${s}e${e}`));
    } else if (kind === "symlog") {
      const [first, last] = [c, Math.max(high, -low)].map((v) => Math.floor(Math.log10(v)));
      found.push(0);
      for (const s of [1, 3]) for (let e = last; e >= first; e--) found.push(Number(`${s}e${e}`), -Number(`${s}e${e}`));
    } else {
      const raw = (high - low) / about || 1, size = 10 ** Math.floor(Math.log10(raw));
      const step = size * ([1, 2, 5, 10].find((s) => size * s >= raw * .999) || 10);
      for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) found.push(Number((i * step).toPrecision(12)));
    }
    return found.filter((t) => t >= low - Math.abs(low) * 1e-9 && t <= high + Math.abs(high) * 1e-9);
  }

  /**
   * A scale from values to pixels, held within its ends.
   * @param {number} low @param {number} high ends of the values @param {number} from @param {number} to ends in pixels
   * @param {"linear"|"log"|"log2"|"symlog"} [kind] @param {number} [c] half-width of symlog's linear middle
   * @returns {((v: number) => number) & {invert(px: number): number, ticks(about?: number, gap?: number): number[], low, high, from, to}}
   */
  function scale(low, high, from, to, kind = "linear", c = 1) {
    const [warp, back] = WARP[kind], a = warp(low, c), span = warp(high, c) - a || 1;
    const at = (v) => from + clamp((warp(v, c) - a) / span, 0, 1) * (to - from);
    at.invert = (px) => back(a + clamp((px - from) / (to - from), 0, 1) * span, c);
    at.ticks = (about = 5, gap = 30) => {
      const kept = [];
      for (const t of candidates(low, high, kind, c, about)) if (kept.every((k) => Math.abs(at(k) - at(t)) >= gap)) kept.push(t);
      return kept.sort((x, y) => x - y);
    };
    return Object.assign(at, { low, high, from, to });
  }

  const px = (v) => v.toFixed(1);
  const tip = (title) => title && svg("title", {}, title);
  const text = (x, y, content, css = "soft", anchor = "start") =>
    svg("text", { x: px(x), y: px(y), class: css, "text-anchor": anchor }, content);
  const line = (points, css) => svg("polyline", { points: points.map(([x, y]) => `${px(x)},${px(y)}`).join(" "), class: css });
  const rect = (x, y, width, height, css, title) =>
    svg("rect", { x: px(x), y: px(y), width: px(Math.max(width, 0)), height: px(Math.max(height, 0)), class: css }, tip(title));
  const root = (width, height, title, about, ...parts) =>
    svg("svg", { class: "chart", width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title },
      tip(title), about && svg("desc", {}, about), parts);

  /** A marker of series `kind` at (x, y): hue and shape; `hollow` for controls, published points, a second series of a kind. */
  function marker(x, y, kind, { size = 5, hollow = false, title = "" } = {}) {
    const css = `${hollow || kind === "dense" || kind === "additive" ? "hollow" : "full"} k-${kind}`;
    if (!CORNERS[kind]) return svg("circle", { cx: px(x), cy: px(y), r: size, class: css }, tip(title));
    const points = CORNERS[kind].map(([a, b]) => `${px(x + size * a)},${px(y + size * b)}`).join(" ");
    return svg("polygon", { points, class: css }, tip(title));
  }
  /** The marker of `kind` as a little picture for legends and tables. @returns {SVGElement} */
  const glyph = (kind, hollow = false) =>
    svg("svg", { class: "glyph", width: 14, height: 14, viewBox: "0 0 14 14", "aria-hidden": "true" }, marker(7, 7, kind, { hollow }));

  /**
   * A box of a fixed height that draws itself at its own width, again whenever that changes.
   * @param {number} height px, kept from the start so that nothing jumps @param {(width: number) => Node} draw
   * @returns {HTMLElement & {redraw(): void}}
   */
  function fit(height, draw) {
    const el = h("div", { class: "chartbox", style: { "min-height": `${height}px` } });
    let width = 0;
    el.redraw = () => width && el.replaceChildren(draw(width));
    new ResizeObserver(([entry]) => {
      const now = Math.round(entry.contentRect.width);
      if (!now || now === width) return;
      width = now;
      el.redraw();
    }).observe(el);
    return el;
  }

  /** Both axes of a chart: rules and numbers at y's ticks, numbers below x, labels with units. */
  function frame(x, y, xLabel, yLabel, { xTicks = x.ticks(6, 44), yFormat = tick, xFormat = tick } = {}) {
    return [
      y.ticks(5, 18).map((t) => [line([[x.from, y(t)], [x.to, y(t)]], "rule"), text(x.from - 6, y(t) + 4, yFormat(t), "soft", "end")]),
      line([[x.from, y.from], [x.to, y.from]], "axis"),
      xTicks.map((t) => [line([[x(t), y.from], [x(t), y.from + 4]], "axis"), text(x(t), y.from + 16, xFormat(t), "soft", "middle")]),
      text((x.from + x.to) / 2, y.from + 33, xLabel, "soft", "middle"), text(2, 12, yLabel),
    ];
  }
  /** Labels in a column at `x`, moved apart so that none overlap, each with a hairline to its height: [{y, text, kind}]. */
  function labels(x, wanted, top, bottom) {
    const sorted = [...wanted].sort((a, b) => a.y - b.y), places = [];
    const gap = Math.min(14, (bottom - top) / Math.max(sorted.length - 1, 1));
    for (const { y } of sorted) places.push(Math.max(y, places.length ? places[places.length - 1] + gap : top));
    for (let i = places.length - 1, limit = bottom; i >= 0; limit = places[i] - gap, i--) places[i] = Math.min(places[i], limit);
    const lead = (w, i) => line([[x - 10, w.y], [x - 3, places[i]]], `lead k-${w.kind}`);
    return sorted.map((w, i) => [lead(w, i), text(x, places[i] + 4, w.text, `hue k-${w.kind}`)]);
  }
  /** Pixels that labels of these names take. */
  const room = (names) => 20 + 6.6 * Math.min(24, Math.max(3, ...names.map((n) => n.length)));

  /** Ends of a logarithmic axis around `values`; symlog, with its c, where some are not positive. */
  function logEnds(values) {
    const known = values.filter((v) => typeof v === "number" && Number.isFinite(v)), positive = known.filter((v) => v > 0);
    const [least, high] = [Math.min(...known), Math.max(1e-4, ...positive)], low = Math.min(high, ...positive);
    if (least <= 0) return { low: least * 1.4, high: high * 1.4, kind: "symlog", c: Math.max(low, high / 300) };
    if (high / low >= 2) return { low: low / 1.4, high: high * 1.4, kind: "log", c: 1 };
    return { low: Math.sqrt(low * high) / 2, high: Math.sqrt(low * high) * 2, kind: "log", c: 1 };
  }

  /**
   * Excess loss over K with 95 % bars; a series has hue, marker and a label beside it; a level is a dashed line across (no K).
   * @param {{series: {name, kind, hollow?, points: {k, y, low, high, title?}[]}[], levels: {name, kind, y, low, high}[]}} data
   *   y, low, high in nats; null unknown @returns {HTMLElement}
   */
  function frontier({ series, levels }) {
    const height = 300, names = [...series, ...levels].map((s) => s.name), points = series.flatMap((s) => s.points);
    const ends = logEnds([...points, ...levels].flatMap((p) => [p.y, p.low, p.high]));
    const ks = points.length ? [...new Set(points.map((p) => p.k))].sort((a, b) => a - b) : [1], alone = ks.length > 1 ? 1.2 : 2;
    const within = ends.kind === "symlog" ? `, linear within ±${tick(Number(ends.c.toPrecision(2)))}` : "";
    return fit(height, (width) => {
      const x = scale(ks[0] / alone, ks[ks.length - 1] * alone, 54, width - room(names), "log2");
      const y = scale(ends.low, ends.high, height - 40, 26, ends.kind, ends.c), wanted = [];
      const band = (l) => {
        wanted.push({ y: y(l.y), text: l.name, kind: l.kind });
        return [l.low !== null && rect(x.from, y(l.high), x.to - x.from, y(l.low) - y(l.high), `band k-${l.kind}`),
          line([[x.from, y(l.y)], [x.to, y(l.y)]], `line dash k-${l.kind}`)];
      };
      const curve = ({ name, kind, hollow, points: all }, i) => {
        const own = [...all].sort((a, b) => a.k - b.k);
        // Moved sideways a little, so that bars of one K do not hide each other.
        const at = own.map((p) => [x(p.k) + 7 * (i - (series.length - 1) / 2), y(p.y)]);
        wanted.push({ y: at[own.length - 1][1], text: name, kind });
        return [own.length > 1 && line(at, `line k-${kind}${hollow ? " dots" : ""}`), own.map((p, j) => [
          p.low !== null && line([[at[j][0], y(p.low)], [at[j][0], y(p.high)]], `bar k-${kind}`),
          marker(...at[j], kind, { hollow, title: p.title || `${name}, K ${p.k}: ${tick(p.y)} nats` })])];
      };
      return root(width, height, "Excess cross-entropy over K", "Lower is better; bars are 95 % intervals.",
        frame(x, y, "K, units active per token (log)", `excess cross-entropy, nats (log${within})`, { xTicks: ks }),
        ends.kind === "symlog" && line([[x.from, y(0)], [x.to, y(0)]], "axis"), levels.map(band), series.map(curve),
        labels(x.to + 14, wanted, 30, height - 44));
    });
  }

  /**
   * How often units fire: a step line per student over log10 share of tokens, a bar "0" for the dead, a rule at 1/T.
   * @param {{series: {name, kind, edges: number[], counts: number[], dead: number, dash?: boolean}[], rule: number|null}} data
   *   edges: log10 of the share of tokens; counts: units; rule: 1/T (a share) @returns {HTMLElement} the chart above its legend
   */
  function steps({ series, rule }) {
    const height = 264, shown = series.map((s) => ({ ...s, n: s.dead + s.counts.reduce((a, b) => a + b, 0) || 1 }));
    const top = 112 * Math.max(.01, ...shown.flatMap((s) => s.counts.map((c) => c / s.n)));
    const low = Math.floor(Math.min(rule ? Math.log10(rule) : -3, ...shown.map((s) => s.edges[s.counts.findIndex((c) => c > 0)] ?? -3)));
    const whole = (t) => (t === 0 ? "1" : Number.isInteger(t) ? `1e−${-t}` : "");
    const draw = (width) => {
      const bar = Math.min(28, 60 / shown.length);
      const x = scale(low, 0, 74 + bar * shown.length, width - 12), y = scale(0, top, height - 40, 26);
      const student = (s, i) => {
        const share = 100 * s.dead / s.n, mode = s.counts.indexOf(Math.max(...s.counts)), at = (b) => y(100 * s.counts[b] / s.n);
        const points = s.counts.flatMap((_, b) => (s.edges[b + 1] > low ? [[x(s.edges[b]), at(b)], [x(s.edges[b + 1]), at(b)]] : []));
        const title = `${s.name}: ${fmt.int(s.counts[mode])} units in the commonest bin, from 1e${s.edges[mode]} of tokens`;
        return [
          rect(48 + bar * i, y(share), bar - 2, y.from - y(share), `fill k-${s.kind}`, `${s.name}: ${fmt.num(share)} % dead`),
          share > top && text(47 + bar * (i + .5), y.to - 2, "↑", "hue k-" + s.kind, "middle"),
          line(points, `line k-${s.kind}${s.dash ? " dash" : ""}`),
          marker(x((s.edges[mode] + s.edges[mode + 1]) / 2), at(mode), s.kind, { hollow: s.dash, title }),
        ];
      };
      const single = rule && x(Math.log10(rule));
      return root(width, height, "How often units fire", "Per cent of each student's units in each bin of firing frequency.",
        frame(x, y, "share of tokens a unit fires on (log)", "units, % of the student's", { xFormat: whole }),
        text(47 + bar * shown.length / 2, y.from + 16, "0 (dead)", "soft", "middle"), shown.map(student),
        rule && [line([[single, y.from], [single, y.to]], "axis dots"), text(single + 4, y.to + 10, "1/T: one firing")]);
    };
    const entry = (s) => h("li", null, glyph(s.kind, s.dash), ` ${s.name}: ${fmt.int(s.dead)} of ${fmt.int(s.n)} dead`);
    return h("div", null, fit(height, draw), h("ul", { class: "legend" }, shown.map(entry)));
  }

  /**
   * A unit's activations: equal bins of (0, max], firings on a log axis, rules at the band edges, and a line that can be moved.
   * @param {{max: number, counts: number[], edges?: number[], bands?: string[], label?: string, height?: number}} data
   *   max, edges: values of a; counts: firings per bin @returns {HTMLElement & {mark(a: number|null): void}}
   */
  function hist({ max, counts, edges = [], bands = [], label = "activation a", height = 150 }) {
    let marked = null, hair = null, x;
    const value = (i) => tick(Number((max * i / counts.length).toPrecision(3)));
    const el = fit(height, (width) => {
      x = scale(0, max || 1, 40, width - 8);
      const y = scale(.7, Math.max(1, ...counts) * 1.5, height - 38, 24, "log"), w = (x.to - x.from) / counts.length;
      const bar = (c, i) => c > 0 && rect(x.from + i * w, y(c), Math.max(w - .5, .5), y.from - y(c), "fill k-one",
        `${value(i)} – ${value(i + 1)}: ${fmt.int(c)} firings`);
      const edge = (e, i) =>
        [line([[x(e), y.from], [x(e), y.to]], "axis dots"), bands[i] && text(x(e) + 2, y.to + 8, bands[i], "soft tiny")];
      hair = svg("line", { y1: y.from, y2: y.to - 4, class: "hair" });
      el.mark(marked);
      return root(width, height, "Histogram of the unit's activations", `${counts.length} bins; band edges dotted.`,
        frame(x, y, label, "firings (log)"), counts.map(bar), edges.filter((e) => e > 0 && e < max).map(edge), hair);
    });
    el.mark = (a) => {
      marked = a;
      if (!hair) return;
      hair.setAttribute("visibility", a === null ? "hidden" : "visible");
      if (a !== null) for (const end of ["x1", "x2"]) hair.setAttribute(end, px(x(a)));
    };
    return el;
  }

  /**
   * Labelled bars, one a row, from a common zero; the whisker is ± sd.
   * @param {{label: string|Node, value: number, sd?: number, text?: string, title?: string, kind?: string}[]} items
   * @param {{unit?: string, max?: number, label?: string}} [options] max: value of a full bar (default: the largest here)
   * @returns {HTMLElement} a list
   */
  function bars(items, { unit = "", max, label = "" } = {}) {
    const full = max || Math.max(1e-12, ...items.map((i) => Math.abs(i.value) + (i.sd || 0)));
    const both = items.some((i) => i.value < 0) && items.some((i) => i.value > 0), half = both ? 50 : 100;
    const x = (v) => (both ? 50 + half * v / full : half * Math.abs(v) / full);
    const row = ({ label: name, value, sd, text: said, title, kind = value < 0 ? "minus" : "one" }) => {
      const from = Math.min(x(0), x(value)), reach = half * (sd || 0) / full;
      const words = `${fmt.num(value)}${sd ? ` ±${fmt.num(sd, 2)}` : ""} ${unit}`;
      return h("li", { title: title || null }, h("span", { class: "name", dir: "auto" }, name),
        svg("svg", { class: "barline", viewBox: "0 0 100 10", preserveAspectRatio: "none", "aria-hidden": "true" },
          rect(from, 1, Math.abs(x(value) - x(0)), 8, `fill k-${kind}`),
          sd > 0 && line([[Math.max(x(value) - reach, 0), 5], [x(value) + reach, 5]], "whisker")),
        h("span", { class: "num" }, said ?? words.trim()));
    };
    return h("ul", { class: "bars", "aria-label": label || null }, items.map(row));
  }

  /** Path of a little histogram on a log scale, width × height px. @param {ArrayLike<number>} counts @param {number} [top] of the scale */
  function sparkPath(counts, width, height, top = Math.max(...counts)) {
    const step = width / counts.length, full = Math.log1p(top);
    const tall = (c) => px(Math.max(1, height * Math.log1p(c) / full)), w = px(Math.max(step - .4, .4));
    const bar = (c, i) => `M${px(i * step)},${height}v-${tall(c)}h${w}V${height}z`;
    return Array.from(counts, (c, i) => (c > 0 ? bar(c, i) : "")).join("");
  }
  /** A tiny histogram (log scale). @param {number[]} counts @param {{width?, height?, title?: string}} [options] @returns {SVGElement} */
  function spark(counts, { width = 72, height = 18, title = "" } = {}) {
    const named = title ? { role: "img", "aria-label": title } : { "aria-hidden": "true" };
    return svg("svg", { class: "spark", width, height, viewBox: `0 0 ${width} ${height}`, ...named },
      tip(title), svg("path", { d: sparkPath(counts, width, height), class: "fill k-one" }));
  }

  /**
   * Lines over a common axis, each with hue, marker at its end and a label beside it.
   * @param {{series: {name, kind, dash?: boolean, points: [number, number][]}[], x: Axis, y: Axis, title: string, about?, height?}} data
   *   Axis = {label: string with the unit, kind?: "linear"|"log"|"log2"|"symlog", low?, high?, c?}; kind of a series: a student's kind or
   *   "s1" … "s6" @returns {HTMLElement}
   */
  function curve({ series, x: ax, y: ay, title, about = "", height = 230 }) {
    const ends = (axis, i) => {
      const values = series.flatMap((s) => s.points.map((p) => p[i])).filter(Number.isFinite);
      const [low, high] = [axis.low ?? Math.min(...values), axis.high ?? Math.max(...values)];
      return [low, high > low ? high : low + 1];
    };
    const [xs, ys] = [ends(ax, 0), ends(ay, 1)];
    return fit(height, (width) => {
      const x = scale(...xs, 46, width - room(series.map((s) => s.name)), ax.kind, ax.c);
      const y = scale(...ys, height - 40, 26, ay.kind, ay.c), wanted = [];
      const parts = series.map(({ name, kind, dash, points }) => {
        const at = points.filter((p) => p.every(Number.isFinite)).map(([a, b]) => [x(a), y(b)]), last = at[at.length - 1];
        if (last) wanted.push({ y: last[1], text: name, kind });
        return last && [line(at, `line k-${kind}${dash ? " dash" : ""}`), marker(...last, kind, { size: 4, title: name, hollow: dash })];
      });
      return root(width, height, title, about, frame(x, y, ax.label, ay.label), parts, labels(x.to + 14, wanted, 30, height - 44));
    });
  }

  /**
   * A little histogram whose window is a filter: dragged, or (wide) set by two sliders; a click clears it.
   * @param {{axis: Axis, wide: boolean, tokens: number, onChange(range: string|null)}} options axis: of mxd.fieldAxis
   * @returns {HTMLElement & {draw(all: number[], kept: number[]|null, value: string|null): void}}
   */
  function brush({ axis, wide, tokens, onChange }) {
    const f = axis.field;
    const position = scale(axis.low, axis.high, 0, 1000, axis.kind, axis.c);
    const [all, kept] = ["all", "kept"].map((name) => svg("path", { class: name }));
    const frame = svg("rect", { class: "window", y: 0, height: 18 });
    const box = { class: "mini", viewBox: "0 0 100 18", preserveAspectRatio: "none", "aria-hidden": "true" };
    const chart = svg("svg", box, all, kept, frame);
    const number = (at) => Number(position.invert(at).toPrecision(3));
    const spelt = ([a, b]) => (a <= 0 && b >= 1000 ? null : `${a <= 0 ? "" : number(a)}..${b >= 1000 ? "" : number(b)}`);
    const told = mxd.debounce((pair) => onChange(spelt(pair)), 120);
    const slider = (end) => h("input", { type: "range", min: 0, max: 1000, "aria-label": `${f.name} ${end}` });
    const sliders = wide ? [slider("from"), slider("to")] : [];
    const words = wide && h("output", { class: "soft" });
    const ordered = (a, b) => [Math.min(a, b), Math.max(a, b)];
    for (const one of sliders) {
      one.addEventListener("input", () => {
        const pair = ordered(...sliders.map((s) => Number(s.value)));
        show(pair);
        told(pair);
      });
    }
    function show([a, b]) {
      const none = a <= 0 && b >= 1000;
      const texts = [a, b].map((at) => f.format(position.invert(at), tokens));
      frame.setAttribute("x", a / 10);
      frame.setAttribute("width", Math.max(b - a, 4) / 10);
      frame.setAttribute("visibility", none ? "hidden" : "visible");
      sliders.forEach((s, i) => Object.assign(s, { value: [a, b][i] }).setAttribute("aria-valuetext", texts[i]));
      if (words) words.textContent = none ? "all" : texts.join(" … ");
    }
    let start = null;
    const place = (event) => {
      const { left, width } = chart.getBoundingClientRect();
      return clamp(1000 * (event.clientX - left) / width, 0, 1000);
    };
    chart.addEventListener("pointerdown", (event) => {
      start = place(event);
      chart.setPointerCapture(event.pointerId);
    });
    chart.addEventListener("pointermove", (event) => start !== null && show(ordered(start, place(event))));
    chart.addEventListener("pointerup", (event) => {
      const [a, b] = ordered(start ?? 0, place(event));
      start = null;
      told(b - a < 15 ? [0, 1000] : [a, b]);
      told.now();
    });
    const el = h("div", { class: "brush" }, chart, sliders, words);
    el.draw = (counts, some, value) => {
      all.setAttribute("d", sparkPath(counts, 100, 18));
      kept.setAttribute("d", some ? sparkPath(some, 100, 18, Math.max(...counts)) : "");
      const [low, high] = value ? mxd.select.ends(value) : [-Infinity, Infinity];
      show([low === -Infinity ? 0 : position(Math.max(low, axis.low)), high === Infinity ? 1000 : position(Math.min(high, axis.high))]);
    };
    return el;
  }

  mxd.charts = {
    NAMES, scale, tick, marker, glyph, fit, frame, rect, text, line, root, frontier, steps, hist, bars, sparkPath, spark, curve, brush,
  };
})();
