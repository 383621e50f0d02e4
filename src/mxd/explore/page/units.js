// Units: every unit of a student in one table, filtered and sorted in the page; a preview of the row in focus; CSV.
"use strict";
(() => {
  const { mxd } = window;
  const { h, fmt, ui, charts } = mxd;
  const { STATES } = mxd.select;
  const BINS = 40;
  const LATER = "share,steadiness,top_token_share,token_entropy,partner_lift,probe_f1,tags";
  const FIELD = Object.fromEntries(mxd.fields.map((f) => [f.key, f]));
  let here = null;

  /** Which bin of its histogram each unit falls in (255: unknown), worked out once. */
  function binned({ low, high, kind, c, values }) {
    const scale = charts.scale(low, high, 0, BINS - 1e-6, kind, c);
    return Uint8Array.from(values, (v) => (Number.isFinite(v) && (kind !== "log" || v > 0) ? scale(v) : 255));
  }
  function count(bins, units) {
    const counts = new Array(256).fill(0);
    for (let i = 0; i < units.length; i++) counts[bins[units[i]]]++;
    return counts.slice(0, BINS);
  }
  /** So many characters of a context around its peak at most, by whole tokens, few before it so that it stays in view. */
  function short(context, most = 40, before = 13) {
    const { cuts } = context;
    const last = cuts.length - 1;
    let [from, to, grown] = [context.peak, context.peak + 1, true];
    while (grown) {
      const right = to < last && cuts[to + 1] - cuts[from] <= most;
      if (right) to += 1;
      const left = from > 0 && cuts[to] - cuts[from - 1] <= most && cuts[context.peak] - cuts[from - 1] <= before;
      if (left) from -= 1;
      grown = left || right;
    }
    const levels = context.levels.filter(([i]) => i >= from && i < to).map(([i, v]) => [i - from, v]);
    const part = { levels, peak: context.peak - from, start: context.start + from, ids: context.ids && context.ids.slice(from, to) };
    const text = context.text.slice(cuts[from], cuts[to]);
    return { ...context, ...part, text, cuts: cuts.slice(from, to + 1).map((at) => at - cuts[from]) };
  }
  const noted = (note, label) => (note && note.text ? { text: note.text, who: "your note" }
    : label ? { text: label.text, who: [label.author, label.model].filter(Boolean).join(" · "), auto: label.author !== "user" } : null);

  /** The table's columns; cells are filled anew for each row that scrolls by. */
  function columns(view) {
    const { data, student } = view;
    const at = (i) => view.units[i];
    const value = (key, i) => data.get(key)[at(i)];
    const say = (cell, s, title = "") => Object.assign(cell, { textContent: s, title });
    const row = (fill) => (cell, i) => {
      const r = view.rows.get(at(i));
      if (r) fill(cell, r, i);
      else say(cell, r === null ? "–" : "…");
    };
    const number = (key, width, fill, css = "") => {
      const { name, title, unit, format } = FIELD[key];
      const plain = (cell, i) => say(cell, format(value(key, i), data.tokens));
      const head = view.brushes[key];
      return { key, name, title: `${title} (${unit})`, width, css: `num ${css}`, sortable: true, head, cell: fill || plain };
    };
    const { freq } = view.axes;
    const scale = freq && charts.scale(freq.low, freq.high, 4, 100, "log");
    const fires = (cell, i) => {
      const n = value("fires", i);
      say(cell, fmt.rate(n, data.tokens), `${fmt.int(n)} of ${fmt.big(data.tokens)} tokens`);
      cell.style.setProperty("--bar", `${n > 0 && scale ? scale(n / data.tokens) : 0}%`);
    };
    const error = (i) => (Number.isFinite(value("effect_se", i)) ? ` ±${fmt.num(1.96 * value("effect_se", i), 1)}` : "");
    const label = row((cell, r) => {
      const found = noted(r.note, r.label);
      const none = () => h("span", { class: "soft" }, "(none)");
      cell.replaceChildren(found ? mxd.heat.text(found.text, { class: found.auto ? "auto" : null }) : none());
      cell.title = found ? found.who : "";
    });
    const best = row((cell, r) => {
      const draw = () => (r.best ? mxd.heat.context(short(r.best), { width: null, max: Math.max(r.best.a, data.get("max_a")[r.unit]) })
        : h("span", null, "–"));
      cell.replaceChildren((r.el = r.el || draw()));
    });
    const title = "firings over activation, log scale";
    const spread = row((cell, r) => cell.replaceChildren((r.spread = r.spread || charts.spark(r.spark || [], { width: 60, title }))));
    const starred = (i) => value("star", i) > 0;
    const star = (cell, i) => say(cell, starred(i) ? "★" : "☆").setAttribute("aria-label", starred(i) ? "starred" : "no star");
    const unit = (cell, i) => {
      if (!cell.firstChild) cell.append(h("a", { tabindex: "-1" }));
      cell.firstChild.setAttribute("href", view.base.join(at(i)));
      cell.firstChild.textContent = at(i);
    };
    const with_ = (i) => `${value("partner", i)} ×${fmt.num(value("partner_lift", i), 2)}`;
    const partner = (cell, i) => say(cell, Number.isFinite(value("partner", i)) ? with_(i) : "–");
    const state = (cell, i) => say(cell, STATES[value("state", i)] || "–");
    const tags = row((cell, r) => say(cell, ((r.note && r.note.tags) || []).join(", ")));
    const own = (key, name, title, width, cell, more) => ({ key, name, title, width, cell, ...more });
    const top = (cell, i) => say(cell, fmt.pct(value("top_token_share", i)), (view.rows.get(at(i)) || {}).top_token || "");
    const steady = (cell, i) => say(cell, student.word === "latent" ? "fixed" : fmt.num(value("steadiness", i), 2));
    const states = "dead: 0 firings; rare: under 30; shared: on over half of all tokens.";
    return [
      own("star", "★", "Starred by you: click, Space, or f.", 30, star, { sortable: true, css: "star", act: (i) => view.star(at(i)) }),
      own("unit", mxd.word(student), "Its number.", 68, unit, { sortable: true, css: "num pin" }),
      own("label", "label", "Your note, else the label; in italics where it was made automatically.", 110, label, { grow: 2 }),
      own("context", "best context", "Around its largest a; colour: share of its max.", 220, best, { grow: 3 }),
      number("freq", 116, fires, "logbar"),
      number("effect", 116, (cell, i) => say(cell, fmt.nats(value("effect", i)) + error(i), "± 95 %")), number("max_a", 60),
      own("spread", "spread", "Its activations between 0 and its max, 24 bins, log counts.", 76, spread, { css: "whole" }),
      own("state", "state", states, 58, state, { sortable: true }),
      number("score", 56, (cell, i) => say(cell, fmt.num(value("score", i), 2), `n ${fmt.int(value("score_n", i))}`)),
      number("share", 66), number("steadiness", 78, steady), number("top_token_share", 76, top),
      number("token_entropy", 84), number("partner_lift", 92, partner),
      number("probe_f1", 70), own("tags", "tags", "Your tags.", 100, tags),
    ];
  }

  /** What the pane beside the table shows of a unit. */
  function preview(u, student, href) {
    const c = u.columns;
    const found = noted(u.note, u.labels && u.labels[0]);
    const list = (name, all) => all && all.length > 0 && [h("h3", null, name),
      h("p", null, all.slice(0, 8).map((t) => [mxd.heat.token(t.token), " "]))];
    const head = (name, fires) => h("h3", null, `${name} `, h("span", { class: "soft" }, fmt.int(fires)));
    const band = ({ name, fires, contexts }) => contexts.length > 0 && [head(name, fires),
      contexts.slice(0, 2).map((one) => h("div", { class: "row" }, mxd.heat.context(one, { width: 10, max: Math.max(one.a, c.max_a) })))];
    const facts = `fires ${fmt.rate(c.fires, u.tokens)} · effect ${fmt.nats(c.effect)} nats · max ${fmt.num(c.max_a)} · ${u.state}`;
    const label = found ? mxd.heat.text(found.text) : h("span", { class: "soft" }, "no label");
    return [h("h2", null, h("a", { href }, `${mxd.word(student)} ${u.unit}`)), h("p", null, label), h("p", { class: "soft" }, facts),
      u.bands.map(band), list("promoted", u.promoted), list("peak tokens", u.peak_tokens)];
  }

  /** One CSV cell; text that a spreadsheet would take for a formula starts with ' instead. */
  function csvCell(v) {
    if (typeof v === "number") return Number.isFinite(v) ? String(v) : "";
    const safe = String(v ?? "").replace(/^(?=[=+\-@\t\r])/, "'");
    return /[",\n\r]/.test(safe) ? `"${safe.replaceAll('"', '""')}"` : safe;
  }
  async function csv(view) {
    const { data, units } = view;
    const names = mxd.fields.map((f) => f.column);
    const texts = units.length <= 5000;
    for (let i = 0; texts && i < units.length; i += 200) await view.load(i, Math.min(i + 200, units.length));
    const lines = [["unit", "state", ...names, "starred", ...(texts ? ["label", "note", "context"] : [])].join(",")];
    for (const u of units) {
      const { label, note, best } = view.rows.get(u) || {};
      const more = texts ? [label && label.text, note && note.text, best && best.text] : [];
      const numbers = names.map((name) => data.get(name)[u]);
      lines.push([u, STATES[data.get("state")[u]], ...numbers, data.get("star")[u], ...more].map(csvCell).join(","));
    }
    ui.save(`${lines.join("\r\n")}\r\n`, `${mxd.state.run.name}-${view.student.name}-units.csv`, "text/csv");
    ui.announce(`${fmt.int(units.length)} rows saved${texts ? "" : ", without labels: more than 5,000 rows"}`);
  }
  /** Unit of a list that a seed picks: the first of its shuffle. */
  function drawn(units, seed) {
    const keys = mxd.select.shuffled(seed, units);
    return units[keys.reduce((best, key, i) => (key < keys[best] ? i : best), 0)];
  }

  // ---- the view
  const query = () => mxd.route().query;
  const clear = (keys) => Object.fromEntries(keys.map((key) => [key, null]));
  const hidden = () => new Set((query().get("cols") ?? LATER).split(","));
  const choice = (name, options, change) => {
    const el = h("select", { "aria-label": name }, options.map(([value, text]) => h("option", { value }, text)));
    el.addEventListener("change", () => change(el.value || null));
    return el;
  };
  const tick = (name, text, change) => {
    const box = h("input", { type: "checkbox", name });
    box.addEventListener("change", () => change(box.checked));
    return h("label", { class: "check" }, box, text);
  };
  const button = (text, run, title) => ui.button(text, run, { title, class: null });

  /** Search, state, flags and probe: {nodes, sync()}; set(changes) writes to the address. */
  function controls(student, set) {
    const word = mxd.word(student);
    const search = h("input", { type: "search", "data-search": true, maxlength: 200, placeholder: "search label, note, token",
      "aria-label": "search", spellcheck: "false" });
    const hear = mxd.debounce(() => set({ q: search.value.trim() || null }), 150);
    const fire = `which ${word}s fire on this text`;
    const places = [["", "label, note, token"], ["label", "label"], ["note", "note"], ["token", "peak token"], ["text", fire]];
    const where = choice("search in", places, (v) => set({ in: v, ...(v === "text" ? { sort: null } : {}) }));
    const states = [["", "any state"], ...STATES.map((s) => [s, s]), ["rare,live,shared", "not dead"]];
    const state = choice("state", states, (v) => set({ state: v }));
    const probe = choice("probe", [["", "probe: any"], ["1", "has a probe"]], (v) => set({ probe: v }));
    const flags = [["star", "starred"], ["labelled", "labelled"]].map(([k, text]) => tick(k, text, (on) => set({ [k]: on ? "1" : null })));
    const known = (select, value) => [...select.options].some((o) => o.value === value);
    // What fires on a text is work for the host: asked on Enter only.
    search.addEventListener("input", () => where.value !== "text" && hear());
    search.addEventListener("keydown", (event) => event.key === "Enter" && (hear(), hear.now()));
    probe.addEventListener("focus", () => mxd.probeClasses(student).then((found) => {
      for (const [k, units] of [...found].sort()) if (!known(probe, k)) probe.append(h("option", { value: k }, `${k} (${units.length})`));
    }, () => {}), { once: true });
    const sync = () => {
      const q = query();
      if (document.activeElement !== search) search.value = q.get("q") || "";
      for (const [el, key] of [[where, "in"], [state, "state"], [probe, "probe"]]) {
        const value = q.get(key) || "";
        if (!known(el, value)) el.append(h("option", { value }, value));
        el.value = value;
      }
      for (const { firstChild: box } of flags) box.checked = q.get(box.name) === "1";
    };
    return { nodes: [search, where, state, probe, flags], sync };
  }
  /** Why nothing is listed, and which filter to loosen. */
  function nothing(filters, set, word) {
    const [worst] = [...filters].sort((a, b) => b.alone - a.alone);
    if (query().get("in") === "text" && filters.some((f) => f.answer && f.answer.host_needed)) {
      return ui.empty(`Which ${word}s fire on a text is read by the host. ${mxd.blocked() || ""}`);
    }
    const [text, keys] = worst && worst.alone
      ? [[`No ${word} matches; loosen `, h("em", null, worst.text), ` (it alone removes ${fmt.int(worst.alone)}).`], [worst.key]]
      : [[`No ${word} matches; no filter alone is to blame.`], filters.map((f) => f.key)];
    const away = button(keys.length === 1 ? "Take it away" : "Take all away", () => set(clear(keys)));
    return h("div", { class: "empty" }, h("p", null, text), away);
  }

  async function build(el, ctx) {
    const { student, signal } = ctx;
    const data = await mxd.columns(student);
    if (signal.aborted) return;
    const word = mxd.word(student);
    const axes = Object.fromEntries(mxd.fields.map((f) => [f.key, mxd.fieldAxis(f, data.get(f.key))]).filter(([, axis]) => axis));
    const keys = Object.keys(axes);
    const each = (fn) => Object.fromEntries(keys.map((k) => [k, fn(k)]));
    const bins = each((k) => binned(axes[k]));
    const totals = each((k) => count(bins[k], data.units));
    const set = (changes) => (mxd.setQuery(changes), refresh());
    const brushes = (wide) => each((k) => charts.brush({ axis: axes[k], wide, tokens: data.tokens, onChange: (v) => set({ [k]: v }) }));
    const view = { data, student, axes, brushes: brushes(false), units: data.units, rows: new Map(), ctx, memo: ctx.kept, base: ["", ""] };
    const wide = brushes(true);
    let kept = { ...view.memo };
    view.load = async (from, to, stop) => {
      const missing = [...view.units.subarray(from, to)].filter((u) => !view.rows.has(u));
      if (!missing.length) return;
      const { units } = await mxd.source.rows(student.name, missing, { signal: stop });
      if (view.rows.size > 20000) view.rows.clear();
      for (const u of missing) view.rows.set(u, null);
      for (const r of units) view.rows.set(r.unit, r);
    };
    view.star = async (u) => {
      try {
        const old = (await mxd.source.note(student.name, u)) || { text: "", tags: [] };
        await mxd.source.saveNote(student.name, u, { ...old, star: !(data.get("star")[u] > 0) });
        ui.announce(data.get("star")[u] > 0 ? "starred" : "no longer starred");
      } catch (error) {
        status.replaceChildren(ui.failed(error));
      }
    };
    view.random = (all) => {
      const asked = query().get("random");
      const seed = Number(asked ?? Math.floor(Math.random() * 1e6));
      const from = all ? data.units.filter((u) => data.get("state")[u] > 0) : view.units;
      const pairs = new URLSearchParams([...(all ? [] : mxd.select.query(query())), ["seed", seed]]);
      if (from.length) mxd.go({ view: "unit", id: String(drawn(from, seed)), query: pairs }, { replace: asked !== null });
    };
    view.open = (i) => i < view.units.length && mxd.go({ view: "unit", id: String(view.units[i]), query: mxd.select.query(query()) });

    const bar = controls(student, set);
    const [total, status, holder] = [h("strong", { role: "status" }), h("div"), h("div", { class: "gridbox" })];
    const [chips, picks, sliders] = ["chips", "brushes", "brushes"].map((css) => h("div", { class: css }));
    const pane = h("aside", { class: "preview panel", "aria-label": `preview of the ${word} in focus` });
    const failed = (error) => status.replaceChildren(ui.failed(error, refresh));
    const shuffle = () => set({ sort: `shuffle:${Math.floor(Math.random() * 1e6)}` });
    const folded = (name, inside) => h("details", { class: "filters" }, h("summary", null, name), inside);
    el.append(...[
      h("h1", { class: "sr" }, `${word}s of ${student.name}`),
      h("div", { class: "controls" }, bar.nodes, total, h("span", { class: "seg" },
        button("Random", () => view.random(true), `a random ${word} that fires`),
        button("of filter", () => view.random(false), `a random ${word} of those below`),
        button("Shuffle", shuffle, "this list in a random order, the same for everyone with the link")),
      button("CSV", () => csv(view).catch(failed)), mxd.source.live && button("Export", () => ui.exportDialog(student, query()))),
      h("div", { class: "controls" }, folded("Filters", sliders), folded("Columns", picks), chips), status,
      h("div", { class: "units" }, holder, pane)]);
    sliders.append(...keys.map((k) => h("div", { title: FIELD[k].title }, h("b", null, `${FIELD[k].name}, ${FIELD[k].unit}`), wide[k])));
    const every = columns(view);
    const shown = () => every.filter((c) => !hidden().has(c.key));
    picks.append(...every.map(({ key, name }) => tick(key, name, (on) => {
      const off = hidden();
      if (on) off.delete(key);
      else off.add(key);
      mxd.setQuery({ cols: [...off].join(",") || "none" });
      table.update({ columns: shown() });
    })));

    const ask = mxd.latest();
    const see = mxd.debounce((i) => {
      const u = view.units[i];
      if (u === undefined || getComputedStyle(pane).display === "none") return;
      const draw = (found) => pane.replaceChildren(...preview(found, student, view.base.join(u)).flat(9).filter(Boolean));
      const lost = (error) => pane.replaceChildren(ui.failed(error, () => see(i)));
      ask((stop) => mxd.source.unit(student.name, u, { signal: stop }), draw, lost);
    }, 120);
    const onSort = (key, add) => {
      const old = mxd.select.parseSort(query().get("sort") || "-effect");
      const first = old.find(([k]) => k === key);
      const down = first ? !first[1] : !["unit", "state"].includes(key);
      const sort = !add ? [[key, down]] : first ? old.map((s) => (s === first ? [key, down] : s)) : [...old, [key, down]];
      set({ sort: sort.map(([k, d]) => (d ? "-" : "") + k).join(",") });
    };
    const onFocus = (i) => ((view.memo.row = i), see(i));
    const table = (view.table = mxd.table(holder, {
      label: `${word}s`, columns: shown(), headHeight: 50, load: view.load, onOpen: view.open, onSort, onFocus, onError: failed,
    }));

    function histograms(units, filters) {
      for (const k of keys) {
        const some = filters.length ? count(bins[k], units) : null;
        for (const one of [view.brushes[k], wide[k]]) one.draw(totals[k], some, query().get(k));
      }
    }
    function chip({ key, text, alone }) {
      const title = `It alone removes ${fmt.int(alone)}; click takes it away.`;
      return ui.button(`${text} ✕`, () => set(clear([key])), { class: "chip", title });
    }
    const list = mxd.latest();
    function refresh() {
      bar.sync();
      for (const { firstChild: box } of picks.children) box.checked = !hidden().has(box.name);
      view.base = mxd.href({ view: "unit", id: "0", query: mxd.select.query(query()) }).split(/0(?=\?|$)/);
      list(() => mxd.select.explain(student, query()), ({ units, total: n, filters, sort }) => {
        const { top = 0, row = 0 } = kept;
        kept = {};
        view.units = units;
        total.textContent = `${fmt.int(units.length)} of ${fmt.int(n)}`;
        chips.replaceChildren(...filters.map(chip));
        status.replaceChildren(...(units.length ? [] : [nothing(filters, set, word)]));
        holder.parentNode.hidden = !units.length;
        table.update({ count: units.length, sort, top, row });
        see(row);
        requestAnimationFrame(() => histograms(units, filters));
      }, failed);
    }
    view.refresh = refresh;
    here = view;
    document.addEventListener("mxd-note", ({ detail }) => {
      const r = detail.student === student.name && view.rows.get(detail.unit);
      if (r) r.note = detail.note;
      table.refresh();
    }, { signal });
    if (!query().has("random")) return refresh();
    view.units = await mxd.select(student, query());
    view.random(!query().has("of"));
  }

  const move = (by) => () => here && (here.table.element.focus({ preventScroll: true }), here.table.move(by));
  const now = (fn) => () => Boolean(here && here.units.length) && fn(here.units[here.table.index], here.table.index);
  mxd.view("units", {
    title: () => `${mxd.word(mxd.state.student)}s`,
    async mount(el, route, ctx) {
      if (!ctx.student || !ctx.student.store) return void el.append(ui.noStore(ctx.student, ctx.signal));
      const wait = ui.loading(480);
      el.append(wait);
      await build(el, ctx).finally(() => wait.remove());
      return () => {
        if (!here || here.ctx !== ctx) return;
        here.memo.top = here.table.top;
        here = null;
      };
    },
    update: () => here && here.refresh(),
    keys: {
      j: { what: "next row", run: move(1) },
      k: { what: "previous row", run: move(-1) },
      Enter: { what: "open the unit", run: now((u, i) => here.open(i)) },
      f: { what: "star", run: now((u) => here.star(u)) },
      x: { what: "to the bench", run: now((u) => mxd.go({ view: "bench", query: { unit: String(u) } })) },
      r: { what: "a random unit of the filter", run: () => here && here.random(false) },
    },
  });
})();
