// One unit: what it is called, its figures, contexts over its whole range, what it writes, and the reader's notes on it.
"use strict";
(() => {
  const { mxd } = window;
  const { h, ui, fmt, heat, charts } = mxd;
  const [AT_ONCE, TWINS] = [10, 6];
  const wider = { 10: 32, 32: 128, 128: 10 }; // tokens of a context
  const known = (v) => v !== null && v !== undefined && Number.isFinite(v);

  // ---- loading, and the units beside it -------------------------------------------------------------------------------------
  const cache = new Map();
  let now = null;
  function load(student, unit, signal) {
    const key = `${student}/${unit}`;
    if (!cache.has(key)) {
      const coming = mxd.source.unit(student, unit, { signal });
      cache.set(key, coming);
      coming.catch(() => cache.get(key) === coming && cache.delete(key));
      if (cache.size > 12) cache.delete(cache.keys().next().value);
    }
    return cache.get(key);
  }
  function settings(query) {
    const [band, w, scale] = ["band", "w", "scale"].map((key) => query.get(key) || "");
    return { band: /^[0-6]$/.test(band) ? Number(band) : null, w: wider[w] ? Number(w) : 32, scale: scale === "row" ? scale : "unit" };
  }
  /** What listens for the unit that was shown ends, and its note is saved. */
  function leave() {
    if (now.notes) now.notes.leave();
    if (now.stop) now.stop.abort();
  }
  function open(route) {
    const { el, student, ask } = now;
    leave();
    Object.assign(now, { stop: new AbortController(), u: Number(route.id), data: null, notes: null, list: null, pick: null, near: null,
      opts: settings(route.query) });
    if (!student || !student.store) return void el.replaceChildren(ui.noStore(student, now.stop.signal));
    if (route.id === null || !Number.isInteger(now.u)) {
      return void el.replaceChildren(ui.empty("No unit is named here."),
        h("p", null, h("a", { href: mxd.href({ view: "units" }) }, "Choose one in Units")));
    }
    if (!el.firstChild) el.append(ui.loading(600));
    ask((signal) => load(student.name, now.u, signal), (data) => {
      now.data = data;
      draw();
      neighbours(mxd.select.query(route.query));
    }, (error) => el.replaceChildren(ui.failed(error, () => open(mxd.route()))));
  }
  async function neighbours(query) {
    const { student, u } = now;
    const found = await mxd.select.explain(student, query).catch(() => ({ units: [], filters: [] }));
    if (!now || now.u !== u || now.student !== student || !now.data) return;
    const at = found.units.indexOf(u);
    const outside = at < 0; // then the numbers themselves are walked
    const n = outside ? student.n_units : found.units.length;
    const of = (i) => (i < 0 || i >= n ? null : outside ? i : found.units[i]);
    now.near = [of((outside ? u : at) - 1), of((outside ? u : at) + 1)];
    const href = (unit) => mxd.href({ view: "unit", id: unit, query: mxd.route().query });
    const arrow = (unit, i) => (unit === null ? h("span", { class: "soft" }, i ? "›" : "‹")
      : h("a", { href: href(unit), "aria-label": `${i ? "next" : "previous"}: ${unit}` }, i ? `${unit} ›` : `‹ ${unit}`));
    const place = outside ? `${fmt.int(u + 1)} of all ${fmt.int(n)}${found.filters.length ? ", not in the filter" : ""}`
      : `${fmt.int(at + 1)} of ${fmt.int(n)}${found.filters.length ? ` with ${found.filters.map((f) => f.text).join(", ")}` : ""}`;
    now.nav.replaceChildren(...now.near.map(arrow), h("a", { class: "soft", href: mxd.href({ view: "units", query }) }, place));
    if (!mxd.source.live || !window.requestIdleCallback) return;
    const ahead = (unit) => unit !== null && load(student.name, unit).catch(() => null);
    requestIdleCallback(() => now && now.u === u && now.near.forEach(ahead));
  }
  const step = (i) => Boolean(now.near && now.near[i] !== null) && mxd.go({ view: "unit", id: now.near[i], query: mxd.route().query });

  // ---- what it is called, its figures ---------------------------------------------------------------------------------------
  const word = () => mxd.word(now.student);
  const pm = (se) => `± ${known(se) ? fmt.num(1.96 * se, 2) : "–"}`;
  function verdict({ state, columns: c, tokens }) {
    if (state === "dead") return `Dead: it fired on 0 of ${fmt.big(tokens)} tokens, a rate below ${fmt.num(3 / tokens, 2)} (95 %).`;
    if (state === "rare") return `Rare: ${fmt.int(c.fires)} firings in all, little to judge by.`;
    const often = state === "shared" ? `Shared: it fires on ${fmt.pct(c.fires / tokens)} of tokens. ` : "";
    if (!known(c.effect) || !known(c.effect_se)) return `${often}What removing it costs is not known.`;
    if (Math.abs(c.effect) <= 1.96 * c.effect_se) return `${often}Its estimated effect can't be told from 0.`;
    return often + (c.effect > 0 ? "It helps: removing it costs nats where it fires." : "It hurts: removing it saves nats where it fires.");
  }
  function labels() {
    const scored = (l) => [["detection", l.detection, l.detection_n], ["fuzzing", l.fuzzing, l.fuzzing_n]]
      .filter(([, v]) => known(v)).map(([name, v, n]) => `, ${name} ${fmt.num(v, 2)} (n ${fmt.int(n)})`).join("");
    const label = (l) => h("p", null, h("strong", null, heat.text(l.text)), " ",
      h("span", { class: "soft" }, heat.text([...new Set([l.author, l.method, l.model])].filter(Boolean).join(" · ")), scored(l)));
    const write = mxd.source.live && ui.button("write yours", () => now.notes.focus(), { "aria-label": "write your own label, as a note" });
    const all = now.data.labels.length ? now.data.labels.map(label) : h("p", { class: "soft" }, "none yet");
    return h("section", { class: "panel" }, h("h2", null, "Label"), all, h("p", null, verdict(now.data)), write);
  }
  const figure = (name, value, small, about, why) => h("div", { class: "figure" }, ui.tip(h("span", { tabindex: "0" }, name), about),
    h("b", null, value === null ? fmt.dash(why) : value), h("small", null, value === null ? why : small));
  /** The exact effect with its button; answer: a fresh measurement, else what the store has. */
  function exact(answer) {
    const { columns: c, state } = now.data;
    const { exact: v, exact_se: se, exact_n: n } = answer || c;
    const button = mxd.source.live && state !== "dead"
      && ui.button(known(v) ? "re-measure" : "measure", () => measure(cell, button), { "data-live": true });
    const differ = known(v) && known(c.effect) && v * c.effect < 0;
    const noise = differ && (Math.abs(v) < 1.96 * se || Math.abs(c.effect) < 1.96 * c.effect_se);
    const remark = differ && h("strong", { class: "warn" },
      noise ? "Signs differ, one within its noise of 0." : "Signs differ: trust the exact one, the estimate is first order.");
    const cell = figure("effect, exact", known(v) ? fmt.nats(v) : null, [`${pm(se)} nats, n ${fmt.int(n)} `, remark],
      "Nats lost by removing it outright, mean over at most 64 firings, ± 95 %.", state === "dead" ? "it never fired" : "not measured");
    if (button) cell.append(button);
    return cell;
  }
  async function measure(cell, button) {
    const { student, u, stop } = now;
    Object.assign(button, { disabled: true, textContent: "measuring, up to 2 min…" });
    try {
      const answer = await mxd.source.ablate({ student: student.name, unit: u }, { signal: stop.signal });
      if (!cell.isConnected) return;
      cell.replaceWith(exact(answer));
      ui.announce(`exact effect ${fmt.nats(answer.exact)} nats, n ${answer.exact_n}`);
    } catch (error) {
      if (!mxd.aborted(error)) button.replaceWith(ui.failed(error, () => measure(cell, button)));
    }
  }
  function figures() {
    const { data, student } = now;
    const { columns: c, tokens } = data;
    const no = data.state === "dead" ? "it never fired" : "too few of its firings were measured";
    const row = (name, v, text, small, about) => figure(name, known(v) ? text(v) : null, small, about, no);
    const turns = student.word === "latent" ? "a latent writes one direction" : c.steadiness > 0.9 ? "nearly one direction"
      : c.steadiness > 0.5 ? "its map turns with the text" : "its map depends on the text";
    return h("div", { class: "panel figures" },
      figure("fires", data.state === "dead" ? "never" : fmt.rate(c.fires, tokens), `${fmt.int(c.fires)} of ${fmt.big(tokens)} tokens`,
        "Tokens on which it is among the active ones."),
      row("max a", c.max_a, fmt.num, `median ${fmt.num(c.p50)}, 99 % ${fmt.num(c.p99)}`,
        "Largest activation after TopK; below, quantiles of its firings."),
      row("effect, estimated", c.effect, fmt.nats, `${pm(c.effect_se)} nats, n ${fmt.int(c.effect_n)}`,
        "Nats the following tokens lose if it is removed at a firing: first order, mean over n firings, ± 95 %."),
      exact(),
      row("share", c.share, fmt.pct, "of the layer's output",
        "Length of its contribution over that of the layer's output, mean over firings."),
      row("steadiness", c.steadiness, (v) => (student.word === "latent" ? "fixed" : fmt.num(v, 2)), turns,
        "Length of the mean unit vector of its contributions: 1 is a fixed direction."),
      row("top token", c.top_token_share, fmt.pct, "of its firings", "Share of firings that fall on its commonest token."),
      figure("gate bias", known(data.gate_bias) ? fmt.num(data.gate_bias) : null, `norm of its row ${fmt.num(data.norm)}`,
        "What its gate adds before TopK.", "this kind has none"));
  }

  // ---- the reader's note ----------------------------------------------------------------------------------------------------
  /** The note on this unit: {el, star: its button, focus(), leave(): saves what waits}; saves itself, and sets data.note. */
  function noteEditor(student, unit, data) {
    const held = { star: false, text: "", tags: [], updated: null, ...data.note };
    const { live } = mxd.source;
    const area = h("textarea", { rows: 3, maxlength: 20000, readonly: !live, "aria-label": "note" }, held.text);
    const tags = h("input", { value: held.tags.join("; "), readonly: !live, maxlength: 600 });
    const status = h("small", { role: "status" }, held.updated ? `saved ${fmt.ago(held.updated)}` : "");
    const star = h("button", { type: "button", class: "star", disabled: !live, "aria-label": "star", "data-live": true });
    const fault = h("div");
    let [running, again] = [false, false];
    const show = () => Object.assign(star, { ariaPressed: String(held.star), textContent: held.star ? "★" : "☆" });
    const list = () => tags.value.split(";").map((t) => t.trim()).filter(Boolean);
    async function save() {
      if (running) return void (again = true);
      [running, again] = [true, false];
      const sent = { star: held.star, text: area.value, tags: list() };
      status.textContent = "saving…";
      fault.replaceChildren();
      try {
        const note = await mxd.saveNote(student, unit, { ...sent, updated: held.updated });
        const empty = !sent.star && !sent.text && !sent.tags.length;
        if (note || empty) take(note || { ...sent, updated: null }, sent);
        status.textContent = note || empty ? `saved ${new Date().toTimeString().slice(0, 5)}` : "not saved: it was changed elsewhere";
      } catch (error) {
        status.textContent = "not saved";
        fault.replaceChildren(ui.failed(error, save));
        if (!el.isConnected) ui.dialog(`The note on ${unit} of ${student} is not saved`, el);
      }
      running = false;
      if (again) save();
    }
    function take(note, sent) {
      data.note = note.updated ? note : null;
      Object.assign(held, { star: held.star === sent.star ? note.star : held.star, updated: note.updated }); // a newer star is saved next
      if (area.value === sent.text) area.value = note.text; // a conflict may have chosen the other text
      if (list().join() === sent.tags.join()) tags.value = note.tags.join("; ");
      show();
    }
    const soon = mxd.debounce(save, 800);
    for (const field of [area, tags]) {
      field.addEventListener("input", () => ((status.textContent = "…"), soon()));
      field.addEventListener("change", soon.now);
    }
    star.addEventListener("click", () => {
      held.star = !held.star;
      show();
      ui.announce(held.star ? "starred" : "no longer starred");
      save();
    });
    show();
    const el = h("section", { class: "panel", "aria-label": "your note" }, h("div", { class: "line" }, h("h2", null, "Your note"), status),
      area, h("label", { class: "field" }, h("span", null, "tags, separated by ;"), tags), fault);
    return { el, star, focus: () => area.focus(), leave: soon.now };
  }

  // ---- contexts -------------------------------------------------------------------------------------------------------------
  function row(c, twin) {
    const { data, opts, u } = now;
    const max = data.columns.max_a;
    const text = heat.context(c, { width: opts.w, scale: opts.scale === "row" ? null : max, max, focus: true });
    text.tabIndex = -1;
    const place = `${[c.doc.source, c.doc.name].filter(Boolean).join(" ")} · ${fmt.int(c.start + c.peak)}`;
    const to = mxd.href({ view: "sentence", query: { seq: c.seq, at: c.start + c.peak, colour: u } });
    const delta = known(c.delta) ? fmt.nats(c.delta) : fmt.dash(twin ? "it is off here" : "not measured here");
    return h("div", { class: opts.w > 32 ? "row wrap" : "row", role: "listitem", "data-a": c.a },
      h("span", { class: "num" }, twin ? "0" : fmt.num(c.a)),
      h("span", { class: "ctx-line" }, text), h("span", { class: "num", title: "nats lost if removed here, first order" }, delta),
      h("span", { class: "doc", title: place }, mxd.source.live ? h("a", { href: to, tabindex: "-1" }, heat.text(place)) : heat.text(place),
        c.repeats > 1 && h("span", { title: `${c.repeats} firings with the same tokens around them` }, ` ×${c.repeats}`)));
  }
  function band(b) {
    const twin = b.band === TWINS;
    const rows = h("div", { class: "rows", role: "list" }, b.contexts.map((c) => row(c, twin)));
    const range = twin ? `tokens like its peaks where this ${word()} is off`
      : `a ${fmt.num(b.low)} to ${fmt.num(b.high)}, ${fmt.int(b.fires)} firings`;
    const more = ui.button("more", () => extend(b, rows, more),
      { "aria-label": `more of ${b.name}`, hidden: b.contexts.length >= b.kept, "data-live": true });
    return h("section", { "aria-label": `band ${b.name}` }, h("h3", null, b.name, " ", h("small", null, range)),
      b.contexts.length ? rows : h("p", { class: "soft" }, twin ? "No such token was found." : "No firing in this band."), more);
  }
  async function extend(b, rows, more) {
    const { student, u, stop } = now;
    more.disabled = true;
    try {
      const answer = await mxd.source.unit(student.name, u, { band: b.band, from: b.contexts.length, n: AT_ONCE, signal: stop.signal });
      const found = answer.bands.length ? answer.bands[0].contexts : [];
      b.contexts.push(...found);
      rows.append(...found.map((c) => row(c, b.band === TWINS)));
      heat.centre(rows);
      more.hidden = !found.length || b.contexts.length >= b.kept;
      if (found.length) focusOn(rows.children[b.contexts.length - found.length].querySelector(".ctx"));
      ui.announce(found.length ? `${found.length} more` : "there are no more");
    } catch (error) {
      if (!mxd.aborted(error)) more.after(ui.failed(error, () => extend(b, rows, more)));
    }
    more.disabled = false;
  }
  function contexts() {
    const { data, opts, list } = now;
    list.replaceChildren(...data.bands.filter((b) => opts.band === null || b.band === opts.band).map(band));
    const first = list.querySelector(".ctx");
    if (first) first.tabIndex = 0;
    if (list.isConnected) centre();
    if (!first) list.append(h("p", { class: "soft" }, "No context was kept in this band."));
    now.legend.replaceChildren(opts.scale === "row" ? heat.legend({ scale: 100, unit: "a", name: "% of the row's largest" })
      : heat.legend({ scale: data.columns.max_a }));
  }
  /** Peaks in the middle of their lines: now in the first band, elsewhere (measuring is slow) once a band comes near. */
  function centre() {
    const { list, opts, watch } = now;
    watch.disconnect();
    if (opts.w <= 32) [...list.children].forEach((section, i) => (i ? watch.observe(section) : heat.centre(section)));
  }
  function set(changes) {
    const { opts, pick } = now;
    if (!pick) return;
    Object.assign(opts, changes);
    mxd.setQuery({ band: opts.band, w: opts.w === 32 ? null : opts.w, scale: opts.scale === "row" ? "row" : null });
    for (const key of Object.keys(pick)) pick[key].set(opts[key]);
    contexts();
  }
  function focusOn(ctx) {
    for (const other of now.list.querySelectorAll(".ctx")) other.tabIndex = other === ctx ? 0 : -1;
    ctx.focus();
    ctx.closest(".row").scrollIntoView({ block: "nearest" });
  }
  function move(by) {
    const all = now.list ? [...now.list.querySelectorAll(".ctx")] : [];
    const at = all.indexOf(document.activeElement);
    const next = all[Math.max(0, Math.min(all.length - 1, at < 0 ? 0 : at + by))];
    if (next) focusOn(next);
  }
  function left() {
    const { data, opts, hist, student, u, stop } = now;
    const bands = [[null, "all"], ...data.bands.map((b) => [b.band, b.name])];
    now.pick = {
      band: mxd.choice("band of activations", bands, opts.band, (chosen) => set({ band: chosen })),
      w: mxd.choice("tokens of context", [[10, "10"], [32, "32"], [128, "128"]], opts.w, (w) => set({ w })),
      scale: mxd.choice("scale of colours", [["unit", "unit"], ["row", "row"]], opts.scale, (scale) => set({ scale })),
    };
    now.legend = h("div");
    const mark = ({ target }) => {
      const at = target.closest(".row");
      hist.mark(at ? Number(at.dataset.a) : null);
      for (const one of now.list.querySelectorAll(".row.cur")) one.classList.remove("cur");
      if (at) at.classList.add("cur");
    };
    const keys = (event) => {
      if (!event.target.matches(".ctx")) return;
      const by = { ArrowDown: 1, ArrowUp: -1 }[event.key];
      const chosen = event.target.querySelector(".sel");
      const link = event.key === "Enter" && event.target.closest(".row").querySelector(".doc a");
      if (chosen) chosen.scrollIntoView({ block: "nearest", inline: "nearest" });
      if (by) event.preventDefault();
      if (by) move(by);
      else if (link) link.click();
    };
    now.list = h("div", { class: "stack", on: { pointerover: mark, focusin: mark, keydown: keys } });
    contexts();
    return h("section", { class: "panel", "aria-label": "contexts" },
      h("div", { class: "line no-print" }, h("h2", null, "Contexts"), now.pick.band, h("span", { class: "soft" }, "tokens"), now.pick.w,
        h("span", { class: "soft" }, "scale"), now.pick.scale),
      now.legend, now.list, mxd.ownSentence(student.name, u, data.columns.max_a, stop.signal));
  }

  // ---- what it does ---------------------------------------------------------------------------------------------------------
  function written({ promoted, suppressed, written_from: n, columns: c }) {
    const items = (list) => list.map(({ token, mean, sd }) => ({ label: heat.token(token), value: mean, sd }));
    const max = Math.max(1e-9, ...[...promoted, ...suppressed].map((t) => Math.abs(t.mean) + t.sd));
    const map = now.student.word === "expert" ? `, averaged over ${fmt.int(n)} firings, for an expert is a map and not a direction` : "";
    const turns = map && c.steadiness < 0.5 && "This map depends on the text (low steadiness): a single firing may promote other tokens.";
    return [h("h3", null, "Promoted"), charts.bars(items(promoted), { max, label: "promoted tokens, logits" }), h("h3", null, "Suppressed"),
      charts.bars(items(suppressed), { max, label: "suppressed tokens, logits" }),
      h("p", { class: "soft" }, `Logits, mean ± sd${map}; the direct path only (contribution, final norm, unembedding), `,
        "minus the student's mean contribution. ", turns)];
  }
  function right() {
    const { data, student, hist } = now;
    const listed = (name, items, why, table) => [h("h3", null, name), items.length ? table(items) : h("p", { class: "soft" }, why)];
    const peak = ({ token, count, share }) => ({ label: heat.token(token), value: share, text: `${fmt.pct(share)} (${fmt.int(count)})` });
    const peaks = (items) => charts.bars(items.map(peak), { max: 1, label: "peak tokens, share of firings" });
    const partners = (items) => mxd.smallTable("fire on the same tokens; shared ones left out", [word(), "lift ×", "Jaccard"],
      items.map((p) => [mxd.unitLink(student.name, p.unit, p.label), fmt.num(p.lift), fmt.num(p.jaccard, 2)]));
    const aside = (m) => mxd.href({ view: "compare", query: { with: m.student, unit: now.u } });
    const compare = (m) => h("a", { href: aside(m), "aria-label": `compare with ${m.student}` }, m.student);
    const matches = (items) => mxd.smallTable("fire on the same tokens of the same text", ["unit", "of", "Jaccard", "r"],
      items.map((m) => [mxd.unitLink(m.student, m.unit, m.label), compare(m), fmt.num(m.jaccard, 2), fmt.num(m.corr, 2)]));
    const probes = (items) => mxd.smallTable("as a detector of a class", ["class", "F1", "n"],
      items.map((p) => [heat.text(`${p.task}: ${p.class}`), fmt.num(p.f1, 2), fmt.int(p.n)]));
    return h("section", { class: "panel", "aria-label": "what it does" }, h("h2", { class: "sr" }, "What it does"), hist, written(data),
      listed("Peak tokens", data.peak_tokens, "none counted", peaks),
      listed("Partners", data.partners, "none that fires with it more than chance", partners),
      listed("In other students", data.matches, "none fires on its tokens, or no other student was collected", matches),
      listed("Probes", data.probes, "no probe chose it", probes));
  }
  function dead() {
    const near = now.data.nearest;
    const said = near && ["Nearest live one: ", mxd.unitLink(now.student.name, near.unit, near.label),
      `, cosine of weights ${fmt.num(near.cosine, 2)}.`];
    return h("section", { class: "banner" }, "It never fired, so there are no contexts, histogram or tokens to show. ", said);
  }
  function draw() {
    const { el, data, student, u } = now;
    now.nav = h("nav", { class: "line no-print", "aria-label": `${word()}s beside this one` }, "\u00a0");
    now.notes = noteEditor(student.name, u, data);
    now.hist = charts.hist({ max: data.hist.max, counts: data.hist.counts, edges: data.band_edges });
    el.replaceChildren(now.nav,
      h("header", { class: "head" }, h("h1", null, `${student.name} · ${word()} ${u} `, now.notes.star,
        h("span", { class: "tag" }, data.state)),
        h("span", { class: "line no-print" }, mxd.source.live && ui.button("Bench", toBench),
          ui.button("Copy link", () => ui.copy(location.href)),
          mxd.source.live && h("a", { href: `/api/s/${encodeURIComponent(student.name)}/units/${u}` }, "JSON"))),
      h("div", { class: "cols" }, labels(), now.notes.el), figures(),
        data.state === "dead" ? dead() : h("div", { class: "split" }, left(), right()));
    if (now.list) centre();
    ui.announce(`${word()} ${u}, ${data.state}`);
  }

  const toBench = () => mxd.go({ view: "bench", query: { e: now.u } });
  const nextBand = () => {
    const all = [null, ...now.data.bands.map((b) => b.band)];
    return all[(all.indexOf(now.opts.band) + 1) % all.length];
  };
  mxd.view("unit", {
    title: (route) => `${mxd.word(mxd.state.student)} ${route.id}`,
    mount(el, route, ctx) {
      cache.clear();
      const watch = new IntersectionObserver((seen) => seen.filter((e) => e.isIntersecting).forEach(({ target }) => {
        heat.centre(target);
        watch.unobserve(target);
      }), { rootMargin: "300px" });
      now = { el: h("div", { class: "stack" }), watch, student: ctx.student, ask: mxd.latest() };
      addEventListener("beforeprint", () => now.list && heat.centre(now.list), { signal: ctx.signal });
      el.append(now.el);
      open(route);
      return () => {
        now.ask.cancel();
        watch.disconnect();
        leave();
        now = null;
      };
    },
    update: open,
    keys: {
      j: { what: "next context (Enter opens its text in Sentence)", run: () => move(1) },
      k: { what: "previous context", run: () => move(-1) },
      "[": { what: "previous unit of the filter", run: () => step(0) },
      "]": { what: "next unit of the filter", run: () => step(1) },
      f: { what: "star", run: () => now.notes && now.notes.star.click() },
      n: { what: "write a note", run: () => now.notes && now.notes.focus() },
      x: { what: "to the bench", run: toBench },
      w: { what: "width of contexts: 10, 32, 128 tokens", run: () => set({ w: wider[now.opts.w] }) },
      h: { what: "scale of colours: unit or row", run: () => set({ scale: now.opts.scale === "row" ? "unit" : "row" }) },
      b: { what: "next band of contexts", run: () => now.data && set({ band: nextBand() }) },
    },
  });
})();
