// Overview: is the run good, and do the experts matter? Verdict, frontier, population, map, provenance; and the dialog that exports.
"use strict";
(() => {
  const { mxd } = window;
  const { h, fmt, ui, charts } = mxd;
  const known = (v) => v !== null && v !== undefined;

  // ---- the map of all units
  /** Axis of a field over its values: {low, high, kind, c: their median size, values, field}; null where nothing is known. */
  mxd.fieldAxis = (field, values) => {
    const [sizes, every, { kind }] = [[], Math.ceil(values.length / 2000), field];
    let [low, high] = [Infinity, -Infinity];
    for (let i = 0; i < values.length; i++) {
      const v = values[i];
      if (!drawnOn(v, field)) continue;
      if (v < low) low = v;
      if (v > high) high = v;
      if (i % every === 0) sizes.push(Math.abs(v));
    }
    if (high < low) return null;
    const c = sizes.sort((a, b) => a - b)[sizes.length >> 1] || 1e-3;
    return { low, high: high > low ? high : low + (Math.abs(low) || 1), kind, c, values, field };
  };
  const drawnOn = (v, { kind }) => Number.isFinite(v) && (kind !== "log" || v > 0);
  const groups = (key, at, names) => (data) => ({ of: data.get(key), at, names });
  const COLOURS = {
    none: () => ({ of: null, at: [0, 0, 0], names: [] }),
    state: groups("state", [0, 1, 2, 3], mxd.select.STATES),
    labelled: groups("labelled", [0, 1], ["no label", "labelled"]),
    starred: groups("star", [0, 1], ["no star", "starred"]),
    steadiness: groups("steadiness", [0, 1 / 3, 2 / 3], ["up to 1/3", "up to 2/3", "above"]),
    score: groups("score", [0, .6, .75], ["unknown or up to .6", "up to .75", "above"]),
  };

  /**
   * All units as points on a canvas under real axes; a dragged box calls onBox({x: [low, high], y: [low, high]}), a click onPick(unit).
   * @param {{x: Axis, y: Axis, colour: {of: Float32Array|null, at: number[], names: string[]}, units: Uint32Array, name(unit): string,
   *   onBox(box), onPick(unit)}} options Axis: of mxd.fieldAxis; colour: group g holds the values from at[g] on, in the hue --q(g+1)
   * @returns {HTMLElement & {redraw(): void, drawn: number}} drawn: milliseconds that the last drawing took
   */
  charts.scatter = ({ x: ax, y: ay, colour, units, name, onBox, onPick }) => {
    const readout = h("p", { class: "soft readout" }, "Point at a unit to see it; drag a box to list its units.");
    const [height, n] = [360, units.length];
    const group = Uint8Array.from(units, (u) => (colour.of ? Math.max(0, colour.at.findLastIndex((at) => colour.of[u] >= at)) : 2));
    const label = ({ field: f, kind }) => `${f.name}, ${f.unit}${{ log: " (log)", symlog: " (linear near 0, then log)" }[kind] || ""}`;
    const format = ({ field: f }) => (f.key === "top_token_share" ? fmt.pct : charts.tick);
    const chart = charts.fit(height, (width) => {
      const from = performance.now();
      const x = charts.scale(ax.low, ax.high, 56, width - 10, ax.kind, ax.c);
      const y = charts.scale(ay.low, ay.high, height - 40, 22, ay.kind, ay.c);
      const [xs, ys] = [new Int16Array(n).fill(-1), new Int16Array(n)];
      for (let i = 0; i < n; i++) {
        const [a, b] = [ax.values[units[i]], ay.values[units[i]]];
        if (drawnOn(a, ax) && drawnOn(b, ay)) [xs[i], ys[i]] = [x(a), y(b)];
      }
      const canvas = paint(width, height, xs, ys, group, colour.at.length);
      const box = charts.rect(0, 0, 0, 0, "box");
      const frame = charts.frame(x, y, label(ax), label(ay), { xFormat: format(ax), yFormat: format(ay) });
      const over = charts.root(width, height, `Map of units: ${ax.field.name} and ${ay.field.name}`, "", frame, box);
      const nearest = ([px, py]) => {
        let [best, found] = [145, null];
        for (let i = 0; i < n; i++) {
          const d = (xs[i] - px) ** 2 + (ys[i] - py) ** 2;
          if (d < best && xs[i] >= 0) [best, found] = [d, units[i]];
        }
        return found;
      };
      const place = (event) => {
        const at = over.getBoundingClientRect();
        return [event.clientX - at.left, event.clientY - at.top];
      };
      let start = null;
      const ends = (scale, a, b) => [a, b].map((px) => Number(scale.invert(px).toPrecision(3))).sort((p, q) => p - q);
      const point = mxd.debounce((at) => known(nearest(at)) && (readout.textContent = name(nearest(at))), 30);
      const act = {
        pointerdown(event) {
          start = place(event);
          over.setPointerCapture(event.pointerId);
        },
        pointermove(event) {
          const to = place(event);
          if (!start) return point(to);
          const size = { width: Math.abs(to[0] - start[0]), height: Math.abs(to[1] - start[1]) };
          const sides = { x: Math.min(start[0], to[0]), y: Math.min(start[1], to[1]), ...size };
          for (const [key, v] of Object.entries(sides)) box.setAttribute(key, v);
        },
        pointercancel: () => (start = null),
        pointerup(event) {
          const [a, b, u] = [start, place(event), nearest(place(event))];
          start = null;
          if (a && Math.hypot(a[0] - b[0], a[1] - b[1]) > 5) onBox({ x: ends(x, a[0], b[0]), y: ends(y, a[1], b[1]) });
          else if (a && u !== null) onPick(u);
        },
      };
      for (const [event, fn] of Object.entries(act)) over.addEventListener(event, fn);
      el.drawn = performance.now() - from;
      return h("div", { class: "map" }, over, canvas);
    });
    const legend = colour.names.map((one, g) => h("li", null, h("span", { class: `dot q${g + 1}` }), ` ${one}`));
    const el = h("div", { class: "stack" }, chart, legend.length ? h("ul", { class: "legend" }, legend) : null, readout);
    return Object.assign(el, { redraw: chart.redraw });
  };
  /** Points as pixels: later groups on top, and denser where points fall together. */
  function paint(width, height, xs, ys, group, groups_) {
    const dpr = Math.min(2, devicePixelRatio || 1);
    const canvas = h("canvas", { width: width * dpr, height: height * dpr, "aria-hidden": "true" });
    const pen = canvas.getContext("2d");
    const style = getComputedStyle(document.documentElement);
    const image = pen.createImageData(canvas.width, canvas.height);
    const pixels = new Uint32Array(image.data.buffer);
    const [size, line] = [Math.round(1.6 * dpr), canvas.width];
    for (let g = 0; g < groups_; g++) {
      pen.fillStyle = style.getPropertyValue(`--q${g + 1}`).trim();
      const rgb = parseInt(pen.fillStyle.slice(1), 16);
      const hue = ((rgb & 255) << 16) | (rgb & 0xff00) | (rgb >> 16);
      for (let i = 0; i < xs.length; i++) {
        if (xs[i] < 0 || group[i] !== g) continue;
        const at = Math.round(ys[i] * dpr) * line + Math.round(xs[i] * dpr);
        for (let row = at; row < at + size * line; row += line) {
          for (let p = row; p < row + size; p++) pixels[p] = (Math.min(255, (pixels[p] >>> 24) + 90) << 24) | hue;
        }
      }
    }
    pen.putImageData(image, 0, 0);
    return canvas;
  }

  async function map(el, { student, signal, run }) {
    const data = await mxd.columns(student);
    if (signal.aborted) return;
    const axes = new Map(mxd.fields.map((f) => [f.key, mxd.fieldAxis(f, data.get(f.key))]).filter(([, axis]) => axis));
    const keys = [...axes.keys()];
    const nothing = () => ui.empty("Nothing is known of these units to place them by.", `mxd collect ${run.name} --overwrite`);
    if (keys.length < 2) return void el.append(nothing());
    const { query } = mxd.route();
    const at = { mx: query.get("mx") || "freq", my: query.get("my") || "effect", mc: query.get("mc") || "none" };
    if (!axes.has(at.mx)) [at.mx] = keys;
    if (!axes.has(at.my)) at.my = keys.find((k) => k !== at.mx);
    if (!COLOURS[at.mc]) at.mc = "none";
    const word = mxd.word(student);
    const [holder, count] = [h("div"), h("span", { class: "soft" })];
    const say = (u, k) => `${axes.get(k).field.name} ${axes.get(k).field.format(data.get(k)[u], data.tokens)}`;
    const show = () => {
      const [x, y] = [axes.get(at.mx), axes.get(at.my)];
      const drawn = data.units.filter((u) => drawnOn(x.values[u], x) && drawnOn(y.values[u], y)).length;
      const left = data.units.length - drawn;
      count.textContent = `${fmt.int(drawn)} ${word}s${left ? `; ${fmt.int(left)} without both numbers are not drawn` : ""}`;
      holder.replaceChildren(charts.scatter({
        x, y, colour: COLOURS[at.mc](data), units: data.units, name: (u) => `${word} ${u}: ${say(u, at.mx)}, ${say(u, at.my)}`,
        onBox: (box) => mxd.go({ view: "units", query: { [at.mx]: box.x.join(".."), [at.my]: box.y.join("..") } }),
        onPick: (u) => mxd.go({ view: "unit", id: String(u) }),
      }));
    };
    const choice = (key, label, options) => {
      const select = h("select", null, options.map(([value, text]) => h("option", { value, selected: value === at[key] }, text)));
      select.addEventListener("change", () => {
        at[key] = select.value;
        mxd.setQuery({ [key]: at[key] });
        show();
      });
      return h("label", null, `${label} `, select);
    };
    const fields = keys.map((k) => [k, axes.get(k).field.name]);
    const colour = choice("mc", "colour", Object.keys(COLOURS).map((k) => [k, k]));
    el.append(h("div", { class: "controls" }, choice("mx", "x", fields), choice("my", "y", fields), colour, count), holder);
    const again = () => holder.firstChild.redraw();
    document.addEventListener("mxd-theme", again, { signal });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again, { signal });
    show();
  }

  // ---- verdict, frontier, population
  const span = (ci) => (ci && ci.every(known) ? `[${fmt.num(ci[0], 2)}, ${fmt.num(ci[1], 2)}]` : "");
  const unmeasured = (run) => (run.report_why && run.report_why.next) || `mxd eval ${run.name}`;
  function verdict(student, run) {
    const { figures: f, store } = student;
    const { report } = run;
    if (!f || !report) return ui.empty(`${student.name} has not been measured against the host.`, unmeasured(run));
    const part = (name, value, format, small, about, why = "not measured") => ui.tip(h("div", { class: "figure" }, h("span", null, name),
      h("b", null, known(value) ? format(value) : fmt.dash(why)), h("small", null, known(value) ? small : "")), about);
    const n = `${fmt.int(report.eval_tokens)} held-out tokens of ${fmt.int(report.eval_documents)} documents`;
    const { nats } = (f.anatomy && f.anatomy.causality) || {};
    const { id = {}, experts_matter: matter } = f.routing || {};
    const matters = typeof matter === "boolean" ? ` Experts matter by N_r, G_r and ID together: ${matter ? "yes" : "no"}.` : "";
    const of = store ? `0 of ${fmt.big(store.tokens)} collected tokens, rate < 3/T` : "no token of the evaluation";
    const [four, two] = [(v) => fmt.num(v, 4), (v) => fmt.num(v, 2)];
    const units = student.n_units ? "not measured" : "this student has no units";
    return h("div", { class: "panel" }, h("div", { class: "figures" },
      part("CE of the host", report.base_ce, four, "nats per token", `Cross-entropy of the host itself; ${n}.`),
      part("replaced", f.ce, four, "nats per token", `The same with ${student.name} in place of ${student.hookpoint}; ${n}.`),
      part("excess", f.excess_ce, two, `${span(f.excess_ce_ci95)} nats`, "Replaced minus host, and its 95 % interval over documents."),
      part("recovered", f.ce_recovered, fmt.pct, "of zero ablation's loss", "Share of zero ablation's loss that the student wins back."),
      nats ? part("routing", nats.value, two, `${span(nats.ci95)} nats`, `Nats lost when every unit writes what another would.${matters}`)
        : part("routing", id.value, two, `${span(id.ci95)} FVU`, `Identity: variance lost when active experts are swapped.${matters}`,
          student.kind.startsWith("mxd") ? "not measured" : "only an MxD has routing to take away"),
      part("dead", store ? store.dead / student.n_units : f.dead_fraction, fmt.pct, `of ${fmt.int(student.n_units)}`,
        `${mxd.word(student)}s that fired on ${of}.`, units),
      part("L0", f.l0, (v) => fmt.num(v), "active per token", "Units active per token, mean.", units)));
  }
  function frontier(run) {
    const all = run.students.filter((s) => s.figures && Number.isFinite(s.figures.excess_ce));
    if (!all.length) return ui.empty("No student has been measured yet.", unmeasured(run));
    const label = (s) => {
      const several = new Set(all.filter((o) => o.kind === s.kind).map((o) => o.recipe)).size > 1;
      return `${charts.NAMES[s.kind] || s.kind}${several ? ` ${s.recipe}` : ""}`;
    };
    const point = ({ name, k, figures: { excess_ce: y, excess_ce_ci95: ci } }) =>
      ({ k, y, low: ci ? ci[0] : null, high: ci ? ci[1] : null, title: `${name}: ${fmt.num(y, 2)} nats ${span(ci)}` });
    const byLabel = new Map();
    for (const s of all.filter((one) => one.k)) byLabel.set(label(s), [...(byLabel.get(label(s)) || []), s]);
    const series = [...byLabel].map(([name, own]) => ({ name, kind: own[0].kind, points: own.map(point) }));
    const levels = all.filter((s) => !s.k).map((s) => ({ ...point(s), name: label(s), kind: s.kind }));
    // The paper's curves, if this host and layer are among its own: {k: [...], excess: {kind: [...]}}.
    const { k: ks, excess = {} } = run.published || {};
    for (const [kind, values] of Object.entries(excess)) {
      const name = `${charts.NAMES[kind]}, paper`;
      const points = values.map((y, i) => ({ k: ks[i], y, low: null, high: null, title: `${name}: ${fmt.num(y, 2)} nats` }));
      series.push({ name, kind, hollow: true, points });
    }
    return charts.frontier({ series, levels });
  }
  function population(run) {
    const all = run.students.filter((s) => s.frequency && s.store);
    const again = (s, i) => all.findIndex((o) => o.kind === s.kind) < i;
    const series = all.map((s, i) => ({ name: s.name, kind: s.kind, dash: again(s, i), ...s.frequency }));
    return all.length ? charts.steps({ series, rule: 1 / Math.min(...all.map((s) => s.store.tokens)) }) : null;
  }
  const COLUMNS = [
    ["K", (s) => s.k || null, (v) => v], ["units", (s) => s.n_units || null, fmt.int], ["CE, nats", (s, f) => f.ce, (v) => fmt.num(v, 4)],
    ["excess CE, nats", (s, f) => f.excess_ce, (v, f) => `${fmt.num(v, 2)} ${span(f.excess_ce_ci95)}`],
    ["recovered", (s, f) => f.ce_recovered, fmt.pct], ["KL, nats", (s, f) => f.kl, (v) => fmt.num(v)],
    ["top-1 agreement", (s, f) => f.top1_agreement, fmt.pct], ["FVU", (s, f) => f.fvu, (v, f) => `${fmt.num(v)} ${span(f.fvu_ci95)}`],
    ["routing ID, FVU", (s, f) => f.routing && f.routing.id && f.routing.id.value, (v, f) => `${fmt.num(v, 2)} ${span(f.routing.id.ci95)}`],
    ["dead", (s, f) => (s.store ? s.store.dead / s.n_units : f.dead_fraction), fmt.pct], ["parameters", (s) => s.params, fmt.big],
  ];
  function twin(run) {
    const cell = (s, f) => ([, of, format]) => {
      const v = of(s, f);
      return h("td", { class: "num" }, known(v) ? format(v, f) : fmt.dash("not measured, or nothing to measure"));
    };
    const row = (s) => h("tr", null, h("th", { scope: "row" }, charts.glyph(s.kind), " ",
      h("a", { href: mxd.href({ student: s.name, view: "overview" }) }, s.name)), COLUMNS.map(cell(s, s.figures || {})));
    const heads = COLUMNS.map(([name]) => h("th", { scope: "col", class: "num" }, name));
    return h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Table of students" },
      h("table", { class: "plain twin" },
      h("caption", null, "The same numbers as a table; [95 % intervals] over held-out documents."),
      h("thead", null, h("tr", null, h("th", { scope: "col" }, "student"), heads)), h("tbody", null, run.students.map(row))));
  }
  function provenance(run, student) {
    const { report, text } = run;
    const store = student && student.store;
    const source = (t) => [t.name, t.kind, Number.isFinite(t.documents) && `${fmt.int(t.documents)} documents`].filter(Boolean).join(" · ");
    const when = store && String(store.created).slice(0, 16).replace("T", " ");
    const effects = store && store.effect_tokens ? `; effects over ${fmt.int(store.effect_tokens)} tokens` : "";
    const facts = [
      ["text", (text || []).map(source).join("; ")],
      ["split", [store && store.split, run.split_rule].filter(Boolean).join(" — ")],
      ["trained on", known(run.train_tokens) && `${fmt.int(run.train_tokens)} tokens, seed ${run.seed}`],
      ["collected", store && `${fmt.int(store.tokens)} tokens of ${fmt.int(store.documents)} documents, ${when}${effects}`],
      ["measured on", report && `${fmt.int(report.eval_tokens)} held-out tokens of ${fmt.int(report.eval_documents)} documents`],
      ["host", `${run.host} ${String(run.host_fingerprint || "").slice(0, 12)}`],
      ["weights", student && student.weights_sha256 && `${student.name} ${student.weights_sha256.slice(0, 12)}, recipe ${student.recipe}`],
      ["versions", Object.entries(run.versions || {}).map(([name, v]) => `${name} ${v}`).join(", ")], ["commit", run.git_commit],
    ];
    return h("dl", { class: "facts" }, facts.filter(([, v]) => v).map(([name, v]) => [h("dt", null, name), h("dd", { dir: "auto" }, v)]));
  }

  /** What stands in place of a student's units while there is no store: why, and the command, or how far collecting is. */
  ui.noStore = (student, signal) => {
    const why = (student && student.why) || { what: "No units have been collected." };
    if (student && student.word === "none") return ui.empty(why.what);
    const el = h("div", null, ui.empty([why.what, why.got && `: ${why.got}`], why.next || `mxd collect ${mxd.state.run.name}`));
    mxd.onStatus(({ collect: { state, stage, done, total, seconds_left: left, why: failed } }) => {
      if (state === "failed" && failed) return el.replaceChildren(ui.failed(new mxd.ApiError(failed)));
      if (state !== "running") return null;
      const when = left ? `, ${Math.ceil(left / 60)} min left` : "";
      const words = `Collecting (${stage}): ${fmt.big(done)} of ${fmt.big(total)} tokens${when}.`;
      const bar = h("progress", { max: 1, value: total ? done / total : 0, "aria-label": "collected" });
      return el.replaceChildren(h("div", { class: "empty" }, h("p", null, words), bar));
    }, signal);
    return el;
  };

  // ---- export
  /** The dialog that makes one file of a student's units; `query`: the present filter, if any. */
  ui.exportDialog = (student, query) => {
    const asked = { what: "top", by: "effect", n: 300, contexts: 10 };
    const said = h("p", { class: "soft", role: "status" }, "…");
    const ask = mxd.latest();
    const body = async () => {
      const units = asked.what === "filter" ? [...(await mxd.select(student, query)).subarray(0, asked.n)] : [];
      return { students: [student.name], ...asked, units };
    };
    const preview = mxd.debounce(() => ask(async (signal) => mxd.source.exportSize(await body(), { signal }),
      ({ bytes, units }) => said.replaceChildren(`${fmt.int(units)} ${mxd.word(student)}s, about ${fmt.bytes(bytes)}`),
      (error) => said.replaceChildren(ui.failed(error, preview))), 150);
    const change = (key, read) => ({ input: (event) => ((asked[key] = read(event.target)), preview()) });
    const number = (key, max) => h("input", { type: "number", min: 1, max, value: asked[key],
      on: change(key, (el) => Math.max(1, Math.min(max, Math.floor(el.value) || 1))) });
    const option = (what, ...text) => h("p", null, h("label", null,
      h("input", { type: "radio", name: "what", checked: what === asked.what, on: change("what", () => what) }), " ", text));
    const by = h("select", { "aria-label": "column", on: change("by", (el) => el.value) },
      mxd.fields.map((f) => h("option", { value: f.column, selected: f.column === asked.by }, f.name)));
    const save = ui.button("Download HTML", async () => {
      save.disabled = true;
      said.replaceChildren("being made …");
      try {
        ui.save(await mxd.source.exportFile(await body()), `${mxd.state.run.name}-${student.name}.html`, "text/html");
        said.replaceChildren("saved: opens without a server");
      } catch (error) {
        said.replaceChildren(ui.failed(error));
      }
      save.disabled = false;
    }, { class: "primary" });
    ui.dialog(`Export ${student.name}`, [
      h("fieldset", null, h("legend", null, "Which"), option("top", "the top, by ", by), option("starred", "the starred ones"),
        query && [...mxd.select.query(query)].length ? option("filter", "the present filter, from its top") : null),
      h("p", null, h("label", null, "at most ", number("n", 5000), ` ${mxd.word(student)}s`), " · ",
        h("label", null, number("contexts", 50), " contexts a band")), said, save,
    ]);
    preview();
  };

  // ---- the view
  const ABOUT = {
    routing: "What is lost when each active unit writes what another would. Where that is little, the dense path does the work.",
    dead: "A dead unit fired on none of the T collected tokens; all that is known is a rate below 3/T.",
    shared: "A unit on more than half of the tokens works like a bias: its contexts say little, and it is left out of partners.",
    weights: "The run's weights have changed since its units were collected: contexts and effects belong to the old ones.",
    tokens: "A unit that fires on 1 token in 100,000 is seen 10 times in a million: too few for bands, effects and labels.",
  };
  const section = (title, ...children) => h("section", { class: "panel" }, h("h2", null, title), children);
  const banner = ({ level, text, about }) => h("div", { class: `banner ${level}`, role: "note" }, text,
    ABOUT[about] && h("details", null, h("summary", null, "what is this"), h("p", null, ABOUT[about])));
  mxd.view("overview", {
    title: () => "Overview",
    mount(el, route, ctx) {
      const { run, student, signal } = ctx;
      const has = student && student.store;
      const mine = (run.banners || []).filter((b) => !b.student || (student && b.student === student.name));
      const trained = known(run.train_tokens) && `trained on ${fmt.big(run.train_tokens)} tokens`;
      const where = [run.host, student && student.hookpoint, trained, `seed ${run.seed}`];
      const place = h("div", { class: "stack" }, has ? ui.loading(400) : ui.noStore(student, signal));
      el.append(...[
        h("div", { class: "head" }, h("h1", null, `run ${run.name}`), h("p", { class: "soft" }, where.filter(Boolean).join(" · ")),
          mxd.source.live && has && ui.button("Export", () => ui.exportDialog(student, null), { class: null, "aria-haspopup": "dialog" }),
          mxd.source.live && h("a", { href: "/api/run", target: "_blank", rel: "noopener" }, "JSON")),
        mine.map(banner), student && verdict(student, run),
        h("div", { class: "cols" }, section("What replacing costs", frontier(run)),
          section("How often units fire", population(run) || ui.noStore(student, signal))),
        section(`Map of ${mxd.word(student)}s`, place), section("Students", twin(run)),
        section("Where this comes from", provenance(run, student)),
      ].flat().filter(Boolean));
      const draw = () => map(place, ctx).catch((error) => signal.aborted || place.append(ui.failed(error, draw)))
        .finally(() => place.firstChild.classList.contains("skel") && place.firstChild.remove());
      if (has) draw();
    },
  });
})();
