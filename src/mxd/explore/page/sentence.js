// A sentence read by the host and by a student in its place: what the replacement costs where, and which units are at work.
"use strict";
(() => {
  const { mxd } = window;
  const { h, ui, fmt, heat, charts } = mxd;
  const TOP = 12;
  const MOST = 4; // students that a text is read by at once
  const NATS = 2; // Δ loss is drawn on a fixed scale, so that two sentences can be compared
  const known = (v) => v !== null && v !== undefined && Number.isFinite(v);

  // ---- shared by the views of a unit, a sentence, the bench and a comparison -----------------------------------------------
  /** A unit's number as a link to it, and its label. query: the filter to step through there. */
  mxd.unitLink = (student, unit, label, query) =>
    h("span", null, h("a", { href: mxd.href({ student, view: "unit", id: unit, query }) }, String(unit)),
      label ? [" ", heat.text(label, { class: "soft" })] : null);
  /** One of few options as joined buttons, one tab stop: options [[value, text]]; pick(value). The element has `.set(value)`. */
  mxd.choice = (name, options, value, pick) => {
    const buttons = options.map(([v, text]) => h("button", { type: "button", on: { click: () => { el.set(v); pick(v); } } }, text));
    const el = h("div", { class: "seg", role: "group", "aria-label": name, on: { keydown: (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      const next = by && buttons[buttons.indexOf(event.target) + by];
      if (next) next.focus();
      if (by) event.preventDefault();
    } } }, buttons);
    el.set = (v) => options.forEach(([w], i) => {
      buttons[i].setAttribute("aria-pressed", String(w === v));
      buttons[i].tabIndex = w === v ? 0 : -1;
    });
    el.set(value);
    return el;
  };
  /** Disable what controls() gives while the host can't be asked, and say why in `line`; until signal aborts. Returns what does so now. */
  mxd.needHost = (controls, line, signal) => {
    const look = () => {
      const why = mxd.blocked();
      for (const control of controls()) control.disabled = Boolean(why);
      if (line.textContent !== (why || "")) line.textContent = why || "";
      line.hidden = !why;
    };
    mxd.onStatus(look, signal);
    return look;
  };
  /** A small table: head [text], rows [[cell: text or node]]; the first cell of a row names it, the others are numbers. */
  mxd.smallTable = (caption, head, rows) =>
    h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": caption },
      h("table", { class: "plain" }, h("caption", null, caption),
      h("thead", null, h("tr", null, head.map((text, i) => h("th", { scope: "col", class: i ? "num" : null }, text)))),
      h("tbody", null, rows.map((row) => h("tr", null, row.map((cell, i) =>
        h(i ? "td" : "th", i ? { class: "num" } : { scope: "row" }, cell)))))));
  /** A text to read: {el, area}; read(text) on the button, Ctrl-Enter or `.go()`. */
  mxd.textForm = (read, signal) => {
    const area = h("textarea", { rows: 3, maxlength: 8000, "aria-label": "text to read, at most 512 tokens",
      placeholder: "Paste a text of at most 512 tokens" });
    const button = h("button", { type: "submit", class: "primary", "data-live": true }, "Read");
    const why = h("p", { class: "soft", hidden: true });
    const go = (event) => {
      if (event) event.preventDefault();
      if (area.value.trim()) read(area.value);
    };
    area.addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && go(event));
    mxd.needHost(() => [button], why, signal);
    return { el: h("form", { class: "stack", on: { submit: go } }, area,
      h("div", { class: "line" }, button, h("small", null, "Ctrl-Enter"), why)), area };
  };
  /** Loss of a student less that of the host, per token; null where there is none. */
  mxd.deltas = (answer, student) => student.loss.map((v, t) => (known(v) && known(answer.host.loss[t]) ? v - answer.host.loss[t] : null));
  /** Mean and its 95 % half-width over the tokens that count: {mean, half, n}. */
  mxd.meanOf = (values, from) => {
    const counted = values.filter((v, t) => t >= from && known(v));
    const n = counted.length;
    const mean = counted.reduce((sum, v) => sum + v, 0) / n;
    return { mean, n, half: n > 1 ? 1.96 * Math.sqrt(counted.reduce((sum, v) => sum + (v - mean) ** 2, 0) / (n - 1) / n) : NaN };
  };
  const textOf = (TEXT, t) => TEXT.text.slice(TEXT.cuts[t], TEXT.cuts[t + 1]);
  mxd.tokenAt = (TEXT, t) => heat.token(textOf(TEXT, t) || (TEXT.names && TEXT.names[t]) || "part of a character");
  /** Fill el with texts to begin with: held-out sentences, or in an exported file those that were kept. read({seq} or {text}). */
  mxd.beginWith = async (el, run, read) => {
    const line = (text, body) => h("p", null, ui.button("Read", () => read(body), { "aria-label": `read: ${text.slice(0, 60)}` }), " ",
      heat.text(text.slice(0, 200)));
    if (mxd.source.live) {
      const first = h("p", { class: "soft" }, "Or begin with a held-out sentence:");
      return void el.replaceChildren(...(run.examples.length ? [first, ...run.examples.map((e) => line(e.text, { seq: e.seq }))] : []));
    }
    const { sentences } = await mxd.source.sentences();
    const what = sentences.length ? "these sentences were kept." : "no sentence was kept.";
    el.replaceChildren(ui.empty(`This is an exported file: it holds results, not the model; ${what}`, `mxd explore ${run.name}`),
      ...sentences.map(({ request: r, text }) => line(text, r.text ? { text: r.text } : { seq: r.seq })));
  };
  /** The reader's own sentence with one unit's activations; max: the unit's largest a, null if unknown. */
  mxd.ownSentence = (student, unit, max, signal) => {
    const ask = mxd.latest();
    const out = h("div", { class: "stack" });
    const why = h("p", { class: "soft", hidden: true });
    const input = h("input", { type: "text", maxlength: 4000, "aria-label": "your own sentence", placeholder: "try your own sentence" });
    const button = h("button", { type: "submit", "data-live": true }, "Read");
    const read = (event) => {
      if (event) event.preventDefault();
      if (!input.value.trim()) return;
      ask((stop) => mxd.source.heat({ student, unit, text: input.value }, { signal: stop }), ({ tokens, a }) => {
        const top = a.reduce((best, v, t) => (t > 0 && v > (a[best] || 0) ? t : best), 0);
        const full = max || a[top];
        const tip = (t) => [`position ${t} · #${tokens.ids[t]}`,
          a[t] ? `a ${fmt.num(a[t])}${max ? ` · ${fmt.pct(a[t] / max)} of its max` : ""}` : "a 0: not active here"];
        const said = top ? ["largest a ", fmt.num(a[top]), " at ", mxd.tokenAt(tokens, top)]
          : "It fires on none of these tokens (the first is not counted).";
        out.replaceChildren(heat.tokens(tokens, a, { scale: full, arm: "plus", tip, label: "your sentence" }),
          h("p", { class: "soft", role: "status" }, said));
      }, (error) => out.replaceChildren(ui.failed(error, read)));
    };
    mxd.needHost(() => [button], why, signal);
    if (!mxd.source.live) return null;
    return h("form", { class: "stack no-print", on: { submit: read } }, h("h3", null, "Your own sentence"),
      h("div", { class: "line" }, input, button, why), out);
  };

  /** Text in one line for charts and tooltips: in quotes, what can't be seen by its number. */
  mxd.quoted = (text) => `"${text.replace(/\n/g, "↵").replace(/\t/g, "→")
    .replace(/[^\p{L}\p{M}\p{N}\p{P}\p{S} ]/gu, (c) => `U+${c.codePointAt(0).toString(16).toUpperCase()}`)}"`;
  /** In el: the next token's probabilities as one unit is pushed, and a control. body: {student, prompt, unit, at, max, special}. */
  mxd.doseSweep = async (el, body, signal) => {
    el.replaceChildren(ui.loading(300));
    try {
      const found = await mxd.source.dose(body, { signal });
      const points = (p) => p.map((v, i) => [found.strengths[i], v]);
      const line = (name, dash) => ({ token, p }, i) => ({ name: name || mxd.quoted(token), kind: `s${i + 1}`, dash, points: points(p) });
      const series = [...found.tokens.map(line()), ...found.control.map(line("control", true))];
      const all = [...found.tokens, ...found.control];
      const rows = found.strengths.map((s, i) => [`${fmt.num(s)} × (${fmt.num(found.raw[i])})`, ...all.map(({ p }) => fmt.num(p[i], 2))]);
      const heads = all.map(({ token }, i) => (i < found.tokens.length ? mxd.quoted(token) : `control ${mxd.quoted(token)}`));
      const control = found.control_unit === null ? "no other unit is like it enough for a control"
        : `dashed: ${found.control_unit}, of the same frequency and norm`;
      el.replaceChildren(h("section", { class: "panel" }, h("h2", null, "Dose"),
        charts.curve({ series, x: { label: `strength added to ${body.unit}, × ${fmt.num(body.max)}` },
          y: { label: "probability of the next token", low: 0 }, title: `P(next token) against strength of ${body.unit}` }),
        h("p", { class: "soft" }, `The five tokens that move most; ${control}.`),
        h("details", null, h("summary", null, "Numbers"), mxd.smallTable("probability of the next token by strength",
          ["strength", ...heads], rows))));
    } catch (error) {
      if (!mxd.aborted(error)) el.replaceChildren(ui.failed(error, () => mxd.doseSweep(el, body, signal)));
    }
  };

  // ---- the view -------------------------------------------------------------------------------------------------------------
  let now = null;
  function read(body) {
    const { ctx, out, ask } = now;
    mxd.setQuery({ text: body.text, seq: body.seq, at: body.at ?? null });
    const old = out.firstChild && out.querySelector(".sent");
    if (old) out.setAttribute("aria-busy", "true");
    else out.replaceChildren(ui.loading(320));
    const { at, ...asked } = body;
    now.asked = asked;
    const from = ctx.student.store ? mxd.source.columns(ctx.student.name, ["max_a"]).catch(() => ({})) : {};
    ask(async (signal) => [await mxd.source.sentence({ ...asked, students: [ctx.student.name] }, { signal }), await from],
      ([answer, columns]) => {
      out.removeAttribute("aria-busy");
      now.form.area.value = answer.tokens.special.includes(0) ? answer.tokens.text.slice(answer.tokens.cuts[1]) : answer.tokens.text;
      const [student] = answer.students;
      Object.assign(now, { answer, student: { labels: {}, ...student,
        units: student.units && student.units.unit.length ? student.units : null }, max: columns.max_a || [],
        pin: at === undefined || at >= answer.tokens.ids.length ? null : at });
      draw();
    }, (error) => {
      out.removeAttribute("aria-busy");
      out.replaceChildren(ui.failed(error, () => read(body)));
    });
  }
  /** Activation of a unit at each token; null without one. */
  function activations(unit) {
    const { units } = now.student;
    const a = now.answer.tokens.ids.map(() => 0);
    if (!units) return a;
    for (let t = 0, j = 0; t < a.length; t++) for (; j < units.from[t + 1]; j++) if (units.unit[j] === unit) a[t] = units.a[j];
    return a;
  }
  const largest = (values) => Math.max(1e-9, ...values.filter(known));
  /** What the tokens are coloured by: {values, scale, both, unit, name}. */
  function painted() {
    const { colour, answer, student, max } = now;
    if (colour === "loss") return { values: answer.host.loss, scale: largest(answer.host.loss), unit: "nats", name: "loss of the host" };
    if (colour === "kl") return { values: student.kl, scale: largest(student.kl), unit: "nats",
      name: "KL of the next token, host to replaced" };
    if (colour === "delta") return { values: mxd.deltas(answer, student), scale: NATS, both: true, unit: "nats",
      name: "replaced less host: orange is worse" };
    const values = activations(Number(colour));
    return { values, scale: max[colour] || largest(values), unit: "a", name: `${mxd.word(now.ctx.student)} ${colour}` };
  }
  function paint() {
    const { sent, legend, colour, pickers } = now;
    const { values, ...how } = painted();
    sent.paint(values, how.scale);
    legend.replaceChildren(heat.legend(how));
    pickers.set(/^\d+$/.test(colour) ? "unit" : colour);
    now.unitNow.textContent = /^\d+$/.test(colour) ? `unit ${colour}` : "";
  }
  function colourBy(colour) {
    now.colour = String(colour === "unit" ? (now.strongest[0] ? now.strongest[0].unit : "delta") : colour);
    mxd.setQuery({ colour: now.colour === "delta" ? null : now.colour });
    paint();
  }
  function summary() {
    const { answer, student } = now;
    const [host, replaced] = [answer.host.loss, student.loss].map((v) => mxd.meanOf(v, answer.mean_from));
    const all = mxd.deltas(answer, student);
    const delta = mxd.meanOf(all, answer.mean_from);
    const worst = all.reduce((best, v, t) => (t >= answer.mean_from && known(v) && (best < 0 || v > all[best]) ? t : best), -1);
    const means = `mean loss, nats: host ${fmt.num(host.mean)}, replaced ${fmt.num(replaced.mean)}, Δ ${fmt.nats(delta.mean)} `;
    return h("p", { role: "status" }, means,
      h("span", { class: "soft" }, `± ${fmt.num(delta.half, 2)} over ${fmt.int(delta.n)} tokens, the first not counted `),
      worst < 0 ? null : [`(worst ${fmt.nats(all[worst])} at `, mxd.tokenAt(answer.tokens, worst), ")"]);
  }
  const tops = (top) => (top || []).map(([text, p]) => [" ", heat.token(text), ` ${fmt.num(p, 2)}`]);
  /** What is known of one token: the loss of predicting it, what is predicted after it, the units active there. */
  function token(t) {
    const { answer, student, ctx } = now;
    const { host } = answer;
    const delta = mxd.deltas(answer, student)[t];
    const p = `p host ${fmt.num(host.p[t], 2)} → replaced ${fmt.num(student.p[t], 2)}, Δ loss ${fmt.nats(delta)} nats`;
    const was = known(host.p[t]) ? `was predicted from the token before: ${p}` : "is the first: nothing came before to predict it from";
    return [h("div", { class: "stack" }, h("h2", null, "At ", mxd.tokenAt(answer.tokens, t), h("small", null, ` position ${t} (pinned)`)),
      h("p", null, `It ${was}.`), h("p", null, `Here the next token is predicted, KL ${fmt.num(student.kl[t], 2)} nats:`),
      h("dl", { class: "facts" }, h("dt", null, "host"), h("dd", null, tops(host.top[t])), h("dt", null, "replaced"),
        h("dd", null, tops(student.top[t])))),
      student.units ? active(t) : h("p", { class: "soft" }, `${ctx.student.name} has no units.`)];
  }
  function active(t) {
    const { student, ctx, sort } = now;
    const { units } = student;
    const at = Array.from({ length: units.from[t + 1] - units.from[t] }, (_, i) => units.from[t] + i);
    at.sort((i, j) => units[sort][j] - units[sort][i]);
    const by = (key, text) => h("th", { scope: "col", class: "num", "aria-sort": sort === key ? "descending" : "none" },
      ui.button(text, () => { now.sort = key; mxd.setQuery({ sort: key === "a" ? null
        : key }); pinned(); now.panel.querySelector(`[data-sort=${key}]`).focus(); },
        { "data-sort": key, "aria-pressed": String(sort === key) }));
    const row = (i) => h("tr", null, h("th", { scope: "row" },
      mxd.unitLink(ctx.student.name, units.unit[i], student.labels[units.unit[i]])),
      [fmt.num(units.a[i]), fmt.pct(units.share[i]), fmt.nats(units.effect[i])].map((text) => h("td", { class: "num" }, text)),
      h("td", null, ui.button("colour", () => colourBy(units.unit[i]), { "aria-label": `colour by ${units.unit[i]}` })));
    const effect = "effect: nats the tokens after it here would lose without it, first order";
    const caption = `${at.length} active here of K ${student.k}; share: of the layer's output; ${effect}`;
    return h("div", { class: "scroll" }, h("table", { class: "plain" }, h("caption", null, caption),
      h("thead", null, h("tr", null, h("th", { scope: "col" }, mxd.word(ctx.student)), by("a", "a"), by("share", "share"),
        by("effect", "effect"), h("td"))),
      h("tbody", null, at.map(row))));
  }
  function pinned() {
    const { pin, panel } = now;
    now.sent.select(pin);
    panel.replaceChildren(...(pin === null ? [h("p", { class: "soft" },
      "Pick a token (click, or arrows and Enter) to see what was predicted there and which units act.")]
      : token(pin).flat()).filter(Boolean));
  }
  function pinAt(t) {
    now.pin = t === now.pin ? null : t;
    mxd.setQuery({ at: now.pin });
    pinned();
    if (now.pin !== null) ui.announce(`pinned ${textOf(now.answer.tokens, now.pin)}`);
  }
  /** The units that are strongest over the sentence, the first token left out: [{unit, sum, a}]. */
  function strongest() {
    const { units } = now.student;
    const sums = new Map();
    if (!units) return [];
    for (let j = units.from[now.answer.mean_from]; j < units.unit.length; j++) sums.set(units.unit[j],
      (sums.get(units.unit[j]) || 0) + units.a[j]);
    return [...sums].sort((x, y) => y[1] - x[1]).slice(0, TOP).map(([unit, sum]) => ({ unit, sum, a: activations(unit) }));
  }
  function strip() {
    const { answer: { tokens, mean_from: from }, max, student } = now;
    const row = ({ unit, a }) => {
      const scale = max[unit] || largest(a.slice(from));
      const cells = [];
      for (let t = from; t < a.length; ) {
        let end = t + 1;
        if (!a[t]) while (end < a.length && !a[end]) end += 1;
        cells.push(a[t] ? h("td", { class: heat.step(a[t], scale) }, fmt.num(a[t], 2)) : h("td", { colspan: end - t }));
        t = end;
      }
      const label = student.labels[unit];
      return h("tr", null, h("th", { scope: "row" }, ui.button(String(unit), () => colourBy(unit), { "aria-label": `colour by ${unit}` }),
        label ? heat.text(` ${label.length > 28 ? `${label.slice(0, 27)}…` : label}`, { class: "soft" }) : null), cells);
    };
    const head = tokens.ids.slice(from).map((_, i) => h("th", { scope: "col" }, heat.token(textOf(tokens, i + from))));
    return h("section", { class: "panel" }, h("h2", null, `The ${now.strongest.length} strongest`),
      h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "activations by unit and token" },
        h("table", { class: "cells" }, h("caption", null, "a at each token, the largest sum first; colour: share of the unit's max"),
          h("thead", null, h("tr", null, h("td"), head)), h("tbody", null, now.strongest.map(row)))));
  }
  function draw() {
    const { answer, student, out, ctx } = now;
    now.strongest = strongest();
    const tip = (t) => {
      const delta = mxd.deltas(answer, student)[t];
      return [`position ${t} · #${answer.tokens.ids[t]}`,
        known(delta) ? `loss host ${fmt.num(answer.host.loss[t])}, replaced ${fmt.num(student.loss[t])}, Δ ${fmt.nats(delta)} nats`
        : "first token: no loss",
        `KL after it ${fmt.num(student.kl[t], 2)} nats`];
    };
    now.sent = heat.tokens(answer.tokens, null, { scale: 1, tip, onToken: pinAt, selected: now.pin, label: "the sentence" });
    const names = [["delta", "Δ loss"], ["loss", "host loss"], ["kl", "KL"]].concat(student.units ? [["unit", mxd.word(ctx.student)]] : []);
    now.pickers = mxd.choice("colour", names, now.colour, colourBy);
    now.legend = h("span", null);
    now.unitNow = h("span", { class: "soft" });
    now.panel = h("div", { class: "cols" });
    if (/^\d+$/.test(now.colour) && !student.units) now.colour = "delta";
    const other = h("a", { href: mxd.href({ view: "compare",
      query: mxd.route().query.has("seq") ? { seq: mxd.route().query.get("seq") } : { text: mxd.route().query.get("text") } }) },
      "Compare students on it");
    now.keeping = h("div", { class: "line" }, other, mxd.source.live && ui.button("Keep this sentence", keep, { "data-live": true,
      title: "what was read is kept in the run, and goes into exported files" }));
    out.replaceChildren(h("section", { class: "panel" }, summary(),
      h("div", { class: "line" }, h("span", { class: "soft" }, "colour"), now.pickers, now.unitNow, now.legend), now.sent, now.keeping),
      h("section", { class: "panel", "aria-label": "the pinned token" }, now.panel), now.strongest.length ? strip() : "");
    paint();
    pinned();
  }
  // ---- kept sentences -------------------------------------------------------------------------------------------------------
  /** Have it read once more by this student and up to three others that have units, and kept. */
  async function keep() {
    const { ctx, asked, keeping } = now;
    const others = ctx.run.students.filter((s) => s.store && s.name !== ctx.student.name).map((s) => s.name);
    const students = [ctx.student.name, ...others].slice(0, MOST);
    try {
      await mxd.source.saveSentence({ ...asked, students }, { signal: ctx.signal });
      keeping.append(h("span", { class: "soft", role: "status" }, `kept, as ${students.join(", ")} read it`));
      await kept();
    } catch (error) {
      if (!mxd.aborted(error)) keeping.after(ui.failed(error, keep));
    }
  }
  async function kept() {
    const { ctx, list } = now;
    const { sentences } = await mxd.source.sentences({ signal: ctx.signal });
    const line = ({ id, request, text, students, created }) => h("tr", null, h("th", { scope: "row" }, heat.text(text.slice(0, 80))),
      h("td", null, students.join(", ")), h("td", { title: created }, fmt.ago(created)),
      h("td", { class: "line" }, ui.button("Read", () => read(request.text === undefined ? { seq: request.seq } : { text: request.text }),
        { "data-live": true, "aria-label": `read again: ${text.slice(0, 60)}` }),
      ui.button("Forget", () => mxd.source.deleteSentence(id).then(kept, (error) => list.append(ui.failed(error))),
        { "aria-label": `forget: ${text.slice(0, 60)}` })));
    list.hidden = !sentences.length;
    list.replaceChildren(...(sentences.length ? [h("h2", null, "Kept sentences"), h("div", { class: "scroll" }, h("table", { class: "plain" },
      h("thead", null, h("tr", null, ["sentence", "read by", "when"].map((name) => h("th", { scope: "col" }, name)), h("td"))),
      h("tbody", null, sentences.map(line))))] : []));
  }

  function fromRoute({ query }) {
    const at = query.has("at") ? Number(query.get("at")) : undefined;
    now.colour = /^(loss|kl|\d+)$/.test(query.get("colour") || "") ? query.get("colour") : "delta";
    now.sort = ["share", "effect"].includes(query.get("sort")) ? query.get("sort") : "a";
    if (query.has("seq")) return read({ seq: Number(query.get("seq")), at });
    if (query.has("text")) return read({ text: query.get("text"), at });
    now.ask.cancel();
    return mxd.beginWith(now.out, now.ctx.run, read);
  }
  mxd.view("sentence", {
    title: "Sentence",
    mount(el, route, ctx) {
      const form = mxd.textForm((text) => read({ text }), ctx.signal);
      now = { ctx, form, out: h("div", { class: "stack" }), ask: mxd.latest(), pin: null,
        list: h("section", { class: "panel", hidden: true }) };
      const { list } = now;
      el.append(h("h1", { class: "sr" }, "Sentence"), mxd.source.live ? h("section", { class: "panel" }, form.el) : "", now.out, list);
      if (mxd.source.live) kept().catch((error) => !mxd.aborted(error) && list.replaceWith(ui.failed(error)));
      if (route.query.has("text")) form.area.value = route.query.get("text");
      fromRoute(route);
      return () => (now.ask.cancel(), (now = null));
    },
    update: fromRoute,
    keys: {
      p: { what: "pin nothing", run: () => now.answer && now.pin !== null && pinAt(now.pin) },
      Escape: { what: "pin nothing", run: () => Boolean(now.answer && now.pin !== null) && pinAt(now.pin) },
    },
  });
})();
