// Tokens with colour behind them: contexts, sentences, the legend; and text that can't be trusted, made visible.
"use strict";
(() => {
  const { mxd } = window;
  const { h, ui } = mxd;
  const fmt = mxd.fmt;

  // Characters that are invisible or turn the direction of what follows: shown as chips, the character itself is kept but not laid out.
  const ODD = new RegExp(
    "[\\0-\\x08\\x0b-\\x1f\\x7f-\\x9f\\xad\\u061c\\u180e\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u2069\\ufeff\\u{e0000}-\\u{e007f}]",
    "u",
  );
  const MARKED = new RegExp(`${ODD.source}|[\\n\\t]`, "u");
  const ODDS = new RegExp(ODD.source, "gu");
  const code = (c) => `U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
  const odd = (c) => h("span", { class: "cp", "data-cp": code(c) }, h("span", { hidden: true }, c));
  const white = (c, name) => h("span", { class: `ws ${name}` }, c);

  /** Text as nodes: chips for control and bidi characters, marks for line ends and tabs. textContent stays the text. */
  function pieces(text, lone) {
    if (lone && /^ +$/.test(text)) return [white(text, "sp")];
    const found = [];
    let rest = text;
    for (let at = rest.search(MARKED); at >= 0; at = rest.search(MARKED)) {
      const c = String.fromCodePoint(rest.codePointAt(at));
      if (at) found.push(rest.slice(0, at));
      found.push(c === "\n" ? white(c, "nl") : c === "\t" ? white(c, "tab") : odd(c));
      rest = rest.slice(at + c.length);
    }
    if (rest) found.push(rest);
    return found;
  }
  /** Any text of a stranger (label, note, document's name): isolated, with chips. */
  const text = (value, props) => h("bdi", { dir: "auto", ...props }, pieces(String(value ?? ""), false));
  /** One token by its text, with its leading space and line ends visible. */
  function token(value, props) {
    const string = String(value ?? "");
    const lead = /^ +/.exec(string);
    const rest = lead ? string.slice(lead[0].length) : string;
    const blank = /^\s+$/.test(rest) && !/[\n\t]/.test(rest); // of other blanks than spaces: by their numbers
    const shows = blank ? [...rest].map(odd) : pieces(rest, false);
    return h("bdi", { class: "tok", dir: "auto", ...props }, lead && white(lead[0], "sp"), shows);
  }

  /** The class of a value's step: h1 … h6 above zero, m1 … m6 below; "" for none. Values beyond the scale add "clip". */
  function step(value, scale) {
    if (value === null || value === undefined || !Number.isFinite(value) || value === 0 || !(scale > 0)) return "";
    const size = Math.ceil((6 * Math.abs(value)) / scale - 1e-3); // rounded values are not beyond the scale
    return `${value > 0 ? "h" : "m"}${Math.min(6, Math.max(1, size))}${size > 6 ? " clip" : ""}`;
  }

  /** Tokens that share a character make one group, those `alone` never: [{from, to, start, end}], offsets into tokens and the text. */
  function groups(cuts, from, to, alone = new Set()) {
    const found = [];
    for (let i = from; i < to; ) {
      let end = i + 1;
      while (end < to && cuts[end] === cuts[i] && !alone.has(i) && !alone.has(end)) end += 1;
      const before = found[found.length - 1];
      if (cuts[end] === cuts[i] && before && !alone.has(i) && !alone.has(before.from)) before.to = end;
      else found.push({ from: i, to: end, start: cuts[i], end: cuts[end] });
      i = end;
    }
    return found;
  }
  const largest = (values, { from, to }) => {
    let best = null;
    for (let i = from; i < to; i++) {
      const v = values[i];
      if (v !== null && v !== undefined && Number.isFinite(v) && (best === null || Math.abs(v) > Math.abs(best))) best = v;
    }
    return best;
  };
  const shown = (string) => `"${string.replace(/\n/g, "↵").replace(/\t/g, "→").replace(ODDS, code)}"`;

  // ---- one context of a unit
  /** So many tokens around the peak; null: all that came. */
  function window_(context, width) {
    const n = context.cuts.length - 1;
    if (!width || width >= n) return [0, n];
    const from = Math.max(0, Math.min(context.peak - Math.floor(width / 2), n - width));
    return [from, from + width];
  }
  function contextTip(context, values, group, max) {
    const { from, to } = group;
    const { a, rank, delta } = context;
    const ids = context.ids ? context.ids.slice(from, to).map((id) => `#${id}`).join(" ") : "";
    const at = context.start + from;
    const lines = [`${shown(context.text.slice(group.start, group.end))} ${ids} · position ${fmt.int(at)}`];
    const v = largest(values, group);
    const peak = context.peak >= from && context.peak < to;
    const value = peak ? a : v;
    const share = max > 0 && value ? ` · ${fmt.pct(value / max)} of the unit's max` : "";
    lines.push(value ? `a ${fmt.num(value)}${share}` : "a 0: not active here");
    if (to - from > 1) lines.push(`a character of ${to - from} tokens: ${range(from, to).map((i) => fmt.num(values[i] || 0)).join(", ")}`);
    if (peak && a > 0 && Number.isInteger(rank)) lines.push(`firing ${fmt.int(rank + 1)} of this unit, by strength`);
    if (peak && delta !== null && delta !== undefined) lines.push(`Δ ${fmt.nats(delta)} nats when removed here (first order)`);
    return lines;
  }
  const range = (from, to) => Array.from({ length: to - from }, (_, i) => from + i);

  /**
   * A context as one line, drawn by runs: text between active tokens is one node.
   * options: {width: tokens around the peak, null: all; scale: a of the darkest step, null: the row's own largest; max: the unit's
   * largest a; focus: true makes it a tab stop whose arrows walk the tokens; onToken(i, context): a token was clicked}.
   */
  function context(context, { width = null, scale, max, focus = false, onToken } = {}) {
    const level = context.levels.find(([i]) => i === context.peak);
    const most = max > 0 ? max : level ? (context.a * 255) / level[1] : 0;
    const values = {};
    for (const [i, one] of context.levels) values[i] = (one / 255) * most;
    if (context.a > 0) values[context.peak] = context.a;
    const [from, to] = window_(context, width);
    const row = Math.max(0, ...range(from, to).map((i) => values[i] || 0));
    const full = scale === null ? row : scale || most;
    const special = new Map(context.special || []);
    const parts = groups(context.cuts, from, to, special);
    const drawn = [];
    let plain = context.cuts[from];
    for (const group of parts) {
      const v = largest(values, group);
      const peak = context.peak >= group.from && context.peak < group.to;
      const name = special.get(group.from);
      if (!v && !peak && !name) continue;
      if (group.start > plain) drawn.push(pieces(context.text.slice(plain, group.start)));
      const css = ["t", step(v, full), peak && "peak", peak && !v && "off", name && "spec"].filter(Boolean).join(" ");
      drawn.push(h("span", { class: css, "data-i": group.from, "data-name": name }, pieces(context.text.slice(group.start, group.end), true)));
      plain = group.end;
    }
    if (context.cuts[to] > plain) drawn.push(pieces(context.text.slice(plain, context.cuts[to])));
    const cut = `${context.start + from > 0 ? " cut-l" : ""}${to < context.cuts.length - 1 ? " cut-r" : ""}`;
    const el = h("span", { class: `ctx${cut}`, dir: "auto" }, drawn);
    const find = (target) => {
      const span = target.closest && target.closest(".t");
      return span && parts.find((group) => group.from === Number(span.dataset.i));
    };
    ui.tip(el, (target) => {
      const group = find(target);
      return group ? contextTip(context, values, group, most) : null;
    });
    if (onToken) el.addEventListener("click", (event) => find(event.target) && onToken(find(event.target).from, context));
    const peak = parts.find((group) => context.peak >= group.from && context.peak < group.to);
    if (focus) walk(el, `context, ${peak ? shown(context.text.slice(peak.start, peak.end)) : ""} a ${fmt.num(context.a)}`);
    return el;
  }
  /** A row of tokens as one tab stop: arrows go from active token to active token and say what is known of each. */
  function walk(el, name) {
    el.setAttribute("tabindex", "0");
    el.setAttribute("role", "group");
    el.setAttribute("aria-label", name);
    el.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (!move || event.ctrlKey || event.altKey || event.metaKey) return;
      const all = [...el.querySelectorAll(".t")];
      const at = all.findIndex((span) => span.classList.contains("sel"));
      const first = all.findIndex((span) => span.classList.contains("peak"));
      const next = all[Math.min(all.length - 1, Math.max(0, at < 0 ? first : at + move))];
      if (at >= 0) all[at].classList.remove("sel");
      if (!next) return;
      event.preventDefault();
      next.classList.add("sel");
      ui.showTip(next);
      ui.announce(document.getElementById("tip").textContent);
    });
    el.addEventListener("blur", () => el.querySelectorAll(".sel").forEach((span) => span.classList.remove("sel")));
  }

  /** Bring the peaks of all `.ctx-line > .ctx` below root to the middle of their lines; after they are in the page. */
  function centre(root) {
    const lines = [...root.querySelectorAll(".ctx-line")];
    const moves = lines.map((line) => {
      const peak = line.querySelector(".peak");
      if (!peak) return 0;
      const [a, b] = [line.getBoundingClientRect(), peak.getBoundingClientRect()];
      return b.left + b.width / 2 - a.left - a.width / 2;
    });
    lines.forEach((line, i) => moves[i] && (line.scrollLeft += moves[i]));
  }

  // ---- a sentence
  /**
   * A sentence, a span per token (one tab stop, arrows move, Enter picks). TEXT is {text, cuts, ids, special}; values: a number or
   * null per token, or null. options: {scale, arm: "plus" | "both", tip(i) -> lines, onToken(i), selected: i, label}.
   * The element has `.paint(values, scale)` to colour it anew and `.select(i)`.
   */
  function tokens(TEXT, values, { scale, arm = "both", tip, onToken, selected = null, label = "tokens" } = {}) {
    const special = new Set(TEXT.special || []);
    const parts = groups(TEXT.cuts, 0, TEXT.cuts.length - 1, special);
    const spans = parts.map((group) => {
      const string = TEXT.text.slice(group.start, group.end);
      const css = special.has(group.from) ? "t spec" : "t";
      const name = special.has(group.from) && !string ? (TEXT.names && TEXT.names[group.from]) || "special" : null;
      const said = name || (/\S/.test(string.replace(ODDS, "")) ? null : shown(string)); // blanks and chips have no name otherwise
      const about = { role: "option", tabindex: "-1", "data-i": group.from, "data-name": name, "aria-label": said };
      return h("span", { class: css, ...about }, pieces(string, true));
    });
    const el = h("div", { class: "sent", role: "listbox", dir: "auto", "aria-label": label, "aria-orientation": "horizontal" }, spans);
    const of = (target) => spans.indexOf(target.closest && target.closest(".t"));
    el.paint = (next, full) => {
      parts.forEach((group, k) => {
        const v = next && largest(next, group);
        const css = v === null || v === undefined || (arm === "plus" && v < 0) ? "" : step(v, full);
        const sel = spans[k].classList.contains("sel");
        spans[k].className = `t${special.has(group.from) ? " spec" : ""}${css && ` ${css}`}${sel ? " sel" : ""}`;
      });
    };
    el.select = (i) => {
      const at = i === null ? -1 : parts.findIndex((group) => i >= group.from && i < group.to);
      spans.forEach((span, k) => {
        span.classList.toggle("sel", k === at);
        span.setAttribute("aria-selected", String(k === at));
        span.tabIndex = k === Math.max(0, at) ? 0 : -1;
      });
    };
    const pick = (k) => {
      if (k < 0 || !onToken) return;
      el.select(parts[k].from);
      onToken(parts[k].from);
    };
    el.addEventListener("click", (event) => pick(of(event.target)));
    el.addEventListener("keydown", (event) => {
      const at = of(event.target);
      const end = spans.length - 1;
      const next = { ArrowLeft: at - 1, ArrowUp: at - 1, ArrowRight: at + 1, ArrowDown: at + 1, Home: 0, End: end }[event.key];
      if (at < 0 || (next === undefined && event.key !== "Enter" && event.key !== " ")) return;
      event.preventDefault();
      if (next === undefined) return pick(at);
      const to = spans[Math.min(end, Math.max(0, next))];
      spans[at].tabIndex = -1;
      to.tabIndex = 0;
      to.focus();
    });
    if (tip) ui.tip(el, (target) => (of(target) < 0 ? null : tip(parts[of(target)].from, parts[of(target)])));
    el.select(selected);
    el.paint(values, scale);
    return el;
  }

  /** What the colours mean, in numbers. options: {scale, unit: "a" | "nats", both: true for a scale with two arms, name}. */
  function legend({ scale, unit = "a", both = false, name } = {}) {
    const value = (k) => (unit === "nats" ? fmt.nats((k * scale) / 6) : fmt.num((k * scale) / 6, 2));
    const steps = (both ? [-6, -5, -4, -3, -2, -1, 0] : [0]).concat([1, 2, 3, 4, 5, 6]);
    const named = (k) => k === 0 || Math.abs(k) === 6;
    const swatch = (k) => h("span", { class: `swatch ${k > 0 ? `h${k}` : k < 0 ? `m${-k}` : ""}` }, named(k) ? value(k) : "");
    const said = both ? `${value(-6)} … 0 … ${value(6)} ${unit}, › beyond` : `0 … ${value(6)} ${unit}`;
    const words = h("span", { class: "sr" }, said);
    const swatches = h("span", { class: "swatches", "aria-hidden": "true" }, steps.map(swatch));
    const notes = both ? "blue, dotted: below zero · › beyond the scale" : "outlined: the token in question";
    const soft = h("span", { class: "soft" }, notes);
    return h("span", { class: "legend" }, name && h("b", null, name), swatches, words, h("span", null, unit), soft);
  }

  mxd.heat = { context, tokens, walk, centre, legend, step, text, token, pieces, groups };
})();
